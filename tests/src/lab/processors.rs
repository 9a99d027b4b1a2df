//! Who runs where.
//!
//! Hosts, container and clients share one machine here. Left to itself its scheduler lets server and clients take turns on
//! one processor for seconds, while another one idles, as soon as somebody else wakes up now and then: they get a third
//! less, with or without a migration, which is as good as noise. So a container may have the upper half of the processors
//! for itself, as one that was given dedicated ones (`--cpuset-cpus`), and everything else has the lower half.

use std::marker::PhantomData;

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// The calling thread.
const SELF: Pid = Pid::from_raw(0);

/// The numbers of the processors that the calling thread may use.
///
/// # Errors
/// When the kernel does not tell them.
pub fn own_processors() -> Result<Vec<usize>> {
    let own = sched_getaffinity(SELF).context("sched_getaffinity")?;
    Ok((0..CpuSet::count()).filter(|&number| own.is_set(number) == Ok(true)).collect())
}

/// Processors for containers alone. The calling thread, with whatever it starts, keeps off them until this is dropped.
#[derive(Debug)]
pub struct DedicatedProcessors {
    numbers: Vec<usize>,
    before: CpuSet,
    /// It is this thread's.
    thread: PhantomData<*const ()>,
}

impl DedicatedProcessors {
    /// The upper half of those that the calling thread may use: none if there is only one.
    ///
    /// # Errors
    /// When the kernel does not tell them, or refuses.
    pub fn take() -> Result<Self> {
        let before = sched_getaffinity(SELF).context("sched_getaffinity")?;
        let mut numbers = own_processors()?;
        let upper = numbers.split_off(numbers.len().div_ceil(2));
        let mut rest = CpuSet::new();
        numbers.into_iter().try_for_each(|number| rest.set(number)).context("CPU_SET")?;
        sched_setaffinity(SELF, &rest).context("sched_setaffinity")?;
        Ok(Self { numbers: upper, before, thread: PhantomData })
    }

    /// Their numbers.
    pub fn numbers(&self) -> &[usize] {
        &self.numbers
    }
}

impl Drop for DedicatedProcessors {
    fn drop(&mut self) {
        if let Err(error) = sched_setaffinity(SELF, &self.before) {
            eprintln!("this thread keeps to half of the processors: {error}");
        }
    }
}
