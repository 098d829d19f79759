//! Changes that were read already ▶ webhooks of 1 KB: rules, requests and the webhook pool, in this process, with the receiver on
//! the same cores. Plain and signed take turns, so that the machine's moods fall on both.

use super::Bench;
use crate::program::{cpu_seconds_of, given_settings};
use crate::receiver::Receiver;
use crate::report::{self, rounded};
use anyhow::{Context, ensure};
use base64::Engine;
use ractor::Actor;
use serde_json::{Value, json};
use spiegel::config::{Sources, WebhookSettings};
use spiegel::couch::Row;
use spiegel::job::{DbName, Outcome};
use spiegel::rules::document::Document;
use spiegel::rules::rule::Rule;
use spiegel::schedule::{DispatcherArguments, DispatcherMsg, Job};
use spiegel::telemetry::Metrics;
use spiegel::vault::Vault;
use spiegel::webhook::{self, Delivery, HttpSender, WebhookPool};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

const DOCUMENT_BYTES: usize = 1024;
const BULK: usize = 1_000;
/// As `db.batch_size` has it.
const PAGE: usize = 500;
/// Pages under way at once, as of so many databases.
const PAGES_AT_ONCE: usize = 8;

pub async fn measure(bench: &Bench, documents: usize, rounds: usize) -> anyhow::Result<()> {
    let pages = Arc::new(read_pages(bench, documents).await?);
    let settings = settings()?;
    let key = format!("whsec_{}", base64::engine::general_purpose::STANDARD.encode([7; 32]));
    let vault = Vault::empty().with_secrets(&json!({ "key": key }).to_string())?;
    let receiver = Receiver::start()?;
    let mut document = bench.rule("deliveries", &receiver, json!({ "change": "$change" }));
    document["_id"] = Value::from("deliveries");
    let plain = Rule::parse(&document).map_err(|faults| anyhow::anyhow!("the rule: {faults:?}"))?;
    let mut signed = plain.clone();
    signed.handling.secret = Some("key".into());

    let mut rates: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let mut cpu: BTreeMap<&str, f64> = BTreeMap::new();
    // The first round only warms up.
    for round in 0..=rounds {
        for (name, rule) in [("plain", &plain), ("signed", &signed)] {
            receiver.forget();
            let sender = HttpSender::new(&settings, Arc::new(vault.clone()), Metrics::new())?;
            let before = cpu_seconds_of("self")?;
            let taken = deliver_all(sender, &settings, &vault, Arc::new(rule.clone()), &pages).await?;
            let (count, duplicates) = {
                let arrivals = receiver.arrivals();
                (arrivals.all.len(), arrivals.duplicates)
            };
            ensure!((count, duplicates) == (documents, 0), "{count} of {documents} came, {duplicates} twice");
            let rate = documents as f64 / taken.as_secs_f64();
            eprintln!("  {name}: {rate:.0}/s");
            if round > 0 {
                rates.entry(name).or_default().push(rounded(rate));
                *cpu.entry(name).or_default() += (cpu_seconds_of("self")? - before) / rounds as f64;
            }
        }
    }
    for (name, rates) in &rates {
        let figures = json!({
            "value": report::percentile(rates, 0.5),
            "rounds": rates,
            "documents": documents,
            "cpu_seconds_with_receiver": rounded(cpu.get(name).copied().unwrap_or_default()),
        });
        report::row(&format!("deliveries_{name}"), "deliveries/s", &bench.couchdb_version, &given_settings(), figures);
    }
    Ok(())
}

fn settings() -> anyhow::Result<WebhookSettings> {
    let sources = Sources { environment: given_settings(), ..Sources::default() };
    Ok(spiegel::config::load(sources).context("the settings")?.settings.webhook)
}

async fn read_pages(bench: &Bench, documents: usize) -> anyhow::Result<Vec<Vec<Row>>> {
    let (couch, dbs) = (&bench.couch, bench.dbs("deliveries", 1));
    couch.create_dbs(&dbs).await?;
    for start in (0..documents).step_by(BULK) {
        couch.bulk_docs(&dbs[0], (start..documents.min(start + BULK)).map(document).collect()).await?;
    }
    let rows = couch.changes_with_docs(&dbs[0]).await?;
    ensure!(rows.len() == documents, "{} of {documents} changes were read", rows.len());
    let rows: Vec<Row> = rows.into_iter().map(serde_json::from_value).collect::<Result<_, _>>()?;
    Ok(rows.chunks(PAGE).map(<[Row]>::to_vec).collect())
}

fn document(n: usize) -> Value {
    let mut doc = json!({ "_id": format!("doc{n:08}"), "type": "bench", "n": n, "text": "" });
    let missing = DOCUMENT_BYTES.saturating_sub(doc.to_string().len());
    doc["text"] = Value::from("x".repeat(missing));
    doc
}

async fn deliver_all(
    sender: HttpSender,
    settings: &WebhookSettings,
    vault: &Vault,
    rule: Arc<Rule>,
    pages: &Arc<Vec<Vec<Row>>>,
) -> anyhow::Result<Duration> {
    let arguments = DispatcherArguments { perform: Arc::new(sender), settings: settings.into() };
    let (pool, ended) = Actor::spawn(None, WebhookPool::new(), arguments).await.context("start the pool")?;
    let started = Instant::now();
    let readers = (0..PAGES_AT_ONCE).map(|nth| {
        let (pool, vault, rule, pages) = (pool.clone(), vault.clone(), rule.clone(), pages.clone());
        tokio::spawn(async move {
            let db: DbName = format!("db{nth}").into();
            for page in pages.iter().skip(nth).step_by(PAGES_AT_ONCE) {
                let (jobs, outcomes) = jobs(&vault, &rule, &db, page)?;
                pool.cast(DispatcherMsg::Submit(jobs)).context("submit a page")?;
                for outcome in outcomes {
                    let outcome = outcome.await.context("the pool is gone")?;
                    ensure!(outcome == Outcome::Done, "{outcome:?}");
                }
            }
            Ok(())
        })
    });
    for reader in futures_util::future::join_all(readers).await {
        reader??;
    }
    let taken = started.elapsed();
    pool.stop(None);
    ended.await.context("stop the pool")?;
    Ok(taken)
}

type Jobs = (Vec<Job<Delivery>>, Vec<oneshot::Receiver<Outcome>>);

fn jobs(vault: &Vault, rule: &Rule, db: &DbName, page: &[Row]) -> anyhow::Result<Jobs> {
    let (mut jobs, mut outcomes) = (Vec::with_capacity(page.len()), Vec::with_capacity(page.len()));
    for row in page {
        let delivery = webhook::delivery(vault, rule, db, "0", &Document::of(row), 0)?;
        let (waiter, outcome) = oneshot::channel();
        jobs.push((Arc::new(delivery), waiter));
        outcomes.push(outcome);
    }
    Ok((jobs, outcomes))
}
