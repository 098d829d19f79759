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
    running: bool,
    ended: Option<Instant>,
    /// The first and the latest hint that no run has taken yet.
    hints: Option<(Instant, Instant)>,
}

impl Debounce {
    pub fn new(quiet: Duration, longest: Duration) -> Self {
        Self { quiet, longest, running: false, ended: None, hints: None }
    }

    pub fn hint(&mut self, now: Instant) -> Next {
        let calm = self.hints.is_none() && self.ended.is_none_or(|ended| now.saturating_duration_since(ended) >= self.quiet);
        if !self.running && calm {
            return self.run();
        }
        let first = self.hints.map_or(now, |(first, _)| first);
        self.hints = Some((first, now));
        self.next(now)
    }

    pub fn run_ended(&mut self, now: Instant) -> Next {
        self.running = false;
        self.ended = Some(now);
        self.next(now)
    }

    /// The timer of `WaitUntil` fired, perhaps late or for an older deadline.
    pub fn timer(&mut self, now: Instant) -> Next {
        match self.next(now) {
            Next::WaitUntil(at) if at <= now => self.run(),
            next => next,
        }
    }

    /// A run that must not wait: a held rule's time has come.
    pub fn run(&mut self) -> Next {
        if self.running {
            return Next::Nothing;
        }
        self.running = true;
        self.hints = None;
        Next::RunNow
    }

    pub fn is_running(&self) -> bool {
        self.running
    }

    pub fn is_idle(&self) -> bool {
        !self.running && self.hints.is_none()
    }

    /// What it waits for.
    pub fn next(&self, now: Instant) -> Next {
        match self.hints {
            Some((first, latest)) if !self.running => Next::WaitUntil((latest + self.quiet).min(first + self.longest).max(now)),
            _ => Next::Nothing,
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
        fn every_hint_is_followed_by_a_run_in_time(gaps in prop::collection::vec(0u64..600, 1..60), run_ms in 0u64..400) {
            let mut now = Instant::now();
            let mut debounce = Debounce::new(QUIET, LONGEST);
            let mut waiting_since: Option<Instant> = None;
            let mut running_until: Option<Instant> = None;
            for gap in gaps {
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
                match debounce.hint(now) {
                    Next::RunNow => running_until = Some(now + ms(run_ms)),
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
