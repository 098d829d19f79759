//! What the replicators are doing, in the words of CouchDB's `_scheduler/docs`, for people and for monitoring.

use crate::config::EngineChoice;
use crate::job::timestamp;
use crate::replicate;
use crate::replicate::progress::Seen;
use crate::topology::states::Id;
use serde_json::{Map, Value, json};
use std::time::{Duration, SystemTime};

/// In the order in which they are listed: first what a person should look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RunState {
    /// Failed, and backing off.
    Crashing,
    /// Its document cannot be used until somebody changes it.
    Failed,
    Running,
    /// Owes a run: it waits for its turn, or for its `dirty_after_milliseconds`.
    Pending,
    /// Owes its first run.
    Initializing,
    /// The last run went well, and nothing is owed.
    Completed,
}

impl RunState {
    pub const ALL: [RunState; 6] =
        [RunState::Crashing, RunState::Failed, RunState::Running, RunState::Pending, RunState::Initializing, RunState::Completed];

    pub fn name(self) -> &'static str {
        match self {
            RunState::Crashing => "crashing",
            RunState::Failed => "failed",
            RunState::Running => "running",
            RunState::Pending => "pending",
            RunState::Initializing => "initializing",
            RunState::Completed => "completed",
        }
    }
}

/// How many replicators there are of each state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts([usize; RunState::ALL.len()]);

impl Counts {
    pub fn of(&self, state: RunState) -> usize {
        self.0[state as usize]
    }

    pub fn add(&mut self, state: RunState, count: usize) {
        self.0[state as usize] += count;
    }
}

/// A run in few bytes: there is one for each replicator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastRun {
    pub started_at: SystemTime,
    /// None while it runs.
    pub duration: Option<Duration>,
    pub engine: Option<EngineChoice>,
    counts: replicate::Counts,
}

impl LastRun {
    /// None where it never had its turn.
    pub fn of(seen: &Seen) -> Option<Self> {
        let counts = seen.report().counts;
        Some(Self { started_at: seen.started_at?, duration: seen.duration, engine: seen.engine, counts })
    }

    fn info(&self) -> Map<String, Value> {
        let counts = [
            ("revisions_checked", self.counts.missing_checked),
            ("missing_revisions_found", self.counts.missing_found),
            ("docs_read", self.counts.docs_read),
            ("docs_written", self.counts.docs_written),
            ("doc_write_failures", self.counts.doc_write_failures),
            ("bytes_read", self.counts.bytes_read),
        ];
        counts.into_iter().map(|(name, count)| (name.to_string(), Value::from(count))).collect()
    }
}

/// One replicator, as `_scheduler/docs` would have it.
#[derive(Debug, Clone, PartialEq)]
pub struct Doc {
    pub id: Id,
    /// Without passwords; None where the document does not say it.
    pub source: Option<String>,
    pub target: Option<String>,
    pub state: RunState,
    /// What the document asks for.
    pub engine: Option<EngineChoice>,
    pub error_count: u32,
    pub error: Option<String>,
    pub next_try_at: Option<SystemTime>,
    /// The run under way; else the last one of this process that had anything to do.
    pub run: Option<LastRun>,
    /// Of a run under way.
    pub changes_pending: Option<u64>,
    pub through_seq: Option<u64>,
}

impl Doc {
    fn json(&self) -> Value {
        let mut info = self.run.as_ref().map(LastRun::info).unwrap_or_default();
        let run = self.run.as_ref();
        let is_running = self.state == RunState::Running;
        let duration = run.and_then(|run| run.duration).filter(|_| !is_running);
        let more = [
            ("duration_ms", duration.map(|duration| duration.as_millis() as u64)),
            ("changes_pending", self.changes_pending),
            ("through_seq", self.through_seq),
        ];
        info.extend(more.into_iter().filter_map(|(name, value)| Some((name.to_string(), Value::from(value?)))));
        if let Some(error) = &self.error {
            info.insert(String::from("error"), Value::from(error.as_str()));
        }
        let engine = run.and_then(|run| run.engine).or(self.engine);
        json!({
            "doc_id": *self.id,
            "source": self.source,
            "target": self.target,
            "state": self.state.name(),
            "engine": engine.map(EngineChoice::name),
            "error_count": self.error_count,
            "start_time": run.map(|run| timestamp(run.started_at)),
            "next_try": self.next_try_at.map(timestamp),
            "info": info,
        })
    }
}

#[derive(Debug, Clone, Default, PartialEq)]
pub struct Status {
    pub counts: Counts,
    /// The first of them, in the order of their states.
    pub docs: Vec<Doc>,
}

impl Status {
    pub fn states_json(&self) -> Value {
        let states = RunState::ALL.into_iter().map(|state| (state.name().to_string(), Value::from(self.counts.of(state))));
        Value::Object(states.collect())
    }

    pub fn docs_json(&self) -> Value {
        self.docs.iter().map(Doc::json).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn a_doc_reads_as_in_scheduler_docs() {
        let counts = replicate::Counts { docs_read: 2, docs_written: 1, doc_write_failures: 1, ..Default::default() };
        let report = replicate::Report { counts, ..Default::default() };
        let started_at = Some(SystemTime::UNIX_EPOCH);
        let engine = Some(EngineChoice::Native);
        let seen = Seen { started_at, engine, part: report, duration: Some(Duration::from_millis(7)), ..Seen::default() };
        let doc = Doc {
            id: "r".into(),
            source: Some(String::from("a")),
            target: Some(String::from("b")),
            state: RunState::Completed,
            engine: None,
            error_count: 0,
            error: None,
            next_try_at: None,
            run: LastRun::of(&seen),
            changes_pending: None,
            through_seq: None,
        };
        let info = json!({
            "revisions_checked": 0, "missing_revisions_found": 0, "docs_read": 2, "docs_written": 1, "doc_write_failures": 1,
            "bytes_read": 0, "duration_ms": 7
        });
        let expected = json!({
            "doc_id": "r", "source": "a", "target": "b", "state": "completed", "engine": "native", "error_count": 0,
            "start_time": "1970-01-01T00:00:00.000Z", "next_try": null, "info": info
        });
        assert_eq!(doc.json(), expected);
        let state = RunState::Running;
        let running = Doc { state, changes_pending: Some(5), through_seq: Some(3), error: None, ..doc.clone() }.json();
        assert_eq!((&running["info"]["changes_pending"], &running["info"]["through_seq"]), (&json!(5), &json!(3)));
        assert_eq!(running["info"]["duration_ms"], Value::Null);
        let (state, error, run) = (RunState::Crashing, Some(String::from("gone")), None);
        let never_ran = Doc { state, error_count: 2, error, run, next_try_at: started_at, ..doc }.json();
        assert_eq!(never_ran["info"], json!({ "error": "gone" }));
        assert_eq!((&never_ran["error_count"], &never_ran["start_time"]), (&json!(2), &Value::Null));
        assert_eq!(never_ran["next_try"], "1970-01-01T00:00:00.000Z");
    }
}
