//! The document `global_lastSeq`: how far the feed was worked off, as the original keeps it.
//!
//! Four fields are ours: `swept_at`, when the last sweep ended, `swept_rules`, for which rules, `sweeps_trusting`, how many ended
//! since one asked all databases, and `clean_stop`, true only between a clean stop and the next start, so that a start after a
//! crash sweeps.

use crate::checkpoints::{Checkpoints, UpdateError};
use crate::couch::{Couch, CouchError, Seq, WriteResult};
use crate::locks::mend::conflicts_of;
use serde_json::{Value, json};
use std::time::{Duration, SystemTime};

const ID: &str = "global_lastSeq";

/// A full sweep that ended.
#[derive(Debug, Clone)]
pub struct Swept {
    pub at: SystemTime,
    /// Of the rules that it swept for: a rule that is new has never looked at its databases.
    pub rules: String,
    /// How many of them ended since one hinted every database.
    pub trusting: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    Now,
    /// With the next write of a position, if one comes soon.
    Along,
}

#[derive(Debug, Clone, Default)]
pub struct Watermark {
    doc: Option<Value>,
    /// Another process was seen to write it: what is known of it is old.
    is_shared: bool,
}

impl Watermark {
    pub async fn load(checkpoints: &Checkpoints) -> Result<Self, crate::checkpoints::Gone> {
        Ok(Self { doc: checkpoints.load(String::from(ID)).await?, is_shared: false })
    }

    /// Removes conflicted revisions, which a cluster that was cut in two leaves: each side's value is one that was worked off to.
    pub async fn tidy(couch: &Couch, db_name: &str) -> Result<(), CouchError> {
        let doc = couch.doc_with_conflicts(db_name, ID).await?.unwrap_or_default();
        for rev in conflicts_of(&doc) {
            couch.delete_doc(db_name, ID, rev).await?;
        }
        Ok(())
    }

    /// A document without a value counts as none.
    pub fn value(&self) -> Option<Seq> {
        self.doc.as_ref().and_then(|doc| serde_json::from_value(doc["value"].clone()).ok())
    }

    /// How many sweeps ended since one hinted every database.
    pub fn sweeps_trusting(&self) -> u64 {
        self.doc.as_ref().and_then(|doc| doc["sweeps_trusting"].as_u64()).unwrap_or(0)
    }

    /// True where nothing can have been missed since the last sweep but what the feed will tell.
    pub fn can_skip_sweep(&self, now: SystemTime, sweep_interval: Duration, rules: &str) -> bool {
        let Some(doc) = &self.doc else { return false };
        let swept_at = doc["swept_at"].as_str().and_then(|text| humantime::parse_rfc3339_weak(text).ok());
        let is_recent = swept_at.is_some_and(|at| now.duration_since(at).is_ok_and(|age| age < sweep_interval));
        doc["clean_stop"] == Value::Bool(true) && is_recent && doc["swept_rules"] == rules
    }

    pub async fn save(
        &mut self,
        checkpoints: &Checkpoints,
        value: Option<Seq>,
        swept: Option<Swept>,
        clean_stop: bool,
        urgency: Urgency,
    ) -> Result<(), UpdateError> {
        let mut urgency = urgency;
        if self.is_shared {
            self.doc = checkpoints.load(String::from(ID)).await?;
            // What goes along later would be old again by then.
            urgency = Urgency::Now;
        }
        // As many rounds as `Checkpoints::update` has: another process of the same installation writes this, too.
        for _ in 0..20 {
            let mut doc = self.doc.clone().unwrap_or_else(|| json!({ "_id": ID, "type": "global" }));
            if let Some(value) = &value {
                doc["value"] = json!(value);
            }
            if let Some(swept) = &swept {
                doc["swept_at"] = Value::from(humantime::format_rfc3339_seconds(swept.at).to_string());
                doc["swept_rules"] = Value::from(swept.rules.as_str());
                doc["sweeps_trusting"] = Value::from(swept.trusting);
            }
            doc["clean_stop"] = Value::Bool(clean_stop);
            // The last word cannot wait for another write; there will be none.
            let saved = if urgency == Urgency::Now { checkpoints.save(doc.clone()) } else { checkpoints.save_along(doc.clone()) };
            match saved.await.map_err(|_| crate::checkpoints::Gone)? {
                WriteResult::Saved { rev } => {
                    doc["_rev"] = Value::from(rev);
                    self.doc = Some(doc);
                    return Ok(());
                }
                WriteResult::Conflict => {
                    urgency = Urgency::Now;
                    self.is_shared = true;
                    self.doc = checkpoints.load(String::from(ID)).await?;
                }
                WriteResult::Refused { reason } => return Err(UpdateError::Refused(reason)),
            }
        }
        Err(UpdateError::Contended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_recent_sweep_and_a_clean_stop_save_the_next_sweep() {
        let now = SystemTime::now();
        let at = |secs: u64| humantime::format_rfc3339_seconds(now - Duration::from_secs(secs)).to_string();
        let cases = [
            (json!({ "clean_stop": true, "swept_at": at(60), "swept_rules": "r" }), true),
            (json!({ "clean_stop": true, "swept_at": at(60), "swept_rules": "others" }), false),
            (json!({ "clean_stop": false, "swept_at": at(60), "swept_rules": "r" }), false),
            (json!({ "clean_stop": true, "swept_at": at(7200), "swept_rules": "r" }), false),
            (json!({ "clean_stop": true }), false),
            (json!({ "clean_stop": "yes", "swept_at": 7 }), false),
        ];
        for (doc, expected) in cases {
            let watermark = Watermark { doc: Some(doc.clone()), ..Watermark::default() };
            assert_eq!(watermark.can_skip_sweep(now, Duration::from_secs(3600), "r"), expected, "{doc}");
        }
        assert!(!Watermark::default().can_skip_sweep(now, Duration::from_secs(3600), "r"));
    }

    #[test]
    fn sweeps_that_nobody_counted_are_none() {
        for (doc, expected) in [
            (json!({ "sweeps_trusting": 5 }), 5),
            (json!({ "sweeps_trusting": -5 }), 0),
            (json!({ "sweeps_trusting": "5" }), 0),
            (json!({}), 0),
        ] {
            assert_eq!(Watermark { doc: Some(doc.clone()), ..Watermark::default() }.sweeps_trusting(), expected, "{doc}");
        }
    }

    #[test]
    fn a_document_without_a_value_counts_as_none() {
        for (doc, expected) in [
            (json!({ "value": "5-x" }), Some(Seq::from("5-x"))),
            (json!({ "value": 5 }), Some(Seq::Number(5))),
            (json!({ "value": null }), None),
            (json!({ "value": {} }), None),
            (json!({}), None),
        ] {
            assert_eq!(Watermark { doc: Some(doc), ..Watermark::default() }.value(), expected);
        }
    }
}
