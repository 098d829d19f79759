//! What replications ask together: several that read one source, several that write one target, by the same user.
//!
//! Nobody shares with other rights than his own, and nobody waits for another's database: a lane is one database and one
//! user. What fails in company is tried alone, so that one's bad document is no other's failure.

use super::elements::BulkGetElement;
use super::gather::{FULL, Gather, Wish};
use super::parameters::Rights;
use super::peer::{ChangesRequest, Diff, Page, Peer, PeerError, Refused, Written};
use crate::couch::CouchError;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

type Result<T> = std::result::Result<T, PeerError>;
type Lane = (Arc<str>, Rights);

/// Requests of one kind at one database by one user.
const IN_FLIGHT_MAX: usize = 3;
/// How many revisions, documents or checkpoints a request asks for at most.
const REVS_MAX: usize = 2_000;
const DOCS_MAX: usize = 500;
const BYTES_MAX: usize = 2 * 1024 * 1024;
const LOCALS_MAX: usize = 500;
/// Replications that one change sets off begin within a moment of each other, and then read the source once.
const TOGETHER: Duration = Duration::from_millis(2);

pub struct Shared {
    changes: Gather<(Lane, ChangesRequest), ReadChanges>,
    diffs: Gather<Lane, AskDiff>,
    gets: Gather<Lane, GetSome>,
    writes: Gather<Lane, Write>,
    reads: Gather<Lane, ReadLocal>,
    checkpoints: Gather<Lane, WriteLocal>,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            changes: Gather::new(1, TOGETHER, |(_, asked), wishes| read_changes(asked, wishes)),
            diffs: Gather::new(IN_FLIGHT_MAX, Duration::ZERO, |_, wishes| ask_diffs(wishes)),
            gets: Gather::new(IN_FLIGHT_MAX, TOGETHER, |_, wishes| get_some(wishes)),
            writes: Gather::new(IN_FLIGHT_MAX, Duration::ZERO, |_, wishes| write(wishes)),
            // A run reads the target's checkpoint beside the source's changes, which wait as long.
            reads: Gather::new(IN_FLIGHT_MAX, TOGETHER, |_, wishes| read_locals(wishes)),
            checkpoints: Gather::new(1, TOGETHER, |_, wishes| write_locals(wishes)),
        }
    }
}

impl Shared {
    pub async fn changes(&self, peer: &Peer, asked: ChangesRequest) -> Result<Arc<Page>> {
        let answer = self.changes.ask((peer.key(), asked), ReadChanges(peer.clone())).await;
        answer.unwrap_or_else(|| Err(lost_in_company(peer)))
    }

    pub async fn revs_diff(&self, peer: &Peer, revs: Arc<Vec<(String, Vec<String>)>>) -> Result<Diff> {
        let answer = self.diffs.ask(peer.key(), AskDiff { peer: peer.clone(), revs }).await;
        answer.unwrap_or_else(|| Err(lost_in_company(peer)))
    }

    /// None where the answer is too large to be read at once.
    pub async fn get(&self, peer: &Peer, revs: Arc<Vec<(String, Vec<String>)>>) -> Result<Option<Vec<BulkGetElement>>> {
        let answer = self.gets.ask(peer.key(), GetSome { peer: peer.clone(), revs }).await;
        answer.unwrap_or_else(|| Err(lost_in_company(peer)))
    }

    pub async fn write(&self, peer: &Peer, docs: Vec<Document>) -> Result<Written> {
        let answer = self.writes.ask(peer.key(), Write { peer: peer.clone(), docs }).await;
        answer.unwrap_or_else(|| Err(lost_in_company(peer)))
    }

    pub async fn read_local(&self, peer: &Peer, id: &Arc<str>) -> Result<Option<Bytes>> {
        let answer = self.reads.ask(peer.key(), ReadLocal { peer: peer.clone(), id: id.clone() }).await;
        answer.unwrap_or_else(|| Err(lost_in_company(peer)))
    }

    pub async fn write_local(&self, peer: &Peer, id: &Arc<str>, doc: Value) -> Result<()> {
        let answer = self.checkpoints.ask(peer.key(), WriteLocal { peer: peer.clone(), id: id.clone(), doc }).await;
        answer.unwrap_or_else(|| Err(lost_in_company(peer)))
    }
}

/// The task that asked for several has crashed.
fn lost_in_company(peer: &Peer) -> PeerError {
    peer.error_of_ours(CouchError::Malformed(String::from("a request for several replications broke off")))
}

/// What went wrong in company, one by one.
async fn alone<W: Wish>(wishes: Vec<W>, ask: fn(Vec<W>) -> BoxFuture<'static, Vec<W::Answer>>) -> Vec<W::Answer> {
    let mut answers = Vec::with_capacity(wishes.len());
    for wish in wishes {
        answers.extend(ask(vec![wish]).await);
    }
    answers
}

/// A document as it travels: its text is not looked into.
#[derive(Debug, Clone)]
pub struct Document {
    pub id: Arc<str>,
    pub rev: Arc<str>,
    pub text: Bytes,
}

struct ReadChanges(Peer);

impl Wish for ReadChanges {
    type Answer = Result<Arc<Page>>;

    fn weight(&self) -> usize {
        0
    }
}

fn read_changes(asked: ChangesRequest, wishes: Vec<ReadChanges>) -> BoxFuture<'static, Vec<Result<Arc<Page>>>> {
    Box::pin(async move {
        let Some(ReadChanges(peer)) = wishes.first() else { return Vec::new() };
        let answer = peer.changes(&asked).await.map(Arc::new);
        vec![answer; wishes.len()]
    })
}

struct AskDiff {
    peer: Peer,
    revs: Arc<Vec<(String, Vec<String>)>>,
}

impl Wish for AskDiff {
    type Answer = Result<Diff>;

    fn weight(&self) -> usize {
        share(revs_in(&self.revs), REVS_MAX)
    }
}

fn revs_in(revs: &[(String, Vec<String>)]) -> usize {
    revs.iter().map(|(_, revs)| revs.len()).sum()
}

fn share(count: usize, max: usize) -> usize {
    count.saturating_mul(FULL) / max
}

fn ask_diffs(wishes: Vec<AskDiff>) -> BoxFuture<'static, Vec<Result<Diff>>> {
    Box::pin(async move {
        let Some(first) = wishes.first() else { return Vec::new() };
        let mut asked: HashMap<&str, Vec<&str>> = HashMap::new();
        for (id, revs) in wishes.iter().flat_map(|wish| wish.revs.iter()) {
            let known = asked.entry(id).or_default();
            for rev in revs {
                if !known.contains(&rev.as_str()) {
                    known.push(rev);
                }
            }
        }
        match first.peer.revs_diff(&asked).await {
            Ok(diff) if wishes.len() == 1 => vec![Ok(diff)],
            Ok(diff) => wishes.iter().map(|wish| Ok(own_part(&diff, &wish.revs))).collect(),
            Err(error) if wishes.len() > 1 && error.is_about_the_request() => alone(wishes, ask_diffs).await,
            Err(error) => vec![Err(error); wishes.len()],
        }
    })
}

/// Of an answer for several, what one of them had asked for.
fn own_part(diff: &Diff, revs: &[(String, Vec<String>)]) -> Diff {
    let own = revs.iter().filter_map(|(id, revs)| {
        let mut missing = diff.get(id)?.clone();
        missing.missing.retain(|rev| revs.contains(rev));
        (!missing.missing.is_empty()).then(|| (id.clone(), missing))
    });
    own.collect()
}

struct GetSome {
    peer: Peer,
    revs: Arc<Vec<(String, Vec<String>)>>,
}

impl Wish for GetSome {
    type Answer = Result<Option<Vec<BulkGetElement>>>;

    fn weight(&self) -> usize {
        share(revs_in(&self.revs), super::documents::SMALL_GET_REVS)
    }
}

fn get_some(wishes: Vec<GetSome>) -> BoxFuture<'static, Vec<Result<Option<Vec<BulkGetElement>>>>> {
    Box::pin(async move {
        let Some(first) = wishes.first() else { return Vec::new() };
        let mut places: HashMap<(&str, &str), usize> = HashMap::new();
        let mut asked = Vec::new();
        for (id, rev) in wishes.iter().flat_map(|wish| pairs(&wish.revs)) {
            places.entry((id, rev)).or_insert_with(|| {
                asked.push(json!({ "id": id, "rev": rev }));
                asked.len() - 1
            });
        }
        let ids: Vec<&str> = asked.iter().filter_map(|question| question["id"].as_str()).collect();
        match first.peer.bulk_get_whole(&asked, false, super::documents::SMALL_GET_BYTES).await {
            Ok(Some(elements)) if wishes.len() == 1 => vec![Ok(Some(elements))],
            Ok(Some(elements)) if ids.iter().zip(&elements).all(|(id, element)| *id == element.id) => {
                let own = |wish: &GetSome| {
                    let at = pairs(&wish.revs).filter_map(|pair| places.get(&pair));
                    at.filter_map(|at| elements.get(*at).cloned()).collect()
                };
                wishes.iter().map(|wish| Ok(Some(own(wish)))).collect()
            }
            // A server that answers in an order of its own (PouchDB's) cannot be asked for several at once.
            Ok(Some(_)) => alone(wishes, get_some).await,
            Ok(None) => wishes.iter().map(|_| Ok(None)).collect(),
            Err(error) => vec![Err(error); wishes.len()],
        }
    })
}

pub fn pairs(revs: &[(String, Vec<String>)]) -> impl Iterator<Item = (&str, &str)> {
    revs.iter().flat_map(|(id, revs)| revs.iter().map(move |rev| (id.as_str(), rev.as_str())))
}

struct Write {
    peer: Peer,
    docs: Vec<Document>,
}

impl Wish for Write {
    type Answer = Result<Written>;

    fn weight(&self) -> usize {
        let bytes: usize = self.docs.iter().map(|doc| doc.text.len()).sum();
        share(bytes, BYTES_MAX).max(share(self.docs.len(), DOCS_MAX))
    }
}

fn write(wishes: Vec<Write>) -> BoxFuture<'static, Vec<Result<Written>>> {
    Box::pin(async move {
        let Some(first) = wishes.first() else { return Vec::new() };
        let texts: Vec<Bytes> = wishes.iter().flat_map(|wish| wish.docs.iter().map(|doc| doc.text.clone())).collect();
        match first.peer.write(&texts).await {
            Ok(written) if wishes.len() == 1 => vec![Ok(written)],
            Ok(written) => wishes.iter().map(|wish| Ok(own_refusals(&written, &wish.docs))).collect(),
            Err(error) if wishes.len() > 1 && (error.is_about_the_request() || error.is_missing_stub()) => {
                alone(wishes, write).await
            }
            Err(error) => vec![Err(error); wishes.len()],
        }
    })
}

/// A refusal without a revision is everybody's who wrote that document.
fn own_refusals(written: &Written, docs: &[Document]) -> Written {
    let is_own = |refused: &&Refused| {
        let is_same_rev = |doc: &Document| refused.rev.as_deref().is_none_or(|rev| rev == &*doc.rev);
        docs.iter().any(|doc| *doc.id == *refused.id && is_same_rev(doc))
    };
    Written { refused: written.refused.iter().filter(is_own).cloned().collect(), is_confirmed: written.is_confirmed }
}

struct ReadLocal {
    peer: Peer,
    id: Arc<str>,
}

impl Wish for ReadLocal {
    type Answer = Result<Option<Bytes>>;

    fn weight(&self) -> usize {
        share(1, LOCALS_MAX)
    }
}

fn read_locals(wishes: Vec<ReadLocal>) -> BoxFuture<'static, Vec<Result<Option<Bytes>>>> {
    Box::pin(async move {
        let Some(first) = wishes.first() else { return Vec::new() };
        if let [ReadLocal { peer, id }] = wishes.as_slice() {
            return vec![peer.read_local(id).await];
        }
        let ids: Vec<Arc<str>> = wishes.iter().map(|wish| wish.id.clone()).collect();
        match first.peer.read_locals(&ids).await {
            Ok(docs) => docs.into_iter().map(Ok).collect(),
            // Not every server has it; and where the database is missing, each is told so in his own words.
            Err(error) if error.is_about_the_request() || error.is_not_found() || error.is_unsupported() => {
                let alone = wishes.iter().map(|wish| wish.peer.read_local(&wish.id));
                futures_util::future::join_all(alone).await
            }
            Err(error) => vec![Err(error); wishes.len()],
        }
    })
}

struct WriteLocal {
    peer: Peer,
    id: Arc<str>,
    doc: Value,
}

impl Wish for WriteLocal {
    type Answer = Result<()>;

    fn weight(&self) -> usize {
        share(1, LOCALS_MAX)
    }
}

fn write_locals(wishes: Vec<WriteLocal>) -> BoxFuture<'static, Vec<Result<()>>> {
    Box::pin(async move {
        let Some(first) = wishes.first() else { return Vec::new() };
        // CouchDB keeps two documents of an id that stands twice in one request.
        let mut ids: Vec<&Arc<str>> = wishes.iter().map(|wish| &wish.id).collect();
        ids.sort_unstable();
        let is_unique = ids.windows(2).all(|pair| pair[0] != pair[1]);
        if wishes.len() > 1 && is_unique {
            let docs: Vec<Value> = wishes.iter().map(|wish| wish.doc.clone()).collect();
            match first.peer.write_locals(&docs).await {
                Ok(true) => return wishes.iter().map(|_| Ok(())).collect(),
                Err(error) if !error.is_about_the_request() => return vec![Err(error); wishes.len()],
                _ => {}
            }
        }
        let mut answers = Vec::with_capacity(wishes.len());
        for wish in &wishes {
            answers.push(wish.peer.write_local(&wish.id, &wish.doc).await);
        }
        answers
    })
}
