//! Reads and writes Spiegel's own documents, many at a time.
//!
//! Whatever is asked while a request is under way goes into the next one: a hundred databases that change in the same moment
//! cost one `_all_docs` and one `_bulk_docs`. A write is confirmed only by CouchDB's 201; a 202 is read again. CouchDB being
//! away is waited out here, so that nobody else has to.

use crate::couch::{Couch, CouchError, WriteResult};
use crate::locks::sign::OwnRevs;
use crate::schedule::backoff::Backoff;
use crate::telemetry::{Metrics, OutcomeLabels};
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use serde_json::Value;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio_util::task::AbortOnDropHandle;

pub enum Message {
    Load {
        id: String,
        reply: oneshot::Sender<Option<Value>>,
    },
    Save {
        doc: Value,
        reply: oneshot::Sender<WriteResult>,
    },
    /// Only what enough nodes took counts.
    Lock {
        doc: Value,
        reply: oneshot::Sender<Locked>,
    },
    /// Together, in as few requests as they fit.
    LoadAll(Vec<(String, oneshot::Sender<Option<Value>>)>),
    SaveAll(Vec<(Value, oneshot::Sender<WriteResult>)>),
    /// Can wait a moment for a request that is sent anyway.
    SaveAlong {
        doc: Value,
        reply: oneshot::Sender<WriteResult>,
    },
    WaitedLongEnough,
    /// Whatever was asked in the same moment is here now.
    Begin,
    /// The end is near: nothing waits any more.
    Hurry,
    LoadDone,
    SaveDone,
    Crashed,
}

impl ractor::Message for Message {}

/// What became of a write that is to be a lock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Locked {
    Yes {
        rev: String,
    },
    /// Somebody else wrote first.
    No,
    /// A 202: somebody else may have got a 201, and this revision stays as a conflict.
    TooFew {
        rev: String,
    },
    Refused {
        reason: String,
    },
}

enum Reply {
    Saved(oneshot::Sender<WriteResult>),
    Locked(oneshot::Sender<Locked>),
}

/// The handle that the stages use.
#[derive(Clone)]
pub struct Checkpoints(ActorRef<Message>);

/// The actor went away; whoever asked is rebuilt with it.
#[derive(Debug, thiserror::Error)]
#[error("the checkpoints are being restarted")]
pub struct Gone;

impl Checkpoints {
    pub fn new(actor: ActorRef<Message>) -> Self {
        Self(actor)
    }

    pub async fn load(&self, id: String) -> Result<Option<Value>, Gone> {
        let (reply, answer) = oneshot::channel();
        self.0.cast(Message::Load { id, reply }).map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)
    }

    /// Hands the write in at once; the answer comes when CouchDB confirmed or refused it.
    pub fn save(&self, doc: Value) -> oneshot::Receiver<WriteResult> {
        let (reply, answer) = oneshot::channel();
        // Where the actor is gone the reply is dropped, and the receiver says so.
        let _ = self.0.cast(Message::Save { doc, reply });
        answer
    }

    /// As `save`, for a write that is a lock.
    pub fn lock(&self, doc: Value) -> oneshot::Receiver<Locked> {
        let (reply, answer) = oneshot::channel();
        let _ = self.0.cast(Message::Lock { doc, reply });
        answer
    }

    /// In the order of `ids`.
    pub async fn load_all(&self, ids: impl IntoIterator<Item = String>) -> Result<Vec<Option<Value>>, Gone> {
        let (loads, answers): (Vec<_>, Vec<_>) = ids.into_iter().map(with_reply).unzip();
        self.0.cast(Message::LoadAll(loads)).map_err(|_| Gone)?;
        all(answers).await
    }

    /// In the order of `docs`.
    pub async fn save_all(&self, docs: impl IntoIterator<Item = Value>) -> Result<Vec<WriteResult>, Gone> {
        let (saves, answers): (Vec<_>, Vec<_>) = docs.into_iter().map(with_reply).unzip();
        self.0.cast(Message::SaveAll(saves)).map_err(|_| Gone)?;
        all(answers).await
    }

    /// As `save`, but without a request of its own where another write comes soon.
    pub fn save_along(&self, doc: Value) -> oneshot::Receiver<WriteResult> {
        let (reply, answer) = oneshot::channel();
        let _ = self.0.cast(Message::SaveAlong { doc, reply });
        answer
    }

    /// What waits to go along goes now, and so does what comes.
    pub fn hurry(&self) {
        let _ = self.0.cast(Message::Hurry);
    }

    /// Saves `fields` into the document whatever happens to it meanwhile: a conflict is read again. None where the document
    /// is gone. `update` sees each current version and may decline by returning false.
    pub async fn update(&self, id: &str, mut update: impl FnMut(&mut Value) -> bool) -> Result<Option<Value>, UpdateError> {
        // Each round lost a race against another writer; many in a row mean that somebody writes in a loop.
        for _ in 0..20 {
            let Some(mut doc) = self.load(id.to_string()).await? else { return Ok(None) };
            if !update(&mut doc) {
                return Ok(Some(doc));
            }
            match self.save(doc.clone()).await.map_err(|_| Gone)? {
                WriteResult::Saved { rev } => {
                    doc["_rev"] = Value::from(rev);
                    return Ok(Some(doc));
                }
                WriteResult::Conflict => {}
                WriteResult::Refused { reason } => return Err(UpdateError::Refused(reason)),
            }
        }
        Err(UpdateError::Contended)
    }
}

type WithReply<T, A> = ((T, oneshot::Sender<A>), oneshot::Receiver<A>);

fn with_reply<T, A>(asked: T) -> WithReply<T, A> {
    let (reply, answer) = oneshot::channel();
    ((asked, reply), answer)
}

async fn all<A>(answers: Vec<oneshot::Receiver<A>>) -> Result<Vec<A>, Gone> {
    let mut all = Vec::with_capacity(answers.len());
    for answer in answers {
        all.push(answer.await.map_err(|_| Gone)?);
    }
    Ok(all)
}

#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    #[error(transparent)]
    Gone(#[from] Gone),
    #[error("couchdb refused the document: {0}")]
    Refused(String),
    #[error("the document changes faster than it can be written")]
    Contended,
}

pub struct CheckpointsActor;

pub struct Arguments {
    pub couch: Couch,
    pub db_name: String,
    pub backoff: Backoff,
    pub metrics: Arc<Metrics>,
    /// Where it is noted what was written.
    pub own: Arc<OwnRevs>,
}

pub struct State {
    io: Arc<Io>,
    loads: Vec<(String, oneshot::Sender<Option<Value>>)>,
    saves: Vec<(Value, Reply)>,
    /// Go with the next write, or alone when the timer fires.
    along: Vec<(Value, Reply)>,
    timer: Option<AbortHandle>,
    is_hurried: bool,
    is_beginning: bool,
    loading: Option<AbortHandle>,
    saving: Option<AbortHandle>,
}

struct Io {
    couch: Couch,
    db_name: String,
    backoff: Backoff,
    metrics: Arc<Metrics>,
    own: Arc<OwnRevs>,
}

impl Drop for State {
    fn drop(&mut self) {
        for task in [self.loading.take(), self.saving.take(), self.timer.take()].into_iter().flatten() {
            task.abort();
        }
    }
}

/// CouchDB takes larger requests, but one that takes long delays those who wait for the next.
const BATCH_MAX: usize = 500;
/// The watermark is saved every few seconds; so much later is no more work to repeat after a crash than without it.
const ALONG_AFTER: Duration = Duration::from_secs(2);

impl Actor for CheckpointsActor {
    type Msg = Message;
    type State = State;
    type Arguments = Arguments;

    async fn pre_start(&self, _: ActorRef<Message>, arguments: Arguments) -> Result<State, ActorProcessingErr> {
        let Arguments { couch, db_name, backoff, metrics, own } = arguments;
        let io = Arc::new(Io { couch, db_name, backoff, metrics, own });
        Ok(State {
            io,
            loads: Vec::new(),
            saves: Vec::new(),
            along: Vec::new(),
            timer: None,
            is_hurried: false,
            is_beginning: false,
            loading: None,
            saving: None,
        })
    }

    async fn handle(&self, myself: ActorRef<Message>, message: Message, state: &mut State) -> Result<(), ActorProcessingErr> {
        let begins = matches!(message, Message::Begin | Message::LoadDone | Message::SaveDone);
        match message {
            Message::Load { id, reply } => state.loads.push((id, reply)),
            Message::Save { doc, reply } => {
                state.saves.push((doc, Reply::Saved(reply)));
                state.saves.append(&mut state.along);
            }
            Message::Lock { doc, reply } => {
                state.saves.push((doc, Reply::Locked(reply)));
                state.saves.append(&mut state.along);
            }
            Message::LoadAll(loads) => state.loads.extend(loads),
            Message::SaveAll(saves) => {
                state.saves.extend(saves.into_iter().map(|(doc, reply)| (doc, Reply::Saved(reply))));
                state.saves.append(&mut state.along);
            }
            Message::SaveAlong { doc, reply } if state.is_hurried => state.saves.push((doc, Reply::Saved(reply))),
            Message::SaveAlong { doc, reply } => {
                state.along.push((doc, Reply::Saved(reply)));
                if state.timer.is_none() {
                    let myself = myself.clone();
                    state.timer = Some(spawn(async move {
                        tokio::time::sleep(ALONG_AFTER).await;
                        let _ = myself.cast(Message::WaitedLongEnough);
                    }));
                }
            }
            Message::Hurry => {
                state.is_hurried = true;
                state.saves.append(&mut state.along);
            }
            Message::WaitedLongEnough => {
                state.timer = None;
                state.saves.append(&mut state.along);
            }
            Message::Crashed => return Err("a request for our own documents crashed".into()),
            Message::Begin => state.is_beginning = false,
            Message::LoadDone => state.loading = None,
            Message::SaveDone => state.saving = None,
        }
        let can_begin =
            (state.loading.is_none() && !state.loads.is_empty()) || (state.saving.is_none() && !state.saves.is_empty());
        if !can_begin || state.is_beginning {
            return Ok(());
        }
        if !begins {
            state.is_beginning = true;
            let _ = myself.cast(Message::Begin);
            return Ok(());
        }
        if state.loading.is_none() && !state.loads.is_empty() {
            let batch: Vec<_> = state.loads.drain(..state.loads.len().min(BATCH_MAX)).collect();
            let (io, myself) = (state.io.clone(), myself.clone());
            let loading = AbortOnDropHandle::new(tokio::spawn(async move { io.load(batch).await }));
            state.loading = Some(spawn(async move {
                let _ = myself.cast(if loading.await.is_ok() { Message::LoadDone } else { Message::Crashed });
            }));
        }
        if state.saving.is_none() && !state.saves.is_empty() {
            let batch = next_batch(&mut state.saves);
            let io = state.io.clone();
            let saving = AbortOnDropHandle::new(tokio::spawn(async move { io.save(batch).await }));
            state.saving = Some(spawn(async move {
                let _ = myself.cast(if saving.await.is_ok() { Message::SaveDone } else { Message::Crashed });
            }));
        }
        Ok(())
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

/// Takes the oldest writes, but of one document only the first: PouchDB breaks a document that one `_bulk_docs` holds twice.
fn next_batch(saves: &mut Vec<(Value, Reply)>) -> Vec<(Value, Reply)> {
    let (mut batch, mut later, mut ids) = (Vec::new(), Vec::new(), HashSet::new());
    for (doc, reply) in saves.drain(..) {
        if batch.len() < BATCH_MAX && ids.insert(doc["_id"].as_str().map(String::from)) {
            batch.push((doc, reply));
        } else {
            later.push((doc, reply));
        }
    }
    *saves = later;
    batch
}

fn spawn(task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
    tokio::spawn(task).abort_handle()
}

impl Io {
    async fn load(&self, batch: Vec<(String, oneshot::Sender<Option<Value>>)>) {
        let (ids, replies): (Vec<String>, Vec<_>) = batch.into_iter().filter(|(_, reply)| !reply.is_closed()).unzip();
        if ids.is_empty() {
            return;
        }
        let docs = self.until_answered("load documents", || self.couch.get_docs(&self.db_name, &ids)).await;
        for (reply, doc) in replies.into_iter().zip(docs) {
            let _ = reply.send(doc);
        }
    }

    async fn save(&self, batch: Vec<(Value, Reply)>) {
        let (docs, replies): (Vec<Value>, Vec<_>) = batch.into_iter().unzip();
        let answer = self.until_answered("save documents", || self.couch.bulk_docs(&self.db_name, &docs)).await;
        let mut results = answer.results;
        let said = results.clone();
        for (doc, result) in docs.iter().zip(&said) {
            if let WriteResult::Saved { rev } = result {
                self.own.wrote(doc["_id"].as_str().unwrap_or_default(), rev);
            }
        }
        if !answer.confirmed && replies.iter().any(|reply| matches!(reply, Reply::Saved(_))) {
            self.confirm(&docs, &mut results).await;
        }
        for (index, (reply, result)) in replies.into_iter().zip(results).enumerate() {
            let outcome = match &result {
                WriteResult::Saved { .. } => "saved",
                WriteResult::Conflict => "conflict",
                WriteResult::Refused { .. } => "refused",
            };
            self.metrics.checkpoint_writes.get_or_create(&OutcomeLabels { outcome }).inc();
            // Nobody may be waiting any more.
            match reply {
                Reply::Saved(reply) => drop(reply.send(result)),
                Reply::Locked(reply) => {
                    let is_accepted = answer.accepted.get(index).copied().unwrap_or_default();
                    drop(reply.send(locked(said.get(index), is_accepted)));
                }
            }
        }
    }

    /// A 202 says that too few replicas took the write: it may lose to another one, so what reads back decides.
    async fn confirm(&self, docs: &[Value], results: &mut [WriteResult]) {
        let ids: Vec<String> = docs.iter().map(|doc| doc["_id"].as_str().unwrap_or_default().to_string()).collect();
        let current = self.until_answered("read back documents", || self.couch.get_docs(&self.db_name, &ids)).await;
        for (result, current) in results.iter_mut().zip(current) {
            if let WriteResult::Saved { rev } = result
                && current.as_ref().and_then(|doc| doc["_rev"].as_str()) != Some(rev)
            {
                *result = WriteResult::Conflict;
            }
        }
    }

    async fn until_answered<T, F: Future<Output = Result<T, CouchError>>>(&self, what: &str, ask: impl Fn() -> F) -> T {
        let mut retries = 0;
        loop {
            self.couch.health().up().await;
            match ask().await {
                Ok(answer) => return answer,
                Err(error) => {
                    // CouchHealth says once that CouchDB is away; what is no outage is worth a line, but only the first one.
                    if !error.is_outage() && retries == 0 {
                        tracing::error!(db = %self.db_name, %error, "cannot {what}, trying again");
                    }
                    tokio::time::sleep(self.backoff.delay(retries, fastrand::f64()).max(Duration::from_millis(20))).await;
                    retries = retries.saturating_add(1);
                }
            }
        }
    }
}

fn locked(said: Option<&WriteResult>, is_accepted: bool) -> Locked {
    match said.cloned() {
        Some(WriteResult::Saved { rev }) if is_accepted => Locked::TooFew { rev },
        Some(WriteResult::Saved { rev }) => Locked::Yes { rev },
        Some(WriteResult::Conflict) | None => Locked::No,
        Some(WriteResult::Refused { reason }) => Locked::Refused { reason },
    }
}

#[cfg(all(test, feature = "dev"))]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::couch::CouchSettings;
    use crate::dev::{DevOptions, DevServer};
    use crate::vault::Credentials;
    use serde_json::json;

    struct Bench {
        server: DevServer,
        couch: Couch,
        checkpoints: Checkpoints,
    }

    async fn bench() -> Bench {
        let options = DevOptions {
            listen: ([127, 0, 0, 1], 0).into(),
            user: "admin".into(),
            password: "secret".to_string().into(),
            global_changes_delay: Duration::from_millis(20),
        };
        let server = DevServer::start(options).await.expect("a free port");
        let settings = CouchSettings {
            url: server.url(),
            credentials: Some(Credentials { user: "admin".into(), password: "secret".to_string().into() }),
            connect_timeout: Duration::from_secs(5),
            read_timeout: Duration::from_secs(5),
        };
        let couch = Couch::new(settings, Metrics::new()).expect("a client");
        couch.create_db("spiegel").await.expect("a database");
        let arguments = Arguments {
            couch: couch.clone(),
            db_name: "spiegel".into(),
            backoff: Backoff::new(Duration::from_millis(10), Duration::from_millis(50)),
            metrics: Metrics::new(),
            own: Arc::default(),
        };
        let (actor, _) = Actor::spawn(None, CheckpointsActor, arguments).await.expect("it starts");
        server.reset_requests();
        Bench { server, couch, checkpoints: Checkpoints::new(actor) }
    }

    impl Bench {
        fn requests(&self, endpoint: &str) -> u64 {
            self.server.requests().iter().filter(|(name, _)| name.ends_with(endpoint)).map(|(_, count)| count).sum()
        }
    }

    #[tokio::test]
    async fn what_is_asked_together_costs_few_requests() {
        let bench = bench().await;
        let saves: Vec<_> = (0..100).map(|n| bench.checkpoints.save(json!({ "_id": format!("d{n}") }))).collect();
        for saved in saves {
            assert!(matches!(saved.await, Ok(WriteResult::Saved { .. })));
        }
        let loads = (0..100).map(|n| bench.checkpoints.load(format!("d{n}")));
        for loaded in futures_util::future::join_all(loads).await {
            assert!(loaded.expect("it lives").is_some());
        }
        assert!(bench.requests("_bulk_docs") <= 3, "{:?}", bench.server.requests());
        assert!(bench.requests("_all_docs") <= 3, "{:?}", bench.server.requests());
    }

    #[tokio::test]
    async fn what_goes_along_has_no_request_of_its_own() {
        let bench = bench().await;
        let along = bench.checkpoints.save_along(json!({ "_id": "watermark" }));
        let now = bench.checkpoints.save(json!({ "_id": "position" }));
        assert!(matches!(now.await, Ok(WriteResult::Saved { .. })));
        assert!(matches!(along.await, Ok(WriteResult::Saved { .. })));
        assert_eq!(bench.requests("_bulk_docs"), 1);

        let alone = bench.checkpoints.save_along(json!({ "_id": "alone" }));
        bench.checkpoints.hurry();
        assert!(matches!(alone.await, Ok(WriteResult::Saved { .. })), "it does not wait for ever");
    }

    #[tokio::test]
    async fn no_request_writes_a_document_twice() {
        let bench = bench().await;
        let saves: Vec<_> = ["d", "e", "d", "d", "f"].map(|id| bench.checkpoints.save(json!({ "_id": id }))).into();
        let mut results = Vec::new();
        for saved in saves {
            results.push(matches!(saved.await, Ok(WriteResult::Saved { .. })));
        }
        assert_eq!(results, [true, true, false, false, true], "the first one wins");
        assert_eq!(bench.requests("_bulk_docs"), 3, "{:?}", bench.server.requests());
    }

    #[test]
    fn a_batch_is_full_of_what_waited_longest() {
        let write = |id: usize| (json!({ "_id": id.to_string() }), Reply::Saved(oneshot::channel().0));
        let ids = |writes: &[(Value, Reply)]| writes.iter().map(|(doc, _)| doc["_id"].clone()).collect::<Vec<_>>();
        let mut saves: Vec<_> = [0, 0].into_iter().chain(1..BATCH_MAX + 2).map(write).collect();
        let batch = next_batch(&mut saves);
        assert_eq!(ids(&batch), (0..BATCH_MAX).map(|id| json!(id.to_string())).collect::<Vec<_>>());
        assert_eq!(ids(&saves), ["0".to_string(), BATCH_MAX.to_string(), (BATCH_MAX + 1).to_string()]);
        assert_eq!(next_batch(&mut saves).len(), 3);
        assert!(saves.is_empty() && next_batch(&mut saves).is_empty());
    }

    #[tokio::test]
    async fn a_202_is_read_again() {
        let bench = bench().await;
        bench.server.faults().answer(None, "/spiegel/_bulk_docs", 202, 1);
        assert!(matches!(bench.checkpoints.save(json!({ "_id": "d" })).await, Ok(WriteResult::Saved { .. })));
        assert_eq!(bench.requests("_all_docs"), 1);
    }

    #[tokio::test]
    async fn errors_are_waited_out_and_a_conflict_is_told() {
        let bench = bench().await;
        bench.server.faults().answer(None, "/spiegel/_bulk_docs", 500, 2);
        assert!(matches!(bench.checkpoints.save(json!({ "_id": "d" })).await, Ok(WriteResult::Saved { .. })));
        assert_eq!(bench.checkpoints.save(json!({ "_id": "d" })).await.expect("it lives"), WriteResult::Conflict);
        let updated = bench.checkpoints.update("d", |doc| {
            doc["x"] = json!(1);
            true
        });
        assert_eq!(updated.await.expect("it is there").expect("a document")["x"], 1);
        assert_eq!(bench.couch.get_doc("spiegel", "d").await.expect("it answers").expect("a document")["x"], 1);
    }
}
