//! The sandbox at the destination: the bundle's container with pclive's init in place of its program.
//!
//! The container must keep the bundle's real path, because `exec` reads its config.json there later. So `create` runs
//! in a mount namespace where other contents cover that file; nobody else sees them and nothing remains.
//! Hooks that run in the runtime's namespaces (`createRuntime`, `prestart`) run there too.

use super::command::{HandedOn, wait_readable};
use super::oci::CommandLine;
use super::{Bundle, RuntimeError};
use nix::sys::stat::fstat;
use pclive_sys::mountns::with_file_covered;
use pclive_sys::pidfd::pidfd_open;
use pclive_wire::HostPid;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

/// From `start` to the init running pclive's program: a `startContainer` hook and an exec lie between.
const EXEC_TIME_LIMIT: Duration = Duration::from_secs(10);

/// How often the init's program is looked at; its exit is noticed at once.
const EXEC_INTERVAL: Duration = Duration::from_millis(1);

/// A running sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SandboxProcess {
    /// pclive's init: PID 1 of the container.
    pub init: HostPid,
}

/// Creates and starts the container; `correct` then mends the runtime's own record of it.
pub(super) fn create(
    runtime: &CommandLine,
    bundle: &Bundle,
    init: BorrowedFd<'_>,
    stdio: [BorrowedFd<'_>; 3],
    correct: impl FnOnce() -> Result<(), RuntimeError>,
) -> Result<SandboxProcess, RuntimeError> {
    match runtime.state(bundle.id()) {
        Ok(state) => return Err(RuntimeError::Exists { id: state.id, status: state.status }),
        Err(RuntimeError::NotFound { .. }) => (),
        Err(error) => return Err(error),
    }
    let made = with_file_covered(&bundle.config_path(), &bundle.sandbox_config(), || {
        runtime.create(bundle, HandedOn { stdio, third: init })
    })
    .map_err(RuntimeError::from)
    .flatten()
    .and_then(|()| start(runtime, bundle, init))
    .and_then(|sandbox| correct().map(|()| sandbox));
    made.map_err(|error| match runtime.make_room(bundle) {
        Ok(_) => error,
        Err(source) => RuntimeError::Undo { error: Box::new(error), source: Box::new(source) },
    })
}

fn start(
    runtime: &CommandLine,
    bundle: &Bundle,
    init: BorrowedFd<'_>,
) -> Result<SandboxProcess, RuntimeError> {
    runtime.start(bundle.id())?;
    let state = runtime.state(bundle.id())?;
    let pid = state.init.ok_or(RuntimeError::InitExited { id: state.id })?;
    wait_for_exec(bundle, pid, init)?;
    Ok(SandboxProcess { init: pid })
}

/// Waits until `pid` runs `program`: `start` returns when the runtime's own init is about to execute it.
fn wait_for_exec(bundle: &Bundle, pid: HostPid, program: BorrowedFd<'_>) -> Result<(), RuntimeError> {
    let failed = |call| move |source| RuntimeError::Init { call, pid, source };
    let exited = || RuntimeError::InitExited { id: bundle.id().clone() };
    let handle = match pidfd_open(pid) {
        Err(nix::Error::ESRCH) => return Err(exited()),
        handle => handle.map_err(failed("pidfd_open"))?,
    };
    let wanted = fstat(program).map_err(failed("fstat of the program for"))?;
    let link = format!("/proc/{pid}/exe");
    let deadline = Instant::now() + EXEC_TIME_LIMIT;
    loop {
        // The link of a process that is gone leads nowhere; its handle is readable then.
        if std::fs::metadata(&link).is_ok_and(|exe| (exe.dev(), exe.ino()) == (wanted.st_dev, wanted.st_ino))
        {
            return Ok(());
        }
        if wait_readable(handle.as_fd(), Instant::now() + EXEC_INTERVAL).map_err(failed("poll"))? {
            return Err(exited());
        }
        if Instant::now() > deadline {
            let exe = std::fs::read_link(&link).unwrap_or_default();
            return Err(RuntimeError::InitTimeout { id: bundle.id().clone(), pid, exe });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{EXIT, Lab, PAUSE, init_that, status_field};
    use super::super::{Cgroup, Room, Runtime, RuntimeError, Status};
    use super::*;
    use nix::sys::signal::Signal;
    use serde_json::{Value, json};

    /// A bundle that confines its program in every way.
    fn confine(config: &mut Value) {
        config["process"]["user"] = json!({ "uid": 1234, "gid": 5678, "umask": 0o77 });
        config["process"]["env"] = json!(["PATH=/usr/bin", "COLOUR=green"]);
        config["process"]["cwd"] = json!("/usr");
        config["process"]["noNewPrivileges"] = json!(true);
        config["process"]["capabilities"] =
            json!({ "bounding": ["CAP_KILL", "CAP_CHOWN"], "permitted": [], "effective": [] });
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
            "syscalls": [
                { "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::EXDEV },
                { "names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::EMLINK, "args": [
                    { "index": 1, "value": u64::MAX, "valueTwo": 12, "op": "SCMP_CMP_MASKED_EQ" }] },
            ],
        });
    }

    #[test]
    fn the_sandbox_is_privileged_and_exec_is_what_the_bundle_says() {
        let lab = Lab::new("exec");
        lab.edit_config(confine);
        let before = std::fs::read(lab.bundle_path().join("config.json")).unwrap();
        let sandbox = lab.create(&init_that(PAUSE)).unwrap();

        let init = |field| status_field(sandbox.init, field);
        let own = |field| status_field(HostPid(std::process::id() as i32), field);
        for field in ["CapEff", "CapPrm", "CapBnd"] {
            assert_eq!(init(field), own(field), "{field}");
        }
        assert_eq!(
            [init("Seccomp"), init("NoNewPrivs"), init("NSpid")],
            ["0", "0", &format!("{}\t1", sandbox.init)]
        );
        let exec = |script| lab.exec(&["/usr/bin/sh", "-c", script]);
        assert_eq!(exec("id -u; id -g; echo $COLOUR; pwd"), "1234\n5678\ngreen\n/usr\n");
        let status = exec("grep -E '^(CapBnd|CapEff|NoNewPrivs|Seccomp):' /proc/self/status");
        assert_eq!(
            status,
            "CapEff:\t0000000000000000\nCapBnd:\t0000000000000021\nNoNewPrivs:\t1\nSeccomp:\t2\n"
        );
        assert!(exec("mkdir /tmp/x 2>&1").contains("Invalid cross-device link"));
        assert!(exec("kill -12 $$ 2>&1").contains("Too many links"));
        assert_eq!(exec("kill -0 $$ && echo alive"), "alive\n");

        assert_eq!(std::fs::read(lab.bundle_path().join("config.json")).unwrap(), before);
        assert!(
            !std::fs::read_to_string("/proc/self/mountinfo")
                .unwrap()
                .contains(lab.bundle_path().to_str().unwrap())
        );
        assert!(!lab.exec(&["/usr/bin/cat", "/proc/self/mountinfo"]).contains("config.json"));
    }

    #[test]
    fn the_record_is_what_the_runtime_itself_writes_for_the_bundle() {
        for (name, edit) in [("plain", (|_| ()) as fn(&mut Value)), ("confined", confine)] {
            let lab = Lab::new(name);
            lab.edit_config(edit);
            lab.create(&init_that(PAUSE)).unwrap();
            lab.runtime.finish_sandbox(&lab.id).unwrap();
            let corrected = lab.recorded_configuration();
            lab.runtime.delete(&lab.id).unwrap();
            lab.create_unmodified();
            assert_eq!(corrected, lab.recorded_configuration());
        }
    }

    #[test]
    fn the_runtime_goes_on_owning_the_container() {
        let lab = Lab::new("own");
        let sandbox = lab.create(&init_that(PAUSE)).unwrap();
        let state = lab.runtime.state(&lab.id).unwrap();
        assert_eq!((state.status, state.init), (Status::Running, Some(sandbox.init)));
        assert_eq!((state.bundle, state.rootfs), (lab.bundle_path(), lab.bundle_path().join("rootfs")));
        let cgroup = Cgroup::of(sandbox.init).unwrap();
        assert_eq!(cgroup.processes().unwrap(), [sandbox.init]);

        // A second migration into the same name leaves the first one alone.
        let error = lab.create(&init_that(PAUSE)).unwrap_err();
        assert!(matches!(error, RuntimeError::Exists { status: Status::Running, .. }), "{error}");
        assert_eq!(lab.runtime.state(&lab.id).unwrap().init, Some(sandbox.init));

        // The v2 freezer is pclive's own affair: the runtime can kill and delete nevertheless.
        cgroup.freeze(Duration::from_secs(1)).unwrap();
        lab.runtime.kill(&lab.id, Signal::SIGKILL).unwrap();
        lab.runtime.delete(&lab.id).unwrap();
        assert!(matches!(lab.runtime.state(&lab.id).unwrap_err(), RuntimeError::NotFound { .. }));
        assert!(matches!(
            lab.runtime.kill(&lab.id, Signal::SIGTERM).unwrap_err(),
            RuntimeError::NotFound { .. }
        ));
        assert!(!cgroup.path().exists());
        lab.runtime.delete(&lab.id).unwrap();
    }

    #[test]
    fn a_sandbox_is_a_leftover_until_it_is_finished() {
        let lab = Lab::new("leftover");
        lab.edit_config(|config| config["annotations"] = json!({ "org.example": "kept" }));
        lab.create(&init_that(PAUSE)).unwrap();
        let make_room = || lab.runtime.make_room(&lab.bundle()).unwrap();
        let cgroup = Cgroup::of(lab.runtime.state(&lab.id).unwrap().init.unwrap()).unwrap();
        assert_eq!(make_room(), Room::Cleared);
        assert!(!cgroup.path().exists() && !lab.runtime_root().join(lab.id.as_str()).exists());
        assert_eq!(make_room(), Room::Free);

        // It is one also when nothing of it runs any more.
        lab.create(&init_that(PAUSE)).unwrap();
        lab.runtime.kill(&lab.id, Signal::SIGKILL).unwrap();
        assert_eq!(make_room(), Room::Cleared);

        lab.create(&init_that(PAUSE)).unwrap();
        lab.runtime.finish_sandbox(&lab.id).unwrap();
        assert_eq!(make_room(), Room::Taken);
        lab.runtime.delete(&lab.id).unwrap();
        assert!(!lab.runtime_root().join(lab.id.as_str()).exists());

        // Whoever makes it from the bundle without pclive has no leftover.
        lab.create_unmodified();
        assert_eq!(make_room(), Room::Taken);
    }

    #[test]
    fn a_sandbox_of_another_bundle_is_nobodys_leftover_here() {
        let (lab, other) = (Lab::new("theirs"), Lab::new("theirs"));
        lab.create(&init_that(PAUSE)).unwrap();
        assert_eq!(lab.runtime.make_room(&other.bundle()).unwrap(), Room::Taken);
    }

    #[test]
    fn a_sandbox_that_fails_leaves_nothing() {
        type Edit = fn(&mut Value);
        let cases: [(&str, Edit, &[u8]); 4] = [
            ("init", |_| (), EXIT),
            ("hook", |config| config["hooks"]["poststart"] = json!([{ "path": "/bin/false" }]), PAUSE),
            ("mount", |config| config["mounts"][0]["type"] = json!("nonsense"), PAUSE),
            (
                "seccomp",
                |config| config["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_DANCE" }),
                PAUSE,
            ),
        ];
        for (name, edit, code) in cases {
            let lab = Lab::new(name);
            lab.edit_config(edit);
            let error = lab.create(&init_that(code)).unwrap_err();
            assert!(!matches!(error, RuntimeError::Undo { .. }), "{error:?}");
            assert!(matches!(lab.runtime.state(&lab.id).unwrap_err(), RuntimeError::NotFound { .. }));
            match name {
                "init" => assert!(matches!(error, RuntimeError::InitExited { .. }), "{error:?}"),
                "mount" => assert!(error.to_string().contains("error mounting"), "{error}"),
                "seccomp" => assert!(error.to_string().contains("SCMP_ACT_DANCE"), "{error}"),
                _ => assert!(error.to_string().contains("hook"), "{error}"),
            }
        }
    }

    #[test]
    fn the_init_gets_the_given_descriptors() {
        use std::os::fd::AsRawFd;
        let lab = Lab::new("stdio");
        let sandbox = lab.create(&init_that(PAUSE)).unwrap();
        let link = |path: String| std::fs::read_link(path).unwrap();
        let theirs = (0..4).map(|fd| link(format!("/proc/{}/fd/{fd}", sandbox.init)));
        let ours = lab.stdio.iter().map(|fd| link(format!("/proc/self/fd/{}", fd.as_raw_fd())));
        assert!(theirs.eq(ours.chain([std::path::PathBuf::from("/memfd:init (deleted)")])));
        assert_eq!(std::fs::read_dir(format!("/proc/{}/fd", sandbox.init)).unwrap().count(), 4);
    }
}
