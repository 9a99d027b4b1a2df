//! Processes that come and go without pause.
//!
//! ```text
//!   PID 1: answers `check`; three threads and what they start
//!     ├── spawn: `cat`, again and again, by vfork and exec (as posix_spawn(3) does it)
//!     ├── fork: a shell, again and again, which forks twice without executing anything
//!     └── phoenix, if asked for: one process that executes the shell, then this program, then the shell …
//! ```
//!
//! Whatever is started is given a number, which comes back through pipes and exit statuses: none may be missing, come
//! twice or be wrong. The phoenix numbers its generations, and says which program it is and that its pid is the same.

use super::control::{self, Answer};
use super::pattern::instance;
use anyhow::{Context, Result, ensure};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Answers with the number that it reads plus one, and ends with it.
const FORKING: &str = "read n; m=$(echo $((n + 1))); (exit $((m % 100))); echo $m $?";
/// The phoenix as a shell: says so, and becomes the program.
const SHELL: &str = r#"echo "$1 shell $$"; exec "$0" processes-phoenix $(($1 + 1))"#;
/// How long a check waits for every kind of process to come and go.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the processes are told.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Where to listen for questions
    #[arg(long, default_value = "0.0.0.0:7000")]
    listen: SocketAddr,
    /// Start the phoenix, too
    #[arg(long)]
    phoenix: bool,
}

/// What became of the processes of one kind.
struct Kind {
    name: &'static str,
    count: AtomicU64,
    failure: Mutex<Option<String>>,
}

impl Kind {
    /// Has `one` deal with process after process, each with its number, until something is wrong.
    fn start(name: &'static str, mut one: impl FnMut(u64) -> Result<()> + Send + 'static) -> Arc<Self> {
        let kind = Arc::new(Self { name, count: AtomicU64::new(0), failure: Mutex::new(None) });
        let own = Arc::clone(&kind);
        std::thread::spawn(move || {
            loop {
                let number = own.count();
                match one(number) {
                    Ok(()) => own.count.store(number + 1, Ordering::Relaxed),
                    Err(error) => {
                        break *own.failure.lock().expect("nobody panics") = Some(format!("{error:#}"));
                    }
                }
            }
        });
        kind
    }

    fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// What is wrong, if anything: also that no process comes and goes any more.
    fn difference(&self, before: u64, deadline: Instant) -> Option<String> {
        loop {
            if let Some(failure) = &*self.failure.lock().expect("nobody panics") {
                return Some(format!("{} {}: {failure}", self.name, self.count()));
            }
            // The one that was under way may have come to its end before the question.
            if self.count() > before + 1 {
                return None;
            }
            if Instant::now() > deadline {
                return Some(format!("{} stands still at {before}", self.name));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Starts the processes and answers questions.
///
/// # Errors
/// What keeps it from starting.
pub fn run(options: &Options) -> Result<()> {
    let mut kinds = vec![Kind::start("spawn", spawn), Kind::start("fork", fork)];
    if options.phoenix {
        kinds.push(start_phoenix()?);
    }
    let listener = control::listen(options.listen)?;
    let (instance, mut checks) = (instance(), 0);
    control::serve(&listener, |question| match question {
        "check" => {
            checks += 1;
            let before: Vec<_> = kinds.iter().map(|kind| kind.count()).collect();
            let deadline = Instant::now() + PATIENCE;
            let looked_at = kinds.iter().zip(before);
            let differences =
                looked_at.filter_map(|(kind, before)| kind.difference(before, deadline)).collect();
            Answer::new(differences, || {
                let counts = kinds.iter().map(|kind| format!(" {}={}", kind.name, kind.count()));
                format!("checks={checks} instance={instance:016x}{}", counts.collect::<String>())
            })
        }
        "instance" => Answer::Ok(format!("{instance:016x}")),
        other => Answer::Differs(vec![format!("unknown question {other:?}")]),
    })?;
    Ok(())
}

fn spawn(number: u64) -> Result<()> {
    converse(&mut Command::new("/bin/cat"), number, &format!("{number}\n"))
}

fn fork(number: u64) -> Result<()> {
    let next = number + 1;
    converse(Command::new("/bin/sh").args(["-c", FORKING]), number, &format!("{next} {}\n", next % 100))
}

/// Gives a process its number and checks what it says.
fn converse(command: &mut Command, number: u64, expected: &str) -> Result<()> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("start it")?;
    // Dropped, and so closed, when the number has been written.
    writeln!(child.stdin.take().context("piped above")?, "{number}").context("tell it its number")?;
    let mut said = String::new();
    child.stdout.take().context("piped above")?.read_to_string(&mut said).context("hear it")?;
    ensure!(said == expected, "it says {said:?}, not {expected:?}");
    let status = child.wait().context("wait for it")?;
    ensure!(status.success(), "{status}");
    Ok(())
}

/// The phoenix, each generation of which counts as a process.
fn start_phoenix() -> Result<Arc<Kind>> {
    let mut command = Command::new(std::env::current_exe()?);
    let mut phoenix = command.args(["processes-phoenix", "0"]).stdout(Stdio::piped()).spawn()?;
    let pid = phoenix.id();
    let mut lines = BufReader::new(phoenix.stdout.take().context("piped above")?);
    Ok(Kind::start("phoenix", move |generation| {
        let program = if generation % 2 == 0 { "program" } else { "shell" };
        let mut line = String::new();
        lines.read_line(&mut line)?;
        let expected = format!("{generation} {program} {pid}\n");
        ensure!(line == expected, "it says {line:?}, its end is {:?}", phoenix.try_wait());
        Ok(())
    }))
}

/// The phoenix as this program: says so, and becomes the shell.
///
/// # Errors
/// What keeps it from that.
pub fn phoenix(generation: u64) -> Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    println!("{generation} program {}", std::process::id());
    let (own, next) = (std::env::current_exe()?, (generation + 1).to_string());
    Err(Command::new("/bin/sh").args(["-c", SHELL]).arg(own).arg(next).exec().into())
}
