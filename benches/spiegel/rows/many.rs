//! Many replicators of which some run each second: neither lag nor memory may grow.
//!
//! Without other sides: `_replicate` makes a few runs a second, and CouchDB keeps 500 continuous jobs.

use super::Bench;
use crate::couch::{FeedTimes, Watch};
use crate::program::{Program, cpu_seconds_of, cpu_seconds_of_all};
use crate::report::{ms_between, percentile, rounded};
use crate::sides::{Side, requests_since};
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

const CHANGES_PER_SECOND: u64 = 100;
const FIRST_PASS_MAX: Duration = Duration::from_secs(1_800);
/// What has not come by then does not come.
const LAST_MAX: Duration = Duration::from_secs(90);
/// More writes are not under way at once: CouchDB then takes fewer than it is offered, and the figure says so.
const WRITES_MAX: usize = 64;
const REPLICATORS_PER_BULK: usize = 1_000;

#[derive(Debug, Clone, Copy)]
pub struct Size {
    pub replicators: usize,
    pub targets: usize,
    pub minutes: u64,
}

#[derive(Default)]
struct Seen {
    /// By the document's id.
    written: HashMap<String, Written>,
    arrived: HashMap<String, Instant>,
}

struct Written {
    db: String,
    asked: Instant,
    answered: Instant,
}

/// Seconds used so far.
struct Cpu {
    spiegel: f64,
    bench: f64,
    all: f64,
    at: Instant,
}

impl Cpu {
    fn of(program: &Program) -> anyhow::Result<Self> {
        let (spiegel, bench, all) = (program.cpu_seconds()?, cpu_seconds_of("self")?, cpu_seconds_of_all()?);
        Ok(Self { spiegel, bench, all, at: Instant::now() })
    }

    /// Of one core.
    fn percent_since(&self, before: &Self) -> Value {
        let seconds = self.at.duration_since(before.at).as_secs_f64();
        let percent = |used: f64| rounded(used / seconds * 100.0);
        let (spiegel, bench) = (self.spiegel - before.spiegel, self.bench - before.bench);
        let rest = self.all - before.all - spiegel - bench;
        json!({ "spiegel": percent(spiegel), "bench": percent(bench), "couchdb_and_the_rest": percent(rest) })
    }
}

type Shared = Arc<Mutex<Seen>>;

fn locked(seen: &Shared) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

pub async fn measure(bench: &Bench, size: Size) -> anyhow::Result<()> {
    let couch = &bench.couch;
    let (sources, targets) = (bench.dbs("many", size.replicators), bench.dbs("many_target", size.targets));
    let targets_made = tokio::time::timeout(Duration::from_secs(3_600), async {
        couch.create_dbs(&targets).await?;
        couch.create_dbs(&sources).await?;
        couch.put_docs(&sources.iter().enumerate().map(|(n, db)| (db, format!("first{n}"))).collect::<Vec<_>>()).await
    });
    targets_made.await.context("make the databases")??;
    eprintln!("  {} databases are there", size.replicators);
    let program = Program::start(bench, "many", &[Side::Native.engine()]).await?;
    let at_start = program.memory_mb("VmRSS")?;
    let first_pass = first_pass(bench, &program, &sources, &targets).await?;
    eprintln!("  replicated for the first time in {first_pass:.0} s");
    // The checkpoints, and what the allocator gives back.
    tokio::time::sleep(Duration::from_secs(20)).await;

    let seen = Shared::default();
    let reading = tokio::spawn(note_arrivals(couch.watch(&targets).await?, seen.clone()));
    let feed = couch.watch_feed().await?;
    let (before, started) = (program.requests().await?, Instant::now());
    let (requests_at_first, rss_after_first_pass) = (before.clone(), program.memory_mb("VmRSS")?);
    let mut minutes = Vec::new();
    let (mut requests, mut cpu) = (before, Cpu::of(&program)?);
    for minute in 0..size.minutes {
        let refused = write_for_a_minute(bench, &sources, minute, &seen).await;
        let (requests_now, cpu_now) = (program.requests().await?, Cpu::of(&program)?);
        let asked = requests_since(&requests, &requests_now);
        let mut figures = of_minute(&seen, &feed, minute);
        figures["rss_mb"] = json!(rounded(program.memory_mb("VmRSS")?));
        figures["cpu_percent"] = cpu_now.percent_since(&cpu);
        let written = figures["written"].as_f64().unwrap_or_default().max(1.0);
        figures["couchdb_requests_per_change"] = json!(rounded(asked.values().sum::<f64>() / written));
        figures["by_endpoint"] = asked.iter().map(|(name, count)| (name.clone(), json!(rounded(count / written)))).collect();
        figures["writes_refused"] = json!(refused);
        eprintln!("  minute {minute}: {figures}");
        minutes.push(figures);
        (requests, cpu) = (requests_now, cpu_now);
    }
    let deadline = Instant::now() + LAST_MAX;
    while missing(&seen) > 0 && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    // What was under way when its minute ended has come since.
    for (minute, figures) in minutes.iter_mut().enumerate() {
        if let (Value::Object(figures), Value::Object(told)) = (figures, of_minute(&seen, &feed, minute as u64)) {
            figures.extend(told);
        }
    }
    let written = locked(&seen).written.len();
    let all = all_lags(&seen);
    program.wait_until_settled(LAST_MAX).await?;
    tokio::time::sleep(Duration::from_secs(7)).await;
    let asked = requests_since(&requests_at_first, &program.requests().await?);
    reading.abort();
    let figures = json!({
        "value": percentile(&all, 0.5),
        "p99": percentile(&all, 0.99),
        "max": percentile(&all, 1.0),
        "replicators": size.replicators,
        "targets": size.targets,
        "written": written,
        "missing": missing(&seen),
        "seconds": rounded(started.elapsed().as_secs_f64()),
        "minutes": minutes,
        "first_pass_seconds": rounded(first_pass),
        "rss_mb": {
            "at_start": rounded(at_start),
            "after_first_pass": rounded(rss_after_first_pass),
            "at_end": rounded(program.memory_mb("VmRSS")?),
            "peak": rounded(program.memory_mb("VmHWM")?),
        },
        "couchdb_requests_per_change": rounded(asked.values().sum::<f64>() / written.max(1) as f64),
        "requests_by_endpoint": asked,
        "replications": program.replications().await?,
    });
    bench.report("many", "ms", &program, figures);
    program.stop().await
}

/// Seconds until each has run once.
async fn first_pass(bench: &Bench, program: &Program, sources: &[String], targets: &[String]) -> anyhow::Result<f64> {
    let couch = &bench.couch;
    let replicators: Vec<Value> = sources
        .iter()
        .zip(targets.iter().cycle())
        .enumerate()
        .map(|(n, (source, target))| {
            let (source, target) = (couch.db_url(source), couch.db_url(target));
            json!({ "_id": format!("replicator{n:05}"), "type": "replicator", "source": source, "target": target })
        })
        .collect();
    let started = Instant::now();
    for some in replicators.chunks(REPLICATORS_PER_BULK) {
        couch.bulk_docs(&program.spiegel_db, some.to_vec()).await?;
    }
    loop {
        let mut there = 0;
        for target in targets {
            there += couch.doc_count(target).await?;
        }
        if there >= sources.len() as u64 {
            break;
        }
        ensure!(started.elapsed() < FIRST_PASS_MAX, "{there} of {} databases after {FIRST_PASS_MAX:?}", sources.len());
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let seconds = started.elapsed().as_secs_f64();
    program.wait_until_settled(FIRST_PASS_MAX).await?;
    Ok(seconds)
}

async fn note_arrivals(mut watch: Watch, seen: Shared) {
    while let Ok(arrived) = watch.next().await {
        locked(&seen).arrived.entry(arrived.id).or_insert(arrived.at);
    }
}

/// One write each hundredth of a second, to databases in an order of chance; how many were refused.
async fn write_for_a_minute(bench: &Bench, sources: &[String], minute: u64, seen: &Shared) -> usize {
    let places = Arc::new(Semaphore::new(WRITES_MAX));
    let mut ticks = tokio::time::interval(Duration::from_millis(1000 / CHANGES_PER_SECOND));
    let mut order: Vec<&String> = Vec::new();
    let mut writing = tokio::task::JoinSet::new();
    let end = Instant::now() + Duration::from_secs(60);
    let mut n = 0;
    while Instant::now() < end {
        ticks.tick().await;
        if order.is_empty() {
            order = sources.iter().collect();
            fastrand::shuffle(&mut order);
        }
        let Some(db) = order.pop().cloned() else { break };
        let Ok(place) = places.clone().acquire_owned().await else { break };
        let (couch, seen, id) = (bench.couch.clone(), seen.clone(), format!("minute{minute:03}_{n:05}"));
        n += 1;
        writing.spawn(async move {
            let _place = place;
            let asked = Instant::now();
            let answer = couch.put_doc(&db, &id, json!({})).await;
            if answer.is_ok() {
                locked(&seen).written.insert(id, Written { db, asked, answered: Instant::now() });
            }
            answer
        });
    }
    let answers = writing.join_all().await;
    answers.iter().filter_map(|answer| answer.as_ref().err()).inspect(|error| eprintln!("  {error:#}")).count()
}

/// What the feed itself takes is CouchDB's; the rest, from its row to the target, is ours.
fn of_minute(seen: &Shared, feed: &FeedTimes, minute: u64) -> Value {
    let prefix = format!("minute{minute:03}_");
    let seen = locked(seen);
    let (mut lags, mut of_feed, mut over_feed) = (Vec::new(), Vec::new(), Vec::new());
    let mut count = 0;
    for (id, written) in seen.written.iter().filter(|(id, _)| id.starts_with(&prefix)) {
        count += 1;
        // The row may come before the answer to the write.
        let row = feed.seen_after(&written.db, written.asked);
        of_feed.extend(row.map(|row| ms_between(written.answered, row)));
        if let Some(arrived) = seen.arrived.get(id) {
            lags.push(ms_between(written.answered, *arrived));
            over_feed.extend(row.map(|row| ms_between(row, *arrived)));
        }
    }
    json!({
        "written": count,
        "missing": count - lags.len(),
        "p50_ms": percentile(&lags, 0.5),
        "p99_ms": percentile(&lags, 0.99),
        "max_ms": percentile(&lags, 1.0),
        "feed_p50_ms": percentile(&of_feed, 0.5),
        "feed_p99_ms": percentile(&of_feed, 0.99),
        "over_feed_p50_ms": percentile(&over_feed, 0.5),
        "over_feed_p99_ms": percentile(&over_feed, 0.99),
    })
}

fn all_lags(seen: &Shared) -> Vec<f64> {
    let seen = locked(seen);
    seen.written.iter().filter_map(|(id, written)| Some(ms_between(written.answered, *seen.arrived.get(id)?))).collect()
}

fn missing(seen: &Shared) -> usize {
    let seen = locked(seen);
    seen.written.keys().filter(|id| !seen.arrived.contains_key(*id)).count()
}
