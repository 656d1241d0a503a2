//! Asynchronous operations as the probes know them, for the engine: which are in flight, what they
//! change, and which nobody can carry out any more.

use std::collections::HashMap;
use std::path::Path;

use bfs_common::abi::{InodeId, REQUESTS_MAX, Request as Entry, counter, request};

use super::link::{Link, probes_failed};
use super::work::Work;
use crate::primary::engine::host::{HostError, InFlight, Request, Target};

/// What an entry of the probes says that the operation changes.
fn target(entry: &Entry) -> Target {
    if entry.flags & request::PATH != 0 {
        Target::Paths
    } else if entry.inode.is_some() {
        Target::File { inode: entry.inode, start: entry.offset, end: entry.end }
    } else {
        Target::Unknown
    }
}

/// Whether the threads that submitted operations are still there. Before a thread is gone its
/// workers are (`io_uring_files_cancel`, called by do_exit in kernel/exit.c, waits for them); what it
/// submitted is then at most direct I/O in flight.
#[derive(Default)]
struct Submitters(HashMap<u32, bool>);

impl Submitters {
    fn lives(&mut self, entry: &Entry) -> bool {
        let task = || Path::new("/proc").join(format!("{}/task/{}", entry.tgid, entry.tid)).exists();
        *self.0.entry(entry.tid).or_insert_with(task)
    }
}

impl Link {
    /// Whether the processes ever began an asynchronous operation. (The counter rises before the
    /// operation can be in flight.)
    fn requests_used(&self) -> Result<bool, HostError> {
        Ok(self.probes.counters().map_err(probes_failed)?.get(counter::ASYNC) > 0)
    }

    /// The operations in flight that may have started at or before `t`.
    pub(super) fn requests_in_flight(&self, t: u64) -> Result<Vec<InFlight>, HostError> {
        if !self.requests_used()? {
            return Ok(Vec::new());
        }
        let mut submitters = Submitters::default();
        let entries = self.probes.requests().map_err(probes_failed)?;
        Ok(entries
            .into_iter()
            .filter(|(_, entry)| entry.start_ns <= t && submitters.lives(entry))
            .map(|(key, entry)| InFlight {
                tid: entry.tid,
                tgid: entry.tgid,
                nr: libc::SYS_io_uring_enter as u32,
                start_ns: entry.start_ns,
                request: Some(Request {
                    key,
                    id: entry.id,
                    target: target(&entry),
                    silent: entry.flags & request::SILENT != 0,
                }),
            })
            .collect())
    }

    /// Whether an operation that began then is still in flight.
    pub(super) fn is_in_flight(&self, request: &Request, start_ns: u64) -> Result<bool, HostError> {
        let entry = self.probes.request(request.key).map_err(probes_failed)?;
        Ok(entry.is_some_and(|entry| start_ns == 0 || entry.start_ns == start_ns))
    }

    /// Takes out what nobody can carry out any more, and names it: files, and whether there is
    /// something without a name.
    pub(super) fn abandoned_requests(&self) -> Result<(Vec<InodeId>, bool), HostError> {
        let (mut inodes, mut everything) = (Vec::new(), false);
        if !self.requests_used()? {
            return Ok((inodes, everything));
        }
        let full = self.probes.counters().map_err(probes_failed)?.get(counter::REQUESTS_FULL);
        if full > 0 {
            return Err(HostError::Probes(format!(
                "{full} asynchronous operations beyond the {REQUESTS_MAX} that can be followed: nothing is \
                 confirmed any more; end this agent and start again"
            )));
        }
        let mut submitters = Submitters::default();
        for (key, entry) in self.probes.requests().map_err(probes_failed)? {
            if submitters.lives(&entry) {
                continue;
            }
            match target(&entry) {
                Target::File { inode, .. } => inodes.push(inode),
                Target::Paths | Target::Unknown => everything = true,
            }
            self.probes.forget_request(key).map_err(probes_failed)?;
        }
        Ok((inodes, everything))
    }
}

impl Work {
    /// Whether something is in flight that may change a file without a record before its end.
    pub(super) fn has_requests(&self) -> bool {
        self.link.requests_in_flight(u64::MAX).map_or(true, |requests| !requests.is_empty())
    }

    /// Processes that were there before the probes may have asynchronous operations in flight.
    pub(super) fn expect_asynchronous(&mut self) {
        let processes = self.link.probes.selected_processes();
        if processes.map_or(true, |processes| processes.into_iter().any(uses_asynchronous)) {
            self.engine.expect_asynchronous();
        }
    }
}

/// Whether a process has an io_uring or an AIO context. What cannot be read counts as "yes".
fn uses_asynchronous(process: u32) -> bool {
    let directory = format!("/proc/{process}");
    let aio = std::fs::read(format!("{directory}/maps"))
        .map_or(true, |maps| maps.windows(7).any(|bytes| bytes == b"/[aio] " || bytes == b"/[aio]\n"));
    let ring = || -> std::io::Result<bool> {
        for fd in std::fs::read_dir(format!("{directory}/fd"))? {
            // A descriptor can be closed between the listing and the reading.
            let Ok(target) = std::fs::read_link(fd?.path()) else { continue };
            if target.as_os_str() == "anon_inode:[io_uring]" {
                return Ok(true);
            }
        }
        Ok(false)
    };
    aio || ring().unwrap_or(true)
}
