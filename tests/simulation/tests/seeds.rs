//! Whatever a seed lets go wrong, the invariants hold. `OVERFILL_SEEDS=A..B` names other seeds than those of every run.

use clap::Parser;
use overfill_simulation::{Cli, command, run};

#[test]
fn invariants_hold_whatever_goes_wrong() {
    let failed = run(Cli::parse_from(["seeds"]).seeds());
    let told: Vec<String> = failed.iter().take(3).map(|f| format!("seed {}: {}\nrepeat it: {}", f.seed, f.why, command(f.seed))).collect();
    assert!(failed.is_empty(), "{} seeds failed, among them\n{}", failed.len(), told.join("\n\n"));
}
