//! Registers with which stopped threads go on.

use pclive_wire::manifest::Registers;

/// `ERESTARTSYS` … `ERESTART_RESTARTBLOCK`: kernel-internal results of an interrupted call (`include/linux/errno.h`),
/// visible only to a tracer.
const RESTART_CODES: [i64; 4] = [-512, -513, NO_HANDLER, RESTART_BLOCK];
/// `ERESTARTNOHAND`.
const NO_HANDLER: i64 = -514;
/// `ERESTART_RESTARTBLOCK`.
const RESTART_BLOCK: i64 = -516;

/// Registers with which a stopped thread, taken elsewhere, goes on as if it had never been stopped.
///
/// A thread stopped inside a system call shows the kernel's restart code. Where it was stopped the kernel itself restarts
/// the call; elsewhere it is done here by pointing back at the `syscall` instruction. `ERESTART_RESTARTBLOCK` calls
/// (`nanosleep`, `poll`, `futex` with a timeout) are made again with their original arguments: they may wait longer than
/// asked, which POSIX allows, but do not fail with an `EINTR` that the program would never have seen.
///
/// If such a call had been interrupted before, the registers name `restart_syscall(2)`, which only works where the kernel
/// remembers the call. Its arguments are still in their registers; its number is found in `code`, the bytes before the
/// instruction pointer, where libraries load it. Otherwise the call fails with `EINTR`.
pub fn restartable(registers: Registers, code: [u8; CODE_BEFORE]) -> Registers {
    let registers = match interrupted_call(&registers) {
        Some((libc::SYS_restart_syscall, _)) => match restarted_call(code) {
            Some(number) => call_again(registers, number),
            None => Registers { rax: -i64::from(libc::EINTR) as u64, ..registers },
        },
        Some((number, _)) => call_again(registers, number as u64),
        None => registers,
    };
    Registers { orig_rax: u64::MAX, ..registers }
}

/// Registers with which a stopped thread goes on where it was stopped, but by itself and not by the kernel, which would have
/// restarted an interrupted call just like this.
pub fn going_on(registers: Registers) -> Registers {
    let registers = match interrupted_call(&registers) {
        Some((_, RESTART_BLOCK)) => call_again(registers, libc::SYS_restart_syscall as u64),
        Some((number, _)) => call_again(registers, number as u64),
        None => registers,
    };
    Registers { orig_rax: u64::MAX, ..registers }
}

/// Whether a stopped thread may have another signal mask for the time of a call (sigsuspend(2), ppoll(2) …): those calls are
/// made again if no handler has run.
pub fn may_wait_with_another_mask(registers: &Registers) -> bool {
    matches!(interrupted_call(registers), Some((_, NO_HANDLER)))
}

/// The number of the call in which a thread was stopped and that the kernel would restart, and its restart code.
fn interrupted_call(registers: &Registers) -> Option<(i64, i64)> {
    let (number, result) = (registers.orig_rax as i64, registers.rax as i64);
    (number >= 0 && RESTART_CODES.contains(&result)).then_some((number, result))
}

/// Bytes of a `struct rseq_cs` (uapi/linux/rseq.h).
pub const SECTION_SIZE: usize = 32;

/// Registers of a thread that has been made to do something else in the restartable sequence (rseq(2)) that it said it is
/// in: those with which the kernel would have it go on (`rseq_ip_fixup` in kernel/rseq.c). The kernel itself has no longer
/// seen that it was there.
pub fn out_of(section: [u8; SECTION_SIZE], registers: Registers) -> Registers {
    let word = |i: usize| u64::from_ne_bytes(section[i * 8..][..8].try_into().expect("8 bytes"));
    let (start_ip, post_commit_offset, abort_ip) = (word(1), word(2), word(3));
    match registers.rip.wrapping_sub(start_ip) < post_commit_offset {
        true => Registers { rip: abort_ip, ..registers },
        false => registers,
    }
}

/// Bytes before the instruction pointer that [`restartable`] looks at: `mov eax, imm32` and `syscall`.
pub const CODE_BEFORE: usize = 7;
pub(crate) const SYSCALL_INSTRUCTION: [u8; 2] = [0x0f, 0x05];
const MOV_EAX: u8 = 0xb8;
/// The calls that have a restart block.
const WITH_RESTART_BLOCK: [i64; 4] =
    [libc::SYS_nanosleep, libc::SYS_clock_nanosleep, libc::SYS_poll, libc::SYS_futex];

fn call_again(registers: Registers, number: u64) -> Registers {
    let rip = registers.rip - SYSCALL_INSTRUCTION.len() as u64;
    Registers { rax: number, rip, ..registers }
}

fn restarted_call(code: [u8; CODE_BEFORE]) -> Option<u64> {
    let [MOV_EAX, a, b, c, d, rest @ ..] = code else { return None };
    let number = i64::from(u32::from_le_bytes([a, b, c, d]));
    (rest == SYSCALL_INSTRUCTION && WITH_RESTART_BLOCK.contains(&number)).then_some(number as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stopped(rax: i64, orig_rax: i64) -> Registers {
        Registers { rax: rax as u64, orig_rax: orig_rax as u64, rip: 100, ..Registers::default() }
    }

    #[test]
    fn a_thread_that_goes_on_by_itself_does_what_the_kernel_would_have_it_do() {
        let going_on = |rax, orig_rax| {
            let Registers { rax, rip, orig_rax, .. } = super::going_on(stopped(rax, orig_rax));
            (rax as i64, rip, orig_rax)
        };
        assert_eq!(going_on(-512, 7), (7, 98, u64::MAX));
        assert_eq!(going_on(-516, 35), (libc::SYS_restart_syscall, 98, u64::MAX), "the kernel remembers it");
        assert_eq!(going_on(-516, libc::SYS_restart_syscall), (libc::SYS_restart_syscall, 98, u64::MAX));
        assert_eq!(going_on(-4, 7), (-4, 100, u64::MAX));
        assert_eq!(going_on(-512, -1), (-512, 100, u64::MAX));
    }

    #[test]
    fn a_restartable_sequence_is_aborted_by_who_is_in_it() {
        let section = |words: [u64; 4]| words.map(u64::to_ne_bytes).concat().try_into().unwrap();
        let rip_of = |start, length| out_of(section([0, start, length, 500]), stopped(0, -1)).rip;
        assert_eq!(rip_of(100, 1), 500);
        assert_eq!(rip_of(98, 3), 500);
        assert_eq!(rip_of(98, 2), 100, "it has committed");
        assert_eq!(rip_of(101, 5), 100);
    }

    #[test]
    fn interrupted_calls_are_made_again_and_finished_ones_are_not() {
        let restartable = |registers| super::restartable(registers, [0; CODE_BEFORE]);
        let restarted = restartable(stopped(-512, 7));
        assert_eq!((restarted.rax, restarted.rip, restarted.orig_rax), (7, 98, u64::MAX));
        assert_eq!(restartable(stopped(-516, 35)).rax, 35);
        assert_eq!(restartable(stopped(-4, 7)).rip, 100, "EINTR is a result that the program sees");
        assert_eq!(restartable(stopped(-512, -1)).rip, 100, "not in a system call");
    }

    #[test]
    fn a_call_interrupted_twice_is_found_in_the_code() {
        let twice =
            Registers { rax: -516i64 as u64, orig_rax: 219, rip: 100, rdi: 5, ..Registers::default() };
        let poll = restartable(twice, [0xb8, 7, 0, 0, 0, 0x0f, 0x05]);
        assert_eq!((poll.rax, poll.rip, poll.rdi), (7, 98, 5));
        let other = restartable(twice, [0xb8, 1, 0, 0, 0, 0x0f, 0x05]);
        assert_eq!((other.rax as i64, other.rip), (-4, 100), "write has no restart block");
    }
}
