//! The way back of a thread that makes calls for a pclive which dies meanwhile.
//!
//! When a tracer dies, the kernel lets its tracees go on with the registers that they have then. So a borrowed thread of a
//! container must at every moment have registers with which it undoes by itself what was done with it, and goes on as if
//! nothing had been. The code for that, and what registers and signal mask the thread had, must lie somewhere, even before
//! there is an [`Arena`](super::Arena) and when it is gone again: where the vDSO's file ends, the rest of its last page is
//! used by nobody. It is written there as a debugger sets a breakpoint, which gives the process a copy of that page of its
//! own, and is wiped out again when the thread is given back.
//!
//! ```text
//! vDSO's last page:  … end of its file │ code │ leader's record │ leader's entry │ hop 0 │ hop 1 │ …
//! arena:             interpreter │ entry 1 │ entry 2 │ … │ places, each beginning with its thread's record
//! record:            flags, rsp, signal mask, address of the entry, the other registers
//! entry:             whether the thread still needs the arena, address of its hop
//! hop:               says that it does not, loads the last register, and jumps to where the thread was
//! ```
//!
//! - **Between two calls** a thread is stopped right after its last one, in front of the code that undoes it (`close`,
//!   `munmap`) and leads back.
//! - **At the end of a script** it sends itself a signal that the process ignores, and unblocks it. A tracer is told of that,
//!   and keeps it there; without one nothing comes of it, and the thread finds its way back. Where there is no such signal,
//!   the tracer follows the script by the system-call stops of each of its calls.
//! - **The leader** maps the arena and unmaps it. On its way back it waits until no other thread needs it any more, but not
//!   forever. The arena stays if pclive has died in the microsecond between noting that a thread will need it and letting it
//!   go, or between taking it back and noting that; if a thread does not come to run for long; and in a child that a thread
//!   which is free already forks before.
//! - **Signals** are all blocked on the way, but for the moment before they first are, when the thread has its own stack
//!   pointer. What the way back cannot restore is when a signal comes: one that comes while a thread is borrowed is handled
//!   before the call in which it was stopped is made again, which without pclive may have failed with `EINTR`.
//! - **Another pclive** finds what a killed one has left, and leaves it as it was: threads may still be on it. A thread that
//!   is cannot be borrowed. One that handles a signal on its way cannot be told from others: should it be moved meanwhile,
//!   it has no way back from its handler.

use super::borrowed::Place;
use super::footing::Dispositions;
use crate::Result;
use crate::mem::ProcessMemory;
use pclive_wire::manifest::Registers;
use pclive_wire::{PAGE_SIZE, PageRange, VirtAddr};
use std::sync::Arc;

/// Threads that may need an arena at the same time, besides the leader.
pub(super) const ENTRIES: usize = 63;
pub(super) const ENTRY_SIZE: usize = 16;
/// Bytes of a record: 21 words.
pub(super) const RECORD_SIZE: usize = 176;
/// Words of a record that the leader's has in addition: the arena, and its length.
const ARENA_OFFSET: usize = 40;
/// Bytes of a hop: code, then the last register and the instruction pointer.
const HOP_SIZE: usize = 32;
const HOP_WORDS: usize = 16;
/// How often the leader looks whether the others have left, and for how long it waits each time: together 100 ms. Not by
/// `nanosleep`, which may take the place of a call that the kernel is to restart.
const PATIENCE: usize = 500;
const PAUSE_NS: u64 = 200_000;
/// The signals that do nothing to a process without a handler for them.
const IGNORED: [i32; 3] = [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD];
/// What the first process of a pid namespace ignores, too, as everything that it has no handler for (`SIGNAL_UNKILLABLE`). It
/// takes back a `SIGCONT` that is pending, also one for another thread and one that comes meanwhile.
const IGNORED_BY_INIT: i32 = libc::SIGTTIN;

// rbp = the record, all the way. Calls are entered with r14 = the call that undoes what it returns, or 0, r13 = the second
// argument of that, and r12 = where the way back begins then.
std::arch::global_asm!(
    r#"
    .pushsection .rodata.pclive_way_back,"a",@progbits
    .globl pclive_way_back_start
    .globl pclive_way_back_leave
    .globl pclive_way_back_back
    .globl pclive_way_back_end
    .globl pclive_way_back_hop
    .globl pclive_way_back_own_hop
    .globl pclive_way_back_hop_end
    .p2align 4
pclive_way_back_start:
    syscall
    test r14, r14
    jz 1f
    cmp rax, -4095
    jae 1f
    mov rdi, rax
    mov rsi, r13
    mov rax, r14
    syscall
1:  jmp r12

pclive_way_back_leave:
    mov ebx, {patience}
2:  mov rdi, [rbp + {arena}]
    lea rsi, [rdi + {entries_offset}]
    mov ecx, {entries}
3:  cmp qword ptr [rsi], 0
    jne 4f
    add rsi, {entry_size}
    dec ecx
    jnz 3b
    mov rsi, [rbp + {arena} + 8]
    mov eax, {munmap}
    syscall
    jmp pclive_way_back_back
4:  mov edi, 0
    mov esi, 0
    lea rdx, [rip + pclive_way_back_pause]
    mov r10d, 0
    mov eax, {ppoll}
    syscall
    dec ebx
    jnz 2b

pclive_way_back_back:
    lea rsi, [rbp + 24]
    mov edi, {setmask}
    mov edx, 0
    mov r10d, 8
    mov eax, {sigprocmask}
    syscall
    mov rsp, rbp
    popfq
    mov rsp, [rbp + 8]
    lea rsi, [rbp + 16]
    mov edi, {setmask}
    mov edx, 0
    mov r10d, 8
    mov eax, {sigprocmask}
    syscall
    mov r15, [rbp + 56]
    mov r14, [rbp + 64]
    mov r13, [rbp + 72]
    mov r12, [rbp + 80]
    mov rbx, [rbp + 96]
    mov r11, [rbp + 104]
    mov r10, [rbp + 112]
    mov r9, [rbp + 120]
    mov r8, [rbp + 128]
    mov rcx, [rbp + 136]
    mov rdx, [rbp + 144]
    mov rsi, [rbp + 152]
    mov rdi, [rbp + 160]
    mov rax, [rbp + 32]
    mov rbp, [rbp + 88]
    jmp qword ptr [rax + 8]
pclive_way_back_pause:
    .quad 0, {pause_ns}
pclive_way_back_end:

pclive_way_back_hop:
    mov byte ptr [rax], 0
pclive_way_back_own_hop:
    mov rax, [rip + 5f]
    jmp qword ptr [rip + 6f]
5:  .quad 0
6:  .quad 0
pclive_way_back_hop_end:
    .popsection
    "#,
    patience = const PATIENCE,
    arena = const ARENA_OFFSET,
    entries_offset = const super::ENTRIES_OFFSET,
    entries = const ENTRIES,
    entry_size = const ENTRY_SIZE,
    setmask = const libc::SIG_SETMASK,
    munmap = const libc::SYS_munmap,
    ppoll = const libc::SYS_ppoll,
    pause_ns = const PAUSE_NS,
    sigprocmask = const libc::SYS_rt_sigprocmask,
);

unsafe extern "C" {
    static pclive_way_back_start: u8;
    static pclive_way_back_leave: u8;
    static pclive_way_back_back: u8;
    static pclive_way_back_end: u8;
    static pclive_way_back_hop: u8;
    static pclive_way_back_own_hop: u8;
    static pclive_way_back_hop_end: u8;
}

/// The code, and how far from its start a thread begins to leave an arena, and to go back.
fn code() -> (&'static [u8], u64, u64) {
    let (start, end) = (&raw const pclive_way_back_start, &raw const pclive_way_back_end);
    // SAFETY: all of these symbols lie in the same constant blob, defined above, in the order in which they are subtracted.
    unsafe {
        let distance = |symbol: *const u8| symbol.offset_from(start) as usize;
        let code = std::slice::from_raw_parts(start, distance(end));
        let [leave, back] = [&raw const pclive_way_back_leave, &raw const pclive_way_back_back].map(distance);
        (code, leave as u64, back as u64)
    }
}

/// The code of a hop, which two words follow, and how far from its start the leader begins, which has no entry in an arena.
fn hop_code() -> (&'static [u8], u64) {
    let (start, end) = (&raw const pclive_way_back_hop, &raw const pclive_way_back_hop_end);
    // SAFETY: as above.
    unsafe {
        let code = std::slice::from_raw_parts(start, end.offset_from(start) as usize - HOP_WORDS);
        (code, (&raw const pclive_way_back_own_hop).offset_from(start) as u64)
    }
}

/// Where the threads of a process find their way back.
#[derive(Debug)]
pub struct WayBack {
    memory: Arc<ProcessMemory>,
    gap: Gap,
    /// What is there otherwise.
    before: Vec<u8>,
}

/// Room that nobody uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Gap {
    start: VirtAddr,
    /// The leader's is the first.
    hops: usize,
}

/// A thread's own way: where its record is, and what else is written for it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Track {
    pub(super) record: VirtAddr,
    entry: VirtAddr,
    hop: usize,
}

impl Track {
    /// Whether it is that of the thread that maps the arena, and unmaps it.
    pub(super) fn is_leader(self) -> bool {
        self.hop == 0
    }
}

impl WayBack {
    /// Finds the gap behind the end of the vDSO's file, of which `image` is all that is mapped at `vdso`. `None` if there is not
    /// enough room for a leader and one other thread.
    pub(super) fn find(memory: Arc<ProcessMemory>, vdso: PageRange, image: &[u8]) -> Option<Self> {
        let gap = Gap::find(vdso, image)?;
        let before = image[(gap.start.0 - vdso.start.0) as usize..][..gap.size()].to_vec();
        Some(Self { memory, gap, before })
    }

    /// Whether the gap is empty, or has in it what a pclive like this one has left.
    pub(super) fn is_usable(&self) -> bool {
        self.before.starts_with(code().0) || self.before.iter().all(|&byte| byte == 0)
    }

    /// Whether a thread with these registers is just coming back from calls for a pclive that was killed.
    pub(super) fn is_taken_by(&self, registers: &Registers) -> bool {
        let is_within = |start: u64, size: usize| registers.rip.wrapping_sub(start) < size as u64;
        let (interpreter, page) = (super::interpreter(), registers.rip / PAGE_SIZE * PAGE_SIZE);
        let mut there = vec![0; interpreter.len()];
        is_within(self.gap.start.0, self.gap.size())
            || is_within(page, interpreter.len())
                && self.memory.read(VirtAddr(page), &mut there).is_ok()
                && there == interpreter
    }

    /// Threads besides the leader that can be borrowed at the same time.
    pub(super) fn members(&self) -> usize {
        (self.gap.hops - 1).min(ENTRIES)
    }

    /// Where a call is made that leads back.
    pub(super) fn call(&self) -> VirtAddr {
        self.gap.start
    }

    /// Where the way back begins for the thread that has mapped the arena.
    pub(super) fn leave(&self) -> VirtAddr {
        self.gap.start.offset(code().1)
    }

    /// Where it begins otherwise.
    pub(super) fn back(&self) -> VirtAddr {
        self.gap.start.offset(code().2)
    }

    /// Writes it, for the leader with these registers and this signal mask.
    pub(super) fn lay(&self, registers: &Registers, mask: u64) -> Result<Track> {
        let track = Track { record: self.gap.record(), entry: self.gap.entry(), hop: 0 };
        let hop = self.gap.hop(track.hop).0 + hop_code().1;
        let entry = [0u64.to_ne_bytes(), hop.to_ne_bytes()].concat();
        let mut text = code().0.to_vec();
        text.resize(Gap::RECORD, 0);
        text.extend(record(registers, mask, track.entry));
        text.extend(entry);
        text.extend(self.hop(registers));
        self.memory.write(self.gap.start, &text)?;
        Ok(track)
    }

    /// Writes that of another thread, the `index`th, for as long as its script has `place` in the arena that begins at
    /// `arena`.
    pub(super) fn lay_beside(
        &self,
        registers: &Registers,
        mask: u64,
        (arena, place, index): (VirtAddr, Place, usize),
    ) -> Result<Track> {
        let entry = arena.offset((super::ENTRIES_OFFSET + index * ENTRY_SIZE) as u64);
        let track = Track { record: place.record(), entry, hop: index + 1 };
        let hop = self.gap.hop(track.hop);
        self.memory.write(hop, &self.hop(registers))?;
        self.memory.write(track.record, &record(registers, mask, track.entry))?;
        self.memory.write(track.entry, &[1u64.to_ne_bytes(), hop.0.to_ne_bytes()].concat())?;
        Ok(track)
    }

    /// Notes which arena the leader unmaps on its way back.
    pub(super) fn note_arena(&self, arena: PageRange) -> Result<()> {
        let words = [arena.start.0.to_ne_bytes(), arena.bytes().to_ne_bytes()].concat();
        self.memory.write(self.gap.record().offset(ARENA_OFFSET as u64), &words)
    }

    /// Takes back what was written for a thread that has been given back: for the leader, everything.
    pub(super) fn clear(&self, track: Track) -> Result<()> {
        match track.is_leader() {
            true => self.memory.write(self.gap.start, &self.before),
            false => self.memory.write(track.entry, &[0; 8]),
        }
    }

    fn hop(&self, registers: &Registers) -> Vec<u8> {
        let words = [registers.rax, registers.rip].map(u64::to_ne_bytes).concat();
        [hop_code().0, &words].concat()
    }
}

impl Gap {
    /// Where the leader's record is, behind the code.
    const RECORD: usize = 320;

    fn find(vdso: PageRange, image: &[u8]) -> Option<Self> {
        let start = file_size(image)?.next_multiple_of(16);
        let hops = image.len().checked_sub(start + Self::HOPS)? / HOP_SIZE;
        (hops > 1).then_some(Self { start: vdso.start.offset(start as u64), hops })
    }

    const ENTRY: usize = Self::RECORD + RECORD_SIZE;
    const HOPS: usize = Self::ENTRY + ENTRY_SIZE;

    fn record(self) -> VirtAddr {
        self.start.offset(Self::RECORD as u64)
    }

    fn entry(self) -> VirtAddr {
        self.start.offset(Self::ENTRY as u64)
    }

    fn hop(self, index: usize) -> VirtAddr {
        self.start.offset((Self::HOPS + index * HOP_SIZE) as u64)
    }

    fn size(self) -> usize {
        Self::HOPS + self.hops * HOP_SIZE
    }
}

/// A thread's record.
fn record(r: &Registers, mask: u64, entry: VirtAddr) -> [u8; RECORD_SIZE] {
    let words = [
        r.eflags,
        r.rsp,
        mask,
        u64::MAX,
        entry.0,
        0,
        0,
        r.r15,
        r.r14,
        r.r13,
        r.r12,
        r.rbp,
        r.rbx,
        r.r11,
        r.r10,
        r.r9,
        r.r8,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
    ];
    let mut raw = [0; RECORD_SIZE];
    raw.chunks_exact_mut(8).zip(words).for_each(|(bytes, word)| bytes.copy_from_slice(&word.to_ne_bytes()));
    raw
}

/// Bytes of an ELF file, by what its headers tell (elf(5)): segments, and the table of sections, which comes last.
fn file_size(image: &[u8]) -> Option<usize> {
    let word = |at: usize| Some(u64::from_ne_bytes(image.get(at..at + 8)?.try_into().ok()?));
    let half = |at: usize| Some(u64::from(u16::from_ne_bytes(image.get(at..at + 2)?.try_into().ok()?)));
    let (segments, sections) = (word(32)?, word(40)?);
    let [segment_size, segment_count, section_size, section_count] =
        [half(54)?, half(56)?, half(58)?, half(60)?];
    let mut end = sections.checked_add(section_size * section_count)?;
    for i in 0..segment_count {
        let header = segments.checked_add(i * segment_size)? as usize;
        end = end.max(word(header.checked_add(8)?)?.checked_add(word(header.checked_add(32)?)?)?);
    }
    usize::try_from(end).ok().filter(|&end| end <= image.len())
}

/// What decides which signals a thread does not notice.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Signals {
    pub(super) of_process: Dispositions,
    /// The thread has blocked these.
    pub(super) blocked: u64,
    /// These are pending for the thread, and for all of its process.
    pub(super) pending: u64,
    pub(super) pending_for_all: u64,
}

/// A signal that a thread can send to itself without noticing it: the process has no handler for it, and what is done without
/// one is to ignore it. Nor is it pending, so that somebody may wait for it.
pub(super) fn unnoticed_signal(signals: Signals) -> Option<i32> {
    let Signals { of_process: Dispositions { caught, is_init }, blocked, pending, pending_for_all } = signals;
    let has = |mask: u64, signal: i32| mask & 1 << (signal - 1) != 0;
    let takes_nothing_back = !has(pending | pending_for_all, libc::SIGCONT);
    let by_init = (is_init && takes_nothing_back).then_some(IGNORED_BY_INIT);
    let taken = caught | pending | pending_for_all & blocked;
    IGNORED.into_iter().chain(by_init).find(|&signal| !has(taken, signal))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pclive_wire::HostPid;

    #[test]
    fn what_is_written_has_the_sizes_that_it_has_room_for() {
        let (code, leave, back) = code();
        assert!(leave < back && (back as usize) < code.len() && code.len() <= Gap::RECORD, "{}", code.len());
        assert_eq!(hop_code().0.len(), HOP_SIZE - HOP_WORDS);
    }

    #[test]
    fn a_file_ends_behind_its_segments_and_sections() {
        let mut image = vec![0; 0x2000];
        let mut set = |at: usize, value: &[u8]| image[at..at + value.len()].copy_from_slice(value);
        set(32, &64u64.to_ne_bytes());
        set(54, &56u16.to_ne_bytes());
        set(56, &1u16.to_ne_bytes());
        set(64 + 8, &0u64.to_ne_bytes());
        set(64 + 32, &0x1522u64.to_ne_bytes());
        assert_eq!(file_size(&image), Some(0x1522), "stripped of its sections");
        image[40..48].copy_from_slice(&0x15e0u64.to_ne_bytes());
        image[58..60].copy_from_slice(&64u16.to_ne_bytes());
        image[60..62].copy_from_slice(&17u16.to_ne_bytes());
        assert_eq!(file_size(&image), Some(0x1a20));

        let vdso = PageRange::new(VirtAddr(0x7000), 2);
        let gap = Gap::find(vdso, &image).unwrap();
        assert_eq!(gap.start, VirtAddr(0x7000 + 0x1a20));
        assert!(gap.start.offset(gap.size() as u64) <= vdso.end());
        assert!(gap.start.offset((gap.size() + HOP_SIZE) as u64) > vdso.end());
        assert_eq!(Gap::find(vdso, &image[..0x1c00]), None, "too small");
        image[40..48].copy_from_slice(&u64::MAX.to_ne_bytes());
        assert_eq!(file_size(&image), None);
        assert_eq!(file_size(&[]), None);
    }

    #[test]
    fn the_signal_is_one_that_nobody_handles_or_waits_for() {
        let bits = |signals: &[i32]| signals.iter().fold(0, |mask, signal| mask | 1u64 << (signal - 1));
        let none = Signals { of_process: Dispositions { caught: 0, is_init: false }, ..Signals::default() };
        let urgent = bits(&[libc::SIGURG]);
        assert_eq!(unnoticed_signal(none), Some(libc::SIGURG));
        assert_eq!(unnoticed_signal(Signals { blocked: u64::MAX, ..none }), Some(libc::SIGURG));
        let ignored = Signals { pending_for_all: urgent, ..none };
        assert_eq!(unnoticed_signal(ignored), Some(libc::SIGURG), "nobody waits for it");
        let waited_for = Signals { blocked: urgent, pending: bits(&[libc::SIGWINCH]), ..ignored };
        assert_eq!(unnoticed_signal(waited_for), Some(libc::SIGCHLD));
        let caught = bits(&IGNORED);
        let handled = |is_init| Signals { of_process: Dispositions { caught, is_init }, ..none };
        assert_eq!(unnoticed_signal(handled(false)), None);
        assert_eq!(unnoticed_signal(handled(true)), Some(libc::SIGTTIN));
        let continued = Signals { pending_for_all: bits(&[libc::SIGCONT]), ..handled(true) };
        assert_eq!(unnoticed_signal(continued), None);
    }

    #[test]
    fn a_gap_is_used_if_it_is_empty_or_has_been_left_by_another_pclive() {
        let memory = || Arc::new(ProcessMemory::open(HostPid(std::process::id() as i32)).unwrap());
        let mut image = vec![0; 0x1000];
        // Behind its header.
        const END: usize = 64;
        image[40] = END as u8;
        let found = |image: &[u8]| {
            WayBack::find(memory(), PageRange::new(VirtAddr(0x7000), 1), image).unwrap().is_usable()
        };
        assert!(found(&image));
        image[END..END + code().0.len()].copy_from_slice(code().0);
        assert!(found(&image));
        image[END + 3] ^= 1;
        assert!(!found(&image));
    }
}
