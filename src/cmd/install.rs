//! `spiegel install`: the spiegel database, that of its deliveries, `_global_changes`, and the original's design documents. Doing
//! it twice is fine.

use super::design::{self, Design};
use super::{Exit, Failure, couch, say};
use crate::config::Settings;
use crate::couch::{Couch, CouchError, WriteResult, encode_segment};
use crate::deliveries::operate::Desk;
use serde_json::Value;

pub(super) const FEED_DB: &str = "_global_changes";
/// Somebody else may write a design document between our read and our write; more often than this is no accident.
const WRITES_MAX: usize = 5;

pub(super) async fn command(settings: &Settings) -> Result<Exit, Failure> {
    let couch = couch(settings)?;
    install(&couch, settings, &mut |line| say(line)).await.map_err(|error| Failure::of_couch(&couch, "install", &error))?;
    say(&format!("\"{}\" is ready on {}; `spiegel check` looks for what may be missing", settings.db_name, couch.address()));
    Ok(Exit::Done)
}

/// Tells `done` each step.
pub(super) async fn install(couch: &Couch, settings: &Settings, done: &mut (dyn FnMut(&str) + Send)) -> Result<(), CouchError> {
    let db = settings.db_name.as_str();
    let is_new = couch.create_db(db).await?;
    done(&format!("{} database \"{db}\"", if is_new { "created  " } else { "unchanged" }));
    secure(couch, db, is_new, done).await?;
    for design in design::of_the_spiegel_database() {
        write_design(couch, db, &design, done).await?;
    }
    deliveries(couch, db, done).await?;
    if couch.create_db(FEED_DB).await? {
        done(&format!("created   database \"{FEED_DB}\""));
    }
    write_design(couch, FEED_DB, &design::sieve(&settings.namespace, db), done).await
}

/// It tells names of databases and documents, and what receivers answered. Somebody's own database of that name is left alone.
async fn deliveries(couch: &Couch, spiegel_db: &str, done: &mut (dyn FnMut(&str) + Send)) -> Result<(), CouchError> {
    let desk = Desk::new(couch.clone(), spiegel_db);
    let db = desk.db();
    let is_new = couch.create_db(db).await?;
    done(&format!("{} database \"{db}\"", if is_new { "created  " } else { "unchanged" }));
    match desk.is_ours().await? {
        true => secure(couch, db, is_new, done).await,
        false => {
            done(&format!("unchanged rights on \"{db}\": it holds other documents than deliveries; choose another db_name"));
            Ok(())
        }
    }
}

/// Rules make Spiegel send documents anywhere, so only admins may write them. Rights that somebody granted on purpose are left.
async fn secure(couch: &Couch, db: &str, is_new: bool, done: &mut (dyn FnMut(&str) + Send)) -> Result<(), CouchError> {
    let access = Access::of(&security(couch, db).await?);
    match access {
        Access::AdminsOnly if !is_new => {}
        Access::AdminsOnly | Access::Everybody => {
            couch.set_admins_only(db).await?;
            done(&format!("secured   database \"{db}\": admins only"));
        }
        Access::Granted => done(&format!("unchanged rights on \"{db}\": somebody besides the admins was granted access")),
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    AdminsOnly,
    Everybody,
    Granted,
}

impl Access {
    /// From a `_security` object. Without any member, everybody reads and writes; a database's admins are members too.
    pub fn of(security: &Value) -> Self {
        let named = |group: &str, list: &str| -> Vec<String> {
            let entries = security[group][list].as_array().cloned().unwrap_or_default();
            entries.iter().map(|entry| entry.as_str().unwrap_or_default().to_string()).collect()
        };
        let (member_names, member_roles) = (named("members", "names"), named("members", "roles"));
        let (admin_names, admin_roles) = (named("admins", "names"), named("admins", "roles"));
        if member_names.is_empty() && member_roles.is_empty() {
            return Access::Everybody;
        }
        let only_admins = |roles: &[String]| roles.iter().all(|role| role == "_admin");
        match member_names.is_empty() && admin_names.is_empty() && only_admins(&member_roles) && only_admins(&admin_roles) {
            true => Access::AdminsOnly,
            false => Access::Granted,
        }
    }
}

pub(super) async fn security(couch: &Couch, db: &str) -> Result<Value, CouchError> {
    couch.get("_security", &format!("{}/_security", encode_segment(db))).await
}

async fn write_design(couch: &Couch, db: &str, design: &Design, done: &mut (dyn FnMut(&str) + Send)) -> Result<(), CouchError> {
    for _ in 0..WRITES_MAX {
        let existing = couch.get_doc(db, &design.id).await?;
        let verb = if existing.is_some() { "updated  " } else { "created  " };
        let Some(doc) = design.merged_into(existing) else {
            done(&format!("unchanged {db}/{}", design.id));
            return Ok(());
        };
        match couch.put_doc(db, &design.id, &doc).await? {
            WriteResult::Saved { .. } => {
                done(&format!("{verb} {db}/{}", design.id));
                return Ok(());
            }
            WriteResult::Conflict => {}
            WriteResult::Refused { reason } => return Err(CouchError::Forbidden(reason)),
        }
    }
    Err(CouchError::Conflict(format!("{db}/{} is being written by somebody else", design.id)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn who_has_access() {
        let admins = json!({ "names": [], "roles": ["_admin"] });
        let cases = [
            (json!({ "admins": admins, "members": admins }), Access::AdminsOnly),
            (json!({ "members": { "roles": ["_admin"] } }), Access::AdminsOnly),
            (json!({}), Access::Everybody),
            (json!({ "admins": admins, "members": { "names": [], "roles": [] } }), Access::Everybody),
            (json!({ "admins": admins, "members": { "names": ["bob"], "roles": ["_admin"] } }), Access::Granted),
            (json!({ "admins": { "names": ["bob"] }, "members": admins }), Access::Granted),
            (json!({ "admins": admins, "members": { "roles": ["_admin", "staff"] } }), Access::Granted),
            (json!({ "members": "nonsense" }), Access::Everybody),
        ];
        for (security, expected) in cases {
            assert_eq!(Access::of(&security), expected, "{security}");
        }
    }
}
