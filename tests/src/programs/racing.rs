//! A program whose second thread changes the buffer while it is written.
//!
//! What the file got is known only from the file. The program reads each block back and writes its
//! checksum to a second file: so a checker knows for every checkpoint, also one that stopped nobody,
//! which bytes must be there.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use anyhow::Result;

use super::{Place, Program, read_optional, workload};

/// Writes made at least.
pub const WRITES_MIN: u64 = 100_000;
/// Blocks in the file; then the first is written over.
const SLOTS: u64 = 20_000;
const BLOCK: usize = 256;
/// Number and checksum.
const SUM: usize = 16;

/// See the module.
pub struct RacingBuffer;

impl Program for RacingBuffer {
    fn name(&self) -> &'static str {
        "racing-buffer"
    }

    fn command(&self, place: &Place) -> Vec<String> {
        workload(self.name(), place)
    }

    fn progress(&self, tree: &Path) -> Result<u64> {
        let sums = read_optional(&tree.join("sums"))?;
        Ok(sums.chunks_exact(SUM).map(|sum| u64_at(sum, 0)).max().unwrap_or(0))
    }

    fn check(&self, tree: &Path, _: &Place) -> Result<Vec<String>> {
        let blocks = read_optional(&tree.join("blocks"))?;
        let sums = read_optional(&tree.join("sums"))?;
        Ok(check(&blocks, &sums))
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

fn check(blocks: &[u8], sums: &[u8]) -> Vec<String> {
    let mut wrong = Vec::new();
    if !blocks.len().is_multiple_of(BLOCK) || !sums.len().is_multiple_of(SUM) {
        return vec![format!("torn: {} bytes of blocks, {} of sums", blocks.len(), sums.len())];
    }
    let numbers: Vec<u64> = blocks.chunks(BLOCK).map(|block| u64_at(block, 0)).collect();
    let summed: Vec<u64> = sums.chunks(SUM).map(|sum| u64_at(sum, 0)).collect();
    let top = numbers.iter().copied().max().unwrap_or(0);
    let top_sum = summed.iter().copied().max().unwrap_or(0);
    if top_sum > top || top_sum + 1 < top {
        wrong.push(format!("the last block is {top}, the last checksum {top_sum}"));
    }
    // Slots hold the numbers top, top - 1, ... each in its place: a prefix of the writes.
    let expected = |slot: usize, top: u64| {
        let number = slot as u64 + 1;
        if number > top { 0 } else { number + (top - number) / SLOTS * SLOTS }
    };
    for (kind, found, top) in [("block", &numbers, top), ("checksum", &summed, top_sum)] {
        for (slot, number) in found.iter().enumerate() {
            if *number != expected(slot, top) {
                wrong.push(format!("{kind} {slot} has number {number}, the last is {top}"));
            }
        }
    }
    for (slot, sum) in sums.chunks(SUM).enumerate() {
        let Some(block) = blocks.chunks(BLOCK).nth(slot).filter(|b| u64_at(b, 0) == u64_at(sum, 0)) else {
            continue;
        };
        if checksum(block) != u64_at(sum, 8) {
            wrong.push(format!("block {slot}, write {}: bytes are not those in the file", u64_at(sum, 0)));
        }
    }
    wrong.truncate(20);
    wrong
}

/// FNV-1a, 64 bits.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Writes until it is told to stop, at least [`WRITES_MIN`] blocks.
///
/// # Errors
/// A write that failed.
pub fn run(place: &Place) -> Result<()> {
    let open = |name: &str| {
        OpenOptions::new().create(true).truncate(false).read(true).write(true).open(place.data.join(name))
    };
    let (blocks, sums) = (open("blocks")?, open("sums")?);
    let buffer: Arc<Vec<AtomicU8>> = Arc::new((0..BLOCK).map(|_| AtomicU8::new(0)).collect());
    let done = Arc::new(AtomicBool::new(false));
    let racer = std::thread::spawn({
        let (buffer, done) = (buffer.clone(), done.clone());
        move || {
            let mut value = 0u8;
            while !done.load(Ordering::Relaxed) {
                value = value.wrapping_add(1);
                for byte in &buffer[8..] {
                    byte.store(value, Ordering::Relaxed);
                }
            }
        }
    });
    place.ready()?;
    let mut read_back = vec![0; BLOCK];
    let mut number = 0u64;
    while number < WRITES_MIN || !place.stopping() {
        number += 1;
        let slot = (number - 1) % SLOTS;
        for (byte, value) in buffer.iter().zip(number.to_le_bytes()) {
            byte.store(value, Ordering::Relaxed);
        }
        // SAFETY: the buffer has BLOCK bytes and lives until the racer was joined; the kernel reads
        // it while it changes, which is the purpose, and atomics may be read at any time.
        let written = unsafe {
            libc::pwrite(blocks.as_raw_fd(), buffer.as_ptr().cast(), BLOCK, (slot * BLOCK as u64) as i64)
        };
        anyhow::ensure!(written == BLOCK as isize, "pwrite: {}", std::io::Error::last_os_error());
        blocks.read_exact_at(&mut read_back, slot * BLOCK as u64)?;
        let mut sum = number.to_le_bytes().to_vec();
        sum.extend(checksum(&read_back).to_le_bytes());
        sums.write_all_at(&sum, slot * SUM as u64)?;
        if number >= WRITES_MIN {
            // The rest only keeps going until the test has what it wants.
            std::thread::sleep(std::time::Duration::from_micros(100));
        }
    }
    done.store(true, Ordering::Relaxed);
    racer.join().expect("the racer does not panic");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checker_sees_a_wrong_byte_and_a_missing_write() {
        let block = |n: u64| [&n.to_le_bytes()[..], &[7; BLOCK - 8]].concat();
        let sum = |n: u64| [n.to_le_bytes(), checksum(&block(n)).to_le_bytes()].concat();
        let blocks = [block(1), block(2), block(3)].concat();
        let sums = [sum(1), sum(2)].concat();
        assert_eq!(check(&blocks, &sums), Vec::<String>::new());
        let mut flipped = blocks.clone();
        flipped[BLOCK + 20] ^= 1;
        assert_eq!(check(&flipped, &sums).len(), 1);
        let missing = [block(1), vec![0; BLOCK], block(3)].concat();
        assert!(!check(&missing, &sums).is_empty());
        assert!(!check(&blocks[..2 * BLOCK], &[sums, sum(3)].concat()).is_empty());
    }
}
