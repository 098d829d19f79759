//! What Spiegel is for: a changed document calls the API, a changed database is replicated.

use crate::support::{Answer, Lab, OwnPort, Receiver, SOON, eventually, stays, tests_on};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

tests_on! {
    every: [
    a_changed_document_calls_the_api,
    each_method_carries_its_params,
    params_of_any_type_pass_through,
    a_url_takes_what_changed,
    any_name_of_a_database_works,
    a_changed_database_is_replicated,
    a_deletion_is_a_change_and_is_replicated,
    a_condition_picks_the_documents,
    equal_requests_coalesce_where_debounced,
    a_blocking_rule_waits_for_its_failure,
    deliveries_for_one_document_keep_their_order,
    a_dead_endpoint_stops_no_other_rule,
    a_failing_replicator_stops_no_other,
    a_rule_made_later_starts_at_the_position_of_the_database,
    a_clean_restart_repeats_nothing,
    a_database_that_is_written_without_pause_is_delivered,
],
}

async fn delivered(receiver: &Receiver, path: &str, count: usize) {
    let what = format!("{count} documents delivered at {path}");
    eventually(SOON * 2, what, async || (receiver.delivered(path).len() >= count).then_some(())).await;
}

async fn a_changed_document_calls_the_api(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    let other = lab.create("others").await;
    let params = json!({
        "change": "$change", "id": "$change.id", "rev": "$change.rev", "seq": "$seq", "db": "$db_name", "text": "as it is",
    });
    lab.rule("rule", &db, "/hook", json!({ "params": params })).await;
    let spiegel = lab.spiegel().await;
    lab.couch.put(&other, "not_mine", json!({})).await;
    let rev = lab.couch.put(&db, "post", json!({ "title": "x" })).await;
    delivered(&lab.receiver, "/hook", 1).await;

    let requests = lab.receiver.requests();
    assert_eq!(requests.len(), 1, "one change is one request: {requests:?}");
    let request = &requests[0];
    assert_eq!(request.method, "PUT");
    assert!(request.header("content-type").starts_with("application/json"), "{:?}", request.headers);
    assert!(!request.header("webhook-id").is_empty(), "{:?}", request.headers);
    let body = &request.body;
    assert_eq!((&body["id"], &body["rev"], &body["db"]), (&json!("post"), &json!(rev), &json!(db)));
    assert_eq!((&body["change"]["_id"], &body["change"]["_rev"]), (&json!("post"), &json!(rev)));
    assert!(body["change"]["title"] == "x" && !body["seq"].is_null(), "{body}");
    assert_eq!(body["text"], "as it is");
    drop(spiegel);
}

async fn each_method_carries_its_params(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    let params = json!({ "id": "$change.id", "db": "$db_name", "odd": "a b&c=ä" });
    for method in ["GET", "PUT", "POST", "DELETE"] {
        lab.rule(method, &db, &format!("/{method}"), json!({ "method": method, "params": params })).await;
    }
    let default =
        json!({ "type": "on_change", "db_name": format!("^{db}$"), "url": lab.receiver.url("/default?own=1"), "params": params });
    lab.spiegel_doc("default", default).await;
    let without =
        json!({ "type": "on_change", "db_name": format!("^{db}$"), "url": lab.receiver.url("/without"), "method": "POST" });
    lab.spiegel_doc("without", without).await;
    let _spiegel = lab.spiegel().await;
    lab.couch.put(&db, "x y/ä", json!({})).await;

    let wanted = json!({ "id": "x y/ä", "db": db, "odd": "a b&c=ä" });
    for (path, method, as_query) in [
        ("/GET", "GET", true),
        ("/DELETE", "DELETE", true),
        ("/default", "GET", true),
        ("/PUT", "PUT", false),
        ("/POST", "POST", false),
    ] {
        let requests = eventually(SOON, path, async || Some(lab.receiver.requests_at(path)).filter(|all| !all.is_empty())).await;
        assert_eq!(requests[0].method, method, "{path}");
        match as_query {
            true => {
                for (name, value) in wanted.as_object().unwrap() {
                    assert_eq!(requests[0].query.get(name).map(String::as_str), value.as_str(), "{path} {name}");
                }
            }
            false => assert_eq!(requests[0].body, wanted, "{path}"),
        }
    }
    let own = lab.receiver.requests_at("/default")[0].query.get("own").cloned();
    assert_eq!(own.as_deref(), Some("1"), "a query of the URL's own stays");
    eventually(SOON, "the rule without params", async || (lab.receiver.count("/without") > 0).then_some(())).await;
}

/// Node Spiegel loops on a value without `replace`.
async fn params_of_any_type_pass_through(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    let params = json!({
        "number": 7, "float": 1.5, "yes": true, "nothing": null, "list": [1, "$db_name"], "object": { "deep": { "n": 1 } }, "id": "$change.id",
    });
    lab.rule("put", &db, "/put", json!({ "params": params })).await;
    lab.rule("get", &db, "/get", json!({ "params": params, "method": "GET" })).await;
    let _spiegel = lab.spiegel().await;
    lab.couch.put(&db, "x", json!({})).await;
    delivered(&lab.receiver, "/put", 1).await;
    let body = &lab.receiver.requests_at("/put")[0].body;
    for (name, value) in
        [("number", json!(7)), ("float", json!(1.5)), ("yes", json!(true)), ("nothing", Value::Null), ("id", json!("x"))]
    {
        assert_eq!(body[name], value, "{name}");
    }
    assert_eq!(body["object"], json!({ "deep": { "n": 1 } }));
    eventually(SOON, "the query", async || (lab.receiver.count("/get") > 0).then_some(())).await;
    let query = &lab.receiver.requests_at("/get")[0].query;
    assert_eq!((query.get("number").map(String::as_str), query.get("yes").map(String::as_str)), (Some("7"), Some("true")));
}

async fn a_url_takes_what_changed(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    lab.rule("rule", &db, "/of/${db_name}/${change.id}", json!({ "method": "POST" })).await;
    let _spiegel = lab.spiegel().await;
    lab.couch.put(&db, "a/b?c", json!({})).await;
    let request = eventually(SOON, "a request", async || lab.receiver.requests().pop()).await;
    assert_eq!(request.path, format!("/of/{db}/a%2Fb%3Fc"), "what is put into a path is encoded");
}

async fn any_name_of_a_database_works(lab: Arc<Lab>) {
    lab.install().await;
    let target = lab.create("all/in+one").await;
    let names = ["a/b+c", "dollar$(x)", "user_09e05a1a-3de7-4ba3", "deep/er/still"];
    for name in names {
        let db = lab.create(name).await;
        lab.rule(&format!("rule {name}"), &db, "/hook", json!({})).await;
        lab.replicator(&format!("replicator {name}"), &db, &target, json!({})).await;
    }
    let _spiegel = lab.spiegel().await;
    for (number, name) in names.iter().enumerate() {
        lab.couch.put(&lab.name(name), &format!("doc {number}"), json!({ "from": name })).await;
    }
    delivered(&lab.receiver, "/hook", names.len()).await;
    let dbs: BTreeSet<String> =
        lab.receiver.requests_at("/hook").iter().map(|request| request.body["db"].as_str().unwrap().into()).collect();
    assert_eq!(dbs, names.iter().map(|name| lab.name(name)).collect::<BTreeSet<_>>());
    eventually(SOON * 2, "every document in the target", async || {
        (lab.couch.all(&target).await.len() == names.len()).then_some(())
    })
    .await;
}

async fn a_changed_database_is_replicated(lab: Arc<Lab>) {
    lab.install().await;
    let (source, target) = (lab.create("source").await, lab.create("target").await);
    lab.couch.fill(&source, "before", 30).await;
    lab.replicator("copy", &source, &target, json!({})).await;
    // CouchDB takes seconds for a run: what takes longer than this is written down.
    let _spiegel = lab.spiegel_with(&[("FEED_SPILL_AFTER", "1m")]).await;
    let same = async || (lab.couch.all(&source).await == lab.couch.all(&target).await).then_some(());
    eventually(SOON * 2, "a new replicator runs at once", same).await;
    lab.couch.fill(&source, "after", 30).await;
    lab.couch.put(&source, "before0", json!({ "again": true })).await;
    eventually(SOON * 2, "a change is replicated", same).await;
    assert_eq!(lab.couch.all(&target).await.len(), 60);

    let settled = async || {
        let doc = lab.couch.get(&lab.spiegel_db(), "copy").await.unwrap();
        (doc["dirty"] == json!(false) && doc["source"].as_str().unwrap().ends_with("source")).then_some(doc)
    };
    let doc = eventually(SOON, "a settled replicator", settled).await;
    let written: u32 = doc["_rev"].as_str().unwrap().split('-').next().unwrap().parse().unwrap();
    for round in 0..5 {
        lab.couch.put(&source, &format!("round{round}"), json!({})).await;
        eventually(SOON * 2, "a later change is replicated", same).await;
    }
    let doc = lab.couch.get(&lab.spiegel_db(), "copy").await.unwrap();
    let now: u32 = doc["_rev"].as_str().unwrap().split('-').next().unwrap().parse().unwrap();
    assert_eq!(now, written, "in steady state a change costs no write to the replicator's document: {doc}");
}

async fn a_deletion_is_a_change_and_is_replicated(lab: Arc<Lab>) {
    lab.install().await;
    let (source, target) = (lab.create("source").await, lab.create("target").await);
    lab.rule("rule", &source, "/hook", json!({})).await;
    lab.replicator("copy", &source, &target, json!({})).await;
    let _spiegel = lab.spiegel().await;
    lab.couch.put(&source, "x", json!({ "a": 1 })).await;
    eventually(SOON * 2, "the document in the target", async || lab.couch.get(&target, "x").await).await;
    delivered(&lab.receiver, "/hook", 1).await;
    lab.couch.remove(&source, "x").await;
    let deletion = async || lab.receiver.requests().into_iter().find(|request| request.body["change"]["_deleted"] == json!(true));
    let request = eventually(SOON, "the deletion delivered", deletion).await;
    assert_eq!(request.doc_id(), "x");
    eventually(SOON * 2, "the deletion replicated", async || lab.couch.all(&target).await.is_empty().then_some(())).await;
}

async fn a_condition_picks_the_documents(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    lab.rule("if", &db, "/if", json!({ "if": { "kind": "^(post|note)$", "author.name": "^a", "draft": null } })).await;
    lab.rule("all", &db, "/all", json!({})).await;
    let _spiegel = lab.spiegel().await;
    let docs = vec![
        json!({ "_id": "yes1", "kind": "post", "author": { "name": "anna" } }),
        json!({ "_id": "yes2", "kind": "note", "author": { "name": "adam" }, "draft": null }),
        json!({ "_id": "no_kind", "author": { "name": "anna" } }),
        json!({ "_id": "no_author", "kind": "post" }),
        json!({ "_id": "no_name", "kind": "post", "author": { "name": "bob" } }),
        json!({ "_id": "no_draft", "kind": "post", "author": { "name": "anna" }, "draft": true }),
        json!({ "_id": "no_undefined", "kind": "undefined" }),
    ];
    let count = docs.len();
    lab.couch.bulk(&db, docs).await;
    delivered(&lab.receiver, "/all", count).await;
    delivered(&lab.receiver, "/if", 2).await;
    let ids: Vec<String> = lab.receiver.delivered("/if").into_keys().collect();
    assert_eq!(ids, ["yes1", "yes2"]);
}

async fn equal_requests_coalesce_where_debounced(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    let params = json!({ "db": "$db_name" });
    lab.rule("rule", &db, "/stats", json!({ "debounce": true, "params": params })).await;
    lab.receiver.answer("/stats", Answer::ok().after(Duration::from_millis(300)));
    let _spiegel = lab.spiegel().await;
    for number in 0..40 {
        lab.couch.put(&db, &format!("d{number}"), json!({})).await;
    }
    let last_write = std::time::Instant::now();
    let after =
        async || lab.receiver.requests_at("/stats").iter().any(|r| r.answered.is_some() && r.arrived >= last_write).then_some(());
    eventually(SOON, "a request after the last write", after).await;
    let requests = lab.receiver.requests_at("/stats");
    assert!(requests.len() <= 20, "{} requests for 40 changes", requests.len());
    let overlap = requests.windows(2).any(|pair| pair[0].answered.is_none_or(|answered| answered > pair[1].arrived));
    assert!(!overlap, "while one is in flight the next one waits");
}

async fn a_blocking_rule_waits_for_its_failure(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    lab.rule("rule", &db, "/hook", json!({ "block": true })).await;
    lab.receiver.answer("/hook", Answer::status(503));
    let _spiegel = lab.spiegel().await;
    for number in 0..10 {
        lab.couch.put(&db, &format!("d{number}"), json!({})).await;
    }
    eventually(SOON, "some tries", async || (lab.receiver.count("/hook") >= 4).then_some(())).await;
    let tried: BTreeSet<String> = lab.receiver.requests().iter().map(|request| request.doc_id()).collect();
    assert_eq!(tried.len(), 1, "only the first change is tried: {tried:?}");
    lab.receiver.answer("/hook", Answer::ok());
    delivered(&lab.receiver, "/hook", 10).await;
    let good: Vec<_> = lab.receiver.requests().into_iter().filter(|request| request.status == 200).collect();
    let overlap = good.windows(2).any(|pair| pair[0].answered.unwrap() > pair[1].arrived);
    assert!(!overlap, "one after the other");
    let order: Vec<String> = good.iter().map(|request| request.doc_id()).collect();
    let changes = lab.couch.changes(&db, "since=0").await;
    let seqs: Vec<String> = changes["results"].as_array().unwrap().iter().map(|row| row["id"].as_str().unwrap().into()).collect();
    // A cluster's feed has no fixed order across shards; each test database's order is that of its feed at the time.
    if lab.kind != crate::support::Kind::CouchDb {
        assert_eq!(order, seqs);
    }
}

async fn deliveries_for_one_document_keep_their_order(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    lab.rule("rule", &db, "/hook", json!({})).await;
    lab.receiver.answer("/hook", Answer::ok().after(Duration::from_millis(20)));
    let _spiegel = lab.spiegel().await;
    let mut last = String::new();
    for round in 0..40 {
        last = lab.couch.put(&db, "same", json!({ "round": round })).await;
        lab.couch.put(&db, &format!("other{round}"), json!({})).await;
    }
    let last_rev = async || {
        lab.receiver.requests().iter().any(|r| r.body["change"]["_rev"] == json!(last) && r.answered.is_some()).then_some(())
    };
    eventually(SOON, "the last revision", last_rev).await;
    delivered(&lab.receiver, "/hook", 41).await;
    let same: Vec<_> = lab.receiver.requests().into_iter().filter(|request| request.doc_id() == "same").collect();
    let generation = |rev: &Value| rev.as_str().unwrap().split('-').next().unwrap().parse::<u32>().unwrap();
    let generations: Vec<u32> = same.iter().map(|request| generation(&request.body["change"]["_rev"])).collect();
    assert!(generations.windows(2).all(|pair| pair[0] <= pair[1]), "never backwards: {generations:?}");
    assert!(same.windows(2).all(|pair| pair[0].answered.unwrap() <= pair[1].arrived), "never two at once");
}

async fn a_dead_endpoint_stops_no_other_rule(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    lab.rule("dead", &db, "/dead", json!({})).await;
    lab.rule("good", &db, "/good", json!({})).await;
    let nobody = OwnPort::new();
    lab.rule("gone", &db, "/x", json!({ "url": format!("http://127.0.0.1:{}/x", nobody.number) })).await;
    lab.receiver.answer("/dead", Answer::status(500));
    let mut spiegel = lab.spiegel().await;
    let count = 120;
    lab.couch.fill(&db, "d", count).await;
    delivered(&lab.receiver, "/good", count).await;
    // The position that was reached ahead of the held rules is written down before the process ends in good order.
    for _ in 0..2 {
        spiegel.restart().await;
        eventually(SOON, "the dead one is tried again", async || (lab.receiver.count("/dead") > 0).then_some(())).await;
    }
    lab.couch.put(&db, "last", json!({})).await;
    delivered(&lab.receiver, "/good", count + 1).await;
    let batch = 50;
    let repeated = lab.receiver.requests_at("/good").len() - (count + 1);
    assert!(repeated <= batch, "{repeated} repeated for the good rule");

    lab.receiver.answer("/dead", Answer::ok());
    delivered(&lab.receiver, "/dead", count + 1).await;
}

async fn a_failing_replicator_stops_no_other(lab: Arc<Lab>) {
    lab.install().await;
    let (source, target) = (lab.create("source").await, lab.create("target").await);
    let missing = lab.name("missing");
    lab.replicator("good", &source, &target, json!({})).await;
    lab.replicator("no_target", &source, &missing, json!({})).await;
    lab.replicator("no_source", &missing, &target, json!({})).await;
    let _spiegel = lab.spiegel().await;
    lab.couch.fill(&source, "d", 20).await;
    let same = async |db: &str| (lab.couch.exists(db).await && lab.couch.all(db).await.len() == 20).then_some(());
    eventually(SOON * 2, "the good one", || same(&target)).await;
    let durable = async || {
        let doc = lab.couch.get(&lab.spiegel_db(), "no_target").await.unwrap();
        (doc["dirty"] == json!(false) && !doc["dirty_at"].is_null()).then_some(())
    };
    eventually(SOON, "the failing one backs off, and its document says so", durable).await;
    lab.couch.create(&missing).await;
    eventually(SOON * 2, "the target was made, and no new change was needed", || same(&missing)).await;
}

async fn a_rule_made_later_starts_at_the_position_of_the_database(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    lab.couch.fill(&db, "old", 10).await;
    lab.rule("first", &db, "/first", json!({})).await;
    let _spiegel = lab.spiegel().await;
    delivered(&lab.receiver, "/first", 10).await;
    let listener =
        async || lab.couch.get(&lab.spiegel_db(), &format!("spiegel_cl_{db}")).await.filter(|doc| !doc["last_seq"].is_null());
    eventually(SOON, "the database has a position", listener).await;
    lab.rule("second", &db, "/second", json!({})).await;
    eventually(SOON, "the new rule is in force", async || {
        lab.couch.put(&db, &format!("new{}", fastrand::u64(..)), json!({})).await;
        (lab.receiver.count("/second") > 0).then_some(())
    })
    .await;
    let ids: Vec<String> = lab.receiver.delivered("/second").into_keys().collect();
    assert!(ids.iter().all(|id| id.starts_with("new")), "{ids:?}");
    eventually(SOON, "the first rule has them all", async || {
        (lab.receiver.delivered("/first").len() == lab.couch.all(&db).await.len()).then_some(())
    })
    .await;
}

async fn a_clean_restart_repeats_nothing(lab: Arc<Lab>) {
    lab.install().await;
    let mut dbs = Vec::new();
    for number in 0..5 {
        dbs.push(lab.create(&format!("db{number}")).await);
    }
    lab.rule_on("rule", &lab.every_db(), "/hook", json!({})).await;
    let mut spiegel = lab.spiegel().await;
    for db in &dbs {
        lab.couch.fill(db, db, 10).await;
    }
    delivered(&lab.receiver, "/hook", 50).await;
    spiegel.stop().await;
    lab.couch.put(&dbs[0], "while away", json!({})).await;
    spiegel.start_again().await;
    delivered(&lab.receiver, "/hook", 51).await;
    stays(Duration::from_millis(500), "nothing twice", async || lab.receiver.count("/hook") == 51).await;
}

async fn a_database_that_is_written_without_pause_is_delivered(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("busy").await;
    lab.rule("rule", &db, "/hook", json!({})).await;
    let _spiegel = lab.spiegel().await;
    let (couch, name) = (lab.couch.clone(), db.clone());
    let writer = tokio::spawn(async move {
        for number in 0.. {
            couch.put(&name, &format!("d{number}"), json!({})).await;
        }
    });
    eventually(SOON, "deliveries while the writer writes", async || (lab.receiver.delivered("/hook").len() >= 100).then_some(()))
        .await;
    let position = async || {
        let doc = lab.couch.get(&lab.spiegel_db(), &format!("spiegel_cl_{db}")).await?;
        (!doc["last_seq"].is_null() && doc["last_seq"] != json!(0) && doc["last_seq"] != json!("0")).then_some(())
    };
    eventually(SOON, "a position is saved meanwhile", position).await;
    assert!(!writer.is_finished(), "the writer still wrote");
    writer.abort();
    let _ = writer.await;
    eventually(SOON, "every document", async || {
        (lab.receiver.delivered("/hook").len() == lab.couch.all(&db).await.len()).then_some(())
    })
    .await;
}
