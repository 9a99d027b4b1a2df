//! Registers that hold known values while a thread spins or sleeps.
//!
//! The general registers alone would show little: a thread whose general registers are lost does not get far. It is the
//! extended state (x87, SSE, AVX, AVX-512) that can be lost without a crash.

use nix::libc;
use std::arch::asm;

/// Everything that is loaded before and stored after; as large as AVX-512 has it.
#[repr(C, align(64))]
#[derive(Clone, PartialEq, Eq)]
pub struct Vectors {
    vectors: [[u64; 8]; 32],
    masks: [u64; 8],
    general: [u64; 6],
    x87: u64,
    mxcsr: u32,
}

/// What a thread does while its registers hold the values.
#[derive(Clone, Copy, Debug)]
pub enum Meanwhile {
    /// Runs so many rounds of a loop.
    Spin(u64),
    /// Sleeps by `nanosleep(2)`, in the kernel.
    Sleep(libc::timespec),
}

/// How wide vector registers are here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Width {
    Xmm,
    Ymm,
    Zmm,
}

fn width() -> Width {
    if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
        Width::Zmm
    } else if is_x86_feature_detected!("avx") {
        Width::Ymm
    } else {
        Width::Xmm
    }
}

/// Loads `$load`ed vectors, x87, MXCSR and general registers, does `rax` as a system call if it is not negative or spins
/// `r15` times, and stores all of them again.
macro_rules! hold {
    ($values:expr, $found:expr, $call:expr, $argument:expr, $rounds:expr, $load:literal, $store:literal) => {{
        let result: i64;
        asm!(
            $load,
            "ldmxcsr [r13 + {mxcsr}]",
            "fld qword ptr [r13 + {x87}]",
            "mov rdx, [r13 + {general}]",
            "mov r8, [r13 + {general} + 8]",
            "mov r9, [r13 + {general} + 16]",
            "mov r10, [r13 + {general} + 24]",
            "test rax, rax",
            "js 2f",
            "syscall",
            "jmp 3f",
            "2:",
            "pause",
            "dec r15",
            "jnz 2b",
            "3:",
            "mov [r14 + {general}], rdx",
            "mov [r14 + {general} + 8], r8",
            "mov [r14 + {general} + 16], r9",
            "mov [r14 + {general} + 24], r10",
            "fstp qword ptr [r14 + {x87}]",
            "stmxcsr [r14 + {mxcsr}]",
            "ldmxcsr [r12]",
            $store,
            mxcsr = const std::mem::offset_of!(Vectors, mxcsr),
            x87 = const std::mem::offset_of!(Vectors, x87),
            general = const std::mem::offset_of!(Vectors, general),
            in("r12") &0x1f80u32,
            in("r13") $values,
            in("r14") $found,
            inout("r15") $rounds => _,
            inlateout("rax") $call => result,
            inout("rdi") $argument => _,
            inout("rsi") 0u64 => _,
            clobber_abi("sysv64"),
        );
        result
    }};
}

impl Vectors {
    /// Values that belong to `seed`, where this machine has registers for them.
    pub fn new(seed: u64) -> Self {
        let mut rng = crate::workloads::pattern::Rng::new(seed);
        let (registers, words) = match width() {
            Width::Zmm => (32, 8),
            Width::Ymm => (16, 4),
            Width::Xmm => (16, 2),
        };
        let mut values = Vectors::zero();
        for register in &mut values.vectors[..registers] {
            register[..words].fill_with(|| rng.draw());
        }
        if width() == Width::Zmm {
            values.masks[1..].fill_with(|| rng.draw());
        }
        values.general[..4].fill_with(|| rng.draw());
        values.x87 = 1234.5678f64.to_bits();
        // All exceptions masked, rounding towards zero.
        values.mxcsr = 0x7f80;
        values
    }

    fn zero() -> Self {
        Vectors { vectors: [[0; 8]; 32], masks: [0; 8], general: [0; 6], x87: 0, mxcsr: 0 }
    }

    /// Holds the values in the registers for a while.
    ///
    /// # Errors
    /// Which register holds something else afterwards, or the error of the sleep.
    pub fn hold(&self, meanwhile: Meanwhile) -> Result<(), String> {
        let mut found = Vectors::zero();
        let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let (call, rounds, time) = match meanwhile {
            Meanwhile::Spin(rounds) => (-1i64, rounds.max(1), none),
            Meanwhile::Sleep(time) => (libc::SYS_nanosleep, 1, time),
        };
        // SAFETY: the registers that are used exist, see `width`; memory outside of `found` is not written; MXCSR is
        // set back to its default, the x87 stack left empty, and everything changed is declared.
        let result = unsafe {
            match width() {
                Width::Zmm => hold!(
                    self,
                    &mut found,
                    call,
                    &time,
                    rounds,
                    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n\
                     vmovdqu64 zmm\\n, [r13 + 64*\\n]\n.endr\n\
                     .irp n,1,2,3,4,5,6,7\nkmovq k\\n, [r13 + 2048 + 8*\\n]\n.endr",
                    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n\
                     vmovdqu64 [r14 + 64*\\n], zmm\\n\n.endr\n\
                     .irp n,1,2,3,4,5,6,7\nkmovq [r14 + 2048 + 8*\\n], k\\n\n.endr\nvzeroupper"
                ),
                Width::Ymm => hold!(
                    self,
                    &mut found,
                    call,
                    &time,
                    rounds,
                    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\nvmovdqu ymm\\n, [r13 + 64*\\n]\n.endr",
                    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\nvmovdqu [r14 + 64*\\n], ymm\\n\n.endr\nvzeroupper"
                ),
                Width::Xmm => hold!(
                    self,
                    &mut found,
                    call,
                    &time,
                    rounds,
                    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\nmovdqu xmm\\n, [r13 + 64*\\n]\n.endr",
                    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\nmovdqu [r14 + 64*\\n], xmm\\n\n.endr"
                ),
            }
        };
        if let (Meanwhile::Sleep(_), error @ ..0) = (meanwhile, result) {
            return Err(format!("nanosleep: {}", std::io::Error::from_raw_os_error(-error as i32)));
        }
        self.compare(&found)
    }

    fn compare(&self, found: &Self) -> Result<(), String> {
        if self == found {
            return Ok(());
        }
        let vector = (0..32).find(|&index| self.vectors[index] != found.vectors[index]);
        let mask = (0..8).find(|&index| self.masks[index] != found.masks[index]);
        Err(match (vector, mask) {
            (Some(index), _) => {
                format!(
                    "vector register {index}: expected {:x?}, found {:x?}",
                    self.vectors[index], found.vectors[index]
                )
            }
            (_, Some(index)) => {
                format!("k{index}: expected {:#x}, found {:#x}", self.masks[index], found.masks[index])
            }
            _ if self.general != found.general => {
                format!("general registers: expected {:x?}, found {:x?}", self.general, found.general)
            }
            _ if self.x87 != found.x87 => format!("x87: expected {:#x}, found {:#x}", self.x87, found.x87),
            _ => format!("MXCSR: expected {:#x}, found {:#x}", self.mxcsr, found.mxcsr),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_keep_their_values() {
        let time = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        for meanwhile in [Meanwhile::Spin(1000), Meanwhile::Sleep(time)] {
            Vectors::new(5).hold(meanwhile).unwrap();
        }
    }

    #[test]
    fn a_lost_register_is_named() {
        let mut found = Vectors::new(5);
        found.vectors[15][1] ^= 1;
        assert!(Vectors::new(5).compare(&found).unwrap_err().starts_with("vector register 15"));
        found = Vectors::new(5);
        found.mxcsr = 0x1f80;
        assert_eq!(Vectors::new(5).compare(&found).unwrap_err(), "MXCSR: expected 0x7f80, found 0x1f80");
    }
}
