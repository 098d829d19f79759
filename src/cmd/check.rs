//! `spiegel check`: a line for each thing that must be in place, with `ok`, `warn` or `FAIL`, and what to do.

use super::documents::{Census, each_page_of_names};
use super::install::{Access, FEED_DB, security};
use super::{Exit, couch, run, say, vault};
use crate::config::{ConfigErrors, Loaded, Settings};
use crate::couch::{Couch, CouchError};
use crate::deliveries::operate::Desk;
use crate::telemetry;
use crate::vault::{Vault, redact_text};
use crate::webhook::request;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use url::Url;

/// Of one kind of finding; the rest is counted.
const LINES_MAX: usize = 20;
/// Names further apart than this were not meant for each other.
const SLIP_MAX: usize = 2;

pub(super) async fn check(loaded: Result<Loaded, ConfigErrors>) -> Exit {
    let mut report = Report::default();
    match loaded {
        Ok(loaded) => {
            telemetry::start_logs(&loaded.settings.log);
            report.config(&loaded);
            // What stops it is in the report already.
            let _ = server(&mut report, &loaded.settings).await;
        }
        Err(errors) => {
            for error in errors.0 {
                report.fail(Exit::Config, error);
            }
        }
    }
    report.sum_up()
}

#[derive(Default)]
struct Report {
    warnings: usize,
    failures: usize,
    exit: Option<Exit>,
}

impl Report {
    fn ok(&mut self, line: impl AsRef<str>) {
        say(&format!("ok    {}", line.as_ref()));
    }

    fn warn(&mut self, line: impl AsRef<str>) {
        self.warnings += 1;
        say(&format!("warn  {}", line.as_ref()));
    }

    fn fail(&mut self, exit: Exit, line: impl AsRef<str>) {
        self.failures += 1;
        self.exit.get_or_insert(exit);
        say(&format!("FAIL  {}", line.as_ref()));
    }

    /// Many findings of one kind, shortened.
    fn warn_each(&mut self, lines: Vec<String>) {
        for line in lines.iter().take(LINES_MAX) {
            self.warn(line);
        }
        if lines.len() > LINES_MAX {
            self.warnings += lines.len() - LINES_MAX;
            say(&format!("warn  … and {} more like these", lines.len() - LINES_MAX));
        }
    }

    fn couch_error(&mut self, what: &str, error: &CouchError) {
        let exit = match error {
            CouchError::Unauthorized(_) | CouchError::Forbidden(_) => Exit::Config,
            error if error.is_outage() => Exit::Unreachable,
            _ => Exit::Internal,
        };
        self.fail(exit, format!("{what}: {error}"));
    }

    fn config(&mut self, loaded: &Loaded) {
        let from = match &loaded.file {
            Some(path) => path.display().to_string(),
            None => String::from("no file: defaults, environment and flags"),
        };
        self.ok(format!("config: sound ({from})"));
        for warning in &loaded.warnings {
            self.warn(format!("config: {warning}"));
        }
    }

    fn sum_up(&self) -> Exit {
        say("");
        say(&match (self.failures, self.warnings) {
            (0, 0) => String::from("everything is in place"),
            (0, warnings) => format!("nothing fails; warnings: {warnings}"),
            (failures, warnings) => format!("failures: {failures}, warnings: {warnings}"),
        });
        self.exit.unwrap_or(Exit::Done)
    }
}

/// None where there is no use in going on.
async fn server(report: &mut Report, settings: &Settings) -> Option<()> {
    let vault = match vault(settings) {
        Ok(vault) => vault,
        Err(failure) => {
            report.fail(failure.exit, failure.message);
            Arc::default()
        }
    };
    let couch = match couch(settings) {
        Ok(couch) => couch,
        Err(failure) => {
            report.fail(failure.exit, failure.message);
            return None;
        }
    };
    answers(report, &couch).await?;
    is_admin(report, &couch).await?;
    feed_database(report, &couch).await;
    tuning(report, &couch).await;
    spiegel_database(report, &couch, &settings.db_name).await?;
    deliveries_database(report, &couch, &settings.db_name).await;
    let census = match Census::of(&couch, &settings.db_name).await {
        Ok(census) => census,
        Err(error) => {
            report.couch_error("documents", &error);
            return None;
        }
    };
    documents(report, &census);
    mixed_fleet(report, &census);
    passwords(report, &census, &vault);
    secrets(report, &census, &vault);
    names(report, &couch, &census).await;
    Some(())
}

async fn answers(report: &mut Report, couch: &Couch) -> Option<()> {
    let address = couch.address();
    match couch.welcome().await {
        Ok(welcome) => {
            let version = welcome.version.as_deref().unwrap_or("of unknown version");
            match welcome.couchdb {
                Some(_) => report.ok(format!("server: CouchDB {version} answers on {address}")),
                None => report.warn(format!("server: something answers on {address}, but it does not call itself CouchDB")),
            }
            Some(())
        }
        Err(error @ CouchError::Unauthorized(_)) => {
            report.fail(
                Exit::Config,
                format!("server: {error}; couchdb.url ({address}) must name an admin and the admin's password"),
            );
            None
        }
        Err(error) => {
            report.fail(Exit::Unreachable, format!("server: {error}; is couchdb.url ({address}) right, and does CouchDB run?"));
            None
        }
    }
}

/// Only an admin may read `_global_changes`: for anybody else the rest would be a list of refusals.
async fn is_admin(report: &mut Report, couch: &Couch) -> Option<()> {
    let session: Value = match couch.get("_session", "_session").await {
        Ok(session) => session,
        Err(error) => {
            report.couch_error("user", &error);
            return None;
        }
    };
    let user = &session["userCtx"];
    let is_admin = user["roles"].as_array().is_some_and(|roles| roles.iter().any(|role| role == "_admin"));
    match (user["name"].as_str(), is_admin) {
        (Some(name), true) => report.ok(format!("user: {name:?} is an admin")),
        (None, true) => report.warn("user: everybody is an admin of this server (\"admin party\"); give it an admin"),
        (Some(name), false) => report.fail(Exit::Config, format!("user: {name:?} is no admin; couchdb.url must name one")),
        (None, false) => {
            report.fail(Exit::Config, "user: couchdb.url names none; write it as http://user:password@host:5984, an admin's");
        }
    }
    is_admin.then_some(())
}

async fn feed_database(report: &mut Report, couch: &Couch) {
    match couch.db_exists(FEED_DB).await {
        Ok(true) => report.ok(format!("{FEED_DB}: exists")),
        Ok(false) => report
            .fail(Exit::Config, format!("{FEED_DB}: is missing, so CouchDB tells nobody what changes; run `spiegel install`")),
        Err(error) => report.couch_error(FEED_DB, &error),
    }
}

async fn spiegel_database(report: &mut Report, couch: &Couch, db: &str) -> Option<()> {
    match couch.db_exists(db).await {
        Ok(true) => {}
        Ok(false) => {
            report.fail(Exit::Config, run::missing_database(db, couch.address()));
            return None;
        }
        Err(error) => {
            report.couch_error(&format!("database {db:?}"), &error);
            return None;
        }
    }
    match security(couch, db).await.map(|security| Access::of(&security)) {
        Ok(Access::AdminsOnly) => report.ok(format!("database {db:?}: exists, admins only")),
        Ok(Access::Everybody) => report.warn(format!(
            "database {db:?}: everybody may write to it, and a rule there sends any document anywhere; run `spiegel install`"
        )),
        Ok(Access::Granted) => report.warn(format!(
            "database {db:?}: somebody besides the admins has access, and a rule there sends any document anywhere; look at its _security"
        )),
        Err(error) => report.couch_error(&format!("rights on {db:?}"), &error),
    }
    Some(())
}

async fn deliveries_database(report: &mut Report, couch: &Couch, spiegel_db: &str) {
    let desk = Desk::new(couch.clone(), spiegel_db);
    let db = desk.db();
    let looked = async {
        if !desk.exists().await? {
            return Ok(format!("database {db:?}: is missing; it is created when first needed, or by `spiegel install`"));
        }
        if !desk.is_ours().await? {
            return Ok(format!("database {db:?}: holds other documents than deliveries that failed; choose another db_name"));
        }
        match Access::of(&security(couch, db).await?) {
            Access::AdminsOnly => Ok(String::new()),
            Access::Everybody | Access::Granted => Ok(format!(
                "database {db:?}: others than admins have access to what failed and why; run `spiegel install` or look at its _security"
            )),
        }
    };
    match looked.await {
        Ok(warning) if warning.is_empty() => report.ok(format!("database {db:?}: exists, admins only")),
        Ok(warning) => report.warn(warning),
        Err(error) => report.couch_error(&format!("database {db:?}"), &error),
    }
}

/// Settings of CouchDB that cost most of the time between a write and its effect.
async fn tuning(report: &mut Report, couch: &Couch) {
    let jitter = match node_setting(couch, "replicator", "startup_jitter", 5000).await {
        Ok(jitter) => jitter,
        // Not every user may read them, and not every server has them: nothing to say, nothing lost.
        Err(error) => return report.warn(format!("couchdb's settings: cannot be read ({error})")),
    };
    match jitter <= 100 {
        true => report.ok(format!("[replicator] startup_jitter: {jitter} ms")),
        false => report.warn(format!(
            "[replicator] startup_jitter: each `_replicate` first waits a random time up to {jitter} ms; set it to 1 in CouchDB"
        )),
    }
    match node_setting(couch, "global_changes", "max_write_delay", 500).await {
        Ok(delay) if delay <= 50 => report.ok(format!("[global_changes] max_write_delay: {delay} ms")),
        Ok(delay) => report.warn(format!(
            "[global_changes] max_write_delay: CouchDB tells of a change up to {delay} ms late; set it to 10 (and max_event_delay to 1) and restart CouchDB"
        )),
        Err(error) => report.warn(format!("[global_changes] max_write_delay: cannot be read ({error})")),
    }
}

/// Of the node that answers; one that is not set has CouchDB's default.
async fn node_setting(couch: &Couch, section: &str, key: &str, default: u64) -> Result<u64, CouchError> {
    match couch.get::<String>("_node", &format!("_node/_local/_config/{section}/{key}")).await {
        Ok(text) => Ok(text.trim().parse().unwrap_or(default)),
        Err(CouchError::NotFound(_)) => Ok(default),
        Err(error) => Err(error),
    }
}

fn documents(report: &mut Report, census: &Census) {
    match census.rules.len() + census.replicators.len() + census.invalid.len() {
        0 => {
            report.warn("documents: neither rules nor replicators yet, so there is nothing to do; see the README for a first one")
        }
        _ => report.ok(format!("documents: rules {}, replicators {}", census.rules.len(), census.replicators.len())),
    }
    report.warn_each(
        census.invalid.iter().map(|doc| format!("document {:?}: invalid: {}", doc.id, redact_text(&doc.why))).collect(),
    );
    report.warn_each(census.near_misses.iter().map(|(id, line)| format!("rule {id:?}: {line}")).collect());
    let odd = census.replicators.iter().filter(|replicator| !replicator.odd.is_empty());
    report.warn_each(odd.map(|replicator| format!("replicator {:?}: {}", replicator.id, replicator.odd)).collect());
}

/// Where the original's processes work on the same documents, they deliver what our fields would hold back or sign.
fn mixed_fleet(report: &mut Report, census: &Census) {
    if census.of_the_original == 0 {
        return;
    }
    report.ok(format!("mixed fleet: processes of Node Spiegel wrote {} documents within the last day", census.of_the_original));
    let line = |(id, fields): &(String, Vec<&str>)| {
        let fields = fields.join(", ");
        format!(
            "rule {id:?}: Node Spiegel's processes pass over {fields}; stop them first, or leave that out until they are stopped"
        )
    };
    report.warn_each(census.additions.iter().map(line).collect());
}

fn passwords(report: &mut Report, census: &Census, vault: &Vault) {
    let rules = census.rules.iter().filter_map(|rule| Some((format!("rule {:?}", rule.id), Url::parse(&rule.url).ok()?)));
    let replicators = census
        .replicators
        .iter()
        .flat_map(|replicator| replicator.urls.iter().map(|url| (format!("replicator {:?}", replicator.id), url.clone())));
    // By host and user: thousands of replicators share one line.
    let mut missing: BTreeMap<(String, String), String> = BTreeMap::new();
    let mut found: BTreeSet<(String, String)> = BTreeSet::new();
    let mut exposed = BTreeSet::new();
    for (what, url) in rules.chain(replicators) {
        if url.password().is_some() {
            exposed.insert(what);
        } else if let Some(host_and_user) = host_and_user(&url) {
            match vault.inject(url.as_str()).is_ok_and(|url| url.password().is_some()) {
                true => drop(found.insert(host_and_user)),
                false => drop(missing.entry(host_and_user).or_insert(what)),
            }
        }
    }
    if !found.is_empty() {
        report.ok(format!("passwords: found for {} of {} users", found.len(), found.len() + missing.len()));
    }
    let lines = missing.iter().map(|((host, user), what)| {
        format!("passwords: none for user {user:?} on {host:?} (such as {what}); add it to passwords_file")
    });
    report.warn_each(lines.collect());
    let lines = exposed.iter().map(|what| format!("{what}: holds a password in its URL; move it to passwords_file"));
    report.warn_each(lines.collect());
}

fn secrets(report: &mut Report, census: &Census, vault: &Vault) {
    let unusable = census.rules.iter().filter_map(|rule| {
        let error = request::of_rule(&rule.handling, vault).err()?;
        Some(format!("rule {:?}: is held, because {error}", rule.id))
    });
    report.warn_each(unusable.collect());
}

/// None where the URL names no user, and so wants no password.
fn host_and_user(url: &Url) -> Option<(String, String)> {
    if url.username().is_empty() {
        return None;
    }
    let user = percent_encoding::percent_decode_str(url.username()).decode_utf8_lossy().into_owned();
    Some((url.host_str()?.to_string(), user))
}

/// Rules and replicators that no database answers to. It may be made later; but a slip of the pen looks just like that.
async fn names(report: &mut Report, couch: &Couch, census: &Census) {
    let mut idle_rules: Vec<usize> = (0..census.rules.len()).collect();
    let mut missing_sources: BTreeSet<&str> = census.replicators.iter().map(|replicator| replicator.source_db.as_str()).collect();
    let mut count = 0;
    let looked = each_page_of_names(couch, |names| {
        count += names.len();
        for name in names {
            idle_rules.retain(|rule| !census.rules[*rule].pattern.may_match(name));
            missing_sources.remove(name.as_str());
        }
    });
    if let Err(error) = looked.await {
        return report.couch_error("_all_dbs", &error);
    }
    if idle_rules.is_empty() && missing_sources.is_empty() {
        if !census.rules.is_empty() || !census.replicators.is_empty() {
            report.ok(format!("databases: {count}; each rule and each replicator has one"));
        }
        return;
    }
    let meant: BTreeSet<String> = idle_rules
        .iter()
        .map(|rule| plain_name(census.rules[*rule].pattern.source()))
        .chain(missing_sources.iter().map(|name| (*name).to_string()))
        .collect();
    let mut nearest = Nearest::of(&meant);
    // A second look, because only now is it known what to look for.
    if let Err(error) = each_page_of_names(couch, |names| names.iter().for_each(|name| nearest.look_at(name))).await {
        return report.couch_error("_all_dbs", &error);
    }
    let rules = idle_rules.iter().map(|rule| &census.rules[*rule]).map(|rule| {
        let hint = nearest.hint(&plain_name(rule.pattern.source()));
        format!("rule {:?}: db_name {} matches no database{hint}", rule.id, rule.pattern.source())
    });
    report.warn_each(rules.collect());
    let sources = census.replicators.iter().filter(|replicator| missing_sources.contains(replicator.source_db.as_str()));
    let sources = sources.map(|replicator| {
        let hint = nearest.hint(&replicator.source_db);
        format!("replicator {:?}: its source {:?} is no database here{hint}", replicator.id, replicator.source_db)
    });
    report.warn_each(sources.collect());
}

/// A pattern without its punctuation: what it would be as a name.
fn plain_name(pattern: &str) -> String {
    pattern.chars().filter(|c| !matches!(c, '^' | '$' | '\\' | '.' | '*' | '(' | ')' | '[' | ']' | '?')).collect()
}

/// For each name that was meant, the nearest that exists.
struct Nearest {
    found: BTreeMap<String, Option<(usize, String)>>,
}

impl Nearest {
    fn of(meant: &BTreeSet<String>) -> Self {
        // Each is compared with each database: past this many, hints are a luxury.
        Self { found: meant.iter().take(10 * LINES_MAX).map(|name| (name.clone(), None)).collect() }
    }

    fn look_at(&mut self, name: &str) {
        for (meant, best) in &mut self.found {
            if meant.len().abs_diff(name.len()) > SLIP_MAX {
                continue;
            }
            let distance = strsim::osa_distance(meant, name);
            if distance <= SLIP_MAX && best.as_ref().is_none_or(|(least, _)| distance < *least) {
                *best = Some((distance, name.to_string()));
            }
        }
    }

    fn hint(&self, meant: &str) -> String {
        match self.found.get(meant) {
            Some(Some((_, name))) => format!("; did you mean {name:?}?"),
            _ => String::from("; is it still to be made?"),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_suggested() {
        let cases = [
            ("^_user$", "; did you mean \"_users\"?"),
            ("^all_blog_post$", "; did you mean \"all_blog_posts\"?"),
            ("^user_.*$", "; did you mean \"_users\"?"),
            ("^something_else$", "; is it still to be made?"),
        ];
        let meant = cases.iter().map(|(pattern, _)| plain_name(pattern)).collect();
        let mut nearest = Nearest::of(&meant);
        for name in ["_global_changes", "_replicator", "_users", "all_blog_posts"] {
            nearest.look_at(name);
        }
        for (pattern, expected) in cases {
            assert_eq!(nearest.hint(&plain_name(pattern)), expected, "{pattern}");
        }
    }

    #[test]
    fn whose_password_is_asked_for() {
        let cases = [
            ("http://user@api.example:3000/x", Some(("api.example", "user"))),
            ("http://us%40er@api.example/${db}", Some(("api.example", "us@er"))),
            ("http://api.example/x", None),
        ];
        for (url, expected) in cases {
            let expected = expected.map(|(host, user)| (host.to_string(), user.to_string()));
            assert_eq!(host_and_user(&Url::parse(url).expect("a URL")), expected, "{url}");
        }
    }
}
