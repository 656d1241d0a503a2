//! Addresses, frames and authentication of the connection between agent and replayer.
//!
//! [`Destination`] is what people write (`tcp://HOST:PORT`, `unix:PATH`, `dir:STORE`);
//! [`connect`] gives an authenticated [`Connection`] to one, whose two halves speak frames of
//! `bfs_common::wire`. A peer is authenticated before any record of it is parsed: until then a
//! frame is at most `FRAME_BEFORE_AUTH_MAX` bytes long.

pub mod auth;
pub mod destination;
pub mod frame;
mod listen;
mod scrape;

use std::path::{Path, PathBuf};
use std::time::Duration;

use bfs_common::wire::{Frame, Refusal, WireError};
use bytes::Bytes;
use tokio::net::{TcpStream, UnixStream};

pub use auth::{Secret, SecretError};
pub use destination::{AddressError, Destination};
pub use frame::{FrameError, FrameReader, FrameWriter};
pub(crate) use listen::listen_unix;
pub use scrape::{Scrape, ScrapeError};

/// How long a connection may take to come about.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the peer may take for preamble and authentication together.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// An authenticated connection, in two halves that may be used by different tasks.
#[derive(Debug)]
pub struct Connection {
    /// What the peer sends.
    pub reader: FrameReader,
    /// What the peer gets.
    pub writer: FrameWriter,
    /// The peer in words, for messages.
    pub peer: String,
}

/// Why a question to the replayer has no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// The connection broke.
    #[error("the connection to the replayer broke: {0}")]
    Frame(#[from] FrameError),
    /// The replayer ended the connection.
    #[error("the replayer closed the connection before it had answered")]
    Closed,
    /// The replayer said no.
    #[error("the replayer refuses: {0}")]
    Refused(#[from] Refusal),
    /// Something else came than what was asked for.
    #[error("the replayer answered something that was not asked")]
    Unexpected,
}

impl Connection {
    /// The next frame that is an answer.
    ///
    /// # Errors
    /// [`AskError`].
    pub async fn answer(&mut self) -> Result<(Frame, Bytes), AskError> {
        loop {
            match self.reader.next().await?.ok_or(AskError::Closed)? {
                (Frame::Refused(refusal), _) => return Err(refusal.into()),
                (Frame::Ping(number), _) => self.writer.send(&Frame::Pong(number), b"").await?,
                answer => return Ok(answer),
            }
        }
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The address may not be used.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// Nobody answers there.
    #[error("cannot connect to {destination}: {error}; is `bfs-replayer serve` running there?")]
    Unreachable {
        /// The address.
        destination: String,
        /// What the system said.
        error: std::io::Error,
    },
    /// The peer took too long.
    #[error("{destination} did not {what} within {seconds} s")]
    Timeout {
        /// The address.
        destination: String,
        /// What it should have done.
        what: &'static str,
        /// The limit.
        seconds: u64,
    },
    /// TCP without a secret.
    #[error("{0} needs the secret that it shares with the replayer: give --secret-file FILE")]
    SecretNeeded(String),
    /// `dir:` is served in this process, not over a connection.
    #[error("{0} is a store of this process: it is not connected to over a network")]
    NotANetwork(String),
    /// The other side is not what it should be.
    #[error("{destination}: {error}")]
    Wire {
        /// The address.
        destination: String,
        /// What is wrong with its bytes.
        error: WireError,
    },
    /// The connection broke during the handshake.
    #[error("{destination}: the connection broke before it was authenticated: {why}")]
    Broken {
        /// The address.
        destination: String,
        /// How.
        why: String,
    },
    /// The replayer does not know the secret.
    #[error("{0} does not prove that it knows the shared secret: it is not the replayer that was meant")]
    Impostor(String),
    /// The replayer said no.
    #[error("{destination}: {refusal}")]
    Refused {
        /// The address.
        destination: String,
        /// Its reason.
        refusal: Refusal,
    },
}

/// Connects to a `tcp://` or `unix:` destination and authenticates both sides.
///
/// # Errors
/// [`ConnectError`]; all waiting is bounded.
pub async fn connect(destination: &Destination, secret: Option<&Secret>) -> Result<Connection, ConnectError> {
    match destination {
        Destination::Tcp(address) => connect_tcp(destination, address, secret).await,
        Destination::Unix(path) => connect_unix(destination, path).await,
        Destination::Dir(_) => Err(ConnectError::NotANetwork(destination.to_string())),
    }
}

async fn connect_tcp(
    destination: &Destination,
    address: &str,
    secret: Option<&Secret>,
) -> Result<Connection, ConnectError> {
    let name = destination.to_string();
    let secret = secret.ok_or_else(|| ConnectError::SecretNeeded(name.clone()))?;
    let addresses = destination::resolve_loopback(address).await?;
    let stream = timed(&name, "accept the connection", CONNECT_TIMEOUT, TcpStream::connect(&addresses[..]))
        .await?
        .map_err(|error| ConnectError::Unreachable { destination: name.clone(), error })?;
    // Acknowledgements are small and waited for: Nagle's algorithm would hold them back.
    stream
        .set_nodelay(true)
        .map_err(|error| ConnectError::Unreachable { destination: name.clone(), error })?;
    let (read, write) = stream.into_split();
    let (mut reader, mut writer) = (FrameReader::new(Box::new(read)), FrameWriter::new(Box::new(write)));
    let proof = auth::prove(&mut reader, &mut writer, auth::Proof::Secret(secret));
    timed(&name, "finish the handshake", HANDSHAKE_TIMEOUT, proof).await?.map_err(|e| e.at(&name))?;
    Ok(Connection { reader, writer, peer: name })
}

async fn connect_unix(destination: &Destination, path: &Path) -> Result<Connection, ConnectError> {
    let name = destination.to_string();
    let unreachable = |error| ConnectError::Unreachable { destination: name.clone(), error };
    let stream = timed(&name, "accept the connection", CONNECT_TIMEOUT, UnixStream::connect(path))
        .await?
        .map_err(unreachable)?;
    let uid = stream.peer_cred().map_err(unreachable)?.uid();
    if !auth::uid_is_trusted(uid) {
        return Err(ConnectError::Impostor(name));
    }
    let (read, write) = stream.into_split();
    let (mut reader, mut writer) = (FrameReader::new(Box::new(read)), FrameWriter::new(Box::new(write)));
    let proof = auth::prove(&mut reader, &mut writer, auth::Proof::Credentials);
    timed(&name, "finish the handshake", HANDSHAKE_TIMEOUT, proof).await?.map_err(|e| e.at(&name))?;
    Ok(Connection { reader, writer, peer: name })
}

async fn timed<T>(
    name: &str,
    what: &'static str,
    limit: Duration,
    work: impl Future<Output = T>,
) -> Result<T, ConnectError> {
    tokio::time::timeout(limit, work).await.map_err(|_| ConnectError::Timeout {
        destination: name.to_owned(),
        what,
        seconds: limit.as_secs(),
    })
}

/// A connection inside this process: two ends that speak frames, with no preamble and no
/// authentication, because there is nobody to be told apart.
#[must_use]
pub fn local_pair() -> (Connection, Connection) {
    // As much as a socket would hold; a frame may be longer, it is then taken in pieces.
    const BUFFER: usize = 256 << 10;
    let (a, b) = tokio::io::duplex(BUFFER);
    let end = |stream| {
        let (read, write) = tokio::io::split(stream);
        let mut reader = FrameReader::new(Box::new(read));
        reader.peer_is_known();
        Connection { reader, writer: FrameWriter::new(Box::new(write)), peer: "this process".into() }
    };
    (end(a), end(b))
}

/// The socket of a store's owner.
#[must_use]
pub fn store_socket(store: &Path) -> PathBuf {
    store.join("replayer.sock")
}

#[cfg(test)]
mod tests {
    use super::*;
    use bfs_common::wire::Frame;

    #[tokio::test]
    async fn the_two_ends_of_a_local_pair_speak_frames() {
        let (mut a, mut b) = local_pair();
        a.writer.send(&Frame::Ping(3), b"body").await.unwrap();
        let (frame, body) = b.reader.next().await.unwrap().unwrap();
        assert_eq!((frame, &body[..]), (Frame::Ping(3), &b"body"[..]));
        drop(a);
        assert!(b.reader.next().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn tcp_needs_a_secret_and_loopback() {
        let far = Destination::Tcp("192.0.2.1:9".into());
        let secret = Secret::from_bytes(b"0123456789abcdef".to_vec()).unwrap();
        assert!(matches!(connect(&far, None).await, Err(ConnectError::SecretNeeded(_))));
        let error = connect(&far, Some(&secret)).await.unwrap_err();
        assert!(matches!(error, ConnectError::Address(AddressError::NotLoopback { .. })), "{error}");
    }
}
