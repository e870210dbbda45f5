//! One request's way through the cluster: both nodes are asked, their tokens become text, whatever fails is told once.
//!
//! `flow` knows what was written and what a failure means, without I/O; `driver` asks the nodes (`alone` where one model writes
//! all of an answer); `text` turns tokens into text; `budget` bounds further attempts over all requests.
//! An attempt that fails is followed by another one, which goes on after the last token: the client sees one answer.
//! Dropping the answer drops both nodes' streams, which ends everything there.

mod alone;
mod budget;
mod driver;
mod flow;
mod text;

use std::sync::Arc;
use std::time::Duration;

use overfill_proto::v1::{ServedBy, Token, TokenLogprob};
use overfill_types::{Blame, Code, FinishReason, Retry, ServiceError};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tracing::Instrument;

use crate::Router;
use crate::admission::ValidRequest;
pub(crate) use crate::relay::budget::RetryBudget;
use crate::relay::driver::Driver;

/// Events that wait for a slow client; what its nodes say then waits with their calls ([`crate::calls`]), which have room for it.
const EVENTS: usize = 64;

/// What happens to an answer. Small, since a request's channel has room for many: what comes once is boxed.
#[derive(Debug)]
pub(crate) enum Event {
    /// The prompt was read; always the first.
    PromptRead(Box<PromptRead>),
    /// New text and tokens.
    Delta { text: String, tokens: Vec<Token> },
    /// The end.
    Finished(Box<End>),
}

/// What is known once the prompt was read.
#[derive(Debug)]
pub(crate) struct PromptRead {
    /// Tokens of the prompt that were in the prefill node's cache.
    pub(crate) cached_tokens: u32,
    /// Of each token of the prompt but the first; empty where they were not asked for.
    pub(crate) prompt_logprobs: Vec<TokenLogprob>,
    /// Who serves the answer, unless a node is lost.
    pub(crate) served_by: ServedBy,
}

/// How an answer ended.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) reason: FinishReason,
    pub(crate) completion_tokens: usize,
    pub(crate) served_by: ServedBy,
    pub(crate) matched_stop: Option<String>,
}

/// An answer as it comes.
pub(crate) type Answer = mpsc::Receiver<Result<Event, ServiceError>>;

/// What a client is told of what its nodes could not do: that it may try again. What is wrong between our own processes has
/// codes that it could take for a fault of its request, such as that of a frame whose bits were changed on the way.
fn told(error: ServiceError) -> ServiceError {
    if error.retry == Retry::Never || matches!(error.code, Code::Internal | Code::Mismatch) && error.blame != Blame::Way {
        return error;
    }
    ServiceError::new(Code::Unavailable, error.message).retry_after(error.retry_after.unwrap_or(Duration::from_secs(1)))
}

/// Starts a request. It ends when the answer is dropped.
pub(crate) fn start(router: Arc<Router>, request: ValidRequest) -> Answer {
    let (sender, answer) = mpsc::channel(EVENTS);
    let span = request.trace.span().clone();
    // Owned by the answer.
    let task = async move {
        let (id, deadline) = (request.id.clone(), request.deadline);
        let gone = sender.clone();
        let mut driver = Driver::new(router, request, sender);
        let ended = tokio::select! {
            ended = driver.run() => ended,
            // Dropping the driver counts it.
            () = gone.closed() => return,
            () = sleep(deadline.saturating_duration_since(Instant::now())) => {
                Err(ServiceError::new(Code::DeadlineExceeded, "the request's time ran out: ask for fewer tokens, or give it a longer deadline"))
            }
        };
        let ended = ended.map_err(told).inspect_err(|error| driver.failed(error));
        // Before the client knows, so that it finds its place free.
        drop(driver);
        if let Err(error) = ended {
            tracing::info!(request = %id, code = %error.code, %error, "request failed");
            // A client that does not read gets its connection closed in the end; nothing is held for it here.
            let _ = timeout(Duration::from_secs(5), gone.send(Err(error))).await;
        }
    };
    // Boxed: a task of this size is copied when it begins and, whatever it gives, again when it ends.
    tokio::spawn(Box::pin(task).instrument(span));
    answer
}
