//! The handoffs that a router saw last.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use overfill_proto::v1::HandoffDone;
use overfill_types::NodeId;
use tokio::time::Instant;

use crate::overview::HandoffState;

/// How many are kept: more than come in a second where somebody can still follow them.
const KEPT: usize = 64;

/// A handoff as its request's driver sees it.
pub(crate) struct Seen {
    pub(crate) model: String,
    pub(crate) from: NodeId,
    pub(crate) to: NodeId,
    pub(crate) attempt: u64,
    pub(crate) prompt_tokens: usize,
    pub(crate) cached_tokens: Option<u32>,
    pub(crate) held_tokens: u32,
}

/// The last of them.
#[derive(Default)]
pub(crate) struct Handoffs(Mutex<Ring>);

#[derive(Default)]
struct Ring {
    seen: u64,
    /// The latest last; when each was seen.
    last: VecDeque<(Instant, HandoffState)>,
}

impl Handoffs {
    /// One came about; `done` is what the prefill node says of it.
    pub(crate) fn saw(&self, seen: Seen, done: HandoffDone) {
        let Seen { model, from, to, attempt, prompt_tokens, cached_tokens, held_tokens } = seen;
        let seconds = |micros: u64| micros as f64 / 1e6;
        let mut state = HandoffState {
            number: 0,
            ago: 0.0,
            model,
            from,
            to,
            attempt,
            prompt_tokens,
            cached_tokens,
            held_tokens,
            bytes: done.bytes,
            transfer: seconds(done.transfer_us),
            tail: seconds(done.tail_us),
        };
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ring.seen += 1;
        state.number = ring.seen;
        if ring.last.len() == KEPT {
            ring.last.pop_front();
        }
        ring.last.push_back((Instant::now(), state));
    }

    /// Those that are kept, the latest first.
    pub(crate) fn latest(&self) -> Vec<HandoffState> {
        let ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let aged = |(at, state): &(Instant, HandoffState)| HandoffState { ago: at.elapsed().as_secs_f64(), ..state.clone() };
        ring.last.iter().rev().map(aged).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_last_are_kept_with_what_was_said_of_them() {
        let handoffs = Handoffs::default();
        for prompt_tokens in 1..=KEPT + 10 {
            let done = HandoffDone { frames: 3, bytes: 1_000, tail_us: 2_000, transfer_us: 50_000 };
            let (from, to) = (NodeId::new("p"), NodeId::new("d"));
            let seen = Seen { model: "m".into(), from, to, attempt: 1, prompt_tokens, cached_tokens: Some(16), held_tokens: 0 };
            handoffs.saw(seen, done);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        let latest = handoffs.latest();
        let numbers: Vec<u64> = latest.iter().map(|handoff| handoff.number).collect();
        let all = KEPT as u64 + 10;
        assert_eq!(numbers, (11..=all).rev().collect::<Vec<_>>());
        let first = &latest[0];
        assert_eq!((first.prompt_tokens as u64, first.bytes, first.cached_tokens), (all, 1_000, Some(16)));
        assert_eq!((first.ago, first.transfer, first.tail, latest[1].ago), (1.0, 0.05, 0.002, 2.0));
    }
}
