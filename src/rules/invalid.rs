//! What is wrong with one field of a user's document.

use serde_json::{Map, Value};
use std::fmt;

/// Names the field and the reason, and never the value: a URL may hold a password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalid {
    pub field: String,
    pub reason: String,
}

impl Invalid {
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }

    /// Of a member of another field.
    pub fn within(self, field: &str) -> Self {
        Self { field: format!("{field}.{}", self.field), reason: self.reason }
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Some fields have names that the user made up: none of them breaks a line of the log.
        let field: String = self.field.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        write!(f, "{field} {}", self.reason)
    }
}

/// All that is wrong with a document, in one line.
pub fn summary(invalid: &[Invalid]) -> String {
    invalid.iter().map(Invalid::to_string).collect::<Vec<_>>().join("; ")
}

/// What a JSON value is, as its writer would call it.
pub fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// All that is wrong with a document, gathered while it is read.
#[derive(Debug, Default)]
pub struct Faults(pub Vec<Invalid>);

impl Faults {
    pub fn note<T>(&mut self, read: Result<T, Invalid>) -> Option<T> {
        read.map_err(|invalid| self.0.push(invalid)).ok()
    }

    pub fn add(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.0.push(Invalid::new(field, reason));
    }
}

/// Null is as good as absent.
pub fn given<'f>(fields: &'f Map<String, Value>, name: &str) -> Option<&'f Value> {
    fields.get(name).filter(|value| !value.is_null())
}

pub fn wrong_kind<T>(field: &str, wanted: &str, value: &Value) -> Result<T, Invalid> {
    Err(Invalid::new(field, format!("must be {wanted}, not {}", kind_of(value))))
}
