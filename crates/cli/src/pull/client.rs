//! Requests over HTTP: how long is waited, whom we trust, and who we say we are.
//!
//! Credentials go to the host of the source and to no other, wherever it sends us.

use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::Context;
use reqwest::header::{ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_RANGE, HeaderValue, RANGE, WWW_AUTHENTICATE};
use reqwest::redirect::Policy;
use reqwest::{Certificate, Response, StatusCode, Url};

use super::credentials::{Credentials, Login};
use super::error::{PullError, shown};
use super::pace::Pace;
use super::retry::Retries;
use super::token;

/// Redirects that are followed: a registry or a web shop of files needs one or two.
const REDIRECTS: usize = 10;

/// How long is waited, and how often.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    /// For a connection.
    pub(crate) connect: Duration,
    /// For bytes to come, each time.
    pub(crate) silence: Duration,
    /// Failures in a row, nothing coming between them.
    pub(crate) attempts: u32,
}

/// Asks one source.
pub(crate) struct Client {
    http: reqwest::Client,
    credentials: Credentials,
    /// What the source's host is told, once it is known.
    authorization: Mutex<Option<HeaderValue>>,
    pub(crate) patience: Patience,
}

/// An answer's body that begins at a byte of the file.
pub(crate) struct Body {
    pub(crate) response: Response,
    pub(crate) from: u64,
}

impl Client {
    /// `ca_file`: authorities that are trusted beside those of the system, in PEM.
    ///
    /// # Errors
    /// Where the file cannot be read, or holds no certificate.
    pub(crate) fn new(ca_file: Option<&Path>, credentials: Credentials, patience: Patience) -> anyhow::Result<Self> {
        let mut http = reqwest::Client::builder()
            .connect_timeout(patience.connect)
            .read_timeout(patience.silence)
            .user_agent(concat!("overfill/", env!("CARGO_PKG_VERSION")))
            .redirect(Policy::custom(|attempt| {
                let secured = attempt.previous().iter().any(|url| url.scheme() == "https");
                match attempt.url().scheme() {
                    "http" if secured => attempt.error("it sends us from https to http, where anyone may read along"),
                    _ if attempt.previous().len() > REDIRECTS => attempt.error("it sends us on and on"),
                    _ => attempt.follow(),
                }
            }));
        if let Some(file) = ca_file {
            let pem = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
            let certificates =
                Certificate::from_pem_bundle(&pem).with_context(|| format!("{} holds no certificates in PEM", file.display()))?;
            anyhow::ensure!(!certificates.is_empty(), "{} holds no certificates in PEM", file.display());
            for certificate in certificates {
                http = http.add_root_certificate(certificate);
            }
        }
        let authorization = credentials.upfront()?;
        Ok(Self { http: http.build()?, credentials, authorization: Mutex::new(authorization), patience })
    }

    /// Opens a file from byte `from` on; it may begin earlier all the same, where the server knows no ranges.
    ///
    /// # Errors
    /// Any [`PullError`] of a request.
    pub(crate) async fn open(&self, url: &Url, from: u64) -> Result<Body, PullError> {
        let range = (from > 0).then(|| format!("bytes={from}-"));
        let response = self.ask(url, None, range.as_deref()).await?;
        match response.status() {
            StatusCode::OK => Ok(Body { response, from: 0 }),
            StatusCode::PARTIAL_CONTENT => {
                let said = response.headers().get(CONTENT_RANGE).and_then(|v| v.to_str().ok());
                match said.and_then(|said| said.strip_prefix("bytes ")?.split_once('-')?.0.parse::<u64>().ok()) {
                    Some(begun) if begun == from => Ok(Body { response, from }),
                    // Not what was asked for: all of it, then.
                    _ => {
                        let response = self.ask(url, None, None).await?;
                        match response.status() {
                            StatusCode::OK => Ok(Body { response, from: 0 }),
                            _ => Err(PullError::status(url, &response)),
                        }
                    }
                }
            }
            // What lies here is longer than the file there.
            StatusCode::RANGE_NOT_SATISFIABLE => {
                Err(PullError::Length { url: shown(url), found: format!("at most {from}"), wanted: from + 1 })
            }
            _ => Err(PullError::status(url, &response)),
        }
    }

    /// A document of at most `limit` bytes, which are kept in memory; tries again where that may help.
    ///
    /// # Errors
    /// Any [`PullError`] of a request; [`PullError::TooLong`].
    pub(crate) async fn document(&self, url: &Url, accept: Option<&str>, limit: usize) -> Result<Vec<u8>, PullError> {
        let mut retries = Retries::new(self.patience.attempts);
        loop {
            match self.document_once(url, accept, limit).await {
                Err(error) => retries.pause(error).await?,
                done => return done,
            }
        }
    }

    async fn document_once(&self, url: &Url, accept: Option<&str>, limit: usize) -> Result<Vec<u8>, PullError> {
        let response = self.ask(url, accept, None).await?;
        if response.status() != StatusCode::OK {
            return Err(PullError::status(url, &response));
        }
        read(url, response, limit, self.patience.silence).await
    }

    /// One request, and a second where the first is answered with how to introduce oneself.
    async fn ask(&self, url: &Url, accept: Option<&str>, range: Option<&str>) -> Result<Response, PullError> {
        let response = self.send(url, accept, range).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        let challenges: Vec<&str> = response.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|v| v.to_str().ok()).collect();
        let Some(authorization) = self.introduce(url, &challenges).await? else { return Ok(response) };
        *lock(&self.authorization) = Some(authorization);
        self.send(url, accept, range).await
    }

    /// What to say to a host that asks by these challenges, if there is something.
    async fn introduce(&self, url: &Url, challenges: &[&str]) -> Result<Option<HeaderValue>, PullError> {
        let login = self.credentials.login();
        if let Some(challenge) = challenges.iter().find_map(|c| token::Challenge::parse(c)) {
            let realm = challenge.url(url)?;
            let mut request = self.http.get(realm.clone()).header(ACCEPT, "application/json");
            if let Some(Login { user, password }) = login {
                request = request.basic_auth(user, Some(password));
            }
            let response = self.answer(&realm, request).await?;
            if !response.status().is_success() {
                return Err(PullError::status(&realm, &response));
            }
            return token::bearer(&realm, &read(&realm, response, token::LONGEST, self.patience.silence).await?).map(Some);
        }
        let basic = challenges.iter().any(|c| c.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("basic")));
        Ok(login.filter(|_| basic).map(Login::basic))
    }

    async fn send(&self, url: &Url, accept: Option<&str>, range: Option<&str>) -> Result<Response, PullError> {
        let mut request = self.http.get(url.clone()).header(ACCEPT_ENCODING, "identity");
        if let Some(accept) = accept {
            request = request.header(ACCEPT, accept);
        }
        if let Some(range) = range {
            request = request.header(RANGE, range);
        }
        if let Some(authorization) = lock(&self.authorization).clone() {
            request = request.header(AUTHORIZATION, authorization);
        }
        self.answer(url, request).await
    }

    /// The head of an answer.
    async fn answer(&self, url: &Url, request: reqwest::RequestBuilder) -> Result<Response, PullError> {
        // Redirects are some answers more, each as late as it may be.
        let limit = self.patience.connect + self.patience.silence * 2;
        match tokio::time::timeout(limit, request.send()).await {
            Ok(answer) => answer.map_err(|e| PullError::request(url, &e)),
            Err(_) => Err(PullError::NoAnswer { url: shown(url), seconds: limit.as_secs() }),
        }
    }
}

/// A body of at most `limit` bytes.
async fn read(url: &Url, mut response: Response, limit: usize, silence: Duration) -> Result<Vec<u8>, PullError> {
    let too_long = || PullError::TooLong { url: shown(url), limit };
    if response.content_length().is_some_and(|length| length > limit as u64) {
        return Err(too_long());
    }
    let (mut all, mut pace) = (Vec::new(), Pace::new(silence));
    while let Some(bytes) = pace.next(url, &mut response).await? {
        all.extend_from_slice(&bytes);
        if all.len() > limit {
            return Err(too_long());
        }
    }
    Ok(all)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Nothing that panics is done under it.
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
