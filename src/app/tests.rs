//! The whole tree against the embedded server, with children killed under it.

use super::*;
use crate::config::{Sources, load};
use crate::couch::ChangesQuery;
use crate::dev::{DevOptions, DevServer};
use std::collections::BTreeMap;

struct Stage {
    server: DevServer,
    couch: Couch,
    running: Running,
}

const PATIENCE: Duration = Duration::from_secs(20);

impl Stage {
    async fn set() -> Self {
        Self::set_as(Role::Everything).await
    }

    async fn set_as(role: Role) -> Self {
        let options = DevOptions {
            listen: ([127, 0, 0, 1], 0).into(),
            user: "admin".into(),
            password: "secret".to_string().into(),
            global_changes_delay: Duration::from_millis(20),
        };
        let server = DevServer::start(options).await.expect("a free port");
        let url = format!("http://admin:secret@{}", server.address());
        let environment: BTreeMap<String, String> = [
            ("SPIEGEL_COUCHDB_URL", url.as_str()),
            ("SPIEGEL_ADMIN_LISTEN", ""),
            ("SPIEGEL_ROLE", role.name()),
            ("SPIEGEL_DEBOUNCE_QUIET", "10ms"),
            ("SPIEGEL_ROLES_BATCH_TIMEOUT", "50ms"),
            ("SPIEGEL_SHUTDOWN_DEADLINE", "2s"),
        ]
        .map(|(name, value)| (name.to_string(), value.to_string()))
        .into();
        let settings = load(Sources { environment, ..Sources::default() }).expect("legal").settings;
        let couch = Couch::new(settings.couchdb.clone(), Metrics::new()).expect("a client");
        for db in ["spiegel", "source", "target"] {
            couch.create_db(db).await.expect("a database");
        }
        let (source, target) = (format!("{url}/source"), format!("{url}/target"));
        let replicator = serde_json::json!({ "type": "replicator", "source": source, "target": target });
        couch.put_doc("spiegel", "copy", &replicator).await.expect("a replicator");
        let app = App::open(settings, Vault::empty(), couch.clone()).await.expect("it opens");
        Self { server, couch, running: app.start().await.expect("it starts") }
    }

    async fn until(&self, what: &str, is_so: impl AsyncFn() -> bool) {
        let waited = tokio::time::timeout(PATIENCE, async {
            while !is_so().await {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        waited.await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"));
    }

    async fn works(&self, document: &str) {
        self.couch.put_doc("source", document, &serde_json::json!({})).await.expect("a document");
        let arrived = async || self.couch.get_doc("target", document).await.is_ok_and(|doc| doc.is_some());
        self.until(&format!("{document} is replicated"), arrived).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whichever_child_is_killed_the_work_goes_on() {
    // More kills than a process bears in a minute.
    let middle = Child::all_of(Role::Everything).len() / 2;
    kill_each(0..middle).await;
    kill_each(middle..Child::all_of(Role::Everything).len()).await;
}

async fn kill_each(rounds: std::ops::Range<usize>) {
    let stage = Stage::set().await;
    stage.works("before").await;
    let children = stage.running.supervisor.get_children().len();
    assert_eq!(children, Child::all_of(Role::Everything).len());
    for round in rounds.clone() {
        let mut cells = stage.running.supervisor.get_children();
        cells.sort_by_key(ActorCell::get_id);
        let restarts =
            |child: Child| stage.running.world.metrics.restarts.get_or_create(&ChildLabels { child: child.name() }).get();
        let all_restarts = || Child::ALL.into_iter().map(restarts).sum::<u64>();
        let before = all_restarts();
        cells[round % cells.len()].kill();
        stage.until("the death is noticed", async || all_restarts() > before).await;
        stage.works(&format!("after-{round}")).await;
        stage.until("all stand again", async || stage.running.supervisor.get_children().len() == children).await;
    }
    let started = Instant::now();
    stage.running.stop().await;
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    let changes = stage.couch.changes("target", &ChangesQuery::default()).await.expect("it answers");
    assert_eq!(changes.rows.len(), rounds.len() + 1);
    stage.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whichever_child_of_an_update_listener_is_killed_changes_are_marked() {
    let stage = Stage::set_as(Role::UpdateListener).await;
    let marked = async |document: &str| {
        let doc = stage.couch.get_doc("spiegel", "copy").await.expect("it answers").expect("the replicator");
        let mut cleaned = doc.clone();
        cleaned["dirty"] = serde_json::json!(false);
        stage.couch.put_doc("spiegel", "copy", &cleaned).await.expect("cleaned");
        stage.couch.put_doc("source", document, &serde_json::json!({})).await.expect("a document");
        let is_dirty =
            async || stage.couch.get_doc("spiegel", "copy").await.is_ok_and(|doc| doc.is_some_and(|doc| doc["dirty"] == true));
        stage.until(&format!("{document} makes it dirty"), is_dirty).await;
    };
    marked("before").await;
    let children = stage.running.supervisor.get_children().len();
    assert_eq!(children, Child::all_of(Role::UpdateListener).len());
    let restarts = |child: Child| stage.running.world.metrics.restarts.get_or_create(&ChildLabels { child: child.name() }).get();
    let all_restarts = || Child::ALL.into_iter().map(restarts).sum::<u64>();
    for round in 0..children {
        let mut cells = stage.running.supervisor.get_children();
        cells.sort_by_key(ActorCell::get_id);
        let before = all_restarts();
        cells[round].kill();
        stage.until("the death is noticed", async || all_restarts() > before).await;
        marked(&format!("after-{round}")).await;
        stage.until("all stand again", async || stage.running.supervisor.get_children().len() == children).await;
    }
    let started = Instant::now();
    stage.running.stop().await;
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    stage.server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_many_crashes_end_the_process() {
    let mut stage = Stage::set().await;
    let supervisor = stage.running.supervisor.clone();
    let killing = tokio::spawn(async move {
        loop {
            for cell in supervisor.get_children() {
                cell.kill();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    tokio::time::timeout(PATIENCE, stage.running.gave_up()).await.expect("it gives up");
    killing.abort();
    stage.server.stop().await;
}
