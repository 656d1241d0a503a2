//! Hooks around checkpoints: a program brings its files into a state of its own for each, and whatever a hook does, the
//! one after it runs and the program goes on.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use bfs_tests::exercise;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{Transport, World};
use serde_json::Value;

/// A program that changes two files one after the other, all the time. They are equal only where it rests: it does, and
/// says so (`held`), for as long as `hold` is there.
const PAIR: &str = r#"
cd "$1"; n=0; touch "$2/ready"
while ! [ -e "$2/stop" ]; do
    if [ -e "$2/hold" ]; then
        touch "$2/held"
        while [ -e "$2/hold" ]; do :; done
        rm -f "$2/held"
    fi
    n=$((n + 1)); echo $n > a; echo $n > b
done
"#;

/// Each hook writes a line of its own about what it was told.
fn noting(world: &World, which: &str) -> String {
    let log = world.place.aux.join("log");
    format!(
        "echo {which} $BFS_GROUP $BFS_CHECKPOINT \"[$BFS_TAG]\" $BFS_REASON $BFS_RESULT >> {}",
        log.display()
    )
}

fn noted(world: &World) -> Vec<String> {
    let text = fs::read_to_string(world.place.aux.join("log")).unwrap_or_default();
    text.replace(&world.group, "G").lines().map(str::to_owned).collect()
}

fn start(world: &mut World, before: &str, after: &str, script: &str) {
    let before = format!("{}; {before}", noting(world, "before"));
    let after = format!("{}; {after}", noting(world, "after"));
    let limit = if script == PAIR { "60s" } else { "1s" };
    world.agent_options(&[
        "--before-checkpoint",
        &before,
        "--after-checkpoint",
        &after,
        "--hook-limit",
        limit,
    ]);
    world.start_replayer().unwrap();
    let (data, aux) = (world.place.data.display().to_string(), world.place.aux.display().to_string());
    let words = ["sh", "-c", script, "sh", &data, &aux];
    world.run(&words.map(str::to_owned)).unwrap();
}

/// A program that only waits for its end.
const REST: &str = r#"touch "$2/ready"; while ! [ -e "$2/stop" ]; do sleep 0.05; done"#;

fn first_checkpoint(world: &World) {
    until("the first checkpoint", SOON, || (world.status_number(&["applied"]).ok()? >= 1).then_some(()))
        .unwrap();
}

#[test]
fn each_checkpoint_is_where_the_program_was_brought_to() {
    let mut world = World::new("hooks", Transport::Unix).unwrap();
    let aux = world.place.aux.display().to_string();
    let before = format!("touch {aux}/hold; while ! [ -e {aux}/held ]; do :; done");
    let after = format!("rm {aux}/hold; while [ -e {aux}/held ]; do :; done");
    start(&mut world, &before, &after, PAIR);
    first_checkpoint(&world);
    let mut last = 0;
    for round in 0..20 {
        let number = if round % 5 == 4 {
            world.checkpoint_stopped(&["true".to_owned()]).unwrap()
        } else {
            world.checkpoint().unwrap()
        };
        let file = |name: &str| -> u64 {
            fs::read_to_string(world.backup().join(name)).unwrap().trim().parse().unwrap()
        };
        assert_eq!(file("a"), file("b"), "checkpoint {number} is in the midst of it");
        assert!(file("a") > last, "the program did not go on");
        last = file("a");
    }
    let taken = world.status_number(&["checkpoints_taken"]).unwrap();
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
    // Each had both, in their order; the last one none, for there was no program any more.
    let lines = noted(&world);
    assert_eq!(lines.len() as u64, 2 * taken, "{lines:?}");
    for (pair, number) in lines.chunks(2).zip(1..) {
        let reason = if number == 1 { "start" } else { "manual" };
        assert_eq!(pair[0], format!("before G {number} [] {reason}"), "{lines:?}");
        assert_eq!(pair[1], format!("after G {number} [] {reason} taken"), "{lines:?}");
    }
}

fn hooks(world: &World) -> Value {
    world.status().unwrap()["hooks"].clone()
}

fn wait_until_rest(world: &World) {
    until("the hooks to end", SOON, || hooks(world)["running"].is_null().then_some(())).unwrap();
}

#[test]
fn a_hook_that_fails_or_takes_too_long_is_named_and_nothing_is_taken() {
    let mut world = World::new("hooks-fail", Transport::Unix).unwrap();
    let aux = world.place.aux.display().to_string();
    // What it is to do stands in a file, as a script.
    let before = format!("if [ -e {aux}/do ]; then . {aux}/do; fi");
    start(&mut world, &before, "true", REST);
    first_checkpoint(&world);
    wait_until_rest(&world);
    let fails = |does: &str, says: &str| {
        fs::write(format!("{aux}/do"), does).unwrap();
        let began = Instant::now();
        let words = ["checkpoint", "--tag", "x", "--timeout", "30s"];
        let done = world.agent_command(&words, Duration::from_secs(60)).unwrap();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(73), "{said}");
        assert!(said.contains(says) && said.contains("not taken"), "{said}");
        assert!(began.elapsed() < Duration::from_secs(25));
        wait_until_rest(&world);
        let status = world.status().unwrap();
        assert!(status["not_confirmed_because"].as_str().unwrap().contains(says), "{status}");
        assert!(status["hooks"]["last_failure"].as_str().unwrap().contains(says), "{status}");
        let lines = noted(&world);
        assert_eq!(lines[lines.len() - 2..], ["before G 2 [x] manual", "after G 2 [x] manual failed"]);
    };
    fails("exit 3", "ended with status 3");
    fails("kill -9 $$", "ended by signal 9");
    let stays = format!("sh -c 'trap \"\" TERM; echo $$ > {aux}/pid; while :; do sleep 0.05; done' & wait");
    fails(&stays, "took longer than 1 s");
    let pid = fs::read_to_string(format!("{aux}/pid")).unwrap();
    until("what the hook started to be gone", SOON, || {
        let status = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        (status.is_empty() || status.contains(") Z ")).then_some(())
    })
    .unwrap();
    assert_eq!(hooks(&world)["failures"], 3);

    // It asks itself for a checkpoint: that has to wait for it, and it for that. The limit ends it.
    fs::write(format!("{aux}/do"), "sleep 1000").unwrap();
    let words = ["checkpoint", "--timeout", "200ms"];
    let done = world.agent_command(&words, Duration::from_secs(30)).unwrap();
    assert_eq!(done.status.code(), Some(74), "who asked is told when his time is over");
    wait_until_rest(&world);

    fs::remove_file(format!("{aux}/do")).unwrap();
    assert_eq!(world.checkpoint().unwrap(), 2);
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

/// What hooks do to replicated files is in the checkpoint that follows.
#[test]
fn hooks_change_files_themselves() {
    let mut world = World::new("hooks-write", Transport::Unix).unwrap();
    let data = world.place.data.display().to_string();
    let before = format!("cd {data}; echo $BFS_CHECKPOINT > dump.new; mv dump.new dump; date >> log");
    let after = format!("cd {data}; echo $BFS_CHECKPOINT >> taken; rm -f old; mv taken old; cp old taken");
    start(&mut world, &before, &after, REST);
    first_checkpoint(&world);
    for _ in 0..5 {
        wait_until_rest(&world);
        let number = world.checkpoint().unwrap();
        let dump = fs::read_to_string(world.backup().join("dump")).unwrap();
        assert_eq!(dump.trim(), number.to_string());
    }
    wait_until_rest(&world);
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

/// The program waits for the hook after the checkpoint: whoever comes after a killed agent runs it.
#[test]
fn a_hook_that_a_killed_agent_owes_is_run_by_the_next() {
    let mut world = World::new("hooks-kill", Transport::Unix).unwrap();
    let aux = world.place.aux.display().to_string();
    let before = format!("if [ -e {aux}/slow ]; then touch {aux}/begun; sleep 0.7; fi");
    start(&mut world, &before, "true", REST);
    first_checkpoint(&world);
    wait_until_rest(&world);
    fs::write(format!("{aux}/slow"), "").unwrap();
    let mut asked = world.spawn_agent_command(&["checkpoint", "--tag", "t"]).unwrap();
    until("the hook", SOON, || Path::new(&format!("{aux}/begun")).exists().then_some(())).unwrap();
    world.kill_agent().unwrap();
    assert!(!asked.wait().unwrap().success());
    assert_eq!(noted(&world).last().unwrap(), "before G 2 [t] manual");
    world.resume().unwrap();
    let owed = "after G 2 [t] manual unknown".to_owned();
    until("the hook that is owed", SOON, || noted(&world).contains(&owed).then_some(())).unwrap();
    fs::remove_file(format!("{aux}/slow")).unwrap();
    wait_until_rest(&world);
    // The options are those of the agent before.
    until("the first checkpoint of the successor", SOON, || {
        (world.status_number(&["applied"]).ok()? >= 2).then_some(())
    })
    .unwrap();
    wait_until_rest(&world);
    world.checkpoint().unwrap();
    wait_until_rest(&world);
    let lines = noted(&world);
    let of_successor = [
        "before G 2 [t] manual",
        &owed,
        "before G 2 [] start",
        "after G 2 [] start taken",
        "before G 3 [] manual",
        "after G 3 [] manual taken",
    ];
    assert_eq!(lines[lines.len() - 6..], of_successor);
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

/// An agent that leaves a running program takes its last checkpoint with hooks.
#[test]
fn the_last_checkpoint_of_a_program_that_goes_on_has_hooks() {
    let mut world = World::new("hooks-end", Transport::Unix).unwrap();
    let (before, after) = (noting(&world, "before"), noting(&world, "after"));
    world.agent_options(&["--before-checkpoint", &before, "--after-checkpoint", &after]);
    world.start_replayer().unwrap();
    let (data, aux) = (world.place.data.display().to_string(), world.place.aux.display().to_string());
    world.start_program(&["sh", "-c", REST, "sh", &data, &aux].map(str::to_owned)).unwrap();
    world.attach().unwrap();
    first_checkpoint(&world);
    wait_until_rest(&world);
    world.stop_agent().unwrap();
    assert!(world.program_runs());
    let lines = noted(&world);
    assert!(
        lines[lines.len() - 2].ends_with(" end") && lines[lines.len() - 1].ends_with(" end taken"),
        "{lines:?}"
    );
    exercise::equal(&world).unwrap();
}
