//! One file a row of DESIGN.md, section 14.

pub mod attachment;
pub mod bulk;
pub mod catchup;
pub mod deliveries;
pub mod fanin;
pub mod fanout;
pub mod hostile;
pub mod idle;
pub mod many;
pub mod matching;
pub mod replicate;
pub mod requests;
pub mod webhook;

use crate::couch::Couch;
use crate::program::Program;
use crate::receiver::Receiver;
use crate::report;
use serde_json::{Value, json};
use std::path::PathBuf;

/// What every row needs.
pub struct Bench {
    pub couch: Couch,
    pub couchdb_version: String,
    /// With user and password, for the program.
    pub url: String,
    pub binary: PathBuf,
    /// Of every database of this run.
    pub prefix: String,
}

impl Bench {
    pub fn spiegel_db(&self, name: &str) -> String {
        format!("{}_{name}_own", self.prefix)
    }

    /// A row's databases, which `pattern` matches.
    pub fn dbs(&self, row: &str, count: usize) -> Vec<String> {
        (0..count).map(|n| format!("{}_{row}_db{n}", self.prefix)).collect()
    }

    /// A rule that posts every change of a row's databases to the receiver.
    pub fn rule(&self, row: &str, receiver: &Receiver, params: Value) -> Value {
        let pattern = format!("^{}_{row}_db", self.prefix);
        json!({ "type": "on_change", "db_name": pattern, "url": receiver.url(), "params": params, "method": "POST" })
    }

    pub fn report(&self, name: &str, unit: &str, program: &Program, figures: Value) {
        report::row(name, unit, &self.couchdb_version, &program.settings, figures);
    }
}
