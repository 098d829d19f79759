//! The measured program, as a child process.

use crate::rows::Bench;
use anyhow::{Context, bail, ensure};
use std::collections::BTreeMap;
use std::net::TcpListener;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};

const START_MAX: Duration = Duration::from_secs(60);
/// Linux counts CPU time for `/proc` in hundredths of a second on every platform that we measure on.
const TICKS_PER_SECOND: f64 = 100.0;

pub struct Program {
    child: Child,
    pid: u32,
    admin: String,
    /// What differs from the defaults.
    pub settings: BTreeMap<String, String>,
    pub spiegel_db: String,
}

impl Program {
    /// Starts it and waits until it is ready. `name` keeps the rows' rules and positions apart.
    pub async fn start(bench: &Bench, name: &str, changed: &[(&str, &str)]) -> anyhow::Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0").context("find a free port")?.local_addr()?.port();
        let admin = format!("127.0.0.1:{port}");
        let spiegel_db = bench.spiegel_db(name);
        let mut command = Command::new(&bench.binary);
        command.args(["run", "--install"]);
        for (variable, _) in std::env::vars().filter(|(variable, _)| variable.starts_with("SPIEGEL_")) {
            command.env_remove(variable);
        }
        command
            .env("SPIEGEL_COUCHDB_URL", &bench.url)
            .env("SPIEGEL_DB_NAME", &spiegel_db)
            .env("SPIEGEL_NAMESPACE", format!("{}_{name}_", bench.prefix))
            .env("SPIEGEL_ADMIN_LISTEN", &admin)
            .env("SPIEGEL_LOG_LEVEL", "warn");
        let changed = changed.iter().map(|(key, value)| (key.to_string(), value.to_string()));
        let settings: BTreeMap<String, String> = changed.chain(given_settings()).collect();
        command.envs(&settings).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit()).kill_on_drop(true);
        let child = command.spawn().with_context(|| format!("start {}", bench.binary.display()))?;
        let pid = child.id().context("the program ended at once")?;
        let mut program = Self { child, pid, admin, settings, spiegel_db };
        program.wait_until_ready().await?;
        Ok(program)
    }

    async fn wait_until_ready(&mut self) -> anyhow::Result<()> {
        let url = format!("http://{}/ready", self.admin);
        let deadline = Instant::now() + START_MAX;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                bail!("the program ended: {status}");
            }
            if reqwest::get(&url).await.is_ok_and(|answer| answer.status().is_success()) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bail!("the program is not ready after {START_MAX:?}")
    }

    pub async fn stop(mut self) -> anyhow::Result<()> {
        let stopped = Command::new("kill").arg(self.pid.to_string()).status().await.context("run kill")?;
        ensure!(stopped.success(), "cannot stop the program");
        let status = tokio::time::timeout(Duration::from_secs(20), self.child.wait()).await.context("wait for its end")??;
        ensure!(status.success(), "the program ended with {status}");
        Ok(())
    }

    /// A run that is still under way would carry the next write early.
    pub async fn wait_until_settled(&self, patience: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            // Whatever the last write causes has begun by then.
            tokio::time::sleep(Duration::from_millis(1300)).await;
            let metrics = self.metrics().await?;
            let level = |name: &str| metrics.get(name).copied().unwrap_or_default();
            let (running, queued) = (level("spiegel_replications_running"), level("spiegel_replications_queued"));
            if running + queued == 0.0 {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{running} replications run and {queued} wait after {patience:?}");
        }
    }

    /// Replications that have ended so far, by outcome.
    pub async fn replications(&self) -> anyhow::Result<BTreeMap<String, f64>> {
        let metrics = self.metrics().await?;
        let label =
            |name: &str| Some(name.strip_prefix("spiegel_replications_total{outcome=\"")?.strip_suffix("\"}")?.to_string());
        Ok(metrics.iter().filter_map(|(name, count)| Some((label(name)?, *count))).collect())
    }

    /// Every line of `/metrics`, by its name with its labels.
    pub async fn metrics(&self) -> anyhow::Result<BTreeMap<String, f64>> {
        let page = reqwest::get(format!("http://{}/metrics", self.admin)).await?.text().await?;
        let lines = page.lines().filter(|line| !line.starts_with('#'));
        Ok(lines.filter_map(|line| line.rsplit_once(' ')).filter_map(|(k, v)| Some((k.to_string(), v.parse().ok()?))).collect())
    }

    /// Requests to CouchDB so far, by endpoint.
    pub async fn requests(&self) -> anyhow::Result<BTreeMap<String, f64>> {
        let mut by_endpoint = BTreeMap::new();
        for (name, value) in self.metrics().await? {
            let Some(labels) = name.strip_prefix("spiegel_couchdb_requests_total{") else { continue };
            let endpoint =
                labels.split_once("endpoint=\"").and_then(|(_, rest)| rest.split_once('"')).map_or("", |(name, _)| name);
            *by_endpoint.entry(endpoint.to_string()).or_default() += value;
        }
        Ok(by_endpoint)
    }

    /// Until no database has an actor: all of them are passivated.
    pub async fn wait_until_passive(&self, patience: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            let metrics = self.metrics().await?;
            let level = |name: &str| metrics.get(name).copied().unwrap_or_default();
            let (actors, pending) = (level("spiegel_db_actors"), level("spiegel_pending_databases"));
            if actors + pending == 0.0 {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{actors} databases are busy and {pending} pending after {patience:?}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// A figure of `/proc/<pid>/status` in MB, such as `VmRSS` or `VmHWM`.
    pub fn memory_mb(&self, field: &str) -> anyhow::Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).context("read the program's memory")?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let kb: f64 =
            line.and_then(|line| line.split_whitespace().next()).and_then(|kb| kb.parse().ok()).context("no such field")?;
        Ok(kb / 1024.0)
    }

    pub fn cpu_seconds(&self) -> anyhow::Result<f64> {
        cpu_seconds_of(&self.pid.to_string())
    }
}

/// So that one figure can be compared for several settings: SPIEGEL_BENCH_SET="SPIEGEL_DB_BATCH_SIZE=500 …".
pub fn given_settings() -> BTreeMap<String, String> {
    let given = std::env::var("SPIEGEL_BENCH_SET").unwrap_or_default();
    let pairs = given.split_whitespace().filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (key.to_string(), value.to_string())).collect()
}

/// User and system time of a process by its id, or of this one as `self`.
pub fn cpu_seconds_of(process: &str) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).context("read a process's CPU time")?;
    // The name before the last bracket may hold spaces; user and system time are the 14th and 15th field.
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).context("an unknown form of stat");
    Ok((ticks(11)? + ticks(12)?) / TICKS_PER_SECOND)
}

/// What all processes of the machine used so far.
pub fn cpu_seconds_of_all() -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat").context("read the machine's CPU time")?;
    let line = stat.lines().next().context("an empty stat")?;
    let ticks: Vec<f64> = line.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    // Idle and waiting for a disk stand fourth and fifth; guests after the eighth are counted as user time already.
    Ok(ticks.iter().take(8).enumerate().filter(|(at, _)| !matches!(at, 3 | 4)).map(|(_, ticks)| ticks).sum::<f64>()
        / TICKS_PER_SECOND)
}
