//! JavaScript's grammar ▶ a tree.
//!
//! The old grammar, of patterns without the `u` flag, with the leniencies that browsers made law (Annex B of the standard): an
//! octal escape, a brace that counts nothing, a `\c` before no letter. Groups are counted first, because a back-reference may point
//! forward.

use super::set::{DIGITS, LINE_ENDS, SPACES, Set, WORDS};
use super::{NESTING_MAX, PatternError, units};
use std::collections::BTreeMap;
use std::iter::Peekable;
use std::ops::Range;
use std::str::Chars;
use std::sync::LazyLock;

#[derive(Debug)]
pub(super) enum Node {
    Empty,
    /// One unit of these.
    One(Set),
    Start,
    End,
    /// `\b`, or `\B` where false.
    Boundary(bool),
    All(Vec<Node>),
    Either(Vec<Node>),
    /// A group with its number.
    Group(usize, Box<Node>),
    /// To the first of these groups that took part; there is more than one only where a name stands in several alternatives.
    Reference(Vec<usize>),
    Look {
        ahead: bool,
        wanted: bool,
        body: Box<Node>,
    },
    Repeat {
        body: Box<Node>,
        least: u32,
        most: Option<u32>,
        greedy: bool,
        /// The numbers of the groups inside, which each round forgets.
        groups: Range<usize>,
    },
}

pub(super) struct Tree {
    pub(super) root: Node,
    /// Groups that have a number, the whole match (0) included.
    pub(super) groups: usize,
    /// True where it has look-around, back-references or `\B`, which the linear engine lacks.
    pub(super) needs_backtracking: bool,
}

pub(super) fn parse(source: &str) -> Result<Tree, PatternError> {
    let source = units::one_char_each(source);
    let mut parser = Parser {
        chars: source.chars().peekable(),
        groups: Groups::count(&source),
        groups_seen: 0,
        depth: 0,
        ignores_case: false,
        needs_backtracking: false,
        alternatives: Vec::new(),
        alternatives_seen: 0,
        named: Vec::new(),
    };
    let root = parser.alternatives()?;
    if parser.chars.next().is_some() {
        return syntax("unmatched )");
    }
    Ok(Tree { root, groups: parser.groups.count + 1, needs_backtracking: parser.needs_backtracking })
}

fn syntax<T>(reason: impl Into<String>) -> Result<T, PatternError> {
    Err(PatternError::Syntax(reason.into()))
}

/// Group numbers must be known before the first back-reference is read.
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
        if let Some((written, _)) = named.split_once('>').filter(|_| !named.starts_with(['=', '!'])) {
            self.count += 1;
            let name = name_of(written).unwrap_or_else(|| written.to_string());
            self.names.entry(name).or_default().push(self.count);
        }
    }
}

/// What the engines of JavaScript take for a name.
static NAME: LazyLock<Option<regex::Regex>> =
    LazyLock::new(|| regex::Regex::new(r"^[\p{ID_Start}$_][\p{ID_Continue}$\u200C\u200D]*$").ok());

/// A group's name as it was written between its angle brackets; escapes stand for characters.
fn name_of(written: &str) -> Option<String> {
    let mut name = String::new();
    let mut rest = written;
    while let Some((before, escape)) = rest.split_once("\\u") {
        name.push_str(before);
        let (code, after) = match escape.strip_prefix('{') {
            Some(braced) => braced.split_once('}')?,
            None => escape.split_at_checked(4)?,
        };
        let code = u32::from_str_radix(code, 16).ok()?;
        match u16::try_from(code) {
            Ok(unit) => name.push(units::char_of(unit)),
            Err(_) => name.push_str(&units::one_char_each(&char::from_u32(code)?.to_string())),
        }
        rest = after;
    }
    name.push_str(rest);
    let name = units::text_of(&name)?;
    NAME.as_ref()?.is_match(&name).then_some(name)
}

/// Which alternative of which choice; a group stands in one for each choice around it.
type Alternative = (usize, usize);

struct Parser<'s> {
    chars: Peekable<Chars<'s>>,
    groups: Groups,
    groups_seen: usize,
    depth: usize,
    ignores_case: bool,
    needs_backtracking: bool,
    alternatives: Vec<Alternative>,
    alternatives_seen: usize,
    /// The named groups so far, and where they stand.
    named: Vec<(String, Vec<Alternative>)>,
}

impl Parser<'_> {
    /// Up to the end or to the parenthesis that closes it.
    fn alternatives(&mut self) -> Result<Node, PatternError> {
        self.alternatives_seen += 1;
        self.alternatives.push((self.alternatives_seen, 0));
        let mut either = vec![self.sequence()?];
        while self.chars.next_if_eq(&'|').is_some() {
            if let Some((_, alternative)) = self.alternatives.last_mut() {
                *alternative += 1;
            }
            either.push(self.sequence()?);
        }
        self.alternatives.pop();
        Ok(match either.len() {
            1 => either.pop().unwrap_or(Node::Empty),
            _ => Node::Either(either),
        })
    }

    fn sequence(&mut self) -> Result<Node, PatternError> {
        let mut all = Vec::new();
        while self.chars.peek().is_some_and(|c| !matches!(c, '|' | ')')) {
            let groups_before = self.groups_seen;
            let (node, repeatable) = self.term()?;
            let node = self.repeated(node, repeatable, groups_before)?;
            all.push(node);
        }
        Ok(match all.len() {
            0 => Node::Empty,
            1 => all.pop().unwrap_or(Node::Empty),
            _ => Node::All(all),
        })
    }

    /// The next thing, and whether it may be repeated.
    fn term(&mut self) -> Result<(Node, bool), PatternError> {
        let Some(c) = self.chars.next() else { return Ok((Node::Empty, false)) };
        Ok(match c {
            '^' => (Node::Start, false),
            '$' => (Node::End, false),
            '(' => self.group()?,
            '[' => (self.class()?, true),
            '.' => (Node::One(LINE_ENDS.negated()), true),
            '\\' => self.escape()?,
            '*' | '+' | '?' => return syntax(format!("nothing to repeat before {c}")),
            '{' if self.braces()?.is_some() => return syntax("nothing to repeat before {"),
            other => (self.literal(other), true),
        })
    }

    fn repeated(&mut self, node: Node, repeatable: bool, groups_before: usize) -> Result<Node, PatternError> {
        let (least, most) = match self.chars.peek() {
            Some('*') => (0, None),
            Some('+') => (1, None),
            Some('?') => (0, Some(1)),
            Some('{') => {
                let before = self.chars.clone();
                self.chars.next();
                match self.braces()? {
                    Some(count) if repeatable => return Ok(self.repeat(node, count, groups_before)),
                    Some(_) => return syntax("nothing to repeat before {"),
                    None => self.chars = before,
                }
                return Ok(node);
            }
            _ => return Ok(node),
        };
        match (self.chars.next(), repeatable) {
            (Some(c), false) => syntax(format!("nothing to repeat before {c}")),
            _ => Ok(self.repeat(node, (least, most), groups_before)),
        }
    }

    fn repeat(&mut self, body: Node, (least, most): (u32, Option<u32>), groups_before: usize) -> Node {
        let greedy = self.chars.next_if_eq(&'?').is_none();
        let groups = groups_before + 1..self.groups_seen + 1;
        Node::Repeat { body: Box::new(body), least, most, greedy, groups }
    }

    /// `{2}`, `{2,}` or `{2,5}` after its brace, if it is one; any other brace stands for itself.
    fn braces(&mut self) -> Result<Option<(u32, Option<u32>)>, PatternError> {
        let mut ahead = self.chars.clone();
        let least = digits(&mut ahead);
        if least.is_empty() {
            return Ok(None);
        }
        let most = ahead.next_if_eq(&',').map(|_| digits(&mut ahead));
        if ahead.next() != Some('}') {
            return Ok(None);
        }
        // No text is as long as the largest number.
        let number = |digits: &str| digits.parse::<u32>().unwrap_or(u32::MAX);
        let least = number(&least);
        let most = match most.as_deref() {
            None => Some(least),
            Some("") => None,
            Some(most) => match number(most) {
                most if most < least => return syntax("a repetition's numbers are out of order"),
                most => Some(most),
            },
        };
        self.chars = ahead;
        Ok(Some((least, most)))
    }

    fn group(&mut self) -> Result<(Node, bool), PatternError> {
        if self.chars.next_if_eq(&'?').is_none() {
            return self.numbered_group();
        }
        match self.chars.next() {
            Some(':') => Ok((self.body()?, true)),
            Some('=') => self.look(true, true),
            Some('!') => self.look(true, false),
            Some('<') if self.chars.next_if_eq(&'=').is_some() => self.look(false, true),
            Some('<') if self.chars.next_if_eq(&'!').is_some() => self.look(false, false),
            Some('<') => self.named_group(),
            // The one modifier that is of use here; Node has it since version 23.
            Some('i') if self.chars.next_if_eq(&':').is_some() => {
                let outside = std::mem::replace(&mut self.ignores_case, true);
                let body = self.body()?;
                self.ignores_case = outside;
                Ok((body, true))
            }
            _ => syntax("a group starts with (? and something unknown"),
        }
    }

    /// Up to and with the parenthesis that closes it.
    fn body(&mut self) -> Result<Node, PatternError> {
        if self.depth >= NESTING_MAX {
            return Err(PatternError::TooLarge(format!("more than {NESTING_MAX} groups in each other")));
        }
        self.depth += 1;
        let body = self.alternatives()?;
        self.depth -= 1;
        match self.chars.next() {
            Some(_) => Ok(body),
            None => syntax("a group is not closed"),
        }
    }

    fn numbered_group(&mut self) -> Result<(Node, bool), PatternError> {
        self.groups_seen += 1;
        let number = self.groups_seen;
        Ok((Node::Group(number, Box::new(self.body()?)), true))
    }

    fn named_group(&mut self) -> Result<(Node, bool), PatternError> {
        let Some(written) = self.name() else { return syntax("a group's name is not closed") };
        let Some(name) = name_of(&written) else { return syntax("a group's name is not a name") };
        let here = self.alternatives.clone();
        let both_can_take_part = |there: &[Alternative]| !there.iter().zip(&here).any(|(a, b)| a.0 == b.0 && a.1 != b.1);
        if self.named.iter().any(|(other, there)| *other == name && both_can_take_part(there)) {
            return syntax("two groups have one name");
        }
        self.named.push((name, here));
        self.numbered_group()
    }

    /// JavaScript repeats no look-behind.
    fn look(&mut self, ahead: bool, wanted: bool) -> Result<(Node, bool), PatternError> {
        self.needs_backtracking = true;
        Ok((Node::Look { ahead, wanted, body: Box::new(self.body()?) }, ahead))
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
    fn escape(&mut self) -> Result<(Node, bool), PatternError> {
        let after_backslash = self.chars.clone();
        let Some(c) = self.chars.next() else { return syntax("a backslash at the end") };
        let node = match c {
            'b' => return Ok((Node::Boundary(true), false)),
            'B' => {
                self.needs_backtracking = true;
                return Ok((Node::Boundary(false), false));
            }
            'k' if !self.groups.names.is_empty() => self.named_reference()?,
            '1'..='9' => self.numbered_reference(c),
            'c' if !self.chars.peek().is_some_and(char::is_ascii_alphabetic) => {
                // The backslash stands for itself, and the `c` is read next.
                self.chars = after_backslash;
                self.literal('\\')
            }
            _ => match class_escape(c) {
                Some(set) => self.one(set),
                None => {
                    let c = self.character_escape(c);
                    self.literal(c)
                }
            },
        };
        Ok((node, true))
    }

    fn named_reference(&mut self) -> Result<Node, PatternError> {
        let name = self.chars.next_if_eq(&'<').and_then(|_| self.name()).and_then(|written| name_of(&written));
        match name.and_then(|name| self.groups.names.get(&name).cloned()) {
            Some(numbers) => Ok(self.reference(numbers)),
            None => syntax("\\k names no group"),
        }
    }

    /// A number beyond the last group is an old octal escape, or the digit itself.
    fn numbered_reference(&mut self, first: char) -> Node {
        let mut ahead = self.chars.clone();
        let number = format!("{first}{}", digits(&mut ahead)).parse::<usize>().unwrap_or(usize::MAX);
        if number <= self.groups.count {
            self.chars = ahead;
            return self.reference(vec![number]);
        }
        let c = self.octal(first).unwrap_or(first);
        self.literal(c)
    }

    fn reference(&mut self, numbers: Vec<usize>) -> Node {
        self.needs_backtracking = true;
        Node::Reference(numbers)
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

    fn character_escape(&mut self, c: char) -> char {
        match c {
            't' => '\t',
            'n' => '\n',
            'v' => '\u{0B}',
            'f' => '\u{0C}',
            'r' => '\r',
            '0' => self.octal('0').unwrap_or('\0'),
            'c' => self.chars.next().map_or('c', |letter| char::from(letter as u8 % 32)),
            'x' => self.hex(2).map_or('x', units::char_of),
            'u' => self.hex(4).map_or('u', units::char_of),
            other => other,
        }
    }

    fn hex(&mut self, length: usize) -> Option<u16> {
        let text: String = self.chars.clone().take(length).filter(char::is_ascii_hexdigit).collect();
        if text.len() != length {
            return None;
        }
        self.chars.by_ref().take(length).for_each(drop);
        u16::from_str_radix(&text, 16).ok()
    }

    fn class(&mut self) -> Result<Node, PatternError> {
        let negated = self.chars.next_if_eq(&'^').is_some();
        let mut set = Set::default();
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
                (ClassAtom::One(from), ClassAtom::One(to)) if from <= to => set.add(from, to),
                (ClassAtom::One(_), ClassAtom::One(_)) => return syntax("a range is out of order"),
                // `[\w-.]`: the hyphen stands for itself.
                (from, to) => {
                    from.add_to(&mut set);
                    set.add(unit('-'), unit('-'));
                    to.add_to(&mut set);
                }
            }
        }
        if self.ignores_case {
            set = set.in_any_case();
        }
        Ok(Node::One(if negated { set.negated() } else { set }))
    }

    fn class_next(&mut self) -> Result<char, PatternError> {
        self.chars.next().map_or_else(|| syntax("a class is not closed"), Ok)
    }

    fn class_atom(&mut self, c: char) -> Result<ClassAtom, PatternError> {
        if c != '\\' {
            return Ok(ClassAtom::One(unit(c)));
        }
        let after_backslash = self.chars.clone();
        let c = self.class_next()?;
        if let Some(set) = class_escape(c) {
            return Ok(ClassAtom::Many(set));
        }
        let letter_follows = self.chars.peek().is_some_and(|c| c.is_ascii_alphanumeric() || *c == '_');
        let found = match c {
            'b' => '\u{08}',
            '1'..='7' => self.octal(c).unwrap_or(c),
            'c' if !letter_follows => {
                self.chars = after_backslash;
                '\\'
            }
            'k' if !self.groups.names.is_empty() => return syntax("\\k in a class"),
            other => self.character_escape(other),
        };
        Ok(ClassAtom::One(unit(found)))
    }

    fn literal(&self, c: char) -> Node {
        self.one(Set::one(unit(c)))
    }

    fn one(&self, set: Set) -> Node {
        Node::One(if self.ignores_case { set.in_any_case() } else { set })
    }
}

fn unit(c: char) -> u16 {
    units::unit_of(c)
}

fn digits(chars: &mut Peekable<Chars<'_>>) -> String {
    let mut digits = String::new();
    while let Some(digit) = chars.next_if(char::is_ascii_digit) {
        digits.push(digit);
    }
    digits
}

fn class_escape(c: char) -> Option<Set> {
    match c {
        'd' => Some(DIGITS.clone()),
        'D' => Some(DIGITS.negated()),
        'w' => Some(WORDS.clone()),
        'W' => Some(WORDS.negated()),
        's' => Some(SPACES.clone()),
        'S' => Some(SPACES.negated()),
        _ => None,
    }
}

enum ClassAtom {
    One(u16),
    Many(Set),
}

impl ClassAtom {
    fn add_to(&self, set: &mut Set) {
        match self {
            Self::One(unit) => set.add(*unit, *unit),
            Self::Many(units) => units.ranges().iter().for_each(|(from, to)| set.add(*from, *to)),
        }
    }
}
