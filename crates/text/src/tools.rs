//! Calls of tools within an answer: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as Hermes, Qwen and their kin write them.

use serde_json::Value;

/// What a call begins with.
pub const BEGIN: &str = "<tool_call>";
/// What it ends with.
pub const END: &str = "</tool_call>";

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolPiece {
    /// Text.
    Text(String),
    /// A call.
    Call {
        /// The tool's name.
        name: String,
        /// A JSON object.
        arguments: String,
    },
}

/// Reads one answer's text as it comes. Text that may be the beginning of a call is held back; what turns out to be none is text.
#[derive(Clone, Debug, Default)]
pub struct ToolReader {
    held: String,
    /// `held` is what follows a [`BEGIN`].
    inside: bool,
    /// A call was read: blanks after it only part it from the next.
    called: bool,
}

impl ToolReader {
    /// Takes the next piece of text.
    pub fn push(&mut self, text: &str) -> Vec<ToolPiece> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        loop {
            let mark = if self.inside { END } else { BEGIN };
            let Some(at) = self.held.find(mark) else { break };
            let rest = self.held.split_off(at + mark.len());
            self.held.truncate(at);
            let before = std::mem::replace(&mut self.held, rest);
            if self.inside {
                self.close(&before, END, &mut pieces);
            } else {
                self.text(before, &mut pieces);
            }
            self.inside = !self.inside;
        }
        if !self.inside {
            let keep = (1..BEGIN.len()).rev().find(|&n| self.held.ends_with(&BEGIN[..n])).unwrap_or(0);
            let rest = self.held.split_off(self.held.len() - keep);
            let before = std::mem::replace(&mut self.held, rest);
            self.text(before, &mut pieces);
        }
        pieces
    }

    /// What was held back, at the answer's end: a call needs no end mark there.
    pub fn finish(&mut self) -> Vec<ToolPiece> {
        let mut pieces = Vec::new();
        let rest = std::mem::take(&mut self.held);
        if std::mem::take(&mut self.inside) {
            self.close(&rest, "", &mut pieces);
        } else {
            self.text(rest, &mut pieces);
        }
        pieces
    }

    fn text(&self, text: String, to: &mut Vec<ToolPiece>) {
        if !(text.is_empty() || self.called && text.trim().is_empty()) {
            to.push(ToolPiece::Text(text));
        }
    }

    fn close(&mut self, body: &str, end: &str, to: &mut Vec<ToolPiece>) {
        match call(body) {
            Some(call) => {
                self.called = true;
                to.push(call);
            }
            None => to.push(ToolPiece::Text(format!("{BEGIN}{body}{end}"))),
        }
    }
}

fn call(body: &str) -> Option<ToolPiece> {
    let mut call: Value = serde_json::from_str(body.trim()).ok()?;
    let name = call.get("name")?.as_str()?.to_owned();
    let arguments = match call.get_mut("arguments").map(Value::take) {
        Some(arguments @ Value::Object(_)) => arguments,
        None | Some(Value::Null) => Value::Object(serde_json::Map::new()),
        Some(_) => return None,
    };
    Some(ToolPiece::Call { name, arguments: arguments.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes of `text`, cut into pieces of `size` characters, with neighbouring texts put together.
    fn read(text: &str, size: usize) -> Vec<ToolPiece> {
        let mut reader = ToolReader::default();
        let characters: Vec<char> = text.chars().collect();
        let mut pieces: Vec<ToolPiece> = characters.chunks(size).flat_map(|c| reader.push(&c.iter().collect::<String>())).collect();
        pieces.extend(reader.finish());
        pieces.into_iter().fold(Vec::new(), |mut all, piece| {
            match (all.last_mut(), piece) {
                (Some(ToolPiece::Text(before)), ToolPiece::Text(text)) => before.push_str(&text),
                (_, piece) => all.push(piece),
            }
            all
        })
    }

    #[test]
    fn calls_are_read_however_the_text_is_cut() {
        let call = |name: &str, arguments: &str| ToolPiece::Call { name: name.into(), arguments: arguments.into() };
        let text = |text: &str| ToolPiece::Text(text.into());
        let cases = [
            ("plain <b> é", vec![text("plain <b> é")]),
            (
                "Let me see. <tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": [1, \"é\"]}}\n</tool_call>\n<tool_call>{\"name\": \"g\"}</tool_call>\n",
                vec![text("Let me see. "), call("f", "{\"x\":[1,\"é\"]}"), call("g", "{}")],
            ),
            ("<tool_call>{\"name\": \"f\", \"arguments\": {}}", vec![call("f", "{}")]),
            ("<tool_call>{\"name\": </tool_call> and <tool_c", vec![text("<tool_call>{\"name\": </tool_call> and <tool_c")]),
            (
                "<tool_call>{\"name\": \"f\", \"arguments\": 3}</tool_call>",
                vec![text("<tool_call>{\"name\": \"f\", \"arguments\": 3}</tool_call>")],
            ),
        ];
        for (answer, pieces) in cases {
            for size in [1, 2, 3, 7, 1000] {
                assert_eq!(read(answer, size), pieces, "pieces of {size}");
            }
        }
    }
}
