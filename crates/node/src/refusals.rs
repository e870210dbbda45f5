//! The prompts that a node refuses, since engines died under them.

use std::sync::{Mutex, MutexGuard, PoisonError};

use overfill_types::{PromptDigest, Quarantine, ServiceError};
use tokio::time::Instant;

/// What a node knows of prompts under which engines died.
#[derive(Debug, Default)]
pub struct Refusals(Mutex<Quarantine>);

impl Refusals {
    /// Lets a prompt pass; `suspicion` is what its router knows against it.
    ///
    /// # Errors
    /// [`overfill_types::Code::Quarantined`] where engines have died under it.
    pub fn check(&self, prompt: &[u32], suspicion: u32) -> Result<(), ServiceError> {
        let mut known = self.lock();
        if suspicion == 0 && known.is_empty() {
            return Ok(());
        }
        let digest = overfill_types::prompt_digest(prompt);
        if suspicion > 0 {
            known.told(digest, suspicion, Instant::now().into_std());
        }
        known.check(&digest)
    }

    /// The prompts that are refused.
    pub fn refused(&self) -> Vec<PromptDigest> {
        self.lock().refused().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Quarantine> {
        // A map of numbers is whole whatever panicked beside it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
