//! The sweep finds what the feed lost.
//!
//! `_global_changes` loses rows by construction. The sweep compares a fingerprint of each watched database with the one that it
//! read before work which has since been confirmed: it remembers that, and of what an earlier process did the `change_listener`
//! may know. Equal means nothing to do; different or unknown means a hint, and the run that follows asks `_changes`. The numbers
//! can look unchanged right after a write, and differ by replica, so equality is only a saving and every 24th sweep hints every
//! database.

use crate::couch::docs::{DBS_INFO_KEYS_MAX, DbInfo};
use crate::couch::fingerprint::Fingerprint;
use crate::couch::{Couch, CouchError};
use crate::db::listen::document_id;
use crate::db::{Instance, directory, known};
use crate::feed::cursor::Ledger;
use crate::job::DbName;
use crate::rules::catalogue::Snapshot;
use crate::rules::matching::RuleSet;
use crate::rules::rule::Rule;
use crate::telemetry::Metrics;
use crate::topology;
use ractor::ActorRef;
use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};

/// What to look at.
#[derive(Debug, Clone)]
pub enum Scope {
    All,
    /// Databases of rules that are new or were edited; their databases are hinted whatever their fingerprints say.
    Rules(Vec<Arc<Rule>>),
}

/// What is to be swept. It outlives the sweeper: what was asked for and not finished is asked for still.
#[derive(Default)]
pub struct Queue {
    wanted: Mutex<Wanted>,
    asked: Notify,
}

#[derive(Debug, Default, Clone)]
struct Wanted {
    all: bool,
    rules: Vec<Arc<Rule>>,
    /// How often all was asked for: what is asked for during a sweep is not done by it.
    asks: u64,
    /// Full sweeps since the last one that hinted every database.
    trusting: u64,
}

/// One sweep in so many does not trust fingerprints.
const ASK_ALL_EVERY: u64 = 24;

impl Queue {
    pub fn ask(&self, scope: Scope) {
        {
            let mut wanted = self.wanted();
            match scope {
                Scope::All => {
                    wanted.all = true;
                    wanted.asks += 1;
                }
                Scope::Rules(rules) => {
                    // One that was edited again is one rule.
                    wanted.rules.retain(|known| !rules.iter().any(|rule| rule.id == known.id));
                    wanted.rules.extend(rules);
                }
            }
        }
        self.asked.notify_one();
    }

    /// Goes on counting where an earlier process ended: a process that lives for a few sweeps only must not trust for ever.
    pub fn resume(&self, trusting: u64) {
        let mut wanted = self.wanted();
        wanted.trusting = wanted.trusting.max(trusting.min(Self::TRUSTING_MAX));
    }

    pub const TRUSTING_MAX: u64 = ASK_ALL_EVERY - 1;

    /// Whether a sweep hints every database, whatever its fingerprint says.
    pub fn asks_all(&self, scope: &Scope) -> bool {
        match scope {
            Scope::All => self.wanted().trusting >= Self::TRUSTING_MAX,
            Scope::Rules(_) => true,
        }
    }

    pub fn is_empty(&self) -> bool {
        let wanted = self.wanted();
        !wanted.all && wanted.rules.is_empty()
    }

    /// The next sweep, and the number to hand in when it is done. A full sweep trusts fingerprints, one for rules does not, so
    /// neither stands in for the other.
    pub async fn next(&self) -> (Scope, u64) {
        loop {
            {
                let wanted = self.wanted();
                // Rules first: they are edited seldom, and must not wait behind full sweeps that are asked for again and again.
                if !wanted.rules.is_empty() {
                    return (Scope::Rules(wanted.rules.clone()), wanted.asks);
                }
                if wanted.all {
                    return (Scope::All, wanted.asks);
                }
            }
            self.asked.notified().await;
        }
    }

    /// Gives the count to `resume` with.
    pub fn done(&self, scope: &Scope, asks: u64, asked_all: bool) -> u64 {
        let mut wanted = self.wanted();
        match scope {
            Scope::All => {
                wanted.all = wanted.asks != asks;
                wanted.trusting = if asked_all { 0 } else { wanted.trusting.saturating_add(1) };
            }
            Scope::Rules(swept) => {
                wanted.rules.retain(|rule| !swept.iter().any(|other| other.id == rule.id && other.rev == rule.rev));
            }
        }
        wanted.trusting
    }

    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub struct Sweeper {
    pub couch: Couch,
    pub spiegel_db: String,
    pub ledger: Arc<Ledger>,
    pub snapshot: watch::Receiver<Arc<Snapshot>>,
    pub directory: ActorRef<directory::Message>,
    pub topology: ActorRef<topology::Message>,
    pub metrics: Arc<Metrics>,
    pub pending_databases_max: usize,
    /// Of databases that replicators write to: when one was made again, what was in it is gone.
    pub targets: HashMap<DbName, Target>,
}

const NAMES_PAGE: usize = 1000;
/// Two such requests a second keep a sweep of 100,000 databases below a tenth of what CouchDB can do.
const INFO_EVERY: Duration = Duration::from_millis(500);
impl Sweeper {
    /// Returns how many databases were hinted.
    pub async fn sweep(&mut self, scope: &Scope, ask_all: bool) -> Result<usize, CouchError> {
        let snapshot = self.snapshot.borrow().clone();
        let in_scope = |name: &str| match scope {
            Scope::All => snapshot.watches(name) || !snapshot.replicators_to(name).is_empty(),
            Scope::Rules(rules) => snapshot.watches(name) && rules.iter().any(|rule| rule.pattern.may_match(name)),
        };
        let mut found = 0;
        let mut seen: HashSet<String> = HashSet::new();
        let mut from: Option<String> = None;
        let mut seen_pages: HashSet<String> = HashSet::new();
        let mut pace = tokio::time::interval(INFO_EVERY);
        pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let page = self.couch.all_dbs(from.as_deref(), NAMES_PAGE).await?;
            // The page starts with the name that the one before ended with.
            let names: Vec<&str> = page.iter().map(String::as_str).filter(|name| Some(*name) != from.as_deref()).collect();
            let wanted: Vec<&str> = names.iter().copied().filter(|name| in_scope(name)).collect();
            for keys in wanted.chunks(DBS_INFO_KEYS_MAX) {
                pace.tick().await;
                let infos = self.couch.dbs_info(keys).await?;
                if !ask_all {
                    self.recall(&snapshot, keys, &infos).await;
                }
                for (name, info) in keys.iter().zip(infos) {
                    seen.insert((*name).to_string());
                    found += usize::from(self.look(&snapshot, name, info, ask_all).await);
                }
            }
            // A server that does not page (PouchDB's) sends all at once, again and again.
            match names.last() {
                Some(last) if page.len() <= NAMES_PAGE && !seen_pages.contains(*last) => {
                    seen_pages.insert((*last).to_string());
                    from = Some((*last).to_string());
                }
                _ => break,
            }
        }
        if matches!(scope, Scope::All) {
            self.ledger.cursor().retain_fingerprints(|db| seen.contains(db));
            self.targets.retain(|db, _| !snapshot.replicators_to(db).is_empty());
        }
        self.metrics.sweep_found.inc_by(found as u64);
        self.metrics.sweeps.inc();
        Ok(found)
    }

    /// Takes into the ledger what an earlier process did, where the `change_listener` says so. That knows nothing of replicators.
    async fn recall(&self, snapshot: &Snapshot, names: &[&str], infos: &[Option<DbInfo>]) {
        let mut unknown = Vec::new();
        for (name, info) in names.iter().zip(infos) {
            let Some(info) = info.as_ref().filter(|_| snapshot.watches(name) && snapshot.replicators_from(name).is_empty())
            else {
                continue;
            };
            let (rules, fingerprint) = (snapshot.rules_of(name), Fingerprint::of(info));
            let is_unknown = self.ledger.cursor().is_confirmed(name, &fingerprint).is_none();
            if is_unknown && fingerprint.is_lasting() && !rules.is_empty() {
                unknown.push((DbName::from(*name), fingerprint, rules));
            }
        }
        for (db, fingerprint) in delivered_before(&self.couch, &self.spiegel_db, unknown).await {
            self.ledger.cursor().confirm(&db, &fingerprint);
        }
    }

    async fn look(&mut self, snapshot: &Snapshot, name: &str, info: Option<DbInfo>, ask_all: bool) -> bool {
        self.metrics.sweep_databases.inc();
        let db: DbName = name.into();
        let Some(info) = info else {
            // Deleted a moment ago; or CouchDB could not look just now, which it tells in the same words.
            self.ledger.cursor().forget_fingerprint(name);
            if snapshot.watches(name) {
                self.ledger.room(self.pending_databases_max).await;
                self.ledger.cursor().owe(&db, None, Instant::now());
                let _ = self.directory.cast(directory::Message::Hint { db, instance: Instance::Unsure });
            }
            return false;
        };
        if !snapshot.replicators_to(name).is_empty() {
            self.meet_target(&db, &info);
        }
        if !snapshot.watches(name) {
            return false;
        }
        let fingerprint = Fingerprint::of(&info);
        let is_known = self.ledger.cursor().is_confirmed(name, &fingerprint) == Some(true);
        if is_known && !ask_all {
            return false;
        }
        self.ledger.room(self.pending_databases_max).await;
        self.ledger.cursor().owe(&db, Some(fingerprint), Instant::now());
        let instance = Instance::Is(info.instance_start_time.into());
        let _ = self.directory.cast(directory::Message::Hint { db, instance });
        true
    }

    /// A target that was made again lost what was replicated into it, and one that went back, to an older copy of itself, may
    /// have lost a part. The runs compare checkpoints, so that one look too many costs little.
    pub fn meet_target(&mut self, db: &DbName, info: &DbInfo) {
        let seen = Target { instance: hash_of(&info.instance_start_time), number: info.update_seq.number() };
        if self
            .targets
            .insert(db.clone(), seen)
            .is_some_and(|known| known.instance != seen.instance || seen.number < known.number)
        {
            let _ = self.topology.cast(topology::Message::TargetMade { db: db.clone() });
        }
    }
}

/// A target as the last look at it found it.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    instance: u64,
    number: Option<u64>,
}

/// Those whose `change_listener` says that their rules have everything up to the state that looks so, by one request. Where it
/// fails, the saving is lost and nothing else.
async fn delivered_before(
    couch: &Couch,
    spiegel_db: &str,
    unknown: Vec<(DbName, Fingerprint, Arc<RuleSet>)>,
) -> Vec<(DbName, Fingerprint)> {
    if unknown.is_empty() {
        return Vec::new();
    }
    let ids: Vec<String> = unknown.iter().map(|(db, ..)| document_id(db)).collect();
    let docs = couch.get_docs(spiegel_db, &ids).await.unwrap_or_else(|error| {
        tracing::debug!(%error, "cannot load what the change listeners know, asking their databases");
        Vec::new()
    });
    let known = unknown.into_iter().zip(docs).filter_map(|((db, fingerprint, rules), doc)| {
        known::is_delivered(&doc?, &fingerprint, &rules).then_some((db, fingerprint))
    });
    known.collect()
}

fn hash_of(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_full_sweep_in_24_asks_all_however_often_the_process_is_started() {
        let mut stored = 0;
        let mut asked = Vec::new();
        for number in 1..=72 {
            // Each process sweeps twice.
            let queue = Queue::default();
            queue.resume(stored);
            for sweep in 0..2 {
                let ask_all = queue.asks_all(&Scope::All);
                if ask_all {
                    asked.push(2 * number + sweep - 1);
                }
                stored = queue.done(&Scope::All, 0, ask_all);
            }
        }
        assert_eq!(asked, [24, 48, 72, 96, 120, 144]);
    }

    #[test]
    fn what_was_counted_is_bounded_and_never_forgotten() {
        let queue = Queue::default();
        queue.resume(u64::MAX);
        assert!(queue.asks_all(&Scope::All));
        assert_eq!(queue.done(&Scope::All, 0, true), 0);
        queue.done(&Scope::All, 0, false);
        // The feed was rebuilt, and read an older count.
        queue.resume(0);
        assert_eq!(queue.done(&Scope::All, 0, false), 2);
        assert_eq!(queue.done(&Scope::Rules(Vec::new()), 0, true), 2, "a rule's sweep is none of all databases");
        assert!(queue.asks_all(&Scope::Rules(Vec::new())));
    }
}
