//! The short way to an answer's end.
//!
//! An answer may have so many tokens and no more, and one that is cut off has not the form that was asked for: half an object is no
//! JSON. So near its last token an answer goes on only to where it can still be ended. The way to the end is found by trying:
//! what is open is closed, what must be there is written as short as can be.

use llguidance::Matcher;
use llguidance::toktrie::{TokTrie, TokenId};

/// Tokens before an answer's last at which its end is looked for; also the longest way that is looked for.
pub(crate) const HORIZON: usize = 64;

/// What ends or shortens JSON, in the order in which it is tried.
const CLOSERS: [&str; 13] = ["}", "]", ",", "\"", "0", "null", "true", "false", ":", "{", "[", "\n", "</"];
/// Text that may hold all of these may hold anything: only its own end ends it.
const ANYTHING: [&str; 3] = ["a", "}", "]"];

/// The tokens of a short way to the end, without the one that ends the answer; `None` where none is found.
pub(crate) fn way(mut matcher: Matcher, trie: &TokTrie) -> Option<Vec<TokenId>> {
    let mut way = Vec::new();
    while way.len() < HORIZON {
        if matcher.is_stopped() || matcher.is_accepting().ok()? {
            return Some(way);
        }
        for token in next(&mut matcher, trie)? {
            matcher.consume_token(token).ok()?;
            way.push(token);
        }
    }
    None
}

/// The next tokens of it.
fn next(matcher: &mut Matcher, trie: &TokTrie) -> Option<Vec<TokenId>> {
    let forced = tokens(&matcher.compute_ff_bytes(), trie);
    if !forced.is_empty() {
        return Some(forced);
    }
    let mut allowed = |text: &str| {
        let token = trie.token_id(text.as_bytes())?;
        matcher.validate_tokens(&[token]).is_ok_and(|valid| valid == 1).then_some(token)
    };
    let within_text = ANYTHING.iter().all(|text| allowed(text).is_some());
    let closer = if within_text { allowed("\"").or_else(|| allowed("a")) } else { CLOSERS.iter().find_map(|text| allowed(text)) };
    if let Some(token) = closer {
        return Some(vec![token]);
    }
    // Whatever brings most of what is due.
    let mask = matcher.compute_mask().ok()?;
    let longest = mask.iter().max_by_key(|token| (trie.token(*token).len(), std::cmp::Reverse(*token)));
    longest.map(|token| vec![token])
}

/// Bytes as tokens, each as long as can be; none where some byte is in no token.
fn tokens(mut bytes: &[u8], trie: &TokTrie) -> Vec<TokenId> {
    let mut tokens = Vec::new();
    while !bytes.is_empty() {
        let (token, length) = trie.prefix_token_id(bytes);
        if length == 0 {
            return Vec::new();
        }
        tokens.push(token);
        bytes = &bytes[length..];
    }
    tokens
}
