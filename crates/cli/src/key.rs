//! `overfill key`: a key for a client, and what the router's file of keys has to say of it.

use clap::Args;
use rand::TryRngCore;
use rand::rngs::OsRng;
use serde_json::json;
use sha2::{Digest, Sha256};

/// Bytes of a key that are drawn: more than can be guessed.
const RANDOM: usize = 24;

#[derive(Args)]
#[command(
    after_help = "Example:\n  overfill key --name team-a\n\nThe file of keys is {\"clients\": [ENTRY, …]}; a router takes a changed one within a second or two."
)]
pub(crate) struct KeyArgs {
    /// The client's name
    #[arg(long)]
    name: String,
}

pub(crate) fn run(args: KeyArgs) -> anyhow::Result<()> {
    let mut random = [0; RANDOM];
    OsRng.try_fill_bytes(&mut random)?;
    let key = format!("sk-{}", hex::encode(random));
    let entry = json!({ "name": args.name, "sha256": [hex::encode(Sha256::digest(&key))] });
    println!("key for the client, which is kept nowhere: {key}\nentry for the file of keys: {entry}");
    Ok(())
}
