//! A pair's folder, here or on a server: each file lies by itself under the name that `pair.json` lists.

use std::path::Path;

use anyhow::{Context, ensure};
use overfill_types::pair::PAIR_FILE;
use reqwest::Url;

use super::client::Client;
use super::download::{copy, download};
use super::error::PullError;
use super::partial::{Partial, Wanted};
use super::progress::Progress;

/// Where it is.
pub(crate) enum Folder<'a> {
    /// On this machine.
    Here(&'a Path),
    /// On a server; the URL ends with a slash.
    Web(&'a Client, &'a Url),
}

impl Folder<'_> {
    /// The content of its `pair.json`, of at most `limit` bytes.
    ///
    /// # Errors
    /// Where it is not there, or longer.
    pub(crate) async fn pair_json(&self, limit: u64) -> anyhow::Result<Vec<u8>> {
        match self {
            Self::Here(folder) => {
                let path = folder.join(PAIR_FILE);
                let length = path.metadata().with_context(|| format!("{} is no pair's folder", folder.display()))?.len();
                ensure!(length <= limit, "{} has {length} bytes: more than {limit} are not read", path.display());
                std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
            }
            Self::Web(client, folder) => Ok(client.document(&file_of(folder, PAIR_FILE), None, limit as usize).await?),
        }
    }

    /// Fetches a file, or what is missing of it.
    ///
    /// # Errors
    /// As [`download`] and [`copy`].
    pub(crate) async fn fetch(&self, wanted: Wanted<'_>, partial: &mut Partial, progress: &mut Progress) -> Result<(), PullError> {
        match self {
            Self::Here(folder) => copy(&folder.join(wanted.what), wanted, partial, progress),
            Self::Web(client, folder) => download(client, &file_of(folder, wanted.what), wanted, partial, progress).await,
        }
    }
}

impl std::fmt::Display for Folder<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Here(path) => path.display().fmt(f),
            Self::Web(_, url) => url.fmt(f),
        }
    }
}

/// A file of a folder on a server: names are those of a pair's list, and may have characters that URLs have not.
fn file_of(folder: &Url, name: &str) -> Url {
    let mut url = folder.clone();
    if let Ok(mut path) = url.path_segments_mut() {
        path.pop_if_empty().extend(name.split('/'));
    }
    url
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_lies_below_its_folder() {
        let folder = Url::parse("https://here/a/").unwrap();
        assert_eq!(file_of(&folder, "full/model 1?.gguf").as_str(), "https://here/a/full/model%201%3F.gguf");
        assert_eq!(file_of(&Url::parse("https://here/").unwrap(), "a").as_str(), "https://here/a");
    }
}
