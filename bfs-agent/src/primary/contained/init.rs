//! The two processes between the agent and the command: the outer one, which waits, and the first process of the
//! new PID namespace. Both are this program again; neither is in the command's cgroup, and neither is followed.
//!
//! They have left the agent's terminal and session: what the user types goes to the agent, which passes it on as
//! messages. For processes that run already there are no namespaces, and one process is both: tools begin in it, and
//! who is restored becomes its child. When the agent is gone the command goes on, and they end with it. A tool that is at work then may
//! leave the command's cgroup frozen as it found it (CRIU does, after a dump): the first process thaws it.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind_recursive, mount_change};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{getpid, set_child_subreaper, setsid};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::messages::{Order, Role, Said, hear, tell};
use super::{CONTROL, STANDARD};
use crate::primary::process::exit_status;

/// The outer process: makes the namespaces, and waits for the first process of them. `beside`: there are none, it is the
/// first process itself, for what is in this cgroup.
///
/// # Errors
/// What could not be made; nothing of the user's ran then.
pub fn serve(beside: Option<PathBuf>) -> io::Result<u8> {
    // SAFETY: the agent put one end of the pair there; nobody else has it.
    let control = unsafe { OwnedFd::from_raw_fd(CONTROL) };
    rustix::io::fcntl_setfd(&control, rustix::io::FdFlags::CLOEXEC)?;
    // The agent may have started it as the leader of a group.
    let _ = setsid();
    if beside.is_some() {
        // What a tool makes again and leaves behind becomes its child (PR_SET_CHILD_SUBREAPER(2const)).
        set_child_subreaper(Some(getpid()))?;
        return First::new(control, beside)?.serve();
    }
    // SAFETY: no thread was started, and no descriptor is shared with one.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID | UnshareFlags::NEWNS)? };
    // SAFETY: this process has one thread.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            see_only_these()?;
            First::new(control, None)?.serve()
        }
        first => {
            drop(control);
            let mut status = 0;
            // SAFETY: a child of ours, and a place for its status.
            while unsafe { libc::waitpid(first, &raw mut status, 0) } < 0 {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
            Ok(exit_status(ExitStatus::from_raw(status)))
        }
    }
}

/// `/proc` is that of the new namespace.
fn see_only_these() -> io::Result<()> {
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::DOWNSTREAM)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(mount("proc", "/proc", "proc", flags, None)?)
}

/// A child that has not begun.
struct Held {
    role: Role,
    pid: i32,
    gate: File,
    /// Tells what exec said; closed by a successful one.
    failed: File,
}

struct First {
    control: Option<OwnedFd>,
    children: OwnedFd,
    /// The mask of signals as the command is to have it.
    mask: libc::sigset_t,
    held: Option<Held>,
    command: Option<i32>,
    tool: Option<i32>,
    /// It has namespaces, which end with it; else whoever is left becomes the child of another process.
    apart: bool,
    /// The command's cgroup, until it was thawed because the agent is gone.
    cgroup: Option<PathBuf>,
    /// How the command ended.
    status: i32,
}

impl First {
    fn new(control: OwnedFd, beside: Option<PathBuf>) -> io::Result<Self> {
        let mut only = MaybeUninit::uninit();
        let mut mask = MaybeUninit::uninit();
        // SAFETY: both sets are filled in by the calls that get them first.
        let (children, mask) = unsafe {
            libc::sigemptyset(only.as_mut_ptr());
            libc::sigaddset(only.as_mut_ptr(), libc::SIGCHLD);
            let failed = libc::pthread_sigmask(libc::SIG_BLOCK, only.as_ptr(), mask.as_mut_ptr());
            if failed != 0 {
                return Err(io::Error::from_raw_os_error(failed));
            }
            (libc::signalfd(-1, only.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK), mask.assume_init())
        };
        if children < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just made, and owned by nobody else.
        let children = unsafe { OwnedFd::from_raw_fd(children) };
        let (control, held, apart) = (Some(control), None, beside.is_none());
        let (command, tool, cgroup) = (None, None, beside);
        Ok(Self { control, children, mask, held, command, tool, apart, cgroup, status: 0 })
    }

    fn serve(mut self) -> io::Result<u8> {
        self.say(&Said::Ready);
        loop {
            let left = self.reap();
            if self.control.is_none() && self.tool.is_none() {
                self.thaw();
                if !self.apart {
                    return Ok(0);
                }
            }
            if self.control.is_none() && !left {
                return Ok(exit_status(ExitStatus::from_raw(self.status)));
            }
            let asked = self.wait()?;
            if !asked {
                continue;
            }
            let Some(control) = &self.control else { continue };
            match hear::<Order>(control) {
                Ok(Some(Order::Hold { role, arguments, cgroup, output })) => {
                    let made = self.hold(role, &arguments, cgroup.as_deref(), output.as_deref());
                    self.answer(made);
                }
                Ok(Some(Order::Bind(from, to))) => {
                    let bound = fs::create_dir_all(&to)
                        .and_then(|()| Ok(mount_bind_recursive(&from, &to)?))
                        .map_err(|e| (e, format!("mount {} on {}", from.display(), to.display())));
                    self.answer(bound.map(|()| Said::Ready));
                }
                Ok(Some(Order::Expect { command, above })) => {
                    // The next child gets a number behind this one (pid_namespaces(7)).
                    let set = fs::write("/proc/sys/kernel/ns_last_pid", above.to_string());
                    self.command = Some(command);
                    self.answer(set.map(|()| Said::Ready).map_err(|e| (e, "ns_last_pid".to_owned())));
                }
                Ok(Some(Order::Go)) => {
                    let gone = self.go();
                    self.answer(gone);
                }
                Ok(Some(Order::Cancel)) => {
                    self.held = None;
                    self.say(&Said::Ready);
                }
                Ok(Some(Order::Signal(signal))) => {
                    if let Some(command) = self.command {
                        // SAFETY: a child of ours that was not waited for.
                        unsafe { libc::kill(command, signal) };
                    }
                }
                Ok(Some(Order::Leave) | None) | Err(_) => {
                    // A child that is held ends at the end of its gate.
                    self.held = None;
                    self.control = None;
                    // Without a tool at work it is frozen only if its owner froze it.
                    if !self.apart && self.tool.is_none() {
                        self.cgroup = None;
                    }
                }
            }
        }
    }

    /// Nobody else is left who would: the agent's guard thawed it when the agent ended, which a tool may have undone.
    fn thaw(&mut self) {
        if let Some(cgroup) = self.cgroup.take() {
            // There is nobody to tell; where it is gone, nobody is frozen in it.
            let _ = fs::write(cgroup.join("cgroup.freeze"), "0");
        }
    }

    fn say(&self, said: &Said) {
        if let Some(control) = &self.control {
            // Who does not listen is gone, which the next look at the socket tells.
            let _ = tell(control, said);
        }
    }

    fn answer(&self, done: Result<Said, (io::Error, String)>) {
        self.say(&done.unwrap_or_else(|(e, what)| Said::Failed(e.raw_os_error().unwrap_or(libc::EIO), what)));
    }

    /// Waits for an order or the end of a child. Whether there is an order.
    fn wait(&self) -> io::Result<bool> {
        let mut fds = vec![PollFd::new(&self.children, PollFlags::IN)];
        fds.extend(self.control.as_ref().map(|control| PollFd::new(control, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let asked = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        let mut told = [0; size_of::<libc::signalfd_siginfo>()];
        while rustix::io::read(&self.children, &mut told).is_ok_and(|read| read > 0) {}
        Ok(asked)
    }

    /// Takes in the ends of children, whose they ever were. Whether any are left.
    fn reap(&mut self) -> bool {
        loop {
            let mut status = 0;
            // SAFETY: a place for the status.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
            if pid <= 0 {
                return pid == 0;
            }
            if self.tool == Some(pid) {
                self.tool = None;
                self.say(&Said::Ended(Role::Tool, status));
            }
            // A process that was restored has the number that it had.
            if self.command == Some(pid) {
                self.status = status;
                self.say(&Said::Ended(Role::Command, status));
            }
        }
    }

    fn hold(
        &mut self,
        role: Role,
        arguments: &[std::ffi::OsString],
        cgroup: Option<&Path>,
        output: Option<&Path>,
    ) -> Result<Said, (io::Error, String)> {
        let fail = |what: &str| {
            let what = what.to_owned();
            move |e: io::Error| (e, what)
        };
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|e| fail("pipe")(e.into()));
        let (gate_read, gate) = pipe()?;
        let (failed, failed_write) = pipe()?;
        let (ready, ready_write) = pipe()?;
        let arguments: Vec<CString> = arguments
            .iter()
            .map(|word| CString::new(word.as_bytes()))
            .collect::<Result<_, _>>()
            .map_err(|e| fail("the command line")(e.into()))?;
        // SAFETY: this process has one thread, so the child may do anything.
        let pid = unsafe { libc::fork() };
        if pid < 0 {
            return Err(fail("fork")(io::Error::last_os_error()));
        }
        if pid == 0 {
            drop((gate, failed, ready));
            let mut held = (File::from(ready_write), File::from(gate_read));
            let error = self.become_child(role, &arguments, cgroup, output, &mut held);
            let number = error.raw_os_error().unwrap_or(libc::EIO);
            let _ = File::from(failed_write).write_all(&number.to_ne_bytes());
            // SAFETY: nothing of this copy of the process is to run any more.
            unsafe { libc::_exit(127) };
        }
        drop((gate_read, failed_write, ready_write));
        let mut failed = File::from(failed);
        match File::from(ready).read(&mut [0]) {
            Ok(1) => {}
            _ => return Err((told_by(&mut failed), "prepare".into())),
        }
        if role == Role::Command {
            self.command = Some(pid);
        } else {
            self.tool = Some(pid);
        }
        if let Some(cgroup) = cgroup {
            self.cgroup = Some(cgroup.to_owned());
        }
        self.held = Some(Held { role, pid, gate: gate.into(), failed });
        Ok(Said::Held(pid))
    }

    fn become_child(
        &self,
        role: Role,
        arguments: &[CString],
        cgroup: Option<&Path>,
        output: Option<&Path>,
        (ready, gate): &mut (File, File),
    ) -> io::Error {
        let mut prepare = || -> io::Result<()> {
            if role == Role::Command {
                setsid()?;
            }
            if let Some(cgroup) = cgroup {
                fs::write(cgroup.join("cgroup.procs"), "0")?;
            }
            if let Some(output) = output {
                divert(&File::create(output)?)?;
            }
            ready.write_all(b"r")
        };
        if let Err(e) = prepare() {
            return e;
        }
        // At its end, without a byte: nobody wants it any more.
        match gate.read(&mut [0]) {
            Ok(1) => {}
            Ok(_) => return io::Error::from_raw_os_error(libc::ECANCELED),
            Err(e) => return e,
        }
        let mut pointers: Vec<*const libc::c_char> = arguments.iter().map(|word| word.as_ptr()).collect();
        pointers.push(std::ptr::null());
        // SAFETY: the mask is initialised, and the list ends with a null pointer.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.mask, std::ptr::null_mut());
            libc::execvp(pointers[0], pointers.as_ptr());
        }
        io::Error::last_os_error()
    }

    fn go(&mut self) -> Result<Said, (io::Error, String)> {
        let Some(mut held) = self.held.take() else {
            return Err((io::Error::from_raw_os_error(libc::ESRCH), "nothing is held".into()));
        };
        let what = "exec".to_owned();
        // One that is gone already says why.
        let _ = held.gate.write_all(b"g");
        match told_by(&mut held.failed) {
            // Closed by the exec.
            e if e.kind() == io::ErrorKind::UnexpectedEof => Ok(Said::Began),
            e => {
                let kept = if held.role == Role::Command { &mut self.command } else { &mut self.tool };
                if *kept == Some(held.pid) {
                    *kept = None;
                }
                Err((e, what))
            }
        }
    }
}

/// The error that a child told; `UnexpectedEof` where it told none.
fn told_by(failed: &mut File) -> io::Error {
    let mut number = [0; 4];
    match failed.read_exact(&mut number) {
        Ok(()) => io::Error::from_raw_os_error(i32::from_ne_bytes(number)),
        Err(e) => e,
    }
}

/// Keeps the three standard streams open above [`STANDARD`], and sends what is printed to a file.
fn divert(output: &File) -> io::Result<()> {
    for fd in 0..3 as RawFd {
        // SAFETY: system calls on descriptors of this process; a stream that is closed stays so.
        unsafe {
            libc::dup2(fd, STANDARD + fd);
            if fd > 0 && libc::dup2(output.as_fd().as_raw_fd(), fd) < 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}
