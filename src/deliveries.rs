//! Deliveries that failed.

pub mod index;
pub mod parked;
pub mod patience;
