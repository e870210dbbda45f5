//! Upper ends of histograms' buckets. Those of vLLM are vLLM's, so that its dashboards and alerts fit.

/// Seconds to the first token (vLLM's).
pub const TIME_TO_FIRST_TOKEN: &[f64] =
    &[0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0];
/// Seconds between tokens (vLLM's).
pub const INTER_TOKEN_LATENCY: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
/// Seconds of a whole request, or of a stage of it (vLLM's).
pub const REQUEST: &[f64] =
    &[0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0];
/// Seconds of what takes a part of a step, or a few: steps themselves, handoffs, reservations.
pub const SHORT: &[f64] = &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];
/// Sequences of a step.
pub const SEQUENCES: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// Tokens of a request: 1, 2 and 5 times each power of ten, up to `most` (vLLM's, for its `max_model_len`).
pub fn tokens(most: usize) -> Vec<f64> {
    let steps = (0..20).flat_map(|power| [1.0, 2.0, 5.0].map(|step: f64| step * 10f64.powi(power)));
    steps.take_while(|end| *end <= most as f64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_tokens_go_in_steps_of_one_two_and_five() {
        assert_eq!(tokens(120), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
        assert_eq!(tokens(8192).last(), Some(&5000.0));
    }
}
