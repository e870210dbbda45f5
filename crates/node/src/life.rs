//! A node's life once it is loaded: ready when its engine is, known until it drains or fails, and ended.
//!
//! **Invariant:** a node that cannot go on does not look as if it could. When a part of it ends unasked, or its engine does no
//! step, it has told its calls (so that they go on elsewhere), is unready and withdrawn, and ends with an error, so that what
//! supervises it starts another.

use std::time::Duration;

use overfill_cluster::{Discovery, Registration};
use overfill_lifecycle::{PartEnded, Parts};
use overfill_transport::calls::Signals;
use overfill_transport::server::Health;
use overfill_types::{Code, NodeInfo, ServiceError};
use tokio::time::{sleep, timeout};

use crate::pulse::Pulse;

/// How often it is looked whether all sequences are finished.
const LOOK: Duration = Duration::from_millis(10);
/// How long parts get to end at the end.
const ENDING: Duration = Duration::from_secs(5);
/// How long a node that cannot go on takes to say so.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// What a node consists of, and how it is known.
pub struct Life<S, H> {
    /// Its engine, and what else was begun already.
    pub parts: Parts,
    /// Of its engine.
    pub pulse: Pulse,
    /// How long its engine may take for a step.
    pub step_timeout: Duration,
    /// What serves its peers until its calls are to end; begun when the engine is ready.
    pub server: S,
    /// Of its server.
    pub health: Health,
    /// Where it is to be found.
    pub discovery: Discovery,
    /// As what; `None` where nodes do not register.
    pub info: Option<NodeInfo>,
    /// What its calls go by.
    pub signals: Signals,
    /// How many sequences it holds.
    pub held: H,
    /// How long what comes is still taken at a drain: routers may have sent it before they knew.
    pub drain_delay: Duration,
    /// How long its sequences get to finish after that.
    pub drain_timeout: Duration,
}

impl<S, E, H> Life<S, H>
where
    S: Future<Output = Result<(), E>> + Send + 'static,
    E: std::error::Error + Send + Sync + 'static,
    H: Fn() -> usize,
{
    /// Serves until the node is drained.
    ///
    /// # Errors
    /// Where a part of it ended before, or its engine hangs.
    pub async fn run(self) -> Result<(), PartEnded> {
        let Self { mut parts, pulse, step_timeout, server, health, discovery, info, signals, held, drain_delay, drain_timeout } = self;
        parts.task("watchdog of the engine", pulse.clone().watch(step_timeout, signals.end.clone()));
        tokio::select! {
            () = pulse.begun() => {}
            ended = parts.until(&signals.drain) => return ended,
        }
        parts.task("gRPC server", server);
        health.set_ready(true).await;
        let mut registration = info.map(|info| discovery.register(info));
        let lost = async {
            match &mut registration {
                Some(registration) => registration.lost().await,
                None => std::future::pending().await,
            }
        };
        let lived = tokio::select! {
            lived = parts.until(&signals.drain) => lived,
            () = lost => Err(PartEnded::of("registration")),
        };
        health.set_ready(false).await;
        let ended = match lived {
            Err(ended) => ended,
            Ok(()) => {
                withdraw(registration.take()).await;
                let finished = async {
                    sleep(drain_delay).await;
                    signals.refuse.start();
                    timeout(drain_timeout, async {
                        while held() > 0 {
                            sleep(LOOK).await;
                        }
                    })
                    .await
                };
                // What it has still to do needs all of its parts.
                tokio::select! {
                    finished = finished => {
                        if finished.is_err() {
                            tracing::warn!(sequences = held(), "drain limit reached: the rest is broken off");
                        }
                        signals.end.start();
                        return parts.finish(ENDING).await;
                    }
                    ended = parts.ended() => ended,
                }
            }
        };
        tracing::error!(error = ended.to_string(), cause = ended.cause(), sequences = held(), "this node cannot go on: it ends");
        signals.fault.tell(ServiceError::of_node(Code::EngineLost, format!("{ended}: this node can not go on")));
        // What hangs is not waited for.
        let last_words = async { tokio::join!(withdraw(registration), sleep(LAST_WORDS)) };
        let _ = timeout(2 * LAST_WORDS, last_words).await;
        signals.end.start();
        Err(ended)
    }
}

async fn withdraw(registration: Option<Registration>) {
    if let Some(registration) = registration {
        registration.withdraw().await;
    }
}
