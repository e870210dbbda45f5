//! A plain TCP balancer in front of the routers, as the slowest of its kind: it asks each router's readiness once a second, and
//! goes by three answers in a row.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Time between two questions.
const ASKED: Duration = Duration::from_secs(1);
/// Answers in a row that change its mind.
const IN_A_ROW: usize = 3;

/// A running balancer; dropping it ends it.
pub struct Balancer {
    /// `http://ip:port` of its door.
    pub door: String,
    _tasks: JoinSet<()>,
}

struct Target {
    address: String,
    healthy: AtomicBool,
}

impl Balancer {
    /// In front of `targets`, all of which are ready now.
    pub async fn start(targets: Vec<String>) -> Self {
        let target = |address: String| Target { address, healthy: AtomicBool::new(true) };
        let targets: Arc<Vec<Target>> = Arc::new(targets.into_iter().map(target).collect());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let door = format!("http://{}", listener.local_addr().unwrap());
        let mut tasks = JoinSet::new();
        for number in 0..targets.len() {
            tasks.spawn(follow(targets.clone(), number));
        }
        tasks.spawn(async move {
            let next = AtomicUsize::new(0);
            // Connections end with the runtime, or when either side ends them.
            while let Ok((client, _)) = listener.accept().await {
                let healthy: Vec<&Target> = targets.iter().filter(|target| target.healthy.load(Ordering::Relaxed)).collect();
                let Some(target) = healthy.get(next.fetch_add(1, Ordering::Relaxed) % healthy.len().max(1)) else { continue };
                tokio::spawn(carry(client, target.address.clone()));
            }
        });
        Self { door, _tasks: tasks }
    }
}

/// Where nobody listens the client's connection ends.
async fn carry(mut client: TcpStream, address: String) {
    if let Ok(mut server) = TcpStream::connect(address).await {
        let _ = copy_bidirectional(&mut client, &mut server).await;
    }
}

async fn follow(targets: Arc<Vec<Target>>, number: usize) {
    let target = &targets[number];
    let client = reqwest::Client::builder().timeout(ASKED).pool_max_idle_per_host(0).build().unwrap();
    let mut others = 0;
    loop {
        tokio::time::sleep(ASKED).await;
        let ready = client.get(format!("http://{}/ready", target.address)).send().await.is_ok_and(|answer| answer.status().is_success());
        others = if ready == target.healthy.load(Ordering::Relaxed) { 0 } else { others + 1 };
        if others >= IN_A_ROW {
            target.healthy.store(ready, Ordering::Relaxed);
            others = 0;
        }
    }
}
