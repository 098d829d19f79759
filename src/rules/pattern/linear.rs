//! A tree ▶ the grammar of the `regex` crate, for a tree that it can match: in linear time, and many patterns at once.

use super::parse::Node;
use super::set::Set;
use super::units;
use std::fmt::Write;

pub(super) fn write(node: &Node) -> String {
    let mut text = String::new();
    write_to(&mut text, node);
    text
}

fn write_to(out: &mut String, node: &Node) {
    match node {
        // These two are for the other engine.
        Node::Empty | Node::Look { .. } | Node::Reference(_) => {}
        Node::One(set) => class(out, set),
        Node::Start => out.push_str("\\A"),
        Node::End => out.push_str("\\z"),
        Node::Boundary(true) => out.push_str(r"(?-u:\b)"),
        Node::Boundary(false) => out.push_str(r"(?-u:\B)"),
        Node::All(all) => all.iter().for_each(|node| write_to(out, node)),
        Node::Either(either) => {
            out.push_str("(?:");
            for (at, node) in either.iter().enumerate() {
                if at > 0 {
                    out.push('|');
                }
                write_to(out, node);
            }
            out.push(')');
        }
        // A match is all that is asked for.
        Node::Group(_, body) => grouped(out, body),
        Node::Repeat { body, least, most, greedy, .. } => {
            grouped(out, body);
            let _ = match (least, most) {
                (0, None) => write!(out, "*"),
                (1, None) => write!(out, "+"),
                (0, Some(1)) => write!(out, "?"),
                (least, None) => write!(out, "{{{least},}}"),
                (least, Some(most)) => write!(out, "{{{least},{most}}}"),
            };
            if !greedy {
                out.push('?');
            }
        }
    }
}

fn grouped(out: &mut String, body: &Node) {
    if let Node::One(_) = body {
        return write_to(out, body);
    }
    out.push_str("(?:");
    write_to(out, body);
    out.push(')');
}

fn class(out: &mut String, set: &Set) {
    let ranges = set.sorted();
    match ranges.as_slice() {
        [] => out.push_str(r"[^\x{0}-\x{10FFFF}]"),
        [(unit, to)] if unit == to && units::char_of(*unit).is_ascii_alphanumeric() => out.push(units::char_of(*unit)),
        ranges => {
            out.push('[');
            for (from, to) in ranges.iter().flat_map(|range| chars(*range)) {
                let _ = write!(out, "\\x{{{:X}}}-\\x{{{:X}}}", u32::from(from), u32::from(to));
            }
            out.push(']');
        }
    }
}

/// The halves of surrogate pairs stand elsewhere, so that a range around them is three.
fn chars((from, to): (u16, u16)) -> impl Iterator<Item = (char, char)> {
    let parts = [(0, 0xD7FF), (0xD800, 0xDFFF), (0xE000, u16::MAX)];
    let within = parts.into_iter().map(move |(first, last)| (from.max(first), to.min(last)));
    within.filter(|(from, to)| from <= to).map(|(from, to)| (units::char_of(from), units::char_of(to)))
}
