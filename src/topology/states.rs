//! What each replicator is doing, and what to do next: the pure core of the topology.
//!
//! One run of a replicator at a time. Dirtied while it runs, it runs again. What fails backs off, and what cannot finish soon
//! becomes durable in its document, in the original's words: due now is `dirty: true`, backing off is `dirty: false` with a
//! `dirty_at`, settled is `dirty: false`. Whoever waits is told once the work is done or durable.

use crate::couch::generation;
use crate::job::Piece;
use crate::replicate::{Progress, shown};
use crate::topology::replicator::Replicator;
use crate::topology::status::{Counts, Doc, LastRun, RunState, Status};
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub type Id = Arc<str>;

#[derive(Debug)]
pub enum Action {
    Start(Id),
    /// Write the document; the pieces are done once that is confirmed.
    Save {
        id: Id,
        change: Change,
        pieces: Vec<Piece>,
    },
    Log {
        id: Id,
        line: Line,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Due now.
    Dirty,
    /// Due now, where the document does not say so already; somebody else may take it.
    Owed,
    /// Due at that time, after so many failures.
    DirtyAt { at: SystemTime, retries: u32, is_source_gone: bool },
    /// Settled, unless the document changed since the known revision.
    Clean,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    Failing { error: String, retry_in: Duration, missing: bool },
    Recovered { failures: u32 },
    CannotRun { error: String },
}

/// A run that failed.
#[derive(Debug, Clone)]
pub struct RunFailure {
    pub error: String,
    /// The source or the target does not exist.
    pub missing: bool,
    /// It is the source, on the watched server: nothing is left to bring.
    pub is_source_gone: bool,
    pub after: Option<Duration>,
}

/// A write of ours that CouchDB confirmed.
#[derive(Debug, Clone)]
pub struct Saved {
    pub rev: String,
    /// Somebody else had written the document since the revision that we knew.
    pub foreign: bool,
}

#[derive(Debug)]
enum Phase {
    Idle,
    Waiting { until: SystemTime },
    Running { again: bool },
}

#[derive(Debug)]
struct Entry {
    replicator: Arc<Replicator>,
    phase: Phase,
    /// Told when the work that waits or runs now is done or durable.
    waiters: Vec<Piece>,
    /// Came while it was running: the next run is theirs.
    next_waiters: Vec<Piece>,
    retries: u32,
    /// The document says that there is work.
    durable: bool,
    /// Writes of ours under way: what the document says is not news until they are confirmed.
    saving: u32,
    /// The newest revision that we know of, ours or somebody else's.
    known_rev: Arc<str>,
    /// A run has ended, or the document said that it is settled.
    has_run: bool,
    /// No engine can make what the document asks for.
    cannot_run: bool,
    /// Of the run that waits for its turn or is under way.
    progress: Option<Arc<Progress>>,
    last_run: Option<Box<LastRun>>,
    /// Why the last run failed.
    error: Option<Box<str>>,
}

/// Where a replicator stands, as far as its state depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Idle,
    /// For its time.
    Waiting,
    /// For its turn.
    Queued,
    Started,
}

/// CouchDB's word for it. What failed is crashing until it runs again, also while it waits for its turn.
fn state_of(stage: Stage, failures: u32, has_run: bool) -> RunState {
    match (stage, failures, has_run) {
        (Stage::Started, ..) => RunState::Running,
        (Stage::Idle, ..) => RunState::Completed,
        (_, 1.., _) => RunState::Crashing,
        (_, _, false) => RunState::Initializing,
        (_, _, true) => RunState::Pending,
    }
}

/// Of an error's text.
const ERROR_CHARS_MAX: usize = 300;

#[derive(Debug, Default)]
pub struct States {
    /// What the documents say is for whoever locks them.
    by_locks: bool,
    entries: HashMap<Id, Entry>,
    due: BTreeSet<(SystemTime, Id)>,
}

impl States {
    /// Whether runs are left to whoever locks the documents. When that ends, what they say is ours again.
    pub fn by_locks(&mut self, by_locks: bool) -> Vec<Action> {
        if std::mem::replace(&mut self.by_locks, by_locks) == by_locks || by_locks {
            return Vec::new();
        }
        let is_left = |entry: &Entry| matches!(entry.phase, Phase::Idle) && !entry.cannot_run && entry.durable;
        let left: Vec<Id> = self.entries.iter().filter(|(_, entry)| is_left(entry)).map(|(id, _)| id.clone()).collect();
        let mut actions = Vec::new();
        for id in left {
            let Some(entry) = self.entries.get(&id) else { continue };
            match entry.replicator.dirty_at.filter(|_| !entry.replicator.dirty && entry.replicator.rev == entry.known_rev) {
                Some(at) => self.wait(&id, at),
                None => actions.extend(self.run_soon(&id, None)),
            }
        }
        actions
    }

    /// The run that was to start is left to whoever locks the document.
    pub fn leave(&mut self, id: &Id) -> Option<Action> {
        let entry = self.entries.get_mut(id)?;
        entry.phase = Phase::Idle;
        let mut pieces = std::mem::take(&mut entry.waiters);
        pieces.append(&mut entry.next_waiters);
        Some(save(id, entry, Change::Owed, pieces))
    }

    /// What the documents say now.
    pub fn documents(&mut self, replicators: &HashMap<Id, Arc<Replicator>>) -> Vec<Action> {
        let gone: Vec<Id> = self.entries.keys().filter(|id| !replicators.contains_key(*id)).cloned().collect();
        for id in gone {
            self.remove(&id);
        }
        let mut actions = Vec::new();
        for (id, replicator) in replicators {
            actions.extend(self.document(id, replicator));
        }
        actions
    }

    /// What one document says now.
    pub fn document(&mut self, id: &Id, replicator: &Arc<Replicator>) -> Vec<Action> {
        match self.entries.get_mut(id) {
            Some(entry) if entry.saving > 0 || entry.replicator.rev == replicator.rev && !entry.known_rev.is_empty() => {
                Vec::new()
            }
            // Our own write, as the feed tells of it; or an older one of ours that the feed was slow to tell of.
            Some(entry) if entry.known_rev == replicator.rev || generation(&replicator.rev) < generation(&entry.known_rev) => {
                entry.replicator = replicator.clone();
                Vec::new()
            }
            _ => self.news(id, replicator),
        }
    }

    /// A document that is new, or that somebody else wrote.
    fn news(&mut self, id: &Id, replicator: &Arc<Replicator>) -> Vec<Action> {
        let entry = self.entries.entry(id.clone()).or_insert_with(|| Entry {
            replicator: replicator.clone(),
            phase: Phase::Idle,
            waiters: Vec::new(),
            next_waiters: Vec::new(),
            retries: u32::try_from(replicator.retries).unwrap_or(u32::MAX),
            durable: false,
            saving: 0,
            known_rev: Arc::default(),
            has_run: !replicator.dirty,
            cannot_run: false,
            progress: None,
            last_run: None,
            error: None,
        });
        entry.replicator = replicator.clone();
        entry.cannot_run = false;
        entry.known_rev = replicator.rev.clone();
        let durable_before = std::mem::replace(&mut entry.durable, replicator.dirty || replicator.dirty_at.is_some());
        match (replicator.dirty, replicator.dirty_at, &mut entry.phase) {
            // Not seen by the run under way: its end settles what it began with, and not this.
            (true, _, Phase::Running { again }) | (_, Some(_), Phase::Running { again }) if self.by_locks => {
                *again = true;
                Vec::new()
            }
            (true, ..) | (_, Some(_), _) if self.by_locks => Vec::new(),
            (true, _, _) => self.run_soon(id, None),
            // The run under way will settle the document; what somebody else wants then is one more run.
            (false, Some(_), Phase::Running { .. }) => self.run_soon(id, None),
            (false, Some(at), _) => {
                self.wait(id, at);
                Vec::new()
            }
            // Somebody wrote over what made the waiting work durable.
            (false, None, Phase::Waiting { until }) if durable_before => {
                let change = Change::DirtyAt { at: *until, retries: entry.retries, is_source_gone: false };
                vec![save(id, entry, change, Vec::new())]
            }
            (false, None, _) => Vec::new(),
        }
    }

    fn remove(&mut self, id: &Id) {
        if let Some(entry) = self.entries.remove(id) {
            if let Phase::Waiting { until } = entry.phase {
                self.due.remove(&(until, id.clone()));
            }
            // Without its document there is no work left to wait for.
            for piece in entry.waiters.into_iter().chain(entry.next_waiters) {
                piece.done();
            }
        }
    }

    /// Its source changed.
    pub fn dirty(&mut self, now: SystemTime, id: &Id, piece: Option<Piece>) -> Vec<Action> {
        let Some(entry) = self.entries.get_mut(id) else {
            // Not read yet: its document is new, and a new one runs at once.
            if let Some(piece) = piece {
                piece.done();
            }
            return Vec::new();
        };
        if entry.cannot_run && entry.is_durable() {
            piece.into_iter().for_each(Piece::done);
            return Vec::new();
        }
        match &mut entry.phase {
            Phase::Idle => match entry.replicator.dirty_after {
                Some(delay) => {
                    entry.waiters.extend(piece);
                    self.wait(id, now + delay);
                    Vec::new()
                }
                None => self.run_soon(id, piece),
            },
            Phase::Waiting { .. } => {
                match piece {
                    Some(piece) if entry.is_durable() => piece.done(),
                    piece => entry.waiters.extend(piece),
                }
                Vec::new()
            }
            Phase::Running { again } => {
                *again = true;
                entry.next_waiters.extend(piece);
                Vec::new()
            }
        }
    }

    /// Runs now, whatever it waits for; while it runs, it will run again.
    fn run_soon(&mut self, id: &Id, piece: Option<Piece>) -> Vec<Action> {
        let Some(entry) = self.entries.get_mut(id) else { return Vec::new() };
        match &mut entry.phase {
            Phase::Running { again } => {
                *again = true;
                entry.next_waiters.extend(piece);
                return Vec::new();
            }
            Phase::Waiting { until } => drop(self.due.remove(&(*until, id.clone()))),
            Phase::Idle => {}
        }
        entry.waiters.extend(piece);
        entry.phase = Phase::Running { again: false };
        vec![Action::Start(id.clone())]
    }

    fn wait(&mut self, id: &Id, at: SystemTime) {
        if let Some(entry) = self.entries.get_mut(id) {
            if let Phase::Waiting { until } = entry.phase {
                self.due.remove(&(until, id.clone()));
            }
            entry.phase = Phase::Waiting { until: at };
            self.due.insert((at, id.clone()));
        }
    }

    /// `delay` is asked for the backoff after so many failures before this one.
    pub fn run_ended(
        &mut self,
        now: SystemTime,
        id: &Id,
        result: Result<(), RunFailure>,
        delay: impl FnOnce(u32) -> Duration,
    ) -> Vec<Action> {
        let Some(entry) = self.entries.get_mut(id) else { return Vec::new() };
        let Phase::Running { again } = entry.phase else { return Vec::new() };
        entry.phase = Phase::Idle;
        entry.has_run = true;
        let seen = entry.progress.take().map(|progress| progress.seen()).unwrap_or_default();
        // As in `_replicate`'s answers, a run without changes leaves what the one before it did.
        if entry.last_run.is_none() || result.is_err() || !seen.report().no_changes {
            entry.last_run = LastRun::of(&seen).map(Box::new).or(entry.last_run.take());
        }
        entry.error = result.as_ref().err().map(|failure| shown(&failure.error, ERROR_CHARS_MAX).into());
        match result {
            Ok(()) => self.succeeded(now, id, again),
            Err(failure) => {
                let retry_in = delay(entry.retries).max(failure.after.unwrap_or_default());
                entry.retries = entry.retries.saturating_add(1);
                let mut pieces = std::mem::take(&mut entry.waiters);
                pieces.append(&mut entry.next_waiters);
                let is_source_gone = failure.is_source_gone;
                let change = Change::DirtyAt { at: now + retry_in, retries: entry.retries, is_source_gone };
                let mut actions = vec![save(id, entry, change, pieces)];
                if entry.retries == 1 {
                    let line = Line::Failing { error: failure.error, retry_in, missing: failure.missing };
                    actions.push(Action::Log { id: id.clone(), line });
                }
                self.wait(id, now + retry_in);
                actions
            }
        }
    }

    /// No engine can make what it asks for: what it owes stays in the document until somebody changes that.
    pub fn cannot_run(&mut self, id: &Id, error: &str) -> Vec<Action> {
        let Some(entry) = self.entries.get_mut(id) else { return Vec::new() };
        entry.phase = Phase::Idle;
        let error = shown(error, ERROR_CHARS_MAX);
        entry.error = Some(error.as_str().into());
        let mut pieces = std::mem::take(&mut entry.waiters);
        pieces.append(&mut entry.next_waiters);
        let mut actions = Vec::new();
        match entry.is_durable() {
            true => pieces.into_iter().for_each(Piece::done),
            false => actions.push(save(id, entry, Change::Dirty, pieces)),
        }
        if !std::mem::replace(&mut entry.cannot_run, true) {
            actions.push(Action::Log { id: id.clone(), line: Line::CannotRun { error } });
        }
        actions
    }

    fn succeeded(&mut self, now: SystemTime, id: &Id, again: bool) -> Vec<Action> {
        let mut actions = Vec::new();
        let Some(entry) = self.entries.get_mut(id) else { return actions };
        if entry.retries > 0 {
            actions.push(Action::Log { id: id.clone(), line: Line::Recovered { failures: entry.retries } });
            entry.retries = 0;
        }
        for piece in std::mem::take(&mut entry.waiters) {
            piece.done();
        }
        entry.waiters = std::mem::take(&mut entry.next_waiters);
        match (again, entry.replicator.dirty_after) {
            (true, Some(delay)) => self.wait(id, now + delay),
            (true, None) => actions.extend(self.run_soon(id, None)),
            (false, _) if entry.durable || entry.saving > 0 => actions.push(save(id, entry, Change::Clean, Vec::new())),
            (false, _) => {}
        }
        actions
    }

    /// A write was confirmed; None where it was not made, because the document is gone or was changed by somebody else.
    pub fn saved(&mut self, id: &Id, change: &Change, saved: Option<Saved>) -> Vec<Action> {
        let Some(entry) = self.entries.get_mut(id) else { return Vec::new() };
        entry.saving = entry.saving.saturating_sub(1);
        match saved {
            None => Vec::new(),
            Some(saved) => {
                entry.known_rev = saved.rev.into();
                entry.durable = *change != Change::Clean;
                match saved.foreign {
                    // We wrote over somebody's word, which may have been that there is work.
                    true => self.run_soon(id, None),
                    false => Vec::new(),
                }
            }
        }
    }

    /// A write was folded into another one that waits.
    pub fn folded(&mut self, id: &Id) {
        if let Some(entry) = self.entries.get_mut(id) {
            entry.saving = entry.saving.saturating_sub(1);
        }
    }

    /// What is still only in memory becomes durable.
    pub fn spill(&mut self, id: &Id, piece: Option<Piece>) -> Vec<Action> {
        let mut told: Vec<Piece> = piece.into_iter().collect();
        if let Some(entry) = self.entries.get_mut(id) {
            let change = match entry.phase {
                Phase::Idle => None,
                // Again, although it may be durable: the run's end settles only what the document says by then.
                Phase::Running { again } if again || !entry.is_durable() => Some(Change::Dirty),
                Phase::Waiting { until } if !entry.is_durable() => {
                    Some(Change::DirtyAt { at: until, retries: entry.retries, is_source_gone: false })
                }
                _ => None,
            };
            if let Some(change) = change {
                told.append(&mut entry.waiters);
                told.append(&mut entry.next_waiters);
                return vec![save(id, entry, change, told)];
            }
        }
        for piece in told {
            piece.done();
        }
        Vec::new()
    }

    pub fn spill_all(&mut self, mut piece: impl FnMut() -> Option<Piece>) -> Vec<Action> {
        let busy = self.entries.iter().filter(|(_, entry)| !matches!(entry.phase, Phase::Idle));
        let busy: Vec<Id> = busy.map(|(id, _)| id.clone()).collect();
        busy.iter().flat_map(|id| self.spill(id, piece())).collect()
    }

    pub fn tick(&mut self, now: SystemTime) -> Vec<Action> {
        let mut actions = Vec::new();
        while let Some((until, id)) = self.due.first().cloned()
            && until <= now
        {
            actions.extend(self.run_soon(&id, None));
            self.due.remove(&(until, id));
        }
        actions
    }

    pub fn next_due(&self) -> Option<SystemTime> {
        self.due.first().map(|(until, _)| *until)
    }

    pub fn known_rev(&self, id: &Id) -> Option<&Arc<str>> {
        self.entries.get(id).map(|entry| &entry.known_rev)
    }

    pub fn replicator(&self, id: &Id) -> Option<&Arc<Replicator>> {
        self.entries.get(id).map(|entry| &entry.replicator)
    }

    pub fn busy(&self) -> usize {
        self.entries.values().filter(|entry| !matches!(entry.phase, Phase::Idle)).count()
    }

    /// Its run was asked for; what becomes of it is seen there.
    pub fn asked_for(&mut self, id: &Id, progress: Arc<Progress>) {
        if let Some(entry) = self.entries.get_mut(id) {
            entry.progress = Some(progress);
        }
    }

    /// `invalid` are documents that nobody can run, each with what is wrong.
    pub fn counts(&self, invalid: &BTreeMap<Id, Arc<str>>) -> Counts {
        let mut counts = Counts::default();
        counts.add(RunState::Failed, invalid.len());
        self.entries.values().for_each(|entry| counts.add(entry.state(), 1));
        counts
    }

    /// With so many replicators at most: of each state the first by id.
    pub fn status(&self, invalid: &BTreeMap<Id, Arc<str>>, docs_max: usize) -> Status {
        let mut counts = Counts::default();
        let mut first: BTreeMap<RunState, BinaryHeap<&Id>> = BTreeMap::new();
        for (id, entry) in &self.entries {
            let state = entry.state();
            counts.add(state, 1);
            let ids = first.entry(state).or_default();
            ids.push(id);
            if ids.len() > docs_max {
                ids.pop();
            }
        }
        counts.add(RunState::Failed, invalid.len());
        first.entry(RunState::Failed).or_default().extend(invalid.keys().take(docs_max));
        let ids = first.into_iter().flat_map(|(state, ids)| ids.into_sorted_vec().into_iter().map(move |id| (state, id)));
        let docs = ids.take(docs_max).filter_map(|(state, id)| match invalid.get(id) {
            Some(reasons) if state == RunState::Failed => Some(invalid_doc(id, reasons)),
            _ => Some(self.entries.get(id)?.doc(id, state)),
        });
        Status { counts, docs: docs.collect() }
    }
}

fn invalid_doc(id: &Id, reasons: &str) -> Doc {
    Doc {
        id: id.clone(),
        source: None,
        target: None,
        state: RunState::Failed,
        engine: None,
        error_count: 0,
        error: Some(shown(reasons, ERROR_CHARS_MAX)),
        next_try_at: None,
        run: None,
        changes_pending: None,
        through_seq: None,
    }
}

impl Entry {
    /// While a write of ours is under way, what the document will say is not known.
    fn is_durable(&self) -> bool {
        self.durable && self.saving == 0
    }

    fn state(&self) -> RunState {
        let has_started = || self.progress.as_ref().is_some_and(|progress| progress.has_started());
        let stage = match self.phase {
            Phase::Idle if self.cannot_run => return RunState::Failed,
            Phase::Idle => Stage::Idle,
            Phase::Waiting { .. } => Stage::Waiting,
            Phase::Running { .. } if has_started() => Stage::Started,
            Phase::Running { .. } => Stage::Queued,
        };
        state_of(stage, self.retries, self.has_run)
    }

    fn doc(&self, id: &Id, state: RunState) -> Doc {
        let seen = self.progress.as_ref().map(|progress| progress.seen()).unwrap_or_default();
        Doc {
            id: id.clone(),
            source: Some(self.replicator.source.to_string()),
            target: Some(self.replicator.target.to_string()),
            state,
            engine: self.replicator.engine,
            error_count: self.retries,
            error: self.error.as_deref().map(String::from),
            next_try_at: match self.phase {
                Phase::Waiting { until } => Some(until),
                _ => None,
            },
            run: LastRun::of(&seen).or_else(|| self.last_run.as_deref().cloned()),
            changes_pending: seen.changes_pending,
            through_seq: seen.through_seq,
        }
    }
}

fn save(id: &Id, entry: &mut Entry, change: Change, pieces: Vec<Piece>) -> Action {
    entry.saving += 1;
    Action::Save { id: id.clone(), change, pieces }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::job::Completion;
    use crate::replicate::{self, Report};
    use proptest::prelude::*;
    use serde_json::json;

    const BACKOFF: Duration = Duration::from_secs(5);

    fn doc(id: &str, rev: &str, fields: serde_json::Value) -> Arc<Replicator> {
        let mut doc = json!({ "_id": id, "_rev": rev, "type": "replicator", "source": "http://h/a", "target": "http://h/b" });
        for (name, value) in fields.as_object().expect("fields") {
            doc[name] = value.clone();
        }
        Arc::new(Replicator::parse(&doc).expect("a good document"))
    }

    fn clean(rev: &str) -> Arc<Replicator> {
        doc("r", rev, json!({ "dirty": false }))
    }

    fn id() -> Id {
        "r".into()
    }

    fn kinds(actions: &[Action]) -> Vec<&'static str> {
        let kind = |action: &Action| match action {
            Action::Start(_) => "start",
            Action::Save { change: Change::Dirty, .. } => "save dirty",
            Action::Save { change: Change::Owed, .. } => "save owed",
            Action::Save { change: Change::DirtyAt { .. }, .. } => "save dirty_at",
            Action::Save { change: Change::Clean, .. } => "save clean",
            Action::Log { .. } => "log",
        };
        actions.iter().map(kind).collect()
    }

    fn failure() -> RunFailure {
        RunFailure { error: String::from("no"), missing: false, is_source_gone: false, after: None }
    }

    /// Confirms the saves among the actions, as CouchDB would.
    fn confirm(states: &mut States, actions: Vec<Action>, rev: &str) -> Vec<Action> {
        let mut next = Vec::new();
        for action in actions {
            if let Action::Save { id, change, pieces } = action {
                next.extend(states.saved(&id, &change, Some(Saved { rev: rev.to_string(), foreign: false })));
                pieces.into_iter().for_each(Piece::done);
            }
        }
        next
    }

    fn is_kept(kept: &mut tokio::sync::oneshot::Receiver<()>) -> bool {
        kept.try_recv().is_ok()
    }

    #[test]
    fn a_new_replicator_runs_at_once_and_is_then_settled() {
        let mut states = States::default();
        let actions = states.document(&id(), &doc("r", "1-a", json!({})));
        assert_eq!(kinds(&actions), ["start"]);
        let actions = states.run_ended(SystemTime::now(), &id(), Ok(()), |_| BACKOFF);
        assert_eq!(kinds(&actions), ["save clean"]);
        confirm(&mut states, actions, "2-b");
        assert!(states.document(&id(), &clean("2-b")).is_empty(), "our own write is no news");
        assert_eq!(states.busy(), 0);
    }

    #[test]
    fn by_locks_what_is_due_is_left_to_others_and_comes_back_when_they_are_gone() {
        let now = SystemTime::now();
        let mut states = States::default();
        assert!(states.by_locks(true).is_empty());
        assert!(states.document(&id(), &doc("r", "1-a", json!({}))).is_empty(), "whoever locks it sees to it");
        assert!(
            states
                .document(&id(), &doc("r", "2-locked", json!({ "dirty": true, "locked_at": "2026-01-01T00:00:00Z" })))
                .is_empty()
        );
        assert!(states.document(&id(), &clean("3-done")).is_empty());
        let (mut pieces, mut kept) = Completion::of(1);
        assert_eq!(kinds(&states.dirty(now, &id(), pieces.pop())), ["start"]);
        let actions: Vec<Action> = states.leave(&id()).into_iter().collect();
        assert_eq!((kinds(&actions), states.busy()), (vec!["save owed"], 0));
        assert!(!is_kept(&mut kept), "it is not durable yet");
        assert!(confirm(&mut states, actions, "4-ours").is_empty());
        assert!(is_kept(&mut kept));
        assert!(states.by_locks(true).is_empty());
        assert_eq!(kinds(&states.by_locks(false)), ["start"], "nobody else has done it yet, as far as we know");

        let mut states = States::default();
        states.by_locks(true);
        states.document(&id(), &doc("r", "1-a", json!({ "dirty": false, "dirty_at": "2200-01-01T00:00:00Z" })));
        assert_eq!((states.next_due(), states.by_locks(false).len()), (None, 0));
        assert!(states.next_due().is_some(), "it has a time");
    }

    #[test]
    fn by_locks_what_others_say_during_a_run_is_not_settled_by_its_end() {
        let now = SystemTime::now();
        let lock = json!("2026-01-01T00:00:00Z");
        let cases = [
            (json!({ "dirty": true }), vec!["start"]),
            (json!({ "dirty": true, "locked_at": lock }), vec!["start"]),
            (json!({ "dirty": false, "dirty_at": "2200-01-01T00:00:00Z" }), vec!["start"]),
            (json!({ "dirty": false }), vec![]),
        ];
        for (said, expected) in cases {
            let mut states = States::default();
            states.document(&id(), &doc("r", "1-a", json!({})));
            states.by_locks(true);
            assert!(states.document(&id(), &doc("r", "2-theirs", said.clone())).is_empty(), "{said}");
            assert_eq!(kinds(&states.run_ended(now, &id(), Ok(()), |_| BACKOFF)), expected, "{said}");
        }
    }

    #[test]
    fn in_steady_state_a_change_costs_no_write() {
        let now = SystemTime::now();
        let mut states = States::default();
        states.document(&id(), &clean("1-a"));
        let (mut pieces, mut kept) = Completion::of(1);
        assert_eq!(kinds(&states.dirty(now, &id(), pieces.pop())), ["start"]);
        assert!(states.run_ended(now, &id(), Ok(()), |_| BACKOFF).is_empty());
        assert!(is_kept(&mut kept));
    }

    #[test]
    fn dirtied_while_it_runs_it_runs_again() {
        let now = SystemTime::now();
        let mut states = States::default();
        states.document(&id(), &clean("1-a"));
        states.dirty(now, &id(), None);
        let (mut pieces, mut kept) = Completion::of(1);
        assert!(states.dirty(now, &id(), pieces.pop()).is_empty(), "one run at a time");
        assert_eq!(kinds(&states.run_ended(now, &id(), Ok(()), |_| BACKOFF)), ["start"]);
        assert!(!is_kept(&mut kept), "the next run is theirs");
        states.run_ended(now, &id(), Ok(()), |_| BACKOFF);
        assert!(is_kept(&mut kept));
    }

    #[test]
    fn a_failure_backs_off_durably_and_is_told_once() {
        let now = SystemTime::now();
        let mut states = States::default();
        states.document(&id(), &clean("1-a"));
        let (mut pieces, mut kept) = Completion::of(1);
        states.dirty(now, &id(), pieces.pop());
        let actions = states.run_ended(now, &id(), Err(failure()), |_| BACKOFF);
        assert_eq!(kinds(&actions), ["save dirty_at", "log"]);
        assert!(!is_kept(&mut kept), "not before it is durable");
        confirm(&mut states, actions, "2-b");
        assert!(is_kept(&mut kept));
        assert_eq!(states.next_due(), Some(now + BACKOFF));
        assert!(states.tick(now).is_empty());
        assert_eq!(kinds(&states.tick(now + BACKOFF)), ["start"]);
        let actions = states.run_ended(now + BACKOFF, &id(), Err(failure()), |_| BACKOFF);
        assert_eq!(kinds(&actions), ["save dirty_at"], "no second line");
        confirm(&mut states, actions, "3-c");
        states.tick(now + BACKOFF * 2);
        assert_eq!(kinds(&states.run_ended(now, &id(), Ok(()), |_| BACKOFF)), ["log", "save clean"]);
    }

    #[test]
    fn a_change_during_backoff_waits_with_it() {
        let now = SystemTime::now();
        let mut states = States::default();
        states.document(&id(), &doc("r", "1-a", json!({ "dirty": false, "dirty_at": "2099-01-01T00:00:00Z", "retries": 3 })));
        let (mut pieces, mut kept) = Completion::of(1);
        assert!(states.dirty(now, &id(), pieces.pop()).is_empty());
        assert!(is_kept(&mut kept), "the document says already that there is work");
    }

    #[test]
    fn dirty_after_milliseconds_delays_the_run_and_gathers() {
        let now = SystemTime::now();
        let mut states = States::default();
        states.document(&id(), &doc("r", "1-a", json!({ "dirty": false, "dirty_after_milliseconds": 1000 })));
        assert!(states.dirty(now, &id(), None).is_empty());
        assert!(states.dirty(now + Duration::from_millis(900), &id(), None).is_empty());
        assert_eq!(kinds(&states.tick(now + Duration::from_secs(1))), ["start"]);
    }

    #[test]
    fn somebody_else_dirtying_the_document_runs_it() {
        let mut states = States::default();
        states.document(&id(), &clean("1-a"));
        assert_eq!(kinds(&states.document(&id(), &doc("r", "2-x", json!({ "dirty": true })))), ["start"]);
        // Again while it runs, and then once more.
        states.document(&id(), &doc("r", "3-y", json!({ "dirty": true })));
        assert_eq!(kinds(&states.run_ended(SystemTime::now(), &id(), Ok(()), |_| BACKOFF)), ["start"]);
    }

    #[test]
    fn the_feed_telling_late_of_our_own_writes_is_no_news() {
        let now = SystemTime::now();
        let mut states = States::default();
        states.document(&id(), &clean("1-a"));
        states.dirty(now, &id(), None);
        let actions = states.spill(&id(), None);
        assert_eq!(kinds(&actions), ["save dirty"]);
        confirm(&mut states, actions, "2-b");
        let actions = states.run_ended(now, &id(), Ok(()), |_| BACKOFF);
        assert_eq!(kinds(&actions), ["save clean"]);
        confirm(&mut states, actions, "3-c");
        assert!(states.document(&id(), &doc("r", "2-b", json!({ "dirty": true }))).is_empty());
        assert!(states.document(&id(), &clean("3-c")).is_empty());
        assert_eq!(states.busy(), 0);
    }

    #[test]
    fn writing_over_somebody_elses_word_runs_again() {
        let now = SystemTime::now();
        let mut states = States::default();
        states.document(&id(), &clean("1-a"));
        states.dirty(now, &id(), None);
        states.spill(&id(), None);
        let actions = states.saved(&id(), &Change::Dirty, Some(Saved { rev: String::from("3-c"), foreign: true }));
        assert!(actions.is_empty());
        assert_eq!(kinds(&states.run_ended(now, &id(), Ok(()), |_| BACKOFF)), ["start"]);
    }

    #[test]
    fn what_is_spilled_right_after_it_was_dirtied_is_written() {
        let now = SystemTime::now();
        // Not told of yet, running already, and settled a moment ago with the write still on its way.
        for started in [false, true] {
            let mut states = States::default();
            states.document(&id(), &clean("1-a"));
            if started {
                states.dirty(now, &id(), None);
            }
            states.dirty(now, &id(), None);
            let (mut pieces, mut kept) = Completion::of(1);
            let actions = states.spill(&id(), pieces.pop());
            assert_eq!(kinds(&actions), ["save dirty"]);
            assert!(!is_kept(&mut kept));
        }
        let mut states = States::default();
        states.document(&id(), &doc("r", "1-a", json!({})));
        let settling = states.run_ended(now, &id(), Ok(()), |_| BACKOFF);
        assert_eq!(kinds(&settling), ["save clean"]);
        states.dirty(now, &id(), None);
        let (mut pieces, _kept) = Completion::of(1);
        assert_eq!(kinds(&states.spill(&id(), pieces.pop())), ["save dirty"], "the clean one is on its way");
    }

    #[test]
    fn without_its_document_nobody_waits() {
        let mut states = States::default();
        states.document(&id(), &clean("1-a"));
        let (mut pieces, mut kept) = Completion::of(1);
        states.dirty(SystemTime::now(), &id(), pieces.pop());
        states.documents(&HashMap::new());
        assert!(is_kept(&mut kept));
        assert!(states.run_ended(SystemTime::now(), &id(), Ok(()), |_| BACKOFF).is_empty());
    }

    #[test]
    fn the_state_has_couchdbs_name() {
        for (stage, failures, has_run, expected) in [
            (Stage::Queued, 0, false, RunState::Initializing),
            (Stage::Waiting, 0, false, RunState::Initializing),
            (Stage::Queued, 0, true, RunState::Pending),
            (Stage::Waiting, 0, true, RunState::Pending),
            (Stage::Started, 0, false, RunState::Running),
            (Stage::Started, 0, true, RunState::Running),
            (Stage::Started, 3, true, RunState::Running),
            (Stage::Waiting, 1, true, RunState::Crashing),
            (Stage::Waiting, 1, false, RunState::Crashing),
            (Stage::Queued, 1, true, RunState::Crashing),
            (Stage::Idle, 0, true, RunState::Completed),
            (Stage::Idle, 0, false, RunState::Completed),
        ] {
            assert_eq!(state_of(stage, failures, has_run), expected, "{stage:?} {failures} {has_run}");
        }
    }

    fn only(states: &States) -> Doc {
        let status = states.status(&BTreeMap::new(), 10);
        assert_eq!(status.docs.len(), 1);
        assert_eq!(status.counts.of(status.docs[0].state), 1);
        assert_eq!(status.counts, states.counts(&BTreeMap::new()));
        status.docs[0].clone()
    }

    #[test]
    fn what_no_engine_can_make_fails_until_its_document_is_changed() {
        let now = SystemTime::now();
        for is_dirty in [true, false] {
            let mut states = States::default();
            states.document(&id(), &doc("r", "1-a", json!({ "dirty": is_dirty })));
            let (mut pieces, mut kept) = Completion::of(1);
            states.dirty(now, &id(), pieces.pop());
            let actions = states.cannot_run(&id(), "`proxy` needs http://u:hush@h/");
            let saves = actions.iter().filter(|action| matches!(action, Action::Save { change: Change::Dirty, .. })).count();
            assert_eq!(saves, usize::from(!is_dirty), "what the document does not say yet");
            confirm(&mut states, actions, "2-b");
            assert_eq!(kept.try_recv(), Ok(()), "nobody waits for it: {is_dirty}");
            let failed = only(&states);
            assert_eq!((failed.state, failed.next_try_at, failed.error_count), (RunState::Failed, None, 0));
            assert_eq!(failed.error.as_deref(), Some("`proxy` needs http://u:[redacted]@h/"));
            assert!(states.dirty(now, &id(), None).is_empty(), "it is owed already");
            assert!(states.tick(now + BACKOFF).is_empty() && states.next_due().is_none());
            let actions = states.document(&id(), &doc("r", "3-c", json!({ "dirty": true })));
            assert!(matches!(actions[..], [Action::Start(_)]), "somebody changed it: {actions:?}");
            states.run_ended(now, &id(), Ok(()), |_| BACKOFF);
            assert_eq!(only(&states).state, RunState::Completed);
        }
    }

    fn did(docs_written: u64) -> Report {
        Report { counts: replicate::Counts { docs_written, ..Default::default() }, ..Report::default() }
    }

    #[test]
    fn a_replicator_tells_what_it_is_doing() {
        let now = SystemTime::now();
        let mut states = States::default();
        states.document(&id(), &doc("r", "1-a", json!({})));
        assert_eq!(only(&states).state, RunState::Initializing);
        let progress = Arc::new(Progress::default());
        states.asked_for(&id(), progress.clone());
        assert_eq!(only(&states).state, RunState::Initializing, "it waits for its turn");
        progress.start(now);
        progress.so_far(did(3), Some(4), Some(5));
        let running = only(&states);
        assert_eq!((running.state, running.changes_pending, running.through_seq), (RunState::Running, Some(4), Some(5)));
        let actions =
            states.run_ended(now, &id(), Err(RunFailure { error: "at http://u:hush@h/b".into(), ..failure() }), |_| BACKOFF);
        confirm(&mut states, actions, "2-b");
        let crashing = only(&states);
        assert_eq!((crashing.state, crashing.error_count), (RunState::Crashing, 1));
        assert_eq!(crashing.error.as_deref(), Some("at http://u:[redacted]@h/b"));
        assert_eq!(crashing.next_try_at, Some(now + BACKOFF));
        states.tick(now + BACKOFF);
        assert_eq!(only(&states).state, RunState::Crashing, "until it runs");
        let progress = Arc::new(Progress::default());
        states.asked_for(&id(), progress.clone());
        progress.start(now);
        progress.end(&did(7), BACKOFF);
        states.run_ended(now, &id(), Ok(()), |_| BACKOFF);
        let completed = only(&states);
        assert_eq!((completed.state, completed.error_count, completed.error), (RunState::Completed, 0, None));
        assert_eq!(completed.run.as_ref().expect("a run").duration, Some(BACKOFF));
        states.dirty(now, &id(), None);
        assert_eq!(only(&states).state, RunState::Pending);
        let progress = Arc::new(Progress::default());
        states.asked_for(&id(), progress.clone());
        progress.start(now + BACKOFF);
        progress.end(&Report { no_changes: true, ..Report::default() }, BACKOFF * 2);
        states.run_ended(now, &id(), Ok(()), |_| BACKOFF);
        assert_eq!(only(&states).run, completed.run, "there was nothing to do");
    }

    #[test]
    fn the_list_is_bounded_and_begins_with_what_is_wrong() {
        let now = SystemTime::now();
        let mut states = States::default();
        for number in 0..40 {
            let name: Id = format!("r{number:02}").into();
            states.document(&name, &doc(&name, "1-a", json!({ "dirty": false })));
            if number >= 35 {
                states.dirty(now, &name, None);
                states.run_ended(now, &name, Err(failure()), |_| BACKOFF);
            }
        }
        let invalid: BTreeMap<Id, Arc<str>> = [("x".into(), "source is missing".into())].into();
        let status = states.status(&invalid, 8);
        let listed: Vec<&str> = status.docs.iter().map(|doc| &*doc.id).collect();
        assert_eq!(listed, ["r35", "r36", "r37", "r38", "r39", "x", "r00", "r01"]);
        assert_eq!(status.docs[5].error.as_deref(), Some("source is missing"));
        let counted = [RunState::Crashing, RunState::Failed, RunState::Completed].map(|state| status.counts.of(state));
        assert_eq!(counted, [5, 1, 35]);
    }

    proptest! {
        /// Whatever happens: one run at a time, and once all runs succeed everybody who waited was told.
        #[test]
        fn nobody_waits_for_ever(steps in prop::collection::vec(0u8..6, 1..60)) {
            let mut now = SystemTime::UNIX_EPOCH;
            let mut states = States::default();
            states.document(&id(), &clean("1-a"));
            let mut running = 0;
            let mut revs = 1;
            let mut waiting = Vec::new();
            let mut handle = |states: &mut States, actions: Vec<Action>, running: &mut i32| {
                let mut queue = actions;
                while !queue.is_empty() {
                    *running += queue.iter().filter(|action| matches!(action, Action::Start(_))).count() as i32;
                    revs += 1;
                    queue = confirm(states, queue, &format!("{revs}-x"));
                }
            };
            for step in steps.into_iter().chain([5, 2, 5, 2, 5, 2, 5, 2]) {
                now += Duration::from_secs(1);
                let actions = match step {
                    0 | 1 => {
                        let (mut pieces, kept) = Completion::of(1);
                        waiting.push(kept);
                        states.dirty(now, &id(), pieces.pop())
                    }
                    2 | 3 if running > 0 => {
                        running -= 1;
                        let result = if step == 2 { Ok(()) } else { Err(failure()) };
                        states.run_ended(now, &id(), result, |_| BACKOFF)
                    }
                    4 => states.spill(&id(), None),
                    _ => {
                        now += BACKOFF * 2;
                        states.tick(now)
                    }
                };
                handle(&mut states, actions, &mut running);
                prop_assert!((0..=1).contains(&running));
            }
            prop_assert_eq!(states.busy(), 0);
            for mut kept in waiting {
                prop_assert!(is_kept(&mut kept));
            }
        }
    }
}
