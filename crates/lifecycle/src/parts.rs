//! The parts that a server is made of, as one set: what it serves with, what it computes with, and what keeps it known.
//!
//! A part ends when the server has drained, never before. One that does (it failed, it panicked, or it just returned) leaves a
//! server that looks alive and does nothing, so the whole server ends then, and says why.
//!
//! **Invariant:** nothing that a server needs runs outside its set. Dropping the set ends every task of it.

use std::error::Error;
use std::thread::Builder;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use crate::drain::Drain;

/// Why a part ended.
type Cause = Box<dyn Error + Send + Sync>;

/// The parts of one server.
#[derive(Default)]
pub struct Parts {
    running: JoinSet<Ended>,
}

/// The part that ended, and how.
struct Ended {
    part: &'static str,
    how: Result<(), Cause>,
}

/// A part that ended before it was asked to.
#[derive(Debug, thiserror::Error)]
#[error("the {part} ended unasked")]
pub struct PartEnded {
    /// Which.
    pub part: &'static str,
    #[source]
    cause: Option<Cause>,
}

impl PartEnded {
    /// One that nothing more is known of.
    pub fn of(part: &'static str) -> Self {
        Self { part, cause: None }
    }

    /// Why, as a sentence; empty where that is not known.
    pub fn cause(&self) -> String {
        self.cause.as_ref().map(ToString::to_string).unwrap_or_default()
    }
}

impl Parts {
    /// Runs a task as a part. Must be called inside a tokio runtime.
    pub fn task<E: Into<Cause> + Send + 'static>(
        &mut self,
        part: &'static str,
        task: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        // A task of its own, so that a panic in it is told of as one of this part.
        let task = AbortOnDropHandle::new(tokio::spawn(task));
        self.running.spawn(async move {
            let how = match task.await {
                Ok(how) => how.map_err(Into::into),
                Err(error) => Err(error.into()),
            };
            Ended { part, how }
        });
    }

    /// Runs a thread as a part. The set waits for its end, and does not end it: `run` is told otherwise. Must be called inside a
    /// tokio runtime.
    ///
    /// # Errors
    /// Where the system gives no thread.
    pub fn thread(&mut self, part: &'static str, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        let (ended, end) = oneshot::channel();
        Builder::new().name(part.into()).spawn(move || {
            run();
            // Not sent where it panics: dropped, which tells as much.
            let _ = ended.send(());
        })?;
        self.running.spawn(async move { Ended { part, how: end.await.map_err(|_| "it panicked".into()) } });
        Ok(())
    }

    /// Waits until `drain` is given.
    ///
    /// # Errors
    /// Where a part ended before.
    pub async fn until(&mut self, drain: &Drain) -> Result<(), PartEnded> {
        tokio::select! {
            biased;
            () = drain.signaled() => Ok(()),
            ended = self.ended() => Err(ended),
        }
    }

    /// The first part that ends, however it does.
    pub async fn ended(&mut self) -> PartEnded {
        loop {
            match self.running.join_next().await {
                Some(Ok(Ended { part, how })) => return PartEnded { part, cause: how.err() },
                // Only waits for others: it cannot panic.
                Some(Err(_)) => {}
                None => std::future::pending().await,
            }
        }
    }

    /// Waits until all parts have ended, which they have been asked to, at most `limit`; then ends what is left.
    ///
    /// # Errors
    /// Where one failed at its end.
    pub async fn finish(mut self, limit: Duration) -> Result<(), PartEnded> {
        let all = async {
            while let Some(ended) = self.running.join_next().await {
                if let Ok(Ended { part, how: Err(cause) }) = ended {
                    return Err(PartEnded { part, cause: Some(cause) });
                }
            }
            Ok(())
        };
        timeout(limit, all).await.unwrap_or_else(|_| {
            tracing::warn!(?limit, "parts of this server did not end in time: they are broken off");
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn message(ended: &PartEnded) -> String {
        format!("{ended}: {}", ended.cause())
    }

    #[tokio::test]
    async fn a_part_that_ends_is_noticed_however_it_does() {
        let parts = || {
            let mut parts = Parts::default();
            parts.task("server", std::future::pending::<Result<(), std::io::Error>>());
            parts
        };
        let drain = Drain::new();

        let mut failing = parts();
        failing.task("follower", async { Err(std::io::Error::other("no socket")) });
        assert_eq!(message(&failing.until(&drain).await.unwrap_err()), "the follower ended unasked: no socket");

        let mut panicking = parts();
        panicking.task("follower", async { if true { panic!("no") } else { Ok::<(), std::io::Error>(()) } });
        assert!(message(&panicking.until(&drain).await.unwrap_err()).contains("panic"));

        let mut returning = parts();
        returning.task("follower", async { Ok::<(), std::io::Error>(()) });
        assert_eq!(message(&returning.until(&drain).await.unwrap_err()), "the follower ended unasked: ");

        let mut thread = parts();
        thread.thread("engine", || panic!("no")).unwrap();
        assert_eq!(message(&thread.until(&drain).await.unwrap_err()), "the engine ended unasked: it panicked");
    }

    #[tokio::test]
    async fn all_are_waited_for_at_the_end_and_dropped_with_the_set() {
        let (drain, end) = (Drain::new(), Drain::new());
        let mut parts = Parts::default();
        let told = end.clone();
        parts.task("server", async move {
            told.signaled().await;
            Ok::<(), std::io::Error>(())
        });
        drain.start();
        parts.until(&drain).await.unwrap();
        end.start();
        parts.finish(SECOND).await.unwrap();

        let held = Arc::new(());
        let mut parts = Parts::default();
        let holds = held.clone();
        parts.task("server", async move {
            let _holds = holds;
            std::future::pending::<Result<(), std::io::Error>>().await
        });
        parts.finish(Duration::from_millis(1)).await.unwrap();
        tokio::time::timeout(SECOND, async {
            while Arc::strong_count(&held) > 1 {
                tokio::task::yield_now().await;
            }
        })
        .await
        .unwrap();
    }
}
