//! Which generations are kept: a pure decision.
//!
//! The newest always; of those without a tag the last `keep`, of those with one the last `keep`
//! too, so that a checkpoint somebody gave a name outlives the ones that come by the clock. When
//! room is short all but the last `floor` go, the oldest first. Whatever a primary sends, the last
//! `floor` stay (promise 7), and so does what is being read.

use bfs_common::record::CheckpointId;

/// How many are kept, unless something else is asked for.
pub const KEEP: u32 = 64;
/// How many are kept even when room is short, unless something else is asked for.
pub const KEEP_MIN: u32 = 8;

/// What is to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// So many without a tag, and so many with one.
    pub keep: u32,
    /// So many in any case.
    pub floor: u32,
}

impl Default for Retention {
    fn default() -> Self {
        Self { keep: KEEP, floor: KEEP_MIN }
    }
}

/// A generation, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Its number.
    pub checkpoint: CheckpointId,
    /// It has a tag.
    pub tagged: bool,
    /// Whoever took it does not want to keep it.
    pub discarded: bool,
    /// Somebody reads it.
    pub held: bool,
}

impl Retention {
    /// Those that go, of `all` (the oldest first). `short`: there is too little room.
    #[must_use]
    pub fn gone(&self, all: &[Kept], short: bool) -> Vec<CheckpointId> {
        let floor = all.len().saturating_sub(self.floor.max(1) as usize);
        let mut left = [self.keep, self.keep];
        let mut gone = Vec::new();
        for (index, one) in all.iter().enumerate().rev() {
            let left = &mut left[usize::from(one.tagged)];
            let wanted = *left > 0 && !short && !one.discarded;
            if !one.discarded {
                *left = left.saturating_sub(1);
            }
            if index < floor && !wanted && !one.held {
                gone.push(one.checkpoint);
            }
        }
        gone.reverse();
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(tagged: &[u64], held: &[u64]) -> Vec<Kept> {
        (1..=10)
            .map(|n| Kept {
                checkpoint: CheckpointId(n),
                tagged: tagged.contains(&n),
                discarded: false,
                held: held.contains(&n),
            })
            .collect()
    }

    fn gone(retention: Retention, all: &[Kept], short: bool) -> Vec<u64> {
        retention.gone(all, short).into_iter().map(|c| c.0).collect()
    }

    #[test]
    fn the_last_and_the_tagged_stay() {
        let retention = Retention { keep: 3, floor: 1 };
        assert_eq!(gone(retention, &all(&[], &[]), false), [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(gone(retention, &all(&[2, 9], &[4]), false), [1, 3, 5, 6]);
        assert_eq!(gone(retention, &all(&[1, 2, 3, 4], &[]), false), [1, 5, 6, 7]);
    }

    #[test]
    fn what_is_not_wanted_goes_first_and_takes_nobody_s_place() {
        let mut all = all(&[], &[]);
        for index in [2, 6, 9] {
            all[index].discarded = true;
        }
        assert_eq!(gone(Retention { keep: 5, floor: 1 }, &all, false), [1, 2, 3, 7]);
        assert_eq!(gone(Retention { keep: 5, floor: 4 }, &all, false), [1, 2, 3]);
    }

    #[test]
    fn nothing_goes_below_the_floor() {
        let retention = Retention { keep: 1, floor: 4 };
        assert_eq!(gone(retention, &all(&[], &[]), false), [1, 2, 3, 4, 5, 6]);
        assert_eq!(gone(retention, &all(&[2], &[]), true), [1, 2, 3, 4, 5, 6]);
        assert_eq!(gone(Retention { keep: 20, floor: 4 }, &all(&[2], &[1]), true), [2, 3, 4, 5, 6]);
        assert_eq!(gone(Retention { keep: 0, floor: 0 }, &all(&[], &[]), true).len(), 9);
    }
}
