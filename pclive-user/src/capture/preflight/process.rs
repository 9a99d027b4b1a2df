//! What each process says about itself: state, tracer, filters, terminal, program, root and working directory.

use super::{PreflightError, field, read};
use crate::capture::env::ContainerEnv;
use crate::capture::{Obstacles, SourceProcess};
use pclive_wire::NsPid;
use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;

/// `SCHED_DEADLINE` of linux/sched.h.
const SCHED_DEADLINE: u32 = 6;

/// A process's own obstacle: object, reason, remedy.
type Finding = (&'static str, String, &'static str);

/// Adds what a process says about itself.
pub(super) fn survey(
    process: &SourceProcess,
    env: &ContainerEnv,
    obstacles: &mut Obstacles,
) -> Result<(), PreflightError> {
    let mut findings = parse_status(&read(process.pid, "status")?);
    findings.extend(parse_stat(&read(process.pid, "stat")?));
    findings.extend(paths(process, env)?);
    if is_compat(process)? {
        findings.push((
            "program",
            "a 32-bit program: only 64-bit ones are moved yet".into(),
            "use a 64-bit build of the program",
        ));
    }
    for (object, reason, remedy) in findings {
        obstacles.add(process.ns_pid, object, reason, remedy);
    }
    Ok(())
}

/// Sessions and process groups can only be made again by the process that they are named after.
pub(super) fn survey_relations(processes: &[SourceProcess], obstacles: &mut Obstacles) {
    let alive: HashSet<NsPid> = processes.iter().map(|process| process.ns_pid).collect();
    for process in processes {
        for (object, id) in [("session", process.sid), ("process group", process.pgid)] {
            if !alive.contains(&id) {
                let leader =
                    if id.0 == 0 { "is outside the container".into() } else { format!("({id}) has ended") };
                obstacles.add(
                    process.ns_pid,
                    object,
                    format!("the leader of the process's {object} {leader}"),
                    "start daemons through a supervisor that stays, without double forking",
                );
            }
        }
    }
}

/// Looks for obstacles in `/proc/PID/status` (proc_pid_status(5)).
fn parse_status(status: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut add = |object, reason: &str, remedy| findings.push((object, reason.to_owned(), remedy));
    match field(status, "State:").and_then(|state| state.chars().next()) {
        Some('T') => {
            add("process", "stopped by a signal, which is not moved yet", "continue it (`kill -CONT`)")
        }
        Some('t') => add("process", "stopped by a debugger", "detach the debugger"),
        _ => {}
    }
    if field(status, "TracerPid:").is_some_and(|tracer| tracer != "0") {
        add(
            "tracer",
            "another process traces it (ptrace), so pclive cannot",
            "detach the debugger or strace",
        );
    }
    match field(status, "Seccomp:") {
        None | Some("0") => {}
        _ => add(
            "seccomp",
            "a seccomp filter, which is not moved yet",
            "run the container without a seccomp profile (linux.seccomp in config.json)",
        ),
    }
    if field(status, "CoreDumping:") == Some("1") {
        add("process", "it is dumping core", "wait for its end");
    }
    if field(status, "x86_Thread_features:").is_some_and(|features| !features.is_empty()) {
        add(
            "shadow stack",
            "a shadow stack, which is not moved yet",
            "run the program with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
        );
    }
    findings
}

/// Looks for obstacles in `/proc/PID/stat` (proc_pid_stat(5)).
fn parse_stat(stat: &str) -> Vec<Finding> {
    // The command's name may contain anything, a closing parenthesis too. Field 3 comes first after it.
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3).and_then(|value| value.parse::<u32>().ok());
    let mut findings = Vec::new();
    if fields.get(7 - 3).is_some_and(|terminal| *terminal != "0") {
        findings.push((
            "terminal",
            "a controlling terminal, which stays with this host".into(),
            "run the container without a terminal (`terminal: false`)",
        ));
    }
    if number(41) == Some(SCHED_DEADLINE) {
        findings.push((
            "scheduling",
            "the SCHED_DEADLINE policy, whose reservation is this host's".into(),
            "run the program under another policy",
        ));
    }
    findings
}

/// Root, working directory and program must be found at the destination by their names.
fn paths(process: &SourceProcess, env: &ContainerEnv) -> Result<Vec<Finding>, PreflightError> {
    let mut findings = Vec::new();
    for name in ["root", "cwd", "exe"] {
        let path = format!("/proc/{}/{name}", process.pid);
        let error = |error| PreflightError::Read { path: path.clone(), error };
        let link = std::fs::read_link(&path).map_err(error)?;
        let shown = link.display();
        if name == "root" {
            if link.as_os_str() != "/" {
                let reason = format!("the root directory is {shown}: a chroot is not moved yet");
                findings.push(("root directory", reason, "run the program without chroot"));
            }
            continue;
        }
        let leads = nix::sys::stat::stat(path.as_str())
            .and_then(|stat| env.leads_to(link.as_os_str().as_bytes(), &stat))
            .map_err(|errno| error(errno.into()))?;
        if !leads {
            let object = if name == "cwd" { "working directory" } else { "program" };
            let reason =
                format!("{shown} is not found by that name in the container (deleted, replaced or covered)");
            findings.push((object, reason, "restart the program"));
        }
    }
    Ok(findings)
}

/// Whether the program is a 32-bit one (`e_ident[EI_CLASS]`, elf(5)).
fn is_compat(process: &SourceProcess) -> Result<bool, PreflightError> {
    const ELFCLASS32: u8 = 1;
    let path = format!("/proc/{}/exe", process.pid);
    let mut header = [0; 5];
    match File::open(&path).and_then(|mut file| file.read_exact(&mut header)) {
        Ok(()) => Ok(header[4] == ELFCLASS32),
        Err(error) => Err(PreflightError::Read { path, error }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects(findings: &[Finding]) -> Vec<&str> {
        findings.iter().map(|(object, ..)| *object).collect()
    }

    #[test]
    fn status_of_a_plain_process_has_no_obstacle() {
        let status = "Name:\tcat\nState:\tS (sleeping)\nTracerPid:\t0\nCoreDumping:\t0\nSeccomp:\t0\n\
                      Seccomp_filters:\t0\nx86_Thread_features:\t\n";
        assert!(parse_status(status).is_empty());
    }

    #[test]
    fn status_tells_of_tracers_filters_and_stops() {
        let status = "Name:\tcat\nState:\tt (tracing stop)\nTracerPid:\t77\nCoreDumping:\t1\nSeccomp:\t2\n\
                      x86_Thread_features:\tshstk wrss \n";
        assert_eq!(
            objects(&parse_status(status)),
            ["process", "tracer", "seccomp", "process", "shadow stack"]
        );
    }

    #[test]
    fn stat_tells_of_terminal_and_deadline() {
        let stat = |terminal: i32, policy: u32| {
            let before = format!("1 (a) b) S 0 1 1 {terminal}");
            let zeros = |count| " 0".repeat(count);
            // Fields 8 to 40, the policy, and those after it.
            format!("{before}{}{} {policy}{}", zeros(1), zeros(32), zeros(11))
        };
        assert!(parse_stat(&stat(0, 1)).is_empty());
        assert_eq!(objects(&parse_stat(&stat(34816, 6))), ["terminal", "scheduling"]);
    }

    #[test]
    fn a_group_whose_leader_is_gone_cannot_be_made() {
        let process = |pid: i32, pgid: i32, sid: i32| SourceProcess {
            pid: pclive_wire::HostPid(pid),
            ns_pid: NsPid(pid),
            parent: pclive_wire::HostPid(0),
            pgid: NsPid(pgid),
            sid: NsPid(sid),
            pidfd: std::sync::Arc::new(File::open("/dev/null").unwrap().into()),
        };
        let mut obstacles = Obstacles::default();
        survey_relations(&[process(1, 1, 1), process(7, 5, 1), process(8, 8, 0)], &mut obstacles);
        let found = obstacles.into_sorted();
        let found: Vec<_> = found.iter().map(|o| (o.pid.0, o.object.as_str())).collect();
        assert_eq!(found, [(7, "process group"), (8, "session")]);
    }
}
