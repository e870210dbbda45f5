//! The short form of what `overfill-chaos` does for long: a few faults, a small storm and a rolling restart.

use std::time::Duration;

use overfill_chaos::cluster::{Cluster, Kind, Shape};
use overfill_chaos::fault::{Fault, Trouble};
use overfill_chaos::load::undisturbed;
use overfill_chaos::network::may_make_hosts;
use overfill_chaos::run::{Times, scenario};
use overfill_chaos::storm::storm;
use overfill_tests::tiny;
use rand::SeedableRng;
use rand::rngs::StdRng;

const STREAMS: usize = 16;
const TOKENS: usize = 300;

#[tokio::test(flavor = "multi_thread")]
async fn what_is_done_to_a_cluster_costs_no_answer_and_leaves_nothing_held() {
    if !may_make_hosts() {
        eprintln!("not tried: hosts are network namespaces and TUN interfaces, which take root, iproute2 and a kernel that has them");
        return;
    }
    let pair = tiny::pair(tiny::Kind::Projection, 7);
    let shape = Shape { routers: 2, prefill: 2, decode: 2, etcd: 1, pair: pair.dir.clone(), kv_memory: "64M".into(), logs: None };
    let mut cluster = Cluster::start(shape).await;
    let undisturbed = undisturbed(&cluster.doors(), STREAMS, TOKENS).await;
    let times = Times { before: Duration::from_secs(1), lasting: Duration::from_secs(2), after: Duration::from_secs(2) };
    let mut draws = StdRng::seed_from_u64(1);
    for fault in [
        Fault::Kill(Kind::Decode),
        Fault::Kill(Kind::Prefill),
        Fault::Reset(Kind::Decode),
        Fault::Isolate(Kind::Decode),
        Fault::Links(Kind::Prefill, Kind::Decode, Trouble::Lossy),
        Fault::WipeEtcd,
    ] {
        let row = scenario(&mut cluster, &[fault], (&undisturbed, TOKENS), times, &mut draws).await;
        assert!(row.kept() && row.outcome.ok > STREAMS, "{}\n{}", row.line(), row.reasons());
    }
    let ends = storm(&cluster, 500, TOKENS, 1).await;
    assert!(ends.failed.is_empty() && ends.aborted > 100, "{ends:?}");
    let held = cluster.nothing_is_held(Duration::from_secs(30)).await;
    assert!(held.is_empty(), "{held:?}");
}
