//! A TCP proxy between Spiegel and CouchDB that misbehaves on request, and counts what passes.
//!
//! It reads the heads of the requests, so that it can answer in CouchDB's place; the answers it passes on as bytes.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::port::OwnPort;

#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    None,
    /// Nobody listens.
    Refuse,
    /// Connections stay open and nothing passes, as when a node was stopped.
    Silent,
    /// So many bytes of answers a second, for each connection.
    Slow {
        bytes_per_second: usize,
    },
    /// Answers every request itself.
    Answer {
        status: u16,
        body: String,
    },
}

struct Shared {
    upstream: String,
    fault: watch::Sender<Fault>,
    /// Counts up to cut every connection that is open.
    cuts: watch::Sender<u64>,
    /// So many answers that carry rows break off in their middle.
    truncations: AtomicU32,
    truncated: AtomicU64,
    requests: Mutex<BTreeMap<String, u64>>,
}

#[derive(Clone)]
pub struct Proxy {
    port: Arc<OwnPort>,
    shared: Arc<Shared>,
}

impl Proxy {
    /// In front of `http://host:port`.
    pub async fn start(upstream: &str) -> Self {
        let upstream = upstream.trim_start_matches("http://").trim_end_matches('/').to_string();
        let shared = Arc::new(Shared {
            upstream,
            fault: watch::Sender::new(Fault::None),
            cuts: watch::Sender::new(0),
            truncations: AtomicU32::new(0),
            truncated: AtomicU64::new(0),
            requests: Mutex::default(),
        });
        let port = Arc::new(OwnPort::new());
        tokio::spawn(listen(port.clone(), port.listen(), shared.clone()));
        Self { port, shared }
    }

    pub fn base(&self) -> String {
        format!("http://127.0.0.1:{}", self.port.number)
    }

    /// From now on, also for the connections that are open.
    pub fn set(&self, fault: Fault) {
        let cuts = fault == Fault::Refuse;
        self.shared.fault.send_replace(fault);
        if cuts {
            self.cut();
        }
    }

    pub fn heal(&self) {
        self.set(Fault::None);
    }

    /// Cuts every open connection, once.
    pub fn cut(&self) {
        self.shared.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// The next `count` pieces of an answer with a row in it are cut in the middle, and their connections with them.
    pub fn truncate(&self, count: u32) {
        self.shared.truncations.store(count, Ordering::SeqCst);
    }

    pub fn truncated(&self) -> u64 {
        self.shared.truncated.load(Ordering::SeqCst)
    }

    /// Requests so far by `METHOD endpoint`, a database's name replaced by `db`.
    pub fn requests(&self) -> BTreeMap<String, u64> {
        self.shared.requests.lock().expect("not poisoned").clone()
    }

    pub fn forget(&self) {
        self.shared.requests.lock().expect("not poisoned").clear();
    }
}

/// Listens, but for the times when it refuses: then nobody does.
async fn listen(port: Arc<OwnPort>, listener: TcpListener, shared: Arc<Shared>) {
    let mut fault = shared.fault.subscribe();
    let mut listener = Some(listener);
    loop {
        if *fault.borrow_and_update() == Fault::Refuse {
            listener = None;
            if fault.changed().await.is_err() {
                return;
            }
            continue;
        }
        let open = listener.get_or_insert_with(|| port.listen());
        tokio::select! {
            accepted = open.accept() => if let Ok((client, _)) = accepted {
                tokio::spawn(connection(client, shared.clone()));
            },
            changed = fault.changed() => if changed.is_err() { return },
        }
    }
}

async fn connection(client: TcpStream, shared: Arc<Shared>) {
    let mut cuts = shared.cuts.subscribe();
    // Accepted between the fault and the closing of the port: its cut may be over, and it would be kept alive through the outage.
    if *shared.fault.borrow() == Fault::Refuse {
        return;
    }
    let _ = client.set_nodelay(true);
    let work = async {
        // A stopped node's kernel still accepts.
        not_silent(&shared).await;
        let Ok(server) = TcpStream::connect(&shared.upstream).await else { return };
        let _ = server.set_nodelay(true);
        let (client_read, client_write) = client.into_split();
        let (server_read, server_write) = server.into_split();
        let client_write = Arc::new(tokio::sync::Mutex::new(client_write));
        tokio::select! {
            () = upwards(client_read, server_write, client_write.clone(), &shared) => {}
            () = downwards(server_read, client_write, &shared) => {}
        }
    };
    tokio::select! {
        () = work => {}
        _ = cuts.changed() => {}
    }
}

async fn not_silent(shared: &Shared) {
    let mut fault = shared.fault.subscribe();
    while *fault.borrow_and_update() == Fault::Silent {
        if fault.changed().await.is_err() {
            return;
        }
    }
}

/// From the client to CouchDB, request by request.
async fn upwards(
    mut client: OwnedReadHalf,
    mut server: OwnedWriteHalf,
    answers: Arc<tokio::sync::Mutex<OwnedWriteHalf>>,
    shared: &Shared,
) {
    let mut buffer = Vec::new();
    loop {
        let Some(head_length) = head(&mut client, &mut buffer).await else { return };
        let head_text = String::from_utf8_lossy(&buffer[..head_length]).into_owned();
        let Some(body_length) = body(&mut client, &mut buffer, head_length, &head_text).await else { return };
        let request: Vec<u8> = buffer.drain(..head_length + body_length).collect();
        not_silent(shared).await;
        shared.note(head_text.lines().next().unwrap_or_default());
        let fault = shared.fault.borrow().clone();
        match fault {
            Fault::Answer { status, body } => {
                let kind = if body.starts_with(['{', '[']) { "application/json" } else { "text/html" };
                let head = format!("HTTP/1.1 {status} Fault\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n", body.len());
                if answers.lock().await.write_all(format!("{head}{body}").as_bytes()).await.is_err() {
                    return;
                }
            }
            _ => {
                if server.write_all(&request).await.is_err() {
                    return;
                }
            }
        }
    }
}

impl Shared {
    fn note(&self, request_line: &str) {
        *self.requests.lock().expect("not poisoned").entry(endpoint(request_line)).or_default() += 1;
    }
}

/// `GET /some%2Fdb/_changes?since=…` ▶ `GET db/_changes`.
fn endpoint(request_line: &str) -> String {
    let mut words = request_line.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = target.split('?').next().unwrap_or_default();
    let mut segments = path.trim_start_matches('/').split('/');
    let first = match segments.next().unwrap_or_default() {
        "" => "/",
        system if system.starts_with('_') => system,
        _ => "db",
    };
    match segments.next() {
        None | Some("") => format!("{method} {first}"),
        Some(kind) if kind.starts_with('_') => format!("{method} {first}/{kind}"),
        Some(_) => format!("{method} {first}/doc"),
    }
}

/// Reads until the end of a request's head is in the buffer.
async fn head(client: &mut OwnedReadHalf, buffer: &mut Vec<u8>) -> Option<usize> {
    loop {
        if let Some(at) = find(buffer, b"\r\n\r\n") {
            return Some(at + 4);
        }
        more(client, buffer).await?;
    }
}

/// Reads until the body that the head announces is in the buffer; its length there.
async fn body(client: &mut OwnedReadHalf, buffer: &mut Vec<u8>, start: usize, head: &str) -> Option<usize> {
    let header = |wanted: &str| {
        let pairs = head.lines().skip(1).filter_map(|line| line.split_once(':'));
        pairs.filter(|(name, _)| name.eq_ignore_ascii_case(wanted)).map(|(_, value)| value.trim().to_string()).next()
    };
    if header("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
        let mut at = start;
        loop {
            let line_end = loop {
                match find(&buffer[at..], b"\r\n") {
                    Some(found) => break at + found,
                    None => more(client, buffer).await?,
                }
            };
            let size = std::str::from_utf8(&buffer[at..line_end]).ok()?.split(';').next()?.trim();
            let size = usize::from_str_radix(size, 16).ok()?;
            at = line_end + 2 + size + 2;
            while buffer.len() < at {
                more(client, buffer).await?;
            }
            if size == 0 {
                return Some(at - start);
            }
        }
    }
    let length = header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    while buffer.len() < start + length {
        more(client, buffer).await?;
    }
    Some(length)
}

async fn more(client: &mut OwnedReadHalf, buffer: &mut Vec<u8>) -> Option<()> {
    match client.read_buf(buffer).await {
        Ok(0) | Err(_) => None,
        Ok(_) => Some(()),
    }
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

/// From CouchDB to the client, as bytes.
async fn downwards(mut server: OwnedReadHalf, client: Arc<tokio::sync::Mutex<OwnedWriteHalf>>, shared: &Shared) {
    let mut piece = vec![0; 64 << 10];
    loop {
        let Ok(length @ 1..) = server.read(&mut piece).await else { return };
        not_silent(shared).await;
        let bytes = &piece[..length];
        let has_row = find(bytes, b"\"seq\"").is_some();
        let takes_one = |left: u32| left.checked_sub(1);
        if has_row && shared.truncations.fetch_update(Ordering::SeqCst, Ordering::SeqCst, takes_one).is_ok() {
            shared.truncated.fetch_add(1, Ordering::SeqCst);
            let middle = find(bytes, b"\"seq\"").unwrap_or_default() + (length - find(bytes, b"\"seq\"").unwrap_or_default()) / 2;
            let _ = client.lock().await.write_all(&bytes[..middle]).await;
            return;
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let fault = shared.fault.borrow().clone();
            let now = match fault {
                Fault::Slow { bytes_per_second } => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    rest.len().min((bytes_per_second / 10).max(1))
                }
                _ => rest.len(),
            };
            if client.lock().await.write_all(&rest[..now]).await.is_err() {
                return;
            }
            rest = &rest[now..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::support::{Couch, Kind, Receiver, Server};
    use serde_json::{Value, json};

    #[test]
    fn requests_are_counted_by_endpoint() {
        let cases = [
            ("GET / HTTP/1.1", "GET /"),
            ("GET /a%2Fb/_changes?since=0 HTTP/1.1", "GET db/_changes"),
            ("POST /_dbs_info HTTP/1.1", "POST _dbs_info"),
            ("GET /_global_changes/_changes HTTP/1.1", "GET _global_changes/_changes"),
            ("PUT /a/_local/x HTTP/1.1", "PUT db/_local"),
            ("PUT /a/x HTTP/1.1", "PUT db/doc"),
            ("GET /a/ HTTP/1.1", "GET db"),
        ];
        for (line, expected) in cases {
            assert_eq!(endpoint(line), expected, "{line}");
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_proxy_passes_and_misbehaves() {
        let receiver = Receiver::start().await;
        let proxy = Proxy::start(&receiver.url("")).await;
        let http = reqwest::Client::builder().timeout(Duration::from_millis(700)).build().expect("a client");
        let post = |http: &reqwest::Client| http.post(format!("{}/x", proxy.base())).json(&json!({ "a": 1 })).send();
        assert_eq!(post(&http).await.expect("an answer").status(), 200);
        // A body in chunks, twice over one connection.
        for _ in 0..2 {
            let parts = futures_util::stream::iter(["[1,", "2]"].map(Ok::<_, std::io::Error>));
            let request = http.post(format!("{}/chunks", proxy.base())).body(reqwest::Body::wrap_stream(parts));
            assert_eq!(request.send().await.expect("an answer").status(), 200);
        }
        assert_eq!(receiver.requests_at("/chunks")[1].body, json!([1, 2]));

        proxy.set(Fault::Answer { status: 500, body: r#"{"error":"x"}"#.into() });
        let answer = post(&http).await.expect("an answer");
        assert_eq!(answer.status(), 500);
        assert_eq!(answer.json::<Value>().await.expect("JSON"), json!({ "error": "x" }));
        proxy.set(Fault::Silent);
        assert!(post(&http).await.expect_err("silence").is_timeout());
        proxy.set(Fault::Refuse);
        super::super::eventually(super::super::SOON, "a refusal", async || {
            post(&http).await.is_err_and(|error| error.is_connect()).then_some(())
        })
        .await;
        proxy.heal();
        super::super::eventually(super::super::SOON, "an answer again", async || post(&http).await.ok()).await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_servers_answer_the_client_of_the_tests() {
        for kind in [Kind::Embedded, Kind::PouchDb, Kind::CouchDb] {
            let Some(server) = Server::start(kind).await else { continue };
            let proxy = Proxy::start(&server.couch.base).await;
            let couch: Couch = server.couch.at(&proxy.base());
            let db = format!("it_support_{}/a+b$(c)", fastrand::u32(..));
            couch.create(&db).await;
            let rev = couch.put(&db, "x", json!({ "a": 1 })).await;
            couch.put(&db, "x", json!({ "a": 2 })).await;
            assert!(rev.starts_with("1-"));
            couch.fill(&db, "d", 10).await;
            assert_eq!(couch.all(&db).await.len(), 11);
            assert_eq!(couch.get(&db, "x").await.expect("a document")["a"], 2);
            couch.remove(&db, "x").await;
            assert_eq!(couch.get(&db, "x").await, None);
            assert_eq!(couch.changes(&db, "since=0").await["results"].as_array().expect("rows").len(), 11);
            assert!(couch.updates(&db).await >= 11);
            assert!(couch.all_dbs().await.contains(&db));
            couch.delete(&db).await;
            assert!(!couch.exists(&db).await, "{kind:?}");
            assert!(proxy.requests()["PUT db/doc"] >= 3, "{:?}", proxy.requests());
        }
    }
}
