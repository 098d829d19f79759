//! What is known of the deliveries database: which keys are parked, when each is due, which rules are disabled (pure).
//!
//! The database is the truth. This is filled from it before anything is delivered, follows its changes, and takes in each
//! write of ours when it is confirmed. An entry is about 300 bytes, and their number has a bound (`Bounds`).

use super::parked::{Disabled, Key, Parked, State};
use crate::couch::generation;
use crate::job::DbName;
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// How many deliveries may be parked; past that a rule is held in that database instead.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// As many more may be listed that are dead or dropped.
    pub all: usize,
    pub per_rule_and_database: usize,
}

#[derive(Debug, Clone)]
pub struct Entry {
    pub doc_rev: Box<str>,
    pub state: State,
    pub rule: Arc<str>,
    pub db: DbName,
    pub doc_id: Box<str>,
    /// When it is tried next, or when it was given up.
    at: SystemTime,
}

/// How a key stands when a change of it is to be delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It is sent.
    Free,
    /// It joins what is parked.
    Parked,
    /// A later state of the document than this change was accepted by the receiver.
    Superseded,
}

#[derive(Debug, Default)]
pub struct Index {
    is_loaded: bool,
    entries: HashMap<Key, Entry>,
    /// Tries of ours that are under way, whatever becomes of their documents.
    in_flight: HashSet<Key>,
    /// What is parked and not in flight, by the time of its next try.
    due: BTreeSet<(SystemTime, Key)>,
    /// What is dead or dropped, by its end.
    ended: BTreeSet<(SystemTime, Key)>,
    /// How many are parked of each rule in each database.
    pairs: HashMap<Arc<str>, HashMap<DbName, usize>>,
    counts: [usize; 3],
    parked_of_rule: HashMap<Arc<str>, usize>,
    /// Places for those that are being written, of each rule in each database.
    reserved: HashMap<(Arc<str>, DbName), usize>,
    disabled: HashMap<Arc<str>, Disabled>,
    /// When a rule was enabled again.
    enabled: HashMap<Arc<str>, SystemTime>,
    /// Keys whose parked delivery was accepted: when the document was read for it, and its generation; the oldest first.
    accepted: HashMap<Key, (Instant, u64)>,
    accepted_order: VecDeque<(Instant, Key)>,
}

/// Pages wait in memory for seconds, and for minutes behind a slow receiver.
const ACCEPTED_FOR: Duration = Duration::from_secs(3_600);
const ACCEPTED_MAX: usize = 100_000;

impl Index {
    pub fn is_loaded(&self) -> bool {
        self.is_loaded
    }

    pub fn set_loaded(&mut self) {
        self.is_loaded = true;
    }

    /// `received` is when the page with the change, of this revision, had been read.
    pub fn standing(&self, key: &Key, rev: &str, received: Instant) -> Standing {
        let is_later = |(read, sent): &(Instant, u64)| *read >= received && *sent >= generation(rev);
        match self.entries.get(key) {
            Some(entry) if entry.state == State::Parked => Standing::Parked,
            _ if self.accepted.get(key).is_some_and(is_later) => Standing::Superseded,
            _ => Standing::Free,
        }
    }

    pub fn get(&self, key: &Key) -> Option<&Entry> {
        self.entries.get(key)
    }

    /// A place for one more, to be given back by `unreserve` once it is written or was not.
    pub fn reserve(&mut self, key: &Key, rule: &Arc<str>, db: &DbName, bounds: Bounds) -> bool {
        let reserved: usize = self.reserved.values().sum();
        let place = self.reserved.get(&(rule.clone(), db.clone())).copied().unwrap_or(0);
        let of_pair = self.pairs.get(rule).and_then(|dbs| dbs.get(db)).copied().unwrap_or(0);
        let is_parked = self.entries.get(key).is_some_and(|entry| entry.state == State::Parked);
        let parked = self.count(State::Parked);
        // Those beyond one time are about to go; where they come faster than that, nobody adds to them.
        let is_tidy = self.ended.len() < bounds.all.saturating_mul(2);
        let has_room = is_parked || (parked + reserved < bounds.all && of_pair + place < bounds.per_rule_and_database && is_tidy);
        if has_room {
            *self.reserved.entry((rule.clone(), db.clone())).or_default() += 1;
        }
        has_room
    }

    pub fn unreserve(&mut self, rule: &Arc<str>, db: &DbName) {
        let pair = (rule.clone(), db.clone());
        if let Some(places) = self.reserved.get_mut(&pair) {
            *places -= 1;
            if *places == 0 {
                self.reserved.remove(&pair);
            }
        }
    }

    /// Takes in a document of the database, unless a later state of it is known. True where it is the first parked one of its
    /// rule.
    pub fn put(&mut self, parked: &Parked) -> bool {
        let is_late =
            self.entries.get(&parked.key()).is_some_and(|entry| generation(&entry.doc_rev) > generation(&parked.doc_rev));
        !is_late && self.put_as_read(parked)
    }

    /// As `put`, where everything is read anew: the database may be another one, whose revisions begin again.
    pub fn put_as_read(&mut self, parked: &Parked) -> bool {
        let key = parked.key();
        let was = self.remove(&key);
        let rule: Arc<str> = match self.pairs.get_key_value(parked.rule.as_str()) {
            Some((rule, _)) => rule.clone(),
            None => parked.rule.as_str().into(),
        };
        let dbs = self.pairs.entry(rule.clone()).or_default();
        let db: DbName = match dbs.get_key_value(parked.db.as_str()) {
            Some((db, _)) => db.clone(),
            None => parked.db.as_str().into(),
        };
        if parked.state == State::Parked {
            *dbs.entry(db.clone()).or_default() += 1;
        }
        if dbs.is_empty() {
            self.pairs.remove(&rule);
        }
        let at = match parked.state {
            State::Parked => parked.next_attempt_at,
            State::Dead | State::Dropped => parked.ended_at,
        };
        let entry = Entry {
            doc_rev: parked.doc_rev.as_str().into(),
            state: parked.state,
            rule: rule.clone(),
            db,
            doc_id: parked.doc_id.as_str().into(),
            at: at.unwrap_or(SystemTime::UNIX_EPOCH),
        };
        self.counts[entry.state as usize] += 1;
        let mut is_first = false;
        match entry.state {
            State::Parked => {
                let parked = self.parked_of_rule.entry(rule).or_default();
                *parked += 1;
                is_first = *parked == 1 && was.is_none_or(|was| was.state != State::Parked);
                // Our own try goes on, whoever wrote the document; its end looks at the revision.
                if !self.in_flight.contains(&key) {
                    self.due.insert((entry.at, key));
                }
            }
            State::Dead | State::Dropped => drop(self.ended.insert((entry.at, key))),
        }
        self.entries.insert(key, entry);
        is_first
    }

    /// The document is gone. True where it was the last parked one of its rule.
    pub fn forget(&mut self, key: &Key) -> bool {
        let Some(entry) = self.remove(key) else { return false };
        entry.state == State::Parked && !self.parked_of_rule.contains_key(&entry.rule)
    }

    /// As `forget`, unless a try of ours is under way, whose end will see it.
    pub fn forget_idle(&mut self, key: &Key) -> bool {
        !self.in_flight.contains(key) && self.forget(key)
    }

    /// The document was seen deleted in this revision. The rule, where it was the last parked one of it.
    pub fn forget_idle_until(&mut self, key: &Key, deleted_rev: &str) -> Option<Arc<str>> {
        let rule = self.entries.get(key).filter(|_| !self.in_flight.contains(key))?.rule.clone();
        self.forget_until(key, deleted_rev).then_some(rule)
    }

    pub fn keys(&self) -> impl Iterator<Item = Key> {
        self.entries.keys().copied()
    }

    /// Nothing is parked, and nothing was of late: the common case, in which no key needs to be made.
    pub fn is_quiet(&self) -> bool {
        self.entries.is_empty() && self.accepted.is_empty()
    }

    /// As `forget`, where the document was seen deleted in this revision, and nothing later is known of it.
    pub fn forget_until(&mut self, key: &Key, deleted_rev: &str) -> bool {
        match self.entries.get(key) {
            Some(entry) if generation(&entry.doc_rev) <= generation(deleted_rev) => self.forget(key),
            _ => false,
        }
    }

    /// As `forget`, where nobody has written the document since.
    pub fn forget_if(&mut self, key: &Key, doc_rev: &str) -> bool {
        match self.entries.get(key) {
            Some(entry) if entry.doc_rev.as_ref() == doc_rev => self.forget(key),
            _ => false,
        }
    }

    fn remove(&mut self, key: &Key) -> Option<Entry> {
        let entry = self.entries.remove(key)?;
        self.counts[entry.state as usize] -= 1;
        match entry.state {
            State::Parked => {
                self.due.remove(&(entry.at, *key));
                if let Some(parked) = self.parked_of_rule.get_mut(&entry.rule) {
                    *parked -= 1;
                    if *parked == 0 {
                        self.parked_of_rule.remove(&entry.rule);
                    }
                }
            }
            State::Dead | State::Dropped => drop(self.ended.remove(&(entry.at, *key))),
        }
        if let Some(dbs) = self.pairs.get_mut(&entry.rule).filter(|_| entry.state == State::Parked) {
            if let Some(count) = dbs.get_mut(&entry.db) {
                *count -= 1;
                if *count == 0 {
                    dbs.remove(&entry.db);
                }
            }
            if dbs.is_empty() {
                self.pairs.remove(&entry.rule);
            }
        }
        Some(entry)
    }

    /// Whose next try is due, the longest due first; they count as in flight until `landed`. `postpone` may say when else.
    pub fn take_due(
        &mut self,
        now: SystemTime,
        max: usize,
        mut postpone: impl FnMut(&Entry) -> Option<SystemTime>,
    ) -> Vec<(Key, Entry)> {
        let mut taken = Vec::new();
        while taken.len() < max {
            let Some((at, key)) = self.due.first().copied().filter(|(at, _)| *at <= now) else { break };
            self.due.remove(&(at, key));
            let known = self.entries.get_mut(&key);
            let Some(entry) = known.filter(|entry| entry.state == State::Parked && entry.at == at) else { continue };
            match postpone(entry) {
                Some(later) => {
                    // Never to a time that is due already: this loop would not end.
                    entry.at = later.max(now + Duration::from_millis(100));
                    self.due.insert((entry.at, key));
                }
                None => {
                    self.in_flight.insert(key);
                    taken.push((key, entry.clone()));
                }
            }
        }
        taken
    }

    /// A try is over, and what came of it is in the database, or `again` says when to look at it once more.
    pub fn landed(&mut self, key: &Key, again: Option<SystemTime>) {
        self.in_flight.remove(key);
        let Some(entry) = self.entries.get_mut(key) else { return };
        if entry.state != State::Parked {
            return;
        }
        self.due.remove(&(entry.at, *key));
        entry.at = again.unwrap_or(entry.at);
        self.due.insert((entry.at, *key));
    }

    /// Whoever made tries is gone, and with them what they had in flight.
    pub fn land_all(&mut self) {
        for key in std::mem::take(&mut self.in_flight) {
            if let Some(entry) = self.entries.get(&key).filter(|entry| entry.state == State::Parked) {
                self.due.insert((entry.at, key));
            }
        }
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    pub fn next_due(&self) -> Option<SystemTime> {
        self.due.first().map(|(at, _)| *at)
    }

    /// The rules were edited: what waits for them is due now.
    pub fn hurry(&mut self, rules: &HashSet<&str>, now: SystemTime) {
        if !rules.iter().any(|rule| self.parked_of_rule.contains_key(*rule)) {
            return;
        }
        let waiting: Vec<(SystemTime, Key)> = self.due.iter().filter(|(at, _)| *at > now).copied().collect();
        for (at, key) in waiting {
            let Some(entry) = self.entries.get_mut(&key).filter(|entry| rules.contains(entry.rule.as_ref())) else { continue };
            self.due.remove(&(at, key));
            entry.at = now;
            self.due.insert((now, key));
        }
    }

    /// How many are listed that ended, beyond `listed`.
    pub fn ended_beyond(&self, listed: usize) -> usize {
        self.ended.len().saturating_sub(listed)
    }

    /// What ended before `before`, and of the others the oldest beyond `listed`; at most `max`.
    pub fn ended_before(&self, before: SystemTime, listed: usize, max: usize) -> Vec<(Key, Entry)> {
        let beyond = self.ended_beyond(listed);
        let old = self.ended.iter().enumerate().take_while(|(at, (ended, _))| *ended < before || *at < beyond).take(max);
        let old = old.map(|(_, known)| known);
        let known = old.filter_map(|(_, key)| Some((*key, self.entries.get(key)?)));
        known.filter(|(_, entry)| entry.state != State::Parked).map(|(key, entry)| (key, entry.clone())).collect()
    }

    /// What is parked and not in flight of whom `unwanted` says so, at most `max`.
    pub fn unwanted(&self, max: usize, mut unwanted: impl FnMut(&Entry) -> bool) -> Vec<(Key, Entry)> {
        let parked = self.due.iter().filter_map(|(_, key)| Some((*key, self.entries.get(key)?)));
        parked.filter(|(_, entry)| unwanted(entry)).take(max).map(|(key, entry)| (key, entry.clone())).collect()
    }

    /// A parked delivery was accepted, of a document that was read at `read` and had this revision then.
    pub fn accepted(&mut self, key: Key, rev: &str, read: Instant) {
        self.accepted.insert(key, (read, generation(rev)));
        self.accepted_order.push_back((read, key));
        self.forget_accepted(read);
    }

    /// What was accepted so long ago that no page from before is left.
    pub fn forget_accepted(&mut self, now: Instant) {
        while let Some((at, oldest)) = self.accepted_order.front().copied() {
            if self.accepted_order.len() <= ACCEPTED_MAX && now.saturating_duration_since(at) < ACCEPTED_FOR {
                break;
            }
            self.accepted_order.pop_front();
            if self.accepted.get(&oldest).is_some_and(|(read, _)| *read == at) {
                self.accepted.remove(&oldest);
            }
        }
    }

    pub fn count(&self, state: State) -> usize {
        self.counts[state as usize]
    }

    /// For each rule that has some, how many are parked.
    pub fn parked_of_rules(&self) -> Vec<(Arc<str>, usize)> {
        self.parked_of_rule.iter().map(|(rule, count)| (rule.clone(), *count)).collect()
    }

    pub fn disable(&mut self, disabled: Disabled) {
        self.disabled.insert(disabled.rule.as_str().into(), disabled);
    }

    /// The document that disabled a rule is gone.
    pub fn enable(&mut self, rule: &str, now: SystemTime) -> bool {
        let was = self.disabled.remove(rule).is_some();
        if was {
            self.enabled.insert(rule.into(), now);
        }
        was
    }

    /// Whether nothing is sent for this revision of the rule.
    pub fn is_disabled(&self, rule: &str, rule_rev: &str) -> bool {
        self.disabled.get(rule).is_some_and(|disabled| disabled.rule_rev == rule_rev)
    }

    pub fn disabled(&self) -> impl Iterator<Item = &Disabled> {
        self.disabled.values()
    }

    /// When a rule was enabled again, where that was while we were there.
    pub fn enabled_at(&self, rule: &str) -> Option<SystemTime> {
        self.enabled.get(rule).copied()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const BOUNDS: Bounds = Bounds { all: 5, per_rule_and_database: 3 };

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn parked(rule: &str, db: &str, doc_id: &str, next: u64) -> Parked {
        let key = Key::of(rule, db, doc_id);
        let doc = json!({
            "_id": key.doc_id(), "_rev": format!("1-{next}"), "type": "delivery", "state": "parked", "rule": rule, "db_name": db,
            "doc_id": doc_id, "rev": "1-a", "next_attempt_at": crate::job::timestamp(at(next)),
        });
        Parked::read(&doc).expect("a delivery")
    }

    fn ended(mut parked: Parked, state: State, seconds: u64) -> Parked {
        parked.end(state, "because", at(seconds));
        parked
    }

    fn taken(index: &mut Index, now: u64, max: usize) -> Vec<String> {
        index.take_due(at(now), max, |_| None).into_iter().map(|(_, entry)| entry.doc_id.to_string()).collect()
    }

    #[test]
    fn the_longest_due_go_first_and_none_twice() {
        let mut index = Index::default();
        for (doc_id, next) in [("c", 30), ("a", 10), ("b", 20)] {
            index.put(&parked("r", "db", doc_id, next));
        }
        assert_eq!(taken(&mut index, 5, 9), Vec::<String>::new());
        assert_eq!(taken(&mut index, 20, 1), ["a"]);
        assert_eq!(taken(&mut index, 20, 9), ["b"]);
        assert_eq!(taken(&mut index, 20, 9), Vec::<String>::new(), "they are in flight");
        // Somebody writes the document meanwhile: the try of ours goes on.
        index.put(&parked("r", "db", "a", 11));
        assert_eq!(taken(&mut index, 20, 9), Vec::<String>::new());
        index.landed(&Key::of("r", "db", "a"), None);
        assert_eq!(taken(&mut index, 20, 9), ["a"]);
        index.landed(&Key::of("r", "db", "b"), Some(at(25)));
        assert_eq!(index.next_due(), Some(at(25)));
    }

    #[test]
    fn a_postponed_one_is_due_later_and_ends_no_loop() {
        let mut index = Index::default();
        index.put(&parked("r", "db", "a", 1));
        assert!(index.take_due(at(10), 9, |_| Some(at(0))).is_empty());
        assert!(index.next_due() > Some(at(10)));
    }

    #[test]
    fn bounds_hold_and_what_is_there_is_always_welcome() {
        let mut index = Index::default();
        let (rule, db, other): (Arc<str>, DbName, DbName) = ("r".into(), "db".into(), "x".into());
        let key = |doc_id: &str| Key::of("r", "db", doc_id);
        for doc_id in ["a", "b", "c"] {
            assert!(index.reserve(&key(doc_id), &rule, &db, BOUNDS), "{doc_id}");
        }
        assert!(!index.reserve(&key("d"), &rule, &db, BOUNDS), "of one rule in one database, those under way too");
        for doc_id in ["a", "b", "c"] {
            index.put(&parked("r", "db", doc_id, 1));
            index.unreserve(&rule, &db);
        }
        assert!(!index.reserve(&key("d"), &rule, &db, BOUNDS), "of one rule in one database");
        assert!(index.reserve(&key("a"), &rule, &db, BOUNDS), "a newer change of one that is there");
        index.unreserve(&rule, &db);
        assert!(index.reserve(&Key::of("r", "x", "1"), &rule, &other, BOUNDS));
        assert!(index.reserve(&Key::of("r", "x", "2"), &rule, &other, BOUNDS));
        assert!(!index.reserve(&Key::of("r", "x", "3"), &rule, &other, BOUNDS), "of all, those under way too");
        index.forget(&key("a"));
        assert!(index.reserve(&Key::of("r", "x", "3"), &rule, &other, BOUNDS));
    }

    #[test]
    fn what_ended_takes_no_place_until_it_is_far_too_much() {
        let mut index = Index::default();
        let (rule, db): (Arc<str>, DbName) = ("r".into(), "db".into());
        for n in 0..9 {
            index.put(&ended(parked("r", "db", &n.to_string(), 0), State::Dead, n));
        }
        assert!(index.reserve(&Key::of("r", "db", "x"), &rule, &db, BOUNDS), "nobody is owed any of them");
        index.unreserve(&rule, &db);
        assert!(index.reserve(&Key::of("r", "db", "3"), &rule, &db, BOUNDS), "one of them again");
        index.unreserve(&rule, &db);
        index.put(&ended(parked("r", "db", "9", 0), State::Dropped, 9));
        assert!(!index.reserve(&Key::of("r", "db", "x"), &rule, &db, BOUNDS), "twice the bound");
        assert_eq!(index.ended_beyond(BOUNDS.all), 5);
        let times = |old: Vec<(Key, Entry)>| old.into_iter().map(|(_, entry)| entry.doc_id.to_string()).collect::<Vec<_>>();
        assert_eq!(times(index.ended_before(at(0), BOUNDS.all, 99)), ["0", "1", "2", "3", "4"], "the oldest beyond the bound");
        assert_eq!(times(index.ended_before(at(7), BOUNDS.all, 99)).len(), 7, "and all that are old");
        assert_eq!(times(index.ended_before(at(7), BOUNDS.all, 2)), ["0", "1"]);
    }

    #[test]
    fn the_first_and_the_last_of_a_rule_are_told() {
        let mut index = Index::default();
        assert!(index.put(&parked("r", "db", "a", 1)));
        assert!(!index.put(&parked("r", "db", "b", 1)));
        assert!(!index.put(&parked("r", "db", "a", 2)), "the same one again");
        assert!(!index.forget(&Key::of("r", "db", "a")));
        assert!(index.forget(&Key::of("r", "db", "b")));
        assert!(index.put(&parked("r", "db", "b", 1)));
        assert!(!index.put(&ended(parked("r", "db", "b", 1), State::Dead, 5)));
        assert_eq!((index.count(State::Parked), index.count(State::Dead)), (0, 1));
    }

    #[test]
    fn a_dead_one_is_no_obstacle_and_grows_old() {
        let mut index = Index::default();
        let key = Key::of("r", "db", "a");
        index.put(&parked("r", "db", "a", 1));
        assert_eq!(index.standing(&key, "9-x", Instant::now()), Standing::Parked);
        index.put(&ended(parked("r", "db", "a", 1), State::Dead, 100));
        assert_eq!(index.standing(&key, "1-x", Instant::now()), Standing::Free);
        assert_eq!(index.next_due(), None);
        assert!(index.ended_before(at(100), 9, 9).is_empty());
        assert_eq!(index.ended_before(at(101), 9, 9).len(), 1);
    }

    #[test]
    fn a_change_that_was_read_before_a_later_state_was_accepted_is_superseded() {
        let mut index = Index::default();
        let key = Key::of("r", "db", "a");
        let (before, read) = (Instant::now(), Instant::now() + Duration::from_secs(1));
        index.accepted(key, "3-c", read);
        assert_eq!(index.standing(&key, "3-c", before), Standing::Superseded);
        assert_eq!(index.standing(&key, "4-d", before), Standing::Free, "the try read an older state");
        assert_eq!(index.standing(&key, "3-c", read + Duration::from_nanos(1)), Standing::Free, "it may be newer");
        for n in 0..ACCEPTED_MAX {
            index.accepted(Key::of("r", "db", &n.to_string()), "1-a", read);
        }
        assert_eq!(index.standing(&key, "3-c", before), Standing::Free, "bounded");
        index.forget_accepted(read + ACCEPTED_FOR);
        assert!(index.is_quiet());
    }

    #[test]
    fn a_rule_is_disabled_in_one_revision_only() {
        let mut index = Index::default();
        index.disable(Disabled { doc_rev: "1-x".into(), rule: "r".into(), rule_rev: "2-b".into() });
        assert!(index.is_disabled("r", "2-b") && !index.is_disabled("r", "3-c") && !index.is_disabled("s", "2-b"));
        assert!(index.enable("r", at(7)) && !index.enable("r", at(8)));
        assert_eq!(index.enabled_at("r"), Some(at(7)));
    }

    #[test]
    fn an_edited_rule_hurries_its_own() {
        let mut index = Index::default();
        index.put(&parked("r", "db", "a", 100));
        index.put(&parked("s", "db", "b", 100));
        index.hurry(&HashSet::from(["r"]), at(50));
        assert_eq!(taken(&mut index, 50, 9), ["a"]);
    }

    proptest! {
        #[test]
        fn the_books_agree_in_any_history(steps in prop::collection::vec((0usize..8, 0usize..2, 0usize..2, 0usize..3, 0u64..9), 0..60)) {
            let mut index = Index::default();
            for (what, rule, db, doc_id, seconds) in steps {
                let (rule, db, doc_id) = (["r", "s"][rule], ["d", "e"][db], ["1", "2", "3"][doc_id]);
                let key = Key::of(rule, db, doc_id);
                match what {
                    0 | 1 => drop(index.put(&parked(rule, db, doc_id, seconds))),
                    2 => drop(index.put(&ended(parked(rule, db, doc_id, seconds), State::Dropped, seconds))),
                    3 => drop(index.forget(&key)),
                    4 => drop(index.take_due(at(seconds), 2, |_| None)),
                    5 => index.landed(&key, None),
                    6 => index.landed(&key, Some(at(seconds + 1))),
                    _ => index.land_all(),
                }
                for (_, entry) in index.ended_before(at(99), 99, 99) {
                    prop_assert!(entry.state != State::Parked);
                }
                for (when, key) in &index.due {
                    prop_assert_eq!(index.entries[key].at, *when);
                }
                let parked = index.entries.iter().filter(|(_, entry)| entry.state == State::Parked);
                prop_assert_eq!(index.count(State::Parked), parked.clone().count());
                prop_assert_eq!(index.due.len(), parked.filter(|(key, _)| !index.in_flight.contains(key)).count());
                prop_assert_eq!(index.ended.len(), index.count(State::Dropped));
                let in_pairs: usize = index.pairs.values().flat_map(|dbs| dbs.values()).sum();
                prop_assert_eq!(in_pairs, index.count(State::Parked));
                prop_assert_eq!(index.parked_of_rule.values().sum::<usize>(), index.count(State::Parked));
            }
        }
    }
}
