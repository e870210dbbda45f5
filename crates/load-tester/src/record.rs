//! What was seen of one request. All times are of one clock and count from the beginning of the run.

use std::time::Duration;

use super::failure::Failure;

/// One request, from its plan to its end.
#[derive(Clone, Debug)]
pub(super) struct Record {
    /// When it was due. A later turn of a chat is due when the answer before it is there and has been read.
    pub(super) due: Duration,
    /// When it was let go: later than `due` only if this program was late.
    pub(super) released: Duration,
    /// When it was sent: later than `released` only if `--max-concurrency` held it back. `None`: never.
    pub(super) sent: Option<Duration>,
    /// Its answer's tokens as they came.
    pub(super) arrivals: Vec<Arrival>,
    /// Tokens of the prompt, as the server counts them, or else as they were planned.
    pub(super) prompt_tokens: usize,
    /// Tokens of the answer, as the server counts them, or else as they arrived.
    pub(super) output_tokens: usize,
    /// Whether the server told both.
    pub(super) usage_told: bool,
    /// The answer, if it is kept.
    pub(super) text: String,
    /// When its end was known.
    pub(super) ended: Duration,
    /// How it ended.
    pub(super) outcome: Outcome,
}

/// Tokens that came in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Arrival {
    pub(super) at: Duration,
    pub(super) tokens: u32,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Completed,
    Failed(Failure),
    /// Ctrl-C came first.
    Interrupted,
}

/// Seconds of one answered request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Latency {
    /// To the first token.
    pub(super) ttft: f64,
    /// To the last token.
    pub(super) e2el: f64,
    /// Between tokens on average, without the first; `None` with fewer than two tokens.
    pub(super) tpot: Option<f64>,
    /// To the first token from when the request was due.
    pub(super) due_ttft: f64,
    /// To the last token from when the request was due.
    pub(super) due_e2el: f64,
}

impl Record {
    pub(super) fn completed(&self) -> bool {
        self.outcome == Outcome::Completed
    }

    /// Its latencies, if it was answered.
    pub(super) fn latency(&self) -> Option<Latency> {
        let (sent, first, last) = (self.sent?, self.arrivals.first()?.at, self.arrivals.last()?.at);
        if !self.completed() {
            return None;
        }
        let since = |from: Duration, to: Duration| to.saturating_sub(from).as_secs_f64();
        let gaps = self.output_tokens.saturating_sub(1);
        Some(Latency {
            ttft: since(sent, first),
            e2el: since(sent, last),
            tpot: (gaps > 0).then(|| since(first, last) / gaps as f64),
            due_ttft: since(self.due, first),
            due_e2el: since(self.due, last),
        })
    }

    /// Seconds between the arrivals of its tokens: one gap for each piece, however many tokens were in it.
    pub(super) fn gaps(&self) -> impl Iterator<Item = f64> {
        self.arrivals.windows(2).map(|w| w[1].at.saturating_sub(w[0].at).as_secs_f64())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An answered request, times in milliseconds.
    pub(crate) fn answered(due: u64, sent: u64, arrivals: &[(u64, u32)], output_tokens: usize) -> Record {
        let ms = Duration::from_millis;
        let arrivals: Vec<Arrival> = arrivals.iter().map(|&(at, tokens)| Arrival { at: ms(at), tokens }).collect();
        Record {
            due: ms(due),
            released: ms(due),
            sent: Some(ms(sent)),
            ended: arrivals.last().map_or(ms(sent), |a| a.at),
            arrivals,
            prompt_tokens: 10,
            output_tokens,
            usage_told: true,
            text: String::new(),
            outcome: Outcome::Completed,
        }
    }

    #[test]
    fn latencies_by_hand() {
        // Due at 100, held back until 150; five tokens in three pieces.
        let record = answered(100, 150, &[(350, 1), (450, 3), (550, 1)], 5);
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} and not {b}");
        let latency = record.latency().unwrap();
        close(latency.ttft, 0.2);
        close(latency.e2el, 0.4);
        close(latency.tpot.unwrap(), 0.05);
        close(latency.due_ttft, 0.25);
        close(latency.due_e2el, 0.45);
        let gaps: Vec<f64> = record.gaps().collect();
        assert_eq!(gaps.len(), 2);
        close(gaps[0], 0.1);
        assert_eq!(answered(0, 0, &[(5, 1)], 1).latency().unwrap().tpot, None);
        assert_eq!(Record { outcome: Outcome::Interrupted, ..record }.latency(), None);
    }
}
