//! Secrets by name: what signs webhooks, and what stands in their headers.
//!
//! The secrets file is `{ "<name>": "whsec_…" | ["whsec_<new>", "whsec_<old>"] | "any text" }`. A secret that signs is written
//! as Standard Webhooks has it; with several, each signs, so that a receiver can go from one to the next. Rules name secrets
//! and never hold them.

use super::{VaultError, text_forms};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac};
use reqwest::header::HeaderValue;
use serde_json::Value;
use sha2::Sha256;
use std::collections::HashMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

pub(super) const FILE: &str = "secrets file";
const PREFIX: &str = "whsec_";
/// As Standard Webhooks wants it: shorter ones can be guessed, longer ones are hashed down anyway.
const KEY_BYTES: RangeInclusive<usize> = 24..=64;
/// A rotation needs two. Each one more is a signature in each request.
const KEYS_MAX: usize = 8;
/// What follows a scheme (`Bearer …`) is a secret by itself, unless it is a word of everyday.
const TOKEN_CHARS_MIN: usize = 6;

/// A secret that signs, ready to be used; its bytes stay here.
#[derive(Clone)]
pub struct SigningKey(Hmac<Sha256>);

impl SigningKey {
    fn decode(text: &str) -> Option<Self> {
        let bytes = STANDARD.decode(text.strip_prefix(PREFIX)?).ok().filter(|bytes| KEY_BYTES.contains(&bytes.len()))?;
        Hmac::new_from_slice(&bytes).ok().map(Self)
    }

    /// HMAC-SHA256 with this secret, before its first byte.
    pub fn mac(&self) -> Hmac<Sha256> {
        self.0.clone()
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SigningKey([redacted])")
    }
}

/// Why a secret cannot be used as somebody wants to. Names it, and never its value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    #[error("the secrets file has no secret {0:?}")]
    Missing(String),
    #[error("the secret {0:?} cannot sign: it is not {PREFIX:?} and base64")]
    NotSigning(String),
    #[error("the secret {0:?} cannot be a header's value: it is a list, or has characters that no header may have")]
    NotHeader(String),
}

struct Entry {
    keys: Option<Arc<[SigningKey]>>,
    header: Option<HeaderValue>,
}

#[derive(Default)]
pub(super) struct Secrets(HashMap<String, Entry>);

impl Secrets {
    /// And each form in which one of them may show up in a text.
    pub(super) fn from_json(text: &str) -> Result<(Self, Vec<String>), VaultError> {
        let Value::Object(file) = super::parse(FILE, text)? else {
            return Err(VaultError::Shape { file: FILE, fault: String::from("must be an object of names and secrets") });
        };
        let mut by_name = HashMap::new();
        let mut forms = Vec::new();
        for (name, value) in file {
            let entry = entry(&value).map_err(|fault| VaultError::Shape { file: FILE, fault: format!("{name:?} {fault}") })?;
            forms.extend(texts(&value).flat_map(parts).flat_map(text_forms));
            by_name.insert(name, entry);
        }
        Ok((Self(by_name), forms))
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    fn find(&self, name: &str) -> Result<&Entry, SecretError> {
        self.0.get(name).ok_or_else(|| SecretError::Missing(name.to_string()))
    }

    pub(super) fn signing(&self, name: &str) -> Result<Arc<[SigningKey]>, SecretError> {
        self.find(name)?.keys.clone().ok_or_else(|| SecretError::NotSigning(name.to_string()))
    }

    pub(super) fn header(&self, name: &str) -> Result<HeaderValue, SecretError> {
        self.find(name)?.header.clone().ok_or_else(|| SecretError::NotHeader(name.to_string()))
    }
}

fn entry(value: &Value) -> Result<Entry, String> {
    match value {
        Value::String(text) if text.is_empty() => Err(String::from("is empty")),
        Value::String(text) if text.starts_with(PREFIX) => {
            Ok(Entry { keys: Some([key(value)?].into()), header: header_value(text) })
        }
        Value::String(text) => Ok(Entry { keys: None, header: header_value(text) }),
        Value::Array(values) if (1..=KEYS_MAX).contains(&values.len()) => {
            let keys: Result<Arc<[SigningKey]>, String> = values.iter().map(key).collect();
            Ok(Entry { keys: Some(keys?), header: None })
        }
        _ => Err(format!("must be a text, or a list of 1 to {KEYS_MAX} texts")),
    }
}

fn key(value: &Value) -> Result<SigningKey, String> {
    value.as_str().and_then(SigningKey::decode).ok_or_else(|| {
        let (min, max) = (KEY_BYTES.start(), KEY_BYTES.end());
        format!("must be {PREFIX:?} and the base64 of {min} to {max} bytes")
    })
}

fn texts(value: &Value) -> impl Iterator<Item = &str> {
    value.as_str().into_iter().chain(value.as_array().into_iter().flatten().filter_map(Value::as_str))
}

/// The whole, and what of it is secret by itself.
fn parts(text: &str) -> impl Iterator<Item = &str> {
    let token = text.split_once(' ').map(|(_, token)| token).filter(|token| token.len() >= TOKEN_CHARS_MIN);
    [Some(text), text.strip_prefix(PREFIX), token].into_iter().flatten()
}

/// ASCII: what lies beyond is read differently by different receivers. Marked sensitive, so that no library prints it.
fn header_value(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::super::Vault;
    use super::*;

    const KEY: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

    fn vault(file: &str) -> Result<Vault, VaultError> {
        Vault::empty().with_secrets(file)
    }

    fn of_bytes(bytes: usize) -> String {
        format!("{PREFIX}{}", STANDARD.encode(vec![7; bytes]))
    }

    #[test]
    fn a_secret_is_found_by_its_name_and_used_for_what_it_can() {
        let file = serde_json::json!({
            "key": KEY, "rotating": [KEY, of_bytes(64)], "bearer": "Bearer abc123", "lines": "a\nb", "umlaut": "größe",
        });
        let vault = vault(&file.to_string()).expect("a good file");
        let missing = |name: &str| SecretError::Missing(name.to_string());
        for (name, keys, header) in [
            ("key", Ok(1), Ok(KEY)),
            ("rotating", Ok(2), Err(SecretError::NotHeader(String::from("rotating")))),
            ("bearer", Err(SecretError::NotSigning(String::from("bearer"))), Ok("Bearer abc123")),
            ("lines", Err(SecretError::NotSigning(String::from("lines"))), Err(SecretError::NotHeader(String::from("lines")))),
            ("umlaut", Err(SecretError::NotSigning(String::from("umlaut"))), Err(SecretError::NotHeader(String::from("umlaut")))),
            ("nobody", Err(missing("nobody")), Err(missing("nobody"))),
        ] {
            assert_eq!(vault.signing(name).map(|keys| keys.len()), keys, "{name}");
            let found = vault.header(name).map(|value| String::from_utf8(value.as_bytes().to_vec()).unwrap());
            assert_eq!(found, header.map(String::from), "{name}");
        }
        assert!(vault.header("bearer").expect("a header").is_sensitive());
        assert!(missing("nobody").to_string().contains("\"nobody\""));
    }

    #[test]
    fn a_bad_entry_is_named_and_its_value_is_not() {
        for (value, fault) in [
            (serde_json::json!(""), "is empty"),
            (serde_json::json!("whsec_s3cret!"), "the base64 of 24 to 64 bytes"),
            (serde_json::json!("whsec_"), "the base64 of 24 to 64 bytes"),
            (serde_json::json!(of_bytes(23)), "the base64 of 24 to 64 bytes"),
            (serde_json::json!(of_bytes(65)), "the base64 of 24 to 64 bytes"),
            (serde_json::json!([KEY, "s3cret"]), "the base64 of 24 to 64 bytes"),
            (serde_json::json!([KEY, 5]), "the base64 of 24 to 64 bytes"),
            (serde_json::json!([]), "a list of 1 to 8 texts"),
            (serde_json::json!(vec![KEY; 9]), "a list of 1 to 8 texts"),
            (serde_json::json!({"key": "s3cret"}), "must be a text"),
            (serde_json::json!(5), "must be a text"),
        ] {
            let error = vault(&serde_json::json!({ "entry": value }).to_string()).expect_err(&value.to_string());
            let text = format!("{error} {error:?}");
            assert!(error.to_string().contains("the secrets file: \"entry\"") && text.contains(fault), "{text}");
            assert!(!text.contains("s3cret") && !text.contains("BwcH"), "{text}");
        }
        for file in ["[]", "nonsense s3cret", "{"] {
            let error = vault(file).expect_err(file);
            assert!(error.to_string().contains("secrets file") && !format!("{error:?}").contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn no_secret_is_left_in_a_text() {
        let passwords = Vault::from_json(r#"{"h": {"u": "passw0rd"}}"#).unwrap();
        let file = serde_json::json!({ "new": [KEY], "bearer": "Bearer t0ken/value", "word": "correct horse" });
        let vault = passwords.with_secrets(&file.to_string()).unwrap();
        let bare = KEY.trim_start_matches(PREFIX);
        for (text, expected) in [
            (format!("a {KEY} b"), "a [redacted] b"),
            (format!("a {bare} b"), "a [redacted] b"),
            (String::from("authorization: Bearer t0ken/value."), "authorization: [redacted]."),
            (String::from("the token t0ken/value or t0ken%2Fvalue"), "the token [redacted] or [redacted]"),
            (String::from("correct horse, passw0rd"), "[redacted], [redacted]"),
        ] {
            assert_eq!(vault.redact(&text), expected);
        }
        let shown = format!("{vault:?} {:?} {:?}", vault.signing("new"), vault.header("bearer"));
        assert!(!shown.contains(bare) && !shown.contains("t0ken") && !shown.contains("passw0rd"), "{shown}");
    }

    #[test]
    fn a_secrets_file_stands_beside_the_passwords_file() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (passwords, secrets) = (directory.path().join("passwords"), directory.path().join("secrets"));
        std::fs::write(&passwords, r#"{"h": {"u": "p"}}"#).unwrap();
        std::fs::write(&secrets, format!("\u{FEFF}{{\"a\": \"{KEY}\"}}")).unwrap();
        let vault = Vault::load(Some(&passwords), Some(&secrets)).expect("two good files");
        assert!(vault.signing("a").is_ok() && vault.credentials("h", "u").is_some());
        let nowhere = directory.path().join("nowhere");
        let error = Vault::load(None, Some(&nowhere)).expect_err("no such file").to_string();
        assert!(error.contains("read the secrets file") && error.contains("nowhere"), "{error}");
    }
}
