//! The name of every metric.
//!
//! No label carries a database's or a document's name, so that the number of series stays bounded; rules and hosts are named
//! within a bound (`BoundedLabels`).

use super::labels::BoundedLabels;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use std::sync::Arc;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct RequestLabels {
    pub endpoint: &'static str,
    pub status: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct OutcomeLabels {
    pub outcome: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ChildLabels {
    pub child: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct StateLabels {
    pub state: &'static str,
}

/// A rule and a host that it calls.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct RouteLabels {
    pub rule: Arc<str>,
    pub host: Arc<str>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct AttemptLabels {
    pub rule: Arc<str>,
    pub host: Arc<str>,
    pub status_class: &'static str,
}

/// `none`: no answer came.
const STATUS_CLASSES: [&str; 6] = ["none", "2xx", "3xx", "4xx", "5xx", "other"];
/// 13 series each, or 4,000 in all, which a scrape bears.
const ROUTES_MAX: usize = 200;
const RULES_MAX: usize = 100;

/// What is counted of one rule's requests to one host.
pub struct Route {
    attempts: [Counter; STATUS_CLASSES.len()],
    seconds: Histogram,
}

impl Route {
    pub fn observe(&self, status: Option<u16>, seconds: f64) {
        let class = match status.map(|status| status / 100) {
            None => 0,
            Some(hundreds @ 2..=5) => usize::from(hundreds) - 1,
            Some(_) => STATUS_CLASSES.len() - 1,
        };
        if let Some(attempts) = self.attempts.get(class) {
            attempts.inc();
        }
        self.seconds.observe(seconds);
    }
}

/// Every metric of the process; cloned as one `Arc`.
pub struct Metrics {
    registry: Registry,
    pub couchdb_requests: Family<RequestLabels, Counter>,
    pub couchdb_up: Gauge,
    pub feed_connected: Gauge,
    pub workers_connected: Gauge,
    pub feed_rows: Counter,
    pub feed_hints: Counter,
    pub feed_malformed_rows: Counter,
    pub feed_reconnects: Counter,
    pub pending_databases: Gauge,
    pub db_actors: Gauge,
    pub db_actor_crashes: Counter,
    pub sweeps: Counter,
    pub sweep_databases: Counter,
    pub sweep_found: Counter,
    pub checkpoint_writes: Family<OutcomeLabels, Counter>,
    pub webhook_deliveries: Family<OutcomeLabels, Counter>,
    pub webhook_coalesced: Counter,
    pub webhook_in_flight: Gauge,
    pub webhook_queued: Gauge,
    pub webhook_duration_seconds: Histogram,
    webhook_attempts: Family<AttemptLabels, Counter>,
    webhook_attempt_duration_seconds: Family<RouteLabels, Histogram, fn() -> Histogram>,
    /// The handles of the two above.
    pub webhook_routes: BoundedLabels<Route>,
    /// By state: parked, dead, dropped.
    pub deliveries: Family<StateLabels, Gauge>,
    /// By state: open, half_open.
    pub webhook_breakers: Family<StateLabels, Gauge>,
    pub rules_disabled: Gauge,
    pub replications: Family<OutcomeLabels, Counter>,
    pub replications_running: Gauge,
    pub replications_queued: Gauge,
    pub replication_duration_seconds: Histogram,
    pub replication_docs_read: Counter,
    pub replication_docs_written: Counter,
    pub replication_doc_write_failures: Counter,
    pub replication_missing_checked: Counter,
    pub replication_missing_found: Counter,
    pub replication_bytes_read: Counter,
    pub restarts: Family<ChildLabels, Counter>,
    pub rules: Gauge,
    pub replicators: Family<StateLabels, Gauge>,
    pub invalid_documents: Gauge,
}

impl Metrics {
    pub fn new() -> Arc<Self> {
        let webhook_attempts = Family::<AttemptLabels, Counter>::default();
        let webhook_attempt_duration_seconds = Family::<RouteLabels, Histogram, fn() -> Histogram>::new_with_constructor(seconds);
        let webhook_routes = routes(webhook_attempts.clone(), webhook_attempt_duration_seconds.clone());
        let mut metrics = Self {
            registry: Registry::with_prefix("spiegel"),
            couchdb_requests: Family::default(),
            couchdb_up: Gauge::default(),
            feed_connected: Gauge::default(),
            workers_connected: Gauge::default(),
            feed_rows: Counter::default(),
            feed_hints: Counter::default(),
            feed_malformed_rows: Counter::default(),
            feed_reconnects: Counter::default(),
            pending_databases: Gauge::default(),
            db_actors: Gauge::default(),
            db_actor_crashes: Counter::default(),
            sweeps: Counter::default(),
            sweep_databases: Counter::default(),
            sweep_found: Counter::default(),
            checkpoint_writes: Family::default(),
            webhook_deliveries: Family::default(),
            webhook_coalesced: Counter::default(),
            webhook_in_flight: Gauge::default(),
            webhook_queued: Gauge::default(),
            webhook_duration_seconds: seconds(),
            webhook_attempts,
            webhook_attempt_duration_seconds,
            webhook_routes,
            deliveries: Family::default(),
            webhook_breakers: Family::default(),
            rules_disabled: Gauge::default(),
            replications: Family::default(),
            replications_running: Gauge::default(),
            replications_queued: Gauge::default(),
            replication_duration_seconds: seconds(),
            replication_docs_read: Counter::default(),
            replication_docs_written: Counter::default(),
            replication_doc_write_failures: Counter::default(),
            replication_missing_checked: Counter::default(),
            replication_missing_found: Counter::default(),
            replication_bytes_read: Counter::default(),
            restarts: Family::default(),
            rules: Gauge::default(),
            replicators: Family::default(),
            invalid_documents: Gauge::default(),
        };
        metrics.register();
        Arc::new(metrics)
    }

    fn register(&mut self) {
        let r = &mut self.registry;
        r.register(
            "couchdb_requests",
            "Requests to the watched CouchDB by endpoint and status (0: no answer)",
            self.couchdb_requests.clone(),
        );
        r.register("couchdb_up", "1 while CouchDB answers", self.couchdb_up.clone());
        r.register("feed_connected", "1 while the feed of _global_changes is open", self.feed_connected.clone());
        let help = "1 while the feed of the spiegel database is open that tells what is dirty or locked";
        r.register("workers_connected", help, self.workers_connected.clone());
        r.register("feed_rows", "Rows read from _global_changes", self.feed_rows.clone());
        r.register("feed_hints", "Rows that named a watched database", self.feed_hints.clone());
        r.register("feed_malformed_rows", "Rows that could not be read", self.feed_malformed_rows.clone());
        r.register("feed_reconnects", "Times that the feed was opened again", self.feed_reconnects.clone());
        r.register("pending_databases", "Databases whose work is not yet durable", self.pending_databases.clone());
        r.register("db_actors", "Databases that are busy now", self.db_actors.clone());
        r.register("db_actor_crashes", "Crashes of a database's actor", self.db_actor_crashes.clone());
        r.register("sweeps", "Sweeps finished", self.sweeps.clone());
        r.register("sweep_databases", "Databases that sweeps looked at", self.sweep_databases.clone());
        r.register("sweep_found", "Databases with work that only a sweep found", self.sweep_found.clone());
        r.register("checkpoint_writes", "Documents written to the spiegel database", self.checkpoint_writes.clone());
        r.register("webhook_deliveries", "Webhook attempts by outcome", self.webhook_deliveries.clone());
        r.register("webhook_coalesced", "Deliveries that debounce folded into another", self.webhook_coalesced.clone());
        r.register("webhook_in_flight", "Webhook requests under way", self.webhook_in_flight.clone());
        r.register("webhook_queued", "Webhook deliveries waiting for their turn", self.webhook_queued.clone());
        r.register("webhook_duration_seconds", "Time of one webhook request", self.webhook_duration_seconds.clone());
        r.register(
            "webhook_attempts",
            "Webhook requests by rule, host and class of the answer's status; `other` beyond the first few hundred",
            self.webhook_attempts.clone(),
        );
        r.register(
            "webhook_attempt_duration_seconds",
            "Time of one webhook request by rule and host",
            self.webhook_attempt_duration_seconds.clone(),
        );
        r.register("deliveries", "Deliveries that are kept in the database, by state", self.deliveries.clone());
        r.register("webhook_breakers", "Hosts that are not called as usual, by state", self.webhook_breakers.clone());
        r.register("rules_disabled", "Rules whose receiver wants nothing more", self.rules_disabled.clone());
        r.register("replications", "Replication runs by outcome", self.replications.clone());
        r.register("replications_running", "Replications under way", self.replications_running.clone());
        r.register("replications_queued", "Replications waiting for their turn", self.replications_queued.clone());
        r.register("replication_duration_seconds", "Time of one replication run", self.replication_duration_seconds.clone());
        r.register("replication_docs_read", "Documents that replications read", self.replication_docs_read.clone());
        r.register("replication_docs_written", "Documents that replications wrote", self.replication_docs_written.clone());
        r.register(
            "replication_doc_write_failures",
            "Documents that targets refused",
            self.replication_doc_write_failures.clone(),
        );
        r.register(
            "replication_missing_checked",
            "Revisions that replications looked for in their targets",
            self.replication_missing_checked.clone(),
        );
        r.register("replication_missing_found", "Revisions that targets lacked", self.replication_missing_found.clone());
        r.register(
            "replication_bytes_read",
            "Bytes of documents and attachments that replications read",
            self.replication_bytes_read.clone(),
        );
        r.register("supervisor_restarts", "Children restarted by the supervisor", self.restarts.clone());
        r.register("rules", "Valid on_change documents", self.rules.clone());
        r.register("replicators", "Replicator documents by state, as in CouchDB's _scheduler/docs", self.replicators.clone());
        r.register("invalid_documents", "Documents of the spiegel database that cannot be used", self.invalid_documents.clone());
    }

    /// The page of `/metrics`, in the OpenMetrics text format.
    pub fn page(&self) -> String {
        let mut page = String::new();
        match prometheus_client::encoding::text::encode(&mut page, &self.registry) {
            Ok(()) => page,
            // Writing to a String cannot fail; an empty page is better than a crash if it ever does.
            Err(_) => String::new(),
        }
    }
}

/// From 1 ms to about 4 minutes: a webhook on the same host up to a large replication.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 4.0, 10))
}

fn routes(
    attempts: Family<AttemptLabels, Counter>,
    seconds: Family<RouteLabels, Histogram, fn() -> Histogram>,
) -> BoundedLabels<Route> {
    BoundedLabels::new(ROUTES_MAX, RULES_MAX, move |rule, host| {
        let (rule, host): (Arc<str>, Arc<str>) = (rule.into(), host.into());
        let of_class = |status_class| AttemptLabels { rule: rule.clone(), host: host.clone(), status_class };
        Route {
            attempts: STATUS_CLASSES.map(|class| attempts.get_or_create_owned(&of_class(class))),
            seconds: seconds.get_or_create_owned(&RouteLabels { rule: rule.clone(), host: host.clone() }),
        }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_rule_host_and_status_class() {
        let metrics = Metrics::new();
        for (rule, status) in
            [("a", Some(204)), ("a", Some(201)), ("a", Some(503)), ("b\"\n", None), ("a", Some(101)), ("a", Some(999))]
        {
            metrics.webhook_routes.of(rule, "h:80").observe(status, 0.01);
        }
        let page = metrics.page();
        for line in [
            r#"spiegel_webhook_attempts_total{rule="a",host="h:80",status_class="2xx"} 2"#,
            r#"spiegel_webhook_attempts_total{rule="a",host="h:80",status_class="4xx"} 0"#,
            r#"spiegel_webhook_attempts_total{rule="a",host="h:80",status_class="5xx"} 1"#,
            r#"spiegel_webhook_attempts_total{rule="a",host="h:80",status_class="other"} 2"#,
            r#"spiegel_webhook_attempts_total{rule="b\"\n",host="h:80",status_class="none"} 1"#,
            r#"spiegel_webhook_attempt_duration_seconds_count{rule="a",host="h:80"} 5"#,
        ] {
            assert!(page.contains(line), "{line}\n{page}");
        }
    }

    #[test]
    fn a_rule_with_a_million_hosts_makes_no_endless_page() {
        let metrics = Metrics::new();
        for n in 0..2_000 {
            metrics.webhook_routes.of(&format!("rule{n}"), &format!("host{n}:80")).observe(Some(200), 0.01);
        }
        let series = metrics.page().lines().filter(|line| line.starts_with("spiegel_webhook_attempt")).count();
        assert_eq!(series, (ROUTES_MAX + RULES_MAX + 1) * (STATUS_CLASSES.len() + 13));
    }
}
