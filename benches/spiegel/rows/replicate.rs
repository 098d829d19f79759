//! Write → replicated: until the document is in the target.

use super::Bench;
use crate::program::Program;
use crate::report::{ms_between, percentiles};
use anyhow::Context;
use serde_json::json;
use std::time::{Duration, Instant};

const WRITES: usize = 10;

pub async fn measure(bench: &Bench) -> anyhow::Result<()> {
    let couch = &bench.couch;
    let dbs = bench.dbs("replicate", 2);
    let [source, target] = dbs.as_slice() else { anyhow::bail!("two databases are needed") };
    couch.create_dbs(&dbs).await?;
    couch.put_doc(source, "first", json!({})).await?;
    let program = Program::start(bench, "replicate", &[]).await?;
    let replicator = json!({ "type": "replicator", "source": couch.db_url(source), "target": couch.db_url(target) });
    couch.put_doc(&program.spiegel_db, "replicator", replicator).await?;
    arrival_of(bench, target, "first", "0").await.context("the first replication")?;
    wait_until_settled(&program).await?;

    let runs_before = runs(&program).await?;
    let feed = couch.watch_feed().await?;
    let (mut over_feed, mut total) = (Vec::new(), Vec::new());
    for n in 0..WRITES {
        let (id, since) = (format!("doc{n}"), couch.last_seq(target).await?);
        let before = Instant::now();
        couch.put_doc(source, &id, json!({ "value": n })).await?;
        let written = Instant::now();
        let arrived = arrival_of(bench, target, &id, &since).await?;
        over_feed.push(ms_between(feed.first_after(source, before).await?, arrived));
        total.push(ms_between(written, arrived));
        eprintln!("  {id} after {:.0} ms", ms_between(written, arrived));
        wait_until_settled(&program).await?;
    }
    let mut figures = percentiles(&over_feed);
    // One for each write where none is wasted; the last may still be under way.
    figures["runs"] = json!(runs(&program).await? - runs_before);
    bench.report("replicate_over_feed", "ms", &program, figures);
    bench.report("replicate_total", "ms", &program, percentiles(&total));
    program.stop().await
}

/// A run that is still under way would carry the next write early.
async fn wait_until_settled(program: &Program) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        // Whatever the last write causes has begun by then.
        tokio::time::sleep(Duration::from_millis(1300)).await;
        let metrics = program.metrics().await?;
        let level = |name: &str| metrics.get(name).copied().unwrap_or_default();
        if level("spiegel_replications_running") + level("spiegel_replications_queued") == 0.0 {
            return Ok(());
        }
        anyhow::ensure!(Instant::now() < deadline, "a replication does not end");
    }
}

async fn runs(program: &Program) -> anyhow::Result<f64> {
    let metrics = program.metrics().await?;
    Ok(metrics.iter().filter(|(name, _)| name.starts_with("spiegel_replications_total")).map(|(_, count)| count).sum())
}

async fn arrival_of(bench: &Bench, db: &str, id: &str, since: &str) -> anyhow::Result<Instant> {
    let looking = async {
        let mut since = since.to_string();
        loop {
            let (ids, last_seq) = bench.couch.longpoll(db, &since).await?;
            if ids.iter().any(|found| found == id) {
                return Ok(Instant::now());
            }
            since = last_seq;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), looking).await.with_context(|| format!("{id} was not replicated"))?
}
