//! Slows the rounds down while the container's clients get too little: what [`crate::policy::throttle`] decides, from what
//! goes over the container's links.

use crate::host::HostError;
use crate::policy::throttle::Throttle;
use crate::transport::PageSender;
use pclive_wire::HostPid;
use procfs::ProcError;
use procfs::process::Process;
use std::time::{Duration, Instant};

/// For how long the container is listened to before anything is asked of it.
const LISTEN: Duration = Duration::from_millis(200);
/// How often the limit is thought over.
const WINDOW: Duration = Duration::from_millis(250);
/// A round that takes no longer than this at full speed is not slowed down: clients hardly notice it, but the longer it
/// took, the more would be written meanwhile, and the longer be the blackout in the end.
const SHORT: Duration = Duration::from_secs(2);

/// Watches the container's traffic.
#[derive(Debug)]
pub struct TrafficGuard {
    init: Process,
    throttle: Throttle,
    /// The limit that was asked for.
    most: Option<u64>,
    /// A round is under way that is worth slowing down.
    watching: bool,
    /// The window under way: since when, and the two counters then.
    since: Instant,
    traffic: u64,
    sent: u64,
}

impl TrafficGuard {
    /// Listens to the container whose PID 1 is `init`, to keep `percent` of its traffic. `None` if there is nothing to
    /// keep. `most` is a limit that holds in any case, in bytes per second.
    ///
    /// # Errors
    /// When the counters of the container's links (`/proc/PID/net/dev`, proc_pid_net(5)) cannot be read.
    pub fn listen(init: HostPid, percent: u8, most: Option<u64>) -> Result<Option<Self>, HostError> {
        if percent == 0 {
            return Ok(None);
        }
        let failed = |source| HostError::Proc("/proc/PID/net/dev", source);
        let init = Process::new(init.0).map_err(failed)?;
        let (since, before) = (Instant::now(), traffic(&init).map_err(failed)?);
        std::thread::sleep(LISTEN);
        let traffic = traffic(&init).map_err(failed)?;
        let usual = traffic.saturating_sub(before) as f64 / since.elapsed().as_secs_f64();
        let guard = |throttle| Self { init, throttle, most, watching: false, since, traffic, sent: 0 };
        Ok(Throttle::new(percent, usual).map(guard))
    }

    /// A round begins, which has about `bytes` to send, if that is known.
    pub fn begin_round(&mut self, bytes: Option<u64>, sender: &PageSender) {
        let time = bytes.and_then(|bytes| self.throttle.shortest_time(bytes));
        self.watching = time.is_none_or(|seconds| seconds > SHORT.as_secs_f64());
        match self.watching {
            true => self.begin_window(sender),
            false => sender.limit(self.most),
        }
    }

    /// To be called every now and then during a round.
    pub fn watch(&mut self, sender: &PageSender) {
        let seconds = self.since.elapsed().as_secs_f64();
        if !self.watching || seconds < WINDOW.as_secs_f64() {
            return;
        }
        let (traffic, sent) = (self.traffic, self.sent);
        self.begin_window(sender);
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
        let limit = self.throttle.observe(rate(self.traffic, traffic), rate(self.sent, sent));
        sender.limit(limit.into_iter().chain(self.most).min());
    }

    fn begin_window(&mut self, sender: &PageSender) {
        self.since = Instant::now();
        self.sent = sender.stats().bytes;
        // Without PID 1 the container has ended, which the round will notice.
        self.traffic = traffic(&self.init).unwrap_or(self.traffic);
    }
}

/// Bytes that the links of a process's network namespace have sent and received, without the loopback.
fn traffic(process: &Process) -> Result<u64, ProcError> {
    let links = process.dev_status()?;
    let outside = links.values().filter(|link| link.name != "lo");
    Ok(outside.map(|link| link.sent_bytes + link.recv_bytes).sum())
}
