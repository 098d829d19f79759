//! What a rule that waits has failed to deliver, since when and how often: whether it is to be given up is read from it (pure).
//!
//! A delivery that is parked says so in its own document. One whose rule waits instead has none, so its `change_listener` does:
//! the clock of `give_up_after` goes on through a restart.

use crate::db::positions::RuleId;
use crate::deliveries::patience::History;
use crate::job::timestamp;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::time::SystemTime;

/// Of one rule; a rule that waits tries its first change alone, so more are rarely known. The clock of others starts later.
const CHANGES_MAX: usize = 20;
const FIELD: &str = "failing";

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Failing(BTreeMap<RuleId, Vec<Change>>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Change {
    id: String,
    rev: String,
    since: SystemTime,
    /// That failed, after the first one.
    retries: u32,
}

impl Failing {
    /// From a `change_listener`. What cannot be read is forgotten: that is more patience, and loses nothing.
    pub fn load(doc: Option<&Value>) -> Self {
        let rules = doc.and_then(|doc| doc[FIELD].as_object()).into_iter().flatten();
        let change = |change: &Value| {
            let text = |field: &str| change[field].as_str().map(str::to_string);
            let since = humantime::parse_rfc3339_weak(change["since"].as_str()?).ok()?;
            let retries = u32::try_from(change["retries"].as_u64()?).unwrap_or(u32::MAX);
            Some(Change { id: text("id")?, rev: text("rev")?, since, retries })
        };
        let of_rule = |(rule, changes): (&String, &Value)| {
            let changes: Vec<Change> = changes.as_array()?.iter().take(CHANGES_MAX).filter_map(change).collect();
            (!changes.is_empty()).then(|| (RuleId::from(rule.as_str()), changes))
        };
        Self(rules.filter_map(of_rule).collect())
    }

    pub fn store(&self, doc: &mut Map<String, Value>) {
        if self.0.is_empty() {
            doc.remove(FIELD);
            return;
        }
        let change = |change: &Change| {
            let Change { id, rev, since, retries } = change;
            json!({ "id": id, "rev": rev, "since": timestamp(*since), "retries": retries })
        };
        let of_rule = |(rule, changes): (&RuleId, &Vec<Change>)| {
            let changes: Vec<Value> = changes.iter().map(change).collect();
            (rule.to_string(), Value::from(changes))
        };
        doc.insert(String::from(FIELD), Value::Object(self.0.iter().map(of_rule).collect()));
    }

    /// Of a change that fails now.
    pub fn history(&self, rule: &str, (id, rev): (&str, &str), now: SystemTime) -> History {
        let known = self.0.get(rule).and_then(|changes| changes.iter().find(|known| known.id == id && known.rev == rev));
        match known {
            Some(known) => History { retries: known.retries.saturating_add(1), first_failed_at: known.since },
            None => History { retries: 0, first_failed_at: now },
        }
    }

    /// It failed, and its rule waits for it.
    pub fn failed(&mut self, rule: &RuleId, (id, rev): (&str, &str), now: SystemTime) {
        let History { retries, first_failed_at: since } = self.history(rule, (id, rev), now);
        let changes = self.0.entry(rule.clone()).or_default();
        let has_room = changes.len() < CHANGES_MAX;
        match changes.iter_mut().find(|known| known.id == id && known.rev == rev) {
            Some(known) => known.retries = retries,
            None if has_room => {
                changes.push(Change { id: id.to_string(), rev: rev.to_string(), since, retries });
            }
            None => {}
        }
    }

    /// One of its changes is no more: what comes after it may be known here.
    pub fn passed(&mut self, rule: &str, (id, rev): (&str, &str)) {
        if let Some(changes) = self.0.get_mut(rule) {
            changes.retain(|known| known.id != id || known.rev != rev);
            if changes.is_empty() {
                self.0.remove(rule);
            }
        }
    }

    /// The rule does not wait any more, or was edited.
    pub fn forget(&mut self, rule: &str) {
        self.0.remove(rule);
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn retain(&mut self, mut waits: impl FnMut(&RuleId) -> bool) {
        self.0.retain(|rule, _| waits(rule));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn history(failing: &Failing, change: (&str, &str), now: u64) -> (u32, SystemTime) {
        let History { retries, first_failed_at } = failing.history("r", change, at(now));
        (retries, first_failed_at)
    }

    #[test]
    fn a_change_is_counted_from_its_first_failure_and_through_a_restart() {
        let (rule, change) = (RuleId::from("r"), ("a", "1-a"));
        let mut failing = Failing::default();
        assert_eq!(history(&failing, change, 10), (0, at(10)), "the first failure is no retry");
        failing.failed(&rule, change, at(10));
        assert_eq!(history(&failing, change, 20), (1, at(10)));
        failing.failed(&rule, change, at(20));
        assert_eq!(history(&failing, ("a", "2-b"), 30), (0, at(30)), "another revision is another change");
        let mut doc = Map::new();
        failing.store(&mut doc);
        let restarted = Failing::load(Some(&Value::Object(doc.clone())));
        assert_eq!((&restarted, history(&restarted, change, 30)), (&failing, (2, at(10))));
        failing.passed("r", change);
        failing.store(&mut doc);
        assert!(doc.is_empty(), "nothing is left behind: {doc:?}");
    }

    #[test]
    fn it_is_bounded_and_survives_any_document() {
        let rule = RuleId::from("r");
        let mut failing = Failing::default();
        for n in 0..100 {
            failing.failed(&rule, (&n.to_string(), "1-a"), at(n));
        }
        assert_eq!(failing.0["r"].len(), CHANGES_MAX);
        assert_eq!(history(&failing, ("0", "1-a"), 200).0, 1, "the first are those that the rule waits for");
        for doc in [json!(null), json!({ "failing": 7 }), json!({ "failing": { "r": [1, {}, { "id": "a" }], "s": "x" } })] {
            assert_eq!(Failing::load(Some(&doc)), Failing::default(), "{doc}");
        }
    }
}
