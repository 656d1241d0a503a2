//! A failed system call leaves on the backup exactly what it left on the primary, mostly nothing; and a primary
//! that comes back with less than it had is what the next checkpoint holds.

use std::fs;
use std::os::unix::fs::MetadataExt;

use bfs_tests::exercise;
use bfs_tests::programs::Program;
use bfs_tests::programs::scripts::Failing;
use bfs_tests::watch::{SOON, until};
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

/// Bytes that are written over others wait in memory while the journal has their file's new times already
/// (ext4's `data=ordered` holds for new blocks only): after a power cut the old bytes stand under the new times.
#[test]
fn old_bytes_under_new_times_are_found_after_a_power_cut() {
    // Somebody else's sync(2) may come in between; not every time.
    assert!((0..5).any(|_| is_found_after_a_power_cut()), "all bytes were on the disk each time");
}

/// `false`: the cut left nothing to be found.
fn is_found_after_a_power_cut() -> bool {
    let mut world = World::new("power", Transport::Unix).unwrap();
    world.mount_ext4(64).unwrap();
    world.start_replayer().unwrap();
    let file = world.place.data.join("f");
    let old = vec![b'a'; 1 << 20];
    fs::write(&file, &old).unwrap();
    fs::File::open(&file).unwrap().sync_all().unwrap();
    let script = ": > \"$2/ready\"; while [ ! -e \"$2/go\" ]; do sleep 0.01; done
        head -c 300000 /dev/zero | dd of=\"$1/f\" bs=4096 seek=50 conv=notrunc iflag=fullblock status=none
        dd if=/dev/zero of=\"$1/g\" bs=1 count=1 conv=fsync status=none
        : > \"$2/done\"; while [ ! -e \"$2/stop\" ]; do sleep 0.01; done";
    world.run(&world.script(script)).unwrap();
    fs::write(world.place.aux.join("go"), "").unwrap();
    let done = world.place.aux.join("done");
    until("the writes", SOON, || done.exists().then_some(())).unwrap();
    world.checkpoint().unwrap();
    world.power_fails().unwrap();
    let before = fs::metadata(&file).unwrap();
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();

    world.power_returns().unwrap();
    let after = fs::metadata(&file).unwrap();
    let times = |m: &fs::Metadata| (m.size(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec(), m.ino());
    assert_eq!(times(&after), times(&before), "the cut left the new times");
    let old_bytes = fs::read(&file).unwrap() == old;
    world.run(&world.script(": > \"$2/ready\"; while [ ! -e \"$2/stop\" ]; do sleep 0.01; done")).unwrap();
    world.checkpoint().unwrap();
    exercise::equal(&world).unwrap();
    assert!(world.finish().unwrap().success());
    old_bytes
}
