//! How many bytes of documents all runs together may hold.
//!
//! A run reserves before it reads and grows its reservation while it reads; where nothing is left it writes out what it has.
//! That alone could stop everybody, each with half a document, so one holder at a time may overdraw: it finishes one document
//! beyond the budget, while nobody else begins. Who overdraws never waits for room, so there is always somebody who goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A semaphore counts in 32 bits at a time; in these units that reaches 4 TiB.
const UNIT_BYTES: u64 = 1024;

/// Cheap to clone; all clones are one budget.
#[derive(Debug, Clone)]
pub struct Budget {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    units_max: u32,
    free: Arc<Semaphore>,
    /// One permit: who has it may exceed the budget.
    overdraft: Arc<Semaphore>,
    held: AtomicU64,
    high_water: AtomicU64,
}

/// Bytes that are held; its drop gives them back.
///
/// Whoever has one grows it and never waits for a second one: two that wait for each other's would wait forever.
#[derive(Debug)]
#[must_use]
pub struct Reservation {
    budget: Budget,
    bytes: u64,
    /// Rounded up to units; None stands for no unit.
    permit: Option<OwnedSemaphorePermit>,
    overdraft: Option<OwnedSemaphorePermit>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Grown {
    Yes,
    /// Nothing is left: write out what is complete, `shrink`, and only then `overdraw` for what is not.
    Flush,
}

impl Budget {
    pub fn new(bytes: u64) -> Self {
        // No semaphore is as large as a whole u32 on every platform, and no budget either.
        let units_max = units(bytes).clamp(1, u32::MAX >> 4);
        let free = Arc::new(Semaphore::new(units_max as usize));
        let overdraft = Arc::new(Semaphore::new(1));
        let (held, high_water) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { inner: Arc::new(Inner { units_max, free, overdraft, held, high_water }) }
    }

    /// Waits in line for as many bytes, or for all that there are.
    pub async fn reserve(&self, estimate: u64) -> Reservation {
        let units = units(estimate).min(self.inner.units_max);
        let permit = acquire(&self.inner.free, units).await;
        let mut reservation = Reservation { budget: self.clone(), bytes: 0, permit, overdraft: None };
        reservation.count(estimate.min(u64::from(units) * UNIT_BYTES));
        reservation
    }

    /// Bytes that are held now.
    pub fn held(&self) -> u64 {
        self.inner.held.load(Ordering::Relaxed)
    }

    /// The most that were ever held at once.
    pub fn high_water(&self) -> u64 {
        self.inner.high_water.load(Ordering::Relaxed)
    }
}

impl Reservation {
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes more, if there is more, without waiting.
    pub fn grow(&mut self, bytes: u64) -> Grown {
        let wanted = self.units_wanted(bytes);
        if wanted > 0 && self.overdraft.is_none() {
            match self.budget.inner.free.clone().try_acquire_many_owned(wanted) {
                Ok(permit) => self.add(Some(permit)),
                Err(_) => return Grown::Flush,
            }
        }
        self.count(bytes);
        Grown::Yes
    }

    /// Takes more in any case: what becomes free meanwhile, or the right to exceed the budget. With that, `grow` succeeds until
    /// `shrink` has brought the reservation back to what it had: so overdraw for one document, and write it out.
    pub async fn overdraw(&mut self, bytes: u64) {
        let wanted = self.units_wanted(bytes);
        if wanted > 0 && self.overdraft.is_none() {
            let inner = self.budget.inner.clone();
            tokio::select! {
                biased;
                permit = acquire(&inner.free, wanted), if wanted <= inner.units_max => self.add(permit),
                right = acquire(&inner.overdraft, 1) => self.overdraft = right,
            }
        }
        self.count(bytes);
    }

    /// Gives back what was written out; first of all what was overdrawn.
    pub fn shrink(&mut self, bytes: u64) {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        self.budget.inner.held.fetch_sub(bytes, Ordering::Relaxed);
        let (needed, had) = (units(self.bytes), self.units_had());
        if needed <= had {
            self.overdraft = None;
        }
        if let Some(permit) = &mut self.permit {
            drop(permit.split(had.saturating_sub(needed) as usize));
        }
    }

    fn units_had(&self) -> u32 {
        self.permit.as_ref().map_or(0, |permit| u32::try_from(permit.num_permits()).unwrap_or(u32::MAX))
    }

    fn units_wanted(&self, bytes: u64) -> u32 {
        units(self.bytes.saturating_add(bytes)).saturating_sub(self.units_had())
    }

    fn add(&mut self, more: Option<OwnedSemaphorePermit>) {
        match (&mut self.permit, more) {
            (Some(permit), Some(more)) => permit.merge(more),
            (permit @ None, more) => *permit = more,
            (Some(_), None) => {}
        }
    }

    fn count(&mut self, bytes: u64) {
        self.bytes += bytes;
        let held = self.budget.inner.held.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.budget.inner.high_water.fetch_max(held, Ordering::Relaxed);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // Before the permits go: whoever takes them must not be counted beside what is gone.
        self.budget.inner.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// The semaphores are never closed, so None does not come.
async fn acquire(semaphore: &Arc<Semaphore>, units: u32) -> Option<OwnedSemaphorePermit> {
    semaphore.clone().acquire_many_owned(units).await.ok()
}

fn units(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::time::Duration;

    const KB: u64 = 1024;

    #[tokio::test]
    async fn who_comes_when_nothing_is_left_waits_in_line() {
        let budget = Budget::new(10 * KB);
        let first = budget.reserve(8 * KB).await;
        let mut large = Box::pin(budget.reserve(9 * KB));
        assert!(large.as_mut().now_or_never().is_none());
        let mut small = Box::pin(budget.reserve(KB));
        assert!(small.as_mut().now_or_never().is_none(), "a small one does not overtake, or the large one would starve");
        drop(first);
        let large = large.await;
        let small = small.await;
        assert_eq!((large.bytes(), small.bytes(), budget.held()), (9 * KB, KB, 10 * KB));
        drop((large, small));
        assert_eq!(budget.held(), 0);
        assert_eq!(budget.reserve(u64::MAX).await.bytes(), 10 * KB, "more than there is means all");
    }

    #[tokio::test]
    async fn a_reservation_grows_while_there_is_room_and_gives_back() {
        let budget = Budget::new(10 * KB);
        let mut one = budget.reserve(0).await;
        for _ in 0..100 {
            assert_eq!(one.grow(KB / 10), Grown::Yes, "bytes are rounded once and not each time");
        }
        assert_eq!(one.grow(KB), Grown::Flush);
        assert_eq!(budget.held(), 100 * (KB / 10), "what was refused is not counted");
        one.shrink(9 * KB);
        let two = budget.reserve(8 * KB).now_or_never().expect("there is room again");
        assert_eq!(one.grow(2 * KB), Grown::Flush);
        drop((one, two));
        assert_eq!(budget.held(), 0);
        assert_eq!(budget.inner.free.available_permits(), 10);
    }

    #[tokio::test]
    async fn one_at_a_time_overdraws_until_its_document_is_written() {
        let budget = Budget::new(10 * KB);
        let mut one = budget.reserve(5 * KB).await;
        let mut two = budget.reserve(5 * KB).await;
        one.overdraw(30 * KB).await;
        assert_eq!(one.grow(30 * KB), Grown::Yes);
        assert_eq!(two.grow(1), Grown::Flush);
        assert!(two.overdraw(KB).now_or_never().is_none(), "somebody overdraws already");
        assert_eq!(two.bytes(), 5 * KB);
        one.shrink(59 * KB);
        assert!(two.overdraw(KB).now_or_never().is_none(), "6 kB are more than it had");
        one.shrink(KB);
        assert_eq!((one.bytes(), budget.held()), (5 * KB, 10 * KB));
        two.overdraw(20 * KB).await;
        one.shrink(KB);
        assert_eq!(one.grow(KB), Grown::Yes, "what it gave back was free");
        drop(two);
        one.overdraw(5 * KB).await;
        assert!(one.overdraft.is_none(), "there was room");
        assert_eq!(budget.high_water(), 70 * KB);
    }

    #[tokio::test]
    async fn who_gives_up_waiting_leaves_nothing_behind() {
        let budget = Budget::new(10 * KB);
        let mut one = budget.reserve(10 * KB).await;
        assert!(budget.reserve(KB).now_or_never().is_none());
        one.overdraw(KB).await;
        let mut two = budget.reserve(0).await;
        assert!(two.overdraw(KB).now_or_never().is_none());
        drop(one);
        drop(two);
        assert_eq!((budget.inner.free.available_permits(), budget.inner.overdraft.available_permits()), (10, 1));
        assert_eq!(budget.held(), 0);
    }

    /// Reads `documents` the way a run does, and says how often it had to write out early.
    async fn run(budget: Budget, documents: Vec<u64>, mut random: fastrand::Rng) -> u64 {
        let mut flushes = 0;
        let mut reservation = budget.reserve(random.u64(0..64 * KB)).await;
        reservation.shrink(u64::MAX);
        let mut complete = 0;
        for document in documents {
            let mut partial = 0;
            while partial < document {
                let chunk = random.u64(1..16 * KB).min(document - partial);
                if reservation.grow(chunk) == Grown::Flush {
                    flushes += 1;
                    tokio::task::yield_now().await;
                    reservation.shrink(std::mem::take(&mut complete));
                    if reservation.grow(chunk) == Grown::Flush {
                        reservation.overdraw(chunk).await;
                    }
                }
                partial += chunk;
                if random.u8(..) < 8 {
                    tokio::time::sleep(Duration::from_micros(random.u64(..200))).await;
                } else {
                    tokio::task::yield_now().await;
                }
            }
            complete += document;
            // One document is what an overdraft is for.
            if reservation.overdraft.is_some() {
                reservation.shrink(std::mem::take(&mut complete));
            }
        }
        flushes
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn everybody_finishes_and_no_more_than_one_document_exceeds_the_budget() {
        const DOCUMENT_BYTES_MAX: u64 = 150 * KB;
        for seed in 0..12 {
            let mut random = fastrand::Rng::with_seed(seed);
            let bytes = random.u64(KB..200 * KB);
            let budget = Budget::new(bytes);
            let runs: Vec<_> = (0..40)
                .map(|_| {
                    let documents = (0..random.usize(1..20)).map(|_| random.u64(0..DOCUMENT_BYTES_MAX)).collect();
                    tokio::spawn(run(budget.clone(), documents, random.fork()))
                })
                .collect();
            let all = futures_util::future::join_all(runs);
            let flushes = tokio::time::timeout(Duration::from_secs(30), all).await.expect("nobody waits forever");
            let flushes: u64 = flushes.into_iter().map(|flushes| flushes.expect("no run panics")).sum();
            assert!(flushes > 0, "seed {seed}: the budget was never short");
            assert_eq!((budget.held(), budget.inner.free.available_permits()), (0, units(bytes) as usize), "seed {seed}");
            let high = budget.high_water();
            assert!(high <= bytes + KB + DOCUMENT_BYTES_MAX, "seed {seed}: {high} bytes of {bytes}");
        }
    }
}
