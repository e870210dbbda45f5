//! The source that is the Kubernetes API: the EndpointSlices of services that carry our labels name the nodes' addresses, and what
//! is there says the rest itself (`places`). Nothing is written: who may read EndpointSlices in one namespace may use it.

mod follower;
mod slices;

use std::sync::atomic::{AtomicBool, Ordering};

use kube::config::Kubeconfig;
use overfill_transport::security::Unusable;

pub(crate) use follower::follow;

/// Label of a service whose endpoints are nodes: which cluster they belong to.
pub const CLUSTER_LABEL: &str = "overfill/cluster";
/// Label of such a service: `prefill` or `decode`.
pub const ROLE_LABEL: &str = "overfill/role";
/// Name of the port at which nodes are asked, where their service has several.
pub const PORT_NAME: &str = "grpc";

/// Whose services.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubernetesSettings {
    /// The namespace that they are in; `None`: this pod's own, or that of the kubeconfig's context.
    pub namespace: Option<String>,
    /// Value of their label [`CLUSTER_LABEL`].
    pub cluster: String,
}

impl KubernetesSettings {
    /// Looks whether there is a way to the API server: this pod's service account, or a kubeconfig. Whether it leads there shows
    /// later: the API server may come up after us.
    ///
    /// # Errors
    /// Where there is none, or the cluster's name can be no label's value.
    pub fn check(&self) -> Result<(), Unusable> {
        let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        let name = &self.cluster;
        if name.len() > 63 || !name.chars().all(fits) || !ends(name.chars().next()) || !ends(name.chars().last()) {
            let why = "a label's value in Kubernetes has at most 63 letters, digits, '-', '_' and '.', a letter or a digit at both ends";
            return Err(Unusable(format!("'{name}' cannot be the cluster's name (--cluster): {why}")));
        }
        let Err(in_pod) = kube::Config::incluster() else { return Ok(()) };
        Kubeconfig::read().map(|_| ()).map_err(|kubeconfig| {
            Unusable(format!(
                "there is no way to the Kubernetes API server: no service account's token is mounted here ({in_pod}), and there is no kubeconfig ({kubeconfig})"
            ))
        })
    }
}

pub(crate) struct Kubernetes {
    settings: KubernetesSettings,
    /// Whether the watch is up.
    watching: AtomicBool,
}

impl Kubernetes {
    pub(crate) fn new(settings: KubernetesSettings) -> Self {
        Self { settings, watching: AtomicBool::new(false) }
    }

    /// Whether the API server answers.
    pub(crate) fn connected(&self) -> bool {
        self.watching.load(Ordering::Relaxed)
    }
}
