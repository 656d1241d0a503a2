//! When the program is faster than what captures it: what found no room in the ring is counted, named
//! and repaired, so the next checkpoint is exact all the same.

use bfs_tests::exercise;
use bfs_tests::programs::append::AppendBursts;
use bfs_tests::world::{Dropped, How, Transport, World, rounds};

#[test]
fn what_finds_no_room_in_the_ring_is_counted_named_and_repaired() {
    let mut world = World::new("small-ring", Transport::Tcp).unwrap();
    world.agent_options(&["--ring-bytes", "64K"]);
    world.start(&AppendBursts, How::Run).unwrap();
    let mut dropped = Dropped::default();
    for index in 0..rounds(6, 20) {
        exercise::cut(&world, &AppendBursts, 2 * index).unwrap();
        exercise::stopped(&world, 2 * index + 1).unwrap();
        dropped = world.dropped().unwrap();
    }
    assert!(dropped.events + dropped.rescans > 0, "a ring of 64 KiB was never full: {dropped:?}");
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

#[test]
fn nothing_is_dropped_at_full_speed() {
    let mut world = World::new("full-speed", Transport::Tcp).unwrap();
    world.checkpoints("every=1s");
    let script = "\
: > \"$2/ready\"
dd if=/dev/zero of=\"$1/large\" bs=64k count=8192 status=none
dd if=/dev/zero of=\"$1/small\" bs=4k count=50000 status=none
dd if=/dev/zero of=\"$1/tiny\" bs=128 count=200000 status=none
: > \"$2/written\"
while [ ! -e \"$2/stop\" ]; do sleep 0.05; done";
    let place = [&world.place.data, &world.place.aux].map(|p| p.display().to_string());
    let line = ["/bin/sh", "-c", script, "sh"].map(str::to_owned);
    world.start_replayer().unwrap();
    world.run(&line.into_iter().chain(place).collect::<Vec<_>>()).unwrap();
    let written = world.place.aux.join("written");
    bfs_tests::watch::until("dd to be done", bfs_tests::watch::SOON, || written.exists().then_some(()))
        .unwrap();
    world.checkpoint().unwrap();
    assert_eq!(world.dropped().unwrap(), Dropped::default(), "dd with 64 KiB, 4 KiB and 128 B writes");
    exercise::equal(&world).unwrap();
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}
