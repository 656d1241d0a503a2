//! What an agent shows to monitors. Pure.

use super::control::{Standing, State, Status};
use crate::metrics::{Exposition, flag};

/// The numbers of a status.
#[must_use]
pub fn metrics(status: &Status) -> String {
    let mut out = Exposition::default();
    let group = [("group", status.group.as_str())];
    let with = |label: &'static str, value: &'static str| [group[0], (label, value)];
    out.gauge(
        "bfs_lag_seconds",
        "For how long there has been something that no confirmed checkpoint has",
        &group,
        status.lag_ms as f64 / 1e3,
    );
    for (state, checkpoint) in
        [("sealed", &status.sealed), ("confirmed", &status.confirmed), ("applied", &status.applied)]
    {
        out.gauge(
            "bfs_checkpoint",
            "Number of the last checkpoint in this state",
            &with("state", state),
            checkpoint.number.0 as f64,
        );
    }
    for (result, count) in [
        ("taken", status.checkpoints_taken),
        ("late", status.checkpoints_late),
        ("given_up", status.checkpoints_given_up),
        ("stopped", status.checkpoints_stopped),
    ] {
        out.counter(
            "bfs_checkpoints_total",
            "Checkpoints, by what came of them",
            &with("result", result),
            count,
        );
    }
    for state in [
        (State::Starting, "starting"),
        (State::Copying, "copying"),
        (State::Following, "following"),
        (State::Stopped, "stopped"),
        (State::RollingBack, "rolling_back"),
        (State::Ending, "ending"),
        (State::Refused, "refused"),
        (State::Fenced, "fenced"),
    ] {
        let (is, name) = state;
        out.gauge(
            "bfs_state",
            "1 for what the agent is doing",
            &with("state", name),
            flag(status.state == is),
        );
    }
    for destination in &status.destinations {
        let labels = [group[0], ("address", destination.address.as_str())];
        out.gauge("bfs_connected", "Whether the backup is connected", &labels, flag(destination.connected));
    }
    for destination in &status.destinations {
        for (standing, name) in Standing::ALL {
            let labels = [group[0], ("address", destination.address.as_str()), ("standing", name)];
            let is = flag(destination.standing == standing);
            out.gauge("bfs_standing", "1 for how the backup stands", &labels, is);
        }
    }
    for destination in &status.destinations {
        let labels = [group[0], ("address", destination.address.as_str())];
        let seconds = destination.round_trip_us as f64 / 1e6;
        out.gauge("bfs_round_trip_seconds", "Of the last heartbeat", &labels, seconds);
    }
    for destination in &status.destinations {
        let labels = [group[0], ("address", destination.address.as_str())];
        out.counter("bfs_reconnects_total", "Connections made again", &labels, destination.reconnects);
    }
    for destination in &status.destinations {
        let labels = [group[0], ("address", destination.address.as_str())];
        let what = "Bytes of records sent, resent ones included";
        out.counter("bfs_sent_bytes_total", what, &labels, destination.sent_bytes);
    }
    for destination in &status.destinations {
        let labels = [group[0], ("address", destination.address.as_str())];
        let what = "As how many these travelled, which is less with --compress";
        out.counter("bfs_wire_bytes_total", what, &labels, destination.wire_bytes);
    }
    for destination in &status.destinations {
        let Some(rate) = destination.rate_limit else { continue };
        let labels = [group[0], ("address", destination.address.as_str())];
        out.gauge("bfs_rate_limit_bytes", "Most bytes a second that are sent", &labels, rate as f64);
    }
    for destination in status.destinations.iter().filter(|destination| destination.rate_limit.is_some()) {
        let labels = [group[0], ("address", destination.address.as_str())];
        let held = flag(destination.held_back);
        out.gauge("bfs_rate_limit_holds", "Whether more waits than that lets go soon", &labels, held);
    }
    for destination in &status.destinations {
        out.store("bfs_store", &[group[0], ("address", destination.address.as_str())], destination.store);
    }
    out.gauge("bfs_lag_records", "Records not durable on the backup", &group, status.lag_records as f64);
    out.gauge("bfs_lag_bytes", "Their bytes in memory", &group, status.lag_bytes as f64);
    out.gauge("bfs_spool_records", "Records that only the spool has", &group, status.spool.records as f64);
    out.gauge("bfs_spool_bytes", "What the spool needs on the disk", &group, status.spool.disk_bytes as f64);
    out.gauge("bfs_spool_bytes_max", "What it may need", &group, status.spool.bytes_max as f64);
    out.gauge("bfs_spool_notes_only", "Only what is touched is noted", &group, flag(status.spool.notes_only));
    out.gauge(
        "bfs_suspects",
        "Objects to be read before the next checkpoint",
        &group,
        status.suspects as f64,
    );
    out.gauge("bfs_threads", "Threads that are selected", &group, status.selected_threads as f64);
    out.gauge("bfs_ring_bytes", "Size of the ring", &group, status.ring_bytes as f64);
    out.gauge("bfs_ring_used_bytes", "What of it is in use", &group, status.ring_used_bytes as f64);
    out.counter("bfs_stops_total", "Times that the program was stopped", &group, status.stops.count);
    out.gauge("bfs_stop_seconds_max", "The longest stop", &group, status.stops.max_us as f64 / 1e6);
    let counters = &status.counters;
    out.counter("bfs_events_total", "Events captured", &group, counters.records);
    for (how, count) in [("inline", counters.inline), ("by_reference", counters.by_reference)] {
        out.counter("bfs_writes_total", "Writes, by how their bytes came", &with("how", how), count);
    }
    for (what, count) in [
        ("reserve_failed", counters.reserve_failed),
        ("rescan", counters.rescan),
        ("tasks_full", counters.tasks_full),
        ("probe_misses", counters.probe_misses),
        ("everything_suspect", counters.everything_suspect),
    ] {
        let help = "What was not captured the usual way, named, and read again";
        out.counter("bfs_losses_total", help, &with("what", what), count);
    }
    out.counter("bfs_stream_bytes_total", "Bytes of the stream", &group, counters.stream_bytes);
    for (result, count) in [("done", status.recovery.recovered), ("failed", status.recovery.failures)] {
        let help = "Files that a policy brought back, and that did not come back after all tries";
        out.counter("bfs_recoveries_total", help, &with("result", result), count);
    }
    out.counter("bfs_hook_failures_total", "Hooks that failed", &group, status.hooks.failures);
    out.text()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::is_sound;
    use crate::primary::control::DestinationStatus;

    #[test]
    fn what_is_shown_is_in_the_format() {
        let destination = DestinationStatus { address: "unix:/a\"b\\c\nd".into(), ..Default::default() };
        let two = vec![destination.clone(), DestinationStatus { address: "unix:/e".into(), ..destination }];
        let status = Status { group: "g".into(), destinations: two, lag_ms: 1500, ..Default::default() };
        let text = metrics(&status);
        is_sound(&text);
        assert!(text.contains("bfs_lag_seconds{group=\"g\"} 1.5\n"), "{text}");
        assert!(text.contains(r#"address="unix:/a\"b\\c\nd"}"#), "{text}");
    }
}
