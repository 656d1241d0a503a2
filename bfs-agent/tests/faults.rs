//! Calls of the replayer that fail: each write, sync, rename and every other change below its store in turn, once
//! or until it is mended; or at which it is killed; or at which the power of its disk fails. A scripted agent does the same to a directory and to the stream, so the tree must
//! equal that directory at every applied checkpoint; nothing that was acknowledged may be missing afterwards,
//! and what lasts must be told.

#[path = "faults/disk.rs"]
mod disk;
#[path = "faults/run.rs"]
mod run;
#[path = "faults/stream.rs"]
mod stream;

use std::panic::RefUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use bfs_tests::faults::{Effect, Fault};
use bfs_tests::random::{Random, printed_seed};
use run::Run;

/// Runs at the same time: most of each is waiting.
const AT_ONCE: usize = 6;
/// Failing calls of a run of normal length.
const SLICE: usize = 120;
/// Kills of one.
const KILLS: usize = 60;
/// Power cuts of one.
const CUTS: usize = 16;
/// Power cuts of a long run.
const LONG_CUTS: usize = 200;

#[test]
fn every_change_of_the_store_may_fail() {
    let reference = reference();
    let mut cases = Vec::new();
    for at in 1..=reference.calls {
        let kinds = [
            (libc::ENOSPC, false, false),
            (libc::EIO, false, true),
            (libc::ENOSPC, true, true),
            (libc::EIO, true, false),
        ];
        let fault = |(error, lasting, torn)| Fault { at, lasting, effect: Effect::Fails(error), torn };
        cases.extend(kinds.map(fault));
    }
    hits(&slice(cases, SLICE), reference.calls, |fault| Run::new(Some(*fault)).on_disk(fault.at).all());
}

/// The replayer is killed at each of its calls in turn, before it or in the middle of a write, and once more while it
/// makes that good.
#[test]
fn the_replayer_may_be_killed_at_every_change_of_the_store() {
    let reference = reference();
    let mut cases = Vec::new();
    for at in 1..=reference.calls {
        cases.extend([false, true].map(|torn| Fault { at, lasting: false, effect: Effect::Kills, torn }));
    }
    hits(&slice(cases, KILLS), reference.calls, |fault| {
        Run::new(Some(*fault)).on_disk(fault.at).again(at_random(fault.at)).all()
    });
}

/// The power of the store's disk fails: what was not synced is gone, or a part of it.
#[test]
fn the_power_of_the_store_may_fail_at_any_moment() {
    let reference = reference();
    let mut random = Random::new(printed_seed());
    let cuts = if is_long() { LONG_CUTS } else { CUTS };
    // With few cases each must come about, which the very last calls may not.
    let calls = reference.calls - reference.calls / 32;
    let cases: Vec<_> = (0..cuts / 2)
        .map(|_| {
            let (at, torn) = (1 + random.next() % calls, random.chance(50));
            (Fault { at, lasting: false, effect: Effect::Halts, torn }, random.next())
        })
        .collect();
    hits(&cases, reference.calls, |(fault, seed)| {
        Run::new(Some(*fault)).on_disk(*seed).again(at_random(*seed)).all()
    });
}

/// Without a fault: how many calls there are.
fn reference() -> run::Done {
    let done = Run::new(None).on_disk(0).all();
    assert!(done.written_over > 0, "no segment of the log was written over");
    done
}

/// The second time, counted from the first.
fn at_random(seed: u64) -> u64 {
    1 + Random::new(seed).next() % 60
}

fn is_long() -> bool {
    std::env::var_os("BFS_LONG").is_some()
}

/// All of them in a long run, else so many.
fn slice(cases: Vec<Fault>, count: usize) -> Vec<Fault> {
    if is_long() {
        return cases;
    }
    let mut random = Random::new(printed_seed());
    let all = cases.len();
    let (stride, from) = (all / count, random.below(all));
    // Beside each other are calls of a kind; the kinds of faults go round.
    (0..count).map(|n| cases[(from + n * stride + n % 4) % all]).collect()
}

/// Does all cases, some at the same time.
fn hits<C>(cases: &[C], calls: u64, run: impl Fn(&C) -> run::Done + Sync + RefUnwindSafe)
where
    C: Sync + RefUnwindSafe,
{
    let [next, hit, wrong] = [(); 3].map(|()| AtomicUsize::new(0));
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(fault) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match std::panic::catch_unwind(|| run(fault)) {
                        Ok(done) => hit.fetch_add(usize::from(done.failed > 0), Ordering::Relaxed),
                        Err(_) => wrong.fetch_add(1, Ordering::Relaxed),
                    };
                }
            });
        }
    });
    let (hit, wrong) = (hit.into_inner(), wrong.into_inner());
    println!("{calls} calls, {hit} of {} cases hit, {:?}", cases.len(), began.elapsed());
    assert_eq!(wrong, 0, "of {} cases so many went wrong, see above", cases.len());
    // The very last calls may not come about: how batches meet in the log is a matter of time.
    assert!(hit * 100 >= cases.len() * 90, "{hit} of {} faults came about", cases.len());
}
