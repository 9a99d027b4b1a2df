//! What pclive is tested and measured with.
//!
//! - [`lab`]: two hosts and a client as network namespaces behind a switch, with containers made of unmodified Debian
//!   programs.
//! - [`load`]: a client for Redis and memcached that checks every answer and notices every gap.
//! - [`identity`]: what a container's processes are, before and after.
//! - [`workloads`]: programs that are moved and know afterwards whether everything is as it was.
//! - [`patience`]: waiting for what happens by itself.
//! - [`pclive`]: the `pclive` program on the lab's hosts.
//! - [`scene`]: all of these put together: a container under load that is ready to be moved.
//!
//! Nothing here links the `pclive` crate: the suites run its binary, as its users do.

pub mod identity;
pub mod lab;
pub mod load;
pub mod patience;
pub mod pclive;
mod programs;
pub mod scene;
pub mod workloads;

pub use programs::Programs;
