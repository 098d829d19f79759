//! `spiegel run`: waits for CouchDB, sees that the spiegel database is there, and hands over to the app.

use super::{Exit, Failure, couch, install, vault};
use crate::app::{self, App, Signals};
use crate::config::Settings;
use crate::couch::health::State;
use crate::couch::{Couch, CouchError};
use crate::vault::{Vault, redact_text};
use std::time::Duration;
use tracing::{debug, info, warn};

/// Everything else waits for CouchDB too, so looking each second costs nothing and starts soon.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(1);

pub(super) async fn run(settings: Settings, with_install: bool) -> Result<Exit, Failure> {
    let mut signals = signals()?;
    let role = settings.role.name();
    info!(version = env!("CARGO_PKG_VERSION"), role, couchdb = %settings.couchdb.url, db = settings.db_name, "spiegel starts");
    let vault = vault(&settings)?;
    let couch = couch(&settings)?;
    let app = App::open(settings.clone(), Vault::clone(&vault), couch.clone()).await.map_err(|error| internal(&error))?;
    tokio::select! {
        prepared = prepare_when_it_answers(&couch, &settings, with_install) => prepared?,
        signal = signals.next() => {
            info!(signal, "stopped before couchdb answered");
            return Ok(Exit::Done);
        }
    }
    app::run(app, signals).await.map_err(|error| internal(&error))?;
    Ok(Exit::Done)
}

fn internal(error: &anyhow::Error) -> Failure {
    Failure::new(Exit::Internal, redact_text(&format!("{error:#}")))
}

/// Before anything else: a signal that nobody listens for yet kills, and as process 1 of a container is lost.
pub(super) fn signals() -> Result<Signals, Failure> {
    Signals::new().map_err(|error| internal(&error))
}

/// An outage is waited for, and logged once for each reason; anything else is for a person to mend.
async fn prepare_when_it_answers(couch: &Couch, settings: &Settings, with_install: bool) -> Result<(), Failure> {
    let mut logged = String::new();
    loop {
        let error = match prepare(couch, settings, with_install).await {
            Ok(is_there) if is_there => {
                couch.health().publish(State::Up);
                if !logged.is_empty() {
                    info!("couchdb answers");
                }
                return Ok(());
            }
            Ok(_) => return Err(Failure::new(Exit::Config, missing_database(&settings.db_name, couch.address()))),
            Err(error @ CouchError::Unauthorized(_)) => {
                return Err(Failure::of_couch(couch, "look for the spiegel database", &error));
            }
            Err(error) if error.is_outage() || matches!(error, CouchError::TooManyRequests { .. }) => error.to_string(),
            Err(error) => return Err(Failure::of_couch(couch, "look for the spiegel database", &error)),
        };
        couch.health().publish(State::Down);
        if error != logged {
            warn!(couchdb = couch.address(), %error, "couchdb does not answer yet; waiting for it");
            logged = error;
        }
        tokio::time::sleep(LOOK_AGAIN_AFTER).await;
    }
}

/// False where the spiegel database is missing.
async fn prepare(couch: &Couch, settings: &Settings, with_install: bool) -> Result<bool, CouchError> {
    if with_install {
        let mut changes = 0;
        let mut count = |line: &str| {
            changes += usize::from(!line.starts_with("unchanged"));
            debug!("{line}");
        };
        install::install(couch, settings, &mut count).await?;
        info!(db = settings.db_name, changes, "installed");
        return Ok(true);
    }
    couch.db_exists(&settings.db_name).await
}

pub(super) fn missing_database(db: &str, address: &str) -> String {
    format!("the database \"{db}\" does not exist on {address}: run `spiegel install`, or `spiegel run --install`")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::config::{Sources, load};
    use axum::http::StatusCode;
    use std::net::SocketAddr;

    /// A server that answers everything with one status.
    async fn answering(status: u16, address: SocketAddr) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind(address).await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let status = StatusCode::from_u16(status).expect("a status");
        let router = axum::Router::new().fallback(move || async move { (status, r#"{"update_seq":"0-x"}"#) });
        tokio::spawn(async move { axum::serve(listener, router).await });
        address
    }

    fn any_port() -> SocketAddr {
        ([127, 0, 0, 1], 0).into()
    }

    fn settings(address: SocketAddr) -> Settings {
        let url = format!("http://admin:secret@{address}");
        let environment = [(String::from("SPIEGEL_COUCHDB_URL"), url)].into_iter().collect();
        load(Sources { environment, ..Sources::default() }).expect("legal").settings
    }

    #[tokio::test]
    async fn what_a_person_must_mend_is_not_waited_for() {
        let cases = [(200, None), (404, Some(Exit::Config)), (401, Some(Exit::Config)), (403, Some(Exit::Config))];
        for (status, expected) in cases {
            let settings = settings(answering(status, any_port()).await);
            let couch = couch(&settings).expect("a client");
            let prepared = prepare_when_it_answers(&couch, &settings, false).await;
            assert_eq!(prepared.err().map(|failure| failure.exit), expected, "{status}");
        }
    }

    #[tokio::test]
    async fn an_outage_is_waited_for() {
        let unavailable = settings(answering(503, any_port()).await);
        let couch_503 = couch(&unavailable).expect("a client");
        let patience = Duration::from_millis(100);
        assert!(tokio::time::timeout(patience, prepare_when_it_answers(&couch_503, &unavailable, false)).await.is_err());

        // A port that was free a moment ago: nobody listens there yet.
        let address = tokio::net::TcpListener::bind(any_port()).await.expect("a port").local_addr().expect("an address");
        let settings = settings(address);
        let couch = couch(&settings).expect("a client");
        let waiting = prepare_when_it_answers(&couch, &settings, false);
        let starting = async {
            tokio::time::sleep(patience).await;
            answering(200, address).await
        };
        let (prepared, _) = tokio::join!(tokio::time::timeout(Duration::from_secs(10), waiting), starting);
        assert!(matches!(prepared, Ok(Ok(()))), "{prepared:?}");
    }
}
