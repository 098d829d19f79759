//! What an answer means for its delivery (pure).
//!
//! | status | |
//! |---|---|
//! | 2xx | delivered, however the answer ends |
//! | 408, 429, 5xx | tried again soon, not before the `Retry-After` of the answer |
//! | 410 | nothing of this rule is wanted any more |
//! | every other | tried again later; where the rule says which (`retry_on`), the others are given up |
//!
//! Redirects are among the others: they are not followed, and somebody may yet take them away.

use crate::couch::retry_after;
use crate::job::Verdict;
use crate::rules::handling::Statuses;
use reqwest::StatusCode;
use reqwest::header::HeaderMap;
use std::time::{Duration, SystemTime};

/// A quota of a day is the longest that anybody means. One more year would be a slip, and hold the delivery as long.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(24 * 3_600);

pub fn of_answer(status: StatusCode, headers: &HeaderMap, retry_on: Option<&[Statuses]>, now: SystemTime) -> Result<(), Verdict> {
    Err(match status.as_u16() {
        200..=299 => return Ok(()),
        408 | 429 | 500..=599 => Verdict::Retry { after: retry_after(headers, now).map(|after| after.min(RETRY_AFTER_MAX)) },
        410 => Verdict::Gone,
        status if retry_on.is_none_or(|listed| listed.iter().any(|statuses| statuses.contains(status))) => Verdict::Later,
        _ => Verdict::GiveUp,
    })
}

/// For the metric of outcomes.
pub fn outcome_of(status: StatusCode) -> &'static str {
    match status.as_u16() {
        200..=299 => "delivered",
        429 => "throttled",
        410 => "gone",
        300..=399 => "redirected",
        400..=499 => "refused",
        _ => "server_error",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use reqwest::header::RETRY_AFTER;

    const DAY: u64 = 24 * 3_600;

    /// A Sunday, 08:49:37.
    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777)
    }

    fn of(status: u16, retry_after: Option<&str>, retry_on: Option<&[Statuses]>) -> Result<(), Verdict> {
        let mut headers = HeaderMap::new();
        if let Some(value) = retry_after {
            headers.insert(RETRY_AFTER, value.parse().unwrap());
        }
        of_answer(StatusCode::from_u16(status).unwrap(), &headers, retry_on, now())
    }

    #[test]
    fn each_status_has_its_verdict() {
        use Statuses::{Class, One};
        let soon = Err(Verdict::Retry { after: None });
        let (later, give_up, gone) = (Err(Verdict::Later), Err(Verdict::GiveUp), Err(Verdict::Gone));
        for (statuses, unsaid, listed_409_and_3xx, nothing_listed) in [
            (vec![200, 201, 202, 204, 226, 299], Ok(()), Ok(()), Ok(())),
            (vec![408, 429, 500, 502, 503, 504, 599], soon, soon, soon),
            (vec![410], gone, gone, gone),
            (vec![301, 302, 304, 307, 308, 399, 409], later, later, give_up),
            (vec![100, 101, 400, 401, 403, 404, 405, 413, 415, 422, 451, 499, 600, 999], later, give_up, give_up),
        ] {
            for status in statuses {
                assert_eq!(of(status, None, None), unsaid, "{status}");
                assert_eq!(of(status, None, Some(&[One(409), Class(3)])), listed_409_and_3xx, "{status}");
                assert_eq!(of(status, None, Some(&[])), nothing_listed, "{status}");
            }
        }
    }

    #[test]
    fn a_retry_after_is_taken_in_seconds_or_as_a_date_and_clamped() {
        for (value, seconds) in [
            ("0", Some(0)),
            ("7", Some(7)),
            (" 7 ", Some(7)),
            ("86400", Some(DAY)),
            ("86401", Some(DAY)),
            ("99999999999999999999999999", Some(DAY)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(0)),
            ("Sun, 06 Nov 1994 08:50:07 GMT", Some(30)),
            ("Sunday, 06-Nov-94 08:50:07 GMT", Some(30)),
            ("Sun Nov  6 08:50:07 1994", Some(30)),
            ("Fri, 31 Dec 9999 23:59:59 GMT", Some(DAY)),
            ("Sun, 06 Nov 1994 08:49:36 GMT", None),
            ("-1", None),
            ("1.5", None),
            ("soon", None),
            ("", None),
        ] {
            assert_eq!(of(429, Some(value), None), Err(Verdict::Retry { after: seconds.map(Duration::from_secs) }), "{value}");
        }
        assert_eq!(of(404, Some("7"), None), Err(Verdict::Later));
    }

    proptest! {
        #[test]
        fn no_answer_panics_or_holds_for_longer_than_a_day(status in 100u16..1000, value in "[ -~]{0,30}", listed in any::<bool>()) {
            let retry_on = listed.then_some([Statuses::Class(4)]);
            let verdict = of(status, Some(&value), retry_on.as_ref().map(<[_; 1]>::as_slice));
            if let Err(Verdict::Retry { after: Some(after) }) = verdict {
                prop_assert!(after <= RETRY_AFTER_MAX);
            }
            prop_assert_eq!(verdict.is_ok(), (200..300).contains(&status));
        }
    }
}
