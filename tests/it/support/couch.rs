//! A small CouchDB client of the tests' own, so that the product's is not tested with itself.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

#[derive(Clone)]
pub struct Couch {
    /// Without user and password.
    pub base: String,
    pub user: String,
    pub password: String,
    http: reqwest::Client,
}

impl Couch {
    pub fn new(base: &str, user: &str, password: &str) -> Self {
        let http = reqwest::Client::builder().timeout(Duration::from_secs(60)).build().expect("a client");
        Self { base: base.trim_end_matches('/').to_string(), user: user.into(), password: password.into(), http }
    }

    /// From `http://user:password@host:port`.
    pub fn of_url(url: &str) -> Self {
        let mut url = url::Url::parse(url).expect("a URL");
        let decoded = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8().expect("UTF-8").into_owned();
        let (user, password) = (decoded(url.username()), decoded(url.password().unwrap_or_default()));
        url.set_username("").expect("a host");
        url.set_password(None).expect("a host");
        Self::new(url.as_str(), &user, &password)
    }

    /// The same server at another address: through a proxy.
    pub fn at(&self, base: &str) -> Self {
        Self::new(base, &self.user, &self.password)
    }

    /// The server's URL with user and password.
    pub fn url(&self) -> String {
        let mut url = url::Url::parse(&self.base).expect("a URL");
        url.set_username(&encode(&self.user)).expect("a host");
        url.set_password(Some(&encode(&self.password))).expect("a host");
        url.as_str().trim_end_matches('/').to_string()
    }

    /// A database's URL with the user and without the password, as documents have it.
    pub fn url_for_user(&self, db: &str) -> String {
        let (scheme, rest) = self.base.split_once("://").expect("a scheme");
        format!("{scheme}://{}@{rest}/{}", encode(&self.user), encode(db))
    }

    pub fn host(&self) -> String {
        url::Url::parse(&self.base).expect("a URL").host_str().expect("a host").to_string()
    }

    pub fn port(&self) -> u16 {
        url::Url::parse(&self.base).expect("a URL").port_or_known_default().expect("a port")
    }

    /// Any request; `path` is encoded already. Panics where there is no answer.
    pub async fn ask(&self, method: Method, path: &str, body: Option<Value>) -> (StatusCode, Value) {
        match self.try_ask(method.clone(), path, body).await {
            Ok(answer) => answer,
            Err(error) => panic!("{method} {path}: {error:?}"),
        }
    }

    pub async fn try_ask(&self, method: Method, path: &str, body: Option<Value>) -> reqwest::Result<(StatusCode, Value)> {
        let request = self.http.request(method, format!("{}/{path}", self.base)).basic_auth(&self.user, Some(&self.password));
        let request = match body {
            Some(body) => request.json(&body),
            None => request,
        };
        let answer = request.send().await?;
        let status = answer.status();
        let text = answer.text().await?;
        Ok((status, serde_json::from_str(&text).unwrap_or(Value::String(text))))
    }

    /// With a body and for an answer that no JSON value must change.
    pub async fn ask_text(&self, method: Method, path: &str, body: Option<String>) -> (StatusCode, String) {
        let request =
            self.http.request(method.clone(), format!("{}/{path}", self.base)).basic_auth(&self.user, Some(&self.password));
        let request = request.header("accept", "application/json");
        let request = match body {
            Some(body) => request.header("content-type", "application/json").body(body),
            None => request,
        };
        let answer = match request.send().await {
            Ok(answer) => answer,
            Err(error) => panic!("{method} {path}: {error:?}"),
        };
        let status = answer.status();
        (status, answer.text().await.unwrap_or_else(|error| panic!("{method} {path}: {error:?}")))
    }

    #[track_caller]
    fn asked(&self, method: Method, path: String, body: Option<Value>) -> impl Future<Output = Value> {
        let (couch, from) = (self.clone(), std::panic::Location::caller());
        async move {
            let (status, answer) = couch.ask(method.clone(), &path, body).await;
            assert!(status.is_success(), "{method} {path}: {status} {answer} (at {from})");
            answer
        }
    }

    /// One that was deleted a moment ago may still be there for CouchDB.
    pub async fn create(&self, db: &str) {
        let mut created = (StatusCode::PRECONDITION_FAILED, Value::Null);
        for _ in 0..20 {
            created = self.ask(Method::PUT, &encode(db), None).await;
            if created.0 != StatusCode::PRECONDITION_FAILED {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert!(created.0.is_success(), "create {db}: {} {}", created.0, created.1);
    }

    pub async fn delete(&self, db: &str) {
        let (status, answer) = self.ask(Method::DELETE, &encode(db), None).await;
        assert!(status.is_success() || status == StatusCode::NOT_FOUND, "delete {db}: {status} {answer}");
    }

    pub async fn exists(&self, db: &str) -> bool {
        self.ask(Method::GET, &encode(db), None).await.0.is_success()
    }

    /// Writes a document over whatever revision there is, and gives its new revision.
    pub async fn put(&self, db: &str, id: &str, mut doc: Value) -> String {
        for _ in 0..50 {
            let path = format!("{}/{}", encode(db), encode_id(id));
            let (status, answer) = self.ask(Method::PUT, &path, Some(doc.clone())).await;
            if status != StatusCode::CONFLICT {
                assert!(status.is_success(), "put {db} {id}: {status} {answer}");
                return answer["rev"].as_str().expect("a revision").to_string();
            }
            doc["_rev"] = self.get(db, id).await.map_or(Value::Null, |doc| doc["_rev"].clone());
            if doc["_rev"].is_null() {
                doc.as_object_mut().expect("an object").remove("_rev");
            }
        }
        panic!("put {db} {id}: only conflicts");
    }

    pub async fn get(&self, db: &str, id: &str) -> Option<Value> {
        let (status, doc) = self.ask(Method::GET, &format!("{}/{}", encode(db), encode_id(id)), None).await;
        match status {
            StatusCode::OK => Some(doc),
            StatusCode::NOT_FOUND => None,
            status => panic!("get {db} {id}: {status} {doc}"),
        }
    }

    pub async fn remove(&self, db: &str, id: &str) {
        for _ in 0..50 {
            let Some(doc) = self.get(db, id).await else { return };
            let rev = doc["_rev"].as_str().expect("a revision");
            let path = format!("{}/{}?rev={rev}", encode(db), encode_id(id));
            if self.ask(Method::DELETE, &path, None).await.0.is_success() {
                return;
            }
        }
        panic!("remove {db} {id}: only conflicts");
    }

    pub async fn bulk(&self, db: &str, docs: Vec<Value>) {
        let answer = self.asked(Method::POST, format!("{}/_bulk_docs", encode(db)), Some(json!({ "docs": docs }))).await;
        let rows = answer.as_array().expect("rows");
        assert!(rows.iter().all(|row| row["error"].is_null()), "bulk {db}: {answer}");
    }

    /// `count` small documents, `<prefix>0` and so on.
    pub async fn fill(&self, db: &str, prefix: &str, count: usize) {
        let docs: Vec<Value> = (0..count).map(|n| json!({ "_id": format!("{prefix}{n}"), "n": n })).collect();
        for page in docs.chunks(2000) {
            self.bulk(db, page.to_vec()).await;
        }
    }

    /// Id ▶ revision of every document that is not deleted.
    pub async fn all(&self, db: &str) -> BTreeMap<String, String> {
        let answer = self.asked(Method::GET, format!("{}/_all_docs", encode(db)), None).await;
        let rows = answer["rows"].as_array().expect("rows");
        let text = |value: &Value| value.as_str().expect("text").to_string();
        rows.iter().map(|row| (text(&row["id"]), text(&row["value"]["rev"]))).collect()
    }

    pub async fn info(&self, db: &str) -> Value {
        self.asked(Method::GET, encode(db), None).await
    }

    /// The number of updates that a database has seen: what stands before the dash of its `update_seq`.
    pub async fn updates(&self, db: &str) -> u64 {
        match &self.info(db).await["update_seq"] {
            Value::Number(number) => number.as_u64().expect("a count"),
            Value::String(text) => text.split('-').next().and_then(|number| number.parse().ok()).expect("a number"),
            other => panic!("update_seq {other}"),
        }
    }

    pub async fn changes(&self, db: &str, query: &str) -> Value {
        self.asked(Method::GET, format!("{}/_changes?{query}", encode(db)), None).await
    }

    pub async fn all_dbs(&self) -> Vec<String> {
        let answer = self.asked(Method::GET, "_all_dbs".into(), None).await;
        serde_json::from_value(answer).expect("names")
    }
}

/// One segment of a path: everything but letters, digits and `-._~` is encoded.
pub fn encode(text: &str) -> String {
    const KEEP: percent_encoding::AsciiSet =
        percent_encoding::NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
    percent_encoding::utf8_percent_encode(text, &KEEP).to_string()
}

pub fn encode_id(id: &str) -> String {
    match id.split_once('/') {
        Some((kind @ ("_design" | "_local"), rest)) => format!("{kind}/{}", encode(rest)),
        _ => encode(id),
    }
}
