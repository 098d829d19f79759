//! Who asks: the one admin, by password or by the cookie of `POST /_session`.

use super::answer::{Answer, Failure, json_value};
use super::request::{Call, Query};
use super::server::Server;
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::header::{AUTHORIZATION, COOKIE, HeaderValue, SET_COOKIE};
use http::{HeaderMap, Method};
use serde_json::{Value, json};

/// How a request said who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handler {
    Password,
    Cookie,
}

impl Handler {
    fn word(self) -> &'static str {
        match self {
            Handler::Password => "default",
            Handler::Cookie => "cookie",
        }
    }
}

/// How the admin showed that it is the admin; None where a request names nobody.
pub fn admin_of(server: &Server, headers: &HeaderMap) -> Result<Option<Handler>, Failure> {
    if let Some(header) = headers.get(AUTHORIZATION) {
        let encoded = header.to_str().ok().and_then(|text| text.strip_prefix("Basic ")).ok_or_else(refused)?;
        let no_base64 = |_| Failure::bad_request("Authorization header has invalid base64 value");
        let decoded = String::from_utf8(STANDARD.decode(encoded.trim()).map_err(no_base64)?).map_err(|_| refused())?;
        let (user, password) = decoded.split_once(':').ok_or_else(refused)?;
        return server.is_admin(user, password).then_some(Some(Handler::Password)).ok_or_else(refused);
    }
    let cookies = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok()).flat_map(|text| text.split(';'));
    let mut sessions =
        cookies.filter_map(|cookie| cookie.trim().strip_prefix("AuthSession=")).filter(|session| !session.is_empty());
    match sessions.next() {
        None => Ok(None),
        Some(session) if server.is_session(session) => Ok(Some(Handler::Cookie)),
        Some(_) => Err(Failure::bad_request("Malformed AuthSession cookie. Please clear your cookies.")),
    }
}

fn refused() -> Failure {
    Failure::new(401, "unauthorized", "Name or password is incorrect.")
}

/// `/_session`.
pub fn answer(server: &Server, call: &Call, admin: Option<Handler>) -> Answer {
    match call.method {
        Method::GET | Method::HEAD => Ok(json_value(200, &who(server, admin))),
        Method::POST => log_in(server, call),
        Method::DELETE => Ok(with_cookie(json_value(200, &json!({"ok": true})), "AuthSession=; Version=1; Path=/; HttpOnly")),
        _ => Err(Failure::method_not_allowed("GET,HEAD,POST,DELETE")),
    }
}

fn who(server: &Server, admin: Option<Handler>) -> Value {
    let mut info = json!({"authentication_handlers": ["cookie", "default"]});
    let mut user = json!({"name": null, "roles": []});
    if let Some(handler) = admin {
        info["authenticated"] = json!(handler.word());
        user = json!({"name": server.user(), "roles": ["_admin"]});
    }
    json!({"ok": true, "userCtx": user, "info": info})
}

/// The name and the password come as JSON or as a form.
fn log_in(server: &Server, call: &Call) -> Answer {
    let (name, password) = match call.header("content-type").starts_with("application/json") {
        true => {
            let body = call.json()?;
            let text = |key: &str| body.get(key).and_then(Value::as_str).unwrap_or("").to_string();
            (text("name"), text("password"))
        }
        false => {
            let form = Query::parse(&String::from_utf8_lossy(&call.body));
            let text = |key: &str| form.get(key).unwrap_or("").to_string();
            (text("name"), text("password"))
        }
    };
    if !server.is_admin(&name, &password) {
        return Err(refused());
    }
    let cookie = format!("AuthSession={}; Version=1; Expires={}; Max-Age=600; Path=/; HttpOnly", server.session(), expires());
    Ok(with_cookie(json_value(200, &json!({"ok": true, "name": name, "roles": ["_admin"]})), &cookie))
}

/// The cookie itself stays good as long as the server runs.
fn expires() -> String {
    httpdate::fmt_http_date(std::time::SystemTime::now() + std::time::Duration::from_secs(600))
}

fn with_cookie(mut response: Response, cookie: &str) -> Response {
    if let Ok(value) = HeaderValue::from_str(cookie) {
        response.headers_mut().insert(SET_COOKIE, value);
    }
    response
}
