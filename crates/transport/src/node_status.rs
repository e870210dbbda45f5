//! A node's status as a stream, both halves: the first at once, then each change, and a heartbeat.
//!
//! A stream that breaks or falls silent is begun anew after a pause that grows: its reader goes by what it knows until then.

use std::time::Duration;

use overfill_lifecycle::Drain;
use overfill_proto::error::from_status;
use overfill_proto::v1::node_client::NodeClient;
use overfill_proto::v1::{NodeStatus, StatusRequest};
use overfill_types::ServiceError;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::peers::Peers;

/// How often a status is looked at: what it tells is at most this old, and one reader costs a node twenty looks a second.
pub const INTERVAL: Duration = Duration::from_millis(50);
/// Longest silence of a stream whose node lives.
pub const HEARTBEAT: Duration = Duration::from_secs(1);
/// Silence after which a stream is given up.
pub const SILENCE: Duration = HEARTBEAT.saturating_mul(3);
/// Pauses before a stream is begun anew: the first, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Tells `told` what the node at `address` says of itself, as long as it runs, and calls `lost` when its stream has ended or cannot
/// be opened: until it tells something again, nothing is known of it. Never ends.
pub async fn follow(peers: &Peers, address: &str, told: impl Fn(NodeStatus), lost: impl Fn()) {
    let (mut pause, mut why) = (PAUSES.0, None);
    let error = |status| from_status(&status, "it");
    loop {
        let opening = async { NodeClient::new(peers.channel(address)?).watch_status(StatusRequest {}).await.map_err(error) };
        let opened: Result<Result<_, ServiceError>, _> = timeout(SILENCE, opening).await;
        // Once for each reason: what stays wrong stays so for as long as the node is listed.
        if let Ok(Err(error)) = &opened
            && why.as_ref() != Some(&error.message)
        {
            tracing::warn!(node = address, %error, "a node does not tell its status");
            why = Some(error.message.clone());
        }
        if let Ok(Ok(stream)) = opened {
            why = None;
            let mut stream = stream.into_inner();
            while let Ok(Ok(Some(status))) = timeout(SILENCE, stream.message()).await {
                told(status);
                pause = PAUSES.0;
            }
        }
        lost();
        // Of different length, so that routers do not come all at once.
        sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// Streams what `status` gives until the reader goes or `drain` is given; the last message is of a node that drains. Must be
/// called inside a tokio runtime.
pub(crate) fn watched<S>(drain: Drain, status: impl Fn() -> S + Send + 'static) -> ReceiverStream<Result<S, Status>>
where
    S: PartialEq + Clone + Send + 'static,
{
    // One is on its way: a reader that is slow gets the latest next, not all that it missed.
    let (sender, stream) = mpsc::channel(1);
    // Owned by the stream: it ends when that is dropped.
    tokio::spawn(async move {
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last: Option<(S, Instant)> = None;
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = drain.signaled() => {}
                () = sender.closed() => return,
            }
            let draining = drain.draining();
            let now = status();
            let due = last.as_ref().is_none_or(|(sent, at)| *sent != now || at.elapsed() >= HEARTBEAT);
            if due && sender.send(Ok(now.clone())).await.is_err() || draining {
                return;
            }
            if due {
                last = Some((now, Instant::now()));
            }
        }
    });
    ReceiverStream::new(stream)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio_stream::StreamExt;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn changes_are_told_soon_and_silence_never_lasts() {
        let (drain, value) = (Drain::new(), Arc::new(AtomicU32::new(0)));
        let (shared, drains) = (value.clone(), drain.clone());
        let mut stream = watched(drain.clone(), move || (drains.draining(), shared.load(Ordering::Relaxed)));
        assert_eq!(stream.next().await.unwrap().unwrap(), (false, 0));
        let begun = Instant::now();
        assert_eq!(stream.next().await.unwrap().unwrap(), (false, 0), "a heartbeat");
        assert!(begun.elapsed() >= HEARTBEAT && begun.elapsed() <= HEARTBEAT + INTERVAL, "{:?}", begun.elapsed());
        for changed in 1..20 {
            value.store(changed, Ordering::Relaxed);
            let begun = Instant::now();
            assert_eq!(stream.next().await.unwrap().unwrap(), (false, changed));
            assert!(begun.elapsed() <= INTERVAL, "{:?}", begun.elapsed());
        }
        drain.start();
        assert_eq!(stream.next().await.unwrap().unwrap(), (true, 19));
        assert!(stream.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn it_ends_with_its_reader() {
        let read = Arc::new(());
        let held = read.clone();
        drop(watched(Drain::new(), move || Arc::strong_count(&held)));
        tokio::time::sleep(INTERVAL * 2).await;
        assert_eq!(Arc::strong_count(&read), 1);
    }
}
