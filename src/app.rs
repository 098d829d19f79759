//! The Supervisor, and the one wiring function.
//!
//! Children stand in dependency order. When one fails, it and those that need it are rebuilt, with backoff, and nobody else is;
//! too many restarts in a window end the process. The last stage is started first, and the first stage is drained first.

pub mod couch_health;
mod delivery_settings;
mod means;
mod operations;
pub mod restart;
mod signals;
mod status;
mod stop;
#[cfg(all(test, feature = "dev"))]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;

use crate::admin::{self, Admin};
use crate::checkpoints::{self, Checkpoints, CheckpointsActor};
use crate::config::{Role, Settings};
use crate::couch::Couch;
use crate::db::directory::{self, DbDirectory};
use crate::db::rule_health::RuleHealth;
use crate::db::{self, Shared, update_listener};
use crate::deliveries::{self, Book, Deliveries, DeliveriesActor};
use crate::feed::cursor::Ledger;
use crate::feed::sweep::Scope;
use crate::feed::{self, GlobalChangesActor, sweep};
use crate::locks::mend::Phantoms;
use crate::locks::mixed::Mixed;
use crate::locks::{self, sign::OwnRevs};
use crate::replicate::native::{NativeEngine, NativeSettings};
use crate::replicate::{CouchEngine, Engines, Replicator};
use crate::rules::catalogue::Snapshot;
use crate::rules::{self, RulesActor};
use crate::schedule::Pool;
use crate::schedule::backoff::Backoff;
use crate::telemetry::{ChildLabels, Metrics};
use crate::topology::{self, Topology};
use crate::vault::Vault;
use crate::webhook::HttpSender;
use crate::workers::{self, Workers};
use anyhow::Context;
use couch_health::CouchHealth;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, SupervisionEvent};
use restart::{Child, Decision, Restarts, to_rebuild};
pub use signals::Signals;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use stop::Stopping;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub enum Message {
    Rebuild { generation: u64 },
    Shutdown { done: oneshot::Sender<()> },
}

impl ractor::Message for Message {}

/// What outlives every child.
pub struct World {
    settings: Settings,
    couch: Couch,
    vault: Arc<Vault>,
    metrics: Arc<Metrics>,
    ledger: Arc<Ledger>,
    sweeps: Arc<sweep::Queue>,
    publish: watch::Sender<Arc<Snapshot>>,
    rule_health: RuleHealth,
    /// What is known of the deliveries database.
    book: Arc<Book>,
    /// This process, where documents say who works on them.
    process: Arc<str>,
    started: Instant,
    /// The one that lives now, for whoever asks what the replicators are doing.
    topology: watch::Sender<Option<ActorRef<topology::Message>>>,
    /// The same, for what it knows of hosts.
    webhooks: watch::Sender<Option<Pool<HttpSender>>>,
    /// Keeps what it knows of checkpoints over a crash of the pool.
    native: Arc<NativeEngine>,
    /// What this process wrote into the spiegel database lately.
    own: Arc<OwnRevs>,
    /// Whether others are at work in the spiegel database, so that work is taken by locks.
    mixed: Mixed,
}

pub struct Supervisor;

pub struct State {
    world: Arc<World>,
    built: Built,
    cells: HashMap<Child, ActorCell>,
    missing: Vec<Child>,
    restarts: Restarts,
    /// A rebuild that was planned before another failure is not the current one any more.
    generation: u64,
    is_stopping: bool,
}

/// The handles that children get of those they need.
#[derive(Default)]
struct Built {
    checkpoints: Option<Checkpoints>,
    delivery_store: Option<Checkpoints>,
    webhooks: Option<Pool<HttpSender>>,
    replicators: Option<Pool<Replicator>>,
    topology: Option<ActorRef<topology::Message>>,
    directory: Option<ActorRef<directory::Message>>,
    feed: Option<ActorRef<feed::Message>>,
    workers: Option<ActorRef<workers::Message>>,
}

impl Actor for Supervisor {
    type Msg = Message;
    type State = State;
    type Arguments = Arc<World>;

    async fn pre_start(&self, myself: ActorRef<Message>, world: Arc<World>) -> Result<State, ActorProcessingErr> {
        let mut state = State {
            missing: Child::all_of(world.settings.role),
            world,
            built: Built::default(),
            cells: HashMap::new(),
            restarts: Restarts::default(),
            generation: 0,
            is_stopping: false,
        };
        state.build_missing(&myself).await?;
        Ok(state)
    }

    async fn handle(&self, myself: ActorRef<Message>, message: Message, state: &mut State) -> Result<(), ActorProcessingErr> {
        match message {
            Message::Rebuild { generation } if generation == state.generation && !state.is_stopping => {
                if let Err(error) = state.build_missing(&myself).await {
                    return state.plan_rebuild(&myself, "a child", &error.to_string());
                }
            }
            Message::Rebuild { .. } => {}
            Message::Shutdown { done } => {
                state.is_stopping = true;
                let stopping = Stopping {
                    checkpoints: state.built.checkpoints.clone(),
                    feed: state.built.feed.clone(),
                    directory: state.built.directory.clone(),
                    topology: state.built.topology.clone(),
                    webhooks: state.built.webhooks.clone(),
                    deliveries: state.deliveries().ok(),
                    workers: state.built.workers.clone(),
                    ledger: state.world.ledger.clone(),
                    native: state.world.native.clone(),
                    deadline: state.world.settings.shutdown_deadline,
                };
                tokio::spawn(async move {
                    stopping.run().await;
                    let _ = done.send(());
                });
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<Message>,
        event: SupervisionEvent,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        let (cell, reason) = match event {
            SupervisionEvent::ActorFailed(cell, error) => (cell, error.to_string()),
            SupervisionEvent::ActorTerminated(cell, _, reason) => (cell, reason.unwrap_or_else(|| String::from("stopped"))),
            _ => return Ok(()),
        };
        let Some(child) = state.cells.iter().find(|(_, known)| known.get_id() == cell.get_id()).map(|(child, _)| *child) else {
            // One that we stopped ourselves.
            return Ok(());
        };
        if state.is_stopping {
            return Ok(());
        }
        for gone in to_rebuild(child, state.world.settings.role).into_iter().rev() {
            if let Some(cell) = state.cells.remove(&gone)
                && gone != child
            {
                cell.stop_children_and_wait(None, Some(Duration::from_secs(1))).await;
                let _ = cell.stop_and_wait(None, Some(Duration::from_secs(1))).await;
            }
            if !state.missing.contains(&gone) {
                state.missing.push(gone);
            }
        }
        state.world.metrics.restarts.get_or_create(&ChildLabels { child: child.name() }).inc();
        state.plan_rebuild(&myself, child.name(), &reason)
    }
}

impl State {
    fn plan_rebuild(&mut self, myself: &ActorRef<Message>, child: &str, reason: &str) -> Result<(), ActorProcessingErr> {
        self.generation += 1;
        match self.restarts.decide(Instant::now()) {
            Decision::RestartAfter(delay) => {
                tracing::error!(
                    child,
                    reason,
                    retry_in_ms = delay.as_millis(),
                    "a child crashed, it and those that need it are rebuilt"
                );
                let (myself, generation) = (myself.clone(), self.generation);
                tokio::spawn(async move {
                    tokio::time::sleep(delay).await;
                    let _ = myself.cast(Message::Rebuild { generation });
                });
                Ok(())
            }
            Decision::Escalate => {
                tracing::error!(child, reason, "too many crashes in a minute, giving up");
                Err("too many crashes in a minute".into())
            }
        }
    }

    async fn build_missing(&mut self, myself: &ActorRef<Message>) -> Result<(), ActorProcessingErr> {
        self.missing.sort();
        while let Some(child) = self.missing.first().copied() {
            let cell = self.build(child, myself.get_cell()).await?;
            self.cells.insert(child, cell);
            self.missing.remove(0);
        }
        Ok(())
    }

    /// The wiring, long, flat and dull.
    async fn build(&mut self, child: Child, supervisor: ActorCell) -> Result<ActorCell, ActorProcessingErr> {
        let World {
            settings,
            couch,
            vault,
            metrics,
            ledger,
            sweeps,
            publish,
            process,
            topology,
            webhooks,
            native,
            own,
            mixed,
            ..
        } = self.world.as_ref();
        let backoff = Backoff::new(settings.backoff_base, settings.backoff_cap);
        // CouchDB's own hiccups are retried sooner than somebody else's endpoint.
        let couch_backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let cell = match child {
            Child::CouchHealth => Actor::spawn_linked(None, CouchHealth, couch.clone(), supervisor).await?.0.get_cell(),
            Child::Rules => {
                let arguments = rules::Arguments {
                    couch: couch.clone(),
                    db_name: settings.db_name.clone(),
                    heartbeat: settings.feed.heartbeat,
                    backoff: couch_backoff,
                    publish: publish.clone(),
                    metrics: metrics.clone(),
                };
                Actor::spawn_linked(None, RulesActor, arguments, supervisor).await?.0.get_cell()
            }
            Child::Checkpoints => {
                let arguments = checkpoints::Arguments {
                    couch: couch.clone(),
                    db_name: settings.db_name.clone(),
                    backoff: couch_backoff,
                    metrics: metrics.clone(),
                    own: own.clone(),
                };
                let (actor, _) = Actor::spawn_linked(None, CheckpointsActor, arguments, supervisor).await?;
                self.built.checkpoints = Some(Checkpoints::new(actor.clone()));
                actor.get_cell()
            }
            Child::DeliveryStore => {
                let arguments = checkpoints::Arguments {
                    couch: couch.clone(),
                    db_name: deliveries::parked::database_of(&settings.db_name),
                    backoff: couch_backoff,
                    metrics: metrics.clone(),
                    own: own.clone(),
                };
                let (actor, _) = Actor::spawn_linked(None, CheckpointsActor, arguments, supervisor).await?;
                self.built.delivery_store = Some(Checkpoints::new(actor.clone()));
                actor.get_cell()
            }
            Child::WebhookPool => {
                let pool = Pool::spawn(
                    HttpSender::new(&settings.webhook, vault.clone(), metrics.clone())?,
                    (&settings.webhook).into(),
                    supervisor,
                )
                .await?;
                let cell = pool.cell();
                webhooks.send_replace(Some(pool.clone()));
                self.built.webhooks = Some(pool);
                cell
            }
            Child::Deliveries => {
                let sweeps = sweeps.clone();
                let arguments = deliveries::Arguments {
                    deliveries: self.deliveries()?,
                    couch: couch.clone(),
                    db_name: deliveries::parked::database_of(&settings.db_name),
                    snapshot: publish.subscribe(),
                    webhooks: needed(&self.built.webhooks)?,
                    vault: vault.clone(),
                    heartbeat: settings.feed.heartbeat,
                    process: process.clone(),
                    enabled: Arc::new(move |rule| sweeps.ask(Scope::Rules(vec![rule]))),
                    metrics: metrics.clone(),
                };
                Actor::spawn_linked(None, DeliveriesActor, arguments, supervisor).await?.0.get_cell()
            }
            Child::ReplicatorPool => {
                let couchdb = Arc::new(CouchEngine::new(couch.clone(), settings.replication.timeout));
                let engines = Engines::new(native.clone(), couchdb, settings.replication.engine);
                let runner = Replicator::new(Arc::new(engines), metrics.clone());
                let pool = Pool::spawn(runner, (&settings.replication).into(), supervisor).await?;
                let cell = pool.cell();
                self.built.replicators = Some(pool);
                cell
            }
            Child::Topology => {
                let arguments = topology::Arguments {
                    couch: couch.clone(),
                    snapshot: publish.subscribe(),
                    checkpoints: needed(&self.built.checkpoints)?,
                    means: self.replication_means()?,
                    mixed: mixed.clone(),
                    backoff,
                    local_url: couch.settings().url.clone(),
                    local_host: local_host(couch),
                    metrics: metrics.clone(),
                };
                let (actor, _) = Actor::spawn_linked(None, Topology, arguments, supervisor).await?;
                self.built.topology = Some(actor.clone());
                topology.send_replace(Some(actor.clone()));
                actor.get_cell()
            }
            Child::DbDirectory => {
                let shared = Shared {
                    tools: self.listen_tools(backoff)?,
                    mixed: mixed.clone(),
                    snapshot: publish.subscribe(),
                    topology: needed(&self.built.topology)?,
                    debts: ledger.clone(),
                    settings: db::Settings {
                        quiet: settings.debounce.quiet,
                        longest: settings.debounce.longest,
                        passivate_after: settings.db.passivate_after,
                        assume_deleted_after: settings.db.assume_deleted_after,
                    },
                    backoff,
                };
                let arguments = directory::Arguments { shared: Arc::new(shared), metrics: metrics.clone() };
                let (actor, _) = Actor::spawn_linked(None, DbDirectory, arguments, supervisor).await?;
                self.built.directory = Some(actor.clone());
                actor.get_cell()
            }
            Child::Workers => {
                let role = settings.role;
                let (listens, replicates) = (role != Role::Replicator, role != Role::ChangeListener);
                let shared = workers::Shared {
                    couch: couch.clone(),
                    spiegel_db: settings.db_name.clone(),
                    checkpoints: needed(&self.built.checkpoints)?,
                    me: process.clone(),
                    settings: locks::Settings {
                        retry_after: settings.roles.retry_after,
                        check_stalled: settings.roles.check_stalled,
                        stale_after: settings.roles.stale_after,
                        assume_deleted_after: settings.db.assume_deleted_after,
                    },
                    snapshot: publish.subscribe(),
                    backoff,
                    phantoms: Phantoms::default(),
                    listen: listens.then(|| self.listen_tools(backoff)).transpose()?,
                    replicate: replicates.then(|| self.replication_means()).transpose()?,
                };
                let arguments = workers::Arguments {
                    shared: Arc::new(shared),
                    heartbeat: settings.feed.heartbeat,
                    places: settings.roles.concurrency,
                    own: own.clone(),
                    mixed: mixed.clone(),
                    alone_after: settings.roles.alone_after,
                    metrics: metrics.clone(),
                    alone: self.alone(),
                };
                let (actor, _) = Actor::spawn_linked(None, Workers, arguments, supervisor).await?;
                self.built.workers = Some(actor.clone());
                actor.get_cell()
            }
            Child::UpdateListener => {
                let arguments = update_listener::Arguments {
                    couch: couch.clone(),
                    checkpoints: needed(&self.built.checkpoints)?,
                    snapshot: publish.subscribe(),
                    debts: ledger.clone(),
                    backoff,
                    batch_size: settings.roles.batch_size,
                    batch_timeout: settings.roles.batch_timeout,
                };
                let local_url = couch.settings().url.clone();
                let (listener, replicators) = update_listener::spawn(arguments, local_url, supervisor).await?;
                self.built.topology = Some(replicators);
                self.built.directory = Some(listener.clone());
                listener.get_cell()
            }
            Child::GlobalChanges => {
                let arguments = feed::Arguments {
                    couch: couch.clone(),
                    db_name: settings.db_name.clone(),
                    checkpoints: needed(&self.built.checkpoints)?,
                    ledger: ledger.clone(),
                    sweeps: sweeps.clone(),
                    snapshot: publish.subscribe(),
                    directory: needed(&self.built.directory)?,
                    topology: needed(&self.built.topology)?,
                    backoff: couch_backoff,
                    metrics: metrics.clone(),
                    settings: feed::Settings {
                        heartbeat: settings.feed.heartbeat,
                        save_seq_after: settings.feed.save_seq_after,
                        spill_after: settings.feed.spill_after,
                        sweep_interval: settings.feed.sweep_interval,
                        pending_databases_max: settings.pending_databases_max,
                    },
                };
                let (actor, _) = Actor::spawn_linked(None, GlobalChangesActor, arguments, supervisor).await?;
                self.built.feed = Some(actor.clone());
                actor.get_cell()
            }
        };
        Ok(cell)
    }
}

impl State {
    fn deliveries(&self) -> Result<Deliveries, ActorProcessingErr> {
        let settings = delivery_settings::of(&self.world.settings);
        Ok(Deliveries::new(self.world.book.clone(), needed(&self.built.delivery_store)?, Arc::new(settings)))
    }
}

fn needed<T: Clone>(handle: &Option<T>) -> Result<T, ActorProcessingErr> {
    handle.clone().ok_or_else(|| "a child was built before what it needs".into())
}

/// The way of a replicator's source or target that names the watched server.
fn local_host(couch: &Couch) -> String {
    let url = &couch.settings().url;
    format!("{}:{}", url.host_str().unwrap_or_default(), url.port_or_known_default().unwrap_or_default())
}

/// The app before its start: it is alive, and says why it is not ready, while somebody still waits for CouchDB.
pub struct App {
    world: Arc<World>,
    admin: Option<Admin>,
    admin_stop: CancellationToken,
}

/// Runs until a signal, or until the Supervisor gives up.
pub async fn run(app: App, mut signals: Signals) -> anyhow::Result<()> {
    let mut running = app.start().await?;
    let ended = tokio::select! {
        () = running.gave_up() => anyhow::bail!("the supervisor gave up"),
        signal = signals.next() => signal,
    };
    tracing::info!(signal = ended, "stopping");
    tokio::select! {
        () = running.stop() => {}
        signal = signals.next() => {
            tracing::warn!(signal, "a second signal, ending at once");
            signals::end_at_once()
        }
    }
    tracing::info!("stopped");
    Ok(())
}

/// The app at work; whoever holds it says when it ends.
pub struct Running {
    world: Arc<World>,
    supervisor: ActorRef<Message>,
    ended: JoinHandle<()>,
    admin: Option<Admin>,
    admin_stop: CancellationToken,
}

impl App {
    pub async fn open(settings: Settings, vault: Vault, couch: Couch) -> anyhow::Result<Self> {
        let native = NativeEngine::new(&couch, &NativeSettings::of(&settings.replication))?;
        let world = Arc::new(World {
            native: Arc::new(native),
            metrics: couch.metrics().clone(),
            couch,
            vault: Arc::new(vault),
            ledger: Arc::new(Ledger::default()),
            sweeps: Arc::new(sweep::Queue::default()),
            publish: watch::channel(Arc::new(Snapshot::default())).0,
            rule_health: RuleHealth::default(),
            book: Arc::default(),
            process: format!("{:016x}", fastrand::u64(..)).into(),
            started: Instant::now(),
            topology: watch::channel(None).0,
            webhooks: watch::channel(None).0,
            own: Arc::default(),
            mixed: means::mixed_of(&settings),
            settings,
        });
        let admin_stop = CancellationToken::new();
        let admin = match world.settings.admin_listen {
            Some(listen) => {
                let serving = admin::serve(listen, status::pages(&world), admin_stop.clone()).await;
                match serving {
                    // The original has no port, so nobody sees to one for each of its processes.
                    Err(error) if is_taken(&error) && world.settings.role != Role::Everything => {
                        tracing::warn!(%listen, "admin.listen is taken by another process, going on without the admin pages");
                        None
                    }
                    serving => Some(serving.with_context(|| format!("listen on admin.listen {listen}"))?),
                }
            }
            None => None,
        };
        Ok(Self { world, admin, admin_stop })
    }

    pub async fn start(self) -> anyhow::Result<Running> {
        let Self { world, admin, admin_stop } = self;
        let spawned = Actor::spawn(None, Supervisor, world.clone()).await;
        let (supervisor, ended) = spawned.map_err(|error| anyhow::anyhow!("start the supervisor: {error}"))?;
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            couchdb = world.couch.address(),
            db = world.settings.db_name,
            "spiegel is running"
        );
        Ok(Running { world, supervisor, ended, admin, admin_stop })
    }
}

fn is_taken(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::AddrInUse
}

impl Running {
    /// Comes back only where too many crashes ended the Supervisor.
    pub async fn gave_up(&mut self) {
        let _ = (&mut self.ended).await;
    }

    /// Drains with a deadline, and saves the position.
    pub async fn stop(self) {
        let Self { world, supervisor, admin, admin_stop, ended: _ } = self;
        let (done, told) = oneshot::channel();
        let _ = supervisor.cast(Message::Shutdown { done });
        let _ = tokio::time::timeout(world.settings.shutdown_deadline + Duration::from_millis(500), told).await;
        supervisor.stop_children_and_wait(None, Some(Duration::from_millis(300))).await;
        let _ = supervisor.stop_and_wait(None, Some(Duration::from_millis(200))).await;
        admin_stop.cancel();
        drop(admin);
    }
}
