//! `/proc/PID/fdinfo/FD`, parsed (proc_pid_fdinfo(5)).

use super::error::FileError;

/// What the kernel says about one descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FdInfo {
    /// File offset.
    pub pos: u64,
    /// Status flags and access mode, with `O_CLOEXEC` for the descriptor.
    pub flags: u32,
    /// Mount that the file was opened on.
    pub mount: u64,
    /// Whether the description or its process holds a lock or lease on the file.
    pub locked: bool,
    /// Everything, for the fields that only some kinds have.
    text: String,
}

impl FdInfo {
    /// Parses the file; `object` names the descriptor in errors.
    pub fn parse(text: String, object: &dyn std::fmt::Display) -> Result<Self, FileError> {
        let missing = |field| FileError::FdInfo { object: object.to_string(), field };
        let number = |field| find(&text, field).and_then(|value| value.parse().ok());
        Ok(Self {
            pos: number("pos:").ok_or_else(|| missing("pos"))?,
            flags: find(&text, "flags:")
                .and_then(|value| u32::from_str_radix(value, 8).ok())
                .ok_or_else(|| missing("flags"))?,
            mount: number("mnt_id:").ok_or_else(|| missing("mnt_id"))?,
            locked: text.lines().any(|line| line.starts_with("lock:")),
            text,
        })
    }

    /// What matters of a socket with the given `flags`: nobody asks for its offset or its mount.
    pub fn of_socket(flags: u32) -> Self {
        Self { pos: 0, flags, mount: 0, locked: false, text: String::new() }
    }

    /// The value behind `name` (which ends in a colon) at the start of a line, without blanks around it.
    pub fn field(&self, name: &str) -> Option<&str> {
        find(&self.text, name)
    }

    /// The lines that start with `name`, without it.
    pub fn lines<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.text.lines().filter_map(move |line| line.strip_prefix(name))
    }
}

fn find<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_fields_and_those_of_a_kind() {
        let text = "pos:\t42\nflags:\t02100002\nmnt_id:\t16\nino:\t1029\neventfd-count:               2a\n\
                    eventfd-id: 3\neventfd-semaphore: 1\n";
        let info = FdInfo::parse(text.into(), &"fd 3").unwrap();
        assert_eq!((info.pos, info.flags, info.mount, info.locked), (42, 0o2100002, 16, false));
        assert_eq!(info.field("eventfd-count:"), Some("2a"));
        assert_eq!(info.field("clockid:"), None);
    }

    #[test]
    fn a_lock_is_seen() {
        let text = "pos:\t0\nflags:\t0100001\nmnt_id:\t26\nino:\t12\n\
                    lock:\t1: FLOCK  ADVISORY  WRITE 714 fe:00:12 0 EOF\n";
        assert!(FdInfo::parse(text.into(), &"fd 3").unwrap().locked);
    }

    #[test]
    fn an_error_names_descriptor_and_field() {
        let error = FdInfo::parse("pos:\t0\nflags:\t09\n".into(), &"fd 3 of process 1").unwrap_err();
        assert_eq!(error.to_string(), "fdinfo of fd 3 of process 1 has no usable `flags`");
    }
}
