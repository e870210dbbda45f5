//! `overfill seal`: writes into pair.json which files a pair has, with their sha256.

use std::path::PathBuf;

use clap::Args;
use overfill_model::pair::file_sha256;
use overfill_model::pair_files::seal;
use overfill_types::pair::PAIR_FILE;

use crate::progress::spinner;

#[derive(Args)]
#[command(after_help = "`overfill pair` does so itself: this is for pairs of older versions, and after the chat template in \
tokenizer_config.json was changed. The fingerprint stays the same. What is printed is the sha256 of pair.json, which \
`overfill pull --sha256` takes.")]
pub(crate) struct SealArgs {
    /// The pair's folder
    pair: PathBuf,
}

pub(crate) fn run(args: &SealArgs) -> anyhow::Result<()> {
    let waiting = spinner("hashing files");
    let pair = seal(&args.pair)?;
    waiting.finish_and_clear();
    println!("{}", file_sha256(&pair.dir.join(PAIR_FILE))?);
    Ok(())
}
