//! What ranges of a file held, by before-images: those of an older step count. Pure.

use std::collections::BTreeMap;

use super::images::BlockRef;

/// What a range of a file held.
#[derive(Clone, Copy, Debug)]
pub enum Piece {
    /// Zeros.
    Zero,
    /// Nobody knows any more.
    Unknown,
    /// These bytes, from the so-manieth on.
    Block(BlockRef, u64),
}

impl Piece {
    /// Without its first bytes.
    const fn behind(self, bytes: u64) -> Self {
        match self {
            Self::Block(block, skip) => Self::Block(block, skip + bytes),
            other => other,
        }
    }
}

/// Ranges in order, those that touch each other as one.
#[must_use]
pub fn joined(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    let mut all: Vec<(u64, u64)> = Vec::new();
    for (start, end) in ranges {
        match all.last_mut() {
            Some((_, last)) if start <= *last => *last = end.max(*last),
            _ => all.push((start, end)),
        }
    }
    all
}

/// Ranges of a file that do not overlap: offset to end and what was there.
#[derive(Debug, Default)]
pub struct Pieces(BTreeMap<u64, (u64, Piece)>);

impl Pieces {
    /// Whether nobody knows some of it any more.
    #[must_use]
    pub fn has_unknown(&self) -> bool {
        self.0.values().any(|(_, piece)| matches!(piece, Piece::Unknown))
    }

    /// Says what a range held, where nothing is said yet: older images come first, and count.
    pub fn fill(&mut self, start: u64, end: u64, piece: Piece) {
        let mut at = start;
        if let Some((_, (covered, _))) = self.0.range(..=start).next_back() {
            at = at.max(*covered);
        }
        while at < end {
            let next = self.0.range(at..end).next().map(|(s, (e, _))| (*s, *e));
            let until = next.map_or(end, |(s, _)| s);
            if at < until {
                self.0.insert(at, (until, piece.behind(at - start)));
            }
            at = next.map_or(end, |(_, e)| e);
        }
    }

    /// What is said about the next range at or after `at`, below `end`.
    pub fn next(&self, at: u64, end: u64) -> Option<(u64, u64, Piece)> {
        if at >= end {
            return None;
        }
        if let Some((start, (e, piece))) = self.0.range(..at).next_back()
            && *e > at
        {
            return Some((at, (*e).min(end), piece.behind(at - start)));
        }
        self.0.range(at..end).next().map(|(s, (e, piece))| (*s, (*e).min(end), *piece))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bfs_common::record::CheckpointId;
    use proptest::prelude::*;

    proptest! {
        /// The first that says something about a byte counts.
        #[test]
        fn older_pieces_count(ranges in prop::collection::vec((0..60u64, 1..30u64), 0..12)) {
            let mut model = [None; 100];
            let mut pieces = Pieces::default();
            for (index, (start, len)) in ranges.iter().enumerate() {
                let block = BlockRef { image: CheckpointId(index as u64), at: 0, len: 0, crc: 0 };
                pieces.fill(*start, start + len, Piece::Block(block, 0));
                for at in *start..start + len {
                    model[at as usize].get_or_insert((index as u64, at - start));
                }
            }
            prop_assert!(pieces.next(95, 95).is_none());
            let mut found = [None; 100];
            let mut at = 0;
            while let Some((start, end, piece)) = pieces.next(at, 95) {
                let Piece::Block(block, skip) = piece else { panic!() };
                for here in start..end {
                    found[here as usize] = Some((block.image.0, skip + (here - start)));
                }
                at = end;
            }
            prop_assert_eq!(found, model);
        }
    }
}
