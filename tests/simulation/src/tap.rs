//! What routers and nodes say to each other on their streams of calls, as it is heard on the way: for invariants that no single
//! process knows.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use overfill_proto::v1::{Call, Ended, Reply, call, decode_event, prefill_event, said};
use prost::Message;
use tokio::time::Instant;

use crate::mangle::{content, split};
use crate::network::End;

/// What was heard. Clones share it.
#[derive(Clone, Default)]
pub struct Tap(Arc<Mutex<Heard>>);

#[derive(Default)]
struct Heard {
    asked: Vec<Asked>,
    /// Where in `asked` the call of a stream is.
    calls: HashMap<(u64, u64), usize>,
    streams: u64,
}

/// A call to a node.
#[derive(Clone, Debug)]
pub struct Asked {
    /// When it was on its way.
    pub at: Instant,
    /// Of which request.
    pub request: String,
    /// Which attempt, where the call names it: only calls to decode nodes do.
    pub epoch: Option<u64>,
    /// Tokens that the node told, the first one of the full model among them.
    pub tokens: usize,
    /// How the node ended it; `None` where it has not.
    pub ended: Option<Ended>,
}

impl Tap {
    /// All calls so far, in order.
    pub fn asked(&self) -> Vec<Asked> {
        self.lock().asked.clone()
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
        let (request, epoch) = match what {
            Some(call::What::Prefill(asked)) => (asked.request_id, None),
            Some(call::What::Decode(asked)) => (asked.request_id, Some(asked.epoch)),
            Some(call::What::Cancel(_)) | None => return,
        };
        self.calls.insert((stream, id), self.asked.len());
        self.asked.push(Asked { at: Instant::now(), request, epoch, tokens: 0, ended: None });
    }

    fn reply(&mut self, stream: u64, Reply { id, said }: Reply) {
        let Some(&at) = self.calls.get(&(stream, id)) else { return };
        let asked = &mut self.asked[at];
        for said in said.into_iter().filter_map(|said| said.what) {
            match said {
                said::What::Prefill(event)
                    if matches!(event.event, Some(prefill_event::Event::FirstToken(_) | prefill_event::Event::Token(_))) =>
                {
                    asked.tokens += 1;
                }
                said::What::Decode(event) if matches!(event.event, Some(decode_event::Event::Token(_))) => asked.tokens += 1,
                said::What::Ended(ended) => asked.ended = Some(ended),
                _ => {}
            }
        }
    }
}
