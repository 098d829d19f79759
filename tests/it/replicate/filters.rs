//! Replications of a part: each parameter that `_replicate` knows, with its result beside `_replicate`'s.

use super::compare::{assert_same, leaf_sets};
use super::{CAUGHT_UP, Pair, Place, reference, replicator, same_leaves};
use crate::support::couch::encode;
use crate::support::{Lab, eventually, tests_on};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use std::sync::Arc;

tests_on! {
    every: [],
    like_couchdb: [
        named_documents_only,
        selected_documents_only,
        winners_only,
        from_a_position_on,
        a_target_that_is_made_on_the_way,
        the_object_form_with_headers_and_auth,
        names_that_need_encoding,
    ],
    couchdb: [filters_of_design_documents],
}

/// Fills both targets with these parameters, before and after a growth, and compares them.
async fn both_ways(mut pair: Pair, more: Value) -> Pair {
    pair.replicator(more.clone()).await;
    let mut spiegel = pair.lab.spiegel().await;
    for round in 0..3 {
        if round > 0 {
            // What matched only for a moment may or may not be copied: both see the same moments.
            spiegel.stop().await;
            pair.source.grow(20, 40).await;
            spiegel.start_again().await;
        }
        pair.reference(more.clone()).await;
        let when = format!("round {round} of {}", more.to_string().chars().take(200).collect::<String>());
        same_leaves(pair.place(&pair.theirs), pair.place(&pair.ours), &when).await;
        assert_same(pair.place(&pair.theirs), &[pair.place(&pair.ours)], &when).await;
    }
    let count = leaf_sets(pair.place(&pair.ours)).await.len();
    assert!(count > 0, "something passes the filter");
    pair
}

async fn grown(lab: &Arc<Lab>) -> Pair {
    let mut pair = Pair::new(lab.clone()).await;
    pair.source.grow(Pair::size() / 3, 0).await;
    pair
}

async fn named_documents_only(lab: Arc<Lab>) {
    let pair = grown(&lab).await;
    // CouchDB takes them as a URL would have them.
    let mut ids: Vec<String> = pair.source.ids().iter().step_by(3).map(|id| encode(id)).collect();
    let wanted = ids.len();
    ids.push("not there".into());
    let pair = both_ways(pair, json!({ "doc_ids": ids })).await;
    assert_eq!(leaf_sets(pair.place(&pair.ours)).await.len(), wanted);
}

async fn selected_documents_only(lab: Arc<Lab>) {
    let pair = grown(&lab).await;
    both_ways(pair, json!({ "selector": {"$and": [{"kind": {"$in": ["even", "ünï"]}}, {"n": {"$lt": 60}}]} })).await;
}

async fn winners_only(lab: Arc<Lab>) {
    let pair = grown(&lab).await;
    let all = leaf_sets(pair.place(&pair.source.db)).await;
    assert!(all.values().any(|(leaves, _)| leaves.len() > 1), "there are conflicts");
    let pair = Pair { ..pair };
    pair.replicator(json!({ "winning_revs_only": true })).await;
    let _spiegel = lab.spiegel().await;
    pair.reference(json!({ "winning_revs_only": true })).await;
    same_leaves(pair.place(&pair.theirs), pair.place(&pair.ours), "winners").await;
    assert_same(pair.place(&pair.theirs), &[pair.place(&pair.ours)], "winners").await;
    assert!(leaf_sets(pair.place(&pair.ours)).await.values().all(|(leaves, _)| leaves.len() == 1));
}

async fn from_a_position_on(lab: Arc<Lab>) {
    let mut pair = grown(&lab).await;
    let page = lab.couch.changes(&pair.source.db, "since=now").await;
    let since = page["last_seq"].clone();
    pair.source.grow(30, 0).await;
    both_ways(pair, json!({ "since_seq": since })).await;
}

async fn a_target_that_is_made_on_the_way(lab: Arc<Lab>) {
    let pair = grown(&lab).await;
    lab.couch.delete(&pair.ours).await;
    pair.replicator(json!({ "create_target": true, "create_target_params": {"q": 3} })).await;
    let _spiegel = lab.spiegel().await;
    eventually(CAUGHT_UP, "a target", async || lab.couch.exists(&pair.ours).await.then_some(())).await;
    pair.same("a target made on the way").await;
    if lab.faults.is_none() {
        assert_eq!(lab.couch.info(&pair.ours).await["cluster"]["q"], 3);
    }
}

async fn the_object_form_with_headers_and_auth(lab: Arc<Lab>) {
    let mut pair = grown(&lab).await;
    let url = |db: &str| format!("{}/{}", lab.couch.base, encode(db));
    let basic = STANDARD.encode(format!("{}:{}", lab.couch.user, lab.couch.password));
    let forms = [
        (
            json!({ "url": url(&pair.source.db), "headers": {"Authorization": format!("Basic {basic}"), "X-Custom": "1"} }),
            json!({ "url": url(&pair.ours), "auth": {"basic": {"username": lab.couch.user, "password": lab.couch.password}} }),
        ),
        (
            json!({ "url": url(&pair.source.db), "auth": {"basic": {"username": lab.couch.user, "password": lab.couch.password}} }),
            json!({ "url": url(&pair.ours), "headers": {"authorization": format!("Basic {basic}")} }),
        ),
    ];
    let _spiegel = lab.spiegel().await;
    for (number, (source, target)) in forms.into_iter().enumerate() {
        let sides = json!({ "source": source, "target": target });
        replicator(&lab, &format!("form {number}"), &pair.source.db, &pair.ours, sides).await;
        pair.source.grow(10, 10).await;
        pair.same(&format!("form {number}")).await;
        lab.couch.remove(&lab.spiegel_db(), &format!("form {number}")).await;
    }
}

async fn names_that_need_encoding(lab: Arc<Lab>) {
    let names = ["so/ur+ce(1)", "the/irs+$(2)", "ou/rs+_-(3)"];
    let mut pair = Pair::named(lab.clone(), names).await;
    pair.source.grow(50, 0).await;
    pair.replicator(json!({})).await;
    let _spiegel = lab.spiegel().await;
    pair.same("with such names").await;
    pair.source.grow(10, 10).await;
    pair.same("again").await;
}

async fn filters_of_design_documents(lab: Arc<Lab>) {
    let pair = grown(&lab).await;
    let design = json!({
        "filters": {"below": "function (doc, req) { return doc.n < Number(req.query.below) || doc._deleted === true; }"},
        "views": {"even": {"map": "function (doc) { if (doc.kind === 'even') { emit(doc._id, null); } }"}},
    });
    lab.couch.put(&pair.source.db, "_design/f", design).await;
    let cases = [
        ("by function", json!({ "filter": "f/below", "query_params": {"below": "30"} })),
        ("by another parameter", json!({ "filter": "f/below", "query_params": {"below": "70"} })),
        ("by view", json!({ "filter": "_view", "query_params": {"view": "f/even"} })),
    ];
    let _spiegel = lab.spiegel().await;
    let couch = &lab.couch;
    for (number, (name, more)) in cases.into_iter().enumerate() {
        let (theirs, ours) = (lab.create(&format!("theirs{number}")).await, lab.create(&format!("ours{number}")).await);
        replicator(&lab, name, &pair.source.db, &ours, more.clone()).await;
        reference(&lab, &pair.source.db, &theirs, more).await;
        let (theirs, ours) = (Place { couch, db: &theirs }, Place { couch, db: &ours });
        same_leaves(theirs, ours, name).await;
        assert_same(theirs, &[ours], name).await;
        assert!(!leaf_sets(ours).await.is_empty(), "{name}");
    }
}
