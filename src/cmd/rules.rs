//! `spiegel rules list` and `spiegel rules test`: what the rules are, and what one of them would send. Nothing is sent.

use super::deliveries::disabled;
use super::documents::each_page_of_documents;
use super::table::{Table, cut, printable};
use super::{Exit, Failure, complain, couch, run, say};
use crate::config::Settings;
use crate::couch::{Rev, Row, Seq};
use crate::deliveries::operate::Desk;
use crate::deliveries::parked::Disabled;
use crate::deliveries::select::Filter;
use crate::rules::document::Document;
use crate::rules::fields::near_misses;
use crate::rules::handling::{Handling, HeaderSource, Order};
use crate::rules::invalid::summary;
use crate::rules::rule::Rule;
use crate::rules::template::render;
use crate::vault::{Vault, redact_text};
use crate::webhook::request::{self, WebhookRequest, webhook_id};
use clap::Subcommand;
use clap::builder::NonEmptyStringValueParser;
use serde_json::Value;
use serde_json::value::RawValue;
use std::io::Read;
use std::path::{Path, PathBuf};

#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum RulesCommand {
    /// List the rules of the spiegel database, those that cannot be used too
    List,
    /// Show what a rule would send for a document; nothing is sent
    Test(TestOptions),
    /// Enable a rule again whose receiver answered 410: what it missed is delivered then
    Enable {
        /// The rule's _id
        #[arg(value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
        id: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct TestOptions {
    /// The rule, a JSON file; - for standard input
    #[arg(value_name = "FILE")]
    rule: PathBuf,
    /// The changed document, a JSON file; - for standard input
    #[arg(long, value_name = "FILE")]
    doc: PathBuf,
    /// The name of the document's database [default: any that matches]
    #[arg(long, value_name = "NAME")]
    db: Option<String>,
    /// The document was deleted
    #[arg(long)]
    deleted: bool,
}

/// What stands for a database's start time in ids, and for a name where none was given.
const PLACEHOLDER: &str = "0";
const ANY_DB: &str = "db";
const STDIN: &str = "-";

// -- test

/// Needs neither settings nor a CouchDB.
pub(super) fn test(options: &TestOptions) -> Exit {
    if [&options.rule, &options.doc].iter().all(|path| **path == Path::new(STDIN)) {
        return complain(Exit::Usage, "only one of the two files can be standard input");
    }
    let rule = match read(&options.rule).and_then(|text| rule_of(&text)) {
        Ok((rule, warnings)) => {
            for warning in warnings {
                complain(Exit::Done, &format!("{}: {warning}", options.rule.display()));
            }
            rule
        }
        Err(faults) => return refuse(&options.rule, &faults),
    };
    let row = match read(&options.doc).and_then(|text| row_of(&text, options.deleted)) {
        Ok(row) => row,
        Err(faults) => return refuse(&options.doc, &faults),
    };
    let doc = Document::of(&row);
    let objections = objections(&rule, options.db.as_deref(), &doc);
    if !objections.is_empty() {
        say(&format!("rule {:?} sends nothing for this document:", rule.id));
        objections.iter().for_each(|objection| say(&format!("  {objection}")));
        return Exit::No;
    }
    let rendered = render(&rule, options.db.as_deref().unwrap_or(ANY_DB), &doc);
    // What the secrets are is not known here, and is not shown: their names are.
    match request::build(rendered, &Handling::default(), &Vault::empty()) {
        Ok(request) => {
            shown(&rule, options.db.as_deref(), &row, &request).iter().for_each(|line| say(line));
            Exit::Done
        }
        Err(error) => refuse(&options.rule, &[error.to_string()]),
    }
}

fn refuse(file: &Path, faults: &[String]) -> Exit {
    for fault in faults {
        complain(Exit::Data, &format!("{}: {}", file.display(), redact_text(fault)));
    }
    Exit::Data
}

fn read(path: &Path) -> Result<String, Vec<String>> {
    let read = match path == Path::new(STDIN) {
        true => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).map(|_| text)
        }
        false => std::fs::read_to_string(path),
    };
    read.map_err(|error| vec![error.to_string()])
}

/// A rule that is not in CouchDB yet needs no `_id`.
fn rule_of(text: &str) -> Result<(Rule, Vec<String>), Vec<String>> {
    let mut doc: Value = serde_json::from_str(text).map_err(|error| vec![format!("is not JSON: {error}")])?;
    if let Value::Object(fields) = &mut doc {
        fields.entry("_id").or_insert_with(|| Value::from("rule"));
        match fields.get("type") {
            Some(Value::String(kind)) if kind == "on_change" => {}
            _ => return Err(vec![String::from(r#"type must be "on_change""#)]),
        }
    }
    let warnings = near_misses(&doc);
    match Rule::parse(&doc) {
        Ok(rule) => Ok((rule, warnings)),
        Err(faults) => Err(faults.iter().map(ToString::to_string).chain(warnings).collect()),
    }
}

/// The row of `_changes` that such a document would come in.
fn row_of(text: &str, deleted: bool) -> Result<Row, Vec<String>> {
    let fault = |reason: String| vec![reason];
    let Ok(Value::Object(mut fields)) = serde_json::from_str::<Value>(text) else {
        return Err(fault(String::from("is not a document: a JSON object")));
    };
    let deleted = deleted || fields.get("_deleted") == Some(&Value::Bool(true));
    let before = fields.len();
    fields.entry("_id").or_insert_with(|| Value::from("doc"));
    fields.entry("_rev").or_insert_with(|| Value::from("1-0"));
    if deleted {
        fields.insert(String::from("_deleted"), Value::Bool(true));
    }
    let text_of = |name: &str| match fields.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        _ => Err(fault(format!("{name} must be a string"))),
    };
    let (id, rev) = (text_of("_id")?, text_of("_rev")?);
    // As it was written, where it was complete.
    let text = if fields.len() == before { text.trim().to_string() } else { Value::Object(fields).to_string() };
    let doc = RawValue::from_string(text).map_err(|error| fault(error.to_string()))?;
    Ok(Row { seq: Seq::Text("1-seq".into()), id, changes: vec![Rev { rev }], deleted, doc: Some(doc.into()) })
}

fn objections(rule: &Rule, db: Option<&str>, doc: &Document<'_>) -> Vec<String> {
    let of_name = db.filter(|db| !rule.matches_name(db));
    let of_name = of_name.map(|db| format!("db_name: {} does not match {db:?}", rule.pattern.source()));
    of_name.into_iter().chain(rule.objections(doc)).collect()
}

fn shown(rule: &Rule, db: Option<&str>, row: &Row, request: &WebhookRequest) -> Vec<String> {
    let mut lines = vec![format!("{} {}", request.method, request.url)];
    let mut header = |name: &str, value: &str| lines.push(format!("{name}: {value}"));
    if let Some(credentials) = &request.credentials {
        header("authorization", &format!("[password of {:?}]", credentials.user));
    }
    if request.body.is_some() {
        let content_type = rule.handling.content_type.as_ref().and_then(|value| value.to_str().ok());
        header("content-type", content_type.unwrap_or("application/json"));
    }
    for (name, source) in &rule.handling.headers {
        match source {
            HeaderSource::Text(value) => header(name.as_str(), value.to_str().unwrap_or_default()),
            HeaderSource::Secret(secret) => header(name.as_str(), &format!("[secret {secret}]")),
        }
    }
    header("webhook-id", &webhook_id(&rule.id, db.unwrap_or(ANY_DB), PLACEHOLDER, &row.id, row.rev()));
    header("webhook-timestamp", "[seconds since 1970]");
    if let Some(secret) = &rule.handling.secret {
        header("webhook-signature", &format!("[signed with secret {secret}]"));
    }
    if let Some(body) = &request.body {
        lines.push(String::new());
        let pretty = serde_json::from_slice::<Value>(body).and_then(|body| serde_json::to_string_pretty(&body));
        lines.push(pretty.unwrap_or_else(|_| String::from_utf8_lossy(body).into_owned()));
    }
    lines.push(String::new());
    lines.extend(remarks(rule, db));
    lines
}

/// What one request does not show.
fn remarks(rule: &Rule, db: Option<&str>) -> Vec<String> {
    let mut remarks = Vec::new();
    if db.is_none() {
        remarks.push(format!("the database's name was not tested, {ANY_DB:?} stands for it (--db NAME)"));
    }
    remarks.push(String::from("webhook-id is another one in your database: its start time is part of it"));
    if let Some(batch) = rule.handling.batch {
        let within = humantime::format_duration(batch.within);
        remarks.push(format!("up to {} changes are sent together in an array, within {within}; this is one of them", batch.max));
    }
    if rule.block || rule.handling.order == Order::Database {
        remarks.push(String::from("the next change of the database waits until this has succeeded"));
    }
    remarks.iter().map(|remark| format!("({remark})")).collect()
}

// -- list

pub(super) async fn list(settings: &Settings) -> Result<Exit, Failure> {
    let couch = couch(settings)?;
    let db = settings.db_name.as_str();
    let failed = |error| Failure::of_couch(&couch, "read the spiegel database", &error);
    if !couch.db_exists(db).await.map_err(failed)? {
        return Err(Failure::new(Exit::Config, run::missing_database(db, couch.address())));
    }
    let disabled = disabled(&Desk::new(couch.clone(), db), &Filter::default()).await.map_err(failed)?;
    let disabled: Vec<Disabled> = disabled.iter().filter_map(Disabled::read).collect();
    let mut rows = Vec::new();
    let listed = each_page_of_documents(&couch, db, |docs| {
        rows.extend(docs.iter().filter(|doc| doc["type"] == "on_change").map(|doc| list_row(doc, &disabled)));
    });
    listed.await.map_err(failed)?;
    match rows.is_empty() {
        true => say("no rules yet; see the README for a first one"),
        false => Table::new(["rule", "db_name", "method", "url", "state"]).lines(&rows).iter().for_each(|line| say(line)),
    }
    Ok(Exit::Done)
}

/// An edit ends what disabled a rule.
fn list_row(doc: &Value, disabled: &[Disabled]) -> [String; 5] {
    let is_disabled = disabled.iter().any(|disabled| doc["_id"] == disabled.rule && doc["_rev"] == disabled.rule_rev);
    let as_written = |name: &str| match &doc[name] {
        Value::Null => String::from("–"),
        Value::String(text) => redact_text(text),
        other => other.to_string(),
    };
    let (method, state) = match Rule::parse(doc) {
        Ok(rule) if is_disabled => (rule.method.to_string(), String::from("disabled: its receiver answered 410")),
        Ok(rule) => (rule.method.to_string(), String::from("valid")),
        Err(faults) => (as_written("method"), format!("invalid: {}", redact_text(&summary(&faults)))),
    };
    let [id, db_name, method, url] =
        [as_written("_id"), as_written("db_name"), method, as_written("url")].map(|text| cut(&printable(&text)));
    [id, db_name, method, url, printable(&state)]
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use serde_json::json;

    fn lines(rule: Value, doc: &str, db: Option<&str>) -> Vec<String> {
        let (rule, warnings) = rule_of(&rule.to_string()).expect("a rule");
        assert!(warnings.is_empty(), "{warnings:?}");
        let row = row_of(doc, false).expect("a document");
        let doc = Document::of(&row);
        let objections = objections(&rule, db, &doc);
        if !objections.is_empty() {
            return objections;
        }
        let request =
            request::build(render(&rule, db.unwrap_or(ANY_DB), &doc), &Handling::default(), &Vault::empty()).expect("a request");
        shown(&rule, db, &row, &request)
    }

    #[test]
    fn a_request_is_shown_as_it_would_be_sent() {
        let rule = json!({
            "_id": "r", "type": "on_change", "db_name": "^posts$", "url": "http://me:s3cret@h/x/${change.id}", "method": "PUT",
            "params": {"title": "$change.doc.title:-untitled", "db": "$db_name", "n": "$change.doc.n"}, "secret": "orders",
            "headers": {"X-Tenant": "acme", "X-Key": {"secret": "key"}}, "content_type": "application/x+json",
        });
        let expected = [
            "PUT http://h/x/a%2Fb",
            "authorization: [password of \"me\"]",
            "content-type: application/x+json",
            "x-tenant: acme",
            "x-key: [secret key]",
            &format!("webhook-id: {}", webhook_id("r", "posts", PLACEHOLDER, "a/b", "2-x")),
            "webhook-timestamp: [seconds since 1970]",
            "webhook-signature: [signed with secret orders]",
            "",
            "{\n  \"title\": \"untitled\",\n  \"db\": \"posts\",\n  \"n\": 7\n}",
            "",
            "(webhook-id is another one in your database: its start time is part of it)",
        ];
        assert_eq!(lines(rule, r#"{"_id": "a/b", "_rev": "2-x", "n": 7}"#, Some("posts")), expected);
    }

    #[test]
    fn a_query_has_no_body() {
        let rule = json!({"type": "on_change", "db_name": "x", "url": "http://h/", "params": {"id": "$change.id"}});
        let lines = lines(rule, "{}", None);
        assert_eq!(lines[0], "GET http://h/?id=doc");
        assert!(lines[1].starts_with("webhook-id: ") && lines.iter().any(|line| line.contains("--db NAME")), "{lines:?}");
    }

    #[test]
    fn what_does_not_match_is_said() {
        let rule = json!({
            "type": "on_change", "db_name": "^posts$", "url": "http://h/", "if": {"type": "post", "gone": null, "a.b": "x"},
            "selector": {"n": 1}, "deleted": true,
        });
        let expected = [
            "db_name: ^posts$ does not match \"pages\"",
            "deleted: this is no deletion",
            "if.type: does not match",
            "if.gone: is neither null nor missing",
            "if.a.b: is missing",
            "selector: does not match",
        ];
        assert_eq!(lines(rule, r#"{"type": "page", "gone": 1}"#, Some("pages")), expected);
    }

    #[test]
    fn a_document_is_completed_and_otherwise_left_as_it_is() {
        let row = row_of(r#" {"n": 12345678901234567890.10, "_id": "x", "_rev": "1-a"} "#, false).unwrap();
        assert_eq!(row.doc.unwrap().get(), r#"{"n": 12345678901234567890.10, "_id": "x", "_rev": "1-a"}"#);
        let row = row_of(r#"{"n": 1}"#, true).unwrap();
        assert_eq!(row.doc.unwrap().get(), r#"{"n":1,"_id":"doc","_rev":"1-0","_deleted":true}"#);
        assert!(row.deleted && row_of(r#"{"_deleted": true}"#, false).unwrap().deleted);
        for bad in ["", "[]", "5", "{", r#"{"_id": 5}"#] {
            assert!(row_of(bad, false).is_err(), "{bad}");
        }
    }

    #[test]
    fn all_that_is_wrong_with_a_rule_is_said() {
        let faults = rule_of(r#"{"type": "on_change", "url": "x", "metod": "PUT", "batch": 1}"#).expect_err("no rule");
        for expected in ["db_name is missing", "url is not a URL", "batch must be", r#""metod" means nothing"#] {
            assert!(faults.iter().any(|fault| fault.contains(expected)), "{expected}: {faults:?}");
        }
        assert!(rule_of("{").is_err() && rule_of("[]").is_err());
        assert!(rule_of(r#"{"db_name": "a", "url": "http://h/"}"#).expect_err("no type")[0].contains("on_change"));
    }

    #[test]
    fn a_listed_rule_is_one_line_without_its_password() {
        let mut doc = json!({"_id": "a\nb", "_rev": "1-x", "type": "on_change", "db_name": "^a$", "url": "http://u:s3cret@h/",
            "method": "put"});
        let valid = list_row(&doc, &[]);
        assert_eq!(valid, ["a b", "^a$", "PUT", &redact_text("http://u:s3cret@h/"), "valid"]);
        assert!(!valid[3].contains("s3cret"));
        let disabled = [Disabled { doc_rev: "1-d".into(), rule: "a\nb".into(), rule_rev: "1-x".into() }];
        assert_eq!(list_row(&doc, &disabled)[4], "disabled: its receiver answered 410");
        doc["_rev"] = json!("2-y");
        assert_eq!(list_row(&doc, &disabled)[4], "valid", "it was edited");
        let invalid = list_row(&json!({"_id": "b", "type": "on_change", "db_name": 5, "url": "x".repeat(100)}), &[]);
        assert_eq!((invalid[1].as_str(), invalid[2].as_str(), invalid[3].chars().count()), ("5", "–", 60));
        assert!(invalid[4].starts_with("invalid: db_name must be a pattern"), "{}", invalid[4]);
    }
}
