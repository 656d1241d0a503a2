//! Processes that append numbered lines, each to a file of its own and all to one shared file.
//!
//! A writer sees another's operation as soon as the size of its file says so, which may be before
//! the other's call has returned: the sharpest test of a cut.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::{Place, Program, fork_writers, read_optional, size_optional, workload};
use crate::ledger::{self, Operation};

/// How many writers.
pub const WRITERS: usize = 3;
const LINE: usize = 64;

/// How fast they write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// A few lines a millisecond, so that files stay small enough to be compared often.
    Steady,
    /// Thousands of lines at full speed, then a rest: more at once than a small ring holds.
    Bursts,
}

impl Pace {
    const fn name(self) -> &'static str {
        match self {
            Self::Steady => "append-writers",
            Self::Bursts => "append-bursts",
        }
    }

    /// Lines without a rest, and the rest.
    const fn rhythm(self) -> (usize, Duration) {
        match self {
            Self::Steady => (5, Duration::from_millis(1)),
            Self::Bursts => (3000, Duration::from_millis(150)),
        }
    }
}

/// See the module.
pub struct AppendWriters;

/// The same in bursts.
pub struct AppendBursts;

/// Whether each writer has written at least so many bytes.
fn has_each(place: &Place, bytes: u64) -> bool {
    let long =
        |writer| size_optional(&place.data.join(format!("own-{writer}"))).is_ok_and(|size| size >= bytes);
    (0..WRITERS).all(long)
}

impl Program for AppendBursts {
    fn name(&self) -> &'static str {
        Pace::Bursts.name()
    }

    fn command(&self, place: &Place) -> Vec<String> {
        workload(self.name(), place)
    }

    /// All writers have written for a while, so each has seen much of the others.
    fn half_way(&self, place: &Place) -> bool {
        has_each(place, 32 << 10)
    }

    fn progress(&self, tree: &Path) -> Result<u64> {
        AppendWriters.progress(tree)
    }

    fn check(&self, tree: &Path, place: &Place) -> Result<Vec<String>> {
        AppendWriters.check(tree, place)
    }
}

impl Program for AppendWriters {
    fn name(&self) -> &'static str {
        Pace::Steady.name()
    }

    fn command(&self, place: &Place) -> Vec<String> {
        workload(self.name(), place)
    }

    /// Every writer has begun.
    fn half_way(&self, place: &Place) -> bool {
        has_each(place, 2 * LINE as u64)
    }

    fn progress(&self, tree: &Path) -> Result<u64> {
        (0..WRITERS).map(|writer| size_optional(&tree.join(format!("own-{writer}")))).sum()
    }

    fn check(&self, tree: &Path, _: &Place) -> Result<Vec<String>> {
        let mut own = Vec::new();
        for writer in 0..WRITERS {
            match ledger::parse(&read_optional(&tree.join(format!("own-{writer}")))?, LINE) {
                Ok(operations) => own.push(operations),
                Err(wrong) => return Ok(vec![format!("own-{writer}: {wrong}")]),
            }
        }
        let mut wrong = ledger::check(&own);
        let mut shared = vec![0; WRITERS];
        let bytes = read_optional(&tree.join("shared"))?;
        for line in bytes.chunks(LINE) {
            let text = String::from_utf8_lossy(line).into_owned();
            let parsed = text.split_once(' ').and_then(|(w, n)| {
                Some((w.parse::<usize>().ok().filter(|w| *w < WRITERS)?, n.trim().parse::<u64>().ok()?))
            });
            match parsed.filter(|_| line.len() == LINE) {
                Some((writer, number)) if number == shared[writer] + 1 => shared[writer] = number,
                _ => wrong.push(format!("shared: {text:?} after {shared:?}")),
            }
        }
        for (writer, operations) in own.iter().enumerate() {
            let (own, shared) = (operations.len() as u64, shared[writer]);
            if !(shared == own || shared + 1 == own) {
                wrong.push(format!("writer {writer}: {own} lines of its own but {shared} shared ones"));
            }
        }
        wrong.truncate(20);
        Ok(wrong)
    }
}

/// The parent (no `writer`) or one writer.
///
/// # Errors
/// A write that failed.
pub fn run(place: &Place, pace: Pace, writer: Option<usize>) -> Result<()> {
    let Some(writer) = writer else { return fork_writers(pace.name(), place, WRITERS) };
    let (lines, rest) = pace.rhythm();
    let appending = |name: &str| OpenOptions::new().create(true).append(true).open(place.data.join(name));
    let mut own = appending(&format!("own-{writer}"))?;
    let mut shared = appending("shared")?;
    let mut others =
        (0..WRITERS).map(|w| appending(&format!("own-{w}"))).collect::<Result<Vec<File>, _>>()?;
    let mut number = 0;
    while !place.stopping() {
        for _ in 0..lines {
            number += 1;
            let mut seen = vec![0; WRITERS];
            for (other, file) in others.iter_mut().enumerate() {
                seen[other] = file.metadata()?.len() / LINE as u64;
            }
            own.write_all(ledger::line(&Operation { number, seen }, LINE).as_bytes())?;
            let text = format!("{writer} {number}");
            shared.write_all(format!("{text:<width$}\n", width = LINE - 1).as_bytes())?;
        }
        std::thread::sleep(rest);
    }
    Ok(())
}
