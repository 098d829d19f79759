//! The blog of the article: a database for each user, one with all posts, and the people who write.

use super::api::{self, AFTER_USER_CREATED, CALC_STATS};
use super::progress::{Progress, Version};
use super::story::{Story, Who};
use crate::couch::{Couch, CouchError, WriteResult};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub const ALL_POSTS: &str = "all_blog_posts";
/// Where the API keeps its count: in `all_blog_posts` it would call itself.
pub const STATS: &str = "blog_stats";
pub const STATS_ID: &str = "stats";
pub const USERS: [&str; 3] = ["alice", "bob", "carol"];
const TITLES: [[&str; 2]; 3] =
    [["Hello, world", "Ten days offline"], ["Why I sync", "Notes on bread"], ["First light", "A draft, sorry"]];
const POSTS: usize = 6;

pub fn user_db(user: &str) -> String {
    format!("user_{user}")
}

/// The two rules, as a user of Spiegel writes them into the spiegel database.
pub fn rules(api: SocketAddr) -> [(&'static str, Value); 2] {
    let url = |path: &str| format!("http://{}@{api}{path}", api::USER);
    let users = json!({
        "type": "on_change", "db_name": "^_users$", "url": url(AFTER_USER_CREATED), "params": { "change": "$change" },
        "method": "PUT", "block": true
    });
    let posts = json!({
        "type": "on_change", "db_name": format!("^{ALL_POSTS}$"), "url": url(CALC_STATS), "params": { "change": "$change" },
        "method": "PUT", "debounce": true
    });
    [("user_created_on_change", users), ("all_blog_posts_on_change", posts)]
}

/// The newest that somebody wrote of a post.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    pub rev: String,
    pub is_deleted: bool,
    pub author: &'static str,
}

pub struct Blog {
    pub couch: Couch,
    pub story: Arc<Story>,
    pub progress: Arc<Progress>,
    /// By post.
    pub written: Mutex<BTreeMap<String, Written>>,
    /// Between two steps, for people who read along.
    pub pause: Duration,
}

impl Blog {
    /// Each step waits for what follows from it; who stops waiting asks `missing`.
    pub async fn play(&self) -> Result<(), CouchError> {
        self.story.chapter("Three users sign up: a rule on _users calls the API, which makes room for each");
        for user in USERS {
            self.sign_up(user).await?;
            tokio::time::sleep(self.pause).await;
        }
        self.story.chapter("Each writes a post: it goes to all_blog_posts, and the API counts");
        for (user, [title, _]) in USERS.into_iter().zip(TITLES) {
            self.came_through(&[self.write(user, 1, title).await?]).await;
            tokio::time::sleep(self.pause).await;
        }
        self.story.chapter("All three write at the same time");
        let [(a, [_, of_a]), (b, [_, of_b]), (c, [_, of_c])] = [0, 1, 2].map(|index| (USERS[index], TITLES[index]));
        let (of_a, of_b, of_c) = tokio::join!(self.write(a, 2, of_a), self.write(b, 2, of_b), self.write(c, 2, of_c));
        self.came_through(&[of_a?, of_b?, of_c?]).await;
        tokio::time::sleep(self.pause).await;

        self.story.chapter("A post is edited, and one is deleted");
        self.came_through(&[self.edit("bob", 1, "Why I sync (with a picture)").await?]).await;
        tokio::time::sleep(self.pause).await;
        self.came_through(&[self.delete("carol", 2).await?]).await;
        Ok(())
    }

    async fn sign_up(&self, user: &'static str) -> Result<(), CouchError> {
        self.story.event(Who::Person(user), "signs up");
        let doc = json!({ "name": user, "roles": [], "type": "user" });
        self.couch.put_doc("_users", &format!("org.couchdb.user:{user}"), &doc).await?;
        self.progress.until(|seen| seen.signed_up.contains(user)).await;
        Ok(())
    }

    async fn write(&self, user: &'static str, number: usize, title: &str) -> Result<Version, CouchError> {
        let id = format!("{user}-{number}");
        self.story.event(Who::Person(user), &format!("writes {id}, \"{title}\", in {}", user_db(user)));
        self.put(user, id, json!({ "author": user, "title": title }), false).await
    }

    async fn edit(&self, user: &'static str, number: usize, title: &str) -> Result<Version, CouchError> {
        let id = format!("{user}-{number}");
        self.story.event(Who::Person(user), &format!("edits {id}: \"{title}\""));
        let rev = self.rev_of(&id);
        self.put(user, id, json!({ "_rev": rev, "author": user, "title": title }), false).await
    }

    async fn delete(&self, user: &'static str, number: usize) -> Result<Version, CouchError> {
        let id = format!("{user}-{number}");
        self.story.event(Who::Person(user), &format!("deletes {id}"));
        let rev = self.rev_of(&id);
        self.put(user, id, json!({ "_rev": rev, "_deleted": true }), true).await
    }

    async fn put(&self, user: &'static str, id: String, doc: Value, is_deleted: bool) -> Result<Version, CouchError> {
        match self.couch.put_doc(&user_db(user), &id, &doc).await? {
            WriteResult::Saved { rev } => {
                let written = Written { rev: rev.clone(), is_deleted, author: user };
                self.written.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone(), written);
                Ok(Version { id, rev })
            }
            // Nobody else writes there.
            _ => Err(CouchError::Conflict(id)),
        }
    }

    fn rev_of(&self, id: &str) -> String {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.get(id).map(|written| written.rev.clone()).unwrap_or_default()
    }

    async fn came_through(&self, versions: &[Version]) {
        self.progress.until(|seen| versions.iter().all(|version| seen.called.contains(version))).await;
    }

    /// Asks the databases themselves, not what was noted on the way.
    pub async fn look(&self) -> Result<Found, CouchError> {
        let posts = self.couch.docs_by_prefix(ALL_POSTS, "", None, 1000).await?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
        let stats = self.couch.get_doc(STATS, STATS_ID).await?;
        let seen = self.progress.seen();
        Ok(Found {
            signed_up: seen.signed_up.iter().cloned().collect(),
            written: self.written.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            all_posts: posts.iter().map(|post| (text(&post["_id"]), text(&post["_rev"]))).collect(),
            called: seen.called.iter().cloned().collect(),
            counted: stats.and_then(|stats| stats["posts"].as_u64()),
        })
    }
}

/// What there is in the end.
#[derive(Debug, Clone, Default)]
pub struct Found {
    pub signed_up: BTreeSet<String>,
    pub written: BTreeMap<String, Written>,
    /// Revision by post.
    pub all_posts: BTreeMap<String, String>,
    pub called: BTreeSet<Version>,
    pub counted: Option<u64>,
}

impl Found {
    /// A line for each thing that should be there.
    pub fn missing(&self) -> Vec<String> {
        let mut missing = Vec::new();
        for user in USERS.iter().filter(|user| !self.signed_up.contains(**user)) {
            missing.push(format!("user {user}: {AFTER_USER_CREATED} was not called, or failed"));
        }
        if self.written.len() < POSTS {
            missing.push(format!("{} of {POSTS} posts were never written", POSTS - self.written.len()));
        }
        for (id, written) in &self.written {
            match (self.all_posts.get(id), written.is_deleted) {
                (Some(_), true) => missing.push(format!("post {id}: its deletion is not in {ALL_POSTS}")),
                (None, false) => missing.push(format!("post {id}: not in {ALL_POSTS}")),
                (Some(rev), false) if *rev != written.rev => {
                    missing.push(format!("post {id}: an older revision is in {ALL_POSTS}"))
                }
                _ => {}
            }
            if !self.called.contains(&Version { id: id.clone(), rev: written.rev.clone() }) {
                missing.push(format!("post {id}: {CALC_STATS} was not called for its newest revision"));
            }
        }
        let posts = self.posts();
        if self.counted != Some(posts as u64) {
            let counted = self.counted.map_or_else(|| String::from("nothing"), |counted| counted.to_string());
            missing.push(format!("{STATS}: counted {counted}, and there are {posts}"));
        }
        missing
    }

    /// That live, by what was written.
    pub fn posts(&self) -> usize {
        self.written.values().filter(|written| !written.is_deleted).count()
    }

    pub fn posts_of(&self, user: &str) -> usize {
        self.written.values().filter(|written| !written.is_deleted && written.author == user).count()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    fn complete() -> Found {
        let ids = USERS.iter().flat_map(|user| [1, 2].map(|number| (*user, format!("{user}-{number}"))));
        let written: BTreeMap<String, Written> = ids
            .map(|(author, id)| (id.clone(), Written { rev: String::from("2-b"), is_deleted: id == "carol-2", author }))
            .collect();
        Found {
            signed_up: USERS.iter().map(ToString::to_string).collect(),
            all_posts: written
                .iter()
                .filter(|(_, post)| !post.is_deleted)
                .map(|(id, post)| (id.clone(), post.rev.clone()))
                .collect(),
            called: written.iter().map(|(id, post)| Version { id: id.clone(), rev: post.rev.clone() }).collect(),
            counted: Some(5),
            written,
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(complete().missing(), Vec::<String>::new());
        type Spoil = fn(&mut Found);
        let cases: [(Spoil, &str); 7] = [
            (|found| found.signed_up.retain(|user| user != "bob"), "user bob: /after-user-created was not called, or failed"),
            (|found| drop(found.all_posts.remove("bob-1")), "post bob-1: not in all_blog_posts"),
            (
                |found| drop(found.all_posts.insert("bob-1".into(), "1-a".into())),
                "post bob-1: an older revision is in all_blog_posts",
            ),
            (
                |found| drop(found.all_posts.insert("carol-2".into(), "1-a".into())),
                "post carol-2: its deletion is not in all_blog_posts",
            ),
            (
                |found| found.called.retain(|version| version.id != "carol-2"),
                "post carol-2: /calc-stats was not called for its newest revision",
            ),
            (|found| found.counted = Some(4), "blog_stats: counted 4, and there are 5"),
            (|found| found.counted = None, "blog_stats: counted nothing, and there are 5"),
        ];
        for (spoil, expected) in cases {
            let mut found = complete();
            spoil(&mut found);
            assert_eq!(found.missing(), [expected]);
        }
        assert_eq!(Found::default().missing().len(), USERS.len() + 2);
    }
}
