//! Memory that the machine's host has backed already.
//!
//! On a virtual machine the first touch of memory can be several times slower than the next, and processors that clients
//! use pay for it. Touching it in advance is not enough: what is freed goes back to the host after some seconds, or at once
//! if it is much (`Documentation/mm/free_page_reporting.rst`). So it is held until it is needed and freed piece by piece
//! then, only a little ahead of whoever takes it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use anyhow::{Context, Result};
use memmap2::MmapMut;
use procfs::{Current, Meminfo};

/// What is freed at a time: few enough pages that nobody notices.
const PIECE_BYTES: u64 = 8 << 20;
/// How much more than in the beginning may be free.
const AHEAD_BYTES: u64 = 256 << 20;
/// How often that is looked at: before a link of 64 Gbit/s has filled it, but seldom enough to leave clients their processor.
const GLANCE: Duration = Duration::from_millis(30);

/// Memory that was touched and is held.
pub struct WarmMemory {
    pieces: Vec<MmapMut>,
}

impl WarmMemory {
    /// So much of it.
    ///
    /// # Errors
    /// When the machine has less.
    pub fn touch(bytes: u64) -> Result<Self> {
        let piece = |_| {
            let mut piece = MmapMut::map_anon(PIECE_BYTES as usize)?;
            piece.fill(1);
            Ok(piece)
        };
        let pieces: std::io::Result<_> = (0..bytes.div_ceil(PIECE_BYTES)).map(piece).collect();
        Ok(Self { pieces: pieces.with_context(|| format!("touch {} MiB of memory", bytes >> 20))? })
    }

    /// Frees it as it is taken, as long as what this returns lives.
    ///
    /// # Errors
    /// When the kernel does not tell how much memory is free.
    pub fn offer(self) -> Result<Offer> {
        let enough = free_bytes()? + AHEAD_BYTES;
        let over = Arc::new(AtomicBool::new(false));
        let stop = over.clone();
        let feed = move || {
            for piece in self.pieces {
                while free_bytes().is_ok_and(|free| free >= enough) && !stop.load(Ordering::Relaxed) {
                    sleep(GLANCE);
                }
                drop(piece);
            }
        };
        Ok(Offer { over, feeder: Some(std::thread::spawn(feed)) })
    }
}

/// Memory that is being freed.
pub struct Offer {
    over: Arc<AtomicBool>,
    feeder: Option<JoinHandle<()>>,
}

impl Drop for Offer {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(feeder) = self.feeder.take() {
            // It does not panic, and nothing depends on it.
            let _ = feeder.join();
        }
    }
}

fn free_bytes() -> Result<u64> {
    Ok(Meminfo::current().context("read /proc/meminfo")?.mem_free)
}

#[cfg(test)]
mod tests {
    use super::*;
    use procfs::process::Process;

    /// What this process has; the machine's free memory is everybody's.
    fn resident_bytes() -> u64 {
        Process::myself().and_then(|own| own.statm()).expect("statm").resident * procfs::page_size()
    }

    #[test]
    fn memory_is_freed_ahead_of_who_takes_it_and_in_the_end() {
        let held = WarmMemory::touch(2 * AHEAD_BYTES).unwrap();
        let before = resident_bytes();
        let offer = held.offer().unwrap();
        while resident_bytes() > before - AHEAD_BYTES / 2 {
            sleep(GLANCE);
        }
        drop(offer);
        assert!(resident_bytes() < before - AHEAD_BYTES, "all of it");
    }
}
