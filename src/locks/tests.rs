//! Tables for each rule, and a model in which many work on one document.

use super::held::{End, Held, Last, look_for_missing, owed, taken, unlocked};
use super::look::{By, Known, Next, lock_of, next};
use super::mend::{Mend, Unconfirmed, mend, unconfirmed};
use super::sign::{OwnRevs, Sign, sign};
use super::*;
use crate::job::timestamp;
use proptest::prelude::*;
use serde_json::json;
use std::time::SystemTime;

fn settings() -> Settings {
    Settings {
        retry_after: Duration::from_secs(10_800),
        check_stalled: Duration::from_secs(600),
        stale_after: Duration::from_secs(60),
        assume_deleted_after: Duration::from_secs(300),
    }
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds)
}

fn text(seconds: u64) -> String {
    timestamp(at(seconds))
}

fn locked(owner: &str, seconds: u64) -> Value {
    json!({ "locked_at": text(seconds), "locked_by": { "owner": owner, "locked_at": text(seconds) } })
}

fn with(fields: Value, more: Value) -> Value {
    let mut doc = json!({ "_id": "d", "_rev": "7-x", "type": "replicator", "kept": [1, { "deep": null }] });
    for fields in [fields, more] {
        doc.as_object_mut().unwrap().extend(fields.as_object().cloned().unwrap());
    }
    doc
}

#[test]
fn what_is_done_about_a_document_that_nobody_of_us_holds() {
    let none = json!({});
    let seconds = Duration::from_secs;
    let cases = [
        // (fields, lock, unchanged for, next)
        (json!({}), none.clone(), 0, Next::Take),
        (json!({ "dirty": true }), none.clone(), 0, Next::Take),
        (json!({ "dirty": null }), none.clone(), 0, Next::Take),
        (json!({ "dirty": "no" }), none.clone(), 0, Next::Take),
        (json!({ "dirty": false }), none.clone(), 0, Next::Nothing),
        (json!({ "dirty": false, "dirty_at": null }), none.clone(), 0, Next::Nothing),
        (json!({ "dirty": false, "dirty_at": text(999) }), none.clone(), 0, Next::Take),
        (json!({ "dirty": false, "dirty_at": text(1001) }), none.clone(), 0, Next::At(at(1001))),
        (json!({ "dirty": false, "dirty_at": "tomorrow" }), none.clone(), 0, Next::Take),
        (json!({ "dirty": false, "dirty_at": 7 }), none.clone(), 0, Next::Take),
        (json!({ "dirty": true, "dirty_at": text(5000) }), none.clone(), 0, Next::Take),
        // What JavaScript takes for no lock.
        (json!({ "dirty": true, "locked_at": null }), none.clone(), 0, Next::Take),
        (json!({ "dirty": true, "locked_at": "" }), none.clone(), 0, Next::Take),
        (json!({ "dirty": true, "locked_at": 0 }), none.clone(), 0, Next::Take),
        (json!({ "dirty": true, "locked_at": false }), none.clone(), 0, Next::Take),
        // Ours, by its revision alone, whatever the clocks say.
        (json!({ "dirty": true }), locked("other", 10), 0, Next::After(seconds(60))),
        (json!({ "dirty": true }), locked("other", 10), 59, Next::After(seconds(1))),
        (json!({ "dirty": true }), locked("other", 10), 60, Next::Take),
        (json!({ "dirty": false }), locked("other", 10), 60, Next::Unlock),
        (json!({ "dirty": false, "dirty_at": text(2000) }), locked("other", 10), 60, Next::Unlock),
        (json!({ "dirty": true }), locked("other", 9999), 60, Next::Take),
        // The answer to our own lock was lost.
        (json!({ "dirty": true }), locked("me", 999), 0, Next::Take),
        (json!({ "dirty": false }), locked("me", 999), 0, Next::Unlock),
        // The original's.
        (json!({ "dirty": true, "locked_at": text(900) }), none.clone(), 0, Next::After(seconds(10_700))),
        (json!({ "dirty": true, "locked_at": text(900) }), none.clone(), 60, Next::After(seconds(10_700))),
        (json!({ "dirty": true, "locked_at": timestamp(at(0) - seconds(9_800)) }), none.clone(), 0, Next::Take),
        (json!({ "dirty": false, "locked_at": timestamp(at(0) - seconds(9_800)) }), none.clone(), 0, Next::Unlock),
        (json!({ "dirty": true, "locked_at": timestamp(at(0) - seconds(9_700)) }), none.clone(), 0, Next::After(seconds(600))),
        // It copied our `locked_by` into a lock of its own.
        (
            json!({ "dirty": true, "locked_at": text(900), "locked_by": { "owner": "other", "locked_at": text(1) } }),
            none.clone(),
            100,
            Next::After(seconds(10_700)),
        ),
        (json!({ "dirty": true, "locked_at": text(900), "locked_by": "me" }), none.clone(), 100, Next::After(seconds(10_700))),
        (
            json!({ "dirty": true, "locked_at": text(900), "locked_by": { "owner": 7, "locked_at": text(900) } }),
            none.clone(),
            0,
            Next::After(seconds(10_700)),
        ),
        // A time that nobody can read, or of a clock that is wrong: the revision tells.
        (json!({ "dirty": true, "locked_at": "yesterday" }), none.clone(), 10_799, Next::After(seconds(600))),
        (json!({ "dirty": true, "locked_at": true }), none.clone(), 10_800, Next::Take),
        (json!({ "dirty": true, "locked_at": text(99_999) }), none.clone(), 10_800, Next::Take),
        (json!({ "dirty": true, "locked_at": text(99_999) }), none, 0, Next::After(seconds(10_800))),
    ];
    let settings = settings();
    for (fields, lock, unchanged, expected) in cases {
        let doc = with(fields, lock);
        let known = Known { me: "me", unchanged_for: Duration::from_secs(unchanged), settings: &settings };
        assert_eq!(next(&doc, at(1000), &known), expected, "{doc} unchanged for {unchanged} s");
    }
    for doc in [Value::Null, json!([]), json!("text"), json!(7)] {
        let known = Known { me: "me", unchanged_for: Duration::ZERO, settings: &settings };
        let _ = next(&doc, at(1000), &known);
        assert_eq!(Kind::of(&doc), None);
        assert_eq!(sign(&doc, "me"), Sign::None);
        let _ = (taken(&doc, "me", at(0)), unlocked(&doc, at(0)), owed(&doc, at(0)));
    }
}

fn held(fields: Value) -> Held {
    Held::new("me", taken(&with(fields, json!({})), "me", at(1000)))
}

fn saved(last: Last) -> Value {
    match last {
        Last::Save(doc) => doc,
        other => panic!("{other:?}"),
    }
}

#[test]
fn taking_says_whose_it_is_and_keeps_the_rest() {
    let doc = taken(&with(json!({ "dirty": true, "retries": 3, "_conflicts": ["1-a"] }), json!({})), "me", at(1000));
    assert_eq!(doc["locked_at"], text(1000));
    assert_eq!(doc["locked_by"], json!({ "owner": "me", "locked_at": text(1000) }));
    assert_eq!((&doc["kept"], &doc["retries"], &doc["_rev"]), (&json!([1, { "deep": null }]), &json!(3), &json!("7-x")));
    assert_eq!((&doc["dirty"], doc.get("_conflicts")), (&json!(true), None));
    let due = taken(&with(json!({ "dirty": false, "dirty_at": text(1), "retries": 3 }), json!({})), "me", at(1000));
    assert_eq!((&due["dirty"], &due["dirty_at"], &due["retries"]), (&json!(true), &Value::Null, &json!(3)));
    let new = taken(&with(json!({}), json!({})), "me", at(1000));
    assert_eq!((new.get("dirty"), new.get("dirty_at")), (None, None), "a field that is not there is not made");
}

#[test]
fn each_end_says_what_is_left() {
    let settings = settings();
    let before = json!({ "dirty": true, "retries": 2, "possibly_deleted_at": null });
    let cases = [
        (End::Clean, json!({ "dirty": false, "retries": null, "possibly_deleted_at": null })),
        (End::Again, json!({ "dirty": true, "retries": 2, "possibly_deleted_at": null })),
        (End::Later { at: at(2000), retries: 3 }, json!({ "dirty": false, "dirty_at": text(2000), "retries": 3 })),
        (
            End::Missing { at: at(2000), retries: 3 },
            json!({ "dirty": false, "dirty_at": text(2000), "retries": 3, "possibly_deleted_at": text(1500) }),
        ),
    ];
    for (end, expected) in cases {
        let doc = saved(held(before.clone()).ended(end, at(1500), &settings, |_| {}));
        assert_eq!((&doc["locked_at"], doc.get("locked_by")), (&Value::Null, None), "{end:?}");
        assert_eq!((&doc["kept"], &doc["updated_at"]), (&json!([1, { "deep": null }]), &json!(text(1500))));
        for (field, value) in expected.as_object().unwrap() {
            assert_eq!(&doc[field], value, "{field} after {end:?}");
        }
    }
}

#[test]
fn what_was_dirtied_meanwhile_is_unlocked_and_never_cleaned() {
    let settings = settings();
    let theirs = [
        json!({ "dirty": true }),
        // An update-listener of the original, for a replicator that waits before it is dirty.
        json!({ "dirty": false, "dirty_at": text(5000) }),
    ];
    for said in theirs {
        for end in [End::Clean, End::Again, End::Later { at: at(2000), retries: 3 }, End::Missing { at: at(2000), retries: 3 }] {
            let mut held = held(json!({ "dirty": true }));
            let mut current = held.doc().clone();
            current.as_object_mut().unwrap().extend(said.as_object().cloned().unwrap());
            current["_rev"] = json!("9-theirs");
            assert!(held.conflicted(Some(current)), "it is still ours");
            let positions = |fields: &mut Map<String, Value>| {
                fields.insert(String::from("last_seq"), json!("12-x"));
                fields.insert(String::from("dirty_at"), json!("from the positions"));
            };
            let doc = saved(held.ended(end, at(1500), &settings, positions));
            assert_eq!((&doc["locked_at"], &doc["_rev"]), (&Value::Null, &json!("9-theirs")));
            assert_eq!(doc["last_seq"], "12-x", "what was delivered stays so");
            match end {
                End::Later { .. } => {
                    assert_eq!(
                        (&doc["dirty"], &doc["dirty_at"], &doc["retries"]),
                        (&json!(false), &json!(text(2000)), &json!(3))
                    );
                }
                _ => assert_eq!((doc.get("dirty"), doc.get("dirty_at")), (said.get("dirty"), said.get("dirty_at")), "{end:?}"),
            }
        }
    }
    // Of its rules only some wait.
    let mut listener = held(json!({ "type": "change_listener", "dirty": true }));
    listener.dirtied();
    let doc = saved(listener.ended(End::Later { at: at(2000), retries: 3 }, at(1500), &settings, |_| {}));
    assert_eq!((&doc["dirty"], doc.get("dirty_at")), (&json!(true), None));
}

#[test]
fn a_lock_that_is_gone_is_lost_for_good() {
    let settings = settings();
    let cases = [
        None,
        Some(with(json!({ "dirty": true, "locked_at": null }), json!({}))),
        Some(with(json!({ "dirty": true }), locked("other", 1200))),
        Some(with(json!({ "dirty": true, "locked_at": text(1200), "locked_by": locked("me", 1000)["locked_by"] }), json!({}))),
    ];
    for current in cases {
        let mut held = held(json!({ "dirty": true }));
        assert!(!held.conflicted(current.clone()), "{current:?}");
        assert!(held.is_lost());
        assert_eq!(held.renewed(at(1300), |_| {}), None, "it is not locked again");
        assert_eq!(held.ended(End::Clean, at(1300), &settings, |_| {}), Last::Nothing, "and not cleaned");
        assert_eq!(held.ended(End::Missing { at: at(2000), retries: 9 }, at(9999), &settings, |_| {}), Last::Nothing);
    }
}

#[test]
fn renewing_keeps_the_lock_young_for_everybody() {
    let mut held = held(json!({ "dirty": true }));
    let doc = held.renewed(at(1020), |fields| drop(fields.insert(String::from("last_seq"), json!(5)))).unwrap();
    assert_eq!((&doc["locked_at"], &doc["locked_by"]["locked_at"]), (&json!(text(1020)), &json!(text(1020))));
    assert_eq!((&doc["last_seq"], &doc["dirty"]), (&json!(5), &json!(true)));
    held.saved(doc, "8-next");
    assert_eq!(held.doc()["_rev"], "8-next");
    assert!(lock_of(held.doc(), "me").is_some_and(|lock| lock.by == By::Us && lock.at == Some(at(1020))));
}

#[test]
fn what_is_missing_for_long_is_deleted_and_not_before() {
    let settings = settings();
    let missing = End::Missing { at: at(3000), retries: 1 };
    for (since, expected) in
        [(json!(text(1300)), false), (json!(text(1200)), true), (json!("long ago"), false), (Value::Null, false)]
    {
        let held = held(json!({ "dirty": true, "possibly_deleted_at": since }));
        let last = held.ended(missing, at(1500), &settings, |_| {});
        assert_eq!(matches!(last, Last::Delete { .. }), expected, "{since} {last:?}");
    }
    let mut dirtied = held(json!({ "dirty": true, "possibly_deleted_at": text(1) }));
    dirtied.dirtied();
    assert!(matches!(dirtied.ended(missing, at(1500), &settings, |_| {}), Last::Save(_)), "somebody heard of it again");
    let doc = saved(held(json!({ "possibly_deleted_at": text(1) })).ended(End::Clean, at(1500), &settings, |_| {}));
    assert_eq!(doc["possibly_deleted_at"], Value::Null, "it is back");

    let backoff = Duration::from_secs(5);
    let doc = with(json!({ "possibly_deleted_at": text(1000) }), json!({}));
    assert_eq!(look_for_missing(&doc, at(1100), backoff, &settings), at(1105));
    assert_eq!(look_for_missing(&doc, at(1298), backoff, &settings), at(1300), "as soon as it may be forgotten");
    assert_eq!(look_for_missing(&doc, at(1400), backoff, &settings), at(1405), "never in the past");
}

#[test]
fn conflicted_revisions_leave_an_owed_document() {
    let settings = settings();
    let known = |seconds| Known { me: "me", unchanged_for: Duration::from_secs(seconds), settings: &settings };
    let loser = with(json!({ "_rev": "7-a", "dirty": false }), json!({}));
    let remove = vec![String::from("7-a")];

    let free = with(json!({ "dirty": true, "_conflicts": ["7-a"] }), json!({}));
    assert_eq!(
        mend(&free, std::slice::from_ref(&loser), at(1000), &known(0)),
        Mend::Write { winner: None, remove: remove.clone() }
    );
    let clean = with(json!({ "dirty": false, "dirty_at": text(5000), "_conflicts": ["7-a"] }), json!({}));
    let Mend::Write { winner: Some(winner), .. } = mend(&clean, std::slice::from_ref(&loser), at(1000), &known(0)) else {
        panic!("it is written")
    };
    assert_eq!((&winner["dirty"], &winner["dirty_at"], &winner["_rev"]), (&json!(true), &Value::Null, &json!("7-x")));
    assert_eq!(winner.get("_conflicts"), None);

    // Somebody is at work on one of them.
    let alive = with(json!({ "dirty": true, "_rev": "7-b", "_conflicts": ["7-a", "7-unreadable"] }), locked("other", 990));
    assert_eq!(mend(&alive, std::slice::from_ref(&loser), at(1000), &known(10)), Mend::Wait(Duration::from_secs(50)));
    assert_eq!(mend(&free, std::slice::from_ref(&alive), at(1000), &known(10)), Mend::Wait(Duration::from_secs(50)));
    let Mend::Write { winner: Some(winner), remove } = mend(&alive, &[loser], at(1000), &known(60)) else { panic!("it is dead") };
    assert_eq!((&winner["dirty"], &winner["locked_at"], winner.get("locked_by")), (&json!(true), &Value::Null, None));
    assert_eq!(remove, ["7-a", "7-unreadable"]);
}

#[test]
fn a_202_is_no_lock_and_leaves_no_conflict() {
    let now = at(1000);
    let alone = with(json!({ "dirty": true, "_rev": "8-mine" }), locked("me", 1000));
    let Unconfirmed::Unlock(doc) = unconfirmed(Some(&alone), "8-mine", now) else { panic!("it is free again") };
    assert_eq!((&doc["locked_at"], &doc["dirty"], &doc["_rev"]), (&Value::Null, &json!(true), &json!("8-mine")));
    let remove = Unconfirmed::Remove { rev: String::from("8-mine") };
    let wins = with(json!({ "_rev": "8-mine", "_conflicts": ["8-a"] }), json!({}));
    assert_eq!(unconfirmed(Some(&wins), "8-mine", now), remove);
    let loses = with(json!({ "_rev": "8-z", "_conflicts": ["8-a", "8-mine"] }), json!({}));
    assert_eq!(unconfirmed(Some(&loses), "8-mine", now), remove);
    let moved_on = with(json!({ "_rev": "9-z" }), json!({}));
    assert_eq!(unconfirmed(Some(&moved_on), "8-mine", now), Unconfirmed::Nothing);
    assert_eq!(unconfirmed(None, "8-mine", now), Unconfirmed::Nothing);
}

#[test]
fn what_an_update_listener_writes() {
    for (fields, lock, expected) in [
        (json!({ "dirty": true }), json!({}), false),
        (json!({}), json!({}), false),
        (json!({ "dirty": false }), json!({}), true),
        // It backs off.
        (json!({ "dirty": false, "dirty_at": text(5000), "retries": 3 }), json!({}), false),
        (json!({ "dirty": false, "dirty_at": text(999) }), json!({}), true),
        (json!({ "dirty": false, "dirty_at": "tomorrow" }), json!({}), true),
        (json!({ "dirty": false, "dirty_at": text(5000) }), locked("other", 1), true),
        (json!({ "dirty": true }), locked("other", 1), true),
        (json!({ "dirty": true, "locked_at": text(1) }), json!({}), true),
    ] {
        let doc = with(fields, lock.clone());
        let written = owed(&doc, at(1000));
        assert_eq!(written.is_some(), expected, "{doc}");
        if let Some(written) = written {
            assert_eq!((&written["dirty"], &written["dirty_at"]), (&json!(true), &Value::Null));
            assert_eq!((&written["locked_at"], &written["locked_by"]), (&doc["locked_at"], &doc["locked_by"]), "the lock stays");
        }
    }
}

#[test]
fn others_show_themselves() {
    let cases = [
        (json!({ "dirty": true }), json!({}), Sign::Dirtied),
        (json!({}), json!({}), Sign::None),
        (json!({ "dirty": false, "dirty_at": text(1) }), json!({}), Sign::None),
        (json!({ "dirty": false }), locked("me", 1), Sign::None),
        (json!({ "dirty": true }), locked("me", 1), Sign::Dirtied),
        (json!({ "dirty": false }), locked("other", 1), Sign::Lock),
        (json!({ "locked_at": text(1) }), json!({}), Sign::Lock),
        (json!({ "type": "on_change", "dirty": true }), json!({}), Sign::None),
    ];
    for (fields, lock, expected) in cases {
        let doc = with(fields, lock);
        assert_eq!(sign(&doc, "me"), expected, "{doc}");
    }
    let own = OwnRevs::default();
    own.wrote("d", "1-a");
    own.wrote("d", "1-a");
    assert!(own.knows("d", "1-a") && !own.knows("d", "2-a") && !own.knows("e", "1-a"));
}

/// One document, as CouchDB keeps it: a write needs the newest revision.
struct Store {
    doc: Value,
    rev: u64,
}

impl Store {
    fn put(&mut self, mut doc: Value) -> Option<String> {
        if doc["_rev"] != self.doc["_rev"] {
            return None;
        }
        self.rev += 1;
        let rev = format!("{}-r", self.rev);
        doc["_rev"] = json!(rev);
        self.doc = doc;
        Some(rev)
    }
}

#[derive(Debug, Default)]
enum Phase {
    #[default]
    Idle,
    Taking(Value),
    /// With the number of the newest change that its reads see.
    Working(Box<Held>, u64),
}

#[derive(Default)]
struct Ours {
    me: String,
    phase: Phase,
    seen: (String, u64),
    wrote_at: u64,
}

#[derive(Default)]
enum Theirs {
    #[default]
    Idle,
    Taking(Value),
    Working(Value, u64),
    Unlocking,
}

/// Somebody who heard of a change, and tells of it.
#[derive(Default)]
struct Dirtier {
    change: Option<u64>,
    read: Option<Value>,
}

struct Model {
    store: Store,
    settings: Settings,
    clock: u64,
    ours: Vec<Ours>,
    theirs: Vec<Theirs>,
    dirtiers: Vec<Dirtier>,
    /// Changes so far; those that the document was told of; those that a run that ended has covered.
    changes: u64,
    told: u64,
    covered: u64,
    lives: u64,
}

impl Model {
    fn new() -> Self {
        let ours = (0..3).map(|n| Ours { me: format!("ours{n}"), ..Ours::default() });
        Self {
            store: Store { doc: json!({ "_id": "d", "_rev": "0-r", "type": "replicator", "dirty": false, "kept": 7 }), rev: 0 },
            settings: Settings { retry_after: Duration::from_secs(1000), check_stalled: Duration::from_secs(100), ..settings() },
            clock: 0,
            ours: ours.collect(),
            theirs: vec![Theirs::Idle, Theirs::Idle],
            dirtiers: vec![Dirtier::default(), Dirtier::default()],
            changes: 0,
            told: 0,
            covered: 0,
            lives: 0,
        }
    }

    fn now(&self) -> SystemTime {
        at(self.clock)
    }

    /// A worker of ours makes its next step. `choice` says how its work goes on.
    fn ours(&mut self, index: usize, choice: u8) {
        let (now, clock) = (self.now(), self.clock);
        let mut worker = std::mem::take(&mut self.ours[index]);
        worker.phase = match std::mem::take(&mut worker.phase) {
            Phase::Idle => {
                let rev = self.store.doc["_rev"].as_str().unwrap().to_string();
                if worker.seen.0 != rev {
                    worker.seen = (rev, clock);
                }
                let unchanged_for = Duration::from_secs(clock - worker.seen.1);
                let known = Known { me: &worker.me, unchanged_for, settings: &self.settings };
                match next(&self.store.doc, now, &known) {
                    Next::Take => Phase::Taking(taken(&self.store.doc, &worker.me, now)),
                    Next::Unlock => {
                        self.check_dead(&worker.me);
                        self.store.put(unlocked(&self.store.doc, now)).expect("it was just read");
                        Phase::Idle
                    }
                    _ => Phase::Idle,
                }
            }
            Phase::Taking(doc) => {
                if doc["_rev"] == self.store.doc["_rev"] {
                    self.check_dead(&worker.me);
                }
                match self.store.put(doc.clone()) {
                    // The answer was lost: we think that it was a conflict.
                    Some(_) if choice % 16 == 15 => Phase::Idle,
                    Some(rev) => {
                        let mut held = Held::new(&worker.me, doc.clone());
                        held.saved(doc, &rev);
                        worker.wrote_at = clock;
                        Phase::Working(Box::new(held), self.changes)
                    }
                    None => Phase::Idle,
                }
            }
            Phase::Working(held, covers) if held.is_lost() => {
                drop((held, covers));
                Phase::Idle
            }
            Phase::Working(mut held, covers) => {
                let (is_end, doc) = match choice % 8 {
                    0..4 => (false, held.renewed(now, |_| {})),
                    choice => {
                        let end = match choice {
                            4 | 5 => End::Clean,
                            6 => End::Again,
                            _ => End::Later { at: at(clock + 7), retries: 1 },
                        };
                        if end == End::Clean {
                            self.covered = self.covered.max(covers);
                        }
                        match held.ended(end, now, &self.settings, |_| {}) {
                            Last::Save(doc) => (true, Some(doc)),
                            _ => (true, None),
                        }
                    }
                };
                let doc = doc.expect("it is not lost");
                match self.store.put(doc.clone()) {
                    Some(_) if is_end => Phase::Idle,
                    Some(rev) => {
                        held.saved(doc, &rev);
                        worker.wrote_at = clock;
                        Phase::Working(held, covers)
                    }
                    None => {
                        held.conflicted(Some(self.store.doc.clone()));
                        Phase::Working(held, covers)
                    }
                }
            }
        };
        self.ours[index] = worker;
    }

    /// Nobody of us who lives has the lock that is written over.
    fn check_dead(&self, me: &str) {
        for other in self.ours.iter().filter(|other| other.me != me && !other.me.is_empty()) {
            if matches!(other.phase, Phase::Working(..))
                && lock_of(&self.store.doc, &other.me).is_some_and(|lock| lock.by == By::Us)
            {
                let silent_for = self.clock - other.wrote_at;
                assert!(silent_for >= 60, "{me} took what {} renewed {silent_for} s ago: {}", other.me, self.store.doc);
            }
        }
    }

    fn kill(&mut self, index: usize) {
        self.lives += 1;
        self.ours[index] = Ours { me: format!("ours{index}.{}", self.lives), ..Ours::default() };
    }

    /// As the original does, step by step.
    fn theirs(&mut self, index: usize, choice: u8) {
        let now = self.now();
        let doc = self.store.doc.clone();
        let locked_at = super::look::time_of(&doc["locked_at"]);
        self.theirs[index] = match std::mem::take(&mut self.theirs[index]) {
            Theirs::Idle if doc["dirty"] != json!(false) && doc["locked_at"].is_null() => Theirs::Taking(doc),
            Theirs::Idle => {
                let stalled = locked_at.is_some_and(|at| now.duration_since(at).unwrap_or_default() > self.settings.retry_after);
                let soils = doc["dirty"] == json!(false)
                    && doc["locked_at"].is_null()
                    && super::look::due_at(&doc).is_some_and(|at| at <= now);
                let mut doc = doc;
                if stalled {
                    doc["locked_at"] = Value::Null;
                    self.store.put(doc);
                } else if soils {
                    doc["dirty"] = json!(true);
                    doc["dirty_at"] = Value::Null;
                    self.store.put(doc);
                }
                Theirs::Idle
            }
            Theirs::Taking(mut doc) => {
                doc["locked_at"] = json!(timestamp(now));
                match self.store.put(doc) {
                    Some(_) => Theirs::Working(self.store.doc.clone(), self.changes),
                    None => Theirs::Idle,
                }
            }
            Theirs::Working(doc, covers) if choice.is_multiple_of(4) => Theirs::Working(doc, covers),
            // It is killed.
            Theirs::Working(..) if choice % 8 == 7 => Theirs::Idle,
            Theirs::Working(mut doc, covers) => {
                self.covered = self.covered.max(covers);
                for field in ["locked_at", "possibly_deleted_at", "retries", "dirty_at"] {
                    doc[field] = Value::Null;
                }
                doc["dirty"] = json!(false);
                match self.store.put(doc) {
                    Some(_) => Theirs::Idle,
                    None => Theirs::Unlocking,
                }
            }
            Theirs::Unlocking => {
                let mut doc = doc;
                doc["locked_at"] = Value::Null;
                doc["possibly_deleted_at"] = Value::Null;
                self.store.put(doc);
                Theirs::Idle
            }
        };
    }

    /// The first is the original's, the other ours.
    fn dirtier(&mut self, index: usize) {
        let now = self.now();
        let mut dirtier = std::mem::take(&mut self.dirtiers[index]);
        match (dirtier.change, dirtier.read.take()) {
            (None, _) => {
                self.changes += 1;
                dirtier.change = Some(self.changes);
            }
            (Some(_), None) => dirtier.read = Some(self.store.doc.clone()),
            (Some(change), Some(mut doc)) => {
                let write = match index {
                    0 if doc["dirty"] == json!(true) && doc["locked_at"].is_null() => None,
                    0 => {
                        doc["dirty"] = json!(true);
                        doc["dirty_at"] = Value::Null;
                        Some(doc)
                    }
                    _ => owed(&doc, now),
                };
                if write.is_none_or(|doc| self.store.put(doc).is_some()) {
                    self.told = self.told.max(change);
                    dirtier.change = None;
                }
            }
        }
        self.dirtiers[index] = dirtier;
    }

    fn step(&mut self, actor: u8, choice: u8, pause: u8) {
        self.clock += match pause {
            0..200 => 0,
            200..240 => 1,
            240..252 => 25,
            _ => 300,
        };
        match actor % 16 {
            actor @ 0..6 => self.ours(usize::from(actor % 3), choice),
            actor @ 6..10 => self.theirs(usize::from(actor % 2), choice),
            actor @ 10..15 => self.dirtier(usize::from(actor % 2)),
            _ => self.kill(usize::from(choice % 3)),
        }
        self.check();
    }

    fn check(&self) {
        let doc = &self.store.doc;
        assert_eq!(doc["kept"], 7, "{doc}");
        if doc["dirty"] == json!(false) && doc["dirty_at"].is_null() {
            assert!(self.covered >= self.told, "{} of {} changes are worked, and it is clean: {doc}", self.covered, self.told);
        }
    }

    /// Everybody lives, and nothing new comes.
    fn settle(&mut self) {
        for round in 0..400u64 {
            self.clock += 10;
            for index in 0..2 {
                if self.dirtiers[index].change.is_some() {
                    self.dirtier(index);
                }
                self.theirs(index, 1);
            }
            for index in 0..3 {
                self.ours(index, if round.is_multiple_of(2) { 0 } else { 4 });
            }
            self.check();
        }
        assert!(self.dirtiers.iter().all(|dirtier| dirtier.change.is_none()));
        let doc = &self.store.doc;
        assert_eq!((&doc["dirty"], doc["locked_at"].is_null()), (&json!(false), true), "it is worked in the end: {doc}");
        assert!(self.covered >= self.told && self.told == self.changes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn nothing_is_cleaned_away_and_no_living_lock_is_taken(steps in prop::collection::vec((any::<u8>(), any::<u8>(), any::<u8>()), 1..400)) {
        let mut model = Model::new();
        for (actor, choice, pause) in steps {
            model.step(actor, choice, pause);
        }
        model.settle();
    }
}
