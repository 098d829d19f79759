//! Waiting for a level, with a deadline: the only place where a test sleeps.

use std::time::{Duration, Instant};

/// Far more than anything here takes on a quiet machine, and little enough that a failure is seen soon.
pub const SOON: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Asks until `look` answers Some, and gives that back. Panics past the deadline with what was waited for.
#[track_caller]
pub fn eventually<T, F>(deadline: Duration, what: impl Into<String>, mut look: impl FnMut() -> F) -> impl Future<Output = T>
where
    F: Future<Output = Option<T>>,
{
    let (what, from) = (what.into(), std::panic::Location::caller());
    async move {
        let end = Instant::now() + deadline;
        loop {
            if let Some(found) = look().await {
                return found;
            }
            assert!(Instant::now() < end, "not within {deadline:?}: {what} (waited for at {from})");
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// Panics when `look` says false once within `time`: for what must not happen.
#[track_caller]
pub fn stays<F>(time: Duration, what: impl Into<String>, mut look: impl FnMut() -> F) -> impl Future<Output = ()>
where
    F: Future<Output = bool>,
{
    let (what, from) = (what.into(), std::panic::Location::caller());
    async move {
        let end = Instant::now() + time;
        while Instant::now() < end {
            assert!(look().await, "did not stay so: {what} (at {from})");
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}
