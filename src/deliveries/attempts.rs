//! Tries again what is parked: claim, read, send, settle. And ends what nobody wants any more.

use super::index::Entry;
use super::park::failed_again;
use super::parked::{Disabled, Key, Parked, State, generation};
use super::{Arguments, Deliveries};
use crate::couch::docs::Current;
use crate::couch::{CouchError, Row, Seq, WriteResult};
use crate::job::{DbName, Failed, Outcome, Verdict};
use crate::rules::catalogue::{Snapshot, changed_rules};
use crate::rules::document::Document;
use crate::rules::rule::Rule;
use crate::schedule::Breakers;
use crate::telemetry::StateLabels;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use tokio::task::JoinSet;

/// Tries under way; each is one document of a user's in memory.
const IN_FLIGHT_MAX: usize = 256;
/// Documents that are read by one request.
const OF_ONE_DATABASE_MAX: usize = 50;
/// How often old and unwanted ones are looked for.
const TIDY_EVERY: Duration = Duration::from_secs(30);
const TIDY_MAX: usize = 500;
/// What cannot be tried now, because its rule is disabled or damaged, is looked at again after this.
const NOT_NOW: Duration = Duration::from_secs(60);
/// CouchDB did not answer as it should; it is asked again after this.
const COUCHDB_FAILED: Duration = Duration::from_secs(5);

struct Tries {
    arguments: Arguments,
    /// Since when a database is missing.
    missing: Mutex<HashMap<DbName, Instant>>,
}

pub(super) async fn run(arguments: Arguments) {
    let mut snapshots = arguments.snapshot.clone();
    let deliveries = arguments.deliveries.clone();
    deliveries.loaded().await;
    let Ok(mut known) = snapshots.wait_for(|snapshot| snapshot.is_loaded()).await.map(|snapshot| snapshot.clone()) else {
        return std::future::pending().await;
    };
    let tries = Arc::new(Tries { arguments, missing: Mutex::new(HashMap::new()) });
    let mut under_way = JoinSet::new();
    let mut tidy = tokio::time::interval(TIDY_EVERY);
    tidy.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let wait = tries.start_due(&mut under_way, &known);
        tokio::select! {
            () = deliveries.book.changed.notified() => {}
            () = tokio::time::sleep(wait) => {}
            Some(ended) = under_way.join_next() => {
                if let Err(error) = ended
                    && error.is_panic()
                {
                    // The lease of what it held runs out; the process goes on.
                    tracing::error!("a try of parked deliveries crashed");
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
    /// How long nothing will be due.
    fn start_due(self: &Arc<Self>, under_way: &mut JoinSet<()>, snapshot: &Arc<Snapshot>) -> Duration {
        let now = SystemTime::now();
        let room = IN_FLIGHT_MAX.saturating_sub(under_way.len() * OF_ONE_DATABASE_MAX.min(8));
        let due = {
            let mut index = self.deliveries().book.index();
            let disabled: Vec<(String, String)> =
                index.disabled().map(|known| (known.rule.clone(), known.rule_rev.clone())).collect();
            let breakers = self.arguments.webhooks.breakers();
            index.take_due(now, room, |entry| not_now(entry, snapshot, &disabled, breakers, now))
        };
        let mut by_db: BTreeMap<DbName, Vec<(Key, Arc<Rule>)>> = BTreeMap::new();
        for (key, entry) in due {
            if let Some(rule) = snapshot.rule(&entry.rule).cloned() {
                by_db.entry(entry.db.clone()).or_default().push((key, rule));
            }
        }
        for (db, owed) in by_db {
            for some in owed.chunks(OF_ONE_DATABASE_MAX) {
                let (tries, db, some) = (self.clone(), db.clone(), some.to_vec());
                under_way.spawn(async move { tries.attempt(db, some).await });
            }
        }
        let next = self.deliveries().book.index().next_due();
        let wait = next.map(|at| at.duration_since(now).unwrap_or(Duration::from_millis(20)));
        match room == 0 {
            true => TIDY_EVERY,
            false => wait.unwrap_or(TIDY_EVERY).min(TIDY_EVERY) + Duration::from_millis(1),
        }
    }

    fn deliveries(&self) -> &Deliveries {
        &self.arguments.deliveries
    }

    async fn attempt(self: &Arc<Self>, db: DbName, owed: Vec<(Key, Arc<Rule>)>) {
        self.arguments.couch.health().up().await;
        let claims = futures_util::future::join_all(owed.iter().map(|(key, _)| self.claim(*key))).await;
        let claimed: Vec<(Parked, Arc<Rule>)> =
            claims.into_iter().zip(owed).filter_map(|(claim, (_, rule))| Some((claim?, rule))).collect();
        if claimed.is_empty() {
            return;
        }
        let ids: Vec<String> = claimed.iter().map(|(parked, _)| parked.doc_id.clone()).collect();
        let include_docs = claimed.iter().any(|(_, rule)| rule.needs_doc());
        let read = Instant::now();
        let current = match self.arguments.couch.current_docs(&db, &ids, include_docs).await {
            Ok(current) => {
                self.missing.lock().unwrap_or_else(PoisonError::into_inner).remove(&db);
                current
            }
            Err(error) => return self.unread(&db, claimed, &error).await,
        };
        let sent = claimed.into_iter().zip(current).map(|((parked, rule), current)| self.send(parked, rule, current, read));
        futures_util::future::join_all(sent).await;
    }

    /// Ours for a while, or None where somebody else has it or it is there no more.
    async fn claim(&self, key: Key) -> Option<Parked> {
        let (deliveries, now) = (self.deliveries(), SystemTime::now());
        let again = Some(now + COUCHDB_FAILED);
        let Ok(doc) = deliveries.store.load(key.doc_id()).await else {
            deliveries.book.index().landed(&key, again);
            return None;
        };
        let Some(mut parked) = doc.as_ref().and_then(Parked::read).filter(|parked| parked.state == State::Parked) else {
            let mut index = deliveries.book.index();
            index.landed(&key, None);
            match doc.as_ref().and_then(Parked::read) {
                Some(ended) => drop(index.put(&ended)),
                None => drop(index.forget(&key)),
            }
            return None;
        };
        let is_ours = parked.claimed_by.as_deref() == Some(&self.arguments.process);
        if let (Some(_), false, Some(until)) = (&parked.claimed_by, is_ours, parked.next_attempt_at)
            && until > now
        {
            deliveries.book.index().landed(&key, Some(until));
            return None;
        }
        parked.claimed_by = Some(self.arguments.process.to_string());
        parked.next_attempt_at = Some(now + deliveries.settings.lease);
        match deliveries.store.save(parked.write(doc)).await {
            Ok(WriteResult::Saved { rev }) => {
                parked.doc_rev = rev;
                deliveries.book.index().put(&parked);
                Some(parked)
            }
            // Somebody else was faster, and the changes will tell; where CouchDB refused, it is asked again.
            _ => {
                deliveries.book.index().landed(&key, again);
                None
            }
        }
    }

    async fn unread(&self, db: &DbName, claimed: Vec<(Parked, Arc<Rule>)>, error: &CouchError) {
        let mut is_gone = false;
        if matches!(error, CouchError::NotFound(_)) && matches!(self.arguments.couch.dbs_info(&[db]).await.as_deref(), Ok([None]))
        {
            let mut missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
            let since = *missing.entry(db.clone()).or_insert_with(Instant::now);
            is_gone = since.elapsed() >= self.deliveries().settings.assume_deleted_after;
        } else {
            tracing::debug!(%db, %error, "cannot read what parked deliveries are about, trying again");
        }
        for (parked, _) in claimed {
            match is_gone {
                true => self.end(parked, State::Dropped, "the database is gone").await,
                false => self.unclaim(parked, COUCHDB_FAILED).await,
            }
        }
    }

    async fn send(&self, parked: Parked, rule: Arc<Rule>, current: Current, read: Instant) {
        let Some(row) = row_of(&parked, current) else {
            return self.end(parked, State::Dropped, "the document is gone").await;
        };
        let doc = Document::of(&row);
        if !rule.matches(&doc) {
            // As the feed has it: a state that came and went is not told of.
            tracing::debug!(rule = %rule.id, db = parked.db, "the document's newest state is none of the rule's business");
            return self.done(parked, row.rev()).await;
        }
        let db: DbName = parked.db.as_str().into();
        let mut delivery = match crate::webhook::delivery(
            &self.arguments.vault,
            &rule,
            &db,
            &parked.instance_start_time,
            &doc,
            parked.replays,
        ) {
            Ok(delivery) => delivery,
            Err(error) => {
                let failed = Failed { error: error.to_string(), verdict: Verdict::Later, attempts: 0, answer: None };
                return self.failed(parked, &rule, &failed).await;
            }
        };
        // In a batch it would take others down with it, or be taken down.
        if let Some(gathered) = &mut delivery.gathered {
            gathered.go_alone();
        }
        match self.arguments.webhooks.run(delivery).await {
            Ok(Outcome::Done) => {
                self.deliveries().book.index().accepted(parked.key(), read);
                self.done(parked, row.rev()).await;
            }
            Ok(Outcome::Failed(failed)) => {
                if failed.verdict == Verdict::Gone {
                    self.deliveries().disable(&rule, &db, &failed.error).await;
                }
                self.failed(parked, &rule, &failed).await;
            }
            Ok(Outcome::Unsent { after, .. }) => self.unclaim(parked, after.mul_f64(1.0 + 0.2 * fastrand::f64())).await,
            Ok(Outcome::Missing { .. }) | Err(_) => self.unclaim(parked, COUCHDB_FAILED).await,
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
            }
            Ok(WriteResult::Conflict) => {
                let sent = sent.to_string();
                self.update(key, move |now_parked| {
                    // A newer change joined while the request was under way; or the same, or somebody asked for another try.
                    let is_owed = generation(&now_parked.rev) > generation(&sent)
                        || (generation(&now_parked.rev) == generation(&sent) && now_parked.rev != sent)
                        || now_parked.claimed_by.is_none();
                    now_parked.claimed_by = None;
                    now_parked.next_attempt_at = Some(SystemTime::now());
                    is_owed
                })
                .await;
            }
            // Sent again once the lease is over, with the same id.
            _ => deliveries.book.index().landed(&key, Some(SystemTime::now() + COUCHDB_FAILED)),
        }
    }

    async fn failed(&self, parked: Parked, rule: &Rule, failed: &Failed) {
        let patience = self.deliveries().settings.patience.of(&rule.handling.retry);
        self.update(parked.key(), |parked| {
            parked.retries = parked.retries.saturating_add(1);
            let now = SystemTime::now();
            failed_again(parked, failed, now, |verdict, history| patience.next(verdict, history, now, fastrand::f64()));
            true
        })
        .await;
    }

    async fn unclaim(&self, parked: Parked, after: Duration) {
        self.update(parked.key(), |parked| {
            parked.claimed_by = None;
            parked.next_attempt_at = Some(SystemTime::now() + after);
            true
        })
        .await;
    }

    async fn end(&self, parked: Parked, state: State, reason: &str) {
        self.update(parked.key(), |parked| {
            parked.end(state, reason, SystemTime::now());
            true
        })
        .await;
        tracing::warn!(rule = parked.rule, db = parked.db, reason, "a parked delivery was {}, it stays listed", state.name());
    }

    /// Writes what a try came to, whoever wrote the document meanwhile; false from `change` deletes the document.
    async fn update(&self, key: Key, mut change: impl FnMut(&mut Parked) -> bool) {
        let deliveries = self.deliveries();
        let mut latest: Option<Parked> = None;
        let id = key.doc_id();
        let updated = deliveries.store.update(&id, |doc| {
            let Some(mut parked) = Parked::read(doc).filter(|parked| parked.state == State::Parked) else {
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
        index.landed(&key, None);
        match (updated, latest) {
            (Ok(Some(doc)), Some(mut parked)) => {
                parked.doc_rev = doc["_rev"].as_str().unwrap_or_default().to_string();
                match doc["_deleted"] == Value::Bool(true) {
                    true => drop(index.forget(&key)),
                    false => drop(index.put(&parked)),
                }
            }
            // Ended by somebody else, or gone: the changes tell of it.
            (Ok(_), _) => {}
            (Err(error), _) => {
                index.landed(&key, Some(SystemTime::now() + COUCHDB_FAILED));
                tracing::debug!(%error, "cannot write what a try of a parked delivery came to");
            }
        }
        drop(index);
        deliveries.book.changed.notify_one();
    }

    /// An edit may mend what failed; and a rule that was disabled by its old revision is not any more.
    async fn rules_changed(&self, before: &Snapshot, after: &Snapshot) {
        let now = SystemTime::now();
        let changed = changed_rules(before, after);
        let overtaken: Vec<Disabled> = {
            let mut index = self.deliveries().book.index();
            for rule in &changed {
                index.hurry(&rule.id, now);
            }
            let is_over = |known: &&Disabled| after.rule(&known.rule).is_none_or(|rule| rule.rev != known.rule_rev);
            index.disabled().filter(is_over).cloned().collect()
        };
        for disabled in overtaken.into_iter().filter(|disabled| !after.is_invalid_rule(&disabled.rule)) {
            let id = super::parked::disabled_id(&disabled.rule);
            let gone = json!({ "_id": id, "_rev": disabled.doc_rev, "_deleted": true });
            if matches!(self.deliveries().store.save(gone).await, Ok(WriteResult::Saved { .. })) {
                self.deliveries().book.index().enable(&disabled.rule);
            }
        }
        self.tidy(after).await;
    }

    /// Ends what is owed by a rule that is no more, and forgets what ended long ago.
    async fn tidy(&self, snapshot: &Snapshot) {
        let retention = self.deliveries().settings.retention;
        let (unwanted, old, counts) = {
            let index = self.deliveries().book.index();
            let unwanted = index.unwanted(TIDY_MAX, |entry| unwanted_because(entry, snapshot).is_some());
            let before = SystemTime::now().checked_sub(retention).unwrap_or(SystemTime::UNIX_EPOCH);
            (unwanted, index.ended_before(before, TIDY_MAX), State::ALL.map(|state| (state, index.count(state))))
        };
        for (state, count) in counts {
            let gauge = self.arguments.metrics.deliveries.get_or_create_owned(&StateLabels { state: state.name() });
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        let ends = unwanted.into_iter().map(|(key, entry)| async move {
            let reason = unwanted_because(&entry, snapshot).unwrap_or_default();
            self.update(key, |parked| {
                parked.end(State::Dropped, reason, SystemTime::now());
                true
            })
            .await;
            entry.rule
        });
        let mut dropped: BTreeMap<Arc<str>, usize> = BTreeMap::new();
        for rule in futures_util::future::join_all(ends).await {
            *dropped.entry(rule).or_default() += 1;
        }
        for (rule, deliveries) in dropped {
            tracing::warn!(%rule, deliveries, "parked deliveries were dropped, because nobody wants them any more; they stay listed");
        }
        let deletions = old.into_iter().map(|(key, entry)| async move {
            let gone = json!({ "_id": key.doc_id(), "_rev": entry.doc_rev, "_deleted": true });
            if matches!(self.deliveries().store.save(gone).await, Ok(WriteResult::Saved { .. })) {
                self.deliveries().book.index().forget_if(&key, &entry.doc_rev);
            }
        });
        futures_util::future::join_all(deletions).await;
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

/// Why nobody wants it any more. A rule that is damaged for the moment is no such reason.
fn unwanted_because(entry: &Entry, snapshot: &Snapshot) -> Option<&'static str> {
    match snapshot.rule(&entry.rule) {
        None if snapshot.is_invalid_rule(&entry.rule) => None,
        None => Some("its rule was deleted"),
        Some(rule) if !rule.matches_name(&entry.db) => Some("its rule does not match the database any more"),
        Some(_) => None,
    }
}

/// As the feed would tell of it.
fn row_of(parked: &Parked, current: Current) -> Option<Row> {
    let seq = match &parked.seq {
        Value::Number(number) => Seq::Number(number.as_u64().unwrap_or_default()),
        Value::String(text) => Seq::from(text.as_str()),
        _ => Seq::zero(),
    };
    let (rev, deleted, doc) = match current {
        Current::Missing => return None,
        Current::Deleted { rev } => (rev, true, None),
        Current::Is { rev, doc } => (rev, false, doc),
    };
    Some(Row { seq, id: parked.doc_id.clone(), changes: vec![crate::couch::changes::Rev { rev }], deleted, doc })
}
