//! The load itself: every conversation begins when it is due, whatever became of the others.
//!
//! Coordinated omission is kept out: the plan is made before the run, and what is due is never put off because the server is slow.
//! Two things can still hold a request back, and both are in its record: this program being late, and `--max-concurrency`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use overfill_lifecycle::Drain;
use overfill_text::Message;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::backend::{Answer, Backend, Prepared, Prompt};
use super::dataset::{Conversation, Input, Turn};
use super::failure::{Failure, Kind};
use super::health::{Health, Watch};
use super::record::{Arrival, Outcome, Record};

/// One run's load.
pub(super) struct Load {
    pub(super) conversations: Vec<Conversation>,
    /// When each of them begins; as many.
    pub(super) due: Vec<Duration>,
    pub(super) think: Duration,
    pub(super) max_concurrency: Option<u32>,
    /// Keep what was answered, for the detailed result.
    pub(super) keep_texts: bool,
}

/// What came of it.
pub(super) struct Measured {
    /// One for each request, in the order of the plan: also for those that were never sent.
    pub(super) records: Vec<Record>,
    /// From the beginning to the last end.
    pub(super) duration: Duration,
    /// How this program itself was doing.
    pub(super) health: Health,
}

/// What every conversation of a run shares.
struct Shared {
    backend: Arc<Backend>,
    begun: Instant,
    permits: Option<Semaphore>,
    think: Duration,
    keep_texts: bool,
    stop: Drain,
    bar: ProgressBar,
    /// What the bar says while nothing fails.
    what: String,
    failed: AtomicUsize,
}

impl Load {
    /// Requests in all.
    pub(super) fn requests(&self) -> usize {
        self.conversations.iter().map(|c| c.turns.len()).sum()
    }

    /// Puts the load on `backend`. When `stop` is given, nothing new is sent and what runs is cancelled.
    pub(super) async fn run(self, backend: Arc<Backend>, stop: Drain, bar: ProgressBar) -> Measured {
        let watch = Watch::start();
        let shared = Arc::new(Shared {
            backend,
            begun: Instant::now(),
            permits: self.max_concurrency.map(|n| Semaphore::new(n as usize)),
            think: self.think,
            keep_texts: self.keep_texts,
            stop: stop.clone(),
            what: bar.message(),
            bar,
            failed: AtomicUsize::new(0),
        });
        // Bounded by the plan: there are no more tasks than conversations.
        let mut running = JoinSet::new();
        let mut records: Vec<Vec<Record>> = vec![Vec::new(); self.conversations.len()];
        for (index, (conversation, due)) in self.conversations.into_iter().zip(self.due).enumerate() {
            // What is due at once needs no timer.
            if shared.begun.elapsed() < due {
                tokio::select! {
                    biased;
                    () = stop.signaled() => {}
                    () = tokio::time::sleep_until((shared.begun + due).into()) => {}
                }
            }
            if stop.draining() {
                records[index] = conversation.turns.iter().map(|turn| Record::unsent(due, turn, Outcome::Interrupted)).collect();
            } else {
                let shared = shared.clone();
                running.spawn(async move { (index, shared.converse(conversation, due).await) });
            }
        }
        while let Some(ended) = running.join_next().await {
            match ended.map_err(tokio::task::JoinError::try_into_panic) {
                Ok((index, of_one)) => records[index] = of_one,
                Err(Ok(panic)) => std::panic::resume_unwind(panic),
                // Cancelled: nobody does that but the end of the runtime, which ends this too.
                Err(Err(_)) => {}
            }
        }
        let duration = shared.begun.elapsed();
        Measured { records: records.into_iter().flatten().collect(), duration, health: watch.end().await }
    }
}

impl Record {
    fn unsent(due: Duration, turn: &Turn, outcome: Outcome) -> Self {
        Self {
            due,
            released: due,
            sent: None,
            arrivals: Vec::new(),
            prompt_tokens: turn.tokens,
            output_tokens: 0,
            usage_told: false,
            text: String::new(),
            ended: due,
            outcome,
        }
    }
}

impl Shared {
    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Moves the bar on; a failure is seen at once.
    fn show(&self, record: &Record) {
        if matches!(record.outcome, Outcome::Failed(_)) {
            let failed = self.failed.fetch_add(1, Ordering::Relaxed) + 1;
            self.bar.set_message(format!("{}, {failed} failed", self.what));
        }
        self.bar.inc(1);
    }

    /// All turns of a conversation, one after the other; one record for each.
    async fn converse(&self, conversation: Conversation, due: Duration) -> Vec<Record> {
        let mut records: Vec<Record> = Vec::with_capacity(conversation.turns.len());
        let mut chat: Vec<Message> = Vec::new();
        chat.extend(conversation.system.map(|content| Message { role: "system".into(), content }));
        let mut due = due;
        for turn in conversation.turns {
            let lost = match records.last().map(|r| &r.outcome) {
                Some(Outcome::Failed(_)) => {
                    Some(Outcome::Failed(Failure::new(Kind::EarlierTurn, "an earlier turn of the same chat failed")))
                }
                Some(Outcome::Interrupted) => Some(Outcome::Interrupted),
                Some(Outcome::Completed) | None => None,
            };
            if let Some(outcome) = lost {
                let record = Record::unsent(due, &turn, outcome);
                self.show(&record);
                records.push(record);
                continue;
            }
            if !records.is_empty() && !self.think.is_zero() {
                tokio::select! {
                    () = self.stop.signaled() => {}
                    () = tokio::time::sleep_until((self.begun + due).into()) => {}
                }
            }
            let released = self.now();
            let prompt = match &turn.input {
                Input::Ids(ids) => Prompt::Ids(ids),
                Input::Text(text) => Prompt::Text(text),
                Input::Say(text) => {
                    chat.push(Message { role: "user".into(), content: text.clone() });
                    Prompt::Chat(&chat)
                }
            };
            let request = self.backend.prepare(&prompt, turn.max_tokens);
            let mut record = self.ask(&turn, request, due, released).await;
            self.show(&record);
            due = record.ended + self.think;
            let text = if self.keep_texts { record.text.clone() } else { std::mem::take(&mut record.text) };
            chat.push(Message { role: "assistant".into(), content: text });
            records.push(record);
        }
        records
    }

    /// One request, from its permit to its end.
    async fn ask(&self, turn: &Turn, request: Prepared<'_>, due: Duration, released: Duration) -> Record {
        let mut record = Record { released, ..Record::unsent(due, turn, Outcome::Interrupted) };
        let permit = async {
            match &self.permits {
                Some(permits) => permits.acquire().await.ok(),
                None => None,
            }
        };
        let _permit = tokio::select! {
            biased;
            () = self.stop.signaled() => {
                record.ended = self.now();
                return record;
            }
            permit = permit => permit,
        };
        let mut answer = Answer::default();
        record.sent = Some(self.now());
        record.outcome = tokio::select! {
            biased;
            () = self.stop.signaled() => Outcome::Interrupted,
            asked = tokio::time::timeout(self.backend.request_timeout, request.ask(&mut answer)) => match asked {
                Ok(Ok(())) => Outcome::Completed,
                Ok(Err(failure)) => Outcome::Failed(failure),
                Err(_) => {
                    let seconds = self.backend.request_timeout.as_secs_f64();
                    Outcome::Failed(Failure::new(Kind::Timeout, format!("not answered within {seconds} s")))
                }
            },
        };
        record.ended = self.now();
        let arrived: u32 = answer.arrivals.iter().map(|(_, tokens)| tokens).sum();
        record.arrivals = answer.arrivals.iter().map(|&(at, tokens)| Arrival { at: at - self.begun, tokens }).collect();
        record.usage_told = answer.prompt_tokens.is_some() && answer.output_tokens.is_some();
        record.prompt_tokens = answer.prompt_tokens.unwrap_or(record.prompt_tokens);
        record.output_tokens = answer.output_tokens.unwrap_or(arrived as usize);
        record.text = answer.text;
        record
    }
}
