//! The embedded, in-memory server of `spiegel dev`, of tests and of benches: as much of CouchDB as Spiegel and curl need.
//!
//! It promises CouchDB's answers, word for word where a client could look at them, and CouchDB's habits: seqs whose text
//! changes from request to request, a `_global_changes` that lags and coalesces, a database made again that rewinds. What it
//! does not do, views above all, it refuses with 501 and never pretends. Nothing is kept on disk.
//!
//! It can also be told to misbehave (`Faults`), which a real server does only when nobody watches.

mod answer;
mod changes;
mod database;
mod databases;
mod documents;
mod faults;
mod global_changes;
mod incoming;
mod listen;
mod multipart;
mod read;
mod replicate;
mod request;
mod route;
mod seq;
mod server;
mod session;
#[cfg(test)]
mod tests;

pub use faults::{FaultRule, Faults, Refusal};

use anyhow::Context;
use listen::CuttableListener;
use secrecy::SecretString;
use server::Server;
use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use url::Url;

/// What the server claims to be: the release whose answers it was compared with.
const VERSION: &str = "3.5.0";
const SERVER_NAME: &str = "CouchDB/3.5.0 (Spiegel's embedded server)";

#[derive(Debug, Clone)]
pub struct DevOptions {
    /// Port 0 takes any free one.
    pub listen: SocketAddr,
    pub user: String,
    pub password: SecretString,
    /// How often `_global_changes` is written; CouchDB's default is 500 ms.
    pub global_changes_delay: Duration,
}

/// Serves until `shutdown`.
pub async fn serve(options: DevOptions, shutdown: impl Future) -> anyhow::Result<()> {
    let server = DevServer::start(options).await?;
    shutdown.await;
    server.stop().await;
    Ok(())
}

/// A running server; its end, or its drop, cuts every connection.
pub struct DevServer {
    server: Arc<Server>,
    url: Url,
    tasks: Vec<JoinHandle<()>>,
}

impl DevServer {
    pub async fn start(options: DevOptions) -> anyhow::Result<Self> {
        let listener = tokio::net::TcpListener::bind(options.listen).await;
        let listener = listener.with_context(|| format!("listen on {}", options.listen))?;
        let delay = options.global_changes_delay;
        let server = Server::new(options, listener.local_addr()?)?;
        let listener = CuttableListener::new(listener, server.faults.clone(), server.closing.clone());
        let router = axum::Router::new().fallback(route::answer).with_state(server.clone());
        let serving = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, router).await {
                tracing::error!(%error, "the embedded server ended");
            }
        });
        let writing_out = tokio::spawn(global_changes::write_out(server.clone(), delay));
        let url = Url::parse(&format!("http://{}/", server.address))?;
        Ok(Self { server, url, tasks: vec![serving, writing_out] })
    }

    pub fn address(&self) -> SocketAddr {
        self.server.address
    }

    /// Without credentials.
    pub fn url(&self) -> Url {
        self.url.clone()
    }

    pub fn faults(&self) -> Faults {
        self.server.faults.clone()
    }

    /// How many requests came, by method and kind of endpoint.
    pub fn requests(&self) -> BTreeMap<String, u64> {
        self.server.counts()
    }

    pub fn reset_requests(&self) {
        self.server.reset_counts();
    }

    /// Frees the port; every open connection is cut.
    pub async fn stop(mut self) {
        self.server.closing.cancel();
        for task in std::mem::take(&mut self.tasks) {
            task.abort();
            let _ = task.await;
        }
    }
}

impl Drop for DevServer {
    fn drop(&mut self) {
        self.server.closing.cancel();
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}
