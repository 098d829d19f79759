//! `spiegel uninstall`: removes the sieve, the spiegel database and that of its deliveries. What is missing already is fine.

use super::install::FEED_DB;
use super::{Exit, Failure, couch, design, say};
use crate::config::Settings;
use crate::couch::{Couch, CouchError, WriteResult};
use crate::deliveries::operate::Desk;

pub(super) async fn command(settings: &Settings) -> Result<Exit, Failure> {
    let couch = couch(settings)?;
    let db = settings.db_name.as_str();
    let failed = |error: CouchError| Failure::of_couch(&couch, "uninstall", &error);
    if !is_ours(&couch, db).await.map_err(failed)? {
        let message = format!(
            "the database \"{db}\" on {} holds documents but no _design/on_changes, so it is no spiegel database: nothing was removed",
            couch.address()
        );
        return Err(Failure::new(Exit::Config, message));
    }
    let sieve = design::sieve(&settings.namespace, db).id;
    let had_sieve = remove_doc(&couch, FEED_DB, &sieve).await.map_err(failed)?;
    say(&told(had_sieve, &format!("{FEED_DB}/{sieve}")));
    remove_deliveries(&couch, db).await.map_err(failed)?;
    let had_db = couch.delete_db(db).await.map_err(failed)?;
    say(&told(had_db, &format!("database \"{db}\"")));
    Ok(Exit::Done)
}

/// Before the spiegel database goes: as long as that is there, a second try finds this one.
async fn remove_deliveries(couch: &Couch, spiegel_db: &str) -> Result<(), CouchError> {
    let desk = Desk::new(couch.clone(), spiegel_db);
    let db = desk.db();
    match desk.is_ours().await? {
        true => say(&told(couch.delete_db(db).await?, &format!("database \"{db}\""))),
        false => say(&format!("left      database \"{db}\": it holds other documents than deliveries")),
    }
    Ok(())
}

fn told(was_there: bool, what: &str) -> String {
    format!("{} {what}", if was_there { "removed  " } else { "missing  " })
}

/// A slip in --db-name must not cost somebody's data. A missing or an empty database costs nobody anything.
async fn is_ours(couch: &Couch, db: &str) -> Result<bool, CouchError> {
    match couch.db_info(db).await {
        Err(CouchError::NotFound(_)) => Ok(true),
        Err(error) => Err(error),
        Ok(info) if info.doc_count == 0 => Ok(true),
        Ok(_) => Ok(couch.get_doc(db, "_design/on_changes").await?.is_some()),
    }
}

/// False where there was none. A conflict means that somebody wrote it just now: look again, once.
async fn remove_doc(couch: &Couch, db: &str, id: &str) -> Result<bool, CouchError> {
    for _ in 0..2 {
        let Some(doc) = couch.get_doc(db, id).await? else { return Ok(false) };
        let rev = doc["_rev"].as_str().unwrap_or_default();
        if let WriteResult::Saved { .. } = couch.delete_doc(db, id, rev).await? {
            return Ok(true);
        }
    }
    Err(CouchError::Conflict(format!("{db}/{id} is being written by somebody else")))
}
