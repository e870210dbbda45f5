//! Compiling guides where they do no harm: in processes that they may end.
//!
//! A worker is kept for the next guide as long as none has ended it. Dropping an [`Apart::compile`] ends the worker that is at it.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use overfill_types::{Code, ServiceError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::args::GuideArgs;
use crate::compiler::{Grammar, Tokens};
use crate::worker::{self, Opening, VARIABLE, Verdict};

/// Guides that are compiled at a time: that takes a core, and is not to take them all from those who compute.
const AT_ONCE: usize = 2;
/// How much longer than its share of a core a guide may take where cores are busy, and a worker to open a pair's tokens.
const BUSY: u32 = 10;
const OPENS: Duration = Duration::from_secs(20);
/// Workers of one guide that may end for a reason that is not it.
const TRIES: usize = 2;

/// Compiles guides of one pair in processes of their own.
pub(crate) struct Apart {
    program: PathBuf,
    opening: Opening,
    idle: Mutex<Vec<Worker>>,
    turns: Semaphore,
}

struct Worker {
    process: Child,
    asks: ChildStdin,
    says: ChildStdout,
}

impl Apart {
    /// No worker runs yet.
    pub(crate) fn new(args: &GuideArgs, tokens: Tokens) -> Self {
        let opening = Opening { tokens, time: args.time(), memory: args.guide_memory };
        Self { program: args.program(), opening, idle: Mutex::default(), turns: Semaphore::new(AT_ONCE) }
    }

    /// What comes of compiling a guide.
    ///
    /// # Errors
    /// [`Code::Unavailable`] where there is no worker to say it, or not in time.
    pub(crate) async fn compile(&self, grammar: &Grammar) -> Result<Verdict, ServiceError> {
        // It is closed never.
        let _turn = self.turns.acquire().await;
        let asked = worker::message(grammar).map_err(|e| unavailable(&e))?;
        for _ in 0..TRIES {
            let kept = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let mut worker = match kept {
                Some(worker) => worker,
                None => self.start().await.map_err(|e| unavailable(&e))?,
            };
            match timeout(self.opening.time * BUSY + OPENS, worker.ask(&asked)).await {
                Err(_) => return Err(unavailable(&"it was not done in time")),
                Ok(Ok(verdict)) => {
                    if !matches!(verdict, Verdict::Costs(_)) {
                        self.keep(worker);
                    }
                    return Ok(verdict);
                }
                Ok(Err(_)) => {
                    if let Some(why) = worker.process.wait().await.ok().and_then(blamed) {
                        return Ok(Verdict::Costs(why.to_owned()));
                    }
                }
            }
        }
        Err(unavailable(&"the processes that compile them end"))
    }

    async fn start(&self) -> io::Result<Worker> {
        if std::env::var_os(VARIABLE).is_some() {
            return Err(io::Error::other(format!("{VARIABLE} is set for a program that is none")));
        }
        let mut command = Command::new(&self.program);
        command.env(VARIABLE, "1").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let mut process = command.spawn()?;
        let (Some(asks), Some(says)) = (process.stdin.take(), process.stdout.take()) else { return Err(io::ErrorKind::BrokenPipe.into()) };
        let mut worker = Worker { process, asks, says };
        match timeout(OPENS, worker.ask(&worker::message(&self.opening)?)).await?? {
            Verdict::Good { .. } => Ok(worker),
            Verdict::Refused(why) | Verdict::Costs(why) => Err(io::Error::other(why)),
        }
    }

    /// One worker is kept where nobody waits.
    fn keep(&self, worker: Worker) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.is_empty() {
            idle.push(worker);
        }
    }
}

impl Worker {
    async fn ask(&mut self, message: &[u8]) -> io::Result<Verdict> {
        self.asks.write_all(message).await?;
        let mut head = [0; 4];
        self.says.read_exact(&mut head).await?;
        let mut json = vec![0; worker::length(head)?];
        self.says.read_exact(&mut json).await?;
        Ok(serde_json::from_slice(&json)?)
    }
}

/// What an end says of the guide that the worker was at; `None` where it says nothing.
fn blamed(end: ExitStatus) -> Option<&'static str> {
    // What no stack is deep enough for ends a process so, and an allocation that no machine has memory for.
    let signals = [libc::SIGSEGV, libc::SIGBUS, libc::SIGABRT, libc::SIGILL];
    end.signal()
        .filter(|signal| signals.contains(signal))
        .map(|_| "it is nested too deeply, or its parts refer to each other in too long a row: simplify it")
}

fn unavailable(why: &dyn std::fmt::Display) -> ServiceError {
    ServiceError::no_room(Code::Unavailable, format!("guides cannot be compiled here now: {why}; try again"))
}
