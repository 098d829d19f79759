//! `spiegel healthcheck`: asks the running process whether it is alive, for containers without a shell.
//!
//! Alive, not ready: an outage of CouchDB is waited out, and whoever restarts what is unhealthy must not restart us for it.

use super::{Exit, Failure, say};
use crate::config::Settings;
use serde_json::Value;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

/// On the same machine; Docker's own patience is 30 s.
const TIMEOUT: Duration = Duration::from_secs(5);

pub(super) async fn command(settings: &Settings, is_ready_asked: bool) -> Result<Exit, Failure> {
    let Some(listen) = settings.admin_listen else {
        return Err(Failure::new(Exit::No, "admin.listen is off: there is nobody to ask"));
    };
    let (page, word) = if is_ready_asked { ("/ready", "ready") } else { ("/live", "alive") };
    match ask(listen, page).await {
        Ok((200, _)) => {
            say(word);
            Ok(Exit::Done)
        }
        Ok((status, body)) => {
            let reason = body["reason"].as_str().map_or_else(|| format!("{page} answered {status}"), str::to_string);
            Err(Failure::new(Exit::No, format!("not {word}: {reason}")))
        }
        Err(error) => Err(Failure::new(Exit::No, error)),
    }
}

/// GETs a page of the running process; an answer that is no JSON comes as null.
pub(super) async fn ask(listen: SocketAddr, path: &str) -> Result<(u16, Value), String> {
    let address = reachable(listen);
    let client =
        reqwest::Client::builder().timeout(TIMEOUT).no_proxy().build().map_err(|error| crate::couch::chain_of(&error))?;
    let answer = client.get(format!("http://{address}{path}")).send().await;
    let answer = answer.map_err(|error| format!("no spiegel answers on {address}: {}", crate::couch::chain_of(&error)))?;
    let status = answer.status().as_u16();
    Ok((status, answer.json().await.unwrap_or(Value::Null)))
}

/// A process that listens on all addresses is asked on loopback.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn all_addresses_are_asked_on_loopback() {
        let cases = [
            ("0.0.0.0:9595", "127.0.0.1:9595"),
            ("[::]:1", "[::1]:1"),
            ("127.0.0.1:9595", "127.0.0.1:9595"),
            ("10.0.0.7:80", "10.0.0.7:80"),
        ];
        for (listen, expected) in cases {
            assert_eq!(reachable(listen.parse().expect("an address")).to_string(), expected);
        }
    }

    #[tokio::test]
    async fn a_running_process_is_asked() {
        use crate::admin::{Login, Pages, serve};
        use std::sync::Arc;
        let pages = Pages {
            metrics: crate::telemetry::Metrics::new(),
            ready: Arc::new(|| Err(String::from("the feed is not open yet"))),
            status: Arc::new(|| Box::pin(async { serde_json::json!({ "rules": 1 }) })),
            operate: Arc::new(|_| Box::pin(async { Ok(Value::Null) })),
            login: Arc::new(Login::new(Box::new(|_| Box::pin(async { Err(String::new()) })), None)),
        };
        let listen = "127.0.0.1:0".parse().expect("an address");
        let admin = serve(listen, pages, tokio_util::sync::CancellationToken::new()).await.expect("a free port");

        let mut settings = crate::config::load(crate::config::Sources::default()).expect("the defaults").settings;
        settings.admin_listen = Some(admin.address);
        let failure = command(&settings, true).await.expect_err("not ready");
        assert_eq!((failure.exit, failure.message.as_str()), (Exit::No, "not ready: the feed is not open yet"));
        assert_eq!(ask(admin.address, "/status").await, Ok((200, serde_json::json!({ "rules": 1 }))));

        admin.task.abort();
        let _ = admin.task.await;
        let failure = command(&settings, true).await.expect_err("gone");
        assert_eq!(failure.exit, Exit::No);
    }
}
