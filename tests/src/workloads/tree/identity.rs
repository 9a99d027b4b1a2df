//! What a process is, as `/proc` and the kernel tell it: everything that must be the same after a move.
//!
//! Kept as text under a name for each fact, so that a difference explains itself. Left out is what a move may change:
//! inode numbers, the CPUs that are there, times, and what the runtime passes as standard streams.

use super::probe::{Findings, Probe};
use nix::libc;
use nix::sys::stat::{Mode, umask};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::time::Duration;

/// Lines of `/proc/PID/status` that stay (proc_pid_status(5)). Pending signals come and go with timers and have a probe.
const STATUS: [&str; 22] = [
    "Name",
    "Umask",
    "Tgid",
    "Pid",
    "PPid",
    "TracerPid",
    "Uid",
    "Gid",
    "Groups",
    "NSpgid",
    "NSsid",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "THP_enabled",
];
/// Lines of a thread's `status`.
const THREAD_STATUS: [&str; 8] =
    ["Name", "SigBlk", "Uid", "Gid", "CapEff", "CapPrm", "NoNewPrivs", "Seccomp"];
/// Fields of `/proc/PID/stat` counted from the one after the command (proc_pid_stat(5) numbers them from 3).
const STAT: [(&str, usize); 18] = [
    ("pgrp", 5),
    ("session", 6),
    ("tty", 7),
    ("nice", 19),
    ("startcode", 26),
    ("endcode", 27),
    ("startstack", 28),
    ("exit_signal", 38),
    ("rt_priority", 40),
    ("policy", 41),
    ("start_data", 45),
    ("end_data", 46),
    ("start_brk", 47),
    ("arg_start", 48),
    ("arg_end", 49),
    ("env_start", 50),
    ("env_end", 51),
    ("exit_code", 52),
];
const THREAD_STAT: [(&str, usize); 3] = [("nice", 19), ("rt_priority", 40), ("policy", 41)];
/// Lines of `fdinfo` that stay.
const FDINFO: [&str; 5] = ["flags", "sigmask", "clockid", "tfd", "eventfd-semaphore"];
/// The kernel's `struct sigaction` as words: handler, flags, restorer, mask.
type Action = [u64; 4];

/// The facts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity(BTreeMap<String, String>);

impl Identity {
    /// Looks at the calling process and its threads.
    ///
    /// # Errors
    /// Those of reading `/proc`.
    pub fn observe() -> io::Result<Self> {
        let mut identity = Identity::default();
        identity.observe_files()?;
        identity.observe_calls();
        identity.observe_fds()?;
        for entry in fs::read_dir("/proc/self/task")? {
            let tid = entry?.file_name().to_string_lossy().into_owned();
            identity.observe_thread(&tid)?;
        }
        Ok(identity)
    }

    fn set(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.0.insert(name.into(), value.into());
    }

    fn observe_files(&mut self) -> io::Result<()> {
        self.keep_lines("status", &fs::read_to_string("/proc/self/status")?, &STATUS);
        self.keep_fields("stat", &fs::read_to_string("/proc/self/stat")?, &STAT);
        for file in
            ["cmdline", "environ", "limits", "oom_score_adj", "auxv", "timerslack_ns", "coredump_filter"]
        {
            let bytes = fs::read(format!("/proc/self/{file}"))?;
            self.set(file, bytes.escape_ascii().to_string());
        }
        for link in ["exe", "cwd", "root"] {
            self.set(link, fs::read_link(format!("/proc/self/{link}"))?.display().to_string());
        }
        Ok(())
    }

    fn observe_calls(&mut self) {
        let mask = umask(Mode::empty());
        umask(mask);
        self.set("umask", format!("{:#o}", mask.bits()));
        let get = |option, argument: usize| {
            // SAFETY: `prctl` with these options returns a number or writes one to the argument.
            unsafe { libc::prctl(option, argument, 0, 0, 0) }
        };
        let mut number: libc::c_int = 0;
        for (name, option) in
            [("pdeathsig", libc::PR_GET_PDEATHSIG), ("subreaper", libc::PR_GET_CHILD_SUBREAPER)]
        {
            let result = get(option, (&raw mut number).addr());
            self.set(name, format!("{result} {number}"));
        }
        for (name, option) in [("dumpable", libc::PR_GET_DUMPABLE), ("securebits", libc::PR_GET_SECUREBITS)] {
            self.set(name, get(option, 0).to_string());
        }
        // SAFETY: asks without changing.
        self.set("personality", unsafe { libc::personality(0xffff_ffff) }.to_string());
        for signal in 1..=64 {
            let [handler, flags, restorer, mask] = action(signal);
            self.set(format!("action {signal}"), format!("{handler:#x} {flags:#x} {restorer:#x} {mask:#x}"));
        }
    }

    fn observe_fds(&mut self) -> io::Result<()> {
        // Numbers of pipes and sockets are the kernel's; what stays is which descriptors have the same.
        let mut objects: BTreeMap<String, i32> = BTreeMap::new();
        let mut fds: Vec<i32> = fs::read_dir("/proc/self/fd")?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|&fd| fd > 2)
            .collect();
        fds.sort_unstable();
        for fd in fds {
            // The directory that was just read is gone by now.
            let Ok(link) = fs::read_link(format!("/proc/self/fd/{fd}")) else { continue };
            let link = link.to_string_lossy().into_owned();
            let kind = match link.split_once(":[") {
                // Clients' connections come and go.
                Some(("socket", _)) => "socket".to_owned(),
                Some((kind, _)) => format!("{kind} of fd {}", objects.entry(link.clone()).or_insert(fd)),
                // The name that a file without one once had is lost; its directory is not.
                None => match link.strip_suffix(" (deleted)").and_then(|path| path.rsplit_once('/')) {
                    Some((directory, _)) => format!("a file deleted from {directory}"),
                    None => link.clone(),
                },
            };
            self.set(format!("fd {fd}"), kind);
            let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?;
            self.keep_lines(&format!("fd {fd}"), &info, &FDINFO);
        }
        Ok(())
    }

    fn observe_thread(&mut self, tid: &str) -> io::Result<()> {
        let dir = format!("/proc/self/task/{tid}");
        self.keep_lines(
            &format!("thread {tid}"),
            &fs::read_to_string(format!("{dir}/status"))?,
            &THREAD_STATUS,
        );
        self.keep_fields(&format!("thread {tid}"), &fs::read_to_string(format!("{dir}/stat"))?, &THREAD_STAT);
        let (mut head, mut length) = (0usize, 0usize);
        let number: libc::c_long = tid.parse().unwrap_or(0);
        // SAFETY: writes the two words.
        let result =
            unsafe { libc::syscall(libc::SYS_get_robust_list, number, &raw mut head, &raw mut length) };
        self.set(format!("thread {tid} robust_list"), format!("{result} {head:#x} {length}"));
        Ok(())
    }

    fn keep_lines(&mut self, prefix: &str, text: &str, names: &[&str]) {
        let lines = text.lines().filter_map(|line| line.split_once(':'));
        for (name, value) in lines.filter(|(name, _)| names.contains(name)) {
            let value = value.split_whitespace().collect::<Vec<_>>().join(" ");
            // An epoll instance has a line for each target, which names the target's inode at the end.
            let value = value.split(" pos:").next().unwrap_or_default().to_owned();
            let key = format!("{prefix} {name}");
            // The kernel lists targets in the order of the addresses of its own objects.
            let before = self.0.remove(&key).unwrap_or_default();
            let mut all: Vec<&str> = before.split(", ").filter(|value| !value.is_empty()).collect();
            all.push(&value);
            all.sort_unstable();
            self.set(key, all.join(", "));
        }
    }

    fn keep_fields(&mut self, prefix: &str, stat: &str, fields: &[(&str, usize)]) {
        let after_command = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        let values: Vec<&str> = after_command.split_whitespace().collect();
        for (name, number) in fields {
            self.set(format!("{prefix} {name}"), values.get(number - 3).copied().unwrap_or_default());
        }
    }

    /// Every fact that `later` tells otherwise. Sockets and threads that are new there are none of ours.
    pub fn differences(&self, later: &Self) -> Vec<String> {
        let mut differences: Vec<String> = self
            .0
            .iter()
            .filter(|(name, value)| later.0.get(*name) != Some(value))
            .map(|(name, value)| match later.0.get(name) {
                Some(found) => format!("{name}: expected {value:?}, found {found:?}"),
                None => format!("{name}: expected {value:?}, found nothing"),
            })
            .collect();
        let is_new_fd = |name: &str| {
            name.starts_with("fd ") && name.split(' ').count() == 2 && !self.0.contains_key(name)
        };
        differences.extend(
            later
                .0
                .iter()
                .filter(|(name, value)| is_new_fd(name) && *value != "socket")
                .map(|(name, value)| format!("{name}: expected nothing, found {value:?}")),
        );
        differences
    }
}

fn action(signal: i32) -> Action {
    let mut action: Action = [0; 4];
    // SAFETY: writes the kernel's 32-byte struct sigaction (8-byte mask); nothing is set.
    unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, 0usize, action.as_mut_ptr(), 8usize) };
    action
}

/// The identity of the process in which it was made.
#[derive(Debug)]
pub struct IdentityProbe(Identity);

/// How long a signal handler is given to end.
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

impl IdentityProbe {
    /// Remembers how the process is now, once it is the same twice: a signal handler that runs right now has a mask of its
    /// own.
    ///
    /// # Errors
    /// Those of reading `/proc`.
    pub fn new() -> io::Result<Self> {
        let mut before = Identity::observe()?;
        loop {
            std::thread::sleep(BETWEEN_LOOKS);
            let now = Identity::observe()?;
            if before.differences(&now).is_empty() {
                return Ok(IdentityProbe(now));
            }
            before = now;
        }
    }
}

impl Probe for IdentityProbe {
    fn name(&self) -> &'static str {
        "identity"
    }

    fn check(&mut self, findings: &mut Findings) {
        let mut differences = Vec::new();
        for _ in 0..5 {
            let Some(now) = findings.succeed("read /proc", Identity::observe()) else { return };
            differences = self.0.differences(&now);
            if differences.is_empty() {
                return;
            }
            std::thread::sleep(BETWEEN_LOOKS);
        }
        differences.iter().for_each(|difference| findings.add(difference));
    }

    fn spoil(&mut self) {
        umask(Mode::from_bits_truncate(0o111));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epoll_targets_lose_what_a_move_changes() {
        let mut identity = Identity::default();
        let info = "pos:\t0\nflags:\t02\ntfd:        4 events:       19 data: 7  pos:0 ino:1 sdev:e\ntfd:        5 events:       1 data: 8  pos:0 ino:2 sdev:e\n";
        identity.keep_lines("fd 3", info, &FDINFO);
        assert_eq!(identity.0["fd 3 tfd"], "4 events: 19 data: 7, 5 events: 1 data: 8");
        assert_eq!(identity.0["fd 3 flags"], "02");
        assert_eq!(identity.0.len(), 2);
    }

    #[test]
    fn stat_fields_are_numbered_as_in_the_manual() {
        let mut identity = Identity::default();
        identity.keep_fields("stat", "7 (a) b) S 1 70 71 0", &[("pgrp", 5), ("session", 6)]);
        assert_eq!((identity.0["stat pgrp"].as_str(), identity.0["stat session"].as_str()), ("70", "71"));
    }

    #[test]
    fn a_difference_names_the_fact() {
        let facts = |pairs: &[(&str, &str)]| {
            Identity(pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect())
        };
        let before = facts(&[("cwd", "/"), ("fd 3", "pipe 0")]);
        let after = facts(&[("cwd", "/tmp"), ("fd 4", "socket"), ("fd 5", "/dev/null"), ("fd 5 flags", "0")]);
        assert_eq!(
            before.differences(&after),
            [
                "cwd: expected \"/\", found \"/tmp\"",
                "fd 3: expected \"pipe 0\", found nothing",
                "fd 5: expected nothing, found \"/dev/null\"",
            ]
        );
    }
}
