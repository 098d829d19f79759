//! A receiver of webhooks that costs as little as possible, on a thread of its own: it reads requests by their length and answers 204.

use anyhow::Context;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const ANSWER: &[u8] = b"HTTP/1.1 204 No Content\r\n\r\n";

pub struct Arrival {
    pub at: Instant,
    /// The last segment of the path: rules put the database's name there.
    pub db: String,
}

#[derive(Default)]
pub struct Arrivals {
    pub all: Vec<Arrival>,
    /// By `webhook-id`.
    ids: HashSet<String>,
    pub duplicates: usize,
    /// Proves that documents came, and not only requests.
    pub body_bytes: usize,
}

#[derive(Clone)]
pub struct Receiver {
    pub address: SocketAddr,
    arrivals: Arc<Mutex<Arrivals>>,
}

impl Receiver {
    pub fn start() -> anyhow::Result<Self> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").context("bind the receiver")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let arrivals = Arc::new(Mutex::new(Arrivals::default()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let shared = arrivals.clone();
        // Ends with the process.
        std::thread::Builder::new().name(String::from("receiver")).spawn(move || {
            runtime.block_on(async move {
                let Ok(listener) = TcpListener::from_std(listener) else { return };
                while let Ok((connection, _)) = listener.accept().await {
                    // Lost connections are the sender's to repeat.
                    tokio::spawn(serve(connection, shared.clone()));
                }
            });
        })?;
        Ok(Self { address, arrivals })
    }

    /// Where a rule sends its requests.
    pub fn url(&self) -> String {
        format!("http://{}/${{db_name}}", self.address)
    }

    pub fn arrivals(&self) -> MutexGuard<'_, Arrivals> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn count(&self) -> usize {
        self.arrivals().all.len()
    }

    pub fn forget(&self) {
        *self.arrivals() = Arrivals::default();
    }

    /// When the first request for this database came after a moment.
    pub async fn first_after(&self, db: &str, after: Instant) -> anyhow::Result<Instant> {
        let find = |arrivals: &Arrivals| {
            arrivals.all.iter().rev().take_while(|a| a.at >= after).filter(|a| a.db == db).last().map(|a| a.at)
        };
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            let found = find(&self.arrivals());
            if let Some(at) = found {
                return Ok(at);
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        anyhow::bail!("no webhook came for {db}")
    }

    pub async fn wait_for_distinct(&self, count: usize, patience: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            let distinct = self.arrivals().ids.len();
            if distinct >= count {
                return Ok(());
            }
            anyhow::ensure!(Instant::now() < deadline, "only {distinct} of {count} webhooks came in {patience:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

async fn serve(mut connection: TcpStream, arrivals: Arc<Mutex<Arrivals>>) -> std::io::Result<()> {
    connection.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(16 * 1024);
    loop {
        while let Some(head_bytes) = buffer.windows(4).position(|four| four == b"\r\n\r\n").map(|at| at + 4) {
            let head = String::from_utf8_lossy(&buffer[..head_bytes]);
            let header = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
            let body_bytes: usize = header("content-length:").and_then(|length| length.parse().ok()).unwrap_or(0);
            if buffer.len() < head_bytes + body_bytes {
                break;
            }
            let path = head.split(' ').nth(1).unwrap_or_default();
            let db = path.split('?').next().unwrap_or_default().rsplit('/').next().unwrap_or_default().to_string();
            let id = header("webhook-id:").unwrap_or_default().to_string();
            {
                let mut arrivals = arrivals.lock().unwrap_or_else(PoisonError::into_inner);
                arrivals.all.push(Arrival { at: Instant::now(), db });
                let is_new = arrivals.ids.insert(id);
                arrivals.duplicates += usize::from(!is_new);
                arrivals.body_bytes += body_bytes;
            }
            connection.write_all(ANSWER).await?;
            buffer.drain(..head_bytes + body_bytes);
        }
        if connection.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
    }
}
