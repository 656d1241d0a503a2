//! Programs that change files by asynchronous operations: io_uring in several forms, and AIO.
//!
//! They work in rounds. A round writes one slot of `blocks` in eight pieces that are in flight
//! together, appends a line to `lines`, and (with a ring) makes a directory by every operation that
//! takes paths; then it appends its number to `marks`. So a checkpoint with n marks holds everything
//! of the last rounds up to n, and of round n + 1 any part, in places that no other round uses.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::{Place, Program, read_optional, size_optional, workload};

mod aio;
mod ring;

/// How the operations are handed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// A ring, entered by the program.
    Ring,
    /// A ring that a thread of the kernel polls (`IORING_SETUP_SQPOLL`).
    Polled,
    /// A ring whose successes are not told (`IOSQE_CQE_SKIP_SUCCESS`).
    Silent,
    /// Direct I/O on a ring whose completions are polled for, where the file system can do that
    /// (`IORING_SETUP_IOPOLL`).
    Direct,
    /// AIO with direct I/O; completions are taken from the mapped ring, without a call.
    Aio,
    /// AIO through the page cache.
    AioBuffered,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Ring, Self::Polled, Self::Silent, Self::Direct, Self::Aio, Self::AioBuffered];
}

/// See the module.
pub struct Requests(pub Mode);

/// Slots in `blocks`; round r writes slot r % SLOTS.
const SLOTS: u64 = 64;
/// Directories; round r makes directory r % DIRECTORIES, after it removed what was there.
const DIRECTORIES: u64 = 8;
/// Pieces of a slot.
const PIECES: usize = 8;
/// Bytes of a piece: what direct I/O can write on every file system.
const PIECE: usize = 4096;

impl Program for Requests {
    fn name(&self) -> &'static str {
        match self.0 {
            Mode::Ring => "requests-ring",
            Mode::Polled => "requests-polled",
            Mode::Silent => "requests-silent",
            Mode::Direct => "requests-direct",
            Mode::Aio => "requests-aio",
            Mode::AioBuffered => "requests-aio-buffered",
        }
    }

    fn command(&self, place: &Place) -> Vec<String> {
        workload(self.name(), place)
    }

    fn progress(&self, tree: &Path) -> Result<u64> {
        Ok(size_optional(&tree.join("marks"))? / 8)
    }

    fn check(&self, tree: &Path, _: &Place) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        let marks = read_optional(&tree.join("marks"))?;
        let last = marks.len() as u64 / 8;
        if marks != (1..=last).flat_map(u64::to_le_bytes).collect::<Vec<_>>() {
            wrong.push(format!("the {last} marks are not 1 to {last}"));
        }
        let blocks = read_optional(&tree.join("blocks"))?;
        // The slot of round last + 1 may hold a part of it.
        for round in last.saturating_sub(SLOTS - 2).max(1)..=last {
            let at = (round % SLOTS) as usize * PIECES * PIECE;
            for piece in 0..PIECES {
                let found = blocks.get(at + piece * PIECE..at + (piece + 1) * PIECE);
                if found != Some(&bytes_of(round, piece)[..]) {
                    let found = found.map(|b| u64::from_le_bytes(b[..8].try_into().expect("8 bytes")));
                    wrong.push(format!("piece {piece} of round {round}: {found:?} (last round {last})"));
                }
            }
        }
        let lines = read_optional(&tree.join("lines"))?;
        let expected: Vec<u8> = (1..=lines.len() as u64 / 8).flat_map(u64::to_le_bytes).collect();
        if lines != expected || !(last..=last + 1).contains(&(lines.len() as u64 / 8)) {
            wrong.push(format!("{} bytes of lines after {last} rounds", lines.len()));
        }
        if !matches!(self.0, Mode::Aio | Mode::AioBuffered) {
            for round in last.saturating_sub(DIRECTORIES - 2).max(1)..=last {
                ring::check(tree, round, &mut wrong)?;
            }
        }
        wrong.truncate(20);
        Ok(wrong)
    }
}

/// The bytes of a piece of a round.
fn bytes_of(round: u64, piece: usize) -> Vec<u8> {
    let mut bytes = round.to_le_bytes().repeat(PIECE / 8);
    bytes[8] = piece as u8;
    bytes
}

/// Memory that direct I/O takes.
struct Aligned(Vec<u8>, usize);

impl Aligned {
    fn new(len: usize) -> Self {
        let memory = vec![0; len + PIECE];
        let start = memory.as_ptr().align_offset(PIECE);
        Self(memory, start)
    }

    fn bytes(&mut self) -> &mut [u8] {
        let (start, len) = (self.1, self.0.len() - PIECE);
        &mut self.0[start..start + len]
    }
}

/// The files that every mode has.
struct Files {
    blocks: File,
    lines: File,
    marks: File,
    /// The pieces of the round.
    memory: Aligned,
}

/// Opens them; `direct`: `blocks` without the page cache.
fn open(place: &Place, direct: bool) -> Result<Files> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).read(true).write(true);
    let name = |name: &str| place.data.join(name);
    let blocks = options
        .clone()
        .custom_flags(if direct { libc::O_DIRECT } else { 0 })
        .open(name("blocks"))
        .context("blocks")?;
    let lines = OpenOptions::new().create(true).append(true).open(name("lines")).context("lines")?;
    let marks = OpenOptions::new().create(true).append(true).open(name("marks")).context("marks")?;
    Ok(Files { blocks, lines, marks, memory: Aligned::new(PIECES * PIECE) })
}

impl Files {
    fn fill(&mut self, round: u64) {
        for (piece, bytes) in self.memory.bytes().chunks_mut(PIECE).enumerate() {
            bytes.copy_from_slice(&bytes_of(round, piece));
        }
    }
}

/// Works until it is told to stop.
///
/// # Errors
/// An operation that failed.
pub fn run(place: &Place, name: &str) -> Result<()> {
    let mode = Mode::ALL.into_iter().find(|m| Requests(*m).name() == name).context("no such mode")?;
    let files = open(place, matches!(mode, Mode::Direct | Mode::Aio))?;
    match mode {
        Mode::Aio | Mode::AioBuffered => rounds(place, files, aio::round),
        _ => {
            let mut rings = ring::Rings::new(place, mode, &files)?;
            rounds(place, files, move |files, round| rings.round(files, round))
        }
    }
}

fn rounds(
    place: &Place,
    mut files: Files,
    mut work: impl FnMut(&mut Files, u64) -> Result<()>,
) -> Result<()> {
    place.ready()?;
    let mut round = 0u64;
    while !place.stopping() {
        round += 1;
        files.fill(round);
        work(&mut files, round).with_context(|| format!("round {round}"))?;
        files.marks.write_all(&round.to_le_bytes())?;
        ensure!(files.marks.as_raw_fd() >= 0, "the marks are open");
        // So much that files do not grow without end while the machine is busy.
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_sees_a_missing_piece_and_a_missing_line() {
        let tree = tempfile::tempdir().unwrap();
        let place = Place { data: tree.path().into(), aux: tree.path().into() };
        let mut files = open(&place, false).unwrap();
        for round in 1..=3u64 {
            files.fill(round);
            let at = (round % SLOTS) * (PIECES * PIECE) as u64;
            std::os::unix::fs::FileExt::write_all_at(&files.blocks, files.memory.bytes(), at).unwrap();
            files.lines.write_all(&round.to_le_bytes()).unwrap();
            files.marks.write_all(&round.to_le_bytes()).unwrap();
        }
        let program = Requests(Mode::Aio);
        assert_eq!(program.check(tree.path(), &place).unwrap(), Vec::<String>::new());
        std::os::unix::fs::FileExt::write_all_at(&files.blocks, b"x", 2 * (PIECES * PIECE) as u64).unwrap();
        assert_eq!(program.check(tree.path(), &place).unwrap().len(), 1);
        files.lines.set_len(16).unwrap();
        assert_eq!(program.check(tree.path(), &place).unwrap().len(), 2);
    }
}
