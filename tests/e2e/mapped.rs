//! Stores into shared mappings: after each step of each row the backup equals the primary at a plain
//! checkpoint, on each kind of file system; and no checkpoint stops the program when nobody maps a file.

use std::os::unix::net::UnixListener;

use bfs_tests::oracle;
use bfs_tests::programs::stores::{Steps, Stores};
use bfs_tests::world::{FileSystem, How, Transport, World};

/// Each row on ext4 and tmpfs, and on the others those that depend on the file system; with `BFS_LONG` each on
/// all.
fn rows(file_system: FileSystem) {
    let both = matches!(file_system, FileSystem::Ext4 | FileSystem::Tmpfs);
    let all = both || std::env::var_os("BFS_LONG").is_some();
    let name = file_system.name();
    let mut world = World::new(&format!("mapped-{name}"), Transport::Unix).unwrap();
    world.mount(file_system).unwrap();
    world.beside().unwrap();
    let listener = UnixListener::bind(Stores::socket(&world.place)).unwrap();
    world.start(&Stores, How::Run).unwrap();
    let mut steps = Steps::accept(&listener, all).unwrap();
    let mut wrong = Vec::new();
    while let Some(step) = steps.wait().unwrap() {
        let before = world.status_number(&["checkpoints_stopped"]).unwrap();
        world.checkpoint().unwrap();
        let stopped = world.status_number(&["checkpoints_stopped"]).unwrap() - before;
        let differences = oracle::compare(&world.place.data, &world.backup()).unwrap();
        if !differences.is_empty() {
            wrong.push(format!("{}:\n    {}", step.name, differences.join("\n    ")));
        }
        if step.quiet && stopped > 0 {
            wrong.push(format!("{}: the program was stopped", step.name));
        }
        steps.go().unwrap();
    }
    assert!(wrong.is_empty(), "on {name}:\n{}", wrong.join("\n"));
    assert!(world.finish().unwrap().success());
}

#[test]
fn stores_into_mappings_on_ext4() {
    rows(FileSystem::Ext4);
}

#[test]
fn stores_into_mappings_on_xfs() {
    rows(FileSystem::Xfs);
}

#[test]
fn stores_into_mappings_on_btrfs() {
    rows(FileSystem::Btrfs);
}

#[test]
fn stores_into_mappings_on_tmpfs() {
    rows(FileSystem::Tmpfs);
}
