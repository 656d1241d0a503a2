//! Agent, network, replayer and disks in one thread, from a seed.
//!
//! Real are the queue, the spool and its reader on one side, the gate, the log, the index, the plan, the applier
//! and the reading of generations on the other. Simulated are the program, the ring, the connections, the turns of
//! the threads, and what a disk keeps ([`disk`]). `BFS_SEED` runs one seed; `BFS_LONG` runs ten times as many.

mod agent;
pub mod disk;
mod stream;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use bfs_tests::random::given_seed;

use crate::mutant::{self, Mutant};
use world::{Seen, World};

/// Seeds of a run of normal length.
const SEEDS: u64 = 2000;
/// Seeds beyond those that went wrong once: a reader of the spool that had read ahead what a failed write left.
const ONCE_WRONG: [u64; 1] = [2809];
/// By then a mutant must be caught.
const MUTANT_SEEDS: u64 = 1000;

/// One run; what went wrong is printed by the panic.
fn run(seed: u64, mutant: Option<Mutant>) -> Option<Seen> {
    // In memory: each seed syncs some hundred times.
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    mutant::set(mutant);
    let mut world = World::new(seed, folder.path().to_owned());
    let done = catch_unwind(AssertUnwindSafe(|| world.run()));
    mutant::set(None);
    disk::remove_all();
    done.ok().map(|()| world.seen)
}

#[test]
fn what_is_given_out_is_confirmed_and_what_was_acknowledged_is_there() {
    if let Some(seed) = given_seed() {
        println!("{:?}", run(seed, None).expect("see above"));
        return;
    }
    let seeds = if std::env::var_os("BFS_LONG").is_some() { SEEDS * 10 } else { SEEDS };
    let next = AtomicU64::new(0);
    let all: Vec<Seen> = std::thread::scope(|scope| {
        let work = || {
            let mut all = Vec::new();
            loop {
                let turn = next.fetch_add(1, Ordering::Relaxed);
                let further = turn.checked_sub(seeds).map(|index| ONCE_WRONG.get(index as usize));
                let Some(seed) = further.map_or(Some(turn), |seed| seed.copied()) else { return all };
                match run(seed, None) {
                    Some(seen) => all.push(seen),
                    None => panic!("BFS_SEED={seed} goes wrong, see above"),
                }
            }
        };
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("a seed goes wrong, see above")).collect()
    });
    let sum = |what: fn(&Seen) -> u64| all.iter().map(what).sum::<u64>();
    println!(
        "{} seeds: {} checkpoints applied, {} kills, {} power cuts, {} failed calls, {} agents, {} markers refused",
        all.len(),
        sum(|s| s.applied),
        sum(|s| s.kills),
        sum(|s| s.power_cuts),
        sum(|s| s.failed_calls),
        sum(|s| s.agents),
        sum(|s| s.refused_markers),
    );
    // Each of these must have come about, and often.
    let often: [fn(&Seen) -> u64; 7] = [
        |s| s.applied,
        |s| s.kills,
        |s| s.power_cuts,
        |s| s.failed_calls,
        |s| s.agents,
        |s| s.refused_markers,
        |s| s.spooled,
    ];
    for what in often {
        assert!(sum(what) > seeds / 20);
    }
}

#[test]
fn a_seed_does_the_same_each_time() {
    let seen = || run(7, None).map(|seen| format!("{seen:?}"));
    assert_eq!(seen(), seen());
}

/// The seed that notices.
fn caught(mutant: Mutant) {
    let seed = (0..MUTANT_SEEDS).find(|seed| run(*seed, Some(mutant)).is_none());
    println!("{mutant:?} is noticed by seed {seed:?}");
    assert!(seed.is_some(), "{mutant:?} is not noticed by {MUTANT_SEEDS} seeds");
}

#[test]
fn an_acknowledgement_before_the_sync_is_noticed() {
    caught(Mutant::AcknowledgesBeforeSync);
}

#[test]
fn before_images_that_are_taken_again_are_noticed() {
    caught(Mutant::RetakesImages);
}

#[test]
fn a_checkpoint_over_a_gap_is_noticed() {
    caught(Mutant::ConfirmsOverGap);
}

#[test]
fn a_position_before_the_sync_is_noticed() {
    caught(Mutant::MovesPositionBeforeSync);
}

#[test]
fn a_redo_by_name_is_noticed() {
    caught(Mutant::RedoesByName);
}
