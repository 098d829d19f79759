//! The real process against real servers, one file a stage of what can go wrong.
//!
//! Each test runs against the embedded server, against PouchDB (where npm is), and against the CouchDB that
//! SPIEGEL_TEST_COUCHDB_URL names (http://user:password@host:port), where it is set. SPIEGEL_TEST_NPM=1 makes a missing npm an
//! error, SPIEGEL_TEST_SEED repeats a random test, SPIEGEL_TEST_ECHO shows what the processes say, SPIEGEL_TEST_ENGINE=couchdb replicates by
//! `_replicate` where the tests would take the native engine. SPIEGEL_TEST_ORIGINAL names a checkout of Node Spiegel that runs: its
//! processes work beside ours then.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::disallowed_methods)]

mod beside_the_original;
mod blog;
mod cli;
mod deliveries;
mod deliveries_cli;
mod faults;
mod feedback;
mod first_sweep;
mod import_replicator;
mod kill;
mod lost_rows;
mod main_job;
mod malformed;
mod original;
mod original_bugs;
mod regions;
mod replicate;
mod roles;
mod secrets;
mod shutdown;
mod slow;
mod states;
mod support;
mod update_listener;
