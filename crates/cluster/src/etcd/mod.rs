//! The source that is an etcd cluster: a key under a lease for each node (`registration`), and a watch over all of them
//! (`follower`).
//!
//! etcd may come later than the nodes and may go away while they serve: nothing needs a restart.

mod follower;
mod registration;
mod security;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Error};
use overfill_types::PeerAddress;
use tokio::sync::watch;
use tokio::time::timeout;

pub(crate) use follower::follow;
pub(crate) use registration::hold;
pub use security::EtcdSecurity;

/// Time for one answer of etcd.
const LIMIT: Duration = Duration::from_secs(2);
/// How often a silent connection is tried. etcd breaks off those that are tried more often than every 5 s
/// (its `--grpc-keepalive-min-time`), or while nothing is asked on them.
const KEEP_ALIVE: Duration = Duration::from_secs(6);

/// Longest wait between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Which etcd, and how.
#[derive(Clone, Debug)]
pub struct EtcdSettings {
    /// Its members.
    pub endpoints: Vec<PeerAddress>,
    /// How it is known, and knows us.
    pub security: EtcdSecurity,
    /// Nodes of other clusters are not seen.
    pub cluster: String,
    /// How long etcd lists a node that has died.
    pub lease_ttl: Duration,
}

pub(crate) struct Etcd {
    settings: EtcdSettings,
    /// Whether the watch over the nodes is up.
    watching: watch::Sender<bool>,
    /// Whether this process's node was registered when etcd was last asked.
    registered: AtomicBool,
}

impl Etcd {
    pub(crate) fn new(settings: EtcdSettings) -> Self {
        Self { settings, watching: watch::Sender::new(false), registered: AtomicBool::new(false) }
    }

    /// Whether it answers, as far as this process has to do with it.
    pub(crate) fn connected(&self) -> bool {
        *self.watching.borrow() || self.registered.load(Ordering::Relaxed)
    }

    async fn connect(&self) -> Result<Client, Error> {
        let options = self.settings.security.add_to(ConnectOptions::new()).map_err(|error| Error::InvalidArgs(error.to_string()))?;
        let options =
            options.with_connect_timeout(LIMIT).with_timeout(LIMIT).with_keep_alive(KEEP_ALIVE, LIMIT).with_keep_alive_while_idle(false);
        let endpoints: Vec<&str> = self.settings.endpoints.iter().map(PeerAddress::as_str).collect();
        within(Client::connect(&endpoints, Some(options))).await
    }

    /// Prefix of all nodes' keys.
    fn prefix(&self) -> String {
        format!("/overfill/{}/nodes/", self.settings.cluster)
    }
}

/// An answer within [`LIMIT`], or an error: a stopped etcd is silent.
async fn within<T>(answer: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match timeout(LIMIT, answer).await {
        Ok(answer) => answer,
        Err(_) => Err(Error::IoError(std::io::Error::new(std::io::ErrorKind::TimedOut, "etcd did not answer in time"))),
    }
}
