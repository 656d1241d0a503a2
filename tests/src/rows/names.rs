//! Rows: entries of directories.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, symlink};
use std::os::unix::net::UnixListener;

use super::sys::{self, CWD, address, at as adr, c, call, fd};
use super::{At, Row, pattern};

pub(super) static ROWS: &[&Row] = &[
    &Row::new("names/create", create),
    &Row::new("names/tmpfile-linked", tmpfile_linked),
    &Row::new("names/tmpfile-linked-by-proc", tmpfile_linked_by_proc),
    &Row::new("names/tmpfile-write-across-link", tmpfile_write_across_link),
    &Row::new("names/mknod", mknod),
    &Row::new("names/bind", bind),
    &Row::new("names/mkdir-rmdir", mkdir_rmdir),
    &Row::new("names/unlink", unlink),
    &Row::new("names/rename", rename),
    &Row::new("names/rename-directory", rename_directory),
    &Row::new("names/rename-exchange", rename_exchange),
    &Row::new("names/rename-whiteout", rename_whiteout).refused_by(&["btrfs"]),
    &Row::new("names/link-symlink", link_symlink),
    &Row::new("names/link-outside", link_outside),
    &Row::new("names/open-by-handle", open_by_handle),
    &Row::new("names/inode-reused", inode_reused),
];

fn create(at: &At) -> io::Result<()> {
    at.pause()?;
    fs::write(at.path("written"), pattern(3_000, 1))?;
    File::create(at.path("empty"))?;
    File::create_new(at.path("exclusive"))?.write_all(b"x")?;
    let path = |name: &str| c(at.path(name));
    let flags = (libc::O_CREAT | libc::O_WRONLY) as usize;
    call(libc::SYS_open, [adr(&path("by-open")?), flags, 0o640])?;
    call(libc::SYS_creat, [adr(&path("by-creat")?), 0o604])?;
    let how = [flags as u64, 0o666, 0];
    call(libc::SYS_openat2, [CWD, adr(&path("by-openat2")?), address(&how), 24]).map(drop)
}

fn empty_path_link(from: usize, to: &std::path::Path) -> io::Result<()> {
    let (nothing, to) = (c("")?, c(to)?);
    call(libc::SYS_linkat, [from, adr(&nothing), CWD, adr(&to), libc::AT_EMPTY_PATH as usize]).map(drop)
}

fn tmpfile(at: &At) -> io::Result<File> {
    sys::open(&at.dir, libc::O_TMPFILE | libc::O_RDWR, 0o644).map(File::from)
}

fn tmpfile_linked(at: &At) -> io::Result<()> {
    let mut early = tmpfile(at)?;
    early.write_all(&pattern(5_000, 2))?;
    at.pause()?;
    early.write_all(b"more")?;
    empty_path_link(fd(&early), &at.path("early"))?;
    early.write_all(b"and more behind the link")?;
    let mut late = tmpfile(at)?;
    late.write_all(b"never linked")?;
    let mut both = tmpfile(at)?;
    both.write_all(&pattern(100, 3))?;
    empty_path_link(fd(&both), &at.path("both"))?;
    at.pause()?;
    late.write_all(b"still not")?;
    both.write_all(b"known by now")
}

fn tmpfile_linked_by_proc(at: &At) -> io::Result<()> {
    let mut file = tmpfile(at)?;
    at.pause()?;
    file.write_all(&pattern(5_000, 4))?;
    let (from, to) = (c(format!("/proc/self/fd/{}", fd(&file)))?, c(at.path("f"))?);
    call(libc::SYS_linkat, [CWD, adr(&from), CWD, adr(&to), libc::AT_SYMLINK_FOLLOW as usize])?;
    Ok(())
}

/// A long write is under way when the file gets its name.
fn tmpfile_write_across_link(at: &At) -> io::Result<()> {
    let file = tmpfile(at)?;
    let bytes = pattern(24 << 20, 5);
    at.pause()?;
    std::thread::scope(|threads| {
        let writer = threads.spawn(|| file.write_all_at(&bytes, 0));
        // Some of it is there: it has begun.
        while file.metadata()?.len() == 0 && !writer.is_finished() {
            std::hint::spin_loop();
        }
        empty_path_link(fd(&file), &at.path("f"))?;
        writer.join().map_err(|_| io::Error::other("the writer panicked"))?
    })
}

fn mknod(at: &At) -> io::Result<()> {
    at.pause()?;
    let make = |name: &str, mode: u32, device: u64| {
        call(libc::SYS_mknod, [adr(&c(at.path(name))?), mode as usize, device as usize])
    };
    make("fifo", libc::S_IFIFO | 0o620, 0)?;
    make("socket", libc::S_IFSOCK | 0o600, 0)?;
    make("char", libc::S_IFCHR | 0o600, libc::makedev(1, 3))?;
    make("block", libc::S_IFBLK | 0o640, libc::makedev(7, 200))?;
    make("file", libc::S_IFREG | 0o600, 0)?;
    let fifo = c(at.path("fifo-at"))?;
    call(libc::SYS_mknodat, [CWD, adr(&fifo), (libc::S_IFIFO | 0o600) as usize, 0])?;
    at.pause()?;
    // A FIFO gets a new modification time by each write (pipe_write() in fs/pipe.c).
    let mut both = File::options().read(true).write(true).open(at.path("fifo"))?;
    both.write_all(b"through it")?;
    call(libc::SYS_fchmod, [fd(&both), 0o600]).map(drop)
}

fn bind(at: &At) -> io::Result<()> {
    at.pause()?;
    let _listener = UnixListener::bind(at.path("socket"))?;
    std::env::set_current_dir(&at.dir)?;
    let _relative = UnixListener::bind("relative")?;
    Ok(())
}

fn mkdir_rmdir(at: &At) -> io::Result<()> {
    fs::create_dir(at.path("old"))?;
    at.pause()?;
    fs::create_dir(at.path("new"))?;
    fs::create_dir_all(at.path("a/b/c/d"))?;
    fs::write(at.path("a/b/c/d/f"), "deep")?;
    fs::remove_dir(at.path("old"))?;
    let (directory, name) = (sys::open(at.path("a"), libc::O_DIRECTORY, 0)?, c("by-at")?);
    call(libc::SYS_mkdirat, [fd(&directory), adr(&name), 0o700])?;
    call(libc::SYS_mkdirat, [fd(&directory), adr(&c("goes")?), 0o700])?;
    call(libc::SYS_unlinkat, [fd(&directory), adr(&c("goes")?), libc::AT_REMOVEDIR as usize]).map(drop)
}

fn unlink(at: &At) -> io::Result<()> {
    for name in ["a", "b", "c", "twice"] {
        at.file(name, 1_000)?;
    }
    fs::hard_link(at.path("twice"), at.path("once-more"))?;
    let mut open = File::options().write(true).open(at.path("c"))?;
    at.pause()?;
    fs::remove_file(at.path("a"))?;
    call(libc::SYS_unlinkat, [CWD, adr(&c(at.path("b"))?), 0])?;
    fs::remove_file(at.path("c"))?;
    open.write_all(b"into nothing")?;
    fs::remove_file(at.path("twice"))?;
    // Through the name that is left, and through none.
    File::options().append(true).open(at.path("once-more"))?.write_all(b"more")
}

fn rename(at: &At) -> io::Result<()> {
    for name in ["a", "b", "c", "d", "over", "target"] {
        fs::write(at.path(name), name)?;
    }
    fs::hard_link(at.path("a"), at.path("a-too"))?;
    at.pause()?;
    fs::rename(at.path("b"), at.path("b2"))?;
    fs::rename(at.path("over"), at.path("target"))?;
    // Two names of one file: nothing happens (rename(2)).
    fs::rename(at.path("a"), at.path("a-too"))?;
    let (from, to) = (c(at.path("c"))?, c(at.path("c2"))?);
    call(libc::SYS_renameat2, [CWD, adr(&from), CWD, adr(&to), libc::RENAME_NOREPLACE as usize])?;
    let refused = call(
        libc::SYS_renameat2,
        [CWD, adr(&to), CWD, adr(&c(at.path("d"))?), libc::RENAME_NOREPLACE as usize],
    );
    assert!(refused.is_err());
    // An editor saves a file.
    fs::write(at.path("d.new"), pattern(2_000, 6))?;
    fs::rename(at.path("d.new"), at.path("d"))
}

fn rename_directory(at: &At) -> io::Result<()> {
    fs::create_dir_all(at.path("a/in/deep"))?;
    fs::write(at.path("a/in/deep/f"), "f")?;
    fs::create_dir_all(at.path("b/empty"))?;
    at.pause()?;
    fs::rename(at.path("a/in"), at.path("b/in"))?;
    fs::write(at.path("b/in/deep/f"), "after the move")?;
    // Over an empty directory.
    fs::rename(at.path("b/in/deep"), at.path("b/empty"))?;
    // Below what was above it.
    fs::rename(at.path("b/in"), at.path("a/in"))?;
    fs::rename(at.path("b"), at.path("a/in/b"))?;
    File::create(at.path("a/in/b/empty/g")).map(drop)
}

fn exchange(a: &std::path::Path, b: &std::path::Path) -> io::Result<()> {
    let (a, b) = (c(a)?, c(b)?);
    call(libc::SYS_renameat2, [CWD, adr(&a), CWD, adr(&b), libc::RENAME_EXCHANGE as usize]).map(drop)
}

fn rename_exchange(at: &At) -> io::Result<()> {
    fs::write(at.path("a"), "a")?;
    fs::write(at.path("b"), "b, but longer")?;
    fs::create_dir_all(at.path("d/inner"))?;
    fs::write(at.path("d/inner/f"), "f")?;
    at.pause()?;
    exchange(&at.path("a"), &at.path("b"))?;
    // A file and a directory.
    exchange(&at.path("a"), &at.path("d"))?;
    fs::write(at.path("a/inner/g"), "g")?;
    exchange(&at.path("a/inner"), &at.path("b"))
}

fn rename_whiteout(at: &At) -> io::Result<()> {
    fs::write(at.path("a"), "a")?;
    at.pause()?;
    let (from, to) = (c(at.path("a"))?, c(at.path("b"))?);
    call(libc::SYS_renameat2, [CWD, adr(&from), CWD, adr(&to), libc::RENAME_WHITEOUT as usize]).map(drop)
}

fn link_symlink(at: &At) -> io::Result<()> {
    fs::write(at.path("f"), "f")?;
    symlink("f", at.path("old"))?;
    at.pause()?;
    fs::hard_link(at.path("f"), at.path("hard"))?;
    symlink("nowhere/at/all", at.path("dangling"))?;
    call(libc::SYS_symlinkat, [adr(&c("f")?), CWD, adr(&c(at.path("soft"))?)])?;
    // The link itself, and what it leads to.
    let (soft, a, b) = (c(at.path("soft"))?, c(at.path("link-of-link"))?, c(at.path("link-of-file"))?);
    call(libc::SYS_linkat, [CWD, adr(&soft), CWD, adr(&a), 0])?;
    call(libc::SYS_linkat, [CWD, adr(&soft), CWD, adr(&b), libc::AT_SYMLINK_FOLLOW as usize])?;
    // Without the flag it needs a privilege and names the file of the descriptor.
    let file = File::open(at.path("f"))?;
    empty_path_link(fd(&file), &at.path("by-descriptor"))?;
    File::options().append(true).open(at.path("soft"))?.write_all(b" and more")?;
    fs::remove_file(at.path("old"))
}

/// One name inside, one outside.
fn link_outside(at: &At) -> io::Result<()> {
    fs::write(at.path("f"), pattern(5_000, 7))?;
    fs::hard_link(at.path("f"), at.beside.join("f"))?;
    fs::write(at.beside.join("comes"), pattern(5_000, 8))?;
    at.pause()?;
    File::options().append(true).open(at.beside.join("f"))?.write_all(b"through the name outside")?;
    fs::hard_link(at.beside.join("comes"), at.path("comes"))?;
    File::options().append(true).open(at.beside.join("comes"))?.write_all(b"after it came")?;
    at.pause()?;
    File::options().append(true).open(at.beside.join("f"))?.write_all(b"again")?;
    fs::remove_file(at.path("f"))?;
    fs::remove_file(at.beside.join("comes"))?;
    let (path, mode) = (c(at.beside.join("f"))?, 0o600);
    call(libc::SYS_chmod, [adr(&path), mode]).map(drop)
}

fn open_by_handle(at: &At) -> io::Result<()> {
    at.file("f", 5_000)?;
    at.file("cut", 5_000)?;
    at.pause()?;
    for (name, flags) in [("f", libc::O_WRONLY), ("cut", libc::O_WRONLY | libc::O_TRUNC)] {
        let mut handle = [0u32; 34];
        handle[0] = 128;
        let mut mount = 0i32;
        let path = c(at.path(name))?;
        call(
            libc::SYS_name_to_handle_at,
            [CWD, adr(&path), address(&handle), std::ptr::from_mut(&mut mount) as usize, 0],
        )?;
        let directory = sys::open(&at.dir, libc::O_DIRECTORY, 0)?;
        let opened = call(libc::SYS_open_by_handle_at, [fd(&directory), address(&handle), flags as usize])?;
        File::from(sys::own(opened)).write_all_at(b"by handle", 100)?;
    }
    Ok(())
}

fn inode_reused(at: &At) -> io::Result<()> {
    fs::write(at.path("f"), "the first")?;
    at.pause()?;
    for round in 0..20 {
        fs::remove_file(at.path("f"))?;
        fs::write(at.path("f"), format!("round {round}"))?;
        fs::create_dir(at.path("d"))?;
        fs::remove_dir(at.path("d"))?;
    }
    Ok(())
}
