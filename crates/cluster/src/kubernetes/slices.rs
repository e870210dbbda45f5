//! EndpointSlices, read as the places of nodes.

use std::collections::BTreeMap;

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointSlice};
use kube::ResourceExt;
use overfill_types::{PeerAddress, Role};

use super::{PORT_NAME, ROLE_LABEL};
use crate::places::{Place, Standing};

/// All slices of the cluster's services, by name.
#[derive(Default)]
pub(super) struct Slices(BTreeMap<String, Vec<(Place, Standing)>>);

impl Slices {
    /// These.
    pub(super) fn of(slices: Vec<EndpointSlice>) -> Self {
        let mut all = Self::default();
        for slice in slices {
            all.put(slice);
        }
        all
    }

    /// One that is new or has changed; whether its places have.
    pub(super) fn put(&mut self, slice: EndpointSlice) -> bool {
        let places = places(&slice);
        self.0.insert(slice.name_any(), places.clone()).as_ref() != Some(&places)
    }

    /// One that is gone; whether any place was in it.
    pub(super) fn remove(&mut self, slice: &EndpointSlice) -> bool {
        self.0.remove(&slice.name_any()).is_some_and(|places| !places.is_empty())
    }

    /// All places. One in two slices (they are merged and split by Kubernetes, and an address may be given to another pod) is what
    /// the better of them says.
    pub(super) fn places(&self) -> BTreeMap<Place, Standing> {
        let mut all = BTreeMap::new();
        for (place, standing) in self.0.values().flatten() {
            let known = all.entry(place.clone()).or_insert(*standing);
            *known = (*known).max(*standing);
        }
        all
    }
}

/// What a slice names. One without a role or a port of ours, or an address that is none, is left out, and told.
fn places(slice: &EndpointSlice) -> Vec<(Place, Standing)> {
    let role = match slice.labels().get(ROLE_LABEL).map(String::as_str) {
        Some("prefill") => Role::Prefill,
        Some("decode") => Role::Decode,
        other => {
            tracing::warn!(slice = slice.name_any(), role = other, "the label {ROLE_LABEL} is neither 'prefill' nor 'decode': left out");
            return Vec::new();
        }
    };
    let ports = slice.ports.as_deref().unwrap_or_default();
    let named = ports.iter().find(|port| port.name.as_deref() == Some(PORT_NAME));
    let port = match (named, ports) {
        (Some(port), _) | (None, [port]) => port.port,
        _ => None,
    };
    let Some(port) = port else {
        tracing::warn!(slice = slice.name_any(), "a slice with no port '{PORT_NAME}' and not one port alone: left out");
        return Vec::new();
    };
    let place = |endpoint: &Endpoint| {
        // All addresses of an endpoint are one pod's; the first is the one to take.
        let host = endpoint.addresses.first()?;
        let address = if slice.address_type == "IPv6" { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        match address.parse::<PeerAddress>() {
            Ok(address) => Some(((role, address), standing(endpoint.conditions.as_ref()))),
            Err(error) => {
                tracing::warn!(slice = slice.name_any(), %error, "an endpoint that nobody can reach: left out");
                None
            }
        }
    };
    slice.endpoints.iter().filter_map(place).collect()
}

/// What is not said of an endpoint counts as the best, as Kubernetes has it.
fn standing(conditions: Option<&EndpointConditions>) -> Standing {
    let Some(conditions) = conditions else { return Standing::Vouched };
    if conditions.terminating.unwrap_or(false) {
        Standing::Leaving
    } else if conditions.serving.or(conditions.ready).unwrap_or(true) {
        Standing::Vouched
    } else {
        Standing::Named
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn slice(name: &str, role: &str, endpoints: Value) -> EndpointSlice {
        serde_json::from_value(json!({
            "metadata": { "name": name, "labels": { ROLE_LABEL: role } }, "addressType": "IPv4",
            "ports": [{ "name": "admin", "port": 9100 }, { "name": "grpc", "port": 7002 }], "endpoints": endpoints,
        }))
        .unwrap()
    }

    fn seen(slices: &Slices) -> Vec<(String, Standing)> {
        slices.places().into_iter().map(|((role, address), standing)| (format!("{role} {address}"), standing)).collect()
    }

    #[test]
    fn endpoints_are_places_in_their_standing() {
        let endpoints = json!([
            { "addresses": ["10.0.0.1"] },
            { "addresses": ["10.0.0.2"], "conditions": { "ready": true, "serving": true, "terminating": false } },
            { "addresses": ["10.0.0.3"], "conditions": { "ready": false, "serving": false } },
            { "addresses": ["10.0.0.4"], "conditions": { "ready": false, "serving": true, "terminating": true } },
            { "addresses": ["10.0.0.5"], "conditions": { "ready": false } },
            { "addresses": ["0.0.0.0"] },
            { "addresses": [] },
        ]);
        let slices = Slices::of(vec![slice("a", "decode", endpoints)]);
        let expected = [
            ("decode 10.0.0.1:7002", Standing::Vouched),
            ("decode 10.0.0.2:7002", Standing::Vouched),
            ("decode 10.0.0.3:7002", Standing::Named),
            ("decode 10.0.0.4:7002", Standing::Leaving),
            ("decode 10.0.0.5:7002", Standing::Named),
        ];
        assert_eq!(seen(&slices), expected.map(|(place, standing)| (place.to_owned(), standing)));
    }

    #[test]
    fn slices_come_change_and_go() {
        let mut slices = Slices::of(vec![slice("a", "prefill", json!([{ "addresses": ["10.0.0.1"] }]))]);
        let leaving = json!([{ "addresses": ["10.0.0.1"], "conditions": { "terminating": true } }, { "addresses": ["10.0.0.2"] }]);
        assert!(slices.put(slice("b", "prefill", leaving.clone())));
        assert!(!slices.put(slice("b", "prefill", leaving)), "nothing that matters has changed");
        let vouched = |port: &str| (format!("prefill {port}:7002"), Standing::Vouched);
        assert_eq!(seen(&slices), [vouched("10.0.0.1"), vouched("10.0.0.2")], "another pod has the address");
        assert!(slices.remove(&slice("a", "prefill", json!([]))));
        assert_eq!(seen(&slices), [("prefill 10.0.0.1:7002".into(), Standing::Leaving), vouched("10.0.0.2")]);
        assert!(!slices.remove(&slice("a", "prefill", json!([]))));
        assert!(slices.put(slice("b", "cook", json!([{ "addresses": ["10.0.0.1"] }]))));
        assert!(seen(&slices).is_empty());
    }

    #[test]
    fn ports_and_families_are_read() {
        let of = |ports: Value, family: &str, address: &str| {
            let mut slice = slice("a", "decode", json!([{ "addresses": [address] }]));
            slice.ports = serde_json::from_value(ports).unwrap();
            slice.address_type = family.into();
            seen(&Slices::of(vec![slice])).into_iter().map(|(place, _)| place).collect::<Vec<_>>()
        };
        assert_eq!(of(json!([{ "port": 7 }]), "IPv6", "fd00::5"), ["decode [fd00::5]:7"]);
        assert_eq!(of(json!([{ "name": "x", "port": 8 }]), "FQDN", "node.example"), ["decode node.example:8"]);
        assert!(of(json!([{ "name": "x", "port": 8 }, { "name": "y", "port": 9 }]), "IPv4", "10.0.0.1").is_empty());
        assert!(of(json!([]), "IPv4", "10.0.0.1").is_empty());
    }
}
