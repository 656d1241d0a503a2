//! Another host becomes the primary.

use bfs_common::record::{CheckpointId, PathBytes};
use bfs_common::wire::{History, Promoter, Refusal};

use super::{BACKUP, Host, NAMES, World, writer};
use crate::simulation::disk::{self, Failure};

impl World {
    /// Another host becomes the primary, whether or not this one answers; and may so again.
    pub(super) fn promotion(&mut self) {
        if self.promoted.is_some() {
            if self.random.chance(10) {
                self.finish_promotion();
            }
            return;
        }
        if self.asked.is_some() || self.acknowledged.1 == CheckpointId(0) {
            return;
        }
        let to = 1 - self.writer;
        let Some(replayer) = &mut self.replayer else { return };
        if self.random.below(50) > 0 || !replayer.has_room() {
            return;
        }
        if self.random.chance(25) {
            let how = *self.random.of(&[Failure::Kill, Failure::Power, Failure::Once, Failure::Once]);
            disk::fail_at(BACKUP, self.random.below(8) as u64, how);
        }
        self.promote(to);
    }

    /// A host is promoted.
    fn promote(&mut self, to: usize) {
        let Some(replayer) = &mut self.replayer else { return };
        let by =
            Promoter { writer: writer(to), host: NAMES[to].into(), to: PathBytes::new(self.folder.as_ref()) };
        match replayer.promote(by) {
            Ok(history) => self.is_promoted(to, history),
            // What was taken did not become durable; or the promotion itself, which may stand there all the same.
            Err(Refusal::Store(_)) if disk::has_failed(BACKUP) || disk::refused(BACKUP) > 0 => {
                self.asked = Some(to);
            }
            Err(refusal) => panic!("it cannot be promoted: {refusal}"),
        }
    }

    /// What became of a promotion that was said to have failed.
    pub(super) fn settle_promotion(&mut self) {
        let (Some(to), Some(replayer)) = (self.asked, &self.replayer) else { return };
        match replayer.newest_promotion() {
            Ok(found) => {
                self.asked = None;
                if let Some(history) = found.filter(|history| Some(history.history) != self.newest) {
                    self.seen.late_promotions += 1;
                    self.is_promoted(to, history);
                }
            }
            Err(_) if disk::has_failed(BACKUP) || disk::refused(BACKUP) > 0 => {}
            Err(refusal) => panic!("nobody knows who is the primary: {refusal}"),
        }
    }

    /// This host is the primary now, with what the other one had at the promotion.
    fn is_promoted(&mut self, to: usize, history: History) {
        let confirmed = self.acknowledged.1;
        assert!(history.at >= confirmed, "{confirmed} was confirmed, promoted is {}", history.at);
        self.seen.promotions += 1;
        // What is there of a life before is not what is promoted.
        if to < self.hosts.len() {
            self.agent_dies(to);
        }
        let before = &self.hosts[self.writer].primary;
        let boot = self.hosts.get(to).map_or(101, |host| host.primary.boot.wrapping_add(1));
        let host = Host { primary: before.promoted(history.at, boot), agent: None };
        match self.hosts.get_mut(to) {
            Some(old) => *old = host,
            None => self.hosts.push(host),
        }
        self.writer = to;
        self.newest = Some(history.history);
        (self.promoted, self.finishing) = (Some(history), false);
    }

    pub(super) fn finish_promotion(&mut self) {
        if let (Some(history), Some(replayer)) = (&self.promoted, &self.replayer) {
            self.finishing = true;
            if replayer.promotion_is_done(history).is_ok() {
                self.promoted = None;
            }
        }
    }

    /// A promotion at rest, in which the event of the disk with this number fails, and a crash afterwards. What it was
    /// known to be before the crash is what it is after it. Whether it failed.
    pub fn promotes_beside(&mut self, event: u64, crash: Failure) -> bool {
        self.come_to_rest();
        disk::fail_at(BACKUP, event, Failure::Once);
        self.promote(1);
        disk::calm();
        let failed = self.asked.is_some();
        self.settle_promotion();
        assert_eq!(self.asked, None, "the disk is well again, and nobody knows how it ended");
        disk::fail_now(BACKUP, crash);
        while self.replayer.is_none() || disk::has_failed(BACKUP) {
            self.start_hosts();
        }
        let found = self.replayer.as_ref().map(|replayer| replayer.newest_promotion().unwrap());
        let found = found.flatten().map(|history| history.history);
        assert_eq!(found, self.newest, "event {event}: what stood before the crash");
        failed
    }
}
