//! A command of the user with a time limit, in a process group of its own: what it started is ended with it, and
//! nothing else. A thread of its own waits for it, so nobody else does.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::primary::clock::timespec;

use super::Inherited;
use super::tree::group_lives;

/// What has not ended this long after SIGTERM gets SIGKILL.
const TERM_LIMIT: Duration = Duration::from_secs(5);
/// Between two looks whether all of a group have ended.
const LOOK: Duration = Duration::from_millis(10);

/// Why a hook did not do what it was to do.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It was not started.
    #[error("it cannot be started: {0}")]
    Start(std::io::Error),
    /// It said that it failed.
    #[error("it ended with status {0}")]
    Status(i32),
    /// Somebody ended it.
    #[error("it was ended by signal {0}")]
    Signal(i32),
    /// It took too long.
    #[error("it took longer than {} s and was ended", .0.as_secs_f32())]
    Limit(Duration),
}

/// A hook at work.
#[derive(Debug)]
pub struct Hook {
    /// When it was started.
    pub since: Instant,
    end: Receiver<Result<(), HookError>>,
}

impl Hook {
    /// Starts a command line of the shell. `inherited`: signals that this process took over, which it does not. Its output goes to standard error, where the messages of the agent go.
    #[must_use]
    pub fn start(
        command: &str,
        variables: &[(&'static str, String)],
        limit: Duration,
        inherited: Option<&Inherited>,
    ) -> Self {
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(command).envs(variables.iter().map(|(name, value)| (name, value)));
        shell.stdin(Stdio::null()).process_group(0);
        if let Some(restore) = inherited.cloned() {
            // SAFETY: between fork and exec only signal and sigprocmask are called, which are async-signal-safe.
            unsafe {
                shell.pre_exec(move || {
                    restore.restore();
                    Ok(())
                })
            };
        }
        let (ended, end) = mpsc::channel();
        let failed = ended.clone();
        let thread = std::thread::Builder::new().name("bfs-hook".into());
        let spawned = thread.spawn(move || {
            // Nobody may want to know any more.
            let _ = ended.send(run(shell, limit));
        });
        if let Err(e) = spawned {
            let _ = failed.send(Err(HookError::Start(e)));
        }
        Self { since: Instant::now(), end }
    }

    /// How it ended; `None` while it runs.
    #[must_use]
    pub fn ended(&self) -> Option<Result<(), HookError>> {
        match self.end.try_recv() {
            Ok(end) => Some(end),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                Some(Err(HookError::Start(std::io::Error::other("the thread that waited for it ended"))))
            }
        }
    }
}

fn run(mut shell: Command, limit: Duration) -> Result<(), HookError> {
    let output = std::io::stderr().as_fd().try_clone_to_owned().map_err(HookError::Start)?;
    let mut child = shell.stdout(output).spawn().map_err(HookError::Start)?;
    match watch(&child, limit) {
        Ok(true) => told(child.wait().map_err(HookError::Start)?),
        Ok(false) => {
            end_group(&mut child);
            Err(HookError::Limit(limit))
        }
        Err(e) => {
            end_group(&mut child);
            Err(HookError::Start(e.into()))
        }
    }
}

/// Whether the command ended within the time. It is not waited for: until it is, nobody else gets its number.
fn watch(child: &Child, limit: Duration) -> rustix::io::Result<bool> {
    let pid = pid_of(child);
    let pidfd: OwnedFd = pidfd_open(pid, PidfdFlags::empty())?;
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = timespec(left);
        match poll(&mut [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)], Some(&timeout)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
}

/// Ends the command and whatever it started in its group. The number of the group is that of the command, which is
/// waited for only afterwards: so it is nobody else's meanwhile.
fn end_group(child: &mut Child) {
    let group = pid_of(child);
    let deadline = Instant::now() + TERM_LIMIT;
    let _ = kill_process_group(group, Signal::TERM);
    while group_lives(child.id()) && Instant::now() < deadline {
        std::thread::sleep(LOOK);
    }
    let _ = kill_process_group(group, Signal::KILL);
    let _ = child.wait();
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_child(child)
}

fn told(status: ExitStatus) -> Result<(), HookError> {
    match status.code() {
        Some(0) => Ok(()),
        Some(status) => Err(HookError::Status(status)),
        None => Err(HookError::Signal(status.signal().unwrap_or(0))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::empty_set;
    use super::*;

    fn end(command: &str, limit: Duration) -> Result<(), String> {
        let inherited = Inherited { mask: empty_set(), ignored: Vec::new(), taken: empty_set() };
        let hook = Hook::start(command, &[("BFS_X", "a b".into())], limit, Some(&inherited));
        loop {
            if let Some(end) = hook.ended() {
                return end.map_err(|e| e.to_string());
            }
            assert!(hook.since.elapsed() < Duration::from_secs(60));
            std::thread::sleep(LOOK);
        }
    }

    #[test]
    fn a_hook_ends_as_it_says() {
        let long = Duration::from_secs(50);
        assert_eq!(end("test \"$BFS_X\" = 'a b' && test $$ = $(ps -o pgid= $$)", long), Ok(()));
        assert_eq!(end("exit 3", long), Err("it ended with status 3".into()));
        assert_eq!(end("kill -9 $$", long), Err("it was ended by signal 9".into()));
    }

    #[test]
    fn what_takes_too_long_is_ended_with_all_that_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("mark");
        // The shell ends at SIGTERM; the one has to tidy up a little, the other does not want to.
        let script = format!(
            "sh -c 'trap \"sleep 0.3; touch {}; exit\" TERM; while :; do sleep 0.01; done' & \
             sh -c 'trap \"\" TERM; echo $$ > {}; while :; do sleep 0.01; done' & wait",
            mark.display(),
            dir.path().join("pid").display(),
        );
        let began = Instant::now();
        let said = end(&script, Duration::from_millis(500)).unwrap_err();
        assert!(said.contains("0.5 s"), "{said}");
        assert!(began.elapsed() < TERM_LIMIT + Duration::from_secs(20));
        assert!(mark.exists(), "it had its time after SIGTERM");
        let pid: u32 = std::fs::read_to_string(dir.path().join("pid")).unwrap().trim().parse().unwrap();
        // Killed, it is alive until it gets to run, and then a zombie until init has waited for it.
        let lives =
            || super::super::start_of(pid).is_some_and(|start| super::super::any_alive([(pid, start)]));
        while lives() {
            assert!(began.elapsed() < TERM_LIMIT + Duration::from_secs(20), "it was not killed");
            std::thread::sleep(LOOK);
        }
    }

    #[test]
    fn what_it_leaves_running_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let script = format!("sleep 1000 & echo $! > {}", pid.display());
        assert_eq!(end(&script, Duration::from_secs(50)), Ok(()));
        let pid: u32 = std::fs::read_to_string(pid).unwrap().trim().parse().unwrap();
        let start = super::super::start_of(pid).expect("it runs");
        assert!(super::super::any_alive([(pid, start)]));
        // SAFETY: a signal to a process that this test started, and that runs.
        unsafe { libc::kill(pid.cast_signed(), libc::SIGKILL) };
    }
}
