//! Scores of one answer, as SQuAD's evaluation computes them.

use std::collections::HashMap;

use crate::data::Metric;

/// The words that are compared: lower case, without punctuation, without `a`, `an` and `the`.
fn words(text: &str) -> Vec<String> {
    let kept: String = text.to_lowercase().chars().filter(|c| !is_punctuation(*c)).collect();
    kept.split_whitespace().filter(|word| !matches!(*word, "a" | "an" | "the")).map(str::to_owned).collect()
}

/// ASCII's, and the quotes and dashes that texts have in their place.
fn is_punctuation(c: char) -> bool {
    c.is_ascii_punctuation() || matches!(c, '\u{2010}'..='\u{2015}' | '\u{2018}'..='\u{201f}' | '…')
}

/// The best score of `answer` against any of those that count as right; from 0 to 1.
pub fn score(metric: Metric, answer: &str, right: &[String]) -> f64 {
    let answer = words(answer);
    right.iter().map(|right| against(metric, &answer, &words(right))).fold(0.0, f64::max)
}

fn against(metric: Metric, answer: &[String], right: &[String]) -> f64 {
    match metric {
        Metric::Exact => f64::from(answer == right),
        Metric::Contains => f64::from(!right.is_empty() && answer.windows(right.len()).any(|run| run == right)),
        Metric::F1 => f1(answer, right),
    }
}

fn f1(answer: &[String], right: &[String]) -> f64 {
    let mut left: HashMap<&str, usize> = HashMap::new();
    for word in right {
        *left.entry(word).or_default() += 1;
    }
    let mut common = 0;
    for word in answer {
        if let Some(count) = left.get_mut(word.as_str()).filter(|count| **count > 0) {
            *count -= 1;
            common += 1;
        }
    }
    if common == 0 {
        f64::from(answer.is_empty() && right.is_empty())
    } else {
        2.0 * f64::from(common) / (answer.len() + right.len()) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_compared_as_squad_does() {
        let right = ["The Denver Broncos".to_owned(), "Denver".to_owned()];
        for (metric, answer, expected) in [
            (Metric::Exact, "denver broncos!", 1.0),
            (Metric::Exact, "It was Denver.", 0.0),
            (Metric::Contains, "It was the “Denver Broncos”.", 1.0),
            (Metric::Contains, "Broncos", 0.0),
            (Metric::Contains, "Denverish", 0.0),
            (Metric::F1, "Broncos of Denver", 0.8),
            (Metric::F1, "denver denver", 2.0 / 3.0),
            (Metric::F1, "", 0.0),
        ] {
            assert!((score(metric, answer, &right) - expected).abs() < 1e-9, "{metric:?} of {answer:?}");
        }
        assert_eq!(score(Metric::Contains, "anything", &["the".to_owned()]), 0.0);
    }
}
