//! The agent's side of the control socket: threads that carry lines, no decisions.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::{PipeFlags, pipe_with};

use super::lines::{LINE_LIMIT, Line, Lines};
use super::messages::{FailureKind, Reply};
use super::real_path::real_path;
use super::request::{BadRequest, Request};
use super::{REQUEST_MAX, default_socket};
use crate::lock::Lock;
use crate::net::auth::uid_is_trusted;

/// Most clients at a time.
const CLIENTS_MAX: usize = 64;
/// For a client to take an answer.
const CLIENT_LIMIT: Duration = Duration::from_secs(30);
/// When there are too many clients, one that the agent has waited for this long makes room for another.
const SILENT_MIN: Duration = Duration::from_secs(1);

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
    _lock: Lock,
}

struct Clients {
    engine: Sender<Inbound>,
    wake: Box<dyn Fn() + Send + Sync>,
    tickets: AtomicU64,
    slots: Mutex<Vec<Slot>>,
}

/// One connection.
struct Slot {
    stream: Arc<UnixStream>,
    /// Since when the agent waits for the client, to say something or to take an answer; `None` while the client
    /// waits for the agent.
    waits_since: Option<Instant>,
}

/// A client that was let in, until it is dropped.
struct Admitted {
    stream: Arc<UnixStream>,
    clients: Arc<Clients>,
}

impl Clients {
    fn slots(&self) -> std::sync::MutexGuard<'_, Vec<Slot>> {
        // Nothing in it can be half done.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a client in, if need be in the place of the one that has been waited for longest; `None` when all
    /// wait for the agent.
    fn admit(self: &Arc<Self>, stream: UnixStream) -> Result<Admitted, UnixStream> {
        let mut slots = self.slots();
        if slots.len() >= CLIENTS_MAX {
            let silent = |slot: &Slot| slot.waits_since.filter(|since| since.elapsed() >= SILENT_MIN);
            let since = slots.iter().enumerate().filter_map(|(at, slot)| Some((silent(slot)?, at)));
            let Some((_, at)) = since.min() else { return Err(stream) };
            // Its thread wakes up with the end of the stream.
            let _ = slots.swap_remove(at).stream.shutdown(Shutdown::Both);
        }
        let stream = Arc::new(stream);
        slots.push(Slot { stream: Arc::clone(&stream), waits_since: Some(Instant::now()) });
        drop(slots);
        Ok(Admitted { stream, clients: Arc::clone(self) })
    }
}

impl Admitted {
    /// The agent waits for the client from now on, or the client for the agent.
    fn is_waited_for(&self, waited_for: bool) {
        let mut slots = self.clients.slots();
        if let Some(slot) = slots.iter_mut().find(|slot| Arc::ptr_eq(&slot.stream, &self.stream)) {
            slot.waits_since = waited_for.then(Instant::now);
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.clients.slots().retain(|slot| !Arc::ptr_eq(&slot.stream, &self.stream));
    }
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
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(|e| error("open the lock file beside it", e))?;
        let Ok(lock) = Lock::take(file).map_err(|e| error("flock", e))? else {
            return Err(ServerError::Taken(path));
        };
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
            slots: Mutex::default(),
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
        if stream.set_write_timeout(Some(CLIENT_LIMIT)).is_err() {
            continue;
        }
        let trusted = rustix::net::sockopt::socket_peercred(&stream)
            .is_ok_and(|peer| uid_is_trusted(peer.uid.as_raw()));
        // What is written here fits into any socket that is still empty: nobody is waited for.
        if !trusted {
            let why = "only root and the user that runs the agent may ask";
            let _ = write_line(&stream, &Reply::failed(FailureKind::Denied, why, "use one of them"));
            continue;
        }
        match clients.admit(stream) {
            Ok(client) => {
                let thread = std::thread::Builder::new().name("bfs-command".into());
                // Without a thread the client is dropped, and sees its connection end.
                let _ = thread.spawn(move || serve(&client));
            }
            Err(stream) => {
                let why = "too many commands at a time";
                let _ = write_line(&stream, &Reply::failed(FailureKind::Busy, why, "try again"));
            }
        }
    }
}

/// One request after the other, until the client goes.
fn serve(client: &Admitted) {
    let mut lines = Lines::new(&client.stream, REQUEST_MAX);
    loop {
        let bad = match lines.next(None) {
            Ok(Line::Whole(line)) => match Request::parse(&line).and_then(with_real_path) {
                Ok(request) => match answer(client, &mut lines, request) {
                    true => continue,
                    false => return,
                },
                Err(bad) => bad,
            },
            Ok(Line::TooLong) => BadRequest::line(format!("the line is longer than {REQUEST_MAX} bytes")),
            Ok(Line::TooSlow) => {
                let why = format!("the line did not end within {} s", LINE_LIMIT.as_secs());
                let _ = write_line(&client.stream, &Reply::bad(BadRequest::line(why)));
                return;
            }
            Ok(Line::End) | Err(_) => return,
        };
        if write_line(&client.stream, &Reply::bad(bad)).is_err() {
            return;
        }
    }
}

/// What names a file is asked with the path that has neither symlinks nor `..`; only that which is to be brought back
/// may be a symlink itself by now.
fn with_real_path(mut request: Request) -> Result<Request, BadRequest> {
    let bad = |why: &dyn std::fmt::Display| {
        BadRequest::field("path", why, "give a path of a file, or of one that was there")
    };
    match &mut request {
        Request::ReportUpdate { path, .. } => *path = real_path(path).map_err(|e| bad(&e))?,
        Request::Recover { path, .. } => {
            let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
                return Err(bad(&"it names no file"));
            };
            *path = real_path(above).map_err(|e| bad(&e))?.join(name);
        }
        _ => {}
    }
    Ok(request)
}

/// Has a request answered; `false` when nothing more can be asked on the connection.
fn answer(client: &Admitted, lines: &mut Lines<'_>, request: Request) -> bool {
    let (clients, stream) = (&client.clients, &*client.stream);
    let (answer_limit, stand_limit) = request.limits();
    let ticket = Ticket(clients.tickets.fetch_add(1, Ordering::Relaxed));
    let (replies, answers) = Replies::channel();
    let tell = |message| {
        let sent = clients.engine.send(message).is_ok();
        (clients.wake)();
        sent
    };
    if !tell(Inbound::Request { ticket, request, replies }) {
        let _ = write_line(stream, &ending());
        return false;
    }
    loop {
        client.is_waited_for(false);
        let reply = match answers.recv_timeout(answer_limit) {
            Ok(reply) => reply,
            Err(RecvTimeoutError::Disconnected) => ending(),
            Err(RecvTimeoutError::Timeout) => {
                let message = format!("the agent did not answer within {} s", answer_limit.as_secs());
                Reply::failed(FailureKind::Timeout, message, "look at `bfs-agent status`")
            }
        };
        let last = reply.is_last();
        if last {
            client.is_waited_for(true);
        }
        let written = write_line(stream, &reply);
        if last {
            return written.is_ok();
        }
        // Any line, the end of the stream and the limit all mean: go.
        if written.is_ok() {
            let _ = lines.next(Some(stand_limit));
        }
        tell(Inbound::Go { ticket });
    }
}

fn ending() -> Reply {
    Reply::failed(FailureKind::Ending, "the agent ended before it had answered", "")
}

fn write_line(mut stream: &UnixStream, reply: &Reply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    stream.write_all(&line)
}
