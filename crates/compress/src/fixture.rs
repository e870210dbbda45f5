//! For tests: small models with a tokenizer for printable ASCII, a chat template, and a token that ends an answer.

#[path = "../../../tests/reference/families.rs"]
pub(crate) mod families;

use std::path::Path;

use overfill_text::gguf::GgufVocabulary;
use serde_json::{Value, json};

/// Ends an answer of [`model`].
pub(crate) const END: u32 = 96;

/// A folder with one of the models of `tests/fixtures/models`, complete.
pub(crate) fn model(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models").join(name);
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
    }
    complete(folder.path(), 128);
    folder
}

/// A folder with a model of `tests/fixtures/families.json`, complete.
pub(crate) fn family(config: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    families::folder(config, folder.path());
    complete(folder.path(), 64);
    folder
}

/// Puts a tokenizer of so many tokens into a folder; the last letter is followed by the token that ends an answer.
fn complete(folder: &Path, size: usize) {
    let letters = ('!'..='~').map(String::from).take(size - 3);
    let mut tokens: Vec<String> = letters.chain(["Ġ", "Ċ", "<end>"].map(String::from)).collect();
    let end = tokens.len() - 1;
    tokens.extend((tokens.len()..size).map(|i| format!("unused{i}")));
    let mut token_types = vec![1; size];
    token_types[end] = 3;
    let vocabulary = GgufVocabulary { model: "gpt2".into(), pre: Some("smollm".into()), tokens, token_types, ..Default::default() };
    let put = |name: &str, text: String| std::fs::write(folder.join(name), text).unwrap();
    put("tokenizer.json", vocabulary.tokenizer().unwrap().to_string(false).unwrap());
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    put("tokenizer_config.json", json!({ "eos_token": "<end>", "chat_template": template }).to_string());
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["eos_token_id"] = end.into();
    put("config.json", config.to_string());
}
