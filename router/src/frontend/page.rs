//! The page at `/`: a chat in which the qualities answer side by side, and the cluster as it lives. Plain files that are part of the
//! binary.
//!
//! **Invariants:** it asks nobody but the server that it came from, which its content security policy holds it to, and runs no
//! script but its own files. Whoever does not ask for HTML gets the sentence that stood there before there was a page.

use axum::Router as Routes;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

/// Nothing from elsewhere, nothing inline, in nobody's frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// One file of the page.
struct Asset {
    path: &'static str,
    kind: &'static str,
    content: &'static str,
}

const HTML: Asset = Asset { path: "/", kind: "text/html; charset=utf-8", content: include_str!("page/index.html") };

static PARTS: [Asset; 9] = [
    Asset { path: "/page/style.css", kind: "text/css; charset=utf-8", content: include_str!("page/style.css") },
    Asset { path: "/page/main.js", kind: SCRIPT, content: include_str!("page/main.js") },
    Asset { path: "/page/chat.js", kind: SCRIPT, content: include_str!("page/chat.js") },
    Asset { path: "/page/stream.js", kind: SCRIPT, content: include_str!("page/stream.js") },
    Asset { path: "/page/cluster.js", kind: SCRIPT, content: include_str!("page/cluster.js") },
    Asset { path: "/page/element.js", kind: SCRIPT, content: include_str!("page/element.js") },
    Asset { path: "/page/figures.js", kind: SCRIPT, content: include_str!("page/figures.js") },
    Asset { path: "/page/key.js", kind: SCRIPT, content: include_str!("page/key.js") },
    Asset { path: "/page/icon.svg", kind: "image/svg+xml", content: include_str!("page/icon.svg") },
];

const SCRIPT: &str = "text/javascript; charset=utf-8";

/// The page and its parts.
pub(crate) fn routes<S: Clone + Send + Sync + 'static>() -> Routes<S> {
    let front = async |headers: HeaderMap| {
        let wants = headers.get_all(header::ACCEPT).iter().any(|kinds| kinds.as_bytes().windows(9).any(|kind| kind == b"text/html"));
        let mut front = if wants { HTML.respond() } else { sentence().await.into_response() };
        front.headers_mut().insert(header::VARY, HeaderValue::from_static("accept"));
        front
    };
    PARTS.iter().fold(Routes::new().route(HTML.path, get(front)), |routes, part| routes.route(part.path, get(async || part.respond())))
}

/// What stands at `/` for those who do not ask for HTML, and where the page is elsewhere.
pub(crate) async fn sentence() -> &'static str {
    "OverFill answers here: see /docs and /v1/models\n"
}

impl Asset {
    fn respond(&self) -> Response {
        let headers = [
            (header::CONTENT_TYPE, self.kind),
            (header::CONTENT_SECURITY_POLICY, POLICY),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (header::REFERRER_POLICY, "no-referrer"),
            // Another version of the router has other files under the same names.
            (header::CACHE_CONTROL, "no-cache"),
            (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        ];
        (headers, self.content).into_response()
    }
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use axum::http::{Request, StatusCode};
    use tower::ServiceExt;

    use super::*;

    async fn ask(path: &str, accept: &str) -> Response {
        let request = Request::get(path).header(header::ACCEPT, accept).body(Body::empty()).unwrap();
        routes::<()>().oneshot(request).await.unwrap()
    }

    async fn text(response: Response) -> String {
        String::from_utf8(to_bytes(response.into_body(), usize::MAX).await.unwrap().to_vec()).unwrap()
    }

    #[tokio::test]
    async fn browsers_get_the_page_and_others_the_sentence() {
        let browser = ask("/", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8").await;
        assert_eq!(browser.headers()[header::CONTENT_SECURITY_POLICY], POLICY);
        assert!(text(browser).await.starts_with("<!doctype html>"));
        for accept in ["*/*", "application/json", "text/plain"] {
            assert_eq!(text(ask("/", accept).await).await, sentence().await);
        }
    }

    /// What the files name of the page is there, what is there is named, and nothing is elsewhere or inline.
    #[tokio::test]
    async fn the_page_is_whole_and_its_own() {
        let all: String = PARTS.iter().chain([&HTML]).map(|part| part.content).collect();
        for part in &PARTS {
            let served = ask(part.path, "*/*").await;
            assert_eq!(
                (served.status(), &served.headers()[header::CONTENT_SECURITY_POLICY]),
                (StatusCode::OK, &HeaderValue::from_static(POLICY))
            );
            let name = part.path.rsplit('/').next().unwrap();
            assert!(all.contains(&format!("\"page/{name}\"")) || all.contains(&format!("\"./{name}\"")), "{name} is not used");
        }
        let named =
            |before: &str| -> Vec<String> { all.split(before).skip(1).map(|rest| rest.split('"').next().unwrap().to_owned()).collect() };
        for name in [named("\"page/"), named("\"./")].concat() {
            assert!(PARTS.iter().any(|part| part.path == format!("/page/{name}")), "{name} is not there");
        }
        let elsewhere = all.replace("http://www.w3.org/2000/svg", "");
        assert!(!elsewhere.contains("http://") && !elsewhere.contains("https://") && !elsewhere.contains("innerHTML"));
        let inline = [" style=", " onclick=", "<style", "<script>", "javascript:"];
        assert!(inline.iter().all(|inline| !HTML.content.contains(inline)));
    }
}
