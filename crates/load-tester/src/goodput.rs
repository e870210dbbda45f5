//! Goodput: requests that met every goal, per second, as DistServe defines it.

use super::record::Latency;

/// What a request must meet, in milliseconds. A goal that is not set is met.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Goals {
    pub(super) ttft: Option<f64>,
    pub(super) tpot: Option<f64>,
    pub(super) e2el: Option<f64>,
}

/// From when a request's first and last token are timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Since {
    /// From when it was sent: `vllm bench serve`'s meaning.
    Sent,
    /// From when it was due: what a user would have waited.
    Due,
}

impl Goals {
    /// Of `--goodput`'s values; none if there are none.
    pub(super) fn of(values: &[(Goal, f64)]) -> Option<Self> {
        let mut goals = Self::default();
        for &(goal, ms) in values {
            match goal {
                Goal::Ttft => goals.ttft = Some(ms),
                Goal::Tpot => goals.tpot = Some(ms),
                Goal::E2el => goals.e2el = Some(ms),
            }
        }
        (!values.is_empty()).then_some(goals)
    }

    /// Whether an answered request met all of them. Fewer than two tokens have no time between them, and meet that goal.
    pub(super) fn met(&self, latency: &Latency, since: Since) -> bool {
        let (ttft, e2el) = match since {
            Since::Sent => (latency.ttft, latency.e2el),
            Since::Due => (latency.due_ttft, latency.due_e2el),
        };
        let within = |goal: Option<f64>, seconds: f64| goal.is_none_or(|ms| seconds * 1e3 <= ms);
        within(self.ttft, ttft) && within(self.tpot, latency.tpot.unwrap_or(0.0)) && within(self.e2el, e2el)
    }
}

/// What a goal is set for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Goal {
    Ttft,
    Tpot,
    E2el,
}

/// `ttft:200`.
pub(super) fn parse(text: &str) -> Result<(Goal, f64), String> {
    let (name, ms) = text.split_once(':').ok_or("it must be NAME:MILLISECONDS")?;
    let goal = match name {
        "ttft" => Goal::Ttft,
        "tpot" => Goal::Tpot,
        "e2el" => Goal::E2el,
        other => return Err(format!("'{other}' is none of ttft, tpot, e2el")),
    };
    match ms.parse::<f64>() {
        Ok(ms) if ms >= 0.0 => Ok((goal, ms)),
        _ => Err(format!("'{ms}' is no number of milliseconds, at least 0")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let latency = Latency { ttft: 0.2, e2el: 1.0, tpot: Some(0.05), due_ttft: 0.5, due_e2el: 1.3 };
        let goals = |text: &str| Goals::of(&text.split(' ').map(|t| parse(t).unwrap()).collect::<Vec<_>>()).unwrap();
        assert!(goals("ttft:200 tpot:50 e2el:1000").met(&latency, Since::Sent));
        assert!(!goals("ttft:199").met(&latency, Since::Sent));
        assert!(!goals("tpot:49").met(&latency, Since::Sent));
        assert!(!goals("ttft:200 e2el:999").met(&latency, Since::Sent));
        assert!(!goals("ttft:200").met(&latency, Since::Due));
        assert!(goals("ttft:500 tpot:50 e2el:1300").met(&latency, Since::Due));
        assert!(goals("tpot:0").met(&Latency { tpot: None, ..latency }, Since::Sent));
        assert_eq!(Goals::of(&[]), None);
        assert!(parse("ttft").is_err() && parse("itl:3").is_err() && parse("ttft:-1").is_err() && parse("ttft:x").is_err());
    }
}
