//! What people write for a place to connect to or to listen on.
//!
//! Numbers for monitors have no keys: for them an address that is not loopback is refused here, before anything is bound.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// A place where backups are kept.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Destination {
    /// `tcp://HOST:PORT`
    Tcp(String),
    /// `unix:PATH`
    Unix(PathBuf),
    /// `dir:STORE`: a store that this process owns itself.
    Dir(PathBuf),
}

/// Why an address cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// No known form.
    #[error("{0:?} is not an address: write tcp://HOST:PORT, unix:PATH or dir:STORE")]
    Form(String),
    /// Host or port is missing or wrong.
    #[error("{0:?} is not HOST:PORT (for example tcp://127.0.0.1:7400 or tcp://[::1]:7400)")]
    HostPort(String),
    /// The path is missing.
    #[error("{0:?} has no path")]
    NoPath(String),
    /// Not on this host.
    #[error(
        "tcp://{address} is refused: {resolved} is not a loopback address, and whoever connects there is not asked who \
         it is; use tcp://127.0.0.1:PORT or a tunnel to it"
    )]
    NotLoopback {
        /// As written.
        address: String,
        /// What it means.
        resolved: SocketAddr,
    },
    /// The name has no address.
    #[error("cannot resolve {address}: {error}")]
    Resolve {
        /// As written.
        address: String,
        /// What the system said.
        error: std::io::Error,
    },
}

impl FromStr for Destination {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if let Some(rest) = text.strip_prefix("tcp://") {
            let valid = rest.rsplit_once(':').is_some_and(|(host, port)| {
                !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok()
            });
            return if valid { Ok(Self::Tcp(rest.into())) } else { Err(AddressError::HostPort(text.into())) };
        }
        let (kind, path) = text.split_once(':').ok_or_else(|| AddressError::Form(text.into()))?;
        let make = match kind {
            "unix" => Self::Unix,
            "dir" => Self::Dir,
            _ => return Err(AddressError::Form(text.into())),
        };
        if path.is_empty() { Err(AddressError::NoPath(text.into())) } else { Ok(make(path.into())) }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp://{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Dir(path) => write!(f, "dir:{}", path.display()),
        }
    }
}

/// The socket addresses behind `HOST:PORT`, at least one.
///
/// # Errors
/// [`AddressError::Resolve`].
pub async fn resolve(address: &str) -> Result<Vec<SocketAddr>, AddressError> {
    some(address, tokio::net::lookup_host(address).await.map(Iterator::collect))
}

/// The same, outside a runtime; blocks while a name is looked up.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_now(address: &str) -> Result<Vec<SocketAddr>, AddressError> {
    some(address, std::net::ToSocketAddrs::to_socket_addrs(address).map(Iterator::collect))
}

/// The same, where all of them are loopback.
///
/// # Errors
/// As [`resolve`], or [`AddressError::NotLoopback`] if any of them is not.
pub fn resolve_loopback_now(address: &str) -> Result<Vec<SocketAddr>, AddressError> {
    let found = resolve_now(address)?;
    match found.iter().find(|a| !a.ip().is_loopback()) {
        Some(far) => Err(AddressError::NotLoopback { address: address.into(), resolved: *far }),
        None => Ok(found),
    }
}

fn some(address: &str, found: std::io::Result<Vec<SocketAddr>>) -> Result<Vec<SocketAddr>, AddressError> {
    let resolve = |error| AddressError::Resolve { address: address.into(), error };
    let found = found.map_err(resolve)?;
    if found.is_empty() {
        return Err(resolve(std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address")));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_understood_and_shown_again() {
        for text in ["tcp://127.0.0.1:7400", "tcp://[::1]:1", "tcp://localhost:0", "unix:/a b/c", "dir:store"]
        {
            assert_eq!(text.parse::<Destination>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn only_what_is_asked_for_has_to_be_loopback() {
        assert!(resolve_loopback_now("127.0.0.1:9").is_ok() && resolve_now("192.0.2.1:9").is_ok());
        assert!(matches!(resolve_loopback_now("192.0.2.1:9"), Err(AddressError::NotLoopback { .. })));
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in
            ["", "host:1", "tcp://", "tcp://host", "tcp://:1", "tcp://h:99999", "unix:", "dir:", "http://x:1"]
        {
            assert!(text.parse::<Destination>().is_err(), "{text:?}");
        }
    }
}
