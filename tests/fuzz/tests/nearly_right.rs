//! A few thousand inputs of each kind; `overfill-fuzz` reads more.

use std::time::Duration;

use overfill_fuzz::{run, targets};

/// Inputs that every run of the tests reads.
const INPUTS: u64 = 3000;
/// No target takes longer, however slow the machine is.
const LIMIT: Duration = Duration::from_secs(10);

#[test]
fn everything_that_comes_from_outside_is_read_or_refused() {
    let mut failed = Vec::new();
    for mut target in targets::all() {
        match run(&mut *target, 0..INPUTS, LIMIT) {
            Ok(read) => println!("{}: {read} inputs", target.name()),
            Err(why) => failed.push(why),
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}
