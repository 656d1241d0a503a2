//! The description of one set of images: which files it has, and where the blocks of each stand. Pure.
//!
//! ```text
//! process/GROUP/NNNNNNNNNNNNNNNNNNNN.set      NN..: the checkpoint
//!
//! 0   8   "bfsprc1\n"
//! 8   4   version 1
//! 12  4   bytes of the body             at most 256 MiB
//! 16  4   CRC32C over bytes 0..16 and the body
//! 20      the body: a Set as MessagePack
//!
//! process/GROUP/NNNNNNNNNNNNNNNNNNNN.pages
//!
//! 0   8   "bfspage1"
//! 8       slots: 4096 bytes, zeros behind the end of a file; CRC32C over the number of the slot (u32) and them
//! ```

use std::collections::BTreeSet;

use bfs_common::record::{CheckpointId, GroupId};
use bfs_common::wire::{PROCESS_BLOCK, PROCESS_FILES_MAX, process_file_is_valid};
use serde::{Deserialize, Serialize};

const MAGIC: &[u8; 8] = b"bfsprc1\n";
const VERSION: u32 = 1;
const HEADER: usize = 20;
/// Longest body.
const BODY_MAX: usize = 256 << 20;

/// Blocks that follow each other in a file, and stand behind each other somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The set whose pages have them.
    pub set: CheckpointId,
    /// The first slot there.
    pub slot: u32,
    /// How many.
    pub count: u32,
}

/// A file of a set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFile {
    /// Its name.
    pub name: String,
    /// Its bytes.
    pub size: u64,
    /// Its blocks, in order.
    pub runs: Vec<Run>,
}

impl ImageFile {
    /// How many blocks it has.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(PROCESS_BLOCK as u64)
    }

    /// One more block at its end.
    pub fn push(&mut self, set: CheckpointId, slot: u32) {
        match self.runs.last_mut() {
            Some(run) if run.set == set && run.slot.checked_add(run.count) == Some(slot) => run.count += 1,
            _ => self.runs.push(Run { set, slot, count: 1 }),
        }
    }
}

/// A set of images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Set {
    /// Whose.
    pub group: GroupId,
    /// Of which checkpoint.
    pub checkpoint: CheckpointId,
    /// The time in its label: tells it from another one of the same number.
    pub wall_ns: i64,
    /// Its files, in the order in which they came.
    pub files: Vec<ImageFile>,
}

/// The first bytes of a file of pages.
pub const PAGES_MAGIC: &[u8; 8] = b"bfspage1";
/// Bytes of a slot with its checksum.
pub const SLOT: usize = PROCESS_BLOCK + 4;

/// Where a slot begins in its file.
#[must_use]
pub fn slot_at(slot: u32) -> u64 {
    PAGES_MAGIC.len() as u64 + u64::from(slot) * SLOT as u64
}

/// Ends a slot with its checksum: `slot` has the bytes, and zeros up to its end.
pub fn seal_slot(number: u32, slot: &mut [u8; SLOT]) {
    let sum = slot_sum(number, &slot[..PROCESS_BLOCK]);
    slot[PROCESS_BLOCK..].copy_from_slice(&sum.to_le_bytes());
}

/// Whether a slot is as it was sealed.
#[must_use]
pub fn slot_is_sound(number: u32, slot: &[u8; SLOT]) -> bool {
    slot[PROCESS_BLOCK..] == slot_sum(number, &slot[..PROCESS_BLOCK]).to_le_bytes()
}

fn slot_sum(number: u32, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&number.to_le_bytes()), bytes)
}

impl Set {
    /// Bytes of its files.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.iter().fold(0, |sum, file| sum.saturating_add(file.size))
    }

    /// Sets whose pages it needs, but its own.
    #[must_use]
    pub fn sources(&self) -> BTreeSet<CheckpointId> {
        let runs = self.files.iter().flat_map(|file| &file.runs);
        runs.map(|run| run.set).filter(|set| *set != self.checkpoint).collect()
    }

    /// As bytes; none where it is too large for the format.
    #[must_use]
    pub fn encode(&self) -> Option<Vec<u8>> {
        let body = rmp_serde::to_vec(self).ok().filter(|body| body.len() <= BODY_MAX)?;
        let mut out = Vec::with_capacity(HEADER + body.len());
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        out.extend_from_slice(&crc32c::crc32c_append(crc32c::crc32c(&out), &body).to_le_bytes());
        out.extend_from_slice(&body);
        Some(out)
    }

    /// From its bytes.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let (head, body) = bytes.split_at_checked(HEADER).ok_or("it is cut off")?;
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        if &head[..8] != MAGIC {
            return Err("its first bytes are not those of a set of images".into());
        }
        if word(8) != VERSION {
            return Err(format!("it is of version {}, this is version {VERSION}", word(8)));
        }
        if word(12) as usize != body.len() || body.len() > BODY_MAX {
            return Err("its length is wrong".into());
        }
        if crc32c::crc32c_append(crc32c::crc32c(&head[..16]), body) != word(16) {
            return Err("its checksum does not fit".into());
        }
        let set: Self = rmp_serde::from_slice(body).map_err(|e| e.to_string())?;
        set.check()?;
        Ok(set)
    }

    fn check(&self) -> Result<(), String> {
        if self.files.len() > PROCESS_FILES_MAX {
            return Err("it has too many files".into());
        }
        let mut names = BTreeSet::new();
        for file in &self.files {
            if !process_file_is_valid(&file.name) || !names.insert(&file.name) {
                return Err(format!("a file is called {:?}", file.name));
            }
            let runs = file.runs.iter().map(|run| u64::from(run.count)).sum::<u64>();
            if runs != file.blocks() {
                return Err(format!("{} has {runs} blocks for {} bytes", file.name, file.size));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set() -> Set {
        let mut file = ImageFile { name: "pages-1.img".into(), size: 4096 * 3 + 1, runs: Vec::new() };
        for (set, slot) in [(5, 9), (7, 0), (7, 1), (7, 3)] {
            file.push(CheckpointId(set), slot);
        }
        Set {
            group: GroupId([3; 16]),
            checkpoint: CheckpointId(7),
            wall_ns: 1,
            files: vec![ImageFile { name: "a".into(), size: 0, runs: Vec::new() }, file],
        }
    }

    #[test]
    fn golden_bytes() {
        let set = set();
        let bytes = set.encode().unwrap();
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let group = "03".repeat(16);
        assert_eq!(
            hex,
            format!(
                "6266737072633 10a 01000000 39000000 4abcec38 94 dc0010{group} 07 01 \
                 92 93a1610090 93ab70616765732d312e696d67cd3001 93 93050901 93070002 93070301"
            )
            .replace(' ', "")
        );
        assert_eq!(Set::decode(&bytes), Ok(set.clone()));
        assert_eq!(set.sources(), BTreeSet::from([CheckpointId(5)]));
        assert_eq!(set.bytes(), 4096 * 3 + 1);
    }

    #[test]
    fn a_slot_is_sound_at_its_place_only() {
        let mut slot = [0; SLOT];
        slot[..5].copy_from_slice(b"bytes");
        seal_slot(3, &mut slot);
        assert!(slot_is_sound(3, &slot) && !slot_is_sound(4, &slot));
        slot[7] ^= 1;
        assert!(!slot_is_sound(3, &slot));
        assert_eq!((slot_at(0), slot_at(1)), (8, 8 + 4100));
    }

    #[test]
    fn damage_is_seen() {
        let bytes = set().encode().unwrap();
        for cut in 0..bytes.len() {
            assert!(Set::decode(&bytes[..cut]).is_err(), "{cut}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Set::decode(&flipped).is_err(), "{bit}");
        }
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        let broken = |change: fn(&mut Set)| {
            let mut set = set();
            change(&mut set);
            Set::decode(&set.encode().unwrap()).unwrap_err()
        };
        assert!(broken(|set| set.files[1].size += 4096).contains("blocks"));
        assert!(broken(|set| set.files[0].name = "../a".into()).contains("called"));
        assert!(broken(|set| set.files[0].name = set.files[1].name.clone()).contains("called"));
    }
}
