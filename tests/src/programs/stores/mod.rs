//! Stores into shared mappings, step by step: after each step the program waits until the test has looked.
//!
//! While it waits nothing changes, so at a checkpoint the backup equals the primary. A step also says whether
//! a checkpoint must come about without a stop.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use self::stage::{Child, Map, Stage, ok};
use super::{Place, Program, workload};

mod stage;

const PAGE: usize = 4096;
/// Pages of most files.
const PAGES: usize = 32;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const MADV_POPULATE_WRITE: i32 = 23;

/// What the test says when all rows are to be done.
const ALL: &[u8] = b"all\n";

/// See the module.
pub struct Stores;

impl Stores {
    /// Where the test listens.
    #[must_use]
    pub fn socket(place: &Place) -> PathBuf {
        place.aux.join("steps")
    }
}

impl Program for Stores {
    fn name(&self) -> &'static str {
        "stores"
    }

    fn command(&self, place: &Place) -> Vec<String> {
        workload(self.name(), place)
    }

    fn check(&self, _: &Path, _: &Place) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

/// What the test sees of the program.
pub struct Steps(BufReader<UnixStream>);

/// A step that was done.
#[derive(Debug)]
pub struct Step {
    /// Its row and what was done.
    pub name: String,
    /// Nothing can change without a record by now.
    pub quiet: bool,
}

impl Steps {
    /// Waits for the program, and tells it whether to do all rows or only those where file systems differ.
    ///
    /// # Errors
    /// When it does not come.
    pub fn accept(listener: &UnixListener, all: bool) -> Result<Self> {
        let mut talk = listener.accept()?.0;
        talk.write_all(if all { ALL } else { b"some\n" })?;
        Ok(Self(BufReader::new(talk)))
    }

    /// The next step; `None` after the last.
    ///
    /// # Errors
    /// When the program ended before its last step.
    pub fn wait(&mut self) -> Result<Option<Step>> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        match line.trim_end().split_once('|') {
            Some(("end", _)) => Ok(None),
            Some((quiet, name)) => Ok(Some(Step { name: name.to_owned(), quiet: quiet == "quiet" })),
            None => bail!("the program ended before its last step"),
        }
    }

    /// Lets the program go on.
    ///
    /// # Errors
    /// When it is gone.
    pub fn go(&mut self) -> Result<()> {
        Ok(self.0.get_mut().write_all(b"\n")?)
    }
}

type Row = (&'static str, fn(&mut Stage) -> Result<()>);

/// All rows.
const ROWS: &[Row] = &[
    ("store", store),
    ("load-first", load_first),
    ("msync-sync", |s| msync(s, libc::MS_SYNC)),
    ("msync-async", |s| msync(s, libc::MS_ASYNC)),
    ("after-close", after_close),
    ("child-after-munmap", child_after_munmap),
    ("child-executes", child_executes),
    ("mremap", mremap),
    ("mprotect", mprotect),
    ("populate", populate),
    ("mlock", mlock),
    ("populate-write", populate_write),
    ("read-into", |s| read_into(s, 0)),
    ("direct-read-into", |s| read_into(s, libc::O_DIRECT)),
    ("receive-into", receive_into),
    ("process-vm-writev", process_vm_writev),
    ("proc-mem", proc_mem),
    ("ptrace", ptrace),
    ("truncate-and-extend", truncate_and_extend),
    ("write-and-store", write_and_store),
    ("large-folios", large_folios),
    ("sparse", sparse),
    ("remove", remove),
    ("remap-file-pages", remap_file_pages),
    ("userfaultfd", userfaultfd),
    ("tmpfile", tmpfile),
    ("moved-in", moved_in),
    ("mapped-again", mapped_again),
];

/// Those that depend on the file system, more than on the kind that it is of (with a device or without).
const BY_FILE_SYSTEM: [&str; 11] = [
    "store",
    "load-first",
    "msync-sync",
    "direct-read-into",
    "truncate-and-extend",
    "write-and-store",
    "large-folios",
    "sparse",
    "remove",
    "remap-file-pages",
    "userfaultfd",
];

/// Runs the rows.
///
/// # Errors
/// What failed.
pub fn run(place: &Place) -> Result<()> {
    let mut talk = BufReader::new(UnixStream::connect(Stores::socket(place))?);
    place.ready()?;
    let mut asked = String::new();
    talk.read_line(&mut asked)?;
    let mut stage = Stage { talk, row: "", data: place.data.clone(), aux: place.aux.clone() };
    let all = asked.as_bytes() == ALL;
    for (name, row) in ROWS.iter().filter(|row| all || BY_FILE_SYSTEM.contains(&row.0)) {
        stage.row = name;
        row(&mut stage).with_context(|| format!("row {name}"))?;
        stage.quiet("over")?;
        // What is left here is compared at each step.
        fs::remove_file(stage.path())?;
    }
    stage.quiet("removed")?;
    stage.talk.get_mut().write_all(b"end|\n")?;
    Ok(())
}

fn store(s: &mut Stage) -> Result<()> {
    let file = s.file(PAGES)?;
    let map = Map::new(&file, PAGES, RW, 0)?;
    s.step("mapped")?;
    map.store(5, b'1');
    s.step("first store")?;
    map.store(5, b'2');
    s.step("the same page again")?;
    map.store(0, b'3');
    map.store(31, b'3');
    s.step("other pages")?;
    drop(map);
    s.quiet("unmapped")
}

fn load_first(s: &mut Stage) -> Result<()> {
    let file = s.file(PAGES)?;
    let map = Map::new(&file, PAGES, RW, 0)?;
    let sum: u64 = (0..PAGES).map(|page| u64::from(map.load(page))).sum();
    ensure!(sum == u64::from(b'z') * PAGES as u64);
    s.step("every page was loaded")?;
    (0..PAGES).for_each(|page| map.store(page, b'1'));
    s.step("and stored")?;
    (0..PAGES).for_each(|page| map.store(page, b'2'));
    s.step("again")
}

fn msync(s: &mut Stage, flags: i32) -> Result<()> {
    let file = s.file(PAGES)?;
    let map = Map::new(&file, PAGES, RW, 0)?;
    map.store(3, b'1');
    map.sync(flags)?;
    s.step("synced")?;
    map.store(3, b'2');
    s.step("stored after that")?;
    map.store(3, b'3');
    map.sync(flags)?;
    map.store(3, b'4');
    s.step("stored, synced, stored")
}

fn after_close(s: &mut Stage) -> Result<()> {
    let file = s.file(PAGES)?;
    let map = Map::new(&file, PAGES, RW, 0)?;
    drop(file);
    map.store(7, b'1');
    s.step("stored after the close")?;
    map.store(8, b'2');
    s.step("again")
}

fn child_after_munmap(s: &mut Stage) -> Result<()> {
    let file = s.file(PAGES)?;
    let map = Map::new(&file, PAGES, RW, 0)?;
    drop(file);
    let mut child = Child::new(&[&|| map.store(1, b'1'), &|| map.store(1, b'2'), &|| map.store(9, b'3')])?;
    let (start, len) = (map.start, map.len);
    std::mem::forget(map);
    // SAFETY: the range of the mapping that was just forgotten; only the child's copy is used from here on.
    ok(unsafe { libc::munmap(start.cast(), len) }, "munmap")?;
    for step in ["the child stored", "again", "another page"] {
        child.act()?;
        s.step(step)?;
    }
    child.end()?;
    s.quiet("the child has ended")
}

fn child_executes(s: &mut Stage) -> Result<()> {
    let file = s.file(PAGES)?;
    let map = Map::new(&file, PAGES, RW, 0)?;
    let arguments = [c"sleep".as_ptr(), c"60".as_ptr(), std::ptr::null()];
    let last = || {
        map.store(2, b'2');
        // SAFETY: a list of strings that ends with a null.
        unsafe { libc::execv(c"/bin/sleep".as_ptr(), arguments.as_ptr()) };
    };
    let mut child = Child::new(&[&|| map.store(1, b'1'), &last])?;
    drop(map);
    child.act()?;
    s.step("the child stored")?;
    child.talk.write_all(b"x")?;
    // The exec closes the child's end.
    ensure!(std::io::Read::read(&mut child.talk, &mut [0])? == 0);
    s.quiet("and executed a program")?;
    // SAFETY: our own child, not waited for yet.
    ok(unsafe { libc::kill(child.pid, libc::SIGKILL) }, "kill")?;
    child.end()
}

fn mremap(s: &mut Stage) -> Result<()> {
    let file = s.file(PAGES)?;
    let mut map = Map::new(&file, PAGES / 2, RW, 0)?;
    drop(file);
    map.store(1, b'1');
    // SAFETY: the mapping's own range, which is known by its new place after this.
    let start = unsafe { libc::mremap(map.start.cast(), map.len, PAGES * PAGE, libc::MREMAP_MAYMOVE) };
    ensure!(start != libc::MAP_FAILED, "mremap: {}", std::io::Error::last_os_error());
    (map.start, map.len) = (start.cast(), PAGES * PAGE);
    map.store(30, b'2');
    s.step("moved, grown and stored")?;
    map.store(2, b'3');
    s.step("stored again")
}

fn mprotect(s: &mut Stage) -> Result<()> {
    let file = s.file(PAGES)?;
    let map = Map::new(&file, PAGES, libc::PROT_READ, 0)?;
    drop(file);
    ensure!(map.load(4) == b'z');
    s.step("mapped to read")?;
    // SAFETY: the mapping's own range.
    ok(unsafe { libc::mprotect(map.start.cast(), map.len, RW) }, "mprotect")?;
    map.store(4, b'1');
    s.step("made writable, and stored")
}

fn populate(s: &mut Stage) -> Result<()> {
    let file = s.file(PAGES)?;
    let map = Map::new(&file, PAGES, RW, libc::MAP_POPULATE)?;
    s.step("populated")?;
    (0..PAGES).for_each(|page| map.store(page, b'1'));
    s.step("stored")
}

fn mlock(s: &mut Stage) -> Result<()> {
    let file = s.file(PAGES)?;
    let map = Map::new(&file, PAGES, RW, 0)?;
    // SAFETY: the mapping's own range.
    ok(unsafe { libc::mlock(map.start.cast(), map.len) }, "mlock")?;
    s.step("locked")?;
    (0..PAGES).for_each(|page| map.store(page, b'1'));
    s.step("stored")?;
    map.store(6, b'2');
    s.step("again")
}

fn populate_write(s: &mut Stage) -> Result<()> {
    let file = s.file(PAGES)?;
    let map = Map::new(&file, PAGES, RW, 0)?;
    map.advise(0, PAGES, MADV_POPULATE_WRITE)?;
    s.step("populated for writing")?;
    (0..PAGES).for_each(|page| map.store(page, b'1'));
    s.step("stored")
}

fn read_into(s: &mut Stage, flags: i32) -> Result<()> {
    let file = s.file(PAGES)?;
    let map = Map::new(&file, PAGES, RW, 0)?;
    for (step, byte) in ["read into it", "again"].into_iter().zip(b'1'..) {
        let source = s.source(byte)?;
        // Not every file system takes O_DIRECT.
        let Ok(source) = OpenOptions::new().read(true).custom_flags(flags).open(source) else {
            return Ok(());
        };
        // SAFETY: within the mapping.
        let read = unsafe { libc::pread(source.as_raw_fd(), map.at(8).cast(), 4 * PAGE, 0) };
        ensure!(read == 4 * PAGE as isize, "pread: {}", std::io::Error::last_os_error());
        ensure!(map.load(11) == byte);
        s.step(step)?;
    }
    Ok(())
}

fn receive_into(s: &mut Stage) -> Result<()> {
    let file = s.file(PAGES)?;
    let map = Map::new(&file, PAGES, RW, 0)?;
    let (mut sender, receiver) = UnixStream::pair()?;
    for (step, byte) in ["received into it", "again"].into_iter().zip(b'1'..) {
        sender.write_all(&[byte; 2 * PAGE])?;
        // SAFETY: within the mapping.
        let got = unsafe { libc::recv(receiver.as_raw_fd(), map.at(3).cast(), 2 * PAGE, libc::MSG_WAITALL) };
        ensure!(got == 2 * PAGE as isize, "recv: {}", std::io::Error::last_os_error());
        s.step(step)?;
    }
    Ok(())
}

fn by_a_child(s: &mut Stage, write: &dyn Fn(i32, *mut u8, u8) -> bool) -> Result<()> {
    let file = s.file(PAGES)?;
    let map = Map::new(&file, PAGES, RW, 0)?;
    // SAFETY: no arguments.
    let parent = unsafe { libc::getpid() };
    let mut child = Child::new(&[
        &|| {
            write(parent, map.at(12), b'1');
        },
        &|| {
            write(parent, map.at(12), b'2');
        },
    ])?;
    for (step, byte) in ["another process wrote into it", "again"].into_iter().zip(b'1'..) {
        child.act()?;
        ensure!(map.load(12) == byte, "nothing was written");
        s.step(step)?;
    }
    child.end()
}

fn process_vm_writev(s: &mut Stage) -> Result<()> {
    by_a_child(s, &|pid, at, byte| {
        let bytes = [byte; PAGE];
        let from = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: PAGE };
        let to = libc::iovec { iov_base: at.cast(), iov_len: PAGE };
        // SAFETY: both vectors name PAGE bytes that are there.
        unsafe { libc::process_vm_writev(pid, &raw const from, 1, &raw const to, 1, 0) > 0 }
    })
}

fn proc_mem(s: &mut Stage) -> Result<()> {
    by_a_child(s, &|pid, at, byte| {
        let memory = OpenOptions::new().write(true).open(format!("/proc/{pid}/mem"));
        memory.and_then(|m| m.write_all_at(&[byte; PAGE], at.addr() as u64)).is_ok()
    })
}

fn ptrace(s: &mut Stage) -> Result<()> {
    by_a_child(s, &|pid, at, byte| {
        let nothing = std::ptr::null_mut::<libc::c_void>();
        let word = i64::from_ne_bytes([byte; 8]);
        // SAFETY: attaches to the parent, which waits, writes one word into its mapping, and lets go.
        unsafe {
            if libc::ptrace(libc::PTRACE_SEIZE, pid, nothing, nothing) < 0
                || libc::ptrace(libc::PTRACE_INTERRUPT, pid, nothing, nothing) < 0
            {
                return false;
            }
            libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL);
            let poked = libc::ptrace(libc::PTRACE_POKEDATA, pid, at, word);
            libc::ptrace(libc::PTRACE_DETACH, pid, nothing, nothing);
            poked == 0
        }
    })
}

fn truncate_and_extend(s: &mut Stage) -> Result<()> {
    let file = s.file(PAGES)?;
    let map = Map::new(&file, PAGES, RW, 0)?;
    (0..PAGES).for_each(|page| map.store(page, b'1'));
    file.set_len(4 * PAGE as u64 + 100)?;
    s.step("stored, and made shorter")?;
    file.set_len((PAGES * PAGE) as u64)?;
    map.store(4, b'2');
    map.store(20, b'2');
    s.step("made longer, and stored")?;
    map.store(20, b'3');
    s.step("stored again")
}

fn write_and_store(s: &mut Stage) -> Result<()> {
    let file = s.file(PAGES)?;
    let map = Map::new(&file, PAGES, RW, 0)?;
    for round in 0..4 {
        file.write_all_at(&[b'a' + round; 300], 2 * PAGE as u64)?;
        // SAFETY: within the mapping.
        unsafe { map.at(2).add(100).write_volatile(b'A' + round) };
        file.write_all_at(&[b'k' + round; 50], 3 * PAGE as u64)?;
        s.step("written, stored, written")?;
        // SAFETY: within the mapping.
        unsafe { map.at(3).add(20).write_volatile(b'K' + round) };
        s.step("stored over what was written")?;
        file.write_all_at(&[b'0' + round; 300], 2 * PAGE as u64)?;
        s.step("written over what was stored")?;
    }
    Ok(())
}

fn large_folios(s: &mut Stage) -> Result<()> {
    let file = s.file(1024)?;
    let map = Map::new(&file, 1024, RW, 0)?;
    map.store(5, b'1');
    s.step("one page of 4 MiB")?;
    for page in [6, 7, 100, 511, 512, 1023] {
        map.store(page, b'2');
    }
    s.step("its neighbours")?;
    map.store(101, b'3');
    s.step("one more")
}

fn sparse(s: &mut Stage) -> Result<()> {
    let file = s.file(1)?;
    let pages = 1 << 14;
    file.set_len((pages * PAGE) as u64)?;
    let map = Map::new(&file, pages, RW, 0)?;
    s.step("a file of 64 MiB with a hole")?;
    map.store(1000, b'1');
    map.store(12_000, b'1');
    s.step("stored into the hole")?;
    map.store(12_000, b'2');
    s.step("again")
}

fn remove(s: &mut Stage) -> Result<()> {
    let file = s.file(PAGES)?;
    let map = Map::new(&file, PAGES, RW, 0)?;
    map.store(10, b'1');
    s.step("stored")?;
    map.advise(10, 4, libc::MADV_REMOVE)?;
    ensure!(map.load(10) == 0);
    s.step("a hole was punched")?;
    map.store(11, b'2');
    s.step("stored into the hole")
}

/// The kernel makes further mappings of the file out of it, which no mmap(2) tells of.
fn remap_file_pages(s: &mut Stage) -> Result<()> {
    let file = s.file(PAGES)?;
    let map = Map::new(&file, PAGES, RW, 0)?;
    drop(file);
    // SAFETY: the mapping's own range; what is mapped there is only stored into.
    ok(unsafe { libc::remap_file_pages(map.at(2).cast(), 2 * PAGE, 0, 20, 0) }, "remap_file_pages")?;
    s.step("two pages are others now")?;
    map.store(2, b'1');
    map.store(3, b'1');
    s.step("stored into these")?;
    map.store(3, b'2');
    map.store(20, b'3');
    s.step("stored again, and through the first mapping")
}

/// UFFDIO_COPY puts a page into the file where none is yet. Files on a disk do not take part.
fn userfaultfd(s: &mut Stage) -> Result<()> {
    /// `linux/userfaultfd.h`: `_IOWR(0xaa, 0x3f)`, `(0xaa, 0x00)`, `(0xaa, 0x03)`.
    const API: libc::Ioctl = 0xc018_aa3f;
    const REGISTER: libc::Ioctl = 0xc020_aa00;
    const COPY: libc::Ioctl = 0xc028_aa03;
    let file = s.file(0)?;
    file.set_len((PAGES * PAGE) as u64)?;
    let map = Map::new(&file, PAGES, RW, 0)?;
    // SAFETY: no memory is handed in.
    let fault = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) } as i32;
    // SAFETY: a descriptor of our own that nobody else has.
    let fault = unsafe { File::from_raw_fd(ok(fault, "userfaultfd")?) };
    let start = map.start.addr() as u64;
    let mut api = [0xaa_u64, 0, 0];
    let mut register = [start, map.len as u64, 1, 0];
    // SAFETY: structs of the sizes that the numbers say.
    unsafe {
        ok(libc::ioctl(fault.as_raw_fd(), API, &raw mut api), "UFFDIO_API")?;
        if libc::ioctl(fault.as_raw_fd(), REGISTER, &raw mut register) < 0 {
            return Ok(());
        }
    }
    for (page, byte) in [(3_u64, b'1'), (4, b'2')] {
        let bytes = [byte; PAGE];
        let mut copy = [start + page * PAGE as u64, bytes.as_ptr().addr() as u64, PAGE as u64, 0, 0];
        // SAFETY: as above; the pages are there.
        ok(unsafe { libc::ioctl(fault.as_raw_fd(), COPY, &raw mut copy) }, "UFFDIO_COPY")?;
        s.step("a page was put there")?;
    }
    drop(map);
    s.quiet("unmapped")
}

fn tmpfile(s: &mut Stage) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).open(&s.data)?;
    file.write_all_at(&[b'z'; PAGES * PAGE], 0)?;
    let map = Map::new(&file, PAGES, RW, 0)?;
    map.store(1, b'1');
    s.step("a file without a name")?;
    let from = std::ffi::CString::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    let to = std::ffi::CString::new(s.path().into_os_string().into_encoded_bytes())?;
    // SAFETY: two strings that end with a null.
    let linked = unsafe {
        libc::linkat(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), libc::AT_SYMLINK_FOLLOW)
    };
    ok(linked, "linkat")?;
    drop(file);
    s.step("got a name")?;
    map.store(1, b'2');
    map.store(2, b'2');
    s.step("stored")
}

fn moved_in(s: &mut Stage) -> Result<()> {
    // On the same file system, outside of what is replicated.
    let outside = s.data.with_file_name("beside").join("outside");
    fs::write(&outside, [b'z'; PAGES * PAGE])?;
    let file = OpenOptions::new().read(true).write(true).open(&outside)?;
    let map = Map::new(&file, PAGES, RW, 0)?;
    map.store(1, b'1');
    s.step("mapped outside")?;
    fs::rename(&outside, s.path())?;
    s.step("moved in")?;
    map.store(1, b'2');
    s.step("stored")?;
    fs::rename(s.path(), &outside)?;
    map.store(1, b'3');
    s.step("moved out and stored")?;
    fs::rename(&outside, s.path())?;
    map.store(1, b'4');
    s.step("moved in again and stored")
}

fn mapped_again(s: &mut Stage) -> Result<()> {
    let file = s.file(PAGES)?;
    for round in b'1'..b'5' {
        let map = Map::new(&file, PAGES, RW, 0)?;
        map.store(usize::from(round - b'0'), round);
        drop(map);
        s.quiet("mapped, stored, unmapped")?;
        file.write_all_at(&[round; 100], 20 * PAGE as u64)?;
    }
    let map = Map::new(&file, PAGES, RW, 0)?;
    map.store(20, b'9');
    s.step("stored where it was written")
}
