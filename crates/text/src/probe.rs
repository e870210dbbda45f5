//! Whether two tokenizers make the same tokens of the same texts.
//!
//! Two that have the same tokens and merges may still cut texts in other places first, or begin them with another token.

use crate::tokenizer::ModelText;

/// Texts that tokenizers of different kinds cut differently.
const TEXTS: [&str; 24] = [
    "",
    "Hello world",
    " Hello",
    "Hello  world   and\ttabs ",
    "\n\n  indented\n\tlines\r\n",
    "I'll say it's what they've, DON'T",
    "1 12 123 1234 12345678 3.14 1,000,000 2024-11-29",
    "x1y22z333 v2.0.1 #42 @7",
    "fn main() { println!(\"{}\", a[i] += 1); } // ok",
    "def f(x):\n    return x**2 if x else None\n",
    "https://example.org/a?b=c&d=%20#e user@example.org",
    "...!?!? --- *** ((())) <b></b> {{}} []",
    "snake_case CamelCase kebab-case ALLCAPS",
    "né naïve Ångström e\u{301}tude \u{feff}",
    "Tiếng Việt có dấu: phở bò ở Hà Nội",
    "漢字とかなカナ 汉字。한국어 텍스트",
    "Привет, мир! مرحبا بالعالم שלום",
    "🦀 👩‍👩‍👧‍👦 🇫🇷 ☕️",
    "a\u{a0}b\u{2009}c\u{200b}d\u{3000}e",
    "½ ² ③ Ⅳ ٣ ५",
    "\u{0} \u{7f} \u{fffd}",
    "▁low ▁ line",
    "<s> </s> <|im_start|>user <|begin_of_text|> <bos> [INST]",
    "              many spaces              ",
];

/// The first text of which they make other tokens, with what stands before every text.
pub fn first_difference(one: &ModelText, other: &ModelText) -> Option<&'static str> {
    TEXTS.into_iter().find(|text| one.encode(text).ok() != other.encode(text).ok())
}
