//! What many known, idle databases cost: memory and CPU.

use super::Bench;
use crate::program::Program;
use crate::receiver::Receiver;
use crate::report::rounded;
use serde_json::json;
use std::time::{Duration, Instant};

/// The allocator gives memory back some ten seconds after it was freed.
const CALM: Duration = Duration::from_secs(15);
const WATCHED: Duration = Duration::from_secs(30);

pub async fn measure(bench: &Bench, databases: usize, memory: bool, cpu: bool) -> anyhow::Result<()> {
    let (row, couch, receiver) = ("idle", &bench.couch, Receiver::start()?);
    let dbs = bench.dbs(row, databases);
    couch.create_dbs(&dbs).await?;
    couch.put_doc_in_each(&dbs, "first").await?;
    eprintln!("  {databases} databases are there");
    let program = Program::start(bench, row, &[]).await?;
    let at_start = program.memory_mb("VmRSS")?;
    couch.put_doc(&program.spiegel_db, "rule", bench.rule(row, &receiver, json!({ "change": "$change" }))).await?;
    receiver.wait_for_distinct(databases, Duration::from_secs(120)).await?;
    program.wait_until_passive(Duration::from_secs(120)).await?;
    eprintln!("  all delivered and passivated");
    tokio::time::sleep(CALM).await;
    if memory {
        let (now, peak) = (program.memory_mb("VmRSS")?, program.memory_mb("VmHWM")?);
        let duplicates = receiver.arrivals().duplicates;
        let figures = json!({
            "value": rounded(now), "peak": rounded(peak), "at_start": rounded(at_start),
            "databases": databases, "duplicates": duplicates,
        });
        bench.report("memory", "MB", &program, figures);
    }
    if cpu {
        let (used, requests, since) = (program.cpu_seconds()?, program.requests().await?, Instant::now());
        tokio::time::sleep(WATCHED).await;
        let percent = (program.cpu_seconds()? - used) / since.elapsed().as_secs_f64() * 100.0;
        let asked = program.requests().await?.values().sum::<f64>() - requests.values().sum::<f64>();
        let figures =
            json!({ "value": rounded(percent), "seconds": WATCHED.as_secs(), "databases": databases, "couchdb_requests": asked });
        bench.report("idle", "% of a core", &program, figures);
    }
    program.stop().await
}
