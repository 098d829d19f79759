//! Which engine makes a run: `native` speaks the protocol itself, `couchdb` asks CouchDB to, and `auto` is `native` for
//! everything that it can do.
//!
//! The original's users wrote their URLs as CouchDB sees them. What Spiegel cannot reach from where it runs, CouchDB may, so
//! `auto` lets it try.

use super::native::NativeEngine;
use super::native::parameters::{NotNative, Parameters};
use super::{CouchEngine, Engine, ReplicateError, Replication, Report};
use crate::config::EngineChoice;
use crate::job::Verdict;
use futures_util::future::BoxFuture;
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

impl Engine for Engines {
    fn run(&self, spec: Arc<Replication>) -> BoxFuture<'static, Result<Report, ReplicateError>> {
        let choice = spec.engine.unwrap_or(self.default);
        if choice == EngineChoice::Couchdb {
            spec.progress.made_by(EngineChoice::Couchdb);
            return self.couchdb.run(spec);
        }
        let parameters = match (Parameters::parse(&spec.params, self.native.local()), choice) {
            (Ok(parameters), _) => parameters,
            (Err(NotNative::Unsupported { .. }), EngineChoice::Auto) => {
                spec.progress.made_by(EngineChoice::Couchdb);
                return self.couchdb.run(spec);
            }
            (Err(error), _) => {
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
