//! What pclive is tested and measured with.
//!
//! - [`lab`]: two hosts and a client as network namespaces behind a switch, containers made of unmodified Debian
//!   programs, and the `pclive` binary run on those hosts.
//! - [`load`]: a client for Redis and memcached that checks every answer and notices every gap.
//! - [`workloads`]: programs that are moved and know afterwards whether everything is as it was.
//!
//! Nothing here links the `pclive` crate: the suites run its binary, as its users do.

mod binaries;
pub mod lab;
pub mod load;
pub mod workloads;

pub use binaries::binary;
