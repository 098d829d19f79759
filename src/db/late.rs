//! Deliveries that outlast their page: a slow receiver holds its own rule, and no other rule of its database.
//!
//! A page that others wait for leaves them behind. Their rule is held where it stands, the deliveries go on, and when they have
//! ended the rule reads its page again and takes their outcomes instead of sending twice.

use crate::db::positions::RuleId;
use crate::job::Outcome;
use crate::rules::rule::Rule;
use std::collections::{BTreeMap, HashMap};
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
}

impl Late {
    pub fn is_empty(&self) -> bool {
        self.deliveries.is_empty() && self.waiting.is_empty()
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

    /// What has ended and was not asked for by the page that it belonged to is of no use any more.
    pub fn forget_ended_of(&mut self, rules: &[Arc<Rule>]) {
        self.deliveries.retain(|(rule, _), outstanding| {
            rules.iter().all(|known| known.id != *rule) || matches!(outstanding.outcome.try_recv(), Err(TryRecvError::Empty))
        });
    }

    pub fn retain(&mut self, is_known: impl Fn(&RuleId) -> bool) {
        self.deliveries.retain(|(rule, _), _| is_known(rule));
        self.waiting.retain(|rule, _| is_known(rule));
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
        late.forget_ended_of(&[rule("other")]);
        assert_eq!(late.deliveries.len(), 2);
        late.forget_ended_of(&[rule("r")]);
        assert_eq!(late.deliveries.keys().map(|(_, doc)| doc.as_str()).collect::<Vec<_>>(), ["under_way"]);
        late.retain(|_| false);
        assert!(late.is_empty());
        drop(under_way);
    }
}
