//! Calls of the replayer that fail: each write, sync, rename and every other change below its store in turn, once
//! or until it is mended. A scripted agent does the same to a directory and to the stream, so the tree must
//! equal that directory at every applied checkpoint; nothing that was acknowledged may be missing afterwards,
//! and what lasts must be told.

#[path = "faults/run.rs"]
mod run;
#[path = "faults/stream.rs"]
mod stream;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use bfs_tests::faults::Fault;
use bfs_tests::random::{Random, printed_seed};
use run::Run;

/// Runs at the same time: most of each is waiting.
const AT_ONCE: usize = 6;
/// Cases of a run of normal length.
const SLICE: usize = 120;

#[test]
fn every_change_of_the_store_may_fail() {
    let reference = Run::new(None).all();
    let mut cases = Vec::new();
    for at in 1..=reference.calls {
        let kinds = [
            (libc::ENOSPC, false, false),
            (libc::EIO, false, true),
            (libc::ENOSPC, true, true),
            (libc::EIO, true, false),
        ];
        cases.extend(kinds.map(|(error, lasting, torn)| Fault { at, lasting, error, torn }));
    }
    if std::env::var_os("BFS_LONG").is_none() {
        let mut random = Random::new(printed_seed());
        let all = cases.len();
        let (stride, from) = (all / SLICE, random.below(all));
        // Beside each other are calls of a kind; the kinds of faults go round.
        cases = (0..SLICE).map(|n| cases[(from + n * stride + n % 4) % all]).collect();
    }
    let [next, hit, wrong] = [(); 3].map(|()| AtomicUsize::new(0));
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some(fault) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match std::panic::catch_unwind(|| Run::new(Some(*fault)).all()) {
                        Ok(done) => hit.fetch_add(usize::from(done.failed > 0), Ordering::Relaxed),
                        Err(_) => wrong.fetch_add(1, Ordering::Relaxed),
                    };
                }
            });
        }
    });
    let (hit, wrong) = (hit.into_inner(), wrong.into_inner());
    println!("{} calls, {} of {} cases hit, {:?}", reference.calls, hit, cases.len(), began.elapsed());
    assert_eq!(wrong, 0, "of {} cases so many went wrong, see above", cases.len());
    // The very last calls may not come about: how batches meet in the log is a matter of time.
    assert!(hit * 100 >= cases.len() * 90, "{hit} of {} faults came about", cases.len());
}
