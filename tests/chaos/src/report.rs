//! What came of each scenario, as a table.

use std::fmt::Write;
use std::time::Duration;

use crate::load::Outcome;

/// What came of one scenario.
#[derive(Debug)]
pub struct Row {
    /// What was done.
    pub scenario: String,
    /// What came of the load.
    pub outcome: Outcome,
    /// From what was done until the last stream heard again that had fallen silent; zero where none had.
    pub recovery: Duration,
    /// What was held after the load's end.
    pub held: Vec<String>,
    /// Whether it is to be survived, and clients may lose connections under it.
    pub promised: bool,
    /// See [`Fault::breaks_connections_of_clients`](crate::fault::Fault::breaks_connections_of_clients).
    pub breaks_connections: bool,
}

impl Row {
    /// Whether it is as it was promised.
    pub fn kept(&self) -> bool {
        let Self { outcome, held, .. } = self;
        let unbroken = outcome.broken_off.is_empty() || self.breaks_connections;
        outcome.wrong == 0 && held.is_empty() && (!self.promised || outcome.failed.is_empty() && unbroken)
    }

    /// As a line of the table.
    pub fn line(&self) -> String {
        let Self { scenario, outcome: Outcome { ok, wrong, failed, broken_off, longest_silence, .. }, recovery, held, .. } = self;
        let (silence, recovery) = (longest_silence.as_secs_f64(), recovery.as_secs_f64());
        let (failed, broken_off, held) = (failed.len(), broken_off.len(), held.len());
        format!("| {scenario} | {ok} | {failed} | {wrong} | {broken_off} | {silence:.1} | {recovery:.1} | {held} |")
    }

    /// Why requests failed, each reason once.
    pub fn reasons(&self) -> String {
        let mut reasons: Vec<&String> = self.outcome.failed.iter().chain(&self.held).collect();
        if !self.breaks_connections {
            reasons.extend(&self.outcome.broken_off);
        }
        reasons.sort_unstable();
        reasons.dedup();
        let mut text = String::new();
        for reason in reasons.into_iter().take(5) {
            // A text grows without failing.
            let _ = writeln!(text, "  {reason}");
        }
        text
    }
}

/// What stands over the lines.
pub const HEADER: &str =
    "| scenario | ok | failed | wrong | broken off | longest silence, s | recovery, s | held |\n|---|---|---|---|---|---|---|---|";
