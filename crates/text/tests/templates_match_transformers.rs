//! Chats as transformers renders them, and refusals in a template's own words. `tests/reference` made what is expected.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::collections::HashMap;
use std::path::Path;

use overfill_text::ModelText;
use overfill_text::template::{Chat, ChatTemplate, Message};
use overfill_types::Code;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

#[derive(Deserialize)]
struct Fixture<C> {
    bos_token: String,
    eos_token: String,
    templates: HashMap<String, String>,
    chats: HashMap<String, C>,
    expected: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    chat: String,
    text: Option<String>,
    refusal: Option<String>,
}

/// A chat as `tool_templates.py` has it.
#[derive(Deserialize)]
struct WithTools {
    messages: Vec<Value>,
    #[serde(default)]
    tools: Vec<Value>,
    #[serde(default)]
    variables: Map<String, Value>,
}

fn file(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)).unwrap()
}

fn check<C: DeserializeOwned>(fixture: &str, chat: impl Fn(&C) -> Chat) {
    let fixture: Fixture<C> = serde_json::from_slice(&file(fixture)).unwrap();
    assert_eq!(fixture.expected.len(), fixture.templates.len() * fixture.chats.len());
    let mut wrong = Vec::new();
    for case in fixture.expected {
        let source = fixture.templates[&case.template].clone();
        let template = ChatTemplate::new(source, fixture.bos_token.clone(), fixture.eos_token.clone()).unwrap();
        let rendered = template.render_chat(&chat(&fixture.chats[&case.chat]));
        let right = match (&rendered, &case.text, case.refusal) {
            (Ok(text), Some(expected), None) => text == expected,
            (Err(error), None, Some(refusal)) => error.code == Code::InvalidArgument && error.message.contains(&refusal),
            _ => false,
        };
        if !right {
            wrong.push(format!("{} with {}: {rendered:?}, and not {:?}", case.template, case.chat, case.text));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_template_and_chat() {
    check("chat_templates.json", |messages: &Vec<Message>| Chat::of(messages));
}

#[test]
fn tools_calls_and_results_in_the_templates_of_the_field() {
    check("tool_templates.json", |chat: &WithTools| Chat {
        messages: chat.messages.clone(),
        tools: chat.tools.clone(),
        variables: chat.variables.clone(),
        ..Chat::default()
    });
}

#[test]
fn who_may_not_speak_is_told_in_the_templates_words() {
    let fixture: Fixture<WithTools> = serde_json::from_slice(&file("tool_templates.json")).unwrap();
    let config = json!({ "chat_template": fixture.templates["gemma 2"], "bos_token": "<bos>", "eos_token": "<eos>" });
    let model = ModelText::from_files("m", &file("tokenizers/gemma/tokenizer.json"), config.to_string().as_bytes()).unwrap();
    let say = |role: &str| json!({ "role": role, "content": "Be terse." });
    model.encode_whole_chat(&Chat { messages: vec![say("user")], ..Chat::default() }).unwrap();
    // A developer speaks as the system, which this template does not let speak.
    for role in ["system", "developer"] {
        let error = model.encode_whole_chat(&Chat { messages: vec![say(role), say("user")], ..Chat::default() }).unwrap_err();
        assert!(error.code == Code::InvalidArgument && error.field.as_deref() == Some("messages"), "{error}");
        assert!(error.message.ends_with("System role not supported"), "{error}");
    }
}
