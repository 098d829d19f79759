//! The elements of a long JSON answer, one by one while it comes: `{"results":[…]}` of `_bulk_get`.
//!
//! The splitter only finds where an element ends, in one pass and whatever the borders of the chunks; what an element says is
//! read afterwards, and of a document no more than replication needs: bodies travel as the text that came.

use bytes::{Bytes, BytesMut};
use memchr::memchr2;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::BTreeMap;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ElementsError {
    #[error("{what} is longer than {bytes_max} bytes: {bytes} came so far")]
    TooLong { what: &'static str, bytes: usize, bytes_max: usize },
    #[error("the answer is malformed at byte {at}: {what}")]
    Malformed { what: &'static str, at: u64 },
    #[error("the answer broke off after {bytes} bytes")]
    Truncated { bytes: u64 },
    #[error("the answer has no results")]
    NoResults,
    #[error("{what} cannot be read: {why}")]
    Unreadable { what: &'static str, why: String },
}

/// Fed with chunks, finds the elements of `results`.
///
/// An element that lies within one chunk shares that chunk's memory, so that the chunk lives as long as its last element.
#[derive(Debug)]
pub struct Splitter {
    element_bytes_max: usize,
    place: Place,
    text: Text,
    /// The beginning of an element whose end has not come.
    partial: BytesMut,
    /// The answer without its elements.
    rest: BytesMut,
    results_seen: bool,
    consumed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    BeforeAnswer,
    /// In the answer's own object, beside `results`.
    Beside,
    /// After `[`: an element or the end.
    FirstElement,
    /// After a comma.
    NextElement,
    /// An object or array.
    Container,
    String,
    /// A number, true, false or null: what follows it ends it.
    Scalar,
    /// After an element: a comma or the end.
    AfterElement,
    AfterAnswer,
}

/// Where in nested brackets and strings the text stands.
#[derive(Debug, Default)]
struct Text {
    depth: usize,
    in_string: bool,
    /// The last byte was a backslash that the next belongs to.
    escaped: bool,
}

const RESULTS: &[u8] = b"\"results\"";

/// Quotes and brackets: what outside of a string changes where the text stands.
const STRUCTURAL: [bool; 256] = {
    let mut table = [false; 256];
    table[b'"' as usize] = true;
    table[b'{' as usize] = true;
    table[b'}' as usize] = true;
    table[b'[' as usize] = true;
    table[b']' as usize] = true;
    table
};

/// Most strings end before a call of `memchr` has paid for itself.
const SHORT_STRING_BYTES: usize = 16;

impl Text {
    /// The next bracket outside of a string; None where these bytes have no more.
    #[inline]
    fn next_bracket(&mut self, bytes: &[u8], mut at: usize) -> Option<usize> {
        loop {
            if self.in_string {
                at = self.string_end(bytes, at)? + 1;
            }
            at += bytes.get(at..)?.iter().position(|byte| STRUCTURAL[usize::from(*byte)])?;
            if bytes.get(at) != Some(&b'"') {
                return Some(at);
            }
            self.in_string = true;
            at += 1;
        }
    }

    /// Where the closing quote stands.
    #[inline]
    fn string_end(&mut self, bytes: &[u8], mut at: usize) -> Option<usize> {
        if self.escaped {
            bytes.get(at)?;
            self.escaped = false;
            at += 1;
        }
        loop {
            let rest = bytes.get(at..)?;
            let (short, long) = rest.split_at(rest.len().min(SHORT_STRING_BYTES));
            at += match short.iter().position(|byte| matches!(byte, b'"' | b'\\')) {
                Some(offset) => offset,
                None => short.len() + memchr2(b'"', b'\\', long)?,
            };
            if bytes.get(at) == Some(&b'"') {
                self.in_string = false;
                return Some(at);
            }
            at += 2;
            if at > bytes.len() {
                self.escaped = true;
                return None;
            }
        }
    }
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\n' | b'\r' | b'\t')
}

impl Splitter {
    pub fn new(element_bytes_max: usize) -> Self {
        Self {
            element_bytes_max,
            place: Place::BeforeAnswer,
            text: Text::default(),
            partial: BytesMut::new(),
            rest: BytesMut::new(),
            results_seen: false,
            consumed: 0,
        }
    }

    /// Bytes that are held now: an element's beginning, and what stands beside `results`.
    pub fn buffered(&self) -> usize {
        self.partial.len() + self.rest.len()
    }

    /// Appends to `found` the elements that end in this chunk. After an error nothing more may be fed.
    pub fn push(&mut self, chunk: Bytes, found: &mut Vec<Bytes>) -> Result<(), ElementsError> {
        let mut at = 0;
        while at < chunk.len() {
            at = match self.place {
                Place::BeforeAnswer => self.before_answer(&chunk, at)?,
                Place::Beside => self.beside(&chunk, at)?,
                Place::FirstElement | Place::NextElement => self.before_element(&chunk, at)?,
                Place::Container => self.container(&chunk, at, found)?,
                Place::String => self.string(&chunk, at, found)?,
                Place::Scalar => self.scalar(&chunk, at, found)?,
                Place::AfterElement => self.after_element(&chunk, at)?,
                Place::AfterAnswer => match skip_space(&chunk, at) {
                    at if at < chunk.len() => return Err(self.malformed("text after the end", at)),
                    at => at,
                },
            };
        }
        self.consumed += chunk.len() as u64;
        Ok(())
    }

    /// The answer without its elements, as JSON: `{"results":[],"last_seq":"3-x","pending":0}`.
    pub fn finish(self) -> Result<Bytes, ElementsError> {
        match self.place {
            Place::AfterAnswer if self.results_seen => Ok(self.rest.freeze()),
            Place::AfterAnswer => Err(ElementsError::NoResults),
            _ => Err(ElementsError::Truncated { bytes: self.consumed }),
        }
    }

    fn before_answer(&mut self, chunk: &[u8], at: usize) -> Result<usize, ElementsError> {
        let at = skip_space(chunk, at);
        match chunk.get(at) {
            None => Ok(at),
            Some(b'{') => {
                self.place = Place::Beside;
                self.text.depth = 1;
                self.keep_rest(b"{")?;
                Ok(at + 1)
            }
            Some(_) => Err(self.malformed("not an object", at)),
        }
    }

    fn beside(&mut self, chunk: &[u8], from: usize) -> Result<usize, ElementsError> {
        let Some(at) = self.text.next_bracket(chunk, from) else {
            self.keep_rest(&chunk[from..])?;
            return Ok(chunk.len());
        };
        self.keep_rest(&chunk[from..=at])?;
        match chunk[at] {
            b'[' if self.text.depth == 1 && opens_results(&self.rest) => {
                if std::mem::replace(&mut self.results_seen, true) {
                    return Err(self.malformed("results for a second time", at));
                }
                self.place = Place::FirstElement;
            }
            b'{' | b'[' => self.text.depth += 1,
            _ => self.text.depth -= 1,
        }
        if self.text.depth == 0 {
            self.place = Place::AfterAnswer;
        }
        Ok(at + 1)
    }

    fn before_element(&mut self, chunk: &[u8], at: usize) -> Result<usize, ElementsError> {
        let at = skip_space(chunk, at);
        let Some(first) = chunk.get(at) else { return Ok(at) };
        self.text = Text::default();
        self.place = match first {
            b']' if self.place == Place::FirstElement => return self.end_of_results(at),
            b'{' | b'[' => Place::Container,
            b'"' => Place::String,
            b'-' | b'0'..=b'9' | b't' | b'f' | b'n' => Place::Scalar,
            _ => return Err(self.malformed("not a value", at)),
        };
        if *first != b'"' {
            return Ok(at);
        }
        // The opening quote is taken here, so that the next one is the closing one.
        self.text.in_string = true;
        self.keep(b"\"")?;
        Ok(at + 1)
    }

    fn container(&mut self, chunk: &Bytes, from: usize, found: &mut Vec<Bytes>) -> Result<usize, ElementsError> {
        let mut at = from;
        while let Some(bracket) = self.text.next_bracket(chunk, at) {
            at = bracket + 1;
            match chunk[bracket] {
                b'{' | b'[' => self.text.depth += 1,
                _ => self.text.depth -= 1,
            }
            if self.text.depth == 0 {
                return self.complete(chunk, from, at, found);
            }
        }
        self.keep(&chunk[from..])?;
        Ok(chunk.len())
    }

    fn string(&mut self, chunk: &Bytes, from: usize, found: &mut Vec<Bytes>) -> Result<usize, ElementsError> {
        match self.text.string_end(chunk, from) {
            Some(quote) => self.complete(chunk, from, quote + 1, found),
            None => {
                self.keep(&chunk[from..])?;
                Ok(chunk.len())
            }
        }
    }

    fn scalar(&mut self, chunk: &Bytes, from: usize, found: &mut Vec<Bytes>) -> Result<usize, ElementsError> {
        let end = chunk[from..].iter().position(|byte| is_space(*byte) || matches!(byte, b',' | b']'));
        match end {
            Some(offset) => self.complete(chunk, from, from + offset, found),
            None => {
                self.keep(&chunk[from..])?;
                Ok(chunk.len())
            }
        }
    }

    fn after_element(&mut self, chunk: &[u8], at: usize) -> Result<usize, ElementsError> {
        let at = skip_space(chunk, at);
        match chunk.get(at) {
            None => Ok(at),
            Some(b',') => {
                self.place = Place::NextElement;
                Ok(at + 1)
            }
            Some(b']') => self.end_of_results(at),
            // CouchDB has sent its 200 long before; an error on its way is written into the middle of the list.
            Some(_) => Err(self.malformed("no comma between elements", at)),
        }
    }

    fn end_of_results(&mut self, at: usize) -> Result<usize, ElementsError> {
        self.place = Place::Beside;
        self.text = Text { depth: 1, ..Text::default() };
        self.keep_rest(b"]")?;
        Ok(at + 1)
    }

    fn complete(&mut self, chunk: &Bytes, from: usize, to: usize, found: &mut Vec<Bytes>) -> Result<usize, ElementsError> {
        self.place = Place::AfterElement;
        if self.partial.is_empty() {
            self.check_length(to - from)?;
            found.push(chunk.slice(from..to));
        } else {
            self.keep(&chunk[from..to])?;
            found.push(std::mem::take(&mut self.partial).freeze());
        }
        Ok(to)
    }

    fn keep(&mut self, bytes: &[u8]) -> Result<(), ElementsError> {
        self.check_length(self.partial.len() + bytes.len())?;
        self.partial.extend_from_slice(bytes);
        Ok(())
    }

    fn keep_rest(&mut self, bytes: &[u8]) -> Result<(), ElementsError> {
        let (length, bytes_max) = (self.rest.len() + bytes.len(), self.element_bytes_max);
        if length > bytes_max {
            return Err(ElementsError::TooLong { what: "what stands beside the results", bytes: length, bytes_max });
        }
        self.rest.extend_from_slice(bytes);
        Ok(())
    }

    fn check_length(&self, bytes: usize) -> Result<(), ElementsError> {
        let bytes_max = self.element_bytes_max;
        match bytes > bytes_max {
            true => Err(ElementsError::TooLong { what: "an element", bytes, bytes_max }),
            false => Ok(()),
        }
    }

    fn malformed(&self, what: &'static str, at: usize) -> ElementsError {
        ElementsError::Malformed { what, at: self.consumed + at as u64 }
    }
}

fn skip_space(chunk: &[u8], from: usize) -> usize {
    let space = chunk[from..].iter().position(|byte| !is_space(*byte));
    space.map_or(chunk.len(), |offset| from + offset)
}

/// Whether a text that ends with `[` ends with the member `results`, and not with one whose name only ends so.
fn opens_results(text: &[u8]) -> bool {
    let name = text.strip_suffix(b"[").map(<[u8]>::trim_ascii_end).and_then(|text| text.strip_suffix(b":"));
    let before = name.map(<[u8]>::trim_ascii_end).and_then(|text| text.strip_suffix(RESULTS));
    before.is_some_and(|before| matches!(before.trim_ascii_end().last(), Some(b'{' | b',')))
}

/// One element of `_bulk_get`'s answer: each document is the text that came, or why it did not come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BulkGetElement {
    pub id: String,
    pub docs: Vec<Result<Bytes, BulkGetError>>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct BulkGetError {
    #[serde(deserialize_with = "as_text")]
    pub id: String,
    #[serde(deserialize_with = "as_text")]
    pub rev: String,
    #[serde(deserialize_with = "as_text")]
    pub error: String,
    #[serde(deserialize_with = "as_text")]
    pub reason: String,
}

/// PouchDB's errors have `"error": true` and `"reason": null`.
pub fn as_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(match Value::deserialize(deserializer)? {
        Value::String(text) => text,
        Value::Null => String::new(),
        other => other.to_string(),
    })
}

impl BulkGetElement {
    pub fn parse(element: &Bytes) -> Result<Self, ElementsError> {
        #[derive(Deserialize)]
        struct Raw<'a> {
            #[serde(borrow)]
            id: Cow<'a, str>,
            #[serde(borrow)]
            docs: Vec<RawDoc<'a>>,
        }
        #[derive(Deserialize)]
        struct RawDoc<'a> {
            #[serde(borrow)]
            ok: Option<&'a RawValue>,
            error: Option<BulkGetError>,
        }
        let raw: Raw = read("an element of _bulk_get", element)?;
        let mut docs = Vec::with_capacity(raw.docs.len());
        for doc in raw.docs {
            docs.push(match (doc.ok, doc.error) {
                // The text was borrowed from these very bytes.
                (Some(text), _) => Ok(element.slice_ref(text.get().as_bytes())),
                (None, Some(error)) => Err(error),
                (None, None) => {
                    let (what, why) = ("an element of _bulk_get", String::from("neither a document nor an error"));
                    return Err(ElementsError::Unreadable { what, why });
                }
            });
        }
        Ok(Self { id: raw.id.into_owned(), docs })
    }
}

/// What replication needs to know of a document; its body is not built.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Shallow {
    #[serde(rename = "_id")]
    pub id: String,
    #[serde(rename = "_rev")]
    pub rev: String,
    #[serde(rename = "_deleted", default)]
    pub deleted: bool,
    #[serde(rename = "_attachments", default)]
    pub attachments: BTreeMap<String, AttachmentInfo>,
    /// Only with `revs=true`.
    #[serde(rename = "_revisions", default)]
    pub revisions: Option<Revisions>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct AttachmentInfo {
    pub length: Option<u64>,
    pub stub: bool,
    pub follows: bool,
    pub digest: Option<String>,
    pub revpos: Option<u64>,
    pub encoding: Option<String>,
}

/// A revision and its ancestors, newest first.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Revisions {
    pub start: u64,
    pub ids: Vec<String>,
}

impl Shallow {
    pub fn parse(document: &[u8]) -> Result<Self, ElementsError> {
        read("a document", document)
    }
}

fn read<'a, T: Deserialize<'a>>(what: &'static str, text: &'a [u8]) -> Result<T, ElementsError> {
    serde_json::from_slice(text).map_err(|error| ElementsError::Unreadable { what, why: error.to_string() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const LARGE: usize = 1 << 20;

    /// The elements and what stands beside them, from chunks of these sizes, again and again.
    fn split(text: &[u8], sizes: &[usize], element_bytes_max: usize) -> Result<(Vec<String>, String), ElementsError> {
        let mut splitter = Splitter::new(element_bytes_max);
        let mut found = Vec::new();
        let mut rest = Bytes::copy_from_slice(text);
        for size in sizes.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            splitter.push(rest.split_to((*size).clamp(1, rest.len())), &mut found)?;
        }
        let texts = found.iter().map(|element| String::from_utf8(element.to_vec()).expect("whole characters")).collect();
        Ok((texts, String::from_utf8(splitter.finish()?.to_vec()).expect("whole characters")))
    }

    #[test]
    fn elements_are_found_wherever_the_chunks_end() {
        for (text, elements, rest) in [
            (r#"{"results":[]}"#, vec![], r#"{"results":[]}"#),
            (" {\n\"results\" : [\n\n] , \"pending\":0 }\r\n", vec![], "{\n\"results\" : [] , \"pending\":0 }"),
            (
                "{\"results\":[\n{\"a\":1},\n{\"b\":[]}\n],\n\"last_seq\":\"2-x\",\"pending\":0}\n",
                vec![r#"{"a":1}"#, r#"{"b":[]}"#],
                "{\"results\":[],\n\"last_seq\":\"2-x\",\"pending\":0}",
            ),
            (
                r#"{"last_seq":[{"results":[1]}],"x":"\"results\":[","results":[1,-2.5e3 ,true,null,"a,]}\\","\"",[[]],{}],"y":{}}"#,
                vec!["1", "-2.5e3", "true", "null", r#""a,]}\\""#, r#""\"""#, "[[]]", "{}"],
                r#"{"last_seq":[{"results":[1]}],"x":"\"results\":[","results":[],"y":{}}"#,
            ),
            (
                r#"{"results":[{"s":"}]\\\"}{[","ü":"€𝄞\u007d"},{"long":"0123456789abcdef0123456789abcdef\\"}]}"#,
                vec![r#"{"s":"}]\\\"}{[","ü":"€𝄞\u007d"}"#, r#"{"long":"0123456789abcdef0123456789abcdef\\"}"#],
                r#"{"results":[]}"#,
            ),
            (r#"{"my\"results":[1],"results":[2]}"#, vec!["2"], r#"{"my\"results":[1],"results":[]}"#),
        ] {
            for size in 1..=text.len() {
                let (found, beside) = split(text.as_bytes(), &[size], LARGE).unwrap_or_else(|error| panic!("{text}: {error}"));
                assert_eq!((found, beside.as_str()), (elements.iter().map(|e| String::from(*e)).collect(), rest), "{size}");
            }
        }
    }

    #[test]
    fn what_is_no_whole_answer_is_an_error() {
        let malformed = |what, at| Err(ElementsError::Malformed { what, at });
        for (text, expected) in [
            ("", Err(ElementsError::Truncated { bytes: 0 })),
            ("  ", Err(ElementsError::Truncated { bytes: 2 })),
            ("<html>", malformed("not an object", 0)),
            ("[1]", malformed("not an object", 0)),
            (r#"{"error":"x","reason":"y"}"#, Err(ElementsError::NoResults)),
            (r#"{"results":{"results":[]}}"#, Err(ElementsError::NoResults)),
            (r#"{"results":"#, Err(ElementsError::Truncated { bytes: 11 })),
            (r#"{"results":[{"a":1},"#, Err(ElementsError::Truncated { bytes: 20 })),
            (r#"{"results":[{"a":1"#, Err(ElementsError::Truncated { bytes: 18 })),
            (r#"{"results":[12"#, Err(ElementsError::Truncated { bytes: 14 })),
            (r#"{"results":["a\"#, Err(ElementsError::Truncated { bytes: 15 })),
            (r#"{"results":[1]"#, Err(ElementsError::Truncated { bytes: 14 })),
            (r#"{"results":[1]}x"#, malformed("text after the end", 15)),
            (r#"{"results":[{}]}{}"#, malformed("text after the end", 16)),
            (r#"{"results":[,1]}"#, malformed("not a value", 12)),
            (r#"{"results":[1,]}"#, malformed("not a value", 14)),
            (r#"{"results":[}}"#, malformed("not a value", 12)),
            (r#"{"results":[{}{}]}"#, malformed("no comma between elements", 14)),
            ("{\"results\":[{}\n\n{\"error\":\"timeout\"}", malformed("no comma between elements", 16)),
            (r#"{"results":[],"results":[]}"#, malformed("results for a second time", 24)),
        ] {
            for size in 1..=text.len().max(1) {
                assert_eq!(split(text.as_bytes(), &[size], LARGE).map(|_| ()), expected, "{text} by {size}");
            }
        }
    }

    #[test]
    fn an_element_and_what_stands_beside_are_bounded_wherever_the_chunks_end() {
        let text = format!(r#"{{"results":[{{"a":"{}"}},"{}"],"b":"{}"}}"#, "x".repeat(92), "y".repeat(98), "z".repeat(79));
        for size in 1..=text.len() {
            assert!(split(text.as_bytes(), &[size], 100).is_ok(), "{size}");
            let error = split(text.as_bytes(), &[size], 99).expect_err("100 bytes are too many");
            assert!(matches!(error, ElementsError::TooLong { bytes: 100, bytes_max: 99, .. }), "{size}: {error}");
        }
        let endless = std::iter::once(&b"{\"results\":[\""[..]).chain(std::iter::repeat_n(&[b'x'; 1000][..], 1000));
        let mut splitter = Splitter::new(10_000);
        let (mut found, mut ended) = (Vec::new(), Ok(()));
        for chunk in endless {
            ended = splitter.push(Bytes::from_static(chunk), &mut found);
            assert!(splitter.buffered() < 10_020);
            if ended.is_err() {
                break;
            }
        }
        assert_eq!(ended.expect_err("too long").to_string(), "an element is longer than 10000 bytes: 10001 came so far");
    }

    #[test]
    fn only_what_is_incomplete_is_held() {
        let mut splitter = Splitter::new(LARGE);
        let mut found = Vec::new();
        splitter.push(Bytes::from_static(br#"{"results":[{"a":1},{"b":"#), &mut found).expect("well formed");
        assert_eq!((found.len(), splitter.buffered()), (1, r#"{"results":[{"b":"#.len()));
        splitter.push(Bytes::from_static(b"2},"), &mut found).expect("well formed");
        assert_eq!((found.len(), splitter.buffered()), (2, r#"{"results":["#.len()));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-1e9..1e9).prop_map(|n: f64| json!(n)),
            any::<String>().prop_map(Value::from),
            r#"[\[\]{}",:\\aü𝄞 ]{0,60}"#.prop_map(Value::from),
        ];
        leaf.prop_recursive(5, 60, 6, |inner| {
            let name = prop_oneof![any::<String>(), Just(String::from("results")), r#"[\[\]{}"\\]{0,5}"#];
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::vec((name, inner), 0..6).prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn the_elements_are_those_that_serde_json_finds(
            elements in prop::collection::vec(any_json(), 0..8),
            before in any_json(),
            after in any_json(),
            pretty in any::<bool>(),
            sizes in prop::collection::vec(1_usize..40, 1..20),
        ) {
            let whole = json!({"before": before, "results": elements, "after": after});
            let text = if pretty { serde_json::to_string_pretty(&whole) } else { serde_json::to_string(&whole) }.unwrap();
            let (found, beside) = split(text.as_bytes(), &sizes, LARGE).unwrap();
            let found: Vec<Value> = found.iter().map(|element| serde_json::from_str(element).unwrap()).collect();
            let whole: Value = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(&Value::from(found), &whole["results"]);
            let beside: Value = serde_json::from_str(&beside).unwrap();
            prop_assert_eq!(beside, json!({"before": whole["before"], "results": [], "after": whole["after"]}));
        }

        #[test]
        fn no_bytes_break_it_and_borders_change_nothing(
            text in prop::collection::vec(prop::sample::select(&b"{}[]\",:\\ \n1ntres\xc3\xbc"[..]), 0..200),
            open in any::<bool>(),
            sizes in prop::collection::vec(1_usize..9, 1..10),
        ) {
            let text = if open { [&br#"{"results":["#[..], &text].concat() } else { text };
            let run = |sizes: &[usize]| {
                let mut splitter = Splitter::new(50);
                let mut found = Vec::new();
                let mut rest = Bytes::from(text.clone());
                for size in sizes.iter().cycle() {
                    if rest.is_empty() {
                        break;
                    }
                    match splitter.push(rest.split_to((*size).min(rest.len())), &mut found) {
                        Ok(()) => {}
                        // How much had come by then depends on the borders.
                        Err(ElementsError::TooLong { what, .. }) => return (found, Err(what.to_string())),
                        Err(error) => return (found, Err(error.to_string())),
                    }
                }
                (found, splitter.finish().map_err(|error| error.to_string()))
            };
            prop_assert_eq!(run(&sizes), run(&[usize::MAX]));
        }
    }

    #[test]
    fn a_bulk_get_element_is_documents_as_they_came_and_errors() {
        let element = Bytes::from_static(
            br#"{"id":"a\u0041","docs":[{"ok":{"_id":"aA", "n":1e999,"t":"\ud800"}},{"error":{"id":"aA","rev":"2-b","error":"not_found","reason":"missing"}}],"new":1}"#,
        );
        let parsed = BulkGetElement::parse(&element).expect("readable");
        assert_eq!(parsed.id, "aA");
        assert_eq!(parsed.docs[0], Ok(Bytes::from_static(br#"{"_id":"aA", "n":1e999,"t":"\ud800"}"#)));
        let error = parsed.docs[1].as_ref().expect_err("an error");
        assert_eq!((error.id.as_str(), error.rev.as_str()), ("aA", "2-b"));
        assert_eq!((error.error.as_str(), error.reason.as_str()), ("not_found", "missing"));
        let pouchdb =
            Bytes::from_static(br#"{"id":"a","docs":[{"error":{"status":404,"error":true,"reason":null,"name":"not_found"}}]}"#);
        let parsed = BulkGetElement::parse(&pouchdb).expect("readable");
        assert_eq!(parsed.docs[0].as_ref().expect_err("an error").error, "true");
        for text in
            ["1", "{}", r#"{"id":"a"}"#, r#"{"id":1,"docs":[]}"#, r#"{"id":"a","docs":[{}]}"#, r#"{"id":"a","docs":[{"ok":}]}"#]
        {
            assert!(BulkGetElement::parse(&Bytes::from_static(text.as_bytes())).is_err(), "{text}");
        }
    }

    #[test]
    fn of_a_document_only_replications_fields_are_read() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        let text = format!(
            r#"{{"_id":"ä/1","_rev":"3-c","body":{deep},"_deleted":true,"_revisions":{{"start":3,"ids":["c","b","a"]}},
               "_attachments":{{"ü.txt":{{"content_type":"text/plain","revpos":2,"digest":"md5-x","length":5,"stub":true,"encoding":"gzip"}},"n":{{"data":"YQ=="}}}}}}"#
        );
        let doc = Shallow::parse(text.as_bytes()).expect("readable");
        assert_eq!((doc.id.as_str(), doc.rev.as_str(), doc.deleted), ("ä/1", "3-c", true));
        assert_eq!(doc.revisions, Some(Revisions { start: 3, ids: ["c", "b", "a"].map(String::from).to_vec() }));
        let stub = AttachmentInfo {
            length: Some(5),
            stub: true,
            follows: false,
            digest: Some(String::from("md5-x")),
            revpos: Some(2),
            encoding: Some(String::from("gzip")),
        };
        assert_eq!((&doc.attachments["ü.txt"], &doc.attachments["n"]), (&stub, &AttachmentInfo::default()));
        let plain = Shallow::parse(br#"{"_id":"a","_rev":"1-a"}"#).expect("readable");
        assert!(!plain.deleted && plain.attachments.is_empty() && plain.revisions.is_none());
        for text in ["[]", "{}", r#"{"_id":"a"}"#, r#"{"_id":"a","_rev":1}"#, r#"{"_id":"a","_rev":"1-a","_attachments":[]}"#] {
            assert!(Shallow::parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
