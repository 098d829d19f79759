//! A database of every shape that a revision tree, an id and an attachment may have, and its growth, from one seed.
//!
//! It is written as a replicator writes: with revisions of the test's own, so that all branches are wanted ones.

use crate::support::Couch;
use crate::support::couch::encode;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use fastrand::Rng;
use reqwest::{Method, StatusCode};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A request's documents together; CouchDB takes far more, and a test has many of them.
const REQUEST_BYTES_MAX: usize = 6 << 20;
/// Attachments of one growth together, so that a debug build of the embedded server ends within a test's patience.
const ATTACHMENT_BYTES_MAX: usize = 8 << 20;
pub const LARGE_DOCUMENT_BYTES: usize = 4 << 20;

pub struct Source {
    pub couch: Couch,
    pub db: String,
    random: Rng,
    docs: Vec<Doc>,
    attachment_bytes_left: usize,
    attachment_bytes_min: usize,
    has_stubs: bool,
    deleted_have_attachments: bool,
}

struct Doc {
    id: String,
    branches: Vec<Branch>,
}

#[derive(Clone)]
struct Branch {
    /// The generation of the first hash: above 1 where the older history was forgotten.
    start: u64,
    hashes: Vec<String>,
    deleted: bool,
    attachments: BTreeMap<String, Attachment>,
}

#[derive(Clone)]
struct Attachment {
    kind: &'static str,
    revpos: u64,
    /// As JSON has it; None where a stub will do.
    data: Option<Arc<str>>,
}

impl Branch {
    fn generation(&self) -> u64 {
        self.start + self.hashes.len() as u64 - 1
    }
}

impl Source {
    pub fn new(couch: &Couch, db: &str, random: Rng) -> Self {
        Self {
            couch: couch.clone(),
            db: db.into(),
            random,
            docs: Vec::new(),
            attachment_bytes_left: 0,
            attachment_bytes_min: 0,
            has_stubs: true,
            deleted_have_attachments: true,
        }
    }

    /// CouchDB 3.5's own replicator waits for ever for the end of attachments that are all empty.
    pub fn without_empty_attachments(mut self) -> Self {
        self.attachment_bytes_min = 1;
        self
    }

    /// PouchDB takes no stub without the digest that it gave.
    pub fn with_attachments_in_full(mut self) -> Self {
        self.has_stubs = false;
        self
    }

    /// PouchDB gives none of a deleted revision's.
    pub fn without_attachments_of_the_deleted(mut self) -> Self {
        self.deleted_have_attachments = false;
        self
    }

    /// New documents, and new revisions of some of those that are there.
    pub async fn grow(&mut self, new_docs: usize, edits: usize) {
        self.attachment_bytes_left = ATTACHMENT_BYTES_MAX;
        let mut rounds: Vec<Vec<Value>> = Vec::new();
        let mut write = |round: usize, doc: Value| {
            if rounds.len() <= round {
                rounds.resize_with(round + 1, Vec::new);
            }
            rounds[round].push(doc);
        };
        let known = self.docs.len();
        for _ in 0..new_docs {
            let id = self.new_id();
            self.docs.push(Doc { id, branches: Vec::new() });
            let at = self.docs.len() - 1;
            for round in 0..self.revisions_at_once() {
                write(round, self.revision(at));
            }
        }
        let mut edited: Vec<usize> = (0..known).collect();
        self.random.shuffle(&mut edited);
        for at in edited.into_iter().take(edits) {
            for round in 0..self.revisions_at_once() {
                write(round, self.revision(at));
            }
        }
        // A stub needs its ancestor on disk: never two revisions of one document in one request.
        for round in rounds {
            self.write(round).await;
        }
    }

    /// Numbers that a parser may spoil, a document at CouchDB's comfort's edge, a deep one.
    pub async fn add_extremes(&self) {
        let numbers = "[0,-0.0,0.1,1e100,-1.7976931348623157e308,5e-324,123456789012345678901234567890,9007199254740993]";
        let deep = format!("{}{}", "[".repeat(100), "]".repeat(100));
        let texts = r#"["\u0000","\u2028","😀","\"","\\","/","\ud83d\ude00"]"#;
        let doc =
            format!(r#"{{"_id":"extremes","_rev":"1-e","numbers":{numbers},"deep":{deep},"texts":{texts},"":{{"":null}}}}"#);
        let large = format!(r#"{{"_id":"large","_rev":"1-e","text":"{}"}}"#, "é".repeat(LARGE_DOCUMENT_BYTES / 2));
        for doc in [doc, large] {
            let body = format!(r#"{{"new_edits":false,"docs":[{doc}]}}"#);
            let (status, answer) =
                self.couch.ask_text(Method::POST, &format!("{}/_bulk_docs", encode(&self.db)), Some(body)).await;
            assert_eq!((status, answer.trim()), (StatusCode::CREATED, "[]"));
        }
    }

    async fn write(&self, docs: Vec<Value>) {
        let mut request: Vec<String> = Vec::new();
        let mut bytes = 0;
        for doc in docs {
            let text = doc.to_string();
            if bytes + text.len() > REQUEST_BYTES_MAX {
                self.send(std::mem::take(&mut request)).await;
                bytes = 0;
            }
            bytes += text.len();
            request.push(text);
        }
        self.send(request).await;
    }

    async fn send(&self, docs: Vec<String>) {
        let body = format!(r#"{{"new_edits":false,"docs":[{}]}}"#, docs.join(","));
        let (status, answer) = self.couch.ask_text(Method::POST, &format!("{}/_bulk_docs", encode(&self.db)), Some(body)).await;
        assert_eq!((status, answer.trim()), (StatusCode::CREATED, "[]"), "the source takes everything");
    }

    fn revisions_at_once(&mut self) -> usize {
        match self.random.u8(..10) {
            0..5 => 1,
            5..8 => 2,
            _ => self.random.usize(3..6),
        }
    }

    /// A new leaf: of a branch's end, of its middle, or of a tree of its own.
    fn revision(&mut self, at: usize) -> Value {
        let doc = &self.docs[at];
        let (parent, mut branch) = match (self.random.u8(..10), self.random.choice(0..doc.branches.len())) {
            (0..9, Some(parent)) => {
                let mut branch = doc.branches[parent].clone();
                let extends = self.random.u8(..10) < 7;
                if !extends {
                    branch.hashes.truncate(self.random.usize(1..=branch.hashes.len()));
                }
                let parent = (branch.hashes.len() == doc.branches[parent].hashes.len()).then_some(parent);
                (parent, branch)
            }
            _ => {
                let start = if self.random.u8(..10) < 8 { 1 } else { self.random.u64(2..60) };
                (None, Branch { start, hashes: Vec::new(), deleted: false, attachments: BTreeMap::new() })
            }
        };
        for _ in 0..self.random.usize(1..4) {
            branch.hashes.push(format!("{:032x}", self.random.u128(..)));
        }
        branch.deleted = self.random.u8(..100) < 15;
        let kept = if parent.is_some() { std::mem::take(&mut branch.attachments) } else { BTreeMap::new() };
        branch.attachments.clear();
        let mut members = self.body();
        let attachments = self.attachments(kept, &mut branch);
        members.insert("_id".into(), json!(self.docs[at].id));
        let generation = branch.generation();
        let newest_first: Vec<&String> = branch.hashes.iter().rev().collect();
        members.insert("_rev".into(), json!(format!("{generation}-{}", newest_first[0])));
        members.insert("_revisions".into(), json!({"start": generation, "ids": newest_first}));
        if branch.deleted {
            members.insert("_deleted".into(), json!(true));
        }
        if !attachments.is_empty() {
            members.insert("_attachments".into(), Value::Object(attachments));
        }
        match parent {
            Some(parent) => self.docs[at].branches[parent] = branch,
            None => self.docs[at].branches.push(branch),
        }
        Value::Object(members)
    }

    fn attachments(&mut self, kept: BTreeMap<String, Attachment>, branch: &mut Branch) -> Map<String, Value> {
        let mut attachments = Map::new();
        if branch.deleted && (!self.deleted_have_attachments || self.random.u8(..10) > 0) {
            return attachments;
        }
        for (name, attachment) in kept {
            if self.random.u8(..10) < 8 {
                let Attachment { kind, revpos, data } = &attachment;
                let given = match data {
                    Some(data) => json!({"content_type": kind, "revpos": revpos, "data": &**data}),
                    None => json!({"content_type": kind, "revpos": revpos, "stub": true}),
                };
                attachments.insert(name.clone(), given);
                branch.attachments.insert(name, attachment);
            }
        }
        const NAMES: [&str; 8] = ["a.txt", "b.bin", "ünï.png", "with space", "a/b.json", "+plus", "%41?#&", "semi;colon=1"];
        const KINDS: [&str; 5] =
            ["text/plain", "application/octet-stream", "image/png", "application/json", "text/html; charset=utf-8"];
        let count = if self.random.u8(..10) < 3 { self.random.usize(1..4) } else { 0 };
        for _ in 0..count {
            let name = NAMES[self.random.usize(..NAMES.len())];
            let kind = KINDS[self.random.usize(..KINDS.len())];
            let size = match self.random.u8(..100) {
                0..10 => 0,
                10..20 => 1,
                20..80 => self.random.usize(2..4096),
                80..97 => self.random.usize(4096..100_000),
                _ => self.random.usize(1_000_000..3_000_000),
            };
            let size = size.min(self.attachment_bytes_left).max(self.attachment_bytes_min);
            self.attachment_bytes_left = self.attachment_bytes_left.saturating_sub(size);
            let mut data = vec![0; size];
            match kind.starts_with("image/") || kind.ends_with("octet-stream") {
                true => self.random.fill(&mut data),
                false => data.iter_mut().for_each(|byte| *byte = b'a' + self.random.u8(..4)),
            }
            let revpos = branch.generation();
            let data = STANDARD.encode(data);
            let kept = (!self.has_stubs).then(|| data.as_str().into());
            attachments.insert(name.into(), json!({"content_type": kind, "revpos": revpos, "data": data}));
            branch.attachments.insert(name.into(), Attachment { kind, revpos, data: kept });
        }
        attachments
    }

    fn body(&mut self) -> Map<String, Value> {
        let mut members = Map::new();
        members.insert("n".into(), json!(self.random.u32(..100)));
        members.insert("kind".into(), json!(["even", "odd", "ünï"][self.random.usize(..3)]));
        for number in 0..self.random.usize(..4) {
            let value = match self.random.u8(..6) {
                0 => json!(self.random.i64(-1_000_000..1_000_000)),
                1 => json!(self.random.f64()),
                2 => json!(null),
                3 => json!({"a": [1, {"b": "\u{2028} \" \\ é 😀"}], "_inner": true}),
                4 => json!("x".repeat(self.random.usize(..3000))),
                _ => json!([[], {}, "", false]),
            };
            members.insert(format!("field{number}"), value);
        }
        members
    }

    fn new_id(&mut self) -> String {
        let n = self.docs.len();
        match self.random.u8(..24) {
            0 => format!("a/b{n}"),
            1 => format!("a+b{n}"),
            2 => format!("q?{n}&x=1#frag"),
            3 => format!("100%{n}"),
            4 => format!("%2F{n}"),
            5 => format!("ünï {n}"),
            6 => format!("日本{n}"),
            7 => format!("😀{n}"),
            8 => format!("{n}:c;d,e=f"),
            9 => format!("\"quoted\" {n}"),
            10 => format!("back\\slash{n}"),
            11 => format!(" {n} "),
            12 => format!("line\n{n}\t\u{1}"),
            13 => format!("x/../y{n}"),
            14 => format!("{n}{}", "L".repeat(400)),
            15 => format!("_design/d{n}"),
            16 => format!("_design/d ü/+{n}"),
            _ => format!("doc{n}"),
        }
    }

    pub fn ids(&self) -> Vec<String> {
        self.docs.iter().map(|doc| doc.id.clone()).collect()
    }
}
