//! A command in PID and mount namespaces of its own, so that what was dumped of it can be restored under its old
//! numbers, whoever has them outside.
//!
//! The agent starts this program again as the outer process, which makes the namespaces and their first process
//! ([`init`]). That one makes children when it is told to: the command, and what works for the agent in there. Each is
//! held just before its exec, so that it can be selected first. A terminal does not reach the command as its controlling
//! one; signals come from the agent.
//!
//! What was started by somebody else and is followed in its cgroup has its numbers among all others: there the process
//! between makes no namespaces ([`Place::Beside`]).

pub mod init;
mod messages;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use super::process::{Inherited, ProcessError};
pub use messages::Role;
use messages::{Order, Said, hear, is_heard, tell};

/// Name of the hidden subcommand that runs [`init::serve`].
pub const SUBCOMMAND: &str = "contain";

/// The descriptor of the outer process's end of the pair.
const CONTROL: RawFd = 190;

/// A tool finds the standard streams of the command at this number and the two behind it.
pub const STANDARD: RawFd = 200;

/// How long an answer takes at most that nobody has to work for.
const ANSWER: Duration = Duration::from_secs(30);

/// Where the processes are that are made.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// In PID and mount namespaces of their own.
    Apart,
    /// Among all others, for those who are in this cgroup already.
    Beside(&'a Path),
}

/// A command in namespaces of its own, or what is there before it begins and after it has ended.
#[derive(Debug)]
pub struct Contained {
    control: OwnedFd,
    outer: Child,
    first: u32,
    ended: Option<ExitStatus>,
    tool: Option<ExitStatus>,
}

fn system(call: &str, source: impl Into<io::Error>) -> ProcessError {
    ProcessError::System { call: call.to_owned(), source: source.into() }
}

impl Contained {
    /// Makes the namespaces, if it is to have any.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub fn start(inherited: &Inherited, place: Place<'_>) -> Result<Self, ProcessError> {
        let (control, other) = messages::pair().map_err(|e| system("socketpair", e))?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("bfs-agent").arg(SUBCOMMAND);
        if let Place::Beside(cgroup) = place {
            command.arg("--beside").arg(cgroup);
        }
        let restore = inherited.clone();
        let other_raw = other.as_raw_fd();
        // SAFETY: only async-signal-safe calls (dup2, signal, sigprocmask) are made, and nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                if libc::dup2(other_raw, CONTROL) < 0 {
                    return Err(io::Error::last_os_error());
                }
                restore.restore();
                Ok(())
            })
        };
        let outer = command.spawn().map_err(|e| system("start the first process", e))?;
        drop(other);
        let mut contained = Self { control, outer, first: 0, ended: None, tool: None };
        match contained.answer("start the first process")? {
            Said::Ready => {}
            other => return Err(system("start the first process", io::Error::other(format!("{other:?}")))),
        }
        let outer = contained.outer.id();
        if matches!(place, Place::Beside(_)) {
            contained.first = outer;
            return Ok(contained);
        }
        let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children"))
            .map_err(|e| system("read the children of the process of the namespaces", e))?;
        contained.first = children
            .split_whitespace()
            .next()
            .and_then(|pid| pid.parse().ok())
            .ok_or(ProcessError::NoProcess(outer))?;
        Ok(contained)
    }

    /// The number of the first process of the namespaces, in this process's.
    #[must_use]
    pub fn first(&self) -> u32 {
        self.first
    }

    /// The next message that is no end of a child; those are noted.
    fn answer(&mut self, what: &str) -> Result<Said, ProcessError> {
        let deadline = Instant::now() + ANSWER;
        loop {
            match self.next(deadline).map_err(|e| system(what, e))? {
                Some(Said::Failed(number, tried)) => {
                    let source = io::Error::from_raw_os_error(number);
                    return Err(ProcessError::System { call: format!("{what}: {tried}"), source });
                }
                Some(said) => return Ok(said),
                None => {}
            }
        }
    }

    /// Takes in a message until the deadline. `None`: it was the end of a child.
    fn next(&mut self, deadline: Instant) -> io::Result<Option<Said>> {
        while !is_heard(&self.control, deadline.saturating_duration_since(Instant::now()))? {
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        match hear(&self.control)? {
            Some(Said::Ended(role, status)) => {
                let status = ExitStatus::from_raw(status);
                match role {
                    Role::Command => self.ended = Some(status),
                    Role::Tool => self.tool = Some(status),
                }
                Ok(None)
            }
            Some(said) => Ok(Some(said)),
            None => Err(io::Error::other("the process that makes them has ended")),
        }
    }

    fn done(&mut self, order: &Order, what: &str) -> Result<(), ProcessError> {
        tell(&self.control, order).map_err(|e| system(what, e))?;
        match self.answer(what)? {
            Said::Ready => Ok(()),
            other => Err(system(what, io::Error::other(format!("{other:?}")))),
        }
    }

    /// All in the namespaces see the directory `from` at `to` as well, which is made if it is not there.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub fn bind(&mut self, from: &Path, to: &Path) -> Result<(), ProcessError> {
        self.done(&Order::Bind(from.to_owned(), to.to_owned()), "bind")
    }

    /// A command that was dumped elsewhere is going to be restored: `command` is its number, and what works for that gets
    /// numbers behind `above`.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub fn expect(&mut self, command: i32, above: i32) -> Result<(), ProcessError> {
        self.done(&Order::Expect { command, above }, "expect")
    }

    /// Makes a child up to just before its exec; gives its number in the namespace. With `output` what it prints goes
    /// there, and the command's standard streams stand at [`STANDARD`].
    ///
    /// # Errors
    /// [`ProcessError`].
    pub fn hold(
        &mut self,
        role: Role,
        arguments: &[OsString],
        cgroup: Option<&Path>,
        output: Option<&Path>,
    ) -> Result<i32, ProcessError> {
        if arguments.is_empty() {
            return Err(ProcessError::NoCommand);
        }
        let order = Order::Hold {
            role,
            arguments: arguments.to_vec(),
            cgroup: cgroup.map(Path::to_owned),
            output: output.map(Path::to_owned),
        };
        tell(&self.control, &order).map_err(|e| system("hold", e))?;
        match self.answer("hold")? {
            Said::Held(pid) => Ok(pid),
            other => Err(system("hold", io::Error::other(format!("{other:?}")))),
        }
    }

    /// Lets the child that is held begin.
    ///
    /// # Errors
    /// [`ProcessError::Exec`] where its program cannot be executed.
    pub fn go(&mut self, program: &OsString) -> Result<(), ProcessError> {
        tell(&self.control, &Order::Go).map_err(|e| system("go", e))?;
        match self.answer("go") {
            Ok(_) => Ok(()),
            Err(ProcessError::System { source, .. }) => {
                Err(ProcessError::Exec { program: program.clone(), source })
            }
            Err(e) => Err(e),
        }
    }

    /// Ends the tool that is held instead.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub fn cancel(&mut self) -> Result<(), ProcessError> {
        self.done(&Order::Cancel, "cancel")?;
        self.tool_within(ANSWER).map(drop)
    }

    /// How the command ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        while self.ended.is_none() && is_heard(&self.control, Duration::ZERO).unwrap_or(false) {
            if self.next(Instant::now()).is_err() {
                // Nobody is left in the namespaces.
                self.ended = self.outer.wait().ok();
            }
        }
        self.ended
    }

    /// The command is being restored: it is going to be alive again. Gives how it had ended.
    pub fn lives_again(&mut self) -> Option<ExitStatus> {
        self.ended.take()
    }

    /// It was not restored.
    pub fn is_as_before(&mut self, ended: Option<ExitStatus>) {
        self.ended = ended;
    }

    /// How the tool that was let go has ended; `None` where it still works after so long.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub fn tool_within(&mut self, time: Duration) -> Result<Option<ExitStatus>, ProcessError> {
        let deadline = Instant::now() + time;
        loop {
            if let Some(status) = self.tool.take() {
                return Ok(Some(status));
            }
            match self.next(deadline) {
                Err(e) if e.kind() == io::ErrorKind::TimedOut => return Ok(None),
                next => next.map_err(|e| system("wait for a tool in the namespaces", e))?,
            };
        }
    }

    /// Something that sends signals to the command.
    ///
    /// # Errors
    /// When the descriptor cannot be duplicated.
    pub fn sender(&self) -> Result<Sender, ProcessError> {
        Ok(Sender(self.control.try_clone().map_err(|e| system("dup", e))?))
    }

    /// Nothing is asked any more: the processes that are left go on without the agent.
    pub fn leave(self) {
        // Also what is gone already needs no word.
        let _ = tell(&self.control, &Order::Leave);
    }
}

/// Sends signals to the command, wherever they come from: its terminal is none.
#[derive(Debug)]
pub struct Sender(OwnedFd);

impl Sender {
    /// Sends a signal. A command that ended gets nothing.
    pub fn send(&self, signal: i32) {
        let _ = tell(&self.0, &Order::Signal(signal));
    }
}
