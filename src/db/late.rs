//! Deliveries that outlast their page: a slow receiver holds its own rule, and no other rule of its database.
//!
//! A page that others wait for leaves them behind. Their rule is held where it stands, the deliveries go on, and when they have
//! ended the rule reads its page again and takes their outcomes instead of sending twice.

use crate::db::positions::RuleId;
use crate::job::Outcome;
use crate::rules::rule::Rule;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

/// One that has not ended, or whose outcome nobody has taken yet.
pub struct Outstanding {
    /// Of the revision that was sent.
    pub key: u64,
    pub outcome: oneshot::Receiver<Outcome>,
}

#[derive(Default)]
pub struct Late {
    deliveries: HashMap<(RuleId, String), Outstanding>,
    /// Rules that wait for theirs, and whether all of those have ended.
    waiting: BTreeMap<RuleId, Arc<AtomicBool>>,
    /// What was delivered beyond a rule's position, and is not known by it.
    delivered: HashMap<RuleId, HashSet<u64>>,
}

impl Late {
    pub fn is_empty(&self) -> bool {
        self.deliveries.is_empty() && self.waiting.is_empty() && self.delivered.is_empty()
    }

    /// For the next listener, where this one has to be forgotten.
    pub fn with_delivered(mut self, of_rules: impl IntoIterator<Item = (RuleId, HashSet<u64>)>) -> Self {
        for (rule, keys) in of_rules {
            self.delivered.entry(rule).or_default().extend(keys);
        }
        self
    }

    pub fn was_delivered(&self, rule: &RuleId, key: u64) -> bool {
        self.delivered.get(rule).is_some_and(|keys| keys.contains(&key))
    }

    /// Outcomes that came and are good need nobody who asks for them: a feed may show its rows in another order now.
    pub fn note_delivered(&mut self) {
        let Self { deliveries, delivered, .. } = self;
        deliveries.retain(|(rule, _), outstanding| match outstanding.outcome.try_recv() {
            Ok(Outcome::Done) => {
                delivered.entry(rule.clone()).or_default().insert(outstanding.key);
                false
            }
            Ok(outcome) => {
                let (sender, receiver) = oneshot::channel();
                let _ = sender.send(outcome);
                outstanding.outcome = receiver;
                true
            }
            Err(_) => true,
        });
    }

    /// It was another database's.
    pub fn forget_delivered(&mut self) {
        self.delivered.clear();
    }

    pub fn is_waiting(&self, rule: &RuleId) -> bool {
        self.waiting.contains_key(rule)
    }

    /// All of a rule that keeps the order of the whole database.
    pub fn take_of(&mut self, rule: &RuleId) -> Vec<Outstanding> {
        let ids: Vec<_> = self.deliveries.keys().filter(|(of, _)| of == rule).cloned().collect();
        ids.iter().filter_map(|id| self.deliveries.remove(id)).collect()
    }

    /// A rule that has failed as well backs off, and does not wait for these.
    pub fn keep(&mut self, rule: &RuleId, left: Vec<(String, Outstanding)>) {
        self.deliveries.extend(left.into_iter().map(|(doc_id, outstanding)| ((rule.clone(), doc_id), outstanding)));
    }

    /// They are read now.
    pub fn stop_waiting<'a>(&mut self, rules: impl IntoIterator<Item = &'a RuleId>) {
        for rule in rules {
            self.waiting.remove(rule);
        }
    }

    pub fn take(&mut self, rule: &RuleId, doc_id: &str) -> Option<Outstanding> {
        // Hardly ever is there one, and a key costs a copy of the id.
        if self.deliveries.is_empty() {
            return None;
        }
        self.deliveries.remove(&(rule.clone(), doc_id.to_string()))
    }

    /// `told` is called when all of them have ended.
    pub fn leave(&mut self, rule: &RuleId, left: Vec<(String, Outstanding)>, told: Arc<dyn Fn() + Send + Sync>) {
        let has_ended = Arc::new(AtomicBool::new(false));
        let mut forwards = Vec::with_capacity(left.len());
        for (doc_id, Outstanding { key, outcome }) in left {
            let (sender, receiver) = oneshot::channel();
            forwards.push((outcome, sender));
            self.deliveries.insert((rule.clone(), doc_id), Outstanding { key, outcome: receiver });
        }
        self.waiting.insert(rule.clone(), has_ended.clone());
        tokio::spawn(async move {
            for (outcome, sender) in forwards {
                // A pool that is rebuilt drops its senders; so do we.
                if let Ok(outcome) = outcome.await {
                    let _ = sender.send(outcome);
                }
            }
            has_ended.store(true, Ordering::Release);
            told();
        });
    }

    /// Rules whose deliveries have all ended since this was asked last.
    pub fn ended(&mut self) -> Vec<RuleId> {
        let ended: Vec<RuleId> = self
            .waiting
            .iter()
            .filter(|(_, has_ended)| has_ended.load(Ordering::Acquire))
            .map(|(rule, _)| rule.clone())
            .collect();
        for rule in &ended {
            self.waiting.remove(rule);
        }
        ended
    }

    /// A whole page was read since: what has ended and was not asked for is of no use any more, and what was delivered is known.
    pub fn forget_ended_of(&mut self, rules: &[&Arc<Rule>]) {
        let is_read = |rule: &RuleId| rules.iter().any(|read| read.id == *rule);
        self.deliveries.retain(|(rule, _), outstanding| {
            !is_read(rule) || matches!(outstanding.outcome.try_recv(), Err(TryRecvError::Empty))
        });
        self.delivered.retain(|rule, _| !is_read(rule));
    }

    pub fn retain(&mut self, is_known: impl Fn(&RuleId) -> bool) {
        self.deliveries.retain(|(rule, _), _| is_known(rule));
        self.waiting.retain(|rule, _| is_known(rule));
        self.delivered.retain(|rule, _| is_known(rule));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use tokio::sync::Notify;

    fn id(rule: &str) -> RuleId {
        rule.into()
    }

    fn rule(id: &str) -> Arc<Rule> {
        let doc = serde_json::json!({ "_id": id, "_rev": "1-r", "type": "on_change", "db_name": "db", "url": "http://h/" });
        Arc::new(Rule::parse(&doc).unwrap())
    }

    #[tokio::test]
    async fn outcomes_wait_for_who_asks_and_their_rule_is_told_once() {
        let (mut late, told) = (Late::default(), Arc::new(Notify::new()));
        let (first, first_outcome) = oneshot::channel();
        let (second, second_outcome) = oneshot::channel();
        let tell = {
            let told = told.clone();
            Arc::new(move || told.notify_one())
        };
        let left = [("a", 1, first_outcome), ("b", 2, second_outcome)];
        late.leave(&id("r"), left.map(|(doc, key, outcome)| (doc.into(), Outstanding { key, outcome })).into(), tell);
        first.send(Outcome::Done).unwrap();
        tokio::task::yield_now().await;
        assert_eq!(late.ended(), Vec::<RuleId>::new(), "the second is under way");
        // Its pool was rebuilt.
        drop(second);
        told.notified().await;
        assert_eq!(late.ended(), vec![id("r")]);
        assert_eq!(late.ended(), Vec::<RuleId>::new());
        assert_eq!(late.take(&id("r"), "a").unwrap().outcome.await, Ok(Outcome::Done));
        assert!(late.take(&id("r"), "a").is_none());
        assert!(late.take(&id("other"), "b").is_none());
        assert!(late.take(&id("r"), "b").unwrap().outcome.await.is_err());
        assert!(late.is_empty());
    }

    #[tokio::test]
    async fn what_nobody_asked_for_is_forgotten_once_it_has_ended() {
        let (mut late, told) = (Late::default(), Arc::new(Notify::new()));
        let (ended, ended_outcome) = oneshot::channel();
        let (under_way, outcome) = oneshot::channel::<Outcome>();
        let left = [("ended", ended_outcome), ("under_way", outcome)];
        let tell = {
            let told = told.clone();
            Arc::new(move || told.notify_one())
        };
        late.leave(&id("r"), left.map(|(doc, outcome)| (doc.into(), Outstanding { key: 1, outcome })).into(), tell);
        ended.send(Outcome::Done).unwrap();
        tokio::time::timeout(std::time::Duration::from_secs(5), async {
            while late.deliveries[&(id("r"), String::from("ended"))].outcome.is_empty() {
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
        late.forget_ended_of(&[&rule("other")]);
        assert_eq!(late.deliveries.len(), 2);
        late.forget_ended_of(&[&rule("r")]);
        assert_eq!(late.deliveries.keys().map(|(_, doc)| doc.as_str()).collect::<Vec<_>>(), ["under_way"]);
        late.retain(|_| false);
        assert!(late.is_empty());
        drop(under_way);
    }

    #[tokio::test]
    async fn what_came_well_is_known_whatever_row_is_read_first() {
        let mut late = Late::default();
        let outstanding = |key, outcome: Option<Outcome>| {
            let (sender, receiver) = oneshot::channel();
            outcome.map(|outcome| sender.send(outcome));
            Outstanding { key, outcome: receiver }
        };
        let failed = Outcome::Missing { error: String::from("gone") };
        let left = [("done", 1, Some(Outcome::Done)), ("failed", 2, Some(failed.clone()))];
        late.keep(&id("r"), left.map(|(doc, key, outcome)| (doc.into(), outstanding(key, outcome))).into());
        late.note_delivered();
        late.note_delivered();
        assert!(late.was_delivered(&id("r"), 1) && !late.was_delivered(&id("other"), 1) && !late.was_delivered(&id("r"), 2));
        assert_eq!(late.take_of(&id("r")).remove(0).outcome.await, Ok(failed));
        late.forget_ended_of(&[&rule("other")]);
        assert!(late.was_delivered(&id("r"), 1));
        late.forget_ended_of(&[&rule("r")]);
        assert!(late.is_empty());
    }
}
