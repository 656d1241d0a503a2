//! kill -9: of the replayer at random moments, of the agent (its successor reads on from the pinned
//! ring), and of the agent while the program is stopped. The program never notices, nothing that was
//! confirmed is lost, and the final trees are equal.

use std::fs;
use std::time::{Duration, Instant};

use bfs_tests::exercise;
use bfs_tests::programs::append::AppendWriters;
use bfs_tests::programs::scripts::FsScript;
use bfs_tests::programs::sqlite::{Mode, Sqlite};
use bfs_tests::programs::{BesideMuch, Program};
use bfs_tests::random::{Random, given_seed};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{How, Transport, World, rounds};

/// Random moments from a seed that the failure message can name (`BFS_SEED`).
struct Moments(Random);

impl Moments {
    fn new() -> Self {
        let seed = given_seed().unwrap_or(20_240_607);
        eprintln!("BFS_SEED={seed}");
        Self(Random::new(seed))
    }

    /// Lets a random time below `most` pass: the moment of the kill is what is tested.
    fn pass(&mut self, most: Duration) {
        std::thread::sleep(most.mul_f64(self.0.below(1000) as f64 / 1000.0));
    }
}

fn confirmed(world: &World) -> u64 {
    world.status_number(&["confirmed"]).unwrap()
}

/// What the agent was told to be durable, and confirmed.
fn acknowledged(world: &World) -> [u64; 2] {
    let status = world.status().unwrap();
    let destination = &status["destinations"][0];
    ["durable", "confirmed"]
        .map(|what| destination[what].as_u64().unwrap_or_else(|| panic!("no {what} in {destination}")))
}

fn replayer_killed(program: &dyn Program, transport: Transport) {
    let mut world = World::new(&format!("kill-replayer-{}", program.name()), transport).unwrap();
    // Checkpoints all the time: kills hit the log, the confirming and the applying.
    world.checkpoints("every=100ms");
    world.start(program, How::Run).unwrap();
    let mut moments = Moments::new();
    for _ in 0..rounds(8, 50) {
        moments.pass(Duration::from_millis(600));
        let before = acknowledged(&world);
        world.kill_replayer().unwrap();
        // The agent stands meanwhile: what the replayer has is what it had, not what was sent again.
        world.pause_agent(true).unwrap();
        moments.pass(Duration::from_millis(200));
        world.start_replayer().unwrap();
        let status = world.replayer_status().unwrap();
        assert_eq!(status["attached"].as_bool(), Some(false), "{status}");
        for (what, before) in ["durable", "confirmed"].into_iter().zip(before) {
            let now = status[what].as_u64().unwrap_or_else(|| panic!("no {what} in {status}"));
            assert!(now >= before, "{before} was acknowledged as {what}, the replayer has {now}: {status}");
        }
        world.pause_agent(false).unwrap();
        until("the replayer to go on", SOON, || (confirmed(&world) > before[1]).then_some(())).unwrap();
        assert!(world.program_runs(), "the program ended when the replayer was killed");
    }
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
    let wrong = program.check(&world.backup(), &world.place).unwrap();
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn the_replayer_is_killed_during_appends() {
    replayer_killed(&AppendWriters, Transport::Tcp);
}

#[test]
fn the_replayer_is_killed_during_a_shell_script() {
    replayer_killed(&FsScript, Transport::Unix);
}

fn agent_killed(program: &dyn Program) {
    let mut world = World::new(&format!("kill-agent-{}", program.name()), Transport::Unix).unwrap();
    let program = &BesideMuch(program);
    world.start(program, How::Run).unwrap();
    world.checkpoint().unwrap();
    let sent = |world: &World| world.status_number(&["stream_bytes"]).unwrap();
    assert!(sent(&world) > BesideMuch::BYTES, "the first copy holds all that lies there");
    let mut moments = Moments::new();
    for index in 0..rounds(4, 50) {
        moments.pass(Duration::from_millis(600));
        world.kill_agent().unwrap();
        moments.pass(Duration::from_millis(200));
        assert!(world.program_runs(), "the program ended when the agent was killed");
        world.resume().unwrap();
        exercise::cut(&world, program, index).unwrap();
        // The successor reads on: it does not copy everything again, at most what the program works
        // on (twice, when that was touched while it was read). Its counters are its own.
        let again = sent(&world);
        let own = BesideMuch::own_bytes(&world.place).unwrap();
        let bound = BesideMuch::BYTES / 8 + 2 * own;
        assert!(again < bound.min(BesideMuch::BYTES), "the successor sent {again} bytes, of {own} in use");
    }
    exercise::stopped(&world, 0).unwrap();
    world.finish().unwrap();
    exercise::equal(&world).unwrap();
}

#[test]
fn the_agent_is_killed_during_appends() {
    agent_killed(&AppendWriters);
}

#[test]
fn the_agent_is_killed_during_sqlite() {
    agent_killed(&Sqlite(Mode::Journal));
}

fn stopped_when_the_agent_dies(how: How, name: &str) {
    let mut world = World::new(name, Transport::Unix).unwrap();
    world.start(&AppendWriters, how).unwrap();
    let mark = world.scratch.join("stopped");
    let hold = format!("touch '{}'; exec sleep 60", mark.display());
    let mut command =
        world.spawn_agent_command(&["checkpoint", "--stopped", "--", "/bin/sh", "-c", &hold]).unwrap();
    until("the program to be stopped", SOON, || mark.exists().then_some(())).unwrap();
    let own = world.place.data.join("own-0");
    let size = || fs::metadata(&own).unwrap().len();
    let (stopped_at, began) = (size(), Instant::now());
    while began.elapsed() < Duration::from_millis(200) {
        assert_eq!(size(), stopped_at, "the program runs although it is stopped");
    }
    world.kill_agent().unwrap();
    until("the program to run again", Duration::from_secs(1), || (size() > stopped_at).then_some(()))
        .unwrap();
    command.kill().unwrap();
    command.wait().unwrap();
    assert!(world.program_runs());
}

#[test]
fn a_stopped_cgroup_runs_again_when_the_agent_dies() {
    stopped_when_the_agent_dies(How::Run, "thaw-run");
}

#[test]
fn a_stopped_process_tree_runs_again_when_the_agent_dies() {
    stopped_when_the_agent_dies(How::AttachHalfWay, "thaw-attach");
}
