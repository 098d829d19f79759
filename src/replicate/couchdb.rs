//! The engine that lets CouchDB replicate: one POST to `_replicate` is one run.
//!
//! CouchDB answers when the run is over, so the answer may take long and may get lost. A run therefore ends at a timeout, and
//! when CouchDB is known to be down; asking again joins or repeats the same job, which is harmless.

use super::{Counts, Engine, ReplicateError, Replication, Report};
use crate::couch::replicate::{ReplicateAnswer, ReplicationHistory};
use crate::couch::{Couch, CouchError};
use crate::job::Verdict;
use crate::vault::split_credentials;
use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use url::Url;

pub struct CouchEngine {
    couch: Couch,
    /// Of one run.
    timeout: Duration,
    places: Arc<Semaphore>,
}

/// CouchDB starts no more one-shot jobs at a time (`[replicator] max_churn`).
const CONCURRENCY_MAX: usize = 20;

impl CouchEngine {
    pub fn new(couch: Couch, timeout: Duration) -> Self {
        Self { couch, timeout, places: Arc::new(Semaphore::new(CONCURRENCY_MAX)) }
    }
}

impl Engine for CouchEngine {
    fn run(&self, spec: Arc<Replication>) -> BoxFuture<'static, Result<Report, ReplicateError>> {
        let (couch, timeout, places) = (self.couch.clone(), self.timeout, self.places.clone());
        Box::pin(async move {
            let _place = places.acquire_owned().await;
            let params = for_couchdb(&spec.params);
            loop {
                // Without CouchDB no run is possible, and none has failed: it is waited for, as everywhere.
                couch.health().up().await;
                let answer = tokio::select! {
                    biased;
                    () = couch.health().down() => continue,
                    answer = tokio::time::timeout(timeout, couch.replicate(&params)) => answer,
                };
                let error = match answer {
                    Ok(Ok(answer)) if answer.ok => return Ok(report(&answer)),
                    // Somebody else's page in CouchDB's place: nothing was replicated.
                    Ok(Ok(_)) => CouchError::Malformed(String::from("_replicate: an answer without ok")),
                    Ok(Err(error)) => error,
                    Err(_) => {
                        return Err(ReplicateError::Other {
                            error: format!("no answer within {}", humantime::format_duration(timeout)),
                            verdict: Verdict::Retry { after: None },
                        });
                    }
                };
                if is_going_down(&couch, &error).await {
                    continue;
                }
                return Err(classify(error));
            }
        })
    }
}

/// CouchDB 3.5 does not decode a URL's user and password: where they had to be encoded they go in a header.
fn for_couchdb(params: &Value) -> Value {
    let mut params = params.clone();
    for side in ["source", "target"] {
        let Some(text) = params.get(side).and_then(|side| side.as_str().or_else(|| side["url"].as_str())) else { continue };
        let Ok(url) = Url::parse(text) else { continue };
        if !format!("{}{}", url.username(), url.password().unwrap_or_default()).contains('%') {
            continue;
        }
        let (url, Some(credentials)) = split_credentials(url) else { continue };
        let header = credentials.basic_header();
        // What CouchDB would refuse anyway stays as it is, for its own words.
        if params[side].get("headers").is_some_and(|headers| !headers.is_object()) {
            continue;
        }
        let mut object = match &params[side] {
            Value::Object(object) => Value::Object(object.clone()),
            _ => json!({}),
        };
        object["url"] = Value::from(url.as_str());
        if object["headers"]["Authorization"].is_null() {
            object["headers"]["Authorization"] = Value::from(header.to_str().unwrap_or_default());
        }
        params[side] = object;
    }
    params
}

/// A replication is often the first to notice; CouchHealth's probes decide within this time.
const PROBES_TAKE: Duration = Duration::from_secs(1);

/// Whether CouchDB itself is to blame. Its word on a source or target is not, whatever its status.
async fn is_going_down(couch: &Couch, error: &CouchError) -> bool {
    let is_its_own = match error {
        CouchError::Unreachable(_) | CouchError::Malformed(_) | CouchError::Unauthorized(_) => true,
        CouchError::Status { status, reason } => {
            *status >= 500 && !reason.contains("replication") && !reason.contains("could not")
        }
        _ => false,
    };
    if !is_its_own {
        return false;
    }
    couch.health().suspect(error);
    tokio::time::timeout(PROBES_TAKE, couch.health().down()).await.is_ok()
}

/// A run without changes repeats the history of the one before; its numbers are not this run's.
fn report(answer: &ReplicateAnswer) -> Report {
    match answer.history.first() {
        Some(run) if !answer.no_changes => {
            let ReplicationHistory { missing_checked, missing_found, docs_read, docs_written, doc_write_failures } = *run;
            let counts =
                Counts { missing_checked, missing_found, docs_read, docs_written, doc_write_failures, ..Counts::default() };
            Report { counts, ..Report::default() }
        }
        _ => Report { no_changes: answer.no_changes, ..Report::default() },
    }
}

/// CouchDB 3.5 answers 500 for most of what is wrong with a source or target and names it in `error` (older ones: 404), so the
/// words decide before the status does.
fn classify(error: CouchError) -> ReplicateError {
    let verdict = error.verdict();
    match error {
        CouchError::Unauthorized(reason) | CouchError::Forbidden(reason) => ReplicateError::Unauthorized(reason),
        CouchError::Unreachable(reason) => ReplicateError::Unreachable(format!("couchdb: {reason}")),
        CouchError::NotFound(reason) | CouchError::Status { reason, .. } if is_missing(&reason) => {
            ReplicateError::Missing { which: reason }
        }
        CouchError::Status { reason, .. } if starts_with_any(&reason, UNAUTHORIZED) => ReplicateError::Unauthorized(reason),
        CouchError::Status { reason, .. } if is_unreachable(&reason) => ReplicateError::Unreachable(reason),
        other => ReplicateError::Other { error: other.to_string(), verdict },
    }
}

/// The first is CouchDB's replicator failing to log in, whatever the other side then was asked.
const UNAUTHORIZED: &[&str] = &["replication_auth_error:", "unauthorized:", "forbidden:"];
const UNREACHABLE: &[&str] = &["nxdomain:", "timeout:", "econnrefused:"];

fn is_missing(reason: &str) -> bool {
    starts_with_any(reason, &["db_not_found:"])
}

/// `{http_request_failed, …, {error, {conn_failed, …}}}` and its relatives, as CouchDB prints them.
fn is_unreachable(reason: &str) -> bool {
    starts_with_any(reason, UNREACHABLE)
        || ["conn_failed", "req_timedout", "connection_closed"].iter().any(|cause| reason.contains(cause))
}

fn starts_with_any(reason: &str, prefixes: &[&str]) -> bool {
    prefixes.iter().any(|prefix| reason.starts_with(prefix))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::couch::CouchSettings;
    use crate::couch::health::State;
    use crate::telemetry::Metrics;
    use axum::http::StatusCode;
    use axum::routing::post;
    use axum::{Json, Router};

    async fn couch_that(answer: Router) -> Couch {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound")).parse().expect("a URL");
        tokio::spawn(async move { axum::serve(listener, answer).await });
        let (connect_timeout, read_timeout) = (Duration::from_secs(2), Duration::from_secs(2));
        let settings = CouchSettings { url, credentials: None, connect_timeout, read_timeout };
        Couch::new(settings, Metrics::new()).expect("a client")
    }

    fn spec() -> Arc<Replication> {
        Arc::new(Replication {
            replicator_id: "r".into(),
            params: json!({ "source": "http://u:hush@host/a", "target": "b" }),
            source: String::from("http://u@host/a"),
            target: String::from("b"),
            lane: "host".into(),
            engine: None,
            is_bidirectional: false,
            progress: Arc::default(),
            priority: 0,
        })
    }

    /// One answer of the server, as it stands on the wire, and what the engine makes of it.
    async fn run_against(status: u16, body: Value) -> Result<Report, ReplicateError> {
        let status = StatusCode::from_u16(status).expect("a status");
        let couch = couch_that(Router::new().route("/_replicate", post(move || async move { (status, Json(body)) }))).await;
        CouchEngine::new(couch, Duration::from_secs(5)).run(spec()).await
    }

    #[tokio::test]
    async fn the_errors_of_couchdb_3_5_are_told_apart() {
        // As a CouchDB 3.5.0 answered them.
        let missing = "could not open http://127.0.0.1:15984/schedtest_missing/";
        let refused = "unauthorized to access or create database http://127.0.0.1:15984/schedtest_a/";
        let login = r#"{session_request_unauthorized,"http://127.0.0.1:15984/_session","admin"}"#;
        let port = r#"{http_request_failed,"GET","http://127.0.0.1:1/x/",{error,{error,{conn_failed,{error,econnrefused}}}}}"#;
        let host = "could not resolve http://nohost.invalid/x/";
        for (status, error, reason, expected) in [
            (500, "db_not_found", missing, "missing"),
            (404, "db_not_found", missing, "missing"),
            (401, "unauthorized", refused, "unauthorized"),
            (403, "forbidden", "http://127.0.0.1:15984/schedtest_a/", "unauthorized"),
            // CouchDB locks a user out for minutes after a few wrong passwords: to hammer on would lock out everybody.
            (403, "forbidden", "Account is temporarily locked due to multiple authentication failures", "unauthorized"),
            (500, "replication_auth_error", login, "unauthorized"),
            (500, "nxdomain", host, "unreachable"),
            (500, "error", port, "unreachable"),
            (500, "checkpoint_commit_failure", "Target database out of sync", "failed"),
            (404, "not_found", "missing", "failed"),
            (429, "too_many_requests", "later", "failed"),
        ] {
            let result = run_against(status, json!({ "error": error, "reason": reason })).await;
            assert_eq!(result.expect_err(error).outcome(), expected, "{status} {error}: {reason}");
        }
    }

    #[test]
    fn an_encoded_password_goes_in_a_header() {
        let params = |side: Value| json!({ "source": side, "target": "b", "create_target": true });
        let header = json!({ "Authorization": "Basic dTpwQHNz" });
        for (side, expected) in [
            (json!("http://u:plain@host/a"), json!("http://u:plain@host/a")),
            (json!("a"), json!("a")),
            (json!("http://u:p%40ss@host/a"), json!({ "url": "http://host/a", "headers": header })),
            (
                json!({ "url": "http://u:p%40ss@host/a", "headers": { "X": "1" } }),
                json!({ "url": "http://host/a", "headers": { "X": "1", "Authorization": "Basic dTpwQHNz" } }),
            ),
            (json!({ "url": "http://u:p%40ss@host/a", "headers": 7 }), json!({ "url": "http://u:p%40ss@host/a", "headers": 7 })),
        ] {
            assert_eq!(for_couchdb(&params(side.clone())), params(expected), "{side}");
        }
    }

    #[test]
    fn a_verdict_follows_from_the_error() {
        let status = |status, reason: &str| CouchError::Status { status, reason: String::from(reason) };
        let after = Some(Duration::from_secs(3));
        for (error, expected) in [
            (status(500, "db_not_found: could not open x"), Verdict::GiveUp),
            (CouchError::Unauthorized(String::from("x")), Verdict::GiveUp),
            (status(500, "nxdomain: could not resolve x"), Verdict::Retry { after: None }),
            (status(500, "error: something"), Verdict::Retry { after: None }),
            (status(400, "bad_request: no source"), Verdict::GiveUp),
            (CouchError::TooManyRequests { after }, Verdict::Retry { after }),
            (CouchError::Malformed(String::from("x")), Verdict::Retry { after: None }),
        ] {
            let text = error.to_string();
            assert_eq!(classify(error).verdict(), expected, "{text}");
        }
    }

    #[test]
    fn the_report_is_of_this_run_only() {
        let history = |docs_read, doc_write_failures| ReplicationHistory {
            docs_read,
            docs_written: 1,
            doc_write_failures,
            ..ReplicationHistory::default()
        };
        let answer = |no_changes, history| ReplicateAnswer { ok: true, no_changes, history };
        for (answer, expected) in [
            (answer(false, vec![history(3, 2), history(9, 9)]), (3, 1, 2, false)),
            (answer(true, vec![history(3, 2)]), (0, 0, 0, true)),
            (answer(true, vec![]), (0, 0, 0, true)),
            (answer(false, vec![]), (0, 0, 0, false)),
        ] {
            let Report { counts: Counts { docs_read, docs_written, doc_write_failures, .. }, no_changes, .. } = report(&answer);
            assert_eq!((docs_read, docs_written, doc_write_failures, no_changes), expected);
        }
    }

    #[tokio::test]
    async fn a_run_reports_what_couchdb_counted() {
        let history =
            json!([{ "docs_read": 5, "docs_written": 4, "doc_write_failures": 1, "missing_checked": 6, "missing_found": 5 }]);
        let report = run_against(200, json!({ "ok": true, "session_id": "s", "history": history })).await;
        let (missing_checked, missing_found) = (6, 5);
        let counts =
            Counts { missing_checked, missing_found, docs_read: 5, docs_written: 4, doc_write_failures: 1, ..Counts::default() };
        assert_eq!(report, Ok(Report { counts, ..Report::default() }));
    }

    async fn couch_that_never_answers() -> Couch {
        couch_that(Router::new().route("/_replicate", post(|| async { std::future::pending::<()>().await }))).await
    }

    #[tokio::test]
    async fn a_run_without_an_answer_ends_at_its_timeout() {
        let engine = CouchEngine::new(couch_that_never_answers().await, Duration::from_millis(100));
        let error = engine.run(spec()).await.expect_err("no answer");
        assert_eq!(error.to_string(), "replication failed: no answer within 100ms");
        assert_eq!(error.verdict(), Verdict::Retry { after: None });
    }

    /// A lost answer must not park the run for ever, and an outage is no failure of it.
    #[tokio::test]
    async fn a_run_begins_anew_when_couchdb_was_down() {
        let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counter = asked.clone();
        let answer = move || {
            let counter = counter.clone();
            async move {
                if counter.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0 {
                    std::future::pending::<()>().await;
                }
                axum::Json(json!({ "ok": true, "no_changes": true }))
            }
        };
        let couch = couch_that(Router::new().route("/_replicate", post(answer))).await;
        let engine = CouchEngine::new(couch.clone(), Duration::from_secs(3_600));
        let run = tokio::spawn(engine.run(spec()));
        while asked.load(std::sync::atomic::Ordering::SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        couch.health().publish(State::Down);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!run.is_finished());
        couch.health().publish(State::Up);
        let result = tokio::time::timeout(Duration::from_secs(5), run).await.expect("it ends").expect("no panic");
        assert_eq!(result, Ok(Report { no_changes: true, ..Report::default() }));
        assert_eq!(asked.load(std::sync::atomic::Ordering::SeqCst), 2);
    }
}
