//! A pair's tokens as bytes, and guides compiled against them.

use std::path::Path;
use std::sync::Arc;

use llguidance::JsonCompileOptions;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{ParserFactory, token_bytes_from_tokenizer_json};
use overfill_text::tokenizer::TOKENIZER_FILE;
use overfill_types::{Code, Guide, PairManifest, ServiceError};
use serde_json::Value;
use tokio::sync::Semaphore;

use crate::matcher::Matcher;

/// States of the lexer that one answer may make, at 1 to 2 KB each. Schemas of real services need some hundreds.
const LEXER_STATES: usize = 16_000;
/// Symbols in a grammar's productions; the largest schemas of the field (FHIR) have 200,000.
const GRAMMAR_SYMBOLS: usize = 250_000;
/// JSON may be written in lines and indented, but no further between two of its parts: JSON itself allows any amount, in which
/// small models lose their way until their last token.
const WHITESPACE: &str = r"[\x20\x0A\x0D\x09]{1,8}";
/// Guides that are compiled at a time.
const AT_ONCE: usize = 2;
/// Bytes of an error of the compiler that are passed on.
const ERROR_BYTES: usize = 400;

/// Compiles guides for one pair.
pub struct Guides {
    /// Where its tokens have no bytes that we know of, why: then the pair is served without guides.
    known: Result<Known, ServiceError>,
    /// Compiling takes a core: it is not to take them all from those who compute.
    turns: Semaphore,
}

/// A guide that is followed byte by byte.
#[derive(Clone, Copy)]
enum Grammar<'a> {
    JsonSchema(&'a str),
    Regex(&'a str),
    Lark(&'a str),
}

struct Known {
    factory: ParserFactory,
    vocabulary: TokEnv,
}

impl Guides {
    /// Reads the tokens of the pair in `dir`, whose manifest is `manifest`. Takes some tenths of a second.
    pub fn open(dir: &Path, manifest: &PairManifest) -> Self {
        Self { known: Known::open(dir, manifest), turns: Semaphore::new(AT_ONCE) }
    }

    /// A matcher at the beginning of an answer. Takes some milliseconds for a large guide: not for an async task.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] where the guide is malformed, matches nothing, or is too large (the compiler's words are given),
    /// [`Code::Unimplemented`] where the pair's tokens have no bytes that we know of.
    pub fn compile(&self, guide: &Guide) -> Result<Matcher, ServiceError> {
        let grammar = match guide {
            // Needs no bytes.
            Guide::Tokens(ids) => return Ok(Matcher::forcing(ids.clone())),
            Guide::JsonSchema(schema) => Grammar::JsonSchema(schema),
            Guide::Regex(regex) => Grammar::Regex(regex),
            Guide::Grammar(grammar) => Grammar::Lark(grammar),
        };
        self.known.as_ref().map_err(ServiceError::clone)?.compile(grammar)
    }

    /// As [`Guides::compile`], on a thread where that may take its time.
    ///
    /// # Errors
    /// As [`Guides::compile`].
    pub async fn compile_beside(self: &Arc<Self>, guide: &Guide) -> Result<Matcher, ServiceError> {
        // It is closed never.
        let _turn = self.turns.acquire().await;
        let (guides, guide) = (self.clone(), guide.clone());
        let compiled = tokio::task::spawn_blocking(move || guides.compile(&guide)).await;
        compiled.unwrap_or_else(|_| Err(ServiceError::new(Code::Internal, "compiling the guide panicked")))
    }

    /// The bytes that a token stands for; those of a special token are its name. Empty where they are not known.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        let Ok(known) = &self.known else { return &[] };
        let bytes = known.vocabulary.tok_trie().token(id);
        bytes.strip_prefix(&[TokTrie::SPECIAL_TOKEN_MARKER]).filter(|name| !name.is_empty()).unwrap_or(bytes)
    }
}

impl Known {
    fn open(dir: &Path, manifest: &PairManifest) -> Result<Self, ServiceError> {
        let path = dir.join(TOKENIZER_FILE);
        let bytes = std::fs::read(&path).map_err(|e| ServiceError::new(Code::NotFound, format!("cannot read {}: {e}", path.display())))?;
        let tokenizer: Value = serde_json::from_slice(&bytes).map_err(|e| unknown(&e))?;
        let mut tokens = token_bytes_from_tokenizer_json(&tokenizer).map_err(|e| unknown(&e))?;
        let size = manifest.full.vocab_size.max(manifest.decode.vocab_size).max(tokens.len());
        tokens.resize(size, Vec::new());
        Self::new(&tokens, &manifest.tokenizer.eos_token_ids)
    }

    /// With these tokens, special ones marked, of which `eos` end an answer.
    fn new(tokens: &[Vec<u8>], eos: &[u32]) -> Result<Self, ServiceError> {
        let Some(&first) = eos.first().filter(|_| eos.iter().all(|&id| (id as usize) < tokens.len())) else {
            return Err(unknown(&"no token ends an answer"));
        };
        let info = TokRxInfo::new(u32::try_from(tokens.len()).map_err(|e| unknown(&e))?, first);
        let trie = TokTrie::from(&info, tokens).with_eos_tokens(eos);
        // Tokens are the model's choice among all that fit: none is put in its mouth as the tokenizer would have it.
        let vocabulary: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&vocabulary).map_err(|e| unknown(&e))?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.max_lexer_states = LEXER_STATES;
        limits.max_grammar_size = GRAMMAR_SYMBOLS;
        limits.verbose_errors = false;
        Ok(Self { factory, vocabulary })
    }

    fn compile(&self, grammar: Grammar<'_>) -> Result<Matcher, ServiceError> {
        let (what, grammar) = match grammar {
            Grammar::JsonSchema(schema) => ("JSON schema", serde_json::from_str(schema).map(json)),
            Grammar::Regex(regex) => ("regular expression", Ok(TopLevelGrammar::from_regex(regex))),
            Grammar::Lark(grammar) => ("grammar", Ok(TopLevelGrammar::from_lark(grammar.to_owned()))),
        };
        let refuse = |e: &dyn std::fmt::Display| {
            let mut why = e.to_string();
            why.truncate(why.floor_char_boundary(ERROR_BYTES));
            ServiceError::new(Code::InvalidArgument, format!("the {what} cannot be followed: {why}"))
        };
        let grammar = grammar.map_err(|e| refuse(&e))?;
        let mut matcher = llguidance::Matcher::new(self.factory.create_parser(grammar));
        // What matches nothing shows itself when the first token is looked for.
        if let Err(e) = matcher.compute_mask_or_eos() {
            return Err(refuse(&e));
        }
        Ok(Matcher::new(matcher, self.vocabulary.clone()))
    }
}

/// JSON of a schema, with as much whitespace as it allows itself (`x-guidance`) or else [`WHITESPACE`].
fn json(mut schema: Value) -> TopLevelGrammar {
    if schema.as_object().is_some_and(|schema| !schema.contains_key("x-guidance")) {
        JsonCompileOptions { whitespace_pattern: Some(WHITESPACE.into()), ..JsonCompileOptions::default() }.apply_to(&mut schema);
    }
    TopLevelGrammar::from_json_schema(schema)
}

fn unknown(e: &dyn std::fmt::Display) -> ServiceError {
    ServiceError::new(
        Code::Unimplemented,
        format!("guides cannot be followed with this pair: the bytes of {TOKENIZER_FILE}'s tokens are not known: {e}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const EOS: u32 = 256;

    /// All bytes, the end, and a few words.
    fn guides() -> Guides {
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|b| vec![b]).collect();
        tokens.push(b"\xff<|end|>".to_vec());
        tokens.extend([&b"true"[..], b"{\"", b"\": ", "né".as_bytes()].map(<[u8]>::to_vec));
        Guides { known: Known::new(&tokens, &[EOS]), turns: Semaphore::new(AT_ONCE) }
    }

    /// The text that comes of always taking the allowed token with the greatest id; `None` where it does not end.
    fn greatest(guide: &Guide) -> Option<String> {
        text(guide, |allowed| *allowed.last().unwrap())
    }

    fn text(guide: &Guide, choose: impl Fn(&[u32]) -> u32) -> Option<String> {
        let guides = guides();
        let mut matcher = guides.compile(guide).unwrap();
        let mut text = Vec::new();
        for _ in 0..100 {
            let mut logits: Vec<f32> = (0..261).map(|id| id as f32).collect();
            matcher.mask(&mut logits);
            let allowed: Vec<u32> = (0..261).filter(|&id| logits[id as usize].is_finite()).collect();
            for id in 0..261 {
                assert_eq!(matcher.allows(id), allowed.contains(&id), "{id} after {text:?} of {guide:?}");
            }
            let next = choose(&allowed);
            if next == EOS {
                return Some(String::from_utf8(text).unwrap());
            }
            matcher.observe(next);
            assert_eq!(matcher.failure(), None);
            text.extend_from_slice(guides.token_bytes(next));
        }
        None
    }

    #[test]
    fn only_what_fits_is_allowed() {
        let schema = r#"{"type":"object","properties":{"a":{"type":"boolean"}},"required":["a"],"additionalProperties":false}"#;
        let text = greatest(&Guide::JsonSchema(schema.into())).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), serde_json::json!({ "a": true }), "{text}");
        assert_eq!(greatest(&Guide::Regex("[a-c]{2}é?x".into())).unwrap(), "ccéx");
        assert_eq!(greatest(&Guide::Grammar("start: \"n\" (\"é\" | \"e\")".into())).unwrap(), "né");
        assert_eq!(greatest(&Guide::Regex(".*".into())), None, "anything goes, without an end");
    }

    #[test]
    fn whitespace_in_json_comes_to_an_end() {
        let schema =
            |more: &str| Guide::JsonSchema(format!(r#"{{{more}"type":"array","items":{{"type":"null"}},"minItems":1,"maxItems":1}}"#));
        // Line ends and blanks come before all else that JSON is written with.
        let first = |guide: &Guide| text(guide, |allowed| allowed[0]);
        let written = first(&schema("")).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&written).unwrap(), serde_json::json!([null]));
        assert_eq!(written.split(|c: char| !c.is_whitespace()).map(str::len).max(), Some(8), "{written:?}");
        assert_eq!(first(&schema(r#""x-guidance":{"whitespace_flexible":false},"#)).unwrap(), "[null]");
        assert_eq!(first(&schema(r#""x-guidance":{},"#)), None, "as much as JSON allows was asked for");
    }

    #[test]
    fn a_resumed_answer_is_held_to_the_same() {
        let guides = guides();
        let guide = Guide::Regex("(ab|cd)+".into());
        let (mut one, mut other) = (guides.compile(&guide).unwrap(), guides.compile(&guide).unwrap());
        for token in b"abcdc" {
            one.observe(u32::from(*token));
        }
        assert!(one.allows(u32::from(b'd')) && !one.allows(u32::from(b'b')) && !one.allows(EOS));
        other.observe(u32::from(b'b'));
        assert!(other.failure().is_some(), "what was written breaks the guide");
    }

    #[test]
    fn given_tokens_come_first_and_then_anything() {
        let mut matcher = guides().compile(&Guide::Tokens(vec![7, EOS, 260])).unwrap();
        for forced in [7, EOS, 260] {
            let mut logits = [0.0; 261];
            matcher.mask(&mut logits);
            for id in 0..261 {
                assert!(matcher.allows(id) == (id == forced) && logits[id as usize].is_finite() == (id == forced));
            }
            matcher.observe(forced);
        }
        let mut logits = [0.0; 261];
        matcher.mask(&mut logits);
        assert!((0..261).all(|id| matcher.allows(id)) && logits == [0.0; 261]);
        matcher.observe(3);
        assert_eq!(matcher.failure(), None);
        let mut broken = guides().compile(&Guide::Tokens(vec![7, 8])).unwrap();
        broken.observe(9);
        assert!(broken.failure().unwrap().message.contains("token 9"));
    }

    #[test]
    fn what_cannot_be_followed_is_refused() {
        for guide in [
            Guide::JsonSchema("{".into()),
            Guide::JsonSchema(r#"{"type":"thing"}"#.into()),
            Guide::JsonSchema(r#"{"$ref":"https://example.com/schema"}"#.into()),
            Guide::Regex("(".into()),
            Guide::Grammar("start: nothing".into()),
        ] {
            let error = guides().compile(&guide).err().unwrap();
            assert_eq!(error.code, Code::InvalidArgument, "{guide:?}");
        }
    }
}
