//! DbActor: one for each busy database.
//!
//! It turns hints into runs. A run is one listen, where a rule matches the database's name, and one replication for each
//! replicator of this source; the listen is ours, the replications are the topology's. What a run claimed from the debt is
//! settled when both are through or durable. The actor keeps one position and no list, and is forgotten when it is idle.

pub mod debounce;
pub mod deliver;
pub mod directory;
pub mod dirty;
pub mod durable;
pub mod failing;
pub mod gather;
pub mod held;
pub mod known;
pub mod late;
pub mod listen;
pub mod pace;
pub mod positions;
pub mod rule_health;
mod run;
pub mod update_listener;

use crate::job::{Claim, DbName, Debts};
use crate::locks::mixed::Mixed;
use crate::rules::catalogue::Snapshot;
use crate::schedule::backoff::Backoff;
use crate::topology;
use crate::vault::redact_text;
use debounce::{Debounce, Next};
use durable::{Missing, forget_missing, make_durable};
use late::Late;
use listen::{Leaving, ListenError, Listener, Tools};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use run::{Left, RunEnded, run};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;

pub enum Message {
    /// The database may have changed.
    Hint {
        instance: Instance,
    },
    /// Whatever is not done becomes durable.
    Spill {
        done: Option<oneshot::Sender<()>>,
    },
    /// No new runs.
    Stop,
    RunEnded {
        claim: Claim,
        ended: Box<RunEnded>,
    },
    Settled {
        claim: Claim,
    },
    /// Its replications were neither done nor made durable: owed again.
    Unsettled {
        claim: Claim,
    },
    Spilled {
        durable: bool,
    },
    /// Deliveries that a run left behind have ended.
    LateEnded,
    /// The database is missing: look again then.
    Recheck {
        at: SystemTime,
    },
    Timer,
}

/// What a hint knows of the database's `instance_start_time`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Instance {
    Unchanged,
    /// It may have been made or deleted.
    Unsure,
    Is(Arc<str>),
}

impl ractor::Message for Message {}

/// What all DbActors share.
pub struct Shared {
    pub tools: Tools,
    pub snapshot: watch::Receiver<Arc<Snapshot>>,
    pub topology: ActorRef<topology::Message>,
    pub debts: Arc<dyn Debts>,
    pub mixed: Mixed,
    pub settings: Settings,
    pub backoff: Backoff,
}

#[derive(Debug, Clone)]
pub struct Settings {
    pub quiet: Duration,
    pub longest: Duration,
    pub passivate_after: Duration,
    pub assume_deleted_after: Duration,
}

/// How often a database may fail as in an outage before it counts as its own trouble: CouchHealth needs two probes to tell.
const OUTAGE_BEGINNINGS: u32 = 3;
const UNSETTLED_RETRY_AFTER: Duration = Duration::from_secs(5);
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(2);

pub struct DbActor;

pub struct Arguments {
    pub db: DbName,
    pub shared: Arc<Shared>,
    pub directory: ActorRef<directory::Message>,
}

pub struct State {
    arguments: Arguments,
    debounce: Debounce,
    listener: Option<Listener>,
    /// Runs whose claim is not settled, because their replications are still under way.
    claims: HashSet<Claim>,
    spills: u32,
    run: Option<AbortHandle>,
    timer: Option<(Instant, AbortHandle)>,
    /// A failed run's next try.
    retry_at: Option<Instant>,
    failures: u32,
    /// Its trouble was said, so its end will be.
    is_failure_told: bool,
    /// `_dbs_info` did not find the database either; a node that lags says the same, so it is asked twice.
    is_missing: bool,
    /// When the database was first found missing.
    recheck_at: Option<SystemTime>,
    idle_since: Option<Instant>,
    /// Messages from the directory, which must all have been seen before it may forget us.
    seen: u64,
    stopping: bool,
    instance: Instance,
    /// Its document was written behind the listener's back, by a spill.
    listener_is_stale: bool,
    /// That there is more to do than the run under way.
    more: Arc<watch::Sender<bool>>,
    /// Of a listener that had to be forgotten.
    late: Late,
}

impl Drop for State {
    fn drop(&mut self) {
        if let Some(run) = self.run.take() {
            run.abort();
        }
        if let Some((_, timer)) = self.timer.take() {
            timer.abort();
        }
    }
}

impl Actor for DbActor {
    type Msg = Message;
    type State = State;
    type Arguments = Arguments;

    async fn pre_start(&self, _: ActorRef<Message>, arguments: Arguments) -> Result<State, ActorProcessingErr> {
        let settings = &arguments.shared.settings;
        Ok(State {
            debounce: Debounce::new(settings.quiet, settings.longest),
            arguments,
            listener: None,
            claims: HashSet::new(),
            spills: 0,
            run: None,
            timer: None,
            retry_at: None,
            failures: 0,
            is_failure_told: false,
            is_missing: false,
            recheck_at: None,
            idle_since: None,
            seen: 0,
            stopping: false,
            instance: Instance::Unchanged,
            listener_is_stale: false,
            more: Arc::new(watch::Sender::new(false)),
            late: Late::default(),
        })
    }

    async fn handle(&self, myself: ActorRef<Message>, message: Message, state: &mut State) -> Result<(), ActorProcessingErr> {
        let now = Instant::now();
        match message {
            Message::Hint { instance } => {
                state.seen += 1;
                if instance != Instance::Unchanged {
                    state.instance = instance;
                    state.retry_at = None;
                }
                state.more.send_replace(true);
                state.hint(&myself, now);
            }
            Message::LateEnded => {
                state.more.send_replace(true);
                if state.retry_at.is_none() {
                    let next = state.debounce.retry_after(now);
                    state.follow(&myself, next);
                }
            }
            Message::Spill { done } => {
                state.seen += 1;
                // One that is under way waits for CouchDB; more of them would only pile up behind it.
                if state.spills == 0 || done.is_some() {
                    state.spill(&myself, done);
                }
            }
            Message::Stop => {
                state.seen += 1;
                state.stopping = true;
            }
            Message::RunEnded { claim, ended } => state.run_ended(&myself, now, claim, *ended)?,
            Message::Settled { claim } => drop(state.claims.remove(&claim)),
            Message::Unsettled { claim } => {
                state.claims.remove(&claim);
                // Whoever broke the promise is being rebuilt; not at once, so that this is no busy loop.
                state.retry_at.get_or_insert(now + UNSETTLED_RETRY_AFTER);
            }
            Message::Spilled { durable } => {
                state.spills -= 1;
                state.listener_is_stale = true;
                // The document says dirty now; the run that clears it must have started after that. Replicators see to theirs.
                if durable && state.listens() {
                    state.hint(&myself, now);
                }
            }
            Message::Recheck { at } => state.recheck_at = Some(at),
            Message::Timer => {
                state.timer = None;
                state.timer_fired(&myself, now);
            }
        }
        state.rest(&myself, now);
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
    /// A failed run's next try takes in what comes before it.
    fn hint(&mut self, myself: &ActorRef<Message>, now: Instant) {
        if self.retry_at.is_none() {
            let next = self.debounce.hint(now);
            self.follow(myself, next);
        }
    }

    fn follow(&mut self, myself: &ActorRef<Message>, next: Next) {
        if next == Next::RunNow {
            self.start_run(myself);
        }
    }

    fn start_run(&mut self, myself: &ActorRef<Message>) {
        if self.stopping {
            return;
        }
        self.retry_at = None;
        self.recheck_at = None;
        let (db, shared) = (self.arguments.db.clone(), self.arguments.shared.clone());
        let listener = self.listener.take();
        let instance = std::mem::replace(&mut self.instance, Instance::Unchanged);
        let is_stale = std::mem::take(&mut self.listener_is_stale);
        // Before the first request: what is owed from here on is for the next run.
        let claim = shared.debts.claim(&db);
        self.claims.insert(claim);
        let seen = shared.debts.fingerprint(&db, claim);
        // What was told before this run is what it is for.
        self.more = Arc::new(watch::Sender::new(false));
        let (myself, told) = (myself.clone(), myself.clone());
        let told = Arc::new(move || drop(told.cast(Message::LateEnded)));
        let left = Left { late: std::mem::take(&mut self.late), leaving: Leaving { more: self.more.clone(), told } };
        let run = tokio::spawn(async move {
            let running = tokio::spawn(run(db, shared, listener, instance, is_stale, seen, left));
            let _abort_with_us = AbortOnDrop(running.abort_handle());
            let ended = running.await.unwrap_or_else(|crash| RunEnded {
                listener: None,
                late: Late::default(),
                result: Err(ListenError::Unsaved(redact_text(&format!("the run crashed: {crash}")))),
                replicated: None,
            });
            let _ = myself.cast(Message::RunEnded { claim, ended: Box::new(ended) });
        });
        self.run = Some(run.abort_handle());
    }

    fn run_ended(
        &mut self,
        myself: &ActorRef<Message>,
        now: Instant,
        claim: Claim,
        ended: RunEnded,
    ) -> Result<(), ActorProcessingErr> {
        self.run = None;
        let RunEnded { listener, late, result, replicated } = ended;
        let has_more = listener.as_ref().is_some_and(|listener| listener.positions().has_more());
        self.listener = listener;
        if self.listener.is_none() {
            self.late = late;
        }
        let next = self.debounce.run_ended(now);
        let db = self.arguments.db.clone();
        match result {
            Ok(()) => {
                if std::mem::take(&mut self.is_failure_told) {
                    tracing::info!(%db, failures = self.failures, "the database can be read again");
                }
                self.failures = 0;
                self.is_missing = false;
                self.settle_when_replicated(myself, claim, replicated);
                self.follow(myself, next);
                if has_more {
                    let next = self.debounce.hint(now);
                    self.follow(myself, next);
                }
            }
            Err(ListenError::Missing) if !std::mem::replace(&mut self.is_missing, true) => {
                self.release(claim);
                self.retry_at = Some(now + LOOK_AGAIN_AFTER);
            }
            Err(ListenError::Missing) => {
                self.failures = 0;
                self.listener = None;
                self.mark_missing(myself, claim, replicated);
                self.follow(myself, next);
            }
            Err(error) => {
                self.release(claim);
                // What was known of the document, or of the database, may be why it failed; what is under way still is.
                self.late = self.listener.take().map_or_else(|| std::mem::take(&mut self.late), Listener::into_late);
                self.instance = Instance::Unsure;
                self.retry_at = Some(now + self.retry_delay(&error));
            }
        }
        Ok(())
    }

    fn release(&mut self, claim: Claim) {
        self.arguments.shared.debts.release(&self.arguments.db, claim);
        self.claims.remove(&claim);
    }

    /// An outage is CouchHealth's to tell of, once for everybody, and costs no patience. What looks like one while CouchDB
    /// answers others is this database's own trouble, once it has repeated.
    fn retry_delay(&mut self, error: &ListenError) -> Duration {
        let shared = &self.arguments.shared;
        let looks_like_outage = matches!(error, ListenError::Couch(error) if error.is_outage());
        if looks_like_outage && !shared.tools.couch.health().is_up() {
            return Duration::from_millis(100 + fastrand::u64(0..400));
        }
        let free_tries = if looks_like_outage { OUTAGE_BEGINNINGS } else { 0 };
        let delay = match self.failures.checked_sub(free_tries) {
            None => Duration::from_millis(200 + fastrand::u64(0..600)),
            Some(failures) => shared.backoff.delay(failures, fastrand::f64()),
        };
        if self.failures >= free_tries && !std::mem::replace(&mut self.is_failure_told, true) {
            let db = &self.arguments.db;
            tracing::warn!(%db, %error, retry_in_ms = delay.as_millis(), "cannot listen to the database, backing off");
        }
        self.failures = self.failures.saturating_add(1);
        delay
    }

    /// The claim is settled once the replications of its run are through or durable.
    fn settle_when_replicated(&self, myself: &ActorRef<Message>, claim: Claim, replicated: Option<oneshot::Receiver<()>>) {
        let (db, debts, myself) = (self.arguments.db.clone(), self.arguments.shared.debts.clone(), myself.clone());
        let Some(replicated) = replicated else {
            debts.settle(&db, claim);
            let _ = myself.cast(Message::Settled { claim });
            return;
        };
        tokio::spawn(async move {
            match replicated.await {
                Ok(()) => {
                    debts.settle(&db, claim);
                    let _ = myself.cast(Message::Settled { claim });
                }
                Err(_) => {
                    debts.release(&db, claim);
                    let _ = myself.cast(Message::Unsettled { claim });
                }
            }
        });
    }

    /// Only what `_dbs_info` does not find has no work left; its document goes later, in case the database comes back.
    fn mark_missing(&self, myself: &ActorRef<Message>, claim: Claim, replicated: Option<oneshot::Receiver<()>>) {
        let (db, shared) = (self.arguments.db.clone(), self.arguments.shared.clone());
        let (sender, receiver) = oneshot::channel();
        let told = myself.clone();
        tokio::spawn(async move {
            let marked = match forget_missing(&shared, &db).await {
                Missing::Unmarked => false,
                Missing::Forgotten => true,
                Missing::Marked => {
                    let at = SystemTime::now() + shared.settings.assume_deleted_after;
                    told.cast(Message::Recheck { at }).is_ok()
                }
            };
            let replicated = match replicated {
                Some(replicated) => replicated.await.is_ok(),
                None => true,
            };
            if marked && replicated {
                let _ = sender.send(());
            }
        });
        self.settle_when_replicated(myself, claim, Some(receiver));
    }

    fn spill(&mut self, myself: &ActorRef<Message>, done: Option<oneshot::Sender<()>>) {
        let (db, shared) = (self.arguments.db.clone(), self.arguments.shared.clone());
        let claim = shared.debts.claim(&db);
        let covered: Vec<Claim> = self.claims.iter().copied().chain([claim]).collect();
        self.spills += 1;
        let myself = myself.clone();
        tokio::spawn(async move {
            let durable = make_durable(&shared, &db).await;
            for claim in covered.into_iter().filter(|other| durable || *other == claim) {
                match durable {
                    true => shared.debts.settle(&db, claim),
                    false => shared.debts.release(&db, claim),
                }
            }
            let _ = myself.cast(Message::Spilled { durable });
            if let Some(done) = done.filter(|_| durable) {
                let _ = done.send(());
            }
        });
    }

    fn timer_fired(&mut self, myself: &ActorRef<Message>, now: Instant) {
        let held_is_due = self.held_until().is_some_and(|due| due <= SystemTime::now());
        let retry_is_due = self.retry_at.is_some_and(|at| at <= now);
        let next = match held_is_due || retry_is_due {
            true => self.debounce.retry(),
            false if self.retry_at.is_none() => self.debounce.timer(now),
            false => Next::Nothing,
        };
        self.follow(myself, next);
    }

    fn held_until(&self) -> Option<SystemTime> {
        self.listener.as_ref().and_then(|listener| listener.positions().due())
    }

    fn listens(&self) -> bool {
        self.arguments.shared.snapshot.borrow().has_rules_of(&self.arguments.db)
    }

    fn is_busy(&self) -> bool {
        self.run.is_some() || !self.debounce.is_idle() || !self.claims.is_empty() || self.spills > 0 || self.retry_at.is_some()
    }

    /// What to wait for until something happens.
    fn rest(&mut self, myself: &ActorRef<Message>, now: Instant) {
        if self.stopping {
            return self.set_timer(myself, None);
        }
        if self.is_busy() {
            self.idle_since = None;
        }
        let passivate_after = match &self.listener {
            Some(_) => self.arguments.shared.settings.passivate_after,
            // It only passes hints on, and is made anew for less than it costs to keep.
            None => self.arguments.shared.settings.passivate_after.min(PASSIVATE_WITHOUT_LISTENER_AFTER),
        };
        let debounced = match self.run.is_none().then(|| self.debounce.next(now)) {
            Some(Next::WaitUntil(at)) if self.retry_at.is_none() => Some(at),
            _ => None,
        };
        let held = self.held_until().filter(|_| self.run.is_none()).map(|due| now + until(due));
        let passivation = match self.is_busy() {
            true => None,
            false => Some(*self.idle_since.get_or_insert(now) + passivate_after),
        };
        if let Some(at) = passivation
            && at <= now
            && !self.listener.as_ref().is_some_and(Listener::remembers_deliveries)
        {
            let wake_at = [self.held_until(), self.recheck_at].into_iter().flatten().min();
            let message =
                directory::Message::Idle { db: self.arguments.db.clone(), actor: myself.get_id(), seen: self.seen, wake_at };
            let _ = self.arguments.directory.cast(message);
            // Asked again later if the directory has sent something meanwhile.
            self.idle_since = Some(now);
        }
        let passivation = passivation.map(|at| if at <= now { now + passivate_after } else { at });
        let next = [debounced, held, self.retry_at.filter(|_| self.run.is_none()), passivation].into_iter().flatten().min();
        self.set_timer(myself, next);
    }

    fn set_timer(&mut self, myself: &ActorRef<Message>, at: Option<Instant>) {
        if self.timer.as_ref().map(|(at, _)| *at) == at {
            return;
        }
        if let Some((_, timer)) = self.timer.take() {
            timer.abort();
        }
        if let Some(at) = at {
            let myself = myself.clone();
            let timer = tokio::spawn(async move {
                tokio::time::sleep_until(at.into()).await;
                let _ = myself.cast(Message::Timer);
            });
            self.timer = Some((at, timer.abort_handle()));
        }
    }
}

/// An actor is some 13 KB, most of it its four mailboxes.
const PASSIVATE_WITHOUT_LISTENER_AFTER: Duration = Duration::from_secs(1);

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn until(at: SystemTime) -> Duration {
    // A held rule's time is compared with the wall clock; a millisecond more keeps the timer from firing too early.
    at.duration_since(SystemTime::now()).unwrap_or_default() + Duration::from_millis(1)
}
