//! Stopping the selected processes for a moment, and the guard that lets them go.
//!
//! A stop is the exception (most checkpoints need none). Two forms stand behind one trait:
//! [`freezer`] freezes a cgroup that the command of `run` lives in, [`ptrace`] interrupts every
//! thread of the processes of `attach --pid`. Whatever happens to the agent, the program goes on:
//! the kernel lets ptraced threads go when their tracer dies, and [`guard`] is a process of its
//! own that thaws the cgroup when the agent dies or a stop lasts beyond its limit.

pub mod freezer;
pub mod guard;
pub mod ptrace;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// How long a stop may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Until all of them stand.
    pub reach: Duration,
    /// From the request until they are let go, whatever the agent does meanwhile. At least
    /// `reach`.
    pub stand: Duration,
}

/// All selected processes stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// From the request until the last one stood.
    pub reached_in: Duration,
    /// How many threads stand (ptrace), or 0 where they were not counted (freezer).
    pub threads: usize,
}

/// Why the processes do not stand, or stood too short.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// A system call failed.
    #[error("cannot stop the program: {call} on {on}: {source}")]
    System {
        /// Name of the call.
        call: &'static str,
        /// What it was called on.
        on: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Not all of them stood within [`Limits::reach`]; they were let go again.
    #[error("the program did not stand within {limit_ms} ms ({waiting}); it goes on")]
    Late {
        /// The limit.
        limit_ms: u128,
        /// Who is missing, as far as that is known.
        waiting: String,
    },
    /// The guard let them go before [`Stopper::go`]: what was read meanwhile does not count.
    #[error("the program was let go after {limit_ms} ms, before everything was read")]
    LetGo {
        /// The limit that had passed.
        limit_ms: u128,
    },
    /// There is no cgroup v2 hierarchy.
    #[error("no cgroup2 file system in /proc/self/mounts: mount one (mount -t cgroup2 none DIR)")]
    NoCgroup2,
    /// The path is not a cgroup.
    #[error("{0} is not a cgroup that can be frozen")]
    NotACgroup(PathBuf),
    /// They stand already.
    #[error("the program is stopped already")]
    Already,
}

impl StopError {
    /// A failed call.
    fn system(call: &'static str, on: impl std::fmt::Display, source: io::Error) -> Self {
        Self::System { call, on: on.to_string(), source }
    }
}

/// Something that can make the selected processes stand.
pub trait Stopper: Send {
    /// Stops them; when this returns `Ok`, none of them executes user code or is inside a system
    /// call that could still change a file.
    ///
    /// # Errors
    /// [`StopError`]; then none of them is stopped.
    fn stop(&mut self, limits: Limits) -> Result<Stopped, StopError>;

    /// Whether they (still) stand. To be asked after the last read, before it is believed.
    fn standing(&mut self) -> bool;

    /// Lets them go; returns how long they stood, from the request on. Does nothing but return
    /// zero when they were not stopped.
    ///
    /// # Errors
    /// [`StopError::LetGo`] when they did not stand until now.
    fn go(&mut self) -> Result<Duration, StopError>;
}
