//! The engine that speaks the replication protocol itself, from the source to the target.

pub mod parameters;
