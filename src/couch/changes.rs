//! `_changes`: pages and the continuous feed.
//!
//! A row that cannot be read never ends a page or a feed: it is handed out as malformed, its neighbours as usual.

use super::{Couch, CouchError, Result, Seq, encode_segment};
use bytes::{Bytes, BytesMut};
use reqwest::{Method, Response};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug, Clone, Deserialize)]
pub struct Row {
    pub seq: Seq,
    pub id: String,
    #[serde(default)]
    pub changes: Vec<Rev>,
    #[serde(default)]
    pub deleted: bool,
    /// The document's text as CouchDB sent it; `null` for a document that cannot be read any more.
    #[serde(default)]
    pub doc: Option<Arc<RawValue>>,
}

impl Row {
    /// The winning revision, or nothing on a server that sent none.
    pub fn rev(&self) -> &str {
        self.changes.first().map_or("", |rev| rev.rev.as_str())
    }
}

#[derive(Debug, Clone, Deserialize)]
pub struct Rev {
    pub rev: String,
}

/// The number before a revision's dash: of two revisions of one document the higher is the later one.
pub fn generation(rev: &str) -> u64 {
    rev.split('-').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Of the revision that a document is.
pub fn generation_of(doc: &Value) -> u64 {
    generation(doc["_rev"].as_str().unwrap_or_default())
}

/// One page of changes.
#[derive(Debug)]
pub struct Changes {
    pub rows: Vec<Row>,
    /// Rows that could not be read: what was wrong with each. They are passed over.
    pub malformed: Vec<String>,
    pub last_seq: Seq,
    /// How many rows come after this page; None where the server does not say (PouchDB).
    pub pending: Option<u64>,
}

#[derive(Debug, Clone, Default)]
pub struct ChangesQuery {
    pub since: Option<Seq>,
    pub limit: Option<usize>,
    pub include_docs: bool,
    /// Documents name their conflicted revisions.
    pub conflicts: bool,
}

impl ChangesQuery {
    fn pairs(&self) -> Vec<(&'static str, String)> {
        let mut pairs = Vec::new();
        if let Some(since) = &self.since {
            pairs.push(("since", since.as_query()));
        }
        if let Some(limit) = self.limit {
            pairs.push(("limit", limit.to_string()));
        }
        if self.include_docs {
            pairs.push(("include_docs", String::from("true")));
        }
        if self.conflicts {
            pairs.push(("conflicts", String::from("true")));
        }
        pairs
    }
}

#[derive(Deserialize)]
struct Page<R> {
    results: Vec<R>,
    last_seq: Seq,
    #[serde(default)]
    pending: Option<u64>,
}

impl Couch {
    /// One page of a database's changes.
    pub async fn changes(&self, db: &str, query: &ChangesQuery) -> Result<Changes> {
        let path = format!("{}/_changes", encode_segment(db));
        let request = self.request(Method::GET, &path).query(&query.pairs());
        let response = self.send("_changes", request).await?;
        let body = self.body(response).await?;
        let changes = parse_page(&body)?;
        match (query.limit, changes.pending) {
            // A server without `pending` has more where the page is full, nobody knows how much.
            (Some(limit), None) if changes.rows.len() + changes.malformed.len() >= limit => {
                Ok(Changes { pending: Some(PENDING_UNKNOWN), ..changes })
            }
            _ => Ok(changes),
        }
    }

    /// The continuous feed. It has no total timeout: `Feed::next` has one on silence.
    pub async fn changes_feed(&self, db: &str, query: &ChangesQuery, heartbeat: Duration) -> Result<Feed> {
        let path = format!("{}/_changes", encode_segment(db));
        let request = self
            .request_without_read_timeout(Method::GET, &path)
            .query(&[("feed", "continuous")])
            .query(&[("heartbeat", heartbeat.as_millis().to_string())])
            .query(&query.pairs());
        let response = self.send("_changes", request).await?;
        Ok(Feed { couch: self.clone(), response, buffer: BytesMut::new(), silence_max: heartbeat * 2 })
    }
}

/// More than any database has.
const PENDING_UNKNOWN: u64 = u64::MAX / 2;

fn parse_page(body: &[u8]) -> Result<Changes> {
    if let Ok(page) = serde_json::from_slice::<Page<Row>>(body) {
        return Ok(Changes { rows: page.results, malformed: Vec::new(), last_seq: page.last_seq, pending: page.pending });
    }
    let page: Page<Box<RawValue>> = serde_json::from_slice(body).map_err(|e| CouchError::Malformed(format!("_changes: {e}")))?;
    let mut rows = Vec::with_capacity(page.results.len());
    let mut malformed = Vec::new();
    for raw in page.results {
        match serde_json::from_str::<Row>(raw.get()) {
            Ok(row) => rows.push(row),
            Err(error) => malformed.push(format!("{error} in {}", excerpt(raw.get()))),
        }
    }
    Ok(Changes { rows, malformed, last_seq: page.last_seq, pending: page.pending })
}

fn excerpt(text: &str) -> String {
    let mut short: String = text.chars().take(80).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

/// An open continuous feed.
pub struct Feed {
    couch: Couch,
    response: Response,
    buffer: BytesMut,
    silence_max: Duration,
}

#[derive(Debug)]
pub enum FeedLine {
    Heartbeat,
    Row(Row),
    /// CouchDB's last word: it ended the feed by itself, for example because the database is gone.
    LastSeq(Seq),
    /// A line that is no row; what was wrong with it.
    Malformed(String),
}

/// A row with a large document is still a line; one beyond this is not read to its end.
const LINE_BYTES_MAX: usize = 64 * 1024 * 1024;

impl Feed {
    /// The next line; None at the end of the stream. Silence beyond two heartbeats is an error: a stopped node keeps its
    /// sockets open and says nothing.
    pub async fn next(&mut self) -> Result<Option<FeedLine>> {
        loop {
            if let Some(line) = self.take_line() {
                return Ok(Some(parse_line(&line)));
            }
            if self.buffer.len() > LINE_BYTES_MAX {
                return Err(CouchError::Malformed(format!("a line longer than {LINE_BYTES_MAX} bytes")));
            }
            match tokio::time::timeout(self.silence_max, self.response.chunk()).await {
                Ok(Ok(Some(chunk))) => self.buffer.extend_from_slice(&chunk),
                Ok(Ok(None)) if self.buffer.is_empty() => return Ok(None),
                // The connection was cut within a line: what is there is not a row.
                Ok(Ok(None)) => return Err(self.suspicious(String::from("the feed ended within a line"))),
                Ok(Err(error)) => return Err(self.couch.lost(&error)),
                Err(_) => return Err(self.suspicious(format!("the feed was silent for {:?}", self.silence_max))),
            }
        }
    }

    /// True while whole lines are waiting that were already received.
    pub fn has_buffered_line(&self) -> bool {
        self.buffer.contains(&b'\n')
    }

    fn take_line(&mut self) -> Option<Bytes> {
        let end = self.buffer.iter().position(|byte| *byte == b'\n')?;
        Some(self.buffer.split_to(end + 1).freeze())
    }

    fn suspicious(&self, what: String) -> CouchError {
        let error = CouchError::Unreachable(what);
        self.couch.health().suspect(&error);
        error
    }
}

fn parse_line(line: &[u8]) -> FeedLine {
    #[derive(Deserialize)]
    struct Last {
        last_seq: Seq,
    }
    let line = line.trim_ascii();
    if line.is_empty() {
        return FeedLine::Heartbeat;
    }
    match serde_json::from_slice::<Row>(line) {
        Ok(row) => FeedLine::Row(row),
        Err(error) => match serde_json::from_slice::<Last>(line) {
            Ok(last) => FeedLine::LastSeq(last.last_seq),
            Err(_) => FeedLine::Malformed(format!("{error} in {}", excerpt(&String::from_utf8_lossy(line)))),
        },
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn generations_are_numbers() {
        for (rev, expected) in [("10-a", 10), ("9-z", 9), ("", 0), ("x-1", 0), ("-", 0)] {
            assert_eq!(generation(rev), expected, "{rev}");
        }
    }

    #[test]
    fn a_malformed_row_leaves_its_neighbours() {
        let body = br#"{"results":[{"seq":"1-a","id":"x","changes":[{"rev":"1-r"}]},{"seq":{},"id":7},
            {"seq":3,"id":"y","changes":[],"deleted":true}],"last_seq":"3-c","pending":2}"#;
        let page = parse_page(body).expect("the page is readable");
        assert_eq!(page.rows.iter().map(|row| row.id.as_str()).collect::<Vec<_>>(), ["x", "y"]);
        assert_eq!(page.malformed.len(), 1);
        assert_eq!(page.pending, Some(2));
        assert!(page.rows[1].deleted);
        assert_eq!(page.rows[0].rev(), "1-r");
    }

    #[test]
    fn lines_of_a_feed() {
        let cases: [(&[u8], &str); 5] = [
            (b"\n", "heartbeat"),
            (br#"{"seq":"5-x","id":"updated:a","changes":[{"rev":"1-a"}]}"#, "row"),
            (br#"{"last_seq":"7-x","pending":0}"#, "last"),
            (b"{\"seq\":", "malformed"),
            (b"[1,2]", "malformed"),
        ];
        for (line, expected) in cases {
            let kind = match parse_line(line) {
                FeedLine::Heartbeat => "heartbeat",
                FeedLine::Row(_) => "row",
                FeedLine::LastSeq(_) => "last",
                FeedLine::Malformed(_) => "malformed",
            };
            assert_eq!(kind, expected, "{}", String::from_utf8_lossy(line));
        }
    }
}
