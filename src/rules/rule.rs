//! One `on_change` document.

use super::document::Document;
use super::handling::Handling;
use super::handling::fields::{self, Beside};
use super::invalid::{Faults, Invalid, given, kind_of, wrong_kind};
use super::pattern::Pattern;
use super::selector::Selector;
use super::template::{ParamsTemplate, UrlTemplate};
use crate::couch::Row;
use crate::vault::redact_text;
use reqwest::Method;
use serde_json::{Map, Number, Value};
use std::fmt;
use std::sync::Arc;
use url::Url;

/// A rule that was read without fault. Its `Debug` shows neither params nor a password.
#[derive(Clone)]
pub struct Rule {
    pub id: Arc<str>,
    pub rev: String,
    pub pattern: Pattern,
    /// As the user wrote it; `${…}` in it.
    pub url: String,
    pub params: Map<String, Value>,
    pub method: Method,
    /// The database waits for this delivery before it goes on. Unset is false, as the original's code has it.
    pub block: bool,
    pub debounce: bool,
    pub since: Option<SinceOverride>,
    /// `if`.
    pub condition: Vec<Test>,
    pub selector: Option<Selector>,
    pub deleted: DeletedFilter,
    pub design_docs: bool,
    pub handling: Handling,
    /// `host:port` of its requests, where it is always the same.
    pub lane: Option<String>,
    pub(super) url_template: UrlTemplate,
    pub(super) params_template: ParamsTemplate,
}

/// Where a rule begins on a database, whatever the others are at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SinceOverride {
    Zero,
    Now,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeletedFilter {
    #[default]
    Any,
    Only,
    Never,
}

/// One attribute of `if`.
#[derive(Debug, Clone)]
pub struct Test {
    attribute: String,
    /// None: null or missing.
    pattern: Option<Pattern>,
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rule")
            .field("id", &self.id)
            .field("rev", &self.rev)
            .field("db_name", &self.pattern.source())
            .field("method", &self.method)
            .field("url", &redact_text(&self.url))
            .finish_non_exhaustive()
    }
}

impl Rule {
    /// Everything that is wrong is said at once.
    pub fn parse(doc: &Value) -> Result<Self, Vec<Invalid>> {
        let Value::Object(fields) = doc else {
            return Err(vec![Invalid::new("the document", format!("must be an object, not {}", kind_of(doc)))]);
        };
        let mut faults = Faults::default();
        let id = faults.note(id(fields));
        let pattern = faults.note(pattern(fields));
        let url = faults.note(url(fields));
        let params = faults.note(params(fields));
        let method = faults.note(method(fields));
        let since = faults.note(since(fields));
        let condition = faults.note(condition(fields));
        let selector = faults.note(given(fields, "selector").map(Selector::parse).transpose());
        let deleted = faults.note(deleted(fields));
        let design_docs = faults.note(design_docs(fields));
        let block = fields.get("block").is_some_and(is_truthy);
        let debounce = fields.get("debounce").is_some_and(is_truthy);
        let beside = Beside {
            method: method.as_ref(),
            has_user: url.as_ref().is_some_and(|(_, template)| template.has_user()),
            is_of_one_change: url.as_ref().is_some_and(|(_, template)| template.is_of_one_change()),
            block,
            debounce,
        };
        let handling = fields::read(fields, beside, &mut faults);
        if !faults.0.is_empty() {
            return Err(faults.0);
        }
        match (id, pattern, url, params, method, since, condition, selector, deleted, design_docs) {
            (
                Some(id),
                Some(pattern),
                Some((url, url_template)),
                Some(params),
                Some(method),
                Some(since),
                Some(condition),
                Some(selector),
                Some(deleted),
                Some(design_docs),
            ) => Ok(Self {
                id,
                rev: fields.get("_rev").and_then(Value::as_str).unwrap_or_default().to_string(),
                pattern,
                url,
                params_template: ParamsTemplate::parse(&params),
                lane: url_template.lane(),
                url_template,
                params,
                method,
                block,
                debounce,
                since,
                condition,
                selector,
                deleted,
                design_docs,
                handling,
            }),
            _ => Err(faults.0),
        }
    }

    /// True where a page of changes must carry the documents.
    pub fn needs_doc(&self) -> bool {
        !self.condition.is_empty() || self.selector.is_some() || self.params_template.needs_doc() || self.url_template.needs_doc()
    }

    /// True where each row must carry its own seq: no `seq_interval` for its page.
    pub fn needs_seq(&self) -> bool {
        self.params_template.needs_seq() || self.url_template.needs_seq()
    }

    pub fn matches_name(&self, db: &str) -> bool {
        self.pattern.may_match(db)
    }

    /// True where the change is this rule's business. A row without a document, a deletion for example, is tested by its id and
    /// revision.
    pub fn matches(&self, doc: &Document<'_>) -> bool {
        self.takes_deletion(doc.row())
            && (self.design_docs || !is_design_doc(doc.row()))
            && self.condition.iter().all(|test| test.holds(doc))
            && self.selector.as_ref().is_none_or(|selector| selector.matches(doc))
    }

    /// What [matches](Self::matches) asks and no [index](super::matching) can.
    pub(super) fn matches_beyond_index(&self, doc: &Document<'_>) -> bool {
        self.takes_deletion(doc.row())
            && (self.design_docs || !is_design_doc(doc.row()))
            && self.condition.iter().filter(|test| !test.is_indexed()).all(|test| test.holds(doc))
            && self.selector.as_ref().is_none_or(|selector| selector.matches(doc))
    }

    fn takes_deletion(&self, row: &Row) -> bool {
        match self.deleted {
            DeletedFilter::Any => true,
            DeletedFilter::Only => row.deleted,
            DeletedFilter::Never => !row.deleted,
        }
    }

    /// Why a change is not this rule's business, for a person; empty where it is.
    pub fn objections(&self, doc: &Document<'_>) -> Vec<String> {
        let mut objections = Vec::new();
        if !self.takes_deletion(doc.row()) {
            let what = if doc.row().deleted { "this is a deletion" } else { "this is no deletion" };
            objections.push(format!("deleted: {what}"));
        }
        if !self.design_docs && is_design_doc(doc.row()) {
            objections.push(String::from("design_docs: this is one"));
        }
        objections.extend(self.condition.iter().filter(|test| !test.holds(doc)).map(|test| test.objection(doc)));
        if self.selector.as_ref().is_some_and(|selector| !selector.matches(doc)) {
            objections.push(String::from("selector: does not match"));
        }
        objections
    }
}

fn is_design_doc(row: &Row) -> bool {
    row.id.starts_with("_design/")
}

fn id(fields: &Map<String, Value>) -> Result<Arc<str>, Invalid> {
    match given(fields, "_id") {
        Some(Value::String(id)) if !id.is_empty() => Ok(Arc::from(id.as_str())),
        Some(Value::String(_)) => Err(Invalid::new("_id", "is empty")),
        Some(other) => wrong_kind("_id", "a string", other),
        None => Err(Invalid::new("_id", "is missing")),
    }
}

/// For which databases a document is that cannot be used, where that at least can be told.
pub fn pattern_of(doc: &Value) -> Option<Pattern> {
    pattern(doc.as_object()?).ok()
}

/// The original made `/undefined/` of a missing pattern: certainly not what anybody meant.
fn pattern(fields: &Map<String, Value>) -> Result<Pattern, Invalid> {
    match given(fields, "db_name") {
        Some(Value::String(source)) => Pattern::compile(source).map_err(|error| Invalid::new("db_name", error.to_string())),
        Some(other) => wrong_kind("db_name", "a pattern in a string", other),
        None => Err(Invalid::new("db_name", "is missing")),
    }
}

fn url(fields: &Map<String, Value>) -> Result<(String, UrlTemplate), Invalid> {
    let url = match given(fields, "url") {
        Some(Value::String(url)) => url,
        Some(other) => return wrong_kind("url", "a string", other),
        None => return Err(Invalid::new("url", "is missing")),
    };
    let template = UrlTemplate::parse(url);
    let sample = Url::parse(&template.sample()).map_err(|error| Invalid::new("url", format!("is not a URL: {error}")))?;
    match (sample.scheme(), template.objection()) {
        ("http" | "https", None) => Ok((url.clone(), template)),
        ("http" | "https", Some(objection)) => Err(Invalid::new("url", objection)),
        (scheme, _) => Err(Invalid::new("url", format!("must be http or https, not {scheme}"))),
    }
}

fn params(fields: &Map<String, Value>) -> Result<Map<String, Value>, Invalid> {
    match given(fields, "params") {
        None => Ok(Map::new()),
        Some(Value::Object(params)) => Ok(params.clone()),
        Some(other) => wrong_kind("params", "an object", other),
    }
}

fn method(fields: &Map<String, Value>) -> Result<Method, Invalid> {
    match given(fields, "method") {
        None => Ok(Method::GET),
        Some(falsy) if !is_truthy(falsy) => Ok(Method::GET),
        Some(Value::String(method)) => Method::from_bytes(method.to_ascii_uppercase().as_bytes())
            .map_err(|_| Invalid::new("method", "is not an HTTP method")),
        Some(other) => wrong_kind("method", "a string", other),
    }
}

/// As the original has it: these carry the params as a query, the others as a JSON body.
pub fn sends_query(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::DELETE)
}

fn since(fields: &Map<String, Value>) -> Result<Option<SinceOverride>, Invalid> {
    match given(fields, "since") {
        None => Ok(None),
        Some(Value::String(since)) if since == "0" => Ok(Some(SinceOverride::Zero)),
        Some(Value::String(since)) if since == "now" => Ok(Some(SinceOverride::Now)),
        Some(Value::Number(since)) if since.as_u64() == Some(0) => Ok(Some(SinceOverride::Zero)),
        Some(_) => Err(Invalid::new("since", r#"must be "0" or "now""#)),
    }
}

fn condition(fields: &Map<String, Value>) -> Result<Vec<Test>, Invalid> {
    let tests = match given(fields, "if") {
        None => return Ok(Vec::new()),
        Some(Value::Object(tests)) => tests,
        Some(other) => return wrong_kind("if", "an object", other),
    };
    tests.iter().map(|(attribute, pattern)| test(attribute, pattern)).collect()
}

fn test(attribute: &str, pattern: &Value) -> Result<Test, Invalid> {
    let field = || format!("if.{attribute}");
    let pattern = match pattern {
        Value::Null => None,
        Value::String(source) => Some(Pattern::compile(source).map_err(|error| Invalid::new(field(), error.to_string()))?),
        other => return wrong_kind(&field(), "a pattern in a string, or null", other),
    };
    Ok(Test { attribute: attribute.to_string(), pattern })
}

fn deleted(fields: &Map<String, Value>) -> Result<DeletedFilter, Invalid> {
    match given(fields, "deleted") {
        None => Ok(DeletedFilter::Any),
        Some(Value::Bool(true)) => Ok(DeletedFilter::Only),
        Some(Value::Bool(false)) => Ok(DeletedFilter::Never),
        Some(Value::String(word)) if word == "any" => Ok(DeletedFilter::Any),
        Some(_) => Err(Invalid::new("deleted", r#"must be "any", true or false"#)),
    }
}

fn design_docs(fields: &Map<String, Value>) -> Result<bool, Invalid> {
    match given(fields, "design_docs") {
        None => Ok(true),
        Some(Value::Bool(wanted)) => Ok(*wanted),
        Some(other) => wrong_kind("design_docs", "true or false", other),
    }
}

/// JavaScript's idea of true: the original tested these fields by it.
fn is_truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(_) | Value::Object(_) => true,
    }
}

impl Test {
    pub(super) fn attribute(&self) -> &str {
        &self.attribute
    }

    pub(super) fn pattern(&self) -> Option<&Pattern> {
        self.pattern.as_ref()
    }

    /// Whether many of its kind can be tested together.
    pub(super) fn is_indexed(&self) -> bool {
        !self.pattern.as_ref().is_some_and(Pattern::is_backtracking)
    }

    /// A missing or null attribute never meets a pattern; the original tested the word "undefined".
    fn holds(&self, doc: &Document<'_>) -> bool {
        match (&self.pattern, doc.tested_text(&self.attribute)) {
            (None, text) => text.is_none(),
            (Some(_), None) => false,
            (Some(pattern), Some(text)) => pattern.may_match(&text),
        }
    }

    /// Of a test that does not hold.
    fn objection(&self, doc: &Document<'_>) -> String {
        let why = match (&self.pattern, doc.value(&self.attribute)) {
            (_, None) => "is missing",
            (Some(_), Some(Value::Null)) => "is null",
            (Some(_), Some(_)) => "does not match",
            (None, Some(_)) => "is neither null nor missing",
        };
        format!("if.{}: {why}", self.attribute)
    }
}

/// Requests of one lane, `host:port`, share its limits.
pub fn lane(url: &Url) -> Option<String> {
    Some(format!("{}:{}", url.host_str()?, url.port_or_known_default().unwrap_or_default()))
}

/// As JavaScript's `String(value)`.
pub fn js_string(value: &Value) -> String {
    match value {
        Value::Null => String::from("null"),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => js_number(number),
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(js_item).collect::<Vec<_>>().join(","),
        Value::Object(_) => String::from("[object Object]"),
    }
}

/// Within an array null is empty.
fn js_item(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        other => js_string(other),
    }
}

/// JavaScript knows only doubles, and writes an exponent from 1e21 up and below 1e-6.
fn js_number(number: &Number) -> String {
    let Some(value) = number.as_f64() else { return number.to_string() };
    let size = value.abs();
    if value == 0.0 {
        String::from("0")
    } else if (1e-6..1e21).contains(&size) {
        value.to_string()
    } else {
        let text = format!("{value:e}");
        match size < 1.0 {
            true => text,
            false => text.replace('e', "e+"),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::super::invalid::summary;
    use super::super::template::render;
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use serde_json::value::RawValue;

    fn rule(extra: Value) -> Rule {
        let mut doc = json!({"_id": "r", "_rev": "1-r", "type": "on_change", "db_name": "foo", "url": "http://h/"});
        doc.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        Rule::parse(&doc).unwrap_or_else(|e| panic!("{doc}: {}", summary(&e)))
    }

    fn faults(extra: Value) -> String {
        let mut doc = json!({"_id": "r", "db_name": "foo", "url": "http://h/"});
        doc.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        summary(&Rule::parse(&doc).expect_err(&extra.to_string()))
    }

    fn row(value: Value) -> Row {
        serde_json::from_value(value).expect("a row")
    }

    fn matches(rule: &Rule, change: &Row, doc: Value) -> bool {
        let change = Row { doc: Some(RawValue::from_string(doc.to_string()).expect("JSON").into()), ..change.clone() };
        let doc = Document::of(&change);
        let matches = rule.matches(&doc);
        assert_eq!(rule.objections(&doc).is_empty(), matches, "{rule:?}");
        matches
    }

    fn meets(condition: Value, doc: Value) -> bool {
        let change = row(json!({"seq": "1-a", "id": "some-id", "changes": [{"rev": "1-a"}]}));
        matches(&rule(json!({"if": condition})), &change, doc)
    }

    #[test]
    fn the_seeds_rule_is_read() {
        let rule = Rule::parse(&json!({
            "_id": "all_blog_posts_on_change", "_rev": "3-x", "type": "on_change", "db_name": "^all_blog_posts$",
            "url": "http://user@yourapi.com/calc-stats", "params": {"change": "$change"}, "method": "PUT", "debounce": true
        }))
        .expect("a good rule");
        assert_eq!((rule.id.as_ref(), rule.rev.as_str(), rule.method.as_str()), ("all_blog_posts_on_change", "3-x", "PUT"));
        assert!(rule.debounce && !rule.block && rule.needs_doc() && rule.design_docs && rule.since.is_none());
        assert_eq!(rule.deleted, DeletedFilter::Any);
        assert!(rule.matches_name("all_blog_posts") && !rule.matches_name("x_all_blog_posts"));
        let change = row(json!({"seq": 1, "id": "a", "changes": [{"rev": "1-a"}], "doc": {"_id": "a"}}));
        let rendered = render(&rule, "all_blog_posts", &Document::of(&change));
        assert_eq!(
            (rendered.url.as_str(), rendered.params.as_str()),
            ("http://user@yourapi.com/calc-stats", r#"{"change":{"_id":"a"}}"#)
        );
    }

    #[test]
    fn every_wrong_type_has_a_clear_error() {
        for (extra, expected) in [
            (json!({"db_name": null}), "db_name is missing"),
            (json!({"db_name": 5}), "db_name must be a pattern in a string, not a number"),
            (json!({"db_name": "("}), "db_name is not a JavaScript pattern: a group is not closed"),
            (json!({"url": null}), "url is missing"),
            (json!({"url": ["x"]}), "url must be a string, not an array"),
            (json!({"url": "/relative"}), "url is not a URL"),
            (json!({"url": "ftp://h/"}), "url must be http or https, not ftp"),
            (json!({"url": "${db_name}"}), "url is not a URL"),
            (json!({"method": "BAD METHOD"}), "method is not an HTTP method"),
            (json!({"method": {}}), "method must be a string, not an object"),
            (json!({"params": "x"}), "params must be an object, not a string"),
            (json!({"params": []}), "params must be an object, not an array"),
            (json!({"if": "x"}), "if must be an object, not a string"),
            (json!({"if": {"a": 5}}), "if.a must be a pattern in a string, or null, not a number"),
            (json!({"if": {"a": "["}}), "if.a is not a JavaScript pattern"),
            (json!({"since": "5-x"}), "since must be"),
            (json!({"deleted": "yes"}), "deleted must be"),
            (json!({"design_docs": 1}), "design_docs must be true or false, not a number"),
            (json!({"selector": []}), "selector must be an object, not an array"),
            (json!({"selector": {"a": {"$x": 1}}}), "selector $x is no operator"),
            (json!({"_id": 7}), "_id must be a string"),
        ] {
            let said = faults(extra);
            assert!(said.contains(expected), "{said}");
        }
        assert_eq!(faults(json!({"db_name": null, "url": null})), "db_name is missing; url is missing");
        for doc in [json!(null), json!([]), json!("x"), json!(1)] {
            assert!(summary(&Rule::parse(&doc).expect_err("no rule")).contains("must be an object"));
        }
    }

    #[test]
    fn a_fault_in_a_url_never_shows_its_password() {
        for url in ["ftp://u:s3cret@h/", "http://u:s3cret@[h/", "http:// u:s3cret@h:99999999/"] {
            assert!(!faults(json!({"url": url})).contains("s3cret"));
        }
    }

    #[test]
    fn debug_shows_no_password() {
        let rule = rule(json!({"url": "http://u:s3cret@h/${seq}", "params": {"token": "s3cret"}}));
        let change = row(json!({"seq": 1, "id": "a", "changes": []}));
        assert!(!format!("{rule:?} {:?}", render(&rule, "db", &Document::of(&change))).contains("s3cret"));
    }

    #[test]
    fn flags_are_true_as_in_javascript() {
        for (value, expected) in [
            (json!(true), true),
            (json!(false), false),
            (json!(null), false),
            (json!(0), false),
            (json!(-0.0), false),
            (json!(1), true),
            (json!(""), false),
            (json!("false"), true),
            (json!([]), true),
            (json!({}), true),
        ] {
            let rule = rule(json!({"block": value, "debounce": value}));
            assert_eq!((rule.block, rule.debounce), (expected, expected), "{value}");
        }
        assert!(!rule(json!({})).block, "bug 1: unset is false");
    }

    #[test]
    fn the_method_defaults_to_get_and_is_upper_case() {
        for (method, expected) in [(json!(null), "GET"), (json!(""), "GET"), (json!("get"), "GET"), (json!("post"), "POST")] {
            assert_eq!(rule(json!({"method": method})).method.as_str(), expected);
        }
    }

    #[test]
    fn since_is_zero_or_now() {
        for (since, expected) in [
            (json!("0"), Some(SinceOverride::Zero)),
            (json!(0), Some(SinceOverride::Zero)),
            (json!("now"), Some(SinceOverride::Now)),
            (json!(null), None),
        ] {
            assert_eq!(rule(json!({"since": since})).since, expected);
        }
    }

    #[test]
    fn conditions_of_the_original() {
        let doc = || json!({"_id": "some-id", "type": "work", "priority": "high", "nullField": null});
        for (condition, expected) in [
            (json!({"_id": "some-id"}), true),
            (json!({"type": "work", "priority": "medium|high"}), true),
            (json!({"type": "work", "priority": "low"}), false),
            (json!({"missingField": null}), true),
            (json!({"nullField": null}), true),
            (json!({"type": null}), false),
            (json!({}), true),
            (json!(null), true),
        ] {
            assert_eq!(meets(condition.clone(), doc()), expected, "{condition}");
        }
    }

    #[test]
    fn bug_7_a_missing_attribute_meets_no_pattern_and_paths_are_followed() {
        for (condition, doc, expected) in [
            (json!({"a": "undefined"}), json!({}), false),
            (json!({"a": ".*"}), json!({}), false),
            (json!({"a": "null"}), json!({"a": null}), false),
            (json!({"a.b": "^x$"}), json!({"a": {"b": "x"}}), true),
            (json!({"a.b": "^x$"}), json!({"a.b": "y", "a": {"b": "x"}}), false),
            (json!({"a.b": "^y$"}), json!({"a.b": "y", "a": {"b": "x"}}), true),
            (json!({"a.b.c": null}), json!({"a": 5}), true),
            (json!({"a.1": "z"}), json!({"a": ["x", "z"]}), true),
            (json!({"a": "^5$"}), json!({"a": 5}), true),
            (json!({"a": "^5$"}), json!({"a": 5.0}), true),
            (json!({"a": "^true$"}), json!({"a": true}), true),
            (json!({"a": "^x,,1,2$"}), json!({"a": ["x", null, [1, 2]]}), true),
            (json!({"a": "^\\[object Object\\]$"}), json!({"a": {"b": 1}}), true),
            (json!({"a": "^$"}), json!({"a": []}), true),
        ] {
            assert_eq!(meets(condition.clone(), doc.clone()), expected, "{condition} {doc}");
        }
    }

    #[test]
    fn numbers_are_written_as_in_javascript() {
        for (text, expected) in [
            ("0", "0"),
            ("-0", "0"),
            ("1.50", "1.5"),
            ("1e3", "1000"),
            ("1e21", "1e+21"),
            ("123456789012345678901", "123456789012345680000"),
            ("0.000001", "0.000001"),
            ("1.5e-7", "1.5e-7"),
            ("-2.5", "-2.5"),
        ] {
            assert_eq!(js_string(&serde_json::from_str(text).unwrap()), expected);
        }
    }

    #[test]
    fn deletions_and_design_documents_are_filtered_where_asked() {
        let live = row(json!({"seq": 1, "id": "a", "changes": [{"rev": "1-a"}]}));
        let gone = row(json!({"seq": 2, "id": "a", "changes": [{"rev": "2-a"}], "deleted": true}));
        let design = row(json!({"seq": 3, "id": "_design/a", "changes": [{"rev": "1-a"}]}));
        let fits = |rule: &Rule| [&live, &gone, &design].map(|row| rule.matches(&Document::of(row)));
        assert_eq!(fits(&rule(json!({}))), [true, true, true]);
        assert_eq!(fits(&rule(json!({"deleted": "any"}))), [true, true, true]);
        assert_eq!(fits(&rule(json!({"deleted": true}))), [false, true, false]);
        assert_eq!(fits(&rule(json!({"deleted": false}))), [true, false, true]);
        assert_eq!(fits(&rule(json!({"design_docs": false}))), [true, true, false]);
    }

    #[test]
    fn a_row_without_a_document_is_tested_by_id_and_revision() {
        let gone = row(json!({"seq": 2, "id": "a", "changes": [{"rev": "2-x"}], "deleted": true, "doc": null}));
        for (extra, expected) in [
            (json!({"if": {"_id": "^a$", "_rev": "^2-", "_deleted": "true"}}), true),
            (json!({"if": {"type": "post"}}), false),
            (json!({"if": {"type": null}}), true),
            (json!({"selector": {"_deleted": true}}), true),
            (json!({"selector": {"type": "post"}}), false),
        ] {
            assert_eq!(rule(extra.clone()).matches(&Document::of(&gone)), expected, "{extra}");
            assert_eq!(matches(&rule(extra), &gone, Value::Null), expected);
        }
    }

    #[test]
    fn if_and_selector_must_both_hold() {
        let rule = rule(json!({"if": {"type": "post"}, "selector": {"stars": {"$gt": 3}}}));
        let change = row(json!({"seq": 1, "id": "a", "changes": []}));
        assert!(matches(&rule, &change, json!({"type": "post", "stars": 4})));
        assert!(!matches(&rule, &change, json!({"type": "post", "stars": 3})));
        assert!(!matches(&rule, &change, json!({"type": "page", "stars": 4})));
    }

    #[test]
    fn documents_are_asked_for_only_where_a_rule_reads_them() {
        for (extra, expected) in [
            (json!({}), false),
            (json!({"if": {"a": "b"}}), true),
            (json!({"if": {}}), false),
            (json!({"selector": {}}), true),
            (json!({"params": {"c": "$change"}}), true),
            (json!({"params": {"c": "$change.id", "r": "$change.rev", "s": "$seq", "d": "$db_name"}}), false),
            (json!({"url": "http://h/${change}"}), true),
            (json!({"url": "http://h/${change.id}"}), false),
        ] {
            assert_eq!(rule(extra.clone()).needs_doc(), expected, "{extra}");
        }
        assert!(rule(json!({"params": {"s": "${seq}"}})).needs_seq() && rule(json!({"url": "http://h/${seq}"})).needs_seq());
        assert!(!rule(json!({"params": {"c": "$change"}})).needs_seq());
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "[$(a.*http://{}]{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 12, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec(("(\\$and|\\$not|\\$in|a|b\\.c)", inner), 0..4)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn no_document_panics(values in prop::collection::vec(any_json(), 11), doc in any_json()) {
            let names = ["db_name", "url", "params", "method", "block", "debounce", "since", "if", "selector", "deleted", "design_docs"];
            let mut fields = json!({"_id": "r", "db_name": "a", "url": "http://h/${change}"});
            let length = doc.to_string().len();
            for (at, (name, value)) in names.into_iter().zip(values).enumerate() {
                // Some of the fields only, so that a good part of the rules is valid.
                if (length + at) % 3 == 0 {
                    fields[name] = value;
                }
            }
            if let Ok(rule) = Rule::parse(&fields) {
                let change = row(json!({"seq": 1, "id": "a", "changes": []}));
                let _ = matches(&rule, &change, doc);
                let _ = render(&rule, "db", &Document::of(&change));
            }
        }
    }
}
