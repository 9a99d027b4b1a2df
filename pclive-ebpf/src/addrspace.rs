//! Changes of the container's address spaces, seen at the end of the system calls that make them.
//!
//! One program on the raw tracepoint `sys_exit`: there the result is known, and the registers of the caller, saved at
//! entry, still hold the arguments. It runs for every system call of the machine, so the call's number is looked at
//! first; the per-call tracepoints would spare that but need tracefs, and still make every call take the slow way out.
//! 32-bit calls have other numbers: a program that makes them causes wrong events, which cost a needless look.

use aya_ebpf::{EbpfContext, macros::raw_tracepoint, programs::RawTracePointContext};
use pclive_abi::{Kind, PAGE_SIZE};

use crate::{container, events, kernel::Object};

/// Offsets in x86-64's `struct pt_regs`, which is fixed by ptrace's ABI.
mod regs {
    pub const DX: u64 = 12 * 8;
    pub const SI: u64 = 13 * 8;
    pub const DI: u64 = 14 * 8;
    pub const ORIG_AX: u64 = 15 * 8;
}

/// System call numbers of x86-64.
mod nr {
    pub const MMAP: u64 = 9;
    pub const MPROTECT: u64 = 10;
    pub const MUNMAP: u64 = 11;
    pub const BRK: u64 = 12;
    pub const MREMAP: u64 = 25;
    pub const MADVISE: u64 = 28;
    pub const SHMAT: u64 = 30;
    pub const SHMDT: u64 = 67;
    pub const PKEY_MPROTECT: u64 = 329;
}

/// The advice values of `madvise(2)` that give contents back.
mod advice {
    pub const DONTNEED: u64 = 4;
    pub const FREE: u64 = 8;
    pub const REMOVE: u64 = 9;
    pub const DONTNEED_LOCKED: u64 = 24;
    pub const GUARD_INSTALL: u64 = 102;
}

/// `raw_syscalls:sys_exit(struct pt_regs *regs, long ret)`.
#[raw_tracepoint(tracepoint = "sys_exit")]
pub fn sys_exit(ctx: RawTracePointContext) -> i32 {
    let call = Call { regs: Object::at(ctx.arg(0)), result: ctx.arg(1) };
    if let Some(number) = call.regs.read::<u64>(regs::ORIG_AX)
        && changes_address_space(number)
        && call.result < ERRORS
        && container::has_current_task()
    {
        let _ = report(&ctx, number, &call);
    }
    0
}

/// Results from here on are error numbers (`IS_ERR_VALUE`).
const ERRORS: u64 = (-4095_i64) as u64;

struct Call {
    regs: Object,
    result: u64,
}

impl Call {
    #[inline(always)]
    fn argument(&self, register: u64) -> Option<u64> {
        self.regs.read(register)
    }
}

#[inline(always)]
fn changes_address_space(number: u64) -> bool {
    matches!(
        number,
        nr::MMAP
            | nr::MPROTECT
            | nr::MUNMAP
            | nr::BRK
            | nr::MREMAP
            | nr::MADVISE
            | nr::SHMAT
            | nr::SHMDT
            | nr::PKEY_MPROTECT
    )
}

#[inline(always)]
fn report(ctx: &RawTracePointContext, number: u64, call: &Call) -> Option<()> {
    let first = call.argument(regs::DI)?;
    let second = call.argument(regs::SI)?;
    let third = call.argument(regs::DX)?;
    let (kind, start, bytes) = match number {
        nr::MMAP => (Kind::Mapped, call.result, second),
        nr::MUNMAP => (Kind::Unmapped, first, second),
        nr::MPROTECT | nr::PKEY_MPROTECT => (Kind::Protected, first, second),
        nr::SHMAT => (Kind::Mapped, call.result, 0),
        nr::SHMDT => (Kind::Unmapped, first, 0),
        nr::MREMAP => {
            send(ctx, Kind::Remapped, first, second);
            (Kind::Remapped, call.result, third)
        }
        nr::MADVISE => match third {
            advice::DONTNEED
            | advice::FREE
            | advice::REMOVE
            | advice::DONTNEED_LOCKED
            | advice::GUARD_INSTALL => (Kind::Discarded, first, second),
            _ => return None,
        },
        // brk(0) only asks where the heap ends.
        nr::BRK if first != 0 => (Kind::HeapMoved, call.result, 0),
        _ => return None,
    };
    send(ctx, kind, start, bytes);
    Some(())
}

#[inline(always)]
fn send(ctx: &RawTracePointContext, kind: Kind, start: u64, bytes: u64) {
    let pages = bytes.saturating_add(PAGE_SIZE - 1) / PAGE_SIZE;
    let pages = if pages > u32::MAX as u64 { u32::MAX } else { pages as u32 };
    events::change(ctx, kind, start, ctx.tgid(), pages);
}
