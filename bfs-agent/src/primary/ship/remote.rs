//! Asking a destination something on a connection of its own: manifest and status.
//!
//! Blocking, with a deadline, on a small runtime of its own: for commands, never for the engine.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bfs_common::record::{CheckpointId, ObjectId, PathBytes};
use bfs_common::wire::{Frame, GroupStatus, ManifestLine};

use crate::keys::Folder;
use crate::net::{self, AskError, ConnectError, Connection, Destination};

/// Objects in one question.
const SUSPECTS_MAX: usize = 65_536;

/// Makes connections to one destination.
pub type Connect = Arc<dyn Fn() -> ConnectFuture + Send + Sync>;
/// A connection that is being made.
pub type ConnectFuture = Pin<Box<dyn Future<Output = Result<Connection, ConnectError>> + Send>>;

/// Connections to a `tcp://` or `unix:` destination.
#[must_use]
pub fn network(destination: Destination, keys: Folder) -> Connect {
    let shared = Arc::new((destination, keys));
    Arc::new(move || {
        let shared = Arc::clone(&shared);
        Box::pin(async move { net::connect(&shared.0, &shared.1).await })
    })
}

/// Why a destination did not answer.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// There is no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It did not answer as it should.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// The deadline passed.
    #[error("the replayer did not answer within {0} s")]
    Timeout(u64),
    /// No runtime.
    #[error("cannot start an event loop: {0}")]
    Runtime(std::io::Error),
}

/// What a destination holds at a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The applied checkpoint that it is of.
    pub checkpoint: CheckpointId,
    /// The group's roots on the primary.
    pub roots: Vec<PathBytes>,
    /// One line an entry.
    pub lines: Vec<ManifestLine>,
}

/// Asks one destination.
#[derive(Clone)]
pub struct Remote {
    connect: Connect,
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Remote").finish_non_exhaustive()
    }
}

impl Remote {
    /// Asks over connections made so.
    #[must_use]
    pub fn new(connect: Connect) -> Self {
        Self { connect }
    }

    /// What makes connections to it.
    #[must_use]
    pub fn connector(&self) -> Connect {
        Arc::clone(&self.connect)
    }

    /// The manifest of the applied tree, as soon as it stands at `at_least`.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub fn manifest(
        &self,
        group: &str,
        at_least: CheckpointId,
        limit: Duration,
    ) -> Result<Manifest, RemoteError> {
        let ask = Frame::GetManifest { group: group.into(), at_least };
        let mut got = Manifest { checkpoint: at_least, roots: Vec::new(), lines: Vec::new() };
        self.ask(&ask, limit, |frame| match frame {
            Frame::Manifest { checkpoint, roots, lines, last } => {
                got.checkpoint = checkpoint;
                if !roots.is_empty() {
                    got.roots = roots;
                }
                got.lines.extend(lines);
                Some(last)
            }
            _ => None,
        })?;
        Ok(got)
    }

    /// Files of which the destination has lost bytes; with `heal` it looks first, above all at the suspects.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub fn damage(
        &self,
        group: &str,
        heal: bool,
        mut suspects: Vec<ObjectId>,
        limit: Duration,
    ) -> Result<Vec<ObjectId>, RemoteError> {
        // As many as a frame takes; whatever differs is sent again anyway.
        suspects.truncate(SUSPECTS_MAX);
        let mut got = Vec::new();
        self.ask(&Frame::GetDamage { group: group.into(), heal, suspects }, limit, |frame| match frame {
            Frame::Damage { objects, last } => {
                got.extend(objects);
                Some(last)
            }
            _ => None,
        })?;
        Ok(got)
    }

    /// How the groups of the destination stand.
    ///
    /// # Errors
    /// [`RemoteError`].
    pub fn status(&self, limit: Duration) -> Result<Vec<GroupStatus>, RemoteError> {
        let mut got = Vec::new();
        self.ask(&Frame::GetStatus, limit, |frame| match frame {
            Frame::Status { groups } => {
                got = groups;
                Some(true)
            }
            _ => None,
        })?;
        Ok(got)
    }

    /// Sends one frame and gives the answers to `take`, which says whether it was the last, or
    /// `None` to a frame that it does not expect.
    fn ask(
        &self,
        question: &Frame,
        limit: Duration,
        mut take: impl FnMut(Frame) -> Option<bool>,
    ) -> Result<(), RemoteError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(RemoteError::Runtime)?;
        runtime.block_on(async {
            let talk = async {
                let mut connection = (self.connect)().await?;
                connection.writer.send(question, b"").await.map_err(AskError::from)?;
                loop {
                    let (frame, _) = connection.answer().await?;
                    if take(frame).ok_or(AskError::Unexpected)? {
                        return Ok(());
                    }
                }
            };
            tokio::time::timeout(limit, talk).await.map_err(|_| RemoteError::Timeout(limit.as_secs()))?
        })
    }
}
