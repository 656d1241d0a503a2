//! The gate: at no moment does a watcher of the backup see anything of a pending checkpoint, and an
//! acknowledgement waits for the sync.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bfs_tests::exercise;
use bfs_tests::programs::append::AppendWriters;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{How, Transport, World, rounds};

/// Size, mtime and ctime (in ns) of every file: any touch changes the last.
type Snapshot = BTreeMap<PathBuf, (u64, i128, i128)>;

fn snapshot(root: &Path) -> Snapshot {
    let mut all = Snapshot::new();
    let mut left = vec![root.to_owned()];
    while let Some(path) = left.pop() {
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        let time = |s: i64, n: i64| i128::from(s) * 1_000_000_000 + i128::from(n);
        let times = (time(meta.mtime(), meta.mtime_nsec()), time(meta.ctime(), meta.ctime_nsec()));
        if meta.is_dir() {
            left.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()));
        }
        all.insert(path, (meta.len(), times.0, times.1));
    }
    all
}

#[test]
fn nothing_of_a_pending_checkpoint_is_ever_seen() {
    let mut world = World::new("gate", Transport::Unix).unwrap();
    world.start(&AppendWriters, How::Run).unwrap();
    // The first checkpoint may still be on its way while the program begins.
    world.checkpoint().unwrap();
    // Odd while a checkpoint is asked for and applied, even while the tree must rest.
    let phase = AtomicU64::new(1);
    let done = AtomicBool::new(false);
    let tree = world.store.join("tree");
    let looks = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut looks = 0u64;
            let mut rested: Option<(u64, Snapshot)> = None;
            while !done.load(Ordering::SeqCst) {
                let before = phase.load(Ordering::SeqCst);
                let now = snapshot(&tree);
                if before % 2 == 1 || phase.load(Ordering::SeqCst) != before {
                    continue;
                }
                looks += 1;
                match &rested {
                    Some((at, reference)) if *at == before => {
                        let changed = now.iter().find(|(path, seen)| reference.get(*path) != Some(*seen));
                        assert!(
                            now == *reference,
                            "the tree changed between two checkpoints, in phase {before}: {changed:?}, it was {:?}",
                            changed.and_then(|(path, _)| reference.get(path))
                        );
                    }
                    _ => rested = Some((before, now)),
                }
            }
            looks
        });
        let own = world.place.data.join("own-0");
        let body = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for index in 0..rounds(10, 100) {
                phase.fetch_add(1, Ordering::SeqCst);
                // Rest long enough for much to be pending.
                let size = fs::metadata(&own).map_or(0, |meta| meta.len());
                until("the program to write more", SOON, || {
                    (fs::metadata(&own).is_ok_and(|meta| meta.len() > size + 64 * 500)).then_some(())
                })
                .unwrap();
                phase.fetch_add(1, Ordering::SeqCst);
                exercise::cut(&world, &AppendWriters, index).unwrap();
            }
        }));
        done.store(true, Ordering::SeqCst);
        let looks = watcher.join().expect("the watcher saw the tree change");
        body.expect("checkpoints work");
        looks
    });
    assert!(looks > 20, "the watcher looked {looks} times only");
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

#[test]
fn an_acknowledgement_waits_for_the_sync() {
    const DELAY: Duration = Duration::from_millis(700);
    let mut world = World::new("ack", Transport::Unix).unwrap();
    world.start(&AppendWriters, How::Run).unwrap();
    world.checkpoint().unwrap();
    // Every sync of the replayer takes longer: a confirmation that comes sooner did not wait for one.
    let trace = world.scratch.join("trace");
    let mut strace = Command::new("strace")
        .args([
            "-f",
            "-q",
            "-e",
            "trace=fdatasync,fsync,sync_file_range,sendto,sendmsg,write,writev,pwrite64",
        ])
        .args(["-e", &format!("inject=fdatasync,fsync:delay_enter={}", DELAY.as_micros())])
        .arg("-o")
        .arg(&trace)
        .args(["-p", &world.replayer_pid().to_string()])
        .stderr(Stdio::null())
        .spawn()
        .expect("strace is there (cargo xtask setup)");
    until("strace to be attached", SOON, || {
        let status = fs::read_to_string(format!("/proc/{}/status", world.replayer_pid())).unwrap_or_default();
        (!status.contains("TracerPid:\t0")).then_some(())
    })
    .unwrap();
    let started = Instant::now();
    world.checkpoint_until("confirmed").unwrap();
    let took = started.elapsed();
    // SAFETY: a system call without pointers; the child was not waited for, so the number is its own.
    unsafe { libc::kill(strace.id() as i32, libc::SIGINT) };
    strace.wait().unwrap();
    let text = fs::read_to_string(&trace).unwrap();
    assert!(text.contains("fdatasync") || text.contains("fsync"), "no sync in the trace:\n{text}");
    assert!(took >= DELAY, "confirmed after {took:?}, although a sync takes {DELAY:?}");
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}
