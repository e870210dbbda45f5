//! Flags that say where nodes are found, and how processes know each other; every server has them.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use overfill_transport::security::Unusable;
use overfill_transport::{PeerSecurity, PeerSecurityArgs};
use overfill_types::PeerAddress;

use crate::discovery::Discovery;
use crate::etcd::{EtcdSecurity, EtcdSettings};
use crate::kubernetes::KubernetesSettings;

/// Where nodes are found: etcd, the Kubernetes API, or a fixed list of addresses.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Discovery")]
pub struct DiscoveryArgs {
    /// etcd's members, host:port, separated by commas; with https:// before them, or with --etcd-ca, by TLS. It may come up later
    #[arg(long, env = "OVERFILL_ETCD", value_delimiter = ',', value_parser = parse_endpoint, conflicts_with_all = ["prefill_nodes", "decode_nodes"])]
    pub etcd: Vec<EtcdMember>,
    /// Certificates of the authority (PEM) that etcd's certificate has to lead to
    #[arg(long, env = "OVERFILL_ETCD_CA", requires = "etcd")]
    pub etcd_ca: Option<PathBuf>,
    /// Certificate (PEM, with its chain) that is shown to etcd
    #[arg(long, env = "OVERFILL_ETCD_CERT", requires_all = ["etcd_key", "etcd_ca"])]
    pub etcd_cert: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, env = "OVERFILL_ETCD_KEY", requires = "etcd_cert")]
    pub etcd_key: Option<PathBuf>,
    /// User of etcd: it needs to read and write what begins with /overfill/ and the cluster's name
    #[arg(long, env = "OVERFILL_ETCD_USER", requires = "etcd_password_file")]
    pub etcd_user: Option<String>,
    /// File of the user's password
    #[arg(long, env = "OVERFILL_ETCD_PASSWORD_FILE", requires = "etcd_user")]
    pub etcd_password_file: Option<PathBuf>,
    /// Without etcd: kubernetes://NAMESPACE, or kubernetes:// for this pod's own: nodes are the endpoints of the services there that
    /// are labelled overfill/cluster (--cluster) and overfill/role (prefill or decode)
    #[arg(long, env = "OVERFILL_DISCOVER", value_parser = parse_kubernetes, conflicts_with_all = ["etcd", "prefill_nodes", "decode_nodes"])]
    pub discover: Option<Namespace>,
    /// Name of this cluster in etcd or Kubernetes; nodes of other clusters are not seen
    #[arg(long, env = "OVERFILL_CLUSTER", default_value = "default")]
    pub cluster: String,
    /// Seconds after which a node that died is no longer listed in etcd
    #[arg(long, env = "OVERFILL_LEASE_TTL", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=300))]
    pub lease_ttl: u64,
    /// Without etcd: the prefill nodes, host:port, separated by commas
    #[arg(long, env = "OVERFILL_PREFILL_NODES", value_delimiter = ',')]
    pub prefill_nodes: Vec<PeerAddress>,
    /// Without etcd: the decode nodes, host:port, separated by commas. A prefill node that is told them hands over to no others
    #[arg(long, env = "OVERFILL_DECODE_NODES", value_delimiter = ',')]
    pub decode_nodes: Vec<PeerAddress>,
    /// How processes know each other.
    #[command(flatten)]
    pub security: PeerSecurityArgs,
}

/// A member of etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdMember {
    address: PeerAddress,
    tls: bool,
}

/// A namespace of Kubernetes; `None`: the one that this process runs in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace(Option<String>);

impl DiscoveryArgs {
    /// The source that the flags name: etcd, the Kubernetes API, else the fixed list (which for a node may be empty: it is on the router's).
    /// Nothing needs to be up yet.
    ///
    /// # Errors
    /// Where a file of certificates, of a key, a password or a token cannot be used, or there is no way to the Kubernetes API.
    pub fn connect(&self) -> Result<Discovery, Unusable> {
        let security = PeerSecurity::open(&self.security)?;
        if let Some(Namespace(namespace)) = &self.discover {
            let settings = KubernetesSettings { namespace: namespace.clone(), cluster: self.cluster.clone() };
            settings.check()?;
            return Ok(Discovery::kubernetes(settings).secured(security));
        }
        if self.etcd.is_empty() {
            return Ok(Discovery::fixed(self.prefill_nodes.clone(), self.decode_nodes.clone()).secured(security));
        }
        if self.etcd_ca.is_none() && self.etcd.iter().any(|member| member.tls) {
            return Err(Unusable("etcd is to be spoken to by TLS: write --etcd-ca FILE, the authority of its certificate".into()));
        }
        let of_etcd = EtcdSecurity {
            ca: self.etcd_ca.clone(),
            identity: self.etcd_cert.clone().zip(self.etcd_key.clone()),
            user: self.etcd_user.clone().zip(self.etcd_password_file.clone()),
        };
        of_etcd.check()?;
        let settings = EtcdSettings {
            endpoints: self.etcd.iter().map(|member| member.address.clone()).collect(),
            security: of_etcd,
            cluster: self.cluster.clone(),
            lease_ttl: Duration::from_secs(self.lease_ttl),
        };
        Ok(Discovery::etcd(settings).secured(security))
    }
}

/// `host:port` of a member of etcd, or the same as etcd's own tools write it: `http://host:port`, `https://host:port`.
fn parse_endpoint(text: &str) -> Result<EtcdMember, String> {
    let (tls, address) = match text.split_once("://") {
        Some(("http", address)) => (false, address),
        Some(("https", address)) => (true, address),
        Some((scheme, _)) => return Err(format!("'{scheme}' is no way to speak to etcd: http or https is")),
        None => (false, text),
    };
    Ok(EtcdMember { address: address.trim_end_matches('/').parse().map_err(|error| format!("{error}"))?, tls })
}

/// `kubernetes://` and maybe a namespace.
fn parse_kubernetes(text: &str) -> Result<Namespace, String> {
    let Some(namespace) = text.strip_prefix("kubernetes://") else {
        return Err("write kubernetes://NAMESPACE, or kubernetes:// for this pod's own; etcd is named by --etcd".into());
    };
    let name = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    match namespace {
        "" => Ok(Namespace(None)),
        _ if namespace.len() <= 63 && namespace.chars().all(name) => Ok(Namespace(Some(namespace.to_owned()))),
        _ => Err(format!("'{namespace}' is no namespace of Kubernetes: small letters, digits and '-' are")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_named_or_this_pods_own() {
        assert_eq!(parse_kubernetes("kubernetes://"), Ok(Namespace(None)));
        assert_eq!(parse_kubernetes("kubernetes://models-2"), Ok(Namespace(Some("models-2".into()))));
        for wrong in ["k8s://models", "kubernetes://a/b", "kubernetes://A", "etcd:2379", ""] {
            assert!(parse_kubernetes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn members_are_written_as_etcds_tools_write_them() {
        let member = |text| parse_endpoint(text).map(|member| (member.address.to_string(), member.tls));
        assert_eq!(member("etcd-0:2379"), Ok(("etcd-0:2379".into(), false)));
        assert_eq!(member("http://10.0.0.1:2379"), Ok(("10.0.0.1:2379".into(), false)));
        assert_eq!(member("https://etcd-0.etcd:2379/"), Ok(("etcd-0.etcd:2379".into(), true)));
        assert!(member("unix://etcd").is_err() && member("https://etcd").is_err());
    }
}
