//! What the rows work with: the talk with the test, mappings, children.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use super::PAGE;

pub(super) struct Stage {
    pub(super) talk: BufReader<UnixStream>,
    pub(super) row: &'static str,
    pub(super) data: PathBuf,
    pub(super) aux: PathBuf,
}

impl Stage {
    pub(super) fn say(&mut self, quiet: bool, what: &str) -> Result<()> {
        let line = format!("{}|{}: {what}\n", if quiet { "quiet" } else { "open" }, self.row);
        self.talk.get_mut().write_all(line.as_bytes())?;
        let mut answer = String::new();
        ensure!(self.talk.read_line(&mut answer)? > 0, "the test is gone");
        Ok(())
    }

    /// A step whose checkpoint may need a stop.
    pub(super) fn step(&mut self, what: &str) -> Result<()> {
        self.say(false, what)
    }

    /// A step after which nobody maps anything.
    pub(super) fn quiet(&mut self, what: &str) -> Result<()> {
        self.say(true, what)
    }

    pub(super) fn path(&self) -> PathBuf {
        self.data.join(self.row)
    }

    /// The file of the row, with bytes in it that are on the disk.
    pub(super) fn file(&self, pages: usize) -> Result<File> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(self.path())?;
        file.write_all_at(&vec![b'z'; pages * PAGE], 0)?;
        file.sync_all()?;
        Ok(file)
    }

    /// A file outside with bytes to read.
    pub(super) fn source(&self, byte: u8) -> Result<PathBuf> {
        let path = self.aux.join("source");
        fs::write(&path, vec![byte; 4 * PAGE])?;
        File::open(&path)?.sync_all()?;
        Ok(path)
    }
}

/// A mapping, gone at the end of the row.
pub(super) struct Map {
    pub(super) start: *mut u8,
    pub(super) len: usize,
}

impl Map {
    pub(super) fn new(file: &File, pages: usize, prot: i32, flags: i32) -> Result<Self> {
        let len = pages * PAGE;
        // SAFETY: a new mapping, wherever the kernel likes.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED | flags, file.as_raw_fd(), 0)
        };
        ensure!(start != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Ok(Self { start: start.cast(), len })
    }

    pub(super) fn at(&self, page: usize) -> *mut u8 {
        assert!(page * PAGE < self.len);
        self.start.wrapping_add(page * PAGE)
    }

    pub(super) fn store(&self, page: usize, byte: u8) {
        for i in 0..16 {
            // SAFETY: within the mapping, which is writable when this is called.
            unsafe { self.at(page).add(i * 100).write_volatile(byte) };
        }
    }

    pub(super) fn load(&self, page: usize) -> u8 {
        // SAFETY: within the mapping.
        unsafe { self.at(page).read_volatile() }
    }

    pub(super) fn sync(&self, flags: i32) -> Result<()> {
        // SAFETY: the mapping's own range.
        ok(unsafe { libc::msync(self.start.cast(), self.len, flags) }, "msync").map(drop)
    }

    pub(super) fn advise(&self, page: usize, pages: usize, advice: i32) -> Result<()> {
        // SAFETY: within the mapping, which holds nothing that this program relies on.
        ok(unsafe { libc::madvise(self.at(page).cast(), pages * PAGE, advice) }, "madvise").map(drop)
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping's own range, which nobody uses after this.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

pub(super) fn ok(result: i32, what: &str) -> Result<i32> {
    ensure!(result >= 0, "{what}: {}", std::io::Error::last_os_error());
    Ok(result)
}

/// A child that does one thing after the other: whenever it is told to, it says when it is done.
pub(super) struct Child {
    pub(super) pid: i32,
    pub(super) talk: UnixStream,
}

impl Child {
    pub(super) fn new(acts: &[&dyn Fn()]) -> Result<Self> {
        let (mut ours, mut theirs) = UnixStream::pair()?;
        // SAFETY: this program has one thread; the child only does what is given and ends.
        let pid = ok(unsafe { libc::fork() }, "fork")?;
        if pid == 0 {
            drop(ours);
            for act in acts {
                let mut byte = [0];
                if std::io::Read::read(&mut theirs, &mut byte).ok() != Some(1) {
                    break;
                }
                act();
                let _ = theirs.write_all(b"x");
            }
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(0) };
        }
        let _ = &mut ours;
        Ok(Self { pid, talk: ours })
    }

    pub(super) fn act(&mut self) -> Result<()> {
        self.talk.write_all(b"x")?;
        std::io::Read::read_exact(&mut self.talk, &mut [0]).context("the child is gone")
    }

    pub(super) fn end(self) -> Result<()> {
        drop(self.talk);
        // SAFETY: waits for our own child.
        ok(unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), 0) }, "waitpid").map(drop)
    }
}
