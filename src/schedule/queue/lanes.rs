//! The lanes of a queue as wholes: made, forgotten, stopped while their host is down.

use super::{Due, EntryId, Queue, Spec, State};
use crate::job::Outcome;
use crate::schedule::breaker::{Breaker, Ruling, Sign, View};
use crate::schedule::lane::{Lane, LaneId};
use crate::schedule::limits::Limits;
use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Hosts come from documents: no more than this many that nobody has a job for are remembered.
const LANES_KEPT_MAX: usize = 10_000;

/// The breaker of a lane changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BreakerChange {
    pub lane: Arc<str>,
    pub from: View,
    pub to: View,
    /// In a row.
    pub failures: u64,
    /// How long it was not closed.
    pub lasted: Duration,
    /// What the host said when it opened.
    pub reason: Arc<str>,
    /// It closed because nobody had a job for its host for long.
    pub forgotten: bool,
}

/// A breaker that is not closed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BreakerStatus {
    pub lane: Arc<str>,
    pub view: View,
    pub failures: u64,
    pub opened: Option<Instant>,
    pub reason: Arc<str>,
}

impl<S: Spec> Queue<S> {
    /// What the end of an attempt says of its host, and what follows for the job. To be called before `finished`. `error` holds
    /// no secret.
    pub fn heard(&mut self, id: EntryId, sign: Sign, error: &str, now: Instant, random: f64) -> Ruling {
        let Some(entry) = self.entries.get(&id).filter(|entry| entry.state == State::InFlight) else { return Ruling::Pass };
        let lane_id = entry.lane;
        let Some(lane) = self.lanes.get_mut(&lane_id) else { return Ruling::Pass };
        let Some(breaker) = &mut lane.breaker else { return Ruling::Pass };
        let before = breaker.clone();
        let ruling = breaker.heard(entry.spec.order_key(), entry.probe, sign, now, random);
        let (was_open, is_open) = (matches!(before.view(), View::Open { .. }), matches!(breaker.view(), View::Open { .. }));
        if is_open && !was_open {
            lane.reason = format!("no requests to {} until it has recovered: {error}", lane.name).into();
        }
        self.note_change(lane_id, &before, now);
        if is_open && !was_open {
            self.settle_unsent(lane_id, now);
        }
        if let (Ruling::Pass, Sign::Failing { pause: Some(pause) }) = (ruling, sign) {
            self.pause(lane_id, now + pause);
        }
        ruling
    }

    /// How many lanes have an open breaker, and a half-open one.
    pub fn not_closed(&self) -> (usize, usize) {
        self.not_closed
    }

    /// Some of the breakers that are not closed.
    pub fn breakers(&self, count_max: usize) -> Vec<BreakerStatus> {
        if self.not_closed == (0, 0) {
            return Vec::new();
        }
        let status = |lane: &Lane| {
            let breaker = lane.breaker.as_ref().filter(|breaker| breaker.view() != View::Closed)?;
            let (lane, reason) = (lane.name.clone(), lane.reason.clone());
            Some(BreakerStatus { lane, view: breaker.view(), failures: breaker.failures(), opened: breaker.opened(), reason })
        };
        self.lanes.values().filter_map(status).take(count_max).collect()
    }

    /// What happened to breakers since it was last asked.
    pub fn take_changes(&mut self) -> Vec<BreakerChange> {
        std::mem::take(&mut self.changes)
    }

    pub(super) fn lane_of(&mut self, name: &str, entry: EntryId, now: Instant) -> LaneId {
        let id = match self.lanes_by_name.get(name) {
            Some(id) => *id,
            None => {
                let id = LaneId(self.lanes_made);
                self.lanes_made += 1;
                let name: Arc<str> = name.into();
                self.lanes_by_name.insert(name.clone(), id);
                self.lanes.insert(id, Lane::new(name, Limits::new(self.limits, now), self.breaker.map(Breaker::new)));
                id
            }
        };
        if let Some(lane) = self.lanes.get_mut(&id) {
            lane.entries.insert(entry);
            self.lanes_kept -= usize::from(lane.kept_until.take().is_some());
        }
        id
    }

    pub(super) fn note_empty(&mut self, id: LaneId) {
        if let Some(lane) = self.lanes.get_mut(&id).filter(|lane| !lane.in_empty) {
            lane.in_empty = true;
            self.empty.push_back(id);
        }
    }

    /// A lane goes once its limits are as new ones would be: hosts come and go without a trace, and none gets a second burst. One
    /// that has something to remember stays, within a bound.
    pub(super) fn forget_empty_lanes(&mut self, now: Instant) {
        while let Some(id) = self.empty.front().copied() {
            if let Some(lane) = self.lanes.get_mut(&id) {
                let is_idle = lane.entries.is_empty();
                if is_idle && !lane.limits.is_as_new(now) {
                    return;
                }
                lane.in_empty = false;
                match lane.remembers_until(now).filter(|_| self.lanes_kept < LANES_KEPT_MAX) {
                    Some(until) if is_idle => {
                        lane.kept_until = Some(until);
                        self.lanes_kept += 1;
                        self.timers.push(Reverse((until, Due::Lane(id))));
                    }
                    None if is_idle => self.forget_lane(id, now),
                    _ => {}
                }
            }
            self.empty.pop_front();
        }
    }

    fn forget_lane(&mut self, id: LaneId, now: Instant) {
        let Some(lane) = self.lanes.get_mut(&id) else { return };
        if let (Some(breaker), Some(settings)) = (&mut lane.breaker, self.breaker) {
            let before = std::mem::replace(breaker, Breaker::new(settings));
            self.note_change(id, &before, now);
            if let Some(change) = self.changes.last_mut().filter(|_| before.view() != View::Closed) {
                change.forgotten = true;
            }
        }
        if let Some(lane) = self.lanes.remove(&id) {
            self.lanes_by_name.remove(&lane.name);
        }
    }

    // -- breakers --

    /// What a job of this lane is told while its host is down.
    pub(super) fn unsent(&mut self, id: LaneId, now: Instant) -> Option<Outcome> {
        if self.not_closed.0 == 0 {
            return None;
        }
        self.change_breaker(id, now, |breaker| breaker.advance(now));
        let lane = self.lanes.get(&id)?;
        match lane.breaker.as_ref()?.view() {
            View::Open { until } => Some(Outcome::Unsent { error: lane.reason.to_string(), after: until - now }),
            _ => None,
        }
    }

    pub(super) fn change_breaker(&mut self, id: LaneId, now: Instant, change: impl FnOnce(&mut Breaker)) {
        let Some(breaker) = self.lanes.get_mut(&id).and_then(|lane| lane.breaker.as_mut()) else { return };
        let before = breaker.clone();
        change(breaker);
        self.note_change(id, &before, now);
    }

    fn note_change(&mut self, id: LaneId, before: &Breaker, now: Instant) {
        let Some(lane) = self.lanes.get(&id) else { return };
        let Some(breaker) = &lane.breaker else { return };
        let (from, to) = (before.view(), breaker.view());
        if from == to {
            return;
        }
        let count =
            |view: View| (usize::from(matches!(view, View::Open { .. })), usize::from(matches!(view, View::HalfOpen { .. })));
        let ((open_before, half_before), (open, half)) = (count(from), count(to));
        self.not_closed = (self.not_closed.0 + open - open_before, self.not_closed.1 + half - half_before);
        self.changes.push(BreakerChange {
            lane: lane.name.clone(),
            from,
            to,
            failures: before.failures().max(breaker.failures()),
            lasted: before.opened().map_or(Duration::ZERO, |opened| now.saturating_duration_since(opened)),
            reason: lane.reason.clone(),
            forgotten: false,
        });
    }

    /// The last first: none of them moves up before it goes too.
    fn settle_unsent(&mut self, id: LaneId, now: Instant) {
        let (Some(unsent), Some(lane)) = (self.unsent(id, now), self.lanes.get(&id)) else { return };
        let waits = |id: &EntryId| self.entries.get(id).is_some_and(|entry| entry.state != State::InFlight);
        let mut waiting: Vec<EntryId> = lane.entries.iter().copied().filter(waits).collect();
        waiting.sort_unstable_by_key(|id| Reverse(*id));
        for id in waiting {
            for waiter in self.remove(id) {
                let _ = waiter.send(unsent.clone());
            }
        }
        if let Some(lane) = self.lanes.get_mut(&id) {
            lane.clear();
        }
    }

    /// A host that asked for a little quiet: its jobs wait.
    fn pause(&mut self, id: LaneId, until: Instant) {
        if let Some(lane) = self.lanes.get_mut(&id).filter(|lane| lane.paused_until.is_none_or(|paused| paused < until)) {
            lane.paused_until = Some(until);
            self.timers.push(Reverse((until, Due::Lane(id))));
        }
    }
}
