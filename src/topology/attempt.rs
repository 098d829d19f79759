//! From a `replicator` document to a run of it, and what that came to.

use crate::config::EngineChoice;
use crate::couch::Couch;
use crate::job::Outcome;
use crate::replicate::engines::choose;
use crate::replicate::native::NativeEngine;
use crate::replicate::{Progress, Replication, Replicator as Runner};
use crate::rules::catalogue::Snapshot;
use crate::schedule::Pool;
use crate::topology::replicator::Replicator;
use crate::topology::states::RunFailure;
use crate::vault::Vault;
use std::sync::Arc;
use tokio::sync::oneshot;

/// What a run needs, whoever asks for it.
#[derive(Clone)]
pub struct Means {
    pub pool: Pool<Runner>,
    pub native: Arc<NativeEngine>,
    /// For documents that do not name one.
    pub engine: EngineChoice,
    pub vault: Arc<Vault>,
}

/// Why it was not even asked for.
pub enum NoRun {
    /// Worth another try.
    Failed(RunFailure),
    /// No engine can make what its document asks for.
    Never { error: String },
}

impl Means {
    pub fn start(
        &self,
        replicator: &Replicator,
        snapshot: &Snapshot,
        progress: Arc<Progress>,
    ) -> Result<oneshot::Receiver<Outcome>, NoRun> {
        let failed = |error: String| NoRun::Failed(RunFailure { error, missing: false, is_source_gone: false, after: None });
        let params = replicator.replicate_params(&self.vault).map_err(|error| failed(error.to_string()))?;
        let engine = replicator.engine.unwrap_or(self.engine);
        choose(engine, &params, self.native.local()).map_err(|error| NoRun::Never { error: error.to_string() })?;
        Ok(self.pool.run(Replication {
            replicator_id: replicator.id.clone(),
            params,
            source: replicator.source.to_string(),
            target: replicator.target.to_string(),
            lane: replicator.lane(),
            engine: replicator.engine,
            priority: replicator.priority,
            is_bidirectional: goes_both_ways(snapshot, replicator),
            progress,
        }))
    }
}

/// Where names are the same on other servers, too much is called bidirectional, which costs a request.
fn goes_both_ways(snapshot: &Snapshot, replicator: &Replicator) -> bool {
    let mut back = snapshot.replicators_from(replicator.target.db_name()).iter();
    back.any(|other| other.target.db_name() == replicator.source.db_name())
}

/// Which of the two is missing, `_dbs_info` decides. What a run came to, with whether its source is gone.
pub async fn ended_of(couch: &Couch, replicator: &Replicator, outcome: oneshot::Receiver<Outcome>) -> Result<(), RunFailure> {
    match result_of(outcome).await {
        Err(failure) if failure.missing => {
            let is_source_gone = is_source_gone(couch, replicator).await;
            Err(RunFailure { is_source_gone, ..failure })
        }
        result => result,
    }
}

/// A target that is missing may be made yet; a source that was deleted has nothing left to bring.
pub async fn is_source_gone(couch: &Couch, replicator: &Replicator) -> bool {
    replicator.source.is_local(&couch.settings().url)
        && couch.dbs_info(&[replicator.source.db_name()]).await.is_ok_and(|found| matches!(found.as_slice(), [None]))
}

async fn result_of(outcome: oneshot::Receiver<Outcome>) -> Result<(), RunFailure> {
    match outcome.await {
        Ok(Outcome::Done) => Ok(()),
        Ok(Outcome::Failed(failed)) => {
            let after = failed.after();
            Err(RunFailure { error: failed.error, missing: false, is_source_gone: false, after })
        }
        Ok(Outcome::Unsent { error, after }) => {
            Err(RunFailure { error, missing: false, is_source_gone: false, after: Some(after) })
        }
        Ok(Outcome::Missing { error }) => Err(RunFailure { error, missing: true, is_source_gone: false, after: None }),
        Err(_) => Err(RunFailure {
            error: String::from("the pool is being restarted"),
            missing: false,
            is_source_gone: false,
            after: None,
        }),
    }
}
