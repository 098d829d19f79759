//! A receiver of webhooks: it remembers every request and answers as it was told.

use axum::Router;
use axum::body::to_bytes;
use axum::extract::{Request as AxumRequest, State};
use axum::http::{HeaderMap, StatusCode};
use futures_util::future::BoxFuture;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub query: BTreeMap<String, String>,
    pub headers: HeaderMap,
    /// Null where there is none, a string where it is not JSON.
    pub body: Value,
    pub status: u16,
    pub arrived: Instant,
    /// When the answer was given; None while it is not.
    pub answered: Option<Instant>,
}

impl Request {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// The document's id, of rules that send `{"change": "$change"}` or `{"id": "$change.id"}`, as body or as query.
    pub fn doc_id(&self) -> String {
        if let Some(id) = self.body["change"]["_id"].as_str().or_else(|| self.body["id"].as_str()) {
            return id.to_string();
        }
        if let Some(id) = self.query.get("id") {
            return id.clone();
        }
        let change = self.query.get("change").and_then(|text| serde_json::from_str::<Value>(text).ok()).unwrap_or_default();
        change["_id"].as_str().unwrap_or_default().to_string()
    }
}

#[derive(Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub delay: Duration,
    /// Never answer.
    pub hang: bool,
    /// Do this first; its answer wins over `status`.
    pub work: Option<Arc<dyn Fn(Request) -> BoxFuture<'static, u16> + Send + Sync>>,
}

impl Answer {
    pub fn status(status: u16) -> Self {
        Self { status, headers: Vec::new(), delay: Duration::ZERO, hang: false, work: None }
    }

    pub fn ok() -> Self {
        Self::status(200)
    }

    pub fn after(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    pub fn hang() -> Self {
        Self { hang: true, ..Self::ok() }
    }

    pub fn work<F>(work: impl Fn(Request) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = u16> + Send + 'static,
    {
        Self { work: Some(Arc::new(move |request| Box::pin(work(request)))), ..Self::ok() }
    }
}

#[derive(Default)]
struct Shared {
    requests: Mutex<Vec<Request>>,
    /// By the longest matching prefix of the path.
    answers: Mutex<HashMap<String, Answer>>,
}

#[derive(Clone)]
pub struct Receiver {
    port: u16,
    shared: Arc<Shared>,
}

impl Receiver {
    pub async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        let shared = Arc::new(Shared::default());
        let router = Router::new().fallback(receive).with_state(shared.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { port, shared }
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// With a user, whose password is in the vault.
    pub fn url_for_user(&self, user: &str, path: &str) -> String {
        format!("http://{user}@127.0.0.1:{}{path}", self.port)
    }

    /// From now on, for paths that begin with `path`.
    pub fn answer(&self, path: &str, answer: Answer) {
        self.shared.answers.lock().expect("not poisoned").insert(path.into(), answer);
    }

    pub fn requests(&self) -> Vec<Request> {
        self.shared.requests.lock().expect("not poisoned").clone()
    }

    pub fn requests_at(&self, path: &str) -> Vec<Request> {
        self.shared.requests.lock().expect("not poisoned").iter().filter(|request| request.path == path).cloned().collect()
    }

    pub fn count(&self, path: &str) -> usize {
        self.shared.requests.lock().expect("not poisoned").iter().filter(|request| request.path == path).count()
    }

    /// How often each document's change was answered with success at this path.
    pub fn delivered(&self, path: &str) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for request in self.shared.requests.lock().expect("not poisoned").iter() {
            if request.path == path && request.answered.is_some() && (200..300).contains(&request.status) {
                *counts.entry(request.doc_id()).or_default() += 1;
            }
        }
        counts
    }
}

async fn receive(State(shared): State<Arc<Shared>>, request: AxumRequest) -> (StatusCode, HeaderMap, &'static str) {
    let (head, body) = request.into_parts();
    let bytes = to_bytes(body, 64 << 20).await.unwrap_or_default();
    let body = match bytes.is_empty() {
        true => Value::Null,
        false => serde_json::from_slice(&bytes).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into_owned())),
    };
    let path = head.uri.path().to_string();
    let query = url::form_urlencoded::parse(head.uri.query().unwrap_or_default().as_bytes()).into_owned().collect();
    let answer = {
        let answers = shared.answers.lock().expect("not poisoned");
        let matching = answers.iter().filter(|(prefix, _)| path.starts_with(prefix.as_str()));
        matching.max_by_key(|(prefix, _)| prefix.len()).map_or_else(Answer::ok, |(_, answer)| answer.clone())
    };
    let request = Request {
        method: head.method.to_string(),
        path,
        query,
        headers: head.headers,
        body,
        status: answer.status,
        arrived: Instant::now(),
        answered: None,
    };
    let place = {
        let mut requests = shared.requests.lock().expect("not poisoned");
        requests.push(request.clone());
        requests.len() - 1
    };
    if super::server::environment("SPIEGEL_TEST_ECHO").is_some() {
        eprintln!("> {} {} {:?} {}", request.method, request.path, request.query, request.body);
    }
    if answer.hang {
        std::future::pending::<()>().await;
    }
    if !answer.delay.is_zero() {
        tokio::time::sleep(answer.delay).await;
    }
    let status = match answer.work {
        Some(work) => work(request).await,
        None => answer.status,
    };
    if let Some(request) = shared.requests.lock().expect("not poisoned").get_mut(place) {
        request.status = status;
        request.answered = Some(Instant::now());
    }
    let headers =
        answer.headers.into_iter().map(|(name, value)| (name.parse().expect("a name"), value.parse().expect("a value")));
    (StatusCode::from_u16(status).expect("a status"), headers.collect(), "")
}
