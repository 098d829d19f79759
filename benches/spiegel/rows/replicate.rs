//! Write → replicated: until the document is in the target, of one database that changes now and then.
//!
//! Warm; and cold, which is the first run of a process.

use super::Bench;
use crate::couch::FeedTimes;
use crate::program::Program;
use crate::report::{ms_between, percentiles};
use crate::sides::{self, Contender, Side, requests_since};
use anyhow::Context;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::time::{Duration, Instant};

const WRITES: usize = 20;
const STARTS: usize = 5;
const ARRIVAL_MAX: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Measured {
    over_feed: Vec<f64>,
    total: Vec<f64>,
}

pub async fn measure(bench: &Bench, sides: &[Side]) -> anyhow::Result<()> {
    let mut contenders = Vec::new();
    for side in sides {
        let contender = Contender::start(bench, "replicate", *side, 2, vec![(0, 1)]).await?;
        let requests = contender.requests().await?;
        contenders.push((contender, requests, Measured::default()));
    }
    let feed = bench.couch.watch_feed().await?;
    for n in 0..WRITES {
        for (contender, _, measured) in &mut contenders {
            write(bench, &feed, contender, &format!("warm{n}"), measured).await.context(contender.side.name())?;
            pause(contender).await?;
        }
    }
    let (mut over_feed, mut total) = (Vec::new(), Vec::new());
    for (contender, requests, measured) in &contenders {
        contender.settle().await?;
        let mut of_side = percentiles(&measured.over_feed);
        contender.account(&mut of_side, requests.as_ref(), WRITES).await?;
        over_feed.push((contender.side.name(), of_side));
        total.push((contender.side.name(), percentiles(&measured.total)));
    }
    sides::report(bench, "replicate_over_feed", "ms", json!({}), &over_feed);
    sides::report(bench, "replicate_total", "ms", json!({}), &total);
    let contenders = contenders.into_iter().map(|(contender, ..)| contender).collect();
    cold(bench, &feed, contenders).await
}

async fn cold(bench: &Bench, feed: &FeedTimes, contenders: Vec<Contender>) -> anyhow::Result<()> {
    let mut programs = Vec::new();
    for mut contender in contenders {
        match contender.program.take() {
            Some(program) => {
                program.stop().await?;
                programs.push((contender, Measured::default(), Value::Null));
            }
            None => contender.stop(bench).await?,
        }
    }
    for n in 0..STARTS {
        for (contender, measured, last) in &mut programs {
            let program =
                Program::start(bench, &format!("replicate_{}", contender.side.name()), &[contender.side.engine()]).await?;
            program.wait_until_settled(ARRIVAL_MAX).await?;
            // It reads again what the feed told since the position was saved; that is no run of the measured kind.
            let (runs, requests) = (program.replications().await?, program.requests().await?);
            write(bench, feed, contender, &format!("cold{n}"), measured).await.context(contender.side.name())?;
            program.wait_until_settled(ARRIVAL_MAX).await?;
            *last = json!({ "runs_before": runs, "requests_by_endpoint": requests_since(&requests, &program.requests().await?) });
            program.stop().await?;
        }
    }
    let figures: Vec<_> = programs
        .iter()
        .map(|(contender, measured, last)| {
            let mut of_side = percentiles(&measured.over_feed);
            of_side["total_ms"] = percentiles(&measured.total);
            of_side["last"] = last.clone();
            (contender.side.name(), of_side)
        })
        .collect();
    sides::report(bench, "replicate_cold_over_feed", "ms", json!({}), &figures);
    Ok(())
}

async fn write(bench: &Bench, feed: &FeedTimes, contender: &Contender, id: &str, into: &mut Measured) -> anyhow::Result<()> {
    let (couch, source) = (&bench.couch, &contender.dbs[0]);
    let mut watch = couch.watch(&contender.dbs[1..]).await?;
    let before = Instant::now();
    couch.put_doc(source, id, json!({})).await?;
    let written = Instant::now();
    let arrived = watch.last_of(HashSet::from([(0, id.to_string())]), ARRIVAL_MAX).await?;
    into.over_feed.push(ms_between(feed.first_after(source, before).await?, arrived));
    into.total.push(ms_between(written, arrived));
    eprintln!("  {} {id} after {:.0} ms", contender.side.name(), ms_between(written, arrived));
    Ok(())
}

/// The next write comes to a database that rests, out of step with the feed's own half second.
async fn pause(contender: &Contender) -> anyhow::Result<()> {
    if let Some(program) = &contender.program {
        program.wait_until_settled(ARRIVAL_MAX).await?;
    }
    tokio::time::sleep(Duration::from_millis(fastrand::u64(0..500))).await;
    Ok(())
}
