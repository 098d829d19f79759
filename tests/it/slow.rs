//! A receiver that takes its time holds its own rule and no other.

use crate::support::{Answer, Lab, SOON, eventually, tests_on};
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::sync::watch;

tests_on! {
    every: [
        a_slow_receiver_delays_no_other_rule_of_its_database,
        a_slow_receiver_of_a_whole_database_in_order_delays_no_other_rule,
        a_page_that_only_the_slow_rule_wants_delays_no_other_rule,
        slow_ones_do_not_wait_for_each_other,
        what_is_under_way_at_a_kill_comes_again,
    ],
}

/// The receivers are slow here, and never too slow.
const PATIENT: &[(&str, &str)] = &[("WEBHOOK_TIMEOUT", "60s")];

/// Requests at `/slow` wait for the gate.
fn behind_a_gate(lab: &Lab) -> watch::Sender<bool> {
    let (gate, is_open) = watch::channel(false);
    lab.receiver.answer(
        "/slow",
        Answer::work(move |_| {
            let mut is_open = is_open.clone();
            async move {
                let _ = is_open.wait_for(|is_open| *is_open).await;
                200
            }
        }),
    );
    gate
}

async fn quick_has(lab: &Lab, id: &str, rev: &str) {
    let came = |body: &Value| body["change"]["_id"] == id && body["change"]["_rev"] == rev;
    let arrived = async || lab.receiver.requests_at("/quick").iter().any(|request| came(&request.body)).then_some(());
    eventually(SOON, &format!("{id} at the quick receiver"), arrived).await;
}

fn ids_at(lab: &Lab, path: &str) -> Vec<String> {
    lab.receiver.requests_at(path).iter().map(|request| request.doc_id()).collect()
}

/// Writes while the slow receiver holds `first`, each seen by the quick one; then all must come to the slow one.
async fn others_go_on(lab: &Lab, more: Value) {
    lab.install().await;
    let db = lab.create("posts").await;
    lab.rule("slow", &db, "/slow", more).await;
    lab.rule("quick", &db, "/quick", json!({})).await;
    let gate = behind_a_gate(lab);
    let _spiegel = lab.spiegel_with(PATIENT).await;
    let rev = lab.couch.put(&db, "first", json!({ "n": 0 })).await;
    quick_has(lab, "first", &rev).await;
    eventually(SOON, "the slow one holds it", async || (lab.receiver.count("/slow") == 1).then_some(())).await;
    for id in ["a", "b", "c"] {
        let rev = lab.couch.put(&db, id, json!({})).await;
        quick_has(lab, id, &rev).await;
    }
    let rev = lab.couch.put(&db, "first", json!({ "n": 1 })).await;
    quick_has(lab, "first", &rev).await;
    assert_eq!(ids_at(lab, "/slow"), ["first"], "its rule is held where it stands");

    gate.send(true).unwrap();
    let all = async || (lab.receiver.delivered("/slow").len() >= 4 && lab.receiver.count("/slow") >= 5).then_some(());
    eventually(SOON, "all at the slow receiver", all).await;
    let slow = lab.receiver.requests_at("/slow");
    assert_eq!(slow.len(), 5, "none twice: {:?}", ids_at(lab, "/slow"));
    let of_first: Vec<_> = slow.iter().filter(|request| request.body["change"]["_id"] == "first").collect();
    assert!(of_first[0].answered.unwrap() <= of_first[1].arrived, "never two at once");
    assert_eq!(of_first[1].body["change"]["_rev"], rev.as_str());
    let rev = lab.couch.put(&db, "last", json!({})).await;
    quick_has(lab, "last", &rev).await;
    eventually(SOON, "both stand together again", async || (lab.receiver.count("/slow") == 6).then_some(())).await;
    assert_eq!(lab.receiver.count("/quick"), 6, "none twice: {:?}", ids_at(lab, "/quick"));
}

async fn a_slow_receiver_delays_no_other_rule_of_its_database(lab: Arc<Lab>) {
    others_go_on(&lab, json!({})).await;
}

async fn a_slow_receiver_of_a_whole_database_in_order_delays_no_other_rule(lab: Arc<Lab>) {
    others_go_on(&lab, json!({ "order": "database" })).await;
    // Which comes first is the shards' to say.
    let slow = lab.receiver.requests_at("/slow");
    assert!(slow.windows(2).all(|pair| pair[0].answered.unwrap() <= pair[1].arrived), "never two at once");
}

/// A database with a rule for each type of documents, which are told to the path of its name.
async fn rules_for_types(lab: &Lab, types: [&str; 2]) -> String {
    lab.install().await;
    let db = lab.create("posts").await;
    for name in types {
        lab.rule(name, &db, &format!("/{name}"), json!({ "if": { "type": format!("^{name}$") } })).await;
    }
    db
}

async fn a_page_that_only_the_slow_rule_wants_delays_no_other_rule(lab: Arc<Lab>) {
    let db = rules_for_types(&lab, ["slow", "quick"]).await;
    let gate = behind_a_gate(&lab);
    let _spiegel = lab.spiegel_with(PATIENT).await;
    for turn in ["a", "b"] {
        lab.couch.put(&db, &format!("slow_{turn}"), json!({ "type": "slow" })).await;
        eventually(SOON, "the slow one holds it", async || (lab.receiver.count("/slow") >= 1).then_some(())).await;
        let id = format!("quick_{turn}");
        let rev = lab.couch.put(&db, &id, json!({ "type": "quick" })).await;
        quick_has(&lab, &id, &rev).await;
    }
    gate.send(true).unwrap();
    let all = async || (lab.receiver.delivered("/slow").len() == 2).then_some(());
    eventually(SOON, "all at the slow receiver", all).await;
    assert_eq!((lab.receiver.count("/slow"), lab.receiver.count("/quick")), (2, 2), "none twice");
}

/// Two rules whose receivers both take their time: what comes for one is sent while the other is under way.
async fn slow_ones_do_not_wait_for_each_other(lab: Arc<Lab>) {
    let db = rules_for_types(&lab, ["slow", "other"]).await;
    let gate = behind_a_gate(&lab);
    lab.receiver.answer("/other", Answer::ok().after(std::time::Duration::from_millis(600)));
    let _spiegel = lab.spiegel_with(PATIENT).await;
    lab.couch.put(&db, "slow", json!({ "type": "slow" })).await;
    eventually(SOON, "the slow one holds it", async || (lab.receiver.count("/slow") >= 1).then_some(())).await;
    for turn in 1..4 {
        lab.couch.put(&db, &format!("other{turn}"), json!({ "type": "other" })).await;
        let came = async || (lab.receiver.delivered("/other").len() == turn).then_some(());
        eventually(SOON, "the other one's", came).await;
    }
    assert_eq!(lab.receiver.count("/slow"), 1);
    gate.send(true).unwrap();
    eventually(SOON, "the slow one's", async || (lab.receiver.delivered("/slow").len() == 1).then_some(())).await;
    assert_eq!((lab.receiver.count("/slow"), lab.receiver.count("/other")), (1, 3), "none twice");
}

async fn what_is_under_way_at_a_kill_comes_again(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    lab.rule("slow", &db, "/slow", json!({})).await;
    lab.rule("quick", &db, "/quick", json!({})).await;
    let gate = behind_a_gate(&lab);
    let mut spiegel = lab.spiegel_with(PATIENT).await;
    for id in ["a", "b", "c"] {
        let rev = lab.couch.put(&db, id, json!({})).await;
        quick_has(&lab, id, &rev).await;
    }
    let listener = format!("spiegel_cl_{db}");
    let is_held = async || lab.couch.get(&lab.spiegel_db(), &listener).await.filter(|doc| doc["dirty_at"].is_string());
    eventually(SOON, "the slow rule's place is written down", is_held).await;
    spiegel.kill();
    gate.send(true).unwrap();
    let arrived_before = lab.receiver.count("/slow");
    let _spiegel = lab.spiegel_with(PATIENT).await;
    let again = async || (lab.receiver.count("/slow") >= arrived_before + 3).then_some(());
    eventually(SOON, "all of them again at the slow receiver", again).await;
    let ids: std::collections::BTreeSet<String> = ids_at(&lab, "/slow").into_iter().skip(arrived_before).collect();
    assert_eq!(ids.into_iter().collect::<Vec<_>>(), ["a", "b", "c"]);
}
