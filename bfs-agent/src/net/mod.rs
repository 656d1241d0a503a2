//! Addresses, frames and authentication of the connection between agent and replayer.
//!
//! [`Destination`] is what people write (`tcp://HOST:PORT`, `unix:PATH`, `dir:STORE`);
//! [`connect`] gives an authenticated [`Connection`] to one, whose two halves speak frames of
//! `bfs_common::wire`. A peer is authenticated before any byte of it is parsed as one: over TCP by its
//! key ([`tls`]), over a unix socket by its user.

pub mod auth;
pub mod crowd;
pub mod destination;
pub mod frame;
mod listen;
pub mod pairing;
mod scrape;
pub mod tls;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bfs_common::wire::{Frame, Refusal, WireError};
use bytes::Bytes;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::keys::peers::Paired;
use crate::keys::{Fingerprint, Folder, HostKey, KeyError, Token};
pub use destination::{AddressError, Destination};
pub use frame::{FrameError, FrameReader, FrameWriter};
pub(crate) use listen::listen_unix;
pub use scrape::{Scrape, ScrapeError};

/// How long a connection may take to come about.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the peer may take to prove who it is, and for its preamble.
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
    /// The key that it has proven; none on one host.
    pub key: Option<Fingerprint>,
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
    Refused(Refusal),
    /// Something else came than what was asked for.
    #[error("the replayer answered something that was not asked")]
    Unexpected,
}

// Not as its source: the text has all of it.
impl From<Refusal> for AskError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
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
    /// Keys of this host cannot be used.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// It is not known which key the replayer must have.
    #[error(
        "{0} is not paired with this host: do `bfs-replayer pair --store STORE` there, and here the \
         `bfs-agent pair {0} TOKEN` that it says"
    )]
    NotPaired(String),
    /// The replayer has another key than the one that it must have.
    #[error(
        "{destination} has the key {seen}, which is not one that it is trusted with: it is not the replayer that was \
         meant, or it got another key (then `bfs-agent key trust {destination} {seen}`)"
    )]
    WrongKey {
        /// The address.
        destination: String,
        /// The key that it has.
        seen: Fingerprint,
    },
    /// The replayer does not know this host.
    #[error(
        "{destination} does not know this host's key {ours}: there, `bfs-replayer key allow {ours} --group GROUP`, or \
         pair again"
    )]
    NotKnown {
        /// The address.
        destination: String,
        /// Our key.
        ours: Fingerprint,
    },
    /// The replayer does not want this host any more.
    #[error(
        "{destination} has revoked this host's key {ours}: there, `bfs-replayer key allow` makes it known again"
    )]
    Revoked {
        /// The address.
        destination: String,
        /// Our key.
        ours: Fingerprint,
    },
    /// Pairing did not come about.
    #[error("{destination}: {why}")]
    NotPairing {
        /// The address.
        destination: String,
        /// What is wrong with the token.
        why: &'static str,
    },
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
    /// The user that listens on a unix socket is neither root nor ours.
    #[error("{0} belongs to another user: it is not the replayer that was meant")]
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

impl ConnectError {
    /// An error of a stream before it was known whether the peer lets us in.
    fn before(destination: &str, key: &HostKey, error: &std::io::Error) -> Self {
        let (destination, ours) = (destination.to_owned(), key.fingerprint());
        match tls::why(error) {
            Some(tls::Why::WrongKey(seen)) => Self::WrongKey { destination, seen },
            Some(tls::Why::NotKnown) => Self::NotKnown { destination, ours },
            Some(tls::Why::Revoked) => Self::Revoked { destination, ours },
            Some(tls::Why::NoSuchProtocol) => Self::NotPairing {
                destination,
                why: "nobody is expected there: do `bfs-replayer pair --store STORE` there first",
            },
            None => Self::Broken { destination, why: error.to_string() },
        }
    }

    /// An error of the greeting.
    fn greeting(destination: &str, error: FrameError) -> Self {
        let destination = destination.to_owned();
        match error {
            FrameError::Wire(error) => Self::Wire { destination, error },
            other => Self::Broken { destination, why: other.to_string() },
        }
    }
}

/// Connects to a `tcp://` or `unix:` destination and authenticates both sides.
///
/// # Errors
/// [`ConnectError`]; all waiting is bounded.
pub async fn connect(destination: &Destination, keys: &Folder) -> Result<Connection, ConnectError> {
    match destination {
        Destination::Tcp(address) => connect_tcp(destination, address, keys).await,
        Destination::Unix(path) => connect_unix(destination, path).await,
        Destination::Dir(_) => Err(ConnectError::NotANetwork(destination.to_string())),
    }
}

async fn connect_tcp(
    destination: &Destination,
    address: &str,
    keys: &Folder,
) -> Result<Connection, ConnectError> {
    let name = destination.to_string();
    // Read anew each time: a key that was rotated meanwhile is the one that counts.
    let pinned = keys.peers()?.replayer_keys(&name);
    if pinned.is_empty() {
        return Err(ConnectError::NotPaired(name));
    }
    let key = keys.host_key()?;
    let stream = connect_tls(&name, address, &key, pinned, tls::FRAMES).await?;
    let replayer = tls::peer_key(stream.get_ref().1);
    let (read, write) = tokio::io::split(stream);
    let (mut reader, mut writer) = (FrameReader::new(Box::new(read)), FrameWriter::new(Box::new(write)));
    let greeting = auth::greet_replayer(&mut reader, &mut writer);
    match timed(&name, "finish the handshake", HANDSHAKE_TIMEOUT, greeting).await? {
        Ok(()) => Ok(Connection { reader, writer, peer: name, key: replayer }),
        // Only now it is known that the replayer does not take our key.
        Err(FrameError::Io(error)) => Err(ConnectError::before(&name, &key, &error)),
        Err(error) => Err(ConnectError::greeting(&name, error)),
    }
}

async fn connect_tls(
    name: &str,
    address: &str,
    key: &HostKey,
    pinned: Vec<Fingerprint>,
    protocol: &[u8],
) -> Result<TlsStream<TcpStream>, ConnectError> {
    let unreachable = |error| ConnectError::Unreachable { destination: name.to_owned(), error };
    let addresses = destination::resolve(address).await?;
    let stream = timed(name, "accept the connection", CONNECT_TIMEOUT, TcpStream::connect(&addresses[..]))
        .await?
        .map_err(unreachable)?;
    // Acknowledgements are small and waited for: Nagle's algorithm would hold them back.
    stream.set_nodelay(true).map_err(unreachable)?;
    let config = tls::client_config(key, pinned, protocol)
        .map_err(|error| ConnectError::Broken { destination: name.to_owned(), why: error.to_string() })?;
    let shaking = TlsConnector::from(Arc::new(config)).connect(tls::no_name(), stream);
    timed(name, "finish the handshake", HANDSHAKE_TIMEOUT, shaking)
        .await?
        .map_err(|error| ConnectError::before(name, key, &error))
}

/// Pairs this host with a replayer: it knows our key from then on, and we its own.
///
/// # Errors
/// [`ConnectError`]; all waiting is bounded. When only the answer was lost, the same token does it again.
pub async fn pair(destination: &Destination, token: &Token, keys: &Folder) -> Result<HostKey, ConnectError> {
    let Destination::Tcp(address) = destination else {
        return Err(ConnectError::NotANetwork(destination.to_string()));
    };
    let name = destination.to_string();
    let key = keys.host_key()?;
    let mut stream = connect_tls(&name, address, &key, vec![token.replayer], tls::PAIRING).await?;
    let channel = tls::channel_binding(stream.get_ref().1)
        .map_err(|error| ConnectError::Broken { destination: name.clone(), why: error.to_string() })?;
    let asked = pairing::ask(&mut stream, pairing::proof(&token.proving_key(), &channel));
    let answer = timed(&name, "answer", HANDSHAKE_TIMEOUT, asked)
        .await?
        .map_err(|error| ConnectError::before(&name, &key, &error))?;
    let why = match answer {
        Paired::Done => {
            keys.change(|peers| peers.trust(&name, token.replayer))?;
            return Ok(key);
        }
        Paired::Unknown => "it does not know this token: it was given out by another store, or very long ago",
        Paired::Expired => "the time of this token is over: let `bfs-replayer pair` make another one",
        Paired::Used => "another host has used this token: let `bfs-replayer pair` make one for this host",
    };
    Err(ConnectError::NotPairing { destination: name, why })
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
    let greeting = auth::greet_replayer(&mut reader, &mut writer);
    timed(&name, "finish the handshake", HANDSHAKE_TIMEOUT, greeting)
        .await?
        .map_err(|error| ConnectError::greeting(&name, error))?;
    Ok(Connection { reader, writer, peer: name, key: None })
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
        Connection {
            reader: FrameReader::new(Box::new(read)),
            writer: FrameWriter::new(Box::new(write)),
            peer: "this process".into(),
            key: None,
        }
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
    async fn tcp_needs_a_replayer_that_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Folder::new(dir.path().join("keys"));
        let far = Destination::Tcp("192.0.2.1:9".into());
        assert!(matches!(connect(&far, &keys).await, Err(ConnectError::NotPaired(_))));
        assert!(!keys.path().exists(), "nothing was made");
    }
}
