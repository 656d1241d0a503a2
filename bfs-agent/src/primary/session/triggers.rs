//! When the schedule asks for a checkpoint, and whether there is anything that it would hold.

use std::time::{Duration, Instant};

use jiff::tz::TimeZone;

use super::commands::Ask;
use super::work::Work;
use crate::generation::wall_ns;
use crate::primary::cron::Calendar;
use crate::primary::engine::host::Host;
use crate::primary::engine::{Stop, Taken};
use crate::primary::schedule::Schedule;

/// How often writes that have no record yet are looked at, where their number or their bytes are a trigger.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What is due by the calendar and did not come about is tried again after this time.
const CALENDAR_RETRY: Duration = Duration::from_secs(1);

/// What the triggers count from.
pub(super) struct Since {
    /// When a checkpoint was last taken, or tried.
    pub tried: Instant,
    ops: u64,
    bytes: u64,
    /// Writes that went on, as the probes counted them when they were last looked at.
    went_on: u64,
    looked: Instant,
    /// What the calendar asks for.
    pub calendar: Option<Calendar>,
}

impl Since {
    pub(super) fn new(now: Instant, schedule: &Schedule) -> Self {
        let calendar = schedule.cron.clone().map(|cron| Calendar::new(cron, TimeZone::system(), wall_s()));
        Self { tried: now, ops: 0, bytes: 0, went_on: 0, looked: now, calendar }
    }

    /// A checkpoint was taken, and before it so many writes had gone on.
    pub(super) fn checkpoint(&mut self, taken: &Taken, went_on: u64) {
        self.calendar_is_served();
        self.ops = taken.ops;
        self.bytes = taken.written_bytes;
        self.went_on = went_on;
    }

    /// What was due by the calendar is not any more.
    fn calendar_is_served(&mut self) {
        if let Some(calendar) = &mut self.calendar {
            calendar.taken(wall_s());
        }
    }
}

/// Seconds since 1970, as the clock of the host shows them.
fn wall_s() -> i64 {
    wall_ns() / 1_000_000_000
}

impl Work {
    /// What makes a checkpoint due now.
    pub(super) fn due(&mut self) -> Option<&'static str> {
        // Another one waits for its hooks, or theirs for the processes to go on.
        if self.held.is_some() || self.hooks_at_work() || self.hooks.rest() {
            return None;
        }
        let schedule = &self.options.schedule;
        // The first copy has to come about, whatever the schedule.
        if self.tally.taken == 0 && self.since.tried.elapsed() >= Duration::from_millis(200) {
            return Some("start");
        }
        if schedule.every.is_some_and(|every| self.since.tried.elapsed() >= every) {
            return Some("every");
        }
        let rested = self.since.tried.elapsed() >= CALENDAR_RETRY;
        if rested && self.since.calendar.as_mut().is_some_and(|calendar| calendar.is_due(wall_s())) {
            return Some("cron");
        }
        let stats = &self.engine.stats;
        if schedule.bytes.is_some_and(|limit| stats.written_bytes >= self.since.bytes.saturating_add(limit)) {
            return Some("bytes");
        }
        (schedule.ops.is_some_and(|limit| stats.ops >= self.since.ops.saturating_add(limit))).then_some("ops")
    }

    pub(super) fn scheduled(&mut self, trigger: &'static str) {
        if self.engine.is_noting() {
            self.since.tried = Instant::now();
            return;
        }
        let by_time = matches!(trigger, "every" | "cron");
        if by_time && self.is_idle() {
            self.take_runs();
        }
        // An idle group needs no new checkpoint.
        let idle = by_time && self.is_idle();
        self.since.tried = Instant::now();
        if idle {
            self.since.calendar_is_served();
        } else {
            self.ask(Ask { tag: String::new(), trigger, stop: Stop::IfNeeded, client: None });
        }
    }

    fn is_idle(&self) -> bool {
        self.tally.taken > 0
            && self.engine.stats.ops == self.since.ops
            && self.engine.suspects() == 0
            && !self.engine.silent()
            && !self.has_requests()
    }

    /// Nothing changed since the last checkpoint, not even what has no record yet.
    pub(super) fn nothing_new(&self) -> bool {
        self.is_idle() && self.link.went_on() == self.since.went_on
    }

    /// Where a number of operations or of bytes is a trigger, writes that have no record yet count as well.
    pub(super) fn look_at_runs(&mut self) {
        let counts = self.options.schedule.ops.is_some() || self.options.schedule.bytes.is_some();
        if counts && self.since.looked.elapsed() >= LOOK_EVERY {
            self.take_runs();
        }
    }

    /// Takes in writes that have no record yet, if there may be any.
    pub(super) fn take_runs(&mut self) {
        self.since.looked = Instant::now();
        let went_on = self.link.went_on();
        if went_on == self.since.went_on {
            return;
        }
        self.since.went_on = went_on;
        let taken = self.engine.take_runs(&mut self.link);
        Host::join_writes(&mut self.link);
        if let Err(e) = taken {
            self.host_failed(&e);
        }
    }
}
