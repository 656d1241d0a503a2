//! Telling somebody: a command of the user is run when a condition begins, and when it ends.
//!
//! Which conditions there are each role says itself ([`Condition`]); when one counts as begun and ended is pure
//! ([`Alerts`]). A [`Teller`] looks once a second and runs the commands, one after the other.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crate::primary::process::{Hook, Inherited};

/// Between two looks.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A condition that comes and goes is told at most once in this time.
const REPEAT_MIN: Duration = Duration::from_secs(300);
/// How long the command may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// Commands that wait for the one that runs.
const WAITING_MAX: usize = 32;

/// What can be wrong.
pub trait Condition: Copy + Ord {
    /// Its name, as the command gets it.
    fn name(self) -> &'static str;
}

/// Something to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Alert<C> {
    condition: C,
    begins: bool,
    message: String,
}

/// What was told.
#[derive(Debug)]
struct Alerts<C> {
    /// Conditions that were told to have begun and not to have ended, and when each was told to have begun last.
    told: BTreeMap<C, (bool, Instant)>,
}

impl<C: Condition> Alerts<C> {
    /// What there is to tell, given what is wrong now.
    fn look(&mut self, wrong: &[(C, String)], now: Instant) -> Vec<Alert<C>> {
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

/// The alerts of a group.
#[derive(Debug)]
pub struct Teller<C> {
    alerts: Alerts<C>,
    looked: Option<Instant>,
    waiting: VecDeque<Alert<C>>,
    running: Option<Hook>,
}

impl<C> Default for Teller<C> {
    fn default() -> Self {
        let alerts = Alerts { told: BTreeMap::new() };
        Self { alerts, looked: None, waiting: VecDeque::new(), running: None }
    }
}

impl<C: Condition> Teller<C> {
    /// Whether it is time to look again.
    #[must_use]
    pub fn is_due(&self, now: Instant) -> bool {
        self.looked.is_none_or(|looked| now.duration_since(looked) >= LOOK_EVERY)
    }

    /// Tells what is to be told, given what is wrong now, by the environment of the command: `BFS_GROUP`, `BFS_ALERT`,
    /// `BFS_STATE` (`begins` or `ends`), `BFS_MESSAGE`. `inherited`: signals that this process took over and the command
    /// does not. Gives why a command before went wrong.
    pub fn tell(
        &mut self,
        command: &str,
        group: &str,
        wrong: &[(C, String)],
        inherited: Option<&Inherited>,
    ) -> Option<String> {
        let now = Instant::now();
        self.looked = Some(now);
        self.waiting.extend(self.alerts.look(wrong, now));
        self.waiting.truncate(WAITING_MAX);
        let mut trouble = None;
        if let Some(ended) = self.running.as_ref().and_then(Hook::ended) {
            self.running = None;
            trouble = ended.err().map(|why| format!("the command of --alert: {why}"));
        }
        if self.running.is_none()
            && let Some(alert) = self.waiting.pop_front()
        {
            let variables = [
                ("BFS_GROUP", group.to_owned()),
                ("BFS_ALERT", alert.condition.name().to_owned()),
                ("BFS_STATE", if alert.begins { "begins" } else { "ends" }.to_owned()),
                ("BFS_MESSAGE", alert.message),
            ];
            self.running = Some(Hook::start(command, &variables, COMMAND_LIMIT, inherited));
        }
        trouble
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
    enum Wrong {
        Detached,
        Full,
    }

    impl Condition for Wrong {
        fn name(self) -> &'static str {
            match self {
                Self::Detached => "detached",
                Self::Full => "full",
            }
        }
    }

    #[test]
    fn it_is_told_when_something_begins_and_ends_and_not_in_between() {
        let mut alerts = Alerts { told: BTreeMap::new() };
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        let full = [(Wrong::Full, "no room".to_owned())];
        let names = |alerts: Vec<Alert<Wrong>>| -> Vec<(&str, bool)> {
            alerts.iter().map(|a| (a.condition.name(), a.begins)).collect()
        };
        assert_eq!(names(alerts.look(&[], at(0))), []);
        assert_eq!(names(alerts.look(&full, at(1))), [("full", true)]);
        assert_eq!(names(alerts.look(&full, at(2))), []);
        let two = [full[0].clone(), (Wrong::Detached, "x".into())];
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
