//! The work of one `change_listener`: what changed in its database, delivered.

use crate::db::Instance;
use crate::db::listen::{ListenError, Listener, Tools};
use crate::job::DbName;
use crate::locks::held::{End, look_for_missing, retries};
use crate::locks::hold::Hold;
use crate::rules::catalogue::Snapshot;
use crate::rules::matching::RuleSet;
use crate::workers::Shared;
use crate::workers::job::Worked;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// A rule that was just written may not be known yet, and its database may be dirty because of it.
const RULES_KNOWN_AFTER: Duration = Duration::from_secs(2);

pub async fn work(shared: &Shared, tools: &Tools, hold: &Arc<Hold>) -> Worked {
    let db: DbName = hold.before()["db_name"].as_str().unwrap_or_default().into();
    tools.couch.health().up().await;
    let rules = rules_of(shared, &db).await;
    if rules.is_empty() {
        return End::Clean.into();
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

async fn rules_of(shared: &Shared, db: &str) -> Arc<RuleSet> {
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
        return rules;
    }
    let found = snapshots.wait_for(|snapshot| !known(snapshot).is_empty());
    match tokio::time::timeout(RULES_KNOWN_AFTER, found).await {
        Ok(Ok(snapshot)) => known(&snapshot),
        _ => rules,
    }
}
