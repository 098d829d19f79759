//! What stands between Spiegel and CouchDB misbehaves: the process lives, recovers soon, and nothing is lost.

use crate::support::{Fault, Kind, Lab, Proxy, Spiegel, eventually, stays, tests_on};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

tests_on! {
    every: [
    cut_connections_are_opened_again,
    a_refusing_server_is_waited_for,
    a_slow_server_is_borne,
    a_row_cut_in_the_middle_is_read_again,
    errors_500_are_waited_out,
    a_password_that_is_refused_for_a_while_is_waited_out,
    answers_that_make_no_sense_are_waited_out,
],
    like_couchdb: [a_silent_server_is_noticed, a_404_from_a_proxy_forgets_nothing],
}

/// A rule and a replicator on one database, through a proxy.
struct Line {
    lab: Arc<Lab>,
    proxy: Proxy,
    spiegel: Spiegel,
    source: String,
    target: String,
    pid: u32,
    written: usize,
    log_lines: usize,
}

/// How long an outage lasts where its length does not matter: several retries long.
const OUTAGE: Duration = Duration::from_secs(3);
/// "Within seconds": the longest pause of a backoff here is 1 s.
const RECOVERY: Duration = Duration::from_secs(12);

impl Line {
    async fn start(lab: Arc<Lab>) -> Self {
        lab.install().await;
        let (source, target) = (lab.create("source").await, lab.create("target").await);
        lab.rule("rule", &source, "/hook", json!({})).await;
        lab.replicator("copy", &source, &target, json!({})).await;
        let proxy = Proxy::start(&lab.couch.base).await;
        let url = lab.couch.at(&proxy.base()).url();
        let spiegel = lab.spiegel_with(&[("COUCHDB_URL", &url)]).await;
        let pid = spiegel.pid();
        let mut line = Self { lab, proxy, spiegel, source, target, pid, written: 0, log_lines: 0 };
        line.write(5).await;
        line.all_arrived("before the fault").await;
        line.log_lines = line.spiegel.log().len();
        line.proxy.forget();
        line
    }

    /// Straight to CouchDB.
    async fn write(&mut self, count: usize) {
        for _ in 0..count {
            self.lab.couch.put(&self.source, &format!("doc{}", self.written), json!({})).await;
            self.written += 1;
        }
    }

    async fn all_arrived(&self, when: &str) {
        let delivered = async || (self.lab.receiver.delivered("/hook").len() == self.written).then_some(());
        eventually(RECOVERY, format!("{} documents delivered {when}", self.written), delivered).await;
        let replicated = async || (self.lab.couch.all(&self.target).await.len() == self.written).then_some(());
        eventually(RECOVERY, format!("{} documents replicated {when}", self.written), replicated).await;
    }

    async fn lives(&mut self, time: Duration) {
        let spiegel = &mut self.spiegel;
        stays(time, "the process lives", || std::future::ready(spiegel.is_alive())).await;
    }

    async fn outage(&mut self, fault: Fault, time: Duration) {
        self.write(5).await;
        self.proxy.set(fault.clone());
        self.write(20).await;
        self.lives(time).await;
        self.proxy.heal();
        self.all_arrived(&format!("after {fault:?}")).await;
        self.write(1).await;
        self.all_arrived("when it is over").await;
    }

    fn finish(mut self, changes_of_state: usize) {
        assert!(self.spiegel.is_alive());
        assert_eq!(self.spiegel.pid(), self.pid);
        // What changes its state at once: the server's health, the feed, the rule's database, the replicator.
        let bound = 2 * changes_of_state;
        let log = self.spiegel.log();
        let lines: Vec<String> = log[self.log_lines..].iter().map(ToString::to_string).collect();
        assert!(lines.len() <= bound, "{} lines for {changes_of_state} changes of state:\n{}", lines.len(), lines.join("\n"));
    }
}

/// CouchDB is away, and it is back.
const ONE_OUTAGE: usize = 2;

async fn cut_connections_are_opened_again(lab: Arc<Lab>) {
    let mut line = Line::start(lab).await;
    for _ in 0..5 {
        line.write(4).await;
        line.proxy.cut();
        line.write(4).await;
        line.all_arrived("after a cut").await;
    }
    line.finish(5 * ONE_OUTAGE);
}

async fn a_refusing_server_is_waited_for(lab: Arc<Lab>) {
    let mut line = Line::start(lab).await;
    line.outage(Fault::Refuse, OUTAGE).await;
    line.finish(ONE_OUTAGE);
}

async fn a_slow_server_is_borne(lab: Arc<Lab>) {
    let mut line = Line::start(lab).await;
    line.outage(Fault::Slow { bytes_per_second: 2000 }, OUTAGE).await;
    line.finish(ONE_OUTAGE);
}

async fn a_row_cut_in_the_middle_is_read_again(lab: Arc<Lab>) {
    let mut line = Line::start(lab).await;
    for round in 0..4 {
        line.proxy.truncate(2);
        line.write(10).await;
        line.all_arrived("after a truncated answer").await;
        assert!(line.proxy.truncated() > round, "an answer was truncated");
    }
    line.finish(4 * ONE_OUTAGE);
}

fn not_hot(line: &Line, time: Duration) {
    let requests = line.proxy.requests();
    let sum: u64 = requests.values().sum();
    let bound = 30 * (time.as_secs() + RECOVERY.as_secs());
    assert!(sum <= bound, "a hot loop of {sum} requests: {requests:?}");
}

async fn errors_500_are_waited_out(lab: Arc<Lab>) {
    let mut line = Line::start(lab).await;
    let body = r#"{"error":"internal_server_error","reason":"No DB shards could be opened.","ref":1}"#;
    line.outage(Fault::Answer { status: 500, body: body.into() }, OUTAGE).await;
    not_hot(&line, OUTAGE);
    line.finish(ONE_OUTAGE);
}

async fn a_password_that_is_refused_for_a_while_is_waited_out(lab: Arc<Lab>) {
    let mut line = Line::start(lab).await;
    let body = r#"{"error":"unauthorized","reason":"Name or password is incorrect."}"#;
    line.outage(Fault::Answer { status: 401, body: body.into() }, OUTAGE).await;
    not_hot(&line, OUTAGE);
    line.finish(ONE_OUTAGE);
}

async fn answers_that_make_no_sense_are_waited_out(lab: Arc<Lab>) {
    let mut line = Line::start(lab).await;
    let bodies =
        [r#"{"unexpected":[1,{"x":null}]}"#, "[]", "<html>captive portal</html>", r#"{"results":7,"last_seq":{},"rows":"x"}"#];
    for body in bodies {
        line.outage(Fault::Answer { status: 200, body: body.into() }, Duration::from_millis(1500)).await;
    }
    not_hot(&line, 4 * OUTAGE);
    line.finish(4 * ONE_OUTAGE);
}

async fn a_silent_server_is_noticed(lab: Arc<Lab>) {
    let mut line = Line::start(lab).await;
    line.outage(Fault::Silent, Duration::from_secs(12)).await;
    line.finish(ONE_OUTAGE);
}

/// A load balancer that says 404 for everything must not make Spiegel believe that the databases are gone for good.
async fn a_404_from_a_proxy_forgets_nothing(lab: Arc<Lab>) {
    let mut line = Line::start(lab.clone()).await;
    let body = r#"{"error":"not_found","reason":"Database does not exist."}"#;
    line.outage(Fault::Answer { status: 404, body: body.into() }, OUTAGE).await;
    not_hot(&line, OUTAGE);
    if lab.kind == Kind::Embedded {
        let repeated = line.lab.receiver.requests_at("/hook").len() - line.written;
        assert!(repeated <= 50, "{repeated} repeated: at most a batch");
    }
    line.finish(2 * ONE_OUTAGE);
}
