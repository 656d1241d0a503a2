//! Writes that go on where the last one of their task ended: a run, which stands in the task's slot until the task
//! does something else, it is long enough, or a cut is made.

use bfs_common::abi::{EventHeader, InodeAttr, RunEvent, flag, kind};

use super::fs::Call;
use super::world::{Running, World, inode_id, pack};

/// The run of a task.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    file: u64,
    start: u64,
    end: u64,
    first_ns: u64,
    calls: u32,
}

impl World {
    /// A write that goes on in the run of the task, if it has one.
    pub(super) fn go_on(&mut self, who: usize) -> Option<Call> {
        let run = self.runs[who]?;
        self.fs.inodes.get(&run.file).filter(|inode| inode.links > 0)?;
        let data = vec![self.random.next(200) as u8 + 1; 1 + self.random.next(6) as usize];
        Some(Call::Write { file: run.file, offset: Some(run.end), data, inline: false })
    }

    /// A task begins a call: whether it may join the run decides from when on the call counts as running.
    pub(super) fn starts(&mut self, who: usize, call: &Call) -> u64 {
        let goes_on = |run: &Run| match call {
            Call::Write { file, offset, inline: false, .. } => {
                *file == run.file && offset.is_none_or(|offset| offset == run.end)
            }
            _ => false,
        };
        if !self.runs[who].as_ref().is_some_and(goes_on) {
            self.end_run(who);
        }
        match self.runs[who] {
            Some(run) if !self.parted => run.first_ns,
            _ => self.clock,
        }
    }

    /// A write by reference has ended; whether it joined a run, and has no record of its own.
    pub(super) fn join(&mut self, who: usize, running: &Running, file: u64, offset: u64, len: u64) -> bool {
        if self.runs[who].is_some_and(|run| run.file != file || run.end != offset) || self.parted {
            self.end_run(who);
        }
        if self.parted || self.runs[who].is_none() && self.random.next(2) == 0 {
            return false;
        }
        let first_ns = running.start_ns;
        let run = self.runs[who].get_or_insert(Run { file, start: offset, end: offset, first_ns, calls: 0 });
        run.end += len;
        run.calls += 1;
        if self.random.next(8) == 0 {
            self.end_run(who);
        }
        true
    }

    /// The run of a task gets its record.
    pub(super) fn end_run(&mut self, who: usize) {
        let Some(run) = self.runs[who].take() else { return };
        let event = RunEvent { attr: self.attr(run.file), ..self.run_event(who, run) };
        self.put_record(pack(&event, b"", b""), who as u32 + 1);
    }

    /// The probes are new.
    pub(super) fn forget_runs(&mut self) {
        self.runs.fill(None);
        self.parted = false;
    }

    /// What the agent finds in the slots.
    pub(super) fn runs_in_slots(&self) -> Vec<RunEvent> {
        let runs = self.runs.iter().enumerate();
        runs.filter_map(|(who, run)| Some(self.run_event(who, (*run)?))).collect()
    }

    fn run_event(&self, who: usize, run: Run) -> RunEvent {
        RunEvent {
            header: EventHeader {
                kind: kind::RUN,
                flags: flag::BY_REFERENCE,
                start_ns: run.first_ns,
                end_ns: self.clock,
                tid: who as u32 + 1,
                tgid: who as u32 + 1,
                ret: (run.end - run.start) as i64,
                ..EventHeader::default()
            },
            attr: InodeAttr { id: inode_id(run.file), ..InodeAttr::default() },
            file_offset: run.start,
            calls: run.calls,
            reserved: 0,
        }
    }
}
