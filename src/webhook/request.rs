//! The HTTP request of one delivery, before anything is sent.
//!
//! GET, HEAD and DELETE carry the params as a query, the others as a JSON body: an object even where a rule has none, as the
//! original sent it. The password goes into a header and never into the URL, so that no error text can carry it.
//!
//! What a document says reaches the URL percent-encoded and the body as JSON, and nothing else: headers are the rule's alone.

use crate::rules::handling::{Handling, HeaderSource, Statuses};
use crate::rules::rule::{js_string, lane, sends_query};
use crate::rules::template::Rendered;
use crate::vault::{Credentials, SecretError, SigningKey, Vault, VaultError, split_credentials};
use base64::Engine;
use bytes::Bytes;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::Method;
use reqwest::header::{HeaderName, HeaderValue};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::fmt;
use std::sync::Arc;
use url::Url;

const QUERY: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
/// A little less than the `http` crate takes, and more than most servers do.
const URL_BYTES_MAX: usize = 65_000;

pub type Headers = Vec<(HeaderName, HeaderValue)>;

/// A request that is ready to be sent. Its `Debug` shows no body: a document may be large, and is not ours to print.
#[derive(Clone)]
pub struct WebhookRequest {
    pub method: Method,
    /// Without user and password.
    pub url: Url,
    pub credentials: Option<Credentials>,
    /// The rule's own, its secrets among them.
    pub headers: Headers,
    /// None: JSON's.
    pub content_type: Option<HeaderValue>,
    /// Each of them signs; empty where the rule wants no signature.
    pub signing: Arc<[SigningKey]>,
    pub body: Option<Bytes>,
    /// As in the rule's `Handling`.
    pub retry_on: Option<Arc<[Statuses]>>,
    /// `host:port`: requests of one lane share its limits.
    pub lane: Arc<str>,
}

#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("build the webhook's URL: {0}")]
    Url(#[from] VaultError),
    #[error("build the webhook's URL: {0} is neither http nor https")]
    Scheme(String),
    #[error("build the webhook's URL: no host")]
    NoHost,
    #[error("build the webhook's query: {0}")]
    Query(String),
    #[error("the URL is longer than {URL_BYTES_MAX} bytes, which no HTTP library takes: send the document in a body")]
    TooLong,
}

impl RequestError {
    /// True where nothing of this rule can be sent until somebody mends the rule or the vault; false where it is about this
    /// one change.
    pub fn concerns_rule(&self) -> bool {
        matches!(self, Self::Secret(_))
    }
}

impl fmt::Debug for WebhookRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebhookRequest")
            .field("method", &self.method)
            .field("url", &self.url.as_str())
            .field("credentials", &self.credentials)
            .field("signed", &!self.signing.is_empty())
            .field("body_bytes", &self.body.as_ref().map(Bytes::len))
            .finish_non_exhaustive()
    }
}

pub fn build(rendered: Rendered, handling: &Handling, vault: &Vault) -> Result<WebhookRequest, RequestError> {
    let (signing, headers) = of_rule(handling, vault)?;
    let (mut url, credentials) = split_credentials(vault.inject(&rendered.url)?);
    if !matches!(url.scheme(), "http" | "https") {
        return Err(RequestError::Scheme(url.scheme().to_string()));
    }
    let lane: Arc<str> = lane(&url).ok_or(RequestError::NoHost)?.into();
    let body = match sends_query(&rendered.method) {
        true => {
            add_query(&mut url, &rendered.params)?;
            None
        }
        false => Some(Bytes::from(rendered.params)),
    };
    if url.as_str().len() > URL_BYTES_MAX {
        return Err(RequestError::TooLong);
    }
    Ok(WebhookRequest {
        method: rendered.method,
        url,
        credentials,
        headers,
        content_type: handling.content_type.clone(),
        signing,
        body,
        retry_on: handling.retry_on.as_deref().map(Arc::from),
        lane,
    })
}

/// What is the same in each request of a rule: the keys that sign, and its headers. Its errors concern the rule.
pub fn of_rule(handling: &Handling, vault: &Vault) -> Result<(Arc<[SigningKey]>, Headers), RequestError> {
    let signing = handling.secret.as_deref().map(|name| vault.signing(name)).transpose()?.unwrap_or_default();
    let headers: Result<Vec<_>, RequestError> = handling.headers.iter().map(|header| own_header(header, vault)).collect();
    Ok((signing, headers?))
}

fn own_header((name, source): &(HeaderName, HeaderSource), vault: &Vault) -> Result<(HeaderName, HeaderValue), RequestError> {
    let value = match source {
        HeaderSource::Text(value) => value.clone(),
        HeaderSource::Secret(secret) => vault.header(secret)?,
    };
    Ok((name.clone(), value))
}

fn add_query(url: &mut Url, params: &str) -> Result<(), RequestError> {
    // Most rules with a query have no params at all.
    if params == "{}" {
        return Ok(());
    }
    let params: Value = serde_json::from_str(params).map_err(|error| RequestError::Query(error.to_string()))?;
    let mut query = url.query().unwrap_or_default().to_string();
    if let Value::Object(params) = &params {
        params.iter().all(|(name, value)| push_query(&mut query, &mut name.clone(), value));
    }
    if !query.is_empty() {
        url.set_query(Some(&query));
    }
    Ok(())
}

/// As the JavaScript library `qs` spells it: `a[b]=c`, `a[0]=x`, null as `a=`, and nothing for what is empty. False once it is too
/// long. `name` grows and shrinks with the depth: to make it anew for each member would be quadratic in a long name.
fn push_query(query: &mut String, name: &mut String, value: &Value) -> bool {
    let end = name.len();
    let mut member = |key: &str, value: &Value| {
        name.push('[');
        name.push_str(key);
        name.push(']');
        let goes_on = push_query(query, name, value);
        name.truncate(end);
        goes_on
    };
    match value {
        Value::Object(members) => members.iter().all(|(key, value)| member(key, value)),
        Value::Array(items) => items.iter().enumerate().all(|(at, value)| member(&at.to_string(), value)),
        Value::Null => push_pair(query, name, ""),
        value => push_pair(query, name, &js_string(value)),
    }
}

/// False once the query is too long.
fn push_pair(query: &mut String, name: &str, value: &str) -> bool {
    if query.len() + name.len() + value.len() > URL_BYTES_MAX {
        // Longer than it may be, whatever else comes.
        query.extend(std::iter::repeat_n('.', (URL_BYTES_MAX + 1).saturating_sub(query.len())));
        return false;
    }
    if !query.is_empty() && !query.ends_with('&') {
        query.push('&');
    }
    query.extend(utf8_percent_encode(name, QUERY));
    query.push('=');
    query.extend(utf8_percent_encode(value, QUERY));
    query.len() <= URL_BYTES_MAX
}

impl WebhookRequest {
    /// Equal for requests that are one to their receiver: method, final URL and params (bug 13: the original took the URL
    /// before its variables were filled in), headers, and whether they are signed.
    pub fn debounce_key(&self) -> u128 {
        self.key(self.body.as_deref().unwrap_or_default())
    }

    /// Equal for requests of one rule that may be items of one: all but the params is the same.
    pub fn batch_key(&self, rule_id: &str) -> u128 {
        self.key(rule_id.as_bytes())
    }

    fn key(&self, of_whom: &[u8]) -> u128 {
        let user = self.credentials.as_ref().map_or("", |credentials| credentials.user.as_str());
        let content_type = self.content_type.as_ref().map(HeaderValue::as_bytes).unwrap_or_default();
        // Equal keys sign the empty text alike.
        let signature = super::sign::signature(&self.signing, "", "", b"");
        let mut parts = vec![self.method.as_str().as_bytes(), self.url.as_str().as_bytes(), user.as_bytes(), of_whom];
        // They must be judged alike, too.
        let retry_on = format!("{:?}", self.retry_on);
        parts.extend([content_type, signature.as_bytes(), retry_on.as_bytes()]);
        parts.extend(self.headers.iter().flat_map(|(name, value)| [name.as_str().as_bytes(), value.as_bytes()]));
        first_bytes(&digest(parts)).iter().fold(0, |key, byte| key << 8 | u128::from(*byte))
    }
}

/// Deliveries with the same key keep their order.
pub fn order_key(rule_id: &str, db: &str, doc_id: &str) -> u64 {
    let digest = digest([rule_id.as_bytes(), db.as_bytes(), doc_id.as_bytes()]);
    first_bytes(&digest).iter().take(8).fold(0, |key, byte| key << 8 | u64::from(*byte))
}

/// The same for the same change after a crash and on any node; another one once the database was made again.
pub fn webhook_id(rule_id: &str, db: &str, instance_start_time: &str, doc_id: &str, rev: &str) -> String {
    let digest = digest([rule_id, db, instance_start_time, doc_id, rev].map(str::as_bytes));
    format!("msg_{}", base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(digest))
}

/// Stands for these items, in this order.
pub fn batch_id<'i>(items: impl Iterator<Item = &'i str>) -> String {
    format!("msg_{}", base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(digest(items.map(str::as_bytes))))
}

/// Each part goes in with its length, so that no two lists of parts are one text.
fn digest<'p>(parts: impl IntoIterator<Item = &'p [u8]>) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

fn first_bytes(digest: &[u8; 32]) -> &[u8] {
    digest.get(..16).unwrap_or(digest)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use secrecy::ExposeSecret;
    use serde_json::json;
    use std::collections::HashSet;

    fn request(method: &str, url: &str, params: Value) -> WebhookRequest {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        build(Rendered { method, url: url.to_string(), params: params.to_string() }, &Handling::default(), &Vault::empty())
            .expect("a good request")
    }

    #[test]
    fn get_head_and_delete_send_a_query_and_the_others_json() {
        for method in ["GET", "HEAD", "DELETE"] {
            let request = request(method, "http://h/x?y=1#top", json!({"foo": "bar"}));
            assert_eq!(request.url.as_str(), "http://h/x?y=1&foo=bar#top");
            assert!(request.body.is_none());
        }
        for method in ["POST", "PUT", "PATCH", "REPORT"] {
            let request = request(method, "http://h/x?y=1", json!({"foo": "bar"}));
            assert_eq!(request.url.as_str(), "http://h/x?y=1");
            assert_eq!(request.body.as_deref(), Some(br#"{"foo":"bar"}"#.as_slice()));
        }
        assert_eq!(request("POST", "http://h/", json!({})).body.as_deref(), Some(b"{}".as_slice()));
    }

    #[test]
    fn queries_are_spelled_as_by_qs() {
        for (params, expected) in [
            (json!({}), None),
            (json!({"a": "b c&d=é"}), Some("a=b%20c%26d%3D%C3%A9")),
            (json!({"a": null, "b": true, "c": 1.5, "d": ""}), Some("a=&b=true&c=1.5&d=")),
            (json!({"a": {"b": "c", "d": {"e": 1}}}), Some("a%5Bb%5D=c&a%5Bd%5D%5Be%5D=1")),
            (json!({"a": ["x", {"y": 2}]}), Some("a%5B0%5D=x&a%5B1%5D%5By%5D=2")),
            (json!({"a": [], "b": {}}), None),
        ] {
            assert_eq!(request("GET", "http://h/", params.clone()).url.query(), expected, "{params}");
        }
        assert_eq!(request("GET", "http://h/?", json!({"a": 1})).url.as_str(), "http://h/?a=1");
        assert_eq!(request("GET", "http://h/?x&", json!({"a": 1})).url.as_str(), "http://h/?x&a=1");
    }

    #[test]
    fn a_query_beyond_all_bounds_is_an_error() {
        let rendered = Rendered {
            method: Method::GET,
            url: String::from("http://h/"),
            params: json!({"a": "x".repeat(URL_BYTES_MAX + 1)}).to_string(),
        };
        assert!(matches!(build(rendered, &Handling::default(), &Vault::empty()), Err(RequestError::TooLong)));
    }

    /// Made anew for each member, the name alone would be 20 GB of copying.
    #[test]
    fn a_long_name_of_many_members_costs_no_more_than_its_length() {
        let params = json!({"c": {"x".repeat(100_000): vec![json!([]); 200_000]}});
        let request = request("GET", "http://h/", params);
        assert_eq!(request.url.as_str(), "http://h/");
        let params = json!({"c": {"x".repeat(100_000): vec![json!(1); 200_000]}});
        let rendered = Rendered { method: Method::GET, url: String::from("http://h/"), params: params.to_string() };
        assert!(matches!(build(rendered, &Handling::default(), &Vault::empty()), Err(RequestError::TooLong)));
    }

    #[test]
    fn the_lane_is_the_lower_case_host_and_its_port() {
        for (url, lane) in [
            ("http://API.Example.com/x", "api.example.com:80"),
            ("https://api.example.com/x", "api.example.com:443"),
            ("https://u:p@api.example.com:8443/x", "api.example.com:8443"),
            ("http://[::1]:3000/", "[::1]:3000"),
        ] {
            assert_eq!(request("GET", url, json!({})).lane.as_ref(), lane);
        }
    }

    #[test]
    fn the_password_leaves_the_url() {
        let vault = Vault::from_json(r#"{"example.com": {"user": "s3cret/!"}}"#).unwrap();
        let rendered = Rendered {
            method: Method::GET,
            url: String::from("https://user@example.com/foo?a=b"),
            params: json!({"foo": "bar", "change": {"_id": "1"}}).to_string(),
        };
        let request = build(rendered, &Handling::default(), &vault).unwrap();
        assert_eq!(request.url.as_str(), "https://example.com/foo?a=b&foo=bar&change%5B_id%5D=1");
        assert!(!format!("{request:?}").contains("s3cret"));
        let credentials = request.credentials.expect("from the vault");
        assert_eq!((credentials.user.as_str(), credentials.password.expose_secret()), ("user", "s3cret/!"));
    }

    #[test]
    fn a_bad_url_is_an_error_that_hides_it() {
        for url in ["http://u:s3cret@[x/", "ftp://u:s3cret@h/", "http://u:s3cret@a%2Fb.h/"] {
            let rendered = Rendered { method: Method::GET, url: url.to_string(), params: String::from("{}") };
            let error = build(rendered, &Handling::default(), &Vault::empty()).expect_err(url);
            assert!(!format!("{error} {error:?}").contains("s3cret"));
        }
    }

    #[test]
    fn bug_13_the_debounce_key_is_of_the_final_request() {
        let base = request("POST", "http://h/a", json!({"x": 1}));
        assert_eq!(base.debounce_key(), request("POST", "http://h/a", json!({"x": 1})).debounce_key());
        let others = [
            request("PUT", "http://h/a", json!({"x": 1})),
            request("POST", "http://h/b", json!({"x": 1})),
            request("POST", "http://h/a", json!({"x": 2})),
            request("POST", "http://u@h/a", json!({"x": 1})),
            request("GET", "http://h/a", json!({"x": 1})),
        ];
        let keys: HashSet<u128> = others.iter().chain([&base]).map(WebhookRequest::debounce_key).collect();
        assert_eq!(keys.len(), 6);
    }

    #[test]
    fn ids_are_stable_and_tell_their_parts_apart() {
        let id = webhook_id("rule", "db", "0", "doc", "1-a");
        // A receiver remembers ids over our upgrades: this one may never change.
        assert_eq!(id, "msg_4ecDMMa-1eiXGdbLRPYCJaPDI-g2y2gBbmcQjpVHwqc");
        assert_ne!(webhook_id("a", "bc", "0", "d", "e"), webhook_id("ab", "c", "0", "d", "e"));
        assert_ne!(webhook_id("r", "d", "1", "x", "1-a"), webhook_id("r", "d", "2", "x", "1-a"));
        assert_ne!(order_key("a", "bc", "d"), order_key("ab", "c", "d"));
        assert_eq!(order_key("a", "b", "c"), order_key("a", "b", "c"));
    }

    fn handling(secret: Option<&str>, headers: &[(&str, HeaderSource)]) -> Handling {
        let headers = headers.iter().map(|(name, source)| (name.parse().unwrap(), source.clone())).collect();
        Handling { secret: secret.map(Arc::from), headers, ..Handling::default() }
    }

    fn vault() -> Vault {
        let key = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
        let file = json!({"key": key, "rotating": [key, key], "token": "Bearer s3cret", "lines": "s3cret\n"}).to_string();
        Vault::empty().with_secrets(&file).expect("a good file")
    }

    fn rendered() -> Rendered {
        Rendered { method: Method::POST, url: String::from("http://h/"), params: String::from("{}") }
    }

    #[test]
    fn a_rule_signs_with_its_secret_and_sends_its_headers() {
        let text = HeaderSource::Text(HeaderValue::from_static("1"));
        let rule = handling(Some("rotating"), &[("authorization", HeaderSource::Secret("token".into())), ("x-a", text)]);
        let request = build(rendered(), &rule, &vault()).expect("a good request");
        assert_eq!(request.signing.len(), 2);
        let headers: Vec<(&str, &str)> =
            request.headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        assert_eq!(headers, [("authorization", "Bearer s3cret"), ("x-a", "1")]);
        assert!(!format!("{request:?}").contains("s3cret") && !format!("{:?}", request.headers).contains("s3cret"));
    }

    #[test]
    fn a_rule_that_cannot_be_sent_is_told_from_a_delivery_that_cannot() {
        let secret = |name: &str| HeaderSource::Secret(name.into());
        for (rule, url, of_rule, text) in [
            (handling(Some("nobody"), &[]), "http://h/", true, "no secret \"nobody\""),
            (handling(Some("token"), &[]), "http://h/", true, "\"token\" cannot sign"),
            (handling(None, &[("x-a", secret("nobody"))]), "http://h/", true, "no secret \"nobody\""),
            (handling(None, &[("x-a", secret("lines"))]), "http://h/", true, "\"lines\" cannot be a header"),
            (handling(None, &[("x-a", secret("rotating"))]), "http://h/", true, "\"rotating\" cannot be a header"),
            (handling(Some("nobody"), &[]), "http://[bad/", true, "nobody"),
            (handling(Some("key"), &[]), "http://[bad/", false, "not a URL"),
            (handling(Some("key"), &[]), "ftp://h/", false, "ftp"),
        ] {
            let error = build(Rendered { url: url.to_string(), ..rendered() }, &rule, &vault()).expect_err(text);
            assert_eq!(error.concerns_rule(), of_rule, "{error}");
            assert!(error.to_string().contains(text) && !format!("{error:?}").contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn requests_that_are_signed_or_headed_differently_are_not_one() {
        let text = |value: &'static str| HeaderSource::Text(HeaderValue::from_static(value));
        let html = Handling { content_type: Some(HeaderValue::from_static("text/html")), ..Handling::default() };
        let rules = [
            Handling::default(),
            html,
            handling(Some("key"), &[]),
            handling(Some("rotating"), &[]),
            handling(None, &[("x-a", text("1"))]),
            handling(None, &[("x-a", text("2"))]),
            handling(None, &[("x-b", text("1"))]),
        ];
        let keys: HashSet<u128> =
            rules.iter().map(|rule| build(rendered(), rule, &vault()).expect("a good request").debounce_key()).collect();
        assert_eq!(keys.len(), rules.len());
    }

    proptest! {
        #[test]
        fn a_query_is_read_back_as_it_was_meant(name in "\\PC{1,10}", value in "(?s).{0,10}") {
            let request = request("GET", "http://h/?z=0", json!({name.clone(): value.clone()}));
            let pairs: Vec<(String, String)> = request.url.query_pairs().into_owned().collect();
            prop_assert_eq!(&pairs[1], &(name, value));
        }

        /// Nothing of a document reaches another part of the request than the one that the rule gave it.
        #[test]
        fn a_document_cannot_change_where_a_request_goes(
            id in "(\\PC|[\r\n\0/?#@:%\\\\.&= ]){1,20}",
            rev in "1-(\\PC|[\r\n/?#@:%.]){1,10}",
            text in "(?s).{0,20}",
        ) {
            let rule = crate::rules::rule::Rule::parse(&json!({
                "_id": "r", "type": "on_change", "db_name": "^db$", "method": "POST",
                "url": "https://api.example.com:8443/a/${change.id}/b?x=${change.rev}&y=${change}", "params": {"doc": "$change"},
            })).unwrap();
            let doc = json!({"_id": id, "_rev": rev, "text": text});
            let row: crate::couch::Row = serde_json::from_value(json!({"seq": "1-a", "id": id, "changes": [{"rev": rev}], "doc": doc})).unwrap();
            let request = build(crate::rules::template::render(&rule, "db", &crate::rules::document::Document::of(&row)), &rule.handling, &Vault::empty()).unwrap();
            prop_assert_eq!(&request.lane[..], "api.example.com:8443");
            prop_assert_eq!(request.url.origin().ascii_serialization(), "https://api.example.com:8443");
            prop_assert!(request.credentials.is_none() && request.headers.is_empty() && request.url.fragment().is_none());
            let segments: Vec<&str> = request.url.path_segments().unwrap().collect();
            prop_assert_eq!((segments.len(), segments[0], segments[2]), (3, "a", "b"));
            let pairs: Vec<(String, String)> = request.url.query_pairs().into_owned().collect();
            prop_assert_eq!(pairs.len(), 2);
            prop_assert_eq!(&pairs[0], &(String::from("x"), rev));
            prop_assert_eq!(serde_json::from_str::<Value>(&pairs[1].1).unwrap(), doc.clone());
            let body: Value = serde_json::from_slice(&request.body.unwrap()).unwrap();
            prop_assert_eq!(body, json!({"doc": doc}));
        }
    }
}
