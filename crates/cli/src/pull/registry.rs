//! An image in a registry, by OCI's distribution API: of its manifest we want the layers.

use std::str::FromStr;

use reqwest::Url;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::client::Client;
use super::error::PullError;

/// Longest manifest that is read, in bytes: registries take no longer ones.
const LONGEST: usize = 4 << 20;
/// Most layers of an image, and most images of an index.
const MOST: usize = 512;
/// Kinds of manifests that are understood.
const KINDS: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";

/// `oci://HOST[:PORT]/NAME[:TAG][@sha256:DIGEST]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    host: String,
    name: String,
    tag: Option<String>,
    digest: Option<String>,
}

/// A layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layer {
    pub(crate) sha256: String,
    pub(crate) bytes: u64,
}

#[derive(Deserialize)]
struct Manifest {
    /// Of an image.
    layers: Option<Vec<Descriptor>>,
    /// Of an index: an image for each platform.
    manifests: Option<Vec<Descriptor>>,
}

#[derive(Deserialize)]
struct Descriptor {
    digest: String,
    size: u64,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    os: String,
    architecture: String,
}

impl FromStr for Image {
    type Err = String;

    /// Of what follows `oci://`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = "an image is named as oci://HOST/NAME:TAG or, better, oci://HOST/NAME@sha256:DIGEST";
        let (host, rest) = text.split_once('/').ok_or(wanted)?;
        let (rest, digest) = match rest.split_once('@') {
            Some((rest, digest)) => (rest, Some(hexadecimal(digest).ok_or("its digest is not sha256: and 64 hexadecimal digits")?)),
            None => (rest, None),
        };
        let (name, tag) = match rest.split_once(':') {
            Some((name, tag)) => (name, Some(tag)),
            None => (rest, None),
        };
        let plain = |text: &str, more: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c));
        let parts = name.split('/').all(|part| plain(part, "._-") && !part.starts_with('.'));
        if !plain(host, ".-:[]") || !parts || !tag.is_none_or(|tag| plain(tag, "._-")) {
            return Err(wanted.into());
        }
        if tag.is_none() && digest.is_none() {
            return Err(format!("it says neither a tag nor a digest: {wanted}"));
        }
        // Docker's own registry answers at another name, and has a folder for names without one.
        let docker = host == "docker.io" || host == "index.docker.io";
        let name = if docker && !name.contains('/') { format!("library/{name}") } else { name.to_owned() };
        let host = if docker { "registry-1.docker.io" } else { host };
        Ok(Self { host: host.into(), name, tag: tag.map(str::to_owned), digest })
    }
}

impl Image {
    /// `host:port`.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    /// The digest that it is named by, in hexadecimal digits.
    pub(crate) fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }

    /// Where its manifests and layers are. `plain`: without TLS.
    ///
    /// # Errors
    /// [`PullError::Refused`] where that is no URL.
    pub(crate) fn at(&self, plain: bool, what: &str) -> Result<Url, PullError> {
        let scheme = if plain { "http" } else { "https" };
        let url = format!("{scheme}://{}/v2/{}/{what}", self.host, self.name);
        Url::parse(&url).map_err(|e| PullError::Refused(format!("{url} is no URL: {e}")))
    }

    /// The image's digest and its layers, the lowest first. Of an index it is the image for this machine, or the only one: weights
    /// are for all.
    ///
    /// # Errors
    /// Any [`PullError`] of a request; [`PullError::Digest`] and [`PullError::Refused`] where the registry answers with something else.
    pub(crate) async fn resolve(&self, client: &Client, plain: bool) -> Result<(String, Vec<Layer>), PullError> {
        let named = match (&self.digest, &self.tag) {
            (Some(digest), _) => format!("sha256:{digest}"),
            (None, tag) => tag.clone().unwrap_or_default(),
        };
        let (digest, manifest) = self.manifest(client, plain, &named, self.digest.as_deref()).await?;
        let manifest = match manifest.manifests {
            None => manifest,
            Some(index) => {
                let one = self.choose(index)?;
                self.manifest(client, plain, &format!("sha256:{one}"), Some(&one)).await?.1
            }
        };
        let layers = manifest.layers.filter(|layers| layers.len() <= MOST);
        let layers = layers.ok_or_else(|| self.refused("its manifest names no layers, or too many"))?;
        let layer = |d: Descriptor| {
            Ok(Layer { sha256: hexadecimal(&d.digest).ok_or_else(|| self.refused("a layer has no sha256"))?, bytes: d.size })
        };
        Ok((digest, layers.into_iter().map(layer).collect::<Result<_, PullError>>()?))
    }

    /// A manifest and its digest, which must be `wanted`.
    async fn manifest(&self, client: &Client, plain: bool, named: &str, wanted: Option<&str>) -> Result<(String, Manifest), PullError> {
        let url = self.at(plain, &format!("manifests/{named}"))?;
        let text = client.document(&url, Some(KINDS), LONGEST).await?;
        let digest = hex::encode(Sha256::digest(&text));
        if let Some(wanted) = wanted.filter(|wanted| *wanted != digest) {
            return Err(PullError::Digest { from: url.to_string(), found: digest, wanted: wanted.to_owned() });
        }
        let manifest = serde_json::from_slice(&text).map_err(|e| self.refused(&format!("its manifest cannot be read: {e}")))?;
        Ok((digest, manifest))
    }

    fn choose(&self, index: Vec<Descriptor>) -> Result<String, PullError> {
        let here = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        // What attests an image is in the index too, for the platform `unknown`.
        let images: Vec<&Descriptor> = index.iter().take(MOST).filter(|d| d.platform.as_ref().is_none_or(|p| p.os != "unknown")).collect();
        let for_here = |d: &&&Descriptor| d.platform.as_ref().is_some_and(|p| p.os == "linux" && p.architecture == here);
        let one = images.iter().find(for_here).or(if images.len() == 1 { images.first() } else { None });
        let one = one.ok_or_else(|| self.refused(&format!("it is an index of {} images, none of them for linux/{here}", images.len())))?;
        hexadecimal(&one.digest).ok_or_else(|| self.refused("an image of its index has no sha256"))
    }

    /// Something is wrong with the image.
    pub(crate) fn refused(&self, what: &str) -> PullError {
        PullError::Refused(format!("{self}: {what}"))
    }
}

impl std::fmt::Display for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "oci://{}/{}", self.host, self.name)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@sha256:{digest}")?;
        }
        Ok(())
    }
}

/// The digits of `sha256:…`; they become names of files, so nothing else may be among them.
fn hexadecimal(digest: &str) -> Option<String> {
    let digits = digest.strip_prefix("sha256:")?;
    let plain = digits.len() == 64 && digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    plain.then(|| digits.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_named_as_everywhere() {
        let digest = "a".repeat(64);
        for (text, at) in [
            ("here:5000/a/b:1".to_owned(), "https://here:5000/v2/a/b/x"),
            (format!("here/a@sha256:{digest}"), "https://here/v2/a/x"),
            (format!("here/a:1@sha256:{digest}"), "https://here/v2/a/x"),
            ("docker.io/pair:1".to_owned(), "https://registry-1.docker.io/v2/library/pair/x"),
        ] {
            let image: Image = text.parse().unwrap();
            assert_eq!(image.at(false, "x").unwrap().as_str(), at, "{text}");
        }
        let image: Image = format!("here/a:1@sha256:{digest}").parse().unwrap();
        assert_eq!(image.to_string(), format!("oci://here/a:1@sha256:{digest}"));
        for wrong in ["here", "here/a", "here/a@sha256:12", "here/a@md5:12", "here/../a:1", "here/a:1?x", "me:secret@here/a:1", "here//a:1"]
        {
            assert!(wrong.parse::<Image>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn of_an_index_the_image_for_this_machine_or_the_only_one() {
        let image: Image = "here/a:1".parse().unwrap();
        let of = |os: &str, architecture: &str, digit: &str| Descriptor {
            digest: format!("sha256:{}", digit.repeat(64)),
            size: 1,
            platform: Some(Platform { os: os.into(), architecture: architecture.into() }),
        };
        let choose = |index: Vec<Descriptor>| image.choose(index).map(|digest| digest[..1].to_owned());
        let all = || vec![of("linux", "amd64", "a"), of("linux", "arm64", "b"), of("unknown", "unknown", "c")];
        let here = if cfg!(target_arch = "x86_64") { "a" } else { "b" };
        assert_eq!(choose(all()).unwrap(), here);
        assert_eq!(choose(vec![of("linux", "s390x", "d"), of("unknown", "unknown", "c")]).unwrap(), "d");
        assert!(choose(vec![of("linux", "s390x", "d"), of("linux", "mips", "e")]).is_err());
    }
}
