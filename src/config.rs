//! What the file may say ▶ what the program may believe.
//!
//! `layers` collects what the file, the environment and the flags say about each key of `config/default.toml`; `check` turns
//! that into `Settings` or into errors, all of them at once, each with the key's full name, where its value came from and
//! what is allowed. A password never appears in any of them.

mod check;
mod layers;
pub mod original;

use crate::couch::CouchSettings;
use ipnet::IpNet;
use original::Original;
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Every key, its default and why: the one list from which the file's keys and the environment's names are derived.
pub const DEFAULT_TOML: &str = include_str!("../config/default.toml");

/// Every setting, checked. Built only by this module.
#[derive(Debug, Clone)]
pub struct Settings {
    pub couchdb: CouchSettings,
    /// The spiegel database.
    pub db_name: String,
    /// Prefix of the sieve's design document, as in the original (for tests that share a server).
    pub namespace: String,
    pub passwords_file: Option<PathBuf>,
    pub secrets_file: Option<PathBuf>,
    pub role: Role,
    pub coexist: Coexist,
    pub roles: RoleSettings,
    pub feed: FeedSettings,
    pub debounce: DebounceSettings,
    pub db: DbSettings,
    pub webhook: WebhookSettings,
    pub deliveries: DeliverySettings,
    pub replication: ReplicationSettings,
    /// For a rule of a database or a replicator that fails: full jitter, doubling from `backoff_base` to `backoff_cap`.
    pub backoff_base: Duration,
    pub backoff_cap: Duration,
    /// The feed is not read while this many databases have work that is not yet durable.
    pub pending_databases_max: usize,
    pub admin_listen: Option<SocketAddr>,
    pub shutdown_deadline: Duration,
    pub log: LogSettings,
}

/// Which part of the work a process does. Processes of different roles meet in the documents of the spiegel database alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Everything,
    /// Marks what changed as dirty.
    UpdateListener,
    /// Takes dirty `change_listener` documents by locking them, and delivers.
    ChangeListener,
    /// Takes dirty `replicator` documents by locking them, and replicates.
    Replicator,
}

impl Role {
    pub const ALL: [Role; 4] = [Role::Everything, Role::UpdateListener, Role::ChangeListener, Role::Replicator];

    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Role::Everything => "everything",
            Role::UpdateListener => "update-listener",
            Role::ChangeListener => "change-listener",
            Role::Replicator => "replicator",
        }
    }
}

/// Whether a process that does everything works by locks, beside others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coexist {
    /// While it sees others.
    Auto,
    Always,
    Never,
}

impl Coexist {
    pub const ALL: [Coexist; 3] = [Coexist::Auto, Coexist::Always, Coexist::Never];

    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|choice| choice.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Coexist::Auto => "auto",
            Coexist::Always => "always",
            Coexist::Never => "never",
        }
    }
}

/// For a process with one role.
#[derive(Debug, Clone)]
pub struct RoleSettings {
    /// Databases that an update-listener marks together, at most.
    pub batch_size: usize,
    /// How long it gathers them, from the first one.
    pub batch_timeout: Duration,
    /// Documents that a worker has locked at once.
    pub concurrency: usize,
    /// How long somebody else's lock counts.
    pub retry_after: Duration,
    /// How often stale locks are looked for.
    pub check_stalled: Duration,
    /// So long without a renewal, and a lock of ours is a dead process's.
    pub stale_after: Duration,
    /// So long without a sign of others, and `run` works without locks again.
    pub alone_after: Duration,
}

#[derive(Debug, Clone)]
pub struct FeedSettings {
    /// The watchdog gives up on silence after two of these.
    pub heartbeat: Duration,
    pub save_seq_after: Duration,
    pub spill_after: Duration,
    pub sweep_interval: Duration,
}

#[derive(Debug, Clone)]
pub struct DebounceSettings {
    pub quiet: Duration,
    pub longest: Duration,
}

#[derive(Debug, Clone)]
pub struct DbSettings {
    pub batch_size: usize,
    pub passivate_after: Duration,
    pub assume_deleted_after: Duration,
}

#[derive(Debug, Clone)]
pub struct WebhookSettings {
    /// Requests under way, in all and to one host.
    pub concurrency: usize,
    pub concurrency_per_host: usize,
    /// None: no limit.
    pub per_second_per_host: Option<std::num::NonZeroU32>,
    pub connect_timeout: Duration,
    /// Of one attempt, from connect to the end of the answer.
    pub timeout: Duration,
    /// Fast retries before the rule is held back.
    pub fast_retries: u32,
    pub retry_base: Duration,
    pub retry_cap: Duration,
    /// So many different deliveries to one host that fail in a row open its breaker; 0: none do.
    pub breaker_threshold: u32,
    /// The pause before a probe doubles from base to cap.
    pub breaker_base: Duration,
    pub breaker_cap: Duration,
    /// The longest `Retry-After` that is granted.
    pub retry_after_cap: Duration,
    /// What only this machine and its neighbours can reach is no receiver, but for `allow_networks`.
    pub block_private_networks: bool,
    pub allow_networks: Vec<IpNet>,
    /// Certificate authorities (PEM) beside the system's.
    pub ca_file: Option<PathBuf>,
}

/// For deliveries that failed past their fast retries.
#[derive(Debug, Clone)]
pub struct DeliverySettings {
    pub retry: Retry,
    /// At once, over all rules and databases, and for one rule in one database.
    pub max: usize,
    pub max_per_rule_and_database: usize,
    /// How long what was given up stays listed.
    pub retention: Duration,
}

/// When a parked delivery is tried again; a rule's own `retry` wins.
#[derive(Debug, Clone, PartialEq)]
pub struct Retry {
    pub exponential: bool,
    pub delay: Duration,
    pub multiplier: f64,
    pub cap: Duration,
    /// None: without end.
    pub limit: Option<u32>,
    /// None: never.
    pub give_up_after: Option<Duration>,
}

#[derive(Debug, Clone)]
pub struct ReplicationSettings {
    pub engine: EngineChoice,
    pub concurrency: usize,
    pub concurrency_per_host: usize,
    pub concurrency_per_target: usize,
    pub per_second_per_host: Option<std::num::NonZeroU32>,
    /// Of one run by CouchDB.
    pub timeout: Duration,
    /// The native engine finds out how many a host bears, up to here.
    pub requests_per_host: usize,
    /// How long the native engine's checkpoints may stay behind the documents.
    pub checkpoint_after: Duration,
    /// The source's, while the target has one.
    pub source_checkpoint_after: Duration,
}

/// Who makes the runs of a replicator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineChoice {
    /// Native for whatever it can do, and CouchDB for the rest.
    Auto,
    Native,
    Couchdb,
}

impl EngineChoice {
    pub fn of(name: &str) -> Option<Self> {
        match name {
            "auto" => Some(EngineChoice::Auto),
            "native" => Some(EngineChoice::Native),
            "couchdb" => Some(EngineChoice::Couchdb),
            _ => None,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            EngineChoice::Auto => "auto",
            EngineChoice::Native => "native",
            EngineChoice::Couchdb => "couchdb",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogSettings {
    pub level: String,
    pub format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Human on a terminal, JSON otherwise.
    Auto,
    Human,
    Json,
    /// JSON as the tool `bunyan` reads it, on standard output.
    Bunyan,
}

/// What the flags said; each is a key of the file by another name, but for `config`.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Settings (each has a key in the config file and a SPIEGEL_… variable)")]
pub struct Flags {
    /// The watched CouchDB, such as http://user:password@127.0.0.1:5984
    #[arg(long, global = true, value_name = "URL")]
    pub url: Option<String>,
    /// The spiegel database [default: spiegel]
    #[arg(long, global = true, value_name = "NAME")]
    pub db_name: Option<String>,
    /// Prefix of the sieve's name, for several Spiegels on one server
    #[arg(long, global = true, value_name = "PREFIX")]
    pub namespace: Option<String>,
    /// The config file (TOML)
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// JSON file with the passwords of webhooks and replicators: { "host": { "user": "password" } }
    #[arg(long, global = true, value_name = "FILE")]
    pub passwords_file: Option<String>,
    /// JSON file with the secrets that rules name: { "name": "whsec_…" }
    #[arg(long, global = true, value_name = "FILE")]
    pub secrets_file: Option<String>,
    /// error, warn, info, debug or trace [default: info]
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// auto, human, json or bunyan [default: auto]
    #[arg(long, global = true, value_name = "FORMAT")]
    pub log_format: Option<String>,
}

/// Where settings come from, later over earlier: the file (named by `--config` or `SPIEGEL_CONFIG`), the environment, the flags. In
/// the original's way its defaults lie below the file, and its variables above our own.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    pub environment: BTreeMap<String, String>,
    pub flags: Flags,
    /// The process was started in the original's way.
    pub original: Option<Original>,
    /// The image was started without a command.
    pub is_container: bool,
}

impl Sources {
    /// The original's URL, and nothing that makes it count or says where CouchDB is instead.
    fn has_idle_url(&self) -> bool {
        let is_idle =
            self.is_container && self.original.is_none() && self.environment.get("URL").is_some_and(|text| !text.is_empty());
        let mut others = self.clone();
        others.environment.remove("URL");
        is_idle && !others.name_couchdb()
    }

    /// Whether anybody says which CouchDB, or names a file that may.
    pub fn name_couchdb(&self) -> bool {
        let variables = ["URL", "SPIEGEL_COUCHDB_URL", "SPIEGEL_COUCHDB_URL_FILE", "SPIEGEL_CONFIG"];
        let is_set = |name: &str| self.environment.get(name).is_some_and(|text| !text.is_empty());
        self.flags.url.is_some() || self.flags.config.is_some() || variables.into_iter().any(is_set)
    }
}

/// The process's own environment. A value that is not Unicode is carried along damaged, to be refused as a bad value.
pub fn environment_of_this_process() -> BTreeMap<String, String> {
    let text = |os: std::ffi::OsString| os.to_string_lossy().into_owned();
    std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect()
}

#[derive(Debug, Clone)]
pub struct Loaded {
    pub settings: Settings,
    /// Legal, but risky.
    pub warnings: Vec<String>,
    /// The config file that was read.
    pub file: Option<PathBuf>,
}

/// Everything that is wrong, a line each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<String>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for ConfigErrors {}

pub fn load(sources: Sources) -> Result<Loaded, ConfigErrors> {
    let layers = layers::collect(&sources);
    let file = layers.file.clone();
    let (settings, warnings) = check::check(layers)?;
    Ok(Loaded { settings, warnings, file })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
