//! The backup is away: what it misses is durable on the primary, the program never waits, checkpoints are
//! sealed, and when it is back it gets exactly that, also from another agent.

use std::fs;
use std::time::{Duration, Instant};

use bfs_tests::exercise;
use bfs_tests::programs::append::AppendWriters;
use bfs_tests::programs::{BesideMuch, Program};
use bfs_tests::random::{Random, given_seed};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{How, Transport, World, command_ok, number_named, rounds};
use bfs_tests::{copy, oracle};
use serde_json::Value;

/// Writes files of random bytes and a list of them until it is told to end.
const BUSY: &str = ": > \"$2/ready\"; i=0
    while [ ! -e \"$2/stop\" ]; do
        i=$((i + 1)); head -c 100000 /dev/urandom > \"$1/f$((i % 50))\"
        echo \"$i\" >> \"$1/list\"; sleep 0.02
    done";

fn spool_of(world: &World) -> Value {
    world.status().unwrap()["spool"].clone()
}

fn records(world: &World) -> u64 {
    number_named(&spool_of(world), &["records"]).unwrap()
}

fn trouble(world: &World) -> Option<String> {
    spool_of(world)["trouble"].as_str().map(str::to_owned)
}

/// The checkpoints that the backup keeps.
fn kept(world: &World) -> Vec<u64> {
    let mut command = std::process::Command::new(bfs_tests::world::binary("bfs-replayer"));
    command.args(["generations", "--json", "--group", &world.group, "--store"]).arg(&world.store);
    let said = command_ok(&mut command).unwrap().stdout;
    let lines: Value = serde_json::from_slice(&said).unwrap();
    let lines = lines.as_array().unwrap_or_else(|| panic!("no list: {lines}"));
    lines.iter().map(|line| number_named(line, &["checkpoint", "number"]).unwrap()).collect()
}

/// The agent's folder for this group is gone or holds no records.
fn is_empty(world: &World) -> bool {
    let log = world.spool().join(&world.group).join("log");
    fs::read_dir(log).map_or(true, |mut entries| entries.next().is_none())
}

/// A backup that is killed and comes back, and one that stands and goes on.
#[test]
fn a_backup_that_is_away_gets_what_it_missed_and_nothing_twice() {
    let mut world = World::new("spool-cut", Transport::Tcp).unwrap();
    let program = &BesideMuch(&AppendWriters);
    world.start(program, How::Run).unwrap();
    world.checkpoint().unwrap();
    let sent = |world: &World| world.status_number(&["stream_bytes"]).unwrap();
    let before = sent(&world);
    for killed in [true, false] {
        if killed {
            world.kill_replayer().unwrap();
        } else {
            world.pause_replayer(true).unwrap();
        }
        let sealed: Vec<u64> = (0..3).map(|_| world.checkpoint_until("sealed").unwrap()).collect();
        let spool = spool_of(&world);
        assert!(records(&world) > 0 && spool["trouble"].is_null(), "{spool}");
        assert!(spool["oldest_ms"].as_u64().is_some() && spool["disk_bytes"].as_u64() > Some(0), "{spool}");
        let status = world.status().unwrap();
        assert!(number_named(&status["confirmed"], &["number"]).unwrap() < sealed[0], "{status}");
        // What is sealed needs no room in the ring.
        let used = status["ring_used_bytes"].as_u64().unwrap();
        assert!(used < status["ring_bytes"].as_u64().unwrap() / 4, "{status}");
        if killed {
            world.start_replayer().unwrap();
        } else {
            world.pause_replayer(false).unwrap();
        }
        world.wait_applied(sealed[2]).unwrap();
        let there = kept(&world);
        assert!(sealed.iter().all(|checkpoint| there.contains(checkpoint)), "{sealed:?} in {there:?}");
        until("the spool to be empty", SOON, || (records(&world) == 0).then_some(())).unwrap();
        assert!(world.program_runs());
    }
    exercise::cut(&world, program, 0).unwrap();
    let own = BesideMuch::own_bytes(&world.place).unwrap();
    let again = sent(&world) - before;
    assert!(again < BesideMuch::BYTES / 8 + 3 * own, "{again} bytes, of {own} in use: that is a new copy");
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
    assert!(is_empty(&world), "an empty spool leaves nothing behind");
}

#[test]
fn a_run_that_ends_without_its_backup_says_how_to_send_the_rest() {
    let mut world = World::new("spool-end", Transport::Tcp).unwrap();
    world.agent_options(&["--final-wait", "1s"]);
    world.start_replayer().unwrap();
    world.run(&world.script(BUSY)).unwrap();
    world.checkpoint().unwrap();
    world.kill_replayer().unwrap();
    let sealed = world.checkpoint_until("sealed").unwrap();
    assert_eq!(world.finish().unwrap().code(), Some(75));
    let said = fs::read_to_string(world.logs().join("agent.log")).unwrap();
    let spool = world.spool().display().to_string();
    let command = format!("bfs-agent flush --group {} --spool {spool}", world.group);
    assert!(said.contains("is only sealed") && said.contains(&command), "{said}");

    // Nobody is there: it stays where it is.
    let failed = world.agent_command(&["flush", "--spool", &spool], SOON).unwrap();
    assert_eq!(failed.status.code(), Some(68), "{failed:?}");
    assert!(!is_empty(&world));
    world.start_replayer().unwrap();
    let flushed = world.agent_command(&["flush", "--spool", &spool], SOON).unwrap();
    assert!(flushed.status.success(), "{flushed:?}");
    until("the last checkpoint to be applied", SOON, || {
        let status = world.replayer_status().ok()?;
        (status["applied"].as_u64()? > sealed && status["applied"] == status["confirmed"]).then_some(())
    })
    .unwrap();
    exercise::equal(&world).unwrap();
    assert!(kept(&world).contains(&sealed), "a sealed checkpoint is one of those that are kept");
    assert!(is_empty(&world));
    let nothing = world.agent_command(&["flush", "--spool", &spool], SOON).unwrap();
    assert_eq!(nothing.status.code(), Some(72), "{nothing:?}");
}

#[test]
fn the_next_run_sends_what_the_last_one_left() {
    let mut world = World::new("spool-next", Transport::Unix).unwrap();
    world.agent_options(&["--final-wait", "1s"]);
    world.start_replayer().unwrap();
    world.run(&world.script(BUSY)).unwrap();
    world.checkpoint().unwrap();
    world.kill_replayer().unwrap();
    let sealed = world.checkpoint_until("sealed").unwrap();
    assert_eq!(world.finish().unwrap().code(), Some(75));
    world.start_replayer().unwrap();
    for file in ["stop", "ready"] {
        fs::remove_file(world.place.aux.join(file)).unwrap();
    }
    world.run(&world.script(BUSY)).unwrap();
    assert!(world.checkpoint().unwrap() > sealed + 1);
    assert!(kept(&world).contains(&sealed));
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

/// Nothing that was sealed is lost with the agent, and its successor goes on without a new copy.
#[test]
fn an_agent_that_is_killed_while_it_spools_leaves_it_to_its_successor() {
    let seed = given_seed().unwrap_or(20_261_122);
    eprintln!("BFS_SEED={seed}");
    let mut random = Random::new(seed);
    let mut world = World::new("spool-kill", Transport::Unix).unwrap();
    let program = &BesideMuch(&AppendWriters);
    world.start(program, How::Run).unwrap();
    world.checkpoint().unwrap();
    for index in 0..rounds(3, 60) {
        world.kill_replayer().unwrap();
        let sealed = world.checkpoint_until("sealed").unwrap();
        // The moment of the kill is what is tested.
        std::thread::sleep(Duration::from_millis(random.below(400) as u64));
        world.kill_agent().unwrap();
        assert!(world.program_runs(), "the program ended when the agent was killed");
        world.start_replayer().unwrap();
        if random.below(2) == 0 {
            let spool = world.spool().display().to_string();
            let flushed = world.agent_command(&["flush", "--spool", &spool], SOON).unwrap();
            assert!(flushed.status.success(), "{flushed:?}");
        }
        world.resume().unwrap();
        world.wait_applied(sealed).unwrap();
        exercise::cut(&world, program, index).unwrap();
        let status = world.status().unwrap();
        let again = status["counters"]["stream_bytes"].as_u64().unwrap();
        let own = BesideMuch::own_bytes(&world.place).unwrap();
        assert!(
            again < BesideMuch::BYTES / 8 + 2 * own,
            "{again} bytes were sent, of {own} in use: {status}"
        );
    }
    exercise::stopped(&world, 0).unwrap();
    world.finish().unwrap();
    exercise::equal(&world).unwrap();
}

/// A spool that is gone is noticed: the successor does not take the rest of the ring for everything.
#[test]
fn a_spool_that_is_lost_with_the_agent_costs_a_comparison_and_no_change() {
    let mut world = World::new("spool-lost", Transport::Unix).unwrap();
    world.start(&AppendWriters, How::Run).unwrap();
    world.checkpoint().unwrap();
    world.kill_replayer().unwrap();
    world.checkpoint_until("sealed").unwrap();
    world.kill_agent().unwrap();
    fs::remove_dir_all(world.spool()).unwrap();
    world.start_replayer().unwrap();
    world.resume().unwrap();
    exercise::cut(&world, &AppendWriters, 0).unwrap();
    exercise::stopped(&world, 1).unwrap();
    world.finish().unwrap();
    exercise::equal(&world).unwrap();
}

/// Where the spool's disk is full, that is said, memory takes the rest, and nothing is lost.
#[test]
fn a_spool_on_a_full_disk() {
    let mut world = World::new("spool-full", Transport::Unix).unwrap();
    world.mount_spool(4).unwrap();
    let expected = "No space left on device";
    world.start_replayer().unwrap();
    world.run(&world.script(BUSY)).unwrap();
    world.checkpoint().unwrap();
    world.kill_replayer().unwrap();
    let said = until("the spool to be full", SOON, || {
        // What is written by reference is read for a checkpoint.
        let _ = world.agent_command(&["checkpoint", "--wait", "sealed", "--timeout", "1s"], SOON);
        trouble(&world)
    })
    .unwrap();
    assert!(said.contains(expected), "{said}");
    let shown = world.agent_command(&["status"], SOON).unwrap();
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("it takes nothing now") && shown.contains(expected), "{shown}");
    assert!(world.program_runs());
    let since = Instant::now();
    world.start_replayer().unwrap();
    world.checkpoint().unwrap();
    until("the spool to be empty", SOON, || {
        (records(&world) == 0 && trouble(&world).is_none()).then_some(())
    })
    .unwrap();
    eprintln!("back after {:?}", since.elapsed());
    exercise::stopped(&world, 0).unwrap();
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

/// Past the bound of the spool only what is touched is noted; when the backup is back that is read, by the same
/// agent or by its successor, and nothing else.
#[test]
fn past_its_bound_the_spool_keeps_what_was_touched() {
    let mut world = World::new("spool-bound", Transport::Unix).unwrap();
    world.agent_options(&["--spool-size", "1M"]);
    let program = &BesideMuch(&AppendWriters);
    world.start(program, How::Run).unwrap();
    world.checkpoint().unwrap();
    let sent = |world: &World| world.status_number(&["stream_bytes"]).unwrap();
    let mut before = sent(&world);
    for killed in [false, true] {
        world.kill_replayer().unwrap();
        let noting = |world: &World| spool_of(world)["notes_only"].as_bool().unwrap();
        until("the spool to be full", SOON, || noting(&world).then_some(())).unwrap();
        let refused = world.agent_command(&["checkpoint", "--wait", "sealed"], SOON).unwrap();
        assert_eq!(refused.status.code(), Some(73), "{refused:?}");
        let shown = world.agent_command(&["status"], SOON).unwrap();
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        assert!(shown.contains("what is touched is noted"), "{shown}");
        // It goes on, and costs next to nothing.
        let (disk, lines) =
            (spool_of(&world)["disk_bytes"].as_u64().unwrap(), program.activity(&world.place).unwrap());
        until("the program to go on", SOON, || {
            (program.activity(&world.place).unwrap() > lines + 2000).then_some(())
        })
        .unwrap();
        let grown = spool_of(&world)["disk_bytes"].as_u64().unwrap() - disk;
        assert!(grown < 64 << 10, "{grown} bytes for notes");
        if killed {
            world.kill_agent().unwrap();
            before = 0;
        }
        world.start_replayer().unwrap();
        if killed {
            world.resume().unwrap();
        }
        until("bytes to be sent again", SOON, || (!noting(&world)).then_some(())).unwrap();
        exercise::cut(&world, program, usize::from(killed)).unwrap();
        let own = BesideMuch::own_bytes(&world.place).unwrap();
        let again = sent(&world) - before;
        assert!(
            again < BesideMuch::BYTES / 8 + 3 * own,
            "{again} bytes, of {own} in use: that is a new copy"
        );
    }
    exercise::stopped(&world, 2).unwrap();
    world.finish().unwrap();
    exercise::equal(&world).unwrap();
}

/// A long outage beside a tree of many files, past the bound of the spool: what is read and sent for it follows what was
/// rewritten, not the tree.
#[test]
fn after_an_outage_what_was_rewritten_is_read_and_sent() {
    let (files, mebibytes) = (rounds(5_000, 100_000), rounds(16, 1024) as u64);
    let mut world = World::new("spool-outage", Transport::Unix).unwrap();
    world.agent_options(&["--spool-size", "4M"]);
    world.start_replayer().unwrap();
    let script = format!(
        "cd \"$1\"; mkdir many; head -c $(({files} * 4096)) /dev/urandom | split -a 5 -b 4096 - many/f
         head -c {mebibytes}M /dev/urandom > large; touch \"$2/ready\"
         until [ -e \"$2/go\" ]; do sleep 0.05; done
         head -c {mebibytes}M /dev/urandom | dd of=large bs=64k conv=notrunc 2> \"$2/said\"
         for n in 1 2 3; do for i in aaaaa aaaab aaaac; do echo $n > many/f$i; done; done; touch \"$2/done\"
         until [ -e \"$2/stop\" ]; do sleep 0.05; done"
    );
    world.run(&world.script(&script)).unwrap();
    world.checkpoint().unwrap();
    let sent = |world: &World| world.status().unwrap()["destinations"][0]["sent_bytes"].as_u64().unwrap();
    let read = |world: &World| {
        let all = fs::read_to_string(format!("/proc/{}/io", world.agent_pid().unwrap())).unwrap();
        let line = all.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap();
        line.parse::<u64>().unwrap()
    };
    let then = (sent(&world), read(&world));
    world.kill_replayer().unwrap();
    fs::write(world.place.aux.join("go"), "").unwrap();
    until("all to be rewritten", SOON, || world.place.aux.join("done").exists().then_some(())).unwrap();
    // A checkpoint asks for all of it, and the spool has no room for that.
    let words = ["checkpoint", "--wait", "sealed", "--timeout", "5s"];
    let asked = world.agent_command(&words, SOON).unwrap();
    assert!([Some(73), Some(74)].contains(&asked.status.code()), "{asked:?}");
    let notes =
        |world: &World, only: bool| (spool_of(world)["notes_only"].as_bool() == Some(only)).then_some(());
    until("the spool to be full", SOON, || notes(&world, true)).unwrap();

    world.start_replayer().unwrap();
    until("bytes to be sent again", SOON, || notes(&world, false)).unwrap();
    world.checkpoint().unwrap();
    let (sent, read) = (sent(&world) - then.0, read(&world) - then.1);
    eprintln!("{files} files, {mebibytes} MiB rewritten: {sent} bytes sent, {read} read");
    let rewritten = mebibytes << 20;
    assert!((rewritten..rewritten * 5 / 4 + (4 << 20)).contains(&sent), "{sent} bytes sent of {rewritten}");
    // Once before the spool was full, and once when there was room; and the spool.
    assert!(read < 2 * rewritten + (12 << 20), "{read} bytes read of {rewritten}");
    fs::write(world.place.stop(), "").unwrap();
    world.finish().unwrap();
    exercise::equal(&world).unwrap();
}

/// As much waits on the backup, without a checkpoint, as may (`--pending-max`): it says so and keeps what it has, the program
/// and its agent go on, and with a larger bound all of it comes by itself, from the same agent or its successor, and
/// nothing else.
#[test]
fn a_backup_at_its_bound_gets_the_rest_when_it_may_take_more() {
    let mut world = World::new("pending-bound", Transport::Unix).unwrap();
    let program = &BesideMuch(&AppendWriters);
    // The first copy is larger than the bound.
    world.start(program, How::Run).unwrap();
    let sent = |world: &World| world.status_number(&["stream_bytes"]).unwrap();
    for killed in [false, true] {
        let then = world.scratch.join(format!("then-{killed}"));
        let first = world.checkpoint_stopped(&copy::command(&world.place.data, &then)).unwrap();
        let mut before = sent(&world);
        world.kill_replayer().unwrap();
        world.replayer_options(&["--pending-max", "262144"]);
        world.start_replayer().unwrap();
        until("the backup to be at its bound", SOON, || {
            let status = world.status().ok()?;
            (status["destinations"][0]["store"] == "behind").then_some(())
        })
        .unwrap();
        let shown = world.agent_command(&["status"], SOON).unwrap();
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        assert!(shown.contains("--pending-max"), "{shown}");
        // A checkpoint stands behind all of it, so it cannot come through; it is sealed here.
        let sealed = world.checkpoint_until("sealed").unwrap();
        let far = program.activity(&world.place).unwrap();
        until("the program to go on", SOON, || {
            (program.activity(&world.place).unwrap() > far + 1000).then_some(())
        })
        .unwrap();
        let state = world.replayer_status().unwrap();
        assert_eq!(state["applied"].as_u64(), Some(first), "{state}");
        let waits = state["pending_bytes"].as_u64().unwrap();
        assert!((256 << 10..8 << 20).contains(&waits), "{state}");
        assert_eq!(oracle::compare(&then, &world.backup()).unwrap(), Vec::<String>::new());
        if killed {
            world.kill_agent().unwrap();
            before = 0;
        }
        world.kill_replayer().unwrap();
        world.replayer_options(&[]);
        world.start_replayer().unwrap();
        if killed {
            world.resume().unwrap();
        }
        world.wait_applied(sealed).unwrap();
        assert!(kept(&world).contains(&sealed));
        exercise::cut(&world, program, usize::from(killed)).unwrap();
        let own = BesideMuch::own_bytes(&world.place).unwrap();
        let again = sent(&world) - before;
        assert!(again < BesideMuch::BYTES / 8 + 3 * own, "{again} bytes, of {own} in use: a new copy");
    }
    assert!(world.program_runs());
    exercise::stopped(&world, 2).unwrap();
    world.finish().unwrap();
    exercise::equal(&world).unwrap();
}

#[test]
fn a_spool_in_what_is_replicated_is_refused() {
    let mut world = World::new("spool-inside", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    // By its path, and by another one to the same directory.
    let inside = world.place.data.join("spool");
    let elsewhere = world.root().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    command_ok(std::process::Command::new("mount").arg("--bind").args([&world.place.data, &elsewhere]))
        .unwrap();
    for spool in [inside, elsewhere.join("spool")] {
        let mut child = std::process::Command::new(bfs_tests::world::binary("bfs-agent"));
        child.args(["run", "--group", &world.group, "--backup", &world.destination(), "--path"]);
        child.arg(&world.place.data).arg("--spool").arg(&spool).args(["--", "/bin/true"]);
        let done = child.output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(65), "{said}");
        assert!(said.contains("overlaps the spool"), "{said}");
        assert!(!spool.exists());
    }
}
