//! A rule applied to one change: the delivery that is owed.

use super::Delivery;
use super::batch::Gathered;
use super::request::{self, RequestError, order_key, webhook_id};
use crate::job::DbName;
use crate::rules::document::Document;
use crate::rules::rule::Rule;
use crate::rules::template;
use crate::vault::Vault;

/// `replays` is how often somebody asked for a new `webhook-id`.
pub fn delivery(
    vault: &Vault,
    rule: &Rule,
    db: &DbName,
    instance_start_time: &str,
    doc: &Document<'_>,
    replays: u64,
) -> Result<Delivery, RequestError> {
    let rendered = template::render(rule, db, doc);
    let row = doc.row();
    let request = request::build(rendered, &rule.handling, vault)?;
    let order_key = order_key(&rule.id, db, &row.id);
    let coalesce_key = match (rule.handling.batch, rule.debounce, rule.handling.latest_only) {
        (Some(_), _, _) => Some(fold(request.batch_key(&rule.id))),
        // What waits for the same document is superseded.
        (None, _, true) => Some(order_key),
        (None, true, false) => Some(fold(request.debounce_key())),
        (None, false, false) => None,
    };
    let rev = row.rev();
    let id = match replays {
        0 => webhook_id(&rule.id, db, instance_start_time, &row.id, rev),
        replays => webhook_id(&rule.id, db, instance_start_time, &row.id, &format!("{rev} replay {replays}")),
    };
    let latest_only = rule.handling.latest_only;
    let gathered = rule.handling.batch.zip(request.body.clone());
    let gathered = gathered.map(|(batch, params)| Gathered::of_one(batch, latest_only, &id, order_key, params));
    Ok(Delivery { id, rule_id: rule.id.clone(), db: db.clone(), order_key, coalesce_key, request, gathered })
}

/// The dispatcher's keys are of one word.
fn fold(key: u128) -> u64 {
    (key >> 64) as u64 ^ key as u64
}
