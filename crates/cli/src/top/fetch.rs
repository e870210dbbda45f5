//! Asking a router how its cluster is.

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use overfill_router::overview::Overview;
use reqwest::{Client, StatusCode};

/// How long a router may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// The longest answer: of some ten thousand nodes.
const LONGEST: usize = 16 << 20;

/// Where a router tells it.
pub(super) struct Door {
    client: Client,
    url: String,
    key: Option<String>,
}

/// What it told.
pub(super) struct Look {
    /// As it came.
    pub(super) text: String,
    pub(super) overview: Overview,
}

impl Door {
    /// At this base URL.
    ///
    /// # Errors
    /// Where it is none.
    pub(super) fn new(url: &str, key: Option<String>) -> anyhow::Result<Self> {
        let base = reqwest::Url::parse(url).ok().filter(|url| url.has_host());
        let base = base.with_context(|| format!("'{url}' is no URL: write it as in http://127.0.0.1:8000"))?;
        let client = Client::builder().timeout(PATIENCE).build()?;
        Ok(Self { client, url: base.as_str().trim_end_matches('/').to_owned(), key })
    }

    /// How the cluster is now.
    ///
    /// # Errors
    /// Why that is not known, with what to do where that is known.
    pub(super) async fn look(&self) -> anyhow::Result<Look> {
        let url = &self.url;
        let asked = self.client.get(format!("{url}/cluster"));
        let asked = self.key.iter().fold(asked, |asked, key| asked.bearer_auth(key));
        let mut response = asked.send().await.map_err(|error| anyhow!("no router answers at {url}: {}", cause(&error)))?;
        match response.status() {
            status if status.is_success() => {}
            StatusCode::UNAUTHORIZED => bail!("the router at {url} asks for a key: give it one with --key"),
            StatusCode::NOT_FOUND => bail!("{url} has no /cluster: where a router has a listener for --admin, name that with --url"),
            status => bail!("{url} answered {status}"),
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| anyhow!("{url} broke off: {}", cause(&error)))? {
            if body.len() + chunk.len() > LONGEST {
                bail!("{url} says more than {LONGEST} bytes: it is no router");
            }
            body.extend_from_slice(&chunk);
        }
        let overview = serde_json::from_slice(&body).with_context(|| format!("{url} is no router, or one of another version"))?;
        Ok(Look { text: String::from_utf8_lossy(&body).into_owned(), overview })
    }
}

/// What lies beneath an error: what the layers above it say is that they failed.
fn cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(beneath) = cause.source() {
        cause = beneath;
    }
    cause.to_string()
}
