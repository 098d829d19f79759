//! Calls the HTTP API: one attempt of one delivery. `schedule` says when, and how often.
//!
//! Delivery is at least once, and a repeat carries the same `webhook-id`, so that a receiver can drop it. Redirects are not
//! followed: they would carry the body, and perhaps the credentials, to a place that no rule names. `verdict` says what an
//! answer means; no answer means another try.
//!
//! Time and bytes are bounded whatever the receiver does, and its answer goes on only as a short, redacted excerpt.

pub mod batch;
pub mod delivery;
pub mod guard;
pub mod request;
pub mod sign;
pub mod verdict;

pub use delivery::delivery;
pub use request::WebhookRequest;

use crate::config::WebhookSettings;
use crate::job::{Answer, DbName, Verdict};
use crate::schedule::{Attempt, Backoff, BreakerSettings, Dispatcher, DispatcherSettings, Failure, Perform, Spec, Step, Worker};
use crate::telemetry::{Metrics, OutcomeLabels, StateLabels};
use crate::vault::Vault;
use anyhow::Context;
use batch::Gathered;
use futures_util::future::BoxFuture;
use guard::{Guard, Lookup};
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use reqwest::{Certificate, Request, Response, StatusCode};
use secrecy::ExposeSecret;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::time::Instant;

pub type WebhookPool = Dispatcher<HttpSender>;
pub type WebhookActor = Worker<HttpSender>;

const ID: HeaderName = HeaderName::from_static(sign::ID_HEADER);
const TIMESTAMP: HeaderName = HeaderName::from_static(sign::TIMESTAMP_HEADER);
const SIGNATURE: HeaderName = HeaderName::from_static(sign::SIGNATURE_HEADER);
const SPIEGEL: HeaderValue = HeaderValue::from_static(concat!("spiegel/", env!("CARGO_PKG_VERSION")));
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// More than any API says about one request; an answer read to its end leaves the connection usable.
const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// The status has decided already: the rest of the answer is worth no long wait.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(1);
/// What is kept of an answer, for whoever looks into a failed delivery.
const EXCERPT_BYTES_MAX: usize = 1024;
/// Enough to tell what the receiver did not like, and short enough for one log line.
const LOGGED_CHARS_MAX: usize = 200;
/// Requests of HTTP/2 share a connection, and a silent one would time them out one after the other.
const PING_AFTER: Duration = Duration::from_secs(20);
const PONG_WITHIN: Duration = Duration::from_secs(10);

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
    /// What it carries, where its rule has batches: the id and the body that are sent are made of it.
    pub gathered: Option<Gathered>,
}

/// Leaves out the request: its URL and body belong to the user.
impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { id, rule_id, db, request, order_key, coalesce_key, gathered: _ } = self;
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

    fn gathers(&self) -> bool {
        self.gathered.is_some()
    }

    fn fold(this: &mut Arc<Self>, newer: Arc<Self>) -> Result<(), Arc<Self>> {
        batch::fold(this, newer)
    }

    fn linger(&self) -> Duration {
        self.gathered.as_ref().map_or(Duration::ZERO, |gathered| gathered.batch.within)
    }

    fn is_full(&self) -> bool {
        self.gathered.as_ref().is_some_and(Gathered::is_full)
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
            breaker: Some(BreakerSettings {
                threshold: settings.breaker_threshold,
                cool_down: Backoff::new(settings.breaker_base, settings.breaker_cap),
                asked_max: settings.retry_after_cap,
            }),
        }
    }
}

pub struct HttpSender(Arc<Sender>);

struct Sender {
    client: reqwest::Client,
    guard: Option<Arc<Guard>>,
    vault: Arc<Vault>,
    metrics: Arc<Metrics>,
}

impl HttpSender {
    pub fn new(settings: &WebhookSettings, vault: Arc<Vault>, metrics: Arc<Metrics>) -> anyhow::Result<Self> {
        Self::with_lookup(settings, vault, metrics, guard::system_lookup())
    }

    fn with_lookup(settings: &WebhookSettings, vault: Arc<Vault>, metrics: Arc<Metrics>, lookup: Lookup) -> anyhow::Result<Self> {
        let mut client = reqwest::Client::builder()
            .connect_timeout(settings.connect_timeout)
            .timeout(settings.timeout)
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .gzip(false)
            .tcp_nodelay(true)
            .tcp_keepalive(Duration::from_secs(30))
            .http2_keep_alive_interval(PING_AFTER)
            .http2_keep_alive_timeout(PONG_WITHIN)
            .pool_max_idle_per_host(settings.concurrency_per_host.max(1));
        if let Some(path) = &settings.ca_file {
            client = client.tls_certs_merge(authorities(path)?);
        }
        let guard = settings.block_private_networks.then(|| Arc::new(Guard::new(&settings.allow_networks, lookup)));
        if let Some(guard) = &guard {
            // A proxy would connect for us, and look names up by itself.
            client = client.dns_resolver(guard.clone()).no_proxy();
        }
        let client = client.build().with_context(|| match &settings.ca_file {
            Some(path) => format!("build the webhook client with webhook.ca_file {}", path.display()),
            None => String::from("build the webhook client"),
        })?;
        Ok(Self(Arc::new(Sender { client, guard, vault, metrics })))
    }
}

/// Of `webhook.ca_file`.
fn authorities(path: &Path) -> anyhow::Result<Vec<Certificate>> {
    let pem = std::fs::read(path).with_context(|| format!("read webhook.ca_file {}", path.display()))?;
    let found = Certificate::from_pem_bundle(&pem).with_context(|| format!("read webhook.ca_file {}", path.display()))?;
    anyhow::ensure!(!found.is_empty(), "webhook.ca_file {} has no certificate in it", path.display());
    Ok(found)
}

impl Perform for HttpSender {
    type Spec = Delivery;

    fn perform(&self, delivery: Arc<Delivery>) -> BoxFuture<'static, Attempt> {
        let sender = self.0.clone();
        Box::pin(async move {
            let started = Instant::now();
            let Report { status, outcome, result } = sender.attempt(&batch::assembled(&delivery)).await;
            let (metrics, seconds) = (&sender.metrics, started.elapsed().as_secs_f64());
            metrics.webhook_duration_seconds.observe(seconds);
            metrics.webhook_deliveries.get_or_create(&OutcomeLabels { outcome }).inc();
            metrics.webhook_routes.of(&delivery.rule_id, &delivery.request.lane).observe(status, seconds);
            let is_of_several = delivery.gathered.as_ref().is_some_and(Gathered::is_of_several);
            result.map_err(|failure| match failure.verdict {
                // Each is tried by itself before any is given up.
                Verdict::GiveUp if is_of_several => Failure { verdict: Verdict::Later, ..failure },
                _ => failure,
            })
        })
    }

    fn pool(&self) -> &'static str {
        "webhook"
    }

    fn level(&self, queued: usize, in_flight: usize) {
        self.0.metrics.webhook_queued.set(queued as i64);
        self.0.metrics.webhook_in_flight.set(in_flight as i64);
    }

    fn coalesced(&self) {
        self.0.metrics.webhook_coalesced.inc();
    }

    fn breakers(&self, open: usize, half_open: usize) {
        for (state, count) in [("open", open), ("half_open", half_open)] {
            self.0.metrics.webhook_breakers.get_or_create(&StateLabels { state }).set(count as i64);
        }
    }
}

/// One attempt, for the metrics and for the dispatcher.
struct Report {
    /// None where no answer came.
    status: Option<u16>,
    outcome: &'static str,
    result: Attempt,
}

impl Report {
    fn without_answer(outcome: &'static str, verdict: Verdict, error: impl Into<String>) -> Self {
        Self { status: None, outcome, result: Err(Failure::new(error, verdict)) }
    }

    fn unbuildable(error: &str) -> Self {
        Self::without_answer("unbuildable", Verdict::Later, format!("the request cannot be built: {error}"))
    }

    /// An edit of the settings, or of the name's entry, makes the same delivery possible.
    fn blocked(blocked: &guard::Blocked) -> Self {
        Self::without_answer("blocked", Verdict::Later, blocked.to_string())
    }
}

impl Sender {
    async fn attempt(&self, delivery: &Delivery) -> Report {
        if let Some(Err(blocked)) = self.guard.as_ref().map(|guard| guard.check(&delivery.request.url)) {
            return Report::blocked(&blocked);
        }
        let Some(request) = http_request(delivery, SystemTime::now()) else {
            return Report::unbuildable("its id is no header value");
        };
        match self.client.execute(request).await {
            Ok(response) => self.answered(response, &delivery.request).await,
            Err(error) => self.unanswered(&error, &delivery.request),
        }
    }

    async fn answered(&self, response: Response, request: &WebhookRequest) -> Report {
        let status = response.status();
        let verdict = verdict::of_answer(status, response.headers(), request.retry_on.as_deref(), SystemTime::now());
        let answer = read_answer(response).await;
        let result = match verdict {
            // The receiver has accepted it; how its answer ends changes nothing.
            Ok(()) => Ok(Step::Done),
            Err(verdict) => Err(refused(status, verdict, self.excerpt(&answer, request))),
        };
        Report { status: Some(status.as_u16()), outcome: verdict::outcome_of(status), result }
    }

    fn unanswered(&self, error: &reqwest::Error, request: &WebhookRequest) -> Report {
        if let Some(blocked) = guard::blocked_in(error) {
            return Report::blocked(blocked);
        }
        let text = self.redacted(&crate::couch::chain_of(error), request);
        if error.is_builder() {
            return Report::unbuildable(&text);
        }
        let outcome = if error.is_timeout() { "timed_out" } else { "unreachable" };
        Report::without_answer(outcome, Verdict::Retry { after: None }, text)
    }

    /// One line, without the secrets that a receiver may have echoed. They go before the cut, which could hide half of one.
    fn excerpt(&self, answer: &[u8], request: &WebhookRequest) -> String {
        let text = self.redacted(&String::from_utf8_lossy(answer), request);
        let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
        let mut line = String::new();
        for word in words {
            let gap = if line.is_empty() { "" } else { " " };
            for c in gap.chars().chain(word.chars()) {
                if line.len() + c.len_utf8() > EXCERPT_BYTES_MAX {
                    return line;
                }
                line.push(c);
            }
        }
        line
    }

    fn redacted(&self, text: &str, request: &WebhookRequest) -> String {
        let mut text = text.to_string();
        // Those that stand in the rule itself are not in the vault.
        for secret in secrets_of(request) {
            text = text.replace(&secret, "[redacted]");
        }
        self.vault.redact(&text)
    }
}

/// Shorter texts would take half an answer with them, and hide little.
const SECRET_BYTES_MIN: usize = 6;

/// What a receiver may echo of its request and nobody should read in a log: the longest first.
fn secrets_of(request: &WebhookRequest) -> Vec<String> {
    let mut secrets = Vec::new();
    if let Some(credentials) = &request.credentials {
        secrets.extend(crate::vault::password_forms(&credentials.user, credentials.password.expose_secret()));
    }
    let values = request.headers.iter().filter(|(_, value)| value.is_sensitive()).filter_map(|(_, value)| value.to_str().ok());
    for value in values {
        // `Bearer abc` may come back as `abc`.
        let parts = [Some(value), value.split_once(' ').map(|(_, token)| token)];
        let long_enough = parts.into_iter().flatten().filter(|part| part.len() >= SECRET_BYTES_MIN);
        secrets.extend(long_enough.flat_map(crate::vault::text_forms));
    }
    secrets.retain(|secret| !secret.is_empty());
    secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
    secrets
}

/// None where the delivery's id is no header value.
fn http_request(delivery: &Delivery, now: SystemTime) -> Option<Request> {
    let WebhookRequest { method, url, credentials, headers, content_type, signing, body, .. } = &delivery.request;
    let mut request = Request::new(method.clone(), url.clone());
    let timestamp = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs().to_string();
    let signed = sign::signature_header(signing, &delivery.id, &timestamp, body.as_deref().unwrap_or_default());

    let sent = request.headers_mut();
    *sent = HeaderMap::with_capacity(8 + headers.len());
    sent.insert(USER_AGENT, SPIEGEL);
    sent.insert(ACCEPT, JSON);
    if let Some(credentials) = credentials {
        sent.insert(AUTHORIZATION, credentials.basic_header());
    }
    if body.is_some() {
        sent.insert(reqwest::header::CONTENT_TYPE, content_type.clone().unwrap_or(JSON));
    }
    // What the rule says wins over what it would be otherwise, but the last three are never the rule's.
    for (name, value) in headers {
        sent.insert(name, value.clone());
    }
    sent.insert(ID, HeaderValue::from_str(&delivery.id).ok()?);
    sent.insert(TIMESTAMP, HeaderValue::try_from(timestamp).ok()?);
    if let Some(signed) = signed {
        sent.insert(SIGNATURE, signed);
    }
    *request.body_mut() = body.clone().map(reqwest::Body::from);
    Some(request)
}

fn refused(status: StatusCode, verdict: Verdict, excerpt: String) -> Failure {
    let mut error = format!("answered {}", status.as_u16());
    if status.is_redirection() {
        error.push_str(", a redirect, which is not followed");
    }
    if !excerpt.is_empty() {
        error.push_str(": ");
        error.extend(excerpt.chars().take(LOGGED_CHARS_MAX));
    }
    Failure { answer: Some(Answer { status: status.as_u16(), excerpt }), ..Failure::new(error, verdict) }
}

/// The start of an answer, or all of it where it is small and soon; reading ends for whatever reason without an error.
async fn read_answer(mut response: Response) -> Vec<u8> {
    let mut answer = Vec::new();
    if response.content_length() == Some(0) {
        return answer;
    }
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

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
