//! Hosts, and what connects them: each has a network namespace with one interface, whose packets this program carries. So each
//! link may be cut, slow or lossy, and connections may be broken off, without anything that the kernel may lack.

use std::collections::{BinaryHeap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

/// Largest packet, in bytes: large, since each is carried by hand.
const MTU: usize = 32_000;
/// Length of an IPv4 header without options, and of a TCP header without.
const IP: usize = 20;
const TCP: usize = 20;

/// What happens to packets between two hosts, in either direction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Link {
    /// They are carried.
    Whole,
    /// None arrives, and nobody is told.
    Cut,
    /// All arrive so much later.
    Slow(Duration),
    /// Of all packets so many, from 0 to 1, do not arrive.
    Lossy(f64),
    /// On whatever connection a packet comes, both ends are told that it is broken off.
    Reset,
}

/// One host.
#[derive(Clone, Debug)]
pub struct Host {
    /// Its address.
    pub ip: Ipv4Addr,
    namespace: Option<String>,
}

/// All hosts. Dropping it takes them down; their processes have to be ended before.
pub struct Network {
    shared: Arc<Shared>,
    number: u32,
    namespaces: Vec<String>,
}

#[derive(Default)]
struct Shared {
    hosts: RwLock<HashMap<Ipv4Addr, Arc<File>>>,
    links: RwLock<HashMap<(Ipv4Addr, Ipv4Addr), Link>>,
    late: Mutex<BinaryHeap<Late>>,
    changed: Condvar,
}

/// A packet that is on its way.
struct Late {
    due: Instant,
    number: u64,
    to: Arc<File>,
    packet: Vec<u8>,
}

impl Ord for Late {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        // The earliest is the greatest; packets of one moment stay in their order.
        (other.due, other.number).cmp(&(self.due, self.number))
    }
}

impl PartialOrd for Late {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Late {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Late {}

fn ip(args: &[&str]) {
    let done = Command::new("ip").args(args).output().expect("iproute2 is installed");
    assert!(done.status.success(), "ip {}: {}", args.join(" "), String::from_utf8_lossy(&done.stderr));
}

/// Whether this process may make hosts: it needs root, and a kernel with namespaces and TUN.
pub fn may_make_hosts() -> bool {
    let name = format!("ofc-{}-probe", std::process::id());
    let made = |args: &[&str]| Command::new("ip").args(args).output().is_ok_and(|done| done.status.success());
    let may = made(&["netns", "add", &name]) && OpenOptions::new().read(true).write(true).open("/dev/net/tun").is_ok();
    made(&["netns", "del", &name]);
    may
}

impl Network {
    /// A network whose hosts are reached from this process's own namespace at `10.77.x.x`.
    pub fn new() -> (Self, Host) {
        let mut network = Self { shared: Arc::default(), number: 0, namespaces: Vec::new() };
        let shared = network.shared.clone();
        thread::spawn(move || shared.carry_late());
        let own = network.join(None);
        (network, own)
    }

    /// Another host.
    pub fn host(&mut self) -> Host {
        let namespace = format!("ofc-{}-{}", std::process::id(), self.number + 1);
        ip(&["netns", "add", &namespace]);
        ip(&["-n", &namespace, "link", "set", "lo", "up"]);
        self.namespaces.push(namespace.clone());
        self.join(Some(namespace))
    }

    fn join(&mut self, namespace: Option<String>) -> Host {
        self.number += 1;
        let address = Ipv4Addr::new(10, 77, (self.number >> 8) as u8, self.number as u8);
        let name = format!("ofc{}n{}", std::process::id() % 100_000, self.number);
        let tun = Arc::new(open_tun(&name));
        let inside: Vec<&str> = namespace.iter().flat_map(|namespace| ["-n", namespace.as_str()]).collect();
        if let Some(namespace) = &namespace {
            ip(&["link", "set", &name, "netns", namespace]);
        }
        let configure = |args: &[&str]| ip(&[&inside[..], args].concat());
        configure(&["addr", "add", &format!("{address}/16"), "dev", &name]);
        configure(&["link", "set", &name, "mtu", &MTU.to_string(), "up"]);
        write(&self.shared.hosts).insert(address, tun.clone());
        let shared = self.shared.clone();
        thread::spawn(move || shared.carry_from(&tun));
        Host { ip: address, namespace }
    }

    /// From now on, between these two.
    pub fn link(&self, one: &Host, other: &Host, link: Link) {
        let mut links = write(&self.shared.links);
        for ends in [(one.ip, other.ip), (other.ip, one.ip)] {
            match link {
                Link::Whole => links.remove(&ends),
                link => links.insert(ends, link),
            };
        }
    }

    /// All links are whole again.
    pub fn mend(&self) {
        write(&self.shared.links).clear();
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for namespace in &self.namespaces {
            let _ = Command::new("ip").args(["netns", "del", namespace]).status();
        }
    }
}

impl Host {
    /// What starts `program` on this host.
    pub fn command(&self, program: &str) -> Command {
        match &self.namespace {
            // It becomes the program: signals reach that.
            Some(namespace) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace, program]);
                command
            }
            None => Command::new(program),
        }
    }

    /// `ip:port`.
    pub fn at(&self, port: u16) -> String {
        format!("{}:{port}", self.ip)
    }
}

impl Shared {
    /// Carries what a host sends, until its interface has gone.
    fn carry_from(&self, tun: &File) {
        let mut buffer = vec![0; MTU + 4];
        let mut number = 0;
        while let Ok(length @ 1..) = (&*tun).read(&mut buffer) {
            let packet = &buffer[..length];
            if length < IP || packet[0] >> 4 != 4 {
                continue;
            }
            let address = |at: usize| Ipv4Addr::new(packet[at], packet[at + 1], packet[at + 2], packet[at + 3]);
            let (from, to) = (address(12), address(16));
            let Some(target) = read(&self.hosts).get(&to).cloned() else { continue };
            let link = read(&self.links).get(&(from, to)).copied().unwrap_or(Link::Whole);
            // An interface that is full, or gone, loses a packet: as networks do.
            match link {
                Link::Whole => drop((&*target).write(packet)),
                Link::Cut => {}
                Link::Lossy(share) if rand::random_bool(share) => {}
                Link::Lossy(_) => drop((&*target).write(packet)),
                Link::Slow(by) => {
                    number += 1;
                    let late = Late { due: Instant::now() + by, number, to: target, packet: packet.to_vec() };
                    self.late.lock().unwrap_or_else(PoisonError::into_inner).push(late);
                    self.changed.notify_one();
                }
                Link::Reset => {
                    for (end, told) in [(tun, reset(packet, true)), (&*target, reset(packet, false))] {
                        drop(told.map(|told| (&*end).write(&told)));
                    }
                }
            }
        }
    }

    fn carry_late(&self) {
        let mut late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let now = Instant::now();
            while late.peek().is_some_and(|packet| packet.due <= now) {
                if let Some(Late { to, packet, .. }) = late.pop() {
                    drop((&*to).write(&packet));
                }
            }
            let wait = late.peek().map_or(Duration::from_secs(60), |next| next.due.saturating_duration_since(now));
            late = self.changed.wait_timeout(late, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

/// An interface of this name, whose packets are read from and written to the file (`Documentation/networking/tuntap.rst` of Linux).
fn open_tun(name: &str) -> File {
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun").expect("the kernel has TUN, and this is root");
    // SAFETY: a plain structure of integers and bytes, for which all zeros is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    assert!(name.len() < request.ifr_name.len());
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the file is open, and the request lives longer than the call.
    let done = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &request) };
    assert_eq!(done, 0, "no interface {name}: {}", std::io::Error::last_os_error());
    tun
}

/// What tells the sender of this TCP packet, or whom it is for, that their connection is broken off: a reset with the number that
/// that end waits for next (RFC 9293, 3.10.7). `None` for another packet.
fn reset(packet: &[u8], to_sender: bool) -> Option<Vec<u8>> {
    let header = usize::from(packet[0] & 15) * 4;
    if packet[9] != libc::IPPROTO_TCP as u8 || packet.len() < header + TCP {
        return None;
    }
    let tcp = &packet[header..];
    let (flags, acked) = (tcp[13], &tcp[8..12]);
    if flags & 0b100 != 0 {
        return None;
    }
    let mut answer = vec![0; IP + TCP];
    answer[0] = 0x45;
    answer[2..4].copy_from_slice(&((IP + TCP) as u16).to_be_bytes());
    answer[8] = 64;
    answer[9] = packet[9];
    answer[12..20].copy_from_slice(&packet[12..20]);
    let ip_sum = checksum(&answer[..IP], 0);
    answer[10..12].copy_from_slice(&ip_sum.to_be_bytes());
    let (ip, out) = answer.split_at_mut(IP);
    out[..4].copy_from_slice(&tcp[..4]);
    if to_sender {
        // Back the way that it came.
        ip[12..20].rotate_left(4);
        out[..4].rotate_left(2);
    }
    // Who asks for a connection has acknowledged nothing yet: it is told that its number has come.
    let first = to_sender && flags & 0b1_0010 == 0b10;
    if !to_sender {
        out[4..8].copy_from_slice(&tcp[4..8]);
    } else if first {
        let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]).wrapping_add(1);
        out[8..12].copy_from_slice(&sequence.to_be_bytes());
    } else {
        out[4..8].copy_from_slice(acked);
    }
    out[12] = ((TCP / 4) << 4) as u8;
    out[13] = if first { 0b1_0100 } else { 0b100 };
    let pseudo = sum(&ip[12..20]) + u32::from(ip[9]) + TCP as u32;
    let tcp_sum = checksum(out, pseudo);
    out[16..18].copy_from_slice(&tcp_sum.to_be_bytes());
    Some(answer)
}

fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))).sum()
}

/// The checksum of the Internet (RFC 1071) over `bytes` and what is summed already.
fn checksum(bytes: &[u8], more: u32) -> u16 {
    let mut sum = sum(bytes) + more;
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}
