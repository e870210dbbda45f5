//! A cluster under a load, by events: requests come, the router's scheduler gives them nodes or lets them wait, prompts are read,
//! answers are written.
//!
//! What is left out: what prompts share (a part of each may be taken as cached), failures, the network but for a constant, and the
//! steps by which a prefill node takes up a new prompt. Nodes report at once whatever changes.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use overfill_schedule::{Cluster as Nodes, Order, QueueLimits, QueueNumber, Scheduler, Share, Submitted, Taken, Turn};
use overfill_types::{Endpoint, Fingerprint, NodeId, PeerAddress, Quality, Role, ServedPair};

use crate::Unusable;
use crate::costs::{ReadCost, StepCost};
use crate::load::Arrival;
use crate::nodes::{Reader, Writer};

/// Seconds between two reports of a node that does nothing: less than a report may be old.
const HEARTBEAT: f64 = 2.0;

/// What bounds a cluster, as its flags do.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Most sequences of a decode node (`--max-sequences`).
    pub sequences: usize,
    /// Tokens that a decode node's KV cache holds.
    pub kv_tokens: usize,
    /// How many times over they are promised (`--kv-overcommit`).
    pub overcommit: f64,
    /// For how many seconds the prompts at a prefill node keep it busy (`--queue-seconds`).
    pub ready_seconds: f64,
    /// Part of each prompt that a prefill node finds in its cache, from 0 to 1.
    pub cached: f64,
    /// Seconds from a prompt's end until its KV cache is at the decode node.
    pub handoff: f64,
    /// Seconds after which a request that waits is refused (`--queue-timeout`).
    pub patience: f64,
}

/// Nodes, and what they cost in time.
#[derive(Clone, Copy, Debug)]
pub struct Cluster {
    /// Prefill nodes.
    pub prefill: usize,
    /// Decode nodes.
    pub decode: usize,
    /// Of a prefill node.
    pub read: ReadCost,
    /// Of a decode node.
    pub step: StepCost,
    /// What bounds them.
    pub bounds: Bounds,
}

/// How a request was served.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Served {
    /// Seconds to its first token.
    pub ttft: f64,
    /// Seconds between two of its tokens on average; `None` where it has one only.
    pub tpot: Option<f64>,
}

/// What becomes of each request; `None` where it was refused.
///
/// # Errors
/// Where there are no nodes of a role.
pub fn simulate(cluster: &Cluster, arrivals: &[Arrival], seed: u64) -> Result<Vec<Option<Served>>, Unusable> {
    if cluster.prefill == 0 || cluster.decode == 0 {
        return Err(Unusable("a cluster has at least one prefill and one decode node".into()));
    }
    let mut run = Run::new(cluster, arrivals, seed)?;
    run.finish();
    Ok(run.requests.into_iter().map(|request| request.served).collect())
}

/// Something that happens to a node or a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// The request comes.
    Comes(usize),
    /// A prefill node may have read a prompt, if nothing has changed there since.
    Reads(usize, u64),
    /// A request's KV cache is at its decode node.
    Begins(usize),
    /// A decode node may have written an answer, if nothing has changed there since.
    Writes(usize, u64),
    /// The request waits no longer, if it still does.
    GivesUp(usize),
    /// All nodes say what they hold.
    Heartbeat,
}

#[derive(Clone, Copy, Debug)]
struct Event {
    at: f64,
    /// Events of one moment come in the order in which they were planned.
    number: u64,
    what: What,
}

impl PartialEq for Event {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Event {}

impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Event {
    /// The greatest is the first to come.
    fn cmp(&self, other: &Self) -> Ordering {
        other.at.total_cmp(&self.at).then(other.number.cmp(&self.number))
    }
}

/// A request on its way.
struct Request {
    arrival: Arrival,
    /// Its nodes, and what is counted for it there.
    nodes: Option<(usize, usize, Taken)>,
    /// It waits for nodes.
    waits: bool,
    first: f64,
    served: Option<Served>,
}

/// A node, and how often what it does has changed.
struct Versioned<N> {
    node: N,
    id: NodeId,
    version: u64,
}

struct Run<'a> {
    cluster: &'a Cluster,
    scheduler: Scheduler,
    begun: Instant,
    pair: Fingerprint,
    readers: Vec<Versioned<Reader>>,
    writers: Vec<Versioned<Writer>>,
    requests: Vec<Request>,
    events: BinaryHeap<Event>,
    planned: u64,
    /// Requests that are not over.
    left: usize,
}

impl<'a> Run<'a> {
    fn new(cluster: &'a Cluster, arrivals: &[Arrival], seed: u64) -> Result<Self, Unusable> {
        let (begun, pair) = (Instant::now(), Fingerprint::new("planned"));
        let address: PeerAddress = "planned:1".parse().map_err(|error| Unusable(format!("{error}")))?;
        let endpoint = |role, number: usize| Endpoint {
            id: NodeId::new(format!("{role}-{number}")),
            role,
            address: address.clone(),
            pairs: vec![ServedPair { model: "planned".into(), fingerprint: pair.clone() }],
            max_context: usize::MAX,
        };
        let prefill: Vec<Endpoint> = (0..cluster.prefill).map(|number| endpoint(Role::Prefill, number)).collect();
        let decode: Vec<Endpoint> = (0..cluster.decode).map(|number| endpoint(Role::Decode, number)).collect();
        let mut nodes = Nodes::new(seed);
        nodes.update(&[prefill.clone(), decode.clone()].concat(), begun);
        let readers = prefill.into_iter().map(|node| Versioned { node: Reader::new(cluster.read), id: node.id, version: 0 }).collect();
        let writers = decode.into_iter().map(|node| Versioned { node: Writer::new(cluster.step), id: node.id, version: 0 }).collect();
        let requests: Vec<Request> =
            arrivals.iter().map(|arrival| Request { arrival: *arrival, nodes: None, waits: false, first: 0.0, served: None }).collect();
        let scheduler = Scheduler::new(nodes, QueueLimits { waiting: usize::MAX });
        let left = requests.len();
        let mut run = Self { cluster, scheduler, begun, pair, readers, writers, requests, events: BinaryHeap::new(), planned: 0, left };
        run.plan(0.0, What::Heartbeat);
        for (number, arrival) in arrivals.iter().enumerate() {
            run.plan(arrival.at, What::Comes(number));
        }
        Ok(run)
    }

    fn plan(&mut self, at: f64, what: What) {
        self.planned += 1;
        self.events.push(Event { at, number: self.planned, what });
    }

    fn instant(&self, at: f64) -> Instant {
        self.begun + Duration::from_secs_f64(at)
    }

    fn finish(&mut self) {
        while self.left > 0
            && let Some(Event { at, what, .. }) = self.events.pop()
        {
            match what {
                What::Comes(request) => self.comes(request, at),
                What::Reads(reader, version) => {
                    if self.readers[reader].version == version {
                        self.reads(reader, at);
                    }
                }
                What::Begins(request) => self.begins(request, at),
                What::Writes(writer, version) => {
                    if self.writers[writer].version == version {
                        self.writes(writer, at);
                    }
                }
                What::GivesUp(request) => {
                    if self.requests[request].waits {
                        self.scheduler.cancel(QueueNumber(request as u64));
                        self.over(request);
                        self.turns(at);
                    }
                }
                What::Heartbeat => {
                    (0..self.readers.len()).for_each(|reader| self.report_reader(reader, at));
                    (0..self.writers.len()).for_each(|writer| self.report_writer(writer, at));
                    self.plan(at + HEARTBEAT, What::Heartbeat);
                    self.turns(at);
                }
            }
        }
    }

    fn comes(&mut self, request: usize, now: f64) {
        let Arrival { prompt, answer, .. } = self.requests[request].arrival;
        let order = Order {
            pair: self.pair.clone(),
            quality: Quality::Overfill,
            decodes: answer > 1,
            keys: Arc::new([]),
            prompt_tokens: prompt,
            answer_tokens: answer,
            share: Share { client: 0, weight: 1, class: 0 },
            priority: 0,
            until: self.instant(now + self.cluster.bounds.patience),
            shunned: Vec::new(),
        };
        match self.scheduler.submit(order, QueueNumber(request as u64), false, self.instant(now)) {
            Submitted::Now(turn) => self.given(request, turn, now),
            Submitted::Waits => {
                self.requests[request].waits = true;
                self.plan(now + self.cluster.bounds.patience, What::GivesUp(request));
            }
            Submitted::Refused(_) => self.over(request),
        }
    }

    /// Those who wait, as far as there is room.
    fn turns(&mut self, now: f64) {
        for (number, turn) in self.scheduler.turns(self.instant(now)) {
            self.given(number.0 as usize, turn, now);
        }
    }

    fn given(&mut self, request: usize, turn: Turn, now: f64) {
        self.requests[request].waits = false;
        let Turn::Two(nodes) = turn else { return self.over(request) };
        let (Some(reader), Some(writer)) = (number_of(&nodes.prefill.id), number_of(&nodes.decode.id)) else {
            return self.over(request);
        };
        let Arrival { prompt, answer, .. } = self.requests[request].arrival;
        self.writers[writer].node.promise(prompt + answer);
        self.requests[request].nodes = Some((reader, writer, nodes.taken));
        let unread = (prompt as f64 * (1.0 - self.cluster.bounds.cached)).ceil().max(1.0) as usize;
        self.readers[reader].node.begin(request, unread, now);
        self.reader_changed(reader, now);
    }

    fn reads(&mut self, reader: usize, now: f64) {
        for request in self.readers[reader].node.done(now) {
            let Request { arrival, nodes, first, .. } = &mut self.requests[request];
            *first = now;
            if arrival.answer > 1 {
                if let Some((_, _, taken)) = nodes {
                    self.scheduler.cluster_mut().read(taken);
                }
                self.plan(now + self.cluster.bounds.handoff, What::Begins(request));
            } else {
                self.requests[request].served = Some(Served { ttft: now - self.requests[request].arrival.at, tpot: None });
                self.over(request);
            }
        }
        self.reader_changed(reader, now);
        self.report_reader(reader, now);
        self.turns(now);
    }

    fn begins(&mut self, request: usize, now: f64) {
        let Request { arrival, nodes: Some((_, writer, _)), .. } = &self.requests[request] else { return };
        let (writer, Arrival { prompt, answer, .. }) = (*writer, *arrival);
        self.writers[writer].node.begin(request, prompt, answer - 1, now);
        self.writer_changed(writer, now);
    }

    fn writes(&mut self, writer: usize, now: f64) {
        let done = self.writers[writer].node.done(now);
        for request in &done {
            let Request { arrival, first, served, .. } = &mut self.requests[*request];
            *served = Some(Served { ttft: *first - arrival.at, tpot: Some((now - *first) / (arrival.answer - 1) as f64) });
            self.over(*request);
        }
        self.writer_changed(writer, now);
        if !done.is_empty() {
            self.report_writer(writer, now);
            self.turns(now);
        }
    }

    fn over(&mut self, request: usize) {
        self.left -= 1;
        let Request { arrival, nodes, waits, .. } = &mut self.requests[request];
        *waits = false;
        if let Some((_, writer, taken)) = nodes.take() {
            self.writers[writer].node.release(arrival.prompt + arrival.answer);
            self.scheduler.cluster_mut().release(taken);
        }
    }

    fn reader_changed(&mut self, reader: usize, now: f64) {
        let Versioned { node, version, .. } = &mut self.readers[reader];
        *version += 1;
        if let Some(at) = node.next() {
            let version = *version;
            self.plan(at.max(now), What::Reads(reader, version));
        }
    }

    fn writer_changed(&mut self, writer: usize, now: f64) {
        let Versioned { node, version, .. } = &mut self.writers[writer];
        *version += 1;
        if let Some(at) = node.next() {
            let version = *version;
            self.plan(at.max(now), What::Writes(writer, version));
        }
    }

    fn report_reader(&mut self, reader: usize, now: f64) {
        let at = self.instant(now);
        let Versioned { node, id, .. } = &self.readers[reader];
        self.scheduler.cluster_mut().told(id, node.report(&self.cluster.bounds), at);
    }

    fn report_writer(&mut self, writer: usize, now: f64) {
        let at = self.instant(now);
        let Versioned { node, id, .. } = &self.writers[writer];
        self.scheduler.cluster_mut().told(id, node.report(&self.cluster.bounds), at);
    }
}

/// A node's number, which its name ends with.
fn number_of(id: &NodeId) -> Option<usize> {
    id.as_str().rsplit('-').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{Lengths, Load};

    const BOUNDS: Bounds =
        Bounds { sequences: 64, kv_tokens: 90_000, overcommit: 2.0, ready_seconds: 0.25, cached: 0.0, handoff: 0.0, patience: 30.0 };

    fn cluster(prefill: usize, decode: usize) -> Cluster {
        let (read, step) = (ReadCost::of_rate(2000.0), StepCost { step: 2e-3, sequence: 4e-4, context: 0.0 });
        Cluster { prefill, decode, read, step, bounds: BOUNDS }
    }

    fn load(rate: f64) -> Vec<Arrival> {
        Load::Drawn { rate, prompt: Lengths::Uniform(100, 300), answer: Lengths::Uniform(10, 90) }.draw(4000, 1)
    }

    fn mean(served: &[Option<Served>], of: impl Fn(&Served) -> Option<f64>) -> f64 {
        let values: Vec<f64> = served.iter().flatten().filter_map(of).collect();
        values.iter().sum::<f64>() / values.len() as f64
    }

    #[test]
    fn a_request_alone_takes_what_its_parts_take() {
        let alone = [Arrival { at: 1.0, prompt: 200, answer: 51 }, Arrival { at: 9.0, prompt: 100, answer: 1 }];
        let served = simulate(&Cluster { bounds: Bounds { handoff: 0.05, ..BOUNDS }, ..cluster(2, 2) }, &alone, 1).unwrap();
        let [Some(first), Some(second)] = served[..] else { panic!("{served:?}") };
        assert!((first.ttft - 0.1).abs() < 1e-9 && (first.tpot.unwrap() - (0.05 + 50.0 * 2.4e-3) / 50.0).abs() < 1e-9, "{first:?}");
        assert!((second.ttft - 0.05).abs() < 1e-9 && second.tpot.is_none(), "{second:?}");
        let half = simulate(&Cluster { bounds: Bounds { cached: 0.5, ..BOUNDS }, ..cluster(1, 1) }, &alone, 1).unwrap();
        assert!((half[0].unwrap().ttft - 0.05).abs() < 1e-9);
    }

    #[test]
    fn one_prefill_node_is_a_queue_whose_mean_is_known() {
        // Processor sharing with Poisson arrivals: the mean time is the mean work over one minus the load (Kleinrock 1976, 4.4). The
        // router's queue before it is first come, first served, but only where more than 0.25 s of work are there.
        let work = 200.0 / 2000.0;
        for busy in [0.2, 0.5] {
            let served = simulate(&cluster(1, 50), &load(busy / work), 1).unwrap();
            let expected = work / (1.0 - busy);
            let ttft = mean(&served, |served| Some(served.ttft));
            assert!((ttft / expected - 1.0).abs() < 0.15, "busy {busy}: {ttft} where {expected} is expected");
        }
    }

    #[test]
    fn more_load_is_slower_and_more_nodes_are_faster() {
        let at = |prefill, decode, rate| {
            let served = simulate(&cluster(prefill, decode), &load(rate), 1).unwrap();
            assert!(served.iter().all(Option::is_some), "{prefill} {decode} {rate}");
            (mean(&served, |s| Some(s.ttft)), mean(&served, |s| s.tpot))
        };
        let (ttft, tpot) = at(4, 2, 20.0);
        assert!(at(8, 2, 20.0).0 < ttft && at(4, 4, 20.0).1 < tpot);
        assert!(at(4, 2, 30.0).0 > ttft && at(4, 2, 30.0).1 > tpot);
        assert_eq!(at(4, 2, 20.0), (ttft, tpot), "the same again");
    }

    #[test]
    fn what_a_cluster_cannot_bear_is_refused() {
        // Ten requests a second are what one prefill node reads.
        let served = simulate(&cluster(1, 4), &load(30.0), 1).unwrap();
        let refused = served.iter().filter(|served| served.is_none()).count();
        assert!((2000..3000).contains(&refused), "{refused} of 4000");
        assert!(served.iter().flatten().all(|served| served.ttft < BOUNDS.patience + 1.0));
        assert!(simulate(&cluster(0, 1), &load(1.0), 1).is_err());
    }

    #[test]
    fn a_full_kv_cache_lets_requests_wait() {
        let mut small = cluster(50, 1);
        let roomy = simulate(&small, &load(20.0), 1).unwrap();
        small.bounds.kv_tokens = 2_000;
        small.bounds.overcommit = 1.0;
        let tight = simulate(&small, &load(20.0), 1).unwrap();
        assert!(mean(&tight, |s| Some(s.ttft)) > 1.2 * mean(&roomy, |s| Some(s.ttft)));
        assert!(mean(&tight, |s| s.tpot) < mean(&roomy, |s| s.tpot), "fewer write at a time");
    }
}
