//! Who we say we are: from a file, never from an argument, which everyone on a machine can read.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::HeaderValue;
use serde::Deserialize;

/// Longest file of credentials that is read, in bytes.
const LONGEST: u64 = 1 << 20;

/// A user and a password.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Login {
    pub(crate) user: String,
    pub(crate) password: String,
}

impl Login {
    /// As HTTP's Basic scheme has it.
    pub(crate) fn basic(&self) -> HeaderValue {
        let encoded = STANDARD.encode(format!("{}:{}", self.user, self.password));
        // Base64 is made of characters that a header may have.
        let mut header = HeaderValue::from_str(&format!("Basic {encoded}")).unwrap_or(HeaderValue::from_static(""));
        header.set_sensitive(true);
        header
    }
}

/// What one host is told.
#[derive(Clone, Default)]
pub(crate) enum Credentials {
    /// Nothing.
    #[default]
    None,
    /// This token, at once.
    Token(String),
    /// A user and a password: at once to a server of files, and to a registry when it asks.
    Login { login: Login, at_once: bool },
}

/// `config.json` of docker, podman's `auth.json`, or a Secret of the type `kubernetes.io/dockerconfigjson`.
#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    auths: HashMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    auth: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    identitytoken: String,
}

impl Credentials {
    /// A token for the header `Authorization: Bearer …`.
    ///
    /// # Errors
    /// Where the file cannot be read, or is no token.
    pub(crate) fn token(file: &Path) -> anyhow::Result<Self> {
        let token = read(file)?.trim().to_owned();
        if token.is_empty() || HeaderValue::from_str(&token).is_err() {
            bail!("{} holds no token: one line, of what may stand in an HTTP header, is wanted", file.display());
        }
        Ok(Self::Token(token))
    }

    /// What a file of logins has for `host`, which may have a port.
    ///
    /// # Errors
    /// Where the file cannot be read, or what it has is not a user and a password.
    pub(crate) fn of_host(file: &Path, host: &str, at_once: bool) -> anyhow::Result<Self> {
        let config: Config = serde_json::from_str(&read(file)?)
            .map_err(|e| anyhow::anyhow!("{} is no file of logins as docker writes them: {}", file.display(), e.classify_kind()))?;
        let named = |name: &str| config.auths.iter().find(|(key, _)| host_of(key) == name).map(|(_, entry)| entry);
        // Docker's own registry is known by the name that it had first.
        let entry = named(host).or_else(|| (host == "registry-1.docker.io").then(|| named("index.docker.io")).flatten());
        let Some(entry) = entry else { return Ok(Self::None) };
        let broken = || format!("{} has no user and password for {host} (helpers that keep them elsewhere are not asked)", file.display());
        let login = if entry.auth.is_empty() {
            Login { user: entry.username.clone(), password: entry.password.clone() }
        } else {
            let decoded = STANDARD.decode(&entry.auth).ok().and_then(|bytes| String::from_utf8(bytes).ok()).with_context(broken)?;
            let (user, password) = decoded.split_once(':').with_context(broken)?;
            Login { user: user.into(), password: password.trim_end_matches('\0').into() }
        };
        if login.user.is_empty() || !entry.identitytoken.is_empty() {
            bail!(broken());
        }
        Ok(Self::Login { login, at_once })
    }

    /// What is said before anyone asks.
    ///
    /// # Errors
    /// Never, of a token that was checked when it was read.
    pub(crate) fn upfront(&self) -> anyhow::Result<Option<HeaderValue>> {
        match self {
            Self::Token(token) => {
                let mut header = HeaderValue::from_str(&format!("Bearer {token}")).context("the token cannot stand in a header")?;
                header.set_sensitive(true);
                Ok(Some(header))
            }
            Self::Login { login, at_once: true } => Ok(Some(login.basic())),
            _ => Ok(None),
        }
    }

    /// The user and password, for a host that asks for them.
    pub(crate) fn login(&self) -> Option<&Login> {
        match self {
            Self::Login { login, .. } => Some(login),
            _ => None,
        }
    }
}

/// `registry.example:5000` of `https://registry.example:5000/v2/`.
fn host_of(key: &str) -> &str {
    let rest = key.split_once("://").map_or(key, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest)
}

/// The content of a file of secrets; no error shows any of it.
fn read(file: &Path) -> anyhow::Result<String> {
    let length = file.metadata().with_context(|| format!("cannot read {}", file.display()))?.len();
    if length > LONGEST {
        bail!("{} has {length} bytes: that is no file of credentials", file.display());
    }
    std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))
}

/// What kind of malformed a JSON text is, without a word of it.
trait Kind {
    fn classify_kind(&self) -> &'static str;
}

impl Kind for serde_json::Error {
    fn classify_kind(&self) -> &'static str {
        match self.classify() {
            serde_json::error::Category::Data => "its JSON is of another kind",
            _ => "it is no JSON",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn login(text: &str, host: &str) -> anyhow::Result<Option<(String, String)>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let found = Credentials::of_host(file.path(), host, false)?;
        Ok(found.login().map(|l| (l.user.clone(), l.password.clone())))
    }

    #[test]
    fn a_login_is_found_under_each_way_to_write_its_host() {
        let auth = STANDARD.encode("me:s:e");
        for key in ["here:5000", "https://here:5000", "http://here:5000/v2/"] {
            let text = format!(r#"{{"auths": {{"{key}": {{"auth": "{auth}"}}, "other": {{"username": "x", "password": "y"}}}}}}"#);
            assert_eq!(login(&text, "here:5000").unwrap(), Some(("me".into(), "s:e".into())));
            assert_eq!(login(&text, "other").unwrap(), Some(("x".into(), "y".into())));
            assert_eq!(login(&text, "here").unwrap(), None, "another port is another host");
        }
    }

    #[test]
    fn what_is_wrong_is_said_without_what_is_secret() {
        for text in ["hunter2", r#"{"auths": {"h": {"auth": "hunter2"}}}"#, r#"{"auths": {"h": "hunter2"}}"#] {
            let error = format!("{:#}", login(text, "h").unwrap_err());
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
