//! Which job runs next: the pure core of a dispatcher.
//!
//! A job goes through three gates, in this order.
//!
//! 1. **Chains.** Jobs with one key never overlap and never reorder: each key has a chain, and only a job that is the head of all
//!    its chains may run. It stays the head until it is settled, through its retries too.
//! 2. **Lanes**, one for each host, with limits of their own, so that a slow or limited host waits alone. Lanes take turns, and
//!    within a lane its places (a host's databases) do, the most urgent first; a place is first in, first out over the jobs
//!    that passed the chains, and has a limit, so that a slow database does not take its host's room from the others.
//! 3. **Workers.** No more jobs run than there are workers.
//!
//! Jobs with one coalescing key are folded into the one that is not yet sent; its key is a chain as well, so that exactly one
//! more waits while one is in flight. What gathers instead (`Spec::gathers`) has no such chain: full ones go side by side. A
//! folded job stands in the chains of all the jobs that it carries.
//!
//! Where the host of a lane is down (`breaker`), those that wait are settled as unsent, and so is who comes: whoever waits for
//! them keeps their place, and the queue stays small.
//!
//! A job only ever waits for jobs with a lower id (`fold_target` refuses a fold that would break this), so the chains cannot
//! deadlock.
//!
//! The queue has no bound of its own: whoever submits waits for the outcome, and bounds how much it has outstanding.

mod lanes;

pub use lanes::{BreakerChange, BreakerStatus};

use super::breaker::{Breaker, BreakerSettings, View};
use super::lane::{Lane, LaneId, PlaceKey, place_of};
use super::limits::LaneLimits;
use crate::job::Outcome;
use std::cmp::Reverse;
use std::collections::hash_map::Entry as Slot;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// What the queue must know of a job.
pub trait Spec: Send + Sync + 'static {
    /// The host that it goes to.
    fn lane(&self) -> &str;
    /// What of the host it goes to; those of one lane take turns.
    fn place(&self) -> &str {
        ""
    }
    /// The higher goes first, among those that wait for one host.
    fn priority(&self) -> i32 {
        0
    }
    /// Jobs with equal keys never overlap and run in the order in which they were submitted.
    fn order_key(&self) -> u64;
    /// Jobs with equal keys ask for the same thing: one of them, not yet sent, stands for all.
    fn coalesce_key(&self) -> Option<u64>;
    /// Jobs with its coalescing key are gathered into one that carries them, and such ones may be under way side by side.
    fn gathers(&self) -> bool {
        false
    }
    /// Takes in a newer one with its coalescing key; where it cannot, it gives it back, and that stands for itself.
    fn fold(this: &mut Arc<Self>, newer: Arc<Self>) -> Result<(), Arc<Self>> {
        *this = newer;
        Ok(())
    }
    /// How long it waits for others before it is sent, unless it is full.
    fn linger(&self) -> Duration {
        Duration::ZERO
    }
    fn is_full(&self) -> bool {
        false
    }
}

pub type Waiter = oneshot::Sender<Outcome>;

/// Ascends in the order of submission.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntryId(u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Submitted {
    Queued(EntryId),
    FoldedInto(EntryId),
    /// Its host is down: it was told so.
    Unsent,
}

/// How one attempt ended, as decided by the dispatcher.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    Settled(Outcome),
    /// Again, not before `at`; its keys stay blocked meanwhile.
    Retry {
        at: Instant,
    },
    /// Its worker died under it: again, as soon as possible.
    Crashed,
    /// It did a part and gives way to those who wait; its keys stay blocked meanwhile.
    Unfinished,
}

pub struct Queue<S> {
    limits: LaneLimits,
    workers_max: usize,
    ids_used: u64,
    lanes_made: u64,
    entries: HashMap<EntryId, Entry<S>>,
    chains: HashMap<Key, Chain>,
    lanes: HashMap<LaneId, Lane>,
    lanes_by_name: HashMap<Arc<str>, LaneId>,
    /// By coalescing key, the job that takes in more.
    gathering: HashMap<u64, EntryId>,
    breaker: Option<BreakerSettings>,
    /// Lanes whose breaker is open, and half-open.
    not_closed: (usize, usize),
    changes: Vec<BreakerChange>,
    /// Lanes without jobs that have something to remember.
    lanes_kept: usize,
    /// The lanes that have a ready job, a free place and no rate to wait for.
    rotation: VecDeque<LaneId>,
    /// The lanes without jobs, the longest empty first.
    empty: VecDeque<LaneId>,
    timers: BinaryHeap<Reverse<(Instant, Due)>>,
    in_flight: usize,
}

struct Entry<S> {
    spec: Arc<S>,
    lane: LaneId,
    /// That of its first spec: what is folded into it does not move it.
    place: PlaceKey,
    /// The chains that it stands in.
    keys: Vec<Key>,
    /// In how many of them it is not the head.
    blocked: usize,
    /// Its number in the line of its place: given out anew when it gave way.
    turn: u64,
    waiters: Vec<Waiter>,
    state: State,
    /// It stands in its lane's ready heap, perhaps as a leftover from before it was blocked again.
    listed: bool,
    /// When its lingering or its delay ends.
    due: Option<Instant>,
    /// Of `Queue::gathering`, where it stands there.
    gathers: Option<u64>,
    /// It tries whether its host is back.
    probe: bool,
    retries: u32,
    crashes: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Never sent: others may be folded into it.
    Fresh,
    /// Sent before; waits for its turn like a fresh one.
    Waiting,
    Delayed,
    InFlight,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    Order(u64),
    Coalesce(u64),
}

/// In ascending order; most chains have one member and allocate nothing.
struct Chain {
    head: EntryId,
    rest: VecDeque<EntryId>,
}

impl Chain {
    fn tail(&self) -> EntryId {
        self.rest.back().copied().unwrap_or(self.head)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    Entry(EntryId),
    Rate(LaneId),
    /// Its pause is over, or what it remembers is old.
    Lane(LaneId),
}

impl<S: Spec> Queue<S> {
    pub fn new(limits: LaneLimits, breaker: Option<BreakerSettings>, workers_max: usize) -> Self {
        Self {
            limits,
            breaker,
            not_closed: (0, 0),
            changes: Vec::new(),
            lanes_kept: 0,
            gathering: HashMap::new(),
            workers_max: workers_max.max(1),
            ids_used: 0,
            lanes_made: 0,
            entries: HashMap::new(),
            chains: HashMap::new(),
            lanes: HashMap::new(),
            lanes_by_name: HashMap::new(),
            rotation: VecDeque::new(),
            empty: VecDeque::new(),
            timers: BinaryHeap::new(),
            in_flight: 0,
        }
    }

    pub fn submit(&mut self, spec: Arc<S>, waiter: Waiter, now: Instant) -> Submitted {
        self.forget_empty_lanes(now);
        if let Some(unsent) = self.lanes_by_name.get(spec.lane()).copied().and_then(|lane| self.unsent(lane, now)) {
            // Whoever stopped waiting does not want to know.
            let _ = waiter.send(unsent);
            return Submitted::Unsent;
        }
        let Some(id) = self.fold_target(&spec) else { return Submitted::Queued(self.enqueue(spec, waiter, now)) };
        match self.fold(id, spec, waiter) {
            Ok(()) => Submitted::FoldedInto(id),
            Err((spec, waiter)) => Submitted::Queued(self.enqueue(spec, waiter, now)),
        }
    }

    /// The job to run now; it is in flight until `finished`. Jobs that nobody waits for any more are dropped on the way.
    pub fn next(&mut self, now: Instant) -> Option<(EntryId, Arc<S>)> {
        self.release_due(now);
        self.forget_empty_lanes(now);
        while self.in_flight < self.workers_max {
            let lane = self.rotation.pop_front()?;
            if let Some(started) = self.next_of_lane(lane, now) {
                return Some(started);
            }
        }
        None
    }

    /// Ends one attempt; an id that is not in flight is ignored.
    pub fn finished(&mut self, id: EntryId, end: End, now: Instant) {
        let Some(entry) = self.entries.get_mut(&id).filter(|entry| entry.state == State::InFlight) else { return };
        let (lane, place, was_probe) = (entry.lane, entry.place.clone(), std::mem::take(&mut entry.probe));
        if was_probe {
            self.change_breaker(lane, now, Breaker::probe_over);
        }
        let end = match end {
            End::Settled(outcome) => End::Settled(outcome),
            // It has no other try while its host is down.
            again => self.unsent(lane, now).map_or(again, End::Settled),
        };
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let wanted = entry.waiters.iter().any(|waiter| !waiter.is_closed());
        match end {
            End::Settled(outcome) => {
                for waiter in self.remove(id) {
                    // Whoever stopped waiting does not want to know.
                    let _ = waiter.send(outcome.clone());
                }
            }
            End::Retry { at } if wanted => {
                (entry.state, entry.due) = (State::Delayed, Some(at));
                entry.retries = entry.retries.saturating_add(1);
                self.timers.push(Reverse((at, Due::Entry(id))));
            }
            End::Retry { .. } => drop(self.remove(id)),
            End::Crashed => {
                entry.state = State::Waiting;
                entry.crashes = entry.crashes.saturating_add(1);
                self.list(id);
            }
            End::Unfinished if wanted => {
                entry.state = State::Waiting;
                (entry.retries, entry.crashes) = (0, 0);
                entry.turn = self.ids_used;
                self.ids_used += 1;
                self.list(id);
            }
            End::Unfinished => drop(self.remove(id)),
        }
        self.in_flight -= 1;
        if let Some(lane) = self.lanes.get_mut(&lane) {
            lane.limits.release();
            lane.leave(&place, self.limits.concurrency_per_place);
        }
        self.rotate(lane);
    }

    /// When `next` may have something that it has not now, apart from what `submit` and `finished` bring.
    pub fn next_wakeup(&self) -> Option<Instant> {
        self.timers.peek().map(|Reverse((at, _))| *at)
    }

    pub fn retries(&self, id: EntryId) -> u32 {
        self.entries.get(&id).map_or(0, |entry| entry.retries)
    }

    pub fn crashes(&self, id: EntryId) -> u32 {
        self.entries.get(&id).map_or(0, |entry| entry.crashes)
    }

    /// Jobs that are not in flight, whatever they wait for.
    pub fn queued(&self) -> usize {
        self.entries.len() - self.in_flight
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub fn lanes(&self) -> usize {
        self.lanes.len()
    }

    /// The job that may carry this one as well: not yet sent, for the same host, and not before a job that this one must follow.
    fn fold_target(&self, spec: &S) -> Option<EntryId> {
        let key = spec.coalesce_key()?;
        let id = match spec.gathers() {
            true => *self.gathering.get(&key)?,
            false => self.chains.get(&Key::Coalesce(key))?.tail(),
        };
        let entry = self.entries.get(&id).filter(|entry| entry.state == State::Fresh)?;
        let same_lane = entry.spec.lane() == spec.lane();
        let keeps_order = self.chains.get(&Key::Order(spec.order_key())).is_none_or(|chain| chain.tail() <= id);
        (same_lane && keeps_order).then_some(id)
    }

    /// Gives back what the job has no room for.
    fn fold(&mut self, id: EntryId, spec: Arc<S>, waiter: Waiter) -> Result<(), (Arc<S>, Waiter)> {
        let key = Key::Order(spec.order_key());
        let stands_there = self.chains.get(&key).is_some_and(|chain| chain.tail() == id);
        let Some(entry) = self.entries.get_mut(&id) else { return Err((spec, waiter)) };
        if let Err(spec) = S::fold(&mut entry.spec, spec) {
            return Err((spec, waiter));
        }
        if !stands_there {
            entry.keys.push(key);
            entry.blocked += usize::from(join(&mut self.chains, key, id));
        }
        if entry.waiters.len() == entry.waiters.capacity() {
            entry.waiters.retain(|waiter| !waiter.is_closed());
        }
        entry.waiters.push(waiter);
        if entry.spec.is_full() {
            entry.due = None;
            let gathers = entry.gathers.take();
            self.stop_gathering(id, gathers);
            self.list(id);
        }
        Ok(())
    }

    fn stop_gathering(&mut self, id: EntryId, key: Option<u64>) {
        if let Some(key) = key
            && self.gathering.get(&key) == Some(&id)
        {
            self.gathering.remove(&key);
        }
    }

    fn enqueue(&mut self, spec: Arc<S>, waiter: Waiter, now: Instant) -> EntryId {
        let id = EntryId(self.ids_used);
        self.ids_used += 1;
        let lane = self.lane_of(spec.lane(), id, now);
        let (gathers, coalesces) = match spec.gathers() {
            true => (spec.coalesce_key().filter(|_| !spec.is_full()), None),
            false => (None, spec.coalesce_key()),
        };
        let keys: Vec<Key> = std::iter::once(Key::Order(spec.order_key())).chain(coalesces.map(Key::Coalesce)).collect();
        let blocked = keys.iter().filter(|key| join(&mut self.chains, **key, id)).count();
        let due = Some(spec.linger()).filter(|linger| !linger.is_zero() && !spec.is_full()).map(|linger| now + linger);
        if let Some(at) = due {
            self.timers.push(Reverse((at, Due::Entry(id))));
        }
        if let Some(key) = gathers {
            self.gathering.insert(key, id);
        }
        let place = place_of(&*spec);
        let entry = Entry {
            spec,
            lane,
            place,
            keys,
            blocked,
            turn: id.0,
            waiters: vec![waiter],
            state: State::Fresh,
            listed: false,
            due,
            gathers,
            probe: false,
            retries: 0,
            crashes: 0,
        };
        self.entries.insert(id, entry);
        self.list(id);
        id
    }

    /// Takes one job out of a lane that has just left the rotation.
    fn next_of_lane(&mut self, lane_id: LaneId, now: Instant) -> Option<(EntryId, Arc<S>)> {
        self.lanes.get_mut(&lane_id)?.in_rotation = false;
        loop {
            let lane = self.lanes.get_mut(&lane_id)?;
            if !lane.may_start() {
                return None;
            }
            let (place_key, id) = lane.first()?;
            let Some(entry) = self.entries.get_mut(&id) else {
                lane.drop_first(&place_key);
                continue;
            };
            if entry.blocked > 0 {
                // Folding put it behind somebody; whoever leaves last before it lists it again.
                lane.drop_first(&place_key);
                entry.listed = false;
                continue;
            }
            if entry.waiters.iter().all(|waiter| waiter.is_closed()) {
                lane.drop_first(&place_key);
                self.remove(id);
                continue;
            }
            if let Err(wait) = lane.limits.try_acquire(now) {
                lane.waits_for_rate = true;
                self.timers.push(Reverse((now + wait, Due::Rate(lane_id))));
                return None;
            }
            lane.start_first(&place_key, self.limits.concurrency_per_place);
            entry.listed = false;
            entry.state = State::InFlight;
            entry.probe = lane.breaker.as_ref().is_some_and(|breaker| breaker.view() != View::Closed);
            let (spec, gathers, is_probe) = (entry.spec.clone(), entry.gathers.take(), entry.probe);
            self.stop_gathering(id, gathers);
            if is_probe {
                self.change_breaker(lane_id, now, Breaker::start);
            }
            self.in_flight += 1;
            self.rotate(lane_id);
            return Some((id, spec));
        }
    }

    fn release_due(&mut self, now: Instant) {
        while let Some(Reverse((at, due))) = self.timers.peek().copied() {
            if at > now {
                return;
            }
            self.timers.pop();
            match due {
                Due::Entry(id) => {
                    if let Some(entry) = self.entries.get_mut(&id).filter(|entry| entry.due == Some(at)) {
                        entry.due = None;
                        if entry.state == State::Delayed {
                            entry.state = State::Waiting;
                        }
                        self.list(id);
                    }
                }
                Due::Rate(id) => {
                    if let Some(lane) = self.lanes.get_mut(&id) {
                        lane.waits_for_rate = false;
                        self.rotate(id);
                    }
                }
                Due::Lane(id) => {
                    if let Some(lane) = self.lanes.get_mut(&id) {
                        lane.paused_until = lane.paused_until.filter(|until| *until > now);
                        if lane.kept_until == Some(at) {
                            lane.kept_until = None;
                            self.lanes_kept -= 1;
                            self.note_empty(id);
                        }
                        self.rotate(id);
                    }
                }
            }
        }
    }

    /// Puts a job that may run into its lane.
    fn list(&mut self, id: EntryId) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let is_ready = entry.due.is_none() && matches!(entry.state, State::Fresh | State::Waiting);
        if entry.blocked > 0 || entry.listed || !is_ready {
            return;
        }
        entry.listed = true;
        let (lane_id, turn, place) = (entry.lane, entry.turn, entry.place.clone());
        if let Some(lane) = self.lanes.get_mut(&lane_id) {
            lane.list(place, (turn, id), self.limits.concurrency_per_place);
        }
        self.rotate(lane_id);
    }

    /// Gives a lane its turn, at the end of the line, where it can use one.
    fn rotate(&mut self, id: LaneId) {
        if let Some(lane) = self.lanes.get_mut(&id)
            && !lane.in_rotation
            && lane.may_start()
            && lane.has_turns()
        {
            lane.in_rotation = true;
            self.rotation.push_back(id);
        }
    }

    /// Forgets a job, and lets those behind it move up.
    fn remove(&mut self, id: EntryId) -> Vec<Waiter> {
        let Some(entry) = self.entries.remove(&id) else { return Vec::new() };
        self.stop_gathering(id, entry.gathers);
        for key in entry.keys {
            let Slot::Occupied(mut chain) = self.chains.entry(key) else { continue };
            if chain.get().head != id {
                let rest = &mut chain.get_mut().rest;
                if let Ok(at) = rest.binary_search(&id) {
                    rest.remove(at);
                }
                continue;
            }
            match chain.get_mut().rest.pop_front() {
                None => drop(chain.remove()),
                Some(heir) => {
                    chain.get_mut().head = heir;
                    if let Some(heir_entry) = self.entries.get_mut(&heir) {
                        heir_entry.blocked -= 1;
                    }
                    self.list(heir);
                }
            }
        }
        if let Some(lane) = self.lanes.get_mut(&entry.lane) {
            lane.entries.remove(&id);
            if lane.entries.is_empty() {
                self.note_empty(entry.lane);
            }
        }
        entry.waiters
    }
}

/// True where somebody stands before it.
fn join(chains: &mut HashMap<Key, Chain>, key: Key, id: EntryId) -> bool {
    match chains.entry(key) {
        Slot::Vacant(slot) => {
            slot.insert(Chain { head: id, rest: VecDeque::new() });
            false
        }
        Slot::Occupied(mut slot) => {
            slot.get_mut().rest.push_back(id);
            true
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::schedule::breaker::{Ruling, Sign};
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};
    use std::num::NonZeroU32;
    use std::time::Duration;
    use tokio::sync::oneshot::error::TryRecvError;

    #[derive(Debug, Clone)]
    struct Job {
        number: usize,
        lane: &'static str,
        place: &'static str,
        priority: i32,
        order: u64,
        coalesce: Option<u64>,
        /// What it gathered, where it gathers.
        items: Option<Vec<usize>>,
    }

    /// So many items are all that one job carries.
    const ITEMS_MAX: usize = 3;
    const LINGER: Duration = Duration::from_millis(700);

    impl Spec for Job {
        fn lane(&self) -> &str {
            self.lane
        }
        fn place(&self) -> &str {
            self.place
        }
        fn priority(&self) -> i32 {
            self.priority
        }
        fn order_key(&self) -> u64 {
            self.order
        }
        fn coalesce_key(&self) -> Option<u64> {
            self.coalesce
        }
        fn gathers(&self) -> bool {
            self.items.is_some()
        }
        fn fold(this: &mut Arc<Self>, newer: Arc<Self>) -> Result<(), Arc<Self>> {
            let items = match (&this.items, &newer.items) {
                (Some(items), Some(_)) if items.len() == ITEMS_MAX => return Err(newer),
                (Some(items), Some(more)) => Some([&items[..], &more[..]].concat()),
                _ => None,
            };
            *this = Arc::new(Job { items, ..(*newer).clone() });
            Ok(())
        }
        fn linger(&self) -> Duration {
            if self.gathers() { LINGER } else { Duration::ZERO }
        }
        fn is_full(&self) -> bool {
            self.items.as_ref().is_some_and(|items| items.len() == ITEMS_MAX)
        }
    }

    fn queue(concurrency: usize, workers_max: usize, per_second: Option<u32>) -> Queue<Job> {
        let per_second = per_second.and_then(NonZeroU32::new);
        Queue::new(LaneLimits { concurrency, per_second, concurrency_per_place: concurrency }, None, workers_max)
    }

    struct Bench {
        queue: Queue<Job>,
        now: Instant,
        receivers: Vec<Option<oneshot::Receiver<Outcome>>>,
    }

    impl Bench {
        fn new(queue: Queue<Job>) -> Self {
            Self { queue, now: Instant::now(), receivers: Vec::new() }
        }

        /// Numbered from 0 in the order of submission.
        fn submit(&mut self, lane: &'static str, order: u64, coalesce: Option<u64>) -> Submitted {
            self.submit_job(Job { number: 0, lane, place: "", priority: 0, order, coalesce, items: None })
        }

        /// To be gathered.
        fn add(&mut self, lane: &'static str, order: u64, key: u64) -> Submitted {
            let (coalesce, items) = (Some(key), Some(Vec::new()));
            self.submit_job(Job { number: 0, lane, place: "", priority: 0, order, coalesce, items })
        }

        fn submit_job(&mut self, job: Job) -> Submitted {
            let (waiter, receiver) = oneshot::channel();
            let number = self.receivers.len();
            let items = job.items.as_ref().map(|_| vec![number]);
            let job = Job { number, items, ..job };
            self.receivers.push(Some(receiver));
            self.queue.submit(Arc::new(job), waiter, self.now)
        }

        fn next(&mut self) -> Option<(EntryId, usize)> {
            self.queue.next(self.now).map(|(id, job)| (id, job.number))
        }

        /// Starts all that may start.
        fn numbers(&mut self) -> Vec<usize> {
            std::iter::from_fn(|| self.next()).map(|(_, number)| number).collect()
        }

        fn done(&mut self, id: EntryId) {
            self.queue.heard(id, Sign::Alive, "", self.now, 1.0);
            self.queue.finished(id, End::Settled(Outcome::Done), self.now);
        }

        /// As a dispatcher with no end of fast retries would have it.
        fn failed(&mut self, id: EntryId, sign: Sign) -> Ruling {
            let ruling = self.queue.heard(id, sign, "down", self.now, 1.0);
            let end = match ruling {
                Ruling::Pass => End::Retry { at: self.now + Duration::from_millis(400) },
                Ruling::Down { after } => End::Settled(Outcome::Unsent { error: String::from("down"), after }),
                Ruling::Own => End::Settled(own_fault()),
            };
            self.queue.finished(id, end, self.now);
            ruling
        }

        fn items(&mut self) -> Option<(EntryId, Vec<usize>)> {
            self.queue.next(self.now).map(|(id, job)| (id, job.items.clone().expect("it gathers")))
        }

        fn outcome(&mut self, number: usize) -> Result<Outcome, TryRecvError> {
            self.receivers[number].as_mut().expect("still waiting").try_recv()
        }
    }

    fn own_fault() -> Outcome {
        Outcome::Missing { error: String::from("own fault") }
    }

    fn with_breaker(concurrency: usize, workers_max: usize, threshold: u32) -> Queue<Job> {
        let cool_down = crate::schedule::Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        let breaker = BreakerSettings { threshold, cool_down, asked_max: Duration::from_secs(3_600) };
        let limits = LaneLimits { concurrency, per_second: None, concurrency_per_place: concurrency };
        Queue::new(limits, Some(breaker), workers_max)
    }

    #[test]
    fn a_lane_is_first_in_first_out() {
        let mut bench = Bench::new(queue(10, 10, None));
        for order in 0..5 {
            bench.submit("a", order, None);
        }
        assert_eq!(bench.numbers(), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn lanes_take_turns() {
        let mut bench = Bench::new(queue(10, 10, None));
        for (order, lane) in ["a", "a", "a", "b", "c", "b"].into_iter().enumerate() {
            bench.submit(lane, order as u64, None);
        }
        assert_eq!(bench.numbers(), [0, 3, 4, 1, 5, 2]);
    }

    fn in_place(place: &'static str, order: u64, priority: i32) -> Job {
        Job { number: 0, lane: "host", place, priority, order, coalesce: None, items: None }
    }

    #[test]
    fn the_places_of_a_lane_take_turns_and_none_takes_all() {
        let limits = LaneLimits { concurrency: 5, per_second: None, concurrency_per_place: 2 };
        let mut bench = Bench::new(Queue::new(limits, None, 10));
        for order in 0..6 {
            bench.submit_job(in_place("slow", order, 0));
        }
        for order in 6..9 {
            bench.submit_job(in_place(["b", "c", "b"][order as usize - 6], order, 0));
        }
        let (first, number) = bench.next().expect("the first");
        assert_eq!(number, 0);
        assert_eq!(bench.numbers(), [6, 7, 1, 8], "the slow place has its two, the host its five");
        bench.done(first);
        assert_eq!(bench.numbers(), [2]);
    }

    #[test]
    fn the_urgent_go_first() {
        let limits = LaneLimits { concurrency: 1, per_second: None, concurrency_per_place: 1 };
        let mut bench = Bench::new(Queue::new(limits, None, 10));
        for (order, priority) in [0, -5, 7, 0].into_iter().enumerate() {
            bench.submit_job(in_place("a", order as u64, priority));
        }
        let mut order = Vec::new();
        while let Some((id, number)) = bench.next() {
            order.push(number);
            bench.done(id);
        }
        assert_eq!(order, [2, 0, 3, 1]);
    }

    #[test]
    fn whoever_gives_way_comes_after_those_who_waited() {
        let mut bench = Bench::new(queue(1, 1, None));
        for order in 0..3 {
            bench.submit("a", order, Some(order));
        }
        let (long, _) = bench.next().expect("the first");
        bench.submit("a", 0, Some(0));
        bench.queue.finished(long, End::Unfinished, bench.now);
        for number in [1, 2] {
            let (id, next) = bench.next().expect("another");
            assert_eq!(next, number);
            bench.done(id);
        }
        assert_eq!(bench.next(), Some((long, 0)), "its own key is still its own");
        bench.done(long);
        assert_eq!(bench.numbers(), [3]);
        assert!(bench.queue.lanes.values().all(|lane| lane.places() <= 1), "idle places are forgotten");
    }

    #[test]
    fn a_full_lane_leaves_the_workers_to_others() {
        let mut bench = Bench::new(queue(2, 5, None));
        for order in 0..10 {
            bench.submit("slow", order, None);
        }
        assert_eq!(bench.numbers(), [0, 1]);
        bench.submit("fast", 100, None);
        assert_eq!(bench.numbers(), [10]);
    }

    #[test]
    fn no_more_run_than_there_are_workers() {
        let mut bench = Bench::new(queue(10, 3, None));
        for order in 0..10 {
            bench.submit("a", order, None);
        }
        let (first, _) = bench.next().expect("a worker is free");
        assert_eq!(bench.numbers(), [1, 2]);
        bench.done(first);
        assert_eq!(bench.numbers(), [3]);
        assert_eq!((bench.queue.queued(), bench.queue.in_flight()), (6, 3));
    }

    #[test]
    fn one_order_key_never_overlaps_even_across_lanes() {
        let mut bench = Bench::new(queue(10, 10, None));
        bench.submit("a", 7, None);
        bench.submit("b", 7, None);
        bench.submit("b", 8, None);
        let (first, number) = bench.next().expect("the first of its key");
        assert_eq!(number, 0);
        assert_eq!(bench.numbers(), [2]);
        bench.done(first);
        assert_eq!(bench.numbers(), [1]);
    }

    #[test]
    fn a_retry_keeps_its_key_blocked_until_its_time() {
        let mut bench = Bench::new(queue(10, 10, None));
        bench.submit("a", 7, None);
        bench.submit("a", 7, None);
        bench.submit("a", 8, None);
        let (first, _) = bench.next().expect("the first of its key");
        let at = bench.now + Duration::from_secs(5);
        bench.queue.finished(first, End::Retry { at }, bench.now);
        assert_eq!(bench.numbers(), [2], "another key goes on");
        assert_eq!(bench.queue.next_wakeup(), Some(at));
        assert_eq!(bench.queue.retries(first), 1);
        bench.now = at;
        assert_eq!(bench.next(), Some((first, 0)));
        assert_eq!(bench.queue.next_wakeup(), None);
        bench.done(first);
        assert_eq!(bench.numbers(), [1]);
    }

    #[test]
    fn equal_requests_become_one_with_the_newest_spec() {
        let mut bench = Bench::new(queue(10, 10, None));
        for order in 0..3 {
            bench.submit("a", order, Some(1));
        }
        let (id, number) = bench.next().expect("one for all");
        assert_eq!(number, 2);
        assert_eq!(bench.numbers(), [0usize; 0]);
        bench.done(id);
        for number in 0..3 {
            assert_eq!(bench.outcome(number), Ok(Outcome::Done));
        }
    }

    #[test]
    fn while_one_is_in_flight_exactly_one_more_waits() {
        let mut bench = Bench::new(queue(10, 10, None));
        bench.submit("a", 0, Some(1));
        let (first, _) = bench.next().expect("nothing before it");
        let Submitted::Queued(second) = bench.submit("a", 1, Some(1)) else { panic!("the first is sent already") };
        assert_eq!(bench.submit("a", 2, Some(1)), Submitted::FoldedInto(second));
        assert_eq!(bench.submit("a", 3, Some(1)), Submitted::FoldedInto(second));
        assert_eq!(bench.next(), None);
        bench.done(first);
        assert_eq!(bench.next(), Some((second, 3)));
        assert_eq!(bench.outcome(0), Ok(Outcome::Done));
        assert_eq!(bench.outcome(1), Err(TryRecvError::Empty));
    }

    #[test]
    fn a_request_that_was_tried_is_not_folded_into() {
        let mut bench = Bench::new(queue(10, 10, None));
        bench.submit("a", 0, Some(1));
        let (first, _) = bench.next().expect("nothing before it");
        bench.queue.finished(first, End::Crashed, bench.now);
        assert!(matches!(bench.submit("a", 0, Some(1)), Submitted::Queued(_)));
    }

    #[test]
    fn a_folded_job_blocks_the_keys_of_all_that_it_carries() {
        let mut bench = Bench::new(queue(10, 10, None));
        bench.submit("a", 0, Some(1));
        bench.submit("a", 5, Some(1));
        bench.submit("a", 5, None);
        let (folded, number) = bench.next().expect("nothing before it");
        assert_eq!(number, 1);
        assert_eq!(bench.next(), None, "key 5 is in flight");
        bench.done(folded);
        assert_eq!(bench.numbers(), [2]);
    }

    #[test]
    fn folding_never_moves_a_job_before_one_of_its_own_key() {
        // On, off, on again for one document: the last must not merge into the first and leave "off" as the final word.
        let mut bench = Bench::new(queue(10, 10, None));
        bench.submit("a", 7, Some(1));
        bench.submit("a", 7, Some(2));
        assert!(matches!(bench.submit("a", 7, Some(1)), Submitted::Queued(_)));
        let mut order = Vec::new();
        while let Some((id, number)) = bench.next() {
            order.push(number);
            bench.done(id);
        }
        assert_eq!(order, [0, 1, 2]);
    }

    #[test]
    fn crossed_folds_do_not_deadlock() {
        let mut bench = Bench::new(queue(10, 10, None));
        bench.submit("a", 1, Some(1));
        bench.submit("a", 2, Some(2));
        bench.submit("a", 2, Some(1));
        bench.submit("a", 1, Some(2));
        let mut runs = 0;
        while let Some((id, _)) = bench.next() {
            bench.done(id);
            runs += 1;
        }
        assert!((2..=4).contains(&runs));
        for number in 0..4 {
            assert_eq!(bench.outcome(number), Ok(Outcome::Done), "number {number}");
        }
    }

    #[test]
    fn equal_requests_to_different_hosts_stay_apart() {
        let mut bench = Bench::new(queue(10, 10, None));
        bench.submit("a", 0, Some(1));
        assert!(matches!(bench.submit("b", 1, Some(1)), Submitted::Queued(_)));
    }

    #[test]
    fn a_job_that_nobody_waits_for_is_dropped_when_its_turn_comes() {
        let mut bench = Bench::new(queue(1, 10, None));
        for order in [0, 1, 1] {
            bench.submit("a", order, None);
        }
        let (first, _) = bench.next().expect("nothing before it");
        bench.receivers[1] = None;
        bench.done(first);
        assert_eq!(bench.numbers(), [2]);
        assert_eq!(bench.queue.queued(), 0);
    }

    #[test]
    fn a_retry_that_nobody_waits_for_is_dropped_at_once() {
        let mut bench = Bench::new(queue(1, 1, None));
        bench.submit("a", 0, None);
        let (first, _) = bench.next().expect("nothing before it");
        bench.receivers[0] = None;
        bench.queue.finished(first, End::Retry { at: bench.now + Duration::from_secs(60) }, bench.now);
        assert_eq!((bench.queue.queued(), bench.queue.in_flight(), bench.queue.next_wakeup()), (0, 0, None));
    }

    #[test]
    fn a_crashed_job_goes_first_again() {
        let mut bench = Bench::new(queue(1, 1, None));
        bench.submit("a", 0, None);
        bench.submit("a", 1, None);
        let (first, _) = bench.next().expect("nothing before it");
        bench.queue.finished(first, End::Crashed, bench.now);
        assert_eq!(bench.next(), Some((first, 0)));
        assert_eq!(bench.queue.crashes(first), 1);
    }

    #[test]
    fn a_rate_limited_lane_waits_alone_with_one_timer() {
        let mut bench = Bench::new(queue(10, 100, Some(2)));
        for order in 0..5 {
            bench.submit("limited", order, None);
        }
        assert_eq!(bench.numbers(), [0, 1]);
        let wakeup = bench.queue.next_wakeup().expect("a timer for the lane");
        assert_eq!(wakeup - bench.now, Duration::from_millis(500));
        bench.submit("other", 100, None);
        assert_eq!(bench.numbers(), [5]);
        assert_eq!(bench.queue.timers.len(), 1);
        bench.now = wakeup;
        assert_eq!(bench.numbers(), [2]);
    }

    #[test]
    fn hosts_that_come_and_go_leave_nothing_behind() {
        for per_second in [None, Some(5)] {
            let mut bench = Bench::new(queue(2, 2, per_second));
            for order in 0..1_000u64 {
                bench.submit(Box::leak(format!("host-{order}").into_boxed_str()), order, Some(order));
                let (id, _) = bench.next().expect("a free lane");
                bench.done(id);
                bench.now += Duration::from_millis(10);
                assert!(bench.queue.lanes() <= 102, "at most those of the last second");
            }
            bench.now += Duration::from_secs(2);
            assert_eq!(bench.next(), None);
            let queue = &bench.queue;
            assert_eq!((queue.lanes(), queue.lanes_by_name.len(), queue.empty.len()), (0, 0, 0));
            assert_eq!((queue.chains.len(), queue.entries.len(), queue.timers.len(), queue.rotation.len()), (0, 0, 0, 0));
        }
    }

    #[test]
    fn a_limiter_is_not_forgotten_before_it_is_full_again() {
        let mut bench = Bench::new(queue(10, 10, Some(1)));
        bench.submit("a", 0, None);
        let (id, _) = bench.next().expect("the burst");
        bench.done(id);
        bench.submit("a", 1, None);
        assert_eq!(bench.next(), None, "the same limiter, still empty");
    }

    const FAILING: Sign = Sign::Failing { pause: None };

    fn is_unsent(outcome: Result<Outcome, TryRecvError>) -> bool {
        matches!(outcome, Ok(Outcome::Unsent { .. }))
    }

    /// Numbers 0 and 1 fail; 2 is under way, 3 follows 2, 4 waits for room, 5 is of another host.
    fn opened() -> (Bench, EntryId) {
        let mut bench = Bench::new(with_breaker(3, 10, 2));
        for (lane, order) in [("a", 0), ("a", 1), ("a", 2), ("a", 2), ("a", 3), ("b", 4)] {
            bench.submit(lane, order, None);
        }
        let ids: Vec<_> = std::iter::from_fn(|| bench.next()).collect();
        assert_eq!(ids.iter().map(|(_, number)| *number).collect::<Vec<_>>(), [0, 5, 1, 2]);
        assert_eq!(bench.failed(ids[0].0, FAILING), Ruling::Pass);
        assert!(matches!(bench.failed(ids[2].0, FAILING), Ruling::Down { .. }));
        (bench, ids[3].0)
    }

    #[test]
    fn where_a_host_goes_down_all_that_wait_for_it_are_told() {
        let (mut bench, under_way) = opened();
        for number in [0, 1, 3, 4] {
            let outcome = bench.outcome(number);
            let after = Duration::from_secs(1);
            assert!(
                matches!(&outcome, Ok(Outcome::Unsent { after: told, .. }) if *told == after),
                "number {number}: {outcome:?}"
            );
        }
        assert_eq!(bench.submit("a", 9, None), Submitted::Unsent);
        assert!(
            matches!(bench.outcome(6), Ok(Outcome::Unsent { error, .. }) if error.contains("to a until") && error.contains("down"))
        );
        assert!(matches!(bench.submit("b", 9, None), Submitted::Queued(_)), "another host");
        assert_eq!(bench.numbers(), [7]);
        assert_eq!(bench.queue.queued(), 0);
        bench.done(under_way);
        assert_eq!((bench.outcome(2), bench.outcome(5)), (Ok(Outcome::Done), Err(TryRecvError::Empty)));
        assert_eq!(bench.queue.not_closed(), (1, 0), "what started before says nothing of now");
    }

    #[test]
    fn a_crash_under_an_open_breaker_is_no_second_try() {
        let (mut bench, under_way) = opened();
        bench.queue.finished(under_way, End::Crashed, bench.now);
        assert!(is_unsent(bench.outcome(2)));
        assert_eq!(bench.next(), None);
    }

    #[test]
    fn a_probe_that_succeeds_lets_the_others_go() {
        let (mut bench, _) = opened();
        bench.now += Duration::from_secs(1);
        for order in 10..13 {
            bench.submit("a", order, None);
        }
        let (probe, number) = bench.next().expect("a probe");
        assert_eq!((number, bench.next(), bench.queue.not_closed()), (6, None, (0, 1)));
        bench.done(probe);
        assert_eq!(bench.numbers(), [7, 8], "with the one still under way there is room for two");
        let changes: Vec<_> = bench.queue.take_changes().into_iter().map(|change| (change.from, change.to)).collect();
        let until = bench.now;
        let (open, waiting, probing) =
            (View::Open { until }, View::HalfOpen { probing: false }, View::HalfOpen { probing: true });
        assert_eq!(changes, [(View::Closed, open), (open, waiting), (waiting, probing), (probing, View::Closed)]);
        assert_eq!(bench.queue.not_closed(), (0, 0));
    }

    #[test]
    fn a_probe_that_fails_sends_the_others_away() {
        let (mut bench, _) = opened();
        bench.now += Duration::from_secs(1);
        for order in 10..13 {
            bench.submit("a", order, None);
        }
        let (probe, _) = bench.next().expect("a probe");
        assert_eq!(bench.failed(probe, FAILING), Ruling::Down { after: Duration::from_secs(2) });
        assert!((6..9).all(|number| is_unsent(bench.outcome(number))));
        assert_eq!((bench.queue.queued(), bench.queue.not_closed()), (0, (1, 0)));
        assert_eq!(bench.queue.breakers(10)[0].failures, 3);
    }

    #[test]
    fn a_probe_that_crashes_or_is_not_wanted_leaves_its_turn_to_the_next() {
        let (mut bench, _) = opened();
        bench.now += Duration::from_secs(1);
        for order in 10..12 {
            bench.submit("a", order, None);
        }
        bench.receivers[6] = None;
        let (probe, number) = bench.next().expect("a probe");
        assert_eq!(number, 7);
        bench.queue.finished(probe, End::Crashed, bench.now);
        assert_eq!(bench.next(), Some((probe, 7)));
        bench.done(probe);
        assert_eq!(bench.queue.not_closed(), (0, 0));
    }

    #[test]
    fn a_job_that_fails_as_a_probe_again_is_at_fault_and_the_next_is_tried_at_once() {
        let (mut bench, _) = opened();
        for (number, expected) in [(6, Ruling::Down { after: Duration::from_secs(2) }), (7, Ruling::Own)] {
            bench.now += Duration::from_secs(2);
            bench.submit("a", 10, None);
            let (probe, started) = bench.next().expect("a probe");
            assert_eq!((started, bench.failed(probe, FAILING)), (number, expected));
        }
        assert_eq!(bench.outcome(7), Ok(own_fault()));
        bench.submit("a", 11, None);
        assert_eq!(bench.numbers(), [8]);
    }

    #[test]
    fn a_host_that_asks_for_a_moment_gets_it_and_its_jobs_wait() {
        let mut bench = Bench::new(with_breaker(10, 10, 5));
        bench.submit("a", 0, None);
        let (first, _) = bench.next().expect("nothing before it");
        let pause = Some(Duration::from_secs(2));
        assert_eq!(bench.failed(first, Sign::Failing { pause }), Ruling::Pass);
        for (lane, order) in [("a", 1), ("b", 2)] {
            bench.submit(lane, order, None);
        }
        assert_eq!(bench.numbers(), [2]);
        bench.now += Duration::from_millis(1_999);
        assert_eq!(bench.next(), None);
        bench.now += Duration::from_millis(1);
        assert_eq!(bench.numbers(), [0, 1]);
    }

    #[test]
    fn a_host_that_asks_for_long_is_left_alone() {
        let mut bench = Bench::new(with_breaker(10, 10, 5));
        for order in 0..3 {
            bench.submit("a", order, None);
        }
        let (first, _) = bench.next().expect("nothing before it");
        let pause = Duration::from_secs(600);
        assert_eq!(bench.failed(first, Sign::Away { pause }), Ruling::Down { after: pause });
        assert!((0..3).all(|number| is_unsent(bench.outcome(number))));
        bench.now += pause;
        bench.submit("a", 9, None);
        assert_eq!(bench.numbers(), [3]);
    }

    #[test]
    fn hosts_that_went_down_are_remembered_for_a_while_within_a_bound() {
        let mut bench = Bench::new(with_breaker(1, 1, 1));
        for order in 0..10_500u64 {
            bench.submit(Box::leak(format!("host-{order}").into_boxed_str()), order, None);
            let (id, _) = bench.next().expect("a free lane");
            bench.failed(id, FAILING);
        }
        bench.next();
        assert_eq!((bench.queue.lanes(), bench.queue.not_closed()), (10_000, (10_000, 0)));
        assert_eq!(bench.submit("host-0", 0, None), Submitted::Unsent);
        assert_eq!(bench.queue.breakers(100).len(), 100);
        bench.queue.take_changes();
        bench.now += Duration::from_secs(61);
        assert_eq!(bench.next(), None);
        let queue = &mut bench.queue;
        assert_eq!((queue.lanes(), queue.lanes_by_name.len(), queue.empty.len(), queue.lanes_kept), (0, 0, 0, 0));
        assert_eq!((queue.timers.len(), queue.not_closed(), queue.breakers(10).len()), (0, (0, 0), 0));
        let changes = queue.take_changes();
        assert!(changes.len() == 10_000 && changes.iter().all(|change| change.forgotten && change.to == View::Closed));
    }

    #[test]
    fn a_host_with_a_probe_each_minute_gathers_no_timers() {
        let mut bench = Bench::new(with_breaker(1, 1, 1));
        for order in 0..1_000 {
            bench.submit("a", order, None);
            let (id, _) = bench.next().expect("a probe");
            assert!(matches!(bench.failed(id, FAILING), Ruling::Down { .. }));
            bench.now += Duration::from_secs(60);
            bench.next();
            assert!(bench.queue.timers.len() < 5, "{}", bench.queue.timers.len());
        }
    }

    #[test]
    fn what_gathers_waits_for_others_until_it_is_full_or_late() {
        let mut bench = Bench::new(queue(10, 10, None));
        for order in 0..4 {
            bench.add("a", order, 1);
        }
        let (_, items) = bench.items().expect("a full one");
        assert_eq!((items, bench.items()), (vec![0, 1, 2], None));
        assert_eq!(bench.queue.next_wakeup(), Some(bench.now + LINGER));
        bench.now += LINGER;
        let (id, items) = bench.items().expect("a late one, beside the one under way");
        assert_eq!((items, bench.queue.next_wakeup()), (vec![3], None));
        bench.add("a", 9, 1);
        bench.done(id);
        assert_eq!((bench.outcome(3), bench.outcome(4)), (Ok(Outcome::Done), Err(TryRecvError::Empty)));
        assert_eq!(bench.items(), None, "another one, which lingers");
        assert!(bench.queue.gathering.len() == 1 && bench.queue.chains.len() == 4);
    }

    #[test]
    fn all_that_were_gathered_hear_the_same() {
        let mut bench = Bench::new(with_breaker(10, 10, 1));
        for order in 0..5 {
            bench.add("a", order, 1);
        }
        let (id, _) = bench.items().expect("a full one");
        bench.failed(id, FAILING);
        assert!((0..5).all(|number| is_unsent(bench.outcome(number))), "those that gather too");
        assert_eq!((bench.queue.gathering.len(), bench.queue.chains.len()), (0, 0));
    }

    #[test]
    fn a_gathered_job_waits_for_whom_one_of_its_items_follows() {
        let mut bench = Bench::new(queue(10, 10, None));
        bench.submit("a", 7, None);
        let (first, _) = bench.next().expect("nothing before it");
        for order in [5, 7, 6] {
            bench.add("a", order, 1);
        }
        bench.submit("a", 5, None);
        assert_eq!(bench.next(), None, "7 is under way, and 5 comes after the gathered one");
        bench.done(first);
        let (id, items) = bench.items().expect("a full one");
        assert_eq!((items, bench.next()), (vec![1, 2, 3], None));
        bench.done(id);
        assert_eq!(bench.numbers(), [4]);
    }

    #[test]
    fn what_is_gathered_keeps_the_order_of_its_key() {
        let mut bench = Bench::new(queue(10, 10, None));
        bench.add("a", 7, 1);
        bench.submit("a", 7, None);
        assert!(matches!(bench.add("a", 7, 1), Submitted::Queued(_)), "it would overtake the one between");
        bench.now += LINGER;
        let mut order = Vec::new();
        while let Some((id, number)) = bench.next() {
            order.push(number);
            bench.done(id);
        }
        assert_eq!(order, [0, 1, 2]);
    }

    #[test]
    fn a_retry_is_not_cut_short_by_the_end_of_its_lingering() {
        let mut bench = Bench::new(with_breaker(10, 10, 9));
        for order in 0..3 {
            bench.add("a", order, 1);
        }
        let (id, _) = bench.items().expect("a full one");
        let at = bench.now + LINGER + Duration::from_secs(1);
        bench.queue.finished(id, End::Retry { at }, bench.now);
        bench.now += LINGER;
        assert_eq!(bench.items(), None);
        bench.now = at;
        assert!(bench.items().is_some());
    }

    #[test]
    fn with_its_order_key_to_coalesce_by_a_document_is_sent_in_its_latest_state_only() {
        let mut bench = Bench::new(queue(10, 10, None));
        bench.submit("a", 7, Some(7));
        let (first, _) = bench.next().expect("nothing before it");
        for order in [7, 8, 7, 7] {
            bench.submit("a", order, Some(order));
        }
        assert_eq!(bench.numbers(), [2], "another document");
        bench.done(first);
        let (latest, number) = bench.next().expect("the latest state");
        assert_eq!(number, 4);
        bench.done(latest);
        assert!([1, 3, 4].iter().all(|number| bench.outcome(*number) == Ok(Outcome::Done)));
        assert_eq!(bench.queue.queued(), 0);
    }

    #[test]
    fn dropping_the_queue_closes_every_waiter() {
        let mut bench = Bench::new(queue(1, 1, None));
        bench.submit("a", 0, None);
        bench.queue = queue(1, 1, None);
        assert_eq!(bench.outcome(0), Err(TryRecvError::Closed));
    }

    #[test]
    fn a_hundred_thousand_jobs_take_far_less_than_a_minute_even_unoptimised() {
        let mut bench = Bench::new(queue(8, 64, None));
        let lanes = ["a", "b", "c", "d"];
        let started = std::time::Instant::now();
        for order in 0..100_000u64 {
            bench.submit(lanes[order as usize % 4], order % 5_000, (order % 3 == 0).then_some(order % 1_000));
        }
        let mut in_flight = VecDeque::new();
        loop {
            while let Some((id, _)) = bench.next() {
                in_flight.push_back(id);
            }
            let Some(id) = in_flight.pop_front() else { break };
            bench.done(id);
        }
        println!("{:?} for 100,000 jobs", started.elapsed());
        assert_eq!(bench.queue.queued(), 0);
        // An operation that scans the queue would take hours here; the exact rate is the bench's to say.
        assert!(started.elapsed() < Duration::from_secs(60));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Submit { lane: usize, order: u64, coalesce: Option<u64>, gathers: bool },
        Start,
        Finish { which: prop::sample::Index, how: u8 },
        Advance { ms: u64 },
        StopWaiting { which: prop::sample::Index },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0usize..3, 0u64..5, prop::option::of(0u64..4), any::<bool>())
                .prop_map(|(lane, order, coalesce, gathers)| Step::Submit { lane, order, coalesce, gathers }),
            4 => Just(Step::Start),
            3 => (any::<prop::sample::Index>(), 0u8..9).prop_map(|(which, how)| Step::Finish { which, how }),
            1 => (0u64..1_500).prop_map(|ms| Step::Advance { ms }),
            1 => any::<prop::sample::Index>().prop_map(|which| Step::StopWaiting { which }),
        ]
    }

    /// What the laws are checked against: which submissions each entry carries.
    #[derive(Default)]
    struct Ledger {
        carries: BTreeMap<EntryId, Vec<(usize, u64)>>,
        in_flight: BTreeMap<EntryId, &'static str>,
    }

    impl Ledger {
        fn orders(&self, id: EntryId) -> BTreeSet<u64> {
            self.carries[&id].iter().map(|(_, order)| *order).collect()
        }

        fn check_start(&self, bench: &Bench, id: EntryId, job: &Job, limits: (usize, usize)) {
            let orders = self.orders(id);
            for (other, _) in self.in_flight.iter() {
                assert!(self.orders(*other).is_disjoint(&orders), "two in flight of one order key");
            }
            let newest = self.carries[&id].iter().map(|(number, _)| *number).max();
            assert_eq!(newest, Some(job.number), "the newest spec of those that were folded");
            if let Some(items) = &job.items {
                assert!(items.iter().eq(self.carries[&id].iter().map(|(number, _)| number)), "all that were gathered, in order");
                assert!(items.len() <= ITEMS_MAX);
            }
            if let Some(breaker) = &bench.queue.lanes[&bench.queue.entries[&id].lane].breaker {
                let probes = self.in_flight.keys().filter(|other| bench.queue.entries[other].probe);
                let mut lanes = probes.map(|probe| self.in_flight[probe]);
                match breaker.view() {
                    View::Closed => assert!(!bench.queue.entries[&id].probe),
                    View::HalfOpen { probing: true } => {
                        assert!(bench.queue.entries[&id].probe, "only a probe is sent");
                        assert!(lanes.all(|lane| lane != job.lane), "one probe at a time");
                    }
                    view => panic!("sent to a host that is {view:?}"),
                }
            }
            let last_of_entry = |order: u64| self.carries[&id].iter().filter(|(_, o)| *o == order).map(|(n, _)| *n).max();
            for (other, carried) in self.carries.iter().filter(|(other, _)| **other != id) {
                for (number, order) in carried.iter().filter(|(_, order)| orders.contains(order)) {
                    let alive = bench.queue.entries.contains_key(other);
                    assert!(!alive || Some(*number) > last_of_entry(*order), "an earlier one of the key is not settled");
                }
            }
            assert!(self.in_flight.len() < limits.1, "more than the workers");
            assert!(self.in_flight.values().filter(|lane| **lane == job.lane).count() < limits.0, "more than the lane may");
        }
    }

    fn start(bench: &mut Bench, ledger: &mut Ledger, limits: (usize, usize)) -> bool {
        let Some((id, job)) = bench.queue.next(bench.now) else { return false };
        ledger.check_start(bench, id, &job, limits);
        ledger.in_flight.insert(id, job.lane);
        true
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

        #[test]
        fn order_limits_and_waiters_hold_in_any_history(
            concurrency in 1usize..4, workers_max in 1usize..5, per_second in prop::option::of(1u32..4),
            threshold in prop::option::of(0u32..4), steps in prop::collection::vec(step(), 1..120),
        ) {
            let limits = (concurrency, workers_max);
            let mut queue = match threshold {
                Some(threshold) => with_breaker(concurrency, workers_max, threshold),
                None => queue(concurrency, workers_max, None),
            };
            queue.limits.per_second = per_second.and_then(NonZeroU32::new);
            let mut bench = Bench::new(queue);
            let mut ledger = Ledger::default();
            let mut settled: BTreeMap<EntryId, Outcome> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Submit { lane, order, coalesce, gathers } => {
                        let number = bench.receivers.len();
                        let before = bench.queue.queued();
                        let lane = ["a", "b", "c"][lane];
                        let submitted = match coalesce {
                            Some(key) if gathers => bench.add(lane, order, key),
                            _ => bench.submit(lane, order, coalesce),
                        };
                        match submitted {
                            Submitted::Queued(id) => { ledger.carries.insert(id, vec![(number, order)]); }
                            Submitted::FoldedInto(id) => {
                                prop_assert_eq!(before, bench.queue.queued(), "a folded job adds none");
                                prop_assert!(!ledger.in_flight.contains_key(&id), "folded into one that is sent");
                                ledger.carries.get_mut(&id).expect("a known entry").push((number, order));
                            }
                            Submitted::Unsent => {
                                prop_assert!(is_unsent(bench.outcome(number)));
                                bench.receivers[number] = None;
                            }
                        }
                    }
                    Step::Start => { start(&mut bench, &mut ledger, limits); }
                    Step::Finish { which, how } => {
                        let ids: Vec<EntryId> = ledger.in_flight.keys().copied().collect();
                        if ids.is_empty() { continue }
                        let id = *which.get(&ids);
                        ledger.in_flight.remove(&id);
                        let ms = Duration::from_millis(u64::from(how) * 400);
                        let sign = match how {
                            0 => { bench.queue.finished(id, End::Crashed, bench.now); continue }
                            1 => { bench.queue.finished(id, End::Retry { at: bench.now + ms }, bench.now); continue }
                            2..5 => { settled.insert(id, Outcome::Done); bench.done(id); continue }
                            5 => Sign::Failing { pause: Some(ms) },
                            6 => Sign::Away { pause: ms },
                            _ => FAILING,
                        };
                        match bench.failed(id, sign) {
                            Ruling::Own => drop(settled.insert(id, own_fault())),
                            Ruling::Down { .. } => prop_assert!(threshold.is_some()),
                            Ruling::Pass => {}
                        }
                    }
                    Step::Advance { ms } => bench.now += Duration::from_millis(ms),
                    Step::StopWaiting { which } => {
                        if !bench.receivers.is_empty() {
                            let number = which.index(bench.receivers.len());
                            bench.receivers[number] = None;
                        }
                    }
                }
                prop_assert_eq!(bench.queue.in_flight(), ledger.in_flight.len());
            }
            // From any state, answering every request and waiting as told comes to an end.
            for round in 0.. {
                prop_assert!(round < 10_000, "the queue is stuck");
                if start(&mut bench, &mut ledger, limits) {
                    continue;
                }
                if let Some(id) = ledger.in_flight.keys().next().copied() {
                    ledger.in_flight.remove(&id);
                    settled.insert(id, Outcome::Done);
                    bench.done(id);
                } else if bench.queue.queued() > 0 {
                    let at = bench.queue.next_wakeup().expect("something to wait for");
                    prop_assert!(at > bench.now, "a wakeup in the past is a hot loop");
                    bench.now = at;
                } else {
                    break;
                }
            }
            prop_assert_eq!(bench.queue.queued(), 0);
            prop_assert!(bench.queue.chains.is_empty() && bench.queue.gathering.is_empty());
            for (id, carried) in &ledger.carries {
                for (number, _) in carried.iter().filter(|(number, _)| bench.receivers[*number].is_some()).copied().collect::<Vec<_>>() {
                    let outcome = bench.outcome(number);
                    match settled.get(id) {
                        Some(expected) => prop_assert_eq!(outcome.as_ref(), Ok(expected), "number {}", number),
                        None => prop_assert!(is_unsent(outcome) && threshold.is_some(), "number {} was lost", number),
                    }
                }
            }
            let (open, half_open) = bench.queue.not_closed();
            let views: Vec<View> = bench.queue.lanes.values().filter_map(|lane| Some(lane.breaker.as_ref()?.view())).collect();
            let count = |is: fn(&View) -> bool| views.iter().filter(|view| is(view)).count();
            prop_assert_eq!(open, count(|view| matches!(view, View::Open { .. })));
            prop_assert_eq!(half_open, count(|view| matches!(view, View::HalfOpen { .. })));
            bench.now += Duration::from_secs(7_200);
            prop_assert!(bench.next().is_none());
            prop_assert_eq!((bench.queue.lanes(), bench.queue.lanes_kept, bench.queue.timers.len()), (0, 0, 0));
        }
    }
}
