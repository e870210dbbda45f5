//! The cluster's token: what a process of a cluster sends to another, so that it is served.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::http::{HeaderMap, HeaderValue, header};
use sha2::{Digest, Sha256};

use super::watched::{Unusable, Watched};

/// Tokens that are taken at a time: the one that is sent, and the one before or after it while all processes learn a new one.
const MOST: usize = 2;
/// Characters of a token, at least: 16 random bytes in hexadecimal have twice as many.
const SHORTEST: usize = 16;
/// Largest file.
const LARGEST: u64 = 4096;

/// A file of one or two tokens, a line each, which is read again when it changes. The first is sent; each is taken.
///
/// So a token is rotated without a gap: the new one is added below the old one everywhere, then put above it, then the old one goes.
#[derive(Clone)]
pub(crate) struct ClusterToken(Arc<Watched<Tokens>>);

#[derive(Clone)]
struct Tokens {
    sent: HeaderValue,
    taken: Vec<[u8; 32]>,
}

impl ClusterToken {
    /// The tokens in `file`.
    ///
    /// # Errors
    /// Where it cannot be read, or holds none or too many.
    pub(crate) fn of_file(file: PathBuf) -> Result<Self, Unusable> {
        let of = file.clone();
        Ok(Self(Arc::new(Watched::new(vec![file], move || read(&of))?)))
    }

    /// One that only this process knows.
    pub(crate) fn random() -> Result<Self, Unusable> {
        let tokens = parse(&hex::encode(rand::random::<[u8; 32]>()))?;
        Ok(Self(Arc::new(Watched::new(Vec::new(), move || Ok(tokens.clone()))?)))
    }

    /// Adds it to what is sent.
    pub(crate) fn add_to(&self, headers: &mut HeaderMap) {
        headers.insert(header::AUTHORIZATION, self.0.current().sent);
    }

    /// Whether what came has it.
    pub(crate) fn is_in(&self, headers: &HeaderMap) -> bool {
        let Some(sent) = headers.get(header::AUTHORIZATION) else { return false };
        // Hashes are compared: how long that takes says nothing of the token.
        let sent: [u8; 32] = Sha256::digest(sent.as_bytes()).into();
        self.0.current().taken.contains(&sent)
    }
}

fn read(file: &Path) -> Result<Tokens, Unusable> {
    let told = |what: String| Unusable(format!("the file of the cluster's token {} {what}", file.display()));
    let length = fs::metadata(file).map_err(|error| told(format!("cannot be read: {error}")))?.len();
    if length > LARGEST {
        return Err(told(format!("has {length} bytes: a line with one token, or two of them, is expected")));
    }
    let text = fs::read_to_string(file).map_err(|error| told(format!("cannot be read: {error}")))?;
    parse(&text).map_err(|Unusable(what)| told(what))
}

fn parse(text: &str) -> Result<Tokens, Unusable> {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() || lines.len() > MOST {
        return Err(Unusable(format!("has {} lines: one token is expected, or two while it is rotated, a line each", lines.len())));
    }
    if lines.iter().any(|token| token.len() < SHORTEST || !token.bytes().all(|c| c.is_ascii_graphic())) {
        return Err(Unusable(format!(
            "has a token that is shorter than {SHORTEST} characters or has others than letters, digits and signs: write 64 random hexadecimal digits"
        )));
    }
    let mut headers = lines.iter().filter_map(|token| HeaderValue::try_from(format!("Bearer {token}")).ok());
    let taken = headers.clone().map(|header| Sha256::digest(header.as_bytes()).into()).collect();
    let mut sent = headers.next().ok_or_else(|| Unusable("has no token".into()))?;
    // Kept out of what is printed of headers.
    sent.set_sensitive(true);
    Ok(Tokens { sent, taken })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "0123456789abcdef-old";
    const NEW: &str = "0123456789abcdef-new";

    fn token(file: &Path, lines: &[&str]) -> Result<ClusterToken, Unusable> {
        fs::write(file, lines.join("\n") + "\n").unwrap();
        ClusterToken::of_file(file.to_owned())
    }

    fn taken(by: &ClusterToken, from: &ClusterToken) -> bool {
        let mut headers = HeaderMap::new();
        from.add_to(&mut headers);
        by.is_in(&headers)
    }

    #[tokio::test]
    async fn the_first_is_sent_and_each_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let of = |lines: &[&str]| token(&folder.path().join("token"), lines).unwrap();
        let rotation = [of(&[OLD]), of(&[OLD, NEW]), of(&[NEW, OLD]), of(&[NEW])];
        for (now, next) in rotation.iter().zip(&rotation[1..]) {
            assert!(taken(now, next) && taken(next, now), "processes that learn it one after the other understand each other");
        }
        assert!(!taken(&rotation[3], &rotation[0]) && !taken(&rotation[0], &rotation[3]), "the old one has gone");
        assert!(!rotation[0].is_in(&HeaderMap::new()));
        assert!(!taken(&ClusterToken::random().unwrap(), &ClusterToken::random().unwrap()));
    }

    #[test]
    fn what_is_no_file_of_tokens_is_refused_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        let why = |error: Unusable| error.to_string();
        assert!(ClusterToken::of_file(file.clone()).is_err_and(|e| why(e).contains(&file.display().to_string())));
        let long = "x".repeat(5000);
        for lines in [&[][..], &["short"], &[OLD, NEW, "0123456789abcdef-third"], &["0123456789abcdef with blanks"], &[&long]] {
            assert!(token(&file, lines).is_err_and(|e| why(e).contains(&file.display().to_string())), "{lines:?}");
        }
    }
}
