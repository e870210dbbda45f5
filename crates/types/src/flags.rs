//! What flags of several binaries are read as.

/// `1500`, `64K`, `512M`, `4G` (powers of 1024) as a number of bytes.
///
/// # Errors
/// A sentence that says what is understood.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.trim_end_matches(['B', 'b', 'i']).char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 1 << 10),
        Some((at, 'm' | 'M')) => (&text[..at], 1 << 20),
        Some((at, 'g' | 'G')) => (&text[..at], 1 << 30),
        _ => (text, 1),
    };
    let number: u64 =
        digits.parse().map_err(|_| format!("'{text}' is no size: write a number of bytes, or one with K, M or G behind it"))?;
    number.checked_mul(unit).filter(|bytes| *bytes > 0).ok_or_else(|| format!("'{text}' is no size that memory can have"))
}

/// A number of seconds, at most a day.
///
/// # Errors
/// A sentence that says what is understood.
pub fn parse_seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(seconds) if (0.0..=86_400.0).contains(&seconds) => Ok(seconds),
        _ => Err(format!("'{text}' is no number of seconds from 0 to 86400")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_understood() {
        for (text, bytes) in [("1500", 1500), ("64K", 64 << 10), ("512m", 512 << 20), ("4G", 4 << 30), ("2GiB", 2 << 30)] {
            assert_eq!(parse_bytes(text), Ok(bytes));
        }
        for text in ["", "G", "-1", "1.5G", "0", "99999999999G"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}
