//! A request taken apart: its decoded path, its query and its JSON body.

use super::answer::Failure;
use bytes::Bytes;
use http::{HeaderMap, Method};
use percent_encoding::percent_decode_str;
use serde_json::Value;
use std::collections::HashMap;

pub struct Call {
    pub method: Method,
    /// Decoded one by one: a database's name may hold a slash.
    pub segments: Vec<String>,
    pub query: Query,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Call {
    pub fn segments_of(path: &str) -> Result<Vec<String>, Failure> {
        let path = path.strip_prefix('/').unwrap_or(path);
        let path = path.strip_suffix('/').unwrap_or(path);
        if path.is_empty() {
            return Ok(Vec::new());
        }
        // A bare plus is a space, as CouchDB reads it: a database with one in its name is found only by %2B.
        let decode = |segment: &str| percent_decode_str(&segment.replace('+', " ")).decode_utf8().map(|text| text.into_owned());
        let segments = path.split('/').map(decode).collect::<Result<Vec<_>, _>>();
        let mut segments = segments.map_err(|_| Failure::bad_request("invalid UTF-8 in the path"))?;
        // The slash after these two may be encoded or not.
        for prefix in ["_design", "_local"] {
            let rest = segments.get(1).and_then(|id| id.strip_prefix(prefix)?.strip_prefix('/')).map(String::from);
            if let Some(rest) = rest {
                segments.splice(1..2, [prefix.to_string(), rest]);
            }
        }
        Ok(segments)
    }

    pub fn json(&self) -> Result<Value, Failure> {
        serde_json::from_slice(&self.body).map_err(|_| Failure::bad_request("invalid UTF-8 JSON"))
    }

    /// CouchDB wants a POST to say that it is JSON.
    pub fn posted_json(&self) -> Result<Value, Failure> {
        if !self.header("content-type").starts_with("application/json") {
            return Err(Failure::new(415, "bad_content_type", "Content-Type must be application/json"));
        }
        self.json()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("")
    }
}

#[derive(Debug, Default)]
pub struct Query(HashMap<String, String>);

impl Query {
    pub fn parse(text: &str) -> Self {
        Self(url::form_urlencoded::parse(text.as_bytes()).into_owned().collect())
    }

    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    pub fn is_true(&self, key: &str) -> bool {
        self.get(key) == Some("true")
    }

    pub fn number(&self, key: &str) -> Result<Option<u64>, Failure> {
        let bad = |text: &str| Failure::new(400, "query_parse_error", format!("Invalid value for integer: \"{text}\""));
        self.get(key).map(|text| text.parse().map_err(|_| bad(text))).transpose()
    }

    /// A value that is JSON, such as `startkey="a"`.
    pub fn json(&self, key: &str) -> Result<Option<Value>, Failure> {
        let bad = |_| Failure::bad_request("invalid UTF-8 JSON");
        self.get(key).map(|text| serde_json::from_str(text).map_err(bad)).transpose()
    }

    /// The query, and what a POST's body says about the options that the query leaves open.
    pub fn with_body(&self, body: &Value) -> Self {
        let mut all = self.0.clone();
        for (key, value) in body.as_object().into_iter().flatten() {
            all.entry(key.clone()).or_insert_with(|| value.to_string());
        }
        Self(all)
    }
}
