//! What one lane may do: so many jobs at once, so many starts a second.
//!
//! Time is a parameter: the limiter runs on a clock that shows whatever `now` was handed in last, so that it is as pure as the
//! queue around it and follows a paused test clock.

use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::nanos::Nanos;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// A bucket of n that gains n a second is full again after this long without a start, however empty it was.
const REFILL: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneLimits {
    pub concurrency: usize,
    /// None: no limit.
    pub per_second: Option<NonZeroU32>,
    /// Of those, for one place of the lane (`Spec::place`).
    pub concurrency_per_place: usize,
}

/// The limits of one lane, and how much of them is used.
pub struct Limits {
    concurrency: usize,
    in_flight: usize,
    rate: Option<Rate>,
}

struct Rate {
    clock: HandedClock,
    limiter: RateLimiter<NotKeyed, InMemoryState, HandedClock, NoOpMiddleware<Nanos>>,
    full_at: Instant,
}

impl Limits {
    pub fn new(limits: LaneLimits, now: Instant) -> Self {
        let rate = limits.per_second.map(|per_second| {
            let clock = HandedClock { origin: now, nanos: Arc::new(AtomicU64::new(0)) };
            let limiter = RateLimiter::direct_with_clock(Quota::per_second(per_second), clock.clone());
            Rate { clock, limiter, full_at: now }
        });
        // A limit of zero would be a lane that never moves, and nobody would be told.
        Self { concurrency: limits.concurrency.max(1), in_flight: 0, rate }
    }

    pub fn has_room(&self) -> bool {
        self.in_flight < self.concurrency
    }

    /// Takes one start out of the rate, and a place until `release`. The error is how long to wait for the rate; whoever waits
    /// for a place instead asks `has_room` first and waits for a `release`.
    pub fn try_acquire(&mut self, now: Instant) -> Result<(), Duration> {
        if let Some(rate) = &mut self.rate {
            rate.clock.show(now);
            rate.limiter.check().map_err(|not_until| not_until.wait_time_from(rate.clock.now()))?;
            rate.full_at = now + REFILL;
        }
        self.in_flight += 1;
        Ok(())
    }

    pub fn release(&mut self) {
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether forgetting these limits and making new ones would allow nothing more than keeping them.
    pub fn is_as_new(&self, now: Instant) -> bool {
        self.in_flight == 0 && self.rate.as_ref().is_none_or(|rate| now >= rate.full_at)
    }
}

/// Shows the time that it was handed; it never goes backwards.
#[derive(Clone)]
struct HandedClock {
    origin: Instant,
    nanos: Arc<AtomicU64>,
}

impl HandedClock {
    fn show(&self, now: Instant) {
        let nanos = now.saturating_duration_since(self.origin).as_nanos();
        self.nanos.fetch_max(u64::try_from(nanos).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

impl Clock for HandedClock {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        Nanos::from(self.nanos.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limits(concurrency: usize, per_second: Option<u32>, now: Instant) -> Limits {
        let per_second = per_second.and_then(NonZeroU32::new);
        Limits::new(LaneLimits { concurrency, per_second, concurrency_per_place: concurrency }, now)
    }

    #[test]
    fn places_are_taken_and_given_back() {
        let now = Instant::now();
        let mut limits = limits(2, None, now);
        assert!(limits.try_acquire(now).is_ok() && limits.has_room());
        assert!(limits.try_acquire(now).is_ok() && !limits.has_room());
        limits.release();
        assert!(limits.has_room());
        assert!(!limits.is_as_new(now), "one is still in flight");
        limits.release();
        assert!(limits.is_as_new(now));
    }

    #[test]
    fn a_concurrency_of_zero_counts_as_one() {
        assert!(limits(0, None, Instant::now()).has_room());
    }

    #[test]
    fn past_the_burst_the_error_says_how_long_to_wait() {
        let start = Instant::now();
        let mut limits = limits(100, Some(4), start);
        for _ in 0..4 {
            assert_eq!(limits.try_acquire(start), Ok(()));
        }
        let wait = limits.try_acquire(start).expect_err("the burst is used up");
        assert_eq!(wait, Duration::from_millis(250));
        assert!(limits.try_acquire(start + wait - Duration::from_millis(1)).is_err());
        assert_eq!(limits.try_acquire(start + wait), Ok(()));
        assert_eq!(limits.in_flight(), 5, "a refused start takes no place");
    }

    #[test]
    fn a_limiter_is_as_new_only_when_it_is_full_again() {
        let start = Instant::now();
        let mut limits = limits(1, Some(10), start);
        assert!(limits.is_as_new(start));
        limits.try_acquire(start).expect("the first start");
        limits.release();
        assert!(!limits.is_as_new(start + Duration::from_millis(999)));
        assert!(limits.is_as_new(start + Duration::from_secs(1)));
    }

    proptest! {
        #[test]
        fn any_second_has_at_most_the_burst_and_one_refill(per_second in 1u32..50, steps in prop::collection::vec(0u64..200, 1..200)) {
            let start = Instant::now();
            let mut limits = limits(usize::MAX, Some(per_second), start);
            let (mut now, mut starts) = (start, Vec::new());
            for step_ms in steps {
                now += Duration::from_millis(step_ms);
                if limits.try_acquire(now).is_ok() {
                    starts.push(now);
                }
            }
            for (i, first) in starts.iter().enumerate() {
                let within = starts[i..].iter().take_while(|at| **at - *first < Duration::from_secs(1)).count();
                prop_assert!(within <= 2 * per_second as usize);
            }
        }

        #[test]
        fn waiting_as_told_is_enough(per_second in 1u32..1_000, tries in 1usize..100) {
            let mut now = Instant::now();
            let mut limits = limits(usize::MAX, Some(per_second), now);
            for _ in 0..tries {
                if let Err(wait) = limits.try_acquire(now) {
                    now += wait;
                    prop_assert_eq!(limits.try_acquire(now), Ok(()));
                }
            }
        }
    }
}
