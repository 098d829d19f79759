//! `_global_changes`: which databases were created, updated and deleted, late and with the repetitions left out.
//!
//! As CouchDB's, it is a set in memory that is written out every so often: a database that is written a hundred times in
//! between has one row, rows of one moment have no order, and what the set loses is never written.

use super::incoming::Incoming;
use super::server::{GLOBAL_CHANGES, Server};
use serde_json::json;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    Created,
    Updated,
    Deleted,
}

impl Event {
    fn word(self) -> &'static str {
        match self {
            Event::Created => "created",
            Event::Updated => "updated",
            Event::Deleted => "deleted",
        }
    }
}

#[derive(Default)]
pub struct GlobalChanges {
    waiting: Mutex<HashSet<(Event, String)>>,
    arrived: Notify,
}

impl GlobalChanges {
    pub fn record(&self, event: Event, name: &str) {
        if self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert((event, name.into())) {
            self.arrived.notify_one();
        }
    }

    fn take(&self) -> HashSet<(Event, String)> {
        std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Writes the set out on a fixed beat, like CouchDB: a row is late by anything up to `delay`.
pub async fn write_out(server: Arc<Server>, delay: Duration) {
    let delay = delay.max(Duration::from_millis(1));
    let started = Instant::now();
    loop {
        server.global_changes.arrived.notified().await;
        let beats = started.elapsed().as_nanos() / delay.as_nanos() + 1;
        let next = u32::try_from(beats).ok().and_then(|beats| delay.checked_mul(beats)).unwrap_or(delay);
        tokio::time::sleep_until(started + next).await;
        flush(&server);
    }
}

fn flush(server: &Server) {
    let events = server.global_changes.take();
    let Ok(db) = server.database(GLOBAL_CHANGES) else { return };
    for (event, name) in events {
        if server.faults.loses_row_of(&name) {
            continue;
        }
        let id = format!("{}:{name}", event.word());
        let mut document = json!({"_id": id});
        if let Some((rev, _)) = db.winner(&id) {
            document["_rev"] = json!(rev.to_string());
        }
        // A client that wrote this very document in between wins; the row is there all the same.
        let written = Incoming::parse(document, true).and_then(|incoming| db.put(incoming, true));
        if let Err(failure) = written {
            tracing::debug!(db = name, error = failure.error, "row of _global_changes not written");
        }
    }
}
