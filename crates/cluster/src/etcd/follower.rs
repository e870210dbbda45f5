//! The view, kept current: etcd's list and watch on one side, questions to nodes that it does not vouch for on the other.
//! What follows from both is decided in `membership`.
//!
//! **Invariant:** neither side waits for the other. A silent etcd keeps no node from being asked, and silent nodes keep no
//! change of etcd's from being seen.

use std::sync::Arc;
use std::time::Instant;

use etcd_client::{Error, EventType, GetOptions, KeyValue, WatchOptions};
use overfill_proto::v1::Phase;
use overfill_transport::Connector;
use overfill_types::NodeInfo;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, sleep_until};
use tokio_util::task::{AbortOnDropHandle, JoinMap};

use super::{Etcd, pause, within};
use crate::membership::{Answer, Entry, Event, Membership};
use crate::probe::{self, NoStatus};
use crate::snapshot::{Snapshot, publish};

/// Most nodes that are asked at a time: a thousand that answer in milliseconds have their turn within a second, and
/// a process's sockets are not used up by those that are silent.
const MOST_ASKED: usize = 64;
/// Messages of etcd that wait to be entered, which takes microseconds; then the watch waits, and etcd keeps them.
const MOST_WAITING: usize = 16;

/// What etcd says.
enum Word {
    /// All entries.
    Listed(Vec<Entry>),
    /// What happened since.
    Changed(Vec<Event>),
    /// It is away.
    Away,
}

/// Keeps the view current, for as long as it runs.
pub(crate) async fn follow(etcd: Arc<Etcd>, connector: Connector, view: watch::Sender<Arc<Snapshot>>) {
    let mut membership = Membership::new(etcd.prefix());
    let (sender, mut words) = mpsc::channel(MOST_WAITING);
    let _listening = AbortOnDropHandle::new(tokio::spawn(listen(etcd, sender)));
    let mut asked: JoinMap<String, Answer> = JoinMap::new();
    loop {
        let room = MOST_ASKED.saturating_sub(asked.len());
        for (key, node) in membership.due(room, Instant::now()) {
            asked.spawn(key, ask(connector.clone(), node));
        }
        if let Some(snapshot) = membership.changed_view() {
            publish(&view, snapshot);
        }
        // Those that are due while there is no room have their turn when an answer makes some.
        let next = membership.next_due().filter(|_| asked.len() < MOST_ASKED);
        tokio::select! {
            word = words.recv() => match word {
                Some(Word::Listed(entries)) => membership.listed(entries, Instant::now()),
                Some(Word::Changed(events)) => membership.changed(events, Instant::now()),
                Some(Word::Away) => membership.away(Instant::now()),
                None => return,
            },
            Some((key, answer)) = asked.join_next() => membership.answered(&key, answer.unwrap_or(Answer::Silent), Instant::now()),
            () = sleep_until(next.unwrap_or_else(Instant::now).into()), if next.is_some() => {}
        }
    }
}

async fn ask(connector: Connector, node: NodeInfo) -> Answer {
    match probe::ask(&connector, node.role, &node.address).await {
        Ok(status) if status.node_id == node.id.as_str() && status.phase() == Phase::Ready => Answer::Ready,
        Ok(_) | Err(NoStatus::Refused) => Answer::Gone,
        Err(NoStatus::Silent) => Answer::Silent,
    }
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
        sleep(pause(failures)).await;
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
