//! Memory that is dumped ahead, in rounds, while the processes run: each takes what changed since the one before, and the
//! dump within the stop what changed since the last. The kernel has to tell what that is.
//!
//! A set of images then has folders `ahead-N` in it, each with a link `parent` to the one before; CRIU follows these at a
//! restore. Where a round fails, the whole memory is dumped within the stop: the kernel may have been told already to forget
//! what had changed until then. For the same reason nobody else may dump ahead between the first round and the dump.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::criu::{DUMP_LOG, reason};
use super::{Images, ImagesError, LIMIT, PRINTED, begin, other, room, size};

/// Memory of which less than this may be dumped within the stop, bytes: a round takes as long as that does.
const ENOUGH: u64 = 8 << 20;

/// How long it is waited for CRIU between two turns of what goes on beside it.
const BESIDE: Duration = Duration::from_millis(1);

/// What came of the rounds before the last dump.
#[derive(Clone, Debug, Default)]
pub struct Ahead {
    /// How many.
    pub rounds: u32,
    /// What they dumped, bytes.
    pub bytes: u64,
    /// How long they took, beside the processes.
    pub took: Duration,
    /// Why there are none, where there might be.
    pub failure: Option<String>,
}

/// The folder of a round, counted from 1, in a set.
pub(super) fn name(round: u32) -> String {
    format!("ahead-{round}")
}

impl Images {
    /// Dumps memory ahead of the next dump, if there is enough of it to be worth that. `beside` is called again and again
    /// meanwhile.
    pub fn dump_ahead(&mut self, beside: &mut dyn FnMut()) {
        (self.tally.ahead, self.tracking) = (Ahead::default(), None);
        if !self.criu.tracks_memory() || self.rounds == 0 {
            return;
        }
        let since = Instant::now();
        let done = self.rounds(beside);
        let took = since.elapsed();
        self.tally.ahead = match done {
            Ok(ahead) => Ahead { took, ..ahead },
            Err(e) => {
                self.tracking = None;
                Ahead { took, failure: Some(e.to_string()), ..Ahead::default() }
            }
        };
    }

    fn rounds(&mut self, beside: &mut dyn FnMut()) -> Result<Ahead, ImagesError> {
        let mut ahead = Ahead::default();
        let (root, processes) = self.tree()?;
        let memory = room::memory_of(&processes);
        if memory < ENOUGH {
            return Ok(ahead);
        }
        self.tracking = Some(tracking(&self.cgroup)?);
        // All of it once more, should it have changed by then.
        room::check(&self.folder, memory.saturating_mul(2))?;
        let unfinished = self.begin()?;
        let mut last = u64::MAX;
        while ahead.rounds < self.rounds {
            let round = ahead.rounds + 1;
            let folder = unfinished.join(name(round));
            let bytes = self.round(root, &folder, ahead.rounds, beside)?;
            (ahead.rounds, ahead.bytes) = (round, ahead.bytes + bytes);
            if bytes < ENOUGH || bytes > last / 2 {
                break;
            }
            last = bytes;
        }
        Ok(ahead)
    }

    /// One round behind so many; gives its bytes.
    fn round(
        &self,
        root: i32,
        folder: &Path,
        before: u32,
        beside: &mut dyn FnMut(),
    ) -> Result<u64, ImagesError> {
        DirBuilder::new().mode(0o700).create(folder).map_err(other(format!("mkdir {}", folder.display())))?;
        let before = (before > 0).then(|| format!("../{}", name(before)));
        let line = self.criu.dump_ahead(root, folder, before.as_deref());
        let failed = ImagesError::Dump;
        let mut contained = self.contained();
        begin(&mut contained, &line, None, &folder.join(PRINTED), |_| Ok(())).map_err(failed)?;
        let since = Instant::now();
        let ended = loop {
            beside();
            match contained.tool_within(BESIDE).map_err(|e| failed(e.to_string()))? {
                Some(ended) => break ended,
                None if since.elapsed() >= LIMIT => return Err(failed("it does not end".into())),
                None => {}
            }
        };
        if !ended.success() {
            return Err(failed(reason(&folder.join(DUMP_LOG))));
        }
        size(folder).map_err(other("measure the images"))
    }
}

/// The right to have the kernel forget what changed, of all in a cgroup, for as long as it is open.
fn tracking(cgroup: &Path) -> Result<File, ImagesError> {
    let path = cgroup.join("cgroup.procs");
    let shown = || path.display().to_string();
    let file = File::open(&path).map_err(other(shown()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => {
            Err(ImagesError::Dump("another agent dumps the same processes ahead".into()))
        }
        Err(e) => Err(other(shown())(e.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn one_at_a_time_dumps_ahead() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("cgroup.procs"), "").unwrap();
        let first = tracking(dir.path()).unwrap();
        assert!(tracking(dir.path()).unwrap_err().to_string().contains("another agent"));
        drop(first);
        tracking(dir.path()).unwrap();
    }
}
