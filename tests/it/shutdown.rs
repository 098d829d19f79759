//! A signal ends the process in good order and soon, whatever it is doing; what it left is done by the next.

use crate::support::{Answer, Fault, Lab, Proxy, SOON, Spiegel, eventually, tests_on};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

tests_on! {
    every: [
    sigterm_under_load_ends_in_good_order,
    sigint_under_load_ends_in_good_order,
    a_hanging_receiver_does_not_hold_the_end,
    a_second_signal_ends_at_once,
    an_absent_couchdb_does_not_hold_the_end,
],
}

/// Docker gives 10 s; the deadline by default is 4 s.
const PROMPT: Duration = Duration::from_secs(5);
const DBS: usize = 5;
const DOCS: usize = 200;

/// Five databases with a rule and a replicator, and much to do.
async fn under_load(lab: &Arc<Lab>, answer: Answer) -> Spiegel {
    lab.install().await;
    let target = lab.create("target").await;
    for number in 0..DBS {
        let db = lab.create(&format!("source{number}")).await;
        lab.rule(&format!("rule{number}"), &db, "/hook", json!({})).await;
        lab.replicator(&format!("replicator{number}"), &db, &target, json!({})).await;
    }
    lab.receiver.answer("/hook", answer);
    // So few at once that the rest has to wait.
    let spiegel = lab.spiegel_with(&[("WEBHOOK_CONCURRENCY", "8"), ("WEBHOOK_CONCURRENCY_PER_HOST", "8")]).await;
    for number in 0..DBS {
        lab.couch.fill(&lab.name(&format!("source{number}")), &format!("s{number}d"), DOCS).await;
    }
    eventually(SOON, "the first deliveries", async || (lab.receiver.count("/hook") >= 20).then_some(())).await;
    spiegel
}

async fn ends_by(lab: Arc<Lab>, signal: &str) {
    let mut spiegel = under_load(&lab, Answer::ok().after(Duration::from_millis(200))).await;
    spiegel.signal(signal);
    let (status, took) = spiegel.wait_end(PROMPT).await;
    assert_eq!(status.code(), Some(0), "after {took:?}");
    let answered = lab.receiver.delivered("/hook").len();
    assert!(answered < DBS * DOCS, "it ended under load");
    spiegel.start_again().await;
    everything_arrives(&lab).await;
    let repeated = lab.receiver.count("/hook") - DBS * DOCS;
    assert!(repeated <= DBS * 50, "{repeated} repeated after a stop in good order");
}

async fn everything_arrives(lab: &Lab) {
    lab.receiver.answer("/hook", Answer::ok());
    let all = async || (lab.receiver.delivered("/hook").len() == DBS * DOCS).then_some(());
    eventually(SOON * 2, "everything delivered after a restart", all).await;
    let replicated = async || (lab.couch.all(&lab.name("target")).await.len() == DBS * DOCS).then_some(());
    eventually(SOON * 2, "everything replicated after a restart", replicated).await;
}

async fn sigterm_under_load_ends_in_good_order(lab: Arc<Lab>) {
    ends_by(lab, "TERM").await;
}

async fn sigint_under_load_ends_in_good_order(lab: Arc<Lab>) {
    ends_by(lab, "INT").await;
}

async fn a_hanging_receiver_does_not_hold_the_end(lab: Arc<Lab>) {
    let mut spiegel = under_load(&lab, Answer::hang()).await;
    spiegel.signal("TERM");
    let (status, took) = spiegel.wait_end(PROMPT).await;
    assert_eq!(status.code(), Some(0), "after {took:?}");
    spiegel.start_again().await;
    everything_arrives(&lab).await;
}

async fn a_second_signal_ends_at_once(lab: Arc<Lab>) {
    let mut spiegel = under_load(&lab, Answer::hang()).await;
    spiegel.signal("TERM");
    let lines_before = spiegel.lines().len();
    eventually(SOON, "it says that it stops", async || (spiegel.lines().len() > lines_before).then_some(())).await;
    spiegel.signal("TERM");
    let (_, took) = spiegel.wait_end(PROMPT).await;
    assert!(took < Duration::from_millis(1500), "it took {took:?}");
    spiegel.start_again().await;
    everything_arrives(&lab).await;
}

async fn an_absent_couchdb_does_not_hold_the_end(lab: Arc<Lab>) {
    lab.install().await;
    let proxy = Proxy::start(&lab.couch.base).await;
    let url = lab.couch.at(&proxy.base()).url();
    for fault in [Fault::Refuse, Fault::Silent] {
        let mut spiegel = lab.spiegel_with(&[("COUCHDB_URL", &url)]).await;
        proxy.set(fault.clone());
        spiegel.signal("TERM");
        let (status, took) = spiegel.wait_end(PROMPT).await;
        assert_eq!(status.code(), Some(0), "{fault:?} after {took:?}");
        // Nor while it waits for CouchDB at its start.
        spiegel.start_again_unready();
        let listens = async || spiegel.page("/live").await;
        eventually(SOON, "it listens, and waits for CouchDB", listens).await;
        spiegel.signal("TERM");
        let (status, took) = spiegel.wait_end(PROMPT).await;
        assert_eq!(status.code(), Some(0), "{fault:?} at the start, after {took:?}");
        proxy.heal();
    }
}
