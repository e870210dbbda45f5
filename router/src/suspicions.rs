//! The prompts that this router refuses, since engines died under them: counted here, and told by nodes that other routers asked.

use std::sync::{Mutex, MutexGuard, PoisonError};

use overfill_types::quarantine::{DIED, LOST};
use overfill_types::{Code, PromptDigest, Quarantine, ServiceError, prompt_digest};
use tokio::time::Instant;

/// What speaks against prompts, as far as this router knows.
#[derive(Debug, Default)]
pub(crate) struct Suspicions(Mutex<Quarantine>);

impl Suspicions {
    /// Lets a prompt pass.
    ///
    /// # Errors
    /// [`Code::Quarantined`] where engines have died under it.
    pub(crate) fn check(&self, prompt: &[u32]) -> Result<(), ServiceError> {
        self.digest(prompt).map_or(Ok(()), |digest| self.lock().check(&digest))
    }

    /// How much speaks against a prompt: for the nodes that are asked next.
    pub(crate) fn of(&self, prompt: &[u32]) -> u32 {
        self.digest(prompt).map_or(0, |digest| self.lock().suspicion(&digest))
    }

    /// An attempt at a prompt failed; `progress` if it had brought tokens since the last that did.
    pub(crate) fn failed(&self, prompt: &[u32], code: Code, progress: bool) {
        let more = match code {
            Code::EngineLost => DIED,
            Code::NodeLost => LOST,
            _ => return,
        };
        let digest = prompt_digest(prompt);
        let mut known = self.lock();
        // What goes on between two deaths is not what they were of.
        if progress {
            known.clear(&digest);
        }
        known.suspect(digest, more, Instant::now().into_std());
    }

    /// A prompt was answered.
    pub(crate) fn answered(&self, prompt: &[u32]) {
        if let Some(digest) = self.digest(prompt) {
            self.lock().clear(&digest);
        }
    }

    /// A node refuses these, whoever has told it.
    pub(crate) fn told<'a>(&self, refused: impl Iterator<Item = &'a [u8]>) {
        for prompt in refused.filter_map(|prompt| PromptDigest::try_from(prompt).ok()) {
            self.lock().told(prompt, Quarantine::of_refused(), Instant::now().into_std());
        }
    }

    /// The prompts that are refused.
    pub(crate) fn refused(&self) -> usize {
        self.lock().refused().count()
    }

    /// A prompt's digest, where anything is known of any. It is made without the lock: that is every request's.
    fn digest(&self, prompt: &[u32]) -> Option<PromptDigest> {
        let nothing = self.lock().is_empty();
        (!nothing).then(|| prompt_digest(prompt))
    }

    fn lock(&self) -> MutexGuard<'_, Quarantine> {
        // A map of numbers is whole whatever panicked beside it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
