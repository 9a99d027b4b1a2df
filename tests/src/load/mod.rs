//! A client for Redis and memcached that checks every answer and notices every gap.
//!
//! The client is a program of its own (`load`), because it must run in the lab's client namespace; [`LoadProcess`]
//! starts it there and talks to it. One thread serves all connections through one epoll set: the machine's other CPU
//! is the server's.
//!
//! # What is a wrong answer
//! Every value carries its key and a version, and its remaining bytes follow from the two. At most one write is in
//! flight for a key. A read must return at least the version that was acknowledged, or seen by another read, when it
//! was sent, and at most the newest one sent when its answer arrived; every byte must be right. So a lost acknowledged
//! write, a stale page, a torn value and an answer on the wrong connection are all wrong answers.

mod client;
mod connection;
mod keyspace;
mod process;
mod protocol;
mod recorder;
mod report;
mod spec;

pub use client::serve_commands;
pub use process::LoadProcess;
pub use report::{BrokenConnection, Gap, Latency, LatencyCount, LoadReport, Mark, Stretch};
pub use spec::{LoadSpec, Pace, Service};
