//! What a database tells: documents as JSON text, listings, revision differences.
//!
//! A body is kept as text and copied into the answer; nothing is parsed to be read.

use super::answer::{Failure, push_json_string};
use super::database::{Attachment, Database, Doc, Inner, Stored};
use super::incoming::parse_rev;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rouchdb_core::document::Revision;
use rouchdb_core::merge::{collect_conflicts, revs_diff_one};
use rouchdb_core::rev_tree::{RevNode, RevTree, collect_leaves, find_rev_ancestry, revs_info};
use serde_json::{Map, Value, json};
use std::fmt::Write;
use std::ops::Bound;

/// How a document is written out.
#[derive(Debug, Clone, Default)]
pub struct DocOptions {
    pub attachments: bool,
    pub revs: bool,
    pub revs_info: bool,
    pub conflicts: bool,
    /// Attachments that these revisions have already are stubs; naming any asks for the others.
    pub atts_since: Vec<Revision>,
    /// How an attachment is kept, beside its own length.
    pub encoding_info: bool,
    /// Attachments are announced instead of written in base64: they come after the document.
    pub follows: bool,
}

/// One revision of a document, and the attachments that its text announces.
pub struct Read {
    pub text: String,
    pub rev: String,
    pub following: Vec<(String, Attachment)>,
}

/// A revision's text, or the name of one that is not here.
pub type Found = Result<String, String>;

#[derive(Debug, Clone, Default)]
pub struct Listing {
    pub start: Option<Value>,
    pub end: Option<Value>,
    pub exclusive_end: bool,
    pub descending: bool,
    pub limit: Option<u64>,
    pub skip: u64,
    pub keys: Option<Vec<Value>>,
    pub include_docs: bool,
    pub conflicts: bool,
    pub update_seq: bool,
}

impl Database {
    /// The winner, or one revision. With `latest`, CouchDB 3.5 answers the winner whatever revision is asked for.
    pub fn document(&self, id: &str, rev: Option<&Revision>, latest: bool, options: &DocOptions) -> Result<Read, Failure> {
        let inner = self.read();
        let doc = inner.docs.get(id).ok_or_else(Failure::missing)?;
        let rev = match rev {
            None if doc.deleted => return Err(Failure::new(404, "not_found", "deleted")),
            None => doc.winner.clone(),
            Some(_) if latest => doc.winner.clone(),
            Some(rev) => rev.clone(),
        };
        let stored = doc.stored(&rev).ok_or_else(Failure::missing)?;
        let following = following(doc, stored, options);
        let mut options = options.clone();
        options.follows &= !following.is_empty();
        let mut text = String::new();
        push_doc(&mut text, id, doc, stored, &options);
        Ok(Read { text, rev: rev.to_string(), following: if options.follows { following } else { Vec::new() } })
    }

    /// The leaves (`revs` None) or the named revisions; `latest` puts a revision's leaves in its place.
    pub fn open_revs(&self, id: &str, revs: Option<&[Revision]>, latest: bool, options: &DocOptions) -> Option<Vec<Found>> {
        let inner = self.read();
        let Some(doc) = inner.docs.get(id) else { return revs.map(|revs| revs.iter().map(|rev| Err(rev.to_string())).collect()) };
        let mut wanted: Vec<Revision> = Vec::new();
        match revs {
            None => wanted.extend(collect_leaves(&doc.tree).into_iter().map(|leaf| Revision::new(leaf.pos, leaf.hash))),
            Some(revs) => {
                for rev in revs {
                    let leaves = if latest { leaves_below(&doc.tree, rev) } else { Vec::new() };
                    match leaves.is_empty() {
                        true => wanted.push(rev.clone()),
                        false => wanted.extend(leaves),
                    }
                }
            }
        }
        // CouchDB's order: what there is by revision, and then what is missing.
        wanted.sort_by(|a, b| (doc.stored(a).is_none(), a).cmp(&(doc.stored(b).is_none(), b)));
        wanted.dedup();
        let text_of = |stored| {
            let mut text = String::new();
            push_doc(&mut text, id, doc, stored, options);
            text
        };
        Some(wanted.iter().map(|rev| doc.stored(rev).map(text_of).ok_or_else(|| rev.to_string())).collect())
    }

    pub fn attachment(&self, id: &str, name: &str, rev: Option<&Revision>) -> Result<Attachment, Failure> {
        let inner = self.read();
        let doc = inner.docs.get(id).ok_or_else(Failure::missing)?;
        if rev.is_none() && doc.deleted {
            return Err(Failure::new(404, "not_found", "deleted"));
        }
        let stored = doc.stored(rev.unwrap_or(&doc.winner)).ok_or_else(Failure::missing)?;
        let missing = || Failure::new(404, "not_found", "Document is missing attachment");
        stored.attachments.get(name).cloned().ok_or_else(missing)
    }

    /// Why a document cannot be deleted, or None: its winner, and whether that is gone already.
    pub fn winner(&self, id: &str) -> Option<(Revision, bool)> {
        self.read().docs.get(id).map(|doc| (doc.winner.clone(), doc.deleted))
    }

    pub fn has_live(&self, id: &str) -> bool {
        self.read().docs.get(id).is_some_and(|doc| !doc.deleted)
    }

    pub fn revs_diff(&self, asked: &Map<String, Value>) -> Result<Value, Failure> {
        let inner = self.read();
        let mut answer = Map::new();
        for (id, revs) in asked {
            let revs = revs.as_array().ok_or_else(|| Failure::bad_request("Request body must be a JSON object"))?;
            let texts: Option<Vec<String>> = revs.iter().map(|rev| rev.as_str().map(String::from)).collect();
            let texts = texts.ok_or_else(|| Failure::bad_request("Invalid rev format"))?;
            let tree = inner.docs.get(id.as_str()).map(|doc| &doc.tree);
            let diff = revs_diff_one(tree, &texts).map_err(|_| Failure::bad_request("Invalid rev format"))?;
            let Some(diff) = diff else { continue };
            let mut row = json!({"missing": diff.missing});
            if !diff.possible_ancestors.is_empty() {
                row["possible_ancestors"] = json!(diff.possible_ancestors);
            }
            answer.insert(id.clone(), row);
        }
        Ok(Value::Object(answer))
    }

    /// `_bulk_get`'s answer.
    pub fn bulk_get(&self, docs: &[Value], latest: bool, options: &DocOptions) -> String {
        let mut out = String::from("{\"results\":[");
        for (n, asked) in docs.iter().enumerate() {
            if n > 0 {
                out.push(',');
            }
            self.push_bulk_get(&mut out, asked, latest, options);
        }
        out.push_str("]}");
        out
    }

    fn push_bulk_get(&self, out: &mut String, asked: &Value, latest: bool, options: &DocOptions) {
        let id = asked.get("id").and_then(Value::as_str).unwrap_or("");
        let asked_rev = asked.get("rev").and_then(Value::as_str);
        out.push_str("{\"id\":");
        push_json_string(out, id);
        out.push_str(",\"docs\":[");
        let error = |rev: &str, error: &str, reason: &str| {
            json!({"error": {"id": id, "rev": rev, "error": error, "reason": reason}}).to_string()
        };
        let mut options = options.clone();
        options.atts_since.extend(asked.get("atts_since").and_then(Value::as_array).into_iter().flatten().filter_map(rev_of));
        let rev = asked_rev.map(parse_rev).transpose();
        match (id, rev) {
            ("", _) => out.push_str(&error(asked_rev.unwrap_or("undefined"), "illegal_docid", "Document id must not be empty")),
            (_, Err(_)) => out.push_str(&error(asked_rev.unwrap_or(""), "bad_request", "Invalid rev format")),
            (_, Ok(rev)) => match self.open_revs(id, rev.as_slice_or_all(), latest, &options) {
                None => out.push_str(&error("undefined", "not_found", "missing")),
                Some(found) => {
                    for (n, found) in found.into_iter().enumerate() {
                        if n > 0 {
                            out.push(',');
                        }
                        match found {
                            Ok(text) => drop(write!(out, "{{\"ok\":{text}}}")),
                            Err(rev) => out.push_str(&error(&rev, "not_found", "missing")),
                        }
                    }
                }
            },
        }
        out.push_str("]}");
    }

    /// `_all_docs`, in CouchDB's shape: one row a line.
    pub fn all_docs(&self, listing: &Listing, only_prefix: &str) -> String {
        let inner = self.read();
        let mut rows = Rows::default();
        let mut offset = Value::Null;
        match &listing.keys {
            Some(keys) => {
                let keys: Vec<&Value> = if listing.descending { keys.iter().rev().collect() } else { keys.iter().collect() };
                for key in keys.into_iter().skip(index(listing.skip)).take(listing.limit.map_or(usize::MAX, index)) {
                    push_keyed_row(rows.next(), &inner, key, listing);
                }
            }
            None => {
                let (before, ids) = ids_in_range(&inner, listing, only_prefix);
                offset = json!(before + ids.len().min(index(listing.skip)));
                for (id, doc) in ids.into_iter().skip(index(listing.skip)).take(listing.limit.map_or(usize::MAX, index)) {
                    push_all_docs_row(rows.next(), id, doc, listing);
                }
            }
        }
        let seq = if listing.update_seq { format!("\"update_seq\":\"{}\",", self.seq(inner.update_seq)) } else { String::new() };
        format!("{{\"total_rows\":{},{seq}\"offset\":{offset},\"rows\":[\n{}\n]}}", inner.doc_count, rows.text)
    }

    pub fn local(&self, id: &str) -> Result<(String, String), Failure> {
        let inner = self.read();
        let doc = inner.local.get(id).ok_or_else(Failure::missing)?;
        let mut text = String::new();
        push_local(&mut text, id, doc.rev, &doc.body);
        Ok((text, format!("0-{}", doc.rev)))
    }

    /// `_local_docs`; the keys carry their `_local/`, others name nothing.
    pub fn local_docs(&self, listing: &Listing) -> String {
        let inner = self.read();
        let mut rows = Rows::default();
        let bound = |value: &Option<Value>| value.as_ref().and_then(Value::as_str).map(String::from);
        let ids: Vec<Option<String>> = match &listing.keys {
            Some(keys) => keys.iter().map(|key| key.as_str().map(String::from)).collect(),
            None => {
                let (start, end) = (bound(&listing.start), bound(&listing.end));
                let within =
                    |id: &String| start.as_ref().is_none_or(|start| id >= start) && end.as_ref().is_none_or(|end| id <= end);
                inner.local.keys().map(|id| format!("_local/{id}")).filter(within).map(Some).collect()
            }
        };
        for id in ids.iter().flatten().skip(index(listing.skip)).take(listing.limit.map_or(usize::MAX, index)) {
            let Some(short) = id.strip_prefix("_local/") else { continue };
            let row = rows.next();
            let Some(doc) = inner.local.get(short) else {
                row.push_str(&json!({"key": id, "error": "not_found"}).to_string());
                continue;
            };
            row.push_str("{\"id\":");
            push_json_string(row, id);
            row.push_str(",\"key\":");
            push_json_string(row, id);
            let _ = write!(row, ",\"value\":{{\"rev\":\"0-{}\"}}", doc.rev);
            if listing.include_docs {
                row.push_str(",\"doc\":");
                push_local(row, short, doc.rev, &doc.body);
            }
            row.push('}');
        }
        format!("{{\"total_rows\":null,\"offset\":null,\"rows\":[\n{}\n]}}", rows.text)
    }
}

trait AsSliceOrAll {
    fn as_slice_or_all(&self) -> Option<&[Revision]>;
}

impl AsSliceOrAll for Option<Revision> {
    /// No revision asked for means all leaves.
    fn as_slice_or_all(&self) -> Option<&[Revision]> {
        self.as_ref().map(std::slice::from_ref)
    }
}

fn rev_of(value: &Value) -> Option<Revision> {
    value.as_str().and_then(|text| text.parse().ok())
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// Rows of a listing, separated as CouchDB separates them.
#[derive(Default)]
struct Rows {
    text: String,
}

impl Rows {
    fn next(&mut self) -> &mut String {
        if !self.text.is_empty() {
            self.text.push_str(",\n");
        }
        &mut self.text
    }
}

/// The live documents between the bounds, in the listing's order, and how many come before them.
fn ids_in_range<'a>(inner: &'a Inner, listing: &Listing, only_prefix: &str) -> (usize, Vec<(&'a str, &'a Doc)>) {
    let (low, high) = match listing.descending {
        false => (&listing.start, &listing.end),
        true => (&listing.end, &listing.start),
    };
    // Numbers, null and the like sort before every id, arrays and objects after.
    let edge = |value: &Option<Value>, exclusive: bool, low: bool| match value {
        Some(Value::String(text)) if exclusive => Some(Bound::Excluded(text.clone())),
        Some(Value::String(text)) => Some(Bound::Included(text.clone())),
        Some(Value::Array(_) | Value::Object(_)) => (!low).then_some(Bound::Unbounded),
        Some(Value::Number(_) | Value::Bool(_)) => low.then_some(Bound::Unbounded),
        Some(Value::Null) | None => Some(Bound::Unbounded),
    };
    let low = edge(low, listing.exclusive_end && listing.descending, true);
    let high = edge(high, listing.exclusive_end && !listing.descending, false);
    let live = |(id, doc): (&'a std::sync::Arc<str>, &'a Doc)| {
        (!doc.deleted && id.starts_with(only_prefix)).then_some((id.as_ref(), doc))
    };
    let outside = || usize::try_from(inner.doc_count).unwrap_or(usize::MAX);
    let (Some(low), Some(high)) = (low, high) else { return (outside(), Vec::new()) };
    let above_low = |id: &str| match &low {
        Bound::Included(low) => id >= low.as_str(),
        Bound::Excluded(low) => id > low.as_str(),
        Bound::Unbounded => true,
    };
    let below_high = |id: &str| match &high {
        Bound::Included(high) => id <= high.as_str(),
        Bound::Excluded(high) => id < high.as_str(),
        Bound::Unbounded => true,
    };
    let mut before = 0;
    let mut ids = Vec::new();
    let in_order = |descending: bool| -> Box<dyn Iterator<Item = (&'a std::sync::Arc<str>, &'a Doc)>> {
        if descending { Box::new(inner.docs.iter().rev()) } else { Box::new(inner.docs.iter()) }
    };
    // A listing that ends before it can go on needs no more than skip and limit.
    let enough = listing.limit.map_or(usize::MAX, |limit| index(limit.saturating_add(listing.skip)));
    for (id, doc) in in_order(listing.descending).filter_map(live) {
        let (entered, left) = match listing.descending {
            false => (above_low(id), !below_high(id)),
            true => (below_high(id), !above_low(id)),
        };
        match (entered, left) {
            (false, _) => before += 1,
            (true, true) => break,
            (true, false) if ids.len() >= enough => break,
            (true, false) => ids.push((id, doc)),
        }
    }
    (before, ids)
}

fn push_keyed_row(row: &mut String, inner: &Inner, key: &Value, listing: &Listing) {
    let found = key.as_str().and_then(|id| inner.docs.get_key_value(id));
    let Some((id, doc)) = found else {
        row.push_str(&json!({"key": key, "error": "not_found"}).to_string());
        return;
    };
    if !doc.deleted {
        return push_all_docs_row(row, id, doc, listing);
    }
    let mut deleted = json!({"id": &**id, "key": &**id, "value": {"rev": doc.winner.to_string(), "deleted": true}});
    if listing.include_docs {
        deleted["doc"] = Value::Null;
    }
    row.push_str(&deleted.to_string());
}

fn push_all_docs_row(row: &mut String, id: &str, doc: &Doc, listing: &Listing) {
    row.push_str("{\"id\":");
    push_json_string(row, id);
    row.push_str(",\"key\":");
    push_json_string(row, id);
    let _ = write!(row, ",\"value\":{{\"rev\":\"{}\"}}", doc.winner);
    if listing.include_docs {
        row.push_str(",\"doc\":");
        let options = DocOptions { conflicts: listing.conflicts, ..Default::default() };
        push_winner(row, id, doc, &options);
    }
    row.push('}');
}

/// The winner's text, or `null` where its body is gone.
pub(super) fn push_winner(out: &mut String, id: &str, doc: &Doc, options: &DocOptions) {
    match doc.stored(&doc.winner) {
        Some(stored) => push_doc(out, id, doc, stored, options),
        None => out.push_str("null"),
    }
}

pub(super) fn push_doc(out: &mut String, id: &str, doc: &Doc, stored: &Stored, options: &DocOptions) {
    out.push_str("{\"_id\":");
    push_json_string(out, id);
    out.push_str(",\"_rev\":");
    push_json_string(out, &stored.rev.to_string());
    if stored.deleted {
        out.push_str(",\"_deleted\":true");
    }
    if stored.body.len() > 2 {
        out.push(',');
        out.push_str(&stored.body[1..stored.body.len() - 1]);
    }
    if options.revs
        && let Some(ids) = find_rev_ancestry(&doc.tree, stored.rev.pos, &stored.rev.hash)
    {
        let _ = write!(out, ",\"_revisions\":{}", json!({"start": stored.rev.pos, "ids": ids}));
    }
    if options.revs_info
        && let Some(info) = revs_info(&doc.tree, stored.rev.pos, &stored.rev.hash)
    {
        let here = |rev: &str| doc.stored.iter().any(|stored| stored.rev.to_string() == rev);
        let status = |rev: &str, status: &str| if here(rev) { status.to_string() } else { String::from("missing") };
        let info: Vec<Value> = info.iter().map(|i| json!({"rev": i.rev, "status": status(&i.rev, &i.status)})).collect();
        let _ = write!(out, ",\"_revs_info\":{}", Value::Array(info));
    }
    if options.conflicts && stored.rev == doc.winner {
        let conflicts: Vec<String> = collect_conflicts(&doc.tree).iter().map(Revision::to_string).collect();
        if !conflicts.is_empty() {
            let _ = write!(out, ",\"_conflicts\":{}", json!(conflicts));
        }
    }
    if !stored.attachments.is_empty() {
        let known_up_to = known_up_to(doc, stored, options);
        out.push_str(",\"_attachments\":{");
        for (n, (name, attachment)) in stored.attachments.iter().enumerate() {
            if n > 0 {
                out.push(',');
            }
            push_json_string(out, name);
            out.push(':');
            push_attachment(out, attachment, goes_along(attachment, known_up_to, options), options);
        }
        out.push('}');
    }
    out.push('}');
}

/// The newest generation of this revision's own history that the reader says it has.
fn known_up_to(doc: &Doc, stored: &Stored, options: &DocOptions) -> Option<u64> {
    if options.atts_since.is_empty() {
        return None;
    }
    let history = find_rev_ancestry(&doc.tree, stored.rev.pos, &stored.rev.hash)?;
    let in_history = |rev: &&Revision| {
        let back = stored.rev.pos.checked_sub(rev.pos).and_then(|back| usize::try_from(back).ok());
        back.and_then(|back| history.get(back)).is_some_and(|hash| *hash == rev.hash)
    };
    options.atts_since.iter().filter(in_history).map(|rev| rev.pos).max()
}

fn goes_along(attachment: &Attachment, known_up_to: Option<u64>, options: &DocOptions) -> bool {
    let asked = options.attachments || !options.atts_since.is_empty();
    asked && known_up_to.is_none_or(|pos| attachment.meta.revpos > pos)
}

fn following(doc: &Doc, stored: &Stored, options: &DocOptions) -> Vec<(String, Attachment)> {
    let known_up_to = known_up_to(doc, stored, options);
    let going = stored.attachments.iter().filter(|(_, attachment)| goes_along(attachment, known_up_to, options));
    going.map(|(name, attachment)| (name.clone(), attachment.clone())).collect()
}

fn push_attachment(out: &mut String, attachment: &Attachment, goes_along: bool, options: &DocOptions) {
    let meta = &attachment.meta;
    let mut value = json!({"content_type": meta.content_type, "revpos": meta.revpos, "digest": meta.digest});
    match (goes_along, options.follows) {
        (true, false) => value["data"] = json!(STANDARD.encode(&attachment.data)),
        (_, follows) => {
            value["length"] = json!(meta.length);
            value[if goes_along && follows { "follows" } else { "stub" }] = json!(true);
        }
    }
    if let Some(zipped) = attachment.zipped.as_ref().filter(|_| options.encoding_info || options.follows) {
        value["encoding"] = json!("gzip");
        value["encoded_length"] = json!(zipped.len());
    }
    let _ = write!(out, "{value}");
}

fn push_local(out: &mut String, id: &str, rev: u64, body: &str) {
    out.push_str("{\"_id\":");
    push_json_string(out, &format!("_local/{id}"));
    let _ = write!(out, ",\"_rev\":\"0-{rev}\"");
    if body.len() > 2 {
        out.push(',');
        out.push_str(&body[1..body.len() - 1]);
    }
    out.push('}');
}

/// Every leaf that descends from a revision, the best first; nothing for a revision that the tree does not know.
fn leaves_below(tree: &RevTree, rev: &Revision) -> Vec<Revision> {
    let mut leaves = Vec::new();
    for path in tree {
        let mut waiting: Vec<(&RevNode, u64, bool)> = vec![(&path.tree, path.pos, false)];
        while let Some((node, pos, below)) = waiting.pop() {
            let below = below || (pos == rev.pos && node.hash == rev.hash);
            if node.children.is_empty() && below {
                leaves.push((!node.opts.deleted, Revision::new(pos, node.hash.clone())));
            }
            waiting.extend(node.children.iter().map(|child| (child, pos + 1, below)));
        }
    }
    leaves.sort_by(|a, b| b.cmp(a));
    leaves.dedup();
    leaves.into_iter().map(|(_, rev)| rev).collect()
}
