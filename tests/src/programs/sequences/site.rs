//! The directory of one sequence, and doing operations there for real.
//!
//! Whether a call succeeds does not matter: what fails must leave both sides equal too.

use std::ffi::CString;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::table::Operation;

/// How paths are given to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paths {
    /// From `/`.
    Absolute,
    /// From a descriptor of the sequence's directory.
    Descriptor,
    /// From a descriptor of `e`, through `..`.
    Above,
    /// From the working directory: for a process with one thread only.
    Working,
}

/// Bytes of `a` at the beginning.
pub const SIZE: usize = 10_000;
/// `POSIX_FADV`-like constants that the libc crate has; blocks of fallocate are whole pages.
const PAGE: i64 = 4096;

/// See the module.
pub struct Site {
    directory: PathBuf,
    outside: PathBuf,
    paths: Paths,
    /// The sequence's directory and `e`, open.
    top: fs::File,
    beside: fs::File,
    /// `a`, open for reading and writing.
    file: fs::File,
    /// `b`, open for reading.
    other: fs::File,
    mapping: *mut libc::c_void,
    /// Counts, so that no two writes are equal.
    salt: u8,
}

// SAFETY: the mapping belongs to the site, and a site is used by one thread at a time.
unsafe impl Send for Site {}

impl Drop for Site {
    fn drop(&mut self) {
        if !self.mapping.is_null() {
            // SAFETY: the mapping was made with this length and is not used any more.
            unsafe { libc::munmap(self.mapping, SIZE) };
        }
    }
}

fn pattern(length: usize, salt: u8) -> Vec<u8> {
    (0..length).map(|i| (i / 7) as u8 ^ salt.wrapping_mul(37)).collect()
}

impl Site {
    /// Makes the directory and what stands in it.
    ///
    /// # Errors
    /// What could not be made.
    pub fn new(directory: &Path, outside: &Path, paths: Paths) -> Result<Self> {
        for path in [directory, outside] {
            fs::create_dir_all(path).with_context(|| path.display().to_string())?;
        }
        for name in ["d", "e"] {
            fs::create_dir(directory.join(name))?;
        }
        fs::create_dir(outside.join("d"))?;
        fs::write(outside.join("d/z"), b"outside")?;
        fs::write(outside.join("o"), pattern(500, 1))?;
        fs::write(directory.join("a"), pattern(SIZE, 2))?;
        fs::write(directory.join("b"), pattern(6000, 3))?;
        fs::write(directory.join("d/y"), b"below")?;
        fs::hard_link(directory.join("b"), directory.join("d/x"))?;
        std::os::unix::fs::symlink("a", directory.join("l"))?;
        let mut site = Self::existing(directory, outside, paths)?;
        site.salt = 10;
        // SAFETY: both strings end with a zero byte, the value has that length.
        unsafe {
            libc::fsetxattr(site.file.as_raw_fd(), c"user.k".as_ptr(), c"value".as_ptr().cast(), 5, 0);
        }
        Ok(site)
    }

    /// As another one left it: what cannot be opened is not a file of the sequence.
    ///
    /// # Errors
    /// When the directory is gone.
    pub fn existing(directory: &Path, outside: &Path, paths: Paths) -> Result<Self> {
        let open = |name: &str| {
            let mut file = fs::File::options();
            file.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW);
            let spare = || file.clone().create(true).open(outside.join("spare"));
            file.open(directory.join(name)).or_else(|_| spare())
        };
        let path_only = |path: &Path| fs::File::options().read(true).custom_flags(libc::O_PATH).open(path);
        Ok(Self {
            directory: directory.into(),
            outside: outside.into(),
            paths,
            top: path_only(directory).with_context(|| directory.display().to_string())?,
            beside: path_only(&directory.join("e")).or_else(|_| path_only(directory))?,
            file: open("a")?,
            other: open("b")?,
            mapping: std::ptr::null_mut(),
            salt: 100,
        })
    }

    /// Where a name is for calls that take a directory.
    fn at(&self, name: &str) -> (i32, CString) {
        let text = |path: &Path| CString::new(path.as_os_str().as_bytes()).expect("no zero");
        if let Some(name) = name.strip_prefix("O/") {
            return (libc::AT_FDCWD, text(&self.outside.join(name)));
        }
        match self.paths {
            Paths::Absolute => (libc::AT_FDCWD, text(&self.directory.join(name))),
            Paths::Descriptor => (self.top.as_raw_fd(), text(Path::new(name))),
            Paths::Above => (self.beside.as_raw_fd(), text(&Path::new("..").join(name))),
            Paths::Working => (libc::AT_FDCWD, text(&Path::new("./d/..").join(name))),
        }
    }

    /// The same for calls that take only a path.
    fn path(&self, name: &str) -> CString {
        let (directory, path) = self.at(name);
        if directory == libc::AT_FDCWD {
            return path;
        }
        let through = format!("/proc/self/fd/{directory}/{}", path.to_str().expect("text"));
        CString::new(through).expect("no zero")
    }

    /// Does it.
    pub fn run(&mut self, operation: &Operation) {
        self.salt = self.salt.wrapping_add(1);
        if self.paths == Paths::Working {
            // Fails when the directory has moved out; then paths lead nowhere.
            let _ = std::env::set_current_dir(&self.directory);
        }
        match (operation.one, operation.two) {
            ("", _) => self.by_descriptor(operation.verb),
            (one, "") => self.one_name(operation.verb, one),
            (one, two) => self.two_names(operation.verb, one, two),
        }
        if self.paths == Paths::Working {
            let _ = std::env::set_current_dir("/");
        }
        if !self.mapping.is_null() && operation.verb != "map-keep" {
            // SAFETY: the mapping is there; the byte lies within the first page. A file that was cut
            // to nothing has no page there, so ask first.
            unsafe {
                let mut stat = std::mem::zeroed::<libc::stat>();
                if libc::fstat(self.file.as_raw_fd(), &raw mut stat) == 0 && stat.st_size > 100 {
                    self.mapping.cast::<u8>().add(usize::from(self.salt % 100)).write_volatile(self.salt);
                }
            }
        }
    }

    #[allow(clippy::too_many_lines, reason = "one arm for each operation")]
    fn by_descriptor(&mut self, verb: &str) {
        let fd = self.file.as_raw_fd();
        let small = pattern(100, self.salt);
        let large = pattern(5000, self.salt);
        let allocate = |mode: i32, offset: i64, length: i64| {
            // SAFETY: a system call without pointers.
            unsafe { libc::fallocate(fd, mode, offset, length) };
        };
        let iovec = |bytes: &[u8]| libc::iovec { iov_base: bytes.as_ptr() as *mut _, iov_len: bytes.len() };
        // SAFETY: buffers have the lengths that are given and outlive their calls (the bad ones are
        // meant to be refused by the kernel), strings end with a zero byte, descriptors that are
        // opened here are closed here.
        unsafe {
            match verb {
                "pwrite-begin" => drop_result(libc::pwrite(fd, small.as_ptr().cast(), 100, 0)),
                "pwrite-middle" => drop_result(libc::pwrite(fd, small.as_ptr().cast(), 100, 5000)),
                "pwrite-end" => drop_result(libc::pwrite(fd, small.as_ptr().cast(), 100, SIZE as i64)),
                "pwrite-beyond" => drop_result(libc::pwrite(fd, small.as_ptr().cast(), 100, 30_000)),
                "pwrite-large" => drop_result(libc::pwrite(fd, large.as_ptr().cast(), 5000, 3000)),
                "write-at-position" => drop_result(libc::write(fd, small.as_ptr().cast(), 100)),
                "write-nothing" => drop_result(libc::write(fd, small.as_ptr().cast(), 0)),
                "writev" => {
                    let parts = [iovec(&small), iovec(&large)];
                    libc::writev(fd, parts.as_ptr(), 2);
                }
                "pwritev2-append" => {
                    let parts = [iovec(&small)];
                    libc::pwritev2(fd, parts.as_ptr(), 1, 0, libc::RWF_APPEND);
                }
                "write-appending" => {
                    libc::fcntl(fd, libc::F_SETFL, libc::O_APPEND);
                    libc::write(fd, small.as_ptr().cast(), 100);
                    libc::pwrite(fd, small.as_ptr().cast(), 50, 10);
                    libc::fcntl(fd, libc::F_SETFL, 0);
                }
                "write-by-duplicate" => {
                    let copy = libc::dup(fd);
                    libc::write(copy, small.as_ptr().cast(), 100);
                    libc::close(copy);
                }
                "write-by-child" => {
                    let child = libc::fork();
                    if child == 0 {
                        libc::write(fd, small.as_ptr().cast(), 100);
                        libc::_exit(0);
                    }
                    libc::waitpid(child, std::ptr::null_mut(), 0);
                }
                "write-by-proc" => {
                    let path = CString::new(format!("/proc/self/fd/{fd}")).expect("no zero");
                    let again = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                    libc::write(again, small.as_ptr().cast(), 100);
                    libc::close(again);
                }
                "write-direct" => {
                    let path = CString::new(format!("/proc/self/fd/{fd}")).expect("no zero");
                    let again = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_DIRECT);
                    let mut block = std::ptr::null_mut();
                    if libc::posix_memalign(&raw mut block, 4096, 4096) == 0 {
                        std::ptr::write_bytes(block.cast::<u8>(), self.salt, 4096);
                        libc::pwrite(again, block, 4096, 4096);
                        libc::free(block);
                    }
                    libc::close(again);
                }
                "write-sync" => {
                    let parts = [iovec(&small)];
                    libc::pwritev2(fd, parts.as_ptr(), 1, 200, libc::RWF_DSYNC);
                }
                "write-bad-buffer" => drop_result(libc::pwrite(fd, 8 as *const _, 100, 0)),
                "writev-half-bad" => {
                    let parts = [iovec(&large), libc::iovec { iov_base: 8 as *mut _, iov_len: 100 }];
                    libc::pwritev(fd, parts.as_ptr(), 2, 1000);
                }
                "ftruncate-zero" => drop_result(libc::ftruncate(fd, 0) as isize),
                "ftruncate-short" => drop_result(libc::ftruncate(fd, 1234) as isize),
                "ftruncate-long" => drop_result(libc::ftruncate(fd, 40_000) as isize),
                "fallocate" => allocate(0, 8000, 3 * PAGE),
                "fallocate-keep" => allocate(libc::FALLOC_FL_KEEP_SIZE, 8000, 3 * PAGE),
                "fallocate-punch" => {
                    allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 100, 5000);
                }
                "fallocate-zero" => allocate(libc::FALLOC_FL_ZERO_RANGE, 300, 20_000),
                "fallocate-zero-keep" => {
                    allocate(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, 9000, 5000);
                }
                "fallocate-collapse" => allocate(libc::FALLOC_FL_COLLAPSE_RANGE, PAGE, PAGE),
                "fallocate-insert" => allocate(libc::FALLOC_FL_INSERT_RANGE, PAGE, PAGE),
                "fallocate-too-much" => allocate(0, 0, 1 << 50),
                "sendfile" => {
                    libc::lseek(self.other.as_raw_fd(), 0, libc::SEEK_SET);
                    libc::sendfile(fd, self.other.as_raw_fd(), std::ptr::null_mut(), 2000);
                }
                "splice" | "vmsplice" => {
                    let mut pipe = [0; 2];
                    if libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) == 0 {
                        if verb == "splice" {
                            libc::write(pipe[1], large.as_ptr().cast(), 5000);
                        } else {
                            let part = iovec(&large);
                            libc::vmsplice(pipe[1], &raw const part, 1, 0);
                        }
                        let mut offset = 2000i64;
                        libc::splice(pipe[0], std::ptr::null_mut(), fd, &raw mut offset, 5000, 0);
                        libc::close(pipe[0]);
                        libc::close(pipe[1]);
                    }
                }
                "copy-range" => {
                    let (mut from, mut to) = (1000i64, 7000i64);
                    libc::copy_file_range(self.other.as_raw_fd(), &raw mut from, fd, &raw mut to, 4000, 0);
                }
                "copy-range-self" => {
                    let (mut from, mut to) = (0i64, 20_000i64);
                    libc::copy_file_range(fd, &raw mut from, fd, &raw mut to, 4000, 0);
                }
                "clone" => drop_result(libc::ioctl(fd, 0x4004_9409, self.other.as_raw_fd()) as isize),
                "fchmod" => drop_result(libc::fchmod(fd, 0o640) as isize),
                "fchmod-setuid" => drop_result(libc::fchmod(fd, 0o6755) as isize),
                "fchown" => drop_result(libc::fchown(fd, 1000, 1001) as isize),
                "futimens" => {
                    let time = libc::timespec { tv_sec: 1_000_000 + i64::from(self.salt), tv_nsec: 5 };
                    libc::futimens(fd, [time, time].as_ptr());
                }
                "fsetxattr" => {
                    libc::fsetxattr(fd, c"user.k".as_ptr(), small.as_ptr().cast(), 60, 0);
                    libc::fsetxattr(fd, c"user.m".as_ptr(), small.as_ptr().cast(), 3, 0);
                }
                "fremovexattr" => drop_result(libc::fremovexattr(fd, c"user.k".as_ptr()) as isize),
                "capability" => {
                    // struct vfs_cap_data, revision 2: CAP_NET_RAW, effective.
                    let value: [u32; 5] = [0x0200_0001, 1 << 13, 0, 0, 0];
                    let name = c"security.capability".as_ptr();
                    libc::fsetxattr(fd, name, value.as_ptr().cast(), 20, 0);
                }
                "set-flags" => {
                    // FS_IOC_SETFLAGS with FS_NOATIME_FL.
                    let flags: libc::c_long = 0x80;
                    libc::ioctl(fd, 0x4008_6602, &raw const flags);
                }
                "fsync" => drop_result(libc::fsync(fd) as isize),
                "reopen-truncated" => {
                    let path = CString::new(format!("/proc/self/fd/{fd}")).expect("no zero");
                    let again = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_TRUNC);
                    libc::close(again);
                }
                "link-descriptor" => {
                    let (directory, path) = self.at("n");
                    libc::linkat(fd, c"".as_ptr(), directory, path.as_ptr(), libc::AT_EMPTY_PATH);
                }
                "link-proc-descriptor" => {
                    let (directory, path) = self.at("n");
                    let own = CString::new(format!("/proc/self/fd/{fd}")).expect("no zero");
                    let follow = libc::AT_SYMLINK_FOLLOW;
                    libc::linkat(libc::AT_FDCWD, own.as_ptr(), directory, path.as_ptr(), follow);
                }
                mapped => self.mapped(mapped),
            }
        }
    }

    fn mapped(&mut self, verb: &str) {
        let fd = self.file.as_raw_fd();
        if verb == "map-keep" && !self.mapping.is_null() {
            return;
        }
        // SAFETY: stores go only into pages that the file has (its size is asked first); the mapping
        // is removed here, or kept until the site is dropped.
        unsafe {
            let mut stat = std::mem::zeroed::<libc::stat>();
            if libc::fstat(fd, &raw mut stat) != 0 || stat.st_size < SIZE as i64 {
                return;
            }
            let sharing = if verb == "map-private" { libc::MAP_PRIVATE } else { libc::MAP_SHARED };
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let at = libc::mmap(std::ptr::null_mut(), SIZE, protection, sharing, fd, 0);
            if at == libc::MAP_FAILED {
                return;
            }
            for offset in [50, 4200, 9999] {
                at.cast::<u8>().add(offset).write_volatile(self.salt);
            }
            match verb {
                "map-store-sync" => {
                    libc::msync(at, SIZE, libc::MS_SYNC);
                }
                "map-append" => {
                    libc::ftruncate(fd, SIZE as i64 + 4000);
                    at.cast::<u8>().add(7).write_volatile(self.salt);
                }
                "map-keep" => {
                    self.mapping = at;
                    return;
                }
                _ => {}
            }
            libc::munmap(at, SIZE);
        }
    }

    fn open(&self, name: &str, flags: i32) -> i32 {
        let (directory, path) = self.at(name);
        // SAFETY: the path ends with a zero byte.
        unsafe { libc::openat(directory, path.as_ptr(), flags | libc::O_CLOEXEC | libc::O_NONBLOCK, 0o640) }
    }

    #[allow(clippy::too_many_lines, reason = "one arm for each operation")]
    fn one_name(&mut self, verb: &str, name: &str) {
        let (directory, at) = self.at(name);
        let path = self.path(name);
        let bytes = pattern(700, self.salt);
        let (file, value) = (bytes.as_ptr().cast::<libc::c_void>(), bytes.as_ptr().cast::<libc::c_void>());
        let write_and_close = |fd: i32| {
            if fd >= 0 {
                // SAFETY: the buffer has 700 bytes; the descriptor is closed once.
                unsafe {
                    libc::write(fd, file, 700);
                    libc::close(fd);
                }
            }
        };
        let close = |fd: i32| {
            if fd >= 0 {
                // SAFETY: it was opened by the caller and is not used any more.
                unsafe { libc::close(fd) };
            }
        };
        let (create, write) = (libc::O_CREAT, libc::O_WRONLY);
        // SAFETY: as in `by_descriptor`.
        unsafe {
            match verb {
                "create" => close(self.open(name, create | write)),
                "create-exclusive" => close(self.open(name, create | write | libc::O_EXCL)),
                "create-truncating" => close(self.open(name, create | write | libc::O_TRUNC)),
                "create-write" => write_and_close(self.open(name, create | write | libc::O_TRUNC)),
                "open-append" => write_and_close(self.open(name, write | libc::O_APPEND)),
                "temporary-link" => {
                    let fd = self.open(".", libc::O_TMPFILE | libc::O_RDWR);
                    if fd >= 0 {
                        libc::write(fd, file, 300);
                        libc::linkat(fd, c"".as_ptr(), directory, at.as_ptr(), libc::AT_EMPTY_PATH);
                        write_and_close(fd);
                    }
                }
                "mkdir" => drop_result(libc::mkdirat(directory, at.as_ptr(), 0o750) as isize),
                "rmdir" => drop_result(libc::unlinkat(directory, at.as_ptr(), libc::AT_REMOVEDIR) as isize),
                "unlink" => drop_result(libc::unlinkat(directory, at.as_ptr(), 0) as isize),
                "symlink" => drop_result(libc::symlinkat(c"d/x".as_ptr(), directory, at.as_ptr()) as isize),
                "fifo" => {
                    libc::mknodat(directory, at.as_ptr(), libc::S_IFIFO | 0o620, 0);
                }
                "device" => {
                    libc::mknodat(directory, at.as_ptr(), libc::S_IFCHR | 0o620, libc::makedev(1, 3));
                }
                "mknod-file" => {
                    libc::mknodat(directory, at.as_ptr(), libc::S_IFREG | 0o620, 0);
                }
                "socket" => {
                    let fd = libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
                    let mut address = std::mem::zeroed::<libc::sockaddr_un>();
                    address.sun_family = libc::AF_UNIX as u16;
                    let text = path.as_bytes();
                    if text.len() < address.sun_path.len() {
                        for (to, from) in address.sun_path.iter_mut().zip(text) {
                            *to = from.cast_signed();
                        }
                        libc::bind(fd, (&raw const address).cast(), size_of_val(&address) as u32);
                    }
                    libc::close(fd);
                }
                "chmod" => drop_result(libc::fchmodat(directory, at.as_ptr(), 0o711, 0) as isize),
                "lchown" => {
                    let follow = libc::AT_SYMLINK_NOFOLLOW;
                    libc::fchownat(directory, at.as_ptr(), 1002, 1003, follow);
                }
                "utimens" | "utimens-link" => {
                    let time = libc::timespec { tv_sec: 2_000_000 + i64::from(self.salt), tv_nsec: 7 };
                    let follow = if verb == "utimens" { 0 } else { libc::AT_SYMLINK_NOFOLLOW };
                    libc::utimensat(directory, at.as_ptr(), [time, time].as_ptr(), follow);
                }
                "truncate-short" => drop_result(libc::truncate(path.as_ptr(), 99) as isize),
                "truncate-long" => drop_result(libc::truncate(path.as_ptr(), 50_000) as isize),
                "setxattr" => {
                    libc::setxattr(path.as_ptr(), c"user.s".as_ptr(), value, 40, 0);
                }
                "lsetxattr" => {
                    libc::lsetxattr(path.as_ptr(), c"trusted.t".as_ptr(), value, 20, 0);
                }
                "removexattr" => drop_result(libc::removexattr(path.as_ptr(), c"user.k".as_ptr()) as isize),
                "acl" | "default-acl" => {
                    let list = access_list();
                    let name =
                        if verb == "acl" { c"system.posix_acl_access" } else { c"system.posix_acl_default" };
                    libc::setxattr(path.as_ptr(), name.as_ptr(), list.as_ptr().cast(), list.len(), 0);
                }
                "unlink-and-write" => {
                    let fd = self.open(name, write);
                    libc::unlinkat(directory, at.as_ptr(), 0);
                    write_and_close(fd);
                }
                other => unreachable!("no operation is called {other}"),
            }
        }
    }

    fn two_names(&mut self, verb: &str, one: &str, two: &str) {
        let (from, to) = (self.at(one), self.at(two));
        let flags = match verb {
            "rename-keeping" => libc::RENAME_NOREPLACE,
            "exchange" => libc::RENAME_EXCHANGE,
            "whiteout" => libc::RENAME_WHITEOUT,
            _ => 0,
        };
        // SAFETY: paths end with a zero byte and outlive the call.
        unsafe {
            match verb {
                "link" => libc::linkat(from.0, from.1.as_ptr(), to.0, to.1.as_ptr(), 0),
                "rename" => libc::renameat(from.0, from.1.as_ptr(), to.0, to.1.as_ptr()),
                _ => libc::renameat2(from.0, from.1.as_ptr(), to.0, to.1.as_ptr(), flags),
            };
        }
    }
}

/// The outcome of a call does not matter here.
fn drop_result(_: isize) {}

/// u::rw- u:1004:r-- g::r-- m::r-- o::--- as the kernel takes it (posix_acl_xattr.h, version 2).
fn access_list() -> Vec<u8> {
    let none = u32::MAX;
    let entries: [(u16, u16, u32); 5] =
        [(1, 6, none), (2, 4, 1004), (4, 4, none), (16, 4, none), (32, 0, none)];
    let mut list = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        list.extend(tag.to_le_bytes());
        list.extend(permissions.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    list
}
