//! The design documents that the original's installer writes, so that it can be started again on the same databases.
//!
//! Names, keys and meaning are the original's. This program reads none of these views: it loads documents by `_all_docs` and
//! `_changes`, which no index build can hold up.

use serde_json::{Map, Value, json};

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Design {
    pub id: String,
    /// Each design document has one view.
    pub view: String,
    pub map: String,
}

impl Design {
    fn of_one_view(name: &str, condition: &str, emit: &str) -> Self {
        let map = format!("function (doc) {{\n  if ({condition}) {{\n    {emit};\n  }}\n}}");
        Self { id: format!("_design/{name}"), view: name.to_string(), map }
    }

    /// What to write, or None where it is there already. Fields and views of others are kept.
    pub fn merged_into(&self, existing: Option<Value>) -> Option<Value> {
        let map = Value::from(self.map.as_str());
        let mut doc = match existing {
            Some(Value::Object(doc)) => doc,
            _ => Map::from_iter([(String::from("_id"), json!(self.id)), (String::from("language"), json!("javascript"))]),
        };
        let mut views = take_object(&mut doc, "views");
        let mut view = take_object(&mut views, &self.view);
        if view.get("map") == Some(&map) {
            return None;
        }
        view.insert(String::from("map"), map);
        views.insert(self.view.clone(), Value::Object(view));
        doc.insert(String::from("views"), Value::Object(views));
        Some(Value::Object(doc))
    }
}

/// The object at `key`; anything else that stands there gives way to a new one.
fn take_object(parent: &mut Map<String, Value>, key: &str) -> Map<String, Value> {
    match parent.remove(key) {
        Some(Value::Object(object)) => object,
        _ => Map::new(),
    }
}

/// Those of the spiegel database.
pub(super) fn of_the_spiegel_database() -> Vec<Design> {
    let emit_id = "emit(doc._id, null)";
    let mut designs = vec![Design::of_one_view("on_changes", "doc.type === 'on_change'", emit_id)];
    for kind in ["replicator", "change_listener"] {
        let is_kind = format!("doc.type === '{kind}'");
        // A document without `dirty` counts as dirty: it is new.
        let views = [
            (format!("dirty_and_unlocked_{kind}"), format!("{is_kind} && doc.dirty !== false && !doc.locked_at")),
            (format!("locked_{kind}"), format!("{is_kind} && doc.locked_at")),
            (format!("dirty_{kind}"), format!("{is_kind} && doc.dirty !== false")),
            (format!("dirty_at_{kind}"), format!("{is_kind} && doc.dirty === false && doc.dirty_at && !doc.locked_at")),
        ];
        designs.extend(views.iter().map(|(name, condition)| Design::of_one_view(name, condition, emit_id)));
    }
    // The database's name is the last segment of the source. An object as source is ours alone: the original cannot take it.
    designs.push(Design::of_one_view(
        "clean_or_locked_replicators_by_db_name",
        "doc.type === 'replicator' && typeof doc.source === 'string' && doc.source.indexOf('/') >= 0 &&\n      \
         (doc.locked_at || (!doc.dirty && !doc.dirty_at))",
        "emit(doc.source.split('/').pop(), null)",
    ));
    designs.push(Design::of_one_view("change_listeners_by_db_name", "doc.type === 'change_listener'", "emit(doc.db_name, null)"));
    designs
}

/// The one of `_global_changes`: emits the names of all databases but Spiegel's own.
pub(super) fn sieve(namespace: &str, db_name: &str) -> Design {
    let own = Value::from(db_name);
    let map = format!(
        "function (doc) {{\n  var colon = doc._id.indexOf(':');\n  var name = doc._id.slice(colon + 1);\n  \
         if (colon >= 0 && name !== {own}) {{\n    emit(name);\n  }}\n}}"
    );
    Design { id: format!("_design/{namespace}sieve"), view: String::from("sieve"), map }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn the_documents_are_the_original_s() {
        let mut ids: Vec<String> = of_the_spiegel_database().into_iter().map(|design| design.id).collect();
        ids.sort();
        assert_eq!(
            ids,
            [
                "_design/change_listeners_by_db_name",
                "_design/clean_or_locked_replicators_by_db_name",
                "_design/dirty_and_unlocked_change_listener",
                "_design/dirty_and_unlocked_replicator",
                "_design/dirty_at_change_listener",
                "_design/dirty_at_replicator",
                "_design/dirty_change_listener",
                "_design/dirty_replicator",
                "_design/locked_change_listener",
                "_design/locked_replicator",
                "_design/on_changes",
            ]
        );
        assert_eq!(sieve("test_", "spiegel").id, "_design/test_sieve");
    }

    #[test]
    fn writing_twice_writes_once() {
        for design in of_the_spiegel_database() {
            let first = design.merged_into(None).expect("nothing was there");
            assert_eq!(first["views"][&design.view]["map"], design.map.as_str());
            assert_eq!(design.merged_into(Some(first)), None, "{}", design.id);
        }
    }

    #[test]
    fn what_others_wrote_is_kept_and_what_is_malformed_is_mended() {
        let design = sieve("", "spiegel");
        let theirs = json!({ "_id": "_design/sieve", "_rev": "3-x", "mine": 1,
            "views": { "sieve": { "map": "old", "reduce": "_count" }, "other": { "map": "x" } } });
        let merged = design.merged_into(Some(theirs)).expect("the map differs");
        assert_eq!((&merged["_rev"], &merged["mine"]), (&json!("3-x"), &json!(1)));
        assert_eq!((&merged["views"]["other"]["map"], &merged["views"]["sieve"]["reduce"]), (&json!("x"), &json!("_count")));

        for views in [json!(null), json!([]), json!({ "sieve": 5 })] {
            let mended = design.merged_into(Some(json!({ "_id": "_design/sieve", "views": views }))).expect("malformed");
            assert_eq!(mended["views"]["sieve"]["map"], design.map.as_str());
        }
    }

    #[test]
    fn a_name_cannot_break_out_of_the_sieve() {
        assert!(sieve("", "a$(b)+c/d-e").map.contains("name !== \"a$(b)+c/d-e\""));
    }
}
