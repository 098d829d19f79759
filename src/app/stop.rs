//! The end: stop the feed ▶ no new jobs ▶ wait, with a deadline ▶ spill ▶ watermark ▶ give back what is claimed.

use crate::db::directory;
use crate::deliveries::Deliveries;
use crate::feed;
use crate::feed::cursor::Ledger;
use crate::replicate::native::NativeEngine;
use crate::schedule::Pool;
use crate::topology;
use crate::webhook::HttpSender;
use ractor::ActorRef;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

pub(super) struct Stopping {
    pub feed: Option<ActorRef<feed::Message>>,
    pub directory: Option<ActorRef<directory::Message>>,
    pub topology: Option<ActorRef<topology::Message>>,
    pub webhooks: Option<Pool<HttpSender>>,
    pub deliveries: Option<Deliveries>,
    pub ledger: Arc<Ledger>,
    pub native: Arc<NativeEngine>,
    pub deadline: Duration,
}

/// Of the deadline, what runs now may take half, the spill and the watermark a quarter each.
impl Stopping {
    pub async fn run(self) {
        let Self {
            feed: Some(feed),
            directory: Some(directory),
            topology: Some(topology),
            webhooks: Some(webhooks),
            deliveries: Some(deliveries),
            ledger,
            native,
            deadline,
        } = self
        else {
            return;
        };
        let _ = feed.cast(feed::Message::Stop);
        let _ = directory.cast(directory::Message::Stop);
        deliveries.stop_trying();
        let under_way = futures_util::future::join(ledger.room(1), deliveries.tries_ended());
        let _ = tokio::time::timeout(deadline / 2, under_way).await;

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

        // A request is cut off before its claim is given back: nobody else may make it while it is in the air.
        let _ = webhooks.cell().stop_and_wait(None, Some(deadline / 8)).await;
        let _ = tokio::time::timeout(deadline / 8, deliveries.tries_ended()).await;
    }
}
