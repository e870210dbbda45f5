//! The vocabulary of a GGUF file as a Hugging Face tokenizer.
//!
//! The two kinds that Llama-family files have: byte-level BPE (`gpt2`), whose pre-tokenizer the file names, and
//! SentencePiece BPE (`llama`), whose merges follow from the pieces' scores.

use ahash::AHashMap;
use overfill_types::{Code, ServiceError};
use serde_json::Value;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{NFC, NormalizerWrapper, Prepend, Replace, Sequence as NormalizerSequence};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizerSequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use crate::tokenizer::OWN_ENDS;

/// What a GGUF file's header says of its tokenizer (keys `tokenizer.ggml.*`).
#[derive(Clone, Debug, Default)]
pub struct GgufVocabulary {
    /// `model`: `gpt2` or `llama`.
    pub model: String,
    /// `pre`: which pre-tokenizer.
    pub pre: Option<String>,
    /// `tokens`, by id.
    pub tokens: Vec<String>,
    /// `token_type`, by id: 2 is unknown, 3 control, 4 user-defined, 5 unused; others are ordinary.
    pub token_types: Vec<u32>,
    /// `merges`, each two pieces with a space between.
    pub merges: Vec<String>,
    /// `scores`, by id.
    pub scores: Vec<f32>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `unknown_token_id`.
    pub unknown: Option<u32>,
    /// `add_bos_token`.
    pub add_bos: bool,
    /// `add_space_prefix`.
    pub add_space_prefix: bool,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

/// How GPT-4's tokenizer splits text, with numbers of up to three digits (Llama 3).
const LLAMA3_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with single digits (Qwen 2).
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words by their case, with single digits (Mistral since Nemo).
const TEKKEN_SPLIT: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|",
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// What byte-level BPE does with a text before its merges.
#[derive(Clone, Copy, Default, PartialEq)]
struct Cut {
    /// Each digit stands alone.
    digits: bool,
    /// Where texts are split; as GPT-2 does where there is none.
    split: Option<&'static str>,
    /// A word that is a token is taken whole, though no merges lead to it.
    whole_words: bool,
    /// Characters are composed first (NFC).
    composed: bool,
}

const GPT2: Cut = Cut { digits: false, split: None, whole_words: false, composed: false };
const LLAMA3: Cut = Cut { split: Some(LLAMA3_SPLIT), whole_words: true, ..GPT2 };

/// The pre-tokenizers that are known, by the names that files have for them; the first is the one that we write.
/// llama.cpp composes nothing: what is told of Qwen 2 is what the models' own tokenizers do.
const PRE_TOKENIZERS: [(&[&str], Cut); 6] = [
    (&["gpt-2", "default"], GPT2),
    (&["smollm", "refact"], Cut { digits: true, ..GPT2 }),
    (&["llama-bpe", "llama3", "llama-v3"], LLAMA3),
    (&["dbrx", "smaug-bpe"], Cut { whole_words: false, ..LLAMA3 }),
    (&["qwen2"], Cut { split: Some(QWEN2_SPLIT), composed: true, ..GPT2 }),
    (&["tekken"], Cut { split: Some(TEKKEN_SPLIT), ..LLAMA3 }),
];

/// The names, for who has none of them.
const KNOWN: &str = "gpt-2, smollm, llama-bpe, dbrx, qwen2 and tekken are";

/// What SentencePiece writes for a space.
const SPACE: &str = "▁";
/// A special token of Mistral's tokenizers since their second version.
const MISTRALS: &str = "[INST]";

impl GgufVocabulary {
    /// The tokenizer.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] naming what is missing, or the kind or pre-tokenizer that is not known.
    pub fn tokenizer(&self) -> Result<Tokenizer, ServiceError> {
        if self.tokens.is_empty() {
            return Err(refuse("the GGUF file holds no vocabulary"));
        }
        let mut tokenizer = match self.model.as_str() {
            "gpt2" => self.byte_level()?,
            "llama" => self.sentence_piece()?,
            other => return Err(refuse(format!("tokenizer model '{other}' is not known: gpt2 and llama are"))),
        };
        for (id, kind) in self.token_types.iter().enumerate() {
            if id < self.tokens.len() && matches!(kind, 2..=4) {
                tokenizer.add_tokens([AddedToken::from(self.name(id), *kind != 4).normalized(false)]).map_err(refuse)?;
            }
        }
        if let Some(bos) = self.bos.filter(|_| self.add_bos) {
            let processor = TemplateProcessing::builder()
                .try_single(vec!["B:0".to_owned().replace('B', &self.token(bos)?), "$A:0".into()])
                .map_err(refuse)?
                .special_tokens(vec![(self.token(bos)?, bos)])
                .build()
                .map_err(refuse)?;
            tokenizer.with_post_processor(Some(processor));
        }
        Ok(tokenizer)
    }

    /// The other way: what a GGUF file has to say of the tokenizer in `tokenizer.json` and `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] naming what such a file cannot say: only byte-level BPE with a pre-tokenizer known here.
    pub fn of(tokenizer: &Value, config: &Value) -> Result<Self, ServiceError> {
        let vocabulary = tokenizer["model"]["vocab"].as_object().ok_or_else(|| refuse("tokenizer.json has no vocabulary of BPE"))?;
        let added = tokenizer["added_tokens"].as_array().map_or(&[][..], Vec::as_slice);
        let id = |v: &Value| v.as_u64().and_then(|id| usize::try_from(id).ok());
        let all = vocabulary.iter().map(|(token, at)| (token.as_str(), id(at), 1));
        let all = all.chain(added.iter().map(|token| {
            let kind = if token["special"].as_bool() == Some(true) { 3 } else { 4 };
            (token["content"].as_str().unwrap_or_default(), id(&token["id"]), kind)
        }));
        let (mut tokens, mut token_types) = (Vec::new(), Vec::new());
        for (token, at, kind) in all {
            let at = at.ok_or_else(|| refuse(format!("tokenizer.json gives token '{token}' no id")))?;
            if at >= tokens.len() {
                // Ids without a token are unused ones (5).
                tokens.extend((tokens.len()..=at).map(|id| format!("[PAD{id}]")));
                token_types.resize(at + 1, 5);
            }
            tokens[at] = token.to_owned();
            token_types[at] = kind;
        }
        let merge = |merge: &Value| match merge {
            Value::Array(two) => two.iter().map(Value::as_str).collect::<Option<Vec<_>>>().map(|two| two.join(" ")),
            one => one.as_str().map(str::to_owned),
        };
        let merges = tokenizer["model"]["merges"].as_array().map_or(&[][..], Vec::as_slice);
        let merges: Option<Vec<String>> = merges.iter().map(merge).collect();
        let special = |name: &str| {
            let text = config[name].as_str().or_else(|| config[name]["content"].as_str())?;
            tokens.iter().position(|token| token == text).map(|at| at as u32)
        };
        let (bos, eos) = (special("bos_token"), special("eos_token"));
        Ok(Self {
            model: "gpt2".into(),
            pre: Some(pre_tokenizer(tokenizer)?.to_owned()),
            merges: merges.ok_or_else(|| refuse("tokenizer.json has a merge that is no two pieces"))?,
            bos,
            eos,
            add_bos: begins(tokenizer, config),
            chat_template: config["chat_template"].as_str().map(str::to_owned),
            tokens,
            token_types,
            ..Self::default()
        })
    }

    /// The token with this id.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] where there is none.
    pub fn token(&self, id: u32) -> Result<String, ServiceError> {
        self.tokens
            .get(id as usize)
            .cloned()
            .ok_or_else(|| refuse(format!("token id {id} is not in the vocabulary of {}", self.tokens.len())))
    }

    /// The tokens, but for those (5) that only fill ids.
    fn vocabulary(&self) -> impl Iterator<Item = (String, u32)> + '_ {
        let all = (0..self.tokens.len()).filter(|id| self.token_types.get(*id) != Some(&5));
        all.map(|id| (self.name(id), id as u32))
    }

    /// A token as the tokenizer names it. Who converts writes the runs of spaces that Gemma's authors defined as spaces.
    fn name(&self, id: usize) -> String {
        let token = &self.tokens[id];
        if self.is_run_of_spaces(id) { token.replace(' ', SPACE) } else { token.clone() }
    }

    fn is_run_of_spaces(&self, id: usize) -> bool {
        self.model == "llama"
            && self.token_types.get(id) == Some(&4)
            && !self.tokens[id].is_empty()
            && self.tokens[id].trim_matches(' ').is_empty()
    }

    fn byte_level(&self) -> Result<Tokenizer, ServiceError> {
        let merges = self
            .merges
            .iter()
            .map(|merge| {
                // A piece may begin with a space only in files that are broken: byte-level pieces have none.
                merge
                    .split_once(' ')
                    .map(|(a, b)| (a.to_owned(), b.to_owned()))
                    .ok_or_else(|| refuse(format!("merge '{merge}' has no two pieces")))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let pre = self.pre.as_deref().unwrap_or("default");
        let known = PRE_TOKENIZERS.iter().find(|(names, _)| names.contains(&pre));
        let (_, cut) = known.ok_or_else(|| refuse(format!("pre-tokenizer '{pre}' is not known: {KNOWN}")))?;
        let bpe = BPE::builder().vocab_and_merges(self.vocabulary().collect::<AHashMap<_, _>>(), merges).ignore_merges(cut.whole_words);
        let bpe = bpe.build().map_err(refuse)?;
        let mut pre: Vec<PreTokenizerWrapper> = Vec::new();
        if cut.digits {
            pre.push(Digits::new(true).into());
        }
        if let Some(split) = cut.split {
            pre.push(Split::new(SplitPattern::Regex(split.into()), SplitDelimiterBehavior::Isolated, false).map_err(refuse)?.into());
        }
        pre.push(ByteLevel::new(false, true, cut.split.is_none()).into());
        let mut tokenizer = Tokenizer::new(bpe);
        if cut.composed {
            tokenizer.with_normalizer(Some(NFC)).map_err(refuse)?;
        }
        tokenizer.with_pre_tokenizer(Some(PreTokenizerSequence::new(pre)));
        tokenizer.with_decoder(Some(ByteLevel::new(false, true, true)));
        Ok(tokenizer)
    }

    fn sentence_piece(&self) -> Result<Tokenizer, ServiceError> {
        if self.scores.len() != self.tokens.len() {
            return Err(refuse(format!("{} scores for {} tokens", self.scores.len(), self.tokens.len())));
        }
        let vocabulary: AHashMap<String, u32> = self.vocabulary().collect();
        let mut builder =
            BPE::builder().vocab_and_merges(vocabulary.clone(), self.merges_by_score(&vocabulary)).byte_fallback(true).fuse_unk(true);
        if let Some(unknown) = self.unknown {
            builder = builder.unk_token(self.token(unknown)?);
        }
        let mut tokenizer = Tokenizer::new(builder.build().map_err(refuse)?);
        if self.add_space_prefix && self.control(MISTRALS) {
            // The file does not say it, and llama.cpp does otherwise; the models were trained so, and are published so.
            let first = Metaspace::new('▁', PrependScheme::First, false);
            tokenizer.with_pre_tokenizer(Some(first));
        } else {
            let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
            if self.add_space_prefix {
                normalizers.push(Prepend::new(SPACE.into()).into());
            }
            normalizers.push(Replace::new(" ", SPACE).map_err(refuse)?.into());
            tokenizer.with_normalizer(Some(NormalizerSequence::new(normalizers))).map_err(refuse)?;
        }
        let mut decoders: Vec<DecoderWrapper> =
            vec![Replace::new(SPACE, " ").map_err(refuse)?.into(), ByteFallback::new().into(), Fuse::new().into()];
        if self.add_space_prefix {
            decoders.push(Strip::new(' ', 1, 0).into());
        }
        tokenizer.with_decoder(Some(DecoderSequence::new(decoders)));
        Ok(tokenizer)
    }

    /// Whether this is a control token.
    fn control(&self, text: &str) -> bool {
        self.tokens.iter().zip(&self.token_types).any(|(token, kind)| token == text && *kind == 3)
    }

    /// All ways to make a piece of two others, best score of the result first; of the same score as transformers orders them: those
    /// with the longer parts first, the first part counting before the second, then by the parts' ids.
    fn merges_by_score(&self, vocabulary: &AHashMap<String, u32>) -> Vec<(String, String)> {
        let mut merges = Vec::new();
        for (id, score) in self.scores.iter().enumerate() {
            let piece = self.name(id);
            // What its authors defined is made before all else, whatever score it was given.
            let score = if self.is_run_of_spaces(id) { 0.0 } else { *score };
            let mut ways: Vec<(u32, u32, &str, &str)> = piece
                .char_indices()
                .skip(1)
                .filter_map(|(at, _)| {
                    let (a, b) = piece.split_at(at);
                    Some((*vocabulary.get(a)?, *vocabulary.get(b)?, a, b))
                })
                .collect();
            ways.sort_unstable_by_key(|w| (w.0, w.1));
            merges.extend(ways.into_iter().map(|(_, _, a, b)| (score, a.to_owned(), b.to_owned())));
        }
        let lengths = |merge: &(f32, String, String)| (merge.1.chars().count(), merge.2.chars().count());
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| lengths(b).cmp(&lengths(a))));
        merges.into_iter().map(|(_, a, b)| (a, b)).collect()
    }
}

/// Whether texts begin with a token of their own.
fn begins(tokenizer: &Value, config: &Value) -> bool {
    let of_class = config["tokenizer_class"].as_str().is_some_and(|class| OWN_ENDS.contains(&class));
    match config["add_bos_token"].as_bool() {
        Some(begins) if of_class => begins,
        _ => tokenizer["post_processor"].to_string().contains("\"SpecialToken\""),
    }
}

/// The name by which a GGUF file tells of what `tokenizer.json` does with a text before its merges.
fn pre_tokenizer(tokenizer: &Value) -> Result<&'static str, ServiceError> {
    let json = &tokenizer["pre_tokenizer"];
    let steps = match json["pretokenizers"].as_array() {
        Some(steps) => steps.iter().collect(),
        None => vec![json],
    };
    let kinds: Vec<&str> = steps.iter().filter_map(|step| step["type"].as_str()).collect();
    let mut cut = match kinds.as_slice() {
        ["ByteLevel"] => GPT2,
        ["Digits", "ByteLevel"] if steps[0]["individual_digits"].as_bool() == Some(true) => Cut { digits: true, ..GPT2 },
        ["Split", "ByteLevel"] => {
            let expression = steps[0]["pattern"]["Regex"].as_str();
            let known = PRE_TOKENIZERS.iter().filter_map(|(_, cut)| cut.split).find(|split| Some(*split) == expression);
            let what = || refuse(format!("tokenizer.json splits text by an expression that no pre-tokenizer known here has: {KNOWN}"));
            Cut { split: Some(known.ok_or_else(what)?), ..GPT2 }
        }
        kinds => return Err(refuse(format!("tokenizer.json splits text by {kinds:?}, which no pre-tokenizer known here does: {KNOWN}"))),
    };
    cut.whole_words = tokenizer["model"]["ignore_merges"].as_bool() == Some(true);
    let normalizer = &tokenizer["normalizer"];
    cut.composed = normalizer["type"] == "NFC";
    let known = PRE_TOKENIZERS.iter().find(|(_, known)| *known == cut && (cut.composed || normalizer.is_null()));
    known.map(|(names, _)| names[0]).ok_or_else(|| {
        refuse(format!(
            "tokenizer.json splits text in a way that is known, but with the normalizer {normalizer} and ignore_merges {}, no \
             pre-tokenizer known here does: {KNOWN}",
            cut.whole_words
        ))
    })
}

fn refuse(what: impl std::fmt::Display) -> ServiceError {
    ServiceError::new(Code::InvalidArgument, what.to_string())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The 256 bytes, a few merges, and a few special tokens.
    pub(crate) fn byte_level_vocabulary() -> GgufVocabulary {
        let mut tokens: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
        tokens.sort_unstable();
        let merges = ["h e", "l l", "he ll", "hell o", "Ġ w"].map(str::to_owned).to_vec();
        tokens.extend(merges.iter().map(|m| m.replace(' ', "")));
        let first = tokens.len();
        tokens.extend(["<|start|>", "<|end|>", "<tool>"].map(str::to_owned));
        let mut token_types = vec![1; first];
        token_types.extend([3, 3, 4]);
        GgufVocabulary {
            model: "gpt2".into(),
            pre: Some("smollm".into()),
            tokens,
            token_types,
            merges,
            bos: Some(first as u32),
            eos: Some(first as u32 + 1),
            ..Default::default()
        }
    }

    pub(crate) fn byte_level() -> Tokenizer {
        byte_level_vocabulary().tokenizer().unwrap()
    }

    pub(crate) fn sentence_piece() -> Tokenizer {
        let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
        tokens.extend((0..=255).map(|b| format!("<0x{b:02X}>")));
        let mut scores = vec![0.0; tokens.len()];
        for (i, piece) in ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "abc"].iter().enumerate() {
            tokens.push((*piece).to_owned());
            scores.push(-(i as f32) - 1.0);
        }
        let mut token_types = vec![2, 3, 3];
        token_types.extend(vec![6; 256]);
        token_types.extend(vec![1; 8]);
        let vocabulary = GgufVocabulary {
            model: "llama".into(),
            tokens,
            token_types,
            scores,
            bos: Some(1),
            eos: Some(2),
            unknown: Some(0),
            add_bos: true,
            add_space_prefix: true,
            ..Default::default()
        };
        vocabulary.tokenizer().unwrap()
    }

    #[test]
    fn byte_level_text_survives_the_round_trip() {
        let tokenizer = byte_level();
        for text in ["hello world", "né 🦀 漢字", "  two  spaces\n\ttab", "x1234", "", "fn main() { \"quoted\" }\r\n"] {
            let ids = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        }
        let hello = tokenizer.encode("hello", false).unwrap();
        assert_eq!(hello.get_tokens(), ["hello"]);
        assert_eq!(tokenizer.encode("12", false).unwrap().get_tokens(), ["1", "2"], "digits stand alone");
    }

    #[test]
    fn a_vocabulary_survives_the_way_through_a_tokenizer() {
        for pre in ["smollm", "llama-bpe", "dbrx", "qwen2", "tekken", "gpt-2"] {
            let vocabulary = GgufVocabulary { pre: Some(pre.into()), chat_template: Some("{{ x }}".into()), ..byte_level_vocabulary() };
            let json: Value = serde_json::from_str(&vocabulary.tokenizer().unwrap().to_string(false).unwrap()).unwrap();
            let config = serde_json::json!({ "bos_token": "<|start|>", "eos_token": { "content": "<|end|>" }, "chat_template": "{{ x }}" });
            let back = GgufVocabulary::of(&json, &config).unwrap();
            assert_eq!((&back.tokens, &back.merges, &back.pre), (&vocabulary.tokens, &vocabulary.merges, &vocabulary.pre));
            assert_eq!((&back.token_types, back.bos, back.eos), (&vocabulary.token_types, vocabulary.bos, vocabulary.eos));
            assert_eq!((back.add_bos, back.chat_template), (false, vocabulary.chat_template));
        }
        let with_bos = GgufVocabulary { add_bos: true, ..byte_level_vocabulary() };
        let mut json: Value = serde_json::from_str(&with_bos.tokenizer().unwrap().to_string(false).unwrap()).unwrap();
        assert!(GgufVocabulary::of(&json, &Value::Null).unwrap().add_bos);
        json["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = Value::Bool(false);
        assert!(GgufVocabulary::of(&json, &Value::Null).unwrap_err().message.contains("smollm"));
    }

    #[test]
    fn what_a_file_cannot_say_is_refused() {
        let json = |pre: &str| -> Value {
            let vocabulary = GgufVocabulary { pre: Some(pre.into()), ..byte_level_vocabulary() };
            serde_json::from_str(&vocabulary.tokenizer().unwrap().to_string(false).unwrap()).unwrap()
        };
        let refusal = |json: &Value| GgufVocabulary::of(json, &Value::Null).unwrap_err().message;
        let mut qwen = json("qwen2");
        qwen["normalizer"] = Value::Null;
        assert!(refusal(&qwen).contains("normalizer null"));
        qwen["normalizer"] = serde_json::json!({ "type": "Lowercase" });
        assert!(refusal(&qwen).contains("Lowercase"));
        let mut smollm = json("smollm");
        smollm["normalizer"] = serde_json::json!({ "type": "Lowercase" });
        assert!(refusal(&smollm).contains("Lowercase"));
        smollm["normalizer"] = Value::Null;
        smollm["model"]["ignore_merges"] = Value::Bool(true);
        assert!(refusal(&smollm).contains("ignore_merges true"));
    }

    #[test]
    fn llama_3_takes_a_word_that_is_a_token_whole() {
        // "helo" is a token, and no merges lead to it.
        let mut vocabulary = byte_level_vocabulary();
        vocabulary.tokens.push("helo".into());
        vocabulary.token_types.push(1);
        for (pre, tokens) in [("llama-bpe", vec!["helo"]), ("qwen2", vec!["he", "l", "o"])] {
            let tokenizer = GgufVocabulary { pre: Some(pre.into()), ..vocabulary.clone() }.tokenizer().unwrap();
            assert_eq!(tokenizer.encode("helo", false).unwrap().get_tokens(), tokens, "{pre}");
        }
    }

    #[test]
    fn control_tokens_are_special_and_user_defined_ones_are_text() {
        let tokenizer = byte_level();
        let ids = tokenizer.encode("<|start|>hello<tool><|end|>", false).unwrap().get_ids().to_vec();
        assert_eq!(ids.len(), 4);
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "hello<tool>");
    }

    #[test]
    fn sentence_piece_merges_follow_the_scores() {
        let tokenizer = sentence_piece();
        // "▁a" has a better score than "ab", "▁ab" can be made of it.
        let encoding = tokenizer.encode("abc", true).unwrap();
        assert_eq!(encoding.get_tokens(), ["<s>", "▁ab", "c"]);
        for text in ["abc cab", "a é b", "🦀"] {
            let ids = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        }
    }

    #[test]
    fn what_is_not_known_is_named() {
        let with = |change: fn(&mut GgufVocabulary)| {
            let mut vocabulary = byte_level_vocabulary();
            change(&mut vocabulary);
            vocabulary.tokenizer().unwrap_err().message
        };
        assert!(with(|v| v.pre = Some("exotic".into())).contains("exotic"));
        assert!(with(|v| v.model = "bert".into()).contains("bert"));
        assert!(with(|v| v.tokens.clear()).contains("no vocabulary"));
        assert!(with(|v| v.merges.push("single".into())).contains("single"));
        assert!(
            with(|v| {
                v.add_bos = true;
                v.bos = Some(9999);
            })
            .contains("9999")
        );
    }
}
