//! Failures in a row: one is a prompt's affair, several of different prompts are the engine's.

/// Different prompts that fail one after the other, nothing being done between them: then it is not them that are to blame.
const BROKEN: usize = 3;

/// The failures since something was done.
#[derive(Debug, Default)]
pub struct Streak {
    /// Digests of their prompts.
    prompts: Vec<[u8; 32]>,
}

impl Streak {
    /// Something was done.
    pub fn end(&mut self) {
        self.prompts.clear();
    }

    /// The work on this prompt failed. One that comes again and again is still one.
    pub fn failed(&mut self, prompt: [u8; 32]) {
        if !self.prompts.contains(&prompt) {
            self.prompts.push(prompt);
        }
    }

    /// Whether the engine is to blame.
    pub fn is_broken(&self) -> bool {
        self.prompts.len() >= BROKEN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_prompt_breaks_no_engine_and_three_do() {
        let mut streak = Streak::default();
        (0..100).for_each(|_| streak.failed([1; 32]));
        streak.failed([2; 32]);
        assert!(!streak.is_broken());
        streak.end();
        (0..2).for_each(|prompt| streak.failed([prompt; 32]));
        assert!(!streak.is_broken());
        streak.failed([2; 32]);
        assert!(streak.is_broken());
    }
}
