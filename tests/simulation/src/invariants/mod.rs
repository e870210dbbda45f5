//! What holds in every simulation, whatever went wrong: a file each.

mod ends_in_time;
mod in_turn;
mod no_wrong_error;
mod nobody_starves;
mod nothing_held;
mod retries_within_budget;
mod same_tokens;

use crate::world::Outcome;

/// What an invariant says of an outcome.
///
/// # Errors
/// How it is broken.
type Invariant = fn(&Outcome) -> Result<(), String>;

const ALL: [(&str, Invariant); 7] = [
    ("ends in time", ends_in_time::check),
    ("same tokens", same_tokens::check),
    ("no wrong error", no_wrong_error::check),
    ("in turn", in_turn::check),
    ("nobody starves", nobody_starves::check),
    ("retries within budget", retries_within_budget::check),
    ("nothing held", nothing_held::check),
];

/// Checks all of them.
///
/// # Errors
/// Those that are broken, a line each.
pub fn check(outcome: &Outcome) -> Result<(), String> {
    let broken: Vec<String> = ALL.iter().filter_map(|(name, check)| Some(format!("{name}: {}", check(outcome).err()?))).collect();
    if broken.is_empty() { Ok(()) } else { Err(broken.join("\n")) }
}
