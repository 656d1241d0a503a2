//! How the groups of a store stand.

use serde::{Deserialize, Serialize};

use super::promote::History;
use crate::record::{CheckpointId, CheckpointLabel, Epoch, GroupId, Sequence};

/// How a store stands to a group's stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StoreState {
    /// It takes what comes.
    #[default]
    Ready,
    /// It takes what comes, but a checkpoint cannot be applied; that is tried again.
    Stuck,
    /// There is no room to apply more: it takes nothing until there is.
    Full,
    /// As much waits to be applied as may: it takes nothing until less does.
    Behind,
    /// Its log failed: it takes nothing until that is over.
    LogFailed,
    /// It takes what comes, but bytes of backup files are lost: [`GetDamage`](super::Frame::GetDamage) says of which.
    Damaged,
}

impl StoreState {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Ready, Self::Stuck, Self::Full, Self::Behind, Self::LogFailed, Self::Damaged];

    /// Its name, as it is written in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Stuck => "stuck",
            Self::Full => "full",
            Self::Behind => "behind",
            Self::LogFailed => "log-failed",
            Self::Damaged => "damaged",
        }
    }
}

/// How the agent of a group stands, as its replayer sees it. Times are nanoseconds since 1970, by the replayer's clock.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentStanding {
    /// None has come since the replayer was started.
    #[default]
    Unseen,
    /// One is connected.
    Attached {
        /// Since when.
        since_ns: i64,
        /// When something came from it last, milliseconds ago.
        heard_ms: u64,
        /// Of the last heartbeat, microseconds; 0 before the first.
        round_trip_us: u64,
    },
    /// The last one said that it ends.
    Ended {
        /// When.
        since_ns: i64,
    },
    /// The last one is gone, and did not say so.
    Lost {
        /// Since when.
        since_ns: i64,
        /// How that was seen.
        why: String,
    },
}

/// How many bytes of state each destination has, for status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Name of the group.
    pub group: String,
    /// The last durable record.
    pub durable: Sequence,
    /// Epoch of it.
    pub epoch: Epoch,
    /// The last confirmed checkpoint.
    pub confirmed: CheckpointId,
    /// The last applied checkpoint.
    pub applied: CheckpointId,
    /// Label of the applied checkpoint.
    pub applied_label: CheckpointLabel,
    /// Whether the applier is at work on the tree right now.
    pub applying: bool,
    /// Bytes in the log that belong to no confirmed checkpoint.
    pub pending_bytes: u64,
    /// Records in the log that belong to no confirmed checkpoint.
    pub pending_records: u64,
    /// Scopes of gaps that are open.
    pub open_gaps: u64,
    /// Whether an agent is connected.
    pub attached: bool,
    /// More of it.
    pub agent: AgentStanding,
    /// The primary's files are being brought back to this checkpoint: until that is done they are between
    /// two states.
    pub rolling_back: Option<CheckpointId>,
    /// The last promotion, if there was one.
    pub history: Option<History>,
    /// Whether it takes more, and why not.
    pub state: StoreState,
    /// What is wrong, if anything is.
    pub trouble: Option<String>,
    /// Whose group it is: what a stream of a generation has to have in its head.
    pub id: GroupId,
}
