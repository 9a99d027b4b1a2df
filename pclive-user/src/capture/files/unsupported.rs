//! Names for what pclive does not move, so that an obstacle says what it is and what helps.

use super::error::Refusal;
use nix::sys::stat::{SFlag, major, minor};

/// Kinds of anonymous files: the name in the kernel's link (`anon_inode:NAME`, without brackets), what it is, what helps.
const ANONYMOUS: [(&str, &str, &str); 12] = [
    (
        "io_uring",
        "an io_uring, whose rings live in the kernel",
        "configure the program to use epoll or threads",
    ),
    ("bpf-map", "a BPF map", "run the BPF tool outside the container"),
    ("bpf-prog", "a BPF program", "run the BPF tool outside the container"),
    ("bpf_link", "a BPF link", "run the BPF tool outside the container"),
    ("btf", "BPF type information", "run the BPF tool outside the container"),
    ("perf_event", "a perf event, which counts on this host's CPUs", "stop profiling"),
    ("inotify", "an inotify instance, whose watches name this host's inodes", "turn off file watching"),
    ("fanotify", "a fanotify group, whose marks name this host's inodes", "turn off file watching"),
    ("userfaultfd", "a userfaultfd: the program handles its own page faults", "turn that feature off"),
    ("pidfd", "a handle on a process (pidfd)", "close it before the migration"),
    ("landlock-ruleset", "a Landlock ruleset under construction", "wait until the program has applied it"),
    ("seccomp notify", "a seccomp listener", "stop the supervisor"),
];

/// An anonymous file of a kind that is not moved; `name` without `anon_inode:` and brackets.
pub(super) fn anonymous(name: &str) -> Refusal {
    match ANONYMOUS.iter().find(|(known, ..)| *known == name) {
        Some((_, what, remedy)) => Refusal::unsupported(format!("{what}: cannot be moved"), *remedy),
        None => Refusal::unsupported(
            format!("a kernel object of kind `{name}`: cannot be moved"),
            "close it before the migration",
        ),
    }
}

/// Something that has neither path nor a known kind of link, for example `net:[4026531840]`.
pub(super) fn other(link: &str) -> Refusal {
    match link.split_once(":[") {
        Some((namespace, _)) if !namespace.contains('/') => Refusal::unsupported(
            format!("a handle on a {namespace} namespace: cannot be moved"),
            "close it before the migration",
        ),
        _ => Refusal::unsupported(format!("`{link}`: cannot be moved"), "close it before the migration"),
    }
}

/// A file found by a path but of a type that is not moved.
pub(super) fn by_type(type_: SFlag, rdev: u64) -> Refusal {
    match type_ {
        SFlag::S_IFIFO => Refusal::unsupported(
            "a named pipe (FIFO), whose contents are not moved yet",
            "use an unnamed pipe or a socket",
        ),
        SFlag::S_IFBLK => {
            Refusal::unsupported("a block device of this host", "give the container a file system")
        }
        // TTY_MAJOR, TTYAUX_MAJOR and the Unix98 pty range (linux/major.h).
        SFlag::S_IFCHR if matches!(major(rdev), 4 | 5 | 136..=143) => Refusal::unsupported(
            "a terminal, which stays with this host",
            "run the container without a terminal (`terminal: false`)",
        ),
        SFlag::S_IFCHR => Refusal::unsupported(
            format!("character device {}:{}, whose state stays with this host", major(rdev), minor(rdev)),
            "run the container without that device",
        ),
        _ => Refusal::unsupported("a file of a type that cannot be moved", "close it before the migration"),
    }
}

/// Memory that is a file.
pub(super) fn memfd() -> Refusal {
    Refusal::unsupported("an open memfd, which is not moved yet", "configure the program to use files")
}
