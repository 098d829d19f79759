//! The replicators of `/status`, for people: how many there are of each state in a line, and the list as a table.

use super::inline;
use crate::cmd::table::{Table, cut};
use serde_json::Value;

const SETTLED: &str = "completed";

/// Takes the list out of the page, and leaves the counts as a line.
pub(super) fn take_table(status: &mut Value, all: bool) -> Vec<String> {
    let Some(replicators) = status.get_mut("replicators").and_then(Value::as_object_mut) else { return Vec::new() };
    let docs = replicators.remove("docs").unwrap_or_default();
    let is_shown = |state: &str| all || state != SETTLED;
    let mut shown = 0;
    if let Some(states) = replicators.get_mut("states").filter(|states| states.is_object()) {
        let counts =
            states.as_object().into_iter().flatten().filter_map(|(state, count)| Some((state.as_str(), count.as_u64()?)));
        shown = counts.clone().filter(|(state, _)| is_shown(state)).map(|(_, count)| count).sum();
        let counts: Vec<String> =
            counts.filter(|(_, count)| *count > 0).map(|(state, count)| format!("{count} {state}")).collect();
        *states = Value::from(match counts.is_empty() {
            true => String::from("none"),
            false => counts.join(", "),
        });
    }
    let docs = docs.as_array().into_iter().flatten().filter(|doc| is_shown(doc["state"].as_str().unwrap_or_default()));
    let rows: Vec<[String; 5]> = docs.map(row).collect();
    if rows.is_empty() {
        return Vec::new();
    }
    let more = shown.saturating_sub(rows.len() as u64);
    let mut lines = Table::new(["replicator", "state", "source", "target", ""]).lines(&rows);
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    lines
}

fn row(doc: &Value) -> [String; 5] {
    let cell = |name: &str| cut(&inline(&doc[name]).unwrap_or_default());
    [cell("doc_id"), cell("state"), cell("source"), cell("target"), tale(doc)]
}

/// What a person wants to know next.
fn tale(doc: &Value) -> String {
    let info = &doc["info"];
    let count = |name: &str, what: &str| info[name].as_u64().map(|count| format!("{count} {what}"));
    let refused = count("doc_write_failures", "refused").filter(|_| info["doc_write_failures"] != 0);
    let error = inline(&info["error"]).filter(|_| info["error"].is_string());
    let failures = doc["error_count"].as_u64().filter(|failures| *failures > 0);
    let next_try = doc["next_try"].as_str().map(|at| format!("next try {at}"));
    let parts = match doc["state"].as_str() {
        Some("crashing") => [failures.map(|failures| format!("{failures} failures")), next_try, error],
        Some("failed") => [error, None, None],
        Some("running") => [count("docs_written", "written"), refused, count("changes_pending", "to go")],
        Some(SETTLED) => [count("docs_written", "written"), refused, count("duration_ms", "ms")],
        _ => [next_try, None, None],
    };
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    parts.join(", ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use serde_json::json;

    fn page() -> Value {
        json!({
            "replicators": {
                "states": { "crashing": 1, "failed": 1, "running": 2, "pending": 0, "completed": 3 },
                "docs": [
                    { "doc_id": "broken\n", "state": "crashing", "source": "http://h/a", "target": "b", "error_count": 2,
                      "next_try": "2026-01-31T12:00:00.000Z", "info": { "error": "target is missing" } },
                    { "doc_id": "odd", "state": "failed", "source": null, "target": null, "error_count": 0,
                      "next_try": null, "info": { "error": "source is missing" } },
                    { "doc_id": "long", "state": "running", "source": "a", "target": "b", "error_count": 0, "next_try": null,
                      "info": { "docs_written": 7, "doc_write_failures": 1, "changes_pending": 9 } },
                    { "doc_id": "well", "state": "completed", "source": "a", "target": "b", "error_count": 0, "next_try": null,
                      "info": { "docs_written": 7, "doc_write_failures": 0, "duration_ms": 12 } },
                    { "doc_id": "idle", "state": "completed", "source": "a", "target": "b", "error_count": 0, "next_try": null,
                      "info": {} },
                ],
            },
        })
    }

    #[test]
    fn only_what_is_not_settled_is_listed() {
        let mut status = page();
        let lines = take_table(&mut status, false);
        let expected = [
            "replicator  state     source      target",
            "broken      crashing  http://h/a  b       2 failures, next try 2026-01-31T12:00:00.000Z, target is missing",
            "odd         failed    –           –       source is missing",
            "long        running   a           b       7 written, 1 refused, 9 to go",
            "and 1 more",
        ];
        assert_eq!(lines, expected);
        let counts: Vec<&str> = status["replicators"]["states"].as_str().expect("a line").split(", ").collect();
        assert_eq!(counts.len(), 4, "{counts:?}");
        assert!(counts.contains(&"3 completed"));
        assert_eq!(status["replicators"]["docs"], Value::Null);
    }

    #[test]
    fn all_are_listed_where_asked_for() {
        let lines = take_table(&mut page(), true);
        assert_eq!(lines[4], "well        completed  a           b       7 written, 12 ms");
        assert_eq!(lines[5..], ["idle        completed  a           b", "and 2 more"]);
    }

    #[test]
    fn a_page_without_a_list_has_no_table() {
        for mut status in [json!({}), json!({ "replicators": { "docs": null, "states": null } }), json!({ "replicators": 7 })] {
            assert!(take_table(&mut status, true).is_empty());
        }
    }
}
