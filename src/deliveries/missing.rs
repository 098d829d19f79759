//! What is not there counts as gone only after it has stayed so: a node that lags knows less than others.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Since when each is missing.
pub struct Missing<K>(Mutex<HashMap<K, Instant>>);

impl<K> Default for Missing<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash> Missing<K> {
    fn since(&self) -> MutexGuard<'_, HashMap<K, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It is missing: whether it has been for so long.
    pub fn is_gone(&self, what: K, after: Duration) -> bool {
        self.since().entry(what).or_insert_with(Instant::now).elapsed() >= after
    }

    pub fn is_there(&self, what: &K) {
        self.since().remove(what);
    }

    pub fn keep(&self, wanted: impl Fn(&K) -> bool) {
        self.since().retain(|what, _| wanted(what));
    }

    /// What nobody has asked for since is not looked for any more.
    pub fn forget_after(&self, old: Duration) {
        self.since().retain(|_, since| since.elapsed() < old);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn only_what_stays_missing_is_gone() {
        let missing = Missing::default();
        assert!(!missing.is_gone("a", Duration::from_secs(60)));
        let first = missing.since()["a"];
        assert!(missing.is_gone("a", Duration::ZERO));
        assert_eq!(missing.since()["a"], first, "since it was first missed");
        missing.is_there(&"a");
        assert!(missing.since().is_empty());
        missing.is_gone("b", Duration::ZERO);
        missing.is_gone("c", Duration::ZERO);
        missing.keep(|what| *what != "b");
        assert_eq!(missing.since().len(), 1);
        missing.forget_after(Duration::ZERO);
        assert!(missing.since().is_empty());
    }
}
