//! RESP and memcached's text protocol: the two requests and their answers.

use super::keyspace::{Key, Keyspace, Version};
use super::spec::Service;

/// More than any answer's first line has: a longer one is not the protocol.
const MAX_LINE_BYTES: usize = 1024;

/// What the server said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer<'a> {
    Stored,
    Value(&'a [u8]),
    Missing,
    /// An error message, or something that is not the protocol.
    Other(String),
}

/// Appends the request that reads `key`.
pub(super) fn append_get(service: Service, out: &mut Vec<u8>, key: Key) {
    let request = match service {
        Service::Redis => format!("*2\r\n$3\r\nGET\r\n$11\r\nk{key:010}\r\n"),
        Service::Memcached => format!("get k{key:010}\r\n"),
    };
    out.extend_from_slice(request.as_bytes());
}

/// Appends the request that writes `version` of `key`.
pub(super) fn append_set(service: Service, out: &mut Vec<u8>, keys: &Keyspace, key: Key, version: Version) {
    let len = keys.value_len(key);
    let request = match service {
        Service::Redis => format!("*3\r\n$3\r\nSET\r\n$11\r\nk{key:010}\r\n${len}\r\n"),
        Service::Memcached => format!("set k{key:010} 0 0 {len}\r\n"),
    };
    out.extend_from_slice(request.as_bytes());
    keys.append_value(out, key, version);
    out.extend_from_slice(b"\r\n");
}

/// The first answer in `input` and its length; `None` if it has not arrived completely.
pub(super) fn parse(service: Service, input: &[u8]) -> Option<(Answer<'_>, usize)> {
    let Some(end) = input.windows(2).take(MAX_LINE_BYTES).position(|two| two == b"\r\n") else {
        let endless = input.len() > MAX_LINE_BYTES;
        return endless.then(|| (Answer::Other("an endless line".into()), input.len()));
    };
    let (line, rest) = (&input[..end], &input[end + 2..]);
    let value_len = match service {
        Service::Redis => line.strip_prefix(b"$").map(number),
        Service::Memcached => {
            line.strip_prefix(b"VALUE ").map(|rest| number(rest.rsplit(|byte| *byte == b' ').next()?))
        }
    };
    // What follows a value: the end of its line, and memcached's line after the last one.
    let tail: &[u8] = if service == Service::Redis { b"\r\n" } else { b"\r\nEND\r\n" };
    let simple = |answer| Some((answer, end + 2));
    match value_len {
        Some(Some(len)) => {
            let whole = rest.get(..len.saturating_add(tail.len()))?;
            let answer = match whole.strip_suffix(tail) {
                Some(value) => Answer::Value(value),
                None => Answer::Other("a value without its end".into()),
            };
            Some((answer, end + 2 + whole.len()))
        }
        None if line == b"+OK" || line == b"STORED" => simple(Answer::Stored),
        None if line == b"END" => simple(Answer::Missing),
        Some(None) if line == b"$-1" => simple(Answer::Missing),
        _ => simple(Answer::Other(String::from_utf8_lossy(line).into_owned())),
    }
}

fn number(digits: &[u8]) -> Option<usize> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses `input` whole, and checks that no part of it is taken for an answer.
    fn parse_all(service: Service, input: &[u8]) -> Answer<'_> {
        for part in 0..input.len() {
            assert_eq!(parse(service, &input[..part]), None, "{part} bytes of {input:?}");
        }
        let (answer, len) = parse(service, input).expect("a whole answer");
        assert_eq!(len, input.len());
        answer
    }

    #[test]
    fn answers_of_both_protocols() {
        use Service::{Memcached, Redis};
        assert_eq!(parse_all(Redis, b"+OK\r\n"), Answer::Stored);
        assert_eq!(parse_all(Redis, b"$-1\r\n"), Answer::Missing);
        assert_eq!(parse_all(Redis, b"$5\r\na\r\nbc\r\n"), Answer::Value(b"a\r\nbc"));
        assert_eq!(parse_all(Redis, b"-OOM no memory\r\n"), Answer::Other("-OOM no memory".into()));
        assert_eq!(parse_all(Memcached, b"STORED\r\n"), Answer::Stored);
        assert_eq!(parse_all(Memcached, b"END\r\n"), Answer::Missing);
        assert_eq!(parse_all(Memcached, b"VALUE k1 0 3\r\nEND\r\nEND\r\n"), Answer::Value(b"END"));
        assert_eq!(parse_all(Memcached, b"SERVER_ERROR x\r\n"), Answer::Other("SERVER_ERROR x".into()));
    }

    #[test]
    fn what_is_no_answer_ends_nothing_but_itself() {
        let endless = vec![b'x'; 2 * MAX_LINE_BYTES];
        assert!(matches!(parse(Service::Redis, &endless), Some((Answer::Other(_), _))));
        assert!(matches!(parse(Service::Redis, b"$1\r\nxyz\r\n"), Some((Answer::Other(_), _))));
    }
}
