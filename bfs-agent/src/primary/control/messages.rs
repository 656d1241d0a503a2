//! What the agent answers.

use std::path::PathBuf;

use bfs_common::record::{CheckpointId, Epoch, Sequence};
use bfs_common::wire::StoreState;
use serde::{Deserialize, Serialize};

use crate::primary::images::OpenOutside;

use super::request::{BadRequest, WaitFor};
use crate::primary::engine::foreign::Policy;

/// What the agent answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// How it stands.
    Status(Box<Status>),
    /// All selected processes stand, everything was read, the marker is placed. The only reply
    /// that is followed by another.
    Standing {
        /// Number of the checkpoint.
        checkpoint: CheckpointId,
        /// From the request to the stop of the last one, microseconds.
        reached_us: u64,
    },
    /// The checkpoint is where it was to be.
    Checkpoint {
        /// Its number.
        checkpoint: CheckpointId,
        /// The state that it has reached (at least what was asked for).
        reached: WaitFor,
        /// How long processes stood for it, microseconds.
        stopped_us: u64,
    },
    /// The update is noted, and that is durable somewhere: it will not be forgotten, whatever happens to the agent.
    Reported {
        /// Every checkpoint with a higher number has what was reported.
        after: CheckpointId,
    },
    /// The file stands there as it was. That is durable, and noted durably for the next checkpoint.
    Recovered {
        /// The checkpoint that it is of.
        checkpoint: CheckpointId,
        /// Its size in bytes.
        bytes: u64,
        /// Every checkpoint with a higher number has it so.
        after: CheckpointId,
    },
    /// The file has what was captured last, in place and durably.
    BroughtBack {
        /// Its size in bytes.
        bytes: u64,
        /// How many of them were written.
        written: u64,
    },
    /// Files and processes are as they were, and the processes run.
    WentBack {
        /// As at this checkpoint.
        checkpoint: CheckpointId,
        /// What they had open then outside of the replicated directories, and what became of it.
        outside: Vec<OpenOutside>,
    },
    /// Everything captured until the request is durable at the destination.
    Flushed {
        /// The last durable record.
        durable: Sequence,
        /// The last confirmed checkpoint.
        confirmed: CheckpointId,
    },
    /// The comparison.
    Verified(VerifyReport),
    /// The policies that hold, in their order.
    Policies {
        /// All of them.
        policies: Vec<crate::policy::Policy>,
    },
    /// The destinations, the first one first.
    Destinations {
        /// All of them.
        destinations: Vec<DestinationStatus>,
    },
    /// It ends now.
    Ended {
        /// The last checkpoint.
        checkpoint: CheckpointId,
        /// Where that has come to; `None` when not even all of it is durable.
        reached: Option<WaitFor>,
        /// Where it is sealed: the command that sends it.
        send_by: Option<String>,
        /// Files that did not come back from a disk that lost them, each with entry, action and reason.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        not_recovered: Vec<String>,
    },
    /// It was not done.
    Failed {
        /// What kind of failure, for the exit status.
        kind: FailureKind,
        /// Which field of the request is to blame.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        field: Option<String>,
        /// What failed, on what, why.
        message: String,
        /// What to do.
        hint: String,
    },
}

impl Reply {
    /// Whether another reply follows.
    #[must_use]
    pub fn is_last(&self) -> bool {
        !matches!(self, Self::Standing { .. })
    }

    /// A failure.
    #[must_use]
    pub fn failed(kind: FailureKind, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Failed { kind, field: None, message: message.into(), hint: hint.into() }
    }

    /// A request that cannot be done as it is written.
    #[must_use]
    pub fn bad(why: BadRequest) -> Self {
        let kind = if why.is_unknown { FailureKind::Unknown } else { FailureKind::Bad };
        Self::Failed { kind, field: why.field, message: why.message, hint: why.hint }
    }
}

/// Kinds of failures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// Not within the time.
    Timeout,
    /// The replayer refuses this agent for good.
    Refused,
    /// The processes could not be stopped, or were let go too early: no checkpoint was taken.
    GivenUp,
    /// Something of the kind is being done already.
    Busy,
    /// The agent ends or ended.
    Ending,
    /// The request is not understood, or asks for what cannot be.
    Bad,
    /// The agent does not know such a request: it may be one of another release.
    Unknown,
    /// Neither root nor the agent's own user asks.
    Denied,
    /// Something else went wrong.
    Failed,
}

/// What an agent is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Loading the probes, scanning.
    #[default]
    Starting,
    /// Sending the first copy of what exists.
    Copying,
    /// Following what the program does.
    Following,
    /// The selected processes stand.
    Stopped,
    /// Bringing files back to a checkpoint.
    RollingBack,
    /// Waiting for the last checkpoint.
    Ending,
    /// Refused by the replayer: nothing more is sent.
    Refused,
    /// The backup was promoted: another host is the primary.
    Fenced,
}

/// How a destination stands to this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// It takes the stream, and confirms in time.
    #[default]
    Attached,
    /// It takes the stream, and nothing was confirmed for longer than `--alert-after`.
    Lagging,
    /// There is no connection.
    Detached,
    /// It was promoted: another host is the primary, and this one has made nothing since.
    Fenced,
    /// It does not take the stream: what this host made is not what it has.
    Diverged,
}

impl Standing {
    /// All of them, and what they are called.
    pub const ALL: [(Self, &str); 5] = [
        (Self::Attached, "attached"),
        (Self::Lagging, "lagging"),
        (Self::Detached, "detached"),
        (Self::Fenced, "fenced"),
        (Self::Diverged, "diverged"),
    ];
}

/// Another host is the primary.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FencedStatus {
    /// Which.
    pub host: String,
    /// The last checkpoint that both have.
    pub at: CheckpointId,
    /// Since when, in nanoseconds since 1970.
    pub since_ns: i64,
    /// This host has made something after that.
    pub diverged: bool,
}

/// A checkpoint in the status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointStatus {
    /// Its number; 0 for none yet.
    pub number: CheckpointId,
    /// How long ago its instant was; `None` when that is not known (taken by an agent before).
    pub age_ms: Option<u64>,
    /// The user's tag.
    pub tag: String,
}

/// A destination in the status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DestinationStatus {
    /// As given to `--backup`.
    pub address: String,
    /// Whether there is a connection now.
    pub connected: bool,
    /// How it stands to this host.
    pub standing: Standing,
    /// Since when it stands so, nanoseconds since 1970.
    pub since_ns: i64,
    /// Why, unless it is attached.
    pub why: Option<String>,
    /// The last durable record there.
    pub durable: Sequence,
    /// The last confirmed checkpoint.
    pub confirmed: CheckpointId,
    /// The last applied checkpoint.
    pub applied: CheckpointId,
    /// Whether it takes more, as far as it said: `ready`, `stuck`, `full`, `behind`, `log-failed`, `damaged`.
    pub store: StoreState,
    /// Round trip of the last heartbeat.
    pub round_trip_us: u64,
    /// How often the connection was made again.
    pub reconnects: u64,
    /// Why there is no connection, or why the one before ended.
    pub last_error: Option<String>,
    /// Why nothing more is sent.
    pub refusal: Option<String>,
    /// Most bytes a second that are sent there, where the user set a limit.
    #[serde(default)]
    pub rate_limit: Option<u64>,
    /// More waits than goes within 2 s at that limit.
    #[serde(default)]
    pub held_back: bool,
    /// Bytes of records that were sent there, what was sent again included.
    #[serde(default)]
    pub sent_bytes: u64,
    /// As how many they travelled: less where they are compressed.
    #[serde(default)]
    pub wire_bytes: u64,
    /// Whether they are compressed, over this connection.
    #[serde(default)]
    pub compressed: bool,
}

/// The spool in the status.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpoolStatus {
    /// Its folder; `None` where there is to be none.
    pub folder: Option<PathBuf>,
    /// Records that only it has.
    pub records: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What it needs on the disk.
    pub disk_bytes: u64,
    /// How much that may be.
    pub bytes_max: u64,
    /// Age of what is oldest in it.
    pub oldest_ms: Option<u64>,
    /// How old that may get.
    pub oldest_ms_max: u64,
    /// It takes no more, because of one of its bounds.
    pub is_full: bool,
    /// There is no room: instead of bytes only what is touched is noted, and read when the backup is back.
    pub notes_only: bool,
    /// Why it takes nothing now.
    pub trouble: Option<String>,
    /// While it is being sent: how long that will take.
    pub left_ms: Option<u64>,
}

/// What was counted since the agent's start. `reserve_failed` to `compat` come from the probes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Events captured.
    pub records: u64,
    /// Writes whose bytes came with the event.
    pub inline: u64,
    /// Writes whose bytes were read from the file.
    pub by_reference: u64,
    /// Events that found no room in the ring (each names its inode).
    pub reserve_failed: u64,
    /// Times when not even the inode could be named, so that everything was compared.
    pub rescan: u64,
    /// Memory of the program that could not be read.
    pub user_unreadable: u64,
    /// Ends of calls without a beginning, not counted as operations.
    pub no_enter: u64,
    /// Calls of 32-bit programs.
    pub compat: u64,
    /// Tasks that found no room in the table of selected ones.
    pub tasks_full: u64,
    /// Times when a probe did not run because it was running (`recursion_misses`).
    pub probe_misses: u64,
    /// Times that everything in the group became suspect and was read again.
    pub everything_suspect: u64,
    /// Calls whose order or effect was settled by reading.
    pub ambiguous: u64,
    /// Records of the stream made.
    pub stream_records: u64,
    /// Bytes of the stream made.
    pub stream_bytes: u64,
}

/// How long processes were stopped, microseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopTimes {
    /// Number of stops.
    pub count: u64,
    /// Half of them took at most this.
    pub p50_us: u64,
    /// 99 of 100 took at most this.
    pub p99_us: u64,
    /// The longest.
    pub max_us: u64,
}

/// How an agent stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Name of the group.
    pub group: String,
    /// What the agent is doing.
    pub state: State,
    /// Why it is fenced, where it is.
    pub fenced: Option<FencedStatus>,
    /// The agent's process id.
    pub pid: u32,
    /// What it replicates: the command of `run`, or the pids of `attach`.
    pub program: String,
    /// How many threads are selected.
    pub selected_threads: u64,
    /// The subtrees.
    pub roots: Vec<String>,
    /// When checkpoints are taken, as given to `--checkpoint`.
    pub schedule: String,
    /// When the next one is due by the calendar (cron), in UTC.
    pub next_by_calendar: Option<String>,
    /// Where the stream goes.
    pub destinations: Vec<DestinationStatus>,
    /// What is kept for a destination that is away.
    pub spool: SpoolStatus,
    /// The agent's epoch.
    pub epoch: Epoch,
    /// The last checkpoint whose records are all durable somewhere.
    pub sealed: CheckpointStatus,
    /// The last confirmed checkpoint.
    pub confirmed: CheckpointStatus,
    /// The last applied checkpoint.
    pub applied: CheckpointStatus,
    /// The last record made.
    pub last_sequence: Sequence,
    /// Records made that are not durable yet.
    pub lag_records: u64,
    /// Their bytes.
    pub lag_bytes: u64,
    /// How far the backup is behind: for how long there has been something that no confirmed checkpoint has.
    pub lag_ms: u64,
    /// Objects, ranges and entries that have to be read before the next checkpoint.
    pub suspects: u64,
    /// Calls in flight or unsettled things that keep a checkpoint from being placed, in words.
    pub waiting_for: Option<String>,
    /// Why no (further) checkpoint is confirmed; `None` when all is well.
    pub not_confirmed_because: Option<String>,
    /// Checkpoints taken.
    pub checkpoints_taken: u64,
    /// Checkpoints that came later than scheduled.
    pub checkpoints_late: u64,
    /// Checkpoints given up.
    pub checkpoints_given_up: u64,
    /// Checkpoints for which processes had to be stopped.
    pub checkpoints_stopped: u64,
    /// How long they were stopped.
    pub stops: StopTimes,
    /// Bytes of the ring.
    pub ring_bytes: u64,
    /// Bytes of it in use.
    pub ring_used_bytes: u64,
    /// What others than the selected processes changed.
    pub foreign: ForeignStatus,
    /// What is run before and after each checkpoint.
    pub hooks: HookStatus,
    /// Process state in checkpoints; `None` where none is wanted, or the command has not begun.
    pub process: Option<ProcessStatus>,
    /// Files that come back by policy.
    pub recovery: RecoveryStatus,
    /// Counters.
    pub counters: Counters,
    /// The last thing that went wrong, also when it was overcome.
    pub last_error: Option<String>,
}

/// Process state in checkpoints (`--with-process`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessStatus {
    /// Version of CRIU.
    pub criu: String,
    /// The checkpoints that have it and can be gone back to.
    pub kept: Vec<CheckpointId>,
    /// Dumps that came about.
    pub dumped: u64,
    /// Checkpoints that have files only, because the processes could not be dumped.
    pub failed: u64,
    /// Why the last of them.
    pub failure: Option<String>,
    /// How long the last dump took, within the stop, microseconds.
    pub last_us: u64,
    /// Its bytes, with those that were dumped ahead.
    pub last_bytes: u64,
    /// Whether the kernel tells which memory changed, so that it can be dumped ahead.
    pub tracks_memory: bool,
    /// In how many rounds that was done before the last dump.
    pub ahead_rounds: u32,
    /// Bytes of these.
    pub ahead_bytes: u64,
    /// How long they took, while the processes ran but for moments, microseconds.
    pub ahead_us: u64,
    /// Why there were none, where there might be.
    pub ahead_failure: Option<String>,
    /// How long the processes stood for that checkpoint altogether, microseconds.
    pub last_stop_us: u64,
    /// How long of that it took until all of them stood, microseconds.
    pub last_reach_us: u64,
    /// What they had open outside of the replicated directories when they were last dumped or restored, and what becomes
    /// of it at a restore.
    pub outside: Vec<OpenOutside>,
    /// The same of each checkpoint that is kept.
    pub kept_outside: Vec<(CheckpointId, Vec<OpenOutside>)>,
    /// Checkpoints that have files only because the dump before had taken longer than the interval
    /// (`--process-overrun skip`).
    pub skipped: u64,
    /// How often the processes were restored.
    pub restored: u64,
    /// The last checkpoint whose process state the backup has.
    pub shipped: Option<CheckpointId>,
    /// Bytes of it that had to be sent: what the one before had as well is not.
    pub shipped_bytes: u64,
    /// How long that took, beside the program, microseconds.
    pub shipped_us: u64,
    /// Checkpoints whose process state stayed on this host: the next one came before it was sent, or it was not taken.
    pub not_shipped: u64,
    /// Why the last one could not be sent, while it could not.
    pub ship_failure: Option<String>,
    /// The same of the destinations beside the first.
    pub further: Vec<FurtherProcess>,
}

/// Process state at a destination beside the first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FurtherProcess {
    /// As given to `--backup`.
    pub address: String,
    /// The last checkpoint whose process state it has.
    pub shipped: Option<CheckpointId>,
    /// Bytes of it that had to be sent.
    pub shipped_bytes: u64,
    /// Checkpoints whose process state it has not got.
    pub not_shipped: u64,
    /// Why the last one could not be sent, while it could not.
    pub ship_failure: Option<String>,
}

/// Files whose policy brings them back (recovery `automatic` and `request`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryStatus {
    /// How often one came back.
    pub recovered: u64,
    /// How often one did not, after all tries.
    pub failures: u64,
    /// How many are being brought back now, or wait for it.
    pub waiting: u64,
    /// Errors of which the file could not be told.
    pub not_told: u64,
    /// What did not come back, each with entry, action and reason, until it does.
    pub troubles: Vec<String>,
}

/// Commands that are run before and after each checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookStatus {
    /// `--before-checkpoint`.
    pub before: Option<String>,
    /// `--after-checkpoint`.
    pub after: Option<String>,
    /// Which of them runs now: `before`, `after`.
    pub running: Option<String>,
    /// For how long.
    pub running_ms: u64,
    /// How often one of them failed.
    pub failures: u64,
    /// The last failure.
    pub last_failure: Option<String>,
}

/// What others than the selected processes changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForeignStatus {
    /// What is done with it.
    pub policy: Policy,
    /// Whether it is seen at all: the kernel has to tell it, and someone who follows a command to bring back what
    /// it did does not look at it.
    pub is_seen: bool,
    /// Who changed something, most first. The process 0 stands for those beyond the 1,023 that are told apart.
    pub processes: Vec<StrangerStatus>,
    /// Files that others have open for writing.
    pub open_for_writing: u64,
    /// With [`Policy::Ignore`]: files whose content does not count, because others changed it; the first 1,000.
    pub ignored: Vec<String>,
    /// How many there are.
    pub ignored_count: u64,
}

/// A process that is not selected and changed something.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StrangerStatus {
    /// Its process id.
    pub pid: u32,
    /// What it was called.
    pub command: String,
    /// How often it changed something: each time that an object got new times.
    pub changes: u64,
}

/// What comparing primary and backup gave.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// The applied checkpoint that was compared.
    pub checkpoint: CheckpointId,
    /// The last one: what changed meanwhile was compared at later checkpoints.
    pub last: CheckpointId,
    /// What differed and was sent again, one line each; the first [`VerifyReport::LINES_MAX`].
    pub repaired: Vec<String>,
    /// How many there are.
    pub repaired_count: u64,
    /// Entries that were compared.
    pub compared: u64,
    /// Bytes that were read on the primary.
    pub bytes: u64,
    /// Each difference, one line; the first [`VerifyReport::LINES_MAX`].
    pub different: Vec<String>,
    /// How many there are.
    pub different_count: u64,
    /// What could not be compared, and why; the first [`VerifyReport::LINES_MAX`].
    pub not_compared: Vec<String>,
    /// How many there are.
    pub not_compared_count: u64,
}

impl VerifyReport {
    /// Longest lists; what is beyond is counted only.
    pub const LINES_MAX: usize = 10_000;

    /// Notes a difference.
    pub fn differs(&mut self, line: String) {
        self.different_count += 1;
        if self.different.len() < Self::LINES_MAX {
            self.different.push(line);
        }
    }

    /// Notes what differed and does not any more.
    pub fn was_repaired(&mut self, line: String) {
        self.repaired_count += 1;
        if self.repaired.len() < Self::LINES_MAX {
            self.repaired.push(line);
        }
    }

    /// Notes what could not be compared.
    pub fn skipped(&mut self, line: String) {
        self.not_compared_count += 1;
        if self.not_compared.len() < Self::LINES_MAX {
            self.not_compared.push(line);
        }
    }
}
