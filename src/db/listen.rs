//! One listen: what changed in a database since its rules last looked, delivered, and the position saved.
//!
//! The position is saved after each page and confirmed before the next page is delivered, so that a crash repeats one page at
//! most. The next page is read meanwhile.

use crate::checkpoints::Checkpoints;
use crate::couch::fingerprint::Fingerprint;
use crate::couch::{Changes, ChangesQuery, Couch, CouchError, Seq, WriteResult};
use crate::db::Instance;
use crate::db::deliver::{Addressee, DISABLED_FOR, Delivered, Means, RuleFailure, Wait, deliver};
use crate::db::failing::Failing;
use crate::db::gather::{Leave, PATIENCE};
use crate::db::known;
use crate::db::late::Late;
use crate::db::positions::{Positions, RuleId, RuleStart};
use crate::db::rule_health::RuleHealth;
use crate::deliveries::Deliveries;
use crate::job::{DbName, timestamp};
use crate::locks::hold::{Hold, HoldError};
use crate::rules::matching::{Chosen, RuleSet};
use crate::rules::rule::{Rule, SinceOverride};
use crate::schedule::Pool;
use crate::schedule::backoff::Backoff;
use crate::vault::Vault;
use crate::webhook::HttpSender;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{Semaphore, watch};
use tokio_util::task::AbortOnDropHandle;

/// What every listen needs; shared by all databases.
pub struct Tools {
    pub couch: Couch,
    pub spiegel_db: String,
    pub checkpoints: Checkpoints,
    pub webhooks: Pool<HttpSender>,
    pub deliveries: Deliveries,
    pub vault: Arc<Vault>,
    pub backoff: Backoff,
    pub batch_size: usize,
    /// Pages of changes held in memory at once.
    pub pages: Arc<Semaphore>,
    pub rule_health: RuleHealth,
    /// The process's start.
    pub started: Instant,
}

#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("the database does not exist")]
    Missing,
    #[error(transparent)]
    Couch(#[from] CouchError),
    #[error("cannot save the position: {0}")]
    Unsaved(String),
    #[error(transparent)]
    Lock(HoldError),
}

/// The `change_listener` of one database, as it is in CouchDB and as it is now.
pub struct Listener {
    id: String,
    db: DbName,
    doc: Option<Value>,
    positions: Positions,
    failing: Failing,
    known_rules: BTreeSet<RuleId>,
    instance_start_time: Option<String>,
    /// A row told that the database was made or deleted, perhaps long ago.
    is_instance_unsure: bool,
    /// What a sweep read of the database before this run.
    seen: Option<Fingerprint>,
    late: Late,
    /// Without it every run waits for all that it sends.
    leaving: Option<Leaving>,
    /// Where the document is locked, all writes go by its lock.
    lock: Option<Arc<Hold>>,
}

/// With what a page leaves its slow deliveries behind.
pub struct Leaving {
    /// The database has changed since the run began.
    pub more: Arc<watch::Sender<bool>>,
    /// Called when what was left has ended.
    pub told: Arc<dyn Fn() + Send + Sync>,
}

/// The page after the one that is being delivered.
struct Prefetched {
    since: Seq,
    include_docs: bool,
    page: AbortOnDropHandle<(Instant, Result<Changes, CouchError>)>,
}

impl Prefetched {
    fn serves(&self, since: Option<&Seq>, include_docs: bool) -> bool {
        since == Some(&self.since) && (self.include_docs || !include_docs)
    }

    async fn page(self) -> (Instant, Result<Changes, CouchError>) {
        let interrupted = |lost| timed(Err(CouchError::Unreachable(format!("reading ahead was interrupted: {lost}"))));
        self.page.await.unwrap_or_else(interrupted)
    }
}

/// With the moment at which it was there: what is read of a document from then on is no older.
fn timed(page: Result<Changes, CouchError>) -> (Instant, Result<Changes, CouchError>) {
    (Instant::now(), page)
}

/// A page that takes longer than this to deliver has a slow receiver; others must not wait for its memory.
const SLOW_PAGE: Duration = Duration::from_secs(1);
/// What was dirty is loaded within this.
const JUST_STARTED: Duration = Duration::from_secs(60);
const HELD_AT_START: Duration = Duration::from_secs(10);
/// A rule whose deliveries are under way is told of their end; a process that does not hear of it looks after this.
const LATE_LOOKED_AT_AFTER: Duration = Duration::from_secs(15);
/// A host that may be asked at once is still not asked in a hot loop.
const HOST_WAIT_MIN: Duration = Duration::from_millis(100);

pub fn document_id(db: &str) -> String {
    format!("spiegel_cl_{db}")
}

impl Listener {
    pub async fn load(tools: &Tools, db: &DbName, rules: &[Arc<Rule>], suspended: &[RuleId]) -> Result<Self, ListenError> {
        let id = document_id(db);
        let doc = tools.checkpoints.load(id.clone()).await.map_err(|gone| ListenError::Unsaved(gone.to_string()))?;
        Ok(Self::of(tools, id, db, doc, (rules, suspended)))
    }

    /// For a document that is locked: its positions are saved by the lock, and it is neither cleaned nor unlocked here.
    pub fn locked(tools: &Tools, db: &DbName, rules: &[Arc<Rule>], suspended: &[RuleId], lock: Arc<Hold>) -> Self {
        let doc = lock.before().clone();
        let id = doc["_id"].as_str().unwrap_or_default().to_string();
        Self { lock: Some(lock), ..Self::of(tools, id, db, Some(doc), (rules, suspended)) }
    }

    fn of(tools: &Tools, id: String, db: &DbName, doc: Option<Value>, (rules, suspended): (&[Arc<Rule>], &[RuleId])) -> Self {
        let mut positions = Positions::load(doc.as_ref(), &starts(rules), suspended);
        let mut failing = Failing::load(doc.as_ref());
        positions.edited_since_stored().iter().for_each(|rule| failing.forget(rule));
        if let Some((started, until)) = held_at_most(SystemTime::now(), tools.started.elapsed()) {
            positions.hold_at_most(until, started);
        }
        let instance = doc.as_ref().and_then(|doc| doc["instance_start_time"].as_str()).map(str::to_string);
        Self {
            id,
            db: db.clone(),
            failing,
            doc,
            positions,
            known_rules: rules.iter().map(|rule| rule.id.clone()).collect(),
            instance_start_time: instance,
            is_instance_unsure: false,
            seen: None,
            late: Late::default(),
            leaving: None,
            lock: None,
        }
    }

    /// Without this every run waits for all that it sends. `late` is what an earlier listener of this database left.
    pub fn leave_by(&mut self, leaving: Leaving, late: Late) {
        self.leaving = Some(leaving);
        if !late.is_empty() {
            self.late = late;
        }
    }

    pub fn into_late(self) -> Late {
        self.late.with_delivered(self.positions.delivered())
    }

    /// True while there is something that would be lost, and repeated, by forgetting this and loading it again.
    pub fn remembers_deliveries(&self) -> bool {
        self.positions.remembers_deliveries() || !self.late.is_empty()
    }

    pub fn positions(&self) -> &Positions {
        &self.positions
    }

    /// Its document as it is now; the positions are ours.
    pub async fn reload(&mut self, tools: &Tools) -> Result<(), ListenError> {
        let doc = tools.checkpoints.load(self.id.clone()).await;
        self.doc = doc.map_err(|gone| ListenError::Unsaved(gone.to_string()))?;
        Ok(())
    }

    /// A database that was made again gets new delivery ids.
    pub fn meet(&mut self, instance: Instance) {
        match instance {
            Instance::Unchanged => {}
            Instance::Unsure => self.is_instance_unsure = true,
            Instance::Is(instance) => {
                self.is_instance_unsure = false;
                let known = self.instance_start_time.replace(instance.to_string());
                if known.is_some_and(|known| known != *instance) {
                    self.positions.forget_deliveries();
                    self.late.forget_delivered();
                    self.failing.retain(|_| false);
                }
            }
        }
    }

    fn sync(&mut self, tools: &Tools, rules: &[Arc<Rule>], suspended: &[RuleId]) {
        for edited in self.positions.sync(&starts(rules), suspended) {
            self.failing.forget(&edited);
        }
        for rule in rules {
            self.known_rules.insert(rule.id.clone());
            if let Some(enabled_at) = tools.deliveries.enabled_at(&rule.id) {
                self.positions.lift_hold_from_before(&rule.id, enabled_at);
            }
        }
        self.failing.retain(|id| rules.iter().any(|rule| rule.id == *id));
        let gone: Vec<RuleId> = self.known_rules.iter().filter(|id| rules.iter().all(|rule| rule.id != **id)).cloned().collect();
        self.late.retain(|rule| rules.iter().any(|known| known.id == *rule));
        for rule in gone {
            self.known_rules.remove(&rule);
            tools.rule_health.gone(&rule, &self.db);
        }
    }

    /// Reads, delivers and saves until everything that was there at the first read is through, or held back. `seen` is what the
    /// database looked like before that, where somebody knows.
    pub async fn listen(
        &mut self,
        tools: &Tools,
        rules: &Arc<RuleSet>,
        suspended: &[RuleId],
        seen: Option<Fingerprint>,
    ) -> Result<(), ListenError> {
        self.seen = seen;
        tools.deliveries.loaded().await;
        self.sync(tools, rules, suspended);
        let is_missing = self.doc.as_ref().is_some_and(|doc| !doc["possibly_deleted_at"].is_null());
        if is_missing {
            // Somebody must look whether it is there.
            let now = SystemTime::now();
            self.positions.hold_at_most(now, now);
        }
        let was_dirty = self.doc.as_ref().is_some_and(|doc| doc["dirty"] != Value::Bool(false));
        self.positions.begin_run();
        let mut prefetched: Option<Prefetched> = None;
        while let Some(index) = self.next_read() {
            let group = self.positions.group(index);
            let chosen = rules.choose(|rule| group.rules.contains(&rule.id));
            let group_rules = chosen.rules();
            let now = SystemTime::now();
            if !group_rules.is_empty() && group_rules.iter().all(|rule| self.late.is_waiting(&rule.id)) {
                // Its answers are not there yet.
                self.positions.hold_on(index, now + LATE_LOOKED_AT_AFTER, now);
                continue;
            }
            if group.hold.is_some()
                && !is_missing
                && let Some(until) = nothing_sent_until(tools, group_rules)
            {
                // Reading the page would only show again what cannot be sent.
                self.positions.hold_on(index, until, now);
                continue;
            }
            let include_docs = group_rules.iter().any(|rule| rule.needs_doc());
            let permit = tools.pages.clone().acquire_owned().await.ok();
            let (received, page) = match prefetched.take() {
                Some(prefetched) if prefetched.serves(group.since.as_ref(), include_docs) => prefetched.page().await,
                _ => timed(tools.couch.changes(&self.db, &self.query(index, tools.batch_size, include_docs)).await),
            };
            if let (Err(error), Some(since)) = (&page, &self.positions.group(index).since)
                && error.is_unknown_seq()
            {
                tracing::warn!(db = %self.db, since = since.as_query(), "the position is none of this server's, starting from the beginning");
                self.restart(index);
                continue;
            }
            let page = self.existing(tools, page).await?;
            for what in &page.malformed {
                tracing::warn!(db = %self.db, what, "malformed row");
            }
            if page.rows.is_empty() && self.was_made_again(tools, index).await? {
                self.restart(index);
                continue;
            }
            let read_nothing = page.rows.is_empty() && page.malformed.is_empty();
            let pending = if read_nothing { 0 } else { page.pending.unwrap_or(0) };
            if pending > 0 && !self.positions.group(index).is_probing() {
                let query = ChangesQuery {
                    since: Some(page.last_seq.clone()),
                    limit: Some(tools.batch_size),
                    include_docs,
                    ..ChangesQuery::default()
                };
                let (couch, db) = (tools.couch.clone(), self.db.clone());
                let reading = tokio::spawn(async move { timed(couch.changes(&db, &query).await) });
                prefetched =
                    Some(Prefetched { since: page.last_seq.clone(), include_docs, page: AbortOnDropHandle::new(reading) });
            }
            let started = Instant::now();
            let delivered = self.deliver(tools, index, &chosen, (&page, received), permit).await?;
            for (rule, row) in &delivered.waited_for {
                if let Some(row) = page.rows.get(*row) {
                    self.failing.failed(rule, (&row.id, row.rev()), SystemTime::now());
                }
            }
            for (rule, row) in &delivered.passed {
                if let Some(row) = page.rows.get(*row).filter(|_| !self.failing.is_empty()) {
                    self.failing.passed(rule, (&row.id, row.rev()));
                }
            }
            let Delivered { page: mut outcome, failures, late, .. } = delivered;
            if started.elapsed() >= SLOW_PAGE {
                // The receiver is the slow one: a page in memory would only wait for it.
                prefetched = None;
            }
            outcome.malformed = page.malformed.len();
            outcome.last_seq = Some(page.last_seq);
            outcome.pending = pending;
            drop(page.rows);
            let is_late = outcome.late.clone();
            self.page_done(tools, index, outcome, &failures);
            self.late.stop_waiting(group_rules.iter().map(|rule| &rule.id));
            for (rule, left) in late {
                match &self.leaving {
                    Some(Leaving { told, .. }) if is_late.contains(&rule) => self.late.leave(&rule, left, told.clone()),
                    _ => self.late.keep(&rule, left),
                }
            }
            // The last page's is saved with what ends the lock.
            if self.positions.changed() && (self.lock.is_none() || self.positions.next_read(SystemTime::now()).is_some()) {
                self.save(tools, false).await?;
            }
        }
        if self.lock.is_some() {
            return Ok(());
        }
        if was_dirty || self.doc.as_ref().is_some_and(|doc| !doc["possibly_deleted_at"].is_null()) {
            self.save(tools, was_dirty).await?;
        }
        Ok(())
    }

    /// The database was made again, and what is under way was another one's.
    fn restart(&mut self, index: usize) {
        self.positions.restart(index);
        self.late = Late::default();
    }

    fn next_read(&mut self) -> Option<usize> {
        let now = SystemTime::now();
        for rule in self.late.ended() {
            self.positions.due_now(&rule, now);
        }
        self.positions.next_read(now)
    }

    fn query(&self, index: usize, limit: usize, include_docs: bool) -> ChangesQuery {
        let since = self.positions.group(index).since.clone();
        ChangesQuery { since, limit: Some(limit), include_docs, ..ChangesQuery::default() }
    }

    /// A 404 may be a node that has not heard of the database yet; `_dbs_info` decides.
    async fn existing(&self, tools: &Tools, page: Result<Changes, CouchError>) -> Result<Changes, ListenError> {
        match page {
            Ok(page) => Ok(page),
            Err(CouchError::NotFound(reason)) => match tools.couch.dbs_info(&[&self.db]).await?.first() {
                Some(None) => Err(ListenError::Missing),
                _ => Err(CouchError::NotFound(reason).into()),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// Only where seqs are integers, which do not rewind by themselves: an `update_seq` below the position tells of another
    /// database of the same name.
    async fn was_made_again(&self, tools: &Tools, index: usize) -> Result<bool, ListenError> {
        let Some(Seq::Number(since)) = self.positions.group(index).since else { return Ok(false) };
        if since == 0 {
            return Ok(false);
        }
        let info = tools.couch.db_info(&self.db).await?;
        Ok(matches!(info.update_seq, Seq::Number(update_seq) if update_seq < since))
    }

    async fn deliver(
        &mut self,
        tools: &Tools,
        index: usize,
        rules: &Chosen,
        (page, received): (&Changes, Instant),
        permit: Option<tokio::sync::OwnedSemaphorePermit>,
    ) -> Result<Delivered, ListenError> {
        if page.rows.is_empty() {
            return Ok(Delivered::default());
        }
        if self.instance_start_time.is_none() || self.is_instance_unsure {
            let instance = tools.couch.db_info(&self.db).await?.instance_start_time;
            self.meet(Instance::Is(instance.into()));
        }
        let (has_others, others_wait) = self.positions.others(index, |rule| self.late.is_waiting(rule));
        let group = self.positions.group(index);
        let leaving = self.leaving.as_ref().filter(|_| has_others || rules.rules().len() > 1);
        let is_wanted = others_wait || (rules.rules().len() > 1 && page.pending.is_some_and(|pending| pending > 0));
        // One that is tried again after a failure has lost its right to be waited for.
        let patience = if group.is_probing() { Duration::ZERO } else { PATIENCE };
        let to = Addressee {
            db: &self.db,
            instance_start_time: self.instance_start_time.as_deref().unwrap_or_default(),
            rules,
            delivered: &group.delivered,
            failing: &self.failing,
            probing: group.is_probing(),
            received,
            leave: leaving.map(|leaving| Leave { more: &leaving.more, is_wanted, has_others, patience }),
        };
        let means = Means { pool: &tools.webhooks, vault: &tools.vault, deliveries: &tools.deliveries };
        let delivering = deliver(&means, to, &page.rows, &mut self.late);
        tokio::pin!(delivering);
        match tokio::time::timeout(SLOW_PAGE, &mut delivering).await {
            Ok(delivered) => Ok(delivered),
            Err(_) => {
                drop(permit);
                Ok(delivering.await)
            }
        }
    }

    fn page_done(
        &mut self,
        tools: &Tools,
        index: usize,
        outcome: crate::db::positions::PageOutcome,
        failures: &BTreeMap<RuleId, RuleFailure>,
    ) {
        let now = SystemTime::now();
        let of_page = self.positions.group(index).rules.clone();
        let late = outcome.late.clone();
        let until = |rule: Option<&RuleId>, retries| match rule.is_some_and(|rule| late.contains(rule)) {
            true => now + LATE_LOOKED_AT_AFTER,
            false => now + held_for(rule, failures, tools.backoff.delay(retries, fastrand::f64()), fastrand::f64()),
        };
        self.positions.page_done(index, outcome, now, until);
        let held = self.positions.held_rules();
        self.failing.retain(|rule| held.contains(rule) || !of_page.contains(rule));
        for rule in &self.known_rules {
            match (held.contains(rule), failures.get(rule)) {
                (true, Some(failure)) => tools.rule_health.failing(rule, &self.db, &failure.error),
                (true, None) => {}
                (false, _) => tools.rule_health.healthy(rule, &self.db),
            }
        }
    }

    /// Writes the position; what somebody else wrote into the document meanwhile is kept.
    async fn save(&mut self, tools: &Tools, mut settles_dirty: bool) -> Result<(), ListenError> {
        if let Some(lock) = self.lock.clone() {
            lock.write(|doc| self.store(doc)).await.map_err(ListenError::Lock)?;
            self.positions.saved();
            return Ok(());
        }
        loop {
            let doc = self.next_doc(settles_dirty);
            let saved = tools.checkpoints.save(doc.clone()).await;
            match saved.map_err(|_| ListenError::Unsaved(String::from("the checkpoints are being restarted")))? {
                WriteResult::Saved { rev } => {
                    let mut doc = doc;
                    doc["_rev"] = Value::from(rev);
                    self.doc = Some(doc);
                    self.positions.saved();
                    return Ok(());
                }
                WriteResult::Conflict => {
                    // Somebody wrote since the run started, perhaps that there is more work.
                    settles_dirty = false;
                    self.seen = None;
                    let current = tools.checkpoints.load(self.id.clone()).await;
                    self.doc = current.map_err(|gone| ListenError::Unsaved(gone.to_string()))?;
                }
                WriteResult::Refused { reason } => return Err(ListenError::Unsaved(reason)),
            }
        }
    }

    /// Writes what is known here into the document of a lock.
    pub fn store(&self, doc: &mut Map<String, Value>) {
        self.positions.store(doc);
        self.failing.store(doc);
        known::forget(doc);
        if let Some(instance) = &self.instance_start_time {
            doc.insert(String::from("instance_start_time"), Value::from(instance.as_str()));
        }
    }

    fn next_doc(&self, settles_dirty: bool) -> Value {
        let mut doc = match &self.doc {
            Some(Value::Object(doc)) => doc.clone(),
            _ => new_document(&self.id, &self.db),
        };
        self.positions.store(&mut doc);
        self.failing.store(&mut doc);
        doc.insert(String::from("type"), Value::from("change_listener"));
        doc.insert(String::from("db_name"), Value::from(&*self.db));
        if settles_dirty || !doc.contains_key("dirty") {
            doc.insert(String::from("dirty"), Value::Bool(false));
        }
        if settles_dirty && doc.get("locked_at").is_some_and(|at| !at.is_null()) {
            // Nobody showed himself who could hold it, and left there it would keep the original from the next change.
            doc.insert(String::from("locked_at"), Value::Null);
        }
        match (&self.seen, self.positions.complete()) {
            (Some(seen), Some(last_seq)) if doc["dirty"] == Value::Bool(false) => known::store(&mut doc, seen, last_seq),
            _ => known::forget(&mut doc),
        }
        if doc.contains_key("possibly_deleted_at") {
            doc.insert(String::from("possibly_deleted_at"), Value::Null);
        }
        if let Some(instance) = &self.instance_start_time {
            doc.insert(String::from("instance_start_time"), Value::from(instance.as_str()));
        }
        doc.insert(String::from("updated_at"), Value::from(timestamp(SystemTime::now())));
        Value::Object(doc)
    }
}

/// Until when a rule may be held by what was found before the process, which is `uptime` old, began: rules may have been edited
/// or enabled, and hosts come back, while nobody was there. With that beginning.
fn held_at_most(now: SystemTime, uptime: Duration) -> Option<(SystemTime, SystemTime)> {
    let started = now.checked_sub(uptime).filter(|_| uptime < JUST_STARTED)?;
    Some((started, started + HELD_AT_START))
}

/// Until when nothing is sent for any of these rules, where that is so: they are disabled, or their hosts are not asked.
fn nothing_sent_until(tools: &Tools, rules: &[Arc<Rule>]) -> Option<SystemTime> {
    let now = tokio::time::Instant::now();
    let wait = |rule: &Arc<Rule>| match tools.deliveries.is_disabled(rule) {
        true => Some(DISABLED_FOR),
        false => Some(tools.webhooks.breakers().open_until(rule.lane.as_deref()?)?.saturating_duration_since(now)),
    };
    let first = rules.iter().map(wait).collect::<Option<Vec<_>>>()?.into_iter().min()?;
    Some(SystemTime::now() + first.max(HOST_WAIT_MIN).mul_f64(1.0 + 0.1 * fastrand::f64()))
}

/// How long the rules that failed wait: what backs off by itself waits for `delay` or what its receiver asked for; what waits
/// for its host does for as long as that is not asked, and a little more, so that not all of them come at once.
fn held_for(rule: Option<&RuleId>, failures: &BTreeMap<RuleId, RuleFailure>, delay: Duration, random: f64) -> Duration {
    let of = |failure: &RuleFailure| match failure.wait {
        Wait::Backoff { after } => delay.max(after.unwrap_or_default()),
        Wait::For(host) => host.max(HOST_WAIT_MIN).mul_f64(1.0 + 0.1 * random),
    };
    match rule.and_then(|rule| failures.get(rule)) {
        Some(failure) => of(failure),
        // It waits for others, which are those that failed.
        None => failures.values().map(of).max().unwrap_or(delay),
    }
}

/// A `change_listener` document without a position.
pub fn new_document(id: &str, db: &str) -> Map<String, Value> {
    let mut doc = Map::new();
    doc.insert(String::from("_id"), Value::from(id));
    doc.insert(String::from("type"), Value::from("change_listener"));
    doc.insert(String::from("db_name"), Value::from(db));
    doc
}

fn starts(rules: &[Arc<Rule>]) -> Vec<RuleStart> {
    rules.iter().map(|rule| RuleStart { id: rule.id.clone(), rev: rule.rev.clone(), since: rule.since.map(start_of) }).collect()
}

fn start_of(since: SinceOverride) -> Seq {
    match since {
        SinceOverride::Zero => Seq::zero(),
        SinceOverride::Now => Seq::from("now"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn only_after_the_start_is_what_was_held_before_it_looked_at_soon() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let uptime = Duration::from_secs(20);
        let started = now - uptime;
        assert_eq!(held_at_most(now, uptime), Some((started, started + HELD_AT_START)));
        assert_eq!(held_at_most(now, JUST_STARTED), None);
    }
}
