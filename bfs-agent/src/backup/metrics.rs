//! What a replayer shows to monitors. Pure.

use bfs_common::wire::{AgentStanding, GroupStatus};

use crate::metrics::{Exposition, flag};

/// Followers of a group: how many there are, and how many of their copies were given up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Following {
    /// Name of the group.
    pub group: String,
    /// How many.
    pub followers: u64,
    /// Since the start of the replayer.
    pub failures: u64,
}

/// The numbers of its groups.
#[must_use]
pub fn metrics(groups: &[GroupStatus], following: &[Following]) -> String {
    let mut out = Exposition::default();
    let each = |out: &mut Exposition, name, help, value: &dyn Fn(&GroupStatus) -> f64| {
        for group in groups {
            out.gauge(name, help, &[("group", &group.group)], value(group));
        }
    };
    for group in groups {
        for (state, number) in [("confirmed", group.confirmed), ("applied", group.applied)] {
            let labels = [("group", group.group.as_str()), ("state", state)];
            let help = "Number of the last checkpoint in this state";
            out.gauge("bfs_replayer_checkpoint", help, &labels, number.0 as f64);
        }
    }
    each(
        &mut out,
        "bfs_replayer_applied_time_seconds",
        "When the applied checkpoint was, by the clock of the primary",
        &|g| g.applied_label.wall_ns as f64 / 1e9,
    );
    each(&mut out, "bfs_replayer_applying", "The tree is worked on right now", &|g| flag(g.applying));
    each(&mut out, "bfs_replayer_pending_records", "Records of no confirmed checkpoint", &|g| {
        g.pending_records as f64
    });
    each(&mut out, "bfs_replayer_pending_bytes", "Their bytes", &|g| g.pending_bytes as f64);
    each(&mut out, "bfs_replayer_open_gaps", "Gaps that are open", &|g| g.open_gaps as f64);
    each(&mut out, "bfs_replayer_agent_connected", "Whether an agent is connected", &|g| flag(g.attached));
    for group in groups {
        let labels = [("group", group.group.as_str())];
        let (lost, trip_us) = match &group.agent {
            AgentStanding::Attached { round_trip_us, .. } => (false, Some(*round_trip_us)),
            AgentStanding::Lost { .. } => (true, None),
            AgentStanding::Unseen | AgentStanding::Ended { .. } => (false, None),
        };
        let help = "Whether the agent is gone and did not say that it ends";
        out.gauge("bfs_replayer_agent_lost", help, &labels, flag(lost));
        if let Some(us) = trip_us.filter(|us| *us > 0) {
            let help = "How long the last heartbeat took to the agent and back";
            out.gauge("bfs_replayer_round_trip_seconds", help, &labels, us as f64 / 1e6);
        }
    }
    each(&mut out, "bfs_replayer_rolling_back", "The primary's files are between two states", &|g| {
        flag(g.rolling_back.is_some())
    });
    each(&mut out, "bfs_replayer_trouble", "Whether something is wrong", &|g| flag(g.trouble.is_some()));
    for group in groups {
        out.store("bfs_replayer_store", &[("group", &group.group)], group.state);
    }
    for of in following {
        let labels = [("group", of.group.as_str())];
        let help = "Files that have a follower by a policy";
        out.gauge("bfs_replayer_followers", help, &labels, of.followers as f64);
        let help = "Copies for followers that were given up";
        out.counter("bfs_replayer_follower_failures_total", help, &labels, of.failures);
    }
    out.text()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::is_sound;

    #[test]
    fn what_is_shown_is_in_the_format() {
        let groups = ["a", "b"].map(|group| GroupStatus { group: group.into(), ..Default::default() });
        let following = Following { group: "a".into(), followers: 3, failures: 1 };
        let text = metrics(&groups, &[following]);
        is_sound(&text);
        assert!(text.contains("bfs_replayer_store{group=\"b\",state=\"ready\"} 1\n"), "{text}");
        assert!(text.contains("bfs_replayer_follower_failures_total{group=\"a\"} 1\n"), "{text}");
        assert_eq!(metrics(&[], &[]), "");
    }
}
