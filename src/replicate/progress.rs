//! One run as others may look at it: whether it has begun, what it has done so far, and in the end what it did.
//!
//! It travels with the run, so that nobody has to keep a list of those under way, and it is gone with it.

use super::Report;
use crate::config::EngineChoice;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

#[derive(Debug, Default)]
pub struct Progress(Mutex<Seen>);

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// None while it waits for its turn.
    pub started_at: Option<SystemTime>,
    /// Of the parts that ended.
    pub duration: Option<Duration>,
    /// Who makes it; never `Auto`.
    pub engine: Option<EngineChoice>,
    /// What it did before it gave way to others, and its part since then.
    pub before: Report,
    pub part: Report,
    /// Of what was there when it began; where the source tells.
    pub changes_pending: Option<u64>,
    /// The number of the source's seq up to which everything is in the target.
    pub through_seq: Option<u64>,
}

impl Seen {
    pub fn report(&self) -> Report {
        let mut report = self.before.clone();
        report += self.part.clone();
        report
    }
}

impl Progress {
    fn locked(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn seen(&self) -> Seen {
        self.locked().clone()
    }

    pub fn has_started(&self) -> bool {
        self.locked().started_at.is_some()
    }

    /// Again for each try and each part.
    pub fn start(&self, at: SystemTime) {
        let mut seen = self.locked();
        *seen = match seen.part.is_unfinished && seen.duration.is_some() {
            true => Seen { before: seen.report(), part: Report::default(), ..seen.clone() },
            false => Seen { started_at: Some(at), before: Report { no_changes: true, ..Report::default() }, ..Seen::default() },
        };
    }

    pub fn made_by(&self, engine: EngineChoice) {
        let mut seen = self.locked();
        if seen.engine.replace(engine).is_some_and(|before| before != engine) {
            seen.part = Report::default();
            (seen.changes_pending, seen.through_seq) = (None, None);
        }
    }

    pub fn so_far(&self, part: Report, changes_pending: Option<u64>, through_seq: Option<u64>) {
        let mut seen = self.locked();
        seen.part = part;
        (seen.changes_pending, seen.through_seq) = (changes_pending, through_seq);
    }

    pub fn end(&self, part: &Report, duration: Duration) {
        let mut seen = self.locked();
        seen.part = part.clone();
        seen.duration = Some(seen.duration.unwrap_or_default() + duration);
    }
}
