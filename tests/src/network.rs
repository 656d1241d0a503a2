//! A network between agent and replayer that fails as the test says: a proxy on loopback.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// How it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Network {
    /// All comes through.
    Whole,
    /// What is connected ends, and nothing new can be.
    Cut,
    /// Connections stand, also new ones, and nothing comes through.
    Silent,
    /// What the agent says comes through, no answer does.
    OneWay,
    /// A few bytes come through now and then.
    Slow,
}

const ALL: [Network; 5] = [Network::Whole, Network::Cut, Network::Silent, Network::OneWay, Network::Slow];
/// Between two looks.
const TICK: Duration = Duration::from_millis(10);
/// Bytes that come through at a time when it is slow.
const DRIP: usize = 64;

#[derive(Debug)]
struct Shared {
    is: AtomicU8,
    ended: AtomicBool,
    /// Bytes from the agent.
    bytes: AtomicU64,
}

impl Shared {
    fn is(&self) -> Network {
        ALL[usize::from(self.is.load(Ordering::SeqCst))]
    }
}

/// See the module.
#[derive(Debug)]
pub struct Proxy {
    address: String,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// One that leads to HOST:PORT.
    ///
    /// # Errors
    /// When no port is free.
    pub fn new(to: &str) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?.to_string();
        let shared = Arc::new(Shared {
            is: AtomicU8::new(Network::Whole as u8),
            ended: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
        });
        let (theirs, to) = (Arc::clone(&shared), to.to_owned());
        let thread = std::thread::spawn(move || accept(&listener, &to, &theirs));
        Ok(Self { address, shared, thread: Some(thread) })
    }

    /// HOST:PORT of this end.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// From now on it is like this.
    pub fn set(&self, network: Network) {
        self.shared.is.store(network as u8, Ordering::SeqCst);
    }

    /// Bytes that came through from agents.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn accept(listener: &TcpListener, to: &str, shared: &Arc<Shared>) {
    let mut threads = Vec::new();
    while !shared.ended.load(Ordering::SeqCst) {
        let Ok((agent, _)) = listener.accept() else {
            std::thread::sleep(TICK);
            continue;
        };
        // While it is cut both ends are closed at once.
        let connected = if shared.is() == Network::Cut { None } else { TcpStream::connect(to).ok() };
        let Some(replayer) = connected else { continue };
        for is_agent in [true, false] {
            let ends = (agent.try_clone(), replayer.try_clone());
            let (Ok(agent), Ok(replayer)) = ends else { continue };
            let (from, to) = if is_agent { (agent, replayer) } else { (replayer, agent) };
            let shared = Arc::clone(shared);
            threads.push(std::thread::spawn(move || {
                let _ = carry(&from, &to, is_agent, &shared);
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.shutdown(Shutdown::Both);
            }));
        }
    }
    for thread in threads {
        let _ = thread.join();
    }
}

/// One direction of a connection, until either end is closed.
fn carry(mut from: &TcpStream, mut to: &TcpStream, is_agent: bool, shared: &Shared) -> io::Result<()> {
    from.set_nonblocking(false)?;
    from.set_read_timeout(Some(TICK))?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let network = shared.is();
        if shared.ended.load(Ordering::SeqCst) || network == Network::Cut {
            return Ok(());
        }
        if network == Network::Silent || (network == Network::OneWay && !is_agent) {
            std::thread::sleep(TICK);
            continue;
        }
        let most = if network == Network::Slow { DRIP } else { buffer.len() };
        let len = match from.read(&mut buffer[..most]) {
            Ok(0) => return Ok(()),
            Ok(len) => len,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => continue,
            Err(error) => return Err(error),
        };
        to.write_all(&buffer[..len])?;
        if is_agent {
            shared.bytes.fetch_add(len as u64, Ordering::SeqCst);
        }
        if network == Network::Slow {
            std::thread::sleep(TICK);
        }
    }
}
