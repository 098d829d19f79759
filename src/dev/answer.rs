//! What the server says: CouchDB's JSON answers and its `{"error":…,"reason":…}` failures.

use axum::body::Body;
use axum::response::Response;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, HeaderValue, LOCATION, RETRY_AFTER, SERVER};
use http::{HeaderName, StatusCode};
use serde_json::{Value, json};
use std::borrow::Cow;

/// A refusal in CouchDB's words. It is a request's whole answer, or one row of `_bulk_docs`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub status: u16,
    pub error: &'static str,
    pub reason: Cow<'static, str>,
}

pub type Answer = Result<Response, Failure>;

impl Failure {
    pub fn new(status: u16, error: &'static str, reason: impl Into<Cow<'static, str>>) -> Self {
        Self { status, error, reason: reason.into() }
    }

    pub fn bad_request(reason: impl Into<Cow<'static, str>>) -> Self {
        Self::new(400, "bad_request", reason)
    }

    pub fn missing() -> Self {
        Self::new(404, "not_found", "missing")
    }

    pub fn no_database() -> Self {
        Self::new(404, "not_found", "Database does not exist.")
    }

    pub fn conflict() -> Self {
        Self::new(409, "conflict", "Document update conflict.")
    }

    pub fn not_implemented(reason: impl Into<Cow<'static, str>>) -> Self {
        Self::new(501, "not_implemented", reason)
    }

    pub fn method_not_allowed(allowed: &'static str) -> Self {
        Self::new(405, "method_not_allowed", format!("Only {allowed} allowed"))
    }

    pub fn to_json(&self) -> Value {
        json!({"error": self.error, "reason": self.reason})
    }

    pub fn into_response(self) -> Response {
        let mut response = json_text(self.status, self.to_json().to_string());
        if self.status == 401 {
            set(&mut response, http::header::WWW_AUTHENTICATE, "Basic realm=\"server\"");
        }
        response
    }
}

pub fn json_value(status: u16, value: &Value) -> Response {
    json_text(status, value.to_string())
}

/// CouchDB ends each JSON answer with a line feed.
pub fn json_text(status: u16, mut text: String) -> Response {
    text.push('\n');
    with_body(status, "application/json", Body::from(text))
}

pub fn with_body(status: u16, content_type: &str, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    set(&mut response, CONTENT_TYPE, content_type);
    set(&mut response, CACHE_CONTROL, "must-revalidate");
    set(&mut response, SERVER, super::SERVER_NAME);
    response
}

/// A value that a header cannot carry is left out: it came from a document's id or an attachment's type.
fn set(response: &mut Response, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}

pub fn with_etag(mut response: Response, tag: &str) -> Response {
    set(&mut response, ETAG, &format!("\"{tag}\""));
    response
}

pub fn with_location(mut response: Response, url: &str) -> Response {
    set(&mut response, LOCATION, url);
    response
}

pub fn with_retry_after(mut response: Response, seconds: u64) -> Response {
    set(&mut response, RETRY_AFTER, &seconds.to_string());
    response
}

/// Appends `text` as a JSON string.
pub fn push_json_string(out: &mut String, text: &str) {
    match serde_json::to_string(text) {
        Ok(quoted) => out.push_str(&quoted),
        Err(_) => out.push_str("\"\""),
    }
}
