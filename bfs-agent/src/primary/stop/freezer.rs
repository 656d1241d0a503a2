//! The cgroup v2 freezer: the command of `run` lives in a cgroup of its own, `attach --cgroup` has one
//! that is somebody else's: that one is never removed, and where its owner froze it, it stays frozen.
//!
//! Assumes a writable cgroup2 mount (it may stand beside v1; no controller is needed). A task
//! freezes on its way back to user mode, so a frozen cgroup has no call in flight but those that
//! the kernel counts as frozen (a vfork parent, ptrace stops). A frozen cgroup stays frozen after
//! its freezer is gone, which is why each stop is announced to the [`Guard`] first.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use super::guard::Guard;
use super::{Limits, StopError, Stopped, Stopper};

/// A cgroup that can be frozen.
#[derive(Debug)]
pub struct Freezer {
    directory: PathBuf,
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
            .watch_cgroup(directory)
            .map_err(|e| StopError::system("write", "the pipe to the guard process", e))?;
        let directory = directory.to_owned();
        Ok(Self { directory, events, guard, since: None, own, frozen_before: false })
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

    fn write_freeze(&self, value: &str) -> Result<(), StopError> {
        let file = self.directory.join("cgroup.freeze");
        fs::write(&file, value).map_err(|e| StopError::system("write", file.display(), e))
    }

    fn thaw(&mut self) -> Result<(), StopError> {
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
    fn wait_frozen(&mut self, since: Instant, limits: Limits) -> Result<(), StopError> {
        loop {
            if self.frozen()? {
                return Ok(());
            }
            let Some(left) = limits.reach.checked_sub(since.elapsed()) else {
                return Err(StopError::Late { limit_ms: limits.reach.as_millis(), waiting: self.waiting() });
            };
            let timeout = rustix::event::Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            };
            let mut fds = [PollFd::from_borrowed_fd(self.events.as_fd(), PollFlags::PRI)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
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
        self.frozen_before = !self.own && self.freezes();
        if !self.frozen_before {
            self.guard
                .stopping(limits.stand)
                .map_err(|e| StopError::system("write", "the pipe to the guard process", e))?;
        }
        let stopped = self.write_freeze("1").and_then(|()| self.wait_frozen(since, limits));
        if let Err(error) = stopped {
            self.thaw()?;
            return Err(error);
        }
        self.since = Some((since, limits));
        Ok(Stopped { reached_in: since.elapsed(), threads: 0 })
    }

    fn standing(&mut self) -> bool {
        self.since.is_some() && self.frozen().unwrap_or(false)
    }

    fn go(&mut self) -> Result<Duration, StopError> {
        let Some((since, limits)) = self.since.take() else { return Ok(Duration::ZERO) };
        let stood = self.frozen();
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
