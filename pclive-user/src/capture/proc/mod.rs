//! The files of `/proc/PID` that capture reads while the container stands still.
//!
//! The `procfs` crate serves everywhere else, but not in the blackout. For each file it opens a directory, asks for size and
//! offset, and reads twice; of `status` it makes a table of some sixty strings. Here a file costs three system calls,
//! `open`, `read` and `close`, and of its text only what capture needs is looked at.

use pclive_wire::{HostPid, NsPid, PAGE_SIZE};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Room for each read, in bytes.
const ROOM: usize = PAGE_SIZE as usize;
/// A read of fewer bytes has reached the end, see [`read`].
const SHORT: usize = ROOM / 2;

/// Why a file under `/proc` is of no use.
#[derive(Debug, thiserror::Error)]
pub enum ProcError {
    /// It could not be read; the process may have ended.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It says something unknown.
    #[error("cannot understand {field} in {path}")]
    Parse {
        /// Which.
        path: PathBuf,
        /// What could not be understood, or is missing.
        field: &'static str,
    },
}

impl ProcError {
    /// Whether the process or thread has ended.
    pub fn is_gone(&self) -> bool {
        // ENOENT before its files are opened, ESRCH afterwards.
        let gone = [Some(libc::ENOENT), Some(libc::ESRCH)];
        matches!(self, Self::Read { source, .. } if gone.contains(&source.raw_os_error()))
    }
}

/// Reads `/proc/FILE`, which must have no records longer than half a page: with `maps`, for one, it may end too early.
///
/// The kernel gives out as many whole records as fit into a page, or a single longer one piece by piece
/// (`seq_read_iter` in fs/seq_file.c). So a read that leaves more than half a page empty has met the end, and none is
/// needed that returns 0.
pub fn read(file: &str) -> Result<Vec<u8>, ProcError> {
    let path = Path::new("/proc").join(file);
    let bytes = File::open(&path).and_then(|mut file| read_records(&mut file));
    bytes.map_err(|source| ProcError::Read { path, source })
}

fn read_records(file: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut filled = 0;
    loop {
        bytes.resize(filled + ROOM, 0);
        let read = match file.read(&mut bytes[filled..]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        filled += read;
        if read < SHORT {
            bytes.truncate(filled);
            return Ok(bytes);
        }
    }
}

/// Where the symbolic link `/proc/FILE` leads, as the kernel names it.
pub fn link(file: &str) -> Result<Vec<u8>, ProcError> {
    let path = Path::new("/proc").join(file);
    let target = std::fs::read_link(&path).map_err(|source| ProcError::Read { path, source })?;
    Ok(target.into_os_string().into_vec())
}

/// The threads of a process as the host numbers them, the leader first.
pub fn threads(pid: HostPid) -> Result<Vec<HostPid>, ProcError> {
    let mut threads: Vec<HostPid> = list(format!("{pid}/task"), HostPid)?;
    if threads.is_empty() {
        // The list of a process that has ended since its directory was opened.
        let source = io::Error::from_raw_os_error(libc::ESRCH);
        return Err(ProcError::Read { path: format!("/proc/{pid}/task").into(), source });
    }
    threads.sort_by_key(|&tid| (tid != pid, tid));
    Ok(threads)
}

/// The open descriptors of a process, sorted.
pub fn descriptors(pid: HostPid) -> Result<Vec<RawFd>, ProcError> {
    let mut descriptors = list(format!("{pid}/fd"), |fd| fd)?;
    descriptors.sort_unstable();
    Ok(descriptors)
}

/// The names in the directory `/proc/DIRECTORY` that are numbers.
fn list<T>(directory: String, of: impl Fn(i32) -> T) -> Result<Vec<T>, ProcError> {
    let path = Path::new("/proc").join(directory);
    let read = || -> io::Result<Vec<T>> {
        let mut numbers = Vec::new();
        for entry in std::fs::read_dir(&path)? {
            let name = entry?.file_name();
            numbers.extend(name.to_str().and_then(|name| name.parse().ok()).map(&of));
        }
        Ok(numbers)
    };
    read().map_err(|source| ProcError::Read { path, source })
}

/// The children of a thread, also those that have ended. Incomplete if one of them is reaped meanwhile.
pub fn children(pid: HostPid, tid: HostPid) -> Result<Vec<HostPid>, ProcError> {
    let file = format!("{pid}/task/{tid}/children");
    let text = read(&file)?;
    parse(&file, &text, |text| {
        text.split_ascii_whitespace().map(|child| number(child, "a number").map(HostPid)).collect()
    })
}

/// Parses the text of `/proc/FILE`; the parser's error is what it could not understand.
fn parse<T>(
    file: &str,
    text: &[u8],
    parser: impl FnOnce(&str) -> Result<T, &'static str>,
) -> Result<T, ProcError> {
    // Names of threads may be any bytes; nobody reads them here.
    parser(&String::from_utf8_lossy(text))
        .map_err(|field| ProcError::Parse { path: Path::new("/proc").join(file), field })
}

/// The numbers of a thread, group or session from the pid namespace of `/proc` inwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NsNumbers {
    /// Its number in the innermost namespace; 0 if it cannot be seen there.
    pub innermost: NsPid,
    /// Whether that is another namespace than that of `/proc`.
    pub nested: bool,
}

impl NsNumbers {
    fn parse(numbers: &str) -> Option<Self> {
        let mut numbers = numbers.split_ascii_whitespace();
        let innermost = NsPid(numbers.next_back()?.parse().ok()?);
        Some(Self { innermost, nested: numbers.next().is_some() })
    }
}

/// What capture needs of `status` (proc_pid_status(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Status {
    /// The parent process, as the host numbers it.
    pub parent: HostPid,
    /// None of a thread that is about to end.
    pub umask: Option<u32>,
    /// Real, effective, saved, for the file system.
    pub uids: [u32; 4],
    /// The same of groups.
    pub gids: [u32; 4],
    pub groups: Vec<u32>,
    /// Of the thread. None, as the next two, if the kernel knows no pid namespaces.
    pub ns_pid: Option<NsNumbers>,
    pub ns_pgid: Option<NsNumbers>,
    pub ns_sid: Option<NsNumbers>,
    pub inheritable: u64,
    pub permitted: u64,
    pub effective: u64,
    pub bounding: u64,
    pub ambient: u64,
    pub no_new_privs: bool,
    /// Signals that the process has handlers for.
    pub caught: u64,
    /// How many descriptors the table can hold without growing; 0 of a process that has ended.
    pub fd_size: u32,
}

impl Status {
    /// That of a process, which is that of its leader.
    pub fn of_process(pid: HostPid) -> Result<Self, ProcError> {
        Self::read(&format!("{pid}/status"))
    }

    /// That of a thread.
    pub fn of_thread(pid: HostPid, tid: HostPid) -> Result<Self, ProcError> {
        Self::read(&format!("{pid}/task/{tid}/status"))
    }

    fn read(file: &str) -> Result<Self, ProcError> {
        parse(file, &read(file)?, Self::parse)
    }

    /// Parses the lines `Name: value`. The name of the thread takes one of them whatever is in it: the kernel escapes line
    /// breaks (`proc_task_name` in fs/proc/array.c).
    ///
    /// # Errors
    /// The field that is missing or unknown.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        const FIELDS: [&str; 16] = [
            "Umask",
            "PPid",
            "Uid",
            "Gid",
            "Groups",
            "NSpid",
            "NSpgid",
            "NSsid",
            "CapInh",
            "CapPrm",
            "CapEff",
            "CapBnd",
            "CapAmb",
            "NoNewPrivs",
            "SigCgt",
            "FDSize",
        ];
        let mut values = [None; FIELDS.len()];
        for (name, value) in text.lines().filter_map(|line| line.split_once(':')) {
            if let Some(place) = FIELDS.iter().position(|&field| field == name) {
                values[place] = Some(value.trim_ascii());
            }
        }
        let [
            umask,
            parent,
            uids,
            gids,
            groups,
            pid,
            pgid,
            sid,
            inh,
            prm,
            eff,
            bnd,
            amb,
            no_new_privs,
            caught,
            fd_size,
        ] = values;
        Ok(Self {
            parent: HostPid(number(parent.ok_or("PPid")?, "PPid")?),
            umask: umask.map(|umask| u32::from_str_radix(umask, 8).map_err(|_| "Umask")).transpose()?,
            uids: numbers(uids, "Uid")?.try_into().map_err(|_| "Uid")?,
            gids: numbers(gids, "Gid")?.try_into().map_err(|_| "Gid")?,
            groups: numbers(groups, "Groups")?,
            ns_pid: pid.and_then(NsNumbers::parse),
            ns_pgid: pgid.and_then(NsNumbers::parse),
            ns_sid: sid.and_then(NsNumbers::parse),
            inheritable: mask(inh, "CapInh")?,
            permitted: mask(prm, "CapPrm")?,
            effective: mask(eff, "CapEff")?,
            bounding: mask(bnd, "CapBnd")?,
            ambient: mask(amb, "CapAmb")?,
            no_new_privs: no_new_privs == Some("1"),
            caught: mask(caught, "SigCgt")?,
            fd_size: number(fd_size.ok_or("FDSize")?, "FDSize")?,
        })
    }
}

/// What capture needs of `stat` (proc_pid_stat(5)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Stat {
    /// `Z` if it has ended, `R`, `S` …
    pub state: char,
    /// `PF_*` of include/linux/sched.h.
    pub flags: u32,
    pub start_code: u64,
    pub end_code: u64,
    pub start_stack: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
}

impl Stat {
    /// That of a process; or of a thread, of which the bounds are those of its process.
    pub fn of(pid: HostPid) -> Result<Self, ProcError> {
        let file = format!("{pid}/stat");
        parse(&file, &read(&file)?, Self::parse)
    }

    /// Parses the one line of it. In the name, which is in parentheses, may be anything, also a line break.
    ///
    /// # Errors
    /// The field that is missing or unknown.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let (_, after_name) = text.rsplit_once(')').ok_or("comm")?;
        let mut fields = after_name.split_ascii_whitespace();
        let state = fields.next().and_then(|state| state.chars().next()).ok_or("state")?;
        // The manual counts from 1, and the state is number 3.
        let mut next = 4;
        let mut field = |place: usize, name| {
            let value = fields.nth(place - next).ok_or(name)?;
            next = place + 1;
            number::<u64>(value, name)
        };
        Ok(Self {
            state,
            flags: field(9, "flags")? as u32,
            start_code: field(26, "startcode")?,
            end_code: field(27, "endcode")?,
            start_stack: field(28, "startstack")?,
            start_data: field(45, "start_data")?,
            end_data: field(46, "end_data")?,
            start_brk: field(47, "start_brk")?,
            arg_start: field(48, "arg_start")?,
            arg_end: field(49, "arg_end")?,
            env_start: field(50, "env_start")?,
            env_end: field(51, "env_end")?,
        })
    }
}

fn number<T: FromStr>(text: &str, field: &'static str) -> Result<T, &'static str> {
    text.parse().map_err(|_| field)
}

fn numbers(text: Option<&str>, field: &'static str) -> Result<Vec<u32>, &'static str> {
    text.ok_or(field)?.split_ascii_whitespace().map(|text| number(text, field)).collect()
}

fn mask(text: Option<&str>, field: &'static str) -> Result<u64, &'static str> {
    u64::from_str_radix(text.ok_or(field)?, 16).map_err(|_| field)
}

#[cfg(test)]
mod tests;
