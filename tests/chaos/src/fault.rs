//! What is done to the cluster, one at a time or two.

use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;

use crate::cluster::{Cluster, Kind};
use crate::network::Link;

/// How much later packets come over a slow link.
const SLOW: Link = Link::Slow(Duration::from_millis(200));
/// How many packets a lossy link loses.
const LOSSY: Link = Link::Lossy(0.05);
/// For how long connections are broken off: each that is used meanwhile is.
const RESET: Duration = Duration::from_millis(500);

/// One thing that is done, and undone after a while.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Nothing.
    None,
    /// SIGKILL of one; it is started again.
    Kill(Kind),
    /// SIGSTOP of one; it goes on.
    Stop(Kind),
    /// SIGTERM of one; another is started when it has ended.
    Leave(Kind),
    /// All connections of one are broken off.
    Reset(Kind),
    /// One is cut off from everyone.
    Isolate(Kind),
    /// SIGSTOP of all members of etcd.
    StopEtcd,
    /// SIGKILL of all members of etcd; they are started again with their data.
    KillEtcd,
    /// The same, and their data is gone.
    WipeEtcd,
    /// etcd forgets all revisions but the last.
    CompactEtcd,
    /// All links between the two kinds.
    Links(Kind, Kind, Trouble),
    /// One of the second kind is cut off from all of the first.
    CutOne(Kind, Kind),
}

/// What is wrong with links.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Trouble {
    /// Nothing arrives.
    Cut,
    /// All arrives 200 ms later.
    Slow,
    /// Of a hundred packets five are lost.
    Lossy,
}

impl Trouble {
    fn link(self) -> Link {
        match self {
            Self::Cut => Link::Cut,
            Self::Slow => SLOW,
            Self::Lossy => LOSSY,
        }
    }
}

/// Pairs of kinds that talk to each other.
const TALK: [(Kind, Kind); 6] = [
    (Kind::Router, Kind::Prefill),
    (Kind::Router, Kind::Decode),
    (Kind::Prefill, Kind::Decode),
    (Kind::Router, Kind::Etcd),
    (Kind::Prefill, Kind::Etcd),
    (Kind::Decode, Kind::Etcd),
];

impl Fault {
    /// Those that no answer is to fail under.
    pub fn survived() -> Vec<Self> {
        let mut all = vec![Self::None];
        for act in [Self::Kill, Self::Stop, Self::Leave, Self::Reset, Self::Isolate] {
            all.extend(Kind::ALL.map(act));
        }
        all.extend([Self::StopEtcd, Self::KillEtcd, Self::WipeEtcd, Self::CompactEtcd]);
        all.extend(TALK.map(|(one, other)| Self::CutOne(one, other)));
        for trouble in [Trouble::Slow, Trouble::Lossy] {
            all.extend(TALK.map(|(one, other)| Self::Links(one, other, trouble)));
        }
        all.extend(TALK.into_iter().filter(|(_, other)| *other == Kind::Etcd).map(|(one, other)| Self::Links(one, other, Trouble::Cut)));
        all
    }

    /// Those that leave no way to answer while they last.
    pub fn too_much() -> Vec<Self> {
        let without_etcd = TALK.into_iter().filter(|(_, other)| *other != Kind::Etcd);
        without_etcd.map(|(one, other)| Self::Links(one, other, Trouble::Cut)).collect()
    }

    /// As it is called in reports.
    pub fn name(self) -> String {
        match self {
            Self::None => "nothing".into(),
            Self::Kill(kind) => format!("kill {}", kind.name()),
            Self::Stop(kind) => format!("stop {}", kind.name()),
            Self::Leave(kind) => format!("leave {}", kind.name()),
            Self::Reset(kind) => format!("reset {}", kind.name()),
            Self::Isolate(kind) => format!("isolate {}", kind.name()),
            Self::StopEtcd => "stop all etcd".into(),
            Self::KillEtcd => "kill all etcd".into(),
            Self::WipeEtcd => "wipe etcd".into(),
            Self::CompactEtcd => "compact etcd".into(),
            Self::Links(one, other, trouble) => {
                let trouble = match trouble {
                    Trouble::Cut => "cut",
                    Trouble::Slow => "slow",
                    Trouble::Lossy => "lossy",
                };
                format!("{trouble} {}-{}", one.name(), other.name())
            }
            Self::CutOne(one, other) => format!("cut {}-one {}", one.name(), other.name()),
        }
    }

    /// Whether clients lose their connection: to the router that it is done to.
    pub fn breaks_connections_of_clients(self) -> bool {
        matches!(self, Self::Kill(Kind::Router) | Self::Reset(Kind::Router))
    }

    /// Does it, to a member that is drawn; gives which.
    pub async fn begin(self, cluster: &mut Cluster, draws: &mut StdRng) -> Option<usize> {
        let mut draw = |cluster: &Cluster, kind| {
            let all = cluster.of(kind);
            all[draws.random_range(0..all.len())]
        };
        match self {
            Self::None => None,
            Self::Kill(kind) => {
                let one = draw(cluster, kind);
                cluster.kill(one);
                Some(one)
            }
            Self::Stop(kind) | Self::Leave(kind) => {
                let one = draw(cluster, kind);
                cluster.process(one).signal(if matches!(self, Self::Stop(_)) { "STOP" } else { "TERM" });
                Some(one)
            }
            Self::Reset(kind) => {
                let one = draw(cluster, kind);
                link_to_all(cluster, one, Link::Reset);
                tokio::time::sleep(RESET).await;
                link_to_all(cluster, one, Link::Whole);
                Some(one)
            }
            Self::Isolate(kind) => {
                let one = draw(cluster, kind);
                link_to_all(cluster, one, Link::Cut);
                Some(one)
            }
            Self::StopEtcd => {
                cluster.of(Kind::Etcd).into_iter().for_each(|member| cluster.process(member).signal("STOP"));
                None
            }
            Self::KillEtcd => {
                cluster.of(Kind::Etcd).into_iter().for_each(|member| cluster.kill(member));
                None
            }
            Self::WipeEtcd => {
                cluster.wipe_etcd();
                None
            }
            Self::CompactEtcd => {
                cluster.compact_etcd().await;
                None
            }
            Self::Links(one, other, trouble) => {
                for one in cluster.of(one) {
                    for other in cluster.of(other) {
                        link(cluster, one, other, trouble.link());
                    }
                }
                None
            }
            Self::CutOne(one, other) => {
                let other = draw(cluster, other);
                cluster.of(one).into_iter().for_each(|one| link(cluster, one, other, Link::Cut));
                Some(other)
            }
        }
    }

    /// Undoes it.
    pub async fn end(self, cluster: &mut Cluster, done_to: Option<usize>) {
        match (self, done_to) {
            (Self::Kill(_), Some(one)) => cluster.restart(one),
            (Self::Stop(_), Some(one)) => cluster.process(one).signal("CONT"),
            (Self::Leave(kind), Some(one)) => {
                let code = cluster.ended(one, Duration::from_secs(90)).await;
                // etcd ends by the signal itself.
                assert!(code == Some(0) || kind == Kind::Etcd, "a {} that was asked to leave ended with {code:?}", kind.name());
                cluster.restart(one);
            }
            (Self::StopEtcd, _) => cluster.of(Kind::Etcd).into_iter().for_each(|member| cluster.process(member).signal("CONT")),
            (Self::KillEtcd | Self::WipeEtcd, _) => cluster.of(Kind::Etcd).into_iter().for_each(|member| cluster.restart(member)),
            (Self::Isolate(_), Some(one)) => link_to_all(cluster, one, Link::Whole),
            (Self::Links(one, other, _), _) => {
                for one in cluster.of(one) {
                    for other in cluster.of(other) {
                        link(cluster, one, other, Link::Whole);
                    }
                }
            }
            (Self::CutOne(one, _), Some(other)) => cluster.of(one).into_iter().for_each(|one| link(cluster, one, other, Link::Whole)),
            _ => {}
        }
    }
}

fn link(cluster: &Cluster, one: usize, other: usize, link: Link) {
    cluster.network.link(&cluster.members[one].host, &cluster.members[other].host, link);
}

fn link_to_all(cluster: &Cluster, one: usize, link: Link) {
    let others = cluster.members.iter().enumerate().filter(|(member, _)| *member != one).map(|(_, member)| &member.host);
    others.chain([&cluster.own]).for_each(|other| cluster.network.link(&cluster.members[one].host, other, link));
}
