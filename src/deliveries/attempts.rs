//! Tries again what is parked: claim, read, send, settle. And ends what nobody wants any more.

use super::index::Entry;
use super::missing::Missing;
use super::park::failed_again;
use super::parked::{Disabled, Key, Parked, State, generation};
use super::{Arguments, Deliveries};
use crate::couch::docs::Current;
use crate::couch::{CouchError, Rev, Row, Seq, WriteResult};
use crate::job::{DbName, Failed, Outcome, Verdict};
use crate::rules::catalogue::{Snapshot, changed_rules};
use crate::rules::document::Document;
use crate::rules::rule::Rule;
use crate::schedule::Breakers;
use crate::telemetry::StateLabels;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};
use tokio::task::{Id, JoinSet};

/// Tries under way; each is one document of a user's in memory.
const IN_FLIGHT_MAX: usize = 256;
/// Documents that are read by one request.
const OF_ONE_DATABASE_MAX: usize = 50;
/// How often old and unwanted ones are looked for.
const TIDY_EVERY: Duration = Duration::from_secs(30);
const TIDY_MAX: usize = 500;
/// Meanwhile nothing is tried.
const TIDY_ROUNDS_MAX: usize = 20;
/// What cannot be tried now, because its rule is disabled or damaged, is looked at again after this.
const NOT_NOW: Duration = Duration::from_secs(60);
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

/// One that is due: its key, the revision of its document as we know it, its rule.
type Due = (Key, Box<str>, Arc<Rule>);

struct Tries {
    arguments: Arguments,
    missing_dbs: Missing<DbName>,
    missing_docs: Missing<Key>,
    missing_rules: Missing<Arc<str>>,
    /// It was said that more have ended than are listed.
    lists_less: AtomicBool,
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
    let lists_less = AtomicBool::new(false);
    let tries = Arc::new(Tries { arguments, missing_dbs, missing_docs, missing_rules, lists_less });
    tries.end_disabled(&known).await;
    let mut under_way = JoinSet::new();
    let mut keys_of: HashMap<Id, Vec<Key>> = HashMap::new();
    let mut tidy = tokio::time::interval(tidy_every);
    tidy.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let is_stopping = deliveries.book.stopping.is_cancelled();
        let wait = match is_stopping {
            true => TIDY_EVERY,
            false => tries.start_due(&mut under_way, &mut keys_of, &known),
        };
        tokio::select! {
            () = deliveries.book.stopping.cancelled(), if !is_stopping => {}
            () = deliveries.book.changed.notified() => {}
            () = tokio::time::sleep(wait) => {}
            Some(ended) = under_way.join_next_with_id() => {
                let id = ended.as_ref().map_or_else(|error| error.id(), |(id, ())| *id);
                let keys = keys_of.remove(&id).unwrap_or_default();
                if ended.is_err() {
                    tracing::error!(deliveries = keys.len(), "a try of parked deliveries crashed, it is made again later");
                    let again = SystemTime::now() + deliveries.settings.lease;
                    keys.iter().for_each(|key| deliveries.book.index().landed(key, Some(again)));
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
    fn deliveries(&self) -> &Deliveries {
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
        let room = IN_FLIGHT_MAX.saturating_sub(keys_of.values().map(Vec::len).sum());
        let due = {
            let mut index = self.deliveries().book.index();
            let disabled: Vec<(String, String)> =
                index.disabled().map(|known| (known.rule.clone(), known.rule_rev.clone())).collect();
            let breakers = self.arguments.webhooks.breakers();
            index.take_due(now, room, |entry| not_now(entry, snapshot, &disabled, breakers, now))
        };
        let mut by_db: BTreeMap<DbName, Vec<Due>> = BTreeMap::new();
        for (key, entry) in due {
            match snapshot.rule(&entry.rule).cloned() {
                Some(rule) => by_db.entry(entry.db).or_default().push((key, entry.doc_rev, rule)),
                None => self.deliveries().book.index().landed(&key, Some(now + NOT_NOW)),
            }
        }
        for (db, owed) in by_db {
            for some in owed.chunks(OF_ONE_DATABASE_MAX) {
                let keys = some.iter().map(|(key, _, _)| *key).collect();
                let (tries, db, some) = (self.clone(), db.clone(), some.to_vec());
                let task = under_way.spawn(async move { tries.attempt(db, some).await });
                keys_of.insert(task.id(), keys);
            }
        }
        let next = self.deliveries().book.index().next_due();
        let wait = next.map(|at| at.duration_since(now).unwrap_or(Duration::from_millis(20)));
        match room == 0 {
            true => TIDY_EVERY,
            false => wait.unwrap_or(TIDY_EVERY).min(TIDY_EVERY) + Duration::from_millis(1),
        }
    }

    async fn attempt(self: &Arc<Self>, db: DbName, owed: Vec<Due>) {
        self.arguments.couch.health().up().await;
        let claims = owed.iter().map(|(key, doc_rev, _)| self.claim(*key, doc_rev));
        let claims = futures_util::future::join_all(claims).await;
        let mut claimed: Vec<(Parked, Arc<Rule>)> =
            claims.into_iter().zip(owed).filter_map(|(claim, (_, _, rule))| Some((claim?, rule))).collect();
        if claimed.is_empty() {
            return;
        }
        let until = Instant::now() + self.deliveries().settings.lease.saturating_sub(LEASE_REST);
        // A database that was made again has equal revisions that are other changes.
        if let Ok([Some(info)]) = self.arguments.couch.dbs_info(&[&db]).await.as_deref() {
            claimed.iter_mut().for_each(|(parked, _)| parked.instance_start_time = info.instance_start_time.clone());
        }
        let ids: Vec<String> = claimed.iter().map(|(parked, _)| parked.doc_id.clone()).collect();
        let include_docs = claimed.iter().any(|(_, rule)| rule.needs_doc());
        let read = Instant::now();
        let current = match self.arguments.couch.current_docs(&db, &ids, include_docs).await {
            Ok(current) => current,
            Err(error) => return self.unread(&db, claimed, &error).await,
        };
        self.missing_dbs.is_there(&db);
        let claimed = claimed.into_iter().zip(current);
        let sent = claimed.map(|((parked, rule), current)| self.send(parked, rule, current, (read, until)));
        futures_util::future::join_all(sent).await;
    }

    /// Ours for a while, or None where somebody else has it or it is there no more.
    async fn claim(&self, key: Key, known_rev: &str) -> Option<Parked> {
        let (deliveries, now) = (self.deliveries(), SystemTime::now());
        let again = Some(now + COUCHDB_FAILED);
        let Ok(doc) = deliveries.store.load(key.doc_id()).await else {
            deliveries.book.index().landed(&key, again);
            return None;
        };
        let Some(mut parked) = doc.as_ref().and_then(Parked::read).filter(|parked| parked.state == State::Parked) else {
            let mut index = deliveries.book.index();
            index.landed(&key, again);
            match doc.as_ref().and_then(Parked::read) {
                Some(ended) => drop(index.put(&ended)),
                None => drop(index.forget_if(&key, known_rev)),
            }
            return None;
        };
        let is_ours = parked.claimed_by.as_deref() == Some(&self.arguments.process);
        if let (Some(_), false, Some(until)) = (&parked.claimed_by, is_ours, parked.next_attempt_at)
            && until > now
            // A clock that ran ahead must not keep it from everybody.
            && until <= now + deliveries.settings.lease * 2
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
        let after = self.deliveries().settings.assume_deleted_after;
        let is_missing = matches!(error, CouchError::NotFound(_))
            && matches!(self.arguments.couch.dbs_info(&[db]).await.as_deref(), Ok([None]));
        let is_gone = is_missing && self.missing_dbs.is_gone(db.clone(), after);
        let pause = if is_missing { NOT_NOW.min(after) } else { COUCHDB_FAILED };
        if !is_missing {
            tracing::debug!(%db, %error, "cannot read what parked deliveries are about, trying again");
        }
        let deliveries = claimed.len();
        let ends = claimed.into_iter().map(|(parked, _)| async move {
            match is_gone {
                true => self.end(parked, State::Dropped, "the database is gone").await,
                false => self.unclaim(parked, pause).await,
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

    async fn send(&self, parked: Parked, rule: Arc<Rule>, current: Current, (read, until): (Instant, Instant)) {
        let row = match self.newest(&parked, &rule, current).await {
            Newest::Is(row) => row,
            Newest::Later(pause) => return self.unclaim(parked, pause).await,
            Newest::Gone => return self.end(parked, State::Dropped, "the document is gone").await,
        };
        let doc = Document::of(&row);
        if !rule.matches(&doc) {
            // As the feed has it: a state that came and went is not told of.
            tracing::debug!(rule = %rule.id, db = parked.db, "the document's newest state is none of the rule's business");
            return self.done(parked, row.rev()).await;
        }
        let db: DbName = parked.db.as_str().into();
        let (vault, instance) = (&self.arguments.vault, &parked.instance_start_time);
        let mut delivery = match crate::webhook::delivery(vault, &rule, &db, instance, &doc, parked.replays) {
            Ok(delivery) => delivery,
            // The same holds the rule where it has new changes.
            Err(error) if error.concerns_rule() => return self.unclaim(parked, NOT_NOW * 10).await,
            Err(error) => {
                let failed = Failed { error: error.to_string(), verdict: Verdict::Later, attempts: 0, answer: None };
                return self.failed(parked, &rule, &failed).await;
            }
        };
        // In a batch it would take others down with it, or be taken down.
        if let Some(gathered) = &mut delivery.gathered {
            gathered.go_alone();
        }
        let Ok(outcome) = tokio::time::timeout_at(until.into(), self.arguments.webhooks.run(delivery)).await else {
            // It may be under way still, and nobody may make it again before it cannot be.
            let again = SystemTime::now() + LEASE_REST + self.deliveries().settings.attempt_max;
            return self.deliveries().book.index().landed(&parked.key(), Some(again));
        };
        match outcome {
            Ok(Outcome::Done) => {
                self.deliveries().book.index().accepted(parked.key(), row.rev(), read);
                self.done(parked, row.rev()).await;
            }
            Ok(Outcome::Failed(failed)) => {
                if failed.verdict == Verdict::Gone {
                    self.deliveries().disable(&rule, &db, &failed.error).await;
                }
                self.failed(parked, &rule, &failed).await;
            }
            Ok(Outcome::Unsent { after, .. }) => self.unclaim(parked, after.mul_f64(1.0 + 0.2 * fastrand::f64())).await,
            // The request was cut off by our own end: whoever comes next makes it again at once.
            Err(_) if self.deliveries().book.stopping.is_cancelled() => self.unclaim(parked, Duration::ZERO).await,
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

    async fn failed(&self, parked: Parked, rule: &Rule, failed: &Failed) {
        let patience = self.deliveries().settings.patience.of(&rule.handling.retry);
        self.update_claimed(parked.key(), |parked| {
            parked.retries = parked.retries.saturating_add(1);
            let now = SystemTime::now();
            failed_again(parked, failed, now, |verdict, history| patience.next(verdict, history, now, fastrand::f64()));
            true
        })
        .await;
    }

    async fn unclaim(&self, parked: Parked, after: Duration) {
        self.update_claimed(parked.key(), |parked| {
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
        tracing::debug!(rule = parked.rule, db = parked.db, reason, "a parked delivery was {}, it stays listed", state.name());
    }

    /// Writes what a try came to, unless somebody else claimed it meanwhile: then it is theirs to say.
    async fn update_claimed(&self, key: Key, change: impl FnMut(&mut Parked) -> bool) {
        let is_mine = |parked: &Parked| parked.claimed_by.as_deref().is_none_or(|by| *by == *self.arguments.process);
        self.update_where(key, is_mine, change).await;
    }

    /// The same, whoever has it.
    async fn update(&self, key: Key, change: impl FnMut(&mut Parked) -> bool) {
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
            // Ended by somebody else, or gone: the changes tell of it.
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
                self.deliveries().book.index().enable(&disabled.rule);
            }
        }
    }

    /// Rules with parked deliveries that are no more, and have not been for a while: one that is written anew, as a deployment
    /// does, is the same rule.
    fn deleted_rules(&self, snapshot: &Snapshot) -> HashSet<Arc<str>> {
        let parked = self.deliveries().book.index().parked_of_rules();
        let absent = parked.into_iter().map(|(rule, _)| rule).filter(|rule| snapshot.rule(rule).is_none());
        let absent: HashSet<Arc<str>> = absent.filter(|rule| !snapshot.is_invalid_rule(rule)).collect();
        self.missing_rules.keep(|rule| absent.contains(rule));
        let after = self.deliveries().settings.assume_deleted_after;
        absent.into_iter().filter(|rule| self.missing_rules.is_gone(rule.clone(), after)).collect()
    }

    /// Ends what is owed by a rule that is no more, and forgets what ended long ago.
    async fn tidy(&self, snapshot: &Snapshot) {
        let settings = &self.deliveries().settings;
        self.missing_dbs.forget_after(settings.assume_deleted_after * 2 + NOT_NOW * 4);
        self.missing_docs.forget_after(settings.assume_deleted_after * 2 + NOT_NOW * 4);
        let deleted = &self.deleted_rules(snapshot);
        let (unwanted, before, counts) = {
            let mut index = self.deliveries().book.index();
            index.forget_accepted(Instant::now());
            let unwanted = index.unwanted(TIDY_MAX, |entry| unwanted_because(entry, snapshot, deleted).is_some());
            let before = SystemTime::now().checked_sub(settings.retention).unwrap_or(SystemTime::UNIX_EPOCH);
            let disabled = index.disabled().count();
            self.arguments.metrics.rules_disabled.set(i64::try_from(disabled).unwrap_or(i64::MAX));
            (unwanted, before, State::ALL.map(|state| (state, index.count(state))))
        };
        for (state, count) in counts {
            let gauge = self.arguments.metrics.deliveries.get_or_create_owned(&StateLabels { state: state.name() });
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        let ends = unwanted.into_iter().map(|(key, entry)| async move {
            let reason = unwanted_because(&entry, snapshot, deleted).unwrap_or_default();
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
        self.forget_ended(before).await;
    }

    /// What ended is listed for a while, and not without bound: the oldest go first.
    async fn forget_ended(&self, before: SystemTime) {
        let listed = self.deliveries().settings.bounds.all;
        let beyond = self.deliveries().book.index().ended_beyond(listed);
        if beyond > 0 {
            if !self.lists_less.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    deliveries = beyond,
                    listed,
                    "more deliveries are dead or dropped than are listed (deliveries.max), the oldest are not listed any more"
                );
            }
        } else if self.deliveries().book.index().ended_beyond(listed / 2) == 0 {
            self.lists_less.store(false, Ordering::Relaxed);
        }
        for _ in 0..TIDY_ROUNDS_MAX {
            let old = self.deliveries().book.index().ended_before(before, listed, TIDY_MAX);
            let is_last = old.len() < TIDY_MAX;
            let deletions = old.into_iter().map(|(key, entry)| async move {
                let gone = json!({ "_id": key.doc_id(), "_rev": entry.doc_rev, "_deleted": true });
                let is_gone = matches!(self.deliveries().store.save(gone).await, Ok(WriteResult::Saved { .. }));
                if is_gone {
                    self.deliveries().book.index().forget_if(&key, &entry.doc_rev);
                }
                is_gone
            });
            let gone = futures_util::future::join_all(deletions).await;
            if is_last || !gone.contains(&true) {
                return;
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

/// Why nobody wants it any more. A rule that is damaged for the moment, or away for a moment, is no such reason.
fn unwanted_because(entry: &Entry, snapshot: &Snapshot, deleted: &HashSet<Arc<str>>) -> Option<&'static str> {
    match snapshot.rule(&entry.rule) {
        None => deleted.contains(&entry.rule).then_some("its rule was deleted"),
        Some(rule) if !rule.matches_name(&entry.db) => Some("its rule does not match the database any more"),
        Some(_) => None,
    }
}
