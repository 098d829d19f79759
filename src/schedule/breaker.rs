//! Whether a host is worth a request: one breaker for each lane (pure; time and random numbers are passed in).
//!
//! ```text
//! Closed ──so many different jobs in a row failed, or the host asked for a long pause──▶ Open, nothing is sent
//!    ▲                                                                                    │ the cool-down is over
//!    └───────────────the probe was answered─── HalfOpen, one job is sent ◀────────────────┘
//!                                                 └──the probe failed──▶ Open, for longer
//! ```
//!
//! A host that is down must cost its callers nothing but time, so what fails by it is *unsent*: the caller keeps its place and
//! comes again. A delivery that fails by itself must not stop its host, nor hide behind it, so:
//!
//! - Only failures of *different* jobs are counted, told by their order key: one that is tried again and again counts once. An
//!   answer that shows that the host is alive starts the count anew.
//! - Whose failure alone opened it (as a probe, or by a long `Retry-After`) is to blame. When the same fails again as the next
//!   probe, that is its own trouble: it has *failed*, it does not open the breaker again, and the next job may be the probe. So
//!   a host that serves all but a few documents gets past them, one probe each.
//!
//! What started before it opened says nothing of now: its success does not close it, its failure does not prolong it.

use super::Backoff;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::time::Instant;

/// More stubborn ones than this may take turns as probes.
const BLAMED_MAX: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BreakerSettings {
    /// So many different jobs must fail in a row; 0: only the host itself may ask for a pause.
    pub threshold: u32,
    /// Of the pauses before a probe.
    pub cool_down: Backoff,
    /// The longest pause that a host may ask for.
    pub asked_max: Duration,
}

/// What the end of an attempt says of its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// It answered, and minds this request only, if any.
    Alive,
    /// Nothing: the request was never sent, or its worker crashed.
    Silent,
    /// Unreachable, too slow, or in trouble. `pause`: it asked for a short one.
    Failing { pause: Option<Duration> },
    /// It asked for a pause that is too long to wait for here.
    Away { pause: Duration },
}

/// What follows for the job whose attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ruling {
    /// Nothing: it is decided by its own failure.
    Pass,
    /// The host is down, and this is no fault of the job's.
    Down { after: Duration },
    /// The job is at fault: no further quick try.
    Own,
}

/// As others see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    Closed,
    Open { until: Instant },
    HalfOpen { probing: bool },
}

#[derive(Debug, Clone)]
pub struct Breaker {
    settings: BreakerSettings,
    state: State,
    /// In a row, each try counted.
    failures: u64,
    last_failure: Option<Instant>,
    /// Since when it has not been closed.
    opened: Option<Instant>,
    /// Cool-downs since then.
    openings: u32,
    /// The last ones, the oldest first.
    blamed: VecDeque<u64>,
}

#[derive(Debug, Clone)]
enum State {
    /// The different jobs that failed in a row.
    Closed {
        failed: Vec<u64>,
    },
    Open {
        until: Instant,
    },
    HalfOpen {
        probing: bool,
    },
}

impl Breaker {
    pub fn new(settings: BreakerSettings) -> Self {
        let state = State::Closed { failed: Vec::new() };
        Self { settings, state, failures: 0, last_failure: None, opened: None, openings: 0, blamed: VecDeque::new() }
    }

    pub fn view(&self) -> View {
        match self.state {
            State::Closed { .. } => View::Closed,
            State::Open { until } => View::Open { until },
            State::HalfOpen { probing } => View::HalfOpen { probing },
        }
    }

    pub fn failures(&self) -> u64 {
        self.failures
    }

    /// Since when it has not been closed.
    pub fn opened(&self) -> Option<Instant> {
        self.opened
    }

    /// To be called before it is asked anything at a new time.
    pub fn advance(&mut self, now: Instant) {
        if matches!(self.state, State::Open { until } if until <= now) {
            self.state = State::HalfOpen { probing: false };
        }
    }

    pub fn may_start(&self) -> bool {
        matches!(self.state, State::Closed { .. } | State::HalfOpen { probing: false })
    }

    /// A job starts: while it is half-open, as the probe.
    pub fn start(&mut self) {
        if let State::HalfOpen { probing } = &mut self.state {
            *probing = true;
        }
    }

    /// The probe is over, whatever came of it.
    pub fn probe_over(&mut self) {
        if let State::HalfOpen { probing } = &mut self.state {
            *probing = false;
        }
    }

    /// `subject` tells jobs apart.
    pub fn heard(&mut self, subject: u64, is_probe: bool, sign: Sign, now: Instant, random: f64) -> Ruling {
        self.advance(now);
        match sign {
            Sign::Silent => Ruling::Pass,
            Sign::Alive => self.alive(is_probe),
            Sign::Failing { .. } | Sign::Away { .. } => {
                self.failures = self.failures.saturating_add(1);
                self.last_failure = Some(now);
                self.failed(subject, is_probe, sign, now, random)
            }
        }
    }

    /// When it may be forgotten where nobody has a job for it; None: now. A host that is seldom asked must be remembered between,
    /// else each of its failures would be the first.
    pub fn remembered_until(&self) -> Option<Instant> {
        let keep = self.settings.cool_down.cap();
        let end = match self.state {
            State::Open { until } => Some(until),
            _ => self.last_failure,
        };
        end.map(|end| end + keep)
    }

    fn alive(&mut self, is_probe: bool) -> Ruling {
        match &mut self.state {
            State::Closed { failed } => {
                failed.clear();
                (self.failures, self.last_failure) = (0, None);
            }
            State::HalfOpen { .. } if is_probe => {
                // Who is to blame is kept: it would open it again as soon as it is tried again.
                let blamed = std::mem::take(&mut self.blamed);
                *self = Self { blamed, ..Self::new(self.settings) };
            }
            State::Open { .. } | State::HalfOpen { .. } => {}
        }
        Ruling::Pass
    }

    fn failed(&mut self, subject: u64, is_probe: bool, sign: Sign, now: Instant, random: f64) -> Ruling {
        let asked = match sign {
            Sign::Away { pause } => Some(pause.min(self.settings.asked_max)),
            _ => None,
        };
        match &mut self.state {
            State::Closed { failed } => {
                if asked.is_some() {
                    return self.open_by(subject, asked, now, random);
                }
                let threshold = self.settings.threshold as usize;
                if failed.len() < threshold && !failed.contains(&subject) {
                    failed.push(subject);
                }
                match threshold > 0 && failed.len() >= threshold {
                    true => self.open(None, now, random),
                    false => Ruling::Pass,
                }
            }
            State::Open { until } => {
                *until = asked.map_or(*until, |asked| (*until).max(now + asked));
                Ruling::Down { after: *until - now }
            }
            State::HalfOpen { .. } if is_probe => self.open_by(subject, asked, now, random),
            State::HalfOpen { .. } => Ruling::Down { after: self.settings.cool_down.ceiling(0) },
        }
    }

    /// By this one's failure alone; not again by the same, while it is remembered.
    fn open_by(&mut self, subject: u64, asked: Option<Duration>, now: Instant, random: f64) -> Ruling {
        if self.blamed.contains(&subject) {
            return Ruling::Own;
        }
        if self.blamed.len() >= BLAMED_MAX {
            self.blamed.pop_front();
        }
        self.blamed.push_back(subject);
        self.open(asked, now, random)
    }

    fn open(&mut self, asked: Option<Duration>, now: Instant, random: f64) -> Ruling {
        let pause = cool_down(&self.settings.cool_down, self.openings, random);
        let after = asked.map_or(pause, |asked| asked.max(pause));
        self.openings = self.openings.saturating_add(1);
        self.opened.get_or_insert(now);
        self.state = State::Open { until: now + after };
        Ruling::Down { after }
    }
}

/// Between half of it and all of it: long enough for the host, and not the same for all who lost it together.
fn cool_down(backoff: &Backoff, openings: u32, random: f64) -> Duration {
    let half = backoff.ceiling(openings) / 2;
    half + half.mul_f64(if random.is_finite() { random.clamp(0.0, 1.0) } else { 1.0 })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);
    const FAILING: Sign = Sign::Failing { pause: None };

    fn settings(threshold: u32) -> BreakerSettings {
        let cool_down = Backoff::new(SECOND, Duration::from_secs(60));
        BreakerSettings { threshold, cool_down, asked_max: Duration::from_secs(3_600) }
    }

    struct Bench {
        breaker: Breaker,
        now: Instant,
    }

    impl Bench {
        fn new(threshold: u32) -> Self {
            Self { breaker: Breaker::new(settings(threshold)), now: Instant::now() }
        }

        /// Opened by the failures of jobs 1 to 3.
        fn opened() -> Self {
            let mut bench = Self::new(3);
            for subject in 1..=3 {
                bench.ended(subject, FAILING);
            }
            bench
        }

        fn ended(&mut self, subject: u64, sign: Sign) -> Ruling {
            self.breaker.heard(subject, false, sign, self.now, 1.0)
        }

        /// The probe, from start to end.
        fn probe(&mut self, subject: u64, sign: Sign) -> Ruling {
            self.breaker.advance(self.now);
            assert_eq!(self.breaker.view(), View::HalfOpen { probing: false });
            self.breaker.start();
            assert!(!self.breaker.may_start(), "one at a time");
            let ruling = self.breaker.heard(subject, true, sign, self.now, 1.0);
            self.breaker.probe_over();
            ruling
        }

        fn wait(&mut self) {
            let View::Open { until } = self.breaker.view() else { panic!("it is open: {:?}", self.breaker.view()) };
            self.breaker.advance(until - Duration::from_nanos(1));
            assert!(!self.breaker.may_start(), "not before its time");
            self.now = until;
            self.breaker.advance(self.now);
        }
    }

    #[test]
    fn different_jobs_that_fail_in_a_row_open_it() {
        let alive = Sign::Alive;
        for (story, opens) in [
            (vec![(1, FAILING), (2, FAILING), (3, FAILING)], true),
            (vec![(1, FAILING), (2, FAILING)], false),
            (vec![(1, FAILING), (1, FAILING), (1, FAILING), (1, FAILING), (2, FAILING)], false),
            (vec![(1, FAILING), (2, FAILING), (9, alive), (3, FAILING), (4, FAILING)], false),
            (vec![(1, FAILING), (2, FAILING), (9, Sign::Silent), (1, FAILING), (3, FAILING)], true),
        ] {
            let mut bench = Bench::new(3);
            for (subject, sign) in &story {
                bench.ended(*subject, *sign);
            }
            assert_eq!(matches!(bench.breaker.view(), View::Open { .. }), opens, "{story:?}");
        }
    }

    #[test]
    fn a_poisoned_job_among_good_ones_never_opens_it() {
        let mut bench = Bench::new(3);
        for round in 0..100 {
            assert_eq!(bench.ended(7, FAILING), Ruling::Pass, "round {round}");
            bench.ended(100 + round, Sign::Alive);
        }
        for round in 0..100 {
            assert_eq!(bench.ended(7, FAILING), Ruling::Pass, "alone, in round {round}");
        }
        assert_eq!(bench.breaker.view(), View::Closed);
    }

    #[test]
    fn the_one_that_opens_it_and_those_still_under_way_are_not_to_blame() {
        let mut bench = Bench::new(2);
        assert_eq!(bench.ended(1, FAILING), Ruling::Pass);
        assert_eq!(bench.ended(2, FAILING), Ruling::Down { after: SECOND });
        let opened = bench.breaker.view();
        bench.now += SECOND / 2;
        assert_eq!(bench.ended(3, FAILING), Ruling::Down { after: SECOND / 2 });
        assert_eq!(bench.ended(4, Sign::Alive), Ruling::Pass);
        assert_eq!(bench.breaker.view(), opened, "they started before");
        assert_eq!(bench.breaker.failures(), 3);
    }

    #[test]
    fn a_probe_that_is_answered_closes_it() {
        let mut bench = Bench::opened();
        bench.wait();
        assert_eq!(bench.probe(4, Sign::Alive), Ruling::Pass);
        assert_eq!((bench.breaker.view(), bench.breaker.failures(), bench.breaker.opened()), (View::Closed, 0, None));
        for subject in 1..=2 {
            assert_eq!(bench.ended(subject, FAILING), Ruling::Pass, "the count starts anew");
        }
        assert_eq!(bench.ended(3, FAILING), Ruling::Down { after: SECOND }, "and so does the pause");
    }

    #[test]
    fn probes_that_fail_open_it_for_longer_up_to_the_cap() {
        let mut bench = Bench::opened();
        for (subject, expected_s) in (10..).zip([2, 4, 8, 16, 32, 60, 60]) {
            bench.wait();
            assert_eq!(bench.probe(subject, FAILING), Ruling::Down { after: Duration::from_secs(expected_s) });
        }
    }

    #[test]
    fn jitter_takes_up_to_half_of_a_pause() {
        let backoff = settings(1).cool_down;
        for (openings, random, expected_ms) in [
            (0, 0.0, 500),
            (0, 0.5, 750),
            (0, 1.0, 1_000),
            (3, 0.0, 4_000),
            (99, 0.0, 30_000),
            (0, f64::NAN, 1_000),
            (0, -1.0, 500),
        ] {
            assert_eq!(cool_down(&backoff, openings, random), Duration::from_millis(expected_ms), "{openings} {random}");
        }
    }

    #[test]
    fn a_probe_that_says_nothing_leaves_the_turn_to_the_next() {
        let mut bench = Bench::opened();
        bench.wait();
        assert_eq!(bench.probe(4, Sign::Silent), Ruling::Pass);
        assert_eq!(bench.breaker.view(), View::HalfOpen { probing: false });
        bench.probe(5, Sign::Alive);
        assert_eq!(bench.breaker.view(), View::Closed);
    }

    #[test]
    fn a_job_that_fails_as_two_probes_in_a_row_has_failed_by_itself() {
        let mut bench = Bench::opened();
        bench.wait();
        assert!(matches!(bench.probe(7, FAILING), Ruling::Down { .. }));
        bench.wait();
        assert_eq!(bench.probe(7, FAILING), Ruling::Own);
        assert_eq!(bench.breaker.view(), View::HalfOpen { probing: false }, "the next one may try at once");
        assert!(matches!(bench.probe(8, FAILING), Ruling::Down { .. }), "which has its own two tries");
        bench.wait();
        bench.probe(9, Sign::Alive);
        assert_eq!(bench.breaker.view(), View::Closed);
    }

    #[test]
    fn a_host_that_serves_all_but_a_few_gets_past_them() {
        let poisoned = |subject: u64| subject < 20;
        let (mut bench, mut waiting) = (Bench::new(10), (0..100).collect::<std::collections::VecDeque<u64>>());
        let (mut own, mut delivered, mut tries) = (Vec::new(), 0, 0);
        while let Some(subject) = waiting.front().copied() {
            tries += 1;
            assert!(tries < 1_000, "stuck");
            let sign = if poisoned(subject) { FAILING } else { Sign::Alive };
            if let View::Open { until } = bench.breaker.view() {
                bench.now = until;
            }
            bench.breaker.advance(bench.now);
            let is_probe = bench.breaker.view() != View::Closed;
            bench.breaker.start();
            let ruling = bench.breaker.heard(subject, is_probe, sign, bench.now, 1.0);
            bench.breaker.probe_over();
            match (ruling, sign) {
                (Ruling::Down { .. }, _) => continue,
                (_, Sign::Alive) => delivered += 1,
                _ => own.push(subject),
            }
            waiting.pop_front();
        }
        assert_eq!((delivered, own), (80, (0..20).collect::<Vec<_>>()));
    }

    #[test]
    fn a_long_pause_is_granted_up_to_its_bound() {
        for (asked_s, granted_s) in [(30, 30), (3_600, 3_600), (86_400, 3_600)] {
            let mut bench = Bench::new(3);
            let pause = Duration::from_secs(asked_s);
            assert_eq!(bench.ended(1, Sign::Away { pause }), Ruling::Down { after: Duration::from_secs(granted_s) });
            bench.wait();
            bench.probe(1, Sign::Alive);
            assert_eq!(bench.breaker.view(), View::Closed);
        }
    }

    #[test]
    fn a_pause_that_was_asked_for_while_open_prolongs_it_and_never_shortens_it() {
        let mut bench = Bench::opened();
        let minute = Duration::from_secs(60);
        assert_eq!(bench.ended(4, Sign::Away { pause: minute }), Ruling::Down { after: minute });
        assert_eq!(bench.ended(5, Sign::Away { pause: SECOND }), Ruling::Down { after: minute });
        assert_eq!(bench.breaker.view(), View::Open { until: bench.now + minute });
    }

    #[test]
    fn one_that_is_asked_to_wait_again_and_again_stops_only_itself() {
        let mut bench = Bench::new(3);
        let away = Sign::Away { pause: Duration::from_secs(30) };
        assert!(matches!(bench.ended(1, away), Ruling::Down { .. }));
        bench.wait();
        assert_eq!(bench.probe(1, away), Ruling::Own);
        bench.probe(2, Sign::Alive);
        assert_eq!(bench.ended(1, away), Ruling::Own);
        assert_eq!(bench.breaker.view(), View::Closed);
        assert!(matches!(bench.ended(3, away), Ruling::Down { .. }), "the host asks somebody else");
    }

    #[test]
    fn a_threshold_of_zero_never_opens_by_itself() {
        let mut bench = Bench::new(0);
        for subject in 0..1_000 {
            assert_eq!(bench.ended(subject, FAILING), Ruling::Pass);
        }
        assert!(matches!(bench.ended(1, Sign::Away { pause: SECOND }), Ruling::Down { .. }));
    }

    #[test]
    fn it_is_remembered_for_a_while_and_then_forgotten() {
        let cap = Duration::from_secs(60);
        let mut bench = Bench::new(2);
        assert_eq!(bench.breaker.remembered_until(), None);
        bench.ended(1, FAILING);
        assert_eq!(bench.breaker.remembered_until(), Some(bench.now + cap), "one failure, of a host that is seldom asked");
        bench.ended(2, FAILING);
        assert_eq!(bench.breaker.remembered_until(), Some(bench.now + SECOND + cap));
        bench.wait();
        bench.probe(3, Sign::Alive);
        assert_eq!(bench.breaker.remembered_until(), None);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Start,
        End { which: prop::sample::Index, sign: Sign },
        Advance { ms: u64 },
    }

    fn step() -> impl Strategy<Value = Step> {
        let sign = prop_oneof![
            2 => Just(Sign::Alive),
            1 => Just(Sign::Silent),
            5 => Just(FAILING),
            1 => (0u64..10_000_000).prop_map(|ms| Sign::Away { pause: Duration::from_millis(ms) }),
        ];
        prop_oneof![
            3 => Just(Step::Start),
            3 => (any::<prop::sample::Index>(), sign).prop_map(|(which, sign)| Step::End { which, sign }),
            1 => (0u64..20_000).prop_map(|ms| Step::Advance { ms }),
        ]
    }

    proptest! {
        #[test]
        fn it_lets_one_probe_go_at_a_time_and_opens_within_bounds(
            threshold in 0u32..5, random in 0.0f64..1.0, steps in prop::collection::vec(step(), 1..200),
        ) {
            let mut bench = Bench::new(threshold);
            let mut under_way: Vec<(u64, bool)> = Vec::new();
            for (number, step) in steps.into_iter().enumerate() {
                bench.breaker.advance(bench.now);
                let before = bench.breaker.view();
                match step {
                    Step::Advance { ms } => bench.now += Duration::from_millis(ms),
                    Step::Start if bench.breaker.may_start() => {
                        prop_assert!(!matches!(before, View::Open { .. }), "nothing starts while it is open");
                        let is_probe = before != View::Closed;
                        bench.breaker.start();
                        prop_assert!(!is_probe || under_way.iter().all(|(_, probe)| !probe), "one probe at a time");
                        under_way.push((number as u64 % 7, is_probe));
                    }
                    Step::Start => {}
                    Step::End { which, sign } if !under_way.is_empty() => {
                        let (subject, is_probe) = under_way.swap_remove(which.index(under_way.len()));
                        let ruling = bench.breaker.heard(subject, is_probe, sign, bench.now, random);
                        if is_probe {
                            bench.breaker.probe_over();
                        }
                        let after = bench.breaker.view();
                        if let View::Open { until } = after {
                            prop_assert!(until > bench.now && until - bench.now <= Duration::from_secs(3_600));
                        }
                        match (before, after) {
                            (View::Open { .. } | View::HalfOpen { .. }, View::Closed) => {
                                prop_assert!(is_probe && sign == Sign::Alive, "only an answered probe closes it");
                            }
                            (View::Closed, View::Open { .. }) => {
                                prop_assert!(matches!(ruling, Ruling::Down { .. }), "{:?}", ruling);
                                prop_assert!(threshold > 0 || matches!(sign, Sign::Away { .. }), "{:?}", sign);
                            }
                            _ => {}
                        }
                        prop_assert!(ruling == Ruling::Pass || !matches!(sign, Sign::Alive | Sign::Silent));
                    }
                    Step::End { .. } => {}
                }
            }
            // From any state, waiting as told and answering every request closes it.
            if let View::Open { until } = bench.breaker.view() {
                bench.now = until;
            }
            for (subject, is_probe) in under_way {
                bench.breaker.heard(subject, is_probe, Sign::Alive, bench.now, random);
                if is_probe {
                    bench.breaker.probe_over();
                }
            }
            bench.breaker.advance(bench.now);
            prop_assert!(bench.breaker.may_start());
            let is_probe = bench.breaker.view() != View::Closed;
            bench.breaker.start();
            bench.breaker.heard(0, is_probe, Sign::Alive, bench.now, random);
            prop_assert_eq!(bench.breaker.view(), View::Closed);
        }
    }
}
