//! For tests: the small models with a tokenizer for printable ASCII, a chat template, and a token that ends an answer.

use std::path::Path;

use overfill_text::gguf::GgufVocabulary;
use serde_json::{Value, json};

/// Ends an answer.
pub(crate) const END: u32 = 96;

/// A folder with one of the models of `tests/fixtures/models`, complete.
pub(crate) fn model(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models").join(name);
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
    }
    let mut tokens: Vec<String> = ('!'..='~').map(String::from).chain(["Ġ", "Ċ", "<end>"].map(String::from)).collect();
    tokens.extend((tokens.len()..128).map(|i| format!("unused{i}")));
    let mut token_types = vec![1; 128];
    token_types[END as usize] = 3;
    let vocabulary = GgufVocabulary { model: "gpt2".into(), pre: Some("smollm".into()), tokens, token_types, ..Default::default() };
    let put = |name: &str, text: String| std::fs::write(folder.path().join(name), text).unwrap();
    put("tokenizer.json", vocabulary.tokenizer().unwrap().to_string(false).unwrap());
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    put("tokenizer_config.json", json!({ "eos_token": "<end>", "chat_template": template }).to_string());
    let config = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["eos_token_id"] = END.into();
    put("config.json", config.to_string());
    folder
}
