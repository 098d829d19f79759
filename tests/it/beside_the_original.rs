//! Update-listeners of ours with the processes of Node Spiegel itself, on a real CouchDB.

use crate::support::original::Original;
use crate::support::{Lab, SOON, Spiegel, eventually, tests_on};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

tests_on! {
    every: [],
    couchdb: [
        its_workers_do_what_ours_mark_through_kills,
        its_update_listener_and_ours_work_side_by_side,
        our_workers_share_the_work_with_its_own_through_kills,
        run_beside_all_of_its_processes,
    ],
}

const DATABASES: usize = 6;
const ROUNDS: usize = 4;
/// Each of its replications waits up to five seconds in CouchDB.
const PATIENCE: Duration = Duration::from_secs(90);

async fn ours(lab: &Lab) -> Spiegel {
    ours_as(lab, "update-listener").await
}

async fn ours_as(lab: &Lab, kind: &str) -> Spiegel {
    let (url, db, namespace) = (lab.couch.url(), lab.spiegel_db(), lab.prefix.clone());
    let pairs = [
        ("TYPE", kind),
        ("URL", &url),
        ("DB_NAME", &db),
        ("NAMESPACE", &namespace),
        ("SAVE_SEQ_AFTER", "1"),
        ("SPIEGEL_LOG_FORMAT", "json"),
        ("SPIEGEL_ROLES_STALE_AFTER", "3s"),
    ];
    let mut variables: BTreeMap<String, String> =
        pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    if kind != "update-listener" {
        variables.insert("PASSWORDS_FILE".into(), lab.settings()["SPIEGEL_PASSWORDS_FILE"].clone());
    }
    let mut listener = Spiegel::start_unready_as(variables, &["container"]);
    listener.wait_ready().await;
    listener
}

/// Databases with a rule and a replicator each, all into one target.
async fn prepare(lab: &Lab) -> Vec<String> {
    lab.install().await;
    let target = lab.create("target").await;
    lab.rule_on("rule", &format!("^{}source", lab.prefix), "/hook", json!({})).await;
    let mut dbs = Vec::new();
    for number in 0..DATABASES {
        let db = lab.create(&format!("source{number}")).await;
        lab.replicator(&format!("replicator{number}"), &db, &target, json!({})).await;
        dbs.push(db);
    }
    dbs
}

async fn everything_arrives(lab: &Lab) {
    let wanted = DATABASES * ROUNDS;
    let delivered = async || (lab.receiver.delivered("/hook").len() == wanted).then_some(());
    eventually(PATIENCE, "all delivered", delivered).await;
    let replicated = async || (lab.couch.all(&lab.name("target")).await.len() == wanted).then_some(());
    eventually(PATIENCE, "all replicated", replicated).await;
    let spiegel_db = lab.spiegel_db();
    let settled = async || {
        for id in lab.couch.all(&spiegel_db).await.into_keys() {
            let doc = lab.couch.get(&spiegel_db, &id).await?;
            let is_work = ["replicator", "change_listener"].iter().any(|kind| doc["type"] == *kind);
            if is_work && (doc["dirty"] != json!(false) || !doc["locked_at"].is_null()) {
                return None;
            }
        }
        Some(())
    };
    eventually(PATIENCE, "all clean and unlocked", settled).await;
}

async fn its_workers_do_what_ours_mark_through_kills(lab: Arc<Lab>) {
    let Some(program) = Original::program() else { return };
    let dbs = prepare(&lab).await;
    let mut listeners = [ours(&lab).await, ours(&lab).await];
    let _workers = ["change-listener", "replicator"].map(|kind| Original::start(&program, &lab, kind));
    for round in 0..ROUNDS {
        for (number, db) in dbs.iter().enumerate() {
            lab.couch.put(db, &format!("d{number}-{round}"), json!({})).await;
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(0..1500))).await;
        let killed = &mut listeners[round % 2];
        killed.kill();
        killed.start_again().await;
    }
    everything_arrives(&lab).await;
    println!("{} requests for {} documents", lab.receiver.count("/hook"), DATABASES * ROUNDS);
}

async fn its_update_listener_and_ours_work_side_by_side(lab: Arc<Lab>) {
    let Some(program) = Original::program() else { return };
    let dbs = prepare(&lab).await;
    let mut listener = ours(&lab).await;
    // Or the original reads all of _global_changes.
    let position = async || lab.couch.get(&lab.spiegel_db(), "global_lastSeq").await.filter(|doc| !doc["value"].is_null());
    eventually(SOON, "a position", position).await;
    let _others = ["update-listener", "change-listener", "replicator"].map(|kind| Original::start(&program, &lab, kind));
    for round in 0..ROUNDS {
        for (number, db) in dbs.iter().enumerate() {
            lab.couch.put(db, &format!("d{number}-{round}"), json!({})).await;
        }
        tokio::time::sleep(Duration::from_millis(700)).await;
        if round == 1 {
            listener.kill();
        }
        if round == 2 {
            listener.start_again().await;
        }
    }
    everything_arrives(&lab).await;
    listener.stop().await;
}

async fn our_workers_share_the_work_with_its_own_through_kills(lab: Arc<Lab>) {
    let Some(program) = Original::program() else { return };
    let dbs = prepare(&lab).await;
    let position =
        json!({ "type": "global", "value": lab.couch.changes("_global_changes", "limit=1&since=now").await["last_seq"] });
    lab.spiegel_doc("global_lastSeq", position).await;
    let _theirs = ["update-listener", "change-listener", "replicator"].map(|kind| Original::start(&program, &lab, kind));
    let mut ours = [ours_as(&lab, "change-listener").await, ours_as(&lab, "replicator").await];
    for round in 0..ROUNDS {
        for (number, db) in dbs.iter().enumerate() {
            lab.couch.put(db, &format!("d{number}-{round}"), json!({})).await;
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(500..2500))).await;
        let killed = &mut ours[round % 2];
        killed.kill();
        killed.start_again().await;
    }
    everything_arrives(&lab).await;
    println!("{} requests for {} documents", lab.receiver.count("/hook"), DATABASES * ROUNDS);
}

async fn run_beside_all_of_its_processes(lab: Arc<Lab>) {
    let Some(program) = Original::program() else { return };
    let dbs = prepare(&lab).await;
    let run = lab.spiegel_with(&[("ROLES_STALE_AFTER", "3s")]).await;
    let position = async || lab.couch.get(&lab.spiegel_db(), "global_lastSeq").await.filter(|doc| !doc["value"].is_null());
    eventually(SOON, "a position", position).await;
    let _theirs = ["update-listener", "change-listener", "replicator"].map(|kind| Original::start(&program, &lab, kind));
    for round in 0..ROUNDS {
        for (number, db) in dbs.iter().enumerate() {
            lab.couch.put(db, &format!("d{number}-{round}"), json!({})).await;
        }
        tokio::time::sleep(Duration::from_millis(2500)).await;
    }
    run.said(&["working by locks"]).await;
    everything_arrives(&lab).await;
    let before = lab.receiver.count("/hook");
    println!("{before} requests for {} documents", DATABASES * ROUNDS);
    for (number, db) in dbs.iter().enumerate() {
        lab.couch.put(db, &format!("last{number}"), json!({})).await;
    }
    let last = async || (lab.receiver.delivered("/hook").len() == DATABASES * (ROUNDS + 1)).then_some(());
    eventually(PATIENCE, "the last ones", last).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    println!("{} requests for the last {DATABASES}", lab.receiver.count("/hook") - before);
    drop(run);
}
