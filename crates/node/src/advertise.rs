//! Which address a node tells its peers, where no flag says it.
//!
//! A node that listens on one address is reached there. One that listens on every address of its machine is reached at
//! any of them, but its peers need one that is theirs to reach: only where there is no choice is it taken.

use std::net::{IpAddr, SocketAddr};

use overfill_types::{AddressError, PeerAddress};

/// A node that would have to guess where its peers reach it.
#[derive(Debug, thiserror::Error)]
pub enum AdvertiseError {
    /// It listens on every address, and there is none or more than one.
    #[error("it listens on {listening}, every address of this machine, which has {} that peers may reach: write --advertise HOST:PORT, e.g. the pod's IP in Kubernetes", listed(.found))]
    Choice {
        /// Where it listens.
        listening: SocketAddr,
        /// What there is to choose from.
        found: Vec<IpAddr>,
    },
    /// The machine's addresses cannot be read.
    #[error("it listens on {listening}, every address of this machine, and these cannot be read: write --advertise HOST:PORT")]
    Unknown {
        /// Where it listens.
        listening: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// It listens on what is no address for others.
    #[error(transparent)]
    Malformed(#[from] AddressError),
}

/// Where peers reach a node that listens on `listening`.
///
/// # Errors
/// Where that is every address of this machine, and it has not exactly one of that family.
pub(crate) fn reached_at(listening: SocketAddr) -> Result<PeerAddress, AdvertiseError> {
    if !listening.ip().is_unspecified() {
        return Ok(listening.to_string().parse()?);
    }
    let interfaces = if_addrs::get_if_addrs().map_err(|source| AdvertiseError::Unknown { listening, source })?;
    let running = interfaces.iter().filter(|interface| interface.is_oper_up()).map(if_addrs::Interface::ip);
    let address = the_only_one(listening, running)?;
    tracing::info!(%listening, %address, "peers are told this machine's only address; --advertise names another");
    Ok(address)
}

/// The address of `interfaces` that peers may reach, if it is the only one of the family that is listened on.
fn the_only_one(listening: SocketAddr, interfaces: impl Iterator<Item = IpAddr>) -> Result<PeerAddress, AdvertiseError> {
    let same_family = |ip: &IpAddr| ip.is_ipv4() == listening.is_ipv4();
    // A link-local IPv6 address means something only together with an interface of the one who connects.
    let for_peers = |ip: &IpAddr| match ip {
        IpAddr::V4(ip) => !ip.is_loopback(),
        IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
    };
    let found: Vec<IpAddr> = interfaces.filter(same_family).filter(for_peers).collect();
    match found[..] {
        [ip] => Ok(SocketAddr::new(ip, listening.port()).to_string().parse()?),
        _ => Err(AdvertiseError::Choice { listening, found }),
    }
}

/// `no address`, or all of them.
fn listed(found: &[IpAddr]) -> String {
    if found.is_empty() {
        return "no address".into();
    }
    found.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" and ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(listening: &str, interfaces: &[&str]) -> Result<String, String> {
        let interfaces = interfaces.iter().map(|ip| ip.parse().unwrap());
        the_only_one(listening.parse().unwrap(), interfaces).map(|a| a.to_string()).map_err(|e| e.to_string())
    }

    #[test]
    fn the_one_address_that_peers_may_reach_is_taken() {
        let interfaces = ["127.0.0.1", "10.0.0.5", "::1", "fe80::1", "fd00::5"];
        assert_eq!(chosen("0.0.0.0:7001", &interfaces), Ok("10.0.0.5:7001".into()));
        assert_eq!(chosen("[::]:7001", &interfaces), Ok("[fd00::5]:7001".into()));
    }

    #[test]
    fn where_there_is_a_choice_it_is_said_what_to_write() {
        for (listening, interfaces, has) in [
            ("0.0.0.0:7001", &["127.0.0.1", "10.0.0.5", "172.17.0.1"][..], "has 10.0.0.5 and 172.17.0.1 that"),
            ("0.0.0.0:7001", &["127.0.0.1", "fd00::5"], "has no address that"),
            ("[::]:7001", &["::1", "fe80::1", "10.0.0.5"], "has no address that"),
        ] {
            let error = chosen(listening, interfaces).unwrap_err();
            assert!(error.contains(has) && error.contains("--advertise HOST:PORT") && error.contains(listening), "{error}");
        }
    }

    #[test]
    fn an_address_that_is_listened_on_is_told_as_it_is() {
        for listening in ["127.0.0.1:7001", "[::1]:7001", "10.0.0.5:80"] {
            assert_eq!(reached_at(listening.parse().unwrap()).unwrap().as_str(), listening);
        }
    }
}
