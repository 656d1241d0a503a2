//! A set of byte ranges: sorted, disjoint, merged where they touch. Pure.

use std::collections::BTreeMap;
use std::ops::Range;

/// Byte ranges of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet(BTreeMap<u64, u64>);

impl RangeSet {
    /// Adds a range; an empty one changes nothing.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        // Everything that begins at or before our end and ends at or after our start merges.
        while let Some((&s, &e)) = self.0.range(..=end).next_back() {
            if e < start {
                break;
            }
            start = start.min(s);
            end = end.max(e);
            self.0.remove(&s);
        }
        self.0.insert(start, end);
    }

    /// Takes a range out.
    pub fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        while let Some((&s, &e)) = self.0.range(..range.end).next_back() {
            if e <= range.start {
                break;
            }
            self.0.remove(&s);
            if e > range.end {
                self.0.insert(range.end, e);
            }
            if s < range.start {
                self.0.insert(s, range.start);
                break;
            }
        }
    }

    /// Whether any byte of the range is in the set.
    #[must_use]
    pub fn intersects(&self, range: &Range<u64>) -> bool {
        !range.is_empty() && self.0.range(..range.end).next_back().is_some_and(|(_, e)| *e > range.start)
    }

    /// Whether nothing is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ranges in order.
    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().map(|(s, e)| *s..*e)
    }

    /// How many ranges there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// How many bytes are in the set.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|(s, e)| e - s).fold(0, u64::saturating_add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_a_set_of_bytes(ops in proptest::collection::vec((any::<bool>(), 0u64..64, 0u64..16), 0..40)) {
            let mut set = RangeSet::default();
            let mut model = [false; 96];
            for (add, start, len) in ops {
                let range = start..start + len;
                model[start as usize..(start + len) as usize].fill(add);
                if add { set.insert(range) } else { set.remove(range) }
                let mut seen = [false; 96];
                let mut last_end = None;
                for r in set.iter() {
                    prop_assert!(!r.is_empty() && last_end.is_none_or(|e| e < r.start));
                    seen[r.start as usize..r.end as usize].fill(true);
                    last_end = Some(r.end);
                }
                prop_assert_eq!(seen, model);
                for probe in 0..90u64 {
                    prop_assert_eq!(set.intersects(&(probe..probe + 3)), model[probe as usize..probe as usize + 3].contains(&true));
                }
                prop_assert_eq!(set.bytes() as usize, model.iter().filter(|b| **b).count());
            }
        }
    }
}
