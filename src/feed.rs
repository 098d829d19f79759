//! GlobalChangesActor: the one feed, and its sweep.
//!
//! It reads `_global_changes` continuously, from the last position, with a watchdog on silence. Every row is only a hint: the
//! sieve says which database it names, the cursor notes the debt, the directory wakes the database. The watermark is saved
//! only as far as all work before it is confirmed or durable.

pub mod cursor;
pub mod sieve;
pub mod sweep;
pub mod watermark;

use crate::checkpoints::Checkpoints;
use crate::couch::{ChangesQuery, Couch, CouchError, FeedLine, Row, Seq};
use crate::db::{Instance, directory};
use crate::feed::sieve::Kind;
use crate::job::DbName;
use crate::rules::catalogue::{Snapshot, changed_rules};
use crate::schedule::backoff::Backoff;
use crate::telemetry::Metrics;
use crate::topology;
use cursor::Ledger;
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use sweep::{Scope, Sweeper};
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;
use watermark::{Swept, Urgency, Watermark};

pub enum Message {
    /// The reader or the sweeper ended, which they never should.
    TaskEnded {
        task: &'static str,
    },
    Save,
    /// `failed` has what could not be saved.
    Saved {
        watermark: Watermark,
        failed: Option<(Option<Swept>, bool)>,
    },
    Spill,
    Swept {
        swept: Swept,
    },
    /// The first position is known, and everything older is looked after: the watermark may be saved.
    Started {
        watermark: Watermark,
    },
    /// Reads no further.
    Stop,
    /// The last word before the end.
    SaveFinally {
        done: oneshot::Sender<()>,
    },
}

impl ractor::Message for Message {}

pub struct GlobalChangesActor;

#[derive(Clone)]
pub struct Arguments {
    pub couch: Couch,
    pub db_name: String,
    pub checkpoints: Checkpoints,
    pub ledger: Arc<Ledger>,
    pub sweeps: Arc<sweep::Queue>,
    pub snapshot: watch::Receiver<Arc<Snapshot>>,
    pub directory: ActorRef<directory::Message>,
    pub topology: ActorRef<topology::Message>,
    pub backoff: Backoff,
    pub metrics: Arc<Metrics>,
    pub settings: Settings,
}

#[derive(Debug, Clone)]
pub struct Settings {
    pub heartbeat: Duration,
    pub save_seq_after: Duration,
    pub spill_after: Duration,
    pub sweep_interval: Duration,
    pub pending_databases_max: usize,
}

pub struct State {
    arguments: Arguments,
    tasks: Vec<AbortHandle>,
    /// None until the watermark may be saved, and while it is being saved.
    watermark: Option<Watermark>,
    is_started: bool,
    swept: Option<Swept>,
    /// The last word was asked for while the one before was on its way.
    final_save: Option<oneshot::Sender<()>>,
}

impl Drop for State {
    fn drop(&mut self) {
        self.arguments.metrics.feed_connected.set(0);
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Actor for GlobalChangesActor {
    type Msg = Message;
    type State = State;
    type Arguments = Arguments;

    async fn pre_start(&self, myself: ActorRef<Message>, arguments: Arguments) -> Result<State, ActorProcessingErr> {
        let (swept_once, sweep_first) = oneshot::channel();
        let reader = Reader { arguments: arguments.clone(), myself: myself.clone(), connected: false };
        let every = |period: Duration, message: fn() -> Message| {
            let myself = myself.clone();
            tokio::spawn(async move {
                loop {
                    tokio::time::sleep(period).await;
                    if myself.cast(message()).is_err() {
                        return;
                    }
                }
            })
            .abort_handle()
        };
        let tasks = vec![
            watched(&myself, "reader", reader.run(sweep_first)),
            watched(&myself, "sweeper", sweep_what_is_asked(arguments.clone(), myself.clone(), swept_once)),
            watched(&myself, "rules", follow_rules(arguments.snapshot.clone(), arguments.sweeps.clone())),
            watched(
                &myself,
                "clock",
                ask_every(arguments.settings.sweep_interval, arguments.sweeps.clone(), arguments.topology.clone()),
            ),
            every(arguments.settings.save_seq_after, || Message::Save),
            every(Duration::from_secs(1), || Message::Spill),
        ];
        Ok(State { arguments, tasks, watermark: None, is_started: false, swept: None, final_save: None })
    }

    async fn handle(&self, myself: ActorRef<Message>, message: Message, state: &mut State) -> Result<(), ActorProcessingErr> {
        let Arguments { ledger, metrics, settings, directory, .. } = &state.arguments;
        match message {
            Message::TaskEnded { task } => return Err(format!("the feed's {task} crashed").into()),
            Message::Save => {
                let to_save = match state.watermark.is_some() {
                    true => ledger.cursor().watermark_to_save(),
                    false => None,
                };
                if (to_save.is_some() || state.swept.is_some())
                    && let Some(watermark) = state.watermark.take()
                {
                    state.save(myself, watermark, to_save);
                }
            }
            Message::Started { watermark } => {
                state.is_started = true;
                state.watermark = Some(watermark);
            }
            Message::Saved { watermark, failed } => {
                state.watermark = Some(watermark);
                if let Some((swept, seq_is_unsaved)) = failed {
                    state.swept = state.swept.take().or(swept);
                    state.arguments.ledger.cursor().save_again(seq_is_unsaved);
                }
                if let Some(done) = state.final_save.take() {
                    state.save_finally(done);
                }
            }
            Message::Spill => {
                let cursor = ledger.cursor();
                metrics.pending_databases.set(i64::try_from(cursor.len()).unwrap_or(i64::MAX));
                let overdue = cursor.overdue(Instant::now(), settings.spill_after);
                drop(cursor);
                for db in overdue {
                    let _ = directory.cast(directory::Message::Spill { db, done: None });
                }
            }
            Message::Swept { swept } => state.swept = Some(swept),
            Message::Stop => {
                state.arguments.checkpoints.hurry();
                for task in state.tasks.drain(..) {
                    task.abort();
                }
                state.arguments.metrics.feed_connected.set(0);
            }
            Message::SaveFinally { done } => state.save_finally(done),
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
    fn save(&mut self, myself: ActorRef<Message>, mut watermark: Watermark, value: Option<Seq>) {
        let checkpoints = self.arguments.checkpoints.clone();
        let swept = self.swept.take();
        tokio::spawn(async move {
            let saved = watermark.save(&checkpoints, value.clone(), swept.clone(), false, Urgency::Along).await;
            let failed = saved.err().map(|error| {
                tracing::error!(%error, "cannot save the position of the feed");
                (swept, value.is_some())
            });
            let _ = myself.cast(Message::Saved { watermark, failed });
        });
    }

    fn save_finally(&mut self, done: oneshot::Sender<()>) {
        // Never started: there is nothing to say yet, and a clean stop would be a lie.
        if !self.is_started {
            let _ = done.send(());
            return;
        }
        let Some(mut watermark) = self.watermark.take() else {
            self.final_save = Some(done);
            return;
        };
        let (ledger, checkpoints, sweeps, swept) =
            (self.arguments.ledger.clone(), self.arguments.checkpoints.clone(), self.arguments.sweeps.clone(), self.swept.take());
        tokio::spawn(async move {
            let (value, is_clean) = {
                let cursor = ledger.cursor();
                // A sweep that was asked for and not finished is owed as well.
                (cursor.watermark().cloned(), cursor.is_empty() && sweeps.is_empty())
            };
            match watermark.save(&checkpoints, value, swept, is_clean, Urgency::Now).await {
                Ok(()) => {
                    let _ = done.send(());
                }
                Err(error) => tracing::error!(%error, "cannot save the position of the feed"),
            }
        });
    }
}

/// Runs a task that should never end; its end, by a panic above all, is told to the actor.
fn watched(myself: &ActorRef<Message>, task: &'static str, work: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
    let running = tokio::spawn(work);
    let abort = running.abort_handle();
    let myself = myself.clone();
    tokio::spawn(async move {
        let ended = running.await;
        if !ended.is_err_and(|error| error.is_cancelled()) {
            let _ = myself.cast(Message::TaskEnded { task });
        }
    });
    abort
}

struct Reader {
    arguments: Arguments,
    myself: ActorRef<Message>,
    connected: bool,
}

/// While `_global_changes` is missing, only the sweep sees changes.
const SWEEP_WITHOUT_FEED_EVERY: Duration = Duration::from_secs(60);
const LOOK_FOR_FEED_EVERY: Duration = Duration::from_secs(2);
/// So many failures in a row while CouchDB answers others are the feed's own trouble.
const OUTAGE_BEGINNINGS: u32 = 3;
/// A feed that stayed open for so long was not failing.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);

impl Reader {
    async fn run(mut self, mut swept_once: oneshot::Receiver<()>) {
        let Arguments { snapshot, directory, .. } = &self.arguments;
        let mut snapshot = snapshot.clone();
        if snapshot.wait_for(|snapshot| snapshot.is_loaded()).await.is_err() {
            return std::future::pending().await;
        }
        let (reply, durable_loaded) = oneshot::channel();
        let _ = directory.cast(directory::Message::AwaitDurable { reply });
        if durable_loaded.await.is_err() {
            return std::future::pending().await;
        }
        let mut watermark = self.load_watermark().await;
        let is_first_start = watermark.value().is_none();
        // Whoever deletes the position wants everything to be looked at.
        let trusting = if is_first_start { sweep::Queue::TRUSTING_MAX } else { watermark.sweeps_trusting() };
        self.arguments.sweeps.resume(trusting);
        let rules = snapshot.borrow().rules_hash();
        let may_skip_sweep = watermark.can_skip_sweep(SystemTime::now(), self.arguments.settings.sweep_interval, &rules);
        self.start_at(&watermark).await;
        // From here on a crash is not a clean stop.
        if let Err(error) = watermark.save(&self.arguments.checkpoints, None, None, false, Urgency::Now).await {
            tracing::error!(%error, "cannot save that the feed was started");
        }
        if !may_skip_sweep || is_first_start {
            self.sweep_soon();
        }
        match is_first_start {
            // The candidate is worth nothing before everything older was looked at.
            true => {
                let myself = self.myself.clone();
                tokio::spawn(async move {
                    if swept_once.await.is_ok() {
                        let _ = myself.cast(Message::Started { watermark });
                    }
                });
            }
            false => {
                swept_once.close();
                let _ = self.myself.cast(Message::Started { watermark });
            }
        }
        self.read_forever().await;
    }

    async fn load_watermark(&self) -> Watermark {
        match Watermark::load(&self.arguments.checkpoints).await {
            Ok(watermark) => watermark,
            // The checkpoints are rebuilt, and we with them.
            Err(_) => std::future::pending().await,
        }
    }

    /// After our own crash the ledger knows better than the document; on a first start the feed's end is the candidate.
    async fn start_at(&self, watermark: &Watermark) {
        let ledger = &self.arguments.ledger;
        if ledger.cursor().last_seen().is_some() {
            ledger.cursor().forget_fingerprints();
            let owing = ledger.cursor().owing();
            for db in owing {
                ledger.cursor().release_all_of(&db);
                let _ = self.arguments.directory.cast(directory::Message::Hint { db, instance: Instance::Unsure });
            }
            return;
        }
        if let Some(value) = watermark.value() {
            return ledger.cursor().start_at(Some(value));
        }
        loop {
            self.arguments.couch.health().up().await;
            let now = ChangesQuery { since: Some(Seq::from("now")), limit: Some(1), ..ChangesQuery::default() };
            match self.arguments.couch.changes("_global_changes", &now).await {
                Ok(page) => return ledger.cursor().start_at(Some(page.last_seq)),
                // It will be read from its beginning once it is there.
                Err(CouchError::NotFound(_)) => return,
                Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
            }
        }
    }

    async fn read_forever(&mut self) {
        let mut failures: u32 = 0;
        let mut failing_since: Option<tokio::time::Instant> = None;
        let mut is_said = false;
        let mut is_missing = false;
        let mut last_sweep = tokio::time::Instant::now();
        loop {
            self.arguments.couch.health().up().await;
            let opened = tokio::time::Instant::now();
            let ended = self.read(&mut is_missing).await;
            self.arguments.metrics.feed_connected.set(0);
            if std::mem::take(&mut self.connected) {
                self.arguments.metrics.feed_reconnects.inc();
                // What was written while nobody listened to the databases' events never gets a row.
                self.sweep_soon();
            }
            if opened.elapsed() >= HEALTHY_AFTER {
                failures = 0;
                failing_since = None;
                is_said = false;
            }
            let delay = match ended {
                Err(CouchError::NotFound(_)) => {
                    if !std::mem::replace(&mut is_missing, true) {
                        tracing::error!(
                            "the database _global_changes does not exist: changes are found by a sweep each minute until `spiegel install` creates it"
                        );
                        last_sweep = tokio::time::Instant::now();
                        self.sweep_soon();
                    } else if last_sweep.elapsed() >= SWEEP_WITHOUT_FEED_EVERY {
                        last_sweep = tokio::time::Instant::now();
                        self.sweep_soon();
                    }
                    LOOK_FOR_FEED_EVERY
                }
                Err(error) if error.is_unknown_seq() && self.arguments.ledger.cursor().last_seen().is_some() => {
                    tracing::warn!(%error, "the position of the feed is none of this server's, reading _global_changes from its beginning");
                    self.arguments.ledger.cursor().start_at(None);
                    self.sweep_soon();
                    LOOK_FOR_FEED_EVERY
                }
                ended => {
                    let since = *failing_since.get_or_insert_with(tokio::time::Instant::now);
                    // The beginning of an outage looks the same; CouchHealth tells of that.
                    let is_ours = match &ended {
                        Err(error) if error.is_outage() => {
                            since.elapsed() >= HEALTHY_AFTER && self.arguments.couch.health().is_up()
                        }
                        ended => ended.is_err(),
                    };
                    if let Err(error) = &ended
                        && is_ours
                        && !std::mem::replace(&mut is_said, true)
                    {
                        tracing::error!(%error, "cannot read _global_changes, trying again");
                    }
                    // At once the first time, then patiently.
                    let delay = match failures {
                        0 => Duration::ZERO,
                        failures => self.arguments.backoff.delay(failures - 1, fastrand::f64()).min(Duration::from_secs(5)),
                    };
                    failures = failures.saturating_add(1);
                    delay
                }
            };
            tokio::time::sleep(delay).await;
        }
    }

    /// Reads until the feed ends.
    async fn read(&mut self, is_missing: &mut bool) -> Result<(), CouchError> {
        let Arguments { couch, ledger, settings, metrics, .. } = self.arguments.clone();
        let since = ledger.cursor().last_seen().cloned();
        let query = ChangesQuery { since, ..ChangesQuery::default() };
        let mut feed = couch.changes_feed("_global_changes", &query, settings.heartbeat).await?;
        self.connected = true;
        if std::mem::take(is_missing) {
            tracing::info!("the database _global_changes is there again");
            // What was written before it was made again has no row in it.
            self.sweep_soon();
        }
        metrics.feed_connected.set(1);
        loop {
            ledger.room(settings.pending_databases_max).await;
            match feed.next().await? {
                None => return Ok(()),
                Some(FeedLine::Heartbeat) => {}
                Some(FeedLine::Row(row)) => self.take(&row),
                // Its database was deleted: what comes next is another one's, from its beginning.
                Some(FeedLine::LastSeq(_)) => return Ok(()),
                Some(FeedLine::Malformed(what)) => {
                    if metrics.feed_malformed_rows.inc() == 0 {
                        tracing::error!(what, "malformed row in _global_changes, passed over; further ones are only counted");
                    }
                }
            }
        }
    }

    fn take(&self, row: &Row) {
        let Arguments { ledger, snapshot, directory, topology, metrics, .. } = &self.arguments;
        metrics.feed_rows.inc();
        let Some((kind, name)) = sieve::database_of(&row.id) else {
            ledger.cursor().row(row.seq.clone(), None, Instant::now());
            return;
        };
        let snapshot = snapshot.borrow().clone();
        if snapshot.is_own(name) {
            return ledger.cursor().own_row(row.seq.clone());
        }
        let db: DbName = name.into();
        if kind != Kind::Updated && !snapshot.replicators_to(name).is_empty() {
            let _ = topology.cast(topology::Message::TargetMade { db: db.clone() });
        }
        if !snapshot.watches(name) {
            ledger.cursor().row(row.seq.clone(), None, Instant::now());
            return;
        }
        metrics.feed_hints.inc();
        ledger.cursor().row(row.seq.clone(), Some(&db), Instant::now());
        let instance = if kind == Kind::Updated { Instance::Unchanged } else { Instance::Unsure };
        let _ = directory.cast(directory::Message::Hint { db, instance });
    }

    fn sweep_soon(&self) {
        self.arguments.sweeps.ask(Scope::All);
    }
}

/// New and edited rules mean databases to look at.
async fn follow_rules(mut snapshots: watch::Receiver<Arc<Snapshot>>, sweeps: Arc<sweep::Queue>) {
    let mut known = snapshots.borrow_and_update().clone();
    while snapshots.changed().await.is_ok() {
        let now = snapshots.borrow_and_update().clone();
        let changed = changed_rules(&known, &now);
        // The first load is the start's business.
        if known.is_loaded() && !changed.is_empty() {
            sweeps.ask(Scope::Rules(changed));
        }
        known = now;
    }
}

async fn ask_every(sweep_interval: Duration, sweeps: Arc<sweep::Queue>, topology: ActorRef<topology::Message>) {
    loop {
        tokio::time::sleep(sweep_interval).await;
        sweeps.ask(Scope::All);
        let _ = topology.cast(topology::Message::PollRemote);
    }
}

/// Waits a moment before a sweep, so that what is asked for together is swept together.
const GATHER: Duration = Duration::from_millis(100);

async fn sweep_what_is_asked(arguments: Arguments, myself: ActorRef<Message>, swept_once: oneshot::Sender<()>) {
    let mut swept_once = Some(swept_once);
    let Arguments { couch, db_name: spiegel_db, ledger, sweeps, snapshot, directory, topology, metrics, settings, .. } =
        arguments;
    let mut sweeper = Sweeper {
        couch: couch.clone(),
        spiegel_db: spiegel_db.clone(),
        ledger,
        snapshot: snapshot.clone(),
        directory,
        topology,
        metrics,
        pending_databases_max: settings.pending_databases_max,
        targets: Default::default(),
    };
    let mut failures = 0;
    loop {
        let _ = sweeps.next().await;
        tokio::time::sleep(GATHER).await;
        let (scope, asks) = sweeps.next().await;
        couch.health().up().await;
        let rules = snapshot.borrow().rules_hash();
        let ask_all = sweeps.asks_all(&scope);
        match sweeper.sweep(&scope, ask_all).await {
            Ok(found) => {
                failures = 0;
                tracing::debug!(found, ask_all, "swept");
                let trusting = sweeps.done(&scope, asks, ask_all);
                if matches!(scope, Scope::All) {
                    if let Err(error) = Watermark::tidy(&couch, &spiegel_db).await {
                        tracing::debug!(%error, "cannot look for conflicted revisions of the watermark");
                    }
                    let _ = myself.cast(Message::Swept { swept: Swept { at: SystemTime::now(), rules, trusting } });
                    if let Some(swept_once) = swept_once.take() {
                        let _ = swept_once.send(());
                    }
                }
            }
            Err(error) => {
                failures += 1;
                // The beginning of an outage looks the same; CouchHealth tells of that.
                if failures == OUTAGE_BEGINNINGS {
                    tracing::error!(%error, "the sweep fails again and again, trying on");
                }
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}
