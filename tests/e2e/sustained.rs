//! When the program is faster than what captures it: what found no room in the ring is counted, named
//! and repaired, so the next checkpoint is exact all the same.

use std::time::Duration;

use bfs_tests::exercise;
use bfs_tests::programs::Program;
use bfs_tests::programs::append::AppendBursts;
use bfs_tests::programs::ladder::Ladder;
use bfs_tests::watch::{SOON, until};
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
    world.start_replayer().unwrap();
    world.run(&world.script(script)).unwrap();
    let written = world.place.aux.join("written");
    until("dd to be done", SOON, || written.exists().then_some(())).unwrap();
    world.checkpoint().unwrap();
    assert_eq!(world.dropped().unwrap(), Dropped::default(), "dd with 64 KiB, 4 KiB and 128 B writes");
    exercise::equal(&world).unwrap();
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

/// Nobody knows what was lost, so all files are read; what did not change is not sent.
#[test]
fn what_did_not_change_is_not_sent_again_when_everything_is_read() {
    let mut world = World::new("not-again", Transport::Tcp).unwrap();
    world.agent_options(&["--ring-bytes", "64K"]);
    let script = "\
dd if=/dev/urandom of=\"$1/large\" bs=1M count=48 status=none
: > \"$2/ready\"
while [ ! -e \"$2/go\" ]; do sleep 0.02; done
printf x | dd of=\"$1/large\" bs=1 seek=20000001 conv=notrunc status=none
i=0; while [ $i -lt 20000 ]; do : > \"$1/f$i\"; i=$((i + 1)); done
: > \"$2/written\"
while [ ! -e \"$2/stop\" ]; do sleep 0.05; done";
    world.start_replayer().unwrap();
    world.run(&world.script(script)).unwrap();
    world.checkpoint().unwrap();
    let number = |what: &[&str]| world.status_number(what).unwrap();
    let (sent, suspect) = (number(&["stream_bytes"]), number(&["counters", "everything_suspect"]));
    world.pause_agent(true).unwrap();
    std::fs::write(world.place.aux.join("go"), "").unwrap();
    let written = world.place.aux.join("written");
    until("the files", SOON, || written.exists().then_some(())).unwrap();
    world.pause_agent(false).unwrap();
    world.checkpoint().unwrap();
    assert!(number(&["counters", "everything_suspect"]) > suspect, "the ring of 64 KiB had room for all");
    let sent = number(&["stream_bytes"]) - sent;
    assert!(sent < 24 << 20, "{sent} bytes, for 20,000 names and one byte in a file of 48 MiB");
    exercise::equal(&world).unwrap();
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

/// How often each rung of the ladder was used.
#[derive(Clone, Copy, Debug)]
struct Rungs {
    inline: u64,
    by_reference: u64,
    /// Records that found no room: their objects were named.
    named: u64,
    /// Those whose object could not be named: everything is compared.
    rescan: u64,
}

fn rungs(world: &World) -> Rungs {
    let number = |name| world.status_number(&[name]).unwrap();
    let (failed, rescan) = (number("reserve_failed"), number("rescan"));
    Rungs {
        inline: number("inline"),
        by_reference: number("by_reference"),
        named: failed.saturating_sub(rescan),
        rescan,
    }
}

#[test]
fn every_rung_of_the_ladder_is_used_and_left_again() {
    let mut world = World::new("ladder", Transport::Unix).unwrap();
    world.agent_options(&["--ring-bytes", "256K"]);
    world.start(&Ladder, How::Run).unwrap();
    world.checkpoint().unwrap();
    for index in 0..2 {
        let before = Ladder.progress(&world.place.data).unwrap();
        world.pause_agent(true).unwrap();
        // For so long nobody reads the ring.
        std::thread::sleep(Duration::from_secs(rounds(1, 10) as u64));
        let after = Ladder.progress(&world.place.data).unwrap();
        world.pause_agent(false).unwrap();
        assert!(after > before, "the program waited for the agent");
        println!("{} small writes while nobody read the ring", after - before);
        exercise::stopped(&world, 2 * index).unwrap();
        exercise::cut(&world, &Ladder, 2 * index + 1).unwrap();
    }
    let down = rungs(&world);
    println!("{down:?}");
    let Rungs { inline, by_reference, named, rescan } = down;
    assert!([inline, by_reference, named, rescan].into_iter().all(|count| count > 0), "{down:?}");

    Ladder::slow_down(&world.place).unwrap();
    let mut since = rungs(&world);
    let up = until("writes to be inline again", SOON, || {
        let now = rungs(&world);
        if (now.named, now.rescan) != (since.named, since.rescan) {
            since = now;
        }
        (now.inline > since.inline + 1000).then_some(now)
    });
    println!("{:?}", up.unwrap());
    exercise::cut(&world, &Ladder, 4).unwrap();
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}
