//! Who replicates: what the rows of replication put side by side, each with databases of its own.
//!
//! All of them are there all the time, and only one is written to at a time.

use crate::program::{Program, given_settings};
use crate::report::{self, rounded};
use crate::rows::Bench;
use anyhow::{Context, ensure};
use clap::ValueEnum;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// In the order in which they are measured: half a minute after a change CouchDB's jobs write their checkpoints, which then
/// falls into the long runs of `_replicate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Side {
    /// Spiegel, speaking the protocol itself
    Native,
    /// No Spiegel: a continuous job in `_replicator` for each pair
    Replicator,
    /// Spiegel, posting to `_replicate`
    Couchdb,
}

impl Side {
    pub fn name(self) -> &'static str {
        match self {
            Side::Native => "native",
            Side::Replicator => "replicator",
            Side::Couchdb => "couchdb",
        }
    }

    pub fn engine(self) -> (&'static str, &'static str) {
        ("SPIEGEL_REPLICATION_ENGINE", self.name())
    }
}

/// CouchDB starts no more than this many jobs at defaults without making others wait (`max_jobs` is 500 for all users of it).
pub const JOBS_MAX: usize = 100;
/// A first run of many replicators by `_replicate` takes seconds each, twenty at a time.
const FIRST_RUNS: Duration = Duration::from_secs(600);
/// Checkpoints that are written behind are written by then.
const CHECKPOINTS: Duration = Duration::from_secs(7);

pub struct Contender {
    pub side: Side,
    pub program: Option<Program>,
    pub dbs: Vec<String>,
    /// By their places in `dbs`.
    pub pairs: Vec<(usize, usize)>,
    /// Of the documents in `_replicator`.
    name: String,
}

impl Contender {
    /// Makes the databases, and waits until each pair has been replicated once.
    pub async fn start(bench: &Bench, row: &str, side: Side, dbs: usize, pairs: Vec<(usize, usize)>) -> anyhow::Result<Self> {
        let couch = &bench.couch;
        let row = format!("{row}_{}", side.name());
        let name = format!("{}_{row}", bench.prefix);
        let dbs = bench.dbs(&row, dbs);
        couch.create_dbs(&dbs).await?;
        let firsts: Vec<_> = pairs.iter().map(|(source, _)| (&dbs[*source], format!("first{source}"))).collect();
        couch.put_docs(&unique(firsts)).await?;
        let replicators = pairs.iter().enumerate().map(|(n, (source, target))| {
            let (source, target) = (couch.db_url(&dbs[*source]), couch.db_url(&dbs[*target]));
            match side {
                Side::Replicator => {
                    json!({ "_id": format!("{name}_{n:05}"), "source": source, "target": target, "continuous": true })
                }
                _ => json!({ "_id": format!("replicator{n:05}"), "type": "replicator", "source": source, "target": target }),
            }
        });
        let replicators: Vec<Value> = replicators.collect();
        let program = match side {
            Side::Replicator => {
                couch.bulk_docs("_replicator", replicators).await?;
                None
            }
            _ => {
                let program = Program::start(bench, &row, &[side.engine()]).await?;
                couch.bulk_docs(&program.spiegel_db, replicators).await?;
                Some(program)
            }
        };
        let contender = Self { side, program, dbs, pairs, name };
        contender.wait_for_the_first_runs(bench).await.context("the first replication of each pair")?;
        eprintln!("  {row}: {} pairs are replicated", contender.pairs.len());
        Ok(contender)
    }

    async fn wait_for_the_first_runs(&self, bench: &Bench) -> anyhow::Result<()> {
        let deadline = Instant::now() + FIRST_RUNS;
        let mut expected: BTreeMap<usize, u64> = BTreeMap::new();
        for (_, target) in &self.pairs {
            *expected.entry(*target).or_default() += 1;
        }
        for (target, docs) in expected {
            while bench.couch.doc_count(&self.dbs[target]).await? < docs {
                ensure!(Instant::now() < deadline, "they take more than {FIRST_RUNS:?}");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
        if self.program.is_none() {
            while bench.couch.replications_in_state(&self.name, "running").await? < self.pairs.len() {
                ensure!(Instant::now() < deadline, "not all jobs are running after {FIRST_RUNS:?}");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        self.settle().await
    }

    /// Until nothing of this side's is under way, its checkpoints included.
    pub async fn settle(&self) -> anyhow::Result<()> {
        if let Some(program) = &self.program {
            program.wait_until_settled(FIRST_RUNS).await?;
        }
        tokio::time::sleep(CHECKPOINTS).await;
        Ok(())
    }

    pub async fn requests(&self) -> anyhow::Result<Option<BTreeMap<String, f64>>> {
        match &self.program {
            Some(program) => program.requests().await.map(Some),
            None => Ok(None),
        }
    }

    /// What a program tells of itself when all is done.
    pub async fn account(
        &self,
        figures: &mut Value,
        before: Option<&BTreeMap<String, f64>>,
        rounds: usize,
    ) -> anyhow::Result<()> {
        let (Some(program), Some(before)) = (&self.program, before) else { return Ok(()) };
        let asked = requests_since(before, &program.requests().await?);
        figures["couchdb_requests"] = json!(rounded(asked.values().sum::<f64>() / rounds as f64));
        figures["requests_by_endpoint"] =
            asked.into_iter().map(|(endpoint, count)| (endpoint, json!(rounded(count / rounds as f64)))).collect();
        figures["replications"] = json!(program.replications().await?);
        figures["rss_peak_mb"] = json!(rounded(program.memory_mb("VmHWM")?));
        Ok(())
    }

    pub async fn stop(self, bench: &Bench) -> anyhow::Result<()> {
        match self.program {
            Some(program) => program.stop().await,
            None => bench.couch.delete_docs_of("_replicator", &self.name).await,
        }
    }
}

/// One source may stand in several pairs.
fn unique(mut docs: Vec<(&String, String)>) -> Vec<(&String, String)> {
    docs.sort_unstable();
    docs.dedup();
    docs
}

pub fn requests_since(before: &BTreeMap<String, f64>, after: &BTreeMap<String, f64>) -> BTreeMap<String, f64> {
    let since =
        after.iter().map(|(endpoint, count)| (endpoint.clone(), count - before.get(endpoint).copied().unwrap_or_default()));
    since.filter(|(_, count)| *count > 0.0).collect()
}

/// One line with all sides; `value` and the ratios are the first's.
pub fn report(bench: &Bench, name: &str, unit: &str, more: Value, sides: &[(&str, Value)]) {
    let Some((first, figures)) = sides.first() else { return };
    let mut line = Map::new();
    line.insert(String::from("value"), figures["value"].clone());
    if let Value::Object(more) = more {
        line.extend(more);
    }
    let ratio = |other: &Value| Some(rounded(figures["value"].as_f64()? / other["value"].as_f64()?));
    let ratios = sides.iter().skip(1).map(|(name, other)| (format!("{first}/{name}"), json!(ratio(other))));
    line.insert(String::from("ratios"), ratios.collect());
    let figures = sides.iter().map(|(side, figures)| (side.to_string(), figures.clone()));
    line.insert(String::from("sides"), figures.collect());
    report::row(name, unit, &bench.couchdb_version, &given_settings(), Value::Object(line));
}
