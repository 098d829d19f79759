//! Processes with one role each: they meet in the documents of the spiegel database alone, as the original's do.

use crate::support::couch::encode;
use crate::support::server::environment;
use crate::support::{Answer, Lab, SOON, Spiegel, eventually, stays, tests_on};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

tests_on! {
    every: [
        a_dirty_change_listener_is_delivered_and_cleaned,
        a_dirty_replicator_is_replicated_and_cleaned,
        dirty_at_is_honoured,
        a_lock_of_the_original_counts_until_retry_after,
        a_lock_that_is_renewed_is_not_taken,
        a_dead_process_s_lock_is_free_soon,
        what_is_dirtied_during_the_work_runs_again,
        a_lost_lock_is_neither_cleaned_nor_taken_back,
        what_fails_backs_off_by_dirty_at,
        a_rule_that_waits_gives_up,
        a_change_ends_no_rule_s_wait_and_an_edit_does,
        what_an_invalid_rule_may_want_is_not_cleaned_away,
        what_is_missing_is_forgotten_after_a_while,
        an_orderly_stop_leaves_it_dirty_and_unlocked,
        nothing_is_lost_by_kills_of_many_processes,
        run_works_by_locks_beside_others,
        run_works_without_locks_again_once_nobody_else_does,
        from_roles_to_run_and_back,
        run_leaves_its_own_work_alone,
        check_warns_of_our_fields_in_a_mixed_fleet,
    ],
    like_couchdb: [
        conflicted_revisions_are_removed,
        locks_behind_a_winner_that_was_removed_die_as_well,
        run_removes_what_a_cluster_that_was_cut_in_two_left,
    ],
    embedded: [a_202_is_no_lock],
}

async fn worker(lab: &Lab, role: &str, more: &[(&str, &str)]) -> Spiegel {
    let settings = [&[("ROLE", role), ("ROLES_STALE_AFTER", "3s"), ("ROLES_CHECK_STALLED", "300ms")], more].concat();
    lab.spiegel_with(&settings).await
}

fn listener_id(db: &str) -> String {
    format!("spiegel_cl_{db}")
}

fn time(offset: i64) -> String {
    let now = SystemTime::now();
    let span = Duration::from_millis(offset.unsigned_abs());
    humantime::format_rfc3339_millis(if offset < 0 { now - span } else { now + span }).to_string()
}

/// Writes fields into a document whatever happens to it meanwhile.
async fn change(lab: &Lab, id: &str, fields: Value) {
    for _ in 0..100 {
        let mut doc = lab.couch.get(&lab.spiegel_db(), id).await.unwrap_or_else(|| panic!("{id} is there"));
        doc.as_object_mut().expect("an object").extend(fields.as_object().cloned().expect("fields"));
        let path = format!("{}/{}", encode(&lab.spiegel_db()), encode(id));
        if lab.couch.ask(Method::PUT, &path, Some(doc)).await.0.is_success() {
            return;
        }
    }
    panic!("{id} changes all the time");
}

/// As the original's update-listener does.
async fn dirty_listener(lab: &Lab, db: &str) {
    let id = listener_id(db);
    let made = json!({ "_id": id, "type": "change_listener", "db_name": db, "dirty": true, "updated_at": time(0) });
    let path = format!("{}/{}", encode(&lab.spiegel_db()), encode(&id));
    if lab.couch.ask(Method::PUT, &path, Some(made)).await.0 == StatusCode::CONFLICT {
        dirty(lab, &id).await;
    }
}

async fn dirty(lab: &Lab, id: &str) {
    change(lab, id, json!({ "dirty": true, "updated_at": time(0) })).await;
}

async fn doc(lab: &Lab, id: &str) -> Value {
    lab.couch.get(&lab.spiegel_db(), id).await.unwrap_or(Value::Null)
}

async fn settles(lab: &Lab, id: &str) -> Value {
    let settled = async || {
        let doc = doc(lab, id).await;
        (doc["dirty"] == json!(false) && doc["locked_at"].is_null() && doc["dirty_at"].is_null()).then_some(doc)
    };
    eventually(SOON, format!("{id} is clean"), settled).await
}

async fn a_dirty_change_listener_is_delivered_and_cleaned(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("db").await;
    lab.rule("rule", &db, "/hook", json!({})).await;
    lab.couch.fill(&db, "d", 120).await;
    let listener = json!({ "type": "change_listener", "db_name": db, "dirty": true, "mine": { "kept": [1] } });
    lab.spiegel_doc(&listener_id(&db), listener).await;
    let _workers = [worker(&lab, "change-listener", &[]).await, worker(&lab, "change-listener", &[]).await];
    eventually(SOON, "all are delivered", async || (lab.receiver.delivered("/hook").len() == 120).then_some(())).await;
    let doc = settles(&lab, &listener_id(&db)).await;
    assert_eq!((&doc["mine"], doc.get("locked_by")), (&json!({ "kept": [1] }), None), "{doc}");
    // A position as the original reads it.
    let query = format!("since={}", encode(&doc["last_seq"].as_str().map_or_else(|| doc["last_seq"].to_string(), String::from)));
    assert_eq!(lab.couch.changes(&db, &query).await["results"], json!([]));

    lab.couch.put(&db, "one-more", json!({})).await;
    dirty_listener(&lab, &db).await;
    eventually(SOON, "one more", async || lab.receiver.delivered("/hook").contains_key("one-more").then_some(())).await;
    settles(&lab, &listener_id(&db)).await;
    let repeated = lab.receiver.delivered("/hook").into_values().filter(|count| *count > 1).count();
    assert_eq!(repeated, 0, "two processes, and nothing twice");
}

async fn a_dirty_replicator_is_replicated_and_cleaned(lab: Arc<Lab>) {
    lab.install().await;
    let (source, target) = (lab.create("source").await, lab.create("target").await);
    lab.couch.fill(&source, "d", 7).await;
    // Without the field it is new, and dirty.
    lab.replicator("copy", &source, &target, json!({ "mine": 7 })).await;
    let _workers = [worker(&lab, "replicator", &[]).await, worker(&lab, "replicator", &[]).await];
    eventually(SOON, "seven", async || (lab.couch.all(&target).await.len() == 7).then_some(())).await;
    let doc = settles(&lab, "copy").await;
    assert_eq!((&doc["mine"], doc.get("locked_by")), (&json!(7), None), "{doc}");
    lab.couch.put(&source, "one-more", json!({})).await;
    dirty(&lab, "copy").await;
    eventually(SOON, "eight", async || (lab.couch.all(&target).await.len() == 8).then_some(())).await;
    settles(&lab, "copy").await;
}

async fn dirty_at_is_honoured(lab: Arc<Lab>) {
    lab.install().await;
    let (source, target) = (lab.create("source").await, lab.create("target").await);
    lab.couch.fill(&source, "d", 3).await;
    lab.replicator("soon", &source, &target, json!({ "dirty": false, "dirty_at": time(2500) })).await;
    lab.replicator("never", &source, &lab.name("none"), json!({ "dirty": false, "dirty_at": time(3_600_000) })).await;
    let before = doc(&lab, "never").await;
    let due = SystemTime::now() + Duration::from_millis(2400);
    let _worker = worker(&lab, "replicator", &[]).await;
    let early = async || lab.couch.all(&target).await.is_empty() || SystemTime::now() >= due;
    stays(Duration::from_millis(1500), "not before its time", early).await;
    eventually(SOON, "it ran", async || (lab.couch.all(&target).await.len() == 3).then_some(())).await;
    settles(&lab, "soon").await;
    assert_eq!(doc(&lab, "never").await, before);
}

async fn a_lock_of_the_original_counts_until_retry_after(lab: Arc<Lab>) {
    lab.install().await;
    let (source, target) = (lab.create("source").await, lab.create("target").await);
    lab.couch.fill(&source, "d", 3).await;
    let locked = json!({ "dirty": true, "locked_at": time(-1000) });
    lab.replicator("locked", &source, &target, locked).await;
    let clean = json!({ "dirty": false, "locked_at": time(-1000), "locked_by": { "owner": "x", "locked_at": time(-99_000) } });
    lab.replicator("clean", &source, &target, clean).await;
    let before = doc(&lab, "locked").await;
    let patient = worker(&lab, "replicator", &[]).await;
    stays(Duration::from_secs(5), "it is somebody's", async || doc(&lab, "locked").await == before).await;
    drop(patient);
    let _worker = worker(&lab, "replicator", &[("ROLES_RETRY_AFTER", "9s")]).await;
    eventually(SOON, "it ran", async || (lab.couch.all(&target).await.len() == 3).then_some(())).await;
    settles(&lab, "locked").await;
    settles(&lab, "clean").await;
}

async fn a_lock_that_is_renewed_is_not_taken(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("db").await;
    lab.rule("rule", &db, "/hook", json!({})).await;
    lab.couch.fill(&db, "d", 1).await;
    lab.receiver.answer("/hook", Answer::ok().after(Duration::from_secs(8)));
    let _workers = [
        worker(&lab, "change-listener", &[("WEBHOOK_TIMEOUT", "20s")]).await,
        worker(&lab, "change-listener", &[("WEBHOOK_TIMEOUT", "20s")]).await,
    ];
    dirty_listener(&lab, &db).await;
    eventually(SOON, "it is asked", async || (lab.receiver.count("/hook") == 1).then_some(())).await;
    let locked_at = doc(&lab, &listener_id(&db)).await["locked_at"].clone();
    let doc = settles(&lab, &listener_id(&db)).await;
    assert!(locked_at.is_string() && doc["updated_at"].as_str() > locked_at.as_str(), "{locked_at} {doc}");
    assert_eq!(lab.receiver.count("/hook"), 1, "longer than a dead one's lock lasts, and nobody took it");
}

async fn a_dead_process_s_lock_is_free_soon(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("db").await;
    lab.rule("rule", &db, "/hook", json!({})).await;
    lab.couch.fill(&db, "d", 1).await;
    lab.receiver.answer("/hook", Answer::hang());
    let mut dead = worker(&lab, "change-listener", &[]).await;
    dirty_listener(&lab, &db).await;
    eventually(SOON, "it is asked", async || (lab.receiver.count("/hook") == 1).then_some(())).await;
    dead.kill();
    let left = doc(&lab, &listener_id(&db)).await;
    assert!(left["locked_at"].is_string() && left["locked_by"]["locked_at"] == left["locked_at"], "{left}");
    lab.receiver.answer("/hook", Answer::ok());
    let _worker = worker(&lab, "change-listener", &[]).await;
    eventually(SOON, "it is delivered", async || (lab.receiver.delivered("/hook").len() == 1).then_some(())).await;
    settles(&lab, &listener_id(&db)).await;
}

/// A database whose change_listener is locked, because its webhook takes a second and has begun.
async fn a_second_s_work(lab: &Lab) -> (String, Spiegel) {
    lab.install().await;
    let db = lab.create("db").await;
    lab.rule("rule", &db, "/hook", json!({})).await;
    lab.couch.fill(&db, "d", 1).await;
    lab.receiver.answer("/hook", Answer::ok().after(Duration::from_secs(1)));
    let worker = worker(lab, "change-listener", &[]).await;
    dirty_listener(lab, &db).await;
    eventually(SOON, "it is asked", async || (lab.receiver.count("/hook") == 1).then_some(())).await;
    (db, worker)
}

async fn what_is_dirtied_during_the_work_runs_again(lab: Arc<Lab>) {
    let (db, _worker) = a_second_s_work(&lab).await;
    lab.couch.put(&db, "meanwhile", json!({})).await;
    dirty_listener(&lab, &db).await;
    eventually(SOON, "both are there", async || (lab.receiver.delivered("/hook").len() == 2).then_some(())).await;
    settles(&lab, &listener_id(&db)).await;
    assert_eq!(lab.receiver.count("/hook"), 2, "and none twice");
}

async fn a_lost_lock_is_neither_cleaned_nor_taken_back(lab: Arc<Lab>) {
    let (db, _worker) = a_second_s_work(&lab).await;
    // The original took it.
    let id = listener_id(&db);
    change(&lab, &id, json!({ "locked_at": time(0) })).await;
    let theirs = doc(&lab, &id).await;
    eventually(SOON, "it is answered", async || (lab.receiver.delivered("/hook").len() == 1).then_some(())).await;
    stays(Duration::from_secs(4), "it is theirs", async || doc(&lab, &id).await == theirs).await;
    change(&lab, &id, json!({ "locked_at": null })).await;
    settles(&lab, &id).await;
}

async fn what_fails_backs_off_by_dirty_at(lab: Arc<Lab>) {
    lab.install().await;
    let (source, target) = (lab.create("source").await, lab.name("target"));
    lab.couch.fill(&source, "d", 3).await;
    lab.replicator("copy", &source, &target, json!({})).await;
    // What nobody can run is left alone.
    lab.spiegel_doc("odd", json!({ "type": "replicator", "dirty": true })).await;
    let worker = worker(&lab, "replicator", &[]).await;
    let backs_off = async || {
        let doc = doc(&lab, "copy").await;
        let waits = doc["dirty"] == json!(false) && doc["dirty_at"].is_string() && doc["locked_at"].is_null();
        (waits && doc["retries"].as_u64() >= Some(2)).then_some(doc)
    };
    eventually(SOON, "it backs off", backs_off).await;
    let told = worker.log().iter().filter(|line| line["level"] == "WARN" && line["id"] == "copy").count();
    assert_eq!(told, 1, "{:?}", worker.log());
    lab.couch.create(&target).await;
    eventually(SOON, "it ran", async || (lab.couch.all(&target).await.len() == 3).then_some(())).await;
    let doc = settles(&lab, "copy").await;
    assert_eq!(doc["retries"], Value::Null, "{doc}");
}

async fn a_rule_that_waits_gives_up(lab: Arc<Lab>) {
    lab.install().await;
    lab.receiver.answer("/", Answer::work(|request| async move { if request.doc_id() == "b" { 500 } else { 200 } }));
    // What each says of it, in a database of its own.
    let rules = [
        ("limited", json!({ "order": "database", "retry": { "limit": 2 } })),
        ("blocking", json!({ "block": true, "retry": { "give_up_after": "1s" } })),
        ("strict", json!({ "order": "database" })),
    ];
    let settings = [("WEBHOOK_FAST_RETRIES", "1"), ("WEBHOOK_BREAKER_THRESHOLD", "0")];
    let mut worker = worker(&lab, "change-listener", &settings).await;
    for (rule, fields) in &rules {
        let db = lab.create(rule).await;
        lab.rule(rule, &db, &format!("/{rule}"), fields.clone()).await;
        for doc in ["a", "b", "c"] {
            lab.couch.put(&db, doc, json!({})).await;
        }
        dirty_listener(&lab, &db).await;
    }
    let strict = listener_id(&lab.name("strict"));
    let known = async || doc(&lab, &strict).await["failing"]["strict"][0].as_object().cloned();
    let first = eventually(SOON, "it says for what the rule waits", known).await;
    assert_eq!(first["id"], "b");
    worker.kill();
    worker.start_again_unready();
    for (rule, _) in &rules[..2] {
        let path = format!("/{rule}");
        let gone_on = async || lab.receiver.delivered(&path).contains_key("c").then_some(());
        eventually(SOON, format!("{rule} goes on"), gone_on).await;
        let doc = settles(&lab, &listener_id(&lab.name(rule))).await;
        assert_eq!(doc.get("failing"), None, "{rule} waits no more: {doc}");
    }
    let again = async || (doc(&lab, &strict).await["failing"]["strict"][0]["retries"].as_u64() >= Some(2)).then_some(());
    eventually(SOON, "it is tried again", again).await;
    assert_eq!(doc(&lab, &strict).await["failing"]["strict"][0]["since"], first["since"], "the clock goes on through a kill");
    assert!(!lab.receiver.delivered("/strict").contains_key("c"), "nobody said how long");
}

async fn a_change_ends_no_rule_s_wait_and_an_edit_does(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("db").await;
    let id = listener_id(&db);
    lab.rule("waiting", &db, "/waiting", json!({ "on_failure": "hold" })).await;
    lab.rule("other", &db, "/other", json!({})).await;
    lab.receiver.answer("/waiting", Answer::status(500));
    let settings =
        [("WEBHOOK_FAST_RETRIES", "0"), ("WEBHOOK_BREAKER_THRESHOLD", "0"), ("BACKOFF_BASE", "10m"), ("BACKOFF_CAP", "10m")];
    let _worker = worker(&lab, "change-listener", &settings).await;
    let write = async |written: &str| {
        lab.couch.put(&db, written, json!({})).await;
        dirty_listener(&lab, &db).await;
        // With the last pause taken away, as an update-listener does: it would stop the original.
        change(&lab, &id, json!({ "dirty": true, "dirty_at": null, "updated_at": time(0) })).await;
        let other = async || lab.receiver.delivered("/other").contains_key(written).then_some(());
        eventually(SOON, format!("{written} is delivered"), other).await;
    };
    for written in ["a", "b", "c"] {
        write(written).await;
        let waits = async || (doc(&lab, &id).await["dirty_at"].is_string()).then_some(());
        eventually(SOON, format!("it waits after {written}"), waits).await;
    }
    assert_eq!(lab.receiver.count("/waiting"), 1);
    change(&lab, "waiting", json!({ "url": lab.receiver.url("/mended") })).await;
    write("d").await;
    let mended = async || {
        // The worker may have heard of the mark before it heard of the edit; the next change marks again.
        change(&lab, &id, json!({ "dirty": true, "dirty_at": null, "updated_at": time(0) })).await;
        (lab.receiver.delivered("/mended").len() == 4).then_some(())
    };
    eventually(SOON, "what waited is delivered", mended).await;
    let doc = settles(&lab, &id).await;
    assert!(doc.get("held").is_none() && doc.get("failing").is_none(), "{doc}");
}

async fn what_an_invalid_rule_may_want_is_not_cleaned_away(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("db").await;
    lab.couch.fill(&db, "d", 3).await;
    lab.rule("rule", &db, "/hook", json!({ "order": "nonsense" })).await;
    let _worker = worker(&lab, "change-listener", &[]).await;
    dirty_listener(&lab, &db).await;
    let waits = async || {
        let doc = doc(&lab, &listener_id(&db)).await;
        (doc["dirty"] == json!(false) && doc["dirty_at"].is_string() && doc["locked_at"].is_null()).then_some(())
    };
    eventually(SOON, "it waits", waits).await;
    change(&lab, "rule", json!({ "order": "database" })).await;
    eventually(SOON, "all are delivered", async || (lab.receiver.delivered("/hook").len() == 3).then_some(())).await;
    settles(&lab, &listener_id(&db)).await;
}

async fn what_is_missing_is_forgotten_after_a_while(lab: Arc<Lab>) {
    lab.install().await;
    let there = lab.create("there").await;
    let (gone, comes) = (lab.name("gone"), lab.name("comes"));
    lab.rule_on("rule", &lab.every_db(), "/hook", json!({})).await;
    lab.replicator("source-gone", &gone, &there, json!({})).await;
    lab.replicator("target-gone", &there, &gone, json!({})).await;
    dirty_listener(&lab, &gone).await;
    dirty_listener(&lab, &comes).await;
    let short = [("DB_ASSUME_DELETED_AFTER", "8s")];
    let _workers = [worker(&lab, "change-listener", &short).await, worker(&lab, "replicator", &short).await];
    for id in [&listener_id(&comes), "source-gone", &listener_id(&gone)] {
        let marked = async || {
            let doc = doc(&lab, id).await;
            // On a slow machine it is forgotten before it is looked at.
            let is_forgotten = doc.is_null() && id != listener_id(&comes);
            (is_forgotten || doc["possibly_deleted_at"].is_string() && doc["dirty"] == json!(false)).then_some(())
        };
        eventually(SOON, format!("{id} is marked"), marked).await;
    }
    lab.couch.create(&comes).await;
    lab.couch.fill(&comes, "d", 1).await;
    dirty_listener(&lab, &comes).await;
    for id in ["source-gone", &listener_id(&gone)] {
        eventually(SOON, format!("{id} is forgotten"), async || doc(&lab, id).await.is_null().then_some(())).await;
    }
    let doc = settles(&lab, &listener_id(&comes)).await;
    assert_eq!(doc["possibly_deleted_at"], Value::Null, "{doc}");
    assert!(!self::doc(&lab, "target-gone").await.is_null(), "a target may be made yet");
}

async fn an_orderly_stop_leaves_it_dirty_and_unlocked(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("db").await;
    lab.rule("rule", &db, "/hook", json!({})).await;
    lab.couch.fill(&db, "d", 1).await;
    lab.receiver.answer("/hook", Answer::hang());
    let mut worker = worker(&lab, "change-listener", &[("WEBHOOK_TIMEOUT", "1m"), ("SHUTDOWN_DEADLINE", "2s")]).await;
    dirty_listener(&lab, &db).await;
    eventually(SOON, "it is asked", async || (lab.receiver.count("/hook") == 1).then_some(())).await;
    worker.stop().await;
    let left = doc(&lab, &listener_id(&db)).await;
    assert_eq!((&left["dirty"], &left["locked_at"], left.get("locked_by")), (&json!(true), &Value::Null, None), "{left}");
    assert!(left["last_seq"].is_null(), "{left}");
}

async fn conflicted_revisions_are_removed(lab: Arc<Lab>) {
    lab.install().await;
    let (source, target) = (lab.create("source").await, lab.create("target").await);
    lab.couch.fill(&source, "d", 3).await;
    let sides = json!({ "source": lab.couch.url_for_user(&source), "target": lab.couch.url_for_user(&target) });
    let with = |id: &str, rev: &str, more: Value| {
        let mut doc = json!({ "_id": id, "_rev": rev, "type": "replicator" });
        for fields in [&sides, &more] {
            doc.as_object_mut().expect("an object").extend(fields.as_object().cloned().expect("fields"));
        }
        doc
    };
    let (a, b) = ("1-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "1-bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb");
    let docs = [
        // What the loser knows to be owed is not lost.
        with("clean-wins", a, json!({ "dirty": true })),
        with("clean-wins", b, json!({ "dirty": false })),
        with("dirty-wins", a, json!({ "dirty": false })),
        with("dirty-wins", b, json!({ "dirty": true })),
        with("stuck", a, json!({ "dirty": false })),
        with("stuck", b, json!({ "dirty": true, "locked_at": time(-9_000_000_000) })),
    ];
    let path = format!("{}/_bulk_docs", encode(&lab.spiegel_db()));
    let body = json!({ "docs": docs, "new_edits": false });
    assert!(lab.couch.ask(Method::POST, &path, Some(body)).await.0.is_success());
    let _workers = [worker(&lab, "replicator", &[]).await, worker(&lab, "replicator", &[]).await];
    for id in ["clean-wins", "dirty-wins", "stuck"] {
        let mended = async || {
            let path = format!("{}/{id}?conflicts=true", encode(&lab.spiegel_db()));
            let (_, doc) = lab.couch.ask(Method::GET, &path, None).await;
            let ran = doc["_rev"].as_str().is_some_and(|rev| !rev.starts_with("1-"));
            (doc["_conflicts"].is_null() && doc["dirty"] == json!(false) && doc["locked_at"].is_null() && ran).then_some(())
        };
        eventually(SOON, format!("{id} is mended and ran"), mended).await;
    }
    assert_eq!(lab.couch.all(&target).await.len(), 3);
}

/// As two halves of a cluster leave it that each took the document.
async fn locks_behind_a_winner_that_was_removed_die_as_well(lab: Arc<Lab>) {
    lab.install().await;
    let (source, target) = (lab.create("source").await, lab.create("target").await);
    lab.couch.fill(&source, "d", 3).await;
    let _worker = worker(&lab, "replicator", &[]).await;
    let revision = |generation: usize, digit: &str| {
        let ids: Vec<String> = (0..generation).map(|number| format!("{number:x}{}", digit.repeat(31))).collect();
        let locked = json!({ "locked_at": time(0), "locked_by": { "owner": digit, "locked_at": time(0) } });
        let mut doc = json!({
            "_id": "copy", "_rev": format!("{generation}-{}", ids[0]), "_revisions": { "start": generation, "ids": ids },
            "type": "replicator", "source": lab.couch.url_for_user(&source), "target": lab.couch.url_for_user(&target),
        });
        doc.as_object_mut().expect("an object").extend(locked.as_object().cloned().expect("fields"));
        doc
    };
    let docs = [revision(9, "a"), revision(4, "b"), revision(4, "c")];
    let winner = docs[0]["_rev"].as_str().unwrap_or_default().to_string();
    let path = format!("{}/_bulk_docs", encode(&lab.spiegel_db()));
    let body = json!({ "docs": docs, "new_edits": false });
    assert!(lab.couch.ask(Method::POST, &path, Some(body)).await.0.is_success());
    // The rows come in order: once this one ran, the others were seen.
    lab.replicator("later", &source, &target, json!({})).await;
    settles(&lab, "later").await;
    let path = format!("{}/copy?rev={winner}", encode(&lab.spiegel_db()));
    assert!(lab.couch.ask(Method::DELETE, &path, None).await.0.is_success());
    let mended = async || {
        let path = format!("{}/copy?conflicts=true", encode(&lab.spiegel_db()));
        let (_, doc) = lab.couch.ask(Method::GET, &path, None).await;
        (doc["_conflicts"].is_null() && doc["dirty"] == json!(false) && doc["locked_at"].is_null()).then_some(())
    };
    eventually(SOON, "it is mended and ran", mended).await;
}

async fn run_removes_what_a_cluster_that_was_cut_in_two_left(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("db").await;
    lab.rule("rule", &db, "/hook", json!({})).await;
    lab.couch.fill(&db, "d", 3).await;
    let spiegel = lab.spiegel_with(&[("ROLES_STALE_AFTER", "3s"), ("FEED_SWEEP_INTERVAL", "1s")]).await;
    eventually(SOON, "delivered", async || (lab.receiver.delivered("/hook").len() == 3).then_some(())).await;
    let id = listener_id(&db);
    settles(&lab, &id).await;
    eventually(SOON, "its watermark", async || lab.couch.get(&lab.spiegel_db(), "global_lastSeq").await).await;
    for id in [id.as_str(), "global_lastSeq"] {
        let mut other = doc(&lab, id).await;
        other["_rev"] = json!("1-bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb");
        let path = format!("{}/_bulk_docs", encode(&lab.spiegel_db()));
        assert!(lab.couch.ask(Method::POST, &path, Some(json!({ "docs": [other], "new_edits": false }))).await.0.is_success());
    }
    spiegel.said(&["working by locks"]).await;
    for id in [id.as_str(), "global_lastSeq"] {
        let path = format!("{}/{}?conflicts=true", encode(&lab.spiegel_db()), encode(id));
        let removed = async || lab.couch.ask(Method::GET, &path, None).await.1["_conflicts"].is_null().then_some(());
        eventually(SOON, format!("{id} has one revision"), removed).await;
    }
    settles(&lab, &id).await;
    lab.couch.put(&db, "last", json!({})).await;
    eventually(SOON, "it goes on", async || lab.receiver.delivered("/hook").contains_key("last").then_some(())).await;
}

async fn a_202_is_no_lock(lab: Arc<Lab>) {
    lab.install().await;
    let (source, target) = (lab.create("source").await, lab.create("target").await);
    lab.couch.fill(&source, "d", 3).await;
    let _worker = worker(&lab, "replicator", &[]).await;
    let faults = lab.faults.clone().expect("the embedded server");
    faults.answer(None, &format!("/{}/_bulk_docs", lab.spiegel_db()), 202, 1);
    lab.replicator("copy", &source, &target, json!({})).await;
    // It is left, unlocked, and taken in a while.
    let unlocked = async || {
        let doc = doc(&lab, "copy").await;
        (doc["_rev"].as_str() > Some("1-z") && doc["locked_at"].is_null()).then_some(doc)
    };
    let left = eventually(SOON, "it is left", unlocked).await;
    assert_ne!(left["dirty"], json!(false), "nobody has worked yet: {left}");
    eventually(SOON, "it ran", async || (lab.couch.all(&target).await.len() == 3).then_some(())).await;
    settles(&lab, "copy").await;
}

const DBS: usize = 8;

async fn nothing_is_lost_by_kills_of_many_processes(lab: Arc<Lab>) {
    let seed = environment("SPIEGEL_TEST_SEED").map_or_else(|| fastrand::u64(..), |text| text.parse().expect("a number"));
    let seconds = environment("SPIEGEL_TEST_KILLS_SECONDS").map_or(6, |text| text.parse().expect("a number"));
    println!("repeat with SPIEGEL_TEST_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    lab.install().await;
    let target = lab.create("target").await;
    let mut dbs = Vec::new();
    for number in 0..DBS {
        let db = lab.create(&format!("source{number}")).await;
        lab.replicator(&format!("replicator{number}"), &db, &target, json!({ "dirty": false })).await;
        dbs.push(db);
    }
    lab.rule_on("rule", &format!("^{}source", regex::escape(&lab.prefix)), "/hook", json!({})).await;
    let mut processes = Vec::new();
    for role in ["update-listener", "change-listener", "replicator"].into_iter().flat_map(|role| [role; 2]) {
        let settings = [("DB_BATCH_SIZE", "10"), ("ROLES_BATCH_TIMEOUT", "100ms")];
        processes.push(worker(&lab, role, &settings).await);
    }

    let done = Arc::new(AtomicBool::new(false));
    let writer = |mut random: fastrand::Rng, name: &'static str| {
        let (lab, dbs, done) = (lab.clone(), dbs.clone(), done.clone());
        tokio::spawn(async move {
            let mut number = 0;
            while !done.load(Ordering::Relaxed) {
                let index = random.usize(..dbs.len());
                let docs = (0..random.usize(1..8)).map(|_| {
                    number += 1;
                    json!({ "_id": format!("{name}{number}") })
                });
                lab.couch.bulk(&dbs[index], docs.collect()).await;
                tokio::time::sleep(Duration::from_millis(random.u64(5..60))).await;
            }
            number
        })
    };
    let writers = [writer(random.fork(), "a"), writer(random.fork(), "b")];
    let kills = seconds;
    for _ in 0..kills {
        tokio::time::sleep(Duration::from_millis(random.u64(600..1200))).await;
        let victim = random.usize(..processes.len());
        processes[victim].kill();
        processes[victim].start_again_unready();
    }
    done.store(true, Ordering::Relaxed);
    let mut written = 0;
    for writer in writers {
        written += writer.await.expect("the writer");
    }

    let patience = Duration::from_secs(60);
    let mut wanted = BTreeSet::new();
    for db in &dbs {
        wanted.extend(lab.couch.all(db).await.into_keys());
    }
    assert_eq!(wanted.len(), written);
    let what = format!("{written} deliveries after {kills} kills (seed {seed})");
    let delivered = async || {
        let delivered = lab.receiver.delivered("/hook");
        wanted.iter().all(|id| delivered.contains_key(id)).then_some(delivered)
    };
    let delivered = eventually(patience, what, delivered).await;
    let what = format!("{written} documents in the target (seed {seed})");
    eventually(patience, what, async || (lab.couch.all(&target).await.len() == written).then_some(())).await;
    for (index, db) in dbs.iter().enumerate() {
        settles(&lab, &format!("replicator{index}")).await;
        settles(&lab, &listener_id(db)).await;
    }
    let repeats: usize = delivered.values().map(|count| count - 1).sum();
    println!("{written} documents, {kills} kills, {repeats} deliveries repeated");
}

async fn run_works_by_locks_beside_others(lab: Arc<Lab>) {
    lab.install().await;
    let target = lab.create("target").await;
    let mut dbs = Vec::new();
    for number in 0..4 {
        let db = lab.create(&format!("source{number}")).await;
        lab.replicator(&format!("replicator{number}"), &db, &target, json!({ "dirty": false })).await;
        dbs.push(db);
    }
    lab.rule_on("rule", &format!("^{}source", regex::escape(&lab.prefix)), "/hook", json!({})).await;
    let spiegel = lab.spiegel_with(&[("ROLES_STALE_AFTER", "3s")]).await;
    // A position that nobody's change tells of: only the document does.
    lab.couch.fill(&dbs[0], "before", 3).await;
    eventually(SOON, "delivered", async || (lab.receiver.delivered("/hook").len() == 3).then_some(())).await;
    let others = [worker(&lab, "change-listener", &[]).await, worker(&lab, "replicator", &[]).await];
    dirty_listener(&lab, &dbs[1]).await;
    spiegel.said(&["working by locks"]).await;
    settles(&lab, &listener_id(&dbs[1])).await;

    // From here on each change is told of twice: by the feed, and by an update-listener.
    for round in 0..25 {
        for (index, db) in dbs.iter().enumerate() {
            lab.couch.put(db, &format!("doc{round}-{index}"), json!({})).await;
            dirty_listener(&lab, db).await;
            dirty(&lab, &format!("replicator{index}")).await;
        }
    }
    eventually(SOON, "all are delivered", async || (lab.receiver.delivered("/hook").len() == 103).then_some(())).await;
    eventually(SOON, "all are replicated", async || (lab.couch.all(&target).await.len() == 103).then_some(())).await;
    for (index, db) in dbs.iter().enumerate() {
        settles(&lab, &listener_id(db)).await;
        settles(&lab, &format!("replicator{index}")).await;
    }
    let twice: Vec<_> = lab.receiver.delivered("/hook").into_iter().filter(|(_, count)| *count > 1).collect();
    assert!(twice.is_empty(), "{twice:?}");

    // Alone, it takes what the feed tells of, and what is dirtied by hand.
    drop(others);
    lab.couch.put(&dbs[2], "alone", json!({})).await;
    let alone = async || lab.receiver.delivered("/hook").contains_key("alone").then_some(());
    eventually(SOON, "one more is delivered", alone).await;
    eventually(SOON, "and replicated", async || (lab.couch.all(&target).await.len() == 104).then_some(())).await;
    change(&lab, &listener_id(&dbs[0]), json!({ "last_seq": 0, "dirty": true })).await;
    let again = async || (lab.receiver.delivered("/hook").get("before0") == Some(&2)).then_some(());
    eventually(SOON, "from the beginning again", again).await;
}

async fn run_works_without_locks_again_once_nobody_else_does(lab: Arc<Lab>) {
    lab.install().await;
    let (db, target) = (lab.create("db").await, lab.create("target").await);
    let id = listener_id(&db);
    lab.rule("rule", &db, "/hook", json!({})).await;
    lab.replicator("copy", &db, &target, json!({ "dirty": false })).await;
    let spiegel = lab.spiegel_with(&[("ROLES_STALE_AFTER", "3s"), ("ROLES_ALONE_AFTER", "5s")]).await;
    let said = |what: &str| spiegel.log().iter().filter(|line| line["message"].to_string().contains(what)).count();
    for round in [1, 2] {
        // Somebody marks it, and is not heard of again.
        dirty_listener(&lab, &db).await;
        eventually(SOON, "others are seen", async || (said("working by locks") == round).then_some(())).await;
        eventually(SOON, "and missed", async || (said("working without locks") == round).then_some(())).await;
        let before = (settles(&lab, &id).await, settles(&lab, "copy").await);
        lab.couch.put(&db, &format!("doc{round}"), json!({})).await;
        eventually(SOON, "it is delivered", async || (lab.receiver.delivered("/hook").len() == round).then_some(())).await;
        eventually(SOON, "and replicated", async || (lab.couch.all(&target).await.len() == round).then_some(())).await;
        let moved = async || {
            let doc = doc(&lab, &id).await;
            (doc["last_seq"] != before.0["last_seq"]).then_some(doc)
        };
        let after = eventually(SOON, "its position is saved", moved).await;
        let generation = |doc: &Value| doc["_rev"].as_str().and_then(|rev| rev.split('-').next()?.parse::<u32>().ok());
        assert_eq!(generation(&after), generation(&before.0).map(|before| before + 1), "no lock: {after}");
        assert_eq!(doc(&lab, "copy").await["_rev"], before.1["_rev"], "nor here");
    }
}

async fn from_roles_to_run_and_back(lab: Arc<Lab>) {
    lab.install().await;
    let (db, missing) = (lab.create("db").await, lab.name("missing"));
    lab.rule("rule", &db, "/hook", json!({})).await;
    lab.replicator("copy", &db, &missing, json!({})).await;
    lab.couch.fill(&db, "d", 3).await;
    lab.receiver.answer("/hook", Answer::hang());
    let patient = [("WEBHOOK_TIMEOUT", "1m"), ("SHUTDOWN_DEADLINE", "2s")];
    let mut workers = [worker(&lab, "change-listener", &patient).await, worker(&lab, "replicator", &patient).await];
    dirty_listener(&lab, &db).await;
    eventually(SOON, "they are asked", async || (lab.receiver.count("/hook") == 3).then_some(())).await;
    for worker in &mut workers {
        worker.stop().await;
    }
    // Half of it, and it is stopped as well.
    lab.receiver.answer("/hook", Answer::ok());
    let mut spiegel = lab.spiegel_with(&patient).await;
    eventually(SOON, "all are delivered", async || (lab.receiver.delivered("/hook").len() == 3).then_some(())).await;
    lab.receiver.answer("/hook", Answer::hang());
    lab.couch.put(&db, "last", json!({})).await;
    eventually(SOON, "it is asked", async || (lab.receiver.count("/hook") >= 7).then_some(())).await;
    spiegel.stop().await;
    let left = doc(&lab, &listener_id(&db)).await;
    assert_eq!((&left["dirty"], left["locked_at"].is_null()), (&json!(true), true), "{left}");
    let left = doc(&lab, "copy").await;
    // Between two tries, or in the middle of one.
    assert!(left["locked_at"].is_null() && (left["dirty"] == json!(true) || left["dirty_at"].is_string()), "{left}");

    lab.receiver.answer("/hook", Answer::ok());
    lab.couch.create(&missing).await;
    for role in ["change-listener", "replicator"] {
        lab.keep(worker(&lab, role, &[]).await);
    }
    eventually(SOON, "the last one", async || lab.receiver.delivered("/hook").contains_key("last").then_some(())).await;
    eventually(SOON, "all are replicated", async || (lab.couch.all(&missing).await.len() == 4).then_some(())).await;
    settles(&lab, "copy").await;
    settles(&lab, &listener_id(&db)).await;
}

async fn run_leaves_its_own_work_alone(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("db").await;
    lab.rule("rule", &db, "/hook", json!({})).await;
    lab.receiver.answer("/hook", Answer::ok().after(Duration::from_secs(4)));
    let spiegel = lab.spiegel_with(&[("FEED_SPILL_AFTER", "500ms"), ("WEBHOOK_TIMEOUT", "10s")]).await;
    lab.couch.fill(&db, "d", 1).await;
    let dirtied = async || (doc(&lab, &listener_id(&db)).await["dirty"] == json!(true)).then_some(());
    eventually(SOON, "it is written down", dirtied).await;
    settles(&lab, &listener_id(&db)).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(!spiegel.lines().iter().any(|line| line.contains("working by locks")), "{:?}", spiegel.lines());
    assert_eq!(lab.receiver.count("/hook"), 1);
}

async fn check_warns_of_our_fields_in_a_mixed_fleet(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("db").await;
    lab.rule("plain", &db, "/hook", json!({ "block": true })).await;
    lab.rule("ours", &db, "/hook", json!({ "selector": { "n": 1 }, "since": "now" })).await;
    let told = async || lab.run(&["check"]).await.text.lines().filter(|line| line.contains("Node Spiegel")).count();
    assert_eq!(told().await, 0, "nobody else is there");
    let theirs = json!({ "type": "change_listener", "db_name": db, "dirty": false, "last_seq": "0", "updated_at": time(-5000) });
    lab.spiegel_doc(&listener_id(&db), theirs).await;
    let text = lab.run(&["check"]).await.text;
    assert!(text.contains("mixed fleet") && text.contains("pass over selector, since"), "{text}");
    assert!(!text.contains("rule \"plain\": Node"), "{text}");
}
