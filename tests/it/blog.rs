//! The second seed whole: a user signs up, and an API makes the user's database and its replicator; posts arrive in the
//! database of all posts, and a rule on that calculates statistics.

use crate::support::{Answer, Lab, SOON, eventually, tests_on};
use base64::Engine;
use serde_json::json;
use std::sync::Arc;
use std::time::Instant;

tests_on! {
    every: [a_blog],
}

async fn a_blog(lab: Arc<Lab>) {
    lab.install().await;
    lab.add_password("127.0.0.1", "apiuser", "apipassword");
    let all_posts = lab.create("all_blog_posts").await;
    let api = |path: &str| lab.receiver.url_for_user("apiuser", path);
    let calc_stats = json!({ "url": api("/calc-stats"), "params": { "change": "$change" }, "method": "PUT", "debounce": true });
    lab.rule("all_blog_posts_on_change", &all_posts, "", calc_stats).await;
    let after_user_created =
        json!({ "url": api("/after-user-created"), "params": { "change": "$change" }, "method": "PUT", "block": true });
    lab.rule("user_created_on_change", "_users", "", after_user_created).await;

    // The API of the article: the user's database and its replicator, where they are not there yet.
    let server = lab.clone();
    let work = move |request: crate::support::Request| {
        let (lab, id) = (server.clone(), request.doc_id());
        async move {
            // On a shared server others sign up too, and their names are their own business.
            let Some(name) = id.strip_prefix(&format!("org.couchdb.user:{}", lab.prefix)) else { return 200 };
            let user_db = lab.name(&format!("user_{name}"));
            if !lab.couch.exists(&user_db).await {
                lab.couch.create(&user_db).await;
            }
            let replicator = format!("replicator_{user_db}");
            if lab.couch.get(&lab.spiegel_db(), &replicator).await.is_none() {
                lab.replicator(&replicator, &user_db, &lab.name("all_blog_posts"), json!({})).await;
            }
            200
        }
    };
    lab.receiver.answer("/after-user-created", Answer::work(work));

    let _spiegel = lab.spiegel().await;
    let users = ["09e05a1a-3de7", "2", "c"];
    for name in users {
        let user = json!({ "name": format!("{}{name}", lab.prefix), "password": "pw", "roles": [], "type": "user" });
        lab.couch.put("_users", &format!("org.couchdb.user:{}{name}", lab.prefix), user).await;
    }
    for name in users {
        let user_db = lab.name(&format!("user_{name}"));
        eventually(SOON * 2, format!("the database of {name}"), async || lab.couch.exists(&user_db).await.then_some(())).await;
        let replicator = format!("replicator_{user_db}");
        eventually(SOON, "its replicator", async || lab.couch.get(&lab.spiegel_db(), &replicator).await).await;
        lab.couch.put(&user_db, &format!("{name} first"), json!({ "title": "first" })).await;
        lab.couch.put(&user_db, &format!("{name} second"), json!({ "title": "second" })).await;
    }
    let all = async |count: usize| (lab.couch.all(&all_posts).await.len() == count).then_some(());
    eventually(SOON * 2, "all posts in one database", || all(6)).await;
    let calculated = async |since: Instant| {
        lab.receiver.requests_at("/calc-stats").iter().any(|request| request.arrived > since).then_some(())
    };

    let edit = Instant::now();
    let user_db = lab.name("user_2");
    lab.couch.put(&user_db, "2 first", json!({ "title": "edited" })).await;
    let edited = async || lab.couch.get(&all_posts, "2 first").await.filter(|post| post["title"] == "edited");
    eventually(SOON * 2, "the edited post", edited).await;
    eventually(SOON, "statistics after the edit", || calculated(edit)).await;
    let request = lab.receiver.requests_at("/calc-stats").pop().unwrap();
    let basic = base64::engine::general_purpose::STANDARD.encode("apiuser:apipassword");
    assert_eq!(request.header("authorization"), format!("Basic {basic}"));
    assert!(request.body["change"]["_id"].is_string(), "{}", request.body);

    for name in users {
        lab.couch.remove("_users", &format!("org.couchdb.user:{}{name}", lab.prefix)).await;
    }
}
