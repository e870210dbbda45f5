//! Answers to many prompts, written by one arm in one batch: new prompts take the places of answers that have ended.
//!
//! **Invariant:** an answer does not depend on what is written beside it: it is the one that `overfill generate` writes for
//! the same prompt, parameters and seed.

use std::collections::BTreeMap;

use overfill_kv::BlockId;
use overfill_model::{Chunk, KvCache, Llama, ModelError, Sampler, Workspace};
use overfill_types::{KvFormats, SamplingParams};

use crate::read::{Arm, BLOCK_TOKENS, Handoff, Prompt, read, tables};

/// A prompt and how it is to be answered.
#[derive(Clone, Debug)]
pub struct Question {
    /// Token ids; not empty.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Most tokens to write; at least 1.
    pub max_tokens: usize,
}

/// How answers are written.
#[derive(Clone, Debug)]
pub struct Writing {
    /// Answers at a time.
    pub batch: usize,
    /// Positions of the longest prompt with its answer.
    pub positions: usize,
    /// Formats of the KV cache.
    pub formats: KvFormats,
    /// Tokens that end an answer.
    pub end: Vec<u32>,
}

/// An answer that is being written.
struct Sequence {
    /// Which of all that were asked.
    number: usize,
    place: usize,
    asked: Question,
    sampler: Sampler,
    written: Vec<u32>,
}

impl Sequence {
    /// The token that the writer reads next: the prompt's last one, or the one that it has just written.
    fn next(&self) -> &[u32] {
        let Self { asked: Question { prompt, .. }, written, .. } = self;
        let tokens = if written.is_empty() { prompt } else { written };
        &tokens[tokens.len() - 1..]
    }

    fn position(&self) -> usize {
        self.asked.prompt.len() + self.written.len()
    }

    fn has_ended(&self, end: &[u32]) -> bool {
        self.written.len() >= self.asked.max_tokens || self.written.last().is_some_and(|token| end.contains(token))
    }
}

/// One arm and the caches of a batch.
struct Writer<'m> {
    full: &'m Llama,
    arm: Arm<'m>,
    /// The model that writes.
    model: &'m Llama,
    how: &'m Writing,
    tables: Vec<Vec<BlockId>>,
    /// Of the model that writes.
    cache: KvCache,
    /// Of the full model, where another one writes from it.
    full_cache: Option<KvCache>,
}

/// Writes all answers; `done` is called with each in the order in which they were asked (token ids, the ending one
/// included if there is one), and may fail, which ends it.
///
/// # Errors
/// [`ModelError::Mismatch`] where a prompt is empty or leaves no room; where a forward pass or `done` fails.
pub fn answer<E: From<ModelError>>(
    full: &Llama,
    arm: Arm<'_>,
    how: &Writing,
    workspace: &mut Workspace,
    asked: impl IntoIterator<Item = Question>,
    mut done: impl FnMut(usize, Vec<u32>) -> Result<(), E>,
) -> Result<(), E> {
    let mut writer = Writer::new(full, arm, how)?;
    let mut asked = asked.into_iter().enumerate().peekable();
    let mut places: Vec<usize> = (0..how.batch).rev().collect();
    let mut active: Vec<Sequence> = Vec::new();
    // Answers that have ended before an earlier one. The earliest ends within `max_tokens` steps, which bounds them.
    let mut waiting: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
    let mut next = 0;
    while asked.peek().is_some() || !active.is_empty() {
        // Prompts are read some at a time, so that weights are read for many tokens.
        if active.is_empty() || places.len() >= how.batch.div_ceil(8) {
            let mut new = Vec::new();
            while let Some((number, asked)) = asked.next_if(|_| !places.is_empty()) {
                let Some(place) = places.pop() else { break };
                let sampler = Sampler::new(asked.sampling.clone(), &asked.prompt);
                new.push(Sequence { number, place, asked, sampler, written: Vec::new() });
            }
            writer.read(&mut new, workspace)?;
            active.extend(new);
        }
        writer.step(&mut active, workspace)?;
        for ended in active.extract_if(.., |sequence| sequence.has_ended(&how.end)) {
            places.push(ended.place);
            waiting.insert(ended.number, ended.written);
        }
        while let Some(written) = waiting.remove(&next) {
            done(next, written)?;
            next += 1;
        }
    }
    Ok(())
}

impl<'m> Writer<'m> {
    fn new(full: &'m Llama, arm: Arm<'m>, how: &'m Writing) -> Result<Self, ModelError> {
        if how.batch == 0 {
            return Err(ModelError::Mismatch("a batch of no answers: at least 1 is needed".into()));
        }
        let (tables, blocks) = tables((0..how.batch).map(|_| how.positions));
        let cache = |model: &Llama| KvCache::new(model.config().kv, how.formats.cache, blocks, BLOCK_TOKENS, model.device());
        let full_cache = if matches!(arm, Arm::Overfill { .. }) { Some(cache(full)?) } else { None };
        let model = match arm {
            Arm::Full => full,
            Arm::Overfill { decode: model, .. } | Arm::Alone(model) => model,
        };
        Ok(Self { full, arm, model, how, tables, cache: cache(model)?, full_cache })
    }

    /// Reads the prompts of new sequences: all of it, with the first token of the answer, where the full model reads for
    /// another one; else all but the last token, which is the first that the writer reads.
    fn read(&mut self, new: &mut [Sequence], workspace: &mut Workspace) -> Result<(), ModelError> {
        for sequence in new.iter() {
            let (prompt, room) = (sequence.asked.prompt.len(), self.how.positions);
            if prompt == 0 || sequence.asked.max_tokens == 0 || prompt + sequence.asked.max_tokens > room {
                return Err(ModelError::Mismatch(format!(
                    "a prompt of {prompt} tokens with {} to write: both must be there and fit {room} positions",
                    sequence.asked.max_tokens
                )));
            }
        }
        let (Arm::Overfill { transform, .. }, Some(cache)) = (self.arm, &mut self.full_cache) else {
            let prompts: Vec<Prompt<'_>> =
                new.iter().map(|s| Prompt { tokens: &s.asked.prompt[..s.asked.prompt.len() - 1], blocks: &self.tables[s.place] }).collect();
            return read(self.model, &prompts, &mut self.cache, workspace, &mut []);
        };
        let prompts: Vec<Prompt<'_>> = new.iter().map(|s| Prompt { tokens: &s.asked.prompt, blocks: &self.tables[s.place] }).collect();
        let handoff = Handoff { transform, format: self.how.formats.wire, to: &mut self.cache };
        read(self.full, &prompts, cache, workspace, &mut [handoff])?;
        write(self.full, &self.tables, cache, workspace, new.iter_mut())
    }

    /// Writes a token of every sequence that has not ended.
    fn step(&mut self, active: &mut [Sequence], workspace: &mut Workspace) -> Result<(), ModelError> {
        let going_on = active.iter_mut().filter(|sequence| !sequence.has_ended(&self.how.end));
        write(self.model, &self.tables, &mut self.cache, workspace, going_on)
    }
}

/// Has `model` read the last token of each sequence and write the next.
fn write<'s>(
    model: &Llama,
    tables: &[Vec<BlockId>],
    cache: &mut KvCache,
    workspace: &mut Workspace,
    sequences: impl Iterator<Item = &'s mut Sequence>,
) -> Result<(), ModelError> {
    let mut sequences: Vec<&mut Sequence> = sequences.collect();
    if sequences.is_empty() {
        return Ok(());
    }
    let chunks: Vec<Chunk<'_>> =
        sequences.iter().map(|s| Chunk { tokens: s.next(), start: s.position() - 1, blocks: &tables[s.place], logits: true }).collect();
    model.forward(&chunks, cache, workspace, &mut |_, _, _| Ok(()))?;
    drop(chunks);
    let samplers = sequences.iter_mut().map(|s| {
        let position = s.position();
        (&mut s.sampler, position)
    });
    let sampled = workspace.sample(samplers);
    for (sequence, sampled) in sequences.iter_mut().zip(sampled) {
        sequence.written.push(sampled.ok_or(ModelError::Sampling)?.token);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use overfill_model::{Device, ThreadPool, Transform};
    use overfill_types::pair::WeightFormat;
    use overfill_types::{KvFormat, KvTransform, WireFormat};

    use super::*;

    fn load(name: &str, pool: &ThreadPool) -> Llama {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models").join(name);
        Llama::load(&folder, WeightFormat::F32, &Device::Cpu, pool).unwrap()
    }

    #[test]
    fn an_answer_is_the_same_in_any_batch() {
        let mut workspace = Workspace::new(ThreadPool::new(2, &[]).unwrap());
        let (full, decode) = (load("full", workspace.pool()), load("narrow", workspace.pool()));
        let kv = full.config().kv;
        let transform = Transform::load(&KvTransform::Identity, Path::new("."), kv, kv, workspace.pool()).unwrap();
        let asked: Vec<Question> = (0..11u32)
            .map(|i| Question {
                prompt: (0..=i * 3).map(|t| (t * 31 + i) % 128).collect(),
                sampling: SamplingParams { temperature: 1.5, seed: i.into(), ..SamplingParams::greedy() },
                max_tokens: 1 + (i as usize * 5) % 17,
            })
            .collect();
        for arm in [Arm::Full, Arm::Overfill { decode: &decode, transform: &transform }, Arm::Alone(&decode)] {
            let mut run = |batch: usize, asked: &[Question]| {
                let formats = KvFormats { cache: KvFormat::F16, wire: WireFormat::F16 };
                let how = Writing { batch, positions: 60, formats, end: vec![5, 6, 7, 8] };
                let mut all = Vec::new();
                answer(&full, arm, &how, &mut workspace, asked.to_vec(), |number, tokens| {
                    assert_eq!(number, all.len(), "in the order in which they were asked");
                    all.push(tokens);
                    Ok::<_, ModelError>(())
                })
                .unwrap();
                all
            };
            let alone: Vec<Vec<u32>> = asked.iter().flat_map(|one| run(1, std::slice::from_ref(one))).collect();
            for (written, asked) in alone.iter().zip(&asked) {
                assert!(!written.is_empty() && written.len() <= asked.max_tokens);
                let ended = |t: &u32| (5..=8).contains(t);
                assert!(!written[..written.len() - 1].iter().any(ended), "nothing is written after the end");
                assert!(written.len() == asked.max_tokens || ended(&written[written.len() - 1]));
            }
            for batch in [1, 3, 16] {
                assert_eq!(run(batch, &asked), alone);
            }
        }
    }

    #[test]
    fn a_prompt_without_room_is_refused() {
        let mut workspace = Workspace::new(ThreadPool::new(1, &[]).unwrap());
        let full = load("full", workspace.pool());
        let how = Writing { batch: 2, positions: 16, formats: KvFormats::default(), end: vec![] };
        for (prompt, max_tokens) in [(vec![], 1), (vec![1], 0), (vec![1; 10], 7)] {
            let asked = Question { prompt, sampling: SamplingParams::greedy(), max_tokens };
            assert!(answer(&full, Arm::Full, &how, &mut workspace, [asked], |_, _| Ok::<_, ModelError>(())).is_err());
        }
    }
}
