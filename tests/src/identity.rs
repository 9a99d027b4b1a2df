//! What a process is to itself and to its host's tools, read from `/proc`: all of it must survive a move.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result};
use nix::unistd::Pid;

/// Lines of `/proc/PID/status` that belong to the process, not to where it runs.
const STATUS: [&str; 16] = [
    "CapAmb",
    "CapBnd",
    "CapEff",
    "CapInh",
    "CapPrm",
    "Gid",
    "Groups",
    "Name",
    "NoNewPrivs",
    "Seccomp",
    "SigBlk",
    "SigCgt",
    "SigIgn",
    "Threads",
    "Uid",
    "Umask",
];

/// A container's processes by the pid that they have inside.
pub type Identities = BTreeMap<i32, BTreeMap<String, String>>;

/// The identity of every process in the pid namespace of `init`.
///
/// # Errors
/// When `init` is gone, or a process ends while it is read.
pub fn identities(init: Pid) -> Result<Identities> {
    processes(init)?
        .into_iter()
        .map(|pid| identity(pid).with_context(|| format!("read /proc/{pid}")))
        .collect()
}

/// Every process in the pid namespace of `init`, by the pid that the machine knows.
///
/// # Errors
/// When `init` is gone.
pub fn processes(init: Pid) -> Result<Vec<Pid>> {
    let namespace = |pid: &str| fs::metadata(format!("/proc/{pid}/ns/pid")).map(|found| found.ino());
    let wanted = namespace(&init.to_string()).with_context(|| format!("process {init}"))?;
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        // Whatever ends while we look is in no namespace.
        if let Ok(pid) = name.parse()
            && namespace(&name).is_ok_and(|found| found == wanted)
        {
            pids.push(Pid::from_raw(pid));
        }
    }
    Ok(pids)
}

fn identity(pid: Pid) -> Result<(i32, BTreeMap<String, String>)> {
    let file = |name: &str| -> Result<String> {
        let bytes = fs::read(format!("/proc/{pid}/{name}")).with_context(|| name.to_owned())?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let link = |name: &str| -> Result<String> {
        let target = fs::read_link(format!("/proc/{pid}/{name}")).with_context(|| name.to_owned())?;
        Ok(target.to_string_lossy().into_owned())
    };
    let mut facts = BTreeMap::new();
    for name in ["cmdline", "comm", "environ", "limits", "oom_score_adj", "personality"] {
        facts.insert(name.to_owned(), file(name)?);
    }
    for name in ["exe", "cwd", "root"] {
        facts.insert(name.to_owned(), link(name)?);
    }
    let status = parse_status(&file("status")?);
    let inside = status.get("NSpid").and_then(|pids| pids.split_whitespace().last()?.parse().ok());
    let inside = inside.context("status has no NSpid")?;
    facts.extend(status.into_iter().filter(|(name, _)| STATUS.contains(&name.as_str())));
    Ok((inside, facts))
}

/// `/proc/PID/status` as names and values.
fn parse_status(text: &str) -> BTreeMap<String, String> {
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

/// What differs between two looks at a container, one line for each fact; empty if nothing does.
pub fn differences(before: &Identities, after: &Identities) -> Vec<String> {
    let pids: std::collections::BTreeSet<_> = before.keys().chain(after.keys()).collect();
    let mut found = Vec::new();
    for pid in pids {
        match (before.get(pid), after.get(pid)) {
            (Some(before), Some(after)) => {
                let changed = before.iter().filter(|(name, value)| after.get(*name) != Some(value));
                found.extend(changed.map(|(name, value)| {
                    format!("process {pid}: {name} was {value:?} and is {:?}", after.get(name))
                }));
            }
            (before, _) => {
                let what = if before.is_some() { "is gone" } else { "is new" };
                found.push(format!("process {pid} {what}"));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_identity_is_stable_and_complete() {
        let own = Pid::this();
        let (inside, facts) = identity(own).expect("our own");
        assert_eq!(facts["comm"].trim(), facts["Name"]);
        assert!(
            facts["cmdline"].starts_with(&facts["exe"])
                && STATUS.iter().all(|name| facts.contains_key(*name))
        );
        assert!(processes(own).expect("our own").contains(&own));
        let before = Identities::from([(inside, facts)]);
        let mut after = before.clone();
        assert!(differences(&before, &after).is_empty());
        after.get_mut(&inside).expect("copied").insert("cwd".into(), "/elsewhere".into());
        after.insert(inside + 1, BTreeMap::new());
        let found = differences(&before, &after);
        assert!(found[0].contains("cwd was") && found[1].ends_with("is new"), "{found:?}");
    }
}
