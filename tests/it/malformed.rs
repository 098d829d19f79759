//! Documents of the spiegel database with the wrong types everywhere: said once, and passed over.

use crate::support::{Lab, SOON, Spiegel, eventually, tests_on};
use serde_json::{Value, json};
use std::sync::Arc;

tests_on! {
    every: [
        a_malformed_document_is_named_once_and_stops_nothing,
        a_mended_document_works,
        a_rule_that_is_invalid_for_a_while_misses_nothing,
        odd_positions_count_as_none,
        odd_documents_of_no_known_type_are_left_alone,
    ],
}

/// Each of these cannot be used, and must be named.
fn unusable(db: &str) -> Vec<Value> {
    let rule = |more: Value| {
        let mut doc = json!({ "type": "on_change", "db_name": format!("^{db}$"), "url": "http://127.0.0.1:1/never" });
        doc.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        doc
    };
    let replicator = |source: Value, target: Value| json!({ "type": "replicator", "source": source, "target": target });
    vec![
        rule(json!({ "db_name": 7 })),
        rule(json!({ "db_name": null })),
        rule(json!({ "db_name": ["x"] })),
        rule(json!({ "db_name": "(" })),
        rule(json!({ "url": 7 })),
        rule(json!({ "url": {} })),
        rule(json!({ "url": "not a url" })),
        rule(json!({ "url": "ftp://h/x" })),
        rule(json!({ "params": "x" })),
        rule(json!({ "params": [1] })),
        rule(json!({ "method": 7 })),
        rule(json!({ "method": "NO SUCH" })),
        rule(json!({ "if": 7 })),
        rule(json!({ "if": { "a": { "b": 1 } } })),
        rule(json!({ "if": { "a": "(" } })),
        json!({ "type": "on_change" }),
        replicator(json!(7), json!("http://h/x")),
        replicator(json!({}), json!("http://h/x")),
        replicator(json!({ "url": 7 }), json!("http://h/x")),
        replicator(json!("http://h/x"), json!([])),
        replicator(json!("http://h/x"), Value::Null),
        json!({ "type": "replicator" }),
    ]
}

/// Odd, and perhaps usable all the same.
fn odd(db: &str) -> Vec<Value> {
    let mut docs: Vec<Value> = [
        json!({ "debounce": "yes" }),
        json!({ "block": [] }),
        json!({ "params": { "deep": [[[{}]]] } }),
        json!({ "if": {} }),
        json!({ "since": { "a": 1 } }),
        json!({ "selector": 7 }),
        json!({ "deleted": "perhaps" }),
        json!({ "db_name": "(a+)+$(?=b)" }),
    ]
    .into_iter()
    .map(|more| {
        let mut doc = json!({ "type": "on_change", "db_name": format!("^{db}nobody$"), "url": "http://127.0.0.1:1/x" });
        doc.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        doc
    })
    .collect();
    for more in [
        json!({ "dirty": "maybe" }),
        json!({ "dirty": false, "dirty_at": {} }),
        json!({ "dirty": false, "locked_at": [] }),
        json!({ "dirty": false, "retries": "many" }),
        json!({ "dirty": false, "retries": -5 }),
        json!({ "dirty_after_milliseconds": "soon" }),
        json!({ "dirty_after_milliseconds": 1e300 }),
        json!({ "dirty_at": "9999-99-99" }),
        json!({ "source": { "url": format!("http://127.0.0.1:1/{db}"), "headers": 7 } }),
    ] {
        let mut doc =
            json!({ "type": "replicator", "source": format!("http://127.0.0.1:1/{db}x"), "target": "http://127.0.0.1:1/y" });
        doc.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        docs.push(doc);
    }
    docs
}

async fn delivered(lab: &Lab, count: usize) {
    let reached = async || (lab.receiver.delivered("/hook").len() >= count).then_some(());
    eventually(SOON, format!("{count} documents delivered"), reached).await;
}

fn loud_lines(spiegel: &Spiegel, text: &str) -> Vec<String> {
    let lines = spiegel.log().into_iter().filter(|line| line["level"] != json!("INFO")).map(|line| line.to_string());
    lines.filter(|line| line.contains(text)).collect()
}

async fn a_malformed_document_is_named_once_and_stops_nothing(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    let bad = unusable(&db);
    // Half of them before the start, half while it runs.
    let before = bad.len() / 2;
    for (number, doc) in bad.iter().enumerate().take(before) {
        lab.spiegel_doc(&format!("bad{number:02}"), doc.clone()).await;
    }
    lab.rule("good", &db, "/hook", json!({})).await;
    let mut spiegel = lab.spiegel().await;
    for (number, doc) in bad.iter().enumerate().skip(before) {
        lab.spiegel_doc(&format!("bad{number:02}"), doc.clone()).await;
    }
    for (number, doc) in odd(&db).into_iter().enumerate() {
        lab.spiegel_doc(&format!("odd{number:02}"), doc).await;
    }
    lab.couch.fill(&db, "d", 5).await;
    delivered(&lab, 5).await;
    for (number, doc) in bad.iter().enumerate() {
        let id = format!("bad{number:02}");
        let named = async || (!loud_lines(&spiegel, &id).is_empty()).then_some(());
        eventually(SOON, format!("a line about {doc}"), named).await;
    }
    // Other changes of the spiegel database must not bring the same lines again.
    lab.rule("another", &db, "/another", json!({})).await;
    lab.couch.fill(&db, "e", 5).await;
    delivered(&lab, 10).await;
    for (number, doc) in bad.iter().enumerate() {
        let lines = loud_lines(&spiegel, &format!("bad{number:02}"));
        assert_eq!(lines.len(), 1, "{doc}: {lines:#?}");
    }
    assert!(spiegel.is_alive());
    assert!(spiegel.metric("invalid_documents").await >= bad.len() as f64);
    spiegel.restart().await;
    lab.couch.fill(&db, "f", 5).await;
    delivered(&lab, 15).await;
}

async fn a_mended_document_works(lab: Arc<Lab>) {
    lab.install().await;
    let (db, target) = (lab.create("posts").await, lab.create("target").await);
    lab.spiegel_doc("rule", json!({ "type": "on_change", "db_name": 7 })).await;
    lab.spiegel_doc("copy", json!({ "type": "replicator", "source": 7 })).await;
    let spiegel = lab.spiegel().await;
    spiegel.said(&["\"rule\""]).await;
    lab.couch.fill(&db, "d", 3).await;
    lab.rule("rule", &db, "/hook", json!({})).await;
    lab.replicator("copy", &db, &target, json!({})).await;
    lab.couch.put(&db, "last", json!({})).await;
    delivered(&lab, 1).await;
    eventually(SOON, "replicated", async || (lab.couch.all(&target).await.len() == 4).then_some(())).await;
    // And spoilt again: the old version must not go on.
    lab.spiegel_doc("rule", json!({ "type": "on_change", "db_name": 7 })).await;
    let spoilt = async || (loud_lines(&spiegel, "\"rule\"").len() >= 2).then_some(());
    eventually(SOON, "it is said again for the new revision", spoilt).await;
}

async fn a_rule_that_is_invalid_for_a_while_misses_nothing(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    lab.rule("good", &db, "/good", json!({})).await;
    let url = lab.receiver.url("/typo");
    lab.rule("typo", &db, "/typo", json!({})).await;
    let edit = async |url: &str| {
        let mut doc = lab.couch.get(&lab.spiegel_db(), "typo").await.expect("the rule");
        doc["url"] = json!(url);
        lab.couch.put(&lab.spiegel_db(), "typo", doc).await;
    };
    let all_had = async |path: &str, expected: &[&str]| {
        let had = async || expected.iter().all(|id| lab.receiver.delivered(path).contains_key(*id)).then_some(());
        eventually(SOON, format!("{path} has {expected:?}"), had).await;
    };
    let mut spiegel = lab.spiegel().await;
    lab.couch.put(&db, "a", json!({})).await;
    all_had("/good", &["a"]).await;
    all_had("/typo", &["a"]).await;
    // Once while the process lives, and once through a restart.
    for (written, is_restarted) in [("b", false), ("c", true)] {
        edit("not a url").await;
        let known = async || (spiegel.metric("invalid_documents").await == 1.0).then_some(());
        eventually(SOON, "it is known to be invalid", known).await;
        if is_restarted {
            spiegel.restart().await;
        }
        lab.couch.put(&db, written, json!({})).await;
        all_had("/good", &[written]).await;
        // A run that began before the edit may still go by the old rules, and no run of the new process does.
        assert!(!is_restarted || !lab.receiver.delivered("/typo").contains_key(written));
        edit(&url).await;
        all_had("/typo", &[written]).await;
    }
    assert!(lab.receiver.delivered("/good").values().chain(lab.receiver.delivered("/typo").values()).all(|count| *count == 1));
    let id = format!("spiegel_cl_{db}");
    let together = async || {
        let doc = lab.couch.get(&lab.spiegel_db(), &id).await?;
        (doc["ahead"].is_null() && doc["dirty"] == json!(false)).then_some(())
    };
    eventually(SOON, "they stand together again", together).await;
}

async fn odd_positions_count_as_none(lab: Arc<Lab>) {
    lab.install().await;
    let oddities = [json!({ "a": 1 }), json!([]), json!(true), json!(-7), json!("no such seq")];
    let mut dbs = Vec::new();
    for (number, odd) in oddities.iter().enumerate() {
        let db = lab.create(&format!("posts{number}")).await;
        lab.couch.fill(&db, "d", 3).await;
        lab.rule(&format!("rule{number}"), &db, &format!("/hook{number}"), json!({})).await;
        let position = json!({
            "type": "change_listener", "db_name": [db], "last_seq": odd, "ahead": 7, "dirty": "x", "dirty_at": {}, "locked_at": 5, "retries": [],
        });
        lab.spiegel_doc(&format!("spiegel_cl_{db}"), position).await;
        dbs.push(db);
    }
    lab.spiegel_doc("global_lastSeq", json!({ "type": "global", "value": { "x": [] } })).await;
    let mut spiegel = lab.spiegel().await;
    for (number, db) in dbs.iter().enumerate() {
        lab.couch.put(db, "new", json!({})).await;
        let path = format!("/hook{number}");
        let all = async || (lab.receiver.delivered(&path).len() == 4).then_some(());
        eventually(SOON, format!("all documents where the position was {}", oddities[number]), all).await;
    }
    assert!(spiegel.is_alive());
}

async fn odd_documents_of_no_known_type_are_left_alone(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    let docs = [
        json!({}),
        json!({ "type": null }),
        json!({ "type": 7 }),
        json!({ "type": ["on_change"] }),
        json!({ "type": "on_chang" }),
    ];
    let mut revs = Vec::new();
    for (number, doc) in docs.into_iter().enumerate() {
        revs.push(lab.spiegel_doc(&format!("stranger{number}"), doc).await);
    }
    lab.rule("good", &db, "/hook", json!({ "my_own": { "note": "kept" } })).await;
    let spiegel = lab.spiegel().await;
    lab.couch.fill(&db, "d", 3).await;
    delivered(&lab, 3).await;
    for (number, rev) in revs.iter().enumerate() {
        let id = format!("stranger{number}");
        assert_eq!(lab.couch.get(&lab.spiegel_db(), &id).await.unwrap()["_rev"], json!(rev));
    }
    assert_eq!(lab.couch.get(&lab.spiegel_db(), "good").await.unwrap()["my_own"]["note"], "kept");
    drop(spiegel);
}
