//! `spiegel demo`: the blog of the article in one process, with nothing installed. A server in memory, an API that is called,
//! the app itself between them, and people who write; told as lines, and looked at in the end.

mod api;
mod blog;
mod progress;
mod story;

use super::run::signals;
use super::{Exit, Failure, dev, install};
use crate::app::{App, Running};
use crate::config::{Settings, Sources, load};
use crate::couch::{Couch, CouchError};
use crate::dev::DevServer;
use crate::telemetry::Metrics;
use crate::vault::{Credentials, Vault, redact_text};
use api::{AFTER_USER_CREATED, Api, CALC_STATS};
use blog::{ALL_POSTS, Blog, Found, STATS, USERS, user_db};
use progress::Progress;
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::IsTerminal;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use story::{Out, Story};
use tokio::task::AbortHandle;

/// All of it takes seconds; past this something is wrong, and it is said what.
const DEADLINE: Duration = Duration::from_secs(60);
/// So that a person can read along.
const PAUSE: Duration = Duration::from_millis(400);
const ADMIN: &str = "admin";

/// On a terminal the demo takes its time; anything else wants the lines.
pub(super) async fn demo() -> Result<Exit, Failure> {
    let is_terminal = std::io::stdout().is_terminal();
    let is_coloured = is_terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let pause = if is_terminal { PAUSE } else { Duration::ZERO };
    show(Box::new(std::io::stdout()), is_coloured, pause).await
}

async fn show(out: Out, is_coloured: bool, pause: Duration) -> Result<Exit, Failure> {
    let mut signals = signals()?;
    let story = Arc::new(Story::new(out, is_coloured));
    let mut stage = Stage::set(story.clone(), pause).await?;
    let exit = tokio::select! {
        played = tokio::time::timeout(DEADLINE, stage.blog.play()) => stage.tell_end(played.unwrap_or(Ok(()))).await,
        () = stage.running.gave_up() => Err(Failure::new(Exit::Internal, "the demo's Spiegel gave up; --log-level info shows why")),
        _ = signals.next() => {
            story.chapter("Stopped before its end; nothing is left behind.");
            Ok(Exit::Done)
        }
    };
    stage.clear().await;
    exit
}

/// Everything that runs.
struct Stage {
    blog: Blog,
    running: Running,
    server: DevServer,
    metrics: Arc<Metrics>,
    tasks: [AbortHandle; 2],
}

impl Stage {
    async fn set(story: Arc<Story>, pause: Duration) -> Result<Self, Failure> {
        let password = new_password();
        let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let server = dev::start(any_port, ADMIN, password.clone()).await?;
        let (listener, api_address) = api::listen().await.map_err(|error| internal("listen for the API", error))?;
        let settings = settings(&server, password.clone())?;
        // Its own client, so that the app's requests are counted alone.
        let couch = super::couch(&settings)?;
        prepare(&couch, &settings, api_address).await.map_err(|error| internal("prepare the demo", error))?;
        introduce(&story, &server, api_address);

        let progress = Arc::new(Progress::default());
        let api = Arc::new(Api {
            couch: couch.clone(),
            spiegel_db: settings.db_name.clone(),
            couch_url: format!("http://{ADMIN}@{}", server.address()),
            story: story.clone(),
            progress: progress.clone(),
            counting: tokio::sync::Mutex::default(),
        });
        let serving = api::serve(listener, api.clone());
        let watching = tokio::spawn(async move { api.watch_arrivals().await }).abort_handle();

        let passwords = json!({ "127.0.0.1": { api::USER: api::PASSWORD, ADMIN: password.expose_secret() } });
        let vault = Vault::from_json(&passwords.to_string()).map_err(|error| internal("fill the vault", error))?;
        let couch_of_app = super::couch(&settings)?;
        let metrics = couch_of_app.metrics().clone();
        let unstarted = |error: anyhow::Error| internal("start Spiegel", redact_text(&format!("{error:#}")));
        let app = App::open(settings, vault, couch_of_app).await.map_err(unstarted)?;
        let running = app.start().await.map_err(unstarted)?;
        let blog = Blog { couch, story, progress, written: std::sync::Mutex::default(), pause };
        Ok(Self { blog, running, server, metrics, tasks: [serving, watching] })
    }

    /// The summary, and whether all is there.
    async fn tell_end(&self, played: Result<(), CouchError>) -> Result<Exit, Failure> {
        let took = self.blog.story.elapsed();
        played.map_err(|error| internal("play the demo", error))?;
        let found = self.blog.look().await.map_err(|error| internal("look what arrived", error))?;
        let missing = found.missing();
        self.blog.story.chapter("Summary");
        for line in self.summary(&found, took) {
            self.blog.story.say(&line);
        }
        if !missing.is_empty() {
            self.blog.story.chapter("Not everything arrived:");
            missing.iter().for_each(|line| self.blog.story.say(&format!("  {line}")));
            return Err(Failure::new(Exit::Internal, "the demo did not come to its end; --log-level info shows more"));
        }
        self.blog.story.chapter("Everything arrived: each post as it is now, and the API knows of each.");
        self.blog.story.say("Next: `spiegel dev` serves such a CouchDB for you to try things with.");
        Ok(Exit::Done)
    }

    fn summary(&self, found: &Found, took: Duration) -> Vec<String> {
        let (calls_after_user, calls_stats, failed, arrived) = {
            let seen = self.blog.progress.seen();
            let of = |path: &str| seen.calls.get(path).copied().unwrap_or_default();
            (of(AFTER_USER_CREATED), of(CALC_STATS), seen.calls_failed, seen.arrived.len())
        };
        let page = self.metrics.page();
        let row = |what: &str, number: String, remark: &str| format!("  {what:<24}{number:>7}  {remark}").trim_end().to_string();
        let posts_in = |db: &str| format!("posts in {db}");
        let mut lines = Vec::new();
        for user in USERS {
            lines.push(row(&posts_in(&user_db(user)), found.posts_of(user).to_string(), ""));
        }
        lines.push(row(&posts_in(ALL_POSTS), found.all_posts.len().to_string(), "replicated from the three"));
        let counted = found.counted.map_or_else(|| String::from("nothing"), |counted| counted.to_string());
        lines.push(row(&format!("counted in {STATS}"), counted, "by the API"));

        let runs = total(&page, "spiegel_replications_total", |labels| !labels.contains("no_changes"));
        lines.push(row("changes replicated", arrived.to_string(), &format!("in {runs} replications")));
        let by_path = format!("{calls_after_user} PUT {AFTER_USER_CREATED}, {calls_stats} PUT {CALC_STATS}");
        lines.push(row("API calls", (calls_after_user + calls_stats).to_string(), &by_path));
        if failed > 0 {
            lines.push(row("API calls refused", failed.to_string(), "and tried again"));
        }
        let requests = total(&page, "spiegel_couchdb_requests_total", |_| true);
        lines.push(row("requests to CouchDB", requests.to_string(), "by Spiegel, its start included"));
        lines.push(row("time", format!("{:.1}s", took.as_secs_f64()), ""));
        lines
    }

    /// First those who ask, then those who answer.
    async fn clear(self) {
        self.running.stop().await;
        self.tasks.iter().for_each(AbortHandle::abort);
        self.server.stop().await;
    }
}

fn introduce(story: &Story, server: &DevServer, api: SocketAddr) {
    story.chapter("A blog: a database for each user, one with the posts of all, and an API");
    story.say(&format!("  CouchDB  a compatible server in memory, on http://{}", server.address()));
    story.say(&format!("  API      receives what Spiegel calls, on http://{api}"));
    story.say(&format!("  rule     a change of _users          →  PUT {AFTER_USER_CREATED}"));
    story.say(&format!("  rule     a change of {ALL_POSTS}  →  PUT {CALC_STATS}"));
}

async fn prepare(couch: &Couch, settings: &Settings, api: SocketAddr) -> Result<(), CouchError> {
    install::install(couch, settings, &mut |_| {}).await?;
    couch.create_db(ALL_POSTS).await?;
    couch.create_db(STATS).await?;
    for (id, rule) in blog::rules(api) {
        couch.put_doc(&settings.db_name, id, &rule).await?;
    }
    Ok(())
}

/// The defaults, and nothing that was set for a real server; a try that failed is repeated while somebody still looks.
fn settings(server: &DevServer, password: SecretString) -> Result<Settings, Failure> {
    let mut settings = load(Sources::default()).map_err(|errors| internal("read the defaults", errors))?.settings;
    settings.couchdb.url = server.url();
    settings.couchdb.credentials = Some(Credentials { user: String::from(ADMIN), password });
    settings.debounce.quiet = Duration::from_millis(50);
    settings.debounce.longest = Duration::from_millis(500);
    settings.feed.save_seq_after = Duration::from_secs(1);
    settings.backoff_base = Duration::from_millis(200);
    settings.backoff_cap = Duration::from_secs(2);
    settings.shutdown_deadline = Duration::from_secs(2);
    settings.admin_listen = None;
    Ok(settings)
}

/// Others on this machine can reach the port. The hasher's keys are the standard library's only randomness of the system.
fn new_password() -> SecretString {
    let word = || format!("{:016x}", RandomState::new().build_hasher().finish());
    SecretString::from(word() + &word())
}

fn internal(doing: &str, error: impl std::fmt::Display) -> Failure {
    Failure::new(Exit::Internal, format!("{doing}: {error}"))
}

/// The sum of a counter over those of its labels that count.
fn total(page: &str, counter: &str, counts: impl Fn(&str) -> bool) -> u64 {
    let of_counter = page.lines().filter_map(|line| line.strip_prefix(counter)).filter(|rest| rest.starts_with(['{', ' ']));
    let numbers = of_counter.filter_map(|rest| rest.rsplit_once(' ')).filter(|(labels, _)| counts(labels));
    numbers.filter_map(|(_, number)| number.parse::<u64>().ok()).sum()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::Mutex;

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl Write for Captured {
        fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("whole").write(text)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_blog_comes_to_its_end() {
        let captured = Captured::default();
        let shown = show(Box::new(captured.clone()), false, Duration::ZERO).await;
        let text = String::from_utf8(captured.0.lock().expect("whole").clone()).expect("text");
        assert!(matches!(shown, Ok(Exit::Done)), "{shown:?}\n{text}");

        let in_order = [
            "alice    signs up",
            "spiegel  → PUT /after-user-created  (alice)",
            "api      made the database user_alice and its replicator",
            "alice    writes alice-1",
            "spiegel  replicated alice-1 to all_blog_posts",
            "spiegel  → PUT /calc-stats  (alice-1)",
            "api      counted 1 post by 1 author",
            "carol    deletes carol-2",
            "spiegel  replicated the deletion of carol-2 to all_blog_posts",
            "api      counted 5 posts by 3 authors",
            "\nSummary\n",
            "  posts in all_blog_posts       5  replicated",
            "  changes replicated            8  in ",
            "\nEverything arrived",
        ];
        let mut rest = text.as_str();
        for line in in_order {
            rest = rest.split_once(line).unwrap_or_else(|| panic!("no {line:?} where it belongs in\n{text}")).1;
        }
        assert!(!text.contains('\u{1b}'), "{text}");
        let longest = text.lines().map(|line| line.chars().count()).max();
        assert!(longest <= Some(80), "{longest:?} columns\n{text}");
    }

    #[test]
    fn a_counter_is_summed_over_its_labels() {
        let page = "# TYPE a counter\na_total{x=\"1\"} 3\na_total{x=\"2\"} 4\na_total_more 9\nb_total 5\n";
        let all = |counter| total(page, counter, |_| true);
        assert_eq!((all("a_total"), all("b_total"), all("c_total")), (7, 5, 0));
        assert_eq!(total(page, "a_total", |labels| !labels.contains("\"1\"")), 4);
    }
}
