//! What a peer may send at most. Everything is checked against these before memory is set aside for it.
//!
//! Decoding a control frame never takes more than about [`DECODE_EXPANSION`] times the frame's own length (`tests/hostile.rs`
//! looks for the worst case), so the frame limit bounds what a hostile peer can cost.

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use std::fmt;
use std::marker::PhantomData;

/// Bytes of the first message of a connection, sent before the peer is known.
pub const MAX_OPEN_PAYLOAD: usize = 64 << 10;
/// Bytes of any later control message; a manifest with its socket queues and unlinked files has to fit.
pub const MAX_CONTROL_PAYLOAD: usize = 32 << 20;
/// Bytes of memory that one byte of a control frame costs at most once it is decoded: 24 for a list of empty
/// byte strings, which grows by doubling, so for a moment half as much again.
pub const DECODE_EXPANSION: usize = 40;
/// Pages whose contents travel in one page batch (1 MiB).
pub const MAX_BATCH_PAGES: usize = 256;
/// Runs of pages in one batch: even if no two of its pages are adjacent.
pub const MAX_BATCH_RUNS: usize = MAX_BATCH_PAGES;
/// Pages that one run without contents (zero, absent) may cover: 1 GiB, so that applying a batch stays short.
pub const MAX_EMPTY_RUN_PAGES: u64 = 1 << 18;
/// Page streams of one migration.
pub const MAX_PAGE_STREAMS: u16 = 16;
/// Processes of one container.
pub const MAX_PROCESSES: usize = 4096;
/// Threads of one process.
pub const MAX_THREADS: usize = 16384;
/// Mappings of one process; twice what `vm.max_map_count` of common database hosts allows.
pub const MAX_VMAS: usize = 1 << 19;
/// Open file descriptions of one container.
pub const MAX_DESCRIPTIONS: usize = 1 << 18;
/// Descriptors that room is made for in one table before they come: half a MiB of pointers.
pub const MAX_FD_ROOM: u32 = 1 << 16;
/// Bytes of a path, the NUL that the kernel adds included (`PATH_MAX`).
pub const MAX_PATH: usize = 4096;
/// Bytes of a container's name; it becomes a directory name.
pub const MAX_NAME: usize = 255;
/// Bytes of an extended register state; `XSAVE` with AMX needs about 11 KiB.
pub const MAX_XSTATE: usize = 64 << 10;
/// Bytes of an auxiliary vector; the kernel's own limit is `2 * (AT_VECTOR_SIZE_BASE + AT_VECTOR_SIZE_ARCH + 1)` words.
pub const MAX_AUXV: usize = 1024;
/// Signals that can wait for one thread or process: what `RLIMIT_SIGPENDING` is by default on a host of 8 GiB.
pub const MAX_PENDING_SIGNALS: usize = 1 << 15;

/// Deserialises a list that may have at most `N` elements, failing at the first one beyond.
pub(crate) fn at_most<'de, const N: usize, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    struct Bounded<T, const N: usize>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for Bounded<T, N> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {N} elements")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Vec<T>, A::Error> {
            // The announced length is a claim: memory follows what has really been decoded.
            let mut list = Vec::new();
            while let Some(element) = elements.next_element()? {
                if list.len() == N {
                    return Err(A::Error::invalid_length(N + 1, &self));
                }
                list.push(element);
            }
            Ok(list)
        }
    }

    deserializer.deserialize_seq(Bounded::<T, N>(PhantomData))
}
