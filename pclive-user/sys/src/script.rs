//! Scripts: arrays of system calls that a stopped process makes by itself, at full speed.
//!
//! One ptrace round trip for each call costs tens of microseconds. So one call is injected ([`Borrowed::call`]) to map an
//! [`Arena`] into the process; a position-independent interpreter of a few dozen instructions is put there together with
//! the calls and their data, runs all of them, and stops once. An argument may be the result of an earlier call or a word
//! that an earlier call stored, and each call says what it must return; the first that does otherwise ends the script and
//! is named in the error.
//!
//! To wait for the stop costs more than all else. So scripts of several threads have each a place of its own in the arena,
//! share the interpreter, and run side by side ([`run_all`]): the waiting is paid once, unless they must be followed.
//!
//! If pclive dies meanwhile, threads of a skeleton die with it, at the latest of the trap that ends their scripts. Threads of
//! a container find their way back (`way_back`, where it is described).
//!
//! ```text
//! arena:  interpreter │ who needs the arena │ place │ place │ …
//! place:  record for the way back │ data (strings, structs, room for results) │ call 0 │ call 1 │ … │ stack
//! call:   number, 6 arguments, result, expectation, expected value, 2 links
//! ```

mod borrowed;
mod footing;
#[cfg(test)]
mod killed;
mod side_by_side;
#[cfg(test)]
mod sleeper;
mod way_back;

pub use borrowed::{Arena, Borrowed};
pub use footing::{Dispositions, Footing, SyscallInstruction};
pub use side_by_side::run_all;

use pclive_wire::{HostPid, VirtAddr};

/// Bytes at the start of an arena for the interpreter.
const ENTRIES_OFFSET: usize = 256;
/// Bytes before the first place.
const HEADER_SIZE: usize = ENTRIES_OFFSET + way_back::ENTRIES * way_back::ENTRY_SIZE;
const CALL_SIZE: usize = 96;
/// Where a call holds its result.
const RESULT_OFFSET: usize = 56;
/// Bytes at the end of a script's place that serve as the interpreter's stack: it calls one level deep, and no signal is
/// handled meanwhile.
const STACK_SIZE: usize = 64;

// The interpreter: rbx = current call, r12 = calls left, r13 = the script's data, rbp and r14 = the way back, r15 = the signal
// at the end, or -1 for a trap. `syscall` clobbers rax, rcx and r11 only.
// A link is (source offset in the place | 1 << 31 for a 32-bit word, argument index); source 0 means none: no result is there.
std::arch::global_asm!(
    r#"
    .pushsection .rodata.pclive_interpreter,"a",@progbits
    .globl pclive_interpreter_start
    .globl pclive_interpreter_done
    .globl pclive_interpreter_end
    .p2align 4
pclive_interpreter_start:
2:  test r12, r12
    jz 9f
    mov edi, dword ptr [rbx + 80]
    mov esi, dword ptr [rbx + 84]
    call 7f
    mov edi, dword ptr [rbx + 88]
    mov esi, dword ptr [rbx + 92]
    call 7f
    mov rax, [rbx]
    mov rdi, [rbx + 8]
    mov rsi, [rbx + 16]
    mov rdx, [rbx + 24]
    mov r10, [rbx + 32]
    mov r8, [rbx + 40]
    mov r9, [rbx + 48]
    syscall
    mov [rbx + 56], rax
    mov rcx, [rbx + 64]
    cmp rcx, 1
    jb 4f
    je 3f
    cmp rax, [rbx + 72]
    jne 9f
    jmp 4f
3:  cmp rax, -4095
    jae 9f
4:  add rbx, 96
    dec r12
    jmp 2b
7:  test edi, edi
    jz 8f
    btr edi, 31
    jc 6f
    mov rax, [r13 + rdi]
    mov [rbx + rsi * 8 + 8], rax
    ret
6:  movsxd rax, dword ptr [r13 + rdi]
    mov [rbx + rsi * 8 + 8], rax
8:  ret
9:  test r15, r15
    js 5f
    mov eax, {gettid}
    syscall
    mov rdi, rax
    mov rsi, r15
    mov eax, {tkill}
    syscall
    lea rcx, [r15 - 1]
    mov eax, 1
    shl rax, cl
    push rax
    mov rsi, rsp
    test r15, r15
    cmovz rsi, r15
    mov edi, {unblock}
    mov edx, 0
    mov r10d, 8
    mov eax, {sigprocmask}
    syscall
pclive_interpreter_done:
    jmp r14
5:  int3
pclive_interpreter_end:
    .popsection
    "#,
    gettid = const libc::SYS_gettid,
    tkill = const libc::SYS_tkill,
    unblock = const libc::SIG_UNBLOCK,
    sigprocmask = const libc::SYS_rt_sigprocmask,
);

unsafe extern "C" {
    static pclive_interpreter_start: u8;
    static pclive_interpreter_done: u8;
    static pclive_interpreter_end: u8;
}

/// How far from the start of the interpreter a thread is that has sent itself the signal at the end, and unblocked it.
fn done_offset() -> u64 {
    // SAFETY: both symbols lie in the same constant blob, defined above.
    unsafe { (&raw const pclive_interpreter_done).offset_from(&raw const pclive_interpreter_start) as u64 }
}

fn interpreter() -> &'static [u8] {
    let (start, end) = (&raw const pclive_interpreter_start, &raw const pclive_interpreter_end);
    // SAFETY: both symbols delimit the same constant blob, defined above.
    unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) }
}

/// What a call must return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Anything: the caller looks at the result.
    Any,
    /// No error.
    Success,
    /// Exactly this.
    Exactly(u64),
}

/// An argument of a call.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// A number.
    Value(u64),
    /// The address of data in the arena.
    Data(DataRef),
    /// What an earlier call returned.
    Result(CallRef),
    /// A 32-bit word (a file descriptor, say) that an earlier call stored in the data, at this byte offset.
    Word(DataRef, usize),
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Self::Value(value)
    }
}

impl From<i32> for Arg {
    fn from(value: i32) -> Self {
        Self::Value(value as i64 as u64)
    }
}

impl From<VirtAddr> for Arg {
    fn from(addr: VirtAddr) -> Self {
        Self::Value(addr.0)
    }
}

impl From<DataRef> for Arg {
    fn from(data: DataRef) -> Self {
        Self::Data(data)
    }
}

impl From<CallRef> for Arg {
    fn from(call: CallRef) -> Self {
        Self::Result(call)
    }
}

/// A call of a script.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallRef(usize);

/// A piece of a script's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataRef {
    offset: usize,
    len: usize,
}

#[derive(Clone, Debug)]
struct Call {
    label: String,
    number: i64,
    args: [Arg; 6],
    expect: Expect,
}

/// A sequence of system calls with their data.
#[derive(Clone, Debug, Default)]
pub struct Script {
    calls: Vec<Call>,
    data: Vec<u8>,
    /// Places in the data that hold the address of other data.
    pointers: Vec<(usize, DataRef)>,
}

impl Script {
    /// An empty script.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether it has no calls.
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Bytes of its place in an arena.
    pub fn size(&self) -> usize {
        way_back::RECORD_SIZE + self.text_size() + STACK_SIZE
    }

    /// Bytes of its data and calls.
    fn text_size(&self) -> usize {
        self.calls_offset() + self.calls.len() * CALL_SIZE
    }

    /// Adds a call that must succeed. `label` says in errors what it was for, for example `mmap 7f…-7f…`.
    pub fn call<const N: usize>(&mut self, label: impl Into<String>, number: i64, args: [Arg; N]) -> CallRef {
        self.call_expecting(label, number, args, Expect::Success)
    }

    /// Adds a call with an expectation of its own. At most two arguments may be results or stored words.
    pub fn call_expecting<const N: usize>(
        &mut self,
        label: impl Into<String>,
        number: i64,
        args: [Arg; N],
        expect: Expect,
    ) -> CallRef {
        const { assert!(N <= 6, "a system call has at most six arguments") };
        let linked = args.iter().filter(|arg| matches!(arg, Arg::Result(_) | Arg::Word(..))).count();
        assert!(linked <= 2, "at most two linked arguments");
        let mut all = [Arg::Value(0); 6];
        all[..N].copy_from_slice(&args);
        self.calls.push(Call { label: label.into(), number, args: all, expect });
        CallRef(self.calls.len() - 1)
    }

    /// Adds data that calls can point to, aligned to 16 bytes.
    pub fn data(&mut self, bytes: &[u8]) -> DataRef {
        let offset = self.data.len().next_multiple_of(16);
        self.data.resize(offset, 0);
        self.data.extend_from_slice(bytes);
        DataRef { offset, len: bytes.len() }
    }

    /// Adds a NUL-terminated string.
    pub fn string(&mut self, bytes: &[u8]) -> DataRef {
        self.data(&[bytes, b"\0"].concat())
    }

    /// Adds zeroed room that calls write to.
    pub fn room(&mut self, len: usize) -> DataRef {
        self.data(&vec![0; len])
    }

    /// Has the 8 bytes at `offset` of `place` hold the address of `target`: for structures that contain pointers.
    pub fn pointer(&mut self, place: DataRef, offset: usize, target: DataRef) {
        assert!(offset + 8 <= place.len, "the pointer lies inside its structure");
        self.pointers.push((place.offset + offset, target));
    }

    fn calls_offset(&self) -> usize {
        self.data.len().next_multiple_of(16)
    }

    /// The data and the calls as they stand at `base`.
    fn assemble(&self, base: VirtAddr) -> Vec<u8> {
        let mut image = self.data.clone();
        for (place, target) in &self.pointers {
            let address = base.0 + target.offset as u64;
            image[*place..place + 8].copy_from_slice(&address.to_ne_bytes());
        }
        image.resize(self.calls_offset(), 0);
        for call in &self.calls {
            image.extend_from_slice(&self.assemble_call(call, base));
        }
        image
    }

    fn assemble_call(&self, call: &Call, base: VirtAddr) -> [u8; CALL_SIZE] {
        let mut words = [0u64; CALL_SIZE / 8];
        let mut links = [0u64; 2];
        let mut linked = 0;
        words[0] = call.number as u64;
        for (i, arg) in call.args.iter().enumerate() {
            let source = match *arg {
                Arg::Value(value) => {
                    words[1 + i] = value;
                    continue;
                }
                Arg::Data(data) => {
                    words[1 + i] = base.0 + data.offset as u64;
                    continue;
                }
                Arg::Result(earlier) => self.calls_offset() + earlier.0 * CALL_SIZE + RESULT_OFFSET,
                Arg::Word(data, offset) => (data.offset + offset) | 1 << 31,
            };
            links[linked] = source as u64 | (i as u64) << 32;
            linked += 1;
        }
        (words[8], words[9]) = match call.expect {
            Expect::Any => (0, 0),
            Expect::Success => (1, 0),
            Expect::Exactly(value) => (2, value),
        };
        words[10..12].copy_from_slice(&links);
        let mut raw = [0; CALL_SIZE];
        for (bytes, word) in raw.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        raw
    }
}

/// What a script that ran to its end left behind.
#[derive(Debug)]
pub struct Outcome {
    data: Vec<u8>,
    results: Vec<i64>,
    children: Vec<HostPid>,
}

impl Outcome {
    /// What a call returned (a negative error number if it failed and that was allowed).
    pub fn result(&self, call: CallRef) -> i64 {
        self.results[call.0]
    }

    /// The processes and threads that its calls made, in order, if the thread was attached with
    /// [`crate::ptrace::Seize::Skeleton`]. Each is attached too and about to stop.
    pub fn children(&self) -> &[HostPid] {
        &self.children
    }

    /// The data as the calls left it.
    pub fn data(&self, data: DataRef) -> &[u8] {
        &self.data[data.offset..data.offset + data.len]
    }
}

#[cfg(test)]
mod tests {
    use super::sleeper::{ARENA, with_arena};
    use super::*;
    use crate::Error;
    use nix::errno::Errno;

    #[test]
    fn results_and_stored_words_feed_later_calls() {
        with_arena(|borrowed, arena| {
            let mut script = Script::new();
            let pair = script.room(8);
            let text = script.data(b"through a pipe");
            let back = script.room(14);
            script.call("pipe2", libc::SYS_pipe2, [pair.into(), 0.into()]);
            let duplicate = script.call("dup", libc::SYS_dup, [Arg::Word(pair, 4)]);
            let write = script.call("write", libc::SYS_write, [duplicate.into(), text.into(), 14.into()]);
            let read =
                script.call("read", libc::SYS_read, [Arg::Word(pair, 0), back.into(), Arg::Result(write)]);
            for fd in [Arg::Word(pair, 0), Arg::Word(pair, 4), duplicate.into()] {
                script.call("close", libc::SYS_close, [fd]);
            }
            let outcome = borrowed.run(arena, &script).unwrap();
            assert_eq!(outcome.result(read), 14);
            assert_eq!(outcome.data(back), b"through a pipe");
        });
    }

    #[test]
    fn structures_may_point_to_other_data() {
        with_arena(|borrowed, arena| {
            let mut script = Script::new();
            let iov = script.room(16);
            let room = script.data(&[7; 8]);
            script.pointer(iov, 0, room);
            let length = script.data(&8u64.to_ne_bytes());
            // process_vm_readv from itself into the iovec's own length field shows that the pointer is right.
            let remote = script.room(16);
            script.pointer(remote, 0, length);
            let pid = script.call("getpid", libc::SYS_getpid, []);
            let lens = [pid.into(), iov.into(), 0.into(), remote.into(), 0.into(), 0.into()];
            script.call_expecting("process_vm_readv", libc::SYS_process_vm_readv, lens, Expect::Exactly(0));
            let outcome = borrowed.run(arena, &script).unwrap();
            let pointer = u64::from_ne_bytes(outcome.data(iov)[..8].try_into().unwrap());
            assert_eq!(pointer, arena.range().start.0 + (HEADER_SIZE + way_back::RECORD_SIZE) as u64 + 16);
        });
    }

    #[test]
    fn the_call_that_fails_is_named_and_later_ones_are_not_made() {
        with_arena(|borrowed, arena| {
            let mut script = Script::new();
            script.call_expecting("may fail", libc::SYS_close, [(-1).into()], Expect::Any);
            script.call("chdir to nowhere", libc::SYS_close, [99.into()]);
            script.call("exit", libc::SYS_exit_group, [0.into()]);
            let error = borrowed.run(arena, &script).unwrap_err();
            assert_eq!(error.errno(), Some(Errno::EBADF));
            assert!(error.to_string().starts_with("chdir to nowhere in "), "{error}");

            let mut script = Script::new();
            script.call_expecting("getpid", libc::SYS_getpid, [], Expect::Exactly(1));
            let error = borrowed.run(arena, &script).unwrap_err();
            assert!(matches!(error, Error::ScriptResult { expected: 1, .. }), "{error}");
        });
    }

    #[test]
    fn a_script_larger_than_its_arena_is_refused() {
        with_arena(|borrowed, arena| {
            let mut script = Script::new();
            script.room(ARENA as usize);
            assert!(matches!(borrowed.run(arena, &script), Err(Error::ScriptTooLarge { .. })));
        });
    }

    #[test]
    fn the_interpreter_fits_before_the_scripts() {
        assert!(interpreter().len() <= ENTRIES_OFFSET, "{} bytes", interpreter().len());
    }
}
