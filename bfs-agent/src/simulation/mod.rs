//! Agent, network, replayer and disks in one thread, from a seed.
//!
//! Real are the queue, the spool and its reader on one side, the gate, the log, the index, the plan, the applier
//! and the reading of generations on the other. Simulated are the program, the ring, the connections, the turns of
//! the threads, and what a disk keeps ([`disk`]). `BFS_SEED` runs one seed; `BFS_LONG` runs ten times as many.

mod agent;
mod couriers;
pub mod disk;
mod primary;
mod stream;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use bfs_tests::random::given_seed;

use crate::mutant::{self, Mutant};
use disk::Failure;
use world::{Beside, Seen, World};

/// Seeds of a run of normal length.
const SEEDS: u64 = 2000;
/// Of those in which others are promoted.
const PROMOTING_SEEDS: u64 = 600;
/// Seeds beyond those that went wrong once: a reader of the spool that had read ahead what a failed write left.
const ONCE_WRONG: [u64; 1] = [2809];
/// Of those with further destinations; and of those with both.
const FURTHER_SEEDS: u64 = 120;
const BOTH_SEEDS: u64 = 60;
/// What the runs have beside a primary, its destination and the network.
const ALONE: Beside = Beside { promotes: false, further: false };
const PROMOTES: Beside = Beside { promotes: true, further: false };
const FURTHER: Beside = Beside { promotes: false, further: true };
const BOTH: Beside = Beside { promotes: true, further: true };
/// By then a mutant must be caught.
const MUTANT_SEEDS: u64 = 1000;

/// One run; what went wrong is printed by the panic.
fn run(seed: u64, mutant: Option<Mutant>, beside: Beside) -> Option<Seen> {
    with_world(seed, mutant, beside, |world| {
        world.run();
        std::mem::take(&mut world.seen)
    })
}

/// Does something with a world of its own.
fn with_world<T>(
    seed: u64,
    mutant: Option<Mutant>,
    beside: Beside,
    work: impl FnOnce(&mut World) -> T,
) -> Option<T> {
    // In memory: each seed syncs some hundred times.
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    mutant::set(mutant);
    let mut world = World::new(seed, folder.path().to_owned(), beside);
    let done = catch_unwind(AssertUnwindSafe(|| work(&mut world)));
    mutant::set(None);
    disk::remove_all();
    done.ok()
}

/// What came about, summed up.
struct Sum(Vec<Seen>);

impl Sum {
    fn of(&self, what: impl Fn(&Seen) -> u64) -> u64 {
        self.0.iter().map(what).sum()
    }
}

/// Runs one seed that is asked for, or these and the further ones; gives what must have come about often.
fn run_all(seeds: u64, further: &[u64], beside: Beside) -> Option<Sum> {
    if let Some(seed) = given_seed() {
        println!("{:?}", run(seed, None, beside).expect("see above"));
        return None;
    }
    let seeds = if std::env::var_os("BFS_LONG").is_some() { seeds * 10 } else { seeds };
    let next = AtomicU64::new(0);
    let all: Vec<Seen> = std::thread::scope(|scope| {
        let work = || {
            let mut all = Vec::new();
            loop {
                let turn = next.fetch_add(1, Ordering::Relaxed);
                let further = turn.checked_sub(seeds).map(|index| further.get(index as usize));
                let Some(seed) = further.map_or(Some(turn), |seed| seed.copied()) else { return all };
                match run(seed, None, beside) {
                    Some(seen) => all.push(seen),
                    None => panic!("BFS_SEED={seed} goes wrong, see above"),
                }
            }
        };
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("a seed goes wrong, see above")).collect()
    });
    let sum = Sum(all);
    println!(
        "{} seeds: {} checkpoints applied, {} kills, {} power cuts, {} failed calls, {} agents, {} markers refused, \
         {} promotions, {} refused who were fenced; {} starts behind a segment written over; to further destinations {} steps and {} of others, {} begun again",
        sum.0.len(),
        sum.of(|s| s.applied),
        sum.of(|s| s.kills),
        sum.of(|s| s.power_cuts),
        sum.of(|s| s.failed_calls),
        sum.of(|s| s.agents),
        sum.of(|s| s.refused_markers),
        sum.of(|s| s.promotions),
        sum.of(|s| s.fenced),
        sum.of(|s| s.renewed),
        sum.of(|s| s.steps),
        sum.of(|s| s.carried),
        sum.of(|s| s.begun_again),
    );
    let mut often: Vec<fn(&Seen) -> u64> =
        vec![|s| s.applied, |s| s.kills, |s| s.power_cuts, |s| s.failed_calls, |s| s.agents, |s| s.spooled];
    if beside.further {
        often.extend([(|s| s.steps) as fn(&Seen) -> u64, |s| s.carried, |s| s.applied_further]);
    } else {
        often.extend([(|s| s.refused_markers) as fn(&Seen) -> u64, |s| s.renewed]);
    }
    for what in often {
        assert!(sum.of(what) > seeds / 20);
    }
    Some(sum)
}

#[test]
fn what_is_given_out_is_confirmed_and_what_was_acknowledged_is_there() {
    run_all(SEEDS, &ONCE_WRONG, ALONE);
}

#[test]
fn nothing_acknowledged_is_lost_with_a_promotion_and_nothing_comes_of_who_is_fenced() {
    if let Some(sum) = run_all(PROMOTING_SEEDS, &[], PROMOTES) {
        assert!(sum.of(|s| s.promotions) > PROMOTING_SEEDS / 2 && sum.of(|s| s.fenced) > PROMOTING_SEEDS / 2);
        // Said to have failed, and it stood; there and back again.
        assert!(sum.of(|s| u64::from(s.late_promotions > 0)) > 0);
        assert!(sum.of(|s| u64::from(s.promotions > 1)) > PROMOTING_SEEDS / 10);
    }
}

#[test]
fn further_destinations_have_what_the_primary_was_and_nothing_that_the_first_never_has() {
    run_all(FURTHER_SEEDS, &[], FURTHER);
}

#[test]
fn further_destinations_beside_promotions_come_to_what_the_new_primary_is() {
    run_all(BOTH_SEEDS, &[], BOTH);
}

#[test]
fn a_seed_does_the_same_each_time() {
    for beside in [ALONE, PROMOTES, FURTHER, BOTH] {
        let seen = || run(7, None, beside).map(|seen| format!("{seen:?}"));
        assert_eq!(seen(), seen());
    }
}

/// The seed that notices.
fn caught(mutant: Mutant) {
    let beside = match mutant {
        Mutant::AdmitsFenced => PROMOTES,
        Mutant::SendsUnsealed => FURTHER,
        _ => ALONE,
    };
    let seed = (0..MUTANT_SEEDS).find(|seed| run(*seed, Some(mutant), beside).is_none());
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
fn a_segment_that_comes_back_with_the_bytes_of_another_is_noticed() {
    caught(Mutant::RenewsBeforeSync);
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

#[test]
fn a_fenced_primary_that_is_let_in_is_noticed() {
    caught(Mutant::AdmitsFenced);
}

#[test]
fn what_is_not_sealed_and_goes_to_further_destinations_is_noticed() {
    caught(Mutant::SendsUnsealed);
}

/// A promotion, beside a failure of each event of the disk in it; then a crash. How often it failed.
fn promotions_beside_failures(mutant: Option<Mutant>) -> Option<u32> {
    let mut all = 0;
    for crash in [Failure::Kill, Failure::Power] {
        for event in 0.. {
            let failed = with_world(0, mutant, PROMOTES, |world| world.promotes_beside(event, crash))?;
            all += u32::from(failed);
            if !failed && event > 20 {
                break;
            }
        }
    }
    Some(all)
}

#[test]
fn a_promotion_that_failed_is_after_a_crash_what_it_was_before() {
    let failed = promotions_beside_failures(None).unwrap();
    assert!(failed > 0);
}

#[test]
fn a_promotion_in_doubt_that_is_forgotten_is_noticed() {
    assert_eq!(promotions_beside_failures(Some(Mutant::ForgetsDoubt)), None);
}
