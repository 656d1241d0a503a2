//! Status and comparison in words.

use std::fmt::Write;

use bfs_common::wire::StoreState;

use crate::generation::time_text;
use crate::primary::control::{
    CheckpointStatus, ForeignStatus, HookStatus, ProcessStatus, RecoveryStatus, SpoolStatus, State, Status,
    VerifyReport,
};
use crate::primary::control::{DestinationStatus, Standing};

/// What a standing is called.
pub(super) fn standing(standing: Standing) -> &'static str {
    Standing::ALL.iter().find(|(known, _)| *known == standing).map_or("", |(_, name)| name)
}

fn state(state: State) -> &'static str {
    match state {
        State::Starting => "starting",
        State::Copying => "copying what exists",
        State::Following => "following",
        State::RollingBack => "rolling back: bringing the files back to a checkpoint",
        State::Stopped => "the program is stopped for a checkpoint",
        State::Ending => "ending",
        State::Refused => "REFUSED by the replayer: nothing more is sent",
        State::Fenced => "FENCED: another host is the primary, nothing more is sent",
    }
}

/// A group in one line.
#[must_use]
pub fn in_short(status: &Status) -> String {
    let mut text = format!("{}, agent pid {}", state(status.state), status.pid);
    let _ = write!(text, ", confirmed {}", checkpoint(&status.confirmed));
    if let Some(why) = &status.not_confirmed_because {
        let _ = write!(text, ", none newer because {why}");
    }
    text
}

/// A status for people, first what matters most.
#[must_use]
pub fn status(status: &Status) -> String {
    let mut text = String::new();
    let mut line = |key: &str, value: String| {
        let _ = writeln!(text, "{key:<12} {value}");
    };
    line("group", format!("{} ({}, agent pid {})", status.group, state(status.state), status.pid));
    if let Some(fenced) = &status.fenced {
        let since = time_text(fenced.since_ns);
        line(
            "fenced",
            format!(
                "since {since}: the backup was promoted on {}, from checkpoint {}",
                fenced.host, fenced.at
            ),
        );
        if fenced.diverged {
            line(
                "diverged",
                format!("this host has more than checkpoint {}, which the backup has not", fenced.at),
            );
            line("", "end the program here; then `bfs-agent surplus` keeps what is here".into());
        }
    }
    line("program", format!("{}, {} threads selected", status.program, status.selected_threads));
    line("paths", status.roots.join(", "));
    for (at, destination) in status.destinations.iter().enumerate() {
        let mut words = destination.address.clone();
        words += if destination.connected { ", connected" } else { ", NOT CONNECTED" };
        if destination.connected && destination.round_trip_us > 0 {
            let _ = write!(words, ", round trip {}", duration_us(destination.round_trip_us));
        }
        line("backup", words);
        if destination.standing != Standing::Attached {
            let stands = standing(destination.standing).to_uppercase();
            line("", format!("{stands} since {}", time_text(destination.since_ns)));
        }
        let further = at > 0;
        if let Some(why) = destination.last_error.as_ref().filter(|_| further || !destination.connected) {
            line("", format!("because {why}"));
        }
        if further {
            let DestinationStatus { confirmed, applied, .. } = destination;
            line("", format!("checkpoint {confirmed} confirmed there, {applied} applied"));
        }
        if let Some(rate) = destination.rate_limit {
            let held = if destination.held_back { "; THAT HOLDS RECORDS BACK" } else { "" };
            line("", format!("at most {} a second are sent{held}", size(rate)));
        }
        if destination.compressed {
            let (sent, wire) = (size(destination.sent_bytes), size(destination.wire_bytes));
            line("", format!("{sent} were sent, compressed to {wire}"));
        }
        match destination.store {
            StoreState::Ready | StoreState::LogFailed => {}
            StoreState::Stuck => {
                line("", "it takes what comes, but a checkpoint cannot be applied there".to_owned())
            }
            StoreState::Full => line("", "ITS DISK IS FULL: it goes on when there is room".to_owned()),
            StoreState::Behind => {
                line("", "as much waits there to be applied as may (--pending-max)".to_owned())
            }
            StoreState::Damaged => {
                line("", "backup files were changed or damaged there: they are sent again".to_owned())
            }
        }
        if let Some(refusal) = &destination.refusal {
            line("", format!("refused: {refusal}"));
        }
    }
    if let Some(text) = spool(&status.spool) {
        line("spool", text);
    }
    if let Some(trouble) = &status.spool.trouble {
        line("", format!("it takes nothing now: {trouble}; records wait in memory"));
    }
    if status.spool.notes_only {
        line("", "no room for bytes: what is touched is noted, and read when the backup is back".into());
    }
    line("sealed", checkpoint(&status.sealed));
    line("confirmed", checkpoint(&status.confirmed));
    line("applied", checkpoint(&status.applied));
    if let Some(why) = &status.not_confirmed_because {
        line("", format!("none newer because {why}"));
    }
    line(
        "lag",
        format!(
            "{} records, {} not durable yet; record {} is the last",
            status.lag_records,
            size(status.lag_bytes),
            status.last_sequence
        ),
    );
    if status.suspects > 0 {
        line(
            "to re-read",
            format!("{} objects, ranges or entries before the next checkpoint", status.suspects),
        );
    }
    if let Some(waiting) = &status.waiting_for {
        line("waiting for", waiting.clone());
    }
    line(
        "checkpoints",
        format!(
            "{} taken ({}{}), {} late, {} given up",
            status.checkpoints_taken,
            status.schedule,
            status.next_by_calendar.as_ref().map_or_else(String::new, |next| format!(", next at {next}")),
            status.checkpoints_late,
            status.checkpoints_given_up
        ),
    );
    for text in hooks(&status.hooks) {
        line("hooks", text);
    }
    for text in recovery(&status.recovery) {
        line("recovery", text);
    }
    if let Some(state) = &status.process {
        line("processes", process(state));
    }
    let stops = &status.stops;
    if stops.count > 0 {
        line(
            "stops",
            format!(
                "{} stops; half at most {}, 99 % at most {}, longest {}",
                stops.count,
                duration_us(stops.p50_us),
                duration_us(stops.p99_us),
                duration_us(stops.max_us)
            ),
        );
    }
    let counters = &status.counters;
    line(
        "captured",
        format!(
            "{} events, {} writes with their bytes, {} by reference",
            counters.records, counters.inline, counters.by_reference
        ),
    );
    for text in foreign(&status.foreign) {
        line("others", text);
    }
    line("ring", format!("{} of {} in use", size(status.ring_used_bytes), size(status.ring_bytes)));
    let losses = [
        (counters.reserve_failed, "events found no room in the ring (named and re-read)"),
        (counters.rescan, "times everything had to be compared"),
        (counters.tasks_full, "threads found no room in the table"),
        (counters.probe_misses, "times a probe did not run"),
    ];
    for (count, what) in losses.into_iter().filter(|(count, _)| *count > 0) {
        line("", format!("{count} {what}"));
    }
    if let Some(error) = &status.last_error {
        line("last error", error.clone());
    }
    text.truncate(text.trim_end().len());
    text
}

/// What is run around checkpoints, where there is anything to tell.
fn hooks(hooks: &HookStatus) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(which) = &hooks.running {
        lines
            .push(format!("the one {which} a checkpoint runs, for {}", duration_us(hooks.running_ms * 1000)));
    }
    if let Some(failure) = &hooks.last_failure {
        lines.push(format!("{} failed; the last: {failure}", hooks.failures));
    }
    lines
}

/// Files that policies bring back, where there is anything to tell.
fn recovery(state: &RecoveryStatus) -> Vec<String> {
    let mut lines = Vec::new();
    if state.recovered + state.failures + state.waiting > 0 {
        let RecoveryStatus { recovered, failures, waiting, .. } = state;
        lines.push(format!("{recovered} brought back, {failures} failed, {waiting} going on"));
    }
    if state.not_told > 0 {
        lines.push(format!("{} errors of a disk, of which the file could not be told", state.not_told));
    }
    lines.extend(state.troubles.iter().cloned());
    lines
}

/// Process state in checkpoints.
fn process(state: &ProcessStatus) -> String {
    let kept = state.kept.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let mut text = if kept.is_empty() {
        "no checkpoint has their state".to_owned()
    } else {
        format!(
            "checkpoints {kept} have their state ({}, dumped in {} of the {} that they stood)",
            size(state.last_bytes),
            duration_us(state.last_us),
            duration_us(state.last_stop_us)
        )
    };
    if state.ahead_rounds > 0 {
        text.push_str(&format!(
            "; {} of it dumped ahead, in {} rounds and {}",
            size(state.ahead_bytes),
            state.ahead_rounds,
            duration_us(state.ahead_us)
        ));
    }
    if let Some(why) = &state.ahead_failure {
        text.push_str(&format!("; memory was not dumped ahead as it might be: {why}"));
    }
    match (&state.shipped, &state.ship_failure) {
        (_, Some(why)) => text.push_str(&format!("; the backup does not get it: {why}")),
        (Some(shipped), None) => {
            text.push_str(&format!(
                "; the backup has that of {shipped} ({} sent)",
                size(state.shipped_bytes)
            ));
        }
        (None, None) => {}
    }
    if state.skipped > 0 {
        text.push_str(&format!(
            "; {} checkpoints without it, as a dump takes longer than the interval",
            state.skipped
        ));
    }
    if let Some(first) = state.outside.first() {
        let more = state.outside.len() - 1;
        text.push_str(&format!(
            "; open elsewhere: {} ({}), and {more} more (--json)",
            first.what, first.at_restore
        ));
    }
    if state.restored > 0 {
        text.push_str(&format!("; restored {} times", state.restored));
    }
    if let Some(failure) = &state.failure {
        text.push_str(&format!("; {} checkpoints have files only, the last {failure}", state.failed));
    }
    text
}

/// What others than the selected processes changed, where there is anything to tell.
fn foreign(foreign: &ForeignStatus) -> Vec<String> {
    /// Processes that are named.
    const NAMED: usize = 3;
    if !foreign.is_seen {
        return vec!["what processes that are not selected change is not seen".into()];
    }
    let mut lines = Vec::new();
    if !foreign.processes.is_empty() {
        let named =
            foreign.processes.iter().take(NAMED).map(|p| format!("{} ({}) {}", p.pid, p.command, p.changes));
        let total: u64 = foreign.processes.iter().map(|p| p.changes).sum();
        let more = foreign.processes.len().saturating_sub(NAMED);
        let mut text = format!(
            "{total} changes by processes that are not selected: {}",
            named.collect::<Vec<_>>().join(", ")
        );
        if more > 0 {
            let _ = write!(text, ", and {more} more");
        }
        lines.push(text);
    }
    if foreign.ignored_count > 0 {
        let first = foreign.ignored.first().map(String::as_str).unwrap_or_default();
        lines.push(format!(
            "the content of {} files does not count any more, of {first} and others (--json lists them)",
            foreign.ignored_count
        ));
    }
    lines
}

/// What only the spool has, where there is anything or it is in trouble.
fn spool(spool: &SpoolStatus) -> Option<String> {
    let folder = spool.folder.as_ref().filter(|_| spool.records > 0 || spool.trouble.is_some())?;
    let mut text = format!(
        "{} records, {} of at most {} in {}",
        spool.records,
        size(spool.disk_bytes),
        size(spool.bytes_max),
        folder.display()
    );
    if let Some(age) = spool.oldest_ms {
        let _ = write!(text, ", the oldest {} s of at most {} s", age / 1000, spool.oldest_ms_max / 1000);
    }
    if let Some(left) = spool.left_ms {
        let _ = write!(text, "; being sent, {} and about {} s left", size(spool.bytes), left.div_ceil(1000));
    }
    Some(text)
}

fn checkpoint(checkpoint: &CheckpointStatus) -> String {
    if checkpoint.number.0 == 0 {
        return "none yet".into();
    }
    let mut text = format!("checkpoint {}", checkpoint.number);
    if !checkpoint.tag.is_empty() {
        let _ = write!(text, " ({})", checkpoint.tag);
    }
    if let Some(age) = checkpoint.age_ms {
        let _ = write!(text, ", {}.{} s old", age / 1000, age % 1000 / 100);
    }
    text
}

/// A comparison for people.
#[must_use]
pub fn verify(report: &VerifyReport) -> String {
    let mut text = String::new();
    let mut list = |word: &str, lines: &[String], count: u64| {
        for line in lines {
            let _ = writeln!(text, "{word}: {line}");
        }
        let more = count - lines.len() as u64;
        if more > 0 {
            let _ = writeln!(text, "{word}: {more} more");
        }
    };
    list("repaired", &report.repaired, report.repaired_count);
    list("different", &report.different, report.different_count);
    list("not compared", &report.not_compared, report.not_compared_count);
    let verdict = match (report.different_count, report.not_compared_count) {
        (0, 0) => "equal".to_owned(),
        (0, skipped) => format!("no difference found, but {skipped} could not be compared"),
        (different, 0) => format!("{different} DIFFERENCES"),
        (different, skipped) => format!("{different} DIFFERENCES, and {skipped} could not be compared"),
    };
    let checkpoints = match report.last {
        last if last > report.checkpoint => format!("checkpoints {} to {last}", report.checkpoint),
        _ => format!("checkpoint {}", report.checkpoint),
    };
    let _ = write!(
        text,
        "{checkpoints}: {} files, directories and links compared ({}): {verdict}",
        report.compared,
        size(report.bytes)
    );
    text
}

/// A size with the unit that fits.
#[must_use]
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} bytes") } else { format!("{value:.1} {}", UNITS[unit]) }
}

fn duration_us(us: u64) -> String {
    match us {
        0..1000 => format!("{us} us"),
        1000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.1} s", us as f64 / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bfs_common::record::CheckpointId;

    #[test]
    fn a_status_says_what_is_wrong() {
        let text = status(&Status {
            group: "default".into(),
            confirmed: CheckpointStatus { number: CheckpointId(4), age_ms: Some(1250), tag: "t".into() },
            destinations: vec![crate::primary::control::DestinationStatus {
                address: "unix:/x".into(),
                last_error: Some("it is gone".into()),
                ..Default::default()
            }],
            not_confirmed_because: Some("the backup is away".into()),
            ..Status::default()
        });
        for part in
            ["NOT CONNECTED", "because it is gone", "checkpoint 4 (t), 1.2 s old", "none newer because"]
        {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    #[test]
    fn lists_that_were_cut_say_so() {
        let report =
            VerifyReport { different: vec!["a: x".into()], different_count: 3, ..Default::default() };
        let text = verify(&report);
        assert!(
            text.contains("different: a: x\ndifferent: 2 more\n") && text.contains("3 DIFFERENCES"),
            "{text}"
        );
        assert_eq!((size(1023), size(1536)), ("1023 bytes".into(), "1.5 KiB".into()));
    }
}
