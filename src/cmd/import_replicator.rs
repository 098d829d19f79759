//! `spiegel import-replicator`: continuous jobs of `_replicator` become replicators of ours, and back.
//!
//! A job is removed only once its replicator has been written and read again, and both may run for a moment, which costs requests
//! and harms nothing. So it can be killed at any point and run again: what was written is found by its `_id`, which both have,
//! and by what it asks for.

mod job;

use super::documents::page;
use super::table::{Table, cut, printable};
use super::{Exit, Failure, couch, run, say, vault};
use crate::config::Settings;
use crate::couch::{Couch, CouchError, WriteResult};
use crate::replicate::native::parameters::Local;
use crate::vault::{Vault, redact_text};
use clap::Args;
use clap::builder::NonEmptyStringValueParser;
use job::{Plan, Planned, WayBack, address, id_of, is_same_work, job_of, replicator_of};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};

#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct Options {
    /// Do it; without this it is only shown
    #[arg(long)]
    apply: bool,
    /// The other way: replicators become continuous jobs
    #[arg(long)]
    back: bool,
    /// With --back: write passwords of the passwords file into the jobs, which cannot run without them
    #[arg(long, requires = "back")]
    with_passwords: bool,
    /// The database of the jobs
    #[arg(long, value_name = "NAME", default_value = "_replicator", value_parser = NonEmptyStringValueParser::new())]
    replicator_db: String,
    /// Show no more than this many; 0 shows all
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: usize,
}

/// A document that is written all the time is left to the next call.
const ROUNDS_MAX: usize = 5;

/// The two databases and the way between them.
struct Way<'a> {
    couch: &'a Couch,
    from: &'a str,
    to: &'a str,
    local: Local,
    vault: &'a Vault,
    back: Option<WayBack<'a>>,
    apply: bool,
}

/// What became of one document.
struct Outcome {
    id: String,
    source: String,
    target: String,
    end: End,
    notes: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
enum End {
    /// It would be carried, or it was.
    Carried,
    /// The other side has it: only the removal is left, or was.
    Finished,
    Left(String),
}

pub(super) async fn command(settings: &Settings, options: Options) -> Result<Exit, Failure> {
    let couch = couch(settings)?;
    let failed = |error: CouchError| Failure::of_couch(&couch, "import the jobs of the replicator", &error);
    if !couch.db_exists(&settings.db_name).await.map_err(failed)? {
        return Err(Failure::new(Exit::Config, run::missing_database(&settings.db_name, couch.address())));
    }
    if !couch.db_exists(&options.replicator_db).await.map_err(failed)? {
        say(&format!("there is no database \"{}\"", printable(&options.replicator_db)));
        return Ok(Exit::No);
    }
    let vault = vault(settings)?;
    let back = options.back.then(|| WayBack { couchdb: couch.settings(), vault: &vault, with_passwords: options.with_passwords });
    let (spiegel, jobs) = (settings.db_name.as_str(), options.replicator_db.as_str());
    let (from, to) = if options.back { (spiegel, jobs) } else { (jobs, spiegel) };
    let local = Local { url: couch.settings().url.clone(), credentials: couch.settings().credentials.clone() };
    let way = Way { couch: &couch, from, to, local, vault: &vault, back, apply: options.apply };
    let mut report = Report::new(&way, options.limit);
    let mut after = None;
    loop {
        let (docs, last) = page(&couch, from, after.as_deref()).await.map_err(failed)?;
        let (passed, planned) = way.plan(docs);
        report.pass(&passed);
        report.tell(&way.carry(planned).await.map_err(failed)?);
        match last {
            Some(last) => after = Some(last),
            None => return Ok(report.end()),
        }
    }
}

/// A document with what is to become of it.
type PlannedDoc = (Value, Planned);

impl Way<'_> {
    /// What is none of this command's business comes as its reasons.
    fn plan(&self, docs: Vec<Value>) -> (Vec<&'static str>, Vec<PlannedDoc>) {
        let (mut passed, mut planned) = (Vec::new(), Vec::new());
        for doc in docs.into_iter().filter(|doc| doc.is_object() && !id_of(doc).starts_with("_design/")) {
            match self.plan_of(&doc) {
                Planned { plan: Plan::Pass(why), .. } => passed.push(why),
                plan => planned.push((doc, plan)),
            }
        }
        (passed, planned)
    }

    fn plan_of(&self, doc: &Value) -> Planned {
        match &self.back {
            Some(back) => job_of(doc, back),
            None => replicator_of(doc, &self.local, self.vault),
        }
    }

    /// A page of documents. Where one is changed while it is carried, it is read and carried again.
    async fn carry(&self, docs: Vec<PlannedDoc>) -> Result<Vec<Outcome>, CouchError> {
        let mut outcomes = Vec::new();
        // What was written here may be written again, in the revision that it was written in.
        let mut mine = HashMap::new();
        let mut docs = docs;
        for _ in 0..ROUNDS_MAX {
            if docs.is_empty() {
                return Ok(outcomes);
            }
            let again = self.round(docs, &mut mine, &mut outcomes).await?;
            let read =
                self.couch.get_docs(self.from, &again.iter().map(|outcome| outcome.id.clone()).collect::<Vec<_>>()).await?;
            docs = Vec::new();
            for (outcome, doc) in again.into_iter().zip(read) {
                match doc {
                    Some(doc) => {
                        let planned = self.plan_of(&doc);
                        docs.push((doc, planned));
                    }
                    None => outcomes.push(outcome),
                }
            }
        }
        let left = End::Left(String::from("it is written all the time: run this again"));
        outcomes.extend(docs.iter().map(|(doc, planned)| outcome(doc, planned, left.clone())));
        Ok(outcomes)
    }

    /// Gives back what must be looked at again.
    async fn round(
        &self,
        docs: Vec<PlannedDoc>,
        mine: &mut HashMap<String, String>,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<Vec<Outcome>, CouchError> {
        let ids: Vec<String> = docs.iter().map(|(doc, _)| id_of(doc).to_string()).collect();
        let there = self.couch.get_docs(self.to, &ids).await?;
        let (mut writes, mut removals) = (Vec::new(), Vec::new());
        for ((doc, planned), there) in docs.into_iter().zip(there) {
            let wanted = match &planned.plan {
                Plan::Carry(wanted) => wanted.clone(),
                Plan::Pass(why) => {
                    outcomes.push(outcome(&doc, &planned, End::Left(format!("changed meanwhile: {why}"))));
                    continue;
                }
                Plan::Refuse(why) => {
                    outcomes.push(outcome(&doc, &planned, End::Left(why.clone())));
                    continue;
                }
            };
            let id = id_of(&doc).to_string();
            match there {
                Some(there) if self.is_carried(&wanted, &there) => {
                    let end = if mine.contains_key(&id) { End::Carried } else { End::Finished };
                    removals.push((doc, planned, end));
                }
                Some(there) if mine.get(&id).is_some_and(|rev| there["_rev"] == **rev) => {
                    let mut wanted = wanted;
                    wanted["_rev"] = there["_rev"].clone();
                    writes.push((doc, planned, wanted));
                }
                Some(there) => {
                    let to = self.to;
                    let why = match self.has_same_sides(&wanted, &there) {
                        true => {
                            format!(
                                "{to} has one of the same databases that asks for something else: delete the one that is not wanted"
                            )
                        }
                        false => format!("{to} has another document with this _id"),
                    };
                    outcomes.push(outcome(&doc, &planned, End::Left(why)));
                }
                None => writes.push((doc, planned, wanted)),
            }
        }
        if !self.apply {
            outcomes.extend(writes.iter().map(|(doc, planned, _)| outcome(doc, planned, End::Carried)));
            outcomes.extend(removals.iter().map(|(doc, planned, end)| outcome(doc, planned, end.clone())));
            return Ok(Vec::new());
        }
        removals.extend(self.write(writes, mine, outcomes).await?);
        self.remove(removals, outcomes).await
    }

    /// The same work, and in a form that works there.
    fn is_carried(&self, wanted: &Value, there: &Value) -> bool {
        let form = if self.back.is_some() { "continuous" } else { "type" };
        wanted[form] == there[form] && is_same_work(wanted, there)
    }

    /// Perhaps carried by a call that was killed, before one of the two was edited: who knows which is wanted.
    fn has_same_sides(&self, wanted: &Value, there: &Value) -> bool {
        let form = if self.back.is_some() { "continuous" } else { "type" };
        [form, "source", "target"].iter().all(|name| wanted[*name] == there[*name])
    }

    /// Gives back those that can be read where they were written: an answer may be lost, and a 202 is none.
    async fn write(
        &self,
        writes: Vec<(Value, Planned, Value)>,
        mine: &mut HashMap<String, String>,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<Vec<(Value, Planned, End)>, CouchError> {
        if writes.is_empty() {
            return Ok(Vec::new());
        }
        let wanted: Vec<Value> = writes.iter().map(|(_, _, wanted)| wanted.clone()).collect();
        let ids: Vec<String> = wanted.iter().map(|doc| id_of(doc).to_string()).collect();
        let answer = self.couch.bulk_docs(self.to, &wanted).await?;
        let there = self.couch.get_docs(self.to, &ids).await?;
        let mut confirmed = Vec::new();
        for (((doc, planned, wanted), result), there) in writes.into_iter().zip(answer.results).zip(there) {
            if let WriteResult::Saved { rev } = &result {
                mine.insert(id_of(&wanted).to_string(), rev.clone());
            }
            let is_there = there.is_some_and(|there| self.is_carried(&wanted, &there));
            let left = match result {
                WriteResult::Refused { reason } => format!("could not be written: {}", redact_text(&reason)),
                _ if !is_there => String::from("was written meanwhile by somebody else: run this again"),
                _ if !answer.confirmed => String::from("is written on too few nodes to be sure: run this again"),
                _ => {
                    confirmed.push((doc, planned, End::Carried));
                    continue;
                }
            };
            outcomes.push(outcome(&doc, &planned, End::Left(left)));
        }
        Ok(confirmed)
    }

    /// Removes what was carried, in the revision that was carried. Gives back what has another one by now.
    async fn remove(
        &self,
        removals: Vec<(Value, Planned, End)>,
        outcomes: &mut Vec<Outcome>,
    ) -> Result<Vec<Outcome>, CouchError> {
        if removals.is_empty() {
            return Ok(Vec::new());
        }
        let deletions: Vec<Value> =
            removals.iter().map(|(doc, ..)| json!({ "_id": doc["_id"], "_rev": doc["_rev"], "_deleted": true })).collect();
        let answer = self.couch.bulk_docs(self.from, &deletions).await?;
        let mut again = Vec::new();
        for ((doc, planned, end), result) in removals.into_iter().zip(answer.results) {
            match result {
                WriteResult::Saved { .. } if answer.confirmed => outcomes.push(outcome(&doc, &planned, end)),
                WriteResult::Refused { reason } => {
                    let left = format!("is carried, but could not be removed: {}", redact_text(&reason));
                    outcomes.push(outcome(&doc, &planned, End::Left(left)));
                }
                _ => again.push(outcome(&doc, &planned, end)),
            }
        }
        Ok(again)
    }
}

fn outcome(doc: &Value, planned: &Planned, end: End) -> Outcome {
    let [source, target] = ["source", "target"].map(|side| address(&doc[side]));
    Outcome { id: id_of(doc).to_string(), source, target, end, notes: planned.notes.clone() }
}

// -- what a person reads ---------------------------------------------------------------------------------------------------

struct Report {
    table: Table<5>,
    apply: bool,
    back: bool,
    limit: usize,
    shown: usize,
    shown_left: usize,
    carried: usize,
    finished: usize,
    left: usize,
    with_secrets: usize,
    passed: BTreeMap<&'static str, usize>,
}

impl Report {
    fn new(way: &Way<'_>, limit: usize) -> Self {
        Self {
            table: Table::new(["id", "source", "target", "what", "notes"]),
            apply: way.apply,
            back: way.back.is_some(),
            limit: if limit == 0 { usize::MAX } else { limit },
            shown: 0,
            shown_left: 0,
            carried: 0,
            finished: 0,
            left: 0,
            with_secrets: 0,
            passed: BTreeMap::new(),
        }
    }

    fn pass(&mut self, reasons: &[&'static str]) {
        for why in reasons {
            *self.passed.entry(why).or_default() += 1;
        }
    }

    /// What is left is shown however much is carried.
    fn tell(&mut self, outcomes: &[Outcome]) {
        let mut rows = Vec::new();
        for outcome in outcomes {
            let (count, shown) = match outcome.end {
                End::Carried => (&mut self.carried, &mut self.shown),
                End::Finished => (&mut self.finished, &mut self.shown),
                End::Left(_) => (&mut self.left, &mut self.shown_left),
            };
            *count += 1;
            self.with_secrets += usize::from(outcome.notes.iter().any(|note| note.contains("password")));
            if *shown < self.limit {
                *shown += 1;
                rows.push(self.row(outcome));
            }
        }
        if !rows.is_empty() {
            self.table.lines(&rows).iter().for_each(|line| say(line));
        }
    }

    fn row(&self, outcome: &Outcome) -> [String; 5] {
        let cell = |text: &str| cut(&printable(text));
        let what = match (&outcome.end, self.apply) {
            (End::Carried, true) => "carried",
            (End::Carried, false) => "carry",
            (End::Finished, true) => "removed",
            (End::Finished, false) => "remove",
            (End::Left(_), _) => "left",
        };
        let left = match &outcome.end {
            End::Left(why) => Some(why.clone()),
            End::Finished => Some(String::from("the other side has it already")),
            End::Carried => None,
        };
        let notes: Vec<String> = left.into_iter().chain(outcome.notes.iter().cloned()).collect();
        // A reason that is cut is none.
        let notes = printable(&notes.join("; "));
        [cell(&outcome.id), cell(&outcome.source), cell(&outcome.target), what.to_string(), notes]
    }

    fn end(self) -> Exit {
        let all = self.carried + self.finished;
        let (one, other) = if self.back { ("replicators", "jobs") } else { ("jobs", "replicators") };
        let head = if self.apply { "carried" } else { "to carry" };
        let mut line = format!("{one}: {all} {head} as {other}");
        if self.finished > 0 {
            line.push_str(&format!(" ({} of them were there already)", self.finished));
        }
        line.push_str(&format!(", {} left", self.left));
        if self.shown + self.shown_left > 0 {
            say("");
        }
        say(&line);
        if self.shown + self.shown_left < all + self.left {
            say(&format!("{} of {} are shown; --limit 0 shows all", self.shown + self.shown_left, all + self.left));
        }
        let counted = self.passed.iter().filter(|(why, _)| **why != job::NO_REPLICATOR);
        counted.for_each(|(why, count)| say(&format!("{count} not looked at: {why}")));
        if self.with_secrets > 0 {
            say(&format!("{} have a password in the document, which is carried as it is", self.with_secrets));
        }
        if !self.apply && all > 0 {
            say("nothing was changed: --apply does it");
        }
        if self.left > 0 { Exit::No } else { Exit::Done }
    }
}
