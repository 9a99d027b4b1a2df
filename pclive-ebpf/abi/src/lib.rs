//! The record that pclive's eBPF programs hand to the user side.
//!
//! One fault is one [`Event`] of 24 bytes in a ring buffer, 32 with the kernel's header: a gigabyte written page by
//! page is 8 MiB of events. That is why the kind sits in the low bits of the page address.
#![no_std]

/// Bytes in a base page (x86-64), and so the room that a page address leaves for the kind.
pub const PAGE_SIZE: u64 = 4096;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A write fault at the page; `extra` is the thread.
    Write = 1,
    /// New mapping from the page on; `extra` is its length in pages, 0 if unknown (`shmat`).
    Mapped = 2,
    /// The range is mapped no longer; `extra` is its length in pages, 0 if unknown (`shmdt`).
    Unmapped = 3,
    /// Half of an `mremap`: one event has the old range, the next one has the new range.
    Remapped = 4,
    /// The range got other access rights.
    Protected = 5,
    /// The range's contents were given back (`MADV_DONTNEED`, `MADV_FREE`, `MADV_REMOVE`, …).
    Discarded = 6,
    /// The heap now ends at the page.
    HeapMoved = 7,
    /// The process has a new child process; `extra` is the child.
    Forked = 8,
    /// The process runs a new program in a new address space.
    Execed = 9,
    /// The last thread of the process is ending.
    Exited = 10,
}

impl Kind {
    const ALL: [Kind; 10] = [
        Kind::Write,
        Kind::Mapped,
        Kind::Unmapped,
        Kind::Remapped,
        Kind::Protected,
        Kind::Discarded,
        Kind::HeapMoved,
        Kind::Forked,
        Kind::Execed,
        Kind::Exited,
    ];
}

/// One event. Its process and thread ids are those of the initial pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Event {
    place: u64,
    /// `CLOCK_MONOTONIC`, in nanoseconds.
    pub time: u64,
    /// The process (thread group) whose memory or life changed.
    pub tgid: u32,
    /// See [`Kind`].
    pub extra: u32,
}

const _: () = assert!(size_of::<Event>() == Event::SIZE && align_of::<Event>() == 8);

impl Event {
    /// Bytes of an event in the ring buffer.
    pub const SIZE: usize = 24;

    /// An event about the page that holds `address`.
    #[inline(always)]
    pub const fn new(kind: Kind, address: u64, time: u64, tgid: u32, extra: u32) -> Self {
        Self { place: (address & !(PAGE_SIZE - 1)) | kind as u64, time, tgid, extra }
    }

    /// The event in a ring buffer record; `None` if the record has another size.
    pub fn from_record(record: &[u8]) -> Option<Self> {
        let record: &[u8; Self::SIZE] = record.try_into().ok()?;
        let (words, _) = record.as_chunks::<8>();
        let (ids, _) = words[2].as_chunks::<4>();
        Some(Self {
            place: u64::from_ne_bytes(words[0]),
            time: u64::from_ne_bytes(words[1]),
            tgid: u32::from_ne_bytes(ids[0]),
            extra: u32::from_ne_bytes(ids[1]),
        })
    }

    /// What happened; `None` if this version of the user side does not know it.
    pub fn kind(&self) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| *kind as u64 == self.place & (PAGE_SIZE - 1))
    }

    /// Address of the page.
    pub fn page(&self) -> u64 {
        self.place & !(PAGE_SIZE - 1)
    }
}

/// The ring buffers, and with them the slots of the `LOST` counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Ring {
    /// Write faults: a flood of them must not push out the rarer, costlier news of the other ring.
    Writes = 0,
    /// Address-space changes and processes.
    Changes = 1,
}

/// A question for the flags of a process's mappings (`vm_flags`), and the answer, which takes its place.
///
/// The first word has the process (thread group) below and the number of mappings above; 0 once it is answered. Each of the
/// others has an address in a mapping, then the flags of that mapping; 0 if it has not been found.
pub type FlagQuestion = [u64; FLAG_QUESTION_WORDS];

/// Words of a [`FlagQuestion`]: 32 KiB.
pub const FLAG_QUESTION_WORDS: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_gives_back_the_event() {
        for kind in Kind::ALL {
            let event = Event::new(kind, 0x7fff_1234_5678, 99, 4_000_000, 7);
            let mut record = [0; Event::SIZE];
            record[..8].copy_from_slice(&event.place.to_ne_bytes());
            record[8..16].copy_from_slice(&event.time.to_ne_bytes());
            record[16..20].copy_from_slice(&event.tgid.to_ne_bytes());
            record[20..].copy_from_slice(&event.extra.to_ne_bytes());
            assert_eq!(Event::from_record(&record), Some(event));
            assert_eq!((event.kind(), event.page()), (Some(kind), 0x7fff_1234_5000));
        }
    }

    #[test]
    fn a_record_of_another_size_or_kind_is_refused() {
        assert_eq!(Event::from_record(&[0; 23]), None);
        assert_eq!(Event::from_record(&[0; 25]), None);
        assert_eq!(Event::from_record(&[0; 24]).and_then(|event| event.kind()), None);
    }
}
