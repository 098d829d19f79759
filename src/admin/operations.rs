//! The routes that change something, or name what users wrote: each needs a login.
//!
//! What is wanted stands in the path and the query; no body is ever read.

use super::{AdminState, Peer, browser, refusal};
use crate::admin::login::Denied;
use axum::Json;
use axum::extract::{ConnectInfo, Extension, Path, Query, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use std::time::{Duration, Instant};

/// Actions stop at a page's end long before.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(45);

/// What somebody who is allowed to wants; the words of the query are whoever's that answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    pub what: What,
    pub query: Vec<(String, String)>,
    /// Who wants it.
    pub by: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    Deliveries,
    Delivery { key: String },
    Retry { key: String },
    Drop { key: String },
    RetryMany,
    DropMany,
    Rules,
    EnableRule { id: String },
}

/// Why there is no better answer, for a person; no secret is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub status: StatusCode,
    pub reason: String,
}

impl Refusal {
    pub fn new(status: StatusCode, reason: impl Into<String>) -> Self {
        Self { status, reason: reason.into() }
    }
}

/// Lets through whom a login shows to be an admin, and tells the handler who it is.
pub(super) async fn guard(
    State(state): State<AdminState>,
    ConnectInfo(Peer(peer)): ConnectInfo<Peer>,
    mut request: Request,
    next: Next,
) -> Response {
    if state.is_loopback && !browser::is_own_host(request.headers()) {
        return refusal(StatusCode::FORBIDDEN, "ask by IP address or as localhost");
    }
    if browser::is_cross_site(request.method(), request.headers()) {
        return refusal(StatusCode::FORBIDDEN, "a page of another site asks for this");
    }
    let mut response = match state.pages.login.who(request.headers(), peer.ip(), Instant::now()).await {
        Ok(who) => {
            request.extensions_mut().insert(Who(who));
            next.run(request).await
        }
        Err(denied) => denial(denied),
    };
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

#[derive(Clone)]
pub(super) struct Who(String);

fn denial(denied: Denied) -> Response {
    match denied {
        Denied::Nobody | Denied::Wrong => {
            let reason = match denied {
                Denied::Nobody => "this needs the name and password of a CouchDB admin, or the admin token",
                _ => "name, password or token is wrong",
            };
            let mut response = refusal(StatusCode::UNAUTHORIZED, reason);
            let how = HeaderValue::from_static("Basic realm=\"spiegel\", charset=\"UTF-8\"");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, how);
            response
        }
        Denied::NoAdmin => refusal(StatusCode::FORBIDDEN, "that user is no admin of CouchDB"),
        Denied::TooMany { after } => {
            let mut response = refusal(StatusCode::TOO_MANY_REQUESTS, "too many failed logins");
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs().max(1)));
            response
        }
        Denied::Unavailable(reason) => refusal(StatusCode::SERVICE_UNAVAILABLE, &reason),
    }
}

type Words = Query<Vec<(String, String)>>;

async fn answer(state: AdminState, what: What, Query(query): Words, Who(by): Who) -> Response {
    match tokio::time::timeout(ANSWER_TIMEOUT, (state.pages.operate)(Order { what, query, by })).await {
        Ok(Ok(answer)) => Json::<Value>(answer).into_response(),
        Ok(Err(Refusal { status, reason })) => refusal(status, &reason),
        Err(_) => refusal(StatusCode::SERVICE_UNAVAILABLE, "it took too long; what was done until now stays done"),
    }
}

pub(super) async fn deliveries(State(state): State<AdminState>, Extension(who): Extension<Who>, words: Words) -> Response {
    answer(state, What::Deliveries, words, who).await
}

pub(super) async fn delivery(
    State(state): State<AdminState>,
    Extension(who): Extension<Who>,
    Path(key): Path<String>,
    words: Words,
) -> Response {
    answer(state, What::Delivery { key }, words, who).await
}

pub(super) async fn retry(
    State(state): State<AdminState>,
    Extension(who): Extension<Who>,
    Path(key): Path<String>,
    words: Words,
) -> Response {
    answer(state, What::Retry { key }, words, who).await
}

pub(super) async fn drop_one(
    State(state): State<AdminState>,
    Extension(who): Extension<Who>,
    Path(key): Path<String>,
    words: Words,
) -> Response {
    answer(state, What::Drop { key }, words, who).await
}

pub(super) async fn retry_many(State(state): State<AdminState>, Extension(who): Extension<Who>, words: Words) -> Response {
    answer(state, What::RetryMany, words, who).await
}

pub(super) async fn drop_many(State(state): State<AdminState>, Extension(who): Extension<Who>, words: Words) -> Response {
    answer(state, What::DropMany, words, who).await
}

pub(super) async fn rules(State(state): State<AdminState>, Extension(who): Extension<Who>, words: Words) -> Response {
    answer(state, What::Rules, words, who).await
}

pub(super) async fn enable_rule(
    State(state): State<AdminState>,
    Extension(who): Extension<Who>,
    Path(id): Path<String>,
    words: Words,
) -> Response {
    answer(state, What::EnableRule { id }, words, who).await
}
