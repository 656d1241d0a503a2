//! A checkpoint as a read-only file system, through FUSE: nothing is restored, and each look is answered by
//! the owner of the store.
//!
//! The process that serves the mount is its own, so a replayer that is started again only makes looks wait:
//! the link connects anew. What a checkpoint holds never changes, so the kernel may remember all of it.

mod files;
mod names;

use std::path::Path;
use std::sync::mpsc;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bfs_common::past::{Look, Seen};
use bfs_common::record::CheckpointId;
use bytes::Bytes;
use fuser::{Config, MountOption, Session, SessionACL};
use rustix::mount::UnmountFlags;

use crate::generation::{Client, OpenError, ReadError};
use crate::net::AskError;

use files::Files;
use names::Names;

/// How long a look waits for a replayer that is away.
const AWAY_MAX: Duration = Duration::from_secs(30);
/// How long until the next try to connect.
const AWAY_PAUSE: Duration = Duration::from_millis(200);

/// Why a checkpoint is not mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// A mount whose process was killed stands there.
    #[error("{0} is a mount whose process is gone: `umount {0}` first")]
    Stale(std::path::PathBuf),
    /// It cannot be mounted there.
    #[error("cannot mount on {path}: {error}")]
    Mount {
        /// Where.
        path: std::path::PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The store does not give it.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The store cannot read it.
    #[error("{0}")]
    Store(String),
    /// No connection.
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// How to connect to the owner of the store.
pub type Connect = Box<dyn Fn() -> Result<Client, OpenError> + Send + Sync>;

/// Who answers looks into one checkpoint.
pub struct Link {
    group: String,
    at: CheckpointId,
    connect: Connect,
    client: Mutex<Option<Client>>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("group", &self.group).field("at", &self.at).finish_non_exhaustive()
    }
}

impl Link {
    /// To a checkpoint of a group.
    #[must_use]
    pub fn new(group: &str, at: CheckpointId, client: Client, connect: Connect) -> Self {
        Self { group: group.into(), at, connect, client: Mutex::new(Some(client)) }
    }

    /// Looks; connects again when the replayer had gone.
    fn look(&self, look: &Look) -> Result<(Seen, Bytes), ReadError> {
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = Instant::now() + AWAY_MAX;
        loop {
            let asked = match client.as_mut() {
                Some(client) => client.look(&self.group, self.at, look.clone()),
                None => Err(AskError::Closed.into()),
            };
            match asked {
                Err(ReadError::Ask(AskError::Frame(_) | AskError::Closed)) if Instant::now() < deadline => {}
                // A refusal was the last frame of its connection.
                Err(error) => {
                    *client = None;
                    return Err(error);
                }
                seen => return seen,
            }
            *client = (self.connect)().ok();
            if client.is_none() {
                std::thread::sleep(AWAY_PAUSE);
            }
        }
    }
}

/// A checkpoint that is mounted.
#[derive(Debug)]
pub struct Mounted {
    path: std::path::PathBuf,
    ended: mpsc::Receiver<End>,
    tell: mpsc::Sender<End>,
}

/// Why a mount ends.
#[derive(Debug)]
pub enum End {
    /// Somebody unmounted it.
    Unmounted,
    /// A signal asks for it.
    Asked,
    /// The kernel says something unexpected.
    Failed(std::io::Error),
}

/// Mounts what the link leads to on an empty directory. `everybody`: not only the user who mounts may look; what
/// each may see follows from modes and ACLs.
///
/// # Errors
/// [`MountError`].
pub fn mount(link: Link, path: &Path, everybody: bool) -> Result<Mounted, MountError> {
    let failed = |error: std::io::Error| match error.raw_os_error() {
        // Its attributes the kernel may still know.
        Some(libc::ENOTCONN) => MountError::Stale(path.into()),
        _ => MountError::Mount { path: path.into(), error },
    };
    match std::fs::metadata(path) {
        Err(error) => return Err(failed(error)),
        Ok(meta) if !meta.is_dir() => return Err(failed(std::io::ErrorKind::NotADirectory.into())),
        Ok(_) => {}
    }
    let (seen, _) = link.look(&Look::Roots)?;
    let (label, roots) = match seen {
        Seen::Roots(label, roots) => (label, roots),
        Seen::Failed(why) => return Err(MountError::Store(why)),
        _ => return Err(MountError::Read(AskError::Unexpected.into())),
    };
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::RO,
        MountOption::NoSuid,
        MountOption::NoDev,
        MountOption::NoAtime,
        MountOption::DefaultPermissions,
        MountOption::FSName(format!("bfs:{}@{}", link.group, link.at)),
    ];
    config.acl = if everybody { SessionACL::All } else { SessionACL::Owner };
    let files = Files::new(link, Names::new(&roots), label.wall_ns);
    std::fs::read_dir(path).map_err(failed)?;
    let place = std::fs::canonicalize(path).map_err(failed)?;
    let session = Session::new(files, &place, &config).map_err(failed)?;
    let (tell, ended) = mpsc::channel();
    let told = tell.clone();
    let serve = move || {
        let end = session.run().map_or_else(End::Failed, |()| End::Unmounted);
        // Whoever waited may have ended for another reason.
        let _ = told.send(end);
    };
    std::thread::Builder::new().name("mount".into()).spawn(serve).map_err(failed)?;
    Ok(Mounted { path: place, ended, tell })
}

impl Mounted {
    /// To be told from elsewhere that it shall end.
    #[must_use]
    pub fn ender(&self) -> mpsc::Sender<End> {
        self.tell.clone()
    }

    /// Waits until it ends; it is unmounted then. Who still has a file of it open gets errors from then on.
    ///
    /// # Errors
    /// If it cannot be unmounted, or was ended by an error.
    pub fn wait(self) -> std::io::Result<()> {
        match self.ended.recv() {
            Ok(End::Asked) | Err(mpsc::RecvError) => {
                Ok(rustix::mount::unmount(&self.path, UnmountFlags::DETACH)?)
            }
            Ok(End::Unmounted) => Ok(()),
            Ok(End::Failed(error)) => Err(error),
        }
    }
}
