//! A program that does one thing after another as a test tells it to, over a unix socket: with files that it keeps
//! open, positions, mappings, and descriptors that are handed over (SCM_RIGHTS).
//!
//! A line is a word and its arguments: `open SLOT PATH` (for reading and writing, made if it is not there),
//! `append SLOT PATH`, `seek SLOT OFFSET`, `write SLOT TEXT`, `read SLOT OFFSET TEXT` (that it is there), `sync SLOT`, `shell COMMAND`, `map SLOT`, `store SLOT OFFSET TEXT` (into the
//! mapping), `unmap SLOT`, `dup SLOT OTHER`, `fork PATH` (a child that ends when PATH is there), `unlink PATH`, `rename FROM TO`, `cd PATH`, `give SLOT` (the descriptor goes to the test), `take SLOT`
//! (one comes from it), `close SLOT`, `end`. Each is answered by a line: `done`, or what went wrong.

use std::collections::HashMap;
use std::ffi::c_void;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Seek, SeekFrom, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::{Place, workload};

/// Name of the socket in `aux`.
const SOCKET: &str = "puppet";
/// Bytes that are mapped of a file.
const MAPPED: usize = 1 << 16;

/// The test's side.
pub struct Puppet(BufReader<UnixStream>);

impl Puppet {
    /// The command that starts it, and what it will connect to.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn prepare(place: &Place) -> Result<(Vec<String>, UnixListener)> {
        Ok((workload("puppet", place), UnixListener::bind(place.aux.join(SOCKET))?))
    }

    /// When it was started.
    ///
    /// # Errors
    /// When it does not come.
    pub fn new(listener: &UnixListener) -> Result<Self> {
        Ok(Self(BufReader::new(listener.accept().context("the puppet does not come")?.0)))
    }

    /// Tells it to do something, and waits until it is done.
    ///
    /// # Errors
    /// What went wrong.
    pub fn does(&mut self, what: &str) -> Result<()> {
        self.tells(what)?;
        self.answers(what)
    }

    fn tells(&mut self, what: &str) -> Result<()> {
        Ok(self.0.get_mut().write_all(format!("{what}\n").as_bytes())?)
    }

    fn answers(&mut self, what: &str) -> Result<()> {
        let mut answer = String::new();
        self.0.read_line(&mut answer)?;
        ensure!(answer == "done\n", "{what}: {answer}");
        Ok(())
    }

    /// Has it hand over one of its descriptors.
    ///
    /// # Errors
    /// What went wrong.
    pub fn gives(&mut self, slot: u32) -> Result<File> {
        self.tells(&format!("give {slot}"))?;
        let got = receive(self.0.get_ref())?;
        self.answers("give")?;
        Ok(got.into())
    }

    /// Hands a descriptor over to it.
    ///
    /// # Errors
    /// What went wrong.
    pub fn takes(&mut self, slot: u32, file: &File) -> Result<()> {
        self.tells(&format!("take {slot}"))?;
        send(self.0.get_ref(), file)?;
        self.answers("take")
    }
}

fn send(to: &UnixStream, file: &File) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [file.as_fd()];
    ensure!(control.push(SendAncillaryMessage::ScmRights(&fds)), "no room for a descriptor");
    sendmsg(to, &[IoSlice::new(b"!")], &mut control, SendFlags::empty())?;
    Ok(())
}

fn receive(from: &UnixStream) -> Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(from, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fds = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fds.context("no descriptor came")
}

#[derive(Default)]
struct Held {
    files: HashMap<u32, File>,
    mapped: HashMap<u32, *mut u8>,
}

impl Held {
    fn file(&mut self, slot: u32) -> Result<&mut File> {
        self.files.get_mut(&slot).context("nothing is open there")
    }

    fn does(&mut self, line: &str, socket: &UnixStream) -> Result<()> {
        let words: Vec<&str> = line.splitn(3, ' ').collect();
        let slot = || words[1].parse::<u32>().context("a slot is a number");
        match words[0] {
            "open" => {
                let file =
                    File::options().read(true).write(true).create(true).truncate(false).open(words[2])?;
                self.files.insert(slot()?, file);
            }
            "append" => {
                let file = File::options().append(true).create(true).open(words[2])?;
                self.files.insert(slot()?, file);
            }
            "seek" => drop(self.file(slot()?)?.seek(SeekFrom::Start(words[2].parse()?))?),
            "write" => self.file(slot()?)?.write_all(words[2].as_bytes())?,
            "read" => {
                let (offset, text) = words[2].split_once(' ').context("OFFSET TEXT")?;
                let mut has = vec![0; text.len()];
                self.file(slot()?)?.read_exact_at(&mut has, offset.parse()?)?;
                ensure!(has == text.as_bytes(), "it is {:?}", String::from_utf8_lossy(&has));
            }
            "shell" => {
                let done = std::process::Command::new("sh").args(["-c", &line[6..]]).output()?;
                ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr).trim_end());
            }
            "sync" => self.file(slot()?)?.sync_all()?,
            "close" => drop(self.files.remove(&slot()?)),
            "map" => {
                let fd = self.file(slot()?)?.as_raw_fd();
                let (protection, null) = (libc::PROT_READ | libc::PROT_WRITE, std::ptr::null_mut());
                // SAFETY: a new mapping, which lives as long as the process.
                let at = unsafe { libc::mmap(null, MAPPED, protection, libc::MAP_SHARED, fd, 0) };
                ensure!(at != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
                self.mapped.insert(slot()?, at.cast());
            }
            "store" => {
                let at = *self.mapped.get(&slot()?).context("nothing is mapped there")?;
                let (offset, text) = words[2].split_once(' ').context("OFFSET TEXT")?;
                let offset: usize = offset.parse()?;
                ensure!(offset + text.len() <= MAPPED, "beyond the mapping");
                // SAFETY: within the mapping, as just checked; the file is as long as the test made it.
                unsafe { libc::memcpy(at.add(offset).cast(), text.as_ptr().cast::<c_void>(), text.len()) };
            }
            "unmap" => {
                let at = self.mapped.remove(&slot()?).context("nothing is mapped there")?;
                // SAFETY: mapped by us, this long, and nobody has the address any more.
                let done = unsafe { libc::munmap(at.cast(), MAPPED) };
                ensure!(done == 0, "munmap: {}", std::io::Error::last_os_error());
            }
            "dup" => {
                let twin = self.file(slot()?)?.try_clone()?;
                self.files.insert(words[2].parse()?, twin);
            }
            "fork" => {
                let until = std::ffi::CString::new(words[1])?;
                // SAFETY: there is one thread; the child makes nothing but system calls.
                match unsafe { libc::fork() } {
                    -1 => return Err(std::io::Error::last_os_error().into()),
                    0 => loop {
                        // SAFETY: a path that lives, and calls that keep nothing.
                        unsafe {
                            if libc::access(until.as_ptr(), libc::F_OK) == 0 {
                                libc::_exit(0);
                            }
                            libc::usleep(5000);
                        }
                    },
                    _ => {}
                }
            }
            "unlink" => fs::remove_file(words[1])?,
            "rename" => fs::rename(words[1], words[2])?,
            "cd" => std::env::set_current_dir(words[1])?,
            "give" => send(socket, self.file(slot()?)?)?,
            "take" => drop(self.files.insert(slot()?, receive(socket)?.into())),
            other => anyhow::bail!("no such word: {other}"),
        }
        Ok(())
    }
}

/// The program.
///
/// # Errors
/// When the test is gone.
pub fn run(place: &Place) -> Result<()> {
    std::env::set_current_dir(&place.data)?;
    let socket = UnixStream::connect(place.aux.join(Path::new(SOCKET)))?;
    place.ready()?;
    let mut held = Held::default();
    let mut lines = BufReader::with_capacity(1, socket.try_clone()?);
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line)? == 0 || line == "end\n" {
            return Ok(());
        }
        let answer = match held.does(line.trim_end(), &socket) {
            Ok(()) => "done\n".to_owned(),
            Err(e) => format!("{e:#}\n"),
        };
        (&socket).write_all(answer.as_bytes())?;
    }
}
