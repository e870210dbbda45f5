//! The view, kept current: what a source says on one side, questions to nodes on the other. What follows from both is decided by
//! [`Members`], without I/O.
//!
//! **Invariant:** neither side waits for the other. A silent source keeps no node from being asked, and silent nodes keep no
//! word of the source's from being heard.

use std::hash::Hash;
use std::sync::Arc;
use std::time::{Duration, Instant};

use overfill_transport::Connector;
use overfill_types::{PeerAddress, Role};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep_until;
use tokio_util::task::JoinMap;

use crate::probe::{self, NoStatus, Reply};
use crate::snapshot::{Snapshot, publish};

/// Most nodes that are asked at a time: a thousand that answer in milliseconds have their turn within a second, and
/// a process's sockets are not used up by those that are silent.
const MOST_ASKED: usize = 64;
/// Words of the source that wait to be entered, which takes microseconds; then the source waits.
pub(crate) const MOST_WAITING: usize = 16;
/// Least time between two views: where thousands come at once, whoever reads the view, and this process, has other things to do
/// than to go through all of them for each. One change alone is shown at once.
const APART: Duration = Duration::from_millis(20);

/// Which nodes are there, as far as a source and the nodes themselves say: a state without I/O.
pub(crate) trait Members {
    /// Names one node to the source.
    type Key: Clone + Eq + Hash + Send + 'static;
    /// What the source says.
    type Word;

    /// The source has said something.
    fn heard(&mut self, word: Self::Word, now: Instant);
    /// At most `most` nodes to ask now. Each is to be answered by [`Self::answered`].
    fn due(&mut self, most: usize, now: Instant) -> Vec<(Self::Key, Role, PeerAddress)>;
    /// When the next node is to be asked.
    fn next_due(&self) -> Option<Instant>;
    /// What came of asking a node.
    fn answered(&mut self, key: &Self::Key, reply: Reply, now: Instant);
    /// The view, if it may have changed since it was last taken.
    fn changed_view(&mut self) -> Option<Snapshot>;
}

/// Keeps the view current, for as long as the source goes on.
pub(crate) async fn follow<M: Members>(
    mut members: M,
    mut words: mpsc::Receiver<M::Word>,
    connector: Connector,
    view: watch::Sender<Arc<Snapshot>>,
) {
    let mut asked: JoinMap<M::Key, Reply> = JoinMap::new();
    // When the view may be shown again, and whether it may have changed since.
    let (mut show, mut changed) = (Instant::now(), false);
    loop {
        let room = MOST_ASKED.saturating_sub(asked.len());
        for (key, role, address) in members.due(room, Instant::now()) {
            let connector = connector.clone();
            asked.spawn(key, async move { probe::ask(&connector, role, &address).await });
        }
        if changed && Instant::now() >= show {
            changed = false;
            if let Some(snapshot) = members.changed_view() {
                publish(&view, snapshot);
                show = Instant::now() + APART;
            }
        }
        // Those that are due while there is no room have their turn when an answer makes some.
        let next = members.next_due().filter(|_| asked.len() < MOST_ASKED);
        tokio::select! {
            word = words.recv() => match word {
                Some(word) => {
                    members.heard(word, Instant::now());
                    changed = true;
                }
                None => return,
            },
            Some((key, reply)) = asked.join_next() => {
                members.answered(&key, reply.unwrap_or(Err(NoStatus::Silent)), Instant::now());
                changed = true;
            }
            () = sleep_until(show.into()), if changed => {}
            () = sleep_until(next.unwrap_or_else(Instant::now).into()), if next.is_some() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use overfill_types::{NodeId, NodeInfo};

    use super::*;

    /// Each word is one more node.
    #[derive(Default)]
    struct Counted(usize);

    impl Members for Counted {
        type Key = usize;
        type Word = ();

        fn heard(&mut self, (): (), _: Instant) {
            self.0 += 1;
        }

        fn due(&mut self, _: usize, _: Instant) -> Vec<(usize, Role, PeerAddress)> {
            Vec::new()
        }

        fn next_due(&self) -> Option<Instant> {
            None
        }

        fn answered(&mut self, _: &usize, _: Reply, _: Instant) {}

        fn changed_view(&mut self) -> Option<Snapshot> {
            let node = |number| NodeInfo {
                id: NodeId::new(format!("{number:06}")),
                role: Role::Decode,
                address: "127.0.0.1:1".parse().unwrap(),
                pairs: vec![],
                max_context: 8,
            };
            Some(Snapshot::new((0..self.0).map(node)))
        }
    }

    #[tokio::test]
    async fn one_change_is_shown_at_once_and_many_together() {
        const MANY: usize = 5_000;
        let ((say, words), (view, mut seen)) = (mpsc::channel(MOST_WAITING), watch::channel(Arc::default()));
        tokio::spawn(follow(Counted::default(), words, Connector::default(), view));
        say.send(()).await.unwrap();
        seen.changed().await.unwrap();
        assert_eq!(seen.borrow_and_update().nodes.len(), 1);
        let begun = Instant::now();
        tokio::spawn(async move {
            for _ in 0..MANY {
                say.send(()).await.unwrap();
            }
            // The source goes on.
            std::future::pending::<()>().await;
            drop(say);
        });
        let mut views = 0;
        while seen.borrow_and_update().nodes.len() < 1 + MANY {
            seen.changed().await.unwrap();
            views += 1;
        }
        let most = begun.elapsed().as_millis() / APART.as_millis() + 2;
        assert!(views <= most, "{views} views, and there was time for {most}");
    }
}
