//! Memory under fire is moved again and again; after each move every byte is compared with what it must be.

use anyhow::{Context, Result, ensure};
use pclive_tests::lab::{BitRate, Host, Lab};
use pclive_tests::pclive::Serve;
use pclive_tests::workloads::running::Contained;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// One move after the other; all of them if `PCLIVE_MOVES` asks for more than the first five.
const OPTIONS: [&[&str]; 8] = [
    &[],
    &["--mode", "pclive", "--hot-rounds", "2"],
    &["--restore-from", "2"],
    &["--tracker", "scan", "--whole-pages", "--hot-rounds", "1"],
    &["--mode", "one-shot"],
    &["--max-rounds", "1"],
    &["--mode", "pclive", "--tracker", "scan"],
    &["--max-blackout", "20"],
];

/// The container's name.
const NAME: &str = "memory";

fn moves() -> usize {
    std::env::var("PCLIVE_MOVES").ok().and_then(|moves| moves.parse().ok()).unwrap_or(5)
}

/// Back and forth between the hosts, with the workload's `arguments`. Returns of how many mappings eBPF told the flags, and for how
/// many they were read all the same.
fn move_memory(arguments: &[&str]) -> Result<(u64, u64)> {
    move_memory_when(arguments, Lab::new(Some(BitRate::GIGABIT))?, |_, _| Ok(()))
}

/// The same, each time when what `wait` waits for has come.
fn move_memory_when(
    arguments: &[&str],
    mut lab: Lab,
    wait: impl Fn(&Lab, &Host) -> Result<()>,
) -> Result<(u64, u64)> {
    let arguments = ["memory"].iter().chain(arguments).copied().collect::<Vec<_>>();
    let mut memory = Contained::start(&mut lab, NAME, &arguments)?;
    let [there, back] = [lab.destination(), lab.source()].map(|host| Serve::start(&lab, host));
    let (there, back) = (there?, back?);
    memory.check(&lab)?;
    let (mut told, mut read) = (0, 0);
    for (number, options) in OPTIONS.into_iter().cycle().take(moves()).enumerate() {
        let (from, to) = if number % 2 == 0 { (lab.source(), &there) } else { (lab.destination(), &back) };
        wait(&lab, from)?;
        let context = || format!("move {number} of {arguments:?} with {options:?}");
        let report = memory.migrate(&lab, from, to, options).with_context(context)?;
        let answer = memory.check(&lab).with_context(context)?;
        println!(
            "{}: {} rounds, blackout {} us: {answer}",
            context(),
            report.rounds.len(),
            report.blackout_us
        );
        assert_eq!(lab.traces(from, &memory.container.name)?, Vec::<String>::new(), "{}", context());
        told += report.mappings_told;
        read += report.mappings_read;
    }
    Ok((told, read))
}

#[test]
fn every_byte_survives_under_full_fire() -> Result<()> {
    let (told, read) = move_memory(&["--mib", "48", "--threads", "3", "--children", "3", "--seed", "11"])?;
    println!("flags of mappings: {told} told, {read} read");
    assert!(told > read, "mappings change all the time, and eBPF tells their flags");
    Ok(())
}

/// Slow enough that rounds converge, so that most pages arrive before the freeze.
#[test]
fn every_byte_survives_while_rounds_converge() -> Result<()> {
    move_memory(&["--mib", "96", "--threads", "2", "--rate", "200", "--seed", "12"]).map(drop)
}

/// One thread alone: its stack is the one that the kernel grows, its heap the one that `brk` grows.
#[test]
fn every_byte_survives_without_threads_and_children() -> Result<()> {
    move_memory(&["--mib", "32", "--threads", "1", "--children", "0", "--rate", "2000", "--seed", "13"])
        .map(drop)
}

/// The workload has the kernel page out some of its memory all the time.
#[test]
fn every_byte_survives_in_swap() -> Result<()> {
    const SWAPPED_BYTES: u64 = 1 << 20;
    let lab = Lab::new(Some(BitRate::GIGABIT))?;
    lab.add_swap(128)?;
    let arguments = ["--mib", "64", "--threads", "2", "--children", "1", "--rate", "300", "--seed", "14"];
    move_memory_when(&arguments, lab, |lab, host| {
        let end = Instant::now() + Duration::from_secs(30);
        while lab.swapped_bytes(host, NAME)? < SWAPPED_BYTES {
            ensure!(Instant::now() < end, "hardly anything is swapped out");
            sleep(Duration::from_millis(20));
        }
        Ok(())
    })
    .map(drop)
}
