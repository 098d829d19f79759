//! Patterns mean what JavaScript means by them: each line of `corpus.json` was asked of Node (`generate.js`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use spiegel::rules::pattern::{Pattern, PatternError, PatternSet};

/// A pattern, the texts that it finds and those that it does not; no texts where JavaScript refuses it.
type Line = (String, Option<(Vec<String>, Vec<String>)>);

fn corpus() -> Vec<Line> {
    let mut lines: Vec<Vec<serde_json::Value>> = serde_json::from_str(include_str!("corpus.json")).unwrap();
    if let Some(more) = std::env::var_os("SPIEGEL_TEST_PATTERNS") {
        let more: Vec<Vec<serde_json::Value>> = serde_json::from_slice(&std::fs::read(more).unwrap()).unwrap();
        lines.extend(more);
    }
    let texts = |value: &serde_json::Value| serde_json::from_value(value.clone()).unwrap();
    let line = |line: Vec<serde_json::Value>| {
        let tried = (line.len() == 3).then(|| (texts(&line[1]), texts(&line[2])));
        (line[0].as_str().unwrap().to_string(), tried)
    };
    lines.into_iter().map(line).collect()
}

#[test]
fn node_and_we_find_the_same_texts() {
    let mut wrong = Vec::new();
    let mut tried_count = 0;
    for (source, tried) in corpus() {
        let Some((found, not_found)) = tried else { continue };
        let pattern = match Pattern::compile(&source) {
            Ok(pattern) => pattern,
            Err(error) => {
                wrong.push(format!("/{source}/ {error}"));
                continue;
            }
        };
        let set = PatternSet::new([&pattern]);
        for (text, expected) in found.iter().map(|text| (text, true)).chain(not_found.iter().map(|text| (text, false))) {
            tried_count += 1;
            let answer = pattern.is_match(text);
            if answer != Ok(expected) || set.any(text) != expected {
                wrong.push(format!("/{source}/ on {text:?}: {answer:?}, Node says {expected}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {tried_count} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert!(tried_count > 10_000, "only {tried_count} were tried");
}

#[test]
fn what_node_refuses_we_refuse() {
    let refused: Vec<String> = corpus().into_iter().filter(|(_, tried)| tried.is_none()).map(|(source, _)| source).collect();
    let taken: Vec<&String> =
        refused.iter().filter(|source| !matches!(Pattern::compile(source), Err(PatternError::Syntax(_)))).collect();
    assert!(taken.is_empty(), "Node refuses {taken:#?}");
    assert!(refused.len() > 50);
}
