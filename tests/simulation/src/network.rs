//! The network of one simulated cluster: hosts that listen, connections between them, and what happens to these.
//!
//! A connection is what gRPC makes of one in production: whoever holds a channel connects at its first call, and again after the
//! connection broke. What a call says passes through a `link` message by message. Between two hosts everything
//! may be held up for a while (a *cut*: nobody is told of it, so connections break only when their probes are not answered),
//! or be slow. A host that stops listening breaks its connections at once.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::http::{Request, Response};
use overfill_transport::Connector;
use overfill_transport::connection::{CONNECT_LIMIT, Channel, PROBE};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::body::Body;
use tonic::service::Routes;
use tower::service_fn;

use crate::link::exchange;
use crate::mangle::Mangling;
use crate::tap::Tap;

/// The network. Clones share it.
#[derive(Clone)]
pub struct Network {
    state: Arc<Mutex<State>>,
    /// Changed whenever a cut begins or ends.
    cuts: watch::Sender<()>,
    /// What is heard of calls on their way.
    pub tap: Tap,
}

struct State {
    random: StdRng,
    listening: BTreeMap<String, Listener>,
    /// How often anybody began to listen.
    listeners: u64,
    cut: BTreeSet<Hosts>,
    slow: BTreeMap<Hosts, Duration>,
    mangling: Mangling,
    connections: Vec<Arc<Connection>>,
}

struct Listener {
    number: u64,
    routes: Routes,
}

/// Two hosts, in order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hosts(String, String);

impl Hosts {
    /// These two.
    pub fn new(a: &str, b: &str) -> Self {
        if a <= b { Self(a.into(), b.into()) } else { Self(b.into(), a.into()) }
    }
}

/// One of the two ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Who connected.
    Client,
    /// Who listens.
    Server,
}

impl End {
    pub(crate) fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

/// A connection between two hosts.
pub(crate) struct Connection {
    hosts: Hosts,
    /// The host that connected.
    client: String,
    /// The address of the one that listens, and which listener it was.
    server: (String, u64),
    /// Given when the client knows that it is broken, and when the server does.
    broken: [CancellationToken; 2],
}

impl Connection {
    /// Given when this end knows that the connection is broken.
    pub(crate) fn broken(&self, end: End) -> &CancellationToken {
        &self.broken[end as usize]
    }

    /// The host that connected.
    pub(crate) fn client(&self) -> &str {
        &self.client
    }
}

impl Network {
    /// Nobody listens, nothing is cut.
    pub fn new(seed: u64) -> Self {
        let state = State {
            random: StdRng::seed_from_u64(seed),
            listening: BTreeMap::new(),
            listeners: 0,
            cut: BTreeSet::new(),
            slow: BTreeMap::new(),
            mangling: Mangling::default(),
            connections: Vec::new(),
        };
        Self { state: Arc::new(Mutex::new(state)), cuts: watch::Sender::default(), tap: Tap::new() }
    }

    /// What makes connections from the host `from`.
    pub fn connector(&self, from: &str) -> Connector {
        let (network, from) = (self.clone(), from.to_owned());
        Connector::new(move |address| {
            let channel = Arc::new(Dialled {
                network: network.clone(),
                from: from.clone(),
                to: address.to_owned(),
                connection: tokio::sync::Mutex::default(),
            });
            Ok(Channel::new(service_fn(move |request| channel.clone().call(request))))
        })
    }

    /// A host that answers at `address` with `routes`, until what is given is dropped: then its process is gone, and its
    /// connections are reset.
    pub fn listen(&self, address: &str, routes: Routes) -> Listening {
        let mut state = self.lock();
        state.listeners += 1;
        let number = state.listeners;
        state.listening.insert(address.to_owned(), Listener { number, routes });
        Listening { network: self.clone(), address: address.to_owned(), number }
    }

    /// Nothing passes between two hosts until [`Network::heal`].
    pub fn cut(&self, hosts: &Hosts) {
        let probe = {
            let mut state = self.lock();
            state.cut.insert(hosts.clone());
            // It was answered some time ago.
            PROBE.1 + PROBE.0.mul_f64(state.random.random_range(0.0..1.0))
        };
        self.cuts.send_replace(());
        let (network, hosts, mut cuts) = (self.clone(), hosts.clone(), self.cuts.subscribe());
        // Ends with the cut, or when the probes have told both ends of it.
        tokio::spawn(async move {
            let healed = async {
                while network.is_cut(&hosts) {
                    if cuts.changed().await.is_err() {
                        return;
                    }
                }
            };
            if tokio::time::timeout(probe, healed).await.is_err() {
                network.each_connection(
                    |connection| connection.hosts == hosts,
                    |connection| connection.broken.each_ref().map(CancellationToken::cancel),
                );
            }
        });
    }

    /// The end of a cut.
    pub fn heal(&self, hosts: &Hosts) {
        self.lock().cut.remove(hosts);
        self.cuts.send_replace(());
    }

    /// Every message between two hosts takes so much longer; none where `by` is zero.
    pub fn slow(&self, hosts: &Hosts, by: Duration) {
        self.lock().slow.insert(hosts.clone(), by);
    }

    /// What happens to frames of KV caches on their way, from now on.
    pub fn mangle(&self, mangling: Mangling) {
        self.lock().mangling = mangling;
    }

    /// Mangles a message of a handoff, perhaps.
    pub(crate) fn mangled(&self, messages: bytes::Bytes) -> bytes::Bytes {
        let State { random, mangling, .. } = &mut *self.lock();
        mangling.apply(messages, random)
    }

    /// Waits as long as a message is on its way. Never ends while the hosts are cut off from each other.
    pub(crate) async fn pass(&self, connection: &Connection) {
        let delay = {
            let mut state = self.lock();
            let slow = state.slow.get(&connection.hosts).copied().unwrap_or_default();
            // Most messages find the network idle.
            let queued =
                if state.random.random_ratio(1, 8) { Duration::from_millis(state.random.random_range(1..4)) } else { Duration::ZERO };
            slow + queued
        };
        if !delay.is_zero() {
            sleep(delay).await;
        }
        self.passable(&connection.hosts).await;
    }

    async fn passable(&self, hosts: &Hosts) {
        if !self.is_cut(hosts) {
            return;
        }
        let mut cuts = self.cuts.subscribe();
        while self.is_cut(hosts) && cuts.changed().await.is_ok() {}
    }

    fn is_cut(&self, hosts: &Hosts) -> bool {
        self.lock().cut.contains(hosts)
    }

    /// Does something to each connection that is meant, and forgets it.
    fn each_connection<T>(&self, meant: impl Fn(&Connection) -> bool, act: impl Fn(&Arc<Connection>) -> T) {
        let taken: Vec<Arc<Connection>> = self.lock().connections.extract_if(.., |connection| meant(connection)).collect();
        taken.iter().for_each(|connection| drop(act(connection)));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A host that listens; see [`Network::listen`].
pub struct Listening {
    network: Network,
    address: String,
    number: u64,
}

impl Drop for Listening {
    fn drop(&mut self) {
        let Self { network, address, number } = self;
        {
            let mut state = network.lock();
            if state.listening.get(address).is_some_and(|listener| listener.number == *number) {
                state.listening.remove(address);
            }
        }
        let network = network.clone();
        network.each_connection(
            |connection| connection.server == (address.clone(), *number),
            |connection| {
                connection.broken(End::Server).cancel();
                let (network, connection) = (network.clone(), connection.clone());
                // The reset is on its way; where it does not pass, the client's probes tell it.
                let told = async move {
                    let _ = tokio::time::timeout(PROBE.0 + PROBE.1, network.pass(&connection)).await;
                    connection.broken(End::Client).cancel();
                };
                // Outside of the runtime, which has ended, nobody is to be told.
                tokio::runtime::Handle::try_current().map(|runtime| runtime.spawn(told))
            },
        );
    }
}

/// A channel to one address.
struct Dialled {
    network: Network,
    from: String,
    to: String,
    connection: tokio::sync::Mutex<Option<Arc<Connection>>>,
}

impl Dialled {
    async fn call(self: Arc<Self>, request: Request<Body>) -> Result<Response<Body>, Status> {
        let failed = |error: io::Error| Status::from_error(Box::new(error));
        let connection = self.connected().await.map_err(failed)?;
        let routes = self.network.lock().listening.get(&self.to).filter(|l| l.number == connection.server.1).map(|l| l.routes.clone());
        exchange(self.network.clone(), connection, routes, request).await.map_err(failed)
    }

    /// The connection that there is, or a new one.
    async fn connected(&self) -> Result<Arc<Connection>, io::Error> {
        let mut kept = self.connection.lock().await;
        if let Some(connection) = kept.as_ref().filter(|connection| !connection.broken(End::Client).is_cancelled()) {
            return Ok(connection.clone());
        }
        let hosts = Hosts::new(&self.from, &self.to);
        if tokio::time::timeout(CONNECT_LIMIT, self.network.passable(&hosts)).await.is_err() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "nobody answered in time"));
        }
        let mut state = self.network.lock();
        let Some(number) = state.listening.get(&self.to).map(|listener| listener.number) else {
            return Err(io::Error::new(io::ErrorKind::ConnectionRefused, "nobody listens"));
        };
        let connection =
            Arc::new(Connection { hosts, client: self.from.clone(), server: (self.to.clone(), number), broken: Default::default() });
        state.connections.push(connection.clone());
        *kept = Some(connection.clone());
        Ok(connection)
    }
}
