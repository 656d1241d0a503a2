//! Why a command of the agent fails, in the form in which the user is told: a kind (for the exit
//! status), what failed on what and why, and what to do.

use super::control::{ClientError, FailureKind};
use super::process::ProcessError;
use super::ship::ShipError;
use crate::net::ConnectError;
use bfs_common::wire::Refusal;

/// What to do where this host is not the primary any more.
pub const FENCED_HINT: &str = "let no program go on here; `bfs-agent surplus` with the same --group, --path and --backup keeps \
                               what this host has beyond that checkpoint, and nothing is changed here";

/// What to do where a file did not come back.
pub const NOT_RECOVERED_HINT: &str =
    "look at that disk; `bfs-replayer restore` writes the file to another place";

/// Kinds of failures; each has its own exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The command line makes no sense.
    Usage,
    /// A path is missing, no directory, nested, or overlaps the store.
    Path,
    /// Not root.
    NotRoot,
    /// The kernel has no BTF, or refuses the probes.
    NoBpf,
    /// No connection to the replayer.
    Unreachable,
    /// The replayer refuses.
    Refused,
    /// The group has an agent already.
    GroupBusy,
    /// There is no agent for this group.
    NoAgent,
    /// The checkpoint was given up, or something else is being done.
    GivenUp,
    /// Not within the time.
    Timeout,
    /// The last checkpoint is not confirmed.
    NotConfirmed,
    /// Files are to be brought back to a checkpoint, and are not (all) yet.
    RollbackUnfinished,
    /// The backup was promoted: this host is not the primary any more.
    Fenced,
    /// All went well but that a file did not come back from a disk that lost it.
    NotRecovered,
    /// The command of `run` cannot be executed.
    Command(u8),
    /// Anything else.
    Other,
}

impl Kind {
    /// The exit status.
    #[must_use]
    pub const fn exit_status(self) -> u8 {
        match self {
            Self::Usage => 64,
            Self::Path => 65,
            Self::NotRoot => 66,
            Self::NoBpf => 67,
            Self::Unreachable => 68,
            Self::Refused => 69,
            Self::Other => 70,
            Self::GroupBusy => 71,
            Self::NoAgent => 72,
            Self::GivenUp => 73,
            Self::Timeout => 74,
            Self::NotConfirmed => 75,
            Self::RollbackUnfinished => 76,
            Self::Fenced => 77,
            Self::NotRecovered => 78,
            Self::Command(status) => status,
        }
    }
}

/// A failure for the user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Which kind.
    pub kind: Kind,
    /// What failed, on what, why.
    pub message: String,
    /// What to do; empty when the message says it.
    pub hint: String,
}

impl Failure {
    /// A failure.
    #[must_use]
    pub fn new(kind: Kind, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: hint.into() }
    }

    /// What an agent answered.
    #[must_use]
    fn of_reply(kind: FailureKind, message: String, hint: String) -> Self {
        let kind = match kind {
            FailureKind::Timeout => Kind::Timeout,
            FailureKind::Refused => Kind::Refused,
            FailureKind::GivenUp | FailureKind::Busy => Kind::GivenUp,
            FailureKind::Ending => Kind::NoAgent,
            FailureKind::Denied => Kind::NotRoot,
            FailureKind::Bad | FailureKind::Unknown | FailureKind::Failed => Kind::Other,
        };
        Self { kind, message, hint }
    }
}

impl From<ShipError> for Failure {
    fn from(error: ShipError) -> Self {
        let kind = match &error {
            ShipError::Refused(Refusal::Promoted { .. })
            | ShipError::Connect(ConnectError::Refused { refusal: Refusal::Promoted { .. }, .. }) => {
                Kind::Fenced
            }
            ShipError::Refused(_)
            | ShipError::Unexpected
            | ShipError::Connect(
                ConnectError::Refused { .. }
                | ConnectError::Impostor(_)
                | ConnectError::WrongKey { .. }
                | ConnectError::NotKnown { .. }
                | ConnectError::Revoked { .. }
                | ConnectError::NotPairing { .. }
                | ConnectError::Wire { .. },
            ) => Kind::Refused,
            ShipError::Connect(
                ConnectError::Address(_)
                | ConnectError::NotPaired(_)
                | ConnectError::Keys(_)
                | ConnectError::NotANetwork(_),
            ) => Kind::Usage,
            ShipError::Start(_) => Kind::Other,
            _ => Kind::Unreachable,
        };
        let hint = match kind {
            Kind::Unreachable => {
                "start it on the backup: bfs-replayer serve --store DIR --listen ADDR; then try again"
            }
            Kind::Fenced => FENCED_HINT,
            _ => "",
        };
        Self::new(kind, error.to_string(), hint)
    }
}

impl From<ProcessError> for Failure {
    fn from(error: ProcessError) -> Self {
        let kind = match &error {
            ProcessError::Exec { .. } => Kind::Command(error.exit_status()),
            ProcessError::NoCommand | ProcessError::NoProcess(_) => Kind::Usage,
            ProcessError::System { .. } => Kind::Other,
        };
        let hint = match &error {
            ProcessError::Exec { .. } => "check the command after `--`; it is looked for in PATH",
            ProcessError::NoProcess(_) => "look for it with `ps`, and give its number to --pid",
            _ => "",
        };
        Self::new(kind, error.to_string(), hint)
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let (kind, hint) = match &error {
            ClientError::Failed { kind, message, hint, .. } => {
                return Self::of_reply(*kind, message.clone(), hint.clone());
            }
            ClientError::Bad { .. } => {
                (Kind::Other, "use bfs-agent of the same release as the agent that runs")
            }
            ClientError::Silent { .. } => (Kind::Timeout, "look at what the agent does: is it stopped?"),
            ClientError::NoAgent { .. } => (
                Kind::NoAgent,
                "start one with `bfs-agent run` or `bfs-agent attach`, or name its --group or --socket; \
                 after a crash: `bfs-agent resume`",
            ),
            ClientError::Ended(_) => (Kind::NoAgent, "if it crashed: `bfs-agent resume --group NAME`"),
            ClientError::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
                (Kind::NotRoot, "use the user that runs the agent, or root")
            }
            _ => (Kind::Other, ""),
        };
        Self::new(kind, error.to_string(), hint)
    }
}
