//! OpenAI's API over HTTP, streamed.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use reqwest::Client;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use serde_json::{Map, Value, json};

use super::sse::SseEvents;
use super::{Answer, Door, Prompt, TargetArgs};
use crate::failure::{Failure, Kind};
use crate::sampling::SamplingArgs;

/// How long a connection may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// How long a body may take to end after `[DONE]`.
const CLOSING_LIMIT: Duration = Duration::from_millis(100);

/// A server that speaks OpenAI's API.
pub(super) struct OpenAi {
    client: Client,
    base: String,
    endpoint: String,
    /// What every request has.
    fields: Map<String, Value>,
}

impl OpenAi {
    pub(super) fn new(args: &TargetArgs, door: Door, sampling: &SamplingArgs, ignore_eos: bool) -> anyhow::Result<Self> {
        let base = args.url();
        ensure!(base.starts_with("http://") || base.starts_with("https://"), "--base-url is {base}: http:// and https:// are spoken");
        let mut headers = HeaderMap::new();
        for (name, value) in args.headers() {
            let fit = (HeaderName::try_from(&name), HeaderValue::try_from(&value));
            let (Ok(name), Ok(value)) = fit else { anyhow::bail!("--header: '{name}' is no header with a value that HTTP takes") };
            headers.insert(name, value);
        }
        // A proxy would be measured along with the server.
        let client = Client::builder().no_proxy().connect_timeout(CONNECT_LIMIT).default_headers(headers).build();
        let chat = door == Door::Chat;
        let mut fields = sampling.fields(chat);
        fields.insert("stream".into(), json!(true));
        fields.insert("stream_options".into(), json!({ "include_usage": true }));
        if ignore_eos {
            fields.insert("ignore_eos".into(), json!(true));
        }
        fields.extend(args.extra_body.clone().unwrap_or_default());
        let path = if chat { "/v1/chat/completions" } else { "/v1/completions" };
        let endpoint = format!("{base}{}", args.endpoint.as_deref().unwrap_or(path));
        Ok(Self { client: client.context("an HTTP client cannot be made")?, base, endpoint, fields })
    }

    /// The first model that the server lists.
    pub(super) async fn first_model(&self) -> Result<Option<String>, Failure> {
        let response = self.client.get(format!("{}/v1/models", self.base)).send().await.map_err(|e| Failure::caused(Kind::Connect, &e))?;
        let status = response.status();
        let body = response.text().await.map_err(|e| Failure::caused(Kind::BrokeOff, &e))?;
        if !status.is_success() {
            return Err(Failure::new(Kind::Http(status.as_u16()), error_message(&body)));
        }
        let models: Value = serde_json::from_str(&body).map_err(|e| Failure::caused(Kind::Malformed, &e))?;
        Ok(models["data"][0]["id"].as_str().map(str::to_owned))
    }

    pub(super) fn body(&self, model: &str, prompt: &Prompt, max_tokens: u32) -> Vec<u8> {
        let mut body = self.fields.clone();
        body.insert("model".into(), json!(model));
        let (field, prompt, limit) = match prompt {
            Prompt::Chat(messages) => ("messages", json!(messages), "max_completion_tokens"),
            Prompt::Ids(ids) => ("prompt", json!(ids), "max_tokens"),
            Prompt::Text(text) => ("prompt", json!(text), "max_tokens"),
        };
        body.insert(field.into(), prompt);
        body.entry(limit).or_insert(json!(max_tokens));
        Value::Object(body).to_string().into_bytes()
    }

    pub(super) async fn ask(&self, body: Vec<u8>, answer: &mut Answer) -> Result<(), Failure> {
        let request = self.client.post(&self.endpoint).header(CONTENT_TYPE, "application/json").body(body);
        let mut response = request.send().await.map_err(|e| Failure::caused(Kind::Connect, &e))?;
        let status = response.status();
        if !status.is_success() {
            let text = response.text().await.unwrap_or_else(|e| e.to_string());
            return Err(Failure::new(Kind::Http(status.as_u16()), error_message(&text)));
        }
        let (mut events, mut stream) = (SseEvents::default(), Stream::default());
        loop {
            let piece = response.chunk().await.map_err(|e| Failure::caused(Kind::BrokeOff, &e))?;
            let now = Instant::now();
            let Some(piece) = piece else { return stream.closed(answer) };
            for data in events.push(&piece).map_err(|_| Failure::new(Kind::Malformed, "an event is larger than 16 MiB"))? {
                if stream.take(&data, now, answer)? {
                    // To the body's end: a connection with something left to read cannot be used again.
                    let rest = async { while let Ok(Some(_)) = response.chunk().await {} };
                    let _ = tokio::time::timeout(CLOSING_LIMIT, rest).await;
                    return stream.closed(answer);
                }
            }
        }
    }
}

/// Where a stream of chunks stands.
#[derive(Default)]
struct Stream {
    /// `[DONE]`, or a chunk with a `finish_reason`: the answer is whole.
    finished: bool,
}

impl Stream {
    /// Takes an event; true after the last.
    fn take(&mut self, data: &[u8], now: Instant, answer: &mut Answer) -> Result<bool, Failure> {
        if data == b"[DONE]" {
            self.finished = true;
            return Ok(true);
        }
        let chunk: Value = serde_json::from_slice(data).map_err(|e| Failure::caused(Kind::Malformed, &e))?;
        if !chunk["error"].is_null() {
            return Err(Failure::new(Kind::ErrorInStream, error_message(&chunk.to_string())));
        }
        let count = |name: &str| chunk["usage"][name].as_u64().and_then(|n| usize::try_from(n).ok());
        answer.prompt_tokens = count("prompt_tokens").or(answer.prompt_tokens);
        answer.output_tokens = count("completion_tokens").or(answer.output_tokens);
        let choice = &chunk["choices"][0];
        if choice.is_null() {
            return Ok(false);
        }
        let text = choice["text"].as_str().or_else(|| choice["delta"]["content"].as_str()).unwrap_or_default();
        let thought = ["reasoning_content", "reasoning"].iter().find_map(|name| choice["delta"][name].as_str()).unwrap_or_default();
        answer.text += text;
        let ends = !choice["finish_reason"].is_null();
        self.finished |= ends;
        // The chunk that says who speaks and the one that says why it ended may be empty. Any other is a token, even if its
        // text is: half a character.
        let opens = !choice["delta"]["role"].is_null();
        let told = tokens_in(choice);
        if told.unwrap_or(0) > 0 || !text.is_empty() || !thought.is_empty() || (!ends && !opens && told.is_none()) {
            answer.arrivals.push((now, told.unwrap_or(1).max(1)));
        }
        Ok(false)
    }

    /// The stream has ended: was the answer whole?
    fn closed(&self, answer: &Answer) -> Result<(), Failure> {
        match (self.finished, answer.arrivals.is_empty()) {
            (true, false) => Ok(()),
            (true, true) => Err(Failure::new(Kind::Empty, "the stream ended well, and had no token")),
            (false, _) => Err(Failure::new(Kind::BrokeOff, "the stream ended without [DONE] and without a finish_reason")),
        }
    }
}

/// Tokens of a chunk, where the server tells their ids or their log-probabilities.
fn tokens_in(choice: &Value) -> Option<u32> {
    let lists = [&choice["token_ids"], &choice["logprobs"]["content"], &choice["logprobs"]["tokens"]];
    lists.iter().find_map(|list| list.as_array()).map(|list| list.len() as u32)
}

/// What an OpenAI error says, or the body as it is.
fn error_message(body: &str) -> String {
    let parsed: Value = serde_json::from_str(body).unwrap_or_default();
    let message = [&parsed["error"]["message"], &parsed["message"], &parsed["error"]].into_iter().find_map(|m| m.as_str());
    message.unwrap_or(body).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(chunks: &[Value]) -> (Result<(), Failure>, Answer) {
        let (mut stream, mut answer) = (Stream::default(), Answer::default());
        for chunk in chunks {
            if let Err(failure) = stream.take(chunk.to_string().as_bytes(), Instant::now(), &mut answer) {
                return (Err(failure), answer);
            }
        }
        (stream.closed(&answer), answer)
    }

    fn counts(answer: &Answer) -> Vec<u32> {
        answer.arrivals.iter().map(|(_, tokens)| *tokens).collect()
    }

    #[test]
    fn a_chat_is_counted_by_its_tokens() {
        let delta = |delta: Value, finish: Value| json!({ "choices": [{ "delta": delta, "finish_reason": finish }] });
        let (whole, answer) = take(&[
            delta(json!({ "role": "assistant", "content": "" }), Value::Null),
            delta(json!({ "content": "Hel" }), Value::Null),
            delta(json!({ "content": "" }), Value::Null),
            delta(json!({ "content": "lo" }), Value::Null),
            delta(json!({}), json!("length")),
            json!({ "choices": [], "usage": { "prompt_tokens": 7, "completion_tokens": 3 } }),
        ]);
        assert_eq!(whole, Ok(()));
        assert_eq!((answer.text.as_str(), counts(&answer)), ("Hello", vec![1, 1, 1]));
        assert_eq!((answer.prompt_tokens, answer.output_tokens), (Some(7), Some(3)));
    }

    #[test]
    fn several_tokens_in_a_chunk_are_counted_where_they_are_told() {
        let (whole, answer) = take(&[
            json!({ "choices": [{ "text": "abc", "token_ids": [1, 2, 3], "finish_reason": null }] }),
            json!({ "choices": [{ "text": "", "token_ids": [], "finish_reason": null }] }),
            json!({ "choices": [{ "text": "d", "logprobs": { "tokens": ["d"] }, "finish_reason": "stop" }] }),
        ]);
        assert_eq!(whole, Ok(()));
        assert_eq!(counts(&answer), [3, 1]);
    }

    #[test]
    fn what_is_not_whole_fails() {
        let token = json!({ "choices": [{ "text": "a", "finish_reason": null }] });
        assert_eq!(take(std::slice::from_ref(&token)).0.unwrap_err().kind, Kind::BrokeOff);
        let error = json!({ "error": { "message": "lost", "code": 503 } });
        let (failed, answer) = take(&[token, error]);
        assert_eq!(failed, Err(Failure::new(Kind::ErrorInStream, "lost")));
        assert_eq!(counts(&answer), [1]);
        assert_eq!(take(&[json!({ "choices": [{ "text": "", "finish_reason": "stop" }] })]).0.unwrap_err().kind, Kind::Empty);
    }

    #[test]
    fn errors_say_what_the_server_said() {
        assert_eq!(error_message(r#"{"error": {"message": "too many", "type": "x"}}"#), "too many");
        assert_eq!(error_message("<html>Bad Gateway</html>\n"), "<html>Bad Gateway</html>");
    }
}
