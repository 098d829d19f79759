//! One large attachment: how long it takes, and what memory the program needs for it.

use super::Bench;
use crate::program::Program;
use crate::report::rounded;
use crate::sides::{self, Side, requests_since};
use anyhow::{Context, ensure};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::time::{Duration, Instant};

const ROUND_MAX: Duration = Duration::from_secs(1_800);

pub async fn measure(bench: &Bench, sides: &[Side], megabytes: u64) -> anyhow::Result<()> {
    let couch = &bench.couch;
    let name = |what: &str| format!("{}_attachment_{what}", bench.prefix);
    let source = name("source");
    couch.create_db(&source).await?;
    couch.put_attachment(&source, "large", megabytes * 1024 * 1024).await?;
    eprintln!("  an attachment of {megabytes} MB is there");
    let expected = told_of(&couch.doc(&source, "large").await?);
    let mut figures = Vec::new();
    if sides.contains(&Side::Native) {
        let program = Program::start(bench, "attachment", &[Side::Native.engine()]).await?;
        let (at_start, requests, cpu) = (program.memory_mb("VmHWM")?, program.requests().await?, program.cpu_seconds()?);
        let target = name("native");
        couch.create_db(&target).await?;
        let mut watch = couch.watch(std::slice::from_ref(&target)).await?;
        let replicator = json!({ "type": "replicator", "source": couch.db_url(&source), "target": couch.db_url(&target) });
        let started = Instant::now();
        couch.put_doc(&program.spiegel_db, "replicator", replicator).await?;
        let arrived = watch.last_of(HashSet::from([(0, String::from("large"))]), ROUND_MAX).await?;
        program.wait_until_settled(ROUND_MAX).await?;
        ensure!(told_of(&couch.doc(&target, "large").await?) == expected, "the attachment is another one");
        let of_side = json!({
            "value": rounded(arrived.duration_since(started).as_secs_f64()),
            "rss_at_start_mb": rounded(at_start),
            "rss_peak_mb": rounded(program.memory_mb("VmHWM")?),
            "cpu_seconds": rounded(program.cpu_seconds()? - cpu),
            "requests_by_endpoint": requests_since(&requests, &program.requests().await?),
            "replications": program.replications().await?,
        });
        figures.push((Side::Native.name(), of_side));
        program.stop().await?;
        couch.delete_db(&target).await?;
    }
    if sides.contains(&Side::Couchdb) {
        let target = name("replicate");
        couch.create_db(&target).await?;
        let started = Instant::now();
        couch.replicate(&source, &target).await.context("_replicate")?;
        let seconds = started.elapsed().as_secs_f64();
        ensure!(told_of(&couch.doc(&target, "large").await?) == expected, "the attachment is another one");
        figures.push(("_replicate", json!({ "value": rounded(seconds) })));
        couch.delete_db(&target).await?;
    }
    sides::report(bench, "attachment", "s", json!({ "megabytes": megabytes }), &figures);
    couch.delete_db(&source).await
}

fn told_of(doc: &Value) -> (Value, Value, Value) {
    let attachment = &doc["_attachments"]["attachment"];
    (doc["_rev"].clone(), attachment["length"].clone(), attachment["digest"].clone())
}
