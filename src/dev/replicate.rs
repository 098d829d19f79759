//! `POST /_replicate`, once from start to end.
//!
//! The replication protocol, with a checkpoint on both sides. A database of this server is read and written in place, any
//! other by HTTP; the steps are the same.

use super::answer::{Answer, Failure, json_value};
use super::changes::{ChangesOptions, Feed, Filter};
use super::database::Database;
use super::documents::write_bulk;
use super::incoming::new_id;
use super::read::DocOptions;
use super::request::Call;
use super::seq::Since;
use super::server::Server;
use crate::couch::encode_segment;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use url::Url;

const REPLICATION_ID_VERSION: u32 = 4;
/// Rows of a page of changes, and documents of a batch.
const PAGE_ROWS: u64 = 500;
const BATCH_DOCS: usize = 100;
/// CouchDB keeps as many sessions in a checkpoint.
const HISTORY_MAX: usize = 50;
/// A remote server that says nothing for this long is given up.
const REMOTE_TIMEOUT: Duration = Duration::from_secs(60);

pub async fn answer(server: &Arc<Server>, call: &Call) -> Answer {
    let asked = call.posted_json()?;
    for word in ["continuous", "cancel"] {
        if asked.get(word) == Some(&Value::Bool(true)) {
            return Err(Failure::not_implemented(format!("_replicate with {word}")));
        }
    }
    if asked.get("filter").is_some() {
        return Err(Failure::not_implemented("_replicate with a filter of a design document"));
    }
    let source = Peer::open(server, asked.get("source"))?;
    let target = Peer::open(server, asked.get("target"))?;
    source.must_exist().await?;
    if asked.get("create_target") == Some(&Value::Bool(true)) {
        target.create_unless_there().await?;
    }
    target.must_exist().await?;
    let answer = Run::new(server, &asked, source, target)?.run().await?;
    Ok(json_value(200, &answer))
}

/// A database of this server, at the moment of one step.
type Here<'a> = (&'a Arc<Server>, Arc<Database>);

/// One side of a replication.
enum Peer {
    /// A database of this server: looked up at each step, because it may go.
    Here {
        server: Arc<Server>,
        name: String,
    },
    There {
        http: reqwest::Client,
        url: Url,
        headers: HeaderMap,
    },
}

impl Peer {
    /// A name, a URL, or the object form.
    fn open(server: &Arc<Server>, asked: Option<&Value>) -> Result<Self, Failure> {
        let missing = || Failure::new(500, "error", "Missing replicator database");
        let asked = asked.ok_or_else(missing)?;
        let address = asked.as_str().or_else(|| asked.get("url").and_then(Value::as_str)).ok_or_else(missing)?;
        if !address.starts_with("http://") && !address.starts_with("https://") {
            return Ok(Peer::Here { server: server.clone(), name: address.to_string() });
        }
        let bad = |what: &str| Failure::bad_request(format!("{what} of a replication cannot be read"));
        let mut url = Url::parse(address).map_err(|_| bad("the URL"))?;
        let mut headers = HeaderMap::new();
        for (name, value) in asked.get("headers").and_then(Value::as_object).into_iter().flatten() {
            let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| bad("a header"))?;
            let value = value.as_str().and_then(|value| HeaderValue::from_str(value).ok()).ok_or_else(|| bad("a header"))?;
            headers.insert(name, value);
        }
        let decode = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
        let in_url = (!url.username().is_empty()).then(|| (decode(url.username()), decode(url.password().unwrap_or(""))));
        let basic = asked.pointer("/auth/basic");
        let text = |key: &str| basic.and_then(|basic| basic.get(key)).and_then(Value::as_str).map(String::from);
        if let Some((user, password)) = text("username").zip(text("password")).or(in_url) {
            let value = format!("Basic {}", STANDARD.encode(format!("{user}:{password}")));
            let mut value = HeaderValue::from_str(&value).map_err(|_| bad("a password"))?;
            value.set_sensitive(true);
            headers.insert(http::header::AUTHORIZATION, value);
        }
        let _ = url.set_username("");
        let _ = url.set_password(None);
        url.set_query(None);
        url.set_fragment(None);
        let path = format!("{}/", url.path().trim_end_matches('/'));
        url.set_path(&path);
        Ok(Peer::There { http: server.http.clone(), url, headers })
    }

    /// For people and for the replication's id: no credentials.
    fn address(&self) -> String {
        match self {
            Peer::Here { server, name } => format!("http://{}/{}/", server.address, encode_segment(name)),
            Peer::There { url, .. } => url.to_string(),
        }
    }

    fn here(&self) -> Option<Result<Here<'_>, Failure>> {
        let Peer::Here { server, name } = self else { return None };
        Some(server.database(name).map(|db| (server, db)).map_err(|_| self.not_found()))
    }

    fn not_found(&self) -> Failure {
        Failure::new(500, "db_not_found", format!("could not open {}", self.address()))
    }

    async fn must_exist(&self) -> Result<(), Failure> {
        match self.here() {
            Some(found) => found.map(drop),
            None => match self.ask(Method::GET, "", None).await? {
                (200, _) => Ok(()),
                (404, _) => Err(self.not_found()),
                (401 | 403, _) => {
                    Err(Failure::new(500, "replication_auth_error", format!("unauthorized to access {}", self.address())))
                }
                (status, body) => Err(self.unexpected("the database", status, &body)),
            },
        }
    }

    async fn create_unless_there(&self) -> Result<(), Failure> {
        if let Peer::Here { server, name } = self {
            return match server.create(name) {
                Err(failure) if failure.status != 412 => Err(failure),
                _ => Ok(()),
            };
        }
        match self.ask(Method::PUT, "", None).await? {
            (201 | 202 | 412, _) => Ok(()),
            (status, body) => Err(self.unexpected("create the database", status, &body)),
        }
    }

    async fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Result<(u16, Value), Failure> {
        let Peer::There { http, url, headers } = self else { return Err(self.not_found()) };
        let mut request = http.request(method, format!("{url}{path}")).headers(headers.clone()).timeout(REMOTE_TIMEOUT);
        request = request.header(http::header::ACCEPT, "application/json");
        if let Some(body) = body {
            request = request.json(body);
        }
        let lost = |error: reqwest::Error| Failure::new(500, "replication_error", crate::couch::chain_of(&error));
        let response = request.send().await.map_err(lost)?;
        let status = response.status().as_u16();
        let body = response.bytes().await.map_err(lost)?;
        Ok((status, serde_json::from_slice(&body).unwrap_or(Value::Null)))
    }

    async fn ask_ok(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, Failure> {
        match self.ask(method, path, body).await? {
            (200..300, body) => Ok(body),
            (status, body) => Err(self.unexpected(path.split('?').next().unwrap_or(path), status, &body)),
        }
    }

    fn unexpected(&self, what: &str, status: u16, body: &Value) -> Failure {
        let reason = body.get("reason").and_then(Value::as_str).unwrap_or("no reason given");
        let reason: String = reason.chars().take(200).collect();
        Failure::new(500, "replication_error", format!("{what} of {} answered {status}: {reason}", self.address()))
    }

    /// A page of changes: its rows, the position after it, and whether more may come.
    async fn changes(&self, since: &Value, rule: &Rule) -> Result<(Vec<Value>, Value, bool), Failure> {
        if let Some(found) = self.here() {
            let (_, db) = found?;
            let from = db.resolve(Since::from_json(since)?);
            let (text, piece) = db.changes_page(from, PAGE_ROWS, &rule.options()?);
            let rows = serde_json::from_str(&text).map_err(|_| Failure::new(500, "error", "changes cannot be read"))?;
            return Ok((rows, json!(db.seq(piece.position)), !piece.at_end || piece.rows >= PAGE_ROWS));
        }
        let since = since.as_str().map_or_else(|| since.to_string(), String::from);
        let style = if rule.winners_only { "main_only" } else { "all_docs" };
        let mut path = format!("_changes?style={style}&limit={PAGE_ROWS}&since={}", encode_segment(&since));
        let body = match (&rule.doc_ids, &rule.selector) {
            (Some(ids), _) => {
                path.push_str("&filter=_doc_ids");
                Some(json!({"doc_ids": ids}))
            }
            (None, Some(selector)) => {
                path.push_str("&filter=_selector");
                Some(json!({"selector": selector}))
            }
            (None, None) => None,
        };
        let method = if body.is_some() { Method::POST } else { Method::GET };
        let mut page = self.ask_ok(method, &path, body.as_ref()).await?;
        let rows = match page.get_mut("results").map(Value::take) {
            Some(Value::Array(rows)) => rows,
            _ => return Err(self.unexpected("_changes", 200, &json!({"reason": "no results"}))),
        };
        let pending = page.get("pending").and_then(Value::as_u64);
        let more = pending.map_or(!rows.is_empty(), |pending| pending > 0) && !rows.is_empty();
        Ok((rows, page.get("last_seq").cloned().unwrap_or(Value::Null), more))
    }

    async fn revs_diff(&self, revs: Value) -> Result<Map<String, Value>, Failure> {
        let diff = match self.here() {
            Some(found) => found?.1.revs_diff(revs.as_object().unwrap_or(&Map::new()))?,
            None => self.ask_ok(Method::POST, "_revs_diff", Some(&revs)).await?,
        };
        Ok(diff.as_object().cloned().unwrap_or_default())
    }

    /// The revisions themselves, with their history and their attachments' bytes; how many were not to be had.
    async fn bulk_get(&self, docs: Vec<Value>) -> Result<(Vec<Value>, u64), Failure> {
        let mut answer = match self.here() {
            Some(found) => {
                let options = DocOptions { attachments: true, revs: true, ..Default::default() };
                let text = found?.1.bulk_get(&docs, true, &options);
                serde_json::from_str(&text).map_err(|_| Failure::new(500, "error", "documents cannot be read"))?
            }
            None => {
                let path = "_bulk_get?revs=true&latest=true&attachments=true";
                self.ask_ok(Method::POST, path, Some(&json!({"docs": docs}))).await?
            }
        };
        let results = answer.get_mut("results").and_then(Value::as_array_mut).map(std::mem::take).unwrap_or_default();
        let (mut found, mut lost) = (Vec::new(), 0);
        for mut result in results {
            for row in result.get_mut("docs").and_then(Value::as_array_mut).map(std::mem::take).unwrap_or_default() {
                match row {
                    Value::Object(mut row) if row.contains_key("ok") => found.extend(row.remove("ok")),
                    _ => lost += 1,
                }
            }
        }
        Ok((found, lost))
    }

    /// How many documents the target refused.
    async fn bulk_docs(&self, docs: Vec<Value>) -> Result<u64, Failure> {
        let body = json!({"new_edits": false, "docs": docs});
        let rows = match self.here() {
            Some(found) => {
                let (server, db) = found?;
                Value::Array(write_bulk(server, &db, body)?)
            }
            None => self.ask_ok(Method::POST, "_bulk_docs", Some(&body)).await?,
        };
        let refused = |row: &&Value| row.get("error").is_some();
        Ok(rows.as_array().map_or(0, |rows| rows.iter().filter(refused).count() as u64))
    }

    async fn local(&self, id: &str) -> Result<Option<Value>, Failure> {
        if let Some(found) = self.here() {
            return Ok(found?.1.local(id).ok().and_then(|(text, _)| serde_json::from_str(&text).ok()));
        }
        match self.ask(Method::GET, &format!("_local/{id}"), None).await? {
            (200, body) => Ok(Some(body)),
            (404, _) => Ok(None),
            (status, body) => Err(self.unexpected("_local", status, &body)),
        }
    }

    async fn put_local(&self, id: &str, mut doc: Value, rev: Option<&Value>) -> Result<(), Failure> {
        if let Some(found) = self.here() {
            let number = rev.and_then(Value::as_str).and_then(|rev| rev.strip_prefix("0-")?.parse().ok()).unwrap_or(0);
            found?.1.put_local(id, number, &doc);
            return Ok(());
        }
        if let Some(rev) = rev {
            doc["_rev"] = rev.clone();
        }
        self.ask_ok(Method::PUT, &format!("_local/{id}"), Some(&doc)).await.map(drop)
    }
}

/// Which documents are replicated.
struct Rule {
    doc_ids: Option<Vec<String>>,
    selector: Option<Value>,
    winners_only: bool,
    since: Value,
}

impl Rule {
    fn parse(asked: &Value) -> Self {
        let ids = asked.get("doc_ids").and_then(Value::as_array);
        Self {
            doc_ids: ids.map(|ids| ids.iter().filter_map(Value::as_str).map(unquoted).collect()),
            selector: asked.get("selector").cloned(),
            winners_only: asked.get("winning_revs_only") == Some(&Value::Bool(true)),
            since: asked.get("since_seq").cloned().unwrap_or(json!(0)),
        }
    }

    fn options(&self) -> Result<ChangesOptions, Failure> {
        let filter = match (&self.doc_ids, &self.selector) {
            (Some(ids), _) => Filter::DocIds(ids.iter().cloned().collect()),
            (None, Some(selector)) => Filter::selector(selector)?,
            (None, None) => Filter::All,
        };
        Ok(ChangesOptions {
            since: Since::Start,
            limit: None,
            feed: Feed::Normal,
            include_docs: false,
            all_leaves: !self.winners_only,
            docs: DocOptions::default(),
            filter,
            seq_interval: None,
            heartbeat: None,
            timeout: Duration::ZERO,
        })
    }
}

/// CouchDB takes the ids as a URL would have them.
fn unquoted(id: &str) -> String {
    percent_encoding::percent_decode_str(&id.replace('+', " ")).decode_utf8_lossy().into_owned()
}

#[derive(Default)]
struct Stats {
    missing_checked: u64,
    missing_found: u64,
    docs_read: u64,
    docs_written: u64,
    doc_write_failures: u64,
}

struct Run {
    source: Peer,
    target: Peer,
    rule: Rule,
    id: String,
    stats: Stats,
}

impl Run {
    fn new(server: &Server, asked: &Value, source: Peer, target: Peer) -> Result<Self, Failure> {
        let rule = Rule::parse(asked);
        let sides = [server.uuid.clone(), source.address(), target.address()];
        let what = json!([sides, rule.doc_ids, rule.selector, rule.winners_only, rule.since]).to_string();
        let digest = Sha256::digest(what.as_bytes());
        let id = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { source, target, rule, id, stats: Stats::default() })
    }

    async fn run(mut self) -> Result<Value, Failure> {
        let start_time = SystemTime::now();
        let session_id = new_id();
        let (on_source, on_target) = (self.source.local(&self.id).await?, self.target.local(&self.id).await?);
        let common = common_position(on_source.as_ref(), on_target.as_ref());
        let started_at = common.unwrap_or_else(|| self.rule.since.clone());
        let mut position = started_at.clone();
        let mut any_row = false;
        loop {
            let (rows, last_seq, more) = self.source.changes(&position, &self.rule).await?;
            any_row |= !rows.is_empty();
            self.carry(rows).await?;
            position = last_seq;
            if !more {
                break;
            }
        }
        let older = on_source.as_ref().and_then(|doc| doc.get("history")).and_then(Value::as_array).cloned().unwrap_or_default();
        if !any_row {
            return Ok(match on_source {
                None => json!({"ok": true, "no_changes": true}),
                Some(doc) => json!({
                    "ok": true, "no_changes": true, "session_id": doc["session_id"], "source_last_seq": doc["source_last_seq"],
                    "replication_id_version": REPLICATION_ID_VERSION, "history": older,
                }),
            });
        }
        let entry = json!({
            "session_id": session_id,
            "start_time": httpdate::fmt_http_date(start_time),
            "end_time": httpdate::fmt_http_date(SystemTime::now()),
            "start_last_seq": started_at,
            "end_last_seq": position,
            "recorded_seq": position,
            "missing_checked": self.stats.missing_checked,
            "missing_found": self.stats.missing_found,
            "docs_read": self.stats.docs_read,
            "docs_written": self.stats.docs_written,
            "doc_write_failures": self.stats.doc_write_failures,
        });
        let history: Vec<Value> = std::iter::once(entry).chain(older).take(HISTORY_MAX).collect();
        let checkpoint = json!({
            "session_id": session_id, "source_last_seq": position, "replication_id_version": REPLICATION_ID_VERSION, "history": history,
        });
        let rev = |doc: &Option<Value>| doc.as_ref().and_then(|doc| doc.get("_rev")).cloned();
        self.target.put_local(&self.id, checkpoint.clone(), rev(&on_target).as_ref()).await?;
        self.source.put_local(&self.id, checkpoint.clone(), rev(&on_source).as_ref()).await?;
        let mut answer = checkpoint;
        answer["ok"] = json!(true);
        Ok(answer)
    }

    /// Brings a page's missing revisions over.
    async fn carry(&mut self, rows: Vec<Value>) -> Result<(), Failure> {
        let mut asked = Map::new();
        for row in &rows {
            let Some(id) = row.get("id").and_then(Value::as_str) else { continue };
            let changes = row.get("changes").and_then(Value::as_array).into_iter().flatten();
            let revs: Vec<Value> = changes.filter_map(|change| change.get("rev").cloned()).collect();
            self.stats.missing_checked += revs.len() as u64;
            asked.insert(id.into(), Value::Array(revs));
        }
        if asked.is_empty() {
            return Ok(());
        }
        let missing = self.target.revs_diff(Value::Object(asked)).await?;
        let mut wanted = Vec::new();
        for (id, row) in missing {
            let revs = row.get("missing").and_then(Value::as_array).cloned().unwrap_or_default();
            self.stats.missing_found += revs.len() as u64;
            wanted.extend(revs.into_iter().map(|rev| json!({"id": id, "rev": rev})));
        }
        for batch in wanted.chunks(BATCH_DOCS) {
            let (docs, lost) = self.source.bulk_get(batch.to_vec()).await?;
            self.stats.docs_read += docs.len() as u64;
            self.stats.doc_write_failures += lost;
            let sent = docs.len() as u64;
            let refused = if docs.is_empty() { 0 } else { self.target.bulk_docs(docs).await? };
            self.stats.doc_write_failures += refused;
            self.stats.docs_written += sent.saturating_sub(refused);
        }
        Ok(())
    }
}

/// The newest position that both sides' checkpoints name, by the session that recorded it.
fn common_position(source: Option<&Value>, target: Option<&Value>) -> Option<Value> {
    let (source, target) = (source?, target?);
    if source.get("session_id").is_some() && source.get("session_id") == target.get("session_id") {
        return source.get("source_last_seq").cloned();
    }
    let sessions = |doc: &Value| doc.get("history").and_then(Value::as_array).cloned().unwrap_or_default();
    let of_target = sessions(target);
    let common =
        sessions(source).into_iter().find(|entry| of_target.iter().any(|other| other["session_id"] == entry["session_id"]));
    common.and_then(|entry| entry.get("recorded_seq").cloned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn a_replication_goes_on_from_the_newest_common_session() {
        let side = |own: &str, sessions: &[&str]| {
            let history: Vec<Value> =
                sessions.iter().map(|id| json!({"session_id": id, "recorded_seq": format!("seq of {id}")})).collect();
            json!({"session_id": own, "source_last_seq": format!("seq of {own}"), "history": history})
        };
        let cases = [
            (side("c", &["c", "b"]), side("c", &["c"]), Some("seq of c")),
            (side("c", &["c", "b", "a"]), side("d", &["d", "b", "a"]), Some("seq of b")),
            (side("c", &["c"]), side("d", &["d"]), None),
        ];
        for (source, target, expected) in cases {
            assert_eq!(common_position(Some(&source), Some(&target)), expected.map(|seq| json!(seq)));
        }
        assert_eq!(common_position(None, Some(&side("a", &["a"]))), None);
    }
}
