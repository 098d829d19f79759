//! Catch-up of one database: a new rule meets many documents. The receiver runs on the same machine.

use super::Bench;
use crate::program::{Program, cpu_seconds_of, cpu_seconds_of_all};
use crate::receiver::Receiver;
use crate::report::rounded;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Webhooks of 1 KB, with what is said of the change.
const DOCUMENT_BYTES: usize = 960;
const BULK: usize = 1_000;

pub async fn measure(bench: &Bench, documents: usize) -> anyhow::Result<()> {
    let (couch, receiver) = (&bench.couch, Receiver::start()?);
    let dbs = bench.dbs("catchup", 1);
    couch.create_dbs(&dbs).await?;
    for start in (0..documents).step_by(BULK) {
        couch.bulk_docs(&dbs[0], (start..documents.min(start + BULK)).map(document).collect()).await?;
    }
    anyhow::ensure!(couch.doc_count(&dbs[0]).await? == documents as u64, "not every document was written");
    let program = Program::start(bench, "catchup", &[]).await?;
    // CouchDB is still busy with the documents a moment later.
    couch.at_rest().await?;

    let requests_before = program.requests().await?.values().sum::<f64>();
    let (spiegel, bench_itself, all) = (program.cpu_seconds()?, cpu_seconds_of("self")?, cpu_seconds_of_all()?);
    let started = Instant::now();
    couch.put_doc(&program.spiegel_db, "rule", bench.rule("catchup", &receiver, json!({ "change": "$change" }))).await?;
    receiver.wait_for_distinct(documents, Duration::from_secs(300)).await?;
    let (spiegel, bench_itself, all) =
        (program.cpu_seconds()? - spiegel, cpu_seconds_of("self")? - bench_itself, cpu_seconds_of_all()? - all);
    // A repeat would come after the page that it belongs to.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let requests = program.requests().await?.values().sum::<f64>() - requests_before;

    let (first, last, duplicates, body_bytes) = {
        let arrivals = receiver.arrivals();
        let times = || arrivals.all.iter().map(|arrival| arrival.at);
        (times().min().unwrap_or(started), times().max().unwrap_or(started), arrivals.duplicates, arrivals.body_bytes)
    };
    let whole = last.duration_since(started).as_secs_f64();
    let figures = json!({
        "value": rounded(documents as f64 / whole),
        "from_first_webhook": rounded(documents as f64 / last.duration_since(first).as_secs_f64()),
        "seconds": rounded(whole),
        "webhooks": receiver.count(),
        "duplicates": duplicates,
        "mean_body_bytes": body_bytes / receiver.count().max(1),
        "couchdb_requests": requests,
        "cpu_seconds": {
            "spiegel": rounded(spiegel),
            "receiver": rounded(bench_itself),
            "couchdb_and_the_rest": rounded(all - spiegel - bench_itself),
        },
    });
    bench.report("catchup", "webhooks/s", &program, figures);
    program.stop().await
}

fn document(n: usize) -> Value {
    let mut doc = json!({ "_id": format!("doc{n:08}"), "type": "bench", "n": n, "text": "" });
    let missing = DOCUMENT_BYTES.saturating_sub(doc.to_string().len());
    doc["text"] = Value::from("x".repeat(missing));
    doc
}
