//! What a page of the web might do through somebody's browser, and is refused (pure).

use axum::http::uri::Authority;
use axum::http::{HeaderMap, Method, header};

/// A page of the web can make a name of its own point at 127.0.0.1 and ask through somebody's browser: then the name is in `Host`.
pub fn is_own_host(headers: &HeaderMap) -> bool {
    match text(headers, header::HOST.as_str()).parse::<Authority>() {
        Ok(authority) => {
            let name = authority.host().trim_start_matches('[').trim_end_matches(']');
            name == "localhost" || name.parse::<std::net::IpAddr>().is_ok()
        }
        Err(_) => false,
    }
}

/// A browser that remembers a login sends it along with whatever another site's page posts here; but it says that it does.
pub fn is_cross_site(method: &Method, headers: &HeaderMap) -> bool {
    if method.is_safe() {
        return false;
    }
    let site = text(headers, "sec-fetch-site");
    if !matches!(site, "" | "same-origin" | "none") {
        return true;
    }
    match headers.get(header::ORIGIN) {
        None => false,
        Some(origin) => {
            let origin = origin.to_str().unwrap_or_default();
            let authority = origin.split_once("://").map(|(_, authority)| authority);
            authority.is_none_or(|authority| authority != text(headers, header::HOST.as_str()))
        }
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_name_in_host_is_refused() {
        let cases = [
            ("127.0.0.1:9595", true),
            ("[::1]:9595", true),
            ("localhost:9595", true),
            ("localhost", true),
            ("evil.example:9595", false),
            ("localhost.evil.example", false),
            ("", false),
        ];
        for (host, expected) in cases {
            let headers = HeaderMap::from_iter([(header::HOST, host.parse().expect("a header"))]);
            assert_eq!(is_own_host(&headers), expected, "{host}");
        }
    }

    #[test]
    fn what_another_site_posts_is_refused() {
        let post = Method::POST;
        for (method, site, origin, expected) in [
            (&post, "", "", false),
            (&post, "same-origin", "http://h:1", false),
            (&post, "none", "", false),
            (&post, "cross-site", "", true),
            (&post, "same-site", "", true),
            (&post, "nonsense", "", true),
            (&post, "", "http://h:1", false),
            (&post, "", "http://h:2", true),
            (&post, "", "http://evil.example", true),
            (&post, "", "null", true),
            (&post, "same-origin", "http://evil.example", true),
            (&Method::DELETE, "cross-site", "", true),
            (&Method::GET, "cross-site", "http://evil.example", false),
        ] {
            let mut headers = HeaderMap::from_iter([(header::HOST, "h:1".parse().expect("a header"))]);
            if !site.is_empty() {
                headers.insert("sec-fetch-site", site.parse().expect("a header"));
            }
            if !origin.is_empty() {
                headers.insert(header::ORIGIN, origin.parse().expect("a header"));
            }
            assert_eq!(is_cross_site(method, &headers), expected, "{method} {site} {origin}");
        }
    }
}
