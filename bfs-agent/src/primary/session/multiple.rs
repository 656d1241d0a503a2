//! Which objects have several names, for a successor: `/run/bfs/multiple-GROUP` has their numbers, 8 bytes each,
//! little-endian. It may have too many, and is written before the ring space is released by which a successor would have
//! known of them. Where it is missing a successor does not know, and everything is read.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bfs_common::record::ObjectId;

use super::state::{DIRECTORY, make_directory};

fn path(group: &str) -> PathBuf {
    Path::new(DIRECTORY).join(format!("multiple-{group}"))
}

/// The list of a group.
#[derive(Debug)]
pub(super) struct Multiple {
    path: PathBuf,
    /// `None` where it cannot be kept.
    file: Option<File>,
}

impl Multiple {
    /// Begins an empty one, for probes that are new.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn begin(group: &str) -> io::Result<()> {
        make_directory()?;
        Self::remove(group);
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path(group)).map(drop)
    }

    /// The list, and what is on it; nothing where it was not kept.
    pub(super) fn open(group: &str) -> (Self, Option<Vec<ObjectId>>) {
        let path = path(group);
        let file = OpenOptions::new().append(true).open(&path).ok();
        let known = file.as_ref().and_then(|_| numbers(&fs::read(&path).ok()?));
        let file = file.filter(|_| known.is_some());
        (Self { path, file }, known)
    }

    /// At a clean end.
    pub(super) fn remove(group: &str) {
        let _ = fs::remove_file(path(group));
    }

    /// More of them. Where they cannot be kept, a successor has to find no list.
    pub(super) fn keep(&mut self, objects: &[ObjectId]) {
        let Some(file) = &mut self.file else { return };
        let bytes: Vec<u8> = objects.iter().flat_map(|object| object.0.to_le_bytes()).collect();
        if let Err(error) = file.write_all(&bytes) {
            tracing::warn!("cannot note in {DIRECTORY} which files have several names: {error}");
            self.file = None;
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn numbers(bytes: &[u8]) -> Option<Vec<ObjectId>> {
    let (numbers, rest) = bytes.as_chunks::<8>();
    rest.is_empty().then(|| numbers.iter().map(|number| ObjectId(u64::from_le_bytes(*number))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_off_counts_as_none() {
        let two = [1u64.to_le_bytes(), 70_000u64.to_le_bytes()].concat();
        assert_eq!(numbers(&two), Some(vec![ObjectId(1), ObjectId(70_000)]));
        assert_eq!((numbers(&two[..15]), numbers(&[])), (None, Some(Vec::new())));
    }
}
