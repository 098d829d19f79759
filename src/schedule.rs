//! Which job runs next, on which worker, and how often.
//!
//! A dispatcher owns each job from `Submit` until its outcome: workers only borrow it, so that a worker's crash loses nothing. It
//! retries a few times, quickly; what lasts longer is the business of whoever waits for the outcome, because only they can make
//! it durable. A dispatcher's own crash closes every waiter, and whoever waited asks again: the debt is theirs.
//!
//! Where a pool has breakers, a host that is down is not asked, but by one probe at a time: its jobs end as unsent, which costs
//! whoever waits nothing but time (`breaker`).
//!
//! The order of limits is rate › concurrency › retry › timeout: `queue` holds the first two, `decide` the third, and whoever
//! performs the attempt the last.

pub mod backoff;
pub mod breaker;
mod lane;
pub mod limits;
mod open;
pub mod queue;
mod worker;

pub use backoff::Backoff;
pub use breaker::BreakerSettings;
pub use open::Breakers;
pub use queue::{BreakerStatus, Spec, Waiter};
pub use worker::{Worker, WorkerMsg};

use crate::job::{Answer, Failed, Outcome, Verdict};
use backoff::DELAY_MAX;
use breaker::{Ruling, Sign, View};
use futures_util::future::BoxFuture;
use limits::LaneLimits;
use queue::{BreakerChange, End, EntryId, Queue, Submitted};
use ractor::{Actor, ActorCell, ActorId, ActorProcessingErr, ActorRef, RpcReplyPort, SpawnErr, SupervisionEvent};
use std::collections::HashMap;
use std::marker::PhantomData;
use std::num::NonZeroU32;
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

    /// Told after a change: how many lanes have an open breaker, and a half-open one.
    fn breakers(&self, _open: usize, _half_open: usize) {}
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
    /// None: a lane that fails is tried like any other.
    pub breaker: Option<BreakerSettings>,
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

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    pub queued: usize,
    pub in_flight: usize,
    pub lanes: usize,
    pub workers: usize,
    pub breakers_open: usize,
    pub breakers_half_open: usize,
    /// The lanes of these, up to `BREAKERS_SHOWN_MAX`.
    pub breakers: Vec<BreakerStatus>,
}

/// More than anybody reads; the counts are of all.
const BREAKERS_SHOWN_MAX: usize = 100;

pub struct Dispatcher<P> {
    breakers: Breakers,
    performs: PhantomData<fn() -> P>,
}

impl<P> Dispatcher<P> {
    pub fn new() -> Self {
        Self { breakers: Breakers::default(), performs: PhantomData }
    }
}

impl<P> Default for Dispatcher<P> {
    fn default() -> Self {
        Self::new()
    }
}

/// The handle that the stages use.
pub struct Pool<P: Perform> {
    dispatcher: ActorRef<DispatcherMsg<P::Spec>>,
    breakers: Breakers,
}

impl<P: Perform> Clone for Pool<P> {
    fn clone(&self) -> Self {
        Self { dispatcher: self.dispatcher.clone(), breakers: self.breakers.clone() }
    }
}

impl<P: Perform> Pool<P> {
    pub async fn spawn(perform: P, settings: DispatcherSettings, supervisor: ActorCell) -> Result<Self, ractor::SpawnErr> {
        let arguments = DispatcherArguments { perform: Arc::new(perform), settings };
        let actor = Dispatcher::<P>::new();
        let breakers = actor.breakers.clone();
        let (dispatcher, _) = Actor::spawn_linked(None, actor, arguments, supervisor).await?;
        Ok(Self { dispatcher, breakers })
    }

    pub fn cell(&self) -> ActorCell {
        self.dispatcher.get_cell()
    }

    pub fn breakers(&self) -> &Breakers {
        &self.breakers
    }

    /// Where the dispatcher is gone the waiters are dropped, which tells whoever waits.
    pub fn submit(&self, jobs: Vec<Job<P::Spec>>) {
        if !jobs.is_empty() {
            let _ = self.dispatcher.cast(DispatcherMsg::Submit(jobs));
        }
    }

    pub fn run(&self, spec: P::Spec) -> oneshot::Receiver<Outcome> {
        let (waiter, outcome) = oneshot::channel();
        self.submit(vec![(Arc::new(spec), waiter)]);
        outcome
    }

    /// None where the dispatcher is being rebuilt.
    pub async fn status(&self) -> Option<Status> {
        ractor::call_t!(self.dispatcher, DispatcherMsg::Status, STATUS_TIMEOUT_MS).ok()
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
    breakers: Breakers,
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
        let queue = Queue::new(limits, settings.breaker, settings.workers_max);
        perform.level(0, 0);
        perform.breakers(0, 0);
        let breakers = self.breakers.clone();
        Ok(DispatcherState { perform, settings, breakers, queue, workers: HashMap::new(), idle: Vec::new(), timer: None })
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

impl<P: Perform> Drop for DispatcherState<P> {
    fn drop(&mut self) {
        self.breakers.clear();
        self.perform.breakers(0, 0);
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
        let now = Instant::now();
        let end = match result {
            Ok(step) => {
                self.queue.heard(entry, Sign::Alive, "", now, 0.0);
                match step {
                    Step::Done => End::Settled(Outcome::Done),
                    Step::Unfinished => End::Unfinished,
                }
            }
            Err(failure) => self.attempt_failed(entry, failure, now),
        };
        self.queue.finished(entry, end, now);
    }

    fn attempt_failed(&mut self, entry: EntryId, failure: Failure, now: Instant) -> End {
        let retries = self.queue.retries(entry);
        tracing::debug!(pool = self.perform.pool(), retries, error = %failure.error, "attempt failed");
        let sign = sign_of(&failure, &self.settings);
        let ruling = self.queue.heard(entry, sign, &failure.error, now, fastrand::f64());
        match decide(failure, retries, ruling, &self.settings, fastrand::f64()) {
            Decision::Again { after } => End::Retry { at: now + after },
            Decision::End(outcome) => End::Settled(outcome),
        }
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
        self.queue.finished(entry, end, Instant::now());
    }

    async fn hand_out_all(&mut self, myself: &ActorRef<DispatcherMsg<P::Spec>>) {
        while let Some((entry, spec)) = self.queue.next(Instant::now()) {
            if let Err(error) = self.hand_out(myself, entry, spec).await {
                self.crashed(entry, &error);
            }
        }
        self.set_timer(myself);
        self.perform.level(self.queue.queued(), self.queue.in_flight());
        self.tell_breakers();
    }

    fn tell_breakers(&mut self) {
        let changes = self.queue.take_changes();
        if changes.is_empty() {
            return;
        }
        self.breakers.apply(&changes);
        let (open, half_open) = self.queue.not_closed();
        self.perform.breakers(open, half_open);
        for change in &changes {
            log_change(self.perform.pool(), change);
        }
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
        let (worker, _) = Actor::spawn_linked(None, Worker::<P>::new(), arguments, myself.get_cell()).await?;
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
            breakers_open: self.queue.not_closed().0,
            breakers_half_open: self.queue.not_closed().1,
            breakers: self.queue.breakers(BREAKERS_SHOWN_MAX),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Again { after: Duration },
    End(Outcome),
}

/// One line when a host goes and one when it is back; the probes between are nobody's news.
fn log_change(pool: &str, change: &BreakerChange) {
    let BreakerChange { lane: host, failures, lasted, reason, .. } = change;
    let lasted_s = lasted.as_secs();
    match (change.from, change.to) {
        (View::Closed, View::Open { .. }) => {
            tracing::warn!(pool, %host, failures, %reason, "host is down, only probes are sent");
        }
        (_, View::Closed) if change.forgotten => {
            tracing::info!(pool, %host, failures, lasted_s, "host is forgotten, nothing was to be sent for long");
        }
        (_, View::Closed) => tracing::info!(pool, %host, failures, lasted_s, "host is back"),
        (_, View::Open { .. }) => tracing::debug!(pool, %host, failures, "probe failed"),
        _ => {}
    }
}

/// A 500 is an application's answer to this request: one path that is broken must not stop the others of its host. The others
/// come from what stands before the application, or ask for less of everything.
fn speaks_of_the_host(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 502..=504 | 507 | 520..=527 | 529 | 530)
}

/// What a failed attempt says of its host.
fn sign_of(failure: &Failure, settings: &DispatcherSettings) -> Sign {
    let status = failure.answer.as_ref().map(|answer| answer.status);
    let minds_the_request = status.is_some_and(|status| !speaks_of_the_host(status));
    match failure.verdict {
        _ if failure.missing => Sign::Silent,
        _ if minds_the_request => Sign::Alive,
        Verdict::Retry { after } => match after.map(|after| after.min(DELAY_MAX)) {
            Some(pause) if pause > settings.backoff.cap() => Sign::Away { pause },
            pause => Sign::Failing { pause: pause.filter(|pause| !pause.is_zero()) },
        },
        Verdict::Later | Verdict::GiveUp | Verdict::Gone if status.is_some() => Sign::Alive,
        // Nothing came, and nothing may have been sent.
        Verdict::Later | Verdict::GiveUp | Verdict::Gone => Sign::Silent,
    }
}

/// What follows from a failure after `retries` fast retries.
fn decide(failure: Failure, retries: u32, ruling: Ruling, settings: &DispatcherSettings, random: f64) -> Decision {
    let Failure { error, verdict, missing, answer } = failure;
    if let Ruling::Down { after } = ruling {
        return Decision::End(Outcome::Unsent { error, after });
    }
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
            match too_long || ruling == Ruling::Own || retries >= settings.fast_retries {
                true => failed(Verdict::Retry { after }),
                false => {
                    let delay = settings.backoff.delay(retries, random);
                    Decision::Again { after: after.map_or(delay, |after| after.max(delay)) }
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
