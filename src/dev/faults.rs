//! Faults on demand: what a real CouchDB does on its bad days, for tests. None by default.
//!
//! Tests in this process use the handle, others `POST /_dev/faults`.

use super::answer::Failure;
use http::Method;
use serde::Deserialize;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// More rules than this are refused: they are tests' own, and each request walks them.
const RULES_MAX: usize = 1000;

/// What happens to the requests that match.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultRule {
    /// None is any.
    pub method: Option<String>,
    /// The decoded path begins with it; None is any.
    pub path: Option<String>,
    /// How many matching requests it meets; None is all.
    pub times: Option<u32>,
    /// Answer this. Below 300 the request is carried out first: 202 is a write that was stored without a quorum.
    pub status: Option<u16>,
    /// Carry the request out although the answer is an error: what a node does that dies before it answers.
    #[serde(default)]
    pub apply: bool,
    pub retry_after_secs: Option<u64>,
    /// Wait before the request is carried out.
    pub delay_ms: Option<u64>,
    /// Close the connection in the middle of the answer's body.
    #[serde(default)]
    pub cut: bool,
    /// Where to cut; None is the middle of the first piece.
    pub cut_after_bytes: Option<usize>,
}

/// Documents that are refused, one by one, as a `validate_doc_update` does.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    /// None is any.
    pub db: Option<String>,
    /// The document's id begins with it.
    pub id: String,
    /// A document's own 401, and not a 403.
    #[serde(default)]
    pub unauthorized: bool,
}

/// What one request meets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Met {
    pub delay: Duration,
    pub status: Option<(u16, bool, Option<u64>)>,
    pub cut: Option<Option<usize>>,
}

/// The handle; clones share the faults.
#[derive(Clone)]
pub struct Faults {
    inner: Arc<Mutex<Inner>>,
    silent: watch::Sender<bool>,
}

#[derive(Default)]
struct Inner {
    rules: Vec<FaultRule>,
    rewind: HashSet<String>,
    lose_rows: u64,
    lose_rows_of: HashSet<String>,
    down: bool,
    refusals: Vec<Refusal>,
    document_bytes_max: Option<usize>,
    /// Ends every open connection.
    connections: CancellationToken,
}

impl Default for Faults {
    fn default() -> Self {
        Self { inner: Arc::default(), silent: watch::Sender::new(false) }
    }
}

impl Faults {
    /// The next `_changes` with a `since` on this database starts at 0.
    pub fn rewind(&self, db: &str) {
        self.lock().rewind.insert(db.into());
    }

    /// `_global_changes` loses its next rows.
    pub fn lose_rows(&self, count: u64) {
        self.lock().lose_rows = count;
    }

    /// `_global_changes` loses every row of this database, until `clear`.
    pub fn lose_rows_of(&self, db: &str) {
        self.lock().lose_rows_of.insert(db.into());
    }

    /// Documents of this database whose id begins so are refused, until `clear`.
    pub fn refuse(&self, db: &str, id: &str) {
        self.add_refusal(Refusal { db: Some(db.into()), id: id.into(), unauthorized: false });
    }

    fn add_refusal(&self, refusal: Refusal) {
        let mut inner = self.lock();
        if inner.refusals.len() < RULES_MAX {
            inner.refusals.push(refusal);
        }
    }

    /// CouchDB's `max_document_size`.
    pub fn limit_documents(&self, bytes_max: usize) {
        self.lock().document_bytes_max = Some(bytes_max);
    }

    pub fn add(&self, rule: FaultRule) {
        let mut inner = self.lock();
        if inner.rules.len() < RULES_MAX {
            inner.rules.push(rule);
        }
    }

    /// The next `times` matching requests are answered with this status.
    pub fn answer(&self, method: Option<Method>, path: &str, status: u16, times: u32) {
        let method = method.map(|method| method.to_string());
        self.add(FaultRule { method, path: Some(path.into()), times: Some(times), status: Some(status), ..Default::default() });
    }

    /// Every matching request waits first.
    pub fn delay(&self, path: &str, delay: Duration) {
        let delay_ms = u64::try_from(delay.as_millis()).ok();
        self.add(FaultRule { path: Some(path.into()), delay_ms, ..Default::default() });
    }

    /// The next `times` matching answers break off in their middle.
    pub fn cut(&self, path: &str, times: u32) {
        self.add(FaultRule { path: Some(path.into()), times: Some(times), cut: true, ..Default::default() });
    }

    /// Feeds stay open and say nothing, no rows and no heartbeats, as when a node is stopped; later they go on.
    pub fn silence(&self, silent: bool) {
        self.silent.send_replace(silent);
    }

    /// Every connection is cut and no other accepted, as when the server is gone; its data stays.
    pub fn down(&self, down: bool) {
        let mut inner = self.lock();
        inner.down = down;
        if down {
            std::mem::take(&mut inner.connections).cancel();
        }
    }

    /// Every open connection is cut once.
    pub fn cut_connections(&self) {
        std::mem::take(&mut self.lock().connections).cancel();
    }

    pub fn clear(&self) {
        let mut inner = self.lock();
        let connections = std::mem::take(&mut inner.connections);
        *inner = Inner { connections, ..Default::default() };
        drop(inner);
        self.silence(false);
    }

    /// The body of `POST /_dev/faults`.
    pub fn apply_json(&self, body: serde_json::Value) -> Result<(), Failure> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Asked {
            #[serde(default)]
            clear: bool,
            #[serde(default)]
            rewind: Vec<String>,
            lose_rows: Option<u64>,
            #[serde(default)]
            lose_rows_of: Vec<String>,
            #[serde(default)]
            rules: Vec<FaultRule>,
            #[serde(default)]
            refuse: Vec<Refusal>,
            document_bytes_max: Option<usize>,
            silent: Option<bool>,
            #[serde(default)]
            cut_connections: bool,
        }
        let asked: Asked = serde_json::from_value(body).map_err(|error| Failure::bad_request(error.to_string()))?;
        if asked.clear {
            self.clear();
        }
        asked.rewind.iter().for_each(|db| self.rewind(db));
        asked.lose_rows_of.iter().for_each(|db| self.lose_rows_of(db));
        if let Some(count) = asked.lose_rows {
            self.lose_rows(count);
        }
        asked.rules.into_iter().for_each(|rule| self.add(rule));
        asked.refuse.into_iter().for_each(|refusal| self.add_refusal(refusal));
        if let Some(bytes_max) = asked.document_bytes_max {
            self.limit_documents(bytes_max);
        }
        if let Some(silent) = asked.silent {
            self.silence(silent);
        }
        if asked.cut_connections {
            self.cut_connections();
        }
        Ok(())
    }

    /// What this request meets; uses up the rules that match. The first rule with a status, and the first cut, count.
    pub(super) fn meet(&self, method: &Method, path: &str) -> Met {
        let mut inner = self.lock();
        let mut met = Met::default();
        for rule in &mut inner.rules {
            let matches = rule.method.as_deref().is_none_or(|wanted| wanted.eq_ignore_ascii_case(method.as_str()))
                && rule.path.as_deref().is_none_or(|prefix| path.starts_with(prefix));
            let surplus = rule.status.is_some() && met.status.is_some();
            if !matches || surplus || rule.times == Some(0) {
                continue;
            }
            rule.times = rule.times.map(|times| times - 1);
            met.delay += Duration::from_millis(rule.delay_ms.unwrap_or(0));
            met.status = met.status.or(rule.status.map(|status| (status, rule.apply || status < 300, rule.retry_after_secs)));
            if rule.cut && met.cut.is_none() {
                met.cut = Some(rule.cut_after_bytes);
            }
        }
        inner.rules.retain(|rule| rule.times != Some(0));
        met
    }

    /// Why this document is not written.
    pub(super) fn refusal(&self, db: &str, id: &str) -> Option<Failure> {
        let inner = self.lock();
        let refused = |refusal: &&Refusal| refusal.db.as_deref().is_none_or(|of| of == db) && id.starts_with(&refusal.id);
        let refusal = inner.refusals.iter().find(refused)?;
        let (status, error) = if refusal.unauthorized { (401, "unauthorized") } else { (403, "forbidden") };
        Some(Failure::new(status, error, "a refusal that was asked for"))
    }

    /// Why nothing of a request with this document is written.
    pub(super) fn too_large(&self, id: &str, bytes: impl FnOnce() -> usize) -> Option<Failure> {
        let bytes_max = self.lock().document_bytes_max?;
        (bytes() > bytes_max).then(|| Failure::new(413, "document_too_large", id.to_string()))
    }

    pub(super) fn takes_rewind(&self, db: &str) -> bool {
        let mut inner = self.lock();
        !inner.rewind.is_empty() && inner.rewind.remove(db)
    }

    pub(super) fn loses_row_of(&self, db: &str) -> bool {
        let mut inner = self.lock();
        if inner.lose_rows_of.contains(db) {
            return true;
        }
        let loses = inner.lose_rows > 0;
        inner.lose_rows = inner.lose_rows.saturating_sub(1);
        loses
    }

    pub(super) fn silent(&self) -> watch::Receiver<bool> {
        self.silent.subscribe()
    }

    /// What ends a new connection, or None while the server is down.
    pub(super) fn connection(&self) -> Option<CancellationToken> {
        let inner = self.lock();
        (!inner.down).then(|| inner.connections.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_meets_its_number_of_matching_requests() {
        let faults = Faults::default();
        faults.answer(Some(Method::PUT), "/a/", 503, 2);
        assert_eq!(faults.meet(&Method::GET, "/a/x"), Met::default());
        assert_eq!(faults.meet(&Method::PUT, "/b/x"), Met::default());
        for _ in 0..2 {
            assert_eq!(faults.meet(&Method::PUT, "/a/x").status, Some((503, false, None)));
        }
        assert_eq!(faults.meet(&Method::PUT, "/a/x"), Met::default());
    }

    #[test]
    fn rules_with_a_status_wait_for_their_turn() {
        let faults = Faults::default();
        faults.answer(None, "/", 429, 1);
        faults.answer(None, "/", 202, 1);
        let statuses: Vec<_> = (0..3).map(|_| faults.meet(&Method::GET, "/a").status).collect();
        assert_eq!(statuses, [Some((429, false, None)), Some((202, true, None)), None]);
    }

    #[test]
    fn an_unknown_word_is_refused() {
        let faults = Faults::default();
        assert!(faults.apply_json(serde_json::json!({"rules": [{"stauts": 500}]})).is_err());
        assert!(faults.apply_json(serde_json::json!({"rewind": ["a"]})).is_ok());
        assert!(faults.takes_rewind("a") && !faults.takes_rewind("a"));
    }
}
