//! What tokens are called where their log-probabilities are told.

use std::sync::Arc;

use overfill_guide::Guides;
use overfill_proto::v1::TokenLogprob;
use overfill_text::TextModel;
use serde_json::{Value, json};

/// The tokens of a model.
pub(crate) struct TokenNames {
    pub(crate) model: Arc<TextModel>,
    pub(crate) guides: Arc<Guides>,
}

impl TokenNames {
    /// Text and bytes of one token by itself.
    fn token(&self, id: u32) -> (String, Vec<u8>) {
        match self.guides.token_bytes(id) {
            [] => {
                let text = self.model.token_text(id);
                (text.clone(), text.into_bytes())
            }
            bytes => (String::from_utf8_lossy(bytes).into_owned(), bytes.to_vec()),
        }
    }

    /// What a token is called where its text is a key: a part of a character by its bytes.
    pub(crate) fn name(&self, id: u32) -> String {
        let (text, bytes) = self.token(id);
        if std::str::from_utf8(&bytes).is_ok() {
            return text;
        }
        bytes.iter().fold("bytes:".to_owned(), |name, byte| name + &format!("\\x{byte:02x}"))
    }

    /// A token's log-probability and those of the most likely ones in its place, as chats and responses have them.
    pub(crate) fn logprob(&self, id: u32, logprob: &TokenLogprob) -> Value {
        let entry = |id: u32, logprob: f32| {
            let (text, bytes) = self.token(id);
            json!({ "token": text, "logprob": logprob, "bytes": bytes })
        };
        let mut token = entry(id, logprob.logprob);
        token["top_logprobs"] = logprob.top.iter().map(|t| entry(t.token_id, t.logprob)).collect();
        token
    }
}
