//! DbDirectory: which databases have an actor, and none that is idle.
//!
//! It counts the messages that it sent to each child. A child that is idle says how many it has seen; when they are equal it is
//! drained and forgotten, and a hint that comes before it is gone waits for that. A crash is a debt that is owed again, tried
//! again with backoff, and never counts towards the end of the process.

use crate::db::{Arguments as DbArguments, DbActor, Instance, Message as DbMessage, Shared};
use crate::job::DbName;
use crate::telemetry::Metrics;
use crate::vault::redact_text;
use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};
use serde_json::Value;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

pub enum Message {
    Hint {
        db: DbName,
        instance: Instance,
    },
    /// Its debt is old: make it durable.
    Spill {
        db: DbName,
        done: Option<oneshot::Sender<()>>,
    },
    /// A child has nothing to do, and wants to be woken then.
    Idle {
        db: DbName,
        actor: ActorId,
        seen: u64,
        wake_at: Option<SystemTime>,
    },
    /// A crashed child's time has come.
    Respawn {
        db: DbName,
    },
    Tick,
    /// Databases whose document says that there is work, and from when on.
    Durable {
        found: Vec<(DbName, Option<SystemTime>)>,
    },
    DurableLoaded,
    /// Nobody else takes what is dirty any more.
    LoadAgain,
    /// Answers once every document was looked at.
    AwaitDurable {
        reply: oneshot::Sender<()>,
    },
    /// No new runs.
    Stop,
}

impl ractor::Message for Message {}

pub struct DbDirectory;

pub struct Arguments {
    pub shared: Arc<Shared>,
    pub metrics: Arc<Metrics>,
}

pub struct State {
    arguments: Arguments,
    live: HashMap<DbName, Live>,
    by_id: HashMap<ActorId, DbName>,
    /// Children that are being drained, and the hint that came meanwhile.
    stopping: HashMap<DbName, Option<Instance>>,
    wakes: BTreeSet<(SystemTime, DbName)>,
    wake_of: HashMap<DbName, SystemTime>,
    crashes: HashMap<DbName, u32>,
    waiting_for_durable: Vec<oneshot::Sender<()>>,
    durable_loaded: bool,
    loader: Option<AbortHandle>,
    timer: Option<(SystemTime, AbortHandle)>,
    is_stopping: bool,
}

struct Live {
    actor: ActorRef<DbMessage>,
    sent: u64,
}

impl Drop for State {
    fn drop(&mut self) {
        self.arguments.metrics.db_actors.set(0);
        for task in [self.loader.take(), self.timer.take().map(|(_, timer)| timer)].into_iter().flatten() {
            task.abort();
        }
    }
}

impl Actor for DbDirectory {
    type Msg = Message;
    type State = State;
    type Arguments = Arguments;

    async fn pre_start(&self, myself: ActorRef<Message>, arguments: Arguments) -> Result<State, ActorProcessingErr> {
        let loader = tokio::spawn(load_durable(arguments.shared.clone(), myself)).abort_handle();
        Ok(State {
            arguments,
            live: HashMap::new(),
            by_id: HashMap::new(),
            stopping: HashMap::new(),
            wakes: BTreeSet::new(),
            wake_of: HashMap::new(),
            crashes: HashMap::new(),
            waiting_for_durable: Vec::new(),
            durable_loaded: false,
            loader: Some(loader),
            timer: None,
            is_stopping: false,
        })
    }

    async fn handle(&self, myself: ActorRef<Message>, message: Message, state: &mut State) -> Result<(), ActorProcessingErr> {
        match message {
            // A crashed child waits for its backoff; its debt remembers the hint.
            Message::Hint { db, .. } if state.crashes.contains_key(&db) && !state.live.contains_key(&db) => {}
            Message::Hint { db, instance } => state.hint(&myself, db, instance).await?,
            Message::Spill { db, done } => state.spill(&myself, db, done).await?,
            Message::Idle { db, actor, seen, wake_at } => state.idle(db, actor, seen, wake_at),
            Message::Respawn { db } => state.hint(&myself, db, Instance::Unsure).await?,
            Message::Tick => {
                state.timer = None;
                let now = SystemTime::now();
                while let Some((at, db)) = state.wakes.first().cloned()
                    && at <= now
                {
                    state.forget_wake(&db);
                    state.hint(&myself, db, Instance::Unchanged).await?;
                }
            }
            Message::Durable { found } => {
                let now = SystemTime::now();
                for (db, at) in found {
                    match at.filter(|at| *at > now) {
                        Some(at) => state.wake(db, at),
                        None => state.hint(&myself, db, Instance::Unchanged).await?,
                    }
                }
            }
            Message::DurableLoaded => {
                state.durable_loaded = true;
                state.loader = None;
                for reply in state.waiting_for_durable.drain(..) {
                    let _ = reply.send(());
                }
            }
            // One that is under way may have passed what was written a moment ago.
            Message::LoadAgain => {
                let loading = tokio::spawn(load_durable(state.arguments.shared.clone(), myself.clone())).abort_handle();
                if let Some(before) = state.loader.replace(loading) {
                    before.abort();
                }
            }
            Message::AwaitDurable { reply } if state.durable_loaded => drop(reply.send(())),
            Message::AwaitDurable { reply } => state.waiting_for_durable.push(reply),
            Message::Stop => {
                state.is_stopping = true;
                for live in state.live.values_mut() {
                    live.send(DbMessage::Stop);
                }
            }
        }
        state.set_timer(&myself);
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<Message>,
        event: SupervisionEvent,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorTerminated(actor, _, reason) => state.ended(&myself, actor.get_id(), reason).await?,
            SupervisionEvent::ActorFailed(actor, error) => state.ended(&myself, actor.get_id(), Some(error.to_string())).await?,
            _ => {}
        }
        Ok(())
    }
}

/// A crashed database is tried again after 1 s, 2 s, 4 s … up to a minute.
fn respawn_delay(crashes: u32) -> Duration {
    Duration::from_secs(1 << crashes.saturating_sub(1).min(6)).min(Duration::from_secs(60))
}

impl State {
    async fn hint(&mut self, myself: &ActorRef<Message>, db: DbName, instance: Instance) -> Result<(), ActorProcessingErr> {
        if let Some(waiting) = self.stopping.get_mut(&db) {
            waiting.get_or_insert(Instance::Unchanged);
            if instance != Instance::Unchanged {
                *waiting = Some(instance);
            }
            return Ok(());
        }
        self.forget_wake(&db);
        let live = self.live(myself, &db).await?;
        if !live.send(DbMessage::Hint { instance: instance.clone() }) {
            // It ended by itself a moment ago; its end is on the way to us.
            self.live.remove(&db);
            self.stopping.insert(db, Some(instance));
        }
        Ok(())
    }

    async fn spill(
        &mut self,
        myself: &ActorRef<Message>,
        db: DbName,
        done: Option<oneshot::Sender<()>>,
    ) -> Result<(), ActorProcessingErr> {
        // One that is going down had no debt; what came meanwhile is picked up by the next spill.
        let is_crashed = self.crashes.contains_key(&db) && !self.live.contains_key(&db);
        if !self.stopping.contains_key(&db) && !is_crashed {
            self.live(myself, &db).await?.send(DbMessage::Spill { done });
        }
        Ok(())
    }

    async fn live(&mut self, myself: &ActorRef<Message>, db: &DbName) -> Result<&mut Live, ActorProcessingErr> {
        if !self.live.contains_key(db) {
            let arguments = DbArguments { db: db.clone(), shared: self.arguments.shared.clone(), directory: myself.clone() };
            let (actor, _) = Actor::spawn_linked(None, DbActor, arguments, myself.get_cell()).await?;
            self.by_id.insert(actor.get_id(), db.clone());
            let mut live = Live { actor, sent: 0 };
            if self.is_stopping {
                live.send(DbMessage::Stop);
            }
            self.live.insert(db.clone(), live);
            self.count();
        }
        self.live.get_mut(db).ok_or_else(|| "a child that was just spawned is not there".into())
    }

    fn idle(&mut self, db: DbName, actor: ActorId, seen: u64, wake_at: Option<SystemTime>) {
        let Some(live) = self.live.get(&db) else { return };
        if live.actor.get_id() != actor || live.sent != seen {
            return;
        }
        if let Some(live) = self.live.remove(&db) {
            self.crashes.remove(&db);
            // Errors only where it has ended already; its end is told in any case.
            let _ = live.actor.drain();
            self.stopping.insert(db.clone(), None);
            if let Some(at) = wake_at {
                self.wake(db, at);
            }
            self.count();
        }
    }

    async fn ended(
        &mut self,
        myself: &ActorRef<Message>,
        actor: ActorId,
        reason: Option<String>,
    ) -> Result<(), ActorProcessingErr> {
        let Some(db) = self.by_id.remove(&actor) else { return Ok(()) };
        // Whatever it had claimed is owed again: a run may have begun in the moment before the end.
        self.arguments.shared.debts.release_all(&db);
        if let Some(waiting) = self.stopping.remove(&db) {
            if waiting.is_some() || self.arguments.shared.debts.owes(&db) {
                self.hint(myself, db, waiting.unwrap_or(Instance::Unchanged)).await?;
            }
            return Ok(());
        }
        self.live.remove(&db);
        self.count();
        self.arguments.metrics.db_actor_crashes.inc();
        let crashes = self.crashes.entry(db.clone()).or_default();
        *crashes = crashes.saturating_add(1);
        let delay = respawn_delay(*crashes);
        let reason = redact_text(&reason.unwrap_or_default());
        tracing::error!(%db, reason, crashes = *crashes, retry_in_ms = delay.as_millis(), "the database's actor crashed");
        let myself = myself.clone();
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            let _ = myself.cast(Message::Respawn { db });
        });
        Ok(())
    }

    fn wake(&mut self, db: DbName, at: SystemTime) {
        self.forget_wake(&db);
        self.wakes.insert((at, db.clone()));
        self.wake_of.insert(db, at);
    }

    fn forget_wake(&mut self, db: &DbName) {
        if let Some(at) = self.wake_of.remove(db) {
            self.wakes.remove(&(at, db.clone()));
        }
    }

    fn count(&self) {
        self.arguments.metrics.db_actors.set(i64::try_from(self.live.len()).unwrap_or(i64::MAX));
    }

    fn set_timer(&mut self, myself: &ActorRef<Message>) {
        let due = self.wakes.first().map(|(at, _)| *at);
        if self.timer.as_ref().map(|(at, _)| *at) == due {
            return;
        }
        if let Some((_, timer)) = self.timer.take() {
            timer.abort();
        }
        let Some(at) = due else { return };
        let wait = at.duration_since(SystemTime::now()).unwrap_or_default().min(Duration::from_secs(60));
        let myself = myself.clone();
        let timer = tokio::spawn(async move {
            tokio::time::sleep(wait + Duration::from_millis(1)).await;
            let _ = myself.cast(Message::Tick);
        });
        self.timer = Some((at, timer.abort_handle()));
    }
}

impl Live {
    fn send(&mut self, message: DbMessage) -> bool {
        self.sent += 1;
        self.actor.cast(message).is_ok()
    }
}

const LOAD_PAGE: usize = 1000;

/// Every `change_listener` that says dirty, or backs off, or marks its database as possibly deleted.
async fn load_durable(shared: Arc<Shared>, directory: ActorRef<Message>) {
    let tools = &shared.tools;
    let mut after: Option<String> = None;
    let mut failures = 0;
    loop {
        tools.couch.health().up().await;
        match tools.couch.docs_by_prefix(&tools.spiegel_db, "spiegel_cl_", after.as_deref(), LOAD_PAGE).await {
            Ok(docs) => {
                failures = 0;
                let found: Vec<_> = docs.iter().filter_map(durable_work).collect();
                let last = docs.last().and_then(|doc| doc["_id"].as_str()).map(str::to_string);
                if !found.is_empty() && directory.cast(Message::Durable { found }).is_err() {
                    return;
                }
                match last {
                    Some(last) => after = Some(last),
                    None => {
                        let _ = directory.cast(Message::DurableLoaded);
                        return;
                    }
                }
            }
            Err(error) => {
                if failures == 0 && !error.is_outage() {
                    tracing::error!(db = %tools.spiegel_db, %error, "cannot load the change listeners, trying again");
                }
                tokio::time::sleep(shared.backoff.delay(failures, fastrand::f64()).max(Duration::from_millis(50))).await;
                failures += 1;
            }
        }
    }
}

fn durable_work(doc: &Value) -> Option<(DbName, Option<SystemTime>)> {
    if doc["type"] != "change_listener" {
        return None;
    }
    let db: DbName = doc["db_name"].as_str()?.into();
    let due = doc["dirty_at"].as_str().map(|text| humantime::parse_rfc3339_weak(text).unwrap_or(SystemTime::UNIX_EPOCH));
    let is_dirty = doc["dirty"] != Value::Bool(false);
    match (is_dirty, due) {
        (true, _) => Some((db, None)),
        (false, Some(due)) => Some((db, Some(due))),
        (false, None) if !doc["possibly_deleted_at"].is_null() => Some((db, None)),
        (false, None) => None,
    }
}
