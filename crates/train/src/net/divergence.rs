//! Distances of the decode model's distribution `q` from the full model's `p`, event by event.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Least logarithm of a probability that a mirror image is measured against: a rest below it is rounding.
const LEAST_LOG: f32 = -13.8;

/// Which distance is minimised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Divergence {
    /// KL(p, q): what the full model may say must be likely.
    #[default]
    Kl,
    /// KL(q, p): what the full model would not say must be unlikely.
    ReverseKl,
    /// The generalised Jensen-Shannon divergence of GKD (Agarwal et al. 2023, arXiv 2306.13649): `b KL(p, m) + (1 - b) KL(q, m)` with
    /// `m = b p + (1 - b) q`.
    Jsd(f32),
    /// KL(p, a p + (1 - a) q), skewed as DistiLLM has it (Ko et al. 2024, arXiv 2402.03898).
    SkewedKl(f32),
    /// KL(q, (1 - a) p + a q), of the same paper.
    SkewedReverseKl(f32),
}

/// One event's probabilities, and their logarithms.
#[derive(Clone, Copy, Debug)]
pub(super) struct Odds {
    pub(super) p: f32,
    pub(super) log_p: f32,
    pub(super) q: f32,
    pub(super) log_q: f32,
}

impl Divergence {
    /// An event's part of the distance, and its slope by `q` times `q`. Slopes are told but for a constant: `q` sums to 1.
    pub(super) fn event(self, odds: Odds) -> (f32, f32) {
        let Odds { p, log_p, q, log_q } = odds;
        // `x ln(x / m)`, which is 0 where x is.
        let part = |x: f32, log_x: f32, m: f32| if x > 0.0 { x * (log_x - m.ln()) } else { 0.0 };
        match self {
            Self::Kl => (if p > 0.0 { p * (log_p - log_q) } else { 0.0 }, -p),
            Self::ReverseKl => {
                let distance = if q > 0.0 { q * (log_q - log_p.max(LEAST_LOG)) } else { 0.0 };
                (distance, distance)
            }
            Self::Jsd(b) => {
                let m = b * p + (1.0 - b) * q;
                let of_q = (1.0 - b) * part(q, log_q, m);
                (b * part(p, log_p, m) + of_q, of_q)
            }
            Self::SkewedKl(a) => {
                let m = a * p + (1.0 - a) * q;
                (part(p, log_p, m), if p > 0.0 { -(1.0 - a) * p * q / m } else { 0.0 })
            }
            Self::SkewedReverseKl(a) => {
                let m = (1.0 - a) * p + a * q;
                let distance = part(q, log_q, m);
                (distance, if q > 0.0 { distance - a * q * q / m } else { 0.0 })
            }
        }
    }
}

impl FromStr for Divergence {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, share) = text.split_once(':').map_or((text, None), |(name, share)| (name, Some(share)));
        let share = || match share.map(str::parse::<f32>) {
            Some(Ok(share)) if share > 0.0 && share < 1.0 => Ok(share),
            _ => Err(format!("'{text}': {name} wants a share between 0 and 1, as in {name}:0.5")),
        };
        match (name, text == name) {
            ("kl", true) => Ok(Self::Kl),
            ("reverse-kl", true) => Ok(Self::ReverseKl),
            ("jsd", _) => Ok(Self::Jsd(share()?)),
            ("skewed-kl", _) => Ok(Self::SkewedKl(share()?)),
            ("skewed-reverse-kl", _) => Ok(Self::SkewedReverseKl(share()?)),
            _ => Err(format!("'{text}' is no divergence: use kl, reverse-kl, jsd:B, skewed-kl:A or skewed-reverse-kl:A")),
        }
    }
}

impl TryFrom<String> for Divergence {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Divergence> for String {
    fn from(divergence: Divergence) -> Self {
        match divergence {
            Divergence::Kl => "kl".into(),
            Divergence::ReverseKl => "reverse-kl".into(),
            Divergence::Jsd(b) => format!("jsd:{b}"),
            Divergence::SkewedKl(a) => format!("skewed-kl:{a}"),
            Divergence::SkewedReverseKl(a) => format!("skewed-reverse-kl:{a}"),
        }
    }
}

#[cfg(test)]
pub(super) const EACH: [Divergence; 5] =
    [Divergence::Kl, Divergence::ReverseKl, Divergence::Jsd(0.3), Divergence::SkewedKl(0.1), Divergence::SkewedReverseKl(0.2)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for divergence in EACH {
            assert_eq!(String::from(divergence).parse(), Ok(divergence));
        }
        for wrong in ["", "jsd", "jsd:", "jsd:1", "jsd:0", "jsd:NaN", "kl:0.5", "forward", "skewed-kl:-1"] {
            assert!(wrong.parse::<Divergence>().unwrap_err().contains(wrong), "{wrong}");
        }
    }

    /// Of equal distributions every distance is 0; of others it is more, and finite where one of them has nothing.
    #[test]
    fn distances_are_distances() {
        let sum = |divergence: Divergence, p: &[f32], q: &[f32]| -> f32 {
            let odds = p.iter().zip(q).map(|(&p, &q)| Odds { p, log_p: p.max(1e-30).ln(), q, log_q: q.max(1e-30).ln() });
            odds.map(|odds| divergence.event(odds).0).sum()
        };
        let (p, q) = ([0.7, 0.2, 0.1, 0.0], [0.1, 0.3, 0.5, 0.1]);
        for divergence in EACH {
            assert!(sum(divergence, &q, &q).abs() < 1e-6, "{divergence:?}");
            for (p, q) in [(&p, &q), (&q, &p)] {
                let distance = sum(divergence, p, q);
                assert!(distance.is_finite() && distance > 0.02, "{divergence:?}: {distance}");
            }
        }
        // Halfway between them it is the same from both sides.
        let (there, back) = (sum(Divergence::Jsd(0.5), &p, &q), sum(Divergence::Jsd(0.5), &q, &p));
        assert!((there - back).abs() < 1e-6);
    }
}
