//! What the API server says, by list and watch.
//!
//! **Invariants:** every wait has an end. The API server ends each watch after [`WATCH`], and one that is silent for longer is
//! given up, so a connection that was cut without a word costs no more than that. After any failure, and each [`RELIST`], all is
//! listed anew: an event that was lost is made up for.

use std::fmt::Display;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::{Api, Client, Config};
use overfill_transport::Connector;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::StreamExt;
use tokio_util::task::AbortOnDropHandle;

use super::slices::Slices;
use super::{CLUSTER_LABEL, Kubernetes, ROLE_LABEL};
use crate::asking::{self, MOST_WAITING};
use crate::pause::pause;
use crate::places::{Places, Word};
use crate::snapshot::Snapshot;

/// Time for one answer: that a watch begins, or a list, which with thousands of nodes has some megabytes.
const LIMIT: Duration = Duration::from_secs(10);
/// Time for a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// How long one watch lasts. A connection that has died silently is noticed after it.
const WATCH: Duration = Duration::from_secs(25);
/// How long a list is gone by. Lists come from the API server's memory, and 10,000 nodes are a few megabytes.
const RELIST: Duration = Duration::from_secs(60);
/// How much later than its time the end of a watch may come.
const LATE: Duration = Duration::from_secs(5);
/// Longest wait between two attempts: an API server is everybody's, and the nodes are asked meanwhile.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A watch that ended sooner is not begun anew at once.
const SHORT: Duration = Duration::from_secs(1);

/// Why the API server is not followed any more.
enum Ended {
    /// All has to be listed anew: it is time to, or what happened since is not kept any more (410 Gone).
    Stale,
    /// It is away, or does not let us in.
    Away(String),
    /// Nobody listens to us.
    Unheard,
}

impl Ended {
    fn away(why: impl Display) -> Self {
        Self::Away(why.to_string())
    }
}

impl From<kube::Error> for Ended {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) if status.code == 410 => Self::Stale,
            kube::Error::Api(status) if status.code == 403 => Self::Away(format!(
                "it refuses ({}): this pod's service account needs a Role that may list and watch endpointslices of discovery.k8s.io",
                status.message
            )),
            other => Self::away(other),
        }
    }
}

/// Keeps the view current, for as long as it runs.
pub(crate) async fn follow(kubernetes: Arc<Kubernetes>, connector: Connector, view: watch::Sender<Arc<Snapshot>>) {
    let (sender, words) = mpsc::channel(MOST_WAITING);
    let _listening = AbortOnDropHandle::new(tokio::spawn(listen(kubernetes, sender)));
    asking::follow(Places::default(), words, connector, view).await;
}

/// Passes on what the API server says, and lists anew whenever its watch has failed.
async fn listen(kubernetes: Arc<Kubernetes>, words: mpsc::Sender<Word>) {
    let (mut failures, mut told) = (0, String::new());
    loop {
        let mut listed = false;
        let ended = list_and_watch(&kubernetes, &words, &mut listed).await;
        failures = if listed { 0 } else { failures + 1 };
        if listed {
            told.clear();
        }
        match ended {
            Err(Ended::Unheard) => return,
            Err(Ended::Stale) if listed => {}
            Err(ended) => {
                kubernetes.watching.store(false, Ordering::Relaxed);
                let why = match ended {
                    Ended::Away(why) => why,
                    Ended::Stale | Ended::Unheard => "it forgets at once what it has listed".into(),
                };
                if why != told {
                    tracing::warn!(%why, "the Kubernetes API is away: the last view stays, as far as its nodes answer");
                    told = why;
                }
                if words.send(Word::Away).await.is_err() {
                    return;
                }
            }
            Ok(never) => match never {},
        }
        sleep(pause(failures, LONGEST_PAUSE)).await;
    }
}

/// Lists all slices, and follows every change until something fails.
async fn list_and_watch(kubernetes: &Kubernetes, words: &mpsc::Sender<Word>, listed: &mut bool) -> Result<std::convert::Infallible, Ended> {
    let api = connect(kubernetes).await?;
    let selector = format!("{CLUSTER_LABEL}={},{ROLE_LABEL}", kubernetes.settings.cluster);
    let list = within(api.list(&ListParams::default().labels(&selector).match_any())).await?;
    let mut version = list.metadata.resource_version.unwrap_or_default();
    let mut slices = Slices::of(list.items);
    *listed = true;
    tell(words, &slices).await?;
    // Processes that began together do not list together for ever.
    let stale = Instant::now() + RELIST.mul_f64(rand::random_range(0.75..1.25));
    let watched = WatchParams::default().labels(&selector).timeout(WATCH.as_secs() as u32);
    loop {
        let begun = Instant::now();
        if begun > stale {
            return Err(Ended::Stale);
        }
        let mut events = pin!(within(api.watch(&watched, &version)).await?);
        kubernetes.watching.store(true, Ordering::Relaxed);
        loop {
            let event = timeout((WATCH + LATE).saturating_sub(begun.elapsed()), events.next());
            let event = event.await.map_err(|_| Ended::away("its watch is silent beyond its time"))?;
            let Some(event) = event.transpose()? else { break };
            let changed = match event {
                WatchEvent::Added(slice) | WatchEvent::Modified(slice) => {
                    version = slice.metadata.resource_version.clone().unwrap_or(version);
                    slices.put(slice)
                }
                WatchEvent::Deleted(slice) => {
                    version = slice.metadata.resource_version.clone().unwrap_or(version);
                    slices.remove(&slice)
                }
                WatchEvent::Bookmark(mark) => {
                    version = mark.metadata.resource_version;
                    false
                }
                WatchEvent::Error(status) => return Err(kube::Error::Api(status.boxed()).into()),
            };
            if changed {
                tell(words, &slices).await?;
            }
        }
        sleep(SHORT.saturating_sub(begun.elapsed())).await;
    }
}

async fn tell(words: &mpsc::Sender<Word>, slices: &Slices) -> Result<(), Ended> {
    words.send(Word::Named(slices.places())).await.map_err(|_| Ended::Unheard)
}

/// The way to the API server is looked up each time: a pod's token and the server's authority change.
async fn connect(kubernetes: &Kubernetes) -> Result<Api<EndpointSlice>, Ended> {
    let mut config = Config::infer().await.map_err(Ended::away)?;
    config.connect_timeout = Some(CONNECT_LIMIT);
    // What is read has limits of its own, which know what is read.
    config.default_retry = false;
    let namespace = kubernetes.settings.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
    let client = Client::try_from(config)?;
    Ok(Api::namespaced(client, &namespace))
}

/// An answer within [`LIMIT`], or an error: a stopped server is silent.
async fn within<T>(answer: impl Future<Output = kube::Result<T>>) -> Result<T, Ended> {
    match timeout(LIMIT, answer).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Ended::away("it did not answer in time")),
    }
}
