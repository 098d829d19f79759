//! What `_global_changes` loses, and what is deleted and made again.

use crate::support::{Kind, Lab, SOON, Spiegel, eventually, stays, tests_on};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

tests_on! {
    every: [
    rows_lost_while_it_was_down_are_found,
    a_database_made_again_with_fewer_documents_is_read_from_its_start,
    a_database_made_again_while_it_was_down_is_read_from_its_start,
    a_target_made_again_gets_everything_with_the_next_change,
    a_target_made_again_gets_everything_by_the_sweep,
],
    private: [global_changes_made_again],
    embedded: [rows_lost_while_it_runs_are_found_by_the_sweep],
}

const SWEEPING: [(&str, &str); 1] = [("FEED_SWEEP_INTERVAL", "2s")];

async fn delivered(lab: &Lab, count: usize, what: &str) {
    let reached = async || (lab.receiver.delivered("/hook").len() >= count).then_some(());
    eventually(SOON * 2, format!("{count} documents delivered: {what}"), reached).await;
}

/// A crash of CouchDB loses what it had not yet written to `_global_changes`: here by moving the watermark past it.
async fn rows_lost_while_it_was_down_are_found(lab: Arc<Lab>) {
    lab.install().await;
    let (db, target) = (lab.create("source").await, lab.create("target").await);
    let never_changed = lab.create("never_changed").await;
    lab.rule("rule", &db, "/hook", json!({})).await;
    lab.replicator("copy", &db, &target, json!({})).await;
    lab.rule("other", &never_changed, "/other", json!({})).await;
    let mut spiegel = lab.spiegel().await;
    lab.couch.fill(&db, "before", 5).await;
    delivered(&lab, 5, "before").await;
    let watermark = async || lab.couch.get(&lab.spiegel_db(), "global_lastSeq").await.filter(|doc| !doc["value"].is_null());
    let mut doc = eventually(SOON, "a watermark", watermark).await;
    spiegel.kill();

    lab.couch.fill(&db, "lost", 5).await;
    // A database written after the ones that matter: once its row is there, so are theirs.
    lab.couch.put(&never_changed, "marker", json!({})).await;
    let marker = format!("updated:{never_changed}");
    let written = async || {
        let page = lab.couch.changes("_global_changes", "since=0").await;
        page["results"].as_array().expect("rows").iter().any(|row| row["id"] == json!(marker)).then_some(())
    };
    eventually(SOON, "the rows were written", written).await;
    stays(Duration::from_millis(1200), "CouchDB flushes what it still has", async || true).await;
    doc["value"] = lab.couch.changes("_global_changes", "since=now").await["last_seq"].clone();
    lab.couch.put(&lab.spiegel_db(), "global_lastSeq", doc).await;

    spiegel.start_again().await;
    delivered(&lab, 10, "after the rows were lost").await;
    eventually(SOON * 2, "replicated too", async || (lab.couch.all(&target).await.len() == 10).then_some(())).await;
}

async fn rows_lost_while_it_runs_are_found_by_the_sweep(lab: Arc<Lab>) {
    lab.install().await;
    let (db, target) = (lab.create("source").await, lab.create("target").await);
    lab.rule("rule", &db, "/hook", json!({})).await;
    lab.replicator("copy", &db, &target, json!({})).await;
    let _spiegel = lab.spiegel_with(&SWEEPING).await;
    lab.couch.fill(&db, "before", 5).await;
    delivered(&lab, 5, "before").await;
    let faults = lab.faults.clone().expect("the embedded server's");
    faults.lose_rows_of(&db);
    lab.couch.fill(&db, "lost", 5).await;
    delivered(&lab, 10, "by the sweep").await;
    eventually(SOON, "replicated too", async || (lab.couch.all(&target).await.len() == 10).then_some(())).await;
    // The same number of documents as before, but not the same ones.
    lab.couch.remove(&db, "lost0").await;
    lab.couch.put(&db, "new", json!({})).await;
    delivered(&lab, 11, "by a later sweep").await;
}

async fn a_database_made_again_with_fewer_documents_is_read_from_its_start(lab: Arc<Lab>) {
    lab.install().await;
    let (db, target) = (lab.create("source").await, lab.create("target").await);
    lab.rule("rule", &db, "/hook", json!({})).await;
    lab.replicator("copy", &db, &target, json!({})).await;
    let spiegel = lab.spiegel().await;
    lab.couch.fill(&db, "first", 20).await;
    delivered(&lab, 20, "before").await;
    eventually(SOON, "replicated", async || (lab.couch.all(&target).await.len() == 20).then_some(())).await;
    at_rest(&spiegel).await;
    lab.couch.delete(&db).await;
    lab.couch.create(&db).await;
    lab.couch.fill(&db, "second", 5).await;
    delivered(&lab, 25, "of the database that was made again").await;
    eventually(SOON * 2, "replicated too", async || (lab.couch.all(&target).await.len() == 25).then_some(())).await;
}

async fn a_database_made_again_while_it_was_down_is_read_from_its_start(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("source").await;
    lab.rule("rule", &db, "/hook", json!({})).await;
    let mut spiegel = lab.spiegel().await;
    lab.couch.fill(&db, "first", 20).await;
    delivered(&lab, 20, "before").await;
    spiegel.stop().await;
    lab.couch.delete(&db).await;
    lab.couch.create(&db).await;
    lab.couch.fill(&db, "second", 5).await;
    spiegel.start_again().await;
    delivered(&lab, 25, "of the database that was made again").await;
}

async fn a_target_made_again_gets_everything_with_the_next_change(lab: Arc<Lab>) {
    let (db, target) = replicated(&lab, &[]).await;
    lab.couch.delete(&target).await;
    lab.couch.create(&target).await;
    lab.couch.put(&db, "next", json!({})).await;
    eventually(SOON * 2, "all in the new target", async || (lab.couch.all(&target).await.len() == 21).then_some(())).await;
}

async fn a_target_made_again_gets_everything_by_the_sweep(lab: Arc<Lab>) {
    let (_, target) = replicated(&lab, &SWEEPING).await;
    lab.couch.delete(&target).await;
    lab.couch.create(&target).await;
    eventually(SOON * 2, "all in the new target", async || (lab.couch.all(&target).await.len() == 20).then_some(())).await;
}

/// CouchDB's own replicator writes its checkpoint seconds after the documents. A target that is made again in between gets the
/// checkpoint without the documents, and no later run of CouchDB's finds that out.
async fn at_rest(spiegel: &Spiegel) {
    let none = async || {
        let busy = spiegel.metric("replications_running").await + spiegel.metric("replications_queued").await;
        (busy == 0.0).then_some(())
    };
    eventually(SOON, "no replication runs", none).await;
}

/// Twenty documents from one database to another, by a process that the test leaves running.
async fn replicated(lab: &Arc<Lab>, settings: &[(&str, &str)]) -> (String, String) {
    lab.install().await;
    let (db, target) = (lab.create("source").await, lab.create("target").await);
    lab.replicator("copy", &db, &target, json!({})).await;
    let spiegel = lab.spiegel_with(settings).await;
    lab.couch.fill(&db, "d", 20).await;
    eventually(SOON * 2, "all in the target", async || (lab.couch.all(&target).await.len() == 20).then_some(())).await;
    at_rest(&spiegel).await;
    lab.keep(spiegel);
    (db, target)
}

async fn global_changes_made_again(lab: Arc<Lab>) {
    assert_ne!(lab.kind, Kind::CouchDb, "others use it");
    lab.install().await;
    let db = lab.create("source").await;
    lab.rule("rule", &db, "/hook", json!({})).await;
    let mut spiegel = lab.spiegel_with(&SWEEPING).await;
    lab.couch.fill(&db, "before", 5).await;
    delivered(&lab, 5, "before").await;
    lab.couch.delete("_global_changes").await;
    spiegel.said(&["_global_changes"]).await;
    lab.couch.fill(&db, "meanwhile", 5).await;
    delivered(&lab, 10, "written while there was no _global_changes").await;
    lab.couch.create("_global_changes").await;
    lab.couch.fill(&db, "after", 5).await;
    delivered(&lab, 15, "written after it was made again").await;
    // By the feed and not only by the sweep: at once.
    eventually(SOON, "the feed is open", async || (spiegel.metric("feed_connected").await > 0.0).then_some(())).await;
    assert!(spiegel.is_alive());
}
