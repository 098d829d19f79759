//! The server from outside, by HTTP, as its clients see it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::disallowed_methods, reason = "a test may wait")]

use super::{DevOptions, DevServer, FaultRule};
use futures_util::StreamExt;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::time::Duration;

struct Client {
    server: DevServer,
    http: reqwest::Client,
}

async fn start() -> Client {
    let options = DevOptions {
        listen: ([127, 0, 0, 1], 0).into(),
        user: "admin".into(),
        password: "secret".to_string().into(),
        global_changes_delay: Duration::from_millis(20),
    };
    Client { server: DevServer::start(options).await.expect("a free port"), http: reqwest::Client::new() }
}

impl Client {
    fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, format!("{}{path}", self.server.url())).basic_auth("admin", Some("secret"))
    }

    async fn ask(&self, method: Method, path: &str, body: Option<Value>) -> (u16, Value) {
        let mut request = self.request(method, path).header("accept", "application/json");
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.expect("the server answers");
        let status = response.status().as_u16();
        let text = response.text().await.expect("the body is whole");
        (status, serde_json::from_str(&text).unwrap_or(Value::Null))
    }

    async fn get(&self, path: &str) -> Value {
        self.ask(Method::GET, path, None).await.1
    }

    async fn put(&self, path: &str, body: Value) -> (u16, Value) {
        self.ask(Method::PUT, path, Some(body)).await
    }

    async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.ask(Method::POST, path, Some(body)).await
    }

    async fn with_database(self, db: &str) -> Self {
        assert_eq!(self.ask(Method::PUT, db, None).await.0, 201);
        self
    }

    async fn ids(&self, path: &str) -> Vec<String> {
        let page = self.get(path).await;
        page["results"].as_array().expect("a page").iter().map(|row| row["id"].as_str().expect("an id").to_string()).collect()
    }
}

#[tokio::test]
async fn only_the_welcome_and_up_need_no_password() {
    let c = start().await.with_database("a").await;
    let cases = [
        ("", 200, ""),
        ("_up", 200, ""),
        ("_all_dbs", 401, "You are not a server admin."),
        ("a", 401, "You are not authorized to access this db."),
        ("nope", 404, "Database does not exist."),
        ("_dev/requests", 401, "You are not a server admin."),
    ];
    for (path, status, reason) in cases {
        let response = c.http.get(format!("{}{path}", c.server.url())).send().await.expect("an answer");
        assert_eq!(response.status(), status, "{path}");
        assert!(response.text().await.expect("a body").contains(reason), "{path}");
    }
    let wrong =
        c.http.get(format!("{}_all_dbs", c.server.url())).basic_auth("admin", Some("bad")).send().await.expect("an answer");
    assert_eq!(wrong.status(), 401);
    assert!(wrong.text().await.expect("a body").contains("Name or password is incorrect."));
}

#[tokio::test]
async fn a_database_with_any_legal_name() {
    let c = start().await.with_database("a%2Fb%2Bc").await;
    assert_eq!(c.get("a%2Fb%2Bc").await["db_name"], "a/b+c");
    assert_eq!(c.ask(Method::PUT, "a%2Fb%2Bc", None).await.0, 412);
    assert_eq!(c.ask(Method::PUT, "Bad", None).await.1["error"], "illegal_database_name");
    assert_eq!(c.get("_all_dbs?start_key=%22a%22").await, json!(["a/b+c"]));
    assert_eq!(c.put("a%2Fb%2Bc/x", json!({})).await.0, 201);
    assert_eq!(c.get("a%2fb%2bc/x").await["_id"], "x");
    let (_, infos) = c.post("_dbs_info", json!({"keys": ["a/b+c", "zz"]})).await;
    assert_eq!((&infos[0]["info"]["doc_count"], &infos[1]), (&json!(1), &json!({"key": "zz", "error": "not_found"})));
    assert_eq!(c.ask(Method::DELETE, "a%2Fb%2Bc", None).await.0, 200);
    assert_eq!(c.ask(Method::GET, "a%2Fb%2Bc", None).await.0, 404);
}

#[tokio::test]
async fn a_document_from_its_creation_to_its_deletion() {
    let c = start().await.with_database("a").await;
    let (_, created) = c.put("a/x", json!({"v": 1})).await;
    let first = created["rev"].as_str().expect("a rev").to_string();
    assert_eq!(c.put("a/x", json!({"v": 2})).await, (409, json!({"error": "conflict", "reason": "Document update conflict."})));
    let (status, updated) = c.put("a/x", json!({"_rev": first, "v": 2})).await;
    assert_eq!(status, 201);
    assert_eq!(c.get("a/x?revs=true").await["_revisions"]["start"], 2);
    assert_eq!(c.get(&format!("a/x?rev={first}")).await["v"], 1);
    let rev = updated["rev"].as_str().expect("a rev");
    assert_eq!(c.ask(Method::DELETE, &format!("a/x?rev={rev}"), None).await.0, 200);
    assert_eq!(c.ask(Method::GET, "a/x", None).await, (404, json!({"error": "not_found", "reason": "deleted"})));
    let info = c.get("a").await;
    assert_eq!((&info["doc_count"], &info["doc_del_count"]), (&json!(0), &json!(1)));
    // A deleted document may be made again; its history goes on.
    assert!(c.put("a/x", json!({})).await.1["rev"].as_str().expect("a rev").starts_with("4-"));
    assert_eq!(c.get("a/_changes").await["results"].as_array().map(Vec::len), Some(1));
}

#[tokio::test]
async fn replicated_conflicts_show_everywhere() {
    let c = start().await.with_database("a").await;
    let docs = json!({"new_edits": false, "docs": [
        {"_id": "f", "_rev": "2-bb", "_revisions": {"start": 2, "ids": ["bb", "aa"]}, "v": 1},
        {"_id": "f", "_rev": "2-cc", "_revisions": {"start": 2, "ids": ["cc", "aa"]}, "v": 2},
    ]});
    assert_eq!(c.post("a/_bulk_docs", docs.clone()).await, (201, json!([])));
    let seq = |info: Value| info["update_seq"].as_str().map(|seq| seq.split('-').next().map(String::from));
    let before = seq(c.get("a").await);
    assert_eq!(c.post("a/_bulk_docs", docs).await, (201, json!([])));
    assert_eq!(seq(c.get("a").await), before, "a write that changes nothing makes no row");
    assert_eq!(c.get("a/f?conflicts=true").await, json!({"_id": "f", "_rev": "2-cc", "v": 2, "_conflicts": ["2-bb"]}));
    assert_eq!(c.get("a/f?open_revs=all").await.as_array().map(Vec::len), Some(2));
    assert_eq!(c.get("a/f?open_revs=%5B%221-aa%22%5D").await, json!([{"missing": "1-aa"}]));
    assert_eq!(c.get("a/_changes?style=all_docs").await["results"][0]["changes"], json!([{"rev": "2-cc"}, {"rev": "2-bb"}]));
    let (_, got) = c.post("a/_bulk_get?latest=true&revs=true", json!({"docs": [{"id": "f", "rev": "1-aa"}, {"id": "n"}]})).await;
    assert_eq!(got["results"][0]["docs"].as_array().map(Vec::len), Some(2));
    assert_eq!(got["results"][1]["docs"][0]["error"]["reason"], "missing");
    let (_, diff) = c.post("a/_revs_diff", json!({"f": ["1-aa", "3-dd"], "n": ["1-a"]})).await;
    assert_eq!(diff, json!({"f": {"missing": ["3-dd"], "possible_ancestors": ["2-cc", "2-bb"]}, "n": {"missing": ["1-a"]}}));
}

#[tokio::test]
async fn attachments_come_inline_and_by_their_own_path() {
    let c = start().await.with_database("a").await;
    let doc = json!({"_attachments": {"t.txt": {"content_type": "text/plain", "data": "aGVsbG8="}}});
    let (_, written) = c.put("a/x", doc).await;
    assert_eq!(c.get("a/x").await["_attachments"]["t.txt"]["length"], 5);
    assert_eq!(c.get("a/x?attachments=true").await["_attachments"]["t.txt"]["data"], "aGVsbG8=");
    let response = c.request(Method::GET, "a/x/t.txt").send().await.expect("an answer");
    assert_eq!(response.headers()["content-type"], "text/plain");
    assert_eq!(response.text().await.expect("a body"), "hello");
    let (status, _) = c.put("a/x", json!({"_rev": written["rev"], "_attachments": {"t.txt": {"stub": true}}})).await;
    assert_eq!(status, 201, "a stub keeps what is there");
    assert_eq!(c.get("a/x?attachments=true").await["_attachments"]["t.txt"]["data"], "aGVsbG8=");
    assert_eq!(c.put("a/y", json!({"_attachments": {"t.txt": {"stub": true}}})).await.1["error"], "missing_stub");
}

#[tokio::test]
async fn listings() {
    let c = start().await.with_database("a").await;
    for id in ["a", "b", "c", "d"] {
        c.put(&format!("a/{id}"), json!({})).await;
    }
    let (_, b) = c.put("a/e", json!({})).await;
    c.ask(Method::DELETE, &format!("a/e?rev={}", b["rev"].as_str().expect("a rev")), None).await;
    let cases = [
        ("", vec!["a", "b", "c", "d"], 0),
        ("?limit=2&skip=1", vec!["b", "c"], 1),
        ("?startkey=%22b%22&endkey=%22d%22&inclusive_end=false", vec!["b", "c"], 1),
        ("?start_key=%22c%22&descending=true&limit=2", vec!["c", "b"], 1),
        ("?key=%22c%22", vec!["c"], 2),
        ("?limit=0", vec![], 0),
        ("?startkey=%22x%22", vec![], 4),
        ("?startkey=%22x%22&endkey=%22a%22", vec![], 4),
        ("?startkey=%5B%5D", vec![], 4),
    ];
    for (query, ids, offset) in cases {
        let page = c.get(&format!("a/_all_docs{query}")).await;
        let rows: Vec<&str> = page["rows"].as_array().expect("rows").iter().filter_map(|row| row["id"].as_str()).collect();
        assert_eq!((rows, &page["offset"]), (ids, &json!(offset)), "{query}");
    }
    let (_, keyed) = c.post("a/_all_docs", json!({"keys": ["b", "nope", "e"], "include_docs": true})).await;
    assert_eq!(keyed["rows"][0]["doc"]["_id"], "b");
    assert_eq!(keyed["rows"][1], json!({"key": "nope", "error": "not_found"}));
    assert_eq!((&keyed["rows"][2]["value"]["deleted"], &keyed["rows"][2]["doc"]), (&json!(true), &Value::Null));
}

#[tokio::test]
async fn local_documents_have_counters_for_revisions() {
    let c = start().await.with_database("a").await;
    for (body, rev) in
        [(json!({"v": 1}), "0-1"), (json!({"v": 2, "_rev": "0-1"}), "0-2"), (json!({"v": 3, "_rev": "0-1"}), "0-2")]
    {
        assert_eq!(c.put("a/_local/x", body).await.1["rev"], rev);
    }
    assert_eq!(c.get("a/_local/x").await, json!({"_id": "_local/x", "_rev": "0-2", "v": 3}));
    let (_, listed) = c.post("a/_local_docs?include_docs=true", json!({"keys": ["_local/x", "_local/nope", "x"]})).await;
    assert_eq!(listed["rows"].as_array().map(Vec::len), Some(2));
    assert_eq!(listed["rows"][0]["doc"]["v"], 3);
    assert!(c.ids("a/_changes").await.is_empty(), "a local document makes no row");
    assert_eq!(c.ask(Method::DELETE, "a/_local/x", None).await.0, 200);
    assert_eq!(c.ask(Method::DELETE, "a/_local/x", None).await.0, 404);
}

#[tokio::test]
async fn pages_of_changes_add_up() {
    let c = start().await.with_database("a").await;
    let docs: Vec<Value> = (0..2500).map(|n| json!({"_id": format!("{n:05}"), "even": n % 2 == 0})).collect();
    c.post("a/_bulk_docs", json!({"docs": docs})).await;
    let (mut since, mut seen) = (String::from("0"), 0);
    loop {
        let page = c.get(&format!("a/_changes?limit=700&since={since}")).await;
        let rows = page["results"].as_array().expect("rows").len();
        seen += rows;
        assert_eq!(page["pending"], 2500 - seen);
        since = page["last_seq"].as_str().expect("a seq").to_string();
        if rows < 700 {
            break;
        }
    }
    assert_eq!(seen, 2500);
    assert_eq!(c.ids("a/_changes").await.len(), 2500, "a page longer than a piece is whole");
    let selector = json!({"selector": {"even": true}});
    let (_, even) = c.post("a/_changes?filter=_selector", selector).await;
    assert_eq!(even["results"].as_array().map(Vec::len), Some(1250));
    let (_, two) = c.post("a/_changes?filter=_doc_ids&include_docs=true", json!({"doc_ids": ["00007", "01500", "zz"]})).await;
    assert_eq!(two["results"][1]["doc"]["even"], true);
    assert_eq!(two["results"].as_array().map(Vec::len), Some(2));
}

#[tokio::test]
async fn a_database_made_again_starts_from_zero_for_an_old_since() {
    let c = start().await.with_database("a").await;
    for id in ["x", "y"] {
        c.put(&format!("a/{id}"), json!({})).await;
    }
    let old = c.get("a/_changes").await["last_seq"].as_str().expect("a seq").to_string();
    c.ask(Method::DELETE, "a", None).await;
    let c = c.with_database("a").await;
    c.put("a/z", json!({})).await;
    assert_eq!(c.ids(&format!("a/_changes?since={old}")).await, ["z"]);
    assert_eq!(c.ask(Method::GET, "a/_changes?since=3", None).await.0, 400);
}

#[tokio::test]
async fn a_long_poll_answers_when_something_changes() {
    let c = start().await.with_database("a").await;
    let (page, _) = tokio::join!(c.get("a/_changes?feed=longpoll&since=now&timeout=5000"), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        c.put("a/x", json!({})).await
    });
    assert_eq!(page["results"][0]["id"], "x");
    assert_eq!(page["pending"], 0);
    let empty = c.get("a/_changes?feed=longpoll&since=now&timeout=30").await;
    assert_eq!(empty["results"], json!([]));
}

/// Reads lines of a feed until `enough`.
async fn lines(c: &Client, path: &str, enough: impl Fn(&[String]) -> bool) -> Vec<String> {
    let response = c.request(Method::GET, path).send().await.expect("an answer");
    let mut pieces = response.bytes_stream();
    let mut text = String::new();
    let read = async {
        while let Some(Ok(piece)) = pieces.next().await {
            text.push_str(&String::from_utf8_lossy(&piece));
            if enough(&text.lines().map(String::from).collect::<Vec<_>>()) {
                break;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), read).await.expect("the feed says enough in time");
    text.lines().map(String::from).collect()
}

#[tokio::test]
async fn a_continuous_feed_has_rows_heartbeats_and_a_last_line() {
    let c = start().await.with_database("a").await;
    c.put("a/x", json!({})).await;
    let path = "a/_changes?feed=continuous&heartbeat=20";
    let (read, _) = tokio::join!(lines(&c, path, |lines| lines.iter().any(|line| line.starts_with("{\"last_seq"))), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        c.put("a/y", json!({})).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        c.ask(Method::DELETE, "a", None).await;
    });
    assert!(read.iter().filter(|line| line.is_empty()).count() >= 2, "{read:?}");
    let rows: Vec<Value> = read.iter().filter_map(|line| serde_json::from_str(line).ok()).collect();
    assert_eq!((&rows[0]["id"], &rows[1]["id"]), (&json!("x"), &json!("y")));
    assert_eq!(rows[2]["pending"], 0, "the feed ends with its database");

    let c = c.with_database("b").await;
    for id in ["x", "y", "z"] {
        c.put(&format!("b/{id}"), json!({})).await;
    }
    let limited = lines(&c, "b/_changes?feed=continuous&limit=2", |_| false).await;
    assert_eq!(serde_json::from_str::<Value>(&limited[2]).expect("a last line")["pending"], 1);
    let timed_out = lines(&c, "b/_changes?feed=continuous&since=now&timeout=30", |_| false).await;
    assert!(timed_out.last().is_some_and(|line| line.starts_with("{\"last_seq")), "{timed_out:?}");
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let waited = tokio::time::timeout(Duration::from_secs(10), async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("never: {what}"));
}

#[tokio::test]
async fn global_changes_tells_of_writes_and_of_nothing_else() {
    let c = start().await.with_database("a").await.with_database("b").await;
    let rows = async || c.ids("_global_changes/_changes").await;
    eventually("both are created", async || rows().await.len() == 2).await;
    c.put("b/_local/x", json!({})).await;
    c.put("b/_security", json!({})).await;
    for id in ["x", "y", "z"] {
        c.put(&format!("a/{id}"), json!({})).await;
    }
    c.ask(Method::DELETE, "b", None).await;
    eventually("the deletion is told", async || rows().await.contains(&"deleted:b".to_string())).await;
    let mut seen = rows().await;
    seen.sort();
    assert_eq!(seen, ["created:a", "created:b", "deleted:b", "updated:a"]);
}

#[tokio::test]
async fn nothing_is_recorded_while_global_changes_is_missing() {
    let c = start().await.with_database("a").await;
    c.ask(Method::DELETE, "_global_changes", None).await;
    c.put("a/x", json!({})).await;
    tokio::time::sleep(Duration::from_millis(60)).await;
    let c = c.with_database("_global_changes").await;
    c.put("a/y", json!({})).await;
    eventually("the later write is told", async || !c.ids("_global_changes/_changes").await.is_empty()).await;
    assert_eq!(c.ids("_global_changes/_changes").await, ["updated:a"]);
}

#[tokio::test]
async fn lost_rows_are_lost() {
    let c = start().await;
    c.server.faults().lose_rows_of("a");
    let c = c.with_database("a").await.with_database("b").await;
    eventually("b is told", async || !c.ids("_global_changes/_changes").await.is_empty()).await;
    assert_eq!(c.ids("_global_changes/_changes").await, ["created:b"]);
}

async fn fill(c: &Client, db: &str) {
    let docs = json!({"new_edits": false, "docs": [
        {"_id": "f", "_rev": "2-bb", "_revisions": {"start": 2, "ids": ["bb", "aa"]}},
        {"_id": "f", "_rev": "2-cc", "_revisions": {"start": 2, "ids": ["cc", "aa"]}},
        {"_id": "gone", "_rev": "2-dd", "_deleted": true, "_revisions": {"start": 2, "ids": ["dd", "aa"]}},
        {"_id": "att", "_rev": "1-ee", "_attachments": {"t": {"content_type": "text/plain", "data": "aGVsbG8="}}},
    ]});
    assert_eq!(c.post(&format!("{db}/_bulk_docs"), docs).await.0, 201);
}

#[tokio::test]
async fn a_replication_carries_conflicts_deletions_and_attachments() {
    let c = start().await.with_database("a").await;
    let other = start().await;
    fill(&c, "a").await;
    let remote =
        json!({"url": format!("{}b", other.server.url()), "auth": {"basic": {"username": "admin", "password": "secret"}}});
    let mut in_url = other.server.url();
    in_url.set_username("admin").expect("it has a host");
    in_url.set_password(Some("secret")).expect("it has a host");
    let cases = [("here", json!("here")), ("b", remote), ("c", json!(format!("{in_url}c")))];
    for (name, target) in cases {
        let asked = json!({"source": "a", "target": target, "create_target": true});
        let (status, answer) = c.post("_replicate", asked.clone()).await;
        assert_eq!((status, &answer["history"][0]["docs_written"]), (200, &json!(4)), "{answer}");
        assert_eq!(c.post("_replicate", asked).await.1["no_changes"], true);
        let at = if name == "here" { &c } else { &other };
        assert_eq!(at.get(&format!("{name}/f?conflicts=true")).await["_conflicts"], json!(["2-bb"]));
        assert_eq!(at.get(&format!("{name}/att?attachments=true")).await["_attachments"]["t"]["data"], "aGVsbG8=");
        assert_eq!(at.get(name).await["doc_del_count"], 1);
    }
    c.put("a/new", json!({})).await;
    let (_, answer) = c.post("_replicate", json!({"source": "a", "target": "here"})).await;
    assert_eq!((&answer["history"][0]["docs_read"], answer["history"].as_array().map(Vec::len)), (&json!(1), Some(2)));
    let back = json!({"source": format!("{in_url}b"), "target": "back", "create_target": true});
    assert_eq!(c.post("_replicate", back).await.1["history"][0]["docs_written"], 4);
}

#[tokio::test]
async fn a_replication_of_chosen_documents() {
    let c = start().await.with_database("a").await.with_database("b").await;
    for id in ["x", "y", "z"] {
        c.put(&format!("a/{id}"), json!({"is": id})).await;
    }
    c.post("_replicate", json!({"source": "a", "target": "b", "doc_ids": ["x"]})).await;
    c.post("_replicate", json!({"source": "a", "target": "b", "selector": {"is": "z"}})).await;
    assert_eq!(c.ids("b/_changes").await, ["x", "z"]);
    let (status, answer) = c.post("_replicate", json!({"source": "nope", "target": "b"})).await;
    assert_eq!((status, &answer["error"]), (500, &json!("db_not_found")));
}

#[tokio::test]
async fn a_target_made_again_is_filled_again() {
    let c = start().await.with_database("a").await;
    fill(&c, "a").await;
    let asked = json!({"source": "a", "target": "b", "create_target": true});
    c.post("_replicate", asked.clone()).await;
    c.ask(Method::DELETE, "b", None).await;
    let (_, answer) = c.post("_replicate", asked).await;
    assert_eq!(answer["history"][0]["docs_written"], 4, "{answer}");
}

#[tokio::test]
async fn faults_are_met_as_asked() {
    let c = start().await.with_database("a").await;
    let rules = json!({"rules": [
        {"method": "PUT", "path": "/a/", "times": 1, "status": 429, "retry_after_secs": 7},
        {"method": "PUT", "path": "/a/", "times": 1, "status": 202},
        {"method": "PUT", "path": "/a/", "times": 1, "status": 500, "apply": true},
    ]});
    assert_eq!(c.post("_dev/faults", rules).await.0, 200);
    let refused = c.request(Method::PUT, "a/x").json(&json!({})).send().await.expect("an answer");
    assert_eq!(
        (refused.status(), &refused.headers()["retry-after"]),
        (StatusCode::TOO_MANY_REQUESTS, &"7".parse().expect("a value"))
    );
    assert_eq!(c.put("a/x", json!({})).await.0, 202);
    assert_eq!(c.put("a/y", json!({})).await.0, 500);
    assert_eq!(c.ids("a/_changes").await, ["x", "y"], "both were stored");

    c.server.faults().delay("/a", Duration::from_millis(60));
    let before = std::time::Instant::now();
    c.get("a").await;
    assert!(before.elapsed() >= Duration::from_millis(60));
    assert_eq!(c.ask(Method::DELETE, "_dev/faults", None).await.0, 200);

    let since = c.get("a/_changes").await["last_seq"].as_str().expect("a seq").to_string();
    c.server.faults().rewind("a");
    assert_eq!(c.ids(&format!("a/_changes?since={since}")).await.len(), 2);
    assert!(c.ids(&format!("a/_changes?since={since}")).await.is_empty());
}

#[tokio::test]
async fn a_cut_answer_is_an_error_for_its_reader() {
    let c = start().await.with_database("a").await;
    c.put("a/x", json!({})).await;
    c.server.faults().cut("/a/_changes", 2);
    for path in ["a/_changes", "a/_changes?feed=continuous&heartbeat=1000"] {
        let response = c.request(Method::GET, path).send().await.expect("the head comes");
        let body = tokio::time::timeout(Duration::from_secs(5), response.bytes()).await.expect("the cut comes in time");
        assert!(body.is_err(), "{path}: {body:?}");
    }
    assert_eq!(c.ids("a/_changes").await, ["x"]);
    c.server.faults().add(FaultRule { cut: true, cut_after_bytes: Some(5), times: Some(1), ..Default::default() });
    let response = c.request(Method::GET, "a").send().await.expect("the head comes");
    let mut pieces = response.bytes_stream();
    assert_eq!(pieces.next().await.expect("a piece").expect("its bytes").len(), 5);
    assert!(pieces.next().await.expect("an end").is_err());
}

#[tokio::test]
async fn a_silent_feed_says_nothing_and_then_everything() {
    let c = start().await.with_database("a").await;
    c.server.faults().silence(true);
    c.put("a/x", json!({})).await;
    let path = "a/_changes?feed=continuous&heartbeat=10";
    let response = c.request(Method::GET, path).send().await.expect("the head comes");
    let mut pieces = response.bytes_stream();
    assert!(tokio::time::timeout(Duration::from_millis(100), pieces.next()).await.is_err());
    c.server.faults().silence(false);
    let piece =
        tokio::time::timeout(Duration::from_secs(5), pieces.next()).await.expect("in time").expect("a piece").expect("bytes");
    assert!(piece.starts_with(b"{\"seq\""));
}

#[tokio::test]
async fn a_server_that_is_down_answers_nobody_and_keeps_its_data() {
    let c = start().await.with_database("a").await;
    c.server.faults().down(true);
    assert!(c.request(Method::GET, "a").send().await.is_err());
    c.server.faults().down(false);
    assert_eq!(c.get("a").await["db_name"], "a");
    let feed = c.request(Method::GET, "a/_changes?feed=continuous&heartbeat=1000").send().await.expect("the head comes");
    let (url, http) = (c.server.url(), c.http.clone());
    c.server.stop().await;
    assert!(tokio::time::timeout(Duration::from_secs(5), feed.bytes()).await.expect("cut in time").is_err());
    assert!(http.get(url).send().await.is_err());
}

#[tokio::test]
async fn requests_are_counted_by_kind() {
    let c = start().await.with_database("a").await;
    for id in ["x", "y"] {
        c.put(&format!("a/{id}"), json!({})).await;
    }
    let counts = c.get("_dev/requests").await;
    assert_eq!((&counts["PUT /{db}/{id}"], &counts["PUT /{db}"]), (&json!(2), &json!(1)));
    assert_eq!(c.server.requests().get("PUT /{db}/{id}"), Some(&2));
}

#[tokio::test]
async fn what_is_not_built_is_refused() {
    let c = start().await.with_database("a").await;
    c.put("a/_design/v", json!({"views": {"x": {"map": "function (doc) {}"}}})).await;
    for (method, path) in [
        (Method::GET, "a/_design/v/_view/x"),
        (Method::POST, "a/_find"),
        (Method::GET, "a/_changes?filter=v/x"),
        (Method::GET, "_db_updates"),
    ] {
        let (status, answer) = c.ask(method, path, Some(json!({}))).await;
        assert_eq!((status, &answer["error"]), (501, &json!("not_implemented")), "{path}");
    }
    assert_eq!(c.get("a/_design/v").await["views"]["x"]["map"], "function (doc) {}");
}

/// The largest databases of tests and benches: a late reader must not pay for those before it.
#[tokio::test]
async fn a_late_since_in_a_large_database_is_quick() {
    let c = start().await.with_database("a").await;
    for batch in 0..20 {
        let docs: Vec<Value> = (0..1000).map(|n| json!({"_id": format!("{batch:02}-{n:04}"), "text": "x".repeat(100)})).collect();
        assert_eq!(c.post("a/_bulk_docs", json!({"docs": docs})).await.0, 201);
    }
    let since = c.get("a/_changes?since=now").await["last_seq"].as_str().expect("a seq").to_string();
    c.put("a/last", json!({})).await;
    let before = std::time::Instant::now();
    for _ in 0..100 {
        assert_eq!(c.ids(&format!("a/_changes?since={since}")).await, ["last"]);
    }
    assert!(before.elapsed() < Duration::from_secs(5), "{:?}", before.elapsed());
}

#[tokio::test]
async fn a_session_cookie_is_as_good_as_the_password() {
    let c = start().await;
    let url = |path: &str| format!("{}{path}", c.server.url());
    let log_in = async |body: &'static str| {
        let request = c.http.post(url("_session")).header("content-type", "application/x-www-form-urlencoded");
        request.body(body).send().await.expect("an answer")
    };
    assert_eq!(log_in("name=admin&password=bad").await.status(), 401);
    let answer = log_in("name=admin&password=secret").await;
    let cookie = answer.headers()["set-cookie"].to_str().expect("text").split(';').next().expect("a cookie").to_string();
    let with = async |cookie: &str, path: &str| {
        let answer = c.http.get(url(path)).header("cookie", cookie).send().await.expect("an answer");
        (answer.status().as_u16(), answer.json::<Value>().await.expect("JSON"))
    };
    assert_eq!(with(&cookie, "_all_dbs").await.0, 200);
    assert_eq!(with(&cookie, "_session").await.1["info"]["authenticated"], "cookie");
    assert_eq!(with("AuthSession=zork", "_all_dbs").await.0, 400);
}

#[tokio::test]
async fn a_very_long_history_is_survived() {
    let c = start().await.with_database("a").await;
    for newest in [100_000, 100_600, 101_100] {
        let ids: Vec<String> = (newest - 50_000..=newest).rev().map(|n| format!("{n:032x}")).collect();
        let doc = json!({"_id": "x", "_rev": format!("{newest}-{}", ids[0]), "_revisions": {"start": newest, "ids": ids}});
        assert_eq!(c.post("a/_bulk_docs", json!({"new_edits": false, "docs": [doc]})).await, (201, json!([])));
    }
    let doc = c.get("a/x?revs=true&conflicts=true").await;
    assert_eq!(doc["_revisions"]["start"], 101_100);
    assert_eq!(doc["_revisions"]["ids"].as_array().map(Vec::len), Some(1000));
    assert_eq!(doc["_conflicts"], Value::Null, "one branch that grew");
}

#[tokio::test]
async fn the_slash_of_a_design_document_may_be_encoded() {
    let c = start().await.with_database("a").await;
    c.put("a/_design%2Fv", json!({})).await;
    c.put("a/_local%2Fx", json!({})).await;
    assert_eq!(c.get("a/_design/v").await["_id"], "_design/v");
    assert_eq!(c.get("a/_local/x").await["_id"], "_local/x");
}

#[tokio::test]
async fn an_attachment_that_was_sent_compressed_is_read_plain() {
    let c = start().await.with_database("a").await;
    let zipped = "H4sIAAAAAAAAA8tIzcnJBwCGphA2BQAAAA==";
    let zipped = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, zipped).expect("it is base64");
    let doc = r#"{"_rev":"1-a","_attachments":{"t":{"content_type":"text/plain","encoding":"gzip","follows":true}}}"#;
    let mut body = format!("--x\r\n\r\n{doc}\r\n--x\r\n\r\n").into_bytes();
    body.extend(zipped);
    body.extend(b"\r\n--x--");
    let request = c.request(Method::PUT, "a/d?new_edits=false").header("content-type", "multipart/related; boundary=x");
    assert_eq!(request.body(body).send().await.expect("an answer").status(), 201);
    assert_eq!(c.request(Method::GET, "a/d/t").send().await.expect("an answer").text().await.expect("a body"), "hello");
}

/// Three attachments of three generations, one of them a text: `a` at 3-c.
async fn with_attachments(c: &Client) {
    let attachment = |kind: &str, data: &str, revpos: u64| json!({"content_type": kind, "data": data, "revpos": revpos});
    let attachments = json!({
        "t": attachment("text/plain", "aGVsbG8=", 1), "e": attachment("image/png", "", 2), "b": attachment("image/png", "AAEC", 3),
    });
    let docs = json!({"new_edits": false, "docs": [
        {"_id": "a", "_rev": "3-c", "_revisions": {"start": 3, "ids": ["c", "b", "a"]}, "_attachments": attachments},
        {"_id": "a", "_rev": "3-d", "_revisions": {"start": 3, "ids": ["d", "b", "a"]}},
    ]});
    assert_eq!(c.post("a/_bulk_docs", docs).await, (201, json!([])));
}

/// Which attachments of a document come along, which are stubs.
fn with_data(doc: &Value) -> Vec<&str> {
    let attachments = doc["_attachments"].as_object().expect("attachments").iter();
    attachments.filter(|(_, attachment)| attachment["stub"].is_null()).map(|(name, _)| name.as_str()).collect()
}

#[tokio::test]
async fn only_attachments_that_the_reader_lacks_come_along() {
    let c = start().await.with_database("a").await;
    with_attachments(&c).await;
    let cases = [
        (json!(["3-c"]), vec![]),
        (json!(["2-b"]), vec!["b"]),
        (json!(["1-a"]), vec!["b", "e"]),
        (json!(["1-a", "2-b"]), vec!["b"]),
        (json!(["2-zz"]), vec!["b", "e", "t"]),
        (json!([]), vec![]),
    ];
    for (since, expected) in cases {
        let asked = json!({"docs": [{"id": "a", "rev": "3-c", "atts_since": since}]});
        let (_, got) = c.post("a/_bulk_get?revs=true&latest=true", asked).await;
        assert_eq!(with_data(&got["results"][0]["docs"][0]["ok"]), expected, "{since}");
        let got = c.get(&format!("a/a?rev=3-c&atts_since={}", crate::couch::encode_segment(&since.to_string()))).await;
        assert_eq!(with_data(&got), expected, "{since}");
    }
    let (_, got) = c.post("a/_bulk_get?attachments=true", json!({"docs": [{"id": "a", "rev": "3-c"}]})).await;
    assert_eq!(with_data(&got["results"][0]["docs"][0]["ok"]), ["b", "e", "t"]);
    assert_eq!(c.get("a/a?rev=3-c&latest=true").await["_rev"], "3-d", "the winner, as CouchDB 3.5 answers");
}

#[tokio::test]
async fn a_document_travels_with_its_attachments_in_parts() {
    let c = start().await.with_database("a").await.with_database("b").await;
    with_attachments(&c).await;
    let read = async |query: &str| {
        let path = format!("a/a?rev=3-c&revs=true&attachments=true&att_encoding_info=true{query}");
        let answer = c.request(Method::GET, &path).header("accept", "multipart/related").send().await.expect("an answer");
        let kind = answer.headers()["content-type"].to_str().expect("text").to_string();
        (kind, answer.bytes().await.expect("a body"))
    };
    let write = async |db: &str, (kind, body): (String, bytes::Bytes)| {
        let request = c.request(Method::PUT, &format!("{db}/a?new_edits=false")).header("content-type", kind);
        request.body(body).send().await.expect("an answer").status().as_u16()
    };
    let (kind, body) = read("").await;
    assert!(kind.starts_with("multipart/related; boundary="), "{kind}");
    let text = String::from_utf8_lossy(&body);
    for expected in ["\"encoding\":\"gzip\"", "\"follows\":true", "\r\nContent-Encoding: gzip\r\n", "filename=\"e\""] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
    assert_eq!(write("b", (kind, body)).await, 201);
    for path in ["a?rev=3-c&revs=true&attachments=true", "a?rev=3-c&att_encoding_info=true"] {
        assert_eq!(c.get(&format!("a/{path}")).await, c.get(&format!("b/{path}")).await, "{path}");
    }
    // Nothing follows: plain JSON.
    assert_eq!(read("&atts_since=%5B%223-c%22%5D").await.0, "application/json");
    // What the reader has comes as a stub, which another database cannot resolve.
    let c2 = c.with_database("c").await;
    let path = "a/a?rev=3-c&revs=true&attachments=true&atts_since=%5B%222-b%22%5D";
    let answer = c2.request(Method::GET, path).header("accept", "multipart/related").send().await.expect("an answer");
    let kind = answer.headers()["content-type"].to_str().expect("text").to_string();
    let body = answer.bytes().await.expect("a body");
    let request = c2.request(Method::PUT, "c/a?new_edits=false").header("content-type", kind).body(body);
    let refused = request.send().await.expect("an answer");
    assert_eq!(refused.status(), 412);
    assert!(refused.text().await.expect("a body").contains("missing_stub"));
}

#[tokio::test]
async fn a_stub_stands_for_what_the_nearest_ancestor_has() {
    let c = start().await.with_database("a").await;
    with_attachments(&c).await;
    let write = async |rev: &str, ids: &[&str], stub: Value| {
        let revisions = json!({"start": ids.len(), "ids": ids});
        let doc = json!({"_id": "a", "_rev": rev, "_revisions": revisions, "_attachments": {"b": stub}});
        c.post("a/_bulk_docs", json!({"new_edits": false, "docs": [doc]})).await.0
    };
    let cases = [
        ("4-e", &["e", "c", "b", "a"][..], json!({"stub": true, "revpos": 3, "digest": "md5-of-something-else"}), 201),
        ("4-f", &["f", "c", "b", "a"], json!({"stub": true}), 201),
        ("4-g", &["g", "c", "b", "a"], json!({"stub": true, "revpos": 2}), 412),
        ("4-h", &["h", "d", "b", "a"], json!({"stub": true, "revpos": 3}), 412),
        ("3-i", &["i", "b", "a"], json!({"stub": true, "revpos": 3}), 412),
    ];
    for (rev, ids, stub, status) in cases {
        assert_eq!(write(rev, ids, stub).await, status, "{rev}");
        assert_eq!(c.ask(Method::GET, &format!("a/a?rev={rev}"), None).await.0, if status == 201 { 200 } else { 404 }, "{rev}");
    }
    let digest = "md5-".to_string() + &base64::Engine::encode(&base64::engine::general_purpose::STANDARD, [0; 16]);
    let doc = json!({"_rev": "1-a", "_attachments": {"x": {"follows": true, "length": 2, "digest": digest}}});
    let request = c.request(Method::PUT, "a/wrong?new_edits=false").header("content-type", "multipart/related; boundary=x");
    let body = format!("--x\r\n\r\n{doc}\r\n--x\r\n\r\nhi\r\n--x--");
    assert_eq!(request.body(body).send().await.expect("an answer").status(), 500, "a digest of other bytes");
}

#[tokio::test]
async fn local_documents_may_come_in_bulk() {
    let c = start().await.with_database("a").await;
    let docs = |docs: Value| json!({ "docs": docs });
    let (_, rows) = c.post("a/_bulk_docs", docs(json!([{"_id": "_local/x"}, {"_id": "y"}]))).await;
    assert_eq!((&rows[0], &rows[1]["id"]), (&json!({"ok": true, "id": "_local/x", "rev": "0-1"}), &json!("y")));
    // No revision is compared.
    let cases = [
        (json!({"_id": "_local/x"}), json!({"ok": true, "id": "_local/x", "rev": "0-1"})),
        (json!({"_id": "_local/x", "_rev": "0-77"}), json!({"ok": true, "id": "_local/x", "rev": "0-78"})),
        (json!({"_id": "_local/x", "_rev": "0-z"}), json!({"id": "_local/x", "error": "error", "reason": "Invalid rev format"})),
        (json!({"_id": "_local/x", "_deleted": true}), json!({"ok": true, "id": "_local/x", "rev": "0-0"})),
        (json!({"_id": "_local/x", "_deleted": true}), json!({"ok": true, "id": "_local/x", "rev": "0-0"})),
    ];
    for (doc, row) in cases {
        assert_eq!(c.post("a/_bulk_docs", docs(json!([doc]))).await, (201, json!([row])), "{doc}");
    }
    let replicated = json!({"new_edits": false, "docs": [{"_id": "_local/x", "_rev": "0-1"}]});
    assert_eq!(c.post("a/_bulk_docs", replicated).await, (201, json!([])));
    assert_eq!(c.get("a/_local/x").await["_rev"], "0-2");
}

#[tokio::test]
async fn refused_documents_do_not_stop_the_others() {
    let c = start().await.with_database("a").await;
    c.server.faults().refuse("a", "bad");
    let docs = json!([{"_id": "bad", "_rev": "1-a"}, {"_id": "good", "_rev": "1-a"}]);
    let (status, rows) = c.post("a/_bulk_docs", json!({"new_edits": false, "docs": docs})).await;
    let reason = "a refusal that was asked for";
    assert_eq!((status, rows), (201, json!([{"id": "bad", "rev": "1-a", "error": "forbidden", "reason": reason}])));
    assert_eq!(c.put("a/bad2?new_edits=false", json!({"_rev": "1-a"})).await.0, 403);
    assert_eq!(c.ids("a/_changes").await, ["good"]);
    assert_eq!(
        c.post("_dev/faults", json!({"refuse": [{"id": "u", "unauthorized": true}], "document_bytes_max": 100})).await.0,
        200
    );
    assert_eq!(c.put("a/u", json!({})).await.0, 401);
    let docs = json!([{"_id": "small", "_rev": "1-a"}, {"_id": "large", "_rev": "1-a", "text": "x".repeat(200)}]);
    let refused = c.post("a/_bulk_docs", json!({"new_edits": false, "docs": docs})).await;
    assert_eq!(refused, (413, json!({"error": "document_too_large", "reason": "large"})));
    assert_eq!(c.ids("a/_changes").await, ["good"], "nothing of that request is written");
}

#[tokio::test]
async fn an_older_copy_comes_back_as_it_was() {
    let c = start().await.with_database("a").await;
    c.put("a/x", json!({})).await;
    c.put("a/_local/l", json!({"v": 1})).await;
    let seq = c.get("a/_changes").await["last_seq"].as_str().expect("a seq").to_string();
    assert_eq!(c.post("_dev/snapshot", json!({"db": "a"})).await.0, 200);
    c.put("a/y", json!({})).await;
    c.put("a/_local/l", json!({"v": 2})).await;
    let later = c.get("a/_changes").await["last_seq"].as_str().expect("a seq").to_string();
    for _ in 0..2 {
        assert_eq!(c.post("_dev/restore", json!({"db": "a"})).await.0, 200);
        assert_eq!(c.ids("a/_changes").await, ["x"]);
        assert_eq!(c.get("a/_local/l").await["v"], 1);
        c.put("a/z", json!({})).await;
        assert_eq!(c.ids(&format!("a/_changes?since={seq}")).await, ["z"], "an old seq is still one of this database");
        assert!(c.ids(&format!("a/_changes?since={later}")).await.is_empty(), "a seq of the lost time hides what is new");
    }
    assert_eq!(c.post("_dev/restore", json!({"db": "b"})).await.0, 404);
}

#[tokio::test]
async fn a_database_made_again_in_the_same_second() {
    let c = start().await.with_database("a").await;
    c.put("a/x", json!({})).await;
    let before = c.get("a").await;
    let old = c.get("a/_changes").await["last_seq"].as_str().expect("a seq").to_string();
    assert_eq!(c.post("_dev/remake", json!({"db": "a"})).await.0, 200);
    let after = c.get("a").await;
    assert_eq!((&after["instance_start_time"], &after["doc_count"]), (&before["instance_start_time"], &json!(0)));
    c.put("a/y", json!({})).await;
    assert_eq!(c.ids(&format!("a/_changes?since={old}")).await, ["y"]);
}

#[tokio::test]
async fn a_number_of_shards_is_taken_and_checked() {
    let c = start().await;
    assert_eq!(c.ask(Method::PUT, "a?q=2&n=1", None).await.0, 201);
    let refused = c.ask(Method::PUT, "b?q=0", None).await;
    assert_eq!(refused.1["reason"], "The `q` value should be a positive integer.");
    assert_eq!(c.ask(Method::GET, "a/_changes?filter=_view&view=x/y", None).await.0, 501);
}
