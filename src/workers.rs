//! Workers: takes what is dirty by locking it, among other processes that do the same.
//!
//! It follows the spiegel database, keeps what is owed or locked on a board, and looks at so many documents at once. What is to be
//! done about one is decided in `locks` and `board`; a job (`workers/job.rs`) makes the requests. A process with one role does
//! nothing else; one that does everything works so while it sees others at work.

pub mod board;
pub mod coexist;
pub mod follow;
pub mod job;
pub mod listen;
pub mod replicate;

use crate::checkpoints::Checkpoints;
use crate::couch::Couch;
use crate::db::listen::Tools;
use crate::locks::mend::Phantoms;
use crate::locks::mixed::Mixed;
use crate::locks::sign::OwnRevs;
use crate::locks::{Kind, Settings};
use crate::rules::catalogue::Snapshot;
use crate::schedule::backoff::Backoff;
use crate::telemetry::Metrics;
use crate::topology::attempt::Means;
use board::{Board, Id};
use coexist::Coexistence;
use job::{Job, JobEnd};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use serde_json::Value;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

pub enum Message {
    /// Rows of the spiegel database's changes; the next ones come once these are told.
    Rows {
        rows: Vec<Row>,
        told: oneshot::Sender<()>,
    },
    /// Everything is read from the beginning.
    Begin,
    /// Whether the feed is open, and all that was there before it is told.
    Following(bool),
    /// Nobody told us of changes for a while.
    WasDeaf,
    JobEnded {
        id: Id,
        end: JobEnd,
    },
    /// What a replication brought to its target may be gone.
    RunAgain {
        id: Id,
    },
    Tick,
    /// A task that never ends ended.
    TaskEnded,
    /// No new jobs; `done` is told once those under way ended.
    Shutdown {
        done: oneshot::Sender<()>,
    },
    /// Those under way break off, and leave their documents dirty and unlocked.
    BreakOff,
}

impl ractor::Message for Message {}

/// One document as a row tells of it.
pub enum Row {
    Is(Value),
    Gone(String),
}

pub struct Workers;

/// What every job needs.
pub struct Shared {
    pub couch: Couch,
    pub spiegel_db: String,
    pub checkpoints: Checkpoints,
    /// This process, where documents say who has locked them.
    pub me: Arc<str>,
    pub settings: Settings,
    pub snapshot: watch::Receiver<Arc<Snapshot>>,
    pub backoff: Backoff,
    pub phantoms: Phantoms,
    /// None: change_listeners are not for this process.
    pub listen: Option<Tools>,
    /// None: replicators are not for this process.
    pub replicate: Option<Means>,
}

impl Shared {
    pub fn does(&self, kind: Kind) -> bool {
        match kind {
            Kind::ChangeListener => self.listen.is_some(),
            Kind::Replicator => self.replicate.is_some(),
        }
    }
}

pub struct Arguments {
    pub shared: Arc<Shared>,
    pub heartbeat: Duration,
    pub places: usize,
    pub own: Arc<OwnRevs>,
    pub mixed: Mixed,
    pub alone_after: Duration,
    pub metrics: Arc<Metrics>,
    /// Called when the others are gone: what is left dirty is ours alone again.
    pub alone: Arc<dyn Fn() + Send + Sync>,
}

pub struct State {
    arguments: Arguments,
    board: Board,
    jobs: HashMap<Id, Running>,
    coexistence: Coexistence,
    /// Since the feed was last open.
    deaf_since: Option<Instant>,
    tasks: Vec<AbortHandle>,
    timer: Option<AbortHandle>,
    break_off: CancellationToken,
    stopping: Option<oneshot::Sender<()>>,
    is_stopping: bool,
}

struct Running {
    abort: AbortHandle,
    has_conflicts: Arc<AtomicBool>,
}

impl Drop for State {
    fn drop(&mut self) {
        self.arguments.metrics.workers_connected.set(0);
        let jobs = self.jobs.values().map(|job| &job.abort);
        self.tasks.iter().chain(&self.timer).chain(jobs).for_each(AbortHandle::abort);
    }
}

/// The longest wait for anything: clocks may be set.
const TICK_MAX: Duration = Duration::from_secs(60);

impl Actor for Workers {
    type Msg = Message;
    type State = State;
    type Arguments = Arguments;

    async fn pre_start(&self, myself: ActorRef<Message>, arguments: Arguments) -> Result<State, ActorProcessingErr> {
        let shared = &arguments.shared;
        let follower = follow::Follower {
            couch: shared.couch.clone(),
            db_name: shared.spiegel_db.clone(),
            heartbeat: arguments.heartbeat,
            backoff: shared.backoff,
            mixed: arguments.mixed.subscribe(),
            workers: myself.clone(),
        };
        // Where locks are never used there is nothing to follow.
        let is_idle = arguments.mixed.is_fixed() && !arguments.mixed.is_on();
        let mut tasks = Vec::new();
        if !is_idle {
            tasks.push(watched(&myself, follower.run()));
        }
        if let Some(means) = shared.replicate.clone().filter(|_| arguments.mixed.is_fixed() && !is_idle) {
            let workers = myself.clone();
            // In a process that does everything the topology hears of it.
            tasks.push(watched(&myself, async move {
                loop {
                    let id = means.native.again().await;
                    let _ = workers.cast(Message::RunAgain { id });
                }
            }));
        }
        Ok(State {
            board: Board::new(&shared.me, shared.settings.clone(), arguments.places),
            coexistence: Coexistence::of(&arguments.mixed, arguments.alone_after, Instant::now()),
            arguments,
            jobs: HashMap::new(),
            deaf_since: None,
            tasks,
            timer: None,
            break_off: CancellationToken::new(),
            stopping: None,
            is_stopping: false,
        })
    }

    async fn handle(&self, myself: ActorRef<Message>, message: Message, state: &mut State) -> Result<(), ActorProcessingErr> {
        let (now, age) = (SystemTime::now(), Instant::now());
        match message {
            Message::Rows { rows, told } => {
                rows.into_iter().for_each(|row| state.row(row, now, age));
                // It waits for that, or is being rebuilt with us.
                let _ = told.send(());
            }
            Message::Begin => state.board.begin(age),
            Message::Following(is_open) => {
                state.board.following(is_open);
                if !is_open {
                    state.deaf_since.get_or_insert(age);
                }
                state.arguments.metrics.workers_connected.set(i64::from(is_open));
            }
            Message::WasDeaf => {
                state.board.was_deaf(age);
                if let Some(since) = state.deaf_since.take() {
                    state.coexistence.was_deaf(age.saturating_duration_since(since), age);
                }
            }
            Message::JobEnded { id, end } => {
                state.jobs.remove(&id);
                match end {
                    JobEnd::Is(doc) => state.board.ended(&id, Some(doc), now, age),
                    JobEnd::Unknown => state.board.ended(&id, None, now, age),
                    JobEnd::Gone => state.board.deleted(&id),
                    JobEnd::Wait(wait) => state.board.wait(&id, age + wait, age),
                    JobEnd::Locked { rev, wait } => state.board.wait_unchanged(&id, &rev, age + wait, age),
                    JobEnd::Deaf(wait) => {
                        state.board.was_deaf(age);
                        state.board.wait(&id, age + wait, age);
                    }
                    JobEnd::HoldOff(wait) => state.board.hold_off(&id, age + wait, age),
                }
            }
            Message::RunAgain { id } => state.owe(id),
            Message::Tick => {
                state.timer = None;
                state.board.tick(now, age);
            }
            Message::TaskEnded => return Err("what follows the spiegel database crashed".into()),
            Message::Shutdown { done } => {
                state.is_stopping = true;
                state.stopping = Some(done);
            }
            Message::BreakOff => state.break_off.cancel(),
        }
        state.coexist(age);
        state.start_jobs(&myself, age);
        state.set_timer(&myself, now, age);
        if state.is_stopping
            && state.jobs.is_empty()
            && let Some(done) = state.stopping.take()
        {
            let _ = done.send(());
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<Message>,
        _: SupervisionEvent,
        _: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        Ok(())
    }
}

impl State {
    fn row(&mut self, row: Row, now: SystemTime, age: Instant) {
        let shared = &self.arguments.shared;
        match row {
            Row::Gone(id) => self.board.gone(&id),
            Row::Is(mut doc) => {
                shared.phantoms.strip(&mut doc);
                if !self.arguments.mixed.is_fixed() {
                    self.coexistence.row(&doc, &shared.me, &self.arguments.own, age);
                }
                let Some(kind) = Kind::of(&doc) else {
                    return self.board.gone(doc["_id"].as_str().unwrap_or_default());
                };
                if !self.arguments.mixed.is_on() || !shared.does(kind) {
                    return;
                }
                let id: Id = doc["_id"].as_str().unwrap_or_default().into();
                if self.board.row(doc, now, age)
                    && let Some(job) = self.jobs.get(&id)
                {
                    job.has_conflicts.store(true, Ordering::Relaxed);
                }
            }
        }
    }

    /// Others came, or have been gone for long.
    fn coexist(&mut self, age: Instant) {
        let Arguments { mixed, own, alone, .. } = &self.arguments;
        if mixed.is_fixed() {
            return;
        }
        let is_alone = self.coexistence.is_alone(own, age);
        if !mixed.is_on() && !is_alone {
            tracing::info!("the spiegel database has locks, marks or conflicts of others: working by locks");
            mixed.set(true);
        } else if mixed.is_on() && is_alone && self.board.is_quiet() && self.board.is_following() {
            tracing::info!("nobody else is at work in the spiegel database any more: working without locks");
            mixed.set(false);
            self.board.begin(age);
            alone();
        }
    }

    fn start_jobs(&mut self, myself: &ActorRef<Message>, age: Instant) {
        while !self.is_stopping
            && self.arguments.mixed.is_on()
            && let Some(start) = self.board.start(age)
        {
            let id = start.id.clone();
            let has_conflicts = Arc::new(AtomicBool::new(false));
            let job = Job {
                shared: self.arguments.shared.clone(),
                has_conflicts: has_conflicts.clone(),
                break_off: self.break_off.clone(),
            };
            let stale_after = self.arguments.shared.settings.stale_after;
            let running = tokio::spawn(job.run(start));
            let abort = running.abort_handle();
            let (workers, ended) = (myself.clone(), id.clone());
            tokio::spawn(async move {
                // A crash leaves its lock; after a while it is free for us as for others.
                let end = running.await.unwrap_or(JobEnd::Wait(stale_after));
                let _ = workers.cast(Message::JobEnded { id: ended, end });
            });
            self.jobs.insert(id, Running { abort, has_conflicts });
        }
    }

    fn owe(&self, id: Id) {
        let checkpoints = self.arguments.shared.checkpoints.clone();
        tokio::spawn(async move {
            if let Err(error) = job::owe(&checkpoints, &id).await {
                tracing::error!(%id, %error, "cannot write that the replicator runs again");
            }
        });
    }

    fn set_timer(&mut self, myself: &ActorRef<Message>, now: SystemTime, age: Instant) {
        if let Some(timer) = self.timer.take() {
            timer.abort();
        }
        let due = [self.board.next_due(now, age), self.coexistence.next_due(age)].into_iter().flatten().min();
        let Some(wait) = due else { return };
        let myself = myself.clone();
        let timer = tokio::spawn(async move {
            tokio::time::sleep(wait.min(TICK_MAX) + Duration::from_millis(1)).await;
            let _ = myself.cast(Message::Tick);
        });
        self.timer = Some(timer.abort_handle());
    }
}

fn watched(myself: &ActorRef<Message>, work: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
    let running = tokio::spawn(work);
    let abort = running.abort_handle();
    let myself = myself.clone();
    tokio::spawn(async move {
        if !running.await.is_err_and(|error| error.is_cancelled()) {
            let _ = myself.cast(Message::TaskEnded);
        }
    });
    abort
}
