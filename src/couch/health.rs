//! Whether CouchDB answers: one place knows, and everyone asks it instead of retrying alone.
//!
//! Requests report here (`suspect`); CouchHealth's actor (`app/couch_health.rs`) probes while it is suspect and
//! publishes `Up` or `Down`. An outage is a state: whoever needs CouchDB waits in `up()`.

use super::CouchError;
use crate::telemetry::Metrics;
use std::sync::Arc;
use tokio::sync::{Notify, watch};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Up,
    Down,
}

#[derive(Clone)]
pub struct Health {
    state: watch::Sender<State>,
    suspicion: Arc<Suspicion>,
    metrics: Arc<Metrics>,
}

struct Suspicion {
    notify: Notify,
    reason: std::sync::Mutex<Option<String>>,
}

impl Health {
    pub fn new(metrics: Arc<Metrics>) -> Self {
        let (state, _) = watch::channel(State::Up);
        metrics.couchdb_up.set(1);
        Self { state, suspicion: Arc::new(Suspicion { notify: Notify::new(), reason: std::sync::Mutex::new(None) }), metrics }
    }

    /// A request got no answer, or one that only a sick server gives. Nothing is said of a good answer: only a probe ends an
    /// outage, so that a half-dead server does not make the state flap.
    pub fn suspect(&self, error: &CouchError) {
        if let Ok(mut reason) = self.suspicion.reason.lock() {
            reason.get_or_insert_with(|| error.to_string());
        }
        self.suspicion.notify.notify_one();
    }

    /// For CouchHealth's actor: waits for the next suspicion and takes its reason.
    pub async fn suspected(&self) -> String {
        self.suspicion.notify.notified().await;
        let reason = self.suspicion.reason.lock().ok().and_then(|mut reason| reason.take());
        reason.unwrap_or_else(|| String::from("no reason recorded"))
    }

    /// For CouchHealth's actor. True when this changed the state.
    pub fn publish(&self, state: State) -> bool {
        self.metrics.couchdb_up.set(i64::from(state == State::Up));
        self.state.send_if_modified(|current| {
            let changed = *current != state;
            *current = state;
            changed
        })
    }

    pub fn is_up(&self) -> bool {
        *self.state.borrow() == State::Up
    }

    /// Returns once CouchDB answers.
    pub async fn up(&self) {
        let mut state = self.state.subscribe();
        // The sender lives as long as self, so this cannot fail while somebody waits.
        let _ = state.wait_for(|state| *state == State::Up).await;
    }

    /// Returns once CouchDB is known not to answer.
    pub async fn down(&self) {
        let mut state = self.state.subscribe();
        let _ = state.wait_for(|state| *state == State::Down).await;
    }
}
