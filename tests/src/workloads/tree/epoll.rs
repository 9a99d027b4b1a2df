//! An epoll set: level, edge and one-shot, ready and not.

use super::probe::{Findings, Probe};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;

const LEVEL: u64 = 0x1111_2222_3333_4444;
const EDGE: u64 = u64::MAX - 1;
const ONE_SHOT: u64 = 3;
const SILENT: u64 = 4;

/// See the module.
#[derive(Debug)]
pub struct EpollSet {
    epoll: Epoll,
    /// Ready, reported each time.
    level: EventFd,
    /// Ready, but reported before; a move may report it once more, as any spurious wake-up.
    edge: EventFd,
    /// Ready, but disarmed.
    _one_shot: EventFd,
    /// Not ready.
    _silent: EventFd,
}

impl EpollSet {
    /// Makes it and takes the first events.
    ///
    /// # Errors
    /// Those of `epoll_ctl(2)` and `eventfd(2)`.
    pub fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let add = |count, flags: EpollFlags, data| -> io::Result<EventFd> {
            let fd = EventFd::from_value_and_flags(count, EfdFlags::EFD_NONBLOCK)?;
            epoll.add(&fd, EpollEvent::new(flags | EpollFlags::EPOLLIN, data))?;
            Ok(fd)
        };
        let set = EpollSet {
            level: add(1, EpollFlags::empty(), LEVEL)?,
            edge: add(1, EpollFlags::EPOLLET, EDGE)?,
            _one_shot: add(1, EpollFlags::EPOLLONESHOT, ONE_SHOT)?,
            _silent: add(0, EpollFlags::empty(), SILENT)?,
            epoll,
        };
        set.ready()?;
        Ok(set)
    }

    /// What is reported now, sorted.
    fn ready(&self) -> io::Result<Vec<u64>> {
        let mut events = [EpollEvent::empty(); 8];
        let count = self.epoll.wait(&mut events, EpollTimeout::ZERO)?;
        let mut ready: Vec<u64> = events[..count].iter().map(EpollEvent::data).collect();
        ready.sort_unstable();
        Ok(ready)
    }

    fn try_check(&self, findings: &mut Findings) -> io::Result<()> {
        let ready: Vec<u64> = self.ready()?.into_iter().filter(|&data| data != EDGE).collect();
        findings.equal("ready without an edge", vec![LEVEL], ready);
        findings.equal("ready again", vec![LEVEL], self.ready()?);
        self.edge.write(1)?;
        findings.equal("ready after an edge", vec![LEVEL, EDGE], self.ready()?);
        self.level.read()?;
        findings.equal("ready with nothing to read", vec![], self.ready()?);
        self.level.write(1)?;
        Ok(())
    }
}

impl Probe for EpollSet {
    fn name(&self) -> &'static str {
        "epoll"
    }

    fn check(&mut self, findings: &mut Findings) {
        let result = self.try_check(findings);
        findings.succeed("use epoll", result);
    }

    fn spoil(&mut self) {
        // A failure would show as a check that succeeds.
        let _ = self.epoll.delete(&self.edge);
    }
}
