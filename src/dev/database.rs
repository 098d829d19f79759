//! One database in memory: its documents with their revision trees, its changes in order, its local documents.
//!
//! The trees, and what a write does to them, are rouchdb-core's. The rest is ours, because CouchDB's clients see it: an
//! index of the changes that a late `since` enters in the middle, counts that are kept and not counted, writes that
//! change nothing and leave no row, and old bodies that are given back (CouchDB keeps them until it compacts).

use super::answer::Failure;
use super::incoming::{Incoming, Sent};
use super::seq::{self, Since};
use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use rouchdb_core::document::{AttachmentMeta, Revision, attachment_digest};
use rouchdb_core::rev_tree::{RevTree, collect_leaves, find_rev_ancestry, rev_exists};
use rouchdb_core::write::{PlannedWrite, ReplicatedWrite, edit_parent, plan_new_edit, plan_replicated_edit};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Write;
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

#[derive(Clone, Default)]
pub(super) struct Inner {
    pub docs: BTreeMap<Arc<str>, Doc>,
    pub by_seq: BTreeMap<u64, Arc<str>>,
    pub update_seq: u64,
    pub doc_count: u64,
    pub deleted_count: u64,
    pub local: BTreeMap<String, LocalDoc>,
    pub security: Option<Value>,
}

#[derive(Clone)]
pub(super) struct Doc {
    pub tree: RevTree,
    pub seq: u64,
    pub winner: Revision,
    pub deleted: bool,
    /// The revisions whose bodies are still here, oldest write first.
    pub stored: Vec<Stored>,
}

#[derive(Clone)]
pub(super) struct Stored {
    pub rev: Revision,
    pub deleted: bool,
    /// A JSON object without any member that begins with an underscore.
    pub body: Box<str>,
    pub attachments: BTreeMap<String, Attachment>,
}

#[derive(Debug, Clone)]
pub struct Attachment {
    /// Its digest is that of the bytes as CouchDB would keep them: compressed, where they are.
    pub meta: AttachmentMeta,
    pub data: Bytes,
    /// What CouchDB keeps of a text, and sends to a reader that understands it.
    pub zipped: Option<Bytes>,
}

#[derive(Clone)]
pub(super) struct LocalDoc {
    pub rev: u64,
    pub body: Box<str>,
}

impl Attachment {
    fn new(mut meta: AttachmentMeta, data: Bytes, zipped: Option<Bytes>) -> Self {
        let zipped = zipped.or_else(|| is_compressible(&meta.content_type).then(|| zip(&data)).flatten());
        if let Some(zipped) = &zipped {
            meta.digest = attachment_digest(zipped);
        }
        Self { meta, data, zipped }
    }
}

/// CouchDB's default `compressible_types`.
fn is_compressible(content_type: &str) -> bool {
    let kind = content_type.split(';').next().unwrap_or_default().trim();
    kind.starts_with("text/") || matches!(kind, "application/javascript" | "application/json" | "application/xml")
}

/// Not as small as CouchDB makes it, but soon done.
fn zip(data: &[u8]) -> Option<Bytes> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(data).and_then(|()| encoder.finish()).map(Bytes::from).ok()
}

impl Doc {
    pub fn stored(&self, rev: &Revision) -> Option<&Stored> {
        self.stored.iter().find(|stored| stored.rev == *rev)
    }

    /// What a stub of a new revision with this history stands for: CouchDB looks at the nearest ancestor whose body it has, and
    /// at nothing of the stub but its name and its revpos.
    fn kept(&self, history: &[Revision], name: &str, revpos: u64) -> Option<&Attachment> {
        let nearest = history.iter().skip(1).find_map(|rev| self.stored(rev))?;
        nearest.attachments.get(name).filter(|kept| revpos == 0 || revpos == kept.meta.revpos)
    }
}

impl Database {
    pub fn new(name: &str, revs_limit: u64) -> Self {
        let started_secs = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let notice = watch::Sender::new(Notice::default());
        Self { name: name.into(), instance: fastrand::u64(..), started_secs, revs_limit, inner: RwLock::default(), notice }
    }

    /// Everything in it, as a copy of its files would have it: the seqs and the local documents too.
    pub fn copy(&self) -> Self {
        let inner = RwLock::new(self.read().clone());
        let notice = watch::Sender::new(Notice { update_seq: self.read().update_seq, deleted: false });
        Self { name: self.name.clone(), inner, notice, ..*self }
    }

    /// Another life of it, empty, that began in the same second.
    pub fn remade(&self) -> Self {
        Self { started_secs: self.started_secs, ..Self::new(&self.name, self.revs_limit) }
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
        let written = match new_edits {
            true => inner.edit(incoming, self.revs_limit).map(|rev| (rev, true)),
            false => inner.replicate(incoming, self.revs_limit),
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
    fn edit(&mut self, incoming: Incoming, revs_limit: u64) -> Result<Revision, Failure> {
        let Incoming { document, sent } = incoming;
        let existing = self.docs.get(document.id.as_str());
        let tree = existing.map(|doc| &doc.tree);
        let parent = edit_parent(tree, &document);
        let of_parent = existing.zip(parent).and_then(|(doc, rev)| doc.stored(&rev)).map(|stored| metas(&stored.attachments));
        let planned = plan_new_edit(tree, document, of_parent.as_ref(), false, revs_limit).map_err(refusal)?;
        self.store(planned, sent)
    }

    fn replicate(&mut self, incoming: Incoming, revs_limit: u64) -> Result<(Revision, bool), Failure> {
        let Incoming { document, sent } = incoming;
        let tree = self.docs.get(document.id.as_str()).map(|doc| &doc.tree);
        let known = document.rev.as_ref().zip(tree).is_some_and(|(rev, tree)| rev_exists(tree, rev.pos, &rev.hash));
        let rev = document.rev.clone();
        match plan_replicated_edit(tree, document, known, revs_limit).map_err(refusal)? {
            ReplicatedWrite::Write(planned) => Ok((self.store(*planned, sent)?, true)),
            ReplicatedWrite::AlreadyStored(_) => Ok((rev.unwrap_or_else(|| Revision::new(0, String::new())), false)),
        }
    }

    fn store(&mut self, planned: PlannedWrite, sent: Sent) -> Result<Revision, Failure> {
        let PlannedWrite { id, rev, tree, deleted, data, attachments, new_blobs, .. } = planned;
        let history = find_rev_ancestry(&tree, rev.pos, &rev.hash).unwrap_or_default();
        let history: Vec<Revision> = (0..=rev.pos).rev().zip(history).map(|(pos, hash)| Revision::new(pos, hash)).collect();
        let attachments = self.blobs_of(&id, &history, attachments, new_blobs, sent)?;
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
        history: &[Revision],
        metas: HashMap<String, AttachmentMeta>,
        blobs: Vec<(String, Vec<u8>)>,
        mut sent: Sent,
    ) -> Result<BTreeMap<String, Attachment>, Failure> {
        let blobs: HashMap<String, Bytes> = blobs.into_iter().map(|(digest, bytes)| (digest, Bytes::from(bytes))).collect();
        let mut attachments = BTreeMap::new();
        for (name, meta) in metas {
            let attachment = match sent.remove(&name).zip(blobs.get(&meta.digest)) {
                Some((zipped, data)) => Attachment::new(meta, data.clone(), zipped),
                None => {
                    let kept = self.docs.get(id).and_then(|doc| doc.kept(history, &name, meta.revpos));
                    kept.ok_or_else(|| missing_stub(id, &name))?.clone()
                }
            };
            attachments.insert(name, attachment);
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
