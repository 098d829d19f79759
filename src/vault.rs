//! Passwords by host and user, and secrets by name; never printed.
//!
//! The passwords file is the original's: `{ "host": { "user": "password" } }`, by host name without port. A password leaves
//! this module only as an `Authorization` header or inside a URL that goes to CouchDB's `_replicate`, a secret only as a
//! header or as a key that is ready to sign.

mod secrets;

pub use secrets::{SecretError, SigningKey};

use base64::Engine;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use reqwest::header::HeaderValue;
use secrecy::{ExposeSecret, SecretString};
use secrets::Secrets;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use url::Url;

/// The secret that opens the admin API; no rule may send it or sign with it.
pub const ADMIN_TOKEN: &str = "admin_token";
/// What stands where a password stood.
const REDACTED: &str = "[redacted]";
/// RFC 3986's unreserved characters stay, so that `%` itself is encoded too and every reader decodes the same password.
const USERINFO: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
/// What JavaScript's `encodeURIComponent` encodes.
const COMPONENT: &AsciiSet = &USERINFO.remove(b'!').remove(b'\'').remove(b'(').remove(b')').remove(b'*');

#[derive(Clone)]
pub struct Credentials {
    pub user: String,
    pub password: SecretString,
}

impl Credentials {
    /// `Authorization: Basic …`, marked sensitive so that no library prints it.
    pub fn basic_header(&self) -> HeaderValue {
        let text = format!("Basic {}", basic(&self.user, self.password.expose_secret()));
        let mut value = HeaderValue::from_str(&text).unwrap_or_else(|_| HeaderValue::from_static("Basic"));
        value.set_sensitive(true);
        value
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).field("password", &format_args!("{REDACTED}")).finish()
    }
}

fn basic(user: &str, password: &str) -> String {
    base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"))
}

/// Names the place in the file, never a secret.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    #[error("read the {file} {path}: {error}{hint}")]
    Read { file: &'static str, path: String, error: std::io::Error, hint: String },
    /// Without the parser's own words, which may quote the text.
    #[error("the {file} is not JSON (line {line}, column {column})")]
    NotJson { file: &'static str, line: usize, column: usize },
    #[error("the {file}: {fault}")]
    Shape { file: &'static str, fault: String },
    #[error("not a URL: {0}")]
    NotUrl(url::ParseError),
}

const PASSWORDS_FILE: &str = "passwords file";

/// All passwords and secrets; cheap to clone.
#[derive(Clone)]
pub struct Vault {
    hosts: Arc<HashMap<String, HashMap<String, SecretString>>>,
    secrets: Arc<Secrets>,
    needles: Arc<Needles>,
}

impl Vault {
    pub fn empty() -> Self {
        Self::new(HashMap::new(), Secrets::default(), Vec::new())
    }

    /// The text of a passwords file.
    pub fn from_json(text: &str) -> Result<Self, VaultError> {
        let shape = |fault: String| VaultError::Shape { file: PASSWORDS_FILE, fault };
        let Value::Object(file) = parse(PASSWORDS_FILE, text)? else {
            return Err(shape(String::from("must be an object of hosts")));
        };
        let mut hosts: HashMap<String, HashMap<String, SecretString>> = HashMap::new();
        for (host, users) in file {
            let Value::Object(users) = users else {
                return Err(shape(format!("host {host:?} must be an object of users and passwords")));
            };
            let of_host = hosts.entry(host_key(&host)).or_default();
            for (user, password) in users {
                match password {
                    Value::String(password) => drop(of_host.insert(user, SecretString::from(password))),
                    _ => return Err(shape(format!("host {host:?}, user {user:?}: the password must be a string"))),
                }
            }
        }
        Ok(Self::new(hosts, Secrets::default(), Vec::new()))
    }

    /// The text of a secrets file beside the passwords.
    pub fn with_secrets(self, text: &str) -> Result<Self, VaultError> {
        let hosts = Arc::try_unwrap(self.hosts).unwrap_or_else(|shared| (*shared).clone());
        let (secrets, forms) = Secrets::from_json(text)?;
        Ok(Self::new(hosts, secrets, forms))
    }

    /// The two files, where there are such.
    pub fn load(passwords: Option<&Path>, secrets: Option<&Path>) -> Result<Self, VaultError> {
        let vault = match passwords {
            Some(path) => Self::from_json(&read(PASSWORDS_FILE, path)?)?,
            None => Self::empty(),
        };
        match secrets {
            Some(path) => vault.with_secrets(&read(secrets::FILE, path)?),
            None => Ok(vault),
        }
    }

    fn new(hosts: HashMap<String, HashMap<String, SecretString>>, secrets: Secrets, mut forms: Vec<String>) -> Self {
        for (user, password) in hosts.values().flatten().filter(|(_, password)| !password.expose_secret().is_empty()) {
            forms.extend(password_forms(user, password.expose_secret()));
        }
        Self { hosts: Arc::new(hosts), secrets: Arc::new(secrets), needles: Arc::new(Needles::of(forms)) }
    }

    /// The keys of the secret of this name, each of which signs.
    pub fn signing(&self, name: &str) -> Result<Arc<[SigningKey]>, SecretError> {
        self.secrets.signing(name)
    }

    /// The secret of this name as a header's value.
    pub fn header(&self, name: &str) -> Result<HeaderValue, SecretError> {
        self.secrets.header(name)
    }

    /// By host name without port; an empty password counts as none, as in the original.
    pub fn credentials(&self, host: &str, user: &str) -> Option<&SecretString> {
        self.hosts.get(&host_key(host))?.get(user).filter(|password| !password.expose_secret().is_empty())
    }

    /// The URL with the password of its host and user. Without a user, or without an entry here, it stays as it is; an entry
    /// wins over a password that the URL already has.
    pub fn inject(&self, url: &str) -> Result<Url, VaultError> {
        let mut url = Url::parse(url).map_err(VaultError::NotUrl)?;
        let password = url.host_str().and_then(|host| {
            // The user may be spelled in the file as in the URL, as the original wanted it, or as it is meant.
            self.credentials(host, &decode(url.username())).or_else(|| self.credentials(host, url.username()))
        });
        if let Some(password) = password {
            let encoded = utf8_percent_encode(password.expose_secret(), USERINFO).to_string();
            // Fails only for a URL that cannot have a user, and this one has.
            let _ = url.set_password(Some(&encoded));
        }
        Ok(url)
    }

    /// `redact_text`, and every secret of this vault wherever it stands: as it is, percent-encoded, escaped for JSON, or inside
    /// a Basic header. For answers that echo what they were sent.
    pub fn redact(&self, text: &str) -> String {
        redact_text(&self.needles.redact(text))
    }
}

impl Default for Vault {
    fn default() -> Self {
        Self::empty()
    }
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { hosts, secrets, needles: _ } = self;
        f.debug_struct("Vault").field("hosts", &hosts.len()).field("secrets", &secrets.len()).finish_non_exhaustive()
    }
}

fn read(file: &'static str, path: &Path) -> Result<String, VaultError> {
    let unreadable = |error: std::io::Error| {
        let is_denied = error.kind() == std::io::ErrorKind::PermissionDenied;
        let hint = users(path).filter(|_| is_denied).map(|(process, owner)| denied(process, owner)).unwrap_or_default();
        VaultError::Read { file, path: path.display().to_string(), error, hint }
    };
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    // Editors of another system leave a byte order mark.
    Ok(text.trim_start_matches('\u{FEFF}').to_string())
}

/// Of this process, and of the file.
#[cfg(unix)]
fn users(path: &Path) -> Option<(u32, u32)> {
    use std::os::unix::fs::MetadataExt;
    let user = |path: &Path| std::fs::metadata(path).map(|metadata| metadata.uid()).ok();
    Some((user(Path::new("/proc/self"))?, user(path)?))
}

#[cfg(not(unix))]
fn users(_: &Path) -> Option<(u32, u32)> {
    None
}

/// The container's user is not root, and a file that is mounted into it often is root's alone.
fn denied(process: u32, owner: u32) -> String {
    match process == owner {
        true => format!(": it is user {owner}'s, as this process is, and its mode forbids reading"),
        false => {
            format!(": it is user {owner}'s, and this process is user {process}: let that user read it, or start as its owner")
        }
    }
}

fn parse(file: &'static str, text: &str) -> Result<Value, VaultError> {
    serde_json::from_str(text).map_err(|error| VaultError::NotJson { file, line: error.line(), column: error.column() })
}

/// Lower case, and an IPv6 address without its brackets.
fn host_key(host: &str) -> String {
    host.trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase()
}

fn decode(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

/// Takes user and password out of a URL and decodes them.
pub fn split_credentials(mut url: Url) -> (Url, Option<Credentials>) {
    if url.username().is_empty() && url.password().is_none() {
        return (url, None);
    }
    let user = decode(url.username());
    let password = SecretString::from(decode(url.password().unwrap_or_default()));
    let _ = url.set_username("");
    let _ = url.set_password(None);
    (url, Some(Credentials { user, password }))
}

/// Every form in which a secret of the vault may show up in a text, by first byte and the longest first.
struct Needles(HashMap<u8, Vec<SecretString>>);

impl Needles {
    fn of(forms: Vec<String>) -> Self {
        let mut needles: HashMap<u8, Vec<SecretString>> = HashMap::new();
        for form in forms {
            if let Some(first) = form.bytes().next() {
                needles.entry(first).or_default().push(SecretString::from(form));
            }
        }
        for of_byte in needles.values_mut() {
            of_byte.sort_by_key(|needle| std::cmp::Reverse(needle.expose_secret().len()));
        }
        Self(needles)
    }

    fn redact(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            match self.at_start(rest) {
                Some(length) => {
                    out.push_str(REDACTED);
                    rest = rest.get(length..).unwrap_or_default();
                }
                None => {
                    out.push(c);
                    rest = rest.get(c.len_utf8()..).unwrap_or_default();
                }
            }
        }
        out
    }

    fn at_start(&self, text: &str) -> Option<usize> {
        let needles = self.0.get(text.as_bytes().first()?)?;
        needles.iter().map(ExposeSecret::expose_secret).find(|needle| text.starts_with(needle)).map(str::len)
    }
}

pub fn password_forms(user: &str, password: &str) -> Vec<String> {
    use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD};
    let pair = format!("{user}:{password}");
    let mut forms = text_forms(password);
    forms.extend([basic(user, password), STANDARD_NO_PAD.encode(&pair), URL_SAFE.encode(&pair), URL_SAFE_NO_PAD.encode(&pair)]);
    forms
}

/// As it is, percent-encoded in every way, escaped for JSON.
pub fn text_forms(secret: &str) -> Vec<String> {
    let strict = utf8_percent_encode(secret, USERINFO).to_string();
    // As the `url` crate, browsers and JavaScript's encodeURIComponent spell it.
    let lax = Url::parse("http://h/").ok().and_then(|mut url| {
        url.set_password(Some(secret)).ok()?;
        url.password().map(String::from)
    });
    let component = utf8_percent_encode(secret, COMPONENT).to_string();
    let json = Value::from(secret).to_string();
    let mut forms = vec![
        secret.to_string(),
        utf8_percent_encode(secret, USERINFO).map(lower_escape).collect(),
        strict.replace("%20", "+"),
        strict,
        component,
        json.trim_matches('"').to_string(),
    ];
    forms.extend(lax);
    forms.retain(|form| !form.is_empty());
    forms.sort();
    forms.dedup();
    forms
}

/// `%2F` and `%2f` are the same; letters of the password itself keep their case.
fn lower_escape(piece: &str) -> String {
    match piece.starts_with('%') {
        true => piece.to_ascii_lowercase(),
        false => piece.to_string(),
    }
}

/// Removes the password of every `scheme://user:password@host` inside a text and keeps the rest.
///
/// A password that should have been encoded and was not may hold any character; where it cannot be told where such a password
/// ends, rather too much is removed than too little.
pub fn redact_text(text: &str) -> String {
    redact_urls(text).into_owned()
}

fn redact_urls(text: &str) -> Cow<'_, str> {
    let mut out = String::new();
    let mut rest = text;
    while let Some(authority) = next_authority(rest) {
        let (before, after) = rest.split_at(authority);
        out.push_str(before);
        rest = match password_in(after) {
            Some((from, to)) => {
                out.push_str(after.get(..from).unwrap_or_default());
                out.push_str(REDACTED);
                after.get(to..).unwrap_or_default()
            }
            None => after,
        };
    }
    match out.is_empty() {
        true => Cow::Borrowed(text),
        false => {
            out.push_str(rest);
            Cow::Owned(out)
        }
    }
}

/// Where the first `://` ends; some writers of JSON escape the slashes.
fn next_authority(text: &str) -> Option<usize> {
    text.match_indices(':').find_map(|(at, _)| {
        let rest = text.get(at + 1..)?;
        match rest.starts_with("//") {
            true => Some(at + 3),
            false => rest.starts_with(r"\/\/").then_some(at + 5),
        }
    })
}

/// No URL's user and password are longer; without a bound a text of many `://` would be read again for each.
const AUTHORITY_BYTES_MAX: usize = 4096;

/// From where to where the password stands in what follows a `://`.
fn password_in(after: &str) -> Option<(usize, usize)> {
    let end = (0..=AUTHORITY_BYTES_MAX.min(after.len())).rev().find(|at| after.is_char_boundary(*at))?;
    let after = after.get(..end)?;
    let until = |stop: fn(char) -> bool| after.find(stop).unwrap_or(after.len());
    let authority = after.get(..until(ends_authority))?;
    if authority.starts_with('[') {
        return None;
    }
    let from = authority.find(':')? + 1;
    if let Some(at) = authority.rfind('@') {
        // `user@host:port` has its colon after the sign.
        return (from <= at).then_some((from, at));
    }
    let word = after.get(..until(ends_word))?;
    let mut port = authority.get(from..)?;
    if authority.len() == word.len() {
        // `http://h:5984: refused` and `(http://h:5984)` are sentences about a port.
        port = port.trim_end_matches([':', ',', '.', ';', ')', ']', '}', '\'']);
    }
    if port.len() <= 5 && port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // No host has such a port: this is a password with a character in it that ended the authority early, or one that was cut
    // off with the text.
    let line = after.get(..until(|c| matches!(c, '\n' | '\r')))?;
    let at = word.rfind('@').or_else(|| line.find('@')).filter(|at| from <= *at);
    Some((from, at.unwrap_or(word.len())))
}

fn ends_word(c: char) -> bool {
    c.is_whitespace() || matches!(c, '"' | '<' | '>' | '`')
}

fn ends_authority(c: char) -> bool {
    ends_word(c) || matches!(c, '/' | '?' | '#' | '\\')
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn vault() -> Vault {
        Vault::from_json(
            r#"{"example.com": {"user1": "password1", "user2": "p@ss/w:ö%41 ?#", "a@b": "secret3", "none": ""},
                "google.com": {"user1": "password"}, "::1": {"admin": "six"}, "[::2]": {"admin": "seven"}, "Upper.Example": {"u": "upper"}}"#,
        )
        .expect("a good file")
    }

    #[test]
    fn who_may_not_read_a_file_is_told_why() {
        let own = std::fs::metadata("/proc/self").is_ok();
        assert_eq!(users(Path::new("/")).is_some(), own);
        assert!(users(Path::new("/no/such/file")).is_none());
        assert!(denied(65532, 0).contains("user 0's, and this process is user 65532"));
        assert!(denied(7, 7).contains("its mode forbids reading"));
        let missing =
            Vault::load(Some(Path::new("/no/such/file")), None).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(missing.ends_with("(os error 2)"), "{missing}");
    }

    #[test]
    fn a_password_is_added_by_host_and_user() {
        for (url, expected) in [
            ("http://user1@example.com/mydb", "http://user1:password1@example.com/mydb"),
            ("http://user1@example.com:5984/mydb", "http://user1:password1@example.com:5984/mydb"),
            ("https://user1@google.com/mydb", "https://user1:password@google.com/mydb"),
            ("https://usermissing@example.com/mydb", "https://usermissing@example.com/mydb"),
            ("https://usermissing@missing.com/mydb", "https://usermissing@missing.com/mydb"),
            ("https://example.com/mydb", "https://example.com/mydb"),
            ("https://none@example.com/", "https://none@example.com/"),
            ("https://user1:old@example.com/", "https://user1:password1@example.com/"),
            ("https://other:old@example.com/", "https://other:old@example.com/"),
            ("http://admin@[::1]:5984/db", "http://admin:six@[::1]:5984/db"),
            ("http://admin@[::2]/db", "http://admin:seven@[::2]/db"),
            ("http://u@upper.EXAMPLE/", "http://u:upper@upper.example/"),
        ] {
            assert_eq!(vault().inject(url).expect(url).as_str(), expected);
        }
    }

    #[test]
    fn bug_5_query_and_fragment_stay_and_passwords_are_encoded() {
        let url = vault().inject("https://user2@example.com:81/a%2Fb?x=1&y=a%20b#top").unwrap();
        assert_eq!(url.as_str(), "https://user2:p%40ss%2Fw%3A%C3%B6%2541%20%3F%23@example.com:81/a%2Fb?x=1&y=a%20b#top");
        let (url, credentials) = split_credentials(url);
        assert_eq!(url.as_str(), "https://example.com:81/a%2Fb?x=1&y=a%20b#top");
        let credentials = credentials.expect("it had some");
        assert_eq!((credentials.user.as_str(), credentials.password.expose_secret()), ("user2", "p@ss/w:ö%41 ?#"));
    }

    #[test]
    fn an_encoded_user_is_found() {
        let url = vault().inject("https://a%40b@example.com/").unwrap();
        assert_eq!(url.as_str(), "https://a%40b:secret3@example.com/");
        assert_eq!(split_credentials(url).1.expect("it had some").user, "a@b");
    }

    #[test]
    fn a_url_without_user_has_no_credentials() {
        assert!(split_credentials(Url::parse("http://h/").unwrap()).1.is_none());
        let only_user = split_credentials(Url::parse("http://u@h/").unwrap()).1.expect("a user");
        assert_eq!((only_user.user.as_str(), only_user.password.expose_secret()), ("u", ""));
    }

    #[test]
    fn errors_name_the_place_and_no_password() {
        for (file, expected) in [
            ("[]", "object of hosts"),
            (r#"{"h": "s3cret"}"#, r#"host "h""#),
            (r#"{"h": {"u": ["s3cret"]}}"#, r#"host "h", user "u""#),
            (r#"{"h": {"u": "s3cret" "#, "line 1"),
        ] {
            let error = Vault::from_json(file).expect_err(file);
            assert!(error.to_string().contains(expected), "{error}");
            assert!(!format!("{error} {error:?}").contains("s3cret"));
        }
        assert!(
            Vault::load(Some(Path::new("/nowhere/at/all")), None)
                .expect_err("no such file")
                .to_string()
                .contains("/nowhere/at/all")
        );
        let error = Vault::empty().inject("http://u:s3cret@[bad/").expect_err("no URL");
        assert!(!format!("{error} {error:?}").contains("s3cret"));
    }

    #[test]
    fn debug_prints_no_secret() {
        let credentials = Credentials { user: String::from("u"), password: SecretString::from("s3cret") };
        assert_eq!(format!("{credentials:?}"), r#"Credentials { user: "u", password: [redacted] }"#);
        assert!(!format!("{:?} {:?}", credentials.basic_header(), vault()).contains("password1"));
        assert!(!format!("{:?}", credentials.basic_header()).contains("dTpz"));
    }

    #[test]
    fn passwords_in_urls_are_redacted_and_the_rest_is_kept() {
        for (text, expected) in [
            ("http://u:p@h/", "http://u:[redacted]@h/"),
            (
                "a http://u:p@h:1/x?y=z@w b https://v:q@[::1]:2/ c",
                "a http://u:[redacted]@h:1/x?y=z@w b https://v:[redacted]@[::1]:2/ c",
            ),
            ("http://u@h:5984/a", "http://u@h:5984/a"),
            ("http://h:5984/org.couchdb.user:joe@example.com", "http://h:5984/org.couchdb.user:joe@example.com"),
            ("http://[::1]:5984/x@y", "http://[::1]:5984/x@y"),
            ("http://u:@h", "http://u:[redacted]@h"),
            ("http://:p@h", "http://:[redacted]@h"),
            ("http://u:a:b@c@h/", "http://u:[redacted]@h/"),
            ("http://u:a/b?c#d@h/", "http://u:[redacted]@h/"),
            ("http://u:a b@h/", "http://u:[redacted]@h/"),
            (r#"{"source":"http:\/\/u:p@h\/db"}"#, r#"{"source":"http:\/\/u:[redacted]@h\/db"}"#),
            ("no url: a:b@c", "no url: a:b@c"),
            ("http://h:5984: refused, ask joe@example.com", "http://h:5984: refused, ask joe@example.com"),
            ("(see http://h:5984)", "(see http://h:5984)"),
            ("http://user:s3cr", "http://user:[redacted]"),
            ("", ""),
            ("://", "://"),
            ("http://u:ö€@h", "http://u:[redacted]@h"),
        ] {
            assert_eq!(redact_text(text), expected);
        }
    }

    #[test]
    fn an_echo_of_a_secret_is_redacted_in_every_form() {
        let vault = Vault::from_json(r#"{"h": {"user": "pa\"ss w/örd"}}"#).unwrap();
        let header = base64::engine::general_purpose::STANDARD.encode("user:pa\"ss w/örd");
        let text = format!(r#"got pa"ss w/örd, "pa\"ss w/örd", pa%22ss%20w%2F%C3%B6rd and Basic {header}."#);
        assert_eq!(vault.redact(&text), r#"got [redacted], "[redacted]", [redacted] and Basic [redacted]."#);
        let odd = Vault::from_json(r#"{"h": {"user": "red"}}"#).unwrap();
        assert_eq!(odd.redact("a red http://u:x@h"), "a [redacted] http://u:[redacted]@h");
    }

    proptest! {
        #[test]
        fn what_is_injected_is_split_and_redacted(password in "\\PC{1,20}") {
            let file = serde_json::json!({"h.example": {"u": password}}).to_string();
            let vault = Vault::from_json(&file).unwrap();
            let url = vault.inject("https://u@h.example:81/p?q=1#f").unwrap();
            let shown = redact_text(&format!("in {url} there"));
            prop_assert_eq!(shown, "in https://u:[redacted]@h.example:81/p?q=1#f there");
            let (bare, credentials) = split_credentials(url);
            prop_assert_eq!(bare.as_str(), "https://h.example:81/p?q=1#f");
            let credentials = credentials.unwrap();
            prop_assert_eq!(credentials.password.expose_secret(), password.as_str());
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,40}", urls in "(http://|[a:@/?#\\[\\] \"é\\\\]){0,12}") {
            let _ = redact_text(&text);
            let _ = vault().redact(&urls);
        }

        #[test]
        fn a_long_raw_password_never_stays(password in "[a-z]{3}[!-~]{0,10}[a-z]{4}", tail in "(/db)?") {
            let raw = format!("http://user:{password}@host{tail}");
            let shown = redact_text(&raw);
            prop_assert!(!shown.contains(&password), "{}", shown);
        }
    }
}
