//! Inputs that are nearly right, against everything that reads what comes from outside: right ones are changed at random
//! ([`mutate`]), and read ([`targets`]).
//!
//! Nothing may panic, take longer than it should or more memory than is there, or be told to a client as a fault of the server's
//! own. It runs on the stable toolchain, so nothing guides it but chance and the seeds that it begins with.

pub mod mutate;
pub mod targets;

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::StdRng;

/// Longest that one input may take.
const SLOW: Duration = Duration::from_secs(10);

/// Something that reads inputs from outside.
pub trait Target {
    /// As it is called.
    fn name(&self) -> &'static str;

    /// Has one input read that `draws` gives.
    ///
    /// # Errors
    /// What is wrong with how it was read.
    fn read(&mut self, draws: &mut StdRng) -> Result<(), String>;
}

thread_local! {
    static LAST: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Keeps what is read, so that it can be told where reading it fails.
pub fn about_to_read(input: &[u8]) {
    LAST.with_borrow_mut(|last| {
        last.clear();
        last.push_str(&input.iter().take(4000).flat_map(|byte| byte.escape_ascii()).map(char::from).collect::<String>());
    });
}

/// Has `target` read one input after the other for so long; gives how many it has read.
///
/// # Errors
/// The seed of the first input that was not read as it should, and why.
pub fn run(target: &mut dyn Target, seeds: impl Iterator<Item = u64>, limit: Duration) -> Result<usize, String> {
    let begun = Instant::now();
    let mut read = 0;
    for seed in seeds {
        if begun.elapsed() > limit {
            break;
        }
        let one = Instant::now();
        let ended = catch_unwind(AssertUnwindSafe(|| target.read(&mut StdRng::seed_from_u64(seed))));
        let why = match ended {
            Ok(Ok(())) if one.elapsed() < SLOW => None,
            Ok(Ok(())) => Some(format!("it took {:?}", one.elapsed())),
            Ok(Err(why)) => Some(why),
            Err(_) => Some("it panicked".to_owned()),
        };
        if let Some(why) = why {
            let input = LAST.with_borrow(Clone::clone);
            return Err(format!(
                "{}, seed {seed}: {why}\nthe input was: {input}\nagain: overfill-fuzz {} --seed {seed}",
                target.name(),
                target.name()
            ));
        }
        read += 1;
    }
    Ok(read)
}
