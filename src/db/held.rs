//! Until when each rule is held back in a database, as its `change_listener` says it (pure).
//!
//! `dirty_at` is one time for the whole document, and whoever marks the document ends it. This is each rule's own: a change that
//! comes meanwhile is no reason to ask a receiver that fails.

use crate::couch::Seq;
use crate::db::positions::{Hold, RuleId, RuleStart};
use crate::job::timestamp;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

const FIELD: &str = "held";

pub fn is_said(doc: &Value) -> bool {
    doc.get(FIELD).is_some()
}

/// None where it says nothing of these positions: there is nothing, or somebody else has moved `last_seq` since.
pub fn load(doc: &Value, last_seq: Option<&Seq>, rules: &[RuleStart]) -> Option<BTreeMap<RuleId, Hold>> {
    let field = doc.get(FIELD)?;
    if field.get("from").and_then(Seq::of_json).as_ref() != last_seq {
        return None;
    }
    let held = field.get("rules")?.as_object()?;
    let known = rules.iter().filter_map(|rule| {
        let stored = held.get(rule.id.as_ref())?;
        let until = humantime::parse_rfc3339(stored["until"].as_str()?).ok()?;
        let retries = u32::try_from(stored["retries"].as_u64()?).unwrap_or(u32::MAX);
        Some((rule, Hold { until, retries }, stored["rev"] == *rule.rev))
    });
    let known: Vec<_> = known.collect();
    // An edit may have mended what held it back, and those that waited for it with the same time.
    let lifted: BTreeSet<SystemTime> = known.iter().filter(|(.., is_same)| !is_same).map(|(_, hold, _)| hold.until).collect();
    let stands = known.into_iter().filter(|(_, hold, _)| !lifted.contains(&hold.until));
    Some(stands.map(|(rule, hold, _)| (rule.id.clone(), hold)).collect())
}

/// `held` with each rule's own revision, to which the wait belongs.
pub fn store<'a>(doc: &mut Map<String, Value>, last_seq: Value, held: impl Iterator<Item = (&'a RuleId, &'a Hold, &'a str)>) {
    let of_rule = |(rule, Hold { until, retries }, rev): (&RuleId, &Hold, &str)| {
        (rule.to_string(), json!({ "until": timestamp(*until), "retries": retries, "rev": rev }))
    };
    let rules: Map<String, Value> = held.map(of_rule).collect();
    match rules.is_empty() {
        true => drop(doc.remove(FIELD)),
        false => drop(doc.insert(String::from(FIELD), json!({ "from": last_seq, "rules": rules }))),
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

    fn start(id: &str, rev: &str) -> RuleStart {
        RuleStart { id: id.into(), rev: rev.into(), since: None }
    }

    #[test]
    fn what_was_stored_is_loaded_for_the_same_position_and_the_same_rules() {
        let holds = [("a", at(10), 3), ("b", at(20), 1), ("c", at(20), 1)]
            .map(|(id, until, retries)| (RuleId::from(id), Hold { until, retries }));
        let mut doc = Map::new();
        store(&mut doc, json!("5-x"), holds.iter().map(|(id, hold)| (id, hold, "1-r")));
        let doc = Value::Object(doc);
        let here = Seq::from("5-x");
        let held = |rules: &[RuleStart], last_seq: &Seq| {
            load(&doc, Some(last_seq), rules).map(|held| held.keys().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        };
        let same = ["a", "b", "c"].map(|id| start(id, "1-r"));
        assert_eq!(load(&doc, Some(&here), &same), Some(holds.clone().into_iter().collect()));
        let cases = [
            (vec![start("a", "1-r")], Some("a")),
            (vec![start("a", "2-r"), start("b", "1-r")], Some("b")),
            // It waited with the one that was edited.
            (vec![start("a", "1-r"), start("b", "2-r"), start("c", "1-r")], Some("a")),
            (vec![start("new", "1-r")], Some("")),
        ];
        for (rules, expected) in cases {
            assert_eq!(held(&rules, &here).as_deref(), expected, "{rules:?}");
        }
        assert_eq!(held(&same, &Seq::from("6-x")), None, "others went on, with every rule");
        let mut doc = doc.as_object().unwrap().clone();
        store(&mut doc, json!("5-x"), std::iter::empty());
        assert!(doc.is_empty(), "nothing is left behind: {doc:?}");
    }

    #[test]
    fn any_document_is_survived() {
        let rules = [start("a", "1-r")];
        for held in [
            json!(null),
            json!(7),
            json!({ "from": 1 }),
            json!({ "rules": { "a": 1 } }),
            json!({ "rules": { "a": { "until": "soon", "retries": 1, "rev": "1-r" } } }),
            json!({ "rules": { "a": { "until": "2026-01-01T00:00:00Z", "retries": -1, "rev": "1-r" } } }),
            json!({ "rules": { "a": { "until": "2026-01-01T00:00:00Z" } } }),
        ] {
            let doc = json!({ "held": held });
            assert!(load(&doc, None, &rules).is_none_or(|held| held.is_empty()), "{doc}");
        }
    }
}
