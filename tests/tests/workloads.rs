//! The workloads where nothing moves them: they must find nothing, and find everything that is spoilt on purpose.

use anyhow::{Context, Result, bail};
use nix::unistd::Pid;
use pclive_tests::lab::Lab;
use pclive_tests::workloads::control::Answer;
use pclive_tests::workloads::running::{Contained, Native};
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

/// Checks a few times with pauses; the answers' counters.
fn check_for_seconds(workload: &mut Native) -> Result<Vec<String>> {
    let check = |_| {
        sleep(Duration::from_millis(500));
        match workload.ask("check")? {
            Answer::Ok(counters) => Ok(counters),
            Answer::Differs(list) => bail!("{}", list.join("\n")),
        }
    };
    (0..5).map(check).collect()
}

fn differences(arguments: &[&str]) -> Result<Vec<String>> {
    match Native::start(arguments)?.ask("check")? {
        Answer::Ok(counters) => bail!("{arguments:?} was not noticed: {counters}"),
        Answer::Differs(list) => Ok(list),
    }
}

#[test]
fn memory_under_fire_is_as_expected() -> Result<()> {
    for arguments in [
        &["memory", "--mib", "64", "--seed", "7"][..],
        &["memory", "--mib", "32", "--threads", "2", "--shared", "--rate", "2000"],
        &["memory", "--mib", "16", "--threads", "1", "--children", "3"],
    ] {
        let answers = check_for_seconds(&mut Native::start(arguments)?)?;
        let operations = |answer: &String| answer.split(' ').nth(1).and_then(|word| word.parse::<u64>().ok());
        assert!(answers.is_sorted_by_key(operations), "{answers:?}");
        assert!(operations(&answers[4]) > Some(1000), "{answers:?}");
    }
    Ok(())
}

#[test]
fn one_corrupt_byte_of_memory_is_noticed_for_good() -> Result<()> {
    let mut memory = Native::start(&["memory", "--mutate"])?;
    let Answer::Differs(list) = memory.ask("check")? else { bail!("it was not noticed") };
    assert!(list[0].contains("expected 0x"), "{list:?}");
    assert_eq!(memory.ask("check")?, Answer::Differs(list));
    Ok(())
}

#[test]
fn tree_is_as_expected() -> Result<()> {
    check_for_seconds(&mut Native::start(&["tree"])?).map(drop)
}

#[test]
fn whatever_is_spoilt_in_the_tree_is_noticed_by_its_probe() -> Result<()> {
    let probes = [
        "signals", "timers", "files", "queues", "epoll", "tcp", "mappings", "threads", "children",
        "identity", "mutexes",
    ];
    for probe in probes {
        let list = differences(&["tree", "--mutate", probe])?;
        assert!(
            list.iter().any(|difference| difference.starts_with(&format!("{probe}: "))),
            "{probe}: {list:?}"
        );
    }
    Ok(())
}

/// A move freezes the container for a while: that alone must not look like a difference.
#[test]
fn a_freeze_is_no_difference() -> Result<()> {
    let mut lab = Lab::new(None)?;
    let mut workloads = [
        Contained::start(&mut lab, "tree", &["tree"])?,
        Contained::start(&mut lab, "memory", &["memory", "--mib", "32", "--threads", "2"])?,
    ];
    for _ in 0..3 {
        for workload in &mut workloads {
            let cgroup = cgroup(lab.source().container_pid(&workload.container.name)?)?;
            fs::write(cgroup.join("cgroup.freeze"), "1")?;
            while !fs::read_to_string(cgroup.join("cgroup.events"))?.contains("frozen 1") {
                sleep(Duration::from_millis(1));
            }
            sleep(Duration::from_millis(300));
            fs::write(cgroup.join("cgroup.freeze"), "0")?;
            println!("{}", workload.check(&lab)?);
        }
    }
    Ok(())
}

/// The cgroup v2 directory of a process, also where v2 is mounted beside v1.
fn cgroup(pid: Pid) -> Result<PathBuf> {
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::/")).context("no cgroup v2")?;
    let roots = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"];
    let found =
        roots.iter().map(|root| Path::new(root).join(path)).find(|dir| dir.join("cgroup.freeze").exists());
    found.with_context(|| format!("the cgroup v2 {path} is not mounted"))
}
