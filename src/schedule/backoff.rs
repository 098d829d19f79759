//! How long to wait before the next try: doubling to a cap, with full jitter, so that those who failed together do not come
//! back together.

use std::time::Duration;

/// Even the luckiest draw waits this long: full jitter may draw zero, and a retry at once is a hot loop.
const DELAY_MIN: Duration = Duration::from_millis(10);
/// No setting and no `Retry-After` holds a job for longer than a day: far below what would overflow an `Instant`.
pub(super) const DELAY_MAX: Duration = Duration::from_secs(24 * 3_600);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    base: Duration,
    cap: Duration,
}

impl Backoff {
    pub fn new(base: Duration, cap: Duration) -> Self {
        Self { base: base.max(DELAY_MIN), cap: cap.clamp(DELAY_MIN, DELAY_MAX) }
    }

    pub fn cap(&self) -> Duration {
        self.cap
    }

    /// The delay after the first failure has `retries` 0. `random` is drawn by the caller from 0..1.
    pub fn delay(&self, retries: u32, random: f64) -> Duration {
        let random = if random.is_finite() { random.clamp(0.0, 1.0) } else { 1.0 };
        let jittered = self.ceiling(retries).mul_f64(random);
        jittered.clamp(DELAY_MIN, self.cap)
    }

    /// The longest delay that may be drawn.
    pub(super) fn ceiling(&self, retries: u32) -> Duration {
        let doubled = 1u32.checked_shl(retries).and_then(|factor| self.base.checked_mul(factor));
        doubled.unwrap_or(self.cap).min(self.cap)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_ceiling_doubles_up_to_the_cap() {
        let backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(60));
        for (retries, expected_ms) in
            [(0, 500), (1, 1_000), (2, 2_000), (6, 32_000), (7, 60_000), (31, 60_000), (32, 60_000), (u32::MAX, 60_000)]
        {
            assert_eq!(backoff.delay(retries, 1.0), Duration::from_millis(expected_ms), "after {retries} retries");
        }
    }

    #[test]
    fn jitter_spreads_from_the_floor_to_the_ceiling() {
        let backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        for (random, expected_ms) in
            [(0.0, 10), (0.25, 250), (0.5, 500), (1.0, 1_000), (-3.0, 10), (7.0, 1_000), (f64::NAN, 1_000)]
        {
            assert_eq!(backoff.delay(0, random), Duration::from_millis(expected_ms), "drawn {random}");
        }
    }

    #[test]
    fn settings_of_zero_still_wait() {
        let backoff = Backoff::new(Duration::ZERO, Duration::ZERO);
        assert_eq!(backoff.delay(0, 0.0), DELAY_MIN);
        assert_eq!(backoff.delay(40, 1.0), DELAY_MIN);
    }

    proptest! {
        #[test]
        fn a_delay_is_never_below_the_floor_nor_above_the_cap(
            base_ms in 0u64..u64::MAX, cap_ms in 0u64..u64::MAX, retries: u32, random: f64,
        ) {
            let backoff = Backoff::new(Duration::from_millis(base_ms), Duration::from_millis(cap_ms));
            let delay = backoff.delay(retries, random);
            prop_assert!(delay >= DELAY_MIN && delay <= backoff.cap() && delay <= DELAY_MAX);
        }

        #[test]
        fn a_later_retry_never_waits_less_for_the_same_draw(base_ms in 1u64..10_000, retries in 0u32..100, random in 0.0f64..1.0) {
            let backoff = Backoff::new(Duration::from_millis(base_ms), Duration::from_secs(3_600));
            prop_assert!(backoff.delay(retries + 1, random) >= backoff.delay(retries, random));
        }
    }
}
