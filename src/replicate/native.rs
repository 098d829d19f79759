//! The replication protocol spoken by Spiegel itself, source to target.
pub mod attachments;
pub mod budget;
pub mod elements;
