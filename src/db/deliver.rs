//! One page of changes ▶ webhook deliveries ▶ what became of each.
//!
//! What fails by itself is parked, and counts as delivered once that is durable. Where a rule is to wait instead (`on_failure`,
//! `order`, `block`) and nobody said for how long, where its host is not asked for now, or where no more may be parked, the rule
//! is held at its first row.

use crate::couch::Row;
use crate::db::failing::Failing;
use crate::db::gather::{Leave, Line, Lines, Pending, Sent, after, gather, next_in_line};
use crate::db::late::{Late, Outstanding};
use crate::db::positions::{PageOutcome, RuleId};
use crate::deliveries::index::Standing;
use crate::deliveries::{Deliveries, Owed};
use crate::job::{DbName, Failed, Outcome, Verdict};
use crate::rules::document::Document;
use crate::rules::handling::{OnFailure, Order};
use crate::rules::matching::Chosen;
use crate::rules::rule::Rule;
use crate::schedule::Pool;
use crate::vault::Vault;
use crate::webhook::request::RequestError;
use crate::webhook::{Delivery, HttpSender};
use std::collections::{BTreeMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::oneshot;

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
    pub rules: &'a Chosen,
    /// Deliveries that succeeded in an earlier try of the same rows.
    pub delivered: &'a HashSet<u64>,
    /// What the rules wait for, as far as they failed before.
    pub failing: &'a Failing,
    /// The rules failed the last time: one delivery goes ahead of the others.
    pub probing: bool,
    /// When the page had been read.
    pub received: Instant,
    /// Where others would wait for the slowest.
    pub leave: Option<Leave<'a>>,
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
    /// Rows that failed, of rules that wait for them.
    pub waited_for: Vec<(RuleId, usize)>,
    /// Rows that a rule does not wait for any more: they are delivered, or somebody said how long it may.
    pub passed: Vec<(RuleId, usize)>,
}

/// A rule that is disabled is looked at again after this, if nobody tells of its end before.
pub const DISABLED_FOR: Duration = Duration::from_secs(600);

struct Sheet<'a> {
    means: &'a Means<'a>,
    to: &'a Addressee<'a>,
    rows: &'a [Row],
    delivered: Vec<(usize, u64)>,
    failed: BTreeMap<RuleId, usize>,
    failures: BTreeMap<RuleId, RuleFailure>,
    parking: Vec<(usize, Arc<Rule>, u64, Option<Failed>)>,
    late: BTreeMap<RuleId, Vec<(String, Outstanding)>>,
    waited_for: Vec<(RuleId, usize)>,
    passed: Vec<(RuleId, usize)>,
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
        waited_for: Vec::new(),
        passed: Vec::new(),
    };
    let disabled: Vec<bool> = to.rules.rules().iter().map(|rule| means.deliveries.is_disabled(rule)).collect();
    let mut waiting: Vec<Pending> = Vec::new();
    let mut lines = Lines::new();
    let mut unsent: Vec<(Arc<Delivery>, oneshot::Sender<Outcome>)> = Vec::new();
    let mut blocked_at = None;
    let mut probing = to.probing;
    // Every row was looked at.
    let mut is_whole = true;
    late.note_delivered();

    for (index, row) in rows.iter().enumerate() {
        let doc = Document::of(row);
        let mut blocking = Vec::new();
        let matching = to.rules.matching(&doc).into_iter().filter_map(|at| to.rules.rules().get(at).zip(disabled.get(at)));
        for (rule, is_disabled) in matching {
            let key = delivery_key(&rule.id, row, to.instance_start_time);
            if to.delivered.contains(&key) || late.was_delivered(&rule.id, key) {
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
            let older = match rule.handling.order {
                Order::Database => late.take_of(&rule.id),
                Order::Document => late.take(&rule.id, &row.id).into_iter().collect(),
            };
            let outcome = match (older.is_empty(), built) {
                (true, Ok(delivery)) => {
                    let (reply, outcome) = oneshot::channel();
                    unsent.push((Arc::new(delivery), reply));
                    outcome
                }
                (_, built) => after(older, key, means.pool, built),
            };
            let pending = Pending { row: index, rule: rule.clone(), key, outcome };
            match rule.block || probing {
                true => blocking.push(pending),
                false => waiting.push(pending),
            }
        }
        if blocked_at.is_some() {
            is_whole = false;
            break;
        }
        if !blocking.is_empty() {
            means.pool.submit(std::mem::take(&mut unsent));
            let rule_blocks = blocking.iter().any(|pending| pending.rule.block);
            // What probes for several rules holds all of them, whoever is slow.
            let leave = to.leave.filter(|_| !rule_blocks && to.rules.rules().len() == 1);
            if !sheet.settle(blocking, Lines::new(), leave).await {
                match rule_blocks {
                    true => blocked_at = Some(index),
                    // The probe failed: the rest of the page is not tried for these rules.
                    false => sheet.give_up_rest(index),
                }
                is_whole = false;
                break;
            }
            probing = false;
        }
    }
    means.pool.submit(unsent);
    let firsts = lines.iter_mut().filter_map(|(rule_id, (rule, line))| {
        // One at a time: what is under way for this rule is the first of its line.
        let (row, key, built) = line.pop_front()?;
        let outcome = after(late.take_of(rule_id), key, means.pool, built);
        Some(Pending { row, rule: rule.clone(), key, outcome })
    });
    waiting.extend(firsts.collect::<Vec<_>>());
    // Where the page is blocked nobody of it goes on.
    let leave = to.leave.filter(|_| blocked_at.is_none()).map(|leave| Leave {
        has_others: leave.has_others
            || to.rules.rules().iter().any(|rule| waiting.iter().all(|pending| pending.rule.id != rule.id)),
        ..leave
    });
    sheet.settle(waiting, lines, leave).await;
    sheet.park().await;
    if is_whole {
        let asked = to.rules.rules().iter().zip(&disabled).filter(|(_, is_disabled)| !**is_disabled).map(|(rule, _)| rule);
        late.forget_ended_of(&asked.collect::<Vec<_>>());
    }
    sheet.close(blocked_at)
}

impl Sheet<'_> {
    /// Awaits deliveries, and what follows them in their lines. True when what comes after them may be sent.
    async fn settle(&mut self, mut pending: Vec<Pending>, mut lines: Lines, mut leave: Option<Leave<'_>>) -> bool {
        let mut all = true;
        while !pending.is_empty() {
            let (sent, mut left) = gather(self.means.pool, pending, &mut lines, leave).await;
            all &= left.is_empty();
            for (at, Sent { row, rule, key, ended }) in sent.into_iter().enumerate() {
                match (ended, left.remove(&at)) {
                    (Some(outcome), _) => all &= self.ended(row, &rule, key, outcome).await,
                    (None, Some(outcome)) => self.leave(row, &rule, Outstanding { key, outcome }),
                    (None, None) => {}
                }
            }
            // One that failed was given up: its line goes on, and nobody else's needs to.
            leave = leave.map(|leave| Leave { has_others: true, ..leave });
            let goes_on = lines.iter_mut().filter(|(rule, _)| !self.failed.contains_key(*rule));
            pending = goes_on.filter_map(|(_, (rule, line))| next_in_line(self.means.pool, rule, line)).collect();
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
            Outcome::Done => {
                self.delivered.push((row, key));
                self.passed.push((rule.id.clone(), row));
            }
            Outcome::Failed(failed) if failed.verdict == Verdict::Gone => {
                self.means.deliveries.disable(rule, self.to.db, &failed.error).await;
                self.hold(row, rule, failed.error, Wait::For(DISABLED_FOR));
                return false;
            }
            Outcome::Failed(failed) if parks(rule) => self.parking.push((row, rule.clone(), key, Some(failed))),
            Outcome::Failed(failed) if self.is_given_up(row, rule, &failed).await => {
                self.passed.push((rule.id.clone(), row));
                self.delivered.push((row, key));
            }
            Outcome::Failed(failed) => {
                self.waited_for.push((rule.id.clone(), row));
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

    /// Whether a rule that waits has waited as long as somebody said, and it is written down that nobody is owed this any more.
    async fn is_given_up(&self, row: usize, rule: &Arc<Rule>, failed: &Failed) -> bool {
        let Some(row) = self.rows.get(row) else { return false };
        let now = SystemTime::now();
        let history = self.to.failing.history(&rule.id, (&row.id, row.rev()), now);
        if !self.means.deliveries.gives_up(rule, failed.verdict, history, now) {
            return false;
        }
        let owed = Owed { history: Some(history), ..self.owed(row, rule, Some(failed.clone())) };
        self.means.deliveries.park(vec![owed]).await.first() == Some(&true)
    }

    fn owed(&self, row: &Row, rule: &Arc<Rule>, failed: Option<Failed>) -> Owed {
        Owed {
            rule: rule.clone(),
            db: self.to.db.clone(),
            instance_start_time: self.to.instance_start_time.into(),
            doc_id: row.id.clone(),
            rev: row.rev().to_string(),
            seq: row.seq.clone(),
            failed,
            history: None,
        }
    }

    fn hold(&mut self, row: usize, rule: &Arc<Rule>, error: String, wait: Wait) {
        let first = self.failed.entry(rule.id.clone()).or_insert(row);
        *first = row.min(*first);
        self.failures.entry(rule.id.clone()).or_insert(RuleFailure { error, wait });
    }

    /// Every other rule of a group that was probing waits with the one that failed.
    fn give_up_rest(&mut self, row: usize) {
        for rule in self.to.rules.rules() {
            self.failed.entry(rule.id.clone()).or_insert(row);
        }
    }

    /// What failed by itself is owed by the deliveries database, once it says so.
    async fn park(&mut self) {
        let parking = std::mem::take(&mut self.parking);
        if parking.is_empty() {
            return;
        }
        let owed =
            parking.iter().filter_map(|(row, rule, _, failed)| Some(self.owed(self.rows.get(*row)?, rule, failed.clone())));
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
        Delivered { page, failures: self.failures, late: self.late, waited_for: self.waited_for, passed: self.passed }
    }
}

/// Whether a failed delivery of this rule may be overtaken by those for other documents.
fn parks(rule: &Rule) -> bool {
    !rule.block && rule.handling.order == Order::Document && rule.handling.on_failure == OnFailure::Park
}

/// What is wrong with the rule holds it; what is wrong with this one delivery is this one's.
fn unbuildable(error: RequestError) -> Outcome {
    match error.concerns_rule() {
        true => Outcome::Unsent { error: error.to_string(), after: DISABLED_FOR },
        false => Outcome::Failed(Failed { error: error.to_string(), verdict: Verdict::Later, attempts: 0, answer: None }),
    }
}

/// A database that is made again may have equal revisions.
fn delivery_key(rule: &RuleId, row: &Row, instance_start_time: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (rule, &row.id, row.rev(), row.deleted, instance_start_time).hash(&mut hasher);
    hasher.finish()
}
