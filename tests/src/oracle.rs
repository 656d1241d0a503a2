//! The independent comparison of two trees: what checkpoint equality promises, read from the files.
//!
//! Compared are names, types, bytes (holes as zeros), mode, owner, size, mtime (directories and the
//! root too), all extended attributes (so ACLs and capabilities), symlink targets, hard-link groups
//! and device numbers. Not compared: atime, ctime, inode numbers, extents.
//!
//! Assumes that both trees rest while they are compared, and that it runs as root.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{CString, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Differences listed at most; the last line says how many more there are.
pub const LISTED_MAX: usize = 60;

/// Everything in which `backup` differs from `primary`, as text; empty when they are equal.
///
/// # Errors
/// When something cannot be read: then nothing is known.
pub fn compare(primary: &Path, backup: &Path) -> io::Result<Vec<String>> {
    compare_taken(primary, backup, &|_, _| true)
}

/// The same where only a part of the primary is taken: `takes` says so of each path below it, and whether it is
/// a directory. What is not taken must be missing on the backup.
///
/// # Errors
/// When something cannot be read: then nothing is known.
pub fn compare_taken(
    primary: &Path,
    backup: &Path,
    takes: &dyn Fn(&Path, bool) -> bool,
) -> io::Result<Vec<String>> {
    let mut found =
        Comparison { takes, differences: Vec::new(), links_a: HashMap::new(), links_b: HashMap::new() };
    let (a, b) = (lstat(primary)?, lstat(backup)?);
    found.pair(Path::new(""), (primary, &a), (backup, &b))?;
    found.hard_links();
    let more = found.differences.len().saturating_sub(LISTED_MAX);
    found.differences.truncate(LISTED_MAX);
    if more > 0 {
        found.differences.push(format!("and {more} more"));
    }
    Ok(found.differences)
}

/// How many files, directories and other objects stand in a tree, its root included.
///
/// # Errors
/// When a directory cannot be read.
pub fn count(root: &Path) -> io::Result<u64> {
    let mut total = 1;
    if lstat(root)?.is_dir() {
        let (root, _open) = shorter(root)?;
        for name in names(&root)? {
            total += count(&root.join(name))?;
        }
    }
    Ok(total)
}

struct Comparison<'a> {
    takes: &'a dyn Fn(&Path, bool) -> bool,
    differences: Vec<String>,
    /// (device, inode) of the primary -> the names below the root; only of objects with several.
    links_a: HashMap<(u64, u64), BTreeSet<PathBuf>>,
    links_b: HashMap<(u64, u64), BTreeSet<PathBuf>>,
}

impl Comparison<'_> {
    fn say(&mut self, at: &Path, what: impl std::fmt::Display) {
        let at = if at.as_os_str().is_empty() { Path::new(".") } else { at };
        self.differences.push(format!("{}: {what}", at.display()));
    }

    fn differ<T: PartialEq + std::fmt::Debug>(&mut self, at: &Path, what: &str, a: T, b: T) {
        if a != b {
            self.say(at, format_args!("{what} is {a:?} on the primary, {b:?} on the backup"));
        }
    }

    fn pair(&mut self, at: &Path, a: (&Path, &Metadata), b: (&Path, &Metadata)) -> io::Result<()> {
        let ((path_a, a), (path_b, b)) = (a, b);
        let (kind_a, kind_b) = (kind(a), kind(b));
        if kind_a != kind_b {
            self.say(at, format_args!("is a {kind_a} on the primary, a {kind_b} on the backup"));
            return Ok(());
        }
        self.differ(at, "mode", format!("{:o}", a.mode() & 0o7777), format!("{:o}", b.mode() & 0o7777));
        self.differ(at, "owner", (a.uid(), a.gid()), (b.uid(), b.gid()));
        self.differ(at, "mtime", (a.mtime(), a.mtime_nsec()), (b.mtime(), b.mtime_nsec()));
        self.differ(at, "xattrs", xattrs(path_a)?, xattrs(path_b)?);
        match kind_a {
            "directory" => return self.directories(at, path_a, path_b),
            "file" => {
                self.differ(at, "size", a.len(), b.len());
                if a.len() == b.len()
                    && let Some(offset) = first_difference(path_a, path_b)?
                {
                    self.say(at, format_args!("bytes differ from offset {offset} on (size {})", a.len()));
                }
            }
            "symlink" => self.differ(at, "target", fs::read_link(path_a)?, fs::read_link(path_b)?),
            "block device" | "character device" => self.differ(at, "device number", a.rdev(), b.rdev()),
            _ => {}
        }
        if a.nlink() > 1 || b.nlink() > 1 {
            self.links_a.entry((a.dev(), a.ino())).or_default().insert(at.to_owned());
            self.links_b.entry((b.dev(), b.ino())).or_default().insert(at.to_owned());
        }
        Ok(())
    }

    fn directories(&mut self, at: &Path, path_a: &Path, path_b: &Path) -> io::Result<()> {
        let ((path_a, _open_a), (path_b, _open_b)) = (shorter(path_a)?, shorter(path_b)?);
        let (mut names_a, names_b) = (names(&path_a)?, names(&path_b)?);
        let mut left_out = Vec::new();
        for name in &names_a {
            if !(self.takes)(&at.join(name), lstat(&path_a.join(name))?.is_dir()) {
                left_out.push(name.clone());
            }
        }
        names_a.retain(|name| !left_out.contains(name));
        for name in names_a.difference(&names_b) {
            self.say(&at.join(name), "is missing on the backup");
        }
        for name in names_b.difference(&names_a) {
            self.say(&at.join(name), "is on the backup only");
        }
        for name in names_a.intersection(&names_b) {
            let (a, b) = (path_a.join(name), path_b.join(name));
            let (meta_a, meta_b) = (lstat(&a)?, lstat(&b)?);
            self.pair(&at.join(name), (&a, &meta_a), (&b, &meta_b))?;
        }
        Ok(())
    }

    /// The names that are one file on the primary are one file on the backup, and the other way.
    fn hard_links(&mut self) {
        let groups = |links: &HashMap<(u64, u64), BTreeSet<PathBuf>>| -> BTreeSet<Vec<PathBuf>> {
            let several = links.values().filter(|names| names.len() > 1);
            several.map(|names| names.iter().cloned().collect()).collect()
        };
        let (a, b) = (groups(&self.links_a), groups(&self.links_b));
        for group in a.difference(&b) {
            self.differences.push(format!("{group:?} are one file on the primary, not on the backup"));
        }
        for group in b.difference(&a) {
            self.differences.push(format!("{group:?} are one file on the backup, not on the primary"));
        }
    }
}

/// A path of a directory that leaves room for what is below it, and what must stay open for that: a copy
/// may stand deeper than the longest path there is.
fn shorter(directory: &Path) -> io::Result<(PathBuf, Option<File>)> {
    if directory.as_os_str().len() < libc::PATH_MAX as usize / 4 {
        return Ok((directory.to_owned(), None));
    }
    let open = File::open(directory).map_err(|e| named(e, directory))?;
    Ok((PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd())), Some(open)))
}

fn lstat(path: &Path) -> io::Result<Metadata> {
    fs::symlink_metadata(path).map_err(|e| named(e, path))
}

fn named(error: io::Error, path: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn names(directory: &Path) -> io::Result<BTreeSet<OsString>> {
    let entries = fs::read_dir(directory).map_err(|e| named(e, directory))?;
    entries.map(|entry| Ok(entry?.file_name())).collect()
}

fn kind(meta: &Metadata) -> &'static str {
    let kind = meta.file_type();
    if kind.is_dir() {
        "directory"
    } else if kind.is_file() {
        "file"
    } else if kind.is_symlink() {
        "symlink"
    } else if kind.is_fifo() {
        "fifo"
    } else if kind.is_socket() {
        "socket"
    } else if kind.is_block_device() {
        "block device"
    } else {
        "character device"
    }
}

/// Offset of the first byte that differs, of two files of the same size.
fn first_difference(a: &Path, b: &Path) -> io::Result<Option<u64>> {
    const CHUNK: usize = 256 * 1024;
    let (mut file_a, mut file_b) =
        (File::open(a).map_err(|e| named(e, a))?, File::open(b).map_err(|e| named(e, b))?);
    let (mut buffer_a, mut buffer_b) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut offset = 0;
    loop {
        let (n, m) = (fill(&mut file_a, &mut buffer_a)?, fill(&mut file_b, &mut buffer_b)?);
        if buffer_a[..n] != buffer_b[..m] {
            let same = buffer_a[..n].iter().zip(&buffer_b[..m]).take_while(|(x, y)| x == y).count();
            return Ok(Some(offset + same as u64));
        }
        if n == 0 {
            return Ok(None);
        }
        offset += n as u64;
    }
}

fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..])? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(filled)
}

/// Names and values of the extended attributes of `path` itself (a symlink is not followed).
///
/// # Errors
/// When they cannot be read.
pub fn xattrs(path: &Path) -> io::Result<BTreeMap<String, Vec<u8>>> {
    let c_path = CString::new(path.as_os_str().as_bytes())?;
    let list = grown(|buffer| {
        // SAFETY: the path ends with a zero byte, and the kernel writes at most `len` bytes.
        unsafe { libc::llistxattr(c_path.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) }
    });
    let list = match list {
        Err(e) if e.raw_os_error() == Some(libc::ENOTSUP) => return Ok(BTreeMap::new()),
        other => other.map_err(|e| named(e, path))?,
    };
    let mut all = BTreeMap::new();
    for name in list.split(|byte| *byte == 0).filter(|name| !name.is_empty() && !is_of_storage(name)) {
        let c_name = CString::new(name)?;
        let value = grown(|buffer| {
            // SAFETY: both strings end with a zero byte; at most `len` bytes are written.
            unsafe {
                libc::lgetxattr(c_path.as_ptr(), c_name.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len())
            }
        });
        all.insert(String::from_utf8_lossy(name).into_owned(), value.map_err(|e| named(e, path))?);
    }
    Ok(all)
}

/// Attributes that belong to the file system and not to the file: properties of btrfs, and the ACLs of
/// xfs in its own form, which it shows beside the portable one (cp(1) leaves them out too).
fn is_of_storage(name: &[u8]) -> bool {
    name.starts_with(b"btrfs.") || name.starts_with(b"trusted.SGI_ACL_")
}

/// Calls with a buffer of 64 KiB, which is the kernel's bound for lists and values (xattr(7)).
fn grown(call: impl Fn(&mut [u8]) -> isize) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; 64 * 1024];
    match usize::try_from(call(&mut buffer)) {
        Ok(len) => {
            buffer.truncate(len);
            Ok(buffer)
        }
        Err(_) => Err(io::Error::last_os_error()),
    }
}
