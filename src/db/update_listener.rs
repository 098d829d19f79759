//! An update-listener in place of the directory: what changed is marked as dirty in the spiegel database, and others do the work.
//!
//! The feed speaks to it as to a directory, so that its debt, its watermark and its sweep are those of any process: what is owed
//! is settled once every document of that database is confirmed to say so. What to write is decided in `dirty`, and when in
//! `pace`; here are the queue, the requests and the two mailboxes. A crash loses nothing, because the cursor knows what is owed.

use crate::checkpoints::{Checkpoints, Gone};
use crate::couch::{Couch, WriteResult};
use crate::db::dirty::{Marking, Seen, Subject, mark};
use crate::db::pace::{Pace, goes_at, retry_after};
use crate::db::{Instance, directory};
use crate::job::{Claim, DbName, Debts};
use crate::rules::catalogue::Snapshot;
use crate::schedule::backoff::Backoff;
use crate::topology;
use crate::vault::redact_text;
use ractor::{Actor, ActorCell, ActorProcessingErr, ActorRef, SpawnErr, SupervisionEvent};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::{AbortHandle, JoinSet};
use url::Url;

#[derive(Clone)]
pub struct Arguments {
    pub couch: Couch,
    pub checkpoints: Checkpoints,
    pub snapshot: watch::Receiver<Arc<Snapshot>>,
    pub debts: Arc<dyn Debts>,
    /// For documents that CouchDB refuses.
    pub backoff: Backoff,
    /// Databases that are marked together.
    pub batch_size: usize,
    pub batch_timeout: Duration,
}

/// What stands for the directory, and what for the topology.
pub type Mailboxes = (ActorRef<directory::Message>, ActorRef<topology::Message>);

/// `local_url` is the watched server's: a replicator whose source is elsewhere is marked with each sweep.
pub async fn spawn(arguments: Arguments, local_url: Url, supervisor: ActorCell) -> Result<Mailboxes, SpawnErr> {
    let queue = Arc::new(Queue::default());
    let replicators = ReplicatorsState { queue: queue.clone(), snapshot: arguments.snapshot.clone(), local_url };
    let (listener, _) = Actor::spawn_linked(None, UpdateListener, (arguments, queue), supervisor).await?;
    let (replicators, _) = Actor::spawn_linked(None, Replicators, replicators, listener.get_cell()).await?;
    Ok((listener, replicators))
}

/// The mailbox that stands where the directory stands in a process that does everything.
pub struct UpdateListener;

pub struct State {
    queue: Arc<Queue>,
    marking: AbortHandle,
}

impl Drop for State {
    fn drop(&mut self) {
        self.marking.abort();
    }
}

impl Actor for UpdateListener {
    type Msg = directory::Message;
    type State = State;
    type Arguments = (Arguments, Arc<Queue>);

    async fn pre_start(
        &self,
        myself: ActorRef<directory::Message>,
        (arguments, queue): (Arguments, Arc<Queue>),
    ) -> Result<State, ActorProcessingErr> {
        let marker = Arc::new(Marker::new(arguments, queue.clone()));
        let running = tokio::spawn(marker.run());
        let marking = running.abort_handle();
        tokio::spawn(async move {
            if !running.await.is_err_and(|error| error.is_cancelled()) {
                myself.stop(Some(String::from("marking ended")));
            }
        });
        Ok(State { queue, marking })
    }

    async fn handle(
        &self,
        _: ActorRef<directory::Message>,
        message: directory::Message,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            directory::Message::Hint { db, instance } => state.queue.want(db, instance == Instance::Unsure),
            directory::Message::Spill { db, done } => state.queue.hurry(db, done),
            // Nothing of ours is in memory only.
            directory::Message::AwaitDurable { reply } => drop(reply.send(())),
            directory::Message::Stop => state.queue.stop(),
            // The rest is for the directory itself.
            _ => {}
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _: ActorRef<directory::Message>,
        event: SupervisionEvent,
        _: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorFailed(..) | SupervisionEvent::ActorTerminated(..) => {
                Err("the mailbox for replicators ended".into())
            }
            _ => Ok(()),
        }
    }
}

/// The mailbox that stands where the topology stands: replicators that no database's change tells of.
pub struct Replicators;

pub struct ReplicatorsState {
    queue: Arc<Queue>,
    snapshot: watch::Receiver<Arc<Snapshot>>,
    local_url: Url,
}

impl Actor for Replicators {
    type Msg = topology::Message;
    type State = ReplicatorsState;
    type Arguments = ReplicatorsState;

    async fn pre_start(
        &self,
        _: ActorRef<topology::Message>,
        arguments: ReplicatorsState,
    ) -> Result<ReplicatorsState, ActorProcessingErr> {
        Ok(arguments)
    }

    async fn handle(
        &self,
        _: ActorRef<topology::Message>,
        message: topology::Message,
        state: &mut ReplicatorsState,
    ) -> Result<(), ActorProcessingErr> {
        let snapshot = state.snapshot.borrow().clone();
        match message {
            topology::Message::TargetMade { db } => {
                state.queue.want_replicators(snapshot.replicators_to(&db).iter().map(|replicator| replicator.id.to_string()));
            }
            topology::Message::PollRemote => {
                let all = snapshot.replicators().values();
                let remote = all.filter(|replicator| !replicator.source.is_local(&state.local_url));
                state.queue.want_replicators(remote.map(|replicator| replicator.id.to_string()));
            }
            topology::Message::RunAgain { id } => state.queue.want_replicators([id.to_string()]),
            // A database's own are marked with it.
            topology::Message::SourceChanged { done, .. } => drop(done.send(())),
            topology::Message::Spill { done, .. } | topology::Message::Shutdown { done } => {
                state.queue.tell_of_replicators(done);
            }
            // Nothing runs here.
            _ => {}
        }
        Ok(())
    }
}

/// What is to be marked. After a crash the feed, which is rebuilt with this, tells again of all that is owed.
#[derive(Default)]
pub struct Queue {
    wanted: Mutex<Wanted>,
    changed: Notify,
}

#[derive(Default)]
struct Wanted {
    databases: BTreeMap<DbName, Hinted>,
    /// Without a database that changed, by id.
    replicators: HashSet<String>,
    /// Batches under way with some of these.
    flights_of_replicators: usize,
    /// Told once none of them is left to be marked.
    told_of_replicators: Vec<oneshot::Sender<()>>,
    first: Option<Instant>,
    /// Databases that are being marked; what is hinted of them meanwhile goes later.
    flying: HashSet<DbName>,
    /// Told once the database is marked.
    told: HashMap<DbName, Vec<oneshot::Sender<()>>>,
    is_hurried: bool,
    /// How often CouchDB refused documents of a database, in a row.
    refused: HashMap<DbName, u32>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Hinted {
    /// The feed told of its making or its deletion.
    may_be_gone: bool,
}

impl Wanted {
    fn tell_of_replicators(&mut self) {
        if self.replicators.is_empty() && self.flights_of_replicators == 0 {
            for done in self.told_of_replicators.drain(..) {
                let _ = done.send(());
            }
        }
    }
}

struct Batch {
    databases: Vec<(DbName, Hinted)>,
    replicators: Vec<String>,
}

impl Queue {
    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, db: DbName, may_be_gone: bool) {
        let mut wanted = self.wanted();
        wanted.databases.entry(db).or_default().may_be_gone |= may_be_gone;
        wanted.first.get_or_insert_with(Instant::now);
        drop(wanted);
        self.changed.notify_one();
    }

    fn want_replicators(&self, ids: impl IntoIterator<Item = String>) {
        let mut wanted = self.wanted();
        wanted.replicators.extend(ids);
        if !wanted.replicators.is_empty() {
            wanted.first.get_or_insert_with(Instant::now);
        }
        drop(wanted);
        self.changed.notify_one();
    }

    /// Its debt is old, or the end is near.
    fn hurry(&self, db: DbName, done: Option<oneshot::Sender<()>>) {
        let mut wanted = self.wanted();
        if let Some(done) = done {
            wanted.told.entry(db.clone()).or_default().push(done);
        }
        // What was refused has a time of its own.
        if wanted.flying.contains(&db) || wanted.refused.contains_key(&db) && !wanted.is_hurried {
            return;
        }
        drop(wanted);
        self.want(db, false);
    }

    fn tell_of_replicators(&self, done: oneshot::Sender<()>) {
        let mut wanted = self.wanted();
        wanted.told_of_replicators.push(done);
        wanted.tell_of_replicators();
    }

    /// A batch with some of them ended.
    fn replicators_flown(&self) {
        let mut wanted = self.wanted();
        wanted.flights_of_replicators = wanted.flights_of_replicators.saturating_sub(1);
        wanted.tell_of_replicators();
    }

    fn stop(&self) {
        self.wanted().is_hurried = true;
        self.changed.notify_one();
    }

    fn is_hurried(&self) -> bool {
        self.wanted().is_hurried
    }

    /// When the next batch goes; None while there is none.
    fn goes_at(&self, last: Option<Instant>, batch_size: usize, batch_timeout: Duration) -> Option<Instant> {
        let wanted = self.wanted();
        let ready = wanted.databases.keys().filter(|db| !wanted.flying.contains(*db)).count() + wanted.replicators.len();
        let first = wanted.first.filter(|_| ready > 0)?;
        Some(if wanted.is_hurried { first } else { goes_at(first, ready, last, batch_size, batch_timeout) })
    }

    fn take(&self, batch_size: usize) -> Batch {
        let mut wanted = self.wanted();
        let Wanted { databases, replicators, flying, first, .. } = &mut *wanted;
        let free: Vec<DbName> = databases.keys().filter(|db| !flying.contains(*db)).take(batch_size).cloned().collect();
        let taken: Vec<(DbName, Hinted)> = free.into_iter().filter_map(|db| databases.remove_entry(&db)).collect();
        flying.extend(taken.iter().map(|(db, _)| db.clone()));
        let ids: Vec<String> = replicators.iter().take(REPLICATORS_MAX).cloned().collect();
        for id in &ids {
            replicators.remove(id);
        }
        *first = (!databases.is_empty() || !replicators.is_empty()).then(Instant::now);
        wanted.flights_of_replicators += usize::from(!ids.is_empty());
        Batch { databases: taken, replicators: ids }
    }

    /// It says in CouchDB what it owes.
    fn marked(&self, db: &DbName) {
        let mut wanted = self.wanted();
        wanted.flying.remove(db);
        wanted.refused.remove(db);
        let told = wanted.told.remove(db).unwrap_or_default();
        drop(wanted);
        for done in told {
            let _ = done.send(());
        }
        self.changed.notify_one();
    }

    /// How often in a row now.
    fn refused(&self, db: &DbName) -> u32 {
        let mut wanted = self.wanted();
        wanted.flying.remove(db);
        wanted.told.remove(db);
        let refused = wanted.refused.entry(db.clone()).or_default();
        *refused = refused.saturating_add(1);
        *refused
    }
}

/// Of those that no database's change tells of, so many go with one batch.
const REPLICATORS_MAX: usize = 500;
/// Batches under way: one that waits for its second look does not hold up the next.
const FLIGHTS_MAX: usize = 8;
/// A node may answer 404 for a database that another node has just made.
const GONE_AFTER: Duration = Duration::from_secs(3);

struct Marker {
    arguments: Arguments,
    queue: Arc<Queue>,
    pace: Mutex<Pace>,
}

impl Marker {
    fn new(arguments: Arguments, queue: Arc<Queue>) -> Self {
        let longest = arguments.batch_timeout.clamp(Duration::from_millis(200), Duration::from_secs(1));
        Self { arguments, queue, pace: Mutex::new(Pace::new(longest, fastrand::f64())) }
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends only by a crash, its own or a flight's.
    async fn run(self: Arc<Self>) {
        let Arguments { batch_size, batch_timeout, .. } = self.arguments;
        let mut flights = JoinSet::new();
        let mut last = None;
        loop {
            while flights.len() < FLIGHTS_MAX
                && self.queue.goes_at(last, batch_size, batch_timeout).is_some_and(|at| at <= Instant::now())
            {
                last = Some(Instant::now());
                let (marker, batch) = (self.clone(), self.queue.take(batch_size));
                flights.spawn(async move { marker.fly(batch).await });
            }
            let goes_at = self.queue.goes_at(last, batch_size, batch_timeout).filter(|_| flights.len() < FLIGHTS_MAX);
            let due = async {
                match goes_at {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.queue.changed.notified() => {}
                () = due => {}
                Some(ended) = flights.join_next() => {
                    if !matches!(ended, Ok(Ok(()))) {
                        return;
                    }
                }
            }
        }
    }

    async fn fly(&self, batch: Batch) -> Result<(), Gone> {
        let debts = &self.arguments.debts;
        // Before the first request: what is owed later belongs to the next batch.
        let claims: Vec<(DbName, Claim)> = batch.databases.iter().map(|(db, _)| (db.clone(), debts.claim(db))).collect();
        let snapshot = self.arguments.snapshot.borrow().clone();
        let mut owners: BTreeMap<Subject, Option<DbName>> = BTreeMap::new();
        for (db, _) in &batch.databases {
            let of_source = snapshot.replicators_from(db).iter().map(|replicator| Subject::Replicator(replicator.id.to_string()));
            owners.extend(of_source.map(|subject| (subject, Some(db.clone()))));
            if !snapshot.rules_of(db).is_empty() {
                owners.insert(Subject::ChangeListener(db.to_string()), Some(db.clone()));
            }
        }
        let has_replicators = !batch.replicators.is_empty();
        for id in batch.replicators {
            owners.entry(Subject::Replicator(id)).or_insert(None);
        }
        let may_be_gone: HashSet<DbName> =
            batch.databases.into_iter().filter(|(_, hinted)| hinted.may_be_gone).map(|(db, _)| db).collect();
        let result = self.mark_all(owners.keys().cloned().collect(), &may_be_gone).await?;
        if has_replicators {
            self.queue.replicators_flown();
        }
        let owner_of = |subject: &Subject| owners.get(subject).cloned().flatten();
        let refused: HashSet<DbName> = result.refused.iter().filter_map(owner_of).collect();
        for (subject, reason) in result.refused.iter().zip(&result.reasons) {
            if owner_of(subject).is_none_or(|db| !self.queue.wanted().refused.contains_key(&db)) {
                tracing::error!(id = subject.id(), reason = redact_text(reason), "couchdb refuses to let it be marked as dirty");
            }
        }
        let unmade: HashSet<DbName> = result.unmade.iter().filter_map(owner_of).collect();
        let mut doubtful = Vec::new();
        for (db, claim) in claims {
            if refused.contains(&db) {
                debts.release(&db, claim);
                let refused = self.queue.refused(&db).saturating_sub(1);
                self.want_later(db, self.arguments.backoff.delay(refused, fastrand::f64()).max(Duration::from_secs(1)));
            } else if unmade.contains(&db) {
                doubtful.push((db, claim));
            } else {
                self.settle(&db, claim);
            }
        }
        if !doubtful.is_empty() && !self.queue.is_hurried() {
            tokio::time::sleep(GONE_AFTER).await;
        }
        for (db, claim) in doubtful {
            if matches!(self.arguments.couch.db_exists(&db).await, Ok(false)) {
                self.settle(&db, claim);
            } else {
                debts.release(&db, claim);
                self.queue.wanted().flying.remove(&db);
                self.queue.want(db, false);
            }
        }
        Ok(())
    }

    fn settle(&self, db: &DbName, claim: Claim) {
        self.arguments.debts.settle(db, claim);
        self.queue.marked(db);
    }

    fn want_later(&self, db: DbName, delay: Duration) {
        let queue = self.queue.clone();
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            queue.want(db, false);
        });
    }

    /// Until each of them says in CouchDB that there is work.
    async fn mark_all(&self, subjects: Vec<Subject>, may_be_gone: &HashSet<DbName>) -> Result<Marked, Gone> {
        let mut marked = Marked::default();
        let mut left: BTreeMap<Subject, Option<Seen>> = subjects.into_iter().map(|subject| (subject, None)).collect();
        let mut is_first_look = true;
        let mut conflicts = 0;
        while !left.is_empty() {
            let Look { found, is_seen_to, is_disturbed } = self.look(&mut left).await?;
            let found = self.without_missing_databases(found, may_be_gone, &mut marked).await;
            left.retain(|subject, _| !marked.unmade.contains(subject));
            // A conflict may be a worker's as well, who marks nothing.
            match conflicts {
                0 if is_seen_to || is_disturbed => self.pace().followed(),
                0 => {}
                _ if is_seen_to => self.pace().conflict(fastrand::f64()),
                _ => {}
            }
            if found.is_empty() {
                break;
            }
            let wait = self.pace().wait().filter(|_| is_first_look && !self.queue.is_hurried());
            if std::mem::take(&mut is_first_look)
                && let Some(wait) = wait
            {
                tokio::time::sleep(wait).await;
                continue;
            }
            let conflicted = self.write(found, &mut marked).await?;
            left.retain(|subject, _| conflicted.contains(subject));
            if conflicted.is_empty() {
                if !is_seen_to && !is_disturbed && conflicts == 0 {
                    self.pace().led();
                }
                break;
            }
            tokio::time::sleep(retry_after(conflicts, fastrand::f64())).await;
            conflicts = conflicts.saturating_add(1);
        }
        Ok(marked)
    }

    /// What is to be written of those that are left. Those that need nothing are left no more.
    async fn look(&self, left: &mut BTreeMap<Subject, Option<Seen>>) -> Result<Look, Gone> {
        let docs = self.arguments.checkpoints.load_all(left.keys().map(Subject::id)).await?;
        let now = SystemTime::now();
        let mut look = Look::default();
        let mut done = HashSet::new();
        for ((subject, seen), doc) in left.iter_mut().zip(docs) {
            let is_done = match mark(subject, doc.as_ref(), seen.as_ref(), now) {
                Marking::Write(marked) => {
                    look.is_disturbed |= seen.as_ref().is_some_and(|seen| seen.is_older_than(doc.as_ref()));
                    look.found.push((subject.clone(), marked));
                    false
                }
                Marking::IsDirty | Marking::IsTaken => {
                    look.is_seen_to |= seen.is_some();
                    true
                }
                Marking::IsGone => true,
            };
            if is_done {
                done.insert(subject.clone());
            }
            seen.get_or_insert_with(|| Seen::of(doc.as_ref()));
        }
        left.retain(|subject, _| !done.contains(subject));
        Ok(look)
    }

    /// A deleted database gets no change listener, which would only have to be deleted again.
    async fn without_missing_databases(
        &self,
        found: Vec<(Subject, Value)>,
        may_be_gone: &HashSet<DbName>,
        marked: &mut Marked,
    ) -> Vec<(Subject, Value)> {
        let mut kept = Vec::with_capacity(found.len());
        for (subject, doc) in found {
            let is_new = doc.get("_rev").is_none();
            let is_missing = match &subject {
                Subject::ChangeListener(db) if is_new && may_be_gone.contains(db.as_str()) => {
                    matches!(self.arguments.couch.db_exists(db).await, Ok(false))
                }
                _ => false,
            };
            match is_missing {
                true => _ = marked.unmade.insert(subject),
                false => kept.push((subject, doc)),
            }
        }
        kept
    }

    /// Gives those that somebody else wrote meanwhile.
    async fn write(&self, docs: Vec<(Subject, Value)>, marked: &mut Marked) -> Result<HashSet<Subject>, Gone> {
        let (subjects, docs): (Vec<Subject>, Vec<_>) = docs.into_iter().unzip();
        let mut conflicted = HashSet::new();
        for (subject, saved) in subjects.into_iter().zip(self.arguments.checkpoints.save_all(docs).await?) {
            match saved {
                WriteResult::Saved { .. } => {}
                WriteResult::Conflict => _ = conflicted.insert(subject),
                WriteResult::Refused { reason } => {
                    marked.refused.push(subject);
                    marked.reasons.push(reason);
                }
            }
        }
        Ok(conflicted)
    }
}

#[derive(Debug, Default)]
struct Look {
    found: Vec<(Subject, Value)>,
    /// Since the last look somebody else has done what was to be done of one of them,
    is_seen_to: bool,
    /// or has written one that is still to be written.
    is_disturbed: bool,
}

/// What became of a batch, beside those that say now that there is work.
#[derive(Debug, Default)]
struct Marked {
    refused: Vec<Subject>,
    reasons: Vec<String>,
    /// Change listeners of databases that seem to be gone.
    unmade: HashSet<Subject>,
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn the_end_waits_for_replicators_that_are_not_marked_yet() {
        let queue = Queue::default();
        let ask = || {
            let (done, told) = oneshot::channel();
            queue.tell_of_replicators(done);
            told
        };
        assert_eq!(ask().try_recv(), Ok(()), "there are none");
        queue.want_replicators((0..=REPLICATORS_MAX).map(|number| number.to_string()));
        let mut told = [ask(), ask()];
        for (left, is_told) in [(1, false), (0, true)] {
            assert!(!queue.take(10).replicators.is_empty());
            assert_eq!(queue.wanted().replicators.len(), left);
            assert!(told.iter_mut().all(|told| told.try_recv().is_err()), "those under way are not marked either");
            queue.replicators_flown();
            assert!(told.iter_mut().all(|told| told.try_recv().is_ok() == is_told), "{left}");
        }
    }
}
