//! Checksums of the tree's files: a CRC32C for each block of 64 KiB.
//!
//! They stand in the index, up to 64 of them in a row, and change in the transaction that moves the applied
//! position: so they are those of the applied checkpoint at every moment, and a step that is done again makes the
//! same. What a step has to compute follows what it writes: blocks that it changes in part are read back as a whole.
//!
//! The last block of a file ends with the file. A block without a checksum has only zeros where the file is
//! *whole* (all its blocks were made by a release that keeps checksums, or were read by `check`), so holes cost
//! nothing; else nothing is known about it. What is empty is whole.

mod compare;
#[cfg(test)]
mod tests;

pub use compare::{Compared, Next, compare, look, next, read_there};

use std::fs::File;
use std::os::unix::fs::FileExt;

use bfs_common::record::ObjectId;

use super::damage::Damage;
use super::error::BackupError;
use super::images::BLOCK;
use super::pieces::joined;
use super::target::{Content, Source};

/// Bytes of a block.
const BLOCK_BYTES: u64 = BLOCK as u64;
/// Blocks of a row.
const ROW_BLOCKS: u64 = 64;

/// The row that has a block.
#[must_use]
pub const fn row_of(block: u64) -> u64 {
    block / ROW_BLOCKS
}

/// How many blocks a file of this size has.
#[must_use]
pub const fn blocks(size: u64) -> u64 {
    size.div_ceil(BLOCK_BYTES)
}

/// The bytes of a block in a file of this size: offset and end.
const fn range(block: u64, size: u64) -> (u64, u64) {
    let end = (block + 1).saturating_mul(BLOCK_BYTES);
    (block * BLOCK_BYTES, if end < size { end } else { size })
}

/// A row of the index: the checksums of 64 blocks that follow each other.
///
/// u8: whether the file is whole (means something in row 0); u64: which blocks have a checksum, the first in the
/// lowest bit; a u32 for each of these.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SumRow {
    /// Blocks without a checksum have only zeros.
    pub whole: bool,
    known: u64,
    sums: Vec<u32>,
}

impl SumRow {
    /// From the index; `None` if it is no row.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (whole, rest) = bytes.split_first()?;
        let (known, rest) = rest.split_first_chunk::<8>()?;
        let known = u64::from_le_bytes(*known);
        if *whole > 1 || rest.len() != known.count_ones() as usize * 4 {
            return None;
        }
        let sums = rest.as_chunks::<4>().0.iter().map(|sum| u32::from_le_bytes(*sum)).collect();
        Some(Self { whole: *whole == 1, known, sums })
    }

    /// For the index.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![u8::from(self.whole)];
        bytes.extend_from_slice(&self.known.to_le_bytes());
        self.sums.iter().for_each(|sum| bytes.extend_from_slice(&sum.to_le_bytes()));
        bytes
    }

    /// Whether it says nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.whole && self.known == 0
    }

    fn place(&self, block: u64) -> (u64, usize) {
        let bit = 1u64 << (block % ROW_BLOCKS);
        (bit, (self.known & (bit - 1)).count_ones() as usize)
    }

    /// The checksum of a block of this row.
    #[must_use]
    pub fn get(&self, block: u64) -> Option<u32> {
        let (bit, at) = self.place(block);
        (self.known & bit != 0).then(|| self.sums[at])
    }

    /// Notes the checksum of a block of this row.
    pub fn set(&mut self, block: u64, sum: u32) {
        let (bit, at) = self.place(block);
        if self.known & bit == 0 {
            self.known |= bit;
            self.sums.insert(at, sum);
        } else {
            self.sums[at] = sum;
        }
    }

    /// Nothing is said about a block of this row any more.
    pub fn clear(&mut self, block: u64) {
        let (bit, at) = self.place(block);
        if self.known & bit != 0 {
            self.known &= !bit;
            self.sums.remove(at);
        }
    }
}

/// What a step changes in the checksums of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SumChange {
    /// What was known before is void, and all that is not said here is zeros.
    pub fresh: bool,
    /// Blocks that have no checksum any more: first and end.
    pub holes: Vec<(u64, u64)>,
    /// Checksums of blocks, in order; they count after the holes.
    pub sums: Vec<(u64, u32)>,
    /// How many blocks the file has: of those behind them nothing is kept.
    pub blocks: u64,
}

/// Which rows of a file a change touches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Edit {
    /// Rows that go as a whole, first: first and end.
    pub gone: Vec<(u64, u64)>,
    /// Rows that change, in order: [`SumChange::row`] says to what.
    pub rows: Vec<u64>,
}

impl Edit {
    /// Of a change.
    #[must_use]
    pub fn of(change: &SumChange) -> Self {
        let kept = change.blocks.div_ceil(ROW_BLOCKS);
        let mut gone = vec![(if change.fresh { 0 } else { kept }, u64::MAX)];
        let mut rows: Vec<u64> = change.sums.iter().map(|(block, _)| row_of(*block)).collect();
        // Rows of which only a part goes.
        let part = |block: u64| (!block.is_multiple_of(ROW_BLOCKS)).then_some(row_of(block));
        for (first, end) in &change.holes {
            let (whole_first, whole_end) = (first.div_ceil(ROW_BLOCKS), end / ROW_BLOCKS);
            rows.extend([part(*first), part(*end)].into_iter().flatten());
            // Row 0 says whether the file is whole.
            if whole_first == 0 && whole_end > 0 {
                rows.push(0);
            }
            if whole_first.max(1) < whole_end {
                gone.push((whole_first.max(1), whole_end));
            }
        }
        rows.extend(part(change.blocks));
        if change.fresh && change.blocks > 0 {
            rows.push(0);
        }
        rows.sort_unstable();
        rows.dedup();
        rows.retain(|row| *row < kept);
        Self { gone, rows }
    }
}

impl SumChange {
    /// What a row becomes, from what it was; `None` if it says nothing.
    #[must_use]
    pub fn row(&self, number: u64, before: Option<&SumRow>) -> Option<SumRow> {
        let mut row = if self.fresh { None } else { before.cloned() }.unwrap_or_default();
        row.whole |= self.fresh && number == 0;
        let (first, end) = (number * ROW_BLOCKS, (number + 1) * ROW_BLOCKS);
        let behind = (self.blocks, u64::MAX);
        for (from, to) in self.holes.iter().chain([&behind]) {
            (*from.max(&first)..*to.min(&end)).for_each(|block| row.clear(block));
        }
        let from = self.sums.partition_point(|(block, _)| *block < first);
        for (block, sum) in self.sums[from..].iter().take_while(|(block, _)| *block < end) {
            row.set(*block, *sum);
        }
        (!row.is_empty()).then_some(row)
    }
}

/// Which blocks of a file a change touches.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Affected {
    /// To be read: first and end, in order, apart from each other.
    read: Vec<(u64, u64)>,
    /// Only zeros: first and end.
    zeros: Vec<(u64, u64)>,
}

/// Which blocks a change touches of a file that had `before` bytes and has `after` now.
fn affected(content: &Content, before: u64, after: u64) -> Affected {
    let mut read = Vec::new();
    let mut zeros = Vec::new();
    // Blocks that lie only in part in a range of zeros are read.
    let mut zero = |start: u64, end: u64, read: &mut Vec<(u64, u64)>| {
        let end = end.min(after);
        if start >= end {
            return;
        }
        let (first, last) =
            (start.div_ceil(BLOCK_BYTES), if end == after { blocks(end) } else { end / BLOCK_BYTES });
        if first < last {
            zeros.push((first, last));
        }
        for edge in [start, end] {
            let block = edge / BLOCK_BYTES;
            if !edge.is_multiple_of(BLOCK_BYTES) && block < blocks(after) && !(first..last).contains(&block) {
                read.push((block, block + 1));
            }
        }
    };
    // What was cut and grew again.
    if content.keep < before {
        zero(content.keep, before, &mut read);
    }
    for (start, end, source) in content.extents.iter() {
        match source {
            Source::Zero => zero(start, end, &mut read),
            Source::Log(_) if start < after => read.push((start / BLOCK_BYTES, blocks(end.min(after)))),
            Source::Log(_) => {}
        }
    }
    // A last block that gets longer or shorter.
    if before != after {
        for end in [before, after] {
            let block = end / BLOCK_BYTES;
            if !end.is_multiple_of(BLOCK_BYTES) && end <= before && block < blocks(after) {
                read.push((block, block + 1));
            }
        }
    }
    Affected { read: joined(read), zeros }
}

/// The checksums that a change of content gives, read from the file after it was done. `before` is the size it had;
/// `None` for a new one; `damage` what is still damaged of it.
///
/// # Errors
/// If the file cannot be read.
pub fn of_change(
    object: ObjectId,
    file: &File,
    content: &Content,
    before: Option<u64>,
    after: u64,
    damage: &Damage,
    buffer: &mut Vec<u8>,
) -> Result<SumChange, BackupError> {
    let had = before.unwrap_or(0);
    let affected = affected(content, had, after);
    let fresh = content.keep == 0 || had == 0;
    let holes = if fresh { Vec::new() } else { affected.zeros };
    let mut change = SumChange { fresh, holes, sums: Vec::new(), blocks: blocks(after) };
    for (first, end) in affected.read {
        for block in first..end {
            let (start, end) = range(block, after);
            if damage.touches(start, end) {
                // What is wrong with it must not become right.
                change.holes.push((block, block + 1));
                continue;
            }
            change.sums.push((block, read_sum(object, file, block, after, buffer)?));
        }
    }
    Ok(change)
}

/// The checksum of its own that a block has. It has none where it is zeros, and where it is damaged in part.
///
/// # Errors
/// If it cannot be looked up.
pub fn own(sums: &impl Sums, block: u64) -> Result<Option<u32>, BackupError> {
    Ok(sums.row(row_of(block))?.and_then(|row| row.get(block)))
}

/// The checksum of a block in a file of this size, zeros too.
fn of_block(sums: &impl Sums, block: u64, size: u64) -> Result<Option<u32>, BackupError> {
    if let Some(sum) = own(sums, block)? {
        return Ok(Some(sum));
    }
    Ok(sums.row(0)?.is_some_and(|row| row.whole).then(|| zero_sum(block, size)))
}

/// The blocks that ranges of a file of this size lie in, with their bytes: number, offset, end.
pub fn blocks_of(ranges: &[(u64, u64)], size: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let mut all: Vec<u64> =
        ranges.iter().flat_map(|(start, end)| start / BLOCK_BYTES..blocks(*end)).collect();
    all.dedup();
    all.into_iter().map(move |block| {
        let (start, end) = range(block, size);
        (block, start, end)
    })
}

/// How many blocks a file has at least, for it has a checksum of the last of them.
///
/// # Errors
/// If the checksums cannot be looked up.
pub fn extent(sums: &impl Sums) -> Result<u64, BackupError> {
    let (mut blocks, mut next) = (0, 0);
    while let Some(number) = sums.next_row(next)? {
        if let Some(row) = sums.row(number)? {
            let known = u64::from(u64::BITS - row.known.leading_zeros());
            blocks = if known > 0 { number * ROW_BLOCKS + known } else { blocks };
        }
        next = number + 1;
    }
    Ok(blocks)
}

/// The checksum of a block as the file has it.
fn read_sum(
    object: ObjectId,
    file: &File,
    block: u64,
    size: u64,
    buffer: &mut Vec<u8>,
) -> Result<u32, BackupError> {
    let (start, end) = range(block, size);
    let len = (end - start) as usize;
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    let buffer = &mut buffer[..len];
    file.read_exact_at(buffer, start).map_err(BackupError::io("read object", object.to_string()))?;
    Ok(crc32c::crc32c(buffer))
}

/// The checksum of a block of zeros.
fn zero_sum(block: u64, size: u64) -> u32 {
    static ZEROS: [u8; BLOCK] = [0; BLOCK];
    let (start, end) = range(block, size);
    crc32c::crc32c(&ZEROS[..(end - start) as usize])
}

/// The checksums of one file, as the index has them.
pub trait Sums {
    /// A row.
    ///
    /// # Errors
    /// If it cannot be looked up.
    fn row(&self, row: u64) -> Result<Option<SumRow>, BackupError>;
    /// The first row at or after this one.
    ///
    /// # Errors
    /// If it cannot be looked up.
    fn next_row(&self, row: u64) -> Result<Option<u64>, BackupError>;
}
