//! What is known of one node: what it says of itself, and what this router has under way on it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use overfill_types::Endpoint;

/// How old a report may be and still count: three heartbeats of a node's status stream.
const STALE: Duration = Duration::from_secs(3);
/// In which time work that was done counts half.
const HALF_LIFE: Duration = Duration::from_secs(30);
/// Sequences that a node is taken to hold at most as long as it has not said so: only the measure of its load.
const SEQUENCES: f64 = 64.0;

/// What a node says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Sequences held: waiting, or running.
    pub sequences: u64,
    /// Most of them; 0 where that is not known.
    pub sequences_most: u64,
    /// Prompt tokens held that are not read yet.
    pub unread_tokens: u64,
    /// Unread tokens that keep it busy for a moment: what comes beyond waits its turn elsewhere. 0 where that is not bounded.
    pub unread_tokens_most: u64,
    /// Token positions in a block.
    pub block_tokens: u64,
    /// Blocks of its KV cache.
    pub blocks: u64,
    /// Of these, held.
    pub blocks_held: u64,
    /// Blocks that the sequences held may come to need.
    pub promised: u64,
    /// Most of them; 0 where that is not bounded.
    pub promised_most: u64,
    /// Most blocks that it keeps for prompts that begin alike.
    pub prefix_blocks_most: u64,
}

/// What is under way on a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    pub(crate) sequences: i64,
    /// Tokens to read.
    pub(crate) tokens: i64,
    /// Blocks that may come to be needed.
    pub(crate) blocks: i64,
}

impl Work {
    fn add(&mut self, other: Self, times: i64) {
        self.sequences += other.sequences * times;
        self.tokens += other.tokens * times;
        self.blocks += other.blocks * times;
    }
}

/// A sum in which what is older counts less.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lately {
    sum: f64,
    at: Instant,
}

impl Lately {
    pub(crate) fn new(now: Instant) -> Self {
        Self { sum: 0.0, at: now }
    }

    pub(crate) fn at(&self, now: Instant) -> f64 {
        self.sum * (-now.saturating_duration_since(self.at).as_secs_f64() / HALF_LIFE.as_secs_f64()).exp2()
    }

    pub(crate) fn add(&mut self, amount: f64, now: Instant) {
        *self = Self { sum: (self.at(now) + amount).max(0.0), at: self.at.max(now) };
    }
}

/// Whether a node has room for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Room {
    Now,
    /// It has not said, never or not lately: it may have failed, or be full of others' work.
    Unknown,
    Later,
    Never,
}

#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) endpoint: Arc<Endpoint>,
    report: Report,
    reported: Option<Instant>,
    /// Of this router.
    own: Work,
    /// What this router has begun and ended there since the last report.
    since: Work,
    /// Tokens that this router gave it to read.
    pub(crate) lately: Lately,
    /// Left alone until then, since it failed.
    pub(crate) suspect_until: Option<Instant>,
}

impl Node {
    pub(crate) fn new(endpoint: Arc<Endpoint>, now: Instant) -> Self {
        let (report, reported, own, since) = Default::default();
        Self { endpoint, report, reported, own, since, lately: Lately::new(now), suspect_until: None }
    }

    pub(crate) fn told(&mut self, report: Report, now: Instant) {
        self.report = report;
        self.reported = Some(now);
        self.since = Work::default();
    }

    pub(crate) fn begin(&mut self, work: Work) {
        self.own.add(work, 1);
        self.since.add(work, 1);
    }

    pub(crate) fn end(&mut self, work: Work) {
        self.own.add(work, -1);
        self.since.add(work, -1);
    }

    /// Most blocks that it keeps for prompts that begin alike, in the index's blocks; `None` where that is not known.
    pub(crate) fn prefix_blocks_most(&self) -> Option<usize> {
        self.reported?;
        let tokens = self.report.prefix_blocks_most.saturating_mul(self.report.block_tokens);
        Some(usize::try_from(tokens).unwrap_or(usize::MAX) / crate::prefix_index::BLOCK)
    }

    /// Whether it is left alone, since it failed.
    pub(crate) fn suspected(&self, now: Instant) -> bool {
        self.suspect_until.is_some_and(|until| until > now)
    }

    /// Whether it has said lately what it holds.
    fn fresh(&self, now: Instant) -> bool {
        self.reported.is_some_and(|at| now.saturating_duration_since(at) <= STALE)
    }

    /// What it said and what was begun since, or what this router has under way there if that is more, or all that is known.
    fn work(&self, now: Instant) -> Work {
        if !self.fresh(now) {
            return self.own;
        }
        let said = |reported: u64, since: i64, own: i64| i64::try_from(reported).unwrap_or(i64::MAX).saturating_add(since).max(own);
        Work {
            sequences: said(self.report.sequences, self.since.sequences, self.own.sequences),
            tokens: said(self.report.unread_tokens, self.since.tokens, self.own.tokens),
            blocks: said(self.report.promised, self.since.blocks, self.own.blocks),
        }
    }

    /// Tokens that its KV cache has room for; without bound as long as it has not said.
    pub(crate) fn holds(&self) -> usize {
        match self.report.blocks {
            0 => usize::MAX,
            blocks => usize::try_from(blocks.saturating_mul(self.report.block_tokens)).unwrap_or(usize::MAX),
        }
    }

    /// Tokens that it reads before those of another prompt, and whether it takes one that needs `tokens` in its cache, of
    /// which it has to read `unread`.
    pub(crate) fn reading(&self, tokens: usize, unread: usize, now: Instant) -> (f64, Room) {
        let work = self.work(now);
        let Report { sequences_most, unread_tokens_most, .. } = self.report;
        // Prompts are read side by side: until one is through, no more than its own length is read of each of the others.
        let before = work.tokens.min(work.sequences.saturating_mul(unread as i64)).max(0) as u64;
        let room = match () {
            () if tokens > self.holds() => Room::Never,
            () if sequences_most > 0 && work.sequences as u64 >= sequences_most => Room::Later,
            () if unread_tokens_most > 0 && before >= unread_tokens_most => Room::Later,
            () if !self.fresh(now) => Room::Unknown,
            () => Room::Now,
        };
        (work.tokens as f64, room)
    }

    /// How full it would be with another sequence of `tokens`, of which it holds `held` (1 is full), and whether it takes it.
    pub(crate) fn writing(&self, tokens: usize, held: usize, now: Instant) -> (f64, Room) {
        let work = self.work(now);
        let Report { sequences_most, blocks, blocks_held, promised_most, block_tokens, .. } = self.report;
        let sequences = (work.sequences + 1) as f64;
        if self.reported.is_none() {
            return (sequences / SEQUENCES, Room::Unknown);
        }
        let in_blocks = |tokens: usize| (tokens as u64).div_ceil(block_tokens.max(1));
        let needed = in_blocks(tokens);
        let promised = (work.blocks as u64).saturating_add(needed);
        let part = |of: f64, most: u64| if most == 0 { 0.0 } else { of / most as f64 };
        let fullness = part(sequences, sequences_most)
            .max(part(promised as f64, promised_most))
            .max(part(blocks_held as f64 + in_blocks(tokens.saturating_sub(held)) as f64, blocks));
        let room = match () {
            () if tokens > self.holds() => Room::Never,
            () if sequences_most > 0 && sequences > sequences_most as f64 => Room::Later,
            () if promised_most > 0 && promised > promised_most => Room::Later,
            () if !self.fresh(now) => Room::Unknown,
            () => Room::Now,
        };
        (fullness, room)
    }

    /// The work of a sequence of `tokens` in all.
    pub(crate) fn sequence(&self, tokens: usize) -> Work {
        let blocks = (tokens as u64).div_ceil(self.report.block_tokens.max(1)) as i64;
        Work { sequences: 1, tokens: 0, blocks }
    }

    #[cfg(test)]
    pub(crate) fn idle(&self) -> bool {
        self.own == Work::default()
    }
}
