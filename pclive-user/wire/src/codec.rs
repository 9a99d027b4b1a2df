//! Frames of the control stream: a fixed header, then one postcard-encoded message.
//!
//! ```text
//!   0        4         6          8          12
//!   ├────────┼─────────┼──────────┼──────────┼──────────────┄
//!   │ "PCLV" │ version │ zero     │ length   │ payload
//!   └────────┴─────────┴──────────┴──────────┴──────────────┄      little-endian
//! ```
//!
//! The header of every version starts with magic and version, so that two versions of pclive can at least tell each
//! other apart. `length` is checked against a limit that depends on how well the peer is known, before anything is
//! allocated; bytes left over after the message are an error.

use serde::{Serialize, de::DeserializeOwned};

/// The protocol's version. There is one: both hosts run the same release.
pub const VERSION: u16 = 3;
/// Bytes of a frame header.
pub const HEADER_LEN: usize = 12;
const MAGIC: [u8; 4] = *b"PCLV";

/// A frame that cannot be taken, or a message that cannot be framed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// Not pclive at all.
    #[error("frame starts with {0:02x?}: the peer does not speak pclive's protocol")]
    Magic([u8; 4]),
    /// Another release.
    #[error("peer speaks protocol version {theirs}, this pclive version {VERSION}")]
    Version {
        /// What the peer's frame says.
        theirs: u16,
    },
    /// Reserved bytes are not zero.
    #[error("reserved bytes of a frame header are not zero")]
    Reserved,
    /// The frame is larger than it may be at this point.
    #[error("frame of {length} bytes, at most {limit} are allowed here")]
    TooLong {
        /// Bytes that the frame has or would have.
        length: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The payload is not the expected message.
    #[error("undecodable message")]
    Payload(#[source] postcard::Error),
    /// The payload is longer than its message.
    #[error("{0} bytes after the end of a message")]
    Trailing(usize),
}

/// Frames `message`, whose encoding may have at most `limit` bytes.
pub fn encode<M: Serialize>(message: &M, limit: usize) -> Result<Vec<u8>, CodecError> {
    let mut frame = vec![0; HEADER_LEN];
    frame = postcard::to_extend(message, frame).map_err(CodecError::Payload)?;
    let length = frame.len() - HEADER_LEN;
    if length > limit {
        return Err(CodecError::TooLong { length, limit });
    }
    frame[..4].copy_from_slice(&MAGIC);
    frame[4..6].copy_from_slice(&VERSION.to_le_bytes());
    let length = u32::try_from(length).map_err(|_| CodecError::TooLong { length, limit })?;
    frame[8..12].copy_from_slice(&length.to_le_bytes());
    Ok(frame)
}

/// The payload's length as the header announces it, at most `limit`.
pub fn payload_length(header: &[u8; HEADER_LEN], limit: usize) -> Result<usize, CodecError> {
    let [m0, m1, m2, m3, v0, v1, r0, r1, l0, l1, l2, l3] = *header;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(CodecError::Magic([m0, m1, m2, m3]));
    }
    let theirs = u16::from_le_bytes([v0, v1]);
    if theirs != VERSION {
        return Err(CodecError::Version { theirs });
    }
    if [r0, r1] != [0, 0] {
        return Err(CodecError::Reserved);
    }
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if length > limit { Err(CodecError::TooLong { length, limit }) } else { Ok(length) }
}

/// The message that is the whole of `payload`.
pub fn decode<M: DeserializeOwned>(payload: &[u8]) -> Result<M, CodecError> {
    let (message, rest) = postcard::take_from_bytes(payload).map_err(CodecError::Payload)?;
    if rest.is_empty() { Ok(message) } else { Err(CodecError::Trailing(rest.len())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(frame: &[u8]) -> [u8; HEADER_LEN] {
        frame[..HEADER_LEN].try_into().unwrap()
    }

    #[test]
    fn a_frame_comes_back_as_the_message() {
        let frame = encode(&(7u32, "seven"), 64).unwrap();
        assert_eq!(payload_length(&header(&frame), 64), Ok(frame.len() - HEADER_LEN));
        assert_eq!(decode(&frame[HEADER_LEN..]), Ok((7u32, "seven".to_owned())));
    }

    #[test]
    fn headers_are_checked() {
        let good = header(&encode(&1u8, 64).unwrap());
        let with = |at: usize, byte: u8| {
            let mut header = good;
            header[at] = byte;
            payload_length(&header, 64)
        };
        assert_eq!(with(0, b'H'), Err(CodecError::Magic(*b"HCLV")));
        assert_eq!(with(4, 9), Err(CodecError::Version { theirs: 9 }));
        assert_eq!(with(6, 1), Err(CodecError::Reserved));
        assert_eq!(with(8, 65), Err(CodecError::TooLong { length: 65, limit: 64 }));
        assert_eq!(with(8, 64), Ok(64));
    }

    #[test]
    fn payloads_are_neither_cut_nor_padded() {
        assert!(matches!(decode::<(u32, u32)>(&[1]), Err(CodecError::Payload(_))));
        assert_eq!(decode::<u8>(&[1, 2, 3]), Err(CodecError::Trailing(2)));
        assert_eq!(encode(&[0u8; 8], 7), Err(CodecError::TooLong { length: 8, limit: 7 }));
    }
}
