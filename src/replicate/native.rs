//! The engine that speaks the replication protocol itself, from the source to the target.

pub mod checkpoint;
pub mod parameters;
