//! When the schedule asks for a checkpoint, and whether there is anything that it would hold.

use std::time::{Duration, Instant};

use crate::primary::engine::host::Host;
use crate::primary::engine::{Stats, Stop};

use super::commands::Ask;
use super::work::Work;

/// How often writes that have no record yet are looked at, where their number or their bytes are a trigger.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What the triggers count from.
pub(super) struct Since {
    /// When a checkpoint was last taken, or tried.
    pub tried: Instant,
    ops: u64,
    bytes: u64,
    /// Writes that went on, as the probes counted them when they were last looked at.
    went_on: u64,
    looked: Instant,
}

impl Since {
    pub(super) fn new(now: Instant) -> Self {
        Self { tried: now, ops: 0, bytes: 0, went_on: 0, looked: now }
    }

    /// A checkpoint was taken.
    pub(super) fn checkpoint(&mut self, stats: &Stats) {
        self.ops = stats.ops;
        self.bytes = stats.written_bytes;
    }
}

impl Work {
    /// What makes a checkpoint due now.
    pub(super) fn due(&self) -> Option<&'static str> {
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
        if trigger == "every" && self.is_idle() {
            self.take_runs();
        }
        // An idle group needs no new checkpoint.
        let idle = trigger == "every" && self.is_idle();
        self.since.tried = Instant::now();
        if !idle {
            self.ask(Ask { tag: String::new(), trigger, stop: Stop::IfNeeded, client: None });
        }
    }

    fn is_idle(&mut self) -> bool {
        self.tally.taken > 0
            && self.engine.stats.ops == self.since.ops
            && self.engine.suspects() == 0
            && !self.engine.silent()
            && !self.has_requests()
    }

    /// Where a number of operations or of bytes is a trigger, writes that have no record yet count as well.
    pub(super) fn look_at_runs(&mut self) {
        let counts = self.options.schedule.ops.is_some() || self.options.schedule.bytes.is_some();
        if counts && self.since.looked.elapsed() >= LOOK_EVERY {
            self.take_runs();
        }
    }

    /// Takes in writes that have no record yet, if there may be any.
    fn take_runs(&mut self) {
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
