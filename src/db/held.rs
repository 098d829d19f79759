//! Until when each rule is held back in a database, as its `change_listener` says it (pure).
//!
//! `dirty_at` is one time for the whole document, and whoever marks the document ends it. This is each rule's own: a change that
//! comes meanwhile is no reason to ask a receiver that fails.

use crate::couch::{Seq, generation};
use crate::db::positions::{Hold, RuleId, RuleStart};
use crate::job::timestamp;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};

const FIELD: &str = "held";

/// What a document says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Held {
    pub holds: BTreeMap<RuleId, Hold>,
    /// The revisions for which rules are held, where they are newer than what is known here: another process heard of an edit first.
    pub newer: BTreeMap<RuleId, String>,
    /// What is said of these is of an older revision.
    pub edited: Vec<RuleId>,
}

/// None where it says nothing of these positions: there is nothing, or somebody else has moved `last_seq` since.
pub fn load(doc: &Value, last_seq: Option<&Seq>, rules: &[RuleStart]) -> Option<Held> {
    let field = doc.get(FIELD)?;
    if field.get("from").and_then(Seq::of_json).as_ref() != last_seq {
        return None;
    }
    let stored = field.get("rules")?.as_object()?;
    let mut held = Held::default();
    // An edit may have mended what held it back, and those that waited for it with the same time.
    let mut lifted = BTreeSet::new();
    for rule in rules {
        let Some((hold, rev)) = stored.get(rule.id.as_ref()).and_then(hold_of) else { continue };
        if is_newer(&rule.rev, rev) {
            lifted.insert(hold.until);
            held.edited.push(rule.id.clone());
        } else if is_newer(rev, &rule.rev) {
            held.newer.insert(rule.id.clone(), rev.to_string());
        }
        held.holds.insert(rule.id.clone(), hold);
    }
    held.holds.retain(|_, hold| !lifted.contains(&hold.until));
    Some(held)
}

fn hold_of(stored: &Value) -> Option<(Hold, &str)> {
    let time = |field: &str| humantime::parse_rfc3339(stored[field].as_str()?).ok();
    let retries = u32::try_from(stored["retries"].as_u64()?).unwrap_or(u32::MAX);
    Some((Hold { until: time("until")?, retries, at: time("at")? }, stored["rev"].as_str()?))
}

/// Revisions of one document that is not in conflict.
pub fn is_newer(rev: &str, than: &str) -> bool {
    rev != than && generation(rev) >= generation(than)
}

/// `held` with each rule's own revision, to which the wait belongs.
pub fn store<'a>(doc: &mut Map<String, Value>, last_seq: Value, held: impl Iterator<Item = (&'a RuleId, &'a Hold, &'a str)>) {
    let of_rule = |(rule, Hold { until, retries, at }, rev): (&RuleId, &Hold, &str)| {
        (rule.to_string(), json!({ "until": timestamp(*until), "retries": retries, "rev": rev, "at": timestamp(*at) }))
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
    use std::time::{Duration, SystemTime};

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn start(id: &str, rev: &str) -> RuleStart {
        RuleStart { id: id.into(), rev: rev.into(), since: None }
    }

    #[test]
    fn what_was_stored_is_loaded_for_the_same_position_and_the_same_rules() {
        let holds = [("a", at(10), 3), ("b", at(20), 1), ("c", at(20), 1)]
            .map(|(id, until, retries)| (RuleId::from(id), Hold { until, retries, at: at(5) }));
        let mut doc = Map::new();
        store(&mut doc, json!("5-x"), holds.iter().map(|(id, hold)| (id, hold, "2-r")));
        let doc = Value::Object(doc);
        let here = Seq::from("5-x");
        let same = ["a", "b", "c"].map(|id| start(id, "2-r"));
        let all = Held { holds: holds.clone().into_iter().collect(), ..Held::default() };
        assert_eq!(load(&doc, Some(&here), &same), Some(all));
        let cases = [
            (vec![start("a", "2-r")], "a", ""),
            (vec![start("a", "3-r"), start("b", "2-r")], "b", "a"),
            (vec![start("a", "2-s"), start("b", "2-r")], "b", "a"),
            // It waited with the one that was edited.
            (vec![start("a", "2-r"), start("b", "3-r"), start("c", "2-r")], "a", "b"),
            // Somebody else has heard of an edit that is news here.
            (vec![start("a", "1-r"), start("b", "2-r")], "a b", ""),
            (vec![start("new", "2-r")], "", ""),
        ];
        for (rules, expected, edited) in cases {
            let held = load(&doc, Some(&here), &rules).expect("valid");
            let names = |ids: Vec<&RuleId>| ids.into_iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
            assert_eq!(
                (names(held.holds.keys().collect()), names(held.edited.iter().collect())),
                (expected.into(), edited.into())
            );
            assert_eq!(held.newer.is_empty(), rules[0].rev != "1-r");
        }
        assert_eq!(load(&doc, Some(&Seq::from("6-x")), &same), None, "others went on, with every rule");
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
            assert!(load(&doc, None, &rules).is_none_or(|held| held == Held::default()), "{doc}");
        }
    }
}
