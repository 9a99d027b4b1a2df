//! A container is bound to processors, and to other ones at the destination.

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use pclive_tests::lab::{Host, Lab, own_processors, run};
use pclive_tests::pclive::Serve;
use pclive_tests::workloads::running::Contained;

const NAME: &str = "bound";

/// The processors that each thread of the container's PID 1 may use.
fn allowed(host: &Host) -> Result<Vec<CpuSet>> {
    let threads = std::fs::read_dir(format!("/proc/{}/task", host.container_pid(NAME)?))?;
    let allowed = |thread: std::io::Result<std::fs::DirEntry>| {
        let tid = thread?.file_name().into_string().ok().and_then(|name| name.parse().ok());
        Ok(sched_getaffinity(Pid::from_raw(tid.context("a thread is named by its number")?))?)
    };
    threads.map(allowed).collect()
}

#[test]
fn it_has_those_of_the_destination_and_follows_when_they_change() -> Result<()> {
    let numbers = own_processors()?;
    let (first, last) = (numbers[0], *numbers.last().context("this thread runs somewhere")?);
    if first == last {
        println!("skipped: this machine has one processor");
        return Ok(());
    }
    let only = |number| {
        let mut set = CpuSet::new();
        set.set(number).map(|()| set)
    };
    let mut lab = Lab::new(None)?;
    let arguments = ["memory", "--mib", "4", "--threads", "2", "--rate", "200"];
    let mut bound = Contained::start_on(&mut lab, NAME, &arguments, [vec![first], vec![last]])?;
    let threads = allowed(lab.source())?;
    assert!(threads.len() > 2 && threads.iter().all(|set| only(first).as_ref() == Ok(set)), "{threads:?}");
    let serve = Serve::start(&lab, lab.destination())?;
    bound.migrate(&lab, lab.source(), &serve, &[])?;
    bound.check(&lab)?;
    let threads = allowed(lab.destination())?;
    assert!(threads.len() > 2 && threads.iter().all(|set| only(last).as_ref() == Ok(set)), "{threads:?}");

    let both = format!("{first},{last}");
    run(&mut lab.destination().runc(["update", "--cpuset-cpus", &both, NAME]))?;
    let mut wanted = only(first)?;
    wanted.set(last)?;
    assert!(
        allowed(lab.destination())?.iter().all(|set| *set == wanted),
        "they are bound to {last} for good"
    );
    Ok(())
}
