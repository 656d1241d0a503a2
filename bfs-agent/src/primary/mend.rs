//! One file whose disk lost bytes of it, brought back in place while programs work: whoever has it open, or knows it by
//! another name, has the same file as before.
//!
//! 1. [`look`], on a thread of its own: which pages cannot be read; and of these, what was captured last, from the backup.
//!    Where a sync failed, what reads is made dirty once more, without a byte of it being touched: a page that could not be
//!    written back counts as clean from then on, though the disk has not got it.
//! 2. [`rewrite`], while the selected processes stand: these bytes are written where still nobody can read any. The stream
//!    has just them, so a crash in the middle leaves no difference.
//! 3. [`sync`], on a thread: all of it is on the disk, and can be read from there.
//!
//! Where it was *asked* for ([`Mode::All`]), also what reads and is something else is written over, and size and
//! attributes are set: a disk can lose bytes without saying so.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Instant;

use bfs_common::abi;
use bfs_common::record::{FileKind, ObjectId, Sequence};
use bfs_common::wire::NewestFile;
use rustix::fs::{Advice, SeekFrom, Timespec, Timestamps, UTIME_OMIT, XattrFlags};
use rustix::io::{Errno, ReadWriteFlags};

use super::engine::interpret::CAPABILITY;
use super::ship::Connect;
use crate::generation::{Client, OpenError, ReadError};
use crate::tree;

/// What is read and written as one.
const PAGE: u64 = 4096;
/// What is looked at at once.
const WINDOW: u64 = 1 << 20;
/// Bytes that are written in one stop; when there are more, there is another one.
const AT_ONCE_MAX: u64 = 64 << 20;

/// What is to be brought back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// What cannot be read; and after an error of a write or a sync, what may not be on the disk.
    Lost {
        /// It was such an error.
        written: bool,
    },
    /// Whatever is not as it was captured last.
    All,
}

/// Why a file is not brought back.
#[derive(Debug, thiserror::Error)]
pub enum MendError {
    /// There is no connection to the backup.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The backup does not give it.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It has no such file.
    #[error("the backup does not have it yet")]
    NotThere,
    /// What is lost never came there.
    #[error("{0} bytes that cannot be read were not captured before")]
    NotCaptured(u64),
    /// The disk does not take it either.
    #[error("cannot {what} it in place: {error}")]
    Disk {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// Its end cannot be written while others may append.
    #[error(
        "needs close: its last page cannot be read, and processes that are not selected may append to it"
    )]
    NeedsClose,
    /// The time is over.
    #[error("it took longer than its time limit")]
    Late,
}

fn disk<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> MendError {
    move |error| MendError::Disk { what, error: error.into() }
}

/// Whether an error says that the disk lost something: one that the probes tell of.
fn is_of_disk(error: Errno) -> bool {
    abi::is_of_disk(-i64::from(error.raw_os_error()))
}

/// What a look found.
#[derive(Debug, Default)]
pub struct Found {
    /// The file as it was captured last, and up to which record; none if nobody had to ask for it.
    newest: Option<(Sequence, NewestFile)>,
    /// What is to be written, in order: each ends with its page, or with the file.
    pages: Vec<(u64, Vec<u8>)>,
    /// There was more than can be written at once.
    pub more: bool,
    /// Bytes that cannot be read and are beyond what was captured.
    beyond: u64,
    /// What it had for its time before it was made dirty, and after.
    touched: Option<[Timespec; 2]>,
}

impl Found {
    /// Where something is to be written.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.pages.iter().map(|(at, bytes)| *at..*at + bytes.len() as u64)
    }

    /// Whether there is anything to do with the file itself.
    #[must_use]
    pub fn is_idle(&self, mode: Mode) -> bool {
        self.pages.is_empty() && self.touched.is_none() && mode != Mode::All
    }

    /// Its size as it was captured last.
    #[must_use]
    pub fn size(&self) -> Option<u64> {
        self.newest.as_ref().map(|(_, file)| file.size)
    }
}

/// Which file it is on the backup, and since when.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The group.
    pub group: String,
    /// Its number.
    pub object: ObjectId,
    /// All up to this record counts.
    pub at_least: Sequence,
    /// Until when.
    pub limit: Instant,
}

/// See the module.
///
/// # Errors
/// [`MendError`]; no byte of the file was changed then.
pub fn look(file: &File, asked: &Asked, connect: &Connect, mode: Mode) -> Result<Found, MendError> {
    let mut found = Found::default();
    let size = file.metadata().map_err(disk("look at"))?.len();
    let lost = match mode {
        Mode::Lost { .. } => unreadable(file, size, asked.limit)?,
        Mode::All => Vec::new(),
    };
    if mode == Mode::All || !lost.is_empty() {
        let mut pages = Pages::new(file, mode, &lost);
        let mut client = Client::open(connect())?;
        let late = || io::Error::from(io::ErrorKind::TimedOut);
        let given = client.newest(&asked.group, asked.object, asked.at_least, |at, bytes| {
            if Instant::now() >= asked.limit { Err(late()) } else { pages.add(at, bytes) }
        });
        let (position, newest) = match given {
            Err(ReadError::Sink(e)) if e.kind() == io::ErrorKind::TimedOut => return Err(MendError::Late),
            other => other?,
        };
        let newest = newest.ok_or(MendError::NotThere)?;
        pages.end(newest.size).map_err(disk("read"))?;
        (found.pages, found.more) = (pages.wanted, pages.more);
        // A page that the file goes on behind has no end that is known.
        if newest.size < size && mode != Mode::All {
            let known = newest.size - newest.size % PAGE;
            found.pages.retain_mut(|(at, bytes)| {
                bytes.truncate(known.saturating_sub(*at) as usize);
                !bytes.is_empty()
            });
            found.beyond = lost.iter().map(|range| range.end.saturating_sub(range.start.max(known))).sum();
        }
        found.newest = Some((position, newest));
    }
    if Instant::now() >= asked.limit {
        return Err(MendError::Late);
    }
    if mode == (Mode::Lost { written: true }) {
        let before = time_of(file)?;
        make_dirty(file, size, &lost).map_err(disk("make dirty"))?;
        found.touched = Some([before, time_of(file)?]);
    }
    Ok(found)
}

fn time_of(file: &File) -> Result<Timespec, MendError> {
    let meta = file.metadata().map_err(disk("look at"))?;
    Ok(Timespec { tv_sec: meta.mtime(), tv_nsec: meta.mtime_nsec() as _ })
}

/// Reads what there is of a range; pages that cannot be read are named instead. Gives the end of what the file has.
fn read_pages(file: &File, start: u64, buffer: &mut [u8], lost: &mut dyn FnMut(u64)) -> io::Result<usize> {
    let mut at = 0;
    while at < buffer.len() {
        match rustix::io::pread(file, &mut buffer[at..], start + at as u64) {
            Ok(0) => break,
            Ok(read) => at += read,
            Err(Errno::INTR) => {}
            Err(error) if is_of_disk(error) => {
                let page = (start + at as u64) / PAGE * PAGE;
                lost(page);
                at = ((page + PAGE - start) as usize).min(buffer.len());
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(at)
}

/// Where a file has data, from a place on; all of the rest where it cannot tell.
fn data_from(file: &File, at: u64, size: u64) -> Range<u64> {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Err(Errno::NXIO) => size..size,
        Err(_) => at..size,
        Ok(start) => {
            let end = rustix::fs::seek(file, SeekFrom::Hole(start)).unwrap_or(size);
            start.min(size)..end.min(size)
        }
    }
}

/// The pages that cannot be read, the last one cut at the end of the file.
fn unreadable(file: &File, size: u64, limit: Instant) -> Result<Vec<Range<u64>>, MendError> {
    let mut lost: Vec<Range<u64>> = Vec::new();
    let mut buffer = vec![0; WINDOW as usize];
    let mut at = 0;
    while at < size {
        let data = data_from(file, at, size);
        at = data.start;
        while at < data.end {
            if Instant::now() >= limit {
                return Err(MendError::Late);
            }
            let window = ((data.end - at).min(WINDOW)) as usize;
            read_pages(file, at, &mut buffer[..window], &mut |page| match lost.last_mut() {
                Some(last) if last.end >= page => last.end = (page + PAGE).min(size),
                _ => lost.push(page..(page + PAGE).min(size)),
            })
            .map_err(disk("read"))?;
            at += window as u64;
        }
    }
    Ok(lost)
}

/// What was captured last, as it comes, against what the file has.
struct Pages<'a> {
    file: &'a File,
    mode: Mode,
    lost: &'a [Range<u64>],
    /// The window that comes: where it begins, and what it has so far.
    start: u64,
    window: Vec<u8>,
    wanted: Vec<(u64, Vec<u8>)>,
    bytes: u64,
    more: bool,
}

impl<'a> Pages<'a> {
    fn new(file: &'a File, mode: Mode, lost: &'a [Range<u64>]) -> Self {
        let window = vec![0; WINDOW as usize];
        Self { file, mode, lost, start: 0, window, wanted: Vec::new(), bytes: 0, more: false }
    }

    /// The next bytes that are not zeros.
    fn add(&mut self, mut at: u64, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.come_to(at)?;
            let from = (at - self.start) as usize;
            let some = bytes.len().min(WINDOW as usize - from);
            self.window[from..from + some].copy_from_slice(&bytes[..some]);
            (at, bytes) = (at + some as u64, &bytes[some..]);
        }
        Ok(())
    }

    /// Looks at the windows before the one that has this place.
    fn come_to(&mut self, at: u64) -> io::Result<()> {
        while at - self.start >= WINDOW {
            self.compare(WINDOW as usize)?;
            self.window.fill(0);
            let next = self.start + WINDOW;
            let lost = self.lost.iter().find(|range| range.end > next).map_or(u64::MAX, |range| range.start);
            let there = |place: u64| place / WINDOW * WINDOW;
            // Between them nothing is wanted, and there may be much of that.
            self.start = if self.mode == Mode::All { next } else { there(lost.min(at)).max(next) };
        }
        Ok(())
    }

    fn end(&mut self, size: u64) -> io::Result<()> {
        if size > 0 {
            self.come_to(size - 1)?;
            self.compare((size - self.start) as usize)?;
        }
        Ok(())
    }

    fn compare(&mut self, len: usize) -> io::Result<()> {
        let mut has = Vec::new();
        let mut lost = Vec::new();
        if self.mode == Mode::All {
            has.resize(len, 0);
            let end = read_pages(self.file, self.start, &mut has, &mut |page| lost.push(page))?;
            has.truncate(end);
        }
        for (index, page) in self.window[..len].chunks(PAGE as usize).enumerate() {
            let at = self.start + index as u64 * PAGE;
            let is_wanted = match self.mode {
                Mode::Lost { .. } => self.lost.iter().any(|range| range.start <= at && at < range.end),
                Mode::All => {
                    let place = index * PAGE as usize;
                    lost.contains(&at) || has.get(place..place + page.len()) != Some(page)
                }
            };
            if !is_wanted {
                continue;
            }
            if self.bytes >= AT_ONCE_MAX {
                self.more = true;
                return Ok(());
            }
            self.bytes += page.len() as u64;
            match self.wanted.last_mut() {
                Some((start, bytes)) if *start + bytes.len() as u64 == at => bytes.extend_from_slice(page),
                _ => self.wanted.push((at, page.to_vec())),
            }
        }
        Ok(())
    }
}

/// Marks all pages of the file as dirty that can be read, so that they are written once more: the fault of a store into a
/// mapping, without the store (`MADV_POPULATE_WRITE`, madvise(2)).
fn make_dirty(file: &File, size: u64, lost: &[Range<u64>]) -> io::Result<()> {
    let mut at = 0;
    while at < size {
        let data = data_from(file, at, size);
        at = data.start / PAGE * PAGE;
        while at < data.end {
            if let Some(range) = lost.iter().find(|range| range.start <= at && at < range.end) {
                at = range.end.next_multiple_of(PAGE);
                continue;
            }
            let until = lost.iter().map(|range| range.start).find(|start| *start > at).unwrap_or(u64::MAX);
            let len = (data.end.next_multiple_of(PAGE).min(until) - at).min(AT_ONCE_MAX);
            dirty_range(file, at, len as usize)?;
            at += len;
        }
        at = at.max(data.end);
    }
    Ok(())
}

fn dirty_range(file: &File, offset: u64, len: usize) -> io::Result<()> {
    // SAFETY: a new mapping at an address that the kernel chooses; it is not touched, and undone below.
    unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let fd = file.as_raw_fd();
        let start = libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, offset as _);
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let done = match libc::madvise(start, len, libc::MADV_POPULATE_WRITE) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        };
        libc::munmap(start, len);
        match done {
            // It would have been a signal: the page was cut off, or cannot be read any more. The next look tells.
            Err(e) if matches!(e.raw_os_error(), Some(libc::EFAULT | libc::EHWPOISON)) => Ok(()),
            done => done,
        }
    }
}

/// Whether a page is as it was when it was looked at: nobody has made it readable, or something else of it, since.
fn is_still(file: &File, mode: Mode, at: u64, page: &[u8]) -> io::Result<bool> {
    let mut has = [0; PAGE as usize];
    // What is not in memory the disk would be asked for, and while it tries everybody stands.
    let wait = if mode == Mode::All { ReadWriteFlags::empty() } else { ReadWriteFlags::NOWAIT };
    let mut buffer = [io::IoSliceMut::new(&mut has[..page.len()])];
    match rustix::io::preadv2(file, &mut buffer, at, wait) {
        Ok(read) if mode == Mode::All => Ok(has[..read] != *page),
        // A page that lies beyond the end was cut off.
        Ok(_) => Ok(false),
        Err(Errno::AGAIN) => Ok(true),
        Err(error) if is_of_disk(error) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// How it stands while [`rewrite`] works.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// A call changed the file since the look began.
    pub changed: bool,
    /// Processes that do not stand may write to it.
    pub others: bool,
}

/// See the module. Gives the number of bytes that were written.
///
/// # Errors
/// [`MendError`]; what was written is right even then.
pub fn rewrite(file: &File, found: &Found, mode: Mode, standing: Standing) -> Result<u64, MendError> {
    let mut value = [0; 64];
    let had = rustix::fs::fgetxattr(file, CAPABILITY, &mut value).ok();
    let mut time = time_of(file)?;
    if let Some([before, after]) = found.touched
        && time == after
        && !standing.changed
    {
        time = before;
    }
    let written = write_pages(file, found, mode, standing);
    if mode == Mode::All || found.touched.is_some() || !matches!(written, Ok(0)) {
        restore(file, found, mode, time, had.map(|len| &value[..len]))
            .map_err(disk("set the attributes of"))?;
    }
    written
}

fn write_pages(file: &File, found: &Found, mode: Mode, standing: Standing) -> Result<u64, MendError> {
    let mut size = file.metadata().map_err(disk("look at"))?.len();
    let newest = found.size().unwrap_or(size);
    if mode == Mode::All && newest != size {
        file.set_len(newest).map_err(disk("cut"))?;
        size = newest;
    }
    let mut written = 0;
    for (start, bytes) in &found.pages {
        for (page, at) in bytes.chunks(PAGE as usize).zip((*start..).step_by(PAGE as usize)) {
            if at >= size || !is_still(file, mode, at, page).map_err(disk("read"))? {
                continue;
            }
            written += page.len() as u64;
            match file.write_all_at(page, at) {
                Ok(()) => continue,
                Err(error) if page.len() as u64 == PAGE => return Err(disk("write")(error)),
                Err(_) => {}
            }
            // What is written to a part of a page the file system joins with the rest, which it cannot read. So for a
            // moment the file has a whole page more or less: that nobody may see who writes where it ends.
            if standing.others {
                return Err(MendError::NeedsClose);
            }
            let mut whole = [0; PAGE as usize];
            whole[..page.len()].copy_from_slice(page);
            file.write_all_at(&whole, at).map_err(disk("write"))?;
            file.set_len(size).map_err(disk("cut"))?;
        }
    }
    if found.beyond > 0 { Err(MendError::NotCaptured(found.beyond)) } else { Ok(written) }
}

/// Attributes as they were: that bytes came back is no change.
fn restore(
    file: &File,
    found: &Found,
    mode: Mode,
    time: Timespec,
    capability: Option<&[u8]>,
) -> io::Result<()> {
    if let (Mode::All, Some((_, newest))) = (mode, &found.newest) {
        return tree::set_attributes(file.as_fd(), FileKind::Regular, &newest.meta, &newest.xattrs);
    }
    if let Some(value) = capability {
        rustix::fs::fsetxattr(file, CAPABILITY, value, XattrFlags::empty())?;
    }
    let last_access = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
    Ok(rustix::fs::futimens(file, &Timestamps { last_access, last_modification: time })?)
}

/// See the module.
///
/// # Errors
/// [`MendError`]: the disk does not keep it.
pub fn sync(file: &File, found: &Found, limit: Instant) -> Result<(), MendError> {
    file.sync_all().map_err(disk("sync"))?;
    let mut buffer = vec![0; WINDOW as usize];
    for range in found.ranges() {
        let len = std::num::NonZeroU64::new(range.end - range.start);
        // Not from memory, as far as nobody holds it there.
        rustix::fs::fadvise(file, range.start, len, Advice::DontNeed).map_err(disk("look at"))?;
        let mut at = range.start;
        while at < range.end {
            if Instant::now() >= limit {
                return Err(MendError::Late);
            }
            let some = (range.end - at).min(WINDOW) as usize;
            let mut lost = false;
            read_pages(file, at, &mut buffer[..some], &mut |_| lost = true).map_err(disk("read"))?;
            if lost {
                return Err(disk("read")(Errno::IO));
            }
            at += some as u64;
        }
    }
    Ok(())
}
