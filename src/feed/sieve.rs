//! Which rows of `_global_changes` are hints.
//!
//! A row's id is `updated:<db>`, `created:<db>` or `deleted:<db>`, the name as it is, not encoded. CouchDB keeps the three
//! apart and unordered, so each of them only says: look.

use crate::rules::installations::INTERNAL;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Updated,
    Created,
    Deleted,
}

/// The database that a row names, or None where it names none: design documents have no `:`.
pub fn database_of(row_id: &str) -> Option<(Kind, &str)> {
    let (kind, db) = row_id.split_once(':')?;
    let kind = match kind {
        "updated" => Kind::Updated,
        "created" => Kind::Created,
        "deleted" => Kind::Deleted,
        _ => return None,
    };
    (!db.is_empty() && !INTERNAL.contains(&db)).then_some((kind, db))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_rows_of_databases_are_hints() {
        let cases = [
            ("updated:a/b+c", Some((Kind::Updated, "a/b+c"))),
            ("created:x", Some((Kind::Created, "x"))),
            ("deleted:x", Some((Kind::Deleted, "x"))),
            ("updated:_users", Some((Kind::Updated, "_users"))),
            ("updated:x:y", Some((Kind::Updated, "x:y"))),
            ("_design/sieve", None),
            ("updated:", None),
            ("updated:_dbs", None),
            ("renamed:x", None),
            ("", None),
        ];
        for (id, expected) in cases {
            assert_eq!(database_of(id), expected, "{id}");
        }
    }
}
