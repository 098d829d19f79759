//! What a replicator is doing can be seen, in the words of CouchDB's `_scheduler/docs`.

use crate::support::process::one_shot;
use crate::support::{Lab, SOON, Spiegel, eventually, stays, tests_on};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;

tests_on! {
    every: [a_replicator_crashes_and_then_completes, what_the_engine_cannot_do_fails_until_it_is_changed],
}

async fn replicators(spiegel: &Spiegel) -> Value {
    let (status, page) = spiegel.page("/status").await.expect("an answer");
    assert_eq!(status, 200, "{page}");
    serde_json::from_str::<Value>(&page).expect("JSON")["replicators"].clone()
}

async fn doc(spiegel: &Spiegel, id: &str) -> Option<Value> {
    replicators(spiegel).await["docs"].as_array()?.iter().find(|doc| doc["doc_id"] == id).cloned()
}

/// What `spiegel status` prints of this process.
async fn printed(lab: &Lab, spiegel: &Spiegel, more: &[&str]) -> String {
    let log = spiegel.log();
    let address = log.iter().find_map(|line| line.to_string().contains("admin listens").then(|| line["address"].clone()));
    let address = address.and_then(|address| Some(address.as_str()?.to_string())).expect("it listens");
    let output = one_shot(&lab.settings_with(&[("ADMIN_LISTEN", &address)]), &[&["status"], more].concat()).await;
    assert_eq!(output.code, 0, "{}", output.text);
    output.text
}

async fn a_replicator_crashes_and_then_completes(lab: Arc<Lab>) {
    lab.install().await;
    let (source, target) = (lab.create("source").await, lab.name("target"));
    lab.couch.fill(&source, "d", 5).await;
    lab.replicator("copy", &source, &target, json!({})).await;
    lab.spiegel_doc("odd", json!({ "type": "replicator", "source": source })).await;
    let spiegel = lab.spiegel().await;

    let state_is = async |id: &str, state: &str| doc(&spiegel, id).await.filter(|doc| doc["state"] == state);
    let crashing = eventually(SOON, "it fails", || state_is("copy", "crashing")).await;
    assert!(crashing["error_count"].as_u64() >= Some(1), "{crashing}");
    let crashing = eventually(SOON, "it says why and when", async || {
        state_is("copy", "crashing").await.filter(|doc| doc["info"]["error"].is_string() && doc["next_try"].is_string())
    })
    .await;
    assert!(crashing["info"]["error"].as_str().is_some_and(|error| error.contains("missing")), "{crashing}");
    assert!(crashing["target"].as_str().is_some_and(|url| url.ends_with(&target)), "{crashing}");
    let failed = eventually(SOON, "the other cannot run", || state_is("odd", "failed")).await;
    assert_eq!(failed["info"], json!({ "error": "target is missing" }));
    let table = printed(&lab, &spiegel, &[]).await;
    assert!(table.contains("odd") && table.contains("target is missing") && table.contains("1 failed"), "{table}");

    lab.couch.create(&target).await;
    eventually(SOON, "all are there", async || (lab.couch.all(&target).await.len() == 5).then_some(())).await;
    let completed = eventually(SOON, "the statistics of a run that wrote", async || {
        let doc = state_is("copy", "completed").await?;
        if doc["info"]["docs_written"].as_u64() >= Some(1) {
            return Some(doc);
        }
        // The target's own making sets off one more run, which finds nothing.
        lab.couch.put(&source, &format!("more{}", fastrand::u64(..)), json!({})).await;
        None
    })
    .await;
    assert_eq!((&completed["error_count"], &completed["next_try"]), (&json!(0), &Value::Null), "{completed}");
    let info = &completed["info"];
    assert!(info["docs_read"].as_u64() >= Some(1) && info["revisions_checked"].as_u64() >= Some(1), "{info}");
    assert!(info["duration_ms"].is_u64() && info["error"].is_null(), "{info}");
    assert!(completed["start_time"].is_string(), "{completed}");

    eventually(SOON, "the states are counted", async || (spiegel.metric("replicators").await == 2.0).then_some(())).await;
    assert!(spiegel.metric("replication_docs_written").await >= 5.0);
    let states = replicators(&spiegel).await["states"].clone();
    assert_eq!((&states["failed"], &states["crashing"]), (&json!(1), &json!(0)), "{states}");
    assert!(!printed(&lab, &spiegel, &[]).await.lines().any(|line| line.starts_with("copy ")));
    let table = printed(&lab, &spiegel, &["--all"]).await;
    assert!(table.lines().any(|line| line.starts_with("copy ") && line.contains("written")), "{table}");
}

async fn what_the_engine_cannot_do_fails_until_it_is_changed(lab: Arc<Lab>) {
    lab.install().await;
    let (source, target) = (lab.create("source").await, lab.create("target").await);
    lab.couch.fill(&source, "d", 5).await;
    let mut spiegel = lab.spiegel().await;
    lab.replicator("copy", &source, &target, json!({ "engine": "native", "proxy": "http://proxy:3128" })).await;
    for restarted in [false, true] {
        if restarted {
            spiegel.restart().await;
        }
        let failed =
            eventually(SOON, "it fails", async || doc(&spiegel, "copy").await.filter(|doc| doc["state"] == "failed")).await;
        assert_eq!(failed["info"]["error"], "`proxy` needs CouchDB's own replicator");
        assert_eq!((&failed["error_count"], &failed["next_try"]), (&json!(0), &Value::Null), "{failed}");
        // What is owed is in the document, and nothing tries again.
        for more in 0..3 {
            lab.couch.put(&source, &format!("more{restarted}{more}"), json!({})).await;
        }
        let still = async || doc(&spiegel, "copy").await.is_some_and(|doc| doc["state"] == "failed");
        stays(Duration::from_secs(1), "it stays so", still).await;
        // A document that does not say `false` is owed a run.
        assert_ne!(lab.couch.get(&lab.spiegel_db(), "copy").await.expect("it is there")["dirty"], json!(false));
    }
    let told = spiegel.log().iter().filter(|line| line["level"] == "ERROR" && line.to_string().contains("proxy")).count();
    assert_eq!(told, 2, "once for each start");
    let mut doc = lab.couch.get(&lab.spiegel_db(), "copy").await.expect("it is there");
    doc.as_object_mut().expect("an object").shift_remove("proxy");
    lab.couch.put(&lab.spiegel_db(), "copy", doc).await;
    eventually(SOON, "all are there", async || (lab.couch.all(&target).await.len() == 11).then_some(())).await;
}
