//! Prompts of a given length without the server's tokenizer: token ids where they are taken, common words where they are not.

use std::path::Path;

use anyhow::Context;
use overfill_text::TextModel;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::Input;
use crate::backend::Door;

/// Bytes of a token of a text that nobody tokenises here.
const BYTES: usize = 4;

/// Words that nearly every vocabulary has as one token, with the space before them.
const WORDS: &str = "\
    the of and to in is was for that with as on by he at from his it an are were which this be or had first one their has its new \
    after but who not they have her she two been other when there all during into school time may years more most only over city \
    some world would where later up such used many can state about national out known university united then made under between \
    people three second while both war part team found series life high year name house film group music number day place work \
    family these before system water book line game four long way river small open light street end young power area home story \
    black white green north south east west church company history large early great old right left land air sea road king law \
    art science town field best last good often never five six ten half";

/// A source of prompts of a given length.
pub(super) struct Tokens {
    /// None: token ids are taken.
    words: Option<Vec<&'static str>>,
    vocabulary: usize,
}

impl Tokens {
    /// For `door`, or for chats through it.
    pub(super) fn new(door: Door, chats: bool, vocabulary: usize) -> Self {
        if !chats && door != Door::Chat {
            return Self { words: None, vocabulary };
        }
        let words: Vec<_> = WORDS.split_whitespace().collect();
        Self { vocabulary: words.len(), words: Some(words) }
    }

    pub(super) fn are_words(&self) -> bool {
        self.words.is_some()
    }

    pub(super) fn draw(&self, random: &mut ChaCha8Rng, count: usize) -> Vec<u32> {
        (0..count).map(|_| random.random_range(0..self.vocabulary) as u32).collect()
    }

    /// The prompt made of `ids`; the same beginning gives the same beginning.
    pub(super) fn input(&self, ids: Vec<u32>) -> Input {
        self.say(&ids).map_or(Input::Ids(ids), Input::Say)
    }

    /// `ids` as words, where words are asked for.
    pub(super) fn say(&self, ids: &[u32]) -> Option<String> {
        let words = self.words.as_ref()?;
        Some(ids.iter().map(|&id| words[id as usize]).collect::<Vec<_>>().join(" "))
    }
}

/// How long texts are.
pub(super) struct Count {
    model: Option<TextModel>,
}

impl Count {
    /// By the tokenizer of the pair in a folder, or by bytes.
    pub(super) fn open(pair: Option<&Path>) -> anyhow::Result<Self> {
        let open = |dir: &Path| TextModel::open(dir).with_context(|| format!("--tokenizer: {} is no pair", dir.display()));
        Ok(Self { model: pair.map(open).transpose()? })
    }

    pub(super) fn vocabulary(&self) -> Option<usize> {
        self.model.as_ref().map(|m| m.manifest.vocab_size())
    }

    pub(super) fn tokens(&self, text: &str) -> anyhow::Result<usize> {
        Ok(match &self.model {
            Some(model) => model.encode(text)?.len(),
            None => text.len().div_ceil(BYTES),
        })
    }
}
