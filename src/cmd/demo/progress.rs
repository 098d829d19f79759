//! What came through so far: which revisions arrived in `all_blog_posts`, and for which the API was called.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// A document and one of its revisions.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Version {
    pub id: String,
    pub rev: String,
}

#[derive(Default)]
pub struct Seen {
    pub arrived: HashSet<Version>,
    pub called: HashSet<Version>,
    pub signed_up: HashSet<String>,
    /// Answered requests by path; a repeat counts again.
    pub calls: BTreeMap<&'static str, u64>,
    pub calls_failed: u64,
}

#[derive(Default)]
pub struct Progress {
    seen: Mutex<Seen>,
    changed: Notify,
}

impl Progress {
    pub fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands through what `note` says, and wakes who waits.
    pub fn note<T>(&self, note: impl FnOnce(&mut Seen) -> T) -> T {
        let told = note(&mut self.seen());
        self.changed.notify_waiters();
        told
    }

    pub async fn until(&self, is_done: impl Fn(&Seen) -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Before the look, so that nothing between the look and the wait is missed.
            changed.as_mut().enable();
            if is_done(&self.seen()) {
                return;
            }
            changed.await;
        }
    }
}
