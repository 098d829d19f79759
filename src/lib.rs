//! Spiegel watches a CouchDB and acts on what changes: it replicates the databases that changed and calls an HTTP API for
//! the documents that changed, without holding a connection open for each database.
//!
//! A change travels left to right, through one folder a stage:
//!
//! ```text
//! _global_changes ▶ feed ▶ sieve ▶ db (debounce, batch) ┬▶ rules ────┐
//!                                                       └▶ topology ─┴▶ schedule ┬▶ replicate ▶ CouchDB
//!                                                                                └▶ webhook ──▶ HTTP
//! ```
//!
//! `ARCHITECTURE.md` has the map and the invariants.

pub mod app;
pub mod cmd;
pub mod config;

pub mod feed;

pub mod workers;

pub mod db;

pub mod deliveries;
pub mod rules;
pub mod topology;

pub mod schedule;

pub mod replicate;
pub mod webhook;

pub mod admin;
pub mod checkpoints;
pub mod couch;
#[cfg(feature = "dev")]
pub mod dev;
pub mod job;
pub mod locks;
pub mod telemetry;
pub mod vault;
