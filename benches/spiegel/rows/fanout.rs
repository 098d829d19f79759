//! One write; it is in the last of many targets.

use super::Bench;
use crate::report::{ms_between, percentile, percentiles};
use crate::sides::{self, Contender, Side};
use anyhow::Context;
use serde_json::json;
use std::time::{Duration, Instant};

const TARGETS: usize = 49;
const ROUND_MAX: Duration = Duration::from_secs(120);

pub async fn measure(bench: &Bench, sides: &[Side], rounds: usize) -> anyhow::Result<()> {
    let mut contenders = Vec::new();
    for side in sides {
        let pairs = (0..TARGETS).map(|n| (TARGETS, n)).collect();
        let contender = Contender::start(bench, "fanout", *side, TARGETS + 1, pairs).await?;
        let requests = contender.requests().await?;
        contenders.push((contender, requests, Vec::new(), Vec::new()));
    }
    for n in 0..rounds {
        for (contender, _, total, over_feed) in &mut contenders {
            let (after, after_feed) = round(bench, contender, n).await.context(contender.side.name())?;
            eprintln!("  {} after {after:.0} ms", contender.side.name());
            total.push(after);
            over_feed.extend(after_feed);
            contender.settle().await?;
        }
    }
    let mut figures = Vec::new();
    for (contender, requests, total, over_feed) in &contenders {
        let mut of_side = percentiles(total);
        of_side["over_feed_ms"] = json!(percentile(over_feed, 0.5));
        contender.account(&mut of_side, requests.as_ref(), rounds).await?;
        figures.push((contender.side.name(), of_side));
    }
    sides::report(bench, "fanout", "ms", json!({ "targets": TARGETS }), &figures);
    for (contender, ..) in contenders {
        contender.stop(bench).await?;
    }
    Ok(())
}

/// Since the write was sent, and since the feed told of it.
async fn round(bench: &Bench, contender: &Contender, n: usize) -> anyhow::Result<(f64, Option<f64>)> {
    let couch = &bench.couch;
    let (targets, source) = contender.dbs.split_at(TARGETS);
    let source = source.first().context("a source")?;
    let id = format!("round{n}");
    let wanted = (0..TARGETS).map(|target| (target, id.clone())).collect();
    let feed = couch.watch_feed().await?;
    let mut watch = couch.watch(targets).await?;
    // Out of step with the feed's own half second.
    tokio::time::sleep(Duration::from_millis(fastrand::u64(0..500))).await;
    let before = Instant::now();
    couch.put_doc(source, &id, json!({ "value": n })).await?;
    let arrived = watch.last_of(wanted, ROUND_MAX).await?;
    tokio::time::sleep(Duration::from_millis(600)).await;
    Ok((ms_between(before, arrived), feed.seen_after(source, before).map(|told| ms_between(told, arrived))))
}
