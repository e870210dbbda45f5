//! Where a pair comes from.

use std::path::{Path, PathBuf};

use overfill_types::pair::PAIR_FILE;
use reqwest::Url;

use super::registry::Image;

/// A folder here, a folder on a server, or an image in a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A folder of this machine.
    Folder(PathBuf),
    /// A folder on a server: its URL ends with a slash.
    Web(Url),
    /// An image with the pair, or the half that is wanted, in `/pair`.
    Image(Image),
}

impl std::str::FromStr for Source {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(image) = text.strip_prefix("oci://") {
            return Ok(Self::Image(image.parse()?));
        }
        // A URL, or a path; one with a scheme that is none of these is a mistake.
        let Some((scheme, _)) = text.split_once("://") else { return Ok(Self::Folder(folder(Path::new(text)))) };
        let mut url = Url::parse(text).map_err(|e| format!("it is no URL: {e}"))?;
        match scheme {
            "file" => {
                let path = url.to_file_path().map_err(|()| "it names no file of this machine: file:///FOLDER is wanted")?;
                return Ok(Self::Folder(folder(&path)));
            }
            "http" | "https" => {}
            other => return Err(format!("{other}:// is not known here: use https://, http://, file://, oci:// or a path")),
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err("a password does not belong into arguments, which everyone on the machine can read: use --auth-file".into());
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err("what follows ? or # would be of one file, and a pair is several: name its folder".into());
        }
        let path = url.path().strip_suffix(PAIR_FILE).unwrap_or(url.path()).to_owned();
        url.set_path(&if path.ends_with('/') { path } else { format!("{path}/") });
        Ok(Self::Web(url))
    }
}

impl Source {
    /// The host that is told who we are, with its port where it says one, and whether it is told at once.
    pub(crate) fn host(&self) -> Option<(String, bool)> {
        match self {
            Self::Folder(_) => None,
            Self::Web(url) => {
                let port = url.port().map_or(String::new(), |port| format!(":{port}"));
                Some((format!("{}{port}", url.host_str()?), true))
            }
            Self::Image(image) => Some((image.host().to_owned(), false)),
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Folder(path) => path.display().fmt(f),
            Self::Web(url) => url.fmt(f),
            Self::Image(image) => image.fmt(f),
        }
    }
}

fn folder(path: &Path) -> PathBuf {
    match path.file_name().is_some_and(|name| name == PAIR_FILE) {
        true => path.parent().map(Path::to_owned).unwrap_or_default(),
        false => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_or_its_pair_json() {
        let web = |text: &str| match text.parse() {
            Ok(Source::Web(url)) => url.to_string(),
            other => panic!("{other:?}"),
        };
        for text in ["https://here/a/b", "https://here/a/b/", "https://here/a/b/pair.json"] {
            assert_eq!(web(text), "https://here/a/b/");
        }
        assert_eq!(web("http://here:81"), "http://here:81/");
        for text in ["/a/b", "/a/b/pair.json", "file:///a/b", "file:///a/b/pair.json"] {
            assert_eq!(text.parse(), Ok(Source::Folder("/a/b".into())), "{text}");
        }
        assert!(matches!("oci://here/a:1".parse(), Ok(Source::Image(_))));
        for wrong in ["s3://a/b", "https://me:secret@here/", "https://here/a?sig=1", "https://", "oci://here/a", "file://there/a"] {
            assert!(wrong.parse::<Source>().is_err(), "{wrong}");
        }
    }
}
