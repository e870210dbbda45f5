//! What routers and nodes say to each other on their streams of calls, as it is heard on the way: for invariants that no single
//! process knows.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use overfill_proto::v1::{Call, Ended, Reply, call, decode_event, prefill_event, said};
use overfill_transport::node_status::SILENCE;
use prost::Message;
use tokio::time::Instant;

use crate::mangle::{content, split};
use crate::network::End;

/// What was heard. Clones share it.
#[derive(Clone)]
pub struct Tap(Arc<Mutex<Heard>>);

struct Heard {
    since: Instant,
    made: Vec<NodeCall>,
    /// Where in `made` the call of a stream is.
    calls: HashMap<(u64, u64), usize>,
    streams: u64,
    /// When each host that connects last heard any other.
    arrivals: BTreeMap<String, Duration>,
    silences: Vec<Silence>,
}

/// A time in which a host heard none of those that it had connected to, longer than a node that is well is silent.
#[derive(Clone, Debug)]
pub struct Silence {
    /// The host.
    pub host: String,
    /// When it heard one again, since the simulation began.
    pub until: Duration,
}

/// A call to a node.
#[derive(Clone, Debug)]
pub struct NodeCall {
    /// When it was on its way, since the simulation began.
    pub at: Duration,
    /// The prompt: each request has its own.
    pub prompt: Vec<u32>,
    /// Which attempt, where the call names it: only calls to decode nodes do.
    pub epoch: Option<u64>,
    /// Tokens that the node told, the first one of the full model among them.
    pub tokens: usize,
    /// How the node ended it; `None` where it has not.
    pub ended: Option<Ended>,
}

impl Tap {
    /// Nothing was heard yet.
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Heard {
            since: Instant::now(),
            made: Vec::new(),
            calls: HashMap::new(),
            streams: 0,
            arrivals: BTreeMap::new(),
            silences: Vec::new(),
        })))
    }

    /// How long the simulation has run.
    pub(crate) fn now(&self) -> Duration {
        self.lock().since.elapsed()
    }

    /// All calls so far, in order.
    pub fn calls(&self) -> Vec<NodeCall> {
        self.lock().made.clone()
    }

    /// All silences that ended so far, in order.
    pub fn silences(&self) -> Vec<Silence> {
        self.lock().silences.clone()
    }

    /// A host heard one that it had connected to.
    pub(crate) fn arrived(&self, host: &str) {
        let mut heard = self.lock();
        let until = heard.since.elapsed();
        let last = heard.arrivals.insert(host.to_owned(), until);
        if last.is_some_and(|last| until - last > SILENCE) {
            heard.silences.push(Silence { host: host.to_owned(), until });
        }
    }

    /// The number of a stream that begins.
    pub(crate) fn stream(&self) -> u64 {
        let mut heard = self.lock();
        heard.streams += 1;
        heard.streams
    }

    /// Messages of a stream of calls, which pass.
    pub(crate) fn heard(&self, stream: u64, from: End, messages: &Bytes) {
        let mut heard = self.lock();
        for message in split(messages.clone()) {
            match from {
                End::Client => heard.call(stream, Call::decode(content(&message)).expect("routers speak the protocol")),
                End::Server => heard.reply(stream, Reply::decode(content(&message)).expect("nodes speak the protocol")),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Heard {
    fn call(&mut self, stream: u64, Call { id, what, .. }: Call) {
        let (prompt, epoch) = match what {
            Some(call::What::Prefill(asked)) => (asked.prompt, None),
            Some(call::What::Decode(asked)) => (asked.prompt, Some(asked.epoch)),
            Some(call::What::Cancel(_)) | None => return,
        };
        self.calls.insert((stream, id), self.made.len());
        self.made.push(NodeCall { at: self.since.elapsed(), prompt, epoch, tokens: 0, ended: None });
    }

    fn reply(&mut self, stream: u64, Reply { id, said }: Reply) {
        let Some(&at) = self.calls.get(&(stream, id)) else { return };
        let call = &mut self.made[at];
        for said in said.into_iter().filter_map(|said| said.what) {
            match said {
                said::What::Prefill(event)
                    if matches!(event.event, Some(prefill_event::Event::FirstToken(_) | prefill_event::Event::Token(_))) =>
                {
                    call.tokens += 1;
                }
                said::What::Decode(event) if matches!(event.event, Some(decode_event::Event::Token(_))) => call.tokens += 1,
                said::What::Ended(ended) => call.ended = Some(ended),
                _ => {}
            }
        }
    }
}
