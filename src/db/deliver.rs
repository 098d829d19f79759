//! One page of changes ▶ webhook deliveries ▶ what became of each.

use crate::couch::Row;
use crate::db::positions::{PageOutcome, RuleId};
use crate::job::{DbName, Failed, Outcome, Verdict};
use crate::rules::rule::Rule;
use crate::rules::template;
use crate::schedule::Pool;
use crate::vault::Vault;
use crate::webhook::request::{self, order_key, webhook_id};
use crate::webhook::{Delivery, HttpSender};
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// What a page is delivered for.
pub struct Addressee<'a> {
    pub db: &'a DbName,
    pub instance_start_time: &'a str,
    pub rules: &'a [Arc<Rule>],
    /// Deliveries that succeeded in an earlier try of the same rows.
    pub delivered: &'a HashSet<u64>,
    /// The rules failed the last time: one delivery goes ahead of the others.
    pub probing: bool,
}

#[derive(Debug, Clone)]
pub struct RuleFailure {
    pub error: String,
    pub after: Option<Duration>,
}

#[derive(Debug, Default)]
pub struct Delivered {
    pub page: PageOutcome,
    pub failures: BTreeMap<RuleId, RuleFailure>,
}

struct Pending {
    row: usize,
    rule: Arc<Rule>,
    key: u64,
    outcome: oneshot::Receiver<Outcome>,
}

struct Sheet {
    delivered: Vec<(usize, u64)>,
    failed: BTreeMap<RuleId, usize>,
    failures: BTreeMap<RuleId, RuleFailure>,
}

/// Delivers rows in order. Rules that do not block are sent together and awaited at the end; a blocking one is awaited before
/// the next row starts.
pub async fn deliver(pool: &Pool<HttpSender>, vault: &Vault, to: Addressee<'_>, rows: &[Row]) -> Delivered {
    let needs_doc = to.rules.iter().any(|rule| rule.needs_doc());
    let mut sheet = Sheet { delivered: Vec::new(), failed: BTreeMap::new(), failures: BTreeMap::new() };
    let mut waiting: Vec<Pending> = Vec::new();
    let mut unsent: Vec<(Arc<Delivery>, oneshot::Sender<Outcome>)> = Vec::new();
    let mut blocked_at = None;
    let mut probing = to.probing;

    for (index, row) in rows.iter().enumerate() {
        let doc = match (&row.doc, needs_doc) {
            (Some(raw), true) => serde_json::from_str::<Value>(raw.get()).ok(),
            _ => None,
        };
        let mut blocking = Vec::new();
        for rule in to.rules.iter().filter(|rule| rule.matches(row, doc.as_ref())) {
            let key = delivery_key(&rule.id, row);
            if to.delivered.contains(&key) {
                sheet.delivered.push((index, key));
                continue;
            }
            let (reply, outcome) = oneshot::channel();
            match build(vault, &to, rule, row) {
                Ok(delivery) => unsent.push((Arc::new(delivery), reply)),
                Err(error) => drop(reply.send(unbuildable(error))),
            }
            let pending = Pending { row: index, rule: rule.clone(), key, outcome };
            match rule.block || probing {
                true => blocking.push(pending),
                false => waiting.push(pending),
            }
        }
        if !blocking.is_empty() {
            pool.submit(std::mem::take(&mut unsent));
            let rule_blocks = blocking.iter().any(|pending| pending.rule.block);
            if !settle(&mut sheet, blocking).await {
                match rule_blocks {
                    true => blocked_at = Some(index),
                    // The probe failed: the rest of the page is not tried for these rules.
                    false => give_up_rest(&mut sheet, &to, index),
                }
                break;
            }
            probing = false;
        }
    }
    pool.submit(unsent);
    settle(&mut sheet, waiting).await;

    let first = sheet.failed.values().copied().chain(blocked_at).min();
    let delivered = match first {
        Some(first) => sheet.delivered.into_iter().filter(|(row, _)| *row >= first).map(|(_, key)| key).collect(),
        None => HashSet::new(),
    };
    let page = PageOutcome {
        row_seqs: rows.iter().map(|row| row.seq.clone()).collect(),
        failed: sheet.failed,
        blocked_at,
        delivered,
        ..PageOutcome::default()
    };
    Delivered { page, failures: sheet.failures }
}

/// True when all of them were delivered.
async fn settle(sheet: &mut Sheet, pending: Vec<Pending>) -> bool {
    let mut all = true;
    for Pending { row, rule, key, outcome } in pending {
        let (error, after) = match outcome.await {
            Ok(Outcome::Done) => {
                sheet.delivered.push((row, key));
                continue;
            }
            Ok(Outcome::Failed(failed)) => (failed.error.clone(), failed.after()),
            Ok(Outcome::Missing { error }) => (error, None),
            Ok(Outcome::Unsent { error, after }) => (error, Some(after)),
            Err(_) => (String::from("the webhook pool is being restarted"), None),
        };
        all = false;
        let first = sheet.failed.entry(rule.id.clone()).or_insert(row);
        *first = row.min(*first);
        sheet.failures.entry(rule.id.clone()).or_insert(RuleFailure { error, after });
    }
    all
}

/// Every other rule of a group that was probing waits with the one that failed.
fn give_up_rest(sheet: &mut Sheet, to: &Addressee<'_>, row: usize) {
    for rule in to.rules {
        sheet.failed.entry(rule.id.clone()).or_insert(row);
    }
}

fn unbuildable(error: String) -> Outcome {
    Outcome::Failed(Failed { error, verdict: Verdict::GiveUp, attempts: 0, answer: None })
}

fn build(vault: &Vault, to: &Addressee<'_>, rule: &Rule, row: &Row) -> Result<Delivery, String> {
    let rendered = template::render(rule, to.db, row);
    let request = request::build(rendered, &rule.handling, vault).map_err(|error| error.to_string())?;
    Ok(Delivery {
        id: webhook_id(&rule.id, to.db, to.instance_start_time, &row.id, row.rev()),
        rule_id: rule.id.clone(),
        db: to.db.clone(),
        order_key: order_key(&rule.id, to.db, &row.id),
        coalesce_key: rule.debounce.then(|| fold(request.debounce_key())),
        request,
    })
}

/// The dispatcher's keys are of one word.
fn fold(key: u128) -> u64 {
    (key >> 64) as u64 ^ key as u64
}

fn delivery_key(rule: &RuleId, row: &Row) -> u64 {
    let mut hasher = DefaultHasher::new();
    (rule, &row.id, row.rev(), row.deleted).hash(&mut hasher);
    hasher.finish()
}
