//! What only instructions say of the processor.

use std::arch::x86_64::{__cpuid_count, _xgetbv};

/// The extended state that the kernel saves for a thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtendedState {
    /// Components that the kernel enables (`XCR0`; Intel SDM volume 1, 13.3).
    pub components: u64,
    /// Bytes of an `XSAVE` area with all of them.
    pub size: u32,
}

/// The extended state of this machine; zeros on a processor without `XSAVE`.
pub fn extended_state() -> ExtendedState {
    // The macro is true only if the kernel enables XSAVE, too (OSXSAVE).
    if !is_x86_feature_detected!("xsave") {
        return ExtendedState::default();
    }
    // SAFETY: XGETBV exists, as just seen, and register 0 exists wherever the instruction does.
    let components = unsafe { _xgetbv(0) };
    // Leaf 0xD exists wherever XSAVE does; ECX of sub-leaf 0 is the size with all supported components.
    #[allow(unused_unsafe)] // a safe function since Rust 1.94
    // SAFETY: every x86-64 processor has the CPUID instruction.
    let size = unsafe { __cpuid_count(0xd, 0) }.ecx;
    ExtendedState { components, size }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_extended_state_has_at_least_x87_and_sse() {
        let state = extended_state();
        assert_eq!(state.components & 3, 3);
        assert!(state.size >= 576, "{state:?}");
    }
}
