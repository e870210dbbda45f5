//! The way to the engine: what it is told, and how much of it may wait.

use std::sync::Arc;

use bytes::Bytes;
use overfill_nccl::GpuBytes;
use overfill_types::{Code, ServiceError, Ticket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::sequence::Sequence;

/// Commands on their way to the engine, which takes them all before each step. They are small, but for the rows.
const COMMANDS: usize = 64;
/// Frames that wait for the engine, of 4 MiB at most and 1 MiB as they are sent: enough that it never waits for the network
/// between two, and little memory. Their senders wait.
const FRAMES: usize = 8;

/// What the engine is told.
pub(crate) enum Command {
    /// A sequence waits for its KV cache.
    Admit(Box<Sequence>),
    /// The next of its handoff.
    Handoff(Ticket, Part),
    /// The handoff broke.
    Fail(Ticket, ServiceError),
}

#[cfg(test)]
impl Command {
    /// The handoff that broke, and why.
    pub(crate) fn failure(self) -> Option<(Ticket, ServiceError)> {
        match self {
            Self::Fail(ticket, error) => Some((ticket, error)),
            Self::Admit(_) | Self::Handoff(..) => None,
        }
    }
}

/// What a handoff consists of; it is taken in order.
pub(crate) enum Part {
    Rows(LayerRows, OwnedSemaphorePermit),
    /// The handoff is whole. Answered when the sequence runs, or with why it does not.
    Start {
        first: u32,
        answer: oneshot::Sender<Result<(), ServiceError>>,
    },
}

/// Checked rows of one layer.
pub(crate) struct LayerRows {
    pub(crate) layer: usize,
    pub(crate) start: usize,
    pub(crate) rows: Rows,
}

/// Keys and values, `[tokens, kv_heads, head_dim]` each, as they came.
pub(crate) enum Rows {
    /// Over the wire.
    Host { k: Bytes, v: Bytes },
    /// To a GPU's memory, keys before values.
    Gpu(GpuBytes),
}

/// The way to the engine. Each call waits until the engine has room for it; each error is that the node is stopping.
#[derive(Clone)]
pub(crate) struct Commands {
    sender: flume::Sender<Command>,
    frames: Arc<Semaphore>,
}

impl Commands {
    /// Both ends of it.
    pub(crate) fn new() -> (Self, flume::Receiver<Command>) {
        Self::bounded(COMMANDS)
    }

    /// The same, where `most` are on their way at a time.
    pub(crate) fn bounded(most: usize) -> (Self, flume::Receiver<Command>) {
        let (sender, commands) = flume::bounded(most);
        (Self { sender, frames: Arc::new(Semaphore::new(FRAMES)) }, commands)
    }

    /// A sequence waits for its KV cache.
    pub(crate) async fn admit(&self, sequence: Sequence) -> Result<(), ServiceError> {
        self.send(Command::Admit(Box::new(sequence))).await
    }

    /// A frame of its rows.
    pub(crate) async fn rows(&self, ticket: Ticket, rows: LayerRows) -> Result<(), ServiceError> {
        let permit = self.frames.clone().acquire_owned().await.map_err(|_| stopping())?;
        self.send(Command::Handoff(ticket, Part::Rows(rows, permit))).await
    }

    /// The handoff is whole, the full model's first token is `first`. Returns when the sequence runs, or why it does not.
    pub(crate) async fn start(&self, ticket: Ticket, first: u32) -> Result<(), ServiceError> {
        let (answer, answered) = oneshot::channel();
        self.send(Command::Handoff(ticket, Part::Start { first, answer })).await?;
        answered.await.map_err(|_| stopping())?
    }

    /// The handoff broke.
    pub(crate) async fn fail(&self, ticket: Ticket, error: ServiceError) -> Result<(), ServiceError> {
        self.send(Command::Fail(ticket, error)).await
    }

    async fn send(&self, command: Command) -> Result<(), ServiceError> {
        self.sender.send_async(command).await.map_err(|_| stopping())
    }
}

fn stopping() -> ServiceError {
    ServiceError::of_node(Code::Unavailable, "this decode node is stopping: try another")
}
