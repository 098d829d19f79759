//! Documents and databases: read, write, list.

use super::{Couch, CouchError, Result, Seq, encode_doc_id, encode_segment};
use reqwest::{Method, RequestBuilder};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::sync::Arc;

/// By default (`[chttpd] max_db_number_for_dbs_info_req`).
pub const DBS_INFO_KEYS_MAX: usize = 100;

/// What `_bulk_docs` said of one document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WriteResult {
    Saved { rev: String },
    Conflict,
    Refused { reason: String },
}

/// One database as `_dbs_info` tells of it.
#[derive(Debug, Clone)]
pub struct DbInfo {
    pub update_seq: Seq,
    pub doc_count: u64,
    pub doc_del_count: u64,
    pub instance_start_time: String,
}

/// A document as it is now.
#[derive(Debug, Clone)]
pub enum Current {
    Missing,
    Deleted { rev: String },
    Is { rev: String, doc: Option<Arc<RawValue>> },
}

/// A row of `_all_docs` with its document.
#[derive(Deserialize)]
struct DocRow {
    #[serde(default)]
    doc: Option<Value>,
}

fn all_docs_path(db: &str) -> String {
    format!("{}/_all_docs", encode_segment(db))
}

#[derive(Deserialize)]
struct RawInfo {
    update_seq: Seq,
    #[serde(default)]
    doc_count: u64,
    #[serde(default)]
    doc_del_count: u64,
    #[serde(default)]
    instance_start_time: Option<Value>,
}

impl RawInfo {
    fn into_info(self) -> DbInfo {
        DbInfo {
            update_seq: self.update_seq,
            doc_count: self.doc_count,
            doc_del_count: self.doc_del_count,
            instance_start_time: match self.instance_start_time {
                Some(Value::String(text)) => text,
                Some(other) => other.to_string(),
                None => String::from("0"),
            },
        }
    }
}

impl Couch {
    pub async fn db_info(&self, db: &str) -> Result<DbInfo> {
        let raw: RawInfo = self.get("db", &encode_segment(db)).await?;
        Ok(raw.into_info())
    }

    pub async fn db_exists(&self, db: &str) -> Result<bool> {
        match self.db_info(db).await {
            Ok(_) => Ok(true),
            Err(CouchError::NotFound(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Creates a database; false where it was there already.
    pub async fn create_db(&self, db: &str) -> Result<bool> {
        match self.send("db", self.request(Method::PUT, &encode_segment(db))).await {
            Ok(_) => Ok(true),
            Err(CouchError::Status { status: 412, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Deletes a database; false where there was none.
    pub async fn delete_db(&self, db: &str) -> Result<bool> {
        match self.send("db", self.request(Method::DELETE, &encode_segment(db))).await {
            Ok(_) => Ok(true),
            Err(CouchError::NotFound(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// One page of database names that start at `from` (inclusive).
    pub async fn all_dbs(&self, from: Option<&str>, limit: usize) -> Result<Vec<String>> {
        let mut request = self.request(Method::GET, "_all_dbs").query(&[("limit", limit.to_string())]);
        if let Some(from) = from {
            request = request.query(&[("start_key", Value::from(from).to_string())]);
        }
        self.json("_all_dbs", request).await
    }

    /// `_dbs_info`: for each name, in order, its info, or None where there is no such database. At most `DBS_INFO_KEYS_MAX`.
    pub async fn dbs_info(&self, names: &[&str]) -> Result<Vec<Option<DbInfo>>> {
        #[derive(Deserialize)]
        struct Entry {
            info: Option<Value>,
        }
        // One database whose info cannot be read must not hide the others'.
        let info_of = |entry: Entry| serde_json::from_value::<RawInfo>(entry.info?).ok().map(RawInfo::into_info);
        let request = self.request(Method::POST, "_dbs_info").json(&json!({ "keys": names }));
        let entries: Vec<Entry> = self.json("_dbs_info", request).await?;
        if entries.len() != names.len() {
            return Err(CouchError::Malformed(format!("_dbs_info answered {} of {} names", entries.len(), names.len())));
        }
        Ok(entries.into_iter().map(info_of).collect())
    }

    pub async fn get_doc(&self, db: &str, id: &str) -> Result<Option<Value>> {
        match self.get("doc", &format!("{}/{}", encode_segment(db), encode_doc_id(id))).await {
            Ok(doc) => Ok(Some(doc)),
            Err(CouchError::NotFound(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The winner, with the names of its conflicted revisions in `_conflicts`.
    pub async fn doc_with_conflicts(&self, db: &str, id: &str) -> Result<Option<Value>> {
        self.doc_by(db, id, &[("conflicts", "true")]).await
    }

    /// One revision that is not compacted away.
    pub async fn doc_at(&self, db: &str, id: &str, rev: &str) -> Result<Option<Value>> {
        self.doc_by(db, id, &[("rev", rev)]).await
    }

    async fn doc_by(&self, db: &str, id: &str, query: &[(&str, &str)]) -> Result<Option<Value>> {
        let path = format!("{}/{}", encode_segment(db), encode_doc_id(id));
        match self.json("doc", self.request(Method::GET, &path).query(query)).await {
            Ok(doc) => Ok(Some(doc)),
            Err(CouchError::NotFound(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The winning revisions of many documents, in the order of `ids`; their texts where they are wanted.
    pub async fn current_docs(&self, db: &str, ids: &[String], include_docs: bool) -> Result<Vec<Current>> {
        #[derive(Deserialize)]
        struct Entry {
            #[serde(default)]
            value: Option<Winner>,
            #[serde(default)]
            doc: Option<Arc<RawValue>>,
        }
        #[derive(Deserialize)]
        struct Winner {
            rev: String,
            #[serde(default)]
            deleted: bool,
        }
        let current = |entry: Entry| match entry.value {
            None => Current::Missing,
            Some(Winner { rev, deleted: true }) => Current::Deleted { rev },
            Some(Winner { rev, deleted: false }) => Current::Is { rev, doc: entry.doc },
        };
        Ok(self.all_docs_by_keys(db, ids, include_docs).await?.into_iter().map(current).collect())
    }

    /// The fields that a deletion left, which its revision keeps; None where it was compacted away.
    pub async fn tombstone(&self, db: &str, id: &str, rev: &str) -> Result<Option<Arc<RawValue>>> {
        let path = format!("{}/{}", encode_segment(db), encode_doc_id(id));
        let text: Result<Box<RawValue>> = self.json("doc", self.request(Method::GET, &path).query(&[("rev", rev)])).await;
        match text {
            Ok(doc) => Ok(Some(doc.into())),
            Err(CouchError::NotFound(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The rows of `_all_docs` for `ids`, in their order; by POST, because a long GET can answer 400.
    async fn all_docs_by_keys<T: DeserializeOwned>(&self, db: &str, ids: &[String], include_docs: bool) -> Result<Vec<T>> {
        let request = self
            .request(Method::POST, &all_docs_path(db))
            .query(&[("include_docs", if include_docs { "true" } else { "false" })])
            .json(&json!({ "keys": ids }));
        let rows: Vec<T> = self.all_docs(request).await?;
        if rows.len() != ids.len() {
            return Err(CouchError::Malformed(format!("_all_docs answered {} of {} keys", rows.len(), ids.len())));
        }
        Ok(rows)
    }

    async fn all_docs<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<Vec<T>> {
        #[derive(Deserialize)]
        struct Page<T> {
            rows: Vec<T>,
        }
        let page: Page<T> = self.json("_all_docs", request).await?;
        Ok(page.rows)
    }

    /// Many documents at once, in the order of `ids`.
    pub async fn get_docs(&self, db: &str, ids: &[String]) -> Result<Vec<Option<Value>>> {
        let rows: Vec<DocRow> = self.all_docs_by_keys(db, ids, true).await?;
        let doc = |row: DocRow| row.doc.filter(|doc| doc.is_object() && doc.get("_deleted").is_none());
        Ok(rows.into_iter().map(doc).collect())
    }

    /// One page of documents whose ids start with `prefix`, after `after`.
    pub async fn docs_by_prefix(&self, db: &str, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<Value>> {
        let start = after.unwrap_or(prefix);
        let end = format!("{prefix}\u{fff0}");
        let request = self.request(Method::GET, &all_docs_path(db)).query(&[
            ("include_docs", String::from("true")),
            ("startkey", Value::from(start).to_string()),
            ("endkey", Value::from(end).to_string()),
            ("limit", limit.to_string()),
        ]);
        let rows: Vec<DocRow> = self.all_docs(request).await?;
        let docs = rows.into_iter().filter_map(|row| row.doc).filter(Value::is_object);
        Ok(docs.filter(|doc| Some(doc["_id"].as_str().unwrap_or_default()) != after).collect())
    }

    /// The first documents by id, or the last.
    pub async fn docs_at_end(&self, db: &str, descending: bool, limit: usize) -> Result<Vec<Value>> {
        let request = self.request(Method::GET, &all_docs_path(db)).query(&[
            ("include_docs", String::from("true")),
            ("descending", descending.to_string()),
            ("limit", limit.to_string()),
        ]);
        let rows: Vec<DocRow> = self.all_docs(request).await?;
        Ok(rows.into_iter().filter_map(|row| row.doc).collect())
    }

    pub async fn put_doc(&self, db: &str, id: &str, doc: &Value) -> Result<WriteResult> {
        #[derive(Deserialize)]
        struct Saved {
            rev: String,
        }
        let request = self.request(Method::PUT, &format!("{}/{}", encode_segment(db), encode_doc_id(id))).json(doc);
        match self.json::<Saved>("doc", request).await {
            Ok(saved) => Ok(WriteResult::Saved { rev: saved.rev }),
            Err(CouchError::Conflict(_)) => Ok(WriteResult::Conflict),
            Err(error) => Err(error),
        }
    }

    pub async fn delete_doc(&self, db: &str, id: &str, rev: &str) -> Result<WriteResult> {
        let request =
            self.request(Method::DELETE, &format!("{}/{}", encode_segment(db), encode_doc_id(id))).query(&[("rev", rev)]);
        match self.send("doc", request).await {
            // Too few nodes took it: it may lose.
            Ok(answer) if answer.status() == reqwest::StatusCode::ACCEPTED => Ok(WriteResult::Conflict),
            Ok(_) => Ok(WriteResult::Saved { rev: String::new() }),
            Err(CouchError::Conflict(_)) => Ok(WriteResult::Conflict),
            Err(error) => Err(error),
        }
    }

    /// Writes documents; one result for each, in order. A 202 (`accepted`) is not a confirmation: it comes as `confirmed: false`.
    pub async fn bulk_docs(&self, db: &str, docs: &[Value]) -> Result<BulkAnswer> {
        #[derive(Deserialize)]
        struct Entry {
            #[serde(default)]
            rev: Option<String>,
            #[serde(default)]
            error: Option<String>,
            #[serde(default)]
            reason: Option<String>,
            #[serde(default)]
            accepted: bool,
        }
        let request = self.request(Method::POST, &format!("{}/_bulk_docs", encode_segment(db))).json(&json!({ "docs": docs }));
        let response = self.send("_bulk_docs", request).await?;
        let confirmed = response.status() != reqwest::StatusCode::ACCEPTED;
        let body = self.body(response).await?;
        let entries: Vec<Entry> = serde_json::from_slice(&body).map_err(|e| CouchError::Malformed(format!("_bulk_docs: {e}")))?;
        if entries.len() != docs.len() {
            return Err(CouchError::Malformed(format!("_bulk_docs answered {} of {} documents", entries.len(), docs.len())));
        }
        let mut accepted: Vec<bool> = entries.iter().map(|entry| entry.accepted).collect();
        if !confirmed && !accepted.contains(&true) {
            // It does not say which.
            accepted.fill(true);
        }
        let results = entries.into_iter().map(|entry| match (entry.rev, entry.error) {
            (Some(rev), None) => WriteResult::Saved { rev },
            (_, Some(error)) if error == "conflict" => WriteResult::Conflict,
            (_, error) => {
                WriteResult::Refused { reason: format!("{}: {}", error.unwrap_or_default(), entry.reason.unwrap_or_default()) }
            }
        });
        Ok(BulkAnswer { confirmed: confirmed && !accepted.contains(&true), results: results.collect(), accepted })
    }

    pub async fn set_admins_only(&self, db: &str) -> Result<()> {
        let security = json!({ "admins": { "names": [], "roles": ["_admin"] }, "members": { "names": [], "roles": ["_admin"] } });
        let request = self.request(Method::PUT, &format!("{}/_security", encode_segment(db))).json(&security);
        self.send("_security", request).await.map(|_| ())
    }
}

#[derive(Debug)]
pub struct BulkAnswer {
    pub confirmed: bool,
    pub results: Vec<WriteResult>,
    /// By too few nodes, each.
    pub accepted: Vec<bool>,
}
