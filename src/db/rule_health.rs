//! Which rules fail, so that a dead endpoint is one log line and not one for each of its databases.

use crate::db::positions::RuleId;
use crate::job::DbName;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

#[derive(Clone, Default)]
pub struct RuleHealth {
    failing: Arc<Mutex<HashMap<RuleId, HashSet<DbName>>>>,
}

impl RuleHealth {
    pub fn failing(&self, rule: &RuleId, db: &DbName, error: &str) {
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        let dbs = failing.entry(rule.clone()).or_default();
        let first = dbs.is_empty();
        dbs.insert(db.clone());
        drop(failing);
        if first {
            tracing::warn!(%rule, %db, error, "webhook failed, the rule is held back");
        }
    }

    pub fn healthy(&self, rule: &RuleId, db: &DbName) {
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(dbs) = failing.get_mut(rule) else { return };
        dbs.remove(db);
        if dbs.is_empty() {
            failing.remove(rule);
            drop(failing);
            tracing::info!(%rule, %db, "webhook works again, the rule goes on");
        }
    }

    /// The rule is no more, or not for this database.
    pub fn gone(&self, rule: &RuleId, db: &DbName) {
        let mut failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(dbs) = failing.get_mut(rule) {
            dbs.remove(db);
            if dbs.is_empty() {
                failing.remove(rule);
            }
        }
    }

    /// For each failing rule, in how many databases it is held back.
    pub fn held(&self) -> Vec<(RuleId, usize)> {
        let failing = self.failing.lock().unwrap_or_else(PoisonError::into_inner);
        failing.iter().map(|(rule, dbs)| (rule.clone(), dbs.len())).collect()
    }
}
