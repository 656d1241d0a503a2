//! The followed tasks: who is selected, and what each of them is doing.

use std::os::fd::AsFd;
use std::sync::atomic::{Ordering, fence};

use bfs_common::abi::{NO_CALL, Plain, RunEvent, TASKS_MAX, TaskState, counter, role};

use super::{Probes, kernel};
use crate::primary::capture::{CaptureError, sys};
use crate::primary::{clock::monotonic_ns, process::has_ended};

/// How often it is looked whether somebody is left who was not met.
const LOOKS_MAX: u32 = 100;

impl Probes {
    /// Follows a task, and what it forks from now on; whether it is followed. (One that has ended meanwhile is let go.)
    pub fn select_task(&self, tid: u32, tgid: u32) -> Result<bool, CaptureError> {
        let state = TaskState { nr: NO_CALL, tgid, ..TaskState::default() };
        match sys::update(self.tasks.as_fd(), &tid, &state, sys::NO_EXIST) {
            // The probe at fork was faster, or it changed something before it was selected.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                let mut bytes = [0; size_of::<TaskState>()];
                let failed = || kernel(format!("cannot follow task {tid}"));
                let found = sys::lookup(self.tasks.as_fd(), &tid, &mut bytes).map_err(failed())?;
                let known = TaskState::read_from(&bytes).filter(|known| found && known.role != role::FOREIGN);
                if known.is_some() {
                    return Ok(true);
                }
                sys::update(self.tasks.as_fd(), &tid, &state, 0).map_err(failed())?;
            }
            result => result.map_err(kernel(format!("cannot follow task {tid}")))?,
        }
        // The probe at its end may have run before there was an entry to remove: that of a zombie would stay for ever.
        let ended = has_ended(tgid, tid);
        if ended {
            self.deselect_task(tid)?;
        }
        Ok(!ended)
    }

    /// No longer follows a task.
    pub fn deselect_task(&self, tid: u32) -> Result<bool, CaptureError> {
        sys::delete(self.tasks.as_fd(), &tid).map_err(kernel(format!("cannot let go of task {tid}")))
    }

    fn tasks(&self) -> Result<Vec<(u32, TaskState)>, CaptureError> {
        sys::entries(self.tasks.as_fd(), TASKS_MAX, false).map_err(kernel("cannot read the followed tasks"))
    }

    /// The selected tasks, with the call that each is in.
    pub fn selected_tasks(&self) -> Result<Vec<(u32, TaskState)>, CaptureError> {
        let mut tasks = self.tasks()?;
        tasks.retain(|(_, state)| state.role == role::SELECTED);
        Ok(tasks)
    }

    /// The processes of the selected tasks, each once.
    pub fn selected_processes(&self) -> Result<Vec<u32>, CaptureError> {
        let mut processes: Vec<u32> =
            self.selected_tasks()?.into_iter().map(|(_, state)| state.tgid).collect();
        processes.sort_unstable();
        processes.dedup();
        Ok(processes)
    }

    /// Whether no task is selected any more.
    ///
    /// A list without anybody does not say so: the map is read bucket by bucket, and a task may have made a child in
    /// one that was read already, and ended before its own was. But then the probes let somebody go meanwhile.
    pub fn nobody_is_selected(&self) -> Result<bool, CaptureError> {
        for _ in 0..LOOKS_MAX {
            let let_go = || Ok::<_, CaptureError>(self.counters()?.get(counter::LET_GO));
            let before = let_go()?;
            if !self.selected_tasks()?.is_empty() {
                return Ok(false);
            }
            if let_go()? == before {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The calls in flight that started at or before `t` (`CLOCK_MONOTONIC`, in the past), or may
    /// have.
    ///
    /// Complete because the probes set `active` with a locked instruction before they take the
    /// time: a call whose start is not after `t` was visible before `t` was read.
    pub fn in_flight(&self, t: u64) -> Result<Vec<(u32, TaskState)>, CaptureError> {
        fence(Ordering::SeqCst);
        let mut tasks = self.tasks()?;
        tasks.retain(|(_, state)| state.active != 0 && state.start_ns <= t);
        Ok(tasks)
    }

    /// The runs of writes that have no record yet. Complete, together with what stands in the ring afterwards, when
    /// writes were [parted](Self::part_writes) before.
    pub fn runs(&self) -> Result<Vec<RunEvent>, CaptureError> {
        fence(Ordering::SeqCst);
        let tasks = self.tasks()?;
        let now = monotonic_ns();
        Ok(tasks.into_iter().filter_map(|(tid, state)| state.run(tid, now)).collect())
    }

    /// Whether a task is still in the call that it began at `start_ns` (or, before the time was
    /// taken, 0 or 1: in any).
    pub fn is_in_call(&self, tid: u32, start_ns: u64) -> Result<bool, CaptureError> {
        let mut bytes = [0; size_of::<TaskState>()];
        let found = sys::lookup(self.tasks.as_fd(), &tid, &mut bytes)
            .map_err(kernel(format!("cannot read task {tid}")))?;
        let state = TaskState::read_from(&bytes).filter(|_| found).unwrap_or_default();
        Ok(state.active != 0 && (start_ns <= 1 || state.start_ns == start_ns))
    }
}
