//! Which nodes serve a request: a prefill and a decode node are chosen at once, or none is; or one, where one model writes alone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use overfill_cluster::Snapshot;
use overfill_types::{Code, Endpoint, NodeId, PairManifest, Quality, Role, ServiceError};

/// How long a node that failed is left alone, if there is another.
const SUSPICION: Duration = Duration::from_secs(3);

/// What this router has under way on each node, and which nodes failed lately.
#[derive(Clone, Default)]
pub(crate) struct Pairing {
    nodes: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    under_way: HashMap<NodeId, usize>,
    suspects: HashMap<NodeId, Instant>,
}

/// The nodes of one attempt. Dropping it tells that the attempt is over.
pub(crate) struct Chosen {
    pub(crate) nodes: Nodes,
    pairing: Pairing,
}

/// What an attempt asks.
pub(crate) enum Nodes {
    /// One reads, the other writes.
    Both(Both),
    /// One does both.
    One(Endpoint),
}

/// A prefill and a decode node of one pair.
pub(crate) struct Both {
    pub(crate) prefill: Endpoint,
    pub(crate) decode: Endpoint,
}

impl Nodes {
    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Endpoint> {
        match self {
            Self::Both(Both { prefill, decode }) => [Some(prefill), Some(decode)],
            Self::One(node) => [Some(node), None],
        }
        .into_iter()
        .flatten()
    }
}

impl Pairing {
    /// Chooses the least busy of each role that `quality` asks for; suspects and the `excluded` only where there is no other.
    ///
    /// # Errors
    /// [`Code::Unavailable`] naming the half that is missing.
    pub(crate) fn choose(
        &self,
        view: &Snapshot,
        pair: &PairManifest,
        quality: Quality,
        excluded: &[NodeId],
        now: Instant,
    ) -> Result<Chosen, ServiceError> {
        let mut nodes = self.lock();
        nodes.suspects.retain(|_, until| *until > now);
        let pick = |role| {
            view.of(role, &pair.fingerprint)
                .min_by_key(|n| {
                    let shunned = excluded.contains(&n.id) || nodes.suspects.contains_key(&n.id);
                    (shunned, nodes.under_way.get(&n.id).copied().unwrap_or(0), rand::random::<u32>())
                })
                .cloned()
        };
        let chosen = match quality {
            Quality::Overfill => pick(Role::Prefill).zip(pick(Role::Decode)).map(|(prefill, decode)| Nodes::Both(Both { prefill, decode })),
            Quality::Full => pick(Role::Prefill).map(Nodes::One),
            Quality::Decode => pick(Role::Decode).map(Nodes::One),
        };
        let Some(chosen) = chosen else {
            let missing = missing(view, pair);
            return Err(ServiceError::new(Code::Unavailable, format!("{missing}: start one, or try again later")));
        };
        for node in chosen.iter() {
            *nodes.under_way.entry(node.id.clone()).or_default() += 1;
        }
        Ok(Chosen { nodes: chosen, pairing: self.clone() })
    }

    /// Leaves a node alone for a while.
    pub(crate) fn suspect(&self, node: &NodeId, now: Instant) {
        tracing::warn!(%node, "node failed: left alone for a while");
        self.lock().suspects.insert(node.clone(), now + SUSPICION);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Counts are changed one at a time: they are whole whatever panicked beside them.
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Chosen {
    fn drop(&mut self) {
        let mut nodes = self.pairing.lock();
        for Endpoint { id, .. } in self.nodes.iter() {
            if let Some(count) = nodes.under_way.get_mut(id) {
                *count -= 1;
                if *count == 0 {
                    nodes.under_way.remove(id);
                }
            }
        }
    }
}

/// Which half of a pair's nodes is missing, as a sentence; empty if none is.
pub(crate) fn missing(view: &Snapshot, pair: &PairManifest) -> String {
    let lacks = |role| view.of(role, &pair.fingerprint).next().is_none();
    let what = match (lacks(Role::Prefill), lacks(Role::Decode)) {
        (false, false) => return String::new(),
        (true, true) => "no prefill node and no decode node",
        (true, false) => "no prefill node",
        (false, true) => "no decode node",
    };
    format!("{what} of model {} (pair {}) is ready", pair.name, pair.fingerprint.short())
}

#[cfg(test)]
mod tests {
    use overfill_types::pair::{ModelManifest, TokenizerManifest, WeightFormat};
    use overfill_types::{Fingerprint, KvGeometry, KvTransform, ServedPair};

    use super::*;

    fn node(id: &str, role: Role, fingerprint: &str) -> Endpoint {
        Endpoint {
            id: NodeId::new(id),
            role,
            address: "127.0.0.1:1".into(),
            pairs: vec![ServedPair { model: "m".into(), fingerprint: Fingerprint::new(fingerprint) }],
            max_context: 10,
        }
    }

    fn pair() -> PairManifest {
        let model = ModelManifest {
            path: String::new(),
            sha256: String::new(),
            weights: WeightFormat::F32,
            architecture: "llama".into(),
            hidden_size: 1,
            intermediate_size: 1,
            heads: 1,
            vocab_size: 1,
            max_context: 1,
            kv: KvGeometry { layers: 1, kv_heads: 1, head_dim: 2 },
        };
        PairManifest {
            format: 1,
            name: "m".into(),
            fingerprint: Fingerprint::new("ours"),
            full: model.clone(),
            decode: model,
            kv: KvTransform::Identity,
            kv_formats: overfill_types::KvFormats::default(),
            tokenizer: TokenizerManifest { sha256: String::new(), eos_token_ids: vec![] },
            provenance: serde_json::Map::new(),
        }
    }

    fn view() -> Snapshot {
        Snapshot::new([
            node("p1", Role::Prefill, "ours"),
            node("p2", Role::Prefill, "ours"),
            node("d1", Role::Decode, "ours"),
            node("d2", Role::Decode, "ours"),
            node("other", Role::Decode, "theirs"),
        ])
    }

    /// Chooses a pair of nodes.
    fn choose(pairing: &Pairing, view: &Snapshot, excluded: &[NodeId], now: Instant) -> (Chosen, Both) {
        let chosen = pairing.choose(view, &pair(), Quality::Overfill, excluded, now).unwrap();
        let both = match &chosen.nodes {
            Nodes::Both(Both { prefill, decode }) => Both { prefill: prefill.clone(), decode: decode.clone() },
            Nodes::One(node) => panic!("{} alone", node.id),
        };
        (chosen, both)
    }

    #[test]
    fn work_is_spread_and_given_back() {
        let pairing = Pairing::default();
        let now = Instant::now();
        let (held, a) = choose(&pairing, &view(), &[], now);
        let (also, b) = choose(&pairing, &view(), &[], now);
        assert_ne!(a.prefill.id, b.prefill.id);
        assert_ne!(a.decode.id, b.decode.id);
        assert!(b.decode.id != NodeId::new("other"));
        drop((held, also));
        assert!(pairing.lock().under_way.is_empty());
    }

    #[test]
    fn suspects_and_excluded_ones_come_last() {
        let pairing = Pairing::default();
        let now = Instant::now();
        pairing.suspect(&NodeId::new("d1"), now);
        for _ in 0..20 {
            let (_, chosen) = choose(&pairing, &view(), &[NodeId::new("p2")], now);
            assert_eq!((chosen.prefill.id.as_str(), chosen.decode.id.as_str()), ("p1", "d2"));
        }
        let only = Snapshot::new([node("p1", Role::Prefill, "ours"), node("d1", Role::Decode, "ours")]);
        assert_eq!(choose(&pairing, &only, &[], now).1.decode.id.as_str(), "d1");
        let later = now + SUSPICION * 2;
        assert!((0..50).any(|_| choose(&pairing, &view(), &[], later).1.decode.id.as_str() == "d1"));
    }

    #[test]
    fn the_missing_half_is_named_and_nothing_is_taken() {
        let pairing = Pairing::default();
        let half = Snapshot::new([node("p1", Role::Prefill, "ours"), node("d1", Role::Decode, "theirs")]);
        for quality in [Quality::Overfill, Quality::Decode] {
            let error = pairing.choose(&half, &pair(), quality, &[], Instant::now()).err().unwrap();
            assert_eq!(error.code, Code::Unavailable);
            assert!(error.message.contains("no decode node"), "{error}");
            assert!(pairing.lock().under_way.is_empty());
        }
        let full = pairing.choose(&half, &pair(), Quality::Full, &[], Instant::now()).unwrap();
        assert!(matches!(&full.nodes, Nodes::One(node) if node.id.as_str() == "p1"));
        assert_eq!(pairing.lock().under_way.len(), 1);
    }
}
