//! What reading and writing cost in seconds, fitted to lines that `overfill bench engine --json` prints.

use serde::Deserialize;

use crate::Unusable;

/// Seconds of reading a prompt of n tokens: `token * n + attention * n² / 2`, since each token attends to all before it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReadCost {
    /// Seconds a token.
    pub token: f64,
    /// Seconds a token and each token before it.
    pub attention: f64,
}

/// Seconds of a decode step: `step + sequence * sequences + context * tokens in all their caches`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepCost {
    /// Seconds of a step, however many take part: the weights are read once.
    pub step: f64,
    /// Seconds each sequence adds.
    pub sequence: f64,
    /// Seconds each token in the sequences' caches adds.
    pub context: f64,
}

/// What a machine of so many compute threads costs in time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OnThreads<C> {
    /// Compute threads of a node.
    pub threads: usize,
    /// With these.
    pub cost: C,
}

/// A line of `overfill bench engine --json`.
#[derive(Clone, Debug, Deserialize)]
struct Line {
    model: String,
    phase: Option<String>,
    /// Lines of a profile name a part and have no rate.
    tokens_per_second: Option<Rate>,
    batch: usize,
    context: usize,
    threads: usize,
    prompt_tokens: Option<usize>,
    new_tokens: Option<usize>,
}

#[derive(Clone, Debug, Deserialize)]
struct Rate {
    median: f64,
}

impl ReadCost {
    /// A constant rate, in tokens a second.
    pub fn of_rate(tokens_per_second: f64) -> Self {
        Self { token: 1.0 / tokens_per_second, attention: 0.0 }
    }

    /// Seconds of a prompt of so many tokens.
    pub fn seconds(&self, tokens: f64) -> f64 {
        self.token * tokens + self.attention * tokens * tokens / 2.0
    }

    /// Of all lines of `phase` prefill, for each number of threads.
    ///
    /// # Errors
    /// Where there are none, or they are of several models.
    pub fn measured(text: &str) -> Result<Vec<OnThreads<Self>>, Unusable> {
        each(text, "prefill", |lines| {
            let rows: Vec<([f64; 2], f64)> = lines
                .iter()
                .filter_map(|line| {
                    let tokens = line.prompt_tokens? as f64;
                    Some(([tokens, tokens * tokens / 2.0], tokens / line.rate()?))
                })
                .collect();
            let [token, attention] = fit(&rows)?;
            Some(Self { token, attention })
        })
    }
}

impl StepCost {
    /// Seconds of a step over so many sequences with so many tokens in their caches.
    pub fn seconds(&self, sequences: f64, tokens: f64) -> f64 {
        self.step + self.sequence * sequences + self.context * tokens
    }

    /// Of all lines of `phase` decode, for each number of threads.
    ///
    /// # Errors
    /// Where there are none, or they are of several models.
    pub fn measured(text: &str) -> Result<Vec<OnThreads<Self>>, Unusable> {
        each(text, "decode", |lines| {
            let rows: Vec<([f64; 3], f64)> = lines
                .iter()
                .filter_map(|line| {
                    let sequences = line.batch as f64;
                    // While it was measured the caches grew.
                    let context = line.context as f64 + line.new_tokens? as f64 / 2.0;
                    Some(([1.0, sequences, sequences * context], sequences / line.rate()?))
                })
                .collect();
            let [step, sequence, context] = fit(&rows)?;
            Some(Self { step, sequence, context })
        })
    }
}

impl Line {
    fn rate(&self) -> Option<f64> {
        self.tokens_per_second.as_ref().map(|rate| rate.median).filter(|rate| *rate > 0.0)
    }
}

/// A cost for each number of threads that was measured in a phase.
fn each<C>(text: &str, phase: &str, cost: impl Fn(&[Line]) -> Option<C>) -> Result<Vec<OnThreads<C>>, Unusable> {
    let mut lines: Vec<Line> = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let line: Line = serde_json::from_str(line)
            .map_err(|error| Unusable(format!("line {}: not what `overfill bench engine --json` prints: {error}", number + 1)))?;
        if line.phase.as_deref() == Some(phase) && line.rate().is_some() {
            lines.push(line);
        }
    }
    let Some(first) = lines.first() else {
        return Err(Unusable(format!("no line has the phase '{phase}': measure it with `overfill bench engine --phases {phase} --json`")));
    };
    if let Some(other) = lines.iter().find(|line| line.model != first.model) {
        let models = format!("{} and {}", first.model, other.model);
        return Err(Unusable(format!("two models were measured in the phase '{phase}', {models}: name one with --model")));
    }
    let mut threads: Vec<usize> = lines.iter().map(|line| line.threads).collect();
    threads.sort_unstable();
    threads.dedup();
    let of_threads = |threads: usize| {
        let of: Vec<Line> = lines.iter().filter(|line| line.threads == threads).cloned().collect();
        let cost = cost(&of).ok_or_else(|| {
            let why = "no cost follows from the lines: take them anew, by a version that writes prompt_tokens and new_tokens into them";
            Unusable(format!("phase '{phase}', {threads} threads: {why}"))
        })?;
        Ok(OnThreads { threads, cost })
    };
    threads.into_iter().map(of_threads).collect()
}

/// Coefficients, none below 0, with the least sum of squared relative errors. A column that would get less than 0, or that others
/// make up for, gets 0.
fn fit<const N: usize>(rows: &[([f64; N], f64)]) -> Option<[f64; N]> {
    let mut used: Vec<usize> = (0..N).collect();
    while !used.is_empty() {
        // Never more columns than rows tell apart.
        if let Some(solution) = solve(rows, &used) {
            match solution.iter().enumerate().filter(|(_, x)| **x < 0.0).min_by(|a, b| a.1.total_cmp(b.1)) {
                Some((worst, _)) => drop(used.remove(worst)),
                None => {
                    let mut all = [0.0; N];
                    used.iter().zip(solution).for_each(|(column, x)| all[*column] = x);
                    return Some(all);
                }
            }
        } else {
            used.pop();
        }
    }
    None
}

/// The normal equations of the columns that are used; `None` where they have no one solution.
fn solve<const N: usize>(rows: &[([f64; N], f64)], used: &[usize]) -> Option<Vec<f64>> {
    let n = used.len();
    let mut equations = vec![vec![0.0; n + 1]; n];
    for (values, measured) in rows {
        // Relative errors: a step of 3 ms and one of 60 ms are to be met alike.
        let relative: Vec<f64> = used.iter().map(|column| values[*column] / measured).collect();
        for (equation, left) in equations.iter_mut().zip(&relative) {
            equation.iter_mut().zip(relative.iter().chain([&1.0])).for_each(|(sum, right)| *sum += left * right);
        }
    }
    for pivot in 0..n {
        let largest = (pivot..n).max_by(|a, b| equations[*a][pivot].abs().total_cmp(&equations[*b][pivot].abs()))?;
        equations.swap(pivot, largest);
        let scale: f64 = rows.iter().map(|(values, measured)| (values[used[pivot]] / measured).powi(2)).sum();
        if equations[pivot][pivot].abs() <= 1e-9 * scale {
            return None;
        }
        let line = equations[pivot].clone();
        for (_, other) in equations.iter_mut().enumerate().filter(|(number, _)| *number != pivot) {
            let factor = other[pivot] / line[pivot];
            other.iter_mut().zip(&line).for_each(|(x, y)| *x -= factor * y);
        }
    }
    Some((0..n).map(|i| equations[i][n] / equations[i][i]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(phase: &str, batch: usize, context: usize, tokens: usize, rate: f64) -> String {
        let (prompt, new) = if phase == "prefill" { ("prompt_tokens", tokens) } else { ("new_tokens", tokens) };
        format!(
            r#"{{"engine":"overfill","model":"m","phase":"{phase}","batch":{batch},"context":{context},"threads":2,"{prompt}":{new},"tokens_per_second":{{"median":{rate},"min":1.0,"max":2.0}}}}"#
        )
    }

    #[test]
    fn what_was_put_in_comes_out() {
        let step = StepCost { step: 2e-3, sequence: 4e-4, context: 5e-7 };
        let mut text = String::new();
        for batch in [1, 8, 32] {
            for context in [64, 1024] {
                let seconds = step.seconds(batch as f64, batch as f64 * (context as f64 + 64.0));
                text += &(line("decode", batch, context, 128, batch as f64 / seconds) + "\n");
            }
        }
        let read = ReadCost { token: 4e-4, attention: 1e-8 };
        for tokens in [128, 512, 4096] {
            text += &(line("prefill", 1, 0, tokens, tokens as f64 / read.seconds(tokens as f64)) + "\n");
        }
        let [OnThreads { threads: 2, cost }] = StepCost::measured(&text).unwrap()[..] else { panic!() };
        for (got, put) in [(cost.step, step.step), (cost.sequence, step.sequence), (cost.context, step.context)] {
            assert!((got / put - 1.0).abs() < 1e-6, "{cost:?}");
        }
        let [OnThreads { cost, .. }] = ReadCost::measured(&text).unwrap()[..] else { panic!() };
        assert!((cost.token / read.token - 1.0).abs() < 1e-6 && (cost.attention / read.attention - 1.0).abs() < 1e-6, "{cost:?}");
    }

    #[test]
    fn few_lines_give_a_simpler_cost_and_none_an_error() {
        let one = line("prefill", 1, 0, 512, 2000.0);
        assert_eq!(ReadCost::measured(&one).unwrap()[0].cost, ReadCost { token: 5e-4, attention: 0.0 });
        let faster_when_longer = format!("{}\n{}", line("prefill", 1, 0, 128, 1000.0), line("prefill", 1, 0, 512, 2000.0));
        let cost = ReadCost::measured(&faster_when_longer).unwrap()[0].cost;
        assert!(cost.attention == 0.0 && cost.token > 5e-4 && cost.token < 1e-3, "{cost:?}");
        for (text, why) in [
            ("", "no line"),
            (one.as_str(), "no line has the phase 'decode'"),
            ("{}", "line 1"),
            (&line("decode", 1, 64, 128, 300.0).replace("new_tokens", "x"), "take them anew"),
            (
                &format!("{}\n{}", line("decode", 1, 64, 128, 300.0), line("decode", 8, 64, 128, 900.0).replace(r#""m""#, r#""n""#)),
                "m and n",
            ),
        ] {
            let error = StepCost::measured(text).unwrap_err();
            assert!(error.0.contains(why), "{text}: {error}");
        }
    }
}
