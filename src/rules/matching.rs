//! Which of many rules a change is for.
//!
//! A thousand rules may be for one database and tell by `if` alone whose change it is. Trying them one by one costs a pattern's
//! search for each; so the tests of all are turned around: by attribute, and there by word or in one set of patterns. What a
//! document does not have costs nothing, and a rule remains once each of its patterns was found. `selector`, `deleted`,
//! `design_docs` and patterns of the bounded engine are asked of the rules that remain.

use super::document::Document;
use super::pattern::{Pattern, RegexSet, regex_set};
use super::rule::Rule;
use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};

/// Fewer are tried one by one sooner than an attribute is looked up.
pub const INDEXED_FROM: usize = 16;
/// Fewer patterns of an attribute are no set.
const SET_FROM: usize = 4;
/// Sets of one index, so that patterns which fit into none together do not make as many as there are.
const SETS_MAX: usize = 16;
/// Of one set: what any needs, and of each pattern. A pattern that a person writes takes a kilobyte.
const SET_BYTES: usize = 64 * 1024;
const PATTERN_BYTES: usize = 4 * 1024;
/// What a thread remembers of a set's search.
const SEARCH_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Through a long text a thousand patterns are slower together, where their common search outgrows its memory, than alone.
const TOGETHER_TEXT_BYTES_MAX: usize = 16 * 1024;

/// The rules of a database, in the order of their ids.
#[derive(Debug)]
pub struct RuleSet {
    rules: Vec<Arc<Rule>>,
    /// None within: they are tried one by one.
    index: OnceLock<Option<Index>>,
}

/// Some of them.
#[derive(Debug)]
pub struct Chosen {
    set: Arc<RuleSet>,
    rules: Vec<Arc<Rule>>,
    /// For each of the set where it is among the chosen. None: all are.
    places: Option<Vec<Option<usize>>>,
}

impl Deref for RuleSet {
    type Target = [Arc<Rule>];

    fn deref(&self) -> &[Arc<Rule>] {
        &self.rules
    }
}

impl RuleSet {
    /// Without an index: for few rules, or where there is no room for one.
    pub fn plain(rules: Vec<Arc<Rule>>) -> Self {
        Self { rules, index: OnceLock::from(None) }
    }

    /// Its index is made when the first change is matched.
    pub fn indexed(rules: Vec<Arc<Rule>>) -> Self {
        Self { rules, index: OnceLock::new() }
    }

    pub fn choose(self: &Arc<Self>, is_chosen: impl Fn(&Rule) -> bool) -> Chosen {
        let rules: Vec<Arc<Rule>> = self.iter().filter(|rule| is_chosen(rule)).cloned().collect();
        let places = (rules.len() < self.len()).then(|| {
            let mut next = 0..;
            self.iter().map(|rule| is_chosen(rule).then(|| next.next()).flatten()).collect()
        });
        Chosen { set: self.clone(), rules, places }
    }

    /// The places of all rules whose business the change is, ascending.
    pub fn matching(&self, doc: &Document<'_>) -> Vec<usize> {
        match self.index.get_or_init(|| Some(Index::new(&self.rules))) {
            Some(index) => {
                let mut places = index.remaining(&self.rules, doc);
                places.retain(|at| self.rules.get(*at).is_some_and(|rule| rule.matches_beyond_index(doc)));
                places
            }
            None => one_by_one(&self.rules, doc),
        }
    }
}

impl Chosen {
    pub fn rules(&self) -> &[Arc<Rule>] {
        &self.rules
    }

    /// The same, and the places are those among the chosen.
    pub fn matching(&self, doc: &Document<'_>) -> Vec<usize> {
        match &self.places {
            None => self.set.matching(doc),
            Some(_) if self.rules.len() < INDEXED_FROM => one_by_one(&self.rules, doc),
            Some(places) => self.set.matching(doc).into_iter().filter_map(|at| *places.get(at)?).collect(),
        }
    }
}

fn one_by_one(rules: &[Arc<Rule>], doc: &Document<'_>) -> Vec<usize> {
    rules.iter().enumerate().filter(|(_, rule)| rule.matches(doc)).map(|(at, _)| at).collect()
}

/// Rules by the tests of their `if`.
#[derive(Debug)]
struct Index {
    /// How many patterns each rule has here.
    patterns: Vec<u32>,
    /// Rules without a pattern.
    free: Vec<usize>,
    attributes: Vec<Attribute>,
    /// By what a document calls its own attribute: its whole name, or a path's first part.
    by_name: HashMap<String, Vec<usize>>,
}

#[derive(Debug, Default)]
struct Attribute {
    path: String,
    /// Rules that want it null or missing.
    null: Vec<usize>,
    /// Rules by the one word that it has to be.
    words: HashMap<String, Vec<usize>>,
    sets: Vec<(RegexSet, Vec<Shared>)>,
    /// Patterns that are tried one by one.
    singles: Vec<Shared>,
}

/// A pattern, and the rules that have it here.
#[derive(Debug, Clone)]
struct Shared {
    pattern: Pattern,
    rules: Vec<usize>,
}

impl Index {
    fn new(rules: &[Arc<Rule>]) -> Self {
        let mut attributes: Vec<Attribute> = Vec::new();
        let mut places: HashMap<&str, usize> = HashMap::new();
        let mut others: Vec<HashMap<&str, Shared>> = Vec::new();
        let mut patterns = vec![0_u32; rules.len()];
        for ((at, rule), patterns) in rules.iter().enumerate().zip(&mut patterns) {
            for test in rule.condition.iter().filter(|test| test.is_indexed()) {
                let place = *places.entry(test.attribute()).or_insert_with(|| {
                    attributes.push(Attribute { path: test.attribute().to_string(), ..Attribute::default() });
                    others.push(HashMap::new());
                    attributes.len() - 1
                });
                let (Some(attribute), Some(others)) = (attributes.get_mut(place), others.get_mut(place)) else { continue };
                match test.pattern() {
                    None => attribute.null.push(at),
                    Some(pattern) => {
                        *patterns += 1;
                        match pattern.whole_word() {
                            Some(word) => attribute.words.entry(word.to_string()).or_default().push(at),
                            None => {
                                let shared = || Shared { pattern: pattern.clone(), rules: Vec::new() };
                                others.entry(pattern.source()).or_insert_with(shared).rules.push(at);
                            }
                        }
                    }
                }
            }
        }
        let mut sets_left = SETS_MAX;
        for (attribute, others) in attributes.iter_mut().zip(others) {
            let mut others: Vec<Shared> = others.into_values().collect();
            // Neighbours are of one kind, and half of a set that is too large may fit.
            others.sort_by(|one, other| one.pattern.source().cmp(other.pattern.source()));
            attribute.put_together(others, &mut sets_left);
        }
        let mut by_name: HashMap<String, Vec<usize>> = HashMap::new();
        for (at, attribute) in attributes.iter().enumerate() {
            by_name.entry(attribute.path.clone()).or_default().push(at);
            if let Some((first, _)) = attribute.path.split_once('.') {
                by_name.entry(first.to_string()).or_default().push(at);
            }
        }
        let free = patterns.iter().enumerate().filter(|(_, patterns)| **patterns == 0).map(|(at, _)| at).collect();
        Self { patterns, free, attributes, by_name }
    }

    /// The places of the rules whose tests all hold, as far as they are here.
    fn remaining(&self, rules: &[Arc<Rule>], doc: &Document<'_>) -> Vec<usize> {
        let mut found = vec![0_u32; rules.len()];
        let mut is_refused = vec![false; rules.len()];
        let mut is_seen = vec![false; self.attributes.len()];
        let mut remaining = self.free.clone();
        for at in doc.names().filter_map(|name| self.by_name.get(name)).flatten() {
            let (Some(attribute), Some(is_seen)) = (self.attributes.get(*at), is_seen.get_mut(*at)) else { continue };
            if std::mem::replace(is_seen, true) {
                continue;
            }
            let Some(text) = doc.tested_text(&attribute.path) else { continue };
            for rule in &attribute.null {
                if let Some(is_refused) = is_refused.get_mut(*rule) {
                    *is_refused = true;
                }
            }
            attribute.find(&text, |rule| {
                if let (Some(found), Some(patterns)) = (found.get_mut(rule), self.patterns.get(rule)) {
                    *found += 1;
                    if found == patterns {
                        remaining.push(rule);
                    }
                }
            });
        }
        remaining.retain(|rule| is_refused.get(*rule) == Some(&false));
        remaining.sort_unstable();
        remaining
    }
}

impl Attribute {
    fn put_together(&mut self, mut patterns: Vec<Shared>, sets_left: &mut usize) {
        if patterns.len() < SET_FROM || *sets_left == 0 {
            self.singles.append(&mut patterns);
            return;
        }
        let size = SET_BYTES + PATTERN_BYTES * patterns.len();
        match regex_set(patterns.iter().map(|shared| &shared.pattern), size, SEARCH_BYTES_MAX) {
            Some(set) => {
                *sets_left -= 1;
                self.sets.push((set, patterns));
            }
            None => {
                let second = patterns.split_off(patterns.len() / 2);
                self.put_together(patterns, sets_left);
                self.put_together(second, sets_left);
            }
        }
    }

    fn find(&self, text: &str, mut each: impl FnMut(usize)) {
        self.words.get(text).into_iter().flatten().for_each(|rule| each(*rule));
        for (set, patterns) in &self.sets {
            if text.len() > TOGETHER_TEXT_BYTES_MAX {
                let found = patterns.iter().filter(|shared| shared.pattern.may_match(text));
                found.flat_map(|shared| &shared.rules).for_each(|rule| each(*rule));
            } else {
                let found = set.matches(text);
                found.iter().filter_map(|at| patterns.get(at)).flat_map(|shared| &shared.rules).for_each(|rule| each(*rule));
            }
        }
        let found = self.singles.iter().filter(|shared| shared.pattern.may_match(text));
        found.flat_map(|shared| &shared.rules).for_each(|rule| each(*rule));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::couch::Row;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn rules(conditions: &[Value]) -> Vec<Arc<Rule>> {
        let rule = |(n, extra): (usize, &Value)| {
            let mut doc = json!({ "_id": format!("r{n:04}"), "type": "on_change", "db_name": "x", "url": "http://h/" });
            doc.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            Arc::new(Rule::parse(&doc).unwrap_or_else(|faults| panic!("{doc}: {faults:?}")))
        };
        conditions.iter().enumerate().map(rule).collect()
    }

    fn row(id: &str, deleted: bool, doc: &str) -> Row {
        let text = format!(r#"{{"seq":1,"id":"{id}","deleted":{deleted},"changes":[{{"rev":"1-a"}}],"doc":{doc}}}"#);
        serde_json::from_str(&text).expect("a row")
    }

    fn a_pattern() -> impl Strategy<Value = Value> {
        let word = || prop_oneof![Just(""), Just("a"), Just("ab"), Just("1"), Just("1.5"), Just("true"), Just("a,b"), Just("é")];
        prop_oneof![
            2 => Just(Value::Null),
            6 => word().prop_map(|word| json!(format!("^{word}$"))),
            2 => word().prop_map(|word| json!(format!("^{word}"))),
            2 => word().prop_map(|word| json!(format!("{word}$"))),
            2 => word().prop_map(Value::from),
            2 => (word(), word()).prop_map(|(one, other)| json!(format!("^({one}|{other})$"))),
            2 => (word(), word()).prop_map(|(one, other)| json!(format!("{one}.?{other}"))),
            1 => Just(json!("object Object")),
            1 => Just(json!(r"^[\w,]+$")),
            1 => Just(json!("^$|^[^]{200}")),
            // Of the bounded engine; the last gives up, which counts as found.
            1 => word().prop_map(|word| json!(format!("^(?!{word}$)"))),
            1 => Just(json!(r"^(.)\1$")),
            1 => Just(json!(r"(?=(a+)+$)(b*)*\2c")),
        ]
    }

    fn an_attribute() -> impl Strategy<Value = String> {
        prop_oneof![6 => "[ab](\\.[ab01]){0,2}", 1 => Just(String::from("_id")), 1 => Just(String::from("_deleted")), 1 => "[.ab]{0,3}"]
    }

    fn a_rule() -> impl Strategy<Value = Value> {
        let beside = prop_oneof![
            8 => Just(json!({})),
            1 => Just(json!({ "deleted": true })),
            1 => Just(json!({ "deleted": false })),
            1 => Just(json!({ "design_docs": false })),
            1 => Just(json!({ "selector": { "a": { "$exists": true } } })),
        ];
        (prop::collection::btree_map(an_attribute(), a_pattern(), 0..4), beside).prop_map(|(condition, mut rule)| {
            rule["if"] = json!(condition);
            rule
        })
    }

    fn a_value() -> impl Strategy<Value = String> {
        let leaf = prop_oneof![
            Just("null"),
            Just("true"),
            Just("1"),
            Just("1.50"),
            Just("1e3"),
            Just("-0"),
            Just(r#""""#),
            Just(r#""a""#),
            Just(r#""ab""#),
            Just(r#""1""#),
            Just(r#""a,b""#),
            Just(r#""\u00e9""#),
            Just(r#""x\ny""#),
            Just("[]"),
            Just("{}"),
        ];
        let leaf = prop_oneof![20 => leaf.prop_map(String::from), 1 => Just(format!("\"{}\"", "ab".repeat(9_000)))];
        leaf.prop_recursive(3, 12, 3, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(|items| format!("[{}]", items.join(","))),
                prop::collection::vec((an_attribute(), inner), 0..3).prop_map(object),
            ]
        })
    }

    fn object(members: Vec<(String, String)>) -> String {
        let members: Vec<String> = members.into_iter().map(|(name, value)| format!("\"{name}\":{value}")).collect();
        format!("{{{}}}", members.join(","))
    }

    fn a_row() -> impl Strategy<Value = Row> {
        let id = prop_oneof![Just("a"), Just("x"), Just("_design/a")];
        let doc = prop_oneof![8 => prop::collection::vec((an_attribute(), a_value()), 0..6).prop_map(object), 1 => Just(String::from("null"))];
        (id, any::<bool>(), doc).prop_map(|(id, deleted, doc)| row(id, deleted, &doc))
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]
        #[test]
        fn an_index_finds_what_one_by_one_does(
            conditions in prop::collection::vec(a_rule(), 0..60),
            rows in prop::collection::vec(a_row(), 1..12),
            chosen in any::<u64>(),
        ) {
            let set = Arc::new(RuleSet::indexed(rules(&conditions)));
            let is_chosen = |rule: &Rule| chosen >> (rule.id[1..].parse::<u64>().unwrap() % 64) & 1 == 1;
            let some = set.choose(is_chosen);
            for row in &rows {
                let doc = Document::of(row);
                let expected = one_by_one(&set, &doc);
                prop_assert_eq!(set.matching(&doc), expected.clone());
                let among: Vec<&str> = some.matching(&doc).into_iter().map(|at| &*some.rules()[at].id).collect();
                let expected: Vec<&str> = expected.iter().map(|at| &set[*at]).filter(|rule| is_chosen(rule)).map(|rule| &*rule.id).collect();
                prop_assert_eq!(among, expected);
            }
        }
    }

    #[test]
    fn patterns_that_fit_into_no_set_are_tested_all_the_same() {
        // Each is within the bound of one, and four are too large for a set.
        let heavy = (0..40).map(|n| json!({ "if": { "kind": format!("^[^]{{0,2000}}_{n}$") } }));
        let light = (0..40).map(|n| json!({ "if": { "kind": format!("^k(in)d_{n}$") } }));
        let conditions: Vec<Value> = heavy.chain(light).collect();
        let set = RuleSet::indexed(rules(&conditions));
        for n in 0..40 {
            let row = row("x", false, &format!(r#"{{"kind":"kind_{n}"}}"#));
            assert_eq!(set.matching(&Document::of(&row)), [n, 40 + n]);
        }
        let index = set.index.get().unwrap().as_ref().unwrap();
        assert!(!index.attributes[0].sets.is_empty() && !index.attributes[0].singles.is_empty(), "some are, some are not");
    }

    #[test]
    fn a_text_without_end_is_tested_pattern_by_pattern() {
        let conditions: Vec<Value> = (0..100).map(|n| json!({ "if": { "text": format!("kind_{n}( |$)") } })).collect();
        let set = RuleSet::indexed(rules(&conditions));
        let row = row("x", false, &format!(r#"{{"text":"{} kind_7 {}"}}"#, "kind_".repeat(100_000), "9".repeat(100_000)));
        assert_eq!(set.matching(&Document::of(&row)), [7]);
    }
}
