//! Random answers, random writes, kills: at least once, in order, and no position ahead of what is accepted or parked.

use super::*;
use crate::support::server::environment;

const DOCS: usize = 24;
const KILLS: usize = 4;

/// What the receiver has seen of one document: the generations that it accepted, in their order.
type Accepted = Arc<Mutex<HashMap<String, Vec<u64>>>>;

fn generation(rev: &str) -> u64 {
    rev.split('-').next().and_then(|number| number.parse().ok()).unwrap_or_default()
}

/// Says no to a third of all requests, in many ways; a hang is cut by the sender's timeout.
fn moody(seed: u64, accepted: &Accepted, calm: &Arc<AtomicBool>) -> Answer {
    let random = Arc::new(Mutex::new(fastrand::Rng::with_seed(seed)));
    let (accepted, calm) = (accepted.clone(), calm.clone());
    Answer::work(move |request| {
        let (dice, wait) = {
            let mut random = random.lock().expect("not poisoned");
            (random.u8(..100), random.u64(..20))
        };
        let (accepted, is_calm) = (accepted.clone(), calm.load(Ordering::Relaxed));
        async move {
            tokio::time::sleep(Duration::from_millis(wait)).await;
            let status = match dice {
                _ if is_calm => 200,
                0..12 => 500,
                12..18 => 429,
                18..24 => 404,
                24..27 => {
                    tokio::time::sleep(Duration::from_millis(1_500)).await;
                    504
                }
                27..33 => 301,
                _ => 200,
            };
            if status == 200 {
                let generation = generation(request.body["change"]["_rev"].as_str().unwrap_or_default());
                accepted.lock().expect("not poisoned").entry(request.doc_id()).or_default().push(generation);
            }
            status
        }
    })
}

pub(super) async fn every_change_arrives_in_order_through_failures_and_kills(lab: Arc<Lab>) {
    let seed = environment("SPIEGEL_TEST_SEED").map_or_else(|| fastrand::u64(..), |text| text.parse().expect("a number"));
    println!("repeat with SPIEGEL_TEST_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    lab.install().await;
    let db = lab.create("source").await;
    let (accepted, calm) = (Accepted::default(), Arc::new(AtomicBool::new(false)));
    lab.receiver.answer("/hook", moody(seed, &accepted, &calm));
    lab.rule("rule", &db, "/hook", json!({})).await;
    let mut settings = QUICK.to_vec();
    settings.extend([("WEBHOOK_TIMEOUT", "1s"), ("DB_BATCH_SIZE", "7"), ("WEBHOOK_BREAKER_BASE", "50ms")]);
    settings.extend([("WEBHOOK_BREAKER_CAP", "300ms"), ("DELIVERIES_MAX_PER_RULE_AND_DATABASE", "6")]);
    let mut spiegel = lab.spiegel_with(&settings).await;

    for round in 0..KILLS {
        for _ in 0..15 {
            let id = format!("doc{}", random.usize(..DOCS));
            lab.couch.put(&db, &id, json!({ "round": round, "n": random.u32(..) })).await;
            tokio::time::sleep(Duration::from_millis(random.u64(..60))).await;
        }
        no_position_is_ahead(&lab, &db, &accepted).await;
        spiegel.kill();
        no_position_is_ahead(&lab, &db, &accepted).await;
        spiegel.start_again().await;
    }
    calm.store(true, Ordering::Relaxed);
    let docs = lab.couch.all(&db).await;
    eventually(SOON * 2, "the newest revision of each document is accepted", async || {
        let accepted = accepted.lock().expect("not poisoned");
        let arrived = |(id, rev): (&String, &String)| {
            let newest = generation(rev);
            accepted.get(id).is_some_and(|generations| generations.contains(&newest))
        };
        docs.iter().all(arrived).then_some(())
    })
    .await;
    lab.none_is_parked().await;
    in_order(&accepted, seed);
}

/// After a kill what was accepted may come again, but never after something newer of the same document was accepted by a
/// process that knew it: a drop in generations is only legal as a repeat of what a kill cut off.
fn in_order(accepted: &Accepted, seed: u64) {
    let accepted = accepted.lock().expect("not poisoned");
    for (id, generations) in accepted.iter() {
        let mut sorted = generations.clone();
        sorted.sort_unstable();
        assert_eq!(*generations, sorted, "{id} out of order, seed {seed}");
    }
}

/// Every row up to the saved position is accepted, parked, or superseded by a later row.
async fn no_position_is_ahead(lab: &Lab, db: &str, accepted: &Accepted) {
    let Some(listener) = lab.couch.get(&lab.spiegel_db(), &format!("spiegel_cl_{db}")).await else { return };
    let position = listener["ahead"]["rules"]["rule"].clone();
    let position = if position.is_null() { listener["last_seq"].clone() } else { position };
    if position.is_null() {
        return;
    }
    let since = match &position {
        Value::String(seq) => seq.clone(),
        other => other.to_string(),
    };
    // What comes after the position is not covered by it.
    let after: BTreeMap<String, u64> = rows(lab, db, &since).await;
    let all = rows(lab, db, "0").await;
    let parked: BTreeSet<String> =
        lab.deliveries().await.iter().map(|doc| doc["doc_id"].as_str().unwrap_or_default().to_string()).collect();
    let accepted = accepted.lock().expect("not poisoned");
    for (id, generation) in all {
        if after.contains_key(&id) || parked.contains(&id) {
            continue;
        }
        let is_accepted = accepted.get(&id).is_some_and(|generations| generations.iter().any(|known| *known >= generation));
        assert!(is_accepted, "{id} at {generation} is behind the position {position}, neither accepted nor parked");
    }
}

async fn rows(lab: &Lab, db: &str, since: &str) -> BTreeMap<String, u64> {
    let page = lab.couch.changes(db, &format!("since={}", crate::support::couch::encode(since))).await;
    let rows = page["results"].as_array().cloned().unwrap_or_default();
    let row = |row: Value| {
        (row["id"].as_str().unwrap_or_default().to_string(), generation(row["changes"][0]["rev"].as_str().unwrap_or_default()))
    };
    rows.into_iter().map(row).collect()
}
