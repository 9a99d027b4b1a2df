//! memcached moves with its four worker threads, its epoll sets and its 16 connections.

use anyhow::Result;
use pclive_tests::load::{LoadSpec, Pace, Service};

use crate::moved::{MIB, move_under_load};

#[test]
fn at_full_load() -> Result<()> {
    let load = LoadSpec { read_percent: 50, ..LoadSpec::new(Service::Memcached, 64 * MIB) };
    move_under_load(&load, &[]).map(drop)
}

#[test]
fn with_requests_at_even_distances() -> Result<()> {
    let load = LoadSpec { pace: Pace::PerSecond(2_000.0), ..LoadSpec::new(Service::Memcached, 64 * MIB) };
    move_under_load(&load, &["--mode", "pclive"]).map(drop)
}

#[test]
fn in_one_shot() -> Result<()> {
    let load = LoadSpec::new(Service::Memcached, 64 * MIB);
    move_under_load(&load, &["--mode", "one-shot"]).map(drop)
}
