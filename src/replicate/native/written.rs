//! What went to a target since its last checkpoint, so that the next one is written only where it still is there.
//!
//! A copy of a database is what the database was at one moment: what it lacks is what was written last. So the last of a long
//! list tell as much as all of them, as long as they are more than what was on its way at one time; of a database of many
//! shards, whose copies are of several moments, each has its share among them.

use super::peer::ChangesRow;
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Of one replication: three full pages, as many as are on their way at once.
const REVS_MAX: usize = 3_000;
/// Of all together, about 100 bytes each: beyond, checkpoints are written sooner.
const ALL_REVS_MAX: usize = 100_000;

/// How many all replications together remember.
#[derive(Debug, Clone, Default)]
pub struct Remembered(Arc<AtomicUsize>);

impl Remembered {
    pub fn is_crowded(&self) -> bool {
        self.0.load(Ordering::Relaxed) > ALL_REVS_MAX
    }
}

#[derive(Debug)]
pub struct Written {
    /// A document and its leaves, in the order in which they went.
    rows: VecDeque<(String, Vec<String>)>,
    revs: usize,
    all: Remembered,
}

impl Written {
    pub fn new(all: &Remembered) -> Self {
        Self { rows: VecDeque::new(), revs: 0, all: all.clone() }
    }

    pub fn add<'a>(&mut self, rows: impl Iterator<Item = &'a ChangesRow>) {
        let before = self.revs;
        for row in rows {
            self.revs += row.revs.len();
            self.rows.push_back((row.id.clone(), row.revs.clone()));
        }
        // One row may be more than there is room for: it stays.
        while self.revs > REVS_MAX
            && self.rows.len() > 1
            && let Some((_, revs)) = self.rows.pop_front()
        {
            self.revs -= revs.len();
        }
        self.all.0.fetch_add(self.revs, Ordering::Relaxed);
        self.all.0.fetch_sub(before, Ordering::Relaxed);
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Of each document what came last: a target may keep no older revisions, and then it does not know those before.
    pub fn rows(&self) -> Vec<(String, Vec<String>)> {
        let mut seen = HashSet::new();
        self.rows.iter().rev().filter(|(id, _)| seen.insert(id)).cloned().collect()
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        self.all.0.fetch_sub(self.revs, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn row(id: usize, revs: usize) -> ChangesRow {
        ChangesRow { id: id.to_string(), revs: (0..revs).map(|rev| format!("1-{rev}")).collect() }
    }

    proptest! {
        #[test]
        fn the_last_are_kept_and_counted(pages in prop::collection::vec((1_usize..1_500, 1_usize..4), 1..12)) {
            let all = Remembered::default();
            let mut written = Written::new(&all);
            let mut rows = Vec::new();
            for (count, revs) in pages {
                let page: Vec<ChangesRow> = (0..count).map(|n| row(rows.len() + n, revs)).collect();
                written.add(page.iter());
                rows.extend(page);
                let kept = written.rows();
                let revs: usize = kept.iter().map(|(_, revs)| revs.len()).sum();
                prop_assert!(revs <= REVS_MAX && written.revs == revs && all.0.load(Ordering::Relaxed) == revs);
                let last = rows.iter().rev().take(kept.len()).map(|row| (row.id.clone(), row.revs.clone()));
                prop_assert_eq!(kept.clone(), last.collect::<Vec<_>>());
                prop_assert!(kept.len() == rows.len() || revs + 3 > REVS_MAX, "no fewer than there is room for");
            }
            drop(written);
            prop_assert_eq!(all.0.load(Ordering::Relaxed), 0);
        }
    }

    #[test]
    fn a_document_stands_for_itself_once_as_it_was_last() {
        let mut written = Written::new(&Remembered::default());
        written.add([row(1, 1), row(2, 1), row(1, 2)].iter());
        let expected = [row(1, 2), row(2, 1)].map(|row| (row.id, row.revs));
        assert_eq!(written.rows(), expected);
    }

    #[test]
    fn a_row_of_very_many_leaves_stays_until_the_next() {
        let all = Remembered::default();
        let mut written = Written::new(&all);
        written.add([row(1, 10), row(2, REVS_MAX + 1)].iter());
        assert_eq!(written.rows().len(), 1);
        written.add([row(3, 1)].iter());
        assert_eq!(written.rows(), [(String::from("3"), vec![String::from("1-0")])]);
        assert!(!all.is_crowded());
        let many: Vec<Written> = std::iter::repeat_with(|| {
            let mut written = Written::new(&all);
            written.add([row(1, REVS_MAX)].iter());
            written
        })
        .take(ALL_REVS_MAX / REVS_MAX + 1)
        .collect();
        assert!(all.is_crowded());
        drop(many);
        assert!(!all.is_crowded());
    }
}
