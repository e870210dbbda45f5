//! The answers of one request side by side.
//!
//! Answers to the same prompt begin one after the other: the first alone until its prompt is read, so that the others find it
//! in the prefill node's cache and it is read once.

use std::sync::Arc;

use overfill_types::ServiceError;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use crate::Router;
use crate::admission::ValidRequest;
use crate::relay::{self, Event};

/// Events of all answers that wait for a slow client.
const EVENTS: usize = 64;
/// Answers of one request that are written at a time, so that a request with many leaves room for others.
const AT_ONCE: usize = 32;

/// Events, each with the number of its answer. Dropping it ends all of them.
pub(crate) type NumberedEvents = mpsc::Receiver<(usize, Result<Event, ServiceError>)>;

/// Starts the answers to `requests`, of which each `n` are to the same prompt.
pub(crate) fn start(router: &Arc<Router>, requests: Vec<ValidRequest>, n: usize) -> NumberedEvents {
    let (sender, events) = mpsc::channel(EVENTS);
    let turns = Arc::new(Semaphore::new(AT_ONCE));
    let mut read = CancellationToken::new();
    for (index, request) in requests.into_iter().enumerate() {
        let first = index % n == 0;
        if first {
            read = CancellationToken::new();
        }
        let (router, sender, turns, read) = (router.clone(), sender.clone(), turns.clone(), read.clone());
        // Owned by the events: each await ends when they are dropped.
        tokio::spawn(async move {
            let turn = async {
                if !first {
                    read.cancelled().await;
                }
                turns.acquire_owned().await
            };
            let _turn = tokio::select! {
                turn = turn => turn,
                () = sender.closed() => return,
            };
            // Whatever becomes of the first, the others begin.
            let mut begin_others = first.then(|| read.drop_guard());
            let mut answer = relay::start(router, request);
            while let Some(event) = answer.recv().await {
                begin_others.take();
                if sender.send((index, event)).await.is_err() {
                    return;
                }
            }
        });
    }
    events
}
