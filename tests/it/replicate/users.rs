//! A weak user's replicator beside an admin's on the same databases: neither sees or writes with the other's rights.

use super::{CAUGHT_UP, replicator, same_leaves};
use crate::support::couch::encode;
use crate::support::{Couch, Lab, eventually, stays, tests_on};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

tests_on! {
    every: [],
    couchdb: [
        each_replicator_writes_with_its_own_rights,
        a_source_that_a_user_may_not_read_stays_unread,
        a_design_document_needs_an_admin,
    ],
}

const PASSWORD: &str = "of the weak";

/// A user of this test without any role.
async fn weak_user(lab: &Lab) -> Couch {
    let name = lab.name("weak");
    let user = json!({ "name": name, "password": PASSWORD, "roles": [], "type": "user" });
    lab.couch.put("_users", &format!("org.couchdb.user:{name}"), user).await;
    lab.add_password(&lab.couch.host(), &name, PASSWORD);
    Couch::new(&lab.couch.base, &name, PASSWORD)
}

async fn forget_user(lab: &Lab) {
    lab.couch.remove("_users", &format!("org.couchdb.user:{}", lab.name("weak"))).await;
}

async fn let_in(lab: &Lab, db: &str, user: &Couch) {
    let security = json!({ "admins": {"names": [], "roles": ["_admin"]}, "members": {"names": [user.user], "roles": []} });
    let (status, answer) = lab.couch.ask(Method::PUT, &format!("{}/_security", encode(db)), Some(security)).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
}

/// Takes a document only from the user that it names.
async fn take_only_from_its_user(lab: &Lab, db: &str) {
    let validate = "function (doc, old, user) { if (doc.only && doc.only !== user.name) { throw({forbidden: 'not yours'}); } }";
    lab.couch.put(db, "_design/rights", json!({ "validate_doc_update": validate })).await;
}

async fn ids(lab: &Lab, db: &str) -> BTreeSet<String> {
    lab.couch.all(db).await.into_keys().filter(|id| !id.starts_with("_design/")).collect()
}

async fn each_replicator_writes_with_its_own_rights(lab: Arc<Lab>) {
    lab.install().await;
    let weak = weak_user(&lab).await;
    let (source, target) = (lab.create("source").await, lab.create("target").await);
    for db in [&source, &target] {
        let_in(&lab, db, &weak).await;
    }
    take_only_from_its_user(&lab, &target).await;
    let fill = async |round: u32| {
        let mut docs = Vec::new();
        for number in 0..40 {
            for by in [&lab.couch.user, &weak.user] {
                for (kind, only) in [("admins", Some(&lab.couch.user)), ("weaks", Some(&weak.user)), ("anyones", None)] {
                    let whose = if *by == weak.user { "weak" } else { "admin" };
                    let id = format!("{round} {kind} by {whose} {number}");
                    docs.push(json!({ "_id": id, "by": by, "only": only }));
                }
            }
        }
        lab.couch.bulk(&source, docs).await;
    };
    fill(0).await;
    // Through one target in the same moments, each its own part of the source.
    let as_weak = json!({
        "source": weak.url_for_user(&source), "target": weak.url_for_user(&target), "selector": {"by": weak.user},
    });
    replicator(&lab, "by weak", &source, &target, as_weak).await;
    replicator(&lab, "by admin", &source, &target, json!({ "selector": {"by": lab.couch.user} })).await;
    let _spiegel = lab.spiegel().await;
    for round in 0..3 {
        if round > 0 {
            fill(round).await;
        }
        let expected: BTreeSet<String> = (0..=round)
            .flat_map(|round| {
                ["admins by admin", "weaks by weak", "anyones by admin", "anyones by weak"].map(|kind| (round, kind))
            })
            .flat_map(|(round, kind)| (0..40).map(move |number| format!("{round} {kind} {number}")))
            .collect();
        let same = async || (ids(&lab, &target).await == expected).then_some(());
        eventually(CAUGHT_UP, format!("round {round}: what each may write"), same).await;
    }
    // And nothing of what they may not.
    let before = ids(&lab, &target).await;
    stays(Duration::from_secs(2), "only that", async || ids(&lab, &target).await == before).await;
    forget_user(&lab).await;
}

async fn a_source_that_a_user_may_not_read_stays_unread(lab: Arc<Lab>) {
    lab.install().await;
    let weak = weak_user(&lab).await;
    let (source, weaks, admins) = (lab.create("source").await, lab.create("weaks").await, lab.create("admins").await);
    let_in(&lab, &weaks, &weak).await;
    lab.couch.fill(&source, "secret", 50).await;
    let as_weak = json!({ "source": weak.url_for_user(&source), "target": weak.url_for_user(&weaks) });
    replicator(&lab, "by weak", &source, &weaks, as_weak).await;
    // Reads as admin, writes as the weak user: each side has its own rights.
    let mixed = lab.create("mixed").await;
    let_in(&lab, &mixed, &weak).await;
    take_only_from_its_user(&lab, &mixed).await;
    replicator(&lab, "mixed", &source, &mixed, json!({ "target": weak.url_for_user(&mixed) })).await;
    replicator(&lab, "by admin", &source, &admins, json!({})).await;
    let spiegel = lab.spiegel().await;
    let couch = &lab.couch;
    let place = |db| super::Place { couch, db };
    same_leaves(place(&source), place(&admins), "the admin's copy").await;
    for (id, only) in [("for admin", &lab.couch.user), ("for weak", &weak.user)] {
        lab.couch.put(&source, id, json!({ "only": only })).await;
    }
    same_leaves(place(&source), place(&admins), "the admin's copy, written on").await;
    let written_as_weak = async || {
        let ids = ids(&lab, &mixed).await;
        (ids.len() == 51 && ids.contains("for weak")).then_some(())
    };
    eventually(CAUGHT_UP, "the mixed copy", written_as_weak).await;
    stays(Duration::from_secs(2), "the weak copy is empty", async || ids(&lab, &weaks).await.is_empty()).await;
    assert!(!ids(&lab, &mixed).await.contains("for admin"));
    let told = |line: &Value| line["level"] == "WARN" && line.to_string().contains("by weak");
    assert!(spiegel.log().iter().any(told), "the refusal is told");
    assert!(spiegel.log().iter().all(|line| !line.to_string().contains(PASSWORD)));
    forget_user(&lab).await;
}

async fn a_design_document_needs_an_admin(lab: Arc<Lab>) {
    lab.install().await;
    let weak = weak_user(&lab).await;
    let (source, target) = (lab.create("source").await, lab.create("target").await);
    for db in [&source, &target] {
        let_in(&lab, db, &weak).await;
    }
    lab.couch.fill(&source, "a", 20).await;
    lab.couch.put(&source, "_design/x", json!({ "language": "none" })).await;
    lab.couch.fill(&source, "z", 20).await;
    let as_weak = json!({ "source": weak.url_for_user(&source), "target": weak.url_for_user(&target) });
    replicator(&lab, "by weak", &source, &target, as_weak).await;
    let _spiegel = lab.spiegel().await;
    eventually(CAUGHT_UP, "the others", async || (ids(&lab, &target).await.len() == 40).then_some(())).await;
    assert_eq!(lab.couch.get(&target, "_design/x").await, None);
    forget_user(&lab).await;
}
