//! Pages against the embedded server: whatever the target has already, it has everything afterwards.

use super::*;
use crate::couch::{Couch, CouchSettings};
use crate::dev::{DevOptions, DevServer};
use crate::replicate::native::gate::Gates;
use crate::replicate::native::parameters::{Local, Parameters};
use crate::replicate::native::peer::{ChangesRequest, Net, Which};
use crate::replicate::native::sessions::Sessions;
use crate::telemetry::Metrics;
use crate::vault::split_credentials;
use base64::Engine as _;
use reqwest::Method;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

struct Stage {
    server: DevServer,
    transfer: Transfer,
}

impl Stage {
    async fn set() -> Self {
        let options = DevOptions {
            listen: ([127, 0, 0, 1], 0).into(),
            user: "admin".into(),
            password: "secret".to_string().into(),
            global_changes_delay: Duration::from_millis(20),
        };
        let server = DevServer::start(options).await.expect("a free port");
        let url = format!("http://admin:secret@{}", server.address()).parse().expect("a URL");
        let (url, credentials) = split_credentials(url);
        let timeout = Duration::from_secs(10);
        let settings =
            CouchSettings { url: url.clone(), credentials: credentials.clone(), connect_timeout: timeout, read_timeout: timeout };
        let couch = Couch::new(settings, Metrics::new()).expect("a client");
        for db in ["source", "target"] {
            couch.create_db(db).await.expect("a database");
        }
        let parameters = json!({ "source": "source", "target": "target" });
        let parameters = Parameters::parse(&parameters, &Local { url, credentials }).expect("they are ours");
        let net = Net {
            http: reqwest::Client::builder().build().expect("a client"),
            patient: reqwest::Client::builder().build().expect("a client"),
            gates: Gates::new(16),
            pipes: Gates::new(4),
            sessions: Sessions::default(),
            metrics: Metrics::new(),
            health: couch.health().clone(),
        };
        let transfer = Transfer {
            shared: Arc::new(Shared::default()),
            budget: Budget::new(1024 * 1024),
            small_budget: Budget::new(1024 * 1024),
            source: Peer::new(net.clone(), Which::Source, &parameters.source),
            target: Peer::new(net, Which::Target, &parameters.target),
            first_refused: OnceLock::new(),
            refused: Mutex::default(),
        };
        Self { server, transfer }
    }

    async fn write(&self, peer: &Peer, docs: &[Value]) {
        let texts: Vec<_> = docs.iter().map(|doc| doc.to_string().into()).collect();
        let written = peer.write(&texts).await.expect("it answers");
        assert_eq!(written.refused, []);
    }

    async fn page(&self, with_docs: bool) -> Page {
        let query = [(String::from("style"), String::from("all_docs"))];
        let asked = ChangesRequest { since: None, limit: 1_000, with_docs, query: query.into(), body: None };
        self.transfer.source.changes(&asked).await.expect("it answers")
    }

    /// Each document's leaves, with their attachments.
    async fn leaves(&self, peer: &Peer) -> BTreeMap<String, BTreeSet<String>> {
        let query = [(String::from("style"), String::from("all_docs"))];
        let asked = ChangesRequest { since: None, limit: 1_000, with_docs: false, query: query.into(), body: None };
        let mut leaves = BTreeMap::new();
        for row in peer.changes(&asked).await.expect("it answers").rows {
            let path = format!("{}?open_revs=all&revs=true&attachments=true", crate::couch::encode_doc_id(&row.id));
            let request = peer.request(Method::GET, &path).header("accept", "application/json");
            let answer: Vec<Value> = request.send().await.expect("it answers").json().await.expect("JSON");
            leaves.insert(row.id, answer.iter().map(|leaf| leaf["ok"].to_string()).collect());
        }
        leaves
    }
}

/// A revision tree: a trunk, and branches from anywhere; some leaves deleted, some with an attachment.
fn tree(random: &mut fastrand::Rng, id: usize) -> Vec<Value> {
    let mut paths: Vec<Vec<String>> = Vec::new();
    for branch in 0..random.usize(1..4) {
        let mut path: Vec<String> = match paths.first() {
            Some(trunk) => trunk[..random.usize(0..=trunk.len())].to_vec(),
            None => Vec::new(),
        };
        for depth in 0..random.usize(1..5) {
            path.push(format!("{:032x}", (id * 100 + branch * 10 + depth) as u128 + 1));
        }
        paths.push(path);
    }
    let mut docs = Vec::new();
    for path in paths {
        let ids: Vec<&String> = path.iter().rev().collect();
        let rev = format!("{}-{}", path.len(), ids[0]);
        let mut doc = json!({ "_id": format!("doc ü/{id}"), "_rev": rev, "_revisions": { "start": path.len(), "ids": ids } });
        match random.u8(0..6) {
            0 => doc["_deleted"] = json!(true),
            1 => {
                let data = base64::engine::general_purpose::STANDARD.encode(vec![7; random.usize(0..100_000)]);
                doc["_attachments"] = json!({ "a": { "content_type": "image/png", "data": data } });
            }
            _ => doc["n"] = json!(random.u32(..)),
        }
        docs.push(doc);
    }
    docs
}

/// The promise of the way without `_revs_diff`: it may cost a document sent twice, and never one that is missing.
#[tokio::test]
async fn whatever_the_target_has_and_whether_it_is_asked_it_has_everything_afterwards() {
    for seed in 0..24 {
        let mut random = fastrand::Rng::with_seed(seed);
        let stage = Stage::set().await;
        let (source, target) = (&stage.transfer.source, &stage.transfer.target);
        let docs: Vec<Value> = (0..random.usize(1..12)).flat_map(|id| tree(&mut random, id)).collect();
        stage.write(source, &docs).await;
        let before: Vec<Value> = docs.iter().filter(|_| random.bool()).cloned().collect();
        stage.write(target, &before).await;
        let is_news = random.bool();
        let counts = stage.transfer.page(&stage.page(random.bool()).await, is_news).await.expect("it is brought");
        assert_eq!(stage.leaves(target).await, stage.leaves(source).await, "seed {seed}, news {is_news}");
        assert_eq!(counts.docs_read, counts.docs_written, "seed {seed}");
        let again = stage.transfer.page(&stage.page(false).await, false).await.expect("it is compared");
        assert_eq!((again.missing_found, again.docs_written), (0, 0), "seed {seed}");
        stage.server.stop().await;
    }
}

/// Large attachments take a way of their own, and a 202 is no confirmation on that either.
#[tokio::test]
async fn what_too_few_nodes_took_is_asked_for_again() {
    for (bytes, is_confirmed, is_asked_in_vain, is_done) in [
        (10, true, true, true),
        (10, false, false, true),
        (10, false, true, false),
        (200_000, true, true, true),
        (200_000, false, false, true),
        (200_000, false, true, false),
    ] {
        let stage = Stage::set().await;
        let (source, target) = (&stage.transfer.source, &stage.transfer.target);
        let data = base64::engine::general_purpose::STANDARD.encode(vec![7; bytes]);
        let attachments = json!({ "a": { "content_type": "image/png", "data": data } });
        stage.write(source, &[json!({ "_id": "doc", "_rev": "1-a", "_attachments": attachments })]).await;
        if !is_confirmed {
            stage.server.faults().answer(Some(Method::POST), "/target/_bulk_docs", 202, 1);
            stage.server.faults().answer(Some(Method::PUT), "/target/doc", 202, 1);
        }
        if is_asked_in_vain {
            stage.server.faults().answer(None, "/target/_revs_diff", 500, 1);
        }
        let revs = vec![(String::from("doc"), vec![String::from("1-a")])];
        let brought = stage.transfer.bring(Lacking { revs, ancestors: HashMap::new() }).await;
        assert_eq!(brought.is_ok(), is_done, "{bytes} {is_confirmed} {is_asked_in_vain}: {brought:?}");
        assert_eq!(stage.leaves(target).await, stage.leaves(source).await, "it is there, whatever was said");
        stage.server.stop().await;
    }
}

#[test]
fn pieces_keep_documents_together_and_lose_none() {
    let revs: Revs = [3, 1, 5, 2, 2].iter().enumerate().map(|(n, many)| (n.to_string(), vec![String::new(); *many])).collect();
    let sizes: Vec<Vec<usize>> = pieces(revs, 4).map(|piece| piece.iter().map(|(_, revs)| revs.len()).collect()).collect();
    assert_eq!(sizes, [vec![3, 1], vec![5], vec![2, 2]]);
}

#[test]
fn what_the_target_says_of_a_document_is_final_unless_it_is_the_servers_trouble() {
    for (error, expected) in [
        ("forbidden", "document"),
        ("unauthorized", "document"),
        // As CouchDB 3.5.0 answered to a `validate_doc_update` that throws something else.
        ("TypeError", "document"),
        ("unknown_error", "document"),
        ("missing_stub", "stub"),
        ("internal_fabric_error", "failure"),
        ("timeout", "failure"),
    ] {
        let refused = Refused { id: String::new(), rev: None, error: error.into(), reason: String::new() };
        let found = match Refusal::of(&refused) {
            Refusal::Document => "document",
            Refusal::MissingStub => "stub",
            Refusal::Failure => "failure",
        };
        assert_eq!(found, expected, "{error}");
    }
}
