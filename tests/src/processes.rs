//! Real processes: etcd and our binaries, on free ports, ended with the test.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// One process; dropping it kills it.
pub struct Process {
    child: Child,
    name: String,
}

impl Process {
    /// Any other.
    pub fn start(mut command: Command, name: &str) -> Self {
        let child = command.stdin(Stdio::null()).spawn().unwrap_or_else(|e| panic!("cannot start {name}: {e}"));
        Self { child, name: name.into() }
    }

    /// One of our binaries, from the folder that this test was built into.
    pub fn ours(name: &str, flags: &[&str]) -> Self {
        Self::with(name, flags, &[])
    }

    /// The same with variables of the environment.
    pub fn with(name: &str, flags: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut command = Command::new(binary(name));
        command.args(flags).env("OVERFILL_LOG", "warn").envs(environment.iter().copied()).stdout(Stdio::null());
        Self::start(command, name)
    }

    /// The system's number of it.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// CPU seconds that it has used, its own and the kernel's for it: fields 14 and 15 of proc(5)'s `stat`, in hundredths.
    pub fn cpu_seconds(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let after_name = stat.rsplit_once(')').unwrap().1;
        after_name.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<f64>().unwrap() / 100.0).sum()
    }

    /// Bytes of its memory that are resident: `VmRSS` of proc(5)'s `status`, in KiB there.
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    /// Descriptors that it has open.
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// Sends a signal by name, e.g. `TERM`.
    pub fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([&format!("-{signal}"), &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success(), "cannot send {signal} to {}", self.name);
    }

    /// SIGKILL, at once.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Its exit code, if it has ended: `None` in it where a signal ended it.
    pub fn ended(&mut self) -> Option<Option<i32>> {
        self.child.try_wait().unwrap().map(|status| status.code())
    }

    /// Waits for its end, at most `limit`; gives the exit code.
    pub fn wait(&mut self, limit: Duration) -> Option<i32> {
        let until = Instant::now() + limit;
        loop {
            if let Some(code) = self.ended() {
                return code;
            }
            assert!(Instant::now() < until, "{} did not end within {limit:?}", self.name);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where a binary of ours lies: beside this program, or above it where that is a test. The test command builds all of them first.
pub fn binary(name: &str) -> PathBuf {
    let this = std::env::current_exe().unwrap();
    let above = this.ancestors().skip(1).take(2).map(|folder| folder.join(name));
    let path = above.clone().find(|path| path.exists()).or_else(|| above.last()).unwrap();
    assert!(path.exists(), "{} is not there: build the binaries first (`cargo build --release --bins`)", path.display());
    path
}

/// A port that was free a moment ago, that this process was given only once, and that no outgoing connection is given: those get
/// 32768 and above (ip(7)).
pub fn free_port() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let port = rand::random_range(15_000..32_768);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() && GIVEN.lock().unwrap().insert(port) {
            return port;
        }
    }
}

/// A real etcd that can be stopped and started again with its data.
pub struct Etcd {
    /// `host:port` of its client interface.
    pub address: String,
    peer: u16,
    data: TempDir,
    process: Option<Process>,
    /// Of its clients' TLS, if it speaks it.
    tls: Vec<String>,
}

impl Etcd {
    /// Starts one on free ports.
    pub fn start() -> Self {
        Self::with_tls(vec![])
    }

    /// One that speaks TLS with its clients, as its flags say it.
    pub fn with_tls(tls: Vec<String>) -> Self {
        let address = format!("127.0.0.1:{}", free_port());
        let mut etcd = Self { address, peer: free_port(), data: tempfile::tempdir().unwrap(), process: None, tls };
        etcd.resume();
        etcd
    }

    /// Starts it again with its data.
    pub fn resume(&mut self) {
        let client = format!("{}://{}", if self.tls.is_empty() { "http" } else { "https" }, self.address);
        let peer = format!("http://127.0.0.1:{}", self.peer);
        let mut command = Command::new("etcd");
        command.args(["--name", "test", "--data-dir"]).arg(self.data.path());
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client, "--listen-peer-urls", &peer]);
        command.args(["--initial-advertise-peer-urls", &peer, "--initial-cluster", &format!("test={peer}")]);
        command.args(&self.tls).stdout(Stdio::null()).stderr(Stdio::null());
        self.process = Some(Process::start(command, "etcd (Debian's package etcd-server has it)"));
    }

    /// Kills it; the data stays.
    pub fn stop(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill();
        }
    }

    /// Kills it and forgets its data.
    pub fn wipe(&mut self) {
        self.stop();
        self.data = tempfile::tempdir().unwrap();
    }

    /// Its process, for signals.
    pub fn process(&self) -> &Process {
        self.process.as_ref().expect("etcd runs")
    }
}

/// Waits for `check`, at most `limit`.
pub async fn eventually<F: Future<Output = bool>>(limit: Duration, what: &str, mut check: impl FnMut() -> F) {
    let until = Instant::now() + limit;
    while !check().await {
        assert!(Instant::now() < until, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
