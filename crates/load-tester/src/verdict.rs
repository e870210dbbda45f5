//! Whether a run went well: what the exit status says, which is what a pipeline goes by.

use anyhow::{bail, ensure};
use clap::Args;

use super::summary::{FailureCount, Summary};

/// Kinds of failures that are told with their first message.
const TOLD: usize = 3;

#[derive(Args)]
#[command(next_help_heading = "Verdict")]
pub(super) struct VerdictArgs {
    /// Part of the requests that may fail, 0 to 1: with more the exit status is 1. All of a run failing always is an error
    #[arg(long, env = "OVERFILL_BENCH_ALLOW_FAILURES", value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    allow_failures: f64,
}

fn share(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("it must be a number from 0 to 1".into()),
    }
}

impl VerdictArgs {
    /// # Errors
    /// Where more requests of a run failed than may, or none was answered; requests that were interrupted, by whoever ended the run,
    /// count for nothing.
    pub(super) fn on(&self, summary: &Summary) -> anyhow::Result<()> {
        let Summary { completed, failed, failures, .. } = summary;
        if *failed == 0 {
            return Ok(());
        }
        let why = reasons(failures);
        ensure!(*completed > 0, "no request was answered: all {failed} failed ({why})");
        let all = completed + failed;
        // The share was written in decimals: 0.1 of 30 is 3.
        let may = (self.allow_failures * all as f64 + 1e-9).floor();
        if *failed as f64 > may {
            bail!("{failed} of {all} requests failed, and {may} may (--allow-failures): {why}");
        }
        Ok(())
    }
}

/// The most frequent kinds, and what the first of each said.
fn reasons(failures: &[FailureCount]) -> String {
    let tell = |FailureCount { kind, count, first }: &FailureCount| match first.as_str() {
        "" => format!("{count} {kind}"),
        first => format!("{count} {kind}, {first}"),
    };
    let mut told: Vec<String> = failures.iter().take(TOLD).map(tell).collect();
    if let Some(more) = failures.len().checked_sub(TOLD).filter(|more| *more > 0) {
        told.push(format!("and {more} kinds more"));
    }
    told.join("; ")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::failure::{Failure, Kind};
    use crate::health::Health;
    use crate::load::Measured;
    use crate::record::tests::answered;
    use crate::record::{Outcome, Record};

    /// What is said of a run in which so many were answered, and these failed.
    fn verdict(allow_failures: f64, completed: usize, failed: &[Kind]) -> Result<(), String> {
        let one = answered(0, 0, &[(5, 1)], 1);
        let failure = |kind: &Kind| Record { outcome: Outcome::Failed(Failure::new(*kind, "no room")), ..one.clone() };
        let interrupted = Record { outcome: Outcome::Interrupted, ..one.clone() };
        let records = std::iter::repeat_n(one.clone(), completed).chain(failed.iter().map(failure)).chain([interrupted]).collect();
        let summary = Summary::of(&Measured { records, duration: Duration::from_secs(1), health: Health::default() }, None, false);
        VerdictArgs { allow_failures }.on(&summary).map_err(|e| e.to_string())
    }

    #[test]
    fn one_failure_is_one_too_many_unless_some_may_fail() {
        let three = [Kind::Http(503), Kind::Timeout, Kind::Http(503)];
        verdict(0.0, 27, &[]).unwrap();
        verdict(0.0, 0, &[]).unwrap();
        let said = verdict(0.0, 27, &three).unwrap_err();
        assert_eq!(said, "3 of 30 requests failed, and 0 may (--allow-failures): 2 http_503, no room; 1 timeout, no room");
        verdict(0.1, 27, &three).unwrap();
        assert!(verdict(0.1, 26, &three).is_err());
        // What answers nothing at all is not up.
        assert!(verdict(1.0, 0, &three).unwrap_err().starts_with("no request was answered: all 3 failed (2 http_503"));
        verdict(1.0, 1, &three).unwrap();
    }

    #[test]
    fn what_is_told_is_short() {
        let said = verdict(0.0, 1, &[Kind::Connect, Kind::Timeout, Kind::Empty, Kind::Malformed, Kind::BrokeOff]).unwrap_err();
        assert!(said.ends_with("; and 2 kinds more"), "{said}");
    }

    #[test]
    fn a_share_is_a_part() {
        assert_eq!(share("0.25"), Ok(0.25));
        for wrong in ["-0.1", "1.5", "NaN", "5%"] {
            assert!(share(wrong).is_err(), "{wrong}");
        }
    }
}
