//! The work of one `change_listener`: what changed in its database, delivered.

use crate::db::Instance;
use crate::db::listen::{ListenError, Listener, Tools};
use crate::job::DbName;
use crate::locks::held::{End, look_for_missing, retries};
use crate::locks::hold::Hold;
use crate::locks::look::time_of;
use crate::rules::catalogue::Snapshot;
use crate::rules::matching::RuleSet;
use crate::workers::Shared;
use crate::workers::job::Worked;
use serde_json::Value;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// A rule that was just written may not be known yet, and its database may be dirty because of it: so long after it was marked.
const RULES_KNOWN_AFTER: Duration = Duration::from_secs(2);

pub async fn work(shared: &Shared, tools: &Tools, hold: &Arc<Hold>) -> Worked {
    let db: DbName = hold.before()["db_name"].as_str().unwrap_or_default().into();
    tools.couch.health().up().await;
    let (rules, is_known) = rules_of(shared, &db, hold.before()).await;
    if rules.is_empty() {
        return if is_known { End::Clean } else { later(shared, hold) }.into();
    }
    let mut listener = Listener::locked(tools, &db, &rules, hold.clone());
    // Nobody told us whether the database was made again since.
    listener.meet(Instance::Unsure);
    let end = match listener.listen(tools, &rules, None).await {
        Ok(()) => match listener.positions().held() {
            Some((at, retries)) => End::Later { at, retries },
            None if listener.positions().has_more() => End::Again,
            None => End::Clean,
        },
        Err(ListenError::Missing) => missing(shared, hold),
        // Nothing is written any more, whatever is said here.
        Err(ListenError::Lock(_)) => End::Again,
        Err(ListenError::Couch(error)) if error.is_outage() && !tools.couch.health().is_up() => {
            tools.couch.health().up().await;
            End::Again
        }
        Err(error) => {
            let failed = retries(hold.before());
            let delay = shared.backoff.delay(failed, fastrand::f64());
            if failed == 0 {
                tracing::warn!(%db, %error, retry_in_ms = delay.as_millis(), "cannot listen to the database, backing off");
            }
            End::Later { at: SystemTime::now() + delay, retries: failed.saturating_add(1) }
        }
    };
    Worked { end, listener: Some(listener) }
}

/// To be looked for again, and to be forgotten in the end.
pub fn missing(shared: &Shared, hold: &Hold) -> End {
    let failed = retries(hold.before());
    let delay = shared.backoff.delay(failed, fastrand::f64());
    let at = look_for_missing(hold.before(), SystemTime::now(), delay, &shared.settings);
    End::Missing { at, retries: failed.saturating_add(1) }
}

fn later(shared: &Shared, hold: &Hold) -> End {
    let failed = retries(hold.before());
    End::Later { at: SystemTime::now() + shared.backoff.delay(failed, fastrand::f64()), retries: failed.saturating_add(1) }
}

/// How long to wait for a rule that nobody knows here: whoever marked the document knew it.
fn patience(doc: &Value, now: SystemTime) -> Duration {
    let marked_at = time_of(&doc["updated_at"]).unwrap_or(now);
    RULES_KNOWN_AFTER.saturating_sub(now.duration_since(marked_at).unwrap_or_default())
}

/// With whether that is all: a rule that is invalid until somebody mends it may be for this database.
async fn rules_of(shared: &Shared, db: &str, doc: &Value) -> (Arc<RuleSet>, bool) {
    let mut snapshots = shared.snapshot.clone();
    let known = |snapshot: &Arc<Snapshot>| match snapshot.watches(db) {
        true => snapshot.rules_of(db),
        false => Arc::new(RuleSet::plain(Vec::new())),
    };
    let Ok(snapshot) = snapshots.wait_for(|snapshot| snapshot.is_loaded()).await.map(|snapshot| snapshot.clone()) else {
        // The Supervisor that publishes them is gone, and soon we are.
        return std::future::pending().await;
    };
    let rules = known(&snapshot);
    if !rules.is_empty() || snapshot.is_own(db) {
        return (rules, true);
    }
    let found = snapshots.wait_for(|snapshot| !known(snapshot).is_empty());
    let found = match tokio::time::timeout(patience(doc, SystemTime::now()), found).await {
        Ok(Ok(snapshot)) => known(&snapshot),
        _ => rules,
    };
    (found, !shared.snapshot.borrow().has_invalid_rules())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::job::timestamp;
    use serde_json::json;

    #[test]
    fn only_what_was_just_marked_waits_for_a_rule() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let whole = Duration::from_secs(2);
        for (updated_at, expected) in [
            (json!(timestamp(now)), whole),
            (json!(timestamp(now - Duration::from_millis(500))), Duration::from_millis(1500)),
            (json!(timestamp(now - whole)), Duration::ZERO),
            (json!(timestamp(now - Duration::from_secs(3600))), Duration::ZERO),
            // Somebody's clock is ahead.
            (json!(timestamp(now + Duration::from_secs(3600))), whole),
            (json!(null), whole),
            (json!("today"), whole),
        ] {
            assert_eq!(patience(&json!({ "updated_at": updated_at }), now), expected, "{updated_at}");
        }
    }
}
