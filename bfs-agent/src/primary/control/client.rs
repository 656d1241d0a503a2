//! The client's side of the control socket, for commands and for programs of the user.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bfs_common::record::CheckpointId;

use super::REPLY_MAX;
use super::messages::{FailureKind, Reply, Status};
use super::request::{GRACE, NEWEST, Request, WaitFor};
use crate::policy::Policy;
use crate::primary::images::OpenOutside;

/// Why an agent was not asked or did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no agent answers at {path}{others}")]
    NoAgent {
        /// Where it was looked for.
        path: PathBuf,
        /// Which other agents there are, in words.
        others: String,
    },
    /// The socket cannot be used.
    #[error("cannot talk to the agent at {path}: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Not an answer.
    #[error("the agent at {path} answered something that is not understood: {why}")]
    Bad {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// It was asked and not done.
    #[error("{message}")]
    Failed {
        /// What kind of failure.
        kind: FailureKind,
        /// Which field of the request is to blame.
        field: Option<String>,
        /// What failed, on what, why.
        message: String,
        /// What to do.
        hint: String,
    },
    /// Nothing came back.
    #[error("the agent at {path} did not answer within {limit_s} s")]
    Silent {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        limit_s: u64,
    },
    /// The agent ended the connection.
    #[error("the agent at {0} ended before it had answered")]
    Ended(PathBuf),
}

/// A connection to an agent, for one request after the other. An agent with too many clients ends connections that
/// have been silent: connect again then.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
    /// How long an answer is waited for.
    limit: Duration,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// [`ClientError::NoAgent`] when nobody listens there.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        match UnixStream::connect(path) {
            Ok(stream) => Ok(Self { path: path.to_owned(), stream: BufReader::new(stream), limit: GRACE }),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                Err(ClientError::NoAgent { path: path.to_owned(), others: others(path) })
            }
            Err(source) => Err(ClientError::Io { path: path.to_owned(), source }),
        }
    }

    /// Asks, and returns the first reply; one that says that it failed is an error.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn ask(&mut self, request: &Request) -> Result<Reply, ClientError> {
        let mut line = serde_json::to_vec(request).map_err(|e| self.bad(&e.to_string()))?;
        line.push(b'\n');
        // The agent has the first word about what takes too long.
        self.limit = request.limits().0 + GRACE;
        let written = self.write(&line);
        // Whom the agent turns away at the door cannot write any more, and is told why all the same.
        match (self.next_reply(), written) {
            (Err(ClientError::Io { .. } | ClientError::Ended(_)), Err(e)) => Err(e),
            (reply, _) => reply,
        }
    }

    /// After [`Reply::Standing`]: lets the processes go, and returns the next reply.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn go(&mut self) -> Result<Reply, ClientError> {
        self.write(b"\"go\"\n")?;
        self.next_reply()
    }

    /// How the agent stands.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn status(&mut self) -> Result<Status, ClientError> {
        match self.ask(&Request::Status)? {
            Reply::Status(status) => Ok(*status),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Takes a checkpoint, waits until it is so far, and gives its number.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn checkpoint(
        &mut self,
        tag: &str,
        wait: WaitFor,
        timeout: Duration,
    ) -> Result<CheckpointId, ClientError> {
        let request = Request::Checkpoint { tag: tag.into(), wait, timeout_ms: milliseconds(timeout) };
        match self.ask(&request)? {
            Reply::Checkpoint { checkpoint, .. } => Ok(checkpoint),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Says that something changed, in these bytes of a file or anywhere in it: every checkpoint with a higher number
    /// than the one that this gives has it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn report_update(
        &mut self,
        path: &Path,
        bytes: Option<Range<u64>>,
        timeout: Duration,
    ) -> Result<CheckpointId, ClientError> {
        let request = Request::ReportUpdate {
            path: path.to_owned(),
            offset: bytes.as_ref().map(|bytes| bytes.start),
            length: bytes.map(|bytes| bytes.end.saturating_sub(bytes.start)),
            timeout_ms: milliseconds(timeout),
        };
        match self.ask(&request)? {
            Reply::Reported { after } => Ok(after),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Brings a file back as it was in a checkpoint that is kept (its number, `tag:NAME`, or a time; the newest if `at`
    /// is `None`); gives the checkpoint and the size of the file in bytes.
    ///
    /// # Errors
    /// [`ClientError`]; but for a timeout of the very last step, the file that stood there stands there still.
    pub fn recover(
        &mut self,
        path: &Path,
        at: Option<&str>,
        timeout: Duration,
    ) -> Result<(CheckpointId, u64), ClientError> {
        let request = Request::Recover {
            path: path.to_owned(),
            at: at.map(str::to_owned),
            timeout_ms: milliseconds(timeout),
        };
        match self.ask(&request)? {
            Reply::Recovered { checkpoint, bytes, .. } => Ok((checkpoint, bytes)),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Has what was captured last of a file written where it stands, as its policy has to allow; gives its size, and how many
    /// bytes were written.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn recover_newest(&mut self, path: &Path, timeout: Duration) -> Result<(u64, u64), ClientError> {
        let (path, at) = (path.to_owned(), Some(NEWEST.to_owned()));
        match self.ask(&Request::Recover { path, at, timeout_ms: milliseconds(timeout) })? {
            Reply::BroughtBack { bytes, written } => Ok((bytes, written)),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Nothing is done by a policy from now on (`true`), or it works again; gives the policies that hold then.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn suspend_policy(
        &mut self,
        pattern: &str,
        suspended: bool,
        timeout: Duration,
    ) -> Result<Vec<Policy>, ClientError> {
        let (pattern, timeout_ms) = (pattern.to_owned(), milliseconds(timeout));
        let request = if suspended {
            Request::PolicySuspend { pattern, timeout_ms }
        } else {
            Request::PolicyResume { pattern, timeout_ms }
        };
        match self.ask(&request)? {
            Reply::Policies { policies } => Ok(policies),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Goes back to a checkpoint that has process state (its number, `tag:NAME`, or a time; the newest if `at` is
    /// `None`), with files and processes; gives the checkpoint, and what the processes had open outside of the files then.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn go_back(
        &mut self,
        at: Option<&str>,
        timeout: Duration,
    ) -> Result<(CheckpointId, Vec<OpenOutside>), ClientError> {
        let request = Request::GoBack { at: at.map(str::to_owned), timeout_ms: milliseconds(timeout) };
        match self.ask(&request)? {
            Reply::WentBack { checkpoint, outside } => Ok((checkpoint, outside)),
            other => Err(self.unexpected(&other)),
        }
    }

    fn unexpected(&self, reply: &Reply) -> ClientError {
        self.bad(&format!("something else than was asked: {reply:?}"))
    }

    fn write(&mut self, line: &[u8]) -> Result<(), ClientError> {
        self.stream.get_mut().write_all(line).map_err(|e| self.io(e))
    }

    fn next_reply(&mut self) -> Result<Reply, ClientError> {
        self.stream.get_ref().set_read_timeout(Some(self.limit)).map_err(|e| self.io(e))?;
        let mut line = Vec::new();
        let read = (&mut self.stream).take(REPLY_MAX as u64).read_until(b'\n', &mut line);
        read.map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => {
                ClientError::Silent { path: self.path.clone(), limit_s: self.limit.as_secs() }
            }
            _ => self.io(e),
        })?;
        if line.is_empty() {
            return Err(ClientError::Ended(self.path.clone()));
        }
        match serde_json::from_slice(&line).map_err(|e| self.bad(&e.to_string()))? {
            Reply::Failed { kind, field, message, hint } => {
                Err(ClientError::Failed { kind, field, message, hint })
            }
            reply => Ok(reply),
        }
    }

    fn io(&self, source: io::Error) -> ClientError {
        ClientError::Io { path: self.path.clone(), source }
    }

    fn bad(&self, why: &str) -> ClientError {
        ClientError::Bad { path: self.path.clone(), why: why.to_owned() }
    }
}

/// As requests have it.
#[must_use]
pub fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Which agents listen in the same folder, so that a wrong group name is easy to see.
fn others(path: &Path) -> String {
    let entries = path.parent().and_then(|d| std::fs::read_dir(d).ok()).into_iter().flatten().flatten();
    let mut groups: Vec<String> = entries
        .filter_map(|e| e.file_name().into_string().ok())
        .filter_map(|n| n.strip_prefix("agent-")?.strip_suffix(".sock").map(str::to_owned))
        .filter(|n| path.file_name().is_none_or(|f| f != format!("agent-{n}.sock").as_str()))
        .collect();
    groups.sort();
    groups.truncate(8);
    if groups.is_empty() {
        String::new()
    } else {
        format!(" (there are sockets of groups {})", groups.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Inbound, Server, ServerError};
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::mpsc;
    use std::time::Duration;

    fn server() -> (Server, mpsc::Receiver<Inbound>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let (engine, inbound) = mpsc::channel();
        let server = Server::start("g", Some(&dir.path().join("agent-g.sock")), engine, || {}).unwrap();
        (server, inbound, dir)
    }

    fn next(inbound: &mpsc::Receiver<Inbound>) -> Inbound {
        inbound.recv_timeout(Duration::from_secs(10)).unwrap()
    }

    #[test]
    fn a_status_goes_round() {
        let (server, inbound, _dir) = server();
        let status = Status { group: "g".into(), pid: 7, ..Status::default() };
        let mode = std::fs::metadata(server.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut client = Client::connect(server.path()).unwrap();
        let expected = status.clone();
        // One connection is good for many requests.
        let asking = std::thread::spawn(move || [client.status().unwrap(), client.status().unwrap()]);
        for _ in 0..2 {
            let Inbound::Request { request: Request::Status, replies, .. } = next(&inbound) else { panic!() };
            replies.send(Reply::Status(Box::new(status.clone())));
        }
        assert_eq!(asking.join().unwrap(), [expected.clone(), expected]);
    }

    #[test]
    fn what_is_asked_has_its_answer_or_an_error_with_the_field() {
        let (server, inbound, _dir) = server();
        let mut client = Client::connect(server.path()).unwrap();
        let asking = std::thread::spawn(move || {
            let limit = Duration::from_secs(5);
            let taken = client.checkpoint("t", WaitFor::Taken, limit).unwrap();
            let after = client.report_update(Path::new("/srv/f"), Some(4096..4100), limit).unwrap();
            let relative = client.report_update(Path::new("f"), None, limit).unwrap_err();
            (taken, after, relative)
        });
        let Inbound::Request { request, replies, .. } = next(&inbound) else { panic!() };
        let (wait, timeout_ms) = (WaitFor::Taken, 5_000);
        assert_eq!(request, Request::Checkpoint { tag: "t".into(), wait, timeout_ms });
        replies.send(Reply::Checkpoint { checkpoint: CheckpointId(3), reached: wait, stopped_us: 0 });
        let Inbound::Request { request, replies, .. } = next(&inbound) else { panic!() };
        let (path, offset, length) = ("/srv/f".into(), Some(4096), Some(4));
        assert_eq!(request, Request::ReportUpdate { path, offset, length, timeout_ms });
        replies.send(Reply::Reported { after: CheckpointId(3) });
        let (taken, after, relative) = asking.join().unwrap();
        assert_eq!((taken, after), (CheckpointId(3), CheckpointId(3)));
        let ClientError::Failed { kind: FailureKind::Bad, field: Some(field), .. } = relative else {
            panic!("{relative:?}")
        };
        assert_eq!(field, "path");
    }

    #[test]
    fn a_policy_is_suspended_and_resumed() {
        let (server, inbound, _dir) = server();
        let mut client = Client::connect(server.path()).unwrap();
        let policy = Policy::new("*.db").unwrap();
        let holds = vec![policy.clone()];
        let asking = std::thread::spawn(move || {
            let limit = Duration::from_secs(5);
            [true, false].map(|suspended| client.suspend_policy("*.db", suspended, limit).unwrap())
        });
        for _ in 0..2 {
            let Inbound::Request { request, replies, .. } = next(&inbound) else { panic!() };
            let (Request::PolicySuspend { pattern, .. } | Request::PolicyResume { pattern, .. }) = request
            else {
                panic!("{request:?}")
            };
            assert_eq!(pattern, "*.db");
            replies.send(Reply::Policies { policies: vec![policy.clone()] });
        }
        assert_eq!(asking.join().unwrap(), [holds.clone(), holds]);
    }

    /// Who connects and says nothing, or does not read, keeps nobody from being answered.
    #[test]
    fn silent_clients_make_room() {
        let (server, inbound, _dir) = server();
        let mut silent: Vec<UnixStream> =
            (0..200).map(|_| UnixStream::connect(server.path()).unwrap()).collect();
        let path = server.path().to_owned();
        let asking = std::thread::spawn(move || {
            let deadline = std::time::Instant::now() + Duration::from_secs(30);
            loop {
                match Client::connect(&path).unwrap().status() {
                    Ok(status) => break status.pid,
                    Err(ClientError::Failed { kind: FailureKind::Busy, .. }) => {}
                    Err(e) => panic!("{e}"),
                }
                assert!(std::time::Instant::now() < deadline);
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let Inbound::Request { replies, .. } = next(&inbound) else { panic!() };
        replies.send(Reply::Status(Box::new(Status { pid: 7, ..Status::default() })));
        assert_eq!(asking.join().unwrap(), 7);
        // Those that were told to go see the end; what they were told first says why.
        let mut said = String::new();
        silent.last_mut().unwrap().read_to_string(&mut said).unwrap();
        assert!(said.contains("\"busy\""), "{said}");
    }

    #[test]
    fn a_stopped_checkpoint_goes_on_at_go_and_when_the_client_dies() {
        let (server, inbound, _dir) = server();
        for dies in [false, true] {
            let mut client = Client::connect(server.path()).unwrap();
            let request = Request::CheckpointStopped {
                tag: "t".into(),
                wait: WaitFor::Applied,
                timeout_ms: 10_000,
                limit_ms: 10_000,
            };
            let asking = std::thread::spawn(move || {
                let standing = client.ask(&request).unwrap();
                assert_eq!(standing, Reply::Standing { checkpoint: CheckpointId(3), reached_us: 5 });
                (!dies).then(|| client.go().unwrap())
            });
            let Inbound::Request { ticket, replies, .. } = next(&inbound) else { panic!() };
            replies.send(Reply::Standing { checkpoint: CheckpointId(3), reached_us: 5 });
            let Inbound::Go { ticket: again } = next(&inbound) else { panic!() };
            assert_eq!(ticket, again);
            let done =
                Reply::Checkpoint { checkpoint: CheckpointId(3), reached: WaitFor::Applied, stopped_us: 9 };
            replies.send(done.clone());
            assert_eq!(asking.join().unwrap(), (!dies).then_some(done));
        }
    }

    #[test]
    fn a_request_that_is_dropped_is_answered_all_the_same() {
        let (server, inbound, _dir) = server();
        let mut client = Client::connect(server.path()).unwrap();
        let asking = std::thread::spawn(move || client.ask(&Request::Stop { timeout_ms: 1 }).unwrap_err());
        drop(next(&inbound));
        let error = asking.join().unwrap();
        assert!(matches!(error, ClientError::Failed { kind: FailureKind::Ending, .. }), "{error:?}");
    }

    #[test]
    fn one_agent_a_socket_and_a_stale_one_is_replaced() {
        let (server, _inbound, dir) = server();
        let (engine, _other) = mpsc::channel();
        let again = Server::start("g", Some(server.path()), engine.clone(), || {});
        assert!(matches!(again, Err(ServerError::Taken(_))));
        let path = server.path().to_owned();
        drop(server);
        assert!(matches!(Client::connect(&path), Err(ClientError::NoAgent { .. })));
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let error = Client::connect(&dir.path().join("agent-x.sock")).unwrap_err();
        assert!(error.to_string().contains("groups g"), "{error}");
        Server::start("g", Some(&path), engine, || {}).unwrap();
    }
}
