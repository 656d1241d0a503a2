//! The keys of a host: its own, and those that it trusts.
//!
//! ```text
//! DIR/               mode 0700; /var/lib/bfs/keys of a primary, STORE/keys of a replayer
//!   host.key         the private key, mode 0600: made when it is first needed
//!   host.key.next    the one that follows it, from `key rotate` until `key rotate --use`
//!   peers            whom this host trusts, mode 0600 ([`peers`])
//!   lock             held while one of them is changed
//! ```
//! Files are changed under the lock, written whole under another name, synced and renamed, so whoever reads sees the
//! state before or after a change. They are read anew for each connection, so that a change counts at once.

mod fingerprint;
mod host;
pub mod peers;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

pub use fingerprint::{Fingerprint, TextError, Token};
pub use host::HostKey;
use peers::{Peers, PeersError};
use serde::{Deserialize, Serialize};

use crate::durable;
use crate::lock::Lock;

/// Where a primary has its keys.
pub const DEFAULT: &str = "/var/lib/bfs/keys";
const HOST: &str = "host.key";
const NEXT: &str = "host.key.next";
const PEERS: &str = "peers";

/// Why keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A file or folder cannot be read, made or changed.
    #[error("cannot {what} {path}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Others can read or change it.
    #[error("{path} has mode {mode:04o}: only its owner may have access; do `chmod go= {path}`")]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Somebody else's.
    #[error("{path} belongs to user {uid}: it must belong to the user who runs this ({us})")]
    Owner {
        /// The file.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// Who we are.
        us: u32,
    },
    /// Not what it should be.
    #[error("{path} is not {what}")]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
    },
    /// A private key that is none.
    #[error("{path} holds no key that can be used: {why}")]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The list of peers is not understood.
    #[error("{path}: {error}")]
    Peers {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: PeersError,
    },
    /// No second key was made.
    #[error("there is no next key in {0}: make one with `key rotate` first")]
    NoNext(PathBuf),
}

impl KeyError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |error| Self::Io { what, path, error }
    }
}

/// Tells one state of a file from another.
pub type Stamp = (u64, i64, i64, u64);

/// A folder of keys. See the module.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Folder(PathBuf);

impl Default for Folder {
    fn default() -> Self {
        Self(DEFAULT.into())
    }
}

impl Folder {
    /// This folder; made when something is first put into it.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The key of this host; made if there is none.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn host_key(&self) -> Result<HostKey, KeyError> {
        self.key_at(HOST)
    }

    /// The key that is to follow it; made if there is none.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn next_key(&self) -> Result<HostKey, KeyError> {
        self.key_at(NEXT)
    }

    /// Makes the next key the one that is used.
    ///
    /// # Errors
    /// [`KeyError::NoNext`] if none was made.
    pub fn use_next_key(&self) -> Result<HostKey, KeyError> {
        let _lock = self.lock()?;
        let (next, path) = (self.0.join(NEXT), self.0.join(HOST));
        let key = self.read_key(&next)?.ok_or_else(|| KeyError::NoNext(self.0.clone()))?;
        fs::rename(&next, &path).map_err(KeyError::io("replace", &path))?;
        durable::directory(&self.0).map_err(KeyError::io("sync", &self.0))?;
        Ok(key)
    }

    fn key_at(&self, name: &str) -> Result<HostKey, KeyError> {
        let path = self.0.join(name);
        if let Some(key) = self.read_key(&path)? {
            return Ok(key);
        }
        let _lock = self.lock()?;
        // Somebody else may have made it meanwhile.
        if let Some(key) = self.read_key(&path)? {
            return Ok(key);
        }
        let (key, text) = HostKey::generate().map_err(|why| KeyError::Key { path: path.clone(), why })?;
        durable::replace(&path, text.as_bytes()).map_err(KeyError::io("write", &path))?;
        Ok(key)
    }

    fn read_key(&self, path: &Path) -> Result<Option<HostKey>, KeyError> {
        let Some(text) = self.read(path, host::BYTES_MAX)? else { return Ok(None) };
        let key = HostKey::from_text(&text).map_err(|why| KeyError::Key { path: path.into(), why })?;
        Ok(Some(key))
    }

    /// Whom this host trusts.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn peers(&self) -> Result<Peers, KeyError> {
        let path = self.0.join(PEERS);
        let Some(text) = self.read(&path, peers::BYTES_MAX)? else { return Ok(Peers::default()) };
        Peers::decode(&text).map_err(|error| KeyError::Peers { path, error })
    }

    /// Changes whom this host trusts: durably, or not at all.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn change<T>(&self, change: impl FnOnce(&mut Peers) -> T) -> Result<T, KeyError> {
        let _lock = self.lock()?;
        let path = self.0.join(PEERS);
        let before = self.peers()?;
        let mut after = before.clone();
        let done = change(&mut after);
        if after != before {
            let text = after.encode();
            let too_long = text.len() as u64 > peers::BYTES_MAX;
            let fits = if too_long { Err(PeersError::TooMany("bytes")) } else { after.check_size() };
            fits.map_err(|error| KeyError::Peers { path: path.clone(), error })?;
            durable::replace(&path, text.as_bytes()).map_err(KeyError::io("write", &path))?;
        }
        Ok(done)
    }

    /// Differs after each change of key or peers.
    #[must_use]
    pub fn stamps(&self) -> [Option<Stamp>; 2] {
        [HOST, PEERS].map(|name| {
            let meta = fs::symlink_metadata(self.0.join(name)).ok()?;
            Some((meta.ino(), meta.ctime(), meta.ctime_nsec(), meta.len()))
        })
    }

    /// The text of a file that belongs to us and that nobody else has access to; `None` where there is none.
    fn read(&self, path: &Path, bytes_max: u64) -> Result<Option<String>, KeyError> {
        let read = |error| KeyError::Io { what: "read", path: path.into(), error };
        // Not through a symlink, and a pipe that stands there keeps nobody waiting.
        let open = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
        let mut file = match open {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) if e.raw_os_error() == Some(libc::ELOOP) => {
                return Err(KeyError::Kind { path: path.into(), what: "a regular file" });
            }
            Err(error) => return Err(read(error)),
        };
        // Of the open file, not of the path: what was checked is what is read.
        let meta = file.metadata().map_err(read)?;
        if !meta.is_file() {
            return Err(KeyError::Kind { path: path.into(), what: "a regular file" });
        }
        check_private(path, &meta, 0o177)?;
        if meta.len() > bytes_max {
            return Err(KeyError::Kind { path: path.into(), what: "of the size that such a file has" });
        }
        let mut text = String::new();
        (&mut file).take(bytes_max).read_to_string(&mut text).map_err(read)?;
        Ok(Some(text))
    }

    fn lock(&self) -> Result<Lock, KeyError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.0)
            .map_err(KeyError::io("make", &self.0))?;
        let meta = fs::symlink_metadata(&self.0).map_err(KeyError::io("look at", &self.0))?;
        if !meta.is_dir() {
            return Err(KeyError::Kind { path: self.0.clone(), what: "a folder" });
        }
        check_private(&self.0, &meta, 0o022)?;
        let path = self.0.join("lock");
        let open = || -> io::Result<Lock> {
            let file: File = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)?;
            Lock::wait(file)
        };
        open().map_err(KeyError::io("lock", &path))
    }
}

/// It is ours, and others have none of these permissions.
fn check_private(path: &Path, meta: &fs::Metadata, forbidden: u32) -> Result<(), KeyError> {
    let us = rustix::process::geteuid().as_raw();
    if meta.uid() != us {
        return Err(KeyError::Owner { path: path.into(), uid: meta.uid(), us });
    }
    if meta.mode() & forbidden != 0 {
        return Err(KeyError::Mode { path: path.into(), mode: meta.mode() & 0o7777 });
    }
    Ok(())
}

/// Random bytes of the kernel, for the secret of a token.
///
/// # Errors
/// If `/dev/urandom` cannot be read.
pub fn random() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Seconds since 1970, for the end of tokens.
#[must_use]
pub fn now_s() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn folder() -> (tempfile::TempDir, Folder) {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path().join("keys"));
        (dir, folder)
    }

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_host_has_one_key_until_it_uses_the_next() {
        let (_dir, folder) = folder();
        let key = folder.host_key().unwrap().fingerprint();
        assert_eq!(folder.host_key().unwrap().fingerprint(), key);
        assert!(matches!(folder.use_next_key(), Err(KeyError::NoNext(_))));
        let next = folder.next_key().unwrap().fingerprint();
        assert_ne!(next, key);
        assert_eq!(folder.host_key().unwrap().fingerprint(), key);
        let stamps = folder.stamps();
        assert_eq!(folder.use_next_key().unwrap().fingerprint(), next);
        assert_eq!(folder.host_key().unwrap().fingerprint(), next);
        assert_ne!(folder.stamps(), stamps);
        let of = |name: &str| fs::metadata(folder.path().join(name)).unwrap().mode() & 0o777;
        assert_eq!((of(HOST), of("")), (0o600, 0o700));
    }

    #[test]
    fn two_that_need_a_key_at_once_have_the_same() {
        let (_dir, folder) = folder();
        let all: Vec<_> = std::thread::scope(|scope| {
            let make = || folder.host_key().unwrap().fingerprint();
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(make)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(all.iter().all(|key| *key == all[0]));
    }

    #[test]
    fn a_file_that_others_can_have_a_hand_in_is_refused() {
        let (_dir, folder) = folder();
        folder.host_key().unwrap();
        folder.change(|peers| peers.trust("tcp://a:1", Fingerprint([1; 32]))).unwrap();
        for name in [HOST, PEERS] {
            let path = folder.path().join(name);
            let read = || if name == HOST { folder.host_key().err() } else { folder.peers().err() };
            for wrong in [0o640, 0o604, 0o620, 0o700] {
                mode(&path, wrong);
                assert!(matches!(read(), Some(KeyError::Mode { .. })), "{wrong:o}");
            }
            mode(&path, 0o600);
            assert!(read().is_none());
            std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
            assert!(matches!(read(), Some(KeyError::Owner { uid: 12345, .. })));
            std::os::unix::fs::chown(&path, Some(0), None).unwrap();
            let aside = path.with_extension("aside");
            fs::rename(&path, &aside).unwrap();
            symlink(&aside, &path).unwrap();
            assert!(matches!(read(), Some(KeyError::Kind { .. })), "a symlink");
            fs::remove_file(&path).unwrap();
            rustix::fs::mknodat(
                rustix::fs::CWD,
                &path,
                rustix::fs::FileType::Fifo,
                rustix::fs::Mode::from_raw_mode(0o600),
                0,
            )
            .unwrap();
            assert!(matches!(read(), Some(KeyError::Kind { .. })), "a pipe");
            fs::remove_file(&path).unwrap();
            fs::rename(&aside, &path).unwrap();
        }
        mode(folder.path(), 0o770);
        assert!(matches!(folder.next_key(), Err(KeyError::Mode { .. })));
    }

    #[test]
    fn a_file_that_is_damaged_is_named_and_not_replaced() {
        let (_dir, folder) = folder();
        folder.change(|peers| peers.trust("tcp://a:1", Fingerprint([1; 32]))).unwrap();
        let path = folder.path().join(PEERS);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, &text[..text.len() - 3]).unwrap();
        assert!(matches!(folder.peers(), Err(KeyError::Peers { error: PeersError::Damaged, .. })));
        assert!(folder.change(|peers| peers.forget(Fingerprint([1; 32]))).is_err());
        let key = folder.path().join(HOST);
        fs::write(&key, "").unwrap();
        mode(&key, 0o600);
        assert!(matches!(folder.host_key(), Err(KeyError::Key { .. })), "an empty file is not a missing one");
    }
}
