//! No secret leaves the vault: not in a log line, an error text, a metric, a page, or a document.

use crate::support::couch::encode;
use crate::support::lab::run_on;
use crate::support::process::one_shot;
use crate::support::{Answer, Fault, Kind, Lab, OwnPort, Proxy, SOON, eventually};
use base64::Engine;
use serde_json::json;
use std::sync::Arc;

const COUCHDB_PASSWORD: &str = "p@ss:w/rd%+ü";
const API_PASSWORD: &str = "s3cr?t/&#%20\"'";
const INLINE_PASSWORD: &str = "in:line/p%ss";
const WRONG_PASSWORD: &str = "wr0ng:p@ss/w%rd";

/// The forms in which a secret could be read again.
fn forms(user: &str, secret: &str) -> Vec<String> {
    let base64 = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let mut forms = vec![
        secret.to_string(),
        encode(secret),
        encode(secret).to_lowercase(),
        serde_json::to_string(secret).unwrap().trim_matches('"').to_string(),
        serde_json::to_string(&json!(secret).to_string()).unwrap().trim_matches('"').to_string(),
        url::form_urlencoded::byte_serialize(secret.as_bytes()).collect(),
        base64(secret).trim_end_matches('=').to_string(),
        base64(&format!("{user}:{secret}")).trim_end_matches('=').to_string(),
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(format!("{user}:{secret}")),
    ];
    let mut url = url::Url::parse("http://h/").unwrap();
    url.set_password(Some(secret)).unwrap();
    forms.push(url.password().unwrap().to_string());
    forms
}

struct Search {
    forms: Vec<String>,
}

impl Search {
    fn assert_clean(&self, place: &str, text: &str) {
        for line in text.lines() {
            for form in &self.forms {
                assert!(!line.contains(form.as_str()), "{place} shows {form:?}: {line}");
            }
        }
    }
}

#[test]
fn embedded() {
    run_on(Kind::Embedded, "secrets", ("admin", COUCHDB_PASSWORD), |lab| async {
        no_secret_is_shown(lab, COUCHDB_PASSWORD).await
    });
}

#[test]
fn pouchdb() {
    run_on(Kind::PouchDb, "secrets", ("admin", COUCHDB_PASSWORD), |lab| async {
        no_secret_is_shown(lab, COUCHDB_PASSWORD).await
    });
}

/// Its own password is too plain a word to search for (`secret`).
#[test]
fn couchdb() {
    run_on(Kind::CouchDb, "secrets", ("", ""), |lab| async { no_secret_is_shown(lab, API_PASSWORD).await });
}

async fn no_secret_is_shown(lab: Arc<Lab>, couchdb_password: &str) {
    let mut forms = forms("admin", couchdb_password);
    for (user, secret) in [("apiuser", API_PASSWORD), ("inline", INLINE_PASSWORD), (&lab.prefix, WRONG_PASSWORD)] {
        forms.extend(self::forms(user, secret));
    }
    let search = Search { forms };
    lab.add_password("127.0.0.1", "apiuser", API_PASSWORD);
    lab.add_password("unreachable.invalid", "apiuser", API_PASSWORD);
    lab.install().await;
    let (db, target) = (lab.create("posts").await, lab.create("target").await);
    let inline = encode(INLINE_PASSWORD);
    let nobody = OwnPort::new();
    let port = nobody.number;
    let url = |text: String| json!({ "url": text });
    lab.rule("good", &db, "/good", url(lab.receiver.url_for_user("apiuser", "/good"))).await;
    lab.rule("dead", &db, "/dead", url(lab.receiver.url_for_user("apiuser", "/dead"))).await;
    lab.rule("inline", &db, "/inline", url(lab.receiver.url_for_user(&format!("inline:{inline}"), "/inline"))).await;
    lab.rule("gone", &db, "/x", url(format!("http://inline:{inline}@127.0.0.1:{port}/x"))).await;
    lab.rule("nowhere", &db, "/x", url("http://apiuser@unreachable.invalid/x".into())).await;
    lab.rule("broken", &db, "/x", url(format!("http://inline:{inline}@127.0.0.1:port/x"))).await;
    lab.rule("unknown", &db, "/x", url("http://stranger@127.0.0.1:1/x".into())).await;
    lab.receiver.answer("/dead", Answer::status(500));

    lab.replicator("copy", &db, &target, json!({})).await;
    lab.replicator("missing", &db, &lab.name("missing"), json!({})).await;
    // Not the admin's name: CouchDB locks a name for minutes after a few wrong passwords, for everybody.
    let nobody = lab.prefix.clone();
    let wrong = format!("http://{nobody}:{}@127.0.0.1:{}/{}", encode(WRONG_PASSWORD), lab.couch.port(), encode(&target));
    lab.replicator("wrong", &db, &target, json!({ "target": wrong })).await;
    let gone = format!("http://inline:{inline}@127.0.0.1:{port}/x");
    lab.replicator("gone target", &db, &target, json!({ "target": gone })).await;
    lab.replicator("broken target", &db, &target, json!({ "target": format!("http://inline:{inline}@127.0.0.1:port/x") })).await;

    let proxy = Proxy::start(&lab.couch.base).await;
    let url = lab.couch.at(&proxy.base()).url();
    let mut spiegel = lab.spiegel_with(&[("COUCHDB_URL", &url), ("LOG_LEVEL", "trace")]).await;
    lab.couch.fill(&db, "d", 5).await;
    eventually(SOON, "deliveries with a password", async || (lab.receiver.delivered("/good").len() == 5).then_some(())).await;
    eventually(SOON, "deliveries with an inline password", async || (lab.receiver.delivered("/inline").len() == 5).then_some(()))
        .await;
    eventually(SOON * 2, "a replication with a password", async || (lab.couch.all(&target).await.len() == 5).then_some(())).await;
    eventually(SOON, "failures", async || (lab.receiver.count("/dead") > 2).then_some(())).await;

    // They did get their passwords.
    let basic = |user: &str, secret: &str| {
        format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{secret}")))
    };
    assert_eq!(lab.receiver.requests_at("/good")[0].header("authorization"), basic("apiuser", API_PASSWORD));
    assert_eq!(lab.receiver.requests_at("/inline")[0].header("authorization"), basic("inline", INLINE_PASSWORD));

    for fault in [
        Fault::Answer { status: 401, body: r#"{"error":"unauthorized","reason":"Name or password is incorrect."}"#.into() },
        Fault::Answer { status: 200, body: "nonsense".into() },
        Fault::Refuse,
    ] {
        proxy.set(fault);
        let lines = spiegel.lines().len();
        eventually(SOON, "it says something", async || (spiegel.lines().len() > lines).then_some(())).await;
        for path in ["/status", "/metrics", "/ready", "/live"] {
            if let Some((_, page)) = spiegel.page(path).await {
                search.assert_clean(path, &page);
            }
        }
        proxy.heal();
        let ready = async || spiegel.page("/ready").await.is_some_and(|(status, _)| status == 200).then_some(());
        eventually(SOON, "it is ready again", ready).await;
    }
    for path in ["/status", "/metrics"] {
        search.assert_clean(path, &spiegel.page(path).await.expect("a page").1);
    }

    // What the commands print, with the right password and with a wrong one, for a server that is there and one that is not.
    let wrong_url = format!("http://{nobody}:{}@127.0.0.1:{}", encode(WRONG_PASSWORD), lab.couch.port());
    let gone_url = format!("http://admin:{}@127.0.0.1:{port}", encode(WRONG_PASSWORD));
    let bad_url = format!("http://admin:{WRONG_PASSWORD}@[not a host");
    for couchdb_url in [lab.couch.url(), wrong_url, gone_url, bad_url] {
        let settings = lab.settings_with(&[("COUCHDB_URL", &couchdb_url), ("LOG_LEVEL", "trace"), ("ADMIN_LISTEN", "")]);
        for arguments in
            [&["check"][..], &["status"], &["install"], &["run", "--no-such-flag"], &["check", "--url", &couchdb_url]]
        {
            let output = one_shot(&settings, arguments).await;
            search.assert_clean(&format!("{arguments:?}"), &output.text);
        }
    }

    spiegel.stop().await;
    search.assert_clean("the log", &spiegel.lines().join("\n"));

    // And what Spiegel wrote: everything but the documents that hold an inline password by their author's will.
    for own in lab.couch.all_dbs().await.into_iter().filter(|own| own.starts_with(&lab.spiegel_db())) {
        for id in lab.couch.all(&own).await.into_keys() {
            if ["inline", "gone", "broken", "wrong", "gone target", "broken target"].contains(&id.as_str())
                && own == lab.spiegel_db()
            {
                continue;
            }
            let doc = lab.couch.get(&own, &id).await.unwrap_or_default();
            search.assert_clean(&format!("{own} {id}"), &doc.to_string());
        }
    }
}
