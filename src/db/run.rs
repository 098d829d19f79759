//! One run of a database: what its replicators are told, and its listen.

use super::{Instance, Shared};
use crate::couch::fingerprint::Fingerprint;
use crate::db::durable::leave_to_locks;
use crate::db::late::Late;
use crate::db::listen::{Leaving, ListenError, Listener};
use crate::job::DbName;
use crate::rules::catalogue::Snapshot;
use crate::topology;
use std::sync::Arc;
use tokio::sync::oneshot;

pub struct RunEnded {
    pub listener: Option<Listener>,
    /// Where there is no listener: what an earlier one left behind.
    pub late: Late,
    pub result: Result<(), ListenError>,
    pub replicated: Option<oneshot::Receiver<()>>,
}

/// For a listener that leaves slow deliveries behind: what an earlier one left, and how.
pub struct Left {
    pub late: Late,
    pub leaving: Leaving,
}

pub async fn run(
    db: DbName,
    shared: Arc<Shared>,
    listener: Option<Listener>,
    instance: Instance,
    is_stale: bool,
    seen: Option<Fingerprint>,
    left: Left,
) -> RunEnded {
    // At the start, work that is durable may be known before the rules are.
    let snapshot = loaded_snapshot(&shared).await;
    shared.tools.couch.health().up().await;
    let rules = snapshot.rules_of(&db);
    let suspended = snapshot.suspended_of(&db);
    let replicated = match snapshot.replicators_from(&db) {
        [] => None,
        _ => {
            let (done, replicated) = oneshot::channel();
            // Where the topology is gone, `done` is dropped and this is owed again.
            let _ = shared.topology.cast(topology::Message::SourceChanged { db: db.clone(), done });
            Some(replicated)
        }
    };
    let Left { late, leaving } = left;
    let without = |listener: Option<Listener>, late: Late, result, replicated| RunEnded {
        listener: None,
        late: listener.map_or(late, Listener::into_late),
        result,
        replicated,
    };
    if rules.is_empty() || !snapshot.watches(&db) {
        return without(listener, late, Ok(()), replicated);
    }
    if shared.mixed.is_on() {
        match leave_to_locks(&shared, &db).await {
            Err(error) => return without(listener, late, Err(error), replicated),
            // Otherwise nobody takes it up by its lock any more.
            Ok(()) if shared.mixed.is_on() => return without(listener, late, Ok(()), replicated),
            Ok(()) => {}
        }
    }
    let is_stale = is_stale && listener.is_some();
    let mut listener = match listener {
        Some(listener) => listener,
        None => match Listener::load(&shared.tools, &db, &rules, &suspended).await {
            Ok(listener) => listener,
            Err(error) => return without(None, late, Err(error), replicated),
        },
    };
    if is_stale && let Err(error) = listener.reload(&shared.tools).await {
        return without(Some(listener), late, Err(error), replicated);
    }
    listener.meet(instance);
    listener.leave_by(leaving, late);
    let result = listener.listen(&shared.tools, &rules, &suspended, seen).await;
    RunEnded { listener: Some(listener), late: Late::default(), result, replicated }
}

async fn loaded_snapshot(shared: &Shared) -> Arc<Snapshot> {
    let mut snapshots = shared.snapshot.clone();
    if let Ok(snapshot) = snapshots.wait_for(|snapshot| snapshot.is_loaded()).await {
        return snapshot.clone();
    }
    // The Supervisor that publishes them is gone, and soon we are.
    std::future::pending().await
}
