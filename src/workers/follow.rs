//! Follows the documents of the spiegel database: all of them first, then what changes.
//!
//! While no locks are needed, it only looks for signs of others, from now on.

use crate::couch::{ChangesQuery, Couch, CouchError, FeedLine, Row as ChangesRow, Seq};
use crate::schedule::backoff::Backoff;
use crate::workers::{Message, Row};
use ractor::ActorRef;
use serde_json::Value;
use std::time::Duration;
use tokio::sync::{oneshot, watch};

pub struct Follower {
    pub couch: Couch,
    pub db_name: String,
    pub heartbeat: Duration,
    pub backoff: Backoff,
    pub mixed: watch::Receiver<bool>,
    pub workers: ActorRef<Message>,
}

/// Documents read by one request while loading, and told at once.
const PAGE: usize = 1000;
const TOLD_TOGETHER: usize = 100;
/// So many failures in a row while CouchDB answers others are worth a line.
const OUTAGE_BEGINNINGS: u32 = 3;

impl Follower {
    pub async fn run(mut self) {
        loop {
            let is_mixed = *self.mixed.borrow_and_update();
            let mut mixed = self.mixed.clone();
            tokio::select! {
                () = self.follow_forever(is_mixed) => return,
                changed = mixed.changed() => if changed.is_err() {
                    return std::future::pending().await;
                },
            }
            self.mixed = mixed;
        }
    }

    async fn follow_forever(&self, is_mixed: bool) {
        let mut since: Option<Seq> = if is_mixed { None } else { Some(Seq::from("now")) };
        let mut failures: u32 = 0;
        let _ = self.workers.cast(Message::Begin);
        loop {
            self.couch.health().up().await;
            let followed = self.follow(&mut since, &mut failures).await;
            let _ = self.workers.cast(Message::Following(false));
            match followed {
                Ok(()) => failures = 0,
                Err(error) => {
                    if error.is_unknown_seq() {
                        since = None;
                    }
                    failures = failures.saturating_add(1);
                    if failures == OUTAGE_BEGINNINGS {
                        tracing::error!(db = %self.db_name, %error, "cannot follow the spiegel database, trying on");
                    }
                }
            }
            let delay = self.backoff.delay(failures, fastrand::f64());
            tokio::time::sleep(delay.clamp(Duration::from_millis(50), Duration::from_secs(5))).await;
        }
    }

    async fn follow(&self, since: &mut Option<Seq>, failures: &mut u32) -> Result<(), CouchError> {
        loop {
            let page = self.couch.changes(&self.db_name, &self.query(since.clone(), Some(PAGE))).await?;
            for what in &page.malformed {
                tracing::warn!(db = %self.db_name, what, "malformed row");
            }
            self.tell(page.rows.into_iter().map(row_of).collect()).await;
            *since = Some(page.last_seq);
            if page.pending.unwrap_or(0) == 0 {
                break;
            }
        }
        *failures = 0;
        // Whatever was renewed until now was told; from here on silence means something.
        let _ = self.workers.cast(Message::WasDeaf);
        let mut feed = self.couch.changes_feed(&self.db_name, &self.query(since.clone(), None), self.heartbeat).await?;
        let _ = self.workers.cast(Message::Following(true));
        let mut rows = Vec::new();
        while let Some(line) = feed.next().await? {
            match line {
                FeedLine::Heartbeat => {}
                FeedLine::Row(row) => {
                    *since = Some(row.seq.clone());
                    rows.push(row_of(row));
                }
                // Its database was deleted: everything is read anew when it is back.
                FeedLine::LastSeq(_) => {
                    *since = None;
                    return Ok(());
                }
                FeedLine::Malformed(what) => tracing::warn!(db = %self.db_name, what, "malformed row"),
            }
            if !rows.is_empty() && (!feed.has_buffered_line() || rows.len() >= TOLD_TOGETHER) {
                self.tell(std::mem::take(&mut rows)).await;
            }
        }
        Ok(())
    }

    fn query(&self, since: Option<Seq>, limit: Option<usize>) -> ChangesQuery {
        ChangesQuery { since, limit, include_docs: true, conflicts: true }
    }

    /// No more is read than the actor takes in.
    async fn tell(&self, rows: Vec<Row>) {
        let (told, taken_in) = oneshot::channel();
        if self.workers.cast(Message::Rows { rows, told }).is_ok() {
            let _ = taken_in.await;
        }
    }
}

fn row_of(row: ChangesRow) -> Row {
    let doc = row.doc.as_ref().filter(|_| !row.deleted).and_then(|doc| serde_json::from_str::<Value>(doc.get()).ok());
    match doc {
        Some(doc) if doc.is_object() => Row::Is(doc),
        _ => Row::Gone(row.id),
    }
}
