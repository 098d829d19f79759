//! One deliveries database and several processes: side by side, one after the other, killed and stopped.

use super::*;
use crate::support::Spiegel;
use crate::support::server::environment;

const DOCS: usize = 12;
const KILLS: usize = 3;

/// How many requests are under way for each document, and which had two.
#[derive(Default)]
struct UnderWay {
    now: HashMap<String, usize>,
    twice: BTreeSet<String>,
}

/// One request; it ends where its connection does, too.
struct Request(Arc<Mutex<UnderWay>>, String);

impl Request {
    fn of(doc: String, under_way: &Arc<Mutex<UnderWay>>) -> Self {
        let mut of = under_way.lock().expect("not poisoned");
        let now = of.now.entry(doc.clone()).or_default();
        *now += 1;
        if *now > 1 {
            of.twice.insert(doc.clone());
        }
        Self(under_way.clone(), doc)
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        let mut of = self.0.lock().expect("not poisoned");
        *of.now.entry(self.1.clone()).or_default() -= 1;
    }
}

/// Every answer takes a while, and two thirds are no, until it is calm.
fn slow(seed: u64, under_way: &Arc<Mutex<UnderWay>>, calm: &Arc<AtomicBool>) -> Answer {
    let random = Arc::new(Mutex::new(fastrand::Rng::with_seed(seed)));
    let (under_way, calm) = (under_way.clone(), calm.clone());
    Answer::work(move |request| {
        let (status, wait) = {
            let mut random = random.lock().expect("not poisoned");
            (random.choice([200, 500, 503]).expect("one"), random.u64(50..400))
        };
        let (request, calm) = (Request::of(request.doc_id(), &under_way), calm.clone());
        async move {
            tokio::time::sleep(Duration::from_millis(wait)).await;
            drop(request);
            if calm.load(Ordering::Relaxed) { 200 } else { status }
        }
    })
}

async fn has_read_all(spiegel: &Spiegel) {
    eventually(SOON, "no database is busy", async || (spiegel.metric("db_actors").await == 0.0).then_some(())).await;
}

pub(super) async fn two_processes_share_what_is_parked(lab: Arc<Lab>) {
    let seed = environment("SPIEGEL_TEST_SEED").map_or_else(|| fastrand::u64(..), |text| text.parse().expect("a number"));
    println!("repeat with SPIEGEL_TEST_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    lab.install().await;
    let db = lab.create("source").await;
    lab.receiver.answer("/hook", Answer::status(500));
    lab.rule("rule", &db, "/hook", json!({})).await;
    let mut settings = QUICK.to_vec();
    settings.extend([("WEBHOOK_TIMEOUT", "1s"), ("WEBHOOK_BREAKER_THRESHOLD", "0")]);
    let mut both = [lab.spiegel_with(&settings).await, lab.spiegel_with(&settings).await];
    let ids: Vec<String> = (0..DOCS).map(|n| format!("doc{n}")).collect();
    lab.couch.bulk(&db, ids.iter().map(|id| json!({ "_id": id })).collect()).await;
    eventually(SOON, "all are parked", async || (lab.deliveries().await.len() == DOCS).then_some(())).await;
    // From here on every request is a try of what is parked.
    for spiegel in &both {
        has_read_all(spiegel).await;
    }
    let (under_way, calm) = (Arc::<Mutex<UnderWay>>::default(), Arc::new(AtomicBool::new(false)));
    lab.receiver.answer("/hook", slow(seed, &under_way, &calm));
    for _ in 0..KILLS {
        tokio::time::sleep(Duration::from_millis(random.u64(100..900))).await;
        let unlucky = &mut both[random.usize(..2)];
        unlucky.kill();
        unlucky.start_again().await;
    }
    calm.store(true, Ordering::Relaxed);
    // A claim of one that was killed ends with its lease.
    eventually(SOON * 2, "nothing is parked", async || lab.deliveries().await.is_empty().then_some(())).await;
    let delivered = lab.receiver.delivered("/hook");
    assert!(ids.iter().all(|id| delivered.contains_key(id)), "lost, seed {seed}: {delivered:?}");
    let twice = under_way.lock().expect("not poisoned").twice.clone();
    assert!(twice.is_empty(), "tried by both at the same time, seed {seed}: {twice:?}");
    for id in &ids {
        let webhook_ids: BTreeSet<String> = requests_for(&lab, "/hook", id).into_iter().map(|(id, _, _)| id).collect();
        assert_eq!(webhook_ids.len(), 1, "{id}: a repeat carries the same id");
    }
}

pub(super) async fn a_try_that_the_end_cuts_off_is_made_at_once_by_the_next_process(lab: Arc<Lab>) {
    let (db, _) = a_rule_that_fails(&lab, 500, &["bad", "worse"]).await;
    // A lease of more than a minute: nobody here would wait for its end.
    let mut settings = QUICK.to_vec();
    settings.push(("WEBHOOK_TIMEOUT", "30s"));
    let mut spiegel = lab.spiegel_with(&settings).await;
    write(&lab, &db, &["bad", "worse"]).await;
    eventually(SOON, "both are parked", async || (lab.deliveries().await.len() == 2).then_some(())).await;
    lab.receiver.answer("/hook", Answer::hang());
    let claimed = async || {
        let docs = lab.deliveries().await;
        docs.iter().all(|doc| doc["claimed_by"].is_string()).then_some(())
    };
    eventually(SOON, "both are claimed", claimed).await;
    let hanging = async || {
        let requests = lab.receiver.requests_at("/hook");
        (requests.iter().filter(|request| request.answered.is_none()).count() >= 2).then_some(())
    };
    eventually(SOON, "both tries hang", hanging).await;
    // Somebody writes one of them meanwhile: it joins, and the claim stays.
    let newer = lab.couch.put(&db, "bad", json!({ "n": 1 })).await;
    lab.one_delivery("it joins", |doc| doc["rev"] == newer.as_str()).await;
    spiegel.stop().await;
    for doc in lab.deliveries().await {
        assert_eq!((&doc["state"], &doc["claimed_by"]), (&json!("parked"), &Value::Null), "{doc}");
    }
    lab.receiver.answer("/hook", Answer::ok());
    spiegel.start_again().await;
    lab.delivered_all("/hook", &["bad", "worse"]).await;
    lab.none_is_parked().await;
}
