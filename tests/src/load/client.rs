//! The load program: fills the server, runs the load until it is told to stop, reads everything back.
//!
//! It is told what to do by lines on its standard input: first the server's address and a
//! [`LoadSpec`] as JSON; then, when it has answered
//! `filled`, `start`; then any number of `mark NAME`; then `stop`, or the end of its input. Then it prints a
//! [`LoadReport`] as one line of JSON.

use std::io::{BufRead, ErrorKind};
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{self, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::{ClockId, clock_gettime};

use super::connection::{Connection, Request, RequestKind};
use super::keyspace::Keyspace;
use super::protocol::{Answer, append_get, append_set};
use super::recorder::Recorder;
use super::report::LoadReport;
use super::spec::{LoadSpec, Pace};

/// Requests in flight on each connection while everything is written or read back.
const BULK_DEPTH: usize = 32;
/// How long the server may take to listen.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long answers may take that are missing when the load stops, or between two answers while reading back.
const DRAIN_TIMEOUT_US: u64 = 10_000_000;
/// How long the program sleeps at most before it looks at its commands.
const COMMAND_LATENCY_MS: u16 = 5;
/// What the epoll set calls the timer; connections have their numbers.
const TIMER: u64 = u64::MAX;

/// A line on standard input, and when it came.
enum Command {
    Start,
    Mark(String, u64),
    Stop(u64),
}

/// Runs the program: see the module's description.
///
/// # Errors
/// When the commands cannot be understood, no connection can be made, or the kernel refuses something. Whatever the
/// server does later is in the report.
pub fn serve_commands() -> Result<LoadReport> {
    let mut spec = String::new();
    std::io::stdin().lock().read_line(&mut spec).context("read the load's description")?;
    let (server, spec): (SocketAddr, LoadSpec) =
        serde_json::from_str(&spec).context("the load's description")?;
    let commands = read_commands();
    let mut client = Client::connect(server, spec)?;
    let fill_us = client.fill()?;
    println!("filled");
    match commands.recv() {
        Ok(Command::Start) => {}
        _ => bail!("expected the line `start`"),
    }
    let stopped_us = client.load(&commands)?;
    let unanswered = client.drain()?;
    let verified_keys = if client.spec.verify { client.verify()? } else { 0 };
    Ok(client.recorder.report(stopped_us, fill_us, unanswered, verified_keys))
}

/// Reads the commands in a thread of their own, so that a mark's time is when it came.
fn read_commands() -> Receiver<Command> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            let command = match line.split_once(' ') {
                Some(("mark", name)) => Command::Mark(name.to_owned(), now_us()),
                None if line == "start" => Command::Start,
                _ => break,
            };
            if sender.send(command).is_err() {
                return;
            }
        }
        // The program is at its end already if nobody listens.
        let _ = sender.send(Command::Stop(now_us()));
    });
    receiver
}

/// The machine's monotonic clock.
fn now_us() -> u64 {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).expect("every Linux has this clock"));
    now.as_micros() as u64
}

/// What a connection asks next.
trait Work {
    /// The next request of a connection that waits for `pending` answers, if it is time for one.
    fn next(&mut self, keys: &mut Keyspace, pending: usize, now_us: u64) -> Option<Request>;
}

/// Writes or reads each key once.
struct Bulk {
    next: u32,
    write: bool,
}

impl Work for Bulk {
    fn next(&mut self, keys: &mut Keyspace, pending: usize, now_us: u64) -> Option<Request> {
        if self.next == keys.len() || pending >= BULK_DEPTH {
            return None;
        }
        let key = self.next;
        self.next += 1;
        let kind = match self.write.then(|| keys.start_write(key)).flatten() {
            Some(version) => RequestKind::Set { version },
            None => RequestKind::Get { floor: keys.floor(key) },
        };
        Some(Request { key, kind, due_us: now_us })
    }
}

/// Reads and writes random hot keys.
struct Mix {
    read_percent: u8,
    pace: Pace,
    /// When the open loop's next request is due (µs, with its fraction).
    due_us: f64,
}

impl Work for Mix {
    fn next(&mut self, keys: &mut Keyspace, pending: usize, now_us: u64) -> Option<Request> {
        let due_us = match self.pace {
            Pace::FullLoad => (pending == 0).then_some(now_us)?,
            Pace::PerSecond(rate) => {
                let due_us = self.due_us as u64;
                if due_us > now_us {
                    return None;
                }
                self.due_us += 1e6 / rate;
                due_us
            }
            Pace::Idle => return None,
        };
        let (key, percent) = keys.pick();
        // A key that is being written is read instead: a second write in flight would leave its outcome open.
        let kind = match (percent >= self.read_percent).then(|| keys.start_write(key)).flatten() {
            Some(version) => RequestKind::Set { version },
            None => RequestKind::Get { floor: keys.floor(key) },
        };
        Some(Request { key, kind, due_us })
    }
}

/// Asks nothing.
struct Silence;

impl Work for Silence {
    fn next(&mut self, _: &mut Keyspace, _: usize, _: u64) -> Option<Request> {
        None
    }
}

struct Client {
    spec: LoadSpec,
    keys: Keyspace,
    epoll: Epoll,
    /// Goes off when an open loop's next request is due: `epoll_wait` alone counts in milliseconds.
    timer: TimerFd,
    /// `None` is a connection that broke.
    connections: Vec<Option<Connection>>,
    /// Requests that broken connections took with them.
    lost: u64,
    recorder: Recorder,
    /// Whether answers are counted, not only checked.
    measuring: bool,
    events: Vec<EpollEvent>,
}

impl Client {
    fn connect(server: SocketAddr, spec: LoadSpec) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).context("epoll_create")?;
        let timer = TimerFd::new(timerfd::ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC)
            .context("timerfd_create")?;
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER)).context("epoll_ctl")?;
        let mut connections = Vec::with_capacity(spec.connections);
        let end = Instant::now() + CONNECT_TIMEOUT;
        while connections.len() < spec.connections {
            match Connection::open(server) {
                Ok(connection) => {
                    epoll.add(&connection, interest(connections.len(), false)).context("epoll_ctl")?;
                    connections.push(Some(connection));
                }
                Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(10)),
                Err(error) => return Err(error).with_context(|| format!("connect to {server}")),
            }
        }
        Ok(Self {
            keys: Keyspace::new(spec.data_bytes, spec.hot_bytes, spec.value_bytes.clone()),
            epoll,
            timer,
            lost: 0,
            recorder: Recorder::new(spec.connections, now_us()),
            measuring: false,
            events: vec![EpollEvent::empty(); spec.connections + 1],
            connections,
            spec,
        })
    }

    /// Writes every key once. Returns how long it took.
    fn fill(&mut self) -> Result<u64> {
        let start_us = now_us();
        self.bulk(true)?;
        Ok(now_us() - start_us)
    }

    /// Reads every key back. Returns how many were read.
    fn verify(&mut self) -> Result<u64> {
        self.bulk(false)
    }

    /// Sends one request for each key. Returns how many were answered.
    fn bulk(&mut self, write: bool) -> Result<u64> {
        let mut work = Bulk { next: 0, write };
        let lost_before = self.lost;
        self.hand_out(&mut work);
        let idle = self.settle(&mut work)?;
        Ok(u64::from(work.next) - (self.lost - lost_before) - idle)
    }

    /// Runs the load until the command to stop, and returns when that came.
    fn load(&mut self, commands: &Receiver<Command>) -> Result<u64> {
        let start_us = now_us();
        self.recorder.start(start_us);
        self.measuring = true;
        let mut work =
            Mix { read_percent: self.spec.read_percent, pace: self.spec.pace, due_us: start_us as f64 };
        loop {
            match commands.try_recv() {
                Ok(Command::Mark(name, at_us)) => self.recorder.mark(name, at_us),
                Ok(Command::Stop(at_us)) => {
                    let stopped_us = at_us.max(self.recorder.last_answer_us());
                    self.recorder.stop(stopped_us);
                    self.measuring = false;
                    self.timer.unset().context("timerfd_settime")?;
                    return Ok(stopped_us);
                }
                Ok(Command::Start) | Err(_) => {}
            }
            self.hand_out(&mut work);
            if let Pace::PerSecond(_) = work.pace {
                self.wake_at(work.due_us as u64)?;
            }
            self.take_answers()?;
        }
    }

    /// Ends the next wait at that time at the latest.
    fn wake_at(&self, due_us: u64) -> Result<()> {
        let due = Expiration::OneShot(TimeSpec::from_duration(Duration::from_micros(due_us)));
        self.timer.set(due, TimerSetTimeFlags::TFD_TIMER_ABSTIME).context("timerfd_settime")
    }

    /// Waits for the answers that are missing. Returns how many requests will never have one.
    fn drain(&mut self) -> Result<u64> {
        Ok(self.settle(&mut Silence)? + self.lost)
    }

    /// Goes on until nothing is pending, or nothing has come for a long time. Returns what is pending then.
    fn settle(&mut self, work: &mut impl Work) -> Result<u64> {
        let mut last_us = now_us();
        loop {
            let pending: usize = self.connections.iter().flatten().map(Connection::pending).sum();
            if pending == 0 || now_us() - last_us > DRAIN_TIMEOUT_US {
                return Ok(pending as u64);
            }
            if self.take_answers()? {
                last_us = now_us();
            }
            self.hand_out(work);
        }
    }

    /// Gives each connection in turn a request until none takes one, and sends them.
    fn hand_out(&mut self, work: &mut impl Work) {
        let now_us = now_us();
        let service = self.spec.service;
        let mut taken = true;
        while std::mem::take(&mut taken) {
            for connection in self.connections.iter_mut().flatten() {
                let Some(request) = work.next(&mut self.keys, connection.pending(), now_us) else { continue };
                taken = true;
                if self.measuring {
                    self.recorder.sent(request.due_us, now_us);
                }
                connection.push(request, |out| match request.kind {
                    RequestKind::Get { .. } => append_get(service, out, request.key),
                    RequestKind::Set { version } => {
                        append_set(service, out, &self.keys, request.key, version)
                    }
                });
            }
        }
        for number in 0..self.connections.len() {
            self.flush(number);
        }
    }

    fn flush(&mut self, number: usize) {
        let Some(connection) = &mut self.connections[number] else { return };
        if !connection.has_output() {
            return;
        }
        let result = connection.flush().and_then(|()| {
            // Only a full socket is worth a system call: the answers come first anyway.
            let full = connection.has_output();
            if full != std::mem::replace(&mut connection.waits_to_write, full) {
                self.epoll.modify(&*connection, &mut interest(number, full))?;
            }
            Ok(())
        });
        if let Err(error) = result {
            self.broken(number, &error);
        }
    }

    /// Takes the answers that are there, waiting for the first one. Returns whether there were any.
    fn take_answers(&mut self) -> Result<bool> {
        let mut events = std::mem::take(&mut self.events);
        let count = match self.epoll.wait(&mut events, COMMAND_LATENCY_MS) {
            Err(nix::errno::Errno::EINTR) => 0,
            count => count.context("epoll_wait")?,
        };
        let answers = events[..count].iter().filter(|event| event.data() != TIMER);
        let mut any = false;
        for event in answers {
            any = true;
            let number = event.data() as usize;
            if event.events() != EpollFlags::EPOLLOUT {
                self.receive(number);
            }
            self.flush(number);
        }
        self.events = events;
        Ok(any)
    }

    fn receive(&mut self, number: usize) {
        let Some(connection) = &mut self.connections[number] else { return };
        let (keys, recorder, measuring) = (&mut self.keys, &mut self.recorder, self.measuring);
        let now_us = now_us();
        let result = connection.receive(self.spec.service, |request, answer| {
            if let Err(wrong) = check(keys, request, &answer) {
                recorder.wrong(format!("{wrong} (connection {number})"));
            }
            if measuring {
                let write = matches!(request.kind, RequestKind::Set { .. });
                recorder.answered(number, write, request.due_us, now_us);
            }
        });
        match result {
            Err(error) if error.kind() != ErrorKind::WouldBlock => self.broken(number, &error),
            _ => {}
        }
    }

    fn broken(&mut self, number: usize, error: &std::io::Error) {
        self.recorder.broken(number, error, now_us());
        // Closing it also takes it out of the epoll set.
        let connection = self.connections[number].take();
        self.lost += connection.map_or(0, |connection| connection.pending() as u64);
    }
}

/// Whether an answer is right.
fn check(keys: &mut Keyspace, request: Request, answer: &Answer<'_>) -> Result<(), String> {
    match (request.kind, answer) {
        (RequestKind::Set { .. }, Answer::Stored) => {
            keys.acknowledge(request.key);
            Ok(())
        }
        (RequestKind::Get { floor }, Answer::Value(value)) => keys.check(request.key, floor, Some(value)),
        (RequestKind::Get { floor }, Answer::Missing) => keys.check(request.key, floor, None),
        (kind, Answer::Other(said)) => Err(format!("key {}: {said} in answer to {kind:?}", request.key)),
        (kind, answer) => Err(format!("key {}: {answer:?} in answer to {kind:?}", request.key)),
    }
}

fn interest(number: usize, write: bool) -> EpollEvent {
    let flags = if write { EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT } else { EpollFlags::EPOLLIN };
    EpollEvent::new(flags, number as u64)
}
