//! The HTTP API for operators: `/live`, `/ready`, `/metrics`, `/status`, deliveries and rules.
//!
//! It knows no stage: whoever starts it hands in closures that say whether the process is ready and what it is doing, and that
//! do what an operator wants. It stands on a network where anybody may knock, so connections are bounded in number and in age,
//! no body is read, and but for the first three pages everybody has to log in; `/status` is open on loopback.

mod browser;
pub mod login;
mod operations;
mod places;

pub use login::Login;
pub use operations::{Order, Refusal, What};

use crate::telemetry::Metrics;
use axum::extract::State;
use axum::extract::connect_info::Connected;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::IncomingStream;
use axum::{Json, Router, middleware};
use futures_util::future::BoxFuture;
use places::BoundedListener;
use serde_json::{Value, json};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// `/status` asks the actors; one that is stuck must not hold the answer for ever.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

/// The media type of the OpenMetrics text that `Metrics::page` writes.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Does what somebody wants who is allowed to.
pub type Operate = Arc<dyn Fn(Order) -> BoxFuture<'static, Result<Value, Refusal>> + Send + Sync>;

/// What the pages are made of.
#[derive(Clone)]
pub struct Pages {
    pub metrics: Arc<Metrics>,
    /// Why the process is not ready, for a person; Ok once the feed has been opened and CouchDB answers.
    pub ready: Arc<dyn Fn() -> Result<(), String> + Send + Sync>,
    pub status: Arc<dyn Fn() -> BoxFuture<'static, Value> + Send + Sync>,
    pub operate: Operate,
    pub login: Arc<Login>,
}

#[derive(Clone)]
struct AdminState {
    pages: Pages,
    is_loopback: bool,
}

/// A server that runs until `shutdown` is cancelled.
pub struct Admin {
    /// Where it listens: the port that the kernel chose, where 0 was asked for.
    pub address: SocketAddr,
    /// Ends once the last request has been answered.
    pub task: JoinHandle<()>,
}

pub async fn serve(listen: SocketAddr, pages: Pages, shutdown: CancellationToken) -> io::Result<Admin> {
    let listener = TcpListener::bind(listen).await?;
    let address = listener.local_addr()?;
    let bounded = BoundedListener::new(listener);
    let router = router(AdminState { pages, is_loopback: address.ip().is_loopback() });
    let task = tokio::spawn(async move {
        let service = router.into_make_service_with_connect_info::<Peer>();
        let server = axum::serve(bounded, service).with_graceful_shutdown(shutdown.cancelled_owned());
        if let Err(error) = server.await {
            warn!(%error, "the admin server ended");
        }
    });
    info!(%address, "admin listens");
    Ok(Admin { address, task })
}

fn router(state: AdminState) -> Router {
    let open = Router::new().route("/live", get(async || "live\n")).route("/ready", get(ready)).route("/metrics", get(metrics));
    let guarded = Router::new()
        .route("/deliveries", get(operations::deliveries))
        .route("/deliveries/retry", post(operations::retry_many))
        .route("/deliveries/drop", post(operations::drop_many))
        .route("/deliveries/{key}", get(operations::delivery))
        .route("/deliveries/{key}/retry", post(operations::retry))
        .route("/deliveries/{key}/drop", post(operations::drop_one))
        .route("/rules", get(operations::rules))
        .route("/rules/{id}/enable", post(operations::enable_rule));
    let (open, guarded) = match state.is_loopback {
        true => (open.route("/status", get(own_status)), guarded),
        false => (open, guarded.route("/status", get(status))),
    };
    let guarded = guarded.route_layer(middleware::from_fn_with_state(state.clone(), operations::guard));
    open.merge(guarded).with_state(state)
}

async fn ready(State(AdminState { pages, .. }): State<AdminState>) -> Response {
    match (pages.ready)() {
        Ok(()) => Json(json!({ "ready": true })).into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "ready": false, "reason": reason }))).into_response(),
    }
}

async fn metrics(State(AdminState { pages, .. }): State<AdminState>) -> Response {
    ([(header::CONTENT_TYPE, OPENMETRICS)], pages.metrics.page()).into_response()
}

async fn own_status(state: State<AdminState>, headers: HeaderMap) -> Response {
    match browser::is_own_host(&headers) {
        true => status(state).await,
        false => refusal(StatusCode::FORBIDDEN, "ask by IP address or as localhost"),
    }
}

async fn status(State(AdminState { pages, .. }): State<AdminState>) -> Response {
    match tokio::time::timeout(STATUS_TIMEOUT, (pages.status)()).await {
        Ok(status) => Json(status).into_response(),
        Err(_) => refusal(StatusCode::SERVICE_UNAVAILABLE, "the answer took too long"),
    }
}

fn refusal(status: StatusCode, reason: &str) -> Response {
    (status, Json(json!({ "error": reason }))).into_response()
}

/// Whose connection it is.
#[derive(Debug, Clone, Copy)]
struct Peer(SocketAddr);

impl Connected<IncomingStream<'_, BoundedListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, BoundedListener>) -> Self {
        Peer(*stream.remote_addr())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
