//! `spiegel deliveries`: those that failed, to look at, to have tried again, and to drop; and `rules enable`.
//!
//! All of it reads and writes documents in CouchDB, and the running process follows: it need not run meanwhile. What a filter
//! finds nothing for is done (0); what is named and is not there is said by exit code 1.

use super::table::{Table, cut, printable, printable_json};
use super::{Exit, Failure, couch, run, say};
use crate::config::Settings;
use crate::couch::{Couch, CouchError};
use crate::deliveries::counts::Counts;
use crate::deliveries::operate::{Desk, Enabled, Named, Tally};
use crate::deliveries::parked::{DELIVERY, Key, Parked, State};
use crate::deliveries::select::{Action, Filter, KeyPrefix, StatusFilter};
use crate::job::timestamp;
use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand};
use serde_json::Value;
use std::io::{self, BufWriter, Write};
use std::time::SystemTime;

#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// List those that failed, and the rules that are disabled
    List {
        #[command(flatten)]
        filter: FilterArgs,
        /// Show no more than this many; 0 shows all [default: 100, with --json all]
        #[arg(long, value_name = "N")]
        limit: Option<usize>,
        /// One JSON document a line, as in CouchDB
        #[arg(long)]
        json: bool,
    },
    /// Show all that is known of one
    Show {
        #[command(flatten)]
        one: One,
    },
    /// Have them tried again at once, dead ones too
    Retry {
        #[command(flatten)]
        targets: Targets,
        /// With a new webhook-id, for a receiver that would drop the old one as a repeat
        #[arg(long)]
        new_id: bool,
        /// Only say how many it would be
        #[arg(long)]
        dry_run: bool,
    },
    /// Have them tried never again; they stay listed for a while
    Drop {
        #[command(flatten)]
        targets: Targets,
        /// Only say how many it would be
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct FilterArgs {
    /// Of this rule: its _id
    #[arg(long, value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
    rule: Option<String>,
    /// Of this database
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    db: Option<String>,
    /// Of the document with this _id
    #[arg(long, value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
    doc: Option<String>,
    /// parked, dead or dropped
    #[arg(long)]
    state: Option<State>,
    /// By the last answer: a status such as 503, a class such as 5xx, or none
    #[arg(long)]
    status: Option<StatusFilter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct One {
    /// Its key, as `list` shows it
    #[arg(required_unless_present = "rule", conflicts_with = "rule")]
    key: Option<KeyPrefix>,
    /// Or its rule, database and document
    #[arg(long, value_name = "ID", requires = "db", requires = "doc")]
    rule: Option<String>,
    #[arg(long, value_name = "NAME", requires = "rule")]
    db: Option<String>,
    #[arg(long, value_name = "ID", requires = "rule")]
    doc: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct Targets {
    /// Keys as `list` shows them, instead of a filter
    keys: Vec<KeyPrefix>,
    #[command(flatten)]
    filter: FilterArgs,
    /// All that are parked or dead
    #[arg(long)]
    all: bool,
}

impl FilterArgs {
    fn into_filter(self) -> Filter {
        let Self { rule, db, doc, state, status } = self;
        Filter { rule, db, doc_id: doc, state, status }
    }
}

/// Lines of a table that nobody asked to be longer.
const LIMIT_DEFAULT: usize = 100;
/// So that a key in a table is as good as the whole one, and is short.
const KEY_DIGITS_SHOWN: usize = 12;

pub(super) async fn command(settings: &Settings, command: Command) -> Result<Exit, Failure> {
    let couch = couch(settings)?;
    let desk = Desk::new(couch.clone(), &settings.db_name);
    let failed = |error: CouchError| Failure::of_couch(&couch, "operate on the deliveries", &error);
    if !desk.exists().await.map_err(failed)? {
        needs_installation(&couch, settings).await?;
    }
    match command {
        Command::List { filter, limit, json } => {
            let listed = list(&desk, &filter.into_filter(), limit, json).await;
            listed.map(|()| Exit::Done).map_err(failed)
        }
        Command::Show { one } => show(&desk, one).await.map_err(failed),
        Command::Retry { targets, new_id, dry_run } => act(&couch, &desk, targets, Action::Retry { new_id }, dry_run).await,
        Command::Drop { targets, dry_run } => {
            let user = couch.settings().credentials.as_ref().map_or("somebody", |credentials| credentials.user.as_str());
            let by = format!("{user}, spiegel deliveries drop");
            act(&couch, &desk, targets, Action::Drop { by }, dry_run).await
        }
    }
}

/// Without the deliveries database nothing has failed; without the spiegel database the name is wrong.
async fn needs_installation(couch: &Couch, settings: &Settings) -> Result<(), Failure> {
    let failed = |error: CouchError| Failure::of_couch(couch, "look for the spiegel database", &error);
    match couch.db_exists(&settings.db_name).await.map_err(failed)? {
        true => Ok(()),
        false => Err(Failure::new(Exit::Config, run::missing_database(&settings.db_name, couch.address()))),
    }
}

// -- list ------------------------------------------------------------------------------------------------------------------

async fn list(desk: &Desk, filter: &Filter, limit: Option<usize>, json: bool) -> Result<(), CouchError> {
    let limit = match limit.unwrap_or(if json { 0 } else { LIMIT_DEFAULT }) {
        0 => usize::MAX,
        limit => limit,
    };
    let mut out = BufWriter::new(io::stdout());
    match json {
        true => list_json(desk, filter, limit, &mut out).await,
        false => list_table(desk, filter, limit, &mut out).await,
    }
}

/// Ends early where nobody reads any more.
async fn list_json(desk: &Desk, filter: &Filter, limit: usize, out: &mut impl Write) -> Result<(), CouchError> {
    let (mut after, mut left) = (None, limit);
    while let Some((docs, last)) = next_page(desk, filter, after).await? {
        for (_, doc) in docs.into_iter().take(left) {
            left -= 1;
            if writeln!(out, "{}", printable_json(&doc, false)).is_err() {
                return Ok(());
            }
        }
        if left == 0 || out.flush().is_err() {
            return Ok(());
        }
        after = Some(last);
    }
    for doc in disabled(desk, filter).await?.into_iter().take(left) {
        if writeln!(out, "{}", printable_json(&doc, false)).is_err() {
            break;
        }
    }
    let _ = out.flush();
    Ok(())
}

async fn list_table(desk: &Desk, filter: &Filter, limit: usize, out: &mut impl Write) -> Result<(), CouchError> {
    let mut table =
        Table::new(["key", "rule", "database", "document", "state", "attempts", "status", "next try or end", "error"]);
    let (mut after, mut counts, mut shown) = (None, Counts::default(), 0);
    while let Some((docs, last)) = next_page(desk, filter, after).await? {
        docs.iter().for_each(|(parked, _)| counts.add(parked));
        let rows: Vec<[String; 9]> = docs.iter().take(limit - shown).map(|(parked, _)| row(parked)).collect();
        shown += rows.len();
        if !rows.is_empty() && print(out, &table.lines(&rows)).is_err() {
            return Ok(());
        }
        after = Some(last);
    }
    let mut lines = Vec::new();
    match counts.all() {
        0 if filter.is_empty() => lines.push(String::from("no delivery has failed")),
        0 => lines.push(String::from("no delivery matches")),
        all => {
            lines.push(format!("\ndeliveries: {}", counts.line()));
            if shown < all {
                lines.push(format!("{shown} of {all} are shown; --limit 0 shows all"));
            }
        }
    }
    let disabled = disabled(desk, filter).await?;
    if !disabled.is_empty() {
        lines.push(String::from("\ndisabled rules, until they are edited or `spiegel rules enable ID` is run:"));
        let rows: Vec<[String; 4]> = disabled.iter().map(disabled_row).collect();
        lines.extend(Table::new(["rule", "since", "database", "error"]).lines(&rows));
    }
    let _ = print(out, &lines);
    Ok(())
}

fn print(out: &mut impl Write, lines: &[String]) -> io::Result<()> {
    for line in lines {
        writeln!(out, "{line}")?;
    }
    out.flush()
}

type Delivery = (Parked, Value);

/// Those that match of the next page. A filter that names one delivery needs no look at the others.
async fn next_page(desk: &Desk, filter: &Filter, after: Option<Key>) -> Result<Option<(Vec<Delivery>, Key)>, CouchError> {
    let (mut docs, last) = match (filter.key(), after) {
        (Some(_), Some(_)) => return Ok(None),
        (Some(key), None) => {
            let doc = desk.get(key).await?;
            (doc.into_iter().filter_map(|doc| Some((Parked::read(&doc)?, doc))).collect(), key)
        }
        (None, after) => match desk.read(after).await? {
            Some(page) => page,
            None => return Ok(None),
        },
    };
    docs.retain(|(parked, _)| filter.matches(parked));
    Ok(Some((docs, last)))
}

/// The documents of disabled rules: there are as many as rules at most.
pub(super) async fn disabled(desk: &Desk, filter: &Filter) -> Result<Vec<Value>, CouchError> {
    let mut all = Vec::new();
    let mut after: Option<String> = None;
    loop {
        let docs = desk.disabled(after.as_deref()).await?;
        let Some(last) = docs.last().and_then(|doc| doc["_id"].as_str()) else { return Ok(all) };
        after = Some(last.to_string());
        all.extend(docs.into_iter().filter(|doc| filter.matches_disabled(doc["rule"].as_str().unwrap_or_default())));
    }
}

fn row(parked: &Parked) -> [String; 9] {
    let cell = |text: &str| cut(&printable(text));
    let at = match parked.state {
        State::Parked => parked.next_attempt_at,
        State::Dead | State::Dropped => parked.ended_at,
    };
    let error = match &parked.reason {
        Some(reason) => format!("{reason}: {}", parked.last_error),
        None => parked.last_error.clone(),
    };
    [
        short(&parked.key()),
        cell(&parked.rule),
        cell(&parked.db),
        cell(&parked.doc_id),
        parked.state.name().to_string(),
        parked.attempts.to_string(),
        parked.last_status.map_or_else(|| String::from("–"), |status| status.to_string()),
        at.map_or_else(|| String::from("–"), timestamp),
        cell(&error),
    ]
}

fn short(key: &Key) -> String {
    key.doc_id().chars().skip(DELIVERY.len()).take(KEY_DIGITS_SHOWN).collect()
}

fn disabled_row(doc: &Value) -> [String; 4] {
    ["rule", "disabled_at", "db_name", "error"].map(|field| cut(&printable(doc[field].as_str().unwrap_or("–"))))
}

// -- show, retry, drop -----------------------------------------------------------------------------------------------------

async fn show(desk: &Desk, one: One) -> Result<Exit, CouchError> {
    let named = match one {
        One { key: Some(prefix), .. } => desk.named(&prefix).await?,
        One { rule, db, doc, .. } => {
            let key = Filter { rule, db, doc_id: doc, ..Filter::default() }.key();
            let found = match key {
                Some(key) => desk.get(key).await?,
                None => None,
            };
            found.map_or(Named::Nobody, Named::One)
        }
    };
    Ok(match named {
        Named::One(doc) => {
            say(&printable_json(&doc, true));
            Exit::Done
        }
        Named::Nobody => {
            say("no such delivery: it may have been delivered meanwhile");
            Exit::No
        }
        Named::Several => {
            say("several keys begin like that: give more of it");
            Exit::No
        }
    })
}

async fn act(couch: &Couch, desk: &Desk, targets: Targets, action: Action, dry_run: bool) -> Result<Exit, Failure> {
    let failed = |error: CouchError| Failure::of_couch(couch, "write the deliveries", &error);
    let Targets { keys, filter, all } = targets;
    let filter = filter.into_filter();
    let usage = |text: &str| Err(Failure::new(Exit::Usage, text));
    match (keys.is_empty(), filter.is_empty(), all) {
        (false, true, false) => act_on_keys(desk, &keys, &action, dry_run).await.map_err(failed),
        (true, false, false) | (true, true, true) => act_on_filter(desk, &filter, &action, dry_run).await.map_err(failed),
        (true, true, false) => usage("say which, by key or by --rule, --db, --doc, --state, --status; or say --all"),
        _ => usage("say which by keys, or by a filter, or by --all: not by several of these"),
    }
}

async fn act_on_keys(desk: &Desk, keys: &[KeyPrefix], action: &Action, dry_run: bool) -> Result<Exit, CouchError> {
    let mut docs: Vec<Value> = Vec::new();
    let mut exit = Exit::Done;
    for key in keys {
        match desk.named(key).await? {
            Named::One(doc) if docs.iter().any(|known| known["_id"] == doc["_id"]) => {}
            Named::One(doc) => docs.push(doc),
            Named::Nobody => {
                say(&format!("{key}: no such delivery: it may have been delivered meanwhile"));
                exit = Exit::No;
            }
            Named::Several => {
                say(&format!("{key}: several keys begin like that: give more of it"));
                exit = Exit::No;
            }
        }
    }
    let now = SystemTime::now();
    let tally = match dry_run {
        true => Tally { changed: docs.iter().filter(|doc| would_change(doc, action, now)).count(), contested: 0 },
        false => desk.act(docs, action, |_| true, now).await?,
    };
    Ok(told(tally, action, dry_run, exit))
}

async fn act_on_filter(desk: &Desk, filter: &Filter, action: &Action, dry_run: bool) -> Result<Exit, CouchError> {
    let (mut tally, mut after) = (Tally::default(), None);
    if dry_run {
        let now = SystemTime::now();
        while let Some((docs, last)) = next_page(desk, filter, after).await? {
            let meant = docs.iter().filter(|(parked, doc)| filter.acts_on(parked) && would_change(doc, action, now));
            tally.changed += meant.count();
            after = Some(last);
        }
        return Ok(told(tally, action, dry_run, Exit::Done));
    }
    while let Some((page, last)) = desk.act_on_page(filter, action, after, SystemTime::now()).await? {
        tally.changed += page.changed;
        tally.contested += page.contested;
        after = Some(last);
    }
    Ok(told(tally, action, dry_run, Exit::Done))
}

fn would_change(doc: &Value, action: &Action, now: SystemTime) -> bool {
    Parked::read(doc).is_some_and(|mut parked| action.apply(&mut parked, now))
}

fn told(tally: Tally, action: &Action, dry_run: bool, exit: Exit) -> Exit {
    let count = tally.changed;
    say(&match (action, dry_run) {
        (_, false) if tally == Tally::default() => String::from("no delivery matches: nothing was written"),
        (Action::Retry { .. }, true) => format!("would be tried again: {count}"),
        (Action::Drop { .. }, true) => format!("would be dropped: {count}"),
        (Action::Retry { .. }, false) => format!("tried again as soon as there is room: {count}"),
        (Action::Drop { .. }, false) => format!("dropped: {count}"),
    });
    if tally.contested > 0 {
        say(&format!("written by somebody else again and again, and left: {}; try again", tally.contested));
        return Exit::No;
    }
    exit
}

// -- rules enable ----------------------------------------------------------------------------------------------------------

/// Ends what a receiver's 410 began.
pub(super) async fn enable_rule(settings: &Settings, id: &str) -> Result<Exit, Failure> {
    let couch = couch(settings)?;
    let failed = |error: CouchError| Failure::of_couch(&couch, "enable the rule", &error);
    let shown = printable(id);
    match Desk::new(couch.clone(), &settings.db_name).enable(id).await.map_err(failed)? {
        Enabled::Now => {
            say(&format!("rule {shown:?} is enabled; what it missed is delivered now"));
            return Ok(Exit::Done);
        }
        Enabled::WasNotDisabled => {}
    }
    needs_installation(&couch, settings).await?;
    match couch.get_doc(&settings.db_name, id).await.map_err(failed)? {
        Some(_) => {
            say(&format!("rule {shown:?} was not disabled"));
            Ok(Exit::Done)
        }
        None => {
            say(&format!("there is no rule {shown:?}"));
            Ok(Exit::No)
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_row_says_what_a_person_looks_for_and_moves_no_cursor() {
        let (rule, db, doc) = ("mail\u{1b}[2J", "user_a", "o\nrder");
        let doc = json!({ "_id": Key::of(rule, db, doc).doc_id(), "_rev": "1-a", "type": "delivery", "rule": rule, "db_name": db,
            "doc_id": doc, "state": "dead", "attempts": 7, "last_status": 503, "reason": "given up after 3 retries",
            "ended_at": "2026-01-31T12:00:00.000Z", "next_attempt_at": null, "last_error": "answered 503" });
        let parked = Parked::read(&doc).expect("a delivery");
        let row = row(&parked);
        let expected = ["mail [2J", "user_a", "o rder", "dead", "7", "503", "2026-01-31T12:00:00.000Z"];
        assert_eq!(row[1..8], expected);
        assert_eq!(row[8], "given up after 3 retries: answered 503");
        assert_eq!((row[0].len(), row[0].parse::<KeyPrefix>().is_ok()), (KEY_DIGITS_SHOWN, true));
    }
}
