//! The command's side of the control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::REPLY_MAX;
use super::messages::{Reply, Request};

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
    /// The agent ended the connection.
    #[error("the agent at {0} ended before it had answered")]
    Ended(PathBuf),
}

/// A connection to an agent, for one request.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// [`ClientError::NoAgent`] when nobody listens there.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        match UnixStream::connect(path) {
            Ok(stream) => Ok(Self { path: path.to_owned(), stream: BufReader::new(stream) }),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                Err(ClientError::NoAgent { path: path.to_owned(), others: others(path) })
            }
            Err(source) => Err(ClientError::Io { path: path.to_owned(), source }),
        }
    }

    /// Asks, and returns the first reply.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn ask(&mut self, request: &Request) -> Result<Reply, ClientError> {
        let mut line = serde_json::to_vec(request).map_err(|e| self.bad(&e.to_string()))?;
        line.push(b'\n');
        self.write(&line)?;
        self.next_reply()
    }

    /// After [`Reply::Standing`]: lets the processes go, and returns the next reply.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn go(&mut self) -> Result<Reply, ClientError> {
        self.write(b"\"go\"\n")?;
        self.next_reply()
    }

    fn write(&mut self, line: &[u8]) -> Result<(), ClientError> {
        self.stream.get_mut().write_all(line).map_err(|e| self.io(e))
    }

    fn next_reply(&mut self) -> Result<Reply, ClientError> {
        let mut line = Vec::new();
        let read = (&mut self.stream).take(REPLY_MAX as u64).read_until(b'\n', &mut line);
        read.map_err(|e| self.io(e))?;
        if line.is_empty() {
            return Err(ClientError::Ended(self.path.clone()));
        }
        serde_json::from_slice(&line).map_err(|e| self.bad(&e.to_string()))
    }

    fn io(&self, source: io::Error) -> ClientError {
        ClientError::Io { path: self.path.clone(), source }
    }

    fn bad(&self, why: &str) -> ClientError {
        ClientError::Bad { path: self.path.clone(), why: why.to_owned() }
    }
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
    use super::super::{FailureKind, Inbound, Server, ServerError, Status, WaitFor};
    use super::*;
    use bfs_common::record::CheckpointId;
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
        let asking = std::thread::spawn(move || client.ask(&Request::Status).unwrap());
        let Inbound::Request { request: Request::Status, replies, .. } = next(&inbound) else { panic!() };
        replies.send(Reply::Status(Box::new(status)));
        assert_eq!(asking.join().unwrap(), Reply::Status(Box::new(expected)));
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
        let asking = std::thread::spawn(move || client.ask(&Request::Stop { timeout_ms: 1 }).unwrap());
        drop(next(&inbound));
        assert!(matches!(asking.join().unwrap(), Reply::Failed { kind: FailureKind::Ending, .. }));
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
