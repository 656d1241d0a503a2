//! The agent's side of the control socket: threads that carry lines, no decisions.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::pipe::{PipeFlags, pipe_with};

use super::messages::{FailureKind, Reply, Request};
use super::{REQUEST_MAX, default_socket};
use crate::net::auth::uid_is_trusted;

/// Most clients at a time.
const CLIENTS_MAX: usize = 16;
/// For a client to say what it wants, and to take an answer.
const CLIENT_LIMIT: Duration = Duration::from_secs(30);
/// Beyond what a request allows, for the engine to answer.
const GRACE: Duration = Duration::from_secs(30);

/// Names one request, until its last reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// What the engine gets.
#[derive(Debug)]
pub enum Inbound {
    /// A command asks something; exactly one last reply is owed.
    Request {
        /// Its ticket.
        ticket: Ticket,
        /// What it asks.
        request: Request,
        /// Where the replies go.
        replies: Replies,
    },
    /// After [`Reply::Standing`]: let the processes go. Comes once for each, also when the
    /// client is gone or its limit passed; after a request that was answered for good meanwhile
    /// it means nothing.
    Go {
        /// The ticket of the request.
        ticket: Ticket,
    },
}

/// Takes the replies to one request. Dropped without a last reply, it tells the client that the
/// agent ended.
#[derive(Clone, Debug)]
pub struct Replies(SyncSender<Reply>);

impl Replies {
    /// Sends a reply; never waits. A client that is gone gets nothing.
    pub fn send(&self, reply: Reply) {
        let _ = self.0.try_send(reply);
    }

    /// Something to reply to that is read by the caller itself: for tests and for requests that
    /// the agent makes to itself.
    #[must_use]
    pub fn channel() -> (Self, Receiver<Reply>) {
        let (sender, receiver) = mpsc::sync_channel(4);
        (Self(sender), receiver)
    }
}

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Another agent has it.
    #[error("an agent already serves {0}")]
    Taken(PathBuf),
    /// A call failed.
    #[error("cannot listen on {path}: {call}: {source}")]
    System {
        /// The socket.
        path: PathBuf,
        /// What failed.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The control socket of a running agent. It is removed when this is dropped.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    stop: Option<std::os::fd::OwnedFd>,
    thread: Option<JoinHandle<()>>,
    /// Held as long as the agent lives: tells a stale socket from one in use.
    _lock: File,
}

struct Clients {
    engine: Sender<Inbound>,
    wake: Box<dyn Fn() + Send + Sync>,
    tickets: AtomicU64,
    count: AtomicUsize,
}

impl Server {
    /// Listens at `socket`, or where the group's agent is looked for. `wake` is called after each
    /// message to the engine.
    ///
    /// # Errors
    /// [`ServerError::Taken`] when another agent serves it.
    pub fn start(
        group: &str,
        socket: Option<&Path>,
        engine: Sender<Inbound>,
        wake: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, ServerError> {
        let path = socket.map_or_else(|| default_socket(group), Path::to_owned);
        let error = |call, source| ServerError::System { path: path.clone(), call, source };
        if let Some(directory) = path.parent()
            && socket.is_none()
        {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(directory)
                .map_err(|e| error("mkdir", e))?;
        }
        let mut lock_path = path.clone().into_os_string();
        lock_path.push(".lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(|e| error("open the lock file beside it", e))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(ServerError::Taken(path)),
            Err(e) => return Err(error("flock", e.into())),
        }
        // With the lock held, whatever stands there is of an agent that died.
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(error("unlink", e)),
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(|e| error("bind", e))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(|e| error("chmod", e))?;
        listener.set_nonblocking(true).map_err(|e| error("fcntl", e))?;
        let (stopped, stop) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| error("pipe", e.into()))?;
        let clients = Arc::new(Clients {
            engine,
            wake: Box::new(wake),
            tickets: AtomicU64::new(1),
            count: AtomicUsize::new(0),
        });
        let thread = std::thread::Builder::new()
            .name("bfs-control".into())
            .spawn(move || accept(&listener, &stopped, &clients))
            .map_err(|e| error("clone", e))?;
        Ok(Self { path, stop: Some(stop), thread: Some(thread), _lock: lock })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = fs::remove_file(&self.path);
    }
}

fn accept(listener: &UnixListener, stopped: &impl AsFd, clients: &Arc<Clients>) {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(stopped.as_fd(), PollFlags::IN),
        ];
        let _ = poll(&mut fds, None);
        if !fds[1].revents().is_empty() {
            return;
        }
        let Ok((stream, _)) = listener.accept() else { continue };
        let trusted = rustix::net::sockopt::socket_peercred(&stream)
            .is_ok_and(|peer| uid_is_trusted(peer.uid.as_raw()));
        if !trusted {
            continue;
        }
        let mine = Arc::clone(clients);
        if clients.count.fetch_add(1, Ordering::Relaxed) >= CLIENTS_MAX {
            clients.count.fetch_sub(1, Ordering::Relaxed);
            let busy = Reply::failed(FailureKind::Busy, "too many commands at a time", "try again");
            let _ = write_line(&stream, &busy);
            continue;
        }
        let spawned = std::thread::Builder::new().name("bfs-command".into()).spawn(move || {
            serve(&stream, &mine);
            mine.count.fetch_sub(1, Ordering::Relaxed);
        });
        if spawned.is_err() {
            clients.count.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn serve(stream: &UnixStream, clients: &Clients) {
    let limits =
        stream.set_read_timeout(Some(CLIENT_LIMIT)).and(stream.set_write_timeout(Some(CLIENT_LIMIT)));
    if limits.is_err() {
        return;
    }
    let mut lines = Lines { stream, have: Vec::new() };
    let Ok(Some(line)) = lines.next() else { return };
    let request: Request = match serde_json::from_slice(&line) {
        Ok(request) => request,
        Err(e) => {
            let hint = "use bfs-agent of the same release";
            let _ = write_line(stream, &Reply::failed(FailureKind::Bad, format!("bad request: {e}"), hint));
            return;
        }
    };
    let (answer_limit, stand_limit) = limits_of(&request);
    let ticket = Ticket(clients.tickets.fetch_add(1, Ordering::Relaxed));
    let (replies, answers) = Replies::channel();
    let tell = |message| {
        let sent = clients.engine.send(message).is_ok();
        (clients.wake)();
        sent
    };
    if !tell(Inbound::Request { ticket, request, replies }) {
        let _ = write_line(stream, &ending());
        return;
    }
    loop {
        let reply = match answers.recv_timeout(answer_limit) {
            Ok(reply) => reply,
            Err(RecvTimeoutError::Disconnected) => ending(),
            Err(RecvTimeoutError::Timeout) => {
                let message = format!("the agent did not answer within {} s", answer_limit.as_secs());
                Reply::failed(FailureKind::Timeout, message, "look at `bfs-agent status`")
            }
        };
        let last = reply.is_last();
        let written = write_line(stream, &reply);
        if last {
            return;
        }
        if written.is_ok() {
            let _ = stream.set_read_timeout(Some(stand_limit));
            // Any line, the end of the stream and the limit all mean: go.
            let _ = lines.next();
        }
        tell(Inbound::Go { ticket });
    }
}

fn ending() -> Reply {
    Reply::failed(FailureKind::Ending, "the agent ended before it had answered", "")
}

/// How long the engine may take to answer, and how long processes may stand.
fn limits_of(request: &Request) -> (Duration, Duration) {
    match request {
        Request::Status => (GRACE, GRACE),
        Request::Checkpoint { timeout_ms, .. }
        | Request::Stop { timeout_ms }
        | Request::Flush { timeout_ms }
        | Request::PathAdd { timeout_ms, .. }
        | Request::PathRemove { timeout_ms, .. }
        | Request::Verify { timeout_ms } => (Duration::from_millis(*timeout_ms) + GRACE, GRACE),
        Request::CheckpointStopped { timeout_ms, limit_ms, .. } => {
            let stand = Duration::from_millis((*limit_ms).max(1));
            (Duration::from_millis(*timeout_ms) + stand + GRACE, stand)
        }
    }
}

struct Lines<'a> {
    stream: &'a UnixStream,
    have: Vec<u8>,
}

impl Lines<'_> {
    fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(end) = self.have.iter().position(|b| *b == b'\n') {
                let rest = self.have.split_off(end + 1);
                return Ok(Some(std::mem::replace(&mut self.have, rest)));
            }
            if self.have.len() > REQUEST_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Ok(None),
                Ok(read) => self.have.extend_from_slice(&buffer[..read]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

fn write_line(mut stream: &UnixStream, reply: &Reply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    stream.write_all(&line)
}
