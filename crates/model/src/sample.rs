//! Choosing a token from logits.

use std::cmp::Ordering;
use std::collections::HashMap;

use overfill_guide::Matcher;
use overfill_types::{SamplingParams, ServiceError, TokenLogprob, TopLogprob};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Its log-probability, if asked for.
    pub logprob: Option<TokenLogprob>,
}

/// A choice that depends on logits, temperature and filters alone; as in [`SamplingParams`].
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(any(feature = "cuda", test)), expect(dead_code, reason = "only a GPU is told more of it than that there is one"))]
pub(crate) struct Plain {
    pub(crate) temperature: f32,
    pub(crate) top_p: f32,
    pub(crate) top_k: u32,
    pub(crate) min_p: f32,
    /// In [0, 1): where in the weights of what the filters keep the token lies, in the order of ids.
    pub(crate) drawn: f64,
}

/// Chooses one sequence's tokens.
pub struct Sampler {
    params: SamplingParams,
    /// How often the answer holds each token; 0 for tokens of the prompt alone.
    seen: HashMap<u32, u32>,
    /// What the answer has to look like.
    guide: Option<Matcher>,
    /// The position after its last token, at most.
    end: usize,
}

impl Sampler {
    /// For a sequence with this prompt (the repetition penalty sees it).
    pub fn new(params: SamplingParams, prompt: &[u32]) -> Self {
        let seen = if params.repetition_penalty == 1.0 { HashMap::new() } else { prompt.iter().map(|&t| (t, 0)).collect() };
        Self { params, seen, guide: None, end: usize::MAX }
    }

    /// With the guide of the parameters, compiled, if they have one. The answer is to have the form that it asks for when it ends,
    /// at position `end` (prompt length + most tokens) at the latest.
    pub fn guided(self, guide: Option<Matcher>, end: usize) -> Self {
        Self { guide, end, ..self }
    }

    /// How the token for `position` is chosen, where that depends on nothing but the logits.
    pub(crate) fn plain(&self, position: usize) -> Option<Plain> {
        let SamplingParams { temperature, top_p, top_k, min_p, seed, .. } = self.params;
        let as_they_are = self.params.logit_bias.is_empty()
            && self.params.repetition_penalty == 1.0
            && self.params.presence_penalty == 0.0
            && self.params.frequency_penalty == 0.0;
        let drawn = if temperature == 0.0 { 0.0 } else { uniform(seed, position) };
        let plain = Plain { temperature, top_p, top_k, min_p, drawn };
        (as_they_are && self.guide.is_none() && self.params.logprobs.is_none()).then_some(plain)
    }

    /// Counts a token of the answer that was chosen elsewhere (the full model's first token, a replayed one).
    pub fn observe(&mut self, token: u32) {
        *self.seen.entry(token).or_insert(0) += 1;
        if let Some(guide) = &mut self.guide {
            guide.observe(token);
        }
    }

    /// Why the answer cannot go on as its guide wants it to, if so.
    pub fn failure(&self) -> Option<&ServiceError> {
        self.guide.as_ref()?.failure()
    }

    /// Chooses the token for `position` (prompt length + index in the answer), and counts it.
    /// The draw depends on the logits, the parameters, the seed and `position` alone, and on what the guide allows and how many
    /// tokens are left.
    ///
    /// `logits` is `[vocab]`, not empty; bias, penalties and guide are applied in place.
    pub fn sample(&mut self, logits: &mut [f32], position: usize) -> Sampled {
        self.penalise(logits);
        // Log-probabilities are the model's own: what the guide forbids has its part in them.
        let reported = self.params.logprobs.map(|n| Logprobs::of(logits, n as usize));
        let token = if self.params.temperature == 0.0 { self.most_likely(logits) } else { self.draw(logits, position) };
        let token = match &mut self.guide {
            Some(guide) => guide.in_time(token, self.end.saturating_sub(position)),
            None => token,
        };
        self.observe(token);
        Sampled { token, logprob: reported.map(|reported| reported.with(logits[token as usize])) }
    }

    /// The most likely token that the guide allows. Where that is the most likely of all, as it mostly is, no other is looked at.
    fn most_likely(&mut self, logits: &mut [f32]) -> u32 {
        let token = greatest(logits);
        if let Some(guide) = &mut self.guide
            && !guide.allows(token)
        {
            guide.mask(logits);
            return greatest(logits);
        }
        token
    }

    fn penalise(&self, logits: &mut [f32]) {
        let SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.params;
        for &(token, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        for (&token, &count) in &self.seen {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
            if count > 0 {
                *logit -= presence_penalty + frequency_penalty * count as f32;
            }
        }
    }

    fn draw(&mut self, logits: &mut [f32], position: usize) -> u32 {
        if let Some(guide) = &mut self.guide {
            guide.mask(logits);
        }
        let logits = &*logits;
        let SamplingParams { temperature, top_p, min_p, seed, .. } = self.params;
        let top_k = Some(self.params.top_k as usize).filter(|k| (1..logits.len()).contains(k));
        let highest = logits[greatest(logits) as usize];
        // The most likely token has weight 1. Not-a-number has none.
        let weight = |logit: f32| ((logit - highest) / temperature).exp().max(0.0);
        let drawn = uniform(seed, position);
        if top_k.is_none() && top_p == 1.0 {
            let kept = |logit: f32| Some(weight(logit)).filter(|w| *w >= min_p).unwrap_or(0.0);
            return any_of(logits, kept, drawn).unwrap_or_else(|| greatest(logits));
        }
        // In the order of their ids throughout, so that the draw is the same whichever filters ran.
        let (mut candidates, total): (Vec<(u32, f32)>, f64) = match top_k {
            Some(keep) => {
                let last = most_likely(logits, keep).into_iter().max_by(order).unwrap_or_default();
                let kept = (0..).zip(logits.iter().copied()).filter(|c| order(c, &last).is_le());
                let kept: Vec<_> = kept.map(|(token, logit)| (token, weight(logit))).collect();
                let total = kept.iter().map(|c| f64::from(c.1)).sum();
                (kept, total)
            }
            None => {
                let total = sums(logits, weight).iter().sum();
                (likely(logits, weight, total, top_p), total)
            }
        };
        if top_p < 1.0 {
            let last = nucleus(&mut candidates.clone(), f64::from(top_p) * total, order);
            candidates.retain(|c| order(c, &last).is_le());
        }
        candidates.retain(|c| c.1 >= min_p);
        let total: f64 = candidates.iter().map(|c| f64::from(c.1)).sum();
        one_of(candidates.iter().copied(), drawn * total).unwrap_or_else(|| greatest(logits))
    }
}

/// Most likely first; equal ones by id, so that the order never depends on the sort.
fn order(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0))
}

/// Logits that are looked at together: whether the greatest is among them, what they weigh.
const RUN: usize = 256;

/// What the logits weigh, run by run.
fn sums(logits: &[f32], weight: impl Fn(f32) -> f32) -> Vec<f64> {
    logits.chunks(RUN).map(|run| run.iter().map(|l| f64::from(weight(*l))).sum()).collect()
}

/// The token in which the part `drawn` of all weights ends. Weights are computed once, and those of one run twice, so none are kept.
fn any_of(logits: &[f32], weight: impl Fn(f32) -> f32, drawn: f64) -> Option<u32> {
    let sums = sums(logits, &weight);
    let mut left = drawn * sums.iter().sum::<f64>();
    let mut last = None;
    for (run, sum) in sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
        last = Some(run);
        if left < *sum {
            break;
        }
        left -= sum;
    }
    // Rounding can leave a rest: then it is the last run that has any weight.
    let run = last?;
    let weights = logits.chunks(RUN).nth(run)?.iter().enumerate().map(|(i, l)| ((run * RUN + i) as u32, weight(*l)));
    one_of(weights, left)
}

/// The candidate in which the weight `left`, counted from the first, ends.
fn one_of(candidates: impl Iterator<Item = (u32, f32)>, mut left: f64) -> Option<u32> {
    let mut last = None;
    for (token, weight) in candidates.filter(|c| c.1 > 0.0) {
        last = Some(token);
        left -= f64::from(weight);
        if left < 0.0 {
            break;
        }
    }
    // Rounding can leave a rest: then it is the last one that has any weight.
    last
}

/// The candidates of a nucleus of `top_p` of all weights, which are `total`, and some others.
///
/// All tokens lighter than the average of what the nucleus may leave out weigh less than that together: none of them is in it.
fn likely(logits: &[f32], weight: impl Fn(f32) -> f32, total: f64, top_p: f32) -> Vec<(u32, f32)> {
    let least = (1.0 - f64::from(top_p)) * total / logits.len() as f64;
    let all = logits.iter().enumerate().map(|(i, l)| (i as u32, weight(*l)));
    all.filter(|c| f64::from(c.1) >= least).collect()
}

/// The `count` greatest logits, in no order, without a copy of all.
fn most_likely(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    /// So many are collected at least before some are let go of.
    const MANY: usize = 64;
    if count == 0 {
        return Vec::new();
    }
    let mut kept: Vec<(u32, f32)> = Vec::new();
    // What is no greater than this one is not among them: of equal ones the earlier are.
    let mut least = f32::NEG_INFINITY;
    for (i, &logit) in logits.iter().enumerate() {
        if logit > least || (kept.len() < count && !logit.is_nan()) {
            kept.push((i as u32, logit));
            if kept.len() >= (2 * count).max(MANY) {
                kept.select_nth_unstable_by(count - 1, order);
                kept.truncate(count);
                least = kept[count - 1].1;
            }
        }
    }
    if kept.len() > count {
        kept.select_nth_unstable_by(count - 1, order);
        kept.truncate(count);
    }
    kept
}

/// The last of the first candidates in `order` that together weigh `enough`, found without sorting them all.
fn nucleus(candidates: &mut [(u32, f32)], enough: f64, order: impl Fn(&(u32, f32), &(u32, f32)) -> Ordering + Copy) -> (u32, f32) {
    /// So few are sorted.
    const FEW: usize = 32;
    let (mut rest, mut before) = (candidates, 0.0);
    // Each round halves the rest, so all rounds together look at each candidate some two times.
    while rest.len() > FEW {
        let middle = rest.len() / 2;
        rest.select_nth_unstable_by(middle, order);
        let (first, second) = rest.split_at_mut(middle);
        let weight: f64 = first.iter().map(|c| f64::from(c.1)).sum();
        if before + weight >= enough {
            rest = first;
        } else {
            before += weight;
            rest = second;
        }
    }
    rest.sort_unstable_by(order);
    for candidate in rest.iter() {
        before += f64::from(candidate.1);
        if before >= enough {
            return *candidate;
        }
    }
    // Rounding can leave a rest: then it is all of them.
    rest.last().copied().unwrap_or_default()
}

/// A number in [0, 1) that depends on `seed` and `position` alone: ChaCha8 keyed by the seed, its stream the position.
fn uniform(seed: u64, position: usize) -> f64 {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(position as u64);
    generator.random()
}

/// Id of the greatest logit; the lowest id of several. Not-a-number never wins.
fn greatest(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (run, logits) in logits.chunks(RUN).enumerate() {
        // Sixteen chains, which become vectors.
        let mut lanes = [f32::NEG_INFINITY; 16];
        let (whole, rest) = logits.as_chunks::<16>();
        for sixteen in whole {
            for (lane, &logit) in lanes.iter_mut().zip(sixteen) {
                *lane = if logit > *lane { logit } else { *lane };
            }
        }
        if lanes.iter().chain(rest).any(|l| *l > best.1) {
            for (i, &logit) in logits.iter().enumerate() {
                if logit > best.1 {
                    best = (run * RUN + i, logit);
                }
            }
        }
    }
    best.0 as u32
}

/// Log-probability of `token`, which was not chosen here but is known, and of the `n` most likely ones.
pub(crate) fn logprob(logits: &[f32], token: u32, n: usize) -> TokenLogprob {
    Logprobs::of(logits, n).with(logits[token as usize])
}

/// The logarithms of a softmax's probabilities, of any of its logits.
struct Logprobs {
    highest: f64,
    log_sum: f64,
    /// Most likely first.
    top: Vec<(u32, f32)>,
}

impl Logprobs {
    fn of(logits: &[f32], n: usize) -> Self {
        let highest = logits[greatest(logits) as usize];
        let sum: f64 = sums(logits, |l| (l - highest).exp()).iter().sum();
        let mut top = most_likely(logits, n);
        top.sort_unstable_by(order);
        Self { highest: f64::from(highest), log_sum: sum.ln(), top }
    }

    /// Of a token with this logit, and of the most likely ones.
    fn with(&self, logit: f32) -> TokenLogprob {
        let of = |logit: f32| (f64::from(logit) - self.highest - self.log_sum) as f32;
        TokenLogprob { logprob: of(logit), top: self.top.iter().map(|&(token, logit)| TopLogprob { token, logprob: of(logit) }).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 6] = [1.0, 3.0, 2.0, -1.0, 3.0, 0.0];

    fn params() -> SamplingParams {
        SamplingParams { temperature: 1.0, ..SamplingParams::greedy() }
    }

    /// How often each token is drawn over many positions.
    fn shares(params: &SamplingParams) -> [f64; 6] {
        let mut shares = [0.0; 6];
        let draws = 20_000;
        for position in 0..draws {
            let token = Sampler::new(params.clone(), &[]).sample(&mut LOGITS.clone(), position).token;
            shares[token as usize] += 1.0 / draws as f64;
        }
        shares
    }

    fn expect(params: &SamplingParams, weights: [f64; 6]) {
        let total: f64 = weights.iter().sum();
        for (token, (got, weight)) in shares(params).into_iter().zip(weights).enumerate() {
            let want = weight / total;
            assert!((got - want).abs() < 0.012 && (want > 0.0 || got == 0.0), "token {token}: {got}, not {want} ({params:?})");
        }
    }

    #[test]
    fn greedy_takes_the_first_of_the_greatest() {
        assert_eq!(Sampler::new(SamplingParams::greedy(), &[]).sample(&mut LOGITS.clone(), 0).token, 1);
    }

    #[test]
    fn draws_follow_the_distribution_and_its_filters() {
        let e = LOGITS.map(|l| f64::from(l).exp());
        expect(&params(), e);
        expect(&SamplingParams { temperature: 2.0, ..params() }, LOGITS.map(|l| (f64::from(l) / 2.0).exp()));
        expect(&SamplingParams { top_k: 2, ..params() }, [0.0, e[1], 0.0, 0.0, e[4], 0.0]);
        expect(&SamplingParams { top_p: 0.5, ..params() }, [0.0, e[1], 0.0, 0.0, e[4], 0.0]);
        expect(&SamplingParams { top_p: 0.01, ..params() }, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        expect(&SamplingParams { top_p: 0.0, ..params() }, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        expect(&SamplingParams { min_p: 0.3, ..params() }, [0.0, e[1], e[2], 0.0, e[4], 0.0]);
    }

    #[test]
    fn filters_keep_what_sorting_all_would() {
        let logits: Vec<f32> = (0..5000u32).map(|i| (i * 7919 % 997) as f32 * 0.02).collect();
        let mut sorted: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        sorted.sort_by(order);
        for count in [1, 3, 63, 64, 500, 5000] {
            let mut top = most_likely(&logits, count);
            top.sort_by(order);
            assert_eq!(top, sorted[..count]);
        }
        let weight = |l: f32| (l - 19.92).exp();
        let total: f64 = logits.iter().map(|l| f64::from(weight(*l))).sum();
        for top_p in [0.1, 0.5, 0.9, 0.99] {
            let mut sum = 0.0;
            let mut nucleus = sorted.iter().take_while(|c| {
                let before = sum;
                sum += f64::from(weight(c.1));
                before < f64::from(top_p) * total
            });
            let candidates = likely(&logits, weight, total, top_p);
            assert!(nucleus.all(|c| candidates.iter().any(|k| k.0 == c.0)), "{top_p}");
            assert!(candidates.len() < logits.len(), "{top_p}: some are left out at once");
            assert!(candidates.is_sorted_by_key(|c| c.0));
        }
    }

    #[test]
    fn a_nucleus_is_what_sorting_gives() {
        for count in [1, 5, 33, 1000] {
            // Weights that sum exactly, with many equal ones.
            let candidates: Vec<(u32, f32)> = (0..count).map(|i| (i, (i * 7919 % 61) as f32 * 0.25)).collect();
            let total: f64 = candidates.iter().map(|c| f64::from(c.1)).sum();
            let mut sorted = candidates.clone();
            sorted.sort_by(order);
            for part in [0.0, 0.01, 0.3, 0.5, 0.9, 0.999, 1.0] {
                let mut sum = 0.0;
                let want = sorted.iter().find(|c| {
                    sum += f64::from(c.1);
                    sum >= part * total
                });
                assert_eq!(nucleus(&mut candidates.clone(), part * total, order), *want.unwrap(), "{part} of {count}");
            }
        }
    }

    #[test]
    fn a_draw_depends_on_seed_and_position_alone() {
        let one = SamplingParams { seed: 7, ..params() };
        let mut run = Sampler::new(one.clone(), &[]);
        let straight: Vec<u32> = (0..50).map(|p| run.sample(&mut LOGITS.clone(), p).token).collect();
        // Resumed in the middle: the same continuation.
        let mut resumed = Sampler::new(one, &[]);
        straight[..20].iter().for_each(|&t| resumed.observe(t));
        let rest: Vec<u32> = (20..50).map(|p| resumed.sample(&mut LOGITS.clone(), p).token).collect();
        assert_eq!(rest, straight[20..]);
        let mut other = Sampler::new(SamplingParams { seed: 8, ..params() }, &[]);
        let differs: Vec<u32> = (0..50).map(|p| other.sample(&mut LOGITS.clone(), p).token).collect();
        assert_ne!(differs, straight);
    }

    #[test]
    fn penalties_touch_what_was_seen() {
        let mut logits = LOGITS;
        let mut sampler = Sampler::new(SamplingParams { repetition_penalty: 2.0, ..SamplingParams::greedy() }, &[1, 3]);
        sampler.penalise(&mut logits);
        assert_eq!(logits, [1.0, 1.5, 2.0, -2.0, 3.0, 0.0]);
        sampler.params = SamplingParams { presence_penalty: 0.5, frequency_penalty: 0.25, ..SamplingParams::greedy() };
        sampler.observe(4);
        sampler.observe(4);
        let mut logits = LOGITS;
        sampler.penalise(&mut logits);
        assert_eq!(logits, [1.0, 3.0, 2.0, -1.0, 2.0, 0.0]);
    }

    #[test]
    fn a_bias_moves_its_tokens_alone() {
        let mut logits = LOGITS;
        let logit_bias = vec![(3, 100.0), (1, -1.5), (99, 1.0)];
        let mut sampler = Sampler::new(SamplingParams { logit_bias, ..SamplingParams::greedy() }, &[]);
        assert_eq!(sampler.sample(&mut logits, 0).token, 3);
        assert_eq!(logits, [1.0, 1.5, 2.0, 99.0, 3.0, 0.0]);
    }

    #[test]
    fn log_probabilities_are_those_of_the_softmax() {
        let mut sampler = Sampler::new(SamplingParams { logprobs: Some(3), ..SamplingParams::greedy() }, &[]);
        let logprob = sampler.sample(&mut LOGITS.clone(), 0).logprob.unwrap();
        let sum: f32 = LOGITS.iter().map(|l| l.exp()).sum();
        assert!((logprob.logprob - (3.0 - sum.ln())).abs() < 1e-6);
        assert_eq!(logprob.top.iter().map(|t| t.token).collect::<Vec<_>>(), [1, 4, 2]);
    }

    #[test]
    fn hopeless_logits_still_give_a_token() {
        for bad in [f32::NEG_INFINITY, f32::NAN] {
            let token = Sampler::new(params(), &[]).sample(&mut [bad; 4], 0).token;
            assert!(token < 4);
        }
    }
}
