//! Topology: which replicator runs when.
//!
//! It turns `replicator` documents and dirty databases into replication jobs for the ReplicatorPool, and writes back what
//! cannot finish soon. The decisions are in `topology/states.rs`; here are the mailbox, the one timer and the requests.

pub mod attempt;
mod change;
pub mod replicator;
pub mod states;
pub mod status;

use crate::checkpoints::Checkpoints;
use crate::couch::Couch;
use crate::job::{Completion, DbName, Piece};
use crate::locks::mixed::Mixed;
use crate::replicate::Progress;
use crate::rules::catalogue::Snapshot;
use crate::schedule::backoff::Backoff;
use crate::telemetry::{Metrics, StateLabels};
use crate::topology::replicator::Replicator;
use attempt::{Means, NoRun, ended_of};
use change::{may_clean, owe, write};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use serde_json::Value;
use states::{Action, Change, Id, Line, RunFailure, Saved, States};
use status::{RunState, Status};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;

pub enum Message {
    /// The documents changed.
    Documents,
    /// A database changed: its replicators run; `done` is told once each ran or is durable.
    SourceChanged {
        db: DbName,
        done: oneshot::Sender<()>,
    },
    /// A database was made: replicators into it may have lost their documents there.
    TargetMade {
        db: DbName,
    },
    /// What this replicator brought to its target may be gone.
    RunAgain {
        id: Id,
    },
    /// Replicators whose source nobody can watch here.
    PollRemote,
    /// What waits for this database's replicators becomes durable.
    Spill {
        db: DbName,
        done: oneshot::Sender<()>,
    },
    RunEnded {
        id: Id,
        result: Result<(), RunFailure>,
    },
    /// No engine can make what its document asks for.
    CannotRun {
        id: Id,
        error: String,
    },
    Saved {
        id: Id,
        change: Change,
        saved: Option<Saved>,
    },
    Tick,
    /// How many there are of each state is counted again.
    Count,
    /// No new runs; what runs or waits becomes durable.
    Shutdown {
        done: oneshot::Sender<()>,
    },
    Status {
        reply: oneshot::Sender<Status>,
    },
}

impl ractor::Message for Message {}

/// So many replicators are told of by name.
const STATUS_DOCS_MAX: usize = 100;
/// The states are counted from end to end, no more often than this: there may be a hundred thousand.
const COUNT_EACH: Duration = Duration::from_secs(5);

pub struct Topology;

pub struct Arguments {
    pub couch: Couch,
    pub snapshot: watch::Receiver<Arc<Snapshot>>,
    pub checkpoints: Checkpoints,
    pub means: Means,
    /// Replicators are left to whoever locks them.
    pub mixed: Mixed,
    pub backoff: Backoff,
    /// The watched server, and its host and port: a replicator whose source is elsewhere is polled.
    pub local_url: url::Url,
    pub local_host: String,
    pub metrics: Arc<Metrics>,
}

pub struct State {
    arguments: Arguments,
    states: States,
    /// Writes for one document go one after the other, each with the revision that the one before left.
    saves: HashMap<Id, VecDeque<(Change, Vec<Piece>)>>,
    timer: Option<(SystemTime, AbortHandle)>,
    count_timer: Option<AbortHandle>,
    followers: [AbortHandle; 2],
    stopping: bool,
}

impl Drop for State {
    fn drop(&mut self) {
        self.followers.iter().for_each(AbortHandle::abort);
        if let Some((_, timer)) = self.timer.take() {
            timer.abort();
        }
        if let Some(timer) = self.count_timer.take() {
            timer.abort();
        }
    }
}

impl Actor for Topology {
    type Msg = Message;
    type State = State;
    type Arguments = Arguments;

    async fn pre_start(&self, myself: ActorRef<Message>, arguments: Arguments) -> Result<State, ActorProcessingErr> {
        let mut changes = arguments.snapshot.clone();
        changes.mark_changed();
        let native = arguments.means.native.clone();
        let again = tokio::spawn({
            let myself = myself.clone();
            async move {
                loop {
                    let id = native.again().await;
                    if myself.cast(Message::RunAgain { id }).is_err() {
                        return;
                    }
                }
            }
        });
        let mut mixed = arguments.mixed.subscribe();
        let follower = tokio::spawn(async move {
            loop {
                let is_there = tokio::select! {
                    changed = changes.changed() => changed.is_ok(),
                    changed = mixed.changed() => changed.is_ok(),
                };
                if !is_there {
                    return;
                }
                if myself.cast(Message::Documents).is_err() {
                    return;
                }
            }
        });
        let followers = [follower.abort_handle(), again.abort_handle()];
        let (states, saves) = (States::default(), HashMap::new());
        Ok(State { arguments, states, saves, timer: None, count_timer: None, followers, stopping: false })
    }

    async fn handle(&self, myself: ActorRef<Message>, message: Message, state: &mut State) -> Result<(), ActorProcessingErr> {
        let now = SystemTime::now();
        let snapshot = state.arguments.snapshot.borrow().clone();
        let mut is_news = true;
        let mut actions = state.states.by_locks(state.arguments.mixed.is_on());
        actions.extend(match message {
            Message::Documents if snapshot.is_loaded() => state.states.documents(snapshot.replicators()),
            Message::Documents => Vec::new(),
            Message::SourceChanged { db, done } => {
                let replicators = snapshot.replicators_from(&db);
                let mut actions = state.meet(replicators);
                let pieces = Completion::keeping(done, replicators.len());
                let each = replicators.iter().zip(pieces);
                actions.extend(each.flat_map(|(replicator, piece)| state.states.dirty(now, &replicator.id, Some(piece))));
                actions
            }
            Message::TargetMade { db } => {
                let replicators = snapshot.replicators_to(&db);
                let mut actions = state.meet(replicators);
                actions.extend(replicators.iter().flat_map(|replicator| state.states.dirty(now, &replicator.id, None)));
                actions
            }
            Message::RunAgain { id } => {
                let mut actions = state.meet(snapshot.replicators().get(&id).map_or(&[], std::slice::from_ref));
                actions.extend(state.states.dirty(now, &id, None));
                actions
            }
            Message::PollRemote => {
                let remote = snapshot.replicators().values();
                let remote = remote.filter(|replicator| !replicator.source.is_local(&state.arguments.local_url));
                remote.flat_map(|replicator| state.states.dirty(now, &replicator.id, None)).collect()
            }
            Message::Spill { db, done } => {
                let replicators = snapshot.replicators_from(&db);
                let mut actions = state.meet(replicators);
                let pieces = Completion::keeping(done, replicators.len());
                for (replicator, piece) in replicators.iter().zip(pieces) {
                    // The database owes work that we may not have been told of yet.
                    actions.extend(state.states.dirty(now, &replicator.id, None));
                    actions.extend(state.states.spill(&replicator.id, Some(piece)));
                }
                actions
            }
            Message::RunEnded { id, result } => {
                let backoff = &state.arguments.backoff;
                state.states.run_ended(now, &id, result, |retries| backoff.delay(retries, fastrand::f64()))
            }
            Message::CannotRun { id, error } => state.states.cannot_run(&id, &error),
            Message::Saved { id, change, saved } => state.saved(&myself, &snapshot, id, &change, saved),
            Message::Tick => {
                state.timer = None;
                state.states.tick(now)
            }
            Message::Shutdown { done } => {
                state.stopping = true;
                let busy = state.states.busy();
                let mut pieces = Completion::keeping(done, busy).into_iter();
                state.states.spill_all(|| pieces.next())
            }
            Message::Status { reply } => {
                // Whoever asked may have given up waiting.
                let _ = reply.send(state.states.status(snapshot.invalid_replicators(), STATUS_DOCS_MAX));
                is_news = false;
                Vec::new()
            }
            Message::Count => {
                state.count_timer = None;
                // Of a run's beginning nobody tells.
                is_news = state.count(&snapshot) > 0;
                Vec::new()
            }
        });
        for action in actions {
            state.perform(&myself, action);
        }
        state.set_timer(&myself, now);
        if is_news {
            state.set_count_timer(&myself);
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
    /// A database's word may overtake the documents' own.
    fn meet(&mut self, replicators: &[Arc<Replicator>]) -> Vec<Action> {
        let unknown = replicators.iter().filter(|replicator| self.states.replicator(&replicator.id).is_none());
        let unknown: Vec<_> = unknown.collect();
        unknown.into_iter().flat_map(|replicator| self.states.document(&replicator.id, replicator)).collect()
    }

    fn perform(&mut self, myself: &ActorRef<Message>, action: Action) {
        match action {
            Action::Start(id) => self.start(myself, id),
            Action::Save { id, change, pieces } => {
                let queue = self.saves.entry(id.clone()).or_default();
                // During an outage spills are asked for again and again; what waits behind the write under way is one write.
                if queue.len() > 1
                    && let Some((waiting, told)) = queue.back_mut()
                    && *waiting != Change::Clean
                    && change != Change::Clean
                {
                    *waiting = change;
                    told.extend(pieces);
                    return self.states.folded(&id);
                }
                queue.push_back((change, pieces));
                if queue.len() == 1 {
                    self.save_next(myself, id);
                }
            }
            Action::Log { id, line } => self.log(&id, line),
        }
    }

    fn start(&mut self, myself: &ActorRef<Message>, id: Id) {
        // What does not run any more is durable, or still owed by the feed.
        if self.stopping {
            return;
        }
        if self.arguments.mixed.is_on() {
            if let Some(action) = self.states.leave(&id) {
                self.perform(myself, action);
            }
            return;
        }
        let Some(replicator) = self.states.replicator(&id).cloned() else { return };
        let ended = {
            let (myself, id) = (myself.clone(), id.clone());
            move |result| drop(myself.cast(Message::RunEnded { id, result }))
        };
        let progress = Arc::new(Progress::default());
        let snapshot = self.arguments.snapshot.borrow().clone();
        let outcome = match self.arguments.means.start(&replicator, &snapshot, progress.clone()) {
            Ok(outcome) => outcome,
            Err(NoRun::Failed(failure)) => return ended(Err(failure)),
            Err(NoRun::Never { error }) => return drop(myself.cast(Message::CannotRun { id, error })),
        };
        self.states.asked_for(&id, progress);
        let couch = self.arguments.couch.clone();
        tokio::spawn(async move { ended(ended_of(&couch, &replicator, outcome).await) });
    }

    /// Starts the write at the head of a document's queue; it stays there until it is confirmed.
    fn save_next(&mut self, myself: &ActorRef<Message>, id: Id) {
        let Some((change, _)) = self.saves.get(&id).and_then(VecDeque::front) else { return };
        let change = change.clone();
        let known_rev = self.states.known_rev(&id).cloned().unwrap_or_default();
        let (checkpoints, myself) = (self.arguments.checkpoints.clone(), myself.clone());
        let (saved_id, saved_change) = (id.clone(), change.clone());
        let mixed = self.arguments.mixed.clone();
        let saving = tokio::spawn(async move {
            let (mut foreign, mut declined) = (false, false);
            let update = |doc: &mut Value| {
                if change == Change::Owed {
                    return owe(doc);
                }
                foreign = doc["_rev"].as_str() != Some(&*known_rev);
                declined = change == Change::Clean && !may_clean(doc, &known_rev, mixed.is_on());
                if declined {
                    return false;
                }
                write(doc, &change, SystemTime::now());
                true
            };
            match checkpoints.update(&id, update).await {
                Ok(Some(doc)) if !declined => doc["_rev"].as_str().map(|rev| Saved { rev: rev.to_string(), foreign }),
                Ok(_) => None,
                Err(error) => {
                    tracing::error!(id = %id, %error, "cannot write the replicator document");
                    None
                }
            }
        });
        tokio::spawn(async move {
            // A panic, too, is a write that was not made.
            let saved = saving.await.unwrap_or(None);
            let _ = myself.cast(Message::Saved { id: saved_id, change: saved_change, saved });
        });
    }

    fn saved(
        &mut self,
        myself: &ActorRef<Message>,
        snapshot: &Snapshot,
        id: Id,
        change: &Change,
        saved: Option<Saved>,
    ) -> Vec<Action> {
        let confirmed = saved.is_some();
        let mut actions = self.states.saved(&id, change, saved);
        if confirmed && *change == Change::Owed && !self.arguments.mixed.is_on() {
            // Nobody takes it by its lock any more.
            actions.extend(self.states.dirty(SystemTime::now(), &id, None));
        }
        if let Some(queue) = self.saves.get_mut(&id) {
            if let Some((_, pieces)) = queue.pop_front()
                && (confirmed || !snapshot.replicators().contains_key(&id))
            {
                // A piece that is dropped instead tells its database that this is still owed.
                pieces.into_iter().for_each(Piece::done);
            }
            match queue.is_empty() {
                true => drop(self.saves.remove(&id)),
                false => self.save_next(myself, id.clone()),
            }
        }
        if let Some(replicator) = snapshot.replicators().get(&id) {
            actions.extend(self.states.document(&id, replicator));
        }
        actions
    }

    fn log(&self, id: &Id, line: Line) {
        let Some(replicator) = self.states.replicator(id) else { return };
        let (source, target) = (replicator.source.to_string(), replicator.target.to_string());
        match line {
            Line::Failing { error, retry_in, missing: true } => {
                tracing::warn!(%id, source, target, error, retry_in_ms = retry_in.as_millis(), "a database of the replicator is missing, backing off");
            }
            Line::Failing { error, retry_in, missing: false } => {
                tracing::warn!(%id, source, target, error, retry_in_ms = retry_in.as_millis(), "replication failed, backing off");
            }
            Line::CannotRun { error } => {
                tracing::error!(%id, source, target, error, "the replicator cannot run, it is passed over until its document is changed");
            }
            Line::Recovered { failures } => tracing::info!(%id, source, target, failures, "replication works again"),
        }
    }

    /// How many are under way or wait for their turn.
    fn count(&self, snapshot: &Snapshot) -> usize {
        let counts = self.states.counts(snapshot.invalid_replicators());
        for state in RunState::ALL {
            let gauge = self.arguments.metrics.replicators.get_or_create(&StateLabels { state: state.name() }).clone();
            gauge.set(i64::try_from(counts.of(state)).unwrap_or(i64::MAX));
        }
        [RunState::Running, RunState::Pending, RunState::Initializing].map(|state| counts.of(state)).iter().sum()
    }

    fn set_count_timer(&mut self, myself: &ActorRef<Message>) {
        if self.count_timer.is_none() {
            let myself = myself.clone();
            let timer = tokio::spawn(async move {
                tokio::time::sleep(COUNT_EACH).await;
                let _ = myself.cast(Message::Count);
            });
            self.count_timer = Some(timer.abort_handle());
        }
    }

    fn set_timer(&mut self, myself: &ActorRef<Message>, now: SystemTime) {
        let due = self.states.next_due();
        if self.timer.as_ref().map(|(at, _)| *at) == due {
            return;
        }
        if let Some((_, timer)) = self.timer.take() {
            timer.abort();
        }
        let Some(at) = due else { return };
        // The clock may be set back; a look each minute bounds what that can do.
        let wait = at.duration_since(now).unwrap_or_default().min(Duration::from_secs(60));
        let myself = myself.clone();
        let timer = tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            let _ = myself.cast(Message::Tick);
        });
        self.timer = Some((at, timer.abort_handle()));
    }
}
