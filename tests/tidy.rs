//! The shape of the source, kept by a test: which way the arrows go, and how long a file may get.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The path of a change. A stage names only what stands further down: those were started before it. Stages of one group share
/// their words, and the pools of `replicate` and `webhook` are built on the dispatcher of `schedule`.
const PATH: [&[&str]; 6] =
    [&["feed"], &["workers"], &["db"], &["rules", "topology", "deliveries"], &["replicate", "webhook"], &["schedule"]];
/// Names no stage.
const GROUND: [&str; 9] = ["admin", "checkpoints", "config", "couch", "dev", "job", "locks", "telemetry", "vault"];
/// Above the path; nobody names them but `main`, and `cmd` names `app`.
const TOP: [&str; 2] = ["cmd", "app"];

/// Arrows that go the other way, each with its reason: (file, module that it names, why).
const EXCEPTIONS: [(&str, &str, &str); 5] = [
    ("webhook/batch.rs", "rules", "how many go together is a value of the rule"),
    ("webhook/delivery.rs", "rules", "a delivery is a rule applied to a change; all are values, and no message goes back"),
    ("webhook/request.rs", "rules", "a request is a filled template; both are values, and no message goes back"),
    ("webhook/verdict.rs", "rules", "the statuses that a rule lists are a value"),
    ("checkpoints.rs", "schedule", "how long to wait before the next try is decided in one place only"),
];

/// Without tests, that is about what one reads in a sitting.
const LINES_MAX: usize = 600;
/// Longer ones, each with its reason.
const LONG_FILES: [(&str, &str); 0] = [];

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Path below `src/` and text, without what only tests see.
fn files() -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut directories = vec![source()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("tests.rs") {
                let name = path.strip_prefix(source()).unwrap().to_str().unwrap().replace('\\', "/");
                let text = std::fs::read_to_string(&path).unwrap();
                files.push((name, without_tests(&text)));
            }
        }
    }
    files.sort();
    files
}

/// A test module stands at the end of its file.
fn without_tests(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let tests = lines
        .windows(2)
        .position(|pair| pair[0].starts_with("#[cfg(test)]") && (pair[1].starts_with("mod ") || pair[1].starts_with("#[allow")));
    lines[..tests.unwrap_or(lines.len())].join("\n")
}

/// `feed/sweep.rs` ▶ `feed`.
fn module_of(file: &str) -> &str {
    file.split('/').next().unwrap().trim_end_matches(".rs")
}

/// The modules of this crate that a text names, outside of comments.
fn named(text: &str) -> BTreeSet<String> {
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let names = code.flat_map(|line| line.split("crate::").skip(1).flat_map(first_names).collect::<Vec<_>>());
    names.filter(|name| !name.is_empty()).collect()
}

/// What follows `crate::`: one name, or several in braces.
fn first_names(rest: &str) -> Vec<String> {
    let name = |text: &str| text.trim().chars().take_while(|c| c.is_ascii_lowercase() || *c == '_').collect::<String>();
    match rest.strip_prefix('{') {
        Some(list) => list.split(',').map(name).collect(),
        None => vec![name(rest)],
    }
}

fn rank(module: &str) -> Option<usize> {
    PATH.iter().position(|group| group.contains(&module))
}

/// Why a module may not name another; None where it may.
fn objection(from: &str, to: &str) -> Option<String> {
    if from == to || from == "main" || from == "lib" || TOP.contains(&from) {
        let upwards = from == "app" && to == "cmd";
        return upwards.then(|| "the wiring must not know the command line".into());
    }
    if TOP.contains(&to) {
        return Some(format!("`{to}` stands above everything"));
    }
    match (rank(from), rank(to)) {
        (Some(from_rank), Some(to_rank)) if to_rank < from_rank => Some(format!("`{to}` stands before `{from}` on the path")),
        (None, Some(_)) => Some(format!("`{from}` is what the path stands on and names no stage")),
        _ => None,
    }
}

#[test]
fn arrows_go_one_way() {
    let mut wrong = Vec::new();
    let mut used = BTreeSet::new();
    for (file, text) in files() {
        for to in named(&text) {
            let Some(why) = objection(module_of(&file), &to) else { continue };
            match EXCEPTIONS.iter().position(|(known, module, _)| *known == file && *module == to) {
                Some(at) => drop(used.insert(at)),
                None => wrong.push(format!("src/{file} names crate::{to}: {why}")),
            }
        }
    }
    assert!(wrong.is_empty(), "arrows against the path (ARCHITECTURE.md):\n{}", wrong.join("\n"));
    let stale: Vec<_> = (0..EXCEPTIONS.len()).filter(|at| !used.contains(at)).map(|at| EXCEPTIONS[at]).collect();
    assert!(stale.is_empty(), "no longer needed as exceptions: {stale:?}");
}

#[test]
fn every_module_has_its_place() {
    let library = std::fs::read_to_string(source().join("lib.rs")).unwrap();
    let modules = library.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'));
    for module in modules {
        let known = rank(module).is_some() || GROUND.contains(&module) || TOP.contains(&module);
        assert!(known, "`{module}` is new: say in tests/tidy.rs where it stands");
    }
}

#[test]
fn every_file_says_what_it_is() {
    for (file, text) in files() {
        assert!(text.starts_with("//!") || file == "main.rs", "src/{file} does not open with `//!`");
    }
}

#[test]
fn no_file_is_too_long() {
    for (file, text) in files() {
        let lines = text.lines().count();
        let reason = LONG_FILES.iter().find(|(long, _)| *long == file);
        assert!(lines <= LINES_MAX || reason.is_some(), "src/{file} has {lines} lines without its tests; {LINES_MAX} at most");
        assert!(lines > LINES_MAX || reason.is_none(), "src/{file} is short enough now: take it off the list");
    }
}

#[test]
fn names_are_found_in_every_form() {
    let text =
        "use crate::feed::cursor;\nuse crate::{couch, vault::Vault};\nlet x = crate::job::f(crate::db::g);\n// crate::hub\n";
    let expected = ["couch", "db", "feed", "job", "vault"].map(String::from);
    assert_eq!(named(text), BTreeSet::from(expected));
}
