//! Write → webhook. CouchDB itself takes about 320 ms to tell of a write, so the figure that is ours is the time between its
//! row's arrival at a reader beside and the webhook's arrival.

use super::Bench;
use crate::program::Program;
use crate::receiver::Receiver;
use crate::report::{ms_between, percentiles};
use serde_json::json;
use std::time::{Duration, Instant};

const DBS: usize = 5;

pub async fn measure(bench: &Bench) -> anyhow::Result<()> {
    // Known and in memory; then known, but forgotten since.
    one(bench, "webhook", 100, &[]).await?;
    one(bench, "webhook_passive", 40, &[("SPIEGEL_DB_PASSIVATE_AFTER", "500ms")]).await
}

/// Each write goes to a database that has been idle for more than 1.2 s: they take turns, one write at a time.
async fn one(bench: &Bench, name: &str, writes: usize, settings: &[(&str, &str)]) -> anyhow::Result<()> {
    let (couch, receiver) = (&bench.couch, Receiver::start()?);
    let dbs = bench.dbs(name, DBS);
    couch.create_dbs(&dbs).await?;
    let program = Program::start(bench, name, settings).await?;
    couch.put_doc(&program.spiegel_db, "rule", bench.rule(name, &receiver, json!({ "change": "$change" }))).await?;
    couch.put_doc_in_each(&dbs, "first").await?;
    receiver.wait_for_distinct(DBS, Duration::from_secs(30)).await?;
    tokio::time::sleep(Duration::from_millis(1500)).await;

    let feed = couch.watch_feed().await?;
    let (mut over_feed, mut total) = (Vec::new(), Vec::new());
    for (n, db) in dbs.iter().cycle().take(writes).enumerate() {
        let before = Instant::now();
        couch.put_doc(db, &format!("doc{n}"), json!({ "value": n })).await?;
        let written = Instant::now();
        let webhook = receiver.first_after(db, before).await?;
        let row = feed.first_after(db, before).await?;
        over_feed.push(ms_between(row, webhook));
        total.push(ms_between(written, webhook));
        // Out of step with the feed's own half second.
        tokio::time::sleep(Duration::from_millis(100 + fastrand::u64(0..500))).await;
    }
    bench.report(&format!("{name}_over_feed"), "ms", &program, percentiles(&over_feed));
    bench.report(&format!("{name}_total"), "ms", &program, percentiles(&total));
    program.stop().await
}
