//! Which hosts get no requests now, for those who would otherwise read work only to be told so.

use super::breaker::View;
use super::queue::BreakerChange;
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::time::Instant;

/// A probe is under way: soon its end is known.
const PROBE_PATIENCE: Duration = Duration::from_secs(1);

/// A dispatcher's breakers as anybody may look at them, for the price of a lock that is held for a moment.
#[derive(Debug, Clone, Default)]
pub struct Breakers(Arc<RwLock<HashMap<Arc<str>, View>>>);

impl Breakers {
    /// Before this time a job for the lane would most likely be told that it is not sent; None: try.
    pub fn open_until(&self, lane: &str) -> Option<Instant> {
        let now = Instant::now();
        match self.view(lane)? {
            View::Open { until } => Some(until).filter(|until| *until > now),
            View::HalfOpen { probing: true } => Some(now + PROBE_PATIENCE),
            View::HalfOpen { probing: false } | View::Closed => None,
        }
    }

    /// None: closed.
    pub fn view(&self, lane: &str) -> Option<View> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(lane).copied()
    }

    pub(super) fn apply(&self, changes: &[BreakerChange]) {
        let mut views = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for change in changes {
            match change.to {
                View::Closed => drop(views.remove(&change.lane)),
                view => drop(views.insert(change.lane.clone(), view)),
            }
        }
    }

    /// Their dispatcher has ended.
    pub(super) fn clear(&self) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_says_until_when_a_host_gets_nothing() {
        let breakers = Breakers::default();
        let until = Instant::now() + Duration::from_secs(5);
        let change = |to| BreakerChange {
            lane: "host".into(),
            from: View::Closed,
            to,
            failures: 1,
            lasted: Duration::ZERO,
            reason: "".into(),
            forgotten: false,
        };
        assert_eq!(breakers.open_until("host"), None);
        breakers.apply(&[change(View::Open { until })]);
        assert_eq!((breakers.open_until("host"), breakers.open_until("other")), (Some(until), None));
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(breakers.open_until("host"), None, "whoever comes first is the probe");
        breakers.apply(&[change(View::HalfOpen { probing: true })]);
        assert_eq!(breakers.open_until("host"), Some(Instant::now() + PROBE_PATIENCE));
        breakers.apply(&[change(View::Closed)]);
        assert_eq!(breakers.open_until("host"), None);
        assert!(breakers.0.read().unwrap().is_empty());
    }
}
