//! One group at work: capture, engine, shipper and control tied together.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use super::failure::{Failure, Kind};
use super::process::Inherited;
use super::schedule::Schedule;
use crate::net::Destination;

/// What the user asked for, checked as far as that needs no kernel and no replayer.
#[derive(Clone, Debug)]
pub struct SessionOptions {
    /// Name of the group.
    pub group: String,
    /// The subtrees: absolute, without symlinks, not nested.
    pub roots: Vec<PathBuf>,
    /// Where the backup is.
    pub backup: Destination,
    /// When checkpoints are taken.
    pub schedule: Schedule,
    /// FROM=TO of `--map`.
    pub maps: Vec<(PathBuf, PathBuf)>,
    /// The file of the shared secret.
    pub secret_file: Option<PathBuf>,
    /// The control socket, if not the default.
    pub socket: Option<PathBuf>,
    /// How long the last checkpoint is waited for.
    pub final_wait: Duration,
    /// Longest write whose bytes travel through the ring; `None` for the built-in choice.
    pub inline_max: Option<u64>,
    /// Size of the ring; `None` for the built-in choice.
    pub ring_bytes: Option<u64>,
}

/// Runs a command and replicates what it does; returns the exit status of the whole.
///
/// # Errors
/// [`Failure`] when replication could not be started; the command was not run then.
pub fn run(_: SessionOptions, _: Vec<OsString>, _: Inherited) -> Result<u8, Failure> {
    Err(not_yet())
}

/// Replicates what running processes and their descendants do, until they end or `stop`.
///
/// # Errors
/// [`Failure`].
pub fn attach(_: SessionOptions, _: Vec<u32>, _: Inherited) -> Result<u8, Failure> {
    Err(not_yet())
}

/// Goes on for an agent that died, with the configuration in the group's state file.
///
/// # Errors
/// [`Failure`].
pub fn resume(_group: &str, _: Inherited) -> Result<u8, Failure> {
    Err(not_yet())
}

fn not_yet() -> Failure {
    Failure::new(Kind::Other, "the session is not part of this build", "")
}
