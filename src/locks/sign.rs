//! Signs of other processes at work in the same spiegel database (pure, but for the lock around the revisions).

use crate::locks::Kind;
use crate::locks::look::{By, lock_of};
use crate::locks::mend::conflicts_of;
use serde_json::Value;
use std::collections::{HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Mutex;

/// What a row of the spiegel database's changes says of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    None,
    /// Locked, and not by us; whether we only wrote it so, its revision tells.
    Lock,
    /// Dirty; whether we wrote that, its revision tells.
    Dirtied,
    /// It has conflicted revisions: others wrote it, or this process did on both sides of a cluster that was cut in two. Who works
    /// by locks removes them.
    Conflict,
}

pub fn sign(doc: &Value, me: &str) -> Sign {
    if Kind::of(doc).is_none() {
        return Sign::None;
    }
    match lock_of(doc, me) {
        _ if conflicts_of(doc).next().is_some() => Sign::Conflict,
        Some(lock) if lock.by != By::Us => Sign::Lock,
        _ if doc["dirty"] == Value::Bool(true) => Sign::Dirtied,
        _ => Sign::None,
    }
}

/// The revisions that this process wrote lately.
#[derive(Debug, Default)]
pub struct OwnRevs(Mutex<Ring>);

#[derive(Debug, Default)]
struct Ring {
    order: VecDeque<u64>,
    hashes: HashSet<u64>,
}

/// A row comes within seconds of its write; of so many, older ones are not asked for any more.
const OWN_REVS_MAX: usize = 50_000;

impl OwnRevs {
    pub fn wrote(&self, id: &str, rev: &str) {
        let hash = hash_of(id, rev);
        if let Ok(mut ring) = self.0.lock()
            && ring.hashes.insert(hash)
        {
            ring.order.push_back(hash);
            if ring.order.len() > OWN_REVS_MAX
                && let Some(oldest) = ring.order.pop_front()
            {
                ring.hashes.remove(&oldest);
            }
        }
    }

    pub fn knows(&self, id: &str, rev: &str) -> bool {
        self.0.lock().is_ok_and(|ring| ring.hashes.contains(&hash_of(id, rev)))
    }
}

fn hash_of(id: &str, rev: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (id, rev).hash(&mut hasher);
    hasher.finish()
}
