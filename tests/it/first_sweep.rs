//! The first sweep of a process: what an earlier one delivered is not asked for again, and whatever is owed is.

use crate::support::{Answer, Kind, Lab, SOON, Spiegel, eventually, stays, tests_on};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

tests_on! {
    every: [
    unchanged_databases_are_not_asked_after_a_crash,
    unchanged_databases_are_not_asked_after_a_stop,
    what_was_written_while_it_was_down_is_found,
    a_dirty_document_is_not_passed_over,
    a_position_that_was_moved_back_is_believed,
    a_new_rule_that_starts_at_zero_reaches_unchanged_databases,
    a_database_with_a_rule_that_is_held_back_is_not_known,
    a_source_of_a_replicator_is_replicated_after_a_crash,
    whoever_deletes_the_position_has_everything_asked,
],
    like_couchdb: [a_database_made_again_with_as_many_documents_is_read_from_its_start],
    embedded: [documents_that_cannot_be_read_cost_the_saving_only],
}

const DOCS: usize = 2;

/// Databases with documents from before the first start, so that its sweep finds them, all delivered and known.
async fn known(lab: &Lab, count: usize) -> (Spiegel, Vec<String>) {
    known_with(lab, count, &[]).await
}

async fn known_with(lab: &Lab, count: usize, settings: &[(&str, &str)]) -> (Spiegel, Vec<String>) {
    let dbs = filled(lab, count).await;
    let spiegel = lab.spiegel_with(settings).await;
    delivered(lab, count * DOCS).await;
    for db in &dbs {
        listener(lab, db, "it knows", |doc| doc["update_seq"].is_string()).await;
    }
    sweep_is_counted(lab).await;
    (spiegel, dbs)
}

/// Together with the feed's position, without which the next start is a first one.
async fn sweep_is_counted(lab: &Lab) {
    let is_counted = |doc: &Value| doc["sweeps_trusting"].is_u64() && !doc["value"].is_null();
    let counted = async || lab.couch.get(&lab.spiegel_db(), "global_lastSeq").await.filter(is_counted);
    eventually(SOON, "the sweep is counted", counted).await;
}

async fn filled(lab: &Lab, count: usize) -> Vec<String> {
    lab.install().await;
    lab.rule_on("rule", &format!("^{}source", regex::escape(&lab.prefix)), "/hook", json!({})).await;
    let mut dbs = Vec::new();
    for number in 0..count {
        let db = lab.create(&format!("source{number}")).await;
        lab.couch.fill(&db, "d", DOCS).await;
        dbs.push(db);
    }
    rows_are_written().await;
    dbs
}

/// A run that a late row caused may come before the sweep's, and leave it nothing to write.
async fn rows_are_written() {
    stays(Duration::from_millis(1200), "CouchDB flushes what it still has", async || true).await;
}

async fn delivered(lab: &Lab, count: usize) {
    let reached = async || (lab.receiver.delivered("/hook").values().sum::<usize>() >= count).then_some(());
    eventually(SOON * 2, format!("{count} documents delivered"), reached).await;
}

async fn listener(lab: &Lab, db: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    let id = format!("spiegel_cl_{db}");
    let so = async || lab.couch.get(&lab.spiegel_db(), &id).await.filter(&is_so);
    eventually(SOON, format!("{id}: {what}"), so).await
}

async fn edit(lab: &Lab, id: &str, fields: Value) {
    let mut doc = lab.couch.get(&lab.spiegel_db(), id).await.expect("a document");
    doc.as_object_mut().expect("an object").extend(fields.as_object().cloned().expect("fields"));
    lab.spiegel_doc(id, doc).await;
}

/// Restarts it, and waits for its first sweep. Gives how many databases that hinted.
async fn sweep_of_the_next(spiegel: &mut Spiegel) -> f64 {
    spiegel.kill();
    first_sweep(spiegel).await
}

async fn first_sweep(spiegel: &mut Spiegel) -> f64 {
    spiegel.start_again().await;
    eventually(SOON * 2, "the first sweep", async || (spiegel.metric("sweeps").await > 0.0).then_some(())).await;
    spiegel.metric("sweep_found").await
}

fn hinted(lab: &Lab, found: f64, expected: usize) {
    let expected = expected as f64;
    match lab.kind {
        // It sends all names whatever page was asked for, so that a sweep passes each several times.
        Kind::PouchDb => assert!(found >= expected && (found > 0.0) == (expected > 0.0), "hinted: {found} and not {expected}"),
        _ => assert_eq!(found, expected, "hinted by the first sweep"),
    }
}

/// Requests for changes, of any database.
async fn asked(spiegel: &Spiegel) -> u64 {
    let (_, page) = spiegel.page("/metrics").await.expect("the metrics page");
    let lines = page.lines().filter(|line| line.starts_with("spiegel_couchdb_requests") && line.contains(r#""_changes""#));
    lines.map(|line| line.rsplit(' ').next().and_then(|value| value.parse::<u64>().ok()).expect("a count")).sum()
}

/// The feed, the rules and their feed, the look for others and its feed, and one more where a feed had to be opened again.
const ASKED_AT_START_MAX: u64 = 7;

/// More than go into one `_dbs_info`, where they are cheap to make.
fn many(lab: &Lab) -> usize {
    if lab.kind == Kind::Embedded { 200 } else { 12 }
}

async fn nothing_is_asked(lab: &Lab, spiegel: &Spiegel, count: usize, found: f64) {
    println!("{count} unchanged databases: {found} hinted, {} requests for changes in all", asked(spiegel).await);
    hinted(lab, found, 0);
    let few = async || asked(spiegel).await <= ASKED_AT_START_MAX;
    stays(Duration::from_secs(1), "their changes are not asked for", few).await;
    assert!(spiegel.metric("sweep_databases").await >= count as f64, "it looked at them");
    assert_eq!(lab.receiver.count("/hook"), count * DOCS, "and nothing is repeated");
}

async fn unchanged_databases_are_not_asked_after_a_crash(lab: Arc<Lab>) {
    let (mut spiegel, dbs) = known(&lab, many(&lab)).await;
    let found = sweep_of_the_next(&mut spiegel).await;
    nothing_is_asked(&lab, &spiegel, dbs.len(), found).await;
    // And a change is one, as ever.
    lab.couch.put(&dbs[0], "new", json!({})).await;
    delivered(&lab, dbs.len() * DOCS + 1).await;
    listener(&lab, &dbs[0], "it does not know what it looks like now", |doc| doc.get("update_seq").is_none()).await;
}

async fn unchanged_databases_are_not_asked_after_a_stop(lab: Arc<Lab>) {
    // After a clean stop the first sweep is the one that is due next.
    let (mut spiegel, dbs) = known_with(&lab, 12, &[("FEED_SWEEP_INTERVAL", "3s")]).await;
    spiegel.stop().await;
    let found = first_sweep(&mut spiegel).await;
    hinted(&lab, found, 0);
    assert_eq!(lab.receiver.count("/hook"), dbs.len() * DOCS);
}

async fn what_was_written_while_it_was_down_is_found(lab: Arc<Lab>) {
    let (mut spiegel, dbs) = known(&lab, 4).await;
    spiegel.kill();
    let mut known_before = Vec::new();
    for db in &dbs {
        known_before.push(listener(&lab, db, "it is known", |_| true).await["update_seq"].clone());
    }
    if let Some(faults) = &lab.faults {
        dbs.iter().for_each(|db| faults.lose_rows_of(db));
    }
    lab.couch.put(&dbs[0], "new", json!({})).await;
    // As many documents as before.
    lab.couch.put(&dbs[1], "d0", json!({ "n": "another" })).await;
    lab.couch.remove(&dbs[2], "d0").await;
    rows_are_written().await;
    let found = first_sweep(&mut spiegel).await;
    delivered(&lab, 4 * DOCS + 3).await;
    hinted(&lab, found, 3);
    let mut news: Vec<(String, String)> = lab.receiver.requests_at("/hook")[4 * DOCS..]
        .iter()
        .map(|request| (request.body["db"].as_str().expect("a name").to_string(), request.doc_id()))
        .collect();
    news.sort();
    let expected = [(&dbs[0], "new"), (&dbs[1], "d0"), (&dbs[2], "d0")].map(|(db, id)| (db.clone(), id.to_string()));
    assert_eq!(news, expected);
    // Where no row came first, the sweep's runs wrote what they saw.
    if lab.faults.is_some() {
        for (db, before) in dbs.iter().zip(&known_before).take(3) {
            let is_new = |doc: &Value| doc["update_seq"].is_string() && doc["update_seq"] != *before;
            listener(&lab, db, "it knows again", is_new).await;
        }
        hinted(&lab, sweep_of_the_next(&mut spiegel).await, 0);
    }
}

async fn a_database_made_again_with_as_many_documents_is_read_from_its_start(lab: Arc<Lab>) {
    let (mut spiegel, dbs) = known(&lab, 2).await;
    spiegel.kill();
    if let Some(faults) = &lab.faults {
        faults.lose_rows_of(&dbs[0]);
    }
    let before = lab.couch.info(&dbs[0]).await;
    // CouchDB's instance_start_time is of whole seconds.
    stays(Duration::from_millis(1100), "the clock goes on", async || true).await;
    lab.couch.delete(&dbs[0]).await;
    lab.couch.create(&dbs[0]).await;
    lab.couch.fill(&dbs[0], "d", DOCS).await;
    let after = lab.couch.info(&dbs[0]).await;
    assert_eq!([&before["doc_count"], &before["doc_del_count"]], [&after["doc_count"], &after["doc_del_count"]]);
    assert_ne!(before["instance_start_time"], after["instance_start_time"]);
    rows_are_written().await;
    hinted(&lab, first_sweep(&mut spiegel).await, 1);
    delivered(&lab, 3 * DOCS).await;
}

async fn a_dirty_document_is_not_passed_over(lab: Arc<Lab>) {
    let (mut spiegel, dbs) = known(&lab, 3).await;
    spiegel.kill();
    // With everything else as it was, so that its fingerprint would still be right.
    edit(&lab, &format!("spiegel_cl_{}", dbs[0]), json!({ "dirty": true })).await;
    edit(&lab, &format!("spiegel_cl_{}", dbs[1]), json!({ "dirty_at": "2020-01-01T00:00:00.000Z" })).await;
    first_sweep(&mut spiegel).await;
    listener(&lab, &dbs[0], "it was worked off", |doc| doc["dirty"] == json!(false)).await;
    listener(&lab, &dbs[1], "it was worked off", |doc| doc["dirty_at"].is_null()).await;
    assert_eq!(lab.receiver.count("/hook"), 3 * DOCS);
}

async fn a_position_that_was_moved_back_is_believed(lab: Arc<Lab>) {
    let (mut spiegel, dbs) = known(&lab, 3).await;
    spiegel.kill();
    edit(&lab, &format!("spiegel_cl_{}", dbs[0]), json!({ "last_seq": "0" })).await;
    hinted(&lab, first_sweep(&mut spiegel).await, 1);
    delivered(&lab, 4 * DOCS).await;
    let doc = listener(&lab, &dbs[0], "it knows again", |doc| doc["last_seq"] != json!("0")).await;
    assert!(doc["update_seq"].is_string(), "{doc}");
}

async fn a_new_rule_that_starts_at_zero_reaches_unchanged_databases(lab: Arc<Lab>) {
    let (mut spiegel, dbs) = known(&lab, 3).await;
    spiegel.kill();
    lab.rule("later", &dbs[0], "/later", json!({})).await;
    lab.rule("zero", &dbs[1], "/zero", json!({ "since": "0" })).await;
    let found = first_sweep(&mut spiegel).await;
    let all = async || (lab.receiver.delivered("/zero").len() == DOCS).then_some(());
    eventually(SOON, "everything from the beginning", all).await;
    // A rule without a start of its own begins where the others are.
    hinted(&lab, found, 1);
    assert_eq!((lab.receiver.count("/hook"), lab.receiver.count("/later")), (3 * DOCS, 0));
    // Once it has met the database, that is known like any other.
    listener(&lab, &dbs[1], "it knows", |doc| doc["update_seq"].is_string() && !doc["ahead"]["rules"]["zero"].is_null()).await;
    hinted(&lab, sweep_of_the_next(&mut spiegel).await, 0);
    assert_eq!(lab.receiver.count("/zero"), DOCS);
}

async fn a_database_with_a_rule_that_is_held_back_is_not_known(lab: Arc<Lab>) {
    lab.receiver.answer("/dead", Answer::status(500));
    let dbs = filled(&lab, 2).await;
    lab.rule("dead", &dbs[0], "/dead", json!({ "on_failure": "hold" })).await;
    let mut spiegel = lab.spiegel_with(&[("BACKOFF_BASE", "1h"), ("BACKOFF_CAP", "1h")]).await;
    delivered(&lab, 2 * DOCS).await;
    let doc = listener(&lab, &dbs[0], "the rule is held back", |doc| doc["dirty_at"].is_string()).await;
    assert!(doc.get("update_seq").is_none(), "{doc}");
    listener(&lab, &dbs[1], "it knows", |doc| doc["update_seq"].is_string()).await;
    sweep_is_counted(&lab).await;
    hinted(&lab, sweep_of_the_next(&mut spiegel).await, 1);
}

async fn a_source_of_a_replicator_is_replicated_after_a_crash(lab: Arc<Lab>) {
    let (mut spiegel, dbs) = known(&lab, 3).await;
    spiegel.kill();
    // Settled by its own account, as one that CouchDB lost a checkpoint of.
    let target = lab.create("target").await;
    lab.replicator("copy", &dbs[0], &target, json!({ "dirty": false })).await;
    hinted(&lab, first_sweep(&mut spiegel).await, 1);
    eventually(SOON * 2, "all in the target", async || (lab.couch.all(&target).await.len() == DOCS).then_some(())).await;
    assert_eq!(lab.receiver.count("/hook"), 3 * DOCS);
}

async fn whoever_deletes_the_position_has_everything_asked(lab: Arc<Lab>) {
    let (mut spiegel, dbs) = known(&lab, 3).await;
    spiegel.kill();
    lab.couch.remove(&lab.spiegel_db(), "global_lastSeq").await;
    hinted(&lab, first_sweep(&mut spiegel).await, dbs.len());
}

async fn documents_that_cannot_be_read_cost_the_saving_only(lab: Arc<Lab>) {
    let (mut spiegel, dbs) = known(&lab, 3).await;
    spiegel.kill();
    let faults = lab.faults.clone().expect("the embedded server's");
    dbs.iter().for_each(|db| faults.lose_rows_of(db));
    lab.couch.put(&dbs[0], "new", json!({})).await;
    rows_are_written().await;
    spiegel.start_again_unready();
    // The sweep begins a moment after the names are asked for; what others read in that time they read again.
    faults.delay("/_dbs_info", Duration::from_secs(2));
    spiegel.wait_ready().await;
    let swept = async || (spiegel.metric("sweeps").await > 0.0).then_some(());
    let names_asked = async || {
        let (_, page) = spiegel.page("/metrics").await?;
        page.lines().any(|line| line.contains(r#"endpoint="_all_dbs""#)).then_some(())
    };
    eventually(SOON, "the sweep begins", names_asked).await;
    faults.answer(Some(http::Method::POST), &format!("/{}/_all_docs", lab.spiegel_db()), 500, 1);
    eventually(SOON, "the first sweep", swept).await;
    hinted(&lab, spiegel.metric("sweep_found").await, dbs.len());
    delivered(&lab, 3 * DOCS + 1).await;
}
