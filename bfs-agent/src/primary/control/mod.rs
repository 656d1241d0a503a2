//! The socket through which commands reach a running agent.
//!
//! One line of JSON a message ([`Request`], [`Reply`]), over a unix socket of mode 0600 whose
//! peer must be root or the agent's own user. Commands and programs of the user speak the same: docs/interface.md is
//! written for the latter. The [`Server`] turns requests into [`Inbound`] messages on a channel that the engine reads
//! between two events; the engine never waits for a client. [`Client`] is what a program in Rust uses.

mod client;
mod lines;
mod messages;
mod policies;
mod real_path;
mod request;
mod server;

use std::path::PathBuf;

pub use client::{Client, ClientError, milliseconds};
pub use messages::{
    CheckpointStatus, Counters, DestinationStatus, FailureKind, FencedStatus, ForeignStatus, FurtherProcess,
    HookStatus, ProcessStatus, RecoveryStatus, Reply, SpoolStatus, Standing, State, Status, StopTimes,
    StrangerStatus, VerifyReport,
};
pub use policies::PolicySettings;
pub use request::{BadRequest, NEWEST, Request, WaitFor};
pub use server::{Inbound, Replies, Server, ServerError, Ticket};

/// Longest request.
const REQUEST_MAX: usize = 64 << 10;
/// Longest reply: the longest lists of a [`VerifyReport`] fit.
const REPLY_MAX: usize = 64 << 20;

/// Where the agent of a group listens unless told otherwise.
#[must_use]
pub fn default_socket(group: &str) -> PathBuf {
    PathBuf::from(format!("/run/bfs/agent-{group}.sock"))
}
