//! A small client of CouchDB, and a reader of `_global_changes` that says when each row came.
//!
//! Not the program's own client: a measure must not share the faults of what it measures.

use anyhow::{Context, bail, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use reqwest::{Client, Method, StatusCode};
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

/// CouchDB makes no more databases a second with more requests at once.
const CONCURRENCY: usize = 16;
/// Connections for documents: with more, two cores write no faster.
const WRITERS: usize = 32;
/// Others may write there all the time.
const REST_MAX: Duration = Duration::from_secs(60);

#[derive(Clone)]
pub struct Couch {
    client: Client,
    /// With user and password, which reqwest sends as basic authentication.
    base: String,
}

impl Couch {
    pub fn new(url: &str) -> anyhow::Result<Self> {
        let client = Client::builder().tcp_nodelay(true).build().context("build the client")?;
        Ok(Self { client, base: url.trim_end_matches('/').to_string() })
    }

    pub fn db_url(&self, db: &str) -> String {
        format!("{}/{db}", self.base)
    }

    pub async fn version(&self) -> anyhow::Result<String> {
        let welcome = self.ask(Method::GET, "", None).await?;
        Ok(welcome["version"].as_str().unwrap_or("unknown").to_string())
    }

    async fn ask(&self, method: Method, path: &str, body: Option<Value>) -> anyhow::Result<Value> {
        let mut request = self.client.request(method.clone(), format!("{}/{path}", self.base));
        if let Some(body) = body {
            request = request.json(&body);
        }
        // The URL holds a password.
        let response = request.send().await.map_err(reqwest::Error::without_url).with_context(|| format!("{method} /{path}"))?;
        let status = response.status();
        let body: Value = response.json().await.map_err(reqwest::Error::without_url).with_context(|| format!("read /{path}"))?;
        // A missing database is what a clean-up wants; a made one is what a repeated PUT wants.
        let is_fine = (method == Method::DELETE && status == StatusCode::NOT_FOUND) || status == StatusCode::PRECONDITION_FAILED;
        if !status.is_success() && !is_fine {
            bail!("{method} /{path}: {status} {body}");
        }
        Ok(body)
    }

    /// Until CouchDB compacts and indexes nothing: that is most of its work for a while after many writes.
    pub async fn at_rest(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + REST_MAX;
        let mut idle = 0;
        while idle < 3 && Instant::now() < deadline {
            let tasks = self.ask(Method::GET, "_active_tasks", None).await?;
            idle = if tasks.as_array().is_some_and(Vec::is_empty) { idle + 1 } else { 0 };
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        Ok(())
    }

    pub async fn create_db(&self, db: &str) -> anyhow::Result<()> {
        self.ask(Method::PUT, db, None).await.map(drop)
    }

    pub async fn delete_db(&self, db: &str) -> anyhow::Result<()> {
        self.ask(Method::DELETE, db, None).await.map(drop)
    }

    pub async fn put_doc(&self, db: &str, id: &str, doc: Value) -> anyhow::Result<()> {
        self.ask(Method::PUT, &format!("{db}/{id}"), Some(doc)).await.map(drop)
    }

    pub async fn doc(&self, db: &str, id: &str) -> anyhow::Result<Value> {
        self.ask(Method::GET, &format!("{db}/{id}"), None).await
    }

    /// A new revision of a document, or its first.
    pub async fn overwrite(&self, db: &str, id: &str, mut doc: Value) -> anyhow::Result<()> {
        if let Ok(known) = self.doc(db, id).await {
            doc["_rev"] = known["_rev"].clone();
        }
        self.put_doc(db, id, doc).await
    }

    pub async fn delete_doc(&self, db: &str, id: &str) -> anyhow::Result<()> {
        let doc = self.doc(db, id).await?;
        let rev = doc["_rev"].as_str().context("a document without _rev")?;
        self.ask(Method::DELETE, &format!("{db}/{id}?rev={rev}"), None).await.map(drop)
    }

    /// One document in each database, over connections that are open already, as fast as CouchDB takes them.
    pub async fn put_docs(&self, docs: &[(&String, String)]) -> anyhow::Result<()> {
        let writes = docs.iter().map(|(db, id)| self.put_doc(db, id, json!({ "value": 1 })));
        stream::iter(writes).buffer_unordered(WRITERS).try_collect().await
    }

    /// So that no write that is measured has to connect first.
    pub async fn open_connections(&self) -> anyhow::Result<()> {
        futures_util::future::try_join_all((0..WRITERS).map(|_| self.version())).await.map(drop)
    }

    /// A document with one attachment, which nobody ever holds whole.
    pub async fn put_attachment(&self, db: &str, id: &str, bytes: u64) -> anyhow::Result<()> {
        const CHUNK: usize = 64 * 1024;
        let chunks = (0..bytes).step_by(CHUNK).map(move |start| {
            let mut chunk = vec![0; CHUNK.min((bytes - start) as usize)];
            fastrand::fill(&mut chunk);
            Ok::<_, std::convert::Infallible>(chunk)
        });
        let request = self.client.put(format!("{}/{db}/{id}/attachment", self.base));
        let request = request.header("content-type", "application/octet-stream").header("content-length", bytes);
        let response = request.body(reqwest::Body::wrap_stream(stream::iter(chunks))).send().await;
        let response = response.map_err(reqwest::Error::without_url).context("write the attachment")?;
        ensure!(response.status().is_success(), "write the attachment: {}", response.status());
        Ok(())
    }

    /// One run by CouchDB, to its end.
    pub async fn replicate(&self, source: &str, target: &str) -> anyhow::Result<Value> {
        let body = json!({ "source": self.db_url(source), "target": self.db_url(target) });
        self.ask(Method::POST, "_replicate", Some(body)).await
    }

    /// How many of the `_replicator` documents whose ids begin so are in this state.
    pub async fn replications_in_state(&self, id_prefix: &str, state: &str) -> anyhow::Result<usize> {
        let docs = self.ask(Method::GET, "_scheduler/docs/_replicator?limit=10000", None).await?;
        let is_meant = |doc: &&Value| doc["doc_id"].as_str().is_some_and(|id| id.starts_with(id_prefix)) && doc["state"] == state;
        Ok(docs["docs"].as_array().into_iter().flatten().filter(is_meant).count())
    }

    pub async fn delete_docs_of(&self, db: &str, id_prefix: &str) -> anyhow::Result<()> {
        let found = self.ask(Method::GET, &format!("{db}/_all_docs?{}", range(id_prefix)), None).await?;
        let rows = found["rows"].as_array().into_iter().flatten();
        let docs = rows.filter(|row| row["id"].as_str().is_some_and(|id| id.starts_with(id_prefix)));
        let docs: Vec<Value> =
            docs.map(|row| json!({ "_id": row["id"], "_rev": row["value"]["rev"], "_deleted": true })).collect();
        match docs.is_empty() {
            true => Ok(()),
            false => self.bulk_docs(db, docs).await,
        }
    }

    /// One new document in each, as fast as CouchDB takes them.
    pub async fn put_doc_in_each(&self, dbs: &[String], id: &str) -> anyhow::Result<()> {
        let writes = dbs.iter().map(|db| self.put_doc(db, id, json!({ "value": 1 })));
        stream::iter(writes).buffer_unordered(CONCURRENCY).try_collect().await
    }

    pub async fn create_dbs(&self, dbs: &[String]) -> anyhow::Result<()> {
        stream::iter(dbs.iter().map(|db| self.create_db(db))).buffer_unordered(CONCURRENCY).try_collect().await
    }

    pub async fn bulk_docs(&self, db: &str, docs: Vec<Value>) -> anyhow::Result<()> {
        self.ask(Method::POST, &format!("{db}/_bulk_docs"), Some(json!({ "docs": docs }))).await.map(drop)
    }

    pub async fn doc_count(&self, db: &str) -> anyhow::Result<u64> {
        Ok(self.ask(Method::GET, db, None).await?["doc_count"].as_u64().unwrap_or_default())
    }

    pub async fn changes_with_docs(&self, db: &str) -> anyhow::Result<Vec<Value>> {
        let mut page = self.ask(Method::GET, &format!("{db}/_changes?include_docs=true"), None).await?;
        match page["results"].take() {
            Value::Array(rows) => Ok(rows),
            other => bail!("no rows of changes: {other}"),
        }
    }

    pub async fn last_seq(&self, db: &str) -> anyhow::Result<String> {
        let page = self.ask(Method::GET, &format!("{db}/_changes?since=now"), None).await?;
        Ok(page["last_seq"].as_str().context("a feed without last_seq")?.to_string())
    }

    /// All databases with this prefix, what replicates them, and the sieves in `_global_changes`.
    pub async fn delete_everything_of(&self, prefix: &str) -> anyhow::Result<()> {
        self.delete_docs_of("_replicator", prefix).await.context("delete the documents in _replicator")?;
        let names = self.ask(Method::GET, &format!("_all_dbs?{}", range(prefix)), None).await?;
        let names: Vec<&str> = names.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let deletions = names.iter().filter(|name| name.starts_with(prefix)).map(|name| self.ask(Method::DELETE, name, None));
        stream::iter(deletions).buffer_unordered(CONCURRENCY).try_collect::<Vec<_>>().await?;
        let sieves = format!("_global_changes/_all_docs?{}", range(&format!("_design/{prefix}")));
        for sieve in self.ask(Method::GET, &sieves, None).await?["rows"].as_array().into_iter().flatten() {
            if let (Some(id), Some(rev)) = (sieve["id"].as_str(), sieve["value"]["rev"].as_str()) {
                self.ask(Method::DELETE, &format!("_global_changes/{id}?rev={rev}"), None).await?;
            }
        }
        Ok(())
    }

    pub async fn watch_feed(&self) -> anyhow::Result<FeedTimes> {
        let since = self.last_seq("_global_changes").await?;
        let rows = Rows::default();
        let seen = rows.clone();
        let reading = self.read_changes("_global_changes", &since, move |id, now| {
            if let Some(db) = id.strip_prefix("updated:") {
                seen.lock().unwrap_or_else(PoisonError::into_inner).entry(db.to_string()).or_default().push(now);
            }
        });
        Ok(FeedTimes { rows, _reading: reading.await? })
    }

    /// Every document that comes into one of these from now on.
    pub async fn watch(&self, dbs: &[String]) -> anyhow::Result<Watch> {
        let (sender, arrivals) = mpsc::unbounded_channel();
        let readers = dbs.iter().enumerate().map(|(at, db)| {
            let sender = sender.clone();
            async move {
                let since = self.last_seq(db).await?;
                let note = move |id: &str, now| drop(sender.send(Arrived { db: at, id: id.to_string(), at: now }));
                self.read_changes(db, &since, note).await
            }
        });
        let readers = stream::iter(readers.collect::<Vec<_>>()).buffer_unordered(CONCURRENCY).try_collect().await?;
        Ok(Watch { arrivals, _readers: readers })
    }

    async fn read_changes(
        &self,
        db: &str,
        since: &str,
        mut note: impl FnMut(&str, Instant) + Send + 'static,
    ) -> anyhow::Result<AbortOnDropHandle<()>> {
        let url = format!("{}/{db}/_changes?feed=continuous&heartbeat=5000&since={since}", self.base);
        let response = self.client.get(url).send().await.and_then(reqwest::Response::error_for_status);
        let mut response = response.map_err(reqwest::Error::without_url).with_context(|| format!("read the changes of {db}"))?;
        Ok(AbortOnDropHandle::new(tokio::spawn(async move {
            let mut buffer = Vec::new();
            while let Ok(Some(chunk)) = response.chunk().await {
                let now = Instant::now();
                buffer.extend_from_slice(&chunk);
                while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = buffer.drain(..=end).collect();
                    let row: Value = serde_json::from_slice(&line).unwrap_or_default();
                    if let Some(id) = row["id"].as_str() {
                        note(id, now);
                    }
                }
            }
        })))
    }
}

/// Everything that starts with the prefix.
fn range(prefix: &str) -> String {
    format!("startkey=%22{prefix}%22&endkey=%22{prefix}%7B%22")
}

type Rows = Arc<Mutex<HashMap<String, Vec<Instant>>>>;

/// When each database's row came to a reader that does nothing else.
pub struct FeedTimes {
    rows: Rows,
    _reading: AbortOnDropHandle<()>,
}

impl FeedTimes {
    /// The first row of this database after a moment.
    pub async fn first_after(&self, db: &str, after: Instant) -> anyhow::Result<Instant> {
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            if let Some(at) = self.seen_after(db, after) {
                return Ok(at);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        bail!("the feed never told of {db}")
    }

    pub fn seen_after(&self, db: &str, after: Instant) -> Option<Instant> {
        let rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        rows.get(db)?.iter().find(|at| **at >= after).copied()
    }
}

pub struct Arrived {
    /// Which of the databases that are watched.
    pub db: usize,
    pub id: String,
    pub at: Instant,
}

/// What comes into some databases, read from a feed of each.
pub struct Watch {
    arrivals: mpsc::UnboundedReceiver<Arrived>,
    _readers: Vec<AbortOnDropHandle<()>>,
}

impl Watch {
    pub async fn next(&mut self) -> anyhow::Result<Arrived> {
        self.arrivals.recv().await.context("the feeds of the targets have ended")
    }

    /// When the last of these came: (which database, id).
    pub async fn last_of(&mut self, mut wanted: HashSet<(usize, String)>, patience: Duration) -> anyhow::Result<Instant> {
        let deadline = tokio::time::Instant::now() + patience;
        let mut last = Instant::now();
        while !wanted.is_empty() {
            let Ok(arrived) = tokio::time::timeout_at(deadline, self.next()).await else {
                bail!("{} documents were not replicated after {patience:?}", wanted.len());
            };
            let Arrived { db, id, at } = arrived?;
            if wanted.remove(&(db, id)) {
                last = at;
            }
        }
        Ok(last)
    }
}
