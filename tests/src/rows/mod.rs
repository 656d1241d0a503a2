//! The rows of docs/write-paths.md that are calls of a program: each performs one way to change a
//! file, and the comparison says whether the backup has it.
//!
//! A row is a function that works in a directory of its own and pauses where a checkpoint is to be
//! taken and compared. Every row runs in a process of its own, so it may change its user, its root,
//! its filters, or die of them. [`driver`] is the program that starts them; the test answers its
//! pauses ([`session`]). [`table`] reads docs/write-paths.md.
//!
//! What a row makes before its first pause is made by all rows before one common checkpoint: after it
//! the stream has these files exactly, so what the row does next must be captured for what it is.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

mod attributes;
mod data;
pub mod driver;
mod names;
mod paths;
pub mod session;
mod special;
pub mod sys;
pub mod table;

/// A way to change a file.
pub struct Row {
    /// Its name in docs/write-paths.md, and of its directory.
    pub name: &'static str,
    /// Does it.
    pub run: fn(&At) -> io::Result<()>,
    /// File systems that refuse the call, as its own errno says.
    pub refused_by: &'static [&'static str],
    /// The kernel from which on they do not.
    pub refused_before: Option<(u32, u32)>,
    /// Whether it makes everything suspect (and so would hide what the others miss).
    pub everything: bool,
    /// How many records it may cost from its first pause on.
    pub records_max: u64,
}

impl Row {
    /// A row that every file system can do.
    const fn new(name: &'static str, run: fn(&At) -> io::Result<()>) -> Self {
        Self { name, run, refused_by: &[], refused_before: None, everything: false, records_max: u64::MAX }
    }

    /// These file systems may refuse the call.
    const fn refused_by(self, file_systems: &'static [&'static str]) -> Self {
        Self { refused_by: file_systems, ..self }
    }

    /// Only before this kernel.
    const fn before(self, major: u32, minor: u32) -> Self {
        Self { refused_before: Some((major, minor)), ..self }
    }

    /// Whether this file system may refuse the call on this kernel.
    #[must_use]
    pub fn may_be_refused_by(&self, file_system: &str) -> bool {
        self.refused_by.contains(&file_system) && self.refused_before.is_none_or(|since| kernel() < since)
    }

    /// It may cost so many records.
    const fn records_max(self, records_max: u64) -> Self {
        Self { records_max, ..self }
    }

    /// Everything becomes suspect by it.
    const fn everything(self) -> Self {
        Self { everything: true, ..self }
    }
}

/// Major and minor version of the running kernel.
fn kernel() -> (u32, u32) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("procfs");
    let mut numbers = release.split('.').map(|part| part.parse().expect("a number"));
    (numbers.next().expect("major"), numbers.next().expect("minor"))
}

/// All rows, in the order in which they are done.
#[must_use]
pub fn all() -> Vec<&'static Row> {
    [data::ROWS, names::ROWS, attributes::ROWS, special::ROWS, paths::ROWS].concat().into_iter().collect()
}

/// Where a row works, and how it pauses.
pub struct At {
    /// Its directory, in scope. Empty at first.
    pub dir: PathBuf,
    /// Its directory on another file system, out of scope.
    pub outside: PathBuf,
    /// A directory of the same file system, out of scope.
    pub beside: PathBuf,
    pauses: UnixStream,
}

impl At {
    /// A checkpoint is taken and compared; returns when that is done.
    ///
    /// # Errors
    /// When the driver is gone.
    pub fn pause(&self) -> io::Result<()> {
        let mut pauses = &self.pauses;
        pauses.write_all(b"p")?;
        pauses.read_exact(&mut [0])
    }

    /// A path in the row's directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A file of `len` bytes that are not zeros and differ from page to page, open for everything.
    ///
    /// # Errors
    /// What the system says.
    pub fn file(&self, name: &str, len: usize) -> io::Result<File> {
        let path = self.path(name);
        fs::write(&path, pattern(len, 1))?;
        File::options().read(true).write(true).open(path)
    }
}

/// Bytes that are not zeros and repeat only after 251 pieces of 64.
#[must_use]
pub fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| ((i / 64 + usize::from(seed) * 7) % 251) as u8 + 1).collect()
}

fn make_dir(path: &Path) -> io::Result<PathBuf> {
    fs::create_dir(path)?;
    Ok(path.to_owned())
}
