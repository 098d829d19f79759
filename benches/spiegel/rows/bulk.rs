//! Many documents of one database into an empty one: small ones, and large ones for the memory that they take.
//!
//! `_replicate` is asked directly. It sleeps up to five seconds before it begins, so each side is also told from the moment
//! when the target had its first documents.

use super::Bench;
use crate::program::Program;
use crate::report::{percentile, percentiles, rounded};
use crate::sides::{self, Side, requests_since};
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const SMALL: Shape = Shape { row: "bulk", bytes: 300, bulk: 1_000 };
/// CouchDB takes up to 8 MB by default.
const LARGE: Shape = Shape { row: "bulk_large", bytes: 4 * 1024 * 1024, bulk: 4 };
const LARGE_DOCUMENTS: usize = 50;
const LOOK_EACH: Duration = Duration::from_millis(50);
const ROUND_MAX: Duration = Duration::from_secs(600);

struct Shape {
    row: &'static str,
    bytes: usize,
    bulk: usize,
}

#[derive(Default)]
struct Measured {
    rates: Vec<f64>,
    from_first: Vec<f64>,
    seconds: Vec<f64>,
    /// By the answer's own start and end, in whole seconds.
    by_history: Vec<f64>,
}

pub async fn small(bench: &Bench, sides: &[Side], documents: usize, rounds: usize) -> anyhow::Result<()> {
    measure(bench, sides, &SMALL, documents, rounds).await
}

pub async fn large(bench: &Bench, sides: &[Side]) -> anyhow::Result<()> {
    measure(bench, sides, &LARGE, LARGE_DOCUMENTS, 1).await
}

async fn measure(bench: &Bench, sides: &[Side], shape: &Shape, documents: usize, rounds: usize) -> anyhow::Result<()> {
    let (couch, source) = (&bench.couch, format!("{}_{}_source", bench.prefix, shape.row));
    couch.create_db(&source).await?;
    for start in (0..documents).step_by(shape.bulk) {
        let docs = (start..documents.min(start + shape.bulk)).map(|n| document(n, shape.bytes));
        couch.bulk_docs(&source, docs.collect()).await?;
    }
    ensure!(couch.doc_count(&source).await? == documents as u64, "not every document was written");
    eprintln!("  {documents} documents of {} bytes are there", shape.bytes);
    let program = Program::start(bench, shape.row, &[Side::Native.engine()]).await?;
    // CouchDB is still busy with the documents a moment later.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let (at_start, requests, cpu) = (program.memory_mb("VmHWM")?, program.requests().await?, program.cpu_seconds()?);
    let mut measured: Vec<(Side, Measured)> = sides.iter().map(|side| (*side, Measured::default())).collect();
    for n in 0..rounds {
        for (side, measured) in &mut measured {
            let target = format!("{}_{}_target_{}{n}", bench.prefix, shape.row, side.name());
            round(bench, &program, *side, (&source, &target), documents, measured).await.context(side.name())?;
            eprintln!("  {} {:.0} documents/s", side.name(), measured.rates.last().copied().unwrap_or_default());
            couch.delete_db(&target).await?;
            tokio::time::sleep(Duration::from_secs(3)).await;
        }
    }
    let mut figures = Vec::new();
    for (side, measured) in &measured {
        let mut of_side = percentiles(&measured.rates);
        of_side["seconds"] = json!(percentile(&measured.seconds, 0.5));
        of_side["from_first_documents"] = json!(percentile(&measured.from_first, 0.5));
        if *side == Side::Couchdb {
            of_side["by_history"] = json!(percentile(&measured.by_history, 0.5));
        }
        if *side == Side::Native {
            let asked = requests_since(&requests, &program.requests().await?);
            of_side["couchdb_requests"] = json!(rounded(asked.values().sum::<f64>() / rounds as f64));
            of_side["requests_by_endpoint"] = json!(asked);
            of_side["replications"] = json!(program.replications().await?);
            of_side["rss_at_start_mb"] = json!(rounded(at_start));
            of_side["rss_peak_mb"] = json!(rounded(program.memory_mb("VmHWM")?));
            of_side["cpu_seconds"] = json!(rounded((program.cpu_seconds()? - cpu) / rounds as f64));
        }
        // Its `_replicate` is asked directly here.
        figures.push((if *side == Side::Couchdb { "_replicate" } else { side.name() }, of_side));
    }
    sides::report(bench, shape.row, "documents/s", json!({ "documents": documents, "bytes": shape.bytes }), &figures);
    couch.delete_db(&source).await?;
    program.stop().await
}

async fn round(
    bench: &Bench,
    program: &Program,
    side: Side,
    (source, target): (&str, &str),
    documents: usize,
    into: &mut Measured,
) -> anyhow::Result<()> {
    let couch = &bench.couch;
    couch.create_db(target).await?;
    let mut doc = json!({ "source": couch.db_url(source), "target": couch.db_url(target) });
    let started = Instant::now();
    let (home, id) = match side {
        Side::Native => {
            doc["type"] = json!("replicator");
            (program.spiegel_db.as_str(), target)
        }
        Side::Replicator => {
            doc["continuous"] = json!(true);
            ("_replicator", target)
        }
        Side::Couchdb => ("", ""),
    };
    let run = async {
        match side {
            Side::Couchdb => couch.replicate(source, target).await.map(Some),
            _ => couch.put_doc(home, id, doc).await.map(|()| None),
        }
    };
    let (answer, times) = tokio::join!(run, times(bench, target, documents));
    let (answer, (first, last)) = (answer?, times?);
    let seconds = last.duration_since(started).as_secs_f64();
    into.seconds.push(seconds);
    into.rates.push(documents as f64 / seconds);
    let (first, had) = first;
    let rest = last.duration_since(first).as_secs_f64();
    if rest > 0.0 {
        into.from_first.push((documents as u64 - had) as f64 / rest);
    }
    into.by_history.extend(answer.and_then(|answer| by_history(&answer)));
    match side {
        Side::Couchdb => Ok(()),
        _ => {
            if side == Side::Native {
                program.wait_until_settled(ROUND_MAX).await?;
            }
            couch.delete_doc(home, id).await
        }
    }
}

/// When there were some documents, and how many; and when there were all.
async fn times(bench: &Bench, target: &str, documents: usize) -> anyhow::Result<((Instant, u64), Instant)> {
    let (started, mut first) = (Instant::now(), None);
    loop {
        let (count, now) = (bench.couch.doc_count(target).await?, Instant::now());
        if count > 0 {
            first.get_or_insert((now, count));
        }
        if count >= documents as u64 {
            return Ok((first.unwrap_or((now, count)), now));
        }
        ensure!(started.elapsed() < ROUND_MAX, "{count} of {documents} documents after {ROUND_MAX:?}");
        tokio::time::sleep(LOOK_EACH).await;
    }
}

fn by_history(answer: &Value) -> Option<f64> {
    let run = &answer["history"][0];
    let time = |name: &str| httpdate::parse_http_date(run[name].as_str()?).ok();
    let seconds = time("end_time")?.duration_since(time("start_time")?).ok()?.as_secs_f64();
    (seconds > 0.0).then_some(run["docs_written"].as_f64()? / seconds)
}

fn document(n: usize, bytes: usize) -> Value {
    let mut doc = json!({ "_id": format!("doc{n:08}"), "type": "bench", "n": n, "text": "" });
    let missing = bytes.saturating_sub(doc.to_string().len());
    doc["text"] = match bytes {
        // What does not shrink much on disk.
        100_000.. => (0..missing).map(|_| fastrand::alphanumeric()).collect::<String>().into(),
        _ => "x".repeat(missing).into(),
    };
    doc
}
