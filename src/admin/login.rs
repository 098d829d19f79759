//! Who asks: an admin of CouchDB by name and password, or whoever has the token.
//!
//! CouchDB is the judge of a password, and remembers wrong ones against our address: so a login that was right is not asked
//! for again for a minute, failures are counted by address and by name, and past a few of them nobody is asked. Everything
//! that is remembered is bounded, and is a hash.

use crate::couch::Standing;
use crate::couch::session::is_same;
use crate::vault::Credentials;
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::future::BoxFuture;
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// An admin who is none any more is believed for so long.
const REMEMBERED_FOR: Duration = Duration::from_secs(60);
const REMEMBERED_MAX: usize = 1_000;
/// CouchDB's own window, from the first failure.
const FAILURES_WINDOW: Duration = Duration::from_secs(300);
const FAILURES_MAX: usize = 10_000;
/// A person with a bad memory; a guesser gets nowhere with it.
const FAILURES_OF_ADDRESS: u32 = 10;
/// One below CouchDB's, which would lock that name for whatever else we do with it.
const FAILURES_OF_NAME: u32 = 4;
/// Of our own name, of which CouchDB is not asked and which it does not lock: enough for slips, and no use to many addresses.
const FAILURES_OF_OWN_NAME: u32 = 20;
/// CouchDB takes a quarter of a second for a password that it does not know yet.
const CHECK_TIMEOUT: Duration = Duration::from_secs(10);
/// Names and passwords are far shorter.
const HEADER_BYTES_MAX: usize = 4_096;
/// A shorter token could be guessed.
const TOKEN_CHARS_MIN: usize = 16;

/// Asks CouchDB; the text says why that did not work.
pub type Check = Box<dyn Fn(Credentials) -> BoxFuture<'static, Result<Standing, String>> + Send + Sync>;

pub struct Login {
    check: Check,
    token: Option<SecretString>,
    /// Of this process: what is remembered is worth nothing elsewhere.
    salt: [u8; 32],
    memory: Mutex<Memory>,
    /// One at a time, so that what one learned spares the others theirs.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Denied {
    /// Nobody, or with nothing that can be read.
    Nobody,
    Wrong,
    NoAdmin,
    TooMany {
        after: Duration,
    },
    Unavailable(String),
}

enum Shown {
    Token(SecretString),
    Password(Credentials),
}

impl Login {
    pub fn new(check: Check, token: Option<SecretString>) -> Self {
        let token = token.filter(|token| {
            let is_long = token.expose_secret().chars().count() >= TOKEN_CHARS_MIN;
            if !is_long {
                tracing::warn!("the token of the admin API is shorter than {TOKEN_CHARS_MIN} characters and opens nothing");
            }
            is_long
        });
        let mut salt = [0; 32];
        let mut random = fastrand::Rng::new();
        salt.fill_with(|| random.u8(..));
        Self { check, token, salt, memory: Mutex::default(), turn: tokio::sync::Mutex::new(()) }
    }

    /// The name, for logs and documents.
    pub async fn who(&self, headers: &HeaderMap, peer: IpAddr, now: Instant) -> Result<String, Denied> {
        let shown = shown(headers).ok_or(Denied::Nobody)?;
        let peer = network(peer);
        let credentials = match shown {
            Shown::Token(shown) => {
                let is_right = self
                    .token
                    .as_ref()
                    .is_some_and(|token| is_same(token.expose_secret().as_bytes(), shown.expose_secret().as_bytes()));
                // One who has it is let in however many others guess from the same address.
                return match is_right {
                    true => Ok(String::from("the admin token")),
                    false => Err(self.memory().failed(peer, None, now)),
                };
            }
            Shown::Password(credentials) => credentials,
        };
        let (login, name) = (self.hash(&credentials), credentials.user.clone());
        if self.memory().knows(&login, now) {
            return Ok(name);
        }
        let _turn = self.turn.lock().await;
        self.memory().may_try(peer, &login, &name, now)?;
        if self.memory().knows(&login, now) {
            return Ok(name);
        }
        let checked = tokio::time::timeout(CHECK_TIMEOUT, (self.check)(credentials)).await;
        let standing = match checked {
            Ok(standing) => standing.map_err(Denied::Unavailable)?,
            Err(_) => return Err(Denied::Unavailable(String::from("couchdb took too long to look at the password"))),
        };
        match standing {
            Standing::Admin => {
                self.memory().remember(login, now);
                Ok(name)
            }
            Standing::NoAdmin => Err(Denied::NoAdmin),
            Standing::Wrong => Err(self.memory().failed(peer, Some(&name), now)),
            Standing::NotOurs => {
                let mut memory = self.memory();
                count_one(&mut memory.by_own_name, name, now);
                Err(memory.failed(peer, None, now))
            }
            Standing::Locked => Err(Denied::TooMany { after: FAILURES_WINDOW }),
        }
    }

    fn hash(&self, credentials: &Credentials) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(self.salt);
        hash.update((credentials.user.len() as u64).to_be_bytes());
        hash.update(&credentials.user);
        hash.update(credentials.password.expose_secret());
        hash.finalize().into()
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn shown(headers: &HeaderMap) -> Option<Shown> {
    let header = headers.get(AUTHORIZATION)?.to_str().ok().filter(|text| text.len() <= HEADER_BYTES_MAX)?;
    let (scheme, rest) = header.split_once(' ')?;
    let rest = rest.trim();
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(Shown::Token(SecretString::from(rest)));
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let text = String::from_utf8(STANDARD.decode(rest).ok()?).ok()?;
    let (user, password) = text.split_once(':').filter(|(user, _)| !user.is_empty())?;
    Some(Shown::Password(Credentials { user: user.to_string(), password: SecretString::from(password) }))
}

/// Whoever has one IPv6 address has 2^64 of them.
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(ip) => IpAddr::V6((u128::from(ip) >> 64 << 64).into()),
        ip => ip,
    }
}

#[derive(Default)]
struct Memory {
    admins: HashMap<[u8; 32], Instant>,
    by_address: HashMap<IpAddr, Failures>,
    by_name: HashMap<String, Failures>,
    by_own_name: HashMap<String, Failures>,
}

#[derive(Debug, Clone, Copy)]
struct Failures {
    count: u32,
    first: Instant,
}

impl Memory {
    fn knows(&self, login: &[u8; 32], now: Instant) -> bool {
        self.admins.get(login).is_some_and(|at| now.saturating_duration_since(*at) < REMEMBERED_FOR)
    }

    fn remember(&mut self, login: [u8; 32], now: Instant) {
        make_room(&mut self.admins, REMEMBERED_MAX, |at| *at);
        self.admins.insert(login, now);
    }

    /// A right login that was remembered a moment ago needs no try.
    fn may_try(&self, peer: IpAddr, login: &[u8; 32], name: &str, now: Instant) -> Result<(), Denied> {
        let left = |failures: Option<&Failures>, max: u32| {
            let failures = failures.filter(|failures| failures.count >= max)?;
            FAILURES_WINDOW.checked_sub(now.saturating_duration_since(failures.first)).filter(|left| !left.is_zero())
        };
        let of_address = left(self.by_address.get(&peer), FAILURES_OF_ADDRESS);
        let of_name = left(self.by_name.get(name), FAILURES_OF_NAME);
        let of_own_name = left(self.by_own_name.get(name), FAILURES_OF_OWN_NAME);
        match of_address.max(of_name).max(of_own_name) {
            Some(after) if !self.knows(login, now) => Err(Denied::TooMany { after }),
            _ => Ok(()),
        }
    }

    /// A name is given where CouchDB was asked about it.
    fn failed(&mut self, peer: IpAddr, name: Option<&str>, now: Instant) -> Denied {
        let count = count_one(&mut self.by_address, peer, now);
        if count == FAILURES_OF_ADDRESS {
            tracing::warn!(%peer, "many failed logins to the admin API, its passwords are not looked at for some minutes");
        }
        if let Some(name) = name {
            count_one(&mut self.by_name, name.to_string(), now);
        }
        Denied::Wrong
    }
}

fn count_one<K: Eq + Hash + Clone>(failures: &mut HashMap<K, Failures>, key: K, now: Instant) -> u32 {
    if !failures.contains_key(&key) {
        make_room(failures, FAILURES_MAX, |failures| failures.first);
    }
    let entry = failures.entry(key).or_insert(Failures { count: 0, first: now });
    if now.saturating_duration_since(entry.first) >= FAILURES_WINDOW {
        *entry = Failures { count: 0, first: now };
    }
    entry.count = entry.count.saturating_add(1);
    entry.count
}

/// Forgets the older half where it is full, so that room is made seldom.
fn make_room<K: Eq + Hash + Clone, V>(map: &mut HashMap<K, V>, max: usize, at: impl Fn(&V) -> Instant) {
    if map.len() < max {
        return;
    }
    let mut ages: Vec<Instant> = map.values().map(&at).collect();
    ages.sort_unstable();
    let Some(middle) = ages.get(max / 2).copied() else { return };
    map.retain(|_, value| at(value) > middle);
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const TOKEN: &str = "a-token-of-some-length";

    fn basic(user: &str, password: &str) -> HeaderMap {
        header(&format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
    }

    fn header(text: &str) -> HeaderMap {
        HeaderMap::from_iter([(AUTHORIZATION, text.parse().expect("a header"))])
    }

    fn peer(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    /// `anna:right` is an admin, `staff:right` is a user, `own` is our own name.
    fn login() -> (Login, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let check: Check = Box::new(move |credentials| {
            count.fetch_add(1, Ordering::Relaxed);
            Box::pin(async move {
                match (credentials.user.as_str(), credentials.password.expose_secret()) {
                    ("away", _) => Err(String::from("couchdb does not answer")),
                    ("locked", _) => Ok(Standing::Locked),
                    ("own", "wrong") => Ok(Standing::NotOurs),
                    ("staff", "right") => Ok(Standing::NoAdmin),
                    (_, "right") => Ok(Standing::Admin),
                    _ => Ok(Standing::Wrong),
                }
            })
        });
        (Login::new(check, Some(SecretString::from(TOKEN))), asked)
    }

    #[tokio::test]
    async fn many_addresses_get_no_more_guesses_at_our_own_name() {
        let (login, asked) = login();
        let now = Instant::now();
        for n in 0..FAILURES_OF_OWN_NAME {
            let address = peer(u8::try_from(n).expect("few"));
            assert_eq!(login.who(&basic("own", "wrong"), address, now).await, Err(Denied::Wrong));
        }
        let denied = login.who(&basic("own", "right"), peer(99), now).await;
        assert_eq!(denied, Err(Denied::TooMany { after: FAILURES_WINDOW }));
        assert_eq!(asked.load(Ordering::Relaxed), FAILURES_OF_OWN_NAME as usize);
        assert_eq!(
            login.who(&basic("anna", "right"), peer(99), now).await,
            Ok(String::from("anna")),
            "it is about that name alone"
        );
        assert_eq!(login.who(&basic("own", "right"), peer(99), now + FAILURES_WINDOW).await, Ok(String::from("own")));
    }

    #[tokio::test]
    async fn an_admin_or_the_token_opens_and_nothing_else() {
        let (login, _) = login();
        let now = Instant::now();
        for (headers, expected) in [
            (basic("anna", "right"), Ok("anna")),
            (basic("anna", "wrong"), Err(Denied::Wrong)),
            (basic("staff", "right"), Err(Denied::NoAdmin)),
            (basic("own", "wrong"), Err(Denied::Wrong)),
            (basic("away", "x"), Err(Denied::Unavailable("couchdb does not answer".into()))),
            (basic("locked", "x"), Err(Denied::TooMany { after: FAILURES_WINDOW })),
            (basic("", "right"), Err(Denied::Nobody)),
            (HeaderMap::new(), Err(Denied::Nobody)),
            (header("Basic"), Err(Denied::Nobody)),
            (header("Basic %%%"), Err(Denied::Nobody)),
            (header("Digest x"), Err(Denied::Nobody)),
            (header(&format!("Bearer {TOKEN}")), Ok("the admin token")),
            (header(&format!("bearer {TOKEN}")), Ok("the admin token")),
            (header("Bearer a-token-of-some-lengtH"), Err(Denied::Wrong)),
            (header("Bearer "), Err(Denied::Wrong)),
            (header(&format!("Basic {}", "A".repeat(HEADER_BYTES_MAX))), Err(Denied::Nobody)),
        ] {
            assert_eq!(login.who(&headers, peer(1), now).await, expected.map(String::from), "{headers:?}");
        }
    }

    #[tokio::test]
    async fn without_a_token_or_with_a_short_one_no_token_opens() {
        for token in [None, Some(SecretString::from("short")), Some(SecretString::from(""))] {
            let (Login { check, .. }, _) = login();
            let login = Login::new(check, token);
            for shown in ["Bearer short", "Bearer ", "Bearer"] {
                assert!(login.who(&header(shown), peer(1), Instant::now()).await.is_err(), "{shown}");
            }
        }
    }

    #[tokio::test]
    async fn a_right_login_is_asked_for_once_a_minute() {
        let (login, asked) = login();
        let start = Instant::now();
        for (seconds, expected) in [(0, 1), (1, 1), (59, 1), (61, 2)] {
            let now = start + Duration::from_secs(seconds);
            assert!(login.who(&basic("anna", "right"), peer(1), now).await.is_ok());
            assert_eq!(asked.load(Ordering::Relaxed), expected, "after {seconds} s");
        }
        assert_eq!(login.who(&basic("anna", "wrong"), peer(1), start).await, Err(Denied::Wrong), "only that password");
    }

    #[tokio::test]
    async fn failures_are_limited_by_name_before_couchdb_locks_it() {
        let (login, asked) = login();
        let start = Instant::now();
        for guess in 0..20u8 {
            let _ = login.who(&basic("ben", &format!("guess{guess}")), peer(guess), start).await;
        }
        assert_eq!(asked.load(Ordering::Relaxed), FAILURES_OF_NAME as usize);
        let denied = login.who(&basic("ben", "right"), peer(99), start).await;
        assert_eq!(denied, Err(Denied::TooMany { after: FAILURES_WINDOW }));
        assert!(login.who(&basic("anna", "right"), peer(1), start).await.is_ok(), "others are let in");
        assert!(login.who(&basic("ben", "right"), peer(1), start + FAILURES_WINDOW).await.is_ok());
    }

    #[tokio::test]
    async fn failures_are_limited_by_address() {
        let (login, asked) = login();
        let now = Instant::now();
        assert!(login.who(&basic("anna", "right"), peer(1), now).await.is_ok());
        for guess in 0..30 {
            let _ = login.who(&basic("own", "wrong"), peer(1), now).await;
            let _ = login.who(&header(&format!("Bearer guess{guess}")), peer(2), now).await;
        }
        assert_eq!(asked.load(Ordering::Relaxed), 1 + FAILURES_OF_ADDRESS as usize);
        for (headers, from, is_open) in [
            (basic("carl", "right"), 1, false),
            (basic("carl", "right"), 2, false),
            (basic("carl", "right"), 3, true),
            (basic("anna", "right"), 1, true),
            (header(&format!("Bearer {TOKEN}")), 2, true),
            (basic("own", "right"), 4, true),
        ] {
            assert_eq!(login.who(&headers, peer(from), now).await.is_ok(), is_open, "{headers:?} from {from}");
        }
    }

    #[tokio::test]
    async fn those_who_come_together_are_asked_for_once() {
        let (login, asked) = login();
        let (headers, now) = (basic("anna", "right"), Instant::now());
        let all = futures_util::future::join_all((0..20).map(|_| login.who(&headers, peer(1), now))).await;
        assert!(all.iter().all(Result::is_ok));
        assert_eq!(asked.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn an_ipv6_network_is_one_address() {
        let (one, other) = ("2001:db8::1".parse().expect("an address"), "2001:db8::ffff:1".parse().expect("an address"));
        assert_eq!(network(one), network(other));
        assert_ne!(network(one), network("2001:db8:0:1::1".parse().expect("an address")));
        assert_eq!(network("::ffff:10.0.0.1".parse().expect("an address")), peer(1));
    }

    proptest! {
        #[test]
        fn memory_is_bounded_and_keeps_the_newest(count in 1usize..3_000) {
            let mut memory = Memory::default();
            let start = Instant::now();
            for at in 0..count {
                let mut login = [0; 32];
                login[..8].copy_from_slice(&at.to_be_bytes());
                let now = start + Duration::from_millis(at as u64);
                memory.remember(login, now);
                prop_assert!(memory.admins.len() <= REMEMBERED_MAX && memory.knows(&login, now));
            }
            let mut failures = HashMap::new();
            for at in 0..count {
                make_room(&mut failures, 100, |failures: &Failures| failures.first);
                count_one(&mut failures, at, start + Duration::from_millis(at as u64));
                prop_assert!(failures.len() <= 100 && failures.contains_key(&at));
            }
        }

        #[test]
        fn no_header_panics(text in "[ -~]{0,60}", encoded in "[A-Za-z0-9+/=]{0,40}") {
            let _ = shown(&header(&text));
            let _ = shown(&header(&format!("Basic {encoded}")));
        }
    }
}
