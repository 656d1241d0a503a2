//! `verify`: comparing both sides while the program works, and what the backup has lost.
//!
//! What the program changed while it was read is compared again at a later checkpoint, a few times. With `--repair` the
//! replayer first puts back what it knows; what differs is then read and sent again like anything suspect, so the next
//! checkpoint repairs it. What the replayer says by itself to have lost is sent again without being asked.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use bfs_common::record::{CheckpointId, ObjectId};
use bfs_common::wire::StoreState;

use super::commands::{Awaited, Waiter};
use super::work::Work;
use crate::primary::clock::monotonic_ns;
use crate::primary::control::{FailureKind, Replies, Reply, State, VerifyReport};
use crate::primary::verify::{self, Found, Place, Places};

/// Checkpoints that are compared, the first one and those for what did not hold still.
const ROUNDS_MAX: u32 = 5;
/// Between two of them, at first; each time twice as long.
const PAUSE: Duration = Duration::from_millis(100);
/// For the replayer to say what it has lost.
const DAMAGE_LIMIT: Duration = Duration::from_secs(60);

/// A comparison that goes over several checkpoints. Pure.
#[derive(Clone, Debug, Default)]
pub(super) struct Comparing {
    repair: bool,
    rounds: u32,
    report: VerifyReport,
    /// What is still to be compared; `None` at first: everything.
    left: Option<Places>,
    /// What of it changed while it was compared last, in words.
    changed: Vec<String>,
    /// What differed and was sent again.
    repairing: BTreeMap<Place, Vec<String>>,
}

impl Comparing {
    pub(super) fn new(repair: bool) -> Self {
        Self { repair, ..Self::default() }
    }

    /// Takes in what one checkpoint gave.
    fn add(&mut self, found: Found) {
        let Found { report, left, different, .. } = found;
        self.rounds += 1;
        if self.rounds == 1 {
            self.report.checkpoint = report.checkpoint;
        }
        self.report.last = report.checkpoint;
        self.report.compared += report.compared;
        self.report.bytes += report.bytes;
        report.not_compared.iter().for_each(|line| self.report.skipped(line.clone()));
        self.report.not_compared_count +=
            report.not_compared_count.saturating_sub(report.not_compared.len() as u64);
        for (place, lines) in std::mem::take(&mut self.repairing) {
            if left.contains_key(&place) {
                self.repairing.insert(place, lines);
            } else if !different.contains_key(&place) {
                lines.into_iter().for_each(|line| self.report.was_repaired(line));
            }
        }
        let mut places: Places = left.keys().cloned().collect();
        self.changed = left.into_values().collect();
        if std::mem::take(&mut self.repair) && !different.is_empty() {
            // They count when they were compared again.
            self.report.compared = self.report.compared.saturating_sub(different.len() as u64);
            places.extend(different.keys().cloned());
            self.repairing.extend(different);
        } else {
            different.into_values().flatten().for_each(|line| self.report.differs(line));
            self.report.different_count +=
                report.different_count.saturating_sub(report.different.len() as u64);
        }
        self.left = Some(places);
    }

    fn goes_on(&self) -> bool {
        self.rounds < ROUNDS_MAX && self.left.as_ref().is_some_and(|left| !left.is_empty())
    }

    /// What is known now.
    fn so_far(&self) -> VerifyReport {
        let mut report = self.report.clone();
        self.changed.iter().for_each(|line| report.skipped(line.clone()));
        for line in self.repairing.values().flatten() {
            report.differs(line.clone());
        }
        report
    }

    /// The report, if there is one.
    pub(super) fn ends(&self) -> Option<Reply> {
        (self.rounds > 0).then(|| Reply::Verified(self.so_far()))
    }
}

/// What threads found out.
enum Outcome {
    /// One checkpoint was compared.
    Compared { replies: Replies, deadline: Instant, comparing: Box<Comparing>, suspects: Vec<ObjectId> },
    /// Files of which the backup has lost bytes; `None` if it did not say.
    Damage(Option<Vec<ObjectId>>),
}

impl Outcome {
    fn answer(self) {
        if let Self::Compared { replies, comparing, .. } = self {
            replies.send(Reply::Verified(comparing.so_far()));
        }
    }
}

/// Where outcomes come from.
pub(super) struct Comparisons {
    to: Sender<Outcome>,
    from: Receiver<Outcome>,
    /// The applied checkpoint of which it was asked what is lost.
    asked: CheckpointId,
}

impl Comparisons {
    pub(super) fn new() -> Self {
        let (to, from) = mpsc::channel();
        Self { to, from, asked: CheckpointId(0) }
    }
}

impl Work {
    /// Compares on a thread of its own.
    pub(super) fn compare(&self, waiter: &Waiter, comparing: &Comparing) {
        let remote = self.link.shipper.remote();
        let (replies, deadline, checkpoint) = (waiter.replies.clone(), waiter.deadline, waiter.checkpoint);
        let (group, filter) = (self.options.group.clone(), self.options.filter.clone());
        let walls: Vec<(CheckpointId, i64)> = self.marks.iter().map(|m| (m.checkpoint, m.wall_ns)).collect();
        let (mut comparing, to) = (Box::new(comparing.clone()), self.comparisons.to.clone());
        std::thread::spawn(move || {
            let rest = || deadline.saturating_duration_since(Instant::now());
            let failed = |what: &str, error: crate::primary::ship::RemoteError| {
                let hint = "look at `bfs-replayer status`, then try again";
                Reply::failed(FailureKind::Failed, format!("{what}: {error}"), hint)
            };
            let manifest = match remote.manifest(&group, checkpoint, rest()) {
                Ok(manifest) => manifest,
                Err(error) => return replies.send(failed("the backup's list of files", error)),
            };
            let wall = walls.iter().find(|w| w.0 == manifest.checkpoint).map(|w| w.1);
            let mut found = verify::compare(&manifest, wall, &filter, comparing.left.as_ref());
            let mut suspects = Vec::new();
            if comparing.repair && !found.different.is_empty() {
                suspects = std::mem::take(&mut found.objects).into_iter().collect();
                match remote.damage(&group, true, suspects.clone(), rest()) {
                    Ok(damaged) => suspects.extend(damaged),
                    Err(error) => return replies.send(failed("the backup cannot be put right", error)),
                }
            }
            comparing.add(found);
            if comparing.goes_on() && suspects.is_empty() {
                std::thread::sleep((PAUSE * 2u32.pow(comparing.rounds)).min(rest()));
            }
            let outcome = Outcome::Compared { replies, deadline, comparing, suspects };
            if let Err(mpsc::SendError(outcome)) = to.send(outcome) {
                outcome.answer();
            }
        });
    }

    /// Goes on with what was found out.
    pub(super) fn take_compared(&mut self) {
        while let Ok(outcome) = self.comparisons.from.try_recv() {
            match outcome {
                Outcome::Damage(None) => self.comparisons.asked = CheckpointId(0),
                Outcome::Damage(Some(objects)) => self.send_again(&objects),
                Outcome::Compared { replies, deadline, comparing, suspects } => {
                    self.send_again(&suspects);
                    let on = comparing.goes_on()
                        && Instant::now() < deadline
                        && self.state != State::Ending
                        && self.cannot_take().is_none();
                    if on {
                        self.ask_for(String::new(), "verify", Awaited::Verify(comparing), deadline, replies);
                    } else {
                        let report = comparing.so_far();
                        self.differences = report.different_count;
                        replies.send(Reply::Verified(report));
                    }
                }
            }
        }
    }

    fn send_again(&mut self, objects: &[ObjectId]) {
        let now = monotonic_ns();
        for object in objects {
            self.engine.send_again(*object, now);
        }
    }

    /// Asks the backup which files it has lost bytes of, once for each applied checkpoint.
    pub(super) fn ask_for_damage(&mut self) {
        let progress = self.link.shipper.progress();
        let lost = progress.connected && progress.store == StoreState::Damaged;
        if !lost || self.tally.taken == 0 || progress.applied <= self.comparisons.asked {
            return;
        }
        self.comparisons.asked = progress.applied;
        let (remote, group) = (self.link.shipper.remote(), self.options.group.clone());
        let to = self.comparisons.to.clone();
        std::thread::spawn(move || {
            let damaged = remote.damage(&group, false, Vec::new(), DAMAGE_LIMIT);
            // Nobody is left to be told when the session ended.
            let _ = to.send(Outcome::Damage(damaged.ok()));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(name: &str) -> Place {
        (b"/r".to_vec(), name.into())
    }

    fn found(checkpoint: u64, compared: u64, left: &[&str], different: &[&str]) -> Found {
        let mut report =
            VerifyReport { checkpoint: CheckpointId(checkpoint), compared, ..Default::default() };
        different.iter().for_each(|name| report.differs((*name).to_owned()));
        Found {
            report,
            left: left.iter().map(|name| (place(name), (*name).to_owned())).collect(),
            different: different.iter().map(|name| (place(name), vec![(*name).to_owned()])).collect(),
            objects: std::collections::BTreeSet::new(),
        }
    }

    #[test]
    fn what_did_not_hold_still_is_compared_later_and_not_for_ever() {
        let mut comparing = Comparing::new(false);
        comparing.add(found(3, 5, &["a", "b"], &[]));
        assert!(comparing.goes_on());
        comparing.add(found(4, 1, &["b"], &[]));
        comparing.add(found(5, 1, &[], &[]));
        assert!(!comparing.goes_on());
        let report = comparing.so_far();
        assert_eq!((report.checkpoint.0, report.last.0, report.compared), (3, 5, 7));
        assert_eq!((report.different_count, report.not_compared_count), (0, 0));
        let mut comparing = Comparing::new(false);
        let mut rounds = 0;
        while rounds == 0 || comparing.goes_on() {
            rounds += 1;
            comparing.add(found(rounds, 0, &["a"], &[]));
        }
        assert_eq!((rounds, comparing.so_far().not_compared), (u64::from(ROUNDS_MAX), vec!["a".to_owned()]));
    }

    #[test]
    fn what_is_sent_again_counts_when_it_was_compared_again() {
        let mut comparing = Comparing::new(true);
        comparing.add(found(3, 5, &[], &["a", "b", "c"]));
        assert!(comparing.goes_on());
        // Broken off here, they differ.
        assert_eq!(comparing.so_far().different_count, 3);
        comparing.add(found(4, 1, &["b"], &["c"]));
        comparing.add(found(5, 1, &[], &[]));
        assert!(!comparing.goes_on());
        let report = comparing.so_far();
        assert_eq!((report.repaired, report.different), (vec!["a".into(), "b".into()], vec!["c".to_owned()]));
    }
}
