//! System calls of a daemon that fail as the test says, or at which it is killed, without a change of the daemon.
//!
//! A seccomp filter hands every call that changes or syncs a file to the test, which counts those below one
//! folder and lets them go on or fail. All threads are counted together, so the n-th call is the same one in
//! every run in which the daemon does the same. With [`Fault::torn`] a write leaves half of its bytes before it
//! fails, as a full or broken disk may.
//!
//! Assumes a kernel that hands out such calls and continues them (Linux 5.5), and that nobody else filters the
//! daemon.

use std::fs;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// What happens at a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It fails with this number.
    Fails(i32),
    /// The daemon is killed before it.
    Kills,
    /// The daemon stands still before it, [`Faults::at_halt`] is done, then it is killed.
    Halts,
}

/// Which calls fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The first, counted from 1.
    pub at: u64,
    /// All from then on, until [`Faults::lift`]; else this one.
    pub lasting: bool,
    /// What happens.
    pub effect: Effect,
    /// A write leaves half of its bytes.
    pub torn: bool,
}

/// The calls of a daemon below a folder, over all its restarts.
#[derive(Debug)]
pub struct Faults {
    below: PathBuf,
    shared: Arc<Mutex<Shared>>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

type AtCall = Box<dyn FnMut(&Path) + Send>;

#[derive(Default)]
struct Shared {
    count: u64,
    fault: Option<Fault>,
    /// What failed, and where.
    failed: Vec<String>,
    at_halt: Option<Box<dyn FnMut() + Send>>,
    at_call: Option<AtCall>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("count", &self.count)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}

fn locked(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a call says which file it means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// Its first argument is the descriptor.
    Descriptor,
    /// A directory and a path: these two arguments.
    Path(usize, usize),
}

/// The calls that are looked at. `openat` only where it may make a file.
const CALLS: &[(libc::c_long, &str, Target)] = &[
    (libc::SYS_write, "write", Target::Descriptor),
    (libc::SYS_pwrite64, "pwrite64", Target::Descriptor),
    (libc::SYS_writev, "writev", Target::Descriptor),
    (libc::SYS_pwritev, "pwritev", Target::Descriptor),
    (libc::SYS_pwritev2, "pwritev2", Target::Descriptor),
    (libc::SYS_copy_file_range, "copy_file_range", Target::Descriptor),
    (libc::SYS_ftruncate, "ftruncate", Target::Descriptor),
    (libc::SYS_fallocate, "fallocate", Target::Descriptor),
    (libc::SYS_fsync, "fsync", Target::Descriptor),
    (libc::SYS_fdatasync, "fdatasync", Target::Descriptor),
    (libc::SYS_syncfs, "syncfs", Target::Descriptor),
    (libc::SYS_sync_file_range, "sync_file_range", Target::Descriptor),
    (libc::SYS_openat, "openat", Target::Path(0, 1)),
    (libc::SYS_mkdir, "mkdir", Target::Path(6, 0)),
    (libc::SYS_mkdirat, "mkdirat", Target::Path(0, 1)),
    (libc::SYS_mknodat, "mknodat", Target::Path(0, 1)),
    (libc::SYS_symlinkat, "symlinkat", Target::Path(1, 2)),
    (libc::SYS_linkat, "linkat", Target::Path(2, 3)),
    (libc::SYS_rename, "rename", Target::Path(6, 1)),
    (libc::SYS_renameat, "renameat", Target::Path(2, 3)),
    (libc::SYS_renameat2, "renameat2", Target::Path(2, 3)),
    (libc::SYS_unlink, "unlink", Target::Path(6, 0)),
    (libc::SYS_unlinkat, "unlinkat", Target::Path(0, 1)),
    (libc::SYS_chmod, "chmod", Target::Path(6, 0)),
    (libc::SYS_fchmodat, "fchmodat", Target::Path(0, 1)),
    (libc::SYS_fchownat, "fchownat", Target::Path(0, 1)),
    (libc::SYS_utimensat, "utimensat", Target::Path(0, 1)),
    (libc::SYS_setxattr, "setxattr", Target::Path(6, 0)),
    (libc::SYS_removexattr, "removexattr", Target::Path(6, 0)),
];

/// Where the number stands in `struct seccomp_data`, and argument n.
const NUMBER: u32 = 0;
const fn argument(n: u32) -> u32 {
    16 + 8 * n
}

/// `struct seccomp_notif` (linux/seccomp.h).
#[repr(C)]
#[derive(Clone, Copy)]
struct Notice {
    id: u64,
    pid: u32,
    flags: u32,
    number: i32,
    arch: u32,
    instruction: u64,
    arguments: [u64; 6],
}

/// `struct seccomp_notif_resp`.
#[repr(C)]
struct Answer {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

const fn iowr(number: u64, size: usize) -> u64 {
    3 << 30 | (size as u64) << 16 | (b'!' as u64) << 8 | number
}
const RECEIVE: u64 = iowr(0, size_of::<Notice>());
const SEND: u64 = iowr(1, size_of::<Answer>());
const GO_ON: u32 = 1;

/// The filter: what is in [`CALLS`] is handed out, all else goes on.
fn filter() -> Vec<libc::sock_filter> {
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = |at: u32| op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, at);
    let answer = |what: u32| op(libc::BPF_RET | libc::BPF_K, 0, 0, what);
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let any_bit = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
    let mut filter = vec![load(NUMBER)];
    for (number, ..) in CALLS {
        if *number == libc::SYS_openat {
            filter.extend([
                op(equal, 0, 4, *number as u32),
                load(argument(2)),
                op(any_bit, 0, 1, libc::O_CREAT as u32),
                answer(libc::SECCOMP_RET_USER_NOTIF),
                answer(libc::SECCOMP_RET_ALLOW),
            ]);
        } else {
            filter.extend([op(equal, 0, 1, *number as u32), answer(libc::SECCOMP_RET_USER_NOTIF)]);
        }
    }
    filter.push(answer(libc::SECCOMP_RET_ALLOW));
    filter
}

impl Faults {
    /// None yet; calls below this folder are counted.
    #[must_use]
    pub fn new(below: &Path) -> Self {
        Self { below: below.into(), shared: Arc::default(), threads: Vec::new() }
    }

    /// These calls fail, of those from now on.
    pub fn set(&self, fault: Fault) {
        let mut shared = locked(&self.shared);
        shared.count = 0;
        shared.failed.clear();
        shared.fault = Some(fault);
    }

    /// What is done while a daemon stands still ([`Effect::Halts`]).
    pub fn at_halt(&self, work: impl FnMut() + Send + 'static) {
        locked(&self.shared).at_halt = Some(Box::new(work));
    }

    /// What is done before each call, with its file.
    pub fn at_call(&self, work: impl FnMut(&Path) + Send + 'static) {
        locked(&self.shared).at_call = Some(Box::new(work));
    }

    /// No call fails any more.
    pub fn lift(&self) {
        locked(&self.shared).fault = None;
    }

    /// Calls since [`Faults::set`], or since the beginning.
    #[must_use]
    pub fn count(&self) -> u64 {
        locked(&self.shared).count
    }

    /// The calls that failed, as text.
    #[must_use]
    pub fn failed(&self) -> Vec<String> {
        locked(&self.shared).failed.clone()
    }

    /// The daemon that this command starts is looked at. The command is for one start.
    ///
    /// # Errors
    /// When no socket pair can be made.
    pub fn hold<'a>(&mut self, command: &'a mut Command) -> io::Result<&'a mut Command> {
        let (ours, theirs) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )?;
        let filter = filter();
        // SAFETY: between fork and exec only system calls are made, on memory that was there before the fork.
        unsafe { command.pre_exec(move || install(&filter, theirs.as_raw_fd())) };
        let (below, shared) = (self.below.clone(), self.shared.clone());
        self.threads.push(std::thread::spawn(move || {
            let listener = received(ours.as_fd())?;
            drop(ours);
            attend(&listener, &below, &shared)
        }));
        Ok(command)
    }
}

/// Puts the filter on this process and hands its listener over.
fn install(filter: &[libc::sock_filter], socket: RawFd) -> io::Result<()> {
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program lives for the call.
    let listener = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    if listener < 0 {
        return Err(io::Error::last_os_error());
    }
    let listener = listener as RawFd;
    // A control message by hand: nothing may allocate here.
    let mut byte = [0u8];
    let mut control = [0u64; 4];
    // SAFETY: all pointers are to locals, and the control buffer has room for one descriptor.
    unsafe {
        let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as usize;
        let head = libc::CMSG_FIRSTHDR(&raw const message);
        (*head).cmsg_level = libc::SOL_SOCKET;
        (*head).cmsg_type = libc::SCM_RIGHTS;
        (*head).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
        libc::CMSG_DATA(head).cast::<RawFd>().write_unaligned(listener);
        if libc::sendmsg(socket, &raw const message, 0) < 0 {
            return Err(io::Error::last_os_error());
        }
        // Ours is the other one; with this one open calls would wait for an answer for ever.
        libc::close(listener);
    }
    Ok(())
}

fn received(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let found = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    found.ok_or_else(|| io::Error::other("the daemon did not start"))
}

/// Until the daemon is gone.
fn attend(listener: &OwnedFd, below: &Path, shared: &Mutex<Shared>) -> io::Result<()> {
    loop {
        let mut ready = [PollFd::new(listener, PollFlags::IN)];
        poll(&mut ready, None)?;
        if !ready[0].revents().contains(PollFlags::IN) {
            return Ok(());
        }
        // SAFETY: all zeros is a Notice, and the kernel asks for zeros.
        let mut notice: Notice = unsafe { std::mem::zeroed() };
        // SAFETY: the notice is as long as the request says.
        if unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, &raw mut notice) } < 0 {
            match io::Error::last_os_error().raw_os_error() {
                // The caller was killed meanwhile.
                Some(libc::ENOENT | libc::EINTR) => continue,
                _ => return Err(io::Error::last_os_error()),
            }
        }
        let error = judge(&notice, below, shared);
        let flags = if error == 0 { GO_ON } else { 0 };
        let answer = Answer { id: notice.id, value: 0, error: -error, flags };
        // SAFETY: the answer is as long as the request says. A caller that is gone needs none.
        unsafe { libc::ioctl(listener.as_raw_fd(), SEND, &raw const answer) };
    }
}

/// The error for a call; 0 lets it go on.
fn judge(notice: &Notice, below: &Path, shared: &Mutex<Shared>) -> i32 {
    let found = CALLS.iter().find(|(number, ..)| *number == libc::c_long::from(notice.number));
    let Some((_, name, target)) = found else { return 0 };
    let Some(path) = path_of(notice, *target).filter(|path| path.starts_with(below)) else { return 0 };
    let mut shared = locked(shared);
    shared.count += 1;
    let count = shared.count;
    let hit = shared.fault.filter(|fault| count == fault.at || (fault.lasting && count > fault.at));
    if let Some(work) = &mut shared.at_call {
        work(&path);
    }
    let Some(fault) = hit else { return 0 };
    let bytes = if fault.torn && fault.at == count { write_half(notice, name) } else { 0 };
    shared.failed.push(format!("call {count}: {name} {} ({bytes} bytes done)", path.display()));
    // SAFETY: a system call without pointers; the caller waits for the answer, so the number is its own.
    let signal = |signal| unsafe { libc::kill(notice.pid as i32, signal) };
    match fault.effect {
        Effect::Fails(error) => error,
        Effect::Kills => {
            signal(libc::SIGKILL);
            libc::EIO
        }
        Effect::Halts => {
            signal(libc::SIGSTOP);
            if let Some(work) = &mut shared.at_halt {
                work();
            }
            signal(libc::SIGKILL);
            libc::EIO
        }
    }
}

fn path_of(notice: &Notice, target: Target) -> Option<PathBuf> {
    let link = |fd: i32| fs::read_link(format!("/proc/{}/fd/{fd}", notice.pid)).ok();
    match target {
        Target::Descriptor => link(notice.arguments[0] as i32),
        Target::Path(directory, path) => {
            let text = string_of(notice.pid, notice.arguments[path])?;
            if let Some(fd) = text.to_str().and_then(|t| t.strip_prefix("/proc/self/fd/")) {
                return link(fd.parse().ok()?);
            }
            if text.is_absolute() || directory == 6 {
                return Some(text);
            }
            match notice.arguments[directory] as i32 {
                libc::AT_FDCWD => Some(text),
                fd => Some(link(fd)?.join(text)),
            }
        }
    }
}

fn memory_of(pid: u32, at: u64, into: &mut [u8]) -> usize {
    let ours = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let theirs = libc::iovec { iov_base: at as *mut libc::c_void, iov_len: into.len() };
    // SAFETY: what is read goes into a buffer of ours; the other address is only looked at by the kernel.
    let read = unsafe { libc::process_vm_readv(pid as i32, &raw const ours, 1, &raw const theirs, 1, 0) };
    read.max(0) as usize
}

fn string_of(pid: u32, at: u64) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::new();
    while bytes.len() < libc::PATH_MAX as usize {
        // Not over the end of a page: the next one may not be there.
        let from = at + bytes.len() as u64;
        let mut page = vec![0; (4096 - from % 4096) as usize];
        let read = memory_of(pid, from, &mut page);
        if let Some(end) = page[..read].iter().position(|b| *b == 0) {
            bytes.extend_from_slice(&page[..end]);
            return Some(std::ffi::OsString::from_vec(bytes).into());
        }
        if read < page.len() {
            return None;
        }
        bytes.extend_from_slice(&page);
    }
    None
}

/// Does the first half of a write in the place of the daemon, by its own descriptor; how many bytes.
fn write_half(notice: &Notice, name: &str) -> usize {
    let half = || -> io::Result<usize> {
        let mut bytes = vec![0; notice.arguments[2] as usize / 2];
        let read = memory_of(notice.pid, notice.arguments[1], &mut bytes);
        bytes.truncate(read);
        let status = fs::read_to_string(format!("/proc/{}/status", notice.pid))?;
        let leader = status.lines().find_map(|l| l.strip_prefix("Tgid:")).and_then(|t| t.trim().parse().ok());
        let leader = leader.and_then(Pid::from_raw).ok_or_else(|| io::Error::other("no thread group"))?;
        let process = pidfd_open(leader, PidfdFlags::empty())?;
        let fd = pidfd_getfd(&process, notice.arguments[0] as RawFd, PidfdGetfdFlags::empty())?;
        match name {
            "pwrite64" => Ok(rustix::io::pwrite(&fd, &bytes, notice.arguments[3])?),
            _ => Ok(rustix::io::write(&fd, &bytes)?),
        }
    };
    match name {
        "write" | "pwrite64" => half().unwrap_or(0),
        _ => 0,
    }
}
