//! JavaScript's grammar ▶ the grammar of Rust's engines.
//!
//! Groups are counted first, because a back-reference may point forward; then one pass writes each construct anew with
//! JavaScript's meaning, and notes whether it needs an engine that can backtrack.

use super::{NESTING_MAX, PatternError};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::iter::Peekable;
use std::str::Chars;

type Range = (u32, u32);

/// JavaScript's white space and line ends (`\s`).
const SPACES: &[Range] = &[
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
];
const DIGITS: &[Range] = &[(0x30, 0x39)];
const WORDS: &[Range] = &[(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)];
const LINE_ENDS: &[Range] = &[(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)];
const CHAR_MAX: u32 = 0x10_FFFF;
const SURROGATE_FIRST: u32 = 0xD800;
const SURROGATE_LAST: u32 = 0xDFFF;

pub(super) struct Translated {
    pub(super) text: String,
    pub(super) needs_backtracking: bool,
}

pub(super) fn translate(source: &str) -> Result<Translated, PatternError> {
    let mut translator = Translator {
        chars: source.chars().peekable(),
        groups: Groups::count(source),
        out: String::with_capacity(source.len() * 2),
        open: Vec::new(),
        needs_backtracking: false,
        boundaries: Vec::new(),
    };
    translator.run()?;
    translator.finish()
}

/// Group numbers must be known before the first back-reference is read: a reference may point forward.
#[derive(Default)]
struct Groups {
    count: usize,
    names: BTreeMap<String, Vec<usize>>,
}

impl Groups {
    fn count(source: &str) -> Self {
        let mut groups = Self::default();
        let mut chars = source.chars();
        let mut in_class = false;
        while let Some(c) = chars.next() {
            match c {
                '\\' => drop(chars.next()),
                '[' => in_class = true,
                ']' => in_class = false,
                '(' if !in_class => groups.see(chars.as_str()),
                _ => {}
            }
        }
        groups
    }

    fn see(&mut self, after_parenthesis: &str) {
        if !after_parenthesis.starts_with('?') {
            self.count += 1;
            return;
        }
        let Some(named) = after_parenthesis.strip_prefix("?<") else { return };
        if let Some((name, _)) = named.split_once('>').filter(|_| !named.starts_with(['=', '!'])) {
            self.count += 1;
            self.names.entry(name.to_string()).or_default().push(self.count);
        }
    }
}

struct Translator<'s> {
    chars: Peekable<Chars<'s>>,
    groups: Groups,
    out: String,
    /// Whether each open group may be repeated once it is closed: JavaScript repeats no look-behind.
    open: Vec<bool>,
    needs_backtracking: bool,
    /// Where `\b` (true) and `\B` (false) were: each engine spells them in its own way, and which one it is shows at the end.
    boundaries: Vec<(usize, bool)>,
}

fn syntax<T>(reason: impl Into<String>) -> Result<T, PatternError> {
    Err(PatternError::Syntax(reason.into()))
}

impl Translator<'_> {
    fn run(&mut self) -> Result<(), PatternError> {
        // True where the last thing read may be repeated.
        let mut repeatable = false;
        while let Some(c) = self.chars.next() {
            repeatable = match c {
                '^' => self.write("\\A", false),
                '$' => self.write("\\z", false),
                '|' => self.write("|", false),
                '(' => self.group()?,
                ')' => {
                    let Some(group_is_repeatable) = self.open.pop() else { return syntax("unmatched )") };
                    self.write(")", group_is_repeatable)
                }
                '[' => self.class()?,
                '.' => self.ranges(LINE_ENDS, true),
                '\\' => self.escape()?,
                '*' | '+' | '?' => self.repeat(repeatable, &c.to_string())?,
                '{' => match self.braces()? {
                    Some(count) => self.repeat(repeatable, &count)?,
                    None => self.literal('{'),
                },
                other => self.literal(other),
            };
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Translated, PatternError> {
        if !self.open.is_empty() {
            return syntax("a group is not closed");
        }
        for (at, is_boundary) in self.boundaries.iter().rev() {
            let spelled = match (self.needs_backtracking, is_boundary) {
                (false, true) => r"(?-u:\b)",
                (true, true) => "(?:(?<=[0-9A-Z_a-z])(?![0-9A-Z_a-z])|(?<![0-9A-Z_a-z])(?=[0-9A-Z_a-z]))",
                (_, false) => "(?:(?<=[0-9A-Z_a-z])(?=[0-9A-Z_a-z])|(?<![0-9A-Z_a-z])(?![0-9A-Z_a-z]))",
            };
            self.out.insert_str(*at, spelled);
        }
        Ok(Translated { text: self.out, needs_backtracking: self.needs_backtracking })
    }

    /// Like all writing steps, says whether what was written may be repeated.
    fn write(&mut self, text: &str, repeatable: bool) -> bool {
        self.out.push_str(text);
        repeatable
    }

    fn repeat(&mut self, repeatable: bool, count: &str) -> Result<bool, PatternError> {
        if !repeatable {
            return syntax(format!("nothing to repeat before {count}"));
        }
        self.out.push_str(count);
        if self.chars.next_if_eq(&'?').is_some() {
            self.out.push('?');
        }
        Ok(false)
    }

    /// `{2}`, `{2,}` or `{2,5}` after its brace, if it is one; any other brace stands for itself.
    fn braces(&mut self) -> Result<Option<String>, PatternError> {
        let mut ahead = self.chars.clone();
        let least = digits(&mut ahead);
        if least.is_empty() {
            return Ok(None);
        }
        let most = ahead.next_if_eq(&',').map(|_| digits(&mut ahead));
        if ahead.next() != Some('}') {
            return Ok(None);
        }
        let number = |digits: &str| digits.parse::<u32>().map_err(|_| PatternError::TooLarge(String::from("a repetition")));
        let least = number(&least)?;
        let count = match most.as_deref() {
            None => format!("{{{least}}}"),
            Some("") => format!("{{{least},}}"),
            Some(most) => match number(most)? {
                most if most < least => return syntax("a repetition's numbers are out of order"),
                most => format!("{{{least},{most}}}"),
            },
        };
        self.chars = ahead;
        Ok(Some(count))
    }

    fn group(&mut self) -> Result<bool, PatternError> {
        if self.open.len() >= NESTING_MAX {
            return Err(PatternError::TooLarge(format!("more than {NESTING_MAX} groups in each other")));
        }
        if self.chars.next_if_eq(&'?').is_none() {
            return Ok(self.open_group("(", true));
        }
        match self.chars.next() {
            Some(':') => Ok(self.open_group("(?:", true)),
            Some('=') => Ok(self.open_look_around("(?=", true)),
            Some('!') => Ok(self.open_look_around("(?!", true)),
            Some('<') if self.chars.next_if_eq(&'=').is_some() => Ok(self.open_look_around("(?<=", false)),
            Some('<') if self.chars.next_if_eq(&'!').is_some() => Ok(self.open_look_around("(?<!", false)),
            Some('<') => self.named_group(),
            // The one modifier that is of use here; Node has it since version 23.
            Some('i') if self.chars.next_if_eq(&':').is_some() => Ok(self.open_group("(?i:", true)),
            _ => syntax("a group starts with (? and something unknown"),
        }
    }

    fn open_group(&mut self, text: &str, repeatable: bool) -> bool {
        self.open.push(repeatable);
        self.write(text, false)
    }

    fn open_look_around(&mut self, text: &str, repeatable: bool) -> bool {
        self.needs_backtracking = true;
        self.open_group(text, repeatable)
    }

    /// The name is checked and left out: a match is all that is asked for, and back-references go by number.
    fn named_group(&mut self) -> Result<bool, PatternError> {
        let Some(name) = self.name() else { return syntax("a group's name is not closed") };
        let starts_well = name.starts_with(|c: char| c.is_alphabetic() || c == '_' || c == '$');
        if !starts_well || !name.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '$') {
            return syntax("a group's name is not a name");
        }
        Ok(self.open_group("(", true))
    }

    /// Up to and with its `>`.
    fn name(&mut self) -> Option<String> {
        let mut name = String::new();
        loop {
            match self.chars.next()? {
                '>' => return Some(name),
                c => name.push(c),
            }
        }
    }

    /// What follows a backslash outside of a class.
    fn escape(&mut self) -> Result<bool, PatternError> {
        let Some(c) = self.chars.next() else { return syntax("a backslash at the end") };
        match c {
            'b' | 'B' => {
                // The linear engine has no ASCII `\B` over characters.
                self.needs_backtracking |= c == 'B';
                self.boundaries.push((self.out.len(), c == 'b'));
                Ok(false)
            }
            'k' if !self.groups.names.is_empty() => self.named_reference(),
            '1'..='9' => Ok(self.numbered_reference(c)),
            _ => Ok(match (class_escape(c), c) {
                (Some((set, negated)), _) => self.ranges(set, negated),
                (None, 'c') if !self.chars.peek().is_some_and(char::is_ascii_alphabetic) => {
                    self.literal('\\') & self.literal('c')
                }
                (None, _) => match self.character_escape(c) {
                    Some(c) => self.literal(c),
                    None => self.ranges(&[], false),
                },
            }),
        }
    }

    fn named_reference(&mut self) -> Result<bool, PatternError> {
        let name = match self.chars.next_if_eq(&'<') {
            Some(_) => self.name(),
            None => None,
        };
        match name.and_then(|name| self.groups.names.get(&name).cloned()) {
            Some(numbers) => Ok(self.references(&numbers)),
            None => syntax("\\k names no group"),
        }
    }

    /// A number beyond the last group is an old octal escape, or the digit itself.
    fn numbered_reference(&mut self, first: char) -> bool {
        let mut ahead = self.chars.clone();
        let number = format!("{first}{}", digits(&mut ahead)).parse::<usize>().unwrap_or(usize::MAX);
        if number <= self.groups.count {
            self.chars = ahead;
            return self.references(&[number]);
        }
        let c = self.octal(first).unwrap_or(first);
        self.literal(c)
    }

    /// JavaScript: a group that did not take part is empty, and so is a reference to it.
    fn references(&mut self, numbers: &[usize]) -> bool {
        self.needs_backtracking = true;
        self.out.push_str("(?:");
        for number in numbers {
            let _ = write!(self.out, "(?({number})\\{number})");
        }
        self.write(")", true)
    }

    fn octal(&mut self, first: char) -> Option<char> {
        let mut value = first.to_digit(8)?;
        for _ in 0..2 {
            let Some(digit) = self.chars.peek().and_then(|c| c.to_digit(8)).filter(|digit| value * 8 + digit <= 0o377) else {
                break;
            };
            value = value * 8 + digit;
            self.chars.next();
        }
        char::from_u32(value)
    }

    /// The character meant, or nothing for half of a surrogate pair: our texts have none.
    fn character_escape(&mut self, c: char) -> Option<char> {
        match c {
            't' => Some('\t'),
            'n' => Some('\n'),
            'v' => Some('\u{0B}'),
            'f' => Some('\u{0C}'),
            'r' => Some('\r'),
            '0' => self.octal('0'),
            'c' => self.chars.next().map(|letter| char::from(letter as u8 % 32)),
            'x' => self.hex(2).map_or(Some('x'), char::from_u32),
            'u' => match self.hex(4) {
                Some(unit) => self.utf16(unit),
                None => Some('u'),
            },
            other => Some(other),
        }
    }

    fn hex(&mut self, length: usize) -> Option<u32> {
        let text: String = self.chars.clone().take(length).filter(char::is_ascii_hexdigit).collect();
        if text.len() != length {
            return None;
        }
        self.chars.by_ref().take(length).for_each(drop);
        u32::from_str_radix(&text, 16).ok()
    }

    /// Two escapes that make a surrogate pair are one character.
    fn utf16(&mut self, unit: u32) -> Option<char> {
        let before = self.chars.clone();
        if (0xD800..0xDC00).contains(&unit)
            && self.chars.next() == Some('\\')
            && self.chars.next() == Some('u')
            && let Some(low) = self.hex(4).filter(|low| (0xDC00..0xE000).contains(low))
        {
            return char::from_u32(0x1_0000 + ((unit - 0xD800) << 10) + (low - 0xDC00));
        }
        self.chars = before;
        char::from_u32(unit)
    }

    fn class(&mut self) -> Result<bool, PatternError> {
        let negated = self.chars.next_if_eq(&'^').is_some();
        let mut set: Vec<Range> = Vec::new();
        loop {
            let from = match self.class_next()? {
                ']' => break,
                c => self.class_atom(c)?,
            };
            let mut ahead = self.chars.clone();
            let is_range = ahead.next() == Some('-') && ahead.next().is_some_and(|c| c != ']');
            if !is_range {
                from.add_to(&mut set);
                continue;
            }
            self.chars.next();
            let c = self.class_next()?;
            match (from, self.class_atom(c)?) {
                (ClassAtom::One(from), ClassAtom::One(to)) if from <= to => set.push((from, to)),
                (ClassAtom::One(_), ClassAtom::One(_)) => return syntax("a range is out of order"),
                // `[\w-.]`: the hyphen stands for itself.
                (from, to) => {
                    from.add_to(&mut set);
                    set.push((u32::from('-'), u32::from('-')));
                    to.add_to(&mut set);
                }
            }
        }
        Ok(self.ranges(&set, negated))
    }

    fn class_next(&mut self) -> Result<char, PatternError> {
        self.chars.next().map_or_else(|| syntax("a class is not closed"), Ok)
    }

    fn class_atom(&mut self, c: char) -> Result<ClassAtom, PatternError> {
        if c != '\\' {
            return Ok(ClassAtom::One(u32::from(c)));
        }
        let c = self.class_next()?;
        if let Some((set, negated)) = class_escape(c) {
            return Ok(ClassAtom::Set(set, negated));
        }
        let letter_follows = self.chars.peek().is_some_and(|c| c.is_ascii_alphanumeric() || *c == '_');
        let found = match c {
            'b' => Some('\u{08}'),
            '1'..='7' => self.octal(c),
            // The backslash stands for itself, and so does the `c` that is read next.
            'c' if !letter_follows => return Ok(ClassAtom::BackslashC),
            other => self.character_escape(other),
        };
        Ok(found.map_or(ClassAtom::Set(&[], false), |c| ClassAtom::One(u32::from(c))))
    }

    fn literal(&mut self, c: char) -> bool {
        match c.is_ascii_alphanumeric() || !c.is_ascii() {
            true => self.out.push(c),
            false => drop(write!(self.out, "\\x{{{:X}}}", u32::from(c))),
        }
        true
    }

    fn ranges(&mut self, set: &[Range], negated: bool) -> bool {
        let set: Vec<Range> = set.iter().flat_map(|range| without_surrogates(*range)).collect();
        // Nothing and everything, which the engines do not spell as JavaScript does.
        let everything = [(0, SURROGATE_FIRST - 1), (SURROGATE_LAST + 1, CHAR_MAX)];
        let (set, negated) = match set.is_empty() {
            true => (&everything[..], !negated),
            false => (&set[..], negated),
        };
        self.out.push_str(if negated { "[^" } else { "[" });
        for (from, to) in set {
            let _ = write!(self.out, "\\x{{{from:X}}}-\\x{{{to:X}}}");
        }
        self.write("]", true)
    }
}

fn digits(chars: &mut Peekable<Chars<'_>>) -> String {
    let mut digits = String::new();
    while let Some(digit) = chars.next_if(char::is_ascii_digit) {
        digits.push(digit);
    }
    digits
}

fn class_escape(c: char) -> Option<(&'static [Range], bool)> {
    match c {
        'd' => Some((DIGITS, false)),
        'D' => Some((DIGITS, true)),
        'w' => Some((WORDS, false)),
        'W' => Some((WORDS, true)),
        's' => Some((SPACES, false)),
        'S' => Some((SPACES, true)),
        _ => None,
    }
}

enum ClassAtom {
    One(u32),
    Set(&'static [Range], bool),
    BackslashC,
}

impl ClassAtom {
    fn add_to(&self, set: &mut Vec<Range>) {
        match self {
            ClassAtom::One(c) => set.push((*c, *c)),
            ClassAtom::Set(members, false) => set.extend_from_slice(members),
            ClassAtom::Set([], true) => {}
            ClassAtom::Set(members, true) => set.extend(complement(members)),
            ClassAtom::BackslashC => set.extend([(0x5C, 0x5C), (0x63, 0x63)]),
        }
    }
}

/// Of ascending ranges that do not touch.
fn complement(members: &[Range]) -> Vec<Range> {
    let mut gaps = Vec::with_capacity(members.len() + 1);
    let mut next = 0;
    for (from, to) in members {
        if next < *from {
            gaps.push((next, from - 1));
        }
        next = to + 1;
    }
    gaps.push((next, CHAR_MAX));
    gaps
}

/// Both ends of a range must be characters: the surrogates are none.
fn without_surrogates((from, to): Range) -> impl Iterator<Item = Range> {
    let below = (from, to.min(SURROGATE_FIRST - 1));
    let above = (from.max(SURROGATE_LAST + 1), to);
    [below, above].into_iter().filter(|(from, to)| from <= to)
}
