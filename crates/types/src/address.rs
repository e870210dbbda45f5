//! Where a server is reached: a host and a port that were checked when they came in.
//!
//! **Invariant:** whoever holds one can connect to it without looking at its form again. Flags, etcd's values and lists of
//! nodes are parsed at the edge, so no request meets an address that is none.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// `host:port` of a server that others connect to. The host is a name, an IPv4 address, or an IPv6 address in brackets;
/// it is never the unspecified address, and the port is never 0.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PeerAddress(String);

/// A text that is no address, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is no address that peers can reach: {why}; write HOST:PORT, e.g. 10.0.0.5:7001, node-1.example:7001 or [fd00::5]:7001")]
pub struct AddressError {
    text: String,
    why: &'static str,
}

impl PeerAddress {
    /// As it is written: `host:port`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PeerAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match check(text) {
            Ok(()) => Ok(Self(text.to_owned())),
            Err(why) => Err(AddressError { text: text.to_owned(), why }),
        }
    }
}

impl TryFrom<String> for PeerAddress {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<PeerAddress> for String {
    fn from(address: PeerAddress) -> Self {
        address.0
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why `text` is no address.
fn check(text: &str) -> Result<(), &'static str> {
    if text.contains("://") {
        return Err("it has a scheme in front");
    }
    let (host, port) = text.rsplit_once(':').ok_or("the port is missing")?;
    check_host(host)?;
    // Digits alone: `parse` takes a plus sign, which a URI does not.
    match port.parse::<u16>() {
        Ok(0) => Err("nothing can be reached at port 0"),
        Ok(_) if port.bytes().all(|b| b.is_ascii_digit()) => Ok(()),
        _ => Err("the port is no number from 1 to 65535"),
    }
}

fn check_host(host: &str) -> Result<(), &'static str> {
    let ip = if let Some(inner) = host.strip_prefix('[') {
        let inner = inner.strip_suffix(']').ok_or("the port is missing, or a bracket")?;
        IpAddr::V6(inner.parse::<Ipv6Addr>().map_err(|_| "there is no IPv6 address in the brackets")?)
    } else if host.contains(':') {
        return Err("an IPv6 address stands in brackets");
    } else if looks_like_ipv4(host) {
        IpAddr::V4(host.parse::<Ipv4Addr>().map_err(|_| "its host is no IPv4 address")?)
    } else {
        return check_name(host);
    };
    if ip.to_canonical().is_unspecified() {
        return Err("its host stands for every address of a machine, not for one");
    }
    Ok(())
}

/// A host whose last part is a number is one, as resolvers see it: `0` and `10.1` are addresses to them.
fn looks_like_ipv4(host: &str) -> bool {
    let last = host.rsplit('.').next().unwrap_or(host);
    !last.is_empty() && last.bytes().all(|b| b.is_ascii_digit())
}

/// A name as DNS and `/etc/hosts` know them.
fn check_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty() {
        return Err("the host is missing");
    }
    if name.len() > 253 {
        return Err("its host is longer than 253 characters");
    }
    let labels = name.strip_suffix('.').unwrap_or(name).split('.');
    let good = |label: &str| !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if labels.into_iter().all(good) { Ok(()) } else { Err("its host is no name and no IP address") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_as_they_are_written() {
        for text in ["127.0.0.1:1", "10.0.0.5:65535", "node-1:7001", "prefill_2.ns.svc.cluster.local.:7001", "[::1]:7001", "[fd00::5]:80"] {
            let address: PeerAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
            assert_eq!(serde_json::to_string(&address).unwrap(), format!("\"{text}\""));
            assert_eq!(serde_json::from_str::<PeerAddress>(&format!("\"{text}\"")).unwrap(), address);
        }
    }

    #[test]
    fn what_nobody_could_reach_is_refused_with_a_sentence() {
        for (text, why) in [
            ("", "port is missing"),
            ("node-1", "port is missing"),
            ("[::1]", "port is missing, or a bracket"),
            (":7001", "host is missing"),
            ("node-1:", "no number"),
            ("node-1:0", "port 0"),
            ("node-1:65536", "no number"),
            ("node-1:+80", "no number"),
            ("node-1:7001/x", "no number"),
            ("http://node-1:7001", "scheme"),
            ("0.0.0.0:7001", "every address"),
            ("[::]:7001", "every address"),
            ("[::ffff:0.0.0.0]:7001", "every address"),
            ("0:7001", "no IPv4"),
            ("10.0.0:7001", "no IPv4"),
            ("10.0.0.256:7001", "no IPv4"),
            ("fd00::5:7001", "brackets"),
            ("[fe80::1%eth0]:7001", "no IPv6"),
            ("[node-1]:7001", "no IPv6"),
            ("node 1:7001", "no name"),
            (" node-1:7001", "no name"),
            ("node-1:7001 ", "no number"),
            ("user@node-1:7001", "no name"),
            ("a..b:7001", "no name"),
            ("nöde:7001", "no name"),
        ] {
            let error = text.parse::<PeerAddress>().unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("HOST:PORT"), "{text}: {error}");
            assert!(serde_json::from_value::<PeerAddress>(text.into()).is_err(), "{text}");
        }
    }
}
