//! Receivers that misbehave in every way, beside one that works, for the same changes: it must keep its speed, memory must stay
//! flat, and once they behave each document's newest state must have come, never an older one after it.

use super::Bench;
use crate::couch::FeedTimes;
use crate::hostile::{Behaviour, Hostile};
use crate::program::Program;
use crate::report::{ms_between, percentile, rounded};
use anyhow::ensure;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const DBS: usize = 40;
const DOCS_PER_DB: usize = 5;
const WRITE_EVERY: Duration = Duration::from_millis(50);
/// Parked deliveries wait by their backoff, which is as long as the receiver was away at most.
const LAST_MAX: Duration = Duration::from_secs(3_600);

struct Written {
    db: String,
    id: String,
    n: u64,
    at: Instant,
}

pub async fn measure(bench: &Bench, hostile_seconds: u64, gone_seconds: u64) -> anyhow::Result<()> {
    let couch = &bench.couch;
    let dbs = bench.dbs("hostile", DBS);
    couch.create_dbs(&dbs).await?;
    let program = Program::start(bench, "hostile", &[]).await?;
    let well = Hostile::start(Behaviour::Answers500)?;
    well.recover();
    couch.put_doc(&program.spiegel_db, "well", rule(bench, &well)).await?;
    couch.put_doc_in_each(&dbs, "first").await?;
    tokio::time::sleep(Duration::from_secs(5)).await;

    let feed = couch.watch_feed().await?;
    let mut last = BTreeMap::new();
    let mut n = 0;
    let alone = write(bench, &dbs, Duration::from_secs(60), &mut n, &mut last).await?;
    let alone = latencies(&alone, &well, &feed).await?;
    eprintln!("  alone {alone}");
    let rss_alone = program.memory_mb("VmRSS")?;

    let hostiles = Behaviour::ALL.into_iter().map(Hostile::start).collect::<anyhow::Result<Vec<_>>>()?;
    for hostile in &hostiles {
        couch.put_doc(&program.spiegel_db, hostile.behaviour.name(), rule(bench, hostile)).await?;
    }
    // The new rules begin with all that was written before them.
    tokio::time::sleep(Duration::from_secs(10)).await;
    let began = Instant::now();
    let (mut beside, mut rss) = (Vec::new(), Vec::new());
    while began.elapsed() < Duration::from_secs(hostile_seconds) {
        beside.extend(write(bench, &dbs, Duration::from_secs(10), &mut n, &mut last).await?);
        rss.push(rounded(program.memory_mb("VmRSS")?));
    }
    let beside = latencies(&beside, &well, &feed).await?;
    eprintln!("  beside {beside}, RSS {rss:?}");

    hostiles.iter().filter(|hostile| hostile.behaviour != Behaviour::IsGone).for_each(Hostile::recover);
    let mut recovered = BTreeMap::new();
    let mut is_back = false;
    let deadline = Instant::now() + LAST_MAX;
    while recovered.len() < hostiles.len() {
        if !is_back && began.elapsed() >= Duration::from_secs(gone_seconds) {
            is_back = true;
            hostiles.iter().for_each(Hostile::recover);
        }
        for hostile in &hostiles {
            let name = hostile.behaviour.name();
            if !recovered.contains_key(name) && missing(hostile, &last) == 0 {
                eprintln!("  {name} has all after {:.0} s", began.elapsed().as_secs_f64());
                recovered.insert(name, rounded(began.elapsed().as_secs_f64()));
            }
        }
        let lacks = || hostiles.iter().map(|it| (it.behaviour.name(), missing(it, &last))).collect::<Vec<_>>();
        ensure!(Instant::now() < deadline, "documents whose newest state did not come: {:?}", lacks());
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let ratio = |of: &str| {
        let p99 = |side: &Value| side[of]["p99"].as_f64().unwrap_or(f64::NAN);
        rounded(p99(&beside) / p99(&alone))
    };
    let of_each = hostiles.iter().map(|hostile| {
        let accepted = hostile.accepted();
        let name = hostile.behaviour.name();
        let figures = json!({
            "refused": hostile.refused(), "accepted": accepted.count, "repeats": accepted.repeats,
            "out_of_order": accepted.out_of_order, "followed": hostile.followed(), "all_after_s": recovered.get(name),
        });
        (name.to_string(), figures)
    });
    let figures = json!({
        "value": ratio("total"),
        "over_feed_ratio": ratio("over_feed"),
        "alone": alone,
        "beside": beside,
        "written": n,
        "receivers": of_each.collect::<serde_json::Map<_, _>>(),
        "seconds": { "hostile": hostile_seconds, "gone": gone_seconds },
        "rss_mb": { "alone": rounded(rss_alone), "beside": rss, "at_end": rounded(program.memory_mb("VmRSS")?),
            "peak": rounded(program.memory_mb("VmHWM")?) },
    });
    bench.report("hostile", "p99 beside/alone", &program, figures);
    program.stop().await
}

fn rule(bench: &Bench, receiver: &Hostile) -> Value {
    let pattern = format!("^{}_hostile_db", bench.prefix);
    let params = json!({ "change": "$change", "db": "$db_name" });
    json!({ "type": "on_change", "db_name": pattern, "url": receiver.url(), "params": params, "method": "POST" })
}

/// By database and document id, the last `n` that was written.
type Last = BTreeMap<(String, String), u64>;

async fn write(bench: &Bench, dbs: &[String], time: Duration, n: &mut u64, last: &mut Last) -> anyhow::Result<Vec<Written>> {
    let (started, mut written) = (Instant::now(), Vec::new());
    let mut pace = tokio::time::interval(WRITE_EVERY);
    while started.elapsed() < time {
        pace.tick().await;
        *n += 1;
        let turn = *n as usize;
        let (db, id) = (dbs[turn % dbs.len()].clone(), format!("doc{}", turn / dbs.len() % DOCS_PER_DB));
        let at = Instant::now();
        bench.couch.overwrite(&db, &id, json!({ "n": *n })).await?;
        last.insert((db.clone(), id.clone()), *n);
        written.push(Written { db, id, n: *n, at });
    }
    Ok(written)
}

/// From the write, and from the feed's row, to the receiver that works.
async fn latencies(written: &[Written], well: &Hostile, feed: &FeedTimes) -> anyhow::Result<Value> {
    let (mut total, mut over_feed) = (Vec::new(), Vec::new());
    for Written { db, id, n, at } in written {
        let deadline = Instant::now() + Duration::from_secs(30);
        let arrival = loop {
            let arrival = well.accepted().arrival(db, id, *n);
            if let Some(arrival) = arrival {
                break arrival;
            }
            ensure!(Instant::now() < deadline, "{n} of {id} in {db} did not come");
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        total.push(ms_between(*at, arrival));
        over_feed.push(ms_between(feed.first_after(db, *at).await?, arrival));
    }
    let figures = |samples: &[f64]| json!({ "p50": percentile(samples, 0.5), "p99": percentile(samples, 0.99), "max": percentile(samples, 1.0), "samples": samples.len() });
    Ok(json!({ "total": figures(&total), "over_feed": figures(&over_feed) }))
}

fn missing(hostile: &Hostile, last: &Last) -> usize {
    let accepted = hostile.accepted();
    last.iter().filter(|((db, id), n)| accepted.last(db, id) != Some(**n)).count()
}
