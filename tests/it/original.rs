//! The commands of Node Spiegel's users, with their variables and with nothing else changed.

use crate::support::process::{Output, Spiegel, one_shot};
use crate::support::{Lab, SOON, eventually, tests_on};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

tests_on! {
    every: [
        install_and_uninstall_by_the_container_s_variables,
        install_and_uninstall_by_flags,
        every_type_of_service_runs_until_a_signal,
        nothing_installed_ends_a_service,
    ],
    // The commands name no database of the test's own.
    private: [the_tutorial_s_commands_do_what_it_says],
}

/// The image's command, where `docker run` names none.
const IMAGE: &[&str] = &["container"];
/// Docker gives 10 s.
const PROMPT: Duration = Duration::from_secs(6);

/// The variables of a `docker run -e …`, and names of the test's own.
fn variables(lab: &Lab, kind: &str, more: &[(&str, &str)]) -> BTreeMap<String, String> {
    let (url, db, namespace) = (lab.couch.url(), lab.spiegel_db(), lab.prefix.clone());
    let pairs = [("TYPE", kind), ("URL", &url), ("DB_NAME", &db), ("NAMESPACE", &namespace)];
    pairs.iter().chain(more).map(|(name, value)| (name.to_string(), value.to_string())).collect()
}

fn nothing() -> BTreeMap<String, String> {
    BTreeMap::new()
}

fn given(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
}

async fn ends_well(settings: &BTreeMap<String, String>, arguments: &[&str]) -> Output {
    let output = one_shot(settings, arguments).await;
    assert_eq!(output.code, 0, "{arguments:?} {settings:?}: {}", output.text);
    output
}

#[tokio::test]
async fn exit_codes_are_those_of_a_mistaken_command_line() {
    let url = ("URL", "http://admin:s3cret@127.0.0.1:1");
    let cases = [
        (given(&[("VERSION", "true")]), IMAGE, 0, env!("CARGO_PKG_VERSION")),
        (given(&[("VERSION", "true"), url, ("TYPE", "install")]), IMAGE, 0, env!("CARGO_PKG_VERSION")),
        (nothing(), &["--version=true"][..], 0, env!("CARGO_PKG_VERSION")),
        (nothing(), &["--type=instal", "--url=http://h"], 64, "did you mean install?"),
        (given(&[("TYPE", "update_listener"), url]), IMAGE, 64, "environment TYPE"),
        (given(&[("TYPE", "install")]), IMAGE, 64, "--url"),
        (nothing(), &["--type=replicator"], 64, "--url"),
        (nothing(), &["--type=replicator", "--url=http://h", "--concurency=5"], 64, "--concurrency"),
        (nothing(), &["--type=replicator", "--url=http://h", "--batch-size=5"], 64, "--batch-size"),
        (nothing(), &["--batch-size=5"], 64, "--type"),
        (nothing(), &["--batch-size=5", "run"], 64, "--batch-size"),
        (given(&[url]), &[], 64, "Usage"),
        (given(&[("TYPE", "replicator"), url, ("CONCURRENCY", "all")]), IMAGE, 78, "environment CONCURRENCY"),
        (nothing(), &["--type=change-listener", "--url=http://h", "--retry-after", "3h"], 78, "flag --retry-after"),
        (given(&[("TYPE", "install"), url]), IMAGE, 69, "127.0.0.1"),
        (given(&[("TYPE", "uninstall"), url]), &["--type=install"], 69, "127.0.0.1"),
    ];
    for (settings, arguments, code, text) in cases {
        let output = one_shot(&settings, arguments).await;
        assert_eq!(output.code, code, "{arguments:?} {settings:?}: {}", output.text);
        assert!(output.text.contains(text), "{arguments:?} {settings:?} does not name {text:?}: {}", output.text);
        assert!(!output.text.contains("s3cret"), "{}", output.text);
    }
}

async fn install_and_uninstall_by_the_container_s_variables(lab: Arc<Lab>) {
    for _ in 0..2 {
        ends_well(&variables(&lab, "install", &[]), IMAGE).await;
        assert!(lab.couch.exists(&lab.spiegel_db()).await);
        let sieve = format!("_design/{}sieve", lab.prefix);
        assert!(lab.couch.get("_global_changes", &sieve).await.is_some(), "NAMESPACE names the sieve");
    }
    ends_well(&variables(&lab, "uninstall", &[]), IMAGE).await;
    assert!(!lab.couch.exists(&lab.spiegel_db()).await);
}

async fn install_and_uninstall_by_flags(lab: Arc<Lab>) {
    let (url, db, namespace) = (format!("--url={}", lab.couch.url()), lab.spiegel_db(), format!("--namespace={}", lab.prefix));
    let given = [url.as_str(), "--db-name", &db, &namespace];
    // The variables of another command say nothing beside a flag.
    let settings = variables(&lab, "uninstall", &[("DB_NAME", "not-this-one")]);
    ends_well(&settings, &[&["--type=install"], &given[..]].concat()).await;
    assert!(lab.couch.exists(&lab.spiegel_db()).await);
    ends_well(&nothing(), &[&["/usr/local/bin/spiegel", "--type", "uninstall"], &given[..]].concat()).await;
    assert!(!lab.couch.exists(&lab.spiegel_db()).await);
}

async fn every_type_of_service_runs_until_a_signal(lab: Arc<Lab>) {
    ends_well(&variables(&lab, "install", &[]), IMAGE).await;
    let passwords = lab.settings()["SPIEGEL_PASSWORDS_FILE"].clone();
    let services = [
        ("update-listener", "INT", None),
        ("change-listener", "TERM", Some(&passwords)),
        ("replicator", "INT", Some(&passwords)),
    ];
    for (kind, signal, passwords) in services {
        let more: Vec<(&str, &str)> = passwords.map(|file| ("PASSWORDS_FILE", file.as_str())).into_iter().collect();
        let mut service = Spiegel::start_unready_as(variables(&lab, kind, &more), IMAGE);
        service.said(&["spiegel is running"]).await;
        service.signal(signal);
        let (status, took) = service.wait_end(PROMPT).await;
        assert_eq!(status.code(), Some(0), "{kind} after SIG{signal} and {took:?}");
        for line in service.lines() {
            let record: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{kind}: {line}: {error}"));
            let is_bunyan = record["name"] == "spiegel"
                && record["v"] == 0
                && ["hostname", "msg", "time"].iter().all(|field| record[*field].is_string())
                && ["pid", "level"].iter().all(|field| record[*field].is_u64());
            assert!(is_bunyan, "{kind}: {line}");
        }
    }
}

async fn nothing_installed_ends_a_service(lab: Arc<Lab>) {
    let output = one_shot(&variables(&lab, "update-listener", &[]), IMAGE).await;
    assert_eq!(output.code, 78, "{}", output.text);
    assert!(output.text.contains("install"), "{}", output.text);
    let started = async || lab.couch.exists(&lab.spiegel_db()).await.then_some(());
    ends_well(&variables(&lab, "install", &[]), IMAGE).await;
    eventually(SOON, "the database", started).await;
}

/// Exactly the tutorial's variables, two of each service, its two documents and a post.
async fn the_tutorial_s_commands_do_what_it_says(lab: Arc<Lab>) {
    let directory = tempfile::tempdir().expect("a directory");
    let passwords = |name: &str, user: &str, password: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, json!({ "127.0.0.1": { user: password } }).to_string()).expect("written");
        path.to_str().expect("text").to_string()
    };
    let for_api = passwords("change-listener-passwords.json", "user", "secret");
    let for_couch = passwords("replicator-passwords.json", &lab.couch.user, &lab.couch.password);
    let url = lab.couch.url();

    ends_well(&given(&[("TYPE", "install"), ("URL", &url)]), IMAGE).await;
    assert!(lab.couch.exists("spiegel").await);
    assert!(lab.couch.get("_global_changes", "_design/sieve").await.is_some());
    let services = [
        given(&[("TYPE", "update-listener"), ("URL", &url)]),
        given(&[("TYPE", "change-listener"), ("URL", &url), ("PASSWORDS_FILE", &for_api)]),
        given(&[("TYPE", "replicator"), ("URL", &url), ("PASSWORDS_FILE", &for_couch)]),
    ];
    let mut replicas: Vec<Spiegel> = services.iter().flat_map(|service| [service, service]).cloned().map(start).collect();
    for replica in &replicas {
        replica.said(&["spiegel is running"]).await;
    }
    for db in ["user_anna", "all_blog_posts"] {
        lab.couch.create(db).await;
    }
    let rule = json!({
        "type": "on_change", "db_name": "^all_blog_posts$", "url": lab.receiver.url_for_user("user", "/calc-stats"),
        "params": { "change": "$change" }, "method": "PUT", "debounce": true,
    });
    lab.couch.put("spiegel", "all_blog_posts_on_change", rule).await;
    let (source, target) = (lab.couch.url_for_user("user_anna"), lab.couch.url_for_user("all_blog_posts"));
    lab.couch.put("spiegel", "anna", json!({ "type": "replicator", "source": source, "target": target })).await;
    lab.couch.put("user_anna", "post", json!({ "title": "hello" })).await;

    let replicated = async || lab.couch.get("all_blog_posts", "post").await;
    eventually(SOON * 2, "the post among all posts", replicated).await;
    let told = async || lab.receiver.requests_at("/calc-stats").into_iter().find(|request| request.doc_id() == "post");
    let request = eventually(SOON * 2, "its statistics", told).await;
    assert_eq!(request.header("authorization"), "Basic dXNlcjpzZWNyZXQ=", "user:secret");
    for replica in &mut replicas {
        replica.stop().await;
    }
    ends_well(&given(&[("TYPE", "uninstall"), ("URL", &url)]), IMAGE).await;
    assert!(!lab.couch.exists("spiegel").await);
}

fn start(variables: BTreeMap<String, String>) -> Spiegel {
    Spiegel::start_unready_as(variables, IMAGE)
}
