//! A program with much memory, of which it changes a page with each number that it counts; it knows what each page
//! has to hold, and looks. Its log is that of the programs in [`crate::processes`].

use std::fs::OpenOptions;
use std::io::Write;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::Place;

/// Bytes of a page.
const PAGE: usize = 4096;
/// Numbers in a page.
const NUMBERS: usize = PAGE / 8;

/// Counts in `place.data/log` until it is told to stop, with so many MiB.
///
/// # Errors
/// What a call met, or that memory does not hold what it should.
pub fn run(place: &Place, mib: usize) -> Result<()> {
    let pages = (mib << 20) / PAGE;
    ensure!(pages > 0, "there has to be memory");
    let mut memory: Vec<u64> = (0..pages * NUMBERS).map(base).collect();
    let mut log = OpenOptions::new().append(true).create(true).open(place.data.join("log"))?;
    place.ready()?;
    let (mut count, mut total) = (0_u64, 0_u64);
    while !place.stopping() {
        count += 1;
        total += count;
        memory[count as usize % pages * NUMBERS] = count;
        writeln!(log, "{count} {total}")?;
        check(&memory, pages, count, (count as usize).wrapping_mul(7_919) % pages)?;
        std::thread::sleep(Duration::from_millis(1));
    }
    (0..pages).try_for_each(|page| check(&memory, pages, count, page))
}

/// What stands at a place from the beginning.
fn base(at: usize) -> u64 {
    (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 << 63
}

/// A page begins with the last number that fell on it, and else has what it had.
fn check(memory: &[u64], pages: usize, count: u64, page: usize) -> Result<()> {
    let behind = (count as usize % pages + pages - page) % pages;
    let last = (count as usize).checked_sub(behind).filter(|last| *last > 0);
    let at = page * NUMBERS;
    let first = last.map_or_else(|| base(at), |last| last as u64);
    let rest = (at + 1..at + NUMBERS).all(|at| memory[at] == base(at));
    ensure!(memory[at] == first && rest, "page {page} has {} at {count}, not {first}", memory[at]);
    Ok(())
}
