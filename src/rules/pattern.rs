//! JavaScript patterns.
//!
//! Users wrote their rules for Node: `new RegExp(source).test(text)`, without flags. A pattern is read here by JavaScript's
//! grammar (the old one, with its leniencies). The `regex` crate takes all but look-around, back-references and `\B`, in linear
//! time; those go to an engine of ours, which matches as JavaScript does and whose effort is bounded.
//!
//! `tests/patterns` holds what Node says of some hundreds of patterns; README.md has the few differences.

mod backtrack;
mod linear;
mod parse;
mod set;
mod units;

pub use regex::RegexSet;
use std::borrow::Cow;
use std::sync::Arc;

/// No rule that a person wrote comes near it; a generated alternation of a few hundred names still fits.
const SOURCE_BYTES_MAX: usize = 16 * 1024;
/// Below the engines' own limits, so that the error is ours and no parser's stack is at risk.
const NESTING_MAX: usize = 50;
/// Of one compiled pattern.
const COMPILED_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Of all patterns compiled into one set; beyond it they are tested one by one.
const SET_BYTES_MAX: usize = 64 * 1024 * 1024;
/// What a thread remembers of such a set's search.
const SEARCH_BYTES_MAX: usize = 8 * 1024 * 1024;
/// A few milliseconds, of Perl's patterns. A sensible look-around stays far below.
const BACKTRACK_MAX: usize = 100_000;
/// A backtracking engine may read the text once for each start: longer texts are not given to it.
const BACKTRACK_TEXT_BYTES_MAX: usize = 32 * 1024;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    #[error("is not a JavaScript pattern: {0}")]
    Syntax(String),
    #[error("is too large: {0}")]
    TooLarge(String),
    #[error("cannot be compiled: {0}")]
    Unsupported(String),
    /// The bounded engine gave up on this text: there is no answer.
    #[error("takes too much effort on this text")]
    TooMuchEffort,
}

/// One compiled pattern; cheap to clone.
#[derive(Debug, Clone)]
pub struct Pattern {
    source: String,
    engine: Engine,
}

#[derive(Debug, Clone)]
enum Engine {
    Word(Word),
    /// Of texts in which each character is one unit.
    Linear(regex::Regex),
    Backtracking(Arc<backtrack::Program>),
    PerlLinear(regex::Regex),
    PerlBacktracking(fancy_regex::Regex),
}

impl Pattern {
    /// As `new RegExp(js_source)`.
    pub fn compile(js_source: &str) -> Result<Self, PatternError> {
        refuse_long(js_source)?;
        if let Some(word) = Word::of(js_source) {
            return Ok(Self { source: js_source.to_string(), engine: Engine::Word(word) });
        }
        let tree = parse::parse(js_source)?;
        let linear = (!tree.needs_backtracking).then(|| linear(&linear::write(&tree.root)));
        let engine = match linear {
            Some(Ok(regex)) => Engine::Linear(regex),
            // Large repetitions are only counted by the other engine.
            Some(Err(_)) | None => Engine::Backtracking(Arc::new(backtrack::Program::new(&tree))),
        };
        Ok(Self { source: js_source.to_string(), engine })
    }

    /// For Mango's `$regex`, which is PCRE and not JavaScript: the engines' own grammar is the nearer one.
    pub fn compile_perl(source: &str) -> Result<Self, PatternError> {
        refuse_long(source)?;
        let engine = match linear(source) {
            Err(PatternError::Unsupported(_)) => perl_backtracking(source)?,
            regex => Engine::PerlLinear(regex?),
        };
        Ok(Self { source: source.to_string(), engine })
    }

    /// As `test(text)`: found anywhere. `TooMuchEffort` where the bounded engine gives up, which only a pattern with
    /// look-around or back-references can; a caller that must miss nothing takes that for a match.
    pub fn is_match(&self, text: &str) -> Result<bool, PatternError> {
        match &self.engine {
            Engine::Word(word) => Ok(word.is_match(text)),
            Engine::Linear(regex) => Ok(regex.is_match(&units::one_char_each(text))),
            Engine::PerlLinear(regex) => Ok(regex.is_match(text)),
            _ if text.len() > BACKTRACK_TEXT_BYTES_MAX => Err(PatternError::TooMuchEffort),
            Engine::Backtracking(program) => program.is_match(text).map_err(|_| PatternError::TooMuchEffort),
            Engine::PerlBacktracking(regex) => regex.is_match(text).map_err(|_| PatternError::TooMuchEffort),
        }
    }

    /// A match, or no answer within the bound: nothing may be missed.
    pub fn may_match(&self, text: &str) -> bool {
        self.is_match(text).unwrap_or(true)
    }

    /// What the user wrote.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The one text that it matches, where that is so: `^post$`.
    pub fn whole_word(&self) -> Option<&str> {
        match &self.engine {
            Engine::Word(word) if word.at_start && word.at_end => Some(&word.text),
            _ => None,
        }
    }

    /// The same for an engine that tests many, where one can.
    fn regex_text(&self) -> Option<Cow<'_, str>> {
        match &self.engine {
            Engine::Word(word) => Some(Cow::Owned(word.regex_text())),
            Engine::Linear(regex) => Some(Cow::Borrowed(regex.as_str())),
            Engine::Backtracking(_) | Engine::PerlLinear(_) | Engine::PerlBacktracking(_) => None,
        }
    }

    /// True where the bounded engine works: such a pattern costs more for each name.
    pub fn is_backtracking(&self) -> bool {
        matches!(self.engine, Engine::Backtracking(_) | Engine::PerlBacktracking(_))
    }
}

/// `^post$` and its like, which most patterns are: no engine is as quick, and a thousand engines fit into no cache.
#[derive(Debug, Clone)]
struct Word {
    text: String,
    at_start: bool,
    at_end: bool,
}

impl Word {
    fn of(js_source: &str) -> Option<Self> {
        let (at_start, rest) = js_source.strip_prefix('^').map_or((false, js_source), |rest| (true, rest));
        let (at_end, text) = rest.strip_suffix('$').map_or((false, rest), |text| (true, text));
        let is_plain = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | ' ' | ':' | '@' | '/');
        (!text.is_empty() && text.chars().all(is_plain)).then(|| Self { text: text.to_string(), at_start, at_end })
    }

    fn is_match(&self, text: &str) -> bool {
        match (self.at_start, self.at_end) {
            (true, true) => text == self.text,
            (true, false) => text.starts_with(&self.text),
            (false, true) => text.ends_with(&self.text),
            (false, false) => text.contains(&self.text),
        }
    }

    /// The same for an engine that tests many.
    fn regex_text(&self) -> String {
        let (start, end) = (if self.at_start { "^" } else { "" }, if self.at_end { "$" } else { "" });
        format!("{start}{}{end}", regex::escape(&units::one_char_each(&self.text)))
    }
}

fn refuse_long(source: &str) -> Result<(), PatternError> {
    match source.len() > SOURCE_BYTES_MAX {
        true => Err(PatternError::TooLarge(format!("more than {SOURCE_BYTES_MAX} bytes"))),
        false => Ok(()),
    }
}

fn linear(text: &str) -> Result<regex::Regex, PatternError> {
    match regex::RegexBuilder::new(text).size_limit(COMPILED_BYTES_MAX).build() {
        Ok(regex) => Ok(regex),
        Err(regex::Error::CompiledTooBig(_)) => {
            Err(PatternError::TooLarge(format!("more than {COMPILED_BYTES_MAX} bytes when compiled")))
        }
        Err(error) => Err(PatternError::Unsupported(last_line(&error.to_string()))),
    }
}

fn perl_backtracking(text: &str) -> Result<Engine, PatternError> {
    fancy_regex::RegexBuilder::new(text)
        .backtrack_limit(BACKTRACK_MAX)
        .delegate_size_limit(COMPILED_BYTES_MAX)
        .max_prog_size(100_000)
        .build()
        .map(Engine::PerlBacktracking)
        .map_err(|error| PatternError::Unsupported(last_line(&error.to_string())))
}

/// The engines draw the pattern with an arrow under the fault; the reason is in the last line.
fn last_line(text: &str) -> String {
    text.lines().last().unwrap_or_default().trim().to_string()
}

/// All patterns as one, in their order; none where the engine for many cannot take one of them, or not all within `size` bytes.
pub fn regex_set<'a>(patterns: impl IntoIterator<Item = &'a Pattern>, size: usize, search: usize) -> Option<RegexSet> {
    let texts = patterns.into_iter().map(Pattern::regex_text).collect::<Option<Vec<_>>>()?;
    regex::RegexSetBuilder::new(texts).size_limit(size).dfa_size_limit(search).build().ok()
}

/// Many patterns tested at once.
///
/// A pattern of the bounded engine that runs out of its bound for a name counts as matching that name: nothing may be missed.
#[derive(Debug, Clone)]
pub struct PatternSet {
    set: RegexSet,
    /// The patterns' positions in the order of the set.
    set_positions: Vec<usize>,
    /// Patterns that are tested one by one.
    singles: Vec<(usize, Pattern)>,
}

impl PatternSet {
    /// The patterns are known by their position.
    pub fn new<'a>(patterns: impl IntoIterator<Item = &'a Pattern>) -> Self {
        let (together, alone): (Vec<_>, Vec<_>) =
            patterns.into_iter().enumerate().partition(|(_, pattern)| pattern.regex_text().is_some());
        let owned = |(position, pattern): (usize, &Pattern)| (position, pattern.clone());
        let mut singles: Vec<(usize, Pattern)> = alone.into_iter().map(owned).collect();
        match regex_set(together.iter().map(|(_, pattern)| *pattern), SET_BYTES_MAX, SEARCH_BYTES_MAX) {
            Some(set) => Self { set, set_positions: together.into_iter().map(|(position, _)| position).collect(), singles },
            // Each is fine alone, together they are too large.
            None => {
                singles.extend(together.into_iter().map(owned));
                Self { set: RegexSet::empty(), set_positions: Vec::new(), singles }
            }
        }
    }

    /// The positions of all patterns that match, ascending.
    pub fn matches(&self, name: &str) -> Vec<usize> {
        let in_set = self.set.matches(&units::one_char_each(name));
        let mut found: Vec<usize> = in_set.iter().filter_map(|at| self.set_positions.get(at).copied()).collect();
        if !self.singles.is_empty() {
            found.extend(self.singles.iter().filter(|(_, pattern)| pattern.may_match(name)).map(|(position, _)| *position));
            found.sort_unstable();
        }
        found
    }

    /// True where at least one pattern matches.
    pub fn any(&self, name: &str) -> bool {
        self.set.is_match(&units::one_char_each(name)) || self.singles.iter().any(|(_, pattern)| pattern.may_match(name))
    }

    pub fn len(&self) -> usize {
        self.set_positions.len() + self.singles.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Default for PatternSet {
    fn default() -> Self {
        Self::new([])
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn test(source: &str, text: &str) -> bool {
        Pattern::compile(source).unwrap_or_else(|e| panic!("{source}: {e}")).is_match(text).expect("within the bound")
    }

    /// Each line was worked out by JavaScript's rules: source, texts that it finds, texts that it does not.
    #[test]
    fn patterns_mean_what_javascript_means() {
        let cases: &[(&str, &[&str], &[&str])] = &[
            ("", &["", "anything"], &[]),
            ("foo", &["foo", "a foo b"], &["fo", ""]),
            ("^test_db1$", &["test_db1"], &["test_db12", "test_db1\n"]),
            ("^fo", &["foo"], &["afoo"]),
            ("test_db_([^_])*", &["test_db_3"], &["test_db1"]),
            ("medium|high", &["high", "medium"], &["low"]),
            (r"^user_(?<name>.*)$", &["user_", "user_a"], &["auser_a"]),
            (r"^\d+$", &["123"], &["١٢", ""]),
            (r"^\w$", &["a", "_", "Z"], &["é", "-"]),
            (r"^\W$", &["é", "-"], &["a"]),
            (r"^\s$", &[" ", "\u{FEFF}", "\u{2028}", "\u{A0}"], &["\u{85}", "a"]),
            (r"^\S$", &["\u{85}", "a"], &["\t"]),
            (r"^.$", &["a", "\u{85}"], &["\n", "\r", "\u{2028}"]),
            (r"a\/b", &["a/b"], &["ab"]),
            (r"^a\-b\_c$", &["a-b_c"], &[]),
            (r"^[^]$", &["\n", "x"], &[""]),
            (r"^[]$", &[], &["", "x"]),
            (r"a[]|b", &["b"], &["a"]),
            (r"^\u0041\x42$", &["AB"], &["A"]),
            (r"^\uD83D\uDE00$", &["😀"], &[]),
            (r"\uD83D", &["😀"], &["a"]),
            (r"^[\uD800-\uDFFFa]$", &["a"], &["b"]),
            (r"^\cJ$", &["\n"], &["J"]),
            (r"^\c1$", &["\\c1"], &[]),
            (r"^[\cJ]$", &["\n"], &["c"]),
            (r"^\0$", &["\0"], &["0"]),
            (r"^\101$", &["A"], &[]),
            (r"^\8$", &["8"], &[]),
            (r"^[\b]$", &["\u{8}"], &["b"]),
            (r"\bfoo\b", &["a foo."], &["afoo"]),
            (r"\bb", &["éb"], &["ab"]),
            (r"a\Bb", &["ab"], &["a b"]),
            (r"^a{2}$", &["aa"], &["a"]),
            (r"^a{,2}$", &["a{,2}"], &["aa"]),
            (r"^a{$", &["a{"], &[]),
            (r"^x}]$", &["x}]"], &[]),
            (r"^a{1,2}?$", &["aa"], &["aaa"]),
            (r"^a{2,}$", &["aaa"], &["a"]),
            (r"^[a-c\d]+$", &["ab1"], &["d"]),
            (r"^[\w-.]+$", &["a-."], &["/"]),
            (r"^[a\]b]$", &["]"], &["\\"]),
            (r"^[[]$", &["["], &[]),
            (r"^[a&&b]$", &["&"], &["&&"]),
            (r"^[+--]$", &["-", ",", "+"], &["."]),
            (r"^[^\D]$", &["5"], &["x"]),
            (r"^[\s\S]$", &["\n", "é"], &[]),
            (r"^\u{3}$", &["uuu"], &["\u{3}"]),
            (r"^\p{L}$", &["p{L}"], &["a"]),
            (r"^#a b$", &["#a b"], &["#ab"]),
            (r"~<>%@!&=:;,'`", &["~<>%@!&=:;,'`"], &[]),
            (r"^(?!_)", &["a"], &["_users"]),
            (r"^(?=.*b)a", &["ab"], &["ac"]),
            (r"(?<=user_)\d+", &["user_7"], &["7"]),
            (r"(?<!^x+)7", &["7", "y7"], &["xx7"]),
            (r"^(a|b)\1$", &["aa", "bb"], &["ab"]),
            (r"^(?:(a)|b)\1$", &["aa", "b"], &["ba"]),
            (r"^(?<q>['x])y\k<q>$", &["'y'", "xyx"], &["'yx"]),
            (r"^\k$", &["k"], &[]),
            (r"^(?!a\b)", &["b", "ab"], &["a"]),
            (r"^(?i:Foo)$", &["FOO"], &["BAR"]),
            (r"^日本$", &["日本"], &[]),
        ];
        for (source, found, not_found) in cases {
            for text in *found {
                assert!(test(source, text), "/{source}/ finds {text:?}");
            }
            for text in *not_found {
                assert!(!test(source, text), "/{source}/ does not find {text:?}");
            }
        }
    }

    #[test]
    fn a_plain_word_needs_no_engine() {
        for (source, is_word) in [
            ("^post$", true),
            ("post", true),
            ("^user_", true),
            ("é-1 a:b@c/d", true),
            ("", false),
            ("^$", false),
            ("a.b", false),
            ("a|b", false),
            ("a\\/b", false),
            ("a$b", false),
            ("^^a", false),
            ("a$$", false),
            ("(a)", false),
        ] {
            assert_eq!(Word::of(source).is_some(), is_word, "{source}");
        }
    }

    #[test]
    fn what_javascript_refuses_is_refused_with_a_reason() {
        for (source, reason) in [
            ("(", "not closed"),
            (")", "unmatched )"),
            ("*a", "nothing to repeat"),
            ("a**", "nothing to repeat"),
            ("a++", "nothing to repeat"),
            ("^*", "nothing to repeat"),
            ("{2}", "nothing to repeat"),
            ("(?<=a)*", "nothing to repeat"),
            ("[a", "not closed"),
            ("a\\", "backslash"),
            ("[b-a]", "out of order"),
            ("a{3,2}", "out of order"),
            ("(?<1a>x)", "name"),
            ("(?<a", "name"),
            ("(?P<a>x)", "unknown"),
            ("(?<a>x)\\k<b>", "names no group"),
            ("(?i)x", "unknown"),
        ] {
            let error = Pattern::compile(source).expect_err(source).to_string();
            assert!(error.contains(reason), "{source}: {error}");
        }
    }

    #[test]
    fn only_look_around_and_back_references_pay_for_the_bounded_engine() {
        let cases = [("^a.*[^b]$", false), (r"\ba\b", false), ("(?=a)", true), (r"(a)\1", true), (r"\1", false), (r"a\Bb", true)];
        for (source, backtracking) in cases {
            assert_eq!(Pattern::compile(source).unwrap().is_backtracking(), backtracking, "{source}");
        }
    }

    #[test]
    fn a_pattern_that_is_too_large_is_an_error() {
        for source in ["a".repeat(SOURCE_BYTES_MAX + 1), "(".repeat(5000)] {
            assert!(matches!(Pattern::compile(&source), Err(PatternError::TooLarge(_))), "{}", &source[..10]);
        }
    }

    #[test]
    fn large_repetitions_are_only_counted() {
        assert!(test("^(?:[^_]{1,900}_){3,900}$", "a_b_c_"));
        assert!(!test("((a{1000}){1000}){1000}", "aaa"));
        assert!(!test("(?!b)a{99999999999}", "aaa"));
        assert_eq!(Pattern::compile("(?:){99999999999}").unwrap().is_match(""), Ok(true));
        assert_eq!(Pattern::compile("(?:|a){99999999999}").unwrap().is_match(""), Ok(true));
    }

    #[test]
    fn a_pattern_without_an_answer_counts_as_a_match() {
        let costly = Pattern::compile("^(?:a(?!y)|a(?!z))*$").unwrap();
        let name = format!("{}b", "a".repeat(40));
        assert_eq!(costly.is_match(&name), Err(PatternError::TooMuchEffort));
        assert!(costly.may_match(&name));
        let other = Pattern::compile("^b").unwrap();
        let set = PatternSet::new([&other, &costly]);
        assert_eq!(set.matches(&name), [1]);
        assert!(set.any(&name));
        let long = "x".repeat(BACKTRACK_TEXT_BYTES_MAX + 1);
        assert_eq!(Pattern::compile("^(?!x)").unwrap().is_match(&long), Err(PatternError::TooMuchEffort));
    }

    #[test]
    fn a_set_knows_its_patterns_by_position() {
        let patterns: Vec<Pattern> =
            ["^user_", "(?!z)^a", ".*", "^b$"].iter().map(|source| Pattern::compile(source).unwrap()).collect();
        let set = PatternSet::new(&patterns);
        assert_eq!(set.len(), 4);
        assert_eq!(set.matches("user_1"), [0, 2]);
        assert_eq!(set.matches("abc"), [1, 2]);
        assert_eq!(set.matches("b"), [2, 3]);
        let none = PatternSet::default();
        assert!(none.is_empty() && !none.any("a") && none.matches("a").is_empty());
    }

    #[test]
    fn perl_patterns_keep_their_own_grammar() {
        assert!(Pattern::compile_perl("(?i)^FOO").unwrap().is_match("foo").unwrap());
        assert!(Pattern::compile_perl("^(?!a)").unwrap().is_match("b").unwrap());
        assert!(Pattern::compile_perl("(").is_err());
    }

    proptest! {
        #[test]
        fn no_source_panics(source in "\\PC{0,40}", text in "\\PC{0,20}") {
            if let Ok(pattern) = Pattern::compile(&source) {
                let _ = pattern.is_match(&text);
            }
        }

        #[test]
        fn no_source_of_pattern_characters_panics(
            source in r"[ab1^$\\.*+?()\[\]{}|<>=!:,kcuxbBdDwWsS-]{0,24}", text in "[ab1-]{0,12}"
        ) {
            match Pattern::compile(&source) {
                Ok(pattern) => drop(pattern.is_match(&text)),
                // What JavaScript takes, an engine takes.
                Err(PatternError::Unsupported(reason)) => prop_assert!(false, "{reason}"),
                Err(_) => {}
            }
        }

        #[test]
        fn a_word_is_what_the_engine_finds(start in "\\^?", word in "[ab_/ -]{1,3}", end in "\\$?", text in "[ab_/ \n-]{0,5}") {
            let source = format!("{start}{word}{end}");
            let engine = regex::Regex::new(&linear::write(&parse::parse(&source).unwrap().root)).unwrap();
            let pattern = Pattern::compile(&source).unwrap();
            prop_assert!(matches!(pattern.engine, Engine::Word(_)));
            prop_assert_eq!(pattern.is_match(&text), Ok(engine.is_match(&text)));
            prop_assert_eq!(PatternSet::new([&pattern]).any(&text), engine.is_match(&text));
        }

        #[test]
        fn an_escaped_text_finds_itself(text in "\\PC{0,30}") {
            let escape = |c: char| if c.is_ascii_punctuation() { format!("\\{c}") } else { c.to_string() };
            let source: String = text.chars().map(escape).collect();
            let whole = format!("^{source}$");
            prop_assert!(test(&whole, &text));
        }

        #[test]
        fn a_set_agrees_with_its_patterns(name in "[a-d_]{0,10}") {
            let patterns: Vec<Pattern> =
                ["^a", "b$", "c|d", "(?!a)^_", r"(.)\1"].iter().map(|source| Pattern::compile(source).unwrap()).collect();
            let alone: Vec<usize> = (0..patterns.len()).filter(|at| patterns[*at].may_match(&name)).collect();
            let set = PatternSet::new(&patterns);
            prop_assert_eq!(set.any(&name), !alone.is_empty());
            prop_assert_eq!(set.matches(&name), alone);
        }
    }
}
