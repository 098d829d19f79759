//! How many requests of replications are under way at one host: found out, not configured.
//!
//! Additive increase, multiplicative decrease: each good answer makes a little more room, and a host that refuses, fails or
//! slows down halves it, so that the first pass over thousands of databases settles at what the host bears.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Pure: what a host was seen to bear.
#[derive(Debug, Clone)]
pub struct Limit {
    now: f64,
    max: f64,
    /// The time of an answer when the host is not pressed: falls at once, rises slowly.
    usual: Option<Duration>,
    /// One decrease for each burst of bad answers: those that were sent before it say nothing new.
    decreased_at: Option<Instant>,
}

const LIMIT_MIN: f64 = 2.0;
const LIMIT_FIRST: f64 = 16.0;
/// Answers this many times slower than usual are a queue inside the host, once they also take longer than `SLOW_MIN`.
const SLOW: f64 = 8.0;
const SLOW_MIN: Duration = Duration::from_millis(500);

impl Limit {
    pub fn new(max: usize) -> Self {
        let max = (max as f64).max(LIMIT_MIN);
        Self { now: LIMIT_FIRST.min(max), max, usual: None, decreased_at: None }
    }

    pub fn places(&self) -> usize {
        self.now as usize
    }

    /// `status` is 0 where no answer came. `pressed` says that all places were taken, without which an answer proves nothing.
    pub fn answered(&mut self, status: u16, took: Duration, pressed: bool, now: Instant) {
        let usual = *self.usual.get_or_insert(took);
        let is_overload = matches!(status, 0 | 408 | 429 | 500..);
        let is_slow = took > SLOW_MIN && took.as_secs_f64() > usual.as_secs_f64() * SLOW;
        self.usual = Some(match took < usual {
            true => took,
            false => usual + (took - usual) / 64,
        });
        match (is_overload, is_slow) {
            (true, _) => self.decrease(0.5, took, now),
            (false, true) => self.decrease(0.8, took, now),
            (false, false) if pressed => self.now = (self.now + 1.0 / self.now).min(self.max),
            (false, false) => {}
        }
    }

    fn decrease(&mut self, factor: f64, took: Duration, now: Instant) {
        if self.decreased_at.is_some_and(|at| now.duration_since(at) < took) {
            return;
        }
        self.decreased_at = Some(now);
        self.now = (self.now * factor).max(LIMIT_MIN);
    }
}

/// One for each host; those that nobody uses are forgotten.
#[derive(Clone)]
pub struct Gates {
    max: usize,
    gates: Arc<Mutex<HashMap<String, Gate>>>,
}

impl Gates {
    pub fn new(max: usize) -> Self {
        Self { max, gates: Arc::default() }
    }

    pub fn of(&self, place: &str) -> Gate {
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(gate) = gates.get(place) {
            return gate.clone();
        }
        gates.retain(|_, gate| Arc::strong_count(&gate.0) > 1);
        let gate = Gate(Arc::new(Mutex::new(Places { limit: Limit::new(self.max), taken: 0, waiting: VecDeque::new() })));
        gates.insert(place.to_string(), gate.clone());
        gate
    }
}

#[derive(Clone)]
pub struct Gate(Arc<Mutex<Places>>);

struct Places {
    limit: Limit,
    taken: usize,
    waiting: VecDeque<oneshot::Sender<Pass>>,
}

/// A place at the host; gives itself back.
pub struct Pass {
    gate: Option<Gate>,
}

impl Gate {
    fn places(&self) -> MutexGuard<'_, Places> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub async fn enter(&self) -> Pass {
        let turn = {
            let mut places = self.places();
            if places.taken < places.limit.places() {
                places.taken += 1;
                return Pass { gate: Some(self.clone()) };
            }
            let (sender, turn) = oneshot::channel();
            places.waiting.push_back(sender);
            turn
        };
        // The sender is dropped unsent only with the gate, which this call holds.
        turn.await.unwrap_or(Pass { gate: None })
    }

    fn leave(&self) {
        let mut freed = Vec::new();
        {
            let mut places = self.places();
            places.taken = places.taken.saturating_sub(1);
            while places.taken < places.limit.places()
                && let Some(next) = places.waiting.pop_front()
            {
                // Whoever gave up waiting is passed over; others are told outside the lock, where a pass may be dropped.
                if !next.is_closed() {
                    places.taken += 1;
                    freed.push(next);
                }
            }
        }
        for next in freed {
            // Comes back where nobody waits any more, and leaves as any other.
            drop(next.send(Pass { gate: Some(self.clone()) }));
        }
    }
}

impl Pass {
    pub fn answered(&self, status: u16, took: Duration) {
        if let Some(gate) = &self.gate {
            let mut places = gate.places();
            let pressed = places.taken >= places.limit.places();
            places.limit.answered(status, took, pressed, Instant::now());
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if let Some(gate) = self.gate.take() {
            gate.leave();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    const FAST: Duration = Duration::from_millis(10);

    #[test]
    fn room_grows_with_good_answers_and_halves_with_bad_ones() {
        let now = Instant::now();
        let mut limit = Limit::new(64);
        assert_eq!(limit.places(), 16);
        for _ in 0..400 {
            limit.answered(200, FAST, true, now);
        }
        let grown = limit.places();
        assert!(grown > 25, "{grown}");
        limit.answered(429, FAST, true, now);
        assert_eq!(limit.places(), grown / 2);
        limit.answered(503, FAST, true, now);
        assert_eq!(limit.places(), grown / 2, "the same burst");
        limit.answered(0, FAST, true, now + FAST * 2);
        assert_eq!(limit.places(), grown / 4);
        for _ in 0..100 {
            limit.answered(200, FAST, false, now);
        }
        assert_eq!(limit.places(), grown / 4, "who is not pressed learns nothing");
    }

    #[test]
    fn it_never_closes_and_never_exceeds_its_bound() {
        let now = Instant::now();
        let mut limit = Limit::new(20);
        for n in 0..100u32 {
            limit.answered(500, FAST, true, now + FAST * (n * 2));
        }
        assert_eq!(limit.places(), 2);
        for _ in 0..10_000 {
            limit.answered(201, FAST, true, now);
        }
        assert_eq!(limit.places(), 20);
    }

    #[test]
    fn a_host_that_queues_gets_less() {
        let now = Instant::now();
        let mut limit = Limit::new(64);
        limit.answered(200, FAST, true, now);
        limit.answered(200, Duration::from_millis(400), true, now + FAST);
        assert_eq!(limit.places(), 16, "slower, but quick enough");
        limit.answered(200, Duration::from_secs(2), true, now + Duration::from_secs(4));
        assert!(limit.places() < 16);
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_wait_go_in_their_order_and_those_who_gave_up_cost_nothing() {
        let gate = Gates::new(2).of("host");
        let first = gate.enter().await;
        let _second = gate.enter().await;
        let gone = tokio::time::timeout(FAST, gate.enter()).await;
        assert!(gone.is_err());
        let third = tokio::spawn({
            let gate = gate.clone();
            async move { gate.enter().await }
        });
        tokio::task::yield_now().await;
        drop(first);
        let third = third.await.expect("it enters");
        assert_eq!(gate.places().taken, 2);
        drop(third);
        assert_eq!(gate.places().taken, 1);
    }

    #[test]
    fn idle_hosts_are_forgotten() {
        let gates = Gates::new(8);
        let kept = gates.of("a");
        for n in 0..100 {
            gates.of(&format!("h{n}"));
        }
        assert!(gates.gates.lock().unwrap().len() <= 2);
        drop(kept);
    }
}
