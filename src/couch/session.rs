//! Whether somebody else's name and password are an admin's.

use super::{Couch, CouchError, Result, read_bounded, status_error};
use crate::telemetry::RequestLabels;
use crate::vault::Credentials;
use reqwest::Method;
use secrecy::ExposeSecret;
use serde_json::Value;
use sha2::{Digest, Sha256};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Admin,
    NoAdmin,
    /// CouchDB was asked, and remembers it.
    Wrong,
    /// The name is our own, and the password is not: that needs nobody to be asked.
    NotOurs,
    /// CouchDB takes no more guesses for this name for some minutes.
    Locked,
}

/// `_session` says little.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

impl Couch {
    /// By `GET /_session` as that user. What CouchDB says of a stranger's password says nothing of our own standing, so it does
    /// not go to CouchHealth.
    ///
    /// CouchDB locks a name for an address after five wrong passwords: a stranger who guesses at our own name would lock us out.
    /// So a wrong password for it is never sent.
    pub async fn standing(&self, credentials: &Credentials) -> Result<Standing> {
        if let Some(own) = &self.settings().credentials
            && own.user == credentials.user
            && !is_same(own.password.expose_secret().as_bytes(), credentials.password.expose_secret().as_bytes())
        {
            return Ok(Standing::NotOurs);
        }
        let url = format!("{}/_session", self.inner.base);
        let request = self.inner.http.request(Method::GET, url);
        let answer = request.header(reqwest::header::AUTHORIZATION, credentials.basic_header()).send().await;
        let status = answer.as_ref().map_or(0, |response| response.status().as_u16());
        self.inner.metrics.couchdb_requests.get_or_create(&RequestLabels { endpoint: "_session", status }).inc();
        let response = answer.map_err(|error| self.lost(&error))?;
        if !response.status().is_success() {
            return match status_error(response).await {
                CouchError::Unauthorized(_) => Ok(Standing::Wrong),
                CouchError::Forbidden(_) => Ok(Standing::Locked),
                error => Err(error),
            };
        }
        let body = read_bounded(response, ANSWER_BYTES_MAX).await;
        let body = body.map_err(|_| CouchError::Malformed(String::from("_session broke off")))?;
        let session: Value =
            serde_json::from_slice(&body).map_err(|error| CouchError::Malformed(format!("_session: {error}")))?;
        Ok(standing_of(&session, &credentials.user))
    }
}

/// Where everybody is an admin nobody has shown to be one.
fn standing_of(session: &Value, user: &str) -> Standing {
    let user_ctx = &session["userCtx"];
    if user_ctx["name"].as_str() != Some(user) {
        return Standing::Wrong;
    }
    match user_ctx["roles"].as_array().is_some_and(|roles| roles.iter().any(|role| role == "_admin")) {
        true => Standing::Admin,
        false => Standing::NoAdmin,
    }
}

/// In a time that does not tell how much of it was right.
pub fn is_same(one: &[u8], other: &[u8]) -> bool {
    let (one, other) = (Sha256::digest(one), Sha256::digest(other));
    one.iter().zip(other.iter()).fold(0, |differences, (a, b)| differences | (a ^ b)) == 0
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_a_named_admin_is_one() {
        let cases = [
            (json!({ "userCtx": { "name": "anna", "roles": ["_admin"] } }), Standing::Admin),
            (json!({ "userCtx": { "name": "anna", "roles": ["staff"] } }), Standing::NoAdmin),
            (json!({ "userCtx": { "name": "anna" } }), Standing::NoAdmin),
            (json!({ "userCtx": { "name": null, "roles": ["_admin"] } }), Standing::Wrong),
            (json!({ "userCtx": { "name": "ben", "roles": ["_admin"] } }), Standing::Wrong),
            (json!([]), Standing::Wrong),
        ];
        for (session, expected) in cases {
            assert_eq!(standing_of(&session, "anna"), expected, "{session}");
        }
    }

    #[test]
    fn equal_texts_are_the_same() {
        for (one, other, expected) in [("", "", true), ("a", "a", true), ("a", "b", false), ("a", "aa", false), ("", "a", false)]
        {
            assert_eq!(is_same(one.as_bytes(), other.as_bytes()), expected, "{one:?} {other:?}");
        }
    }
}
