//! The cheapest cluster that meets its goals.

use crate::Unusable;
use crate::costs::{OnThreads, ReadCost, StepCost};
use crate::load::{Arrival, Load};
use crate::simulate::{Bounds, Cluster, Served, simulate};

/// Runs of one try: near its limits a cluster's mean depends on who happens to come.
const RUNS: u64 = 3;
/// Requests of one run, at the least and at most: enough for a percent, and what a large cluster bears in seconds.
const LEAST: usize = 6_000;
const MOST: usize = 60_000;
/// Requests for each node of a try: so many that a node is busy for a while.
const FOR_EACH_NODE: usize = 40;
/// Part of the time that a node may be busy, at most.
const BUSIEST: f64 = 0.98;
/// Most nodes of a role.
const MOST_NODES: usize = 100_000;
/// The first part of a run is left out: it began empty. And the last, in which fewer come.
const MIDDLE: (f64, f64) = (0.2, 0.95);

/// What a request has to meet, and how many of them.
#[derive(Clone, Copy, Debug)]
pub struct Goals {
    /// Seconds to the first token.
    pub ttft: f64,
    /// Seconds between tokens, on average over a request.
    pub tpot: f64,
    /// Part of the requests that have to meet both, from 0 to 1.
    pub share: f64,
}

impl Goals {
    /// Whether a request has met them; one that was refused has not.
    pub fn met(&self, served: Option<Served>) -> bool {
        served.is_some_and(|served| served.ttft <= self.ttft && served.tpot.is_none_or(|tpot| tpot <= self.tpot))
    }

    /// Part of requests that have met them.
    pub fn share_of(&self, served: &[Option<Served>]) -> f64 {
        served.iter().filter(|served| self.met(**served)).count() as f64 / served.len().max(1) as f64
    }
}

/// What a compute thread costs for an hour, in any money.
#[derive(Clone, Copy, Debug)]
pub struct Prices {
    /// Of a prefill node.
    pub prefill: f64,
    /// Of a decode node.
    pub decode: f64,
}

/// A cluster that meets its goals.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Its nodes.
    pub cluster: Cluster,
    /// Compute threads of a prefill and of a decode node.
    pub threads: (usize, usize),
    /// For an hour.
    pub price: f64,
}

/// The cheapest cluster for a load, over all numbers of threads that were measured. Deterministic.
///
/// # Errors
/// Where no number of nodes meets the goals: the sentence says which of them, and why.
pub fn cheapest(
    load: &Load,
    read: &[OnThreads<ReadCost>],
    step: &[OnThreads<StepCost>],
    bounds: &Bounds,
    goals: &Goals,
    prices: &Prices,
) -> Result<Plan, Unusable> {
    let mut best: Option<Plan> = None;
    let mut why = Unusable("no costs were given".into());
    for reads in read {
        for steps in step {
            let cluster = Cluster { prefill: 1, decode: 1, read: reads.cost, step: steps.cost, bounds: *bounds };
            match smallest(load, cluster, goals) {
                Ok(cluster) => {
                    let price =
                        (cluster.prefill * reads.threads) as f64 * prices.prefill + (cluster.decode * steps.threads) as f64 * prices.decode;
                    if best.is_none_or(|best| price < best.price) {
                        best = Some(Plan { cluster, threads: (reads.threads, steps.threads), price });
                    }
                }
                Err(error) => why = error,
            }
        }
    }
    best.ok_or(why)
}

/// The fewest nodes of either role: first decode nodes beside prefill nodes in plenty, then prefill nodes beside these.
fn smallest(load: &Load, cluster: Cluster, goals: &Goals) -> Result<Cluster, Unusable> {
    let sample = load.draw(LEAST, 1);
    let mean = |of: fn(&Arrival) -> usize| sample.iter().map(|arrival| of(arrival) as f64).sum::<f64>() / sample.len().max(1) as f64;
    let (prompt, answer) = (mean(|arrival| arrival.prompt), mean(|arrival| arrival.answer));
    // What an idle cluster does for too few of them, no number of nodes does.
    let part =
        |meets: &dyn Fn(&Arrival) -> bool| sample.iter().filter(|arrival| meets(arrival)).count() as f64 / sample.len().max(1) as f64;
    let context = |arrival: &Arrival| arrival.prompt as f64 + arrival.answer as f64 / 2.0;
    let steady = part(&|arrival| arrival.answer < 2 || cluster.step.seconds(1.0, context(arrival)) <= goals.tpot);
    if steady < goals.share {
        return Err(Unusable(format!(
            "a decode step of one sequence takes {:.1} ms: of the answers {:.0} % would have {:.1} ms between tokens at an idle node, and {:.0} % are wanted: take faster machines, or another goal",
            cluster.step.seconds(1.0, prompt + answer / 2.0) * 1e3,
            steady * 100.0,
            goals.tpot * 1e3,
            goals.share * 100.0
        )));
    }
    let unread = |prompt: f64| prompt * (1.0 - cluster.bounds.cached);
    let reading = cluster.read.seconds(unread(prompt));
    let early = part(&|arrival| cluster.read.seconds(unread(arrival.prompt as f64)) <= goals.ttft);
    if early < goals.share {
        return Err(Unusable(format!(
            "to read a mean prompt takes {reading:.2} s: of the prompts {:.0} % would have their first token after {:.2} s at an idle node, and {:.0} % are wanted: take faster machines, or another goal",
            early * 100.0,
            goals.ttft,
            goals.share * 100.0
        )));
    }
    // No fewer than those that would be busy all the time.
    let batch = batch_within(&cluster, goals.tpot, prompt + answer / 2.0);
    let of_decode = load.rate() * answer * cluster.step.seconds(batch, batch * (prompt + answer / 2.0)) / batch;
    let of_prefill = load.rate() * reading;
    let plenty = (of_prefill * 4.0).ceil() as usize + 4;
    let decode = fewest(of_decode, |decode| meets(load, Cluster { prefill: plenty, decode, ..cluster }, goals))?;
    let prefill = fewest(of_prefill, |prefill| meets(load, Cluster { prefill, decode, ..cluster }, goals))?;
    Ok(Cluster { prefill, decode, ..cluster })
}

/// The largest batch whose step is within `tpot` seconds.
fn batch_within(cluster: &Cluster, tpot: f64, context: f64) -> f64 {
    let each = cluster.step.sequence + cluster.step.context * context;
    let most = cluster.bounds.sequences as f64;
    if each > 0.0 { ((tpot - cluster.step.step) / each).clamp(1.0, most) } else { most }
}

/// The least number that will do, from those on that are not busy all the time: below it a run is late the sooner or later, however
/// well it begins.
fn fewest(busy: f64, enough: impl Fn(usize) -> Result<bool, Unusable>) -> Result<usize, Unusable> {
    let mut low = (busy / BUSIEST).ceil().max(1.0) as usize;
    if enough(low)? {
        return Ok(low);
    }
    // What is too few, and what is enough.
    let mut high = low + (low / 8).max(1);
    while !enough(high)? {
        low = high;
        high += (high / 4).max(1);
        if high > MOST_NODES {
            return Err(Unusable(format!(
                "not even {MOST_NODES} nodes of a role meet the goals: some requests are too long for them, so lower their share or raise the goals"
            )));
        }
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if enough(middle)? { high = middle } else { low = middle }
    }
    Ok(high)
}

/// Whether enough requests meet the goals.
fn meets(load: &Load, cluster: Cluster, goals: &Goals) -> Result<bool, Unusable> {
    let mut sum = 0.0;
    for seed in 0..RUNS {
        sum += goals.share_of(&measured(load, &cluster, seed)?);
    }
    Ok(sum / RUNS as f64 >= goals.share)
}

/// What becomes of the requests in the middle of a run.
///
/// # Errors
/// As [`simulate`].
pub fn measured(load: &Load, cluster: &Cluster, seed: u64) -> Result<Vec<Option<Served>>, Unusable> {
    let requests = ((cluster.prefill + cluster.decode) * FOR_EACH_NODE).clamp(LEAST, MOST);
    let served = simulate(cluster, &load.draw(requests, seed), seed)?;
    let place = |part: f64| (served.len() as f64 * part) as usize;
    Ok(served[place(MIDDLE.0)..place(MIDDLE.1)].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Lengths;

    const BOUNDS: Bounds =
        Bounds { sequences: 64, kv_tokens: 90_000, overcommit: 2.0, ready_seconds: 0.25, cached: 0.0, handoff: 0.005, patience: 30.0 };
    const GOALS: Goals = Goals { ttft: 1.0, tpot: 0.02, share: 0.95 };
    const PRICES: Prices = Prices { prefill: 1.0, decode: 1.0 };

    fn load(rate: f64) -> Load {
        Load::Drawn { rate, prompt: Lengths::Fixed(256), answer: Lengths::Fixed(64) }
    }

    fn plan(load: &Load, goals: &Goals) -> Result<Plan, Unusable> {
        let read = [OnThreads { threads: 2, cost: ReadCost::of_rate(2500.0) }];
        let step = [OnThreads { threads: 1, cost: StepCost { step: 2e-3, sequence: 4e-4, context: 2e-7 } }];
        cheapest(load, &read, &step, &BOUNDS, goals, &PRICES)
    }

    #[test]
    fn one_node_fewer_of_either_role_is_too_few() {
        for rate in [5.0, 60.0] {
            let load = load(rate);
            let Plan { cluster, price, .. } = plan(&load, &GOALS).unwrap();
            assert_eq!(price, (2 * cluster.prefill + cluster.decode) as f64);
            assert!(meets(&load, cluster, &GOALS).unwrap(), "{rate}");
            // 256 tokens at 2,500 a second; 64 tokens by steps of 46 sequences, which take 20 ms.
            let busy = (rate * 0.1024, rate * 64.0 * 0.02 / 46.0);
            let few = [Cluster { prefill: cluster.prefill - 1, ..cluster }, Cluster { decode: cluster.decode - 1, ..cluster }];
            for (fewer, overloaded) in few.iter().zip([few[0].prefill as f64 <= busy.0, few[1].decode as f64 <= busy.1]) {
                assert!(overloaded || !meets(&load, *fewer, &GOALS).unwrap(), "{rate}: {fewer:?}");
            }
        }
    }

    #[test]
    fn nodes_grow_with_the_load_and_less_than_it() {
        let [few, many] = [20.0, 2000.0].map(|rate| plan(&load(rate), &GOALS).unwrap().cluster);
        // 2000 requests a second are 204.8 nodes' reading.
        assert!((205..260).contains(&many.prefill) && many.prefill < 100 * few.prefill, "{few:?} {many:?}");
    }

    #[test]
    fn what_no_number_of_nodes_can_do_is_said() {
        for (goals, why) in [
            (Goals { tpot: 0.001, ..GOALS }, "a decode step of one sequence takes 2.5 ms"),
            (Goals { ttft: 0.05, ..GOALS }, "to read a mean prompt takes 0.10 s"),
        ] {
            let error = plan(&load(5.0), &goals).unwrap_err();
            assert!(error.0.contains(why), "{error}");
        }
        // One in twenty has more than 2,000 tokens, which take 0.8 s.
        let uneven = Load::Drawn { rate: 5.0, prompt: Lengths::LogNormal(300.0, 2000.0), answer: Lengths::Fixed(64) };
        let most_of_them = Goals { ttft: 0.5, share: 0.99, ..GOALS };
        let error = plan(&uneven, &most_of_them).unwrap_err();
        assert!(error.0.contains("% would have their first token after 0.50 s at an idle node"), "{error}");
        plan(&uneven, &Goals { share: 0.5, ..most_of_them }).unwrap();
    }

    #[test]
    fn of_several_numbers_of_threads_the_cheapest_is_taken() {
        let read = [(2, 2500.0), (4, 4000.0)].map(|(threads, rate)| OnThreads { threads, cost: ReadCost::of_rate(rate) });
        let step = [OnThreads { threads: 1, cost: StepCost { step: 2e-3, sequence: 4e-4, context: 0.0 } }];
        let threads = |goals: &Goals| cheapest(&load(40.0), &read, &step, &BOUNDS, goals, &PRICES).unwrap().threads;
        assert_eq!(threads(&GOALS), (2, 1), "a token a second costs less with two");
        assert_eq!(threads(&Goals { ttft: 0.09, share: 0.5, ..GOALS }), (4, 1), "with two it is too late");
    }
}
