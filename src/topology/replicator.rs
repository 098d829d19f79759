//! One `replicator` document.
//!
//! What makes a replication impossible makes the document invalid. A fault in a field of Spiegel's own, a time that cannot be
//! read for example, is a warning, and the field is taken for what loses nothing.

use crate::config::EngineChoice;
use crate::rules::invalid::{Invalid, kind_of};
use crate::vault::{Vault, VaultError, redact_text};
use percent_encoding::percent_decode_str;
use serde_json::{Map, Value};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use url::Url;

/// What means something to Spiegel only.
pub const OF_SPIEGEL: [&str; 11] = [
    "type",
    "dirty",
    "dirty_at",
    "locked_at",
    "locked_by",
    "updated_at",
    "retries",
    "possibly_deleted_at",
    "dirty_after_milliseconds",
    "engine",
    "priority",
];
/// Meant for continuous replications.
const OF_CONTINUOUS: [&str; 2] = ["continuous", "cancel"];
/// A century: beyond it an `Instant` may not follow.
const DIRTY_AFTER_MS_MAX: f64 = 100.0 * 365.0 * 86_400_000.0;

/// A replicator that can run. There may be a hundred thousand, so what most documents do not say takes no room.
#[derive(Clone)]
pub struct Replicator {
    pub id: Arc<str>,
    pub rev: Arc<str>,
    pub source: Endpoint,
    pub target: Endpoint,
    /// Anything but `false`: a new document has no such field and is dirty.
    pub dirty: bool,
    /// When a clean document becomes due. One that cannot be read is due now.
    pub dirty_at: Option<SystemTime>,
    pub retries: u64,
    /// How long after a change the replication is due; None: at once.
    pub dirty_after: Option<Duration>,
    /// None: what the config says.
    pub engine: Option<EngineChoice>,
    /// Among those that wait for one host, the higher goes first.
    pub priority: i32,
    /// What is odd about the document and does not stop it.
    pub warnings: Box<[Invalid]>,
    /// What `_replicate` gets, without passwords; None: a source and a target that are texts, and nothing else.
    params: Option<Box<Map<String, Value>>>,
}

/// One side: a database's name on the watched server, or its URL. Shown without its password.
#[derive(Clone)]
pub struct Endpoint {
    text: Box<str>,
    db_name: DbName,
}

#[derive(Clone)]
enum DbName {
    /// In the text, from there to there.
    Within(u32, u32),
    /// It is encoded there.
    Decoded(Box<str>),
}

impl Replicator {
    /// Everything that is wrong is said at once.
    pub fn parse(doc: &Value) -> Result<Self, Vec<Invalid>> {
        let Value::Object(fields) = doc else {
            return Err(vec![Invalid::new("the document", format!("must be an object, not {}", kind_of(doc)))]);
        };
        let mut faults = Vec::new();
        let mut note = |invalid: Invalid| faults.push(invalid);
        let id = id(fields).map_err(&mut note).ok();
        let source = Endpoint::parse("source", fields.get("source")).map_err(&mut note).ok();
        let target = Endpoint::parse("target", fields.get("target")).map_err(&mut note).ok();
        let (Some(id), Some(source), Some(target)) = (id, source, target) else { return Err(faults) };
        let mut warnings = Vec::new();
        let dirty_at = time(fields, "dirty_at", &mut warnings);
        // Nothing follows from them here, and a person may want to know.
        for name in ["locked_at", "possibly_deleted_at"] {
            time(fields, name, &mut warnings);
        }
        Ok(Self {
            id,
            rev: fields.get("_rev").and_then(Value::as_str).unwrap_or_default().into(),
            source,
            target,
            dirty: fields.get("dirty") != Some(&Value::Bool(false)),
            dirty_at,
            retries: fields.get("retries").and_then(Value::as_u64).unwrap_or_default(),
            dirty_after: dirty_after(fields, &mut warnings),
            engine: engine(fields, &mut warnings),
            priority: priority(fields, &mut warnings),
            warnings: warnings.into(),
            params: params(fields).map(Box::new),
        })
    }

    /// Replications to one target's host share its limits; without one, from one source's host.
    pub fn lane(&self) -> Arc<str> {
        let place = self.target.host_and_port().or_else(|| self.source.host_and_port());
        place.map_or_else(|| Arc::from("local"), Arc::from)
    }

    /// Dirty, or due by its time.
    pub fn is_due(&self, now: SystemTime) -> bool {
        self.dirty || self.dirty_at.is_some_and(|at| at <= now)
    }

    /// What `_replicate` gets: the user's fields, whatever they are, with passwords. For the request's body and for nothing
    /// else.
    pub fn replicate_params(&self, vault: &Vault) -> Result<Value, VaultError> {
        let mut params = self.params.as_deref().cloned().unwrap_or_else(|| {
            let sides = [("source", &self.source), ("target", &self.target)];
            sides.into_iter().map(|(name, side)| (String::from(name), Value::from(&*side.text))).collect()
        });
        for name in ["source", "target"] {
            if let Some(side) = params.get_mut(name) {
                *side = with_password(side, vault)?;
            }
        }
        Ok(Value::Object(params))
    }
}

impl fmt::Debug for Replicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replicator")
            .field("id", &self.id)
            .field("rev", &self.rev)
            .field("source", &self.source)
            .field("target", &self.target)
            .field("dirty", &self.dirty)
            .field("dirty_at", &self.dirty_at)
            .finish_non_exhaustive()
    }
}

impl Endpoint {
    fn parse(field: &str, value: Option<&Value>) -> Result<Self, Invalid> {
        match value {
            None | Some(Value::Null) => Err(Invalid::new(field, "is missing")),
            Some(Value::String(text)) => Self::from_text(field, text),
            Some(Value::Object(object)) => match object.get("url") {
                Some(Value::String(text)) => Self::from_text(&format!("{field}.url"), text),
                Some(other) => Err(Invalid::new(format!("{field}.url"), format!("must be a string, not {}", kind_of(other)))),
                None => Err(Invalid::new(format!("{field}.url"), "is missing")),
            },
            Some(other) => Err(Invalid::new(field, format!("must be a URL or an object with one, not {}", kind_of(other)))),
        }
    }

    fn from_text(field: &str, text: &str) -> Result<Self, Invalid> {
        if text.is_empty() {
            return Err(Invalid::new(field, "is empty"));
        }
        if !text.contains("://") {
            return Ok(Self::new(text, text));
        }
        let url = Url::parse(text).map_err(|error| Invalid::new(field, format!("is not a URL: {error}")))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(Invalid::new(field, format!("must be http or https, not {}", url.scheme())));
        }
        match last_segment(&url) {
            Some(db_name) => Ok(Self::new(text, &db_name)),
            None => Err(Invalid::new(field, "names no database")),
        }
    }

    fn new(text: &str, db_name: &str) -> Self {
        let place = text.rfind(db_name).and_then(|start| {
            let (start, end) = (u32::try_from(start).ok()?, u32::try_from(start + db_name.len()).ok()?);
            Some(DbName::Within(start, end))
        });
        Self { text: text.into(), db_name: place.unwrap_or_else(|| DbName::Decoded(db_name.into())) }
    }

    /// As CouchDB spells it, not encoded: `a/b+c`.
    pub fn db_name(&self) -> &str {
        match &self.db_name {
            DbName::Within(start, end) => self.text.get(*start as usize..*end as usize).unwrap_or_default(),
            DbName::Decoded(name) => name,
        }
    }

    /// None for a bare name.
    pub fn url(&self) -> Option<Url> {
        self.text.contains("://").then(|| Url::parse(&self.text).ok())?
    }

    /// A bare name, or a URL with the host and port of the server at `couchdb`.
    pub fn is_local(&self, couchdb: &Url) -> bool {
        self.url()
            .is_none_or(|url| url.host() == couchdb.host() && url.port_or_known_default() == couchdb.port_or_known_default())
    }

    /// `host:port`; None for a bare name.
    pub fn host_and_port(&self) -> Option<String> {
        let url = self.url()?;
        Some(format!("{}:{}", url.host_str()?, url.port_or_known_default()?))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redact_text(&self.text))
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", redact_text(&self.text))
    }
}

/// Bug 12: it is decoded once, and a plus is a plus.
fn last_segment(url: &Url) -> Option<String> {
    let segment = url.path_segments()?.rev().find(|segment| !segment.is_empty())?;
    Some(percent_decode_str(segment).decode_utf8_lossy().into_owned())
}

fn with_password(endpoint: &Value, vault: &Vault) -> Result<Value, VaultError> {
    match endpoint {
        Value::String(text) if text.contains("://") => {
            let url = vault.inject(text)?;
            // Where nothing was added the user's spelling stays.
            match Url::parse(text).as_ref() == Ok(&url) {
                true => Ok(endpoint.clone()),
                false => Ok(Value::from(url.as_str())),
            }
        }
        Value::Object(object) => {
            let mut object = object.clone();
            if let Some(url) = object.get_mut("url") {
                *url = with_password(&Value::String(url.as_str().unwrap_or_default().to_string()), vault)?;
            }
            Ok(Value::Object(object))
        }
        other => Ok(other.clone()),
    }
}

fn id(fields: &Map<String, Value>) -> Result<Arc<str>, Invalid> {
    match fields.get("_id") {
        Some(Value::String(id)) if !id.is_empty() => Ok(Arc::from(id.as_str())),
        None => Err(Invalid::new("_id", "is missing")),
        Some(_) => Err(Invalid::new("_id", "must be a string that is not empty")),
    }
}

/// The user's fields, whatever they are. None where they are no more than two texts.
fn params(fields: &Map<String, Value>) -> Option<Map<String, Value>> {
    let is_params = |name: &str| !name.starts_with('_') && !OF_SPIEGEL.contains(&name) && !OF_CONTINUOUS.contains(&name);
    let is_plain = |(name, value): (&String, &Value)| matches!(name.as_str(), "source" | "target") && value.is_string();
    let params = || fields.iter().filter(|(name, _)| is_params(name));
    let is_more = !params().all(is_plain);
    is_more.then(|| params().map(|(name, value)| (name.clone(), value.clone())).collect())
}

/// Null, false, 0 and "" are no time, as in JavaScript.
fn time(fields: &Map<String, Value>, name: &str, warnings: &mut Vec<Invalid>) -> Option<SystemTime> {
    let value = fields.get(name)?;
    let reason = match value {
        Value::Null | Value::Bool(false) => return None,
        Value::Number(number) if number.as_f64() == Some(0.0) => return None,
        Value::String(text) if text.is_empty() => return None,
        Value::String(text) => match parse_time(text) {
            Some(at) => return Some(at),
            None => String::from("is not a time such as 2026-01-31T12:00:00.000Z"),
        },
        other => format!("must be a time in a string, not {}", kind_of(other)),
    };
    warnings.push(Invalid::new(name, reason));
    Some(SystemTime::UNIX_EPOCH)
}

/// RFC 3339; the original writes UTC, a user may write an offset.
fn parse_time(text: &str) -> Option<SystemTime> {
    let text = text.trim().to_ascii_uppercase();
    if text.ends_with('Z') {
        return humantime::parse_rfc3339(&text).ok();
    }
    let (local, offset) = text.split_at_checked(text.len().checked_sub(6)?)?;
    let (hours, minutes) = offset.get(1..)?.split_once(':')?;
    let (hours, minutes): (u64, u64) = (hours.parse().ok()?, minutes.parse().ok()?);
    if hours > 23 || minutes > 59 {
        return None;
    }
    let offset_length = Duration::from_secs(hours * 3600 + minutes * 60);
    let local = humantime::parse_rfc3339(&format!("{local}Z")).ok()?;
    match offset.chars().next()? {
        '+' => local.checked_sub(offset_length),
        '-' => local.checked_add(offset_length),
        _ => None,
    }
}

fn engine(fields: &Map<String, Value>, warnings: &mut Vec<Invalid>) -> Option<EngineChoice> {
    let value = fields.get("engine").filter(|value| !value.is_null())?;
    let choice = value.as_str().and_then(EngineChoice::of);
    if choice.is_none() {
        let reason = "must be \"auto\", \"couchdb\" or \"native\"; what the config says is used";
        warnings.push(Invalid::new("engine", reason.to_string()));
    }
    choice
}

fn priority(fields: &Map<String, Value>, warnings: &mut Vec<Invalid>) -> i32 {
    let Some(value) = fields.get("priority").filter(|value| !value.is_null()) else { return 0 };
    let priority = value.as_i64().and_then(|number| i32::try_from(number).ok());
    priority.unwrap_or_else(|| {
        warnings.push(Invalid::new("priority", String::from("must be a whole number; it is taken for 0")));
        0
    })
}

fn dirty_after(fields: &Map<String, Value>, warnings: &mut Vec<Invalid>) -> Option<Duration> {
    match fields.get("dirty_after_milliseconds")? {
        Value::Null => None,
        Value::Number(number) => {
            let milliseconds = number.as_f64().filter(|milliseconds| *milliseconds > 0.0)?;
            Some(Duration::from_secs_f64(milliseconds.min(DIRTY_AFTER_MS_MAX) / 1000.0))
        }
        other => {
            let reason = format!("must be a number, not {}; the replication is due at once", kind_of(other));
            warnings.push(Invalid::new("dirty_after_milliseconds", reason));
            None
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::rules::invalid::summary;
    use proptest::prelude::*;
    use serde_json::json;

    fn replicator(extra: Value) -> Replicator {
        let mut doc = json!({"_id": "r", "_rev": "1-r", "type": "replicator", "source": "http://h/a", "target": "http://h/b"});
        doc.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        Replicator::parse(&doc).unwrap_or_else(|e| panic!("{doc}: {}", summary(&e)))
    }

    #[test]
    fn bug_12_names_are_decoded_once() {
        for (source, expected) in [
            ("http://user@h:5984/mydb", "mydb"),
            ("http://h:5984/a%2Fb%2Bc", "a/b+c"),
            ("http://h:5984/a+b", "a+b"),
            ("http://h:5984/a%252Fb", "a%2Fb"),
            ("http://h:5984/mydb/", "mydb"),
            ("http://h:5984/couch/mydb?x=y/z#t", "mydb"),
            ("http://h/user_09e05a1a–4ba3", "user_09e05a1a–4ba3"),
            ("a/b+c", "a/b+c"),
            ("a%2Fb", "a%2Fb"),
        ] {
            for replicator in [replicator(json!({"source": source})), replicator(json!({"source": {"url": source}}))] {
                assert_eq!(replicator.source.db_name(), expected);
            }
            assert_eq!(replicator(json!({"target": source})).target.db_name(), expected);
        }
    }

    #[test]
    fn a_document_that_cannot_run_says_why() {
        for (extra, expected) in [
            (json!({"source": null}), "source is missing"),
            (json!({"source": 5}), "source must be a URL or an object with one, not a number"),
            (json!({"source": ""}), "source is empty"),
            (json!({"source": "http://u:s3cret@[x/a"}), "source is not a URL"),
            (json!({"source": "ftp://u:s3cret@h/a"}), "source must be http or https, not ftp"),
            (json!({"target": "http://u:s3cret@h/"}), "target names no database"),
            (json!({"target": {}}), "target.url is missing"),
            (json!({"target": {"url": []}}), "target.url must be a string, not an array"),
            (json!({"_id": 5}), "_id must be a string"),
        ] {
            let mut doc = json!({"_id": "r", "source": "a", "target": "b"});
            doc.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            let said = summary(&Replicator::parse(&doc).expect_err("invalid"));
            assert!(said.contains(expected), "{said}");
            assert!(!said.contains("s3cret"));
        }
        assert_eq!(summary(&Replicator::parse(&json!({"_id": "r"})).expect_err("both")), "source is missing; target is missing");
        assert!(Replicator::parse(&json!([])).is_err());
    }

    #[test]
    fn only_false_is_clean() {
        for (dirty, expected) in
            [(json!(false), false), (json!(true), true), (json!(null), true), (json!(0), true), (json!("false"), true)]
        {
            assert_eq!(replicator(json!({"dirty": dirty})).dirty, expected, "{dirty}");
        }
        assert!(replicator(json!({})).dirty, "a new document runs at once");
    }

    #[test]
    fn times_are_read_and_a_bad_one_is_due_now() {
        let second = |seconds| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        for (time, expected, warns) in [
            (json!("1970-01-01T00:01:40.000Z"), second(100), false),
            (json!("1970-01-01T00:01:40Z"), second(100), false),
            (json!("1970-01-01T02:01:40+02:00"), second(100), false),
            (json!("1970-01-01T00:00:40.000-00:01"), second(100), false),
            (json!(null), None, false),
            (json!(""), None, false),
            (json!(false), None, false),
            (json!("soon"), second(0), true),
            (json!("1970-01-01T00:00:00é99:99"), second(0), true),
            (json!(1700000000), second(0), true),
        ] {
            let read = replicator(json!({"dirty": false, "dirty_at": time, "locked_at": time}));
            assert_eq!(read.dirty_at, expected, "{time}");
            assert_eq!(read.warnings.len(), if warns { 2 } else { 0 }, "{time}");
            assert_eq!(read.is_due(SystemTime::now()), expected.is_some());
        }
    }

    #[test]
    fn the_wait_before_dirtying_is_a_positive_number() {
        for (wait, expected, warns) in [
            (json!(1500), Some(Duration::from_millis(1500)), false),
            (json!(0), None, false),
            (json!(-5), None, false),
            (json!(null), None, false),
            (json!("1500"), None, true),
            (json!(1e300), Some(Duration::from_secs(3_153_600_000)), false),
        ] {
            let read = replicator(json!({"dirty_after_milliseconds": wait}));
            assert_eq!((read.dirty_after, read.warnings.len() == 1), (expected, warns), "{wait}");
        }
    }

    #[test]
    fn couchdb_gets_the_users_fields_and_the_passwords() {
        let vault = Vault::from_json(r#"{"h": {"u": "p/w"}}"#).unwrap();
        let read = replicator(json!({
            "source": "http://u@h:5984/a%2Fb", "target": {"url": "http://u@h/b", "headers": {"X": "y"}},
            "dirty": true, "dirty_at": "x", "locked_at": null, "locked_by": "me", "updated_at": "x", "retries": 1,
            "possibly_deleted_at": "x", "dirty_after_milliseconds": 5, "continuous": true, "cancel": true, "_extra": 1,
            "create_target": true, "doc_ids": ["x"], "filter": "d/f", "something_new": {"a": 1}
        }));
        assert_eq!(
            read.replicate_params(&vault).unwrap(),
            json!({
                "source": "http://u:p%2Fw@h:5984/a%2Fb", "target": {"url": "http://u:p%2Fw@h/b", "headers": {"X": "y"}},
                "create_target": true, "doc_ids": ["x"], "filter": "d/f", "something_new": {"a": 1}
            })
        );
        let plain = replicator(json!({"source": "a", "target": "HTTP://Other:80/b"}));
        assert_eq!(plain.replicate_params(&vault).unwrap(), json!({"source": "a", "target": "HTTP://Other:80/b"}));
    }

    #[test]
    fn local_is_the_watched_servers_host_and_port() {
        let couchdb = Url::parse("http://couch:5984/").unwrap();
        for (target, local, place) in [
            ("b", true, None),
            ("http://COUCH:5984/b", true, Some("couch:5984")),
            ("http://u:p@couch:5984/b", true, Some("couch:5984")),
            ("http://couch/b", false, Some("couch:80")),
            ("https://other:5984/b", false, Some("other:5984")),
        ] {
            let target = replicator(json!({"target": target})).target;
            assert_eq!((target.is_local(&couchdb), target.host_and_port().as_deref()), (local, place), "{target}");
        }
    }

    #[test]
    fn logs_show_no_password() {
        let read =
            replicator(json!({"source": "http://u:s3cret@h/a", "target": {"url": "http://u:s3cret@h/b", "auth": "s3cret"}}));
        assert_eq!(read.source.to_string(), "http://u:[redacted]@h/a");
        assert!(!format!("{read:?} {} {:?}", read.target, read.target).contains("s3cret"));
    }

    proptest! {
        #[test]
        fn every_legal_name_survives_its_url(name in "[a-z][a-z0-9_$()+/-]{0,20}") {
            let source = format!("http://u@h:5984/{}", crate::couch::encode_segment(&name));
            let read = replicator(json!({"source": source}));
            prop_assert_eq!(read.source.db_name(), name);
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,40}") {
            let doc = json!({"_id": "r", "source": text, "target": format!("http://{text}"), "dirty_at": text, "locked_at": text});
            if let Ok(read) = Replicator::parse(&doc) {
                let _ = read.replicate_params(&Vault::empty());
            }
        }
    }
}
