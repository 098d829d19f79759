//! The cursor owns the debt: which databases owe work, since which row of the feed.
//!
//! A debt is (first ordinal, the seq before it), so that the watermark, the longest prefix of the feed without debt, is
//! known at any time, and its size is the number of owing databases however many rows came. It is a passive structure behind
//! one lock, held for moments: a run claims its debt at the very instant before its first request, which a message could not.
//! It outlives the actors on both sides, so their death costs nothing.

use crate::couch::Seq;
use crate::couch::fingerprint::Fingerprint;
use crate::job::{Claim, DbName, Debts};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    first_ordinal: u64,
    /// None: nothing was read before it, on a server that never had a watermark.
    seq_before: Option<Seq>,
    since: Instant,
    /// What the sweep read of the database before it owed this.
    fingerprint: Option<Fingerprint>,
}

impl Entry {
    fn merged(mut self, other: Option<Entry>) -> Entry {
        match other {
            None => self,
            Some(mut other) => {
                // The newer reading may tell of more than the older run will cover, never the other way round.
                let fingerprint = self.fingerprint.take().or(other.fingerprint.take());
                let first = if self.first_ordinal <= other.first_ordinal { self } else { other };
                Entry { fingerprint, ..first }
            }
        }
    }
}

#[derive(Debug, Default)]
struct Debt {
    owed: Option<Entry>,
    claimed: Vec<(Claim, Entry)>,
}

/// The pure core.
#[derive(Debug, Default)]
pub struct Cursor {
    debts: HashMap<DbName, Debt>,
    last_seen: Option<Seq>,
    ordinals: u64,
    claims: u64,
    /// The digest of the fingerprint that was read before work which has since been confirmed.
    confirmed: HashMap<DbName, u64>,
    /// Something happened since the watermark was last asked for that makes it worth saving.
    news: bool,
}

impl Cursor {
    /// The feed starts after this position.
    pub fn start_at(&mut self, seq: Option<Seq>) {
        self.last_seen = seq;
    }

    pub fn last_seen(&self) -> Option<&Seq> {
        self.last_seen.as_ref()
    }

    /// A row was read; `watched` where it names a database with work. True when that database owed nothing before.
    pub fn row(&mut self, seq: Seq, watched: Option<&DbName>, now: Instant) -> bool {
        let fresh = watched.is_some_and(|db| self.owe(db, None, now));
        self.last_seen = Some(seq);
        self.news = true;
        fresh
    }

    /// A row that our own writes caused: it moves the position, but must not cause the next write.
    pub fn own_row(&mut self, seq: Seq) {
        self.last_seen = Some(seq);
    }

    /// Work that no row told of: a sweep's find, a rule's first pass.
    pub fn owe(&mut self, db: &DbName, fingerprint: Option<Fingerprint>, now: Instant) -> bool {
        self.ordinals += 1;
        let debt = self.debts.entry(db.clone()).or_default();
        match &mut debt.owed {
            Some(owed) => {
                owed.fingerprint = fingerprint.or(owed.fingerprint.take());
                false
            }
            None => {
                let seq_before = self.last_seen.clone();
                debt.owed = Some(Entry { first_ordinal: self.ordinals, seq_before, since: now, fingerprint });
                true
            }
        }
    }

    pub fn claim(&mut self, db: &DbName) -> Claim {
        self.claims += 1;
        let claim = Claim(self.claims);
        if let Some(debt) = self.debts.get_mut(db)
            && let Some(entry) = debt.owed.take()
        {
            debt.claimed.push((claim, entry));
        }
        claim
    }

    pub fn fingerprint(&self, db: &DbName, claim: Claim) -> Option<Fingerprint> {
        let (_, entry) = self.debts.get(db)?.claimed.iter().find(|(other, _)| *other == claim)?;
        entry.fingerprint.clone()
    }

    pub fn settle(&mut self, db: &DbName, claim: Claim) {
        if let Some(entry) = self.take(db, claim)
            && let Some(fingerprint) = entry.fingerprint
        {
            self.confirm(db, &fingerprint);
        }
    }

    pub fn release(&mut self, db: &DbName, claim: Claim) {
        if let Some(entry) = self.take(db, claim) {
            let debt = self.debts.entry(db.clone()).or_default();
            let merged = entry.merged(debt.owed.take());
            debt.owed = Some(merged);
        }
    }

    fn take(&mut self, db: &DbName, claim: Claim) -> Option<Entry> {
        let debt = self.debts.get_mut(db)?;
        let at = debt.claimed.iter().position(|(other, _)| *other == claim)?;
        let (_, entry) = debt.claimed.swap_remove(at);
        self.news = true;
        if debt.owed.is_none() && debt.claimed.is_empty() {
            self.debts.remove(db);
        }
        Some(entry)
    }

    /// Whoever had claimed work of this database is gone.
    pub fn release_all_of(&mut self, db: &DbName) {
        if let Some(debt) = self.debts.get_mut(db) {
            for (_, entry) in std::mem::take(&mut debt.claimed) {
                let merged = entry.merged(debt.owed.take());
                debt.owed = Some(merged);
            }
        }
    }

    pub fn owing(&self) -> Vec<DbName> {
        self.debts.keys().cloned().collect()
    }

    pub fn owes(&self, db: &str) -> bool {
        self.debts.contains_key(db)
    }

    pub fn len(&self) -> usize {
        self.debts.len()
    }

    pub fn is_empty(&self) -> bool {
        self.debts.is_empty()
    }

    /// The databases whose debt is older than `age`.
    pub fn overdue(&self, now: Instant, age: Duration) -> Vec<DbName> {
        let old = |debt: &Debt| {
            let entries = debt.owed.iter().chain(debt.claimed.iter().map(|(_, entry)| entry));
            entries.map(|entry| entry.since).min().is_some_and(|since| now.saturating_duration_since(since) >= age)
        };
        self.debts.iter().filter(|(_, debt)| old(debt)).map(|(db, _)| db.clone()).collect()
    }

    /// The longest prefix of the feed without debt.
    pub fn watermark(&self) -> Option<&Seq> {
        let entries = self.debts.values().flat_map(|debt| debt.owed.iter().chain(debt.claimed.iter().map(|(_, entry)| entry)));
        match entries.min_by_key(|entry| entry.first_ordinal) {
            Some(first) => first.seq_before.as_ref(),
            None => self.last_seen.as_ref(),
        }
    }

    /// The watermark, where it is worth saving since this was last asked.
    pub fn watermark_to_save(&mut self) -> Option<Seq> {
        if !std::mem::take(&mut self.news) {
            return None;
        }
        self.watermark().cloned()
    }

    /// What was taken to be saved was not.
    pub fn save_again(&mut self, is_unsaved: bool) {
        self.news |= is_unsaved;
    }

    /// All work up to the state that looks so is done.
    pub fn confirm(&mut self, db: &DbName, fingerprint: &Fingerprint) {
        self.confirmed.insert(db.clone(), fingerprint.digest());
    }

    /// Whether the database looks as it did before work that has since been confirmed; None where that is not known.
    pub fn is_confirmed(&self, db: &str, fingerprint: &Fingerprint) -> Option<bool> {
        self.confirmed.get(db).map(|digest| *digest == fingerprint.digest())
    }

    /// Actors were rebuilt: what they had asked for or confirmed is not certain.
    pub fn forget_fingerprints(&mut self) {
        self.confirmed.clear();
    }

    /// A full sweep saw these; the others are gone.
    pub fn retain_fingerprints(&mut self, is_there: impl Fn(&str) -> bool) {
        self.confirmed.retain(|db, _| is_there(db));
    }

    /// The database is gone, or its fingerprint is not to be trusted any more.
    pub fn forget_fingerprint(&mut self, db: &str) {
        self.confirmed.remove(db);
    }
}

/// The cursor as the actors share it.
#[derive(Default)]
pub struct Ledger {
    cursor: Mutex<Cursor>,
    settled: Notify,
}

impl Ledger {
    /// The lock is held for moments and never across an await; a poisoned one still holds a consistent cursor, because no
    /// method above leaves it half done.
    pub fn cursor(&self) -> MutexGuard<'_, Cursor> {
        self.cursor.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Returns once fewer than `databases_max` databases owe work.
    pub async fn room(&self, databases_max: usize) {
        loop {
            let settled = self.settled.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            if self.cursor().len() < databases_max {
                return;
            }
            settled.await;
        }
    }
}

impl Debts for Ledger {
    fn claim(&self, db: &DbName) -> Claim {
        self.cursor().claim(db)
    }

    fn fingerprint(&self, db: &DbName, claim: Claim) -> Option<Fingerprint> {
        self.cursor().fingerprint(db, claim)
    }

    fn settle(&self, db: &DbName, claim: Claim) {
        self.cursor().settle(db, claim);
        self.settled.notify_waiters();
    }

    fn release(&self, db: &DbName, claim: Claim) {
        self.cursor().release(db, claim);
    }

    fn release_all(&self, db: &DbName) {
        self.cursor().release_all_of(db);
    }

    fn owes(&self, db: &str) -> bool {
        self.cursor().owes(db)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::couch::docs::DbInfo;
    use proptest::prelude::*;

    fn seq(n: u64) -> Seq {
        Seq::Number(n)
    }

    fn db(name: &str) -> DbName {
        name.into()
    }

    fn looks(number: u64) -> Fingerprint {
        Fingerprint::of(&DbInfo {
            update_seq: seq(number),
            doc_count: 0,
            doc_del_count: 0,
            instance_start_time: String::from("1"),
        })
    }

    #[test]
    fn the_watermark_stops_before_the_first_debt() {
        let now = Instant::now();
        let mut cursor = Cursor::default();
        cursor.start_at(Some(seq(10)));
        cursor.row(seq(11), None, now);
        cursor.row(seq(12), Some(&db("a")), now);
        cursor.row(seq(13), Some(&db("b")), now);
        cursor.row(seq(14), Some(&db("a")), now);
        assert_eq!(cursor.watermark(), Some(&seq(11)));
        assert_eq!(cursor.len(), 2, "rows of one database are one debt");

        let claim = cursor.claim(&db("a"));
        cursor.settle(&db("a"), claim);
        assert_eq!(cursor.watermark(), Some(&seq(12)));
        let claim = cursor.claim(&db("b"));
        cursor.settle(&db("b"), claim);
        assert_eq!(cursor.watermark(), Some(&seq(14)));
    }

    #[test]
    fn a_hint_during_a_run_belongs_to_the_next_run() {
        let now = Instant::now();
        let mut cursor = Cursor::default();
        cursor.row(seq(1), Some(&db("a")), now);
        let first = cursor.claim(&db("a"));
        cursor.row(seq(2), Some(&db("a")), now);
        cursor.settle(&db("a"), first);
        assert!(cursor.owes("a"));
        assert_eq!(cursor.watermark(), Some(&seq(1)));
    }

    #[test]
    fn a_released_claim_is_owed_from_its_first_row() {
        let now = Instant::now();
        let mut cursor = Cursor::default();
        cursor.start_at(Some(seq(0)));
        cursor.row(seq(1), Some(&db("a")), now);
        let claim = cursor.claim(&db("a"));
        cursor.row(seq(2), Some(&db("a")), now);
        cursor.release(&db("a"), claim);
        assert_eq!(cursor.watermark(), Some(&seq(0)));
        let all = cursor.claim(&db("a"));
        cursor.settle(&db("a"), all);
        assert_eq!(cursor.watermark(), Some(&seq(2)));
    }

    #[test]
    fn a_claim_settles_only_itself() {
        let now = Instant::now();
        let mut cursor = Cursor::default();
        cursor.row(seq(1), Some(&db("a")), now);
        let run = cursor.claim(&db("a"));
        cursor.row(seq(2), Some(&db("a")), now);
        let spill = cursor.claim(&db("a"));
        cursor.settle(&db("a"), run);
        cursor.settle(&db("a"), run);
        assert!(cursor.owes("a"), "the spill is not confirmed yet");
        cursor.settle(&db("a"), spill);
        assert!(cursor.is_empty());
    }

    #[test]
    fn a_fingerprint_is_confirmed_by_the_work_that_came_after_it() {
        let now = Instant::now();
        let mut cursor = Cursor::default();
        cursor.owe(&db("a"), Some(looks(7)), now);
        assert_eq!(cursor.is_confirmed("a", &looks(7)), None);
        let claim = cursor.claim(&db("a"));
        cursor.owe(&db("a"), Some(looks(8)), now);
        assert_eq!(cursor.fingerprint(&db("a"), claim), Some(looks(7)), "what came later is the next run's");
        cursor.settle(&db("a"), claim);
        assert_eq!(cursor.fingerprint(&db("a"), claim), None);
        assert_eq!(cursor.is_confirmed("a", &looks(7)), Some(true));
        assert_eq!(cursor.is_confirmed("a", &looks(8)), Some(false));
    }

    #[test]
    fn a_run_knows_the_oldest_fingerprint_that_it_must_cover() {
        let now = Instant::now();
        let mut cursor = Cursor::default();
        cursor.row(seq(1), Some(&db("a")), now);
        let by_the_feed = cursor.claim(&db("a"));
        assert_eq!(cursor.fingerprint(&db("a"), by_the_feed), None);
        cursor.settle(&db("a"), by_the_feed);

        cursor.owe(&db("a"), Some(looks(7)), now);
        let failed = cursor.claim(&db("a"));
        cursor.owe(&db("a"), Some(looks(8)), now);
        cursor.row(seq(2), Some(&db("a")), now);
        cursor.release(&db("a"), failed);
        let both = cursor.claim(&db("a"));
        assert_eq!(cursor.fingerprint(&db("a"), both), Some(looks(7)));
    }

    #[test]
    fn old_debt_is_overdue_even_while_claimed() {
        let start = Instant::now();
        let mut cursor = Cursor::default();
        cursor.row(seq(1), Some(&db("a")), start);
        cursor.claim(&db("a"));
        let age = Duration::from_secs(30);
        assert!(cursor.overdue(start + Duration::from_secs(29), age).is_empty());
        assert_eq!(cursor.overdue(start + age, age), [db("a")]);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Row(u8),
        Claim(u8),
        Settle(u8),
        Release(u8),
        Crash(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        (0u8..5, 0u8..4).prop_map(|(kind, db)| match kind {
            0 => Step::Row(db),
            1 => Step::Claim(db),
            2 => Step::Settle(db),
            3 => Step::Release(db),
            _ => Step::Crash(db),
        })
    }

    proptest! {
        /// A checkpoint never passes an ack: every row beyond the watermark's predecessor that was not covered by a settled
        /// claim made after it is still owed.
        #[test]
        fn the_watermark_never_passes_a_row_without_settled_work(steps in prop::collection::vec(step(), 1..200)) {
            let now = Instant::now();
            let mut cursor = Cursor::default();
            cursor.start_at(Some(seq(0)));
            let mut row_number = 0;
            // For each database: rows not yet covered, and for each open claim the rows that it covers.
            let mut open: HashMap<u8, Vec<u64>> = HashMap::new();
            let mut claims: HashMap<u8, Vec<(Claim, Vec<u64>)>> = HashMap::new();
            for step in steps {
                match step {
                    Step::Row(n) => {
                        row_number += 1;
                        cursor.row(seq(row_number), Some(&db(&n.to_string())), now);
                        open.entry(n).or_default().push(row_number);
                    }
                    Step::Claim(n) => {
                        let claim = cursor.claim(&db(&n.to_string()));
                        claims.entry(n).or_default().push((claim, open.remove(&n).unwrap_or_default()));
                    }
                    Step::Settle(n) => {
                        if let Some((claim, _)) = claims.get_mut(&n).and_then(Vec::pop) {
                            cursor.settle(&db(&n.to_string()), claim);
                        }
                    }
                    Step::Release(n) => {
                        if let Some((claim, rows)) = claims.get_mut(&n).and_then(Vec::pop) {
                            cursor.release(&db(&n.to_string()), claim);
                            open.entry(n).or_default().extend(rows);
                        }
                    }
                    Step::Crash(n) => {
                        cursor.release_all_of(&db(&n.to_string()));
                        for (_, rows) in claims.remove(&n).unwrap_or_default() {
                            open.entry(n).or_default().extend(rows);
                        }
                    }
                }
                let uncovered = open.values().flatten().chain(claims.values().flatten().flat_map(|(_, rows)| rows));
                let expected = uncovered.min().map_or(row_number, |first| first - 1);
                prop_assert_eq!(cursor.watermark(), Some(&seq(expected)));
            }
        }
    }
}
