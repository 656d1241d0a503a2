//! Why a replayer refuses: part of a frame of [`crate::wire`].

use serde::{Deserialize, Serialize};

use crate::record::{CheckpointId, Epoch, Sequence};

/// Why a replayer refuses. Each says what to do in its text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The other side speaks another version.
    #[error(
        "the replayer speaks protocol version {ours}, the agent {theirs}: install the same release on both"
    )]
    Version {
        /// Version of the replayer.
        ours: u32,
        /// Version of the agent.
        theirs: u32,
    },
    /// The peer's user may not connect.
    #[error("not authenticated: {0}")]
    NotAuthenticated(String),
    /// The peer's key has not the right that it needs for this.
    #[error(
        "this host's key may not {right} group {group:?}: another key wrote that group first, or it was never allowed; \
         on the backup, `bfs-replayer key allow {key} --group {group} --may {right}`"
    )]
    NotAllowed {
        /// The key, as people write it.
        key: String,
        /// Name of the group.
        group: String,
        /// The right that it has not.
        right: String,
    },
    /// The peer's key was revoked, or may do something else than before: it has to connect again.
    #[error("the backup changed what this host's key may do, or revoked it")]
    KeyChanged,
    /// The store holds this group name with another group identity.
    #[error("the store already holds another group named {name:?}: choose another --group or another store")]
    OtherGroup {
        /// The name.
        name: String,
    },
    /// A newer epoch was granted: this agent is fenced.
    #[error("fenced: a newer agent (epoch {newest}) writes this group")]
    Fenced {
        /// The newest epoch.
        newest: Epoch,
    },
    /// The backup was promoted: this host is not the group's primary any more.
    #[error(
        "FENCED: the backup was promoted to the primary on {host}, from checkpoint {at}, which is the last that both have; \
         what this host made after it is not on the backup"
    )]
    Promoted {
        /// The last checkpoint that both have.
        at: CheckpointId,
        /// Since when, in nanoseconds since 1970.
        since_ns: i64,
        /// The host that is the primary now.
        host: String,
    },
    /// A promotion, and the primary's agent is there and answers.
    #[error("an agent of the primary writes group {name:?} and answers: it would be fenced")]
    Attached {
        /// Name of the group.
        name: String,
    },
    /// Another agent is connected for this group.
    #[error("another agent is connected for group {name:?}: stop it first")]
    Busy {
        /// Name of the group.
        name: String,
    },
    /// A record is missing before the one that was sent.
    #[error("a gap in the stream: got record {got} after {have}")]
    Gap {
        /// The last that is there.
        have: Sequence,
        /// The one that came.
        got: Sequence,
    },
    /// The same number with other content.
    #[error("the stream forked at record {at}: this agent's history is not the one in the store")]
    Fork {
        /// Where.
        at: Sequence,
    },
    /// A marker came while suspects were open.
    #[error("checkpoint {checkpoint} refused: {open} suspects are not repaired")]
    OpenGap {
        /// The marker.
        checkpoint: CheckpointId,
        /// How many scopes are open.
        open: u64,
    },
    /// The store cannot take more (full, failed disk).
    #[error("the store takes nothing: {0}")]
    Store(String),
    /// There is no room to apply what it would take; it takes more when there is.
    #[error("the store takes nothing more: {0}")]
    Full(String),
    /// As much waits to be applied as may.
    #[error("the store takes nothing more: {0}")]
    Behind(String),
    /// The request or record cannot be understood or is not allowed.
    #[error("refused: {0}")]
    Bad(String),
}
