//! The fields of an `on_change` document that say how its requests are delivered ▶ `Handling`.

use super::{Batch, Handling, HeaderSource, OnFailure, Order, Retry, Statuses, Strategy};
use crate::rules::invalid::{Faults, Invalid, given, wrong_kind};
use crate::rules::rule::sends_query;
use crate::vault::ADMIN_TOKEN;
use humantime::{format_duration, parse_duration};
use reqwest::Method;
use reqwest::header::{HeaderName, HeaderValue};
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::Duration;

/// Receivers refuse requests with more long before that.
const HEADERS_MAX: usize = 50;
const HEADER_BYTES_MAX: usize = 8 * 1024;
const SECRET_NAME_BYTES_MAX: usize = 200;
/// What waits longer is forgotten by whoever has to mend it; the scheduler waits no longer either.
const DELAY_MAX: Duration = Duration::from_secs(24 * 3_600);
const MULTIPLIER_MAX: f64 = 1_000.0;
const GIVE_UP_MIN: Duration = Duration::from_secs(1);
/// Longer is never, which is the default.
const GIVE_UP_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3_600);
/// A batch is one request: its receiver must bear it, and a failure repeats all of it.
const BATCH_MAX: u64 = 1_000;
const BATCH_DEFAULT: usize = 100;
/// The changes wait in memory, and the database's position waits for them.
const WITHIN_MAX: Duration = Duration::from_secs(60);

/// Of one connection and not of a request; or set by whoever sends.
const NOT_FOR_RULES: [&str; 11] = [
    "connection",
    "content-encoding",
    "content-length",
    "expect",
    "host",
    "http2-settings",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];
/// Of the way to the receiver, and of Standard Webhooks.
const NOT_FOR_RULES_PREFIXES: [&str; 2] = ["proxy-", "webhook-"];

/// What the other fields of the document say; None where they are wrong themselves.
#[derive(Debug, Clone, Copy)]
pub(in crate::rules) struct Beside<'a> {
    pub method: Option<&'a Method>,
    /// The URL names a user.
    pub has_user: bool,
    /// The URL takes values of one change.
    pub is_of_one_change: bool,
    pub block: bool,
    pub debounce: bool,
}

/// All that is wrong is noted; the result is good only where nothing is.
pub(in crate::rules) fn read(fields: &Map<String, Value>, beside: Beside<'_>, faults: &mut Faults) -> Handling {
    let on_failure = faults.note(word(fields, "on_failure", &[("park", OnFailure::Park), ("hold", OnFailure::Hold)])).flatten();
    let order = faults.note(word(fields, "order", &[("document", Order::Document), ("database", Order::Database)])).flatten();
    let handling = Handling {
        secret: faults.note(given(fields, "secret").map(|name| secret_name("secret", name)).transpose()).flatten(),
        headers: headers(fields, faults),
        content_type: faults.note(content_type(fields)).flatten(),
        retry: retry(fields, faults),
        retry_on: retry_on(fields, faults),
        on_failure: match (on_failure, order) {
            (Some(on_failure), _) => on_failure,
            (None, Some(Order::Database)) => OnFailure::Hold,
            (None, _) if beside.block => OnFailure::Hold,
            (None, _) => OnFailure::default(),
        },
        order: order.unwrap_or_default(),
        latest_only: faults.note(latest_only(fields)).unwrap_or_default(),
        batch: batch(fields, faults),
    };
    contradictions(&handling, beside, faults);
    handling
}

/// Pairs that cannot both be meant.
fn contradictions(handling: &Handling, beside: Beside<'_>, faults: &mut Faults) {
    let whole_database = [("block", beside.block), (r#"order "database""#, handling.order == Order::Database)];
    let query = beside.method.filter(|method| sends_query(method));
    for (name, _) in whole_database.into_iter().filter(|(_, is_set)| *is_set) {
        if handling.on_failure == OnFailure::Park {
            faults.add("on_failure", format!("must not be \"park\" beside {name}: the database waits for what failed"));
        }
        if handling.batch.is_some() {
            faults.add("batch", format!("makes no sense beside {name}: one change at a time is no batch"));
        }
    }
    if let (Some(_), Some(method)) = (handling.batch, query) {
        faults.add("batch", format!("needs a method with a body, such as POST: {method} sends the params as a query"));
    }
    if handling.batch.is_some() && beside.debounce {
        faults.add("batch", "makes no sense beside debounce: equal requests cannot be told within a batch");
    }
    if handling.batch.is_some() && beside.is_of_one_change {
        faults.add("batch", "is one request: its url must take nothing from a change (${db_name} it may)");
    }
    if let (Some(_), Some(method)) = (&handling.content_type, query) {
        faults.add("content_type", format!("needs a method with a body, such as POST: {method} sends the params as a query"));
    }
    if beside.has_user && handling.headers.iter().any(|(name, _)| name == "authorization") {
        faults.add("headers.authorization", "makes no sense beside a user in url: both are the same header");
    }
}

fn word<T: Copy>(fields: &Map<String, Value>, field: &str, words: &[(&str, T)]) -> Result<Option<T>, Invalid> {
    let Some(value) = given(fields, field) else { return Ok(None) };
    let found = value.as_str().and_then(|text| words.iter().find(|(word, _)| *word == text));
    let choices = || words.iter().map(|(word, _)| format!("{word:?}")).collect::<Vec<_>>().join(" or ");
    found.map(|(_, meaning)| Some(*meaning)).ok_or_else(|| Invalid::new(field, format!("must be {}", choices())))
}

fn secret_name(field: &str, value: &Value) -> Result<Arc<str>, Invalid> {
    match value {
        Value::String(name) if name.is_empty() => Err(Invalid::new(field, "is empty")),
        Value::String(name) if name.len() > SECRET_NAME_BYTES_MAX || name.contains(char::is_control) => {
            Err(Invalid::new(field, "is not the name of a secret"))
        }
        Value::String(name) if name == ADMIN_TOKEN => Err(Invalid::new(field, "is not for rules: it opens the admin API")),
        Value::String(name) => Ok(Arc::from(name.as_str())),
        other => wrong_kind(field, "the name of a secret in a string", other),
    }
}

fn headers(fields: &Map<String, Value>, faults: &mut Faults) -> Vec<(HeaderName, HeaderSource)> {
    let headers = match given(fields, "headers") {
        None => return Vec::new(),
        Some(Value::Object(headers)) => headers,
        Some(other) => {
            faults.note(wrong_kind::<()>("headers", "an object", other));
            return Vec::new();
        }
    };
    if headers.len() > HEADERS_MAX {
        faults.add("headers", format!("has more than {HEADERS_MAX} members"));
        return Vec::new();
    }
    let mut read: Vec<(HeaderName, HeaderSource)> = Vec::with_capacity(headers.len());
    for (name, value) in headers {
        let Some((name, source)) = faults.note(header(name, value)) else { continue };
        match read.iter().any(|(known, _)| *known == name) {
            true => faults.add(format!("headers.{name}"), "is there twice"),
            false => read.push((name, source)),
        }
    }
    read
}

fn header(name: &str, value: &Value) -> Result<(HeaderName, HeaderSource), Invalid> {
    let shown: String = name.chars().take(80).collect();
    let field = format!("headers.{shown}");
    let Ok(name) = HeaderName::from_bytes(name.as_bytes()) else {
        return Err(Invalid::new(field, "is not the name of a header"));
    };
    if name == "content-type" {
        return Err(Invalid::new(field, "is set by the field content_type"));
    }
    if NOT_FOR_RULES.contains(&name.as_str()) || NOT_FOR_RULES_PREFIXES.iter().any(|prefix| name.as_str().starts_with(prefix)) {
        return Err(Invalid::new(field, "is not for a rule to set"));
    }
    let source = match value {
        Value::String(text) => HeaderSource::Text(header_value(&field, text)?),
        Value::Object(members) if members.len() == 1 && members.contains_key("secret") => {
            HeaderSource::Secret(secret_name(&format!("{field}.secret"), &members["secret"])?)
        }
        Value::Object(_) => return Err(Invalid::new(field, r#"must be a string, or {"secret": "<name>"} and nothing else"#)),
        other => return wrong_kind(&field, r#"a string, or {"secret": "<name>"}"#, other),
    };
    Ok((name, source))
}

/// Line breaks above all: a value with one would be two headers.
fn header_value(field: &str, text: &str) -> Result<HeaderValue, Invalid> {
    match HeaderValue::from_str(text) {
        Ok(_) if text.len() > HEADER_BYTES_MAX => Err(Invalid::new(field, format!("is longer than {HEADER_BYTES_MAX} bytes"))),
        // What lies beyond is read in one way by this receiver and in another by that.
        Ok(mut value) if text.is_ascii() => {
            // Whoever writes a token here should not find it in a log.
            value.set_sensitive(true);
            Ok(value)
        }
        _ => Err(Invalid::new(field, "must be of visible ASCII characters and spaces")),
    }
}

fn content_type(fields: &Map<String, Value>) -> Result<Option<HeaderValue>, Invalid> {
    let text = match given(fields, "content_type") {
        None => return Ok(None),
        Some(Value::String(text)) => text,
        Some(other) => return wrong_kind("content_type", "a string", other),
    };
    let is_token = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$&^_.+-".contains(&b));
    let essence = text.split(';').next().unwrap_or_default().trim_end();
    match (essence.split_once('/'), HeaderValue::from_str(text)) {
        (Some((kind, subtype)), Ok(value)) if is_token(kind) && is_token(subtype) && text.len() <= HEADER_BYTES_MAX => {
            Ok(Some(value))
        }
        _ => Err(Invalid::new("content_type", "is not a media type such as application/json")),
    }
}

fn retry(fields: &Map<String, Value>, faults: &mut Faults) -> Retry {
    let empty = Map::new();
    let members = match given(fields, "retry") {
        None => &empty,
        Some(Value::Object(members)) => members,
        Some(other) => {
            faults.note(wrong_kind::<()>("retry", "an object", other));
            &empty
        }
    };
    let strategies = [("linear", Strategy::Linear), ("exponential", Strategy::Exponential)];
    let mut pause = |name: &str| {
        let read = given(members, name).map(|value| duration(&format!("retry.{name}"), value, Duration::ZERO, DELAY_MAX));
        faults.note(read.transpose()).flatten()
    };
    let (delay, cap) = (pause("delay"), pause("cap"));
    let strategy = faults.note(word(members, "strategy", &strategies).map_err(|fault| fault.within("retry"))).flatten();
    let multiplier = faults.note(multiplier(members)).flatten();
    let limit = faults.note(limit(members)).flatten();
    if let (Some(delay), Some(cap)) = (delay, cap)
        && cap < delay
    {
        faults.add("retry.cap", "is shorter than retry.delay");
    }
    let mut give_up = |name: &str, value: Option<&Value>| {
        let read = value.map(|value| duration(name, value, GIVE_UP_MIN, GIVE_UP_MAX));
        faults.note(read.transpose()).flatten()
    };
    let within = give_up("retry.give_up_after", given(members, "give_up_after"));
    let beside = give_up("give_up_after", given(fields, "give_up_after"));
    if within.is_some() && beside.is_some() {
        faults.add("give_up_after", "is there twice: within retry and beside it");
    }
    Retry { strategy, delay, multiplier, cap, limit, give_up_after: within.or(beside) }
}

/// Below one, each pause would be shorter than the one before.
fn multiplier(members: &Map<String, Value>) -> Result<Option<f64>, Invalid> {
    match given(members, "multiplier") {
        None => Ok(None),
        Some(Value::Number(number)) => match number.as_f64() {
            Some(multiplier) if (1.0..=MULTIPLIER_MAX).contains(&multiplier) => Ok(Some(multiplier)),
            _ => Err(Invalid::new("retry.multiplier", format!("must be from 1 to {MULTIPLIER_MAX}"))),
        },
        Some(other) => wrong_kind("retry.multiplier", "a number", other),
    }
}

fn limit(members: &Map<String, Value>) -> Result<Option<u32>, Invalid> {
    match given(members, "limit") {
        None => Ok(None),
        Some(value @ Value::Number(_)) => match whole_number(value).map(u32::try_from) {
            Some(Ok(limit)) => Ok(Some(limit)),
            _ => Err(Invalid::new("retry.limit", "must be a whole number, 0 (without end) or more")),
        },
        Some(other) => wrong_kind("retry.limit", "a number", other),
    }
}

fn retry_on(fields: &Map<String, Value>, faults: &mut Faults) -> Option<Vec<Statuses>> {
    match given(fields, "retry_on")? {
        Value::Array(items) => Some(items.iter().filter_map(|item| faults.note(statuses(item))).collect()),
        other => {
            faults.note(wrong_kind::<()>("retry_on", "an array", other));
            None
        }
    }
}

fn statuses(item: &Value) -> Result<Statuses, Invalid> {
    let wrong = |reason: &str| Err(Invalid::new("retry_on", reason));
    let text = match item {
        Value::String(text) => text.to_ascii_lowercase(),
        Value::Number(number) => number.to_string(),
        other => return wrong_kind("retry_on", "of statuses such as 409 or \"4xx\"", other),
    };
    match (text.as_str(), text.parse::<u16>()) {
        ("3xx", _) => Ok(Statuses::Class(3)),
        ("4xx", _) => Ok(Statuses::Class(4)),
        ("5xx", _) => Ok(Statuses::Class(5)),
        (_, Ok(410)) => wrong("must not have 410: it says that the receiver wants no more, and disables the rule"),
        (_, Ok(status @ 300..=599)) => Ok(Statuses::One(status)),
        (_, Ok(200..=299)) | ("2xx", _) => wrong("must not have a 2xx: that is success"),
        _ => wrong(r#"must be of statuses from 300 to 599, "3xx", "4xx" or "5xx""#),
    }
}

fn latest_only(fields: &Map<String, Value>) -> Result<bool, Invalid> {
    match given(fields, "latest_only") {
        None => Ok(false),
        Some(Value::Bool(value)) => Ok(*value),
        Some(other) => wrong_kind("latest_only", "true or false", other),
    }
}

fn batch(fields: &Map<String, Value>, faults: &mut Faults) -> Option<Batch> {
    let members = match given(fields, "batch")? {
        Value::Object(members) => members,
        other => {
            faults.note(wrong_kind::<()>("batch", "an object", other));
            return None;
        }
    };
    let max = given(members, "max").map_or(Ok(BATCH_DEFAULT), |value| match whole_number(value) {
        Some(max @ 1..=BATCH_MAX) => Ok(max as usize),
        _ => Err(Invalid::new("batch.max", format!("must be a whole number from 1 to {BATCH_MAX}"))),
    });
    let within =
        given(members, "within").map_or(Ok(Duration::ZERO), |value| duration("batch.within", value, Duration::ZERO, WITHIN_MAX));
    Some(Batch { max: faults.note(max)?, within: faults.note(within)? })
}

/// `5` and `5.0` are one number in JSON.
fn whole_number(value: &Value) -> Option<u64> {
    let exactly = |number: f64| (number.fract() == 0.0 && (0.0..9e15).contains(&number)).then_some(number as u64);
    value.as_u64().or_else(|| value.as_f64().and_then(exactly))
}

/// Text with a unit, or a number of seconds as the original's settings have it.
fn duration(field: &str, value: &Value, least: Duration, most: Duration) -> Result<Duration, Invalid> {
    let read = match value {
        Value::String(text) => match parse_duration(text.trim()) {
            Ok(duration) => Some(duration),
            Err(_) => return Err(Invalid::new(field, r#"must be a duration such as "5s" or "1h 30m", or a number of seconds"#)),
        },
        Value::Number(seconds) => seconds.as_f64().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()),
        other => return wrong_kind(field, r#"a duration such as "5s", or a number of seconds"#, other),
    };
    match read {
        Some(duration) if (least..=most).contains(&duration) => Ok(duration),
        _ => Err(Invalid::new(field, format!("must be from {} to {}", format_duration(least), format_duration(most)))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::rules::invalid::summary;
    use crate::rules::rule::Rule;
    use proptest::prelude::*;
    use serde_json::json;

    fn rule(extra: &Value) -> Result<Rule, String> {
        let mut doc = json!({"_id": "r", "db_name": "foo", "url": "http://h/", "method": "POST"});
        doc.as_object_mut().unwrap().extend(extra.as_object().expect("an object").clone());
        Rule::parse(&doc).map_err(|faults| summary(&faults))
    }

    fn handling(extra: Value) -> Handling {
        rule(&extra).unwrap_or_else(|faults| panic!("{extra}: {faults}")).handling
    }

    fn text(value: &'static str) -> HeaderSource {
        HeaderSource::Text(HeaderValue::from_static(value))
    }

    fn seconds(seconds: u64) -> Option<Duration> {
        Some(Duration::from_secs(seconds))
    }

    #[test]
    fn a_rule_that_says_nothing_is_the_originals() {
        assert_eq!(handling(json!({})), Handling::default());
        let nothing = json!({
            "secret": null, "headers": null, "content_type": null, "retry": null, "retry_on": null, "on_failure": null,
            "order": null, "latest_only": null, "batch": null, "give_up_after": null,
        });
        assert_eq!(handling(nothing), Handling::default());
        assert_eq!(handling(json!({"headers": {}, "retry": {"delay": null}})), Handling::default());
    }

    #[test]
    fn everything_at_once() {
        let given = json!({
            "secret": "orders",
            "headers": {"X-Tenant": "acme", "authorization": {"secret": "token"}, "User-Agent": "me"},
            "content_type": "application/vnd.acme+json; charset=utf-8",
            "retry": {"strategy": "linear", "delay": "5s", "multiplier": 1.5, "cap": 600, "limit": 3, "give_up_after": "1day"},
            "retry_on": ["4xx", 301, "5XX", "409"],
            "on_failure": "hold", "order": "document", "latest_only": true, "batch": {"max": 50, "within": 0.5},
        });
        let expected = Handling {
            secret: Some("orders".into()),
            headers: vec![
                (HeaderName::from_static("x-tenant"), text("acme")),
                (HeaderName::from_static("authorization"), HeaderSource::Secret("token".into())),
                (HeaderName::from_static("user-agent"), text("me")),
            ],
            content_type: Some(HeaderValue::from_static("application/vnd.acme+json; charset=utf-8")),
            retry: Retry {
                strategy: Some(super::Strategy::Linear),
                delay: seconds(5),
                multiplier: Some(1.5),
                cap: seconds(600),
                limit: Some(3),
                give_up_after: seconds(86_400),
            },
            retry_on: Some(vec![Statuses::Class(4), Statuses::One(301), Statuses::Class(5), Statuses::One(409)]),
            on_failure: OnFailure::Hold,
            order: Order::Document,
            latest_only: true,
            batch: Some(Batch { max: 50, within: Duration::from_millis(500) }),
        };
        assert_eq!(handling(given), expected);
    }

    #[test]
    fn some_fields_say_more_than_themselves() {
        assert_eq!(handling(json!({"block": true})).on_failure, OnFailure::Hold);
        assert_eq!(handling(json!({"order": "database"})).on_failure, OnFailure::Hold);
        assert_eq!(handling(json!({"order": "database", "on_failure": "hold"})).order, Order::Database);
        assert_eq!(handling(json!({"on_failure": "park"})).on_failure, OnFailure::Park);
        assert_eq!(handling(json!({"give_up_after": 60})).retry.give_up_after, seconds(60));
        assert_eq!(handling(json!({"batch": {}})).batch, Some(Batch { max: BATCH_DEFAULT, within: Duration::ZERO }));
        assert_eq!(handling(json!({"batch": {"max": 1000.0}})).batch.unwrap().max, 1000);
        assert_eq!(handling(json!({"retry_on": []})).retry_on, Some(Vec::new()));
        assert_eq!(handling(json!({"retry": {"limit": 0, "delay": 0}})).retry.delay, Some(Duration::ZERO));
        assert_eq!(handling(json!({"retry": {"delay": " 1h 30m "}})).retry.delay, seconds(5400));
        assert!(rule(&json!({"block": true, "debounce": true, "latest_only": true})).is_ok());
        assert!(rule(&json!({"batch": {}, "url": "http://u@h/${db_name}", "secret": "s"})).is_ok());
        assert!(rule(&json!({"method": "GET", "secret": "s", "headers": {"x": "y"}, "latest_only": true})).is_ok());
    }

    #[test]
    fn a_class_of_statuses_leaves_410_out() {
        let cases = [(409, true), (410, false), (400, true), (499, true), (399, false), (500, false)];
        for (status, expected) in cases {
            assert_eq!(Statuses::Class(4).contains(status), expected, "{status}");
        }
        assert!(Statuses::One(301).contains(301) && !Statuses::One(301).contains(302));
    }

    #[test]
    fn every_bad_value_is_named_with_its_reason() {
        let long = "x".repeat(9000);
        for (extra, expected) in [
            (json!({"secret": ""}), "secret is empty"),
            (json!({"secret": 5}), "secret must be the name of a secret in a string, not a number"),
            (json!({"secret": "a\nb"}), "secret is not the name of a secret"),
            (json!({"secret": long}), "secret is not the name of a secret"),
            (json!({"headers": []}), "headers must be an object, not an array"),
            (json!({"headers": {"X A": "b"}}), "headers.X A is not the name of a header"),
            (json!({"headers": {"": "b"}}), "headers. is not the name of a header"),
            (json!({"headers": {"X\r\nEvil": "b"}}), "is not the name of a header"),
            (json!({"headers": {"X": "a\r\nEvil: b"}}), "headers.X must be of visible ASCII"),
            (json!({"headers": {"X": "é"}}), "headers.X must be of visible ASCII"),
            (json!({"headers": {"X": long}}), "headers.X is longer than"),
            (json!({"headers": {"X": 5}}), "headers.X must be a string, or {\"secret\": \"<name>\"}, not a number"),
            (json!({"headers": {"X": {}}}), "headers.X must be a string, or"),
            (json!({"headers": {"X": {"secret": "a", "b": 1}}}), "and nothing else"),
            (json!({"headers": {"X": {"secret": 1}}}), "headers.X.secret must be the name"),
            (json!({"headers": {"x-a": "1", "X-A": "2"}}), "headers.x-a is there twice"),
            (json!({"headers": {"Content-Type": "text/plain"}}), "headers.Content-Type is set by the field content_type"),
            (json!({"headers": {"host": "x"}}), "headers.host is not for a rule to set"),
            (json!({"headers": {"Transfer-Encoding": "chunked"}}), "is not for a rule to set"),
            (json!({"headers": {"Content-Length": "0"}}), "is not for a rule to set"),
            (json!({"headers": {"Connection": "close"}}), "is not for a rule to set"),
            (json!({"headers": {"TE": "trailers"}}), "is not for a rule to set"),
            (json!({"headers": {"Proxy-Authorization": "x"}}), "is not for a rule to set"),
            (json!({"headers": {"webhook-id": "1"}}), "is not for a rule to set"),
            (json!({"headers": {"Webhook-Signature": {"secret": "a"}}}), "is not for a rule to set"),
            (json!({"headers": {"webhook-timestamp": "1"}}), "is not for a rule to set"),
            (
                json!({"headers": {"Authorization": "x"}, "url": "http://u@h/"}),
                "headers.authorization makes no sense beside a user",
            ),
            (json!({"content_type": 5}), "content_type must be a string, not a number"),
            (json!({"content_type": "json"}), "content_type is not a media type"),
            (json!({"content_type": "a/b\r\nX: y"}), "content_type is not a media type"),
            (json!({"content_type": "/"}), "content_type is not a media type"),
            (json!({"content_type": "a/b", "method": "GET"}), "content_type needs a method with a body"),
            (json!({"retry": 5}), "retry must be an object, not a number"),
            (json!({"retry": {"strategy": "quick"}}), r#"retry.strategy must be "linear" or "exponential""#),
            (json!({"retry": {"delay": "5"}}), "retry.delay must be a duration such as"),
            (json!({"retry": {"delay": "-5s"}}), "retry.delay must be a duration such as"),
            (json!({"retry": {"delay": "NaN"}}), "retry.delay must be a duration such as"),
            (json!({"retry": {"delay": -1}}), "retry.delay must be from 0s to 1day"),
            (json!({"retry": {"delay": 1e300}}), "retry.delay must be from 0s to 1day"),
            (
                json!({"retry": {"delay": true}}),
                "retry.delay must be a duration such as \"5s\", or a number of seconds, not a boolean",
            ),
            (json!({"retry": {"cap": "2days"}}), "retry.cap must be from 0s to 1day"),
            (json!({"retry": {"delay": 10, "cap": "5s"}}), "retry.cap is shorter than retry.delay"),
            (json!({"retry": {"multiplier": 0.5}}), "retry.multiplier must be from 1 to 1000"),
            (json!({"retry": {"multiplier": 1e9}}), "retry.multiplier must be from 1 to 1000"),
            (json!({"retry": {"multiplier": "2"}}), "retry.multiplier must be a number, not a string"),
            (json!({"retry": {"limit": -1}}), "retry.limit must be a whole number"),
            (json!({"retry": {"limit": 1.5}}), "retry.limit must be a whole number"),
            (json!({"retry": {"limit": 1e12}}), "retry.limit must be a whole number"),
            (json!({"retry": {"limit": "3"}}), "retry.limit must be a number, not a string"),
            (json!({"retry": {"give_up_after": 0}}), "retry.give_up_after must be from 1s"),
            (json!({"give_up_after": "1000years"}), "give_up_after must be from 1s"),
            (json!({"give_up_after": 5, "retry": {"give_up_after": 5}}), "give_up_after is there twice"),
            (json!({"retry_on": "4xx"}), "retry_on must be an array, not a string"),
            (json!({"retry_on": [200]}), "retry_on must not have a 2xx"),
            (json!({"retry_on": ["2xx"]}), "retry_on must not have a 2xx"),
            (json!({"retry_on": [410]}), "retry_on must not have 410"),
            (json!({"retry_on": [99]}), "retry_on must be of statuses from 300 to 599"),
            (json!({"retry_on": [409.5]}), "retry_on must be of statuses from 300 to 599"),
            (json!({"retry_on": ["9xx"]}), "retry_on must be of statuses from 300 to 599"),
            (json!({"retry_on": [{}]}), "retry_on must be of statuses such as"),
            (json!({"on_failure": "drop"}), r#"on_failure must be "park" or "hold""#),
            (json!({"on_failure": "park", "block": true}), "on_failure must not be \"park\" beside block"),
            (json!({"on_failure": "park", "order": "database"}), "on_failure must not be \"park\" beside order \"database\""),
            (json!({"order": true}), r#"order must be "document" or "database""#),
            (json!({"latest_only": "yes"}), "latest_only must be true or false, not a string"),
            (json!({"batch": true}), "batch must be an object, not a boolean"),
            (json!({"batch": {"max": 0}}), "batch.max must be a whole number from 1 to 1000"),
            (json!({"batch": {"max": 1001}}), "batch.max must be a whole number from 1 to 1000"),
            (json!({"batch": {"max": "5"}}), "batch.max must be a whole number from 1 to 1000"),
            (json!({"batch": {"within": "2m"}}), "batch.within must be from 0s to 1m"),
            (json!({"batch": {"within": -1}}), "batch.within must be from 0s to 1m"),
            (json!({"batch": {}, "method": "DELETE"}), "batch needs a method with a body, such as POST: DELETE sends"),
            (json!({"batch": {}, "block": true}), "batch makes no sense beside block"),
            (json!({"batch": {}, "order": "database"}), "batch makes no sense beside order \"database\""),
            (json!({"batch": {}, "debounce": true}), "batch makes no sense beside debounce"),
            (json!({"batch": {}, "url": "http://h/${change.id}"}), "batch is one request: its url"),
        ] {
            let said = rule(&extra).expect_err(&extra.to_string());
            assert!(said.contains(expected), "{said}");
            assert!(!said.contains('\r') && said.len() < 1000, "{said}");
        }
        let many: Map<String, Value> = (0..60).map(|n| (format!("x-{n}"), json!("y"))).collect();
        assert!(rule(&json!({"headers": many})).expect_err("too many").contains("more than 50 members"));
    }

    #[test]
    fn all_faults_are_said_at_once() {
        let said = rule(&json!({
            "url": 5, "secret": 1, "headers": {"host": "x", "a b": "c"}, "retry": {"delay": "x", "limit": "y"}, "retry_on": [1, 2],
            "batch": {"max": 0}, "latest_only": 1,
        }));
        let said = said.expect_err("all wrong");
        for field in [
            "url ",
            "secret ",
            "headers.host ",
            "headers.a b ",
            "retry.delay ",
            "retry.limit ",
            "retry_on ",
            "batch.max ",
            "latest_only ",
        ] {
            assert!(said.contains(field), "{field} in {said}");
        }
    }

    /// Templates stand in params and in the URL only: no document gets into a header.
    #[test]
    fn a_template_in_a_header_is_a_text() {
        for template in ["$change", "${change.doc.x}", "$change.id", "${seq}", "${db_name}"] {
            assert_eq!(handling(json!({"headers": {"x": template}})).headers[0].1, text(template));
        }
    }

    #[test]
    fn a_headers_text_is_not_shown() {
        let shown = format!("{:?}", handling(json!({"headers": {"x-token": "s3cret"}})));
        assert!(shown.contains("x-token") && !shown.contains("s3cret"), "{shown}");
    }

    proptest! {
        #[test]
        fn a_header_that_is_taken_is_one_line(name in "(?s).{0,12}", value in "(?s).{0,12}") {
            let extra = json!({"headers": {name.clone(): value.clone()}});
            if let Ok(rule) = rule(&extra) {
                let (taken, source) = &rule.handling.headers[0];
                prop_assert!(taken.as_str().eq_ignore_ascii_case(&name));
                prop_assert_eq!(source, &HeaderSource::Text(HeaderValue::from_str(&value).unwrap()));
                prop_assert!(!value.contains(['\r', '\n', '\0']));
            }
        }

        #[test]
        fn a_duration_is_within_its_bounds(number in any::<f64>(), text in "[0-9a-z .-]{0,8}") {
            for value in [json!(number), json!(text)] {
                if let Ok(read) = duration("f", &value, Duration::from_secs(1), DELAY_MAX) {
                    prop_assert!(read >= Duration::from_secs(1) && read <= DELAY_MAX);
                }
            }
        }
    }
}
