//! Reads the deliveries database, and then its changes: what another process or a person wrote is known at once.

use super::Arguments;
use super::operate::is_foreign;
use super::parked::{DELIVERY, DISABLED, Disabled, Key, Parked};
use crate::couch::{ChangesQuery, CouchError, FeedLine, Row, Seq};
use serde_json::Value;
use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

/// Documents read by one request.
const PAGE: usize = 500;
/// The changes are followed for so long before everything is read anew.
const READ_ANEW_AFTER: Duration = Duration::from_secs(3_600);
/// What ends sooner has failed.
const FOLLOWED_MIN: Duration = Duration::from_secs(30);
/// Failures in a row that are worth a line.
const SAID_AFTER: u32 = 3;
/// Somebody else's database is looked at as seldom as one that failed often.
const FOREIGN: u32 = 5;
const RETRY_AFTER: Duration = Duration::from_secs(1);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);

pub(super) async fn run(arguments: Arguments) {
    let book = arguments.deliveries.book.clone();
    let mut failures: u32 = 0;
    loop {
        arguments.couch.health().up().await;
        match load(&arguments).await {
            Ok(None) => {
                if !book.is_foreign.swap(true, Ordering::Relaxed) {
                    let db = &arguments.db_name;
                    tracing::error!(
                        db,
                        "the database holds other documents than deliveries: nothing is written there, and rules wait at what \
                         fails; choose another db_name"
                    );
                }
                book.set_loaded();
                failures = FOREIGN;
            }
            Ok(Some(since)) => {
                book.is_foreign.store(false, Ordering::Relaxed);
                book.set_loaded();
                book.changed.notify_one();
                if failures >= SAID_AFTER {
                    tracing::info!(db = arguments.db_name, "the deliveries database can be read again");
                }
                let started = Instant::now();
                // However it ends, everything is read anew: what happened meanwhile may not be in the changes any more. So it is
                // now and then in any case, because a node that lagged may have hidden something.
                let followed = tokio::time::timeout(READ_ANEW_AFTER, follow(&arguments, since)).await;
                failures = if started.elapsed() < FOLLOWED_MIN { failures.saturating_add(1) } else { 0 };
                if let Ok(Err(error)) = followed
                    && failures == SAID_AFTER
                    && arguments.couch.health().is_up()
                {
                    tracing::error!(db = arguments.db_name, %error, "cannot follow the changes of the deliveries database");
                }
            }
            Err(error) => {
                if failures == 0 && arguments.couch.health().is_up() {
                    tracing::error!(db = arguments.db_name, %error, "cannot read the deliveries database, nothing is delivered until then");
                }
                failures = failures.saturating_add(1);
            }
        }
        let pause = RETRY_AFTER.saturating_mul(1 << failures.min(5));
        tokio::time::sleep(pause.min(RETRY_AFTER_MAX)).await;
    }
}

/// Everything that is there, and the seq before it was read; None where the database is somebody else's. It is made where it is
/// missing: whoever updates from a release without it has not installed it.
async fn load(arguments: &Arguments) -> Result<Option<Seq>, CouchError> {
    let Arguments { couch, db_name, .. } = arguments;
    let (since, is_empty) = match couch.db_info(db_name).await {
        Ok(info) => (info.update_seq, info.doc_count == 0),
        Err(CouchError::NotFound(_)) => {
            if couch.create_db(db_name).await? {
                tracing::info!(db = db_name, "created the deliveries database");
            }
            (Seq::zero(), true)
        }
        Err(error) => return Err(error),
    };
    if is_empty {
        // Whoever made it may not have come that far.
        couch.set_admins_only(db_name).await?;
    } else if is_foreign(couch, db_name).await? {
        return Ok(None);
    }
    let book = &arguments.deliveries.book;
    // Before anything is read: what is parked meanwhile is not taken for gone.
    let (mut gone, mut enabled): (HashSet<Key>, HashSet<String>) = {
        let index = book.index();
        (index.keys().collect(), index.disabled().map(|known| known.rule.clone()).collect())
    };
    for prefix in [DELIVERY, DISABLED] {
        let mut after: Option<String> = None;
        loop {
            let page = couch.docs_by_prefix(db_name, prefix, after.as_deref(), PAGE).await?;
            let Some(last) = page.last().and_then(|doc| doc["_id"].as_str()).map(str::to_string) else { break };
            after = Some(last);
            for doc in &page {
                match (Parked::read(doc), Disabled::read(doc)) {
                    (Some(parked), _) => {
                        // One that was known before is as it was read: a database that was made again counts its revisions anew.
                        match gone.remove(&parked.key()) {
                            true => drop(book.index().put_as_read(&parked)),
                            false => drop(book.index().put(&parked)),
                        }
                    }
                    (None, Some(disabled)) => {
                        enabled.remove(&disabled.rule);
                        book.index().disable(disabled);
                    }
                    (None, None) => warn_of(doc),
                }
            }
        }
    }
    for key in gone {
        book.index().forget_idle(&key);
    }
    for rule in enabled {
        enable(arguments, &rule);
    }
    Ok(Some(since))
}

async fn follow(arguments: &Arguments, since: Seq) -> Result<(), CouchError> {
    let query = ChangesQuery { since: Some(since), include_docs: true, ..ChangesQuery::default() };
    let mut feed = arguments.couch.changes_feed(&arguments.db_name, &query, arguments.heartbeat).await?;
    while let Some(line) = feed.next().await? {
        match line {
            FeedLine::Heartbeat => {}
            FeedLine::Row(row) => take_row(arguments, &row),
            FeedLine::LastSeq(_) => return Ok(()),
            FeedLine::Malformed(what) => tracing::warn!(db = arguments.db_name, what, "malformed row"),
        }
    }
    Ok(())
}

fn take_row(arguments: &Arguments, row: &Row) {
    if row.deleted {
        let book = &arguments.deliveries.book;
        if let Some(rule) = row.id.strip_prefix(DISABLED) {
            enable(arguments, rule);
        } else if let Some(key) = Key::parse(&row.id) {
            let last = book.index().forget_idle_until(&key, row.rev());
            if let Some(rule) = last {
                tracing::info!(%rule, "no delivery of the rule is parked any more");
            }
        }
        return;
    }
    let doc = row.doc.as_ref().and_then(|doc| serde_json::from_str::<Value>(doc.get()).ok());
    if let Some(doc) = doc {
        take_doc(arguments, &doc);
    }
}

fn take_doc(arguments: &Arguments, doc: &Value) {
    let book = &arguments.deliveries.book;
    match (Parked::read(doc), Disabled::read(doc)) {
        (Some(parked), _) => {
            book.index().put(&parked);
            book.changed.notify_one();
        }
        (None, Some(disabled)) => book.index().disable(disabled),
        (None, None) => warn_of(doc),
    }
}

fn warn_of(doc: &Value) {
    if doc["_id"].as_str().is_some_and(|id| id.starts_with(DELIVERY) || id.starts_with(DISABLED)) {
        tracing::warn!(id = doc["_id"].as_str(), "not a delivery's document, it is passed over");
    }
}

fn enable(arguments: &Arguments, rule: &str) {
    let book = &arguments.deliveries.book;
    if !book.index().enable(rule, SystemTime::now()) {
        return;
    }
    book.index().hurry(&HashSet::from([rule]), SystemTime::now());
    let snapshot = arguments.snapshot.borrow().clone();
    if let Some(rule) = snapshot.rule(rule) {
        tracing::info!(rule = %rule.id, "the rule is enabled again");
        (arguments.enabled)(rule.clone());
    }
    book.changed.notify_one();
}
