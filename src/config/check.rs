//! From what was said to what may be believed: types, ranges, and pairs that contradict each other.

use super::layers::{Given, Layers, Origin, Raw, URL_KEY, Unit};
use super::{
    Coexist, ConfigErrors, DbSettings, DebounceSettings, DeliverySettings, EngineChoice, FeedSettings, LogFormat, LogSettings,
    ReplicationSettings, Retry, Role, RoleSettings, Settings, WebhookSettings,
};
use crate::couch::CouchSettings;
use crate::vault::split_credentials;
use ipnet::IpNet;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;
use url::Url;

const NONE: Duration = Duration::ZERO;
/// The shortest pause or patience that is not a slip of the pen.
const MOMENT: Duration = Duration::from_millis(1);
/// Longer ones overflow somebody's clock, and mean "never", which no setting here can promise.
const YEAR: Duration = Duration::from_secs(366 * 24 * 3600);
/// A host that is back after a day without a probe would be thought lost.
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Below this a heartbeat is load, and every hiccup of the network a reconnect.
const HEARTBEAT_MIN: Duration = Duration::from_millis(100);
/// Who wrote a mark is known two seconds after it.
const ALONE_MIN: Duration = Duration::from_secs(5);
/// A page of more changes than this no longer fits comfortably into memory with its documents.
const BATCH_MAX: u64 = 10_000;
/// A process has about a thousand file descriptors by default; more than this is a slip of the pen everywhere.
const CONCURRENCY_MAX: u64 = 10_000;
/// CouchDB keeps a database's name in a file's name.
const DB_NAME_CHARS_MAX: usize = 238;

pub(super) fn check(layers: Layers) -> Result<(Settings, Vec<String>), ConfigErrors> {
    let mut reader = Reader::new(layers);
    let settings = reader.settings();
    match settings {
        Some(settings) if reader.errors.is_empty() => Ok((settings, reader.warnings)),
        _ => Err(ConfigErrors(reader.errors)),
    }
}

struct Reader {
    values: BTreeMap<String, Given>,
    defaults: BTreeMap<String, Raw>,
    /// Keys whose value was refused: no pair is judged by them.
    refused: BTreeSet<String>,
    errors: Vec<String>,
    warnings: Vec<String>,
}

impl Reader {
    fn new(layers: Layers) -> Self {
        Self {
            values: layers.values,
            defaults: layers.defaults,
            refused: BTreeSet::new(),
            errors: layers.errors,
            warnings: layers.warnings,
        }
    }

    /// None where the URL is unusable; a refused value elsewhere stands in with its default, so that all errors are found.
    fn settings(&mut self) -> Option<Settings> {
        let couchdb = self.couchdb();
        let settings = Settings {
            couchdb: couchdb?,
            db_name: self.db_name(),
            namespace: self.namespace(),
            passwords_file: self.path("passwords_file"),
            secrets_file: self.path("secrets_file"),
            role: self.role(),
            coexist: self.coexist(),
            roles: RoleSettings {
                batch_size: self.size("roles.batch_size", 1..=BATCH_MAX),
                batch_timeout: self.duration("roles.batch_timeout", NONE..=YEAR),
                concurrency: self.size("roles.concurrency", 1..=CONCURRENCY_MAX),
                retry_after: self.duration("roles.retry_after", MOMENT..=YEAR),
                check_stalled: self.duration("roles.check_stalled", MOMENT..=YEAR),
                stale_after: self.duration("roles.stale_after", HEARTBEAT_MIN..=YEAR),
                alone_after: self.duration("roles.alone_after", ALONE_MIN..=YEAR),
            },
            feed: FeedSettings {
                heartbeat: self.duration("feed.heartbeat", HEARTBEAT_MIN..=YEAR),
                save_seq_after: self.duration("feed.save_seq_after", MOMENT..=YEAR),
                spill_after: self.duration("feed.spill_after", MOMENT..=YEAR),
                sweep_interval: self.duration("feed.sweep_interval", Duration::from_secs(1)..=YEAR),
            },
            debounce: DebounceSettings {
                quiet: self.duration("debounce.quiet", NONE..=YEAR),
                longest: self.duration("debounce.longest", NONE..=YEAR),
            },
            db: DbSettings {
                batch_size: self.size("db.batch_size", 1..=BATCH_MAX),
                passivate_after: self.duration("db.passivate_after", MOMENT..=YEAR),
                assume_deleted_after: self.duration("db.assume_deleted_after", MOMENT..=YEAR),
            },
            webhook: self.webhook(),
            deliveries: self.deliveries(),
            replication: ReplicationSettings {
                engine: self.engine(),
                concurrency: self.size("replication.concurrency", 1..=CONCURRENCY_MAX),
                concurrency_per_host: self.size_within("replication.concurrency_per_host", "replication.concurrency"),
                concurrency_per_target: self
                    .size_within("replication.concurrency_per_target", "replication.concurrency_per_host"),
                per_second_per_host: self.rate("replication.per_second_per_host"),
                timeout: self.duration("replication.timeout", MOMENT..=YEAR),
                requests_per_host: self.size("replication.requests_per_host", 2..=CONCURRENCY_MAX),
                checkpoint_after: self.duration("replication.checkpoint_after", MOMENT..=YEAR),
                source_checkpoint_after: self.duration("replication.source_checkpoint_after", MOMENT..=YEAR),
            },
            backoff_base: self.duration("backoff.base", MOMENT..=YEAR),
            backoff_cap: self.duration("backoff.cap", MOMENT..=YEAR),
            pending_databases_max: self.size("limits.pending_databases", 1..=100_000_000),
            admin_listen: self.listen(),
            shutdown_deadline: self.duration("shutdown.deadline", MOMENT..=YEAR),
            log: LogSettings { level: self.log_level(), format: self.log_format() },
        };
        self.contradictions(&settings);
        self.risks(&settings);
        Some(settings)
    }

    fn webhook(&mut self) -> WebhookSettings {
        WebhookSettings {
            concurrency: self.size("webhook.concurrency", 1..=CONCURRENCY_MAX),
            concurrency_per_host: self.size_within("webhook.concurrency_per_host", "webhook.concurrency"),
            per_second_per_host: self.rate("webhook.per_second_per_host"),
            connect_timeout: self.duration("webhook.connect_timeout", MOMENT..=YEAR),
            timeout: self.duration("webhook.timeout", MOMENT..=YEAR),
            fast_retries: u32::try_from(self.number("webhook.fast_retries", 0..=100)).unwrap_or_default(),
            retry_base: self.duration("webhook.retry_base", MOMENT..=YEAR),
            retry_cap: self.duration("webhook.retry_cap", MOMENT..=YEAR),
            breaker_threshold: u32::try_from(self.number("webhook.breaker_threshold", 0..=1_000)).unwrap_or_default(),
            breaker_base: self.duration("webhook.breaker_base", MOMENT..=DAY),
            breaker_cap: self.duration("webhook.breaker_cap", MOMENT..=DAY),
            retry_after_cap: self.duration("webhook.retry_after_cap", MOMENT..=DAY),
            block_private_networks: self.switch("webhook.block_private_networks"),
            allow_networks: self.networks("webhook.allow_networks"),
            ca_file: self.path("webhook.ca_file"),
        }
    }

    fn contradictions(&mut self, settings: &Settings) {
        let Settings { couchdb, debounce, webhook, .. } = settings;
        self.at_most("debounce.quiet", debounce.quiet, "debounce.longest", debounce.longest);
        self.at_most("webhook.retry_base", webhook.retry_base, "webhook.retry_cap", webhook.retry_cap);
        self.at_most("webhook.breaker_base", webhook.breaker_base, "webhook.breaker_cap", webhook.breaker_cap);
        self.at_most("backoff.base", settings.backoff_base, "backoff.cap", settings.backoff_cap);
        // The later clock of each pair runs while connecting too, so a longer connect_timeout would never be reached.
        self.at_most("webhook.connect_timeout", webhook.connect_timeout, "webhook.timeout", webhook.timeout);
        self.at_most("couchdb.connect_timeout", couchdb.connect_timeout, "couchdb.read_timeout", couchdb.read_timeout);
    }

    fn risks(&mut self, settings: &Settings) {
        let url = &self.values[URL_KEY];
        if let (Origin::Flag { .. }, true) = (&url.origin, settings.couchdb.credentials.is_some()) {
            self.warnings.push(String::from(
                "the password in --url can be read in the process list; SPIEGEL_COUCHDB_URL or SPIEGEL_COUCHDB_URL_FILE hide it",
            ));
        }
        let risks = [
            (
                settings.debounce.longest >= settings.feed.spill_after,
                "debounce.longest is not below feed.spill_after: every burst of changes is written down as dirty before it is worked on",
            ),
            (
                settings.shutdown_deadline >= Duration::from_secs(10),
                "shutdown.deadline is 10s or more: Docker kills a container 10s after asking it to stop, unless told otherwise",
            ),
            (
                settings.feed.heartbeat > Duration::from_secs(60),
                "feed.heartbeat is over 1m: proxies cut connections that are silent for so long, and a dead node is noticed late",
            ),
            (
                settings.feed.sweep_interval > Duration::from_secs(24 * 3600),
                "feed.sweep_interval is over a day: what _global_changes loses is found only then",
            ),
            (
                !settings.webhook.allow_networks.is_empty() && !settings.webhook.block_private_networks,
                "webhook.allow_networks says nothing as long as webhook.block_private_networks is false",
            ),
        ];
        self.warnings.extend(risks.iter().filter(|(is_so, _)| *is_so).map(|(_, text)| (*text).to_string()));
    }

    fn deliveries(&mut self) -> DeliverySettings {
        let strategy = self.text("deliveries.retry_strategy");
        if !matches!(strategy.as_str(), "linear" | "exponential") {
            let (_, shown) = self.given("deliveries.retry_strategy");
            self.refuse("deliveries.retry_strategy", format!("{shown} is no strategy: \"linear\" or \"exponential\""));
        }
        let limit = u32::try_from(self.number("deliveries.retry_limit", 0..=1_000_000)).unwrap_or_default();
        let gives_up = !self.text("deliveries.give_up_after").is_empty();
        DeliverySettings {
            retry: Retry {
                exponential: strategy != "linear",
                delay: self.duration("deliveries.retry_delay", MOMENT..=YEAR),
                multiplier: self.factor("deliveries.retry_multiplier", 1.0..=100.0),
                cap: self.duration("deliveries.retry_cap", MOMENT..=YEAR),
                limit: (limit > 0).then_some(limit),
                give_up_after: gives_up.then(|| self.duration("deliveries.give_up_after", MOMENT..=YEAR)),
            },
            max: self.size("deliveries.max", 0..=10_000_000),
            max_per_rule_and_database: self.size("deliveries.max_per_rule_and_database", 0..=10_000_000),
            retention: self.duration("deliveries.retention", MOMENT..=YEAR),
        }
    }

    // -- one kind of value each --

    fn refuse(&mut self, key: &str, problem: impl fmt::Display) {
        self.refused.insert(key.to_string());
        if let Some(given) = self.values.get(key) {
            self.errors.push(format!("{key} ({}): {problem}", given.origin));
        }
    }

    fn given(&self, key: &str) -> (Raw, String) {
        match self.values.get(key) {
            Some(given) => (given.raw.clone(), given.shown(key)),
            // Not in default.toml: a test walks every key, so this is never seen.
            None => (Raw::Other("missing key"), String::from("nothing")),
        }
    }

    fn text(&mut self, key: &str) -> String {
        match self.given(key) {
            (Raw::Text(text), _) => text,
            (_, shown) => {
                self.refuse(key, format!("{shown} is not a text: write it in double quotes"));
                self.default_text(key)
            }
        }
    }

    fn default_text(&self, key: &str) -> String {
        match self.defaults.get(key) {
            Some(Raw::Text(text)) => text.clone(),
            _ => String::new(),
        }
    }

    fn path(&mut self, key: &str) -> Option<PathBuf> {
        Some(self.text(key)).filter(|path| !path.is_empty()).map(PathBuf::from)
    }

    fn switch(&mut self, key: &str) -> bool {
        let (raw, shown) = self.given(key);
        let parsed = match &raw {
            Raw::Boolean(is_so) => Some(*is_so),
            // The environment knows only texts.
            Raw::Text(text) if !matches!(self.values[key].origin, Origin::File { .. }) => text.trim().parse().ok(),
            _ => None,
        };
        parsed.unwrap_or_else(|| {
            self.refuse(key, format!("{shown} is neither true nor false, without quotes"));
            matches!(self.defaults.get(key), Some(Raw::Boolean(true)))
        })
    }

    fn duration(&mut self, key: &str, allowed: RangeInclusive<Duration>) -> Duration {
        let parsed = match self.given(key) {
            (Raw::Text(text), _) => humantime::parse_duration(text.trim()).ok(),
            (Raw::Counted { text, unit }, shown) => return self.counted(key, &text, &shown, unit, allowed),
            _ => None,
        };
        let (_, shown) = self.given(key);
        match parsed {
            Some(duration) if allowed.contains(&duration) => return duration,
            Some(_) => {
                let (min, max) = (humantime::format_duration(*allowed.start()), humantime::format_duration(*allowed.end()));
                self.refuse(key, format!("{shown} is out of range: allowed is from {min} to {max}"));
            }
            None => {
                self.refuse(
                    key,
                    format!("{shown} is not a duration: write a number with its unit, such as \"250ms\", \"5s\" or \"1h\""),
                );
            }
        }
        humantime::parse_duration(&self.default_text(key)).unwrap_or_default()
    }

    /// The original's numbers. Its zeros mean "at once", where the shortest that is allowed here is as good.
    fn counted(&mut self, key: &str, text: &str, shown: &str, unit: Unit, allowed: RangeInclusive<Duration>) -> Duration {
        let number = text.trim().parse::<f64>().ok().filter(|number| number.is_finite() && *number >= 0.0);
        let seconds = number.map(|number| if unit == Unit::Seconds { number } else { number / 1000.0 });
        let (min, max) = (*allowed.start(), *allowed.end());
        match seconds.map(Duration::try_from_secs_f64) {
            Some(Ok(duration)) if duration <= max => return duration.max(min),
            Some(_) => self.refuse(key, format!("{shown} is out of range: allowed are at most {} seconds", max.as_secs())),
            None => self.refuse(key, format!("{shown} is not a number of {}", unit.name())),
        }
        min
    }

    fn number(&mut self, key: &str, allowed: RangeInclusive<u64>) -> u64 {
        let (raw, shown) = self.given(key);
        let parsed = match &raw {
            Raw::Integer(number) => Some(i128::from(*number)),
            // The environment knows only texts; the file's numbers are without quotes.
            Raw::Text(text) if !matches!(self.values[key].origin, Origin::File { .. }) => text.trim().parse::<i128>().ok(),
            _ => None,
        };
        let (min, max) = (allowed.start(), allowed.end());
        match parsed.map(u64::try_from) {
            Some(Ok(number)) if allowed.contains(&number) => return number,
            Some(_) => self.refuse(key, format!("{shown} is out of range: allowed is from {min} to {max}")),
            None => self.refuse(key, format!("{shown} is not a whole number: allowed is from {min} to {max}, without quotes")),
        }
        match self.defaults.get(key) {
            Some(Raw::Integer(number)) => u64::try_from(*number).unwrap_or_default(),
            _ => *min,
        }
    }

    fn factor(&mut self, key: &str, allowed: RangeInclusive<f64>) -> f64 {
        let (raw, shown) = self.given(key);
        let parsed = match &raw {
            Raw::Integer(number) => Some(*number as f64),
            Raw::Float(number) => Some(*number),
            Raw::Text(text) if !matches!(self.values[key].origin, Origin::File { .. }) => text.trim().parse().ok(),
            _ => None,
        };
        let (min, max) = (allowed.start(), allowed.end());
        match parsed {
            Some(number) if allowed.contains(&number) => return number,
            Some(_) => self.refuse(key, format!("{shown} is out of range: allowed is from {min} to {max}")),
            None => self.refuse(key, format!("{shown} is not a number: allowed is from {min} to {max}, without quotes")),
        }
        *min
    }

    fn size(&mut self, key: &str, allowed: RangeInclusive<u64>) -> usize {
        usize::try_from(self.number(key, allowed)).unwrap_or(usize::MAX)
    }

    /// The share of one host. Where only the whole was set, and below the share's default, the share follows it.
    fn size_within(&mut self, share_key: &str, whole_key: &str) -> usize {
        let share = self.size(share_key, 1..=CONCURRENCY_MAX);
        if self.refused.contains(whole_key) {
            return share;
        }
        let whole = self.size(whole_key, 1..=CONCURRENCY_MAX);
        match self.values[share_key].origin {
            Origin::Default => share.min(whole),
            _ => {
                self.at_most(share_key, share, whole_key, whole);
                share
            }
        }
    }

    fn rate(&mut self, key: &str) -> Option<NonZeroU32> {
        NonZeroU32::new(u32::try_from(self.number(key, 0..=1_000_000)).unwrap_or_default())
    }

    fn at_most<T: PartialOrd>(&mut self, key: &str, value: T, limit_key: &str, limit: T) {
        if value <= limit || self.refused.contains(key) || self.refused.contains(limit_key) {
            return;
        }
        let (shown, limit_given) = (self.given(key).1, &self.values[limit_key]);
        let problem = format!(
            "{shown} is more than {limit_key} = {} ({}): it may be at most that",
            limit_given.shown(limit_key),
            limit_given.origin
        );
        self.refuse(key, problem);
    }

    // -- the keys with rules of their own --

    fn couchdb(&mut self) -> Option<CouchSettings> {
        let connect_timeout = self.duration("couchdb.connect_timeout", MOMENT..=YEAR);
        let read_timeout = self.duration("couchdb.read_timeout", MOMENT..=YEAR);
        let text = self.text(URL_KEY);
        let url = match couchdb_url(&text) {
            Ok(url) => url,
            Err(problem) => {
                self.refuse(URL_KEY, problem);
                // Never used: an error is recorded. It lets the other keys be judged.
                Url::parse(&self.default_text(URL_KEY)).ok()?
            }
        };
        if !url.username().is_empty() && url.password().is_none() {
            self.warnings.push(format!("{URL_KEY} names a user but no password"));
        }
        let (url, credentials) = split_credentials(url);
        Some(CouchSettings { url, credentials, connect_timeout, read_timeout })
    }

    fn db_name(&mut self) -> String {
        let name = self.text("db_name");
        if !self.refused.contains("db_name") && !is_db_name(&name) {
            let (_, shown) = self.given("db_name");
            self.refuse(
                "db_name",
                format!(
                    "{shown} is not a name that CouchDB takes: a lower-case letter first, then lower-case letters, digits \
                     and _$()+-/, at most {DB_NAME_CHARS_MAX} in all"
                ),
            );
        }
        name
    }

    fn namespace(&mut self) -> String {
        let namespace = self.text("namespace");
        let is_legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if namespace.len() > DB_NAME_CHARS_MAX || !namespace.chars().all(is_legal) {
            let (_, shown) = self.given("namespace");
            self.refuse("namespace", format!("{shown} may hold letters, digits and _-. only, or nothing"));
        }
        namespace
    }

    /// A network, or a single address, each.
    fn networks(&mut self, key: &str) -> Vec<IpNet> {
        let text = self.text(key);
        let parse = |item: &str| item.parse().or_else(|_| item.parse::<IpAddr>().map(IpNet::from));
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
        items.map(parse).collect::<Result<Vec<IpNet>, _>>().unwrap_or_else(|_| {
            let (_, shown) = self.given(key);
            self.refuse(key, format!("{shown} is not a list of networks, such as \"10.1.0.0/16, fd00::/8\""));
            Vec::new()
        })
    }

    fn listen(&mut self) -> Option<SocketAddr> {
        let text = self.text("admin.listen");
        if text.is_empty() {
            return None;
        }
        let parsed = text.parse().ok();
        if parsed.is_none() {
            let (_, shown) = self.given("admin.listen");
            self.refuse(
                "admin.listen",
                format!(
                    "{shown} is not an IP address with a port, such as \"127.0.0.1:9595\" or \"[::]:9595\"; \"\" turns it off"
                ),
            );
        }
        parsed
    }

    fn log_level(&mut self) -> String {
        let level = self.text("log.level").trim().to_lowercase();
        // The original's logger takes numbers, and shows what is at or above them.
        if let Ok(number @ 1..=1000) = level.parse::<u32>() {
            let name = match number {
                1..=10 => "trace",
                11..=20 => "debug",
                21..=30 => "info",
                31..=40 => "warn",
                _ => "error",
            };
            return String::from(name);
        }
        match level.as_str() {
            "error" | "warn" | "info" | "debug" | "trace" => level,
            // The original's logger has a level above error.
            "fatal" => String::from("error"),
            "warning" => String::from("warn"),
            _ => {
                let (_, shown) = self.given("log.level");
                self.refuse("log.level", format!("{shown} is not a level: allowed are error, warn, info, debug and trace"));
                self.default_text("log.level")
            }
        }
    }

    fn role(&mut self) -> Role {
        Role::of(&self.text("role").to_lowercase()).unwrap_or_else(|| {
            let (_, shown) = self.given("role");
            let allowed = Role::ALL.map(Role::name).join(", ");
            self.refuse("role", format!("{shown} is not a role: allowed are {allowed}"));
            Role::Everything
        })
    }

    fn coexist(&mut self) -> Coexist {
        Coexist::of(&self.text("coexist").to_lowercase()).unwrap_or_else(|| {
            let (_, shown) = self.given("coexist");
            let allowed = Coexist::ALL.map(Coexist::name).join(", ");
            self.refuse("coexist", format!("{shown} is no such choice: allowed are {allowed}"));
            Coexist::Auto
        })
    }

    fn engine(&mut self) -> EngineChoice {
        EngineChoice::of(&self.text("replication.engine").to_lowercase()).unwrap_or_else(|| {
            let (_, shown) = self.given("replication.engine");
            self.refuse("replication.engine", format!("{shown} is not an engine: allowed are auto, couchdb and native"));
            EngineChoice::Auto
        })
    }

    fn log_format(&mut self) -> LogFormat {
        match self.text("log.format").to_lowercase().as_str() {
            "auto" => LogFormat::Auto,
            "human" => LogFormat::Human,
            "json" => LogFormat::Json,
            "bunyan" => LogFormat::Bunyan,
            _ => {
                let (_, shown) = self.given("log.format");
                self.refuse("log.format", format!("{shown} is not a format: allowed are auto, human, json and bunyan"));
                LogFormat::Auto
            }
        }
    }
}

const ENCODE_HINT: &str = "the characters / ? # @ : % in a user or password are percent-encoded";

/// The errors name no part of the URL: where it is malformed, any part may be the password.
fn couchdb_url(text: &str) -> Result<Url, String> {
    let allowed = "allowed is http://user:password@host:5984 or https://…";
    if text.is_empty() {
        return Err(format!("is empty: {allowed}"));
    }
    if !text.starts_with("http://") && !text.starts_with("https://") {
        return Err(format!("must start with http:// or https://: {allowed}"));
    }
    let url = Url::parse(text).map_err(|error| format!("is not a URL ({error}): {allowed}; {ENCODE_HINT}"))?;
    if url.host_str().is_none_or(str::is_empty) {
        return Err(format!("has no host: {allowed}"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(format!("has a query (?) or fragment (#), which an address has not: {allowed}; {ENCODE_HINT}"));
    }
    if url.path().contains('@') {
        return Err(format!("has an @ behind the host: {allowed}; {ENCODE_HINT}"));
    }
    Ok(url)
}

fn is_db_name(name: &str) -> bool {
    let is_legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_$()+-/".contains(c);
    name.len() <= DB_NAME_CHARS_MAX && name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(is_legal)
}
