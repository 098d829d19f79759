//! What a change costs before anything is sent: which rules of a thousand it concerns. In this process, without CouchDB.

use super::Bench;
use crate::report;
use anyhow::Context;
use serde_json::{Value, json};
use spiegel::couch::Row;
use spiegel::rules::catalogue::{Catalogue, Snapshot};
use spiegel::rules::document::Document;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Instant;

const RULES: usize = 1_000;
const HOSTS: usize = 10_000;
const CHANGES: usize = 500;
const ROUNDS: usize = 200;

pub fn measure(bench: &Bench) -> anyhow::Result<()> {
    // Each tenant has rules of its own, and its databases are changed one at a time.
    let of_tenants = snapshot(|n| format!("^tenant_{n}_"))?;
    one(bench, "matching", &of_tenants, 1, |n| format!("tenant_{}_orders", n % RULES))?;
    // The same, a page of a database at once.
    one(bench, "matching_page", &of_tenants, CHANGES, |_| String::from("tenant_17_orders"))?;
    // Every rule is for the one database, and the documents tell which.
    let of_one = snapshot(|_| String::from("^orders$"))?;
    one(bench, "matching_one_database", &of_one, CHANGES, |_| String::from("orders"))
}

fn one(bench: &Bench, name: &str, snapshot: &Snapshot, page: usize, db: impl Fn(usize) -> String) -> anyhow::Result<()> {
    let rows: Vec<Row> = (0..CHANGES).map(change).collect::<anyhow::Result<_>>()?;
    let dbs: Vec<String> = (0..CHANGES / page).map(db).collect();
    let mut matched = 0;
    let mut took = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let since = Instant::now();
        for (db, rows) in dbs.iter().zip(rows.chunks(page)) {
            let rules = black_box(snapshot).rules_of(db);
            for row in black_box(rows) {
                let doc = Document::of(row);
                matched += rules.matching(&doc).len();
            }
        }
        took.push(since.elapsed().as_secs_f64() * 1e6 / CHANGES as f64);
    }
    let each = matched as f64 / (ROUNDS * CHANGES) as f64;
    let value = report::percentile(&took, 0.5);
    let figures = json!({
        "value": value, "p90": report::percentile(&took, 0.9), "rules": RULES, "hosts": HOSTS, "rules_matched": report::rounded(each),
        "changes_of_a_database": page,
    });
    report::row(name, "µs a change", &bench.couchdb_version, &BTreeMap::new(), figures);
    Ok(())
}

fn snapshot(pattern: impl Fn(usize) -> String) -> anyhow::Result<Snapshot> {
    let mut catalogue = Catalogue::new(["spiegel"]);
    for n in 0..RULES {
        let condition = match n % 4 {
            0 => json!({ "type": format!("^kind_{n}$") }),
            1 => json!({ "type": format!("kind_{n}|kind_{}", n + 1), "customer.country": "^(DE|FR)$" }),
            2 => json!({ "type": format!("^kind_{n}$"), "cancelled": null }),
            _ => json!({ "type": format!("^kind_{n}_?.*$"), "lines.0.sku": "^A-[0-9]+$" }),
        };
        let rule = json!({
            "_id": format!("rule{n}"), "_rev": "1-a", "type": "on_change", "db_name": pattern(n), "if": condition,
            "url": format!("https://host{}.example.com/", n * HOSTS / RULES), "method": "POST", "params": { "change": "$change" },
        });
        catalogue.take(&row(&rule)?);
    }
    let snapshot = catalogue.snapshot();
    anyhow::ensure!(snapshot.rules().len() == RULES, "every rule is valid");
    Ok(snapshot)
}

/// About a kilobyte, with twenty attributes.
fn change(n: usize) -> anyhow::Result<Row> {
    let lines: Vec<Value> =
        (0..6).map(|line| json!({ "sku": format!("A-{line}"), "count": line, "price": 12.5, "name": "something" })).collect();
    let mut doc = json!({
        "_id": format!("order-{n}"), "_rev": "1-967a00dff5e02add41819138abb3284d", "created_at": "2026-01-31T12:00:00.000Z",
        "customer": { "name": "Anna", "country": "DE", "city": "Bremen", "street": "Am Wall 1", "tags": ["a", "b"] },
        "lines": lines, "total": 75.0, "currency": "EUR", "note": "Leave it with the neighbours, please: the bell is \"broken\".",
    });
    for extra in 0..12 {
        doc[format!("attribute_{extra}")] = json!(format!("value {extra}"));
    }
    // Behind all others: nothing is found early.
    doc["type"] = json!(format!("kind_{n}"));
    row(&doc)
}

fn row(doc: &Value) -> anyhow::Result<Row> {
    let row = json!({ "seq": 1, "id": doc["_id"], "changes": [{ "rev": "1-a" }], "doc": doc });
    serde_json::from_str(&row.to_string()).context("a row")
}
