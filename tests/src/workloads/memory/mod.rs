//! Memory correctness under fire: threads that change their address space at random, without pause, and know what
//! every byte must be.
//!
//! Each thread owns a [`Worker`] with its [regions](region): memory and a shadow of it. Whatever a thread does it does
//! as one [operation](operations) under its `Gate`, so that between operations memory and shadow agree. `check`
//! closes all gates, which is the consistent point at which everything is compared: every byte of every region, stack
//! frames of threads in the depth of a recursion, protections as the kernel sees them, and the same in forked children.
//! A checker thread meanwhile compares random pages all the time. The first difference stops everything and is the
//! answer to each later question.

pub mod child;
pub mod mappings;
pub mod operations;
pub mod process;
pub mod region;
pub mod span;
pub mod worker;

use super::control::{self, Answer};
use super::pattern::{Rng, instance};
use region::FilePages;
use span::{Frame, PAGE, WORDS};
use std::fs::File;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use worker::{Failure, Worker, frame_words};

/// Pages of the file that are mapped: enough to be of interest, few enough to keep a copy.
const FILE_PAGES: usize = 1024;
/// Deeper than a stack is at the start, far from its limit.
const DEEPEST: usize = 400;
/// Room for [`DEEPEST`] frames also in an unoptimised build.
const STACK: usize = 8 << 20;

/// What the memory workload is told.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Where to listen for questions
    #[arg(long, default_value = "0.0.0.0:7000")]
    pub listen: SocketAddr,
    /// Same seed, same operations (as far as timing allows)
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Memory to use, in MiB, all threads together
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub mib: u32,
    /// Threads that change memory
    #[arg(long, default_value_t = 4, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..256))]
    pub threads: usize,
    /// Operations per second and thread; 0: without pause
    #[arg(long, default_value_t = 0)]
    pub rate: u32,
    /// Forked children per thread that may live at a time
    #[arg(long, default_value_t = 1)]
    pub children: usize,
    /// File to map privately; it must be the same on every host [default: this program]
    #[arg(long)]
    pub file: Option<PathBuf>,
    /// Use guard pages made by MADV_GUARD_INSTALL (Linux 6.13)
    #[arg(long)]
    pub guard: bool,
    /// Use shared anonymous memory too
    #[arg(long)]
    pub shared: bool,
    /// Corrupt one byte before the first check, which must then fail
    #[arg(long)]
    pub mutate: bool,
}

impl Options {
    /// The memory to use, in pages.
    pub fn pages(&self) -> usize {
        self.mib as usize * ((1 << 20) / PAGE)
    }
}

/// A lock that somebody who waits for it gets next, however busy its owner is.
#[derive(Debug)]
struct Gate {
    worker: Mutex<Worker>,
    /// How many others wait.
    wanted: AtomicUsize,
}

impl Gate {
    /// The owner's way in: after everybody else.
    fn enter(&self) -> MutexGuard<'_, Worker> {
        while self.wanted.load(Ordering::Acquire) > 0 {
            thread::sleep(Duration::from_micros(50));
        }
        self.worker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everybody else's way in.
    fn inspect(&self) -> MutexGuard<'_, Worker> {
        self.wanted.fetch_add(1, Ordering::AcqRel);
        let guard = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        self.wanted.fetch_sub(1, Ordering::AcqRel);
        guard
    }
}

struct World {
    options: Options,
    instance: u64,
    gates: Vec<Gate>,
    failure: OnceLock<String>,
    mutated: AtomicBool,
    checks: AtomicU64,
    verified: AtomicU64,
}

/// Runs until it is killed.
///
/// # Errors
/// What keeps it from starting.
pub fn run(options: Options) -> anyhow::Result<()> {
    // A panic may leave a frame behind that others look at; the process must not go on.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::abort();
    }));
    process::reap_automatically();
    let path = options.file.clone().unwrap_or_else(|| "/proc/self/exe".into());
    let file = Arc::new(FilePages::read(File::open(path)?, FILE_PAGES)?);
    anyhow::ensure!(file.count() > 0, "the file to map has not even one page");
    let world = World::new(options, &file)?;
    let listener = control::listen(world.options.listen)?;
    thread::scope(|scope| {
        for gate in &world.gates[1..] {
            thread::Builder::new().stack_size(STACK).spawn_scoped(scope, || world.work(gate))?;
        }
        scope.spawn(|| world.verify_for_ever());
        scope.spawn(|| control::serve(&listener, |question| world.answer(question)));
        // The main thread has the stack that the kernel grows, and the heap.
        world.work(&world.gates[0]);
        Ok(())
    })
}

impl World {
    fn new(options: Options, file: &Arc<FilePages>) -> Result<Self, Failure> {
        let gate = |index| {
            let worker = Worker::new(index, &options, Arc::clone(file))?;
            Ok(Gate { worker: Mutex::new(worker), wanted: AtomicUsize::new(0) })
        };
        Ok(World {
            gates: (0..options.threads).map(gate).collect::<Result<_, Failure>>()?,
            options,
            instance: instance(),
            failure: OnceLock::new(),
            mutated: AtomicBool::new(false),
            checks: AtomicU64::new(0),
            verified: AtomicU64::new(0),
        })
    }

    fn fail(&self, failure: &Failure) {
        if self.failure.set(failure.to_string()).is_ok() {
            eprintln!("pclive-workload memory: {failure}");
        }
    }

    /// A worker thread: operations, now and then in the depth of a recursion, until something is wrong.
    fn work(&self, gate: &Gate) {
        while self.failure.get().is_none() {
            let depth = {
                let mut worker = gate.enter();
                if worker.rng.chance(1) { worker.rng.below(DEEPEST) } else { 0 }
            };
            let result = if depth > 0 { self.descend(gate, depth) } else { self.step(gate) };
            if let Err(failure) = result {
                self.fail(&failure);
            }
        }
    }

    fn step(&self, gate: &Gate) -> Result<(), Failure> {
        let start = Instant::now();
        gate.enter().step()?;
        if self.options.rate > 0 {
            thread::sleep((Duration::from_secs(1) / self.options.rate).saturating_sub(start.elapsed()));
        }
        Ok(())
    }

    /// Fills `depth` pages of stack and works below them.
    fn descend(&self, gate: &Gate, depth: usize) -> Result<(), Failure> {
        let words: [AtomicU64; WORDS] = std::array::from_fn(|_| AtomicU64::new(0));
        // SAFETY: `leave_frame` below drops it before `words` goes, and a panic ends the process.
        let frame = unsafe { Frame::new(&words) };
        gate.enter().enter_frame(frame, |seed| {
            words
                .iter()
                .zip(frame_words(seed))
                .for_each(|(word, value)| word.store(value, Ordering::Relaxed));
        });
        let result = match depth {
            0 => (0..20).try_for_each(|_| self.step(gate)),
            _ => self.descend(gate, depth - 1),
        };
        let left = gate.enter().leave_frame();
        result.and(left)
    }

    fn verify_for_ever(&self) {
        let mut rng = Rng::new(self.options.seed);
        while self.failure.get().is_none() {
            let gate = &self.gates[rng.below(self.gates.len())];
            let result = gate.inspect().verify_some(&mut rng, 8);
            self.verified.fetch_add(1, Ordering::Relaxed);
            if let Err(failure) = result {
                self.fail(&failure);
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn answer(&self, question: &str) -> Answer {
        match question {
            "check" => self.check(),
            "instance" => Answer::Ok(format!("{:016x}", self.instance)),
            other => Answer::Differs(vec![format!("unknown question {other:?}")]),
        }
    }

    /// Stops the world and compares all of it.
    fn check(&self) -> Answer {
        if let Some(failure) = self.failure.get() {
            return Answer::Differs(vec![failure.clone()]);
        }
        let mut workers: Vec<_> = self.gates.iter().map(Gate::inspect).collect();
        if self.options.mutate && !self.mutated.swap(true, Ordering::Relaxed) {
            workers[0].corrupt();
        }
        workers.iter_mut().flat_map(|worker| &mut worker.children).for_each(child::Child::begin_check);
        let (mut pages, mut operations, mut differences) = (0, 0, Vec::new());
        for worker in &mut workers {
            differences.extend(worker.verify_all().err());
            pages += worker.pages() as u64;
            operations += worker.operations();
            for child in &mut worker.children {
                match child.finish_check() {
                    Ok(more) => pages += more,
                    Err(failure) => differences.push(failure),
                }
            }
        }
        match std::fs::read_to_string("/proc/self/maps").map(|text| mappings::parse(&text)) {
            Ok(mappings) => {
                differences.extend(workers.iter().filter_map(|w| w.verify_protection(&mappings).err()))
            }
            Err(error) => differences.push(Failure::call("read /proc/self/maps", error)),
        }
        differences.first().inspect(|failure| self.fail(failure));
        let checks = self.checks.fetch_add(1, Ordering::Relaxed) + 1;
        Answer::new(differences.iter().map(ToString::to_string).collect(), || {
            let (verified, instance) = (self.verified.load(Ordering::Relaxed), self.instance);
            format!("{pages} {operations} checks={checks} verified={verified} instance={instance:016x}")
        })
    }
}
