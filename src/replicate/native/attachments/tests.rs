#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::disallowed_methods)]

use super::*;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const IDLE: Duration = Duration::from_millis(400);
/// A test that waits longer hangs.
const LONG: Duration = Duration::from_secs(20);

fn stub(length: u64, revpos: u64) -> AttachmentInfo {
    AttachmentInfo { length: Some(length), revpos: Some(revpos), stub: true, ..AttachmentInfo::default() }
}

#[test]
fn small_new_attachments_go_inline_large_ones_as_a_stream_and_old_ones_not_at_all() {
    let unknown = AttachmentInfo { stub: true, ..AttachmentInfo::default() };
    let inline = AttachmentInfo { length: Some(1 << 30), ..AttachmentInfo::default() };
    let old = AttachmentInfo { revpos: None, ..stub(1, 0) };
    for (attachments, atts_since, expected) in [
        (vec![], vec![], Carry::AsRead),
        (vec![stub(0, 1)], vec![], Carry::Inline),
        (vec![stub(1 << 30, 3)], vec![], Carry::Stream),
        (vec![stub(1 << 30, 3)], vec!["3-c"], Carry::Stream),
        (vec![stub(1 << 30, 3)], vec!["4-d", "1-a"], Carry::AsRead),
        (vec![stub(1 << 30, 1), stub(5, 4)], vec!["1-a"], Carry::Inline),
        (vec![stub(1 << 30, 1), stub(5, 4)], vec!["1-other", "5-e", "9-x", "x", "-", "2-"], Carry::AsRead),
        (vec![stub(1 << 30, 1)], vec!["1-other", "99999999999999999999999-a", "6-f"], Carry::Stream),
        (vec![stub(INLINE_BYTES_MAX / 2, 1), stub(INLINE_BYTES_MAX / 2, 5)], vec![], Carry::Inline),
        (vec![stub(INLINE_BYTES_MAX / 2, 1), stub(INLINE_BYTES_MAX / 2 + 1, 5)], vec![], Carry::Stream),
        (vec![stub(u64::MAX, 1), stub(u64::MAX, 5)], vec![], Carry::Stream),
        (vec![unknown], vec![], Carry::Stream),
        (vec![inline], vec![], Carry::AsRead),
        (vec![old], vec!["5-e"], Carry::Inline),
    ] {
        let attachments: std::collections::BTreeMap<_, _> =
            attachments.into_iter().enumerate().map(|(n, info)| (n.to_string(), info)).collect();
        // The ids of generations 5 to 1; `3` is another branch's.
        let revisions =
            Some(super::super::elements::Revisions { start: 5, ids: ["e", "d", "x", "b", "a"].map(String::from).to_vec() });
        let (id, rev) = (String::from("a"), String::from("5-e"));
        let doc = Shallow { id, rev, deleted: false, attachments, revisions };
        assert_eq!(carry(&doc, &atts_since), expected, "{doc:?} since {atts_since:?}");
    }
}

#[test]
fn a_document_that_no_url_can_name_goes_inline() {
    for (id, expected) in [("..", Carry::Inline), (".", Carry::Inline), ("_design/..", Carry::Inline), ("...", Carry::Stream)] {
        let text = json!({"_id": id, "_rev": "1-a", "_attachments": {"a": {"stub": true, "length": 1 << 30, "revpos": 1}}});
        assert_eq!(carry(&Shallow::parse(text.to_string().as_bytes()).unwrap(), &[""; 0]), expected, "{id}");
    }
}

#[test]
fn paths_are_encoded_and_never_too_long() {
    let path = source_path("ä/b?+", "2-b", &["1-a", "10-b", "9-c"]);
    let query = "rev=2-b&revs=true&attachments=true&att_encoding_info=true";
    assert_eq!(path, format!("%C3%A4%2Fb%3F%2B?{query}&atts_since=%5B%2210-b%22%2C%229-c%22%2C%221-a%22%5D"));
    assert_eq!(source_path("_design/a b", "2-b", &[""; 0]), format!("_design/a%20b?{query}"));
    assert_eq!(target_path("_design/a/b"), "_design/a%2Fb?new_edits=false");
    let revs: Vec<String> = (0..1000).map(|n| format!("{n}-{n:032x}")).collect();
    let path = source_path("a", "1000-a", &revs);
    assert!((2900..3200).contains(&path.len()) && path.contains("999-") && !path.contains("%22800-"), "{path}");
    assert!(!source_path("a", "2-b", &["x".repeat(4000)]).contains("atts_since"));
}

fn answer(status: u16, body: &str) -> Answer {
    Answer::parse(StatusCode::from_u16(status).unwrap(), body.as_bytes())
}

#[test]
fn the_sources_refusals_are_told_apart() {
    for (status, body, expected) in [
        (404, r#"{"error":"not_found","reason":"missing"}"#, "NotFound("),
        (404, r#"{"error":"not_found","reason":"deleted"}"#, "NotFound("),
        (404, r#"{"error":"not_found","reason":"Database does not exist."}"#, "NotFound("),
        (404, "<html>nginx</html>", "NotFound("),
        (401, r#"{"error":"unauthorized","reason":"Name or password is incorrect."}"#, "Unauthorized("),
        (403, r#"{"error":"forbidden","reason":"You are not allowed to access this db."}"#, "Forbidden("),
        (400, r#"{"error":"bad_request","reason":"Invalid rev format"}"#, "Status { status: 400"),
        (429, "", "TooManyRequests"),
        (500, r#"{"error":"timeout","reason":null}"#, "Status { status: 500, reason: \"timeout\""),
    ] {
        let outcome = format!("{:?}", answer(status, body).into_error());
        assert!(outcome.starts_with(expected), "{status} {body}: {outcome}");
    }
}

#[test]
fn the_targets_refusals_of_a_document_are_told_from_those_of_a_user() {
    for (status, body, expected) in [
        (201, r#"{"ok":true}"#, "Ok(Written { bytes: 7, is_confirmed: true })"),
        (202, "", "Ok(Written { bytes: 7, is_confirmed: false })"),
        (401, r#"{"error":"unauthorized","reason":"log in first"}"#, "Ok(Refused { reason: \"unauthorized: log in first\""),
        (401, r#"{"error":"unauthorized","reason":"Name or password is incorrect."}"#, "Err(Target(Unauthorized("),
        (401, r#"{"error":"unauthorized","reason":"You are not a db or server admin."}"#, "Ok(Refused"),
        (401, "<html>", "Err(Target(Unauthorized("),
        (403, r#"{"error":"forbidden","reason":"no"}"#, "Ok(Refused { reason: \"forbidden: no\""),
        (403, r#"{"error":"forbidden","reason":{"field":"a"}}"#, "Ok(Refused { reason: \"forbidden: {\\\"field\\\":\\\"a\\\"}\""),
        (403, r#"{"error":"forbidden","reason":"You are not allowed to access this db."}"#, "Err(Target(Forbidden("),
        (403, r#"{"error":"forbidden","reason":"Account is temporarily locked due to x"}"#, "Err(Target(Forbidden("),
        (403, "blocked by the firewall", "Err(Target(Forbidden("),
        (404, r#"{"error":"not_found","reason":"Database does not exist."}"#, "Err(Target(NotFound("),
        (400, r#"{"error":"doc_validation","reason":"Bad special document member: _x"}"#, "Ok(Refused"),
        (400, "", "Err(Target(Status { status: 400"),
        (409, r#"{"error":"conflict","reason":"Document update conflict."}"#, "Ok(Refused"),
        (412, r#"{"error":"missing_stub","reason":"Invalid attachment stub in d for t"}"#, "Ok(MissingStub)"),
        (412, r#"{"error":"file_exists"}"#, "Err(Target(Status { status: 412"),
        (413, r#"{"error":"document_too_large","reason":""}"#, "Ok(Refused { reason: \"document_too_large\""),
        (413, "", "Ok(Refused { reason: \"413 Payload Too Large\""),
        (429, "", "Err(Target(TooManyRequests"),
        (500, r#"{"error":"unknown_error","reason":"http://u:hush@h/"}"#, "Err(Target(Status { status: 500"),
        (503, "", "Err(Target(Status { status: 503"),
    ] {
        let outcome = format!("{:?}", of_target(answer(status, body), 7));
        assert!(outcome.starts_with(expected) && !outcome.contains("hush"), "{status} {body}: {outcome}");
    }
}

/// What a raw server does with a connection once the request's head has come.
#[derive(Clone, Copy)]
enum Does {
    /// An answer that never ends.
    SendForever,
    SendALittleAndStall,
    SendALittleAndCut,
    Stall,
    /// An answer while the body is still coming, read or not.
    Answer {
        close: bool,
        text: &'static str,
    },
}

const FORBIDDEN: &str = "HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nContent-Length: 34\r\n\r\n{\"error\":\"forbidden\",\"reason\":\"x\"}\n";
const TOO_LARGE: &str = "HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";

/// For what the embedded server does not do: it reads each request whole before it answers. Its address, and bytes sent.
async fn raw_server(does: Does) -> (String, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let sent = Arc::new(AtomicU64::new(0));
    let count = sent.clone();
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            tokio::spawn(serve_raw(connection, does, count.clone()));
        }
    });
    (url, sent)
}

async fn serve_raw(mut connection: TcpStream, does: Does, sent: Arc<AtomicU64>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(connection.read_u8().await.unwrap());
    }
    if let Does::Answer { close, text } = does {
        if !head.starts_with(b"GET") {
            let _ = connection.read(&mut [0; 10_000]).await;
        }
        connection.write_all(text.as_bytes()).await.unwrap();
        if !close {
            tokio::time::sleep(LONG).await;
        }
        return;
    }
    if matches!(does, Does::Stall) {
        tokio::time::sleep(LONG).await;
        return;
    }
    let head = "HTTP/1.1 200 OK\r\nContent-Type: multipart/related; boundary=\"x\"\r\nContent-Length: 99999999999\r\n\r\n--x\r\n";
    connection.write_all(head.as_bytes()).await.unwrap();
    let piece = [b'.'; 65536];
    connection.write_all(&piece).await.unwrap();
    match does {
        Does::SendALittleAndStall => tokio::time::sleep(LONG).await,
        Does::SendForever => {
            while connection.write_all(&piece).await.is_ok() {
                sent.fetch_add(piece.len() as u64, Ordering::Relaxed);
            }
            sent.fetch_add(1 << 60, Ordering::Relaxed);
        }
        _ => {}
    }
}

async fn transfer_between(source: &str, target: &str) -> Result<Moved, MoveError> {
    let http = reqwest::Client::new();
    let moving = transfer(http.get(source), http.put(target), IDLE);
    timeout(LONG, moving).await.expect("it ends by itself")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_target_that_answers_early_is_heard_and_the_rest_is_not_read() {
    for close in [false, true] {
        for (text, expected) in [(FORBIDDEN, "forbidden: x"), (TOO_LARGE, "413 Payload Too Large")] {
            let (source, sent) = raw_server(Does::SendForever).await;
            let (target, _) = raw_server(Does::Answer { close, text }).await;
            let moved = transfer_between(&source, &target).await;
            match moved {
                Ok(Moved::Refused { reason }) => assert_eq!(reason, expected),
                // The reset that follows a close may overtake the answer.
                Err(MoveError::Target(CouchError::Unreachable(_))) if close => {}
                other => panic!("{other:?}"),
            }
            let cut = async {
                while sent.load(Ordering::Relaxed) < 1 << 60 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            timeout(LONG, cut).await.expect("the source is let go");
        }
    }
}

#[tokio::test]
async fn silence_of_either_side_has_an_end() {
    let answering = Does::Answer { close: false, text: "HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n" };
    for (source, target, expected) in [
        (Does::Stall, answering, "source: couchdb does not answer: nothing moved for 400ms"),
        (Does::SendALittleAndStall, Does::Stall, "source: couchdb does not answer: nothing moved for 400ms"),
        (Does::SendForever, Does::Stall, "target: couchdb does not answer: nothing moved for 400ms"),
    ] {
        let ((source, _), (target, _)) = (raw_server(source).await, raw_server(target).await);
        let begun = Instant::now();
        let error = transfer_between(&source, &target).await.expect_err("somebody is silent");
        assert_eq!(error.to_string(), expected);
        assert!(begun.elapsed() < LONG / 4, "{:?}", begun.elapsed());
    }
}

#[tokio::test]
async fn a_source_that_breaks_off_is_to_blame_and_nobody_else() {
    let ((source, _), (target, _)) = (raw_server(Does::SendALittleAndCut).await, raw_server(Does::Stall).await);
    let error = transfer_between(&source, &target).await.expect_err("it was cut");
    assert!(matches!(error, MoveError::Source(CouchError::Unreachable(_))), "{error}");
    let error = transfer_between("http://127.0.0.1:1/", &target).await.expect_err("nobody is there");
    assert!(matches!(error, MoveError::Source(CouchError::Unreachable(_))), "{error}");
    let (source, _) = raw_server(Does::SendForever).await;
    let error = transfer_between(&source, "http://127.0.0.1:1/").await.expect_err("nobody is there");
    assert!(matches!(error, MoveError::Target(CouchError::Unreachable(_))), "{error}");
    let (page, _) = raw_server(Does::Answer { close: true, text: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi" }).await;
    let error = transfer_between(&page, &target).await.expect_err("no document");
    assert!(matches!(error, MoveError::Source(CouchError::Malformed(_))), "{error}");
}

/// Two databases on real servers.
struct Pair {
    http: reqwest::Client,
    source: String,
    target: String,
}

impl Pair {
    async fn new(source: &str, target: &str, name: &str) -> Self {
        let name = format!("t_{name}_{}", fastrand::u32(..));
        let database = |server: &str, side: &str| format!("{}/{name}_{side}/", server.trim_end_matches('/'));
        let pair = Self { http: reqwest::Client::new(), source: database(source, "a"), target: database(target, "b") };
        for url in [&pair.source, &pair.target] {
            assert!(pair.http.put(url).send().await.unwrap().status().is_success(), "{name}");
        }
        pair
    }

    async fn delete(self) {
        for url in [&self.source, &self.target] {
            self.http.delete(url).send().await.unwrap();
        }
    }

    async fn put(&self, database: &str, id: &str, doc: &Value) -> String {
        let answer = self.http.put(format!("{database}{}", encode_doc_id(id))).json(doc).send().await.unwrap();
        let answer: Value = answer.json().await.unwrap();
        answer["rev"].as_str().unwrap_or_else(|| panic!("{answer}")).to_string()
    }

    async fn get(&self, database: &str, id: &str, query: &str) -> Value {
        let url = format!("{database}{}?{query}", encode_doc_id(id));
        self.http.get(url).send().await.unwrap().json().await.unwrap()
    }

    async fn transfer(&self, id: &str, rev: &str, atts_since: &[&str]) -> Result<Moved, MoveError> {
        let source = self.http.get(format!("{}{}", self.source, source_path(id, rev, atts_since)));
        let target = self.http.put(format!("{}{}", self.target, target_path(id)));
        timeout(Duration::from_secs(120), transfer(source, target, Duration::from_secs(20))).await.expect("it ends by itself")
    }

    /// Document, revision path and stored attachments are the same at both ends.
    async fn assert_same(&self, id: &str) {
        let query = "att_encoding_info=true&revs=true";
        let (source, target) = (self.get(&self.source, id, query).await, self.get(&self.target, id, query).await);
        assert_eq!(source, target);
        assert!(source["_rev"].is_string(), "{source}");
    }
}

fn attachment(content_type: &str, data: &[u8]) -> Value {
    json!({"content_type": content_type, "data": STANDARD.encode(data)})
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    fastrand::Rng::with_seed(7).fill(&mut data);
    data
}

/// What holds for any pair of servers.
async fn revisions_move(pair: &Pair) {
    let id = "_design/ü +/?";
    let attachments = json!({
        "empty": attachment("application/octet-stream", b""),
        "one": attachment("application/octet-stream", b"1"),
        "text.txt": attachment("text/plain", "hello ".repeat(17_000).as_bytes()),
        "ü €/𝄞 \".bin": attachment("application/octet-stream", &noise(3_000_000)),
    });
    let first = pair.put(&pair.source, id, &json!({"n": 1, "_attachments": attachments})).await;
    let Ok(Moved::Written { bytes: all, is_confirmed: true }) = pair.transfer(id, &first, &[]).await else { panic!("written") };
    assert!(all > 3_000_000, "{all}");
    pair.assert_same(id).await;

    let mut doc = pair.get(&pair.source, id, "").await;
    doc["_attachments"]["new"] = attachment("application/octet-stream", &noise(100_000));
    let second = pair.put(&pair.source, id, &doc).await;
    let moved = pair.transfer(id, &second, &[&first]).await;
    let Ok(Moved::Written { bytes, .. }) = moved else { panic!("{moved:?}") };
    assert!((100_000..150_000).contains(&bytes), "what the target has is not sent again: {bytes}");
    pair.assert_same(id).await;
    assert!(matches!(pair.transfer(id, &second, &[&first]).await, Ok(Moved::Written { .. })), "once more does no harm");

    let lone = pair.put(&pair.source, "lone", &json!({"_attachments": attachments})).await;
    let mut doc = pair.get(&pair.source, "lone", "").await;
    doc["n"] = json!(2);
    let newer = pair.put(&pair.source, "lone", &doc).await;
    assert_eq!(pair.transfer("lone", &newer, &[&lone]).await.unwrap(), Moved::MissingStub);
    assert!(matches!(pair.transfer("lone", &newer, &[]).await, Ok(Moved::Written { .. })));
    pair.assert_same("lone").await;

    for (id, rev) in [("lone", "7-0123456789abcdef0123456789abcdef"), ("nobody", first.as_str())] {
        let gone = pair.transfer(id, rev, &[]).await;
        assert!(matches!(gone, Err(MoveError::Source(CouchError::NotFound(_)))), "{gone:?}");
    }
    let revs: Vec<String> = (3..1000).map(|n| format!("{n}-{n:032x}")).collect();
    let revs: Vec<&str> = revs.iter().map(String::as_str).collect();
    assert!(matches!(pair.transfer("lone", &newer, &revs).await, Ok(Moved::Written { .. })), "as many as are known");

    for (source, target, side) in [("t_nowhere/", pair.target.as_str(), "source"), (pair.source.as_str(), "t_nowhere/", "target")]
    {
        let absolute = |url: &str, beside: &str| match url.starts_with("http") {
            true => url.to_string(),
            false => reqwest::Url::parse(beside).unwrap().join("../").unwrap().join(url).unwrap().to_string(),
        };
        let source = pair.http.get(format!("{}{}", absolute(source, &pair.source), source_path("lone", &newer, &[""; 0])));
        let target = pair.http.put(format!("{}{}", absolute(target, &pair.target), target_path("lone")));
        let error = transfer(source, target, LONG).await.expect_err("no such database");
        assert!(error.to_string().starts_with(&format!("{side}: not found: ")), "{error}");
    }
}

#[cfg(feature = "dev")]
mod embedded {
    use super::*;
    use crate::dev::{DevOptions, DevServer, FaultRule};

    async fn server() -> (DevServer, String) {
        let listen = "127.0.0.1:0".parse().unwrap();
        let (user, password) = (String::from("admin"), "secret".into());
        let options = DevOptions { listen, user, password, global_changes_delay: Duration::from_millis(10) };
        let server = DevServer::start(options).await.unwrap();
        let url = format!("http://admin:secret@{}/", server.address());
        (server, url)
    }

    #[tokio::test]
    async fn revisions_move_between_embedded_servers() {
        let ((_a, source), (_b, target)) = (server().await, server().await);
        revisions_move(&Pair::new(&source, &target, "move").await).await;
    }

    #[tokio::test]
    async fn a_cut_answer_writes_nothing() {
        let ((a, source), (b, target)) = (server().await, server().await);
        let pair = Pair::new(&source, &target, "cut").await;
        let attachments = json!({"a": attachment("a/b", &noise(200_000))});
        let rev = pair.put(&pair.source, "d", &json!({"_attachments": attachments})).await;
        a.faults().add(FaultRule { path: Some(String::from("/t_cut")), times: Some(1), cut: true, ..FaultRule::default() });
        let error = pair.transfer("d", &rev, &[]).await.expect_err("it was cut");
        assert!(matches!(error, MoveError::Source(CouchError::Unreachable(_))), "{error}");
        assert_eq!(pair.get(&pair.target, "d", "").await["error"], "not_found");
        b.faults().answer(Some(http::Method::PUT), "/t_cut", 503, 1);
        let error = pair.transfer("d", &rev, &[]).await.expect_err("it was told so");
        // It answers without having read the body, and its reset may overtake the answer.
        assert!(matches!(error, MoveError::Target(_)), "{error}");
        assert!(matches!(pair.transfer("d", &rev, &[]).await, Ok(Moved::Written { .. })));
        pair.assert_same("d").await;
    }
}

/// On the server that SPIEGEL_TEST_COUCHDB_URL names, and from there to the one that SPIEGEL_TEST_COUCHDB_URL_2 names.
#[tokio::test]
async fn revisions_move_between_couchdbs() {
    let Ok(source) = std::env::var("SPIEGEL_TEST_COUCHDB_URL") else { return };
    let target = std::env::var("SPIEGEL_TEST_COUCHDB_URL_2").unwrap_or_else(|_| source.clone());
    let pair = Pair::new(&source, &target, "move").await;
    revisions_move(&pair).await;

    let rev = pair.put(&pair.source, "large", &json!({})).await;
    let upload = pair.http.put(format!("{}large/big.bin?rev={rev}", pair.source)).body(noise(64 << 20));
    let rev = upload.send().await.unwrap().json::<Value>().await.unwrap()["rev"].as_str().unwrap().to_string();
    let moved = pair.transfer("large", &rev, &[]).await;
    assert!(matches!(moved, Ok(Moved::Written { bytes, .. }) if bytes > 64 << 20), "{moved:?}");
    pair.assert_same("large").await;
    let mut doc = pair.get(&pair.source, "large", "").await;
    doc["n"] = json!(1);
    let newer = pair.put(&pair.source, "large", &doc).await;
    let moved = pair.transfer("large", &newer, &[&rev]).await;
    assert!(matches!(moved, Ok(Moved::Written { bytes, .. }) if bytes < 1000), "{moved:?}");
    pair.assert_same("large").await;

    let function =
        "function (doc) { if (doc.bad === 1) throw {forbidden: 'no'}; if (doc.bad === 2) throw {unauthorized: 'who'}; }";
    pair.put(&pair.target, "_design/v", &json!({"validate_doc_update": function})).await;
    for (bad, expected) in [(1, "forbidden: no"), (2, "unauthorized: who")] {
        let id = format!("bad{bad}");
        let attachments = json!({"a": attachment("application/octet-stream", &noise(5_000_000))});
        let rev = pair.put(&pair.source, &id, &json!({"bad": bad, "_attachments": attachments})).await;
        let refused = Moved::Refused { reason: String::from(expected) };
        assert_eq!(pair.transfer(&id, &rev, &[]).await.unwrap(), refused);
    }
    let stranger = pair.http.put(format!("{}{}", pair.target.replace("admin:", "nobody:"), target_path("large")));
    let source = pair.http.get(format!("{}{}", pair.source, source_path("large", &newer, &[""; 0])));
    let error = transfer(source, stranger, LONG).await.expect_err("nobody knows the user");
    assert!(matches!(error, MoveError::Target(CouchError::Unauthorized(_))), "{error}");
    pair.delete().await;
}
