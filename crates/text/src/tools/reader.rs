//! Calls of tools out of an answer's text.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::tools::ToolFormat;

/// Hermes' end of a call.
const END: &str = "</tool_call>";
/// Between name and arguments, as Mistral's later models have it.
const ARGUMENTS: &str = "[ARGS]";

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToolPiece {
    /// Text.
    Text {
        /// Where in the answer it begins, in bytes.
        at: usize,
        /// It, as it stands there.
        text: String,
    },
    /// A call.
    Call {
        /// The tool's name.
        name: String,
        /// A JSON object.
        arguments: String,
    },
}

/// Reads one answer's text as it comes. Text that may be the beginning of a call is held back; what turns out to be none is text.
#[derive(Clone, Debug)]
pub struct ToolReader {
    format: ToolFormat,
    /// The tools that there are: calls without a mark are known by them.
    names: Vec<String>,
    held: String,
    /// Where in the answer `held` begins, in bytes.
    at: usize,
    /// `held` is what follows a mark.
    inside: bool,
    /// A call was read: blanks after it only part it from the next.
    called: bool,
    /// Something was given: without a mark, calls stand at the beginning or nowhere.
    begun: bool,
}

impl ToolReader {
    /// Of an answer to a request with tools of these names.
    pub fn new(format: ToolFormat, names: Vec<String>) -> Self {
        Self { format, names, held: String::new(), at: 0, inside: false, called: false, begun: false }
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, text: &str) -> Vec<ToolPiece> {
        self.held.push_str(text);
        let mut pieces = Vec::new();
        let Some(mark) = self.format.mark() else {
            if self.begun || !may_begin_call(&self.held) {
                self.begun = true;
                self.give(self.held.len(), &mut pieces);
            }
            return pieces;
        };
        loop {
            let wanted = if self.inside { END } else { mark };
            if self.inside && self.format != ToolFormat::Hermes {
                // It goes on to the answer's end.
                return pieces;
            }
            let Some(at) = self.held.find(wanted) else { break };
            if self.inside {
                let body = self.take(at);
                self.close(&body, END, &mut pieces);
            } else {
                self.give(at, &mut pieces);
            }
            self.take(wanted.len());
            self.inside = !self.inside;
        }
        if !self.inside {
            let keep = (1..mark.len()).rev().find(|&n| self.held.ends_with(&mark[..n])).unwrap_or(0);
            self.give(self.held.len() - keep, &mut pieces);
        }
        pieces
    }

    /// What was held back, at the answer's end: a call needs no end mark there.
    pub fn finish(&mut self) -> Vec<ToolPiece> {
        let mut pieces = Vec::new();
        if std::mem::take(&mut self.inside) || (self.format.mark().is_none() && !self.begun) {
            let body = self.take(self.held.len());
            self.close(&body, "", &mut pieces);
        } else {
            self.give(self.held.len(), &mut pieces);
        }
        pieces
    }

    /// Takes so many bytes of what is held.
    fn take(&mut self, bytes: usize) -> String {
        let rest = self.held.split_off(bytes);
        self.at += bytes;
        std::mem::replace(&mut self.held, rest)
    }

    /// Gives so many bytes of what is held as text.
    fn give(&mut self, bytes: usize, to: &mut Vec<ToolPiece>) {
        let at = self.at;
        let text = self.take(bytes);
        self.text(at, text, to);
    }

    fn text(&self, at: usize, text: String, to: &mut Vec<ToolPiece>) {
        if !(text.is_empty() || self.called && text.trim().is_empty()) {
            to.push(ToolPiece::Text { at, text });
        }
    }

    /// A body that was just taken, between the mark before it and `end`, which follows.
    fn close(&mut self, body: &str, end: &str, to: &mut Vec<ToolPiece>) {
        match self.calls(body) {
            Some(calls) => {
                self.called = true;
                to.extend(calls);
            }
            None => {
                let mark = self.format.mark().unwrap_or_default();
                self.text(self.at - body.len() - mark.len(), format!("{mark}{body}{end}"), to);
            }
        }
    }

    /// The calls that a body is made of, if it is.
    fn calls(&self, body: &str) -> Option<Vec<ToolPiece>> {
        match self.format {
            ToolFormat::Hermes => Some(vec![serde_json::from_str::<Call<'_>>(body.trim()).ok()?.piece()?]),
            ToolFormat::Llama => {
                let calls = parted(body)?.into_iter().map(Call::piece).collect::<Option<Vec<_>>>()?;
                let known = |call: &ToolPiece| matches!(call, ToolPiece::Call { name, .. } if self.names.contains(name));
                Some(calls).filter(|calls| !calls.is_empty() && calls.iter().all(known))
            }
            ToolFormat::Mistral | ToolFormat::Granite if body.trim_start().starts_with('[') && !body.contains(ARGUMENTS) => {
                let list: Vec<Call<'_>> = serde_json::from_str(body.trim()).ok()?;
                list.into_iter().map(Call::piece).collect::<Option<Vec<_>>>().filter(|calls| !calls.is_empty())
            }
            ToolFormat::Mistral | ToolFormat::Granite => {
                let mark = self.format.mark().unwrap_or_default();
                body.split(mark).map(named).collect()
            }
        }
    }
}

/// Whether what a text begins with may be a call without a mark: an object whose first field is its name.
fn may_begin_call(text: &str) -> bool {
    let mut rest = text.trim_start();
    for part in ["{", "\"name\""] {
        if rest.len() < part.len() {
            return part.starts_with(rest);
        }
        let Some(after) = rest.strip_prefix(part) else { return false };
        rest = after.trim_start();
    }
    true
}

/// A call as an object. Its arguments stay as they were written: a number may be larger than any that this program computes with.
#[derive(Deserialize)]
struct Call<'a> {
    name: String,
    #[serde(borrow, alias = "parameters")]
    arguments: Option<&'a RawValue>,
}

impl Call<'_> {
    fn piece(self) -> Option<ToolPiece> {
        let arguments = self.arguments.map_or("null", RawValue::get);
        let arguments = if arguments == "null" { "{}" } else { arguments };
        arguments.starts_with('{').then(|| ToolPiece::Call { name: self.name, arguments: arguments.to_owned() })
    }
}

/// Calls with `;` between them.
fn parted(text: &str) -> Option<Vec<Call<'_>>> {
    let (mut values, mut rest) = (Vec::new(), text.trim());
    while !rest.is_empty() {
        let mut read = serde_json::Deserializer::from_str(rest).into_iter::<Call<'_>>();
        values.push(read.next()?.ok()?);
        rest = rest[read.byte_offset()..].trim_start();
        rest = rest.strip_prefix(';').unwrap_or(rest).trim_start();
    }
    Some(values)
}

/// A call as a name and an object after it.
fn named(call: &str) -> Option<ToolPiece> {
    let (name, arguments) = call.split_once(ARGUMENTS).or_else(|| Some(call.split_at(call.find('{')?)))?;
    let arguments: &RawValue = serde_json::from_str(arguments.trim()).ok()?;
    let name = name.trim();
    let call = Call { name: name.to_owned(), arguments: Some(arguments) };
    call.piece().filter(|_| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    enum Piece {
        Text(String),
        Call(String, String),
    }

    /// What comes of `text`, cut into pieces of `size` characters, with neighbouring texts put together, which stand where they say.
    fn read(format: ToolFormat, text: &str, size: usize) -> Vec<Piece> {
        let mut reader = ToolReader::new(format, vec!["f".into(), "g".into()]);
        let characters: Vec<char> = text.chars().collect();
        let mut pieces: Vec<ToolPiece> = characters.chunks(size).flat_map(|c| reader.push(&c.iter().collect::<String>())).collect();
        pieces.extend(reader.finish());
        pieces.into_iter().fold(Vec::new(), |mut all, piece| {
            if let ToolPiece::Text { at, text: piece } = &piece {
                assert_eq!(text.get(*at..at + piece.len()), Some(piece.as_str()), "{text}");
            }
            match (all.last_mut(), piece) {
                (Some(Piece::Text(before)), ToolPiece::Text { text, .. }) => before.push_str(&text),
                (_, ToolPiece::Text { text, .. }) => all.push(Piece::Text(text)),
                (_, ToolPiece::Call { name, arguments }) => all.push(Piece::Call(name, arguments)),
            }
            all
        })
    }

    fn check(format: ToolFormat, cases: &[(&str, Vec<Piece>)]) {
        for (answer, pieces) in cases {
            for size in [1, 2, 3, 7, 1000] {
                assert_eq!(read(format, answer, size), *pieces, "{answer} in pieces of {size}");
            }
        }
    }

    fn call(name: &str, arguments: &str) -> Piece {
        Piece::Call(name.into(), arguments.into())
    }

    fn text(text: &str) -> Piece {
        Piece::Text(text.into())
    }

    #[test]
    fn calls_between_tags_are_read_however_the_text_is_cut() {
        check(
            ToolFormat::Hermes,
            &[
                ("plain <b> é", vec![text("plain <b> é")]),
                (
                    "Let me see. <tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": [1, \"é\"]}}\n</tool_call>\n<tool_call>{\"name\": \"g\"}</tool_call>\n",
                    vec![text("Let me see. "), call("f", "{\"x\": [1, \"é\"]}"), call("g", "{}")],
                ),
                ("<tool_call>{\"name\": \"f\", \"arguments\": {}}", vec![call("f", "{}")]),
                ("<tool_call>{\"name\": \"f\", \"arguments\": {\"n\":1E999}}</tool_call>", vec![call("f", "{\"n\":1E999}")]),
                ("<tool_call>{\"name\": </tool_call> and <tool_c", vec![text("<tool_call>{\"name\": </tool_call> and <tool_c")]),
                (
                    "<tool_call>{\"name\": \"f\", \"arguments\": 3}</tool_call>",
                    vec![text("<tool_call>{\"name\": \"f\", \"arguments\": 3}</tool_call>")],
                ),
            ],
        );
    }

    #[test]
    fn calls_without_a_mark_are_the_whole_answer() {
        check(
            ToolFormat::Llama,
            &[
                ("plain {\"name\": \"f\", \"parameters\": {}}", vec![text("plain {\"name\": \"f\", \"parameters\": {}}")]),
                ("{\"name\": \"f\", \"parameters\": {\"x\": \"é\"}}", vec![call("f", "{\"x\": \"é\"}")]),
                (
                    " {\"name\": \"f\", \"parameters\": {}}; {\"name\":\"g\",\"arguments\":{\"y\":1}}\n",
                    vec![call("f", "{}"), call("g", "{\"y\":1}")],
                ),
                // A person's name is no tool, and an answer that is cut off no call.
                ("{\"name\": \"Ada\", \"parameters\": {}}", vec![text("{\"name\": \"Ada\", \"parameters\": {}}")]),
                ("{\"name\": \"f\", \"param", vec![text("{\"name\": \"f\", \"param")]),
                ("{\"age\": 3}", vec![text("{\"age\": 3}")]),
                ("", vec![]),
            ],
        );
        let mut reader = ToolReader::new(ToolFormat::Llama, Vec::new());
        assert_eq!(reader.push("{ \"n"), []);
        assert_eq!(
            reader.push("umber\""),
            [ToolPiece::Text { at: 0, text: "{ \"number\"".into() }],
            "what can be no call is not held back"
        );
    }

    #[test]
    fn calls_after_a_mark_end_with_the_answer() {
        check(
            ToolFormat::Mistral,
            &[
                ("plain [1] é [TOOL", vec![text("plain [1] é [TOOL")]),
                (
                    "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"x\": \"]\"}}, {\"name\": \"g\", \"arguments\": {}}]",
                    vec![call("f", "{\"x\": \"]\"}"), call("g", "{}")],
                ),
                ("So: [TOOL_CALLS]f[ARGS]{\"x\": 1}[TOOL_CALLS]g{}", vec![text("So: "), call("f", "{\"x\": 1}"), call("g", "{}")]),
                ("[TOOL_CALLS][{\"name\": \"f\"", vec![text("[TOOL_CALLS][{\"name\": \"f\"")]),
                ("[TOOL_CALLS][]", vec![text("[TOOL_CALLS][]")]),
            ],
        );
        check(ToolFormat::Granite, &[("<|tool_call|>[{\"name\": \"f\", \"arguments\": {}}]", vec![call("f", "{}")])]);
    }
}
