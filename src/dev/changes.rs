//! `_changes`: one page, a long poll, or a feed that never ends.
//!
//! Rows leave in pieces, and no lock is held between two of them: a feed costs its reader's position and one piece.

use super::answer::{Answer, Failure, push_json_string, with_body};
use super::database::{Database, Doc, Notice};
use super::read::{DocOptions, push_doc, push_winner};
use super::request::{Call, Query};
use super::seq::Since;
use super::server::Server;
use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use rouchdb_core::document::Revision;
use rouchdb_core::rev_tree::collect_leaves;
use rouchdb_query::CompiledSelector;
use serde_json::Value;
use std::collections::HashSet;
use std::convert::Infallible;
use std::fmt::Write;
use std::ops::Bound::{Excluded, Included};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// CouchDB's default, and its longest `timeout`.
const TIMEOUT_MAX: Duration = Duration::from_secs(60);
const HEARTBEAT_DEFAULT: Duration = Duration::from_secs(60);
/// What one piece reads under the lock at most, and how long its text may grow before it is sent.
const PIECE_ROWS_MAX: usize = 1000;
const PIECE_BYTES_MAX: usize = 256 * 1024;

/// CouchDB's `changes_doc_ids_optimization_threshold`.
const LOOKED_UP_IDS_MAX: usize = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feed {
    Normal,
    Longpoll,
    Continuous,
}

pub struct ChangesOptions {
    pub since: Since,
    pub limit: Option<u64>,
    pub feed: Feed,
    pub include_docs: bool,
    pub all_leaves: bool,
    pub docs: DocOptions,
    pub filter: Filter,
    pub seq_interval: Option<u64>,
    pub heartbeat: Option<Duration>,
    pub timeout: Duration,
}

pub enum Filter {
    All,
    DocIds(HashSet<String>),
    Selector(Box<CompiledSelector>),
    Design,
}

impl ChangesOptions {
    pub fn parse(query: &Query, body: &Value, db: &Database) -> Result<Self, Failure> {
        let feed = match query.get("feed").unwrap_or("normal") {
            "normal" => Feed::Normal,
            "longpoll" => Feed::Longpoll,
            "continuous" | "live" => Feed::Continuous,
            "eventsource" => return Err(Failure::not_implemented("feed=eventsource")),
            _ => return Err(Failure::bad_request("Supported `feed` types: normal, continuous, live, longpoll, eventsource")),
        };
        if query.is_true("descending") {
            return Err(Failure::not_implemented("_changes with descending=true"));
        }
        let heartbeat = match query.get("heartbeat") {
            None | Some("false") => None,
            Some("true") => Some(HEARTBEAT_DEFAULT),
            Some(text) => {
                let bad =
                    |_| Failure::bad_request("Invalid heartbeat value. Expecting a positive integer value (in milliseconds).");
                Some(Duration::from_millis(text.parse::<u64>().map_err(bad)?.max(1)))
            }
        };
        let timeout = query.number("timeout")?.map_or(TIMEOUT_MAX, Duration::from_millis).min(TIMEOUT_MAX);
        let docs =
            DocOptions { attachments: query.is_true("attachments"), conflicts: query.is_true("conflicts"), ..Default::default() };
        Ok(Self {
            since: Since::parse(query.get("since").unwrap_or("0"))?,
            limit: query.number("limit")?,
            feed,
            include_docs: query.is_true("include_docs"),
            all_leaves: query.get("style") == Some("all_docs"),
            docs,
            filter: Filter::parse(query, body, db)?,
            seq_interval: query.number("seq_interval")?.filter(|interval| *interval > 1),
            heartbeat,
            timeout,
        })
    }
}

impl Filter {
    fn parse(query: &Query, body: &Value, db: &Database) -> Result<Self, Failure> {
        match query.get("filter") {
            None => Ok(Filter::All),
            Some("_design") => Ok(Filter::Design),
            Some("_doc_ids") => {
                let in_query = query.json("doc_ids")?;
                let ids = in_query.as_ref().or_else(|| body.get("doc_ids")).and_then(Value::as_array);
                let ids = ids.ok_or_else(|| Failure::bad_request("`doc_ids` filter parameter is not a list of doc ids."))?;
                Ok(Filter::DocIds(ids.iter().filter_map(Value::as_str).map(String::from).collect()))
            }
            Some("_selector") => {
                let none = || Failure::bad_request("Selector error: expected a JSON object");
                Self::selector(body.get("selector").filter(|selector| selector.is_object()).ok_or_else(none)?)
            }
            Some("_view") => Err(Failure::not_implemented("views are not executed")),
            Some(name) => match name.split_once('/') {
                Some((ddoc, _)) if db.has_live(&format!("_design/{ddoc}")) => {
                    Err(Failure::not_implemented("filters of design documents are not executed"))
                }
                Some(_) => Err(Failure::missing()),
                None => Err(Failure::bad_request("`filter` must be of the form `designname/filtername`")),
            },
        }
    }

    pub fn selector(selector: &Value) -> Result<Self, Failure> {
        let invalid = |error: rouchdb_core::error::RouchError| {
            let text = error.to_string();
            Failure::bad_request(text.strip_prefix("bad request: ").unwrap_or(&text).to_string())
        };
        let compiled = CompiledSelector::new(selector).map_err(invalid)?;
        Ok(Filter::Selector(Box::new(compiled)))
    }

    /// CouchDB looks few ids up instead of reading all changes, and then counts as pending every row that it did not send:
    /// a client must not go on until `pending` is 0.
    fn is_looked_up(&self) -> bool {
        match self {
            Filter::DocIds(ids) => ids.len() <= LOOKED_UP_IDS_MAX,
            Filter::Design => true,
            Filter::All | Filter::Selector(_) => false,
        }
    }

    /// The revisions of a document that its row names; none means no row.
    fn revs(&self, id: &str, doc: &Doc, all_leaves: bool) -> Vec<Revision> {
        let passes = match self {
            Filter::All | Filter::Selector(_) => true,
            Filter::DocIds(ids) => ids.contains(id),
            Filter::Design => id.starts_with("_design/"),
        };
        if !passes {
            return Vec::new();
        }
        let mut revs = match all_leaves {
            true => collect_leaves(&doc.tree).into_iter().map(|leaf| Revision::new(leaf.pos, leaf.hash)).collect(),
            false => vec![doc.winner.clone()],
        };
        if let Filter::Selector(selector) = self {
            revs.retain(|rev| matches(selector, id, doc, rev));
        }
        revs
    }
}

fn matches(selector: &CompiledSelector, id: &str, doc: &Doc, rev: &Revision) -> bool {
    let Some(stored) = doc.stored(rev) else { return false };
    let mut text = String::new();
    push_doc(&mut text, id, doc, stored, &DocOptions::default());
    serde_json::from_str::<Value>(&text).is_ok_and(|value| selector.matches(&value))
}

/// How far a piece came.
pub struct Piece {
    pub position: u64,
    pub rows: u64,
    pub at_end: bool,
}

impl Database {
    /// Appends rows after `from` and up to `until`, at most `rows_max`, each begun by `separator` (the first of all is not).
    fn changes(&self, out: &mut String, from: u64, until: u64, rows_max: u64, sent: u64, options: &ChangesOptions) -> Piece {
        let inner = self.read();
        let until = until.min(inner.update_seq);
        let mut piece = Piece { position: from, rows: 0, at_end: false };
        if from >= until {
            return Piece { position: from.max(until), rows: 0, at_end: true };
        }
        for (scanned, (number, id)) in inner.by_seq.range((Excluded(from), Included(until))).enumerate() {
            if scanned >= PIECE_ROWS_MAX || out.len() >= PIECE_BYTES_MAX || piece.rows >= rows_max {
                return piece;
            }
            piece.position = *number;
            let Some(doc) = inner.docs.get(id) else { continue };
            let revs = options.filter.revs(id, doc, options.all_leaves);
            if revs.is_empty() {
                continue;
            }
            piece.rows += 1;
            let row = sent + piece.rows;
            if options.feed != Feed::Continuous && row > 1 {
                out.push_str(",\n");
            }
            let has_seq = options.seq_interval.is_none_or(|interval| (row + 1).is_multiple_of(interval));
            let seq = has_seq.then(|| self.seq(*number));
            push_row(out, seq.as_deref(), id, doc, &revs, options);
            if options.feed == Feed::Continuous {
                out.push('\n');
            }
        }
        // The last row may have been the one that the limit allowed: the page ends at that row.
        let ended_by_limit = piece.rows >= rows_max;
        Piece { position: if ended_by_limit { piece.position } else { until }, at_end: true, ..piece }
    }

    fn pending(&self, from: u64) -> u64 {
        let inner = self.read();
        if from >= inner.update_seq {
            return 0;
        }
        inner.by_seq.range((Excluded(from), Included(u64::MAX))).count() as u64
    }

    /// A page for the replicator of this process: one piece's rows as JSON, the position after it, and whether it is the end.
    pub(super) fn changes_page(&self, from: u64, rows_max: u64, options: &ChangesOptions) -> (String, Piece) {
        let mut rows = String::from("[");
        let piece = self.changes(&mut rows, from, u64::MAX, rows_max, 0, options);
        rows.push(']');
        (rows, piece)
    }
}

fn push_row(out: &mut String, seq: Option<&str>, id: &str, doc: &Doc, revs: &[Revision], options: &ChangesOptions) {
    match seq {
        Some(seq) => drop(write!(out, "{{\"seq\":\"{seq}\",\"id\":")),
        None => out.push_str("{\"seq\":null,\"id\":"),
    }
    push_json_string(out, id);
    out.push_str(",\"changes\":[");
    for (n, rev) in revs.iter().enumerate() {
        if n > 0 {
            out.push(',');
        }
        out.push_str("{\"rev\":");
        push_json_string(out, &rev.to_string());
        out.push('}');
    }
    out.push(']');
    if doc.deleted {
        out.push_str(",\"deleted\":true");
    }
    if options.include_docs {
        out.push_str(",\"doc\":");
        push_winner(out, id, doc, &options.docs);
    }
    out.push('}');
}

/// `GET` and `POST /db/_changes`.
pub fn answer(server: &Server, db: Arc<Database>, call: &Call) -> Answer {
    let body = match call.method {
        http::Method::POST if !call.body.is_empty() => call.posted_json()?,
        _ => Value::Null,
    };
    let options = ChangesOptions::parse(&call.query, &body, &db)?;
    let mut position = db.resolve(options.since);
    if options.since != Since::Start && server.faults.takes_rewind(&db.name) {
        position = 0;
    }
    let until = if options.feed == Feed::Normal { db.resolve(Since::Now) } else { u64::MAX };
    let reader = Reader {
        notice: db.subscribe(),
        silent: server.faults.silent(),
        closing: server.closing.clone(),
        step: if options.feed == Feed::Continuous { Step::Rows } else { Step::Head },
        deadline: Instant::now() + options.timeout,
        sent: 0,
        db,
        options,
        since: position,
        position,
        until,
    };
    let pieces = stream::unfold(reader, |mut reader| async move {
        let piece = reader.next().await?;
        Some((Ok::<_, Infallible>(piece), reader))
    });
    Ok(with_body(200, "application/json", Body::from_stream(pieces)))
}

enum Step {
    Head,
    Rows,
    Wait,
    Tail { after_timeout: bool },
    Done,
}

/// One open answer.
struct Reader {
    db: Arc<Database>,
    options: ChangesOptions,
    since: u64,
    position: u64,
    until: u64,
    sent: u64,
    step: Step,
    notice: watch::Receiver<Notice>,
    silent: watch::Receiver<bool>,
    closing: CancellationToken,
    deadline: Instant,
}

impl Reader {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            match self.step {
                Step::Head => {
                    self.step = Step::Rows;
                    return Some(Bytes::from_static(b"{\"results\":[\n"));
                }
                Step::Rows => {
                    self.wait_while_silent().await;
                    if matches!(self.step, Step::Rows)
                        && let Some(rows) = self.rows()
                    {
                        return Some(rows);
                    }
                }
                Step::Wait => {
                    if let Some(heartbeat) = self.wait().await {
                        return Some(heartbeat);
                    }
                }
                Step::Tail { after_timeout } => {
                    self.step = Step::Done;
                    return Some(self.tail(after_timeout));
                }
                Step::Done => return None,
            }
        }
    }

    /// The next rows, if there are any, and what comes after them.
    fn rows(&mut self) -> Option<Bytes> {
        let deleted = self.notice.borrow_and_update().deleted;
        let rows_left = self.options.limit.map_or(u64::MAX, |limit| limit - self.sent.min(limit));
        if deleted || rows_left == 0 {
            self.step = Step::Tail { after_timeout: false };
            return None;
        }
        let mut text = String::new();
        let piece = self.db.changes(&mut text, self.position, self.until, rows_left, self.sent, &self.options);
        self.position = piece.position;
        self.sent += piece.rows;
        if piece.rows > 0 {
            self.deadline = Instant::now() + self.options.timeout;
        }
        self.step = match self.options.feed {
            _ if piece.rows >= rows_left => Step::Tail { after_timeout: false },
            _ if !piece.at_end => Step::Rows,
            Feed::Normal => Step::Tail { after_timeout: false },
            Feed::Longpoll if self.sent > 0 => Step::Tail { after_timeout: false },
            Feed::Longpoll | Feed::Continuous => Step::Wait,
        };
        (!text.is_empty()).then(|| Bytes::from(text))
    }

    /// Until something changes; a heartbeat where it takes long.
    async fn wait(&mut self) -> Option<Bytes> {
        let patience = match self.options.heartbeat {
            Some(heartbeat) => Instant::now() + heartbeat,
            None => self.deadline,
        };
        tokio::select! {
            changed = self.notice.changed() => {
                self.step = if changed.is_ok() { Step::Rows } else { Step::Tail { after_timeout: false } };
                None
            }
            () = self.closing.cancelled() => {
                self.step = Step::Done;
                None
            }
            () = tokio::time::sleep_until(patience) => {
                if self.options.heartbeat.is_none() {
                    self.step = Step::Tail { after_timeout: true };
                    return None;
                }
                self.wait_while_silent().await;
                Some(Bytes::from_static(b"\n"))
            }
        }
    }

    async fn wait_while_silent(&mut self) {
        if self.options.feed == Feed::Normal || !*self.silent.borrow() {
            return;
        }
        tokio::select! {
            _ = self.silent.wait_for(|silent| !silent) => {}
            () = self.closing.cancelled() => self.step = Step::Done,
        }
    }

    fn tail(&self, after_timeout: bool) -> Bytes {
        let (seq, mut pending) = (self.db.seq(self.position), self.db.pending(self.position));
        if self.options.feed == Feed::Normal && self.options.filter.is_looked_up() {
            pending = self.db.pending(self.since).saturating_sub(self.sent);
        }
        let last = format!("\"last_seq\":\"{seq}\",\"pending\":{pending}}}\n");
        Bytes::from(match self.options.feed {
            Feed::Continuous if after_timeout => format!("\n{{{last}"),
            Feed::Continuous => format!("{{{last}"),
            _ => format!("\n],\n{last}"),
        })
    }
}
