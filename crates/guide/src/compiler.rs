//! A pair's tokens as bytes, and guides compiled against them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use llguidance::JsonCompileOptions;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{ParserFactory, token_bytes_from_tokenizer_json};
use overfill_text::tokenizer::TOKENIZER_FILE;
use overfill_types::{Code, PairManifest, ServiceError};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::matcher::{Matcher, NOT_TOLD};

/// States of the lexer that one answer may make, at 1 to 2 KB each. Schemas of real services need some hundreds.
const LEXER_STATES: usize = 16_000;
/// Symbols in a grammar's productions; the largest schemas of the field (FHIR) have 200,000.
const GRAMMAR_SYMBOLS: usize = 250_000;
/// Bytes of an error of the compiler that are passed on.
const ERROR_BYTES: usize = 400;

/// A guide that is followed byte by byte.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) enum Grammar {
    JsonSchema(String),
    Regex(String),
    Lark(String),
}

/// Where a pair's tokens are, and what else has to be known of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Tokens {
    /// A `tokenizer.json`.
    pub(crate) file: PathBuf,
    /// Size of the models' vocabulary.
    pub(crate) vocab_size: usize,
    /// Those that end an answer.
    pub(crate) eos: Vec<u32>,
}

impl Tokens {
    /// Those of the pair in `dir`.
    pub(crate) fn of(dir: &Path, manifest: &PairManifest) -> Self {
        let vocab_size = manifest.full.vocab_size.max(manifest.decode.vocab_size);
        Self { file: dir.join(TOKENIZER_FILE), vocab_size, eos: manifest.tokenizer.eos_token_ids.clone() }
    }
}

/// Compiles guides for one pair, in the thread that calls it.
pub(crate) struct Compiler {
    factory: ParserFactory,
    vocabulary: TokEnv,
}

impl Compiler {
    /// Reads the pair's tokens. Takes some tenths of a second.
    ///
    /// # Errors
    /// [`Code::NotFound`] where they cannot be read, [`Code::Unimplemented`] where their bytes are not known.
    pub(crate) fn open(tokens: &Tokens) -> Result<Self, ServiceError> {
        let Tokens { file, vocab_size, eos } = tokens;
        let bytes = std::fs::read(file).map_err(|e| ServiceError::new(Code::NotFound, format!("cannot read {}: {e}", file.display())))?;
        let tokenizer: Value = serde_json::from_slice(&bytes).map_err(|e| unknown(&e))?;
        let mut tokens = token_bytes_from_tokenizer_json(&tokenizer).map_err(|e| unknown(&e))?;
        tokens.resize(tokens.len().max(*vocab_size), Vec::new());
        Self::new(&tokens, eos)
    }

    /// With these tokens, special ones marked, of which `eos` end an answer.
    pub(crate) fn new(tokens: &[Vec<u8>], eos: &[u32]) -> Result<Self, ServiceError> {
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

    /// The bytes that a token stands for; those of a special token are its name. Empty where they are not known.
    pub(crate) fn token_bytes(&self, id: u32) -> &[u8] {
        let bytes = self.vocabulary.tok_trie().token(id);
        bytes.strip_prefix(&[TokTrie::SPECIAL_TOKEN_MARKER]).filter(|name| !name.is_empty()).unwrap_or(bytes)
    }

    /// A matcher at the beginning of an answer. What this takes is not bounded, nor how deep it recurses.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] where the guide is malformed, matches nothing, or is too large (the compiler's words are given).
    pub(crate) fn compile(&self, grammar: &Grammar) -> Result<Matcher, ServiceError> {
        let refuse = |e: &dyn std::fmt::Display| refused(grammar, &e.to_string());
        let top = match grammar {
            Grammar::JsonSchema(schema) => serde_json::from_str(schema).map(json).map_err(|e| refuse(&e))?,
            Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Grammar::Lark(grammar) => TopLevelGrammar::from_lark(grammar.clone()),
        };
        let mut matcher = llguidance::Matcher::new(self.factory.create_parser(top));
        // What matches nothing shows itself when the first token is looked for.
        if let Err(e) = matcher.compute_mask_or_eos() {
            return Err(refuse(&e));
        }
        Ok(Matcher::new(matcher, self.vocabulary.clone()))
    }
}

/// That a guide is refused, and why.
pub(crate) fn refused(grammar: &Grammar, why: &str) -> ServiceError {
    let what = match grammar {
        Grammar::JsonSchema(_) => "JSON schema",
        Grammar::Regex(_) => "regular expression",
        Grammar::Lark(_) => "grammar",
    };
    // A panic of the compiler comes as an error with the stack behind it.
    let why = if why.contains("panic") { "the compiler cannot deal with it: write it in another way" } else { why };
    let why = why.trim_end_matches(NOT_TOLD).trim_end();
    let why = &why[..why.floor_char_boundary(ERROR_BYTES)];
    ServiceError::new(Code::InvalidArgument, format!("the {what} cannot be followed: {why}"))
}

/// JSON of a schema, with the whitespace that it allows itself (`x-guidance`), or else none: JSON needs none, and small models lose
/// their way in it until their last token.
fn json(mut schema: Value) -> TopLevelGrammar {
    if schema.as_object().is_some_and(|schema| !schema.contains_key("x-guidance")) {
        JsonCompileOptions { whitespace_flexible: false, coerce_one_of: true, ..JsonCompileOptions::default() }.apply_to(&mut schema);
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
    fn compiler() -> Compiler {
        let mut tokens: Vec<Vec<u8>> = (0..=255).map(|b| vec![b]).collect();
        tokens.push(b"\xff<|end|>".to_vec());
        tokens.extend([&b"true"[..], b"{\"", b"\": ", "né".as_bytes()].map(<[u8]>::to_vec));
        Compiler::new(&tokens, &[EOS]).unwrap()
    }

    /// The text that comes of always taking the allowed token with the greatest id; `None` where it does not end.
    fn greatest(grammar: &Grammar) -> Option<String> {
        text(grammar, |allowed| *allowed.last().unwrap())
    }

    fn text(grammar: &Grammar, choose: impl Fn(&[u32]) -> u32) -> Option<String> {
        let compiler = compiler();
        let mut matcher = compiler.compile(grammar).unwrap();
        let mut text = Vec::new();
        for _ in 0..100 {
            let mut logits: Vec<f32> = (0..261).map(|id| id as f32).collect();
            matcher.mask(&mut logits);
            let allowed: Vec<u32> = (0..261).filter(|&id| logits[id as usize].is_finite()).collect();
            for id in 0..261 {
                assert_eq!(matcher.allows(id), allowed.contains(&id), "{id} after {text:?} of {grammar:?}");
            }
            let next = choose(&allowed);
            if next == EOS {
                return Some(String::from_utf8(text).unwrap());
            }
            matcher.observe(next);
            assert_eq!(matcher.failure(), None);
            text.extend_from_slice(compiler.token_bytes(next));
        }
        None
    }

    #[test]
    fn only_what_fits_is_allowed() {
        let schema = r#"{"type":"object","properties":{"a":{"type":"boolean"}},"required":["a"],"additionalProperties":false}"#;
        let text = greatest(&Grammar::JsonSchema(schema.into())).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), serde_json::json!({ "a": true }), "{text}");
        assert_eq!(greatest(&Grammar::Regex("[a-c]{2}é?x".into())).unwrap(), "ccéx");
        assert_eq!(greatest(&Grammar::Lark("start: \"n\" (\"é\" | \"e\")".into())).unwrap(), "né");
        assert_eq!(greatest(&Grammar::Regex(".*".into())), None, "anything goes, without an end");
    }

    #[test]
    fn json_is_written_without_whitespace_unless_its_schema_allows_it() {
        let schema =
            |more: &str| Grammar::JsonSchema(format!(r#"{{{more}"type":"array","items":{{"type":"null"}},"minItems":2,"maxItems":2}}"#));
        // Line ends and blanks come before all else that JSON is written with.
        let first = |grammar: &Grammar| text(grammar, |allowed| allowed[0]);
        assert_eq!(first(&schema("")).unwrap(), "[null,null]");
        let written = first(&schema(r#""x-guidance":{"whitespace_pattern":"[\\x20\\n]{1,8}"},"#)).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&written).unwrap(), serde_json::json!([null, null]));
        assert_eq!(written.split(|c: char| !c.is_whitespace()).map(str::len).max(), Some(8), "{written:?}");
        assert_eq!(first(&schema(r#""x-guidance":{},"#)), None, "as much as JSON allows was asked for");
    }

    /// What a model writes that takes whatever is allowed, if it may write `most` tokens; `None` where it has no end.
    fn in_time(grammar: &Grammar, most: usize, seed: u64) -> Option<String> {
        let compiler = compiler();
        let (mut matcher, mut text, mut random) = (compiler.compile(grammar).unwrap(), Vec::new(), seed);
        for written in 0..most {
            let mut logits = [0.0; 261];
            matcher.mask(&mut logits);
            // Letters above all: it would never come to an end by itself.
            let allowed: Vec<u32> = (0..261).filter(|&id| logits[id as usize].is_finite()).collect();
            let letters: Vec<u32> = allowed.iter().copied().filter(|id| (97..123).contains(id) || (48..58).contains(id)).collect();
            let choices = if letters.is_empty() { allowed } else { letters };
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let chosen = matcher.in_time(choices[(random >> 33) as usize % choices.len()], most - written);
            if chosen == EOS {
                return Some(String::from_utf8(text).unwrap());
            }
            matcher.observe(chosen);
            assert_eq!(matcher.failure(), None);
            text.extend_from_slice(compiler.token_bytes(chosen));
        }
        None
    }

    #[test]
    fn an_answer_ends_in_the_form_that_was_asked_for_within_its_tokens() {
        let schemas = [
            r#"{"type":"object","properties":{"a":{"type":"string"}},"required":["a"],"additionalProperties":false}"#,
            r#"{"type":"object","properties":{"n":{"type":"integer"},"x":{"type":"number"}},"required":["n","x"]}"#,
            r#"{"type":"array","items":{"type":"object","properties":{"k":{"enum":["red","green"]}},"required":["k"]}}"#,
            r#"{"type":"object","properties":{"s":{"type":"string","minLength":3}},"required":["s"]}"#,
            r#"{"type":"object"}"#,
        ];
        for schema in schemas {
            let flat = schema.replacen('{', r#"{"x-guidance":{"whitespace_flexible":false},"#, 1);
            for most in [30, 41, 60, 90] {
                for seed in 0..6 {
                    let text =
                        in_time(&Grammar::JsonSchema(flat.clone()), most, seed).unwrap_or_else(|| panic!("{schema} in {most} tokens"));
                    serde_json::from_str::<serde::de::IgnoredAny>(&text)
                        .unwrap_or_else(|e| panic!("{schema} in {most} tokens: {text}: {e}"));
                }
            }
        }
        let calls = r#"start: "<call>" arguments "</call>"
            arguments: %json {"type":"object","properties":{"a":{"type":"string"}},"required":["a"],"x-guidance":{"whitespace_flexible":false}}"#;
        assert!(in_time(&Grammar::Lark(calls.into()), 40, 1).unwrap().ends_with("\"}</call>"));
        assert_eq!(in_time(&Grammar::Regex("(ab)+c".into()), 20, 1).unwrap().chars().last(), Some('c'));
    }

    #[test]
    fn a_resumed_answer_is_held_to_the_same() {
        let compiler = compiler();
        let grammar = Grammar::Regex("(ab|cd)+".into());
        let (mut one, mut other) = (compiler.compile(&grammar).unwrap(), compiler.compile(&grammar).unwrap());
        for token in b"abcdc" {
            one.observe(u32::from(*token));
        }
        assert!(one.allows(u32::from(b'd')) && !one.allows(u32::from(b'b')) && !one.allows(EOS));
        other.observe(u32::from(b'b'));
        assert!(other.failure().is_some(), "what was written breaks the guide");
    }

    #[test]
    fn what_cannot_be_followed_is_refused() {
        for grammar in [
            Grammar::JsonSchema("{".into()),
            Grammar::JsonSchema(r#"{"type":"thing"}"#.into()),
            Grammar::JsonSchema(r#"{"$ref":"https://example.com/schema"}"#.into()),
            Grammar::Regex("(".into()),
            Grammar::Lark("start: nothing".into()),
        ] {
            let error = compiler().compile(&grammar).err().unwrap();
            assert_eq!(error.code, Code::InvalidArgument, "{grammar:?}");
        }
    }
}
