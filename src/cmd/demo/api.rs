//! The API of the blog: what a user of Spiegel writes, in a language of choice. It knows nothing of Spiegel but two routes.

use super::blog::{ALL_POSTS, STATS, STATS_ID, user_db};
use super::progress::{Progress, Version};
use super::story::{Story, Who};
use crate::couch::{ChangesQuery, Couch, CouchError, WriteResult};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::routing::put;
use axum::{Json, Router};
use base64::Engine;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::AbortHandle;

pub const AFTER_USER_CREATED: &str = "/after-user-created";
pub const CALC_STATS: &str = "/calc-stats";
/// As in the article. The rules name the user only; Spiegel adds the password from its vault.
pub const USER: &str = "user";
pub const PASSWORD: &str = "secret";
/// More than the demo ever writes.
const POSTS_MAX: usize = 1000;
/// Often enough that a line stands close to what it tells.
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(10);

pub struct Api {
    pub couch: Couch,
    /// Where rules and replicators live.
    pub spiegel_db: String,
    /// As a replicator names the server: with a user and without a password.
    pub couch_url: String,
    pub story: Arc<Story>,
    pub progress: Arc<Progress>,
    /// Two counts at once could store the older one last.
    pub counting: tokio::sync::Mutex<()>,
}

type Answer = Result<&'static str, (StatusCode, String)>;

/// Serves on a free port until the handle aborts it.
pub fn serve(listener: TcpListener, api: Arc<Api>) -> AbortHandle {
    let router =
        Router::new().route(AFTER_USER_CREATED, put(after_user_created)).route(CALC_STATS, put(calc_stats)).with_state(api);
    tokio::spawn(async move { axum::serve(listener, router).await }).abort_handle()
}

pub async fn listen() -> std::io::Result<(TcpListener, SocketAddr)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Makes the database of a new user and its replicator; for a known user nothing is left to do.
async fn after_user_created(State(api): State<Arc<Api>>, headers: HeaderMap, Json(body): Json<Value>) -> Answer {
    let version = api.accept(AFTER_USER_CREATED, &headers, &body)?;
    // `_users` holds a design document too.
    let Some(name) = version.id.strip_prefix("org.couchdb.user:") else { return Ok("ignored") };
    api.story.event(Who::Spiegel, &format!("→ PUT {AFTER_USER_CREATED}  ({name})"));
    api.make_room_for(name).await.map_err(|error| api.failed(&error))?;
    api.story.event(Who::Api, &format!("made the database {} and its replicator", user_db(name)));
    api.progress.note(|seen| {
        seen.signed_up.insert(name.to_string());
        *seen.calls.entry(AFTER_USER_CREATED).or_default() += 1;
    });
    Ok("done")
}

/// Counts the posts of all and stores the number where it does not start another count.
async fn calc_stats(State(api): State<Arc<Api>>, headers: HeaderMap, Json(body): Json<Value>) -> Answer {
    let version = api.accept(CALC_STATS, &headers, &body)?;
    // The call proves the arrival, where it is quicker than the eye that watches for it.
    api.tell_arrival(&version, body["change"]["_deleted"] == true);
    api.story.event(Who::Spiegel, &format!("→ PUT {CALC_STATS}  ({})", version.id));
    let stats = {
        let _alone = api.counting.lock().await;
        api.count_posts().await.map_err(|error| api.failed(&error))?
    };
    api.story.event(Who::Api, &format!("counted {} by {}, stored in {STATS}", stats.posts, stats.authors));
    api.progress.note(|seen| {
        seen.called.insert(version);
        *seen.calls.entry(CALC_STATS).or_default() += 1;
    });
    Ok("done")
}

/// "5 posts", "1 author".
struct Stats {
    posts: String,
    authors: String,
}

impl Api {
    /// Who is allowed, and which version the change is about.
    fn accept(&self, path: &str, headers: &HeaderMap, body: &Value) -> Result<Version, (StatusCode, String)> {
        let expected = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}")));
        if headers.get(header::AUTHORIZATION).is_none_or(|given| given.as_bytes() != expected.as_bytes()) {
            self.story.event(Who::Api, &format!("refused a PUT {path}: wrong user or password"));
            self.progress.note(|seen| seen.calls_failed += 1);
            return Err((StatusCode::UNAUTHORIZED, String::from("who are you?")));
        }
        // `$change` is the document.
        let change = &body["change"];
        match (change["_id"].as_str(), change["_rev"].as_str()) {
            (Some(id), Some(rev)) => Ok(Version { id: id.to_string(), rev: rev.to_string() }),
            _ => {
                self.story.event(Who::Api, &format!("refused a PUT {path}: no document in it"));
                self.progress.note(|seen| seen.calls_failed += 1);
                Err((StatusCode::BAD_REQUEST, String::from("no change in the body")))
            }
        }
    }

    /// Spiegel tries again later.
    fn failed(&self, error: &CouchError) -> (StatusCode, String) {
        self.story.event(Who::Api, &format!("failed: {error}"));
        self.progress.note(|seen| seen.calls_failed += 1);
        (StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
    }

    async fn make_room_for(&self, name: &str) -> Result<(), CouchError> {
        let db = user_db(name);
        self.couch.create_db(&db).await?;
        let replicator = json!({
            "type": "replicator", "source": format!("{}/{db}", self.couch_url), "target": format!("{}/{ALL_POSTS}", self.couch_url)
        });
        // A conflict means that an earlier call wrote it.
        self.couch.put_doc(&self.spiegel_db, &format!("replicator_{db}"), &replicator).await.map(drop)
    }

    async fn count_posts(&self) -> Result<Stats, CouchError> {
        let posts = self.couch.docs_by_prefix(ALL_POSTS, "", None, POSTS_MAX).await?;
        let authors: BTreeSet<_> = posts.iter().filter_map(|post| post["author"].as_str()).collect();
        let mut stats = json!({ "posts": posts.len(), "authors": authors.len() });
        if let Some(old) = self.couch.get_doc(STATS, STATS_ID).await? {
            stats["_rev"] = old["_rev"].clone();
        }
        match self.couch.put_doc(STATS, STATS_ID, &stats).await? {
            WriteResult::Saved { .. } => {
                Ok(Stats { posts: plural(posts.len(), "post"), authors: plural(authors.len(), "author") })
            }
            _ => Err(CouchError::Conflict(format!("{STATS}/{STATS_ID}"))),
        }
    }

    /// Once for each version, whoever sees it first; told before anybody else can know, so that the lines keep their order.
    fn tell_arrival(&self, version: &Version, is_deleted: bool) {
        let what = if is_deleted { "the deletion of " } else { "" };
        self.progress.note(|seen| {
            if seen.arrived.insert(version.clone()) {
                self.story.event(Who::Spiegel, &format!("replicated {what}{} to {ALL_POSTS}", version.id));
            }
        });
    }

    /// Watches `all_blog_posts` as a reader's app would, and tells what arrives.
    pub async fn watch_arrivals(&self) {
        let mut query = ChangesQuery::default();
        loop {
            if let Ok(page) = self.couch.changes(ALL_POSTS, &query).await {
                for row in page.rows {
                    self.tell_arrival(&Version { rev: row.rev().to_string(), id: row.id }, row.deleted);
                }
                query.since = Some(page.last_seq);
            }
            tokio::time::sleep(LOOK_AGAIN_AFTER).await;
        }
    }
}

fn plural(count: usize, noun: &str) -> String {
    match count {
        1 => format!("1 {noun}"),
        _ => format!("{count} {noun}s"),
    }
}
