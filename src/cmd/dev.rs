//! `spiegel dev`: the embedded CouchDB-compatible server alone, to develop against. Nothing outlives it.

use super::run::signals;
use super::{Exit, Failure, say};
use crate::dev::{DevOptions, DevServer};
use secrecy::SecretString;
use std::fmt;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;
use url::Url;

/// What everybody uses on his own machine; it is printed, so it is no secret.
const PASSWORD: &str = "secret";
/// As a CouchDB that is tuned as `check` recommends.
pub(super) const GLOBAL_CHANGES_DELAY: Duration = Duration::from_millis(20);

#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct Options {
    /// Where to serve: IP address and port; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:5984")]
    pub listen: SocketAddr,
    /// The one admin
    #[arg(long, value_name = "NAME", default_value = "admin")]
    pub user: String,
    /// The admin's password, which is then never printed [default: secret]
    #[arg(long, value_name = "PASSWORD")]
    pub password: Option<Password>,
}

/// From the command line; its `Debug` keeps quiet.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(String);

impl FromStr for Password {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_string()))
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

pub(super) async fn dev(options: Options) -> Result<Exit, Failure> {
    check(&options)?;
    let mut signals = signals()?;
    let password = options.password.as_ref().map_or(PASSWORD, |password| &password.0);
    let server = start(options.listen, &options.user, SecretString::from(password)).await?;
    for line in welcome(&server.url(), &options) {
        say(&line);
    }
    signals.next().await;
    say("stopped; its databases are gone");
    server.stop().await;
    Ok(Exit::Done)
}

/// With a password that everybody knows, the server must not be reachable from elsewhere.
fn check(options: &Options) -> Result<(), Failure> {
    match options.listen.ip().is_loopback() || options.password.is_some() {
        true => Ok(()),
        false => Err(Failure::new(
            Exit::Usage,
            format!("--listen {}: others can reach that address, so choose a --password too", options.listen),
        )),
    }
}

pub(super) async fn start(listen: SocketAddr, user: &str, password: SecretString) -> Result<DevServer, Failure> {
    let options = DevOptions { listen, user: user.to_string(), password, global_changes_delay: GLOBAL_CHANGES_DELAY };
    let error = match DevServer::start(options).await {
        Ok(server) => return Ok(server),
        Err(error) => error,
    };
    Err(match error.downcast_ref::<std::io::Error>().map(std::io::Error::kind) {
        Some(ErrorKind::AddrInUse) => Failure::new(
            Exit::Unreachable,
            format!(
                "port {} is taken (does a CouchDB run there?); choose another one: spiegel dev --listen {}",
                listen.port(),
                SocketAddr::new(listen.ip(), listen.port().checked_add(1).unwrap_or_default())
            ),
        ),
        Some(_) => Failure::new(Exit::Unreachable, format!("start the embedded server: {error:#}")),
        None => Failure::new(Exit::Internal, format!("start the embedded server: {error:#}")),
    })
}

/// A chosen password is not repeated: a terminal's history and a CI's log are read by others.
fn welcome(url: &Url, options: &Options) -> Vec<String> {
    let (login, login_url) = match &options.password {
        None => (format!("{}:{PASSWORD}", options.user), with_login(url, &options.user, PASSWORD)),
        // curl asks for it.
        Some(_) => (options.user.clone(), with_login(url, &options.user, "PASSWORD")),
    };
    let login = shell_word(&login);
    let base = url.as_str().trim_end_matches('/');
    vec![
        format!("A CouchDB-compatible server is ready on {base}"),
        String::from("It is for trying things and for tests: all is in memory and gone when it ends (Ctrl-C)."),
        String::from("It is no CouchDB: it answers what Spiegel and curl need, and 501 to views and the rest."),
        String::new(),
        String::from("Try it:"),
        format!("  curl -u {login} -X PUT {base}/mydb"),
        format!("  curl -u {login} -X POST {base}/mydb -H 'content-type: application/json' -d '{{\"hello\":\"world\"}}'"),
        format!("  curl -u {login} '{base}/mydb/_changes?include_docs=true'"),
        String::new(),
        String::from("Let Spiegel watch it, in another terminal:"),
        format!("  spiegel run --install --url {login_url}"),
        String::new(),
    ]
}

/// As one types it in a shell: a user's name may hold anything.
fn shell_word(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.:@".contains(c);
    match text.chars().all(is_plain) && !text.is_empty() {
        true => text.to_string(),
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

fn with_login(url: &Url, user: &str, password: &str) -> String {
    let mut url = url.clone();
    // They fail only for a URL that cannot have a user; a server's has a host.
    let _ = url.set_username(user);
    let _ = url.set_password(Some(password));
    url.as_str().trim_end_matches('/').to_string()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn options(listen: &str, password: Option<&str>) -> Options {
        Options {
            listen: listen.parse().expect("an address"),
            user: String::from("anna"),
            password: password.map(|password| Password(password.to_string())),
        }
    }

    #[test]
    fn only_the_default_password_is_printed() {
        let url = Url::parse("http://127.0.0.1:5984/").expect("a URL");
        let chosen = options("127.0.0.1:5984", Some("0pen sesame"));
        let text = welcome(&url, &chosen).join("\n");
        assert!(!text.contains("sesame") && !format!("{chosen:?}").contains("sesame"), "{text}");
        assert!(text.contains("curl -u anna -X PUT http://127.0.0.1:5984/mydb"), "{text}");

        let text = welcome(&url, &options("127.0.0.1:5984", None)).join("\n");
        assert!(text.contains("curl -u anna:secret -X PUT http://127.0.0.1:5984/mydb"), "{text}");
        assert!(text.contains("spiegel run --install --url http://anna:secret@127.0.0.1:5984\n"), "{text}");
    }

    #[test]
    fn a_name_is_typed_as_one_word() {
        for (name, expected) in [("anna", "anna"), ("a:b", "a:b"), ("an na", "'an na'"), ("o'neil", r"'o'\''neil'"), ("", "''")] {
            assert_eq!(shell_word(name), expected);
        }
    }

    #[test]
    fn the_default_password_is_for_this_machine_only() {
        let cases = [
            ("127.0.0.1:5984", None, true),
            ("[::1]:5984", None, true),
            ("0.0.0.0:5984", None, false),
            ("192.168.1.2:5984", None, false),
            ("0.0.0.0:5984", Some("chosen"), true),
        ];
        for (listen, password, expected) in cases {
            assert_eq!(check(&options(listen, password)).is_ok(), expected, "{listen} {password:?}");
        }
    }

    #[tokio::test]
    async fn a_taken_port_is_said() {
        let first = start(([127, 0, 0, 1], 0).into(), "a", SecretString::from("b")).await.expect("a free port");
        let Err(failure) = start(first.address(), "a", SecretString::from("b")).await else { panic!("two on one port") };
        assert_eq!(failure.exit, Exit::Unreachable);
        assert!(failure.message.contains(&format!("port {} is taken", first.address().port())), "{}", failure.message);
        first.stop().await;
    }
}
