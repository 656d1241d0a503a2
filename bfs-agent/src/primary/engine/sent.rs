//! What the stream has of files that are read again and again because others change them: digests of their blocks, so
//! that only blocks that differ are sent. Pure.
//!
//! Invariant: a digest stands for what the stream has in its block. Whatever the model says of the block takes it
//! away.

use std::ops::Range;

use bfs_common::record::ObjectId;
use bfs_common::wire::{DIGEST_BLOCK, DIGEST_BYTES};
use foldhash::HashMap;

use crate::tree::block_digest;

/// Digests that are kept at most; beyond, all are forgotten.
const BLOCKS_MAX: usize = 4 << 20;

type Digest = [u8; DIGEST_BYTES];

/// See the module.
#[derive(Debug, Default)]
pub struct Sent {
    files: HashMap<ObjectId, Vec<Option<Digest>>>,
    blocks: usize,
}

impl Sent {
    /// Whether the stream has just these bytes where a block begins.
    #[must_use]
    pub fn is(&self, object: ObjectId, start: u64, bytes: &[u8]) -> bool {
        let Some(blocks) = self.files.get(&object) else { return false };
        start.is_multiple_of(DIGEST_BLOCK)
            && usize::try_from(start / DIGEST_BLOCK)
                .ok()
                .and_then(|index| blocks.get(index).copied().flatten())
                .is_some_and(|known| known == block_digest(bytes))
    }

    /// The stream has these bytes there now: a block, or the last part of the file.
    pub fn note(&mut self, object: ObjectId, start: u64, bytes: &[u8]) {
        let Ok(index) = usize::try_from(start / DIGEST_BLOCK) else { return };
        if !start.is_multiple_of(DIGEST_BLOCK) || bytes.len() as u64 > DIGEST_BLOCK || index >= BLOCKS_MAX {
            return;
        }
        let known = self.files.get(&object).map_or(0, Vec::len);
        let more = (index + 1).saturating_sub(known);
        if self.blocks + more > BLOCKS_MAX {
            self.files.clear();
            self.blocks = 0;
        }
        let blocks = self.files.entry(object).or_default();
        if index >= blocks.len() {
            self.blocks += index + 1 - blocks.len();
            blocks.resize(index + 1, None);
        }
        blocks[index] = Some(block_digest(bytes));
    }

    /// The stream says something about a range of a file.
    pub fn changed(&mut self, object: ObjectId, range: &Range<u64>) {
        let Some(blocks) = self.files.get_mut(&object) else { return };
        let count = blocks.len() as u64;
        let (first, last) = (range.start / DIGEST_BLOCK, range.end.div_ceil(DIGEST_BLOCK).min(count));
        if first < last {
            blocks[first as usize..last as usize].fill(None);
        }
    }

    /// The file is gone.
    pub fn forget(&mut self, object: ObjectId) {
        self.blocks -= self.files.remove(&object).map_or(0, |blocks| blocks.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_stream_changed_is_not_the_same() {
        const BLOCK: usize = DIGEST_BLOCK as usize;
        let (mut sent, file) = (Sent::default(), ObjectId(1));
        let block = vec![1; BLOCK];
        assert!(!sent.is(file, 0, &block));
        sent.note(file, 0, &block);
        sent.note(file, 2 * DIGEST_BLOCK, b"the end");
        assert!(sent.is(file, 0, &block) && sent.is(file, 2 * DIGEST_BLOCK, b"the end"));
        assert!(!sent.is(file, DIGEST_BLOCK, &block), "nothing is known of it");
        assert!(!sent.is(file, 0, b"x") && !sent.is(file, 1, &block));
        sent.changed(file, &(0..1));
        assert!(!sent.is(file, 0, &block) && sent.is(file, 2 * DIGEST_BLOCK, b"the end"));
        sent.changed(file, &(2 * DIGEST_BLOCK + 1..u64::MAX));
        assert!(!sent.is(file, 2 * DIGEST_BLOCK, b"the end"));
        sent.note(file, 0, &block);
        sent.forget(file);
        assert!(!sent.is(file, 0, &block) && sent.blocks == 0);
    }
}
