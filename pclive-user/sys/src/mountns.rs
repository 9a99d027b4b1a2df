//! Showing a program other contents of a file without touching the file: a private mount namespace.
//!
//! The namespace belongs to one thread and the processes that it starts. Once they have exited, or moved to mount
//! namespaces of their own, it is gone with everything mounted in it, also after `SIGKILL`: nothing has to be undone.

use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// What went wrong while a file was being covered.
#[derive(Debug, thiserror::Error)]
pub enum CoverError {
    /// The thread for the namespace cannot be made.
    #[error("start a thread for a private mount namespace")]
    Thread {
        /// Cause.
        source: io::Error,
    },
    /// A call on the namespace or a mount fails.
    #[error("{call} {}", path.display())]
    Mount {
        /// What was being done.
        call: &'static str,
        /// To what.
        path: PathBuf,
        /// Cause.
        source: nix::Error,
    },
    /// The file cannot be found, or the replacement not be written.
    #[error("{call} {}", path.display())]
    File {
        /// What was being done.
        call: &'static str,
        /// To what.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

/// Runs `f` on a thread for which, and for whose children, `file` has other `contents`.
///
/// Everything else in the file system is as before. What `f` or its children mount on the mount that holds `file` is
/// not seen outside; other mounts keep their propagation, so a container that shares a volume's mounts with the host
/// still does.
pub fn with_file_covered<T: Send>(
    file: &Path,
    contents: &[u8],
    f: impl FnOnce() -> T + Send,
) -> Result<T, CoverError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("mountns".into())
            .spawn_scoped(scope, move || {
                cover(file, contents)?;
                Ok(f())
            })
            .map_err(|source| CoverError::Thread { source })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Moves the calling thread to a mount namespace where the file is covered.
///
/// The new contents live on a tmpfs. Its only use is to hold a file that can be bound over another one, so it is
/// mounted on the file's own directory, which surely exists, and detached again: the bind keeps its file alive.
fn cover(file: &Path, contents: &[u8]) -> Result<(), CoverError> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(failed("unshare the mount namespace for", file))?;
    let named = file.to_path_buf();
    let failed_io = |call, source| CoverError::File { call, path: named.clone(), source };
    // A symbolic link is covered where it leads to.
    let file = file.canonicalize().map_err(|source| failed_io("resolve", source))?;
    let directory = file.parent().unwrap_or(Path::new("/"));
    stop_propagation(&file)?;
    stop_propagation(directory)?;

    let target =
        open(&file, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map_err(failed("open", &file))?;
    mount(Some("pclive"), directory, Some("tmpfs"), MsFlags::empty(), Some("mode=0700"))
        .map_err(failed("mount a tmpfs on", directory))?;
    std::fs::write(&file, contents).map_err(|source| failed_io("write a replacement of", source))?;
    // The path leads to the replacement now, the descriptor still to the file below the tmpfs.
    let below = PathBuf::from(format!("/proc/thread-self/fd/{}", target.as_raw_fd()));
    mount(Some(&file), &below, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(failed("bind a replacement over", &file))?;
    umount2(directory, MntFlags::MNT_DETACH).map_err(failed("detach the tmpfs from", directory))
}

/// Keeps what is mounted on the mount that holds `path` from appearing in the namespace that this one was copied from.
fn stop_propagation(path: &Path) -> Result<(), CoverError> {
    for ancestor in path.ancestors() {
        match mount(None::<&str>, ancestor, None::<&str>, MsFlags::MS_SLAVE, None::<&str>) {
            // Not the root of a mount (`do_change_type` in fs/namespace.c): look further up.
            Err(nix::Error::EINVAL) => continue,
            result => return result.map_err(failed("make slave", ancestor)),
        }
    }
    Err(failed("find the mount of", path)(nix::Error::EINVAL))
}

fn failed(call: &'static str, path: &Path) -> impl FnOnce(nix::Error) -> CoverError {
    let path = path.to_path_buf();
    move |source| CoverError::Mount { call, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// Whether anything is mounted at or below `path`, for the test's process (its main thread, that is).
    fn has_mounts(path: &Path) -> bool {
        std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(path.to_str().unwrap())
    }

    fn cat(path: &Path) -> String {
        String::from_utf8(Command::new("cat").arg(path).output().unwrap().stdout).unwrap()
    }

    #[test]
    fn children_see_the_replacement_and_nobody_else_does() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("config.json");
        let sibling = directory.path().join("sibling");
        std::fs::write(&file, "original").unwrap();
        std::fs::write(&sibling, "sibling").unwrap();
        let (seen, beside, mounted) = with_file_covered(&file, b"replacement", || {
            (cat(&file), cat(&sibling), has_mounts(directory.path()))
        })
        .unwrap();
        assert_eq!((seen.as_str(), beside.as_str()), ("replacement", "sibling"));
        assert!(!mounted && !has_mounts(directory.path()));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "original");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
    }

    #[test]
    fn nothing_leaks_through_shared_mounts_and_symbolic_links() {
        // The outer namespace of this test is one where the file's mount is shared, as under systemd.
        let shared = tempfile::tempdir().unwrap();
        let path = shared.path().to_path_buf();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let set = |flags| mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).unwrap();
            set(MsFlags::MS_REC | MsFlags::MS_PRIVATE);
            mount(Some("t"), &path, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
            set(MsFlags::MS_REC | MsFlags::MS_SHARED);
            std::fs::write(path.join("real.json"), "original").unwrap();
            let link = path.join("config.json");
            std::os::unix::fs::symlink("real.json", &link).unwrap();
            let own_mounts = || std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
            let before = own_mounts();
            let outer = nix::unistd::gettid();
            let (seen, mounts_meanwhile) = with_file_covered(&link, b"replacement", || {
                (cat(&link), std::fs::read_to_string(format!("/proc/self/task/{outer}/mountinfo")).unwrap())
            })
            .unwrap();
            assert_eq!(seen, "replacement");
            assert_eq!(mounts_meanwhile, before);
            assert_eq!(cat(&link), "original");
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = with_file_covered(Path::new("/nonexistent/config.json"), b"", || ()).unwrap_err();
        assert_eq!(error.to_string(), "resolve /nonexistent/config.json");
    }
}
