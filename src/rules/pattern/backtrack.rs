//! The engine for look-around and back-references: JavaScript's own way of matching, with a bound on its effort.
//!
//! A tree becomes a program; the machine runs it with a stack of its own, which holds the choices that are left and what to put back
//! when one of them is taken. So a long text costs neither recursion nor an unbounded time. Inside a look-behind the program runs
//! backwards through the text, as the standard says, and each round of a repetition forgets the groups inside it.

use super::parse::{Node, Tree};
use std::ops::Range;

/// A few milliseconds.
const STEPS_MAX: usize = 500_000;
/// Units that are compared in about the time of a step.
const COMPARED_A_STEP: usize = 64;
/// Choices and what to put back, 24 bytes each.
const STACK_MAX: usize = 250_000;
const NONE: usize = usize::MAX;

#[derive(Debug)]
pub(super) struct Program {
    steps: Vec<Step>,
    groups: usize,
    /// Of groups: begin and end of each, then where each was entered. Of repetitions: rounds and where the round began.
    registers: usize,
    at_start_only: bool,
}

/// The engine gave up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooMuchEffort;

#[derive(Debug)]
enum Step {
    One(Vec<(u16, u16)>, Way),
    Start,
    End,
    Boundary(bool),
    Jump(usize),
    /// The next step first, this one if that fails.
    OrElse(usize),
    Enter(usize),
    Leave(usize, Way),
    Reference(Vec<usize>, Way),
    /// The body follows and ends with `Done`.
    Look {
        wanted: bool,
        after: usize,
    },
    Begin(Loop),
    /// Another round, which is the next step, or on to `after`.
    Round {
        repeat: Loop,
        least: u32,
        most: Option<u32>,
        greedy: bool,
        after: usize,
    },
    Into(Loop, Range<usize>),
    Next {
        repeat: Loop,
        least: u32,
        round: usize,
        has_groups: bool,
    },
    Done,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Ahead,
    Back,
}

/// A repetition's two registers.
#[derive(Debug, Clone, Copy)]
struct Loop {
    rounds: usize,
    began: usize,
}

impl Program {
    pub(super) fn new(tree: &Tree) -> Self {
        let mut compiler = Compiler { steps: Vec::new(), groups: tree.groups, registers: tree.groups * 3 };
        compiler.add(&tree.root, Way::Ahead);
        compiler.steps.push(Step::Done);
        Self {
            steps: compiler.steps,
            groups: tree.groups,
            registers: compiler.registers,
            at_start_only: is_at_start_only(&tree.root),
        }
    }

    pub(super) fn is_match(&self, text: &str) -> Result<bool, TooMuchEffort> {
        let text: Vec<u16> = text.encode_utf16().collect();
        let mut machine = Machine {
            program: self,
            text: &text,
            registers: vec![NONE; self.registers],
            stack: Vec::new(),
            steps_left: STEPS_MAX,
        };
        let last_start = if self.at_start_only { 0 } else { text.len() };
        for start in 0..=last_start {
            // A failure has put everything back.
            if machine.run(0, start)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn is_at_start_only(node: &Node) -> bool {
    match node {
        Node::Start => true,
        Node::Group(_, body) => is_at_start_only(body),
        Node::All(all) => all.first().is_some_and(is_at_start_only),
        Node::Either(either) => either.iter().all(is_at_start_only),
        _ => false,
    }
}

struct Compiler {
    steps: Vec<Step>,
    groups: usize,
    registers: usize,
}

impl Compiler {
    fn add(&mut self, node: &Node, way: Way) {
        match node {
            Node::Empty => {}
            Node::One(set) => self.steps.push(Step::One(set.sorted(), way)),
            Node::Start => self.steps.push(Step::Start),
            Node::End => self.steps.push(Step::End),
            Node::Boundary(wanted) => self.steps.push(Step::Boundary(*wanted)),
            Node::All(all) if way == Way::Ahead => all.iter().for_each(|node| self.add(node, way)),
            Node::All(all) => all.iter().rev().for_each(|node| self.add(node, way)),
            Node::Either(either) => self.add_either(either, way),
            Node::Group(number, body) => {
                self.steps.push(Step::Enter(self.groups * 2 + number));
                self.add(body, way);
                self.steps.push(Step::Leave(*number, way));
            }
            Node::Reference(numbers) => self.steps.push(Step::Reference(numbers.clone(), way)),
            Node::Look { ahead, wanted, body } => {
                let look = self.hole();
                self.add(body, if *ahead { Way::Ahead } else { Way::Back });
                self.steps.push(Step::Done);
                self.fill(look, Step::Look { wanted: *wanted, after: self.steps.len() });
            }
            Node::Repeat { body, least, most, greedy, groups } => {
                let repeat = Loop { rounds: self.registers, began: self.registers + 1 };
                self.registers += 2;
                self.steps.push(Step::Begin(repeat));
                let round = self.hole();
                self.steps.push(Step::Into(repeat, groups.clone()));
                self.add(body, way);
                self.steps.push(Step::Next { repeat, least: *least, round, has_groups: !groups.is_empty() });
                let after = self.steps.len();
                self.fill(round, Step::Round { repeat, least: *least, most: *most, greedy: *greedy, after });
            }
        }
    }

    fn add_either(&mut self, either: &[Node], way: Way) {
        let mut jumps = Vec::new();
        for (at, node) in either.iter().enumerate() {
            if at + 1 == either.len() {
                self.add(node, way);
                break;
            }
            let or_else = self.hole();
            self.add(node, way);
            jumps.push(self.hole());
            self.fill(or_else, Step::OrElse(self.steps.len()));
        }
        jumps.into_iter().for_each(|jump| self.fill(jump, Step::Jump(self.steps.len())));
    }

    fn hole(&mut self) -> usize {
        self.steps.push(Step::Done);
        self.steps.len() - 1
    }

    fn fill(&mut self, hole: usize, step: Step) {
        if let Some(place) = self.steps.get_mut(hole) {
            *place = step;
        }
    }
}

enum Saved {
    Choice { step: usize, at: usize },
    Register { register: usize, value: usize },
}

struct Machine<'p> {
    program: &'p Program,
    text: &'p [u16],
    registers: Vec<usize>,
    stack: Vec<Saved>,
    steps_left: usize,
}

/// What one step came to: go on there, or try another choice.
type Outcome = Option<(usize, usize)>;

impl Machine<'_> {
    /// Where the match ends, if there is one. What it has set stays set and can still be put back; its choices are gone.
    fn run(&mut self, step: usize, at: usize) -> Result<Option<usize>, TooMuchEffort> {
        let floor = self.stack.len();
        let (mut step, mut at) = (step, at);
        loop {
            self.spend(1)?;
            if self.stack.len() > STACK_MAX {
                return Err(TooMuchEffort);
            }
            if matches!(self.program.steps[step], Step::Done) {
                self.forget_choices(floor);
                return Ok(Some(at));
            }
            match self.take(step, at)? {
                Some(next) => (step, at) = next,
                None => match self.other_choice(floor) {
                    Some(next) => (step, at) = next,
                    None => return Ok(None),
                },
            }
        }
    }

    fn take(&mut self, step: usize, at: usize) -> Result<Outcome, TooMuchEffort> {
        let program = self.program;
        let next = step + 1;
        Ok(match &program.steps[step] {
            Step::One(set, way) => self.one(set, *way, at).map(|at| (next, at)),
            Step::Start => (at == 0).then_some((next, at)),
            Step::End => (at == self.text.len()).then_some((next, at)),
            Step::Boundary(wanted) => (self.is_boundary(at) == *wanted).then_some((next, at)),
            Step::Jump(to) => Some((*to, at)),
            Step::OrElse(other) => {
                self.stack.push(Saved::Choice { step: *other, at });
                Some((next, at))
            }
            Step::Enter(register) => {
                self.set(*register, at);
                Some((next, at))
            }
            Step::Leave(number, way) => {
                self.leave(*number, *way, at);
                Some((next, at))
            }
            Step::Reference(numbers, way) => self.reference(numbers, *way, at)?.map(|at| (next, at)),
            Step::Look { wanted, after } => {
                let floor = self.stack.len();
                let found = self.run(next, at)?.is_some();
                if found && !wanted {
                    self.put_back(floor);
                }
                (found == *wanted).then_some((*after, at))
            }
            Step::Begin(repeat) => {
                self.set(repeat.rounds, 0);
                Some((next, at))
            }
            Step::Round { repeat, least, most, greedy, after } => {
                let rounds = self.registers[repeat.rounds];
                if rounds < *least as usize {
                    return Ok(Some((next, at)));
                }
                if most.is_some_and(|most| rounds >= most as usize) {
                    return Ok(Some((*after, at)));
                }
                let (first, other) = if *greedy { (next, *after) } else { (*after, next) };
                self.stack.push(Saved::Choice { step: other, at });
                Some((first, at))
            }
            Step::Into(repeat, groups) => {
                self.spend(groups.len())?;
                self.set(repeat.began, at);
                for group in groups.clone() {
                    self.set(group * 2, NONE);
                    self.set(group * 2 + 1, NONE);
                }
                Some((next, at))
            }
            Step::Next { repeat, least, round, has_groups } => {
                let (rounds, least) = (self.registers[repeat.rounds], *least as usize);
                let took_nothing = self.registers[repeat.began] == at;
                // A round beyond the least that took nothing could go on for ever.
                if took_nothing && rounds >= least {
                    return Ok(None);
                }
                // The rounds that are still due can take nothing as this one did.
                let rounds = if took_nothing && !has_groups { least } else { rounds + 1 };
                self.set(repeat.rounds, rounds);
                Some((*round, at))
            }
            Step::Done => None,
        })
    }

    fn one(&self, set: &[(u16, u16)], way: Way, at: usize) -> Option<usize> {
        let before = if way == Way::Ahead { at } else { at.checked_sub(1)? };
        let unit = *self.text.get(before)?;
        let place = set.partition_point(|(_, to)| *to < unit);
        let found = set.get(place).is_some_and(|(from, _)| *from <= unit);
        found.then_some(if way == Way::Ahead { at + 1 } else { before })
    }

    fn is_boundary(&self, at: usize) -> bool {
        let is_word = |at: Option<usize>| {
            let unit = at.and_then(|at| self.text.get(at)).and_then(|unit| u8::try_from(*unit).ok());
            unit.is_some_and(|unit| unit.is_ascii_alphanumeric() || unit == b'_')
        };
        is_word(at.checked_sub(1)) != is_word(Some(at))
    }

    /// Both ends at once: a reference inside the group still sees what it was before.
    fn leave(&mut self, number: usize, way: Way, at: usize) {
        let entered = self.registers[self.program.groups * 2 + number];
        let (begin, end) = if way == Way::Ahead { (entered, at) } else { (at, entered) };
        self.set(number * 2, begin);
        self.set(number * 2 + 1, end);
    }

    /// A group that did not take part is empty, and so is a reference to it.
    fn reference(&mut self, numbers: &[usize], way: Way, at: usize) -> Result<Option<usize>, TooMuchEffort> {
        let group = |number: &usize| (self.registers[number * 2], self.registers[number * 2 + 1]);
        let Some((begin, end)) = numbers.iter().map(group).find(|(begin, _)| *begin != NONE) else { return Ok(Some(at)) };
        let length = end - begin;
        self.spend(length / COMPARED_A_STEP)?;
        let (from, next) = match way {
            Way::Ahead => (Some(at), at + length),
            Way::Back => (at.checked_sub(length), at.saturating_sub(length)),
        };
        let there = from.and_then(|from| self.text.get(from..from + length));
        Ok((there == self.text.get(begin..end)).then_some(next))
    }

    fn spend(&mut self, steps: usize) -> Result<(), TooMuchEffort> {
        self.steps_left = self.steps_left.checked_sub(steps).ok_or(TooMuchEffort)?;
        Ok(())
    }

    fn set(&mut self, register: usize, value: usize) {
        let before = std::mem::replace(&mut self.registers[register], value);
        self.stack.push(Saved::Register { register, value: before });
    }

    fn put_back(&mut self, floor: usize) {
        while self.stack.len() > floor {
            if let Some(Saved::Register { register, value }) = self.stack.pop() {
                self.registers[register] = value;
            }
        }
    }

    fn other_choice(&mut self, floor: usize) -> Outcome {
        while self.stack.len() > floor {
            match self.stack.pop()? {
                Saved::Choice { step, at } => return Some((step, at)),
                Saved::Register { register, value } => self.registers[register] = value,
            }
        }
        None
    }

    fn forget_choices(&mut self, floor: usize) {
        let done = self.stack.split_off(floor);
        self.stack.extend(done.into_iter().filter(|saved| matches!(saved, Saved::Register { .. })));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::super::parse::parse;
    use super::*;

    /// Each would take a naive engine longer than anybody waits.
    #[test]
    fn the_effort_is_bounded_whatever_the_pattern() {
        let groups = "()".repeat(4000);
        let long = "a".repeat(30_000);
        for (source, text) in [
            (r"^(a+)+\1b".to_string(), "a".repeat(60)),
            (r"(?=(a*)*b)".to_string(), long.clone()),
            (r"^(?:a?){50}(?=x)a{50}".to_string(), "a".repeat(50)),
            (r"(a*)(a*)(a*)\1\2\3b".to_string(), long.clone()),
            (r"(?<=(a*)*)b".to_string(), long.clone()),
            (format!("(?=x?)(?:y{groups}|a)*b"), long.clone()),
            (r"(?=(?:a|a)*b)".to_string(), long.clone()),
        ] {
            let program = Program::new(&parse(&source).unwrap());
            let answer = program.is_match(&text);
            assert!(answer != Ok(true), "{source:.30}");
        }
    }

    #[test]
    fn a_failure_puts_everything_back() {
        let program = Program::new(&parse(r"(?:(a)(b)|(?=(a))a(?!(c))|x)*(y)\1").unwrap());
        let text: Vec<u16> = "abacabab".encode_utf16().collect();
        let mut machine = Machine {
            program: &program,
            text: &text,
            registers: vec![NONE; program.registers],
            stack: Vec::new(),
            steps_left: STEPS_MAX,
        };
        for start in 0..text.len() {
            assert_eq!(machine.run(0, start), Ok(None));
            assert!(machine.stack.is_empty() && machine.registers.iter().all(|register| *register == NONE));
        }
    }
}
