//! What commands changed of a group's policies, in a file that outlives the boot.
//!
//! ```text
//! DIR/GROUP.policies    "bfs policies 1 CCCCCCCC\n", then the changes as JSON; CC.. is the CRC32C of what follows
//! ```
//! It is there as a whole or not at all. What is damaged is refused and never passed over: the file says what somebody
//! wants to be done with his data.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::Change;
use crate::log::sync_dir;

/// Where the files lie unless told otherwise.
pub const DIRECTORY: &str = "/var/lib/bfs/policies";
/// First word of a file, and the version that this release writes.
const MAGIC: &str = "bfs policies 1 ";
/// Longest file.
const BYTES_MAX: usize = 16 << 20;

/// Why the changes cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The system says no.
    #[error("cannot {what} {path}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// It is not what was written.
    #[error("{path} is damaged: {why}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        why: String,
    },
}

fn file(directory: &Path, group: &str) -> PathBuf {
    directory.join(format!("{group}.policies"))
}

fn encode(changes: &[Change]) -> io::Result<Vec<u8>> {
    let body = serde_json::to_vec(changes)?;
    let mut bytes = format!("{MAGIC}{:08x}\n", crc32c::crc32c(&body)).into_bytes();
    bytes.extend_from_slice(&body);
    if bytes.len() > BYTES_MAX {
        return Err(io::Error::other(format!("it would have {} bytes", bytes.len())));
    }
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> Result<Vec<Change>, String> {
    if bytes.len() > BYTES_MAX {
        return Err(format!("it has {} bytes", bytes.len()));
    }
    let line = bytes.iter().position(|byte| *byte == b'\n').ok_or("it has no first line")?;
    let (head, body) = (&bytes[..line], &bytes[line + 1..]);
    let sum = head
        .strip_prefix(MAGIC.as_bytes())
        .ok_or("its first line is of something else, or of a newer release")?;
    if sum != format!("{:08x}", crc32c::crc32c(body)).as_bytes() {
        return Err("its checksum does not fit".into());
    }
    serde_json::from_slice(body).map_err(|e| e.to_string())
}

/// The changes of a group; none where nothing was changed.
///
/// # Errors
/// [`StoreError`].
pub fn read(directory: &Path, group: &str) -> Result<Vec<Change>, StoreError> {
    let path = file(directory, group);
    match fs::read(&path) {
        Ok(bytes) => decode(&bytes).map_err(|why| StoreError::Damaged { path, why }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(StoreError::Io { what: "read", path, error }),
    }
}

/// Writes the changes of a group, durably.
///
/// # Errors
/// [`StoreError`]; what was there before is there still.
pub fn write(directory: &Path, group: &str, changes: &[Change]) -> Result<(), StoreError> {
    let path = file(directory, group);
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |error| StoreError::Io { what, path, error }
    };
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed("make", directory))?;
    let new = path.with_extension("policies.new");
    let put = || -> io::Result<()> {
        let bytes = encode(changes)?;
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&new, &path)
    };
    put().map_err(failed("write", &path))?;
    sync_dir(directory).map_err(|e| StoreError::Io {
        what: "sync",
        path: directory.into(),
        error: io::Error::other(e),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::{Backup, Policy};

    fn changes() -> Vec<Change> {
        let mut policy = Policy::new("/srv/db").unwrap();
        policy.backup = Backup::Write;
        let over = Some(Policy { place: Some("copies/db".into()), ..policy.clone() });
        vec![
            Change { pattern: "/srv/db".into(), over, now: Some(Policy { suspended: true, ..policy }) },
            Change { pattern: "*.db".into(), over: None, now: None },
        ]
    }

    #[test]
    fn what_is_written_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("made");
        assert_eq!(read(&dir, "g").unwrap(), Vec::new());
        for changes in [changes(), Vec::new()] {
            write(&dir, "g", &changes).unwrap();
            assert_eq!(read(&dir, "g").unwrap(), changes);
        }
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn the_bytes_are_these() {
        let golden = concat!(
            "bfs policies 1 SUM\n",
            r#"[{"pattern":"/srv/db","over":{"pattern":"/srv/db","backup":"write","retries":3,"time_limit_ms":60000,"#,
            r#""place":"copies/db","suspended":false},"now":{"pattern":"/srv/db","backup":"write","retries":3,"#,
            r#""time_limit_ms":60000,"suspended":true}},{"pattern":"*.db","over":null,"now":null}]"#
        );
        let bytes = String::from_utf8(encode(&changes()).unwrap()).unwrap();
        let sum = &bytes[MAGIC.len()..MAGIC.len() + 8];
        assert_eq!(bytes.replacen(sum, "SUM", 1), golden);
        assert_eq!(sum, "410640d4");
    }

    #[test]
    fn what_is_damaged_is_refused() {
        let bytes = encode(&changes()).unwrap();
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len]).is_err(), "cut at {len}");
        }
        for at in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[at / 8] ^= 1 << (at % 8);
            assert!(decode(&flipped).is_err(), "bit {at}");
        }
    }
}
