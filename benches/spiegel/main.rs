//! Measures the built program against a real CouchDB, one JSON line a row (DESIGN.md, section 14).
//!
//! `cargo bench --bench spiegel -- --url http://admin:password@127.0.0.1:5984 [--binary FILE] [--rows webhook,memory]`
//!
//! The program runs as a child process with its defaults, but for what a row says in `settings`. Every database of a run has the
//! run's prefix and is deleted at its end, an error's, Ctrl-C's or SIGTERM's too. Figures go to stdout, progress to stderr.

// It takes variables of its own, and not the program's settings.
#![allow(clippy::disallowed_methods)]

mod couch;
mod hostile;
mod program;
mod receiver;
mod report;
mod rows;
mod sides;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use couch::Couch;
use rows::Bench;
use sides::Side;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::signal::unix::{SignalKind, signal};

/// As the program has it: `deliveries` runs a part of it in here.
#[cfg(not(target_env = "msvc"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[derive(Debug, Parser)]
#[command(name = "spiegel-bench", about = "Measures Spiegel against a real CouchDB, one JSON line a row")]
struct Args {
    /// The CouchDB to measure against, with an admin's user and password
    #[arg(long, env = "SPIEGEL_BENCH_COUCHDB_URL")]
    url: String,
    /// The program to measure
    #[arg(long, default_value = env!("CARGO_BIN_EXE_spiegel"))]
    binary: PathBuf,
    /// Which rows, in the order in which they run
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Row::value_variants().to_vec())]
    rows: Vec<Row>,
    /// Documents of `catchup` and `deliveries`
    #[arg(long, default_value_t = 20_000)]
    documents: usize,
    /// Databases that `memory` and `idle` know
    #[arg(long, default_value_t = 1_000)]
    databases: usize,
    /// Who replicates, for the rows that put several side by side
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Side::value_variants().to_vec())]
    sides: Vec<Side>,
    /// Rounds of `fanin`, `fanout`, `bulk` and `deliveries`
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Databases of `fanin` that change at the same moment
    #[arg(long, default_value_t = 100)]
    fan_in: usize,
    /// Documents of `bulk`
    #[arg(long, default_value_t = 50_000)]
    bulk_documents: usize,
    /// The attachment's size
    #[arg(long, default_value_t = 1_024)]
    attachment_mb: u64,
    /// Replicators of `many`
    #[arg(long, default_value_t = 1_000)]
    replicators: usize,
    /// Targets that the replicators of `many` share; each is read all the time
    #[arg(long, default_value_t = 10)]
    targets: usize,
    /// How long `many` writes
    #[arg(long, default_value_t = 2)]
    minutes: u64,
    /// How long the receivers of `hostile` misbehave
    #[arg(long, default_value_t = 60)]
    hostile_seconds: u64,
    /// How long the one that is gone stays away
    #[arg(long, default_value_t = 90)]
    gone_seconds: u64,
    /// cargo's own flag
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Row {
    /// From the feed's row to the webhook
    Webhook,
    /// From the write to the document in the target
    Replicate,
    /// Many databases change at once: until all documents are in one target
    Fanin,
    /// One write: until it is in 49 targets
    Fanout,
    /// Documents a second from one database to an empty one
    Bulk,
    /// The same with documents of 4 MB, for the memory
    BulkLarge,
    /// One large attachment: time and memory
    Attachment,
    /// Many replicators, of which a hundred a second have something to do
    Many,
    /// CouchDB requests for one changed database
    Requests,
    /// Webhooks a second from one database with many changes
    Catchup,
    /// The same without CouchDB: from changes that were read already, plain and signed
    Deliveries,
    /// Receivers that fail, hang and flood beside one that works: its speed, the memory, and whether all comes in the end
    Hostile,
    /// Which of a thousand rules a change concerns, in this process
    Matching,
    /// Resident memory with many idle databases
    Memory,
    /// CPU with many idle databases
    Idle,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    // Two threads, as the machine of section 14 has cores; the receiver has its own.
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(run(args))
}

async fn run(args: Args) -> anyhow::Result<()> {
    let couch = Couch::new(&args.url)?;
    let version = couch.version().await.context("ask CouchDB for its version")?;
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).context("read the clock")?;
    let prefix = format!("bench_{:x}", since_epoch.as_millis());
    eprintln!("CouchDB {version}, {}, databases {prefix}_…", args.binary.display());
    let bench =
        Bench { couch: couch.clone(), couchdb_version: version, url: args.url.clone(), binary: args.binary.clone(), prefix };
    let mut terminated = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let measured = tokio::select! {
        measured = measure(&bench, &args) => measured,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        _ = terminated.recv() => Err(anyhow::anyhow!("terminated")),
    };
    eprintln!("cleaning up");
    couch.delete_everything_of(&bench.prefix).await.context("clean up")?;
    measured
}

async fn measure(bench: &Bench, args: &Args) -> anyhow::Result<()> {
    let wanted = |row: Row| args.rows.contains(&row);
    let mut sides = args.sides.clone();
    sides.sort_unstable();
    sides.dedup();
    for row in &args.rows {
        eprintln!("{row:?}");
        match row {
            Row::Webhook => rows::webhook::measure(bench).await.context("webhook")?,
            Row::Replicate => rows::replicate::measure(bench, &sides).await.context("replicate")?,
            Row::Fanin => rows::fanin::measure(bench, &sides, args.fan_in, args.rounds).await.context("fanin")?,
            Row::Fanout => rows::fanout::measure(bench, &sides, args.rounds).await.context("fanout")?,
            Row::Bulk => rows::bulk::small(bench, &sides, args.bulk_documents, args.rounds).await.context("bulk")?,
            Row::BulkLarge => rows::bulk::large(bench, &sides).await.context("bulk-large")?,
            Row::Attachment => rows::attachment::measure(bench, &sides, args.attachment_mb).await.context("attachment")?,
            Row::Many => {
                let size = rows::many::Size { replicators: args.replicators, targets: args.targets, minutes: args.minutes };
                rows::many::measure(bench, size).await.context("many")?;
            }
            Row::Requests => rows::requests::measure(bench).await.context("requests")?,
            Row::Deliveries => {
                rows::deliveries::measure(bench, args.documents, args.rounds).await.context("deliveries")?;
            }
            Row::Catchup => rows::catchup::measure(bench, args.documents).await.context("catchup")?,
            Row::Hostile => {
                rows::hostile::measure(bench, args.hostile_seconds, args.gone_seconds).await.context("hostile")?;
            }
            Row::Matching => rows::matching::measure(bench).context("matching")?,
            // Both need the same thousand databases, which take longest to make.
            Row::Memory => rows::idle::measure(bench, args.databases, true, wanted(Row::Idle)).await.context("memory")?,
            Row::Idle if wanted(Row::Memory) => {}
            Row::Idle => rows::idle::measure(bench, args.databases, false, true).await.context("idle")?,
        }
    }
    Ok(())
}
