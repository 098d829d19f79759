//! Which engine makes a run: `native` speaks the protocol itself, `couchdb` asks CouchDB to, and `auto` is `native` for
//! everything that it can do.

use super::native::NativeEngine;
use super::native::parameters::{NotNative, Parameters};
use super::{CouchEngine, Engine, ReplicateError, Replication, Report};
use crate::config::EngineChoice;
use crate::job::Verdict;
use futures_util::future::BoxFuture;
use std::sync::Arc;

pub struct Engines {
    pub native: Arc<NativeEngine>,
    pub couchdb: Arc<CouchEngine>,
    pub default: EngineChoice,
}

impl Engine for Engines {
    fn run(&self, spec: Arc<Replication>) -> BoxFuture<'static, Result<Report, ReplicateError>> {
        let choice = spec.engine.unwrap_or(self.default);
        if choice == EngineChoice::Couchdb {
            spec.progress.made_by(EngineChoice::Couchdb);
            return self.couchdb.run(spec);
        }
        match (Parameters::parse(&spec.params, self.native.local()), choice) {
            (Ok(parameters), _) => {
                spec.progress.made_by(EngineChoice::Native);
                let native = self.native.clone();
                Box::pin(async move { native.run(&spec, parameters).await })
            }
            (Err(NotNative::Unsupported { .. }), EngineChoice::Auto) => {
                spec.progress.made_by(EngineChoice::Couchdb);
                self.couchdb.run(spec)
            }
            (Err(error), _) => {
                let error = ReplicateError::Other { error: error.to_string(), verdict: Verdict::GiveUp };
                Box::pin(std::future::ready(Err(error)))
            }
        }
    }
}
