//! What an operator wants over the admin API, done.

use super::World;
use crate::admin::login::Check;
use crate::admin::{Login, Operate, Order, Refusal, What};
use crate::couch::{Couch, CouchError};
use crate::deliveries::counts::Counts;
use crate::deliveries::operate::{Bound, Desk, Enabled};
use crate::deliveries::parked::Key;
use crate::deliveries::select::{Action, KeyPrefix, Wishes};
use crate::rules::rule::Rule;
use crate::vault::{ADMIN_TOKEN, SecretError, Vault, redact_text};
use axum::http::StatusCode;
use secrecy::SecretString;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// One answer looks through no more; whoever wants more goes on where it ended.
const READ_MAX: usize = 10_000;
/// An action stops at the end of a page after this.
const ACT_FOR: Duration = Duration::from_secs(20);

const FILTER: [&str; 5] = ["rule", "db", "doc", "state", "status"];

pub(super) fn login(couch: &Couch, vault: &Vault) -> Login {
    let token = match vault.header(ADMIN_TOKEN) {
        Ok(token) => token.to_str().ok().map(SecretString::from),
        Err(SecretError::Missing(_)) => None,
        Err(error) => {
            tracing::warn!(%error, "there is no token for the admin API");
            None
        }
    };
    let couch = couch.clone();
    let check: Check = Box::new(move |credentials| {
        let couch = couch.clone();
        Box::pin(async move {
            let unavailable = |error: CouchError| format!("nobody can log in by password now: {error}");
            couch.standing(&credentials).await.map_err(unavailable)
        })
    });
    Login::new(check, token)
}

pub(super) fn operate(world: &Arc<World>) -> Operate {
    let world = world.clone();
    Arc::new(move |order| {
        let world = world.clone();
        Box::pin(async move { answer(&world, order).await })
    })
}

async fn answer(world: &World, order: Order) -> Result<Value, Refusal> {
    let desk = Desk::new(world.couch.clone(), &world.settings.db_name);
    let Order { what, query, by } = order;
    let wishes = |known: &[&[&str]]| Wishes::of_query(&query, &known.concat()).map_err(bad_request);
    let drop = Action::Drop { by: by.clone() };
    match what {
        What::Deliveries => {
            let wishes = wishes(&[&FILTER, &["limit", "after"]])?;
            let bound = Bound { found: wishes.limit, read: READ_MAX };
            let after = wishes.after_key().map_err(bad_request)?;
            let page = desk.list(&wishes.filter, after, bound).await.map_err(of_couch)?;
            Ok(json!({ "deliveries": page.found, "next": page.next.map(|key| key.doc_id()) }))
        }
        What::Delivery { key } => {
            wishes(&[])?;
            Ok(wanted(&desk, &key).await?)
        }
        What::Retry { key } => {
            let action = Action::Retry { new_id: wishes(&[&["new_id"]])?.new_id };
            act_on_one(&desk, &key, &action, &by).await
        }
        What::Drop { key } => {
            wishes(&[])?;
            act_on_one(&desk, &key, &drop, &by).await
        }
        What::RetryMany => {
            let wishes = wishes(&[&FILTER, &["all", "after", "new_id"]])?;
            let action = Action::Retry { new_id: wishes.new_id };
            act_on_many(&desk, &wishes, &action, &by).await
        }
        What::DropMany => act_on_many(&desk, &wishes(&[&FILTER, &["all", "after"]])?, &drop, &by).await,
        What::Rules => {
            let wishes = wishes(&[&["limit", "after"]])?;
            let counts = Counts::of(&world.book.index());
            let snapshot = world.publish.borrow().clone();
            let (page, next) = page_of(snapshot.rules(), wishes.after.as_deref(), wishes.limit);
            Ok(json!({ "rules": rules_json(page, &counts, &world.vault), "next": next }))
        }
        What::EnableRule { id } => {
            wishes(&[])?;
            enable(world, &desk, &id, &by).await
        }
    }
}

fn word(action: &Action) -> &'static str {
    match action {
        Action::Retry { .. } => "retried",
        Action::Drop { .. } => "dropped",
    }
}

async fn act_on_one(desk: &Desk, key: &str, action: &Action, by: &str) -> Result<Value, Refusal> {
    let doc = wanted(desk, key).await?;
    let tally = desk.act(vec![doc], action, |_| true, SystemTime::now()).await.map_err(of_couch)?;
    if tally.contested > 0 {
        return Err(Refusal::new(StatusCode::CONFLICT, "somebody else keeps writing it; try again"));
    }
    tracing::info!(?by, key, "a delivery was {} by hand", word(action));
    Ok(json!({ (word(action)): tally.changed }))
}

async fn act_on_many(desk: &Desk, wishes: &Wishes, action: &Action, by: &str) -> Result<Value, Refusal> {
    let Wishes { filter, all, .. } = wishes;
    let after = wishes.after_key().map_err(bad_request)?;
    if filter.is_empty() != *all {
        let reason = format!("say which, by {}, or say all=true", FILTER.join(", "));
        return Err(bad_request(reason));
    }
    let (started, mut at, mut pages) = (Instant::now(), after, 0);
    let (mut changed, mut contested, mut next) = (0, 0, None);
    while let Some((tally, last)) = desk.act_on_page(filter, action, at, SystemTime::now()).await.map_err(of_couch)? {
        changed += tally.changed;
        contested += tally.contested;
        pages += 1;
        (at, next) = (Some(last), None);
        if started.elapsed() >= ACT_FOR {
            next = Some(last);
            break;
        }
    }
    tracing::info!(?by, deliveries = changed, pages, "deliveries were {} by hand", word(action));
    Ok(json!({ (word(action)): changed, "contested": contested, "next": next.map(|key: Key| key.doc_id()) }))
}

async fn wanted(desk: &Desk, key: &str) -> Result<Value, Refusal> {
    let prefix = key.parse::<KeyPrefix>().map_err(|why| bad_request(format!("the key {why}")))?;
    let key = prefix.whole().ok_or_else(|| bad_request("the key must be whole"))?;
    let doc = desk.get(key).await.map_err(of_couch)?;
    doc.ok_or_else(|| Refusal::new(StatusCode::NOT_FOUND, "no such delivery: it may have been delivered meanwhile"))
}

async fn enable(world: &World, desk: &Desk, id: &str, by: &str) -> Result<Value, Refusal> {
    let is_known = world.publish.borrow().rules().iter().any(|rule| rule.id.as_ref() == id);
    match desk.enable(id).await.map_err(of_couch)? {
        Enabled::Now => {
            tracing::info!(?by, rule = ?id, "a rule was enabled by hand");
            Ok(json!({ "enabled": true }))
        }
        Enabled::WasNotDisabled if is_known => Ok(json!({ "enabled": false })),
        Enabled::WasNotDisabled => Err(Refusal::new(StatusCode::NOT_FOUND, "no such rule")),
    }
}

/// A rule that was edited since is not disabled any more, whatever is still written.
fn rules_json(rules: &[Arc<Rule>], counts: &Counts, vault: &Vault) -> Value {
    let row = |rule: &Arc<Rule>| {
        json!({
            "id": rule.id,
            "db_name": rule.pattern.source(),
            "url": vault.redact(&redact_text(&rule.url)),
            "parked": counts.parked_of(&rule.id),
            "disabled": counts.disables(&rule.id, &rule.rev),
        })
    };
    Value::from(rules.iter().map(row).collect::<Vec<_>>())
}

/// Those that follow `after`, at most `limit`, and the id of the last where more come; they are in the order of their ids.
fn page_of<'r>(rules: &'r [Arc<Rule>], after: Option<&str>, limit: usize) -> (&'r [Arc<Rule>], Option<&'r str>) {
    let start = after.map_or(0, |after| rules.partition_point(|rule| rule.id.as_ref() <= after));
    let rest = rules.get(start..).unwrap_or_default();
    match rest.get(..limit) {
        Some(page) if page.len() < rest.len() => (page, page.last().map(|rule| rule.id.as_ref())),
        _ => (rest, None),
    }
}

fn bad_request(reason: impl Into<String>) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, reason)
}

fn of_couch(error: CouchError) -> Refusal {
    let status = match &error {
        error if error.is_outage() => StatusCode::SERVICE_UNAVAILABLE,
        CouchError::TooManyRequests { .. } => StatusCode::SERVICE_UNAVAILABLE,
        CouchError::Conflict(_) => StatusCode::CONFLICT,
        _ => StatusCode::BAD_GATEWAY,
    };
    Refusal::new(status, error.to_string())
}
