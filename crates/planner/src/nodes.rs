//! What a prefill and a decode node do with time. Between two events a node does the same thing, so nothing here goes step by step.

use overfill_schedule::Report;

use crate::costs::{ReadCost, StepCost};
use crate::simulate::Bounds;

/// Token positions in a block of a KV cache.
const BLOCK: usize = 16;
/// Steps after which a decode node's step is timed anew: its caches have grown meanwhile.
const STEPS: f64 = 64.0;
/// What is left of a job that is done, for rounding's sake: seconds, or tokens.
const NOTHING: f64 = 1e-9;

/// A prefill node. Prompts that it holds are read side by side, each as fast as the others.
#[derive(Debug)]
pub(crate) struct Reader {
    cost: ReadCost,
    prompts: Vec<Prompt>,
    since: f64,
}

#[derive(Debug)]
struct Prompt {
    request: usize,
    tokens: usize,
    /// Seconds of computing that it needs, and those that are left of them.
    seconds: f64,
    left: f64,
}

impl Reader {
    pub(crate) fn new(cost: ReadCost) -> Self {
        Self { cost, prompts: Vec::new(), since: 0.0 }
    }

    /// Begins a prompt of which so many tokens have to be read.
    pub(crate) fn begin(&mut self, request: usize, tokens: usize, now: f64) {
        self.advance(now);
        let seconds = self.cost.seconds(tokens as f64);
        self.prompts.push(Prompt { request, tokens, seconds, left: seconds });
    }

    /// The prompts that are read by now.
    pub(crate) fn done(&mut self, now: f64) -> Vec<usize> {
        self.advance(now);
        let done = self.prompts.extract_if(.., |prompt| prompt.left <= NOTHING);
        done.map(|prompt| prompt.request).collect()
    }

    /// When the next one will be.
    pub(crate) fn next(&self) -> Option<f64> {
        let least = self.prompts.iter().map(|prompt| prompt.left).min_by(f64::total_cmp)?;
        Some(self.since + least.max(0.0) * self.prompts.len() as f64)
    }

    fn advance(&mut self, now: f64) {
        let each = (now - self.since) / self.prompts.len().max(1) as f64;
        self.prompts.iter_mut().for_each(|prompt| prompt.left -= each);
        self.since = now;
    }

    pub(crate) fn report(&self, bounds: &Bounds) -> Report {
        let unread: f64 = self.prompts.iter().map(|prompt| prompt.tokens as f64 * (prompt.left / prompt.seconds).clamp(0.0, 1.0)).sum();
        Report {
            sequences: self.prompts.len() as u64,
            unread_tokens: unread as u64,
            unread_tokens_most: (bounds.ready_seconds / self.cost.token).max(1.0) as u64,
            block_tokens: BLOCK as u64,
            ..Report::default()
        }
    }
}

/// A decode node. Each step writes one token of each of its sequences.
#[derive(Debug)]
pub(crate) struct Writer {
    cost: StepCost,
    sequences: Vec<Sequence>,
    /// Sequences that were promised a place and have not begun.
    promised: Promised,
    /// Tokens in the caches of those that write.
    context: f64,
    since: f64,
}

#[derive(Debug)]
struct Sequence {
    request: usize,
    /// Tokens that are left to write.
    left: f64,
    /// Tokens in its cache when it is done.
    whole: usize,
}

/// What a node has promised to those that it holds.
#[derive(Clone, Copy, Debug, Default)]
struct Promised {
    sequences: usize,
    blocks: usize,
}

impl Writer {
    pub(crate) fn new(cost: StepCost) -> Self {
        Self { cost, sequences: Vec::new(), promised: Promised::default(), context: 0.0, since: 0.0 }
    }

    /// Promises a place to a sequence that will have so many tokens.
    pub(crate) fn promise(&mut self, tokens: usize) {
        self.promised.sequences += 1;
        self.promised.blocks += tokens.div_ceil(BLOCK);
    }

    /// Takes it back: it is over.
    pub(crate) fn release(&mut self, tokens: usize) {
        self.promised.sequences -= 1;
        self.promised.blocks -= tokens.div_ceil(BLOCK);
    }

    /// Begins to write `tokens` after `context`.
    pub(crate) fn begin(&mut self, request: usize, context: usize, tokens: usize, now: f64) {
        self.advance(now);
        self.context += context as f64;
        self.sequences.push(Sequence { request, left: tokens as f64, whole: context + tokens });
    }

    /// The sequences that are written by now.
    pub(crate) fn done(&mut self, now: f64) -> Vec<usize> {
        self.advance(now);
        let done: Vec<Sequence> = self.sequences.extract_if(.., |sequence| sequence.left <= NOTHING).collect();
        self.context = if self.sequences.is_empty() { 0.0 } else { self.context - done.iter().map(|s| s.whole as f64).sum::<f64>() };
        done.into_iter().map(|sequence| sequence.request).collect()
    }

    /// When the next one will be, or when the step is to be timed anew.
    pub(crate) fn next(&self) -> Option<f64> {
        let least = self.sequences.iter().map(|sequence| sequence.left).min_by(f64::total_cmp)?;
        Some(self.since + least.clamp(0.0, STEPS) * self.step())
    }

    /// Seconds of a step.
    pub(crate) fn step(&self) -> f64 {
        self.cost.seconds(self.sequences.len() as f64, self.context.max(0.0))
    }

    fn advance(&mut self, now: f64) {
        if !self.sequences.is_empty() {
            let steps = (now - self.since) / self.step();
            self.sequences.iter_mut().for_each(|sequence| sequence.left -= steps);
            self.context += steps * self.sequences.len() as f64;
        }
        self.since = now;
    }

    pub(crate) fn report(&self, bounds: &Bounds) -> Report {
        let blocks = (bounds.kv_tokens / BLOCK) as u64;
        Report {
            sequences: self.promised.sequences as u64,
            sequences_most: bounds.sequences as u64,
            block_tokens: BLOCK as u64,
            blocks,
            blocks_held: (self.context.max(0.0) as u64 / BLOCK as u64).min(blocks),
            promised: self.promised.blocks as u64,
            promised_most: (blocks as f64 * bounds.overcommit) as u64,
            ..Report::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets a node go from event to event; gives each request and when it was done.
    fn run(mut next: impl FnMut(f64) -> (Vec<usize>, Option<f64>)) -> Vec<(usize, f64)> {
        let (mut all, mut now) = (Vec::new(), 0.0);
        loop {
            let (done, event) = next(now);
            all.extend(done.into_iter().map(|request| (request, now)));
            match event {
                Some(at) => now = at,
                None => return all,
            }
        }
    }

    #[test]
    fn prompts_are_read_side_by_side() {
        let mut reader = Reader::new(ReadCost { token: 1.0, attention: 0.0 });
        reader.begin(0, 10, 0.0);
        reader.begin(1, 2, 0.0);
        let read = run(|now| (reader.done(now), reader.next()));
        assert_eq!(read, [(1, 4.0), (0, 12.0)]);
        assert_eq!(Reader::new(ReadCost::of_rate(4.0)).cost.seconds(8.0), 2.0);
    }

    #[test]
    fn a_step_writes_one_token_of_each() {
        let mut writer = Writer::new(StepCost { step: 1.0, sequence: 0.5, context: 0.0 });
        writer.begin(0, 100, 10, 0.0);
        writer.begin(1, 100, 4, 0.0);
        let written = run(|now| (writer.done(now), writer.next()));
        assert_eq!(written, [(1, 8.0), (0, 17.0)]);
        assert_eq!(writer.context, 0.0);
    }

    #[test]
    fn longer_caches_take_longer() {
        let cost = StepCost { step: 1.0, sequence: 0.0, context: 1e-3 };
        let mut writer = Writer::new(cost);
        writer.begin(0, 1000, 1000, 0.0);
        let written = run(|now| (writer.done(now), writer.next()));
        let exact: f64 = (0..1000).map(|i| cost.seconds(1.0, 1000.0 + f64::from(i))).sum();
        assert!((written[0].1 / exact - 1.0).abs() < 0.02, "{written:?} {exact}");
    }
}
