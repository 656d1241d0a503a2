//! What the backup's host has to be told of: what is wrong with a group, decided by its status. Pure.
//!
//! Should the primary's host be gone, nobody there tells anybody.

use std::time::Duration;

use bfs_common::wire::{AgentStanding, GroupStatus, StoreState};

use crate::alert;
use crate::generation::time_text;

/// What can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Condition {
    /// The agent is gone, and did not say that it ends.
    Away,
    /// There is no room for what comes.
    Full,
    /// What came cannot be applied, or written down.
    Stuck,
    /// Bytes of backup files are lost.
    Damaged,
}

impl alert::Condition for Condition {
    fn name(self) -> &'static str {
        match self {
            Self::Away => "away",
            Self::Full => "full",
            Self::Stuck => "stuck",
            Self::Damaged => "damaged",
        }
    }
}

/// What is wrong with a group now. An agent may be away for so long: what connects again was not away.
#[must_use]
pub fn what_is_wrong(group: &GroupStatus, away_after: Duration, now_ns: i64) -> Vec<(Condition, String)> {
    let mut wrong = Vec::new();
    if let AgentStanding::Lost { since_ns, why } = &group.agent
        && i128::from(now_ns) - i128::from(*since_ns) >= away_after.as_nanos() as i128
    {
        let since = time_text(*since_ns);
        let pending = match group.pending_records {
            0 => String::new(),
            n => format!("; {n} records behind checkpoint {} are of no checkpoint", group.confirmed),
        };
        wrong.push((Condition::Away, format!("there is no agent since {since}: {why}{pending}")));
    }
    let condition = match group.state {
        StoreState::Ready => return wrong,
        StoreState::Full | StoreState::Behind => Condition::Full,
        StoreState::Stuck | StoreState::LogFailed => Condition::Stuck,
        StoreState::Damaged => Condition::Damaged,
    };
    wrong.push((condition, group.trouble.clone().unwrap_or_else(|| group.state.name().into())));
    wrong
}

/// How the agent stands, in words.
#[must_use]
pub fn agent_text(agent: &AgentStanding) -> String {
    match agent {
        AgentStanding::Unseen => "no agent since the replayer was started".into(),
        AgentStanding::Attached { since_ns, heard_ms, round_trip_us } => {
            let heard = match heard_ms {
                0..3000 => String::new(),
                ms => format!(", silent for {} s", ms / 1000),
            };
            let trip = match round_trip_us {
                0 => String::new(),
                us => format!(", round trip {}.{:03} ms", us / 1000, us % 1000),
            };
            format!("an agent is connected since {}{trip}{heard}", time_text(*since_ns))
        }
        AgentStanding::Ended { since_ns } => format!("no agent: it ended at {}", time_text(*since_ns)),
        AgentStanding::Lost { since_ns, why } => {
            format!("NO AGENT since {}: {why}", time_text(*since_ns))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_said_goodbye_is_not_away() {
        let after = Duration::from_secs(5);
        let second = 1_000_000_000;
        let wrong = |agent: &AgentStanding, state, now_ns| {
            let group = GroupStatus { agent: agent.clone(), state, ..GroupStatus::default() };
            what_is_wrong(&group, after, now_ns).into_iter().map(|w| w.0).collect::<Vec<_>>()
        };
        let lost = AgentStanding::Lost { since_ns: second, why: "x".into() };
        assert_eq!(wrong(&lost, StoreState::Ready, 5 * second), []);
        assert_eq!(wrong(&lost, StoreState::Ready, 6 * second), [Condition::Away]);
        assert_eq!(wrong(&lost, StoreState::Stuck, 6 * second), [Condition::Away, Condition::Stuck]);
        // A clock that was set back.
        assert_eq!(wrong(&lost, StoreState::Ready, i64::MIN), []);
        let ended = AgentStanding::Ended { since_ns: second };
        assert_eq!(wrong(&ended, StoreState::Ready, 60 * second), []);
        assert_eq!(wrong(&ended, StoreState::Behind, 60 * second), [Condition::Full]);
        assert_eq!(wrong(&AgentStanding::Unseen, StoreState::Damaged, second), [Condition::Damaged]);
    }
}
