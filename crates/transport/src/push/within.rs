//! The decode nodes of this very process: rows are handed to them as they are, through no socket.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use overfill_lifecycle::TraceHeaders;
use overfill_proto::v1::{KvFrame, PushSummary};
use overfill_types::ServiceError;
use tokio_stream::Stream;

/// Frames of one handoff, on their way.
pub type Frames = Pin<Box<dyn Stream<Item = KvFrame> + Send>>;
/// One handoff as it is taken; dropped, it ends as if its connection broke.
pub type Taken = Pin<Box<dyn Future<Output = Result<PushSummary, ServiceError>> + Send>>;

/// What takes handoffs: a decode node.
pub trait Takes: Send + Sync {
    /// Takes one, and is through when it has verified all of it.
    fn take(self: Arc<Self>, frames: Frames, trace: TraceHeaders) -> Taken;
}

/// Those of one process, by the addresses that they listen at. Clones share them.
#[derive(Clone, Default)]
pub struct Within(Arc<Mutex<HashMap<String, Arc<dyn Takes>>>>);

/// A node is handed over to within its process as long as this is kept.
#[must_use = "dropping it makes the node one as any other"]
pub struct Open {
    within: Within,
    address: String,
}

impl Within {
    /// Hands over to `node` whatever goes to `address`.
    pub fn open(&self, address: &str, node: Arc<dyn Takes>) -> Open {
        self.lock().insert(address.to_owned(), node);
        Open { within: self.clone(), address: address.to_owned() }
    }

    /// The node of this process that is known by `address`.
    pub(super) fn at(&self, address: &str) -> Option<Arc<dyn Takes>> {
        self.lock().get(address).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<dyn Takes>>> {
        // A map of handles is whole whatever panicked beside it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.within.lock().remove(&self.address);
    }
}
