//! A small client of CouchDB, and a reader of `_global_changes` that says when each row came.
//!
//! Not the program's own client: a measure must not share the faults of what it measures.

use anyhow::{Context, bail};
use futures_util::{StreamExt, TryStreamExt, stream};
use reqwest::{Client, Method, StatusCode};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// CouchDB makes no more databases a second with more requests at once.
const CONCURRENCY: usize = 16;

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

    pub async fn create_db(&self, db: &str) -> anyhow::Result<()> {
        self.ask(Method::PUT, db, None).await.map(drop)
    }

    pub async fn put_doc(&self, db: &str, id: &str, doc: Value) -> anyhow::Result<()> {
        self.ask(Method::PUT, &format!("{db}/{id}"), Some(doc)).await.map(drop)
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

    /// Waits for the next change after `since`, and says where the feed then stands.
    pub async fn longpoll(&self, db: &str, since: &str) -> anyhow::Result<(Vec<String>, String)> {
        let path = format!("{db}/_changes?feed=longpoll&timeout=60000&since={since}");
        let page = self.ask(Method::GET, &path, None).await?;
        let rows = page["results"].as_array().cloned().unwrap_or_default();
        let ids = rows.iter().filter_map(|row| row["id"].as_str()).map(str::to_string).collect();
        Ok((ids, page["last_seq"].as_str().context("a feed without last_seq")?.to_string()))
    }

    pub async fn last_seq(&self, db: &str) -> anyhow::Result<String> {
        let page = self.ask(Method::GET, &format!("{db}/_changes?since=now"), None).await?;
        Ok(page["last_seq"].as_str().context("a feed without last_seq")?.to_string())
    }

    /// All databases with this prefix, and the sieves in `_global_changes`.
    pub async fn delete_everything_of(&self, prefix: &str) -> anyhow::Result<()> {
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
        let url = format!("{}/_global_changes/_changes?feed=continuous&heartbeat=5000&since={since}", self.base);
        let mut response = self.client.get(url).send().await.map_err(reqwest::Error::without_url)?.error_for_status()?;
        let rows = Rows::default();
        let seen = rows.clone();
        let reading = tokio::spawn(async move {
            let mut buffer = Vec::new();
            while let Ok(Some(chunk)) = response.chunk().await {
                let now = Instant::now();
                buffer.extend_from_slice(&chunk);
                while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = buffer.drain(..=end).collect();
                    let row: Value = serde_json::from_slice(&line).unwrap_or_default();
                    if let Some(db) = row["id"].as_str().and_then(|id| id.strip_prefix("updated:")) {
                        seen.lock().unwrap_or_else(PoisonError::into_inner).entry(db.to_string()).or_default().push(now);
                    }
                }
            }
        });
        Ok(FeedTimes { rows, reading })
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
    reading: JoinHandle<()>,
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

    fn seen_after(&self, db: &str, after: Instant) -> Option<Instant> {
        let rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        rows.get(db)?.iter().find(|at| **at >= after).copied()
    }
}

impl Drop for FeedTimes {
    fn drop(&mut self) {
        self.reading.abort();
    }
}
