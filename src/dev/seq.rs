//! Positions in a database's changes, as opaque as CouchDB's.
//!
//! A seq reads `<number>-<text>`; the text is different each time that the same position is written, so that a client that
//! compares two of them learns at once that it must not. It names the database's instance: a seq of a database that was
//! deleted and made again is accepted and starts from 0, as in CouchDB.

use super::answer::Failure;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::Value;

/// nonce, instance, seq, checksum.
const BLOB_BYTES: usize = 28;

/// What a request's `since` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    Start,
    Now,
    At { instance: u64, seq: u64 },
}

impl Since {
    /// The number from which a database's instance reads.
    pub fn resolve(self, instance: u64, update_seq: u64) -> u64 {
        match self {
            Since::Start => 0,
            Since::Now => update_seq,
            Since::At { instance: of, seq } if of == instance => seq.min(update_seq),
            Since::At { .. } => 0,
        }
    }

    pub fn parse(text: &str) -> Result<Self, Failure> {
        let text = text.trim().trim_matches('"');
        match text {
            "" | "0" => Ok(Since::Start),
            "now" => Ok(Since::Now),
            _ => decode(text).ok_or_else(malformed),
        }
    }

    pub fn from_json(value: &Value) -> Result<Self, Failure> {
        match value {
            Value::Null => Ok(Since::Start),
            Value::Number(n) if n.as_u64() == Some(0) => Ok(Since::Start),
            Value::String(text) => Self::parse(text),
            _ => Err(malformed()),
        }
    }
}

fn malformed() -> Failure {
    Failure::bad_request("Malformed sequence supplied in 'since' parameter.")
}

pub fn encode(instance: u64, seq: u64) -> String {
    let nonce = fastrand::u64(..);
    let mut blob = [0u8; BLOB_BYTES];
    blob[..8].copy_from_slice(&nonce.to_be_bytes());
    blob[8..16].copy_from_slice(&(instance ^ mix(nonce)).to_be_bytes());
    blob[16..24].copy_from_slice(&(seq ^ mix(nonce.wrapping_add(1))).to_be_bytes());
    blob[24..].copy_from_slice(&checksum(nonce, instance, seq).to_be_bytes());
    format!("{seq}-{}", URL_SAFE_NO_PAD.encode(blob))
}

fn decode(text: &str) -> Option<Since> {
    let (_, blob) = text.split_once('-')?;
    let blob: [u8; BLOB_BYTES] = URL_SAFE_NO_PAD.decode(blob).ok()?.try_into().ok()?;
    let nonce = word(&blob, 0);
    let instance = word(&blob, 8) ^ mix(nonce);
    let seq = word(&blob, 16) ^ mix(nonce.wrapping_add(1));
    (blob[24..] == checksum(nonce, instance, seq).to_be_bytes()).then_some(Since::At { instance, seq })
}

fn word(blob: &[u8; BLOB_BYTES], at: usize) -> u64 {
    blob[at..at + 8].iter().fold(0, |word, byte| word << 8 | u64::from(*byte))
}

fn checksum(nonce: u64, instance: u64, seq: u64) -> u32 {
    (mix(nonce ^ instance.rotate_left(17) ^ seq) >> 32) as u32
}

/// Scatters the bits; not a secret, only unlike from one nonce to the next.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_same_position_never_reads_the_same() {
        assert_ne!(encode(7, 3), encode(7, 3));
    }

    #[test]
    fn a_seq_of_another_instance_starts_from_zero() {
        let since = Since::parse(&encode(7, 3)).expect("our own seq is readable");
        assert_eq!(since.resolve(7, 10), 3);
        assert_eq!(since.resolve(8, 10), 0);
        assert_eq!(since.resolve(7, 2), 2);
    }

    #[test]
    fn what_a_since_may_be() {
        let cases =
            [("0", Some(Since::Start)), ("\"0\"", Some(Since::Start)), ("now", Some(Since::Now)), ("", Some(Since::Start))];
        for (text, expected) in cases {
            assert_eq!(Since::parse(text).ok(), expected, "{text}");
        }
        for text in ["3", "foo", "3-foo", "3-g1AAAAB2eJzLYWBgYMpgTmEQSM4vTc4wdDA0MtczAELDHJBMIkNS", "-", "3-"] {
            assert_eq!(Since::parse(text).expect_err(text).status, 400);
        }
    }

    proptest! {
        #[test]
        fn a_seq_survives_the_way_there_and_back(instance: u64, seq: u64) {
            prop_assert_eq!(decode(&encode(instance, seq)), Some(Since::At { instance, seq }));
        }

        #[test]
        fn no_text_panics(text in ".{0,80}") {
            let _ = Since::parse(&text);
        }
    }
}
