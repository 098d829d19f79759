//! A lock that this process holds, with the requests: renewed while it lives, written with what the work has to say.

use crate::checkpoints::{Checkpoints, Gone, Locked};
use crate::couch::WriteResult;
use crate::locks::Settings;
use crate::locks::held::{End, Held, Last, taken};
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::Mutex;
use tokio_util::task::AbortOnDropHandle;

#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// Whoever has it now sees to the rest.
    #[error("the lock is lost")]
    Lost,
    #[error("couchdb refused the document: {0}")]
    Refused(String),
    #[error("the document changes faster than it can be written")]
    Contended,
    #[error(transparent)]
    Gone(#[from] Gone),
}

/// What became of an attempt to lock.
pub enum Attempt {
    Held(Hold),
    Contended,
    /// A 202 with this revision.
    TooFew {
        rev: String,
    },
    Refused {
        reason: String,
    },
}

/// What the document was left as.
#[derive(Debug)]
pub enum Left {
    Doc(Value),
    Deleted,
    /// Somebody else writes it.
    Unknown,
}

/// Dropped, it renews no more, and is free after a while.
pub struct Hold {
    shared: Arc<Shared>,
    /// As it was before it was taken.
    before: Value,
    _renewer: AbortOnDropHandle<()>,
}

struct Shared {
    held: Mutex<Held>,
    checkpoints: Checkpoints,
    settings: Settings,
}

/// Each round lost a race against another writer.
const ROUNDS_MAX: usize = 20;

impl Hold {
    pub async fn take(doc: Value, me: &str, checkpoints: &Checkpoints, settings: &Settings) -> Result<Attempt, Gone> {
        let mut lock = taken(&doc, me, SystemTime::now());
        let rev = match checkpoints.lock(lock.clone()).await.map_err(|_| Gone)? {
            Locked::Yes { rev } => rev,
            Locked::No => return Ok(Attempt::Contended),
            Locked::TooFew { rev } => return Ok(Attempt::TooFew { rev }),
            Locked::Refused { reason } => return Ok(Attempt::Refused { reason }),
        };
        lock["_rev"] = Value::from(rev);
        let held = Mutex::new(Held::new(me, lock));
        let shared = Arc::new(Shared { held, checkpoints: checkpoints.clone(), settings: settings.clone() });
        let renewer = AbortOnDropHandle::new(tokio::spawn(renew(shared.clone())));
        Ok(Attempt::Held(Self { shared, before: doc, _renewer: renewer }))
    }

    /// The document as it was before it was taken.
    pub fn before(&self) -> &Value {
        &self.before
    }

    /// Conflicts showed up: it will not be cleaned.
    pub async fn dirtied(&self) {
        self.shared.held.lock().await.dirtied();
    }

    /// Writes what the work says meanwhile, and renews the lock with it.
    pub async fn write(&self, change: impl Fn(&mut Map<String, Value>)) -> Result<(), HoldError> {
        self.shared.write(change).await
    }

    /// The last write: cleans, or unlocks only, or deletes.
    pub async fn end(&self, end: End, change: impl Fn(&mut Map<String, Value>)) -> Result<Left, HoldError> {
        let Shared { held, checkpoints, settings } = &*self.shared;
        let mut held = held.lock().await;
        for _ in 0..ROUNDS_MAX {
            let doc = match held.ended(end, SystemTime::now(), settings, &change) {
                Last::Save(doc) => doc,
                Last::Nothing => return Ok(Left::Unknown),
                Last::Delete { id, rev } => serde_json::json!({ "_id": id, "_rev": rev, "_deleted": true }),
            };
            match checkpoints.save(doc.clone()).await.map_err(|_| Gone)? {
                WriteResult::Saved { .. } if doc["_deleted"] == Value::Bool(true) => return Ok(Left::Deleted),
                WriteResult::Saved { rev } => {
                    held.saved(doc, &rev);
                    return Ok(Left::Doc(held.doc().clone()));
                }
                WriteResult::Refused { reason } => return Err(HoldError::Refused(reason)),
                WriteResult::Conflict => drop(held.conflicted(load(checkpoints, &doc).await?)),
            }
        }
        Err(HoldError::Contended)
    }
}

impl Shared {
    async fn write(&self, change: impl Fn(&mut Map<String, Value>)) -> Result<(), HoldError> {
        let mut held = self.held.lock().await;
        for _ in 0..ROUNDS_MAX {
            let Some(doc) = held.renewed(SystemTime::now(), &change) else { return Err(HoldError::Lost) };
            match self.checkpoints.save(doc.clone()).await.map_err(|_| Gone)? {
                WriteResult::Saved { rev } => {
                    held.saved(doc, &rev);
                    return Ok(());
                }
                WriteResult::Refused { reason } => return Err(HoldError::Refused(reason)),
                WriteResult::Conflict => drop(held.conflicted(load(&self.checkpoints, &doc).await?)),
            }
        }
        Err(HoldError::Contended)
    }
}

async fn load(checkpoints: &Checkpoints, doc: &Value) -> Result<Option<Value>, Gone> {
    checkpoints.load(doc["_id"].as_str().unwrap_or_default().to_string()).await
}

async fn renew(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(shared.settings.renew_every()).await;
        match shared.write(|_| {}).await {
            Ok(()) | Err(HoldError::Contended) => {}
            Err(HoldError::Refused(error)) => tracing::warn!(error, "cannot renew the lock of a document"),
            Err(HoldError::Lost | HoldError::Gone(_)) => return,
        }
    }
}
