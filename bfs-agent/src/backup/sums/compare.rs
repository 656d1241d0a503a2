//! Comparing a file with its checksums: before a step builds on it, for a reader, and as a whole.

use std::fs::File;
use std::os::unix::fs::FileExt;

use bfs_common::record::ObjectId;

use super::super::apply::next_data;
use super::super::damage::Damage;
use super::super::error::BackupError;
use super::super::images::BLOCK;
use super::super::target::Content;
use super::{BLOCK_BYTES, ROW_BLOCKS, SumChange, SumRow, Sums, blocks, of_block, range, row_of, zero_sum};

/// Puts what a block had over the bytes that it has, from an offset on; false where that is not known.
pub type PutBack<'a> = &'a mut dyn FnMut(u64, &mut [u8]) -> Result<bool, BackupError>;

/// Which bytes do not fit their checksums of the blocks that a change will touch, before it is done: what it writes
/// over becomes a before-image, and what stays of a block becomes part of a new checksum. Holes cost nothing. Where the
/// change may have been begun, `put_back` puts what a block had over what it has; with false the block is not compared.
///
/// # Errors
/// If the file cannot be read or the checksums not be looked up.
pub fn look(
    sums: &impl Sums,
    object: ObjectId,
    file: &File,
    content: &Content,
    before: u64,
    buffer: &mut Vec<u8>,
    mut put_back: Option<PutBack<'_>>,
) -> Result<Damage, BackupError> {
    let failed = |error| BackupError::io("read object", object.to_string())(error);
    let mut damage = Damage::default();
    if before == 0 {
        return Ok(damage);
    }
    let whole = sums.row(0)?.is_some_and(|row| row.whole);
    let mut touched = content.lost(before);
    // A last block that gets longer.
    if content.size(before) > before && !before.is_multiple_of(BLOCK_BYTES) {
        touched.push((before - 1, before));
    }
    let mut row: Option<(u64, SumRow)> = None;
    let mut next = 0;
    for (start, end) in touched {
        next = next.max(start / BLOCK_BYTES);
        while next < blocks(end) {
            let block = next;
            next += 1;
            let number = row_of(block);
            if row.as_ref().is_none_or(|(at, _)| *at != number) {
                row = Some((number, sums.row(number)?.unwrap_or_default()));
            }
            let known = row.as_ref().and_then(|(_, row)| row.get(block));
            let Some(known) = known.or_else(|| whole.then(|| zero_sum(block, before))) else { continue };
            let (start, end) = range(block, before);
            // Where that fails, reading says why.
            let data = next_data(file, start, before).map_or(start, |(data, _)| data);
            if data >= end && put_back.is_none() {
                if known != zero_sum(block, before) {
                    damage.add(start, end);
                }
                next = after_hole(sums, block, data)?;
                continue;
            }
            // What is not there counts as zeros.
            buffer.clear();
            buffer.resize((end - start) as usize, 0);
            read_there(file, start, buffer).map_err(failed)?;
            let is_compared = put_back.as_mut().map_or(Ok(true), |put_back| put_back(start, buffer))?;
            if is_compared && crc32c::crc32c(buffer) != known {
                damage.add(start, end);
            }
        }
    }
    Ok(damage)
}

/// Reads bytes from an offset on, as many as there are.
///
/// # Errors
/// What the system says.
pub fn read_there(file: &File, at: u64, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], at + done as u64) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// What comparing a file with its checksums gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// Ranges of bytes that do not fit: offset and end, in order.
    pub bad: Vec<(u64, u64)>,
    /// What could not be read, and why.
    pub unreadable: Vec<(u64, u64, String)>,
    /// Some blocks had no checksum: these are what the file has, all of them, should nothing else be wrong.
    pub unknown: Option<SumChange>,
    /// Bytes that were read.
    pub bytes: u64,
}

/// Reads a file of this size and compares it with its checksums.
///
/// # Errors
/// If the checksums cannot be looked up.
pub fn compare(sums: &impl Sums, file: &File, size: u64) -> Result<Compared, BackupError> {
    let mut found = Compared::default();
    let whole = size == 0 || sums.row(0)?.is_some_and(|row| row.whole);
    let mut all = SumChange { fresh: true, blocks: blocks(size), ..SumChange::default() };
    let mut buffer = vec![0; BLOCK];
    let mut row: Option<(u64, SumRow)> = None;
    let mut block = 0;
    while block < blocks(size) {
        let (start, end) = range(block, size);
        let number = row_of(block);
        if row.as_ref().is_none_or(|(at, _)| *at != number) {
            row = Some((number, sums.row(number)?.unwrap_or_default()));
        }
        let known = row.as_ref().and_then(|(_, row)| row.get(block));
        let data = match next_data(file, start, size) {
            Ok((data, _)) => data,
            // Reading says what is wrong.
            Err(_) => start,
        };
        let hole = data >= end;
        let sum = if hole {
            Ok(zero_sum(block, size))
        } else {
            let buffer = &mut buffer[..(end - start) as usize];
            found.bytes += end - start;
            file.read_exact_at(buffer, start).map(|()| crc32c::crc32c(buffer))
        };
        match (sum, known) {
            (Err(error), _) => found.unreadable.push((start, end, error.to_string())),
            (Ok(sum), Some(known)) if sum != known => bad(&mut found.bad, start, end),
            (Ok(sum), None) if whole && sum != zero_sum(block, size) => bad(&mut found.bad, start, end),
            (Ok(sum), _) if !hole && !whole => all.sums.push((block, sum)),
            (Ok(_), _) => {}
        }
        block = if hole { after_hole(sums, block, data)? } else { block + 1 };
    }
    if !whole {
        found.unknown = Some(all);
    }
    Ok(found)
}

/// What comes next in a range of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Zeros, up to here.
    Zeros(u64),
    /// What is there does not fit its checksum: offset and end.
    Bad(u64, u64),
    /// A block, offset and end, and the checksum that it should have, if it has one.
    Block(u64, u64, Option<u32>),
}

/// What comes first in a range of a file that had `size` bytes when these were its checksums. In blocks of which
/// something is `written` since, a hole says nothing.
///
/// # Errors
/// If the checksums cannot be looked up.
pub fn next(
    sums: &impl Sums,
    file: &File,
    size: u64,
    wanted: std::ops::Range<u64>,
    written: impl Fn(u64, u64) -> bool,
) -> Result<Next, BackupError> {
    let block = wanted.start / BLOCK_BYTES;
    let (start, end) = range(block, size);
    // The file ends before.
    if end <= wanted.start {
        return Ok(Next::Bad(wanted.start, wanted.end));
    }
    let known = of_block(sums, block, size)?;
    // Where that fails, reading says why.
    let data = next_data(file, start, size).map_or(start, |(data, _)| data);
    if data < end || written(start, end) {
        return Ok(Next::Block(start, end, known));
    }
    if known.is_some_and(|sum| sum != zero_sum(block, size)) {
        return Ok(Next::Bad(start, end));
    }
    Ok(Next::Zeros((after_hole(sums, block, data)?.saturating_mul(BLOCK_BYTES)).min(wanted.end)))
}

/// The next block behind one in a hole, which ends at `data`, that has data or a checksum.
fn after_hole(sums: &impl Sums, block: u64, data: u64) -> Result<u64, BackupError> {
    let block = block + 1;
    let next = sums.next_row(row_of(block))?.map_or(u64::MAX, |row| (row * ROW_BLOCKS).max(block));
    Ok(next.min(data / BLOCK_BYTES).max(block))
}

fn bad(ranges: &mut Vec<(u64, u64)>, start: u64, end: u64) {
    match ranges.last_mut() {
        Some(last) if last.1 == start => last.1 = end,
        _ => ranges.push((start, end)),
    }
}
