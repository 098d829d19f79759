//! When a parked delivery is tried again, and when it is given up (pure).

use crate::job::Verdict;
use crate::rules::handling::{Retry, Strategy};
use std::time::{Duration, SystemTime};

/// Even the luckiest draw waits this long, where the delay is no shorter; and no setting makes a hot loop.
const DELAY_MIN: Duration = Duration::from_secs(1);
const DELAY_FLOOR: Duration = Duration::from_millis(10);
/// No wish of a receiver's holds a delivery longer than this.
const ASKED_MAX: Duration = Duration::from_secs(24 * 3_600);
/// Without a cap of its own a delay never overflows.
const DELAY_MAX: Duration = Duration::from_secs(365 * 24 * 3_600);

/// What the settings say for rules that say nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Patience {
    pub strategy: Strategy,
    pub delay: Duration,
    pub multiplier: f64,
    pub cap: Duration,
    /// Tries after it was parked; None: without end.
    pub limit: Option<u32>,
    /// Since the first failure; None: never.
    pub give_up_after: Option<Duration>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    At(SystemTime),
    Dead { reason: String },
}

/// How a delivery has failed so far.
#[derive(Debug, Clone, Copy)]
pub struct History {
    /// Tries after it was parked.
    pub retries: u32,
    pub first_failed_at: SystemTime,
}

impl Patience {
    /// What a rule says of its own wins.
    pub fn of(&self, rule: &Retry) -> Self {
        Self {
            strategy: rule.strategy.unwrap_or(self.strategy),
            delay: rule.delay.unwrap_or(self.delay),
            multiplier: rule.multiplier.unwrap_or(self.multiplier),
            cap: rule.cap.unwrap_or(self.cap),
            limit: rule.limit.map_or(self.limit, |limit| (limit > 0).then_some(limit)),
            give_up_after: rule.give_up_after.or(self.give_up_after),
        }
    }

    /// `random` is drawn from 0..1 by the caller.
    pub fn next(&self, verdict: Verdict, history: History, now: SystemTime, random: f64) -> Next {
        let dead = |reason: String| Next::Dead { reason };
        if verdict == Verdict::GiveUp {
            return dead(String::from("trying again cannot help"));
        }
        if let Some(limit) = self.limit.filter(|limit| history.retries >= *limit) {
            return dead(format!("given up after {limit} retries"));
        }
        // A document that does not say when is as young as can be.
        let is_told = history.first_failed_at > SystemTime::UNIX_EPOCH;
        let age = now.duration_since(history.first_failed_at).ok().filter(|_| is_told).unwrap_or_default();
        if let Some(give_up_after) = self.give_up_after.filter(|give_up_after| age >= *give_up_after) {
            return dead(format!("given up after {}", humantime::format_duration(give_up_after)));
        }
        let asked = match verdict {
            Verdict::Retry { after } => after.unwrap_or_default().min(ASKED_MAX),
            _ => Duration::ZERO,
        };
        Next::At(now + self.pause(history.retries, random).max(asked))
    }

    /// As the original's: always the same, or growing; and then with full jitter, which the original had not.
    fn pause(&self, retries: u32, random: f64) -> Duration {
        let factor = match self.strategy {
            Strategy::Linear => 1.0,
            Strategy::Exponential => self.multiplier.max(1.0).powf(f64::from(retries.min(10_000))),
        };
        let random = if random.is_finite() { random.clamp(0.0, 1.0) } else { 1.0 };
        let longest = (self.delay.as_secs_f64() * factor).min(self.cap.as_secs_f64()).min(DELAY_MAX.as_secs_f64());
        let drawn = match self.strategy {
            // Around the delay that was asked for: with full jitter a fixed delay would be half of it.
            Strategy::Linear => longest * (0.8 + 0.4 * random),
            Strategy::Exponential => longest * random,
        };
        Duration::try_from_secs_f64(drawn).unwrap_or(DELAY_MAX).max(DELAY_MIN.min(self.delay).max(DELAY_FLOOR))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::rules::handling::Strategy;
    use proptest::prelude::{prop_assert, proptest};
    use std::sync::LazyLock;

    static START: LazyLock<SystemTime> = LazyLock::new(|| SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000));

    fn patience() -> Patience {
        Patience {
            strategy: Strategy::Exponential,
            delay: Duration::from_secs(5),
            multiplier: 2.0,
            cap: Duration::from_secs(3_600),
            limit: None,
            give_up_after: None,
        }
    }

    fn next(patience: &Patience, verdict: Verdict, retries: u32, now: u64, random: f64) -> Next {
        let history = History { retries, first_failed_at: *START };
        patience.next(verdict, history, *START + Duration::from_secs(now), random)
    }

    fn at(seconds: u64) -> Next {
        Next::At(*START + Duration::from_secs(seconds))
    }

    const PLAIN: Verdict = Verdict::Retry { after: None };

    #[test]
    fn pauses_grow_to_the_cap_and_a_wish_is_met_within_a_day() {
        let after = |seconds| Verdict::Retry { after: Some(Duration::from_secs(seconds)) };
        for (verdict, retries, random, expected) in [
            (PLAIN, 0, 1.0, 5),
            (PLAIN, 1, 1.0, 10),
            (PLAIN, 9, 1.0, 2_560),
            (PLAIN, 10, 1.0, 3_600),
            (PLAIN, u32::MAX, 1.0, 3_600),
            (PLAIN, 3, 0.0, 1),
            (PLAIN, 3, f64::NAN, 40),
            (Verdict::Later, 2, 1.0, 20),
            (after(60), 0, 1.0, 60),
            (after(1), 0, 1.0, 5),
            (after(u64::MAX), 0, 1.0, 24 * 3_600),
        ] {
            assert_eq!(next(&patience(), verdict, retries, 0, random), at(expected), "{verdict:?} {retries} {random}");
        }
    }

    #[test]
    fn the_originals_linear_delay_stays() {
        let linear = Patience { strategy: Strategy::Linear, ..patience() };
        for retries in [0, 1, 50] {
            assert_eq!(next(&linear, PLAIN, retries, 0, 0.5), at(5));
        }
    }

    #[test]
    fn giving_up_is_what_somebody_asked_for() {
        let limited = Patience { limit: Some(3), give_up_after: Some(Duration::from_secs(100)), ..patience() };
        let is_dead = |next: Next| matches!(next, Next::Dead { .. });
        assert!(!is_dead(next(&limited, PLAIN, 2, 99, 0.5)));
        assert!(is_dead(next(&limited, PLAIN, 3, 0, 0.5)));
        assert!(is_dead(next(&limited, PLAIN, 0, 100, 0.5)));
        assert!(is_dead(next(&patience(), Verdict::GiveUp, 0, 0, 0.5)));
        assert!(!is_dead(next(&patience(), PLAIN, u32::MAX, u32::MAX.into(), 0.5)), "the default is never");
        let unlimited = limited.of(&Retry { limit: Some(0), ..Retry::default() });
        assert!(!is_dead(next(&unlimited, PLAIN, 9, 0, 0.5)), "0 is without end, as in the original");
    }

    proptest! {
        #[test]
        fn no_setting_and_no_answer_makes_a_hot_loop_or_an_overflow(
            delay in 0u64..u64::MAX / 2, multiplier: f64, cap in 0u64..u64::MAX / 2, retries: u32, random: f64, after: Option<u64>,
        ) {
            let patience = Patience {
                delay: Duration::from_secs(delay), multiplier, cap: Duration::from_secs(cap), ..patience()
            };
            let verdict = Verdict::Retry { after: after.map(Duration::from_secs) };
            let Next::At(at) = next(&patience, verdict, retries, 1_000, random) else { panic!("never dead") };
            let shortest = if delay == 0 { 1_000_010 } else { 1_001_000 };
            prop_assert!(at >= *START + Duration::from_millis(shortest));
        }
    }
}
