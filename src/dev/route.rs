//! One request's way: faults, password, endpoint.

use super::answer::{Answer, Failure, json_value, with_retry_after};
use super::request::{Call, Query};
use super::server::Server;
use super::{changes, databases, documents, replicate, session};
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

/// A request's body is read whole.
const BODY_BYTES_MAX: usize = 256 * 1024 * 1024;
/// Before a cut, so that what was sent arrives: the cut is in the middle, not at the start.
const CUT_AFTER: Duration = Duration::from_millis(20);

pub async fn answer(State(server): State<Arc<Server>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let segments = match Call::segments_of(parts.uri.path()) {
        Ok(segments) => segments,
        Err(failure) => return failure.into_response(),
    };
    let own = segments.first().is_some_and(|first| first == "_dev");
    if !own {
        server.count(parts.method.as_str(), endpoint_of(&segments));
    }
    let met = match own {
        true => Default::default(),
        false => server.faults.meet(&parts.method, &format!("/{}", segments.join("/"))),
    };
    tokio::time::sleep(met.delay).await;
    if let Some((status, false, after)) = met.status {
        return faulty(status, after);
    }
    let Ok(body) = axum::body::to_bytes(body, BODY_BYTES_MAX).await else {
        return Failure::new(413, "too_large", "the request entity is too large").into_response();
    };
    let query = Query::parse(parts.uri.query().unwrap_or(""));
    let call = Call { method: parts.method, segments, query, headers: parts.headers, body };
    let answer = guarded(&server, &call).await;
    let mut response = answer.unwrap_or_else(Failure::into_response);
    if let Some((status, true, after)) = met.status {
        match http::StatusCode::from_u16(status) {
            Ok(status) if status.is_success() && !response.status().is_success() => {}
            Ok(code) if code.is_success() => *response.status_mut() = code,
            _ => response = faulty(status, after),
        }
    }
    match met.cut {
        Some(after) => cut(response, after),
        None => response,
    }
}

fn faulty(status: u16, after: Option<u64>) -> Response {
    let error = match status {
        401 => "unauthorized",
        403 => "forbidden",
        404 => "not_found",
        409 => "conflict",
        429 => "too_many_requests",
        503 => "service_unavailable",
        _ => "internal_server_error",
    };
    let response = Failure::new(status, error, "a fault that was asked for").into_response();
    match after {
        Some(seconds) => with_retry_after(response, seconds),
        None => response,
    }
}

async fn guarded(server: &Arc<Server>, call: &Call) -> Answer {
    let admin = session::admin_of(server, &call.headers);
    if call.segments.len() == 1 && call.segments[0] == "_session" && call.method == http::Method::POST {
        return session::answer(server, call, None);
    }
    let admin = admin?;
    let path: Vec<&str> = call.segments.iter().map(String::as_str).collect();
    match (call.method.as_str(), &path[..], admin.is_some()) {
        ("GET" | "HEAD", [], _) => databases::welcome(server),
        ("GET" | "HEAD", ["_up"], _) => databases::up(),
        (_, ["_session"], _) => session::answer(server, call, admin),
        (_, _, true) => endpoint(server, call, &path).await,
        ("PUT" | "DELETE", [_], false) => Err(Failure::new(401, "unauthorized", "You are not a server admin.")),
        (_, [db, ..], false) if is_database(db) => {
            server.database(db)?;
            Err(Failure::new(401, "unauthorized", "You are not authorized to access this db."))
        }
        _ => Err(Failure::new(401, "unauthorized", "You are not a server admin.")),
    }
}

/// Everything else that begins with an underscore belongs to the server.
fn is_database(first: &str) -> bool {
    !first.starts_with('_') || matches!(first, "_users" | "_replicator" | "_global_changes")
}

async fn endpoint(server: &Arc<Server>, call: &Call, path: &[&str]) -> Answer {
    match (call.method.as_str(), path) {
        (_, ["_dev", rest @ ..]) => own(server, call, rest),
        ("GET", ["_all_dbs"]) => databases::all_dbs(server, call),
        ("POST", ["_dbs_info"]) => databases::dbs_info(server, call),
        ("POST", ["_replicate"]) => Box::pin(replicate::answer(server, call)).await,
        ("GET", ["_active_tasks"]) => Ok(json_value(200, &json!([]))),
        ("GET", ["_scheduler", "jobs"]) => Ok(json_value(200, &json!({"total_rows": 0, "offset": 0, "jobs": []}))),
        ("GET", ["_scheduler", "docs", ..]) => Ok(json_value(200, &json!({"total_rows": 0, "offset": 0, "docs": []}))),
        (_, ["_node", "_local", "_config", ..]) => databases::config(server, call),
        (_, [db, rest @ ..]) if is_database(db) => in_database(server, call, db, rest),
        ("GET" | "PUT" | "DELETE", [db]) if !RESERVED.contains(db) => databases::database(server, call, db),
        _ => Err(Failure::not_implemented(format!("{} /{}", call.method, path.join("/")))),
    }
}

/// Names that CouchDB answers itself: they never were databases.
const RESERVED: [&str; 10] = [
    "_all_dbs",
    "_active_tasks",
    "_cluster_setup",
    "_db_updates",
    "_dbs_info",
    "_membership",
    "_node",
    "_replicate",
    "_scheduler",
    "_session",
];

fn in_database(server: &Arc<Server>, call: &Call, db: &str, path: &[&str]) -> Answer {
    match (call.method.as_str(), path) {
        (_, []) => databases::database(server, call, db),
        (_, ["_security"]) => databases::security(server, call, db),
        ("GET" | "POST", ["_changes"]) => changes::answer(server, server.database(db)?, call),
        ("GET" | "POST", ["_all_docs" | "_local_docs" | "_design_docs"]) => databases::listing(server, call, db),
        ("POST", ["_bulk_docs"]) => documents::bulk_docs(server, &server.database(db)?, call),
        ("POST", ["_bulk_get"]) => documents::bulk_get(&*server.database(db)?, call),
        ("POST", ["_revs_diff"]) => documents::revs_diff(&*server.database(db)?, call),
        ("POST", ["_ensure_full_commit"]) => {
            let started = server.database(db)?.started_secs.to_string();
            Ok(json_value(201, &json!({"ok": true, "instance_start_time": started})))
        }
        ("GET" | "HEAD", ["_changes" | "_bulk_docs" | "_bulk_get" | "_revs_diff"]) => Err(Failure::method_not_allowed("POST")),
        (_, [first, ..]) if first.starts_with('_') && !matches!(*first, "_local" | "_design") => {
            server.database(db)?;
            Err(Failure::not_implemented(format!("{} /{{db}}/{}", call.method, path.join("/"))))
        }
        _ => documents::document(server, call, db, &call.segments[1..]),
    }
}

/// `/_dev/…`: what no CouchDB has.
fn own(server: &Server, call: &Call, path: &[&str]) -> Answer {
    match (call.method.as_str(), path) {
        ("POST", ["faults"]) => {
            server.faults.apply_json(call.posted_json()?)?;
            Ok(json_value(200, &json!({"ok": true})))
        }
        ("DELETE", ["faults"]) => {
            server.faults.clear();
            Ok(json_value(200, &json!({"ok": true})))
        }
        ("POST", ["snapshot" | "restore" | "remake"]) => {
            let body = call.posted_json()?;
            let db =
                body.get("db").and_then(serde_json::Value::as_str).ok_or_else(|| Failure::bad_request("`db` must be a name"))?;
            match path {
                ["snapshot"] => server.snapshot(db)?,
                ["restore"] => server.restore(db)?,
                _ => server.remake(db)?,
            }
            Ok(json_value(200, &json!({"ok": true})))
        }
        ("GET", ["requests"]) => Ok(json_value(200, &json!(server.counts()))),
        ("DELETE", ["requests"]) => {
            server.reset_counts();
            Ok(json_value(200, &json!({"ok": true})))
        }
        _ => Err(Failure::not_implemented(format!("{} /_dev/{}", call.method, path.join("/")))),
    }
}

/// The kind of endpoint, for the counters: few words, whatever is asked for.
fn endpoint_of(segments: &[String]) -> &'static str {
    let path: Vec<&str> = segments.iter().map(String::as_str).collect();
    match &path[..] {
        [] => "/",
        ["_up"] => "/_up",
        ["_session"] => "/_session",
        ["_all_dbs"] => "/_all_dbs",
        ["_dbs_info"] => "/_dbs_info",
        ["_replicate"] => "/_replicate",
        ["_scheduler", ..] => "/_scheduler",
        ["_active_tasks"] => "/_active_tasks",
        ["_node", ..] => "/_node",
        [db] if is_database(db) => "/{db}",
        [db, rest @ ..] if is_database(db) => match rest {
            ["_changes"] => "/{db}/_changes",
            ["_all_docs"] => "/{db}/_all_docs",
            ["_design_docs"] => "/{db}/_design_docs",
            ["_local_docs"] => "/{db}/_local_docs",
            ["_bulk_docs"] => "/{db}/_bulk_docs",
            ["_bulk_get"] => "/{db}/_bulk_get",
            ["_revs_diff"] => "/{db}/_revs_diff",
            ["_security"] => "/{db}/_security",
            ["_local", ..] => "/{db}/_local/{id}",
            ["_design", ..] => "/{db}/_design/{id}",
            [id] if !id.starts_with('_') => "/{db}/{id}",
            [id, ..] if !id.starts_with('_') => "/{db}/{id}/{attachment}",
            _ => "other",
        },
        _ => "other",
    }
}

/// The answer's beginning, and then the end of the connection.
fn cut(response: Response, after: Option<usize>) -> Response {
    let (mut parts, body) = response.into_parts();
    parts.headers.remove(http::header::CONTENT_LENGTH);
    let begin = Beginning { body: body.into_data_stream(), left: after, over: false };
    let pieces = stream::unfold(begin, |mut begin| async move { begin.next().await.map(|piece| (piece, begin)) });
    Response::from_parts(parts, Body::from_stream(pieces))
}

struct Beginning {
    body: axum::body::BodyDataStream,
    /// How many bytes may still go; None until the first piece is known, half of which is sent.
    left: Option<usize>,
    over: bool,
}

impl Beginning {
    async fn next(&mut self) -> Option<std::io::Result<Bytes>> {
        if !self.over
            && let Some(Ok(piece)) = self.body.next().await
        {
            let left = self.left.unwrap_or(piece.len() / 2);
            self.left = Some(left.saturating_sub(piece.len()));
            self.over = left <= piece.len();
            return Some(Ok(piece.slice(..left.min(piece.len()))));
        }
        tokio::time::sleep(CUT_AFTER).await;
        Some(Err(std::io::ErrorKind::ConnectionReset.into()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_endpoints() {
        let cases = [
            ("/", "/"),
            ("/a%2Fb", "/{db}"),
            ("/a%2Fb/_changes", "/{db}/_changes"),
            ("/_users/org.couchdb.user:x", "/{db}/{id}"),
            ("/a/_local/x", "/{db}/_local/{id}"),
            ("/a/b/c/d", "/{db}/{id}/{attachment}"),
            ("/_nonsense/x", "other"),
        ];
        for (path, expected) in cases {
            let segments = Call::segments_of(path).expect("the path is UTF-8");
            assert_eq!(endpoint_of(&segments), expected, "{path}");
        }
    }
}
