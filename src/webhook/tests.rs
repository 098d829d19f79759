use super::*;
use crate::rules::handling::Statuses;
use crate::vault::Credentials;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Response as Answer};
use axum::routing::any;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Mutex;

/// What arrived: method, path with query, headers, body, and the connection's port on the other side.
type Seen = Arc<Mutex<Vec<(String, String, HeaderMap, Bytes, u16)>>>;

async fn receive(
    State(seen): State<Seen>,
    axum::extract::ConnectInfo(peer): axum::extract::ConnectInfo<SocketAddr>,
    request: axum::extract::Request,
) -> Answer<Body> {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 20).await.expect("the body arrives");
    let echoed = parts.headers.get("authorization").and_then(|value| value.to_str().ok()).unwrap_or_default().to_string();
    let path = parts.uri.path().to_string();
    let seen_path = parts.uri.path_and_query().expect("a path").to_string();
    seen.lock().expect("no panic under the lock").push((parts.method.to_string(), seen_path, parts.headers, body, peer.port()));
    let answer = Answer::builder();
    let endless =
        || Body::from_stream(futures_util::stream::repeat_with(|| Ok::<_, std::io::Error>(Bytes::from(vec![b'x'; 8192]))));
    let answer = match path.as_str() {
        "/redirect" => answer.status(302).header("location", "/ok").body(Body::empty()),
        "/slow" => {
            tokio::time::sleep(Duration::from_secs(60)).await;
            answer.status(200).body(Body::empty())
        }
        "/later" => answer.status(429).header("retry-after", "7").body(Body::from("slow down")),
        "/down" => answer.status(503).body(Body::from("first\nsecond\u{1b}[31m third")),
        "/wrong" => answer.status(422).body(Body::from(format!("got {echoed} with password pass word and x"))),
        "/gone" => answer.status(410).body(Body::empty()),
        "/endless" => answer.status(200).body(endless()),
        "/endless-error" => answer.status(500).body(endless()),
        "/stuck" => answer.status(200).body(Body::from_stream(futures_util::stream::pending::<Result<Bytes, std::io::Error>>())),
        _ => answer.status(204).body(Body::empty()),
    };
    answer.expect("a valid answer")
}

async fn server() -> (SocketAddr, Seen) {
    let seen = Seen::default();
    let app = Router::new().fallback(any(receive)).with_state(seen.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move { axum::serve(listener, app.into_make_service_with_connect_info::<SocketAddr>()).await });
    (address, seen)
}

fn settings() -> WebhookSettings {
    WebhookSettings {
        concurrency: 8,
        concurrency_per_host: 4,
        per_second_per_host: None,
        connect_timeout: Duration::from_secs(2),
        timeout: Duration::from_secs(5),
        fast_retries: 3,
        retry_base: Duration::from_millis(100),
        retry_cap: Duration::from_secs(10),
        breaker_threshold: 10,
        breaker_base: Duration::from_secs(1),
        breaker_cap: Duration::from_secs(60),
        retry_after_cap: Duration::from_secs(3_600),
        block_private_networks: false,
        allow_networks: Vec::new(),
        ca_file: None,
    }
}

fn delivery(address: SocketAddr, path: &str) -> Delivery {
    let request = WebhookRequest {
        method: http::Method::POST,
        url: format!("http://{address}{path}").parse().expect("a URL"),
        credentials: None,
        headers: Vec::new(),
        content_type: None,
        signing: Arc::default(),
        retry_on: None,
        body: Some(bytes::Bytes::from_static(b"{\"a\":1}")),
        lane: "lane".into(),
    };
    Delivery {
        id: String::from("msg_1"),
        rule_id: "rule".into(),
        db: "db".into(),
        request,
        order_key: 1,
        coalesce_key: None,
        gathered: None,
    }
}

fn credentials() -> Option<Credentials> {
    Some(Credentials { user: String::from("user"), password: String::from("pass word").into() })
}

fn count(metrics: &Metrics, outcome: &'static str) -> u64 {
    metrics.webhook_deliveries.get_or_create(&OutcomeLabels { outcome }).get()
}

async fn perform(delivery: Delivery, settings: &WebhookSettings) -> (Attempt, Arc<Metrics>) {
    let metrics = Metrics::new();
    let sender = HttpSender::new(settings, Arc::default(), metrics.clone()).expect("a client");
    (sender.perform(Arc::new(delivery)).await, metrics)
}

#[tokio::test]
async fn a_request_says_who_sends_it_and_what() {
    let (address, seen) = server().await;
    let mut with_body = delivery(address, "/ok?a=b");
    with_body.request.credentials = credentials();
    let (result, metrics) = perform(with_body, &settings()).await;
    assert_eq!(result, Ok(Step::Done));
    assert_eq!(count(&metrics, "delivered"), 1);
    let mut without_body = delivery(address, "/ok");
    (without_body.request.method, without_body.request.body) = (http::Method::GET, None);
    assert_eq!(perform(without_body, &settings()).await.0, Ok(Step::Done));

    let seen = seen.lock().expect("no panic under the lock");
    let (method, path, headers, body, _) = &seen[0];
    assert_eq!((method.as_str(), path.as_str(), &body[..]), ("POST", "/ok?a=b", &b"{\"a\":1}"[..]));
    for (name, value) in [
        ("webhook-id", "msg_1"),
        ("accept", "application/json"),
        ("content-type", "application/json"),
        ("user-agent", concat!("spiegel/", env!("CARGO_PKG_VERSION"))),
        ("authorization", "Basic dXNlcjpwYXNzIHdvcmQ="),
    ] {
        assert_eq!(headers.get(name).and_then(|value| value.to_str().ok()), Some(value), "{name}");
    }
    let (method, _, headers, body, _) = &seen[1];
    assert_eq!((method.as_str(), body.len()), ("GET", 0));
    assert!(headers.get("content-type").is_none() && headers.get("authorization").is_none());
}

#[tokio::test]
async fn a_refusal_says_what_it_means_and_why() {
    let (address, seen) = server().await;
    let retry = |seconds: Option<u64>| Verdict::Retry { after: seconds.map(Duration::from_secs) };
    for (path, status, outcome, verdict, text) in [
        ("/redirect", 302, "redirected", Verdict::Later, "answered 302, a redirect, which is not followed"),
        ("/later", 429, "throttled", retry(Some(7)), "answered 429: slow down"),
        ("/down", 503, "server_error", retry(None), "answered 503: first second [31m third"),
        ("/gone", 410, "gone", Verdict::Gone, "answered 410"),
    ] {
        let (result, metrics) = perform(delivery(address, path), &settings()).await;
        let failure = result.expect_err(path);
        assert_eq!((failure.verdict, failure.error.as_str()), (verdict, text), "{path}");
        let answer = failure.answer.expect("one came");
        assert_eq!((answer.status, text.ends_with(&answer.excerpt)), (status, true), "{path}");
        assert_eq!(count(&metrics, outcome), 1, "{path}");
    }
    assert_eq!(seen.lock().expect("no panic under the lock").len(), 4, "the redirect was not followed");
}

#[tokio::test]
async fn a_rule_says_which_refusals_are_given_up() {
    let (address, _) = server().await;
    for (listed, verdict) in [(Statuses::One(422), Verdict::Later), (Statuses::Class(3), Verdict::GiveUp)] {
        let mut delivery = delivery(address, "/wrong");
        delivery.request.retry_on = Some([listed].into());
        assert_eq!(perform(delivery, &settings()).await.0.expect_err("422").verdict, verdict);
    }
}

#[tokio::test]
async fn a_signed_request_is_verified_by_its_receiver() {
    const NEW: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const OLD: &str = "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    let (address, seen) = server().await;
    let file = serde_json::json!({ "key": [NEW, OLD] }).to_string();
    let signing = Vault::empty().with_secrets(&file).expect("good secrets").signing("key").expect("they sign");
    let mut with_body = delivery(address, "/ok");
    with_body.request.signing = signing.clone();
    let mut without_body = delivery(address, "/ok?a=b");
    (without_body.request.method, without_body.request.body, without_body.request.signing) = (http::Method::GET, None, signing);
    for delivery in [with_body, without_body, delivery(address, "/ok")] {
        assert_eq!(perform(delivery, &settings()).await.0, Ok(Step::Done));
    }
    let seen = seen.lock().expect("no panic under the lock");
    for (_, _, headers, body, _) in &seen[..2] {
        for secret in [NEW, OLD] {
            standardwebhooks::Webhook::new(secret).expect("a secret").verify(body, headers).expect("a good signature");
        }
    }
    let (.., headers, _, _) = &seen[2];
    assert!(headers.get("webhook-signature").is_none() && headers.get("webhook-timestamp").is_some());
}

#[tokio::test]
async fn a_rule_s_headers_are_sent_and_its_secrets_are_not_repeated() {
    let (address, seen) = server().await;
    let file = serde_json::json!({ "token": "Bearer s3cret-token" }).to_string();
    let vault = Arc::new(Vault::empty().with_secrets(&file).expect("good secrets"));
    let mut delivery = delivery(address, "/wrong");
    delivery.request.headers = vec![
        (AUTHORIZATION, vault.header("token").expect("a header")),
        (HeaderName::from_static("x-tenant"), HeaderValue::from_static("seven")),
        (USER_AGENT, HeaderValue::from_static("other/1")),
    ];
    delivery.request.content_type = Some(HeaderValue::from_static("application/vnd.api+json"));
    let sender = HttpSender::new(&settings(), vault, Metrics::new()).expect("a client");
    let failure = sender.perform(Arc::new(delivery)).await.expect_err("422");
    assert_eq!(failure.error, "answered 422: got [redacted] with password pass word and x");
    assert_eq!(failure.answer.expect("one came").excerpt, "got [redacted] with password pass word and x");
    let seen = seen.lock().expect("no panic under the lock");
    for (name, value) in [
        ("authorization", "Bearer s3cret-token"),
        ("x-tenant", "seven"),
        ("user-agent", "other/1"),
        ("content-type", "application/vnd.api+json"),
    ] {
        assert_eq!(seen[0].2.get(name).and_then(|value| value.to_str().ok()), Some(value), "{name}");
    }
}

#[tokio::test]
async fn a_receiver_that_echoes_the_credentials_puts_none_into_the_error() {
    let (address, _) = server().await;
    let mut delivery = delivery(address, "/wrong");
    delivery.request.credentials = credentials();
    assert!(!format!("{delivery:?}").contains("pass word"));
    let failure = perform(delivery, &settings()).await.0.expect_err("422");
    assert_eq!(failure.error, "answered 422: got Basic [redacted] with password [redacted] and x");
}

#[tokio::test]
async fn a_receiver_that_does_not_answer_costs_one_timeout() {
    let (address, _) = server().await;
    let settings = WebhookSettings { timeout: Duration::from_millis(200), ..settings() };
    let (result, metrics) = perform(delivery(address, "/slow"), &settings).await;
    let failure = result.expect_err("no answer");
    assert_eq!(failure.verdict, Verdict::Retry { after: None });
    assert!(failure.error.starts_with("timed out"), "{}", failure.error);
    assert_eq!(count(&metrics, "timed_out"), 1);
}

#[tokio::test]
async fn a_receiver_that_is_not_there_is_tried_again() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    drop(listener);
    let (result, metrics) = perform(delivery(address, "/ok"), &settings()).await;
    let failure = result.expect_err("nobody listens");
    assert_eq!(failure.verdict, Verdict::Retry { after: None });
    assert!(failure.error.starts_with("cannot connect"), "{}", failure.error);
    assert!(!failure.error.contains("/ok"), "no URL in an error: {}", failure.error);
    assert_eq!(count(&metrics, "unreachable"), 1);
}

#[tokio::test]
async fn an_answer_without_end_is_read_only_so_far() {
    let (address, _) = server().await;
    let started = std::time::Instant::now();
    assert_eq!(perform(delivery(address, "/endless"), &settings()).await.0, Ok(Step::Done));
    assert_eq!(perform(delivery(address, "/stuck"), &settings()).await.0, Ok(Step::Done), "2xx is a delivery");
    let failure = perform(delivery(address, "/endless-error"), &settings()).await.0.expect_err("500");
    assert_eq!(failure.answer.expect("one came").excerpt.len(), EXCERPT_BYTES_MAX);
    assert_eq!(failure.error.len(), "answered 500: ".len() + LOGGED_CHARS_MAX);
    assert!(started.elapsed() < Duration::from_secs(4), "bounded well below the timeout");
}

#[tokio::test]
async fn what_cannot_be_built_is_tried_later() {
    let (address, seen) = server().await;
    let mut bad_id = delivery(address, "/ok");
    bad_id.id = String::from("line\nbreak");
    let mut bad_scheme = delivery(address, "/ok");
    bad_scheme.request.url = "ftp://example.com/".parse().expect("a URL");
    for delivery in [bad_id, bad_scheme] {
        let (result, metrics) = perform(delivery, &settings()).await;
        let failure = result.expect_err("no request");
        assert_eq!(failure.verdict, Verdict::Later, "{}", failure.error);
        assert_eq!(count(&metrics, "unbuildable"), 1);
    }
    assert!(seen.lock().expect("no panic under the lock").is_empty());
}

#[tokio::test]
async fn small_answers_leave_the_connection_usable() {
    let (address, seen) = server().await;
    let sender = HttpSender::new(&settings(), Arc::default(), Metrics::new()).expect("a client");
    for path in ["/ok", "/down", "/later", "/ok", "/redirect"] {
        let _ = sender.perform(Arc::new(delivery(address, path))).await;
    }
    let ports: HashSet<u16> = seen.lock().expect("no panic under the lock").iter().map(|(.., port)| *port).collect();
    assert_eq!(ports.len(), 1);
}

#[tokio::test]
async fn the_pool_delivers_and_counts() {
    let (address, _) = server().await;
    let metrics = Metrics::new();
    let perform = Arc::new(HttpSender::new(&settings(), Arc::default(), metrics.clone()).expect("a client"));
    let arguments = crate::schedule::DispatcherArguments { perform, settings: (&settings()).into() };
    let (pool, _) = ractor::Actor::spawn(None, WebhookPool::new(), arguments).await.expect("the pool starts");
    let (jobs, outcomes): (Vec<_>, Vec<_>) = (0..100)
        .map(|order_key| {
            let (waiter, outcome) = tokio::sync::oneshot::channel();
            ((Arc::new(Delivery { order_key, ..delivery(address, "/ok") }), waiter), outcome)
        })
        .unzip();
    pool.cast(crate::schedule::DispatcherMsg::Submit(jobs)).expect("the pool lives");
    for outcome in outcomes {
        assert_eq!(outcome.await, Ok(crate::job::Outcome::Done));
    }
    assert_eq!(count(&metrics, "delivered"), 100);
    assert_eq!((metrics.webhook_queued.get(), metrics.webhook_in_flight.get()), (0, 0));
    pool.stop(None);
}

// -- receivers that mean no good --

/// Writes `head`, then `tail` again and again until nobody takes it any more, and tells how many bytes went.
async fn hostile(head: &'static str, tail: &'static [u8], pause: Duration) -> (SocketAddr, tokio::sync::mpsc::Receiver<usize>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let (tell, told) = tokio::sync::mpsc::channel(8);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let tell = tell.clone();
            tokio::spawn(async move {
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).await;
                let mut written = head.len();
                let mut going = stream.write_all(head.as_bytes()).await;
                while going.is_ok() && !tail.is_empty() {
                    if !pause.is_zero() {
                        tokio::time::sleep(pause).await;
                    }
                    going = stream.write_all(tail).await;
                    written += tail.len();
                }
                let _ = tell.send(written).await;
            });
        }
    });
    (address, told)
}

#[tokio::test]
async fn a_receiver_that_closes_in_the_midst_of_its_answer_is_tried_again_unless_it_said_yes() {
    let retry = Verdict::Retry { after: None };
    for (head, verdict, status) in [
        ("", Err(retry), None),
        ("HTTP/1.1 200 OK\r\nconte", Err(retry), None),
        ("HTTP/1.1 5", Err(retry), None),
        ("no HTTP at all\r\n\r\n", Err(retry), None),
        ("HTTP/1.1 500 No\r\ncontent-length: 100\r\n\r\nhalf an ans", Err(retry), Some(500)),
        ("HTTP/1.1 404 No\r\ntransfer-encoding: chunked\r\n\r\nff\r\nhalf", Err(Verdict::Later), Some(404)),
        ("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf an answer", Ok(()), None),
    ] {
        let (address, _) = hostile(head, b"", Duration::ZERO).await;
        let (result, _) = perform(delivery(address, "/"), &settings()).await;
        let found = result.as_ref().map(|_| ()).map_err(|failure| failure.verdict);
        assert_eq!(found, verdict, "{head:?}: {result:?}");
        assert_eq!(result.err().and_then(|failure| failure.answer).map(|answer| answer.status), status, "{head:?}");
    }
}

#[tokio::test]
async fn an_answer_of_ten_gigabytes_is_not_read() {
    static CHUNK: [u8; 64 * 1024] = [b'x'; 64 * 1024];
    for (head, delivered) in [
        ("HTTP/1.1 200 OK\r\ncontent-length: 10000000000\r\n\r\n", true),
        ("HTTP/1.1 500 No\r\ncontent-length: 10000000000\r\n\r\n", false),
        // Its head has no end.
        ("HTTP/1.1 200 OK\r\n", false),
    ] {
        let tail: &'static [u8] = if head.ends_with("\r\n\r\n") { &CHUNK } else { b"x-more: and more and more and more\r\n" };
        let (address, mut told) = hostile(head, tail, Duration::ZERO).await;
        let started = std::time::Instant::now();
        let (result, _) = perform(delivery(address, "/"), &settings()).await;
        assert_eq!(result.is_ok(), delivered, "{head:?}: {result:?}");
        assert!(started.elapsed() < Duration::from_secs(4), "{head:?} took {:?}", started.elapsed());
        let written = told.recv().await.expect("the connection ends");
        // What the kernels on the way hold is most of it.
        assert!(written < 16 << 20, "{head:?}: {written} bytes went");
    }
}

#[tokio::test]
async fn a_receiver_that_takes_its_time_costs_one_timeout() {
    let settings = WebhookSettings { timeout: Duration::from_millis(400), ..settings() };
    let pause = Duration::from_millis(10);
    for (head, tail) in [
        ("HTTP/1.1 200 OK\r\nx-slow: ", b"a".as_slice()),
        ("HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n".as_slice()),
        ("", b"".as_slice()),
    ] {
        let pause = if tail.is_empty() { Duration::from_secs(60) } else { pause };
        let (address, _told) = hostile(head, if tail.is_empty() { b" " } else { tail }, pause).await;
        let started = std::time::Instant::now();
        let (result, metrics) = perform(delivery(address, "/"), &settings).await;
        assert_eq!(result.expect_err("no answer").verdict, Verdict::Retry { after: None }, "{head:?}");
        assert_eq!(count(&metrics, "timed_out"), 1, "{head:?}");
        assert!(started.elapsed() < Duration::from_secs(3), "{head:?} took {:?}", started.elapsed());
    }
}

// -- the guard, with a real connection behind it --

fn guarded(allowed: &str) -> WebhookSettings {
    let allow_networks =
        allowed.split(',').filter(|item| !item.is_empty()).map(|item| item.parse().expect("a network")).collect();
    WebhookSettings { block_private_networks: true, allow_networks, ..settings() }
}

/// Answers with each address in turn, the last one for ever.
fn scripted_lookup(addresses: &[&str]) -> (Lookup, Arc<std::sync::atomic::AtomicUsize>) {
    let addresses: Vec<std::net::IpAddr> = addresses.iter().map(|address| address.parse().expect("an address")).collect();
    let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = asked.clone();
    let lookup: Lookup = Arc::new(move |_| {
        let nth = counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let address = addresses[nth.min(addresses.len() - 1)];
        Box::pin(async move { Ok(vec![SocketAddr::new(address, 0)]) })
    });
    (lookup, asked)
}

fn to(name: &str, address: SocketAddr) -> Delivery {
    let mut delivery = delivery(address, "/ok");
    delivery.request.url = format!("http://{name}:{}/ok", address.port()).parse().expect("a URL");
    delivery
}

#[tokio::test]
async fn a_private_address_is_not_called_by_whatever_name() {
    let (address, seen) = server().await;
    let metrics = Metrics::new();
    let (lookup, _) = scripted_lookup(&["127.0.0.1"]);
    let sender = HttpSender::with_lookup(&guarded(""), Arc::default(), metrics.clone(), lookup).expect("a client");
    for name in ["127.0.0.1", "2130706433", "[::ffff:127.0.0.1]", "[64:ff9b::127.0.0.1]", "localhost", "public.example"] {
        let failure = sender.perform(Arc::new(to(name, address))).await.expect_err(name);
        assert_eq!(failure.verdict, Verdict::Later, "{name}");
        assert!(failure.error.contains("webhook.block_private_networks"), "{name}: {}", failure.error);
    }
    assert_eq!(count(&metrics, "blocked"), 6);
    let sender = HttpSender::new(&guarded(""), Arc::default(), metrics).expect("a client");
    assert!(sender.perform(Arc::new(to("localhost", address))).await.is_err(), "with the system's names");
    assert!(seen.lock().expect("no panic under the lock").is_empty());
}

#[tokio::test]
async fn an_exception_is_called() {
    let (address, seen) = server().await;
    for name in ["127.0.0.1", "[::ffff:127.0.0.1]", "inside.example"] {
        let (lookup, _) = scripted_lookup(&["127.0.0.1"]);
        let settings = guarded("127.0.0.0/30,10.0.0.0/8");
        let sender = HttpSender::with_lookup(&settings, Arc::default(), Metrics::new(), lookup).expect("a client");
        assert_eq!(sender.perform(Arc::new(to(name, address))).await, Ok(Step::Done), "{name}");
    }
    assert_eq!(seen.lock().expect("no panic under the lock").len(), 3);
}

#[tokio::test]
async fn a_name_that_changes_its_address_after_the_check_gains_nothing() {
    let (address, seen) = server().await;
    // Whoever looked twice would check the first and connect to the second, where the receiver is.
    let (lookup, asked) = scripted_lookup(&["127.0.0.2", "127.0.0.1"]);
    let settings = guarded("127.0.0.2/32");
    let sender = HttpSender::with_lookup(&settings, Arc::default(), Metrics::new(), lookup).expect("a client");
    let failure = sender.perform(Arc::new(to("rebinding.example", address))).await.expect_err("nobody listens there");
    assert!(failure.error.starts_with("cannot connect"), "{}", failure.error);
    assert_eq!(asked.load(std::sync::atomic::Ordering::Relaxed), 1);
    let failure = sender.perform(Arc::new(to("rebinding.example", address))).await.expect_err("it is checked again");
    assert!(failure.error.contains("webhook.block_private_networks"), "{}", failure.error);
    assert!(seen.lock().expect("no panic under the lock").is_empty());
}

// -- TLS --

/// A certificate authority, and a receiver at `localhost` that it vouches for.
struct Secure {
    address: SocketAddr,
    seen: Seen,
    versions: Arc<Mutex<Vec<http::Version>>>,
    directory: tempfile::TempDir,
}

struct TlsListener {
    listener: tokio::net::TcpListener,
    acceptor: tokio_rustls::TlsAcceptor,
}

impl axum::serve::Listener for TlsListener {
    type Io = tokio_rustls::server::TlsStream<tokio::net::TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, peer) = self.listener.accept().await.expect("a connection");
            // A client that does not trust it goes away.
            if let Ok(stream) = self.acceptor.accept(stream).await {
                return (stream, peer);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

#[derive(Clone)]
struct Peer(SocketAddr);

impl axum::extract::connect_info::Connected<axum::serve::IncomingStream<'_, TlsListener>> for Peer {
    fn connect_info(stream: axum::serve::IncomingStream<'_, TlsListener>) -> Self {
        Self(*stream.remote_addr())
    }
}

impl Secure {
    async fn start(alpn: &[&str]) -> Self {
        use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
        let directory = tempfile::tempdir().expect("a temporary directory");
        let authority_key = KeyPair::generate().expect("a key");
        let mut authority = CertificateParams::new([]).expect("no names");
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority_pem = authority.self_signed(&authority_key).expect("a certificate").pem();
        std::fs::write(directory.path().join("ca.pem"), authority_pem).expect("write the authority");
        let key = KeyPair::generate().expect("a key");
        let certificate = CertificateParams::new([String::from("localhost")]).expect("a name");
        let certificate = certificate.signed_by(&key, &Issuer::from_params(&authority, &authority_key)).expect("a certificate");

        let provider = Arc::new(tokio_rustls::rustls::crypto::aws_lc_rs::default_provider());
        let mut config = tokio_rustls::rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                tokio_rustls::rustls::pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into()),
            )
            .expect("a good certificate");
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let listener = TlsListener { listener, acceptor: Arc::new(config).into() };
        let (seen, versions) = (Seen::default(), Arc::new(Mutex::new(Vec::new())));
        let (into, said) = (seen.clone(), versions.clone());
        let handler = move |axum::extract::ConnectInfo(Peer(peer)): axum::extract::ConnectInfo<Peer>,
                            request: axum::extract::Request| async move {
            said.lock().expect("no panic under the lock").push(request.version());
            receive(State(into), axum::extract::ConnectInfo(peer), request).await
        };
        let app = Router::new().fallback(any(handler));
        tokio::spawn(async move { axum::serve(listener, app.into_make_service_with_connect_info::<Peer>()).await });
        Self { address, seen, versions, directory }
    }

    fn settings(&self) -> WebhookSettings {
        WebhookSettings { ca_file: Some(self.directory.path().join("ca.pem")), ..settings() }
    }

    fn delivery(&self, host: &str) -> Delivery {
        let mut delivery = delivery(self.address, "/ok");
        delivery.request.url = format!("https://{host}:{}/ok", self.address.port()).parse().expect("a URL");
        delivery
    }
}

#[tokio::test]
async fn an_authority_of_one_s_own_is_trusted_where_it_is_named() {
    let receiver = Secure::start(&["http/1.1"]).await;
    assert_eq!(perform(receiver.delivery("localhost"), &receiver.settings()).await.0, Ok(Step::Done));
    for (host, settings, why) in [
        ("localhost", settings(), "nobody vouches for it"),
        ("127.0.0.1", receiver.settings(), "it is vouched for under another name"),
    ] {
        let (result, metrics) = perform(receiver.delivery(host), &settings).await;
        let failure = result.expect_err(why);
        assert_eq!(failure.verdict, Verdict::Retry { after: None }, "{why}");
        assert!(failure.error.contains("certificate"), "{why}: {}", failure.error);
        assert_eq!(count(&metrics, "unreachable"), 1, "{why}");
    }
    assert_eq!(receiver.seen.lock().expect("no panic under the lock").len(), 1);
}

#[tokio::test]
async fn http_2_is_spoken_where_it_is_offered_over_one_connection() {
    for (alpn, version, connections) in
        [(&["h2", "http/1.1"][..], http::Version::HTTP_2, 1), (&["http/1.1"], http::Version::HTTP_11, 8)]
    {
        let receiver = Secure::start(alpn).await;
        let sender = HttpSender::new(&receiver.settings(), Arc::default(), Metrics::new()).expect("a client");
        let sender = &sender;
        let send = async || assert_eq!(sender.perform(Arc::new(receiver.delivery("localhost"))).await, Ok(Step::Done));
        send().await;
        for _ in 0..5 {
            futures_util::future::join_all((0..4).map(|_| send())).await;
        }
        let ports: HashSet<u16> = receiver.seen.lock().expect("no panic under the lock").iter().map(|(.., port)| *port).collect();
        // Of HTTP/1.1 four at once, and others where one is wanted before another has come back; far fewer than requests.
        assert!(ports.len() <= connections, "{alpn:?}: {} connections", ports.len());
        let versions = receiver.versions.lock().expect("no panic under the lock");
        assert!(versions.len() == 21 && versions.iter().all(|spoken| *spoken == version), "{versions:?}");
    }
}

#[tokio::test]
async fn a_file_of_authorities_without_one_is_an_error_that_names_it() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("ca.pem");
    for text in [None, Some(""), Some("nonsense"), Some("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")] {
        if let Some(text) = text {
            std::fs::write(&path, text).expect("write the file");
        }
        let settings = WebhookSettings { ca_file: Some(path.clone()), ..settings() };
        let error = HttpSender::new(&settings, Arc::default(), Metrics::new()).err().expect("no authority");
        assert!(format!("{error:#}").contains("webhook.ca_file"), "{text:?}: {error:#}");
    }
}

#[tokio::test]
async fn what_is_gathered_goes_as_one_signed_request_and_all_hear_of_it() {
    let (address, seen) = server().await;
    let metrics = Metrics::new();
    let sender = HttpSender::new(&settings(), Arc::default(), metrics.clone()).expect("a client");
    let arguments = crate::schedule::DispatcherArguments { perform: Arc::new(sender), settings: (&settings()).into() };
    let (pool, _) = ractor::Actor::spawn(None, WebhookPool::new(), arguments).await.expect("the pool starts");
    let batch = crate::rules::handling::Batch { max: 4, within: Duration::from_millis(300) };
    let (jobs, outcomes): (Vec<_>, Vec<_>) = (0..6)
        .map(|n| {
            let (waiter, outcome) = tokio::sync::oneshot::channel();
            let id = format!("msg_{n}");
            let gathered = Some(Gathered::of_one(batch, false, &id, n, format!("{{\"n\":{n}}}").into()));
            let delivery = Delivery { id, order_key: n, coalesce_key: Some(1), gathered, ..delivery(address, "/ok") };
            ((Arc::new(delivery), waiter), outcome)
        })
        .unzip();
    pool.cast(crate::schedule::DispatcherMsg::Submit(jobs)).expect("the pool lives");
    for outcome in outcomes {
        assert_eq!(outcome.await, Ok(crate::job::Outcome::Done));
    }
    let seen = seen.lock().expect("no panic under the lock");
    let bodies: Vec<Vec<u64>> = seen
        .iter()
        .map(|(_, _, headers, body, _)| {
            let items: Vec<serde_json::Value> = serde_json::from_slice(body).expect("an array");
            let ids = items.iter().map(|item| item["webhook-id"].as_str().expect("an id"));
            assert_eq!(headers["webhook-id"], request::batch_id(ids).as_str());
            items.iter().map(|item| item["n"].as_u64().expect("its params")).collect()
        })
        .collect();
    assert_eq!(bodies, [vec![0, 1, 2, 3], vec![4, 5]]);
    assert_eq!((count(&metrics, "delivered"), metrics.webhook_coalesced.get()), (2, 4));
    pool.stop(None);
}

#[tokio::test]
async fn a_receiver_that_is_down_opens_its_breaker_and_the_metric_says_so() {
    let (address, seen) = server().await;
    let metrics = Metrics::new();
    let sender = HttpSender::new(&settings(), Arc::default(), metrics.clone()).expect("a client");
    let settings = WebhookSettings { breaker_threshold: 3, ..settings() };
    let arguments = crate::schedule::DispatcherArguments { perform: Arc::new(sender), settings: (&settings).into() };
    let (pool, _) = ractor::Actor::spawn(None, WebhookPool::new(), arguments).await.expect("the pool starts");
    let (jobs, outcomes): (Vec<_>, Vec<_>) = (0..50)
        .map(|order_key| {
            let (waiter, outcome) = tokio::sync::oneshot::channel();
            ((Arc::new(Delivery { order_key, ..delivery(address, "/down") }), waiter), outcome)
        })
        .unzip();
    pool.cast(crate::schedule::DispatcherMsg::Submit(jobs)).expect("the pool lives");
    for outcome in outcomes {
        let outcome = outcome.await.expect("everybody is told");
        assert!(matches!(&outcome, crate::job::Outcome::Unsent { error, .. } if error.contains("answered 503")), "{outcome:?}");
    }
    assert!(seen.lock().expect("no panic under the lock").len() <= 3 + settings.concurrency_per_host);
    let open = metrics.webhook_breakers.get_or_create(&StateLabels { state: "open" }).get();
    assert_eq!(open, 1);
    pool.stop(None);
}
