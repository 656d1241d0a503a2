//! How a record is laid out in bytes, on the wire and in the log alike.
//!
//! ```text
//! 0   u32  length of the head          all integers little-endian
//! 4   u32  length of the payload
//! 8   u64  sequence number
//! 16  u32  CRC32C over bytes 0..16, the head and the payload
//! 20  head: the Record as MessagePack
//! ..  payload: raw bytes
//! ```
//! The bytes travel and are stored as they are: what the agent encodes once is appended to the
//! log without being taken apart. The chain hash of a record is
//! `blake3(chain hash before, these bytes)`.

use bytes::{BufMut, Bytes, BytesMut};

use crate::record::{ChainHash, Record, Sequence};

/// Bytes before the head.
pub const PREFIX: usize = 20;
/// Longest head: fits two names of entries and the longest list of roots that is accepted.
pub const HEAD_MAX: usize = 1 << 20;
/// Longest payload of one record; longer writes are split.
pub const PAYLOAD_MAX: usize = 1 << 20;

/// Why bytes are not a record.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CodecError {
    /// The bytes end before the record does.
    #[error("the record is cut off: {have} of {need} bytes")]
    Truncated {
        /// Bytes there.
        have: usize,
        /// Bytes needed (at least).
        need: usize,
    },
    /// A length is beyond its cap.
    #[error("a record with a head of {head} and a payload of {payload} bytes is beyond the limit")]
    TooLong {
        /// Length of the head.
        head: usize,
        /// Length of the payload.
        payload: usize,
    },
    /// The checksum does not fit.
    #[error("the checksum of record {sequence} does not fit its bytes")]
    Checksum {
        /// Sequence number as it stands there.
        sequence: u64,
    },
    /// The head is not a record of this format.
    #[error("the head of record {sequence} is not understood: {why}")]
    Head {
        /// Sequence number.
        sequence: u64,
        /// What the decoder said.
        why: String,
    },
}

/// A record as bytes, checked.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// Place in the stream.
    pub sequence: Sequence,
    /// All bytes, prefix included.
    pub bytes: Bytes,
    head: usize,
}

impl Encoded {
    /// The record and its payload.
    ///
    /// # Errors
    /// [`CodecError::Head`] if the head is not a record.
    pub fn decode(&self) -> Result<(Record, Bytes), CodecError> {
        let record = rmp_serde::from_slice(&self.bytes[PREFIX..PREFIX + self.head])
            .map_err(|e| CodecError::Head { sequence: self.sequence.0, why: e.to_string() })?;
        Ok((record, self.bytes.slice(PREFIX + self.head..)))
    }

    /// The chain hash after this record.
    #[must_use]
    pub fn chain(&self, before: ChainHash) -> ChainHash {
        chain(before, &self.bytes)
    }
}

/// The chain hash after a record, given its encoded bytes.
#[must_use]
pub fn chain(before: ChainHash, encoded: &[u8]) -> ChainHash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&before.0);
    hasher.update(encoded);
    ChainHash(*hasher.finalize().as_bytes())
}

/// Appends a record; returns how many bytes it took.
///
/// # Panics
/// If the payload is longer than [`PAYLOAD_MAX`] (callers split), or the head cannot be encoded
/// (all types of [`Record`] can).
pub fn encode(out: &mut BytesMut, sequence: Sequence, record: &Record, payload: &[u8]) -> usize {
    let open = begin(out, sequence, record);
    out.put_slice(payload);
    finish(out, open).len()
}

/// A record at the end of a buffer whose payload may still grow.
#[derive(Clone, Copy, Debug)]
pub struct Open {
    start: usize,
    head: usize,
    sequence: Sequence,
}

/// Appends the head of a record; what is appended to `out` before [`finish`] is its payload.
///
/// # Panics
/// If the head cannot be encoded (all types of [`Record`] can).
pub fn begin(out: &mut BytesMut, sequence: Sequence, record: &Record) -> Open {
    let start = out.len();
    out.put_bytes(0, PREFIX);
    rmp_serde::encode::write(&mut (&mut *out).writer(), record).expect("records can be encoded");
    let head = out.len() - start - PREFIX;
    assert!(head <= HEAD_MAX, "head of {head} bytes");
    Open { start, head, sequence }
}

/// Ends the record that was begun; gives its bytes.
///
/// # Panics
/// If the payload is longer than [`PAYLOAD_MAX`].
pub fn finish(out: &mut BytesMut, open: Open) -> &[u8] {
    let record = &mut out[open.start..];
    let payload = record.len() - PREFIX - open.head;
    assert!(payload <= PAYLOAD_MAX, "payload of {payload} bytes not split");
    record[..4].copy_from_slice(&(open.head as u32).to_le_bytes());
    record[4..8].copy_from_slice(&(payload as u32).to_le_bytes());
    record[8..16].copy_from_slice(&open.sequence.0.to_le_bytes());
    let crc = checksum(record);
    record[16..20].copy_from_slice(&crc.to_le_bytes());
    record
}

fn checksum(record: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&record[..16]), &record[PREFIX..])
}

/// Takes the first record off `bytes`; `Ok(None)` when there are no more bytes.
///
/// # Errors
/// [`CodecError`] when the bytes are not a whole, sound record; `bytes` is then unchanged.
pub fn take(bytes: &mut Bytes) -> Result<Option<Encoded>, CodecError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    if bytes.len() < PREFIX {
        return Err(CodecError::Truncated { have: bytes.len(), need: PREFIX });
    }
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes")) as usize;
    let (head, payload) = (word(0), word(4));
    if head > HEAD_MAX || payload > PAYLOAD_MAX {
        return Err(CodecError::TooLong { head, payload });
    }
    let need = PREFIX + head + payload;
    if bytes.len() < need {
        return Err(CodecError::Truncated { have: bytes.len(), need });
    }
    let sequence = u64::from_le_bytes(bytes[8..16].try_into().expect("8 bytes"));
    if checksum(&bytes[..need]) as usize != word(16) {
        return Err(CodecError::Checksum { sequence });
    }
    Ok(Some(Encoded { sequence: Sequence(sequence), bytes: bytes.split_to(need), head }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Name, ObjectId};

    fn sample() -> (Record, &'static [u8]) {
        (Record::Write { object: ObjectId(7), offset: 4096 }, b"some bytes")
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let mut out = BytesMut::new();
        let (record, payload) = sample();
        encode(&mut out, Sequence(3), &record, payload);
        let entry = Record::EntrySet {
            directory: ObjectId(1),
            name: Name::new(b"\xff name").unwrap(),
            object: ObjectId(7),
        };
        encode(&mut out, Sequence(4), &entry, b"");
        let mut bytes = out.freeze();
        let first = take(&mut bytes).unwrap().unwrap();
        assert_eq!(first.sequence, Sequence(3));
        assert_eq!(first.decode().unwrap(), (record, Bytes::from_static(payload)));
        let second = take(&mut bytes).unwrap().unwrap();
        assert_eq!(second.decode().unwrap(), (entry, Bytes::new()));
        assert!(take(&mut bytes).unwrap().is_none());
    }

    #[test]
    fn golden_bytes() {
        let mut out = BytesMut::new();
        let (record, payload) = sample();
        encode(&mut out, Sequence(3), &record, payload);
        let hex: String = out.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            "0c0000000a0000000300000000000000e40494da81a557726974659207cd1000736f6d65206279746573"
        );
    }

    #[test]
    fn every_truncation_and_every_bit_flip_is_noticed() {
        let mut out = BytesMut::new();
        let (record, payload) = sample();
        encode(&mut out, Sequence(3), &record, payload);
        for cut in 1..out.len() {
            let mut bytes = Bytes::copy_from_slice(&out[..cut]);
            assert!(matches!(take(&mut bytes), Err(CodecError::Truncated { .. })), "cut at {cut}");
        }
        for bit in 0..out.len() * 8 {
            let mut flipped = out.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let mut bytes = Bytes::from(flipped);
            assert!(take(&mut bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn names_that_could_leave_the_tree_are_refused() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'x'; 256]] {
            assert!(Name::new(bad).is_none());
        }
        let evil = rmp_serde::to_vec(&Record::EntryDelete {
            directory: ObjectId(1),
            name: Name::new(b"xx").unwrap(),
        })
        .unwrap();
        let at = evil.windows(2).position(|w| w == b"xx").unwrap();
        let mut evil = evil;
        evil[at..at + 2].copy_from_slice(b"..");
        assert!(rmp_serde::from_slice::<Record>(&evil).is_err());
    }
}
