//! One file from a server: in as many stretches as it takes, each from where the one before ended.

use std::io::Read;
use std::path::Path;

use reqwest::Url;

use super::client::{Body, Client};
use super::error::{PullError, shown};
use super::pace::Pace;
use super::partial::{Partial, Wanted};
use super::progress::Progress;
use super::retry::Retries;

/// A stretch that brought as much was none in vain: failures before it are forgotten.
const ENOUGH: u64 = 1 << 20;

/// Fetches what is missing of a file, and checks all of it.
///
/// # Errors
/// [`PullError::Digest`] and [`PullError::Length`] where the server has another file, [`PullError::Status`] where it gives none; what
/// may pass, after all attempts; what the disk says.
pub(crate) async fn download(
    client: &Client,
    url: &Url,
    wanted: Wanted<'_>,
    partial: &mut Partial,
    progress: &mut Progress,
) -> Result<(), PullError> {
    let mut retries = Retries::new(client.patience.attempts);
    // Of more than one answer; their bytes may not be of one file.
    let (mut patched, mut again) = (partial.at() > 0, false);
    progress.begin(wanted.what.to_owned(), wanted.bytes, partial.at());
    loop {
        while partial.at() < wanted.bytes {
            let before = partial.at();
            let done = stretch(client, url, wanted, partial, progress).await;
            if partial.at() >= before.saturating_add(ENOUGH) {
                retries.progressed();
            }
            if let Err(error) = done {
                retries.pause(error).await?;
                patched |= partial.at() > 0;
            }
        }
        let found = partial.digest();
        if found == wanted.sha256 {
            return partial.sync();
        }
        partial.restart()?;
        if !patched || again {
            return Err(PullError::Digest { from: shown(url), found, wanted: wanted.sha256.to_owned() });
        }
        eprintln!("what came of {} in pieces is not what was meant: fetching it once more, in one", wanted.what);
        (patched, again) = (false, true);
    }
}

/// What one answer brings.
async fn stretch(client: &Client, url: &Url, wanted: Wanted<'_>, partial: &mut Partial, progress: &mut Progress) -> Result<(), PullError> {
    let Body { mut response, from } = client.open(url, partial.at()).await?;
    if from != partial.at() {
        partial.restart()?;
    }
    let another = |found: String| PullError::Length { url: shown(url), found, wanted: wanted.bytes };
    if let Some(length) = response.content_length().map(|length| from.saturating_add(length)).filter(|length| *length != wanted.bytes) {
        return Err(another(length.to_string()));
    }
    let mut pace = Pace::new(client.patience.silence);
    while partial.at() < wanted.bytes {
        let Some(bytes) = pace.next(url, &mut response).await? else {
            return Err(PullError::CutShort { url: shown(url), found: partial.at(), wanted: wanted.bytes });
        };
        if partial.at().saturating_add(bytes.len() as u64) > wanted.bytes {
            return Err(another("more".into()));
        }
        partial.write(&bytes)?;
        progress.at(partial.at());
    }
    Ok(())
}

/// Copies a file of this machine, and checks it.
///
/// # Errors
/// As [`download`].
pub(crate) fn copy(from: &Path, wanted: Wanted<'_>, partial: &mut Partial, progress: &mut Progress) -> Result<(), PullError> {
    let failed = |e| PullError::file(from, 0, e);
    let mut file = std::fs::File::open(from).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    let another = |found: String| PullError::Length { url: from.display().to_string(), found, wanted: wanted.bytes };
    if length != wanted.bytes {
        return Err(another(length.to_string()));
    }
    partial.restart()?;
    progress.begin(wanted.what.to_owned(), wanted.bytes, 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => break,
            n if partial.at() + n as u64 > wanted.bytes => return Err(another("more".into())),
            n => partial.write(&buffer[..n])?,
        }
        progress.at(partial.at());
    }
    let found = partial.digest();
    if found != wanted.sha256 {
        partial.restart()?;
        return Err(PullError::Digest { from: from.display().to_string(), found, wanted: wanted.sha256.to_owned() });
    }
    partial.sync()
}
