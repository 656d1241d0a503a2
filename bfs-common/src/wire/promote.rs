//! Failover: a backup becomes the primary, and the one before is fenced.

use serde::{Deserialize, Serialize};

use crate::record::{CheckpointId, GroupId, PathBytes};

/// Who becomes the primary, and where its files are going to stand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promoter {
    /// Identity of the group on the host that is to write it from now on.
    pub writer: GroupId,
    /// Name of that host, for people.
    pub host: String,
    /// The directory below which each file stands at the absolute path that it had.
    pub to: PathBytes,
}

/// How far a promotion is. Each is durable before anything of the next is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PromoteStage {
    /// The primary before is fenced; the tree for the new one is being written, aside.
    Fenced,
    /// That is complete, and is being put into its place.
    Placing,
    /// It stands there.
    Done,
}

/// A history of a group: it begins where a backup was promoted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// It.
    pub history: [u8; 16],
    /// The one before: its checkpoints up to `at` are those of both.
    pub parent: [u8; 16],
    /// The last checkpoint that both have: the one that was promoted.
    pub at: CheckpointId,
    /// When it began, wall time in nanoseconds since 1970.
    pub since_ns: i64,
    /// Whose it is.
    pub by: Promoter,
    /// How far that is.
    pub stage: PromoteStage,
    /// When the primary before was refused last, in the same form; nil while it did not come.
    pub refused_ns: Option<i64>,
}
