//! Conversations that a chat model makes up by itself. Given its own template up to where the user's words would stand, it writes
//! words of the kind that it was taught with (Magpie, arXiv 2406.08464); then it answers them, and may be given the user's turn
//! again.
//!
//! Attempts are numbered, and made so many at a time, a chunk. **Invariant:** what comes of an attempt depends on the model, the
//! settings, its number, and what came of those before it, not on the batch that it was written in.

mod doubles;
mod filter;
mod kind;

use overfill_model::ModelError;
use overfill_text::{Chat, Message, ModelText};
use overfill_types::{SamplingParams, ServiceError};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

pub use self::doubles::Doubles;
pub use self::filter::LeftOut;
use self::kind::kind;
use crate::answer::Question;
use crate::data::{Conversation, Metric};

/// Most turns of a conversation; draws are keyed by it.
const MOST_TURNS: u64 = 16;

/// How words are drawn.
#[derive(Clone, Copy, Debug)]
pub struct Draw {
    /// As requests have it.
    pub temperature: f32,
    /// As requests have it.
    pub top_p: f32,
    /// Most tokens; words of the user that are cut off there are left out.
    pub max_tokens: usize,
}

/// What conversations are to be like.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Key of all draws.
    pub seed: u64,
    /// The user's words.
    pub user: Draw,
    /// The answers.
    pub answer: Draw,
    /// The part of answers after which the user has another turn, from 0 to 1.
    pub further: f64,
    /// Most tokens of a conversation with its last answer.
    pub max_context: usize,
    /// Attempts that are made together.
    pub chunk: u64,
}

/// A conversation's number and its turns: a line each, the last answer of which is the line's.
#[derive(Clone, Debug, PartialEq)]
pub struct Made {
    /// Which attempt.
    pub attempt: u64,
    /// At least one; each goes on from the one before.
    pub turns: Vec<Conversation>,
}

/// One that is being made.
struct Draft {
    attempt: u64,
    messages: Vec<Message>,
    turns: Vec<Conversation>,
}

/// Why it fails.
#[derive(Debug, thiserror::Error)]
pub enum SelfPromptError {
    /// The chat template cannot be rendered.
    #[error(transparent)]
    Template(#[from] ServiceError),
    /// A forward pass failed.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// What makes conversations.
pub struct SelfPrompter<'m> {
    /// The words of the model that writes both sides.
    pub text: &'m ModelText,
    /// What they are to be like.
    pub settings: Settings,
    /// Tokens that end a turn.
    pub end: Vec<u32>,
}

/// Writes answers to questions, in their order; an ending token is a part of an answer.
pub type Write<'w> = dyn FnMut(Vec<Question>) -> Result<Vec<Vec<u32>>, ModelError> + 'w;

impl SelfPrompter<'_> {
    /// Makes the attempts of a chunk by what the model writes. Gives what came of them in the order of their numbers, and counts in
    /// `left_out` what did not.
    ///
    /// # Errors
    /// Where there is no chat template, or `write` fails.
    pub fn chunk(
        &self,
        chunk: u64,
        doubles: &mut Doubles,
        left_out: &mut LeftOut,
        write: &mut Write<'_>,
    ) -> Result<Vec<Made>, SelfPromptError> {
        let attempts = chunk * self.settings.chunk..(chunk + 1) * self.settings.chunk;
        let mut drafts: Vec<Draft> = attempts.map(|attempt| Draft { attempt, messages: Vec::new(), turns: Vec::new() }).collect();
        let mut made: Vec<Made> = Vec::new();
        for turn in 0.. {
            drafts = self.user_turn(drafts, turn, doubles, left_out, &mut made, write)?;
            drafts = self.answers(drafts, turn, left_out, &mut made, write)?;
            let (go_on, done): (Vec<Draft>, Vec<Draft>) = drafts.into_iter().partition(|draft| self.goes_on(draft.attempt, turn));
            done.into_iter().for_each(|draft| draft.keep(&mut made));
            drafts = go_on;
            if drafts.is_empty() {
                break;
            }
        }
        made.sort_by_key(|made| made.attempt);
        // Only what is kept counts, so that a file says all that was there before it is gone on with.
        made.retain(|made| {
            let new = made.turns.first().is_none_or(|turn| doubles.take(asked(turn)));
            if !new {
                left_out.count(filter::Why::Double);
            }
            new
        });
        Ok(made)
    }

    /// The user's words: those that are of no use end their conversation.
    fn user_turn(
        &self,
        drafts: Vec<Draft>,
        turn: u64,
        doubles: &Doubles,
        left_out: &mut LeftOut,
        made: &mut Vec<Made>,
        write: &mut Write<'_>,
    ) -> Result<Vec<Draft>, SelfPromptError> {
        let opened = drafts.iter().map(|draft| self.opening(&draft.messages)).collect::<Result<Vec<_>, _>>()?;
        let (drafts, written) = self.written(drafts, opened, self.settings.user, |attempt| self.key(attempt, turn, 0), made, write)?;
        let mut going_on = Vec::new();
        for (mut draft, tokens) in drafts.into_iter().zip(written) {
            let words = self.words(&tokens);
            let verdict = words.as_deref().ok_or(filter::Why::CutOff).and_then(filter::user).and_then(|words| match turn {
                0 if doubles.has(words) => Err(filter::Why::Double),
                _ => Ok(words.to_owned()),
            });
            match verdict {
                Ok(content) => {
                    draft.messages.push(Message { role: "user".into(), content });
                    going_on.push(draft);
                }
                Err(why) => {
                    left_out.count(why);
                    draft.keep(made);
                }
            }
        }
        Ok(going_on)
    }

    /// The answers: one that is of no use ends its conversation before it.
    fn answers(
        &self,
        drafts: Vec<Draft>,
        turn: u64,
        left_out: &mut LeftOut,
        made: &mut Vec<Made>,
        write: &mut Write<'_>,
    ) -> Result<Vec<Draft>, SelfPromptError> {
        let asked = drafts.iter().map(|draft| self.text.encode_chat(&draft.messages)).collect::<Result<Vec<_>, _>>()?;
        let (drafts, written) = self.written(drafts, asked, self.settings.answer, |attempt| self.key(attempt, turn, 1), made, write)?;
        let mut going_on = Vec::new();
        for (mut draft, tokens) in drafts.into_iter().zip(written) {
            let complete = tokens.last().is_some_and(|token| self.end.contains(token));
            let response = self.text.decode(&tokens, false);
            if let Err(why) = filter::answer(&response) {
                left_out.count(why);
                draft.keep(made);
                continue;
            }
            draft.turns.push(self.line(&draft, response.clone(), complete));
            draft.messages.push(Message { role: "assistant".into(), content: response });
            // Nobody goes on from half an answer.
            if complete {
                going_on.push(draft);
            } else {
                draft.keep(made);
            }
        }
        Ok(going_on)
    }

    /// What the model writes after each of `prompts`. Conversations that have become too long end.
    fn written(
        &self,
        drafts: Vec<Draft>,
        prompts: Vec<Vec<u32>>,
        draw: Draw,
        key: impl Fn(u64) -> u64,
        made: &mut Vec<Made>,
        write: &mut Write<'_>,
    ) -> Result<(Vec<Draft>, Vec<Vec<u32>>), SelfPromptError> {
        let (mut fitting, mut asked) = (Vec::new(), Vec::new());
        for (draft, prompt) in drafts.into_iter().zip(prompts) {
            if prompt.len() + draw.max_tokens > self.settings.max_context {
                draft.keep(made);
                continue;
            }
            let Draw { temperature, top_p, max_tokens } = draw;
            let sampling = SamplingParams { temperature, top_p, seed: key(draft.attempt), ..SamplingParams::greedy() };
            asked.push(Question { prompt, sampling, max_tokens });
            fitting.push(draft);
        }
        let written = if asked.is_empty() { Vec::new() } else { write(asked)? };
        Ok((fitting, written))
    }

    /// Token ids of the chat up to where the user's next words stand: what is the same whatever they are.
    fn opening(&self, messages: &[Message]) -> Result<Vec<u32>, ServiceError> {
        let with = |content: &str| {
            let asked = Message { role: "user".into(), content: content.into() };
            let mut chat = Chat::of(&[messages, &[asked]].concat());
            chat.variables.insert("add_generation_prompt".into(), json!(false));
            self.text.encode_whole_chat(&chat)
        };
        let (mut one, other) = (with("A")?, with("7")?);
        let alike = one.iter().zip(&other).take_while(|(one, other)| one == other).count();
        one.truncate(alike);
        Ok(one)
    }

    /// A turn's words; `None` where it was cut off.
    fn words(&self, tokens: &[u32]) -> Option<String> {
        let ended = tokens.last().is_some_and(|token| self.end.contains(token));
        ended.then(|| self.text.decode(tokens, false))
    }

    fn line(&self, draft: &Draft, response: String, complete: bool) -> Conversation {
        let other = [("kind", json!(kind(first_asked(&draft.messages)))), ("document", json!(document(self.settings.seed, draft.attempt)))];
        Conversation {
            messages: draft.messages.clone(),
            response,
            task: None,
            answers: Vec::new(),
            metric: Metric::default(),
            complete,
            other: other.map(|(key, value)| (key.to_owned(), value)).into_iter().collect(),
        }
    }

    /// Key of the draws of a turn: `side` is 0 for the user's words, 1 for the answer.
    fn key(&self, attempt: u64, turn: u64, side: u64) -> u64 {
        self.settings.seed.wrapping_add((attempt * MOST_TURNS + turn) * 2 + side)
    }

    fn goes_on(&self, attempt: u64, turn: u64) -> bool {
        let mut drawn = ChaCha8Rng::seed_from_u64(self.key(attempt, turn, 0));
        // A stream of its own: positions of tokens are the others.
        drawn.set_stream(u64::MAX);
        turn + 1 < MOST_TURNS && drawn.random_bool(self.settings.further)
    }
}

impl Draft {
    /// What came of it, if anything did.
    fn keep(self, made: &mut Vec<Made>) {
        if !self.turns.is_empty() {
            made.push(Made { attempt: self.attempt, turns: self.turns });
        }
    }
}

/// The user's first words in a conversation.
pub fn asked(conversation: &Conversation) -> &str {
    first_asked(&conversation.messages)
}

fn first_asked(messages: &[Message]) -> &str {
    messages.iter().find(|message| message.role == "user").map_or("", |message| &message.content)
}

/// The name of what an attempt makes: lines of one conversation are one document.
pub fn document(seed: u64, attempt: u64) -> String {
    format!("self-prompt {seed}: {attempt}")
}

/// The attempt that made a document, where it is one of this seed.
pub fn attempt_of(document: &str, seed: u64) -> Option<u64> {
    document.strip_prefix(&format!("self-prompt {seed}: "))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use serde_json::Value;

    use super::*;

    const END: u32 = 256;

    /// Bytes are its tokens.
    fn text() -> ModelText {
        let plain = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let others: Vec<u32> = (0..256).filter(|byte| !plain(byte)).collect();
        let name = |byte: u32| others.iter().position(|other| *other == byte).map_or(byte, |place| 256 + place as u32);
        let vocabulary: serde_json::Map<String, Value> =
            (0..256).map(|byte| (char::from_u32(name(byte)).unwrap().to_string(), json!(byte))).collect();
        let end = json!({ "id": END, "content": "<|end|>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false });
        let bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
        let tokenizer = json!({
            "version": "1.0", "added_tokens": [end], "pre_tokenizer": bytes, "decoder": bytes,
            "model": { "type": "BPE", "vocab": vocabulary, "merges": [] },
        });
        let template =
            "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}";
        let config = json!({ "eos_token": "<|end|>", "chat_template": template });
        ModelText::from_files("m", tokenizer.to_string().as_bytes(), config.to_string().as_bytes()).unwrap()
    }

    fn settings(chunk: u64) -> Settings {
        let draw = Draw { temperature: 1.0, top_p: 0.95, max_tokens: 100 };
        Settings { seed: 7, user: draw, answer: Draw { temperature: 0.5, ..draw }, further: 0.5, max_context: 2000, chunk }
    }

    /// The user's words are of eleven kinds, by the key of the draw; the answer names them.
    fn write(text: &ModelText, asked: &[Question]) -> Vec<Vec<u32>> {
        let one = |asked: &Question| {
            let prompt = text.decode(&asked.prompt, true);
            let written = match (prompt.strip_suffix("[user] "), asked.sampling.seed / 2 % 11) {
                (Some(_), 0) => return text.encode_plain("words that have no end").unwrap(),
                (Some(_), 1) => "Hi".to_owned(),
                (Some(_), 2) => "How do I boil an egg?".to_owned(),
                (Some(_), _) => format!("Tell me of the number {} and of town {}", asked.sampling.seed, asked.sampling.seed * 7),
                (None, kind) => {
                    assert!(prompt.ends_with("<|end|>[assistant] "), "{prompt}");
                    assert_eq!(asked.sampling.temperature, 0.5);
                    if kind == 3 { "round and round we go, ".repeat(4) } else { format!("This is answer {kind}, and all there is.") }
                }
            };
            [text.encode_plain(&written).unwrap(), vec![END]].concat()
        };
        asked.iter().map(one).collect()
    }

    fn made(chunks: std::ops::Range<u64>, chunk: u64, doubles: &mut Doubles) -> (Vec<Made>, String) {
        let text = text();
        let prompter = SelfPrompter { text: &text, settings: settings(chunk), end: vec![END] };
        let mut left_out = LeftOut::default();
        let one = |number| prompter.chunk(number, doubles, &mut left_out, &mut |asked| Ok(write(&text, &asked))).unwrap();
        (chunks.flat_map(one).collect(), left_out.to_string())
    }

    #[test]
    fn conversations_go_on_and_what_is_of_no_use_is_left_out() {
        let (made, left_out) = made(0..4, 50, &mut Doubles::default());
        assert!(made.len() > 60 && made.is_sorted_by_key(|made| made.attempt), "{}", made.len());
        let mut asked_for = HashSet::new();
        for Made { attempt, turns } in &made {
            assert!(asked_for.insert(asked(&turns[0]).to_owned()), "an egg is boiled once");
            for (turn, line) in turns.iter().enumerate() {
                assert_eq!(line.messages.len(), 2 * turn + 1);
                assert_eq!(line.messages.last().unwrap().role, "user");
                assert!(line.complete && line.response.starts_with("This is answer"), "{line:?}");
                assert_eq!(attempt_of(line.other["document"].as_str().unwrap(), 7), Some(*attempt));
                // It goes on from what was said.
                assert!(turn == 0 || line.messages[2 * turn - 1].content == turns[turn - 1].response);
            }
        }
        let turns: usize = made.iter().map(|made| made.turns.len()).sum();
        assert!(
            (made.len() * 5 / 4..made.len() * 2).contains(&turns),
            "{turns} turns of {}: half go on, and some of these end",
            made.len()
        );
        for what in ["of the user's words without an end", "too short", "nearly as others before", "answers that go round in circles"] {
            assert!(!left_out.contains(&format!(" 0 {what}")) && left_out.contains(what), "{left_out}");
        }
    }

    #[test]
    fn what_comes_of_an_attempt_does_not_depend_on_when_a_run_was_stopped() {
        let mut doubles = Doubles::default();
        let (all, _) = made(0..4, 50, &mut doubles);
        // What is known of the first two chunks is what was kept of them.
        let mut known = Doubles::default();
        all.iter().filter(|made| made.attempt < 100).for_each(|made| assert!(known.take(asked(&made.turns[0]))));
        let (rest, _) = made(2..4, 50, &mut known);
        assert!(!rest.is_empty() && rest[..] == all[all.len() - rest.len()..]);
        let (other, _) = made(0..20, 10, &mut Doubles::default());
        assert!(other == all, "nor on how many are made together");
    }
}
