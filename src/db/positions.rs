//! How far each rule of a database has come, and the `change_listener` document that says so.
//!
//! Rules share one position, `last_seq`, as in the original. Where a rule is held back, it splits off at the longest prefix
//! that was delivered to it and the others go on; `ahead` keeps their positions, valid only while its `from` equals
//! `last_seq`. Seqs are opaque, so nothing here compares two of them for order: what is known comes from who read what when.

use crate::couch::Seq;
use crate::db::held;
use crate::job::timestamp;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::SystemTime;

pub type RuleId = Arc<str>;

/// A rule of this database as far as its position is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleStart {
    pub id: RuleId,
    pub rev: String,
    /// The rule's own `since`, which counts once, when the rule first meets this database.
    pub since: Option<Seq>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    pub until: SystemTime,
    pub retries: u32,
    /// When that was found.
    pub at: SystemTime,
}

/// Rules that stand at one position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    pub rules: BTreeSet<RuleId>,
    /// None: from the beginning.
    pub since: Option<Seq>,
    pub hold: Option<Hold>,
    /// The rule's document is invalid: nothing is read for it, and nobody's position passes what it has not had.
    is_suspended: bool,
    /// Suspended before it met the database: where it starts is not settled.
    is_unmet: bool,
    /// Deliveries beyond `since` that succeeded while one before them failed; they are not repeated while we live.
    pub delivered: HashSet<u64>,
    /// The read that last found the end of the feed from here.
    at_end: Option<u64>,
    /// The read that put the group here.
    placed: u64,
    /// Rows that this run still has to read: the first page and its `pending` of that moment.
    budget: Option<u64>,
}

/// What became of one page that was read for one group.
#[derive(Debug, Default)]
pub struct PageOutcome {
    pub row_seqs: Vec<Seq>,
    pub last_seq: Option<Seq>,
    /// Rows that could not be read and were passed over.
    pub malformed: usize,
    /// Rows after this page.
    pub pending: u64,
    /// For each rule that failed, the index of the first row that it did not get.
    pub failed: BTreeMap<RuleId, usize>,
    /// Those of them whose deliveries are under way, which is no failure.
    pub late: BTreeSet<RuleId>,
    /// A blocking rule failed at this row: nobody of the group got what comes after it.
    pub blocked_at: Option<usize>,
    /// Keys of what was delivered at or after the first failure.
    pub delivered: HashSet<u64>,
}

#[derive(Debug, Clone)]
pub struct Positions {
    base: Option<Seq>,
    groups: Vec<Group>,
    reads: u64,
    /// Reads of this run that only looked whether groups may join.
    joins: usize,
    /// Rules with a `since` of their own are always written, so that it counts only once.
    starts: BTreeMap<RuleId, Seq>,
    revs: BTreeMap<RuleId, String>,
    /// Rules that were edited between what the document says and this.
    edited: Vec<RuleId>,
    /// Whether what is in CouchDB says the same.
    changed: bool,
}

impl Positions {
    /// From a `change_listener` document, or from nothing where the database has none. Fields of a wrong type count as absent:
    /// that repeats, it never skips. `suspended` are rules that may be for this database, and cannot be used until they are mended.
    pub fn load(doc: Option<&Value>, rules: &[RuleStart], suspended: &[RuleId]) -> Self {
        let base = doc.and_then(|doc| doc.get("last_seq")).and_then(Seq::of_json);
        let ahead = doc.and_then(|doc| doc.get("ahead")).filter(|ahead| ahead.is_object());
        let ahead_is_valid = ahead.is_some_and(|ahead| ahead.get("from").and_then(Seq::of_json) == base);
        let stored = |rule: &RuleId| ahead?.get("rules")?.get(rule.as_ref()).and_then(Seq::of_json);
        let is_missing = doc.is_some_and(|doc| !doc["possibly_deleted_at"].is_null());

        let held = doc.and_then(|doc| held::load(doc, base.as_ref(), rules));
        // Of a database that was missing, the pause is one before it is looked for again.
        let hold_of = |rule: &RuleStart| held.as_ref().filter(|_| !is_missing)?.holds.get(&rule.id).cloned();

        let mut positions = Self {
            base,
            groups: Vec::new(),
            reads: 0,
            joins: 0,
            starts: BTreeMap::new(),
            revs: BTreeMap::new(),
            edited: Vec::new(),
            changed: false,
        };
        for rule in rules {
            let since = match (ahead_is_valid, stored(&rule.id)) {
                (true, Some(seq)) => Some(seq),
                // Somebody else moved `last_seq`: he had every rule, so `last_seq` holds for this one, too.
                (false, Some(_)) => positions.base.clone(),
                (_, None) => rule.since.clone().or_else(|| positions.base.clone()),
            };
            positions.place(rule, since, hold_of(rule));
        }
        for rule in suspended {
            // Who moved `last_seq` could not use it either.
            positions.suspend(rule, stored(rule));
        }
        let is_held = ["dirty_at", "held"].iter().any(|field| doc.is_some_and(|doc| !doc[*field].is_null()));
        positions.changed = is_held && !is_missing && !suspended.is_empty();
        if let Some(held) = held {
            positions.revs.extend(held.newer);
            positions.edited = held.edited;
            return positions;
        }
        let time = |field: &str| doc.and_then(|doc| humantime::parse_rfc3339(doc[field].as_str()?).ok());
        if let Some(until) = time("dirty_at").filter(|_| !is_missing) {
            let retries = doc.and_then(|doc| doc.get("retries")).and_then(Value::as_u64).unwrap_or(0);
            let retries = u32::try_from(retries).unwrap_or(u32::MAX);
            let at = time("updated_at").unwrap_or(SystemTime::UNIX_EPOCH);
            let base = positions.base.clone();
            for group in positions.groups.iter_mut().filter(|group| group.since == base && !group.is_suspended) {
                group.hold = Some(Hold { until, retries, at });
            }
        }
        positions
    }

    /// Rules that the document spoke of in an older revision.
    pub fn edited_since_stored(&self) -> &[RuleId] {
        &self.edited
    }

    /// Where it stands, or `since` where it stands nowhere yet: it was there before the process, or is new.
    fn suspend(&mut self, rule: &RuleId, since: Option<Seq>) {
        let stood = self.groups.iter_mut().find(|group| group.rules.contains(rule));
        let is_unmet = stood.is_none() && since.is_none();
        let (since, delivered) = match stood {
            Some(group) if group.is_suspended => return,
            Some(group) => {
                group.rules.remove(rule);
                self.changed |= group.hold.is_some();
                (group.since.clone(), group.delivered.clone())
            }
            None => (since.or_else(|| self.base.clone()), HashSet::new()),
        };
        let group = Group::at(BTreeSet::from([rule.clone()]), since);
        self.groups.push(Group { is_suspended: true, is_unmet, delivered, ..group });
        self.groups.retain(|group| !group.rules.is_empty());
    }

    fn place(&mut self, rule: &RuleStart, since: Option<Seq>, hold: Option<Hold>) {
        self.revs.entry(rule.id.clone()).or_insert_with(|| rule.rev.clone());
        if let Some(start) = &rule.since {
            self.starts.insert(rule.id.clone(), start.clone());
        }
        match self.groups.iter_mut().find(|group| group.joins(&since, hold.as_ref())) {
            Some(group) => {
                group.rules.insert(rule.id.clone());
                group.at_end = None;
            }
            None => self.groups.push(Group { hold, ..Group::at(BTreeSet::from([rule.id.clone()]), since) }),
        }
    }

    /// Rules came and went: a new one starts at `last_seq` or its own `since`. Those that were edited are not held any more, what
    /// held them back may be mended; they are given back.
    pub fn sync(&mut self, rules: &[RuleStart], suspended: &[RuleId]) -> Vec<RuleId> {
        let wanted: BTreeSet<&RuleId> = rules.iter().map(|rule| &rule.id).chain(suspended).collect();
        for group in &mut self.groups {
            group.rules.retain(|rule| wanted.contains(rule));
        }
        self.groups.retain(|group| !group.rules.is_empty());
        self.starts.retain(|rule, _| wanted.contains(rule));
        self.revs.retain(|rule, _| wanted.contains(rule));
        self.mended(rules);
        for rule in suspended {
            self.suspend(rule, None);
        }
        let known: BTreeSet<RuleId> = self.groups.iter().flat_map(|group| group.rules.iter().cloned()).collect();
        for rule in rules.iter().filter(|rule| !known.contains(&rule.id)) {
            let since = rule.since.clone().or_else(|| self.base.clone());
            self.place(rule, since, None);
        }
        let mut edited = Vec::new();
        for rule in rules {
            let rev = self.revs.entry(rule.id.clone()).or_insert_with(|| rule.rev.clone());
            if held::is_newer(&rule.rev, rev) {
                rev.clone_from(&rule.rev);
                edited.push(rule.id.clone());
            }
        }
        edited.iter().for_each(|rule| self.lift_hold(rule));
        edited
    }

    fn mended(&mut self, rules: &[RuleStart]) {
        for rule in rules {
            let Some(at) = self.groups.iter().position(|group| group.is_suspended && group.rules.contains(&rule.id)) else {
                continue;
            };
            match (self.groups[at].is_unmet, &rule.since) {
                // It meets the database now.
                (true, Some(_)) => drop(self.groups.remove(at)),
                (_, since) => {
                    (self.groups[at].is_suspended, self.groups[at].is_unmet) = (false, false);
                    self.starts.extend(since.clone().map(|since| (rule.id.clone(), since)));
                }
            }
        }
    }

    /// What held it back may be mended.
    pub fn lift_hold(&mut self, rule: &RuleId) {
        for group in self.groups.iter_mut().filter(|group| group.rules.contains(rule)) {
            self.changed |= group.hold.take().is_some();
        }
    }

    /// What was found before then may not be so any more.
    pub fn lift_hold_from_before(&mut self, rule: &RuleId, then: SystemTime) {
        let is_older = |group: &Group| group.hold.as_ref().is_some_and(|hold| hold.at < then);
        if self.groups.iter().any(|group| group.rules.contains(rule) && is_older(group)) {
            self.lift_hold(rule);
        }
    }

    /// What a rule waited for has come.
    pub fn due_now(&mut self, rule: &RuleId, now: SystemTime) {
        for hold in self.groups.iter_mut().filter(|group| group.rules.contains(rule)).filter_map(|group| group.hold.as_mut()) {
            hold.until = now;
        }
    }

    /// Whether rules stand elsewhere that are not held, or for their late deliveries only; and whether some of those that are
    /// not held have something to read.
    pub fn others(&self, index: usize, is_late: impl Fn(&RuleId) -> bool) -> (bool, bool) {
        let others = || {
            let others = self.groups.iter().enumerate().filter(|(at, _)| *at != index).map(|(_, group)| group);
            others.filter(|group| !group.is_suspended)
        };
        let goes_on = |group: &Group| group.hold.is_none() || group.rules.iter().any(&is_late);
        let reads = |group: &Group| group.hold.is_none() && group.at_end.is_none() && group.budget != Some(0);
        (others().any(goes_on), others().any(reads))
    }

    /// By rule, the keys of what was delivered beyond its position.
    pub fn delivered(&self) -> Vec<(RuleId, HashSet<u64>)> {
        let known = self.groups.iter().filter(|group| !group.delivered.is_empty());
        known.flat_map(|group| group.rules.iter().map(|rule| (rule.clone(), group.delivered.clone()))).collect()
    }

    /// The group waits on, without a try: what it waits for is known to be as it was.
    pub fn hold_on(&mut self, index: usize, until: SystemTime, now: SystemTime) {
        let hold = &mut self.groups[index].hold;
        self.changed |= hold.is_none();
        let retries = hold.as_ref().map_or(0, |hold| hold.retries);
        *hold = Some(Hold { until, retries, at: now });
    }

    /// No group waits longer than until then for what was found before `then`: that may have changed while nobody looked.
    pub fn hold_at_most(&mut self, until: SystemTime, then: SystemTime) {
        for hold in self.groups.iter_mut().filter_map(|group| group.hold.as_mut()).filter(|hold| hold.at < then) {
            hold.until = hold.until.min(until);
        }
    }

    /// A new run: whoever is not held back reads again, and whoever's time has come tries again.
    pub fn begin_run(&mut self) {
        self.joins = 0;
        for group in &mut self.groups {
            group.at_end = None;
            group.budget = None;
        }
    }

    /// True where the last run left rows that were written while it ran.
    pub fn has_more(&self) -> bool {
        self.groups.iter().any(|group| group.hold.is_none() && group.at_end.is_none() && group.budget == Some(0))
    }

    /// The group to read next, or None when all that may run have reached the end and stand together.
    pub fn next_read(&self, now: SystemTime) -> Option<usize> {
        let is_ready = |group: &Group| !group.is_suspended && group.hold.as_ref().is_none_or(|hold| hold.until <= now);
        let ready = || self.groups.iter().enumerate().filter(|(_, group)| is_ready(group));
        // What failed is tried again after those that did not.
        let reads = ready().filter(|(_, group)| group.at_end.is_none() && group.budget != Some(0));
        if let Some((index, _)) = reads.min_by_key(|(_, group)| group.hold.is_some()) {
            return Some(index);
        }
        if ready().any(|(_, group)| group.at_end.is_none()) {
            return None;
        }
        // All are at the end, but not as of the same moment: the one that read first looks again, to join the others.
        let mut at_end = ready();
        match (at_end.next(), at_end.next()) {
            // On a database that is written without pause they may never meet; the next run tries again.
            (Some(_), Some(_)) if self.joins < 2 * self.groups.len() => {
                ready().min_by_key(|(_, group)| group.at_end).map(|(index, _)| index)
            }
            _ => None,
        }
    }

    pub fn group(&self, index: usize) -> &Group {
        &self.groups[index]
    }

    /// The server says that this position is beyond its end: the database was made again, everything is new.
    pub fn restart(&mut self, index: usize) {
        let group = &mut self.groups[index];
        group.since = None;
        group.delivered.clear();
        group.at_end = None;
        for group in self.groups.iter_mut().filter(|group| group.is_suspended) {
            group.since = None;
        }
        self.base = None;
        self.changed = true;
    }

    /// Takes in what became of a page. `backoff` is asked for each group that is now held back, with its rule, or None for all of the
    /// page, and its retries so far.
    pub fn page_done(
        &mut self,
        index: usize,
        page: PageOutcome,
        now: SystemTime,
        mut backoff: impl FnMut(Option<&RuleId>, u32) -> SystemTime,
    ) {
        self.reads += 1;
        self.joins += usize::from(self.groups[index].at_end.is_some());
        let alone = self.groups.len() == 1;
        let retries = self.groups[index].hold.as_ref().map_or(0, |hold| hold.retries);
        let since = self.groups[index].since.clone();
        let since_before = |row: usize| if row == 0 { since.clone() } else { page.row_seqs.get(row - 1).cloned() };

        if let Some(blocked_at) = page.blocked_at {
            let first = page.failed.values().copied().min().unwrap_or(blocked_at).min(blocked_at);
            let group = &mut self.groups[index];
            group.since = since_before(first);
            group.hold = Some(Hold { until: backoff(None, retries), retries: retries.saturating_add(1), at: now });
            group.delivered.extend(page.delivered);
            group.at_end = None;
            group.placed = self.reads;
            self.changed = true;
            if alone {
                self.base = self.groups[index].since.clone();
            }
            return;
        }

        let mut split = Vec::new();
        for (rule, first) in &page.failed {
            self.groups[index].rules.remove(rule);
            // A rule that got on is failing anew, not still.
            let retries = if *first == 0 { retries } else { 0 };
            let failures = u32::from(!page.late.contains(rule));
            let mut delivered = page.delivered.clone();
            delivered.extend(self.groups[index].delivered.iter().copied());
            split.push(Group {
                hold: Some(Hold { until: backoff(Some(rule), retries), retries: retries.saturating_add(failures), at: now }),
                delivered,
                placed: self.reads,
                ..Group::at(BTreeSet::from([rule.clone()]), since_before(*first))
            });
        }
        self.changed |= !split.is_empty() || !page.row_seqs.is_empty() || page.malformed > 0 || self.groups[index].hold.is_some();
        if alone && let Some(first) = page.failed.values().copied().min() {
            // Everyone else of this page is further on, so this is the least of all positions.
            self.base = since_before(first);
        }
        self.advance(index, &page);
        self.groups.extend(split);
        self.groups.retain(|group| !group.rules.is_empty());
        self.rebase();
    }

    fn advance(&mut self, index: usize, page: &PageOutcome) {
        let previous_end = self.groups[index].at_end;
        let group = &mut self.groups[index];
        let rows = page.row_seqs.len() as u64;
        group.budget = Some(group.budget.unwrap_or(rows.saturating_add(page.pending)).saturating_sub(rows));
        let at_end = page.pending == 0;
        group.hold = None;
        group.delivered.clear();
        let starts_now = group.since.as_ref().is_some_and(is_now);
        let passed_rows = !page.row_seqs.is_empty() || page.malformed > 0 || !at_end;
        if let Some(last_seq) = &page.last_seq
            && (passed_rows || starts_now || group.since.is_none())
        {
            group.since = Some(last_seq.clone());
            // "now" means this moment and no later one.
            self.changed |= starts_now;
        }
        group.at_end = at_end.then_some(self.reads);
        group.placed = self.reads;
        if !page.row_seqs.is_empty() || !at_end {
            return;
        }
        // No row since its previous end: whoever reached the end after that has seen the same, and this group may take that
        // position, never the other way round, because a replica that answered late may have shown less.
        let Some(previous_end) = previous_end else { return };
        let newest = self.groups.iter().enumerate().filter(|(other, group)| {
            *other != index && group.hold.is_none() && group.at_end.is_some_and(|read| read > previous_end)
        });
        if let Some((other, _)) = newest.max_by_key(|(_, group)| group.at_end) {
            let rules = std::mem::take(&mut self.groups[index].rules);
            self.groups[other].rules.extend(rules);
            self.groups[other].delivered.clear();
            self.changed = true;
        }
    }

    /// `last_seq` must not be ahead of any rule, so it moves only where that is certain.
    fn rebase(&mut self) {
        if self.groups.len() == 1 {
            self.base = self.groups[0].since.clone();
            return;
        }
        let mut behind = self.groups.iter().filter(|group| group.at_end.is_none());
        if let (Some(last), None) = (behind.next(), behind.next()) {
            let others_are_ahead = self.groups.iter().all(|group| group.at_end.is_none_or(|read| read >= last.placed));
            if others_are_ahead {
                self.base = last.since.clone();
            }
        }
    }

    /// When the next rule that is held back may try again.
    pub fn due(&self) -> Option<SystemTime> {
        self.groups.iter().filter_map(|group| group.hold.as_ref()).map(|hold| hold.until).min()
    }

    /// When the next rule that is held back may try again, and how often they failed.
    pub fn held(&self) -> Option<(SystemTime, u32)> {
        let retries = self.groups.iter().filter_map(|group| group.hold.as_ref()).map(|hold| hold.retries).max();
        Some((self.due()?, retries?))
    }

    pub fn held_rules(&self) -> Vec<RuleId> {
        self.groups.iter().filter(|group| group.hold.is_some()).flat_map(|group| group.rules.iter().cloned()).collect()
    }

    /// The position at which every rule has all that this run read; None where one was left behind.
    pub fn complete(&self) -> Option<&Seq> {
        match self.groups.as_slice() {
            [group] if group.hold.is_none() && group.at_end.is_some() && group.since == self.base => self.base.as_ref(),
            _ => None,
        }
    }

    /// True while there is something that would be lost, and repeated, by forgetting this and loading it again.
    pub fn remembers_deliveries(&self) -> bool {
        self.groups.iter().any(|group| !group.delivered.is_empty() && !group.is_suspended)
    }

    /// The database was made again: what was delivered was another one's.
    pub fn forget_deliveries(&mut self) {
        for group in &mut self.groups {
            group.delivered.clear();
        }
    }

    pub fn changed(&self) -> bool {
        self.changed
    }

    pub fn saved(&mut self) {
        self.changed = false;
    }

    /// Writes the fields that are ours into a `change_listener` document.
    pub fn store(&self, doc: &mut Map<String, Value>) {
        doc.insert(String::from("last_seq"), json_of(self.base.as_ref()));
        let mut rules = Map::new();
        for group in &self.groups {
            for rule in &group.rules {
                let is_elsewhere = group.since != self.base || self.starts.contains_key(rule);
                if (is_elsewhere || group.is_suspended) && !group.is_unmet {
                    rules.insert(rule.to_string(), json_of(group.since.as_ref()));
                }
            }
        }
        match rules.is_empty() {
            true => drop(doc.remove("ahead")),
            false => drop(doc.insert(String::from("ahead"), json!({ "from": json_of(self.base.as_ref()), "rules": rules }))),
        }
        let held = self.groups.iter().filter_map(|group| Some((group, group.hold.as_ref()?)));
        let rev = |rule| self.revs.get(rule).map_or("", String::as_str);
        let held = held.flat_map(|(group, hold)| group.rules.iter().map(move |rule| (rule, hold, rev(rule))));
        held::store(doc, json_of(self.base.as_ref()), held);
        match self.held() {
            Some((due, retries)) => {
                doc.insert(String::from("dirty_at"), Value::from(timestamp(due)));
                doc.insert(String::from("retries"), Value::from(retries));
            }
            _ => {
                for field in ["dirty_at", "retries"] {
                    if doc.contains_key(field) {
                        doc.insert(String::from(field), Value::Null);
                    }
                }
            }
        }
    }
}

impl Group {
    fn at(rules: BTreeSet<RuleId>, since: Option<Seq>) -> Self {
        Self {
            rules,
            since,
            hold: None,
            is_suspended: false,
            is_unmet: false,
            delivered: HashSet::new(),
            at_end: None,
            placed: 0,
            budget: None,
        }
    }

    /// Whether a rule that comes from there, and is held so, reads with it.
    fn joins(&self, since: &Option<Seq>, hold: Option<&Hold>) -> bool {
        self.since == *since && self.hold.as_ref() == hold && self.delivered.is_empty() && !self.is_suspended
    }

    pub fn is_probing(&self) -> bool {
        self.hold.as_ref().is_some_and(|hold| hold.retries > 0)
    }
}

fn is_now(seq: &Seq) -> bool {
    matches!(seq, Seq::Text(text) if text.as_ref() == "now")
}

fn json_of(seq: Option<&Seq>) -> Value {
    seq.map_or(Value::Null, Seq::to_json)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn rule(id: &str) -> RuleStart {
        RuleStart { id: id.into(), rev: "1-r".into(), since: None }
    }

    fn page(seqs: &[&str], at_end: bool) -> PageOutcome {
        PageOutcome {
            row_seqs: seqs.iter().map(|seq| Seq::from(*seq)).collect(),
            last_seq: Some(Seq::from(*seqs.last().unwrap_or(&"end"))),
            pending: u64::from(!at_end),
            ..PageOutcome::default()
        }
    }

    fn failing(mut page: PageOutcome, rule: &str, row: usize) -> PageOutcome {
        page.failed.insert(rule.into(), row);
        page
    }

    const LATER: fn(Option<&RuleId>, u32) -> SystemTime = |_, _| SystemTime::UNIX_EPOCH + Duration::from_secs(4_000_000_000);

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    fn stored(positions: &Positions) -> Value {
        let mut doc = Map::new();
        positions.store(&mut doc);
        Value::Object(doc)
    }

    #[test]
    fn rules_share_one_position() {
        let mut positions = Positions::load(None, &[rule("a"), rule("b")], &[]);
        positions.begin_run();
        let now = SystemTime::now();
        assert_eq!(positions.next_read(now), Some(0));
        positions.page_done(0, page(&["1", "2"], true), NOW, LATER);
        assert_eq!(positions.next_read(now), None);
        assert_eq!(stored(&positions), json!({ "last_seq": "2" }));
    }

    #[test]
    fn a_rule_that_fails_is_held_at_its_prefix_and_the_others_go_on() {
        let mut positions = Positions::load(Some(&json!({ "last_seq": "0" })), &[rule("dead"), rule("live")], &[]);
        positions.begin_run();
        positions.page_done(0, failing(page(&["1", "2", "3"], true), "dead", 1), NOW, LATER);
        let doc = stored(&positions);
        assert_eq!(doc["last_seq"], "1");
        assert_eq!(doc["ahead"], json!({ "from": "1", "rules": { "live": "3" } }));
        assert_eq!(doc["retries"], 1);
        assert_eq!(positions.held_rules(), ["dead".into()]);

        let again = Positions::load(Some(&doc), &[rule("dead"), rule("live")], &[]);
        let live = again.groups.iter().find(|group| group.rules.contains("live")).unwrap();
        assert_eq!(live.since, Some(Seq::from("3")));
        assert!(live.hold.is_none());
        let dead = again.groups.iter().find(|group| group.rules.contains("dead")).unwrap();
        assert_eq!((dead.since.clone(), dead.hold.is_some()), (Some(Seq::from("1")), true));
    }

    #[test]
    fn each_rule_waits_for_its_own_time_whoever_marks_the_document() {
        let rules = [rule("dead"), rule("slow"), rule("live")];
        let mut positions = Positions::load(Some(&json!({ "last_seq": "0" })), &rules, &[]);
        positions.begin_run();
        let outcome = failing(failing(page(&["1", "2", "3"], true), "dead", 0), "slow", 0);
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        positions.page_done(0, outcome, NOW, |rule, _| at(if rule.is_some_and(|rule| **rule == *"dead") { 100 } else { 200 }));
        let mut doc = stored(&positions);
        assert_eq!(doc["dirty_at"], timestamp(at(100)));
        (doc["dirty"], doc["dirty_at"]) = (json!(true), json!(null));

        let until = |positions: &Positions, rule: &str| {
            let group = positions.groups.iter().find(|group| group.rules.contains(rule)).unwrap();
            group.hold.as_ref().map(|hold| hold.until)
        };
        let holds = |positions: &Positions| ["dead", "slow", "live"].map(|rule| until(positions, rule));
        assert_eq!(holds(&Positions::load(Some(&doc), &rules, &[])), [Some(at(100)), Some(at(200)), None]);
        let edited = [RuleStart { rev: "2-r".into(), ..rule("dead") }, rule("slow"), rule("live")];
        assert_eq!(holds(&Positions::load(Some(&doc), &edited, &[])), [None, Some(at(200)), None], "an edit may have mended it");
        assert_eq!(positions.sync(&edited, &[]), ["dead".into()]);
        assert_eq!(holds(&positions), [None, Some(at(200)), None]);
        assert!(positions.sync(&edited, &[]).is_empty());
        assert!(stored(&positions)["held"]["rules"]["slow"]["rev"] == "1-r", "{}", stored(&positions));
        // Whoever does without `ahead` has sent everything to every rule up to where he moved the position.
        doc["last_seq"] = json!("9");
        assert_eq!(holds(&Positions::load(Some(&doc), &rules, &[])), [None, None, None]);
    }

    #[test]
    fn nobody_passes_what_a_rule_has_not_had_while_its_document_is_invalid() {
        let (both, live, mended) = ([rule("r"), rule("live")], [rule("live")], [rule("r"), rule("live")]);
        let since = |positions: &Positions, rule: &str| {
            positions.groups.iter().find(|group| group.rules.contains(rule)).and_then(|group| group.since.clone())
        };
        for held_at_first in [false, true] {
            let mut positions = Positions::load(Some(&json!({ "last_seq": "0" })), &both, &[]);
            let first = page(&["1", "2"], true);
            positions.page_done(0, if held_at_first { failing(first, "r", 1) } else { first }, NOW, LATER);
            let stood = Some(Seq::from(if held_at_first { "1" } else { "2" }));
            // A typo; the process may be another one by now.
            for is_reloaded in [false, true] {
                let mut positions = match is_reloaded {
                    true => Positions::load(Some(&stored(&positions)), &live, &["r".into()]),
                    false => positions.clone(),
                };
                positions.sync(&live, &["r".into()]);
                positions.begin_run();
                while let Some(index) = positions.next_read(SystemTime::now()) {
                    assert!(!positions.group(index).rules.contains("r"), "nothing is read for it");
                    let more = positions.group(index).since != Some(Seq::from("4"));
                    positions.page_done(index, page(if more { &["3", "4"] } else { &[] }, true), NOW, LATER);
                }
                assert_eq!((since(&positions, "live"), positions.complete()), (Some(Seq::from("4")), None));
                assert!(positions.held().is_none());
                let doc = stored(&positions);
                assert_eq!(since(&Positions::load(Some(&doc), &mended, &[]), "r"), stood, "{held_at_first} {is_reloaded} {doc}");
                positions.sync(&mended, &[]);
                assert_eq!(since(&positions, "r"), stood, "{held_at_first} {is_reloaded}");
                assert!(positions.next_read(SystemTime::now()).is_some());
                // Nobody has it any more.
                positions.sync(&live, &[]);
                assert_eq!(positions.groups.len(), 1);
            }
        }
    }

    #[test]
    fn a_rule_with_a_since_of_its_own_meets_the_database_once_however_often_it_is_invalid() {
        let own = |since: &str| RuleStart { since: Some(Seq::from(since)), ..rule("own") };
        let since_of = |positions: &Positions| {
            positions.groups.iter().find(|group| group.rules.contains("own")).and_then(|group| group.since.clone())
        };
        let suspended = ["own".into()];
        // It had met it: it goes on where it stood, wherever the others are by then.
        let met = json!({ "last_seq": "5", "ahead": { "from": "5", "rules": { "own": "5" } } });
        // Somebody else moved `last_seq`, who cannot use the rule either.
        let moved = json!({ "last_seq": "6", "ahead": { "from": "5", "rules": { "own": "5" } } });
        for doc in [met, moved] {
            let mut positions = Positions::load(Some(&doc), &[rule("live")], &suspended);
            positions.begin_run();
            let live = positions.next_read(NOW).expect("the live one");
            positions.page_done(live, page(&["7"], true), NOW, LATER);
            let doc = stored(&positions);
            assert_eq!(since_of(&Positions::load(Some(&doc), &[rule("live"), own("now")], &[])), Some(Seq::from("5")), "{doc}");
            positions.sync(&[rule("live"), own("now")], &[]);
            assert_eq!(since_of(&positions), Some(Seq::from("5")));
            let doc = stored(&positions);
            assert_eq!(since_of(&Positions::load(Some(&doc), &[rule("live"), own("now")], &[])), Some(Seq::from("5")), "{doc}");
        }
        // It had not: what it asks for counts once it can be used.
        let mut positions = Positions::load(Some(&json!({ "last_seq": "5" })), &[rule("live")], &suspended);
        assert!(stored(&positions).get("ahead").is_none());
        positions.sync(&[rule("live"), own("0")], &[]);
        assert_eq!(since_of(&positions), Some(Seq::from("0")));
    }

    #[test]
    fn what_held_a_rule_is_taken_back_where_its_document_is_spoilt() {
        let mut positions = Positions::load(Some(&json!({ "last_seq": "0" })), &[rule("r"), rule("live")], &[]);
        positions.page_done(0, failing(page(&["1"], true), "r", 0), NOW, LATER);
        let doc = stored(&positions);
        positions.saved();
        positions.sync(&[rule("live")], &["r".into()]);
        assert!(positions.changed() && stored(&positions)["dirty_at"].is_null());
        assert!(Positions::load(Some(&doc), &[rule("live")], &["r".into()]).changed());
    }

    #[test]
    fn a_stale_ahead_falls_back_to_last_seq() {
        let doc = json!({ "last_seq": "7", "ahead": { "from": "1", "rules": { "live": "3" } } });
        let positions = Positions::load(Some(&doc), &[rule("live")], &[]);
        assert_eq!(positions.group(0).since, Some(Seq::from("7")));
    }

    #[test]
    fn a_rule_that_recovers_joins_the_others_again() {
        let mut positions = Positions::load(Some(&json!({ "last_seq": "0" })), &[rule("dead"), rule("live")], &[]);
        positions.begin_run();
        positions.page_done(0, failing(page(&["1", "2"], true), "dead", 0), NOW, |_, _| SystemTime::UNIX_EPOCH);
        let now = SystemTime::now();
        positions.begin_run();
        for _ in 0..6 {
            let Some(index) = positions.next_read(now) else { break };
            let outcome =
                if positions.group(index).since == Some(Seq::from("0")) { page(&["1'", "2'"], true) } else { page(&[], true) };
            positions.page_done(index, outcome, NOW, LATER);
        }
        assert_eq!(positions.groups.len(), 1, "{positions:?}");
        assert_eq!(positions.next_read(now), None);
        let doc = stored(&positions);
        assert!(doc.get("ahead").is_none(), "{doc}");
        assert_ne!(doc["last_seq"], "0");
    }

    #[test]
    fn what_failed_is_tried_again_after_those_that_did_not() {
        let mut positions = Positions::load(Some(&json!({ "last_seq": "0" })), &[rule("dead"), rule("live")], &[]);
        positions.begin_run();
        positions.page_done(0, failing(page(&["1", "2"], true), "dead", 0), NOW, |_, _| SystemTime::UNIX_EPOCH);
        let now = SystemTime::now();
        for held_first in [false, true] {
            positions.groups.sort_by_key(|group| group.hold.is_some() != held_first);
            positions.begin_run();
            for expected in ["live", "dead"] {
                let index = positions.next_read(now).unwrap();
                assert!(positions.group(index).rules.contains(expected), "{expected}, {positions:?}");
                positions.groups[index].at_end = Some(1);
            }
        }
    }

    #[test]
    fn a_blocking_rule_holds_everyone() {
        let mut positions = Positions::load(None, &[rule("a"), rule("b")], &[]);
        positions.begin_run();
        let outcome = PageOutcome { blocked_at: Some(1), ..page(&["1", "2", "3"], false) };
        positions.page_done(0, outcome, NOW, LATER);
        assert_eq!(positions.groups.len(), 1);
        assert_eq!(stored(&positions)["last_seq"], "1");
        assert_eq!(positions.next_read(SystemTime::now()), None);
    }

    #[test]
    fn last_seq_never_passes_a_rule_that_is_held_in_the_middle() {
        let now = SystemTime::now();
        let mut positions = Positions::load(Some(&json!({ "last_seq": "0" })), &[rule("a"), rule("b"), rule("c")], &[]);
        positions.begin_run();
        // b stops behind a; c goes on to the end.
        let outcome = failing(failing(page(&["1", "2", "3", "4"], true), "a", 1), "b", 3);
        positions.page_done(0, outcome, NOW, |_, _| SystemTime::UNIX_EPOCH);
        assert_eq!(stored(&positions)["last_seq"], "1");
        // a comes back and reads on, past b perhaps: nobody can tell, so last_seq stays.
        positions.begin_run();
        let a = positions.groups.iter().position(|group| group.rules.contains("a")).unwrap();
        positions.page_done(a, page(&["2'"], false), NOW, LATER);
        assert_eq!(stored(&positions)["last_seq"], "1");
        assert!(positions.next_read(now).is_some());
    }

    #[test]
    fn a_new_rule_starts_at_last_seq_or_at_its_own_since_once() {
        let mut positions = Positions::load(Some(&json!({ "last_seq": "5" })), &[rule("old")], &[]);
        let zero = RuleStart { id: "zero".into(), rev: "1-r".into(), since: Some(Seq::zero()) };
        positions.sync(&[rule("old"), rule("new"), zero.clone()], &[]);
        assert_eq!(positions.group(0).rules.len(), 2);
        let doc = stored(&positions);
        assert_eq!(doc["ahead"]["rules"], json!({ "zero": 0 }));

        positions.begin_run();
        while let Some(index) = positions.next_read(SystemTime::now()) {
            positions.page_done(index, page(&[], true), NOW, LATER);
        }
        let doc = stored(&positions);
        let again = Positions::load(Some(&doc), &[rule("old"), rule("new"), zero], &[]);
        assert_eq!(again.groups.len(), 1, "its since counts only once: {doc}");
    }

    #[test]
    fn since_now_is_the_moment_of_the_first_read() {
        let now = RuleStart { id: "n".into(), rev: "1-r".into(), since: Some(Seq::from("now")) };
        let mut positions = Positions::load(None, std::slice::from_ref(&now), &[]);
        positions.begin_run();
        positions.page_done(0, PageOutcome { last_seq: Some(Seq::from("7")), ..PageOutcome::default() }, NOW, LATER);
        assert!(positions.changed(), "a restart must not skip what comes after this");
        let doc = stored(&positions);
        assert_eq!(doc["ahead"]["rules"]["n"], "7");
        assert_eq!(Positions::load(Some(&doc), &[now], &[]).group(0).since, Some(Seq::from("7")));
    }

    #[test]
    fn groups_that_cannot_meet_do_not_hold_the_run() {
        let mut positions = Positions::load(Some(&json!({ "last_seq": "0" })), &[rule("dead"), rule("live")], &[]);
        positions.begin_run();
        positions.page_done(0, failing(page(&["1", "2"], true), "dead", 0), NOW, |_, _| SystemTime::UNIX_EPOCH);
        positions.begin_run();
        let mut reads = 0;
        while let Some(index) = positions.next_read(SystemTime::now()) {
            reads += 1;
            assert!(reads < 20, "every read finds a new row, and the run never ends");
            positions.page_done(index, page(&["n"], true), NOW, LATER);
        }
    }

    #[test]
    fn wrong_types_count_as_absent() {
        for doc in
            [json!({ "last_seq": {} }), json!({ "last_seq": null, "ahead": 7 }), json!({ "ahead": { "rules": [] } }), json!([])]
        {
            let positions = Positions::load(Some(&doc), &[rule("a")], &[]);
            assert_eq!(positions.group(0).since, None, "{doc}");
        }
    }

    #[test]
    fn only_the_end_of_a_run_that_left_nobody_behind_is_complete() {
        let rules = [rule("a"), rule("b")];
        let mut positions = Positions::load(Some(&json!({ "last_seq": "0" })), &rules, &[]);
        positions.begin_run();
        assert_eq!(positions.complete(), None, "nothing was read");
        positions.page_done(0, page(&["1"], false), NOW, LATER);
        assert_eq!(positions.complete(), None, "there are more rows");
        positions.page_done(0, page(&["2"], true), NOW, LATER);
        assert_eq!(positions.complete(), Some(&Seq::from("2")));
        positions.begin_run();
        assert_eq!(positions.complete(), None, "what came since then was not read");
        positions.page_done(0, failing(page(&["3"], true), "b", 0), NOW, LATER);
        assert_eq!(positions.complete(), None, "b is held back");

        let mut positions = Positions::load(Some(&json!({ "last_seq": "0" })), &rules, &[]);
        positions.begin_run();
        positions.page_done(0, PageOutcome { blocked_at: Some(0), ..page(&["1"], true) }, NOW, LATER);
        assert_eq!(positions.complete(), None, "everybody waits");
    }

    proptest! {
        /// A document that was complete when it was written has no rule that would miss a row of the time before its run.
        #[test]
        fn nothing_is_left_behind_a_complete_position(
            had in 0usize..12,
            limit in 1usize..5,
            writes in prop::collection::vec(0usize..3, 30),
            fates in prop::collection::vec((0u8..6, 0usize..5), 30),
            runs in prop::collection::vec(prop::option::of(any::<bool>()), 1..4),
            owns in any::<bool>(),
        ) {
            let own = RuleStart { id: "own".into(), rev: "1-r".into(), since: owns.then(Seq::zero) };
            let starts = [rule("a"), rule("b"), own];
            let (mut rows, mut doc) = (had as u64, json!({ "last_seq": 0 }));
            let mut delivered: BTreeMap<RuleId, BTreeSet<u64>> = starts.iter().map(|rule| (rule.id.clone(), BTreeSet::new())).collect();
            let mut fates = fates.into_iter().cycle();
            let mut writes = writes.into_iter().cycle();
            for is_suspended in runs {
                let suspended: Vec<RuleId> = is_suspended.map(|b| if b { "b" } else { "own" }.into()).into_iter().collect();
                let valid: Vec<RuleStart> = starts.iter().filter(|rule| !suspended.contains(&rule.id)).cloned().collect();
                let mut positions = Positions::load(Some(&doc), &valid, &suspended);
                positions.begin_run();
                let before = rows;
                for _ in 0..60 {
                    // Whoever is held back may try again.
                    let Some(index) = positions.next_read(SystemTime::UNIX_EPOCH + Duration::from_secs(1)) else { break };
                    let group = positions.group(index).clone();
                    let Some(Seq::Number(since)) = group.since.clone() else { return Err(TestCaseError::fail("no number")) };
                    let read: Vec<u64> = (since + 1..=rows).take(limit).collect();
                    let last = read.last().copied().unwrap_or(since);
                    let mut outcome = PageOutcome {
                        row_seqs: read.iter().copied().map(Seq::Number).collect(),
                        last_seq: Some(Seq::Number(last)),
                        pending: rows - last,
                        ..PageOutcome::default()
                    };
                    let (fate, at) = fates.next().unwrap_or_default();
                    let mut until = vec![read.len(); group.rules.len()];
                    if at < read.len() {
                        match fate {
                            0 => { until.fill(at); outcome.blocked_at = Some(at); }
                            1 | 2 => {
                                let unlucky = usize::from(fate) % group.rules.len();
                                until[unlucky] = at;
                                outcome.failed.insert(group.rules.iter().nth(unlucky).unwrap().clone(), at);
                            }
                            _ => {}
                        }
                    }
                    for (rule, until) in group.rules.iter().zip(until) {
                        delivered.get_mut(rule).unwrap().extend(&read[..until]);
                    }
                    let retry = if fate % 2 == 0 { SystemTime::UNIX_EPOCH } else { LATER(None, 0) };
                    positions.page_done(index, outcome, NOW, |_, _| retry);
                    let mut stored = Map::new();
                    positions.store(&mut stored);
                    doc = Value::Object(stored);
                    for group in &Positions::load(Some(&doc), &starts, &[]).groups {
                        let Some(Seq::Number(since)) = group.since else { return Err(TestCaseError::fail("no number")) };
                        for rule in &group.rules {
                            prop_assert!((1..=since).all(|row| delivered[rule].contains(&row)), "{rule} is at {since}: {doc}");
                        }
                    }
                    if let Some(last_seq) = positions.complete() {
                        for (rule, rows) in &delivered {
                            prop_assert!((1..=before).all(|row| rows.contains(&row)), "{rule} lacks some of {before}: {rows:?}");
                        }
                        prop_assert!(doc["dirty_at"].is_null(), "{doc}");
                        let again = Positions::load(Some(&doc), &starts, &[]);
                        prop_assert!(again.groups.len() == 1 && again.group(0).since.as_ref() == Some(last_seq), "{doc}");
                    }
                    rows += writes.next().unwrap_or_default() as u64;
                }
            }
        }
    }

    #[test]
    fn nothing_new_is_not_written() {
        let mut positions = Positions::load(Some(&json!({ "last_seq": "5" })), &[rule("a")], &[]);
        positions.begin_run();
        positions.page_done(0, page(&[], true), NOW, LATER);
        assert!(!positions.changed());
    }
}
