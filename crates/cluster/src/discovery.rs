//! One small interface over the four sources, and how those who find each other know each other.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use overfill_transport::push::Within;
use overfill_transport::{Connector, PeerSecurity};
use overfill_types::{NodeInfo, PeerAddress};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::etcd::{Etcd, EtcdSettings};
use crate::fixed::Addresses;
use crate::kubernetes::{Kubernetes, KubernetesSettings};
use crate::snapshot::Snapshot;
use crate::{etcd, fixed, kubernetes, memory};

/// How long a withdrawal may take before the lease's end has to do.
const WITHDRAWAL_LIMIT: Duration = Duration::from_secs(3);

/// Where nodes are found, and register if need be: etcd, the Kubernetes API, a fixed list, or this process; and how they know each other. Clones share it.
#[derive(Clone)]
pub struct Discovery {
    view: watch::Sender<Arc<Snapshot>>,
    source: Source,
    security: PeerSecurity,
    within: Within,
    /// Keeps the view current, from when it is first asked for; ends with the last clone. A node asks for none.
    follower: Arc<OnceLock<Option<AbortOnDropHandle<()>>>>,
}

#[derive(Clone)]
enum Source {
    Memory,
    Fixed(Addresses),
    Etcd(Arc<Etcd>),
    Kubernetes(Arc<Kubernetes>),
}

impl Discovery {
    fn new(source: Source) -> Self {
        Self {
            view: watch::Sender::default(),
            source,
            security: PeerSecurity::default(),
            within: Within::default(),
            follower: Arc::default(),
        }
    }

    /// Within this process.
    pub fn memory() -> Self {
        Self::new(Source::Memory)
    }

    /// Nodes at known addresses; those that say they are ready are listed.
    pub fn fixed(prefill: Vec<PeerAddress>, decode: Vec<PeerAddress>) -> Self {
        Self::new(Source::Fixed(Addresses { prefill, decode }))
    }

    /// An etcd cluster, which need not be there yet.
    pub fn etcd(settings: EtcdSettings) -> Self {
        Self::new(Source::Etcd(Arc::new(Etcd::new(settings))))
    }

    /// What the Kubernetes API lists, which need not be there yet.
    pub fn kubernetes(settings: KubernetesSettings) -> Self {
        Self::new(Source::Kubernetes(Arc::new(Kubernetes::new(settings))))
    }

    /// The same, of nodes that know each other by `security`. To be said before anything is asked.
    pub fn secured(self, security: PeerSecurity) -> Self {
        Self { security, ..self }
    }

    /// How the processes that find each other here know each other.
    pub fn security(&self) -> &PeerSecurity {
        &self.security
    }

    /// What connects to nodes that are found here.
    pub fn connector(&self) -> Connector {
        Connector::secured(self.security.clone())
    }

    /// The decode nodes of this process.
    pub fn within(&self) -> &Within {
        &self.within
    }

    /// The current view, and every later one. While the source is away it keeps those nodes that answer.
    /// Must be called inside a tokio runtime.
    pub fn watch(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.follower.get_or_init(|| {
            let (view, connector) = (self.view.clone(), self.connector());
            let following = match &self.source {
                Source::Memory => return None,
                Source::Fixed(addresses) => tokio::spawn(fixed::follow(addresses.clone(), connector, view)),
                Source::Etcd(etcd) => tokio::spawn(etcd::follow(etcd.clone(), connector, view)),
                Source::Kubernetes(kubernetes) => tokio::spawn(kubernetes::follow(kubernetes.clone(), connector, view)),
            };
            Some(AbortOnDropHandle::new(following))
        });
        self.view.subscribe()
    }

    /// Whether etcd or the Kubernetes API answers, where nodes are found there: then the view is current. A node that looks for no
    /// others asks Kubernetes nothing, and has none.
    pub fn connected(&self) -> Option<bool> {
        match &self.source {
            Source::Etcd(etcd) => Some(etcd.connected()),
            Source::Kubernetes(kubernetes) => self.follower.get().map(|_| kubernetes.connected()),
            Source::Memory | Source::Fixed(_) => None,
        }
    }

    /// Whether nodes register here, and so need an address to register.
    pub fn registers(&self) -> bool {
        matches!(self.source, Source::Memory | Source::Etcd(_))
    }

    /// Whether all decode nodes are found here: a list may be the router's alone.
    pub fn knows_decode_nodes(&self) -> bool {
        match &self.source {
            Source::Fixed(addresses) => !addresses.decode.is_empty(),
            Source::Memory | Source::Etcd(_) | Source::Kubernetes(_) => true,
        }
    }

    /// Lists a node as ready until the registration is withdrawn or dropped. Returns at once: if the source is away,
    /// it registers when the source comes, and again whenever its entry was lost. With a fixed list, or where Kubernetes lists the
    /// node's pod, there is nothing to do.
    pub fn register(&self, node: NodeInfo) -> Registration {
        let stop = CancellationToken::new();
        let task = match &self.source {
            Source::Fixed(_) | Source::Kubernetes(_) => None,
            Source::Memory => Some(tokio::spawn(memory::hold(self.view.clone(), node, stop.clone()))),
            Source::Etcd(etcd) => {
                let watches = self.follower.get().is_some();
                Some(tokio::spawn(etcd::hold(etcd.clone(), node, watches, stop.clone())))
            }
        };
        Registration { stop, task }
    }
}

/// A node's entry. Dropping it withdraws the entry in the background.
#[must_use = "dropping a registration withdraws the node"]
pub struct Registration {
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl Registration {
    /// Waits until the node is not kept registered any more, which nobody has asked for. Never comes where nothing keeps it.
    pub async fn lost(&mut self) {
        match &mut self.task {
            Some(task) => {
                let _ = task.await;
                self.task = None;
            }
            None => std::future::pending().await,
        }
    }

    /// Withdraws the entry and waits (at most some seconds) until it is gone.
    pub async fn withdraw(mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take()
            && tokio::time::timeout(WITHDRAWAL_LIMIT, task).await.is_err()
        {
            tracing::warn!("the node could not be withdrawn in time: its lease will end");
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
