//! What the process says of itself: `/ready` and `/status`.

use super::{World, operations};
use crate::admin::Pages;
use crate::config::Role;
use crate::deliveries::counts::deliveries_json;
use crate::job::timestamp;
use crate::schedule::breaker::View;
use crate::schedule::{self, BreakerStatus};
use crate::topology;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::oneshot;
use tokio::time::Instant;

pub(super) fn pages(world: &Arc<World>) -> Pages {
    let (for_ready, for_status) = (world.clone(), world.clone());
    Pages {
        metrics: world.metrics.clone(),
        ready: Arc::new(move || ready(&for_ready)),
        status: Arc::new(move || {
            let world = for_status.clone();
            Box::pin(async move {
                let (replicators, webhooks) = futures_util::future::join(replicators(&world), webhooks(&world)).await;
                status(&world, replicators, webhooks)
            })
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

/// None where the pool is being rebuilt.
async fn webhooks(world: &World) -> Option<schedule::Status> {
    let pool = world.webhooks.borrow().clone()?;
    pool.status().await
}

/// Hosts that get no requests, or one at a time; the longest without an answer first.
fn breakers_json(status: &schedule::Status, now: (Instant, SystemTime)) -> Value {
    let mut breakers: Vec<&BreakerStatus> = status.breakers.iter().collect();
    breakers.sort_by_key(|breaker| (breaker.opened, breaker.lane.clone()));
    // Instants are of this process; people read the clock.
    let told = |at: Instant| match at.checked_duration_since(now.0) {
        Some(ahead) => timestamp(now.1 + ahead),
        None => timestamp(now.1 - now.0.saturating_duration_since(at)),
    };
    let row = |breaker: &&BreakerStatus| {
        let (state, next_probe) = match breaker.view {
            View::Closed => ("closed", None),
            View::Open { until } => ("open", Some(until)),
            View::HalfOpen { .. } => ("half_open", None),
        };
        json!({
            "host": breaker.lane,
            "state": state,
            "since": breaker.opened.map(told),
            "next_probe": next_probe.map(told),
            "failures": breaker.failures,
            "reason": breaker.reason,
        })
    };
    json!({
        "open": status.breakers_open,
        "half_open": status.breakers_half_open,
        "hosts": breakers.iter().map(row).collect::<Vec<_>>(),
    })
}

fn status(world: &World, replicators: Option<topology::status::Status>, webhooks: Option<schedule::Status>) -> Value {
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
        "webhooks": {
            "in_flight": metrics.webhook_in_flight.get(),
            "queued": metrics.webhook_queued.get(),
            "breakers": webhooks.map(|status| breakers_json(&status, (Instant::now(), SystemTime::now()))),
        },
        "invalid_documents": metrics.invalid_documents.get(),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_host_that_is_down_says_since_when_and_when_it_is_asked_again() {
        let (now, clock) = (Instant::now() + Duration::from_secs(100), SystemTime::UNIX_EPOCH + Duration::from_secs(1_000));
        let breaker =
            |lane: &str, view, opened| BreakerStatus { lane: lane.into(), view, failures: 12, opened, reason: "refused".into() };
        let opened = |seconds_ago| Some(now - Duration::from_secs(seconds_ago));
        let status = schedule::Status {
            queued: 0,
            in_flight: 0,
            lanes: 3,
            workers: 0,
            breakers_open: 1,
            breakers_half_open: 1,
            breakers: vec![
                breaker("b:80", View::HalfOpen { probing: true }, opened(5)),
                breaker("a:80", View::Open { until: now + Duration::from_secs(7) }, opened(60)),
            ],
        };
        let page = breakers_json(&status, (now, clock));
        assert_eq!((&page["open"], &page["half_open"]), (&json!(1), &json!(1)));
        let first = json!({
            "host": "a:80", "state": "open", "since": "1970-01-01T00:15:40.000Z", "next_probe": "1970-01-01T00:16:47.000Z",
            "failures": 12, "reason": "refused",
        });
        assert_eq!(page["hosts"][0], first);
        assert_eq!((&page["hosts"][1]["state"], &page["hosts"][1]["next_probe"]), (&json!("half_open"), &Value::Null));
    }
}
