//! A process that marks what changed and leaves the work to others: ours, or the original's.

use crate::support::{Lab, SOON, Spiegel, eventually, stays, tests_on};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

tests_on! {
    every: [
        changes_make_documents_dirty_in_the_original_s_words,
        what_is_dirty_already_is_not_written,
        a_kill_loses_no_marking,
        a_deleted_database_gets_no_change_listener,
        a_name_with_a_slash_and_a_plus_is_found,
        two_update_listeners_seldom_write_the_same,
        a_fan_out_is_marked_as_a_whole,
    ],
    embedded: [
        what_cannot_be_marked_is_marked_later,
        a_202_is_no_marking,
        what_couchdb_refuses_is_told_once_and_tried_again,
    ],
}

fn variables(lab: &Lab) -> BTreeMap<String, String> {
    let (url, db, namespace) = (lab.couch.url(), lab.spiegel_db(), lab.prefix.clone());
    let pairs = [
        ("TYPE", "update-listener"),
        ("URL", &url),
        ("DB_NAME", &db),
        ("NAMESPACE", &namespace),
        ("SAVE_SEQ_AFTER", "0.3"),
        ("SPIEGEL_FEED_HEARTBEAT", "1s"),
        ("SPIEGEL_BACKOFF_BASE", "200ms"),
        ("SPIEGEL_BACKOFF_CAP", "1s"),
        ("SPIEGEL_COUCHDB_READ_TIMEOUT", "8s"),
        ("SPIEGEL_LOG_FORMAT", "json"),
    ];
    pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
}

async fn start(lab: &Lab) -> Spiegel {
    start_with(lab, &[]).await
}

async fn start_with(lab: &Lab, more: &[(&str, &str)]) -> Spiegel {
    let mut variables = variables(lab);
    variables.extend(more.iter().map(|(name, value)| (name.to_string(), value.to_string())));
    let mut listener = Spiegel::start_unready_as(variables, &["container"]);
    listener.wait_ready().await;
    listener
}

fn listener_id(db: &str) -> String {
    format!("spiegel_cl_{db}")
}

async fn doc(lab: &Lab, id: &str) -> Option<Value> {
    lab.couch.get(&lab.spiegel_db(), id).await
}

async fn is_dirty(lab: &Lab, id: &str) -> Option<Value> {
    doc(lab, id).await.filter(|doc| doc["dirty"] == json!(true))
}

/// As a worker does: it locks, works, and is through.
async fn clean(lab: &Lab, id: &str) {
    for is_locked in [true, false] {
        let mut found = doc(lab, id).await.expect("a document");
        found["updated_at"] = json!(format!("2026-01-01T00:00:00.{:09}Z", fastrand::u32(0..1_000_000_000)));
        found["locked_at"] = if is_locked { found["updated_at"].clone() } else { json!(null) };
        found["dirty"] = json!(is_locked);
        lab.couch.put(&lab.spiegel_db(), id, found).await;
    }
}

async fn changes_make_documents_dirty_in_the_original_s_words(lab: Arc<Lab>) {
    lab.install().await;
    let (posts, target) = (lab.create("posts").await, lab.create("target").await);
    lab.rule("rule", &posts, "/hook", json!({})).await;
    lab.replicator("at_once", &posts, &target, json!({ "dirty": false, "mine": { "a": [1] } })).await;
    lab.replicator("later", &posts, &target, json!({ "dirty": false, "dirty_after_milliseconds": 60_000 })).await;
    lab.replicator("locked", &posts, &target, json!({ "dirty": true, "locked_at": "2026-01-01T00:00:00.000Z" })).await;
    lab.replicator("other", &target, &posts, json!({ "dirty": false })).await;
    lab.rule_on("never", "^nothing$", "/hook", json!({})).await;
    let _listener = start(&lab).await;
    lab.couch.put(&posts, "a", json!({})).await;

    let made = eventually(SOON, "a change listener", async || is_dirty(&lab, &listener_id(&posts)).await).await;
    assert_eq!((&made["type"], &made["db_name"]), (&json!("change_listener"), &json!(posts)));
    assert!(made["updated_at"].as_str().is_some_and(|at| at.ends_with('Z')), "{made}");
    let marked = eventually(SOON, "a dirty replicator", || is_dirty(&lab, "at_once")).await;
    assert_eq!(marked["mine"], json!({ "a": [1] }), "what others wrote stays");
    let later = eventually(SOON, "a replicator that is due later", async || {
        doc(&lab, "later").await.filter(|doc| doc["dirty_at"].is_string())
    })
    .await;
    assert_eq!(later["dirty"], json!(false));
    let locked = eventually(SOON, "a new revision of the locked one", async || {
        doc(&lab, "locked").await.filter(|doc| !doc["_rev"].as_str().unwrap_or_default().starts_with("1-"))
    });
    let locked = locked.await;
    assert_eq!((&locked["dirty"], &locked["locked_at"]), (&json!(true), &json!("2026-01-01T00:00:00.000Z")));
    assert!(doc(&lab, &listener_id(&target)).await.is_none(), "no rule matches it");
    assert_eq!(lab.receiver.requests().len(), 0, "it does no work itself");
}

async fn what_is_dirty_already_is_not_written(lab: Arc<Lab>) {
    lab.install().await;
    let (posts, target) = (lab.create("posts").await, lab.create("target").await);
    lab.rule("rule", &posts, "/hook", json!({})).await;
    lab.replicator("r", &posts, &target, json!({ "dirty": false })).await;
    let listener = start(&lab).await;
    lab.couch.put(&posts, "a", json!({})).await;
    let made = eventually(SOON, "a change listener", async || is_dirty(&lab, &listener_id(&posts)).await).await;
    let marked = eventually(SOON, "a dirty replicator", || is_dirty(&lab, "r")).await;
    let hints = listener.metric("feed_hints").await;
    for number in 0..3 {
        lab.couch.put(&posts, &format!("b{number}"), json!({})).await;
    }
    eventually(SOON, "the next hint", async || (listener.metric("feed_hints").await > hints).then_some(())).await;
    eventually(SOON, "nothing pending", async || (listener.metric("pending_databases").await == 0.0).then_some(())).await;
    for (id, before) in [(listener_id(&posts), made), (String::from("r"), marked)] {
        assert_eq!(doc(&lab, &id).await.expect("it is there")["_rev"], before["_rev"], "{id}");
    }
}

const DATABASES: usize = 20;

async fn a_kill_loses_no_marking(lab: Arc<Lab>) {
    lab.install().await;
    lab.rule_on("rule", &format!("^{}source", lab.prefix), "/hook", json!({})).await;
    let mut dbs = Vec::new();
    for number in 0..DATABASES {
        dbs.push(lab.create(&format!("source{number}")).await);
    }
    let mut listener = start(&lab).await;
    for round in 0..4 {
        for db in &dbs {
            lab.couch.put(db, &format!("d{round}"), json!({})).await;
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(0..800))).await;
        listener.kill();
        listener.start_again_unready();
        for db in &dbs {
            eventually(SOON * 2, format!("{db} is dirty in round {round}"), async || is_dirty(&lab, &listener_id(db)).await)
                .await;
        }
        for db in &dbs {
            clean(&lab, &listener_id(db)).await;
        }
        listener.wait_ready().await;
    }
}

async fn a_deleted_database_gets_no_change_listener(lab: Arc<Lab>) {
    lab.install().await;
    lab.rule_on("rule", &lab.every_db(), "/hook", json!({})).await;
    let _listener = start(&lab).await;
    let gone = lab.create("gone").await;
    lab.couch.delete(&gone).await;
    let kept = lab.create("kept").await;
    lab.couch.put(&kept, "a", json!({})).await;
    eventually(SOON, "that of the other", async || is_dirty(&lab, &listener_id(&kept)).await).await;
    stays(Duration::from_secs(4), "no change listener of a deleted database", async || {
        doc(&lab, &listener_id(&gone)).await.is_none()
    })
    .await;
}

async fn a_name_with_a_slash_and_a_plus_is_found(lab: Arc<Lab>) {
    lab.install().await;
    let (source, target) = (lab.create("a/b+c").await, lab.create("target").await);
    lab.rule("rule", &source, "/hook", json!({})).await;
    lab.replicator("r", &source, &target, json!({ "dirty": false })).await;
    let _listener = start(&lab).await;
    lab.couch.put(&source, "a", json!({})).await;
    eventually(SOON, "a change listener", async || is_dirty(&lab, &listener_id(&source)).await).await;
    eventually(SOON, "a dirty replicator", || is_dirty(&lab, "r")).await;
}

/// Two of them over many changes, and somebody who takes up what they mark as soon as he sees it.
async fn two_update_listeners_seldom_write_the_same(lab: Arc<Lab>) {
    const CHANGES: usize = 60;
    lab.install().await;
    lab.rule_on("rule", &format!("^{}source", lab.prefix), "/hook", json!({})).await;
    let mut dbs = Vec::new();
    for number in 0..4 {
        dbs.push(lab.create(&format!("source{number}")).await);
    }
    let as_there = [("SAVE_SEQ_AFTER", "60")];
    let listeners = [start_with(&lab, &as_there).await, start_with(&lab, &as_there).await];
    let conflicts = async || {
        let mut all = 0.0;
        for listener in &listeners {
            let (_, page) = listener.page("/metrics").await.expect("the metrics page");
            let lines = page.lines().filter(|line| line.contains("checkpoint_writes") && line.contains("conflict"));
            all += lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum::<f64>();
        }
        all
    };
    // Both have swept and saved their first position, which is one document for both.
    eventually(SOON, "sweeps", async || {
        let swept = [listeners[0].metric("sweeps").await, listeners[1].metric("sweeps").await];
        swept.iter().all(|sweeps| *sweeps >= 1.0).then_some(())
    })
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = conflicts().await;
    for change in 0..CHANGES {
        let db = &dbs[change % dbs.len()];
        lab.couch.put(db, &format!("d{change}"), json!({})).await;
        eventually(SOON, format!("{db} is dirty"), async || is_dirty(&lab, &listener_id(db)).await).await;
        clean(&lab, &listener_id(db)).await;
    }
    let found = conflicts().await - before;
    println!("{found} conflicts of {CHANGES} changes");
    assert!(found <= CHANGES as f64 / 10.0, "{found} conflicts of {CHANGES} changes");
}

async fn a_fan_out_is_marked_as_a_whole(lab: Arc<Lab>) {
    const TARGETS: usize = 600;
    lab.install().await;
    let source = lab.create("source").await;
    let doc = |number: usize| {
        let (source, target) = (lab.couch.url_for_user(&source), lab.couch.url_for_user(&format!("{}t{number}", lab.prefix)));
        json!({ "_id": format!("r{number}"), "type": "replicator", "source": source, "target": target, "dirty": false })
    };
    lab.couch.bulk(&lab.spiegel_db(), (0..TARGETS).map(doc).collect()).await;
    let _listener = start(&lab).await;
    lab.couch.put(&source, "a", json!({})).await;
    eventually(SOON, "all of them dirty", async || {
        let docs = lab.couch.all(&lab.spiegel_db()).await;
        let marked = docs.iter().filter(|(id, rev)| id.starts_with('r') && rev.starts_with("2-"));
        (marked.map(|(id, _)| id).collect::<BTreeSet<_>>().len() == TARGETS).then_some(())
    })
    .await;
}

async fn what_cannot_be_marked_is_marked_later(lab: Arc<Lab>) {
    lab.install().await;
    let posts = lab.create("posts").await;
    lab.rule("rule", &posts, "/hook", json!({})).await;
    let mut listener = start(&lab).await;
    eventually(SOON, "the first sweep's find", async || is_dirty(&lab, &listener_id(&posts)).await).await;
    eventually(SOON, "a position", async || doc(&lab, "global_lastSeq").await.filter(|doc| !doc["value"].is_null())).await;
    clean(&lab, &listener_id(&posts)).await;
    let faults = lab.faults.as_ref().expect("the embedded server");
    faults.answer(None, &format!("/{}/_bulk_docs", lab.spiegel_db()), 503, 1000);
    lab.couch.put(&posts, "a", json!({})).await;
    eventually(SOON, "the hint", async || (listener.metric("pending_databases").await >= 1.0).then_some(())).await;
    assert!(is_dirty(&lab, &listener_id(&posts)).await.is_none());
    listener.kill();
    faults.clear();
    listener.start_again_unready();
    eventually(SOON, "marked after all", async || is_dirty(&lab, &listener_id(&posts)).await).await;
}

async fn a_202_is_no_marking(lab: Arc<Lab>) {
    lab.install().await;
    let posts = lab.create("posts").await;
    lab.rule("rule", &posts, "/hook", json!({})).await;
    let listener = start(&lab).await;
    eventually(SOON, "the first sweep's find", async || is_dirty(&lab, &listener_id(&posts)).await).await;
    clean(&lab, &listener_id(&posts)).await;
    let faults = lab.faults.as_ref().expect("the embedded server");
    // Accepted and then lost: the read that follows does not find it.
    faults.answer(None, &format!("/{}/_bulk_docs", lab.spiegel_db()), 202, 1);
    lab.couch.put(&posts, "a", json!({})).await;
    eventually(SOON, "a change listener", async || is_dirty(&lab, &listener_id(&posts)).await).await;
    eventually(SOON, "nothing pending", async || (listener.metric("pending_databases").await == 0.0).then_some(())).await;
}

async fn what_couchdb_refuses_is_told_once_and_tried_again(lab: Arc<Lab>) {
    lab.install().await;
    let (posts, others, target) = (lab.create("posts").await, lab.create("others").await, lab.create("target").await);
    lab.replicator("refused", &posts, &target, json!({ "dirty": false })).await;
    lab.replicator("fine", &others, &target, json!({ "dirty": false })).await;
    let faults = lab.faults.as_ref().expect("the embedded server");
    faults.refuse(&lab.spiegel_db(), "refused");
    let listener = start(&lab).await;
    lab.couch.put(&posts, "a", json!({})).await;
    lab.couch.put(&others, "a", json!({})).await;
    eventually(SOON, "the other one", async || is_dirty(&lab, "fine").await).await;
    let told = || listener.log().iter().filter(|line| line["id"] == "refused").count();
    eventually(SOON, "a line", async || (told() > 0).then_some(())).await;
    stays(Duration::from_secs(3), "one line", async || told() == 1).await;
    eventually(SOON, "it is owed", async || (listener.metric("pending_databases").await >= 1.0).then_some(())).await;
    let position = async || doc(&lab, "global_lastSeq").await.expect("a position")["value"].clone();
    let before = position().await;
    clean(&lab, "fine").await;
    lab.couch.put(&others, "b", json!({})).await;
    eventually(SOON, "the other one again", async || is_dirty(&lab, "fine").await).await;
    stays(Duration::from_secs(1), "the position", async || position().await == before).await;
    faults.clear();
    eventually(SOON, "marked after all", async || is_dirty(&lab, "refused").await).await;
    eventually(SOON, "the position moves on", async || (position().await != before).then_some(())).await;
}
