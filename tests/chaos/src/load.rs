//! The load: streams of requests, each asked again and again, whose answers are compared token for token with undisturbed ones.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rand::Rng;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_stream::StreamExt;

/// How an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Whole: the tokens of each choice.
    Whole(BTreeMap<u64, Vec<u64>>),
    /// With an error that the server told.
    Failed(String),
    /// With its connection.
    BrokenOff(String),
}

/// What came of a load.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Answers that were whole, and right.
    pub ok: usize,
    /// Answers that were whole, and are not the undisturbed ones.
    pub wrong: usize,
    /// Why others failed.
    pub failed: Vec<String>,
    /// Why connections to routers broke: these requests were asked again, elsewhere.
    pub broken_off: Vec<String>,
    /// Longest time in which a stream heard nothing.
    pub longest_silence: Duration,
    /// When streams heard again that had heard nothing for longer than [`SILENT`].
    pub heard_again: Vec<Instant>,
}

/// From when on a stream that hears nothing has fallen silent.
pub const SILENT: Duration = Duration::from_secs(1);

/// How often routers are asked whether they are ready.
const ASKED: Duration = Duration::from_secs(1);

/// Streams that ask until they are told to stop, as clients behind what balances them: at routers that were ready a moment ago.
pub struct Load {
    stop: Arc<AtomicBool>,
    outcome: Arc<Mutex<Outcome>>,
    streams: JoinSet<()>,
    following: JoinSet<()>,
}

struct Door {
    url: String,
    ready: AtomicBool,
}

/// The request of stream `number`: of four kinds, greedy, drawn by a seed, under a guide that binds, and two choices.
pub fn request(number: usize, tokens: usize) -> Value {
    let prompt: Vec<usize> = (0..40 + number % 90).map(|i| 10 + (7 * number + 13 * i) % 240).collect();
    let mut request = json!({ "prompt": prompt, "max_tokens": tokens, "stream": true, "return_token_ids": true });
    let more = match number % 4 {
        0 => json!({ "temperature": 0, "ignore_eos": true }),
        1 => json!({ "temperature": 0.8, "seed": number, "ignore_eos": true }),
        2 => json!({ "temperature": 0, "guided_regex": format!("([a-z]{{1,9}} ){{{}}}", tokens / 4) }),
        _ => json!({ "temperature": 0.8, "seed": number, "n": 2, "ignore_eos": true }),
    };
    for (name, value) in more.as_object().into_iter().flatten() {
        request[name] = value.clone();
    }
    request
}

/// A client that keeps no connection longer than an answer.
pub fn client() -> reqwest::Client {
    reqwest::Client::builder().pool_max_idle_per_host(0).connect_timeout(Duration::from_secs(2)).build().unwrap()
}

/// Asks at the door and reads the whole answer; `heard` is called at each piece of it.
pub async fn ask(client: &reqwest::Client, door: &str, request: &Value, mut heard: impl FnMut()) -> Ended {
    let sent = client.post(format!("{door}/v1/completions")).json(request).send().await;
    let answer = match sent {
        Ok(answer) if answer.status().is_success() => answer,
        Ok(answer) => return Ended::Failed(format!("{}: {}", answer.status(), answer.text().await.unwrap_or_default())),
        Err(error) => return Ended::BrokenOff(error.to_string()),
    };
    let (mut pieces, mut unread, mut tokens) = (answer.bytes_stream(), Vec::new(), BTreeMap::<u64, Vec<u64>>::new());
    while let Some(piece) = pieces.next().await {
        let Ok(piece) = piece else { return Ended::BrokenOff("in the middle of an answer".into()) };
        unread.extend_from_slice(&piece);
        while let Some(end) = unread.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = unread.drain(..=end).collect();
            let Some(data) = line.strip_prefix(b"data: ") else { continue };
            if data.starts_with(b"[DONE]") {
                return Ended::Whole(tokens);
            }
            let Ok(event) = serde_json::from_slice::<Value>(data) else { return Ended::Failed("an event that is no JSON".into()) };
            if let Some(error) = event.get("error") {
                return Ended::Failed(error.to_string());
            }
            for choice in event["choices"].as_array().into_iter().flatten() {
                let ids = choice["token_ids"].as_array().into_iter().flatten().filter_map(Value::as_u64);
                tokens.entry(choice["index"].as_u64().unwrap_or_default()).or_default().extend(ids);
            }
            heard();
        }
    }
    Ended::BrokenOff("before its end".into())
}

/// The undisturbed answers of so many streams.
pub async fn undisturbed(doors: &[String], streams: usize, tokens: usize) -> Vec<Ended> {
    let client = client();
    let mut answers = Vec::new();
    for number in 0..streams {
        let answer = ask(&client, &doors[number % doors.len()], &request(number, tokens), || {}).await;
        assert!(matches!(answer, Ended::Whole(_)), "stream {number}, undisturbed: {answer:?}");
        answers.push(answer);
    }
    answers
}

impl Load {
    /// Begins a stream for each of the undisturbed answers.
    pub fn begin(doors: &[String], undisturbed: &[Ended], tokens: usize) -> Self {
        let mut load = Self { stop: Arc::default(), outcome: Arc::default(), streams: JoinSet::new(), following: JoinSet::new() };
        let doors: Arc<Vec<Door>> = Arc::new(doors.iter().map(|url| Door { url: url.clone(), ready: AtomicBool::new(true) }).collect());
        for number in 0..doors.len() {
            load.following.spawn(follow(doors.clone(), number));
        }
        for (number, expected) in undisturbed.iter().enumerate() {
            let (doors, expected, request) = (doors.clone(), expected.clone(), request(number, tokens));
            let (stop, outcome) = (load.stop.clone(), load.outcome.clone());
            load.streams.spawn(stream(number, doors, request, expected, (stop, outcome)));
        }
        load
    }

    /// Waits until all streams have ended their last answer; those that have not within `limit` failed.
    pub async fn end(mut self, limit: Duration) -> Outcome {
        self.stop.store(true, Ordering::Relaxed);
        let ended = tokio::time::timeout(limit, async { while self.streams.join_next().await.is_some() {} }).await;
        let mut outcome = std::mem::take(&mut *self.outcome.lock().unwrap_or_else(PoisonError::into_inner));
        if ended.is_err() {
            let hanging = self.streams.len();
            outcome.failed.extend((0..hanging).map(|_| format!("no end within {limit:?}")));
        }
        outcome
    }
}

type Shared = (Arc<AtomicBool>, Arc<Mutex<Outcome>>);

/// Follows whether a router is ready.
async fn follow(doors: Arc<Vec<Door>>, number: usize) {
    let client = reqwest::Client::builder().timeout(ASKED).pool_max_idle_per_host(0).build().unwrap();
    let door = &doors[number];
    loop {
        tokio::time::sleep(ASKED).await;
        let ready = client.get(format!("{}/ready", door.url)).send().await.is_ok_and(|answer| answer.status().is_success());
        door.ready.store(ready, Ordering::Relaxed);
    }
}

async fn stream(number: usize, doors: Arc<Vec<Door>>, request: Value, expected: Ended, (stop, outcome): Shared) {
    let client = client();
    let mut door = number;
    while !stop.load(Ordering::Relaxed) {
        let ready: Vec<&Door> = doors.iter().filter(|door| door.ready.load(Ordering::Relaxed)).collect();
        let Some(router) = ready.get(door % ready.len().max(1)) else {
            tokio::time::sleep(ASKED / 10).await;
            continue;
        };
        let (mut last, mut silence, mut heard_again) = (Instant::now(), Duration::ZERO, Vec::new());
        let ended = ask(&client, &router.url, &request, || {
            let now = Instant::now();
            silence = silence.max(now - last);
            heard_again.extend((now - last > SILENT).then_some(now));
            last = now;
        })
        .await;
        silence = silence.max(last.elapsed());
        let pause = {
            let mut outcome = outcome.lock().unwrap_or_else(PoisonError::into_inner);
            outcome.longest_silence = outcome.longest_silence.max(silence);
            outcome.heard_again.append(&mut heard_again);
            match ended {
                Ended::BrokenOff(why) => {
                    outcome.broken_off.push(why);
                    // As a client of several routers does it.
                    door += 1;
                    true
                }
                Ended::Failed(why) => {
                    outcome.failed.push(why);
                    true
                }
                whole if whole == expected => {
                    outcome.ok += 1;
                    false
                }
                _ => {
                    outcome.wrong += 1;
                    false
                }
            }
        };
        if pause {
            let pause = rand::rng().random_range(50..150);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }
}
