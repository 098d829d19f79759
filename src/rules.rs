//! RulesActor: what the spiegel database asks for.
//!
//! It reads the `on_change` and `replicator` documents, follows their changes, and publishes one immutable snapshot through a
//! `watch` channel that the Supervisor owns: its own crash restarts nobody. A document that cannot be used is marked invalid,
//! said once for each revision, and passed over.

pub mod catalogue;
pub mod document;
pub mod fields;
pub mod handling;
pub mod installations;
pub mod invalid;
pub mod matching;
pub mod pattern;
pub mod rule;
pub mod selector;
pub mod template;

use crate::couch::{ChangesQuery, Couch, CouchError, FeedLine, Row, Seq};
use crate::schedule::backoff::Backoff;
use crate::telemetry::Metrics;
use catalogue::{Catalogue, Snapshot};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;

pub enum Message {
    /// The task that reads the spiegel database ended, which it never should.
    Ended,
}

impl ractor::Message for Message {}

pub struct RulesActor;

pub struct Arguments {
    pub couch: Couch,
    pub db_name: String,
    pub heartbeat: Duration,
    pub backoff: Backoff,
    pub publish: watch::Sender<Arc<Snapshot>>,
    pub metrics: Arc<Metrics>,
}

pub struct State {
    task: AbortHandle,
}

impl Drop for State {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Actor for RulesActor {
    type Msg = Message;
    type State = State;
    type Arguments = Arguments;

    async fn pre_start(&self, myself: ActorRef<Message>, arguments: Arguments) -> Result<State, ActorProcessingErr> {
        let task = tokio::spawn(async move {
            Reader { catalogue: Catalogue::new([arguments.db_name.as_str()]), since: None, arguments }.run().await;
        });
        let abort = task.abort_handle();
        tokio::spawn(async move {
            // Only a panic or the State's end gets here.
            let _ = task.await;
            let _ = myself.cast(Message::Ended);
        });
        Ok(State { task: abort })
    }

    async fn handle(&self, _: ActorRef<Message>, message: Message, _: &mut State) -> Result<(), ActorProcessingErr> {
        match message {
            Message::Ended => Err("the reader of the spiegel database crashed".into()),
        }
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<Message>,
        _: SupervisionEvent,
        _: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        Ok(())
    }
}

struct Reader {
    arguments: Arguments,
    catalogue: Catalogue,
    since: Option<Seq>,
}

/// Documents read by one request while loading: at most a few MB.
const LOAD_PAGE: usize = 1000;
/// Many documents that change together are one new snapshot.
const PUBLISH_EVERY: Duration = Duration::from_millis(50);
/// A snapshot of a hundred thousand replicators takes a while, and locks write them all the time: no more than a tenth of a core.
/// News of a rule does not wait for that: what is written after it must be delivered to it.
const PUBLISH_SHARE: u32 = 10;

impl Reader {
    async fn run(&mut self) {
        let mut failures = 0;
        loop {
            self.arguments.couch.health().up().await;
            match self.load_and_follow(&mut failures).await {
                Ok(()) => failures = 0,
                Err(error) => {
                    if error.is_unknown_seq() {
                        // Another server answers in the same place: everything is read anew.
                        self.since = None;
                    }
                    if !error.is_outage() && failures == 0 {
                        tracing::error!(db = %self.arguments.db_name, %error, "cannot read the rules, trying again");
                    }
                    failures = u32::saturating_add(failures, 1);
                }
            }
            // Reconnecting at once after a quiet end, and patiently when it keeps ending.
            let delay = self.arguments.backoff.delay(failures, fastrand::f64());
            tokio::time::sleep(delay.min(Duration::from_secs(10))).await;
        }
    }

    async fn load_and_follow(&mut self, failures: &mut u32) -> Result<(), CouchError> {
        self.load().await?;
        *failures = 0;
        let query = ChangesQuery { since: self.since.clone(), include_docs: true, ..ChangesQuery::default() };
        let (couch, db_name) = (&self.arguments.couch, &self.arguments.db_name);
        let mut feed = couch.changes_feed(db_name, &query, self.arguments.heartbeat).await?;
        let mut unpublished = false;
        let (mut not_before, mut at_latest) = (Instant::now(), Instant::now());
        loop {
            let line = match unpublished {
                true => tokio::time::timeout_at(at_latest, feed.next()).await.ok(),
                false => Some(feed.next().await),
            };
            match line.transpose()? {
                // It is time.
                None => {}
                Some(None) => return Ok(()),
                Some(Some(FeedLine::Heartbeat)) => {}
                Some(Some(FeedLine::Row(row))) => {
                    let is_first = self.take(row) && !std::mem::replace(&mut unpublished, true);
                    if self.catalogue.has_rule_news() {
                        not_before = Instant::now();
                        at_latest = at_latest.min(not_before + PUBLISH_EVERY);
                    }
                    if is_first {
                        at_latest = not_before.max(Instant::now() + PUBLISH_EVERY);
                    }
                }
                // The database was deleted: read it anew when it is back.
                Some(Some(FeedLine::LastSeq(_))) => {
                    self.since = None;
                    return Ok(());
                }
                Some(Some(FeedLine::Malformed(what))) => {
                    tracing::warn!(db = %self.arguments.db_name, what, "malformed row");
                }
            }
            let now = Instant::now();
            if unpublished && now >= not_before && (!feed.has_buffered_line() || now >= at_latest) {
                self.publish();
                unpublished = false;
                not_before = Instant::now() + now.elapsed() * PUBLISH_SHARE;
            }
        }
    }

    /// Everything since the last position, page by page; from the beginning where there is none.
    async fn load(&mut self) -> Result<(), CouchError> {
        if self.since.is_none() {
            let others = self.installations().await?;
            self.catalogue = Catalogue::new(others.iter().map(String::as_str).chain([self.arguments.db_name.as_str()]));
        }
        loop {
            let query =
                ChangesQuery { since: self.since.clone(), limit: Some(LOAD_PAGE), include_docs: true, ..ChangesQuery::default() };
            let page = self.arguments.couch.changes(&self.arguments.db_name, &query).await?;
            for what in &page.malformed {
                tracing::warn!(db = %self.arguments.db_name, what, "malformed row");
            }
            for row in page.rows {
                self.take(row);
            }
            self.since = Some(page.last_seq);
            if page.pending.unwrap_or(0) == 0 {
                self.publish();
                return Ok(());
            }
        }
    }

    async fn installations(&self) -> Result<HashSet<String>, CouchError> {
        match self.arguments.couch.docs_by_prefix("_global_changes", "_design/", None, LOAD_PAGE).await {
            Ok(docs) => Ok(installations::installations(&docs)),
            Err(CouchError::NotFound(_)) => Ok(HashSet::new()),
            Err(error) => Err(error),
        }
    }

    fn take(&mut self, row: Row) -> bool {
        self.since = Some(row.seq.clone());
        self.catalogue.take(&row)
    }

    fn publish(&mut self) {
        let snapshot = Arc::new(self.catalogue.snapshot());
        let Arguments { metrics, publish, .. } = &self.arguments;
        publish.send_replace(snapshot.clone());
        // Whoever reads these knows that everybody works by them.
        metrics.rules.set(i64::try_from(snapshot.rules().len()).unwrap_or(i64::MAX));
        metrics.invalid_documents.set(i64::try_from(self.catalogue.invalid_documents()).unwrap_or(i64::MAX));
    }
}
