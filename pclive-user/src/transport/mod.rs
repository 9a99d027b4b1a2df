//! Connections between two hosts: one control stream and several page streams for each migration.
//!
//! Pages move on blocking sockets, each driven by a thread of its own ([`pages`]): a page stream has one thing to do,
//! and a thread that is in `sendmsg` or `recv` most of its life needs no runtime around it.
//!
//! The control stream ([`control`]) is used by one thread, the one that drives the migration, and by that thread directly.
//! A runtime's reader and writer tasks between it and the socket would add two thread switches to each message, on a
//! machine that the container keeps busy, and four messages lie inside the blackout. What tasks would be good for is had
//! otherwise: waiting with a time limit and for a cancellation is one `poll`, and TCP itself watches whether the peer is
//! alive (`TCP_USER_TIMEOUT` and keep-alive probes).
//!
//! tokio runs where many things wait at the same time: [`listener`], which has to be patient with any number of
//! connections that have not yet said what they are, and [`Cancellation::watch_signals`].

pub mod buffer;
mod cancel;
pub mod control;
mod error;
pub mod listener;
mod pace;
pub mod pages;
mod zerocopy;

pub use buffer::{BufferPool, PageBuffer};
pub use cancel::Cancellation;
pub use control::{ControlChannel, DestinationChannel, SourceChannel};
pub use error::{Error, Result};
pub use listener::{Incoming, Listener, Session};
pub use pace::Pace;
pub use pages::{Batch, Hangup, PageEvent, PageReceiver, PageSender, PageStats};
pub use zerocopy::ZeroCopy;
