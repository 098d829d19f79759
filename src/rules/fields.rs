//! The names of a rule's fields, and which of a document's looks like one and is none.

use serde_json::{Map, Value};

const RULE: [&str; 24] = [
    "_id",
    "type",
    "db_name",
    "url",
    "method",
    "params",
    "if",
    "selector",
    "deleted",
    "design_docs",
    "since",
    "block",
    "debounce",
    "secret",
    "headers",
    "content_type",
    "retry",
    "retry_on",
    "give_up_after",
    "on_failure",
    "order",
    "latest_only",
    "batch",
    "_rev",
];
const RETRY: [&str; 6] = ["strategy", "delay", "multiplier", "cap", "limit", "give_up_after"];
const BATCH: [&str; 2] = ["max", "within"];

/// What the original knows of a rule, and what CouchDB has of its own.
const OF_THE_ORIGINAL: [&str; 10] = ["_id", "_rev", "type", "db_name", "url", "method", "params", "if", "block", "debounce"];

/// The fields that mean something here and nothing to the original, which passes them over.
pub fn additions(doc: &Value) -> Vec<&'static str> {
    let is_ours = |name: &&str| !OF_THE_ORIGINAL.contains(name) && doc.get(*name).is_some_and(|value| !value.is_null());
    RULE.into_iter().filter(is_ours).collect()
}

/// Fields that are passed over, because documents are their users', and were perhaps meant: a sentence for each.
pub fn near_misses(doc: &Value) -> Vec<String> {
    let mut found = Vec::new();
    let Value::Object(fields) = doc else { return found };
    add(&mut found, "", fields, &RULE);
    for (field, known) in [("retry", &RETRY[..]), ("batch", &BATCH[..])] {
        if let Some(Value::Object(members)) = fields.get(field) {
            add(&mut found, &format!("{field}."), members, known);
        }
    }
    found
}

fn add(found: &mut Vec<String>, within: &str, fields: &Map<String, Value>, known: &[&str]) {
    for name in fields.keys().filter(|name| !known.contains(&name.as_str())) {
        let meant = known
            .iter()
            .filter(|known| !known.starts_with('_') && !fields.contains_key(**known))
            .filter_map(|known| Some((slip(name, known)?, known)));
        if let Some((_, known)) = meant.min_by_key(|(slip, _)| *slip) {
            found.push(format!(
                "field {:?} means nothing; did you mean {:?}?",
                format!("{within}{name}"),
                format!("{within}{known}")
            ));
        }
    }
}

/// How far a name is from the one that was perhaps meant; None where too far. Other ways to write several words are no distance.
fn slip(name: &str, known: &str) -> Option<usize> {
    if known.len().abs_diff(name.len()) > 2 {
        return None;
    }
    let plain =
        |text: &str| text.chars().filter(|c| !matches!(c, '_' | '-' | ' ')).flat_map(char::to_lowercase).collect::<String>();
    let distance = match (plain(name), plain(known)) {
        (name, known) if name == known => 0,
        (name, known) => strsim::osa_distance(&name, &known),
    };
    // A short name is near to any other.
    let most = match known.len() {
        0..=2 => 0,
        3..=5 => 1,
        _ => 2,
    };
    (distance <= most).then_some(distance)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::rules::rule::Rule;
    use serde_json::json;

    #[test]
    fn what_the_original_does_not_know() {
        let rule = serde_json::json!({
            "_id": "r", "_rev": "1-x", "type": "on_change", "db_name": ".*", "url": "http://h/", "block": true, "debounce": true,
            "if": {}, "params": {}, "method": "PUT", "selector": { "a": 1 }, "secret": "s", "batch": null, "unknown": 7
        });
        assert_eq!(additions(&rule), ["selector", "secret"]);
        assert!(additions(&Value::Null).is_empty());
    }

    #[test]
    fn a_slip_of_the_pen_is_noticed() {
        for (name, meant) in [
            ("databse_name", None),
            ("dbname", Some("db_name")),
            ("dbName", Some("db_name")),
            ("db-name", Some("db_name")),
            ("parms", Some("params")),
            ("param", Some("params")),
            ("selectr", Some("selector")),
            ("metod", Some("method")),
            ("If", Some("if")),
            ("giveUpAfter", Some("give_up_after")),
            ("on-failure", Some("on_failure")),
            ("header", Some("headers")),
            ("deboucne", Some("debounce")),
            ("uri", Some("url")),
            // The user's own.
            ("id", None),
            ("of", None),
            ("note", None),
            ("name", None),
            ("description", None),
            ("enabled", None),
            ("created_at", None),
            ("url", None),
        ] {
            let said = near_misses(&json!({ name: 1 }));
            let expected: Vec<String> =
                meant.iter().map(|meant| format!("field {name:?} means nothing; did you mean {meant:?}?")).collect();
            assert_eq!(said, expected, "{name}");
        }
    }

    #[test]
    fn a_field_that_is_there_was_not_meant_by_another() {
        assert!(near_misses(&json!({"url": "x", "uri": "y"})).is_empty());
        assert_eq!(
            near_misses(&json!({"retry": {"limt": 1, "delay": 2, "delays": 3}, "batch": {"mx": 1}})),
            [
                r#"field "retry.limt" means nothing; did you mean "retry.limit"?"#,
                r#"field "batch.mx" means nothing; did you mean "batch.max"?"#
            ]
        );
        assert!(near_misses(&json!([])).is_empty() && near_misses(&json!({"retry": 5})).is_empty());
    }

    /// Each name of the list is read: with a value that fits no field, a rule is refused for it. Two are true or false in any form.
    #[test]
    fn every_known_field_is_one() {
        for field in RULE.iter().filter(|field| !["type", "_rev", "block", "debounce"].contains(field)) {
            let mut doc = json!({"_id": "r", "db_name": "a", "url": "http://h/", "method": "POST"});
            doc[*field] = json!([[]]);
            let faults = Rule::parse(&doc).expect_err(field);
            assert!(faults[0].field.starts_with(field), "{field}: {faults:?}");
        }
        for (field, members) in [("retry", &RETRY[..]), ("batch", &BATCH[..])] {
            for member in members {
                let doc = json!({"_id": "r", "db_name": "a", "url": "http://h/", "method": "POST", field: { *member: [[]] }});
                assert_eq!(Rule::parse(&doc).expect_err(member)[0].field, format!("{field}.{member}"));
            }
        }
    }
}
