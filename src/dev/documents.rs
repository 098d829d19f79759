//! Requests to documents: one at a time, and in bulk.

use super::answer::{Answer, Failure, json_text, json_value, with_body, with_etag, with_location};
use super::database::Database;
use super::databases::url_of;
use super::global_changes::Event;
use super::incoming::{Followed, Incoming, check_id, parse_rev};
use super::multipart;
use super::read::{DocOptions, Found, Read};
use super::request::Call;
use super::server::Server;
use axum::body::Body;
use http::Method;
use rouchdb_core::document::{Document, Revision};
use serde_json::{Value, json};
use std::sync::Arc;

/// `/db/<id>`, where the id may be `_design/x`; `segments` are what follows the database's name.
pub fn document(server: &Server, call: &Call, name: &str, segments: &[String]) -> Answer {
    let db = server.database(name)?;
    match segments {
        [local, id] if local == "_local" => self::local(&db, call, id),
        [design, id] if design == "_design" => one(server, &db, call, &format!("_design/{id}")),
        [design, id, rest @ ..] if design == "_design" && rest.first().is_some_and(|first| first.starts_with('_')) => {
            let _ = id;
            Err(Failure::not_implemented("functions of design documents are not executed"))
        }
        [design, id, rest @ ..] if design == "_design" => attachment(&db, call, &format!("_design/{id}"), &rest.join("/")),
        [local] if local == "_local" => Err(Failure::bad_request("Invalid _local document id.")),
        [design] if design == "_design" => Err(Failure::bad_request("Invalid _design document id.")),
        [id] => one(server, &db, call, id),
        [id, rest @ ..] => attachment(&db, call, id, &rest.join("/")),
        [] => Err(Failure::missing()),
    }
}

fn one(server: &Server, db: &Database, call: &Call, id: &str) -> Answer {
    match call.method {
        Method::GET | Method::HEAD => get(db, call, id),
        Method::PUT => put(server, db, call, id),
        Method::DELETE => delete(server, db, call, id),
        _ => Err(Failure::method_not_allowed("DELETE,GET,HEAD,POST,PUT,COPY")),
    }
}

fn options(call: &Call) -> Result<DocOptions, Failure> {
    let atts_since = match call.query.json("atts_since")? {
        Some(Value::Array(revs)) => revs.iter().filter_map(Value::as_str).map(parse_rev).collect::<Result<_, _>>()?,
        _ => Vec::new(),
    };
    Ok(DocOptions {
        attachments: call.query.is_true("attachments"),
        revs: call.query.is_true("revs"),
        revs_info: call.query.is_true("revs_info"),
        conflicts: call.query.is_true("conflicts"),
        atts_since,
        encoding_info: call.query.is_true("att_encoding_info"),
        follows: false,
    })
}

fn rev_of(call: &Call) -> Result<Option<Revision>, Failure> {
    call.query.get("rev").map(parse_rev).transpose()
}

fn get(db: &Database, call: &Call, id: &str) -> Answer {
    let mut options = options(call)?;
    let latest = call.query.is_true("latest");
    let as_json = call.header("accept").contains("application/json");
    let Some(asked) = call.query.get("open_revs") else {
        check_id(id).map_err(|_| Failure::missing())?;
        options.follows = !as_json;
        let Read { text, rev, following } = db.document(id, rev_of(call)?.as_ref(), latest, &options)?;
        let same = format!("\"{rev}\"");
        if call.header("if-none-match") == same && !call.query.is_true("conflicts") {
            return Ok(with_etag(with_body(304, "application/json", Body::empty()), &rev));
        }
        let answer = if following.is_empty() { json_text(200, text) } else { multipart::related(&text, &following) };
        return Ok(with_etag(answer, &rev));
    };
    let revs = match asked {
        "all" => None,
        text => {
            let texts: Vec<String> = serde_json::from_str(text).map_err(|_| Failure::bad_request("invalid UTF-8 JSON"))?;
            Some(texts.iter().map(|rev| parse_rev(rev)).collect::<Result<Vec<_>, _>>()?)
        }
    };
    // In parts, CouchDB sends the attachments along without being asked; its replicator counts on them.
    options.attachments |= !as_json;
    let found = db.open_revs(id, revs.as_deref(), latest, &options).ok_or_else(Failure::missing)?;
    if !as_json {
        return Ok(multipart::mixed(&found));
    }
    let row = |found: &Found| match found {
        Ok(text) => format!("{{\"ok\":{text}}}"),
        Err(rev) => json!({"missing": rev}).to_string(),
    };
    Ok(json_text(200, format!("[{}]", found.iter().map(row).collect::<Vec<_>>().join(","))))
}

fn put(server: &Server, db: &Database, call: &Call, id: &str) -> Answer {
    check_id(id)?;
    let (mut value, followed) = match multipart::boundary_of(call.header("content-type")) {
        Some(boundary) => multipart::read_related(&call.body, &boundary)?,
        None => (call.json()?, Followed::new()),
    };
    let Value::Object(members) = &mut value else { return Err(Failure::bad_request("Document must be a JSON object")) };
    members.insert("_id".into(), json!(id));
    let new_edits = call.query.get("new_edits") != Some("false");
    let rev = call.query.get("rev").or_else(|| Some(call.header("if-match").trim_matches('"')).filter(|rev| !rev.is_empty()));
    if let Some(rev) = rev {
        let in_body = members.get("_rev").and_then(Value::as_str);
        if in_body.is_some_and(|in_body| in_body != rev) {
            return Err(Failure::bad_request("Document rev from request body and query string have different values"));
        }
        members.insert("_rev".into(), json!(rev));
    }
    let incoming = Incoming::parse_with(value, new_edits, &followed)?;
    let status = if incoming.document.deleted { 200 } else { 201 };
    may_be_written(server, db, &incoming)?;
    let (rev, changed) = db.put(incoming, new_edits)?;
    if changed {
        server.record(Event::Updated, &db.name);
    }
    let answer = json_value(status, &json!({"ok": true, "id": id, "rev": rev.to_string()}));
    Ok(with_location(with_etag(answer, &rev.to_string()), &url_of(server, call, &[&db.name, id])))
}

fn may_be_written(server: &Server, db: &Database, incoming: &Incoming) -> Result<(), Failure> {
    let Document { id, data, .. } = &incoming.document;
    let too_large = server.faults.too_large(id, || data.to_string().len());
    too_large.or_else(|| server.faults.refusal(&db.name, id)).map_or(Ok(()), Err)
}

fn delete(server: &Server, db: &Database, call: &Call, id: &str) -> Answer {
    match db.winner(id) {
        None => return Err(Failure::missing()),
        Some((_, true)) => return Err(Failure::new(404, "not_found", "deleted")),
        Some(_) => {}
    }
    let rev = call.query.get("rev").unwrap_or_else(|| call.header("if-match").trim_matches('"'));
    if rev.is_empty() {
        return Err(Failure::conflict());
    }
    let incoming = Incoming::parse(json!({"_id": id, "_rev": rev, "_deleted": true}), true)?;
    may_be_written(server, db, &incoming)?;
    let (rev, _) = db.put(incoming, true)?;
    server.record(Event::Updated, &db.name);
    Ok(with_etag(json_value(200, &json!({"ok": true, "id": id, "rev": rev.to_string()})), &rev.to_string()))
}

/// `POST /db`: a document whose id may be left to the server.
pub fn post(server: &Server, call: &Call, name: &str) -> Answer {
    let db = server.database(name)?;
    let incoming = Incoming::parse(call.posted_json()?, true)?;
    let id = incoming.document.id.clone();
    if id.starts_with("_local/") {
        let rev = write_local(&db, &incoming.document)?;
        return Ok(json_value(201, &json!({"ok": true, "id": id, "rev": rev})));
    }
    may_be_written(server, &db, &incoming)?;
    let (rev, _) = db.put(incoming, true)?;
    server.record(Event::Updated, &db.name);
    let answer = json_value(201, &json!({"ok": true, "id": id, "rev": rev.to_string()}));
    Ok(with_location(answer, &url_of(server, call, &[name, &id])))
}

fn local(db: &Database, call: &Call, id: &str) -> Answer {
    if id.is_empty() {
        return Err(Failure::bad_request("Invalid _local document id."));
    }
    match call.method {
        Method::GET | Method::HEAD => {
            let (text, rev) = db.local(id)?;
            Ok(with_etag(json_text(200, text), &rev))
        }
        Method::PUT => {
            let Value::Object(mut members) = call.json()? else {
                return Err(Failure::bad_request("Document must be a JSON object"));
            };
            if let Some(rev) = call.query.get("rev") {
                members.insert("_rev".into(), json!(rev));
            }
            members.insert("_id".into(), json!(format!("_local/{id}")));
            let document = Incoming::parse(Value::Object(members), true)?.document;
            let rev = write_local(db, &document)?;
            let status = if document.deleted { 200 } else { 201 };
            Ok(with_etag(json_value(status, &json!({"ok": true, "id": document.id, "rev": rev})), &rev))
        }
        Method::DELETE => {
            db.delete_local(id)?;
            Ok(json_value(200, &json!({"ok": true, "id": format!("_local/{id}"), "rev": "0-0"})))
        }
        _ => Err(Failure::method_not_allowed("DELETE,GET,HEAD,POST,PUT,COPY")),
    }
}

fn write_local(db: &Database, document: &Document) -> Result<String, Failure> {
    let id = document.id.strip_prefix("_local/").unwrap_or(&document.id);
    let rev = local_rev(document.rev.as_ref())?;
    if document.deleted {
        db.delete_local(id)?;
        return Ok(String::from("0-0"));
    }
    Ok(db.put_local(id, rev, &document.data))
}

fn local_rev(rev: Option<&Revision>) -> Result<u64, Failure> {
    let Some(rev) = rev else { return Ok(0) };
    rev.hash.parse().map_err(|_| Failure::bad_request("Invalid rev format"))
}

fn attachment(db: &Database, call: &Call, id: &str, name: &str) -> Answer {
    if !matches!(call.method, Method::GET | Method::HEAD) {
        return Err(Failure::not_implemented("attachments are written inline, with their document"));
    }
    let attachment = db.attachment(id, name, rev_of(call)?.as_ref())?;
    let tag = attachment.meta.digest.trim_start_matches("md5-").to_string();
    Ok(with_etag(with_body(200, &attachment.meta.content_type, Body::from(attachment.data)), &tag))
}

pub fn bulk_docs(server: &Server, db: &Arc<Database>, call: &Call) -> Answer {
    let rows = write_bulk(server, db, call.posted_json()?)?;
    Ok(json_value(201, &Value::Array(rows)))
}

/// `_bulk_docs`: what cannot be understood refuses all of it, a conflict only its own row.
pub(super) fn write_bulk(server: &Server, db: &Database, mut body: Value) -> Result<Vec<Value>, Failure> {
    let new_edits = body.get("new_edits").and_then(Value::as_bool) != Some(false);
    let docs = match body.get_mut("docs").map(Value::take) {
        Some(Value::Array(docs)) => docs,
        Some(_) => return Err(Failure::bad_request("`docs` parameter must be an array.")),
        None if body.is_object() => return Err(Failure::bad_request("POST body must include `docs` parameter.")),
        None => return Err(Failure::bad_request("Request body must be a JSON object")),
    };
    let parsed: Vec<Incoming> = docs.into_iter().map(|doc| Incoming::parse(doc, new_edits)).collect::<Result<_, _>>()?;
    let too_large = |incoming: &Incoming| {
        let Document { id, data, .. } = &incoming.document;
        server.faults.too_large(id, || data.to_string().len())
    };
    if let Some(failure) = parsed.iter().find_map(too_large) {
        return Err(failure);
    }
    let mut rows = Vec::new();
    let mut any_changed = false;
    let mut whole = Ok(());
    for incoming in parsed {
        let id = incoming.document.id.clone();
        if id.starts_with("_local/") {
            // Deleting what is not there is fine here, and only here.
            let row = match write_local(db, &incoming.document) {
                Err(failure) if failure.status == 404 => json!({"ok": true, "id": id, "rev": "0-0"}),
                Err(failure) => json!({"id": id, "error": "error", "reason": failure.reason}),
                Ok(rev) => json!({"ok": true, "id": id, "rev": rev}),
            };
            rows.extend((new_edits || row.get("error").is_some()).then_some(row));
            continue;
        }
        let rev = incoming.document.rev.as_ref().filter(|_| !new_edits).map(Revision::to_string);
        let written = match server.faults.refusal(&db.name, &id) {
            Some(refusal) => Err(refusal),
            None => db.put(incoming, new_edits),
        };
        match written {
            Ok((rev, changed)) => {
                any_changed |= changed;
                if new_edits {
                    rows.push(json!({"ok": true, "id": id, "rev": rev.to_string()}));
                }
            }
            Err(failure) if failure.error == "missing_stub" => {
                whole = Err(failure);
                break;
            }
            Err(failure) => {
                let mut row = json!({"id": id, "error": failure.error, "reason": failure.reason});
                if let Some(rev) = rev {
                    row["rev"] = json!(rev);
                }
                rows.push(row);
            }
        }
    }
    if any_changed {
        server.record(Event::Updated, &db.name);
    }
    whole.map(|()| rows)
}

pub fn bulk_get(db: &Database, call: &Call) -> Answer {
    let body = call.posted_json()?;
    let docs = body.get("docs").and_then(Value::as_array).ok_or_else(|| Failure::bad_request("Missing JSON list of 'docs'."))?;
    Ok(json_text(200, db.bulk_get(docs, call.query.is_true("latest"), &options(call)?)))
}

pub fn revs_diff(db: &Database, call: &Call) -> Answer {
    let body = call.posted_json()?;
    let asked = body.as_object().ok_or_else(|| Failure::bad_request("Request body must be a JSON object"))?;
    Ok(json_value(200, &db.revs_diff(asked)?))
}
