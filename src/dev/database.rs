//! One database in memory: its documents with their revision trees, its changes in order, its local documents.
//!
//! The trees, and what a write does to them, are rouchdb-core's. The rest is ours, because CouchDB's clients see it: an
//! index of the changes that a late `since` enters in the middle, counts that are kept and not counted, writes that
//! change nothing and leave no row, and old bodies that are given back (CouchDB keeps them until it compacts).

use super::answer::Failure;
use super::incoming::Incoming;
use super::seq::{self, Since};
use bytes::Bytes;
use rouchdb_core::document::{AttachmentMeta, Document, Revision};
use rouchdb_core::rev_tree::{RevTree, collect_leaves, rev_exists};
use rouchdb_core::write::{PlannedWrite, ReplicatedWrite, edit_parent, plan_new_edit, plan_replicated_edit};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// CouchDB's default `_revs_limit`.
pub const REVS_LIMIT: u64 = 1000;
/// How many bodies a document keeps besides those of its leaves: a reader that saw a revision a moment ago still gets it.
const OLD_BODIES_MAX: usize = 2;

pub struct Database {
    pub name: String,
    /// This life of the database: a deleted one that is made again has another.
    pub instance: u64,
    pub started_secs: u64,
    revs_limit: u64,
    inner: RwLock<Inner>,
    notice: watch::Sender<Notice>,
}

/// What the feeds wait for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Notice {
    pub update_seq: u64,
    pub deleted: bool,
}

#[derive(Default)]
pub(super) struct Inner {
    pub docs: BTreeMap<Arc<str>, Doc>,
    pub by_seq: BTreeMap<u64, Arc<str>>,
    pub update_seq: u64,
    pub doc_count: u64,
    pub deleted_count: u64,
    pub local: BTreeMap<String, LocalDoc>,
    pub security: Option<Value>,
}

pub(super) struct Doc {
    pub tree: RevTree,
    pub seq: u64,
    pub winner: Revision,
    pub deleted: bool,
    /// The revisions whose bodies are still here, oldest write first.
    pub stored: Vec<Stored>,
}

pub(super) struct Stored {
    pub rev: Revision,
    pub deleted: bool,
    /// A JSON object without any member that begins with an underscore.
    pub body: Box<str>,
    pub attachments: BTreeMap<String, Attachment>,
}

#[derive(Debug, Clone)]
pub struct Attachment {
    pub meta: AttachmentMeta,
    pub data: Bytes,
}

pub(super) struct LocalDoc {
    pub rev: u64,
    pub body: Box<str>,
}

impl Doc {
    pub fn stored(&self, rev: &Revision) -> Option<&Stored> {
        self.stored.iter().find(|stored| stored.rev == *rev)
    }

    fn attachment(&self, name: &str, digest: &str) -> Option<&Attachment> {
        let named = self.stored.iter().rev().filter_map(|stored| stored.attachments.get(name));
        named.into_iter().find(|attachment| digest.is_empty() || attachment.meta.digest == digest)
    }
}

impl Database {
    pub fn new(name: &str, revs_limit: u64) -> Self {
        let started_secs = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let notice = watch::Sender::new(Notice::default());
        Self { name: name.into(), instance: fastrand::u64(..), started_secs, revs_limit, inner: RwLock::default(), notice }
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn subscribe(&self) -> watch::Receiver<Notice> {
        self.notice.subscribe()
    }

    /// The feeds on it end with their last line.
    pub fn mark_deleted(&self) {
        self.notice.send_modify(|notice| notice.deleted = true);
    }

    pub fn seq(&self, number: u64) -> String {
        seq::encode(self.instance, number)
    }

    pub fn resolve(&self, since: Since) -> u64 {
        since.resolve(self.instance, self.read().update_seq)
    }

    pub fn info(&self) -> Value {
        let inner = self.read();
        json!({
            "db_name": self.name,
            "instance_start_time": self.started_secs.to_string(),
            "update_seq": self.seq(inner.update_seq),
            "purge_seq": self.seq(0),
            "doc_count": inner.doc_count,
            "doc_del_count": inner.deleted_count,
            "sizes": {"file": 0, "external": 0, "active": 0},
            "props": {},
            "disk_format_version": 8,
            "compact_running": false,
            "cluster": {"q": 1, "n": 1, "w": 1, "r": 1},
        })
    }

    pub fn security(&self) -> Value {
        let inner = self.read();
        inner.security.clone().unwrap_or_else(|| json!({"members": {"roles": ["_admin"]}, "admins": {"roles": ["_admin"]}}))
    }

    /// Moves the update_seq, as in CouchDB, without a row in the changes.
    pub fn set_security(&self, security: Value) {
        let mut inner = self.write();
        inner.security = Some(security);
        inner.update_seq += 1;
    }

    /// Writes one document; tells whether anything changed.
    pub fn put(&self, incoming: Incoming, new_edits: bool) -> Result<(Revision, bool), Failure> {
        let mut inner = self.write();
        let Incoming { document } = incoming;
        let written = match new_edits {
            true => inner.edit(document, self.revs_limit).map(|rev| (rev, true)),
            false => inner.replicate(document, self.revs_limit),
        }?;
        let update_seq = inner.update_seq;
        drop(inner);
        if written.1 {
            self.notice.send_modify(|notice| notice.update_seq = update_seq);
        }
        Ok(written)
    }

    /// A local document has no conflicts: its next revision is one more than the one that is sent.
    pub fn put_local(&self, id: &str, rev: u64, body: &Value) -> String {
        let rev = rev.saturating_add(1);
        self.write().local.insert(id.into(), LocalDoc { rev, body: body.to_string().into() });
        format!("0-{rev}")
    }

    pub fn delete_local(&self, id: &str) -> Result<(), Failure> {
        self.write().local.remove(id).map(|_| ()).ok_or_else(Failure::missing)
    }
}

impl Inner {
    fn edit(&mut self, document: Document, revs_limit: u64) -> Result<Revision, Failure> {
        let existing = self.docs.get(document.id.as_str());
        let tree = existing.map(|doc| &doc.tree);
        let parent = edit_parent(tree, &document);
        let of_parent = existing.zip(parent).and_then(|(doc, rev)| doc.stored(&rev)).map(|stored| metas(&stored.attachments));
        let planned = plan_new_edit(tree, document, of_parent.as_ref(), false, revs_limit).map_err(refusal)?;
        self.store(planned)
    }

    fn replicate(&mut self, document: Document, revs_limit: u64) -> Result<(Revision, bool), Failure> {
        let tree = self.docs.get(document.id.as_str()).map(|doc| &doc.tree);
        let known = document.rev.as_ref().zip(tree).is_some_and(|(rev, tree)| rev_exists(tree, rev.pos, &rev.hash));
        let rev = document.rev.clone();
        match plan_replicated_edit(tree, document, known, revs_limit).map_err(refusal)? {
            ReplicatedWrite::Write(planned) => Ok((self.store(*planned)?, true)),
            ReplicatedWrite::AlreadyStored(_) => Ok((rev.unwrap_or_else(|| Revision::new(0, String::new())), false)),
        }
    }

    fn store(&mut self, planned: PlannedWrite) -> Result<Revision, Failure> {
        let PlannedWrite { id, rev, tree, deleted, data, attachments, new_blobs, .. } = planned;
        let attachments = self.blobs_of(&id, attachments, new_blobs)?;
        let leaves = collect_leaves(&tree);
        let Some(winner) = leaves.first() else { return Err(Failure::new(500, "error", "a tree without leaves")) };
        let (winner, winner_deleted) = (Revision::new(winner.pos, winner.hash.clone()), winner.deleted);
        let (key, mut stored) = match self.docs.remove_entry(id.as_str()) {
            Some((key, old)) => {
                self.by_seq.remove(&old.seq);
                self.count(old.deleted, -1);
                (key, old.stored)
            }
            None => (Arc::from(id.as_str()), Vec::new()),
        };
        stored.push(Stored { rev: rev.clone(), deleted, body: data.to_string().into(), attachments });
        let leaves: HashSet<(u64, &str)> = leaves.iter().map(|leaf| (leaf.pos, leaf.hash.as_str())).collect();
        drop_old_bodies(&mut stored, &leaves);
        self.update_seq += 1;
        self.count(winner_deleted, 1);
        self.by_seq.insert(self.update_seq, key.clone());
        self.docs.insert(key, Doc { tree, seq: self.update_seq, winner, deleted: winner_deleted, stored });
        Ok(rev)
    }

    fn count(&mut self, deleted: bool, by: i64) {
        let count = if deleted { &mut self.deleted_count } else { &mut self.doc_count };
        *count = count.saturating_add_signed(by);
    }

    /// The bytes of each attachment: sent with this write, or kept from an earlier revision that a stub names.
    fn blobs_of(
        &self,
        id: &str,
        metas: HashMap<String, AttachmentMeta>,
        sent: Vec<(String, Vec<u8>)>,
    ) -> Result<BTreeMap<String, Attachment>, Failure> {
        let sent: HashMap<String, Bytes> = sent.into_iter().map(|(digest, bytes)| (digest, Bytes::from(bytes))).collect();
        let mut attachments = BTreeMap::new();
        for (name, mut meta) in metas {
            let data = match sent.get(&meta.digest) {
                Some(data) => data.clone(),
                None => {
                    let kept = self.docs.get(id).and_then(|doc| doc.attachment(&name, &meta.digest));
                    let kept = kept.ok_or_else(|| missing_stub(id, &name))?;
                    meta = kept.meta.clone();
                    kept.data.clone()
                }
            };
            attachments.insert(name, Attachment { meta, data });
        }
        Ok(attachments)
    }
}

fn drop_old_bodies(stored: &mut Vec<Stored>, leaves: &HashSet<(u64, &str)>) {
    let is_leaf = |stored: &Stored| leaves.contains(&(stored.rev.pos, stored.rev.hash.as_str()));
    let mut surplus = stored.iter().filter(|stored| !is_leaf(stored)).count().saturating_sub(OLD_BODIES_MAX);
    stored.retain(|stored| {
        let goes = surplus > 0 && !is_leaf(stored);
        surplus -= usize::from(goes);
        !goes
    });
}

fn metas(attachments: &BTreeMap<String, Attachment>) -> HashMap<String, AttachmentMeta> {
    attachments.iter().map(|(name, attachment)| (name.clone(), attachment.meta.clone())).collect()
}

fn missing_stub(id: &str, name: &str) -> Failure {
    Failure::new(412, "missing_stub", format!("Invalid attachment stub in {id} for {name}"))
}

/// rouchdb's refusals in CouchDB's statuses.
fn refusal(result: rouchdb_core::document::DocResult) -> Failure {
    let reason = result.reason.unwrap_or_default();
    match result.error.as_deref() {
        Some("conflict") => Failure::conflict(),
        Some("missing_stub") => Failure::new(412, "missing_stub", reason),
        Some("doc_validation") => Failure::new(400, "doc_validation", reason),
        _ => Failure::bad_request(reason),
    }
}
