//! What fails is parked and comes through in the end, in order; nothing else waits for it.

use crate::support::{Answer, Lab, eventually, stays, tests_on};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

mod chaos;
mod processes;
mod waiting;

use chaos::every_change_arrives_in_order_through_failures_and_kills;
use processes::{a_try_that_the_end_cuts_off_is_made_at_once_by_the_next_process, two_processes_share_what_is_parked};
use waiting::{a_rule_that_waits_gives_up_one_by_one, a_rule_that_waits_goes_on_where_somebody_said_so};

tests_on! {
    every: [
        a_failed_delivery_is_parked_and_the_others_go_on,
        newer_changes_join_what_is_parked,
        what_is_parked_survives_a_kill,
        a_deleted_document_is_told_of_by_its_parked_delivery,
        a_deleted_rule_drops_what_it_owes,
        a_receiver_that_is_gone_disables_its_rule,
        past_the_bound_the_rule_is_held,
        a_database_in_order_waits_at_its_first_failure,
        given_up_is_listed,
        a_host_that_is_down_costs_few_documents,
        what_is_dead_takes_no_place,
        a_foreign_database_of_that_name_is_left_alone,
        a_rule_that_waits_goes_on_where_somebody_said_so,
        a_rule_that_waits_gives_up_one_by_one,
        two_processes_share_what_is_parked,
        a_try_that_the_end_cuts_off_is_made_at_once_by_the_next_process,
        every_change_arrives_in_order_through_failures_and_kills,
    ],
}

const SOON: Duration = Duration::from_secs(20);

/// Parked deliveries are tried again within a test's patience.
const QUICK: [(&str, &str); 3] =
    [("DELIVERIES_RETRY_DELAY", "300ms"), ("DELIVERIES_RETRY_CAP", "500ms"), ("WEBHOOK_FAST_RETRIES", "1")];

/// Fails those whose number is listed.
fn failing(status: u16, failing: &Arc<AtomicBool>, docs: &'static [&'static str]) -> Answer {
    let failing = failing.clone();
    Answer::work(move |request| {
        let fails = failing.load(Ordering::Relaxed) && docs.contains(&request.doc_id().as_str());
        async move { if fails { status } else { 200 } }
    })
}

impl Lab {
    fn deliveries_db(&self) -> String {
        format!("{}_deliveries", self.spiegel_db())
    }

    /// Everything but design documents.
    async fn deliveries(&self) -> Vec<Value> {
        let path = format!("{}/_all_docs?include_docs=true", self.deliveries_db());
        let (_, page) = self.couch.ask(reqwest::Method::GET, &path, None).await;
        let docs = page["rows"].as_array().cloned().unwrap_or_default().into_iter().map(|row| row["doc"].clone());
        docs.filter(|doc| !doc["_id"].as_str().unwrap_or_default().starts_with("_design/")).collect()
    }

    async fn one_delivery(&self, what: &str, test: impl Fn(&Value) -> bool) -> Value {
        eventually(SOON, what, async || self.deliveries().await.into_iter().find(|doc| test(doc))).await
    }

    async fn none_is_parked(&self) {
        eventually(SOON, "nothing is parked", async || self.deliveries().await.is_empty().then_some(())).await;
    }

    async fn delivered_all(&self, path: &str, docs: &[&str]) {
        let wanted: BTreeSet<&str> = docs.iter().copied().collect();
        eventually(SOON, &format!("{docs:?} are delivered"), async || {
            let delivered = self.receiver.delivered(path);
            wanted.iter().all(|doc| delivered.contains_key(*doc)).then_some(())
        })
        .await;
    }
}

/// A database, and a rule on it whose deliveries of these documents are answered with `status` until the flag is lowered.
async fn a_rule_that_fails(lab: &Lab, status: u16, docs: &'static [&'static str]) -> (String, Arc<AtomicBool>) {
    lab.install().await;
    let db = lab.create("source").await;
    let fails = Arc::new(AtomicBool::new(true));
    lab.receiver.answer("/hook", failing(status, &fails, docs));
    lab.rule("rule", &db, "/hook", json!({})).await;
    (db, fails)
}

async fn write(lab: &Lab, db: &str, ids: &[&str]) {
    lab.couch.bulk(db, ids.iter().map(|id| json!({ "_id": id, "body": "nobody else's business" })).collect()).await;
}

/// The ids and revisions of one document's requests at `path`, accepted or not.
fn requests_for(lab: &Lab, path: &str, doc: &str) -> Vec<(String, String, u16)> {
    let of_doc =
        lab.receiver.requests_at(path).into_iter().filter(|request| request.doc_id() == doc && request.answered.is_some());
    of_doc
        .map(|request| {
            let rev = request.body["change"]["_rev"].as_str().unwrap_or_default().to_string();
            (request.header("webhook-id").to_string(), rev, request.status)
        })
        .collect()
}

async fn a_failed_delivery_is_parked_and_the_others_go_on(lab: Arc<Lab>) {
    let (db, fails) = a_rule_that_fails(&lab, 500, &["bad"]).await;
    let _spiegel = lab.spiegel_with(&QUICK).await;
    write(&lab, &db, &["a", "bad", "c"]).await;
    lab.delivered_all("/hook", &["a", "c"]).await;
    let doc = lab.one_delivery("it is parked", |doc| doc["attempts"].as_u64() >= Some(4)).await;
    assert_eq!((&doc["state"], &doc["doc_id"], &doc["last_status"]), (&json!("parked"), &json!("bad"), &json!(500)));
    assert!(!doc.to_string().contains("nobody else's business"), "{doc}");
    let listener = format!("spiegel_cl_{db}");
    eventually(SOON, "the position goes on", async || {
        let doc = lab.couch.get(&lab.spiegel_db(), &listener).await?;
        (doc["last_seq"].is_string() || doc["last_seq"].is_u64()).then_some(())
    })
    .await;
    write(&lab, &db, &["d"]).await;
    lab.delivered_all("/hook", &["d"]).await;
    fails.store(false, Ordering::Relaxed);
    lab.delivered_all("/hook", &["bad"]).await;
    lab.none_is_parked().await;
    let requests = requests_for(&lab, "/hook", "bad");
    let ids: BTreeSet<&String> = requests.iter().map(|(id, _, _)| id).collect();
    assert_eq!(ids.len(), 1, "a repeat carries the same id: {requests:?}");
    assert_eq!(lab.receiver.delivered("/hook").values().copied().max(), Some(1), "nothing is delivered twice");
}

async fn newer_changes_join_what_is_parked(lab: Arc<Lab>) {
    let (db, fails) = a_rule_that_fails(&lab, 503, &["bad"]).await;
    // Longer than the test: only what a newer change brings forward is tried in it.
    let mut settings = QUICK.to_vec();
    settings[0].1 = "2s";
    settings[1].1 = "2s";
    let _spiegel = lab.spiegel_with(&settings).await;
    write(&lab, &db, &["bad"]).await;
    lab.one_delivery("it is parked", |_| true).await;
    let mut rev = String::new();
    for n in 0..3 {
        rev = lab.couch.put(&db, "bad", json!({ "n": n })).await;
        write(&lab, &db, &[&format!("after{n}")]).await;
        lab.delivered_all("/hook", &[&format!("after{n}")]).await;
    }
    lab.one_delivery("the newest is known", |doc| doc["rev"] == rev.as_str()).await;
    fails.store(false, Ordering::Relaxed);
    lab.delivered_all("/hook", &["bad"]).await;
    lab.none_is_parked().await;
    let accepted: Vec<_> = requests_for(&lab, "/hook", "bad").into_iter().filter(|(_, _, status)| *status == 200).collect();
    assert_eq!(accepted.iter().map(|(_, rev, _)| rev.as_str()).collect::<Vec<_>>(), [rev.as_str()], "the newest, once");
}

async fn what_is_parked_survives_a_kill(lab: Arc<Lab>) {
    let (db, fails) = a_rule_that_fails(&lab, 500, &["bad", "worse"]).await;
    let mut spiegel = lab.spiegel_with(&QUICK).await;
    write(&lab, &db, &["bad", "a", "worse"]).await;
    eventually(SOON, "both are parked", async || (lab.deliveries().await.len() == 2).then_some(())).await;
    spiegel.kill();
    let newer = lab.couch.put(&db, "bad", json!({ "n": 1 })).await;
    spiegel.start_again().await;
    write(&lab, &db, &["b"]).await;
    lab.delivered_all("/hook", &["a", "b"]).await;
    lab.one_delivery("it joins after the restart", |doc| doc["rev"] == newer.as_str()).await;
    fails.store(false, Ordering::Relaxed);
    lab.delivered_all("/hook", &["bad", "worse"]).await;
    lab.none_is_parked().await;
    assert_eq!(lab.receiver.delivered("/hook")["worse"], 1);
}

async fn a_deleted_document_is_told_of_by_its_parked_delivery(lab: Arc<Lab>) {
    let (db, fails) = a_rule_that_fails(&lab, 500, &["bad"]).await;
    let _spiegel = lab.spiegel_with(&QUICK).await;
    write(&lab, &db, &["bad"]).await;
    lab.one_delivery("it is parked", |_| true).await;
    lab.couch.remove(&db, "bad").await;
    lab.one_delivery("the deletion joins", |doc| doc["rev"].as_str().is_some_and(|rev| rev.starts_with("2-"))).await;
    fails.store(false, Ordering::Relaxed);
    lab.none_is_parked().await;
    let requests = lab.receiver.requests_at("/hook");
    let last = requests.last().expect("it was sent");
    assert_eq!((&last.body["change"]["_deleted"], last.status), (&json!(true), 200));
}

async fn a_deleted_rule_drops_what_it_owes(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("source").await;
    lab.receiver.answer("/hook", Answer::status(500));
    lab.rule("rule", &db, "/hook", json!({})).await;
    let mut settings = QUICK.to_vec();
    settings.push(("DB_ASSUME_DELETED_AFTER", "1s"));
    let spiegel = lab.spiegel_with(&settings).await;
    write(&lab, &db, &["a"]).await;
    lab.one_delivery("it is parked", |doc| doc["state"] == "parked").await;
    lab.couch.remove(&lab.spiegel_db(), "rule").await;
    let doc = lab.one_delivery("it is dropped and listed", |doc| doc["state"] == "dropped").await;
    assert_eq!(doc["reason"], "its rule was deleted");
    spiegel.said(&["were dropped"]).await;
}

async fn a_receiver_that_is_gone_disables_its_rule(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("source").await;
    lab.receiver.answer("/hook", Answer::status(410));
    lab.rule("rule", &db, "/hook", json!({})).await;
    lab.rule("other", &db, "/other", json!({})).await;
    let mut spiegel = lab.spiegel_with(&QUICK).await;
    write(&lab, &db, &["a", "b"]).await;
    lab.delivered_all("/other", &["a", "b"]).await;
    lab.one_delivery("the rule is disabled", |doc| doc["type"] == "disabled_rule").await;
    let asked = lab.receiver.count("/hook");
    write(&lab, &db, &["c"]).await;
    lab.delivered_all("/other", &["c"]).await;
    spiegel.kill();
    spiegel.start_again().await;
    write(&lab, &db, &["d"]).await;
    lab.delivered_all("/other", &["d"]).await;
    stays(Duration::from_secs(1), "nothing more is sent", async || lab.receiver.count("/hook") == asked).await;

    lab.receiver.answer("/hook", Answer::ok());
    let output = lab.run(&["rules", "enable", "rule"]).await;
    assert_eq!(output.code, 0, "{}", output.text);
    lab.delivered_all("/hook", &["a", "b", "c", "d"]).await;
    lab.none_is_parked().await;

    lab.receiver.answer("/hook", Answer::status(410));
    write(&lab, &db, &["e"]).await;
    lab.one_delivery("disabled again", |doc| doc["type"] == "disabled_rule").await;
    lab.receiver.answer("/hook", Answer::ok());
    lab.rule("rule", &db, "/hook", json!({ "note": "mended" })).await;
    lab.delivered_all("/hook", &["e"]).await;
    lab.none_is_parked().await;
}

async fn past_the_bound_the_rule_is_held(lab: Arc<Lab>) {
    let (db, fails) = a_rule_that_fails(&lab, 500, &["b1", "b2", "b3", "b4"]).await;
    let mut settings = QUICK.to_vec();
    settings.push(("DELIVERIES_MAX_PER_RULE_AND_DATABASE", "2"));
    settings.push(("WEBHOOK_BREAKER_THRESHOLD", "1000"));
    let spiegel = lab.spiegel_with(&settings).await;
    write(&lab, &db, &["b1", "b2", "b3", "b4", "z"]).await;
    eventually(SOON, "the rule is held", async || {
        let doc = lab.couch.get(&lab.spiegel_db(), &format!("spiegel_cl_{db}")).await?;
        doc["dirty_at"].is_string().then_some(())
    })
    .await;
    assert_eq!(lab.deliveries().await.len(), 2, "no more than the bound");
    spiegel.said(&["held back"]).await;
    fails.store(false, Ordering::Relaxed);
    lab.delivered_all("/hook", &["b1", "b2", "b3", "b4", "z"]).await;
    lab.none_is_parked().await;
}

async fn a_database_in_order_waits_at_its_first_failure(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("source").await;
    let failures = Arc::new(AtomicUsize::new(0));
    let counted = failures.clone();
    lab.receiver.answer(
        "/hook",
        Answer::work(move |request| {
            let fails = request.doc_id() == "b" && counted.fetch_add(1, Ordering::Relaxed) < 6;
            async move { if fails { 500 } else { 200 } }
        }),
    );
    lab.rule("rule", &db, "/hook", json!({ "order": "database" })).await;
    let _spiegel = lab.spiegel_with(&QUICK).await;
    for id in ["a", "b", "c", "d"] {
        write(&lab, &db, &[id]).await;
    }
    lab.delivered_all("/hook", &["a", "b", "c", "d"]).await;
    let requests = lab.receiver.requests_at("/hook");
    let accepted: Vec<String> = requests.iter().filter(|request| request.status == 200).map(|request| request.doc_id()).collect();
    // As the feed has them, which with several shards need not be the order of the writes.
    let page = lab.couch.ask(reqwest::Method::GET, &format!("{db}/_changes"), None).await.1;
    let rows: Vec<String> =
        page["results"].as_array().expect("rows").iter().map(|row| row["id"].as_str().expect("an id").to_string()).collect();
    if rows.len() == accepted.len() && lab.kind != crate::support::Kind::CouchDb {
        assert_eq!(accepted, rows);
    }
    let first_b = requests.iter().position(|request| request.doc_id() == "b").expect("it was sent");
    let until_b = requests.iter().position(|request| request.doc_id() == "b" && request.status == 200).expect("it arrived");
    assert!(requests[first_b..until_b].iter().all(|request| request.doc_id() == "b"), "nothing overtakes it");
    assert!(lab.deliveries().await.is_empty(), "nothing is parked for it");
}

async fn given_up_is_listed(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("source").await;
    lab.receiver.answer("/hook", Answer::status(500));
    lab.receiver.answer("/strict", Answer::status(422));
    lab.rule("limited", &db, "/hook", json!({ "retry": { "limit": 2, "delay": "50ms" } })).await;
    lab.rule("strict", &db, "/strict", json!({ "retry_on": [409] })).await;
    let _spiegel = lab.spiegel_with(&QUICK).await;
    write(&lab, &db, &["a"]).await;
    let dead = |rule: &'static str| move |doc: &Value| doc["rule"] == rule && doc["state"] == "dead";
    let limited = lab.one_delivery("it is given up", dead("limited")).await;
    assert_eq!(limited["reason"], "given up after 2 retries");
    let strict = lab.one_delivery("a 422 is not tried again", dead("strict")).await;
    assert_eq!((strict["last_status"].as_u64(), lab.receiver.count("/strict")), (Some(422), 1));
    // By hand it is tried again, with a new id where one is asked for.
    lab.receiver.answer("/strict", Answer::ok());
    let output = lab.run(&["deliveries", "retry", "--rule", "strict", "--new-id"]).await;
    assert_eq!(output.code, 0, "{}", output.text);
    lab.delivered_all("/strict", &["a"]).await;
    let ids: BTreeSet<String> = requests_for(&lab, "/strict", "a").into_iter().map(|(id, _, _)| id).collect();
    assert_eq!(ids.len(), 2, "{ids:?}");
}

async fn a_host_that_is_down_costs_few_documents(lab: Arc<Lab>) {
    lab.install().await;
    let mut dbs = Vec::new();
    for n in 0..5 {
        dbs.push(lab.create(&format!("source{n}")).await);
    }
    lab.receiver.answer("/", Answer::status(503));
    lab.rule_on("rule", &lab.every_db(), "/hook", json!({})).await;
    let mut settings = QUICK.to_vec();
    settings.extend([("WEBHOOK_BREAKER_THRESHOLD", "5"), ("WEBHOOK_BREAKER_CAP", "1s"), ("WEBHOOK_BREAKER_BASE", "200ms")]);
    settings.push(("WEBHOOK_CONCURRENCY_PER_HOST", "4"));
    let spiegel = lab.spiegel_with(&settings).await;
    for db in &dbs {
        let ids: Vec<String> = (0..40).map(|n| format!("{db}:{n}")).collect();
        lab.couch.bulk(db, ids.iter().map(|id| json!({ "_id": id })).collect()).await;
    }
    spiegel.said(&["host is down"]).await;
    let host = lab.receiver.url("").trim_start_matches("http://").to_string();
    let shown = eventually(SOON, "the status shows the host", async || {
        let status: Value = serde_json::from_str(&spiegel.page("/status").await?.1).ok()?;
        let hosts = status["webhooks"]["breakers"]["hosts"].as_array()?.clone();
        hosts.into_iter().find(|shown| shown["host"] == host.as_str() && shown["next_probe"].is_string())
    });
    let shown = shown.await;
    assert_eq!(shown["state"], "open", "{shown}");
    assert!(shown["since"].is_string() && shown["reason"].as_str().is_some_and(|reason| reason.contains("503")), "{shown}");
    tokio::time::sleep(Duration::from_secs(2)).await;
    let asked = lab.receiver.count("/hook");
    tokio::time::sleep(Duration::from_secs(3)).await;
    let probes = lab.receiver.count("/hook") - asked;
    assert!(probes <= 12, "a probe now and then, and not {probes} requests in three seconds");
    let parked = lab.deliveries().await.len();
    assert!(parked <= 20, "{parked} of 200 are parked");
    lab.receiver.answer("/", Answer::ok());
    eventually(SOON * 2, "everything is delivered", async || (lab.receiver.delivered("/hook").len() == 200).then_some(())).await;
    lab.none_is_parked().await;
}

async fn what_is_dead_takes_no_place(lab: Arc<Lab>) {
    let (db, fails) = a_rule_that_fails(&lab, 500, &["b1", "b2"]).await;
    lab.receiver.answer("/strict", Answer::status(422));
    lab.rule("strict", &db, "/strict", json!({ "retry_on": [409] })).await;
    let mut settings = QUICK.to_vec();
    // The first is how often the dead are looked through.
    settings.extend([("DB_ASSUME_DELETED_AFTER", "1s"), ("DELIVERIES_MAX", "3"), ("WEBHOOK_BREAKER_THRESHOLD", "0")]);
    let spiegel = lab.spiegel_with(&settings).await;
    let count = async |state: &str| lab.deliveries().await.iter().filter(|doc| doc["state"] == state).count();
    write(&lab, &db, &["b1", "b2"]).await;
    eventually(SOON, "both are parked beside the dead", async || (count("parked").await == 2).then_some(())).await;
    for n in 0..8 {
        write(&lab, &db, &[&format!("x{n}")]).await;
    }
    lab.delivered_all("/hook", &["x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7"]).await;
    eventually(SOON, "every one was refused", async || (lab.receiver.count("/strict") >= 10).then_some(())).await;
    eventually(SOON, "as many are listed as may be", async || (count("dead").await == 3).then_some(())).await;
    spiegel.said(&["the oldest are not listed any more"]).await;
    assert_eq!(count("parked").await, 2, "what is owed is kept");
    fails.store(false, Ordering::Relaxed);
    lab.delivered_all("/hook", &["b1", "b2"]).await;
}

async fn a_foreign_database_of_that_name_is_left_alone(lab: Arc<Lab>) {
    let (db, fails) = a_rule_that_fails(&lab, 500, &["bad"]).await;
    lab.couch.put(&lab.deliveries_db(), "mine", json!({ "to": "Anna" })).await;
    let spiegel = lab.spiegel_with(&QUICK).await;
    spiegel.said(&["ERROR", "holds other documents than deliveries", &lab.deliveries_db()]).await;
    write(&lab, &db, &["a"]).await;
    lab.delivered_all("/hook", &["a"]).await;
    write(&lab, &db, &["bad"]).await;
    eventually(SOON, "the rule waits", async || {
        let doc = lab.couch.get(&lab.spiegel_db(), &format!("spiegel_cl_{db}")).await?;
        doc["dirty_at"].is_string().then_some(())
    })
    .await;
    let docs = lab.deliveries().await;
    assert_eq!(docs.iter().map(|doc| &doc["_id"]).collect::<Vec<_>>(), ["mine"], "nothing is written there");
    fails.store(false, Ordering::Relaxed);
    lab.delivered_all("/hook", &["bad"]).await;
}
