//! The thread that writes the log: what waits together is synced together, and counts then. After a failure the log takes
//! nothing before it was opened again, from what it really holds.

use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use super::super::error::BackupError;
use super::{Group, ToLog, contained, locked, open_log};
use crate::log::writer::LogWriter;
use bfs_common::wire::Position;

/// Bytes that are synced together at most.
const GROUP_COMMIT_BYTES: usize = 32 << 20;
/// After so long without a record the log notes durably that all of it is synced.
const LOG_PAUSE: Duration = Duration::from_secs(1);

impl Group {
    pub(super) fn run_log(&self, mut log: LogWriter, mut from_group: mpsc::Receiver<ToLog>, clock: &Runtime) {
        let mut failed = false;
        loop {
            let next = if failed || log.is_sealed() {
                from_group.blocking_recv()
            } else {
                let soon = async { tokio::time::timeout(LOG_PAUSE, from_group.recv()).await };
                let Ok(next) = clock.block_on(soon) else {
                    // Nothing depends on it now: the next batch does it, or fails.
                    if let Err(error) = log.seal() {
                        tracing::debug!("group {}: {error}", self.name);
                    }
                    continue;
                };
                next
            };
            let Some(first) = next else { break };
            self.log_contained(first, &mut log, &mut from_group, &mut failed);
        }
        if !failed && let Err(error) = log.seal() {
            tracing::warn!("group {}: {error}", self.name);
        }
    }

    /// As [`Self::log_together`]. After a panic it is not known what became of the batches, so the log is opened again
    /// before it takes anything, as after a failed call.
    pub(super) fn log_contained(
        &self,
        first: ToLog,
        log: &mut LogWriter,
        from_group: &mut mpsc::Receiver<ToLog>,
        failed: &mut bool,
    ) {
        let logged = contained(|| self.log_together(first, log, from_group, failed));
        if let Err(error) = logged {
            log.abandon();
            *failed = true;
            self.log_failed(&error);
        }
    }

    /// What came first, and what is there behind it, with one sync. `failed`: the log takes nothing before it was
    /// opened again.
    pub(super) fn log_together(
        &self,
        first: ToLog,
        log: &mut LogWriter,
        from_group: &mut mpsc::Receiver<ToLog>,
        failed: &mut bool,
    ) {
        let mut batches = Vec::new();
        let mut drains = Vec::new();
        let mut adopt = None;
        let mut bytes_total = 0;
        let mut next = Some(first);
        while let Some(message) = next {
            match message {
                ToLog::Append(batch) => {
                    bytes_total += batch.bytes.len();
                    batches.push(batch);
                }
                ToLog::Drain(answer) => drains.push(answer),
                ToLog::Adopt(one) => {
                    adopt = Some(one);
                    break;
                }
            }
            next = if bytes_total < GROUP_COMMIT_BYTES { from_group.try_recv().ok() } else { None };
        }
        // After a failure the batches do not count either: the gate goes back when it is over.
        if !*failed {
            match log.append(&batches) {
                Ok(()) if batches.is_empty() => {}
                Ok(()) => {
                    self.durable(log.durable());
                    let mut state = self.state();
                    state.unlogged = state.unlogged.saturating_sub(bytes_total as u64);
                    self.note_need(&state);
                }
                Err(error) => {
                    self.log_failed(&error.into());
                    *failed = true;
                }
            }
        }
        if let Some(adopt) = adopt {
            self.adopt_now(log, failed, adopt);
        }
        if *failed && !drains.is_empty() {
            match self.reopen(log) {
                Ok(()) => *failed = false,
                Err(error) => self.log_failed(&error),
            }
        }
        for answer in drains {
            let trouble = self.state().log_trouble.clone();
            // The connection may have ended meanwhile.
            let _ = answer.send(trouble.map_or(Ok(()), Err));
        }
    }

    pub(super) fn durable(&self, position: Position) {
        // All under the lock: the applier looks at both and then waits, without a moment between.
        let state = self.state();
        let durable = state.steps.iter().rev().find(|s| s.marker.position.sequence <= position.sequence);
        let confirmed = durable.map_or(state.applied.0, |s| s.marker.checkpoint);
        self.progress.send_modify(|p| {
            p.durable = position;
            p.confirmed = p.confirmed.max(confirmed);
        });
        self.wake.notify_all();
    }

    pub(super) fn log_failed(&self, error: &BackupError) {
        let why = format!("{error}; nothing is acknowledged until the agent connects again and this is gone");
        tracing::error!("group {}: {why}", self.name);
        self.state().log_trouble = Some(why.clone());
        self.progress.send_modify(|p| p.refuses = Some(why));
    }

    /// After a failure: back to the last record that was synced, and on in a new segment.
    pub(super) fn reopen(&self, failed: &mut LogWriter) -> Result<(), BackupError> {
        let mut row = locked(&self.tree);
        *row = self.index.group(&self.name)?;
        failed.settle()?;
        self.incoming.finish(&self.log, self.id)?;
        let (mut log, gate, steps, pending) = open_log(&self.log, &row, &self.index)?;
        let (durable, known) = (gate.position, failed.durable());
        if durable != known {
            let why =
                format!("ends at record {}, but {} was the last synced", durable.sequence, known.sequence);
            return Err(BackupError::corrupt(&self.log, why));
        }
        log.begin_new();
        *failed = log;
        {
            let mut state = self.state();
            state.gate = gate;
            state.steps = steps;
            state.pending = pending;
            state.log_trouble = None;
            state.unlogged = 0;
            self.note_need(&state);
        }
        drop(row);
        self.progress.send_modify(|p| p.refuses = None);
        self.durable(durable);
        Ok(())
    }
}
