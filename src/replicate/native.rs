//! The engine that speaks the replication protocol itself, source to target.
//!
//! CouchDB sleeps for up to five seconds before each `_replicate`, and a run of a few documents takes milliseconds: so a run is
//! made here, of few requests, and those that many replications make at the same moment are made together.
//!
//! ```text
//! parameters ▶ run ▶ behind (checkpoints) ▶ documents ▶ attachments
//!                 └────────── shared ▶ gather ▶ peer ▶ gate ▶ HTTP
//! ```

pub mod attachments;
pub mod behind;
pub mod budget;
pub mod checkpoint;
pub mod documents;
pub mod elements;
pub mod gate;
pub mod gather;
pub mod overlap;
pub mod parameters;
pub mod peer;
pub mod run;
pub mod sessions;
pub mod shared;
pub mod slots;
pub mod standing;
pub mod written;

use super::{ReplicateError, Replication, Report};
use crate::config::ReplicationSettings;
use crate::couch::{Couch, CouchError};
use crate::job::Verdict;
use behind::{Again, Behind};
use budget::Budget;
use checkpoint::replication_id;
use documents::{Transfer, TransferError};
use parameters::{Local, Parameters, Selection};
use peer::{Net, Peer, PeerError, SILENCE_MAX, Which};
use run::{Done, Run};
use shared::Shared;
use slots::Slots;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use tokio::sync::OnceCell;
use tokio_util::task::AbortOnDropHandle;
use written::Remembered;

/// Large runs together hold so much of documents, and one document more; small ones so much besides.
const BUDGET_BYTES: u64 = 16 * 1024 * 1024;
const SMALL_BUDGET_BYTES: u64 = 8 * 1024 * 1024;
/// Large attachments on their way to one host.
const PIPES_PER_HOST: usize = 4;
/// Positions that are remembered: about 500 bytes each.
const SLOTS_MAX: usize = 20_000;

pub struct NativeEngine {
    couch: Couch,
    local: Local,
    net: Net,
    shared: Arc<Shared>,
    budget: Budget,
    small_budget: Budget,
    behind: Arc<Behind>,
    /// Of the watched server: part of a replication's id, so that two Spiegels that call two servers by one name do not share
    /// a checkpoint.
    server_uuid: OnceCell<String>,
    _tasks: [AbortOnDropHandle<()>; 2],
}

pub struct NativeSettings {
    pub requests_per_host_max: usize,
    /// How long a checkpoint may stay behind its documents.
    pub checkpoint_after: Duration,
    /// The source's, beyond the target's.
    pub source_checkpoint_after: Duration,
}

impl NativeSettings {
    pub fn of(settings: &ReplicationSettings) -> Self {
        Self {
            requests_per_host_max: settings.requests_per_host,
            checkpoint_after: settings.checkpoint_after,
            source_checkpoint_after: settings.source_checkpoint_after,
        }
    }
}

impl NativeEngine {
    pub fn new(couch: &Couch, settings: &NativeSettings) -> Result<Self, CouchError> {
        let builder = || {
            reqwest::Client::builder()
                .connect_timeout(couch.settings().connect_timeout)
                .tcp_keepalive(Duration::from_secs(30))
                .tcp_nodelay(true)
                .pool_max_idle_per_host(settings.requests_per_host_max)
                .redirect(reqwest::redirect::Policy::none())
                .user_agent(concat!("spiegel/", env!("CARGO_PKG_VERSION")))
        };
        let unbuildable = |error: reqwest::Error| CouchError::Unreachable(format!("build the HTTP client: {error}"));
        let http = builder().read_timeout(SILENCE_MAX).build().map_err(unbuildable)?;
        let patient = builder().build().map_err(unbuildable)?;
        let (health, metrics) = (couch.health().clone(), couch.metrics().clone());
        let net = Net {
            http,
            patient,
            gates: gate::Gates::new(settings.requests_per_host_max),
            pipes: gate::Gates::new(PIPES_PER_HOST),
            sessions: sessions::Sessions::default(),
            metrics,
            health,
        };
        let shared = Arc::new(Shared::default());
        let behind = Arc::new(Behind {
            slots: Slots::new(SLOTS_MAX),
            shared: shared.clone(),
            after: settings.checkpoint_after,
            source_after: settings.source_checkpoint_after,
            again: Again::default(),
            remembered: Remembered::default(),
            overlapping: Remembered::default(),
        });
        let (saver, watcher) = (behind.clone(), behind.clone());
        let watched = couch.clone();
        let tasks = [
            AbortOnDropHandle::new(tokio::spawn(async move { saver.forever().await })),
            AbortOnDropHandle::new(tokio::spawn(async move {
                loop {
                    watched.health().down().await;
                    watcher.slots.next_epoch();
                    watched.health().up().await;
                }
            })),
        ];
        Ok(Self {
            local: Local { url: couch.settings().url.clone(), credentials: couch.settings().credentials.clone() },
            couch: couch.clone(),
            net,
            shared,
            budget: Budget::new(BUDGET_BYTES),
            small_budget: Budget::new(SMALL_BUDGET_BYTES),
            behind,
            server_uuid: OnceCell::new(),
            _tasks: tasks,
        })
    }

    pub fn local(&self) -> &Local {
        &self.local
    }

    /// The next replicator that has to run again although nobody dirtied it.
    pub async fn again(&self) -> Arc<str> {
        self.behind.again.next().await
    }

    /// Every checkpoint that is behind, now; the replicators whose documents may be gone.
    pub async fn flush(&self) -> Vec<Arc<str>> {
        self.behind.save_older_than(Duration::ZERO).await
    }

    pub async fn run(&self, spec: &Replication, parameters: Parameters) -> Result<Report, ReplicateError> {
        let is_local = parameters.source.is_local || parameters.target.is_local;
        loop {
            // Without CouchDB no run is possible, and none has failed: it is waited for, as everywhere.
            if is_local {
                self.couch.health().up().await;
            }
            let result = tokio::select! {
                biased;
                () = self.couch.health().down(), if is_local => continue,
                result = self.once(spec, &parameters) => result,
            };
            let error = match result {
                Ok(report) => return Ok(report),
                Err(error) => error,
            };
            if !self.is_outage(&error).await {
                return Err(error.into());
            }
            self.couch.health().up().await;
        }
    }

    async fn once(&self, spec: &Replication, parameters: &Parameters) -> Result<Report, TransferError> {
        let uuid = self.server_uuid.get_or_try_init(async || {
            let welcome = self.couch.welcome().await;
            let error =
                |error| PeerError { which: Which::Source, is_local: true, is_out_of_reach: false, error: Arc::new(error) };
            welcome.map(|welcome| welcome.uuid.unwrap_or_default()).map_err(error)
        });
        let transfer = Transfer {
            shared: self.shared.clone(),
            budget: self.budget.clone(),
            small_budget: self.small_budget.clone(),
            source: Peer::new(self.net.clone(), Which::Source, &parameters.source),
            target: Peer::new(self.net.clone(), Which::Target, &parameters.target),
            first_refused: OnceLock::new(),
            refused: Mutex::default(),
        };
        let filter_code = filter_code(&transfer.source, &parameters.selection).await?;
        let id = replication_id(uuid.await?, &spec.replicator_id, parameters, filter_code.as_deref());
        let run = Run {
            id: id.into(),
            replicator_id: spec.replicator_id.clone(),
            behind: &self.behind,
            transfer,
            parameters: parameters.clone(),
            is_bidirectional: spec.is_bidirectional,
            progress: spec.progress.clone(),
        };
        let done = run.run().await?;
        Ok(report(&done, &run.transfer))
    }

    /// Whether the watched server itself went away under the run. CouchHealth's probes decide within a moment.
    async fn is_outage(&self, error: &TransferError) -> bool {
        const PROBES_TAKE: Duration = Duration::from_secs(1);
        let TransferError::Peer(error) = error else { return false };
        error.is_local && error.error.is_outage() && tokio::time::timeout(PROBES_TAKE, self.couch.health().down()).await.is_ok()
    }
}

/// The function that picks the documents, as it is now in the source's design document.
async fn filter_code(source: &Peer, selection: &Selection) -> Result<Option<String>, PeerError> {
    let Selection::Filter { name, query } = selection else { return Ok(None) };
    let view = query.iter().find(|(key, _)| key == "view").map(|(_, view)| view);
    let (path, group, field) = match (name.as_str(), view) {
        ("_view", Some(view)) => (view.as_str(), "views", Some("map")),
        (name, _) => (name, "filters", None),
    };
    let Some((ddoc, function)) = path.split_once('/') else { return Ok(None) };
    let ddoc = source.design_document(ddoc).await?;
    let code = &ddoc[group][function];
    Ok(Some(field.map_or(code, |field| &code[field]).to_string()))
}

fn report(done: &Done, transfer: &Transfer) -> Report {
    Report {
        counts: done.counts,
        requests: transfer.source.requests() + transfer.target.requests(),
        no_changes: done.rows == 0,
        first_refused: transfer.first_refused.get().cloned(),
        is_unfinished: done.is_unfinished,
    }
}

impl From<TransferError> for ReplicateError {
    fn from(error: TransferError) -> Self {
        let text = crate::vault::redact_text(&error.to_string());
        let TransferError::Peer(PeerError { error: cause, .. }) = &error else {
            return ReplicateError::Other { error: text, verdict: Verdict::Retry { after: None } };
        };
        match (&error, &**cause) {
            (TransferError::Peer(peer), _) if peer.is_missing_database() => ReplicateError::Missing { which: text },
            (_, CouchError::Unauthorized(_)) => ReplicateError::Unauthorized(text),
            (_, CouchError::Forbidden(_)) => ReplicateError::Unauthorized(text),
            (TransferError::Peer(PeerError { is_out_of_reach: true, .. }), _) => ReplicateError::OutOfReach(text),
            (_, CouchError::Unreachable(_)) => ReplicateError::Unreachable(text),
            (_, cause) => ReplicateError::Other { error: text, verdict: cause.verdict() },
        }
    }
}
