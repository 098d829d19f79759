//! Spiegel's replication beside CouchDB's own: the same source, two targets, and nothing that differs between them.
//!
//! The first target is filled by `_replicate`, the second by Spiegel with the native engine, through whatever goes wrong
//! meanwhile. SPIEGEL_TEST_SEED repeats a source, SPIEGEL_TEST_DOCS makes it larger.

mod beside_pouchdb;
mod compare;
mod filters;

mod restored;
mod source;
mod users;

use crate::support::couch::encode;
use crate::support::server::environment;
use crate::support::{Couch, Kind, Lab, Proxy, eventually, tests_on};
use compare::{LeafSets, Place, assert_same, leaf_sets};
use fastrand::Rng;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use source::Source;
use std::sync::Arc;
use std::time::Duration;

tests_on! {
    every: [],
    like_couchdb: [
        the_comparison_sees_what_differs,
        every_shape_arrives,
        a_source_that_is_written_meanwhile_arrives,
        kills_lose_nothing,
        cuts_on_either_side_lose_nothing,
        refused_documents_count_and_stop_no_other,
        empty_attachments_arrive,
    ],
    couchdb: [a_large_attachment_arrives],
}

/// A debug build on a busy machine, and CouchDB's jitter of up to five seconds a run where its engine is chosen.
const CAUGHT_UP: Duration = Duration::from_secs(120);

/// A random source and its two targets.
pub struct Pair {
    pub lab: Arc<Lab>,
    pub source: Source,
    pub random: Rng,
    /// Filled by `_replicate`.
    pub theirs: String,
    /// Filled by Spiegel.
    pub ours: String,
    seed: u64,
}

impl Pair {
    pub async fn new(lab: Arc<Lab>) -> Self {
        Self::named(lab, ["source", "theirs", "ours"]).await
    }

    pub async fn named(lab: Arc<Lab>, [source, theirs, ours]: [&str; 3]) -> Self {
        let (mut random, seed) = seeded();
        lab.install().await;
        let source = lab.create(source).await;
        let source = Source::new(&lab.couch, &source, random.fork());
        let source = if lab.kind == Kind::CouchDb { source.without_empty_attachments() } else { source };
        let (theirs, ours) = (lab.create(theirs).await, lab.create(ours).await);
        Self { lab, source, random, theirs, ours, seed }
    }

    /// How many documents a source has at first.
    pub fn size() -> usize {
        environment("SPIEGEL_TEST_DOCS").map_or(400, |text| text.parse().expect("a number"))
    }

    pub fn place<'a>(&'a self, db: &'a str) -> Place<'a> {
        Place { couch: &self.lab.couch, db }
    }

    /// Spiegel's replicator from the source to its target.
    pub async fn replicator(&self, more: Value) {
        replicator(&self.lab, "ours", &self.source.db, &self.ours, more).await;
    }

    /// Fills the other target.
    pub async fn reference(&self, more: Value) {
        reference(&self.lab, &self.source.db, &self.theirs, more).await;
    }

    pub async fn caught_up(&self, when: &str) {
        let what = format!("{when}: every leaf in the target (seed {})", self.seed);
        same_leaves(self.place(&self.source.db), self.place(&self.ours), &what).await;
    }

    /// Both targets are the source, to the last byte.
    pub async fn same(&self, when: &str) {
        self.caught_up(when).await;
        self.reference(json!({})).await;
        let when = format!("{when} (seed {})", self.seed);
        assert_same(self.place(&self.source.db), &[self.place(&self.theirs), self.place(&self.ours)], &when).await;
    }
}

/// What a random test does, to be done again.
pub fn seeded() -> (Rng, u64) {
    let seed = environment("SPIEGEL_TEST_SEED").map_or_else(|| fastrand::u64(..), |text| text.parse().expect("a number"));
    println!("repeat with SPIEGEL_TEST_SEED={seed}");
    (Rng::with_seed(seed), seed)
}

/// With the engine under test.
pub async fn replicator(lab: &Lab, id: &str, source: &str, target: &str, more: Value) {
    let engine = environment("SPIEGEL_TEST_ENGINE").unwrap_or_else(|| "native".into());
    let mut fields = json!({ "engine": engine });
    fields.as_object_mut().expect("an object").extend(more.as_object().cloned().unwrap_or_default());
    lab.replicator(id, source, target, fields).await;
}

/// One run of the server's own replicator.
pub async fn reference(lab: &Lab, source: &str, target: &str, more: Value) -> Value {
    let url = |db: &str| format!("{}/{}", lab.couch.url(), encode(db));
    reference_by(&lab.couch, &url(source), &url(target), more).await
}

pub async fn reference_by(couch: &Couch, source: &str, target: &str, more: Value) -> Value {
    let mut asked = json!({ "source": source, "target": target });
    asked.as_object_mut().expect("an object").extend(more.as_object().cloned().unwrap_or_default());
    let (mut status, mut answer) = couch.ask(Method::POST, "_replicate", Some(asked.clone())).await;
    // Where the tests press it, CouchDB loses its connections to itself.
    for _ in 0..5 {
        if !answer.to_string().contains("conn_closed") {
            break;
        }
        (status, answer) = couch.ask(Method::POST, "_replicate", Some(asked.clone())).await;
    }
    assert!(status.is_success() && answer["ok"] == true, "_replicate {source} {target}: {status} {answer}");
    answer
}

pub async fn same_leaves(expected: Place<'_>, found: Place<'_>, what: &str) {
    let mut seen: Option<(LeafSets, LeafSets)> = None;
    let waited = tokio::time::timeout(CAUGHT_UP, async {
        loop {
            let (expected, found) = (leaf_sets(expected).await, leaf_sets(found).await);
            if expected == found {
                return;
            }
            seen = Some((expected, found));
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
    });
    if waited.await.is_err() {
        let (expected, found) = seen.expect("both were read");
        let missing: Vec<_> = expected.iter().filter(|(id, leaves)| found.get(*id) != Some(leaves)).take(5).collect();
        let surplus: Vec<_> = found.keys().filter(|id| !expected.contains_key(*id)).take(5).collect();
        panic!(
            "not within {CAUGHT_UP:?}: {what}; {} ids wanted, {} found; such as {missing:?}; surplus {surplus:?}",
            expected.len(),
            found.len()
        );
    }
}

/// What a run's checkpoint in the target says, summed over its history.
pub async fn recorded(lab: &Lab, db: &str, what: &str) -> u64 {
    let (status, page) = lab.couch.ask(Method::GET, &format!("{}/_local_docs?include_docs=true", encode(db)), None).await;
    assert_eq!(status, StatusCode::OK, "{page}");
    let rows = page["rows"].as_array().expect("rows").iter();
    let entries = rows.flat_map(|row| row["doc"]["history"].as_array().cloned().unwrap_or_default());
    entries.filter_map(|entry| entry[what].as_u64()).sum()
}

async fn local_ids(lab: &Lab, db: &str) -> Vec<String> {
    let (_, page) = lab.couch.ask(Method::GET, &format!("{}/_local_docs", encode(db)), None).await;
    page["rows"].as_array().expect("rows").iter().map(|row| row["id"].as_str().expect("an id").to_string()).collect()
}

async fn the_comparison_sees_what_differs(lab: Arc<Lab>) {
    let revisions = |ids: [&str; 2]| json!({ "start": 2, "ids": ids });
    let attachment = |data: &str, revpos: u64| json!({ "a": {"content_type": "image/png", "data": data, "revpos": revpos} });
    let docs = |n: &str, data: &str, revpos: u64, deleted: bool, parent: &str| {
        let first = json!({ "_id": "x", "_revisions": revisions(["b", parent]), "_attachments": attachment(data, revpos) });
        let second = json!({ "_id": "x", "_revisions": revisions(["c", parent]), "_deleted": deleted });
        format!(r#"{{"new_edits":false,"docs":[{first},{second},{{"_id":"y","_rev":"1-a","n":{n}}}]}}"#)
    };
    let expected = docs("1e100", "AAEC", 1, false, "a");
    let cases = [
        (expected.clone(), true),
        (docs("1e101", "AAEC", 1, false, "a"), false),
        (docs("12345678901234567890123", "AAEC", 1, false, "a"), false),
        (docs("1e100", "AAED", 1, false, "a"), false),
        (docs("1e100", "AAEC", 2, false, "a"), false),
        (docs("1e100", "AAEC", 1, true, "a"), false),
        (docs("1e100", "AAEC", 1, false, "d"), false),
        (r#"{"new_edits":false,"docs":[]}"#.to_string(), false),
    ];
    let fill = async |db: &str, body: String| {
        let (status, answer) = lab.couch.ask_text(Method::POST, &format!("{}/_bulk_docs", encode(db)), Some(body)).await;
        assert_eq!((status, answer.trim()), (StatusCode::CREATED, "[]"));
    };
    let first = lab.create("expected").await;
    fill(&first, expected).await;
    for (number, (body, same)) in cases.into_iter().enumerate() {
        let second = lab.create(&format!("found{number}")).await;
        fill(&second, body).await;
        let (couch, first) = (lab.couch.clone(), first.clone());
        let compared = tokio::spawn(async move {
            assert_same(Place { couch: &couch, db: &first }, &[Place { couch: &couch, db: &second }], "on purpose").await;
        });
        assert_eq!(compared.await.is_ok(), same, "case {number}");
    }
}

async fn every_shape_arrives(lab: Arc<Lab>) {
    let mut pair = Pair::new(lab.clone()).await;
    let security = |name: &str| json!({ "admins": {"names": [name], "roles": []}, "members": {"names": [], "roles": [name]} });
    for (db, name) in [(&pair.source.db, "of_the_source"), (&pair.ours, "of_the_target")] {
        let path = format!("{}/_security", encode(db));
        let (status, answer) = lab.couch.ask(Method::PUT, &path, Some(security(name))).await;
        assert!(status.is_success(), "{answer}");
    }
    lab.couch.put(&pair.source.db, "_local/of the source", json!({ "stays": "here" })).await;
    pair.source.grow(Pair::size(), 0).await;
    pair.source.add_extremes().await;
    pair.replicator(json!({})).await;
    let mut spiegel = lab.spiegel().await;
    pair.same("a new target").await;
    // Stubs now stand for attachments that the target has.
    for round in 0..2 {
        pair.source.grow(20, Pair::size() / 4).await;
        pair.same(&format!("after growth {round}")).await;
    }
    spiegel.restart().await;
    pair.source.grow(5, 20).await;
    pair.same("after a restart").await;

    let (_, found) = lab.couch.ask(Method::GET, &format!("{}/_security", encode(&pair.ours)), None).await;
    assert_eq!(found, security("of_the_target"), "_security is each database's own");
    let locals = local_ids(&lab, &pair.ours).await;
    assert!(!locals.contains(&"_local/of the source".to_string()), "{locals:?}");
    assert!(!locals.is_empty(), "a checkpoint on the target");
    if environment("SPIEGEL_TEST_ENGINE").is_none() {
        assert!(locals.iter().any(|id| id.starts_with("_local/spiegel-")), "the native engine's: {locals:?}");
    }
    assert_eq!(pair.source.ids().len() + 2, leaf_sets(pair.place(&pair.ours)).await.len());
}

async fn a_source_that_is_written_meanwhile_arrives(lab: Arc<Lab>) {
    let mut pair = Pair::new(lab.clone()).await;
    pair.source.grow(Pair::size() / 4, 0).await;
    pair.replicator(json!({})).await;
    let _spiegel = lab.spiegel().await;
    for _ in 0..25 {
        let (new, edits) = (pair.random.usize(..12), pair.random.usize(..20));
        pair.source.grow(new, edits).await;
        tokio::time::sleep(Duration::from_millis(pair.random.u64(..150))).await;
    }
    pair.same("when it is quiet").await;
}

async fn kills_lose_nothing(lab: Arc<Lab>) {
    let mut pair = Pair::new(lab.clone()).await;
    pair.source.grow(Pair::size() / 2, 0).await;
    pair.replicator(json!({})).await;
    let mut spiegel = lab.spiegel().await;
    for kill in 0..6 {
        if kill > 0 {
            pair.source.grow(Pair::size() / 20, Pair::size() / 10).await;
        }
        tokio::time::sleep(Duration::from_millis(pair.random.u64(..700))).await;
        spiegel.kill();
        match pair.random.bool() {
            true => spiegel.start_again().await,
            false => spiegel.start_again_unready(),
        }
    }
    spiegel.wait_ready().await;
    pair.same("after the kills").await;
}

async fn cuts_on_either_side_lose_nothing(lab: Arc<Lab>) {
    let mut pair = Pair::new(lab.clone()).await;
    let (to_source, to_target) = (Proxy::start(&lab.couch.base).await, Proxy::start(&lab.couch.base).await);
    let url = |proxy: &Proxy, db: &str| lab.couch.at(&proxy.base()).url_for_user(db);
    let sides = json!({ "source": url(&to_source, &pair.source.db), "target": url(&to_target, &pair.ours) });
    pair.source.grow(Pair::size() / 2, 0).await;
    pair.replicator(sides).await;
    let mut spiegel = lab.spiegel().await;
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(pair.random.u64(10..400))).await;
        match pair.random.u8(..3) {
            0 => to_source.cut(),
            1 => to_target.cut(),
            _ => to_source.truncate(1),
        }
        pair.source.grow(3, 10).await;
    }
    to_source.truncate(0);
    pair.same("after the cuts").await;
    assert!(spiegel.is_alive());
    assert!(!to_source.requests().is_empty() && !to_target.requests().is_empty(), "both were in the way");
}

async fn refused_documents_count_and_stop_no_other(lab: Arc<Lab>) {
    let pair = Pair::new(lab.clone()).await;
    match &lab.faults {
        Some(faults) => faults.refuse(&pair.ours, "refused"),
        None => {
            let refuse = "function (doc) { if (doc._id.indexOf('refused') === 0) { throw({forbidden: 'not here'}); } }";
            lab.couch.put(&pair.ours, "_design/refuses", json!({ "validate_doc_update": refuse })).await;
        }
    }
    for prefix in ["a", "refused", "z"] {
        lab.couch.fill(&pair.source.db, prefix, 60).await;
    }
    // One by one, as those with attachments go.
    for id in ["refused with", "with"] {
        let attachments = json!({ "a": {"content_type": "image/png", "data": "AAEC".repeat(100_000)} });
        lab.couch.put(&pair.source.db, id, json!({ "_attachments": attachments })).await;
    }
    pair.replicator(json!({})).await;
    let _spiegel = lab.spiegel().await;
    let arrived = async || {
        let ids = lab.couch.all(&pair.ours).await;
        (ids.keys().filter(|id| !id.starts_with("_design/")).count() == 121).then_some(())
    };
    eventually(CAUGHT_UP, "all others", arrived).await;
    let counted = async || (recorded(&lab, &pair.ours, "doc_write_failures").await == 61).then_some(());
    eventually(CAUGHT_UP, "61 doc_write_failures", counted).await;
    assert_eq!(recorded(&lab, &pair.ours, "docs_written").await, 121);
    let settled =
        async || lab.couch.get(&lab.spiegel_db(), "ours").await.filter(|doc| doc["dirty"] == false && doc["dirty_at"].is_null());
    eventually(CAUGHT_UP, "a run that did not fail", settled).await;
    assert!(lab.couch.all(&pair.ours).await.keys().all(|id| !id.starts_with("refused")));
}

/// Beside the source and not beside `_replicate`, which cannot do it.
async fn empty_attachments_arrive(lab: Arc<Lab>) {
    let pair = Pair::new(lab.clone()).await;
    let empty = |kind: &str| json!({ "content_type": kind, "data": "" });
    let full = json!({ "content_type": "image/png", "data": "AAEC" });
    let large = json!({ "content_type": "image/png", "data": "AAEC".repeat(400_000) });
    let cases = [
        json!({ "a": empty("image/png") }),
        json!({ "a": empty("image/png"), "b": empty("application/octet-stream") }),
        json!({ "a": empty("text/plain") }),
        json!({ "a": empty("image/png"), "b": full }),
        json!({ "a": full, "b": empty("image/png") }),
        json!({ "a": empty("image/png"), "b": large, "c": empty("text/plain"), "d": empty("image/png") }),
    ];
    pair.replicator(json!({})).await;
    let _spiegel = lab.spiegel().await;
    for (number, attachments) in cases.into_iter().enumerate() {
        let id = format!("doc{number}");
        let rev = lab.couch.put(&pair.source.db, &id, json!({ "_attachments": attachments })).await;
        pair.caught_up(&id).await;
        // Stubs for what is there, and one more that is empty.
        let mut next = lab.couch.get(&pair.source.db, &id).await.expect("a document");
        next["_rev"] = json!(rev);
        next["_attachments"]["more"] = empty("image/png");
        lab.couch.put(&pair.source.db, &id, next).await;
        pair.caught_up(&id).await;
    }
    assert_same(pair.place(&pair.source.db), &[pair.place(&pair.ours)], "empty attachments").await;
}

/// As large as an attachment is in practice; only a real CouchDB streams it.
async fn a_large_attachment_arrives(lab: Arc<Lab>) {
    const BYTES: usize = 64 << 20;
    let pair = Pair::new(lab.clone()).await;
    let mut random = pair.random.clone();
    let mut data = vec![0; BYTES];
    random.fill(&mut data);
    for (id, kind) in [("large", "application/octet-stream"), ("large text", "text/plain")] {
        let text: Vec<u8> = data.iter().map(|byte| b'a' + byte % 16).collect();
        let body = if kind == "text/plain" { text } else { data.clone() };
        let url = format!("{}/{}/{}/a", lab.couch.base, encode(&pair.source.db), encode(id));
        let request = reqwest::Client::new().put(url).basic_auth(&lab.couch.user, Some(&lab.couch.password));
        let answer = request.header("content-type", kind).body(body).send().await.expect("an answer");
        assert_eq!(answer.status(), StatusCode::CREATED);
    }
    pair.replicator(json!({})).await;
    let _spiegel = lab.spiegel().await;
    pair.caught_up("a large attachment").await;
    let meta = async |db: &str, id: &str| {
        let path = format!("{}/{}?att_encoding_info=true", encode(db), encode(id));
        lab.couch.ask(Method::GET, &path, None).await.1["_attachments"].clone()
    };
    for id in ["large", "large text"] {
        assert_eq!(meta(&pair.source.db, id).await, meta(&pair.ours, id).await, "{id}");
        assert_eq!(meta(&pair.ours, id).await["a"]["length"], BYTES);
    }
}
