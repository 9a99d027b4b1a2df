//! What a hostile peer can make the decoders do: every length is a lie here, and memory is counted.
//!
//! One test, because the counting allocator sees all threads.

use cap::Cap;
use pclive_wire::codec;
use pclive_wire::control::{DestinationMessage, Open, SourceMessage};
use pclive_wire::limits::DECODE_EXPANSION;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::alloc::System;

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, usize::MAX);

/// What a decoder may take however short the input is: serde trusts an announced length up to 1 MiB of elements.
const FIXED_COST: usize = 2 << 20;

/// Decodes `payload` as every message, with no more memory than it may cost: a decoder that wants more aborts the test.
/// Says whether it was a message from the source.
fn decode_all(payload: &[u8]) -> bool {
    MEMORY.set_limit(MEMORY.allocated() + payload.len() * DECODE_EXPANSION + FIXED_COST).unwrap();
    let _ = codec::decode::<Open>(payload);
    let _ = codec::decode::<DestinationMessage>(payload);
    let message = codec::decode::<SourceMessage>(payload);
    if let Ok(SourceMessage::Manifest(manifest)) = &message {
        let _ = manifest.validate();
    }
    MEMORY.set_limit(usize::MAX).unwrap();
    message.is_ok()
}

#[test]
fn decoding_costs_no_more_than_it_may() {
    let mut runner = TestRunner::new(Config { cases: 2000, failure_persistence: None, ..Config::default() });
    let arbitrary = prop::collection::vec(any::<u8>(), 0..4096);
    runner
        .run(&arbitrary, |payload| {
            decode_all(&payload);
            Ok(())
        })
        .unwrap();

    // Few values repeated: nested lists, which arbitrary bytes never reach.
    let head = prop::collection::vec(0..8u8, 1..40);
    runner
        .run(&(head, any::<u16>(), 0..3u8, 0..100_000usize), |(mut payload, length, fill, count)| {
            payload.extend(postcard::to_stdvec(&length)?);
            payload.resize(payload.len() + count, fill);
            decode_all(&payload);
            Ok(())
        })
        .unwrap();

    the_longest_lists_of_the_shortest_elements();
}

/// Lists without a count limit of their own, each element as short as it can be.
fn the_longest_lists_of_the_shortest_elements() {
    const ELEMENTS: u32 = 1 << 20;
    let count = postcard::to_stdvec(&ELEMENTS).unwrap();
    // SourceMessage::Manifest of round 0, keeping nobody awake, not the last, with nice value 0.
    let manifest = vec![0, 0, 0, 0, 0];
    // One process: four ids, exe "", eleven addresses, auxv "".
    let process = [&[1][..], &[0; 4], &[0], &[0; 11], &[0]].concat();
    // No processes; one description: flags, owner, a unix socket (kind 10): id, type, address "", no peer, no backlog.
    let unix = [&[0, 1, 0, 0, 0, 0, 10][..], &[0; 5]].concat();
    for (name, before, element, after) in [
        ("mappings", process.clone(), 5, 4),
        ("threads", [process, vec![0]].concat(), 2, 3),
        ("messages in a queue", unix, 1, 3),
    ] {
        let mut payload = [manifest.clone(), before, count.clone()].concat();
        payload.resize(payload.len() + element * ELEMENTS as usize + after, 0);
        assert!(decode_all(&payload), "{name}: not a manifest, so nothing was tested");
    }
}
