//! Signatures as Standard Webhooks v1 has them: HMAC-SHA256 over `id.timestamp.body`, one for each of the secret's keys.
//!
//! The timestamp is the attempt's, so that a receiver can refuse what somebody recorded and sends again. Params in a query
//! are no part of what is signed: a request without a body has the signature of the empty one.

use crate::vault::SigningKey;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::Mac;
use reqwest::header::HeaderValue;

/// Receivers know these names from Standard Webhooks.
pub const ID_HEADER: &str = "webhook-id";
pub const TIMESTAMP_HEADER: &str = "webhook-timestamp";
pub const SIGNATURE_HEADER: &str = "webhook-signature";

const VERSION: &str = "v1,";
/// The base64 of 32 bytes.
const DIGEST_CHARS: usize = 44;

/// `v1,<base64>` for each key, with a space between. The timestamp is in whole seconds since 1970, as its header has it.
pub fn signature(keys: &[SigningKey], id: &str, timestamp: &str, body: &[u8]) -> String {
    let mut signatures = String::with_capacity(keys.len() * (1 + VERSION.len() + DIGEST_CHARS));
    for key in keys {
        if !signatures.is_empty() {
            signatures.push(' ');
        }
        let mut mac = key.mac();
        for part in [id.as_bytes(), b".", timestamp.as_bytes(), b".", body] {
            mac.update(part);
        }
        signatures.push_str(VERSION);
        STANDARD.encode_string(mac.finalize().into_bytes(), &mut signatures);
    }
    signatures
}

/// None where there are no keys.
pub fn signature_header(keys: &[SigningKey], id: &str, timestamp: &str, body: &[u8]) -> Option<HeaderValue> {
    HeaderValue::try_from(signature(keys, id, timestamp, body)).ok().filter(|value| !value.is_empty())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::vault::Vault;
    use proptest::prelude::*;
    use reqwest::header::HeaderMap;
    use standardwebhooks::Webhook;
    use std::sync::Arc;
    use std::time::{SystemTime, UNIX_EPOCH};

    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

    fn keys(secrets: &[String]) -> Arc<[SigningKey]> {
        let file = serde_json::json!({ "name": secrets }).to_string();
        Vault::empty().with_secrets(&file).expect("good secrets").signing("name").expect("they sign")
    }

    fn headers(id: &str, timestamp: &str, signature: HeaderValue) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(ID_HEADER, id.parse().unwrap());
        headers.insert(TIMESTAMP_HEADER, timestamp.parse().unwrap());
        headers.insert(SIGNATURE_HEADER, signature);
        headers
    }

    #[test]
    fn the_specification_s_example_has_its_signature() {
        let body = br#"{"test": 2432232314}"#;
        let signed = signature(&keys(&[SECRET.into()]), "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", body);
        assert_eq!(signed, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn nothing_is_signed_without_a_key() {
        assert_eq!(signature_header(&[], "id", "1", b""), None);
    }

    proptest! {
        #[test]
        fn an_independent_implementation_verifies_each_secret_and_no_other(
            secrets in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 24..=64), 1..4),
            stranger in proptest::collection::vec(any::<u8>(), 24..=64),
            id in "msg_[A-Za-z0-9_-]{1,43}",
            body in "(?s).{0,200}",
        ) {
            let secrets: Vec<String> = secrets.iter().map(|bytes| format!("whsec_{}", STANDARD.encode(bytes))).collect();
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().to_string();
            let keys = keys(&secrets);
            let signed = signature_header(&keys, &id, &now, body.as_bytes()).expect("a signature");
            let headers = headers(&id, &now, signed);
            for secret in &secrets {
                prop_assert!(Webhook::new(secret).unwrap().verify(body.as_bytes(), &headers).is_ok());
                let changed = format!("{body} ");
                prop_assert!(Webhook::new(secret).unwrap().verify(changed.as_bytes(), &headers).is_err());
            }
            let stranger = format!("whsec_{}", STANDARD.encode(stranger));
            if !secrets.contains(&stranger) {
                prop_assert!(Webhook::new(&stranger).unwrap().verify(body.as_bytes(), &headers).is_err());
            }
        }
    }
}
