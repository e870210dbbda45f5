//! Cores that a prefill and a decode engine share: they compute in turns.
//!
//! Two engines that compute at once on the same cores halve each other, and a decode step over two or three sequences costs
//! nearly what one over sixteen does. So whoever computes has the turn, alone. Where both want it, each gets its part of the
//! time, as [`Prefer`] says: the one that has used less of its part goes first. A prefill engine gives way between two layers.
//! A small part lets sequences gather between two decode steps: fewer steps write the same tokens, which leaves more for
//! prompts. Whoever is alone gets all.

mod board;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::{Args, ValueEnum};
use overfill_types::Role;

use board::KindWords;

pub use board::Board;

/// How far one is behind the other at most, in slices of the other's: what was not used is not saved up.
const BEHIND: f64 = 1.0;
/// An engine that says so waits; it says it anew at least this often.
const SAYS: Duration = Duration::from_millis(20);
/// After so long without it, it is gone.
const SILENT: u64 = 4 * SAYS.as_nanos() as u64;
/// How long one whose turn it is gets to take it, before it is looked again whether it waits.
const TAKES: Duration = Duration::from_micros(200);
/// How long another's slice lasts before its process is taken for dead or stopped: so many slices as they were, but within these.
const STUCK: (Duration, u32, Duration) = (Duration::from_millis(500), 8, Duration::from_secs(10));
/// An engine that computed within this time still does.
const RECENT: u64 = 200_000_000;
/// Fewest tokens of a chunk that is made short so that decode steps come in time: with fewer, weights are read again too often.
const LEAST_CHUNK: usize = 32;
/// What is left of an earlier slice's weight in a mean after another one.
const KEPT: f64 = 0.9;

/// What matters most where prefill and decode share cores: each is a part of the time for decode, while prompts wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Prefer {
    /// Prompts are read first; tokens of running answers come slowly meanwhile
    Ttft,
    /// Running answers go on nearly as fast as if no prompt came
    Itl,
    /// Most requests a second: answers gather into large decode batches
    Throughput,
    /// Between these
    #[default]
    Balanced,
}

impl Prefer {
    /// Decode's part of the time.
    fn decode(self) -> f64 {
        match self {
            Self::Ttft => 0.1,
            Self::Throughput => 0.2,
            Self::Balanced => 0.25,
            Self::Itl => 0.67,
        }
    }
}

/// Whether a node shares its cores, and how.
#[derive(Args, Clone, Debug, Default)]
pub struct CoreArgs {
    /// The nodes of this machine that name the same file compute in turns: for a prefill and a decode node on the same cores. It
    /// is made where it is not there [default: cores are this node's]
    #[arg(long, env = "OVERFILL_SHARE_CORES", value_name = "FILE")]
    pub share_cores: Option<PathBuf>,
    /// What matters most where cores are shared
    #[arg(long, value_enum, env = "OVERFILL_PREFER", default_value = "balanced")]
    pub prefer: Prefer,
    /// What engines of this process share.
    #[arg(skip)]
    pub board: Option<Board>,
}

/// A file that cores cannot be shared by.
#[derive(Debug, thiserror::Error)]
#[error("--share-cores {path}: {source}")]
pub struct CoresError {
    path: String,
    source: std::io::Error,
}

/// An engine's part of the cores.
#[derive(Clone, Debug)]
pub struct Cores {
    /// `None` where they are its own.
    board: Option<Board>,
    own: usize,
    /// This engine, as it stands on the board.
    id: u32,
    /// Its part of the time, where another one wants it too.
    part: f64,
}

/// The turn; given back when it is dropped.
#[derive(Debug)]
pub struct Turn {
    cores: Cores,
    /// Since when, or since it last gave way.
    begun: u64,
    /// Tokens that it computes.
    tokens: usize,
}

/// Nanoseconds of the machine's clock: the same in all its processes.
fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Whether `at` was in the last `span` nanoseconds. A file may outlive the clock that it was written by.
fn lately(at: u64, span: u64) -> bool {
    at > 0 && now().checked_sub(at).is_some_and(|passed| passed < span)
}

/// What one is taken to have used at least, if the other has `part` of the time.
fn least(other: &KindWords, part: f64) -> u64 {
    let behind = BEHIND * other.slice.load(Ordering::Relaxed) as f64 / part;
    other.used.load(Ordering::Relaxed).saturating_sub(behind as u64)
}

impl Cores {
    /// Of the engine of a node of that role.
    ///
    /// # Errors
    /// Where the file cannot be had.
    pub fn new(args: &CoreArgs, role: Role) -> Result<Self, CoresError> {
        let board = match (&args.board, &args.share_cores) {
            (Some(board), _) => Some(board.clone()),
            (None, Some(path)) => Some(Board::at(path).map_err(|source| CoresError { path: path.display().to_string(), source })?),
            (None, None) => None,
        };
        let (own, part) = match role {
            Role::Prefill => (0, 1.0 - args.prefer.decode()),
            Role::Decode => (1, args.prefer.decode()),
        };
        Ok(Self { board, own, id: uuid::Uuid::new_v4().as_u128() as u32 | 1, part })
    }

    /// Waits for the turn to compute `tokens`. Where cores are not shared it is always there.
    ///
    /// Whoever has it may have died: after a while it is taken away.
    pub fn turn(&self, tokens: usize) -> Turn {
        if let Some(board) = &self.board {
            self.take(board);
        }
        Turn { cores: self.clone(), begun: now(), tokens }
    }

    fn take(&self, board: &Board) {
        let words = board.words();
        let other = &words.kinds[1 - self.own];
        let own = &words.kinds[self.own];
        let (mut seen, mut since) = (0, now());
        loop {
            own.waits.store(now(), Ordering::Release);
            let turn = words.turn.load(Ordering::Acquire);
            if turn == 0 {
                if !self.goes_after(board) {
                    if words.turn.compare_exchange(0, self.id, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                        break;
                    }
                    continue;
                }
                board.wait(0, TAKES);
                continue;
            }
            if turn != seen {
                (seen, since) = (turn, now());
            }
            // It may keep the turn for many slices, and tells the end of each.
            let told = words.kinds.each_ref().map(|kind| kind.ended.load(Ordering::Relaxed)).into_iter().filter(|at| *at <= now()).max();
            since = since.max(told.unwrap_or(0));
            // Whoever has it may be of this kind too.
            let longest = words.kinds.each_ref().map(|kind| kind.slice.load(Ordering::Relaxed)).into_iter().max().unwrap_or(0);
            // One that was stopped in its slice counts as a very long one.
            let stuck = Duration::from_nanos(longest).saturating_mul(STUCK.1).clamp(STUCK.0, STUCK.2);
            if u128::from(now() - since) > stuck.as_nanos()
                && words.turn.compare_exchange(turn, self.id, Ordering::AcqRel, Ordering::Relaxed).is_ok()
            {
                tracing::warn!("a process that shares these cores holds its turn for {stuck:?}: this one goes on without it");
                break;
            }
            board.wait(turn, SAYS);
        }
        own.waits.store(0, Ordering::Release);
        own.used.fetch_max(least(other, 1.0 - self.part), Ordering::Relaxed);
    }

    /// Whether the other kind waits and has used less of its part.
    fn goes_after(&self, board: &Board) -> bool {
        let words = board.words();
        let (own, other) = (&words.kinds[self.own], &words.kinds[1 - self.own]);
        let used = [own, other].map(|kind| kind.used.load(Ordering::Relaxed));
        let counts = [used[0].max(least(other, 1.0 - self.part)), used[1].max(least(own, self.part))];
        lately(other.waits.load(Ordering::Acquire), SILENT) && counts[1] < counts[0]
    }

    /// Most tokens of a prefill chunk, `most` as long as nobody decodes: else as many as pass through a layer while decode steps,
    /// which come between two layers, may keep each other waiting.
    pub fn chunk(&self, most: usize) -> usize {
        let Some(board) = &self.board else { return most };
        let (own, other) = (&board.words().kinds[self.own], &board.words().kinds[1 - self.own]);
        let [token, step] = [&own.token, &other.slice].map(|mean| mean.load(Ordering::Relaxed) as f64);
        let gap = step * self.part / (1.0 - self.part);
        if token == 0.0 || !lately(other.ended.load(Ordering::Relaxed), RECENT) {
            return most;
        }
        ((gap / token) as usize).clamp(LEAST_CHUNK.min(most), most)
    }
}

impl Turn {
    /// A slice is done: others have their turn now, if they wait and have used less of their part.
    pub fn give_way(&mut self) {
        let Some(board) = &self.cores.board else { return };
        self.account(board);
        if self.cores.goes_after(board) {
            board.free(self.cores.id);
            self.cores.take(board);
        }
        self.begun = now();
    }

    fn account(&self, board: &Board) {
        let (kind, ended) = (&board.words().kinds[self.cores.own], now());
        let took = ended.saturating_sub(self.begun);
        let note = |mean: &AtomicU64, now: f64| {
            let before = mean.load(Ordering::Relaxed) as f64;
            let after = if before == 0.0 { now } else { before * KEPT + now * (1.0 - KEPT) };
            mean.store(after as u64, Ordering::Relaxed);
        };
        kind.used.fetch_add((took as f64 / self.cores.part) as u64, Ordering::Relaxed);
        note(&kind.slice, took as f64);
        note(&kind.token, took as f64 / self.tokens.max(1) as f64);
        kind.ended.store(ended, Ordering::Relaxed);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(board) = &self.cores.board {
            self.account(board);
            board.free(self.cores.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread::{scope, sleep};
    use std::time::Instant;

    use super::*;

    fn cores(board: &Board, role: Role, prefer: Prefer) -> Cores {
        Cores::new(&CoreArgs { share_cores: None, prefer, board: Some(board.clone()) }, role).unwrap()
    }

    /// Has both compute as much as they may, prefill in slices of 6 ms and decode in steps of 2; gives decode's part of the time.
    fn decodes_part(board: [&Board; 2], prefer: Prefer) -> f64 {
        let (end, both) = (AtomicBool::new(false), AtomicBool::new(false));
        scope(|threads| {
            threads.spawn(|| {
                let cores = cores(board[0], Role::Prefill, prefer);
                while !end.load(Ordering::Relaxed) {
                    let mut turn = cores.turn(256);
                    for _ in 0..10 {
                        assert!(!both.swap(true, Ordering::SeqCst), "both compute");
                        sleep(Duration::from_millis(6));
                        both.store(false, Ordering::SeqCst);
                        turn.give_way();
                    }
                }
            });
            let decode = cores(board[1], Role::Decode, prefer);
            let (begun, mut computed) = (Instant::now(), Duration::ZERO);
            while begun.elapsed() < Duration::from_millis(600) {
                let _turn = decode.turn(1);
                assert!(!both.swap(true, Ordering::SeqCst), "both compute");
                let step = Instant::now();
                sleep(Duration::from_millis(2));
                computed += step.elapsed();
                both.store(false, Ordering::SeqCst);
            }
            end.store(true, Ordering::Relaxed);
            computed.as_secs_f64() / begun.elapsed().as_secs_f64()
        })
    }

    #[test]
    fn each_gets_its_part_of_the_time() {
        let parts = [Prefer::Ttft, Prefer::Balanced, Prefer::Itl].map(|prefer| {
            let board = Board::of_this_process().unwrap();
            decodes_part([&board, &board], prefer)
        });
        // Wide: other tests want the cores, and who is late for its turn does not get it.
        assert!(parts[0] < 0.2 && parts[0] < parts[1] && parts[1] < parts[2] && parts[2] > 0.35, "{parts:?}");
    }

    #[test]
    fn processes_share_by_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cores");
        let [one, two] = [(); 2].map(|()| Board::at(&path).unwrap());
        let part = decodes_part([&one, &two], Prefer::Balanced);
        assert!((0.05..0.45).contains(&part), "{part}");

        std::fs::write(&path, "something else").unwrap();
        let args = CoreArgs { share_cores: Some(path), ..CoreArgs::default() };
        let error = Cores::new(&args, Role::Decode).unwrap_err();
        assert!(error.to_string().contains("14 bytes"), "{error}");
    }

    #[test]
    fn whoever_is_alone_does_not_wait() {
        let board = Board::of_this_process().unwrap();
        let prefill = cores(&board, Role::Prefill, Prefer::Itl);
        drop(cores(&board, Role::Decode, Prefer::Itl).turn(1));
        let begun = Instant::now();
        for _ in 0..1000 {
            prefill.turn(1).give_way();
        }
        assert!(begun.elapsed() < TAKES * 1000, "{:?}", begun.elapsed());
        assert_eq!(Cores::new(&CoreArgs::default(), Role::Prefill).unwrap().chunk(256), 256);
    }

    #[test]
    fn a_turn_whose_process_died_is_taken_away() {
        let board = Board::of_this_process().unwrap();
        let (prefill, decode) = (cores(&board, Role::Prefill, Prefer::Itl), cores(&board, Role::Decode, Prefer::Itl));
        for waits in [&decode, &cores(&board, Role::Prefill, Prefer::Itl)] {
            std::mem::forget(prefill.turn(1));
            let begun = Instant::now();
            drop(waits.turn(1));
            assert!((STUCK.0..STUCK.0 * 4).contains(&begun.elapsed()), "{:?}", begun.elapsed());
        }
        // It waits as one that died in its wait would seem to.
        board.words().kinds[0].waits.store(now(), Ordering::Relaxed);
        board.words().kinds[1].used.fetch_add(1_000_000_000, Ordering::Relaxed);
        let begun = Instant::now();
        drop(decode.turn(1));
        assert!(begun.elapsed() < Duration::from_nanos(SILENT) * 3, "{:?}", begun.elapsed());
    }

    #[test]
    fn who_keeps_the_turn_for_many_slices_is_not_taken_for_dead() {
        let board = Board::of_this_process().unwrap();
        let words = board.words();
        // Decode steps of 90 ms: each puts decode behind by 810 ms of prefill.
        words.kinds[1].slice.store(90_000_000, Ordering::Relaxed);
        words.kinds[1].used.store(90_000_000 * 10, Ordering::Relaxed);
        let computes = AtomicBool::new(false);
        scope(|threads| {
            let mut turn = cores(&board, Role::Prefill, Prefer::Ttft).turn(256);
            let decode = threads.spawn(|| {
                let begun = Instant::now();
                let _turn = cores(&board, Role::Decode, Prefer::Ttft).turn(1);
                assert!(!computes.load(Ordering::SeqCst), "it was taken away");
                begun.elapsed()
            });
            while !decode.is_finished() {
                computes.store(true, Ordering::SeqCst);
                sleep(Duration::from_millis(5));
                computes.store(false, Ordering::SeqCst);
                turn.give_way();
            }
            assert!(decode.join().unwrap() > STUCK.0, "it had to wait");
        });
    }

    #[test]
    fn chunks_are_short_while_decode_steps_are_due() {
        let board = Board::of_this_process().unwrap();
        let words = board.words();
        // A layer takes 6 ms for 256 tokens, a decode step 2 ms.
        words.kinds[0].token.store(6_000_000 / 256, Ordering::Relaxed);
        words.kinds[1].slice.store(2_000_000, Ordering::Relaxed);
        let chunk = |prefer| cores(&board, Role::Prefill, prefer).chunk(256);
        assert_eq!(chunk(Prefer::Itl), 256, "nobody decodes");
        words.kinds[1].ended.store(now(), Ordering::Relaxed);
        assert_eq!([Prefer::Ttft, Prefer::Balanced, Prefer::Itl].map(chunk), [256, 256, 42]);
        words.kinds[1].ended.store(now() + 1_000_000_000_000, Ordering::Relaxed);
        assert_eq!(chunk(Prefer::Itl), 256, "of before the machine began anew");
    }
}
