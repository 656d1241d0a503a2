//! The door of a replayer: who may come in, before anything that it says is a frame.
//!
//! Over TCP a connection has [`HANDSHAKE_TIMEOUT`] to prove a key and to greet, and until then it stands in the [`Crowd`],
//! apart from those that are known: whoever floods the door takes no place of theirs. Over a unix socket the kernel says who it is.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bfs_common::wire::{Frame, Refusal};
use rustls::server::Acceptor;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio_rustls::LazyConfigAcceptor;
use tokio_rustls::server::TlsStream;

use super::access::Access;
use super::connection;
use super::serve::Shared;
use crate::keys::Fingerprint;
use crate::net::crowd::Crowd;
use crate::net::{Connection, FrameReader, FrameWriter, HANDSHAKE_TIMEOUT, auth, pairing, tls};

/// Known connections over TCP, and as many over unix sockets.
const CONNECTIONS_MAX: usize = 64;
/// How long somebody who was not let in may take to read why.
const LINGER: Duration = Duration::from_secs(1);

/// Places for connections.
#[derive(Debug)]
pub struct Door {
    crowd: Mutex<Standing>,
    tcp: Arc<Semaphore>,
    unix: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct Standing {
    crowd: Crowd,
    last: u64,
    away: BTreeMap<u64, Arc<Notify>>,
}

impl Default for Door {
    fn default() -> Self {
        Self {
            crowd: Mutex::default(),
            tcp: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            unix: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        }
    }
}

/// A place in the crowd, until it is dropped.
struct Place<'a> {
    door: &'a Door,
    number: u64,
    address: IpAddr,
    away: Arc<Notify>,
}

impl Door {
    fn stand(&self, address: IpAddr) -> Place<'_> {
        let mut standing = self.crowd.lock().unwrap_or_else(PoisonError::into_inner);
        standing.last += 1;
        let (number, away) = (standing.last, Arc::new(Notify::new()));
        if let Some(gone) = standing.crowd.enter(number, address)
            && let Some(gone) = standing.away.remove(&gone)
        {
            gone.notify_one();
        }
        standing.away.insert(number, away.clone());
        Place { door: self, number, address, away }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut standing = self.door.crowd.lock().unwrap_or_else(PoisonError::into_inner);
        standing.away.remove(&self.number);
        standing.crowd.leave(self.number, self.address);
    }
}

/// Lets in who comes over TCP.
pub async fn accept_tcp(shared: Arc<Shared>, listener: TcpListener, access: Arc<Access>) {
    while !*shared.stop.borrow() {
        let Some((stream, peer)) = accepted(listener.accept().await).await else { continue };
        let (shared, access) = (shared.clone(), access.clone());
        tokio::spawn(async move {
            let let_in = {
                let place = shared.door.stand(peer.ip());
                tokio::select! {
                    let_in = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake(&access, stream, peer)) => let_in,
                    () = place.away.notified() => {
                        tracing::debug!("{peer}: sent away, there are too many that have not proven who they are");
                        return;
                    }
                }
            };
            match let_in {
                Ok(Ok(Some(connection))) => admit(shared.clone(), &shared.door.tcp, connection).await,
                Ok(Ok(None)) => {}
                Ok(Err(error)) => tracing::debug!("{peer}: {error}"),
                Err(_) => tracing::debug!("{peer}: no handshake within {} s", HANDSHAKE_TIMEOUT.as_secs()),
            }
        });
    }
}

/// What a stranger has to do. `None` when it is done with that.
async fn handshake(
    access: &Arc<Access>,
    stream: TcpStream,
    peer: SocketAddr,
) -> io::Result<Option<Connection>> {
    stream.set_nodelay(true)?;
    let hello = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
    let is_pairing = {
        let hello = hello.client_hello();
        hello.alpn().is_some_and(|mut all| all.any(|protocol| protocol == tls::PAIRING))
    };
    let protocol = if is_pairing { tls::PAIRING } else { tls::FRAMES };
    let shaken = hello.into_stream(access.config(protocol)).into_fallible().await;
    let mut stream = match shaken {
        Ok(stream) => stream,
        Err((error, stream)) => {
            match tls::why(&error) {
                Some(tls::Why::WrongKey(key)) => tracing::warn!(
                    "{peer}: a stranger; to let it in: `bfs-replayer key allow {key} --group GROUP`"
                ),
                _ => tracing::debug!("{peer}: {error}"),
            }
            linger(stream).await;
            return Ok(None);
        }
    };
    let key = tls::peer_key(stream.get_ref().1)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it has shown no key"))?;
    // What was agreed upon, not what was asked for: the pairing protocol lets strangers in.
    if stream.get_ref().1.alpn_protocol() == Some(tls::PAIRING) {
        pair(access, &mut stream, key, peer).await?;
        return Ok(None);
    }
    let (read, write) = tokio::io::split(stream);
    let (mut reader, mut writer) = (FrameReader::new(Box::new(read)), FrameWriter::new(Box::new(write)));
    auth::greet_agent(&mut reader, &mut writer).await.map_err(io::Error::other)?;
    Ok(Some(Connection { reader, writer, peer: format!("{peer} with the key {key}"), key: Some(key) }))
}

async fn pair(
    access: &Arc<Access>,
    stream: &mut TlsStream<TcpStream>,
    key: Fingerprint,
    peer: SocketAddr,
) -> io::Result<()> {
    let proof = pairing::listen(stream).await?;
    let channel = tls::channel_binding(stream.get_ref().1).map_err(io::Error::other)?;
    let access = Arc::clone(access);
    let paired = tokio::task::spawn_blocking(move || access.pair(key, proof, &channel)).await?;
    match paired {
        Ok(paired) => {
            tracing::info!("{peer}: the key {key} comes with a token: {paired:?}");
            pairing::answer(stream, paired).await
        }
        Err(error) => {
            tracing::error!("{peer}: pairing failed: {error}");
            Err(io::Error::other(error))
        }
    }
}

/// Closing a socket with unread bytes would tear away from the peer what it was told.
async fn linger(mut stream: TcpStream) {
    let drain = async {
        // It may have closed its end already.
        let _ = stream.shutdown().await;
        let mut bytes = [0; 1024];
        while matches!(stream.read(&mut bytes).await, Ok(1..)) {}
    };
    let _ = tokio::time::timeout(LINGER, drain).await;
}

/// Serves a connection that is known, if there is room for it.
async fn admit(shared: Arc<Shared>, places: &Arc<Semaphore>, mut connection: Connection) {
    let permit: Result<OwnedSemaphorePermit, _> = places.clone().try_acquire_owned();
    let Ok(_permit) = permit else {
        tracing::warn!("{}: more than {CONNECTIONS_MAX} connections, this one is dropped", connection.peer);
        let refusal = Frame::Refused(Refusal::Store(format!("it has {CONNECTIONS_MAX} connections already")));
        // The peer may be gone already.
        let _ = tokio::time::timeout(LINGER, connection.writer.send(&refusal, b"")).await;
        return;
    };
    connection::serve(shared, connection).await;
}

/// Lets in who comes over a unix socket.
pub async fn accept_unix(shared: Arc<Shared>, listener: UnixListener) {
    while !*shared.stop.borrow() {
        let Some((stream, _)) = accepted(listener.accept().await).await else { continue };
        let shared = shared.clone();
        tokio::spawn(async move {
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, greet(stream)).await {
                Ok(Ok(Some(connection))) => admit(shared.clone(), &shared.door.unix, connection).await,
                Ok(Ok(None)) => {}
                Ok(Err(error)) => tracing::warn!("a unix socket: {error}"),
                Err(_) => {
                    tracing::warn!("a unix socket: no preamble within {} s", HANDSHAKE_TIMEOUT.as_secs())
                }
            }
        });
    }
}

async fn greet(stream: UnixStream) -> io::Result<Option<Connection>> {
    let uid = stream.peer_cred()?.uid();
    let (read, write) = stream.into_split();
    let (mut reader, mut writer) = (FrameReader::new(Box::new(read)), FrameWriter::new(Box::new(write)));
    if !auth::uid_is_trusted(uid) {
        let why = "only root and the replayer's own user may connect".to_owned();
        writer.preamble().await.map_err(io::Error::other)?;
        let refusal = Frame::Refused(Refusal::NotAuthenticated(why));
        writer.send(&refusal, b"").await.map_err(io::Error::other)?;
        return Ok(None);
    }
    auth::greet_agent(&mut reader, &mut writer).await.map_err(io::Error::other)?;
    Ok(Some(Connection { reader, writer, peer: format!("user {uid} on a unix socket"), key: None }))
}

/// An error of accepting concerns one connection, or descriptors ran out: then a moment later
/// some may be free again.
async fn accepted<T>(result: io::Result<T>) -> Option<T> {
    const PAUSE: Duration = Duration::from_millis(100);
    match result {
        Ok(accepted) => Some(accepted),
        Err(error) => {
            tracing::warn!("a connection could not be accepted: {error}");
            tokio::time::sleep(PAUSE).await;
            None
        }
    }
}
