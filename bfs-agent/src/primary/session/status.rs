//! What a session tells about itself.

use std::time::Duration;

use bfs_common::abi::counter;
use bfs_common::record::CheckpointId;
use bfs_common::wire::Refusal;

use super::work::{Mark, Work};
use crate::primary::control::{
    CheckpointStatus, Counters, FencedStatus, SpoolStatus, State, Status, StopTimes,
};
use crate::primary::ship::{Progress, SpoolProgress};
use crate::primary::spool::folder;

impl Work {
    /// How the session stands.
    pub(super) fn status(&mut self) -> Status {
        self.look_at_backup();
        let progress = self.link.progress();
        let mark_of = |wanted: &dyn Fn(&Mark) -> bool| self.marks.iter().rev().find(|m| wanted(m));
        let checkpoint = |number: CheckpointId| {
            let mark = mark_of(&|m| m.checkpoint == number);
            CheckpointStatus {
                number,
                age_ms: mark.map(|m| m.at.elapsed().as_millis() as u64),
                tag: mark.map(|m| m.tag.clone()).unwrap_or_default(),
            }
        };
        let sealed = mark_of(&|m| m.sequence <= progress.sealed)
            .map_or(progress.confirmed, |m| m.checkpoint.max(progress.confirmed));
        let last_sequence = self.engine.last_sequence();
        let counters = self.link.probes.counters().unwrap_or_default();
        let went_on = counters.get(counter::WENT_ON);
        let misses = self.link.probes.recursion_misses().unwrap_or_default();
        let (stream_records, stream_bytes) = self.engine.pushed();
        let selected = self.link.probes.selected_tasks().map_or(0, |t| t.len() as u64);
        Status {
            group: self.options.group.clone(),
            state: match &progress.refusal {
                Some(Refusal::Promoted { .. }) => State::Fenced,
                Some(_) => State::Refused,
                None => self.state,
            },
            fenced: self.fenced(&progress),
            pid: std::process::id(),
            program: self.kept.program.clone(),
            selected_threads: selected,
            roots: self.options.roots.iter().map(|r| r.display().to_string()).collect(),
            schedule: self.options.schedule.to_string(),
            next_by_calendar: self.since.calendar.as_ref().and_then(|calendar| calendar.next()),
            destinations: self.destinations(),
            spool: self.spool_status(&progress.spool),
            epoch: self.epoch,
            sealed: checkpoint(sealed),
            confirmed: checkpoint(progress.confirmed),
            applied: checkpoint(progress.applied),
            last_sequence,
            lag_records: last_sequence.0.saturating_sub(progress.durable.sequence.0),
            lag_bytes: progress.retained_bytes as u64,
            lag_ms: u64::try_from(self.lag(&progress).as_millis()).unwrap_or(u64::MAX),
            suspects: self.engine.suspects() as u64,
            waiting_for: None,
            not_confirmed_because: self.why_not_confirmed(&progress),
            checkpoints_taken: self.tally.taken,
            checkpoints_late: self.tally.late,
            checkpoints_given_up: self.tally.given_up,
            checkpoints_stopped: self.tally.stopped,
            stops: stop_times(&self.link.stops_us),
            ring_bytes: self.link.probes.ring().capacity(),
            ring_used_bytes: self.link.probes.ring().used_bytes(),
            foreign: super::foreign::status(&self.engine, &self.link.probes),
            counters: Counters {
                records: counters.get(counter::RECORDS) + went_on,
                inline: counters.get(counter::INLINE),
                by_reference: counters.get(counter::BY_REFERENCE) + went_on,
                reserve_failed: counters.get(counter::RESERVE_FAILED),
                rescan: counters.get(counter::RESCAN),
                user_unreadable: counters.get(counter::USER_UNREADABLE),
                no_enter: counters.get(counter::NO_ENTER),
                compat: counters.get(counter::COMPAT),
                tasks_full: counters.get(counter::TASKS_FULL),
                probe_misses: misses.iter().map(|m| m.1).sum(),
                everything_suspect: self.engine.stats.everything,
                ambiguous: self.engine.stats.ambiguous,
                stream_records,
                stream_bytes,
            },
            hooks: self.hook_status(),
            process: self.process_status(),
            recovery: self.recovery_status(),
            last_error: self.last_error.clone(),
        }
    }

    /// Why this host is not the primary any more.
    pub(super) fn fenced(&self, progress: &Progress) -> Option<FencedStatus> {
        let Some(Refusal::Promoted { at, since_ns, host }) = &progress.refusal else { return None };
        let marker = self.marks.iter().find(|mark| mark.checkpoint == *at);
        // Without the mark an agent before took it: then this one has at least begun an epoch since.
        let diverged = marker.is_none_or(|mark| self.engine.last_sequence() > mark.sequence);
        Some(FencedStatus { host: host.clone(), at: *at, since_ns: *since_ns, diverged })
    }

    fn spool_status(&self, spool: &SpoolProgress) -> SpoolStatus {
        let options = &self.options.spool;
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let folder = (options.bytes_max > 0).then(|| folder(options, &self.options.group));
        SpoolStatus {
            folder,
            records: spool.records,
            bytes: spool.bytes,
            disk_bytes: spool.disk_bytes,
            bytes_max: options.bytes_max,
            oldest_ms: spool.oldest.map(milliseconds),
            oldest_ms_max: milliseconds(options.time_max),
            is_full: spool.is_full,
            notes_only: self.engine.is_noting(),
            trouble: spool.trouble.clone(),
            left_ms: spool.left.map(milliseconds),
        }
    }

    pub(super) fn why_not_confirmed(&self, progress: &Progress) -> Option<String> {
        let last = self.engine.last_sequence();
        if let Some(why) = &self.detached {
            return Some(format!("{why}; what follows is not captured: end this agent and start again"));
        }
        if let Some(refusal) = &progress.refusal {
            return Some(match refusal {
                Refusal::Promoted { .. } => format!("this host is not the primary any more: {refusal}"),
                _ => format!("the replayer refuses: {refusal}"),
            });
        }
        if !progress.connected && progress.durable.sequence < last {
            let why = progress.last_error.as_deref().unwrap_or("no connection");
            return Some(format!("not connected to the replayer: {why}"));
        }
        if progress.held_back {
            return Some("more waits to be sent than --rate-limit lets go at once".into());
        }
        if progress.spool.records > 0 {
            return Some("what the spool holds is sent first".into());
        }
        if self.engine.is_noting() {
            return Some("there is no room for what the backup misses: only what is touched is noted".into());
        }
        if self.tally.taken == 0 {
            return Some("the first copy is not complete".into());
        }
        // What went wrong since the last checkpoint that came about.
        self.failing.clone()
    }
}

fn stop_times(stops_us: &[u64]) -> StopTimes {
    let mut sorted = stops_us.to_vec();
    sorted.sort_unstable();
    let at = |percent: usize| {
        let index = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
        sorted.get(index).copied().unwrap_or(0)
    };
    StopTimes { count: sorted.len() as u64, p50_us: at(50), p99_us: at(99), max_us: at(100) }
}
