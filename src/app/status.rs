//! What the process says of itself: `/ready` and `/status`.

use super::{World, operations};
use crate::admin::Pages;
use crate::config::Role;
use crate::deliveries::counts::deliveries_json;
use crate::topology;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

pub(super) fn pages(world: &Arc<World>) -> Pages {
    let (for_ready, for_status) = (world.clone(), world.clone());
    Pages {
        metrics: world.metrics.clone(),
        ready: Arc::new(move || ready(&for_ready)),
        status: Arc::new(move || {
            let world = for_status.clone();
            Box::pin(async move { status(&world, replicators(&world).await) })
        }),
        operate: operations::operate(world),
        login: Arc::new(operations::login(&world.couch, &world.vault)),
    }
}

fn ready(world: &World) -> Result<(), String> {
    if !world.couch.health().is_up() {
        return Err(String::from("couchdb does not answer"));
    }
    if matches!(world.settings.role, Role::ChangeListener | Role::Replicator) {
        return match world.metrics.workers_connected.get() {
            1 => Ok(()),
            _ => Err(String::from("the feed of the spiegel database is not open")),
        };
    }
    match world.metrics.feed_connected.get() {
        1 => Ok(()),
        _ => Err(String::from("the feed of _global_changes is not open")),
    }
}

/// A topology that is busy for so long is not waited for: the rest of the page says why.
const TOPOLOGY_TIMEOUT: Duration = Duration::from_secs(2);

/// None where the topology is being rebuilt.
async fn replicators(world: &World) -> Option<topology::status::Status> {
    let topology = world.topology.borrow().clone()?;
    let (reply, answer) = oneshot::channel();
    topology.cast(topology::Message::Status { reply }).ok()?;
    tokio::time::timeout(TOPOLOGY_TIMEOUT, answer).await.ok()?.ok()
}

fn status(world: &World, replicators: Option<topology::status::Status>) -> Value {
    let snapshot = world.publish.borrow().clone();
    let metrics = &world.metrics;
    let (pending, watermark) = {
        let cursor = world.ledger.cursor();
        (cursor.len(), cursor.watermark().cloned())
    };
    let deliveries = deliveries_json(&world.book.index());
    let held = world.rule_health.held();
    let held: serde_json::Map<String, Value> = held.into_iter().map(|(rule, dbs)| (rule.to_string(), Value::from(dbs))).collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "couchdb": { "url": world.couch.address(), "up": world.couch.health().is_up() },
        "feed": {
            "connected": metrics.feed_connected.get() == 1,
            "watermark": watermark,
            "pending_databases": pending,
            "sweeps": metrics.sweeps.get(),
        },
        "databases": { "busy": metrics.db_actors.get(), "crashes": metrics.db_actor_crashes.get() },
        "rules": { "valid": snapshot.rules().len(), "held_back_in_databases": held },
        "replicators": {
            "valid": snapshot.replicators().len(),
            "running": metrics.replications_running.get(),
            "queued": metrics.replications_queued.get(),
            "states": replicators.as_ref().map(|status| status.states_json()),
            "docs": replicators.as_ref().map(|status| status.docs_json()),
        },
        "deliveries": deliveries,
        "webhooks": { "in_flight": metrics.webhook_in_flight.get(), "queued": metrics.webhook_queued.get() },
        "invalid_documents": metrics.invalid_documents.get(),
    })
}
