//! What becomes durable of what an agent ships, its end, and what the next one finds.

use bfs_common::record::{CheckpointId, Sequence};

use super::super::{Engine, Request, Stop, Taken};
use super::backup::Backup;
use super::border::Border;
use super::expected;
use super::fs::Fs;
use super::world::World;

/// All that was shipped is durable at the backup; whether the marker is among it, where the backup has to be what the
/// calls up to it made.
pub(super) fn durable(
    world: &mut World,
    backup: &mut Backup,
    base: &Fs,
    taken: Option<&Taken>,
    border: Border,
) -> bool {
    let mut marked = false;
    for (batch, done) in std::mem::take(&mut world.shipped) {
        world.released = batch.ring_position.unwrap_or(world.released);
        let Some(number) = backup.apply(&batch) else { continue };
        let taken = taken.filter(|taken| taken.checkpoint == number).expect("the marker of the checkpoint");
        marked = true;
        let (got, want) = (backup.dump(), expected(base, &world.done[..done], taken.at_ns, border));
        let differ = |a: &[String], b: &[String]| -> Vec<String> {
            a.iter().filter(|l| !b.contains(l)).cloned().collect()
        };
        assert!(
            got == want,
            "seed {}, checkpoint {} at {}, stop {}\nonly on the backup: {:#?}\nonly on the primary: {:#?}\nlast calls: {}",
            world.seed,
            taken.checkpoint,
            taken.at_ns,
            taken.stopped,
            differ(&got, &want),
            differ(&want, &got),
            world.done.iter().rev().take(24).map(|d| format!("\n  {d:?}")).collect::<String>()
        );
    }
    world.base = backup.clone();
    let released = world.released;
    world.unreleased.retain(|event| event.ring_position > released);
    world.forget_up_to(Sequence(backup.next));
    marked
}

/// The agent dies at some moment behind a checkpoint, perhaps within the next one. Of what it shipped the beginning is
/// durable. Gives the last checkpoint.
pub(super) fn dies(
    world: &mut World,
    engine: &mut Engine,
    (backup, base): (&mut Backup, &Fs),
    last: CheckpointId,
    border: Border,
) -> CheckpointId {
    for _ in 0..world.random.next(100) {
        world.step();
    }
    let way = world.random.next(4);
    if way > 0 {
        engine.drain(world).unwrap();
        engine.flush(world).unwrap();
    }
    let taken = (way > 1).then(|| {
        for _ in 0..world.random.next(20) {
            world.step();
        }
        let request = Request { tag: String::new(), trigger: "manual", wall_ns: 0, stop: Stop::IfNeeded };
        engine.checkpoint(world, &request).unwrap()
    });
    let keeps = world.random.next(world.shipped.len() as u64 + 1) as usize;
    world.shipped.truncate(keeps);
    let marked = durable(world, backup, base, taken.as_ref(), border);
    taken.filter(|_| marked).map_or(last, |taken| taken.checkpoint)
}

impl World {
    /// What an agent read that is not durable stands in the ring.
    pub(super) fn give_back(&mut self) {
        let read = std::mem::take(&mut self.unreleased);
        read.into_iter().rev().for_each(|event| self.ring.push_front(event));
    }
}
