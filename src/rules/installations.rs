//! Which databases are nobody's to watch: Spiegel's own, of this and of every other installation on the server, and CouchDB's.

use serde_json::Value;
use std::collections::HashSet;

/// CouchDB's bookkeeping. `_global_changes` is written for each write to any database, those of Spiegel too: a rule `.*` that
/// took it would feed on its own parked deliveries.
pub const INTERNAL: [&str; 3] = ["_dbs", "_nodes", "_global_changes"];

/// The databases of one installation, by the name of its spiegel database.
pub fn databases_of(db_name: &str) -> [String; 3] {
    [db_name.to_string(), format!("{db_name}_deliveries"), format!("{db_name}_cluster")]
}

/// The spiegel databases of every installation on this server, by the sieve documents that their `install` left in
/// `_global_changes`. The original wrote its database's name only into the view's pattern, `/:NAME$/`.
pub fn installations(design_docs: &[Value]) -> HashSet<String> {
    let sieves = design_docs.iter().filter(|doc| doc["_id"].as_str().is_some_and(|id| id.ends_with("sieve")));
    sieves.filter_map(|doc| doc["views"]["sieve"]["map"].as_str()).flat_map(names_in_patterns).collect()
}

fn names_in_patterns(map: &str) -> Vec<String> {
    let starts = map.match_indices("/:").map(|(at, _)| &map[at + 2..]);
    let names = starts.filter_map(|rest| rest.split_once("$/")).map(|(name, _)| name.replace('\\', ""));
    names.filter(|name| is_database_name(name)).collect()
}

fn is_database_name(name: &str) -> bool {
    let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_$()+/-".contains(c);
    name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_') && name.chars().all(legal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn installations_are_known_by_their_sieves() {
        let map =
            |name: &str| format!("function (doc) {{ if (/:(.*)$/.test(doc._id) && !/:{name}$/.test(doc._id)) {{ emit(1) }} }}");
        let docs = [
            json!({ "_id": "_design/sieve", "views": { "sieve": { "map": map("spiegel") } } }),
            json!({ "_id": "_design/other_sieve", "views": { "sieve": { "map": map("other\\/spiegel") } } }),
            json!({ "_id": "_design/unrelated", "views": { "sieve": { "map": map("no") } } }),
            json!({ "_id": "_design/sieve_broken", "views": 7 }),
        ];
        assert_eq!(installations(&docs), HashSet::from([String::from("spiegel"), String::from("other/spiegel")]));
    }
}
