//! How a registry asks who we are: it names a service that gives a token to whoever may read, to anyone for what is public.

use reqwest::Url;
use reqwest::header::HeaderValue;
use serde::Deserialize;

use super::error::{PullError, shown};

/// Longest answer of such a service that is read, in bytes.
pub(crate) const LONGEST: usize = 1 << 20;

/// `Bearer realm="https://auth.example/token",service="registry.example",scope="repository:name:pull"`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Challenge {
    realm: String,
    /// The other parameters, which the service is told.
    parameters: Vec<(String, String)>,
}

impl Challenge {
    /// A header's value, if it is that of a token service.
    pub(crate) fn parse(header: &str) -> Option<Self> {
        let (scheme, mut rest) = header.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let (mut realm, mut parameters) = (None, Vec::new());
        while let Some((name, after)) = rest.split_once('=') {
            let name = name.trim_matches([' ', ',']).to_ascii_lowercase();
            // A scope has commas within its quotes.
            let (value, next) = match after.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"')?,
                None => after.split_once(',').unwrap_or((after, "")),
            };
            match name.as_str() {
                "realm" => realm = Some(value.to_owned()),
                "service" | "scope" => parameters.push((name, value.to_owned())),
                _ => {}
            }
            rest = next;
        }
        Some(Self { realm: realm?, parameters })
    }

    /// Where the token is; a password is sent there, so it is no less guarded than `asked`, which sends us.
    pub(crate) fn url(&self, asked: &Url) -> Result<Url, PullError> {
        let refused = |what: &str| PullError::Refused(format!("{} sends us for a token to {:?}: {what}", shown(asked), self.realm));
        let mut url = Url::parse(&self.realm).map_err(|_| refused("that is no URL"))?;
        match url.scheme() {
            "https" => {}
            "http" if asked.scheme() == "http" => {}
            _ => return Err(refused("anyone may read along there")),
        }
        url.query_pairs_mut().extend_pairs(&self.parameters);
        Ok(url)
    }
}

#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
}

/// The header that the registry wants, of what the service at `realm` answered.
///
/// # Errors
/// [`PullError::Refused`] where there is no token in it.
pub(crate) fn bearer(realm: &Url, answer: &[u8]) -> Result<HeaderValue, PullError> {
    let answer: Option<Answer> = serde_json::from_slice(answer).ok();
    let token = answer.and_then(|answer| answer.token.or(answer.access_token));
    let header = token.and_then(|token| HeaderValue::from_str(&format!("Bearer {token}")).ok());
    let mut header = header.ok_or_else(|| PullError::Refused(format!("{} answers with no token", shown(realm))))?;
    header.set_sensitive(true);
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_challenge_is_read() {
        let said = r#"Bearer realm="https://auth.example/token",service="registry.example", scope="repository:a/b:pull,push""#;
        let url = Challenge::parse(said).unwrap().url(&Url::parse("https://registry.example/v2/").unwrap()).unwrap();
        assert_eq!(url.as_str(), "https://auth.example/token?service=registry.example&scope=repository%3Aa%2Fb%3Apull%2Cpush");
        for other in ["Basic realm=\"x\"", "Bearer", "Bearer service=x", "Bearer realm=\"open"] {
            assert_eq!(Challenge::parse(other), None, "{other}");
        }
        assert_eq!(Challenge::parse("bearer realm=http://a/b,service=c").unwrap().realm, "http://a/b");
    }

    #[test]
    fn no_password_goes_where_anyone_reads_along() {
        let challenge = Challenge::parse("Bearer realm=\"http://auth.example/token\"").unwrap();
        assert!(challenge.url(&Url::parse("https://registry.example/").unwrap()).is_err());
        assert!(challenge.url(&Url::parse("http://registry.example/").unwrap()).is_ok());
        let file = Challenge::parse("Bearer realm=\"file:///etc/passwd\"").unwrap();
        assert!(file.url(&Url::parse("http://registry.example/").unwrap()).is_err());
    }

    #[test]
    fn a_token_has_two_names() {
        let realm = Url::parse("http://a/").unwrap();
        assert_eq!(bearer(&realm, br#"{"token": "t"}"#).unwrap(), "Bearer t");
        assert_eq!(bearer(&realm, br#"{"access_token": "t", "expires_in": 300}"#).unwrap(), "Bearer t");
        assert!(bearer(&realm, br#"{"token": "a\nb"}"#).is_err());
        assert!(bearer(&realm, b"<html>").is_err());
    }
}
