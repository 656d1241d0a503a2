//! The guard: a small process that thaws what the agent froze.
//!
//! It holds the reading end of a pipe whose only writer is the agent. The agent says what it is
//! about to do *before* it does it; what is in the pipe survives the agent. At the end of the
//! pipe (the agent ended, by whatever way) and when a stop lasts beyond its deadline, the guard
//! thaws. It is in a session of its own, so that a signal to the agent's process group or
//! terminal does not reach it, and it holds nothing else of the agent's descriptors.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use crate::primary::clock::timespec;

/// Name of the hidden subcommand that runs [`serve`].
pub const SUBCOMMAND: &str = "guard";

/// Beyond the deadline of a stop they are thawed again after this time.
const AGAIN: Duration = Duration::from_secs(1);

/// Longest line that the guard takes: a path and some words.
const LINE_MAX: usize = 8192;

/// The agent's side: ends the guard when it is dropped.
#[derive(Debug)]
pub struct Guard {
    child: Child,
    pipe: Option<ChildStdin>,
}

impl Guard {
    /// Starts the guard by running this program again as `PROGRAM guard`.
    ///
    /// # Errors
    /// What the start of the process said.
    pub fn start() -> io::Result<Self> {
        Self::start_program(Path::new("/proc/self/exe"))
    }

    /// Starts the guard from another program that has the subcommand.
    ///
    /// # Errors
    /// What the start of the process said.
    pub fn start_program(program: &Path) -> io::Result<Self> {
        let mut command = Command::new(program);
        // Its name in lists of processes.
        command.arg0("bfs-agent");
        command.arg(SUBCOMMAND).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        command.current_dir("/");
        // SAFETY: setsid is async-signal-safe and touches no memory.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                Ok(())
            })
        };
        let mut child = command.spawn()?;
        let pipe = child.stdin.take();
        Ok(Self { child, pipe })
    }

    /// Process id of the guard (it must not be selected, stopped or signalled).
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn say(&mut self, line: &[u8]) -> io::Result<()> {
        match &mut self.pipe {
            Some(pipe) => pipe.write_all(line),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// `own`: it is removed at the end, if it is empty.
    pub(super) fn watch_cgroup(&mut self, directory: &Path, own: bool) -> io::Result<()> {
        let mut line = if own { b"own\ncgroup ".to_vec() } else { b"cgroup ".to_vec() };
        line.extend_from_slice(directory.as_os_str().as_bytes());
        line.push(b'\n');
        self.say(&line)
    }

    pub(super) fn stopping(&mut self, limit: Duration) -> io::Result<()> {
        self.say(format!("stop {}\n", limit.as_millis()).as_bytes())
    }

    pub(super) fn going(&mut self) -> io::Result<()> {
        self.say(b"go\n")
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // The end of the pipe is its sign to thaw and go.
        self.pipe = None;
        let _ = self.child.wait();
    }
}

/// The guard's state: what to thaw, and when at the latest.
#[derive(Debug, Default, PartialEq, Eq)]
struct Watch {
    cgroup: Option<PathBuf>,
    own: bool,
    deadline: Option<Instant>,
}

impl Watch {
    fn line(&mut self, line: &[u8], now: Instant) {
        if let Some(path) = line.strip_prefix(b"cgroup ") {
            self.cgroup = Some(OsString::from_vec(path.to_vec()).into());
        } else if let Some(limit) = line.strip_prefix(b"stop ") {
            let ms = std::str::from_utf8(limit).ok().and_then(|t| t.parse().ok()).unwrap_or(0);
            // A deadline that cannot be represented is as good as none only in 10^8 years.
            self.deadline = now.checked_add(Duration::from_millis(ms)).or(Some(now));
        } else if line == b"go" {
            self.deadline = None;
        } else if line == b"own" {
            self.own = true;
        }
    }

    fn thaw(&self) {
        if let Some(cgroup) = &self.cgroup {
            // Nobody is left to be told of a failure; the cgroup may be gone, which is fine.
            let _ = fs::write(cgroup.join("cgroup.freeze"), "0");
        }
    }
}

/// What the subcommand does: reads from standard input until its end. Returns when the agent is
/// gone and everything is thawed.
///
/// # Errors
/// When standard input cannot be read or polled; everything is thawed then, too.
pub fn serve() -> io::Result<()> {
    // SAFETY: descriptor 0 is open (it is the pipe) and nothing else in this process uses it.
    let pipe = unsafe { OwnedFd::from_raw_fd(0) };
    let mut watch = Watch::default();
    let ended = watch_pipe(&pipe, &mut watch);
    watch.thaw();
    if let Some(cgroup) = watch.cgroup.as_ref().filter(|_| watch.own) {
        let _ = fs::remove_dir(cgroup);
    }
    ended
}

fn watch_pipe(pipe: &OwnedFd, watch: &mut Watch) -> io::Result<()> {
    let mut have = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let timeout = watch.deadline.map(|at| {
            let left = at.saturating_duration_since(Instant::now());
            timespec(left)
        });
        let mut fds = [PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(0) => {
                watch.thaw();
                watch.deadline = Some(Instant::now() + AGAIN);
                continue;
            }
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        }
        let read = match rustix::io::read(pipe, &mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(rustix::io::Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        };
        have.extend_from_slice(&buffer[..read]);
        let now = Instant::now();
        while let Some(end) = have.iter().position(|b| *b == b'\n') {
            watch.line(&have[..end], now);
            have.drain(..=end);
        }
        if have.len() > LINE_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_has_a_deadline_until_it_ends() {
        let now = Instant::now();
        let mut watch = Watch::default();
        watch.line(b"cgroup /x y", now);
        watch.line(b"stop 1500", now);
        assert_eq!(watch.cgroup.as_deref(), Some(Path::new("/x y")));
        assert_eq!(watch.deadline, Some(now + Duration::from_millis(1500)));
        watch.line(b"go", now);
        assert_eq!(watch.deadline, None);
        assert!(!watch.own, "somebody else's stays");
        watch.line(b"own", now);
        assert!(watch.own);
    }
}
