//! Deliveries that failed past their fast retries: parked in CouchDB, tried again, given up only where somebody said so.
//!
//! A delivery that fails becomes one document for its (rule, database, document id) in the database `<db_name>_deliveries`,
//! and the position of its rule goes on. While the document is there, newer changes of that document join it instead of being
//! sent, so that nothing overtakes it. A try reads the document of the user anew and sends its newest state.
//!
//! ```text
//! db/deliver ── standing? ──▶ Book ◀── follow (the database's _changes)
//!     │                        ▲ ▼
//!     └── park ──▶ store ──▶ CouchDB ◀── attempts (claim, read, send through the pool, settle)
//! ```
//! The database is the truth: any process, and any person with its commands, may write it. Before a try its document is
//! claimed, so that two processes do not both make it.

mod attempts;
pub mod counts;
mod follow;
pub mod index;
mod missing;
pub mod operate;
mod park;
pub mod parked;
pub mod patience;
pub mod select;
mod tidy;

pub use park::Owed;

use crate::checkpoints::Checkpoints;
use crate::couch::Couch;
use crate::rules::catalogue::Snapshot;
use crate::rules::rule::Rule;
use crate::schedule::Pool;
use crate::telemetry::Metrics;
use crate::vault::Vault;
use crate::webhook::HttpSender;
use index::{Bounds, Index, Standing};
use parked::Key;
use patience::Patience;
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

#[derive(Debug, Clone)]
pub struct Settings {
    pub patience: Patience,
    pub bounds: Bounds,
    /// How long what is dead or dropped stays listed.
    pub retention: Duration,
    /// How long a database may be missing before what is owed of it is dropped.
    pub assume_deleted_after: Duration,
    /// How long a process keeps a delivery to itself that it tries.
    pub lease: Duration,
    /// The longest that one request may take.
    pub attempt_max: Duration,
}

/// What is known of the deliveries database; it outlives the actors that fill it.
#[derive(Default)]
pub struct Book {
    index: Mutex<Index>,
    /// Something may be due earlier than it was.
    changed: Notify,
    loaded: Notify,
    /// The database is somebody else's, and nothing is written there.
    is_foreign: AtomicBool,
    /// The end is near: no try is begun any more.
    stopping: CancellationToken,
}

impl Book {
    /// Held for moments, and never across an await.
    pub fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_loaded(&self) {
        self.index().set_loaded();
        self.loaded.notify_waiters();
    }

    fn is_foreign(&self) -> bool {
        self.is_foreign.load(Ordering::Relaxed)
    }

    async fn wait_until_loaded(&self) {
        loop {
            let told = self.loaded.notified();
            tokio::pin!(told);
            told.as_mut().enable();
            if self.index().is_loaded() {
                return;
            }
            told.await;
        }
    }
}

/// At the end only, when nobody may be left to tell.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The handle that the stages use.
#[derive(Clone)]
pub struct Deliveries {
    book: Arc<Book>,
    /// Of the deliveries database.
    store: Checkpoints,
    settings: Arc<Settings>,
}

impl Deliveries {
    pub fn new(book: Arc<Book>, store: Checkpoints, settings: Arc<Settings>) -> Self {
        Self { book, store, settings }
    }

    /// Nothing may be sent before it is known what is parked.
    pub async fn loaded(&self) {
        self.book.wait_until_loaded().await;
    }

    /// `received` is when the page that tells of the change had been read.
    pub fn standing(&self, rule: &str, db: &str, (doc_id, rev): (&str, &str), received: Instant) -> Standing {
        let index = self.book.index();
        if index.is_quiet() {
            return Standing::Free;
        }
        index.standing(&Key::of(rule, db, doc_id), rev, received)
    }

    /// What is under way goes on, and nothing is tried any more.
    pub fn stop_trying(&self) {
        self.book.stopping.cancel();
    }

    /// Waits until no try is under way, and so no delivery claimed.
    pub async fn tries_ended(&self) {
        while self.book.index().in_flight() > 0 {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    pub fn is_disabled(&self, rule: &Rule) -> bool {
        self.book.index().is_disabled(&rule.id, &rule.rev)
    }

    /// When a rule that was disabled was enabled again, where we were there.
    pub fn enabled_at(&self, rule: &str) -> Option<SystemTime> {
        self.book.index().enabled_at(rule)
    }
}

pub enum Message {
    /// A task ended, which it never should.
    Ended(&'static str),
}

impl ractor::Message for Message {}

pub struct DeliveriesActor;

#[derive(Clone)]
pub struct Arguments {
    pub deliveries: Deliveries,
    pub couch: Couch,
    /// The deliveries database.
    pub db_name: String,
    pub snapshot: watch::Receiver<Arc<Snapshot>>,
    pub webhooks: Pool<HttpSender>,
    pub vault: Arc<Vault>,
    pub heartbeat: Duration,
    /// This process, in claims.
    pub process: Arc<str>,
    /// A rule was enabled again: its databases have to be looked at.
    pub enabled: Arc<dyn Fn(Arc<Rule>) + Send + Sync>,
    pub metrics: Arc<Metrics>,
}

pub struct State {
    _tasks: Vec<AbortOnDropHandle<()>>,
}

impl Actor for DeliveriesActor {
    type Msg = Message;
    type State = State;
    type Arguments = Arguments;

    async fn pre_start(&self, myself: ActorRef<Message>, arguments: Arguments) -> Result<State, ActorProcessingErr> {
        let follow = supervised(&myself, "follow", follow::run(arguments.clone()));
        let attempts = supervised(&myself, "attempts", attempts::run(arguments));
        Ok(State { _tasks: vec![follow, attempts] })
    }

    async fn handle(&self, _: ActorRef<Message>, message: Message, _: &mut State) -> Result<(), ActorProcessingErr> {
        match message {
            Message::Ended(what) => Err(format!("the task {what} of the deliveries crashed").into()),
        }
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

fn supervised(
    myself: &ActorRef<Message>,
    what: &'static str,
    task: impl Future<Output = ()> + Send + 'static,
) -> AbortOnDropHandle<()> {
    let myself = myself.clone();
    let task = AbortOnDropHandle::new(tokio::spawn(task));
    AbortOnDropHandle::new(tokio::spawn(async move {
        // Only a panic, or the end of the actor, gets here.
        let _ = task.await;
        let _ = myself.cast(Message::Ended(what));
    }))
}
