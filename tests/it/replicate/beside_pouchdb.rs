//! Spiegel's replication beside PouchDB's, which shares no line with ours or CouchDB's: the same source, two targets.
//!
//! PouchDB stands on either side of it, and on both. Where it pulls from a server of another kind, though, it takes the attachments
//! of a branch from the winner (pouchdb-replication asks for them without a revision): there `_replicate` of the embedded server
//! is what ours is compared with.

use super::compare::{Place, assert_same, assert_same_documents, leaf_sets, same_leaf_sets};
use super::source::Source;
use super::{Pair, reference_by, replicator, same_leaves, seeded};
use crate::support::couch::encode;
use crate::support::{Couch, Kind, Lab, Server};
use reqwest::{Method, StatusCode};
use serde_json::json;
use std::sync::Arc;

/// Growths after the first replication.
const ROUNDS: usize = 2;

#[test]
fn from_pouchdb_to_pouchdb() {
    run(async || (Server::start(Kind::PouchDb).await, None));
}

#[test]
fn from_pouchdb_to_the_embedded_server() {
    run(async || (Server::start(Kind::PouchDb).await, Server::start(Kind::Embedded).await));
}

#[test]
fn from_the_embedded_server_to_pouchdb() {
    run(async || (Server::start(Kind::Embedded).await, Server::start(Kind::PouchDb).await));
}

/// The source's server, which Spiegel watches, and the targets' where that is another.
fn run(servers: impl AsyncFnOnce() -> (Option<Server>, Option<Server>)) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let (here, there) = servers().await;
        let Some(here) = here else { return };
        // Without npm there is nothing to compare with.
        if [Some(&here), there.as_ref()].into_iter().flatten().all(|server| server.kind != Kind::PouchDb) {
            return;
        }
        let there = there.as_ref().unwrap_or(&here);
        let lab = Arc::new(Lab::on(&here, "beside_pouchdbs").await);
        lab.add_password(&there.couch.host(), &there.couch.user, &there.couch.password);
        both_replicate(lab, &there.couch).await;
    });
}

async fn both_replicate(lab: Arc<Lab>, there: &Couch) {
    let (mut random, seed) = seeded();
    lab.install().await;
    let db = lab.create("source").await;
    let mut source = Source::new(&lab.couch, &db, random.fork()).without_attachments_of_the_deleted();
    if lab.kind == Kind::PouchDb {
        source = source.with_attachments_in_full();
    }
    let (theirs, ours) = (lab.name("theirs"), lab.name("ours"));
    for db in [&theirs, &ours] {
        there.create(db).await;
    }
    let security = json!({ "admins": {"names": ["its own"], "roles": []}, "members": {"names": [], "roles": []} });
    let (status, answer) = there.ask(Method::PUT, &format!("{}/_security", encode(&ours)), Some(security.clone())).await;
    assert_eq!(status, StatusCode::OK, "{answer}");

    source.grow(Pair::size() / 5, 0).await;
    source.add_extremes().await;
    replicator(&lab, "ours", &db, &ours, json!({ "target": there.url_for_user(&ours) })).await;
    let mut spiegel = lab.spiegel().await;
    let url = |couch: &Couch, db: &str| format!("{}/{}", couch.url(), encode(db));
    let at_source = Place { couch: &lab.couch, db: &db };
    let [at_theirs, at_ours] = [&theirs, &ours].map(|db| Place { couch: there, db });
    for round in 0..=ROUNDS {
        if round > 0 {
            source.grow(10, Pair::size() / 10).await;
        }
        if round == ROUNDS {
            spiegel.restart().await;
        }
        let when = format!("round {round} (seed {seed})");
        reference_by(&lab.couch, &url(&lab.couch, &db), &url(there, &theirs), json!({})).await;
        same_leaves(at_source, at_ours, &when).await;
        same_leaf_sets(&leaf_sets(at_source).await, &leaf_sets(at_theirs).await, &format!("{when}: theirs"));
        assert_same_documents(at_source, at_ours, &when).await;
        assert_same(at_theirs, &[at_ours], &when).await;
    }
    let (_, found) = there.ask(Method::GET, &format!("{}/_security", encode(&ours)), None).await;
    assert_eq!(found, security, "_security is each database's own");
    let count = source.ids().len() + 2;
    assert_eq!(leaf_sets(at_ours).await.len(), count);
    let revised = |(leaves, _): &(_, _)| std::collections::BTreeSet::<String>::len(leaves) > 1;
    assert!(leaf_sets(at_ours).await.values().any(revised), "there are conflicts");
}
