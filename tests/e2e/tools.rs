//! Test suites for file systems, load generators, databases and package managers of others, replicated: at
//! each checkpoint the backup is compared whole. See [`bfs_tests::programs::tools`].

use std::time::{Duration, Instant};

use bfs_tests::programs::tools::Tool;
use bfs_tests::programs::{Place, Program};
use bfs_tests::world::{FileSystem, How, Transport, World, rounds};
use bfs_tests::{copy, exercise};

/// A checkpoint every second: with the program stopped, and compared whole; every third one as a cut,
/// which the program's own check reads.
fn compared(tool: &Tool, file_system: Option<FileSystem>, count: usize) {
    let name = format!("{}-{}", tool.name(), file_system.map_or("here", FileSystem::name));
    let mut world = World::new(&name, Transport::Unix).unwrap();
    if let Some(file_system) = file_system {
        world.mount(file_system).unwrap();
    }
    world.start(tool, How::Run).unwrap();
    for index in 0..count {
        let next = Instant::now() + Duration::from_secs(1);
        if index % 3 == 2 {
            world.checkpoint().unwrap();
            let at = world.scratch.join(format!("cut-{index}"));
            copy::exact(&world.backup(), &at).unwrap();
            assert_eq!(tool.ask(&at).unwrap(), Vec::<String>::new());
            std::fs::remove_dir_all(&at).unwrap();
        } else {
            exercise::stopped(&world, index).unwrap();
        }
        assert!(world.program_runs(), "the program ended after {} of {count} checkpoints", index + 1);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    assert!(world.finish().unwrap().success(), "the program failed: {}", said(&world.place));
    exercise::equal(&world).unwrap();
}

/// What the program said last.
fn said(place: &Place) -> String {
    std::fs::read_to_string(place.aux.join("said")).unwrap_or_default()
}

#[test]
fn fsx() {
    compared(&Tool::fsx(0..rounds(5, 50) as u64), None, rounds(4, 60));
}

#[test]
fn fsx_on_btrfs() {
    compared(&Tool::fsx(100..100 + rounds(3, 50) as u64), Some(FileSystem::Btrfs), rounds(3, 60));
}

#[test]
fn pjdfstest() {
    compared(&Tool::pjdfstest(), None, rounds(5, 60));
}

#[test]
fn stress_ng() {
    compared(&Tool::stress_ng(rounds(1, 4)), None, rounds(5, 120));
}

#[test]
fn rsync() {
    compared(&Tool::rsync(), None, rounds(4, 30));
}

#[test]
fn redis() {
    compared(&Tool::redis(), None, rounds(4, 30));
}

#[test]
fn rocksdb() {
    compared(&Tool::rocksdb(), None, rounds(4, 30));
}

#[test]
fn lmdb() {
    compared(&Tool::lmdb(), None, rounds(4, 30));
}

#[test]
fn packages() {
    compared(&Tool::packages(), None, rounds(4, 30));
}
