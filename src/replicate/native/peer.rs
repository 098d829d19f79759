//! One side of a replication: a database, the rights to use it, and the requests that the protocol makes of it.

use super::attachments::{MoveError, Moved, source_path, target_path, transfer};
use super::documents::SMALL_GET_BYTES;
use super::elements::{BulkGetElement, Shallow, Splitter, as_text};
use super::gate::{Gate, Gates};
use super::parameters::{Rights, Side};
use super::sessions::Sessions;
use crate::couch::health::Health;
use crate::couch::{CouchError, ReadError, Seq, chain_of, encode_doc_id, read_bounded, status_error};
use crate::telemetry::{Metrics, RequestLabels};
use crate::vault::Credentials;
use bytes::Bytes;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, COOKIE, HeaderMap, HeaderValue};
use reqwest::{Method, RequestBuilder, Response};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Cheap to clone.
#[derive(Clone)]
pub struct Peer {
    inner: Arc<Inner>,
}

struct Inner {
    net: Net,
    which: Which,
    /// The database's URL, without credentials or a slash at its end.
    base: String,
    db_name: String,
    headers: HeaderMap,
    credentials: Option<Credentials>,
    rights: Rights,
    gate: Gate,
    pipes: Gate,
    is_local: bool,
    requests: AtomicU64,
}

/// What all peers of a process share.
#[derive(Clone)]
pub struct Net {
    /// With a timeout on silence.
    pub http: reqwest::Client,
    /// For what has a watchdog of its own.
    pub patient: reqwest::Client,
    pub gates: Gates,
    /// For large attachments, which take long and must not take the places of those that do not.
    pub pipes: Gates,
    pub metrics: Arc<Metrics>,
    pub sessions: Sessions,
    /// Of the watched server.
    pub health: Health,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Which {
    Source,
    Target,
}

impl Which {
    pub fn name(self) -> &'static str {
        match self {
            Which::Source => "source",
            Which::Target => "target",
        }
    }
}

/// A request that failed, and whose fault it is.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{}: {error}", which.name())]
pub struct PeerError {
    pub which: Which,
    /// The watched server's own fault is an outage, and no failed run.
    pub is_local: bool,
    /// No connection could be made.
    pub is_out_of_reach: bool,
    pub error: Arc<CouchError>,
}

impl PeerError {
    /// The database itself is not there; a missing document has other words.
    pub fn is_missing_database(&self) -> bool {
        matches!(&*self.error, CouchError::NotFound(reason) if !is_missing_document(reason))
    }

    pub fn is_not_found(&self) -> bool {
        matches!(&*self.error, CouchError::NotFound(_))
    }

    pub fn is_refusal(&self) -> bool {
        matches!(&*self.error, CouchError::Unauthorized(_) | CouchError::Forbidden(_))
    }

    /// The body of the request is at fault: in smaller pieces it shows which document is.
    pub fn is_bad_content(&self) -> bool {
        matches!(&*self.error, CouchError::Status { status: 400 | 413, .. })
    }

    /// The body held one document, and it is at fault: larger than is allowed, or none that CouchDB takes. Any other 400 may be
    /// somebody's on the way.
    pub fn is_bad_document(&self) -> bool {
        match &*self.error {
            CouchError::Status { status: 413, .. } => true,
            CouchError::Status { status: 400, reason } => {
                ["doc_validation:", "illegal_docid:"].iter().any(|word| reason.starts_with(word))
            }
            _ => false,
        }
    }

    pub fn is_missing_stub(&self) -> bool {
        matches!(&*self.error, CouchError::Status { status: 412, reason } if reason.contains("missing_stub"))
    }

    /// The server does not know the endpoint.
    pub fn is_unsupported(&self) -> bool {
        matches!(&*self.error, CouchError::Status { status: 405 | 501, .. })
    }

    /// The server said something, and would say it again.
    pub fn is_answer(&self) -> bool {
        self.is_refusal() || self.is_not_found() || self.is_unsupported() || self.is_about_the_request()
    }

    /// The other side's word on this very request: sent alone, or in pieces, it may be told which part is meant.
    pub fn is_about_the_request(&self) -> bool {
        match &*self.error {
            CouchError::Forbidden(_) | CouchError::Conflict(_) => true,
            CouchError::Status { status, .. } => (400..500).contains(status) && *status != 408 && *status != 412,
            _ => false,
        }
    }
}

/// CouchDB's words for a document that is not there, against those for a database.
fn is_missing_document(reason: &str) -> bool {
    ["missing", "deleted"].iter().any(|word| reason == *word || reason.ends_with(&format!(": {word}")))
        // A design document without the filter that was asked for.
        || reason.contains("missing json key")
}

pub type Result<T> = std::result::Result<T, PeerError>;

/// An answer larger than this is refused: those that may be large are read as a stream.
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;

/// One row of `_changes?style=all_docs`: a document and its leaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChangesRow {
    pub id: String,
    pub revs: Vec<String>,
}

/// One page of what changed.
#[derive(Debug)]
pub struct Page {
    pub rows: Vec<ChangesRow>,
    /// Documents that came along and are whole: first revisions, which have no history, without attachments.
    pub docs: HashMap<String, Bytes>,
    pub last_seq: Seq,
    /// How many rows come after this page, where the server says it.
    pub pending: Option<u64>,
}

/// What to read of a source's changes: equal ones share their answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ChangesRequest {
    pub since: Option<Seq>,
    pub limit: usize,
    /// With the documents, where the answer does not become too large by them.
    pub with_docs: bool,
    /// `style`, `filter` and its parameters.
    pub query: Arc<[(String, String)]>,
    /// For filters that take one: document ids or a selector.
    pub body: Option<Arc<str>>,
}

/// A document that the target would not take.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Refused {
    #[serde(default)]
    pub id: String,
    #[serde(default)]
    pub rev: Option<String>,
    #[serde(default, deserialize_with = "as_text")]
    pub error: String,
    /// A `validate_doc_update` may throw anything.
    #[serde(default, deserialize_with = "as_text")]
    pub reason: String,
}

/// Revisions of a document that the target lacks, and those it has that may be their ancestors.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Missing {
    #[serde(default)]
    pub missing: Vec<String>,
    #[serde(default)]
    pub possible_ancestors: Vec<String>,
}

pub type Diff = HashMap<String, Missing>;

/// What `_bulk_docs` said.
#[derive(Debug, Clone, Default)]
pub struct Written {
    pub refused: Vec<Refused>,
    /// False for a 202: fewer nodes than a quorum have it.
    pub is_confirmed: bool,
}

impl Peer {
    pub fn new(net: Net, which: Which, side: &Side) -> Self {
        let mut headers = HeaderMap::new();
        if let Some(credentials) = &side.credentials {
            headers.insert(AUTHORIZATION, credentials.basic_header());
        }
        for (name, value) in &side.headers {
            headers.insert(name.clone(), value.clone());
        }
        let (gate, pipes) = (net.gates.of(&side.place()), net.pipes.of(&side.place()));
        let inner = Inner {
            which,
            base: side.url.as_str().trim_end_matches('/').to_string(),
            db_name: side.db_name.clone(),
            headers,
            credentials: side.credentials.clone(),
            rights: side.rights(),
            gate,
            pipes,
            is_local: side.is_local,
            requests: AtomicU64::new(0),
            net,
        };
        Self { inner: Arc::new(inner) }
    }

    pub fn db_name(&self) -> &str {
        &self.inner.db_name
    }

    /// Sent until now: by its run, and by it on behalf of others that asked together with it.
    pub fn requests(&self) -> u64 {
        self.inner.requests.load(Ordering::Relaxed)
    }

    fn count_request(&self) {
        self.inner.requests.fetch_add(1, Ordering::Relaxed);
    }

    /// Requests may be made together only where both are equal.
    pub fn key(&self) -> (Arc<str>, Rights) {
        (Arc::from(self.inner.base.as_str()), self.inner.rights)
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.request_by(&self.inner.net.http, method, path)
    }

    fn request_by(&self, client: &reqwest::Client, method: Method, path: &str) -> RequestBuilder {
        let url = match path.is_empty() {
            true => self.inner.base.clone(),
            false => format!("{}/{path}", self.inner.base),
        };
        let mut headers = self.inner.headers.clone();
        self.inner.net.sessions.add_to(self.inner.rights, &mut headers);
        client.request(method, url).headers(headers)
    }

    fn posted(&self, path: &str, body: impl Into<reqwest::Body>) -> RequestBuilder {
        self.request(Method::POST, path).header(CONTENT_TYPE, HeaderValue::from_static("application/json")).body(body)
    }

    pub fn error(&self, error: CouchError) -> PeerError {
        if self.inner.is_local && error.is_outage() {
            self.inner.net.health.suspect(&error);
        }
        PeerError { which: self.inner.which, is_local: self.inner.is_local, is_out_of_reach: false, error: Arc::new(error) }
    }

    /// A failure that no server is to blame for.
    pub fn error_of_ours(&self, error: CouchError) -> PeerError {
        PeerError { which: self.inner.which, is_local: false, is_out_of_reach: false, error: Arc::new(error) }
    }

    /// Sends, and where the password is not taken, logs in and sends once more.
    pub async fn send(&self, endpoint: &'static str, request: RequestBuilder) -> Result<Response> {
        let again = self.inner.credentials.as_ref().zip(request.try_clone());
        match (self.send_once(endpoint, request).await, again) {
            (Err(error), Some((credentials, again))) if matches!(&*error.error, CouchError::Unauthorized(_)) => {
                let Net { http, sessions, .. } = &self.inner.net;
                let server = self.inner.base.rsplit_once('/').map_or("", |(server, _)| server);
                match sessions.log_in(http, server, self.inner.rights, credentials).await {
                    // In place of one that is too old.
                    Some(cookie) => self.send_once(endpoint, again.headers(HeaderMap::from_iter([(COOKIE, cookie)]))).await,
                    None => Err(error),
                }
            }
            (result, _) => result,
        }
    }

    /// Waits for a place at the host, sends, counts, and turns a bad status into an error.
    async fn send_once(&self, endpoint: &'static str, request: RequestBuilder) -> Result<Response> {
        let pass = self.inner.gate.enter().await;
        self.count_request();
        let started = Instant::now();
        let answer = request.send().await;
        let status = answer.as_ref().map_or(0, |response| response.status().as_u16());
        pass.answered(status, started.elapsed());
        self.inner.net.metrics.couchdb_requests.get_or_create(&RequestLabels { endpoint, status }).inc();
        match answer {
            Ok(response) if response.status().is_success() => {
                self.inner.net.sessions.renew(self.inner.rights, response.headers());
                Ok(response)
            }
            Ok(response) => Err(self.error(status_error(response).await)),
            Err(error) => Err(self.lost(&error)),
        }
    }

    pub fn lost(&self, error: &reqwest::Error) -> PeerError {
        PeerError { is_out_of_reach: error.is_connect(), ..self.error(CouchError::Unreachable(chain_of(error))) }
    }

    async fn body(&self, endpoint: &'static str, request: RequestBuilder) -> Result<Bytes> {
        let response = self.send(endpoint, request).await?;
        self.read(response).await
    }

    async fn read(&self, response: Response) -> Result<Bytes> {
        let too_large = || self.error(CouchError::Malformed(format!("larger than {ANSWER_BYTES_MAX} bytes")));
        self.read_at_most(response, ANSWER_BYTES_MAX).await?.ok_or_else(too_large)
    }

    fn parsed<'a, T: Deserialize<'a>>(&self, endpoint: &str, body: &'a [u8]) -> Result<T> {
        serde_json::from_slice(body).map_err(|error| self.error(CouchError::Malformed(format!("{endpoint}: {error}"))))
    }

    /// False where it was there already.
    pub async fn create(&self, params: &[(String, String)]) -> Result<bool> {
        match self.send("db", self.request(Method::PUT, "").query(params)).await {
            Ok(_) => Ok(true),
            Err(error) if matches!(&*error.error, CouchError::Status { status: 412, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Null where there is none: whoever asks for its filter is told so by CouchDB.
    pub async fn design_document(&self, name: &str) -> Result<Value> {
        match self.body("doc", self.request(Method::GET, &encode_doc_id(&format!("_design/{name}")))).await {
            Ok(body) => self.parsed("doc", &body),
            Err(error) if matches!(&*error.error, CouchError::NotFound(reason) if is_missing_document(reason)) => Ok(Value::Null),
            Err(error) => Err(error),
        }
    }

    /// When this database was made, to the second; it is not there on every server.
    pub async fn instance_start_time(&self) -> Result<String> {
        let body = self.body("db", self.request(Method::GET, "")).await?;
        let info: Value = self.parsed("db", &body)?;
        Ok(match &info["instance_start_time"] {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        })
    }

    /// How many revisions of a document it remembers.
    pub async fn revs_limit(&self) -> Result<u64> {
        let body = self.body("_revs_limit", self.request(Method::GET, "_revs_limit")).await?;
        self.parsed("_revs_limit", &body)
    }

    /// `id` without its `_local/`. None where there is no such document.
    pub async fn read_local(&self, id: &str) -> Result<Option<Bytes>> {
        let path = encode_doc_id(&format!("_local/{id}"));
        match self.body("_local", self.request(Method::GET, &path)).await {
            Ok(body) => Ok(Some(body)),
            Err(error) if matches!(&*error.error, CouchError::NotFound(reason) if is_missing_document(reason)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Many at once, in the order of `ids`.
    pub async fn read_locals(&self, ids: &[Arc<str>]) -> Result<Vec<Option<Bytes>>> {
        #[derive(Deserialize)]
        struct Rows<'a> {
            #[serde(borrow)]
            rows: Vec<Entry<'a>>,
        }
        #[derive(Deserialize)]
        struct Entry<'a> {
            #[serde(default, borrow)]
            doc: Option<&'a RawValue>,
        }
        let keys: Vec<String> = ids.iter().map(|id| format!("_local/{id}")).collect();
        let request = self.posted("_local_docs", json!({ "keys": keys }).to_string()).query(&[("include_docs", "true")]);
        let body = self.body("_local_docs", request).await?;
        let rows: Rows = self.parsed("_local_docs", &body)?;
        if rows.rows.len() != ids.len() {
            let error = format!("_local_docs answered {} of {} keys", rows.rows.len(), ids.len());
            return Err(self.error(CouchError::Malformed(error)));
        }
        let docs = rows.rows.into_iter().map(|entry| entry.doc.map(|doc| Bytes::copy_from_slice(doc.get().as_bytes())));
        Ok(docs.map(|doc| doc.filter(|doc| doc.as_ref() != b"null")).collect())
    }

    pub async fn write_local(&self, id: &str, doc: &Value) -> Result<()> {
        let path = encode_doc_id(&format!("_local/{id}"));
        let request = self.request(Method::PUT, &path).header(CONTENT_TYPE, "application/json").body(doc.to_string());
        self.send("_local", request).await.map(|_| ())
    }

    /// Several at once, each with its `_id`. False where the server did not take them all.
    pub async fn write_locals(&self, docs: &[Value]) -> Result<bool> {
        let body = self.body("_bulk_docs", self.posted("_bulk_docs", json!({ "docs": docs }).to_string())).await?;
        let answers: Vec<Value> = self.parsed("_bulk_docs", &body)?;
        Ok(answers.len() == docs.len() && answers.iter().all(|answer| answer.get("error").is_none()))
    }

    pub async fn changes(&self, asked: &ChangesRequest) -> Result<Page> {
        let mut request = match &asked.body {
            Some(body) => self.posted("_changes", body.to_string()),
            None => self.request(Method::GET, "_changes"),
        };
        request = request.query(&*asked.query).query(&[("limit", asked.limit)]).query(&[("seq_interval", asked.limit)]);
        if let Some(since) = &asked.since {
            request = request.query(&[("since", since.as_query())]);
        }
        let body = match asked.with_docs {
            false => self.body("_changes", request).await?,
            true => {
                let response = self.send("_changes", request.query(&[("include_docs", "true")])).await?;
                match self.read_at_most(response, SMALL_GET_BYTES).await? {
                    Some(body) => body,
                    None => return Box::pin(self.changes(&ChangesRequest { with_docs: false, ..asked.clone() })).await,
                }
            }
        };
        #[derive(Deserialize)]
        struct Raw<'a> {
            #[serde(borrow)]
            results: Vec<RawRow<'a>>,
            last_seq: Seq,
            #[serde(default)]
            pending: Option<u64>,
        }
        #[derive(Deserialize)]
        struct RawRow<'a> {
            id: String,
            changes: Vec<Leaf>,
            #[serde(default, borrow)]
            doc: Option<&'a RawValue>,
        }
        #[derive(Deserialize)]
        struct Leaf {
            rev: String,
        }
        let Raw { results, last_seq, pending } = self.parsed("_changes", &body)?;
        let mut rows = Vec::with_capacity(results.len());
        let mut docs = HashMap::new();
        for row in results {
            let revs: Vec<String> = row.changes.into_iter().map(|leaf| leaf.rev).collect();
            if let Some(doc) = row.doc.filter(|doc| is_whole(doc, &row.id, &revs)) {
                docs.insert(row.id.clone(), body.slice_ref(doc.get().as_bytes()));
            }
            rows.push(ChangesRow { id: row.id, revs });
        }
        Ok(Page { rows, docs, last_seq, pending })
    }

    pub async fn revs_diff(&self, revs: &HashMap<&str, Vec<&str>>) -> Result<Diff> {
        let asked = serde_json::to_vec(revs).map_err(|error| self.error(CouchError::Malformed(error.to_string())))?;
        let body = self.body("_revs_diff", self.posted("_revs_diff", asked)).await?;
        self.parsed("_revs_diff", &body)
    }

    /// The answer is handed out unread: it may be large.
    pub async fn bulk_get(&self, docs: &[Value], with_attachments: bool) -> Result<Response> {
        let mut request = self.posted("_bulk_get", json!({ "docs": docs }).to_string()).header(ACCEPT, "application/json");
        request = request.query(&[("revs", "true"), ("latest", "true")]);
        if with_attachments {
            request = request.query(&[("attachments", "true")]);
        }
        self.send("_bulk_get", request).await
    }

    /// One element for each that was asked for; None where the answer is longer than `bytes_max`.
    pub async fn bulk_get_whole(
        &self,
        docs: &[Value],
        with_attachments: bool,
        bytes_max: usize,
    ) -> Result<Option<Vec<BulkGetElement>>> {
        let response = self.bulk_get(docs, with_attachments).await?;
        let Some(body) = self.read_at_most(response, bytes_max).await? else { return Ok(None) };
        let (mut splitter, mut texts) = (Splitter::new(bytes_max), Vec::new());
        splitter.push(body, &mut texts).map_err(|error| self.bulk_get_malformed(error))?;
        splitter.finish().map_err(|error| self.bulk_get_malformed(error))?;
        self.expect_answers(docs.len(), texts.len())?;
        let elements: std::result::Result<_, _> = texts.iter().map(BulkGetElement::parse).collect();
        elements.map(Some).map_err(|error| self.bulk_get_malformed(error))
    }

    /// An answer to each question, or what was not answered would count as copied.
    pub fn expect_answers(&self, asked: usize, answered: usize) -> Result<()> {
        match asked == answered {
            true => Ok(()),
            false => Err(self.bulk_get_malformed(format!("{answered} answers to {asked} questions"))),
        }
    }

    pub fn bulk_get_malformed(&self, what: impl std::fmt::Display) -> PeerError {
        self.error(CouchError::Malformed(format!("_bulk_get: {what}")))
    }

    /// The whole body of an answer, where it is no longer than `bytes_max`.
    pub async fn read_at_most(&self, response: Response, bytes_max: usize) -> Result<Option<Bytes>> {
        match read_bounded(response, bytes_max).await {
            Ok(body) => Ok(Some(body)),
            Err(ReadError::Lost(error)) => Err(self.lost(&error)),
            Err(ReadError::TooLarge) => Ok(None),
        }
    }

    /// Documents as they came from the source.
    pub async fn write(&self, docs: &[Bytes]) -> Result<Written> {
        let body = bulk_body(docs);
        let length: usize = body.iter().map(Bytes::len).sum();
        let pieces = futures_util::stream::iter(body.into_iter().map(Ok::<_, std::convert::Infallible>));
        // As the pieces that they are: a copy of everything would be memory that no budget knows of.
        let request = self.posted("_bulk_docs", reqwest::Body::wrap_stream(pieces)).header(CONTENT_LENGTH, length);
        let response = self.send("_bulk_docs", request).await?;
        let is_confirmed = response.status() != reqwest::StatusCode::ACCEPTED;
        let body = self.read(response).await?;
        let answers: Vec<Refused> = self.parsed("_bulk_docs", &body)?;
        let refused = answers.into_iter().filter(|answer| !answer.error.is_empty()).collect();
        Ok(Written { refused, is_confirmed })
    }

    /// One revision with its attachments, from this source into the target, without holding it.
    pub async fn move_document(&self, target: &Peer, id: &str, rev: &str, atts_since: &[String]) -> Result<Moved> {
        let _place = target.inner.pipes.enter().await;
        let reading = self.request_by(&self.inner.net.patient, Method::GET, &source_path(id, rev, atts_since));
        let writing = target.request_by(&target.inner.net.patient, Method::PUT, &target_path(id));
        transfer(reading, writing, SILENCE_MAX).await.map_err(|error| match error {
            MoveError::Source(error) => self.error(error),
            MoveError::Target(error) => target.error(error),
        })
    }
}

/// The longest silence within an answer of either side.
pub const SILENCE_MAX: Duration = Duration::from_secs(60);

fn bulk_body(docs: &[Bytes]) -> Vec<Bytes> {
    let mut body = Vec::with_capacity(docs.len() * 2 + 1);
    body.push(Bytes::from_static(br#"{"new_edits":false,"docs":["#));
    for (at, doc) in docs.iter().enumerate() {
        if at > 0 {
            body.push(Bytes::from_static(b","));
        }
        body.push(doc.clone());
    }
    body.push(Bytes::from_static(b"]}"));
    body
}

/// A first revision, the only one, without attachments: nothing about it is told by `_bulk_get` alone.
fn is_whole(doc: &RawValue, id: &str, revs: &[String]) -> bool {
    let [rev] = revs else { return false };
    rev.starts_with("1-")
        && Shallow::parse(doc.get().as_bytes())
            .is_ok_and(|shallow| shallow.id == id && shallow.rev == *rev && shallow.attachments.is_empty())
}
