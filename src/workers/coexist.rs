//! Whether others are at work in the same spiegel database (pure).

use crate::locks::mixed::Mixed;
use crate::locks::sign::{OwnRevs, Sign, sign};
use serde_json::Value;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

#[derive(Debug)]
pub struct Coexistence {
    /// So long without a sign, and they are gone: the original sweeps nothing, so a quiet hour of the databases looks the same,
    /// and the first sign of life makes us careful again.
    alone_after: Duration,
    last_sign: Option<Instant>,
    /// Dirty or locked by a revision that may be our own: the answer to our write may come later than its row.
    suspects: VecDeque<(Instant, String, String)>,
}

/// A write's answer is no later than that after its row.
const ANSWERED_AFTER: Duration = Duration::from_secs(2);
const SUSPECTS_MAX: usize = 1000;

impl Coexistence {
    /// Where work is taken by locks already, others were seen before a crash of whoever knew of them.
    pub fn of(mixed: &Mixed, alone_after: Duration, age: Instant) -> Self {
        let last_sign = (mixed.is_on() && !mixed.is_fixed()).then_some(age);
        Self { alone_after, last_sign, suspects: VecDeque::new() }
    }

    pub fn row(&mut self, doc: &Value, me: &str, own: &OwnRevs, age: Instant) {
        let (id, rev) = (doc["_id"].as_str().unwrap_or_default(), doc["_rev"].as_str().unwrap_or_default());
        match sign(doc, me) {
            Sign::None => {}
            Sign::Conflict => self.sign_at(age),
            // We write documents that a dead process left locked, too.
            Sign::Lock | Sign::Dirtied if own.knows(id, rev) => {}
            Sign::Lock | Sign::Dirtied => {
                self.suspects.push_back((age, id.to_string(), rev.to_string()));
                if self.suspects.len() > SUSPECTS_MAX {
                    self.suspects.pop_front();
                }
            }
        }
    }

    fn sign_at(&mut self, at: Instant) {
        self.last_sign = self.last_sign.max(Some(at));
    }

    /// Nobody could be heard for so long.
    pub fn was_deaf(&mut self, gap: Duration, age: Instant) {
        self.last_sign = self.last_sign.map(|at| (at + gap).min(age));
    }

    /// Whether there was no sign of others for long.
    pub fn is_alone(&mut self, own: &OwnRevs, age: Instant) -> bool {
        self.settle(own, age);
        self.last_sign.is_none_or(|at| age.saturating_duration_since(at) >= self.alone_after)
    }

    /// What was dirtied by a revision that still is not ours was dirtied by others.
    fn settle(&mut self, own: &OwnRevs, age: Instant) {
        while let Some((at, id, rev)) = self.suspects.front()
            && age.saturating_duration_since(*at) >= ANSWERED_AFTER
        {
            let is_sign = !own.knows(id, rev);
            let at = *at;
            self.suspects.pop_front();
            if is_sign {
                self.sign_at(at);
            }
        }
    }

    /// When to look again, whoever writes meanwhile.
    pub fn next_due(&self, age: Instant) -> Option<Duration> {
        let answered = self.suspects.front().map(|(at, ..)| *at + ANSWERED_AFTER);
        let alone = self.last_sign.map(|at| at + self.alone_after).filter(|at| *at > age);
        Some([answered, alone].into_iter().flatten().min()?.saturating_duration_since(age))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use serde_json::json;

    const ALONE_AFTER: Duration = Duration::from_secs(600);

    fn coexistence(age: Instant) -> Coexistence {
        Coexistence::of(&Mixed::auto(), ALONE_AFTER, age)
    }

    fn row(rev: &str, more: Value) -> Value {
        let mut doc = json!({ "_id": "d", "_rev": rev, "type": "replicator" });
        doc.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
        doc
    }

    #[test]
    fn a_lock_of_others_is_a_sign() {
        let (own, age) = (OwnRevs::default(), Instant::now());
        let mut coexistence = coexistence(age);
        coexistence.row(&row("1-a", json!({ "dirty": false })), "me", &own, age);
        assert!(coexistence.is_alone(&own, age));
        coexistence.row(&row("2-a", json!({ "locked_at": "2027-01-01T00:00:00.000Z" })), "me", &own, age);
        let known = age + ANSWERED_AFTER;
        assert!(!coexistence.is_alone(&own, known));
        assert_eq!(coexistence.next_due(known), Some(ALONE_AFTER - ANSWERED_AFTER), "nobody else may wake us");
        assert!(!coexistence.is_alone(&own, age + ALONE_AFTER - Duration::from_secs(1)));
        assert!(coexistence.is_alone(&own, age + ALONE_AFTER));
        // A dead process's lock in a document that we wrote.
        own.wrote("d", "3-a");
        coexistence.row(&row("3-a", json!({ "locked_at": 5 })), "me", &own, age);
        assert!(coexistence.is_alone(&own, age + ALONE_AFTER));
    }

    #[test]
    fn silence_says_nothing_to_the_deaf() {
        let (own, age) = (OwnRevs::default(), Instant::now());
        let mut coexistence = coexistence(age);
        coexistence.was_deaf(ALONE_AFTER, age);
        assert!(coexistence.is_alone(&own, age), "nobody was there before");
        coexistence.row(&row("3-a", json!({ "_conflicts": ["2-b"] })), "me", &own, age);
        let (gap, back) = (ALONE_AFTER / 2, age + ALONE_AFTER);
        coexistence.was_deaf(gap, back);
        assert!(!coexistence.is_alone(&own, back));
        assert!(coexistence.is_alone(&own, back + gap), "only what was missed counts");
        coexistence.was_deaf(10 * ALONE_AFTER, back);
        assert!(!coexistence.is_alone(&own, back + ALONE_AFTER - gap));
    }

    #[test]
    fn conflicts_are_a_sign_whoever_wrote_them() {
        let (own, age) = (OwnRevs::default(), Instant::now());
        let mut coexistence = coexistence(age);
        own.wrote("d", "3-a");
        coexistence.row(&row("3-a", json!({ "dirty": false, "_conflicts": [] })), "me", &own, age);
        assert!(coexistence.is_alone(&own, age));
        coexistence.row(&row("3-a", json!({ "dirty": false, "_conflicts": ["2-b"] })), "me", &own, age);
        assert!(!coexistence.is_alone(&own, age));
        assert!(coexistence.is_alone(&own, age + ALONE_AFTER));
    }

    #[test]
    fn a_rebuild_among_others_does_not_forget_them() {
        let (own, age) = (OwnRevs::default(), Instant::now());
        for (is_on, is_alone) in [(false, true), (true, false)] {
            let mixed = Mixed::auto();
            mixed.set(is_on);
            let mut coexistence = Coexistence::of(&mixed, ALONE_AFTER, age);
            assert_eq!(coexistence.is_alone(&own, age), is_alone, "{is_on}");
            assert!(coexistence.is_alone(&own, age + ALONE_AFTER), "and does not wait for ever for one who is gone");
        }
    }

    #[test]
    fn what_we_dirtied_ourselves_is_none_however_late_the_answer() {
        for (is_ours, is_late) in [(true, false), (true, true), (false, false)] {
            let (own, age) = (OwnRevs::default(), Instant::now());
            let mut coexistence = coexistence(age);
            if is_ours && !is_late {
                own.wrote("d", "1-a");
            }
            coexistence.row(&row("1-a", json!({ "dirty": true })), "me", &own, age);
            assert!(coexistence.is_alone(&own, age + Duration::from_secs(1)), "the answer may come yet");
            if is_late {
                own.wrote("d", "1-a");
            }
            assert_eq!(coexistence.is_alone(&own, age + ANSWERED_AFTER), is_ours);
            assert_eq!(coexistence.next_due(age).is_none(), is_ours);
        }
    }
}
