//! The words that the stages share.
//!
//! A job is work that the scheduler runs for somebody who waits for its verdict. Nothing here decides anything.

use crate::couch::fingerprint::Fingerprint;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// A database's name as CouchDB spells it, not encoded: `a/b+c`.
pub type DbName = Arc<str>;

/// What a failure means, decided where the protocol is known (`couch`, `webhook`, `replicate`) and obeyed in `schedule`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Worth another try, not before `after` where the other side asked for it.
    Retry { after: Option<Duration> },
    /// Worth another try, but not a quick one: the other side understood, and said no.
    Later,
    /// Trying the same again cannot help: somebody must change something first.
    GiveUp,
    /// The receiver wants nothing more of this kind.
    Gone,
}

/// How a job ended, as told to whoever waits for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// Failed past the fast retries.
    Failed(Failed),
    /// The database that it works on does not exist: no try helps until somebody makes it, and after a while the work itself may
    /// be given up.
    Missing {
        error: String,
    },
    /// It was not this job's turn to be tried: its host is not asked before `after`.
    Unsent {
        error: String,
        after: Duration,
    },
}

/// The last attempt of a job that failed. No text in it holds a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    pub error: String,
    pub verdict: Verdict,
    pub attempts: u32,
    /// None where none came.
    pub answer: Option<Answer>,
}

impl Failed {
    /// The other side's wish, such as `Retry-After`.
    pub fn after(&self) -> Option<Duration> {
        match self.verdict {
            Verdict::Retry { after } => after,
            _ => None,
        }
    }
}

/// What the other side said, cut to a bound and without what it echoed of our secrets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    pub excerpt: String,
}

/// As documents carry time. Years beyond 9999 cannot be written; a document of somebody else's may ask for one.
pub fn timestamp(at: SystemTime) -> String {
    const LAST_SECOND: Duration = Duration::from_secs(253_402_300_799);
    humantime::format_rfc3339_millis(at.min(SystemTime::UNIX_EPOCH + LAST_SECOND)).to_string()
}

/// What a run of a database has taken on: settled once its work is confirmed or durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Claim(pub u64);

/// The debt as those see it who work it off; the cursor of the feed owns it.
pub trait Debts: Send + Sync {
    /// Takes what is owed for `db` until now. To be called before the first request of a run: what is owed later belongs
    /// to the next run.
    fn claim(&self, db: &DbName) -> Claim;
    /// What a sweep read of the database before it owed what was claimed; None where it was no sweep.
    fn fingerprint(&self, db: &DbName, claim: Claim) -> Option<Fingerprint>;
    /// The claimed work is confirmed, or durable in CouchDB.
    fn settle(&self, db: &DbName, claim: Claim);
    /// The claimed work was not done: it is owed again.
    fn release(&self, db: &DbName, claim: Claim);
    /// Whoever had claimed work of this database is gone: all of it is owed again.
    fn release_all(&self, db: &DbName);
    fn owes(&self, db: &str) -> bool;
}

/// One promise for several pieces of work: kept when each is done, broken when one is dropped undone.
#[derive(Debug)]
pub struct Completion {
    remaining: std::sync::atomic::AtomicUsize,
    promise: std::sync::Mutex<Option<tokio::sync::oneshot::Sender<()>>>,
}

impl Completion {
    pub fn of(pieces: usize) -> (Vec<Piece>, tokio::sync::oneshot::Receiver<()>) {
        let (promise, kept) = tokio::sync::oneshot::channel();
        (Self::keeping(promise, pieces), kept)
    }

    /// For a promise that was made already.
    pub fn keeping(promise: tokio::sync::oneshot::Sender<()>, pieces: usize) -> Vec<Piece> {
        let completion = Arc::new(Self {
            remaining: std::sync::atomic::AtomicUsize::new(pieces),
            promise: std::sync::Mutex::new(Some(promise)),
        });
        if pieces == 0 {
            completion.keep();
        }
        (0..pieces).map(|_| Piece(completion.clone())).collect()
    }

    fn keep(&self) {
        if let Some(promise) = self.promise.lock().ok().and_then(|mut promise| promise.take()) {
            // Nobody may be waiting any more; that is theirs to decide.
            let _ = promise.send(());
        }
    }
}

/// One piece of a `Completion`.
#[derive(Debug)]
pub struct Piece(Arc<Completion>);

impl Piece {
    pub fn done(self) {
        if self.0.remaining.fetch_sub(1, std::sync::atomic::Ordering::AcqRel) == 1 {
            self.0.keep();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_completion_is_kept_only_when_every_piece_is_done() {
        let (pieces, kept) = Completion::of(2);
        for piece in pieces {
            piece.done();
        }
        assert!(kept.await.is_ok());

        let (mut pieces, kept) = Completion::of(2);
        pieces.remove(0).done();
        drop(pieces);
        assert!(kept.await.is_err(), "a dropped piece breaks the promise");

        let (_, kept) = Completion::of(0);
        assert!(kept.await.is_ok());
    }
}
