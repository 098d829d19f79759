//! How many deliveries failed, and of which rules: for `/status` and for people (pure).

use super::index::Index;
use super::parked::{Disabled, Parked, State};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Of rules with parked deliveries, and of disabled ones: a page is read by people.
const RULES_MAX: usize = 100;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    states: [usize; 3],
    /// How many are parked, for each rule that has some.
    parked_of_rules: BTreeMap<String, usize>,
    /// Each disabled rule, and the revision of it that was.
    disabled: BTreeMap<String, String>,
}

impl Counts {
    pub fn of(index: &Index) -> Self {
        Self {
            states: State::ALL.map(|state| index.count(state)),
            parked_of_rules: index.parked_of_rules().into_iter().map(|(rule, count)| (rule.to_string(), count)).collect(),
            disabled: index.disabled().map(|disabled| (disabled.rule.clone(), disabled.rule_rev.clone())).collect(),
        }
    }

    pub fn add(&mut self, parked: &Parked) {
        self.states[parked.state as usize] += 1;
        if parked.state == State::Parked {
            *self.parked_of_rules.entry(parked.rule.clone()).or_default() += 1;
        }
    }

    pub fn add_disabled(&mut self, disabled: &Disabled) {
        self.disabled.insert(disabled.rule.clone(), disabled.rule_rev.clone());
    }

    pub fn of_state(&self, state: State) -> usize {
        self.states[state as usize]
    }

    pub fn all(&self) -> usize {
        self.states.iter().sum()
    }

    pub fn parked_of(&self, rule: &str) -> usize {
        self.parked_of_rules.get(rule).copied().unwrap_or(0)
    }

    /// As of this revision of the rule: an edit ends it.
    pub fn disables(&self, rule: &str, rule_rev: &str) -> bool {
        self.disabled.get(rule).is_some_and(|disabled| disabled == rule_rev)
    }

    pub fn disabled(&self) -> impl Iterator<Item = &str> {
        self.disabled.keys().map(String::as_str)
    }

    /// `12 parked, 3 dead, 0 dropped`
    pub fn line(&self) -> String {
        let parts = State::ALL.map(|state| format!("{} {}", self.of_state(state), state.name()));
        parts.join(", ")
    }

    /// The rules with the most parked deliveries first; what is left out is counted.
    pub fn json(&self) -> Value {
        let mut rules: Vec<(&String, usize)> = self.parked_of_rules.iter().map(|(rule, count)| (rule, *count)).collect();
        rules.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let more = (rules.len().max(self.disabled.len())).saturating_sub(RULES_MAX);
        let by_rule: Map<String, Value> =
            rules.into_iter().take(RULES_MAX).map(|(rule, count)| (rule.clone(), Value::from(count))).collect();
        let mut page = json!({
            "parked": self.of_state(State::Parked),
            "dead": self.of_state(State::Dead),
            "dropped": self.of_state(State::Dropped),
            "parked_by_rule": by_rule,
            "disabled_rules": self.disabled().take(RULES_MAX).collect::<Vec<_>>(),
        });
        if more > 0 {
            page["rules_left_out"] = Value::from(more);
        }
        page
    }
}

/// For `/status`.
pub fn deliveries_json(index: &Index) -> Value {
    Counts::of(index).json()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::deliveries::parked::Key;

    fn delivery(rule: &str, doc: &str, state: State) -> Parked {
        let id = Key::of(rule, "db", doc).doc_id();
        let doc = json!({ "_id": id, "type": "delivery", "rule": rule, "db_name": "db", "doc_id": doc, "state": state.name() });
        Parked::read(&doc).expect("a delivery")
    }

    #[test]
    fn an_index_and_its_documents_count_the_same() {
        let mut index = Index::default();
        let mut counts = Counts::default();
        let deliveries = [
            delivery("mail", "1", State::Parked),
            delivery("mail", "2", State::Parked),
            delivery("mail", "3", State::Dead),
            delivery("sms", "1", State::Parked),
            delivery("old", "1", State::Dropped),
        ];
        for delivery in &deliveries {
            index.put(delivery);
            counts.add(delivery);
        }
        let disabled = Disabled { doc_rev: "1-a".into(), rule: "gone".into(), rule_rev: "1-b".into() };
        counts.add_disabled(&disabled);
        index.disable(disabled);
        assert_eq!(Counts::of(&index), counts);
        let expected = json!({
            "parked": 3, "dead": 1, "dropped": 1,
            "parked_by_rule": { "mail": 2, "sms": 1 },
            "disabled_rules": ["gone"],
        });
        assert_eq!(deliveries_json(&index), expected);
        assert_eq!(counts.line(), "3 parked, 1 dead, 1 dropped");
        assert_eq!(
            (counts.disables("gone", "1-b"), counts.disables("gone", "2-c"), counts.disables("mail", "")),
            (true, false, false)
        );
        assert_eq!((counts.all(), counts.parked_of("mail"), counts.parked_of("old")), (5, 2, 0));
    }

    #[test]
    fn a_page_names_a_hundred_rules_those_with_the_most_first() {
        let mut counts = Counts::default();
        for rule in 0..150 {
            counts.add(&delivery(&format!("r{rule:03}"), "1", State::Parked));
        }
        counts.add(&delivery("r149", "2", State::Parked));
        let page = counts.json();
        let rules = page["parked_by_rule"].as_object().expect("an object");
        assert_eq!((rules.len(), rules.keys().next().map(String::as_str)), (100, Some("r149")));
        assert_eq!((&page["parked"], &page["rules_left_out"]), (&json!(151), &json!(50)));
    }
}
