//! Sessions for servers that take no basic authentication: logged in once, renewed with the cookie that CouchDB sends.
//!
//! Basic authentication is tried first, because CouchDB remembers a password that it has checked. Only where that is refused
//! somebody logs in, and once in a while: a wrong password that is tried again and again locks its user out.

use super::parameters::Rights;
use crate::vault::Credentials;
use reqwest::header::{COOKIE, HeaderMap, HeaderValue, SET_COOKIE};
use secrecy::ExposeSecret;
use serde_json::json;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// After a refusal nobody logs in with the same rights for so long.
const REFUSED_FOR: Duration = Duration::from_secs(600);
/// Users that are remembered; to forget one costs a login.
const USERS_MAX: usize = 10_000;

#[derive(Debug, Clone)]
enum Session {
    Cookie(HeaderValue),
    RefusedAt(Instant),
}

#[derive(Debug, Clone, Default)]
pub struct Sessions {
    known: Arc<Mutex<HashMap<Rights, Session>>>,
}

impl Sessions {
    fn known(&self) -> MutexGuard<'_, HashMap<Rights, Session>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, rights: Rights, session: Session) {
        let mut known = self.known();
        if known.len() >= USERS_MAX {
            known.clear();
        }
        known.insert(rights, session);
    }

    pub fn add_to(&self, rights: Rights, headers: &mut HeaderMap) {
        if let Some(Session::Cookie(cookie)) = self.known().get(&rights) {
            headers.append(COOKIE, cookie.clone());
        }
    }

    /// CouchDB renews a session that grows old with any answer.
    pub fn renew(&self, rights: Rights, answer: &HeaderMap) {
        let is_open = matches!(self.known().get(&rights), Some(Session::Cookie(_)));
        if is_open && let Some(cookie) = cookie_of(answer) {
            self.remember(rights, Session::Cookie(cookie));
        }
    }

    /// The cookie, where the server lets this user in by it. `server` is its URL, without a slash at its end.
    pub async fn log_in(
        &self,
        http: &reqwest::Client,
        server: &str,
        rights: Rights,
        credentials: &Credentials,
    ) -> Option<HeaderValue> {
        let was_refused = |session: &Session| matches!(session, Session::RefusedAt(at) if at.elapsed() < REFUSED_FOR);
        if self.known().get(&rights).is_some_and(was_refused) {
            return None;
        }
        // Others who are refused meanwhile do not try as well.
        self.remember(rights, Session::RefusedAt(Instant::now()));
        let who = json!({ "name": credentials.user, "password": credentials.password.expose_secret() });
        let answer = http.post(format!("{server}/_session")).json(&who).send().await.ok()?;
        let cookie = cookie_of(answer.headers()).filter(|_| answer.status().is_success())?;
        self.remember(rights, Session::Cookie(cookie.clone()));
        Some(cookie)
    }
}

/// `AuthSession=…` of a `Set-Cookie`, without its attributes.
fn cookie_of(answer: &HeaderMap) -> Option<HeaderValue> {
    let texts = answer.get_all(SET_COOKIE).iter().filter_map(|value| value.to_str().ok());
    let session = texts.filter_map(|text| text.split(';').next()).find(|pair| pair.trim().starts_with("AuthSession="))?;
    let mut cookie = HeaderValue::from_str(session.trim()).ok()?;
    cookie.set_sensitive(true);
    Some(cookie)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::replicate::native::parameters::{Local, Parameters};
    use axum::http::StatusCode;
    use axum::response::IntoResponse;
    use axum::routing::{get, post};
    use axum::{Json, Router};
    use serde_json::Value;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A server that knows nothing of basic authentication, as CouchDB without its default handler.
    async fn server(logins: Arc<AtomicUsize>) -> String {
        let log_in = move |Json(who): Json<Value>| async move {
            logins.fetch_add(1, Ordering::SeqCst);
            match who == json!({ "name": "anna", "password": "secret" }) {
                true => ([("set-cookie", "AuthSession=first; Version=1; HttpOnly")], "{}").into_response(),
                false => StatusCode::UNAUTHORIZED.into_response(),
            }
        };
        let read = |headers: axum::http::HeaderMap| async move {
            match headers.get("cookie").map(|cookie| cookie.to_str().unwrap()) {
                Some("AuthSession=first") => ([("set-cookie", "AuthSession=second; Version=1")], r#"{"a":1}"#).into_response(),
                Some("AuthSession=second") => r#"{"a":2}"#.into_response(),
                _ => (StatusCode::UNAUTHORIZED, r#"{"error":"unauthorized","reason":"x"}"#).into_response(),
            }
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new().route("/_session", post(log_in)).route("/a/_local/x", get(read));
        tokio::spawn(async move { axum::serve(listener, router).await });
        url
    }

    fn peer(url: &str, password: &str) -> crate::replicate::native::peer::Peer {
        use crate::replicate::native::gate::Gates;
        use crate::replicate::native::peer::{Net, Peer, Which};
        let source = url.replace("://", &format!("://anna:{password}@"));
        let params = json!({ "source": format!("{source}/a"), "target": "b" });
        let local = Local { url: "http://127.0.0.1:5984".parse().unwrap(), credentials: None };
        let parameters = Parameters::parse(&params, &local).unwrap();
        let metrics = crate::telemetry::Metrics::new();
        let net = Net {
            http: reqwest::Client::builder().build().unwrap(),
            patient: reqwest::Client::builder().build().unwrap(),
            gates: Gates::new(4),
            pipes: Gates::new(4),
            sessions: Sessions::default(),
            health: crate::couch::health::Health::new(metrics.clone()),
            metrics,
        };
        Peer::new(net, Which::Source, &parameters.source)
    }

    #[tokio::test]
    async fn a_server_without_basic_authentication_is_logged_in_to_once_and_the_session_is_renewed() {
        let logins = Arc::new(AtomicUsize::new(0));
        let peer = peer(&server(logins.clone()).await, "secret");
        for expected in [r#"{"a":1}"#, r#"{"a":2}"#, r#"{"a":2}"#] {
            assert_eq!(peer.read_local("x").await.unwrap().unwrap(), expected);
        }
        assert_eq!(logins.load(Ordering::SeqCst), 1);
    }

    #[tokio::test]
    async fn a_wrong_password_is_tried_once() {
        let logins = Arc::new(AtomicUsize::new(0));
        let peer = peer(&server(logins.clone()).await, "wrong");
        for _ in 0..3 {
            assert!(peer.read_local("x").await.unwrap_err().is_refusal());
        }
        assert_eq!(logins.load(Ordering::SeqCst), 1);
    }
}
