//! What a load shall be.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// The protocol that the server speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Service {
    /// RESP: `GET` and `SET`.
    Redis,
    /// memcached's text protocol: `get` and `set`.
    Memcached,
}

impl Service {
    /// The port that its server listens on.
    pub fn port(self) -> u16 {
        match self {
            Self::Redis => 6379,
            Self::Memcached => 11211,
        }
    }
}

/// When requests are sent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum Pace {
    /// Closed loop: each connection sends its next request when the last one is answered.
    FullLoad,
    /// Open loop: that many requests per second in all, at even distances, whether or not earlier ones are answered.
    /// Latency counts from when a request was due.
    PerSecond(f64),
    /// No requests at all: connections are open, and the data is read back at the end.
    Idle,
}

/// What the load program is told before it starts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LoadSpec {
    /// The server's protocol.
    pub service: Service,
    /// Connections, all open from the start to the end.
    pub connections: usize,
    /// When requests are sent.
    pub pace: Pace,
    /// Reads among 100 requests; the others are writes.
    pub read_percent: u8,
    /// Bytes of values that are written before the load starts.
    pub data_bytes: u64,
    /// Bytes of values that the load touches, at most `data_bytes`.
    pub hot_bytes: u64,
    /// Sizes of values: each key has one, evenly distributed.
    pub value_bytes: RangeInclusive<usize>,
    /// Whether every key is read back at the end.
    pub verify: bool,
}

impl LoadSpec {
    /// The load that figures are given for, on `data_bytes` of values: 16 connections at full load, values of 1 to
    /// 4 KiB, nine reads to a write, over all keys.
    pub fn new(service: Service, data_bytes: u64) -> Self {
        Self {
            service,
            connections: 16,
            pace: Pace::FullLoad,
            read_percent: 90,
            data_bytes,
            hot_bytes: data_bytes,
            value_bytes: 1024..=4096,
            verify: true,
        }
    }
}
