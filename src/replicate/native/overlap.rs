//! What a source is asked for once more, to see that it still has it.
//!
//! A source's checkpoint is written seldom, and between two of them a copy tells of the same session as the source that it
//! replaces. So a run begins where the last one had begun, and finds what that one brought: where it does not, the source was
//! put back, and what was written there since may have taken the places of what was read. That costs no request. Pure.

use super::peer::{ChangesRow, Page};
use super::written::{Remembered, Written};
use crate::couch::{Seq, generation};
use std::collections::HashMap;

/// More are not asked for again: then both checkpoints are written soon.
const ROWS_MAX: usize = 10;
/// The same for the documents that come along with them.
const BYTES_MAX: usize = 64 * 1024;

#[derive(Debug)]
pub struct Overlap {
    pub since: Seq,
    rows: Written,
}

/// What the source answered to "what comes after where the last run began?".
#[derive(Debug)]
pub enum Found {
    /// It has what was read. The page is what comes after that.
    Same(Page),
    /// What was read may have been written over, or be behind the page: the source has to be asked for it.
    Unsure(Vec<(String, Vec<String>)>),
    /// It does not have what was read.
    Gone,
}

impl Overlap {
    /// Of the first page of a run; none where it is too long.
    pub fn of(page: &Page, since: &Seq, all: &Remembered) -> Option<Self> {
        let bytes: usize = page.docs.values().map(bytes::Bytes::len).sum();
        let revs: usize = page.rows.iter().map(|row| row.revs.len()).sum();
        if page.rows.len() > ROWS_MAX || revs > ROWS_MAX * 2 || bytes > BYTES_MAX || all.is_crowded() {
            return None;
        }
        let mut rows = Written::new(all);
        rows.add(page.rows.iter());
        Some(Self { since: since.clone(), rows })
    }

    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// What is where it was tells that a copy, if this is one, is no older than the place where the last run began: then nothing
    /// is missed by reading from there. `are_all_leaves` says what a row has; of winners alone one may follow that is lower.
    pub fn find(&self, page: &Page, are_all_leaves: bool) -> Found {
        let read = self.rows.rows();
        let has_more = page.pending.is_none_or(|pending| pending > 0);
        let mut is_any_there = read.is_empty();
        for (id, revs) in &read {
            match page.rows.iter().find(|row| row.id == *id) {
                Some(row) if revs.iter().all(|rev| row.revs.contains(rev)) => is_any_there = true,
                Some(row) if highest(&row.revs) > highest(revs) || !are_all_leaves => {}
                None if has_more => {}
                Some(_) | None => return Found::Gone,
            }
        }
        if !is_any_there {
            return Found::Unsure(read);
        }
        let known: HashMap<&str, &[String]> = read.iter().map(|(id, revs)| (id.as_str(), revs.as_slice())).collect();
        let is_known = |row: &&ChangesRow| known.get(row.id.as_str()).is_some_and(|revs| *revs == row.revs);
        let rows: Vec<ChangesRow> = page.rows.iter().filter(|row| !is_known(row)).cloned().collect();
        let is_new = |id: &String| rows.iter().any(|row| row.id == *id);
        let docs = page.docs.iter().filter(|(id, _)| is_new(id)).map(|(id, doc)| (id.clone(), doc.clone())).collect();
        Found::Same(Page { rows, docs, last_seq: page.last_seq.clone(), pending: page.pending })
    }
}

fn highest(revs: &[String]) -> u64 {
    revs.iter().map(|rev| generation(rev)).max().unwrap_or(0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    type Rows<'a> = &'a [(&'a str, &'a [&'a str])];

    fn page(rows: Rows<'_>, pending: Option<u64>) -> Page {
        let rows = rows
            .iter()
            .map(|(id, revs)| ChangesRow { id: id.to_string(), revs: revs.iter().map(|rev| rev.to_string()).collect() });
        Page { rows: rows.collect(), docs: HashMap::new(), last_seq: Seq::from("9-x"), pending }
    }

    fn overlap(rows: Rows<'_>) -> Overlap {
        Overlap::of(&page(rows, None), &Seq::from("5-x"), &Remembered::default()).expect("short enough")
    }

    #[test]
    fn what_was_read_is_found_or_asked_for_or_gone() {
        let read: Rows<'_> = &[("a", &["2-a"]), ("b", &["1-b"])];
        let cases: [(Rows<'_>, Option<u64>, &str); 14] = [
            (&[("a", &["2-a"]), ("b", &["1-b"])], Some(0), "same:"),
            (&[("b", &["1-b"]), ("c", &["1-c"])], Some(0), "gone"),
            (&[("b", &["1-b"]), ("c", &["1-c"])], Some(2), "same:c"),
            (&[("b", &["1-b"]), ("a", &["2-y"])], Some(0), "gone"),
            (&[("b", &["1-b", "1-x"]), ("a", &["3-a"])], Some(0), "same:ba"),
            (&[("a", &["2-a"]), ("b", &["2-x"])], Some(0), "same:b"),
            (&[("c", &["1-c"]), ("a", &["2-a", "2-z"]), ("b", &["1-b"])], Some(0), "same:ca"),
            (&[("a", &["3-a"]), ("b", &["2-b"])], Some(0), "unsure"),
            (&[("c", &["1-c"])], Some(1), "unsure"),
            (&[("c", &["1-c"])], None, "unsure"),
            (&[("a", &["4-a"])], Some(3), "unsure"),
            (&[("a", &["3-a"])], Some(0), "gone"),
            (&[("a", &["2-y"]), ("b", &["2-b"])], Some(7), "gone"),
            (&[], Some(0), "gone"),
        ];
        for (rows, pending, expected) in cases {
            let found = match overlap(read).find(&page(rows, pending), true) {
                Found::Same(rest) => format!("same:{}", rest.rows.iter().map(|row| row.id.as_str()).collect::<String>()),
                Found::Unsure(read) => {
                    assert_eq!(read.len(), 2);
                    String::from("unsure")
                }
                Found::Gone => String::from("gone"),
            };
            assert_eq!(found, expected, "{rows:?} {pending:?}");
        }
        let fell_back = page(&[("a", &["1-y"]), ("b", &["2-b"])], Some(0));
        assert!(matches!(overlap(read).find(&fell_back, false), Found::Unsure(_)), "of winners alone");
    }

    #[test]
    fn what_is_long_is_not_asked_for_again() {
        let rows: Vec<(String, Vec<String>)> = (0..=ROWS_MAX).map(|n| (n.to_string(), vec![String::from("1-a")])).collect();
        let page_of = |rows: &[(String, Vec<String>)]| Page {
            rows: rows.iter().map(|(id, revs)| ChangesRow { id: id.clone(), revs: revs.clone() }).collect(),
            docs: HashMap::new(),
            last_seq: Seq::zero(),
            pending: None,
        };
        let all = Remembered::default();
        assert!(Overlap::of(&page_of(&rows), &Seq::zero(), &all).is_none());
        assert_eq!(Overlap::of(&page_of(&rows[1..]), &Seq::zero(), &all).expect("short enough").rows(), ROWS_MAX);
        let mut large = page_of(&rows[1..]);
        large.docs.insert(String::from("1"), vec![b'x'; BYTES_MAX + 1].into());
        assert!(Overlap::of(&large, &Seq::zero(), &all).is_none());
        let leaves = [(String::from("a"), (0..100).map(|n| format!("2-{n}")).collect())];
        assert!(Overlap::of(&page_of(&leaves), &Seq::zero(), &all).is_none());
    }

    /// Each write is of one document; a source's log tells of each document once, where it was written last.
    #[derive(Debug, Clone, Default)]
    struct Source {
        seq: u64,
        docs: BTreeMap<u8, (u64, Vec<String>)>,
    }

    impl Source {
        fn write(&mut self, doc: u8, unique: &str) {
            self.seq += 1;
            let revs = self.docs.entry(doc).or_default();
            revs.0 = self.seq;
            revs.1.push(format!("{}-{unique}{}", revs.1.len() + 1, self.seq));
        }

        fn page(&self, since: u64, limit: usize) -> Page {
            let mut rows: Vec<_> = self.docs.iter().filter(|(_, (seq, _))| *seq > since).collect();
            rows.sort_by_key(|(_, (seq, _))| *seq);
            let pending = rows.len().saturating_sub(limit) as u64;
            rows.truncate(limit);
            let last_seq = rows.last().filter(|_| pending > 0).map_or(self.seq, |(_, (seq, _))| *seq);
            let rows = rows
                .into_iter()
                .map(|(id, (_, revs))| ChangesRow { id: id.to_string(), revs: revs.last().cloned().into_iter().collect() });
            Page { rows: rows.collect(), docs: HashMap::new(), last_seq: Seq::Number(last_seq), pending: Some(pending) }
        }

        fn knows(&self, read: &[(String, Vec<String>)]) -> bool {
            let known = |id: &String, rev: &String| {
                id.parse().is_ok_and(|id: u8| self.docs.get(&id).is_some_and(|(_, revs)| revs.contains(rev)))
            };
            read.iter().all(|(id, revs)| revs.iter().all(|rev| known(id, rev)))
        }
    }

    proptest! {
        /// A source that is put back and written again, by anybody but who wrote it before, is never taken for what it was,
        /// unless nothing is missed.
        #[test]
        fn nothing_is_missed_of_a_source_that_was_put_back(
            before in prop::collection::vec(0u8..8, 1..30),
            last in prop::collection::vec(0u8..8, 1..6),
            copied in 0usize..40,
            after in prop::collection::vec(0u8..8, 1..60),
        ) {
            let mut source = Source::default();
            let mut copies = vec![source.clone()];
            let write = |source: &mut Source, copies: &mut Vec<Source>, doc: u8| {
                source.write(doc, "a");
                copies.push(source.clone());
            };
            before.iter().for_each(|doc| write(&mut source, &mut copies, *doc));
            let since = source.seq;
            last.iter().for_each(|doc| write(&mut source, &mut copies, *doc));
            let position = source.seq;
            let overlap = Overlap::of(&source.page(since, 99), &Seq::Number(since), &Remembered::default()).unwrap();
            let mut source = copies.swap_remove(copied.min(copies.len() - 1));
            let copied = source.seq;
            after.iter().for_each(|doc| source.write(*doc, "b"));
            let page = source.page(since, 4 + overlap.rows());
            let goes_on = match overlap.find(&page, true) {
                _ if source.seq < position => false,
                Found::Same(_) => true,
                Found::Unsure(read) => source.knows(&read),
                Found::Gone => false,
            };
            // What is read from `since` on misses what was written before it since the copy.
            prop_assert!(!goes_on || copied >= since, "copied at {copied}, read from {since}");
            prop_assert!(goes_on || copied < position, "a source that was not put back is not suspected");
        }
    }
}
