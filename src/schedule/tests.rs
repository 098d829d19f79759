//! The dispatcher with scripted receivers, under a paused clock.

use super::*;
use crate::job::Answer;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::oneshot;

#[derive(Debug)]
struct Call {
    name: &'static str,
    lane: &'static str,
    order: u64,
    coalesce: Option<u64>,
}

impl Spec for Call {
    fn lane(&self) -> &str {
        self.lane
    }
    fn order_key(&self) -> u64 {
        self.order
    }
    fn coalesce_key(&self) -> Option<u64> {
        self.coalesce
    }
}

#[derive(Debug, Clone)]
enum Act {
    Ok,
    Slow(Duration),
    Fail(Verdict),
    Answered(u16, Verdict),
    Missing,
    Panic,
}

/// Does what its script says for each name; past the end of the script all goes well.
#[derive(Default)]
struct Scripted {
    script: Mutex<HashMap<&'static str, VecDeque<Act>>>,
    attempts: Mutex<Vec<(&'static str, Instant)>>,
    running: Arc<AtomicUsize>,
    coalesced: AtomicUsize,
    level: Mutex<(usize, usize)>,
    breakers: Mutex<(usize, usize)>,
}

impl Scripted {
    fn says(self, name: &'static str, acts: impl IntoIterator<Item = Act>) -> Self {
        self.script.lock().expect("no panic under the lock").insert(name, acts.into_iter().collect());
        self
    }

    fn attempts(&self) -> Vec<&'static str> {
        self.attempts.lock().expect("no panic under the lock").iter().map(|(name, _)| *name).collect()
    }

    fn pauses(&self) -> Vec<Duration> {
        self.attempts.lock().expect("no panic under the lock").windows(2).map(|pair| pair[1].1 - pair[0].1).collect()
    }
}

struct Running(Arc<AtomicUsize>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Perform for Scripted {
    type Spec = Call;

    fn perform(&self, spec: Arc<Call>) -> BoxFuture<'static, Attempt> {
        self.attempts.lock().expect("no panic under the lock").push((spec.name, Instant::now()));
        let act = self.script.lock().expect("no panic under the lock").get_mut(spec.name).and_then(VecDeque::pop_front);
        self.running.fetch_add(1, Ordering::SeqCst);
        let running = Running(self.running.clone());
        Box::pin(async move {
            let _running = running;
            match act.unwrap_or(Act::Ok) {
                Act::Ok => Ok(Step::Done),
                Act::Slow(time) => {
                    tokio::time::sleep(time).await;
                    Ok(Step::Done)
                }
                Act::Fail(verdict) => Err(Failure::new("scripted", verdict)),
                Act::Answered(status, verdict) => Err(answered(status, verdict)),
                Act::Missing => Err(Failure::missing("no such database")),
                Act::Panic => panic!("scripted panic"),
            }
        })
    }

    fn pool(&self) -> &'static str {
        "scripted"
    }

    fn level(&self, queued: usize, in_flight: usize) {
        *self.level.lock().expect("no panic under the lock") = (queued, in_flight);
    }

    fn coalesced(&self) {
        self.coalesced.fetch_add(1, Ordering::SeqCst);
    }

    fn breakers(&self, open: usize, half_open: usize) {
        *self.breakers.lock().expect("no panic under the lock") = (open, half_open);
    }
}

fn settings() -> DispatcherSettings {
    DispatcherSettings {
        workers_max: 4,
        concurrency_per_lane: 2,
        concurrency_per_place: 100,
        per_second_per_lane: None,
        fast_retries: 3,
        backoff: Backoff::new(Duration::from_millis(100), Duration::from_secs(5)),
        breaker: None,
    }
}

struct Pool {
    dispatcher: ActorRef<DispatcherMsg<Call>>,
    perform: Arc<Scripted>,
    breakers: Breakers,
}

impl Pool {
    async fn start(perform: Scripted, settings: DispatcherSettings) -> Self {
        let perform = Arc::new(perform);
        let arguments = DispatcherArguments { perform: perform.clone(), settings };
        let actor = Dispatcher::<Scripted>::new();
        let breakers = actor.breakers.clone();
        let (dispatcher, _) = Actor::spawn(None, actor, arguments).await.expect("the dispatcher starts");
        Self { dispatcher, perform, breakers }
    }

    fn submit_call(&self, call: Call) -> oneshot::Receiver<Outcome> {
        let (waiter, receiver) = oneshot::channel();
        self.dispatcher.cast(DispatcherMsg::Submit(vec![(Arc::new(call), waiter)])).expect("the dispatcher lives");
        receiver
    }

    fn submit(&self, name: &'static str, lane: &'static str, order: u64) -> oneshot::Receiver<Outcome> {
        self.submit_call(Call { name, lane, order, coalesce: None })
    }

    async fn status(&self) -> Status {
        ractor::call_t!(self.dispatcher, DispatcherMsg::Status, 1_000).expect("the dispatcher answers")
    }
}

fn answered(status: u16, verdict: Verdict) -> Failure {
    Failure { answer: Some(Answer { status, excerpt: String::new() }), ..Failure::new("scripted", verdict) }
}

/// Opens after three; probes after 1 s.
fn with_breaker() -> DispatcherSettings {
    let cool_down = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
    let breaker = Some(BreakerSettings { threshold: 3, cool_down, asked_max: Duration::from_secs(3_600) });
    DispatcherSettings { breaker, ..settings() }
}

fn retry() -> Act {
    Act::Fail(Verdict::Retry { after: None })
}

fn retry_after(seconds: u64) -> Act {
    Act::Fail(Verdict::Retry { after: Some(Duration::from_secs(seconds)) })
}

#[tokio::test(start_paused = true)]
async fn a_job_that_fails_twice_is_done_at_the_third_try() {
    let pool = Pool::start(Scripted::default().says("a", [retry(), retry()]), settings()).await;
    assert_eq!(pool.submit("a", "host", 1).await, Ok(Outcome::Done));
    assert_eq!(pool.perform.attempts(), ["a", "a", "a"]);
    assert!(pool.perform.pauses().iter().all(|pause| *pause >= Duration::from_millis(10)));
}

#[tokio::test(start_paused = true)]
async fn past_the_fast_retries_the_waiter_is_told() {
    let pool = Pool::start(Scripted::default().says("a", vec![retry(); 9]), settings()).await;
    assert!(matches!(pool.submit("a", "host", 1).await, Ok(Outcome::Failed(failed)) if failed.after().is_none()));
    assert_eq!(pool.perform.attempts().len(), 4, "one try and three retries");
}

#[tokio::test(start_paused = true)]
async fn a_short_retry_after_is_waited_for() {
    let pool = Pool::start(Scripted::default().says("a", [retry_after(5)]), settings()).await;
    assert_eq!(pool.submit("a", "host", 1).await, Ok(Outcome::Done));
    assert!(pool.perform.pauses()[0] >= Duration::from_secs(5));
}

#[tokio::test(start_paused = true)]
async fn a_long_retry_after_ends_the_fast_retries() {
    let pool = Pool::start(Scripted::default().says("a", [retry_after(6)]), settings()).await;
    let Ok(Outcome::Failed(failed)) = pool.submit("a", "host", 1).await else { panic!("it is told") };
    assert_eq!(failed.after(), Some(Duration::from_secs(6)));
    assert_eq!(pool.perform.attempts().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_helped_is_tried_once() {
    let perform = Scripted::default().says("a", [Act::Fail(Verdict::GiveUp)]).says("b", [Act::Missing]);
    let pool = Pool::start(perform, settings()).await;
    assert_eq!(pool.submit("a", "host", 1).await, Ok(failed("scripted", Verdict::GiveUp, 1)));
    assert_eq!(pool.submit("b", "host", 2).await, Ok(Outcome::Missing { error: String::from("no such database") }));
    assert_eq!(pool.perform.attempts(), ["a", "b"]);
}

#[tokio::test(start_paused = true)]
async fn a_crash_of_its_worker_loses_no_job() {
    let pool = Pool::start(Scripted::default().says("a", [Act::Panic, Act::Panic]), settings()).await;
    let other = pool.submit("b", "host", 2);
    assert_eq!(pool.submit("a", "host", 1).await, Ok(Outcome::Done));
    assert_eq!(other.await, Ok(Outcome::Done));
    assert_eq!(pool.perform.attempts().iter().filter(|name| **name == "a").count(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_crashes_three_workers_has_failed() {
    let pool = Pool::start(Scripted::default().says("a", vec![Act::Panic; 9]), settings()).await;
    let Ok(Outcome::Failed(Failed { error, .. })) = pool.submit("a", "host", 1).await else { panic!("it is told") };
    assert!(error.contains("3 times") && error.contains("scripted panic"), "{error}");
    assert_eq!(pool.perform.attempts().len(), 3);
    assert_eq!(pool.submit("b", "host", 1).await, Ok(Outcome::Done), "the pool goes on");
}

#[tokio::test(start_paused = true)]
async fn a_slow_host_does_not_hold_up_a_fast_one() {
    let hour = Duration::from_secs(3_600);
    let perform = Scripted::default().says("slow", vec![Act::Slow(hour); 10]);
    let pool = Pool::start(perform, settings()).await;
    let slow: Vec<_> = (0..10).map(|order| pool.submit("slow", "slow.example", order)).collect();
    let started = Instant::now();
    for order in 100..150 {
        assert_eq!(pool.submit("fast", "fast.example", order).await, Ok(Outcome::Done));
    }
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_eq!(pool.status().await.in_flight, 2, "the slow lane has its two places");
    for outcome in slow {
        assert_eq!(outcome.await, Ok(Outcome::Done));
    }
}

#[tokio::test(start_paused = true)]
async fn workers_are_reused_and_bounded() {
    let perform = Scripted::default().says("a", vec![Act::Slow(Duration::from_secs(1)); 100]);
    let pool = Pool::start(perform, DispatcherSettings { concurrency_per_lane: 100, ..settings() }).await;
    let outcomes: Vec<_> = (0..100).map(|order| pool.submit("a", "host", order)).collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let status = pool.status().await;
    assert_eq!((status.queued, status.in_flight, status.lanes, status.workers), (96, 4, 1, 4));
    assert_eq!(*pool.perform.level.lock().expect("no panic under the lock"), (96, 4));
    for outcome in outcomes {
        assert_eq!(outcome.await, Ok(Outcome::Done));
    }
    assert_eq!(pool.status().await.workers, 4);
    assert_eq!(*pool.perform.level.lock().expect("no panic under the lock"), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn the_rate_of_a_lane_follows_the_clock() {
    let pool = Pool::start(Scripted::default(), DispatcherSettings { per_second_per_lane: NonZeroU32::new(2), ..settings() });
    let pool = pool.await;
    let started = Instant::now();
    let outcomes: Vec<_> = (0..6).map(|order| pool.submit("a", "host", order)).collect();
    for outcome in outcomes {
        assert_eq!(outcome.await, Ok(Outcome::Done));
    }
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(1_990) && took <= Duration::from_millis(2_050), "two at once, four more: {took:?}");
}

#[tokio::test(start_paused = true)]
async fn folded_jobs_all_hear_of_the_one_that_was_sent() {
    let perform = Scripted::default().says("first", [Act::Slow(Duration::from_secs(1))]);
    let pool = Pool::start(perform, settings()).await;
    let call = |name, order| Call { name, lane: "host", order, coalesce: Some(1) };
    let first = pool.submit_call(call("first", 1));
    let more: Vec<_> = (2..10).map(|order| pool.submit_call(call("more", order))).collect();
    assert_eq!(first.await, Ok(Outcome::Done));
    for outcome in more {
        assert_eq!(outcome.await, Ok(Outcome::Done));
    }
    assert_eq!(pool.perform.attempts(), ["first", "more"]);
    assert_eq!(pool.perform.coalesced.load(Ordering::SeqCst), 7);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_dispatcher_ends_its_attempts_and_closes_its_waiters() {
    let hour = Duration::from_secs(3_600);
    let pool = Pool::start(Scripted::default().says("a", vec![Act::Slow(hour); 2]), settings()).await;
    let waiting: Vec<_> = (0..5).map(|order| pool.submit("a", "host", order)).collect();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(pool.perform.running.load(Ordering::SeqCst), 2);
    pool.dispatcher.stop_and_wait(None, Some(Duration::from_secs(5))).await.expect("it stops");
    for outcome in waiting {
        assert!(outcome.await.is_err(), "closed without an outcome");
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(pool.perform.running.load(Ordering::SeqCst), 0, "no attempt outlives its worker");
}

#[tokio::test(start_paused = true)]
async fn a_killed_worker_gives_its_job_back_and_its_attempt_ends() {
    let hour = Duration::from_secs(3_600);
    let pool = Pool::start(Scripted::default().says("a", [Act::Slow(hour)]), settings()).await;
    let outcome = pool.submit("a", "host", 1);
    tokio::time::sleep(Duration::from_secs(1)).await;
    for worker in pool.dispatcher.get_children() {
        worker.kill();
    }
    assert_eq!(outcome.await, Ok(Outcome::Done));
    assert_eq!(pool.perform.attempts(), ["a", "a"]);
    assert_eq!(pool.perform.running.load(Ordering::SeqCst), 0);
}

#[tokio::test(start_paused = true)]
async fn workers_that_end_while_idle_are_replaced() {
    let pool = Pool::start(Scripted::default().says("a", vec![Act::Slow(Duration::from_secs(1)); 4]), settings()).await;
    let outcomes: Vec<_> = [("x", 1), ("x", 2), ("y", 3), ("y", 4)].map(|(lane, order)| pool.submit("a", lane, order)).into();
    for outcome in outcomes {
        assert_eq!(outcome.await, Ok(Outcome::Done));
    }
    for worker in pool.dispatcher.get_children() {
        worker.kill();
    }
    assert_eq!(pool.submit("a", "x", 1).await, Ok(Outcome::Done));
    assert_eq!(pool.status().await.workers, 1);
}

fn failed(error: &str, verdict: Verdict, attempts: u32) -> Outcome {
    Outcome::Failed(Failed { error: error.to_string(), verdict, attempts, answer: None })
}

#[test]
fn a_failure_is_decided_by_its_verdict_and_its_number() {
    let settings = settings();
    let after = |seconds| Verdict::Retry { after: Some(Duration::from_secs(seconds)) };
    let plain = Verdict::Retry { after: None };
    let ended = |verdict, attempts| Decision::End(failed("e", verdict, attempts));
    let again = |ms| Decision::Again { after: Duration::from_millis(ms) };
    for (verdict, retries, expected) in [
        (plain, 0, again(100)),
        (plain, 2, again(400)),
        (plain, 3, ended(plain, 4)),
        (after(0), 1, again(200)),
        (after(5), 0, again(5_000)),
        (after(6), 0, ended(after(6), 1)),
        (after(1), 3, ended(after(1), 4)),
        (after(u64::MAX), 0, ended(after(DELAY_MAX.as_secs()), 1)),
        (Verdict::GiveUp, 0, ended(Verdict::GiveUp, 1)),
        (Verdict::Later, 1, ended(Verdict::Later, 2)),
        (Verdict::Gone, 0, ended(Verdict::Gone, 1)),
    ] {
        let decision = decide(Failure::new("e", verdict), retries, Ruling::Pass, &settings, 1.0);
        assert_eq!(decision, expected, "{verdict:?} after {retries} retries");
    }
}

fn is_unsent(outcome: &Result<Outcome, oneshot::error::RecvError>) -> bool {
    matches!(outcome, Ok(Outcome::Unsent { .. }))
}

#[tokio::test(start_paused = true)]
async fn a_host_that_is_down_costs_its_jobs_nothing_but_time() {
    let pool = Pool::start(Scripted::default().says("down", vec![retry(); 1_000]), with_breaker()).await;
    let down: Vec<_> = (0..50).map(|order| pool.submit("down", "down.example", order)).collect();
    let up: Vec<_> = (100..150).map(|order| pool.submit("up", "up.example", order)).collect();
    for outcome in down {
        let outcome = outcome.await;
        assert!(
            matches!(&outcome, Ok(Outcome::Unsent { error, after })
            if error.contains("scripted") && *after <= Duration::from_secs(1)),
            "{outcome:?}"
        );
    }
    for outcome in up {
        assert_eq!(outcome.await, Ok(Outcome::Done));
    }
    assert!(pool.perform.attempts().iter().filter(|name| **name == "down").count() <= 4, "three, and one under way");
    let until = pool.breakers.open_until("down.example").expect("it is open");
    assert_eq!(pool.breakers.open_until("up.example"), None);
    let status = pool.status().await;
    assert_eq!((status.breakers_open, status.breakers_half_open), (1, 0));
    assert_eq!((&*status.breakers[0].lane, status.breakers[0].view), ("down.example", View::Open { until }));
    assert_eq!(*pool.perform.breakers.lock().expect("no panic under the lock"), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn one_probe_tells_that_a_host_is_back() {
    let perform = Scripted::default().says("down", vec![retry(); 4]).says("probe", [Act::Slow(Duration::from_secs(2))]);
    let pool = Pool::start(perform, with_breaker()).await;
    let first: Vec<_> = (0..4).map(|order| pool.submit("down", "host", order)).collect();
    for outcome in first {
        assert!(is_unsent(&outcome.await));
    }
    tokio::time::sleep_until(pool.breakers.open_until("host").expect("it is open")).await;
    let probe = pool.submit("probe", "host", 10);
    let others: Vec<_> = (20..40).map(|order| pool.submit("other", "host", order)).collect();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let status = pool.status().await;
    assert_eq!((status.in_flight, status.queued, status.breakers_half_open), (1, 20, 1));
    assert_eq!(pool.breakers.open_until("host"), Some(Instant::now() + Duration::from_secs(1)), "look again in a second");
    assert_eq!(probe.await, Ok(Outcome::Done));
    for outcome in others {
        assert_eq!(outcome.await, Ok(Outcome::Done));
    }
    assert_eq!((pool.status().await.breakers, pool.breakers.open_until("host")), (Vec::new(), None));
    assert_eq!(*pool.perform.breakers.lock().expect("no panic under the lock"), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_poisoned_delivery_fails_alone() {
    let error = Act::Answered(503, Verdict::Retry { after: None });
    let pool = Pool::start(Scripted::default().says("poison", vec![error; 100]), with_breaker()).await;
    for round in 0..5 {
        let poisoned = pool.submit("poison", "host", 1);
        let others: Vec<_> = (10..20).map(|order| pool.submit("good", "host", order)).collect();
        assert!(matches!(poisoned.await, Ok(Outcome::Failed(failed)) if failed.attempts == 4), "round {round}");
        for outcome in others {
            assert_eq!(outcome.await, Ok(Outcome::Done));
        }
    }
    let alone = pool.submit("poison", "host", 1);
    assert!(matches!(alone.await, Ok(Outcome::Failed(_))));
}

#[tokio::test(start_paused = true)]
async fn a_long_retry_after_stops_all_for_that_host_and_a_short_one_makes_them_wait() {
    let later = |seconds| Act::Answered(429, Verdict::Retry { after: Some(Duration::from_secs(seconds)) });
    let pool = Pool::start(Scripted::default().says("a", [later(5)]).says("b", [later(600)]), with_breaker()).await;
    let started = Instant::now();
    let first = pool.submit("a", "host", 1);
    tokio::time::sleep(Duration::from_millis(1)).await;
    let second = pool.submit("c", "host", 2);
    assert_eq!((second.await, first.await), (Ok(Outcome::Done), Ok(Outcome::Done)));
    assert!(pool.perform.pauses().iter().all(|pause| *pause < Duration::from_secs(6)));
    assert!(started.elapsed() >= Duration::from_secs(5), "both waited");

    for (name, order) in [("b", 1), ("c", 2)] {
        let outcome = pool.submit(name, "host", order).await;
        assert!(matches!(&outcome, Ok(Outcome::Unsent { after, .. }) if *after > Duration::from_secs(590)), "{outcome:?}");
    }
    let attempts = pool.perform.attempts();
    assert_eq!((attempts.len(), attempts[0], attempts[3]), (4, "a", "b"));
}

#[tokio::test(start_paused = true)]
async fn a_dispatcher_that_ends_says_nothing_of_hosts() {
    let pool = Pool::start(Scripted::default().says("down", vec![retry(); 100]), with_breaker()).await;
    for outcome in (0..4).map(|order| pool.submit("down", "host", order)).collect::<Vec<_>>() {
        assert!(is_unsent(&outcome.await));
    }
    assert!(pool.breakers.open_until("host").is_some());
    pool.dispatcher.stop_and_wait(None, Some(Duration::from_secs(5))).await.expect("it stops");
    assert_eq!(pool.breakers.open_until("host"), None);
    assert_eq!(*pool.perform.breakers.lock().expect("no panic under the lock"), (0, 0));
}

#[test]
fn only_what_speaks_of_the_host_counts_against_it() {
    let retry = |after_s: Option<u64>| Verdict::Retry { after: after_s.map(Duration::from_secs) };
    let failing = |pause_s: Option<u64>| Sign::Failing { pause: pause_s.map(Duration::from_secs) };
    let settings = settings();
    for (failure, expected) in [
        (Failure::retry("unreachable"), failing(None)),
        (answered(503, retry(None)), failing(None)),
        (answered(500, retry(None)), Sign::Alive),
        (answered(503, retry(Some(5))), failing(Some(5))),
        (answered(429, retry(Some(0))), failing(None)),
        (answered(429, retry(Some(6))), Sign::Away { pause: Duration::from_secs(6) }),
        (answered(503, retry(Some(u64::MAX))), Sign::Away { pause: DELAY_MAX }),
        (answered(408, retry(None)), failing(None)),
        (answered(404, retry(None)), Sign::Alive),
        (answered(302, Verdict::Later), Sign::Alive),
        (answered(422, Verdict::Later), Sign::Alive),
        (answered(501, Verdict::GiveUp), Sign::Alive),
        (answered(410, Verdict::Gone), Sign::Alive),
        (Failure::give_up("cannot be built"), Sign::Silent),
        (Failure::missing("no such database"), Sign::Silent),
    ] {
        assert_eq!(sign_of(&failure, &settings), expected, "{failure:?}");
    }
}

#[test]
fn what_the_breaker_says_goes_before_what_the_failure_says() {
    let plain = Verdict::Retry { after: None };
    let after = Duration::from_secs(7);
    let decide = |ruling| decide(Failure::new("e", plain), 0, ruling, &settings(), 1.0);
    assert_eq!(decide(Ruling::Pass), Decision::Again { after: Duration::from_millis(100) });
    assert_eq!(decide(Ruling::Own), Decision::End(failed("e", plain, 1)));
    assert_eq!(decide(Ruling::Down { after }), Decision::End(Outcome::Unsent { error: String::from("e"), after }));
}

// -- any history --

const LANES: [&str; 3] = ["a", "b", "c"];
const KEYS_PER_LANE: u64 = 3;

/// One of many deliveries: the nth of its key.
#[derive(Debug)]
struct Nth {
    key: u64,
    n: usize,
}

impl Spec for Nth {
    fn lane(&self) -> &str {
        LANES[(self.key / KEYS_PER_LANE) as usize]
    }
    fn order_key(&self) -> u64 {
        self.key
    }
    fn coalesce_key(&self) -> Option<u64> {
        None
    }
}

#[derive(Debug, Clone)]
struct Try {
    key: u64,
    n: usize,
    started: Instant,
    ended: Option<Instant>,
    accepted: bool,
}

/// Each lane answers as its script says, and well at its end.
#[derive(Default)]
struct Receivers {
    scripts: Mutex<HashMap<&'static str, VecDeque<(u64, Act)>>>,
    tries: Arc<Mutex<Vec<Try>>>,
}

/// Ends a try even where it is aborted.
struct Trying {
    tries: Arc<Mutex<Vec<Try>>>,
    at: usize,
}

impl Drop for Trying {
    fn drop(&mut self) {
        self.tries.lock().expect("no panic under the lock")[self.at].ended = Some(Instant::now());
    }
}

impl Perform for Receivers {
    type Spec = Nth;

    fn perform(&self, spec: Arc<Nth>) -> BoxFuture<'static, Attempt> {
        let act = self.scripts.lock().expect("no panic under the lock").get_mut(spec.lane()).and_then(VecDeque::pop_front);
        let tries = self.tries.clone();
        let at = {
            let mut tries = tries.lock().expect("no panic under the lock");
            tries.push(Try { key: spec.key, n: spec.n, started: Instant::now(), ended: None, accepted: false });
            tries.len() - 1
        };
        Box::pin(async move {
            let trying = Trying { tries, at };
            let (ms, act) = act.unwrap_or((5, Act::Ok));
            tokio::time::sleep(Duration::from_millis(ms)).await;
            match act {
                Act::Fail(verdict) => Err(Failure::new("scripted", verdict)),
                Act::Answered(status, verdict) => Err(answered(status, verdict)),
                Act::Panic => panic!("scripted panic"),
                Act::Missing | Act::Slow(_) | Act::Ok => {
                    trying.tries.lock().expect("no panic under the lock")[trying.at].accepted = true;
                    Ok(Step::Done)
                }
            }
        })
    }

    fn pool(&self) -> &'static str {
        "receivers"
    }
}

fn act() -> impl Strategy<Value = (u64, Act)> {
    let retry = |after: Option<u64>| Verdict::Retry { after: after.map(Duration::from_secs) };
    let act = prop_oneof![
        4 => Just(Act::Ok),
        6 => Just(Act::Fail(retry(None))),
        2 => Just(Act::Answered(503, retry(None))),
        1 => Just(Act::Answered(500, retry(None))),
        1 => Just(Act::Answered(429, retry(Some(2)))),
        1 => Just(Act::Answered(503, retry(Some(30)))),
        1 => Just(Act::Answered(422, Verdict::Later)),
        1 => Just(Act::Panic),
    ];
    (prop_oneof![Just(1u64), 1u64..3_000], act)
}

/// Open from when it was seen to until when it said.
type Spans = Arc<Mutex<Vec<(&'static str, Instant, Instant)>>>;

async fn watch(breakers: Breakers, spans: Spans) {
    loop {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let now = Instant::now();
        let views = LANES.map(|lane| (lane, breakers.view(lane)));
        for (lane, view) in views {
            if let Some(View::Open { until }) = view {
                spans.lock().expect("no panic under the lock").push((lane, now, until));
            }
        }
    }
}

/// Submits the rest of its key until all are done, as a database does: a page at a time, from the first that was not sent.
async fn deliver_all(pool: ActorRef<DispatcherMsg<Nth>>, key: u64, count: usize) {
    let mut undone: Vec<usize> = (0..count).collect();
    while !undone.is_empty() {
        let mut outcomes = Vec::new();
        let jobs = undone.iter().map(|n| {
            let (waiter, outcome) = oneshot::channel();
            outcomes.push((*n, outcome));
            (Arc::new(Nth { key, n: *n }), waiter)
        });
        let jobs = jobs.collect();
        pool.cast(DispatcherMsg::Submit(jobs)).expect("the dispatcher lives");
        let (mut pause, mut first_unsent) = (Duration::ZERO, None);
        for (n, outcome) in outcomes {
            match outcome.await.expect("everybody is told") {
                Outcome::Done => {
                    assert_eq!(first_unsent, None, "key {key}: {n} went past one that was not sent");
                    undone.retain(|undone| *undone != n);
                }
                Outcome::Unsent { after, .. } => {
                    first_unsent.get_or_insert(n);
                    pause = pause.max(after);
                }
                _ => pause = pause.max(Duration::from_secs(5)),
            }
        }
        tokio::time::sleep(pause).await;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn whatever_receivers_answer_all_is_delivered_in_order_within_bounds(
        scripts in prop::collection::vec(prop::collection::vec(act(), 0..40), LANES.len()),
        counts in prop::collection::vec(1usize..8, LANES.len() * KEYS_PER_LANE as usize),
        per_lane in 1usize..4, fast_retries in 0u32..3,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().expect("a runtime");
        let (tries, spans) = runtime.block_on(async {
            let scripts = LANES.into_iter().zip(scripts).map(|(lane, acts)| (lane, acts.into())).collect();
            let perform = Arc::new(Receivers { scripts: Mutex::new(scripts), ..Receivers::default() });
            let settings = DispatcherSettings { concurrency_per_lane: per_lane, fast_retries, ..with_breaker() };
            let (actor, spans) = (Dispatcher::<Receivers>::new(), Spans::default());
            let watching = AbortOnDropHandle::new(tokio::spawn(watch(actor.breakers.clone(), spans.clone())));
            let arguments = DispatcherArguments { perform: perform.clone(), settings };
            let (dispatcher, _) = Actor::spawn(None, actor, arguments).await.expect("the dispatcher starts");
            let deliveries = counts.iter().enumerate();
            let deliveries = deliveries.map(|(key, count)| tokio::spawn(deliver_all(dispatcher.clone(), key as u64, *count)));
            for delivery in deliveries.collect::<Vec<_>>() {
                delivery.await.expect("no law was broken");
            }
            dispatcher.stop_and_wait(None, None).await.expect("it stops");
            drop(watching);
            let tries = perform.tries.lock().expect("no panic under the lock").clone();
            let spans = spans.lock().expect("no panic under the lock").clone();
            (tries, spans)
        });
        let lane_of = |one: &Try| Nth { key: one.key, n: one.n }.lane().to_string();
        let mut accepted: BTreeMap<(u64, usize), usize> = BTreeMap::new();
        for one in tries.iter().filter(|one| one.accepted) {
            *accepted.entry((one.key, one.n)).or_default() += 1;
        }
        for (key, count) in counts.iter().enumerate() {
            for n in 0..*count {
                prop_assert_eq!(accepted.get(&(key as u64, n)), Some(&1), "{} of key {}", n, key);
            }
        }
        for one in &tries {
            let overlapping = || tries.iter().filter(|other| other.started <= one.started && other.ended > Some(one.started));
            let ended = one.ended.expect("it has ended");
            prop_assert!(ended >= one.started);
            prop_assert!(overlapping().count() <= 4, "more than the workers");
            prop_assert!(overlapping().filter(|other| lane_of(other) == lane_of(one)).count() <= per_lane, "more than the lane may");
            prop_assert!(overlapping().filter(|other| other.key == one.key).count() <= 1, "two of one key");
            for (lane, from, until) in &spans {
                let within = one.started > *from && one.started < *until;
                prop_assert!(!within || lane_of(one) != *lane, "sent to a host whose breaker is open");
            }
        }
    }
}
