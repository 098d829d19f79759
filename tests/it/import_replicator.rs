//! `spiegel import-replicator`: continuous jobs become replicators and replicators jobs; none is lost and none is there twice.

use crate::support::couch::encode;
use crate::support::process::command;
use crate::support::{Lab, SOON, eventually, tests_on};
use reqwest::Method;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

tests_on! {
    every: [
        without_apply_nothing_is_changed,
        continuous_jobs_become_replicators_that_run,
        no_job_gains_rights,
        replicators_become_jobs_again,
        what_was_begun_is_finished_and_what_differs_is_left,
        a_missing_database_is_said,
        killed_at_any_point_nothing_is_lost,
        a_job_that_is_written_meanwhile_is_carried_as_it_was_written_last,
    ],
    embedded: [more_jobs_than_a_page],
    couchdb: [couchdb_takes_over_and_hands_back],
}

const PASSWORD: &str = "pa55-in-the-job";

async fn jobs_db(lab: &Lab) -> String {
    lab.install().await;
    lab.create("jobs").await
}

fn job(source: &str) -> Value {
    json!({ "_id": source, "source": format!("http://u:{PASSWORD}@h/{source}"), "target": "http://h/all", "continuous": true })
}

async fn import(lab: &Lab, more: &[&str]) -> (i32, String) {
    let jobs = lab.name("jobs");
    let arguments: Vec<&str> = ["import-replicator", "--replicator-db", &jobs].into_iter().chain(more.iter().copied()).collect();
    let output = lab.run(&arguments).await;
    assert!(!output.text.contains(PASSWORD), "{}", output.text);
    assert!(!output.text.contains(&lab.couch.password) || lab.couch.password.len() < 5, "{}", output.text);
    (output.code, output.text)
}

async fn ids(lab: &Lab, db: &str) -> BTreeSet<String> {
    lab.couch.all(db).await.into_keys().filter(|id| !id.starts_with("_design/") && !id.starts_with("global_")).collect()
}

async fn without_apply_nothing_is_changed(lab: Arc<Lab>) {
    let jobs = jobs_db(&lab).await;
    let once = json!({ "_id": "once", "source": "http://h/a", "target": "http://h/b" });
    let users = json!({ "user_ctx": { "name": "bob", "roles": [] } });
    let mut of_bob = job("of_bob");
    of_bob.as_object_mut().unwrap().extend(users.as_object().unwrap().clone());
    lab.couch.bulk(&jobs, vec![job("a"), job("b"), once, of_bob]).await;
    let (before, spiegel) = (lab.couch.all(&jobs).await, lab.couch.all(&lab.spiegel_db()).await);
    let (code, text) = import(&lab, &[]).await;
    assert_eq!(code, 1, "one is left that a person must look at: {text}");
    for said in [
        "id",
        "http://u:[redacted]@h/a",
        "carry",
        "has a password in it",
        "user_ctx",
        "jobs: 2 to carry as replicators, 1 left",
        "1 not looked at: it is not continuous",
        "--apply does it",
    ] {
        assert!(text.contains(said), "{said}: {text}");
    }
    assert_eq!((lab.couch.all(&jobs).await, lab.couch.all(&lab.spiegel_db()).await), (before, spiegel));
}

async fn continuous_jobs_become_replicators_that_run(lab: Arc<Lab>) {
    let jobs = jobs_db(&lab).await;
    let (source, target) = (lab.create("source").await, lab.create("target").await);
    lab.couch.put(&source, "x", json!({})).await;
    let url = |db: &str| format!("{}/{}", lab.couch.url(), encode(db));
    let job = json!({
        "_id": "copy", "source": url(&source), "target": url(&target), "continuous": true, "owner": "admin", "worker_batch_size": 50,
    });
    let once = json!({ "_id": "once", "source": "http://h/a", "target": "http://h/b" });
    lab.couch.bulk(&jobs, vec![job, once]).await;
    let (code, text) = import(&lab, &["--apply"]).await;
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("jobs: 1 carried as replicators, 0 left"), "{text}");
    assert_eq!(ids(&lab, &jobs).await, BTreeSet::from(["once".to_string()]));
    let mut written = lab.couch.get(&lab.spiegel_db(), "copy").await.unwrap();
    written.as_object_mut().unwrap().remove("_rev");
    let expected = json!({
        "_id": "copy", "type": "replicator", "source": url(&source), "target": url(&target), "worker_batch_size": 50,
    });
    assert_eq!(written, expected);
    let (code, text) = import(&lab, &["--apply"]).await;
    assert!(code == 0 && text.contains("jobs: 0 carried as replicators, 0 left"), "{text}");
    let _spiegel = lab.spiegel().await;
    eventually(SOON * 2, "it runs at once", async || lab.couch.get(&target, "x").await).await;
}

/// Whoever could write a job need not be who may read the passwords file.
async fn no_job_gains_rights(lab: Arc<Lab>) {
    let jobs = jobs_db(&lab).await;
    let private = lab.create("private").await;
    let to_all = |id: &str, source: &str| json!({ "_id": id, "source": source, "target": "http://h/all", "continuous": true });
    let by_user = lab.couch.url_for_user(&private);
    let guessed = by_user.replace('@', ":guessed@");
    let docs = vec![to_all("by_name", &private), to_all("by_user", &by_user), to_all("guessed", &guessed)];
    lab.couch.bulk(&jobs, docs).await;
    let (code, text) = import(&lab, &["--apply"]).await;
    assert!(code == 1 && text.contains("jobs: 0 carried as replicators, 3 left"), "{text}");
    assert!(text.contains("by a name alone") && text.contains("the passwords file"), "{text}");
    assert!(ids(&lab, &lab.spiegel_db()).await.is_empty());
}

async fn replicators_become_jobs_again(lab: Arc<Lab>) {
    let jobs = jobs_db(&lab).await;
    lab.replicator("by_vault", "a", "b", json!({ "dirty": false, "priority": 3 })).await;
    lab.spiegel_doc("plain", json!({ "type": "replicator", "source": "http://h/a", "target": "http://h/b", "filter": "d/f" }))
        .await;
    lab.spiegel_doc("rule", json!({ "type": "on_change", "db_name": "^a$", "url": "http://h/x" })).await;
    let (code, text) = import(&lab, &["--back", "--apply"]).await;
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("--with-passwords"), "{text}");
    assert_eq!(ids(&lab, &jobs).await, BTreeSet::from(["plain".to_string()]));
    assert_eq!(ids(&lab, &lab.spiegel_db()).await, BTreeSet::from(["by_vault".to_string(), "rule".to_string()]));
    let (code, text) = import(&lab, &["--back", "--apply", "--with-passwords"]).await;
    assert_eq!(code, 0, "{text}");
    assert_eq!(ids(&lab, &lab.spiegel_db()).await, BTreeSet::from(["rule".to_string()]));
    let plain = lab.couch.get(&jobs, "plain").await.unwrap();
    assert_eq!((&plain["continuous"], &plain["filter"], &plain["type"]), (&json!(true), &json!("d/f"), &Value::Null));
    let job = lab.couch.get(&jobs, "by_vault").await.unwrap();
    let auth = json!({ "basic": { "username": lab.couch.user, "password": lab.couch.password } });
    assert_eq!(
        job["source"],
        json!({ "url": lab.couch.url_for_user("a").replace(&format!("{}@", lab.couch.user), ""), "auth": auth })
    );
    assert!(job["priority"].is_null() && job["dirty"].is_null(), "{job}");
}

async fn what_was_begun_is_finished_and_what_differs_is_left(lab: Arc<Lab>) {
    let jobs = jobs_db(&lab).await;
    lab.couch.bulk(&jobs, vec![job("begun"), job("differs"), job("rule")]).await;
    let mut edited = job("edited");
    edited["filter"] = json!("d/f");
    lab.couch.bulk(&jobs, vec![edited]).await;
    let replicator = |source: &str, target: &str| json!({ "type": "replicator", "source": format!("http://u:{PASSWORD}@h/{source}"), "target": target, "dirty": false, "retries": 2 });
    lab.spiegel_doc("begun", replicator("begun", "http://h/all")).await;
    lab.spiegel_doc("edited", replicator("edited", "http://h/all")).await;
    lab.spiegel_doc("differs", replicator("differs", "http://h/other")).await;
    lab.spiegel_doc("rule", json!({ "type": "on_change", "db_name": "^a$", "url": "http://h/x" })).await;
    let before = lab.couch.all(&lab.spiegel_db()).await;
    let (code, text) = import(&lab, &["--apply"]).await;
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("the other side has it already") && text.contains("has another document with this _id"), "{text}");
    assert!(text.contains("asks for something else: delete the one that is not wanted"), "{text}");
    assert_eq!(ids(&lab, &jobs).await, ["differs", "edited", "rule"].map(String::from).into());
    assert_eq!(lab.couch.all(&lab.spiegel_db()).await, before, "what was there stays as it was");
}

async fn a_missing_database_is_said(lab: Arc<Lab>) {
    let (code, text) = import(&lab, &[]).await;
    assert!(code == 78 && text.contains("install"), "{code} {text}");
    lab.install().await;
    let (code, text) = import(&lab, &[]).await;
    assert!(code == 1 && text.contains("there is no database"), "{code} {text}");
}

async fn killed_at_any_point_nothing_is_lost(lab: Arc<Lab>) {
    let jobs = jobs_db(&lab).await;
    let all: BTreeSet<String> = (0..600).map(|number| format!("j{number:04}")).collect();
    lab.couch.bulk(&jobs, all.iter().map(|id| job(id)).collect()).await;
    let mut begun = 0;
    for wait_ms in (0u64..).map(|round| 20 + round * 12) {
        let mut child = command(&lab.settings());
        let mut child = child.args(["import-replicator", "--apply", "--replicator-db", &jobs]).spawn().expect("it starts");
        tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        let ended = child.try_wait().expect("its state").is_some();
        let _ = child.kill();
        child.wait().expect("its end");
        let (there, here) = (ids(&lab, &jobs).await, ids(&lab, &lab.spiegel_db()).await);
        assert_eq!(there.union(&here).cloned().collect::<BTreeSet<_>>(), all, "after {wait_ms} ms");
        begun += usize::from(!there.is_empty() && !here.is_empty());
        if ended && there.is_empty() {
            break;
        }
        assert!(wait_ms < 20_000, "it never ends");
    }
    println!("{begun} kills came in the middle");
    assert_eq!(ids(&lab, &lab.spiegel_db()).await, all);
    let (code, text) = import(&lab, &[]).await;
    assert!(code == 0 && text.contains("0 to carry"), "{text}");
}

async fn a_job_that_is_written_meanwhile_is_carried_as_it_was_written_last(lab: Arc<Lab>) {
    let jobs = jobs_db(&lab).await;
    let all: Vec<String> = (0..300).map(|number| format!("j{number:04}")).collect();
    lab.couch.bulk(&jobs, all.iter().map(|id| job(id)).collect()).await;
    let (couch, db, names) = (lab.couch.clone(), jobs.clone(), all.clone());
    let writer = tokio::spawn(async move {
        let mut last: BTreeMap<String, u64> = BTreeMap::new();
        for n in 1u64.. {
            let mut gone = 0;
            for id in names.iter().skip((n % 7) as usize).step_by(7) {
                let Some(mut doc) = couch.get(&db, id).await else {
                    gone += 1;
                    continue;
                };
                doc["worker_batch_size"] = json!(n);
                let (status, _) = couch.ask(Method::PUT, &format!("{}/{}", encode(&db), encode(id)), Some(doc)).await;
                if status.is_success() {
                    last.insert(id.clone(), n);
                }
            }
            if gone > 40 {
                break;
            }
        }
        last
    });
    let written = async || lab.couch.changes(&jobs, "since=0").await["results"].to_string().contains("\"2-").then_some(());
    eventually(SOON, "the writer writes", written).await;
    eventually(SOON * 3, "all are carried", async || (import(&lab, &["--apply"]).await.0 == 0).then_some(())).await;
    let last = tokio::time::timeout(SOON, writer).await.expect("it sees that they are gone").expect("no panic");
    assert!(!last.is_empty());
    assert!(ids(&lab, &jobs).await.is_empty());
    for id in &all {
        let doc = lab.couch.get(&lab.spiegel_db(), id).await.expect("carried");
        let expected = last.get(id).map_or(Value::Null, |n| json!(n));
        assert_eq!(doc["worker_batch_size"], expected, "{id}");
    }
}

async fn more_jobs_than_a_page(lab: Arc<Lab>) {
    let jobs = jobs_db(&lab).await;
    let docs: Vec<Value> = (0..2345).map(|number| job(&format!("j{number}"))).collect();
    lab.couch.bulk(&jobs, docs).await;
    let (code, text) = import(&lab, &["--apply"]).await;
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("jobs: 2345 carried") && text.contains("100 of 2345 are shown"), "{text}");
    assert_eq!(ids(&lab, &lab.spiegel_db()).await.len(), 2345);
    let (code, text) = import(&lab, &["--back", "--apply", "--limit", "0"]).await;
    assert!(code == 0 && text.lines().count() > 2345, "{code}");
    assert_eq!((ids(&lab, &jobs).await.len(), ids(&lab, &lab.spiegel_db()).await.len()), (2345, 0));
}

/// A database of this name is one of CouchDB's own: it runs the jobs in it.
async fn couchdb_takes_over_and_hands_back(lab: Arc<Lab>) {
    lab.install().await;
    let jobs = lab.create("own/_replicator").await;
    let (source, target) = (lab.create("source").await, lab.create("target").await);
    let url = |db: &str| format!("{}/{}", lab.couch.url(), encode(db));
    lab.couch.put(&jobs, "copy", json!({ "source": url(&source), "target": url(&target), "continuous": true })).await;
    let arrives = async |id: &str| {
        lab.couch.put(&source, id, json!({})).await;
        eventually(SOON * 3, format!("{id} in the target"), async || lab.couch.get(&target, id).await).await;
    };
    arrives("by CouchDB").await;
    let output = lab.run(&["import-replicator", "--apply", "--replicator-db", &jobs]).await;
    assert_eq!(output.code, 0, "{}", output.text);
    let mut spiegel = lab.spiegel().await;
    arrives("by Spiegel").await;
    spiegel.stop().await;
    let output = lab.run(&["import-replicator", "--back", "--apply", "--replicator-db", &jobs]).await;
    assert_eq!(output.code, 0, "{}", output.text);
    arrives("by CouchDB again").await;
}
