//! The work of one `replicator`: one run.

use crate::locks::held::{End, is_long_gone, retries};
use crate::locks::hold::Hold;
use crate::replicate::Progress;
use crate::topology::attempt::{Means, NoRun, ended_of, is_source_gone};
use crate::topology::replicator::Replicator;
use crate::topology::states::RunFailure;
use crate::workers::{Shared, listen};
use serde_json::Value;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Somebody must change the document first, and then it is dirty.
const CANNOT_RUN_FOR: Duration = Duration::from_secs(300);
/// Nodes hear of a database within moments.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(3);

pub async fn work(shared: &Shared, means: &Means, hold: &Hold) -> End {
    let Ok(replicator) = Replicator::parse(hold.before()) else { return End::Again };
    shared.couch.health().up().await;
    let snapshot = shared.snapshot.borrow().clone();
    let (id, source, target) = (&replicator.id, replicator.source.to_string(), replicator.target.to_string());
    let failed = retries(hold.before());
    let result = match means.start(&replicator, &snapshot, Arc::new(Progress::default())) {
        Ok(outcome) => ended_of(&shared.couch, &replicator, outcome).await,
        Err(NoRun::Failed(failure)) => Err(failure),
        Err(NoRun::Never { error }) => {
            if failed == 0 {
                tracing::error!(%id, source, target, error, "the replicator cannot run, it is passed over until its document is changed");
            }
            return End::Later { at: SystemTime::now() + CANNOT_RUN_FOR, retries: failed.saturating_add(1) };
        }
    };
    match result {
        Ok(()) => {
            if failed > 0 {
                tracing::info!(%id, source, target, failures = failed, "replication works again");
            }
            End::Clean
        }
        Err(failure) => {
            let is_gone = failure.is_source_gone && is_gone(shared, &replicator, hold.before()).await;
            let delay = shared.backoff.delay(failed, fastrand::f64()).max(failure.after.unwrap_or_default());
            if failed == 0 {
                let RunFailure { error, .. } = failure;
                tracing::warn!(%id, source, target, error, retry_in_ms = delay.as_millis(), "replication failed, backing off");
            }
            match is_gone {
                true => listen::missing(shared, hold),
                false => End::Later { at: SystemTime::now() + delay, retries: failed.saturating_add(1) },
            }
        }
    }
}

/// Before its document is deleted, another look: a node may not have heard yet of what another node has just made.
async fn is_gone(shared: &Shared, replicator: &Replicator, doc: &Value) -> bool {
    if !is_long_gone(doc, SystemTime::now() + LOOK_AGAIN_AFTER, &shared.settings) {
        return true;
    }
    tokio::time::sleep(LOOK_AGAIN_AFTER).await;
    is_source_gone(&shared.couch, replicator).await
}
