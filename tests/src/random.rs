//! Random numbers from a seed, the same on every machine, so that what failed can be done again.

/// SplitMix64.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// From [`printed_seed`].
    #[must_use]
    pub fn printed() -> Self {
        Self::new(printed_seed())
    }

    /// The next 64 bits.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub const fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// True `percent` times in a hundred.
    pub const fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// One of them.
    ///
    /// # Panics
    /// When there is none.
    pub fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
}

/// What `BFS_SEED` says.
#[must_use]
pub fn given_seed() -> Option<u64> {
    std::env::var("BFS_SEED").ok()?.parse().ok()
}

/// [`given_seed`], else in long runs a number from the clock and in short ones always the same; printed, so
/// that a failure can be done again.
#[must_use]
pub fn printed_seed() -> u64 {
    let usual = || {
        if std::env::var_os("BFS_LONG").is_none() {
            return 20_261_121;
        }
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(1, |d| d.as_micros() as u64 % 1_000_000_007)
    };
    let seed = given_seed().unwrap_or_else(usual);
    eprintln!("BFS_SEED={seed}");
    seed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_numbers_each_time() {
        let numbers = |seed| {
            let mut random = Random::new(seed);
            (0..4).map(|_| random.next()).collect::<Vec<_>>()
        };
        // The first number of the reference implementation for the seed 0.
        assert_eq!(numbers(0)[0], 0xe220_a839_7b1d_cdaf);
        assert_eq!(numbers(7), numbers(7));
        assert_ne!(numbers(7), numbers(8));
        let mut random = Random::new(3);
        assert!((0..1000).all(|_| random.below(10) < 10));
    }
}
