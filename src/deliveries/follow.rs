//! Reads the deliveries database, and then its changes: what another process or a person wrote is known at once.

use super::parked::{DELIVERY, DISABLED, Disabled, Key, Parked};
use super::{Arguments, Book};
use crate::couch::{ChangesQuery, CouchError, FeedLine, Row, Seq};
use serde_json::Value;
use std::time::Duration;

/// Documents read by one request.
const PAGE: usize = 500;
const RETRY_AFTER: Duration = Duration::from_secs(1);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);

pub(super) async fn run(arguments: Arguments) {
    let book = arguments.deliveries.book.clone();
    let mut failures: u32 = 0;
    loop {
        arguments.couch.health().up().await;
        match load(&arguments).await {
            Ok(since) => {
                book.set_loaded();
                book.changed.notify_one();
                if failures > 0 {
                    tracing::info!(db = arguments.db_name, "the deliveries database can be read again");
                }
                failures = 0;
                // However it ends, everything is read anew: what happened meanwhile may not be in the changes any more.
                if let Err(error) = follow(&arguments, since).await
                    && !error.is_outage()
                {
                    tracing::debug!(%error, "the changes of the deliveries database ended");
                }
            }
            Err(error) => {
                if failures == 0 && !error.is_outage() {
                    tracing::error!(db = arguments.db_name, %error, "cannot read the deliveries database, nothing is delivered until then");
                }
                failures = failures.saturating_add(1);
            }
        }
        let pause = RETRY_AFTER.saturating_mul(1 << failures.min(5));
        tokio::time::sleep(pause.min(RETRY_AFTER_MAX)).await;
    }
}

/// Everything that is there, and the seq before it was read. The database is made where it is missing: whoever updates from a
/// release without it has not installed it.
async fn load(arguments: &Arguments) -> Result<Seq, CouchError> {
    let Arguments { couch, db_name, .. } = arguments;
    let since = match couch.db_info(db_name).await {
        Ok(info) => info.update_seq,
        Err(CouchError::NotFound(_)) => {
            if couch.create_db(db_name).await? {
                tracing::info!(db = db_name, "created the deliveries database");
            }
            couch.set_admins_only(db_name).await?;
            Seq::zero()
        }
        Err(error) => return Err(error),
    };
    let book = &arguments.deliveries.book;
    let was_loaded = book.index().is_loaded();
    let mut docs = Vec::new();
    for prefix in [DELIVERY, DISABLED] {
        let mut after: Option<String> = None;
        loop {
            let page = couch.docs_by_prefix(db_name, prefix, after.as_deref(), PAGE).await?;
            let Some(last) = page.last().and_then(|doc| doc["_id"].as_str()).map(str::to_string) else { break };
            after = Some(last);
            match was_loaded {
                // The index is in use: what is gone is found below.
                true => docs.extend(page.into_iter().map(reduced)),
                false => page.iter().for_each(|doc| take_doc(arguments, doc)),
            }
        }
    }
    if was_loaded {
        replace(arguments, book, &docs);
    }
    Ok(since)
}

/// The texts of the last answer are not kept in memory.
fn reduced(mut doc: Value) -> Value {
    if let Some(fields) = doc.as_object_mut() {
        fields.remove("last_answer");
        fields.remove("last_error");
    }
    doc
}

/// What is there takes the place of what was known; what is gone is forgotten.
fn replace(arguments: &Arguments, book: &Book, docs: &[Value]) {
    let there: std::collections::HashSet<Key> = docs.iter().filter_map(|doc| Key::parse(doc["_id"].as_str()?)).collect();
    let disabled: std::collections::HashSet<String> =
        docs.iter().filter_map(Disabled::read).map(|disabled| disabled.rule).collect();
    let (gone, enabled): (Vec<Key>, Vec<String>) = {
        let index = book.index();
        let gone = index.keys().filter(|key| !there.contains(key)).collect();
        let enabled = index.disabled().map(|known| known.rule.clone()).filter(|rule| !disabled.contains(rule)).collect();
        (gone, enabled)
    };
    // What was parked while this was read may not have been there yet: only what is not in flight goes.
    for key in gone {
        book.index().forget_idle(&key);
    }
    for rule in enabled {
        enable(arguments, &rule);
    }
    for doc in docs {
        take_doc(arguments, doc);
    }
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
            forget(book, &key, row);
        }
        return;
    }
    let doc = row.doc.as_ref().and_then(|doc| serde_json::from_str::<Value>(doc.get()).ok());
    if let Some(doc) = doc {
        take_doc(arguments, &doc);
    }
}

/// A row may be late: what we know may be a later state.
fn forget(book: &Book, key: &Key, row: &Row) {
    let mut index = book.index();
    let is_late =
        index.get(key).is_some_and(|entry| super::parked::generation(&entry.doc_rev) > super::parked::generation(row.rev()));
    let last = (!is_late).then(|| index.get(key).map(|entry| entry.rule.clone())).flatten();
    if let Some(rule) = last
        && index.forget(key)
    {
        drop(index);
        tracing::info!(%rule, "no delivery of the rule is parked any more");
    }
}

fn take_doc(arguments: &Arguments, doc: &Value) {
    let book = &arguments.deliveries.book;
    if let Some(parked) = Parked::read(doc) {
        let mut index = book.index();
        let is_late = index
            .get(&parked.key())
            .is_some_and(|entry| super::parked::generation(&entry.doc_rev) > super::parked::generation(&parked.doc_rev));
        if !is_late {
            index.put(&parked);
            drop(index);
            book.changed.notify_one();
        }
    } else if let Some(disabled) = Disabled::read(doc) {
        book.index().disable(disabled);
    } else if doc["_id"].as_str().is_some_and(|id| id.starts_with(DELIVERY) || id.starts_with(DISABLED)) {
        tracing::warn!(id = doc["_id"].as_str(), "not a delivery's document, it is passed over");
    }
}

fn enable(arguments: &Arguments, rule: &str) {
    if !arguments.deliveries.book.index().enable(rule) {
        return;
    }
    let snapshot = arguments.snapshot.borrow().clone();
    if let Some(rule) = snapshot.rules().iter().find(|known| known.id.as_ref() == rule) {
        tracing::info!(rule = %rule.id, "the rule is enabled again");
        (arguments.enabled)(rule.clone());
    }
    arguments.deliveries.book.changed.notify_one();
}
