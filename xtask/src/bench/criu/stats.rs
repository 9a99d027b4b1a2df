//! What CRIU measures itself: the images `stats-dump` and `stats-restore`.
//!
//! An image is two magic numbers, the length of a message, and a protocol buffer (CRIU's `images/stats.proto`). All of
//! its fields are integers, so that a few lines read it.

use serde::Serialize;

/// Bytes before the message: two magic numbers and a length.
const HEADER: usize = 12;
/// Field numbers of the two messages in a stats image.
const DUMP: u64 = 1;
const RESTORE: u64 = 2;
/// Wire types of protocol buffers.
const VARINT: u64 = 0;
const LENGTH_DELIMITED: u64 = 2;

/// What dumping took, in microseconds and pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Dump {
    /// Stopping the processes.
    pub freezing_us: u64,
    /// For how long they were stopped.
    pub frozen_us: u64,
    /// Taking memory out of them.
    pub memory_dump_us: u64,
    /// Writing it, here to the page server.
    pub memory_write_us: u64,
    /// Pages written.
    pub pages_written: u64,
}

/// What restoring took, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Restore {
    /// Making the processes.
    pub forking_us: u64,
    /// All of CRIU's part.
    pub restore_us: u64,
}

/// Reads `stats-dump`; `None` if it is something else.
pub fn parse_dump(image: &[u8]) -> Option<Dump> {
    let fields = message(image, DUMP)?;
    let field = |number| value(&fields, number);
    Some(Dump {
        freezing_us: field(1)?,
        frozen_us: field(2)?,
        memory_dump_us: field(3)?,
        memory_write_us: field(4)?,
        pages_written: field(7)?,
    })
}

/// Reads `stats-restore`; `None` if it is something else.
pub fn parse_restore(image: &[u8]) -> Option<Restore> {
    let fields = message(image, RESTORE)?;
    Some(Restore { forking_us: value(&fields, 3)?, restore_us: value(&fields, 4)? })
}

fn value(fields: &[(u64, u64)], number: u64) -> Option<u64> {
    fields.iter().find(|field| field.0 == number).map(|field| field.1)
}

/// The integers of the message in field `number` of the image's message.
fn message(image: &[u8], number: u64) -> Option<Vec<(u64, u64)>> {
    let mut entry = image.get(HEADER..)?;
    while !entry.is_empty() {
        let key = varint(&mut entry)?;
        if key & 7 != LENGTH_DELIMITED {
            return None;
        }
        let length = usize::try_from(varint(&mut entry)?).ok()?;
        let (found, rest) = entry.split_at_checked(length)?;
        entry = rest;
        if key >> 3 == number {
            return integers(found);
        }
    }
    None
}

fn integers(mut message: &[u8]) -> Option<Vec<(u64, u64)>> {
    let mut fields = Vec::new();
    while !message.is_empty() {
        let key = varint(&mut message)?;
        if key & 7 != VARINT {
            return None;
        }
        fields.push((key >> 3, varint(&mut message)?));
    }
    Some(fields)
}

/// Takes a base-128 number off the front.
fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(number: u8, message: &[u8]) -> Vec<u8> {
        let mut image = vec![0; HEADER];
        image.extend([number << 3 | 2, message.len() as u8]);
        image.extend(message);
        image
    }

    #[test]
    fn the_two_images_are_understood() {
        let dump = image(1, &[8, 10, 16, 0xac, 0x02, 24, 30, 32, 40, 40, 50, 48, 60, 56, 70]);
        let expected = Dump {
            freezing_us: 10,
            frozen_us: 300,
            memory_dump_us: 30,
            memory_write_us: 40,
            pages_written: 70,
        };
        assert_eq!(parse_dump(&dump), Some(expected));
        let restore = image(2, &[8, 1, 16, 2, 24, 3, 32, 0xac, 0x02]);
        assert_eq!(parse_restore(&restore), Some(Restore { forking_us: 3, restore_us: 300 }));
    }

    #[test]
    fn anything_else_is_refused() {
        let restore = image(2, &[8, 1, 16, 2, 24, 3, 32, 4]);
        assert_eq!(parse_dump(&restore), None, "the other image");
        for length in 0..restore.len() {
            assert_eq!(parse_restore(&restore[..length]), None, "cut after {length} bytes");
        }
        assert_eq!(parse_restore(&image(2, &[24, 0xff, 0xff])), None, "an endless number");
        assert_eq!(parse_restore(&image(2, &[26, 1, 0])), None, "no integer");
    }
}
