//! Conversations: what decode models are calibrated, trained and evaluated with.
//!
//! A file is JSON lines. A line is `{"messages": [{"role", "content"}, …]}`, the last message the assistant's, or
//! `{"prompt", "response"}`; `task`, `answers` and `metric` are optional and only scored. `"complete": false` says that the answer was
//! cut off, so that nobody learns to end there.

use std::io::BufRead;
use std::path::Path;

use overfill_text::{Message, ModelText};
use overfill_types::ServiceError;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::error::CompressError;

/// One conversation: everything up to the answer, and the answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Conversation {
    /// What comes before the answer; the chat template makes a prompt of it.
    pub messages: Vec<Message>,
    /// The assistant's answer.
    pub response: String,
    /// Which task it belongs to, where scores are told by task.
    pub task: Option<String>,
    /// Answers that count as right; empty where nothing is scored.
    pub answers: Vec<String>,
    /// Which score tells best whether the task was done.
    pub metric: Metric,
    /// Whether the answer ends where it ends, and was not cut off.
    pub complete: bool,
    /// What else the line says, carried along when an answer is written to it.
    pub other: Map<String, Value>,
}

/// How an answer is compared with those that count as right. All three compare words as SQuAD does: without case,
/// punctuation and articles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// The same words.
    Exact,
    /// The words that both have: harmonic mean of the shares of one and the other.
    #[default]
    F1,
    /// The right answer stands in it.
    Contains,
}

/// A conversation as token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// All that the full model reads, up to the end of the assistant's header.
    pub prompt: Vec<u32>,
    /// All that the decode model learns to write, with the end-of-turn token where the answer is complete. Not empty.
    pub response: Vec<u32>,
}

impl Conversation {
    /// Its token ids; `end` is the token that ends a turn.
    ///
    /// # Errors
    /// Where the chat template refuses the messages.
    pub fn tokenise(&self, text: &ModelText, end: u32) -> Result<Example, ServiceError> {
        let prompt = text.encode_chat(&self.messages)?;
        let mut response = text.encode_plain(&self.response)?;
        if self.complete {
            response.push(end);
        }
        Ok(Example { prompt, response })
    }

    /// Its line in a file, without the end of the line.
    pub fn to_line(&self) -> String {
        let mut messages = json!(self.messages);
        if let Some(messages) = messages.as_array_mut() {
            messages.push(json!({ "role": "assistant", "content": self.response }));
        }
        let mut line = Map::from_iter([("messages".to_owned(), messages)]);
        if let Some(task) = &self.task {
            line.insert("task".into(), json!(task));
        }
        if !self.answers.is_empty() {
            line.insert("answers".into(), json!(self.answers));
        }
        if self.metric != Metric::default() {
            line.insert("metric".into(), json!(self.metric));
        }
        if !self.complete {
            line.insert("complete".into(), json!(false));
        }
        line.extend(self.other.clone());
        Value::Object(line).to_string()
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Turns {
    Messages { messages: Vec<Message> },
    Pair { prompt: String, response: String },
    Prompt { prompt: String },
}

/// Keys of a line that mean something here.
const KEYS: [&str; 7] = ["messages", "prompt", "response", "task", "answers", "metric", "complete"];

#[derive(Deserialize)]
struct Line {
    #[serde(flatten)]
    turns: Turns,
    task: Option<String>,
    #[serde(default)]
    answers: Vec<String>,
    #[serde(default)]
    metric: Metric,
    #[serde(default = "yes")]
    complete: bool,
}

fn yes() -> bool {
    true
}

/// Reads a file of conversations; empty lines are passed over.
///
/// # Errors
/// [`CompressError::File`], and [`CompressError::Line`] with the number of the first line that is malformed or whose answer is empty.
pub fn read(path: &Path) -> Result<Vec<Conversation>, CompressError> {
    lines(path, |conversation| {
        if conversation.response.is_empty() {
            return Err("the answer is empty: leave the line out, or have one written with `overfill answer`".into());
        }
        Ok(conversation)
    })
}

/// Reads a file of prompts that wait for an answer: conversations that end with another role's message, or `{"prompt"}`. Answers
/// that are there already are left out.
///
/// # Errors
/// As [`read`].
pub fn read_prompts(path: &Path) -> Result<Vec<Conversation>, CompressError> {
    lines(path, |conversation| Ok(Conversation { response: String::new(), complete: true, ..conversation }))
}

fn lines(path: &Path, take: impl Fn(Conversation) -> Result<Conversation, String>) -> Result<Vec<Conversation>, CompressError> {
    let failed = |source| CompressError::File { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut all = Vec::new();
    for (at, line) in std::io::BufReader::new(file).lines().enumerate() {
        let line = line.map_err(failed)?;
        if line.trim().is_empty() {
            continue;
        }
        all.push(parse(&line).and_then(&take).map_err(|what| CompressError::Line { path: path.to_owned(), line: at + 1, what })?);
    }
    Ok(all)
}

/// Reads one line.
///
/// # Errors
/// A sentence that says what is wrong with it.
pub fn parse(line: &str) -> Result<Conversation, String> {
    let value: Value = serde_json::from_str(line).map_err(|e| format!("no JSON: {e}"))?;
    let mut other = value.as_object().cloned().unwrap_or_default();
    other.retain(|key, _| !KEYS.contains(&key.as_str()));
    let line: Line = serde_json::from_value(value)
        .map_err(|_| "neither {\"messages\": [{\"role\", \"content\"}, …]} nor {\"prompt\", \"response\"}".to_owned())?;
    let asked = |prompt| vec![Message { role: "user".into(), content: prompt }];
    let (messages, response) = match line.turns {
        Turns::Pair { prompt, response } => (asked(prompt), response),
        Turns::Prompt { prompt } => (asked(prompt), String::new()),
        Turns::Messages { mut messages } => {
            let response = messages.pop_if(|last| last.role == "assistant").map_or_else(String::new, |last| last.content);
            if messages.is_empty() {
                return Err("there must be a message of another role before the assistant's answer".into());
            }
            (messages, response)
        }
    };
    let Line { task, answers, metric, complete, .. } = line;
    Ok(Conversation { messages, response, task, answers, metric, complete, other })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn both_forms_are_read() {
        let file = file(concat!(
            r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], "task": "t"}"#,
            "\n\n",
            r#"{"prompt": "p", "response": "r", "answers": ["x", "y"]}"#,
        ));
        let all = read(file.path()).unwrap();
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].messages.iter().map(|m| m.role.as_str()).collect::<Vec<_>>(), ["system", "user"]);
        assert_eq!((all[0].response.as_str(), all[0].task.as_deref()), ("a", Some("t")));
        assert_eq!((all[1].messages[0].content.as_str(), all[1].answers.len()), ("p", 2));
    }

    #[test]
    fn prompts_are_read_with_and_without_an_answer() {
        let file = file(concat!(
            r#"{"prompt": "p", "response": "r"}"#,
            "\n",
            r#"{"prompt": "p", "document": "kept elsewhere"}"#,
            "\n",
            r#"{"messages": [{"role": "user", "content": "p"}]}"#,
            "\n",
            r#"{"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}], "complete": false}"#,
        ));
        for prompt in read_prompts(file.path()).unwrap() {
            assert_eq!((prompt.messages.len(), prompt.messages[0].content.as_str()), (1, "p"));
            assert!(prompt.response.is_empty() && prompt.complete);
            let answered = Conversation {
                response: "yes\n\"no\"".into(),
                complete: false,
                task: Some("t".into()),
                metric: Metric::Contains,
                ..prompt
            };
            let line = answered.to_line();
            assert!(!line.contains('\n'));
            assert_eq!(parse(&line).unwrap(), answered);
        }
        assert!(read(file.path()).unwrap_err().to_string().contains("line 2: the answer is empty"));
    }

    #[test]
    fn a_broken_line_is_named() {
        for broken in [
            "{",
            "[]",
            r#"{"prompt": "p"}"#,
            r#"{"messages": []}"#,
            r#"{"messages": [{"role": "assistant", "content": "a"}]}"#,
            r#"{"messages": [{"role": "user", "content": "a"}]}"#,
            r#"{"prompt": "p", "response": ""}"#,
        ] {
            let file = file(&format!("{{\"prompt\": \"p\", \"response\": \"r\"}}\n\n{broken}\n"));
            let error = read(file.path()).unwrap_err().to_string();
            assert!(error.contains("line 3: "), "{error}");
        }
    }
}
