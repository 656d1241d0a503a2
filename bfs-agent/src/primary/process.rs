//! The selected processes: starting the command of `run`, finding the tree of `attach`.
//!
//! The command of `run` is born held: it exists (so that it can be put into a cgroup and selected
//! in the probes), but runs nothing of the user's until [`Held::release`]. Terminal, standard
//! streams, environment, directory, process group, signal mask and ignored signals are what the
//! agent was started with. If the agent dies before the release, the command never starts.

mod cgroup;
mod hook;
mod tree;

use std::ffi::OsString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::primary::clock::timespec;

pub use cgroup::{in_cgroup, is_of_cgroup, tasks_of_cgroup};
pub use hook::{Hook, HookError};
pub use tree::{Task, any_alive, groups, has_ended, lives, start_of, threads_of, tree_of};

/// Signals that the agent takes instead of dying of them. For `run` they go on to the command;
/// for `attach` they ask the agent to end.
pub const TAKEN: [i32; 6] =
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2];

/// Why the command did not start or cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// There is no command.
    #[error("no command was given")]
    NoCommand,
    /// The command cannot be executed.
    #[error("cannot execute {program:?}: {source}")]
    Exec {
        /// As given.
        program: OsString,
        /// What the kernel said.
        source: io::Error,
    },
    /// A system call failed.
    #[error("{call}: {source}")]
    System {
        /// Its name, and what it was called on.
        call: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no such process.
    #[error("there is no process {0}")]
    NoProcess(u32),
}

impl ProcessError {
    fn system(call: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System { call: call.into(), source: source.into() }
    }

    /// The status that a shell gives for it: 127 not found, 126 not executable.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Exec { source, .. } if source.kind() == io::ErrorKind::NotFound => 127,
            Self::Exec { .. } => 126,
            _ => 1,
        }
    }
}

/// What the agent was started with, before it changed it for itself.
#[derive(Clone)]
pub struct Inherited {
    mask: libc::sigset_t,
    ignored: Vec<i32>,
    taken: libc::sigset_t,
}

impl std::fmt::Debug for Inherited {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inherited").field("ignored", &self.ignored).finish_non_exhaustive()
    }
}

impl Inherited {
    /// Blocks [`TAKEN`] in this thread and all that it starts; they are read by
    /// [`Signals::start`]. To be called first of all in `main`, before any thread is started.
    /// What was ignored (`nohup`) stays so.
    ///
    /// # Errors
    /// What `sigprocmask` said.
    pub fn take_over() -> io::Result<Self> {
        let ignored: Vec<i32> = TAKEN.into_iter().filter(|s| is_ignored(*s)).collect();
        let mut taken = empty_set();
        for signal in TAKEN.into_iter().filter(|s| !ignored.contains(s)) {
            // SAFETY: `taken` is an initialised set and `signal` a valid number.
            unsafe { libc::sigaddset(&raw mut taken, signal) };
        }
        let mut mask = empty_set();
        // SAFETY: both sets are initialised and live for the time of the call.
        let failed = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const taken, &raw mut mask) };
        if failed != 0 {
            return Err(io::Error::from_raw_os_error(failed));
        }
        Ok(Self { mask, ignored, taken })
    }

    /// Undoes [`Inherited::take_over`] in this thread.
    ///
    /// # Errors
    /// What `sigprocmask` said.
    pub fn give_back(&self) -> io::Result<()> {
        // SAFETY: the mask is initialised; the old one is not asked for.
        let failed =
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.mask, std::ptr::null_mut()) };
        if failed == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(failed)) }
    }

    /// Async-signal-safe: called between fork and exec.
    pub(super) fn restore(&self) {
        for signal in &self.ignored {
            // SAFETY: SIG_IGN for a valid signal number; no handler of ours is involved.
            unsafe { libc::signal(*signal, libc::SIG_IGN) };
        }
        // SAFETY: the mask is initialised; the old one is not asked for.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.mask, std::ptr::null_mut()) };
    }
}

fn empty_set() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the whole set and cannot fail for a valid pointer.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    }
}

fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: without a new action the call only fills the old one, which is zeroed before.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr());
        action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// A signal that reached the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Its number.
    pub signal: i32,
    /// The kernel sent it (a key on the terminal, a hang-up): the command in the same process
    /// group got it as well, and must not get it twice.
    pub by_terminal: bool,
}

/// Reads the signals that [`Inherited::take_over`] blocked, on a thread of its own.
#[derive(Debug)]
pub struct Signals {
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Signals {
    /// Calls `handler` for each signal until this is dropped.
    ///
    /// # Errors
    /// When the descriptors or the thread cannot be made.
    pub fn start(
        inherited: &Inherited,
        mut handler: impl FnMut(Received) + Send + 'static,
    ) -> Result<Self, ProcessError> {
        // SAFETY: the set is initialised; -1 asks for a new descriptor.
        let fd =
            unsafe { libc::signalfd(-1, &raw const inherited.taken, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(ProcessError::system("signalfd", io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just made and is owned by nobody else.
        let signals = unsafe { OwnedFd::from_raw_fd(fd) };
        let (stopped, stop) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| ProcessError::system("pipe", e))?;
        let thread = std::thread::Builder::new()
            .name("bfs-signals".into())
            .spawn(move || {
                loop {
                    let mut fds = [
                        PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
                        PollFd::from_borrowed_fd(stopped.as_fd(), PollFlags::IN),
                    ];
                    let polled = poll(&mut fds, None);
                    if !fds[1].revents().is_empty() {
                        return;
                    }
                    if polled.is_ok() {
                        while let Some(received) = read_signal(&signals) {
                            handler(received);
                        }
                    }
                }
            })
            .map_err(|e| ProcessError::system("clone", e))?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn read_signal(fd: &OwnedFd) -> Option<Received> {
    let mut bytes = [0u8; size_of::<libc::signalfd_siginfo>()];
    match rustix::io::read(fd, &mut bytes) {
        Ok(read) if read == bytes.len() => {
            // ssi_signo stands at 0 and ssi_code at 8 (signalfd(2)).
            let signal = i32::from_ne_bytes(bytes[..4].try_into().expect("4 bytes"));
            let code = i32::from_ne_bytes(bytes[8..12].try_into().expect("4 bytes"));
            Some(Received { signal, by_terminal: code > 0 })
        }
        _ => None,
    }
}

/// A command that exists but has not begun.
#[derive(Debug)]
pub struct Held {
    pid: u32,
    pidfd: OwnedFd,
    program: OsString,
    gate: OwnedFd,
    spawner: JoinHandle<io::Result<Child>>,
}

/// Starts a command up to just before its exec.
///
/// # Errors
/// [`ProcessError`].
pub fn hold(command: &[OsString], inherited: &Inherited) -> Result<Held, ProcessError> {
    hold_with(command, &[], inherited)
}

/// The same, with variables added to its environment.
///
/// # Errors
/// [`ProcessError`].
pub fn hold_with(
    command: &[OsString],
    variables: &[(OsString, OsString)],
    inherited: &Inherited,
) -> Result<Held, ProcessError> {
    let (program, arguments) = command.split_first().ok_or(ProcessError::NoCommand)?;
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|e| ProcessError::system("pipe", e));
    let (gate_read, gate) = pipe()?;
    let (pid_read, pid_write) = pipe()?;
    let mut child = Command::new(program);
    child.args(arguments).envs(variables.iter().map(|(k, v)| (k, v)));
    let restore = inherited.clone();
    let gate_in_child = gate.as_raw_fd();
    let pid_write_raw = pid_write.as_raw_fd();
    // SAFETY: between fork and exec only async-signal-safe calls are made (getpid, write, close,
    // read, signal, sigprocmask), nothing is allocated, and the closed descriptor is the child's
    // own copy of the gate: with it open, the end of the agent would not be the end of the pipe.
    unsafe {
        child.pre_exec(move || {
            libc::close(gate_in_child);
            let pid = libc::getpid().to_ne_bytes();
            if libc::write(pid_write_raw, pid.as_ptr().cast(), pid.len()) != pid.len() as isize {
                return Err(io::Error::last_os_error());
            }
            let mut word = [0u8];
            loop {
                match libc::read(gate_read.as_raw_fd(), word.as_mut_ptr().cast(), 1) {
                    1 => break,
                    0 => return Err(io::Error::from_raw_os_error(libc::ECANCELED)),
                    _ if io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) => {}
                    _ => return Err(io::Error::last_os_error()),
                }
            }
            restore.restore();
            Ok(())
        })
    };
    // spawn() returns only after the exec, so it has a thread of its own. The child is the
    // process's, not the thread's.
    let spawner = std::thread::Builder::new()
        .name("bfs-spawn".into())
        .spawn(move || {
            let spawned = child.spawn();
            drop(pid_write);
            spawned
        })
        .map_err(|e| ProcessError::system("clone", e))?;
    let exec_error = |source| ProcessError::Exec { program: program.clone(), source };
    let mut bytes = [0u8; 4];
    let read = loop {
        match rustix::io::read(&pid_read, &mut bytes) {
            Err(rustix::io::Errno::INTR) => {}
            read => break read.map_err(|e| ProcessError::system("read the child's pid", e))?,
        }
    };
    if read != bytes.len() {
        // No child came to the handshake: fork failed, or the program's name is impossible.
        return Err(match spawner.join() {
            Ok(Err(source)) => exec_error(source),
            _ => exec_error(io::Error::other("the child ended before it began")),
        });
    }
    let pid = u32::from_ne_bytes(bytes);
    let raw = Pid::from_raw(pid.cast_signed()).ok_or(ProcessError::NoProcess(pid))?;
    let pidfd = pidfd_open(raw, PidfdFlags::empty()).map_err(|e| ProcessError::system("pidfd_open", e))?;
    Ok(Held { pid, pidfd, program: program.clone(), gate, spawner })
}

impl Held {
    /// Its process id (in this process's pid namespace), which is also the id of its only thread.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Lets it begin.
    ///
    /// # Errors
    /// [`ProcessError::Exec`] when the program cannot be executed.
    pub fn release(self) -> Result<Running, ProcessError> {
        let Self { pid, pidfd, program, gate, spawner } = self;
        // A failed write means that the child is gone; the spawner says why.
        let _ = rustix::io::write(&gate, b"g");
        drop(gate);
        match spawner.join() {
            Ok(Ok(child)) => Ok(Running { pid, pidfd, child, status: None }),
            Ok(Err(source)) => Err(ProcessError::Exec { program, source }),
            Err(_) => Err(ProcessError::system("spawn", io::Error::other("its thread panicked"))),
        }
    }

    /// Ends it before it began.
    pub fn cancel(self) {
        drop(self.gate);
        let _ = self.spawner.join();
    }
}

/// The command of `run` at work.
#[derive(Debug)]
pub struct Running {
    pid: u32,
    pidfd: OwnedFd,
    child: Child,
    status: Option<ExitStatus>,
}

impl Running {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// A descriptor that is readable when the command has ended (`pidfd_open(2)`).
    #[must_use]
    pub fn ended(&self) -> impl AsFd + '_ {
        self.pidfd.as_fd()
    }

    /// Something that sends signals to the command, for the thread of [`Signals`].
    ///
    /// # Errors
    /// When the descriptor cannot be duplicated.
    pub fn sender(&self) -> Result<Sender, ProcessError> {
        Ok(Sender(self.pidfd.try_clone().map_err(|e| ProcessError::system("dup", e))?))
    }

    /// Waits for its end, at most this long; `None` when it still runs.
    ///
    /// # Errors
    /// [`ProcessError::System`].
    pub fn wait(&mut self, limit: Duration) -> Result<Option<ExitStatus>, ProcessError> {
        let deadline = Instant::now() + limit;
        while self.status.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = timespec(left);
            let mut fds = [PollFd::from_borrowed_fd(self.pidfd.as_fd(), PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => return Ok(None),
                Ok(_) => self.status = Some(self.child.wait().map_err(|e| ProcessError::system("wait", e))?),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(ProcessError::system("poll", e)),
            }
        }
        Ok(self.status)
    }
}

/// Sends signals to the command; the number can not be used again behind its back.
#[derive(Debug)]
pub struct Sender(OwnedFd);

impl Sender {
    /// Passes a signal on, unless the terminal gave it to the command already. A command that
    /// ended gets nothing.
    pub fn forward(&self, received: Received) {
        if !received.by_terminal {
            self.send(received.signal);
        }
    }

    /// Sends a signal.
    pub fn send(&self, signal: i32) {
        // SAFETY: a pidfd and a signal number; no siginfo, no flags.
        unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0,
            )
        };
    }
}

/// The status that a shell gives: the command's own, 128 + N when signal N ended it.
#[must_use]
pub fn exit_status(status: ExitStatus) -> u8 {
    let number = status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap_or(1);
    u8::try_from(number & 0xff).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn inherited() -> Inherited {
        // The threads of the test runner do not block anything: only the lists are needed.
        Inherited { mask: empty_set(), ignored: vec![libc::SIGUSR2], taken: empty_set() }
    }

    fn shell(script: &str) -> Vec<OsString> {
        ["sh", "-c", script].map(OsString::from).to_vec()
    }

    #[test]
    fn nothing_runs_before_the_release() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("mark");
        let held = hold(&shell(&format!("echo x > {}; exit 7", mark.display())), &inherited()).unwrap();
        let tasks = tree_of(held.pid()).unwrap();
        assert_eq!(tasks.len(), 1);
        assert_eq!(tasks[0].tid, held.pid());
        let before = fs::read(format!("/proc/{}/cmdline", held.pid())).unwrap();
        assert_eq!(before, fs::read("/proc/self/cmdline").unwrap(), "it has not been executed yet");
        assert!(!mark.exists());
        let mut running = held.release().unwrap();
        let status = running.wait(Duration::from_secs(10)).unwrap().unwrap();
        assert_eq!(exit_status(status), 7);
        assert!(mark.exists());
    }

    #[test]
    fn without_a_release_it_never_runs() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("mark");
        let held = hold(&shell(&format!("echo x > {}", mark.display())), &inherited()).unwrap();
        let pid = held.pid();
        held.cancel();
        assert!(!mark.exists());
        assert!(start_of(pid).is_none(), "it ended and was waited for");
    }

    #[test]
    fn a_program_that_does_not_exist_is_named() {
        let held = hold(&["/does/not/exist".into()], &inherited()).unwrap();
        let error = held.release().unwrap_err();
        assert_eq!(error.exit_status(), 127);
        assert!(error.to_string().contains("/does/not/exist"), "{error}");
    }

    #[test]
    fn signals_reach_the_command_and_make_its_status() {
        let mut running = hold(&shell("sleep 100"), &inherited()).unwrap().release().unwrap();
        assert_eq!(running.wait(Duration::ZERO).unwrap(), None);
        let sender = running.sender().unwrap();
        sender.forward(Received { signal: libc::SIGTERM, by_terminal: true });
        sender.forward(Received { signal: libc::SIGKILL, by_terminal: false });
        let status = running.wait(Duration::from_secs(10)).unwrap().unwrap();
        assert_eq!(exit_status(status), 128 + 9);
        sender.send(libc::SIGTERM);
    }

    #[test]
    fn ignored_signals_stay_ignored_and_the_mask_is_the_old_one() {
        let script = "grep -E '^Sig(Blk|Ign)' /proc/self/status > $0/s";
        let dir = tempfile::tempdir().unwrap();
        let mut command = shell(script);
        command.push(dir.path().into());
        let mut running = hold(&command, &inherited()).unwrap().release().unwrap();
        running.wait(Duration::from_secs(10)).unwrap().unwrap();
        let text = fs::read_to_string(dir.path().join("s")).unwrap();
        let word = |key: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(key)).unwrap();
            u64::from_str_radix(line.trim(), 16).unwrap()
        };
        assert_eq!(word("SigBlk:"), 0);
        assert_ne!(word("SigIgn:") & (1 << (libc::SIGUSR2 - 1)), 0);
    }

    #[test]
    fn a_tree_has_the_children_and_ends() {
        let mut running =
            hold(&shell("sleep 100 & sleep 100 & wait"), &inherited()).unwrap().release().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let tree = loop {
            let tree = tree_of(running.pid()).unwrap();
            if tree.len() == 3 {
                break tree;
            }
            assert!(Instant::now() < deadline);
        };
        let processes: Vec<_> = tree.iter().map(|t| (t.tgid, t.start_ticks)).collect();
        assert!(any_alive(processes.clone()));
        for (pid, _) in processes.iter().rev() {
            // SAFETY: signals to processes that this test started.
            unsafe { libc::kill(pid.cast_signed(), libc::SIGKILL) };
        }
        running.wait(Duration::from_secs(10)).unwrap().unwrap();
        while any_alive(processes.clone()) {
            assert!(Instant::now() < deadline);
        }
    }
}
