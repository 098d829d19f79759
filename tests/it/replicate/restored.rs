//! Databases that are not what they were: made again, or put back from an older copy. Nothing may be missing afterwards.

use super::compare::{assert_nothing_missing, missing};
use super::{CAUGHT_UP, Pair};
use crate::support::couch::encode;
use crate::support::{Lab, Spiegel, eventually, tests_on};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

tests_on! {
    every: [],
    like_couchdb: [a_target_made_again_is_filled_again],
    embedded: [
        a_target_made_again_in_the_same_second_is_filled_again,
        a_target_put_back_from_an_older_copy_is_completed,
        a_target_put_back_between_two_checkpoints_is_completed,
        a_source_put_back_from_an_older_copy_goes_on,
        a_source_put_back_between_two_checkpoints_goes_on,
        a_source_put_back_and_written_past_what_it_lost_goes_on,
        a_source_made_again_with_fewer_documents_goes_on,
        both_sides_put_back_from_copies_of_other_days,
        a_source_whose_checkpoint_is_behind_loses_nothing,
    ],
    couchdb: [
        a_target_rebuilt_with_its_older_checkpoints_is_completed,
        a_target_that_keeps_one_revision_is_taken_for_what_it_is,
        a_source_that_keeps_one_revision_is_taken_for_what_it_is,
    ],
}

/// What no CouchDB has: `POST /_dev/…`.
async fn control(lab: &Lab, action: &str, db: &str) {
    let (status, answer) = lab.couch.ask(Method::POST, &format!("_dev/{action}"), Some(json!({ "db": db }))).await;
    assert_eq!(status, StatusCode::OK, "{action} {db}: {answer}");
}

async fn nothing_missing(pair: &Pair, when: &str) {
    let (source, target) = (pair.place(&pair.source.db), pair.place(&pair.ours));
    let complete = async || missing(source, target).await.is_empty().then_some(());
    eventually(CAUGHT_UP, format!("{when}: nothing missing"), complete).await;
    assert_nothing_missing(source, target, when).await;
}

const CHECKPOINTS_SOON: [(&str, &str); 2] =
    [("REPLICATION_CHECKPOINT_AFTER", "200ms"), ("REPLICATION_SOURCE_CHECKPOINT_AFTER", "200ms")];

/// Until both sides' checkpoints cover everything: a copy that is put back sooner has the checkpoint that counts now.
async fn checkpointed(pair: &Pair) {
    checkpointed_at(pair, &[&pair.source.db, &pair.ours]).await;
}

async fn checkpointed_at(pair: &Pair, sides: &[&str]) {
    let couch = &pair.lab.couch;
    let documents = async |db: &str| {
        let path = format!("{}/_local_docs?include_docs=true", encode(db));
        let (_, page) = couch.ask(Method::GET, &path, None).await;
        let rows = page["rows"].as_array().expect("rows").iter();
        rows.map(|row| row["doc"].clone()).filter(|doc| doc["source_last_seq"].is_string()).collect::<Vec<_>>()
    };
    let covered = async || {
        let mut told = documents(&pair.ours).await;
        for side in sides {
            let others = documents(side).await;
            let same = |doc: &Value, other: &Value| other["_id"] == doc["_id"] && other["session_id"] == doc["session_id"];
            told.retain(|doc| others.iter().any(|other| same(doc, other)));
        }
        for doc in told {
            let since = encode(doc["source_last_seq"].as_str().expect("a sequence"));
            let page = couch.changes(&pair.source.db, &format!("since={since}&limit=1")).await;
            if page["results"].as_array().is_some_and(Vec::is_empty) {
                return Some(());
            }
        }
        None
    };
    eventually(CAUGHT_UP, "a checkpoint that covers everything", covered).await;
}

async fn started(lab: &Arc<Lab>) -> (Pair, crate::support::Spiegel) {
    let mut pair = Pair::new(lab.clone()).await;
    pair.source.grow(Pair::size() / 4, 0).await;
    pair.replicator(json!({})).await;
    let spiegel = lab.spiegel_with(&CHECKPOINTS_SOON).await;
    pair.caught_up("at first").await;
    checkpointed(&pair).await;
    (pair, spiegel)
}

async fn a_target_made_again_is_filled_again(lab: Arc<Lab>) {
    let (mut pair, _spiegel) = started(&lab).await;
    lab.couch.delete(&pair.ours).await;
    lab.couch.create(&pair.ours).await;
    pair.source.grow(1, 0).await;
    pair.same("made again, and then a change").await;
    // It is told of as well.
    lab.couch.delete(&pair.ours).await;
    lab.couch.create(&pair.ours).await;
    pair.same("made again, and no change").await;
}

async fn a_target_made_again_in_the_same_second_is_filled_again(lab: Arc<Lab>) {
    let (mut pair, mut spiegel) = started(&lab).await;
    for restarted in [false, true] {
        control(&lab, "remake", &pair.ours).await;
        // As many updates as it had, and other documents.
        let updates = lab.couch.updates(&pair.source.db).await;
        lab.couch.fill(&pair.ours, "its own", usize::try_from(updates).expect("a count")).await;
        if restarted {
            spiegel.restart().await;
        }
        pair.source.grow(1, 0).await;
        nothing_missing(&pair, "made again in the same second").await;
    }
    control(&lab, "remake", &pair.ours).await;
    pair.source.grow(1, 3).await;
    pair.same("empty once more").await;
}

async fn a_target_put_back_from_an_older_copy_is_completed(lab: Arc<Lab>) {
    let (mut pair, mut spiegel) = started(&lab).await;
    control(&lab, "snapshot", &pair.ours).await;
    for restarted in [false, true] {
        for _ in 0..3 {
            pair.source.grow(10, 20).await;
            pair.caught_up("after the copy").await;
        }
        checkpointed(&pair).await;
        control(&lab, "restore", &pair.ours).await;
        if restarted {
            spiegel.restart().await;
        }
        pair.source.grow(1, 0).await;
        pair.same("put back").await;
    }
}

/// The copy tells of the same checkpoint as the target that it replaces: the next one finds that documents are gone.
async fn a_target_put_back_between_two_checkpoints_is_completed(lab: Arc<Lab>) {
    let mut pair = Pair::new(lab.clone()).await;
    pair.source.grow(Pair::size() / 4, 0).await;
    pair.replicator(json!({})).await;
    let settings = [("REPLICATION_CHECKPOINT_AFTER", "4s"), ("REPLICATION_SOURCE_CHECKPOINT_AFTER", "1s")];
    let mut spiegel = lab.spiegel_with(&settings).await;
    pair.caught_up("at first").await;
    for what_next in ["nothing", "a change", "a stop", "nothing", "a kill"] {
        let fill =
            async |what: &str, count| lab.couch.fill(&pair.source.db, &format!("{what} {} ", fastrand::u32(..)), count).await;
        loop {
            // From right after a checkpoint on there is mostly time for all of it until the next.
            fill("before", 1).await;
            checkpointed(&pair).await;
            let told = sessions(&lab, &pair.ours).await;
            fill("kept", 5).await;
            nothing_missing(&pair, "what the copy has").await;
            control(&lab, "snapshot", &pair.ours).await;
            fill("lost", 30).await;
            nothing_missing(&pair, "what the copy has not").await;
            if sessions(&lab, &pair.ours).await == told {
                break;
            }
        }
        control(&lab, "restore", &pair.ours).await;
        assert_eq!(missing(pair.place(&pair.source.db), pair.place(&pair.ours)).await.len(), 30);
        match what_next {
            "a change" => fill("after", 1).await,
            "a stop" => spiegel.restart().await,
            "a kill" => {
                spiegel.kill();
                spiegel.start_again().await;
            }
            _ => {}
        }
        nothing_missing(&pair, &format!("put back, and then {what_next}")).await;
    }
    pair.same("put back five times").await;
}

/// Of all checkpoints of a database.
async fn sessions(lab: &Lab, db: &str) -> Vec<Value> {
    let (_, page) = lab.couch.ask(Method::GET, &format!("{}/_local_docs?include_docs=true", encode(db)), None).await;
    page["rows"].as_array().expect("rows").iter().map(|row| row["doc"]["session_id"].clone()).collect()
}

async fn a_source_put_back_from_an_older_copy_goes_on(lab: Arc<Lab>) {
    let (mut pair, mut spiegel) = started(&lab).await;
    control(&lab, "snapshot", &pair.source.db).await;
    // The lost time was longer than what comes after, as long, and shorter.
    for (number, (lost, after)) in [(30, 2), (10, 10), (2, 30)].into_iter().enumerate() {
        lab.couch.fill(&pair.source.db, &format!("lost{number}_"), lost).await;
        nothing_missing(&pair, "before it is lost").await;
        checkpointed(&pair).await;
        control(&lab, "restore", &pair.source.db).await;
        if number == 1 {
            spiegel.restart().await;
        }
        for one in 0..after {
            lab.couch.put(&pair.source.db, &format!("after{number}_{one}"), json!({})).await;
        }
        nothing_missing(&pair, &format!("{lost} lost and {after} written")).await;
    }
    pair.source.grow(3, 0).await;
    nothing_missing(&pair, "and on").await;
}

/// The copy tells of the same checkpoint as the source that it replaces; that it has fewer updates tells them apart.
async fn a_source_put_back_between_two_checkpoints_goes_on(lab: Arc<Lab>) {
    let mut pair = Pair::new(lab.clone()).await;
    pair.source.grow(Pair::size() / 4, 0).await;
    pair.replicator(json!({})).await;
    let _spiegel = lab.spiegel_with(&[("REPLICATION_CHECKPOINT_AFTER", "10m")]).await;
    pair.caught_up("at first").await;
    control(&lab, "snapshot", &pair.source.db).await;
    lab.couch.fill(&pair.source.db, "lost", 30).await;
    nothing_missing(&pair, "before it is lost").await;
    control(&lab, "restore", &pair.source.db).await;
    lab.couch.fill(&pair.source.db, "after", 2).await;
    nothing_missing(&pair, "put back, and written").await;
}

/// As many writes as were lost take their places in the sequence before anybody looks.
async fn a_source_put_back_and_written_past_what_it_lost_goes_on(lab: Arc<Lab>) {
    let mut pair = Pair::new(lab.clone()).await;
    pair.source.grow(Pair::size() / 4, 0).await;
    pair.replicator(json!({})).await;
    let settings = [("REPLICATION_CHECKPOINT_AFTER", "200ms"), ("REPLICATION_SOURCE_CHECKPOINT_AFTER", "1h")];
    let _spiegel = lab.spiegel_with(&settings).await;
    let source = pair.source.db.clone();
    pair.caught_up("at first").await;
    checkpointed(&pair).await;
    for round in 0..3 {
        lab.couch.fill(&source, &format!("known {round} "), 5).await;
        nothing_missing(&pair, "before the copy").await;
        control(&lab, "snapshot", &source).await;
        for lost in 0..6 {
            lab.couch.fill(&source, &format!("lost {round} {lost} "), 2).await;
            nothing_missing(&pair, "before it is lost").await;
        }
        control(&lab, "restore", &source).await;
        match round {
            0 => lab.couch.fill(&source, "after ", 30).await,
            // The same ids, with other contents.
            1 => {
                let same = (0..6).flat_map(|lost| [0, 1].map(|n| format!("lost {round} {lost} {n}")));
                let others = (0..20).map(|n| format!("other {n}"));
                lab.couch.bulk(&source, same.chain(others).map(|id| json!({ "_id": id, "other": true })).collect()).await;
            }
            // Many: the page is full without what was read.
            _ => lab.couch.fill(&source, "many ", 300).await,
        }
        nothing_missing(&pair, &format!("put back and written past it, {round}")).await;
    }
    pair.source.grow(5, 5).await;
    nothing_missing(&pair, "and on").await;
}

async fn a_source_made_again_with_fewer_documents_goes_on(lab: Arc<Lab>) {
    let (pair, mut spiegel) = started(&lab).await;
    for round in 0..3 {
        control(&lab, "remake", &pair.source.db).await;
        if round == 1 {
            spiegel.restart().await;
        }
        lab.couch.fill(&pair.source.db, &format!("made again {round} "), 7).await;
        nothing_missing(&pair, "a source made again").await;
        lab.couch.fill(&pair.source.db, &format!("and on {round} "), 7).await;
        nothing_missing(&pair, "and written on").await;
    }
}

async fn both_sides_put_back_from_copies_of_other_days(lab: Arc<Lab>) {
    let (mut pair, mut spiegel) = started(&lab).await;
    let (source, ours) = (pair.source.db.clone(), pair.ours.clone());
    for (first, second) in [(&source, &ours), (&ours, &source)] {
        lab.couch.fill(&source, &format!("day 1 {first} "), 5).await;
        nothing_missing(&pair, "day 1").await;
        checkpointed(&pair).await;
        control(&lab, "snapshot", first).await;
        lab.couch.fill(&source, &format!("day 2 {first} "), 5).await;
        nothing_missing(&pair, "day 2").await;
        checkpointed(&pair).await;
        control(&lab, "snapshot", second).await;
        lab.couch.fill(&source, &format!("day 3 {first} "), 5).await;
        nothing_missing(&pair, "day 3").await;
        checkpointed(&pair).await;
        spiegel.stop().await;
        control(&lab, "restore", &source).await;
        control(&lab, "restore", &ours).await;
        lab.couch.fill(&source, &format!("day 4 {first} "), 5).await;
        spiegel.start_again().await;
        nothing_missing(&pair, "day 4").await;
    }
    pair.source.grow(5, 0).await;
    nothing_missing(&pair, "and on").await;
}

/// The target's goes on alone.
async fn a_source_whose_checkpoint_is_behind_loses_nothing(lab: Arc<Lab>) {
    let mut pair = Pair::new(lab.clone()).await;
    pair.source.grow(Pair::size() / 4, 0).await;
    pair.replicator(json!({})).await;
    let settings = [("REPLICATION_CHECKPOINT_AFTER", "200ms"), ("REPLICATION_SOURCE_CHECKPOINT_AFTER", "1h")];
    let mut spiegel = lab.spiegel_with(&settings).await;
    pair.caught_up("at first").await;
    let (source, ours) = (pair.source.db.clone(), pair.ours.clone());
    checkpointed_at(&pair, &[&ours]).await;
    control(&lab, "snapshot", &ours).await;
    for restarted in [false, true] {
        for round in 0..3 {
            lab.couch.fill(&source, &format!("{restarted} {round} "), 5).await;
            nothing_missing(&pair, "while the source's is behind").await;
            checkpointed_at(&pair, &[&ours]).await;
        }
        control(&lab, "restore", &ours).await;
        if restarted {
            spiegel.restart().await;
        }
        lab.couch.fill(&source, &format!("{restarted} after "), 1).await;
        nothing_missing(&pair, "the target put back").await;
    }
    spiegel.restart().await;
    pair.source.grow(5, 5).await;
    pair.same("and on").await;
}

/// What an operator without the files does: the documents by replication, the checkpoints by hand.
async fn a_target_rebuilt_with_its_older_checkpoints_is_completed(lab: Arc<Lab>) {
    let (mut pair, _spiegel) = started(&lab).await;
    let copy = lab.create("copy").await;
    super::reference(&lab, &pair.ours, &copy, json!({})).await;
    let locals = async |db: &str| {
        let path = format!("{}/_local_docs?include_docs=true", encode(db));
        let (_, page) = lab.couch.ask(Method::GET, &path, None).await;
        page["rows"].as_array().expect("rows").iter().map(|row| row["doc"].clone()).collect::<Vec<Value>>()
    };
    let kept = locals(&pair.ours).await;
    for _ in 0..3 {
        pair.source.grow(10, 20).await;
        pair.caught_up("after the copy").await;
    }
    lab.couch.delete(&pair.ours).await;
    lab.couch.create(&pair.ours).await;
    super::reference(&lab, &copy, &pair.ours, json!({})).await;
    for mut doc in kept {
        doc.as_object_mut().expect("an object").shift_remove("_rev");
        let id = doc["_id"].as_str().expect("an id").to_string();
        lab.couch.put(&pair.ours, &id, doc).await;
    }
    pair.source.grow(1, 0).await;
    pair.same("rebuilt").await;
}

/// It does not know any more what was brought to it a moment ago, and is no other database for that.
async fn a_target_that_keeps_one_revision_is_taken_for_what_it_is(lab: Arc<Lab>) {
    let (pair, _spiegel) = keeps_one_revision(lab, |pair| &pair.ours).await;
    pair.caught_up("a hot document").await;
    checkpointed(&pair).await;
}

async fn a_source_that_keeps_one_revision_is_taken_for_what_it_is(lab: Arc<Lab>) {
    let (pair, _spiegel) = keeps_one_revision(lab, |pair| &pair.source.db).await;
    // It tells of no ancestors, so that each revision is a branch of its own in the target.
    nothing_missing(&pair, "a hot document").await;
    checkpointed(&pair).await;
}

async fn keeps_one_revision(lab: Arc<Lab>, which: fn(&Pair) -> &str) -> (Pair, Spiegel) {
    let pair = Pair::new(lab.clone()).await;
    let path = format!("{}/_revs_limit", encode(which(&pair)));
    assert_eq!(lab.couch.ask(Method::PUT, &path, Some(json!(1))).await.0, StatusCode::OK);
    pair.replicator(json!({})).await;
    let spiegel =
        lab.spiegel_with(&[("REPLICATION_CHECKPOINT_AFTER", "1s"), ("REPLICATION_SOURCE_CHECKPOINT_AFTER", "500ms")]).await;
    for n in 0..60 {
        lab.couch.put(&pair.source.db, "hot", json!({ "n": n })).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let (_, page) = lab.couch.ask(Method::GET, &format!("{}/_local_docs?include_docs=true", encode(&pair.ours)), None).await;
    let rows = page["rows"].as_array().expect("rows").iter();
    let entries = rows.flat_map(|row| row["doc"]["history"].as_array().cloned().unwrap_or_default());
    let recorded: BTreeSet<String> = entries.map(|entry| entry["recorded_seq"].to_string()).collect();
    assert!(recorded.len() >= 4, "it goes on while the document is written: {recorded:?}");
    (pair, spiegel)
}
