//! What somebody has to be told of: a command of the user is run when such a condition begins, and when it ends.
//!
//! Which ones there are, and when they count as begun and ended, is pure ([`Alerts`]); the session looks once a
//! second and starts the commands, one after the other.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use bfs_common::wire::StoreState;
use serde::{Deserialize, Serialize};

use super::work::{Work, wall_ns};
use crate::primary::control::Standing;
use crate::primary::process::{Hook, Inherited};

/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A condition that comes and goes is told at most once in this time.
const REPEAT_MIN: Duration = Duration::from_secs(300);
/// A connection that is made again within this time was not away.
const AWAY_AFTER_NS: i64 = 5_000_000_000;
/// How long the command may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// Commands that wait for the one that runs.
const WAITING_MAX: usize = 32;

/// Who is told, and from when on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AlertOptions {
    /// A command line of the shell.
    pub command: Option<String>,
    /// The backup may be so far behind.
    pub unconfirmed_after: Duration,
}

impl Default for AlertOptions {
    fn default() -> Self {
        Self { command: None, unconfirmed_after: Duration::from_secs(60) }
    }
}

/// What can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Condition {
    /// Nothing more is captured.
    Detached,
    /// There is no connection to the backup.
    Away,
    /// The backup was promoted: another host is the primary.
    Fenced,
    /// The last comparison found differences, the replayer refuses the stream, or this host has made something since another
    /// one is the primary.
    Diverged,
    /// There is no room on the backup.
    Full,
    /// Nothing was confirmed for long, though there was something.
    Unconfirmed,
}

impl Condition {
    fn name(self) -> &'static str {
        match self {
            Self::Detached => "detached",
            Self::Away => "away",
            Self::Fenced => "fenced",
            Self::Diverged => "diverged",
            Self::Full => "full",
            Self::Unconfirmed => "unconfirmed",
        }
    }
}

/// Something to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Alert {
    condition: Condition,
    begins: bool,
    message: String,
}

/// What was told.
#[derive(Debug, Default)]
struct Alerts {
    /// Conditions that were told to have begun and not to have ended, and when each was told to have begun last.
    told: BTreeMap<Condition, (bool, Instant)>,
}

impl Alerts {
    /// What there is to tell, given what is wrong now.
    fn look(&mut self, wrong: &[(Condition, String)], now: Instant) -> Vec<Alert> {
        let mut alerts = Vec::new();
        for (condition, (stands, _)) in &mut self.told {
            if *stands && !wrong.iter().any(|w| w.0 == *condition) {
                *stands = false;
                alerts.push(Alert { condition: *condition, begins: false, message: "it is over".into() });
            }
        }
        for (condition, message) in wrong {
            let known = self.told.get(condition);
            if known.is_none_or(|(stands, since)| !stands && now.duration_since(*since) >= REPEAT_MIN) {
                self.told.insert(*condition, (true, now));
                alerts.push(Alert { condition: *condition, begins: true, message: message.clone() });
            }
        }
        alerts
    }
}

/// The alerts of a session.
#[derive(Default)]
pub(super) struct Teller {
    inherited: Option<Inherited>,
    alerts: Alerts,
    looked: Option<Instant>,
    waiting: VecDeque<Alert>,
    running: Option<Hook>,
}

impl Work {
    /// From now on somebody is told, if the user asked for that.
    pub(super) fn start_alerts(&mut self, inherited: &Inherited) {
        self.teller.inherited = Some(inherited.clone());
    }

    /// Looks whether there is something to tell.
    pub(super) fn tend_alerts(&mut self) {
        let now = Instant::now();
        if self.teller.looked.is_some_and(|looked| now.duration_since(looked) < LOOK_EVERY) {
            return;
        }
        let Some(command) = self.options.alerts.command.clone() else { return };
        let Some(inherited) = self.teller.inherited.clone() else { return };
        self.teller.looked = Some(now);
        let wrong = self.what_is_wrong();
        let alerts = self.teller.alerts.look(&wrong, now);
        self.teller.waiting.extend(alerts);
        self.teller.waiting.truncate(WAITING_MAX);
        if let Some(ended) = self.teller.running.as_ref().and_then(Hook::ended) {
            self.teller.running = None;
            if let Err(why) = ended {
                self.last_error = Some(format!("the command of --alert: {why}"));
            }
        }
        if self.teller.running.is_none()
            && let Some(alert) = self.teller.waiting.pop_front()
        {
            let variables = [
                ("BFS_GROUP", self.options.group.clone()),
                ("BFS_ALERT", alert.condition.name().to_owned()),
                ("BFS_STATE", if alert.begins { "begins" } else { "ends" }.to_owned()),
                ("BFS_MESSAGE", alert.message),
            ];
            self.teller.running = Some(Hook::start(&command, &variables, COMMAND_LIMIT, &inherited));
        }
    }

    fn what_is_wrong(&mut self) -> Vec<(Condition, String)> {
        let progress = self.link.shipper.progress();
        let mut wrong = Vec::new();
        if let Some(why) = &self.detached {
            wrong.push((Condition::Detached, why.clone()));
        }
        let stands = match self.watch.standing {
            Standing::Attached | Standing::Lagging => None,
            Standing::Detached => {
                (self.watch.lasts_ns(wall_ns()) >= AWAY_AFTER_NS).then_some(Condition::Away)
            }
            Standing::Fenced => Some(Condition::Fenced),
            Standing::Diverged => Some(Condition::Diverged),
        };
        if let Some(condition) = stands {
            wrong.push((condition, self.watch.why.clone().unwrap_or_default()));
        }
        if stands != Some(Condition::Diverged)
            && let Some(found) = self.differences()
        {
            wrong.push((Condition::Diverged, format!("the last verify found {found} differences")));
        }
        if progress.store == StoreState::Full {
            wrong.push((Condition::Full, "the backup's disk is full: nothing new is confirmed".into()));
        }
        let lag = self.lag(&progress);
        if lag > self.options.alerts.unconfirmed_after {
            let why = self.why_not_confirmed(&progress).unwrap_or_default();
            let text = format!("nothing was confirmed for {} s: {why}", lag.as_secs());
            wrong.push((Condition::Unconfirmed, text));
        }
        wrong
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_told_when_something_begins_and_ends_and_not_in_between() {
        let mut alerts = Alerts::default();
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        let full = [(Condition::Full, "no room".to_owned())];
        let names = |alerts: Vec<Alert>| -> Vec<(&str, bool)> {
            alerts.iter().map(|a| (a.condition.name(), a.begins)).collect()
        };
        assert_eq!(names(alerts.look(&[], at(0))), []);
        assert_eq!(names(alerts.look(&full, at(1))), [("full", true)]);
        assert_eq!(names(alerts.look(&full, at(2))), []);
        let two = [full[0].clone(), (Condition::Detached, "x".into())];
        assert_eq!(names(alerts.look(&two, at(3))), [("detached", true)]);
        assert_eq!(names(alerts.look(&two[1..], at(4))), [("full", false)]);
        // It comes and goes: that is told once in five minutes, and its end only where its begin was.
        assert_eq!(names(alerts.look(&full, at(5))), [("detached", false)]);
        assert_eq!(names(alerts.look(&[], at(6))), []);
        assert_eq!(names(alerts.look(&full, at(300))), []);
        assert_eq!(names(alerts.look(&full, at(301))), [("full", true)]);
        assert_eq!(names(alerts.look(&[], at(302))), [("full", false)]);
    }
}
