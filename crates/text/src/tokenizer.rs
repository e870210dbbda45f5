//! A pair's text side: its manifest, its tokenizer, and its chat template if it has one.

use std::path::Path;
use std::sync::Arc;

use overfill_types::pair::PAIR_FILE;
use overfill_types::{Code, PairManifest, ServiceError};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;

use crate::detokenize::Detokenizer;
use crate::plain::SpecialTokens;
use crate::template::{Chat, ChatTemplate, Message};

/// The tokenizer in a pair's folder.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// Chat template and special tokens in a pair's folder.
pub const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";

/// What the router knows of a pair.
pub struct TextModel {
    /// What `pair.json` says.
    pub manifest: PairManifest,
    text: ModelText,
}

impl std::ops::Deref for TextModel {
    type Target = ModelText;

    fn deref(&self) -> &ModelText {
        &self.text
    }
}

/// The text side of a model, be it part of a pair or not.
pub struct ModelText {
    /// What messages call the model.
    name: String,
    tokenizer: Arc<Tokenizer>,
    template: Option<ChatTemplate>,
    /// The token that ends a turn, as `tokenizer_config.json` names it.
    eos: Option<u32>,
    special: SpecialTokens,
    /// Special tokens in messages are special, as Hugging Face has it.
    special_in_messages: bool,
}

/// What we read of `tokenizer_config.json`.
#[derive(Deserialize)]
struct TokenizerConfig {
    chat_template: Option<Templates>,
    bos_token: Option<SpecialToken>,
    eos_token: Option<SpecialToken>,
}

/// One template, or several with names of which `default` is meant.
#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// A token's text, or an object that holds it.
#[derive(Deserialize)]
#[serde(untagged)]
enum SpecialToken {
    Text(String),
    Object { content: String },
}

impl SpecialToken {
    fn into_text(self) -> String {
        match self {
            Self::Text(text) | Self::Object { content: text } => text,
        }
    }
}

impl TextModel {
    /// Opens a pair's folder: `pair.json`, `tokenizer.json`, `tokenizer_config.json`. Weights are not touched.
    ///
    /// # Errors
    /// [`Code::NotFound`] where a file cannot be read, [`Code::InvalidArgument`] where it is malformed, [`Code::Mismatch`]
    /// where the tokenizer is not the manifest's.
    pub fn open(dir: &Path) -> Result<Self, ServiceError> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read(&path).map_err(|e| ServiceError::new(Code::NotFound, format!("cannot read {}: {e}", path.display())))
        };
        let manifest = PairManifest::from_json(&String::from_utf8_lossy(&read(PAIR_FILE)?))?;
        let bytes = read(TOKENIZER_FILE)?;
        let sha256 = hex::encode(Sha256::digest(&bytes));
        if sha256 != manifest.tokenizer.sha256 {
            return Err(ServiceError::new(
                Code::Mismatch,
                format!(
                    "{TOKENIZER_FILE} has sha256 {sha256}, {PAIR_FILE} says {}: make the pair anew with `overfill pair`",
                    manifest.tokenizer.sha256
                ),
            ));
        }
        let text = ModelText::from_files(&manifest.name, &bytes, &read(TOKENIZER_CONFIG_FILE)?)?;
        Ok(Self { manifest, text })
    }
}

impl std::ops::DerefMut for TextModel {
    fn deref_mut(&mut self) -> &mut ModelText {
        &mut self.text
    }
}

impl ModelText {
    /// From the content of `tokenizer.json` and `tokenizer_config.json`; messages call the model `name`.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] where one is malformed.
    pub fn from_files(name: &str, tokenizer: &[u8], config: &[u8]) -> Result<Self, ServiceError> {
        let malformed =
            |name: &str, e: &dyn std::fmt::Display| ServiceError::new(Code::InvalidArgument, format!("{name} cannot be read: {e}"));
        // The library panics at some files that are no JSON, and at some that are and make no sense.
        let text = std::str::from_utf8(tokenizer).map_err(|e| malformed(TOKENIZER_FILE, &e))?;
        serde_json::from_str::<serde::de::IgnoredAny>(text).map_err(|e| malformed(TOKENIZER_FILE, &e))?;
        let tokenizer = std::panic::catch_unwind(|| Tokenizer::from_bytes(tokenizer))
            .map_err(|_| malformed(TOKENIZER_FILE, &"it makes no sense to the library that reads it"))?
            .map_err(|e| malformed(TOKENIZER_FILE, &e))?;
        let config: TokenizerConfig = serde_json::from_slice(config).map_err(|e| malformed(TOKENIZER_CONFIG_FILE, &e))?;
        let source = config.chat_template.and_then(|templates| match templates {
            Templates::One(source) => Some(source),
            Templates::Named(all) => all.into_iter().find(|t| t.name == "default").map(|t| t.template),
        });
        let text = |token: Option<SpecialToken>| token.map(SpecialToken::into_text).unwrap_or_default();
        let eos_token = text(config.eos_token);
        let eos = tokenizer.token_to_id(&eos_token);
        let template = source.map(|source| ChatTemplate::new(source, text(config.bos_token), eos_token)).transpose()?;
        let special = SpecialTokens::of(&tokenizer)?;
        Ok(Self { name: name.to_owned(), tokenizer: Arc::new(tokenizer), template, eos, special, special_in_messages: false })
    }

    /// The token that ends a turn, if `tokenizer_config.json` names one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Token ids of a text that is continued as it is, with what the tokenizer puts before every text (Llama's
    /// beginning-of-sequence token).
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] where the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, ServiceError> {
        self.tokens(text, true)
    }

    /// As [`ModelText::encode`], with nothing before it.
    ///
    /// # Errors
    /// As [`ModelText::encode`].
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, ServiceError> {
        self.tokens(text, false)
    }

    /// Token ids of a chat, rendered with the template, up to where the assistant's answer begins. Special tokens are those that the
    /// template writes; in messages they are plain text.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] where there is no template, or it refuses the messages.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>, ServiceError> {
        self.encode_whole_chat(&Chat::of(messages))
    }

    /// As [`ModelText::encode_chat`], with tools and whatever else the messages hold.
    ///
    /// # Errors
    /// As [`ModelText::encode_chat`], and where tools are there and the template knows of none.
    pub fn encode_whole_chat(&self, chat: &Chat) -> Result<Vec<u32>, ServiceError> {
        let template = self.template()?;
        let marked = if self.special_in_messages { None } else { self.special.marked(chat)? };
        let chat = marked.as_ref().map_or(chat, |(marked, _)| marked);
        let text = template.render_chat(chat)?;
        if !chat.tools.is_empty() && text == template.render_chat(&Chat { tools: Vec::new(), ..chat.clone() })? {
            let message = format!("tools: the chat template of model {} has no place for tools; leave them out", self.name);
            return Err(ServiceError::new(Code::InvalidArgument, message));
        }
        match &marked {
            // The template writes the special tokens itself.
            None => self.tokens(&text, false),
            Some((_, mark)) => self.special.encode(&text, *mark, &self.tokenizer),
        }
    }

    /// From now on special tokens in messages are special, as Hugging Face has it: whoever writes a message can write turns of
    /// others.
    pub fn trust_messages(&mut self) {
        self.special_in_messages = true;
    }

    fn template(&self) -> Result<&ChatTemplate, ServiceError> {
        self.template.as_ref().ok_or_else(|| {
            let message = format!("model {} has no chat template: send the prompt as text or token ids instead", self.name);
            ServiceError::new(Code::InvalidArgument, message)
        })
    }

    /// Whether chats can be rendered.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// A detokeniser for one answer.
    pub fn detokenizer(&self) -> Detokenizer {
        Detokenizer::new(self.tokenizer.clone())
    }

    /// The text of token ids, with special tokens or without.
    pub fn decode(&self, ids: &[u32], special: bool) -> String {
        self.tokenizer.decode(ids, !special).unwrap_or_default()
    }

    /// A token as the tokenizer writes it, in its own alphabet; `None` where there is none with this id.
    pub fn token_name(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// The text of one token by itself, special tokens included: what log-probabilities name tokens by.
    pub fn token_text(&self, id: u32) -> String {
        self.tokenizer.decode(&[id], false).unwrap_or_default()
    }

    fn tokens(&self, text: &str, add_special: bool) -> Result<Vec<u32>, ServiceError> {
        match self.tokenizer.encode_fast(text, add_special) {
            Ok(encoding) => Ok(encoding.get_ids().to_vec()),
            Err(e) => Err(ServiceError::new(Code::InvalidArgument, format!("the text cannot be tokenised: {e}"))),
        }
    }
}
