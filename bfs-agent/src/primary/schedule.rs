//! When checkpoints are taken: the WHEN of `--checkpoint`, a comma list. Pure.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::cron::Cron;

/// When checkpoints are taken; whichever comes first. With none of them only on demand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    /// After this time.
    pub every: Option<Duration>,
    /// After this many bytes of captured data.
    pub bytes: Option<u64>,
    /// After this many operations.
    pub ops: Option<u64>,
    /// At times of the calendar.
    pub cron: Option<Cron>,
}

/// Why a text is no schedule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// Not one of the words.
    #[error(
        "{0:?} is not one of every=TIME, bytes=SIZE, ops=NUMBER, cron=EXPRESSION, manual (for example every=1s,bytes=64M)"
    )]
    Word(String),
    /// The same word twice.
    #[error("{0:?} is given twice")]
    Twice(String),
    /// `manual` beside others.
    #[error("manual stands alone: with it, checkpoints are taken on demand only")]
    Manual,
    /// Not a time.
    #[error("{0:?} is not a time: write 500ms, 1s, 5m or 1h")]
    Time(String),
    /// Not a size.
    #[error("{0:?} is not a size: write bytes, or 64K, 64M, 1G")]
    Size(String),
    /// Not a cron expression.
    #[error(
        "{text:?} is not a cron expression: {why}; write minute, hour, day of the month, month, day of the week, \
         like cron=0 3 * * *"
    )]
    Cron {
        /// What was written.
        text: String,
        /// What is wrong.
        why: String,
    },
    /// Not a number.
    #[error("{0:?} is not a number above 0")]
    Number(String),
}

impl FromStr for Schedule {
    type Err = ScheduleError;

    fn from_str(text: &str) -> Result<Self, ScheduleError> {
        let mut schedule = Self::default();
        let mut manual = false;
        for word in words(text) {
            let word = word.trim();
            let before = schedule.clone();
            match word.split_once('=') {
                None if word == "manual" => manual = true,
                Some(("every", time)) => schedule.every = Some(parse_time(time)?),
                Some(("bytes", size)) => schedule.bytes = Some(parse_size(size)?),
                Some(("ops", number)) => {
                    let ops = number.parse().ok().filter(|n| *n > 0);
                    schedule.ops = Some(ops.ok_or_else(|| ScheduleError::Number(number.into()))?);
                }
                Some(("cron", text)) => {
                    let bad = |why| ScheduleError::Cron { text: text.into(), why };
                    schedule.cron = Some(text.parse().map_err(bad)?);
                }
                _ => return Err(ScheduleError::Word(word.into())),
            }
            let key = word.split('=').next().unwrap_or(word);
            let was = match key {
                "every" => before.every.is_some(),
                "bytes" => before.bytes.is_some(),
                "ops" => before.ops.is_some(),
                "cron" => before.cron.is_some(),
                _ => false,
            };
            if was {
                return Err(ScheduleError::Twice(key.into()));
            }
        }
        if manual && schedule != Self::default() {
            return Err(ScheduleError::Manual);
        }
        Ok(schedule)
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Vec::new();
        if let Some(every) = self.every {
            words.push(format!("every={}ms", every.as_millis()));
        }
        if let Some(bytes) = self.bytes {
            words.push(format!("bytes={bytes}"));
        }
        if let Some(ops) = self.ops {
            words.push(format!("ops={ops}"));
        }
        if let Some(cron) = &self.cron {
            words.push(format!("cron={cron}"));
        }
        if words.is_empty() { f.write_str("manual") } else { f.write_str(&words.join(",")) }
    }
}

/// The words of a list. A cron expression has commas of its own: what follows one belongs to it until the next word.
fn words(text: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    for piece in text.split(',') {
        match words.last_mut() {
            Some(last)
                if last.trim_start().starts_with("cron=")
                    && !piece.contains('=')
                    && piece.trim() != "manual" =>
            {
                last.push(',');
                last.push_str(piece);
            }
            _ => words.push(piece.to_owned()),
        }
    }
    words
}

/// A time with its unit: `10ms`, `1s`, `5m`, `1h`; above zero, at most a year.
///
/// # Errors
/// [`ScheduleError::Time`].
pub fn parse_time(text: &str) -> Result<Duration, ScheduleError> {
    let bad = || ScheduleError::Time(text.into());
    let unit_at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
    let (number, unit) = text.split_at(unit_at);
    let ms_per_unit: u64 = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 24 * 3_600_000,
        _ => return Err(bad()),
    };
    let ms = number.parse::<u64>().ok().and_then(|n| n.checked_mul(ms_per_unit)).ok_or_else(bad)?;
    if ms == 0 || ms > 365 * 24 * 3_600_000 {
        return Err(bad());
    }
    Ok(Duration::from_millis(ms))
}

/// A size in bytes, with `K`, `M` or `G` for powers of 1024; above zero.
///
/// # Errors
/// [`ScheduleError::Size`].
pub fn parse_size(text: &str) -> Result<u64, ScheduleError> {
    let bad = || ScheduleError::Size(text.into());
    let (number, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number = number.parse::<u64>().map_err(|_| bad())?;
    number.checked_mul(1 << shift).filter(|n| *n > 0).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_are_understood() {
        let schedule: Schedule = "every=1s, bytes=64M,ops=10".parse().unwrap();
        assert_eq!(schedule.every, Some(Duration::from_secs(1)));
        assert_eq!((schedule.bytes, schedule.ops), (Some(64 << 20), Some(10)));
        assert_eq!(schedule.to_string().parse::<Schedule>(), Ok(schedule));
        assert_eq!("manual".parse::<Schedule>(), Ok(Schedule::default()));
        let schedule: Schedule = "ops=5, cron=0,30 3-5 * * 1,2 , every=1h".parse().unwrap();
        assert_eq!(schedule.to_string(), "every=3600000ms,ops=5,cron=0,30 3-5 * * 1,2");
        assert_eq!(schedule.to_string().parse::<Schedule>(), Ok(schedule));
        assert_eq!(Schedule::default().to_string(), "manual");
        assert_eq!(parse_time("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_time("2m"), Ok(Duration::from_secs(120)));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "every",
            "every=",
            "every=1",
            "every=0s",
            "every=-1s",
            "every=1s,every=2s",
            "bytes=M",
            "bytes=0",
            "bytes=99999999999999999999",
            "bytes=99999999999G",
            "ops=0",
            "ops=x",
            "manual,ops=1",
            "cron=0 3 * * *,manual",
            "cron=",
            "cron=0 3 * *",
            "cron=0 3 * * *,cron=0 4 * * *",
            "sometimes",
            "every=é",
            "every=999999999999h",
        ] {
            assert!(text.parse::<Schedule>().is_err(), "{text:?}");
        }
    }
}
