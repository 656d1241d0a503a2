//! Spoiling bytes, and putting the checksums of what was spoiled right again.

use bfs_common::codec::PREFIX;
use bfs_tests::random::Random;

/// Numbers at which decoders go wrong.
const EDGES: [u32; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0xffff,
    0x10000,
    1 << 20,
    (1 << 20) + 1,
    (8 << 20) + 1,
    i32::MAX as u32,
    u32::MAX,
];
/// First bytes of MessagePack: lengths that need not be true, types that nobody expects.
const MARKS: [u8; 14] = [0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xc1, 0xc6, 0xcf, 0xdb, 0xdd, 0xdf, 0xff];

/// A few changes of one of the inputs.
pub fn mutated(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = random.of(corpus).clone();
    for _ in 0..1 + random.below(6) {
        if bytes.is_empty() {
            bytes.push(random.next() as u8);
        }
        // Near the beginning is more to spoil than in the middle of data.
        let reach = if random.chance(50) { bytes.len().min(256) } else { bytes.len() };
        let at = random.below(reach);
        let len = 1 + random.below((bytes.len() - at).min(64));
        match random.below(9) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = *random.of(&MARKS),
            2 => bytes[at] = random.next() as u8,
            3 if bytes.len() >= at + 4 => bytes[at..at + 4].copy_from_slice(&random.of(&EDGES).to_le_bytes()),
            4 if bytes.len() >= at + 4 => bytes[at..at + 4].copy_from_slice(&random.of(&EDGES).to_be_bytes()),
            5 => drop(bytes.drain(at..at + len)),
            6 => {
                let twice = bytes[at..at + len].to_vec();
                bytes.splice(at..at, twice);
            }
            7 => {
                let other = random.of(corpus);
                let from = random.below(other.len());
                let len = len.min(other.len() - from);
                bytes.splice(at..at, other[from..from + len].iter().copied());
            }
            _ => bytes.truncate(at),
        }
    }
    bytes
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize)
}

fn put(bytes: &mut [u8], at: usize, number: u32) {
    bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
}

/// Records, one after another, from here on.
fn repair_records(bytes: &mut [u8], mut at: usize) {
    while let (Some(head), Some(payload)) = (word(bytes, at), word(bytes, at + 4)) {
        let end = at.saturating_add(PREFIX).saturating_add(head).saturating_add(payload);
        if end > bytes.len() {
            return;
        }
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[at..at + 16]), &bytes[at + PREFIX..end]);
        put(bytes, at + 16, crc);
        at = end;
    }
}

/// Frames have no checksum; the records in them have.
pub fn repair_frames(bytes: &mut [u8]) {
    let mut at = 0;
    while let (Some(rest), Some(head)) = (word(bytes, at), word(bytes, at + 4)) {
        let end = at.saturating_add(4).saturating_add(rest).min(bytes.len());
        let body = at.saturating_add(8).saturating_add(head);
        if body < end {
            repair_records(&mut bytes[..end], body);
        }
        if end <= at + 4 {
            return;
        }
        at = end;
    }
}

/// The header of a segment, the synced length in it, and all records.
pub fn repair_segment(bytes: &mut [u8]) {
    if bytes.len() < 128 {
        return;
    }
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..12]), &bytes[16..104]);
    put(bytes, 12, crc);
    let crc = crc32c::crc32c(&bytes[104..112]);
    put(bytes, 112, crc);
    repair_records(bytes, 128);
}

/// The header and all lines.
pub fn repair_images(bytes: &mut [u8]) {
    if bytes.len() < 48 {
        return;
    }
    let crc = crc32c::crc32c(&bytes[16..48]);
    put(bytes, 12, crc);
    let mut at = 48;
    while let (Some(head), Some(data)) = (word(bytes, at), word(bytes, at + 4)) {
        let begins = at.saturating_add(16).saturating_add(head);
        let end = begins.saturating_add(data);
        if end > bytes.len() {
            return;
        }
        let crc = crc32c::crc32c(&bytes[begins..end]);
        put(bytes, at + 8, crc);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[at..at + 12]), &bytes[at + 16..begins]);
        put(bytes, at + 12, crc);
        at = end;
    }
}
