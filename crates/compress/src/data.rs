//! Conversations: what decode models are calibrated, trained and evaluated with.
//!
//! A file is JSON lines. A line is `{"messages": [{"role", "content"}, …]}`, the last message the assistant's, or
//! `{"prompt", "response"}`; `task` and `answers` are optional and only scored.

use std::io::BufRead;
use std::path::Path;

use overfill_text::{Message, ModelText};
use overfill_types::ServiceError;
use serde::Deserialize;

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
}

/// A conversation as token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// All that the full model reads, up to the end of the assistant's header.
    pub prompt: Vec<u32>,
    /// All that the decode model learns to write, the end-of-turn token included. Not empty.
    pub response: Vec<u32>,
}

impl Conversation {
    /// Its token ids; `end` is the token that ends a turn.
    ///
    /// # Errors
    /// Where the chat template refuses the messages.
    pub fn tokenise(&self, text: &ModelText, end: u32) -> Result<Example, ServiceError> {
        let prompt = text.encode_chat(&self.messages)?;
        let mut response = text.encode(&self.response)?;
        response.push(end);
        Ok(Example { prompt, response })
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Turns {
    Messages { messages: Vec<Message> },
    Pair { prompt: String, response: String },
}

#[derive(Deserialize)]
struct Line {
    #[serde(flatten)]
    turns: Turns,
    task: Option<String>,
    #[serde(default)]
    answers: Vec<String>,
}

/// Reads a file of conversations; empty lines are passed over.
///
/// # Errors
/// [`CompressError::File`], and [`CompressError::Line`] with the number of the first line that is malformed.
pub fn read(path: &Path) -> Result<Vec<Conversation>, CompressError> {
    let failed = |source| CompressError::File { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut all = Vec::new();
    for (at, line) in std::io::BufReader::new(file).lines().enumerate() {
        let line = line.map_err(failed)?;
        if line.trim().is_empty() {
            continue;
        }
        all.push(parse(&line).map_err(|what| CompressError::Line { path: path.to_owned(), line: at + 1, what })?);
    }
    Ok(all)
}

fn parse(line: &str) -> Result<Conversation, String> {
    let value: serde_json::Value = serde_json::from_str(line).map_err(|e| format!("no JSON: {e}"))?;
    let line: Line = serde_json::from_value(value)
        .map_err(|_| "neither {\"messages\": [{\"role\", \"content\"}, …]} nor {\"prompt\", \"response\"}".to_owned())?;
    let (messages, response) = match line.turns {
        Turns::Pair { prompt, response } => (vec![Message { role: "user".into(), content: prompt }], response),
        Turns::Messages { mut messages } => match messages.pop() {
            Some(last) if last.role == "assistant" && !messages.is_empty() => (messages, last.content),
            _ => return Err("the last message must be the assistant's, after one of another role".into()),
        },
    };
    Ok(Conversation { messages, response, task: line.task, answers: line.answers })
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
    fn a_broken_line_is_named() {
        for broken in [
            "{",
            "[]",
            r#"{"prompt": "p"}"#,
            r#"{"messages": []}"#,
            r#"{"messages": [{"role": "assistant", "content": "a"}]}"#,
            r#"{"messages": [{"role": "user", "content": "a"}]}"#,
        ] {
            let file = file(&format!("{{\"prompt\": \"p\", \"response\": \"r\"}}\n\n{broken}\n"));
            let error = read(file.path()).unwrap_err().to_string();
            assert!(error.contains("line 3: "), "{error}");
        }
    }
}
