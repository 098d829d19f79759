//! The HTTP API for operators: `/live`, `/ready`, `/metrics`, `/status`.
//!
//! It knows no stage: whoever starts it hands in two closures that say whether the process is ready and what it is doing. It
//! stands on a network where anybody may knock, so connections are bounded in number and in age, and `/status`, which names
//! databases, answers on loopback only until it has a login.

use crate::telemetry::Metrics;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::serve::Listener;
use axum::{Json, Router};
use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Probes, a scraper or two and a person: far below this. The rest waits in the kernel.
const CONNECTIONS_MAX: usize = 256;
/// A connection is closed after this long, idle or not: one that sends a byte a minute must not hold a place. Scrapers reconnect.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(60);
/// `/status` asks the actors; one that is stuck must not hold the answer for ever.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

/// The media type of the OpenMetrics text that `Metrics::page` writes.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone)]
pub struct AdminState {
    pub metrics: Arc<Metrics>,
    /// Why the process is not ready, for a person; Ok once the feed has been opened and CouchDB answers.
    pub ready: Arc<dyn Fn() -> Result<(), String> + Send + Sync>,
    pub status: Arc<dyn Fn() -> BoxFuture<'static, Value> + Send + Sync>,
}

/// A server that runs until `shutdown` is cancelled.
pub struct Admin {
    /// Where it listens: the port that the kernel chose, where 0 was asked for.
    pub address: SocketAddr,
    /// Ends once the last request has been answered.
    pub task: JoinHandle<()>,
}

pub async fn serve(listen: SocketAddr, state: AdminState, shutdown: CancellationToken) -> io::Result<Admin> {
    let listener = TcpListener::bind(listen).await?;
    let address = listener.local_addr()?;
    let bounded = BoundedListener { listener, places: Arc::new(Semaphore::new(CONNECTIONS_MAX)) };
    let router = router(state, address.ip().is_loopback());
    let task = tokio::spawn(async move {
        let server = axum::serve(bounded, router).with_graceful_shutdown(shutdown.cancelled_owned());
        if let Err(error) = server.await {
            warn!(%error, "the admin server ended");
        }
    });
    info!(%address, "admin listens");
    Ok(Admin { address, task })
}

fn router(state: AdminState, is_loopback: bool) -> Router {
    let status_handler = match is_loopback {
        true => get(status),
        false => get(status_refused),
    };
    Router::new()
        .route("/live", get(async || "live\n"))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/status", status_handler)
        .with_state(state)
}

async fn ready(State(state): State<AdminState>) -> Response {
    match (state.ready)() {
        Ok(()) => Json(json!({ "ready": true })).into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "ready": false, "reason": reason }))).into_response(),
    }
}

async fn metrics(State(state): State<AdminState>) -> Response {
    ([(header::CONTENT_TYPE, OPENMETRICS)], state.metrics.page()).into_response()
}

async fn status(State(state): State<AdminState>, headers: HeaderMap) -> Response {
    if !is_own_host(&headers) {
        return refusal(StatusCode::FORBIDDEN, "ask by IP address or as localhost");
    }
    match tokio::time::timeout(STATUS_TIMEOUT, (state.status)()).await {
        Ok(status) => Json(status).into_response(),
        Err(_) => refusal(StatusCode::SERVICE_UNAVAILABLE, "the answer took too long"),
    }
}

async fn status_refused() -> Response {
    refusal(StatusCode::FORBIDDEN, "/status answers only where admin.listen is a loopback address: it has no login yet")
}

fn refusal(status: StatusCode, reason: &str) -> Response {
    (status, Json(json!({ "error": reason }))).into_response()
}

/// A page of the web can make a name of its own point at 127.0.0.1 and ask through somebody's browser: then the name is in `Host`.
fn is_own_host(headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    match host.parse::<axum::http::uri::Authority>() {
        Ok(authority) => {
            let name = authority.host().trim_start_matches('[').trim_end_matches(']');
            name == "localhost" || name.parse::<std::net::IpAddr>().is_ok()
        }
        Err(_) => false,
    }
}

struct BoundedListener {
    listener: TcpListener,
    places: Arc<Semaphore>,
}

impl Listener for BoundedListener {
    type Io = BoundedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (BoundedStream, SocketAddr) {
        // The semaphore is never closed; if it were, the connection would only go uncounted.
        let place = self.places.clone().acquire_owned().await.ok();
        // TcpListener's own `accept` retries by itself, with a pause where the process is out of file descriptors.
        let (stream, peer) = Listener::accept(&mut self.listener).await;
        (BoundedStream { stream, end: Box::pin(tokio::time::sleep(CONNECTION_AGE_MAX)), _place: place }, peer)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that holds one of the places and ends at a certain age.
struct BoundedStream {
    stream: TcpStream,
    end: Pin<Box<tokio::time::Sleep>>,
    _place: Option<OwnedSemaphorePermit>,
}

impl BoundedStream {
    fn too_old(&mut self, context: &mut Context<'_>) -> bool {
        self.end.as_mut().poll(context).is_ready()
    }
}

fn age_error() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "the connection has reached its age")
}

impl AsyncRead for BoundedStream {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.too_old(context) {
            true => Poll::Ready(Err(age_error())),
            false => Pin::new(&mut self.stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for BoundedStream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.too_old(context) {
            true => Poll::Ready(Err(age_error())),
            false => Pin::new(&mut self.stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    async fn started(listen: &str, ready: Result<(), String>) -> (Admin, CancellationToken) {
        let state = AdminState {
            metrics: Metrics::new(),
            ready: Arc::new(move || ready.clone()),
            status: Arc::new(|| Box::pin(async { json!({ "feed": "open" }) })),
        };
        let shutdown = CancellationToken::new();
        let admin = serve(listen.parse().expect("an address"), state, shutdown.clone()).await.expect("a free port");
        (admin, shutdown)
    }

    async fn ask(address: SocketAddr, path: &str) -> (u16, String, String) {
        let answer = reqwest::get(format!("http://127.0.0.1:{}{path}", address.port())).await.expect("an answer");
        let kind = answer.headers().get("content-type").map(|kind| kind.to_str().expect("text").to_string());
        (answer.status().as_u16(), kind.unwrap_or_default(), answer.text().await.expect("a body"))
    }

    #[tokio::test]
    async fn each_page_answers() {
        let (admin, shutdown) = started("127.0.0.1:0", Ok(())).await;
        assert_ne!(admin.address.port(), 0);
        let cases = [
            ("/live", 200, "text/plain; charset=utf-8", "live"),
            ("/ready", 200, "application/json", "{\"ready\":true}"),
            ("/metrics", 200, OPENMETRICS, "# EOF"),
            ("/status", 200, "application/json", "{\"feed\":\"open\"}"),
            ("/", 404, "", ""),
        ];
        for (path, status, kind, body) in cases {
            let answer = ask(admin.address, path).await;
            assert_eq!((answer.0, answer.1.as_str()), (status, kind), "{path}");
            assert!(answer.2.contains(body), "{path}: {}", answer.2);
        }
        shutdown.cancel();
        tokio::time::timeout(Duration::from_secs(5), admin.task).await.expect("a prompt end").expect("no panic");
    }

    #[tokio::test]
    async fn not_ready_says_why() {
        let (admin, _shutdown) = started("127.0.0.1:0", Err(String::from("couchdb does not answer"))).await;
        let (status, _, body) = ask(admin.address, "/ready").await;
        assert_eq!((status, body.as_str()), (503, "{\"ready\":false,\"reason\":\"couchdb does not answer\"}"));
    }

    #[tokio::test]
    async fn status_is_for_loopback_only() {
        let (admin, _shutdown) = started("0.0.0.0:0", Ok(())).await;
        assert_eq!(ask(admin.address, "/status").await.0, 403);
        assert_eq!(ask(admin.address, "/ready").await.0, 200);
    }

    #[test]
    fn a_foreign_name_in_host_is_refused() {
        let cases = [
            ("127.0.0.1:9595", true),
            ("[::1]:9595", true),
            ("localhost:9595", true),
            ("localhost", true),
            ("evil.example:9595", false),
            ("localhost.evil.example", false),
            ("", false),
        ];
        for (host, expected) in cases {
            let headers = HeaderMap::from_iter([(header::HOST, host.parse().expect("a header"))]);
            assert_eq!(is_own_host(&headers), expected, "{host}");
        }
    }

    #[tokio::test]
    async fn a_silent_connection_is_closed_at_its_age() {
        let (admin, _shutdown) = started("127.0.0.1:0", Ok(())).await;
        let mut silent = TcpStream::connect(admin.address).await.expect("a connection");
        // Let the server accept it before the clock jumps.
        ask(admin.address, "/live").await;
        tokio::time::pause();
        tokio::time::advance(CONNECTION_AGE_MAX + Duration::from_secs(1)).await;
        tokio::time::resume();
        let mut rest = Vec::new();
        let end = tokio::time::timeout(Duration::from_secs(5), silent.read_to_end(&mut rest)).await;
        assert!(end.is_ok(), "still open");
    }
}
