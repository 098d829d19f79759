//! Documents in several parts: `multipart/related` as CouchDB's replicator writes documents with their attachments, and
//! `multipart/mixed` as it reads open revisions.

use super::answer::{Failure, with_body};
use super::database::Attachment;
use super::incoming::{Followed, new_id};
use super::read::Found;
use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use serde_json::{Value, json};

/// The boundary of a `multipart/related` body.
pub fn boundary_of(content_type: &str) -> Option<String> {
    let parameters = content_type.strip_prefix("multipart/related")?;
    let boundary = parameters.split(';').find_map(|parameter| parameter.trim().strip_prefix("boundary="))?;
    Some(boundary.trim_matches('"').to_string()).filter(|boundary| !boundary.is_empty())
}

/// The document and the attachments that follow it, in the order in which its `_attachments` name them, or by the name in
/// a part's `Content-Disposition`.
pub fn read_related(body: &Bytes, boundary: &str) -> Result<(Value, Followed), Failure> {
    let malformed = || Failure::bad_request("malformed multipart body");
    let mut parts = parts_of(body, boundary).into_iter();
    let (_, first) = parts.next().ok_or_else(malformed)?;
    let value: Value = serde_json::from_slice(&first).map_err(|_| Failure::bad_request("invalid UTF-8 JSON"))?;
    let mut unnamed = followers_in_order(&first).into_iter();
    let mut followed = Followed::new();
    for (head, data) in parts {
        let name = file_name(&head).or_else(|| unnamed.next()).ok_or_else(malformed)?;
        followed.insert(name, data);
    }
    Ok((value, followed))
}

/// The names in `_attachments` that say `follows`, in the order of the text: the JSON map of this program sorts its keys.
fn followers_in_order(text: &[u8]) -> Vec<String> {
    struct InOrder(Vec<String>);
    impl<'de> serde::Deserialize<'de> for InOrder {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Visitor;
            impl<'de> serde::de::Visitor<'de> for Visitor {
                type Value = InOrder;

                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("an object")
                }

                fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<InOrder, A::Error> {
                    let mut names = Vec::new();
                    while let Some((name, value)) = map.next_entry::<String, Value>()? {
                        if value.get("follows") == Some(&Value::Bool(true)) {
                            names.push(name);
                        }
                    }
                    Ok(InOrder(names))
                }
            }
            deserializer.deserialize_map(Visitor)
        }
    }
    #[derive(serde::Deserialize)]
    struct Doc {
        #[serde(rename = "_attachments")]
        attachments: Option<InOrder>,
    }
    serde_json::from_slice::<Doc>(text).ok().and_then(|doc| doc.attachments).map_or_else(Vec::new, |names| names.0)
}

/// Each part's head and data.
fn parts_of(body: &Bytes, boundary: &str) -> Vec<(String, Bytes)> {
    let marker = format!("--{boundary}");
    let mut parts = Vec::new();
    let Some(mut at) = find(body, marker.as_bytes(), 0).map(|at| at + marker.len()) else { return parts };
    let closing = format!("\r\n{marker}");
    while body.get(at..at + 2) == Some(b"\r\n") {
        let Some(end) = find(body, closing.as_bytes(), at) else { break };
        let part = body.slice(at..end);
        let (head, data) = match find(&part, b"\r\n\r\n", 0) {
            Some(split) => (String::from_utf8_lossy(&part[..split]).into_owned(), part.slice(split + 4..)),
            None => (String::new(), part),
        };
        parts.push((head, data));
        at = end + closing.len();
    }
    parts
}

fn find(text: &[u8], wanted: &[u8], from: usize) -> Option<usize> {
    let rest = text.get(from..)?;
    rest.windows(wanted.len()).position(|window| window == wanted).map(|at| at + from)
}

fn file_name(head: &str) -> Option<String> {
    let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with("content-disposition:"))?;
    let (_, name) = line.split_once("filename=\"")?;
    // As CouchDB writes it: a quote within the name is not escaped.
    Some(name.rsplit_once('"')?.0.to_string())
}

/// A document and the attachments that its text announces; those that are kept compressed go as they are.
pub fn related(text: &str, following: &[(String, Attachment)]) -> Response {
    let boundary = new_id();
    let mut body = format!("--{boundary}\r\nContent-Type: application/json\r\n\r\n{text}").into_bytes();
    for (name, attachment) in following {
        let data = attachment.zipped.as_ref().unwrap_or(&attachment.data);
        let coding = if attachment.zipped.is_some() { "\r\nContent-Encoding: gzip" } else { "" };
        let (kind, length) = (&attachment.meta.content_type, data.len());
        let head = format!(
            "\r\n--{boundary}\r\nContent-Disposition: attachment; filename=\"{name}\"\r\nContent-Type: {kind}\r\n\
             Content-Length: {length}{coding}\r\n\r\n"
        );
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(data);
    }
    body.extend_from_slice(format!("\r\n--{boundary}--").as_bytes());
    with_body(200, &format!("multipart/related; boundary=\"{boundary}\""), Body::from(body))
}

/// Open revisions for a client that does not ask for JSON.
pub fn mixed(found: &[Found]) -> Response {
    let boundary = new_id();
    let mut body = String::new();
    for found in found {
        let (kind, text) = match found {
            Ok(text) => ("application/json", text.clone()),
            Err(rev) => ("application/json; error=\"true\"", json!({"missing": rev}).to_string()),
        };
        body.push_str(&format!("--{boundary}\r\nContent-Type: {kind}\r\n\r\n{text}\r\n"));
    }
    body.push_str(&format!("--{boundary}--"));
    with_body(200, &format!("multipart/mixed; boundary=\"{boundary}\""), Body::from(body))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn attachments_follow_in_the_order_of_the_text() {
        let boundary = boundary_of("multipart/related; boundary=\"xyz\"").expect("there is a boundary");
        let doc = r#"{"_attachments":{"z":{"follows":true,"length":2},"s":{"stub":true},"a":{"follows":true,"length":5}}}"#;
        let body =
            format!("--xyz\r\nContent-Type: application/json\r\n\r\n{doc}\r\n--xyz\r\n\r\nzz\r\n--xyz\r\n\r\naa\r\na\r\n--xyz--");
        let (_, followed) = read_related(&Bytes::from(body), &boundary).expect("it is readable");
        assert_eq!(followed["z"], "zz");
        assert_eq!(followed["a"], "aa\r\na");
    }

    #[test]
    fn a_broken_body_is_refused() {
        for body in ["", "--x", "--x\r\n", "--x\r\n\r\n{}", "--x\r\n\r\n{}\r\n--x\r\n\r\nsurplus\r\n--x--"] {
            assert!(read_related(&Bytes::from(body), "x").is_err(), "{body}");
        }
    }
}
