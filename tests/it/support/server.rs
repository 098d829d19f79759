//! The CouchDB that a test runs against: embedded, PouchDB's, or a real one.

use super::couch::Couch;
use spiegel::dev::{DevOptions, DevServer};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

/// CouchDB's is 500 ms; the tests need not wait that long.
const GLOBAL_CHANGES_DELAY: Duration = Duration::from_millis(50);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `spiegel dev`, in this process.
    Embedded,
    /// PouchDB behind express, with integer seqs: needs npm.
    PouchDb,
    /// The one that SPIEGEL_TEST_COUCHDB_URL names; tests share it.
    CouchDb,
}

/// What ends with the server.
enum Held {
    Embedded(DevServer),
    PouchDb(Child),
    Nothing,
}

pub struct Server {
    pub kind: Kind,
    pub couch: Couch,
    held: Held,
}

impl Server {
    /// None where there is no such server here; says why.
    pub async fn start(kind: Kind) -> Option<Self> {
        Self::start_with(kind, "admin", "secret").await
    }

    /// With an admin of one's own; a real server has its own admin anyway.
    pub async fn start_with(kind: Kind, user: &str, password: &str) -> Option<Self> {
        match kind {
            Kind::Embedded => {
                let options = DevOptions {
                    listen: ([127, 0, 0, 1], 0).into(),
                    user: user.into(),
                    password: password.to_string().into(),
                    global_changes_delay: GLOBAL_CHANGES_DELAY,
                };
                let server = DevServer::start(options).await.expect("the embedded server starts");
                let couch = Couch::new(server.url().as_str(), user, password);
                Some(Self { kind, couch, held: Held::Embedded(server) })
            }
            Kind::PouchDb => {
                let (child, url) = pouchdb(user, password)?;
                Some(Self { kind, couch: Couch::new(&url, user, password), held: Held::PouchDb(child) })
            }
            Kind::CouchDb => Self::real("SPIEGEL_TEST_COUCHDB_URL"),
        }
    }

    pub fn faults(&self) -> Option<spiegel::dev::Faults> {
        match &self.held {
            Held::Embedded(server) => Some(server.faults()),
            Held::PouchDb(_) | Held::Nothing => None,
        }
    }

    /// The server that a variable names.
    pub fn real(variable: &str) -> Option<Self> {
        match environment(variable) {
            Some(url) => Some(Self { kind: Kind::CouchDb, couch: Couch::of_url(&url), held: Held::Nothing }),
            None => {
                say_once(&format!("{variable} is not set: the tests against a real CouchDB are passed over"));
                None
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Held::PouchDb(child) = &mut self.held {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Set and not empty.
pub fn environment(variable: &str) -> Option<String> {
    std::env::vars_os()
        .find(|(name, _)| name == variable)
        .and_then(|(_, value)| value.into_string().ok())
        .filter(|value| !value.is_empty())
}

/// To the terminal, past the capture of the test harness: whoever reads the result must know what was not tested.
fn say_once(line: &str) {
    static SAID: std::sync::Mutex<Vec<String>> = std::sync::Mutex::new(Vec::new());
    let mut said = SAID.lock().expect("not poisoned");
    if !said.iter().any(|earlier| earlier == line) {
        said.push(line.to_string());
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "note: {line}");
    }
}

// -- PouchDB ---------------------------------------------------------------------------------------------------------------

fn pouchdb(user: &str, password: &str) -> Option<(Child, String)> {
    let directory = pouchdb_directory()?;
    let mut child = Command::new("node")
        .args(["server.js", "0", user, password])
        .current_dir(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .expect("node starts");
    let mut line = String::new();
    let mut output = BufReader::new(child.stdout.take().expect("a pipe"));
    output.read_line(&mut line).expect("its URL");
    assert!(line.starts_with("http://"), "the PouchDB server did not start: {line:?}");
    // Nobody may block on a full pipe.
    std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
    Some((child, line.trim().to_string()))
}

/// Where the server stands with its packages installed; None where npm is missing or cannot install them.
fn pouchdb_directory() -> Option<PathBuf> {
    static DIRECTORY: OnceLock<Option<PathBuf>> = OnceLock::new();
    let installed = || {
        let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/pouchdb");
        if directory.join("node_modules/.package-lock.json").exists() {
            return Ok(directory);
        }
        let output = Command::new("npm")
            .args(["ci", "--ignore-scripts", "--no-audit", "--no-fund"])
            .current_dir(&directory)
            .output()
            .map_err(|error| format!("npm cannot be started ({error})"))?;
        match output.status.success() {
            true => Ok(directory),
            false => Err(format!("npm ci failed: {}", String::from_utf8_lossy(&output.stderr).trim())),
        }
    };
    DIRECTORY
        .get_or_init(|| match installed() {
            Ok(directory) => Some(directory),
            Err(reason) if environment("SPIEGEL_TEST_NPM").is_some() => panic!("SPIEGEL_TEST_NPM is set, but {reason}"),
            Err(reason) => {
                say_once(&format!(
                    "{reason}: the tests against PouchDB are passed over (SPIEGEL_TEST_NPM=1 makes this an error)"
                ));
                None
            }
        })
        .clone()
}
