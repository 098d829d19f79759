//! Mango selectors, as CouchDB's `_find` and its replication filters have them.
//!
//! A selector is read once, with every negation moved down to the conditions as CouchDB does: a condition on a missing field
//! never holds, a negated one neither, except for `$exists: false`.
//!
//! Strings are ordered nearly as by CouchDB's ICU collation: punctuation, digits, letters without regard to case, lower case
//! first; characters beyond ASCII by code point. `_id` is ordered by bytes.

use super::document::{Document, member};
use super::invalid::{Invalid, kind_of};
use super::pattern::Pattern;
use serde_json::{Map, Number, Value};
use std::cmp::Ordering;

/// Of objects and arrays in each other; a parser's stack and a reader's patience end earlier than CouchDB's.
const DEPTH_MAX: usize = 32;

/// A selector that was read; matches documents.
#[derive(Debug, Clone)]
pub struct Selector(Node);

#[derive(Debug, Clone)]
enum Node {
    And(Vec<Node>),
    Or(Vec<Node>),
    /// An empty path is the value itself: an element of an array.
    Field {
        path: Vec<String>,
        condition: Condition,
        negated: bool,
    },
}

#[derive(Debug, Clone)]
enum Condition {
    Lt(Value),
    Lte(Value),
    Eq(Value),
    Gte(Value),
    Gt(Value),
    In(Vec<Value>),
    Exists(bool),
    Type(String),
    Mod(i64, i64),
    Regex(Pattern),
    BeginsWith(String),
    All(Vec<Value>),
    Size(usize),
    ElemMatch(Box<Node>),
    AllMatch(Box<Node>),
    KeyMapMatch(Box<Node>),
}

impl Selector {
    pub fn parse(selector: &Value) -> Result<Self, Invalid> {
        match selector {
            Value::Object(fields) if fields.is_empty() => Ok(Self(Node::And(Vec::new()))),
            Value::Object(_) => Reader { depth: 0 }.node(selector, &[], false).map(Self),
            other => Err(invalid(format!("must be an object, not {}", kind_of(other)))),
        }
    }

    pub fn matches(&self, doc: &Document<'_>) -> bool {
        self.0.matches(&|path| match path {
            [] => Some(doc.whole()),
            [first, rest @ ..] => find(doc.top(first)?, rest),
        })
    }
}

fn invalid(reason: String) -> Invalid {
    Invalid::new("selector", reason)
}

struct Reader {
    depth: usize,
}

impl Reader {
    fn node(&mut self, value: &Value, path: &[String], negated: bool) -> Result<Node, Invalid> {
        if self.depth >= DEPTH_MAX {
            return Err(invalid(format!("has more than {DEPTH_MAX} levels")));
        }
        self.depth += 1;
        let node = self.node_within(value, path, negated);
        self.depth -= 1;
        node
    }

    fn node_within(&mut self, value: &Value, path: &[String], negated: bool) -> Result<Node, Invalid> {
        match value {
            // Inside of `$and` and the like it matches everything; of a field it is a value like any other.
            Value::Object(fields) if fields.is_empty() && path.is_empty() => match negated {
                false => Ok(Node::And(Vec::new())),
                true => Ok(NEVER),
            },
            Value::Object(fields) if !fields.is_empty() => self.fields(fields, path, negated),
            value => Ok(field(path, Condition::Eq(value.clone()), negated)),
        }
    }

    fn fields(&mut self, fields: &Map<String, Value>, path: &[String], negated: bool) -> Result<Node, Invalid> {
        let mut nodes = Vec::with_capacity(fields.len());
        for (name, value) in fields {
            nodes.push(match name.strip_prefix('$') {
                Some(operator) => self.operator(operator, value, path, negated)?,
                None => self.node(value, &deeper(path, name)?, negated)?,
            });
        }
        Ok(match (nodes.len(), negated) {
            (1, _) => nodes.swap_remove(0),
            (_, false) => Node::And(nodes),
            (_, true) => Node::Or(nodes),
        })
    }

    fn operator(&mut self, operator: &str, arg: &Value, path: &[String], negated: bool) -> Result<Node, Invalid> {
        let wants = |what: &str| Err(invalid(format!("${operator} wants {what}, not {}", kind_of(arg))));
        let mut negated = negated;
        let condition = match operator {
            "and" | "or" | "nor" => {
                let Value::Array(args) = arg else { return wants("an array of selectors") };
                return self.combination(operator, args, path, negated);
            }
            "not" => match arg {
                Value::Object(_) => return self.node(arg, path, !negated),
                _ => return wants("a selector"),
            },
            "lt" => Condition::Lt(arg.clone()),
            "lte" => Condition::Lte(arg.clone()),
            "eq" => Condition::Eq(arg.clone()),
            "gte" => Condition::Gte(arg.clone()),
            "gt" => Condition::Gt(arg.clone()),
            "ne" => {
                negated = !negated;
                Condition::Eq(arg.clone())
            }
            "in" | "nin" | "all" => {
                let Value::Array(args) = arg else { return wants("an array") };
                negated ^= operator == "nin";
                match operator {
                    "all" => Condition::All(args.clone()),
                    _ => Condition::In(args.clone()),
                }
            }
            "exists" => match arg.as_bool() {
                // The one condition that a missing field can meet: its negation is its opposite.
                Some(wanted) => return Ok(field(path, Condition::Exists(wanted != negated), false)),
                None => return wants("true or false"),
            },
            "type" => match arg.as_str() {
                Some(kind @ ("null" | "boolean" | "number" | "string" | "array" | "object")) => Condition::Type(kind.to_string()),
                Some(_) => return Err(invalid(String::from("$type names no type of JSON"))),
                None => return wants("a type's name"),
            },
            "mod" => match arg.as_array().map(|pair| pair.iter().map(Value::as_i64).collect::<Vec<_>>()).as_deref() {
                Some([Some(divisor), Some(remainder)]) if *divisor != 0 => Condition::Mod(*divisor, *remainder),
                _ => return Err(invalid(String::from("$mod wants [divisor, remainder], whole numbers, the first not 0"))),
            },
            "regex" => {
                let Value::String(source) = arg else { return wants("a pattern") };
                Condition::Regex(Pattern::compile_perl(source).map_err(|error| invalid(format!("$regex {error}")))?)
            }
            "beginsWith" => match arg {
                Value::String(start) => Condition::BeginsWith(start.clone()),
                _ => return wants("a string"),
            },
            "size" => match arg.as_u64().and_then(|size| usize::try_from(size).ok()) {
                Some(size) => Condition::Size(size),
                None => return wants("a whole number, 0 or more"),
            },
            "elemMatch" | "allMatch" | "keyMapMatch" => {
                if !arg.is_object() {
                    return wants("a selector");
                }
                let inner = Box::new(self.node(arg, &[], false)?);
                match operator {
                    "elemMatch" => Condition::ElemMatch(inner),
                    "allMatch" => Condition::AllMatch(inner),
                    _ => Condition::KeyMapMatch(inner),
                }
            }
            "text" => return Err(invalid(String::from("$text needs an index: it cannot be used here"))),
            _ => return Err(invalid(format!("${} is no operator", operator.chars().take(40).collect::<String>()))),
        };
        Ok(field(path, condition, negated))
    }

    /// An empty array matches everything, in CouchDB for `$or` too.
    fn combination(&mut self, operator: &str, args: &[Value], path: &[String], negated: bool) -> Result<Node, Invalid> {
        // `$nor` is an `$and` of negations.
        let all = if operator == "or" { negated } else { !negated };
        let inner_negated = negated ^ (operator == "nor");
        let nodes = args.iter().map(|arg| self.node(arg, path, inner_negated)).collect::<Result<Vec<_>, _>>()?;
        Ok(match all || nodes.is_empty() {
            true => Node::And(nodes),
            false => Node::Or(nodes),
        })
    }
}

/// An `Or` of nothing, unlike CouchDB's: see `combination`.
const NEVER: Node = Node::Or(Vec::new());

fn field(path: &[String], condition: Condition, negated: bool) -> Node {
    Node::Field { path: path.to_vec(), condition, negated }
}

/// Each condition keeps its whole path.
const PATH_PARTS_MAX: usize = 64;

/// A dot separates. A backslash before it makes it part of the name, as one before a `$` does; CouchDB drops all of them.
fn deeper(path: &[String], name: &str) -> Result<Vec<String>, Invalid> {
    let mut path = path.to_vec();
    let mut part = String::new();
    let mut escaped = false;
    for c in name.chars() {
        match c {
            '\\' => {}
            '.' if !escaped => path.push(std::mem::take(&mut part)),
            other => part.push(other),
        }
        escaped = c == '\\';
    }
    path.push(part);
    if path.len() > PATH_PARTS_MAX {
        return Err(invalid(format!("has a path of more than {PATH_PARTS_MAX} names")));
    }
    match path.iter().any(String::is_empty) {
        true => Err(invalid(String::from("has a field without a name"))),
        false => Ok(path),
    }
}

impl Node {
    /// `find` looks a path up in what is tested.
    fn matches<'v>(&self, find: &dyn Fn(&[String]) -> Option<&'v Value>) -> bool {
        match self {
            Node::And(nodes) => nodes.iter().all(|node| node.matches(find)),
            Node::Or(nodes) => nodes.iter().any(|node| node.matches(find)),
            Node::Field { path, condition, negated } => match (find(path), condition) {
                (None, condition) => matches!(condition, Condition::Exists(false)),
                (Some(_), Condition::Exists(wanted)) => *wanted,
                (Some(found), condition) => {
                    let order = if matches!(path.as_slice(), [only] if only == "_id") { raw_order } else { order };
                    condition.matches(found, order) != *negated
                }
            },
        }
    }

    fn matches_value(&self, value: &Value) -> bool {
        self.matches(&|path| find(value, path))
    }
}

fn find<'v>(value: &'v Value, path: &[String]) -> Option<&'v Value> {
    path.iter().try_fold(value, |value, part| member(value, part))
}

type Order = fn(&Value, &Value) -> Ordering;

impl Condition {
    fn matches(&self, value: &Value, order: Order) -> bool {
        match (self, value) {
            (Condition::Lt(arg), value) => order(value, arg).is_lt(),
            (Condition::Lte(arg), value) => order(value, arg).is_le(),
            (Condition::Eq(arg), value) => order(value, arg).is_eq(),
            (Condition::Gte(arg), value) => order(value, arg).is_ge(),
            (Condition::Gt(arg), value) => order(value, arg).is_gt(),
            // Of an array, any element will do.
            (Condition::In(args), Value::Array(items)) => {
                args.iter().any(|arg| items.iter().any(|item| order(item, arg).is_eq()))
            }
            (Condition::In(args), value) => args.iter().any(|arg| order(value, arg).is_eq()),
            (Condition::Exists(wanted), _) => *wanted,
            (Condition::Type(kind), value) => kind == type_name(value),
            (Condition::Mod(divisor, remainder), Value::Number(number)) => {
                number.as_i64().is_some_and(|number| number.wrapping_rem(*divisor) == *remainder)
            }
            (Condition::Regex(pattern), Value::String(text)) => pattern.may_match(text),
            (Condition::BeginsWith(start), Value::String(text)) => text.starts_with(start.as_str()),
            (Condition::All(args), Value::Array(items)) => holds_all(args, items),
            (Condition::Size(size), Value::Array(items)) => items.len() == *size,
            (Condition::ElemMatch(node), Value::Array(items)) => items.iter().any(|item| node.matches_value(item)),
            (Condition::AllMatch(node), Value::Array(items)) => {
                !items.is_empty() && items.iter().all(|item| node.matches_value(item))
            }
            (Condition::KeyMapMatch(node), Value::Object(fields)) => {
                fields.keys().any(|key| node.matches_value(&Value::String(key.clone())))
            }
            _ => false,
        }
    }
}

/// All arguments are elements, or the one argument is the whole array. None at all: CouchDB says no.
fn holds_all(args: &[Value], items: &[Value]) -> bool {
    let is_whole = matches!(args, [Value::Array(whole)] if whole == items);
    is_whole || (!args.is_empty() && args.iter().all(|arg| items.contains(arg)))
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// CouchDB's order: null, false, true, numbers, strings, arrays, objects.
fn order(a: &Value, b: &Value) -> Ordering {
    order_with(a, b, string_order)
}

fn raw_order(a: &Value, b: &Value) -> Ordering {
    order_with(a, b, |a, b| a.cmp(b))
}

fn order_with(a: &Value, b: &Value, strings: fn(&str, &str) -> Ordering) -> Ordering {
    match (a, b) {
        (Value::Bool(a), Value::Bool(b)) => a.cmp(b),
        (Value::Number(a), Value::Number(b)) => number_order(a, b),
        (Value::String(a), Value::String(b)) => strings(a, b),
        (Value::Array(a), Value::Array(b)) => {
            first_difference(a.iter().zip(b).map(|(a, b)| order_with(a, b, strings))).then(a.len().cmp(&b.len()))
        }
        // In the order in which the members were written, as CouchDB compares them.
        (Value::Object(a), Value::Object(b)) => first_difference(
            a.iter().zip(b).map(|((ka, va), (kb, vb))| strings(ka, kb).then_with(|| order_with(va, vb, strings))),
        )
        .then(a.len().cmp(&b.len())),
        (a, b) => rank(a).cmp(&rank(b)),
    }
}

fn first_difference(mut orders: impl Iterator<Item = Ordering>) -> Ordering {
    orders.find(|order| order.is_ne()).unwrap_or(Ordering::Equal)
}

fn rank(value: &Value) -> u8 {
    match value {
        Value::Null => 0,
        Value::Bool(_) => 1,
        Value::Number(_) => 2,
        Value::String(_) => 3,
        Value::Array(_) => 4,
        Value::Object(_) => 5,
    }
}

fn number_order(a: &Number, b: &Number) -> Ordering {
    match (a.as_i64(), b.as_i64()) {
        (Some(a), Some(b)) => a.cmp(&b),
        _ => a.as_f64().unwrap_or(f64::NAN).total_cmp(&b.as_f64().unwrap_or(f64::NAN)),
    }
}

fn string_order(a: &str, b: &str) -> Ordering {
    let primary = a.chars().map(primary_weight).cmp(b.chars().map(primary_weight));
    // Lower case first, where nothing else differs.
    let case = || a.chars().map(char::is_uppercase).cmp(b.chars().map(char::is_uppercase));
    primary.then_with(case).then_with(|| a.cmp(b))
}

/// ICU's root order of ASCII's punctuation.
const PUNCTUATION: &str = "_-,;:!?.'\"()[]{}@*/\\&#%`^+<=>|~$";

fn primary_weight(c: char) -> u32 {
    match c {
        ' '..='/' | ':'..='@' | '['..='`' | '{'..='~' => PUNCTUATION.find(c).map_or(0x20, |at| 0x21 + at as u32),
        '0'..='9' => 0x60 + u32::from(c),
        'a'..='z' => 0x100 + u32::from(c),
        'A'..='Z' => 0x100 + u32::from(c.to_ascii_lowercase()),
        c if c.is_ascii() => u32::from(c),
        c => 0x1000 + c.to_lowercase().next().map_or(0, u32::from),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::couch::Row;
    use serde_json::json;

    fn doc() -> Row {
        let doc = json!({
            "_id": "Doc", "n": 5, "f": 2.5, "s": "Bob", "nul": null, "yes": true, "tags": ["a", "b", 3], "empty": [],
            "nested": {"deep": {"x": 1}}, "a.b": 1, "people": [{"name": "ann", "age": 30}, {"name": "bob", "age": 50}], "o": {},
            "$cost": 7
        });
        serde_json::from_value(json!({"seq": 1, "id": "Doc", "changes": [], "doc": doc})).expect("a row")
    }

    #[test]
    fn selectors_match_as_in_couchdb() {
        let cases = [
            (json!({}), true),
            (json!({"n": 5}), true),
            (json!({"n": 5.0}), true),
            (json!({"n": "5"}), false),
            (json!({"n": 5, "s": "Bob"}), true),
            (json!({"n": 5, "s": "Al"}), false),
            (json!({"nested.deep.x": 1}), true),
            (json!({"nested": {"deep": {"x": {"$gt": 0}}}}), true),
            (json!({"nested": {"$eq": {"deep": {"x": 1}}}}), true),
            (json!({"a\\.b": 1}), true),
            (json!({"a.b": 1}), false),
            (json!({"\\$cost": 7}), true),
            (json!({"\\n": 5}), true),
            (json!({"nes\\ted.deep": {"\\x": 1}}), true),
            (json!({"people.1.name": "bob"}), true),
            (json!({"o": {}}), true),
            (json!({"n": {}}), false),
            (json!({"n": {"$gt": 4, "$lt": 6}}), true),
            (json!({"n": {"$gte": 5, "$lte": 5, "$ne": 6}}), true),
            (json!({"n": {"$ne": 5}}), false),
            (json!({"missing": {"$ne": 5}}), false),
            (json!({"missing": null}), false),
            (json!({"nul": null}), true),
            (json!({"missing": {"$exists": false}}), true),
            (json!({"missing": {"$exists": true}}), false),
            (json!({"nul": {"$exists": true}}), true),
            (json!({"n": {"$exists": false}}), false),
            (json!({"$not": {"missing": {"$exists": true}}}), true),
            (json!({"$not": {"missing": 5}}), false),
            (json!({"$not": {"n": 5}}), false),
            (json!({"n": {"$not": {"$gt": 6}}}), true),
            (json!({"$not": {"n": {"$gt": 4}, "s": "Al"}}), true),
            (json!({"$not": {"$not": {"n": 5}}}), true),
            (json!({"$and": [{"n": 5}, {"s": "Bob"}]}), true),
            (json!({"$or": [{"n": 6}, {"s": "Bob"}]}), true),
            (json!({"$or": [{"n": 6}, {"s": "Al"}]}), false),
            (json!({"$or": []}), true),
            (json!({"$and": []}), true),
            (json!({"$nor": [{"n": 6}, {"s": "Al"}]}), true),
            (json!({"$nor": [{"n": 5}, {"s": "Al"}]}), false),
            (json!({"$not": {"$nor": [{"n": 5}, {"s": "Al"}]}}), true),
            (json!({"$not": {"$or": [{"n": 6}, {"s": "Al"}]}}), true),
            (json!({"$not": {"$and": [{"n": 5}, {"s": "Al"}]}}), true),
            (json!({"n": {"$or": [{"$lt": 2}, {"$gt": 4}]}}), true),
            (json!({"n": {"$in": [1, 5]}}), true),
            (json!({"n": {"$nin": [1, 5]}}), false),
            (json!({"n": {"$nin": []}}), true),
            (json!({"n": {"$in": []}}), false),
            (json!({"missing": {"$nin": [1]}}), false),
            (json!({"tags": {"$in": ["b"]}}), true),
            (json!({"tags": {"$nin": ["b"]}}), false),
            (json!({"tags": {"$all": ["b", "a"]}}), true),
            (json!({"tags": {"$all": ["b", "z"]}}), false),
            (json!({"tags": {"$all": [["a", "b", 3]]}}), true),
            (json!({"tags": {"$all": []}}), false),
            (json!({"n": {"$all": [5]}}), false),
            (json!({"tags": {"$size": 3}}), true),
            (json!({"empty": {"$size": 0}}), true),
            (json!({"s": {"$size": 3}}), false),
            (json!({"tags": {"$not": {"$size": 3}}}), false),
            (json!({"people": {"$elemMatch": {"name": "bob", "age": {"$gt": 40}}}}), true),
            (json!({"people": {"$elemMatch": {"name": "ann", "age": {"$gt": 40}}}}), false),
            (json!({"tags": {"$elemMatch": {"$eq": 3}}}), true),
            (json!({"tags": {"$elemMatch": {"$gt": 2, "$lt": 4}}}), true),
            (json!({"people": {"$allMatch": {"age": {"$gt": 20}}}}), true),
            (json!({"people": {"$allMatch": {"age": {"$gt": 40}}}}), false),
            (json!({"empty": {"$allMatch": {"$gt": 0}}}), false),
            (json!({"nested": {"$keyMapMatch": {"$eq": "deep"}}}), true),
            (json!({"nested": {"$keyMapMatch": {"$eq": "x"}}}), false),
            (json!({"n": {"$mod": [4, 1]}}), true),
            (json!({"f": {"$mod": [2, 0]}}), false),
            (json!({"n": {"$type": "number"}}), true),
            (json!({"nul": {"$type": "null"}}), true),
            (json!({"tags": {"$type": "array"}}), true),
            (json!({"n": {"$type": "string"}}), false),
            (json!({"s": {"$regex": "^B.b$"}}), true),
            (json!({"s": {"$regex": "(?i)^bob"}}), true),
            (json!({"n": {"$regex": "5"}}), false),
            (json!({"s": {"$beginsWith": "Bo"}}), true),
            (json!({"s": {"$beginsWith": "bo"}}), false),
            (json!({"s": {"$gt": "alice"}}), true),
            (json!({"_id": {"$gt": "alice"}}), false),
            (json!({"s": {"$gt": 1e9}}), true),
            (json!({"nul": {"$lt": false}}), true),
            (json!({"yes": {"$gt": false, "$lt": -100}}), true),
            (json!({"tags": {"$gt": "zzz", "$lt": {}}}), true),
        ];
        for (selector, expected) in cases {
            let parsed = Selector::parse(&selector).unwrap_or_else(|e| panic!("{selector}: {e}"));
            assert_eq!(parsed.matches(&Document::of(&doc())), expected, "{selector}");
        }
    }

    /// CouchDB wants the name of a field there.
    #[test]
    fn a_condition_without_a_field_is_of_the_whole_document() {
        for (selector, expected) in [
            (json!({"$keyMapMatch": {"$eq": "tags"}}), true),
            (json!({"$keyMapMatch": {"$eq": "x"}}), false),
            (json!({"$type": "object"}), true),
        ] {
            assert_eq!(Selector::parse(&selector).unwrap().matches(&Document::of(&doc())), expected, "{selector}");
        }
    }

    #[test]
    fn a_bad_selector_says_why() {
        for (selector, reason) in [
            (json!([]), "an object"),
            (json!(null), "an object"),
            (json!({"$and": {}}), "an array"),
            (json!({"$not": 5}), "a selector"),
            (json!({"n": {"$in": 5}}), "an array"),
            (json!({"n": {"$exists": 1}}), "true or false"),
            (json!({"n": {"$type": "integer"}}), "no type"),
            (json!({"n": {"$mod": [0, 1]}}), "$mod"),
            (json!({"n": {"$mod": 3}}), "$mod"),
            (json!({"n": {"$regex": "("}}), "$regex"),
            (json!({"n": {"$regex": 1}}), "a pattern"),
            (json!({"n": {"$size": -1}}), "whole number"),
            (json!({"n": {"$elemMatch": []}}), "a selector"),
            (json!({"n": {"$beginsWith": 1}}), "a string"),
            (json!({"n": {"$where": "x"}}), "$where is no operator"),
            (json!({"$text": "x"}), "index"),
            (json!({"": 1}), "without a name"),
            (json!({"a..b": 1}), "without a name"),
        ] {
            let error = Selector::parse(&selector).expect_err(&selector.to_string()).to_string();
            assert!(error.starts_with("selector ") && error.contains(reason), "{selector}: {error}");
        }
        let deep = (0..DEPTH_MAX + 1).fold(json!(1), |inner, _| json!({"$not": {"a": inner}}));
        assert!(Selector::parse(&deep).expect_err("too deep").reason.contains("levels"));
    }

    #[test]
    fn values_stand_in_couchdbs_order() {
        let ascending = [
            json!(null),
            json!(false),
            json!(true),
            json!(-1),
            json!(0.5),
            json!(1),
            json!(u64::MAX),
            json!(""),
            json!("_"),
            json!("-"),
            json!("$"),
            json!("1"),
            json!("a"),
            json!("A"),
            json!("aa"),
            json!("B"),
            json!("ba"),
            json!("é"),
            json!([]),
            json!([1]),
            json!([1, "a"]),
            json!(["a"]),
            json!({}),
            json!({"a": 1}),
            json!({"a": 2}),
            json!({"b": 1}),
        ];
        for pair in ascending.windows(2) {
            assert_eq!(order(&pair[0], &pair[1]), Ordering::Less, "{} < {}", pair[0], pair[1]);
            assert_eq!(order(&pair[1], &pair[0]), Ordering::Greater, "{} > {}", pair[1], pair[0]);
        }
        for value in &ascending {
            assert_eq!(order(value, value), Ordering::Equal);
        }
    }
}
