//! The connections of a server: how many there are, and which of them goes when there is no room.
//!
//! A connection is *busy* while a request of it is served, and waits otherwise: for its first head, for a body, or for its
//! client's next request. One that waits too long is closed. Where all connections that there may be are there, the next one
//! takes the place of the one that has waited longest: clients that connect and then say nothing, or say it slowly, keep nobody
//! out, however many they are.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::{Response, response};
use http_body::{Frame, SizeHint};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// What bounds the connections of one listener.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    /// Most of them.
    pub most: usize,
    /// How long one waits for its first request, all of it.
    pub first: Duration,
    /// How long one waits for the next one.
    pub idle: Duration,
    /// Most requests at a time of one of them, where it speaks HTTP/2.
    pub streams: u32,
}

/// All connections of a listener. Clones share them.
#[derive(Clone)]
pub(crate) struct Connections {
    limits: ConnectionLimits,
    since: Instant,
    open: Arc<Mutex<HashMap<u64, Arc<State>>>>,
}

#[derive(Debug)]
struct State {
    /// Requests that are served.
    busy: AtomicUsize,
    /// Whether one ever was.
    served: AtomicBool,
    /// Since when it has waited, in milliseconds after the first connection could come.
    waits_since: AtomicU64,
    /// Given when another one takes its place.
    displaced: CancellationToken,
}

/// One connection's entry. Dropping it takes it out.
pub(crate) struct Entry {
    number: u64,
    state: Arc<State>,
    of: Connections,
}

/// A connection, as those who serve its requests see it: in the extensions of each.
#[derive(Clone)]
pub struct Connection {
    state: Arc<State>,
    since: Instant,
}

/// Holds its connection for busy.
pub struct Busy(Connection);

impl Connections {
    pub(crate) fn new(limits: ConnectionLimits) -> Self {
        Self { limits, since: Instant::now(), open: Arc::default() }
    }

    /// A connection comes. Where there is no room the one that has waited longest is to go.
    ///
    /// `None` where all are busy: then this one has to.
    pub(crate) fn enter(&self, number: u64) -> Option<Entry> {
        let mut open = self.lock();
        if open.len() >= self.limits.most {
            let waits = |(_, state): &(&u64, &Arc<State>)| state.busy.load(Ordering::Acquire) == 0;
            let longest = open.iter().filter(waits).min_by_key(|(_, state)| state.waits_since.load(Ordering::Relaxed));
            let number = *longest?.0;
            // Its place is free at once; its task ends a moment later.
            open.remove(&number).iter().for_each(|state| state.displaced.cancel());
        }
        let state = Arc::new(State {
            busy: AtomicUsize::new(0),
            served: AtomicBool::new(false),
            waits_since: AtomicU64::new(millis(self.since)),
            displaced: CancellationToken::new(),
        });
        open.insert(number, state.clone());
        drop(open);
        Some(Entry { number, state, of: self.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<State>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

impl Entry {
    /// What requests of the connection carry.
    pub(crate) fn connection(&self) -> Connection {
        Connection { state: self.state.clone(), since: self.of.since }
    }

    /// Ends when the connection has waited too long.
    pub(crate) async fn waited_too_long(&self) {
        loop {
            let State { busy, served, waits_since, .. } = &*self.state;
            let limits = &self.of.limits;
            let limit = if served.load(Ordering::Relaxed) { limits.idle } else { limits.first };
            let since = if busy.load(Ordering::Acquire) > 0 { millis(self.of.since) } else { waits_since.load(Ordering::Relaxed) };
            let until = self.of.since + Duration::from_millis(since) + limit;
            if until <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
    }

    /// Ends when another connection has taken this one's place.
    pub(crate) async fn displaced(&self) {
        self.state.displaced.cancelled().await;
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut open = self.of.lock();
        if open.get(&self.number).is_some_and(|state| Arc::ptr_eq(state, &self.state)) {
            open.remove(&self.number);
        }
    }
}

impl Connection {
    /// A request of it is served from now on, until what is given is dropped.
    pub fn busy(&self) -> Busy {
        self.state.busy.fetch_add(1, Ordering::AcqRel);
        self.state.served.store(true, Ordering::Relaxed);
        Busy(self.clone())
    }
}

impl Busy {
    /// An answer that keeps the connection busy until it is through.
    pub fn through(self, answer: Response<Body>) -> Response<Body> {
        let (head, body): (response::Parts, Body) = answer.into_parts();
        Response::from_parts(head, Body::new(Through { body, _busy: self }))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let Connection { state, since } = &self.0;
        state.waits_since.store(millis(*since), Ordering::Relaxed);
        state.busy.fetch_sub(1, Ordering::AcqRel);
    }
}

struct Through {
    body: Body,
    _busy: Busy,
}

impl http_body::Body for Through {
    type Data = bytes::Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connections(most: usize) -> Connections {
        Connections::new(ConnectionLimits { most, first: Duration::from_secs(10), idle: Duration::from_secs(60), streams: 1 })
    }

    #[tokio::test(start_paused = true)]
    async fn the_one_that_waited_longest_goes_and_none_that_is_busy() {
        let connections = connections(3);
        let mut entries = Vec::new();
        for number in 0..3 {
            entries.push(connections.enter(number).unwrap());
            tokio::time::advance(Duration::from_millis(10)).await;
        }
        let busy = entries[0].connection().busy();
        let newest = connections.enter(3).unwrap();
        assert!(entries[1].state.displaced.is_cancelled(), "it has waited longer than the third, and the first is busy");
        assert!(!entries[0].state.displaced.is_cancelled() && !entries[2].state.displaced.is_cancelled());
        let _all = [entries[2].connection().busy(), newest.connection().busy()];
        assert!(connections.enter(4).is_none(), "all are busy");
        drop(busy);
        assert!(connections.enter(5).is_some() && entries[0].state.displaced.is_cancelled());
        drop(entries);
        assert_eq!(connections.lock().len(), 1, "those that were displaced have taken nobody out");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_waits_is_closed_and_one_that_is_busy_is_not() {
        let connections = connections(9);
        let begun = Instant::now();
        let silent = connections.enter(0).unwrap();
        silent.waited_too_long().await;
        assert_eq!(begun.elapsed().as_secs(), 10);
        let asks = connections.enter(1).unwrap();
        let busy = asks.connection().busy();
        let ended = tokio::time::timeout(Duration::from_secs(1000), asks.waited_too_long()).await;
        assert!(ended.is_err());
        drop(busy);
        let waits = Instant::now();
        asks.waited_too_long().await;
        assert!((60..=120).contains(&waits.elapsed().as_secs()), "{:?}", waits.elapsed());
    }
}
