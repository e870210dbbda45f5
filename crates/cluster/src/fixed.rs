//! The source that is a list of addresses: what is there, each says itself (`places`).

use std::sync::Arc;

use overfill_transport::Connector;
use overfill_types::{PeerAddress, Role};
use tokio::sync::{mpsc, watch};

use crate::asking::{self, MOST_WAITING};
use crate::places::{Places, Standing, Word};
use crate::snapshot::Snapshot;

/// The addresses of a fixed list, by what they hold.
#[derive(Clone, Debug)]
pub(crate) struct Addresses {
    pub(crate) prefill: Vec<PeerAddress>,
    pub(crate) decode: Vec<PeerAddress>,
}

/// Keeps the view current, for as long as it runs.
pub(crate) async fn follow(addresses: Addresses, connector: Connector, view: watch::Sender<Arc<Snapshot>>) {
    let Addresses { prefill, decode } = addresses;
    let of = |role, addresses: Vec<PeerAddress>| addresses.into_iter().map(move |address| ((role, address), Standing::Named));
    let places = of(Role::Prefill, prefill).chain(of(Role::Decode, decode)).collect();
    let (sender, words) = mpsc::channel(MOST_WAITING);
    // A list says its places once, and vouches for none after that.
    for word in [Word::Named(places), Word::Away] {
        let _ = sender.try_send(word);
    }
    asking::follow(Places::default(), words, connector, view).await;
}
