//! The process that compiles guides apart: it reads them from its standard input and says of each what became of it.
//!
//! It may be ended by any of them. Whoever started it reads that from its end; what takes too long or too much it notices itself.
//! Each message is its length in four bytes, the lowest first, and JSON.

use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::thread::Builder;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::compiler::{Compiler, Grammar, Tokens};

/// The variable by which a program knows that it is to be a worker.
pub(crate) const VARIABLE: &str = "OVERFILL_GUIDE_WORKER";
/// Stack of the thread that compiles. What needs more, ends the process; where it is compiled again it has twice as much.
pub(crate) const STACK: usize = 16 << 20;
/// How often it is looked what a guide has taken so far.
const LOOK: Duration = Duration::from_millis(5);
/// Longest message: a guide, escaped.
const LONGEST: u32 = 2 << 20;

/// The first message.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Opening {
    pub(crate) tokens: Tokens,
    /// What compiling one guide may take of a core.
    pub(crate) time: Duration,
    /// And of memory, in bytes.
    pub(crate) memory: u64,
}

/// What is said of a guide, and of the opening.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Verdict {
    /// It can be followed; compiled it takes about so many bytes.
    Good { bytes: u64 },
    /// It cannot, as this says.
    Refused(String),
    /// The worker ends under it.
    Costs(String),
}

/// To be called first in a program that compiles guides: where it was started as a worker, this is all that it does.
pub fn run_if_asked() -> Option<ExitCode> {
    std::env::var_os(VARIABLE)?;
    // Whoever started it has gone, or says what is no message.
    let _ = run();
    Some(ExitCode::SUCCESS)
}

fn run() -> io::Result<()> {
    // It ends often, and in the middle of things: that is nothing to keep a picture of. It is also the first to go where the
    // machine has no memory left.
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    std::panic::set_hook(Box::new(|_| {}));
    let (mut asked, mut says) = (io::stdin().lock(), io::stdout().lock());
    let Opening { tokens, time, memory } = receive(&mut asked)?;
    let compiler = match Compiler::open(&tokens) {
        Ok(compiler) => Arc::new(compiler),
        Err(e) => return send(&mut says, &Verdict::Refused(e.message)),
    };
    send(&mut says, &Verdict::Good { bytes: 0 })?;
    loop {
        let verdict = bounded(&compiler, receive(&mut asked)?, time, memory)?;
        send(&mut says, &verdict)?;
        if matches!(verdict, Verdict::Costs(_)) {
            return Ok(());
        }
    }
}

/// Compiles a guide, and looks on.
///
/// # Errors
/// Where no thread can be started: that says nothing of the guide, and the worker ends.
fn bounded(compiler: &Arc<Compiler>, grammar: Grammar, time: Duration, memory: u64) -> io::Result<Verdict> {
    let before = Used::now();
    let (compiler, (tell, told)) = (compiler.clone(), mpsc::sync_channel(1));
    let compile = move || {
        let compiled = compiler.compile(&grammar);
        let bytes = Used::now().since(&before).memory;
        let _ = tell.send(match &compiled {
            Ok(_) => Verdict::Good { bytes },
            Err(e) => Verdict::Refused(e.message.clone()),
        });
    };
    Builder::new().stack_size(STACK).spawn(compile)?;
    loop {
        match told.recv_timeout(LOOK) {
            Ok(verdict) => return Ok(verdict),
            Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(Verdict::Refused("the compiler cannot deal with it".into())),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let used = Used::now().since(&before);
                if used.time > time {
                    return Ok(Verdict::Costs(format!(
                        "compiling it takes more than {} s of a core, which is the most: simplify it",
                        time.as_secs_f64()
                    )));
                }
                if used.memory > memory {
                    return Ok(Verdict::Costs(format!(
                        "compiling it takes more than {} MB of memory, which is the most: simplify it",
                        memory >> 20
                    )));
                }
            }
        }
    }
}

/// What this process has used.
#[derive(Clone, Copy)]
struct Used {
    /// Of any core.
    time: Duration,
    /// Resident, in bytes.
    memory: u64,
}

impl Used {
    fn now() -> Self {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        let time = Duration::try_from(time).unwrap_or(Duration::MAX);
        let resident = std::fs::read_to_string("/proc/self/statm").ok().and_then(|m| m.split(' ').nth(1)?.parse::<u64>().ok());
        Self { time, memory: resident.unwrap_or(0) * rustix::param::page_size() as u64 }
    }

    fn since(&self, before: &Self) -> Self {
        Self { time: self.time.saturating_sub(before.time), memory: self.memory.saturating_sub(before.memory) }
    }
}

/// The bytes of a message.
pub(crate) fn message(content: &impl Serialize) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(content)?;
    let length = u32::try_from(json.len()).ok().filter(|length| *length <= LONGEST).ok_or(io::ErrorKind::InvalidData)?;
    Ok([&length.to_le_bytes()[..], &json].concat())
}

/// The length of a message that begins so.
pub(crate) fn length(head: [u8; 4]) -> io::Result<usize> {
    Some(u32::from_le_bytes(head))
        .filter(|length| *length <= LONGEST)
        .map(|length| length as usize)
        .ok_or(io::ErrorKind::InvalidData.into())
}

fn send(to: &mut impl Write, content: &impl Serialize) -> io::Result<()> {
    to.write_all(&message(content)?)?;
    to.flush()
}

fn receive<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<T> {
    let mut head = [0; 4];
    from.read_exact(&mut head)?;
    let mut json = vec![0; length(head)?];
    from.read_exact(&mut json)?;
    Ok(serde_json::from_slice(&json)?)
}
