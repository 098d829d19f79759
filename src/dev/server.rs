//! What all requests share: the databases, the switches for faults, the counters.

use super::DevOptions;
use super::answer::Failure;
use super::database::{Database, REVS_LIMIT};
use super::faults::Faults;
use super::global_changes::{Event, GlobalChanges};
use super::incoming::new_id;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use tokio_util::sync::CancellationToken;

pub const GLOBAL_CHANGES: &str = "_global_changes";
const SYSTEM_NAMES: [&str; 3] = ["_users", "_replicator", GLOBAL_CHANGES];
/// The rows of `_global_changes` are written over and over and nobody asks for their history.
const GLOBAL_CHANGES_REVS_LIMIT: u64 = 5;
/// CouchDB's own bound on a database's name.
const NAME_BYTES_MAX: usize = 238;

pub struct Server {
    pub uuid: String,
    pub address: SocketAddr,
    user: String,
    password: SecretString,
    /// What the cookie of `POST /_session` holds.
    session: SecretString,
    databases: RwLock<BTreeMap<String, Arc<Database>>>,
    /// Older copies of databases, by name.
    copies: Mutex<BTreeMap<String, Arc<Database>>>,
    pub global_changes: GlobalChanges,
    pub faults: Faults,
    pub closing: CancellationToken,
    pub http: reqwest::Client,
    requests: Mutex<BTreeMap<String, u64>>,
    config: Mutex<BTreeMap<(String, String), String>>,
}

impl Server {
    pub fn new(options: DevOptions, address: SocketAddr) -> anyhow::Result<Arc<Self>> {
        let http = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).build()?;
        let delay_ms = options.global_changes_delay.as_millis().to_string();
        let section = |section: &str, key: &str| (section.to_string(), key.to_string());
        // What differs from CouchDB's defaults is told, as where an operator tuned it.
        let config =
            [(section("global_changes", "max_write_delay"), delay_ms), (section("replicator", "startup_jitter"), "0".into())];
        let new_database = |name: &str| (name.to_string(), Arc::new(Database::new(name, revs_limit(name))));
        Ok(Arc::new(Self {
            uuid: new_id(),
            address,
            user: options.user,
            password: options.password,
            session: new_id().into(),
            databases: RwLock::new(SYSTEM_NAMES.map(new_database).into()),
            copies: Mutex::default(),
            global_changes: GlobalChanges::default(),
            faults: Faults::default(),
            closing: CancellationToken::new(),
            http,
            requests: Mutex::default(),
            config: Mutex::new(config.into()),
        }))
    }

    pub fn database(&self, name: &str) -> Result<Arc<Database>, Failure> {
        self.read_databases().get(name).cloned().ok_or_else(Failure::no_database)
    }

    pub fn create(&self, name: &str) -> Result<(), Failure> {
        check_name(name)?;
        let mut databases = self.databases.write().unwrap_or_else(PoisonError::into_inner);
        if databases.contains_key(name) {
            let reason = "The database could not be created, the file already exists.";
            return Err(Failure::new(412, "file_exists", reason));
        }
        databases.insert(name.into(), Arc::new(Database::new(name, revs_limit(name))));
        drop(databases);
        self.record(Event::Created, name);
        Ok(())
    }

    pub fn delete(&self, name: &str) -> Result<(), Failure> {
        let removed = self.databases.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        removed.ok_or_else(Failure::no_database)?.mark_deleted();
        self.record(Event::Deleted, name);
        Ok(())
    }

    /// Keeps a copy of a database as it is now, instead of an earlier one.
    pub fn snapshot(&self, name: &str) -> Result<(), Failure> {
        let copy = Arc::new(self.database(name)?.copy());
        self.copies.lock().unwrap_or_else(PoisonError::into_inner).insert(name.into(), copy);
        Ok(())
    }

    /// Puts the copy in the database's place, as an operator does with files: no change is told of. The copy may be put back again.
    pub fn restore(&self, name: &str) -> Result<(), Failure> {
        let copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        let copy = copies.get(name).ok_or_else(|| Failure::new(404, "not_found", "no snapshot of this database"))?.copy();
        drop(copies);
        self.replace(name, copy);
        Ok(())
    }

    /// Deletes a database and makes it again within one second: its `instance_start_time` stays.
    pub fn remake(&self, name: &str) -> Result<(), Failure> {
        let remade = self.database(name)?.remade();
        self.replace(name, remade);
        self.record(Event::Deleted, name);
        self.record(Event::Created, name);
        Ok(())
    }

    fn replace(&self, name: &str, by: Database) {
        let mut databases = self.databases.write().unwrap_or_else(PoisonError::into_inner);
        let old = databases.insert(name.into(), Arc::new(by));
        drop(databases);
        if let Some(old) = old {
            old.mark_deleted();
        }
    }

    /// Notes what happened for `_global_changes`, which does not record itself, nor anything while it does not exist.
    pub fn record(&self, event: Event, name: &str) {
        if name != GLOBAL_CHANGES && self.read_databases().contains_key(GLOBAL_CHANGES) {
            self.global_changes.record(event, name);
        }
    }

    pub fn names(&self) -> Vec<String> {
        self.read_databases().keys().cloned().collect()
    }

    fn read_databases(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, Arc<Database>>> {
        self.databases.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_admin(&self, user: &str, password: &str) -> bool {
        same(user, &self.user) & same(password, self.password.expose_secret())
    }

    pub fn user(&self) -> &str {
        &self.user
    }

    pub fn session(&self) -> &str {
        self.session.expose_secret()
    }

    pub fn is_session(&self, session: &str) -> bool {
        same(session, self.session())
    }

    pub fn count(&self, method: &str, endpoint: &str) {
        // A method may be any word.
        let method = if ["GET", "HEAD", "POST", "PUT", "DELETE"].contains(&method) { method } else { "OTHER" };
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        *requests.entry(format!("{method} {endpoint}")).or_default() += 1;
    }

    pub fn counts(&self) -> BTreeMap<String, u64> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn reset_counts(&self) {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    pub fn config(&self, section: &str, key: Option<&str>) -> Result<Value, Failure> {
        let config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(key) = key else {
            let of_section =
                config.iter().filter(|((s, _), _)| s == section).map(|((_, key), value)| (key.clone(), json!(value)));
            return Ok(Value::Object(of_section.collect()));
        };
        let value = config.get(&(section.to_string(), key.to_string()));
        value.map(|value| json!(value)).ok_or_else(|| Failure::new(404, "not_found", "unknown_config_value"))
    }
}

/// Compared to the end, so that the time tells nothing of where they differ.
fn same(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}

fn revs_limit(name: &str) -> u64 {
    if name == GLOBAL_CHANGES { GLOBAL_CHANGES_REVS_LIMIT } else { REVS_LIMIT }
}

fn check_name(name: &str) -> Result<(), Failure> {
    let tail = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_$()+-/".contains(c);
    let legal = name.starts_with(|c: char| c.is_ascii_lowercase()) && name.chars().all(tail);
    if name.len() > NAME_BYTES_MAX {
        return Err(Failure::new(400, "database_name_too_long", format!("Database name '{name}' is too long.")));
    }
    match legal || SYSTEM_NAMES.contains(&name) {
        true => Ok(()),
        false => Err(Failure::new(
            400,
            "illegal_database_name",
            format!(
                "Name: '{name}'. Only lowercase characters (a-z), digits (0-9), and any of the characters _, $, (, ), +, -, and / \
                 are allowed. Must begin with a letter."
            ),
        )),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn what_a_database_may_be_called() {
        for name in ["a", "a/b+c", "user_$(x)-9", "_users", "_replicator", "_global_changes"] {
            assert_eq!(check_name(name), Ok(()), "{name}");
        }
        for name in ["", "A", "_foo", "9a", "a.b", "ä", "a b"] {
            assert_eq!(check_name(name).expect_err(name).error, "illegal_database_name");
        }
    }
}
