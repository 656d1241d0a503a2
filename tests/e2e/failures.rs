//! A failed system call leaves on the backup exactly what it left on the primary, mostly nothing.

use bfs_tests::exercise;
use bfs_tests::programs::Program;
use bfs_tests::programs::scripts::Failing;
use bfs_tests::world::{How, Transport, World, rounds};

#[test]
fn calls_that_fail_for_names_and_permissions() {
    let mut world = World::new("failing", Transport::Unix).unwrap();
    exercise::checkpoints(&mut world, &Failing { small: false }, How::Run, rounds(6, 20)).unwrap();
}

#[test]
fn calls_that_fail_because_the_file_system_is_full() {
    let mut world = World::new("failing-full", Transport::Unix).unwrap();
    world.mount_ext4(8).unwrap();
    let program = Failing { small: true };
    exercise::checkpoints(&mut world, &program, How::Run, rounds(6, 20)).unwrap();
    assert!(program.half_way(&world.place), "the program filled the file system at least once");
}
