//! Whether a node hands KV caches over, or takes them, from GPU to GPU.

use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args};
use overfill_nccl::{Nccl, NcclError};
use overfill_transport::PeerSecurity;

/// What a node is told of NCCL.
#[derive(Args, Clone, Debug, Default)]
pub struct NcclArgs {
    /// Whether KV caches go from GPU to GPU by NCCL, to and from nodes that are told the same: on or off. Needs --device cuda:N and
    /// libnccl.so.2; others, and those that NCCL fails with, are handed over to by TCP
    #[arg(long, env = "OVERFILL_NCCL", default_value = "off", action = ArgAction::Set, value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub nccl: bool,
}

/// Why a node that is told to use NCCL cannot.
#[derive(Debug, thiserror::Error)]
pub enum NcclUnusable {
    /// Its model is not on a GPU.
    #[error("--nccl on sends from one GPU's memory, and --device is {0}: give it --device cuda:N, or leave out --nccl")]
    NoGpu(String),
    /// Peers know each other by certificates or a token.
    #[error("--nccl on sends KV caches in plain text and asks nobody who they are: leave it out where nodes have TLS or a token")]
    Secured,
    /// The libraries are not there, or the GPU is not.
    #[error(transparent)]
    Failed(#[from] NcclError),
}

impl NcclArgs {
    /// What a node on these devices sends and receives by; `None` where it is told not to.
    ///
    /// # Errors
    /// Where it is told to and cannot.
    pub fn open(&self, devices: &[String], security: &PeerSecurity) -> Result<Option<Nccl>, NcclUnusable> {
        if !self.nccl {
            return Ok(None);
        }
        let gpu = match devices {
            [device] => device.strip_prefix("cuda:").and_then(|number| number.parse().ok()),
            _ => None,
        };
        let gpu = gpu.ok_or_else(|| NcclUnusable::NoGpu(devices.join(",")))?;
        if !security.is_open() {
            return Err(NcclUnusable::Secured);
        }
        let nccl = Nccl::open(gpu)?;
        tracing::info!(version = nccl.library().version(), gpu, "NCCL");
        Ok(Some(nccl))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_used_says_why() {
        let open = |nccl, device: &str| NcclArgs { nccl }.open(&[device.to_owned()], &PeerSecurity::default()).map(|nccl| nccl.is_some());
        assert!(!open(false, "cuda:0").unwrap());
        assert!(open(true, "cpu").unwrap_err().to_string().contains("--device is cpu"));
        // Machines without a driver, or without NCCL; on others it opens.
        if let Err(missing) = open(true, "cuda:0") {
            assert!(missing.to_string().contains("cannot be used") && missing.to_string().contains("leave out --nccl"), "{missing}");
        }
    }
}
