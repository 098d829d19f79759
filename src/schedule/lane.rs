//! One lane: the jobs that wait for one host, in turn by place, and what the host allows.

use super::breaker::Breaker;
use super::limits::Limits;
use super::queue::{EntryId, Spec};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use tokio::time::Instant;

/// Never used again, so that a late timer cannot meet another lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct LaneId(pub u64);

pub(super) struct Lane {
    pub name: Arc<str>,
    pub limits: Limits,
    pub breaker: Option<Breaker>,
    /// What the host said last when its breaker opened.
    pub reason: Arc<str>,
    places: HashMap<PlaceKey, Place>,
    /// The places that have a ready job and room, the most urgent first, then in turn.
    turns: BTreeMap<Reverse<i32>, VecDeque<PlaceKey>>,
    /// Jobs of this lane, in whatever state.
    pub entries: HashSet<EntryId>,
    pub in_rotation: bool,
    pub waits_for_rate: bool,
    /// The host asked for this much quiet.
    pub paused_until: Option<Instant>,
    pub in_empty: bool,
    /// It has no jobs, and something to remember until then.
    pub kept_until: Option<Instant>,
}

/// Jobs of one place with one priority.
pub(super) type PlaceKey = (Reverse<i32>, Option<Arc<str>>);

#[derive(Default)]
struct Place {
    /// By turn.
    ready: BinaryHeap<Reverse<(u64, EntryId)>>,
    in_flight: usize,
    in_turn: bool,
}

impl Lane {
    pub fn new(name: Arc<str>, limits: Limits, breaker: Option<Breaker>) -> Self {
        Self {
            name,
            limits,
            breaker,
            reason: Arc::from(""),
            places: HashMap::new(),
            turns: BTreeMap::new(),
            entries: HashSet::new(),
            in_rotation: false,
            waits_for_rate: false,
            paused_until: None,
            in_empty: false,
            kept_until: None,
        }
    }

    pub fn may_start(&self) -> bool {
        let is_held = self.waits_for_rate || self.paused_until.is_some() || !self.limits.has_room();
        !is_held && self.breaker.as_ref().is_none_or(Breaker::may_start)
    }

    pub fn has_turns(&self) -> bool {
        !self.turns.is_empty()
    }

    /// Until when a lane without jobs has something to remember; None: it is as a new one would be.
    pub fn remembers_until(&self, now: Instant) -> Option<Instant> {
        let breaker = self.breaker.as_ref().and_then(Breaker::remembered_until);
        breaker.max(self.paused_until).filter(|until| *until > now)
    }

    /// None of its jobs waits any more.
    pub fn clear(&mut self) {
        self.turns.clear();
        self.places.retain(|_, place| {
            place.ready.clear();
            place.in_turn = false;
            place.in_flight > 0
        });
    }

    pub fn list(&mut self, key: PlaceKey, job: (u64, EntryId), room: usize) {
        self.places.entry(key.clone()).or_default().ready.push(Reverse(job));
        self.take_turn(key, room);
    }

    /// At the end of the line of its priority, where it can use a turn.
    fn take_turn(&mut self, key: PlaceKey, room: usize) {
        let Some(place) = self.places.get_mut(&key) else { return };
        if place.ready.is_empty() && place.in_flight == 0 {
            self.places.remove(&key);
        } else if !place.in_turn && !place.ready.is_empty() && place.in_flight < room.max(1) {
            place.in_turn = true;
            self.turns.entry(key.0).or_default().push_back(key);
        }
    }

    /// The job whose turn it is, and its place.
    pub fn first(&self) -> Option<(PlaceKey, EntryId)> {
        let key = self.turns.values().next()?.front()?;
        let Reverse((_, id)) = self.places.get(key)?.ready.peek()?;
        Some((key.clone(), *id))
    }

    fn end_turn(&mut self, key: &PlaceKey) {
        if let Some(line) = self.turns.get_mut(&key.0) {
            line.pop_front();
            if line.is_empty() {
                self.turns.remove(&key.0);
            }
        }
        if let Some(place) = self.places.get_mut(key) {
            place.in_turn = false;
        }
    }

    /// The place whose turn it is keeps it, if it has another job.
    pub fn drop_first(&mut self, key: &PlaceKey) {
        let Some(place) = self.places.get_mut(key) else { return };
        place.ready.pop();
        if place.ready.is_empty() {
            self.end_turn(key);
            self.take_turn(key.clone(), 0);
        }
    }

    pub fn start_first(&mut self, key: &PlaceKey, room: usize) {
        if let Some(place) = self.places.get_mut(key) {
            place.ready.pop();
            place.in_flight += 1;
        }
        self.end_turn(key);
        self.take_turn(key.clone(), room);
    }

    pub fn leave(&mut self, key: &PlaceKey, room: usize) {
        if let Some(place) = self.places.get_mut(key) {
            place.in_flight = place.in_flight.saturating_sub(1);
        }
        self.take_turn(key.clone(), room);
    }
}

pub(super) fn place_of(spec: &impl Spec) -> PlaceKey {
    let place = Some(spec.place()).filter(|place| !place.is_empty());
    (Reverse(spec.priority()), place.map(Arc::from))
}

#[cfg(test)]
impl Lane {
    pub fn places(&self) -> usize {
        self.places.len()
    }
}
