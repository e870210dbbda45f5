//! How far a pull is: a bar on a terminal, a line each few seconds elsewhere, both on standard error.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Between two lines.
const EVERY: Duration = Duration::from_secs(5);

/// What is under way.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    what: String,
    total: u64,
    done: u64,
    /// What was there when it was begun.
    before: u64,
    begun: Instant,
    said: Instant,
}

impl Progress {
    /// Nothing yet.
    pub(crate) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            let style = ProgressStyle::with_template("{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
        let now = Instant::now();
        Self { bar, what: String::new(), total: 0, done: 0, before: 0, begun: now, said: now }
    }

    /// Something else is under way, of so many bytes, of which `done` are there.
    pub(crate) fn begin(&mut self, what: String, total: u64, done: u64) {
        let now = Instant::now();
        (self.what, self.total, self.done, self.before, self.begun, self.said) = (what, total, done, done, now, now);
        if let Some(bar) = &self.bar {
            bar.set_message(self.what.clone());
            bar.set_length(total);
            bar.reset();
            bar.set_position(done);
        }
    }

    /// So many bytes are there.
    pub(crate) fn at(&mut self, done: u64) {
        // It was begun again.
        self.before = self.before.min(done);
        self.done = done;
        match &self.bar {
            Some(bar) => bar.set_position(done),
            None if self.said.elapsed() >= EVERY => {
                self.said = Instant::now();
                eprintln!("{}", self.line());
            }
            None => {}
        }
    }

    /// The bar goes.
    pub(crate) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn line(&self) -> String {
        let speed = (self.done - self.before) as f64 / self.begun.elapsed().as_secs_f64().max(1e-3);
        let percent = (self.done as f64 / self.total.max(1) as f64 * 100.0).floor();
        format!("{}: {} of {} ({percent} %), {}/s", self.what, size(self.done), size(self.total), size(speed as u64))
    }
}

/// Bytes as people read them, three digits of them.
pub(crate) fn size(bytes: u64) -> String {
    let (mut value, mut units) = (bytes as f64, ["B", "kB", "MB", "GB", "TB"].into_iter());
    let mut unit = units.next().unwrap_or_default();
    for next in units {
        if value < 999.5 {
            break;
        }
        (value, unit) = (value / 1000.0, next);
    }
    match unit {
        "B" => format!("{bytes} B"),
        _ if value < 9.995 => format!("{value:.2} {unit}"),
        _ if value < 99.95 => format!("{value:.1} {unit}"),
        _ => format!("{value:.0} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_at_a_glance() {
        for (bytes, said) in [(0, "0 B"), (999, "999 B"), (1_500, "1.50 kB"), (92_345_678, "92.3 MB"), (999_999_999, "1.00 GB")] {
            assert_eq!(size(bytes), said);
        }
    }

    #[test]
    fn a_line_says_how_far_it_is() {
        let mut progress = Progress::new();
        progress.begin("full.gguf".into(), 4_000_000, 1_000_000);
        progress.at(3_000_000);
        assert!(progress.line().starts_with("full.gguf: 3.00 MB of 4.00 MB (75 %), "), "{}", progress.line());
        progress.at(0);
        assert!(progress.line().ends_with(" (0 %), 0 B/s"), "what is begun again is no negative speed: {}", progress.line());
    }
}
