//! Changes of what is right: bytes, texts and JSON.

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use serde_json::{Value, json};

/// Numbers at which things are wont to break.
const NUMBERS: [u64; 12] = [0, 1, 0x7f, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 32, 1 << 40, 0x7fff_ffff_ffff_ffff, u64::MAX];

/// Texts that are odd.
const TEXTS: [&str; 16] = [
    "",
    " ",
    "\0",
    "\u{feff}",
    "é",
    "e\u{301}",
    "👩‍👩‍👧",
    "\u{202e}x",
    "<|im_start|>system\n",
    "<|end|>",
    "{{ 7 * 7 }}",
    "{% for x in y %}",
    "\\u0000",
    "../../etc/passwd",
    "a\r\nb: c",
    "Bearer x",
];

/// `right` with a few of its bytes changed, cut, doubled or moved.
pub fn bytes(right: &[u8], draws: &mut StdRng) -> Vec<u8> {
    let mut bytes = right.to_vec();
    for _ in 0..draws.random_range(1..=4) {
        let at = draws.random_range(0..=bytes.len().max(1) - 1).min(bytes.len());
        let end = (at + draws.random_range(1..64)).min(bytes.len());
        match draws.random_range(0..8) {
            0 if at < bytes.len() => bytes[at] ^= 1 << draws.random_range(0..8),
            1 if at < bytes.len() => bytes[at] = draws.random(),
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..end)),
            4 => {
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            5 => {
                let number = NUMBERS.choose(draws).copied().unwrap_or_default().to_le_bytes();
                let length = [1, 2, 4, 8][draws.random_range(0..4)].min(bytes.len() - at);
                bytes[at..at + length].copy_from_slice(&number[..length]);
            }
            6 => drop(bytes.splice(at..at, TEXTS.choose(draws).copied().unwrap_or_default().bytes())),
            _ => {
                let from = draws.random_range(0..=bytes.len().max(1) - 1).min(bytes.len());
                let moved = bytes[from..(from + end - at).min(bytes.len())].to_vec();
                bytes.splice(at..end, moved);
            }
        }
    }
    bytes
}

/// The same of a text; what is no UTF-8 any more is replaced.
pub fn text(right: &str, draws: &mut StdRng) -> String {
    String::from_utf8_lossy(&bytes(right.as_bytes(), draws)).into_owned()
}

/// `right` with a few of its values changed for odd ones, or taken out, or doubled.
pub fn value(right: &Value, draws: &mut StdRng) -> Value {
    let mut value = right.clone();
    for _ in 0..draws.random_range(1..=3) {
        let odd = odd(right, draws);
        change(&mut value, odd, draws);
    }
    value
}

/// A value that is odd wherever it stands.
fn odd(right: &Value, draws: &mut StdRng) -> Value {
    match draws.random_range(0..13) {
        0 => Value::Null,
        1 => json!(draws.random::<bool>()),
        2 => json!(NUMBERS.choose(draws)),
        3 => json!(-i64::from(draws.random::<u32>())),
        4 => json!([1e308, -1e308, 1e-308, 0.5, -0.0, 1e15].choose(draws)),
        5 => json!(TEXTS.choose(draws)),
        6 => json!("x".repeat(draws.random_range(0..3000))),
        7 => json!([]),
        8 => json!({}),
        9 => (0..draws.random_range(1..120))
            .fold(json!(1), |inner, level| if level % 2 == 0 { json!([inner]) } else { json!({ "a": inner }) }),
        10 => Value::Array((0..draws.random_range(0..300)).map(|n| json!(n)).collect()),
        11 => right.clone(),
        _ => json!({ "type": TEXTS.choose(draws), "text": 1, "$ref": "#", "properties": { "a": { "$ref": "#/properties/a" } } }),
    }
}

/// Puts `odd` in some place of `value`, or takes something out.
fn change(value: &mut Value, odd: Value, draws: &mut StdRng) {
    match value {
        Value::Object(fields) if !fields.is_empty() && draws.random_range(0..6) > 0 => {
            let at = draws.random_range(0..fields.len());
            let key = fields.keys().nth(at).cloned().unwrap_or_default();
            match draws.random_range(0..8) {
                0 => drop(fields.remove(&key)),
                1 => drop(fields.insert(text(&key, draws), odd)),
                _ => change(fields.entry(key).or_insert(Value::Null), odd, draws),
            }
        }
        Value::Array(values) if !values.is_empty() && draws.random_range(0..6) > 0 => {
            let at = draws.random_range(0..values.len());
            match draws.random_range(0..8) {
                0 => drop(values.remove(at)),
                1 => values.insert(at, odd),
                2 => values.push(values[at].clone()),
                _ => change(&mut values[at], odd, draws),
            }
        }
        Value::String(right) if draws.random() => *right = text(right, draws),
        value => *value = odd,
    }
}
