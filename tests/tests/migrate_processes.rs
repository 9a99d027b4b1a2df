//! Processes that fork, vfork, execute other programs and end without pause are moved while they do.

use anyhow::{Context, Result};
use pclive_tests::lab::{BitRate, Lab};
use pclive_tests::pclive::Serve;
use pclive_tests::workloads::running::Contained;

/// Moves them there and back with each of these options; each move meets them at another moment.
fn move_processes(arguments: &[&str], moves: &[&[&str]]) -> Result<()> {
    let mut lab = Lab::new(Some(BitRate::GIGABIT))?;
    let mut processes = Contained::start(&mut lab, "processes", arguments)?;
    let (there, back) = (Serve::start(&lab, lab.destination())?, Serve::start(&lab, lab.source())?);
    println!("{}", processes.check(&lab)?);
    for options in moves {
        for (from, to) in [(lab.source(), &there), (lab.destination(), &back)] {
            let report = processes.migrate(&lab, from, to, options)?;
            let counters = processes.check(&lab).with_context(|| format!("moved with {options:?}"))?;
            println!("{options:?}: blackout {} us, {counters}", report.blackout_us);
            assert_eq!(lab.traces(from, &processes.container.name)?, [""; 0]);
        }
    }
    Ok(())
}

#[test]
fn processes_that_come_and_go_are_moved_and_go_on() -> Result<()> {
    move_processes(
        &["processes"],
        &[&[], &["--mode", "pclive"], &["--tracker", "scan"], &["--mode", "one-shot"]],
    )
}

#[test]
fn a_process_that_executes_without_end_is_moved_and_goes_on() -> Result<()> {
    move_processes(&["processes", "--phoenix"], &[&[], &["--mode", "pclive"], &["--mode", "one-shot"]])
}
