//! One page of changes ▶ webhook deliveries ▶ what became of each.
//!
//! What fails by itself is parked, and counts as delivered once that is durable. Where a rule is to wait instead (`on_failure`,
//! `order`, `block`), where its host is not asked for now, or where no more may be parked, the rule is held at its first row.

use crate::couch::Row;
use crate::db::late::{Late, Outstanding};
use crate::db::positions::{PageOutcome, RuleId};
use crate::deliveries::index::Standing;
use crate::deliveries::{Deliveries, Owed};
use crate::job::{DbName, Failed, Outcome, Verdict};
use crate::rules::document::Document;
use crate::rules::handling::{OnFailure, Order};
use crate::rules::rule::Rule;
use crate::schedule::Pool;
use crate::vault::Vault;
use crate::webhook::request::RequestError;
use crate::webhook::{Delivery, HttpSender};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, oneshot};

/// With what a page is delivered.
pub struct Means<'a> {
    pub pool: &'a Pool<HttpSender>,
    pub vault: &'a Vault,
    pub deliveries: &'a Deliveries,
}

/// What a page is delivered for.
pub struct Addressee<'a> {
    pub db: &'a DbName,
    pub instance_start_time: &'a str,
    pub rules: &'a [Arc<Rule>],
    /// Deliveries that succeeded in an earlier try of the same rows.
    pub delivered: &'a HashSet<u64>,
    /// The rules failed the last time: one delivery goes ahead of the others.
    pub probing: bool,
    /// When the page had been read.
    pub received: Instant,
    /// Where others would wait for the slowest.
    pub leave: Option<Leave<'a>>,
}

/// When a page goes on without its slow deliveries.
#[derive(Clone, Copy)]
pub struct Leave<'a> {
    /// The database has changed since.
    pub more: &'a Notify,
    /// Whether somebody waits already.
    pub is_wanted: bool,
    /// Other rules stand elsewhere, so that nobody of this page needs to be done.
    pub has_others: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleFailure {
    pub error: String,
    pub wait: Wait,
}

/// How long a rule is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Longer each time, and at least as long as the receiver asked for.
    Backoff { after: Option<Duration> },
    /// Its host is asked again then; that it is held is no failure of its own.
    For(Duration),
}

#[derive(Default)]
pub struct Delivered {
    pub page: PageOutcome,
    pub failures: BTreeMap<RuleId, RuleFailure>,
    /// What is still under way.
    pub late: BTreeMap<RuleId, Vec<(String, Outstanding)>>,
}

/// A rule that is disabled is looked at again after this, if nobody tells of its end before.
pub const DISABLED_FOR: Duration = Duration::from_secs(600);

/// A receiver is not slow before this.
const PATIENCE: Duration = Duration::from_millis(100);

struct Pending {
    row: usize,
    rule: Arc<Rule>,
    key: u64,
    outcome: oneshot::Receiver<Outcome>,
}

/// Of one rule whose deliveries keep the order of the whole database: what is sent after the one that is under way.
type Line = VecDeque<(usize, u64, Result<Delivery, Outcome>)>;

/// One that is under way; ready with where its delivery stands in the list.
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

/// A delivery of the list that is awaited.
struct Sent {
    row: usize,
    rule: Arc<Rule>,
    key: u64,
    ended: Option<Outcome>,
}

struct Sheet<'a> {
    means: &'a Means<'a>,
    to: &'a Addressee<'a>,
    rows: &'a [Row],
    delivered: Vec<(usize, u64)>,
    failed: BTreeMap<RuleId, usize>,
    failures: BTreeMap<RuleId, RuleFailure>,
    parking: Vec<(usize, Arc<Rule>, u64, Option<Failed>)>,
    late: BTreeMap<RuleId, Vec<(String, Outstanding)>>,
}

/// Delivers rows in order. Rules that do not block are sent together and awaited at the end; a blocking one is awaited before
/// the next row starts.
pub async fn deliver(means: &Means<'_>, to: Addressee<'_>, rows: &[Row], late: &mut Late) -> Delivered {
    let mut sheet = Sheet {
        means,
        to: &to,
        rows,
        delivered: Vec::new(),
        failed: BTreeMap::new(),
        failures: BTreeMap::new(),
        parking: Vec::new(),
        late: BTreeMap::new(),
    };
    let disabled: Vec<bool> = to.rules.iter().map(|rule| means.deliveries.is_disabled(rule)).collect();
    let mut waiting: Vec<Pending> = Vec::new();
    let mut lines: BTreeMap<RuleId, (Arc<Rule>, Line)> = BTreeMap::new();
    let mut unsent: Vec<(Arc<Delivery>, oneshot::Sender<Outcome>)> = Vec::new();
    let mut blocked_at = None;
    let mut probing = to.probing;

    for (index, row) in rows.iter().enumerate() {
        let doc = Document::of(row);
        let mut blocking = Vec::new();
        let matching = to.rules.iter().zip(&disabled).filter(|(rule, _)| rule.matches(&doc));
        for (rule, is_disabled) in matching {
            let key = delivery_key(&rule.id, row);
            if to.delivered.contains(&key) {
                sheet.delivered.push((index, key));
                continue;
            }
            if *is_disabled {
                sheet.hold(index, rule, String::from("the receiver answered 410 Gone"), Wait::For(DISABLED_FOR));
                if rule.block {
                    blocked_at = Some(index);
                    break;
                }
                continue;
            }
            match means.deliveries.standing(&rule.id, to.db, (&row.id, row.rev()), to.received) {
                Standing::Free => {}
                Standing::Parked => {
                    sheet.parking.push((index, rule.clone(), key, None));
                    continue;
                }
                Standing::Superseded => {
                    sheet.delivered.push((index, key));
                    continue;
                }
            }
            let built = crate::webhook::delivery(means.vault, rule, to.db, to.instance_start_time, &doc, 0).map_err(unbuildable);
            if rule.handling.order == Order::Database && !rule.block && !probing {
                let line = lines.entry(rule.id.clone()).or_insert_with(|| (rule.clone(), Line::new()));
                line.1.push_back((index, key, built));
                continue;
            }
            let outcome = match late.take(&rule.id, &row.id) {
                Some(sent) if sent.key == key => sent.outcome,
                Some(older) => after(older, means.pool, built),
                None => {
                    let (reply, outcome) = oneshot::channel();
                    match built {
                        Ok(delivery) => unsent.push((Arc::new(delivery), reply)),
                        Err(outcome) => drop(reply.send(outcome)),
                    }
                    outcome
                }
            };
            let pending = Pending { row: index, rule: rule.clone(), key, outcome };
            match rule.block || probing {
                true => blocking.push(pending),
                false => waiting.push(pending),
            }
        }
        if blocked_at.is_some() {
            break;
        }
        if !blocking.is_empty() {
            means.pool.submit(std::mem::take(&mut unsent));
            let rule_blocks = blocking.iter().any(|pending| pending.rule.block);
            // What probes for several rules holds all of them, whoever is slow.
            let leave = to.leave.filter(|_| !rule_blocks && to.rules.len() == 1);
            if !sheet.settle(blocking, BTreeMap::new(), leave).await {
                match rule_blocks {
                    true => blocked_at = Some(index),
                    // The probe failed: the rest of the page is not tried for these rules.
                    false => sheet.give_up_rest(index),
                }
                break;
            }
            probing = false;
        }
    }
    means.pool.submit(unsent);
    for (rule_id, (_, line)) in &mut lines {
        // One at a time: what is under way for this rule is the first of its line.
        if let Some((row, key, built)) = line.pop_front() {
            let id = rows.get(row).map_or("", |row| row.id.as_str());
            let outcome = match late.take(rule_id, id) {
                Some(sent) if sent.key == key => sent.outcome,
                Some(older) => after(older, means.pool, built),
                None => send(means.pool, built),
            };
            let rule = to.rules.iter().find(|rule| rule.id == *rule_id);
            waiting.extend(rule.map(|rule| Pending { row, rule: rule.clone(), key, outcome }));
        }
    }
    let lines = lines.into_iter().map(|(id, (_, line))| (id, line)).collect();
    // Where the page is blocked nobody of it goes on.
    sheet.settle(waiting, lines, to.leave.filter(|_| blocked_at.is_none())).await;
    sheet.park().await;
    let ids: Vec<RuleId> = to.rules.iter().map(|rule| rule.id.clone()).collect();
    late.forget_ended_of(&ids);
    sheet.close(blocked_at)
}

fn send(pool: &Pool<HttpSender>, built: Result<Delivery, Outcome>) -> oneshot::Receiver<Outcome> {
    match built {
        Ok(delivery) => pool.run(delivery),
        Err(outcome) => {
            let (reply, receiver) = oneshot::channel();
            let _ = reply.send(outcome);
            receiver
        }
    }
}

/// Never two at once for one document: an older revision's delivery ends first.
fn after(older: Outstanding, pool: &Pool<HttpSender>, built: Result<Delivery, Outcome>) -> oneshot::Receiver<Outcome> {
    let (pool, (reply, receiver)) = (pool.clone(), oneshot::channel());
    tokio::spawn(async move {
        let _ = older.outcome.await;
        if let Ok(outcome) = send(&pool, built).await {
            let _ = reply.send(outcome);
        }
    });
    receiver
}

impl Sheet<'_> {
    /// Awaits deliveries, and what follows them in their lines. True when what comes after them may be sent.
    async fn settle(&mut self, pending: Vec<Pending>, lines: BTreeMap<RuleId, Line>, leave: Option<Leave<'_>>) -> bool {
        let (sent, flying) = gather(self.means.pool, pending, lines, leave).await;
        let mut left: HashMap<usize, Flying> = flying.into_iter().map(|flying| (flying.at, flying)).collect();
        let mut all = left.is_empty();
        for (at, Sent { row, rule, key, ended }) in sent.into_iter().enumerate() {
            match (ended, left.remove(&at)) {
                (Some(outcome), _) => all &= self.ended(row, &rule, key, outcome).await,
                (None, Some(Flying { outcome, .. })) => self.leave(row, &rule, Outstanding { key, outcome }),
                (None, None) => {}
            }
        }
        all
    }

    fn leave(&mut self, row: usize, rule: &Arc<Rule>, outstanding: Outstanding) {
        let first = self.failed.entry(rule.id.clone()).or_insert(row);
        *first = row.min(*first);
        let id = self.rows.get(row).map(|row| row.id.clone()).unwrap_or_default();
        self.late.entry(rule.id.clone()).or_default().push((id, outstanding));
    }

    async fn ended(&mut self, row: usize, rule: &Arc<Rule>, key: u64, outcome: Outcome) -> bool {
        match outcome {
            Outcome::Done => self.delivered.push((row, key)),
            Outcome::Failed(failed) if failed.verdict == Verdict::Gone => {
                self.means.deliveries.disable(rule, self.to.db, &failed.error).await;
                self.hold(row, rule, failed.error, Wait::For(DISABLED_FOR));
                return false;
            }
            Outcome::Failed(failed) if parks(rule) => self.parking.push((row, rule.clone(), key, Some(failed))),
            Outcome::Failed(failed) => {
                let after = failed.after();
                self.hold(row, rule, failed.error, Wait::Backoff { after });
                return false;
            }
            Outcome::Missing { error } => {
                self.hold(row, rule, error, Wait::Backoff { after: None });
                return false;
            }
            Outcome::Unsent { error, after } => {
                self.hold(row, rule, error, Wait::For(after));
                return false;
            }
        }
        true
    }

    fn hold(&mut self, row: usize, rule: &Arc<Rule>, error: String, wait: Wait) {
        let first = self.failed.entry(rule.id.clone()).or_insert(row);
        *first = row.min(*first);
        self.failures.entry(rule.id.clone()).or_insert(RuleFailure { error, wait });
    }

    /// Every other rule of a group that was probing waits with the one that failed.
    fn give_up_rest(&mut self, row: usize) {
        for rule in self.to.rules {
            self.failed.entry(rule.id.clone()).or_insert(row);
        }
    }

    /// What failed by itself is owed by the deliveries database, once it says so.
    async fn park(&mut self) {
        let parking = std::mem::take(&mut self.parking);
        if parking.is_empty() {
            return;
        }
        let instance: Arc<str> = self.to.instance_start_time.into();
        let owed = parking.iter().filter_map(|(row, rule, _, failed)| {
            let row = self.rows.get(*row)?;
            Some(Owed {
                rule: rule.clone(),
                db: self.to.db.clone(),
                instance_start_time: instance.clone(),
                doc_id: row.id.clone(),
                rev: row.rev().to_string(),
                seq: row.seq.clone(),
                failed: failed.clone(),
            })
        });
        let durable = self.means.deliveries.park(owed.collect()).await;
        for ((row, rule, key, failed), durable) in parking.into_iter().zip(durable) {
            match durable {
                true => self.delivered.push((row, key)),
                false => {
                    let error = failed.map_or_else(|| String::from("it joins what is parked"), |failed| failed.error);
                    let error = format!("no more deliveries can be parked: {error}");
                    self.hold(row, &rule, error, Wait::Backoff { after: None });
                }
            }
        }
    }

    fn close(self, blocked_at: Option<usize>) -> Delivered {
        let first = self.failed.values().copied().chain(blocked_at).min();
        let delivered = match first {
            Some(first) => self.delivered.into_iter().filter(|(row, _)| *row >= first).map(|(_, key)| key).collect(),
            None => HashSet::new(),
        };
        let page = PageOutcome {
            row_seqs: self.rows.iter().map(|row| row.seq.clone()).collect(),
            // One that failed as well backs off.
            late: self.late.keys().filter(|rule| !self.failures.contains_key(*rule)).cloned().collect(),
            failed: self.failed,
            blocked_at,
            delivered,
            ..PageOutcome::default()
        };
        Delivered { page, failures: self.failures, late: self.late }
    }
}

/// Awaits all, or until others have waited long enough; what has not ended then is given back as it is.
async fn gather(
    pool: &Pool<HttpSender>,
    pending: Vec<Pending>,
    mut lines: BTreeMap<RuleId, Line>,
    leave: Option<Leave<'_>>,
) -> (Vec<Sent>, FuturesUnordered<Flying>) {
    let started = Instant::now();
    let (mut sent, mut flying) = (Vec::with_capacity(pending.len()), FuturesUnordered::new());
    let mut under_way: HashMap<RuleId, usize> = HashMap::new();
    for Pending { row, rule, key, outcome } in pending {
        *under_way.entry(rule.id.clone()).or_default() += 1;
        flying.push(Flying { at: sent.len(), outcome });
        sent.push(Sent { row, rule, key, ended: None });
    }
    let mut first_done = leave.filter(|leave| leave.has_others).map(|_| Duration::ZERO);
    loop {
        let slow_at = leave.and(first_done).map(|took| started + took + took.max(PATIENCE));
        let ended = tokio::select! {
            biased;
            ended = flying.next() => ended,
            () = is_left(leave, slow_at) => break,
        };
        let Some((at, outcome)) = ended else { break };
        let Some(done) = sent.get_mut(at) else { continue };
        let (rule, goes_on) = (done.rule.clone(), outcome == Outcome::Done);
        done.ended = Some(outcome);
        let next = lines.get_mut(&rule.id).and_then(Line::pop_front).filter(|_| goes_on);
        match next {
            Some((row, key, built)) => {
                flying.push(Flying { at: sent.len(), outcome: send(pool, built) });
                sent.push(Sent { row, rule, key, ended: None });
            }
            None => {
                let left = under_way.entry(rule.id.clone()).or_default();
                *left = left.saturating_sub(1);
                if *left == 0 {
                    first_done.get_or_insert(started.elapsed());
                }
            }
        }
    }
    (sent, flying)
}

/// Ends when the slow ones are left to themselves: not before they have had their time, nor before somebody waits for it.
async fn is_left(leave: Option<Leave<'_>>, slow_at: Option<Instant>) {
    let (Some(leave), Some(slow_at)) = (leave, slow_at) else { return std::future::pending().await };
    tokio::time::sleep_until(slow_at.into()).await;
    if !leave.is_wanted {
        leave.more.notified().await;
    }
}

/// Whether a failed delivery of this rule may be overtaken by those for other documents.
fn parks(rule: &Rule) -> bool {
    !rule.block && rule.handling.order == Order::Document && rule.handling.on_failure == OnFailure::Park
}

fn lost() -> Outcome {
    let error = String::from("the webhook pool is being restarted");
    Outcome::Unsent { error, after: Duration::from_secs(1) }
}

/// What is wrong with the rule holds it; what is wrong with this one delivery is this one's.
fn unbuildable(error: RequestError) -> Outcome {
    match error.concerns_rule() {
        true => Outcome::Unsent { error: error.to_string(), after: DISABLED_FOR },
        false => Outcome::Failed(Failed { error: error.to_string(), verdict: Verdict::Later, attempts: 0, answer: None }),
    }
}

fn delivery_key(rule: &RuleId, row: &Row) -> u64 {
    let mut hasher = DefaultHasher::new();
    (rule, &row.id, row.rev(), row.deleted).hash(&mut hasher);
    hasher.finish()
}
