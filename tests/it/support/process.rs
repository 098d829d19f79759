//! The process under test: started, watched, stopped, killed.

use super::server::environment;
use super::wait::{SOON, eventually};
use serde_json::Value;
use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Enough for the longest test at debug; the oldest lines go first.
const LINES_MAX: usize = 200_000;

/// The binary, in an environment in which nothing of the caller's configures it.
pub fn command(settings: &BTreeMap<String, String>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spiegel"));
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("SPIEGEL_") || ORIGINAL_VARIABLES.contains(&text.as_ref()) {
            command.env_remove(&name);
        }
    }
    command.envs(settings).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Those of Node Spiegel's container.
const ORIGINAL_VARIABLES: [&str; 18] = [
    "ASSUME_DELETED_AFTER",
    "BACKOFF_DELAY",
    "BACKOFF_LIMIT",
    "BACKOFF_MULTIPLIER",
    "BACKOFF_STRATEGY",
    "BATCH_SIZE",
    "BATCH_TIMEOUT",
    "CHECK_STALLED",
    "CONCURRENCY",
    "DB_NAME",
    "LOG_LEVEL",
    "NAMESPACE",
    "PASSWORDS_FILE",
    "RETRY_AFTER",
    "SAVE_SEQ_AFTER",
    "TYPE",
    "URL",
    "VERSION",
];

/// What a one-shot command said.
#[derive(Debug)]
pub struct Output {
    pub code: i32,
    /// Standard output and standard error.
    pub text: String,
}

/// Runs a one-shot command to its end.
pub async fn one_shot(settings: &BTreeMap<String, String>, arguments: &[&str]) -> Output {
    let mut command = command(settings);
    command.args(arguments);
    let done = tokio::task::spawn_blocking(move || command.output());
    let output = tokio::time::timeout(Duration::from_secs(60), done).await.expect("an end within a minute");
    let output = output.expect("no panic").expect("the binary starts");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Output { code: output.status.code().unwrap_or(-1), text }
}

#[derive(Clone, Default)]
struct Lines {
    kept: Arc<Mutex<VecDeque<String>>>,
    /// Where the newest process said that its admin pages are; the kernel chose the port, so nobody else can have it.
    admin: Arc<Mutex<Option<String>>>,
}

impl Lines {
    fn read(&self, pipe: impl Read + Send + 'static) {
        let lines = self.clone();
        let echo = environment("SPIEGEL_TEST_ECHO").is_some();
        std::thread::spawn(move || {
            let mut reader = BufReader::new(pipe);
            let mut bytes = Vec::new();
            while matches!(reader.read_until(b'\n', &mut bytes), Ok(length) if length > 0) {
                let line = String::from_utf8_lossy(&bytes).trim_end().to_string();
                bytes.clear();
                if echo {
                    eprintln!("| {line}");
                }
                if let Some(address) = admin_address(&line) {
                    *lines.admin.lock().expect("not poisoned") = Some(address);
                }
                let mut lines = lines.kept.lock().expect("not poisoned");
                if lines.len() == LINES_MAX {
                    lines.pop_front();
                }
                lines.push_back(line);
            }
        });
    }
}

fn admin_address(line: &str) -> Option<String> {
    let (_, rest) = line.split_once("admin listens")?;
    let (_, address) = rest.split_once("127.0.0.1:")?;
    let port: String = address.chars().take_while(char::is_ascii_digit).collect();
    Some(format!("127.0.0.1:{port}"))
}

pub struct Spiegel {
    pub settings: BTreeMap<String, String>,
    arguments: Vec<String>,
    child: Child,
    /// Of every process that this harness started.
    lines: Lines,
    http: reqwest::Client,
}

impl Spiegel {
    /// Starts it and waits until it is ready.
    pub async fn start(settings: BTreeMap<String, String>) -> Self {
        let mut spiegel = Self::start_unready(settings);
        spiegel.wait_ready().await;
        spiegel
    }

    pub fn start_unready(settings: BTreeMap<String, String>) -> Self {
        Self::start_unready_as(settings, &["run", "--install"])
    }

    pub fn start_unready_as(settings: BTreeMap<String, String>, arguments: &[&str]) -> Self {
        let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
        let lines = Lines::default();
        let child = spawn(&settings, &arguments, &lines);
        Self { settings, arguments, child, lines, http: reqwest::Client::new() }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    pub async fn wait_ready(&mut self) {
        let deadline = Instant::now() + SOON;
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                panic!("spiegel ended with {status} before it was ready:\n{}", self.tail());
            }
            if self.page("/ready").await.is_some_and(|(status, _)| status == 200) {
                return;
            }
            assert!(Instant::now() < deadline, "spiegel was not ready within {SOON:?}:\n{}", self.tail());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Where the admin server listens, once it does.
    pub fn admin_address(&self) -> Option<String> {
        self.lines.admin.lock().expect("not poisoned").clone()
    }

    /// A page of the admin server; None where it does not answer.
    pub async fn page(&self, path: &str) -> Option<(u16, String)> {
        let address = self.admin_address()?;
        let url = format!("http://{address}{path}");
        let answer = self.http.get(url).timeout(Duration::from_secs(6)).send().await.ok()?;
        let status = answer.status().as_u16();
        Some((status, answer.text().await.ok()?))
    }

    /// The sum over all labels of a metric, by its name without `spiegel_`.
    pub async fn metric(&self, name: &str) -> f64 {
        let (_, page) = self.page("/metrics").await.expect("the metrics page");
        let wanted = [format!("spiegel_{name}"), format!("spiegel_{name}_total")];
        let values = page.lines().filter_map(|line| {
            let (key, value) = line.rsplit_once(' ')?;
            let key = key.split('{').next()?;
            wanted.iter().any(|name| name == key).then(|| value.parse::<f64>().ok())?
        });
        values.sum()
    }

    /// By the kill of the shell: no unsafe code, and nothing that a bare machine may lack.
    pub fn signal(&self, name: &str) {
        let status = Command::new("sh").args(["-c", &format!("kill -{name} {}", self.pid())]).status().expect("a shell runs");
        assert!(status.success(), "kill -{name} {}", self.pid());
    }

    /// Its end and how long that took.
    pub async fn wait_end(&mut self, deadline: Duration) -> (ExitStatus, Duration) {
        let start = Instant::now();
        let child = &mut self.child;
        let end = start + deadline;
        let status = loop {
            if let Some(status) = child.try_wait().expect("its state") {
                break status;
            }
            assert!(Instant::now() < end, "spiegel did not end within {deadline:?}:\n{}", self.tail());
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        (status, start.elapsed())
    }

    /// Stops it in good order, which must work.
    pub async fn stop(&mut self) {
        self.signal("TERM");
        let (status, _) = self.wait_end(Duration::from_secs(10)).await;
        assert_eq!(status.code(), Some(0), "after SIGTERM:\n{}", self.tail());
    }

    pub fn kill(&mut self) {
        self.child.kill().expect("a kill");
        self.child.wait().expect("its end");
    }

    /// Again with the same settings, after it ended.
    pub async fn start_again(&mut self) {
        self.start_again_unready();
        self.wait_ready().await;
    }

    pub fn start_again_unready(&mut self) {
        assert!(!self.is_alive(), "it still runs");
        *self.lines.admin.lock().expect("not poisoned") = None;
        self.child = spawn(&self.settings, &self.arguments, &self.lines);
    }

    pub async fn restart(&mut self) {
        self.stop().await;
        self.start_again().await;
    }

    /// Everything that was said so far.
    pub fn lines(&self) -> Vec<String> {
        self.lines.kept.lock().expect("not poisoned").iter().cloned().collect()
    }

    /// Log lines at info, warn and error.
    pub fn log(&self) -> Vec<Value> {
        let parsed = self.lines().into_iter().filter_map(|line| serde_json::from_str::<Value>(&line).ok());
        parsed
            .filter(|line| {
                line["level"].as_str().is_some_and(|level| ["INFO", "WARN", "ERROR"].contains(&level.to_uppercase().as_str()))
            })
            .collect()
    }

    /// Waits for a line that contains all of the texts.
    #[track_caller]
    pub fn said(&self, texts: &[&str]) -> impl Future<Output = String> {
        let texts: Vec<String> = texts.iter().map(ToString::to_string).collect();
        eventually(SOON, format!("a line with {texts:?}"), move || {
            let found = self.lines().into_iter().find(|line| texts.iter().all(|text| line.contains(text)));
            async move { found }
        })
    }

    fn tail(&self) -> String {
        let lines = self.lines();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}

impl Drop for Spiegel {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("-- the last lines of spiegel --\n{}\n--", self.tail());
        }
    }
}

fn spawn(settings: &BTreeMap<String, String>, arguments: &[String], lines: &Lines) -> Child {
    let mut command = command(settings);
    command.args(arguments).env("SPIEGEL_ADMIN_LISTEN", "127.0.0.1:0");
    let mut child = command.spawn().expect("the binary starts");
    lines.read(child.stdout.take().expect("a pipe"));
    lines.read(child.stderr.take().expect("a pipe"));
    child
}
