//! Deliveries that are under way for one page ▶ their outcomes, but for those that others will not wait for.

use crate::db::late::Outstanding;
use crate::db::positions::RuleId;
use crate::job::Outcome;
use crate::rules::rule::Rule;
use crate::schedule::Pool;
use crate::webhook::{Delivery, HttpSender};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::sync::{oneshot, watch};

/// A receiver is not slow before this.
pub const PATIENCE: Duration = Duration::from_millis(100);

/// When a page goes on without its slow deliveries.
#[derive(Clone, Copy)]
pub struct Leave<'a> {
    /// The database has changed since, or another rule may go on.
    pub more: &'a watch::Sender<bool>,
    /// Whether somebody waits already.
    pub is_wanted: bool,
    /// There are rules with nothing under way, on this page or elsewhere: nobody else needs to be done first.
    pub has_others: bool,
    pub patience: Duration,
}

pub struct Pending {
    pub row: usize,
    pub rule: Arc<Rule>,
    pub key: u64,
    pub outcome: oneshot::Receiver<Outcome>,
}

/// Of one rule whose deliveries keep the order of the whole database: what is sent after the one that is under way.
pub type Line = VecDeque<(usize, u64, Result<Delivery, Outcome>)>;

pub type Lines = BTreeMap<RuleId, (Arc<Rule>, Line)>;

/// A delivery that was awaited, in the order in which they were sent.
pub struct Sent {
    pub row: usize,
    pub rule: Arc<Rule>,
    pub key: u64,
    pub ended: Option<Outcome>,
}

/// Ready with where its delivery stands in the list.
struct Flying {
    at: usize,
    outcome: oneshot::Receiver<Outcome>,
}

impl Future for Flying {
    type Output = (usize, Outcome);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.outcome).poll(context).map(|outcome| (self.at, outcome.unwrap_or_else(|_| lost())))
    }
}

/// Awaits all, and what follows the successful ones in their lines, or until others have waited long enough: then what has not
/// ended is given back as it is, by its place in the list.
pub async fn gather(
    pool: &Pool<HttpSender>,
    pending: Vec<Pending>,
    lines: &mut Lines,
    leave: Option<Leave<'_>>,
) -> (Vec<Sent>, HashMap<usize, oneshot::Receiver<Outcome>>) {
    let started = Instant::now();
    let (mut sent, mut flying) = (Vec::with_capacity(pending.len()), FuturesUnordered::new());
    let mut under_way: HashMap<RuleId, usize> = HashMap::new();
    let fly = |pending: Pending, sent: &mut Vec<Sent>, flying: &mut FuturesUnordered<Flying>| {
        let Pending { row, rule, key, outcome } = pending;
        flying.push(Flying { at: sent.len(), outcome });
        sent.push(Sent { row, rule, key, ended: None });
    };
    for pending in pending {
        *under_way.entry(pending.rule.id.clone()).or_default() += 1;
        fly(pending, &mut sent, &mut flying);
    }
    let mut first_done = leave.filter(|leave| leave.has_others).map(|_| Duration::ZERO);
    loop {
        let slow_at = leave.zip(first_done).map(|(leave, took)| started + took + took.max(leave.patience));
        let ended = tokio::select! {
            biased;
            ended = flying.next() => ended,
            () = is_left(leave, slow_at) => break,
        };
        let Some((at, outcome)) = ended else { break };
        let Some(done) = sent.get_mut(at) else { continue };
        let (rule, is_done) = (done.rule.clone(), outcome == Outcome::Done);
        done.ended = Some(outcome);
        let line = lines.get_mut(&rule.id).filter(|_| is_done);
        match line.and_then(|(rule, line)| next_in_line(pool, rule, line)) {
            Some(next) => fly(next, &mut sent, &mut flying),
            None => {
                let left = under_way.entry(rule.id.clone()).or_default();
                *left = left.saturating_sub(1);
                if *left == 0 {
                    first_done.get_or_insert(started.elapsed());
                }
            }
        }
    }
    (sent, flying.into_iter().map(|flying| (flying.at, flying.outcome)).collect())
}

/// Ends when the slow ones are left to themselves: not before they have had their time, nor before somebody waits for it.
async fn is_left(leave: Option<Leave<'_>>, slow_at: Option<Instant>) {
    let (Some(leave), Some(slow_at)) = (leave, slow_at) else { return std::future::pending().await };
    tokio::time::sleep_until(slow_at.into()).await;
    if !leave.is_wanted {
        let _ = leave.more.subscribe().wait_for(|more| *more).await;
    }
}

pub fn next_in_line(pool: &Pool<HttpSender>, rule: &Arc<Rule>, line: &mut Line) -> Option<Pending> {
    let (row, key, built) = line.pop_front()?;
    Some(Pending { row, rule: rule.clone(), key, outcome: send(pool, built) })
}

pub fn send(pool: &Pool<HttpSender>, built: Result<Delivery, Outcome>) -> oneshot::Receiver<Outcome> {
    match built {
        Ok(delivery) => pool.run(delivery),
        Err(outcome) => {
            let (reply, receiver) = oneshot::channel();
            let _ = reply.send(outcome);
            receiver
        }
    }
}

/// Never two at once for one document, or one line: what is under way ends first, and what it is about is not sent again.
pub fn after(
    mut older: Vec<Outstanding>,
    key: u64,
    pool: &Pool<HttpSender>,
    built: Result<Delivery, Outcome>,
) -> oneshot::Receiver<Outcome> {
    let same = older.iter().position(|outstanding| outstanding.key == key).map(|at| older.swap_remove(at).outcome);
    if older.is_empty() {
        return same.unwrap_or_else(|| send(pool, built));
    }
    let (pool, (reply, receiver)) = (pool.clone(), oneshot::channel());
    tokio::spawn(async move {
        for older in older {
            let _ = older.outcome.await;
        }
        let outcome = match same {
            Some(same) => same,
            None => send(&pool, built),
        };
        if let Ok(outcome) = outcome.await {
            let _ = reply.send(outcome);
        }
    });
    receiver
}

fn lost() -> Outcome {
    let error = String::from("the webhook pool is being restarted");
    Outcome::Unsent { error, after: Duration::from_secs(1) }
}
