//! Who may ask, and how much: API keys, each client's limits, and its part where requests wait.
//!
//! Keys are known by their sha256 alone: they are not kept, and how long a comparison takes tells nothing of them. The file may
//! change while the router runs: a client whose limits stay keeps what it has taken of them.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, header};
use overfill_schedule::{Bucket, Share};
use overfill_types::{Code, ServiceError};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// The file of keys: JSON.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    clients: Vec<ClientEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ClientEntry {
    name: String,
    /// The keys themselves.
    #[serde(default)]
    keys: Vec<String>,
    /// Or their sha256, in hexadecimal digits.
    #[serde(default)]
    sha256: Vec<String>,
    /// Its part where requests wait, beside others of its class.
    #[serde(default = "one")]
    weight: u32,
    /// Where requests wait, those of a higher class go first.
    #[serde(default)]
    class: i32,
    /// Most answers that are written for it at a time.
    max_concurrent: Option<u32>,
    requests_per_second: Option<f64>,
    /// Tokens of prompts and answers.
    tokens_per_second: Option<f64>,
    /// What it may take at once: so many seconds' worth.
    #[serde(default = "ten")]
    burst_seconds: f64,
}

/// What a client may have, as its entry says it.
#[derive(Clone, Debug, PartialEq)]
struct Limits {
    weight: u32,
    class: i32,
    max_concurrent: Option<u32>,
    requests_per_second: Option<f64>,
    tokens_per_second: Option<f64>,
    burst_seconds: f64,
}

fn one() -> u32 {
    1
}

fn ten() -> f64 {
    10.0
}

/// All clients.
#[derive(Debug)]
pub(crate) struct Clients {
    /// Of the file of keys; `None` where nobody needs a key.
    known: Option<RwLock<Known>>,
    anonymous: Arc<Client>,
}

/// The clients of a file of keys.
#[derive(Debug, Default)]
struct Known {
    /// By the sha256 of their keys.
    by_key: HashMap<[u8; 32], Arc<Client>>,
    /// All that there ever were, by name: the queue knows them by number.
    numbers: HashMap<String, usize>,
}

/// One client.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) name: String,
    pub(crate) share: Share,
    /// `None` where it has no key.
    limits: Option<Limits>,
    permits: Option<(u32, Arc<Semaphore>)>,
    requests: Option<Mutex<Bucket>>,
    tokens: Option<Mutex<Bucket>>,
    /// Guides of it that are compiled at a time; `None` for those without keys, who are many.
    compiles: Option<Semaphore>,
    /// Requests that were refused since it is over its limits, ever.
    limited: AtomicU64,
}

/// Where Anthropic's clients send their key.
pub(crate) const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// What a client's answer takes of its limits. Dropping it gives back its permit, and the tokens that were not written.
#[derive(Debug)]
pub(crate) struct Allowance {
    client: Arc<Client>,
    _permit: Option<OwnedSemaphorePermit>,
    unwritten: usize,
}

impl Clients {
    /// Of a file of keys, or nobody in particular.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] that says what is wrong with the file.
    pub(crate) fn open(file: Option<&Path>) -> Result<Self, ServiceError> {
        let refuse = |message: String| ServiceError::new(Code::InvalidArgument, message);
        let known = file.map(|file| Known::default().changed(file)).transpose().map_err(refuse)?;
        let share = Share { client: 0, weight: 1, class: 0 };
        let name = "anonymous".to_owned();
        let anonymous =
            Client { name, share, limits: None, permits: None, requests: None, tokens: None, compiles: None, limited: AtomicU64::new(0) };
        Ok(Self { known: known.map(RwLock::new), anonymous: Arc::new(anonymous) })
    }

    /// Takes the file of keys as it is now.
    ///
    /// # Errors
    /// What is wrong with it; then all stays as it was.
    pub(crate) fn reload(&self, file: &Path) -> Result<(), String> {
        let Some(known) = &self.known else { return Ok(()) };
        // It is read without the lock that requests need.
        let changed = known.read().unwrap_or_else(PoisonError::into_inner).changed(file)?;
        *known.write().unwrap_or_else(PoisonError::into_inner) = changed;
        Ok(())
    }

    /// Whose key `authorization: Bearer KEY` has, or `x-api-key: KEY`, which Anthropic's clients send.
    ///
    /// # Errors
    /// [`Code::Unauthenticated`] where it is missing or unknown, and keys are asked for.
    pub(crate) fn of(&self, headers: &HeaderMap) -> Result<Arc<Client>, ServiceError> {
        let Some(known) = &self.known else { return Ok(self.anonymous.clone()) };
        let sent = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let key = sent.and_then(|value| value.split_once(' ')).filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
        let own = headers.get(API_KEY).and_then(|value| value.to_str().ok());
        let Some(key) = key.map(|(_, key)| key).or(own) else {
            let message = "You didn't provide an API key: send it in the header 'Authorization: Bearer YOUR_KEY'";
            return Err(ServiceError::new(Code::Unauthenticated, message));
        };
        let digest: [u8; 32] = Sha256::digest(key.trim()).into();
        let known = known.read().unwrap_or_else(PoisonError::into_inner);
        known
            .by_key
            .get(&digest)
            .cloned()
            .ok_or_else(|| ServiceError::new(Code::Unauthenticated, "Incorrect API key provided: this router does not know it"))
    }
}

impl Known {
    /// With the file as it is now.
    fn changed(&self, file: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(file).map_err(|e| format!("the file of keys cannot be read: {e}"))?;
        let file: KeyFile = serde_json::from_str(&text).map_err(|e| format!("the file of keys is not understood: {e}"))?;
        let mut changed = Self { by_key: HashMap::new(), numbers: self.numbers.clone() };
        let old: HashMap<&str, &Arc<Client>> = self.by_key.values().map(|client| (client.name.as_str(), client)).collect();
        let mut names = HashSet::new();
        for entry in file.clients {
            let ClientEntry { name, keys, sha256, weight, class, max_concurrent, requests_per_second, tokens_per_second, burst_seconds } =
                entry;
            let limits = Limits { weight, class, max_concurrent, requests_per_second, tokens_per_second, burst_seconds };
            if !names.insert(name.clone()) {
                return Err(format!("client {name} stands there twice: give it all of its keys in one place"));
            }
            let digests = digests(&name, &keys, &sha256)?;
            // 0 is who has no key.
            let next = changed.numbers.len() + 1;
            let number = *changed.numbers.entry(name.clone()).or_insert(next);
            let client = match old.get(name.as_str()).filter(|client| client.limits.as_ref() == Some(&limits)) {
                Some(client) => (*client).clone(),
                None => Arc::new(Client::new(name, number, limits)?),
            };
            for digest in digests {
                if changed.by_key.insert(digest, client.clone()).is_some() {
                    return Err(format!("client {}: a key stands there twice", client.name));
                }
            }
        }
        Ok(changed)
    }
}

fn digests(name: &str, keys: &[String], sha256: &[String]) -> Result<Vec<[u8; 32]>, String> {
    let mut digests: Vec<[u8; 32]> = keys.iter().map(|key| Sha256::digest(key).into()).collect();
    for digest in sha256 {
        let bytes = hex::decode(digest).ok().and_then(|bytes| bytes.try_into().ok());
        digests.push(bytes.ok_or_else(|| format!("client {name}: '{digest}' is no sha256 of 64 hexadecimal digits"))?);
    }
    if digests.is_empty() { Err(format!("client {name} has no key")) } else { Ok(digests) }
}

impl Client {
    fn new(name: String, number: usize, limits: Limits) -> Result<Self, String> {
        let Limits { weight, class, max_concurrent, requests_per_second, tokens_per_second, burst_seconds } = limits;
        if weight == 0 || max_concurrent == Some(0) {
            return Err(format!("client {name}: weight and max_concurrent are at least 1"));
        }
        if !(0.1..=86_400.0).contains(&burst_seconds) {
            return Err(format!("client {name}: burst_seconds is {burst_seconds}; it is from 0.1 to 86400"));
        }
        let bucket = |what: &str, rate: Option<f64>| match rate {
            None => Ok(None),
            Some(rate) if rate > 0.0 && rate.is_finite() => {
                let now = Instant::now().into_std();
                Ok(Some(Mutex::new(Bucket::new(rate, Duration::from_secs_f64(burst_seconds), now))))
            }
            Some(rate) => Err(format!("client {name}: {what} is {rate}; it is above 0")),
        };
        let (requests, tokens) = (bucket("requests_per_second", requests_per_second)?, bucket("tokens_per_second", tokens_per_second)?);
        let permits = max_concurrent.map(|most| (most, Arc::new(Semaphore::new(most as usize))));
        let share = Share { client: number, weight, class };
        let (limits, compiles, limited) = (Some(limits), Some(Semaphore::new(1)), AtomicU64::new(0));
        Ok(Self { name, share, limits, permits, requests, tokens, compiles, limited })
    }

    /// A request for `answers` answers comes: a permit for each.
    ///
    /// # Errors
    /// [`Code::ResourceExhausted`], with when to try again.
    pub(crate) fn begin(self: &Arc<Self>, answers: usize) -> Result<Vec<Allowance>, ServiceError> {
        let mut permits = Vec::new();
        if let Some((most, all)) = &self.permits {
            for _ in 0..answers {
                let permit = all.clone().try_acquire_owned().map_err(|_| {
                    let message = format!("client {} has {most} answers under way at most: wait until one is whole", self.name);
                    self.over(message, Duration::from_secs(1))
                })?;
                permits.push(permit);
            }
        }
        self.take(&self.requests, 1.0, "requests")?;
        let mut permits = permits.into_iter();
        Ok((0..answers).map(|_| Allowance { client: self.clone(), _permit: permits.next(), unwritten: 0 }).collect())
    }

    /// Whether it is one of the file of keys.
    pub(crate) fn has_key(&self) -> bool {
        self.share.client > 0
    }

    /// Waits until no other guide of this client is compiled, so that those of others are not kept waiting by many of one.
    pub(crate) async fn turn_to_compile(&self) -> Option<SemaphorePermit<'_>> {
        self.compiles.as_ref()?.acquire().await.ok()
    }

    /// It has `prompt` tokens to read in all, and `answer` to write at most.
    ///
    /// # Errors
    /// [`Code::ResourceExhausted`], with when to try again.
    pub(crate) fn spend(&self, prompt: usize, answer: usize) -> Result<(), ServiceError> {
        self.take(&self.tokens, (prompt + answer) as f64, "tokens")
    }

    /// Requests that were refused since it is over its limits, ever.
    #[cfg(test)]
    pub(crate) fn limited(&self) -> u64 {
        self.limited.load(Ordering::Relaxed)
    }

    fn take(&self, bucket: &Option<Mutex<Bucket>>, amount: f64, what: &str) -> Result<(), ServiceError> {
        let Some(bucket) = bucket else { return Ok(()) };
        let taken = bucket.lock().unwrap_or_else(PoisonError::into_inner).take(amount, Instant::now().into_std());
        taken.map_err(|wait| {
            let message =
                format!("Rate limit reached: client {} is over its {what} per second; try again in {:.1} s", self.name, wait.as_secs_f64());
            self.over(message, wait)
        })
    }

    fn over(&self, message: String, wait: Duration) -> ServiceError {
        self.limited.fetch_add(1, Ordering::Relaxed);
        ServiceError::new(Code::ResourceExhausted, message).retry_after(wait)
    }
}

impl Allowance {
    /// So many tokens may be written; they are paid for.
    pub(crate) fn may_write(&mut self, tokens: usize) {
        self.unwritten = tokens;
    }

    /// A token was written.
    pub(crate) fn wrote(&mut self) {
        self.unwritten = self.unwritten.saturating_sub(1);
    }
}

impl Drop for Allowance {
    fn drop(&mut self) {
        if let Some(bucket) = self.client.tokens.as_ref().filter(|_| self.unwritten > 0) {
            bucket.lock().unwrap_or_else(PoisonError::into_inner).give_back(self.unwritten as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn clients(text: &str) -> Result<Clients, String> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("keys.json");
        std::fs::write(&file, text).unwrap();
        Clients::open(Some(&file)).map_err(|e| e.message)
    }

    fn of(clients: &Clients, authorization: &str) -> Result<Arc<Client>, ServiceError> {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, HeaderValue::from_str(authorization).unwrap());
        clients.of(&headers)
    }

    #[test]
    fn a_key_names_its_client() {
        let digest = hex::encode(Sha256::digest("sk-b"));
        let text =
            format!(r#"{{"clients": [{{"name": "a", "keys": ["sk-a", "sk-aa"], "weight": 3}}, {{"name": "b", "sha256": ["{digest}"]}}]}}"#);
        let clients = clients(&text).unwrap();
        for (sent, name) in [("Bearer sk-a", "a"), ("bearer sk-aa", "a"), ("Bearer sk-b ", "b")] {
            assert_eq!(of(&clients, sent).unwrap().name, name);
        }
        assert_eq!(of(&clients, "Bearer sk-a").unwrap().share, Share { client: 1, weight: 3, class: 0 });
        for sent in ["Bearer sk-c", "Bearer ", "Basic sk-a", "sk-a"] {
            assert_eq!(of(&clients, sent).unwrap_err().code, Code::Unauthenticated, "{sent}");
        }
        assert_eq!(clients.of(&HeaderMap::new()).unwrap_err().code, Code::Unauthenticated);
        assert_eq!(of(&Clients::open(None).unwrap(), "Bearer anything").unwrap().name, "anonymous");
    }

    #[test]
    fn a_wrong_file_is_told_of() {
        for (text, word) in [
            ("{", "not understood"),
            (r#"{"clients": [{"name": "a"}]}"#, "no key"),
            (r#"{"clients": [{"name": "a", "keys": ["x"], "rate": 3}]}"#, "rate"),
            (r#"{"clients": [{"name": "a", "keys": ["x"], "requests_per_second": 0}]}"#, "above 0"),
            (r#"{"clients": [{"name": "a", "keys": ["x", "x"]}]}"#, "twice"),
            (r#"{"clients": [{"name": "a", "sha256": ["abc"]}]}"#, "no sha256"),
        ] {
            let error = clients(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn a_file_that_changes_is_taken_and_a_wrong_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("keys.json");
        let write = |entries: &str| std::fs::write(&file, format!(r#"{{"clients": [{entries}]}}"#)).unwrap();
        write(r#"{"name": "a", "keys": ["x"], "max_concurrent": 1}, {"name": "b", "keys": ["y"]}"#);
        let clients = Clients::open(Some(&file)).unwrap();
        let (a, b) = (of(&clients, "Bearer x").unwrap(), of(&clients, "Bearer y").unwrap());
        let held = a.begin(1).unwrap();
        write(
            r#"{"name": "c", "keys": ["z"]}, {"name": "b", "keys": ["y"], "weight": 2}, {"name": "a", "keys": ["x", "new"], "max_concurrent": 1}"#,
        );
        clients.reload(&file).unwrap();
        let again = of(&clients, "Bearer new").unwrap();
        assert!(Arc::ptr_eq(&a, &again) && again.begin(1).is_err(), "what it has taken counts on");
        let heavier = of(&clients, "Bearer y").unwrap();
        assert!(heavier.share.weight == 2 && heavier.share.client == b.share.client, "the queue knows it by the same number");
        assert_eq!(of(&clients, "Bearer z").unwrap().share.client, 3);
        write(r#"{"name": "a", "keys": []}"#);
        assert!(clients.reload(&file).unwrap_err().contains("no key"));
        assert!(of(&clients, "Bearer x").is_ok(), "all is as it was");
        write(r#"{"name": "b", "keys": ["y"]}"#);
        clients.reload(&file).unwrap();
        assert_eq!(of(&clients, "Bearer x").unwrap_err().code, Code::Unauthenticated, "it was taken away");
        drop(held);
    }

    #[test]
    fn limits_are_kept_and_given_back() {
        let entry = r#"{"name": "a", "keys": ["x"], "max_concurrent": 2, "tokens_per_second": 10, "burst_seconds": 10}"#;
        let client = of(&clients(&format!(r#"{{"clients": [{entry}]}}"#)).unwrap(), "Bearer x").unwrap();
        let mut two = client.begin(2).unwrap();
        let error = client.begin(1).unwrap_err();
        assert!(error.code == Code::ResourceExhausted && error.retry_after.is_some(), "{error}");
        client.spend(20, 80).unwrap();
        two[0].may_write(80);
        (0..10).for_each(|_| two[0].wrote());
        assert!(client.spend(1, 1).unwrap_err().retry_after.unwrap() < Duration::from_millis(200));
        drop(two);
        // Seventy were not written.
        client.spend(60, 0).unwrap();
        assert_eq!(client.begin(3).unwrap_err().code, Code::ResourceExhausted, "more than it may have");
        assert_eq!(client.begin(2).unwrap().len(), 2, "those of the one that was refused are free");
        assert_eq!(client.limited(), 3);
    }
}
