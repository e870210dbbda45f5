//! What is left out of conversations that a model makes up, and how often each reason was met.

use std::collections::HashMap;
use std::fmt;

use crate::repeats::{sentence_twice, thrice};

/// Fewest words of the user's.
const FEWEST_WORDS: usize = 3;
/// Least part of the letters that are of the Latin alphabet without marks, as English has it.
const ENGLISH: f64 = 0.97;
/// Least part of the user's characters that are letters or blanks.
const LETTERS: f64 = 0.7;

/// Why something is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Why {
    /// The user's words had no end within their bound.
    CutOff,
    /// Too few words.
    Short,
    /// Not English, or no prose.
    Language,
    /// A block three times in a row, or a sentence twice.
    Repeats,
    /// Nearly the same as words that were there before.
    Double,
    /// An answer without words.
    Empty,
    /// An answer that goes round in circles.
    Circles,
}

/// How often each reason was met.
#[derive(Clone, Debug, Default)]
pub struct LeftOut(HashMap<Why, u64>);

impl LeftOut {
    pub(super) fn count(&mut self, why: Why) {
        *self.0.entry(why).or_default() += 1;
    }
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = [
            (Why::CutOff, "of the user's words without an end"),
            (Why::Short, "too short"),
            (Why::Language, "not English prose"),
            (Why::Repeats, "that repeat themselves"),
            (Why::Double, "nearly as others before"),
            (Why::Empty, "answers without words"),
            (Why::Circles, "answers that go round in circles"),
        ];
        let told: Vec<String> = all.iter().map(|(why, what)| format!("{} {what}", self.0.get(why).unwrap_or(&0))).collect();
        f.write_str(&told.join(", "))
    }
}

/// The user's words, without blanks around them, if they are of use.
pub(super) fn user(words: &str) -> Result<&str, Why> {
    let words = words.trim();
    if words.split_whitespace().count() < FEWEST_WORDS {
        return Err(Why::Short);
    }
    let count = |those: fn(char) -> bool| words.chars().filter(|c| those(*c)).count() as f64;
    let letters = count(char::is_alphabetic);
    let english = count(|c| c.is_ascii_alphabetic());
    if english < ENGLISH * letters || letters + count(char::is_whitespace) < LETTERS * count(|_| true) {
        return Err(Why::Language);
    }
    if repeats(words) { Err(Why::Repeats) } else { Ok(words) }
}

/// Whether an answer is of use.
pub(super) fn answer(response: &str) -> Result<(), Why> {
    match response {
        blank if blank.trim().is_empty() => Err(Why::Empty),
        circles if repeats(circles) => Err(Why::Circles),
        _ => Ok(()),
    }
}

/// Whether a text goes round in circles: a block of four words or more stands in it three times in a row, or a sentence of five
/// words or more twice.
fn repeats(text: &str) -> bool {
    thrice(&text.split_whitespace().collect::<Vec<&str>>()) || sentence_twice(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_person_might_ask_is_kept() {
        for words in [
            "How do I boil an egg?",
            "Write a Python function that takes a list of integers and returns their sum.\n\nFor example [1, 2] gives 3.",
            "I'm planning a trip to Café Müller in Berlin next month, and I would like to know what there is to see around it.",
        ] {
            assert_eq!(user(&format!("\n {words} ")), Ok(words));
        }
        for (words, why) in [
            ("Hello there", Why::Short),
            ("你好 请 问 你 是 谁", Why::Language),
            ("Was heißt für Äpfel übrig größer schön", Why::Language),
            ("1 2 3 4 5 6 7 8 9 10 11 12 a", Why::Language),
            ("tell me what to do tell me what to do tell me what to do", Why::Repeats),
            ("Where is the old town hall? Where is the old town hall?", Why::Repeats),
        ] {
            assert_eq!(user(words), Err(why), "{words}");
        }
    }

    #[test]
    fn circles_are_found() {
        assert_eq!(answer(" \n"), Err(Why::Empty));
        let list = "1. Wash it.\n2. Peel it.\n3. Cut it.\n4. Boil it for ten minutes.\n5. Serve it with a pinch of salt.";
        assert_eq!(answer(list), Ok(()));
        assert_eq!(answer("It is so very good, it is so very good, and that is that."), Ok(()), "twice may be style");
        assert_eq!(answer(&"a kettle, which is a kettle of water, ".repeat(3)), Err(Why::Circles));
        assert_eq!(answer("He went to the market. She sang. He went to the market."), Err(Why::Circles));
    }
}
