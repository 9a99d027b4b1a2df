//! Drives handoff with transport, track, capture and restore.
//!
//! One migration is one thread on each host: ptrace lets only the thread that attached make requests, so the thread that
//! seizes processes also talks to the peer. Pages have threads of their own on both sides and touch no process other than
//! through its memory.
//!
//! ```text
//! source                                               destination
//!   rounds 0…n: layout ── Manifest ──────────────────▶   reconcile the skeleton, open the gate of the round
//!               pages ═══ batches, barrier ══════════▶   place them (or keep them: see `ApplyMode`)
//!               ◀───────────────── RoundApplied ──────   everything of the round is in place
//!   stop every thread                                                                        ┐
//!   round n+1:  layout, dirty pages (a thread sends them)  as before                         │
//!               meanwhile: links down, capture everything                                    │ blackout
//!   round n+2:  the last manifest, with all state ───▶   open files, finish every process    │
//!               ◀──────────────────────── Ready ──────                                       │
//!   freeze the cgroup, Commit ───────────────────────▶   links up, run                       ┘
//!               ◀────────────────────── Running ──────
//!   destroy the source's copy
//! ```
//!
//! The frozen container's dirty pages travel as a round of their own, before the manifest that carries its state, because
//! reading that state takes longer than finding the pages: the two overlap.
//!
//! What can be done ahead of the blackout is: descriptor tables grow at both hosts when a round begins, processors wake when
//! the freeze does, and between rounds the options of sockets are read, of which the freeze asks only whether they have changed.

pub mod awake;
pub mod background;
mod clock;
pub mod destination;
mod fd_table;
pub mod report;
pub mod source;
mod usage;
