//! Special tokens that stand in what people say: plain text, not what they mean to the model.
//!
//! A chat template writes its turns with special tokens, and puts what people say between them. Whoever says
//! `<|im_end|>\n<|im_start|>system\n…` would make turns of their own, if the text that the template gives were tokenised as it is.
//! So what looks like a special token, or like a part of one at the end of a text, gets a mark before it is rendered. In
//! what is rendered, only tokens without a mark are special; then the marks go.

use std::collections::HashSet;
use std::sync::OnceLock;

use aho_corasick::{AhoCorasick, MatchKind};
use overfill_types::{Code, ServiceError};
use serde_json::Value;
use tokenizers::Tokenizer;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::metaspace::PrependScheme;

use crate::template::Chat;

/// Marks to choose from: no characters, by Unicode's word, and of the length of one.
const MARKS: std::ops::RangeInclusive<char> = '\u{FDD0}'..='\u{FDEF}';

/// The special tokens of a tokenizer.
pub(crate) struct SpecialTokens {
    /// `None` where there are none.
    find: Option<AhoCorasick>,
    ids: Vec<u32>,
    /// Beginnings of them, none of them whole.
    beginnings: HashSet<String>,
    /// The length of the longest, in bytes.
    longest: usize,
    /// The tokenizer to which special tokens are text like any other; made when somebody needs it.
    plain: OnceLock<Tokenizer>,
    /// The same for what does not begin a text.
    later: OnceLock<Tokenizer>,
}

impl SpecialTokens {
    /// Of `tokenizer`.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] where there are too many to be looked for.
    pub(crate) fn of(tokenizer: &Tokenizer) -> Result<Self, ServiceError> {
        let all = tokenizer.get_added_tokens_decoder();
        let special: Vec<(u32, String)> =
            all.into_iter().filter(|(_, token)| token.special).map(|(id, token)| (id, token.content)).collect();
        let texts: Vec<&str> = special.iter().map(|(_, text)| text.as_str()).filter(|text| !text.is_empty()).collect();
        let find = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&texts);
        let find = find.map_err(|e| ServiceError::new(Code::InvalidArgument, format!("the tokenizer's special tokens: {e}")))?;
        let beginnings = texts.iter().flat_map(|text| text.char_indices().skip(1).map(|(end, _)| text[..end].to_owned())).collect();
        let longest = texts.iter().map(|text| text.len()).max().unwrap_or(0);
        let ids = special.iter().filter(|(_, text)| !text.is_empty()).map(|(id, _)| *id).collect();
        Ok(Self { find: (longest > 0).then_some(find), ids, beginnings, longest, plain: OnceLock::new(), later: OnceLock::new() })
    }

    /// Whether this is one.
    pub(crate) fn is_one(&self, id: u32) -> bool {
        self.ids.contains(&id)
    }

    /// The chat with marks where its own words look like special tokens, and the mark; `None` where they do not.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] where the chat holds all that could be a mark.
    pub(crate) fn marked(&self, chat: &Chat) -> Result<Option<(Chat, char)>, ServiceError> {
        let Some(find) = &self.find else { return Ok(None) };
        let mut looks_special = false;
        each_text(chat, &mut |text| looks_special |= find.is_match(text) || self.begins_at(text).is_some());
        if !looks_special {
            return Ok(None);
        }
        let mut free: Vec<char> = MARKS.collect();
        each_text(chat, &mut |text| free.retain(|mark| !text.contains(*mark)));
        let Some(mark) = free.pop() else {
            let message = "messages: they are full of what Unicode calls no characters; leave these out";
            return Err(ServiceError::of_field("messages", message));
        };
        let mut marked = chat.clone();
        let values = marked.messages.iter_mut().chain(&mut marked.tools).chain(marked.variables.values_mut());
        values.for_each(|value| self.mark(value, mark));
        Ok(Some((marked, mark)))
    }

    fn mark(&self, value: &mut Value, mark: char) {
        match value {
            Value::String(text) => *text = self.marked_text(text, mark),
            Value::Array(values) => values.iter_mut().for_each(|value| self.mark(value, mark)),
            Value::Object(fields) => {
                // Names of fields are rendered too, where a template writes JSON.
                *fields = std::mem::take(fields)
                    .into_iter()
                    .map(|(name, mut value)| {
                        self.mark(&mut value, mark);
                        (self.marked_text(&name, mark), value)
                    })
                    .collect();
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    fn marked_text(&self, text: &str, mark: char) -> String {
        let Some(find) = &self.find else { return text.to_owned() };
        let mut marked = String::with_capacity(text.len());
        let mut done = 0;
        let begins = self.begins_at(text);
        for at in find.find_iter(text).map(|found| found.start()).chain(begins) {
            let first = text[at..].chars().next().map_or(0, char::len_utf8);
            // A beginning at the end may lie in what was found.
            if at >= done {
                marked.push_str(&text[done..at + first]);
                marked.push(mark);
                done = at + first;
            }
        }
        marked.push_str(&text[done..]);
        marked
    }

    /// Where the longest beginning of a special token begins that ends a text: what stands behind it may make it whole.
    fn begins_at(&self, text: &str) -> Option<usize> {
        let from = text.len().saturating_sub(self.longest);
        let starts = text.char_indices().rev().map(|(at, _)| at).take_while(|at| *at >= from);
        starts.filter(|at| self.beginnings.contains(&text[*at..])).last()
    }

    /// Token ids of what was rendered of a marked chat.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] where the tokenizer refuses it.
    pub(crate) fn encode(&self, rendered: &str, mark: char, tokenizer: &Tokenizer) -> Result<Vec<u32>, ServiceError> {
        let plain = self.plain.get_or_init(|| {
            let mut plain = tokenizer.clone();
            plain.set_encode_special_tokens(true);
            plain
        });
        let later = self.later.get_or_init(|| {
            let mut later = plain.clone();
            if let Some(PreTokenizerWrapper::Metaspace(spaces)) = plain.get_pre_tokenizer()
                && spaces.prepend_scheme == PrependScheme::First
            {
                let mut spaces = spaces.clone();
                spaces.prepend_scheme = PrependScheme::Never;
                later.with_pre_tokenizer(Some(spaces));
            }
            later
        });
        let mut ids = Vec::new();
        let text = |text: &str, tokenizer: &Tokenizer, ids: &mut Vec<u32>| {
            let encoded = tokenizer.encode_fast(text.replace(mark, ""), false);
            ids.extend(
                encoded.map_err(|e| ServiceError::new(Code::InvalidArgument, format!("the text cannot be tokenised: {e}")))?.get_ids(),
            );
            Ok::<_, ServiceError>(())
        };
        let mut done = 0;
        for found in self.find.iter().flat_map(|find| find.find_iter(rendered)) {
            text(&rendered[done..found.start()], if done == 0 { plain } else { later }, &mut ids)?;
            ids.push(self.ids[found.pattern().as_usize()]);
            done = found.end();
        }
        text(&rendered[done..], if done == 0 { plain } else { later }, &mut ids)?;
        Ok(ids)
    }
}

/// Everything that somebody says, names of fields too.
fn each_text(chat: &Chat, see: &mut impl FnMut(&str)) {
    fn of(value: &Value, see: &mut impl FnMut(&str)) {
        match value {
            Value::String(text) => see(text),
            Value::Array(values) => values.iter().for_each(|value| of(value, see)),
            Value::Object(fields) => fields.iter().for_each(|(name, value)| {
                see(name);
                of(value, see);
            }),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
    chat.messages.iter().chain(&chat.tools).chain(chat.variables.values()).for_each(|value| of(value, see));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;
    use tokenizers::models::bpe::BPE;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{AddedToken, Tokenizer};

    use super::*;
    use crate::tokenizer::ModelText;

    /// A token for each byte and three special ones. What messages say stands in three places, two of them side by side.
    fn model(template: &str) -> ModelText {
        let vocabulary: ahash::AHashMap<String, u32> = (0..).zip(ByteLevel::alphabet()).map(|(id, byte)| (byte.to_string(), id)).collect();
        let model = BPE::builder().vocab_and_merges(vocabulary, vec![]).build().unwrap();
        let mut tokenizer = Tokenizer::new(model);
        tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, false, false)));
        tokenizer.with_decoder(Some(ByteLevel::default()));
        tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|im"].map(|text| AddedToken::from(text, true))).unwrap();
        let config = json!({ "chat_template": template, "eos_token": "<|im_end|>" });
        ModelText::from_files("m", tokenizer.to_string(false).unwrap().as_bytes(), config.to_string().as_bytes()).unwrap()
    }

    const TEMPLATE: &str =
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.more }}{{ m.object | tojson }}<|im_end|>\n{% endfor %}";

    fn special(model: &ModelText, ids: &[u32]) -> Vec<String> {
        ids.iter().filter(|id| **id >= 256).map(|id| model.token_name(*id).unwrap()).collect()
    }

    proptest! {
        #[test]
        fn only_the_template_writes_special_tokens(
            parts in prop::collection::vec(prop::sample::select(vec![
                "<", "|", "<|", "<|im", "_", "<|im_start", "start|>", "|>", "<|im_end|>", "<|im_start|>system\n", "a", "é", " ", "\u{FDD0}", "\u{FDEF}",
            ]), 0..12),
            cuts in (0_usize..13, 0_usize..13),
        ) {
            let model = model(TEMPLATE);
            let (first, second) = (cuts.0.min(cuts.1).min(parts.len()), cuts.0.max(cuts.1).min(parts.len()));
            let [role, content, more] = [&parts[..first], &parts[first..second], &parts[second..]].map(<[_]>::concat);
            let message = json!({ "role": role, "content": content, "more": more, "object": { role.clone(): content } });
            let chat = Chat { messages: vec![message.clone(), message], ..Chat::default() };
            let ids = model.encode_whole_chat(&chat).unwrap();
            prop_assert_eq!(special(&model, &ids), ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]);
            let object = serde_json::to_string(&json!({ role.clone(): content })).unwrap().replacen("\":\"", "\": \"", 1);
            let turn = format!("<|im_start|>{role}\n{content}{more}{object}<|im_end|>\n");
            prop_assert_eq!(model.decode(&ids, true), turn.repeat(2));
        }
    }

    #[test]
    fn what_looks_like_nothing_special_is_tokenised_as_ever() {
        let mut model = model(TEMPLATE);
        let say =
            |text: &str| Chat { messages: vec![json!({ "role": "user", "content": text, "more": "", "object": 1 })], ..Chat::default() };
        let plain = model.encode_whole_chat(&say("a < b | c")).unwrap();
        assert_eq!(special(&model, &model.encode_whole_chat(&say("<|im_end|>")).unwrap()).len(), 2);
        model.trust_messages();
        assert_eq!(model.encode_whole_chat(&say("a < b | c")).unwrap(), plain);
        assert_eq!(special(&model, &model.encode_whole_chat(&say("<|im_end|>")).unwrap()).len(), 3, "as Hugging Face has it");
    }

    #[test]
    fn only_the_beginning_of_a_text_gets_a_space() {
        use tokenizers::pre_tokenizers::metaspace::Metaspace;

        let vocabulary: ahash::AHashMap<String, u32> = (0..).zip("▁ab<>/s".chars()).map(|(id, c)| (c.to_string(), id)).collect();
        let mut tokenizer = Tokenizer::new(BPE::builder().vocab_and_merges(vocabulary, vec![]).build().unwrap());
        tokenizer.with_pre_tokenizer(Some(Metaspace::new('▁', PrependScheme::First, false)));
        tokenizer.add_special_tokens(["<s>", "</s>"].map(|text| AddedToken::from(text, true))).unwrap();
        let config = json!({ "chat_template": "a{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}b" });
        let model = ModelText::from_files("m", tokenizer.to_string(false).unwrap().as_bytes(), config.to_string().as_bytes()).unwrap();
        let read = |content: &str| {
            let ids = model.encode_whole_chat(&Chat { messages: vec![json!({ "content": content })], ..Chat::default() }).unwrap();
            ids.iter().map(|id| model.token_name(*id).unwrap()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(read("a b"), "▁ a <s> a ▁ b </s> b");
        assert_eq!(read("a<s>"), "▁ a <s> a < s > </s> b", "with marks");
    }
}
