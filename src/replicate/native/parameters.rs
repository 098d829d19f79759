//! The parameters of one replication, as `_replicate` would take them.
//!
//! Whatever a run can do is typed here. The rest is either for CouchDB, which knows parameters that this engine does not, or
//! wrong, and then CouchDB would refuse it too (couch_replicator_parse.erl of 3.5). What only tunes CouchDB's own scheduler is
//! passed over: `checkpoint_interval`, `http_connections`, `worker_processes`, `connection_timeout`, `retries_per_request`,
//! `socket_options` and `use_bulk_get`, and so is a key that nobody knows, as CouchDB does.

use crate::couch::{Seq, encode_segment};
use crate::vault::{Credentials, split_credentials};
use base64::Engine;
use http::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use percent_encoding::percent_decode_str;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, LazyLock};
use url::Url;

/// CouchDB knows them, and only CouchDB can do what they ask.
const PROXIES: [&str; 3] = ["proxy", "source_proxy", "target_proxy"];
/// Larger ones cost memory and save nothing: a thousand documents already fill a `_bulk_docs`.
const BATCH_SIZE_MAX: u64 = 10_000;
/// The replicator's own words to `_changes`; it drops a user's.
const FEED_QUERY: [&str; 4] = ["feed", "style", "since", "timeout"];
/// They would change the page that a run reads; CouchDB reads the feed in one piece and can let them through.
const PAGE_QUERY: [&str; 10] = [
    "limit",
    "seq_interval",
    "descending",
    "include_docs",
    "heartbeat",
    "last-event-id",
    "conflicts",
    "attachments",
    "att_encoding_info",
    "filter",
];
/// With the filter `_view` CouchDB sends these as JSON, strings too: the fields of its record `mrargs`, and `key`,
/// without those of a page.
const VIEW_QUERY: [&str; 22] = [
    "key",
    "view_type",
    "reduce",
    "preflight_fun",
    "start_key",
    "start_key_docid",
    "end_key",
    "end_key_docid",
    "keys",
    "direction",
    "skip",
    "group_level",
    "group",
    "stable",
    "update",
    "multi_get",
    "inclusive_end",
    "doc_options",
    "update_seq",
    "callback",
    "sorted",
    "extra",
];
/// A run sets them itself for each request; another value would break its framing.
const OWN_HEADERS: [&str; 12] = [
    "accept",
    "accept-encoding",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "if-none-match",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

#[derive(Debug, Clone)]
pub struct Parameters {
    pub source: Side,
    pub target: Side,
    pub selection: Selection,
    pub since_seq: Option<Seq>,
    pub create_target: bool,
    /// The query of the request that creates it, not encoded.
    pub create_target_params: Vec<(String, String)>,
    pub winning_revs_only: bool,
    pub use_checkpoints: bool,
    /// `worker_batch_size`, within bounds.
    pub batch_size: Option<usize>,
}

/// The source or the target. Printed without a secret.
#[derive(Clone)]
pub struct Side {
    /// The database's, as the user spelled its path: without credentials, query and trailing slash.
    pub url: Url,
    /// As CouchDB spells it, not encoded: `a/b+c`.
    pub db_name: String,
    pub credentials: Option<Credentials>,
    /// Never `Authorization` beside `credentials`. All values are marked sensitive.
    pub headers: HeaderMap,
    /// On the watched server, by name or by its host and port.
    pub is_local: bool,
}

/// Which documents.
#[derive(Debug, Clone, PartialEq)]
pub enum Selection {
    All,
    /// Sorted, each once. None at all is a run that copies nothing, as CouchDB's does.
    DocIds(Arc<[String]>),
    /// `ddoc/name`, `_view` or `_design`; the query is not encoded.
    Filter {
        name: String,
        query: Vec<(String, String)>,
    },
    Selector(Value),
}

/// Why this engine does not take a replication. No text holds what a user made up: it may be a secret in the wrong place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotNative {
    #[error("`{key}` needs CouchDB's own replicator")]
    Unsupported { key: String },
    #[error("`{key}` {reason}")]
    Invalid { key: String, reason: String },
}

/// The watched server: a bare name means its database, with its credentials.
#[derive(Debug, Clone)]
pub struct Local {
    pub url: Url,
    pub credentials: Option<Credentials>,
}

/// Who asks, and where. Requests may be shared between equal ones only; says nothing else, and nothing outside this process.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rights([u8; 32]);

impl fmt::Debug for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Rights")
    }
}

impl Parameters {
    pub fn parse(params: &Value, local: &Local) -> Result<Self, NotNative> {
        let Value::Object(fields) = params else {
            return Err(invalid("the parameters", "must be an object"));
        };
        leave_to_couchdb(fields)?;
        Ok(Self {
            source: Side::parse("source", fields.get("source"), local)?,
            target: Side::parse("target", fields.get("target"), local)?,
            selection: Selection::parse(fields)?,
            since_seq: since_seq(fields)?,
            create_target: flag(fields, "create_target")?,
            create_target_params: create_target_params(fields)?,
            winning_revs_only: flag(fields, "winning_revs_only")?,
            // As in CouchDB, where anything but `false` is true.
            use_checkpoints: fields.get("use_checkpoints") != Some(&Value::Bool(false)),
            batch_size: batch_size(fields)?,
        })
    }
}

impl Side {
    fn parse(field: &str, value: Option<&Value>, local: &Local) -> Result<Self, NotNative> {
        match value {
            None | Some(Value::Null) => Err(invalid(field, "is missing")),
            Some(Value::String(text)) => Self::from_text(field, text, local),
            Some(Value::Object(object)) => {
                let key = format!("{field}.url");
                let text = object.get("url").and_then(Value::as_str).ok_or_else(|| invalid(&key, "must be a string"))?;
                let basic = auth_of(field, object.get("auth"))?;
                let headers = headers_of(field, object.get("headers"))?;
                Ok(Self::from_text(&key, text, local)?.authorized(basic, headers))
            }
            Some(_) => Err(invalid(field, "must be a URL or an object with one")),
        }
    }

    fn from_text(key: &str, text: &str, local: &Local) -> Result<Self, NotNative> {
        match text {
            "" => Err(invalid(key, "is empty")),
            text if text.contains("://") => Self::from_url(key, text, local),
            name => Self::from_name(key, name, local),
        }
    }

    fn from_name(key: &str, name: &str, local: &Local) -> Result<Self, NotNative> {
        let mut url = local.url.clone();
        let path = format!("{}/{}", url.path().trim_end_matches('/'), encode_segment(name));
        url.set_path(&path);
        let side = Self::at(key, url, local)?;
        // `..` is a path and no name.
        match side.db_name == name {
            true => Ok(Self { credentials: side.credentials.or_else(|| local.credentials.clone()), ..side }),
            false => Err(invalid(key, "names no database")),
        }
    }

    fn from_url(key: &str, text: &str, local: &Local) -> Result<Self, NotNative> {
        let url = Url::parse(text).map_err(|error| invalid(key, format!("is not a URL: {error}")))?;
        match url.scheme() {
            "http" | "https" => Self::at(key, url, local),
            _ => Err(invalid(key, "must be http or https")),
        }
    }

    fn at(key: &str, url: Url, local: &Local) -> Result<Self, NotNative> {
        // CouchDB, too, takes a user without a password for nobody: asking with an empty one would count as a wrong password.
        let has_password = url.password().is_some();
        let (mut url, credentials) = split_credentials(url);
        url.set_query(None);
        url.set_fragment(None);
        let path = url.path().trim_end_matches('/').to_string();
        url.set_path(&path);
        let segment = url.path().rsplit('/').next().unwrap_or_default();
        let db_name = match percent_decode_str(segment).decode_utf8() {
            Ok(name) if !name.is_empty() => name.into_owned(),
            _ => return Err(invalid(key, "names no database")),
        };
        let is_local = url.host() == local.url.host() && url.port_or_known_default() == local.url.port_or_known_default();
        Ok(Self { url, db_name, credentials: credentials.filter(|_| has_password), headers: HeaderMap::new(), is_local })
    }

    /// An `Authorization` of the user's own wins over `auth.basic`, and that wins over the URL's user and password.
    /// CouchDB's own order differs in one place: there a Basic header comes last.
    fn authorized(mut self, basic: Option<Credentials>, mut headers: HeaderMap) -> Self {
        self.credentials = match headers.get(AUTHORIZATION).map(credentials_of) {
            None => basic.or(self.credentials),
            // A user of its own, so that passwords can change without a new replication id.
            Some(Some(credentials)) => {
                headers.remove(AUTHORIZATION);
                Some(credentials)
            }
            Some(None) => None,
        };
        self.headers = headers;
        self
    }

    /// Keyed for each process, so that a password cannot be found by trying.
    pub fn rights(&self) -> Rights {
        static KEY: LazyLock<[u64; 4]> = LazyLock::new(|| std::array::from_fn(|_| RandomState::new().build_hasher().finish()));
        let mut hash = Sha256::new();
        let mut feed = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_be_bytes());
            hash.update(bytes);
        };
        KEY.iter().for_each(|word| feed(&word.to_be_bytes()));
        feed(self.url.scheme().as_bytes());
        feed(self.place().as_bytes());
        match &self.credentials {
            Some(Credentials { user, password }) => {
                feed(b"user");
                feed(user.as_bytes());
                feed(password.expose_secret().as_bytes());
            }
            None => feed(b"nobody"),
        }
        let mut headers: Vec<_> = self.headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
        headers.sort_unstable();
        for (name, value) in headers {
            feed(name.as_bytes());
            feed(value);
        }
        Rights(hash.finalize().into())
    }

    /// `host:port` in lower case.
    pub fn place(&self) -> String {
        let port = self.url.port_or_known_default().unwrap_or_default();
        format!("{}:{port}", self.url.host_str().unwrap_or_default().to_ascii_lowercase())
    }
}

impl fmt::Debug for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Side")
            .field("url", &self.url.as_str())
            .field("credentials", &self.credentials)
            .field("headers", &self.headers.keys().collect::<Vec<_>>())
            .field("is_local", &self.is_local)
            .finish_non_exhaustive()
    }
}

impl Selection {
    fn parse(fields: &Map<String, Value>) -> Result<Self, NotNative> {
        // Read first, because CouchDB refuses a wrong one even where it is not used.
        let query_params = query_params(fields)?;
        let doc_ids = fields.get("doc_ids").filter(|ids| !ids.is_null());
        let (filter, selector) = (fields.get("filter"), fields.get("selector"));
        match (doc_ids, filter, selector) {
            (None, None, None) => Ok(Selection::All),
            (Some(doc_ids), None, None) => doc_ids_of(doc_ids),
            (None, Some(filter), None) => filter_of(filter, &query_params),
            (None, None, Some(selector @ Value::Object(_))) => Ok(Selection::Selector(selector.clone())),
            (None, None, Some(_)) => Err(invalid("selector", "must be an object")),
            (doc_ids, filter, selector) => {
                let given = [("doc_ids", doc_ids), ("filter", filter), ("selector", selector)];
                let names: Vec<_> = given.into_iter().filter(|(_, value)| value.is_some()).map(|(name, _)| name).collect();
                Err(invalid(&names.join(", "), "exclude each other"))
            }
        }
    }
}

fn doc_ids_of(value: &Value) -> Result<Selection, NotNative> {
    let Value::Array(list) = value else { return Err(invalid("doc_ids", "must be an array")) };
    let mut ids = BTreeSet::new();
    for id in list {
        let id = id.as_str().ok_or_else(|| invalid("doc_ids", "must hold strings only"))?;
        // CouchDB takes them percent-encoded, with a plus for a blank, as replicators of old did.
        let id = id.replace('+', " ");
        let id = percent_decode_str(&id).decode_utf8().map_err(|_| unsupported("doc_ids"))?;
        ids.insert(id.into_owned());
    }
    Ok(Selection::DocIds(ids.into_iter().collect()))
}

fn filter_of(value: &Value, query_params: &Map<String, Value>) -> Result<Selection, NotNative> {
    let name = value.as_str().ok_or_else(|| invalid("filter", "must be a string"))?;
    let is_view = name == "_view";
    match name {
        "_view" => {
            let view = query_params.get("view").and_then(Value::as_str).unwrap_or_default();
            if view.matches('/').count() != 1 {
                return Err(invalid("query_params.view", "must be `ddocname/viewname`"));
            }
        }
        "_design" => {}
        name if name.starts_with('_') => return Err(unsupported("filter")),
        name if name.contains('/') => {}
        _ => return Err(invalid("filter", "must be `ddocname/filtername`")),
    }
    let mut query = Vec::with_capacity(query_params.len());
    for (key, value) in query_params {
        if FEED_QUERY.contains(&key.as_str()) {
            continue;
        }
        if PAGE_QUERY.contains(&key.as_str()) {
            return Err(unsupported(&format!("query_params.{key}")));
        }
        let text = match value {
            Value::String(text) if !(is_view && VIEW_QUERY.contains(&key.as_str())) => text.clone(),
            // Arrays and objects are what CouchDB sends as Erlang's own text, which no filter can read: JSON is what was meant.
            value => value.to_string(),
        };
        query.push((key.clone(), text));
    }
    Ok(Selection::Filter { name: name.to_string(), query })
}

fn query_params(fields: &Map<String, Value>) -> Result<Map<String, Value>, NotNative> {
    match fields.get("query_params") {
        None => Ok(Map::new()),
        Some(Value::Object(params)) => Ok(params.clone()),
        Some(_) => Err(invalid("query_params", "must be an object")),
    }
}

fn leave_to_couchdb(fields: &Map<String, Value>) -> Result<(), NotNative> {
    for key in PROXIES {
        if fields.get(key).is_some_and(|proxy| proxy.as_str() != Some("")) {
            return Err(unsupported(key));
        }
    }
    if fields.get("user_ctx").is_some_and(|context| !context.is_null()) {
        return Err(unsupported("user_ctx"));
    }
    if fields.contains_key("ibrowse_options") {
        return Err(unsupported("ibrowse_options"));
    }
    for key in ["continuous", "cancel"] {
        if flag(fields, key)? {
            return Err(unsupported(key));
        }
    }
    Ok(())
}

fn since_seq(fields: &Map<String, Value>) -> Result<Option<Seq>, NotNative> {
    match fields.get("since_seq") {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(Seq::from(text.as_str()))),
        // BigCouch had arrays.
        Some(other) => other.as_u64().map(|number| Some(Seq::Number(number))).ok_or_else(|| unsupported("since_seq")),
    }
}

fn create_target_params(fields: &Map<String, Value>) -> Result<Vec<(String, String)>, NotNative> {
    let params = match fields.get("create_target_params") {
        None => return Ok(Vec::new()),
        Some(Value::Object(params)) => params,
        Some(_) => return Err(invalid("create_target_params", "must be an object")),
    };
    let text = |(key, value): (&String, &Value)| match value {
        Value::String(text) => Ok((key.clone(), text.clone())),
        Value::Number(_) | Value::Bool(_) => Ok((key.clone(), value.to_string())),
        _ => Err(invalid("create_target_params", "must hold strings, numbers and booleans only")),
    };
    params.iter().map(text).collect()
}

/// CouchDB takes a number in a string, too.
fn batch_size(fields: &Map<String, Value>) -> Result<Option<usize>, NotNative> {
    let key = "worker_batch_size";
    let number = match fields.get(key) {
        None => return Ok(None),
        Some(Value::String(text)) => text.parse::<i64>().ok(),
        Some(value) => value.as_i64(),
    };
    let number = number.ok_or_else(|| invalid(key, "must be an integer"))?;
    let bounded = u64::try_from(number).unwrap_or_default().clamp(1, BATCH_SIZE_MAX);
    Ok(Some(bounded as usize))
}

fn flag(fields: &Map<String, Value>, key: &str) -> Result<bool, NotNative> {
    match fields.get(key) {
        None => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(_) => Err(invalid(key, "must be a boolean")),
    }
}

fn auth_of(field: &str, auth: Option<&Value>) -> Result<Option<Credentials>, NotNative> {
    let auth = match auth {
        None => return Ok(None),
        Some(Value::Object(auth)) => auth,
        Some(_) => return Err(invalid(&format!("{field}.auth"), "must be an object")),
    };
    if auth.keys().any(|kind| kind != "basic") {
        return Err(unsupported(&format!("{field}.auth")));
    }
    let Some(basic) = auth.get("basic") else { return Ok(None) };
    match (basic["username"].as_str(), basic["password"].as_str()) {
        (Some(user), Some(password)) => {
            Ok(Some(Credentials { user: user.to_string(), password: SecretString::from(password.to_string()) }))
        }
        _ => Err(unsupported(&format!("{field}.auth.basic"))),
    }
}

fn headers_of(field: &str, value: Option<&Value>) -> Result<HeaderMap, NotNative> {
    let key = format!("{field}.headers");
    let given = match value {
        None => return Ok(HeaderMap::new()),
        Some(Value::Object(given)) => given,
        Some(_) => return Err(invalid(&key, "must be an object")),
    };
    let mut headers = HeaderMap::new();
    for (name, value) in given {
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| invalid(&key, "holds what is no header's name"))?;
        if OWN_HEADERS.contains(&name.as_str()) {
            return Err(unsupported(&format!("{key}.{name}")));
        }
        let text = value.as_str().ok_or_else(|| invalid(&key, "must hold strings only"))?;
        let mut value = HeaderValue::from_bytes(text.as_bytes()).map_err(|_| invalid(&key, "holds what no header may"))?;
        value.set_sensitive(true);
        headers.try_append(name, value).map_err(|_| invalid(&key, "are too many"))?;
    }
    Ok(headers)
}

/// Of `Basic …`; any other kind is passed on as it is.
fn credentials_of(authorization: &HeaderValue) -> Option<Credentials> {
    let (kind, encoded) = authorization.to_str().ok()?.split_once(' ')?;
    if !kind.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = base64::engine::general_purpose::STANDARD.decode(encoded.trim()).ok()?;
    let decoded = String::from_utf8(decoded).ok()?;
    let (user, password) = decoded.split_once(':')?;
    Some(Credentials { user: user.to_string(), password: SecretString::from(password.to_string()) })
}

fn unsupported(key: &str) -> NotNative {
    NotNative::Unsupported { key: key.to_string() }
}

fn invalid(key: &str, reason: impl Into<String>) -> NotNative {
    NotNative::Invalid { key: key.to_string(), reason: reason.into() }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn local() -> Local {
        let password = SecretString::from(String::from("adm1n"));
        Local {
            url: Url::parse("http://Couch:5984/").unwrap(),
            credentials: Some(Credentials { user: String::from("admin"), password }),
        }
    }

    fn with(extra: Value) -> Value {
        let mut params = json!({"source": "a", "target": "b"});
        params.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        params
    }

    fn parse(extra: Value) -> Result<Parameters, NotNative> {
        Parameters::parse(&with(extra), &local())
    }

    fn source(source: Value) -> Side {
        parse(json!({"source": source})).unwrap_or_else(|error| panic!("{source}: {error}")).source
    }

    fn login(side: &Side) -> Option<(&str, &str)> {
        side.credentials.as_ref().map(|known| (known.user.as_str(), known.password.expose_secret()))
    }

    #[test]
    fn a_plain_replication_has_the_defaults() {
        let plain = parse(json!({})).unwrap();
        assert_eq!(plain.selection, Selection::All);
        assert_eq!((plain.since_seq, plain.batch_size), (None, None));
        assert_eq!((plain.create_target, plain.winning_revs_only, plain.use_checkpoints), (false, false, true));
        assert!(plain.create_target_params.is_empty());
    }

    #[test]
    fn a_side_is_found_however_it_is_spelled() {
        for (spelled, url, db_name, is_local) in [
            ("mydb", "http://couch:5984/mydb", "mydb", true),
            ("a/b+c", "http://couch:5984/a%2Fb%2Bc", "a/b+c", true),
            ("a$(b)", "http://couch:5984/a%24%28b%29", "a$(b)", true),
            ("a%2Fb", "http://couch:5984/a%252Fb", "a%2Fb", true),
            ("_users", "http://couch:5984/_users", "_users", true),
            ("http://couch:5984/a", "http://couch:5984/a", "a", true),
            ("http://COUCH:5984/a+b/", "http://couch:5984/a+b", "a+b", true),
            ("http://couch:5984/a%2Fb%2bc", "http://couch:5984/a%2Fb%2bc", "a/b+c", true),
            ("http://couch/a$(b)", "http://couch/a$(b)", "a$(b)", false),
            ("http://u:p@other:5984/a//", "http://other:5984/a", "a", false),
            ("https://other/couch/a?x=y#z", "https://other/couch/a", "a", false),
            ("http://[::1]:5984/a", "http://[::1]:5984/a", "a", false),
        ] {
            for side in [source(json!(spelled)), source(json!({"url": spelled}))] {
                assert_eq!((side.url.as_str(), side.db_name.as_str(), side.is_local), (url, db_name, is_local), "{spelled}");
            }
        }
        let proxied = Local { url: Url::parse("http://h/couch/").unwrap(), credentials: None };
        let behind = Parameters::parse(&with(json!({})), &proxied).unwrap().source;
        assert_eq!((behind.url.as_str(), behind.place().as_str()), ("http://h/couch/a", "h:80"));
    }

    #[test]
    fn the_users_own_header_wins_over_auth_and_auth_over_the_url() {
        let basic = |user: &str, password: &str| base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        let auth = json!({"basic": {"username": "a", "password": "a:@/p"}});
        for (side, expected) in [
            (json!("name"), Some(("admin", "adm1n"))),
            (json!({"url": "name"}), Some(("admin", "adm1n"))),
            (json!({"url": "name", "auth": auth}), Some(("a", "a:@/p"))),
            (json!("http://h/a"), None),
            (json!("http://couch:5984/a"), None),
            (json!("http://u@h/a"), None),
            (json!("http://u%40x:p%2F%3A@h/a"), Some(("u@x", "p/:"))),
            (json!({"url": "http://u:p@h/a", "auth": {}}), Some(("u", "p"))),
            (json!({"url": "http://u:p@h/a", "auth": auth}), Some(("a", "a:@/p"))),
            (
                json!({"url": "http://u:p@h/a", "auth": auth, "headers": {"AUTHORIZATION": format!("bAsIc {}", basic("h", "h:p"))}}),
                Some(("h", "h:p")),
            ),
            (json!({"url": "http://u:p@h/a", "auth": auth, "headers": {"Authorization": "Bearer s3cret"}}), None),
            (json!({"url": "name", "headers": {"authorization": "Basic no-base64"}}), None),
        ] {
            let read = source(side.clone());
            assert_eq!(login(&read), expected, "{side}");
            let own = side["headers"].is_object() && expected.is_none();
            assert_eq!(read.headers.contains_key(AUTHORIZATION), own, "{side}");
        }
    }

    #[test]
    fn headers_are_kept_and_sensitive() {
        let side = source(json!({"url": "http://h/a", "headers": {"X-One": "ä", "x-one": "2", "Cookie": "s3cret", "Host": "v"}}));
        assert_eq!(side.headers.get_all("x-one").iter().count(), 2);
        assert_eq!(side.headers.len(), 4);
        assert!(side.headers.values().all(HeaderValue::is_sensitive));
    }

    #[test]
    fn nothing_prints_a_secret() {
        let parsed = parse(json!({
            "source": {"url": "http://u:s3cret@h/a?token=s3cret", "headers": {"X-Token": "s3cret", "Cookie": "s3cret"}},
            "target": {"url": "http://u@h/a", "auth": {"basic": {"username": "u", "password": "s3cret"}}}
        }));
        let parsed = parsed.unwrap();
        let printed = format!("{parsed:?} {parsed:#?} {:?} {:?}", parsed.source.rights(), local());
        assert!(!printed.contains("s3cret") && !printed.contains("adm1n"), "{printed}");
        assert!(printed.contains("x-token") && printed.contains("\"u\""), "{printed}");
        for bad in ["http://u:s3cret@[x/a", "ftp://u:s3cret@h/a", "http://u:s3cret@h/"] {
            let error = parse(json!({"source": bad})).expect_err("invalid");
            assert!(!format!("{error} {error:?}").contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn a_selection_is_as_couchdb_reads_it() {
        let ids = |ids: &[&str]| Selection::DocIds(ids.iter().map(|id| id.to_string()).collect());
        let filter = |name: &str, query: &[(&str, &str)]| Selection::Filter {
            name: name.to_string(),
            query: query.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect(),
        };
        for (extra, expected) in [
            (json!({"doc_ids": null}), Selection::All),
            (json!({"doc_ids": null, "filter": "d/f"}), filter("d/f", &[])),
            (json!({"doc_ids": []}), ids(&[])),
            (json!({"doc_ids": ["c", "a+b", "c", "d%252Fe", "100%", "x%2By"]}), ids(&["100%", "a b", "c", "d%2Fe", "x+y"])),
            (json!({"query_params": {"a": 1}}), Selection::All),
            (json!({"filter": "d/f/g"}), filter("d/f/g", &[])),
            (json!({"filter": "_design"}), filter("_design", &[])),
            (
                json!({"filter": "d/f", "query_params": {"s": "a b&c", "n": 1.5, "t": true, "z": null, "l": [1, "x"], "o": {"k": 1}, "key": "k"}}),
                filter(
                    "d/f",
                    &[
                        ("s", "a b&c"),
                        ("n", "1.5"),
                        ("t", "true"),
                        ("z", "null"),
                        ("l", "[1,\"x\"]"),
                        ("o", "{\"k\":1}"),
                        ("key", "k"),
                    ],
                ),
            ),
            (
                json!({"filter": "d/f", "query_params": {"since": "0", "feed": "x", "style": "x", "timeout": 1, "a": "b"}}),
                filter("d/f", &[("a", "b")]),
            ),
            (
                json!({"filter": "_view", "query_params": {"view": "d/v", "key": "k", "reduce": false, "other": "o"}}),
                filter("_view", &[("view", "d/v"), ("key", "\"k\""), ("reduce", "false"), ("other", "o")]),
            ),
            (json!({"selector": {"a": {"$gt": 1}}}), Selection::Selector(json!({"a": {"$gt": 1}}))),
        ] {
            assert_eq!(parse(extra.clone()).unwrap_or_else(|error| panic!("{extra}: {error}")).selection, expected, "{extra}");
        }
    }

    #[test]
    fn the_rest_is_obeyed() {
        let all = parse(json!({
            "since_seq": "5-abc", "create_target": true, "create_target_params": {"q": 1, "n": "2", "partitioned": true},
            "winning_revs_only": true, "use_checkpoints": false, "worker_batch_size": 100
        }))
        .unwrap();
        assert_eq!(all.since_seq, Some(Seq::from("5-abc")));
        let params = [("q", "1"), ("n", "2"), ("partitioned", "true")].map(|(key, value)| (key.to_string(), value.to_string()));
        assert_eq!(all.create_target_params, params);
        assert_eq!((all.create_target, all.winning_revs_only, all.use_checkpoints), (true, true, false));
        assert_eq!(parse(json!({"since_seq": 5})).unwrap().since_seq, Some(Seq::Number(5)));
        assert!(parse(json!({"use_checkpoints": "x"})).unwrap().use_checkpoints);
        for (size, expected) in [(json!(100), 100), (json!("20"), 20), (json!(0), 1), (json!(-5), 1), (json!(99_999), 10_000)] {
            assert_eq!(parse(json!({"worker_batch_size": size})).unwrap().batch_size, Some(expected), "{size}");
        }
    }

    #[test]
    fn what_tunes_couchdb_or_what_nobody_knows_is_passed_over() {
        let extra = json!({
            "checkpoint_interval": 5, "http_connections": "x", "worker_processes": 1, "connection_timeout": 1, "retries_per_request": 1,
            "socket_options": "[]", "use_bulk_get": false, "id": "x", "_id": "x", "engine": "native", "priority": 1, "owner": "x",
            "whatever": {}, "continuous": false, "cancel": false, "proxy": "", "source_proxy": "", "user_ctx": null
        });
        assert!(parse(extra).is_ok());
    }

    #[test]
    fn what_only_couchdb_can_do_is_left_to_it() {
        for (extra, key) in [
            (json!({"proxy": "http://p"}), "proxy"),
            (json!({"proxy": null}), "proxy"),
            (json!({"source_proxy": "http://p"}), "source_proxy"),
            (json!({"target_proxy": "http://p"}), "target_proxy"),
            (json!({"user_ctx": {"name": "x"}}), "user_ctx"),
            (json!({"ibrowse_options": "[]"}), "ibrowse_options"),
            (json!({"continuous": true}), "continuous"),
            (json!({"cancel": true}), "cancel"),
            (json!({"since_seq": [5, "x"]}), "since_seq"),
            (json!({"since_seq": null}), "since_seq"),
            (json!({"since_seq": -1}), "since_seq"),
            (json!({"doc_ids": ["%ff"]}), "doc_ids"),
            (json!({"filter": "_doc_ids"}), "filter"),
            (json!({"filter": "_selector"}), "filter"),
            (json!({"filter": "d/f", "query_params": {"limit": 1}}), "query_params.limit"),
            (json!({"source": {"url": "http://h/a", "auth": {"oauth": {}}}}), "source.auth"),
            (json!({"target": {"url": "http://h/a", "auth": {"proxy": {}}}}), "target.auth"),
            (json!({"target": {"url": "http://h/a", "auth": {"basic": {"username": "u"}}}}), "target.auth.basic"),
            (json!({"target": {"url": "http://h/a", "auth": {"basic": null}}}), "target.auth.basic"),
            (json!({"source": {"url": "http://h/a", "headers": {"Content-Length": "5"}}}), "source.headers.content-length"),
        ] {
            assert_eq!(parse(extra.clone()).expect_err("left"), NotNative::Unsupported { key: key.to_string() }, "{extra}");
        }
    }

    #[test]
    fn what_couchdb_refuses_is_refused() {
        for (extra, said) in [
            (json!({"source": null}), "`source` is missing"),
            (json!({"source": 5}), "`source` must be a URL or an object with one"),
            (json!({"source": ""}), "`source` is empty"),
            (json!({"source": ".."}), "`source` names no database"),
            (json!({"source": "ftp://h/a"}), "`source` must be http or https"),
            (json!({"target": "http://h"}), "`target` names no database"),
            (json!({"target": "http://[x/a"}), "`target` is not a URL: invalid IPv6 address"),
            (json!({"target": "http://h/%ff"}), "`target` names no database"),
            (json!({"target": {}}), "`target.url` must be a string"),
            (json!({"target": {"url": ""}}), "`target.url` is empty"),
            (json!({"target": {"url": "a", "auth": null}}), "`target.auth` must be an object"),
            (json!({"target": {"url": "a", "headers": []}}), "`target.headers` must be an object"),
            (json!({"target": {"url": "a", "headers": {"X": 1}}}), "`target.headers` must hold strings only"),
            (json!({"target": {"url": "a", "headers": {"X": "a\nb"}}}), "`target.headers` holds what no header may"),
            (json!({"target": {"url": "a", "headers": {"X Y": "a"}}}), "`target.headers` holds what is no header's name"),
            (json!({"doc_ids": "a"}), "`doc_ids` must be an array"),
            (json!({"doc_ids": [5]}), "`doc_ids` must hold strings only"),
            (json!({"doc_ids": ["a"], "filter": "d/f"}), "`doc_ids, filter` exclude each other"),
            (json!({"doc_ids": [], "selector": {}}), "`doc_ids, selector` exclude each other"),
            (json!({"filter": "d/f", "selector": {}}), "`filter, selector` exclude each other"),
            (json!({"doc_ids": [], "filter": "d/f", "selector": {}}), "`doc_ids, filter, selector` exclude each other"),
            (json!({"selector": null}), "`selector` must be an object"),
            (json!({"filter": null}), "`filter` must be a string"),
            (json!({"filter": "nope"}), "`filter` must be `ddocname/filtername`"),
            (json!({"filter": "_view"}), "`query_params.view` must be `ddocname/viewname`"),
            (json!({"filter": "_view", "query_params": {"view": "a/b/c"}}), "`query_params.view` must be `ddocname/viewname`"),
            (json!({"query_params": null}), "`query_params` must be an object"),
            (json!({"create_target": null}), "`create_target` must be a boolean"),
            (json!({"winning_revs_only": 1}), "`winning_revs_only` must be a boolean"),
            (json!({"continuous": "true"}), "`continuous` must be a boolean"),
            (json!({"create_target_params": null}), "`create_target_params` must be an object"),
            (json!({"create_target_params": {"q": [1]}}), "`create_target_params` must hold strings, numbers and booleans only"),
            (json!({"worker_batch_size": 1.5}), "`worker_batch_size` must be an integer"),
            (json!({"worker_batch_size": "x"}), "`worker_batch_size` must be an integer"),
            (json!({"worker_batch_size": null}), "`worker_batch_size` must be an integer"),
        ] {
            let error = parse(extra.clone()).expect_err("refused");
            assert!(matches!(error, NotNative::Invalid { .. }), "{extra}: {error:?}");
            assert_eq!(error.to_string(), said, "{extra}");
        }
        assert!(Parameters::parse(&json!([]), &local()).is_err());
    }

    #[test]
    fn source_and_target_may_be_the_same() {
        let same = parse(json!({"target": "a"})).unwrap();
        assert_eq!((same.source.url.as_str(), same.source.rights()), (same.target.url.as_str(), same.target.rights()));
    }

    #[test]
    fn rights_are_equal_only_where_all_is() {
        let all = [
            json!("http://h/a"),
            json!("http://h:81/a"),
            json!("https://h:80/a"),
            json!("http://u:p@h/a"),
            json!("http://u:q@h/a"),
            json!("http://v:p@h/a"),
            json!("http://up:@h/a"),
            json!({"url": "http://h/a", "headers": {"Cookie": "1"}}),
            json!({"url": "http://h/a", "headers": {"Cookie": "2"}}),
            json!({"url": "http://h/a", "headers": {"X": "1"}}),
            json!({"url": "http://u:p@h/a", "headers": {"X": "1"}}),
        ];
        let rights: std::collections::HashSet<_> = all.iter().map(|side| source(side.clone()).rights()).collect();
        // A user without a password is nobody.
        assert_eq!(rights.len(), all.len() - 1);
        for (one, other) in [
            (json!("http://h/a"), json!("http://H:80/b/")),
            (json!("http://u:p@h/a"), json!({"url": "http://h/c", "auth": {"basic": {"username": "u", "password": "p"}}})),
            (
                json!({"url": "http://h/a", "headers": {"A": "1", "B": "2"}}),
                json!({"url": "http://h/a", "headers": {"b": "2", "a": "1"}}),
            ),
        ] {
            assert_eq!(source(one).rights(), source(other).rights());
        }
    }

    proptest! {
        #[test]
        fn every_legal_name_survives(name in "[a-z][a-z0-9_$()+/-]{0,20}") {
            let bare = source(json!(name));
            prop_assert_eq!(&bare.db_name, &name);
            let encoded = source(json!(format!("http://u:p@couch:5984/{}", encode_segment(&name))));
            prop_assert_eq!(&encoded.db_name, &name);
            prop_assert_eq!(encoded.url.as_str(), bare.url.as_str());
        }

        #[test]
        fn no_text_panics_or_leaks(text in "\\PC{0,40}") {
            let hush = format!("http://u:hu5h@{text}");
            let side = json!({"url": hush, "headers": {&text: &text}, "auth": {"basic": {"username": text, "password": "hu5h"}}});
            let extra = json!({"source": text, "target": side, "filter": text, "query_params": {"view": text}, "doc_ids": text});
            for params in [with(extra), with(json!({"source": hush})), with(json!({"doc_ids": [text]})), with(json!({"filter": text}))] {
                match Parameters::parse(&params, &local()) {
                    Ok(parsed) => {
                        let shown = format!("{:?} {:?}", parsed.source, parsed.target);
                        prop_assert!(!shown.contains("hu5h") || text.contains("hu5h"), "{}", shown);
                        prop_assert!(parsed.source.url.username().is_empty() && parsed.source.url.query().is_none());
                    }
                    Err(error) => prop_assert!(!error.to_string().contains("hu5h") || text.contains("hu5h"), "{}", error),
                }
            }
        }
    }
}
