//! Ends what nobody wants any more, and forgets what ended long ago.

use super::attempts::{NOT_NOW, Tries};
use super::index::Entry;
use super::parked::State;
use crate::couch::WriteResult;
use crate::rules::catalogue::Snapshot;
use crate::telemetry::StateLabels;
use serde_json::json;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

/// How often old and unwanted ones are looked for.
pub const TIDY_EVERY: Duration = Duration::from_secs(30);
const TIDY_MAX: usize = 500;
/// Meanwhile nothing is tried.
const TIDY_ROUNDS_MAX: usize = 20;

impl Tries {
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
    pub async fn tidy(&self, snapshot: &Snapshot) {
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

/// Why nobody wants it any more. A rule that is damaged for the moment, or away for a moment, is no such reason.
fn unwanted_because(entry: &Entry, snapshot: &Snapshot, deleted: &HashSet<Arc<str>>) -> Option<&'static str> {
    match snapshot.rule(&entry.rule) {
        None => deleted.contains(&entry.rule).then_some("its rule was deleted"),
        Some(rule) if !rule.matches_name(&entry.db) => Some("its rule does not match the database any more"),
        Some(_) => None,
    }
}
