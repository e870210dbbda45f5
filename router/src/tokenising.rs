//! Where text becomes tokens: a short one at once, a long one beside the threads that serve, since it would hold up all other requests.

use overfill_types::{Code, ServiceError};
use tokio::sync::Semaphore;

/// Bytes of a text that takes a few milliseconds, at one or two megabytes a second.
const SHORT: usize = 4096;
/// Long texts at once; others wait. More would only share the same cores.
const AT_ONCE: usize = 4;

/// Whose turn it is to tokenise a long text.
#[derive(Debug)]
pub(crate) struct Tokenising {
    turns: Semaphore,
}

impl Default for Tokenising {
    fn default() -> Self {
        Self { turns: Semaphore::new(AT_ONCE) }
    }
}

impl Tokenising {
    /// What `work` makes of a text of so many bytes.
    ///
    /// # Errors
    /// Those of `work`; [`Code::Internal`] where it panics.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> Result<T, ServiceError> + Send + 'static,
    ) -> Result<T, ServiceError> {
        if bytes <= SHORT {
            return work();
        }
        // It is closed never.
        let _turn = self.turns.acquire().await;
        let done = tokio::task::spawn_blocking(work).await;
        done.unwrap_or_else(|_| Err(ServiceError::new(Code::Internal, "tokenising the text panicked")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_long_text_holds_nobody_up() {
        let tokenising = Tokenising::default();
        let here = std::thread::current().id();
        let thread = || Ok(std::thread::current().id());
        assert_eq!(tokenising.run(SHORT, thread).await.unwrap(), here);
        assert_ne!(tokenising.run(SHORT + 1, thread).await.unwrap(), here);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_panic_is_an_error_and_its_turn_is_given_back() {
        let tokenising = Tokenising::default();
        for _ in 0..2 * AT_ONCE {
            let error = tokenising.run::<()>(SHORT + 1, || panic!("a text that no tokenizer takes")).await.unwrap_err();
            assert_eq!(error.code, Code::Internal);
        }
    }
}
