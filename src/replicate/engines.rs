//! Which engine makes a run: `native` speaks the protocol itself, `couchdb` asks CouchDB to, and `auto` is `native` for
//! everything that it can do.
//!
//! The original's users wrote their URLs as CouchDB sees them. What Spiegel cannot reach from where it runs, CouchDB may, so
//! `auto` lets it try.

use super::native::NativeEngine;
use super::native::parameters::{Local, NotNative, Parameters};
use super::{CouchEngine, Engine, ReplicateError, Replication, Report};
use crate::config::EngineChoice;
use crate::job::Verdict;
use futures_util::future::BoxFuture;
use serde_json::Value;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// So long CouchDB is asked at once for a pair of hosts that we could not reach.
const OUT_OF_REACH_FOR: Duration = Duration::from_secs(60);
/// Pairs of hosts that are remembered; to forget one costs one attempt.
const PAIRS_MAX: usize = 1_000;

pub struct Engines {
    native: Arc<NativeEngine>,
    couchdb: Arc<CouchEngine>,
    default: EngineChoice,
    out_of_reach: Arc<Mutex<HashMap<(String, String), Instant>>>,
}

impl Engines {
    pub fn new(native: Arc<NativeEngine>, couchdb: Arc<CouchEngine>, default: EngineChoice) -> Self {
        Self { native, couchdb, default, out_of_reach: Arc::default() }
    }
}

/// What the native engine is to do; None where CouchDB is to be asked. An error stays until the document is changed.
pub fn choose(choice: EngineChoice, params: &Value, local: &Local) -> Result<Option<Parameters>, NotNative> {
    if choice == EngineChoice::Couchdb {
        return Ok(None);
    }
    match Parameters::parse(params, local) {
        Err(NotNative::Unsupported { .. }) if choice == EngineChoice::Auto => Ok(None),
        result => result.map(Some),
    }
}

impl Engine for Engines {
    fn run(&self, spec: Arc<Replication>) -> BoxFuture<'static, Result<Report, ReplicateError>> {
        let choice = spec.engine.unwrap_or(self.default);
        let parameters = match choose(choice, &spec.params, self.native.local()) {
            Ok(Some(parameters)) => parameters,
            Ok(None) => {
                spec.progress.made_by(EngineChoice::Couchdb);
                return self.couchdb.run(spec);
            }
            Err(error) => {
                let error = ReplicateError::Other { error: error.to_string(), verdict: Verdict::GiveUp };
                return Box::pin(std::future::ready(Err(error)));
            }
        };
        let (native, couchdb, out_of_reach) = (self.native.clone(), self.couchdb.clone(), self.out_of_reach.clone());
        Box::pin(async move {
            let is_elsewhere = !(parameters.source.is_local && parameters.target.is_local);
            let is_couchdbs_too = choice == EngineChoice::Auto && is_elsewhere;
            let pair = (parameters.source.place(), parameters.target.place());
            if is_couchdbs_too && is_out_of_reach(&out_of_reach, &pair) {
                spec.progress.made_by(EngineChoice::Couchdb);
                return couchdb.run(spec).await;
            }
            spec.progress.made_by(EngineChoice::Native);
            let result = native.run(&spec, parameters).await;
            match result {
                Err(ReplicateError::OutOfReach(_)) if is_couchdbs_too => {
                    remember(&out_of_reach, pair);
                    spec.progress.made_by(EngineChoice::Couchdb);
                    couchdb.run(spec).await
                }
                result => result,
            }
        })
    }
}

fn is_out_of_reach(pairs: &Mutex<HashMap<(String, String), Instant>>, pair: &(String, String)) -> bool {
    let pairs = pairs.lock().unwrap_or_else(PoisonError::into_inner);
    pairs.get(pair).is_some_and(|since| since.elapsed() < OUT_OF_REACH_FOR)
}

fn remember(pairs: &Mutex<HashMap<(String, String), Instant>>, pair: (String, String)) {
    let mut pairs = pairs.lock().unwrap_or_else(PoisonError::into_inner);
    pairs.retain(|_, since| since.elapsed() < OUT_OF_REACH_FOR);
    if pairs.len() < PAIRS_MAX {
        pairs.insert(pair, Instant::now());
    }
}
