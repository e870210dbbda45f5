//! Nodes of this simulation: those of production, over models whose answers are known, turned by tasks.
//!
//! A node's engine has no thread: a task turns it and then sleeps as long as the step is said to take, so virtual time passes as
//! it would. All else is what `run` of a node makes of itself: its admission, its service, its watchdog, its registration.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use overfill_cluster::Discovery;
use overfill_decode_node::DecodeConfig;
use overfill_guide::Guides;
use overfill_kv::BlockPool;
use overfill_lifecycle::{Drain, PartEnded, Parts};
use overfill_node::{Life, NodeArgs, Pulse};
use overfill_prefill_node::{DecodeNodes, PrefillConfig};
use overfill_transport::calls::Signals;
use overfill_transport::server::Health;
use overfill_types::{NodeId, NodeInfo, PairManifest, PeerAddress, Role};
use rand::Rng;
use rand::rngs::StdRng;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;
use tonic::service::Routes;

use crate::model::{Half, Model};

/// How often an idle engine that holds something looks whether there is something to do. An engine's own thread looks more
/// often; here each look costs a seed some of its time.
const LOOK: Duration = Duration::from_millis(10);
/// How often one that holds nothing does: its pulse has to beat.
const IDLE: Duration = Duration::from_millis(500);

/// A pair that nodes serve.
#[derive(Clone)]
pub struct Pair {
    /// Which one of the pairs.
    pub number: usize,
    /// Its models' weights are not looked at.
    pub manifest: PairManifest,
    /// Opened once: that takes longer than a seed.
    pub guides: Arc<Guides>,
}

/// What one node is, beside its flags.
pub struct Plan {
    /// Its name.
    pub id: NodeId,
    /// Where peers reach it.
    pub address: PeerAddress,
    /// Where it registers.
    pub discovery: Discovery,
    /// Blocks of its KV cache.
    pub blocks: u32,
    /// How long a turn of its engine takes.
    pub step: Range<Duration>,
    /// Draws how long each takes.
    pub random: StdRng,
}

/// A node that runs. Dropping it is its sudden death: all that it holds is gone, and it tells nobody, if the network lets nothing
/// more of it through.
pub struct Node {
    /// Where peers reach it.
    pub address: PeerAddress,
    /// What it does.
    pub role: Role,
    /// What it answers to whoever reaches it.
    pub routes: Routes,
    /// The blocks of its cache.
    pub blocks: BlockPool,
    held: Box<dyn Fn() -> usize + Send + Sync>,
    drain: Drain,
    hang: Drain,
    life: AbortOnDropHandle<Result<(), PartEnded>>,
}

impl Node {
    /// Starts a prefill node, which hands over to `decode_nodes`. The pairs have one full model, and share their guides with it.
    pub async fn prefill(config: &PrefillConfig, pairs: &[Pair], decode_nodes: DecodeNodes, plan: Plan) -> Self {
        let signals = Signals::default();
        let manifests: Vec<PairManifest> = pairs.iter().map(|pair| pair.manifest.clone()).collect();
        let compute = Model::new(Half::Full, &manifests[0], plan.blocks, config.node.block_tokens as usize);
        let loaded = overfill_prefill_node::Loaded { manifests, compute, blocks: plan.blocks, guides: pairs[0].guides.clone() };
        let node = overfill_prefill_node::assemble(plan.id.clone(), config, loaded, decode_nodes, &signals).unwrap();
        let (info, held) = (node.info(plan.address.clone()), node.held());
        let overfill_prefill_node::Assembled { engine, pulse, routes, blocks, .. } = node;
        Self::begin(&config.node, plan, (engine, pulse), (routes, blocks), (info, held), signals).await
    }

    /// Starts a decode node.
    pub async fn decode(config: &DecodeConfig, pair: &Pair, plan: Plan) -> Self {
        let signals = Signals::default();
        let Pair { number, manifest, guides } = pair.clone();
        let compute = Model::new(Half::Decode(number), &manifest, plan.blocks, config.node.block_tokens as usize);
        let loaded = overfill_decode_node::Loaded { manifest, compute, blocks: plan.blocks, guides };
        let node = overfill_decode_node::assemble(plan.id.clone(), config, loaded, None, &signals).unwrap();
        let (info, held) = (node.info(plan.address.clone()), node.held());
        let overfill_decode_node::Assembled { engine, pulse, routes, blocks, .. } = node;
        Self::begin(&config.node, plan, (engine, pulse), (routes, blocks), (info, held), signals).await
    }

    async fn begin(
        args: &NodeArgs,
        plan: Plan,
        (engine, pulse): (impl Engine, Pulse),
        (routes, blocks): (Routes, BlockPool),
        (info, held): (NodeInfo, impl Fn() -> usize + Clone + Send + Sync + 'static),
        signals: Signals,
    ) -> Self {
        let (address, role, hang) = (plan.address, info.role, Drain::new());
        let (drain, end) = (signals.drain.clone(), signals.end.clone());
        let mut parts = Parts::default();
        parts.task("engine", turn(engine, held.clone(), (plan.step, plan.random), hang.clone(), end.clone()));
        let life = Life {
            parts,
            pulse,
            step_timeout: args.step_timeout(),
            server: async move {
                end.signaled().await;
                Ok::<_, std::io::Error>(())
            },
            health: Health::new().await.0,
            discovery: plan.discovery,
            info: Some(info),
            signals,
            held: held.clone(),
            drain_delay: args.drain_delay(),
            drain_timeout: args.drain_timeout(),
        };
        let life = AbortOnDropHandle::new(tokio::spawn(life.run()));
        Self { address, role, routes, blocks, held: Box::new(held), drain, hang, life }
    }

    /// Its engine does no more turns, as if a forward pass never returned.
    pub fn hang(&self) {
        self.hang.start();
    }

    /// It is asked to finish what it has and take nothing new.
    pub fn drain(&self) {
        self.drain.start();
    }

    /// Sequences or prompts that it holds.
    pub fn held(&self) -> usize {
        (self.held)()
    }

    /// Whether its life is over: it was drained, or gave itself up.
    pub fn is_over(&self) -> bool {
        self.life.is_finished()
    }
}

/// The engines of both kinds of node.
trait Engine: Send + 'static {
    fn is_idle(&self) -> bool;
    fn told(&mut self, limit: Duration) -> impl Future<Output = bool> + Send;
    fn turn(&mut self) -> Result<(), Broken>;
}

/// Why an engine ended.
type Broken = Box<dyn std::error::Error + Send + Sync>;

macro_rules! engine {
    ($node:ident) => {
        impl Engine for $node::Engine<Model> {
            fn is_idle(&self) -> bool {
                $node::Engine::is_idle(self)
            }

            async fn told(&mut self, limit: Duration) -> bool {
                $node::Engine::told(self, limit).await
            }

            fn turn(&mut self) -> Result<(), Broken> {
                $node::Engine::turn(self).map_err(Into::into)
            }
        }
    };
}
engine!(overfill_prefill_node);
engine!(overfill_decode_node);

/// Turns an engine until `end` is given, it is broken, or it hangs.
async fn turn(
    mut engine: impl Engine,
    held: impl Fn() -> usize + Send + Sync,
    (step, mut random): (Range<Duration>, StdRng),
    hang: Drain,
    end: Drain,
) -> Result<(), Broken> {
    while !end.draining() {
        if engine.is_idle() {
            let told = tokio::select! {
                told = engine.told(if held() > 0 { LOOK } else { IDLE }) => told,
                () = end.signaled() => break,
            };
            if !told {
                break;
            }
        }
        if hang.draining() {
            end.signaled().await;
            break;
        }
        engine.turn()?;
        sleep(random.random_range(step.clone())).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use clap::Parser;
    use overfill_guide::GuideArgs;
    use overfill_proto::convert;
    use overfill_proto::v1::node_client::NodeClient;
    use overfill_proto::v1::{Call, DecodeRequest, PrefillRequest, Reply, call, decode_event, prefill_event, said};
    use overfill_tests::tiny;
    use overfill_types::{Quality, SamplingParams, StopConditions};
    use rand::SeedableRng;
    use tokio::sync::mpsc;
    use tokio::time::{Instant, timeout};
    use tokio_stream::wrappers::ReceiverStream;
    use tonic::Streaming;

    use super::*;
    use crate::model::undisturbed;

    static PAIR: LazyLock<Pair> = LazyLock::new(|| {
        let pair = tiny::pair(tiny::Kind::Identity, 1).open();
        Pair { number: 0, guides: Guides::open(&pair.dir, &pair.manifest, &GuideArgs::default()), manifest: pair.manifest }
    });
    const MINUTE: Duration = Duration::from_secs(60);

    fn plan(discovery: &Discovery, name: &str) -> Plan {
        let step = Duration::from_millis(1)..Duration::from_millis(20);
        let (id, address) = (NodeId::new(name), "10.0.0.1:7002".parse().unwrap());
        Plan { id, address, discovery: discovery.clone(), blocks: 32, step, random: StdRng::seed_from_u64(1) }
    }

    async fn decode(discovery: &Discovery) -> Node {
        let cli = overfill_decode_node::config::Cli::parse_from(["decode-node", "--pair", "none", "--step-timeout", "2"]);
        Node::decode(&cli.config, &PAIR, plan(discovery, "decode")).await
    }

    async fn prefill(discovery: &Discovery) -> Node {
        let cli = overfill_prefill_node::config::Cli::parse_from(["prefill-node", "--pair", "none", "--chunk-tokens", "5"]);
        Node::prefill(&cli.config, std::slice::from_ref(&*PAIR), DecodeNodes::default(), plan(discovery, "prefill")).await
    }

    fn stop(max_tokens: usize) -> StopConditions {
        StopConditions { max_tokens, stop_token_ids: Vec::new(), ignore_eos: false }
    }

    fn question(role: Role, prompt: Vec<u32>, sampling: &SamplingParams, stop: &StopConditions) -> call::What {
        let (fingerprint, sampling) = (PAIR.manifest.fingerprint.to_string(), Some(convert::sampling_to_wire(sampling)));
        let (request_id, stop, alone) = ("request".to_owned(), Some(convert::stop_to_wire(stop)), true);
        match role {
            Role::Decode => call::What::Decode(DecodeRequest {
                fingerprint,
                request_id,
                epoch: 1,
                prompt,
                sampling,
                stop,
                alone,
                ..DecodeRequest::default()
            }),
            Role::Prefill => {
                call::What::Prefill(PrefillRequest { fingerprint, request_id, prompt, sampling, stop, alone, ..PrefillRequest::default() })
            }
        }
    }

    /// Asks it, as a router on a stream of its own would. Dropping the sender ends the call.
    async fn ask(node: &Node, what: call::What) -> (mpsc::Sender<Call>, Streaming<Reply>) {
        let (calls, asked) = mpsc::channel(1);
        calls.send(Call { id: 1, what: Some(what), ..Call::default() }).await.unwrap();
        let replies = NodeClient::new(node.routes.clone()).calls(ReceiverStream::new(asked)).await.unwrap();
        (calls, replies.into_inner())
    }

    /// The tokens of an answer, and the code of the error that ended it, if one did.
    async fn answer(mut replies: Streaming<Reply>) -> (Vec<u32>, String) {
        let mut tokens = Vec::new();
        while let Some(Reply { said, .. }) = replies.message().await.unwrap() {
            for said in said {
                match said.what.unwrap() {
                    said::What::Ended(ended) => return (tokens, ended.code),
                    said::What::Decode(event) => {
                        if let decode_event::Event::Token(token) = event.event.unwrap() {
                            tokens.push(token.id);
                        }
                    }
                    said::What::Prefill(event) => match event.event.unwrap() {
                        prefill_event::Event::FirstToken(first) => tokens.push(first.token.unwrap().id),
                        prefill_event::Event::Token(token) => tokens.push(token.id),
                        _ => {}
                    },
                    _ => {}
                }
            }
        }
        panic!("the calls ended without an end of this one");
    }

    /// Waits, in virtual time, until the node holds nothing.
    async fn freed(node: &Node) {
        let freed = async {
            while node.held() > 0 || node.blocks.held() > 0 {
                sleep(LOOK).await;
            }
        };
        timeout(MINUTE, freed).await.expect("all that was held is given back");
    }

    #[tokio::test(start_paused = true)]
    async fn both_nodes_write_what_is_known_beforehand() {
        let discovery = Discovery::memory();
        for (node, quality) in [(decode(&discovery).await, Quality::Decode), (prefill(&discovery).await, Quality::Full)] {
            for seed in 0..10 {
                let prompt = tiny::prompt(3 + 9 * seed as usize, seed);
                let sampling = SamplingParams { temperature: (seed % 2) as f32, seed, ..SamplingParams::greedy() };
                let known = undisturbed((0, &PAIR.manifest), quality, &prompt, &sampling, &stop(30)).0;
                let (_calls, replies) = ask(&node, question(node.role, prompt, &sampling, &stop(30))).await;
                assert_eq!(timeout(MINUTE, answer(replies)).await.unwrap(), (known, String::new()));
                freed(&node).await;
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_goes_away_leaves_nothing() {
        let discovery = Discovery::memory();
        for node in [decode(&discovery).await, prefill(&discovery).await] {
            let what =
                question(node.role, tiny::prompt(20, 3), &SamplingParams::greedy(), &StopConditions { ignore_eos: true, ..stop(200) });
            let (calls, mut replies) = ask(&node, what).await;
            replies.message().await.unwrap();
            sleep(Duration::from_millis(50)).await;
            assert!(node.held() == 1 && node.blocks.held() > 0);
            drop((calls, replies));
            freed(&node).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_hangs_gives_itself_up() {
        let discovery = Discovery::memory();
        let node = decode(&discovery).await;
        let mut view = discovery.watch();
        view.wait_for(|view| view.nodes.len() == 1).await.unwrap();
        let what = question(node.role, tiny::prompt(20, 3), &SamplingParams::greedy(), &StopConditions { ignore_eos: true, ..stop(200) });
        let (_calls, replies) = ask(&node, what).await;
        let begun = Instant::now();
        sleep(Duration::from_millis(100)).await;
        node.hang();
        let (tokens, code) = timeout(MINUTE, answer(replies)).await.unwrap();
        assert!(!tokens.is_empty() && tokens.len() < 200);
        assert_eq!(code, "engine_lost");
        assert!((1.9..2.5).contains(&(begun.elapsed().as_secs_f64() - 0.1)), "{:?}", begun.elapsed());
        view.wait_for(|view| view.nodes.is_empty()).await.unwrap();
        sleep(Duration::from_secs(2)).await;
        assert!(node.is_over());
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_drains_finishes_what_it_has() {
        let discovery = Discovery::memory();
        let node = decode(&discovery).await;
        let (prompt, greedy, stop) = (tiny::prompt(20, 3), SamplingParams::greedy(), stop(100));
        let known = undisturbed((0, &PAIR.manifest), Quality::Decode, &prompt, &greedy, &stop).0;
        let (_calls, mut replies) = ask(&node, question(node.role, prompt, &greedy, &stop)).await;
        let first = replies.message().await.unwrap().unwrap();
        assert!(!first.said.is_empty());
        node.drain();
        let (rest, code) = timeout(MINUTE, answer(replies)).await.unwrap();
        assert!(code.is_empty() && known.ends_with(&rest));
        sleep(Duration::from_secs(10)).await;
        assert!(node.is_over() && node.held() == 0);
    }
}
