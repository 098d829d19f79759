//! A rule for everything must not feed on what it causes itself.

use crate::support::{Answer, Lab, SOON, eventually, tests_on};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

tests_on! {
    every: [a_rule_for_everything_does_not_feed_on_its_own_failures],
    private: [an_idle_process_writes_nothing],
}

/// Name ▶ (documents, updates) of the databases that Spiegel itself writes.
async fn own_databases(lab: &Lab) -> BTreeMap<String, (u64, u64)> {
    let mut sizes = BTreeMap::new();
    for db in lab.couch.all_dbs().await.into_iter().filter(|db| db.starts_with(&lab.spiegel_db())) {
        let count = lab.couch.info(&db).await["doc_count"].as_u64().unwrap();
        sizes.insert(db.clone(), (count, lab.couch.updates(&db).await));
    }
    sizes
}

async fn a_rule_for_everything_does_not_feed_on_its_own_failures(lab: Arc<Lab>) {
    lab.install().await;
    let mut dbs = Vec::new();
    for number in 0..3 {
        dbs.push(lab.create(&format!("db{number}")).await);
    }
    // On a shared server "everything" is everything of this test, Spiegel's own databases among it.
    let everything = if lab.kind == crate::support::Kind::CouchDb { lab.every_db() } else { ".*".into() };
    lab.receiver.answer("/dead", Answer::status(500));
    lab.rule_on("everything", &everything, "/dead", json!({})).await;
    lab.rule_on("well", &everything, "/hook", json!({})).await;
    let mut spiegel = lab.spiegel().await;
    for db in &dbs {
        lab.couch.fill(db, "d", 20).await;
    }
    eventually(SOON, "the rule that works", async || (lab.receiver.count("/hook") >= 60).then_some(())).await;
    eventually(SOON, "the rule that does not", async || (lab.receiver.count("/dead") >= 9).then_some(())).await;

    // The position of each database is written only after the dead rule's fast retries.
    let positions = async || {
        let mut written = 0;
        for db in &dbs {
            written += usize::from(lab.couch.get(&lab.spiegel_db(), &format!("spiegel_cl_{db}")).await.is_some());
        }
        (written == dbs.len()).then_some(())
    };
    eventually(SOON, "the databases' positions", positions).await;
    let deliveries = format!("{}_deliveries", lab.spiegel_db());
    let parked = async || (lab.couch.info(&deliveries).await["doc_count"].as_u64() >= Some(60)).then_some(());
    eventually(SOON, "what failed is parked", parked).await;
    let before = own_databases(&lab).await;
    let tries_before = lab.receiver.count("/dead");
    // Several rounds of its backoff, whose longest pause is 1 s here.
    let more_tries = async || (lab.receiver.count("/dead") >= tries_before + 15).then_some(());
    eventually(SOON, "more tries", more_tries).await;
    let after = own_databases(&lab).await;
    for (db, (count, updates)) in &after {
        let (count_before, updates_before) = before.get(db).copied().unwrap_or_default();
        assert!(*count <= count_before + 1, "{db} has {count} documents, {count_before} before");
        // A try is claimed and settled: two writes, and those of the tries that are under way.
        let tries = lab.receiver.count("/dead") - tries_before;
        let bound = 2 * (tries + 3 * 20) as u64;
        let grown = updates - updates_before;
        assert!(grown <= bound, "{db} was written {grown} times for {tries} tries");
    }
    let own: Vec<String> =
        lab.receiver.requests().iter().filter_map(|request| request.body["db"].as_str().map(String::from)).collect();
    // Each write of a parked delivery is a write of `_global_changes`, too.
    let is_own = |db: &&String| db.starts_with(&lab.spiegel_db()) || *db == "_global_changes";
    let own_databases: Vec<&String> = own.iter().filter(is_own).collect();
    assert!(own_databases.is_empty(), "delivered from databases that Spiegel causes to be written: {own_databases:?}");
    assert!(spiegel.is_alive());
}

/// A saved watermark is itself a change that moves the feed.
async fn an_idle_process_writes_nothing(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("db").await;
    lab.rule_on("everything", ".*", "/hook", json!({})).await;
    let _spiegel = lab.spiegel_with(&[("FEED_SAVE_SEQ_AFTER", "100ms")]).await;
    lab.couch.fill(&db, "d", 20).await;
    eventually(SOON, "delivered", async || (lab.receiver.delivered("/hook").len() >= 20).then_some(())).await;
    let last = std::sync::Mutex::new((own_databases(&lab).await, std::time::Instant::now()));
    let quiet = async || {
        let now = own_databases(&lab).await;
        let mut last = last.lock().unwrap();
        if now != last.0 {
            *last = (now, std::time::Instant::now());
        }
        (last.1.elapsed() > Duration::from_secs(2)).then_some(())
    };
    eventually(SOON, "two seconds without a write", quiet).await;
}
