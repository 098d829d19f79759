//! Brings the documents of one page of changes to the target: what it lacks, and nothing that it refuses twice.
//!
//! Documents travel as the text that came. A few are read at once, together with other replications of the same source; many
//! are read as a stream and written while it comes, so that memory does not depend on how large they are.

use super::attachments::{Carry, INLINE_BYTES_MAX, Moved, carry, shown};
use super::budget::{Budget, Grown, Reservation};
use super::elements::{BulkGetElement, BulkGetError, Shallow, Splitter};
use super::peer::{ChangesRow, Page, Peer, PeerError, Refused};
use super::shared::{Document, Shared, pairs};
use crate::replicate::{Counts, RefusedDocument};
use bytes::Bytes;
use futures_util::stream::{Stream, StreamExt, TryStreamExt};
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// So many revisions are read in one answer that is not streamed, and so long may it be.
pub const SMALL_GET_REVS: usize = 100;
pub const SMALL_GET_BYTES: usize = 256 * 1024;
/// Revisions of one streamed answer.
const STREAM_REVS: usize = 500;
/// Streams of one page at once.
const STREAMS: usize = 3;
/// What is read is written once it is so much.
const WRITE_BYTES: usize = 1024 * 1024;
const WRITE_DOCS: usize = 500;
/// CouchDB takes documents of 8 MB by default; what is longer than this is read by nobody.
const DOCUMENT_BYTES_MAX: usize = 256 * 1024 * 1024;
/// Attachments that come inside their documents, in one answer.
const INLINE_BATCH_BYTES: u64 = 512 * 1024;
/// Longer than that with its documents, it is not read to its end.
const INLINE_ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Documents of one page that pass through at once.
const PIPES: usize = 2;
/// Revisions for one `_revs_diff`.
const DIFF_REVS: usize = 1_000;

#[derive(Debug, Clone, thiserror::Error)]
pub enum TransferError {
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The source cannot give, or the target cannot keep, a document; it is neither's refusal.
    #[error("{which}: document {id:?}: {reason}")]
    Document { which: &'static str, id: String, reason: String },
}

type Result<T> = std::result::Result<T, TransferError>;
type Revs = Vec<(String, Vec<String>)>;

/// Revisions that the target lacks, and what it has that may be their ancestors.
#[derive(Debug, Clone, Default)]
struct Lacking {
    revs: Revs,
    ancestors: HashMap<String, Vec<String>>,
}

/// A document whose attachments the first answer did not have.
struct Attached {
    id: String,
    rev: String,
    shallow: Shallow,
}

pub struct Transfer {
    pub shared: Arc<Shared>,
    /// For streams.
    pub budget: Budget,
    /// For answers of a known size, which large documents must not hold up.
    pub small_budget: Budget,
    pub source: Peer,
    pub target: Peer,
    /// The first document of this run that the target refused.
    pub first_refused: OnceLock<RefusedDocument>,
    /// Ids that it refused, of the pages on their way.
    pub refused: Mutex<HashSet<String>>,
}

impl Transfer {
    /// `is_news` says that the target cannot have these yet, so that nobody asks it: it costs a document sent twice where
    /// that is wrong, and never one that is missing.
    pub async fn page(&self, page: &Page, is_news: bool) -> Result<Counts> {
        let is_along = |row: &&ChangesRow| is_news && page.docs.contains_key(&row.id);
        let along: Vec<Document> = page.rows.iter().filter(is_along).filter_map(|row| document_of(page, row)).collect();
        let others = page.rows.iter().filter(|row| !is_along(row));
        let revs: Revs = others.map(|row| (row.id.clone(), row.revs.clone())).collect();
        let whole = along.len() as u64;
        let mut counts = Counts {
            missing_checked: count(&revs) + whole,
            missing_found: whole,
            docs_read: whole,
            bytes_read: along.iter().map(|doc| doc.text.len() as u64).sum(),
            ..Counts::default()
        };
        counts += self.write(along).await?;
        if revs.is_empty() {
            return Ok(counts);
        }
        if is_news && count(&revs) <= SMALL_GET_REVS as u64 {
            counts += self.small(Lacking { revs, ancestors: HashMap::new() }, true).await?;
            return Ok(counts);
        }
        let lacking = self.lacking(revs).await?;
        counts += self.bring(lacking).await?;
        Ok(counts)
    }

    async fn lacking(&self, revs: Revs) -> Result<Lacking> {
        let mut lacking = Lacking::default();
        let pieces: Vec<Arc<Revs>> = pieces(revs, DIFF_REVS).map(Arc::new).collect();
        let asked = pieces.iter().map(|piece| self.shared.revs_diff(&self.target, piece.clone()));
        for (piece, diff) in pieces.iter().zip(futures_util::future::try_join_all(asked).await?) {
            let mut diff = diff;
            // In the order of the changes, which the answer has not.
            for (id, _) in piece.iter() {
                if let Some(missing) = diff.remove(id).filter(|missing| !missing.missing.is_empty()) {
                    if !missing.possible_ancestors.is_empty() {
                        lacking.ancestors.insert(id.clone(), missing.possible_ancestors);
                    }
                    lacking.revs.push((id.clone(), missing.missing));
                }
            }
        }
        Ok(lacking)
    }

    async fn bring(&self, lacking: Lacking) -> Result<Counts> {
        match count(&lacking.revs) {
            0 => Ok(Counts::default()),
            few if few <= SMALL_GET_REVS as u64 => self.small(lacking, false).await,
            _ => self.large(lacking).await,
        }
    }

    /// A few, in one answer.
    async fn small(&self, lacking: Lacking, is_news: bool) -> Result<Counts> {
        let reservation = self.small_budget.reserve(SMALL_GET_BYTES as u64).await;
        let revs = Arc::new(lacking.revs);
        let Some(elements) = self.shared.get(&self.source, revs.clone()).await? else {
            drop(reservation);
            let revs = Arc::unwrap_or_clone(revs);
            let lacking = match is_news {
                true => self.lacking(revs).await?,
                false => Lacking { revs, ancestors: lacking.ancestors },
            };
            return self.large(lacking).await;
        };
        let mut counts = Counts { missing_found: count(&revs), ..Counts::default() };
        let (mut docs, mut attached) = (Vec::new(), Vec::new());
        for element in elements {
            self.sort(element, &mut docs, &mut attached, &mut counts)?;
        }
        counts += self.write(docs).await?;
        drop(reservation);
        if attached.is_empty() {
            return Ok(counts);
        }
        let ancestors = match is_news {
            true => {
                let revs = attached.iter().map(|doc| (doc.id.clone(), vec![doc.rev.clone()])).collect();
                let lacking = self.lacking(revs).await?;
                attached.retain(|doc| pairs(&lacking.revs).any(|(id, rev)| id == doc.id && rev == doc.rev));
                lacking.ancestors
            }
            false => lacking.ancestors,
        };
        counts += self.attached(attached, &ancestors).await?;
        Ok(counts)
    }

    async fn large(&self, lacking: Lacking) -> Result<Counts> {
        let ancestors = &lacking.ancestors;
        let streams = pieces(lacking.revs, STREAM_REVS).map(|piece| self.stream(piece, ancestors));
        sum(futures_util::stream::iter(streams).buffered(STREAMS)).await
    }

    /// Writes while it reads. Where the budget is used up it writes early, and then finishes one document beyond it.
    async fn stream(&self, revs: Revs, ancestors: &HashMap<String, Vec<String>>) -> Result<Counts> {
        let mut counts = Counts { missing_found: count(&revs), ..Counts::default() };
        let asked: Vec<Value> = pairs(&revs).map(|(id, rev)| json!({ "id": id, "rev": rev })).collect();
        let mut held = self.budget.reserve(0).await;
        let mut response = self.source.bulk_get(&asked, false).await?;
        let mut splitter = Splitter::new(DOCUMENT_BYTES_MAX);
        let (mut docs, mut attached, mut bytes, mut answered) = (Vec::new(), Vec::new(), 0, 0);
        while let Some(chunk) = response.chunk().await.map_err(|error| self.source.lost(&error))? {
            let length = chunk.len() as u64;
            if held.grow(length) == Grown::Flush {
                counts += self.flush(&mut docs, &mut bytes, &mut held, splitter.buffered()).await?;
                held.overdraw(length).await;
            }
            let mut texts = Vec::new();
            splitter.push(chunk, &mut texts).map_err(|error| self.unreadable(&error))?;
            answered += texts.len();
            for text in &texts {
                bytes += text.len();
                let element = BulkGetElement::parse(text).map_err(|error| self.unreadable(&error))?;
                self.sort(element, &mut docs, &mut attached, &mut counts)?;
            }
            if bytes >= WRITE_BYTES || docs.len() >= WRITE_DOCS {
                counts += self.flush(&mut docs, &mut bytes, &mut held, splitter.buffered()).await?;
            }
        }
        splitter.finish().map_err(|error| self.unreadable(&error))?;
        self.source.expect_answers(asked.len(), answered)?;
        counts += self.flush(&mut docs, &mut bytes, &mut held, 0).await?;
        drop(held);
        counts += self.attached(attached, ancestors).await?;
        Ok(counts)
    }

    async fn flush(
        &self,
        docs: &mut Vec<Document>,
        bytes: &mut usize,
        held: &mut Reservation,
        still_held: usize,
    ) -> Result<Counts> {
        let counts = self.write(std::mem::take(docs)).await?;
        *bytes = 0;
        held.shrink(held.bytes().saturating_sub(still_held as u64));
        Ok(counts)
    }

    fn unreadable(&self, error: &super::elements::ElementsError) -> TransferError {
        self.source.bulk_get_malformed(error).into()
    }

    /// Documents that are whole, and those whose attachments are still at the source.
    fn sort(
        &self,
        element: BulkGetElement,
        docs: &mut Vec<Document>,
        attached: &mut Vec<Attached>,
        counts: &mut Counts,
    ) -> Result<()> {
        for doc in element.docs {
            let text = match doc {
                Ok(text) => text,
                Err(error) => return Err(not_given(&element.id, &error)),
            };
            let shallow = Shallow::parse(&text).map_err(|error| self.unreadable(&error))?;
            if shallow.attachments.is_empty() {
                docs.push(read(text, shallow, counts));
            } else {
                attached.push(Attached { id: shallow.id.clone(), rev: shallow.rev.clone(), shallow });
            }
        }
        Ok(())
    }

    /// Small attachments come inside their documents, large ones pass through without being held.
    async fn attached(&self, attached: Vec<Attached>, ancestors: &HashMap<String, Vec<String>>) -> Result<Counts> {
        let none = Vec::new();
        let since = |doc: &Attached| ancestors.get(&doc.id).unwrap_or(&none).as_slice();
        // Where only stubs will come it is read again, too: alone, its stubs can be found missing without holding up others.
        let (large, small): (Vec<_>, Vec<_>) =
            attached.into_iter().partition(|doc| carry(&doc.shallow, since(doc)) == Carry::Stream);
        let mut counts = Counts::default();
        for batch in batches(&small) {
            counts += self.inline(batch, &since).await?;
        }
        let mut piped = Vec::with_capacity(large.len());
        for doc in &large {
            piped.push(self.piped(doc, since(doc)));
        }
        let piped = futures_util::stream::iter(piped).buffered(PIPES);
        counts += sum(piped).await?;
        Ok(counts)
    }

    async fn inline<'a>(&self, batch: &[Attached], since: &(dyn Fn(&Attached) -> &'a [String] + Sync)) -> Result<Counts> {
        let mut counts = Counts::default();
        let held = self.small_budget.reserve(INLINE_BATCH_BYTES * 2).await;
        let question = |doc: &Attached| json!({ "id": doc.id, "rev": doc.rev, "atts_since": since(doc) });
        let asked: Vec<Value> = batch.iter().map(question).collect();
        let mut docs = Vec::new();
        let Some(elements) = self.source.bulk_get_whole(&asked, true, INLINE_ANSWER_BYTES_MAX).await? else {
            drop(held);
            // The documents themselves are large, or their attachments have grown since.
            for doc in batch {
                counts += self.piped(doc, since(doc)).await?;
            }
            return Ok(counts);
        };
        for element in elements {
            for text in element.docs {
                let text = text.map_err(|error| not_given(&element.id, &error))?;
                let shallow = Shallow::parse(&text).map_err(|error| self.unreadable(&error))?;
                docs.push(read(text, shallow, &mut counts));
            }
        }
        let written = self.write_or_missing_stub(docs).await?;
        drop(held);
        match (written, batch) {
            (Some(written), _) => counts += written,
            // What the target was said to have is not there, or without its attachment: then all of them, one by one.
            (None, [doc]) if since(doc).is_empty() => {
                let reason = String::from("the target misses an attachment that was sent");
                return Err(TransferError::Document { which: "target", id: doc.id.clone(), reason });
            }
            (None, batch) => {
                counts = Counts::default();
                for doc in batch {
                    counts += Box::pin(self.inline(std::slice::from_ref(doc), &|_| &[])).await?;
                }
            }
        }
        Ok(counts)
    }

    async fn piped(&self, doc: &Attached, since: &[String]) -> Result<Counts> {
        match self.source.move_document(&self.target, &doc.id, &doc.rev, since).await? {
            Moved::Written { bytes, is_confirmed } => {
                if !is_confirmed {
                    self.confirm(vec![(doc.id.clone(), vec![doc.rev.clone()])]).await?;
                }
                Ok(Counts { docs_read: 1, docs_written: 1, bytes_read: bytes, ..Counts::default() })
            }
            Moved::Refused { reason } => {
                // Whether it refuses the document or us, its words do not always tell: then it will not answer this either.
                self.lacking(vec![(doc.id.clone(), vec![doc.rev.clone()])]).await?;
                self.say_refused(&doc.id, &reason);
                Ok(Counts { docs_read: 1, doc_write_failures: 1, ..Counts::default() })
            }
            Moved::MissingStub if !since.is_empty() => Box::pin(self.piped(doc, &[])).await,
            Moved::MissingStub => {
                let reason = String::from("the target misses an attachment that was sent");
                Err(TransferError::Document { which: "target", id: doc.id.clone(), reason })
            }
        }
    }

    async fn write(&self, docs: Vec<Document>) -> Result<Counts> {
        match self.write_or_missing_stub(docs).await? {
            Some(counts) => Ok(counts),
            None => {
                let reason = String::from("a stub among documents without attachments");
                Err(TransferError::Document { which: "target", id: String::new(), reason })
            }
        }
    }

    /// None where the target misses what a stub stands for.
    async fn write_or_missing_stub(&self, docs: Vec<Document>) -> Result<Option<Counts>> {
        let mut counts = Counts::default();
        let mut batches = match docs.is_empty() {
            true => Vec::new(),
            false => vec![docs],
        };
        while let Some(mut batch) = batches.pop() {
            match self.shared.write(&self.target, batch.clone()).await {
                Ok(written) => {
                    for refused in &written.refused {
                        match Refusal::of(refused) {
                            Refusal::Document => self.say_refused(&refused.id, &format!("{}: {}", refused.error, refused.reason)),
                            Refusal::MissingStub => return Ok(None),
                            Refusal::Failure => {
                                let reason = format!("{}: {}", refused.error, refused.reason);
                                return Err(TransferError::Document { which: "target", id: refused.id.clone(), reason });
                            }
                        }
                    }
                    if !written.is_confirmed {
                        let is_refused = |doc: &&Document| written.refused.iter().any(|refused| *refused.id == *doc.id);
                        let kept = batch.iter().filter(|doc| !is_refused(doc));
                        self.confirm(kept.map(|doc| (doc.id.to_string(), vec![doc.rev.to_string()])).collect()).await?;
                    }
                    let refused = written.refused.len().min(batch.len());
                    counts.docs_written += (batch.len() - refused) as u64;
                    counts.doc_write_failures += refused as u64;
                }
                Err(error) if error.is_missing_stub() => return Ok(None),
                Err(error) if error.is_bad_content() && batch.len() > 1 => {
                    let rest = batch.split_off(batch.len() / 2);
                    batches.extend([rest, batch]);
                }
                Err(error) if error.is_bad_document() => {
                    for doc in &batch {
                        self.say_refused(&doc.id, &error.to_string());
                    }
                    counts.doc_write_failures += batch.len() as u64;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Some(counts))
    }

    /// A 202 says that too few nodes have it: what a reading quorum does not know is to be written again.
    async fn confirm(&self, revs: Revs) -> Result<()> {
        match self.lacking(revs).await?.revs.first() {
            None => Ok(()),
            Some((id, _)) => {
                let reason = String::from("was taken by too few nodes (202)");
                Err(TransferError::Document { which: "target", id: id.clone(), reason })
            }
        }
    }

    fn say_refused(&self, id: &str, reason: &str) {
        tracing::debug!(target_db = self.target.db_name(), id, reason, "the target refused a document");
        self.first_refused.get_or_init(|| RefusedDocument::new(id, reason));
        self.refused().insert(String::from(id));
    }

    fn refused(&self) -> MutexGuard<'_, HashSet<String>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of a page that is through which the target refused.
    pub fn take_refused(&self, page: &Page) -> HashSet<String> {
        let mut refused = self.refused();
        match refused.is_empty() {
            true => HashSet::new(),
            false => page.rows.iter().filter_map(|row| refused.take(&row.id)).collect(),
        }
    }
}

/// What stands behind a document's error in the answer of `_bulk_docs`.
enum Refusal {
    /// The target's final word on this document.
    Document,
    MissingStub,
    /// The server's trouble: it may take the document later.
    Failure,
}

impl Refusal {
    /// What `validate_doc_update` throws is the document's fault whatever it is called, as in CouchDB's replicator.
    fn of(refused: &Refused) -> Self {
        match refused.error.as_str() {
            "missing_stub" => Refusal::MissingStub,
            "timeout"
            | "internal_server_error"
            | "internal_fabric_error"
            | "nodedown"
            | "too_many_requests"
            | "service_unavailable"
            | "insufficient_storage"
            | "all_workers_died" => Refusal::Failure,
            _ => Refusal::Document,
        }
    }
}

fn read(text: Bytes, shallow: Shallow, counts: &mut Counts) -> Document {
    counts.docs_read += 1;
    counts.bytes_read += text.len() as u64;
    Document { id: shallow.id.into(), rev: shallow.rev.into(), text }
}

/// With `latest=true` even a compacted revision's successor comes: what does not is purged, and gone from the next page, or
/// not yet where the source looked for it.
fn not_given(id: &str, error: &BulkGetError) -> TransferError {
    let reason = shown(&format!("{}: {}", error.error, error.reason));
    TransferError::Document { which: "source", id: id.to_string(), reason }
}

async fn sum(counts: impl Stream<Item = Result<Counts>>) -> Result<Counts> {
    let add = async |mut sum: Counts, counts| {
        sum += counts;
        Ok(sum)
    };
    counts.try_fold(Counts::default(), add).await
}

/// Documents whose attachments come inside them, about as many as fit into one answer.
fn batches(docs: &[Attached]) -> impl Iterator<Item = &[Attached]> {
    let mut rest = docs;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fitting = rest.iter().take_while(|doc| {
            bytes += doc.shallow.attachments.values().map(|info| info.length.unwrap_or(INLINE_BYTES_MAX)).sum::<u64>();
            bytes <= INLINE_BATCH_BYTES
        });
        let (batch, others) = rest.split_at(fitting.count().clamp(1, WRITE_DOCS).min(rest.len()));
        rest = others;
        (!batch.is_empty()).then_some(batch)
    })
}

fn document_of(page: &Page, row: &ChangesRow) -> Option<Document> {
    let (text, rev) = (page.docs.get(&row.id)?, row.revs.first()?);
    Some(Document { id: row.id.as_str().into(), rev: rev.as_str().into(), text: text.clone() })
}

fn count(revs: &Revs) -> u64 {
    revs.iter().map(|(_, revs)| revs.len() as u64).sum()
}

/// Parts with about so many revisions each; one document's stay together.
fn pieces(revs: Revs, revs_max: usize) -> impl Iterator<Item = Revs> {
    let mut rest = revs.into_iter().peekable();
    std::iter::from_fn(move || {
        let mut piece = Vec::new();
        let mut taken = 0;
        while let Some((_, revs)) = rest.peek()
            && (piece.is_empty() || taken + revs.len() <= revs_max)
        {
            taken += revs.len();
            piece.extend(rest.next());
        }
        (!piece.is_empty()).then_some(piece)
    })
}

#[cfg(all(test, feature = "dev"))]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
