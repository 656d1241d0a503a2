//! The cgroup v2 freezer: the command of `run` lives in a cgroup of its own, `attach --cgroup` has one
//! that is somebody else's: that one is never removed, and where its owner froze it, it stays frozen.
//!
//! Assumes a writable cgroup2 mount (it may stand beside v1; no controller is needed). A task
//! freezes on its way back to user mode, so a frozen cgroup has no call in flight but those that
//! the kernel counts as frozen (a vfork parent, ptrace stops). A frozen cgroup stays frozen after
//! its freezer is gone, which is why each stop is announced to the [`Guard`] first.
//!
//! Several agents can have the same cgroup. Each locks its directory (flock(2)) for as long as its stop lasts:
//! else one would let go those whom the other one takes for standing.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::primary::clock::timespec;

use super::guard::Guard;
use super::{Limits, StopError, Stopped, Stopper};

/// Between two looks whether another agent's stop has ended.
const TURN: Duration = Duration::from_millis(1);

/// How long tasks may take to be frozen again.
const STRAY: Duration = Duration::from_millis(500);

/// A cgroup that can be frozen.
#[derive(Debug)]
pub struct Freezer {
    directory: PathBuf,
    /// The directory, to lock it.
    lock: File,
    events: File,
    guard: Guard,
    since: Option<(Instant, Limits)>,
    /// We made it, and remove it.
    own: bool,
    /// Its owner froze it before our stop.
    frozen_before: bool,
}

/// Where the cgroup2 hierarchy is mounted.
///
/// # Errors
/// [`StopError::NoCgroup2`] when it is not.
pub fn mount_point() -> Result<PathBuf, StopError> {
    let mounts = fs::read_to_string("/proc/self/mounts")
        .map_err(|e| StopError::system("read", "/proc/self/mounts", e))?;
    mount_point_in(&mounts).ok_or(StopError::NoCgroup2)
}

fn mount_point_in(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, at, kind) = (fields.next()?, fields.next()?, fields.next()?);
        // Blanks in the path are written as \040 (fs/proc_namespace.c, mangle()).
        (kind == "cgroup2").then(|| PathBuf::from(at.replace("\\040", " ")))
    })
}

impl Freezer {
    /// Makes the cgroup `bfs-GROUP-PID` below the one that this process is in, so that limits set
    /// from outside go on to hold for the command.
    ///
    /// # Errors
    /// [`StopError`] when there is no cgroup2 or it cannot be written.
    pub fn create(group: &str, guard: Guard) -> Result<Self, StopError> {
        let own = fs::read_to_string("/proc/self/cgroup")
            .map_err(|e| StopError::system("read", "/proc/self/cgroup", e))?;
        let own = own.lines().find_map(|l| l.strip_prefix("0::/")).unwrap_or("");
        let name = format!("bfs-{group}-{}", std::process::id());
        let mount = mount_point()?;
        let mut directory = mount.join(own).join(&name);
        let mut made = fs::create_dir(&directory);
        if made.is_err() && !own.is_empty() {
            // In a container the own cgroup may lie outside of what is mounted.
            directory = mount.join(&name);
            made = fs::create_dir(&directory);
        }
        match made {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                Err(StopError::system("mkdir", directory.display(), e))
            }
            _ => Self::adopt(&directory, guard),
        }
    }

    /// A cgroup that belongs to somebody else.
    ///
    /// # Errors
    /// [`StopError::NotACgroup`] when it cannot be frozen (the topmost one cannot).
    pub fn attach(directory: &Path, guard: Guard) -> Result<Self, StopError> {
        Self::open(directory, guard, false)
    }

    /// Takes over a cgroup that exists, as the successor of an agent that died.
    ///
    /// # Errors
    /// [`StopError::NotACgroup`] when it cannot be frozen.
    pub fn adopt(directory: &Path, guard: Guard) -> Result<Self, StopError> {
        let mut freezer = Self::open(directory, guard, true)?;
        freezer.thaw()?;
        Ok(freezer)
    }

    fn open(directory: &Path, mut guard: Guard, own: bool) -> Result<Self, StopError> {
        let events = File::open(directory.join("cgroup.events"))
            .map_err(|_| StopError::NotACgroup(directory.to_owned()))?;
        if !directory.join("cgroup.freeze").exists() {
            return Err(StopError::NotACgroup(directory.to_owned()));
        }
        guard
            .watch_cgroup(directory, own)
            .map_err(|e| StopError::system("write", "the pipe to the guard process", e))?;
        let directory = directory.to_owned();
        let lock = File::open(&directory).map_err(|e| StopError::system("open", directory.display(), e))?;
        Ok(Self { directory, lock, events, guard, since: None, own, frozen_before: false })
    }

    /// The cgroup's directory (for the state file of the group).
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Puts a process into the cgroup; its later children are born there.
    ///
    /// # Errors
    /// [`StopError::System`].
    pub fn enter(&self, pid: u32) -> Result<(), StopError> {
        let file = self.directory.join("cgroup.procs");
        fs::write(&file, pid.to_string()).map_err(|e| StopError::system("write", file.display(), e))
    }

    /// Whether a process is left in it.
    ///
    /// # Errors
    /// [`StopError::System`].
    pub fn populated(&mut self) -> Result<bool, StopError> {
        Ok(self.events()?.contains("populated 1"))
    }

    fn events(&mut self) -> Result<String, StopError> {
        let read = |file: &mut File| -> io::Result<String> {
            let mut text = String::new();
            file.seek(SeekFrom::Start(0))?;
            file.read_to_string(&mut text)?;
            Ok(text)
        };
        read(&mut self.events).map_err(|e| StopError::system("read", self.directory.display(), e))
    }

    fn frozen(&mut self) -> Result<bool, StopError> {
        Ok(self.events()?.contains("frozen 1"))
    }

    /// Whether it is asked to be frozen (which is not yet to be frozen).
    fn freezes(&self) -> bool {
        fs::read_to_string(self.directory.join("cgroup.freeze")).is_ok_and(|text| text.trim() == "1")
    }

    /// Whether nobody thawed it. Tasks that a tracer lets go, or that are killed, leave the frozen state for a
    /// moment, in the kernel: `get_signal()` in kernel/signal.c takes them back before they could run.
    fn still_frozen(&mut self) -> Result<bool, StopError> {
        let limits = Limits { reach: STRAY, stand: Duration::ZERO };
        match self.wait_frozen(Instant::now(), limits, true) {
            Err(StopError::Late { .. }) => Ok(false),
            frozen => frozen.map(|()| true),
        }
    }

    fn write_freeze(&self, value: &str) -> Result<(), StopError> {
        let file = self.directory.join("cgroup.freeze");
        fs::write(&file, value).map_err(|e| StopError::system("write", file.display(), e))
    }

    /// Waits until no other agent stops this cgroup.
    fn take_turn(&mut self, since: Instant, limits: Limits) -> Result<(), StopError> {
        loop {
            match flock(&self.lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(()),
                Err(Errno::WOULDBLOCK | Errno::INTR) if since.elapsed() < limits.reach => {
                    std::thread::sleep(TURN);
                }
                Err(Errno::WOULDBLOCK | Errno::INTR) => {
                    let waiting = "another agent, which has stopped the same cgroup".into();
                    return Err(StopError::Late { limit_ms: limits.reach.as_millis(), waiting });
                }
                Err(e) => return Err(StopError::system("lock", self.directory.display(), e.into())),
            }
        }
    }

    fn thaw(&mut self) -> Result<(), StopError> {
        let thawed = self.thaw_own();
        let unlocked = flock(&self.lock, FlockOperation::Unlock)
            .map_err(|e| StopError::system("unlock", self.directory.display(), e.into()));
        thawed.and(unlocked)
    }

    fn thaw_own(&mut self) -> Result<(), StopError> {
        if self.frozen_before {
            return Ok(());
        }
        let thawed = self.write_freeze("0");
        // Said to the guard only after the thaw: dying in between must not leave it frozen.
        if self.guard.going().is_err() {
            tracing::warn!("the guard process is gone: no further stop is possible");
        }
        thawed
    }

    /// Waits until `frozen 1` stands in cgroup.events. The kernel notifies pollers of that file
    /// (kernel/cgroup/cgroup.c, cgroup_file_notify), so nothing is asked in a loop.
    /// `again`: they stood already.
    fn wait_frozen(&mut self, since: Instant, limits: Limits, again: bool) -> Result<(), StopError> {
        loop {
            if self.frozen()? {
                return Ok(());
            }
            let left = limits.reach.checked_sub(since.elapsed()).filter(|_| !again || self.freezes());
            let Some(left) = left else {
                return Err(StopError::Late { limit_ms: limits.reach.as_millis(), waiting: self.waiting() });
            };
            let timeout = timespec(left);
            let mut fds = [PollFd::from_borrowed_fd(self.events.as_fd(), PollFlags::PRI)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(StopError::system("poll", self.directory.display(), e.into())),
            }
        }
    }

    /// Names the processes of the cgroup that do not sleep in the freezer, for the error.
    fn waiting(&self) -> String {
        let procs = fs::read_to_string(self.directory.join("cgroup.procs")).unwrap_or_default();
        let mut names = Vec::new();
        for pid in procs.lines().take(1000) {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let Some((head, rest)) = stat.rsplit_once(')') else { continue };
            let state = rest.trim_start().chars().next().unwrap_or('?');
            if matches!(state, 'R' | 'D') {
                let name = head.split_once('(').map_or("?", |(_, n)| n);
                names.push(format!("{name} {pid} in state {state}"));
            }
            if names.len() == 4 {
                break;
            }
        }
        if names.is_empty() { "nobody in particular".into() } else { names.join(", ") }
    }
}

impl Stopper for Freezer {
    fn stop(&mut self, limits: Limits) -> Result<Stopped, StopError> {
        if self.since.is_some() {
            return Err(StopError::Already);
        }
        let since = Instant::now();
        self.take_turn(since, limits)?;
        self.frozen_before = !self.own && self.freezes();
        if !self.frozen_before {
            let said = self.guard.stopping(limits.stand);
            if let Err(e) = said {
                self.thaw()?;
                return Err(StopError::system("write", "the pipe to the guard process", e));
            }
        }
        let stopped = self.write_freeze("1").and_then(|()| self.wait_frozen(since, limits, false));
        if let Err(error) = stopped {
            self.thaw()?;
            return Err(error);
        }
        self.since = Some((since, limits));
        Ok(Stopped { reached_in: since.elapsed(), threads: 0 })
    }

    fn standing(&mut self) -> bool {
        self.since.is_some() && self.still_frozen().unwrap_or(false)
    }

    fn go(&mut self) -> Result<Duration, StopError> {
        let Some((since, limits)) = self.since.take() else { return Ok(Duration::ZERO) };
        let stood = self.still_frozen();
        self.thaw()?;
        if stood? {
            Ok(since.elapsed())
        } else {
            Err(StopError::LetGo { limit_ms: limits.stand.as_millis() })
        }
    }
}

impl Drop for Freezer {
    /// Lets everybody go, and removes a cgroup of our own when it is empty (else its processes stay in
    /// it).
    fn drop(&mut self) {
        if self.own {
            let _ = self.thaw();
            let _ = fs::remove_dir(&self.directory);
        } else {
            let _ = self.go();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_hierarchy_is_found_beside_the_first() {
        let mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/a\\040b cgroup2 rw 0 0\n";
        assert_eq!(mount_point_in(mounts), Some("/sys/fs/a b".into()));
        assert_eq!(mount_point_in("none / ext4 rw 0 0"), None);
    }
}
