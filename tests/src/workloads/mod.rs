//! Programs that are moved while they run, and know afterwards whether everything is still as it was.
//!
//! All remember in their own memory what must be true, and answer `check` on a TCP port ([`control`]) with `ok …` or
//! with a list of what differs. They need nothing but a C library and `/bin/sh` in the container.
//!
//! - [`tree`]: a process tree with one of every kind of kernel object that a container may own.
//! - [`memory`]: threads that change their address space at random without pause, and know what every byte must be.
//! - [`processes`]: processes that fork, execute other programs and end without pause.

pub mod control;
pub mod memory;
pub mod pattern;
pub mod processes;
pub mod running;
pub mod tree;
