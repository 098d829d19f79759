//! Tries again what is parked: claim, read, send, settle.

use super::index::Entry;
use super::missing::Missing;
use super::park::failed_again;
use super::parked::{Disabled, Key, Parked, State};
use super::tidy::TIDY_EVERY;
use super::{Arguments, Deliveries};
use crate::couch::docs::{Current, DBS_INFO_KEYS_MAX};
use crate::couch::{CouchError, Rev, Row, Seq, WriteResult, generation};
use crate::job::{DbName, Failed, Outcome, Verdict};
use crate::rules::catalogue::{Snapshot, changed_rules};
use crate::rules::document::Document;
use crate::rules::rule::Rule;
use crate::schedule::Breakers;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::Semaphore;
use tokio::task::{Id, JoinSet};

/// Tries under way; each is one document of a user's in memory.
const IN_FLIGHT_MAX: usize = 256;
/// What is due within this is claimed together: one by one a try costs CouchDB five requests.
const TOGETHER: Duration = Duration::from_millis(250);
/// Documents that are read by one request, and such requests at once.
const OF_ONE_DATABASE_MAX: usize = 50;
const READS_MAX: usize = 16;
/// What cannot be tried now, because its rule is disabled or damaged, is looked at again after this.
pub const NOT_NOW: Duration = Duration::from_secs(60);
/// CouchDB did not answer as it should; it is asked again after this.
const COUCHDB_FAILED: Duration = Duration::from_secs(5);
/// Of its lease a try leaves so much for writing down what came of it.
const LEASE_REST: Duration = Duration::from_secs(5);

/// What a try finds of its document.
enum Newest {
    /// As the feed would tell of it.
    Is(Row),
    Later(Duration),
    Gone,
}

/// One that is due.
struct Due {
    key: Key,
    /// Of its document, as we know it.
    doc_rev: Box<str>,
    rule: Arc<Rule>,
}

/// One that is ours for a while.
struct Claimed {
    parked: Parked,
    /// As it was written.
    doc: Value,
    rule: Arc<Rule>,
}

pub(super) struct Tries {
    pub arguments: Arguments,
    pub missing_dbs: Missing<DbName>,
    pub missing_docs: Missing<Key>,
    pub missing_rules: Missing<Arc<str>>,
    /// It was said that more have ended than are listed.
    pub lists_less: AtomicBool,
    reads: Semaphore,
}

pub(super) async fn run(arguments: Arguments) {
    let mut snapshots = arguments.snapshot.clone();
    let deliveries = arguments.deliveries.clone();
    deliveries.loaded().await;
    let Ok(mut known) = snapshots.wait_for(|snapshot| snapshot.is_loaded()).await.map(|snapshot| snapshot.clone()) else {
        return std::future::pending().await;
    };
    // Whoever ran before us took what it had in flight with it.
    deliveries.book.index().land_all();
    let tidy_every = TIDY_EVERY.min(deliveries.settings.assume_deleted_after).max(Duration::from_secs(1));
    let (missing_dbs, missing_docs, missing_rules) = (Missing::default(), Missing::default(), Missing::default());
    let (lists_less, reads) = (AtomicBool::new(false), Semaphore::new(READS_MAX));
    let tries = Arc::new(Tries { arguments, missing_dbs, missing_docs, missing_rules, lists_less, reads });
    tries.end_disabled(&known).await;
    let mut under_way = JoinSet::new();
    let mut keys_of: HashMap<Id, Vec<Key>> = HashMap::new();
    let mut tidy = tokio::time::interval(tidy_every);
    tidy.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut not_before = Instant::now();
    loop {
        let is_stopping = deliveries.book.stopping.is_cancelled();
        let pause = not_before.saturating_duration_since(Instant::now());
        let wait = match is_stopping {
            true => TIDY_EVERY,
            false if !pause.is_zero() => pause,
            false => {
                not_before = Instant::now() + TOGETHER;
                tries.start_due(&mut under_way, &mut keys_of, &known)
            }
        };
        tokio::select! {
            () = deliveries.book.stopping.cancelled(), if !is_stopping => {}
            () = deliveries.book.changed.notified() => {}
            () = tokio::time::sleep(wait) => {}
            Some(ended) = under_way.join_next_with_id() => {
                let id = ended.as_ref().map_or_else(|error| error.id(), |(id, ())| *id);
                let keys = keys_of.remove(&id).unwrap_or_default();
                if ended.is_err() {
                    tries.crashed(&keys);
                }
            }
            Ok(()) = snapshots.changed() => {
                let now = snapshots.borrow_and_update().clone();
                tries.rules_changed(&known, &now).await;
                known = now;
            }
            _ = tidy.tick() => tries.tidy(&known).await,
        }
    }
}

impl Tries {
    pub fn deliveries(&self) -> &Deliveries {
        &self.arguments.deliveries
    }

    /// How long nothing will be due.
    fn start_due(
        self: &Arc<Self>,
        under_way: &mut JoinSet<()>,
        keys_of: &mut HashMap<Id, Vec<Key>>,
        snapshot: &Arc<Snapshot>,
    ) -> Duration {
        let now = SystemTime::now();
        let (room, due) = {
            let mut index = self.deliveries().book.index();
            let disabled: Vec<(String, String)> =
                index.disabled().map(|known| (known.rule.clone(), known.rule_rev.clone())).collect();
            let breakers = self.arguments.webhooks.breakers();
            let room = IN_FLIGHT_MAX.saturating_sub(index.in_flight());
            (room, index.take_due(now, room, |entry| not_now(entry, snapshot, &disabled, breakers, now)))
        };
        let mut owed = Vec::with_capacity(due.len());
        for (key, entry) in due {
            match snapshot.rule(&entry.rule).cloned() {
                Some(rule) => owed.push(Due { key, doc_rev: entry.doc_rev, rule }),
                None => self.deliveries().book.index().landed(&key, Some(now + NOT_NOW)),
            }
        }
        if !owed.is_empty() {
            let keys = owed.iter().map(|due| due.key).collect();
            let tries = self.clone();
            let task = under_way.spawn(async move { tries.attempt(owed).await });
            keys_of.insert(task.id(), keys);
        }
        let next = self.deliveries().book.index().next_due();
        let wait = next.map(|at| at.duration_since(now).unwrap_or(TOGETHER));
        match room == 0 {
            true => TIDY_EVERY,
            false => wait.unwrap_or(TIDY_EVERY).min(TIDY_EVERY) + Duration::from_millis(1),
        }
    }

    async fn attempt(self: Arc<Self>, owed: Vec<Due>) {
        self.arguments.couch.health().up().await;
        let (claimed, until) = self.claim(owed).await;
        let mut by_db: BTreeMap<DbName, Vec<Claimed>> = BTreeMap::new();
        for claimed in claimed {
            by_db.entry(claimed.parked.db.as_str().into()).or_default().push(claimed);
        }
        // A database that was made again has equal revisions that are other changes.
        let dbs: Vec<DbName> = by_db.keys().cloned().collect();
        for dbs in dbs.chunks(DBS_INFO_KEYS_MAX) {
            let names: Vec<&str> = dbs.iter().map(|db| &**db).collect();
            let infos = self.arguments.couch.dbs_info(&names).await.unwrap_or_default();
            for (db, info) in dbs.iter().zip(infos) {
                if let (Some(info), Some(claimed)) = (info, by_db.get_mut(db)) {
                    claimed.iter_mut().for_each(|it| it.parked.instance_start_time = info.instance_start_time.clone());
                }
            }
        }
        let (mut under_way, mut keys_of) = (JoinSet::new(), HashMap::new());
        for (db, mut claimed) in by_db {
            while !claimed.is_empty() {
                let part: Vec<Claimed> = claimed.drain(..claimed.len().min(OF_ONE_DATABASE_MAX)).collect();
                let keys: Vec<Key> = part.iter().map(|it| it.parked.key()).collect();
                let (tries, db) = (self.clone(), db.clone());
                let task = under_way.spawn(async move { tries.of_database(db, part, until).await });
                keys_of.insert(task.id(), keys);
            }
        }
        while let Some(ended) = under_way.join_next_with_id().await {
            if let Err(crash) = ended {
                self.crashed(&keys_of.remove(&crash.id()).unwrap_or_default());
            }
        }
    }

    /// Not all at the same moment again, or what crashed one of them would crash all.
    fn crashed(&self, keys: &[Key]) {
        tracing::error!(deliveries = keys.len(), "a try of parked deliveries crashed, it is made again later");
        let lease = self.deliveries().settings.lease;
        for key in keys {
            let again = SystemTime::now() + lease.mul_f64(1.0 + fastrand::f64());
            self.deliveries().book.index().landed(key, Some(again));
        }
        self.deliveries().book.changed.notify_one();
    }

    async fn of_database(&self, db: DbName, claimed: Vec<Claimed>, until: Instant) {
        let ids: Vec<String> = claimed.iter().map(|it| it.parked.doc_id.clone()).collect();
        let include_docs = claimed.iter().any(|it| it.rule.needs_doc());
        let permit = self.reads.acquire().await;
        let read = Instant::now();
        let current = self.arguments.couch.current_docs(&db, &ids, include_docs).await;
        drop(permit);
        let current = match current {
            Ok(current) => current,
            Err(error) => return self.unread(&db, claimed, &error).await,
        };
        self.missing_dbs.is_there(&db);
        let sent = claimed.into_iter().zip(current).map(|(claimed, current)| self.send(claimed, current, (read, until)));
        futures_util::future::join_all(sent).await;
    }

    /// Those that are ours for a while, and until when; without those that somebody else has, or that are there no more.
    async fn claim(&self, owed: Vec<Due>) -> (Vec<Claimed>, Instant) {
        let deliveries = self.deliveries();
        let not_claimed = |key: &Key| deliveries.book.index().landed(key, Some(SystemTime::now() + COUCHDB_FAILED));
        let Ok(docs) = deliveries.store.load_all(owed.iter().map(|due| due.key.doc_id())).await else {
            owed.iter().for_each(|due| not_claimed(&due.key));
            return (Vec::new(), Instant::now());
        };
        let (now, lease) = (SystemTime::now(), deliveries.settings.lease);
        let until = Instant::now() + lease.saturating_sub(LEASE_REST);
        let mut wanted = Vec::with_capacity(owed.len());
        for (due, doc) in owed.into_iter().zip(docs) {
            if let Some(mut parked) = self.to_claim(&due, doc.as_ref(), now) {
                parked.claimed_by = Some(self.arguments.process.to_string());
                parked.next_attempt_at = Some(now + lease);
                let doc = parked.write(doc);
                wanted.push(Claimed { parked, doc, rule: due.rule });
            }
        }
        let results = match deliveries.store.save_all(wanted.iter().map(|it| it.doc.clone())).await {
            Ok(results) => results,
            Err(_) => {
                wanted.iter().for_each(|it| not_claimed(&it.parked.key()));
                return (Vec::new(), until);
            }
        };
        let mut claimed = Vec::with_capacity(wanted.len());
        for (mut it, result) in wanted.into_iter().zip(results) {
            match result {
                WriteResult::Saved { rev } => {
                    it.doc["_rev"] = Value::from(rev.as_str());
                    it.parked.doc_rev = rev;
                    deliveries.book.index().put(&it.parked);
                    claimed.push(it);
                }
                // Somebody else was faster, and the changes will tell; where CouchDB refused, it is asked again.
                WriteResult::Conflict | WriteResult::Refused { .. } => not_claimed(&it.parked.key()),
            }
        }
        (claimed, until)
    }

    /// None where somebody else has it or it is there no more.
    fn to_claim(&self, Due { key, doc_rev, .. }: &Due, doc: Option<&Value>, now: SystemTime) -> Option<Parked> {
        let mut index = self.deliveries().book.index();
        let parked = match doc.and_then(Parked::read) {
            Some(parked) if parked.state == State::Parked => parked,
            other => {
                index.landed(key, Some(now + COUCHDB_FAILED));
                match other {
                    Some(ended) => drop(index.put(&ended)),
                    None => drop(index.forget_if(key, doc_rev)),
                }
                return None;
            }
        };
        let is_ours = parked.claimed_by.as_deref() == Some(&self.arguments.process);
        if let (Some(_), false, Some(until)) = (&parked.claimed_by, is_ours, parked.next_attempt_at)
            && until > now
            // A clock that ran ahead must not keep it from everybody.
            && until <= now + self.deliveries().settings.lease * 2
        {
            index.landed(key, Some(until));
            return None;
        }
        Some(parked)
    }

    async fn unread(&self, db: &DbName, claimed: Vec<Claimed>, error: &CouchError) {
        let after = self.deliveries().settings.assume_deleted_after;
        let is_missing = matches!(error, CouchError::NotFound(_))
            && matches!(self.arguments.couch.dbs_info(&[db]).await.as_deref(), Ok([None]));
        let is_gone = is_missing && self.missing_dbs.is_gone(db.clone(), after);
        let pause = if is_missing { NOT_NOW.min(after) } else { COUCHDB_FAILED };
        if !is_missing {
            tracing::debug!(%db, %error, "cannot read what parked deliveries are about, trying again");
        }
        let deliveries = claimed.len();
        let ends = claimed.into_iter().map(|claimed| async move {
            match is_gone {
                true => self.end(claimed.parked, State::Dropped, "the database is gone").await,
                false => self.unclaim(claimed, pause).await,
            }
        });
        futures_util::future::join_all(ends).await;
        if is_gone {
            self.missing_dbs.is_there(db);
            tracing::warn!(%db, deliveries, "parked deliveries were dropped, because their database is gone; they stay listed");
        }
    }

    /// What is known of the document now. A node that lags knows nothing of it, or an older state than the feed told of.
    async fn newest(&self, parked: &Parked, rule: &Rule, current: Current) -> Newest {
        let (key, after) = (parked.key(), self.deliveries().settings.assume_deleted_after);
        let (rev, doc, deleted) = match current {
            Current::Missing if self.missing_docs.is_gone(key, after) => return Newest::Gone,
            Current::Missing => return Newest::Later(NOT_NOW.min(after)),
            Current::Is { rev, doc } => (rev, doc, false),
            Current::Deleted { rev } if rule.needs_doc() => {
                match self.arguments.couch.tombstone(&parked.db, &parked.doc_id, &rev).await {
                    Ok(doc) => (rev, doc, true),
                    Err(_) => return Newest::Later(COUCHDB_FAILED),
                }
            }
            Current::Deleted { rev } => (rev, None, true),
        };
        if generation(&rev) < generation(&parked.rev) && !self.missing_docs.is_gone(key, after) {
            return Newest::Later(NOT_NOW.min(after));
        }
        self.missing_docs.is_there(&key);
        let seq = Seq::of_json(&parked.seq).unwrap_or_else(Seq::zero);
        Newest::Is(Row { seq, id: parked.doc_id.clone(), changes: vec![Rev { rev }], deleted, doc })
    }

    async fn send(&self, claimed: Claimed, current: Current, (read, until): (Instant, Instant)) {
        let (parked, rule) = (&claimed.parked, claimed.rule.clone());
        let row = match self.newest(parked, &rule, current).await {
            Newest::Is(row) => row,
            Newest::Later(pause) => return self.unclaim(claimed, pause).await,
            Newest::Gone => return self.end(claimed.parked, State::Dropped, "the document is gone").await,
        };
        if Instant::now() >= until {
            // CouchDB took too long, and others may claim it.
            return self.unclaim(claimed, COUCHDB_FAILED).await;
        }
        let doc = Document::of(&row);
        if !rule.matches(&doc) {
            // As the feed has it: a state that came and went is not told of.
            tracing::debug!(rule = %rule.id, db = parked.db, "the document's newest state is none of the rule's business");
            return self.done(claimed.parked, row.rev()).await;
        }
        let db: DbName = parked.db.as_str().into();
        let (vault, instance) = (&self.arguments.vault, &parked.instance_start_time);
        let mut delivery = match crate::webhook::delivery(vault, &rule, &db, instance, &doc, parked.replays) {
            Ok(delivery) => delivery,
            // The same holds the rule where it has new changes.
            Err(error) if error.concerns_rule() => return self.unclaim(claimed, NOT_NOW * 10).await,
            Err(error) => {
                let failed = Failed { error: error.to_string(), verdict: Verdict::Later, attempts: 0, answer: None };
                return self.failed(claimed, &failed).await;
            }
        };
        // In a batch it would take others down with it, or be taken down.
        if let Some(gathered) = &mut delivery.gathered {
            gathered.go_alone();
        }
        let Ok(outcome) = tokio::time::timeout_at(until.into(), self.arguments.webhooks.run(delivery)).await else {
            // It may be under way still, and nobody may make it again before it cannot be.
            let again = SystemTime::now() + LEASE_REST + self.deliveries().settings.attempt_max;
            self.deliveries().book.index().landed(&parked.key(), Some(again));
            return self.deliveries().book.changed.notify_one();
        };
        match outcome {
            Ok(Outcome::Done) => {
                self.deliveries().book.index().accepted(parked.key(), row.rev(), read);
                self.done(claimed.parked, row.rev()).await;
            }
            Ok(Outcome::Failed(failed)) => {
                if failed.verdict == Verdict::Gone {
                    self.deliveries().disable(&rule, &db, &failed.error).await;
                }
                self.failed(claimed, &failed).await;
            }
            Ok(Outcome::Unsent { after, .. }) => self.unclaim(claimed, after.mul_f64(1.0 + 0.2 * fastrand::f64())).await,
            // The request was cut off by our own end: whoever comes next makes it again at once.
            Err(_) if self.deliveries().book.stopping.is_cancelled() => self.unclaim(claimed, Duration::ZERO).await,
            Ok(Outcome::Missing { .. }) | Err(_) => self.unclaim(claimed, COUCHDB_FAILED).await,
        }
    }

    /// The state `sent` was accepted, or is nobody's business. What came meanwhile is owed still.
    async fn done(&self, parked: Parked, sent: &str) {
        let (deliveries, key) = (self.deliveries(), parked.key());
        let gone = json!({ "_id": key.doc_id(), "_rev": parked.doc_rev, "_deleted": true });
        match deliveries.store.save(gone).await {
            Ok(WriteResult::Saved { .. }) => {
                let is_last = {
                    let mut index = deliveries.book.index();
                    index.landed(&key, None);
                    index.forget_if(&key, &parked.doc_rev)
                };
                if is_last {
                    tracing::info!(rule = parked.rule, "no delivery of the rule is parked any more");
                }
                // There may have been no room.
                deliveries.book.changed.notify_one();
            }
            Ok(WriteResult::Conflict) => {
                let (sent, instance) = (sent.to_string(), parked.instance_start_time.clone());
                self.update(key, move |parked| {
                    // Another state joined while the request was under way, of this database or of another of its name; or
                    // somebody asked for another try.
                    let is_owed = parked.rev != sent || parked.instance_start_time != instance || parked.claimed_by.is_none();
                    let now = SystemTime::now();
                    (parked.claimed_by, parked.next_attempt_at) = (None, Some(now));
                    // That one has not failed yet.
                    (parked.retries, parked.first_failed_at) = (0, now);
                    is_owed
                })
                .await;
            }
            // Sent again once the lease is over, with the same id.
            _ => deliveries.book.index().landed(&key, Some(SystemTime::now() + COUCHDB_FAILED)),
        }
    }

    async fn failed(&self, claimed: Claimed, failed: &Failed) {
        let patience = self.deliveries().settings.patience.of(&claimed.rule.handling.retry);
        self.give_back(claimed, |parked| {
            parked.retries = parked.retries.saturating_add(1);
            let now = SystemTime::now();
            failed_again(parked, failed, now, |verdict, history| patience.next(verdict, history, now, fastrand::f64()));
        })
        .await;
    }

    async fn unclaim(&self, claimed: Claimed, after: Duration) {
        self.give_back(claimed, |parked| {
            parked.claimed_by = None;
            parked.next_attempt_at = Some(SystemTime::now() + after);
        })
        .await;
    }

    async fn end(&self, parked: Parked, state: State, reason: &str) {
        self.update(parked.key(), |parked| {
            parked.end(state, reason, SystemTime::now());
            true
        })
        .await;
        tracing::debug!(rule = parked.rule, db = parked.db, reason, "a parked delivery was {}, it stays listed", state.name());
    }

    /// Writes what a try came to, while it is ours to say: somebody else may have claimed it, or have asked for another try. Where
    /// this write was applied and its answer was lost, it is nobody's, and has been counted.
    async fn give_back(&self, Claimed { mut parked, doc, .. }: Claimed, mut change: impl FnMut(&mut Parked)) {
        let (deliveries, key) = (self.deliveries(), parked.key());
        change(&mut parked);
        // Hardly ever did somebody write it since.
        match deliveries.store.save(parked.write(Some(doc))).await {
            Ok(WriteResult::Saved { rev }) => {
                parked.doc_rev = rev;
                let mut index = deliveries.book.index();
                index.landed(&key, None);
                index.put(&parked);
                drop(index);
                deliveries.book.changed.notify_one();
            }
            _ => {
                let is_mine = |parked: &Parked| parked.claimed_by.as_deref() == Some(&*self.arguments.process);
                self.update_where(key, is_mine, |parked| {
                    change(parked);
                    true
                })
                .await;
            }
        }
    }

    /// The same, whoever has it.
    pub async fn update(&self, key: Key, change: impl FnMut(&mut Parked) -> bool) {
        self.update_where(key, |_| true, change).await;
    }

    /// Whoever wrote the document meanwhile; false from `change` deletes it.
    async fn update_where(&self, key: Key, is_to: impl Fn(&Parked) -> bool, mut change: impl FnMut(&mut Parked) -> bool) {
        let deliveries = self.deliveries();
        let mut latest: Option<Parked> = None;
        let id = key.doc_id();
        let updated = deliveries.store.update(&id, |doc| {
            let parked = Parked::read(doc).filter(|parked| parked.state == State::Parked && is_to(parked));
            let Some(mut parked) = parked else {
                latest = None;
                return false;
            };
            match change(&mut parked) {
                true => *doc = parked.write(Some(doc.take())),
                false => doc["_deleted"] = Value::Bool(true),
            }
            latest = Some(parked);
            true
        });
        let updated = updated.await;
        let mut index = deliveries.book.index();
        match (updated, latest) {
            (Ok(Some(doc)), Some(mut parked)) => {
                index.landed(&key, None);
                parked.doc_rev = doc["_rev"].as_str().unwrap_or_default().to_string();
                match doc["_deleted"] == Value::Bool(true) {
                    true => drop(index.forget_until(&key, &parked.doc_rev)),
                    false => drop(index.put(&parked)),
                }
            }
            // Somebody else's now, or written by us as it is: it says itself when it is due.
            (Ok(Some(doc)), None) if let Some(parked) = Parked::read(&doc) => {
                index.landed(&key, None);
                index.put(&parked);
            }
            // Gone: the changes tell of it.
            (Ok(_), _) => index.landed(&key, Some(SystemTime::now() + COUCHDB_FAILED)),
            (Err(error), _) => {
                index.landed(&key, Some(SystemTime::now() + COUCHDB_FAILED));
                tracing::debug!(%error, "cannot write what a try of a parked delivery came to");
            }
        }
        drop(index);
        deliveries.book.changed.notify_one();
    }

    /// An edit may mend what failed.
    async fn rules_changed(&self, before: &Snapshot, after: &Snapshot) {
        let changed = changed_rules(before, after);
        let edited: HashSet<&str> = changed.iter().map(|rule| rule.id.as_ref()).collect();
        self.deliveries().book.index().hurry(&edited, SystemTime::now());
        self.end_disabled(after).await;
        self.tidy(after).await;
    }

    /// A rule is disabled in one revision only.
    async fn end_disabled(&self, after: &Snapshot) {
        let overtaken: Vec<Disabled> = {
            let index = self.deliveries().book.index();
            let is_over = |known: &&Disabled| after.rule(&known.rule).is_none_or(|rule| rule.rev != known.rule_rev);
            index.disabled().filter(is_over).cloned().collect()
        };
        for disabled in overtaken.into_iter().filter(|disabled| !after.is_invalid_rule(&disabled.rule)) {
            let id = super::parked::disabled_id(&disabled.rule);
            let gone = json!({ "_id": id, "_rev": disabled.doc_rev, "_deleted": true });
            if matches!(self.deliveries().store.save(gone).await, Ok(WriteResult::Saved { .. })) {
                self.deliveries().book.index().enable(&disabled.rule, SystemTime::now());
            }
        }
    }
}

/// When else, where its rule cannot be applied now.
fn not_now(
    entry: &Entry,
    snapshot: &Snapshot,
    disabled: &[(String, String)],
    breakers: &Breakers,
    now: SystemTime,
) -> Option<SystemTime> {
    let later = Some(now + NOT_NOW);
    let Some(rule) = snapshot.rule(&entry.rule) else { return later };
    let is_disabled = disabled.iter().any(|(id, rev)| *id == *rule.id && *rev == rule.rev);
    if is_disabled || !rule.matches_name(&entry.db) {
        return later;
    }
    let closed = breakers.open_until(rule.lane.as_deref()?)?.saturating_duration_since(tokio::time::Instant::now());
    Some(now + closed.mul_f64(1.0 + 0.1 * fastrand::f64()))
}
