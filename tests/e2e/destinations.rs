//! Several destinations of a group: each with a position of its own, whatever becomes of the others. Compared with copies of
//! the primary.

use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use bfs_tests::copy;
use bfs_tests::programs::append::AppendWriters;
use bfs_tests::programs::names::RandomNames;
use bfs_tests::random::{Random, given_seed};
use bfs_tests::stores::{has, is_sound, kept, replayer, restored_equals};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{How, Transport, World, command_ok, rounds};

/// A replayer beside the world's own.
struct Other {
    store: PathBuf,
    listen: String,
    serves: Option<Child>,
}

impl Other {
    fn new(world: &World, name: &str) -> Self {
        let store = world.root().join(name);
        let listen = format!("unix:{}", world.root().join(format!("{name}.sock")).display());
        let mut other = Self { store, listen, serves: None };
        other.serve(world);
        other
    }

    fn serve(&mut self, world: &World) {
        let store = self.store.to_str().unwrap();
        let words = ["serve", "--store", store, "--listen", &self.listen];
        self.serves = Some(world.spawn_replayer_command(&words).unwrap());
        let socket = PathBuf::from(self.listen.trim_start_matches("unix:"));
        until("another replayer", SOON, || socket.exists().then_some(())).unwrap();
    }

    fn kill(&mut self) {
        let mut serves = self.serves.take().expect("it serves");
        serves.kill().unwrap();
        serves.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        if let Some(mut serves) = self.serves.take() {
            let _ = serves.kill();
            let _ = serves.wait();
        }
    }
}

/// The last checkpoint that a destination has confirmed, and how it stands.
fn stands(world: &World, at: usize) -> (u64, String) {
    let status = world.status().unwrap();
    let destination = &status["destinations"][at];
    let standing = destination["standing"].as_str().unwrap().to_owned();
    (destination["confirmed"].as_u64().unwrap(), standing)
}

fn dest(world: &World, words: &[&str]) -> Result<String, (Option<i32>, String)> {
    let done = world.agent_command(&[&["dest"], words].concat(), Duration::from_secs(30)).unwrap();
    let (out, err) = (String::from_utf8(done.stdout).unwrap(), String::from_utf8(done.stderr).unwrap());
    if done.status.success() { Ok(out) } else { Err((done.status.code(), err)) }
}

fn copied(world: &World, name: &str) -> (u64, PathBuf) {
    let at = world.scratch.join(name);
    (world.checkpoint_stopped(&copy::command(&world.place.data, &at)).unwrap(), at)
}

/// Of the copies, those that a store keeps.
fn equals_its_own(world: &World, store: &Path, copies: &[(u64, PathBuf)]) -> usize {
    let there = kept(world, store);
    let both: Vec<_> = copies.iter().filter(|(number, _)| there.contains(number)).collect();
    for (number, at) in &both {
        restored_equals(world, store, *number, at);
    }
    is_sound(store);
    both.len()
}

/// Three destinations, two of which are killed, paused and brought back at random; a successor of the agent in between.
#[test]
fn three_destinations_come_and_go_and_each_equals_its_own_checkpoint() {
    let mut random = Random::new(given_seed().unwrap_or(11));
    let mut world = World::new("destinations", Transport::Unix).unwrap();
    let mut second = Other::new(&world, "second");
    let third = world.root().join("third");
    let third_address = format!("dir:{}", third.display());
    world.agent_options(&["--backup", &second.listen.clone(), "--backup", &third_address]);
    world.start(&RandomNames, How::Run).unwrap();
    has(&world, 1, 1);
    has(&world, 2, 1);
    let mut copies = Vec::new();
    let (mut first_is_there, mut paused) = (true, false);
    let (mut without_the_first, mut apart) = (0, 0);
    for index in 0..rounds(8, 60) {
        match random.below(5) {
            0 if second.serves.is_some() => second.kill(),
            0 => second.serve(&world),
            1 if first_is_there => {
                world.kill_replayer().unwrap();
                first_is_there = false;
            }
            1 => {
                world.start_replayer().unwrap();
                first_is_there = true;
            }
            2 => {
                let verb = if paused { "resume" } else { "pause" };
                let all = dest(&world, &[verb, &third_address]).unwrap();
                assert_eq!(all.lines().count(), 3, "{all}");
                paused = !paused;
            }
            3 if index > 3 && first_is_there => {
                world.kill_agent().unwrap();
                world.resume().unwrap();
                // What somebody paused goes on with a new agent.
                paused = false;
            }
            _ => {}
        }
        if !first_is_there && second.serves.is_none() && paused {
            continue;
        }
        let taken = copied(&world, &format!("then-{index}"));
        let others = [(first_is_there, 0), (second.serves.is_some(), 1), (!paused, 2)];
        for (_, at) in others.into_iter().filter(|(there, _)| *there) {
            has(&world, at, taken.0);
            without_the_first += usize::from(!first_is_there && at > 0);
        }
        apart += usize::from(others.iter().any(|(there, at)| !there && stands(&world, *at).0 < taken.0));
        copies.push(taken);
    }
    assert!(apart > 0, "their positions differed");
    assert!(without_the_first > 0 || rounds(0, 1) == 1, "the others went on while the first was away");
    if !first_is_there {
        world.start_replayer().unwrap();
    }
    if second.serves.is_none() {
        second.serve(&world);
    }
    if paused {
        dest(&world, &["resume", &third_address]).unwrap();
    }
    let last = copied(&world, "then-last");
    for at in 0..3 {
        has(&world, at, last.0);
    }
    copies.push(last);
    assert!(world.finish().unwrap().success());
    world.kill_replayer().unwrap();
    second.kill();
    for store in [&world.store, &second.store, &third] {
        assert!(equals_its_own(&world, store, &copies) >= 1, "{}", store.display());
    }
}

/// What `--confirm` says is what a checkpoint waits for.
#[test]
fn a_checkpoint_is_confirmed_by_whom_the_user_says() {
    for (confirm, first, second) in
        [("attached", true, true), ("all", false, false), ("any", true, true), ("2", false, false)]
    {
        let mut world = World::new("confirm", Transport::Unix).unwrap();
        let mut other = Other::new(&world, "second");
        world.agent_options(&["--backup", &other.listen.clone(), "--confirm", confirm]);
        world.start_replayer().unwrap();
        world.rest().unwrap();
        has(&world, 1, 1);
        let confirmed = |world: &World| {
            fs::write(world.place.data.join("changed"), confirm).unwrap();
            let words = ["checkpoint", "--timeout", "3s"];
            world.agent_command(&words, SOON).unwrap().status.success()
        };
        assert!(confirmed(&world), "{confirm}: both are there");
        other.kill();
        until("the second to be away", SOON, || (stands(&world, 1).1 == "detached").then_some(())).unwrap();
        assert_eq!(confirmed(&world), second, "{confirm}: the second is away");
        other.serve(&world);
        until("the second to be back", SOON, || (stands(&world, 1).1 == "attached").then_some(())).unwrap();
        assert!(confirmed(&world), "{confirm}: the second is back");
        world.kill_replayer().unwrap();
        until("the first to be away", SOON, || (stands(&world, 0).1 == "detached").then_some(())).unwrap();
        assert_eq!(confirmed(&world), first, "{confirm}: the first is away");
        world.start_replayer().unwrap();
        until("the first to be back", SOON, || (stands(&world, 0).1 == "attached").then_some(())).unwrap();
        assert!(confirmed(&world), "{confirm}: the first is back");
        assert!(world.finish().unwrap().success());
    }
}

/// The agent dies while the first destination is away: no other has a checkpoint that the first one never comes to have.
#[test]
fn nobody_is_ahead_of_what_the_first_comes_to_have() {
    for spool in [true, false] {
        let mut world = World::new("dest-ahead", Transport::Unix).unwrap();
        let other = Other::new(&world, "second");
        let size = if spool { "64M" } else { "0" };
        world.agent_options(&["--backup", &other.listen, "--confirm", "any", "--spool-size", size]);
        world.start_replayer().unwrap();
        world.rest().unwrap();
        has(&world, 1, 1);
        world.kill_replayer().unwrap();
        until("the first to be away", SOON, || (stands(&world, 0).1 == "detached").then_some(())).unwrap();
        let (before, first) = (stands(&world, 1).0, stands(&world, 0).0);
        fs::write(world.place.data.join("changed"), "while the first was away").unwrap();
        // Written by nobody who is selected, so it is seen as a stranger's, and read.
        let words = ["checkpoint", "--timeout", "5s"];
        let confirmed = world.agent_command(&words, SOON).unwrap().status.success();
        assert_eq!(confirmed, spool);
        assert_eq!(stands(&world, 1).0 > before, spool, "it has what is in the spool, and nothing else");
        assert_eq!(stands(&world, 0).0, first);
        world.kill_agent().unwrap();
        world.start_replayer().unwrap();
        world.resume().unwrap();
        let number = world.checkpoint().unwrap();
        has(&world, 0, number);
        has(&world, 1, number);
        assert_eq!(stands(&world, 1).1, "attached");
        let last = copied(&world, "then-last");
        has(&world, 1, last.0);
        assert!(world.finish().unwrap().success());
        drop(other);
        assert_eq!(equals_its_own(&world, &world.root().join("second"), &[last]), 1);
    }
}

/// What both of them have the first one keeps no longer: each says so, and neither takes the other for one that has what there is.
#[test]
fn two_that_were_away_for_too_long_are_told_so() {
    let mut world = World::new("dest-merged", Transport::Unix).unwrap();
    let others = [Other::new(&world, "second"), Other::new(&world, "third")];
    let backups: Vec<&str> = others.iter().flat_map(|other| ["--backup", other.listen.as_str()]).collect();
    world.agent_options(&backups);
    world.replayer_options(&["--keep", "last=1", "--keep-min", "1"]);
    world.start_replayer().unwrap();
    world.rest().unwrap();
    let number = world.checkpoint().unwrap();
    for (at, other) in others.iter().enumerate() {
        has(&world, at + 1, number);
        dest(&world, &["pause", &other.listen]).unwrap();
    }
    let changed = world.place.data.join("changed");
    for text in ["one", "two", "three"] {
        fs::write(&changed, text).unwrap();
        world.checkpoint().unwrap();
    }
    // What was kept for them, and that they are paused, ends with the agent.
    world.kill_agent().unwrap();
    world.resume().unwrap();
    fs::write(&changed, "four").unwrap();
    world.checkpoint().unwrap();
    let told = (number, "diverged".to_owned());
    for at in [1, 2] {
        until("it to be told", SOON, || (stands(&world, at) == told).then_some(())).unwrap();
    }
    // Each looks again now and then, also just when the other one does.
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!([1, 2].map(|at| stands(&world, at)), [told.clone(), told]);
    assert!(world.finish().unwrap().success());
}

/// Added while a program works, paused, resumed, looked at anew, removed; a successor has the same ones.
#[test]
fn destinations_are_changed_while_a_program_works() {
    let mut world = World::new("dest", Transport::Unix).unwrap();
    let mut other = Other::new(&world, "second");
    let second = other.listen.clone();
    let third = world.root().join("third");
    let address = format!("dir:{}", third.display());
    world.start(&RandomNames, How::Run).unwrap();
    world.checkpoint().unwrap();
    let listed = |world: &World| dest(world, &["list"]).unwrap().lines().count();
    assert_eq!(listed(&world), 1);

    // What cannot be changed so is refused, and nothing is changed.
    let inside = format!("dir:{}", world.place.data.join("store").display());
    let first = world.destination();
    for (words, says) in [
        (["add", first.as_str()], "is the first destination"),
        (["remove", &first], "is the first destination"),
        (["remove", &second], "has no destination"),
        (["pause", &second], "has no destination"),
        (["resync", &second], "has no destination"),
        (["add", &inside], "overlaps the store"),
        (["add", "tcp://127.0.0.1:1"], "not paired"),
    ] {
        let (_, said) = dest(&world, &words).unwrap_err();
        assert!(said.contains(says), "{words:?}: {said}");
    }
    assert_eq!(listed(&world), 1);

    dest(&world, &["add", &second]).unwrap();
    let (_, said) = dest(&world, &["add", &second]).unwrap_err();
    assert!(said.contains("is a destination already"), "{said}");
    dest(&world, &["add", &address]).unwrap();
    let mut copies = vec![copied(&world, "then-0")];
    has(&world, 1, copies[0].0);
    has(&world, 2, copies[0].0);

    dest(&world, &["pause", &second]).unwrap();
    copies.push(copied(&world, "then-1"));
    has(&world, 2, copies[1].0);
    let (number, standing) = stands(&world, 1);
    assert!(number < copies[1].0 && standing == "detached", "{number} {standing}");
    dest(&world, &["resume", &second]).unwrap();
    has(&world, 1, copies[1].0);

    // Files of the agent before are gone with it: what is missed comes from another destination.
    other.kill();
    copies.push(copied(&world, "then-2"));
    world.kill_agent().unwrap();
    world.resume().unwrap();
    assert_eq!(listed(&world), 3);
    other.serve(&world);
    copies.push(copied(&world, "then-3"));
    has(&world, 1, copies[3].0);
    has(&world, 2, copies[3].0);

    dest(&world, &["resync", &second]).unwrap();
    dest(&world, &["remove", &address]).unwrap();
    assert_eq!(listed(&world), 2);
    copies.push(copied(&world, "then-4"));
    has(&world, 1, copies[4].0);
    assert!(world.finish().unwrap().success());
    other.kill();
    assert!(equals_its_own(&world, &other.store, &copies) >= 3);
    let there = kept(&world, &third);
    assert!(!there.contains(&copies[4].0), "it was removed before: {there:?}");
    assert!(equals_its_own(&world, &third, &copies) >= 2);
}

/// The first destination was lost in the midst of a step, and comes back as a further one: what no checkpoint covers there is void.
#[test]
fn the_first_may_come_back_as_a_further_one() {
    let mut world = World::new("dest-swapped", Transport::Unix).unwrap();
    let mut other = Other::new(&world, "second");
    world.agent_options(&["--backup", &other.listen]);
    world.start(&RandomNames, How::AttachHalfWay).unwrap();
    let before = copied(&world, "then-0");
    has(&world, 1, before.0);
    let durable = || world.status().unwrap()["destinations"][0]["durable"].as_u64().unwrap();
    let then = durable();
    until("records behind the checkpoint", SOON, || (durable() > then + 100).then_some(())).unwrap();
    world.kill_replayer().unwrap();
    let without = copied(&world, "then-1");
    has(&world, 1, without.0);
    let stopped = world.agent_command(&["stop", "--timeout", "60s"], SOON).unwrap();
    assert!(stopped.status.success(), "{}", String::from_utf8_lossy(&stopped.stderr));

    world.start_replayer().unwrap();
    let pid = world.program_pid().unwrap().to_string();
    let (data, spool, first) =
        (world.place.data.display().to_string(), world.spool().display().to_string(), world.destination());
    let words = ["attach", "--path", &data, "--checkpoint", "manual", "--spool", &spool, "--pid", &pid];
    let backups = ["--backup", &other.listen, "--backup", &first];
    let mut agent = world.spawn_agent_command(&[&words[..], &backups[..]].concat()).unwrap();
    until("an agent with another first destination", SOON, || {
        (world.status().ok()?["checkpoints_taken"].as_u64()? > 0).then_some(())
    })
    .unwrap();
    let last = copied(&world, "then-2");
    has(&world, 0, last.0);
    has(&world, 1, last.0);
    let stopped = world.agent_command(&["stop", "--timeout", "60s"], SOON).unwrap();
    assert!(stopped.status.success(), "{}", String::from_utf8_lossy(&stopped.stderr));
    assert!(agent.wait().unwrap().success());
    fs::write(world.place.stop(), "").unwrap();
    world.kill_replayer().unwrap();
    other.kill();
    let copies = [before, without, last];
    assert_eq!(equals_its_own(&world, &other.store, &copies), 3);
    assert!(equals_its_own(&world, &world.store, &copies) >= 2);
}

/// A new destination is copied while the program works, and holes are not sent; after an outage comes what was touched.
#[test]
fn a_new_destination_is_copied_beside_a_busy_program() {
    let mut world = World::new("dest-new", Transport::Unix).unwrap();
    // In a long run 10 GiB, of which half is there.
    let mebibytes = rounds(16, 5120) as u64;
    let sparse_bytes = mebibytes << rounds(26, 20);
    let dense = |name: &str, seed: u64| {
        let mut random = Random::new(seed);
        let mut file = fs::File::create(world.place.data.join(name)).unwrap();
        for _ in 0..mebibytes {
            let bytes: Vec<u8> =
                (0..1 << 17).flat_map(|_| (random.below(1 << 30) as u64).to_le_bytes()).collect();
            file.write_all(&bytes).unwrap();
        }
    };
    dense("dense", 1);
    let sparse = fs::File::create(world.place.data.join("sparse")).unwrap();
    sparse.set_len(sparse_bytes).unwrap();
    for at in 0..16 {
        sparse.write_all_at(b"an island", at * (sparse_bytes / 16) + 5000).unwrap();
    }
    let sent = |world: &World| world.status().unwrap()["destinations"][1]["sent_bytes"].as_u64().unwrap();
    let mut other = Other::new(&world, "second");
    world.start(&AppendWriters, How::Run).unwrap();
    world.checkpoint().unwrap();
    dest(&world, &["add", &other.listen]).unwrap();
    let first = copied(&world, "then-0");
    has(&world, 1, first.0);
    let copy = sent(&world);
    // What the program appends meanwhile travels, however long it takes.
    let appended = |world: &World| -> u64 {
        let files = fs::read_dir(&world.place.data).unwrap().map(|entry| entry.unwrap().metadata().unwrap());
        files.filter(|file| file.is_file()).map(|file| file.len()).sum()
    };
    let before = appended(&world);
    let (dense, meanwhile) = (mebibytes << 20, before - (mebibytes << 20) - sparse_bytes);
    eprintln!("{copy} bytes sent for {dense}, beside {meanwhile} that were appended");
    // Each line that is appended is a record of some hundred bytes, and a long run has many.
    let (beside, record) = (rounds(0, 4) as u64 * meanwhile, rounds(1, 4) as u64);
    assert!(copy >= dense && copy < dense + (16 << 20) + beside, "{copy} bytes for {mebibytes} MiB");

    other.kill();
    for _ in 0..5 {
        world.checkpoint().unwrap();
    }
    other.serve(&world);
    let last = copied(&world, "then-1");
    has(&world, 1, last.0);
    let (rest, touched) = (sent(&world) - copy, appended(&world) - before);
    assert!(
        rest < record * touched + (8 << 20),
        "{rest} bytes after the outage, of which {touched} were appended"
    );
    assert!(world.finish().unwrap().success());
    other.kill();
    assert_eq!(equals_its_own(&world, &other.store, &[first, last]), 2);
}

/// A further destination that was promoted takes nothing more of the old primary, and the others go on.
#[test]
fn a_destination_that_was_promoted_takes_nothing_more() {
    let mut world = World::new("dest-promoted", Transport::Unix).unwrap();
    let other = Other::new(&world, "second");
    let told = world.root().join("told");
    let alert = format!("echo $BFS_ALERT $BFS_STATE $BFS_MESSAGE >> {}", told.display());
    world.agent_options(&["--backup", &other.listen, "--alert", &alert]);
    world.start(&RandomNames, How::Run).unwrap();
    let before = copied(&world, "then-0");
    has(&world, 1, before.0);
    let to = world.scratch.join("promoted");
    let words = ["promote", "--group", &world.group, "--to", to.to_str().unwrap()];
    command_ok(&mut replayer(&words, &other.store)).unwrap();
    let newest = *kept(&world, &other.store).last().unwrap();
    let after = world.checkpoint().unwrap();
    assert!(after > newest);
    until("the promoted one to be told apart", SOON, || (stands(&world, 1).1 == "diverged").then_some(()))
        .unwrap();
    let status = world.status().unwrap();
    let why = status["destinations"][1]["why"].as_str().unwrap();
    assert!(why.contains("promoted"), "{why}");
    let begins = format!("diverged begins {}", other.listen);
    until("somebody to be told", SOON, || {
        fs::read_to_string(&told).is_ok_and(|told| told.contains(&begins)).then_some(())
    })
    .unwrap();
    world.checkpoint().unwrap();
    assert!(world.finish().unwrap().success());
    assert_eq!(*kept(&world, &other.store).last().unwrap(), newest);
}
