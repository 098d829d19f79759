//! The rules and replicators as they are now, and the snapshot that everyone reads.

use crate::couch::Row;
use crate::rules::installations::databases_of;
use crate::rules::pattern::PatternSet;
use crate::rules::rule::Rule;
use crate::topology::replicator::Replicator;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

/// What the spiegel database asked for at one moment; immutable.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// False until the spiegel database was read once.
    loaded: bool,
    rules: Vec<Arc<Rule>>,
    patterns: PatternSet,
    replicators: HashMap<Arc<str>, Arc<Replicator>>,
    by_source: HashMap<String, Vec<Arc<str>>>,
    by_target: HashMap<String, Vec<Arc<str>>>,
    invalid_replicators: Arc<BTreeMap<Arc<str>, Arc<str>>>,
    invalid_rules: Arc<BTreeSet<Arc<str>>>,
    own: HashSet<String>,
}

impl Snapshot {
    pub fn is_loaded(&self) -> bool {
        self.loaded
    }

    pub fn rules(&self) -> &[Arc<Rule>] {
        &self.rules
    }

    pub fn rule(&self, id: &str) -> Option<&Arc<Rule>> {
        // In the order of their ids.
        let at = self.rules.binary_search_by(|rule| rule.id.as_ref().cmp(id)).ok()?;
        self.rules.get(at)
    }

    /// Its document is there, and cannot be used until somebody mends it.
    pub fn is_invalid_rule(&self, id: &str) -> bool {
        self.invalid_rules.contains(id)
    }

    /// Equal for equal rules and replicators, of one build of the program.
    pub fn rules_hash(&self) -> String {
        let mut sources: Vec<(&String, &Vec<Arc<str>>)> = self.by_source.iter().collect();
        sources.sort();
        let rules: Vec<(&str, &str)> = self.rules.iter().map(|rule| (rule.id.as_ref(), rule.rev.as_str())).collect();
        let mut hasher = DefaultHasher::new();
        (rules, sources).hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    }

    pub fn replicators(&self) -> &HashMap<Arc<str>, Arc<Replicator>> {
        &self.replicators
    }

    /// Documents that nobody can run, each with what is wrong.
    pub fn invalid_replicators(&self) -> &BTreeMap<Arc<str>, Arc<str>> {
        &self.invalid_replicators
    }

    pub fn rules_of(&self, db: &str) -> Vec<Arc<Rule>> {
        self.patterns.matches(db).into_iter().map(|index| self.rules[index].clone()).collect()
    }

    pub fn replicators_from(&self, db: &str) -> &[Arc<str>] {
        self.by_source.get(db).map_or(&[], Vec::as_slice)
    }

    pub fn replicators_to(&self, db: &str) -> &[Arc<str>] {
        self.by_target.get(db).map_or(&[], Vec::as_slice)
    }

    /// One of Spiegel's own databases, of any installation on this server.
    pub fn is_own(&self, db: &str) -> bool {
        self.own.contains(db)
    }

    /// Whether a change of this database means work. Spiegel's own databases never do, whatever a rule says: a rule `.*` must
    /// not feed on what it causes itself.
    pub fn watches(&self, db: &str) -> bool {
        !self.own.contains(db) && (self.by_source.contains_key(db) || self.patterns.any(db))
    }
}

/// The documents, and what makes a snapshot of them.
pub struct Catalogue {
    own: HashSet<String>,
    rules: BTreeMap<String, Arc<Rule>>,
    replicators: HashMap<String, Arc<Replicator>>,
    /// By id, the revision that was said to be invalid.
    invalid: HashMap<String, String>,
    invalid_replicators: Arc<BTreeMap<Arc<str>, Arc<str>>>,
    invalid_rules: Arc<BTreeSet<Arc<str>>>,
}

impl Catalogue {
    /// `installations` are the names of the spiegel databases on this server, ours among them.
    pub fn new<'a>(installations: impl IntoIterator<Item = &'a str>) -> Self {
        Self {
            own: installations.into_iter().flat_map(databases_of).collect(),
            rules: BTreeMap::new(),
            replicators: HashMap::new(),
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
        let had_rule = self.rules.remove(&row.id).is_some();
        let had = self.replicators.remove(&row.id).is_some() | had_rule;
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
            "replicator" => {
                Replicator::parse(doc).map(|replicator| drop(self.replicators.insert(row.id.clone(), Arc::new(replicator))))
            }
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
                    _ => drop(Arc::make_mut(&mut self.invalid_rules).insert(row.id.as_str().into())),
                }
                if self.invalid.insert(row.id.clone(), row.rev().to_string()).as_deref() != Some(row.rev()) {
                    tracing::error!(id = row.id, kind, reasons, "invalid document, it is passed over until it is mended");
                }
            }
        }
        true
    }

    pub fn invalid_documents(&self) -> usize {
        self.invalid.len()
    }

    pub fn snapshot(&self) -> Snapshot {
        let rules: Vec<Arc<Rule>> = self.rules.values().cloned().collect();
        let mut by_source: HashMap<String, Vec<Arc<str>>> = HashMap::new();
        let mut by_target: HashMap<String, Vec<Arc<str>>> = HashMap::new();
        let mut replicators = HashMap::new();
        for replicator in self.replicators.values() {
            let id = replicator.id.clone();
            if let Some(source) = replicator.source_db_name() {
                by_source.entry(source).or_default().push(id.clone());
            }
            if let Some(target) = replicator.target_db_name() {
                by_target.entry(target).or_default().push(id.clone());
            }
            replicators.insert(id, replicator.clone());
        }
        Snapshot {
            loaded: true,
            patterns: PatternSet::new(rules.iter().map(|rule| &rule.pattern)),
            rules,
            replicators,
            by_source,
            by_target,
            invalid_replicators: self.invalid_replicators.clone(),
            invalid_rules: self.invalid_rules.clone(),
            own: self.own.clone(),
        }
    }
}

/// Rules that are new or were edited since another snapshot: their databases have to be looked at.
pub fn changed_rules(before: &Snapshot, after: &Snapshot) -> Vec<Arc<Rule>> {
    let known: BTreeSet<(&str, &str)> = before.rules.iter().map(|rule| (rule.id.as_ref(), rule.rev.as_str())).collect();
    after.rules.iter().filter(|rule| !known.contains(&(rule.id.as_ref(), rule.rev.as_str()))).cloned().collect()
}
