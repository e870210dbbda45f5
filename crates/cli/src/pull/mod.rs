//! `overfill pull`: fetches a pair, or the half of it that a process opens, and checks every byte.
//!
//! `pair.json` lists all files with their lengths and sha256; whoever pins its own sha256 has pinned all of them. Nothing is taken that
//! is not on the list, nothing appears under its name before it was checked, and what is there and right is not fetched again.

mod client;
mod credentials;
mod download;
mod error;
mod fill;
mod folder;
mod layers;
mod pace;
mod partial;
mod place;
mod progress;
mod registry;
mod retry;
mod source;
mod token;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;
use overfill_lifecycle::Drain;
use overfill_types::pair_files::Half;

use client::{Client, Patience};
use credentials::Credentials;
pub(crate) use error::PullError;
use fill::{Fill, wanted};
use folder::Folder;
use place::Place;
use progress::size;
use source::Source;

#[derive(Args)]
#[command(after_help = "Examples:
  overfill pull https://files.example/smollm2-135m/ --sha256 SHA --half prefill --to /pairs/smollm2-135m
  overfill pull oci://registry.example/smollm2-135m-decode@sha256:DIGEST --half decode --to /pairs/smollm2-135m

SHA is what `overfill seal` and `sha256sum pair.json` print: pair.json has the sha256 of every other file. An image has the pair in \
/pair, as deploy/pair-images makes it. HTTP_PROXY, HTTPS_PROXY and NO_PROXY are heeded.
Exit status: 0 all is there, 1 it cannot be had like this, 75 it may be had later.")]
pub(crate) struct PullArgs {
    /// A folder on a server (https://, http://), a folder here (file:// or a path), or an image (oci://)
    #[arg(env = "OVERFILL_PULL_SOURCE")]
    source: Source,
    /// The folder to fill: that of one pair; any number of processes may fill it at once
    #[arg(long, env = "OVERFILL_PULL_TO")]
    to: PathBuf,
    /// What is needed: router, prefill, decode or all
    #[arg(long, env = "OVERFILL_PULL_HALF", default_value = "all")]
    half: Half,
    /// sha256 of pair.json, by which everything is checked; without it, what the source says of itself is believed
    #[arg(long, env = "OVERFILL_PULL_SHA256", value_parser = digest)]
    sha256: Option<String>,
    /// Authorities that are trusted beside the system's, in PEM
    #[arg(long, env = "OVERFILL_PULL_CA_FILE")]
    ca_file: Option<PathBuf>,
    /// Users and passwords by host, as docker, podman and Kubernetes keep them (config.json, auth.json, .dockerconfigjson)
    #[arg(long, env = "OVERFILL_PULL_AUTH_FILE")]
    auth_file: Option<PathBuf>,
    /// A token that the source is sent (Authorization: Bearer)
    #[arg(long, env = "OVERFILL_PULL_TOKEN_FILE", conflicts_with = "auth_file")]
    token_file: Option<PathBuf>,
    /// The registry speaks HTTP without TLS
    #[arg(long, env = "OVERFILL_PULL_PLAIN_HTTP")]
    plain_http: bool,
    /// Seconds that a connection may take
    #[arg(long, env = "OVERFILL_PULL_CONNECT_TIMEOUT", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..))]
    connect_timeout: u16,
    /// Seconds in which 16 KiB have to come
    #[arg(long, env = "OVERFILL_PULL_SILENCE", default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..))]
    silence: u16,
    /// Failures in a row, nothing coming between them, after which it is given up
    #[arg(long, env = "OVERFILL_PULL_ATTEMPTS", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=100))]
    attempts: u32,
    /// Read files that are there, though nothing has changed about them since they were checked
    #[arg(long, env = "OVERFILL_PULL_REREAD")]
    reread: bool,
}

fn digest(text: &str) -> Result<String, String> {
    let digits = text.strip_prefix("sha256:").unwrap_or(text).to_ascii_lowercase();
    match digits.len() == 64 && digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        true => Ok(digits),
        false => Err("64 hexadecimal digits are wanted".into()),
    }
}

pub(crate) fn run(args: &PullArgs) -> anyhow::Result<()> {
    // One thread: it waits for the network, and then for the disk.
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        // As the first process of a container it would not be ended by a signal.
        let stop = Drain::on_signal()?;
        tokio::select! {
            done = pull(args) => done,
            () = stop.signaled() => bail!("stopped; what came is kept, and the next pull goes on from there"),
        }
    })
}

async fn pull(args: &PullArgs) -> anyhow::Result<()> {
    let begun = Instant::now();
    let mut fill = Fill::new(Place::open(&args.to, args.reread)?, args.half, args.sha256.clone());
    let manifest = match &args.source {
        Source::Folder(path) => fill.folder(Folder::Here(path)).await?,
        Source::Web(url) => fill.folder(Folder::Web(&args.client()?, url)).await?,
        Source::Image(image) => fill.image(&args.client()?, image, args.plain_http).await?,
    };
    let (seconds, fetched) = (begun.elapsed().as_secs_f64(), size(fill.end()));
    let wanted = wanted(&manifest, args.half);
    let all: u64 = wanted.values().map(|file| file.bytes).sum();
    eprintln!("{}: {} files, {}, are there; {fetched} came in {seconds:.1} s", manifest.name, wanted.len(), size(all));
    println!("{}", args.to.display());
    Ok(())
}

impl PullArgs {
    fn client(&self) -> anyhow::Result<Client> {
        let credentials = match (&self.token_file, &self.auth_file, self.source.host()) {
            (Some(file), _, _) => Credentials::token(file)?,
            (None, Some(file), Some((host, at_once))) => Credentials::of_host(file, &host, at_once)?,
            _ => Credentials::None,
        };
        let seconds = |n: u16| Duration::from_secs(n.into());
        let patience = Patience { connect: seconds(self.connect_timeout), silence: seconds(self.silence), attempts: self.attempts };
        Client::new(self.ca_file.as_deref(), credentials, patience)
    }
}
