//! What of a file is not as the applied checkpoint has it, and is known to be so: ranges of bytes. Pure.
//!
//! It comes about when somebody else changes, replaces or deletes a backup file, or a disk loses bytes. It is noted in
//! the index before anything builds on these bytes, and gone when a step writes them again.

use serde::{Deserialize, Serialize};

/// Ranges that are told apart; beyond, all from the first to the last counts.
const RANGES_MAX: usize = 4096;

/// Ranges of a file, offset and end, in order and apart from each other.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Damage(Vec<(u64, u64)>);

impl Damage {
    /// All of a file of this size.
    #[must_use]
    pub fn all(size: u64) -> Self {
        let mut damage = Self::default();
        damage.add(0, size);
        damage
    }

    /// The ranges.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().copied()
    }

    /// Whether nothing is damaged.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether some of these bytes are.
    #[must_use]
    pub fn touches(&self, start: u64, end: u64) -> bool {
        self.within(start, end).next().is_some()
    }

    /// What of these bytes is damaged.
    pub fn within(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let from = self.0.partition_point(|(_, e)| *e <= start);
        let cut = move |(s, e): &(u64, u64)| (*s.max(&start), *e.min(&end));
        self.0[from..].iter().take_while(move |(s, _)| *s < end).map(cut).filter(|(s, e)| s < e)
    }

    /// What of these bytes is not.
    #[must_use]
    pub fn without(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let mut rest = Self::default();
        rest.add(start, end);
        self.iter().for_each(|(s, e)| rest.remove(s, e));
        rest.0
    }

    /// These bytes are damaged.
    pub fn add(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let from = self.0.partition_point(|(_, e)| *e < start);
        let to = self.0.partition_point(|(s, _)| *s <= end);
        let start = self.0[from..to].first().map_or(start, |(s, _)| start.min(*s));
        let end = self.0[from..to].last().map_or(end, |(_, e)| end.max(*e));
        self.0.splice(from..to, [(start, end)]);
        if self.0.len() > RANGES_MAX
            && let (Some((first, _)), Some((_, last))) = (self.0.first(), self.0.last())
        {
            self.0 = vec![(*first, *last)];
        }
    }

    /// These bytes are as they should be again, or are not there any more.
    pub fn remove(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let cut = self.0.iter().flat_map(|(s, e)| [(*s, *e.min(&start)), (*s.max(&end), *e)]);
        self.0 = cut.filter(|(s, e)| s < e).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_bytes_of_a_row() {
        let mut damage = Damage::default();
        damage.add(30, 40);
        damage.add(10, 20);
        let row = rmp_serde::to_vec_named(&damage).unwrap();
        assert_eq!(row, [0x92, 0x92, 10, 20, 0x92, 30, 40]);
        assert_eq!(rmp_serde::from_slice::<Damage>(&row).unwrap(), damage);
    }

    proptest! {
        #[test]
        fn ranges_are_the_bytes_that_they_say(ops in prop::collection::vec((any::<bool>(), 0..40u64, 0..12u64), 0..20)) {
            let (mut damage, mut model) = (Damage::default(), [false; 64]);
            for (add, start, len) in ops {
                if add { damage.add(start, start + len) } else { damage.remove(start, start + len) }
                model[start as usize..(start + len) as usize].fill(add);
                let mut found = [false; 64];
                damage.iter().for_each(|(s, e)| found[s as usize..e as usize].fill(true));
                prop_assert_eq!(found, model);
                prop_assert!(damage.0.windows(2).all(|w| w[0].1 < w[1].0), "{:?}", damage);
                prop_assert_eq!(damage.touches(start, start + len), model[start as usize..(start + len) as usize].contains(&true));
                let rest: u64 = damage.without(5, 30).iter().map(|(s, e)| e - s).sum();
                prop_assert_eq!(rest, model[5..30].iter().filter(|b| !**b).count() as u64);
            }
        }
    }
}
