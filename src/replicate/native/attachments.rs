//! One revision with large attachments, from source to target without holding it.
//!
//! The source's answer is the target's request, byte for byte: `multipart/related` with the attachments as they are stored
//! (gzip stays gzip, or their digests would change), or JSON where no attachment travels or the source knows no other form.
//! Nothing is in memory but the chunk on its way. There is no total timeout, as an attachment may be of any size, but silence
//! on either side has an end; and once the target has answered, nothing more is read.

use super::elements::{AttachmentInfo, Shallow};
use crate::couch::{CouchError, chain_of, encode_doc_id, encode_segment, generation, retry_after};
use futures_util::Stream;
use futures_util::stream::try_unfold;
use http::{StatusCode, Version, header};
use reqwest::{Body, RequestBuilder, Response};
use serde::Deserialize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

/// What became of the revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Moved {
    /// `bytes` is what the source sent. Unconfirmed is a 202: fewer nodes than a quorum have it.
    Written { bytes: u64, is_confirmed: bool },
    /// The target does not want this document, now and later.
    Refused { reason: String },
    /// The target lacks an attachment that the source left out: again, with an empty `atts_since`.
    MissingStub,
}

#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    #[error("source: {0}")]
    Source(CouchError),
    #[error("target: {0}")]
    Target(CouchError),
}

/// How a revision of which a version without attachments has been read goes to the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carry {
    /// As it was read: the target has all attachments, or there are none.
    AsRead,
    /// Read again with its new attachments in the JSON.
    Inline,
    /// `transfer`.
    Stream,
}

/// A batch of documents whose attachments stay below this is written by one request; base64 of more would cost more than the
/// two requests of a stream.
pub const INLINE_BYTES_MAX: u64 = 64 * 1024;

/// CouchDB answers 400 to a request line of 8 kB, and a proxy may do so earlier; this leaves room for names.
const ATTS_SINCE_BYTES_MAX: usize = 3000;

/// Who has no parts to send (PouchDB's server; CouchDB of a document without attachments) calls it JSON only where that is
/// asked for.
const WANTED: &str = "multipart/related, application/json;q=0.5";

/// An error's body is a line of JSON, or some proxy's page.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
const REASON_CHARS_MAX: usize = 300;

/// With these reasons CouchDB refuses the user, with any other `validate_doc_update` refuses the document.
const REASONS_FOR_THE_USER: [&str; 6] = [
    "Name or password is incorrect",
    "Authentication required",
    "You are not authorized to access this db",
    "You are not allowed to access this db",
    "You are not a server admin",
    "temporarily locked",
];

/// By the source's own rule for `atts_since`: what is newer than the newest ancestor that the target has travels.
pub fn carry(doc: &Shallow, atts_since: &[impl AsRef<str>]) -> Carry {
    let since = ancestor_generation(doc, atts_since);
    let is_new = |info: &&AttachmentInfo| info.stub && info.revpos.is_none_or(|revpos| revpos > since);
    let lengths: Vec<Option<u64>> = doc.attachments.values().filter(is_new).map(|info| info.length).collect();
    let bytes = lengths.iter().try_fold(0_u64, |sum, length| Some(sum.saturating_add((*length)?)));
    match bytes {
        _ if lengths.is_empty() => Carry::AsRead,
        // No URL can name such a document: every client resolves these names away, encoded or not.
        _ if matches!(doc.id.strip_prefix("_design/").unwrap_or(&doc.id), "." | "..") => Carry::Inline,
        Some(0..=INLINE_BYTES_MAX) => Carry::Inline,
        _ => Carry::Stream,
    }
}

fn ancestor_generation(doc: &Shallow, atts_since: &[impl AsRef<str>]) -> u64 {
    let Some(revisions) = &doc.revisions else { return 0 };
    let is_ancestor = |rev: &str| {
        let (generation, id) = rev.split_once('-')?;
        let generation = generation.parse().ok()?;
        let back = usize::try_from(revisions.start.checked_sub(generation)?).ok()?;
        (revisions.ids.get(back)? == id).then_some(generation)
    };
    atts_since.iter().filter_map(|rev| is_ancestor(rev.as_ref())).max().unwrap_or(0)
}

/// Below the source's database. Of `atts_since` the newest are named: an old one saves less.
/// Without `latest`, with which CouchDB 3.5 answers the winner whatever revision is asked for; so a revision that was compacted
/// away since the page was read is an error, and the next try reads a page with its successor.
pub fn source_path(doc_id: &str, rev: &str, atts_since: &[impl AsRef<str>]) -> String {
    let mut path =
        format!("{}?rev={}&revs=true&attachments=true&att_encoding_info=true", encode_doc_id(doc_id), encode_segment(rev));
    let mut revs: Vec<&str> = atts_since.iter().map(AsRef::as_ref).collect();
    revs.sort_by_key(|rev| std::cmp::Reverse(generation(rev)));
    let mut list = String::new();
    for rev in revs {
        let separator = if list.is_empty() { "" } else { "%2C" };
        let item = format!("{separator}{}", encode_segment(&serde_json::Value::from(rev).to_string()));
        if list.len() + item.len() > ATTS_SINCE_BYTES_MAX {
            break;
        }
        list.push_str(&item);
    }
    if !list.is_empty() {
        path.push_str(&format!("&atts_since=%5B{list}%5D"));
    }
    path
}

/// Below the target's database.
pub fn target_path(doc_id: &str) -> String {
    format!("{}?new_edits=false", encode_doc_id(doc_id))
}

/// Moves what `source` (a GET of `source_path`) answers into `target` (a PUT of `target_path`).
///
/// Neither may come from a client with a read timeout: for reqwest the time until an answer includes that of sending. `idle` is
/// how long a side may be silent.
pub async fn transfer(source: RequestBuilder, target: RequestBuilder, idle: Duration) -> Result<Moved, MoveError> {
    let wanted = source.header(header::ACCEPT, WANTED).header(header::ACCEPT_ENCODING, "identity");
    let response = match timeout(idle, wanted.send()).await {
        Err(_) => return Err(Side::Source.silent(idle)),
        Ok(Err(error)) => return Err(MoveError::Source(lost(&error))),
        Ok(Ok(response)) if response.status().is_success() => response,
        Ok(Ok(response)) => return Err(MoveError::Source(Answer::read(response, idle).await.into_error())),
    };
    let Some(content_type) = response.headers().get(header::CONTENT_TYPE).filter(|value| is_document(value)).cloned() else {
        return Err(MoveError::Source(CouchError::Malformed(String::from("neither multipart/related nor JSON"))));
    };
    let mut request = target.header(header::CONTENT_TYPE, content_type);
    if let Some(length) = response.headers().get(header::CONTENT_LENGTH) {
        request = request.header(header::CONTENT_LENGTH, length);
    }
    let end_is_known = tells_its_end(&response);
    let progress = Arc::new(Progress::new());
    // Whichever way this ends, the rest of a large attachment must not be read for nothing.
    let _stop = progress.stop.clone().drop_guard();
    let sending = request.body(Body::wrap_stream(chunks(response, progress.clone()))).send();
    let sent = tokio::select! {
        biased;
        sent = sending => sent,
        side = progress.stalled(idle) => return Err(side.silent(idle)),
    };
    let (failure, bytes) = progress.ended();
    match (failure, sent) {
        (Some(failure), _) => Err(MoveError::Source(failure)),
        (None, Err(error)) => Err(MoveError::Target(lost(&error))),
        (None, Ok(response)) => match of_target(Answer::read(response, idle).await, bytes) {
            // It may have been cut without anybody noticing, and then it is not the document that is bad.
            Ok(Moved::Refused { reason }) if !end_is_known && reason.contains("bad_request") => {
                Err(MoveError::Source(CouchError::Malformed(reason)))
            }
            outcome => outcome,
        },
    }
}

fn is_document(content_type: &header::HeaderValue) -> bool {
    let text = content_type.to_str().unwrap_or_default().to_ascii_lowercase();
    matches!(text.split(';').next().map(str::trim), Some("multipart/related" | "application/json"))
}

/// Otherwise the end of the connection is the end of the answer, and a cut one looks whole.
fn tells_its_end(response: &Response) -> bool {
    let headers = response.headers();
    response.version() >= Version::HTTP_2
        || headers.contains_key(header::CONTENT_LENGTH)
        || headers.contains_key(header::TRANSFER_ENCODING)
}

fn lost(error: &reqwest::Error) -> CouchError {
    CouchError::Unreachable(chain_of(error))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Target,
}

impl Side {
    fn silent(self, idle: Duration) -> MoveError {
        let error = CouchError::Unreachable(format!("nothing moved for {}", humantime::format_duration(idle)));
        match self {
            Side::Source => MoveError::Source(error),
            Side::Target => MoveError::Target(error),
        }
    }
}

/// What both ends of the pipe know of it.
struct Progress {
    state: Mutex<State>,
    stop: CancellationToken,
}

struct State {
    waits_for: Side,
    since: Instant,
    bytes: u64,
    failure: Option<CouchError>,
}

impl Progress {
    fn new() -> Self {
        let state = State { waits_for: Side::Target, since: Instant::now(), bytes: 0, failure: None };
        Self { state: Mutex::new(state), stop: CancellationToken::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for(&self, side: Side, more_bytes: usize) {
        let mut state = self.state();
        (state.waits_for, state.since) = (side, Instant::now());
        state.bytes += more_bytes as u64;
    }

    fn source_failed(&self, error: &reqwest::Error) {
        self.state().failure = Some(lost(error));
    }

    fn ended(&self) -> (Option<CouchError>, u64) {
        let mut state = self.state();
        (state.failure.take(), state.bytes)
    }

    /// Who has been waited for too long.
    async fn stalled(&self, idle: Duration) -> Side {
        loop {
            let (side, until) = {
                let state = self.state();
                (state.waits_for, state.since + idle)
            };
            if Instant::now() >= until {
                return side;
            }
            sleep_until(until).await;
        }
    }
}

/// The body's end is missing: the connection to the target is cut, so that it writes nothing.
#[derive(Debug, thiserror::Error)]
#[error("the source broke off")]
struct BrokenOff;

/// A target that refuses by the request's head answers within this, and closes; what is written after that is reset, and the
/// failed write hides the answer. Where attachments are worth a stream, it is not noticed.
const HEAD_START: Duration = Duration::from_millis(10);

/// The target asks for each chunk, so that asking says that it took the one before.
fn chunks(response: Response, progress: Arc<Progress>) -> impl Stream<Item = Result<bytes::Bytes, BrokenOff>> + Send {
    try_unfold((response, progress, 0_u64), |(mut response, progress, count)| async move {
        progress.wait_for(Side::Source, 0);
        match count {
            1 => sleep(HEAD_START).await,
            // Mostly enough to see a later answer before more is written.
            _ => yield_now().await,
        }
        let chunk = tokio::select! {
            biased;
            () = progress.stop.cancelled() => return Err(BrokenOff),
            chunk = response.chunk() => chunk,
        };
        match chunk {
            Ok(chunk) => {
                progress.wait_for(Side::Target, chunk.as_ref().map_or(0, bytes::Bytes::len));
                Ok(chunk.map(|chunk| (chunk, (response, progress, count + 1))))
            }
            Err(error) => {
                progress.source_failed(&error);
                Err(BrokenOff)
            }
        }
    })
}

/// What a server said, in CouchDB's words where it has them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Answer {
    status: StatusCode,
    error: String,
    reason: String,
    retry_after: Option<Duration>,
}

impl Answer {
    /// A body that does not come in time counts as none: the status has said the most.
    async fn read(response: Response, idle: Duration) -> Self {
        let (status, retry_after) = (response.status(), retry_after(response.headers(), SystemTime::now()));
        let body = timeout(idle, beginning(response)).await.unwrap_or_default();
        Self { retry_after, ..Self::parse(status, &body) }
    }

    fn parse(status: StatusCode, body: &[u8]) -> Self {
        #[derive(Deserialize)]
        struct Raw {
            error: Option<serde_json::Value>,
            reason: Option<serde_json::Value>,
        }
        let text = |value: Option<serde_json::Value>| match value {
            Some(serde_json::Value::String(text)) => shown(&text),
            None | Some(serde_json::Value::Null) => String::new(),
            Some(other) => shown(&other.to_string()),
        };
        match serde_json::from_slice::<Raw>(body) {
            Ok(raw) => Self { status, error: text(raw.error), reason: text(raw.reason), retry_after: None },
            Err(_) => Self { status, reason: shown(&String::from_utf8_lossy(body)), ..Self::default() },
        }
    }

    fn told(&self) -> String {
        match (self.error.as_str(), self.reason.as_str()) {
            ("", "") => self.status.to_string(),
            (error, "") => error.to_string(),
            ("", reason) => reason.to_string(),
            (error, reason) => format!("{error}: {reason}"),
        }
    }

    fn into_error(self) -> CouchError {
        let reason = self.told();
        match self.status {
            StatusCode::UNAUTHORIZED => CouchError::Unauthorized(reason),
            StatusCode::FORBIDDEN => CouchError::Forbidden(reason),
            StatusCode::NOT_FOUND => CouchError::NotFound(reason),
            StatusCode::TOO_MANY_REQUESTS => CouchError::TooManyRequests { after: self.retry_after },
            status => CouchError::Status { status: status.as_u16(), reason },
        }
    }
}

/// Redacted before it is cut: half a URL hides where its password ends.
pub fn shown(text: &str) -> String {
    crate::vault::redact_text(text.trim()).chars().take(REASON_CHARS_MAX).collect()
}

async fn beginning(mut response: Response) -> Vec<u8> {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        if body.len() + chunk.len() > ANSWER_BYTES_MAX {
            break;
        }
        body.extend_from_slice(&chunk);
    }
    body
}

fn of_target(answer: Answer, bytes: u64) -> Result<Moved, MoveError> {
    let of_document = match answer.status {
        status if status.is_success() => {
            return Ok(Moved::Written { bytes, is_confirmed: status != StatusCode::ACCEPTED });
        }
        StatusCode::PRECONDITION_FAILED if answer.error == "missing_stub" => return Ok(Moved::MissingStub),
        StatusCode::PAYLOAD_TOO_LARGE => true,
        // A proxy's words are not about the document.
        StatusCode::BAD_REQUEST | StatusCode::CONFLICT => !answer.error.is_empty(),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            let is_couchdbs = matches!(answer.error.as_str(), "unauthorized" | "forbidden");
            is_couchdbs && !REASONS_FOR_THE_USER.iter().any(|reason| answer.reason.contains(reason))
        }
        _ => false,
    };
    match of_document {
        true => Ok(Moved::Refused { reason: answer.told() }),
        false => Err(MoveError::Target(answer.into_error())),
    }
}

#[cfg(test)]
mod tests;
