//! `_replicate`: one replication run by CouchDB itself.

use super::{Couch, REPLICATE, Result};
use reqwest::Method;
use serde::Deserialize;
use serde_json::Value;

/// The parts of the answer that we report; a run with nothing to do has no history.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct ReplicateAnswer {
    #[serde(default)]
    pub ok: bool,
    #[serde(default)]
    pub no_changes: bool,
    #[serde(default)]
    pub history: Vec<ReplicationHistory>,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub struct ReplicationHistory {
    #[serde(default)]
    pub missing_checked: u64,
    #[serde(default)]
    pub missing_found: u64,
    #[serde(default)]
    pub docs_read: u64,
    #[serde(default)]
    pub docs_written: u64,
    #[serde(default)]
    pub doc_write_failures: u64,
}

impl Couch {
    /// Answers when the run is over, however long that takes: the caller bounds the time.
    pub async fn replicate(&self, params: &Value) -> Result<ReplicateAnswer> {
        let request = self.request_without_read_timeout(Method::POST, "_replicate").json(params);
        self.json(REPLICATE, request).await
    }
}
