//! The first seed's regions: two servers kept in sync in both directions over a line that breaks.

use crate::support::couch::encode;
use crate::support::{Couch, Fault, Kind, Lab, Proxy, SOON, Server, Spiegel, eventually, stays};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

fn run(here: impl AsyncFnOnce() -> Option<(Server, Server)>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let Some((east, west)) = here().await else { return };
        let labs = [Arc::new(Lab::on(&east, "regions").await), Arc::new(Lab::on(&west, "regions").await)];
        let test = tokio::spawn(two_regions_stay_in_sync(labs[0].clone(), labs[1].clone()));
        let result = test.await;
        for lab in &labs {
            if lab.kind == Kind::CouchDb {
                lab.clean_up().await;
            }
        }
        if let Err(error) = result {
            std::panic::resume_unwind(error.into_panic());
        }
    });
}

#[test]
fn embedded() {
    run(async || Some((Server::start(Kind::Embedded).await?, Server::start(Kind::Embedded).await?)));
}

/// Neither side is a CouchDB's: one has integer seqs.
#[test]
fn pouchdb() {
    run(async || Some((Server::start(Kind::Embedded).await?, Server::start(Kind::PouchDb).await?)));
}

#[test]
fn couchdb() {
    run(async || Some((Server::real("SPIEGEL_TEST_COUCHDB_URL")?, Server::real("SPIEGEL_TEST_COUCHDB_URL_2")?)));
}

/// One direction: a Spiegel beside its source, writing over the line.
async fn one_way(from: &Lab, source: &str, to: &Couch, line: &Proxy, target: &str) -> Spiegel {
    from.install().await;
    from.add_password("127.0.0.1", &to.user, &to.password);
    let url = to.at(&line.base()).url_for_user(target);
    from.replicator("over the line", source, target, json!({ "target": url })).await;
    from.spiegel().await
}

async fn two_regions_stay_in_sync(east: Arc<Lab>, west: Arc<Lab>) {
    // Each region has its own prefix, so that both may be on one server.
    let (east_db, west_db) = (east.create("posts/2026").await, west.create("posts/2026").await);
    let (to_west, to_east) = (Proxy::start(&west.couch.base).await, Proxy::start(&east.couch.base).await);
    let _eastern = one_way(&east, &east_db, &west.couch, &to_west, &west_db).await;
    let _western = one_way(&west, &west_db, &east.couch, &to_east, &east_db).await;
    let same = async |count: usize| {
        let all = east.couch.all(&east_db).await;
        (all.len() == count && all == west.couch.all(&west_db).await).then_some(())
    };

    east.couch.fill(&east_db, "east", 20).await;
    west.couch.fill(&west_db, "west", 20).await;
    eventually(SOON * 2, "both have both", || same(40)).await;

    // The same document on both sides: one revision wins on both.
    east.couch.put(&east_db, "same", json!({ "by": "east" })).await;
    west.couch.put(&west_db, "same", json!({ "by": "west" })).await;
    eventually(SOON * 2, "the same revision wins on both", || same(41)).await;

    for fault in [Fault::Refuse, Fault::Silent] {
        to_west.set(fault.clone());
        to_east.set(fault.clone());
        to_west.cut();
        let before = east.couch.all(&east_db).await.len();
        east.couch.fill(&east_db, &format!("east {fault:?} "), 10).await;
        west.couch.fill(&west_db, &format!("west {fault:?} "), 10).await;
        east.couch.remove(&east_db, "east0").await;
        east.couch.put(&east_db, "east0", json!({ "again": format!("{fault:?}") })).await;
        let apart = async || west.couch.all(&west_db).await.len() == before + 10;
        stays(Duration::from_secs(2), "the line is cut", apart).await;
        to_west.heal();
        to_east.heal();
        eventually(SOON * 3, format!("in sync again after {fault:?}"), || same(before + 20)).await;
    }

    // What arrives from the other side is a change here, but none that has to go back.
    let updates = async || (east.couch.updates(&east_db).await, west.couch.updates(&west_db).await);
    let before = updates().await;
    stays(Duration::from_secs(2), "no ping-pong", async || updates().await == before).await;
    let path = encode(&east_db);
    assert!(!path.contains('/'), "a slash in a name is encoded: {path}");
}
