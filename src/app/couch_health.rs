//! CouchHealth: probes while CouchDB is suspect, and says once that it is away and once that it is back.

use crate::couch::Couch;
use crate::couch::health::State as Answers;
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::time::{Duration, Instant};
use tokio::task::AbortHandle;

pub enum Message {
    Ended,
}

impl ractor::Message for Message {}

pub struct CouchHealth;

pub struct State {
    task: AbortHandle,
}

impl Drop for State {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Actor for CouchHealth {
    type Msg = Message;
    type State = State;
    type Arguments = Couch;

    async fn pre_start(&self, myself: ActorRef<Message>, couch: Couch) -> Result<State, ActorProcessingErr> {
        let running = tokio::spawn(watch(couch));
        let task = running.abort_handle();
        tokio::spawn(async move {
            let _ = running.await;
            let _ = myself.cast(Message::Ended);
        });
        Ok(State { task })
    }

    async fn handle(&self, _: ActorRef<Message>, message: Message, _: &mut State) -> Result<(), ActorProcessingErr> {
        match message {
            Message::Ended => Err("the probe of CouchDB crashed".into()),
        }
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<Message>,
        _: SupervisionEvent,
        _: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        Ok(())
    }
}

const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// One failed probe may be one lost packet.
const PROBES_BEFORE_DOWN: u32 = 2;
const PROBE_EVERY_MAX: Duration = Duration::from_secs(2);

async fn watch(couch: Couch) {
    loop {
        // After a crash of this actor in the middle of an outage there is nothing to wait for.
        let reason = match couch.health().is_up() {
            true => couch.health().suspected().await,
            false => String::from("was away before"),
        };
        let mut delay = Duration::from_millis(100);
        let mut failures = 0;
        let began = Instant::now();
        loop {
            match probe(&couch).await {
                Ok(()) => {
                    if couch.health().publish(Answers::Up) {
                        tracing::info!(url = couch.address(), after_ms = began.elapsed().as_millis(), "couchdb answers again");
                    }
                    break;
                }
                Err(error) => {
                    failures += 1;
                    if failures >= PROBES_BEFORE_DOWN && couch.health().publish(Answers::Down) {
                        tracing::error!(url = couch.address(), reason, error, "couchdb does not answer, waiting for it");
                    }
                }
            }
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(PROBE_EVERY_MAX);
        }
    }
}

/// The welcome alone would not notice a wrong password, or a proxy that answers for a dead server.
async fn probe(couch: &Couch) -> Result<(), String> {
    let session = tokio::time::timeout(PROBE_TIMEOUT, couch.probe()).await;
    match session {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {PROBE_TIMEOUT:?}")),
    }
}
