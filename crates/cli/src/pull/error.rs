//! Why a pull failed, and whether another try may help.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::{StatusCode, Url};

/// What went wrong between us and a server, a folder, or the disk.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PullError {
    /// No connection, or one that broke.
    #[error("{url}: {what}")]
    Connection { url: String, what: String },
    /// No answer began for as long as is waited.
    #[error("{url}: no answer within {seconds} s")]
    NoAnswer { url: String, seconds: u64 },
    /// Next to nothing came for as long as is waited.
    #[error("{url}: less than {least} KiB came in {seconds} s")]
    Silent { url: String, least: u64, seconds: u64 },
    /// Neither a certificate that is known here, nor another try, helps.
    #[error("{url}: {what}; where its authority is one of your own, name its certificate with --ca-file (in the chart, `pull.caSecret`)")]
    Certificate { url: String, what: String },
    /// An answer that is no success.
    #[error("{url} answers {status}{advice}")]
    Status { url: String, status: StatusCode, advice: &'static str, after: Option<Duration> },
    /// A file is of another length than it must be.
    #[error("{url} has {found} bytes, and {wanted} are wanted: it is another file than the one that was meant")]
    Length { url: String, found: String, wanted: u64 },
    /// A document that is kept in memory is longer than any that is meant.
    #[error("{url} has more than {limit} bytes, which are not read: it is another document than the one that was meant")]
    TooLong { url: String, limit: usize },
    /// The bytes ended, or were cut off, before all had come.
    #[error("{url}: it ended after {found} of {wanted} bytes")]
    CutShort { url: String, found: u64, wanted: u64 },
    /// The bytes are others than were meant.
    #[error("{from} has other bytes than were meant: their sha256 is {found}, and should be {wanted}")]
    Digest { from: String, found: String, wanted: String },
    /// A registry said what it may not say, or an image is not one of a pair.
    #[error("{0}")]
    Refused(String),
    /// The disk has no room.
    #[error("no room for {path}: its disk is full, or a quota is used up; {missing} bytes more are wanted. What came is kept: try again")]
    Full { path: PathBuf, missing: u64 },
    /// The file system said something else.
    #[error("{path} cannot be read or written")]
    File { path: PathBuf, source: io::Error },
}

impl PullError {
    /// Whether it may pass by itself.
    pub(crate) fn passes(&self) -> bool {
        match self {
            Self::Connection { .. } | Self::NoAnswer { .. } | Self::Silent { .. } | Self::CutShort { .. } => true,
            Self::Status { status, .. } => {
                status.is_server_error() || matches!(*status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT)
            }
            _ => false,
        }
    }

    /// What a server said of when to come again.
    pub(crate) fn after(&self) -> Option<Duration> {
        match self {
            Self::Status { after, .. } => *after,
            _ => None,
        }
    }

    /// Of the file at `path`, for which so many bytes are still to be written.
    pub(crate) fn file(path: &Path, missing: u64, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { path: path.to_owned(), missing },
            _ => Self::File { path: path.to_owned(), source },
        }
    }

    /// Of a request to `url`.
    pub(crate) fn request(url: &Url, error: &reqwest::Error) -> Self {
        let (url, what) = (shown(url), chain(error));
        match tls(error) {
            Some(rustls::Error::InvalidCertificate(_)) => Self::Certificate { url, what },
            Some(rustls::Error::InvalidMessage(_)) => {
                Self::Refused(format!("{url} does not speak TLS ({what}): write http://, or for a registry --plain-http"))
            }
            _ if error.is_redirect() => Self::Refused(format!("{url}: {what}")),
            _ => Self::Connection { url, what },
        }
    }

    /// Of an answer that is no success.
    pub(crate) fn status(url: &Url, response: &reqwest::Response) -> Self {
        let status = response.status();
        let advice = match status {
            StatusCode::UNAUTHORIZED => {
                ": it wants to know who asks; give it a user and password with --auth-file, or a token with --token-file"
            }
            StatusCode::FORBIDDEN => ": whoever is named by --auth-file or --token-file, or nobody where none is given, may not read it",
            StatusCode::NOT_FOUND | StatusCode::GONE => ": there is no such file; is the source the pair's folder, with pair.json in it?",
            _ => "",
        };
        let after = response.headers().get(reqwest::header::RETRY_AFTER).and_then(|v| v.to_str().ok()?.parse().ok());
        Self::Status { url: shown(url), status, advice, after: after.map(Duration::from_secs) }
    }
}

/// A URL as it may stand in a log: what follows the path may be a signature.
pub(crate) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    url.to_string()
}

/// An error with its causes, without the URLs that reqwest names.
fn chain(error: &reqwest::Error) -> String {
    let mut said: Vec<String> = Vec::new();
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    while let Some(error) = cause {
        let text = error.to_string();
        if said.last().is_none_or(|last| !last.ends_with(&text)) {
            said.push(text);
        }
        cause = error.source();
    }
    match said.is_empty() {
        true if error.is_timeout() => "no answer in time".into(),
        true => "the connection broke".into(),
        false => said.join(": "),
    }
}

/// What TLS had against a connection.
fn tls(error: &reqwest::Error) -> Option<&rustls::Error> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(error);
    while let Some(error) = cause {
        // An I/O error tells of the causes of what it carries, and not of that itself.
        let carried = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if let Some(tls) = error.downcast_ref().or_else(|| carried?.downcast_ref()) {
            return Some(tls);
        }
        cause = match carried {
            Some(carried) => Some(carried),
            None => error.source(),
        };
    }
    None
}
