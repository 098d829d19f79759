//! Calls the HTTP API: one attempt of one delivery. `schedule` says when, and how often.
//!
//! Delivery is at least once, and a repeat carries the same `webhook-id`, so that a receiver can drop it. Redirects are not
//! followed: they would carry the body, and perhaps the credentials, to a place that no rule names. An answer of 2xx is a
//! delivery; everything else is tried again, without end and with growing pauses, because a change is never dropped. Only a
//! request that cannot be built is given up.
//!
//! Time and bytes are bounded whatever the receiver does, and its answer reaches a log only as a short, redacted excerpt.

pub mod delivery;
pub mod request;

pub use delivery::delivery;
pub use request::WebhookRequest;

use crate::config::WebhookSettings;
use crate::job::{DbName, Verdict};
use crate::schedule::{Attempt, Backoff, Dispatcher, DispatcherSettings, Failure, Perform, Spec, Step, Worker};
use crate::telemetry::{Metrics, OutcomeLabels};
use crate::vault::Credentials;
use anyhow::Context;
use futures_util::future::BoxFuture;
use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use reqwest::{Response, StatusCode};
use secrecy::ExposeSecret;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

pub type WebhookPool = Dispatcher<HttpSender>;
pub type WebhookActor = Worker<HttpSender>;

/// Receivers know this name from Standard Webhooks.
const ID_HEADER: &str = "webhook-id";
/// More than any API says about one request; an answer read to its end leaves the connection usable.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// The status has decided already: the rest of the answer is worth no long wait.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(1);
/// Enough to tell what the receiver did not like, and short enough for one log line.
const EXCERPT_CHARS_MAX: usize = 200;

/// One request that is owed, as `schedule` sees it.
#[derive(Clone)]
pub struct Delivery {
    /// The same for each attempt, after a crash, and on any node.
    pub id: String,
    pub rule_id: Arc<str>,
    pub db: DbName,
    pub request: WebhookRequest,
    pub order_key: u64,
    pub coalesce_key: Option<u64>,
}

/// Leaves out the request: its URL and body belong to the user.
impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, rule_id, db, request, order_key, coalesce_key } = self;
        f.debug_struct("Delivery")
            .field("id", id)
            .field("rule_id", rule_id)
            .field("db", db)
            .field("method", &request.method)
            .field("lane", &request.lane)
            .field("order_key", order_key)
            .field("coalesce_key", coalesce_key)
            .finish_non_exhaustive()
    }
}

impl Spec for Delivery {
    fn lane(&self) -> &str {
        &self.request.lane
    }

    fn order_key(&self) -> u64 {
        self.order_key
    }

    fn coalesce_key(&self) -> Option<u64> {
        self.coalesce_key
    }
}

impl From<&WebhookSettings> for DispatcherSettings {
    fn from(settings: &WebhookSettings) -> Self {
        Self {
            workers_max: settings.concurrency,
            concurrency_per_lane: settings.concurrency_per_host,
            concurrency_per_place: settings.concurrency_per_host,
            per_second_per_lane: settings.per_second_per_host,
            fast_retries: settings.fast_retries,
            backoff: Backoff::new(settings.retry_base, settings.retry_cap),
        }
    }
}

pub struct HttpSender {
    client: reqwest::Client,
    metrics: Arc<Metrics>,
}

impl HttpSender {
    pub fn new(settings: &WebhookSettings, metrics: Arc<Metrics>) -> anyhow::Result<Self> {
        let client = reqwest::Client::builder()
            .connect_timeout(settings.connect_timeout)
            .timeout(settings.timeout)
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(30))
            .pool_max_idle_per_host(settings.concurrency_per_host.max(1))
            .user_agent(concat!("spiegel/", env!("CARGO_PKG_VERSION")))
            .build()
            .context("build the webhook client")?;
        Ok(Self { client, metrics })
    }
}

impl Perform for HttpSender {
    type Spec = Delivery;

    fn perform(&self, delivery: Arc<Delivery>) -> BoxFuture<'static, Attempt> {
        let (client, metrics) = (self.client.clone(), self.metrics.clone());
        Box::pin(async move {
            let started = Instant::now();
            let result = send(&client, &delivery).await;
            metrics.webhook_duration_seconds.observe(started.elapsed().as_secs_f64());
            let outcome = result.as_ref().map_or_else(|unsent| unsent.outcome, |()| "delivered");
            metrics.webhook_deliveries.get_or_create(&OutcomeLabels { outcome }).inc();
            result.map(|()| Step::Done).map_err(|undelivered| undelivered.failure)
        })
    }

    fn pool(&self) -> &'static str {
        "webhook"
    }

    fn level(&self, queued: usize, in_flight: usize) {
        self.metrics.webhook_queued.set(queued as i64);
        self.metrics.webhook_in_flight.set(in_flight as i64);
    }

    fn coalesced(&self) {
        self.metrics.webhook_coalesced.inc();
    }
}

struct Undelivered {
    failure: Failure,
    /// For the metric.
    outcome: &'static str,
}

async fn send(client: &reqwest::Client, delivery: &Delivery) -> Result<(), Undelivered> {
    let WebhookRequest { method, url, credentials, body, .. } = &delivery.request;
    let unbuildable = |error: &str| {
        let failure = Failure::give_up(format!("the request cannot be built: {error}"));
        Undelivered { failure, outcome: "unbuildable" }
    };
    let id = HeaderValue::from_str(&delivery.id).map_err(|_| unbuildable("its id is no header value"))?;
    let mut request = client.request(method.clone(), url.clone()).header(ID_HEADER, id).header(ACCEPT, "application/json");
    if let Some(credentials) = credentials {
        request = request.header(AUTHORIZATION, credentials.basic_header());
    }
    if let Some(body) = body {
        request = request.header(CONTENT_TYPE, "application/json").body(body.clone());
    }
    match request.send().await {
        Ok(response) if response.status().is_success() => {
            // The receiver has accepted it; how its answer ends changes nothing.
            let _ = read_answer(response).await;
            Ok(())
        }
        Ok(response) => Err(refused(response, credentials.as_ref()).await),
        Err(error) if error.is_builder() => Err(unbuildable(&redacted(&crate::couch::chain_of(&error), credentials.as_ref()))),
        Err(error) => {
            let outcome = if error.is_timeout() { "timed_out" } else { "unreachable" };
            let text = redacted(&crate::couch::chain_of(&error), credentials.as_ref());
            Err(Undelivered { failure: Failure::retry(text), outcome })
        }
    }
}

async fn refused(response: Response, credentials: Option<&Credentials>) -> Undelivered {
    let status = response.status();
    let after = crate::couch::retry_after(response.headers());
    let answer = read_answer(response).await;
    let mut error = format!("answered {}", status.as_u16());
    if status.is_redirection() {
        error.push_str(", a redirect, which is not followed");
    }
    let excerpt = excerpt(&answer, credentials);
    if !excerpt.is_empty() {
        error.push_str(": ");
        error.push_str(&excerpt);
    }
    let outcome = match status {
        StatusCode::TOO_MANY_REQUESTS => "throttled",
        status if status.is_redirection() => "redirected",
        status if status.is_client_error() => "refused",
        _ => "server_error",
    };
    Undelivered { failure: Failure::new(error, Verdict::Retry { after }), outcome }
}

/// The start of an answer, or all of it where it is small and soon; reading ends for whatever reason without an error.
async fn read_answer(mut response: Response) -> Vec<u8> {
    let mut answer = Vec::new();
    let read = async {
        while let Ok(Some(chunk)) = response.chunk().await {
            let room = ANSWER_BYTES_MAX - answer.len();
            answer.extend_from_slice(&chunk[..chunk.len().min(room)]);
            if chunk.len() > room {
                break;
            }
        }
    };
    // Too late is as good as too long: what has come by then is used.
    let _ = tokio::time::timeout(ANSWER_WAIT_MAX, read).await;
    answer
}

/// One line, without the secrets that a receiver may have echoed. They go before the cut, which could hide half of one.
fn excerpt(answer: &[u8], credentials: Option<&Credentials>) -> String {
    let text = redacted(&String::from_utf8_lossy(answer), credentials);
    let words: Vec<&str> = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty()).collect();
    words.join(" ").chars().take(EXCERPT_CHARS_MAX).collect()
}

fn redacted(text: &str, credentials: Option<&Credentials>) -> String {
    let mut text = text.to_string();
    if let Some(credentials) = credentials {
        let header = credentials.basic_header();
        let token = header.to_str().unwrap_or_default().trim_start_matches("Basic").trim();
        for secret in [token, credentials.password.expose_secret()] {
            if !secret.is_empty() {
                text = text.replace(secret, "[redacted]");
            }
        }
    }
    crate::vault::redact_text(&text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::body::{Body, Bytes};
    use axum::extract::State;
    use axum::http::{HeaderMap, Response as Answer};
    use axum::routing::any;
    use std::collections::HashSet;
    use std::net::SocketAddr;
    use std::sync::Mutex;

    /// What arrived: method, path with query, headers, body, and the connection's port on the other side.
    type Seen = Arc<Mutex<Vec<(String, String, HeaderMap, Bytes, u16)>>>;

    async fn receive(
        State(seen): State<Seen>,
        axum::extract::ConnectInfo(peer): axum::extract::ConnectInfo<SocketAddr>,
        request: axum::extract::Request,
    ) -> Answer<Body> {
        let (parts, body) = request.into_parts();
        let body = axum::body::to_bytes(body, 1 << 20).await.expect("the body arrives");
        let echoed = parts.headers.get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default().to_string();
        let path = parts.uri.path().to_string();
        let seen_path = parts.uri.path_and_query().expect("a path").to_string();
        seen.lock().expect("no panic under the lock").push((
            parts.method.to_string(),
            seen_path,
            parts.headers,
            body,
            peer.port(),
        ));
        let answer = Answer::builder();
        let endless =
            || Body::from_stream(futures_util::stream::repeat_with(|| Ok::<_, std::io::Error>(Bytes::from(vec![b'x'; 8192]))));
        let answer = match path.as_str() {
            "/redirect" => answer.status(302).header("location", "/ok").body(Body::empty()),
            "/slow" => {
                tokio::time::sleep(Duration::from_secs(60)).await;
                answer.status(200).body(Body::empty())
            }
            "/later" => answer.status(429).header("retry-after", "7").body(Body::from("slow down")),
            "/down" => answer.status(503).body(Body::from("first\nsecond\u{1b}[31m third")),
            "/wrong" => answer.status(422).body(Body::from(format!("got {echoed} with password pass word and x"))),
            "/gone" => answer.status(410).body(Body::empty()),
            "/endless" => answer.status(200).body(endless()),
            "/endless-error" => answer.status(500).body(endless()),
            "/stuck" => {
                answer.status(200).body(Body::from_stream(futures_util::stream::pending::<Result<Bytes, std::io::Error>>()))
            }
            _ => answer.status(204).body(Body::empty()),
        };
        answer.expect("a valid answer")
    }

    async fn server() -> (SocketAddr, Seen) {
        let seen = Seen::default();
        let app = Router::new().fallback(any(receive)).with_state(seen.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        tokio::spawn(async move { axum::serve(listener, app.into_make_service_with_connect_info::<SocketAddr>()).await });
        (address, seen)
    }

    fn settings() -> WebhookSettings {
        WebhookSettings {
            concurrency: 8,
            concurrency_per_host: 4,
            per_second_per_host: None,
            connect_timeout: Duration::from_secs(2),
            timeout: Duration::from_secs(5),
            fast_retries: 3,
            retry_base: Duration::from_millis(100),
            retry_cap: Duration::from_secs(10),
        }
    }

    fn delivery(address: SocketAddr, path: &str) -> Delivery {
        let request = WebhookRequest {
            method: http::Method::POST,
            url: format!("http://{address}{path}").parse().expect("a URL"),
            credentials: None,
            body: Some(bytes::Bytes::from_static(b"{\"a\":1}")),
            lane: "lane".into(),
        };
        Delivery { id: String::from("msg_1"), rule_id: "rule".into(), db: "db".into(), request, order_key: 1, coalesce_key: None }
    }

    fn credentials() -> Option<Credentials> {
        Some(Credentials { user: String::from("user"), password: String::from("pass word").into() })
    }

    fn count(metrics: &Metrics, outcome: &'static str) -> u64 {
        metrics.webhook_deliveries.get_or_create(&OutcomeLabels { outcome }).get()
    }

    async fn perform(delivery: Delivery, settings: &WebhookSettings) -> (Attempt, Arc<Metrics>) {
        let metrics = Metrics::new();
        let sender = HttpSender::new(settings, metrics.clone()).expect("a client");
        (sender.perform(Arc::new(delivery)).await, metrics)
    }

    #[tokio::test]
    async fn a_request_says_who_sends_it_and_what() {
        let (address, seen) = server().await;
        let mut with_body = delivery(address, "/ok?a=b");
        with_body.request.credentials = credentials();
        let (result, metrics) = perform(with_body, &settings()).await;
        assert_eq!(result, Ok(Step::Done));
        assert_eq!(count(&metrics, "delivered"), 1);
        let mut without_body = delivery(address, "/ok");
        (without_body.request.method, without_body.request.body) = (http::Method::GET, None);
        assert_eq!(perform(without_body, &settings()).await.0, Ok(Step::Done));

        let seen = seen.lock().expect("no panic under the lock");
        let (method, path, headers, body, _) = &seen[0];
        assert_eq!((method.as_str(), path.as_str(), &body[..]), ("POST", "/ok?a=b", &b"{\"a\":1}"[..]));
        for (name, value) in [
            ("webhook-id", "msg_1"),
            ("accept", "application/json"),
            ("content-type", "application/json"),
            ("user-agent", concat!("spiegel/", env!("CARGO_PKG_VERSION"))),
            ("authorization", "Basic dXNlcjpwYXNzIHdvcmQ="),
        ] {
            assert_eq!(headers.get(name).and_then(|value| value.to_str().ok()), Some(value), "{name}");
        }
        let (method, _, headers, body, _) = &seen[1];
        assert_eq!((method.as_str(), body.len()), ("GET", 0));
        assert!(headers.get("content-type").is_none() && headers.get("authorization").is_none());
    }

    #[tokio::test]
    async fn a_refusal_is_tried_again_and_says_why() {
        let (address, seen) = server().await;
        for (path, outcome, after, text) in [
            ("/redirect", "redirected", None, "answered 302, a redirect, which is not followed"),
            ("/later", "throttled", Some(7), "answered 429: slow down"),
            ("/down", "server_error", None, "answered 503: first second [31m third"),
            ("/gone", "refused", None, "answered 410"),
        ] {
            let (result, metrics) = perform(delivery(address, path), &settings()).await;
            let failure = result.expect_err(path);
            assert_eq!(failure.verdict, Verdict::Retry { after: after.map(Duration::from_secs) }, "{path}");
            assert_eq!(failure.error, text);
            assert_eq!(count(&metrics, outcome), 1, "{path}");
        }
        assert_eq!(seen.lock().expect("no panic under the lock").len(), 4, "the redirect was not followed");
    }

    #[tokio::test]
    async fn a_receiver_that_echoes_the_credentials_puts_none_into_the_error() {
        let (address, _) = server().await;
        let mut delivery = delivery(address, "/wrong");
        delivery.request.credentials = credentials();
        assert!(!format!("{delivery:?}").contains("pass word"));
        let failure = perform(delivery, &settings()).await.0.expect_err("422");
        assert_eq!(failure.error, "answered 422: got Basic [redacted] with password [redacted] and x");
    }

    #[tokio::test]
    async fn a_receiver_that_does_not_answer_costs_one_timeout() {
        let (address, _) = server().await;
        let settings = WebhookSettings { timeout: Duration::from_millis(200), ..settings() };
        let (result, metrics) = perform(delivery(address, "/slow"), &settings).await;
        let failure = result.expect_err("no answer");
        assert_eq!(failure.verdict, Verdict::Retry { after: None });
        assert!(failure.error.starts_with("timed out"), "{}", failure.error);
        assert_eq!(count(&metrics, "timed_out"), 1);
    }

    #[tokio::test]
    async fn a_receiver_that_is_not_there_is_tried_again() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        drop(listener);
        let (result, metrics) = perform(delivery(address, "/ok"), &settings()).await;
        let failure = result.expect_err("nobody listens");
        assert_eq!(failure.verdict, Verdict::Retry { after: None });
        assert!(failure.error.starts_with("cannot connect"), "{}", failure.error);
        assert!(!failure.error.contains("/ok"), "no URL in an error: {}", failure.error);
        assert_eq!(count(&metrics, "unreachable"), 1);
    }

    #[tokio::test]
    async fn an_answer_without_end_is_read_only_so_far() {
        let (address, _) = server().await;
        let started = std::time::Instant::now();
        assert_eq!(perform(delivery(address, "/endless"), &settings()).await.0, Ok(Step::Done));
        assert_eq!(perform(delivery(address, "/stuck"), &settings()).await.0, Ok(Step::Done), "2xx is a delivery");
        let failure = perform(delivery(address, "/endless-error"), &settings()).await.0.expect_err("500");
        assert_eq!(failure.error.len(), "answered 500: ".len() + EXCERPT_CHARS_MAX);
        assert!(started.elapsed() < Duration::from_secs(4), "bounded well below the timeout");
    }

    #[tokio::test]
    async fn what_cannot_be_built_is_given_up() {
        let (address, seen) = server().await;
        let mut bad_id = delivery(address, "/ok");
        bad_id.id = String::from("line\nbreak");
        let mut bad_scheme = delivery(address, "/ok");
        bad_scheme.request.url = "ftp://example.com/".parse().expect("a URL");
        for delivery in [bad_id, bad_scheme] {
            let (result, metrics) = perform(delivery, &settings()).await;
            let failure = result.expect_err("no request");
            assert_eq!(failure.verdict, Verdict::GiveUp, "{}", failure.error);
            assert_eq!(count(&metrics, "unbuildable"), 1);
        }
        assert!(seen.lock().expect("no panic under the lock").is_empty());
    }

    #[tokio::test]
    async fn small_answers_leave_the_connection_usable() {
        let (address, seen) = server().await;
        let sender = HttpSender::new(&settings(), Metrics::new()).expect("a client");
        for path in ["/ok", "/down", "/later", "/ok", "/redirect"] {
            let _ = sender.perform(Arc::new(delivery(address, path))).await;
        }
        let ports: HashSet<u16> = seen.lock().expect("no panic under the lock").iter().map(|(.., port)| *port).collect();
        assert_eq!(ports.len(), 1);
    }

    #[tokio::test]
    async fn the_pool_delivers_and_counts() {
        let (address, _) = server().await;
        let metrics = Metrics::new();
        let perform = Arc::new(HttpSender::new(&settings(), metrics.clone()).expect("a client"));
        let arguments = crate::schedule::DispatcherArguments { perform, settings: (&settings()).into() };
        let (pool, _) = ractor::Actor::spawn(None, WebhookPool::new(), arguments).await.expect("the pool starts");
        let (jobs, outcomes): (Vec<_>, Vec<_>) = (0..100)
            .map(|order_key| {
                let (waiter, outcome) = tokio::sync::oneshot::channel();
                ((Arc::new(Delivery { order_key, ..delivery(address, "/ok") }), waiter), outcome)
            })
            .unzip();
        pool.cast(crate::schedule::DispatcherMsg::Submit(jobs)).expect("the pool lives");
        for outcome in outcomes {
            assert_eq!(outcome.await, Ok(crate::job::Outcome::Done));
        }
        assert_eq!(count(&metrics, "delivered"), 100);
        assert_eq!((metrics.webhook_queued.get(), metrics.webhook_in_flight.get()), (0, 0));
        pool.stop(None);
    }
}
