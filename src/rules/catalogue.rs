//! The rules and replicators as they are now, and the snapshot that everyone reads.

use crate::couch::{Row, generation};
use crate::rules::installations::{INTERNAL, databases_of};
use crate::rules::matching::{INDEXED_FROM, RuleSet};
use crate::rules::pattern::{Pattern, PatternSet};
use crate::rules::rule::{Rule, pattern_of};
use crate::topology::replicator::Replicator;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};

/// What the spiegel database asked for at one moment; immutable.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// False until the spiegel database was read once.
    loaded: bool,
    rules: Arc<Rules>,
    replicators: Replicators,
    invalid_replicators: Arc<BTreeMap<Arc<str>, Arc<str>>>,
    invalid_rules: Arc<BTreeSet<Arc<str>>>,
    own: HashSet<String>,
}

/// Shared by snapshots until a rule changes: replicators do more often.
#[derive(Debug, Default)]
struct Rules {
    /// In the order of their ids.
    all: Vec<Arc<Rule>>,
    patterns: PatternSet,
    /// Rules whose documents are invalid, with the databases that they are for, or were where that cannot be read.
    suspended: Vec<Arc<str>>,
    suspended_patterns: PatternSet,
    /// By their places, sets of rules that are many for one database.
    sets: Mutex<HashMap<Vec<usize>, Arc<RuleSet>>>,
}

/// Rules that the indexes of a snapshot hold, each in as many as there are sets of rules with it. A kilobyte or two each.
const INDEXED_RULES_MAX: usize = 20_000;

impl Rules {
    fn new(all: Vec<Arc<Rule>>, suspended: &BTreeMap<Arc<str>, Pattern>) -> Self {
        Self {
            patterns: PatternSet::new(all.iter().map(|rule| &rule.pattern)),
            all,
            suspended: suspended.keys().cloned().collect(),
            suspended_patterns: PatternSet::new(suspended.values()),
            sets: Mutex::default(),
        }
    }

    fn of(&self, db: &str) -> Arc<RuleSet> {
        let places = self.patterns.matches(db);
        let rules = || places.iter().filter_map(|at| self.all.get(*at).cloned()).collect();
        if places.len() < INDEXED_FROM {
            return Arc::new(RuleSet::plain(rules()));
        }
        let mut sets = self.sets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(set) = sets.get(&places) {
            return set.clone();
        }
        if sets.values().map(|set| set.len()).sum::<usize>() + places.len() > INDEXED_RULES_MAX {
            return Arc::new(RuleSet::plain(rules()));
        }
        let set = Arc::new(RuleSet::indexed(rules()));
        sets.insert(places, set.clone());
        set
    }
}

/// Cheap to clone: a snapshot shares it until one of them changes.
#[derive(Debug, Default, Clone)]
struct Replicators {
    by_id: Arc<HashMap<Arc<str>, Arc<Replicator>>>,
    /// In the order of a side's name, and of the id. There may be a hundred thousand, of as many databases: a list of pointers is
    /// a tenth of a map from names.
    by_source: Arc<[Arc<Replicator>]>,
    by_target: Arc<[Arc<Replicator>]>,
}

type Side = fn(&Replicator) -> &str;

const SOURCE: Side = |replicator| replicator.source.db_name();
const TARGET: Side = |replicator| replicator.target.db_name();

impl Replicators {
    /// Takes in what was inserted, and out what is not the same any more. Lists that are sorted but for their end are sorted
    /// again in no more than one look at each.
    fn sort_in(&mut self, fresh: &[Arc<Replicator>]) {
        let by_id = &self.by_id;
        let is_there =
            |replicator: &Arc<Replicator>| by_id.get(&replicator.id).is_some_and(|there| Arc::ptr_eq(there, replicator));
        for (list, side) in [(&mut self.by_source, SOURCE), (&mut self.by_target, TARGET)] {
            let mut sorted: Vec<Arc<Replicator>> = Vec::with_capacity(by_id.len());
            sorted.extend(list.iter().filter(|replicator| is_there(replicator)).cloned());
            sorted.extend(fresh.iter().filter(|replicator| is_there(replicator)).cloned());
            sorted.sort_by(|one, other| (side(one), &one.id).cmp(&(side(other), &other.id)));
            *list = sorted.into();
        }
    }
}

fn with_name<'a>(list: &'a [Arc<Replicator>], side: Side, name: &str) -> &'a [Arc<Replicator>] {
    let start = list.partition_point(|replicator| side(replicator) < name);
    let found = list.get(start..).unwrap_or_default();
    let end = found.partition_point(|replicator| side(replicator) == name);
    found.get(..end).unwrap_or_default()
}

impl Snapshot {
    pub fn is_loaded(&self) -> bool {
        self.loaded
    }

    pub fn rules(&self) -> &[Arc<Rule>] {
        &self.rules.all
    }

    pub fn rule(&self, id: &str) -> Option<&Arc<Rule>> {
        let at = self.rules().binary_search_by(|rule| rule.id.as_ref().cmp(id)).ok()?;
        self.rules().get(at)
    }

    /// Its document is there, and cannot be used until somebody mends it.
    pub fn is_invalid_rule(&self, id: &str) -> bool {
        self.invalid_rules.contains(id)
    }

    /// Whether there are such of which nobody knows for which databases they are.
    pub fn has_unplaced_rules(&self) -> bool {
        self.invalid_rules.len() > self.rules.suspended.len()
    }

    /// Equal for equal rules and replicators, of one build of the program.
    pub fn rules_hash(&self) -> String {
        let replicators = &self.replicators.by_source;
        let sources: Vec<(&str, &str)> = replicators.iter().map(|replicator| (SOURCE(replicator), &*replicator.id)).collect();
        let rules: Vec<(&str, &str)> = self.rules().iter().map(|rule| (rule.id.as_ref(), rule.rev.as_str())).collect();
        let mut hasher = DefaultHasher::new();
        (rules, sources).hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    }

    pub fn replicators(&self) -> &HashMap<Arc<str>, Arc<Replicator>> {
        &self.replicators.by_id
    }

    /// Documents that nobody can run, each with what is wrong.
    pub fn invalid_replicators(&self) -> &BTreeMap<Arc<str>, Arc<str>> {
        &self.invalid_replicators
    }

    /// Whether a rule is for it. Cheaper than to ask which.
    pub fn has_rules_of(&self, db: &str) -> bool {
        self.rules.patterns.any(db)
    }

    pub fn rules_of(&self, db: &str) -> Arc<RuleSet> {
        self.rules.of(db)
    }

    /// Rules that cannot be used until their documents are mended, and that may be for it: what they have not had is kept for them.
    pub fn suspended_of(&self, db: &str) -> Vec<Arc<str>> {
        let Rules { suspended, suspended_patterns, .. } = &*self.rules;
        suspended_patterns.matches(db).into_iter().filter_map(|at| suspended.get(at).cloned()).collect()
    }

    pub fn replicators_from(&self, db: &str) -> &[Arc<Replicator>] {
        with_name(&self.replicators.by_source, SOURCE, db)
    }

    pub fn replicators_to(&self, db: &str) -> &[Arc<Replicator>] {
        with_name(&self.replicators.by_target, TARGET, db)
    }

    /// One of Spiegel's own databases, of any installation on this server, or CouchDB's bookkeeping.
    pub fn is_own(&self, db: &str) -> bool {
        self.own.contains(db)
    }

    /// Whether a change of this database means work. Those that are [own](Self::is_own) never do, whatever a rule says: a rule
    /// `.*` must not feed on what it causes itself.
    pub fn watches(&self, db: &str) -> bool {
        !self.own.contains(db) && (!self.replicators_from(db).is_empty() || self.has_rules_of(db))
    }
}

/// The documents, and what makes a snapshot of them.
pub struct Catalogue {
    own: HashSet<String>,
    rules: BTreeMap<String, Arc<Rule>>,
    suspended: BTreeMap<Arc<str>, Pattern>,
    /// The same for a snapshot; none once a rule changed.
    shared_rules: Option<Arc<Rules>>,
    replicators: Replicators,
    /// Inserted, or taken out, since the last snapshot.
    fresh: Vec<Arc<Replicator>>,
    has_gone: bool,
    /// By id, the revision that was said to be invalid.
    invalid: HashMap<String, String>,
    invalid_replicators: Arc<BTreeMap<Arc<str>, Arc<str>>>,
    invalid_rules: Arc<BTreeSet<Arc<str>>>,
}

impl Catalogue {
    /// `installations` are the names of the spiegel databases on this server, ours among them.
    pub fn new<'a>(installations: impl IntoIterator<Item = &'a str>) -> Self {
        Self {
            own: installations.into_iter().flat_map(databases_of).chain(INTERNAL.map(String::from)).collect(),
            rules: BTreeMap::new(),
            suspended: BTreeMap::new(),
            shared_rules: None,
            replicators: Replicators::default(),
            fresh: Vec::new(),
            has_gone: false,
            invalid: HashMap::new(),
            invalid_replicators: Arc::default(),
            invalid_rules: Arc::default(),
        }
    }

    /// Takes in one row of the spiegel database's changes. True when the snapshot is not the same any more.
    pub fn take(&mut self, row: &Row) -> bool {
        // Most documents are positions, and most rows are our own writes of them.
        if row.id.starts_with("spiegel_cl_") || row.id.starts_with("_design/") {
            return false;
        }
        let doc = row.doc.as_ref().and_then(|doc| serde_json::from_str::<Value>(doc.get()).ok());
        let kind = doc.as_ref().and_then(|doc| doc.get("type")).and_then(Value::as_str).unwrap_or_default();
        let rule_before = self.rules.remove(&row.id);
        let had_rule = rule_before.is_some();
        let pattern_before = rule_before.map(|rule| rule.pattern.clone()).or_else(|| self.suspended.remove(row.id.as_str()));
        if pattern_before.is_some() || kind == "on_change" {
            self.shared_rules = None;
        }
        let had = self.remove_replicator(&row.id) | had_rule;
        if self.invalid_replicators.contains_key(row.id.as_str()) {
            Arc::make_mut(&mut self.invalid_replicators).remove(row.id.as_str());
        }
        let was_rule = had_rule | self.invalid_rules.contains(row.id.as_str());
        if self.invalid_rules.contains(row.id.as_str()) {
            Arc::make_mut(&mut self.invalid_rules).remove(row.id.as_str());
        }
        if doc.is_none() && !row.deleted && was_rule {
            // It is there and cannot be read: what it owes must not be taken for a deleted rule's.
            Arc::make_mut(&mut self.invalid_rules).insert(row.id.as_str().into());
            self.suspended.extend(pattern_before.map(|pattern| (row.id.as_str().into(), pattern)));
            if self.invalid.insert(row.id.clone(), row.rev().to_string()).as_deref() != Some(row.rev()) {
                tracing::error!(id = row.id, "the rule's document cannot be read, it is passed over until it can");
            }
            return true;
        }
        let (Some(doc), false) = (&doc, row.deleted) else {
            return self.invalid.remove(&row.id).is_some() | had;
        };
        let parsed = match kind {
            "on_change" => Rule::parse(doc).map(|rule| drop(self.rules.insert(row.id.clone(), Arc::new(rule)))),
            "replicator" => Replicator::parse(doc).map(|replicator| self.insert(replicator)),
            _ => return self.invalid.remove(&row.id).is_some() | had,
        };
        match parsed {
            Ok(()) => drop(self.invalid.remove(&row.id)),
            Err(reasons) => {
                let reasons = crate::rules::invalid::summary(&reasons);
                match kind {
                    "replicator" => {
                        drop(
                            Arc::make_mut(&mut self.invalid_replicators).insert(row.id.as_str().into(), reasons.as_str().into()),
                        );
                    }
                    _ => {
                        Arc::make_mut(&mut self.invalid_rules).insert(row.id.as_str().into());
                        // What was invalid from the first was never anybody's rule.
                        let was_usable = pattern_before.is_some() || generation(row.rev()) > 1;
                        let pattern = pattern_of(doc).filter(|_| was_usable).or(pattern_before);
                        self.suspended.extend(pattern.map(|pattern| (row.id.as_str().into(), pattern)));
                    }
                }
                if self.invalid.insert(row.id.clone(), row.rev().to_string()).as_deref() != Some(row.rev()) {
                    tracing::error!(id = row.id, kind, reasons, "invalid document, it is passed over until it is mended");
                }
            }
        }
        true
    }

    fn insert(&mut self, replicator: Replicator) {
        let replicator = Arc::new(replicator);
        self.fresh.push(replicator.clone());
        Arc::make_mut(&mut self.replicators.by_id).insert(replicator.id.clone(), replicator);
    }

    fn remove_replicator(&mut self, id: &str) -> bool {
        let had = self.replicators.by_id.contains_key(id);
        if had {
            Arc::make_mut(&mut self.replicators.by_id).remove(id);
            self.has_gone = true;
        }
        had
    }

    /// Since the last snapshot.
    pub fn has_rule_news(&self) -> bool {
        self.shared_rules.is_none()
    }

    pub fn invalid_documents(&self) -> usize {
        self.invalid.len()
    }

    pub fn snapshot(&mut self) -> Snapshot {
        let fresh = std::mem::take(&mut self.fresh);
        if std::mem::take(&mut self.has_gone) || !fresh.is_empty() {
            self.replicators.sort_in(&fresh);
        }
        let rules = self
            .shared_rules
            .get_or_insert_with(|| Arc::new(Rules::new(self.rules.values().cloned().collect(), &self.suspended)));
        Snapshot {
            loaded: true,
            rules: rules.clone(),
            replicators: self.replicators.clone(),
            invalid_replicators: self.invalid_replicators.clone(),
            invalid_rules: self.invalid_rules.clone(),
            own: self.own.clone(),
        }
    }
}

/// Rules that are new or were edited since another snapshot: their databases have to be looked at.
pub fn changed_rules(before: &Snapshot, after: &Snapshot) -> Vec<Arc<Rule>> {
    let known: BTreeSet<(&str, &str)> = before.rules().iter().map(|rule| (rule.id.as_ref(), rule.rev.as_str())).collect();
    after.rules().iter().filter(|rule| !known.contains(&(rule.id.as_ref(), rule.rev.as_str()))).cloned().collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::couch::Seq;
    use proptest::prelude::*;
    use serde_json::{json, value::to_raw_value};

    fn row(id: &str, doc: Option<Value>) -> Row {
        Row {
            seq: Seq::zero(),
            id: id.to_string(),
            changes: Vec::new(),
            deleted: doc.is_none(),
            doc: doc.map(|doc| to_raw_value(&doc).unwrap().into()),
        }
    }

    fn ids(replicators: &[Arc<Replicator>]) -> Vec<String> {
        replicators.iter().map(|replicator| replicator.id.to_string()).collect()
    }

    proptest! {
        /// Whatever is written, deleted, edited or made invalid, and however many of it between two snapshots.
        #[test]
        fn a_replicator_is_found_by_its_source_and_its_target(
            steps in prop::collection::vec((0u8..6, 0u8..4, 0u8..4, 0u8..5), 1..60),
            publishes in prop::collection::vec(any::<bool>(), 60),
        ) {
            let mut catalogue = Catalogue::new(["spiegel"]);
            let mut expected: BTreeMap<String, (String, String, String)> = BTreeMap::new();
            let mut before = catalogue.snapshot();
            for (n, ((id, source, target, kind), publish)) in steps.into_iter().zip(publishes).enumerate() {
                let (id, source, target, rev) = (format!("r{id}"), format!("s{source}"), format!("t{target}"), format!("{n}-x"));
                let doc = match kind {
                    0 => None,
                    1 => Some(json!({ "_id": id, "_rev": rev, "type": "replicator", "source": source })),
                    2 => Some(json!({ "_id": id, "_rev": rev, "type": "else" })),
                    _ => Some(json!({ "_id": id, "_rev": rev, "type": "replicator", "source": source, "target": target })),
                };
                match kind {
                    0..=2 => drop(expected.remove(&id)),
                    _ => drop(expected.insert(id.clone(), (rev, source, target))),
                }
                let shown = (ids(before.replicators_from("s0")), before.replicators().len());
                catalogue.take(&row(&id, doc));
                prop_assert_eq!((ids(before.replicators_from("s0")), before.replicators().len()), shown, "a snapshot stays");
                if publish {
                    before = catalogue.snapshot();
                }
            }
            let snapshot = catalogue.snapshot();
            prop_assert_eq!(snapshot.replicators().len(), expected.len());
            for n in 0..4 {
                let (source, target) = (format!("s{n}"), format!("t{n}"));
                let of = |side: &dyn Fn(&(String, String, String)) -> bool| -> Vec<String> {
                    expected.iter().filter(|(_, it)| side(it)).map(|(id, _)| id.clone()).collect()
                };
                prop_assert_eq!(ids(snapshot.replicators_from(&source)), of(&|it| it.1 == source));
                prop_assert_eq!(ids(snapshot.replicators_to(&target)), of(&|it| it.2 == target));
                prop_assert_eq!(snapshot.watches(&source), expected.values().any(|it| it.1 == source));
            }
            for (id, (rev, ..)) in &expected {
                let replicator = &snapshot.replicators()[id.as_str()];
                prop_assert_eq!(&*replicator.rev, rev.as_str());
                let listed = snapshot.replicators_from(replicator.source.db_name());
                prop_assert!(listed.iter().any(|other| Arc::ptr_eq(other, replicator)), "the newest is listed");
            }
        }
    }

    #[test]
    fn a_rule_for_everything_takes_all_but_what_spiegel_causes_to_be_written() {
        let mut catalogue = Catalogue::new(["spiegel", "other"]);
        let rule =
            json!({ "_id": "r", "_rev": "1-a", "type": "on_change", "db_name": ".*", "url": "http://h/", "method": "POST" });
        assert!(catalogue.take(&row("r", Some(rule))));
        let snapshot = catalogue.snapshot();
        for db in ["user_ann", "_users", "_replicator", "spiegel_deliveries_of_mine"] {
            assert!(snapshot.watches(db), "{db}");
        }
        for db in ["spiegel", "spiegel_deliveries", "other_deliveries", "_global_changes", "_dbs"] {
            assert!(!snapshot.watches(db), "{db}");
        }
    }

    #[test]
    fn a_new_revision_of_a_replicator_keeps_the_hash_of_the_rules() {
        let doc =
            |rev: &str, target: &str| json!({ "_id": "r", "_rev": rev, "type": "replicator", "source": "a", "target": target });
        let mut catalogue = Catalogue::new([]);
        let empty = catalogue.snapshot().rules_hash();
        catalogue.take(&row("r", Some(doc("1-a", "b"))));
        let first = catalogue.snapshot().rules_hash();
        catalogue.take(&row("r", Some(doc("2-b", "b"))));
        assert_eq!(catalogue.snapshot().rules_hash(), first);
        assert_ne!(empty, first);
    }
}
