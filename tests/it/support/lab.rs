//! Everything that one test has: a server, names of its own on it, a receiver, and what cleans up afterwards.

use super::couch::{Couch, encode};
use super::process::{Output, Spiegel, one_shot};
use super::receiver::Receiver;
use super::server::{Kind, Server};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

pub struct Lab {
    pub kind: Kind,
    pub couch: Couch,
    pub receiver: Receiver,
    /// What the embedded server can be told to do wrong.
    pub faults: Option<spiegel::dev::Faults>,
    /// Every database of this test begins with it.
    pub prefix: String,
    /// Host ▶ user ▶ password.
    passwords: std::sync::Mutex<BTreeMap<String, BTreeMap<String, String>>>,
    directory: tempfile::TempDir,
    kept: std::sync::Mutex<Vec<Spiegel>>,
}

/// Runs a test against a server of this kind, and cleans up whether it passes or not.
pub fn run<F>(kind: Kind, name: &'static str, test: impl FnOnce(Arc<Lab>) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    run_on(kind, name, ("admin", "secret"), test);
}

/// With an admin of the test's choice, where the server is the test's own.
pub fn run_on<F>(kind: Kind, name: &'static str, (user, password): (&str, &str), test: impl FnOnce(Arc<Lab>) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let Some(server) = Server::start_with(kind, user, password).await else { return };
        let lab = Arc::new(Lab::on(&server, name).await);
        let result = tokio::time::timeout(Duration::from_secs(300), tokio::spawn(test(lab.clone()))).await;
        lab.kept.lock().expect("not poisoned").clear();
        if !matches!(result, Ok(Ok(()))) {
            lab.print_spiegel_db().await;
        }
        if kind == Kind::CouchDb {
            lab.clean_up().await;
        }
        match result {
            Ok(Ok(())) => {}
            Ok(Err(error)) => std::panic::resume_unwind(error.into_panic()),
            Err(_) => panic!("{name} ran for five minutes"),
        }
    });
}

impl Lab {
    pub async fn on(server: &Server, name: &str) -> Self {
        let initials: String = name.split('_').filter_map(|word| word.chars().next()).take(8).collect();
        let unique: String = std::iter::repeat_with(|| fastrand::char('a'..='z')).take(6).collect();
        let lab = Self {
            kind: server.kind,
            couch: server.couch.clone(),
            receiver: Receiver::start().await,
            faults: server.faults(),
            prefix: format!("it_{initials}_{unique}_"),
            passwords: std::sync::Mutex::default(),
            directory: tempfile::tempdir().expect("a directory"),
            kept: std::sync::Mutex::default(),
        };
        lab.add_password(&lab.couch.host(), &lab.couch.user, &lab.couch.password);
        lab
    }

    pub fn name(&self, db: &str) -> String {
        format!("{}{db}", self.prefix)
    }

    /// A database of this test; gives its whole name.
    pub async fn create(&self, db: &str) -> String {
        let name = self.name(db);
        self.couch.create(&name).await;
        name
    }

    pub fn spiegel_db(&self) -> String {
        self.name("spiegel")
    }

    pub fn add_password(&self, host: &str, user: &str, password: &str) {
        let mut passwords = self.passwords.lock().expect("not poisoned");
        passwords.entry(host.into()).or_default().insert(user.into(), password.into());
        let text = serde_json::to_string(&*passwords).expect("JSON");
        std::fs::write(self.directory.path().join("passwords.json"), text).expect("a written file");
    }

    /// Short times, so that everything happens within a test's patience. The sweep is off in effect: what a test sees came by
    /// the feed, unless it asks for the sweep.
    pub fn settings(&self) -> BTreeMap<String, String> {
        let passwords_file = self.directory.path().join("passwords.json").display().to_string();
        let pairs = [
            ("COUCHDB_URL", self.couch.url()),
            ("COUCHDB_CONNECT_TIMEOUT", "2s".into()),
            ("COUCHDB_READ_TIMEOUT", "4s".into()),
            ("DB_NAME", self.spiegel_db()),
            ("NAMESPACE", self.prefix.clone()),
            ("PASSWORDS_FILE", passwords_file),
            ("FEED_HEARTBEAT", "1s".into()),
            ("FEED_SAVE_SEQ_AFTER", "300ms".into()),
            ("FEED_SPILL_AFTER", "3s".into()),
            ("FEED_SWEEP_INTERVAL", "1h".into()),
            ("DB_BATCH_SIZE", "50".into()),
            ("DB_PASSIVATE_AFTER", "1s".into()),
            ("DEBOUNCE_QUIET", "50ms".into()),
            ("DEBOUNCE_LONGEST", "500ms".into()),
            ("WEBHOOK_CONNECT_TIMEOUT", "1s".into()),
            ("WEBHOOK_TIMEOUT", "3s".into()),
            ("WEBHOOK_RETRY_BASE", "50ms".into()),
            ("WEBHOOK_RETRY_CAP", "200ms".into()),
            ("BACKOFF_BASE", "200ms".into()),
            ("BACKOFF_CAP", "1s".into()),
            ("WEBHOOK_BREAKER_BASE", "100ms".into()),
            ("WEBHOOK_BREAKER_CAP", "1s".into()),
            ("LOG_LEVEL", "info".into()),
            ("LOG_FORMAT", "json".into()),
        ];
        pairs.into_iter().map(|(key, value)| (format!("SPIEGEL_{key}"), value)).collect()
    }

    pub fn settings_with(&self, changes: &[(&str, &str)]) -> BTreeMap<String, String> {
        let mut settings = self.settings();
        settings.extend(changes.iter().map(|(key, value)| (format!("SPIEGEL_{key}"), value.to_string())));
        settings
    }

    pub async fn spiegel(&self) -> Spiegel {
        Spiegel::start(self.settings()).await
    }

    pub async fn spiegel_with(&self, changes: &[(&str, &str)]) -> Spiegel {
        Spiegel::start(self.settings_with(changes)).await
    }

    /// Lets a process run until the test ends.
    pub fn keep(&self, spiegel: Spiegel) {
        self.kept.lock().expect("not poisoned").push(spiegel);
    }

    /// `spiegel install`, so that documents can be written before the first start.
    pub async fn install(&self) {
        let output = self.run(&["install"]).await;
        assert_eq!(output.code, 0, "install: {}", output.text);
    }

    pub async fn run(&self, arguments: &[&str]) -> Output {
        one_shot(&self.settings(), arguments).await
    }

    /// Writes a document into the spiegel database.
    pub async fn spiegel_doc(&self, id: &str, doc: Value) -> String {
        self.couch.put(&self.spiegel_db(), id, doc).await
    }

    /// A rule on exactly one database that sends the change by PUT to `path` of the receiver; `more` adds and overrides.
    pub async fn rule(&self, id: &str, db: &str, path: &str, more: Value) -> String {
        self.rule_on(id, &format!("^{}$", regex::escape(db)), path, more).await
    }

    pub async fn rule_on(&self, id: &str, pattern: &str, path: &str, more: Value) -> String {
        let mut rule = json!({
            "type": "on_change",
            "db_name": pattern,
            "url": self.receiver.url(path),
            "method": "PUT",
            "params": { "change": "$change", "db": "$db_name" },
        });
        let fields = rule.as_object_mut().expect("an object");
        fields.extend(more.as_object().cloned().unwrap_or_default());
        self.spiegel_doc(id, rule).await
    }

    /// The rule's pattern for every database of this test.
    pub fn every_db(&self) -> String {
        format!("^{}.*", regex::escape(&self.prefix))
    }

    /// A replicator between two databases of this server; the password comes from the vault.
    pub async fn replicator(&self, id: &str, source: &str, target: &str, more: Value) -> String {
        let mut doc = json!({
            "type": "replicator",
            "source": self.couch.url_for_user(source),
            "target": self.couch.url_for_user(target),
        });
        doc.as_object_mut().expect("an object").extend(more.as_object().cloned().unwrap_or_default());
        self.spiegel_doc(id, doc).await
    }

    /// What a person wants to see of a test that failed.
    async fn print_spiegel_db(&self) {
        let path = format!("{}/_all_docs?include_docs=true", encode(&self.spiegel_db()));
        let Ok((_, page)) = self.couch.try_ask(reqwest::Method::GET, &path, None).await else { return };
        let docs = page["rows"].as_array().into_iter().flatten().map(|row| &row["doc"]);
        let own = docs.filter(|doc| !doc["_id"].as_str().unwrap_or_default().starts_with("_design/"));
        println!("-- the spiegel database --");
        own.take(50).for_each(|doc| println!("{doc}"));
    }

    pub async fn clean_up(&self) {
        for db in self.couch.all_dbs().await {
            if db.starts_with(&self.prefix) {
                self.couch.delete(&db).await;
            }
        }
        // The sieve of this installation, whatever its exact name is.
        let page = "_global_changes/_all_docs?startkey=%22_design%2F%22&endkey=%22_design0%22";
        let (_, designs) = self.couch.ask(reqwest::Method::GET, page, None).await;
        for row in designs["rows"].as_array().into_iter().flatten() {
            if let Some(id) = row["id"].as_str().filter(|id| id.contains(&self.prefix)) {
                self.couch.remove("_global_changes", id).await;
            }
        }
    }
}
