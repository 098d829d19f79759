//! Whether a position that is remembered may be used, by what a run has just read. Pure.

use super::checkpoint::Checkpoint;
use super::slots::Position;
use crate::couch::Seq;

/// What the source answered to "what comes after this position?".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    Some,
    None,
    /// It has fewer updates than the position says: it was put back from an older copy, perhaps since the last checkpoint. On a
    /// cluster the numbers differ by node, and then a comparison is made for nothing.
    WentBack,
    /// It does not know the position any more: the checkpoints may have one that it does.
    UnknownSeq,
    /// Nothing that tells of the position.
    Failed,
}

impl News {
    pub fn of_page(since: &Seq, last_seq: &Seq, is_empty: bool) -> Self {
        match is_empty {
            _ if last_seq.number() < since.number() => News::WentBack,
            true => News::None,
            false => News::Some,
        }
    }
}

#[derive(Debug, Clone, Copy)]
pub enum AtSource<'a> {
    /// A look at it before its next checkpoint is enough, if nothing else is odd.
    NotAsked,
    Says(Option<&'a Checkpoint>),
}

/// Both sides must tell of the session that was confirmed last. Somebody said that there is news: a source that was not asked
/// for its checkpoint and has none may have gone back, too.
pub fn stands(known: &Position, news: News, at_source: AtSource<'_>, at_target: Option<&Checkpoint>) -> bool {
    let holds_at_source = match at_source {
        AtSource::NotAsked => news == News::Some,
        AtSource::Says(checkpoint) => known.anchor.holds_at_source(checkpoint),
    };
    let is_of_this_source = !matches!(news, News::WentBack | News::UnknownSeq);
    holds_at_source && is_of_this_source && known.anchor.holds_at_target(at_target)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::super::slots::{Anchor, SourceBehind};
    use super::*;

    #[test]
    fn a_page_tells_whether_the_source_went_back() {
        let seq = |text: &str| Seq::Text(text.into());
        for (since, last, is_empty, expected) in [
            (seq("7-a"), seq("9-b"), false, News::Some),
            (seq("7-a"), seq("7-c"), true, News::None),
            (seq("7-a"), seq("6-a"), true, News::WentBack),
            (seq("7-a"), seq("6-a"), false, News::WentBack),
            (seq("7-a"), seq("no number"), false, News::WentBack),
            (seq("no number"), seq("6-a"), false, News::Some),
            (Seq::Number(7), Seq::Number(8), false, News::Some),
            (Seq::Number(7), Seq::Number(6), true, News::WentBack),
        ] {
            assert_eq!(News::of_page(&since, &last, is_empty), expected, "{since:?} {last:?}");
        }
    }

    #[test]
    fn a_position_stands_where_both_sides_tell_of_its_session() {
        let session = |id: &str| Checkpoint { session_id: Some(id.into()), ..Checkpoint::default() };
        let (same, other, none) = (session("s"), session("other"), Checkpoint::default());
        let position = |is_target_only: bool| Position {
            since: Seq::zero(),
            anchor: Anchor { at_target: "s".into(), at_source: (!is_target_only).then(|| "s".into()) },
            has_new_documents: false,
            overlap: None,
            source_behind: SourceBehind::unknown(),
            epoch: 0,
        };
        let says = |checkpoint| AtSource::Says(Some(checkpoint));
        for (news, at_source, at_target, expected) in [
            (News::Some, AtSource::NotAsked, Some(&same), true),
            (News::None, AtSource::NotAsked, Some(&same), false),
            (News::Failed, AtSource::NotAsked, Some(&same), false),
            (News::WentBack, AtSource::NotAsked, Some(&same), false),
            (News::Some, AtSource::NotAsked, Some(&other), false),
            (News::Some, AtSource::NotAsked, None, false),
            (News::Some, says(&same), Some(&same), true),
            (News::None, says(&same), Some(&same), true),
            // The run fails, and the next one may go on from there.
            (News::Failed, says(&same), Some(&same), true),
            (News::WentBack, says(&same), Some(&same), false),
            (News::UnknownSeq, says(&same), Some(&same), false),
            (News::Some, says(&other), Some(&same), false),
            (News::Some, says(&none), Some(&same), false),
            (News::Some, AtSource::Says(None), Some(&same), false),
            (News::Some, says(&same), Some(&other), false),
            (News::Some, says(&same), Some(&none), false),
            (News::Some, says(&same), None, false),
            (News::Some, says(&other), Some(&other), false),
        ] {
            let found = stands(&position(false), news, at_source, at_target);
            assert_eq!(found, expected, "{news:?} {at_source:?} {at_target:?}");
        }
        for (news, at_source, at_target, expected) in [
            (News::None, AtSource::Says(None), Some(&same), true),
            (News::None, says(&other), Some(&same), true),
            (News::WentBack, AtSource::Says(None), Some(&same), false),
            (News::None, AtSource::Says(None), Some(&other), false),
        ] {
            let found = stands(&position(true), news, at_source, at_target);
            assert_eq!(found, expected, "the target's alone: {news:?} {at_source:?} {at_target:?}");
        }
    }
}
