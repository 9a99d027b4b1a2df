//! Idle processors stay awake in a short blackout.
//!
//! An idle processor sleeps, and to wake it takes from some microseconds to hundreds, most of all in a virtual machine, where the
//! host has to be asked. In the blackout the threads of pclive, of the container and of the other host wait for each other all
//! the time. So pclive asks the kernel for a wake-up latency of 0 then, for all of the host's processors: they poll instead of
//! sleeping (Documentation/power/pm_qos_interface.rst; `CONFIG_CPU_IDLE`, in a virtual machine with the `haltpoll` governor,
//! too). Between two processors of the development machine there and back takes 9 µs then instead of 95.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};

/// No processor of this host sleeps as long as this lives. If pclive is killed the kernel takes the request back.
#[derive(Debug)]
pub struct Awake {
    _request: File,
}

impl Awake {
    /// Wakes all processors.
    ///
    /// # Errors
    /// Without `CONFIG_CPU_IDLE`, or root, there is no such request.
    pub fn keep() -> io::Result<Self> {
        let mut request = OpenOptions::new().write(true).open("/dev/cpu_dma_latency")?;
        request.write_all(&0i32.to_ne_bytes())?;
        Ok(Self { _request: request })
    }

    /// The same if it is `wanted`, where that can be done.
    pub fn keep_if(wanted: bool) -> Option<Self> {
        let keep = || Self::keep().inspect_err(|error| tracing::debug!("idle processors may sleep: {error}"));
        wanted.then(keep)?.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn nobody_may_take_time_to_wake_up() {
        let _awake = Awake::keep().unwrap();
        // What the requests of all of this host come to, in microseconds; without any it is 2,000 s.
        let mut latency = [0; 4];
        File::open("/dev/cpu_dma_latency").unwrap().read_exact(&mut latency).unwrap();
        assert_eq!(i32::from_ne_bytes(latency), 0);
    }
}
