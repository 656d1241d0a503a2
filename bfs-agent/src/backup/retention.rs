//! Which generations are kept: a pure decision.
//!
//! Rules say which are wanted: everything that is younger than an hour, then the last of each minute for a day,
//! the last of each day for a month, all with a tag; and together they may take a part of the disk. What no rule
//! wants goes, and of what is wanted the oldest while it is too much: those without a tag first. When the disk is
//! nearly full all but the floor go. Whatever a primary sends, the last `floor` stay (promise 7), and so
//! does what is being read.
//!
//! Ages are counted from the newest generation, or from now if that is earlier. So an idle group keeps what it
//! has, and what was taken before goes for no clock of a primary that is suddenly wrong.

use std::collections::BTreeSet;
use std::time::Duration;

use bfs_common::record::CheckpointId;

/// How many are kept even when room is short, unless something else is asked for.
pub const KEEP_MIN: u32 = 8;
/// How much of the disk they may take together, unless something else is asked for.
pub const SPACE_PERCENT: u8 = 20;
/// How many there may be, so that looking at all of them stays cheap.
const KEPT_MAX: usize = 16_384;
/// How often it is looked which of them go: what goes together is merged at once.
const PAUSE: Duration = Duration::from_secs(60);

/// Of those that are younger than `age` the last of each span of `every` is kept; all with `every` zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// So long is a span.
    pub every: Duration,
    /// Up to this age.
    pub age: Duration,
}

/// What is to be kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retention {
    /// By age.
    pub spans: Vec<Span>,
    /// The last so many, whatever their age.
    pub last: u32,
    /// Most of the disk that they may take together.
    pub space_percent: u8,
    /// So many in any case.
    pub floor: u32,
    /// And so many when somebody asks for a merge.
    pub merge_floor: u32,
    /// How often it is looked.
    pub pause: Duration,
}

impl Default for Retention {
    fn default() -> Self {
        let hours = |hours: u64| Duration::from_secs(hours * 3600);
        Self {
            spans: vec![
                Span { every: Duration::ZERO, age: hours(1) },
                Span { every: Duration::from_secs(60), age: hours(24) },
                Span { every: hours(24), age: hours(30 * 24) },
            ],
            last: 0,
            space_percent: SPACE_PERCENT,
            floor: KEEP_MIN,
            merge_floor: KEEP_MIN,
            pause: PAUSE,
        }
    }
}

impl Retention {
    /// Nothing goes by itself; of what somebody asks for, so many stay.
    #[must_use]
    pub fn everything(merge_floor: u32) -> Self {
        Self { last: u32::MAX, space_percent: 100, floor: u32::MAX, merge_floor, ..Self::default() }
    }

    /// The last so many and those with a tag stay, and it is looked each time.
    #[must_use]
    pub fn last(last: u32, floor: u32) -> Self {
        let pause = Duration::ZERO;
        Self { spans: Vec::new(), last, space_percent: 100, floor, merge_floor: floor, pause }
    }
}

/// A generation, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Its number.
    pub checkpoint: CheckpointId,
    /// When it was taken: nanoseconds since 1970, by the clock of the primary.
    pub wall_ns: i64,
    /// It has a tag.
    pub tagged: bool,
    /// Whoever took it does not want to keep it.
    pub discarded: bool,
    /// Somebody reads it.
    pub held: bool,
    /// Bytes that it takes.
    pub bytes: u64,
}

/// How the disk stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// There is too little room.
    pub short: bool,
    /// Bytes of the whole disk; none if they do not matter now.
    pub disk_bytes: Option<u64>,
}

impl Retention {
    /// Those that go, of `all` (the oldest first).
    #[must_use]
    pub fn gone(&self, all: &[Kept], now_ns: i64, space: Space) -> BTreeSet<CheckpointId> {
        let floor = all.len().saturating_sub(self.floor.max(1) as usize);
        let wanted = self.wanted(all, now_ns);
        let free = |index: usize| index < floor && !all[index].held;
        let mut gone: BTreeSet<usize> =
            (0..all.len()).filter(|index| free(*index) && (space.short || !wanted[*index])).collect();
        let part = |disk_bytes| u128::from(disk_bytes) * u128::from(self.space_percent) / 100;
        let limit = space.disk_bytes.map_or(u128::MAX, part);
        let left = (0..all.len()).filter(|index| !gone.contains(index));
        let mut bytes: u128 = left.map(|index| u128::from(all[index].bytes)).sum();
        for tagged in [false, true] {
            for index in (0..floor).filter(|index| all[*index].tagged == tagged && free(*index)) {
                if bytes <= limit && all.len() - gone.len() <= KEPT_MAX {
                    break;
                }
                if gone.insert(index) {
                    bytes -= u128::from(all[index].bytes);
                }
            }
        }
        gone.into_iter().map(|index| all[index].checkpoint).collect()
    }

    /// Those that go, of `all` (the oldest first), when those from one to another become one: the newer one stays.
    ///
    /// # Errors
    /// Why they stay, in words.
    pub fn merged(
        &self,
        all: &[Kept],
        from: CheckpointId,
        to: CheckpointId,
    ) -> Result<BTreeSet<CheckpointId>, String> {
        for asked in [from, to] {
            if !all.iter().any(|one| one.checkpoint == asked) {
                return Err(format!(
                    "checkpoint {asked} is not kept; `bfs-replayer generations` lists those that are"
                ));
            }
        }
        if from >= to {
            return Err(format!("{from} and {to}: give two checkpoints, the older one first"));
        }
        let floor = all.len().saturating_sub(self.merge_floor.max(1) as usize);
        let mut gone = BTreeSet::new();
        for (index, one) in all.iter().enumerate().filter(|(_, one)| (from..to).contains(&one.checkpoint)) {
            let n = one.checkpoint;
            if one.tagged {
                return Err(format!(
                    "checkpoint {n} has a tag, and stays: merge up to it, and from behind it on"
                ));
            }
            if index >= floor {
                let floor = self.merge_floor.max(1);
                return Err(format!(
                    "checkpoint {n} is one of the last {floor}, which stay in any case (--keep-min)"
                ));
            }
            if one.held {
                return Err(format!(
                    "checkpoint {n} is mounted or being read: try again when that has ended"
                ));
            }
            gone.insert(n);
        }
        Ok(gone)
    }

    /// Whether a rule wants each of them.
    fn wanted(&self, all: &[Kept], now_ns: i64) -> Vec<bool> {
        let newest = all.last().map_or(now_ns, |one| one.wall_ns).min(now_ns);
        let mut wanted = vec![false; all.len()];
        let mut last = self.last;
        // The span that the one before (a later one) was the last of, for each rule.
        let mut spans: Vec<Option<i128>> = vec![None; self.spans.len()];
        for (index, one) in all.iter().enumerate().rev() {
            if one.discarded {
                continue;
            }
            wanted[index] = one.tagged || last > 0;
            last = last.saturating_sub(1);
            let age = i128::from(newest) - i128::from(one.wall_ns);
            for (rule, span) in self.spans.iter().zip(&mut spans) {
                if age >= rule.age.as_nanos() as i128 {
                    continue;
                }
                let number = match rule.every.as_nanos() as i128 {
                    0 => {
                        wanted[index] = true;
                        continue;
                    }
                    every => i128::from(one.wall_ns).div_euclid(every),
                };
                wanted[index] |= *span != Some(number);
                *span = Some(number);
            }
        }
        wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ROOMY: Space = Space { short: false, disk_bytes: None };
    const SHORT: Space = Space { short: true, disk_bytes: None };
    const SECOND: i64 = 1_000_000_000;

    fn all(tagged: &[u64], held: &[u64]) -> Vec<Kept> {
        (1..=10)
            .map(|n| Kept {
                checkpoint: CheckpointId(n),
                wall_ns: n as i64 * SECOND,
                tagged: tagged.contains(&n),
                discarded: false,
                held: held.contains(&n),
                bytes: 10,
            })
            .collect()
    }

    fn gone(retention: &Retention, all: &[Kept], space: Space) -> Vec<u64> {
        retention.gone(all, 10 * SECOND, space).into_iter().map(|c| c.0).collect()
    }

    #[test]
    fn the_last_and_the_tagged_stay() {
        let retention = Retention::last(3, 1);
        assert_eq!(gone(&retention, &all(&[], &[]), ROOMY), [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(gone(&retention, &all(&[2, 9], &[4]), ROOMY), [1, 3, 5, 6, 7]);
    }

    #[test]
    fn what_is_not_wanted_goes_first_and_takes_nobody_s_place() {
        let mut all = all(&[], &[]);
        for index in [2, 6, 9] {
            all[index].discarded = true;
        }
        assert_eq!(gone(&Retention::last(5, 1), &all, ROOMY), [1, 2, 3, 7]);
        assert_eq!(gone(&Retention::last(5, 4), &all, ROOMY), [1, 2, 3]);
    }

    #[test]
    fn nothing_goes_below_the_floor() {
        assert_eq!(gone(&Retention::last(1, 4), &all(&[], &[]), ROOMY), [1, 2, 3, 4, 5, 6]);
        assert_eq!(gone(&Retention::last(1, 4), &all(&[2], &[]), SHORT), [1, 2, 3, 4, 5, 6]);
        assert_eq!(gone(&Retention::last(20, 4), &all(&[2], &[1]), SHORT), [2, 3, 4, 5, 6]);
        assert_eq!(gone(&Retention::last(0, 0), &all(&[], &[]), SHORT).len(), 9);
    }

    #[test]
    fn what_is_asked_for_becomes_one_unless_something_of_it_stays() {
        let merged = |floor: u32, all: &[Kept], from: u64, to: u64| {
            let retention = Retention::everything(floor);
            let gone = retention.merged(all, CheckpointId(from), CheckpointId(to));
            gone.map(|gone| gone.into_iter().map(|c| c.0).collect::<Vec<_>>())
        };
        let why = |floor, all: &[Kept], from, to| merged(floor, all, from, to).unwrap_err();
        let plain = all(&[], &[]);
        assert_eq!(merged(1, &plain, 3, 6), Ok(vec![3, 4, 5]));
        assert_eq!(merged(0, &plain, 1, 10), Ok((1..10).collect()));
        assert_eq!(merged(4, &plain, 1, 7), Ok((1..7).collect()));
        assert!(why(4, &plain, 1, 8).contains("checkpoint 7 is one of the last 4"));
        assert!(why(0, &plain, 6, 3).contains("older one first") && why(0, &plain, 3, 3).contains("older"));
        assert!(why(0, &plain, 3, 11).contains("checkpoint 11 is not kept"));
        // The one that stays may have a tag, and be read.
        assert_eq!(merged(1, &all(&[6], &[6]), 3, 6), Ok(vec![3, 4, 5]));
        assert!(why(1, &all(&[3], &[]), 3, 6).contains("checkpoint 3 has a tag"));
        assert!(why(1, &all(&[], &[5]), 3, 6).contains("checkpoint 5 is mounted"));
    }

    #[test]
    fn too_much_goes_from_the_oldest_on_and_the_tagged_last() {
        let retention = Retention { space_percent: 50, ..Retention::last(10, 3) };
        let disk = |disk_bytes| Space { short: false, disk_bytes: Some(disk_bytes) };
        assert_eq!(gone(&retention, &all(&[], &[]), disk(200)), [0; 0]);
        assert_eq!(gone(&retention, &all(&[1], &[3]), disk(159)), [2, 4, 5]);
        assert_eq!(gone(&retention, &all(&[1], &[]), disk(0)), [1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn beyond_their_number_the_oldest_go_and_the_tagged_last() {
        let one = all(&[], &[])[0];
        let many: Vec<Kept> = (1..=KEPT_MAX as u64 + 10)
            .map(|n| Kept { checkpoint: CheckpointId(n), tagged: n % 2 == 0, ..one })
            .collect();
        let retention = Retention::last(u32::MAX, 1);
        let odd: Vec<u64> = (0..10).map(|n| 2 * n + 1).collect();
        assert_eq!(gone(&retention, &many, ROOMY), odd);
        let tagged: Vec<Kept> = many.iter().map(|one| Kept { tagged: true, ..*one }).collect();
        assert_eq!(gone(&retention, &tagged, ROOMY), (1..=10).collect::<Vec<_>>());
    }

    #[test]
    fn by_default_the_days_become_thin() {
        let retention = Retention { floor: 1, ..Retention::default() };
        let day = 86_400;
        // One every ten seconds for three days, and before that one an hour for 40 days.
        let times = (0..40 * 24).map(|hour| hour * 3600).chain((0..3 * day / 10).map(|n| 40 * day + n * 10));
        let all: Vec<Kept> = (1..)
            .zip(times)
            .map(|(n, second)| Kept {
                checkpoint: CheckpointId(n),
                wall_ns: second * SECOND,
                ..all(&[], &[])[0]
            })
            .collect();
        let gone = retention.gone(&all, i64::MAX, ROOMY);
        let left: Vec<_> = all.iter().filter(|one| !gone.contains(&one.checkpoint)).collect();
        let newest = all[all.len() - 1].wall_ns;
        let aged = |from: i64, to: i64| {
            left.iter().filter(|o| (from..to).contains(&((newest - o.wall_ns) / SECOND))).count()
        };
        assert_eq!(aged(0, 3600), 360);
        assert!((1379..=1381).contains(&aged(3600, day)), "{}", aged(3600, day));
        assert!((28..=30).contains(&aged(day, 30 * day)), "{}", aged(day, 30 * day));
        assert_eq!(aged(30 * day, i64::MAX), 0);
    }

    /// Back to 1970, or far into the future: what was taken before is not older for that.
    #[test]
    fn a_wrong_clock_makes_nothing_go() {
        let retention = Retention { floor: 1, ..Retention::default() };
        let mut all = all(&[], &[]);
        let now = 400 * 86_400 * SECOND;
        all.iter_mut().for_each(|one| one.wall_ns += now - 100 * SECOND);
        for wrong in [0, now * 50] {
            all[9].wall_ns = wrong;
            assert_eq!(retention.gone(&all, now, ROOMY), BTreeSet::new(), "{wrong}");
        }
    }

    fn some() -> impl Strategy<Value = Vec<Kept>> {
        let one = (0..200_000i64, 0..8u8, 0..100u64);
        prop::collection::vec(one, 0..60).prop_map(|mut all| {
            all.sort_by_key(|(second, ..)| *second);
            (1..)
                .zip(all)
                .map(|(n, (second, flags, bytes))| Kept {
                    checkpoint: CheckpointId(n),
                    wall_ns: second * SECOND,
                    tagged: flags == 1,
                    discarded: flags == 2,
                    held: flags == 3,
                    bytes,
                })
                .collect()
        })
    }

    proptest! {
        /// Whatever there is: floor, held and newest stay; in a roomy store also what is tagged and young. What
        /// stays is the same when it is asked again, and is not thinned further.
        #[test]
        fn what_must_stay_stays(
            all in some(), floor in 0..12u32, last in 0..5u32, short in any::<bool>(), disk in 0..4000u64, now in 0..300_000i64,
        ) {
            let retention = Retention { floor, last, ..Retention::default() };
            for space in [Space { short, disk_bytes: Some(disk) }, ROOMY] {
                let gone = retention.gone(&all, now * SECOND, space);
                let stays = |one: &Kept| !gone.contains(&one.checkpoint);
                let below = all.len().saturating_sub(floor.max(1) as usize);
                prop_assert!(all.iter().skip(below).all(stays));
                prop_assert!(all.iter().filter(|one| one.held).all(stays));
                let left: Vec<Kept> = all.iter().copied().filter(stays).collect();
                if space == ROOMY {
                    let newest = all.iter().map(|o| o.wall_ns).max().unwrap_or(0).min(now * SECOND);
                    let young = |one: &Kept| newest - one.wall_ns < 3600 * SECOND && !one.discarded;
                    prop_assert!(all.iter().filter(|o| o.tagged || young(o)).all(stays));
                    prop_assert_eq!(retention.gone(&left, now * SECOND, space), BTreeSet::new());
                } else {
                    let bytes: u64 = left.iter().map(|one| one.bytes).sum();
                    let limit = disk * u64::from(SPACE_PERCENT) / 100;
                    let could = left.iter().take(left.len().saturating_sub(floor.max(1) as usize)).any(|o| !o.held);
                    prop_assert!(bytes <= limit || !could);
                }
            }
        }
    }
}
