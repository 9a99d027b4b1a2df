//! Whether sending without copying pays on a connection, and which buffers the kernel still reads.
//!
//! ```text
//!            every send uses MSG_ZEROCOPY
//!   Trial ──────────────────────────────────▶ after TRIAL_SENDS completions:
//!     │                                          most were copied  ──▶ Off   plain sends, forever
//!     │ not supported by the kernel              else              ──▶ On    zero-copy sends, forever
//!     └──────────────────────────────────────────────────────────────▶ Off
//! ```
//! [`ZeroCopy`] can have one of the two without a trial.

use super::buffer::PageBuffer;
use pclive_sys::zerocopy::Completion;
use std::collections::VecDeque;

/// Completions to see before a verdict.
const TRIAL_SENDS: u64 = 8;

/// Whether pages are sent with `MSG_ZEROCOPY`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ZeroCopy {
    /// As long as the kernel does not copy all the same.
    #[default]
    Auto,
    /// Wherever the kernel supports it, also if it copies.
    Always,
    /// Never.
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Trial,
    On,
    Off,
}

/// Zero-copy sends of one connection. `B` is what a send keeps busy.
#[derive(Debug)]
pub(super) struct InFlight<B = PageBuffer> {
    verdict: Verdict,
    /// Sends so far: the number of the next one.
    sends: u64,
    completed: u64,
    copied: u64,
    /// Buffers that the kernel reads, oldest first.
    busy: VecDeque<Busy<B>>,
}

#[derive(Debug)]
struct Busy<B> {
    _buffer: B,
    /// Numbers of its sends, and how many of them are not complete.
    first: u64,
    end: u64,
    open: u64,
}

impl<B> InFlight<B> {
    pub(super) fn new(supported: bool) -> Self {
        let verdict = if supported { Verdict::Trial } else { Verdict::Off };
        Self { verdict, sends: 0, completed: 0, copied: 0, busy: VecDeque::new() }
    }

    /// The same with as much of a trial as is asked for. Where the kernel does not support it there is none.
    pub(super) fn wanting(mut self, wanted: ZeroCopy) -> Self {
        self.verdict = match (self.verdict, wanted) {
            (Verdict::Trial, ZeroCopy::Always) => Verdict::On,
            (_, ZeroCopy::Never) => Verdict::Off,
            (verdict, _) => verdict,
        };
        self
    }

    /// Whether the next send should ask for zero copy.
    pub(super) fn wanted(&self) -> bool {
        self.verdict != Verdict::Off
    }

    /// Counts a successful zero-copy send.
    pub(super) fn sent(&mut self) {
        self.sends += 1;
    }

    /// Zero-copy sends so far.
    pub(super) fn sends(&self) -> u64 {
        self.sends
    }

    /// Zero-copy sends that the kernel copied.
    pub(super) fn copied(&self) -> u64 {
        self.copied
    }

    /// Whether the kernel reads any buffer.
    pub(super) fn any_busy(&self) -> bool {
        !self.busy.is_empty()
    }

    /// Keeps `buffer` until every send since number `first` is complete.
    pub(super) fn keep(&mut self, buffer: B, first: u64) {
        let (end, open) = (self.sends, self.sends - first);
        if open > 0 {
            self.busy.push_back(Busy { _buffer: buffer, first, end, open });
        }
    }

    /// Takes a completion, gives up the buffers that are free by it, and learns whether zero copy pays.
    pub(super) fn complete(&mut self, completion: Completion) {
        let (first, end) = self.numbers(completion);
        self.completed += end - first;
        if completion.copied {
            self.copied += end - first;
        }
        for busy in &mut self.busy {
            let overlap = busy.end.min(end).saturating_sub(busy.first.max(first));
            busy.open = busy.open.saturating_sub(overlap);
        }
        self.busy.retain(|busy| busy.open > 0);
        if self.verdict == Verdict::Trial && self.completed >= TRIAL_SENDS {
            self.verdict = if self.copied * 2 > self.completed { Verdict::Off } else { Verdict::On };
        }
    }

    /// The kernel's 32-bit numbers as ours: the latest ones with these low bits that have been sent.
    fn numbers(&self, completion: Completion) -> (u64, u64) {
        let newest = self.sends.saturating_sub(1);
        let last = newest.saturating_sub(u64::from((newest as u32).wrapping_sub(completion.last)));
        let count = u64::from(completion.last.wrapping_sub(completion.first));
        (last.saturating_sub(count), last + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;

    fn done(first: u32, last: u32, copied: bool) -> Completion {
        Completion { first, last, copied }
    }

    #[test]
    fn a_buffer_is_kept_until_all_of_its_sends_are_complete() {
        let mut flight = InFlight::new(true);
        let (a, b) = (Rc::new(()), Rc::new(()));
        flight.sent();
        flight.sent();
        flight.keep(a.clone(), 0);
        flight.sent();
        flight.keep(b.clone(), 2);

        // Completions need not come in order.
        flight.complete(done(1, 1, false));
        assert_eq!((Rc::strong_count(&a), Rc::strong_count(&b)), (2, 2));
        flight.complete(done(2, 2, false));
        assert_eq!((Rc::strong_count(&a), Rc::strong_count(&b)), (2, 1));
        flight.complete(done(0, 0, false));
        assert_eq!(Rc::strong_count(&a), 1);
        assert!(!flight.any_busy());
    }

    #[test]
    fn a_buffer_that_was_sent_with_copying_is_free_at_once() {
        let mut flight = InFlight::new(false);
        flight.keep(Rc::new(()), 0);
        assert!(!flight.any_busy() && !flight.wanted());
    }

    #[test]
    fn zero_copy_ends_where_the_kernel_copies() {
        for (copied, wanted) in [(0, true), (4, true), (5, false), (8, false)] {
            let mut flight = InFlight::<()>::new(true);
            for n in 0..8u32 {
                assert!(flight.wanted());
                flight.sent();
                flight.complete(done(n, n, n < copied));
            }
            assert_eq!(flight.wanted(), wanted, "{copied} of 8 copied");
            assert_eq!(flight.copied(), u64::from(copied));
        }
    }

    #[test]
    fn without_a_trial_it_stays_as_asked() {
        for (asked, supported, wanted) in
            [(ZeroCopy::Always, true, true), (ZeroCopy::Always, false, false), (ZeroCopy::Never, true, false)]
        {
            let mut flight = InFlight::<()>::new(supported).wanting(asked);
            assert_eq!(flight.wanted(), wanted, "{asked:?}");
            for n in 0..8 {
                flight.sent();
                flight.complete(done(n, n, true));
            }
            assert_eq!(flight.wanted(), wanted, "{asked:?}, whatever the kernel does");
        }
    }

    #[test]
    fn the_kernels_count_wraps() {
        let mut flight = InFlight::new(true);
        flight.sends = (1 << 32) - 1;
        let buffer = Rc::new(());
        let first = flight.sends();
        flight.sent();
        flight.sent();
        flight.keep(buffer.clone(), first);
        flight.complete(done(u32::MAX, 0, false));
        assert_eq!(Rc::strong_count(&buffer), 1);
    }
}
