//! The work of one `replicator`: one run.

use crate::locks::held::{End, retries};
use crate::locks::hold::Hold;
use crate::replicate::Progress;
use crate::topology::attempt::{Means, NoRun, result_of};
use crate::topology::replicator::Replicator;
use crate::topology::states::RunFailure;
use crate::workers::{Shared, listen};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Somebody must change the document first, and then it is dirty.
const CANNOT_RUN_FOR: Duration = Duration::from_secs(300);

pub async fn work(shared: &Shared, means: &Means, hold: &Hold) -> End {
    let Ok(replicator) = Replicator::parse(hold.before()) else { return End::Again };
    shared.couch.health().up().await;
    let snapshot = shared.snapshot.borrow().clone();
    let (id, source, target) = (&replicator.id, replicator.source.to_string(), replicator.target.to_string());
    let failed = retries(hold.before());
    let result = match means.start(&replicator, &snapshot, Arc::new(Progress::default())) {
        Ok(outcome) => result_of(outcome).await,
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
            let is_gone = failure.missing && is_source_gone(shared, &replicator).await;
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

/// A target that is missing may be made yet; a source that was deleted has nothing left to bring.
async fn is_source_gone(shared: &Shared, replicator: &Replicator) -> bool {
    let couch = &shared.couch;
    replicator.source.is_local(&couch.settings().url)
        && couch.dbs_info(&[replicator.source.db_name()]).await.is_ok_and(|found| matches!(found.as_slice(), [None]))
}
