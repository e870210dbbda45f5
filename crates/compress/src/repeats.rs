//! Answers that go round in circles: how they are told from others.

use std::collections::HashSet;

/// Fewest tokens, or words, of a block that counts.
const BLOCK: usize = 4;
/// Fewest words of a sentence that may not stand there twice.
const SENTENCE: usize = 5;

/// Whether a block of four items or more stands three times in a row.
pub fn thrice<T: PartialEq>(items: &[T]) -> bool {
    (BLOCK..=items.len() / 3).any(|block| first_run(items, block, 2 * block).is_some())
}

/// Where a block of four items or more begins for the second time in a row: of all such blocks that which is whole first.
pub fn first_repeat<T: PartialEq>(items: &[T]) -> Option<usize> {
    let whole = |block| first_run(items, block, block).map(|end| (end, end - block));
    (BLOCK..=items.len() / 2).filter_map(whole).min().map(|(_, start)| start)
}

/// The end of the first `run` items in a row that are each the same as the one `block` before it.
fn first_run<T: PartialEq>(items: &[T], block: usize, run: usize) -> Option<usize> {
    let mut alike = 0;
    let at = items.iter().zip(items.get(block..)?).position(|(before, item)| {
        alike = if before == item { alike + 1 } else { 0 };
        alike == run
    })?;
    Some(at + block + 1)
}

/// Whether a sentence of five words or more stands in a text twice.
pub fn sentence_twice(text: &str) -> bool {
    let mut seen = HashSet::new();
    let sentences = text.split(['.', '!', '?', '\n']).map(str::trim).filter(|sentence| sentence.split_whitespace().count() >= SENTENCE);
    sentences.into_iter().any(|sentence| !seen.insert(sentence))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_in_a_row_are_found_where_they_begin_again() {
        let text = |text: &str| text.bytes().collect::<Vec<u8>>();
        for (items, repeat, three) in [
            ("", None, false),
            ("abc", None, false),
            ("abcabcabcabc", Some(6), false), // six of them twice, three are too few to count
            ("xabcdabcd", Some(5), false),
            ("xabcdabcabcd", None, false),
            ("xabcdabcdabcd", Some(5), true),
            ("abcdeabcdeabcd", Some(5), false),
            ("aaaaaaaa", Some(4), false),
            ("aaaaaaaaaaaa", Some(4), true),
            ("longer block, longer block, longer block, ", Some(14), true),
        ] {
            assert_eq!((first_repeat(&text(items)), thrice(&text(items))), (repeat, three), "{items}");
        }
    }

    #[test]
    fn sentences_are_compared_whole() {
        assert!(sentence_twice("He went to the market. She sang. He went to the market."));
        assert!(!sentence_twice("Yes, of course. She sang. Yes, of course."));
        assert!(!sentence_twice("1. Wash it.\n2. Peel it with a small knife.\n3. Cut it with a small knife."));
    }
}
