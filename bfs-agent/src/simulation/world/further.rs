//! Destinations beside the first, each with a store and a disk of its own. What is real: the records that are kept for
//! them, what is decided by them, and the taking in of a stream. What must hold: what one said that it has stays there, is
//! what the primary was, and the first destination comes to have it, too.

use std::path::PathBuf;

use bfs_common::record::CheckpointId;
use bfs_common::wire::GenerationLine;
use bytes::{Bytes, BytesMut};

use super::{Host, World, compare, writer};
use crate::backup::group::simulated::{NAME, Simulated};
use crate::generation::next::{Apart, Step};
use crate::primary::further::{Way, from_another, way};
use crate::simulation::disk::{self, Failure};

/// Bytes that come together.
const PIECE: usize = 500;

/// One of them.
pub(super) struct Further {
    disk: usize,
    folder: PathBuf,
    replayer: Option<Simulated>,
    /// The newest that a courier knows there.
    told: CheckpointId,
}

impl Further {
    pub(super) fn new(folder: PathBuf, seed: u64) -> Self {
        std::fs::create_dir(&folder).unwrap();
        let disk = disk::install(&folder, seed);
        Self { disk, folder, replayer: None, told: CheckpointId(0) }
    }

    /// Whether it has applied this one.
    pub(super) fn is_at(&self, checkpoint: CheckpointId) -> bool {
        self.replayer.as_ref().is_some_and(|replayer| replayer.progress().applied == checkpoint)
    }

    /// For the message of a run that goes wrong.
    pub(super) fn stands(&self) -> String {
        format!("{:?} told {}", self.replayer.as_ref().map(Simulated::progress), self.told)
    }
}

impl World {
    /// One of them gets a step further.
    pub(super) fn further_turn(&mut self) {
        let of = self.random.below(self.further.len());
        self.start_further(of);
        match self.random.below(10) {
            0..5 => self.courier(of),
            5..8 => self.apply_further(of),
            8 if self.random.chance(30) => self.hang_up(of),
            9 if !self.calm && self.random.chance(30) => {
                let how = *self.random.of(&[Failure::Kill, Failure::Power, Failure::Power, Failure::Once]);
                disk::fail_at(self.further[of].disk, self.random.below(40) as u64, how);
            }
            _ => {}
        }
    }

    fn start_further(&mut self, of: usize) {
        let disk = self.further[of].disk;
        if disk::has_failed(disk) {
            self.further[of].replayer = None;
            self.hang_up(of);
            self.count(disk::start(disk));
        }
        if self.further[of].replayer.is_some() || !(self.calm || self.random.chance(30)) {
            return;
        }
        let refused = disk::refused(disk);
        match Simulated::open(&self.further[of].folder, writer(0), self.retention.clone()) {
            Ok(replayer) => {
                let (told, progress) = (self.further[of].told, replayer.progress());
                assert!(progress.confirmed >= told, "{told} was there, now {}", progress.confirmed);
                self.further[of].replayer = Some(replayer);
            }
            Err(_) if disk::has_failed(disk) || disk::refused(disk) > refused => {}
            Err(error) => panic!("the store of further destination {of} cannot be opened: {error}"),
        }
    }

    /// No agent has a connection to it any more.
    fn hang_up(&mut self, of: usize) {
        let agents = self.hosts.iter_mut().filter_map(|host| host.agent.as_mut());
        agents.filter_map(|agent| agent.couriers.as_mut()).for_each(|couriers| couriers.hang_up(of));
    }

    /// What the agent's courier does in a round.
    fn courier(&mut self, of: usize) {
        let Host { agent: Some(agent), .. } = &mut self.hosts[self.at] else { return };
        let sealed = agent.queue.sealed();
        let (Some(couriers), Some(replayer)) = (&mut agent.couriers, &self.further[of].replayer) else {
            return;
        };
        let newest = couriers.newest(of, || replayer.lines().unwrap().pop());
        let number = newest.as_ref().map_or(CheckpointId(0), |line| line.checkpoint);
        let applied = replayer.progress().applied;
        let view = couriers.sealed(sealed);
        self.further[of].told = self.further[of].told.max(number);
        let way = match way(newest.as_ref(), view.as_ref().map_or(&[], |view| &view.marks)) {
            Ok(Way::Here) => return,
            // It takes no more before.
            Ok(_) if applied < number => return,
            Ok(way) => way,
            Err(apart) => return self.is_apart(of, &apart),
        };
        let found = match (way, view) {
            (Way::Step(from, to), Some(view)) => {
                self.seen.steps += 1;
                let line = view.marks[to].moment.line();
                let mut pieces = Vec::new();
                let mut sink = |piece| {
                    pieces.push(piece);
                    true
                };
                if view.stream((NAME, writer(0)), (from, to), &mut sink).is_err() {
                    // Past the bound the oldest go, also while nobody has looked yet which there are.
                    return self.hang_up(of);
                }
                Some((line, pieces))
            }
            _ => match self.brought_by_others(of, newest) {
                Ok(found) => found,
                Err(apart) => return self.is_apart(of, &apart),
            },
        };
        if let Some((line, pieces)) = found {
            self.bring(of, line, &pieces);
        }
    }

    /// What another destination has for this one: the first that has something.
    #[allow(clippy::type_complexity, reason = "taken apart at once")]
    fn brought_by_others(
        &mut self,
        of: usize,
        newest: Option<GenerationLine>,
    ) -> Result<Option<(GenerationLine, Vec<Bytes>)>, Apart> {
        let ours: Vec<_> = newest.into_iter().collect();
        let others = self.further.iter().enumerate().filter(|(at, _)| *at != of);
        let others = others.filter_map(|(_, further)| further.replayer.as_ref());
        let first = self.replayer.iter().map(|first| (first, true));
        let mut apart = None;
        for (there, is_first) in first.chain(others.map(|other| (other, false))) {
            let theirs = there.lines().unwrap();
            match from_another(&ours, &theirs, is_first) {
                Ok(Step::Wait) => {}
                Ok(Step::Done(_)) => return Ok(None),
                Ok(Step::Take { older, newest }) => {
                    let line = theirs.into_iter().find(|line| line.checkpoint == newest);
                    let pieces = there.send(older, newest).expect("what it keeps");
                    self.seen.carried += 1;
                    return Ok(line.map(|line| (line, pieces)));
                }
                Err(error) => apart = Some(error),
            }
        }
        apart.map_or(Ok(None), Err)
    }

    /// A stream goes there, or the connection breaks in the middle, or right behind it.
    fn bring(&mut self, of: usize, line: GenerationLine, pieces: &[Bytes]) {
        let mut all = BytesMut::new();
        pieces.iter().for_each(|piece| all.extend_from_slice(piece));
        let breaks = !self.calm && self.random.chance(10);
        if breaks {
            all.truncate(self.random.below(all.len() + 1));
        }
        let all = all.freeze();
        let pieces: Vec<_> =
            (0..all.len()).step_by(PIECE).map(|at| all.slice(at..all.len().min(at + PIECE))).collect();
        self.number += 1;
        let further = &mut self.further[of];
        let Some(replayer) = &mut further.replayer else { return };
        match replayer.receive(self.number, &pieces) {
            Ok(checkpoint) => {
                assert_eq!(checkpoint, line.checkpoint);
                if breaks {
                    return self.hang_up(of);
                }
                further.told = checkpoint;
                let couriers = self.hosts[self.at].agent.as_mut().and_then(|agent| agent.couriers.as_mut());
                if let Some(couriers) = couriers {
                    couriers.has(of, line);
                }
            }
            Err(_) => self.hang_up(of),
        }
    }

    /// It can never catch up: whoever runs it begins again with an empty store.
    fn is_apart(&mut self, of: usize, apart: &Apart) {
        let may_be = matches!(apart, Apart::Merged(_)) || self.seen.promotions > 0;
        assert!(may_be, "further destination {of}: {apart}; {}", self.stands());
        self.seen.begun_again += 1;
        self.hang_up(of);
        let further = &mut self.further[of];
        (further.replayer, further.told) = (None, CheckpointId(0));
        std::fs::remove_dir_all(&further.folder).unwrap();
        std::fs::create_dir(&further.folder).unwrap();
        disk::begin_again(further.disk);
    }

    fn apply_further(&mut self, of: usize) {
        let Further { disk, replayer: Some(replayer), .. } = &self.further[of] else { return };
        disk::works_on(*disk);
        let refused = disk::refused(*disk);
        let done = replayer.apply();
        disk::works_on(super::BACKUP);
        match done {
            Ok(true) => self.check_further(of, false),
            Ok(false) => {}
            Err(_) if disk::has_failed(*disk) || disk::refused(*disk) > refused => {}
            Err(error) => panic!("a step of further destination {of}: {error}"),
        }
    }

    /// What it gives out is what the primary was.
    pub(super) fn check_further(&mut self, of: usize, all: bool) {
        let Further { folder, disk, replayer: Some(replayer), .. } = &self.further[of] else { return };
        if disk::has_failed(*disk) || replayer.is_applying() {
            return;
        }
        let mut lines = replayer.lines().unwrap();
        let Some(newest) = lines.last().cloned() else { return };
        self.seen.applied_further += 1;
        if all {
            let stream = self.stream();
            assert_eq!(stream.label(newest.checkpoint), Some(&newest.label), "the newest is of nobody");
            let strange = lines.iter().find(|line| stream.label(line.checkpoint) != Some(&line.label));
            assert!(self.promotes || strange.is_none(), "the first destination never had {strange:?}");
        } else {
            lines = vec![lines[self.random.below(lines.len())].clone()];
        }
        let state = |line: &GenerationLine| {
            let known = self.states.get(&(line.checkpoint, line.label.wall_ns));
            known.unwrap_or_else(|| panic!("further destination {of}: {line:?} is of nobody"))
        };
        let kept: Vec<_> = lines.iter().map(|line| (line.checkpoint, state(line))).collect();
        compare(replayer, &folder.join("tree/g/r"), state(&newest), &kept);
    }
}
