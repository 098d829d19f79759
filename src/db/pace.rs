//! When an update-listener writes what it has gathered: at once where it is alone, and one after the other where there are
//! several (pure).
//!
//! Two that read the same row of the feed in the same moment would both write the same documents. Nobody appoints a first one:
//! each waits for a time of its own between its first look at the documents and its writing. Whose time is shortest writes, and
//! goes on to wait less; the others find on their second look that there is nothing left to write, and go on to wait longer. A
//! conflict means that two times are too near to each other, and draws new ones. Where the first one dies the others find work
//! again, and wait less and less.

use std::time::{Duration, Instant};

#[derive(Debug, Clone, PartialEq)]
pub struct Pace {
    wait: Duration,
    longest: Duration,
}

/// A second look is worth its request only where it comes later than a first one is written.
const SHORTEST: Duration = Duration::from_millis(10);
/// Two requests of others, one after the other.
const APART: Duration = Duration::from_millis(50);

impl Pace {
    /// `random` is from 0 to 1.
    pub fn new(longest: Duration, random: f64) -> Self {
        let mut pace = Self { wait: Duration::ZERO, longest: longest.max(APART * 4) };
        pace.conflict(random);
        pace
    }

    /// How long after its first look it looks again and writes; None: it writes what it saw at first.
    pub fn wait(&self) -> Option<Duration> {
        (self.wait >= SHORTEST).then_some(self.wait)
    }

    /// It wrote, and nobody was in its way.
    pub fn led(&mut self) {
        self.wait /= 2;
    }

    /// Somebody else had written by the second look.
    pub fn followed(&mut self) {
        self.wait = (self.wait + self.wait / 2).max(APART).min(self.longest);
    }

    /// Somebody else wrote in the same moment.
    pub fn conflict(&mut self, random: f64) {
        self.wait = SHORTEST + self.longest.saturating_sub(SHORTEST).mul_f64(random.clamp(0.0, 1.0));
    }
}

/// When what was gathered goes: at once after a quiet time, else together once every `timeout`, unless there is enough.
pub fn goes_at(first: Instant, gathered: usize, last: Option<Instant>, batch_size: usize, timeout: Duration) -> Instant {
    match last {
        Some(last) if gathered < batch_size => first.max(last + timeout),
        _ => first,
    }
}

/// After so many conflicts in a row; `random` is from 0 to 1.
pub fn retry_after(conflicts: u32, random: f64) -> Duration {
    let longest = Duration::from_millis(50 << conflicts.min(5));
    longest.mul_f64(random.clamp(0.0, 1.0))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn one_alone_soon_waits_no_more() {
        let mut pace = Pace::new(SECOND, 1.0);
        assert_eq!(pace.wait(), Some(SECOND));
        for _ in 0..7 {
            pace.led();
        }
        assert_eq!(pace.wait(), None);
    }

    #[test]
    fn gathering_is_bounded_in_time_and_count() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let cases = [
            (at(5), 1, None, at(5)),
            (at(5000), 1, Some(at(0)), at(5000)),
            (at(300), 1, Some(at(0)), at(1000)),
            (at(300), 99, Some(at(0)), at(1000)),
            (at(300), 100, Some(at(0)), at(300)),
        ];
        for (first, gathered, last, expected) in cases {
            assert_eq!(goes_at(first, gathered, last, 100, SECOND), expected);
        }
        assert_eq!(goes_at(at(3), 1, Some(at(0)), 100, Duration::ZERO), at(3));
    }

    /// Several that look at the same change; whoever writes needs 30 ms from its look to its writing.
    fn conflicts(paces: &mut [Pace], changes: usize, rng: &mut fastrand::Rng) -> usize {
        const WRITING: Duration = Duration::from_millis(30);
        let mut conflicts = 0;
        for _ in 0..changes {
            // The row comes to each of them at a time of its own, within some milliseconds.
            let looks: Vec<Duration> =
                paces.iter().map(|pace| pace.wait().unwrap_or_default() + Duration::from_millis(rng.u64(0..8))).collect();
            let first = looks.iter().min().copied().unwrap_or_default();
            let order: Vec<usize> = (0..paces.len()).filter(|one| looks[*one] < first + WRITING).collect();
            for (one, pace) in paces.iter_mut().enumerate() {
                if !order.contains(&one) {
                    pace.followed();
                } else if order.len() == 1 {
                    pace.led();
                } else {
                    let is_first = looks[one] == first;
                    conflicts += usize::from(!is_first);
                    if !is_first {
                        pace.conflict(rng.f64());
                    }
                }
            }
        }
        conflicts
    }

    #[test]
    fn several_seldom_write_the_same_and_the_first_one_waits_for_nothing() {
        for seed in 0..50 {
            for count in 2..4 {
                let mut rng = fastrand::Rng::with_seed(seed);
                let mut paces: Vec<Pace> = (0..count).map(|_| Pace::new(SECOND, rng.f64())).collect();
                let found = conflicts(&mut paces, 100, &mut rng);
                assert!(found <= 10, "{found} conflicts of {count} with seed {seed}");
                assert!(paces.iter().any(|pace| pace.wait().is_none()), "{paces:?}");
                // The first one dies.
                paces.sort_by_key(Pace::wait);
                paces.remove(0);
                conflicts(&mut paces, 40, &mut rng);
                assert!(paces.iter().any(|pace| pace.wait().is_none()), "{paces:?}");
            }
        }
    }

    #[test]
    fn retries_are_random_and_bounded() {
        assert_eq!(retry_after(0, 0.0), Duration::ZERO);
        assert_eq!(retry_after(0, 1.0), Duration::from_millis(50));
        assert_eq!(retry_after(u32::MAX, 1.0), Duration::from_millis(1600));
    }
}
