//! What Node Spiegel 1.2 gets wrong, one test a bug, by the number in our list of them: each shows the right thing, end to end.

use crate::support::{Answer, Lab, SOON, eventually, stays, tests_on};
use base64::Engine;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

tests_on! {
    every: [
        bug_01_an_error_under_block_backs_off,
        bug_02_no_limit_of_retries_drops_changes,
        bug_03_a_failure_repeats_nothing_that_was_delivered,
        bug_04_a_missing_source_backs_off,
        bug_05_a_password_goes_into_any_url,
        bug_06_webhooks_time_out_and_follow_no_redirect,
        bug_07_if_tests_missing_attributes,
        bug_08_a_dead_process_holds_nothing_for_long,
        bug_09_params_that_are_no_strings_are_sent,
        bug_10_deleted_databases_of_the_past_cost_nothing,
        bug_11_sigint_ends_it,
        bug_12_names_are_encoded_once,
        bug_13_the_debounce_goes_by_the_final_url,
        bug_14_what_cannot_work_is_said_once,
    ],
}

async fn delivered(lab: &Lab, path: &str, count: usize) {
    let what = format!("{count} documents delivered at {path}");
    eventually(SOON * 2, what, async || (lab.receiver.delivered(path).len() >= count).then_some(())).await;
}

async fn tried(lab: &Lab, path: &str, count: usize) {
    eventually(SOON * 2, format!("{count} tries at {path}"), async || (lab.receiver.count(path) >= count).then_some(())).await;
}

/// The rule's path has the document's id in it, so that the receiver can fail for some of them.
async fn rule_by_document(lab: &Lab, id: &str, db: &str, path: &str) {
    lab.rule(id, db, &format!("{path}/${{change.id}}"), json!({ "params": { "id": "$change.id" } })).await;
}

/// The original's default is `block: false`, whatever its documentation says: a rule that does not say blocks nothing.
async fn bug_01_an_error_under_block_backs_off(lab: Arc<Lab>) {
    lab.install().await;
    let (db, other) = (lab.create("posts").await, lab.create("others").await);
    lab.rule("blocks", &db, "/blocks", json!({ "block": true })).await;
    rule_by_document(&lab, "unset", &other, "/unset").await;
    lab.receiver.answer("/blocks", Answer::status(503));
    lab.receiver.answer("/unset/bad", Answer::status(503));
    let _spiegel = lab.spiegel_with(&[("WEBHOOK_RETRY_BASE", "1s"), ("WEBHOOK_RETRY_CAP", "1s")]).await;
    for db in [&db, &other] {
        lab.couch.put(db, "bad", json!({})).await;
        lab.couch.fill(db, "good", 5).await;
    }
    for good in 0..5 {
        delivered(&lab, &format!("/unset/good{good}"), 1).await;
    }
    tried(&lab, "/blocks", 1).await;
    stays(Duration::from_millis(1500), "it waits between its tries", async || lab.receiver.count("/blocks") <= 12).await;
    // Which one is first is the feed's choice, and a cluster's changes its mind.
    let tries = lab.receiver.requests_at("/blocks");
    let one_by_one = tries.windows(2).all(|pair| pair[0].answered.is_some_and(|answered| answered <= pair[1].arrived));
    assert!(one_by_one, "the others wait: {tries:?}");
    lab.receiver.answer("/blocks", Answer::ok());
    delivered(&lab, "/blocks", 6).await;
}

async fn bug_02_no_limit_of_retries_drops_changes(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    lab.rule("rule", &db, "/hook", json!({})).await;
    lab.receiver.answer("/hook", Answer::status(503));
    let mut spiegel = lab.spiegel_with(&[("WEBHOOK_FAST_RETRIES", "1")]).await;
    lab.couch.fill(&db, "d", 30).await;
    tried(&lab, "/hook", 60).await;
    spiegel.restart().await;
    lab.receiver.answer("/hook", Answer::ok());
    delivered(&lab, "/hook", 30).await;
}

async fn bug_03_a_failure_repeats_nothing_that_was_delivered(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    rule_by_document(&lab, "rule", &db, "/hook").await;
    lab.receiver.answer("/hook/bad", Answer::status(503));
    let _spiegel = lab.spiegel().await;
    lab.couch.put(&db, "bad", json!({})).await;
    lab.couch.fill(&db, "good", 20).await;
    tried(&lab, "/hook/bad", 4).await;
    for good in 0..20 {
        delivered(&lab, &format!("/hook/good{good}"), 1).await;
        assert_eq!(lab.receiver.count(&format!("/hook/good{good}")), 1, "good{good}");
    }
}

async fn bug_04_a_missing_source_backs_off(lab: Arc<Lab>) {
    lab.install().await;
    let (missing, target) = (lab.name("missing"), lab.create("target").await);
    lab.replicator("copy", &missing, &target, json!({})).await;
    let spiegel = lab.spiegel_with(&[("BACKOFF_BASE", "2s"), ("BACKOFF_CAP", "2s")]).await;
    let document = async || lab.couch.get(&lab.spiegel_db(), "copy").await.filter(|doc| doc["dirty_at"].is_string());
    let doc = eventually(SOON, "its document says when it is tried again", document).await;
    assert_eq!(doc["dirty"], json!(false), "a loop in the original otherwise: {doc}");
    let before = spiegel.metric("replications").await;
    let few = async || spiegel.metric("replications").await - before <= 4.0;
    stays(Duration::from_secs(2), "it waits between its tries", few).await;
    lab.couch.create(&missing).await;
    lab.couch.put(&missing, "x", json!({})).await;
    eventually(SOON * 2, "a source that comes back is replicated", async || lab.couch.get(&target, "x").await).await;
}

async fn bug_05_a_password_goes_into_any_url(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    let password = "p@ss/w:rd %&?#é";
    lab.add_password("127.0.0.1", "api", password);
    let url = lab.receiver.url_for_user("api", "/hook?own=1&two=a%20b");
    lab.rule("rule", &db, "/hook", json!({ "method": "GET", "url": url, "params": { "id": "$change.id" } })).await;
    let _spiegel = lab.spiegel().await;
    lab.couch.put(&db, "x", json!({})).await;
    delivered(&lab, "/hook", 1).await;
    let request = lab.receiver.requests_at("/hook").remove(0);
    let basic = base64::engine::general_purpose::STANDARD.encode(format!("api:{password}"));
    assert_eq!(request.header("authorization"), format!("Basic {basic}"));
    let query: Vec<(&str, &str)> = request.query.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(query, [("id", "x"), ("own", "1"), ("two", "a b")]);
}

async fn bug_06_webhooks_time_out_and_follow_no_redirect(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    lab.rule("hangs", &db, "/hangs", json!({})).await;
    lab.rule("moved", &db, "/moved", json!({})).await;
    lab.receiver.answer("/hangs", Answer::hang());
    let elsewhere = vec![("location", lab.receiver.url("/elsewhere"))];
    lab.receiver.answer("/moved", Answer { headers: elsewhere, ..Answer::status(307) });
    let _spiegel = lab.spiegel_with(&[("WEBHOOK_CONNECT_TIMEOUT", "300ms"), ("WEBHOOK_TIMEOUT", "300ms")]).await;
    lab.couch.put(&db, "x", json!({})).await;
    tried(&lab, "/hangs", 2).await;
    tried(&lab, "/moved", 1).await;
    lab.receiver.answer("/hangs", Answer::ok());
    delivered(&lab, "/hangs", 1).await;
    // An answer that says no is not asked for again at once, and is not forgotten.
    let parked = async || lab.run(&["deliveries", "list", "--rule", "moved"]).await.text.contains("307").then_some(());
    eventually(SOON, "the moved one is parked", parked).await;
    assert_eq!(lab.receiver.count("/elsewhere"), 0);
}

async fn bug_07_if_tests_missing_attributes(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    lab.rule("word", &db, "/word", json!({ "if": { "kind": "undefined" } })).await;
    lab.rule("any", &db, "/any", json!({ "if": { "kind": "." } })).await;
    lab.rule("path", &db, "/path", json!({ "if": { "author.name": "^a" } })).await;
    lab.rule("all", &db, "/all", json!({})).await;
    let _spiegel = lab.spiegel().await;
    let docs = vec![
        json!({ "_id": "missing" }),
        json!({ "_id": "word", "kind": "undefined" }),
        json!({ "_id": "post", "kind": "post", "author": { "name": "anna" } }),
        json!({ "_id": "other", "author": { "name": "bob" } }),
    ];
    lab.couch.bulk(&db, docs).await;
    for (path, expected) in [("/all", 4), ("/any", 2), ("/word", 1), ("/path", 1)] {
        delivered(&lab, path, expected).await;
    }
    let ids = |path: &str| lab.receiver.delivered(path).into_keys().collect::<Vec<_>>();
    assert_eq!(
        (ids("/any"), ids("/word"), ids("/path")),
        (vec!["post".into(), "word".into()], vec!["word".into()], vec!["post".into()])
    );
}

/// Its locks name it, and their revisions stand still: a minute is the most that they hold.
async fn bug_08_a_dead_process_holds_nothing_for_long(lab: Arc<Lab>) {
    lab.install().await;
    let (source, target) = (lab.create("source").await, lab.create("target").await);
    lab.couch.fill(&source, "d", 3).await;
    lab.rule("rule", &source, "/hook", json!({})).await;
    let at = spiegel::job::timestamp(std::time::SystemTime::now());
    let lock = json!({ "dirty": true, "locked_at": at, "locked_by": { "owner": "dead", "locked_at": at } });
    lab.replicator("copy", &source, &target, lock.clone()).await;
    let mut listener = json!({ "type": "change_listener", "db_name": source });
    listener.as_object_mut().unwrap().extend(lock.as_object().cloned().unwrap());
    lab.spiegel_doc(&format!("spiegel_cl_{source}"), listener).await;
    let _spiegel = lab.spiegel().await;
    let within = Duration::from_secs(100);
    eventually(within, "replicated", async || (lab.couch.all(&target).await.len() == 3).then_some(())).await;
    eventually(within, "delivered", async || (lab.receiver.delivered("/hook").len() == 3).then_some(())).await;
}

async fn bug_09_params_that_are_no_strings_are_sent(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    let params = json!({ "number": 7, "yes": true, "nothing": null, "list": [1], "object": { "a": 1 }, "id": "$change.id" });
    lab.rule("rule", &db, "/hook", json!({ "params": params })).await;
    let _spiegel = lab.spiegel().await;
    lab.couch.put(&db, "x", json!({})).await;
    delivered(&lab, "/hook", 1).await;
    let sent = lab.receiver.requests_at("/hook").remove(0).body;
    assert_eq!(sent, json!({ "number": 7, "yes": true, "nothing": null, "list": [1], "object": { "a": 1 }, "id": "x" }));
    stays(Duration::from_millis(500), "once", async || lab.receiver.count("/hook") == 1).await;
}

async fn bug_10_deleted_databases_of_the_past_cost_nothing(lab: Arc<Lab>) {
    lab.install().await;
    let gone: Vec<String> = (0..20).map(|number| lab.name(&format!("gone{number}"))).collect();
    for db in &gone {
        lab.couch.create(db).await;
        lab.couch.put(db, "x", json!({})).await;
    }
    for db in &gone {
        lab.couch.delete(db).await;
    }
    let db = lab.create("here").await;
    lab.rule_on("rule", &lab.every_db(), "/hook", json!({})).await;
    let spiegel = lab.spiegel().await;
    lab.couch.put(&db, "x", json!({})).await;
    delivered(&lab, "/hook", 1).await;
    // What other tests do on the same server costs requests as well; twenty loops would cost far more.
    let before = spiegel.metric("couchdb_requests").await;
    let few = async || spiegel.metric("couchdb_requests").await - before < 40.0;
    stays(Duration::from_secs(2), "nothing is asked again and again", few).await;
    let listeners = lab.couch.all(&lab.spiegel_db()).await.into_keys().filter(|id| id.starts_with("spiegel_cl_"));
    assert_eq!(listeners.collect::<Vec<_>>(), [format!("spiegel_cl_{db}")]);
    assert!(!spiegel.log().iter().any(|line| line.to_string().contains("gone")), "no line about them");
}

async fn bug_11_sigint_ends_it(lab: Arc<Lab>) {
    let mut spiegel = lab.spiegel().await;
    spiegel.signal("INT");
    let (status, _) = spiegel.wait_end(SOON).await;
    assert_eq!(status.code(), Some(0));
}

async fn bug_12_names_are_encoded_once(lab: Arc<Lab>) {
    lab.install().await;
    let (source, target) = (lab.create("a/b+c").await, lab.create("all/in+one").await);
    lab.rule("rule", &source, "/hook", json!({})).await;
    lab.replicator("copy", &source, &target, json!({})).await;
    let _spiegel = lab.spiegel().await;
    lab.couch.put(&source, "x", json!({})).await;
    delivered(&lab, "/hook", 1).await;
    assert_eq!(lab.receiver.requests_at("/hook")[0].body["db"], json!(source));
    eventually(SOON * 2, "replicated", async || lab.couch.get(&target, "x").await).await;
}

async fn bug_13_the_debounce_goes_by_the_final_url(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    lab.rule("rule", &db, "/of/${change.id}", json!({ "debounce": true, "params": {} })).await;
    lab.receiver.answer("/of", Answer::ok().after(Duration::from_millis(100)));
    let _spiegel = lab.spiegel().await;
    lab.couch.fill(&db, "d", 10).await;
    for number in 0..10 {
        tried(&lab, &format!("/of/d{number}"), 1).await;
    }
}

/// A missing target and a password that is refused: both are tried again, seldom, and a person reads of each once.
async fn bug_14_what_cannot_work_is_said_once(lab: Arc<Lab>) {
    lab.install().await;
    let (source, missing) = (lab.create("source").await, lab.name("missing"));
    let target = lab.create("target").await;
    lab.add_password(&lab.couch.host(), "it_nobody", "wrong");
    lab.replicator("no_target", &source, &missing, json!({})).await;
    let refused = lab.couch.url_for_user(&target).replace(&format!("{}@", lab.couch.user), "it_nobody@");
    lab.replicator("no_password", &source, &target, json!({ "target": refused })).await;
    let spiegel = lab.spiegel().await;
    lab.couch.put(&source, "x", json!({})).await;
    for id in ["no_target", "no_password"] {
        let retried = async || lab.couch.get(&lab.spiegel_db(), id).await.filter(|doc| doc["retries"].as_u64() >= Some(3));
        eventually(SOON * 2, format!("{id} is tried again"), retried).await;
    }
    for id in ["no_target", "no_password"] {
        let lines = spiegel.log().iter().filter(|line| line.to_string().contains(id)).count();
        assert!((1..=2).contains(&lines), "{id}: {lines} lines");
    }
    lab.couch.create(&missing).await;
    eventually(SOON * 2, "a target that comes is filled", async || lab.couch.get(&missing, "x").await).await;
}
