//! What etcd says, by list and watch. What follows from it is decided in `membership`.

use std::sync::Arc;

use etcd_client::{Error, EventType, GetOptions, KeyValue, WatchOptions};
use overfill_transport::Connector;
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use super::{Etcd, LONGEST_PAUSE, within};
use crate::asking::{self, MOST_WAITING};
use crate::membership::{Entry, Event, Membership, Word};
use crate::pause::pause;
use crate::snapshot::Snapshot;

/// Keeps the view current, for as long as it runs.
pub(crate) async fn follow(etcd: Arc<Etcd>, connector: Connector, view: watch::Sender<Arc<Snapshot>>) {
    let membership = Membership::new(etcd.prefix());
    // Where none may wait any more, etcd keeps what happens.
    let (sender, words) = mpsc::channel(MOST_WAITING);
    let _listening = AbortOnDropHandle::new(tokio::spawn(listen(etcd, sender)));
    asking::follow(membership, words, connector, view).await;
}

/// Passes on what etcd says, and lists anew whenever the watch has ended.
async fn listen(etcd: Arc<Etcd>, words: mpsc::Sender<Word>) {
    let mut failures = 0;
    loop {
        let mut listed = false;
        let ended = list_and_watch(&etcd, &words, &mut listed).await;
        etcd.watching.send_replace(false);
        if let Err(error) = ended {
            tracing::warn!(%error, "etcd is away: the last view stays, as far as its nodes answer");
        }
        if words.send(Word::Away).await.is_err() {
            return;
        }
        failures = if listed { 0 } else { failures + 1 };
        sleep(pause(failures, LONGEST_PAUSE)).await;
    }
}

/// Lists all nodes, and follows every change. Returns where the watch ended (etcd went away, or gave it up).
///
/// The watch comes first. One that begins at a revision which is over by then is told of changes when etcd gets round to it, some
/// tenth of a second later: long enough for a node to be known to a router and not to those that it is sent to.
async fn list_and_watch(etcd: &Etcd, words: &mpsc::Sender<Word>, listed: &mut bool) -> Result<(), Error> {
    let mut client = etcd.connect().await?;
    let prefix = etcd.prefix();
    let mut changes = within(client.watch(prefix.as_str(), Some(WatchOptions::new().with_prefix()))).await?;
    // The first message says that it is up: whatever changes from then on comes.
    if within(changes.message()).await?.is_none_or(|begun| begun.canceled()) {
        return Ok(());
    }
    let list = within(client.get(prefix.as_str(), Some(GetOptions::new().with_prefix()))).await?;
    let revision = list.header().map_or(0, |h| h.revision());
    *listed = true;
    if words.send(Word::Listed(list.kvs().iter().map(entry).collect())).await.is_err() {
        return Ok(());
    }
    etcd.watching.send_replace(true);
    while let Some(change) = changes.message().await?.filter(|change| !change.canceled()) {
        let events = change.events().iter().filter_map(|event| {
            // What came before the list is in it.
            let kv = event.kv().filter(|kv| kv.mod_revision() > revision)?;
            Some(match event.event_type() {
                EventType::Put => Event::Put(entry(kv)),
                EventType::Delete => Event::Deleted(key(kv)),
            })
        });
        if words.send(Word::Changed(events.collect())).await.is_err() {
            break;
        }
    }
    Ok(())
}

fn entry(kv: &KeyValue) -> Entry {
    Entry { key: key(kv), value: kv.value().to_owned() }
}

fn key(kv: &KeyValue) -> String {
    String::from_utf8_lossy(kv.key()).into_owned()
}
