//! Which documents are free, which wait for their time or for a lock to die, and who is at work on which (pure).
//!
//! It keeps those that are owed work or locked, and no others; their texts only while few of them wait for a place.

use crate::couch::{generation, generation_of};
use crate::locks::look::{Known, Next, next};
use crate::locks::mend::conflicts_of;
use crate::locks::{Kind, Settings};
use serde_json::Value;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

pub type Id = Arc<str>;

/// One that may be looked at now: to lock it, to unlock it, to remove conflicts, or to see that somebody was quicker.
#[derive(Debug)]
pub struct Start {
    pub id: Id,
    pub kind: Kind,
    /// The revision that has been the same for so long.
    pub rev: String,
    /// None: to be read first.
    pub doc: Option<Value>,
    pub unchanged_for: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// In a queue.
    Ready,
    InHand,
    At(SystemTime),
    After(Instant),
    /// Settled a moment ago: rows about it that are on their way are known already.
    Settled(Instant),
}

struct Entry {
    kind: Kind,
    rev: String,
    /// By our clock, when this revision was first seen.
    since: Instant,
    phase: Phase,
    doc: Option<Value>,
    /// Whatever rows say, it is not looked at before.
    not_before: Option<Instant>,
}

pub struct Board {
    me: String,
    settings: Settings,
    places: usize,
    /// While nobody tells us of new revisions, an unchanged one says nothing.
    is_following: bool,
    entries: HashMap<Id, Entry>,
    ready: [VecDeque<Id>; 2],
    in_hand: [usize; 2],
    by_clock: BTreeSet<(SystemTime, Id)>,
    by_age: BTreeSet<(Instant, Id)>,
}

/// Texts that are kept; what waits behind them is read when its turn comes.
const TEXTS_MAX: usize = 1000;
/// Rows come within moments of their writes.
const SETTLED_FOR: Duration = Duration::from_secs(10);
/// Before it is looked at again after nobody knows what became of it.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(1);

fn lane(kind: Kind) -> usize {
    match kind {
        Kind::ChangeListener => 0,
        Kind::Replicator => 1,
    }
}

pub fn has_conflicts(doc: &Value) -> bool {
    conflicts_of(doc).next().is_some()
}

impl Board {
    /// `places` for each kind of document.
    pub fn new(me: &str, settings: Settings, places: usize) -> Self {
        Self {
            me: me.to_string(),
            settings,
            places,
            is_following: false,
            entries: HashMap::new(),
            ready: Default::default(),
            in_hand: [0; 2],
            by_clock: BTreeSet::new(),
            by_age: BTreeSet::new(),
        }
    }

    /// Everything is told anew; only what is in our hands is kept.
    pub fn begin(&mut self, age: Instant) {
        self.entries.retain(|_, entry| entry.phase == Phase::InHand);
        self.ready = Default::default();
        self.by_clock.clear();
        self.by_age.clear();
        self.is_following = false;
        self.was_deaf(age);
    }

    /// Whether the feed is open.
    pub fn following(&mut self, is_open: bool) {
        self.is_following = is_open;
    }

    pub fn is_following(&self) -> bool {
        self.is_following
    }

    fn unchanged_for(&self, since: Instant, age: Instant) -> Duration {
        if self.is_following { age.saturating_duration_since(since) } else { Duration::ZERO }
    }

    /// What a document says now, as the feed tells. True where it is in our hands and has conflicts.
    pub fn row(&mut self, doc: Value, now: SystemTime, age: Instant) -> bool {
        let (Some(kind), Some(id), Some(rev)) = (Kind::of(&doc), doc["_id"].as_str(), doc["_rev"].as_str()) else {
            return false;
        };
        let id: Id = id.into();
        match self.entries.get_mut(&id) {
            Some(entry) if entry.rev == rev && !has_conflicts(&doc) => return false,
            Some(entry) if generation(rev) < generation(&entry.rev) => return false,
            Some(Entry { phase: Phase::InHand, doc: newer, .. }) => {
                let has_conflicts = has_conflicts(&doc);
                *newer = Some(doc);
                return has_conflicts;
            }
            _ => {}
        }
        self.look(id, kind, doc, now, age);
        false
    }

    /// Its document is gone, or cannot be used.
    pub fn gone(&mut self, id: &str) {
        let in_hand = matches!(self.entries.get(id), Some(Entry { phase: Phase::InHand, .. }));
        if !in_hand {
            self.forget(id);
        }
    }

    fn forget(&mut self, id: &str) {
        if let Some((id, entry)) = self.entries.remove_entry(id) {
            self.leave(&id, entry.kind, entry.phase);
        }
    }

    fn leave(&mut self, id: &Id, kind: Kind, phase: Phase) {
        match phase {
            // Passed over when its turn comes: nobody looks through a queue.
            Phase::Ready => {}
            Phase::InHand => self.in_hand[lane(kind)] = self.in_hand[lane(kind)].saturating_sub(1),
            Phase::At(at) => drop(self.by_clock.remove(&(at, id.clone()))),
            Phase::After(at) | Phase::Settled(at) => drop(self.by_age.remove(&(at, id.clone()))),
        }
    }

    fn look(&mut self, id: Id, kind: Kind, doc: Value, now: SystemTime, age: Instant) {
        let rev = doc["_rev"].as_str().unwrap_or_default().to_string();
        let since = self.entries.get(&id).filter(|entry| entry.rev == rev).map_or(age, |entry| entry.since);
        let unchanged_for = self.unchanged_for(since, age);
        let known = Known { me: &self.me, unchanged_for, settings: &self.settings };
        let next = match has_conflicts(&doc) {
            true => Next::Take,
            false => next(&doc, now, &known),
        };
        let not_before = self.entries.get(&id).and_then(|entry| entry.not_before).filter(|until| *until > age);
        let phase = match next {
            Next::Take | Next::Unlock => not_before.map_or(Phase::Ready, Phase::After),
            Next::At(at) => Phase::At(at),
            Next::After(wait) => Phase::After(age + wait),
            // Not worth an entry unless rows may still come that are older.
            Next::Nothing if self.entries.contains_key(&id) => Phase::Settled(age + SETTLED_FOR),
            Next::Nothing => return,
        };
        let doc = (phase == Phase::Ready && self.ready[lane(kind)].len() < TEXTS_MAX).then_some(doc);
        self.enter(id, Entry { kind, rev, since, phase, doc, not_before });
    }

    fn enter(&mut self, id: Id, entry: Entry) {
        let lane = lane(entry.kind);
        match entry.phase {
            Phase::Ready if !matches!(self.entries.get(&id), Some(Entry { phase: Phase::Ready, .. })) => {
                self.ready[lane].push_back(id.clone());
            }
            Phase::Ready => {}
            Phase::InHand => self.in_hand[lane] += 1,
            Phase::At(at) => drop(self.by_clock.insert((at, id.clone()))),
            Phase::After(at) | Phase::Settled(at) => drop(self.by_age.insert((at, id.clone()))),
        }
        if let Some(before) = self.entries.insert(id.clone(), entry) {
            let now = self.entries.get(&id).map(|entry| entry.phase);
            if Some(before.phase) != now {
                self.leave(&id, before.kind, before.phase);
            }
        }
    }

    /// The next one to look at, where there is a place; it is in our hands until `ended`.
    pub fn start(&mut self, age: Instant) -> Option<Start> {
        for lane in 0..self.ready.len() {
            while self.in_hand[lane] < self.places
                && let Some(id) = self.ready[lane].pop_front()
            {
                let is_following = self.is_following;
                let Some(entry) = self.entries.get_mut(&id).filter(|entry| entry.phase == Phase::Ready) else { continue };
                entry.phase = Phase::InHand;
                self.in_hand[lane] += 1;
                let unchanged_for = if is_following { age.saturating_duration_since(entry.since) } else { Duration::ZERO };
                return Some(Start { id, kind: entry.kind, rev: entry.rev.clone(), doc: entry.doc.take(), unchanged_for });
            }
        }
        None
    }

    /// It is out of our hands. `left` is the document as we know it now; None: unknown.
    pub fn ended(&mut self, id: &Id, left: Option<Value>, now: SystemTime, age: Instant) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        let kind = entry.kind;
        let newest = match (left, entry.doc.take()) {
            (Some(left), Some(row)) if generation_of(&row) > generation_of(&left) || has_conflicts(&row) => Some(row),
            (Some(left), _) => Some(left),
            (None, row) => row,
        };
        match newest {
            Some(doc) => self.look(id.clone(), kind, doc, now, age),
            None => self.look_again(id.clone(), kind, age + LOOK_AGAIN_AFTER, age),
        }
    }

    /// It was deleted by us.
    pub fn deleted(&mut self, id: &str) {
        self.forget(id);
    }

    /// Nothing can be done about it before then.
    pub fn wait(&mut self, id: &Id, until: Instant, age: Instant) {
        if let Some(entry) = self.entries.get(id) {
            self.look_again(id.clone(), entry.kind, until, age);
        }
    }

    /// As `wait`; it has this revision now. Where a conflicted one that was the winner was removed, that is an older one than the
    /// rows have told of.
    pub fn wait_unchanged(&mut self, id: &Id, rev: &str, until: Instant, age: Instant) {
        if let Some(entry) = self.entries.get_mut(id).filter(|entry| entry.rev != rev) {
            (entry.rev, entry.since) = (rev.to_string(), age);
        }
        self.wait(id, until, age);
    }

    /// As `wait`, and no row shortens it.
    pub fn hold_off(&mut self, id: &Id, until: Instant, age: Instant) {
        self.wait(id, until, age);
        if let Some(entry) = self.entries.get_mut(id) {
            entry.not_before = Some(until);
        }
    }

    fn look_again(&mut self, id: Id, kind: Kind, until: Instant, age: Instant) {
        let (rev, since) = match self.entries.get(&id) {
            Some(entry) => (entry.rev.clone(), entry.since),
            None => (String::new(), age),
        };
        self.enter(id, Entry { kind, rev, since, phase: Phase::After(until), doc: None, not_before: None });
    }

    /// What has come to its time is looked at again.
    pub fn tick(&mut self, now: SystemTime, age: Instant) {
        let mut due: Vec<Id> = Vec::new();
        due.extend(self.by_clock.iter().take_while(|(at, _)| *at <= now).map(|(_, id)| id.clone()));
        due.extend(self.by_age.iter().take_while(|(at, _)| *at <= age).map(|(_, id)| id.clone()));
        for id in due {
            let Some(entry) = self.entries.get(&id) else { continue };
            if let Phase::Settled(_) = entry.phase {
                self.forget(&id);
                continue;
            }
            let (kind, rev, since) = (entry.kind, entry.rev.clone(), entry.since);
            self.enter(id, Entry { kind, rev, since, phase: Phase::Ready, doc: None, not_before: None });
        }
    }

    /// While nobody told us of new revisions, an unchanged one said nothing.
    pub fn was_deaf(&mut self, age: Instant) {
        let locked: Vec<Id> = self.by_age.iter().map(|(_, id)| id.clone()).collect();
        for id in locked {
            if let Some(Entry { phase: Phase::After(at), kind, rev, since, .. }) = self.entries.get(&id) {
                let (kind, rev) = (*kind, rev.clone());
                let at = *at + age.saturating_duration_since(*since).min(self.settings.stale_after);
                self.enter(id, Entry { kind, rev, since: age, phase: Phase::After(at), doc: None, not_before: None });
            }
        }
        // What is ready by now, or in our hands, is not older by what nobody heard either.
        self.entries.values_mut().for_each(|entry| entry.since = age);
    }

    /// How long until something comes to its time.
    pub fn next_due(&self, now: SystemTime, age: Instant) -> Option<Duration> {
        let by_clock = self.by_clock.first().map(|(at, _)| at.duration_since(now).unwrap_or_default());
        let by_age = self.by_age.first().map(|(at, _)| at.saturating_duration_since(age));
        [by_clock, by_age].into_iter().flatten().min()
    }

    pub fn in_hand(&self) -> usize {
        self.in_hand.iter().sum()
    }

    /// Nobody is at work, and nothing is owed or locked, as far as we know.
    pub fn is_quiet(&self) -> bool {
        self.entries.values().all(|entry| matches!(entry.phase, Phase::Settled(_) | Phase::At(_)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::job::timestamp;
    use serde_json::json;

    fn board(places: usize) -> Board {
        let settings = Settings {
            retry_after: Duration::from_secs(10_800),
            check_stalled: Duration::from_secs(600),
            stale_after: Duration::from_secs(60),
            assume_deleted_after: Duration::from_secs(300),
        };
        let mut board = Board::new("me", settings, places);
        board.following(true);
        board
    }

    fn doc(id: &str, rev: &str, more: Value) -> Value {
        let mut doc = json!({ "_id": id, "_rev": rev, "type": "replicator" });
        doc.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
        doc
    }

    fn locked(owner: &str) -> Value {
        json!({ "dirty": true, "locked_at": "2027-01-01T00:00:00.000Z",
            "locked_by": { "owner": owner, "locked_at": "2027-01-01T00:00:00.000Z" } })
    }

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    fn started(board: &mut Board, age: Instant) -> Vec<String> {
        std::iter::from_fn(|| board.start(age)).map(|start| start.id.to_string()).collect()
    }

    #[test]
    fn so_many_at_once_in_the_order_in_which_they_came() {
        let (mut board, age) = (board(2), Instant::now());
        for id in ["a", "b", "c"] {
            board.row(doc(id, "1-x", json!({ "dirty": true })), NOW, age);
            board.row(doc(id, "2-x", json!({ "dirty": true })), NOW, age);
        }
        board.row(json!({ "_id": "l", "_rev": "1-x", "type": "change_listener" }), NOW, age);
        assert_eq!(started(&mut board, age), ["l", "a", "b"], "each kind has places of its own");
        board.ended(&"b".into(), Some(doc("b", "4-x", json!({ "dirty": false }))), NOW, age);
        assert_eq!(started(&mut board, age), ["c"]);
        assert_eq!(board.in_hand(), 3);
        board.gone("a");
        assert_eq!(board.in_hand(), 3, "it is in our hands until it ends");
        board.deleted("a");
        board.ended(&"a".into(), None, NOW, age);
        assert_eq!(board.in_hand(), 2);
    }

    #[test]
    fn rows_of_what_we_wrote_ourselves_are_no_news() {
        let (mut board, age) = (board(2), Instant::now());
        board.row(doc("a", "1-x", json!({})), NOW, age);
        assert_eq!(started(&mut board, age), ["a"]);
        board.row(doc("a", "2-lock", locked("me")), NOW, age);
        board.ended(&"a".into(), Some(doc("a", "3-clean", json!({ "dirty": false }))), NOW, age);
        for (rev, more) in [("2-lock", locked("me")), ("3-clean", json!({ "dirty": false }))] {
            board.row(doc("a", rev, more), NOW, age);
        }
        assert!(started(&mut board, age).is_empty());
        board.row(doc("a", "4-theirs", json!({ "dirty": true })), NOW, age);
        assert_eq!(started(&mut board, age), ["a"]);
        // Dirtied while we worked, as the feed told before our own end.
        board.row(doc("a", "6-theirs", json!({ "dirty": true })), NOW, age);
        board.ended(&"a".into(), Some(doc("a", "5-x", json!({ "dirty": false }))), NOW, age);
        assert_eq!(started(&mut board, age), ["a"]);
        board.ended(&"a".into(), Some(doc("a", "7-x", json!({ "dirty": false }))), NOW, age);
        board.tick(NOW, age + SETTLED_FOR);
        assert!(board.entries.is_empty() && board.by_age.is_empty() && board.is_quiet());
    }

    #[test]
    fn what_waits_is_looked_at_in_its_time() {
        let (mut board, age) = (board(9), Instant::now());
        let due = NOW + Duration::from_secs(30);
        board.row(doc("later", "1-x", json!({ "dirty": false, "dirty_at": timestamp(due) })), NOW, age);
        board.row(doc("locked", "1-x", locked("other")), NOW, age);
        board.row(doc("clean", "1-x", json!({ "dirty": false })), NOW, age);
        assert_eq!((board.entries.len(), started(&mut board, age).len()), (2, 0));
        assert_eq!(board.next_due(NOW, age), Some(Duration::from_secs(30)));
        board.tick(due, age + Duration::from_secs(30));
        assert_eq!(started(&mut board, age), ["later"]);
        // It is renewed.
        board.row(doc("locked", "2-x", locked("other")), NOW, age + Duration::from_secs(50));
        board.tick(due, age + Duration::from_secs(60));
        assert!(started(&mut board, age).is_empty());
        board.tick(due, age + Duration::from_secs(110));
        let start = board.start(age + Duration::from_secs(110)).unwrap();
        assert_eq!((&*start.id, start.unchanged_for), ("locked", Duration::from_secs(60)));
        board.wait(&"locked".into(), age + Duration::from_secs(200), age);
        assert_eq!(board.in_hand(), 1, "but for the one that is due");
        board.row(doc("locked", "3-x", json!({ "dirty": true })), due, age);
        assert_eq!(started(&mut board, age), ["locked"], "a row is news");
        board.hold_off(&"locked".into(), age + Duration::from_secs(200), age);
        board.row(doc("locked", "4-x", json!({ "dirty": true })), due, age);
        assert!(started(&mut board, age).is_empty(), "but not where it must wait");
        board.tick(due, age + Duration::from_secs(200));
        assert_eq!(started(&mut board, age), ["locked"]);
    }

    #[test]
    fn a_winner_that_was_removed_leaves_an_older_one_that_ages_as_well() {
        let (mut board, age) = (board(9), Instant::now());
        let seconds = |seconds| age + Duration::from_secs(seconds);
        board.row(doc("a", "9-x", locked("other")), NOW, age);
        // The row about what is left looks like one that came late.
        board.row(doc("a", "4-x", locked("other")), NOW, seconds(1));
        for (at, rev) in [(60, "9-x"), (120, "4-x")] {
            board.tick(NOW, seconds(at));
            let start = board.start(seconds(at)).unwrap();
            assert_eq!((start.rev.as_str(), start.unchanged_for), (rev, Duration::from_secs(60)));
            board.wait_unchanged(&"a".into(), "4-x", seconds(at + 60), seconds(at));
        }
    }

    #[test]
    fn a_deaf_minute_kills_no_lock() {
        let (mut board, age) = (board(9), Instant::now());
        board.row(doc("locked", "1-x", locked("other")), NOW, age);
        let heard = age + Duration::from_secs(59);
        board.was_deaf(heard);
        board.tick(NOW, heard + Duration::from_secs(59));
        assert!(started(&mut board, heard).is_empty());
        board.tick(NOW, heard + Duration::from_secs(60));
        let start = board.start(heard + Duration::from_secs(60)).unwrap();
        assert_eq!(start.unchanged_for, Duration::from_secs(60));
    }

    #[test]
    fn what_ripens_while_nobody_hears_is_not_dead() {
        let minute = Duration::from_secs(60);
        for (is_open, was_deaf, expected) in [(true, false, minute), (true, true, Duration::ZERO), (false, false, Duration::ZERO)]
        {
            let (mut board, age) = (board(9), Instant::now());
            board.row(doc("locked", "1-x", locked("other")), NOW, age);
            board.following(is_open);
            board.tick(NOW, age + minute);
            if was_deaf {
                board.was_deaf(age + minute);
            }
            let start = board.start(age + minute).unwrap();
            assert_eq!(start.unchanged_for, expected, "{is_open} {was_deaf}");
            board.ended(&start.id, Some(doc("locked", "1-x", locked("other"))), NOW, age + minute);
            let left = board.next_due(NOW, age + minute);
            assert_eq!(left, expected.is_zero().then_some(minute), "{is_open} {was_deaf}");
        }
    }

    #[test]
    fn conflicts_are_seen_in_our_hands_and_out_of_them() {
        let (mut board, age) = (board(9), Instant::now());
        let conflicted = || doc("a", "1-x", json!({ "dirty": false, "_conflicts": ["1-a"] }));
        assert!(!board.row(conflicted(), NOW, age));
        assert_eq!(started(&mut board, age), ["a"]);
        assert!(board.row(conflicted(), NOW, age), "they concern the work");
        board.ended(&"a".into(), Some(doc("a", "2-x", json!({ "dirty": false }))), NOW, age);
        assert_eq!(started(&mut board, age), ["a"]);
    }
}
