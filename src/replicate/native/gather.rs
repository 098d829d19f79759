//! Requests that many ask for at the same time, made as few.
//!
//! A lane is what may be asked together: one database, with one user's rights. While a request of a lane is under way, those
//! who come meanwhile wait, and their wishes go out as one. A wish never joins a request that was sent before it came: what
//! it wants to see may be younger. Full requests do not wait for each other, so that one large transfer uses several.

use futures_util::future::BoxFuture;
use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

pub trait Wish: Send + 'static {
    type Answer: Send + 'static;

    /// Its share of a full request, which is 1,000.
    fn weight(&self) -> usize;
}

pub const FULL: usize = 1_000;

type Perform<K, W> = dyn Fn(K, Vec<W>) -> BoxFuture<'static, Vec<<W as Wish>::Answer>> + Send + Sync;
type Waiting<W> = (W, oneshot::Sender<<W as Wish>::Answer>);

pub struct Gather<K, W: Wish> {
    inner: Arc<Inner<K, W>>,
}

impl<K, W: Wish> Clone for Gather<K, W> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

struct Inner<K, W: Wish> {
    lanes: Mutex<HashMap<K, Lane<W>>>,
    perform: Box<Perform<K, W>>,
    /// Requests of one lane under way, at most.
    in_flight_max: usize,
    /// How long the first of an idle lane waits for others who were woken by the same cause.
    pause: Duration,
}

struct Lane<W: Wish> {
    waiting: VecDeque<Waiting<W>>,
    weight: usize,
    in_flight: usize,
}

impl<W: Wish> Lane<W> {
    fn new() -> Self {
        Self { waiting: VecDeque::new(), weight: 0, in_flight: 0 }
    }

    /// The wishes of the next request: at least one, and no more than a full request holds.
    fn take(&mut self) -> Vec<Waiting<W>> {
        let mut taken = Vec::new();
        let mut weight = 0;
        while let Some((wish, _)) = self.waiting.front() {
            weight += wish.weight();
            if weight > FULL && !taken.is_empty() {
                break;
            }
            self.weight = self.weight.saturating_sub(wish.weight());
            taken.extend(self.waiting.pop_front());
        }
        taken
    }
}

impl<K, W> Gather<K, W>
where
    K: Clone + Eq + Hash + Send + Sync + 'static,
    W: Wish,
{
    /// `perform` answers each wish, in their order.
    pub fn new(
        in_flight_max: usize,
        pause: Duration,
        perform: impl Fn(K, Vec<W>) -> BoxFuture<'static, Vec<W::Answer>> + Send + Sync + 'static,
    ) -> Self {
        Self { inner: Arc::new(Inner { lanes: Mutex::default(), perform: Box::new(perform), in_flight_max, pause }) }
    }

    /// None only where `perform` panicked or answered too little.
    pub async fn ask(&self, key: K, wish: W) -> Option<W::Answer> {
        let (sender, answer) = oneshot::channel();
        let goes = {
            let mut lanes = self.inner.lanes();
            let lane = lanes.entry(key.clone()).or_insert_with(Lane::new);
            lane.weight += wish.weight();
            lane.waiting.push_back((wish, sender));
            let goes = lane.in_flight == 0 || (lane.in_flight < self.inner.in_flight_max && lane.weight >= FULL);
            lane.in_flight += usize::from(goes);
            goes
        };
        if goes {
            // A task of its own: others wait for it too, and whoever came first may give up.
            tokio::spawn(self.inner.clone().work(key));
        }
        answer.await.ok()
    }
}

impl<K, W> Inner<K, W>
where
    K: Clone + Eq + Hash + Send + Sync + 'static,
    W: Wish,
{
    fn lanes(&self) -> MutexGuard<'_, HashMap<K, Lane<W>>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn work(self: Arc<Self>, key: K) {
        let mut leaving = Leaving { inner: self.clone(), key: key.clone(), is_orderly: false };
        if !self.pause.is_zero() {
            tokio::time::sleep(self.pause).await;
        }
        loop {
            let taken = self.lanes().get_mut(&key).map(Lane::take).unwrap_or_default();
            let (wishes, askers): (Vec<W>, Vec<_>) = taken.into_iter().filter(|(_, asker)| !asker.is_closed()).unzip();
            if !wishes.is_empty() {
                for (asker, answer) in askers.into_iter().zip((self.perform)(key.clone(), wishes).await) {
                    // Whoever gave up meanwhile wants no answer.
                    let _ = asker.send(answer);
                }
            }
            // Decided under the lock in which wishes are added, so that none is left without a worker.
            if self.leaves(&key) {
                leaving.is_orderly = true;
                return;
            }
        }
    }

    /// True where nothing waits, or only what another worker will take.
    fn leaves(&self, key: &K) -> bool {
        let mut lanes = self.lanes();
        let Some(lane) = lanes.get_mut(key) else { return true };
        if !lane.waiting.is_empty() && (lane.in_flight == 1 || lane.weight >= FULL) {
            return false;
        }
        lane.in_flight -= 1;
        if lane.in_flight == 0 {
            lanes.remove(key);
        }
        true
    }
}

/// A worker that panics must not leave its lane closed: whoever waits in it is told by the end of his channel.
struct Leaving<K, W>
where
    K: Clone + Eq + Hash + Send + Sync + 'static,
    W: Wish,
{
    inner: Arc<Inner<K, W>>,
    key: K,
    is_orderly: bool,
}

impl<K, W> Drop for Leaving<K, W>
where
    K: Clone + Eq + Hash + Send + Sync + 'static,
    W: Wish,
{
    fn drop(&mut self) {
        if !self.is_orderly {
            let _closed = self.inner.lanes().remove(&self.key);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    struct Number(u64, usize);

    impl Wish for Number {
        type Answer = u64;

        fn weight(&self) -> usize {
            self.1
        }
    }

    type Sent = Arc<Mutex<Vec<Vec<u64>>>>;

    fn doubling(in_flight_max: usize, takes: Duration) -> (Gather<&'static str, Number>, Sent, Arc<AtomicUsize>) {
        let sent = Sent::default();
        let most = Arc::new(AtomicUsize::new(0));
        let running = Arc::new(AtomicUsize::new(0));
        let (log, peak) = (sent.clone(), most.clone());
        let gather = Gather::new(in_flight_max, Duration::ZERO, move |_, wishes: Vec<Number>| {
            log.lock().unwrap().push(wishes.iter().map(|wish| wish.0).collect());
            let (running, peak) = (running.clone(), peak.clone());
            Box::pin(async move {
                peak.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                tokio::time::sleep(takes).await;
                running.fetch_sub(1, Ordering::SeqCst);
                assert!(wishes.iter().all(|wish| wish.0 != u64::MAX), "scripted");
                wishes.iter().map(|wish| wish.0.wrapping_mul(2)).collect()
            })
        });
        (gather, sent, most)
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_come_meanwhile_go_together() {
        let (gather, sent, _) = doubling(3, Duration::from_millis(10));
        let asked = (0..50u64).map(|n| {
            let gather = gather.clone();
            tokio::spawn(async move { gather.ask("lane", Number(n, 1)).await })
        });
        let answers = futures_util::future::join_all(asked.collect::<Vec<_>>()).await;
        for (n, answer) in answers.into_iter().enumerate() {
            assert_eq!(answer.unwrap(), Some(n as u64 * 2), "each gets his own");
        }
        let sizes: Vec<usize> = sent.lock().unwrap().iter().map(Vec::len).collect();
        assert_eq!(sizes.iter().sum::<usize>(), 50);
        assert!(sizes.len() <= 2, "{sizes:?}");
        assert!(gather.inner.lanes().is_empty(), "an idle lane is forgotten");
    }

    #[tokio::test(start_paused = true)]
    async fn full_requests_go_side_by_side_up_to_the_bound() {
        let (gather, sent, most) = doubling(3, Duration::from_millis(10));
        let asked = (0..20u64).map(|n| {
            let gather = gather.clone();
            tokio::spawn(async move { gather.ask("lane", Number(n, 600)).await })
        });
        futures_util::future::join_all(asked.collect::<Vec<_>>()).await;
        assert_eq!(most.load(Ordering::SeqCst), 3);
        assert!(sent.lock().unwrap().iter().all(|request| request.len() == 1), "two would be more than full");
    }

    #[tokio::test(start_paused = true)]
    async fn lanes_do_not_wait_for_each_other() {
        let (gather, _, _) = doubling(1, Duration::from_secs(3_600));
        let slow = tokio::spawn({
            let gather = gather.clone();
            async move { gather.ask("slow", Number(1, 1)).await }
        });
        tokio::task::yield_now().await;
        let started = tokio::time::Instant::now();
        assert_eq!(gather.ask("fast", Number(2, 1)).await, Some(4));
        assert_eq!(started.elapsed(), Duration::from_secs(3_600), "its own time, not both");
        assert_eq!(slow.await.unwrap(), Some(2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_is_told_and_the_lane_opens_again() {
        let (gather, _, _) = doubling(1, Duration::from_millis(10));
        let bad = tokio::spawn({
            let gather = gather.clone();
            async move { gather.ask("lane", Number(u64::MAX, 1)).await }
        });
        assert_eq!(bad.await.unwrap(), None);
        assert_eq!(gather.ask("lane", Number(1, 1)).await, Some(2));
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_gives_up_takes_nobody_with_him() {
        let (gather, sent, _) = doubling(1, Duration::from_millis(10));
        let first = gather.ask("lane", Number(1, 1));
        assert!(tokio::time::timeout(Duration::from_millis(1), first).await.is_err());
        let asked = (2..5u64).map(|n| {
            let gather = gather.clone();
            tokio::spawn(async move { gather.ask("lane", Number(n, 1)).await })
        });
        let asked: Vec<_> = asked.collect();
        tokio::task::yield_now().await;
        asked[0].abort();
        assert_eq!(futures_util::future::join_all(asked).await.iter().filter(|answer| answer.is_ok()).count(), 2);
        assert_eq!(*sent.lock().unwrap(), [vec![1], vec![3, 4]]);
    }
}
