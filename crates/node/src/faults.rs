//! Faults that a test asks of an engine: it panics, hangs or aborts at a named point of its work.
//!
//! What an engine does when it fails is only known once it has failed, at each point, in a real process under load. The flag is
//! hidden from `--help`; without it a point costs a look at an empty list.

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What is asked of one engine. Clones share their counts.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Vec<Fault>>);

/// One fault: `POINT[@PROMPT][:COUNT]=panic|hang|abort`. PROMPT is how the digest of the prompts begins that are meant, in
/// hexadecimal digits, COUNT how often the point is passed before.
#[derive(Clone, Debug)]
pub struct Fault {
    point: String,
    prompt: String,
    before: u64,
    passed: Arc<AtomicU64>,
    does: Does,
}

#[derive(Clone, Copy, Debug)]
enum Does {
    Panic,
    Hang,
    Abort,
}

impl Faults {
    /// These.
    pub fn new(faults: Vec<Fault>) -> Self {
        Self(Arc::new(faults))
    }

    /// A point of the engine's own work.
    pub fn at(&self, point: &str) {
        self.of(point, Vec::new);
    }

    /// A point of the work on one prompt, whose digest `prompt` gives.
    pub fn of<D: AsRef<[u8]>>(&self, point: &str, prompt: impl Fn() -> D) {
        for fault in self.0.iter().filter(|fault| fault.point == point) {
            let meant = fault.prompt.is_empty() || digits(prompt().as_ref()).starts_with(&fault.prompt);
            if meant && fault.passed.fetch_add(1, Ordering::Relaxed) >= fault.before {
                fault.happen();
            }
        }
    }
}

fn digits(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Fault {
    #[expect(clippy::panic, reason = "it is what was asked for")]
    fn happen(&self) {
        match self.does {
            Does::Panic => panic!("a fault at '{}' was asked for", self.point),
            Does::Abort => std::process::abort(),
            Does::Hang => loop {
                std::thread::park();
            },
        }
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (place, does) = text.split_once('=').ok_or("POINT=ACTION is a fault")?;
        let does = match does {
            "panic" => Does::Panic,
            "hang" => Does::Hang,
            "abort" => Does::Abort,
            other => return Err(format!("'{other}' is no fault: panic, hang and abort are")),
        };
        let (place, before) = match place.split_once(':') {
            Some((place, count)) => (place, count.parse().map_err(|_| format!("'{count}' is no number of times"))?),
            None => (place, 0),
        };
        let (point, prompt) = place.split_once('@').unwrap_or((place, ""));
        Ok(Self { point: point.into(), prompt: prompt.into(), before, passed: Arc::default(), does })
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    fn happens(faults: &Faults, point: &str, prompt: &[u8]) -> bool {
        catch_unwind(AssertUnwindSafe(|| faults.of(point, || prompt))).is_err()
    }

    #[test]
    fn a_fault_happens_where_it_was_asked_for() {
        let faults = Faults::new(vec!["step@ab1:2=panic".parse().unwrap(), "turn=panic".parse().unwrap()]);
        assert!(!happens(&faults, "rows", &[0xab, 0x10]));
        let passes: Vec<bool> =
            [[0xab, 0x20], [0xab, 0x10], [0xab, 0x1f], [0xab, 0x10], [0xab, 0x10]].map(|p| happens(&faults, "step", &p)).into();
        assert_eq!(passes, [false, false, false, true, true]);
        assert!(happens(&faults, "turn", &[]) && !happens(&Faults::default(), "turn", &[]));
        for malformed in ["step", "step=stop", "step:x=panic"] {
            assert!(malformed.parse::<Fault>().is_err(), "{malformed}");
        }
    }
}
