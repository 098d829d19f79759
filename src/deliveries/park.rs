//! On behalf of a page of changes: what failed is written down, and what is parked already takes in what is newer.

use super::Deliveries;
use super::parked::{Disabled, Key, Parked, State};
use super::patience::{History, Next};
use crate::couch::{Seq, WriteResult};
use crate::job::{DbName, Failed, Verdict};
use crate::rules::rule::Rule;
use futures_util::future::join_all;
use serde_json::Value;
use std::sync::Arc;
use std::time::SystemTime;

/// One delivery that does not go on by itself.
pub struct Owed {
    pub rule: Arc<Rule>,
    pub db: DbName,
    pub instance_start_time: Arc<str>,
    pub doc_id: String,
    pub rev: String,
    pub seq: Seq,
    /// How it failed; None for a newer change of what is parked already.
    pub failed: Option<Failed>,
    /// How it failed until now, where its rule has waited for it.
    pub history: Option<History>,
}

/// Many in a row mean that somebody writes the document in a loop.
const ROUNDS_MAX: usize = 20;
/// A newer change waits no longer than what has failed so often.
const HURRIED_MAX: u32 = 3;

/// A place in the index for what is being written; given back whatever becomes of that.
struct Place<'a>(&'a Deliveries, &'a Owed);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.book.index().unreserve(&self.1.rule.id, &self.1.db);
    }
}

impl Deliveries {
    /// For each, whether it is durable now; one that is not stays with whoever asked.
    pub async fn park(&self, owed: Vec<Owed>) -> Vec<bool> {
        join_all(owed.iter().map(|owed| self.park_one(owed))).await
    }

    /// Whether a change that failed like this is not tried again, as its rule or the settings say.
    pub fn gives_up(&self, rule: &Rule, verdict: Verdict, history: History, now: SystemTime) -> bool {
        let patience = self.settings.patience.of(&rule.handling.retry);
        matches!(patience.next(verdict, history, now, 1.0), Next::Dead { .. })
    }

    async fn park_one(&self, owed: &Owed) -> bool {
        let key = Key::of(&owed.rule.id, &owed.db, &owed.doc_id);
        if self.book.is_foreign() || !self.book.index().reserve(&key, &owed.rule.id, &owed.db, self.settings.bounds) {
            return false;
        }
        let _place = Place(self, owed);
        self.write(key, owed).await
    }

    async fn write(&self, key: Key, owed: &Owed) -> bool {
        let mut is_known = self.book.index().get(&key).is_some();
        for _ in 0..ROUNDS_MAX {
            let existing = match is_known {
                true => match self.store.load(key.doc_id()).await {
                    Ok(existing) => existing,
                    Err(_) => return false,
                },
                false => None,
            };
            let was = existing.as_ref().and_then(Parked::read);
            let patience = self.settings.patience.of(&owed.rule.handling.retry);
            let now = SystemTime::now();
            let next = |verdict, history| patience.next(verdict, history, now, fastrand::f64());
            let Some(mut parked) = merged(was, owed, now, next) else { return true };
            let Ok(result) = self.store.save(parked.write(existing)).await else { return false };
            match result {
                WriteResult::Saved { rev } => {
                    parked.doc_rev = rev;
                    let is_first = self.book.index().put(&parked);
                    self.book.changed.notify_one();
                    if is_first {
                        let (rule, error) = (&parked.rule, &parked.last_error);
                        tracing::warn!(rule, db = %owed.db, error, "a delivery failed and is parked; further ones of this rule are only counted");
                    }
                    return true;
                }
                WriteResult::Conflict => is_known = true,
                WriteResult::Refused { reason } => {
                    tracing::error!(rule = %owed.rule.id, db = %owed.db, reason, "couchdb refused a parked delivery");
                    return false;
                }
            }
        }
        false
    }

    /// The receiver answered 410: nothing more is sent for this revision of the rule.
    pub async fn disable(&self, rule: &Rule, db: &DbName, error: &str) {
        if self.is_disabled(rule) || self.book.is_foreign() {
            return;
        }
        let doc = Disabled::document(&rule.id, &rule.rev, db, error, SystemTime::now());
        let id = doc["_id"].as_str().unwrap_or_default().to_string();
        for _ in 0..ROUNDS_MAX {
            let Ok(existing) = self.store.load(id.clone()).await else { return };
            let mut doc = doc.clone();
            if let Some(rev) = existing.as_ref().and_then(|existing| existing["_rev"].as_str()) {
                doc["_rev"] = Value::from(rev);
            }
            match self.store.save(doc.clone()).await {
                Ok(WriteResult::Saved { rev }) => {
                    doc["_rev"] = Value::from(rev);
                    if let Some(disabled) = Disabled::read(&doc) {
                        self.book.index().disable(disabled);
                    }
                    tracing::error!(rule = %rule.id, %db, "the receiver answered 410 Gone: the rule is disabled until it is edited or enabled");
                    return;
                }
                Ok(WriteResult::Conflict) => {}
                Ok(WriteResult::Refused { reason }) => {
                    tracing::error!(rule = %rule.id, reason, "couchdb refused to write that the rule is disabled");
                    return;
                }
                Err(_) => return,
            }
        }
    }
}

/// What is written for a delivery that is owed, where its document says `was`; None where that says it already.
fn merged(was: Option<Parked>, owed: &Owed, now: SystemTime, next: impl Fn(Verdict, History) -> Next) -> Option<Parked> {
    let mut parked = match was {
        Some(was) if was.state == State::Parked => {
            // Whatever else the feed tells of is the state now: where a conflict was resolved its generation may be lower.
            let is_known = was.rev == owed.rev && *was.instance_start_time == *owed.instance_start_time;
            if owed.failed.is_none() && is_known {
                return None;
            }
            was
        }
        // What was given up was an older state; this one has its own time.
        ended => Parked {
            doc_rev: ended.as_ref().map(|ended| ended.doc_rev.clone()).unwrap_or_default(),
            state: State::Parked,
            rule: owed.rule.id.to_string(),
            db: owed.db.to_string(),
            doc_id: owed.doc_id.clone(),
            rev: String::new(),
            seq: Value::Null,
            instance_start_time: String::new(),
            attempts: 0,
            retries: owed.history.map_or(0, |history| history.retries),
            first_failed_at: owed.history.map_or(now, |history| history.first_failed_at),
            last_attempt_at: None,
            next_attempt_at: Some(now),
            last_status: None,
            last_error: String::new(),
            last_answer: String::new(),
            reason: None,
            ended_at: None,
            claimed_by: None,
            replays: ended.map_or(0, |ended| ended.replays),
        },
    };
    parked.rev = owed.rev.clone();
    parked.seq = owed.seq.to_json();
    parked.instance_start_time = owed.instance_start_time.to_string();
    match &owed.failed {
        Some(failed) => failed_again(&mut parked, failed, now, next),
        // A receiver that asked for a pause gets it.
        None if parked.claimed_by.is_none() && !matches!(parked.last_status, Some(429 | 503)) => {
            // What the receiver did not like may be mended by what is newer, but a document that changes all the time must
            // not be tried all the time.
            let history = History { retries: parked.retries.min(HURRIED_MAX), first_failed_at: now };
            if let Next::At(soon) = next(Verdict::Later, history) {
                parked.next_attempt_at = Some(parked.next_attempt_at.unwrap_or(now).min(soon));
            }
        }
        None => {}
    }
    Some(parked)
}

/// One more failure of a delivery that is parked, or is to be.
pub(super) fn failed_again(parked: &mut Parked, failed: &Failed, now: SystemTime, next: impl Fn(Verdict, History) -> Next) {
    parked.attempts = parked.attempts.saturating_add(failed.attempts);
    parked.last_attempt_at = Some(now);
    parked.last_error = failed.error.clone();
    parked.last_status = failed.answer.as_ref().map(|answer| answer.status);
    parked.last_answer = failed.answer.as_ref().map(|answer| answer.excerpt.clone()).unwrap_or_default();
    parked.claimed_by = None;
    let history = History { retries: parked.retries, first_failed_at: parked.first_failed_at };
    match next(failed.verdict, history) {
        Next::At(at) => parked.next_attempt_at = Some(at),
        Next::Dead { reason } => parked.end(State::Dead, reason, now),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::job::Answer;
    use serde_json::json;
    use std::time::Duration;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn owed(rev: &str, failed: Option<Verdict>) -> Owed {
        let rule = Rule::parse(&json!({ "_id": "r", "_rev": "1-r", "db_name": "db", "url": "http://h/" })).expect("a rule");
        let failed = failed.map(|verdict| Failed {
            error: "answered 500: no".into(),
            verdict,
            attempts: 3,
            answer: Some(Answer { status: 500, excerpt: "no".into() }),
        });
        Owed {
            rule: Arc::new(rule),
            db: "db".into(),
            instance_start_time: "17".into(),
            doc_id: "d".into(),
            rev: rev.into(),
            seq: Seq::from("5-x"),
            failed,
            history: None,
        }
    }

    /// Ten seconds after each failure, and never after a `GiveUp`.
    fn next(verdict: Verdict, _: History) -> Next {
        match verdict {
            Verdict::GiveUp => Next::Dead { reason: "no use".into() },
            _ => Next::At(at(110)),
        }
    }

    fn park(was: Option<Parked>, owed: &Owed) -> Option<Parked> {
        merged(was, owed, at(100), next)
    }

    const PLAIN: Verdict = Verdict::Retry { after: None };

    #[test]
    fn a_first_failure_says_what_happened() {
        let parked = park(None, &owed("2-b", Some(PLAIN))).expect("it is written");
        assert_eq!((parked.state, parked.attempts, parked.retries), (State::Parked, 3, 0));
        assert_eq!((parked.rev.as_str(), &parked.seq, parked.last_status), ("2-b", &json!("5-x"), Some(500)));
        assert_eq!((parked.next_attempt_at, parked.first_failed_at), (Some(at(110)), at(100)));
        let dead = park(None, &owed("2-b", Some(Verdict::GiveUp))).expect("it is written");
        assert_eq!((dead.state, dead.reason.as_deref(), dead.next_attempt_at), (State::Dead, Some("no use"), None));
    }

    #[test]
    fn a_newer_change_joins_and_a_repeat_changes_nothing() {
        let parked = park(None, &owed("2-b", Some(PLAIN))).expect("it is written");
        assert_eq!(park(Some(parked.clone()), &owed("2-b", None)), None, "a repeat");
        assert_eq!(park(Some(parked.clone()), &owed("1-a", None)).expect("a conflict was resolved").rev, "1-a");
        let newer = park(Some(parked.clone()), &owed("3-c", None)).expect("it is written");
        assert_eq!((newer.rev.as_str(), newer.attempts, newer.next_attempt_at), ("3-c", 3, Some(at(110))));
        let mut remade = owed("1-z", None);
        remade.instance_start_time = "18".into();
        assert_eq!(park(Some(parked), &remade).expect("another database's").rev, "1-z");
    }

    #[test]
    fn a_newer_change_comes_sooner_unless_a_try_is_under_way() {
        let parked = park(None, &owed("2-b", Some(PLAIN))).expect("it is written");
        let late = Parked { next_attempt_at: Some(at(9_999)), ..parked };
        assert_eq!(park(Some(late.clone()), &owed("3-c", None)).unwrap().next_attempt_at, Some(at(110)));
        let claimed = Parked { claimed_by: Some("me".into()), ..late };
        let joined = park(Some(claimed), &owed("3-c", None)).unwrap();
        assert_eq!((joined.next_attempt_at, joined.claimed_by.as_deref()), (Some(at(9_999)), Some("me")));
    }

    #[test]
    fn what_was_given_up_starts_anew_with_a_newer_failure() {
        let dead = park(None, &owed("2-b", Some(Verdict::GiveUp))).expect("it is written");
        let again = park(Some(Parked { doc_rev: "1-x".into(), ..dead }), &owed("3-c", Some(PLAIN))).expect("it is written");
        assert_eq!((again.state, again.attempts, again.doc_rev.as_str()), (State::Parked, 3, "1-x"));
        assert_eq!(again.reason, None);
    }
}
