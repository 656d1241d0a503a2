//! What the agent and the first process of a PID namespace tell each other: one message per packet of a
//! `SOCK_SEQPACKET` pair, so that each is whole and the end of the other side shows.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use crate::primary::clock::timespec;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Longest message, bytes: the arguments of a command have to fit.
pub(super) const MESSAGE_MAX: usize = 160 << 10;

/// What a child is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// It is the user's command: the first process of the tree that is followed.
    Command,
    /// It does something for the agent.
    Tool,
}

/// What the agent wants.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// Make a child up to just before its exec.
    Hold {
        role: Role,
        arguments: Vec<OsString>,
        /// The child moves into this cgroup first.
        cgroup: Option<PathBuf>,
        /// Its output goes there; the descriptors 0 to 2 that are inherited stay open above
        /// [`super::STANDARD`].
        output: Option<PathBuf>,
    },
    /// What is at the first path is at the second one, too, for all in these namespaces.
    Bind(PathBuf, PathBuf),
    /// The command is going to be restored under this number; the next child gets one behind the second.
    Expect { command: i32, above: i32 },
    /// The child that is held begins.
    Go,
    /// It ends, without having begun.
    Cancel,
    /// The command gets a signal.
    Signal(i32),
    /// Nothing will be asked any more: end when no process is left.
    Leave,
}

/// What the first process tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Said {
    /// It is there.
    Ready,
    /// The child is held; its number in the namespace.
    Held(i32),
    /// The child executes its program.
    Began,
    /// It could not: the error number, and what was tried.
    Failed(i32, String),
    /// A child has ended, with this status as waitpid(2) gives it.
    Ended(Role, i32),
}

/// Makes a pair; both ends are closed at exec.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: the array has room for the two descriptors.
    let made = unsafe {
        libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr())
    };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, and owned by nobody else.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

pub(super) fn tell<T: Serialize>(to: impl AsFd, message: &T) -> io::Result<()> {
    let bytes = rmp_serde::to_vec(message).map_err(io::Error::other)?;
    if bytes.len() > MESSAGE_MAX {
        return Err(Errno::TOOBIG.into());
    }
    loop {
        match send(&to, &bytes, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            sent => return sent.map(drop).map_err(Into::into),
        }
    }
}

/// The next message; `None` at the end of the other side.
pub(super) fn hear<T: DeserializeOwned>(from: impl AsFd) -> io::Result<Option<T>> {
    let mut bytes = vec![0; MESSAGE_MAX];
    let length = loop {
        match recv(&from, &mut bytes[..], RecvFlags::empty()) {
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(None),
            got => break got?.0,
        }
    };
    if length == 0 {
        return Ok(None);
    }
    rmp_serde::from_slice(&bytes[..length]).map(Some).map_err(io::Error::other)
}

/// Whether there is something to hear within the time.
pub(super) fn is_heard(from: impl AsFd, limit: Duration) -> io::Result<bool> {
    let timeout = timespec(limit);
    match poll(&mut [PollFd::new(&from, PollFlags::IN)], Some(&timeout)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_whole_and_the_end_shows() {
        let (one, two) = pair().unwrap();
        let order = Order::Hold {
            role: Role::Tool,
            arguments: vec!["a".into(), "\u{fffd} b".into()],
            cgroup: None,
            output: Some("/o".into()),
        };
        tell(&one, &order).unwrap();
        tell(&one, &Order::Signal(15)).unwrap();
        let heard: Order = hear(&two).unwrap().unwrap();
        assert!(matches!(heard, Order::Hold { role: Role::Tool, arguments, .. } if arguments.len() == 2));
        assert!(matches!(hear(&two).unwrap(), Some(Order::Signal(15))));
        assert!(!is_heard(&two, Duration::ZERO).unwrap());
        drop(one);
        assert!(is_heard(&two, Duration::ZERO).unwrap());
        assert!(hear::<Order>(&two).unwrap().is_none());
        assert!(tell(&two, &Said::Ready).is_err(), "and no signal ends us");
    }
}
