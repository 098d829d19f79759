//! What a database looks like from outside, so that a sweep can tell that nothing happened without reading its changes.

use super::Seq;
use super::docs::DbInfo;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

/// Equal where nothing seems to have changed: `<instance_start_time>:<number>:<doc_count>:<doc_del_count>`. The number stands
/// before the dash of `update_seq`; what follows differs from request to request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint(Arc<str>);

/// As many digits as a u64 has.
const DIGITS_MAX: usize = 20;

impl Fingerprint {
    pub fn of(info: &DbInfo) -> Self {
        let DbInfo { update_seq, doc_count, doc_del_count, instance_start_time } = info;
        let number = match update_seq {
            Seq::Number(number) => number.to_string(),
            Seq::Text(text) => text.split('-').next().unwrap_or_default().to_string(),
        };
        Self(format!("{instance_start_time}:{number}:{doc_count}:{doc_del_count}").into())
    }

    /// A few bytes that say the same to this process: the texts of 100,000 databases would be megabytes.
    pub fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.0.hash(&mut hasher);
        hasher.finish()
    }

    /// Whether it may be believed by a later process. CouchDB 2 says "0" of every database, so that one that was made again
    /// meanwhile could look the same; and what is not made of numbers is nobody's to keep.
    pub fn is_lasting(&self) -> bool {
        let mut parts = self.0.split(':');
        let tells_instances = parts.clone().next().is_some_and(|instance| instance.bytes().any(|byte| byte != b'0'));
        let is_number = |part: &str| (1..=DIGITS_MAX).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_digit());
        tells_instances && parts.clone().count() == 4 && parts.all(is_number)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn info(seq: &str, docs: u64, deleted: u64, instance: &str) -> DbInfo {
        DbInfo { update_seq: Seq::from(seq), doc_count: docs, doc_del_count: deleted, instance_start_time: instance.to_string() }
    }

    #[test]
    fn it_sees_what_matters_and_no_more() {
        let base = Fingerprint::of(&info("7-abc", 3, 1, "100"));
        assert_eq!(base.to_string(), "100:7:3:1");
        assert_eq!(base, Fingerprint::of(&info("7-xyz", 3, 1, "100")), "the text after the dash is another each time");
        for other in
            [info("8-abc", 3, 1, "100"), info("7-abc", 4, 1, "100"), info("7-abc", 3, 2, "100"), info("7-abc", 3, 1, "200")]
        {
            assert_ne!(base, Fingerprint::of(&other), "{other:?}");
            assert_ne!(base.digest(), Fingerprint::of(&other).digest(), "{other:?}");
        }
        let number = DbInfo { update_seq: Seq::Number(7), ..info("", 3, 1, "100") };
        assert_eq!(base, Fingerprint::of(&number), "PouchDB's seqs are integers");
    }

    #[test]
    fn only_numbers_of_a_server_that_tells_instances_apart_last() {
        let cases = [
            (info("7-abc", 3, 1, "1731000000"), true),
            (info("0-abc", 0, 0, "1731000000000000"), true),
            (info("7-abc", 3, 1, "0"), false),
            (info("7-abc", 3, 1, ""), false),
            (info("", 3, 1, "100"), false),
            (info("seven-abc", 3, 1, "100"), false),
            (info("7-abc", 3, 1, "a:b"), false),
            (info("1:2", 3, 1, "100"), false),
            (info(&"7".repeat(21), 3, 1, "100"), false),
        ];
        for (info, expected) in cases {
            assert_eq!(Fingerprint::of(&info).is_lasting(), expected, "{info:?}");
        }
    }

    proptest! {
        /// Two states that differ in anything never look the same, whatever a server writes into its texts.
        #[test]
        fn what_lasts_is_equal_only_where_everything_is(
            a in ("[0-9:-]{0,4}", "[0-9:-]{0,4}", 0u64..3, 0u64..3),
            b in ("[0-9:-]{0,4}", "[0-9:-]{0,4}", 0u64..3, 0u64..3),
        ) {
            let of = |(instance, seq, docs, deleted): &(String, String, u64, u64)| Fingerprint::of(&info(seq, *docs, *deleted, instance));
            let number = |seq: &str| seq.split('-').next().map(str::to_string);
            let same = a.0 == b.0 && number(&a.1) == number(&b.1) && (a.2, a.3) == (b.2, b.3);
            let (one, other) = (of(&a), of(&b));
            if one.is_lasting() && other.is_lasting() {
                prop_assert_eq!(one == other, same);
            }
        }
    }
}
