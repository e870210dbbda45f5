//! How the load tester itself is doing: a tester that is late or out of CPU measures itself.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::record::Record;
use crate::spread::Spread;

/// How often the event loop is asked whether it still runs.
const TICK: Duration = Duration::from_millis(20);
/// Later than this at the 99th percentile is too late: latencies that people set goals for begin at some tens of milliseconds.
const LATE: f64 = 0.010;
/// More of this program's cores than this are used: requests wait for it.
const BUSY: f64 = 0.8;

/// Watches while a load runs.
pub(super) struct Watch {
    begun: Instant,
    cpu: Duration,
    end: oneshot::Sender<()>,
    lags: JoinHandle<Vec<f64>>,
}

/// What the watch saw.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Health {
    /// Cores that this process kept busy.
    pub(super) cores_used: f64,
    /// Cores that it may use.
    pub(super) cores: usize,
    /// How much later than asked the event loop woke a task, in seconds, 99th percentile.
    pub(super) lag_p99: f64,
}

impl Watch {
    pub(super) fn start() -> Self {
        let (end, ended) = oneshot::channel();
        Self { begun: Instant::now(), cpu: cpu_time(), end, lags: tokio::spawn(lags(ended)) }
    }

    pub(super) async fn end(self) -> Health {
        let (spent, passed) = (cpu_time().saturating_sub(self.cpu), self.begun.elapsed());
        // The task may be gone with the runtime: then there is nobody to tell, and nothing was seen.
        let _ = self.end.send(());
        let lags = self.lags.await.unwrap_or_default();
        Health {
            cores_used: spent.as_secs_f64() / passed.as_secs_f64().max(1e-9),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            lag_p99: Spread::of(lags).percentile(99.0),
        }
    }
}

/// Processor time of this process.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// How late each tick was, in seconds; a value every 20 ms until `ended`.
async fn lags(mut ended: oneshot::Receiver<()>) -> Vec<f64> {
    let mut lags = Vec::new();
    loop {
        let due = tokio::time::Instant::now() + TICK;
        tokio::select! {
            _ = &mut ended => return lags,
            () = tokio::time::sleep_until(due) => lags.push(due.elapsed().as_secs_f64()),
        }
    }
}

/// How late requests were let go, in seconds.
pub(super) fn lateness(records: &[Record]) -> Spread {
    Spread::of(records.iter().filter(|r| r.sent.is_some()).map(|r| r.released.saturating_sub(r.due).as_secs_f64()))
}

/// Why the figures of a run may be this program's own and not the server's. Without a schedule (all requests at once) there is
/// nothing to be late for: `lateness` is then none.
pub(super) fn warning(health: &Health, lateness: Option<&Spread>) -> Option<String> {
    let mut reasons = Vec::new();
    let late = lateness.map_or(0.0, |l| l.percentile(99.0));
    if late > LATE {
        reasons.push(format!("1 % of the requests were sent more than {:.1} ms late", late * 1e3));
    }
    if health.lag_p99 > LATE {
        reasons.push(format!("1 % of its wake-ups came more than {:.1} ms late", health.lag_p99 * 1e3));
    }
    if health.cores_used > BUSY * health.cores as f64 {
        reasons.push(format!("it kept {:.2} of {} cores busy", health.cores_used, health.cores));
    }
    let advice = "give it cores that the server does not use, or a lower rate";
    (!reasons.is_empty()).then(|| format!("the load tester may itself be the bottleneck: {}; {advice}", reasons.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::answered;

    #[test]
    fn a_late_tester_says_so() {
        let records: Vec<Record> = (0..100)
            .map(|i| Record { released: Duration::from_millis(if i < 95 { 1000 } else { 1050 }), ..answered(1000, 1050, &[(1100, 1)], 1) })
            .collect();
        let well = Health { cores_used: 0.1, cores: 2, lag_p99: 0.001 };
        assert_eq!(warning(&well, Some(&lateness(&records[..95]))), None);
        assert_eq!(warning(&well, None), None);
        assert!(warning(&well, Some(&lateness(&records))).unwrap().contains("50.0 ms late"));
        assert!(warning(&Health { cores_used: 1.9, ..well }, None).unwrap().contains("1.90 of 2 cores"));
        assert!(warning(&Health { lag_p99: 0.2, ..well }, None).unwrap().contains("200.0 ms late"));
    }

    #[tokio::test]
    async fn a_blocked_loop_is_seen() {
        let watch = Watch::start();
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(5)).await;
            std::thread::sleep(Duration::from_millis(60));
        }
        assert!(watch.end().await.lag_p99 > 0.02);
    }
}
