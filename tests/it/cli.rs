//! The command line: exit codes, and commands that may be given twice.

use crate::support::process::{Spiegel, one_shot};
use crate::support::{Lab, OwnPort, SOON, eventually, tests_on};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

tests_on! {
    every: [
        install_and_uninstall_may_be_given_twice,
        install_leaves_what_is_there,
        run_without_install_says_what_to_do,
        a_wrong_password_is_bad_config,
        the_admin_pages_answer,
        check_names_what_is_wrong,
        rules_are_listed_with_what_is_wrong,
    ],
}

fn nothing() -> BTreeMap<String, String> {
    BTreeMap::new()
}

fn with(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(key, value)| (format!("SPIEGEL_{key}"), value.to_string())).collect()
}

#[tokio::test]
async fn exit_codes_tell_what_went_wrong() {
    let nobody = OwnPort::new();
    let gone = format!("http://admin:secret@127.0.0.1:{}", nobody.number);
    let cases = [
        (nothing(), &["--help"][..], 0, "Usage"),
        (nothing(), &["--version"], 0, env!("CARGO_PKG_VERSION")),
        (nothing(), &["version"], 0, env!("CARGO_PKG_VERSION")),
        (nothing(), &[], 64, "Usage"),
        (nothing(), &["no-such-command"], 64, "no-such-command"),
        (nothing(), &["rules"], 64, "Usage"),
        (nothing(), &["rules", "test", "x"], 64, "--doc"),
        (nothing(), &["rules", "test", "-", "--doc", "-"], 64, "standard input"),
        (nothing(), &["rules", "test", "/no/such/rule", "--doc", "-"], 65, "/no/such/rule"),
        (nothing(), &["run", "--no-such-flag"], 64, "--no-such-flag"),
        (with(&[("FEED_HEARTBEAT", "a week")]), &["run"], 78, "feed.heartbeat"),
        (with(&[("NO_SUCH_KEY", "1")]), &["run"], 78, "SPIEGEL_NO_SUCH_KEY"),
        (with(&[("COUCHDB_URL", "nonsense")]), &["run"], 78, "couchdb.url"),
        (with(&[("DB_NAME", "Not/Legal!")]), &["install"], 78, "db_name"),
        (with(&[("PASSWORDS_FILE", "/no/such/file")]), &["run"], 78, "/no/such/file"),
        (with(&[("CONFIG", "/no/such/config.toml")]), &["run"], 78, "/no/such/config.toml"),
        (with(&[("COUCHDB_URL", &gone)]), &["install"], 69, "127.0.0.1"),
        (with(&[("COUCHDB_URL", &gone)]), &["uninstall"], 69, "127.0.0.1"),
        (with(&[("COUCHDB_URL", &gone)]), &["check"], 69, "127.0.0.1"),
        (with(&[("COUCHDB_URL", &gone)]), &["rules", "list"], 69, "127.0.0.1"),
        (with(&[("COUCHDB_URL", &gone), ("ADMIN_LISTEN", "")]), &["status"], 69, "127.0.0.1"),
    ];
    for (settings, arguments, code, text) in cases {
        let output = one_shot(&settings, arguments).await;
        assert_eq!(output.code, code, "{arguments:?} {settings:?}: {}", output.text);
        assert!(output.text.contains(text), "{arguments:?} {settings:?} does not name {text:?}: {}", output.text);
    }
}

#[tokio::test]
async fn a_config_file_is_read_and_its_errors_name_the_key() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("spiegel.toml");
    std::fs::write(&file, "db_name = \"x\"\n[feed]\nheartbeet = \"5s\"\nsweep_interval = 7\n").expect("written");
    let output = one_shot(&with(&[("CONFIG", file.to_str().expect("text"))]), &["run"]).await;
    assert_eq!(output.code, 78);
    assert!(output.text.contains("heartbeet") && output.text.contains("feed.sweep_interval"), "{}", output.text);
}

#[tokio::test]
async fn a_rule_is_tried_without_couchdb() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = |name: &str, content: Value| {
        let path = directory.path().join(name);
        std::fs::write(&path, content.to_string()).expect("written");
        path.to_str().expect("text").to_string()
    };
    let rule = json!({
        "type": "on_change", "db_name": "^posts$", "url": "http://me@api.example/${change.id}", "method": "POST", "if": { "type": "post" },
        "params": { "title": "$change.doc.title" }, "headers": { "x-key": { "secret": "key" } }, "secret": "orders", "debonce": true,
    });
    let broken = file("broken", json!({ "type": "on_change", "url": "http://me:s3cret@[", "batch": 5 }));
    let (rule, post) = (file("rule", rule), file("post", json!({ "_id": "a b", "type": "post", "title": "x" })));
    let page = file("page", json!({ "_id": "a", "type": "page" }));
    // Nothing of it is asked for: bad settings do not matter.
    let settings = with(&[("COUCHDB_URL", "nonsense")]);
    let cases: [(&[&str], i32, &[&str]); 4] = [
        (
            &[&rule, "--doc", &post, "--db", "posts"],
            0,
            &[
                "POST http://api.example/a%20b",
                "[password of \"me\"]",
                "x-key: [secret key]",
                "webhook-id: msg_",
                "[signed with secret orders]",
                "\"title\": \"x\"",
                "did you mean",
            ],
        ),
        (&[&rule, "--doc", &page], 1, &["sends nothing", "if.type"]),
        (&[&rule, "--doc", &post, "--db", "pages", "--deleted"], 1, &["db_name", "pages"]),
        (&[&broken, "--doc", &post], 65, &["db_name is missing", "url is not a URL", "batch must be an object"]),
    ];
    for (arguments, code, texts) in cases {
        let output = one_shot(&settings, &[&["rules", "test"], arguments].concat()).await;
        assert_eq!(output.code, code, "{arguments:?}: {}", output.text);
        for text in texts {
            assert!(output.text.contains(text), "{arguments:?} does not say {text:?}: {}", output.text);
        }
        assert!(!output.text.contains("s3cret"), "{}", output.text);
    }
}

async fn install_and_uninstall_may_be_given_twice(lab: Arc<Lab>) {
    for _ in 0..2 {
        let output = lab.run(&["install"]).await;
        assert_eq!(output.code, 0, "{}", output.text);
    }
    assert!(lab.couch.exists(&lab.spiegel_db()).await);
    let revs = lab.couch.all(&lab.spiegel_db()).await;
    assert!(revs.values().all(|rev| rev.starts_with("1-")), "the second install wrote nothing: {revs:?}");
    for _ in 0..2 {
        let output = lab.run(&["uninstall"]).await;
        assert_eq!(output.code, 0, "{}", output.text);
        assert!(!lab.couch.exists(&lab.spiegel_db()).await);
    }
    let rows = lab.couch.all("_global_changes").await;
    assert!(!rows.keys().any(|id| id.starts_with("_design/") && id.contains(&lab.prefix)), "the sieve is gone");
}

async fn install_leaves_what_is_there(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    let rev = lab.rule("rule", &db, "/hook", json!({})).await;
    lab.install().await;
    assert_eq!(lab.couch.get(&lab.spiegel_db(), "rule").await.expect("the rule")["_rev"], json!(rev));
}

async fn run_without_install_says_what_to_do(lab: Arc<Lab>) {
    // The same test runs against other servers at the same time, and a port is one process's.
    let output = one_shot(&lab.settings_with(&[("ADMIN_LISTEN", "")]), &["run"]).await;
    assert_eq!(output.code, 78, "{}", output.text);
    assert!(output.text.contains("install"), "{}", output.text);
}

async fn a_wrong_password_is_bad_config(lab: Arc<Lab>) {
    // Not the admin's name: CouchDB locks a name for minutes after a few wrong passwords, for everybody.
    let wrong = format!("http://{}:wrong@127.0.0.1:{}", lab.prefix, lab.couch.port());
    for command in ["install", "check", "status", "uninstall"] {
        let output = one_shot(&lab.settings_with(&[("COUCHDB_URL", &wrong), ("ADMIN_LISTEN", "")]), &[command]).await;
        assert_eq!(output.code, 78, "{command}: {}", output.text);
        assert!(!output.text.contains("wrong@"), "{}", output.text);
    }
}

async fn the_admin_pages_answer(lab: Arc<Lab>) {
    let db = lab.create("posts").await;
    let spiegel = lab.spiegel().await;
    lab.rule("rule", &db, "/hook", json!({})).await;
    lab.couch.put(&db, "x", json!({})).await;
    eventually(SOON, "a delivery", async || (lab.receiver.count("/hook") > 0).then_some(())).await;
    for path in ["/live", "/ready", "/metrics", "/status"] {
        let (status, page) = spiegel.page(path).await.expect("an answer");
        assert_eq!(status, 200, "{path}: {page}");
    }
    let status: Value = serde_json::from_str(&spiegel.page("/status").await.expect("an answer").1).expect("JSON");
    assert!(status.is_object(), "{status}");
    assert!(spiegel.metric("webhook_deliveries").await >= 1.0);
    assert!(spiegel.metric("feed_connected").await >= 1.0);
    assert!(spiegel.metric("rules").await >= 1.0);
}

async fn check_names_what_is_wrong(lab: Arc<Lab>) {
    lab.install().await;
    let output = lab.run(&["check"]).await;
    assert_eq!(output.code, 0, "{}", output.text);
    lab.rule_on("matches_nothing", "^_user$", "/x", json!({})).await;
    lab.spiegel_doc("broken_rule", json!({ "type": "on_change", "db_name": 7 })).await;
    let output = lab.run(&["check"]).await;
    assert!(output.text.contains("matches_nothing") && output.text.contains("broken_rule"), "{}", output.text);
}

async fn rules_are_listed_with_what_is_wrong(lab: Arc<Lab>) {
    assert_eq!(lab.run(&["rules", "list"]).await.code, 78, "nothing is installed");
    lab.install().await;
    let output = lab.run(&["rules", "list"]).await;
    assert!(output.code == 0 && output.text.contains("no rules yet"), "{}", output.text);
    lab.spiegel_doc("good", json!({ "type": "on_change", "db_name": "^a$", "url": "http://u:s3cret@h/x", "slector": {} })).await;
    lab.spiegel_doc("bad", json!({ "type": "on_change", "db_name": 7, "url": "http://h/", "order": "none" })).await;
    lab.spiegel_doc("other", json!({ "type": "replicator", "source": "a", "target": "b" })).await;
    let output = lab.run(&["rules", "list"]).await;
    assert_eq!(output.code, 0, "{}", output.text);
    let line = |start: &str| output.text.lines().find(|line| line.starts_with(start)).unwrap_or_default().to_string();
    assert!(line("good").contains("GET") && line("good").ends_with("valid"), "{}", output.text);
    assert!(line("bad").contains("invalid: db_name must be") && line("bad").contains("order must be"), "{}", output.text);
    assert!(!output.text.contains("other") && !output.text.contains("s3cret"), "{}", output.text);
    let output = lab.run(&["check"]).await;
    assert!(output.text.contains("did you mean \"selector\""), "{}", output.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn run_waits_for_a_couchdb_that_is_not_there_yet() {
    let nobody = OwnPort::new();
    let url = format!("http://admin:secret@127.0.0.1:{}", nobody.number);
    let mut spiegel = Spiegel::start_unready(with(&[("COUCHDB_URL", &url), ("LOG_FORMAT", "json")]));
    spiegel.said(&["waiting for it"]).await;
    assert!(spiegel.is_alive());
    spiegel.signal("TERM");
    let (status, _) = spiegel.wait_end(Duration::from_secs(5)).await;
    assert_eq!(status.code(), Some(0));
}
