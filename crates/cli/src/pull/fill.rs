//! Filling a place with a half of a pair: what is missing is fetched, from a folder file by file, from an image layer by layer.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use overfill_types::PairManifest;
use overfill_types::pair::PAIR_FILE;
use overfill_types::pair_files::{Half, PairFile};
use sha2::{Digest, Sha256};

use super::client::Client;
use super::download::download;
use super::error::PullError;
use super::folder::Folder;
use super::layers;
use super::partial::Wanted;
use super::place::Place;
use super::progress::Progress;
use super::registry::Image;

/// Longest `pair.json` that is read, in bytes. What pruning kept is in it, number by number: a large model's has tens of MB.
const LONGEST_PAIR_JSON: u64 = 256 << 20;

/// What one pull does to a place.
pub(crate) struct Fill {
    place: Place,
    half: Half,
    /// sha256 of `pair.json`.
    pinned: Option<String>,
    progress: Progress,
    /// Bytes of files that were not there.
    fetched: u64,
}

impl Fill {
    /// Of `place` with this half of a pair; `pinned` is the sha256 of its `pair.json`.
    pub(crate) fn new(place: Place, half: Half, pinned: Option<String>) -> Self {
        Self { place, half, pinned, progress: Progress::new(), fetched: 0 }
    }

    /// It is done; tells how many bytes came.
    pub(crate) fn end(self) -> u64 {
        self.progress.end();
        self.fetched
    }

    /// From a folder, here or on a server, in which each file lies by itself.
    ///
    /// # Errors
    /// Where the source has not what its `pair.json` lists, or that is not the one that was pinned; any [`PullError`].
    pub(crate) async fn folder(&mut self, folder: Folder<'_>) -> anyhow::Result<PairManifest> {
        let manifest = match self.known(self.pinned.as_deref())? {
            Some(manifest) => manifest,
            None => {
                let text = folder.pair_json(LONGEST_PAIR_JSON).await?;
                self.take(&text, &folder).await?
            }
        };
        for (name, file) in wanted(&manifest, self.half) {
            if self.place.has(name, file, &mut self.progress)? {
                continue;
            }
            let lock = self.place.lock(&file.sha256).await?;
            // Who held it may have fetched this.
            if self.place.has(name, file, &mut self.progress)? {
                continue;
            }
            let wanted = Wanted { what: name, sha256: &file.sha256, bytes: file.bytes };
            let mut partial = self.place.partial(wanted, &lock, &mut self.progress)?;
            let before = partial.at();
            folder.fetch(wanted, &mut partial, &mut self.progress).await?;
            self.place.install(partial.path(), name)?;
            self.place.remember(name, &file.sha256);
            self.fetched += file.bytes - before;
        }
        Ok(manifest)
    }

    /// From an image, whose layers have the files: they are fetched until nothing is missing. `plain`: the registry speaks no TLS.
    ///
    /// # Errors
    /// As [`Fill::folder`].
    pub(crate) async fn image(&mut self, client: &Client, image: &Image, plain: bool) -> anyhow::Result<PairManifest> {
        // An image that is named by its digest, and was pulled before, needs no registry.
        let remembered = image.digest().and_then(|digest| self.place.of_image(digest));
        let mut known = self.known(self.pinned.as_deref().or(remembered.as_deref()))?;
        if self.complete(known.as_ref())? {
            return known.context("nothing is missing of a pair that is known");
        }
        let (digest, layers) = image.resolve(client, plain).await?;
        if image.digest().is_none() {
            eprintln!("{image} is sha256:{digest} today");
        }
        // Layers that came before pair.json did.
        let mut before = Vec::new();
        for layer in layers {
            let what = format!("layer {}", &layer.sha256[..12]);
            let lock = self.place.lock(&layer.sha256).await?;
            if self.complete(known.as_ref())? {
                break;
            }
            let wanted = Wanted { what: &what, sha256: &layer.sha256, bytes: layer.bytes };
            let mut partial = self.place.partial(wanted, &lock, &mut self.progress)?;
            self.fetched += layer.bytes - partial.at();
            let url = image.at(plain, &format!("blobs/sha256:{}", layer.sha256))?;
            download(client, &url, wanted, &mut partial, &mut self.progress).await?;
            if known.is_none()
                && let Some(text) = layers::find(partial.path(), PAIR_FILE, LONGEST_PAIR_JSON)?
            {
                known = Some(self.take(&text, image).await?);
                self.place.remember_image(&digest, &hex::encode(Sha256::digest(&text)));
            }
            before.push((lock, partial));
            let Some(manifest) = &known else { continue };
            let mut missing = self.missing(manifest)?;
            for (lock, partial) in before.drain(..) {
                layers::unpack(partial.path(), &mut missing, &self.place, &lock, &mut self.progress)?;
                // What it held is in its place.
                partial.remove()?;
            }
            if missing.is_empty() {
                break;
            }
        }
        for (_lock, partial) in before {
            partial.remove()?;
        }
        let Some(manifest) = known else {
            bail!("{image} has no /pair/{PAIR_FILE}: is it an image of a pair? deploy/pair-images makes them")
        };
        let missing: Vec<&str> = self.missing(&manifest)?.into_keys().collect();
        if let Some(first) = missing.first() {
            bail!(
                "{image} has not all that is wanted: {} of its files are missing, {first} the first, or are others than {PAIR_FILE} lists; \
                 is it the image of the other half?",
                missing.len()
            );
        }
        Ok(manifest)
    }

    /// What the folder holds already, where that is the pair of this `pair.json`.
    fn known(&self, sha256: Option<&str>) -> anyhow::Result<Option<PairManifest>> {
        let (Some(sha256), Some(text)) = (sha256, self.place.pair_json()?) else { return Ok(None) };
        if hex::encode(Sha256::digest(&text)) != sha256 {
            return Ok(None);
        }
        Ok(Some(parse(&text)?))
    }

    /// Takes a source's `pair.json`, and the folder for it.
    async fn take(&mut self, text: &[u8], source: &dyn std::fmt::Display) -> anyhow::Result<PairManifest> {
        let found = hex::encode(Sha256::digest(text));
        match &self.pinned {
            Some(pinned) if *pinned != found => {
                return Err(PullError::Digest { from: format!("{PAIR_FILE} of {source}"), found, wanted: pinned.clone() }.into());
            }
            Some(_) => {}
            None => eprintln!("{source}: {PAIR_FILE} has sha256 {found}; --sha256 {found} pins it"),
        }
        let manifest = parse(text).with_context(|| source.to_string())?;
        self.place.settle(text, &manifest, &mut self.progress).await?;
        Ok(manifest)
    }

    /// Whether the pair is known, and nothing of this half missing.
    fn complete(&mut self, known: Option<&PairManifest>) -> Result<bool, PullError> {
        known.map_or(Ok(false), |manifest| Ok(self.missing(manifest)?.is_empty()))
    }

    /// What of this half is not there.
    fn missing<'a>(&mut self, manifest: &'a PairManifest) -> Result<BTreeMap<&'a str, &'a PairFile>, PullError> {
        let mut missing = BTreeMap::new();
        for (name, file) in wanted(manifest, self.half) {
            if !self.place.has(name, file, &mut self.progress)? {
                missing.insert(name, file);
            }
        }
        Ok(missing)
    }
}

/// The files of a half, by name.
pub(crate) fn wanted(manifest: &PairManifest, half: Half) -> BTreeMap<&str, &PairFile> {
    manifest.files.iter().filter(|(_, file)| half.takes(file.part)).map(|(name, file)| (name.as_str(), file)).collect()
}

fn parse(text: &[u8]) -> anyhow::Result<PairManifest> {
    let text = std::str::from_utf8(text).with_context(|| format!("{PAIR_FILE} is no text"))?;
    let manifest = PairManifest::from_json(text).map_err(|e| anyhow::anyhow!(e.message))?;
    if manifest.files.is_empty() {
        bail!("its {PAIR_FILE} lists no files, as those of older versions: `overfill seal FOLDER` writes the list, where the pair lies");
    }
    Ok(manifest)
}
