//! The end: stop the feed ▶ no new jobs ▶ wait, with a deadline ▶ spill ▶ watermark ▶ give back what is claimed.

use crate::checkpoints::Checkpoints;
use crate::db::directory;
use crate::deliveries::Deliveries;
use crate::feed::cursor::Ledger;
use crate::replicate::native::NativeEngine;
use crate::schedule::Pool;
use crate::webhook::HttpSender;
use crate::{feed, topology, workers};
use ractor::ActorRef;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

pub(super) struct Stopping {
    pub checkpoints: Option<Checkpoints>,
    pub feed: Option<ActorRef<feed::Message>>,
    pub directory: Option<ActorRef<directory::Message>>,
    pub topology: Option<ActorRef<topology::Message>>,
    pub workers: Option<ActorRef<workers::Message>>,
    pub webhooks: Option<Pool<HttpSender>>,
    pub deliveries: Option<Deliveries>,
    pub ledger: Arc<Ledger>,
    pub native: Arc<NativeEngine>,
    pub deadline: Duration,
}

/// Of the deadline, what runs now may take half, the spill and the watermark a quarter each.
impl Stopping {
    pub async fn run(self) {
        let Self { checkpoints, feed, directory, topology, workers, webhooks, deliveries, ledger, native, deadline } = self;
        let tried = async {
            if let Some(deliveries) = &deliveries {
                deliveries.stop_trying();
                let _ = tokio::time::timeout(deadline / 2, deliveries.tries_ended()).await;
            }
        };
        let worked = stop_workers(workers, deadline);
        match (feed, directory, topology) {
            (Some(feed), Some(directory), Some(topology)) => {
                let _ = feed.cast(feed::Message::Stop);
                let _ = directory.cast(directory::Message::Stop);
                let _ = tokio::join!(worked, tried, tokio::time::timeout(deadline / 2, ledger.room(1)));
                spill(&feed, &directory, &topology, &ledger, &native, deadline).await;
            }
            _ => {
                tokio::join!(worked, tried);
                flush(&native, checkpoints, deadline).await;
            }
        }
        let (Some(webhooks), Some(deliveries)) = (webhooks, deliveries) else { return };
        // A request is cut off before its claim is given back: nobody else may make it while it is in the air.
        let _ = webhooks.cell().stop_and_wait(None, Some(deadline / 8)).await;
        let _ = tokio::time::timeout(deadline / 8, deliveries.tries_ended()).await;
    }
}

async fn spill(
    feed: &ActorRef<feed::Message>,
    directory: &ActorRef<directory::Message>,
    topology: &ActorRef<topology::Message>,
    ledger: &Ledger,
    native: &NativeEngine,
    deadline: Duration,
) {
    // Where a side was replaced meanwhile, its replicator runs again, and what runs is written down.
    for id in tokio::time::timeout(deadline / 4, native.flush()).await.unwrap_or_default() {
        let _ = topology.cast(topology::Message::RunAgain { id });
    }
    let mut spilled = Vec::new();
    let owing = ledger.cursor().owing();
    for db in owing {
        let (done, told) = oneshot::channel();
        let _ = directory.cast(directory::Message::Spill { db, done: Some(done) });
        spilled.push(told);
    }
    let (done, told) = oneshot::channel();
    let _ = topology.cast(topology::Message::Shutdown { done });
    spilled.push(told);
    let all_spilled = async {
        for told in spilled {
            let _ = told.await;
        }
    };
    if tokio::time::timeout(deadline / 4, all_spilled).await.is_err() {
        tracing::warn!(
            databases = ledger.cursor().len(),
            "not everything could be made durable in time; the feed will tell of it again"
        );
    }
    let (done, told) = oneshot::channel();
    let _ = feed.cast(feed::Message::SaveFinally { done });
    let _ = tokio::time::timeout(deadline / 4, told).await;
}

/// Jobs under way may take half of the deadline; what is not done by then is left dirty and unlocked.
async fn stop_workers(workers: Option<ActorRef<workers::Message>>, deadline: Duration) {
    let Some(workers) = workers else { return };
    let (done, mut told) = oneshot::channel();
    let _ = workers.cast(workers::Message::Shutdown { done });
    if tokio::time::timeout(deadline / 2, &mut told).await.is_err() {
        let _ = workers.cast(workers::Message::BreakOff);
        if tokio::time::timeout(deadline / 4, told).await.is_err() {
            tracing::warn!("not every document could be unlocked in time; their locks end by themselves");
        }
    }
}

/// Where a side was replaced meanwhile, its replicator runs again; whoever is there takes it.
async fn flush(native: &NativeEngine, checkpoints: Option<Checkpoints>, deadline: Duration) {
    let again = tokio::time::timeout(deadline / 4, native.flush()).await.unwrap_or_default();
    let Some(checkpoints) = checkpoints else { return };
    for id in again {
        if let Err(error) = workers::job::owe(&checkpoints, &id).await {
            tracing::error!(%id, %error, "cannot write that the replicator runs again");
        }
    }
}
