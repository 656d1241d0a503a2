//! Who talks: the preamble and the proof of a shared secret, as `bfs_common::wire` lays it down.
//!
//! Both sides draw a nonce and both prove that they know the secret, so neither an impostor nor a
//! recording of an old connection gets through. Over a unix socket the kernel says who the peer
//! is, and the proofs are zeros.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bfs_common::wire::{Frame, Refusal, VERSION, WireError};

use super::ConnectError;
use super::frame::{FrameError, FrameReader, FrameWriter};

/// Shortest secret that is accepted.
pub const SECRET_MIN: usize = 16;
/// Longest secret file that is read.
pub const SECRET_MAX: usize = 4096;

/// Why a secret cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file cannot be read.
    #[error("cannot read the secret file {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// Others can read or change it.
    #[error("the secret file {path} has mode {mode:04o}: only its owner may read it; do `chmod 600 {path}`")]
    Mode {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Somebody else's.
    #[error("the secret file {path} belongs to user {uid}: it must belong to the user who runs this ({us})")]
    Owner {
        /// The file.
        path: PathBuf,
        /// Its owner.
        uid: u32,
        /// Who we are.
        us: u32,
    },
    /// Not a regular file.
    #[error("the secret file {0} is not a regular file")]
    NotAFile(PathBuf),
    /// Too short or too long.
    #[error(
        "the secret has {0} bytes: it needs {SECRET_MIN} to {SECRET_MAX}; make one with \
         `(umask 077; head -c 32 /dev/urandom | base64 > FILE)`"
    )]
    Length(usize),
}

/// What agent and replayer both know. Never shown.
#[derive(Clone)]
pub struct Secret {
    key: [u8; 32],
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    /// From a file of mode 0600 (or less) that belongs to us. White space at its end does not
    /// count, so that the file may be written with `echo`.
    ///
    /// # Errors
    /// [`SecretError`].
    pub fn from_file(path: &Path) -> Result<Self, SecretError> {
        let read = |error| SecretError::Read { path: path.into(), error };
        let mut file = File::open(path).map_err(read)?;
        // Of the open file, not of the path: what was checked is what is read.
        let meta = file.metadata().map_err(read)?;
        if !meta.is_file() {
            return Err(SecretError::NotAFile(path.into()));
        }
        let us = rustix::process::geteuid().as_raw();
        if meta.uid() != us {
            return Err(SecretError::Owner { path: path.into(), uid: meta.uid(), us });
        }
        if meta.mode() & 0o177 != 0 {
            return Err(SecretError::Mode { path: path.into(), mode: meta.mode() & 0o7777 });
        }
        let mut bytes = Vec::new();
        (&mut file).take(SECRET_MAX as u64 + 1).read_to_end(&mut bytes).map_err(read)?;
        bytes.truncate(bytes.trim_ascii_end().len());
        Self::from_bytes(bytes)
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`SecretError::Length`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, SecretError> {
        if !(SECRET_MIN..=SECRET_MAX).contains(&bytes.len()) {
            return Err(SecretError::Length(bytes.len()));
        }
        Ok(Self { key: blake3::derive_key("bfs 2026 shared secret v1", &bytes) })
    }

    fn proof(&self, role: &str, first: &[u8; 32], second: &[u8; 32]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(role.as_bytes()).update(first).update(second);
        hasher.finalize()
    }
}

/// How the agent proves who it is, and the replayer in turn.
#[derive(Clone, Copy, Debug)]
pub enum Proof<'a> {
    /// Both know this.
    Secret(&'a Secret),
    /// The kernel told both sides the other's user, and it was checked already.
    Credentials,
}

/// Whether a user may be the peer on a unix socket: root, or the one who runs this process.
#[must_use]
pub fn uid_is_trusted(uid: u32) -> bool {
    uid == 0 || uid == rustix::process::geteuid().as_raw()
}

/// Why a peer is not authenticated.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// The connection broke, or the bytes are not ours.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The peer closed the connection.
    #[error("the peer closed the connection during the handshake")]
    Closed,
    /// The peer sent something else than the handshake asks for.
    #[error("the peer sent an unexpected frame during the handshake")]
    Unexpected,
    /// The replayer refused.
    #[error("{0}")]
    Refused(Refusal),
    /// The proof is wrong.
    #[error("the peer does not know the shared secret")]
    WrongProof,
    /// No random numbers.
    #[error("cannot draw a random number: {0}")]
    Random(std::io::Error),
}

impl AuthError {
    /// As an error of [`super::connect`] to this address.
    pub(super) fn at(self, destination: &str) -> ConnectError {
        let destination = destination.to_owned();
        match self {
            Self::Frame(FrameError::Wire(error)) => ConnectError::Wire { destination, error },
            Self::Refused(refusal) => ConnectError::Refused { destination, refusal },
            Self::WrongProof => ConnectError::Impostor(destination),
            other => ConnectError::Broken { destination, why: other.to_string() },
        }
    }
}

/// 32 random bytes of the kernel.
///
/// # Errors
/// If `/dev/urandom` cannot be read.
pub fn nonce() -> std::io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The agent's side. Afterwards both sides are known.
///
/// # Errors
/// [`AuthError`].
pub async fn prove(
    reader: &mut FrameReader,
    writer: &mut FrameWriter,
    proof: Proof<'_>,
) -> Result<(), AuthError> {
    writer.preamble().await?;
    reader.preamble().await?;
    let Frame::Challenge { nonce: theirs } = expect(reader).await? else {
        return Err(AuthError::Unexpected);
    };
    let own_nonce = nonce().map_err(AuthError::Random)?;
    let ours = match proof {
        Proof::Secret(secret) => *secret.proof("agent", &theirs, &own_nonce).as_bytes(),
        Proof::Credentials => [0; 32],
    };
    writer.send(&Frame::Prove { own_nonce, proof: ours }, b"").await?;
    let Frame::Proven { proof: answer } = expect(reader).await? else {
        return Err(AuthError::Unexpected);
    };
    if let Proof::Secret(secret) = proof {
        // blake3::Hash compares in constant time.
        if secret.proof("replayer", &own_nonce, &theirs) != blake3::Hash::from_bytes(answer) {
            return Err(AuthError::WrongProof);
        }
    }
    reader.peer_is_known();
    Ok(())
}

/// The replayer's side. A peer that fails is told so before the error is returned.
///
/// # Errors
/// [`AuthError`].
pub async fn challenge(
    reader: &mut FrameReader,
    writer: &mut FrameWriter,
    proof: Proof<'_>,
) -> Result<(), AuthError> {
    writer.preamble().await?;
    let ours = nonce().map_err(AuthError::Random)?;
    if let Err(error) = reader.preamble().await {
        if let FrameError::Wire(WireError::Version(theirs)) = error {
            let refusal = Refusal::Version { ours: VERSION as u32, theirs };
            writer.send(&Frame::Refused(refusal), b"").await?;
        }
        return Err(error.into());
    }
    writer.send(&Frame::Challenge { nonce: ours }, b"").await?;
    let Frame::Prove { own_nonce, proof: theirs } = expect(reader).await? else {
        return Err(AuthError::Unexpected);
    };
    let answer = match proof {
        Proof::Secret(secret) => {
            if secret.proof("agent", &ours, &own_nonce) != blake3::Hash::from_bytes(theirs) {
                let refusal = Refusal::NotAuthenticated("the shared secret is another one".into());
                writer.send(&Frame::Refused(refusal), b"").await?;
                return Err(AuthError::WrongProof);
            }
            *secret.proof("replayer", &own_nonce, &ours).as_bytes()
        }
        Proof::Credentials => [0; 32],
    };
    writer.send(&Frame::Proven { proof: answer }, b"").await?;
    reader.peer_is_known();
    Ok(())
}

async fn expect(reader: &mut FrameReader) -> Result<Frame, AuthError> {
    match reader.next().await? {
        Some((Frame::Refused(refusal), _)) => Err(AuthError::Refused(refusal)),
        Some((frame, _)) => Ok(frame),
        None => Err(AuthError::Closed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn pair() -> ((FrameReader, FrameWriter), (FrameReader, FrameWriter)) {
        let (a, b) = tokio::io::duplex(1 << 16);
        let end = |s| {
            let (r, w) = tokio::io::split(s);
            (FrameReader::new(Box::new(r)), FrameWriter::new(Box::new(w)))
        };
        (end(a), end(b))
    }

    fn secret(text: &str) -> Secret {
        Secret::from_bytes(text.as_bytes().to_vec()).unwrap()
    }

    #[tokio::test]
    async fn the_same_secret_on_both_sides_is_a_connection() {
        let ((mut ar, mut aw), (mut rr, mut rw)) = pair();
        let s = secret("a long enough secret");
        let (agent, replayer) = tokio::join!(
            prove(&mut ar, &mut aw, Proof::Secret(&s)),
            challenge(&mut rr, &mut rw, Proof::Secret(&s))
        );
        agent.unwrap();
        replayer.unwrap();
    }

    #[tokio::test]
    async fn another_secret_is_refused_by_name() {
        let ((mut ar, mut aw), (mut rr, mut rw)) = pair();
        let (a, b) = (secret("a long enough secret"), secret("another long secret!"));
        let (agent, replayer) = tokio::join!(
            prove(&mut ar, &mut aw, Proof::Secret(&a)),
            challenge(&mut rr, &mut rw, Proof::Secret(&b))
        );
        assert!(matches!(agent, Err(AuthError::Refused(Refusal::NotAuthenticated(_)))));
        assert!(matches!(replayer, Err(AuthError::WrongProof)));
    }

    #[tokio::test]
    async fn a_replayer_that_does_not_know_the_secret_is_an_impostor() {
        let ((mut ar, mut aw), (mut rr, mut rw)) = pair();
        let a = secret("a long enough secret");
        let (agent, _) = tokio::join!(
            prove(&mut ar, &mut aw, Proof::Secret(&a)),
            challenge(&mut rr, &mut rw, Proof::Credentials)
        );
        assert!(matches!(agent, Err(AuthError::WrongProof)));
    }

    #[test]
    fn a_secret_file_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("secret");
        std::fs::write(&path, "0123456789abcdef\n").unwrap();
        let mode = |m| std::fs::set_permissions(&path, std::fs::Permissions::from_mode(m)).unwrap();
        mode(0o640);
        assert!(matches!(Secret::from_file(&path), Err(SecretError::Mode { mode: 0o640, .. })));
        mode(0o600);
        Secret::from_file(&path).unwrap();
        std::fs::write(&path, "short\n").unwrap();
        assert!(matches!(Secret::from_file(&path), Err(SecretError::Length(5))));
        assert!(matches!(Secret::from_file(dir.path()), Err(SecretError::NotAFile(_))));
    }
}
