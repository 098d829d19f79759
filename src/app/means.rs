//! What several children are handed in the same way.

use super::{State, World, needed};
use crate::config::{Coexist, Role, Settings};
use crate::db::directory;
use crate::db::listen::Tools;
use crate::locks::mixed::Mixed;
use crate::schedule::backoff::Backoff;
use crate::topology::attempt::Means;
use ractor::ActorProcessingErr;
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Pages of changes held in memory at once: with a batch of 200 documents of 10 KB each, 128 MB.
const PAGES_MAX: usize = 64;

impl State {
    /// What is dirty when the others are gone is for whoever works without locks.
    pub(super) fn alone(&self) -> Arc<dyn Fn() + Send + Sync> {
        let directory = self.built.directory.clone();
        Arc::new(move || {
            if let Some(directory) = &directory {
                let _ = directory.cast(directory::Message::LoadAgain);
            }
        })
    }

    pub(super) fn listen_tools(&self, backoff: Backoff) -> Result<Tools, ActorProcessingErr> {
        let World { settings, couch, vault, rule_health, started, .. } = self.world.as_ref();
        Ok(Tools {
            couch: couch.clone(),
            spiegel_db: settings.db_name.clone(),
            checkpoints: needed(&self.built.checkpoints)?,
            webhooks: needed(&self.built.webhooks)?,
            deliveries: self.deliveries()?,
            vault: vault.clone(),
            backoff,
            batch_size: settings.db.batch_size,
            pages: Arc::new(Semaphore::new(PAGES_MAX)),
            rule_health: rule_health.clone(),
            started: *started,
        })
    }

    pub(super) fn replication_means(&self) -> Result<Means, ActorProcessingErr> {
        let World { settings, native, vault, .. } = self.world.as_ref();
        Ok(Means {
            pool: needed(&self.built.replicators)?,
            native: native.clone(),
            engine: settings.replication.engine,
            vault: vault.clone(),
        })
    }
}

pub(super) fn mixed_of(settings: &Settings) -> Mixed {
    match (settings.role, settings.coexist) {
        (Role::Everything, Coexist::Auto) => Mixed::auto(),
        (Role::Everything, choice) => Mixed::always(choice == Coexist::Always),
        _ => Mixed::always(true),
    }
}
