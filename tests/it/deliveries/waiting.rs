//! Rules that wait for what failed, and go on only where somebody said for how long they may.

use super::*;

/// The rule's `failing` entries, as its database's `change_listener` has them.
async fn waits_for(lab: &Lab, db: &str, rule: &str) -> Vec<Value> {
    let doc = lab.couch.get(&lab.spiegel_db(), &format!("spiegel_cl_{db}")).await.unwrap_or_default();
    doc["failing"][rule].as_array().cloned().unwrap_or_default()
}

pub(super) async fn a_rule_that_waits_goes_on_where_somebody_said_so(lab: Arc<Lab>) {
    lab.install().await;
    let bad = Arc::new(AtomicBool::new(true));
    lab.receiver.answer("/", failing_with(&bad));
    // Rule, what it says, and why its failed change is given up; each has a database of its own.
    let rules = [
        ("ordered", json!({ "order": "database", "give_up_after": "1s" }), Some("given up after 1s")),
        ("blocking", json!({ "block": true, "retry": { "give_up_after": "1s" } }), Some("given up after 1s")),
        ("holding", json!({ "on_failure": "hold", "give_up_after": "1s" }), Some("given up after 1s")),
        ("limited", json!({ "order": "database", "retry": { "limit": 2 } }), Some("given up after 2 retries")),
        ("refused", json!({ "order": "database", "retry_on": [409] }), Some("trying again cannot help")),
        ("strict", json!({ "order": "database" }), None),
    ];
    for (rule, fields, _) in &rules {
        let db = lab.create(rule).await;
        lab.rule(rule, &db, &format!("/{rule}"), fields.clone()).await;
    }
    let mut settings = QUICK.to_vec();
    settings.push(("WEBHOOK_BREAKER_THRESHOLD", "0"));
    let mut spiegel = lab.spiegel_with(&settings).await;
    for (rule, ..) in &rules {
        write(&lab, &lab.name(rule), &["a", "b", "c"]).await;
    }
    let known = async || waits_for(&lab, &lab.name("strict"), "strict").await.first().cloned();
    let first = eventually(SOON, "it says for what the rule waits", known).await;
    assert_eq!(first["id"], "b");
    spiegel.kill();
    spiegel.start_again().await;
    for (rule, _, reason) in &rules {
        let Some(reason) = reason else { continue };
        lab.delivered_all(&format!("/{rule}"), &["a", "c"]).await;
        let doc = lab.one_delivery("what was given up is listed", |doc| doc["rule"] == *rule).await;
        assert_eq!((&doc["state"], &doc["doc_id"], &doc["reason"]), (&json!("dead"), &json!("b"), &json!(reason)), "{rule}");
        eventually(SOON, "the rule waits no more", async || {
            waits_for(&lab, &lab.name(rule), rule).await.is_empty().then_some(())
        })
        .await;
        write(&lab, &lab.name(rule), &["d"]).await;
        lab.delivered_all(&format!("/{rule}"), &["d"]).await;
    }
    let still = waits_for(&lab, &lab.name("strict"), "strict").await;
    assert_eq!(still[0]["since"], first["since"], "the clock goes on through a kill");
    assert!(lab.deliveries().await.iter().all(|doc| doc["rule"] != "strict"), "nobody said how long");
    bad.store(false, Ordering::Relaxed);
    lab.delivered_all("/strict", &["a", "b", "c"]).await;
    eventually(SOON, "nothing is left of it", async || {
        waits_for(&lab, &lab.name("strict"), "strict").await.is_empty().then_some(())
    })
    .await;
}

/// `b` fails everywhere: with a 422 at `/refused`, with a 500 elsewhere.
fn failing_with(bad: &Arc<AtomicBool>) -> Answer {
    let bad = bad.clone();
    Answer::work(move |request| {
        let fails = bad.load(Ordering::Relaxed) && request.doc_id() == "b";
        let status = if request.path == "/refused" { 422 } else { 500 };
        async move { if fails { status } else { 200 } }
    })
}

pub(super) async fn a_rule_that_waits_gives_up_one_by_one(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("source").await;
    let fails = Arc::new(AtomicBool::new(true));
    lab.receiver.answer("/hook", failing(422, &fails, &["b0", "b1", "b2"]));
    lab.rule("rule", &db, "/hook", json!({ "order": "database", "retry": { "limit": 1 } })).await;
    let _spiegel = lab.spiegel_with(&QUICK).await;
    write(&lab, &db, &["a", "b0", "c", "b1", "b2", "d"]).await;
    lab.delivered_all("/hook", &["a", "c", "d"]).await;
    eventually(SOON, "each is listed", async || {
        let docs = lab.deliveries().await;
        let dead: BTreeSet<&str> =
            docs.iter().filter(|doc| doc["state"] == "dead").filter_map(|doc| doc["doc_id"].as_str()).collect();
        (dead == BTreeSet::from(["b0", "b1", "b2"])).then_some(())
    })
    .await;
    for doc in ["b0", "b1", "b2"] {
        assert_eq!(requests_for(&lab, "/hook", doc).len(), 2, "{doc}: once, and again");
    }
}
