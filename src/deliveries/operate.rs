//! What a person does with deliveries: finds them, has them tried again, drops them, enables a rule.
//!
//! All of it is documents in CouchDB, which the running process follows: nobody needs to be running. Each write goes against
//! the revision that was read; a conflict is read again and decided anew. Memory is a page's, however many there are.

use super::counts::Counts;
use super::parked::{DELIVERY, DISABLED, Disabled, Key, Parked, database_of, disabled_id};
use super::select::{Action, Filter, KeyPrefix};
use crate::couch::{Couch, CouchError, Result, WriteResult};
use serde_json::Value;
use std::collections::HashMap;
use std::time::SystemTime;

/// Documents read or written at once; with the excerpt of an answer each has 2 or 3 KB.
const PAGE: usize = 500;
/// More conflicts in a row on one document are no accident.
const TRIES_MAX: usize = 5;

/// The deliveries database, for somebody who operates on it.
#[derive(Clone)]
pub struct Desk {
    couch: Couch,
    db: String,
}

/// Documents of one answer, and where to go on.
pub struct Page {
    pub found: Vec<Value>,
    /// None at the end.
    pub next: Option<Key>,
}

/// How far one answer may go.
#[derive(Debug, Clone, Copy)]
pub struct Bound {
    pub found: usize,
    pub read: usize,
}

/// What came of an action.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    pub changed: usize,
    /// Somebody else kept writing them.
    pub contested: usize,
}

/// Which delivery the start of a key names.
pub enum Named {
    One(Value),
    Nobody,
    Several,
}

/// What became of a wish to enable a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enabled {
    Now,
    WasNotDisabled,
}

impl Desk {
    pub fn new(couch: Couch, spiegel_db: &str) -> Self {
        Self { couch, db: database_of(spiegel_db) }
    }

    pub fn db(&self) -> &str {
        &self.db
    }

    pub async fn exists(&self) -> Result<bool> {
        self.couch.db_exists(&self.db).await
    }

    /// The deliveries behind `after`, of one request to CouchDB; what is no delivery is passed over. None at the end.
    pub async fn read(&self, after: Option<Key>) -> Result<Option<(Vec<(Parked, Value)>, Key)>> {
        let mut after = after.map(|key| key.doc_id());
        loop {
            let docs = match self.couch.docs_by_prefix(&self.db, DELIVERY, after.as_deref(), PAGE).await {
                // Before anything failed nobody need have made it.
                Err(CouchError::NotFound(_)) => return Ok(None),
                docs => docs?,
            };
            let Some(last) = docs.last().and_then(|doc| doc["_id"].as_str()).map(String::from) else { return Ok(None) };
            let known: Vec<(Parked, Value)> = docs.into_iter().filter_map(|doc| Some((Parked::read(&doc)?, doc))).collect();
            match known.last().map(|(parked, _)| parked.key()) {
                // What stands behind the last one that is a delivery is read again, and passed over again.
                Some(key) => return Ok(Some((known, Key::parse(&last).unwrap_or(key)))),
                None => after = Some(last),
            }
        }
    }

    /// Those that match, within a bound.
    pub async fn list(&self, filter: &Filter, after: Option<Key>, bound: Bound) -> Result<Page> {
        if let Some(key) = filter.key() {
            let found = self.get(key).await?;
            let found = found.filter(|doc| Parked::read(doc).is_some_and(|parked| filter.matches(&parked)));
            return Ok(Page { found: found.into_iter().collect(), next: None });
        }
        let (mut found, mut read, mut at) = (Vec::new(), 0, after);
        while let Some((docs, last)) = self.read(at).await? {
            for (parked, doc) in docs {
                read += 1;
                if filter.matches(&parked) {
                    found.push(doc);
                }
                if found.len() >= bound.found || read >= bound.read {
                    return Ok(Page { found, next: Some(parked.key()) });
                }
            }
            at = Some(last);
        }
        Ok(Page { found, next: None })
    }

    pub async fn get(&self, key: Key) -> Result<Option<Value>> {
        let doc = self.couch.get_doc(&self.db, &key.doc_id()).await?;
        Ok(doc.filter(|doc| Parked::read(doc).is_some()))
    }

    pub async fn named(&self, prefix: &KeyPrefix) -> Result<Named> {
        let docs = match self.couch.docs_by_prefix(&self.db, prefix.as_id_prefix(), None, 2).await {
            Err(CouchError::NotFound(_)) => Vec::new(),
            docs => docs?,
        };
        let mut deliveries = docs.into_iter().filter(|doc| Parked::read(doc).is_some());
        Ok(match (deliveries.next(), deliveries.next()) {
            (None, _) => Named::Nobody,
            (Some(doc), None) => Named::One(doc),
            (Some(_), Some(_)) => Named::Several,
        })
    }

    /// The next page of those that match, acted on, and where to go on. None at the end.
    pub async fn act_on_page(
        &self,
        filter: &Filter,
        action: &Action,
        after: Option<Key>,
        now: SystemTime,
    ) -> Result<Option<(Tally, Key)>> {
        let still = |parked: &Parked| filter.acts_on(parked);
        if let Some(key) = filter.key() {
            return match (after, self.get(key).await?) {
                (None, Some(doc)) => Ok(Some((self.act(vec![doc], action, still, now).await?, key))),
                _ => Ok(None),
            };
        }
        let Some((docs, last)) = self.read(after).await? else { return Ok(None) };
        let docs = docs.into_iter().filter(|(parked, _)| still(parked)).map(|(_, doc)| doc).collect();
        Ok(Some((self.act(docs, action, still, now).await?, last)))
    }

    /// `still` is asked again of what somebody else has written meanwhile.
    pub async fn act(
        &self,
        docs: Vec<Value>,
        action: &Action,
        still: impl Fn(&Parked) -> bool,
        now: SystemTime,
    ) -> Result<Tally> {
        let mut tally = Tally::default();
        let mut todo = docs;
        for _ in 0..TRIES_MAX {
            let written: Vec<Value> = todo.drain(..).filter_map(|doc| acted(doc, action, &still, now)).collect();
            if written.is_empty() {
                return Ok(tally);
            }
            let answer = self.couch.bulk_docs(&self.db, &written).await?;
            // On a cluster in trouble a write may be taken and lose yet: then it is what is there that counts.
            let mut doubtful: HashMap<String, Option<String>> = HashMap::new();
            for (doc, result) in written.iter().zip(answer.results) {
                let id = doc["_id"].as_str().unwrap_or_default().to_string();
                match result {
                    WriteResult::Saved { .. } if answer.confirmed => tally.changed += 1,
                    WriteResult::Saved { rev } => drop(doubtful.insert(id, Some(rev))),
                    WriteResult::Conflict => drop(doubtful.insert(id, None)),
                    WriteResult::Refused { reason } => return Err(CouchError::Forbidden(reason)),
                }
            }
            let ids: Vec<String> = doubtful.keys().cloned().collect();
            if ids.is_empty() {
                return Ok(tally);
            }
            for doc in self.couch.get_docs(&self.db, &ids).await?.into_iter().flatten() {
                let ours = doubtful.get(doc["_id"].as_str().unwrap_or_default()).cloned().flatten();
                match ours.is_some() && ours.as_deref() == doc["_rev"].as_str() {
                    true => tally.changed += 1,
                    false => todo.push(doc),
                }
            }
        }
        tally.contested = todo.len();
        Ok(tally)
    }

    /// The documents of disabled rules behind `after`, by id; empty at the end.
    pub async fn disabled(&self, after: Option<&str>) -> Result<Vec<Value>> {
        match self.couch.docs_by_prefix(&self.db, DISABLED, after, PAGE).await {
            Err(CouchError::NotFound(_)) => Ok(Vec::new()),
            docs => docs,
        }
    }

    pub async fn enable(&self, rule: &str) -> Result<Enabled> {
        let id = disabled_id(rule);
        for _ in 0..TRIES_MAX {
            let Some(doc) = self.couch.get_doc(&self.db, &id).await? else { return Ok(Enabled::WasNotDisabled) };
            let rev = doc["_rev"].as_str().unwrap_or_default();
            match self.couch.delete_doc(&self.db, &id, rev).await {
                Ok(WriteResult::Saved { .. }) => return Ok(Enabled::Now),
                // Somebody else wrote or deleted it just now.
                Ok(_) | Err(CouchError::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Err(CouchError::Conflict(format!("{}/{id} is being written by somebody else", self.db)))
    }

    /// False where there were more documents than `read_max`.
    pub async fn count(&self, read_max: usize) -> Result<(Counts, bool)> {
        let mut counts = Counts::default();
        let mut after = None;
        while let Some((docs, last)) = self.read(after).await? {
            docs.iter().for_each(|(parked, _)| counts.add(parked));
            if counts.all() >= read_max {
                return Ok((counts, false));
            }
            after = Some(last);
        }
        let mut after: Option<String> = None;
        loop {
            let docs = self.disabled(after.as_deref()).await?;
            docs.iter().filter_map(Disabled::read).for_each(|disabled| counts.add_disabled(&disabled));
            match docs.last().and_then(|doc| doc["_id"].as_str()) {
                Some(last) => after = Some(last.to_string()),
                None => return Ok((counts, true)),
            }
        }
    }

    /// Whether it is not another's, so that its rights may be set and it may be removed.
    pub async fn is_ours(&self) -> Result<bool> {
        holds_only_ours(&self.couch, &self.db).await
    }
}

/// Whether a deliveries database holds nothing but what Spiegel wrote, as far as its ends tell. A name ending in `_deliveries` is
/// one that somebody may have given to a database of their own.
pub(super) async fn holds_only_ours(couch: &Couch, db: &str) -> Result<bool> {
    for descending in [false, true] {
        let docs = match couch.docs_at_end(db, descending, ENDS).await {
            Err(CouchError::NotFound(_)) => return Ok(true),
            docs => docs?,
        };
        let mut docs = docs.iter().filter(|doc| !doc["_id"].as_str().unwrap_or_default().starts_with("_design/"));
        if !docs.all(is_of_spiegel) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether it is somebody else's: there are other documents, and none of ours. A stray one among ours makes it nobody else's.
pub(super) async fn is_foreign(couch: &Couch, db: &str) -> Result<bool> {
    if holds_only_ours(couch, db).await? {
        return Ok(false);
    }
    for prefix in [DELIVERY, DISABLED] {
        if couch.docs_by_prefix(db, prefix, None, ENDS).await?.iter().any(is_of_spiegel) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn is_of_spiegel(doc: &Value) -> bool {
    Parked::read(doc).is_some() || Disabled::read(doc).is_some()
}

/// Documents looked at, at each end.
const ENDS: usize = 20;

fn acted(doc: Value, action: &Action, still: impl Fn(&Parked) -> bool, now: SystemTime) -> Option<Value> {
    let mut parked = Parked::read(&doc)?;
    (still(&parked) && action.apply(&mut parked, now)).then(|| parked.write(Some(doc)))
}
