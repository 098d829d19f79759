//! Figures ▶ a JSON line.

use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Prints one row. `figures` has `value`, and whatever else explains it.
pub fn row(name: &str, unit: &str, couchdb: &str, settings: &BTreeMap<String, String>, figures: Value) {
    let mut line = Map::new();
    line.insert(String::from("name"), json!(name));
    line.insert(String::from("unit"), json!(unit));
    if let Value::Object(figures) = figures {
        line.extend(figures);
    }
    line.insert(String::from("couchdb"), json!(couchdb));
    line.insert(String::from("settings"), json!(settings));
    println!("{}", Value::Object(line));
}

/// `value` is the median.
pub fn percentiles(samples: &[f64]) -> Value {
    let at = |fraction| percentile(samples, fraction);
    json!({ "value": at(0.5), "p50": at(0.5), "p90": at(0.9), "min": at(0.0), "max": at(1.0), "samples": samples.len() })
}

pub fn percentile(samples: &[f64], fraction: f64) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = ((sorted.len() as f64 * fraction).ceil() as usize).saturating_sub(1);
    sorted.get(index).map(|value| rounded(*value))
}

pub fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Negative where the later one came first.
pub fn ms_between(earlier: Instant, later: Instant) -> f64 {
    ms(later.saturating_duration_since(earlier)) - ms(earlier.saturating_duration_since(later))
}
