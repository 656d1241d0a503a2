//! Processes that append numbered lines, each to a file of its own and all to one shared file.
//!
//! A writer sees another's operation as soon as the size of its file says so, which may be before
//! the other's call has returned: the sharpest test of a cut.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;

use anyhow::Result;

use super::{Place, Program, fork_writers, read_optional, workload};
use crate::ledger::{self, Operation};

/// How many writers.
pub const WRITERS: usize = 3;
const LINE: usize = 64;

/// See the module.
pub struct AppendWriters;

impl Program for AppendWriters {
    fn name(&self) -> &'static str {
        "append-writers"
    }

    fn command(&self, place: &Place) -> Vec<String> {
        workload(self.name(), place)
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
pub fn run(place: &Place, writer: Option<usize>) -> Result<()> {
    let Some(writer) = writer else { return fork_writers("append-writers", place, WRITERS) };
    let appending = |name: &str| OpenOptions::new().create(true).append(true).open(place.data.join(name));
    let mut own = appending(&format!("own-{writer}"))?;
    let mut shared = appending("shared")?;
    let mut others =
        (0..WRITERS).map(|w| appending(&format!("own-{w}"))).collect::<Result<Vec<File>, _>>()?;
    let mut number = 0;
    while !place.stopping() {
        for _ in 0..5 {
            number += 1;
            let mut seen = vec![0; WRITERS];
            for (other, file) in others.iter_mut().enumerate() {
                seen[other] = file.metadata()?.len() / LINE as u64;
            }
            own.write_all(ledger::line(&Operation { number, seen }, LINE).as_bytes())?;
            let text = format!("{writer} {number}");
            shared.write_all(format!("{text:<width$}\n", width = LINE - 1).as_bytes())?;
        }
        // Keeps the files of a long run small enough to be compared 20 times.
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    Ok(())
}
