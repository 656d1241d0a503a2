//! Rows: bytes and lengths.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::sys::{self, CWD, address, at as adr, c, call, fd, ioc};
use super::{At, Row, pattern};

const RWF_APPEND: usize = 0x10;
const RWF_NOAPPEND: usize = 0x20;

const FICLONE: usize = ioc(1, 0x94, 9, 4);
const FICLONERANGE: usize = ioc(1, 0x94, 13, 32);
const FIDEDUPERANGE: usize = ioc(3, 0x94, 54, 24);

/// Without reflinks.
const NO_CLONES: &[&str] = &["ext4", "tmpfs"];

pub(super) static ROWS: &[&Row] = &[
    &Row::new("data/write", write),
    &Row::new("data/large-writes", large_writes),
    &Row::new("data/positioned-writes", positioned),
    &Row::new("data/vectors", vectors),
    &Row::new("data/pwritev2", pwritev2),
    &Row::new("data/append", append),
    &Row::new("data/append-processes", append_processes),
    &Row::new("data/append-flag-changes", append_flag_changes),
    &Row::new("data/shared-position", shared_position),
    &Row::new("data/shared-position-race", shared_position_race),
    &Row::new("data/descriptor-changes", descriptor_changes),
    &Row::new("data/descriptor-numbers", descriptor_numbers),
    &Row::new("data/direct", direct).refused_by(&["tmpfs"]).before(6, 6),
    &Row::new("data/sync", sync),
    &Row::new("data/sendfile", sendfile),
    &Row::new("data/splice", splice),
    &Row::new("data/vmsplice-tee", vmsplice_tee),
    &Row::new("data/copy-file-range", copy_file_range),
    &Row::new("data/clone", clone).refused_by(NO_CLONES),
    &Row::new("data/clone-range", clone_range).refused_by(NO_CLONES),
    &Row::new("data/dedupe", dedupe).refused_by(NO_CLONES),
    &Row::new("data/allocate", allocate),
    &Row::new("data/punch-hole", punch_hole),
    &Row::new("data/zero-range", zero_range).refused_by(&["tmpfs"]),
    &Row::new("data/collapse-range", collapse_range).refused_by(&["tmpfs", "btrfs"]),
    &Row::new("data/insert-range", insert_range).refused_by(&["tmpfs", "btrfs"]),
    &Row::new("data/unshare-range", unshare_range).refused_by(&["tmpfs", "btrfs", "ext4"]),
    &Row::new("data/truncate", truncate),
    &Row::new("data/open-truncate", open_truncate),
    &Row::new("data/holes", holes),
    &Row::new("data/failed-calls", failed_calls),
];

fn write(at: &At) -> io::Result<()> {
    let mut file = at.file("f", 10_000)?;
    at.pause()?;
    file.write_all(b"begins otherwise")?;
    file.seek(SeekFrom::Start(5_000))?;
    file.write_all(&pattern(1_000, 2))?;
    file.seek(SeekFrom::End(0))?;
    file.write_all(b"and ends so")?;
    // A buffer that goes away right after the call.
    drop(vec![0; 10]);
    file.write_all(&pattern(900, 3))
}

fn large_writes(at: &At) -> io::Result<()> {
    let mut file = at.file("f", 100)?;
    at.pause()?;
    for size in [1_024, 1_025, 4_096, 70_000, 3 << 20] {
        file.write_all(&pattern(size, 4))?;
    }
    Ok(())
}

fn positioned(at: &At) -> io::Result<()> {
    let file = at.file("f", 10_000)?;
    at.pause()?;
    file.write_all_at(&pattern(500, 5), 100)?;
    file.write_all_at(b"far behind the end", 300_000)?;
    file.write_all_at(b"", 900_000)
}

fn vectors(at: &At) -> io::Result<()> {
    let file = at.file("f", 1_000)?;
    let (a, b) = (pattern(300, 6), pattern(20_000, 7));
    at.pause()?;
    let few = sys::vectors(&[&a[..], b"", &b, &a]);
    call(libc::SYS_writev, [fd(&file), address(&few[..]), few.len()])?;
    call(libc::SYS_pwritev, [fd(&file), address(&few[..]), 2, 50_000, 0])?;
    let many = sys::vectors(&[b"x"; 40]);
    call(libc::SYS_writev, [fd(&file), address(&many[..]), many.len()])?;
    Ok(())
}

fn pwritev2(at: &At) -> io::Result<()> {
    let file = at.file("f", 1_000)?;
    let appending = File::options().append(true).open(at.path("f"))?;
    at.pause()?;
    let line = sys::vectors(&[b"a line\n"]);
    let put = |file: &File, offset: usize, flags: usize| {
        call(libc::SYS_pwritev2, [fd(file), address(&line[..]), 1, offset, 0, flags])
    };
    put(&file, 10, 0)?;
    // -1: at the file position.
    put(&file, usize::MAX, 0)?;
    put(&file, 0, RWF_APPEND)?;
    put(&file, usize::MAX, RWF_APPEND)?;
    // Since 6.9.
    match put(&appending, 20, RWF_NOAPPEND) {
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        other => drop(other?),
    }
    Ok(())
}

fn append(at: &At) -> io::Result<()> {
    at.file("f", 1_000)?;
    let mut file = File::options().append(true).read(true).open(at.path("f"))?;
    at.pause()?;
    file.write_all(b"one\n")?;
    // Moves nothing but reads.
    file.seek(SeekFrom::Start(0))?;
    file.write_all(b"two\n")?;
    // pwrite(2): on a descriptor with O_APPEND it appends, whatever the offset.
    file.write_all_at(b"three\n", 10)?;
    file.set_len(500)?;
    file.write_all(b"after a cut\n")
}

fn append_processes(at: &At) -> io::Result<()> {
    at.file("f", 10)?;
    at.pause()?;
    let mut children = Vec::new();
    for child in 0..4u8 {
        // SAFETY: this process has one thread.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let done = (|| -> io::Result<()> {
                let mut file = File::options().append(true).open(at.path("f"))?;
                (0..200).try_for_each(|n| file.write_all(format!("{child} {n}\n").as_bytes()))
            })();
            // SAFETY: ends the child.
            unsafe { libc::_exit(i32::from(done.is_err())) };
        }
        children.push(pid);
    }
    for pid in children {
        let mut status = 0;
        // SAFETY: our child.
        unsafe { libc::waitpid(pid, &raw mut status, 0) };
        if status != 0 {
            return Err(io::Error::other("a writer failed"));
        }
    }
    Ok(())
}

fn append_flag_changes(at: &At) -> io::Result<()> {
    let mut file = at.file("f", 1_000)?;
    at.pause()?;
    let set =
        |file: &File, flags: i32| call(libc::SYS_fcntl, [fd(file), libc::F_SETFL as usize, flags as usize]);
    file.write_all(b"at the start")?;
    set(&file, libc::O_APPEND)?;
    file.write_all(b"at the end")?;
    set(&file, 0)?;
    file.write_all(b"behind that")?;
    file.seek(SeekFrom::Start(100))?;
    file.write_all(b"in the middle")
}

fn shared_position(at: &At) -> io::Result<()> {
    let mut file = at.file("f", 1_000)?;
    let mut twin = file.try_clone()?;
    at.pause()?;
    file.write_all(b"first")?;
    twin.write_all(b"second")?;
    sys::in_child(|| (&file).write_all(b"a child"))?;
    file.read_exact(&mut [0; 100])?;
    twin.write_all(b"behind what was read")
}

/// Readers and writers move one position while others write at it.
fn shared_position_race(at: &At) -> io::Result<()> {
    let file = at.file("f", 100_000)?;
    at.pause()?;
    std::thread::scope(|threads| {
        for thread in 0..3u8 {
            let file = &file;
            threads.spawn(move || {
                let (mut file, line) = (file, [b'a' + thread; 40]);
                for n in 0..400 {
                    let _ = match (n + usize::from(thread)) % 4 {
                        0 => file.read(&mut [0; 30]).map(drop),
                        1 if n % 100 == 1 => file.seek(SeekFrom::Start(0)).map(drop),
                        _ => file.write(&line).map(drop),
                    };
                }
            });
        }
    });
    Ok(())
}

/// Between writes that go on where the last one ended, the descriptor becomes another file's in every way that
/// there is, or others move its position.
fn descriptor_changes(at: &At) -> io::Result<()> {
    let mut file = at.file("f", 1_000)?;
    let other = at.file("g", 1_000)?;
    let number = fd(&file);
    at.pause()?;
    let mut goes_on = || -> io::Result<()> {
        for _ in 0..3 {
            file.write_all(b"and on ")?;
        }
        Ok(())
    };
    goes_on()?;
    // One more descriptor, which moves the position.
    let kept = other.try_clone()?;
    let copy = call(libc::SYS_dup, [number, 0, 0])?;
    call(libc::SYS_lseek, [copy, 500, libc::SEEK_SET as usize])?;
    call(libc::SYS_close, [copy, 0, 0])?;
    goes_on()?;
    // Another file in its place, one that is open elsewhere too, and back.
    let copy = call(libc::SYS_dup, [number, 0, 0])?;
    call(libc::SYS_dup2, [fd(&other), number, 0])?;
    goes_on()?;
    (&kept).seek(SeekFrom::Start(900))?;
    goes_on()?;
    call(libc::SYS_dup3, [copy, number, 0])?;
    call(libc::SYS_close_range, [copy, copy, 0])?;
    goes_on()?;
    // A child that moves the position, writes, and is gone.
    sys::in_child(|| {
        call(libc::SYS_lseek, [number, 50, libc::SEEK_SET as usize])?;
        call(libc::SYS_write, [number, address(b"a child"), 7]).map(drop)
    })?;
    goes_on()?;
    // It is opened anew, now to append.
    let path = c(at.path("h"))?;
    call(libc::SYS_close, [number, 0, 0])?;
    let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND;
    let opened = call(libc::SYS_open, [adr(&path), flags as usize, 0o644])?;
    if opened != number {
        return Err(io::Error::other("another descriptor was free"));
    }
    goes_on()?;
    call(libc::SYS_fcntl, [number, libc::F_SETFL as usize, 0])?;
    call(libc::SYS_lseek, [number, 3, libc::SEEK_SET as usize])?;
    goes_on()
}

/// Writes that go on in low and in high descriptors, before and after the table of descriptors has grown.
fn descriptor_numbers(at: &At) -> io::Result<()> {
    let mut files = Vec::new();
    for i in 0..12 {
        files.push(at.file(&format!("f{i}"), 1_000)?);
    }
    at.pause()?;
    let goes_on = |files: &[File], text: &[u8]| -> io::Result<()> {
        for mut file in files {
            for _ in 0..3 {
                file.write_all(text)?;
            }
        }
        Ok(())
    };
    goes_on(&files, b"and on ")?;
    for (i, mut file) in files.iter().enumerate() {
        file.seek(SeekFrom::Start(100 + i as u64))?;
        file.write_all(b"elsewhere")?;
        file.write_all(b" and on")?;
        if i % 2 == 1 {
            // More than the table has room for (NR_OPEN_DEFAULT, include/linux/fdtable.h), for a part of the files
            // while writes go on.
            let high = 300 * i;
            call(libc::SYS_dup2, [fd(file), high, 0])?;
            file.write_all(b", with a twin")?;
            call(libc::SYS_lseek, [high, 700, libc::SEEK_SET as usize])?;
            file.write_all(b"behind the twin")?;
            call(libc::SYS_close, [high, 0, 0])?;
        }
        file.write_all(b" and on")?;
        file.write_all(b" and on")?;
    }
    goes_on(&files, b" again")
}

/// Memory that O_DIRECT takes.
struct Aligned(*mut u8, usize);

impl Aligned {
    fn new(len: usize, seed: u8) -> Self {
        // SAFETY: a mapping of our own, checked below.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(memory, libc::MAP_FAILED);
        // SAFETY: just mapped, `len` bytes.
        unsafe { std::slice::from_raw_parts_mut(memory.cast::<u8>(), len) }
            .copy_from_slice(&pattern(len, seed));
        Self(memory.cast(), len)
    }
}

fn direct(at: &At) -> io::Result<()> {
    at.file("f", 64 << 10)?;
    let file = sys::open(at.path("f"), libc::O_RDWR | libc::O_DIRECT, 0)?;
    let memory = Aligned::new(32 << 10, 8);
    at.pause()?;
    call(libc::SYS_pwrite64, [fd(&file), memory.0 as usize, memory.1, 8 << 10])?;
    call(libc::SYS_pwrite64, [fd(&file), memory.0 as usize, 4 << 10, 64 << 10])?;
    call(libc::SYS_write, [fd(&file), memory.0 as usize, 4 << 10])?;
    Ok(())
}

fn sync(at: &At) -> io::Result<()> {
    at.file("f", 1_000)?;
    let file = sys::open(at.path("f"), libc::O_RDWR | libc::O_SYNC, 0)?;
    let mut file = File::from(file);
    at.pause()?;
    file.write_all(b"synced")?;
    file.write_all_at(b"also far away", 70_000)
}

fn sendfile(at: &At) -> io::Result<()> {
    let from = at.file("from", 200_000)?;
    let to = at.file("to", 1_000)?;
    at.pause()?;
    let mut offset = 100u64;
    call(libc::SYS_sendfile, [fd(&to), fd(&from), std::ptr::from_mut(&mut offset) as usize, 150_000])?;
    call(libc::SYS_sendfile, [fd(&to), fd(&from), 0, 10])?;
    Ok(())
}

fn splice(at: &At) -> io::Result<()> {
    let (to, from) = (at.file("to", 1_000)?, at.file("from", 8_192)?);
    let (reading, writing) = sys::pipe()?;
    at.pause()?;
    call(libc::SYS_splice, [fd(&from), 0, fd(&writing), 0, 5_000, 0])?;
    let mut offset = 50u64;
    call(libc::SYS_splice, [fd(&reading), 0, fd(&to), std::ptr::from_mut(&mut offset) as usize, 3_000, 0])?;
    call(libc::SYS_splice, [fd(&reading), 0, fd(&to), 0, 2_000, 0])?;
    Ok(())
}

/// Pages that are given to a pipe change before they are spliced into the file.
fn vmsplice_tee(at: &At) -> io::Result<()> {
    let to = at.file("to", 100)?;
    let (a, b) = (sys::pipe()?, sys::pipe()?);
    at.pause()?;
    let memory = Aligned::new(8_192, 9);
    let vector = [[memory.0 as usize, memory.1]];
    let given = call(libc::SYS_vmsplice, [fd(&a.1), address(&vector), 1, 0])?;
    call(libc::SYS_tee, [fd(&a.0), fd(&b.1), given, 0])?;
    // SAFETY: our own memory.
    unsafe { std::slice::from_raw_parts_mut(memory.0, memory.1) }.fill(b'!');
    call(libc::SYS_splice, [fd(&b.0), 0, fd(&to), 0, given, 0])?;
    Ok(())
}

fn copy_file_range(at: &At) -> io::Result<()> {
    let (from, to) = (at.file("from", 100_000)?, at.file("to", 1_000)?);
    at.pause()?;
    let (mut offset_in, mut offset_out) = (10u64, 500u64);
    let (a, b) = (std::ptr::from_mut(&mut offset_in) as usize, std::ptr::from_mut(&mut offset_out) as usize);
    call(libc::SYS_copy_file_range, [fd(&from), a, fd(&to), b, 60_000, 0])?;
    call(libc::SYS_copy_file_range, [fd(&from), 0, fd(&to), 0, 100, 0])?;
    Ok(())
}

fn clone(at: &At) -> io::Result<()> {
    let (from, to) = (at.file("from", 100_000)?, at.file("to", 1_000)?);
    at.pause()?;
    call(libc::SYS_ioctl, [fd(&to), FICLONE, fd(&from)]).map(drop)
}

fn clone_range(at: &At) -> io::Result<()> {
    let (from, to) = (at.file("from", 128 << 10)?, at.file("to", 128 << 10)?);
    to.write_all_at(&pattern(128 << 10, 11), 0)?;
    at.pause()?;
    // struct file_clone_range: source, offset, length, destination offset.
    let range = [from.as_raw_fd() as u64, 64 << 10, 64 << 10, 0];
    call(libc::SYS_ioctl, [fd(&to), FICLONERANGE, address(&range)]).map(drop)
}

fn dedupe(at: &At) -> io::Result<()> {
    let (a, b) = (at.file("a", 64 << 10)?, at.file("b", 64 << 10)?);
    at.pause()?;
    // struct file_dedupe_range and one file_dedupe_range_info.
    let range = [0u64, 64 << 10, 1, b.as_raw_fd() as u64, 0, 0, 0];
    call(libc::SYS_ioctl, [fd(&a), FIDEDUPERANGE, address(&range)]).map(drop)
}

fn fallocate(file: &File, mode: i32, offset: usize, len: usize) -> io::Result<()> {
    call(libc::SYS_fallocate, [fd(file), mode as usize, offset, len]).map(drop)
}

fn allocate(at: &At) -> io::Result<()> {
    let (grows, keeps) = (at.file("grows", 1_000)?, at.file("keeps", 1_000)?);
    at.pause()?;
    fallocate(&grows, 0, 500, 100_000)?;
    fallocate(&keeps, libc::FALLOC_FL_KEEP_SIZE, 0, 100_000)
}

fn punch_hole(at: &At) -> io::Result<()> {
    let file = at.file("f", 64 << 10)?;
    at.pause()?;
    fallocate(&file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 5_000, 20_000)
}

fn zero_range(at: &At) -> io::Result<()> {
    let (file, grows) = (at.file("f", 64 << 10)?, at.file("grows", 1_000)?);
    at.pause()?;
    fallocate(&file, libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, 5_000, 20_000)?;
    fallocate(&grows, libc::FALLOC_FL_ZERO_RANGE, 500, 20_000)
}

fn collapse_range(at: &At) -> io::Result<()> {
    let file = at.file("f", 64 << 10)?;
    at.pause()?;
    fallocate(&file, libc::FALLOC_FL_COLLAPSE_RANGE, 8 << 10, 16 << 10)
}

fn insert_range(at: &At) -> io::Result<()> {
    let file = at.file("f", 64 << 10)?;
    at.pause()?;
    fallocate(&file, libc::FALLOC_FL_INSERT_RANGE, 8 << 10, 16 << 10)
}

fn unshare_range(at: &At) -> io::Result<()> {
    let file = at.file("f", 64 << 10)?;
    at.pause()?;
    fallocate(&file, libc::FALLOC_FL_UNSHARE_RANGE, 0, 64 << 10)
}

fn truncate(at: &At) -> io::Result<()> {
    for name in ["cut", "grown", "by-path", "emptied"] {
        at.file(name, 10_000)?;
    }
    at.pause()?;
    let open = |name| File::options().write(true).open(at.path(name));
    open("cut")?.set_len(777)?;
    open("grown")?.set_len(1 << 20)?;
    open("emptied")?.set_len(0)?;
    call(libc::SYS_truncate, [adr(&c(at.path("by-path"))?), 1_234])?;
    call(libc::SYS_truncate, [adr(&c(at.path("by-path"))?), 100_000]).map(drop)
}

fn open_truncate(at: &At) -> io::Result<()> {
    for name in ["a", "b", "c", "d"] {
        at.file(name, 10_000)?;
    }
    at.pause()?;
    let path = |name| c(at.path(name));
    let flags = (libc::O_WRONLY | libc::O_TRUNC) as usize;
    call(libc::SYS_open, [adr(&path("a")?), flags, 0])?;
    call(libc::SYS_creat, [adr(&path("b")?), 0o600])?;
    call(libc::SYS_openat, [CWD, adr(&path("c")?), flags, 0])?;
    let how = [flags as u64, 0, 0];
    call(libc::SYS_openat2, [CWD, adr(&path("d")?), address(&how), 24]).map(drop)
}

fn holes(at: &At) -> io::Result<()> {
    let file = at.file("f", 4_096)?;
    at.pause()?;
    file.set_len(10 << 20)?;
    file.write_all_at(b"an island", 5 << 20)?;
    let sparse = File::create(at.path("sparse"))?;
    sparse.write_all_at(b"only the end", 20 << 20)
}

/// Calls that fail and leave something all the same, or may.
fn failed_calls(at: &At) -> io::Result<()> {
    let file = at.file("f", 1_000)?;
    at.pause()?;
    // No room for this on the file systems of the test: parts may stay allocated, and the length moved.
    let _ = fallocate(&file, 0, 0, 2 << 30);
    at.pause()?;
    file.set_len(2_000)?;
    // tmpfs before 6.6 makes the file and then refuses O_DIRECT.
    let _ = sys::open(at.path("direct"), libc::O_CREAT | libc::O_WRONLY | libc::O_DIRECT, 0o600);
    // The second page of the buffer cannot be read: what is before it is written.
    let memory = Aligned::new(8_192, 12);
    // SAFETY: our own mapping.
    unsafe { libc::mprotect(memory.0.add(4_096).cast(), 4_096, libc::PROT_NONE) };
    let _ = call(libc::SYS_pwrite64, [fd(&file), memory.0 as usize, 8_192, 100]);
    let _ = fs::rename(at.path("none"), at.path("f"));
    let _ = fs::create_dir(at.path("f"));
    // SAFETY: our own mapping.
    unsafe { libc::mprotect(memory.0.add(4_096).cast(), 4_096, libc::PROT_READ) };
    Ok(())
}
