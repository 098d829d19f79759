//! Deliveries that failed, as a person handles them: on the command line and over the admin API.

use crate::support::couch::encode;
use crate::support::process::one_shot;
use crate::support::{Answer, Kind, Lab, SOON, Spiegel, eventually, tests_on};
use reqwest::Method;
use serde_json::{Value, json};
use spiegel::deliveries::parked::{Disabled, Key};
use spiegel::job::timestamp;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

tests_on! {
    every: [
        install_makes_the_database_and_uninstall_removes_it,
        a_database_of_somebody_elses_is_left_alone,
        without_a_delivery_every_command_says_so,
        a_list_shows_what_matches,
        one_is_shown_whole,
        retry_and_drop_write_what_the_process_follows,
        what_is_meant_must_be_said,
        a_rule_is_enabled,
        names_from_users_move_no_cursor,
        the_database_tells_how_many_there_are,
        the_api_lists_and_acts,
        the_api_needs_an_admin,
        the_running_process_follows,
    ],
    embedded: [
        more_than_a_page_is_read_and_written_in_pages,
        a_conflict_is_read_again,
    ],
}

fn deliveries_db(lab: &Lab) -> String {
    format!("{}_deliveries", lab.spiegel_db())
}

fn id_of(rule: &str, db: &str, doc: &str) -> String {
    Key::of(rule, db, doc).doc_id()
}

fn delivery(rule: &str, db: &str, doc: &str, state: &str, status: Option<u16>) -> Value {
    let (next, ended) = match state {
        "parked" => (Some(String::from("2130-01-31T12:00:00.000Z")), None),
        // What ended long ago is not kept.
        _ => (None, Some(timestamp(SystemTime::now()))),
    };
    json!({
        "_id": id_of(rule, db, doc), "type": "delivery", "state": state, "rule": rule, "db_name": db, "doc_id": doc,
        "rev": "3-abc", "seq": "12-x", "instance_start_time": "1700000000", "attempts": 4, "retries": 1,
        "first_failed_at": "2026-01-30T12:00:00.000Z", "last_attempt_at": "2026-01-30T12:00:01.000Z",
        "next_attempt_at": next, "ended_at": ended, "last_status": status, "last_error": "answered no",
        "last_answer": "busy", "reason": null, "claimed_by": null, "note": "kept",
    })
}

/// Five of three rules, and a disabled rule.
async fn fill(lab: &Lab) {
    lab.install().await;
    let db = deliveries_db(lab);
    let docs = vec![
        delivery("mail", "user_a", "1", "parked", Some(503)),
        delivery("mail", "user_a", "2", "dead", Some(404)),
        delivery("mail", "user_b", "1", "parked", None),
        delivery("sms", "user_a", "1", "parked", Some(500)),
        delivery("old", "user_a", "1", "dropped", Some(503)),
        Disabled::document("gone/rule", "2-b", "user_a", "answered 410", SystemTime::UNIX_EPOCH + Duration::from_secs(1)),
    ];
    lab.couch.bulk(&db, docs).await;
}

async fn state_of(lab: &Lab, rule: &str, db: &str, doc: &str) -> Value {
    lab.couch.get(&deliveries_db(lab), &id_of(rule, db, doc)).await.expect("a delivery")
}

async fn states(lab: &Lab) -> Vec<String> {
    let mut states = Vec::new();
    for (rule, db, doc) in [
        ("mail", "user_a", "1"),
        ("mail", "user_a", "2"),
        ("mail", "user_b", "1"),
        ("sms", "user_a", "1"),
        ("old", "user_a", "1"),
    ] {
        states.push(state_of(lab, rule, db, doc).await["state"].as_str().expect("text").to_string());
    }
    states
}

async fn install_makes_the_database_and_uninstall_removes_it(lab: Arc<Lab>) {
    let db = deliveries_db(&lab);
    for _ in 0..2 {
        let output = lab.run(&["install"]).await;
        assert_eq!(output.code, 0, "{}", output.text);
        assert!(output.text.contains(&db), "{}", output.text);
        let (_, security) = lab.couch.ask(Method::GET, &format!("{}/_security", encode(&db)), None).await;
        assert_eq!(security["members"]["roles"], json!(["_admin"]), "{security}");
    }
    let output = lab.run(&["check"]).await;
    assert!(output.text.contains(&format!("ok    database \"{db}\"")), "{}", output.text);
    lab.couch.delete(&db).await;
    let output = lab.run(&["check"]).await;
    assert!(output.text.contains(&format!("warn  database \"{db}\": is missing")), "{}", output.text);
    assert_eq!(output.code, 0, "{}", output.text);
    fill(&lab).await;
    for said in ["removed   database", "missing   database"] {
        let output = lab.run(&["uninstall"]).await;
        assert_eq!(output.code, 0, "{}", output.text);
        assert!(output.text.contains(&format!("{said} \"{db}\"")), "{}", output.text);
        assert!(!lab.couch.exists(&db).await);
    }
}

async fn a_database_of_somebody_elses_is_left_alone(lab: Arc<Lab>) {
    let db = deliveries_db(&lab);
    lab.couch.create(&db).await;
    lab.couch.put(&db, "delivery:2026-01", json!({ "type": "delivery", "parcel": 7 })).await;
    let path = format!("{}/_security", encode(&db));
    let security = json!({ "admins": { "names": [], "roles": [] }, "members": { "names": ["bob"], "roles": [] } });
    lab.couch.ask(Method::PUT, &path, Some(security)).await;
    let output = lab.run(&["install"]).await;
    assert!(output.text.contains("choose another db_name"), "{}", output.text);
    let (_, security) = lab.couch.ask(Method::GET, &path, None).await;
    assert_eq!(security["members"]["names"], json!(["bob"]));
    let output = lab.run(&["check"]).await;
    assert!(output.text.contains("choose another db_name"), "{}", output.text);
    let output = lab.run(&["uninstall"]).await;
    assert!(output.text.contains("left      database"), "{}", output.text);
    assert!(lab.couch.get(&db, "delivery:2026-01").await.is_some());
}

async fn without_a_delivery_every_command_says_so(lab: Arc<Lab>) {
    let listed = lab.run(&["deliveries", "list"]).await;
    assert_eq!(listed.code, 78, "there is no spiegel database: {}", listed.text);
    lab.install().await;
    for is_there in [true, false] {
        if !is_there {
            lab.couch.delete(&deliveries_db(&lab)).await;
        }
        for (arguments, code, text) in [
            (&["list"][..], 0, "no delivery has failed"),
            (&["list", "--rule", "mail"], 0, "no delivery matches"),
            (&["list", "--json"], 0, ""),
            (&["show", "0123456789abcdef"], 1, "no such delivery"),
            (&["show", "--rule", "r", "--db", "d", "--doc", "x"], 1, "no such delivery"),
            (&["retry", "--all"], 0, "nothing was written"),
            (&["retry", "--rule", "r", "--db", "d", "--doc", "x"], 0, "nothing was written"),
            (&["drop", "--all", "--dry-run"], 0, "would be dropped: 0"),
            (&["drop", "0123456789abcdef"], 1, "no such delivery"),
        ] {
            let output = lab.run(&[&["deliveries"], arguments].concat()).await;
            assert_eq!(output.code, code, "{arguments:?}: {}", output.text);
            assert!(output.text.contains(text), "{arguments:?}: {}", output.text);
        }
    }
}

async fn a_list_shows_what_matches(lab: Arc<Lab>) {
    fill(&lab).await;
    let all = lab.run(&["deliveries", "list"]).await.text;
    for text in
        ["mail", "sms", "user_b", "503", "answered no", "deliveries: 3 parked, 1 dead, 1 dropped", "gone/rule", "answered 410"]
    {
        assert!(all.contains(text), "{text} is not in\n{all}");
    }
    let ended = state_of(&lab, "mail", "user_a", "2").await["ended_at"].as_str().expect("a time").to_string();
    assert!(all.contains("2130-01-31T12:00:00.000Z") && all.contains(&ended), "{all}");
    for (arguments, expected) in [
        (&["--rule", "mail"][..], 3),
        (&["--rule", "mail", "--db", "user_a"], 2),
        (&["--doc", "1"], 4),
        (&["--state", "dead"], 1),
        (&["--status", "503"], 2),
        (&["--status", "5xx"], 3),
        (&["--status", "none"], 1),
        (&["--status", "5xx", "--state", "parked"], 2),
        (&["--rule", "mail", "--db", "user_a", "--doc", "2"], 1),
        (&["--rule", "mail", "--db", "user_a", "--doc", "2", "--state", "parked"], 0),
        (&["--rule", "nobody"], 0),
        (&["--limit", "2"], 2),
        (&["--limit", "0"], 6),
        (&[], 6),
        (&["--rule", "gone/rule"], 1),
    ] {
        let output = lab.run(&[&["deliveries", "list", "--json"], arguments].concat()).await;
        assert_eq!(output.code, 0, "{}", output.text);
        let docs: Vec<Value> = output.text.lines().map(|line| serde_json::from_str(line).expect("a document a line")).collect();
        assert_eq!(docs.len(), expected, "{arguments:?}");
        assert!(docs.iter().all(|doc| doc["_rev"].is_string()));
    }
    let limited = lab.run(&["deliveries", "list", "--limit", "2"]).await.text;
    assert!(limited.contains("2 of 5 are shown") && limited.contains("3 parked"), "{limited}");
}

async fn one_is_shown_whole(lab: Arc<Lab>) {
    fill(&lab).await;
    let id = id_of("mail", "user_a", "2");
    let short = &id["delivery:".len()..][..12];
    for arguments in [&[id.as_str()][..], &[short], &["--rule", "mail", "--db", "user_a", "--doc", "2"]] {
        let output = lab.run(&[&["deliveries", "show"], arguments].concat()).await;
        assert_eq!(output.code, 0, "{}", output.text);
        let shown: Value = serde_json::from_str(&output.text).expect("a document");
        assert_eq!(shown, state_of(&lab, "mail", "user_a", "2").await);
    }
}

async fn retry_and_drop_write_what_the_process_follows(lab: Arc<Lab>) {
    fill(&lab).await;
    let before = state_of(&lab, "mail", "user_a", "1").await;
    let output = lab.run(&["deliveries", "drop", "--rule", "mail", "--dry-run"]).await;
    assert!(output.text.contains("would be dropped: 3"), "{}", output.text);
    assert_eq!(state_of(&lab, "mail", "user_a", "1").await, before, "a dry run writes nothing");

    let output = lab.run(&["deliveries", "drop", "--rule", "mail", "--db", "user_a"]).await;
    assert!(output.code == 0 && output.text.contains("dropped: 2"), "{}", output.text);
    assert_eq!(states(&lab).await, ["dropped", "dropped", "parked", "parked", "dropped"]);
    let dropped = state_of(&lab, "mail", "user_a", "1").await;
    let by = format!("by {}, spiegel deliveries drop", lab.couch.user);
    assert_eq!((&dropped["reason"], &dropped["next_attempt_at"], &dropped["note"]), (&json!(by), &Value::Null, &json!("kept")));
    assert!(dropped["ended_at"].is_string());

    let output = lab.run(&["deliveries", "retry", "--all"]).await;
    assert!(output.text.contains(": 2"), "what was dropped is not meant by --all: {}", output.text);
    let output = lab.run(&["deliveries", "retry", "--state", "dropped", "--new-id"]).await;
    assert!(output.text.contains(": 3"), "{}", output.text);
    assert_eq!(states(&lab).await, ["parked"; 5]);
    let retried = state_of(&lab, "mail", "user_a", "1").await;
    assert_eq!((&retried["replays"], &retried["reason"], &retried["retries"]), (&json!(1), &Value::Null, &json!(0)));
    assert!(retried["next_attempt_at"].as_str().expect("a time") < "2130");

    let (one, other) = (id_of("sms", "user_a", "1"), id_of("old", "user_a", "1"));
    let output = lab.run(&["deliveries", "drop", &one, &other["delivery:".len()..][..10], &one]).await;
    assert!(output.code == 0 && output.text.contains("dropped: 2"), "{}", output.text);
    assert_eq!(states(&lab).await, ["parked", "parked", "parked", "dropped", "dropped"]);
    let output = lab.run(&["deliveries", "retry", &one, "0000000000"]).await;
    assert!(output.code == 1 && output.text.contains("no such delivery") && output.text.contains(": 1"), "{}", output.text);
    let output = lab.run(&["deliveries", "drop", "--rule", "old", "--db", "user_a", "--doc", "1", "--state", "dropped"]).await;
    assert!(output.code == 0 && output.text.contains("nothing was written"), "twice is fine: {}", output.text);
}

async fn what_is_meant_must_be_said(lab: Arc<Lab>) {
    fill(&lab).await;
    for arguments in [
        &["deliveries"][..],
        &["deliveries", "drop"],
        &["deliveries", "retry"],
        &["deliveries", "drop", "--all", "--rule", "mail"],
        &["deliveries", "drop", "abcdef012345", "--rule", "mail"],
        &["deliveries", "drop", "abcdef012345", "--all"],
        &["deliveries", "drop", "abc"],
        &["deliveries", "drop", "--rule", ""],
        &["deliveries", "drop", "--state", "deaf"],
        &["deliveries", "retry", "--status", "5x"],
        &["deliveries", "show"],
        &["deliveries", "show", "--rule", "mail"],
        &["deliveries", "list", "--limit", "many"],
    ] {
        let output = lab.run(arguments).await;
        assert_eq!(output.code, 64, "{arguments:?}: {}", output.text);
    }
    assert_eq!(states(&lab).await, ["parked", "dead", "parked", "parked", "dropped"]);
    let gone = lab.settings_with(&[("COUCHDB_URL", "http://admin:secret@127.0.0.1:9")]);
    for arguments in [&["deliveries", "list"][..], &["deliveries", "drop", "--all"], &["rules", "enable", "x"]] {
        assert_eq!(one_shot(&gone, arguments).await.code, 69, "{arguments:?}");
    }
}

async fn a_rule_is_enabled(lab: Arc<Lab>) {
    fill(&lab).await;
    lab.rule_on("fine", "^nothing$", "/x", json!({})).await;
    for (id, code, text) in [
        ("gone/rule", 0, "is enabled"),
        ("gone/rule", 1, "there is no rule"),
        ("fine", 0, "was not disabled"),
        ("nobody", 1, "there is no rule"),
    ] {
        let output = lab.run(&["rules", "enable", id]).await;
        assert_eq!(output.code, code, "{id}: {}", output.text);
        assert!(output.text.contains(text), "{id}: {}", output.text);
    }
    assert_eq!(lab.couch.get(&deliveries_db(&lab), "disabled:gone/rule").await, None);
}

async fn names_from_users_move_no_cursor(lab: Arc<Lab>) {
    fill(&lab).await;
    let (rule, doc) = ("evil\u{1b}[2Jrule", "doc\u{9b}31m\u{202e}\r\nx");
    let mut evil = delivery(rule, "user_a", doc, "parked", Some(500));
    evil["last_error"] = json!("\u{1b}]0;title\u{7}");
    lab.couch.bulk(&deliveries_db(&lab), vec![evil, Disabled::document(rule, "1-a", "x", "\u{1b}[1m", SystemTime::now())]).await;
    for arguments in [
        &["deliveries", "list"][..],
        &["deliveries", "list", "--json"],
        &["deliveries", "show", "--rule", rule, "--db", "user_a", "--doc", doc],
        &["rules", "enable", rule],
    ] {
        let output = lab.run(arguments).await;
        let raw = output.text.chars().find(|c| c.is_control() && *c != '\n' || *c == '\u{202e}');
        assert_eq!(raw, None, "{arguments:?}: {:?}", output.text);
        assert!(output.text.contains("rule"), "{}", output.text);
    }
}

async fn the_database_tells_how_many_there_are(lab: Arc<Lab>) {
    fill(&lab).await;
    let output = one_shot(&lab.settings_with(&[("ADMIN_LISTEN", "")]), &["status"]).await;
    assert!(output.text.contains("3 parked, 1 dead, 1 dropped") && output.text.contains("gone/rule"), "{}", output.text);
}

// -- the admin API ---------------------------------------------------------------------------------------------------------

struct Api {
    base: String,
    user: String,
    password: String,
    http: reqwest::Client,
}

impl Api {
    async fn of(lab: &Lab, spiegel: &Spiegel) -> Self {
        let admin = spiegel.admin_address().expect("it listens");
        let (user, password) = (lab.couch.user.clone(), lab.couch.password.clone());
        Self { base: format!("http://{admin}"), user, password, http: reqwest::Client::new() }
    }

    async fn ask(&self, method: &str, path: &str) -> (u16, Value) {
        let method = Method::from_bytes(method.as_bytes()).expect("a method");
        let request = self.http.request(method, format!("{}{path}", self.base)).basic_auth(&self.user, Some(&self.password));
        let answer = request.send().await.expect("an answer");
        (answer.status().as_u16(), answer.json().await.unwrap_or_default())
    }
}

/// What the process would drop of itself: deliveries of rules that are not there. And no database of theirs is there, so that
/// what is retried stays parked.
async fn rules_of_all(lab: &Lab) {
    for rule in ["mail", "sms", "old", "fine/one"] {
        lab.rule_on(rule, "^user_", "/x", json!({ "url": "http://user:inl1ne@127.0.0.1:1/x" })).await;
    }
    let rev = lab.rule_on("gone/rule", "^user_", "/x", json!({})).await;
    let disabled = Disabled::document("gone/rule", &rev, "user_a", "answered 410", SystemTime::now());
    lab.couch.remove(&deliveries_db(lab), "disabled:gone/rule").await;
    lab.couch.put(&deliveries_db(lab), "disabled:gone/rule", disabled).await;
}

async fn the_api_lists_and_acts(lab: Arc<Lab>) {
    fill(&lab).await;
    rules_of_all(&lab).await;
    let mut spiegel = lab.spiegel().await;
    let api = Api::of(&lab, &spiegel).await;

    for (path, expected) in [
        ("/deliveries", 5),
        ("/deliveries?rule=mail", 3),
        ("/deliveries?rule=mail&db=user_a&doc=2", 1),
        ("/deliveries?state=parked&status=5xx", 2),
        ("/deliveries?doc=nobody", 0),
    ] {
        let (status, page) = api.ask("GET", path).await;
        assert_eq!((status, page["deliveries"].as_array().expect("a list").len()), (200, expected), "{path}: {page}");
        assert_eq!(page["next"], Value::Null);
    }
    let (mut seen, mut path) = (Vec::new(), String::from("/deliveries?limit=2"));
    let mut pages = 0;
    loop {
        pages += 1;
        let (_, page) = api.ask("GET", &path).await;
        seen.extend(page["deliveries"].as_array().expect("a list").iter().map(|doc| doc["_id"].clone()));
        match page["next"].as_str() {
            Some(next) => path = format!("/deliveries?limit=2&after={next}"),
            None => break,
        }
    }
    seen.dedup();
    assert_eq!((seen.len(), pages), (5, 3), "each once");

    let id = id_of("mail", "user_a", "2");
    assert_eq!(api.ask("GET", &format!("/deliveries/{id}")).await, (200, state_of(&lab, "mail", "user_a", "2").await));
    let unknown = id_of("mail", "user_a", "9");
    for (method, path, expected) in [
        ("GET", format!("/deliveries/{unknown}"), 404),
        ("POST", format!("/deliveries/{unknown}/retry"), 404),
        ("GET", "/deliveries/nonsense".into(), 400),
        ("GET", "/deliveries?stat=dead".into(), 400),
        ("GET", "/deliveries?limit=0".into(), 400),
        ("POST", "/deliveries/drop".into(), 400),
        ("POST", "/deliveries/drop?rule=".into(), 400),
        ("POST", "/deliveries/drop?all=true&rule=mail".into(), 400),
        ("POST", "/deliveries/drop?all=false".into(), 400),
        ("POST", format!("/deliveries/{id}/drop?rule=mail"), 400),
        ("POST", "/rules/nobody/enable".into(), 404),
        ("DELETE", format!("/deliveries/{id}"), 405),
    ] {
        let (status, answer) = api.ask(method, &path).await;
        assert_eq!(status, expected, "{method} {path}: {answer}");
    }
    assert_eq!(states(&lab).await, ["parked", "dead", "parked", "parked", "dropped"]);

    let (status, page) = api.ask("GET", "/rules").await;
    assert_eq!(status, 200, "{page}");
    let rules = page["rules"].as_array().expect("a list");
    let mail = rules.iter().find(|rule| rule["id"] == "mail").expect("the rule");
    let expected = json!({ "id": "mail", "db_name": "^user_", "url": "http://user:[redacted]@127.0.0.1:1/x",
        "parked": 2, "disabled": false });
    assert_eq!(mail, &expected);
    assert!(rules.iter().any(|rule| rule["id"] == "gone/rule" && rule["disabled"] == true), "{page}");
    let (mut seen, mut path) = (Vec::new(), String::from("/rules?limit=1"));
    loop {
        let (_, page) = api.ask("GET", &path).await;
        seen.extend(page["rules"].as_array().expect("a list").clone());
        match page["next"].as_str() {
            Some(next) => path = format!("/rules?limit=1&after={next}"),
            None => break,
        }
    }
    assert_eq!(&seen, rules, "page by page");
    assert_eq!(api.ask("GET", "/rules?rule=mail").await.0, 400);
    let status: Value = serde_json::from_str(&spiegel.page("/status").await.expect("a page").1).expect("JSON");
    let expected = json!({ "parked": 3, "dead": 1, "dropped": 1, "parked_by_rule": { "mail": 2, "sms": 1 },
        "disabled_rules": ["gone/rule"] });
    assert_eq!(status["deliveries"], expected);
    assert_eq!(api.ask("POST", "/rules/fine%2Fone/enable").await, (200, json!({ "enabled": false })));
    assert_eq!(api.ask("POST", "/rules/gone%2Frule/enable").await, (200, json!({ "enabled": true })));

    assert_eq!(api.ask("POST", &format!("/deliveries/{id}/retry?new_id=true")).await, (200, json!({ "retried": 1 })));
    assert_eq!(state_of(&lab, "mail", "user_a", "2").await["replays"], 1);
    assert_eq!(api.ask("POST", &format!("/deliveries/{id}/drop")).await, (200, json!({ "dropped": 1 })));
    assert_eq!(state_of(&lab, "mail", "user_a", "2").await["reason"], json!(format!("by {}", lab.couch.user)));
    let (status, answer) = api.ask("POST", "/deliveries/drop?rule=mail").await;
    assert_eq!((status, &answer["dropped"], &answer["next"]), (200, &json!(2), &Value::Null), "{answer}");
    assert_eq!(states(&lab).await, ["dropped", "dropped", "dropped", "parked", "dropped"]);
    let (status, answer) = api.ask("POST", "/deliveries/retry?all=true").await;
    assert_eq!((status, &answer["retried"]), (200, &json!(1)), "{answer}");
    spiegel.stop().await;
    let log = spiegel.lines().join("\n");
    assert!(log.contains("deliveries were dropped by hand") && !log.contains("inl1ne"), "{log}");
}

async fn the_api_needs_an_admin(lab: Arc<Lab>) {
    fill(&lab).await;
    rules_of_all(&lab).await;
    let directory = tempfile::tempdir().expect("a directory");
    let secrets = directory.path().join("secrets.json");
    std::fs::write(&secrets, json!({ "admin_token": "t0ken-0123456789" }).to_string()).expect("written");
    let mut spiegel = lab.spiegel_with(&[("SECRETS_FILE", secrets.to_str().expect("text"))]).await;
    let mut api = Api::of(&lab, &spiegel).await;
    assert_eq!(spiegel.page("/rules").await.expect("an answer").0, 401);
    assert_eq!(spiegel.page("/status").await.expect("an answer").0, 200);
    // A stranger's guesses at our own name reach nobody who could lock us out for them.
    api.password = "wr0ng-guess".into();
    for guess in 0..12 {
        let (status, answer) = api.ask("POST", "/deliveries/drop?all=true").await;
        assert_eq!(status, if guess < 10 { 401 } else { 429 }, "{answer}");
    }
    api.user = lab.prefix.clone();
    assert_eq!(api.ask("GET", "/deliveries").await.0, 429, "by address");
    assert_eq!(states(&lab).await, ["parked", "dead", "parked", "parked", "dropped"]);
    assert_eq!(spiegel.page("/ready").await.expect("an answer").0, 200, "it works on");
    let by_token = api.http.get(format!("{}/deliveries", api.base)).bearer_auth("t0ken-0123456789");
    assert_eq!(by_token.send().await.expect("an answer").status(), 200, "guesses of others do not keep the token out");
    spiegel.stop().await;
    assert!(!spiegel.lines().iter().any(|line| line.contains("wr0ng-guess") || line.contains("t0ken")));
}

async fn the_running_process_follows(lab: Arc<Lab>) {
    lab.install().await;
    let db = lab.create("posts").await;
    let patient = json!({ "retry": { "strategy": "linear", "delay": "1h" } });
    lab.rule("mail", &db, "/mail", patient.clone()).await;
    lab.rule("sms", &db, "/sms", patient).await;
    lab.rule("gone", &db, "/gone", json!({})).await;
    lab.receiver.answer("/mail", Answer::status(500));
    lab.receiver.answer("/sms", Answer::status(500));
    lab.receiver.answer("/gone", Answer::status(410));
    let mut spiegel = lab.spiegel().await;
    lab.couch.put(&db, "x", json!({})).await;
    let listed = async |text: &str| {
        eventually(SOON, &format!("{text:?} is listed"), async || {
            let output = lab.run(&["deliveries", "list"]).await;
            output.text.contains(text).then_some(output.text)
        })
        .await
    };
    listed("2 parked").await;
    listed("disabled rules").await;
    let rules = lab.run(&["rules", "list"]).await.text;
    assert!(rules.lines().any(|line| line.starts_with("gone") && line.contains("disabled")), "{rules}");

    for path in ["/mail", "/sms", "/gone"] {
        lab.receiver.answer(path, Answer::ok());
    }
    assert_eq!(lab.run(&["deliveries", "retry", "--rule", "mail"]).await.code, 0);
    assert_eq!(lab.run(&["deliveries", "drop", "--rule", "sms"]).await.code, 0);
    assert_eq!(lab.run(&["rules", "enable", "gone"]).await.code, 0);
    for path in ["/mail", "/gone"] {
        eventually(SOON, path, async || (lab.receiver.delivered(path).len() == 1).then_some(())).await;
    }
    listed("0 parked, 0 dead, 1 dropped").await;
    assert_eq!(lab.receiver.delivered("/sms").len(), 0);
    spiegel.stop().await;
}

// -- pages and conflicts ---------------------------------------------------------------------------------------------------

async fn more_than_a_page_is_read_and_written_in_pages(lab: Arc<Lab>) {
    lab.install().await;
    let db = deliveries_db(&lab);
    for part in 0..3 {
        let docs = (0..500).map(|n| delivery("mail", "user_a", &format!("{part}-{n}"), "parked", Some(503)));
        lab.couch.bulk(&db, docs.collect()).await;
    }
    lab.couch.put(&db, "delivery:ffff-not-one", json!({ "type": "note" })).await;
    let output = lab.run(&["deliveries", "list", "--json"]).await;
    let mut ids: Vec<String> =
        output.text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON")["_id"].to_string()).collect();
    ids.dedup();
    assert_eq!(ids.len(), 1_500);
    let output = lab.run(&["deliveries", "list"]).await;
    assert!(output.text.contains("100 of 1500 are shown") && output.text.contains("1500 parked"), "{}", output.text);
    let output = lab.run(&["deliveries", "drop", "--all"]).await;
    assert!(output.text.contains("dropped: 1500"), "{}", output.text);
    let output = lab.run(&["deliveries", "list", "--state", "dropped"]).await;
    assert!(output.text.contains("1500 dropped"), "{}", output.text);
}

/// Somebody writes all the time what is being dropped: the running process does.
async fn a_conflict_is_read_again(lab: Arc<Lab>) {
    lab.install().await;
    let db = deliveries_db(&lab);
    let docs: Vec<Value> = (0..300).map(|n| delivery("mail", "user_a", &n.to_string(), "parked", Some(503))).collect();
    lab.couch.bulk(&db, docs).await;
    let writer = {
        let lab = lab.clone();
        tokio::spawn(async move {
            for n in (0..300).cycle() {
                let doc = state_of(&lab, "mail", "user_a", &n.to_string()).await;
                if doc["state"] == "parked" {
                    let mut doc = doc;
                    doc["attempts"] = json!(doc["attempts"].as_u64().expect("a number") + 1);
                    let path = format!("{}/{}", encode(&deliveries_db(&lab)), encode(doc["_id"].as_str().expect("an id")));
                    let _ = lab.couch.try_ask(Method::PUT, &path, Some(doc)).await;
                }
            }
        })
    };
    let output = lab.run(&["deliveries", "drop", "--all"]).await;
    writer.abort();
    assert!(output.code == 0 && output.text.contains("dropped: 300"), "{}", output.text);
    let output = lab.run(&["deliveries", "list"]).await;
    assert!(output.text.contains("0 parked, 0 dead, 300 dropped"), "{}", output.text);
    assert_eq!(lab.kind, Kind::Embedded);
}
