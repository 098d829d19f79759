//! When a hint becomes a run.
//!
//! An idle database runs at once; hints that come during or soon after a run wait until it has been quiet for a while, but
//! never longer than `longest` from the first of them. One position is kept, never a list.

use std::time::{Duration, Instant};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    RunNow,
    WaitUntil(Instant),
    Nothing,
}

#[derive(Debug)]
pub struct Debounce {
    quiet: Duration,
    longest: Duration,
    running: Option<Run>,
    /// The end of the last run that hints had asked for.
    ended: Option<Instant>,
    /// The first and the latest hint that no run has taken yet.
    hints: Option<(Instant, Instant)>,
    /// The run under way is all that is waited for.
    is_urgent: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Run {
    Hinted,
    /// Nobody told of a change: it makes the database no busier.
    Retry,
}

impl Debounce {
    pub fn new(quiet: Duration, longest: Duration) -> Self {
        Self { quiet, longest, running: None, ended: None, hints: None, is_urgent: false }
    }

    pub fn hint(&mut self, now: Instant) -> Next {
        let is_calm = self.is_calm(now);
        match self.running {
            None if is_calm => return self.begin(Run::Hinted),
            Some(Run::Retry) if is_calm => self.is_urgent = true,
            _ => {}
        }
        let first = self.hints.map_or(now, |(first, _)| first);
        self.hints = Some((first, now));
        self.next(now)
    }

    pub fn run_ended(&mut self, now: Instant) -> Next {
        if self.running.take() == Some(Run::Hinted) {
            self.ended = Some(now);
        }
        self.next(now)
    }

    /// The timer of `WaitUntil` fired, perhaps late or for an older deadline.
    pub fn timer(&mut self, now: Instant) -> Next {
        match self.next(now) {
            Next::WaitUntil(at) if at <= now => self.retry(),
            next => next,
        }
    }

    /// A run that must not wait: a held rule's time has come.
    pub fn retry(&mut self) -> Next {
        match (self.running, self.hints) {
            (Some(_), _) => Next::Nothing,
            (None, Some(_)) => self.begin(Run::Hinted),
            (None, None) => self.begin(Run::Retry),
        }
    }

    /// What a run had left behind has ended. A database that is busy in any case sees to it after its quiet.
    pub fn retry_after(&mut self, now: Instant) -> Next {
        if self.running == Some(Run::Hinted) || !self.is_calm(now) {
            return self.hint(now);
        }
        self.is_urgent = self.is_running();
        self.retry()
    }

    fn is_calm(&self, now: Instant) -> bool {
        self.hints.is_none() && self.ended.is_none_or(|ended| now.saturating_duration_since(ended) >= self.quiet)
    }

    fn begin(&mut self, run: Run) -> Next {
        self.running = Some(run);
        self.hints = None;
        self.is_urgent = false;
        Next::RunNow
    }

    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    pub fn is_idle(&self) -> bool {
        !self.is_running() && self.hints.is_none() && !self.is_urgent
    }

    /// What it waits for.
    pub fn next(&self, now: Instant) -> Next {
        match self.hints {
            _ if self.is_running() => Next::Nothing,
            _ if self.is_urgent => Next::WaitUntil(now),
            Some((first, latest)) => Next::WaitUntil((latest + self.quiet).min(first + self.longest).max(now)),
            None => Next::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const QUIET: Duration = Duration::from_millis(250);
    const LONGEST: Duration = Duration::from_secs(2);

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn an_idle_database_runs_at_once() {
        let mut debounce = Debounce::new(QUIET, LONGEST);
        assert_eq!(debounce.hint(Instant::now()), Next::RunNow);
        assert!(debounce.is_running());
    }

    #[test]
    fn a_burst_becomes_one_more_run() {
        let start = Instant::now();
        let mut debounce = Debounce::new(QUIET, LONGEST);
        debounce.hint(start);
        for n in 0..10 {
            assert_eq!(debounce.hint(start + ms(n)), Next::Nothing);
        }
        assert_eq!(debounce.run_ended(start + ms(20)), Next::WaitUntil(start + ms(9) + QUIET));
        assert_eq!(debounce.timer(start + ms(9) + QUIET), Next::RunNow);
        assert_eq!(debounce.run_ended(start + ms(300)), Next::Nothing);
    }

    #[test]
    fn a_hint_soon_after_a_run_waits_and_a_later_one_does_not() {
        let start = Instant::now();
        let mut debounce = Debounce::new(QUIET, LONGEST);
        debounce.hint(start);
        debounce.run_ended(start + ms(10));
        assert_eq!(debounce.hint(start + ms(20)), Next::WaitUntil(start + ms(20) + QUIET));
        assert_eq!(debounce.timer(start + ms(270)), Next::RunNow);
        debounce.run_ended(start + ms(280));
        assert_eq!(debounce.hint(start + ms(280) + QUIET), Next::RunNow);
    }

    #[test]
    fn a_retry_keeps_no_hint_waiting_longer_than_itself() {
        let start = Instant::now();
        let mut debounce = Debounce::new(QUIET, LONGEST);
        assert_eq!(debounce.retry(), Next::RunNow);
        assert_eq!(debounce.hint(start), Next::Nothing);
        assert_eq!(debounce.hint(start + ms(5)), Next::Nothing);
        assert_eq!(debounce.run_ended(start + ms(10)), Next::WaitUntil(start + ms(10)));
        assert_eq!(debounce.timer(start + ms(10)), Next::RunNow);
        debounce.run_ended(start + ms(20));
        // Now it is busy, whatever is tried again.
        assert_eq!(debounce.retry(), Next::RunNow);
        assert_eq!(debounce.hint(start + ms(30)), Next::Nothing);
        assert_eq!(debounce.run_ended(start + ms(40)), Next::WaitUntil(start + ms(30) + QUIET));
        assert_eq!(debounce.timer(start + ms(30) + QUIET), Next::RunNow);
        debounce.run_ended(start + ms(300));
        assert_eq!(debounce.retry(), Next::RunNow);
        debounce.run_ended(start + ms(320) + QUIET);
        assert_eq!(
            debounce.hint(start + ms(321) + QUIET),
            Next::RunNow,
            "a retry has just ended, and the last change was long ago"
        );
    }

    #[test]
    fn a_retry_takes_the_hints_that_wait() {
        let start = Instant::now();
        let mut debounce = Debounce::new(QUIET, LONGEST);
        debounce.hint(start);
        debounce.run_ended(start + ms(10));
        assert_eq!(debounce.hint(start + ms(20)), Next::WaitUntil(start + ms(20) + QUIET));
        assert_eq!(debounce.retry(), Next::RunNow);
        assert_eq!(debounce.run_ended(start + ms(30)), Next::Nothing);
        assert_eq!(debounce.hint(start + ms(40)), Next::WaitUntil(start + ms(40) + QUIET));
    }

    #[test]
    fn what_ends_during_a_run_is_looked_at_after_it() {
        let start = Instant::now();
        let mut debounce = Debounce::new(QUIET, LONGEST);
        assert_eq!(debounce.retry_after(start), Next::RunNow);
        assert_eq!(debounce.retry_after(start), Next::Nothing);
        assert_eq!(debounce.run_ended(start + ms(10)), Next::WaitUntil(start + ms(10)));
        assert!(!debounce.is_idle());
        assert_eq!(debounce.timer(start + ms(10)), Next::RunNow);
        assert_eq!(debounce.run_ended(start + ms(20)), Next::Nothing);
        assert!(debounce.is_idle());
    }

    #[test]
    fn what_ends_on_a_busy_database_waits_for_its_quiet() {
        let start = Instant::now();
        let mut debounce = Debounce::new(QUIET, LONGEST);
        debounce.hint(start);
        assert_eq!(debounce.retry_after(start), Next::Nothing);
        assert_eq!(debounce.run_ended(start + ms(10)), Next::WaitUntil(start + QUIET));
        assert_eq!(debounce.retry_after(start + ms(20)), Next::WaitUntil(start + ms(20) + QUIET));
        assert_eq!(debounce.timer(start + ms(20) + QUIET), Next::RunNow);
    }

    #[test]
    fn a_database_written_without_pause_still_runs() {
        let start = Instant::now();
        let mut debounce = Debounce::new(QUIET, LONGEST);
        debounce.hint(start);
        debounce.run_ended(start);
        let mut now = start;
        let mut next = Next::Nothing;
        while now < start + LONGEST + ms(50) {
            now += ms(50);
            next = debounce.hint(now);
        }
        assert_eq!(next, Next::WaitUntil(now), "the wait is over, whatever comes");
        assert_eq!(debounce.timer(now), Next::RunNow);
    }

    proptest! {
        /// No hint waits longer than `longest` once the database is not running, and none is forgotten.
        #[test]
        fn every_hint_is_followed_by_a_run_in_time(
            events in prop::collection::vec((0u64..600, prop::bool::weighted(0.3)), 1..60),
            run_ms in 0u64..400,
        ) {
            let mut now = Instant::now();
            let mut debounce = Debounce::new(QUIET, LONGEST);
            let mut waiting_since: Option<Instant> = None;
            let mut running_until: Option<Instant> = None;
            for (gap, is_retry) in events {
                let hint_at = now + ms(gap);
                while let Some(next) = [running_until, deadline(&debounce, now)].into_iter().flatten().min().filter(|t| *t <= hint_at) {
                    now = now.max(next);
                    if running_until.is_some_and(|until| until <= now) {
                        running_until = None;
                        debounce.run_ended(now);
                    }
                    if debounce.timer(now) == Next::RunNow {
                        let waited = waiting_since.take().map_or(Duration::ZERO, |since| now - since);
                        prop_assert!(waited <= LONGEST + ms(run_ms));
                        running_until = Some(now + ms(run_ms));
                    }
                }
                now = hint_at;
                match if is_retry { debounce.retry() } else { debounce.hint(now) } {
                    Next::RunNow => {
                        waiting_since = None;
                        running_until = Some(now + ms(run_ms));
                    }
                    _ if is_retry => {}
                    _ => { waiting_since.get_or_insert(now); }
                }
            }
            prop_assert!(waiting_since.is_none() || !debounce.is_idle());
        }
    }

    fn deadline(debounce: &Debounce, now: Instant) -> Option<Instant> {
        match debounce.next(now) {
            Next::WaitUntil(at) => Some(at),
            _ => None,
        }
    }
}
