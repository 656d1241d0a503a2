//! What the destination is known to have: digests of the blocks of files, as the stream had them when
//! this agent began, or when everything became suspect. Where a block that is read has the same digest, it does not have
//! to be sent.
//!
//! Invariant: a digest counts only while the stream said nothing else about its block. The model says
//! what it puts into the stream, from the first record on, also before the digests of a file are
//! there. Pure.

use std::ops::Range;

use bfs_common::record::ObjectId;
use bfs_common::wire::DIGEST_BYTES;
use foldhash::HashMap;

use super::ranges::RangeSet;
use crate::tree::block_digest;

/// The digest of a block: [`block_digest`].
pub type Digest = [u8; DIGEST_BYTES];

/// What is known of the blocks of a file.
#[derive(Debug, PartialEq, Eq)]
pub enum Known {
    /// Nothing, and nothing will be.
    Nothing,
    /// Nothing yet.
    NotYet,
    /// These digests, of all blocks up to the end of the file.
    Digests(Vec<Digest>),
}

#[derive(Debug, Default)]
struct File {
    /// `None` until it was asked.
    digests: Option<Vec<Digest>>,
    /// What the stream said since.
    changed: RangeSet,
}

/// The blocks of all files.
#[derive(Debug)]
pub struct Same {
    block: u64,
    files: HashMap<ObjectId, File>,
}

impl Same {
    /// Nothing is known yet; blocks have this many bytes.
    #[must_use]
    pub fn new(block: u64) -> Self {
        Self { block, files: HashMap::default() }
    }

    /// Bytes of a block.
    #[must_use]
    pub fn block(&self) -> u64 {
        self.block
    }

    /// Whether what is known of the file was taken in already.
    #[must_use]
    pub fn has(&self, object: ObjectId) -> bool {
        self.files.get(&object).is_some_and(|file| file.digests.is_some())
    }

    /// Takes in what is known of a file.
    pub fn put(&mut self, object: ObjectId, digests: Vec<Digest>) {
        self.files.entry(object).or_default().digests = Some(digests);
    }

    /// The stream says something about a range of a file.
    pub fn changed(&mut self, object: ObjectId, range: Range<u64>) {
        self.files.entry(object).or_default().changed.insert(range);
    }

    /// The file is gone.
    pub fn forget(&mut self, object: ObjectId) {
        self.files.remove(&object);
    }

    /// Whether the stream has just these bytes in the block that begins here.
    #[must_use]
    pub fn is(&self, object: ObjectId, start: u64, bytes: &[u8]) -> bool {
        let Some(File { digests: Some(digests), changed }) = self.files.get(&object) else { return false };
        let known = usize::try_from(start / self.block).ok().and_then(|index| digests.get(index));
        known.is_some_and(|known| {
            start.is_multiple_of(self.block)
                && !changed.intersects(&(start..start.saturating_add(self.block)))
                && *known == block_digest(bytes)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_stream_did_not_touch_is_the_same() {
        let (mut same, file) = (Same::new(4), ObjectId(1));
        same.changed(file, 9..10);
        assert!(!same.has(file));
        same.put(file, [&b"abcd"[..], b"efgh", b"ijkl", b"mn"].map(block_digest).to_vec());
        assert!(same.has(file) && same.is(file, 0, b"abcd") && same.is(file, 12, b"mn"));
        assert!(!same.is(file, 8, b"ijkl"), "written before the digests came");
        assert!(!same.is(file, 0, b"abcx") && !same.is(file, 2, b"abcd") && !same.is(file, 16, b""));
        assert!(!same.is(file, 12, b"mno"));
        same.changed(file, 7..8);
        assert!(!same.is(file, 4, b"efgh") && same.is(file, 0, b"abcd"));
        same.forget(file);
        assert!(!same.is(file, 0, b"abcd"));
    }
}
