//! A continuous job of `_replicator` ▶ our `replicator` document, and back (pure).
//!
//! Both sides are carried as they were written, a password in them too: the two databases are for admins alone, and a job that
//! lost its password would only fail. But anybody may have written a job: one that would gain rights here is not carried. Nothing here is printed but ids, addresses without passwords, and the names of fields.

use crate::couch::{CouchSettings, encode_segment};
use crate::replicate::native::parameters::{Local, NotNative, Parameters};
use crate::topology::replicator::{OF_SPIEGEL, Replicator};
use crate::vault::{Credentials, Vault, redact_text, split_credentials};
use secrecy::ExposeSecret;
use serde_json::{Map, Value, json};
use url::Url;

/// What `_replicate` knows of a document's fields (CouchDB 3.5).
const PARAMETERS: [&str; 22] = [
    "source",
    "target",
    "create_target",
    "create_target_params",
    "doc_ids",
    "selector",
    "filter",
    "query_params",
    "since_seq",
    "winning_revs_only",
    "use_checkpoints",
    "use_bulk_get",
    "checkpoint_interval",
    "worker_processes",
    "worker_batch_size",
    "http_connections",
    "connection_timeout",
    "retries_per_request",
    "socket_options",
    "proxy",
    "source_proxy",
    "target_proxy",
];
/// What says who asked, and how: it has no meaning in the other database.
const OF_THE_JOB: [&str; 5] = ["continuous", "cancel", "owner", "user_ctx", "type"];
/// Of these, what a user wrote and loses.
const WISHES: [&str; 3] = ["dirty_after_milliseconds", "engine", "priority"];

/// The spiegel database holds much else.
pub(super) const NO_REPLICATOR: &str = "it is no replicator";

/// What becomes of one document.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Plan {
    /// This is to be written on the other side.
    Carry(Value),
    /// It stays, and that is right: it is nothing that this command carries.
    Pass(&'static str),
    /// It stays, and a person must look.
    Refuse(String),
}

/// A plan, and what a person may want to know of it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Planned {
    pub plan: Plan,
    pub notes: Vec<String>,
}

impl Planned {
    fn refuse(why: impl Into<String>) -> Self {
        Self { plan: Plan::Refuse(why.into()), notes: Vec::new() }
    }

    fn pass(why: &'static str) -> Self {
        Self { plan: Plan::Pass(why), notes: Vec::new() }
    }
}

/// A `replicator` of a job, with its id. It is new, and so runs once at the start.
pub(super) fn replicator_of(job: &Value, local: &Local, vault: &Vault) -> Planned {
    let Value::Object(fields) = job else { return Planned::refuse("is no object") };
    let id = id_of(job);
    match fields.get("continuous") {
        Some(Value::Bool(true)) => {}
        _ => return Planned::pass("it is not continuous"),
    }
    if fields.get("cancel") == Some(&Value::Bool(true)) {
        return Planned::pass("it is cancelled");
    }
    if id.starts_with("spiegel_cl_") || id.starts_with("global_") {
        return Planned::refuse("its _id means something else in the spiegel database");
    }
    if !is_admins(fields.get("user_ctx")) {
        return Planned::refuse("user_ctx: it runs with the rights of a user, and a replicator cannot");
    }
    if let Some(why) = gains_rights(fields, vault) {
        return Planned::refuse(why);
    }
    let mut replicator = carried(fields, &[&OF_THE_JOB, &OF_SPIEGEL]);
    let mut notes = notes_of(fields);
    let lost = lost(fields, |name| OF_SPIEGEL.contains(&name) && name != "type");
    notes.extend(lost.map(|names| format!("not carried: {names}")));
    replicator.insert(String::from("_id"), Value::from(id));
    replicator.insert(String::from("type"), Value::from("replicator"));
    let replicator = Value::Object(replicator);
    if let Err(faults) = Replicator::parse(&replicator) {
        return Planned::refuse(redact_text(&crate::rules::invalid::summary(&faults)));
    }
    let mut params = replicator.clone();
    if let Some(params) = params.as_object_mut() {
        params.retain(|name, _| name != "type" && !name.starts_with('_'));
    }
    match Parameters::parse(&params, local) {
        Err(error @ NotNative::Invalid { .. }) => return Planned::refuse(error.to_string()),
        Err(NotNative::Unsupported { key }) => notes.push(format!("{key}: CouchDB runs it, at each change")),
        Ok(_) => {}
    }
    if fields.get("_replication_state").and_then(Value::as_str) == Some("failed") {
        notes.push(String::from("the job had failed"));
    }
    Planned { plan: Plan::Carry(replicator), notes }
}

/// A replicator logs in where a job did not: with the passwords file, and as Spiegel where there is only a name.
fn gains_rights(fields: &Map<String, Value>, vault: &Vault) -> Option<String> {
    ["source", "target"].into_iter().find_map(|side| {
        let text = text_of(fields.get(side)?);
        let is_of_an_admin = fields.get("user_ctx").is_some_and(|user_ctx| !user_ctx.is_null());
        if !text.is_empty() && !text.contains("://") && !is_of_an_admin {
            return Some(format!("{side}: by a name alone it would have Spiegel's rights; a URL says whose"));
        }
        let login = login_of(vault, text)?;
        Some(format!("{side}: the passwords file would log it in as {:?}, whose password is not in the job", login.1.user))
    })
}

/// Where and as whom the passwords file logs a URL in, if that is not what the URL says itself.
fn login_of(vault: &Vault, text: &str) -> Option<(Url, Credentials)> {
    let (_, own) = split_credentials(Url::parse(text).ok()?);
    let (url, login) = split_credentials(vault.inject(text).ok()?);
    let (own, login) = (own?, login?);
    (own.password.expose_secret() != login.password.expose_secret()).then_some((url, login))
}

/// Who goes back and what may be written there.
pub(super) struct WayBack<'a> {
    pub couchdb: &'a CouchSettings,
    pub vault: &'a Vault,
    /// Passwords of the vault may be written into the jobs.
    pub with_passwords: bool,
}

/// A continuous job of a replicator, with its id.
pub(super) fn job_of(replicator: &Value, way: &WayBack<'_>) -> Planned {
    let Value::Object(fields) = replicator else { return Planned::refuse("is no object") };
    if fields.get("type").and_then(Value::as_str) != Some("replicator") {
        return Planned::pass(NO_REPLICATOR);
    }
    if let Err(faults) = Replicator::parse(replicator) {
        return Planned::refuse(redact_text(&crate::rules::invalid::summary(&faults)));
    }
    let mut job = carried(fields, &[&OF_THE_JOB, &OF_SPIEGEL]);
    let mut notes = Vec::new();
    for side in ["source", "target"] {
        let Some(value) = job.get_mut(side) else { continue };
        match way.side(value) {
            Ok(None) => {}
            Ok(Some(with_password)) => {
                *value = with_password;
                notes.push(format!("{side}: the password is written into the job"));
            }
            Err(why) => return Planned::refuse(format!("{side}: {why}")),
        }
    }
    notes.extend(notes_of(&job));
    let lost = lost(fields, |name| WISHES.contains(&name));
    notes.extend(lost.map(|names| format!("not carried: {names}")));
    job.insert(String::from("_id"), Value::from(id_of(replicator)));
    job.insert(String::from("continuous"), Value::from(true));
    Planned { plan: Plan::Carry(Value::Object(job)), notes }
}

impl WayBack<'_> {
    /// `_replicator` reads no passwords file and knows no bare names: what the side must become, if anything.
    fn side(&self, side: &Value) -> Result<Option<Value>, &'static str> {
        let text = text_of(side);
        let (url, credentials) = match text.contains("://") {
            false => {
                let url = self.couchdb.url.join(&encode_segment(text)).map_err(|_| "is no name")?;
                (url, self.couchdb.credentials.clone())
            }
            true if logs_in_itself(side) => return Ok(None),
            true => match login_of(self.vault, text) {
                Some((url, login)) => (url, Some(login)),
                None => return Ok(None),
            },
        };
        let mut object = side.as_object().cloned().unwrap_or_default();
        object.insert(String::from("url"), Value::from(url.as_str()));
        if let Some(Credentials { user, password }) = credentials {
            if !self.with_passwords {
                return Err("its password is not in the document, and _replicator needs it there: --with-passwords writes it");
            }
            object.insert(String::from("auth"), json!({ "basic": { "username": user, "password": password.expose_secret() } }));
        }
        Ok(Some(Value::Object(object)))
    }
}

/// Whether two documents ask for the same work, whatever else is in them.
pub(super) fn is_same_work(one: &Value, other: &Value) -> bool {
    let of = |doc: &Value| doc.as_object().map(|fields| carried(fields, &[&OF_THE_JOB, &OF_SPIEGEL]));
    // The order of fields says nothing.
    let sorted = |fields: Map<String, Value>| fields.into_iter().collect::<std::collections::BTreeMap<_, _>>();
    of(one).map(sorted) == of(other).map(sorted)
}

pub(super) fn id_of(doc: &Value) -> &str {
    doc["_id"].as_str().unwrap_or_default()
}

/// As a person may see it.
pub(super) fn address(side: &Value) -> String {
    redact_text(side.as_str().or_else(|| side["url"].as_str()).unwrap_or("–"))
}

fn carried(fields: &Map<String, Value>, without: &[&[&str]]) -> Map<String, Value> {
    let is_carried = |name: &str| !name.starts_with('_') && !without.iter().any(|names| names.contains(&name));
    fields.iter().filter(|(name, _)| is_carried(name)).map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// Names of fields are the user's own words and no secrets, but a long list says nothing.
fn lost(fields: &Map<String, Value>, is_lost: impl Fn(&str) -> bool) -> Option<String> {
    let names: Vec<&str> =
        fields.iter().filter(|(name, value)| is_lost(name) && !value.is_null()).map(|(name, _)| name.as_str()).collect();
    (!names.is_empty()).then(|| names.join(", "))
}

fn notes_of(fields: &Map<String, Value>) -> Vec<String> {
    let mut notes = Vec::new();
    if ["source", "target"].iter().any(|side| fields.get(*side).is_some_and(has_secret)) {
        notes.push(String::from("has a password in it"));
    }
    let is_unknown = |name: &str| {
        !name.starts_with('_') && !PARAMETERS.contains(&name) && !OF_THE_JOB.contains(&name) && !OF_SPIEGEL.contains(&name)
    };
    notes.extend(lost(fields, is_unknown).map(|names| format!("means nothing to CouchDB: {names}")));
    notes.extend(fields.get("_attachments").map(|_| String::from("not carried: its attachments")));
    notes
}

fn has_secret(side: &Value) -> bool {
    logs_in_itself(side) || Url::parse(text_of(side)).is_ok_and(|url| url.password().is_some())
}

/// By what stands beside the URL, which wins.
fn logs_in_itself(side: &Value) -> bool {
    let is_login = |name: &String| ["authorization", "cookie"].contains(&name.to_ascii_lowercase().as_str());
    !side["auth"].is_null() || side["headers"].as_object().is_some_and(|headers| headers.keys().any(is_login))
}

/// The URL or the name.
fn text_of(side: &Value) -> &str {
    side.as_str().or_else(|| side["url"].as_str()).unwrap_or_default()
}

/// Without one, or with an admin's, a job may do what Spiegel may.
fn is_admins(user_ctx: Option<&Value>) -> bool {
    match user_ctx {
        None | Some(Value::Null) => true,
        Some(user_ctx) => user_ctx["roles"].as_array().is_some_and(|roles| roles.iter().any(|role| role == "_admin")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use secrecy::SecretString;
    use std::time::Duration;

    fn settings() -> CouchSettings {
        CouchSettings {
            url: Url::parse("http://couch:5984/").unwrap(),
            credentials: Some(Credentials { user: "admin".into(), password: SecretString::from("s3cret") }),
            connect_timeout: Duration::from_secs(1),
            read_timeout: Duration::from_secs(1),
        }
    }

    fn imported(fields: Value) -> Planned {
        let mut job = json!({ "_id": "j", "_rev": "1-a", "source": "http://h/a", "target": "http://h/b", "continuous": true });
        merge(&mut job, fields);
        let vault = Vault::from_json(r#"{ "h": { "api": "s3cret" } }"#).unwrap();
        replicator_of(&job, &Local { url: settings().url, credentials: settings().credentials }, &vault)
    }

    fn back(fields: Value, with_passwords: bool) -> Planned {
        let mut replicator = json!({ "_id": "r", "type": "replicator", "source": "http://h/a", "target": "http://h/b" });
        merge(&mut replicator, fields);
        let vault = Vault::from_json(r#"{ "h": { "api": "s3cret" } }"#).unwrap();
        job_of(&replicator, &WayBack { couchdb: &settings(), vault: &vault, with_passwords })
    }

    fn merge(doc: &mut Value, fields: Value) {
        doc.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        doc.as_object_mut().unwrap().retain(|_, value| value != "absent");
    }

    #[track_caller]
    fn carries(planned: &Planned) -> &Value {
        match &planned.plan {
            Plan::Carry(doc) => doc,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_a_job_asks_for_is_carried_and_what_it_went_through_is_not() {
        for (fields, expected) in [
            (json!({}), json!({})),
            (
                json!({ "owner": "admin", "_replication_id": "x", "_replication_state": "running", "_replication_state_time": "t" }),
                json!({}),
            ),
            (json!({ "user_ctx": { "name": "admin", "roles": ["_admin"] } }), json!({})),
            (json!({ "dirty": true, "retries": 4, "locked_at": "x" }), json!({})),
            (json!({ "doc_ids": ["a"] }), json!({ "doc_ids": ["a"] })),
            (json!({ "filter": "d/f", "query_params": { "x": "1" } }), json!({ "filter": "d/f", "query_params": { "x": "1" } })),
            (json!({ "selector": { "a": 1 }, "create_target": true }), json!({ "selector": { "a": 1 }, "create_target": true })),
            (
                json!({ "source": { "url": "http://h/a", "auth": { "basic": { "username": "u", "password": "s3cret" } } } }),
                json!({ "source": { "url": "http://h/a", "auth": { "basic": { "username": "u", "password": "s3cret" } } } }),
            ),
            (json!({ "target": "http://u:s3cret@h/b" }), json!({ "target": "http://u:s3cret@h/b" })),
            (json!({ "source": "local_name", "user_ctx": { "roles": ["_admin"] } }), json!({ "source": "local_name" })),
            (json!({ "target": "http://api:s3cr%65t@h/b" }), json!({ "target": "http://api:s3cr%65t@h/b" })),
        ] {
            let mut wanted = json!({ "_id": "j", "type": "replicator", "source": "http://h/a", "target": "http://h/b" });
            merge(&mut wanted, expected);
            let planned = imported(fields.clone());
            let carried: std::collections::BTreeMap<_, _> = carries(&planned).as_object().unwrap().iter().collect();
            assert_eq!(carried, wanted.as_object().unwrap().iter().collect(), "{fields}");
            assert!(!planned.notes.join(" ").contains("s3cret"), "{:?}", planned.notes);
        }
    }

    #[test]
    fn what_stays_has_its_reason() {
        for fields in [json!({ "continuous": false }), json!({ "continuous": "absent" }), json!({ "cancel": true })] {
            assert!(matches!(imported(fields.clone()).plan, Plan::Pass(_)), "{fields}");
        }
        for (fields, reason) in [
            (json!({ "user_ctx": { "name": "bob", "roles": [] } }), "user_ctx"),
            (json!({ "_id": "spiegel_cl_a" }), "_id"),
            (json!({ "source": "absent" }), "source"),
            (json!({ "target": { "url": 7 } }), "target"),
            (json!({ "source": "http://u:s3cret@h" }), "source"),
            (json!({ "create_target": "yes" }), "create_target"),
            (json!({ "source": "private" }), "source: by a name alone"),
            (json!({ "target": { "url": "private" }, "user_ctx": null }), "target: by a name alone"),
            (json!({ "source": "http://api@h/private" }), "source: the passwords file"),
            (json!({ "target": { "url": "http://api:guessed@h/private" } }), "target: the passwords file"),
        ] {
            let Plan::Refuse(why) = imported(fields.clone()).plan else { panic!("{fields}") };
            assert!(why.contains(reason) && !why.contains("s3cret"), "{fields}: {why}");
        }
    }

    #[test]
    fn what_a_person_should_know_is_noted() {
        for (fields, note) in [
            (json!({}), ""),
            (json!({ "source": "http://u:s3cret@h/a" }), "has a password in it"),
            (
                json!({ "source": { "url": "http://h/a", "headers": { "authorization": "Basic s3cret" } } }),
                "has a password in it",
            ),
            (json!({ "comment": "mine" }), "means nothing to CouchDB: comment"),
            (json!({ "priority": 3, "retries": 1 }), "not carried: priority, retries"),
            (json!({ "proxy": "http://p" }), "proxy: CouchDB runs it, at each change"),
            (json!({ "_replication_state": "failed" }), "the job had failed"),
            (json!({ "_attachments": {} }), "not carried: its attachments"),
        ] {
            assert_eq!(imported(fields.clone()).notes.join("; "), note, "{fields}");
        }
    }

    #[test]
    fn a_way_back_needs_its_passwords() {
        let planned = back(json!({ "dirty": false, "dirty_at": null, "updated_at": "x", "priority": 2 }), false);
        assert_eq!(carries(&planned), &json!({ "source": "http://h/a", "target": "http://h/b", "_id": "r", "continuous": true }));
        assert_eq!(planned.notes, ["not carried: priority"]);
        let auth = |user: &str| json!({ "basic": { "username": user, "password": "s3cret" } });
        for (side, expected) in [
            (json!("http://api@h/a"), json!({ "url": "http://h/a", "auth": auth("api") })),
            (
                json!({ "url": "http://api@h/a", "headers": { "X": "1" } }),
                json!({ "url": "http://h/a", "headers": { "X": "1" }, "auth": auth("api") }),
            ),
            (json!("a/b"), json!({ "url": "http://couch:5984/a%2Fb", "auth": auth("admin") })),
        ] {
            let Plan::Refuse(why) = back(json!({ "source": side }), false).plan else { panic!("{side}") };
            assert!(why.contains("--with-passwords") && !why.contains("s3cret"), "{why}");
            let planned = back(json!({ "source": side }), true);
            assert_eq!(carries(&planned)["source"], expected, "{side}");
            assert_eq!(planned.notes[0], "source: the password is written into the job");
        }
        let own = json!({ "url": "http://api@h/a", "auth": auth("me") });
        for side in [json!("http://api:s3cret@h/a"), json!("http://other@h/a"), json!("http://h/a"), own] {
            assert_eq!(carries(&back(json!({ "source": side }), false))["source"], side);
        }
        assert_eq!(back(json!({ "type": "on_change" }), true).plan, Plan::Pass(NO_REPLICATOR));
        assert!(matches!(back(json!({ "source": 7 }), true).plan, Plan::Refuse(_)));
    }

    #[test]
    fn the_same_work_is_known_by_what_is_asked_for() {
        let one = json!({ "_id": "a", "_rev": "1-x", "source": "s", "target": "t", "type": "replicator", "dirty": true });
        let mut other = json!({ "target": "t", "source": "s", "continuous": true, "owner": "admin", "_rev": "9-z" });
        assert!(is_same_work(&one, &other));
        merge(&mut other, json!({ "filter": "d/f" }));
        assert!(!is_same_work(&one, &other));
    }

    proptest! {
        #[test]
        fn a_job_that_went_there_and_back_asks_for_the_same(
            source in "[a-z]{1,5}", user in proptest::option::of("[a-z]{1,3}"), doc_ids in proptest::option::of(proptest::collection::vec("[a-z]", 0..3)),
            create in proptest::option::of(any::<bool>()),
        ) {
            let user = user.map(|user| format!("{user}:pw@")).unwrap_or_default();
            let mut job = json!({ "_id": "j", "source": format!("http://{user}h/{source}"), "target": "http://h/b", "continuous": true });
            if let Some(doc_ids) = doc_ids {
                job["doc_ids"] = json!(doc_ids);
            }
            if let Some(create) = create {
                job["create_target"] = json!(create);
            }
            let there = replicator_of(&job, &Local { url: settings().url, credentials: None }, &Vault::empty());
            let vault = Vault::empty();
            let again = job_of(carries(&there), &WayBack { couchdb: &settings(), vault: &vault, with_passwords: false });
            prop_assert!(is_same_work(carries(&again), &job));
            prop_assert_eq!(&carries(&again)["continuous"], &json!(true));
            prop_assert_eq!(id_of(carries(&again)), "j");
        }
    }
}
