//! A third store that follows the second one, over TLS with a key that may only read: the primary, its backup, and the
//! backup's backup, with real binaries, while any of the three is killed. Compared with copies of the primary.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use bfs_tests::copy;
use bfs_tests::programs::names::RandomNames;
use bfs_tests::random::{Random, given_seed};
use bfs_tests::stores::{is_sound, kept, replayer, restored_equals};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{How, Transport, World, binary, command_ok, rounds, said};

/// A host of its own: it has a key that the replayer lets read, and write nothing.
struct Third {
    keys: PathBuf,
    store: PathBuf,
    follower: Option<Child>,
}

impl Third {
    fn new(world: &World) -> Self {
        let (keys, store) = (world.root().join("third-keys"), world.root().join("third"));
        let token = world.token(&["--group", &world.group, "--may", "read"]).unwrap();
        let mut pair = Command::new(binary("bfs-agent"));
        let done = pair.arg("pair").arg("--keys").arg(&keys).args([&world.destination(), &token]).output();
        said(&done.unwrap()).unwrap();
        Self { keys, store, follower: None }
    }

    fn words<'a>(&'a self, world: &'a World, from: &'a str) -> Vec<&'a str> {
        let (keys, store) = (self.keys.to_str().unwrap(), self.store.to_str().unwrap());
        vec!["follow", "--store", store, "--keys", keys, "--group", &world.group, "--from", from]
    }

    fn follow(&mut self, world: &World) {
        let from = world.destination();
        let words = [self.words(world, &from), vec!["--every", "50ms"]].concat();
        self.follower = Some(world.spawn_replayer_command(&words).unwrap());
    }

    fn kill(&mut self) {
        let mut follower = self.follower.take().expect("it follows");
        assert!(follower.try_wait().unwrap().is_none(), "it followed until it was killed");
        follower.kill().unwrap();
        follower.wait().unwrap();
    }

    /// Waits until the store has a checkpoint.
    fn has(&mut self, world: &World, number: u64) {
        until("the third store", SOON, || {
            let ended = self.follower.as_mut().and_then(|follower| follower.try_wait().unwrap());
            assert_eq!(ended, None, "the follower goes on");
            let ask = ["generations", "--json", "--group", &world.group];
            let done = replayer(&ask, &self.store).output().unwrap();
            let all: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap_or_default();
            let numbers = all.as_array().into_iter().flatten().map(|line| line["checkpoint"].as_u64());
            numbers.flatten().any(|there| there == number).then_some(())
        })
        .unwrap();
    }
}

fn terminate(mut child: Child) -> std::process::ExitStatus {
    // SAFETY: plain kill of a child that was not waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGTERM) }, 0);
    child.wait().unwrap()
}

/// Checkpoints while the follower or the store in the middle is killed: what the third store has of them equals their copies,
/// and it always comes to have the last one.
#[test]
fn a_third_store_follows_the_second_through_kills_of_each() {
    let mut random = Random::new(given_seed().unwrap_or(7));
    let mut world = World::new("cascade", Transport::Tcp).unwrap();
    world.start(&RandomNames, How::Run).unwrap();
    let mut third = Third::new(&world);
    third.follow(&world);
    let mut copies: Vec<(u64, PathBuf)> = Vec::new();
    for index in 0..rounds(6, 40) {
        let at = world.scratch.join(format!("then-{index}"));
        let number = world.checkpoint_stopped(&copy::command(&world.place.data, &at)).unwrap();
        copies.push((number, at));
        std::thread::sleep(Duration::from_millis(random.below(200) as u64));
        match index % 3 {
            0 => {
                third.kill();
                world.checkpoint_until("applied").unwrap();
                third.follow(&world);
            }
            1 => {
                world.kill_replayer().unwrap();
                std::thread::sleep(Duration::from_millis(random.below(100) as u64));
                world.start_replayer().unwrap();
            }
            _ => third.has(&world, number),
        }
    }
    let at = world.scratch.join("then-last");
    let number = world.checkpoint_stopped(&copy::command(&world.place.data, &at)).unwrap();
    third.has(&world, number);
    copies.push((number, at));
    assert!(terminate(third.follower.take().unwrap()).success(), "it ends when it is asked to");
    world.finish().unwrap();
    let there = kept(&world, &third.store);
    assert!(there.len() >= 3, "{there:?}");
    for (number, at) in copies.iter().filter(|(number, _)| there.contains(number)) {
        restored_equals(&world, &third.store, *number, at);
    }
    is_sound(&third.store);
}

/// Once is as good as always; the key that may read may not write; and a checkpoint that was merged away is no beginning.
#[test]
fn what_can_not_be_followed_is_said_and_nothing_is_changed() {
    let mut world = World::new("cascade-parts", Transport::Tcp).unwrap();
    world.replayer_options(&["--keep-min", "1"]);
    world.start(&RandomNames, How::Run).unwrap();
    let third = Third::new(&world);
    let from = world.destination();
    let once = [third.words(&world, &from), vec!["--once"]].concat();
    let first = world.checkpoint_until("applied").unwrap();
    command_ok(Command::new(binary("bfs-replayer")).args(&once)).unwrap();
    let newest_here = *kept(&world, &third.store).last().unwrap();
    assert!(newest_here >= first);
    // Twice is as good as once.
    command_ok(Command::new(binary("bfs-replayer")).args(&once)).unwrap();
    // A key that may only read cannot write there.
    let mut send =
        replayer(&["send", "--group", &world.group, "--to", &newest_here.to_string()], &third.store);
    let stream = world.scratch.join("stream");
    fs::write(&stream, command_ok(&mut send).unwrap().stdout).unwrap();
    let refused = write_to(&from, &third.keys, &world.group, &stream);
    assert_eq!(refused.status.code(), Some(17), "{}", String::from_utf8_lossy(&refused.stderr));
    // What is not kept there any more is no beginning of a difference.
    for _ in 0..3 {
        world.checkpoint_until("applied").unwrap();
    }
    let all = kept(&world, &world.store);
    let (oldest, last) = (all[0].to_string(), all[all.len() - 2].to_string());
    command_ok(&mut replayer(&["merge", "--group", &world.group, &oldest, &last], &world.store)).unwrap();
    let done = Command::new(binary("bfs-replayer")).args(&once).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(said.contains("is not kept there any more"), "{said}");
    assert_eq!(kept(&world, &third.store).last(), Some(&newest_here), "nothing was changed");
    world.finish().unwrap();
}

fn write_to(address: &str, keys: &Path, group: &str, stream: &Path) -> std::process::Output {
    let mut receive = Command::new(binary("bfs-replayer"));
    receive.args(["receive", "--connect", address, "--group", group, "--keys"]).arg(keys).arg(stream);
    receive.output().unwrap()
}
