//! The smallest part of HTTP that Prometheus needs: `GET /metrics`, answered with a text. Loopback or a unix socket only;
//! one client after the other, and none of them for long.

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::pipe::{PipeFlags, pipe_with};

use super::destination::{AddressError, Destination, resolve_loopback_now};
use super::listen_unix;

/// Longest head of a request.
const HEAD_MAX: usize = 8 << 10;
/// For a client to ask, and again to take the answer.
const CLIENT_LIMIT: Duration = Duration::from_secs(2);

/// Why nobody can ask.
#[derive(Debug, thiserror::Error)]
pub enum ScrapeError {
    /// The address cannot be used.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// A store is no place to listen at.
    #[error("{0} is no place to listen at: write tcp://127.0.0.1:PORT or unix:PATH")]
    NotASocket(Destination),
    /// It cannot be listened on.
    #[error("cannot listen on {at}: {error}")]
    Listen {
        /// Where.
        at: Destination,
        /// What the system said.
        error: io::Error,
    },
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// A thread that answers, until this is dropped.
#[derive(Debug)]
pub struct Scrape {
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    at: Destination,
}

impl Scrape {
    /// Answers with what `text` gives; with `None` it says that there is nothing now.
    ///
    /// # Errors
    /// [`ScrapeError`].
    pub fn start(
        at: &Destination,
        text: impl Fn() -> Option<String> + Send + 'static,
    ) -> Result<Self, ScrapeError> {
        let failed = |error| ScrapeError::Listen { at: at.clone(), error };
        let listener = match at {
            Destination::Dir(_) => return Err(ScrapeError::NotASocket(at.clone())),
            Destination::Tcp(address) => {
                let found = resolve_loopback_now(address)?;
                Listener::Tcp(TcpListener::bind(found.as_slice()).map_err(failed)?)
            }
            Destination::Unix(path) => Listener::Unix(listen_unix(path).map_err(failed)?, path.clone()),
        };
        let at = match &listener {
            // Port 0 took a free one.
            Listener::Tcp(socket) => Destination::Tcp(socket.local_addr().map_err(failed)?.to_string()),
            Listener::Unix(..) => at.clone(),
        };
        match &listener {
            Listener::Tcp(socket) => socket.set_nonblocking(true),
            Listener::Unix(socket, _) => socket.set_nonblocking(true),
        }
        .map_err(failed)?;
        let (stopped, stop) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
        let thread = std::thread::Builder::new()
            .name("bfs-metrics".into())
            .spawn(move || listen(&listener, &stopped, &text))
            .map_err(failed)?;
        Ok(Self { stop: Some(stop), thread: Some(thread), at })
    }

    /// Where it listens.
    #[must_use]
    pub fn at(&self) -> &Destination {
        &self.at
    }
}

impl Drop for Scrape {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn listen(listener: &Listener, stopped: &OwnedFd, text: &impl Fn() -> Option<String>) {
    let fd = match listener {
        Listener::Tcp(socket) => socket.as_fd(),
        Listener::Unix(socket, _) => socket.as_fd(),
    };
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(fd, PollFlags::IN),
            PollFd::from_borrowed_fd(stopped.as_fd(), PollFlags::IN),
        ];
        let _ = poll(&mut fds, None);
        if !fds[1].revents().is_empty() {
            break;
        }
        // Whatever goes wrong with one client is over with it.
        let _ = match listener {
            Listener::Tcp(socket) => socket.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(false)?;
                stream.set_write_timeout(Some(CLIENT_LIMIT))?;
                answer(&stream, |left| stream.set_read_timeout(Some(left)), text)
            }),
            Listener::Unix(socket, _) => socket.accept().and_then(|(stream, _)| {
                stream.set_write_timeout(Some(CLIENT_LIMIT))?;
                answer(&stream, |left| stream.set_read_timeout(Some(left)), text)
            }),
        };
    }
    if let Listener::Unix(_, path) = listener {
        let _ = std::fs::remove_file(path);
    }
}

fn answer<S>(
    stream: &S,
    limit: impl Fn(Duration) -> io::Result<()>,
    text: &impl Fn() -> Option<String>,
) -> io::Result<()>
where
    for<'a> &'a S: Read + Write,
{
    let deadline = Instant::now() + CLIENT_LIMIT;
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || head.len() > HEAD_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        limit(left)?;
        let mut buffer = [0; 1024];
        match (&mut &*stream).read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => head.extend_from_slice(&buffer[..read]),
        }
    }
    let (status, body) = respond(&head, text);
    let reply = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    );
    (&mut &*stream).write_all(reply.as_bytes())
}

/// What a request is answered with.
fn respond(head: &[u8], text: &impl Fn() -> Option<String>) -> (&'static str, String) {
    let line = head.split(|b| *b == b'\r').next().unwrap_or_default();
    let words: Vec<&[u8]> = line.split(|b| *b == b' ').collect();
    match words.as_slice() {
        [b"GET", path, version] if version.starts_with(b"HTTP/1.") => {
            if path.split(|b| *b == b'?').next() != Some(b"/metrics") {
                return ("404 Not Found", "look at /metrics\n".into());
            }
            match text() {
                Some(text) => ("200 OK", text),
                None => ("503 Service Unavailable", "there is nothing to show now\n".into()),
            }
        }
        [_, _, version] if version.starts_with(b"HTTP/1.") => {
            ("405 Method Not Allowed", "only GET is answered\n".into())
        }
        _ => ("400 Bad Request", "that is no request of HTTP/1\n".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;
    use std::os::unix::fs::PermissionsExt;

    fn ask(at: &Destination, request: &str) -> String {
        let Destination::Tcp(address) = at else { panic!() };
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        text
    }

    #[test]
    fn metrics_are_answered_and_nothing_else() {
        let at: Destination = "tcp://127.0.0.1:0".parse().unwrap();
        let scrape = Scrape::start(&at, || Some("x 1\n".into())).unwrap();
        let get = |path: &str| ask(scrape.at(), &format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"));
        let good = get("/metrics");
        assert!(good.starts_with("HTTP/1.1 200 ") && good.ends_with("\r\n\r\nx 1\n"), "{good}");
        assert!(get("/metrics?a=b").starts_with("HTTP/1.1 200 "));
        assert!(get("/").starts_with("HTTP/1.1 404 "));
        assert!(ask(scrape.at(), "POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405 "));
        assert!(ask(scrape.at(), "nonsense\r\n\r\n").starts_with("HTTP/1.1 400 "));
        assert_eq!(ask(scrape.at(), &"x".repeat(20_000)), "");
        // Who says nothing holds the others up for no longer than the limit.
        let Destination::Tcp(address) = scrape.at() else { panic!() };
        let _silent = TcpStream::connect(address).unwrap();
        assert!(get("/metrics").ends_with("x 1\n"));
    }

    #[test]
    fn a_socket_is_for_its_owner_and_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.sock");
        drop(UnixListener::bind(&path).unwrap());
        let at = Destination::Unix(path.clone());
        let scrape = Scrape::start(&at, || None).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(Scrape::start(&at, || None), Err(ScrapeError::Listen { .. })));
        let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 503 "), "{text}");
        drop(scrape);
        assert!(!path.exists());
        // What is no socket is nobody's to remove.
        std::fs::write(&path, "mine").unwrap();
        assert!(matches!(Scrape::start(&at, || None), Err(ScrapeError::Listen { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
        assert!(Scrape::start(&"tcp://192.0.2.1:0".parse().unwrap(), || None).is_err());
        assert!(Scrape::start(&"dir:/x".parse().unwrap(), || None).is_err());
    }
}
