//! Times of the calendar: the cron expression of `--checkpoint`, and when it is due. Pure: the clock comes from outside.
//!
//! Times are those of the host's time zone, as cron(8) has it. Where the zone leaves an hour out, a time of day in it is
//! due as soon as the hour is over; where it has an hour twice, a time of day is due once and what is repeated
//! (`*/5 * * * *`) goes on.

use std::fmt;
use std::str::FromStr;

use croner::Cron as Pattern;
use croner::parser::{CronParser, Seconds, Year};
use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};

/// A clock that goes back by less than this is corrected: what was due is not due again. By more it was set: what is
/// due next counts from there (as in cron(8)).
const SET_S: i64 = 3 * 3600;

/// A cron expression of five fields.
#[derive(Clone, Debug)]
pub struct Cron {
    text: String,
    pattern: Pattern,
}

impl PartialEq for Cron {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Cron {}

impl fmt::Display for Cron {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Cron {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let pattern = parser.parse(text).map_err(|e| e.to_string())?;
        let cron = Self { text: text.split_whitespace().collect::<Vec<_>>().join(" "), pattern };
        // A 30th of February is asked for by nobody.
        match cron.after(&Timestamp::UNIX_EPOCH.to_zoned(TimeZone::UTC)) {
            Some(_) => Ok(cron),
            None => Err("there is no such time".into()),
        }
    }
}

impl Cron {
    fn after(&self, time: &Zoned) -> Option<Zoned> {
        self.pattern.find_next_occurrence(time, false).ok()
    }
}

/// When a checkpoint is due by the calendar.
#[derive(Debug)]
pub struct Calendar {
    cron: Cron,
    zone: TimeZone,
    /// Seconds since 1970.
    next_s: Option<i64>,
    /// The latest that the clock has shown.
    seen_s: i64,
}

impl Calendar {
    /// From now on. What was missed before is made good by the first checkpoint of a session.
    #[must_use]
    pub fn new(cron: Cron, zone: TimeZone, now_s: i64) -> Self {
        let mut calendar = Self { cron, zone, next_s: None, seen_s: now_s };
        calendar.begin(now_s);
        calendar
    }

    fn begin(&mut self, now_s: i64) {
        let now = Timestamp::from_second(now_s).ok().map(|now| now.to_zoned(self.zone.clone()));
        let next = now.and_then(|now| self.cron.after(&now));
        self.next_s = next.map(|next| next.timestamp().as_second());
        self.seen_s = now_s;
    }

    /// Whether it is due; it is until a checkpoint was [taken](Self::taken). Of several times that were missed, while
    /// the host slept or its clock was wrong, there is one.
    pub fn is_due(&mut self, now_s: i64) -> bool {
        if now_s.saturating_add(SET_S) < self.seen_s {
            self.begin(now_s);
        }
        self.seen_s = self.seen_s.max(now_s);
        self.next_s.is_some_and(|next| next <= now_s)
    }

    /// A checkpoint was taken then.
    pub fn taken(&mut self, now_s: i64) {
        if self.is_due(now_s) {
            self.begin(now_s);
        }
    }

    /// When it is due next, for people.
    #[must_use]
    pub fn next(&self) -> Option<String> {
        let next = Timestamp::from_second(self.next_s?).ok()?;
        Some(next.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn second(text: &str) -> i64 {
        text.parse::<Timestamp>().unwrap().as_second()
    }

    fn calendar(cron: &str, zone: &str, now: &str) -> Calendar {
        let zone = TimeZone::posix(zone).unwrap();
        Calendar::new(cron.parse().unwrap(), zone, second(now))
    }

    /// The times that are due between two.
    fn due(cron: &str, zone: &str, from: &str, to: &str) -> Vec<String> {
        let mut calendar = calendar(cron, zone, from);
        let mut all = Vec::new();
        for now in second(from)..second(to) {
            if calendar.is_due(now) {
                all.push(Timestamp::from_second(now).unwrap().to_string());
                calendar.taken(now);
            }
        }
        all
    }

    #[test]
    fn a_time_of_day_is_that_of_the_zone() {
        let days = due("30 3 * * 1-5", "IST-5:30", "2026-11-26T00:00:00Z", "2026-12-01T00:00:00Z");
        // Thursday to Monday, at 22:00 of the day before in UTC.
        assert_eq!(days, ["2026-11-26T22:00:00Z", "2026-11-29T22:00:00Z", "2026-11-30T22:00:00Z"]);
        let quarters = due("0,15,30-45/15 * * * *", "UTC0", "2026-01-01T00:00:00Z", "2026-01-01T01:00:01Z");
        assert_eq!(quarters.len(), 4, "{quarters:?}");
    }

    const BERLIN: &str = "CET-1CEST,M3.5.0,M10.5.0/3";

    #[test]
    fn an_hour_that_is_left_out_and_one_that_comes_twice() {
        // 02:00 to 03:00 is not there on 2026-03-29.
        let spring = due("30 2 * * *", BERLIN, "2026-03-28T12:00:00Z", "2026-03-30T12:00:00Z");
        assert_eq!(spring.len(), 2, "once a day: {spring:?}");
        // 02:00 to 03:00 is there twice on 2026-10-25.
        let autumn = due("30 2 * * *", BERLIN, "2026-10-24T12:00:00Z", "2026-10-26T12:00:00Z");
        assert_eq!(autumn.len(), 2, "once a day: {autumn:?}");
        let minutes = due("*/20 * * * *", BERLIN, "2026-10-25T00:00:00Z", "2026-10-25T03:00:00Z");
        assert_eq!(minutes.len(), 8, "every 20 minutes, all the time: {minutes:?}");
    }

    #[test]
    fn a_clock_that_jumps_makes_one_due_and_none_twice() {
        let mut calendar = calendar("0 * * * *", "UTC0", "2026-01-01T00:30:00Z");
        // Forward over five hours, as after a sleep.
        let now = second("2026-01-01T05:40:00Z");
        assert!(calendar.is_due(now) && calendar.is_due(now + 1), "until it was taken");
        calendar.taken(now + 2);
        assert!(!calendar.is_due(now + 3));
        assert_eq!(calendar.next().unwrap(), "2026-01-01T06:00:00Z");
        // Back by a little: what was due is not due again.
        assert!(!calendar.is_due(second("2026-01-01T04:59:00Z")));
        assert!(!calendar.is_due(second("2026-01-01T05:00:30Z")));
        assert!(calendar.is_due(second("2026-01-01T06:00:00Z")));
        calendar.taken(second("2026-01-01T06:00:00Z"));
        // Set back by a year: it goes on from there.
        assert!(!calendar.is_due(second("2025-01-01T00:30:00Z")));
        assert!(calendar.is_due(second("2025-01-01T01:00:00Z")));
    }

    #[test]
    fn a_checkpoint_taken_before_is_none_of_then() {
        let mut calendar = calendar("0 3 * * *", "UTC0", "2026-01-01T00:00:00Z");
        calendar.taken(second("2026-01-01T02:59:59Z"));
        assert!(calendar.is_due(second("2026-01-01T03:00:00Z")));
        calendar.taken(second("2026-01-01T03:00:07Z"));
        assert!(!calendar.is_due(second("2026-01-01T03:00:08Z")));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "1", "* * * *", "61 * * * *", "* * * * * *", "0 0 30 2 *", "x * * * *", "0 0 * * 8"]
        {
            assert!(text.parse::<Cron>().is_err(), "{text:?}");
        }
        assert_eq!("0  3 * *   *".parse::<Cron>().unwrap().to_string(), "0 3 * * *");
        assert!("@daily".parse::<Cron>().is_ok());
    }
}
