//! Many databases change at the same moment; all their documents are in one target.

use super::Bench;
use crate::report::{ms_between, percentile, percentiles};
use crate::sides::{self, Contender, JOBS_MAX, Side};
use anyhow::Context;
use serde_json::json;
use std::time::{Duration, Instant};

const ROUND_MAX: Duration = Duration::from_secs(300);

#[derive(Default)]
struct Measured {
    total: Vec<f64>,
    /// Until the last write was answered.
    writes: Vec<f64>,
    /// After the feed's last row: what is the replicator's own part.
    over_feed: Vec<f64>,
}

pub async fn measure(bench: &Bench, sides: &[Side], databases: usize, rounds: usize) -> anyhow::Result<()> {
    let mut contenders = Vec::new();
    for side in sides {
        if *side == Side::Replicator && databases > JOBS_MAX {
            eprintln!("  no continuous jobs for {databases} databases");
            continue;
        }
        let pairs = (0..databases).map(|n| (n, databases)).collect();
        let contender = Contender::start(bench, &format!("fanin{databases}"), *side, databases + 1, pairs).await?;
        let requests = contender.requests().await?;
        contenders.push((contender, requests, Measured::default()));
    }
    for n in 0..rounds {
        for (contender, _, measured) in &mut contenders {
            round(bench, contender, databases, n, measured).await.context(contender.side.name())?;
            contender.settle().await?;
        }
    }
    let mut figures = Vec::new();
    for (contender, requests, measured) in &contenders {
        let mut of_side = percentiles(&measured.total);
        of_side["writes_ms"] = json!(percentile(&measured.writes, 0.5));
        of_side["over_feed_ms"] = json!(percentile(&measured.over_feed, 0.5));
        contender.account(&mut of_side, requests.as_ref(), rounds).await?;
        figures.push((contender.side.name(), of_side));
    }
    sides::report(bench, "fanin", "ms", json!({ "databases": databases }), &figures);
    for (contender, ..) in contenders {
        contender.stop(bench).await?;
    }
    Ok(())
}

async fn round(bench: &Bench, contender: &Contender, databases: usize, n: usize, into: &mut Measured) -> anyhow::Result<()> {
    let couch = &bench.couch;
    let (sources, target) = contender.dbs.split_at(databases);
    let docs: Vec<_> = sources.iter().enumerate().map(|(db, source)| (source, format!("round{n}_{db}"))).collect();
    let wanted = docs.iter().map(|(_, id)| (0, id.clone())).collect();
    let feed = couch.watch_feed().await?;
    let mut watch = couch.watch(target).await?;
    couch.open_connections().await?;
    // Out of step with the feed's own half second.
    tokio::time::sleep(Duration::from_millis(fastrand::u64(0..500))).await;
    let before = Instant::now();
    let (written, arrived) = tokio::join!(
        async {
            couch.put_docs(&docs).await?;
            anyhow::Ok(Instant::now())
        },
        watch.last_of(wanted, ROUND_MAX)
    );
    let (written, arrived) = (written?, arrived?);
    // The last row may have a moment to come.
    tokio::time::sleep(Duration::from_millis(600)).await;
    let told = sources.iter().filter_map(|source| feed.seen_after(source, before)).max();
    into.total.push(ms_between(before, arrived));
    into.writes.push(ms_between(before, written));
    into.over_feed.extend(told.map(|told| ms_between(told, arrived)));
    eprintln!(
        "  {} after {:.0} ms, written in {:.0} ms",
        contender.side.name(),
        ms_between(before, arrived),
        ms_between(before, written)
    );
    Ok(())
}
