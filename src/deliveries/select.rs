//! Which deliveries somebody means, and what is done with them (pure).
//!
//! A wish that is misspelled is an error and never a wider wish: `stat=dead` must not drop everything.

use super::parked::{DELIVERY, Key, Parked, State};
use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

/// All that is given must match.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    pub rule: Option<String>,
    pub db: Option<String>,
    pub doc_id: Option<String>,
    pub state: Option<State>,
    pub status: Option<StatusFilter>,
}

impl Filter {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The one delivery that it can match, where it names one.
    pub fn key(&self) -> Option<Key> {
        Some(Key::of(self.rule.as_deref()?, self.db.as_deref()?, self.doc_id.as_deref()?))
    }

    pub fn matches(&self, parked: &Parked) -> bool {
        let is = |wanted: &Option<String>, text: &str| wanted.as_deref().is_none_or(|wanted| wanted == text);
        is(&self.rule, &parked.rule)
            && is(&self.db, &parked.db)
            && is(&self.doc_id, &parked.doc_id)
            && self.state.is_none_or(|state| state == parked.state)
            && self.status.is_none_or(|status| status.matches(parked.last_status))
    }

    /// What was dropped is meant only where somebody says so.
    pub fn acts_on(&self, parked: &Parked) -> bool {
        self.matches(parked) && (self.state.is_some() || parked.state != State::Dropped)
    }

    /// Whether it can match what is known of a disabled rule: its id.
    pub fn matches_disabled(&self, rule: &str) -> bool {
        let Self { rule: wanted, db, doc_id, state, status } = self;
        (db, doc_id, state, status) == (&None, &None, &None, &None) && wanted.as_deref().is_none_or(|wanted| wanted == rule)
    }
}

/// `503`, `5xx`, or `none` where no answer came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusFilter {
    NoAnswer,
    Exactly(u16),
    Class(u16),
}

impl StatusFilter {
    fn matches(self, status: Option<u16>) -> bool {
        match self {
            StatusFilter::NoAnswer => status.is_none(),
            StatusFilter::Exactly(wanted) => status == Some(wanted),
            StatusFilter::Class(class) => status.is_some_and(|status| status / 100 == class),
        }
    }
}

impl FromStr for StatusFilter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || String::from("must be a status such as 503, a class such as 5xx, or none where no answer came");
        if text == "none" {
            return Ok(StatusFilter::NoAnswer);
        }
        match text.strip_suffix("xx") {
            Some(class) => match class.parse() {
                Ok(class @ 1..=5) if text.len() == 3 => Ok(StatusFilter::Class(class)),
                _ => Err(bad()),
            },
            None => match text.parse() {
                Ok(status @ 100..=599) if text.len() == 3 => Ok(StatusFilter::Exactly(status)),
                _ => Err(bad()),
            },
        }
    }
}

impl FromStr for State {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        State::of(text).ok_or_else(|| String::from("must be parked, dead or dropped"))
    }
}

/// Fewer digits are more likely a slip than a wish.
const DIGITS_MIN: usize = 6;
const DIGITS: usize = 40;

/// The start of a delivery's `_id`, as a person writes it: with `delivery:` or without, whole or its first digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyPrefix(String);

impl KeyPrefix {
    pub fn as_id_prefix(&self) -> &str {
        &self.0
    }

    pub fn whole(&self) -> Option<Key> {
        Key::parse(&self.0)
    }
}

impl FromStr for KeyPrefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.strip_prefix(DELIVERY).unwrap_or(text);
        let is_hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        match is_hex && (DIGITS_MIN..=DIGITS).contains(&digits.len()) {
            true => Ok(Self(format!("{DELIVERY}{}", digits.to_ascii_lowercase()))),
            false => {
                Err(format!("must be a delivery's key as `list` shows it: {DIGITS_MIN} to {DIGITS} digits and letters up to f"))
            }
        }
    }
}

impl fmt::Display for KeyPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// At once; with a new `webhook-id` where the receiver would drop the old one as a repeat.
    Retry { new_id: bool },
    /// `by` says who wanted it so.
    Drop { by: String },
}

impl Action {
    /// False where nothing has to be written.
    pub fn apply(&self, parked: &mut Parked, now: SystemTime) -> bool {
        match self {
            Action::Retry { new_id } => {
                parked.retry(now, *new_id);
                true
            }
            Action::Drop { .. } if parked.state == State::Dropped => false,
            Action::Drop { by } => {
                parked.end(State::Dropped, format!("by {by}"), now);
                true
            }
        }
    }
}

/// What a request says in its query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wishes {
    pub filter: Filter,
    /// Every delivery is meant: nothing else of the filter need be given.
    pub all: bool,
    pub new_id: bool,
    pub limit: usize,
    /// Where the page before ended, as it said.
    pub after: Option<String>,
}

/// A page of an answer; each document is a few KB.
const LIMIT_DEFAULT: usize = 100;
const LIMIT_MAX: usize = 1_000;

impl Wishes {
    /// `known` are the parameters that this request may have.
    pub fn of_query(query: &[(String, String)], known: &[&str]) -> Result<Self, String> {
        let mut wishes = Self { filter: Filter::default(), all: false, new_id: false, limit: LIMIT_DEFAULT, after: None };
        for (at, (name, value)) in query.iter().enumerate() {
            if !known.contains(&name.as_str()) {
                return Err(format!("{name:?} is no parameter here; there are {}", known.join(", ")));
            }
            if query.iter().take(at).any(|(earlier, _)| earlier == name) {
                return Err(format!("{name} is given twice"));
            }
            if value.is_empty() {
                return Err(format!("{name} is empty"));
            }
            wishes.take(name, value).map_err(|why| format!("{name} {why}"))?;
        }
        Ok(wishes)
    }

    /// `after`, where pages are of deliveries.
    pub fn after_key(&self) -> Result<Option<Key>, String> {
        let Some(after) = &self.after else { return Ok(None) };
        let key = after.parse::<KeyPrefix>().ok().and_then(|key| key.whole());
        key.map(Some).ok_or_else(|| String::from("after must be what `next` of the page before says"))
    }

    fn take(&mut self, name: &str, value: &str) -> Result<(), String> {
        let yes_or_no = || value.parse::<bool>().map_err(|_| String::from("must be true or false"));
        match name {
            "rule" => self.filter.rule = Some(value.to_string()),
            "db" => self.filter.db = Some(value.to_string()),
            "doc" => self.filter.doc_id = Some(value.to_string()),
            "state" => self.filter.state = Some(value.parse()?),
            "status" => self.filter.status = Some(value.parse()?),
            "all" => self.all = yes_or_no()?,
            "new_id" => self.new_id = yes_or_no()?,
            "limit" => match value.parse() {
                Ok(limit @ 1..=LIMIT_MAX) => self.limit = limit,
                _ => return Err(format!("must be a number from 1 to {LIMIT_MAX}")),
            },
            "after" => self.after = Some(value.to_string()),
            _ => return Err(String::from("is not understood")),
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::time::Duration;

    fn parked(state: State, status: Option<u16>) -> Parked {
        let (rule, db, doc) = ("mail", "user_a", "order:7");
        let doc = json!({ "_id": Key::of(rule, db, doc).doc_id(), "_rev": "1-a", "type": "delivery", "rule": rule, "db_name": db,
            "doc_id": doc, "state": state.name(), "last_status": status });
        Parked::read(&doc).expect("a delivery")
    }

    fn query(text: &str) -> Result<Wishes, String> {
        let pairs: Vec<(String, String)> = url::form_urlencoded::parse(text.as_bytes()).into_owned().collect();
        Wishes::of_query(&pairs, &["rule", "db", "doc", "state", "status", "limit", "after", "new_id", "all"])
    }

    #[test]
    fn all_that_is_given_must_match() {
        let cases = [
            ("", true),
            ("rule=mail", true),
            ("rule=mai", false),
            ("db=user_a&doc=order%3A7", true),
            ("db=user_b&doc=order%3A7", false),
            ("doc=order%3A8", false),
            ("state=parked", true),
            ("state=dead", false),
            ("status=503", true),
            ("status=500", false),
            ("status=5xx", true),
            ("status=4xx", false),
            ("status=none", false),
            ("rule=mail&status=4xx", false),
        ];
        for (text, expected) in cases {
            let wishes = query(text).expect("legal");
            assert_eq!(wishes.filter.matches(&parked(State::Parked, Some(503))), expected, "{text}");
            assert_eq!(wishes.filter.is_empty(), text.is_empty());
        }
        let none = query("status=none").expect("legal").filter;
        assert!(none.matches(&parked(State::Parked, None)));
    }

    #[test]
    fn what_was_dropped_is_acted_on_only_where_it_is_named() {
        let dropped = parked(State::Dropped, None);
        assert!(!query("rule=mail").expect("legal").filter.acts_on(&dropped));
        assert!(query("state=dropped").expect("legal").filter.acts_on(&dropped));
        assert!(query("rule=mail").expect("legal").filter.acts_on(&parked(State::Dead, None)));
    }

    #[test]
    fn a_slip_is_an_error_and_never_a_wider_wish() {
        for text in [
            "stat=dead",
            "rule=",
            "rule=a&rule=b",
            "state=Dead",
            "status=5",
            "status=5x",
            "status=9xx",
            "status=+50",
            "status=",
            "limit=0",
            "limit=1001",
            "limit=-1",
            "after=x",
            "after=delivery:abcdef",
            "new_id=yes",
            "all=1",
            "RULE=a",
        ] {
            assert!(query(text).and_then(|wishes| wishes.after_key()).is_err(), "{text}");
        }
    }

    #[test]
    fn only_rules_without_other_wishes_list_disabled_ones() {
        for (text, expected) in
            [("", true), ("rule=mail", true), ("rule=other", false), ("db=user_a", false), ("state=dead", false)]
        {
            assert_eq!(query(text).expect("legal").filter.matches_disabled("mail"), expected, "{text}");
        }
    }

    #[test]
    fn keys_are_written_in_several_ways() {
        let whole = Key::of("a", "b", "c");
        let id = whole.doc_id();
        let digits = id.strip_prefix(DELIVERY).expect("its prefix");
        for text in [id.as_str(), digits, &digits.to_uppercase()] {
            assert_eq!(text.parse::<KeyPrefix>().expect("a key").whole(), Some(whole));
        }
        let short = digits[..8].parse::<KeyPrefix>().expect("a start");
        assert_eq!((short.whole(), short.as_id_prefix()), (None, &id[..DELIVERY.len() + 8]));
        for text in ["", "abc", "delivery:", "disabled:abcdef", "ghijkl", &format!("{digits}0"), "ab cdef"] {
            assert!(text.parse::<KeyPrefix>().is_err(), "{text}");
        }
        let named = query("rule=a&db=b&doc=c").expect("legal").filter;
        assert_eq!((named.key(), query("rule=a&db=b").expect("legal").filter.key()), (Some(whole), None));
    }

    #[test]
    fn an_action_changes_what_there_is_to_change() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(9);
        let drop = Action::Drop { by: "anna".into() };
        let mut delivery = parked(State::Parked, None);
        assert!(drop.apply(&mut delivery, now));
        assert_eq!((delivery.state, delivery.reason.as_deref(), delivery.ended_at), (State::Dropped, Some("by anna"), Some(now)));
        assert!(!drop.apply(&mut delivery, now + Duration::from_secs(1)), "twice is fine");
        assert!(Action::Retry { new_id: true }.apply(&mut delivery, now));
        assert_eq!((delivery.state, delivery.next_attempt_at, delivery.replays), (State::Parked, Some(now), 1));
    }

    proptest! {
        #[test]
        fn no_query_panics(pairs: Vec<(String, String)>, name in "rule|db|doc|state|status|limit|after|new_id|all", value: String) {
            let known = ["rule", "db", "doc", "state", "status", "limit", "after", "new_id", "all"];
            let _ = Wishes::of_query(&pairs, &known);
            let _ = Wishes::of_query(&[(name, value)], &known);
        }

        #[test]
        fn a_key_prefix_never_leaves_its_range(text: String) {
            if let Ok(prefix) = text.parse::<KeyPrefix>() {
                prop_assert!(prefix.as_id_prefix().starts_with(DELIVERY));
            }
        }
    }
}
