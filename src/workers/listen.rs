//! The work of one `change_listener`: what changed in its database, delivered.

use crate::db::Instance;
use crate::db::listen::{ListenError, Listener, Tools};
use crate::db::positions::RuleId;
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
    let (rules, suspended, is_known) = rules_of(shared, &db, hold.before()).await;
    if rules.is_empty() {
        return if is_known { End::Clean } else { later(shared, hold) }.into();
    }
    let mut listener = Listener::locked(tools, &db, &rules, &suspended, hold.clone());
    // Nobody told us whether the database was made again since.
    listener.meet(Instance::Unsure);
    let end = match listener.listen(tools, &rules, &suspended, None).await {
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
    // An edit that came meanwhile may be why it was marked.
    let is_news = {
        let snapshot = shared.snapshot.borrow();
        let revs = |rules: &RuleSet| rules.iter().map(|rule| (rule.id.clone(), rule.rev.clone())).collect::<Vec<_>>();
        revs(&snapshot.rules_of(&db)) != revs(&rules) || snapshot.suspended_of(&db) != suspended
    };
    let end = match end {
        End::Clean | End::Later { .. } if is_news => End::Again,
        end => end,
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

/// The rules of the database, those that are suspended, and whether that is all: a rule that is invalid until somebody mends it
/// may be for this database.
async fn rules_of(shared: &Shared, db: &str, doc: &Value) -> (Arc<RuleSet>, Vec<RuleId>, bool) {
    let mut snapshots = shared.snapshot.clone();
    let known = |snapshot: &Arc<Snapshot>| match snapshot.watches(db) {
        true => (snapshot.rules_of(db), snapshot.suspended_of(db)),
        false => (Arc::new(RuleSet::plain(Vec::new())), snapshot.suspended_of(db)),
    };
    let Ok(snapshot) = snapshots.wait_for(|snapshot| snapshot.is_loaded()).await.map(|snapshot| snapshot.clone()) else {
        // The Supervisor that publishes them is gone, and soon we are.
        return std::future::pending().await;
    };
    let is_all = |(rules, suspended): &(Arc<RuleSet>, Vec<RuleId>)| {
        let is_known = |id: &str| rules.iter().any(|rule| *rule.id == *id) || suspended.iter().any(|known| **known == *id);
        !rules.is_empty() && rules_named(doc).all(is_known)
    };
    let mut found = known(&snapshot);
    if !is_all(&found) && !snapshot.is_own(db) {
        let complete = snapshots.wait_for(|snapshot| is_all(&known(snapshot)));
        if let Ok(Ok(snapshot)) = tokio::time::timeout(patience(doc, SystemTime::now()), complete).await {
            found = known(&snapshot);
        }
    }
    let (rules, suspended) = found;
    let nobody_else = suspended.is_empty() && !shared.snapshot.borrow().has_unplaced_rules();
    let is_known = !rules.is_empty() || snapshot.is_own(db) || nobody_else;
    (rules, suspended, is_known)
}

/// Those that somebody has listened for, and that are not where all are.
fn rules_named(doc: &Value) -> impl Iterator<Item = &str> {
    let fields = ["ahead", "held"].into_iter().filter_map(|field| doc[field]["rules"].as_object());
    fields.flat_map(|rules| rules.keys().map(String::as_str))
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
