//! Which job runs next, on which worker, and how often.
//!
//! A dispatcher owns each job from `Submit` until its outcome: workers only borrow it, so that a worker's crash loses nothing. It
//! retries a few times, quickly; what lasts longer is the business of whoever waits for the outcome, because only they can make
//! it durable. A dispatcher's own crash closes every waiter, and whoever waited asks again: the debt is theirs.
//!
//! The order of limits is rate › concurrency › retry › timeout: `queue` holds the first two, `decide` the third, and whoever
//! performs the attempt the last.

pub mod backoff;
pub mod limits;
pub mod queue;

pub use backoff::Backoff;
pub use queue::{Spec, Waiter};

use crate::job::{Answer, Failed, Outcome, Verdict};
use backoff::DELAY_MAX;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use limits::LaneLimits;
use queue::{End, EntryId, Queue, Submitted};
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, RpcReplyPort, SpawnErr, SupervisionEvent};
use std::collections::HashMap;
use std::marker::PhantomData;
use std::num::NonZeroU32;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// A job that crashed this many workers would crash the next one too.
const CRASHES_MAX: u32 = 3;

/// One kind of work: how one attempt is made, and who counts it.
pub trait Perform: Send + Sync + 'static {
    type Spec: Spec;

    /// One attempt, bounded in time by itself: nothing else ends it.
    fn perform(&self, spec: Arc<Self::Spec>) -> BoxFuture<'static, Attempt>;

    /// For logs.
    fn pool(&self) -> &'static str;

    /// Told after each change.
    fn level(&self, _queued: usize, _in_flight: usize) {}

    /// Told when a job was folded into one that was not yet sent.
    fn coalesced(&self) {}
}

/// What one attempt came to.
pub type Attempt = Result<Step, Failure>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Done,
    /// A part is done: the job goes on after those that wait.
    Unfinished,
}

/// A failed attempt. The text holds no secret: it reaches logs and documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub error: String,
    pub verdict: Verdict,
    /// It failed because a database does not exist (`Outcome::Missing`). Never retried here.
    pub missing: bool,
    pub answer: Option<Answer>,
}

impl Failure {
    pub fn new(error: impl Into<String>, verdict: Verdict) -> Self {
        Self { error: error.into(), verdict, missing: false, answer: None }
    }

    pub fn retry(error: impl Into<String>) -> Self {
        Self::new(error, Verdict::Retry { after: None })
    }

    pub fn give_up(error: impl Into<String>) -> Self {
        Self::new(error, Verdict::GiveUp)
    }

    pub fn missing(error: impl Into<String>) -> Self {
        Self { error: error.into(), verdict: Verdict::GiveUp, missing: true, answer: None }
    }
}

#[derive(Debug, Clone)]
pub struct DispatcherSettings {
    pub workers_max: usize,
    pub concurrency_per_lane: usize,
    pub concurrency_per_place: usize,
    /// None: no limit.
    pub per_second_per_lane: Option<NonZeroU32>,
    /// Tries after the first one, before the waiter is told.
    pub fast_retries: u32,
    /// Between fast retries. Its cap is also the longest `Retry-After` that is waited for here.
    pub backoff: Backoff,
}

pub type Job<S> = (Arc<S>, Waiter);

pub enum DispatcherMsg<S> {
    /// Jobs with one order key run in the order in which they stand here.
    Submit(Vec<Job<S>>),
    Status(RpcReplyPort<Status>),
    /// From a worker.
    Finished {
        worker: ActorId,
        entry: EntryId,
        result: Attempt,
    },
    /// From the timer.
    Wake,
}

impl<S: Spec> ractor::Message for DispatcherMsg<S> {}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    pub queued: usize,
    pub in_flight: usize,
    pub lanes: usize,
    pub workers: usize,
}

pub struct Dispatcher<P>(PhantomData<fn() -> P>);

impl<P> Dispatcher<P> {
    pub fn new() -> Self {
        Self(PhantomData)
    }
}

impl<P> Default for Dispatcher<P> {
    fn default() -> Self {
        Self::new()
    }
}

/// The handle that the stages use.
pub struct Pool<P: Perform>(ActorRef<DispatcherMsg<P::Spec>>);

impl<P: Perform> Clone for Pool<P> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<P: Perform> Pool<P> {
    pub async fn spawn(perform: P, settings: DispatcherSettings, supervisor: ActorCell) -> Result<Self, ractor::SpawnErr> {
        let arguments = DispatcherArguments { perform: Arc::new(perform), settings };
        let (actor, _) = Actor::spawn_linked(None, Dispatcher::<P>::new(), arguments, supervisor).await?;
        Ok(Self(actor))
    }

    pub fn cell(&self) -> ActorCell {
        self.0.get_cell()
    }

    /// Where the dispatcher is gone the waiters are dropped, which tells whoever waits.
    pub fn submit(&self, jobs: Vec<Job<P::Spec>>) {
        if !jobs.is_empty() {
            let _ = self.0.cast(DispatcherMsg::Submit(jobs));
        }
    }

    pub fn run(&self, spec: P::Spec) -> oneshot::Receiver<Outcome> {
        let (waiter, outcome) = oneshot::channel();
        self.submit(vec![(Arc::new(spec), waiter)]);
        outcome
    }

    /// None where the dispatcher is being rebuilt.
    pub async fn status(&self) -> Option<Status> {
        ractor::call_t!(self.0, DispatcherMsg::Status, STATUS_TIMEOUT_MS).ok()
    }
}

const STATUS_TIMEOUT_MS: u64 = 1000;

pub struct DispatcherArguments<P> {
    pub perform: Arc<P>,
    pub settings: DispatcherSettings,
}

pub struct DispatcherState<P: Perform> {
    perform: Arc<P>,
    settings: DispatcherSettings,
    queue: Queue<P::Spec>,
    workers: HashMap<ActorId, Hand<P::Spec>>,
    idle: Vec<ActorId>,
    timer: Option<Timer>,
}

/// A worker as its dispatcher sees it.
struct Hand<S> {
    worker: ActorRef<WorkerMsg<S>>,
    job: Option<EntryId>,
}

struct Timer {
    at: Instant,
    _task: AbortOnDropHandle<()>,
}

impl<P: Perform> Actor for Dispatcher<P> {
    type Msg = DispatcherMsg<P::Spec>;
    type State = DispatcherState<P>;
    type Arguments = DispatcherArguments<P>;

    async fn pre_start(
        &self,
        _myself: ActorRef<Self::Msg>,
        DispatcherArguments { perform, settings }: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        let limits = LaneLimits {
            concurrency: settings.concurrency_per_lane,
            per_second: settings.per_second_per_lane,
            concurrency_per_place: settings.concurrency_per_place,
        };
        let queue = Queue::new(limits, settings.workers_max);
        perform.level(0, 0);
        Ok(DispatcherState { perform, settings, queue, workers: HashMap::new(), idle: Vec::new(), timer: None })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            DispatcherMsg::Submit(jobs) => state.submit(jobs),
            DispatcherMsg::Finished { worker, entry, result } => state.worker_finished(worker, entry, result),
            DispatcherMsg::Wake => state.timer = None,
            DispatcherMsg::Status(reply) => {
                // Whoever asked may have given up waiting.
                let _ = reply.send(state.status());
                return Ok(());
            }
        }
        state.hand_out_all(&myself).await;
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<Self::Msg>,
        event: SupervisionEvent,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorFailed(worker, error) => state.worker_ended(&worker, &error.to_string()),
            SupervisionEvent::ActorTerminated(worker, _, reason) => {
                state.worker_ended(&worker, &reason.unwrap_or_else(|| String::from("stopped")));
            }
            _ => return Ok(()),
        }
        state.hand_out_all(&myself).await;
        Ok(())
    }

    /// Workers hold nothing that needs an orderly end: their jobs are owed until somebody saw an outcome.
    async fn post_stop(&self, _myself: ActorRef<Self::Msg>, state: &mut Self::State) -> Result<(), ActorProcessingErr> {
        state.perform.level(0, 0);
        Ok(())
    }
}

impl<P: Perform> DispatcherState<P> {
    fn submit(&mut self, jobs: Vec<Job<P::Spec>>) {
        let now = Instant::now();
        for (spec, waiter) in jobs {
            if let Submitted::FoldedInto(_) = self.queue.submit(spec, waiter, now) {
                self.perform.coalesced();
            }
        }
    }

    fn worker_finished(&mut self, worker: ActorId, entry: EntryId, result: Attempt) {
        // A worker that is no longer known has crashed since, and its job was given to another.
        let Some(hand) = self.workers.get_mut(&worker).filter(|hand| hand.job == Some(entry)) else { return };
        hand.job = None;
        self.idle.push(worker);
        let end = match result {
            Ok(Step::Done) => End::Settled(Outcome::Done),
            Ok(Step::Unfinished) => End::Unfinished,
            Err(failure) => {
                let retries = self.queue.retries(entry);
                tracing::debug!(pool = self.perform.pool(), retries, error = %failure.error, "attempt failed");
                match decide(failure, retries, &self.settings, fastrand::f64()) {
                    Decision::Again { after } => End::Retry { at: Instant::now() + after },
                    Decision::End(outcome) => End::Settled(outcome),
                }
            }
        };
        self.queue.finished(entry, end);
    }

    fn worker_ended(&mut self, worker: &ActorCell, error: &str) {
        let id = worker.get_id();
        let Some(hand) = self.workers.remove(&id) else { return };
        match hand.job {
            Some(entry) => self.crashed(entry, error),
            None => self.idle.retain(|idle| *idle != id),
        }
    }

    fn crashed(&mut self, entry: EntryId, error: &str) {
        let crashes = self.queue.crashes(entry) + 1;
        let error = crate::vault::redact_text(error);
        tracing::debug!(pool = self.perform.pool(), crashes, %error, "worker crashed");
        let end = match crashes < CRASHES_MAX {
            true => End::Crashed,
            false => {
                let error = format!("crashed its worker {CRASHES_MAX} times: {error}");
                let verdict = Verdict::Retry { after: None };
                End::Settled(Outcome::Failed(Failed { error, verdict, attempts: crashes, answer: None }))
            }
        };
        self.queue.finished(entry, end);
    }

    async fn hand_out_all(&mut self, myself: &ActorRef<DispatcherMsg<P::Spec>>) {
        while let Some((entry, spec)) = self.queue.next(Instant::now()) {
            if let Err(error) = self.hand_out(myself, entry, spec).await {
                self.crashed(entry, &error);
            }
        }
        self.set_timer(myself);
        self.perform.level(self.queue.queued(), self.queue.in_flight());
    }

    async fn hand_out(
        &mut self,
        myself: &ActorRef<DispatcherMsg<P::Spec>>,
        entry: EntryId,
        spec: Arc<P::Spec>,
    ) -> Result<(), String> {
        loop {
            let worker = match self.idle.pop() {
                Some(idle) => idle,
                None => self.spawn_worker(myself).await.map_err(|error| format!("spawn a worker: {error}"))?,
            };
            let Some(hand) = self.workers.get_mut(&worker) else { continue };
            if hand.worker.cast(WorkerMsg::Run { entry, spec: spec.clone() }).is_ok() {
                hand.job = Some(entry);
                return Ok(());
            }
            // It ended while it was idle, and its end is about to be reported: no fault of this job.
            self.workers.remove(&worker);
        }
    }

    /// A worker starts without waiting for anything, so the dispatcher may await it.
    async fn spawn_worker(&mut self, myself: &ActorRef<DispatcherMsg<P::Spec>>) -> Result<ActorId, SpawnErr> {
        let arguments = (self.perform.clone(), myself.clone());
        let (worker, _) = Actor::spawn_linked(None, Worker::<P>(PhantomData), arguments, myself.get_cell()).await?;
        let id = worker.get_id();
        self.workers.insert(id, Hand { worker, job: None });
        Ok(id)
    }

    fn set_timer(&mut self, myself: &ActorRef<DispatcherMsg<P::Spec>>) {
        let wanted = self.queue.next_wakeup();
        if self.timer.as_ref().map(|timer| timer.at) == wanted {
            return;
        }
        self.timer = wanted.map(|at| {
            let myself = myself.clone();
            let task = tokio::spawn(async move {
                tokio::time::sleep_until(at).await;
                // A dispatcher that has ended needs no waking.
                let _ = myself.cast(DispatcherMsg::Wake);
            });
            Timer { at, _task: AbortOnDropHandle::new(task) }
        });
    }

    fn status(&self) -> Status {
        Status {
            queued: self.queue.queued(),
            in_flight: self.queue.in_flight(),
            lanes: self.queue.lanes(),
            workers: self.workers.len(),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Again { after: Duration },
    End(Outcome),
}

/// What follows from a failure after `retries` fast retries.
fn decide(failure: Failure, retries: u32, settings: &DispatcherSettings, random: f64) -> Decision {
    let Failure { error, verdict, missing, answer } = failure;
    if missing {
        return Decision::End(Outcome::Missing { error });
    }
    let failed = |verdict| Decision::End(Outcome::Failed(Failed { error, verdict, attempts: retries.saturating_add(1), answer }));
    match verdict {
        Verdict::Later | Verdict::GiveUp | Verdict::Gone => failed(verdict),
        Verdict::Retry { after } => {
            // Whoever waits will add it to a clock, and it came over a wire.
            let after = after.map(|after| after.min(DELAY_MAX));
            let too_long = after.is_some_and(|after| after > settings.backoff.cap());
            match too_long || retries >= settings.fast_retries {
                true => failed(Verdict::Retry { after }),
                false => {
                    let delay = settings.backoff.delay(retries, random);
                    Decision::Again { after: after.map_or(delay, |after| after.max(delay)) }
                }
            }
        }
    }
}

/// Runs one job at a time, in a task of its own: the mailbox stays free, and the task ends with the actor.
pub struct Worker<P>(PhantomData<fn() -> P>);

pub enum WorkerMsg<S> {
    Run {
        entry: EntryId,
        spec: Arc<S>,
    },
    /// From the task.
    Performed {
        entry: EntryId,
        result: Attempt,
    },
    /// From the task.
    Panicked(String),
}

impl<S: Spec> ractor::Message for WorkerMsg<S> {}

pub struct WorkerState<P: Perform> {
    perform: Arc<P>,
    dispatcher: ActorRef<DispatcherMsg<P::Spec>>,
    attempt: Option<AbortOnDropHandle<()>>,
}

impl<P: Perform> Actor for Worker<P> {
    type Msg = WorkerMsg<P::Spec>;
    type State = WorkerState<P>;
    type Arguments = (Arc<P>, ActorRef<DispatcherMsg<P::Spec>>);

    async fn pre_start(
        &self,
        _myself: ActorRef<Self::Msg>,
        (perform, dispatcher): Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(WorkerState { perform, dispatcher, attempt: None })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            WorkerMsg::Run { entry, spec } => {
                let task = tokio::spawn(attempt(state.perform.clone(), entry, spec, myself));
                state.attempt = Some(AbortOnDropHandle::new(task));
                Ok(())
            }
            WorkerMsg::Performed { entry, result } => {
                state.attempt = None;
                let worker = myself.get_id();
                Ok(state.dispatcher.cast(DispatcherMsg::Finished { worker, entry, result })?)
            }
            // A panic may have left what the worker holds in any state: it ends, and the dispatcher gives the job to another.
            WorkerMsg::Panicked(error) => Err(error.into()),
        }
    }

    /// It has no children.
    async fn handle_supervisor_evt(
        &self,
        _myself: ActorRef<Self::Msg>,
        _event: SupervisionEvent,
        _state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        Ok(())
    }
}

async fn attempt<P: Perform>(perform: Arc<P>, entry: EntryId, spec: Arc<P::Spec>, worker: ActorRef<WorkerMsg<P::Spec>>) {
    let performed = AssertUnwindSafe(async move { perform.perform(spec).await }).catch_unwind().await;
    // A worker that has ended has already been reported to the dispatcher.
    let _ = worker.cast(match performed {
        Ok(result) => WorkerMsg::Performed { entry, result },
        Err(panic) => WorkerMsg::Panicked(panic_text(panic.as_ref())),
    });
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_string()));
    text.unwrap_or_else(|| String::from("a panic without text"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
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

    #[derive(Clone)]
    enum Act {
        Ok,
        Slow(Duration),
        Fail(Verdict),
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
    }

    fn settings() -> DispatcherSettings {
        DispatcherSettings {
            workers_max: 4,
            concurrency_per_lane: 2,
            concurrency_per_place: 100,
            per_second_per_lane: None,
            fast_retries: 3,
            backoff: Backoff::new(Duration::from_millis(100), Duration::from_secs(5)),
        }
    }

    struct Pool {
        dispatcher: ActorRef<DispatcherMsg<Call>>,
        perform: Arc<Scripted>,
    }

    impl Pool {
        async fn start(perform: Scripted, settings: DispatcherSettings) -> Self {
            let perform = Arc::new(perform);
            let arguments = DispatcherArguments { perform: perform.clone(), settings };
            let (dispatcher, _) =
                Actor::spawn(None, Dispatcher::<Scripted>::new(), arguments).await.expect("the dispatcher starts");
            Self { dispatcher, perform }
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
        assert_eq!(pool.status().await, Status { queued: 96, in_flight: 4, lanes: 1, workers: 4 });
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
            let decision = decide(Failure::new("e", verdict), retries, &settings, 1.0);
            assert_eq!(decision, expected, "{verdict:?} after {retries} retries");
        }
    }
}
