//! What a conversation is about, by words that its beginning holds: good enough to tell shares of, not to sort by.

/// Kinds, each with words of which one is enough; the first that fits is it.
const KINDS: [(&str, &[&str]); 10] = [
    ("code", &["python", "javascript", "java", "c++", "sql", "html", "css", "code", "function", "algorithm", "program", "api", "class"]),
    ("maths", &["calculate", "equation", "solve", "probability", "triangle", "sum", "percent", "integer", "geometry", "algebra"]),
    ("food", &["recipe", "recipes", "cook", "cooking", "bake", "dish", "meal", "food", "restaurant", "ingredients", "vegan"]),
    ("letters", &["email", "letter", "invitation", "resume", "cover", "speech", "message", "memo"]),
    ("stories", &["story", "poem", "novel", "character", "characters", "plot", "song", "haiku", "fiction", "screenplay", "dialogue"]),
    ("travel", &["travel", "trip", "visit", "vacation", "itinerary", "flight", "hotel", "tourist", "city"]),
    ("business", &["business", "marketing", "company", "startup", "product", "customers", "sales", "brand", "campaign", "project"]),
    ("health", &["health", "exercise", "workout", "diet", "sleep", "stress", "anxiety", "doctor", "symptoms", "yoga"]),
    ("teaching", &["explain", "lesson", "students", "history", "science", "physics", "biology", "chemistry", "essay", "research"]),
    ("rewriting", &["summarize", "rewrite", "rephrase", "edit", "translate", "simplify", "paragraph", "text", "sentence"]),
];

/// The kind of such words; `other` where none fits.
pub(super) fn kind(words: &str) -> &'static str {
    let lower = words.to_lowercase();
    let found: Vec<&str> = lower.split(|c: char| !(c.is_alphanumeric() || c == '+')).filter(|word| !word.is_empty()).collect();
    KINDS.iter().find(|(_, words)| words.iter().any(|word| found.contains(word))).map_or("other", |(kind, _)| kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_go_by_whole_words() {
        assert_eq!(kind("Write a Python function, please."), "code");
        assert_eq!(kind("Write an email asking my boss for a day off"), "letters");
        assert_eq!(kind("How do I boil an egg?"), "other");
        assert_eq!(kind("A story about a programmer"), "stories");
    }
}
