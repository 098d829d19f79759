//! Whoever makes the attempts of a dispatcher's jobs.

use super::queue::EntryId;
use super::{DispatcherMsg, Perform, Spec};
use futures_util::FutureExt;
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use std::marker::PhantomData;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use tokio_util::task::AbortOnDropHandle;

/// Runs one job at a time, in a task of its own: the mailbox stays free, and the task ends with the actor.
pub struct Worker<P>(PhantomData<fn() -> P>);

impl<P> Worker<P> {
    pub(super) fn new() -> Self {
        Self(PhantomData)
    }
}

pub enum WorkerMsg<S> {
    Run {
        entry: EntryId,
        spec: Arc<S>,
    },
    /// From the task.
    Panicked(String),
}

impl<S: Spec> ractor::Message for WorkerMsg<S> {}

pub struct WorkerState<P: Perform> {
    perform: Arc<P>,
    dispatcher: ActorRef<DispatcherMsg<P::Spec>>,
    attempt: Option<AbortOnDropHandle<()>>,
}

impl<P: Perform> Actor for Worker<P> {
    type Msg = WorkerMsg<P::Spec>;
    type State = WorkerState<P>;
    type Arguments = (Arc<P>, ActorRef<DispatcherMsg<P::Spec>>);

    async fn pre_start(
        &self,
        _myself: ActorRef<Self::Msg>,
        (perform, dispatcher): Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        Ok(WorkerState { perform, dispatcher, attempt: None })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            WorkerMsg::Run { entry, spec } => {
                let task = attempt(state.perform.clone(), entry, spec, myself, state.dispatcher.clone());
                state.attempt = Some(AbortOnDropHandle::new(tokio::spawn(task)));
                Ok(())
            }
            // A panic may have left what the worker holds in any state: it ends, and the dispatcher gives the job to another.
            WorkerMsg::Panicked(error) => Err(error.into()),
        }
    }

    /// It has no children.
    async fn handle_supervisor_evt(
        &self,
        _myself: ActorRef<Self::Msg>,
        _event: SupervisionEvent,
        _state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        Ok(())
    }
}

/// Its end goes straight to the dispatcher: a message less for each job.
async fn attempt<P: Perform>(
    perform: Arc<P>,
    entry: EntryId,
    spec: Arc<P::Spec>,
    worker: ActorRef<WorkerMsg<P::Spec>>,
    dispatcher: ActorRef<DispatcherMsg<P::Spec>>,
) {
    let performed = AssertUnwindSafe(async move { perform.perform(spec).await }).catch_unwind().await;
    // Where either has ended, nobody waits for this any more.
    match performed {
        Ok(result) => drop(dispatcher.cast(DispatcherMsg::Finished { worker: worker.get_id(), entry, result })),
        Err(panic) => drop(worker.cast(WorkerMsg::Panicked(panic_text(panic.as_ref())))),
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_string()));
    text.unwrap_or_else(|| String::from("a panic without text"))
}
