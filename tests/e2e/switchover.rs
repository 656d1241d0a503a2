//! `switchover`: when it says that nothing is behind the last checkpoint, then the first destination has all that anybody
//! of the program ever wrote.

use std::fs;
use std::time::Duration;

use bfs_tests::processes::{counted_lines, counted_loosely, images, started, stopped};
use bfs_tests::stores::{has, kept, restored_equals};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{Transport, World};

/// The command was ended by SIGTERM, as a shell tells.
const ENDED_BY_TERM: i32 = 128 + 15;

fn switchover(world: &World, more: &[&str]) -> (Option<i32>, String) {
    let to = world.destination();
    let words = [&["switchover", "--to", &to], more].concat();
    let done = world.agent_command(&words, Duration::from_secs(60)).unwrap();
    let said = [done.stdout, done.stderr].concat();
    (done.status.code(), String::from_utf8_lossy(&said).into_owned())
}

/// The last checkpoint of the store is what lies here.
fn all_is_there(world: &World) {
    let last = *kept(world, &world.store).last().unwrap();
    restored_equals(world, &world.store, last, &world.place.data);
}

/// The command ends at once; what it started goes on for two seconds, and hears no signal.
#[test]
fn who_was_left_behind_by_the_command_is_waited_for() {
    let mut world = World::new("switch-left", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    let log = world.place.data.join("log");
    let command = world.script(
        "cd \"$1\"; touch \"$2/ready\"; (trap '' TERM; until [ -e \"$2/last\" ]; do echo line >> log; sleep 0.01; done; \
          for i in 1 2 3 4 5 6 7 8; do sleep 0.25; echo late $i >> log; done; mv log after) &
         while :; do sleep 0.05; done",
    );
    world.run(&command).unwrap();
    until("the program to write", SOON, || (counted_lines(&log) > 10).then_some(())).unwrap();
    world.checkpoint().unwrap();
    fs::write(world.place.aux.join("last"), "").unwrap();
    let (status, said) = switchover(&world, &[]);
    assert!(status == Some(0) && said.contains("nothing is behind it"), "{said}");
    assert!(world.place.data.join("after").exists(), "the switchover did not wait");
    assert_eq!(world.finish().unwrap().code(), Some(ENDED_BY_TERM));
    all_is_there(&world);
}

/// They do not end: that is said, and the agent ends with its command, as ever.
#[test]
fn who_does_not_end_is_named_and_killed_where_that_is_wanted() {
    for kill in [false, true] {
        let mut world = World::new("switch-stays", Transport::Unix).unwrap();
        world.start_replayer().unwrap();
        let log = world.place.data.join("log");
        let script = "cd \"$1\"; touch \"$2/ready\"; (trap '' TERM; for i in $(seq 3000); do echo line >> log; sleep 0.01; done) & while :; do sleep 0.05; done";
        world.run(&world.script(script)).unwrap();
        until("the program to write", SOON, || (counted_lines(&log) > 10).then_some(())).unwrap();
        let more: &[&str] = if kill { &["--kill"] } else { &["--timeout", "1s"] };
        let (status, said) = switchover(&world, more);
        if kill {
            assert!(status == Some(0) && said.contains("nothing is behind it"), "{said}");
        } else {
            assert!(status == Some(74) && said.contains("did not end: processes"), "{said}");
        }
        assert_eq!(world.finish().unwrap().code(), Some(ENDED_BY_TERM), "{said}");
        if kill {
            all_is_there(&world);
        }
    }
}

/// A command that is brought back when a signal ends it ends for good here.
#[test]
fn who_is_ended_for_a_switchover_is_not_brought_back() {
    let mut world = started("switch-restart", "counter.py", &["--restart-on-abort", "5"]);
    until("a dump", SOON, || (images(&world).0 > 0 && counted_loosely(&world) > 0).then_some(())).unwrap();
    stopped(&world);
    let (status, said) = switchover(&world, &[]);
    assert!(status == Some(0) && said.contains("nothing is behind it"), "{said}");
    assert_eq!(world.finish().unwrap().code(), Some(ENDED_BY_TERM));
    all_is_there(&world);
}

/// Another destination has confirmed the last checkpoint, and that would be enough for a checkpoint; but the first one, which
/// is to be promoted, does not have it.
#[test]
fn what_only_another_destination_has_is_not_enough() {
    let mut world = World::new("switch-first", Transport::Unix).unwrap();
    let other = format!("dir:{}", world.root().join("other").display());
    world.agent_options(&["--backup", &other, "--confirm", "any", "--spool-size", "64M"]);
    world.start_replayer().unwrap();
    let log = world.place.data.join("log");
    let script = "cd \"$1\"; trap 'touch \"$2/told\"' TERM; touch \"$2/ready\"; \
        until [ -e \"$2/last\" ]; do sleep 0.05; echo line >> log; done";
    world.start_program(&world.script(script)).unwrap();
    world.attach().unwrap();
    until("the program to write", SOON, || (counted_lines(&log) > 3).then_some(())).unwrap();
    let number = world.checkpoint().unwrap();
    has(&world, 1, number);
    let to = world.destination();
    let asked = world.spawn_agent_command(&["switchover", "--to", &to, "--timeout", "6s"]).unwrap();
    // It has begun when the first one is away; what the program does then goes into the spool, and from there to the other.
    until("the program to be told", SOON, || world.place.aux.join("told").exists().then_some(())).unwrap();
    world.kill_replayer().unwrap();
    fs::write(world.place.aux.join("last"), "").unwrap();
    let done = asked.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.code() == Some(75) && said.contains("not confirmed by"), "{done:?}");
}

/// It is told to end while it waits for a program that does not: whoever asked for the switchover hears that nothing came of it.
#[test]
fn who_waits_for_a_switchover_hears_that_the_agent_was_stopped() {
    let mut world = World::new("switch-stop", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    let script =
        "trap 'touch \"$2/told\"' TERM; touch \"$2/ready\"; until [ -e \"$2/last\" ]; do sleep 0.05; done";
    world.start_program(&world.script(script)).unwrap();
    world.attach().unwrap();
    let to = world.destination();
    let asked = world.spawn_agent_command(&["switchover", "--to", &to, "--timeout", "60s"]).unwrap();
    until("the program to be told", SOON, || world.place.aux.join("told").exists().then_some(())).unwrap();
    world.stop_agent().unwrap();
    let done = asked.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && said.contains("was told to end before"), "{done:?}");
    fs::write(world.place.aux.join("last"), "").unwrap();
}
