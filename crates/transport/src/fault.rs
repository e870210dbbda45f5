//! Why a node can go on no more: told once, heard by all its calls.

use std::sync::Arc;

use overfill_types::ServiceError;
use tokio::sync::watch;

/// A node's fault, if it has one. Clones share it.
#[derive(Clone, Debug)]
pub struct Fault {
    told: Arc<watch::Sender<Option<ServiceError>>>,
}

impl Default for Fault {
    fn default() -> Self {
        Self { told: Arc::new(watch::Sender::new(None)) }
    }
}

impl Fault {
    /// The node ends because of `error`.
    pub fn tell(&self, error: ServiceError) {
        self.told.send_replace(Some(error));
    }

    /// What was told.
    pub fn told(&self) -> Option<ServiceError> {
        self.told.borrow().clone()
    }

    /// Waits until it is told.
    pub async fn happened(&self) -> ServiceError {
        let mut told = self.told.subscribe();
        match told.wait_for(Option::is_some).await.map(|told| told.clone()) {
            Ok(Some(error)) => error,
            // Not while this handle is there.
            _ => std::future::pending().await,
        }
    }
}
