//! How a family of models writes calls of tools.

use std::str::FromStr;

/// A family's way to write calls of tools.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, one after the other: Hermes, Qwen, SmolLM.
    #[default]
    Hermes,
    /// `{"name": …, "parameters": {…}}` and nothing else, several parted by `;`: Llama 3.
    Llama,
    /// `[TOOL_CALLS]` and a list of `{"name": …, "arguments": {…}}`, or name and arguments of each after a mark of its own: Mistral.
    Mistral,
    /// `<|tool_call|>` and a list as Mistral's: Granite 3.
    Granite,
}

impl ToolFormat {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Hermes, Self::Llama, Self::Mistral, Self::Granite];

    /// What a chat template asks its model for.
    pub fn of_template(source: &str) -> Self {
        let has = |mark: &str| source.contains(mark);
        if has("[TOOL_CALLS]") {
            Self::Mistral
        } else if has("<|tool_call|>") {
            Self::Granite
        } else if !has("<tool_call>") && (has("<|python_tag|>") || has(r#""parameters": dictionary of argument name"#)) {
            Self::Llama
        } else {
            Self::Hermes
        }
    }

    /// Its name, as `--tool-call-parser` takes it: vLLM's.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hermes => "hermes",
            Self::Llama => "llama3_json",
            Self::Mistral => "mistral",
            Self::Granite => "granite",
        }
    }

    /// What calls begin with, where they have a mark.
    pub fn mark(self) -> Option<&'static str> {
        match self {
            Self::Hermes => Some("<tool_call>"),
            Self::Llama => None,
            Self::Mistral => Some("[TOOL_CALLS]"),
            Self::Granite => Some("<|tool_call|>"),
        }
    }

    /// The text before, between and after calls.
    pub fn around(self) -> [&'static str; 3] {
        match self {
            Self::Hermes => ["<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>"],
            Self::Llama => ["", "; ", ""],
            Self::Mistral => ["[TOOL_CALLS][", ", ", "]"],
            Self::Granite => ["<|tool_call|>[", ", ", "]"],
        }
    }

    /// What the object of a call calls its arguments.
    pub fn arguments(self) -> &'static str {
        if self == Self::Llama { "parameters" } else { "arguments" }
    }
}

impl FromStr for ToolFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let named = Self::ALL.into_iter().find(|format| format.as_str() == text);
        named.ok_or_else(|| {
            let names: Vec<&str> = Self::ALL.iter().map(|format| format.as_str()).collect();
            format!("'{text}' is no way to write calls of tools: {} are", names.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_tells_its_family() {
        for (source, format) in [
            ("{{ messages }}", ToolFormat::Hermes),
            ("within <tool_call></tool_call> XML tags", ToolFormat::Hermes),
            ("{{- '<|python_tag|>' + tool_call.name + '.call(' }}", ToolFormat::Llama),
            (r#"in the format {"name": function name, "parameters": dictionary of argument name and its value}."#, ToolFormat::Llama),
            (r#"{{ "[TOOL_CALLS] [" }}"#, ToolFormat::Mistral),
            ("<|tool_call|> followed by a JSON list of tools used", ToolFormat::Granite),
        ] {
            assert_eq!(ToolFormat::of_template(source), format, "{source}");
        }
        assert!(ToolFormat::ALL.into_iter().all(|format| format.as_str().parse() == Ok(format)));
        assert!("pythonic".parse::<ToolFormat>().unwrap_err().contains("llama3_json"));
    }
}
