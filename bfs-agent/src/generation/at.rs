//! Which generation is meant: a number, a tag, or a time. Pure.

use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use bfs_common::record::CheckpointId;
use bfs_common::wire::GenerationLine;

/// A generation, as people name it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum At {
    /// By number.
    Number(CheckpointId),
    /// The last one with this tag.
    Tag(String),
    /// The last one whose label is not later: nanoseconds since 1970.
    Time(i64),
}

impl At {
    /// The one that is meant, of those that are there (the oldest first).
    ///
    /// # Errors
    /// That there is none, in words.
    pub fn find(&self, all: &[GenerationLine]) -> Result<CheckpointId, String> {
        let found = match self {
            Self::Number(number) => all.iter().find(|g| g.checkpoint == *number),
            Self::Tag(tag) => all.iter().rev().find(|g| g.label.tag == *tag),
            Self::Time(time) => all.iter().rev().find(|g| g.label.wall_ns <= *time),
        };
        found.map(|g| g.checkpoint).ok_or_else(|| match (all.first(), all.last()) {
            (Some(first), Some(last)) => format!(
                "no checkpoint that is kept fits: the oldest is {} ({}), the newest {} ({})",
                first.checkpoint,
                time_text(first.label.wall_ns),
                last.checkpoint,
                time_text(last.label.wall_ns)
            ),
            _ => "no checkpoint is kept yet".into(),
        })
    }
}

impl FromStr for At {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(number) = text.parse() {
            return Ok(Self::Number(CheckpointId(number)));
        }
        if let Some(tag) = text.strip_prefix("tag:") {
            return Ok(Self::Tag(tag.into()));
        }
        parse_time(text).map(Self::Time).ok_or_else(|| {
            "write a number, tag:NAME, or a time (UTC) like 2026-11-21T14:05 or 2026-11-21T14:05:30".into()
        })
    }
}

/// `YYYY-MM-DDTHH:MM[:SS][Z]`, as nanoseconds since 1970.
fn parse_time(text: &str) -> Option<i64> {
    let (date, time) = text.split_once(['T', ' '])?;
    let numbers = |text: &str, by: char| -> Option<Vec<i64>> {
        text.split(by)
            .map(|n| n.bytes().all(|b| b.is_ascii_digit()).then(|| n.parse().ok()).flatten())
            .collect()
    };
    let (date, time) = (numbers(date, '-')?, numbers(time.strip_suffix('Z').unwrap_or(time), ':')?);
    let [year, month, day] = date[..] else { return None };
    // A time without seconds means until the end of that minute.
    let (hour, minute, second) = match time[..] {
        [hour, minute] => (hour, minute, 59),
        [hour, minute, second] => (hour, minute, second),
        _ => return None,
    };
    let fits = (1970..=2200).contains(&year)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && (0..24).contains(&hour)
        && (0..60).contains(&minute)
        && (0..61).contains(&second);
    let seconds = days(year, month, day) * 86_400 + hour * 3600 + minute * 60 + second;
    fits.then_some(seconds * 1_000_000_000 + 999_999_999)
}

/// Days since 1970 of a date of the Gregorian calendar, counted in years that begin in March.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// The time by the clock on the wall, nanoseconds since 1970.
#[must_use]
pub fn wall_ns() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}

/// A time as people read it, UTC.
#[must_use]
pub fn time_text(wall_ns: i64) -> String {
    let seconds = wall_ns.div_euclid(1_000_000_000);
    let (day, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let shifted = day + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bfs_common::record::CheckpointLabel;

    #[test]
    fn times_are_read_as_they_are_shown() {
        for day in (0..60_000).step_by(17) {
            let ns = (day * 86_400 + 45_296) * 1_000_000_000;
            assert_eq!(time_text(ns).parse(), Ok(At::Time(ns + 999_999_999)), "{}", time_text(ns));
        }
        assert_eq!(time_text(1_795_269_845_000_000_000), "2026-11-21T14:04:05Z".to_owned());
        assert_eq!("2026-11-21 13:24".parse::<At>(), "2026-11-21T13:24:59Z".parse());
        assert_eq!("12".parse(), Ok(At::Number(CheckpointId(12))));
        assert_eq!("tag:x y".parse(), Ok(At::Tag("x y".into())));
        for text in ["", "x", "2026-11-21", "2026-13-21T13:24", "2026-1-1T24:00", "T", "+1-1-1T1:1", "-1"] {
            assert!(text.parse::<At>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_last_one_up_to_a_time() {
        let line = |n: u64, wall_ns, tag: &str| GenerationLine {
            checkpoint: CheckpointId(n),
            label: CheckpointLabel { wall_ns, tag: tag.into(), ..CheckpointLabel::default() },
            changed: 0,
            process: None,
            bytes: 0,
        };
        let all = [line(3, 10, "a"), line(4, 20, "a"), line(6, 30, "")];
        assert_eq!(At::Time(25).find(&all), Ok(CheckpointId(4)));
        assert_eq!(At::Tag("a".into()).find(&all), Ok(CheckpointId(4)));
        assert_eq!(At::Number(CheckpointId(6)).find(&all), Ok(CheckpointId(6)));
        assert!(At::Number(CheckpointId(5)).find(&all).is_err());
        assert!(At::Time(9).find(&all).is_err());
    }
}
