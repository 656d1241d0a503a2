//! What somebody has to be told of.

use std::time::{Duration, Instant};

use bfs_common::wire::StoreState;
use serde::{Deserialize, Serialize};

use super::work::Work;
use crate::alert::{self, Teller};
use crate::generation::wall_ns;
use crate::primary::control::Standing;
use crate::primary::further::Further;
use crate::primary::process::Inherited;

/// A connection that is made again within this time was not away.
const AWAY_AFTER_NS: i64 = 5_000_000_000;

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

impl alert::Condition for Condition {
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

/// The alerts of a session.
#[derive(Default)]
pub(super) struct Alerting {
    inherited: Option<Inherited>,
    teller: Teller<Condition>,
}

impl Work {
    /// From now on somebody is told, if the user asked for that.
    pub(super) fn start_alerts(&mut self, inherited: &Inherited) {
        self.alerting.inherited = Some(inherited.clone());
    }

    /// Looks whether there is something to tell.
    pub(super) fn tend_alerts(&mut self) {
        if !self.alerting.teller.is_due(Instant::now()) {
            return;
        }
        let Some(command) = self.options.alerts.command.clone() else { return };
        let Some(inherited) = self.alerting.inherited.clone() else { return };
        let wrong = self.what_is_wrong();
        let trouble = self.alerting.teller.tell(&command, &self.options.group, &wrong, Some(&inherited));
        if trouble.is_some() {
            self.last_error = trouble;
        }
    }

    fn what_is_wrong(&mut self) -> Vec<(Condition, String)> {
        let progress = self.link.progress();
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
        for (condition, why) in self.wrong_with_further() {
            match wrong.iter_mut().find(|(known, _)| *known == condition) {
                Some((_, whole)) => *whole = format!("{whole}; {why}"),
                None => wrong.push((condition, why)),
            }
        }
        wrong
    }

    /// The same of the further destinations, with their addresses.
    fn wrong_with_further(&self) -> Vec<(Condition, String)> {
        let now = wall_ns();
        let legs = self.link.further.iter().flat_map(Further::legs).filter(|leg| !leg.paused);
        legs.filter_map(|leg| {
            let condition = match leg.standing {
                Standing::Detached if now.saturating_sub(leg.since_ns) >= AWAY_AFTER_NS => Condition::Away,
                Standing::Diverged => Condition::Diverged,
                _ if leg.store == StoreState::Full => Condition::Full,
                _ => return None,
            };
            Some((condition, format!("{}: {}", leg.address, leg.why.unwrap_or_default())))
        })
        .collect()
    }
}
