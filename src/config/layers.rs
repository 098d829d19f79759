//! What the file, the environment and the flags say about each known key, and where they say it.
//!
//! The known keys are those of `default.toml`, found by walking it, so that none can be forgotten in the environment.

use super::original::Original;
use super::{DEFAULT_TOML, Sources};
use crate::vault::redact_text;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};

pub(super) const URL_KEY: &str = "couchdb.url";
const PREFIX: &str = "SPIEGEL_";
const CONFIG_VARIABLE: &str = "SPIEGEL_CONFIG";
/// The URL holds a password, and secrets come as files (Docker, Kubernetes).
const URL_FILE_VARIABLE: &str = "SPIEGEL_COUCHDB_URL_FILE";
/// Tests and benchmarks take variables of their own.
const FOREIGN_PREFIXES: [&str; 2] = ["SPIEGEL_TEST_", "SPIEGEL_BENCH_"];

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    Default,
    File { path: PathBuf, line: usize },
    Environment { name: String },
    SecretFile { variable: &'static str, path: PathBuf },
    Flag { name: &'static str },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { path, line } => write!(f, "{}:{line}", path.display()),
            Origin::Environment { name } => write!(f, "environment {name}"),
            Origin::SecretFile { variable, path } => write!(f, "{}, named by {variable}", path.display()),
            Origin::Flag { name } => write!(f, "flag {name}"),
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Raw {
    Text(String),
    Integer(i64),
    Float(f64),
    Boolean(bool),
    /// A number whose unit its name implies.
    Counted {
        text: String,
        unit: Unit,
    },
    /// Of a type that no key has; its name.
    Other(&'static str),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Seconds,
    Milliseconds,
}

impl Unit {
    pub fn name(self) -> &'static str {
        match self {
            Unit::Seconds => "seconds",
            Unit::Milliseconds => "milliseconds",
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Given {
    pub raw: Raw,
    pub origin: Origin,
}

impl Given {
    /// The value for an error text. What may hold a password is not shown.
    pub fn shown(&self, key: &str) -> String {
        match &self.raw {
            Raw::Integer(number) => number.to_string(),
            Raw::Float(number) => number.to_string(),
            Raw::Boolean(_) => String::from("a boolean"),
            Raw::Other(kind) => format!("a {kind}"),
            Raw::Text(text) if key == URL_KEY || text.contains('@') => String::from("the value"),
            Raw::Text(text) | Raw::Counted { text, .. } => {
                format!("{:?}", redact_text(&text.chars().take(60).collect::<String>()))
            }
        }
    }
}

pub(super) struct Layers {
    /// Each known key has a value: the default's at least.
    pub values: BTreeMap<String, Given>,
    pub defaults: BTreeMap<String, Raw>,
    pub errors: Vec<String>,
    pub warnings: Vec<String>,
    pub file: Option<PathBuf>,
}

pub(super) fn collect(sources: &Sources) -> Layers {
    let defaults = defaults();
    let values = defaults.iter().map(|(key, raw)| (key.clone(), Given { raw: raw.clone(), origin: Origin::Default })).collect();
    let mut layers = Layers { values, defaults, errors: Vec::new(), warnings: Vec::new(), file: config_path(sources) };
    for (key, raw) in sources.original.iter().flat_map(Original::defaults) {
        layers.set(key, raw, Origin::Default);
    }
    if let Some(path) = layers.file.clone() {
        layers.add_file(&path);
    }
    layers.add_environment(&sources.environment);
    if let Some(original) = &sources.original {
        layers.add_original(original, &sources.environment);
    }
    layers.add_flags(&sources.flags);
    if sources.has_idle_url() {
        layers
            .warnings
            .push(String::from("environment URL says nothing without TYPE: set TYPE as well, or SPIEGEL_COUCHDB_URL instead"));
    }
    layers
}

fn config_path(sources: &Sources) -> Option<PathBuf> {
    let variable = || sources.environment.get(CONFIG_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
    sources.flags.config.clone().or_else(variable)
}

/// The keys of `default.toml` by their full names. A test proves that it can be read, so an unreadable one is just empty here.
pub(super) fn defaults() -> BTreeMap<String, Raw> {
    let Ok(table) = DeTable::parse(DEFAULT_TOML) else { return BTreeMap::new() };
    leaves(table.get_ref(), "").into_iter().map(|leaf| (leaf.key, leaf.raw)).collect()
}

pub(super) fn variable_of(key: &str) -> String {
    format!("{PREFIX}{}", key.replace('.', "_").to_uppercase())
}

struct Leaf {
    key: String,
    raw: Raw,
    at_byte: usize,
}

/// Sections are one level deep; a table below that is a value of the wrong type.
fn leaves(table: &DeTable<'_>, section: &str) -> Vec<Leaf> {
    let mut found = Vec::new();
    for (name, value) in table {
        let name_text: &str = name.get_ref();
        match value.get_ref() {
            DeValue::Table(inner) if section.is_empty() => {
                found.extend(leaves(inner, &format!("{name_text}.")));
            }
            other => found.push(Leaf { key: format!("{section}{name_text}"), raw: raw_of(other), at_byte: name.span().start }),
        }
    }
    found
}

fn raw_of(value: &DeValue<'_>) -> Raw {
    match value {
        DeValue::String(text) => Raw::Text(text.to_string()),
        DeValue::Integer(number) => match i64::from_str_radix(&number.as_str().replace('_', ""), number.radix()) {
            Ok(number) => Raw::Integer(number),
            Err(_) => Raw::Other("number beyond 64 bits"),
        },
        DeValue::Float(number) => match number.as_str().replace('_', "").parse() {
            Ok(number) => Raw::Float(number),
            Err(_) => Raw::Other("number that cannot be read"),
        },
        DeValue::Boolean(is_so) => Raw::Boolean(*is_so),
        other => Raw::Other(other.type_str()),
    }
}

fn line_of(text: &str, at_byte: usize) -> usize {
    1 + text.as_bytes().iter().take(at_byte).filter(|byte| **byte == b'\n').count()
}

impl Layers {
    fn set(&mut self, key: &str, raw: Raw, origin: Origin) {
        self.values.insert(key.to_string(), Given { raw, origin });
    }

    fn add_file(&mut self, path: &Path) {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) => return self.errors.push(format!("config file {}: cannot be read: {error}", path.display())),
        };
        let table = match DeTable::parse(&text) {
            Ok(table) => table,
            Err(error) => {
                // Only the message: the library's full text quotes the line, which may hold a password.
                let line = line_of(&text, error.span().map_or(0, |span| span.start));
                let message = error.message().replace('\n', ", ");
                return self.errors.push(format!("{}:{line}: not valid TOML: {message}", path.display()));
            }
        };
        for leaf in leaves(table.get_ref(), "") {
            let origin = Origin::File { path: path.to_path_buf(), line: line_of(&text, leaf.at_byte) };
            match self.values.contains_key(&leaf.key) {
                true => self.set(&leaf.key, leaf.raw, origin),
                false => self.unknown_key(&leaf.key, &origin),
            }
        }
    }

    fn unknown_key(&mut self, key: &str, origin: &Origin) {
        let problem = match self.values.keys().any(|known| known.starts_with(&format!("{key}."))) {
            true => format!("is a section: write [{key}] and its keys below"),
            false => {
                let known: Vec<&str> = self.values.keys().map(String::as_str).collect();
                format!("is not a setting{}", did_you_mean(key, &known, '.'))
            }
        };
        self.errors.push(format!("{key} ({origin}): {problem}"));
    }

    fn add_environment(&mut self, environment: &BTreeMap<String, String>) {
        let known: BTreeMap<String, String> = self.values.keys().map(|key| (variable_of(key), key.clone())).collect();
        for (name, value) in environment.iter().filter(|(name, _)| name.starts_with(PREFIX)) {
            if let Some(key) = known.get(name) {
                self.set(key, Raw::Text(value.clone()), Origin::Environment { name: name.clone() });
            } else if name == URL_FILE_VARIABLE {
                self.add_url_file(environment, value);
            } else if name != CONFIG_VARIABLE && !is_foreign(name, value) {
                let names: Vec<&str> = known.keys().map(String::as_str).chain([CONFIG_VARIABLE, URL_FILE_VARIABLE]).collect();
                self.errors.push(format!("environment {name}: is not a setting{}", did_you_mean(name, &names, '_')));
            }
        }
    }

    fn add_original(&mut self, original: &Original, environment: &BTreeMap<String, String>) {
        for (key, raw, origin) in original.variables(environment).into_iter().chain(original.flags()) {
            self.set(key, raw, origin);
        }
        let kind = original.kind.name();
        let ignored = original.ignored(environment).into_iter();
        self.warnings.extend(ignored.map(|name| format!("environment {name} says nothing to type {kind}")));
    }

    fn add_url_file(&mut self, environment: &BTreeMap<String, String>, path: &str) {
        let direct = variable_of(URL_KEY);
        if environment.contains_key(&direct) {
            return self.errors.push(format!("{URL_KEY} (environment): both {direct} and {URL_FILE_VARIABLE} are set; keep one"));
        }
        match std::fs::read_to_string(path) {
            Ok(text) => {
                let origin = Origin::SecretFile { variable: URL_FILE_VARIABLE, path: PathBuf::from(path) };
                self.set(URL_KEY, Raw::Text(text.trim().to_string()), origin);
            }
            Err(error) => {
                self.errors.push(format!("{URL_KEY} (environment {URL_FILE_VARIABLE}): {path:?} cannot be read: {error}"));
            }
        }
    }

    fn add_flags(&mut self, flags: &super::Flags) {
        let given = [
            (URL_KEY, "--url", &flags.url),
            ("db_name", "--db-name", &flags.db_name),
            ("namespace", "--namespace", &flags.namespace),
            ("passwords_file", "--passwords-file", &flags.passwords_file),
            ("secrets_file", "--secrets-file", &flags.secrets_file),
            ("log.level", "--log-level", &flags.log_level),
            ("log.format", "--log-format", &flags.log_format),
        ];
        for (key, name, value) in given {
            if let Some(text) = value {
                self.set(key, Raw::Text(text.clone()), Origin::Flag { name });
            }
        }
    }
}

/// Kubernetes (and old Docker links) put SPIEGEL_SERVICE_HOST, SPIEGEL_PORT, SPIEGEL_PORT_9595_TCP_ADDR … into every container
/// beside a service called `spiegel` or `spiegel-…`: nobody wrote them, so nobody can be told to remove them.
fn is_foreign(name: &str, value: &str) -> bool {
    let service_link = name.ends_with("_SERVICE_HOST")
        || name.ends_with("_SERVICE_PORT")
        || name.contains("_SERVICE_PORT_")
        || (name.ends_with("_PORT") && value.contains("://"))
        || name.split_once("_PORT_").is_some_and(|(_, rest)| rest.starts_with(|c: char| c.is_ascii_digit()));
    service_link || FOREIGN_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// "; did you mean …?" for the nearest known name. A name that lacks its section (`url`, `SPIEGEL_URL`) is nearest to the one that
/// ends like it.
fn did_you_mean(unknown: &str, known: &[&str], separator: char) -> String {
    let bare = unknown.strip_prefix(PREFIX).unwrap_or(unknown);
    let same_end: Vec<&&str> = known.iter().filter(|name| name.ends_with(&format!("{separator}{bare}"))).collect();
    let meant = match same_end.as_slice() {
        [one] => Some(**one),
        _ => nearest(unknown, known),
    };
    meant.map_or_else(String::new, |name| format!("; did you mean {name}?"))
}

pub(super) fn nearest<'a>(unknown: &str, known: &[&'a str]) -> Option<&'a str> {
    known.iter().copied().min_by_key(|name| strsim::osa_distance(unknown, name))
}
