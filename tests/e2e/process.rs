//! `run --with-process`: memory and files of one instant, and the way back to both.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use bfs_tests::hosts::Hosts;
use bfs_tests::processes::{
    counted_in, counted_lines, counted_loosely, criu, ends_right, host_options, images, is_right, kill,
    on_backup, promoted, rollback, script, start, started, started_by, stopped,
};
use bfs_tests::random::Random;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{Transport, World, binary, rounds};

/// The command line makes no sense: `bfs-agent --help`.
const USAGE: i32 = 64;

/// Killed again and again; each time it goes on from a checkpoint, with files and memory of one instant.
fn goes_on(name: &str, program: &str, times: usize) {
    let mut world = started(name, program, &["--restart-on-abort", "100000"]);
    let mut random = Random::printed();
    for round in 0..times {
        let before = images(&world);
        until("a dump", SOON, || (images(&world).0 > before.0).then_some(())).unwrap();
        std::thread::sleep(Duration::from_millis(random.below(400) as u64));
        let had = counted_loosely(&world);
        kill(&world, before.2);
        let has = until("progress", SOON, || Some(counted_loosely(&world)).filter(|n| *n > 0)).unwrap();
        println!("{name} {round}: killed at {had}, goes on from about {has}");
    }
    let at = counted_loosely(&world);
    until("more progress", SOON, || (counted_loosely(&world) > at).then_some(())).unwrap();
    let (dumped, failed, restored) = images(&world);
    println!("{name}: {dumped} dumps, {failed} failed, {restored} restored");
    assert_eq!((failed, restored), (0, times as u64));
    assert!(ends_right(&mut world) > 0);
}

#[test]
fn a_counter_goes_on_from_a_checkpoint() {
    goes_on("process-counter", "counter.py", rounds(6, 100));
}

#[test]
fn a_tree_with_pipes_goes_on_from_a_checkpoint() {
    goes_on("process-pipes", "pipes.py", rounds(3, 100));
}

#[test]
fn a_database_goes_on_from_a_checkpoint() {
    goes_on("process-database", "database.py", rounds(3, 100));
}

#[test]
fn what_cannot_be_dumped_is_said_and_the_files_are_safe() {
    let mut world = started("process-connected", "connected.py", &["--restart-on-abort", "5"]);
    until("dumps that fail", SOON, || (images(&world).1 > 1).then_some(())).unwrap();
    let status = world.status().unwrap();
    let why = status["process"]["failure"].as_str().unwrap();
    assert!(why.contains("sockets"), "{why}");
    for _ in 0..3 {
        stopped(&world);
    }
    ends_right(&mut world);
}

/// `bfs-agent rollback` while the command runs: to a checkpoint that is named, as often as one likes.
#[test]
fn one_goes_back_by_hand_with_the_processes() {
    let mut world = started("process-by-hand", "counter.py", &["--process-keep", "50"]);
    until("a dump", SOON, || (images(&world).0 > 0).then_some(())).unwrap();
    world.agent_command(&["checkpoint", "--tag", "here", "--wait", "applied"], SOON).unwrap();
    let had = counted_loosely(&world);
    for round in 0..3 {
        until("progress", SOON, || (counted_loosely(&world) > had + 1000).then_some(())).unwrap();
        let done = rollback(&world, &["--to", "tag:here"]);
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        assert!(done.status.success() && said.contains("the processes run"), "{round}: {said} {done:?}");
        assert!(counted_loosely(&world) < had + 1000, "{round}");
    }
    // What has no process state, or does not exist, is refused, and the program goes on undisturbed.
    let before = images(&world);
    for (to, says) in [("9999", "no checkpoint"), ("tag:none", "no checkpoint")] {
        let done = rollback(&world, &["--to", to]);
        assert!(!done.status.success());
        assert!(String::from_utf8_lossy(&done.stderr).contains(says), "{done:?}");
    }
    assert_eq!(images(&world).2, before.2);
    assert!(world.program_runs());
    ends_right(&mut world);
}

/// The command is gone then, and the agent does not wait for it.
#[test]
fn a_restore_that_fails_is_the_end_of_the_command() {
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("criu");
    let text = format!("#!/bin/sh\n[ $1 = restore ] && exit 1\nexec {} \"$@\"\n", criu());
    fs::write(&broken, text).unwrap();
    fs::set_permissions(&broken, fs::Permissions::from_mode(0o755)).unwrap();
    let mut world = started_by(broken.to_str().unwrap(), "process-broken", "counter.py", &[]);
    until("progress", SOON, || (counted_loosely(&world) > 0).then_some(())).unwrap();
    let before = images(&world).0;
    until("dumps", SOON, || (images(&world).0 > before + 1).then_some(())).unwrap();
    let done = rollback(&world, &[]);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && said.contains("cannot restore"), "{said}");
    assert_eq!(world.finish().unwrap().code(), Some(128 + 9));
    is_right(&world);
}

#[test]
fn a_command_that_ends_by_itself_or_by_a_signal_to_the_agent_has_ended() {
    let mut world = started("process-ends", "counter.py", &["--restart-on-abort", "5"]);
    until("a dump", SOON, || (images(&world).0 > 0).then_some(())).unwrap();
    world.signal_agent(libc::SIGTERM).unwrap();
    // Before it is told to end by itself.
    until("its end", SOON, || (!world.program_runs()).then_some(())).unwrap();
    assert_eq!(world.finish().unwrap().code(), Some(128 + 15));
    bfs_tests::exercise::equal(&world).unwrap();
}

#[test]
fn without_a_criu_that_works_nothing_is_started() {
    let world = World::new("process-without", Transport::Unix).unwrap();
    let old = world.scratch.join("old");
    fs::write(&old, "#!/bin/sh\necho 'Version: 3.10'\n").unwrap();
    let broken = world.scratch.join("broken");
    let text =
        "#!/bin/sh\n[ $1 = --version ] && { echo 'Version: 4.0'; exit; }\necho 'no vdso' >&2; exit 1\n";
    fs::write(&broken, text).unwrap();
    for program in [&old, &broken] {
        fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let none = world.scratch.join("none");
    let mark = world.place.aux.join("mark");
    for (program, says) in
        [(&none, "cannot be executed"), (&old, "is the oldest that does"), (&broken, "no vdso")]
    {
        let mut command = Command::new(binary("bfs-agent"));
        command.args(["run", "--group", &world.group, "--with-process", "--criu"]).arg(program);
        command
            .arg("--path")
            .arg(&world.place.data)
            .arg("--backup")
            .arg(format!("dir:{}", world.store.display()));
        command.args(["--", "touch"]).arg(&mark);
        let done = command.output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(USAGE), "{said}");
        assert!(said.contains(says) && said.contains("--criu"), "{said}");
    }
    assert!(!mark.exists());
}

/// Each checkpoint of the backup has its processes as well, or says that it has not, whatever dies meanwhile.
#[test]
fn the_backup_has_the_processes_too() {
    let mut world = started("process-shipped", "counter.py", &[]);
    let shipped = |world: &World| {
        let status = world.status().unwrap();
        status["process"]["shipped"].as_u64().unwrap_or(0)
    };
    for round in 0..rounds(4, 30) {
        let before = shipped(&world);
        until("process state on the backup", SOON, || (shipped(&world) > before + 1).then_some(())).unwrap();
        let last = shipped(&world);
        // Confirmed, so it is applied soon.
        let bytes = until("its checkpoint", SOON, || {
            on_backup(&world).into_iter().find(|(number, _)| *number == last).map(|(_, bytes)| bytes)
        });
        assert!(bytes.unwrap().is_some_and(|bytes| bytes > 1 << 20), "checkpoint {last}");
        world.kill_replayer().unwrap();
        std::thread::sleep(Duration::from_millis(37 * round as u64 % 500));
        world.start_replayer().unwrap();
    }
    let status = world.status().unwrap();
    println!("{}", status["process"]);
    // Only what changed travels.
    let (all, sent) = (&status["process"]["last_bytes"], &status["process"]["shipped_bytes"]);
    assert!(sent.as_u64().unwrap() < all.as_u64().unwrap() / 2, "{sent} of {all}");
    let folder = world.store.join("process").join(&world.group);
    for entry in fs::read_dir(&folder).unwrap() {
        assert_eq!(entry.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
    ends_right(&mut world);
    let had = on_backup(&world);
    assert!(had.iter().any(|(_, bytes)| bytes.is_some()), "{had:?}");
    assert_eq!(had.last().unwrap().1, None, "the program had ended");
    world.kill_replayer().unwrap();
    let done = world.of_replayer(&["check", "--read-data"]).unwrap();
    assert!(done.status.success(), "{done:?}");
}

/// `bfs-replayer promote --with-process` on a host; the agent that it becomes has these options.
fn promote(hosts: &mut Hosts, name: &str, to: &str, backup: &str) {
    let mut promote = hosts.replayer(name, "promote");
    promote.args(promotion(hosts, name, to, backup));
    hosts.start(name, promote).unwrap();
}

fn promotion(hosts: &Hosts, name: &str, to: &str, backup: &str) -> Vec<String> {
    let images = hosts.host(name).own.join("images").display().to_string();
    let words = ["--to", to, "--with-process", "--process-dir", &images, "--", "--backup", backup];
    words.iter().map(|word| (*word).to_owned()).chain(host_options(hosts, name)).collect()
}

/// Two hosts, each the backup of the other, and the counter on the first, with some of its state on the second.
fn counter_on_a(name: &str) -> Hosts {
    let mut hosts = Hosts::both_ways(name).unwrap();
    let (place, to_b) = (hosts.a.place.clone(), hosts.b.destination());
    let mut run = hosts.agent("a", "run");
    run.args(["--with-process", "--process-dir"]).arg(hosts.a.own.join("images"));
    run.arg("--path").arg(&place.data).args(["--backup", &to_b]).args(host_options(&hosts, "a"));
    run.args(["--", "python3"]).arg(script("counter.py")).args([&place.data, &place.aux]);
    hosts.start("a", run).unwrap();
    until("process state on the backup", SOON, || (shipped(&hosts, "a") > 2).then_some(())).unwrap();
    hosts
}

/// The last checkpoint whose processes the backup of a host has; 0 for none.
fn shipped(hosts: &Hosts, name: &str) -> u64 {
    hosts.status(name).ok().and_then(|status| status["process"]["shipped"].as_u64()).unwrap_or(0)
}

/// The primary dies, the program goes on on the other host, with memory and files of one instant; then the roles swap.
#[test]
fn the_program_goes_on_on_the_other_host_and_comes_back() {
    let mut hosts = counter_on_a("process-hosts");
    let to_a = hosts.a.destination();
    let place = hosts.a.place.clone();
    let log_a = hosts.a.data().join("log");
    hosts.kill_agent("a").unwrap();
    let had = counted_in(&log_a);

    promote(&mut hosts, "b", "/", &to_a);
    let log_b = hosts.b.data().join("log");
    until("progress on b", SOON, || (counted_lines(&log_b) > had + 100).then_some(())).unwrap();
    println!("killed on a at {had}, on b it is at {}", counted_lines(&log_b));
    let before = shipped(&hosts, "b");
    until("process state back on a", SOON, || (shipped(&hosts, "b") > before + 2).then_some(())).unwrap();

    // The second failure. Below a directory of a the files stand elsewhere than the program sees them.
    hosts.kill_agent("b").unwrap();
    let had = counted_in(&log_b);
    let elsewhere = hosts.scratch("elsewhere");
    let own_store = format!("unix:{}/replayer.sock", hosts.a.store().display());
    promote(&mut hosts, "a", elsewhere.to_str().unwrap(), &own_store);
    let data = elsewhere.join(place.data.strip_prefix("/").unwrap());
    until("progress on a", SOON, || (counted_lines(&data.join("log")) > had + 100).then_some(())).unwrap();
    assert_eq!(counted_in(&log_a.clone()), counted_in(&log_a), "what stood there before is as it was");
    println!("killed on b at {had}, on a it is at {}", counted_lines(&data.join("log")));
    until("process state again", SOON, || (shipped(&hosts, "a") > 0).then_some(())).unwrap();
    // Its memory never left it: the program finds itself right, and ends as it was told on the host where it began.
    fs::write(place.stop(), "").unwrap();
    assert_eq!(hosts.ended("a").unwrap(), 0);
    let all = counted_in(&data.join("log"));
    assert!(all > had + 100, "{all} after {had}");
    let backup = hosts.a.store().join("tree").join(&hosts.group).join(data.strip_prefix("/").unwrap());
    assert_eq!(bfs_tests::oracle::compare(&data, &backup).unwrap(), Vec::<String>::new());
    // What began is not there to begin once more, on files that went on.
    let consumed = hosts.a.own.join("images").join(format!("{}.promoted", hosts.group));
    assert!(!consumed.exists());
}

/// Killed at any moment, the promotion is finished by the same command: the program begins once, from files and memory of one
/// instant.
#[test]
fn a_promotion_that_is_killed_is_finished_by_the_same_command() {
    let mut hosts = counter_on_a("process-killed");
    let to_a = hosts.a.destination();
    hosts.kill_agent("a").unwrap();
    let written = hosts.b.own.join("images").join(format!("{}.promoted", hosts.group));
    let mut rounds = 0;
    // Until it has come so far that the processes are there and have not begun.
    while !written.exists() {
        rounds += 1;
        assert!(rounds < 500, "it is killed too early each time");
        let mut killed = hosts.b.command("timeout");
        let after = format!("{}", 0.005 * f64::from(rounds));
        killed.args(["--signal", "KILL", &after]).arg(binary("bfs-replayer"));
        killed.args(["promote", "--group", &hosts.group, "--store"]).arg(hosts.b.store());
        let said = hosts.output(killed.args(promotion(&hosts, "b", "/", &to_a))).unwrap();
        println!("{rounds}: {}", String::from_utf8_lossy(&said.stderr));
        // The agent that it becomes makes this folder, and takes what was written into it.
        let begun = written.with_extension("").exists() && !written.exists();
        assert!(!begun, "it was killed too late: the processes have begun");
    }
    println!("killed {rounds} times");
    promote(&mut hosts, "b", "/", &to_a);
    let log = hosts.b.data().join("log");
    let had = counted_in(&log);
    until("progress on b", SOON, || (counted_lines(&log) > had + 100).then_some(())).unwrap();
    assert!(!written.exists(), "they would begin once more");
    fs::write(hosts.a.place.stop(), "").unwrap();
    assert_eq!(hosts.ended("b").unwrap(), 0);
    assert!(counted_in(&log) > had);
}

/// A further destination gets whole checkpoints, and their processes: it can be promoted as well.
#[test]
fn a_further_destination_has_the_processes_too() {
    let mut world = World::new("process-further", Transport::Unix).unwrap();
    let (second, sock) = (world.root().join("second"), world.root().join("second.sock"));
    let listen = format!("unix:{}", sock.display());
    let second_word = second.display().to_string();
    let mut serves =
        world.spawn_replayer_command(&["serve", "--store", &second_word, "--listen", &listen]).unwrap();
    until("another replayer", SOON, || sock.exists().then_some(())).unwrap();
    start(&mut world, &criu(), "counter.py", &["--backup", &listen]);
    let further = |world: &World| world.status().unwrap()["process"]["further"][0].clone();
    let shipped = |world: &World| further(world)["shipped"].as_u64().unwrap_or(0);
    until("process state there", SOON, || (shipped(&world) > 0).then_some(())).unwrap();
    // Nothing goes there while it is paused, and the newest when it goes on.
    world.agent_command(&["dest", "pause", &listen], SOON).unwrap();
    let before = images(&world).0;
    until("dumps", SOON, || (images(&world).0 > before + 3).then_some(())).unwrap();
    let paused = shipped(&world);
    world.agent_command(&["dest", "resume", &listen], SOON).unwrap();
    until("process state there again", SOON, || (shipped(&world) > paused + 2).then_some(())).unwrap();
    ends_right(&mut world);

    assert!(promoted(&world, &second) > 0);
    serves.kill().unwrap();
    serves.wait().unwrap();
}
