//! What a checkpoint is asked for with, what came of it, and why there is none.

use std::time::Duration;

use bfs_common::record::{CheckpointId, Sequence};

use super::host::{Host, HostError};

/// What is done at the instant of a checkpoint with this number, while the processes stand.
pub type AtInstant<'a> = &'a mut dyn FnMut(&mut dyn Host, CheckpointId) -> Result<(), String>;

/// Whether the processes are stopped for a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Never: rather no checkpoint.
    Never,
    /// When the cut does not settle without.
    IfNeeded,
    /// Yes, and the caller lets them go.
    Hold,
}

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Request {
    /// The user's tag.
    pub tag: String,
    /// What triggered it.
    pub trigger: &'static str,
    /// Wall time now, nanoseconds since 1970.
    pub wall_ns: i64,
    /// Whether to stop.
    pub stop: Stop,
}

/// A checkpoint that stands in the stream.
#[derive(Clone, Debug)]
pub struct Taken {
    /// Its number.
    pub checkpoint: CheckpointId,
    /// Its marker: when this is durable, the checkpoint is confirmed.
    pub sequence: Sequence,
    /// The instant: it covers the calls that started at or before.
    pub at_ns: u64,
    /// Whether the processes were stopped.
    pub stopped: bool,
    /// How many cuts were tried.
    pub tries: u32,
    /// From the request to the marker.
    pub took: Duration,
    /// Calls counted until the marker: later ones are not in it.
    pub ops: u64,
    /// Their bytes.
    pub written_bytes: u64,
}

/// Why there is no checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A covered call does not end.
    #[error(
        "process {tgid} (thread {tid}) has been in system call {nr} for {for_ms} ms: no checkpoint until it ends"
    )]
    CallInFlight {
        /// Process.
        tgid: u32,
        /// Thread.
        tid: u32,
        /// System call number.
        nr: u32,
        /// Since when, milliseconds.
        for_ms: u64,
    },
    /// Others changed something, which is not to be.
    #[error(
        "process {process} changed {what} and is not selected: nothing is confirmed any more (--foreign refuse)"
    )]
    Foreign {
        /// Who.
        process: String,
        /// What.
        what: String,
    },
    /// Others go on changing what has to be read.
    #[error("process {process}, which is not selected, kept changing {what} while it was read")]
    Crossed {
        /// Who.
        process: String,
        /// What.
        what: String,
    },
    /// Nothing settled, also not with the processes stopped.
    #[error(
        "the files kept changing under the reads ({suspects} still suspect): somebody who is not stopped writes them"
    )]
    Unsettled {
        /// Objects that are still suspect.
        suspects: usize,
    },
    /// The state of the processes belongs to it, and could not be had.
    #[error("no checkpoint without the state of the processes (--process-failure refuse): {0}")]
    Processes(String),
    /// The outside world failed.
    #[error(transparent)]
    Host(#[from] HostError),
}
