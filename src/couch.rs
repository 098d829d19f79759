//! The client of the watched CouchDB.
//!
//! One connection pool, connect and read timeouts but never a total timeout on a feed, bodies bounded, errors that say what a
//! failure means. Credentials travel in a header that is marked sensitive and never in a URL, so that no error text of the
//! HTTP library can carry them.

pub mod changes;
pub mod docs;
pub mod fingerprint;
pub mod health;
pub mod replicate;
pub mod session;

use crate::job::Verdict;
use crate::telemetry::{Metrics, RequestLabels};
use crate::vault::Credentials;
use bytes::BytesMut;
use health::Health;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use url::Url;

pub use changes::{Changes, ChangesQuery, FeedLine, Rev, Row, generation, generation_of};
pub use docs::WriteResult;
pub use session::Standing;

/// A position in a database's changes. Opaque: never compared for order. CouchDB's are strings, PouchDB's are integers.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Seq {
    Number(u64),
    Text(Arc<str>),
}

impl Seq {
    pub fn zero() -> Self {
        Seq::Number(0)
    }

    /// Before the dash: how many updates there were, more or less. A hint, and never a position.
    pub fn number(&self) -> Option<u64> {
        match self {
            Seq::Number(number) => Some(*number),
            Seq::Text(text) => text.split('-').next()?.parse().ok(),
        }
    }

    /// As documents carry it; None where it is of a type that no server gives.
    pub fn of_json(value: &Value) -> Option<Self> {
        match value {
            Value::Number(number) => number.as_u64().map(Seq::Number),
            Value::String(text) => Some(Seq::from(text.as_str())),
            // BigCouch's seqs were arrays; their JSON text is what `since` takes.
            Value::Array(_) => Some(Seq::from(value.to_string().as_str())),
            _ => None,
        }
    }

    pub fn to_json(&self) -> Value {
        match self {
            Seq::Number(number) => Value::from(*number),
            Seq::Text(text) => Value::from(text.as_ref()),
        }
    }

    pub fn as_query(&self) -> String {
        match self {
            Seq::Number(n) => n.to_string(),
            Seq::Text(s) => s.to_string(),
        }
    }
}

impl From<&str> for Seq {
    fn from(s: &str) -> Self {
        Seq::Text(s.into())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum CouchError {
    #[error("couchdb does not answer: {0}")]
    Unreachable(String),
    #[error("couchdb refused the credentials (401): {0}")]
    Unauthorized(String),
    #[error("couchdb forbids it (403): {0}")]
    Forbidden(String),
    #[error("not found: {0}")]
    NotFound(String),
    #[error("conflict: {0}")]
    Conflict(String),
    #[error("couchdb asks to slow down (429)")]
    TooManyRequests { after: Option<Duration> },
    #[error("couchdb answered {status}: {reason}")]
    Status { status: u16, reason: String },
    #[error("couchdb's answer cannot be read: {0}")]
    Malformed(String),
}

impl CouchError {
    /// True where the server is to blame, not the request: the same request may work later.
    pub fn is_outage(&self) -> bool {
        match self {
            CouchError::Unreachable(_) | CouchError::Malformed(_) | CouchError::Unauthorized(_) => true,
            CouchError::Status { status, .. } => *status >= 500 || *status == 412 || *status == 408,
            // After a few wrong passwords for our user, from wherever, CouchDB locks it for minutes ([chttpd_auth_lockout]).
            CouchError::Forbidden(reason) => reason.contains(LOCKED_OUT),
            _ => false,
        }
    }

    /// CouchDB's answer to a `since` that it never gave out.
    pub fn is_unknown_seq(&self) -> bool {
        matches!(self, CouchError::Status { status: 400, reason } if reason.contains("since") || reason.contains("sequence"))
    }

    pub fn verdict(&self) -> Verdict {
        match self {
            CouchError::TooManyRequests { after } => Verdict::Retry { after: *after },
            CouchError::Status { status, .. } if (400..500).contains(status) && *status != 412 && *status != 408 => {
                Verdict::GiveUp
            }
            CouchError::Forbidden(reason) if reason.contains(LOCKED_OUT) => Verdict::Retry { after: None },
            CouchError::Forbidden(_) | CouchError::Conflict(_) => Verdict::GiveUp,
            _ => Verdict::Retry { after: None },
        }
    }
}

pub type Result<T> = std::result::Result<T, CouchError>;

#[derive(Debug, Clone)]
pub struct CouchSettings {
    /// Without credentials; a path prefix is kept.
    pub url: Url,
    pub credentials: Option<Credentials>,
    pub connect_timeout: Duration,
    /// The longest silence within an answer.
    pub read_timeout: Duration,
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Couch {
    inner: Arc<Inner>,
}

struct Inner {
    http: reqwest::Client,
    /// For answers that may take their time: a feed has its own watchdog, a replication its own bound.
    patient: reqwest::Client,
    base: String,
    settings: CouchSettings,
    health: Health,
    metrics: Arc<Metrics>,
}

/// An answer larger than this is refused: a page of changes with its documents stays far below it.
const ANSWER_BYTES_MAX: usize = 512 * 1024 * 1024;
const LOCKED_OUT: &str = "temporarily locked";
pub(crate) const REPLICATE: &str = "_replicate";
/// How much of an error's body is kept for the log.
const REASON_CHARS_MAX: usize = 300;

/// RFC 3986's unreserved characters stay; everything else that a database or document may be called is encoded.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

pub fn encode_segment(segment: &str) -> String {
    utf8_percent_encode(segment, SEGMENT).to_string()
}

/// A document's path: `_local/x` and `_design/x` keep their first slash, any other slash is part of the id.
pub fn encode_doc_id(id: &str) -> String {
    for prefix in ["_local/", "_design/"] {
        if let Some(rest) = id.strip_prefix(prefix) {
            return format!("{prefix}{}", encode_segment(rest));
        }
    }
    encode_segment(id)
}

impl Couch {
    pub fn new(settings: CouchSettings, metrics: Arc<Metrics>) -> Result<Self> {
        let builder = || {
            reqwest::Client::builder()
                .connect_timeout(settings.connect_timeout)
                .tcp_keepalive(Duration::from_secs(30))
                .tcp_nodelay(true)
                .pool_max_idle_per_host(64)
                .redirect(reqwest::redirect::Policy::none())
                .user_agent(concat!("spiegel/", env!("CARGO_PKG_VERSION")))
        };
        let unbuildable = |error: reqwest::Error| CouchError::Unreachable(format!("build the HTTP client: {error}"));
        let http = builder().read_timeout(settings.read_timeout).build().map_err(unbuildable)?;
        let patient = builder().build().map_err(unbuildable)?;
        let base = settings.url.as_str().trim_end_matches('/').to_string();
        Ok(Self { inner: Arc::new(Inner { http, patient, base, settings, health: Health::new(metrics.clone()), metrics }) })
    }

    pub fn health(&self) -> &Health {
        &self.inner.health
    }

    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.inner.metrics
    }

    pub fn settings(&self) -> &CouchSettings {
        &self.inner.settings
    }

    /// The server's address for people: no credentials.
    pub fn address(&self) -> &str {
        &self.inner.base
    }

    /// `path` is already encoded and starts without a slash.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.request_by(&self.inner.http, method, path)
    }

    pub(crate) fn request_without_read_timeout(&self, method: Method, path: &str) -> RequestBuilder {
        self.request_by(&self.inner.patient, method, path)
    }

    fn request_by(&self, client: &reqwest::Client, method: Method, path: &str) -> RequestBuilder {
        let mut request = client.request(method, format!("{}/{path}", self.inner.base));
        if let Some(credentials) = &self.inner.settings.credentials {
            request = request.header(reqwest::header::AUTHORIZATION, credentials.basic_header());
        }
        request
    }

    /// Sends, counts, tells CouchHealth what happened, and turns a bad status into an error.
    pub(crate) async fn send(&self, endpoint: &'static str, request: RequestBuilder) -> Result<Response> {
        let answer = request.send().await;
        let status = answer.as_ref().map_or(0, |response| response.status().as_u16());
        self.inner.metrics.couchdb_requests.get_or_create(&RequestLabels { endpoint, status }).inc();
        match answer {
            Ok(response) if response.status().is_success() => Ok(response),
            Ok(response) => {
                let error = status_error(response).await;
                // `_replicate` answers 500 for a source that is missing and 401 for its password: that says nothing of us.
                if error.is_outage() && endpoint != REPLICATE {
                    self.inner.health.suspect(&error);
                }
                Err(error)
            }
            Err(error) => Err(self.lost(&error)),
        }
    }

    /// A request or body that broke off; CouchHealth looks into it.
    pub(crate) fn lost(&self, error: &reqwest::Error) -> CouchError {
        let error = CouchError::Unreachable(chain_of(error));
        self.inner.health.suspect(&error);
        error
    }

    pub(crate) async fn body(&self, response: Response) -> Result<bytes::Bytes> {
        match read_bounded(response, ANSWER_BYTES_MAX).await {
            Ok(body) => Ok(body),
            Err(ReadError::Lost(error)) => Err(self.lost(&error)),
            Err(ReadError::TooLarge) => Err(CouchError::Malformed(format!("larger than {ANSWER_BYTES_MAX} bytes"))),
        }
    }

    pub async fn json<T: DeserializeOwned>(&self, endpoint: &'static str, request: RequestBuilder) -> Result<T> {
        let response = self.send(endpoint, request).await?;
        let body = self.body(response).await?;
        serde_json::from_slice(&body).map_err(|e| CouchError::Malformed(format!("{endpoint}: {e}")))
    }

    pub async fn get<T: DeserializeOwned>(&self, endpoint: &'static str, path: &str) -> Result<T> {
        self.json(endpoint, self.request(Method::GET, path)).await
    }

    /// Whether the server answers us as it should: `_session` is cheap, needs valid credentials, and is JSON.
    pub async fn probe(&self) -> Result<()> {
        let session: Value = self.get("_session", "_session").await?;
        match session["userCtx"].is_object() {
            true => Ok(()),
            false => Err(CouchError::Malformed(String::from("_session without userCtx"))),
        }
    }

    /// `GET /`: the welcome, with version and uuid.
    pub async fn welcome(&self) -> Result<Welcome> {
        self.get("welcome", "").await
    }
}

/// What an answer that is no success says.
pub(crate) async fn status_error(response: Response) -> CouchError {
    let status = response.status();
    let after = retry_after(response.headers(), SystemTime::now());
    let reason = match read_bounded(response, 64 * 1024).await {
        Ok(body) => reason_of(&body),
        Err(_) => String::from("no reason given"),
    };
    match status {
        StatusCode::UNAUTHORIZED => CouchError::Unauthorized(reason),
        StatusCode::FORBIDDEN => CouchError::Forbidden(reason),
        StatusCode::NOT_FOUND => CouchError::NotFound(reason),
        StatusCode::CONFLICT => CouchError::Conflict(reason),
        StatusCode::TOO_MANY_REQUESTS => CouchError::TooManyRequests { after },
        _ => CouchError::Status { status: status.as_u16(), reason },
    }
}

#[derive(Debug, Clone, Deserialize)]
pub struct Welcome {
    #[serde(default)]
    pub couchdb: Option<String>,
    #[serde(default)]
    pub version: Option<String>,
    #[serde(default)]
    pub uuid: Option<String>,
}

pub(crate) enum ReadError {
    Lost(reqwest::Error),
    TooLarge,
}

pub(crate) async fn read_bounded(mut response: Response, bytes_max: usize) -> std::result::Result<bytes::Bytes, ReadError> {
    let mut body = BytesMut::new();
    while let Some(chunk) = response.chunk().await.map_err(ReadError::Lost)? {
        if body.len() + chunk.len() > bytes_max {
            return Err(ReadError::TooLarge);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}

/// An HTTP library's error hides its cause in `source`; the URL is left out, the causes are kept.
pub fn chain_of(error: &reqwest::Error) -> String {
    let mut text = match (error.is_timeout(), error.is_connect(), error.is_body() || error.is_decode()) {
        (true, _, _) => String::from("timed out"),
        (_, true, _) => String::from("cannot connect"),
        (_, _, true) => String::from("the answer broke off"),
        _ => String::from("the request failed"),
    };
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = inner.source();
    }
    text
}

/// `Retry-After` in seconds or as a date (RFC 9110, 10.2.3); a date that has passed says nothing.
pub fn retry_after(headers: &reqwest::header::HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(reqwest::header::RETRY_AFTER)?.to_str().ok()?.trim();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // So many digits that they are no number are a long time as well.
        return Some(Duration::from_secs(text.parse().unwrap_or(u64::MAX)));
    }
    httpdate::parse_http_date(text).ok()?.duration_since(now).ok()
}

fn reason_of(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Reason {
        error: Option<String>,
        reason: Option<String>,
    }
    let text = match serde_json::from_slice::<Reason>(body) {
        Ok(Reason { error: Some(error), reason: Some(reason) }) => format!("{error}: {reason}"),
        Ok(Reason { error: Some(text), reason: None }) | Ok(Reason { error: None, reason: Some(text) }) => text,
        _ => String::from_utf8_lossy(body).trim().to_string(),
    };
    // Redacted before it is cut: half a URL hides where its password ends.
    crate::vault::redact_text(&text).chars().take(REASON_CHARS_MAX).collect()
}
