//! Chats as transformers renders them, and refusals in a template's own words. `tests/reference` made what is expected.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::collections::HashMap;
use std::path::Path;

use overfill_text::template::{ChatTemplate, Message};
use overfill_types::Code;
use serde::Deserialize;

#[derive(Deserialize)]
struct Fixture {
    bos_token: String,
    eos_token: String,
    templates: HashMap<String, String>,
    chats: HashMap<String, Vec<Message>>,
    expected: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    chat: String,
    text: Option<String>,
    refusal: Option<String>,
}

#[test]
fn every_template_and_chat() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/chat_templates.json");
    let fixture: Fixture = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(fixture.expected.len(), fixture.templates.len() * fixture.chats.len());
    let mut wrong = Vec::new();
    for case in fixture.expected {
        let source = fixture.templates[&case.template].clone();
        let template = ChatTemplate::new(source, fixture.bos_token.clone(), fixture.eos_token.clone()).unwrap();
        let rendered = template.render(&fixture.chats[&case.chat]);
        let right = match (&rendered, case.text, case.refusal) {
            (Ok(text), Some(expected), None) => *text == expected,
            (Err(error), None, Some(refusal)) => error.code == Code::InvalidArgument && error.message.contains(&refusal),
            _ => false,
        };
        if !right {
            wrong.push(format!("{} with {}: {rendered:?}", case.template, case.chat));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
