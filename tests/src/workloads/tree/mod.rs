//! A process tree with one of every kind of kernel object that a container may own.
//!
//! ```text
//!   PID 1: /bin/sh, waiting, with a trap on SIGUSR1
//!     ├── reader: blocked in a pipe read; nobody, in its own session, almost without capabilities
//!     ├── sleeper: in a timed sleep; its own process group, nice 5
//!     └── main: 14 threads, timers, signals, files, queues, epoll; answers `check`
//! ```
//!
//! `main` has a [`Probe`] for each kind of object. A check lets each compare what it owns with what it remembers, and
//! use it once, so that an object that merely looks right is found out; what it uses up it makes good. Then every
//! [counter](Probe::counters) must grow: timers tick on, every thread gets on with its work.

pub mod children;
pub mod epoll;
pub mod files;
pub mod identity;
pub mod mappings;
pub mod mutexes;
pub mod probe;
pub mod queues;
pub mod registers;
pub mod roles;
pub mod signals;
pub mod tcp;
pub mod threads;
pub mod timers;

use super::control::{self, Answer};
use super::pattern::instance;
use children::{Children, Descriptors};
use epoll::EpollSet;
use files::Files;
use identity::IdentityProbe;
use mappings::Mappings;
use mutexes::Robust;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{dup2_raw, pipe2};
use probe::{Findings, Probe};
use queues::Queues;
use signals::Signals;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};
use tcp::Tcp;
use threads::Threads;
use timers::Timers;

/// What PID 1 does. A shell's redirections take descriptors of one digit only: 9 is its pipe to `main`.
const SCRIPT: &str = r#"
trap 'echo trapped >&9' USR1
trap 'kill $reader $sleeper $main; exit 0' TERM
export WORKLOAD="process tree"
"$0" tree-reader $1 $2 & reader=$!
"$0" tree-sleeper $3 & sleeper=$!
shift 3
"$0" tree-main "$@" & main=$!
while kill -0 $main 2>/dev/null; do wait $main; done
"#;
const SHELL_FD: RawFd = 9;
/// Where the other descriptors go.
const FIRST_FD: RawFd = 20;
/// How long a check waits for counters to grow.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the tree is told.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Where to listen for questions
    #[arg(long, default_value = "0.0.0.0:7000")]
    listen: SocketAddr,
    /// Where to make files that have no name
    #[arg(long, default_value = "/tmp")]
    directory: PathBuf,
    /// Change something of this probe's before the first check, which must then fail
    #[arg(long)]
    mutate: Option<String>,
}

/// Becomes the shell that starts the others.
///
/// # Errors
/// What keeps it from that.
pub fn run(options: &Options) -> anyhow::Result<()> {
    let program = std::env::current_exe()?;
    let pipe = || pipe2(OFlag::O_CLOEXEC);
    let [commands, reader, sleeper, shell] = [pipe()?, pipe()?, pipe()?, pipe()?];
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(SCRIPT).arg(&program);
    for fd in [&commands.0, &reader.1, &sleeper.1, &commands.1, &reader.0, &sleeper.0, &shell.0] {
        // The duplicates stay open on exec, and are out of the way of SHELL_FD.
        command.arg(fcntl(fd, FcntlArg::F_DUPFD(FIRST_FD))?.to_string());
    }
    // SAFETY: if one of the pipes has this number it has been duplicated and is not used again.
    std::mem::forget(unsafe { dup2_raw(&shell.1, SHELL_FD) }?);
    command.arg("--listen").arg(options.listen.to_string()).arg("--directory").arg(&options.directory);
    if let Some(probe) = &options.mutate {
        command.arg("--mutate").arg(probe);
    }
    Err(command.exec().into())
}

struct Tree {
    probes: Vec<Box<dyn Probe>>,
    instance: u64,
    checks: u64,
    spoil: Option<String>,
}

/// The process that has one of everything and answers questions.
///
/// # Errors
/// What keeps it from starting.
pub fn main(descriptors: Descriptors, options: Options) -> anyhow::Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    umask(Mode::from_bits_truncate(0o37));
    std::env::set_current_dir("/usr/bin")?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    signals::prepare()?;
    let children = Children::new(descriptors)?;
    let mut threads = Threads::new()?;
    mutexes::start_turns(&mut threads)?;
    let listener = control::listen(options.listen)?;
    let mut probes: Vec<Box<dyn Probe>> = vec![
        Box::new(Signals::new()?),
        Box::new(Timers::new()?),
        Box::new(Files::new(&options.directory)?),
        Box::new(Queues::new()?),
        Box::new(EpollSet::new()?),
        Box::new(Tcp::new()?),
        Box::new(Mappings::new()?),
        Box::new(threads),
        Box::new(children),
    ];
    // Last, but for a thread that does not stay.
    probes.push(Box::new(IdentityProbe::new()?));
    probes.push(Box::new(Robust::new()?));
    let names: Vec<_> = probes.iter().map(|probe| probe.name()).collect();
    if let Some(name) = &options.mutate {
        anyhow::ensure!(names.contains(&name.as_str()), "--mutate takes one of {}", names.join(", "));
    }
    let mut tree = Tree { probes, instance: instance(), checks: 0, spoil: options.mutate };
    control::serve(&listener, |question| match question {
        "check" => tree.check(),
        "instance" => Answer::Ok(format!("{:016x}", tree.instance)),
        other => Answer::Differs(vec![format!("unknown question {other:?}")]),
    })?;
    Ok(())
}

impl Tree {
    fn check(&mut self) -> Answer {
        if let Some(name) = self.spoil.take() {
            self.probes.iter_mut().filter(|probe| probe.name() == name).for_each(|probe| probe.spoil());
        }
        let before = self.counters();
        let mut findings = Findings::default();
        for probe in &mut self.probes {
            findings.about(probe.name());
            probe.check(&mut findings);
        }
        findings.about("counters");
        let start = Instant::now();
        let stuck = loop {
            let now = self.counters();
            let stands_still = |(before, now): &(&(_, u64), &(_, u64))| now.1 <= before.1;
            let stuck: Vec<_> =
                before.iter().zip(&now).filter(stands_still).map(|(before, _)| *before).collect();
            if stuck.is_empty() || start.elapsed() > PATIENCE {
                break stuck;
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        for (name, count) in stuck {
            findings.add(format!("{name} stands still at {count}{}", threads::seen_by_kernel(name)));
        }
        self.checks += 1;
        Answer::new(findings.into_list(), || {
            let counters =
                self.counters().iter().map(|(name, count)| format!(" {name}={count}")).collect::<String>();
            format!("checks={} instance={:016x}{counters}", self.checks, self.instance)
        })
    }

    fn counters(&mut self) -> Vec<(&'static str, u64)> {
        self.probes.iter_mut().flat_map(|probe| probe.counters()).collect()
    }
}
