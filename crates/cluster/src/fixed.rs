//! The source that is a list of addresses: each is asked for its status, and listed while it says that it is ready. One that is
//! silent is given up as in `membership`: after some probes, and not where all are silent.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use overfill_proto::v1::{NodeStatus, Phase};
use overfill_transport::Connector;
use overfill_types::{Fingerprint, NodeId, NodeInfo, PeerAddress, Role, ServedPair};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::membership::TRIES;
use crate::probe::{self, NoStatus};
use crate::snapshot::{Snapshot, publish};

/// Time between two questions.
const INTERVAL: Duration = Duration::from_secs(1);

/// The addresses of a fixed list, by what they hold.
#[derive(Clone, Debug)]
pub(crate) struct Addresses {
    pub(crate) prefill: Vec<PeerAddress>,
    pub(crate) decode: Vec<PeerAddress>,
}

/// A node's place in the list.
type Place = (Role, PeerAddress);

/// Keeps the view current, for as long as it runs.
pub(crate) async fn follow(addresses: Addresses, connector: Connector, view: watch::Sender<Arc<Snapshot>>) {
    let Addresses { prefill, decode } = addresses;
    let of = |role, addresses: Vec<PeerAddress>| addresses.into_iter().map(move |address| (role, address));
    let places: BTreeSet<Place> = of(Role::Prefill, prefill).chain(of(Role::Decode, decode)).collect();
    let mut known = Known::default();
    loop {
        // As many at a time as were named.
        let asked: JoinSet<_> = places.iter().cloned().map(|place| ask(connector.clone(), place)).collect();
        known.answered(asked.join_all().await);
        publish(&view, Snapshot::new(known.0.values().map(|(node, _)| node.clone())));
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Nodes that were ready when they last answered, and how many probes each has not answered since.
#[derive(Default)]
struct Known(BTreeMap<Place, (NodeInfo, u32)>);

impl Known {
    /// What each place answered: a node that is ready, or that none is.
    fn answered(&mut self, answers: Vec<(Place, Result<Option<NodeInfo>, NoStatus>)>) {
        if answers.iter().all(|(_, answer)| matches!(answer, Err(NoStatus::Silent))) {
            // It is this process that is cut off: that says nothing of any node.
            return;
        }
        for (place, answer) in answers {
            match answer {
                Ok(Some(node)) => drop(self.0.insert(place, (node, 0))),
                Ok(None) | Err(NoStatus::Refused) => drop(self.0.remove(&place)),
                Err(NoStatus::Silent) => {
                    let given_up = self.0.get_mut(&place).is_some_and(|(_, silent)| {
                        *silent += 1;
                        *silent >= TRIES
                    });
                    if given_up {
                        self.0.remove(&place);
                    }
                }
            }
        }
    }
}

async fn ask(connector: Connector, place: Place) -> (Place, Result<Option<NodeInfo>, NoStatus>) {
    let (role, address) = place.clone();
    let node = |status: NodeStatus| {
        (status.phase() == Phase::Ready).then(|| NodeInfo {
            id: NodeId::new(status.node_id),
            role,
            address: address.clone(),
            pairs: status.pairs.into_iter().map(|p| ServedPair { model: p.model, fingerprint: Fingerprint::new(p.fingerprint) }).collect(),
            max_context: status.max_context as usize,
        })
    };
    let answer = probe::ask(&connector, role, &address).await.map(node);
    (place, answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_believed_where_others_answer() {
        let place = |port: u16| (Role::Decode, format!("127.0.0.1:{port}").parse::<PeerAddress>().unwrap());
        let node = |port: u16| {
            let (role, address) = place(port);
            NodeInfo { id: NodeId::new(port.to_string()), role, address, pairs: vec![], max_context: 8 }
        };
        let ready = |port| (place(port), Ok(Some(node(port))));
        let silent = |port| (place(port), Err(NoStatus::Silent));
        let mut known = Known::default();
        let mut after = |answers| {
            known.answered(answers);
            known.0.values().map(|(node, _)| node.id.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(after(vec![ready(1), silent(2)]), ["1"]);
        assert_eq!(after(vec![ready(1), ready(2)]), ["1", "2"]);
        assert_eq!(after(vec![silent(1), ready(2)]), ["1", "2"], "one missed answer is forgiven");
        assert_eq!(after(vec![ready(1), ready(2)]), ["1", "2"]);
        for _ in 0..5 {
            assert_eq!(after(vec![silent(1), silent(2)]), ["1", "2"], "it is this process that is cut off");
        }
        assert_eq!(after(vec![silent(1), ready(2)]), ["1", "2"], "a probe that was lost in the cut says nothing either");
        assert_eq!(after(vec![silent(1), ready(2)]), ["2"]);
        assert_eq!(after(vec![ready(1), (place(2), Err(NoStatus::Refused))]), ["1"]);
        assert_eq!(after(vec![(place(1), Ok(None)), ready(2)]), ["2"], "it drains");
    }
}
