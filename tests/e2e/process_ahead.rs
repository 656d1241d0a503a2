//! Memory that is dumped ahead of the stop, where the kernel tells what changed since: Debian's kernels do (`cargo xtask test
//! kernels`). Where it does not, all is dumped within the stop.

use bfs_tests::processes::{counted_loosely, criu, ends_right, images, kill, on_backup, promoted};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{Transport, World, binary};

const MIB: u64 = 1 << 20;

/// A program with so much memory, with checkpoints by time.
fn start(name: &str, mib: &str, more: &[&str]) -> World {
    let mut world = World::new(name, Transport::Unix).unwrap();
    world.checkpoints("every=300ms");
    let (criu, folder) = (criu(), world.root().join("images").display().to_string());
    let options = ["--with-process", "--criu", &criu, "--process-dir", &folder, "--process-keep", "2"];
    world.agent_options(&[&options, more].concat());
    world.start_replayer().unwrap();
    let places = [&world.place.data, &world.place.aux].map(|place| place.display().to_string());
    let [data, aux] = places;
    world
        .run(&[binary("bfs-workload").display().to_string(), "memory".into(), data, aux, mib.into()])
        .unwrap();
    world
}

/// What status tells of the last dump: whether the kernel tracks memory, the rounds ahead, bytes and stop.
fn last(world: &World) -> (bool, u64, u64, u64, u64) {
    let status = world.status().unwrap();
    let process = &status["process"];
    assert!(process["ahead_failure"].is_null(), "{process}");
    let number = |name: &str| process[name].as_u64().unwrap();
    let tracks = process["tracks_memory"].as_bool().unwrap();
    (
        tracks,
        number("ahead_rounds"),
        number("ahead_bytes"),
        number("last_bytes") - number("ahead_bytes"),
        number("last_stop_us"),
    )
}

/// The program goes on from what was dumped ahead and what was dumped within the stop, on this host and from the backup.
#[test]
fn memory_that_was_dumped_ahead_is_whole_again() {
    let mut world = start("process-ahead", "48", &["--restart-on-abort", "100"]);
    for round in 0..3 {
        let before = images(&world);
        until("dumps", SOON, || (images(&world).0 > before.0 + 1).then_some(())).unwrap();
        let (tracks, rounds, ahead, within, stop_us) = last(&world);
        println!(
            "{round}: tracked {tracks}, {rounds} rounds, {ahead} B ahead, {within} B within {stop_us} us"
        );
        if tracks {
            assert!(rounds > 0 && ahead >= 48 * MIB && within < 16 * MIB, "{rounds} {ahead} {within}");
        } else {
            assert!(rounds == 0 && ahead == 0 && within >= 48 * MIB, "{rounds} {ahead} {within}");
        }
        kill(&world, before.2);
        let at = counted_loosely(&world);
        until("progress", SOON, || (counted_loosely(&world) > at).then_some(())).unwrap();
    }
    let before = world.status().unwrap()["process"]["shipped"].as_u64();
    until("process state on the backup", SOON, || {
        (world.status().unwrap()["process"]["shipped"].as_u64() > before).then_some(())
    })
    .unwrap();
    // The first one is of the time before it had all of it.
    let brought = on_backup(&world);
    let newest = brought.iter().rev().find_map(|(_, bytes)| *bytes);
    assert!(newest >= Some(48 * MIB), "{brought:?}");
    ends_right(&mut world);

    assert!(promoted(&world, &world.store) > 0);
}

#[test]
fn little_memory_and_none_wanted_is_dumped_within_the_stop() {
    for (name, mib, more) in
        [("process-little", "1", &[][..]), ("process-none", "48", &["--process-ahead", "0"])]
    {
        let mut world = start(name, mib, more);
        until("dumps", SOON, || (images(&world).0 > 1).then_some(())).unwrap();
        let (_, rounds, _, within, stop_us) = last(&world);
        println!("{name}: {rounds} rounds, {within} B within {stop_us} us");
        assert_eq!(rounds, 0);
        ends_right(&mut world);
    }
}
