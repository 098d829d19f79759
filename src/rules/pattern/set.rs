//! Sets of UTF-16 units.

use std::borrow::Cow;

type Units = (u16, u16);

/// JavaScript's white space and line ends (`\s`).
pub(super) const SPACES: Set = Set(Cow::Borrowed(&[
    (0x09, 0x0D),
    (0x20, 0x20),
    (0xA0, 0xA0),
    (0x1680, 0x1680),
    (0x2000, 0x200A),
    (0x2028, 0x2029),
    (0x202F, 0x202F),
    (0x205F, 0x205F),
    (0x3000, 0x3000),
    (0xFEFF, 0xFEFF),
]));
pub(super) const DIGITS: Set = Set(Cow::Borrowed(&[(0x30, 0x39)]));
pub(super) const WORDS: Set = Set(Cow::Borrowed(&[(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)]));
pub(super) const LINE_ENDS: Set = Set(Cow::Borrowed(&[(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)]));

/// Above it a set has its letters in both cases already, or nobody wrote it with case in mind.
const CASED_UNITS_MAX: u32 = 4096;

#[derive(Debug, Clone, Default)]
pub(super) struct Set(Cow<'static, [Units]>);

impl Set {
    pub(super) fn one(unit: u16) -> Self {
        Self(Cow::Owned(vec![(unit, unit)]))
    }

    pub(super) fn add(&mut self, from: u16, to: u16) {
        self.0.to_mut().push((from, to));
    }

    /// As they were added.
    pub(super) fn ranges(&self) -> &[Units] {
        &self.0
    }

    /// Ascending ranges that do not touch.
    pub(super) fn sorted(&self) -> Vec<Units> {
        let mut ranges = self.0.to_vec();
        ranges.sort_unstable();
        let mut apart: Vec<Units> = Vec::with_capacity(ranges.len());
        for (from, to) in ranges {
            match apart.last_mut() {
                Some(last) if u32::from(from) <= u32::from(last.1) + 1 => last.1 = last.1.max(to),
                _ => apart.push((from, to)),
            }
        }
        apart
    }

    pub(super) fn negated(&self) -> Self {
        let mut gaps = Vec::new();
        let mut next = Some(0);
        for (from, to) in self.sorted() {
            if let Some(next) = next.filter(|next| *next < from) {
                gaps.push((next, from - 1));
            }
            next = to.checked_add(1);
        }
        gaps.extend(next.map(|next| (next, u16::MAX)));
        Self(Cow::Owned(gaps))
    }

    /// With each letter's other cases: those that JavaScript writes as the same upper case.
    pub(super) fn in_any_case(&self) -> Self {
        let mut cased = self.clone();
        let sorted = self.sorted();
        if sorted.iter().map(|(from, to)| u32::from(to - from) + 1).sum::<u32>() > CASED_UNITS_MAX {
            return cased;
        }
        for c in sorted.into_iter().flat_map(|(from, to)| from..=to).filter_map(|unit| char::from_u32(unit.into())) {
            let upper = upper(c);
            let lower = one(upper.to_lowercase()).into_iter().chain(one(c.to_lowercase()));
            for other in lower.filter(|other| self::upper(*other) == upper).chain([upper]) {
                if let Ok(unit) = u16::try_from(u32::from(other)) {
                    cased.add(unit, unit);
                }
            }
        }
        cased
    }
}

/// JavaScript's: one character stays one, and no other becomes an ASCII one.
fn upper(c: char) -> char {
    match one(c.to_uppercase()) {
        Some(upper) if c.is_ascii() || !upper.is_ascii() => upper,
        _ => c,
    }
}

fn one(mut chars: impl Iterator<Item = char>) -> Option<char> {
    let first = chars.next();
    first.filter(|_| chars.next().is_none())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn a_set_and_its_negation_are_everything() {
        for set in [SPACES, DIGITS, WORDS, LINE_ENDS, Set::default(), Set::one(0), Set::one(u16::MAX)] {
            let mut all = set.negated();
            set.ranges().iter().for_each(|(from, to)| all.add(*from, *to));
            assert_eq!(all.sorted(), [(0, u16::MAX)]);
            assert_eq!(set.negated().negated().sorted(), set.sorted());
        }
    }

    #[test]
    fn case_is_javascripts() {
        let holds = |c: char, other: char| {
            let other = other as u16;
            Set::one(c as u16).in_any_case().sorted().iter().any(|(from, to)| (*from..=*to).contains(&other))
        };
        for (c, other, same) in
            [('k', 'K', true), ('K', 'k', true), ('k', '\u{212A}', false), ('é', 'É', true), ('ß', 'S', false)]
        {
            assert_eq!(holds(c, other), same, "{c} {other}");
        }
    }
}
