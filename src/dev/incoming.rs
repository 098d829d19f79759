//! A document as a client sends it: what CouchDB accepts, and in which words it refuses the rest.

use super::answer::Failure;
use super::database::REVS_LIMIT;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use flate2::read::GzDecoder;
use rouchdb_core::document::{AttachmentMeta, Document, Revision, attachment_digest};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::io::Read;

/// A small body can unfold to a very large one.
const UNZIPPED_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// A document that may be written.
#[derive(Debug, Clone)]
pub struct Incoming {
    pub document: Document,
    pub sent: Sent,
}

/// The attachments whose bytes came along, by name; these bytes compressed, where they came so.
pub type Sent = HashMap<String, Option<Bytes>>;

/// Attachments that followed a document in a multipart body, by name.
pub type Followed = HashMap<String, Bytes>;

impl Incoming {
    /// A document without an `_id` gets one, as in CouchDB.
    pub fn parse(value: Value, new_edits: bool) -> Result<Self, Failure> {
        Self::parse_with(value, new_edits, &Followed::new())
    }

    pub fn parse_with(value: Value, new_edits: bool, followed: &Followed) -> Result<Self, Failure> {
        let Value::Object(members) = value else { return Err(Failure::bad_request("Document must be a JSON object")) };
        let mut document = Document::default();
        let mut body = Map::new();
        let mut revisions = None;
        let mut sent = Sent::new();
        for (key, value) in members {
            match key.as_str() {
                "_id" => document.id = parse_id(value)?,
                "_rev" => document.rev = Some(parse_rev_value(&value)?),
                "_deleted" => document.deleted = value.as_bool().ok_or_else(|| bad_member("_deleted"))?,
                "_attachments" => document.attachments = parse_attachments(value, followed, &mut sent)?,
                "_revisions" => revisions = Some(parse_revisions(&value)?),
                "_conflicts" | "_deleted_conflicts" | "_revs_info" | "_local_seq" => {}
                // What the replicator's own documents carry.
                "_replication_id"
                | "_replication_state"
                | "_replication_state_time"
                | "_replication_state_reason"
                | "_replication_stats" => drop(body.insert(key, value)),
                _ if key.starts_with('_') => return Err(bad_member(&key)),
                _ => drop(body.insert(key, value)),
            }
        }
        if document.id.is_empty() {
            document.id = new_id();
        }
        if !new_edits {
            let (rev, ids) = ancestry(document.rev.take(), revisions)?;
            if let Some(ids) = ids {
                body.insert("_revisions".into(), serde_json::json!({"start": rev.pos, "ids": ids}));
            }
            document.rev = Some(rev);
        }
        document.data = Value::Object(body);
        Ok(Self { document, sent })
    }
}

/// 32 hex digits, as CouchDB's own ids.
pub fn new_id() -> String {
    format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..))
}

fn bad_member(key: &str) -> Failure {
    Failure::new(400, "doc_validation", format!("Bad special document member: {key}"))
}

fn parse_id(value: Value) -> Result<String, Failure> {
    let Value::String(id) = value else { return Err(Failure::new(400, "illegal_docid", "Document id must be a string")) };
    check_id(&id)?;
    Ok(id)
}

pub fn check_id(id: &str) -> Result<(), Failure> {
    let illegal = |reason: &'static str| Err(Failure::new(400, "illegal_docid", reason));
    match id {
        "" => illegal("Document id must not be empty"),
        "_design/" | "_local/" => illegal("Illegal document id"),
        _ if id.starts_with('_') && !id.starts_with("_design/") && !id.starts_with("_local/") => {
            illegal("Only reserved document ids may start with underscore.")
        }
        _ => Ok(()),
    }
}

pub fn parse_rev(text: &str) -> Result<Revision, Failure> {
    text.parse().map_err(|_| Failure::bad_request("Invalid rev format"))
}

fn parse_rev_value(value: &Value) -> Result<Revision, Failure> {
    value.as_str().map_or_else(|| Err(Failure::bad_request("Invalid rev format")), parse_rev)
}

fn parse_revisions(value: &Value) -> Result<(u64, Vec<String>), Failure> {
    let invalid = |reason: &'static str| Failure::new(400, "doc_validation", reason);
    let start = value.get("start").and_then(Value::as_u64).ok_or_else(|| invalid("_revisions.start isn't an integer."))?;
    let ids = value.get("ids").and_then(Value::as_array).ok_or_else(|| invalid("_revisions.ids isn't a array."))?;
    // More than the limit would be cut off after the merge; cut here, no body can make a tree too deep to walk.
    let ids = ids.iter().take(REVS_LIMIT as usize).map(|id| id.as_str().map(String::from));
    let ids: Option<Vec<String>> = ids.collect();
    Ok((start, ids.ok_or_else(|| invalid("RevId isn't a string"))?))
}

/// A replicated document's own revision and those before it, newest first.
fn ancestry(rev: Option<Revision>, revisions: Option<(u64, Vec<String>)>) -> Result<(Revision, Option<Vec<String>>), Failure> {
    let needed = "When `new_edits: false`, the document needs `_rev` or `_revisions` specified";
    match (rev, revisions) {
        (Some(rev), None) => Ok((rev, None)),
        // Where both are given, CouchDB looks at the history alone.
        (_, Some((start, ids))) => {
            let first = ids.first().cloned().ok_or_else(|| Failure::bad_request(needed))?;
            match (ids.len() as u64) > start {
                true => Err(Failure::new(400, "doc_validation", "more _revisions than generations")),
                false => Ok((Revision::new(start, first).normalized(), Some(ids))),
            }
        }
        (None, None) => Err(Failure::bad_request(needed)),
    }
}

fn parse_attachments(value: Value, followed: &Followed, sent: &mut Sent) -> Result<HashMap<String, AttachmentMeta>, Failure> {
    let Value::Object(members) = value else { return Err(bad_member("_attachments")) };
    members.into_iter().map(|(name, value)| parse_attachment(&name, &value, followed, sent).map(|meta| (name, meta))).collect()
}

fn parse_attachment(name: &str, value: &Value, followed: &Followed, sent: &mut Sent) -> Result<AttachmentMeta, Failure> {
    let invalid = || Failure::bad_request(format!("Invalid attachment data for {name}"));
    let text = |key: &str| value.get(key).and_then(Value::as_str);
    let number = |key: &str| value.get(key).and_then(Value::as_u64).unwrap_or(0);
    let content_type = text("content_type").unwrap_or("application/octet-stream");
    let is = |key: &str| value.get(key).and_then(Value::as_bool) == Some(true);
    if is("stub") {
        let digest = text("digest").unwrap_or("").to_string();
        let length = number("length");
        return Ok(AttachmentMeta {
            content_type: content_type.into(),
            revpos: number("revpos"),
            digest,
            length,
            stub: true,
            ..Default::default()
        });
    }
    let (data, zipped) = match is("follows") {
        true => {
            let follower = followed.get(name).ok_or_else(invalid)?;
            // CouchDB's own words for it.
            if text("digest").is_some_and(|digest| digest != attachment_digest(follower)) {
                return Err(Failure::new(500, "unknown_error", "function_clause"));
            }
            match text("encoding") == Some("gzip") {
                true => (unzipped(follower).ok_or_else(invalid)?, Some(follower.clone())),
                false => (follower.to_vec(), None),
            }
        }
        false => (text("data").and_then(|data| STANDARD.decode(data).ok()).ok_or_else(invalid)?, None),
    };
    sent.insert(name.into(), zipped);
    Ok(AttachmentMeta { revpos: number("revpos"), ..AttachmentMeta::new(content_type, data) })
}

/// CouchDB keeps texts compressed and sends them so.
fn unzipped(data: &Bytes) -> Option<Vec<u8>> {
    let mut plain = Vec::new();
    let read = GzDecoder::new(&data[..]).take(UNZIPPED_BYTES_MAX + 1).read_to_end(&mut plain).ok()?;
    (read as u64 <= UNZIPPED_BYTES_MAX).then_some(plain)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_a_document_may_not_say() {
        let cases = [
            (json!([]), true, "bad_request"),
            (json!({"_foo": 1}), true, "doc_validation"),
            (json!({"_id": "_x"}), true, "illegal_docid"),
            (json!({"_id": 7}), true, "illegal_docid"),
            (json!({"_rev": "zz"}), true, "bad_request"),
            (json!({"_rev": 7}), true, "bad_request"),
            (json!({"_deleted": "yes"}), true, "doc_validation"),
            (json!({"_attachments": {"a": {"data": "&&"}}}), true, "bad_request"),
            (json!({"_id": "a"}), false, "bad_request"),
            (json!({"_id": "a", "_revisions": {"start": 1, "ids": ["c", "b"]}}), false, "doc_validation"),
            (json!({"_id": "a", "_revisions": {"start": 1, "ids": []}}), false, "bad_request"),
        ];
        for (value, new_edits, error) in cases {
            assert_eq!(Incoming::parse(value.clone(), new_edits).expect_err("it is refused").error, error, "{value}");
        }
    }

    #[test]
    fn a_history_of_a_million_revisions_is_cut_to_the_limit() {
        let ids: Vec<String> = (0..1_000_000).map(|n| format!("{n:032x}")).collect();
        let value = json!({"_id": "a", "_revisions": {"start": 1_000_000, "ids": ids}});
        let incoming = Incoming::parse(value, false).expect("it is accepted");
        let kept = incoming.document.data["_revisions"]["ids"].as_array().expect("the ids are kept").len();
        assert_eq!(kept as u64, REVS_LIMIT);
    }
}
