//! When there is no room for what the backup misses: only what is touched is noted, until it is back.

use std::path::Path;

use super::work::Work;
use crate::primary::spool::DIRECTORY;

impl Work {
    /// Whether the engine only notes what is touched.
    pub(super) fn note_only(&mut self, noting: bool) {
        self.engine.note_only(noting);
        self.link.noting = noting;
        self.link.shipper.note_only(noting);
    }

    /// The backup is back and has what the spool held: what was noted can be read.
    pub(super) fn note_no_longer(&mut self) {
        let progress = self.link.shipper.progress();
        if self.engine.is_noting() && progress.connected && progress.spool.records == 0 {
            self.note_only(false);
        }
    }

    /// The command that sends what the spool holds when this agent has ended.
    pub(super) fn send_by(&self) -> String {
        let mut command = format!("bfs-agent flush --group {}", self.options.group);
        if self.options.spool.directory != Path::new(DIRECTORY) {
            command.push_str(&format!(" --spool {}", self.options.spool.directory.display()));
        }
        command
    }
}
