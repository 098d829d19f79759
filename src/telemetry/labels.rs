//! Labels whose values come from outside, kept within a bound.
//!
//! A rule's URL may hold a variable in its host, and so name as many hosts as there are documents. The first pairs keep
//! their names, and of the others the first rules keep theirs; the rest is `other`. Nothing is forgotten: a series that
//! ended and began anew would look like a restart.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

pub const OTHER: &str = "other";
/// A label's value is no place for a long text.
const LABEL_CHARS_MAX: usize = 128;

type Make<T> = Box<dyn Fn(&str, &str) -> T + Send + Sync>;

/// One `T` for each pair of names that is kept apart.
pub struct BoundedLabels<T> {
    pairs_max: usize,
    /// Of those whose pair came too late.
    firsts_max: usize,
    known: RwLock<Known<T>>,
    make: Make<T>,
}

struct Known<T> {
    pairs: usize,
    by_names: HashMap<Box<str>, HashMap<Box<str>, Arc<T>>>,
    /// With `OTHER` for the second name.
    firsts: HashMap<Box<str>, Arc<T>>,
    other: Option<Arc<T>>,
}

impl<T> BoundedLabels<T> {
    /// At most `pairs_max + firsts_max + 1` are ever made.
    pub fn new(pairs_max: usize, firsts_max: usize, make: impl Fn(&str, &str) -> T + Send + Sync + 'static) -> Self {
        let known = Known { pairs: 0, by_names: HashMap::new(), firsts: HashMap::new(), other: None };
        Self { pairs_max, firsts_max, known: RwLock::new(known), make: Box::new(make) }
    }

    pub fn of(&self, first: &str, second: &str) -> Arc<T> {
        let found = self.find(&self.known.read().unwrap_or_else(PoisonError::into_inner), first, second);
        found.unwrap_or_else(|| self.add(&mut self.known.write().unwrap_or_else(PoisonError::into_inner), first, second))
    }

    fn find(&self, known: &Known<T>, first: &str, second: &str) -> Option<Arc<T>> {
        if let Some(pair) = known.by_names.get(first).and_then(|seconds| seconds.get(second)) {
            return Some(pair.clone());
        }
        if known.pairs < self.pairs_max {
            return None;
        }
        let full = known.firsts.len() >= self.firsts_max;
        known.firsts.get(first).or(known.other.as_ref().filter(|_| full)).cloned()
    }

    fn add(&self, known: &mut Known<T>, first: &str, second: &str) -> Arc<T> {
        // Somebody may have added it between the two locks.
        if let Some(found) = self.find(known, first, second) {
            return found;
        }
        if known.pairs < self.pairs_max {
            known.pairs += 1;
            let made = Arc::new((self.make)(&cut(first), &cut(second)));
            known.by_names.entry(first.into()).or_default().insert(second.into(), made.clone());
            return made;
        }
        if known.firsts.len() < self.firsts_max {
            let made = Arc::new((self.make)(&cut(first), OTHER));
            known.firsts.insert(first.into(), made.clone());
            return made;
        }
        known.other.get_or_insert_with(|| Arc::new((self.make)(OTHER, OTHER))).clone()
    }
}

fn cut(name: &str) -> String {
    name.chars().take(LABEL_CHARS_MAX).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn names(pairs_max: usize, firsts_max: usize) -> BoundedLabels<(String, String)> {
        BoundedLabels::new(pairs_max, firsts_max, |first, second| (first.to_string(), second.to_string()))
    }

    #[test]
    fn the_first_ones_keep_their_names() {
        let labels = names(2, 1);
        for (first, second, expected) in [
            ("a", "x", ("a", "x")),
            ("a", "y", ("a", "y")),
            ("b", "z", ("b", OTHER)),
            ("a", "x", ("a", "x")),
            ("c", "x", (OTHER, OTHER)),
            ("b", "x", ("b", OTHER)),
            ("a", "z", (OTHER, OTHER)),
        ] {
            let found = labels.of(first, second);
            assert_eq!((found.0.as_str(), found.1.as_str()), expected, "{first} {second}");
        }
        assert_eq!(names(1, 0).of(&"é".repeat(500), "x").0.chars().count(), LABEL_CHARS_MAX);
    }

    #[test]
    fn a_million_names_stay_bounded() {
        let made = Arc::new(AtomicUsize::new(0));
        let counted = made.clone();
        let labels = BoundedLabels::new(200, 100, move |_, _| counted.fetch_add(1, Ordering::Relaxed));
        let mut seen = BTreeSet::new();
        for n in 0..1_000_000 {
            seen.insert(*labels.of(&format!("rule{}", n % 1000), &format!("host{n}")));
        }
        assert_eq!(made.load(Ordering::Relaxed), 301);
        assert_eq!(seen.len(), 301);
        let known = labels.known.read().expect("no panic under the lock");
        assert_eq!((known.pairs, known.firsts.len()), (200, 100));
    }
}
