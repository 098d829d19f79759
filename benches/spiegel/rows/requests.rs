//! CouchDB requests for one changed database with one rule, by the program's own count.
//!
//! The open feed counts once, when it is opened. The saves of the feed's position are counted: they are part of the price.

use super::Bench;
use crate::program::Program;
use crate::receiver::Receiver;
use crate::report::rounded;
use serde_json::json;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const SINGLE: usize = 20;
const BURST: usize = 100;
/// Whatever a change causes has been asked by then, but for the next save of the feed's position.
const SETTLE: Duration = Duration::from_secs(2);

pub async fn measure(bench: &Bench) -> anyhow::Result<()> {
    in_memory(bench).await?;
    passivated(bench).await
}

async fn in_memory(bench: &Bench) -> anyhow::Result<()> {
    let (row, receiver) = ("requests", Receiver::start()?);
    let dbs = bench.dbs(row, SINGLE);
    bench.couch.create_dbs(&dbs).await?;
    let program = Program::start(bench, row, &[("SPIEGEL_DB_PASSIVATE_AFTER", "10m")]).await?;
    know(bench, row, &program, &receiver, &dbs).await?;
    let per_change = one_at_a_time(bench, &program, &receiver, &dbs).await?;
    bench.report("requests_in_memory", "requests/changed database", &program, per_change);
    program.stop().await
}

async fn passivated(bench: &Bench) -> anyhow::Result<()> {
    let (row, receiver) = ("requests_passive", Receiver::start()?);
    let dbs = bench.dbs(row, BURST);
    bench.couch.create_dbs(&dbs).await?;
    let program = Program::start(bench, row, &[("SPIEGEL_DB_PASSIVATE_AFTER", "1s")]).await?;
    know(bench, row, &program, &receiver, &dbs).await?;
    program.wait_until_passive(Duration::from_secs(60)).await?;
    let per_change = one_at_a_time(bench, &program, &receiver, &dbs[..SINGLE]).await?;
    bench.report("requests_passivated", "requests/changed database", &program, per_change);

    program.wait_until_passive(Duration::from_secs(60)).await?;
    receiver.forget();
    let before = program.requests().await?;
    let started = Instant::now();
    bench.couch.put_doc_in_each(&dbs, "burst").await?;
    receiver.wait_for_distinct(BURST, Duration::from_secs(60)).await?;
    let ms = started.elapsed().as_millis();
    tokio::time::sleep(SETTLE).await;
    let mut figures = per_change_of(&before, &program.requests().await?, BURST);
    figures["burst_to_last_webhook_ms"] = json!(ms);
    bench.report("requests_burst_of_100", "requests/changed database", &program, figures);
    program.stop().await
}

async fn know(bench: &Bench, row: &str, program: &Program, receiver: &Receiver, dbs: &[String]) -> anyhow::Result<()> {
    bench.couch.put_doc(&program.spiegel_db, "rule", bench.rule(row, receiver, json!({ "change": "$change" }))).await?;
    bench.couch.put_doc_in_each(dbs, "first").await?;
    receiver.wait_for_distinct(dbs.len(), Duration::from_secs(60)).await?;
    tokio::time::sleep(SETTLE).await;
    Ok(())
}

async fn one_at_a_time(
    bench: &Bench,
    program: &Program,
    receiver: &Receiver,
    dbs: &[String],
) -> anyhow::Result<serde_json::Value> {
    let before = program.requests().await?;
    for db in dbs {
        let moment = Instant::now();
        bench.couch.put_doc(db, "second", json!({})).await?;
        receiver.first_after(db, moment).await?;
    }
    tokio::time::sleep(SETTLE).await;
    Ok(per_change_of(&before, &program.requests().await?, dbs.len()))
}

fn per_change_of(before: &BTreeMap<String, f64>, after: &BTreeMap<String, f64>, changes: usize) -> serde_json::Value {
    let asked = |endpoint: &str, count: f64| count - before.get(endpoint).copied().unwrap_or_default();
    let by_endpoint: BTreeMap<&String, f64> =
        after.iter().map(|(endpoint, count)| (endpoint, asked(endpoint, *count))).filter(|(_, count)| *count > 0.0).collect();
    let total: f64 = by_endpoint.values().sum();
    json!({ "value": rounded(total / changes as f64), "changes": changes, "requests_by_endpoint": by_endpoint })
}
