//! `spiegel status`: what the running process says of itself; without one, what the spiegel database tells.

mod replicators;

use super::documents::Census;
use super::healthcheck::ask;
use super::table::printable;
use super::{Exit, Failure, couch, run, say};
use crate::config::Settings;
use crate::deliveries::operate::Desk;
use serde_json::Value;

/// Counted one by one; a person who waits for more than this can ask the running process.
const DELIVERIES_MAX: usize = 20_000;

pub(super) async fn command(settings: &Settings, all: bool) -> Result<Exit, Failure> {
    match running_process(settings).await {
        Ok(mut status) => {
            let table = replicators::take_table(&mut status, all);
            readable(&status).iter().for_each(|line| say(line));
            if !table.is_empty() {
                say("");
                table.iter().for_each(|line| say(line));
            }
            Ok(Exit::Done)
        }
        Err(why) => {
            say(&why);
            from_the_database(settings).await
        }
    }
}

async fn running_process(settings: &Settings) -> Result<Value, String> {
    let listen = settings.admin_listen.ok_or("admin.listen is off, so a running process cannot be asked")?;
    match ask(listen, "/status").await? {
        (200, status) => Ok(status),
        (code, answer) => {
            let reason = answer["error"].as_str().unwrap_or("no reason given");
            Err(format!("the process on {listen} answered {code}: {reason}"))
        }
    }
}

async fn from_the_database(settings: &Settings) -> Result<Exit, Failure> {
    let couch = couch(settings)?;
    let db = settings.db_name.as_str();
    let failed = |error| Failure::of_couch(&couch, "read the spiegel database", &error);
    if !couch.db_exists(db).await.map_err(failed)? {
        return Err(Failure::new(Exit::Config, run::missing_database(db, couch.address())));
    }
    let census = Census::of(&couch, db).await.map_err(failed)?;
    let (counts, is_complete) = Desk::new(couch.clone(), db).count(DELIVERIES_MAX).await.map_err(failed)?;
    let deliveries = match is_complete {
        true => counts.line(),
        false => format!("{}, and more", counts.line()),
    };
    say(&format!("the database \"{db}\" on {} tells:", couch.address()));
    let position = match &census.watermark {
        Some(Value::String(seq)) => short(seq),
        Some(other) => other.to_string(),
        None => String::from("none yet"),
    };
    let lines = [
        ("position", position),
        ("rules", census.rules.len().to_string()),
        ("replicators", format!("{}, dirty {}", census.replicators.len(), census.dirty_replicators)),
        ("change_listeners", format!("{}, dirty {}", census.change_listeners, census.dirty_change_listeners)),
        ("invalid", census.invalid.len().to_string()),
        ("deliveries", deliveries),
    ];
    for (name, value) in lines {
        say(&format!("  {name:<17} {value}"));
    }
    for rule in counts.disabled() {
        say(&format!("  disabled          {}; `spiegel rules enable ID` or an edit ends it", printable(rule)));
    }
    if !census.invalid.is_empty() {
        say("`spiegel check` says what is wrong with the invalid ones");
    }
    Ok(Exit::Done)
}

/// A seq's start, which is what people compare; the rest is the server's.
fn short(seq: &str) -> String {
    let start: String = seq.chars().take(24).collect();
    if start.len() < seq.len() { format!("{start}…") } else { start }
}

/// JSON as indented lines, names aligned within an object.
fn readable(value: &Value) -> Vec<String> {
    let mut lines = Vec::new();
    add_readable(value, 0, &mut lines);
    lines
}

fn add_readable(value: &Value, depth: usize, lines: &mut Vec<String>) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(fields) => {
            let width = fields.iter().filter(|(_, value)| inline(value).is_some()).map(|(name, _)| name.chars().count()).max();
            for (name, value) in fields {
                match inline(value) {
                    Some(text) => lines.push(format!("{indent}{name:<width$}  {text}", width = width.unwrap_or(0))),
                    None => {
                        lines.push(format!("{indent}{name}:"));
                        add_readable(value, depth + 1, lines);
                    }
                }
            }
        }
        Value::Array(items) => {
            for item in items {
                match inline(item) {
                    Some(text) => lines.push(format!("{indent}- {text}")),
                    None => {
                        lines.push(format!("{indent}-"));
                        add_readable(item, depth + 1, lines);
                    }
                }
            }
        }
        scalar => lines.push(format!("{indent}{}", inline(scalar).unwrap_or_default())),
    }
}

/// What fits behind its name on one line. A text cannot leave its line, whatever it holds.
fn inline(value: &Value) -> Option<String> {
    match value {
        Value::Null => Some(String::from("–")),
        Value::Bool(true) => Some(String::from("yes")),
        Value::Bool(false) => Some(String::from("no")),
        Value::Number(number) => Some(number.to_string()),
        Value::String(text) => Some(printable(text)),
        Value::Array(items) if items.is_empty() => Some(String::from("none")),
        Value::Object(fields) if fields.is_empty() => Some(String::from("none")),
        Value::Array(items) if items.iter().all(|item| item.is_number()) => {
            Some(items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "))
        }
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn status_reads_as_indented_lines() {
        // In alphabetical order, which is the order of the lines whether or not the parser keeps the writer's.
        let status = json!({
            "busy": [{ "db": "a\nb", "queued": 1 }, "x"],
            "couchdb": { "address": "http://h", "up": true },
            "none": [],
            "rules": 3,
            "seqs": [1, 2],
            "since": null
        });
        let expected = [
            "busy:",
            "  -",
            "    db      a b",
            "    queued  1",
            "  - x",
            "couchdb:",
            "  address  http://h",
            "  up       yes",
            "none   none",
            "rules  3",
            "seqs   1, 2",
            "since  –",
        ];
        assert_eq!(readable(&status), expected);
    }
}
