//! Brings one database up to date with another: one run of one replicator. `schedule` says when, and how often.
//!
//! An `Engine` makes the run; whichever it is, a run is bounded in time, keeps its own checkpoint, and may be repeated at any
//! time without harm. Two runs of one replicator never overlap, and while one is under way at most one more waits.

pub mod couchdb;
pub mod engines;
pub mod native;
pub mod progress;

pub use couchdb::CouchEngine;
pub use engines::Engines;
pub use progress::Progress;

use crate::config::{EngineChoice, ReplicationSettings};
use crate::job::Verdict;
use crate::schedule::{Attempt, Backoff, Dispatcher, DispatcherSettings, Failure, Perform, Spec, Step, Worker};
use crate::telemetry::{Metrics, OutcomeLabels};
use futures_util::future::BoxFuture;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

pub type ReplicatorPool = Dispatcher<Replicator>;
pub type ReplicatorActor = Worker<Replicator>;

/// A failed run has usually lasted seconds: one more try for a hiccup, and then the replicator's own, durable backoff.
const FAST_RETRIES: u32 = 1;
const RETRY_BASE: Duration = Duration::from_secs(1);
const RETRY_CAP: Duration = Duration::from_secs(10);

/// One run that is owed, as `schedule` sees it.
#[derive(Clone)]
pub struct Replication {
    /// The replicator document's `_id`.
    pub replicator_id: Arc<str>,
    /// For `_replicate`, with passwords.
    pub params: serde_json::Value,
    /// Without passwords, for logs.
    pub source: String,
    /// Without passwords, for logs.
    pub target: String,
    pub lane: Arc<str>,
    /// What the document asks for; None: what the config says.
    pub engine: Option<EngineChoice>,
    /// Another replicator goes the other way.
    pub is_bidirectional: bool,
    /// Of this one run, for whoever asked for it.
    pub progress: Arc<Progress>,
    /// The higher goes first.
    pub priority: i32,
}

/// Leaves out `params`: they carry passwords, in URLs and in headers.
impl fmt::Debug for Replication {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { replicator_id, source, target, lane, engine, priority, .. } = self;
        f.debug_struct("Replication")
            .field("replicator_id", replicator_id)
            .field("source", source)
            .field("target", target)
            .field("lane", lane)
            .field("engine", engine)
            .field("priority", priority)
            .finish_non_exhaustive()
    }
}

impl Replication {
    /// Keyed for each process, so that no choice of ids makes two replicators collide on purpose.
    fn key(&self) -> u64 {
        static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);
        HASHER.hash_one(&self.replicator_id)
    }
}

impl Spec for Replication {
    fn lane(&self) -> &str {
        &self.lane
    }

    fn place(&self) -> &str {
        &self.target
    }

    fn priority(&self) -> i32 {
        self.priority
    }

    fn order_key(&self) -> u64 {
        self.key()
    }

    /// A run brings over everything that there is when it starts, so one that has not started stands for all.
    fn coalesce_key(&self) -> Option<u64> {
        Some(self.key())
    }
}

/// In the words of the replication protocol.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Revisions that the source named.
    pub missing_checked: u64,
    /// Those of them that the target lacked.
    pub missing_found: u64,
    pub docs_read: u64,
    pub docs_written: u64,
    /// Documents that the target refused: the run is done all the same, and the next one does not try them again.
    pub doc_write_failures: u64,
    /// Of documents and their attachments, without what carries them.
    pub bytes_read: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.missing_checked += other.missing_checked;
        self.missing_found += other.missing_found;
        self.docs_read += other.docs_read;
        self.docs_written += other.docs_written;
        self.doc_write_failures += other.doc_write_failures;
        self.bytes_read += other.bytes_read;
    }
}

/// What a run did, as far as its engine tells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    pub counts: Counts,
    /// Sent by this run, to both sides. What several runs ask together counts for the one that carried it.
    pub requests: u64,
    pub no_changes: bool,
    /// It gave way to others; there is more.
    pub is_unfinished: bool,
    pub first_refused: Option<RefusedDocument>,
}

/// A document that the target would not take, and its reason, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedDocument {
    pub id: String,
    pub reason: String,
}

/// Both come from elsewhere: one line of a log must hold them.
const REFUSED_CHARS_MAX: usize = 200;

impl RefusedDocument {
    pub fn new(id: &str, reason: &str) -> Self {
        let id = shown(id, REFUSED_CHARS_MAX);
        Self { id, reason: shown(reason, REFUSED_CHARS_MAX) }
    }
}

/// The parts of one run, between which it gave way to others.
impl std::ops::AddAssign for Report {
    fn add_assign(&mut self, next: Self) {
        self.counts += next.counts;
        self.requests += next.requests;
        self.no_changes &= next.no_changes;
        self.is_unfinished = next.is_unfinished;
        self.first_refused = self.first_refused.take().or(next.first_refused);
    }
}

/// One short line without passwords. It is cut first and far behind its end, so that a long text costs little and half a URL
/// is redacted as a whole one.
pub fn shown(text: &str, chars_max: usize) -> String {
    let start: String = text.chars().take(chars_max * 4).map(|c| if c.is_control() { ' ' } else { c }).collect();
    let mut line: String = crate::vault::redact_text(&start).chars().take(chars_max).collect();
    if line.len() < text.len() && line.chars().count() == chars_max {
        line.push('…');
    }
    line
}

/// Why a run failed. No text holds a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReplicateError {
    #[error("source or target is missing: {which}")]
    Missing { which: String },
    #[error("source or target refused the credentials: {0}")]
    Unauthorized(String),
    #[error("source or target does not answer: {0}")]
    Unreachable(String),
    /// No connection could be made from here.
    #[error("source or target cannot be reached: {0}")]
    OutOfReach(String),
    #[error("replication failed: {error}")]
    Other { error: String, verdict: Verdict },
}

impl ReplicateError {
    pub fn verdict(&self) -> Verdict {
        match self {
            ReplicateError::Missing { .. } | ReplicateError::Unauthorized(_) => Verdict::GiveUp,
            ReplicateError::Unreachable(_) | ReplicateError::OutOfReach(_) => Verdict::Retry { after: None },
            ReplicateError::Other { verdict, .. } => *verdict,
        }
    }

    /// For the metric.
    fn outcome(&self) -> &'static str {
        match self {
            ReplicateError::Missing { .. } => "missing",
            ReplicateError::Unauthorized(_) => "unauthorized",
            ReplicateError::Unreachable(_) | ReplicateError::OutOfReach(_) => "unreachable",
            ReplicateError::Other { .. } => "failed",
        }
    }
}

impl From<ReplicateError> for Failure {
    fn from(error: ReplicateError) -> Self {
        match &error {
            ReplicateError::Missing { .. } => Failure::missing(error.to_string()),
            _ => Failure::new(error.to_string(), error.verdict()),
        }
    }
}

/// Who makes the run. It must end by itself, within a bounded time.
pub trait Engine: Send + Sync {
    fn run(&self, spec: Arc<Replication>) -> BoxFuture<'static, Result<Report, ReplicateError>>;
}

impl From<&ReplicationSettings> for DispatcherSettings {
    fn from(settings: &ReplicationSettings) -> Self {
        Self {
            workers_max: settings.concurrency,
            concurrency_per_lane: settings.concurrency_per_host,
            concurrency_per_place: settings.concurrency_per_target,
            per_second_per_lane: settings.per_second_per_host,
            fast_retries: FAST_RETRIES,
            backoff: Backoff::new(RETRY_BASE, RETRY_CAP),
            // How much a host bears is found out for each request, by the native engine's gate.
            breaker: None,
        }
    }
}

pub struct Replicator {
    engine: Arc<dyn Engine>,
    metrics: Arc<Metrics>,
}

impl Replicator {
    pub fn new(engine: Arc<dyn Engine>, metrics: Arc<Metrics>) -> Self {
        Self { engine, metrics }
    }
}

impl Perform for Replicator {
    type Spec = Replication;

    fn perform(&self, spec: Arc<Replication>) -> BoxFuture<'static, Attempt> {
        spec.progress.start(SystemTime::now());
        let (run, metrics) = (self.engine.run(spec.clone()), self.metrics.clone());
        Box::pin(async move {
            let started = Instant::now();
            let result = run.await;
            let duration = started.elapsed();
            metrics.replication_duration_seconds.observe(duration.as_secs_f64());
            let outcome = result.as_ref().map_or_else(ReplicateError::outcome, outcome_of);
            metrics.replications.get_or_create(&OutcomeLabels { outcome }).inc();
            // What a run that failed had brought over by then is there all the same.
            let part = result.as_ref().cloned().unwrap_or_else(|_| spec.progress.seen().part);
            count(&metrics, &part.counts);
            say(&spec, &part, outcome, duration);
            spec.progress.end(&part, duration);
            if part.is_unfinished && result.is_ok() {
                return Ok(Step::Unfinished);
            }
            say_refused(&spec, &spec.progress.seen().report());
            result.map(|_| Step::Done).map_err(Failure::from)
        })
    }

    fn pool(&self) -> &'static str {
        "replicator"
    }

    fn level(&self, queued: usize, in_flight: usize) {
        self.metrics.replications_queued.set(queued as i64);
        self.metrics.replications_running.set(in_flight as i64);
    }
}

fn count(metrics: &Metrics, counts: &Counts) {
    metrics.replication_missing_checked.inc_by(counts.missing_checked);
    metrics.replication_missing_found.inc_by(counts.missing_found);
    metrics.replication_docs_read.inc_by(counts.docs_read);
    metrics.replication_docs_written.inc_by(counts.docs_written);
    metrics.replication_doc_write_failures.inc_by(counts.doc_write_failures);
    metrics.replication_bytes_read.inc_by(counts.bytes_read);
}

fn say(spec: &Replication, report: &Report, outcome: &str, duration: Duration) {
    let Replication { replicator_id, source, target, .. } = spec;
    let Counts { missing_checked, missing_found, docs_read, docs_written, doc_write_failures, bytes_read } = report.counts;
    tracing::debug!(
        %replicator_id,
        source,
        target,
        outcome,
        missing_checked,
        missing_found,
        docs_read,
        docs_written,
        doc_write_failures,
        bytes_read,
        requests = report.requests,
        duration_ms = duration.as_millis(),
        "replicated"
    );
}

/// Somebody should know: no later run tries them again.
fn say_refused(spec: &Replication, report: &Report) {
    let Report { counts: Counts { doc_write_failures, .. }, first_refused, .. } = report;
    if *doc_write_failures == 0 {
        return;
    }
    let Replication { replicator_id, source, target, .. } = spec;
    // `_replicate` counts them and names none.
    let first_doc_id = first_refused.as_ref().map(|doc| doc.id.as_str());
    let first_reason = first_refused.as_ref().map(|doc| doc.reason.as_str());
    tracing::warn!(%replicator_id, source, target, doc_write_failures, first_doc_id, first_reason, "the target refused documents");
}

fn outcome_of(report: &Report) -> &'static str {
    match report {
        Report { is_unfinished: true, .. } => "unfinished",
        Report { no_changes: true, .. } => "no_changes",
        Report { counts: Counts { doc_write_failures: 1.., .. }, .. } => "done_with_refused_documents",
        Report { .. } => "done",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::job::{Failed, Outcome};
    use crate::schedule::{DispatcherArguments, DispatcherMsg};
    use ractor::{Actor, ActorRef};
    use std::sync::Mutex;
    use tokio::sync::oneshot;

    fn replication(id: &str) -> Replication {
        Replication {
            replicator_id: id.into(),
            params: serde_json::json!({ "source": "http://user:hush@host/a", "target": "http://host/b" }),
            source: String::from("http://user@host/a"),
            target: String::from("http://host/b"),
            lane: "host".into(),
            engine: None,
            is_bidirectional: false,
            progress: Arc::default(),
            priority: 0,
        }
    }

    fn did(counts: Counts) -> Report {
        Report { counts, ..Report::default() }
    }

    /// Takes a second for a run, and answers what it was told; then that there was nothing to do.
    struct Told(Mutex<Vec<Result<Report, ReplicateError>>>);

    impl Engine for Told {
        fn run(&self, _: Arc<Replication>) -> BoxFuture<'static, Result<Report, ReplicateError>> {
            let answer = self.0.lock().expect("no panic under the lock").pop();
            Box::pin(async move {
                tokio::time::sleep(Duration::from_secs(1)).await;
                answer.unwrap_or(Ok(Report { no_changes: true, ..Report::default() }))
            })
        }
    }

    async fn pool(answers: Vec<Result<Report, ReplicateError>>) -> (ActorRef<DispatcherMsg<Replication>>, Arc<Metrics>) {
        let metrics = Metrics::new();
        let answers = answers.into_iter().rev().collect();
        let perform = Arc::new(Replicator::new(Arc::new(Told(Mutex::new(answers))), metrics.clone()));
        let (concurrency, concurrency_per_host, timeout) = (4, 4, Duration::from_secs(60));
        let settings = ReplicationSettings {
            engine: EngineChoice::Auto,
            concurrency,
            concurrency_per_host,
            per_second_per_host: None,
            timeout,
            concurrency_per_target: concurrency,
            requests_per_host: 64,
            checkpoint_after: timeout,
            source_checkpoint_after: timeout,
        };
        let arguments = DispatcherArguments { perform, settings: (&settings).into() };
        (Actor::spawn(None, ReplicatorPool::new(), arguments).await.expect("the pool starts").0, metrics)
    }

    fn submit(pool: &ActorRef<DispatcherMsg<Replication>>, id: &str) -> oneshot::Receiver<Outcome> {
        let (waiter, outcome) = oneshot::channel();
        pool.cast(DispatcherMsg::Submit(vec![(Arc::new(replication(id)), waiter)])).expect("the pool lives");
        outcome
    }

    #[test]
    fn a_replication_prints_no_password() {
        assert!(!format!("{:?}", replication("a")).contains("hush"));
    }

    #[tokio::test(start_paused = true)]
    async fn while_a_replicator_runs_exactly_one_more_run_waits() {
        let (pool, metrics) = pool(vec![]).await;
        let first = submit(&pool, "a");
        tokio::time::sleep(Duration::from_millis(500)).await;
        let more: Vec<_> = (0..10).map(|_| submit(&pool, "a")).collect();
        let other = submit(&pool, "b");
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!((metrics.replications_running.get(), metrics.replications_queued.get()), (2, 1));
        for outcome in [first, other].into_iter().chain(more) {
            assert_eq!(outcome.await, Ok(Outcome::Done));
        }
        assert_eq!(metrics.replications.get_or_create(&OutcomeLabels { outcome: "no_changes" }).get(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn the_waiter_can_tell_missing_from_failed() {
        let missing = ReplicateError::Missing { which: String::from("could not open http://host/a/") };
        let (pool, _) = pool(vec![
            Err(missing),
            Err(ReplicateError::Unauthorized(String::from("wrong password"))),
            Err(ReplicateError::Unreachable(String::from("no such host"))),
            Err(ReplicateError::Unreachable(String::from("no such host"))),
        ])
        .await;
        let Ok(Outcome::Missing { error }) = submit(&pool, "a").await else { panic!("missing") };
        assert_eq!(error, "source or target is missing: could not open http://host/a/");
        let Ok(Outcome::Failed(Failed { error, .. })) = submit(&pool, "a").await else { panic!("failed at once") };
        assert_eq!(error, "source or target refused the credentials: wrong password");
        let Ok(Outcome::Failed(Failed { error, .. })) = submit(&pool, "a").await else { panic!("failed after a retry") };
        assert_eq!(error, "source or target does not answer: no such host");
        assert_eq!(submit(&pool, "a").await, Ok(Outcome::Done));
    }

    #[tokio::test(start_paused = true)]
    async fn refused_documents_are_no_failed_run() {
        let (pool, metrics) = pool(vec![Ok(did(Counts {
            docs_read: 2,
            docs_written: 1,
            doc_write_failures: 1,
            bytes_read: 7,
            ..Counts::default()
        }))])
        .await;
        assert_eq!(submit(&pool, "a").await, Ok(Outcome::Done));
        let outcome = "done_with_refused_documents";
        assert_eq!(metrics.replications.get_or_create(&OutcomeLabels { outcome }).get(), 1);
        let counted = [
            &metrics.replication_docs_read,
            &metrics.replication_docs_written,
            &metrics.replication_doc_write_failures,
            &metrics.replication_bytes_read,
        ];
        assert_eq!(counted.map(|counter| counter.get()), [2, 1, 1, 7]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_run_can_be_looked_at() {
        let answers = vec![Ok(did(Counts { docs_written: 3, ..Counts::default() }))];
        let spec = Arc::new(replication("a"));
        let replicator = Replicator::new(Arc::new(Told(Mutex::new(answers))), Metrics::new());
        assert_eq!(spec.progress.seen().started_at, None, "it waits for its turn");
        let run = replicator.perform(spec.clone());
        assert!(spec.progress.seen().started_at.is_some() && spec.progress.seen().duration.is_none());
        assert_eq!(run.await, Ok(Step::Done));
        let seen = spec.progress.seen();
        assert_eq!((seen.report().counts.docs_written, seen.duration), (3, Some(Duration::from_secs(1))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_run_that_gave_way_is_one_run() {
        let part =
            |docs_written, is_unfinished| Ok(Report { is_unfinished, ..did(Counts { docs_written, ..Counts::default() }) });
        let (spec, answers) = (Arc::new(replication("a")), vec![part(4, false), part(3, true), part(1, false)]);
        let replicator = Replicator::new(Arc::new(Told(Mutex::new(answers))), Metrics::new());
        for (step, docs_written, seconds) in [(Step::Done, 1, 1), (Step::Unfinished, 3, 1), (Step::Done, 7, 2)] {
            assert_eq!(replicator.perform(spec.clone()).await, Ok(step));
            let seen = spec.progress.seen();
            assert_eq!((seen.report().counts.docs_written, seen.duration), (docs_written, Some(Duration::from_secs(seconds))));
        }
        assert_eq!(replicator.metrics.replication_docs_written.get(), 8);
    }

    #[test]
    fn what_is_shown_is_one_short_line_without_passwords() {
        for (text, expected) in [
            ("plain", "plain"),
            ("two\nlines\x1b", "two lines "),
            ("at http://u:hush@h/a: no", "at http://u:[redacted]@h/a: no"),
            ("0123456789ä0123456789ä0123456789ä0123456789", "0123456789ä0123456789ä0123456789…"),
        ] {
            assert_eq!(shown(text, if expected.ends_with('…') { 32 } else { 100 }), expected);
        }
    }
}
