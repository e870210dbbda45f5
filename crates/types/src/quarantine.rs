//! Prompts under which engines died: at the third time they are refused.
//!
//! A node whose engine dies under a prompt cannot remember it. So the router that sent it does, and says so to each node that it
//! asks next; nodes tell all routers which prompts they refuse. A prompt is named by its digest alone.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::error::{Code, ServiceError};
use crate::prompt::{PromptDigest, short};

/// What an engine that died speaks against a prompt.
pub const DIED: u32 = 3;
/// What a node that was lost does: more often than not something else has ended it.
pub const LOST: u32 = 2;
/// Beyond it a prompt is refused: two engines have died, or three nodes were lost.
const REFUSED: u32 = 2 * DIED;
/// Prompts that are remembered; the oldest are forgotten first.
const REMEMBERED: usize = 1024;
/// How long a prompt is remembered.
const FOR: Duration = Duration::from_secs(3600);

/// What speaks against prompts, as far as one process knows.
#[derive(Debug, Default)]
pub struct Quarantine {
    known: HashMap<PromptDigest, Known>,
    /// As they came.
    order: VecDeque<(PromptDigest, Instant)>,
}

#[derive(Debug)]
struct Known {
    suspicion: u32,
    since: Instant,
}

impl Quarantine {
    /// Whether nothing speaks against any prompt: then no digest needs to be made.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// More speaks against a prompt: [`DIED`] or [`LOST`].
    pub fn suspect(&mut self, prompt: PromptDigest, more: u32, now: Instant) {
        let suspicion = self.suspicion(&prompt).saturating_add(more);
        self.told(prompt, suspicion, now);
    }

    /// Another process says how much speaks against a prompt.
    pub fn told(&mut self, prompt: PromptDigest, suspicion: u32, now: Instant) {
        while self.order.front().is_some_and(|(_, since)| now.saturating_duration_since(*since) > FOR || self.order.len() >= REMEMBERED) {
            let Some((oldest, since)) = self.order.pop_front() else { break };
            // It may have come again since.
            if self.known.get(&oldest).is_some_and(|known| known.since == since) {
                self.known.remove(&oldest);
            }
        }
        let known = self.known.entry(prompt).or_insert_with(|| {
            self.order.push_back((prompt, now));
            Known { suspicion: 0, since: now }
        });
        known.suspicion = known.suspicion.max(suspicion).min(REFUSED);
    }

    /// Nothing speaks against a prompt after all: it was answered.
    pub fn clear(&mut self, prompt: &PromptDigest) {
        self.known.remove(prompt);
    }

    /// How much speaks against a prompt.
    pub fn suspicion(&self, prompt: &PromptDigest) -> u32 {
        self.known.get(prompt).map_or(0, |known| known.suspicion)
    }

    /// Lets a prompt pass.
    ///
    /// # Errors
    /// [`Code::Quarantined`] where engines have died under it.
    pub fn check(&self, prompt: &PromptDigest) -> Result<(), ServiceError> {
        if self.suspicion(prompt) < REFUSED {
            return Ok(());
        }
        let message = format!("engines died while they worked on this prompt ({}): it is refused for an hour", short(prompt));
        Err(ServiceError::new(Code::Quarantined, message))
    }

    /// The prompts that are refused.
    pub fn refused(&self) -> impl Iterator<Item = &PromptDigest> {
        self.known.iter().filter(|(_, known)| known.suspicion >= REFUSED).map(|(prompt, _)| prompt)
    }

    /// What [`Quarantine::refused`] prompts have against them: for [`Quarantine::told`].
    pub fn of_refused() -> u32 {
        REFUSED
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt_digest;

    #[test]
    fn a_prompt_is_refused_after_two_deaths_until_it_was_answered() {
        let (mut quarantine, now, prompt) = (Quarantine::default(), Instant::now(), prompt_digest(&[1, 2]));
        assert!(quarantine.is_empty());
        quarantine.suspect(prompt, DIED, now);
        assert!(quarantine.check(&prompt).is_ok() && quarantine.suspicion(&prompt) == DIED);
        quarantine.suspect(prompt, LOST, now);
        assert!(quarantine.check(&prompt).is_ok(), "a lost node is not a death");
        quarantine.suspect(prompt, DIED, now);
        assert_eq!(quarantine.check(&prompt).unwrap_err().code, Code::Quarantined);
        assert!(quarantine.refused().eq([&prompt]) && quarantine.check(&prompt_digest(&[1])).is_ok());

        let mut other = Quarantine::default();
        other.told(prompt, Quarantine::of_refused(), now);
        assert!(other.check(&prompt).is_err());
        other.clear(&prompt);
        assert!(other.check(&prompt).is_ok() && other.is_empty());
    }

    #[test]
    fn what_is_remembered_is_bounded_in_number_and_time() {
        let (mut quarantine, now) = (Quarantine::default(), Instant::now());
        for id in 0..3 * REMEMBERED as u32 {
            quarantine.suspect(prompt_digest(&[id]), DIED, now);
            // One that comes again and again, and one that goes and comes.
            quarantine.suspect(prompt_digest(&[0]), LOST, now);
            quarantine.clear(&prompt_digest(&[1]));
        }
        assert!(quarantine.known.len() <= REMEMBERED && quarantine.order.len() <= REMEMBERED);
        quarantine.suspect(prompt_digest(&[7]), DIED, now + FOR * 2);
        assert_eq!(quarantine.known.len(), 1);
    }
}
