use super::*;
use crate::couch::Standing;
use secrecy::{ExposeSecret, SecretString};
use std::sync::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const TOKEN: &str = "token-0123456789abcdef";

struct Stage {
    admin: Admin,
    shutdown: CancellationToken,
    /// What reached whoever does the work.
    orders: Arc<Mutex<Vec<Order>>>,
}

/// The one admin is `anna:right`; every order is answered with its own words, but for a delivery, which there is none of.
async fn started(listen: &str, ready: Result<(), String>) -> Stage {
    let orders = Arc::new(Mutex::new(Vec::new()));
    let kept = orders.clone();
    let check: login::Check = Box::new(|credentials| {
        Box::pin(async move {
            match (credentials.user.as_str(), credentials.password.expose_secret()) {
                ("anna", "right") => Ok(Standing::Admin),
                ("staff", "right") => Ok(Standing::NoAdmin),
                ("away", _) => Err(String::from("couchdb does not answer")),
                _ => Ok(Standing::Wrong),
            }
        })
    });
    let pages = Pages {
        metrics: Metrics::new(),
        ready: Arc::new(move || ready.clone()),
        status: Arc::new(|| Box::pin(async { json!({ "feed": "open" }) })),
        operate: Arc::new(move |order| {
            let answer = match order.what {
                What::Delivery { .. } => Err(Refusal::new(StatusCode::NOT_FOUND, "no such delivery")),
                _ => Ok(json!({ "by": order.by })),
            };
            kept.lock().expect("not poisoned").push(order);
            Box::pin(async move { answer })
        }),
        login: Arc::new(Login::new(check, Some(SecretString::from(TOKEN)))),
    };
    let shutdown = CancellationToken::new();
    let admin = serve(listen.parse().expect("an address"), pages, shutdown.clone()).await.expect("a free port");
    Stage { admin, shutdown, orders }
}

async fn ask(address: SocketAddr, path: &str) -> (u16, String, String) {
    let answer = reqwest::get(format!("http://127.0.0.1:{}{path}", address.port())).await.expect("an answer");
    let kind = answer.headers().get("content-type").map(|kind| kind.to_str().expect("text").to_string());
    (answer.status().as_u16(), kind.unwrap_or_default(), answer.text().await.expect("a body"))
}

impl Stage {
    fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
        let client = reqwest::Client::builder().no_proxy().build().expect("a client");
        client.request(method, format!("http://127.0.0.1:{}{path}", self.admin.address.port()))
    }

    async fn status_of(&self, request: reqwest::RequestBuilder) -> u16 {
        request.send().await.expect("an answer").status().as_u16()
    }

    fn orders(&self) -> Vec<Order> {
        std::mem::take(&mut self.orders.lock().expect("not poisoned"))
    }
}

#[tokio::test]
async fn each_page_answers() {
    let Stage { admin, shutdown, .. } = started("127.0.0.1:0", Ok(())).await;
    assert_ne!(admin.address.port(), 0);
    let cases = [
        ("/live", 200, "text/plain; charset=utf-8", "live"),
        ("/ready", 200, "application/json", "{\"ready\":true}"),
        ("/metrics", 200, OPENMETRICS, "# EOF"),
        ("/status", 200, "application/json", "{\"feed\":\"open\"}"),
        ("/", 404, "", ""),
    ];
    for (path, status, kind, body) in cases {
        let answer = ask(admin.address, path).await;
        assert_eq!((answer.0, answer.1.as_str()), (status, kind), "{path}");
        assert!(answer.2.contains(body), "{path}: {}", answer.2);
    }
    shutdown.cancel();
    tokio::time::timeout(Duration::from_secs(5), admin.task).await.expect("a prompt end").expect("no panic");
}

#[tokio::test]
async fn not_ready_says_why() {
    let stage = started("127.0.0.1:0", Err(String::from("couchdb does not answer"))).await;
    let (status, _, body) = ask(stage.admin.address, "/ready").await;
    assert_eq!((status, body.as_str()), (503, "{\"ready\":false,\"reason\":\"couchdb does not answer\"}"));
}

/// Method, path, and what it orders.
fn routes() -> [(&'static str, &'static str, What); 8] {
    let key = || String::from("delivery:0a");
    [
        ("GET", "/deliveries", What::Deliveries),
        ("GET", "/deliveries/delivery%3A0a", What::Delivery { key: key() }),
        ("POST", "/deliveries/delivery:0a/retry", What::Retry { key: key() }),
        ("POST", "/deliveries/delivery:0a/drop", What::Drop { key: key() }),
        ("POST", "/deliveries/retry", What::RetryMany),
        ("POST", "/deliveries/drop", What::DropMany),
        ("GET", "/rules", What::Rules),
        ("POST", "/rules/mail%2Fa%20b/enable", What::EnableRule { id: "mail/a b".into() }),
    ]
}

#[tokio::test]
async fn each_route_needs_a_login_and_orders_what_it_says() {
    for listen in ["127.0.0.1:0", "0.0.0.0:0"] {
        let stage = started(listen, Ok(())).await;
        for (method, path, what) in routes() {
            let answer = stage.request(method, path).send().await.expect("an answer");
            assert_eq!(answer.status(), 401, "{listen} {path}");
            assert!(answer.headers()["www-authenticate"].to_str().expect("text").starts_with("Basic "));
            assert_eq!(stage.orders(), [], "{path}");
            for (request, by) in [
                (stage.request(method, path).basic_auth("anna", Some("right")), "anna"),
                (stage.request(method, path).bearer_auth(TOKEN), "the admin token"),
            ] {
                let answer = request.query(&[("rule", "a b&c"), ("x", "")]).send().await.expect("an answer");
                let expected = if matches!(what, What::Delivery { .. }) { 404 } else { 200 };
                assert_eq!(answer.status().as_u16(), expected, "{path}");
                assert_eq!(answer.headers()["cache-control"], "no-store");
                let query = vec![("rule".into(), "a b&c".into()), ("x".into(), String::new())];
                assert_eq!(stage.orders(), [Order { what: what.clone(), query, by: by.into() }]);
            }
        }
    }
}

#[tokio::test]
async fn who_is_no_admin_gets_nothing() {
    let stage = started("127.0.0.1:0", Ok(())).await;
    for (request, expected) in [
        (stage.request("GET", "/rules").basic_auth("anna", Some("wrong-s3cret")), 401),
        (stage.request("GET", "/rules").basic_auth("staff", Some("right")), 403),
        (stage.request("GET", "/rules").basic_auth("away", Some("right")), 503),
        (stage.request("GET", "/rules").bearer_auth("token-0123456789abcdeF"), 401),
        (stage.request("GET", "/rules").header("authorization", "Basic ?"), 401),
    ] {
        let answer = request.send().await.expect("an answer");
        assert_eq!(answer.status().as_u16(), expected);
        let body = answer.text().await.expect("a body");
        assert!(body.contains("error") && !body.contains("s3cret") && !body.contains(TOKEN), "{body}");
    }
    assert_eq!(stage.orders(), []);
    for _ in 0..20 {
        stage.status_of(stage.request("GET", "/rules").bearer_auth("guess")).await;
    }
    let answer = stage.request("GET", "/rules").basic_auth("anna", Some("right")).send().await.expect("an answer");
    assert_eq!((answer.status().as_u16(), answer.headers().contains_key("retry-after")), (429, true));
    assert_eq!(ask(stage.admin.address, "/live").await.0, 200);
}

#[tokio::test]
async fn status_is_open_on_loopback_only() {
    let stage = started("0.0.0.0:0", Ok(())).await;
    let address = stage.admin.address;
    assert_eq!(ask(address, "/status").await.0, 401);
    assert_eq!(ask(address, "/ready").await.0, 200);
    assert_eq!(stage.status_of(stage.request("GET", "/status").basic_auth("anna", Some("right"))).await, 200);
    // There the login keeps others out, and a name in `Host` may be the one that it is reached by.
    let named = stage.request("GET", "/status").bearer_auth(TOKEN).header("host", "spiegel.internal:9595");
    assert_eq!(stage.status_of(named).await, 200);
}

#[tokio::test]
async fn what_a_page_of_the_web_asks_for_is_refused() {
    let stage = started("127.0.0.1:0", Ok(())).await;
    let open = |method: &str, path: &str| stage.request(method, path).bearer_auth(TOKEN);
    let own = format!("http://127.0.0.1:{}", stage.admin.address.port());
    for (request, expected) in [
        (open("GET", "/status").header("host", "evil.example"), 403),
        (open("GET", "/rules").header("host", "evil.example"), 403),
        (open("POST", "/deliveries/drop").header("host", "evil.example"), 403),
        (open("POST", "/deliveries/drop").header("origin", "http://evil.example"), 403),
        (open("POST", "/deliveries/drop").header("origin", "null"), 403),
        (open("POST", "/deliveries/drop").header("sec-fetch-site", "cross-site"), 403),
        (open("GET", "/deliveries/drop"), 405),
        (open("OPTIONS", "/deliveries/drop").header("origin", "http://evil.example"), 405),
        (open("POST", "/deliveries/drop").header("origin", own).header("sec-fetch-site", "same-origin"), 200),
    ] {
        let shown = format!("{request:?}");
        let answer = request.send().await.expect("an answer");
        assert_eq!(answer.status().as_u16(), expected, "{shown}");
        assert!(!answer.headers().contains_key("access-control-allow-origin"));
    }
    assert_eq!(stage.orders().len(), 1);
}

#[tokio::test]
async fn a_body_is_never_waited_for() {
    let stage = started("127.0.0.1:0", Ok(())).await;
    let mut connection = TcpStream::connect(stage.admin.address).await.expect("a connection");
    let head = format!(
        "POST /deliveries/retry HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {TOKEN}\r\ncontent-length: 10000000000\r\n\r\n"
    );
    connection.write_all(head.as_bytes()).await.expect("it is sent");
    let mut start = [0; 12];
    let answer = tokio::time::timeout(Duration::from_secs(5), connection.read_exact(&mut start)).await;
    answer.expect("an answer before the body").expect("an answer");
    assert_eq!(&start, b"HTTP/1.1 200");
}

#[tokio::test]
async fn a_silent_connection_is_closed_before_long() {
    let Stage { admin, shutdown: _shutdown, .. } = started("127.0.0.1:0", Ok(())).await;
    let mut silent = TcpStream::connect(admin.address).await.expect("a connection");
    let mut slow = TcpStream::connect(admin.address).await.expect("a connection");
    slow.write_all(b"GET /live HTTP/1.1\r\nhost: 127.0.0.1\r\n").await.expect("it is sent");
    // Let the server accept them before the clock jumps.
    ask(admin.address, "/live").await;
    tokio::time::pause();
    tokio::time::advance(places::HEAD_MAX + Duration::from_secs(1)).await;
    tokio::time::resume();
    for connection in [&mut silent, &mut slow] {
        let mut rest = Vec::new();
        let end = tokio::time::timeout(Duration::from_secs(5), connection.read_to_end(&mut rest)).await;
        assert!(end.is_ok(), "still open");
        assert!(!String::from_utf8_lossy(&rest).contains("200"));
    }
}

#[tokio::test]
async fn silent_connections_keep_nobody_out() {
    let Stage { admin, shutdown: _shutdown, .. } = started("127.0.0.1:0", Ok(())).await;
    let mut silent = Vec::new();
    for _ in 0..places::CONNECTIONS_MAX + 50 {
        silent.push(TcpStream::connect(admin.address).await.expect("a connection"));
    }
    for path in ["/live", "/ready"] {
        let answer = tokio::time::timeout(Duration::from_secs(5), ask(admin.address, path)).await;
        assert_eq!(answer.expect("an answer beside them").0, 200, "{path}");
    }
    let mut rest = Vec::new();
    let oldest = tokio::time::timeout(Duration::from_secs(5), silent[0].read_to_end(&mut rest)).await;
    assert!(oldest.is_ok(), "the oldest gave up its place");
}
