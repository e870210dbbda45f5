//! A pair's text side: its manifest, its tokenizer, and its chat template if it has one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use overfill_types::pair::PAIR_FILE;
use overfill_types::{Code, PairManifest, ServiceError};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokenizers::Tokenizer;
use tokenizers::processors::template::TemplateProcessing;

use crate::detokenize::Detokenizer;
use crate::plain::SpecialTokens;
use crate::template::{Chat, ChatTemplate, Message};
use crate::tools::ToolFormat;

pub use overfill_types::pair::TOKENIZER_FILE;

/// Chat template and special tokens in a pair's folder.
pub const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";

/// Most roles of one chat.
const MOST_ROLES: usize = 16;

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
    /// The one for chats with tools, where it is another.
    tool_template: Option<ChatTemplate>,
    tool_format: ToolFormat,
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
    tokenizer_class: Option<String>,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
}

/// The classes of Hugging Face that put a text's first and last token there themselves, whatever `tokenizer.json` says.
pub(crate) const OWN_ENDS: [&str; 6] =
    ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast", "GemmaTokenizer", "GemmaTokenizerFast"];

/// One template, or several with names: `default`, and `tool_use` for chats with tools.
#[derive(Deserialize)]
#[serde(untagged, expecting = "chat_template is a text, or a list of objects with a name and a template")]
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
        let mut tokenizer = std::panic::catch_unwind(|| Tokenizer::from_bytes(tokenizer))
            .map_err(|_| malformed(TOKENIZER_FILE, &"it makes no sense to the library that reads it"))?
            .map_err(|e| malformed(TOKENIZER_FILE, &e))?;
        // How somebody's training has cut and filled its batches says nothing of prompts.
        tokenizer.with_padding(None).with_truncation(None).map_err(|e| malformed(TOKENIZER_FILE, &e))?;
        let config: TokenizerConfig = serde_json::from_slice(config).map_err(|e| malformed(TOKENIZER_CONFIG_FILE, &e))?;
        let (source, tool_source) = match config.chat_template {
            None => (None, None),
            Some(Templates::One(source)) => (Some(source), None),
            Some(Templates::Named(mut all)) => {
                let mut named = |name: &str| all.iter().position(|t| t.name == name).map(|at| all.swap_remove(at).template);
                (named("default"), named("tool_use"))
            }
        };
        let tool_format = tool_source.as_ref().or(source.as_ref()).map_or_else(ToolFormat::default, |s| ToolFormat::of_template(s));
        let text = |token: Option<SpecialToken>| token.map(SpecialToken::into_text).unwrap_or_default();
        let eos_token = text(config.eos_token);
        let eos = tokenizer.token_to_id(&eos_token);
        let bos_token = text(config.bos_token);
        let compiled =
            |source: Option<String>| source.map(|source| ChatTemplate::new(source, bos_token.clone(), eos_token.clone())).transpose();
        let (template, tool_template) = (compiled(source)?, compiled(tool_source)?);
        let special = SpecialTokens::of(&tokenizer)?;
        if config.tokenizer_class.as_deref().is_some_and(|class| OWN_ENDS.contains(&class)) {
            let silent = tokenizer.get_post_processor().is_none();
            if silent || config.add_bos_token.is_some() || config.add_eos_token.is_some() {
                let (first, last) = (config.add_bos_token.unwrap_or(true), config.add_eos_token.unwrap_or(false));
                put_ends(&mut tokenizer, Some(bos_token).filter(|_| first), Some(eos_token).filter(|_| last))
                    .map_err(|e| malformed(TOKENIZER_CONFIG_FILE, &e))?;
            }
        }
        let tokenizer = Arc::new(tokenizer);
        Ok(Self { name: name.to_owned(), tokenizer, template, tool_template, tool_format, eos, special, special_in_messages: false })
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

    /// As [`ModelText::encode_chat`], with tools and whatever else the messages hold. A `developer` speaks as the system does
    /// where the template does not know the role.
    ///
    /// # Errors
    /// As [`ModelText::encode_chat`], and where the template leaves out the tools or a message: it knows of none, or not its role.
    pub fn encode_whole_chat(&self, chat: &Chat) -> Result<Vec<u32>, ServiceError> {
        let template = match &self.tool_template {
            Some(template) if !chat.tools.is_empty() => template,
            _ => self.template()?,
        };
        let chat = template.with_known_developer(chat);
        let marked = if self.special_in_messages { None } else { self.special.marked(&chat)? };
        let chat = marked.as_ref().map_or(&*chat, |(marked, _)| marked);
        let mut text = template.render_chat(chat)?;
        let without_tools = || template.render_chat(&Chat { tools: Vec::new(), ..chat.clone() });
        if !chat.tools.is_empty() && without_tools().is_ok_and(|without| without == text) {
            let message = format!("tools: the chat template of model {} has no place for tools; leave them out", self.name);
            return Err(ServiceError::of_field("tools", message));
        }
        self.check_heard(template, chat, &text)?;
        if chat.continues {
            text.truncate(end_of_last(chat, &text)?);
        }
        // What stands before every text is the template's own affair, unless the client wants it besides.
        let mut ids = if chat.special_tokens { self.tokens("", true)? } else { Vec::new() };
        ids.extend(match &marked {
            None => self.tokens(&text, false)?,
            Some((_, mark)) => self.special.encode(&text, *mark, &self.tokenizer)?,
        });
        Ok(ids)
    }

    /// Refuses roles whose messages have left no trace in `text`, which `template` made of the chat: one that it does not know
    /// would be dropped without a word. The work is that of a few times reading the text, however many messages there are.
    fn check_heard(&self, template: &ChatTemplate, chat: &Chat, text: &str) -> Result<(), ServiceError> {
        // The longest that each has said: what is short may stand in the text by chance.
        let mut said: BTreeMap<&str, &str> = BTreeMap::new();
        for message in &chat.messages {
            let (role, words) = (message["role"].as_str().unwrap_or_default(), message["content"].as_str().unwrap_or_default().trim());
            let longest = said.entry(role).or_default();
            *longest = if words.len() > longest.len() { words } else { longest };
        }
        if said.len() > MOST_ROLES {
            let message = format!("messages: they are of {} roles; no chat template knows more than {MOST_ROLES}", said.len());
            return Err(ServiceError::of_field("messages", message));
        }
        for (role, _) in said.into_iter().filter(|(_, words)| !text.contains(words)) {
            // It may stand there in other words: as JSON, or cut.
            let others = chat.messages.iter().filter(|other| other["role"] != role).cloned().collect();
            let without = Chat { messages: others, ..chat.clone() };
            if template.render_chat(&without).is_ok_and(|without| without == text) {
                let message =
                    format!("messages: the chat template of model {} leaves out what role '{role}' says; send another role", self.name);
                return Err(ServiceError::of_field("messages", message));
            }
        }
        Ok(())
    }

    /// From now on special tokens in messages are special, as Hugging Face has it: whoever writes a message can write turns of
    /// others.
    pub fn trust_messages(&mut self) {
        self.special_in_messages = true;
    }

    fn template(&self) -> Result<&ChatTemplate, ServiceError> {
        self.template.as_ref().ok_or_else(|| {
            let message = format!("model {} has no chat template: send the prompt as text or token ids instead", self.name);
            ServiceError::of_field("messages", message)
        })
    }

    /// Whether chats can be rendered.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// How the model writes calls of tools.
    pub fn tool_format(&self) -> ToolFormat {
        self.tool_format
    }

    /// From now on calls of tools are written and read so, whatever the template says.
    pub fn set_tool_format(&mut self, format: ToolFormat) {
        self.tool_format = format;
    }

    /// A detokeniser for the answer that follows these tokens.
    pub fn detokenizer(&self, prompt: &[u32]) -> Detokenizer {
        Detokenizer::new(self.tokenizer.clone(), prompt)
    }

    /// One for a text in which special tokens are written too.
    pub fn detokenizer_of_all(&self) -> Detokenizer {
        Detokenizer::of_all(self.tokenizer.clone())
    }

    /// The special token that is written so.
    pub fn special_token(&self, text: &str) -> Option<u32> {
        let id = self.tokenizer.token_to_id(text)?;
        self.special.is_one(id).then_some(id)
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

/// Puts these tokens, where there are such, before and after every text. As transformers 4 does for the classes of [`OWN_ENDS`];
/// a model that was published for it was trained so.
fn put_ends(tokenizer: &mut Tokenizer, first: Option<String>, last: Option<String>) -> tokenizers::Result<()> {
    let known = |token: Option<String>| token.and_then(|token| Some((tokenizer.token_to_id(&token)?, token)));
    let (first, last) = (known(first), known(last));
    let piece = |token: &Option<(u32, String)>| token.iter().map(|(_, token)| format!("{token}:0")).collect::<Vec<_>>();
    let single: Vec<String> = [piece(&first), vec!["$A:0".to_owned()], piece(&last)].concat();
    let special: Vec<(String, u32)> = first.into_iter().chain(last).map(|(id, token)| (token, id)).collect();
    let processor = TemplateProcessing::builder().try_single(single)?.special_tokens(special).build()?;
    tokenizer.with_post_processor(Some(processor));
    Ok(())
}

/// Where the last message ends in what was rendered of a chat, as Hugging Face's `continue_final_message` finds it.
fn end_of_last(chat: &Chat, text: &str) -> Result<usize, ServiceError> {
    let said = chat.messages.last().and_then(|last| last["content"].as_str()).unwrap_or_default();
    let at = text.rfind(said.trim()).filter(|_| !said.trim().is_empty()).ok_or_else(|| {
        let message = "messages: the last one cannot be gone on from: it is empty, or the chat template writes it in other words";
        ServiceError::of_field("messages", message)
    })?;
    let whole = said.trim_start();
    Ok(at + if text[at..].starts_with(whole) { whole.len() } else { said.trim().len() })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::gguf::tests::{byte_level, byte_level_vocabulary};

    fn model(tokenizer: &Value, config: &Value) -> ModelText {
        ModelText::from_files("m", tokenizer.to_string().as_bytes(), config.to_string().as_bytes()).unwrap()
    }

    fn file(tokenizer: &Tokenizer) -> Value {
        serde_json::from_str(&tokenizer.to_string(false).unwrap()).unwrap()
    }

    #[test]
    fn how_batches_were_cut_and_filled_in_training_says_nothing_of_prompts() {
        let plain = file(&byte_level());
        let mut baked = plain.clone();
        baked["truncation"] = json!({ "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0 });
        baked["padding"] = json!({
            "strategy": { "Fixed": 64 }, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
        });
        let text = "a prompt that is longer than four tokens";
        let config = json!({});
        assert_eq!(model(&baked, &config).encode(text).unwrap(), model(&plain, &config).encode(text).unwrap());
    }

    /// What transformers 4 reads of the same files (5 goes by the post-processor alone).
    #[test]
    fn a_class_that_puts_the_ends_itself_goes_by_its_flags() {
        let bare = file(&byte_level());
        let begun = file(&crate::gguf::GgufVocabulary { add_bos: true, ..byte_level_vocabulary() }.tokenizer().unwrap());
        let start = byte_level().token_to_id("<|start|>").unwrap();
        let ends = json!({ "bos_token": "<|start|>", "eos_token": "<|end|>" });
        let read = |tokenizer: &Value, class: &str, more: Value| {
            let mut config = ends.clone();
            config["tokenizer_class"] = json!(class);
            config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            model(tokenizer, &config).encode("h").unwrap()
        };
        for class in ["LlamaTokenizer", "LlamaTokenizerFast"] {
            assert_eq!(read(&bare, class, json!({ "add_bos_token": true }))[0], start, "{class}");
            assert_eq!(read(&bare, class, json!({}))[0], start, "{class}: its default");
            assert_eq!(read(&bare, class, json!({ "add_bos_token": false })).len(), 1);
            assert_eq!(read(&begun, class, json!({ "add_bos_token": false })).len(), 1);
            assert_eq!(read(&begun, class, json!({ "add_bos_token": true })).len(), 2);
            assert_eq!(read(&bare, class, json!({ "add_bos_token": true, "add_eos_token": true })).len(), 3);
        }
        assert_eq!(read(&bare, "PreTrainedTokenizerFast", json!({ "add_bos_token": true })).len(), 1, "as its file says");
        assert_eq!(read(&begun, "PreTrainedTokenizerFast", json!({ "add_bos_token": false })).len(), 2);
    }

    #[test]
    fn chats_with_tools_have_a_template_of_their_own() {
        let templates = json!([
            { "name": "default", "template": "{{ messages[0].content }}" },
            { "name": "tool_use", "template": "{{ tools | tojson }}{{ messages[0].content }}" },
        ]);
        let model = model(&file(&byte_level()), &json!({ "chat_template": templates }));
        let mut chat = Chat { messages: vec![json!({ "role": "user", "content": "hello" })], ..Chat::default() };
        assert_eq!(model.decode(&model.encode_whole_chat(&chat).unwrap(), true), "hello");
        chat.tools = vec![json!({ "f": 1 })];
        assert_eq!(model.decode(&model.encode_whole_chat(&chat).unwrap(), true), "[{\"f\": 1}]hello");
    }

    #[test]
    fn a_role_that_leaves_no_trace_is_refused_however_much_others_say() {
        let template = "{% for m in messages %}{% if m.role != 'foo' %}{{ m.content }}\n{% endif %}{% endfor %}";
        let model = model(&file(&byte_level()), &json!({ "chat_template": template }));
        let say = |role: &str, content: &str| json!({ "role": role, "content": content });
        let read = |messages: Vec<Value>| model.encode_whole_chat(&Chat { messages, ..Chat::default() });
        let many: Vec<Value> = (0..2000).map(|i| say("user", &format!("message {i}"))).collect();
        read(many.clone()).unwrap();
        // What is short may stand in the text by chance: the longest tells.
        let error = read([many, vec![say("foo", "1"), say("foo", "nobody hears this")]].concat()).unwrap_err();
        assert!(error.message.contains("'foo'") && error.field.as_deref() == Some("messages"), "{error}");
        let roles = |n: usize| (0..n).map(|i| say(&format!("role {i}"), "x")).collect::<Vec<_>>();
        read(roles(MOST_ROLES)).unwrap();
        assert!(read(roles(MOST_ROLES + 1)).unwrap_err().message.contains("17 roles"));
    }
}
