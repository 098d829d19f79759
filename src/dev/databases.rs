//! Requests to the server itself and to a database as a whole.

use super::VERSION;
use super::answer::{Answer, Failure, json_text, json_value, with_location};
use super::read::Listing;
use super::request::{Call, Query};
use super::server::Server;
use http::Method;
use serde_json::{Value, json};

pub fn welcome(server: &Server) -> Answer {
    let vendor = json!({"name": "Spiegel's embedded server"});
    let body =
        json!({"couchdb": "Welcome", "version": VERSION, "git_sha": "", "uuid": server.uuid, "features": [], "vendor": vendor});
    Ok(json_value(200, &body))
}

pub fn up() -> Answer {
    Ok(json_value(200, &json!({"status": "ok", "seeds": {}})))
}

pub fn all_dbs(server: &Server, call: &Call) -> Answer {
    let listing = Listing::parse(&call.query)?;
    let text = |value: &Option<Value>| value.as_ref().and_then(Value::as_str).map(String::from);
    let mut names = server.names();
    if listing.descending {
        names.reverse();
    }
    let (start, end) = (text(&listing.start), text(&listing.end));
    names.retain(|name| {
        let (low, high) = if listing.descending { (&end, &start) } else { (&start, &end) };
        let excluded = listing.exclusive_end && end.as_ref() == Some(name);
        low.as_ref().is_none_or(|low| name >= low) && high.as_ref().is_none_or(|high| name <= high) && !excluded
    });
    let skip = usize::try_from(listing.skip).unwrap_or(usize::MAX);
    let limit = listing.limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
    let names: Vec<String> = names.into_iter().skip(skip).take(limit).collect();
    Ok(json_value(200, &json!(names)))
}

/// CouchDB's `max_db_number_for_dbs_info_req`.
const DBS_INFO_KEYS_MAX: usize = 100;

pub fn dbs_info(server: &Server, call: &Call) -> Answer {
    let body = call.posted_json()?;
    let keys = body.get("keys").and_then(Value::as_array).ok_or_else(|| Failure::bad_request("`keys` member must exist."))?;
    if keys.len() > DBS_INFO_KEYS_MAX {
        return Err(Failure::bad_request("too_many_keys"));
    }
    let info_of = |key: &Value| match key.as_str().map(|name| server.database(name)) {
        Some(Ok(db)) => json!({"key": key, "info": db.info()}),
        _ => json!({"key": key, "error": "not_found"}),
    };
    Ok(json_value(200, &Value::Array(keys.iter().map(info_of).collect())))
}

pub fn config(server: &Server, call: &Call) -> Answer {
    if call.method != Method::GET {
        return Err(Failure::not_implemented("the configuration is read-only"));
    }
    match &call.segments[..] {
        [_, _, _, section] => Ok(json_value(200, &server.config(section, None)?)),
        [_, _, _, section, key] => Ok(json_value(200, &server.config(section, Some(key))?)),
        _ => Err(Failure::not_implemented("_config as a whole")),
    }
}

pub fn database(server: &Server, call: &Call, name: &str) -> Answer {
    match call.method {
        Method::GET | Method::HEAD => Ok(json_value(200, &server.database(name)?.info())),
        Method::PUT => {
            // Taken and not heeded: a database in memory has one shard.
            for count in ["q", "n"] {
                if call.query.get(count).is_some_and(|text| text.parse::<u32>().unwrap_or(0) == 0) {
                    return Err(Failure::bad_request(format!("The `{count}` value should be a positive integer.")));
                }
            }
            server.create(name)?;
            Ok(with_location(json_value(201, &json!({"ok": true})), &url_of(server, call, &[name])))
        }
        Method::DELETE if call.query.get("rev").is_some() => Err(Failure::bad_request(
            "You tried to DELETE a database with a ?=rev parameter. Did you mean to DELETE a document instead?",
        )),
        Method::DELETE => {
            server.delete(name)?;
            Ok(json_value(200, &json!({"ok": true})))
        }
        Method::POST => super::documents::post(server, call, name),
        _ => Err(Failure::method_not_allowed("DELETE,GET,HEAD,POST")),
    }
}

pub fn security(server: &Server, call: &Call, name: &str) -> Answer {
    let db = server.database(name)?;
    match call.method {
        Method::GET => Ok(json_value(200, &db.security())),
        Method::PUT => {
            let security = call.json()?;
            if !security.is_object() {
                return Err(Failure::bad_request("Request body must be a JSON object"));
            }
            db.set_security(security);
            Ok(json_value(200, &json!({"ok": true})))
        }
        _ => Err(Failure::method_not_allowed("PUT,GET")),
    }
}

/// `_all_docs`, `_design_docs` and `_local_docs`.
pub fn listing(server: &Server, call: &Call, name: &str) -> Answer {
    let db = server.database(name)?;
    let mut listing = Listing::parse(&call.query)?;
    if call.method == Method::POST {
        let body = call.posted_json()?;
        if body.get("queries").is_some() {
            return Err(Failure::not_implemented("several queries at once"));
        }
        listing = Listing::parse_with_body(&call.query, &body)?;
    }
    let text = match call.segments[1].as_str() {
        "_local_docs" => db.local_docs(&listing),
        "_design_docs" => db.all_docs(&listing, "_design/"),
        _ => db.all_docs(&listing, ""),
    };
    Ok(json_text(200, text))
}

impl Listing {
    fn parse(query: &Query) -> Result<Self, Failure> {
        let either = |a: &str, b: &str| Ok(query.json(a)?.or(query.json(b)?));
        let key = query.json("key")?;
        let keys = query.json("keys")?;
        Ok(Self {
            start: key.clone().or(either("startkey", "start_key")?),
            end: key.or(either("endkey", "end_key")?),
            exclusive_end: query.get("inclusive_end") == Some("false"),
            descending: query.is_true("descending"),
            limit: query.number("limit")?,
            skip: query.number("skip")?.unwrap_or(0),
            keys: keys.map(list_of_keys).transpose()?,
            include_docs: query.is_true("include_docs"),
            conflicts: query.is_true("conflicts"),
            update_seq: query.is_true("update_seq"),
        })
    }

    /// A POST may say in its body what a GET says in its query.
    fn parse_with_body(query: &Query, body: &Value) -> Result<Self, Failure> {
        Self::parse(&query.with_body(body))
    }
}

fn list_of_keys(keys: Value) -> Result<Vec<Value>, Failure> {
    match keys {
        Value::Array(keys) => Ok(keys),
        _ => Err(Failure::bad_request("`keys` body member must be an array.")),
    }
}

pub fn url_of(server: &Server, call: &Call, segments: &[&str]) -> String {
    let host = match call.header("host") {
        "" => server.address.to_string(),
        host => host.to_string(),
    };
    let path: Vec<String> = segments.iter().map(|segment| crate::couch::encode_segment(segment)).collect();
    format!("http://{host}/{}", path.join("/"))
}
