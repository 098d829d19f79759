//! Receivers that misbehave until they are told to recover, on one thread of their own.

use anyhow::Context;
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    Answers500,
    Hangs,
    CutsTheHead,
    Answers429,
    Redirects,
    SendsTenGigabytes,
    IsGone,
}

impl Behaviour {
    pub const ALL: [Self; 7] = [
        Self::Answers500,
        Self::Hangs,
        Self::CutsTheHead,
        Self::Answers429,
        Self::Redirects,
        Self::SendsTenGigabytes,
        Self::IsGone,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Answers500 => "answers_500",
            Self::Hangs => "hangs",
            Self::CutsTheHead => "cuts_the_head",
            Self::Answers429 => "answers_429",
            Self::Redirects => "redirects",
            Self::SendsTenGigabytes => "sends_10_gb",
            Self::IsGone => "is_gone",
        }
    }
}

const TEN_GIGABYTES: u64 = 10 * 1024 * 1024 * 1024;

#[derive(Default)]
pub struct Accepted {
    /// By database and document id, the last `n` of the accepted ones.
    last: HashMap<(String, String), u64>,
    /// By database and document id: which `n` came when.
    arrivals: HashMap<(String, String), Vec<(u64, Instant)>>,
    pub count: usize,
    pub repeats: usize,
    /// An older `n` than one that was accepted before.
    pub out_of_order: usize,
    ids: HashSet<String>,
}

impl Accepted {
    pub fn last(&self, db: &str, id: &str) -> Option<u64> {
        self.last.get(&(db.to_string(), id.to_string())).copied()
    }

    /// When this state of a document came, or a newer one.
    pub fn arrival(&self, db: &str, id: &str, n: u64) -> Option<Instant> {
        let arrivals = self.arrivals.get(&(db.to_string(), id.to_string()))?;
        arrivals.iter().find(|(came, _)| *came >= n).map(|(_, at)| *at)
    }

    fn take(&mut self, id: &str, body: &Value) {
        self.count += 1;
        self.repeats += usize::from(!self.ids.insert(id.to_string()));
        let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
        let n = body["change"]["n"].as_u64().unwrap_or_default();
        let (db, doc_id) = (text(&body["db"]), text(&body["change"]["_id"]));
        self.arrivals.entry((db.clone(), doc_id.clone())).or_default().push((n, Instant::now()));
        let last = self.last.entry((db, doc_id)).or_insert(n);
        self.out_of_order += usize::from(n < *last);
        *last = (*last).max(n);
    }
}

#[derive(Clone)]
pub struct Hostile {
    pub behaviour: Behaviour,
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    recovered: AtomicBool,
    refused: AtomicU64,
    accepted: Mutex<Accepted>,
    /// Requests that a redirect led here.
    followed: AtomicU64,
}

impl Hostile {
    pub fn start(behaviour: Behaviour) -> anyhow::Result<Self> {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").context("bind a receiver")?;
        let address = socket.local_addr()?;
        drop(socket);
        let hostile = Self { behaviour, address, shared: Arc::default() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let served = hostile.clone();
        // Ends with the process.
        std::thread::Builder::new().name(behaviour.name().to_string()).spawn(move || {
            if let Err(error) = runtime.block_on(listen(served)) {
                eprintln!("  {behaviour:?} does not listen: {error:#}");
            }
        })?;
        Ok(hostile)
    }

    pub fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    pub fn recover(&self) {
        self.shared.recovered.store(true, Ordering::SeqCst);
    }

    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::SeqCst)
    }

    pub fn followed(&self) -> u64 {
        self.shared.followed.load(Ordering::SeqCst)
    }

    pub fn accepted(&self) -> MutexGuard<'_, Accepted> {
        self.shared.accepted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_recovered(&self) -> bool {
        self.shared.recovered.load(Ordering::SeqCst)
    }
}

async fn listen(hostile: Hostile) -> anyhow::Result<()> {
    while hostile.behaviour == Behaviour::IsGone && !hostile.has_recovered() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(hostile.address)?;
    let listener: TcpListener = socket.listen(1024)?;
    loop {
        let (connection, _) = listener.accept().await?;
        // Lost connections are the sender's to repeat.
        tokio::spawn(serve(connection, hostile.clone()));
    }
}

async fn serve(mut connection: TcpStream, hostile: Hostile) -> std::io::Result<()> {
    connection.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(16 * 1024);
    loop {
        while let Some(head_bytes) = buffer.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4) {
            let head = String::from_utf8_lossy(&buffer[..head_bytes]).to_string();
            let header = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            let body_bytes: usize = header("content-length:").and_then(|length| length.parse().ok()).unwrap_or(0);
            if buffer.len() < head_bytes + body_bytes {
                break;
            }
            if head.contains("/elsewhere") {
                hostile.shared.followed.fetch_add(1, Ordering::SeqCst);
            }
            let id = header("webhook-id:").unwrap_or_default().to_string();
            if hostile.has_recovered() {
                let body = serde_json::from_slice(&buffer[head_bytes..head_bytes + body_bytes]).unwrap_or_default();
                hostile.accepted().take(&id, &body);
                connection.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await?;
            } else {
                hostile.shared.refused.fetch_add(1, Ordering::SeqCst);
                if !misbehave(&mut connection, hostile.behaviour).await? {
                    return Ok(());
                }
            }
            buffer.drain(..head_bytes + body_bytes);
        }
        if connection.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
    }
}

/// False where the connection ends with it.
async fn misbehave(connection: &mut TcpStream, behaviour: Behaviour) -> std::io::Result<bool> {
    let answer: &[u8] = match behaviour {
        Behaviour::Answers500 => b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 4\r\n\r\noops",
        Behaviour::Answers429 => b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 5\r\ncontent-length: 0\r\n\r\n",
        Behaviour::Redirects => b"HTTP/1.1 302 Found\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n",
        Behaviour::CutsTheHead => {
            connection.write_all(b"HTTP/1.1 20").await?;
            return Ok(false);
        }
        Behaviour::Hangs | Behaviour::IsGone => {
            tokio::time::sleep(Duration::from_secs(3_600)).await;
            return Ok(false);
        }
        Behaviour::SendsTenGigabytes => {
            connection.write_all(format!("HTTP/1.1 503 No\r\ncontent-length: {TEN_GIGABYTES}\r\n\r\n").as_bytes()).await?;
            let piece = vec![b'x'; 64 * 1024];
            for _ in 0..TEN_GIGABYTES / piece.len() as u64 {
                connection.write_all(&piece).await?;
            }
            return Ok(true);
        }
    };
    connection.write_all(answer).await?;
    Ok(true)
}
