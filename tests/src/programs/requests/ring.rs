//! Rounds by io_uring: writes of every kind, and every operation that takes paths.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Result, bail, ensure};
use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode, types};

use super::{DIRECTORIES, Files, Mode, PIECE, PIECES, SLOTS};
use crate::programs::Place;

/// The rings of the program and what it has open beside the files of all modes.
pub(super) struct Rings {
    mode: Mode,
    ring: IoUring,
    /// For direct I/O, where completions are polled for.
    polled: Option<IoUring>,
    directory: OwnedFd,
    pipe: (OwnedFd, OwnedFd),
    iovecs: Vec<libc::iovec>,
}

/// `-ERESTARTSYS` (include/linux/errno.h).
const RESTART: i32 = -512;
/// Numbers of operations that the crate has no type for (include/uapi/linux/io_uring.h).
const OP_SOCKET: u8 = 45;
const OP_FTRUNCATE: u8 = 55;
const OP_BIND: u8 = 56;
const OP_WRITEV_FIXED: u8 = 61;

/// `struct io_uring_sqe`, the fields that the operations above use.
#[repr(C)]
#[derive(Clone, Copy)]
struct Raw {
    opcode: u8,
    flags: u8,
    priority: u16,
    fd: i32,
    offset: u64,
    address: u64,
    len: u32,
    rw_flags: u32,
    data: u64,
    buffer: u16,
    personality: u16,
    file_index: u32,
    rest: [u64; 2],
}

fn raw(opcode: u8, fd: i32, offset: u64, address: u64, len: u32) -> Entry {
    let raw = Raw {
        opcode,
        flags: 0,
        priority: 0,
        fd,
        offset,
        address,
        len,
        rw_flags: 0,
        data: 0,
        buffer: 0,
        personality: 0,
        file_index: 0,
        rest: [0; 2],
    };
    // SAFETY: an entry is this struct of the kernel, 64 bytes of integers.
    unsafe { std::mem::transmute::<Raw, Entry>(raw) }
}

/// Whether the kernel has an operation.
fn has(ring: &IoUring, opcode: u8) -> bool {
    let mut probe = io_uring::Probe::new();
    ring.submitter().register_probe(&mut probe).is_ok() && probe.is_supported(opcode)
}

/// Hands in what was pushed and waits for completions. A stop of the program interrupts the wait: there
/// may be fewer then.
fn wait(ring: &IoUring, completions: usize) -> Result<()> {
    match ring.submit_and_wait(completions) {
        Err(e) if e.raw_os_error() == Some(libc::EINTR) => Ok(()),
        other => Ok(other.map(drop)?),
    }
}

impl Rings {
    pub(super) fn new(place: &Place, mode: Mode, files: &Files) -> Result<Self> {
        let mut builder = IoUring::builder();
        if mode == Mode::Polled {
            builder.setup_sqpoll(20);
        }
        let ring = builder.build(64)?;
        ring.submitter().register_files(&[files.blocks.as_raw_fd()])?;
        let polled = if mode == Mode::Direct {
            let ring = IoUring::builder().setup_iopoll().build(64)?;
            ring.submitter().register_files(&[files.blocks.as_raw_fd()])?;
            Some(ring)
        } else {
            None
        };
        let directory = File::open(&place.data)?.into();
        let mut ends = [0; 2];
        // SAFETY: the kernel writes two descriptors, which are ours then.
        let pipe = unsafe {
            ensure!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) == 0, "pipe2");
            (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1]))
        };
        Ok(Self { mode, ring, polled, directory, pipe, iovecs: Vec::new() })
    }

    /// Hands operations in, all at once, and waits for all; their results.
    fn all(&mut self, mut entries: Vec<Entry>) -> Result<Vec<i32>> {
        let silent = self.mode == Mode::Silent;
        let count = entries.len();
        if silent {
            // Success is not told; what is linked behind it tells that it is over.
            entries = entries
                .into_iter()
                .flat_map(|e| {
                    [
                        e.flags(Flags::IO_LINK | Flags::SKIP_SUCCESS),
                        opcode::Nop::new().build().user_data(1000),
                    ]
                })
                .collect();
        } else {
            entries = entries.into_iter().enumerate().map(|(i, e)| e.user_data(i as u64)).collect();
        }
        for entry in &entries {
            // SAFETY: everything that the entries point to lives until this returns, and that is
            // after their completions.
            unsafe { self.ring.submission().push(entry)? };
        }
        wait(&self.ring, count)?;
        let mut results = vec![0; count];
        let mut seen = 0;
        while seen < count {
            wait(&self.ring, 1)?;
            for completion in self.ring.completion() {
                if completion.user_data() >= 1000 {
                    ensure!(completion.result() >= 0, "a chain broke: {}", completion.result());
                } else if silent {
                    bail!("an operation ended with {}", completion.result());
                } else {
                    results[completion.user_data() as usize] = completion.result();
                }
                seen += 1;
            }
        }
        Ok(results)
    }

    /// One operation, which must succeed.
    fn one(&mut self, what: &str, entry: Entry) -> Result<i32> {
        let result = self.all(vec![entry])?[0];
        ensure!(result >= 0, "{what}: {}", std::io::Error::from_raw_os_error(-result));
        Ok(result)
    }

    pub(super) fn round(&mut self, files: &mut Files, round: u64) -> Result<()> {
        if self.polled.is_some() {
            self.pieces_polled(files, round)?;
        } else {
            self.pieces(files, round)?;
        }
        let line = round.to_le_bytes();
        let lines = types::Fd(files.lines.as_raw_fd());
        self.one("a line", opcode::Write::new(lines, line.as_ptr(), 8).offset(u64::MAX).build())?;
        self.make_directory(round)
    }

    /// The pieces of a round, all in flight together, each by another way of writing.
    fn pieces(&mut self, files: &mut Files, round: u64) -> Result<()> {
        let at = (round % SLOTS) * (PIECES * PIECE) as u64;
        let memory = files.memory.bytes();
        if self.iovecs.is_empty() {
            self.iovecs = memory
                .chunks(PIECE)
                .map(|piece| libc::iovec { iov_base: piece.as_ptr().cast_mut().cast(), iov_len: PIECE })
                .collect();
            // SAFETY: the memory lives as long as the program.
            unsafe { self.ring.submitter().register_buffers(&self.iovecs)? };
        }
        let fd = types::Fd(files.blocks.as_raw_fd());
        let vectored = has(&self.ring, OP_WRITEV_FIXED);
        let entries = (0..PIECES)
            .map(|piece| {
                let offset = at + (piece * PIECE) as u64;
                let buffer = self.iovecs[piece].iov_base.cast::<u8>().cast_const();
                let plain = opcode::Write::new(fd, buffer, PIECE as u32).offset(offset).build();
                match piece {
                    1 => opcode::Writev::new(fd, &raw const self.iovecs[piece], 1).offset(offset).build(),
                    2 => {
                        opcode::WriteFixed::new(fd, buffer, PIECE as u32, piece as u16).offset(offset).build()
                    }
                    3 => opcode::Write::new(types::Fixed(0), buffer, PIECE as u32).offset(offset).build(),
                    4 => plain.flags(Flags::ASYNC),
                    5 if vectored => {
                        let vector = &raw const self.iovecs[piece] as u64;
                        let mut entry = raw(OP_WRITEV_FIXED, fd.0, offset, vector, 1);
                        // SAFETY: as in `raw`.
                        unsafe { (*(&raw mut entry).cast::<Raw>()).buffer = piece as u16 };
                        entry
                    }
                    // In a chain with the next one.
                    6 => plain.flags(Flags::IO_LINK),
                    _ => plain,
                }
            })
            .collect();
        for (piece, written) in self.all(entries)?.into_iter().enumerate() {
            ensure!(self.mode == Mode::Silent || written == PIECE as i32, "piece {piece}: {written}");
        }
        Ok(())
    }

    /// The same on the ring whose completions are polled for. Where the device cannot do that the
    /// other ring takes them.
    fn pieces_polled(&mut self, files: &mut Files, round: u64) -> Result<()> {
        let at = (round % SLOTS) * (PIECES * PIECE) as u64;
        let Some(ring) = &mut self.polled else { return Ok(()) };
        for piece in 0..PIECES {
            let buffer = files.memory.bytes()[piece * PIECE..].as_ptr();
            let entry = opcode::Write::new(types::Fixed(0), buffer, PIECE as u32)
                .offset(at + (piece * PIECE) as u64)
                .build()
                .user_data(piece as u64);
            // SAFETY: the memory lives as long as the program.
            unsafe { ring.submission().push(&entry)? };
        }
        let mut seen = 0;
        while seen < PIECES {
            wait(ring, PIECES - seen)?;
            for completion in ring.completion() {
                seen += 1;
                if completion.result() == -libc::EOPNOTSUPP {
                    let piece = completion.user_data() as usize;
                    let bytes = &files.memory.bytes()[piece * PIECE..(piece + 1) * PIECE];
                    let entry =
                        opcode::Write::new(types::Fd(files.blocks.as_raw_fd()), bytes.as_ptr(), PIECE as u32)
                            .offset(at + (piece * PIECE) as u64)
                            .build();
                    // SAFETY: as above.
                    unsafe { self.ring.submission().push(&entry)? };
                    // A stop interrupts the wait.
                    let result = loop {
                        wait(&self.ring, 1)?;
                        let completion = self.ring.completion().next();
                        if let Some(completion) = completion {
                            break completion.result();
                        }
                    };
                    ensure!(result == PIECE as i32, "piece {piece}: {result}");
                } else {
                    ensure!(completion.result() == PIECE as i32, "{}", completion.result());
                }
            }
        }
        Ok(())
    }

    /// A directory by every operation that takes paths or changes a file in another way.
    fn make_directory(&mut self, round: u64) -> Result<()> {
        let top = types::Fd(self.directory.as_raw_fd());
        let name = |rest: &str| path(&format!("d-{}{rest}", round % DIRECTORIES));
        let dir = name("");
        if round > DIRECTORIES {
            for rest in ["/g", "/h", "/s", "/p", "/socket"] {
                let path = name(rest);
                // The socket is there only where the kernel has the operation.
                let removed = self.all(vec![opcode::UnlinkAt::new(top, path.as_ptr()).build()]);
                ensure!(rest == "/socket" || removed?[0] >= 0, "{rest} cannot be removed");
            }
            let remove = opcode::UnlinkAt::new(top, dir.as_ptr()).flags(libc::AT_REMOVEDIR).build();
            self.one("rmdir", remove)?;
        }
        self.one("mkdirat", opcode::MkDirAt::new(top, dir.as_ptr()).mode(0o755).build())?;
        let (f, g, h, s, p) = (name("/f"), name("/g"), name("/h"), name("/s"), name("/p"));
        let file = self.open(top, &f)?;
        let fd = types::Fd(file.as_raw_fd());
        let text = content(round);
        self.one("write", opcode::Write::new(fd, text.as_ptr(), text.len() as u32).build())?;
        self.one("fallocate", opcode::Fallocate::new(fd, 16384).build())?;
        let end = text.len() as u64;
        if has(&self.ring, OP_FTRUNCATE) {
            self.one("ftruncate", raw(OP_FTRUNCATE, fd.0, end, 0, 0))?;
        } else {
            file.set_len(end)?;
        }
        let value = round.to_le_bytes();
        let attribute = c"user.round";
        let set = opcode::FSetXattr::new(fd, attribute.as_ptr(), value.as_ptr().cast(), 8).build();
        self.one("fsetxattr", set)?;
        // The ring closes it.
        self.one("close", opcode::Close::new(types::Fd(std::os::fd::IntoRawFd::into_raw_fd(file))).build())?;
        self.one("renameat", opcode::RenameAt::new(top, f.as_ptr(), top, g.as_ptr()).build())?;
        self.one("linkat", opcode::LinkAt::new(top, g.as_ptr(), top, h.as_ptr()).build())?;
        self.one("symlinkat", opcode::SymlinkAt::new(top, c"g".as_ptr(), s.as_ptr()).build())?;
        // Paths of setxattr start from the working directory: here, from the root.
        let whole = Path::new("/proc/self/fd").join(top.0.to_string()).canonicalize()?;
        let whole = CString::new([whole.as_os_str().as_bytes(), b"/", g.as_bytes()].concat())?;
        let set =
            opcode::SetXattr::new(c"user.path".as_ptr(), value.as_ptr().cast(), whole.as_ptr(), 8).build();
        self.one("setxattr", set)?;
        self.splice(top, &p, &text)?;
        self.bind(&whole)
    }

    /// Opens a new file.
    fn open(&mut self, top: types::Fd, name: &CStr) -> Result<File> {
        let flags = libc::O_CREAT | libc::O_RDWR | libc::O_EXCL;
        let entry = opcode::OpenAt::new(top, name.as_ptr()).flags(flags).mode(0o644).build();
        if self.mode == Mode::Silent {
            // The number of the descriptor would not be told.
            self.one("openat", entry)?;
            return Ok(File::options().read(true).write(true).open(format!(
                "/proc/self/fd/{}/{}",
                top.0,
                name.to_str()?
            ))?);
        }
        let fd = self.one("openat", entry)?;
        // SAFETY: the kernel just made this descriptor for us.
        Ok(unsafe { File::from_raw_fd(fd) })
    }

    fn splice(&mut self, top: types::Fd, name: &CStr, text: &[u8]) -> Result<()> {
        let file = self.open(top, name)?;
        rustix::io::write(&self.pipe.1, text)?;
        let (from, to) = (types::Fd(self.pipe.0.as_raw_fd()), types::Fd(file.as_raw_fd()));
        loop {
            let entry = opcode::Splice::new(from, -1, to, 0, text.len() as u32).build();
            match self.all(vec![entry])?[0] {
                // A stop came before a byte was moved (splice_from_pipe_next() in fs/splice.c), and io_uring, unlike for
                // reads and writes, hands that on as it is.
                RESTART => {}
                moved if moved >= 0 => return Ok(()),
                error => bail!("splice: {}", std::io::Error::from_raw_os_error(-error)),
            }
        }
    }

    /// A socket with a name, where the kernel can bind by a ring.
    fn bind(&mut self, beside: &CStr) -> Result<()> {
        if !has(&self.ring, OP_BIND) || !has(&self.ring, OP_SOCKET) {
            return Ok(());
        }
        let path = Path::new(std::ffi::OsStr::from_bytes(beside.to_bytes())).with_file_name("socket");
        let path = path.as_os_str().as_bytes();
        // SAFETY: integers only, so zero is a value.
        let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
        address.sun_family = libc::AF_UNIX as u16;
        if path.len() >= address.sun_path.len() {
            return Ok(());
        }
        for (to, from) in address.sun_path.iter_mut().zip(path) {
            *to = *from as libc::c_char;
        }
        let socket =
            rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None)?;
        let len = (2 + path.len()) as u64;
        self.one("bind", raw(OP_BIND, socket.as_raw_fd(), len, &raw const address as u64, 0))?;
        Ok(())
    }
}

fn path(name: &str) -> CString {
    CString::new(name).expect("names here have no zero")
}

fn content(round: u64) -> Vec<u8> {
    format!("round {round}\n").repeat(1 + (round % 300) as usize).into_bytes()
}

/// What a round's directory must hold.
pub(super) fn check(tree: &Path, round: u64, wrong: &mut Vec<String>) -> Result<()> {
    let dir = tree.join(format!("d-{}", round % DIRECTORIES));
    let mut names: Vec<_> =
        std::fs::read_dir(&dir).into_iter().flatten().flatten().map(|e| e.file_name()).collect();
    names.sort();
    names.retain(|name| name != "socket");
    if names != ["g", "h", "p", "s"] {
        wrong.push(format!("round {round} has {names:?}"));
        return Ok(());
    }
    for name in ["g", "h", "p"] {
        if std::fs::read(dir.join(name))? != content(round) {
            wrong.push(format!("{name} of round {round} has another content"));
        }
    }
    if std::fs::read_link(dir.join("s"))? != Path::new("g") {
        wrong.push(format!("the symlink of round {round}"));
    }
    Ok(())
}
