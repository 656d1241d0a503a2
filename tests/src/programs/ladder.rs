//! Many processes at full speed, with calls of every sort that the ladder of the capture treats apart: small
//! writes, larger ones, and names. Later they become slow.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use super::{Place, Program, fork_writers, read_optional, workload};

/// How many processes.
pub const WRITERS: usize = 64;
/// Bytes of a small write, which begins with its number.
const SMALL: usize = 128;
/// So many of the last small writes stand in the file of a writer.
const SLOTS: u64 = 256;
/// Where they begin: before them stands the number of the last one.
const SLOTS_AT: u64 = 4096;
/// Bytes of a larger write: more than are copied by a probe.
const LARGE: u64 = 4096;
const LARGE_AT: u64 = SLOTS_AT + SLOTS * SMALL as u64;
/// Larger writes go round here.
const LARGE_SLOTS: u64 = 16;
/// Steps between two looks at what is asked for.
const STEPS: u64 = 16;

/// See the module.
pub struct Ladder;

impl Ladder {
    /// Makes the writers slow.
    ///
    /// # Errors
    /// When the file that says so cannot be made.
    pub fn slow_down(place: &Place) -> Result<()> {
        Ok(fs::write(slow(place), "")?)
    }
}

fn slow(place: &Place) -> PathBuf {
    place.aux.join("slow")
}

fn file_of(tree: &Path, writer: usize) -> PathBuf {
    tree.join(format!("writer-{writer}"))
}

fn number_at(bytes: &[u8], at: u64) -> u64 {
    let there = bytes.get(at as usize..).and_then(|b| b.first_chunk());
    there.map_or(0, |number| u64::from_le_bytes(*number))
}

fn slot(number: u64) -> u64 {
    SLOTS_AT + number % SLOTS * SMALL as u64
}

impl Program for Ladder {
    fn name(&self) -> &'static str {
        "ladder"
    }

    fn command(&self, place: &Place) -> Vec<String> {
        workload(self.name(), place)
    }

    /// Each writer has gone round once.
    fn half_way(&self, place: &Place) -> bool {
        let number = |writer| read_optional(&file_of(&place.data, writer)).map_or(0, |b| number_at(&b, 0));
        (0..WRITERS).all(|writer| number(writer) > SLOTS)
    }

    /// Small writes that were done.
    fn progress(&self, tree: &Path) -> Result<u64> {
        (0..WRITERS).map(|writer| Ok(number_at(&read_optional(&file_of(tree, writer))?, 0))).sum()
    }

    /// Each file holds the last writes up to some moment, without a gap.
    fn check(&self, tree: &Path, _: &Place) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        for writer in 0..WRITERS {
            let bytes = read_optional(&file_of(tree, writer))?;
            let last = number_at(&bytes, 0);
            // The next one may be there already, in the place of the oldest.
            for number in last.saturating_sub(SLOTS - 2).max(1)..=last {
                let found = number_at(&bytes, slot(number));
                if found != number {
                    wrong.push(format!("writer {writer}, at {last}: {found} where {number} belongs"));
                }
            }
            let next = number_at(&bytes, slot(last + 1));
            if next > last + 1 {
                wrong.push(format!("writer {writer}: {next} was written, but {last} is the last one"));
            }
        }
        wrong.truncate(20);
        Ok(wrong)
    }
}

/// The parent (no `writer`) or one writer.
///
/// # Errors
/// A call that failed.
pub fn run(place: &Place, writer: Option<usize>) -> Result<()> {
    let Some(writer) = writer else { return fork_writers(Ladder.name(), place, WRITERS) };
    let file =
        OpenOptions::new().create(true).truncate(false).write(true).open(file_of(&place.data, writer))?;
    let names = ["new", "kept"].map(|name| place.data.join(format!("{name}-{writer}")));
    let mut number = 0u64;
    let mut is_slow = false;
    while !place.stopping() {
        is_slow = is_slow || slow(place).exists();
        for _ in 0..STEPS {
            number += 1;
            let mut line = [b'.'; SMALL];
            line[..8].copy_from_slice(&number.to_le_bytes());
            file.write_all_at(&line, slot(number))?;
            file.write_all_at(&line[..8], 0)?;
            if is_slow {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        let at = number / STEPS % LARGE_SLOTS * LARGE;
        file.write_all_at(&[number as u8; LARGE as usize], LARGE_AT + at)?;
        File::create(&names[0])?.write_all_at(&number.to_le_bytes(), 0)?;
        fs::rename(&names[0], &names[1])?;
    }
    Ok(())
}
