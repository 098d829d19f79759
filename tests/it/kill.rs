//! kill -9 at any instant: every revision is delivered and replicated, and few are delivered twice.

use crate::support::server::environment;
use crate::support::{Lab, eventually, tests_on};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

tests_on! {
    every: [nothing_is_lost_by_kills],
}

const KILLS: u64 = 8;
const DBS: usize = 10;
const BATCH: usize = 10;
const IN_FLIGHT: usize = 8;

async fn nothing_is_lost_by_kills(lab: Arc<Lab>) {
    let seed = environment("SPIEGEL_TEST_SEED").map_or_else(|| fastrand::u64(..), |text| text.parse().expect("a number"));
    println!("repeat with SPIEGEL_TEST_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);

    lab.install().await;
    let target = lab.create("target").await;
    let mut dbs = Vec::new();
    for number in 0..DBS {
        let db = lab.create(&format!("source{number}")).await;
        lab.replicator(&format!("replicator{number}"), &db, &target, json!({})).await;
        dbs.push(db);
    }
    // Of the target too: it changes because the others do.
    lab.rule_on("rule", &lab.every_db(), "/hook", json!({})).await;

    let done = Arc::new(AtomicBool::new(false));
    let writer = {
        let (lab, dbs, done, mut random) = (lab.clone(), dbs.clone(), done.clone(), random.fork());
        tokio::spawn(async move {
            let mut number = 0;
            while !done.load(Ordering::Relaxed) {
                let db = &dbs[random.usize(..dbs.len())];
                let docs = (0..random.usize(1..8)).map(|_| {
                    number += 1;
                    json!({ "_id": format!("doc{number}") })
                });
                lab.couch.bulk(db, docs.collect()).await;
                tokio::time::sleep(Duration::from_millis(random.u64(5..40))).await;
            }
            number
        })
    };

    let batch = BATCH.to_string();
    let in_flight = IN_FLIGHT.to_string();
    let settings = [
        ("DB_BATCH_SIZE", batch.as_str()),
        ("WEBHOOK_CONCURRENCY", in_flight.as_str()),
        ("WEBHOOK_CONCURRENCY_PER_HOST", in_flight.as_str()),
    ];
    let mut spiegel = lab.spiegel_with(&settings).await;
    for kill in 0..KILLS {
        tokio::time::sleep(Duration::from_millis(random.u64(0..900))).await;
        spiegel.kill();
        // Before it is ready, now and then.
        match random.bool() {
            true => spiegel.start_again().await,
            false => spiegel.start_again_unready(),
        }
        println!("kill {} of {KILLS}", kill + 1);
    }
    spiegel.wait_ready().await;
    done.store(true, Ordering::Relaxed);
    let written = writer.await.expect("the writer");

    let wanted: BTreeSet<(String, String)> = {
        let mut wanted = BTreeSet::new();
        for db in dbs.iter().chain([&target]) {
            let ids = if *db == target { all_of(&lab, &dbs).await } else { lab.couch.all(db).await.into_keys().collect() };
            wanted.extend(ids.into_iter().map(|id| (db.clone(), id)));
        }
        wanted
    };
    assert_eq!(wanted.len(), 2 * written);
    let missing = async || {
        let delivered = delivered(&lab);
        let missing = wanted.iter().filter(|key| !delivered.contains_key(*key)).count();
        (missing == 0).then_some(())
    };
    eventually(Duration::from_secs(60), format!("{} deliveries (seed {seed})", wanted.len()), missing).await;
    let replicated = async || (lab.couch.all(&target).await.len() == written).then_some(());
    eventually(Duration::from_secs(60), format!("{written} documents in the target (seed {seed})"), replicated).await;

    let delivered = delivered(&lab);
    let repeats: usize = delivered.values().map(|ids| ids.len() - 1).sum();
    let bound = KILLS as usize * (IN_FLIGHT + BATCH * (DBS + 1));
    println!("{written} documents, {repeats} deliveries repeated, at most {bound} allowed");
    assert!(repeats <= bound, "{repeats} repeats for {KILLS} kills, at most {bound} (seed {seed})");
    let mut seen = BTreeSet::new();
    for (key, ids) in &delivered {
        let distinct: BTreeSet<&String> = ids.iter().collect();
        assert_eq!(distinct.len(), 1, "a repeat carries the same id: {key:?} {ids:?} (seed {seed})");
        assert!(seen.insert(ids[0].clone()), "no two changes share an id: {key:?} {ids:?} (seed {seed})");
    }
}

async fn all_of(lab: &Lab, dbs: &[String]) -> Vec<String> {
    let mut ids = Vec::new();
    for db in dbs {
        ids.extend(lab.couch.all(db).await.into_keys());
    }
    ids
}

/// (database, document) ▶ the webhook-ids of its deliveries.
fn delivered(lab: &Lab) -> BTreeMap<(String, String), Vec<String>> {
    let mut delivered: BTreeMap<_, Vec<String>> = BTreeMap::new();
    for request in lab.receiver.requests_at("/hook") {
        let db = request.body["db"].as_str().expect("a database").to_string();
        delivered.entry((db, request.doc_id())).or_default().push(request.header("webhook-id").to_string());
    }
    delivered
}
