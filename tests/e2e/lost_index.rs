//! The index of a store is lost while a program works: it is made again from its copy, and everything goes on where it
//! was. Each checkpoint that is kept is compared with a copy of the primary.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bfs_tests::copy;
use bfs_tests::exercise;
use bfs_tests::programs::BesideMuch;
use bfs_tests::programs::append::AppendWriters;
use bfs_tests::programs::sqlite::{Mode, Sqlite};
use bfs_tests::random::Random;
use bfs_tests::stores::{is_sound, kept, replayer, restored_equals};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{How, Transport, World, command_ok, rounds};

/// What becomes of the index.
#[derive(Clone, Copy, Debug)]
enum Loss {
    Gone,
    Empty,
    Spoiled,
    Older,
}

const LOSSES: [Loss; 4] = [Loss::Gone, Loss::Empty, Loss::Spoiled, Loss::Older];

fn index(world: &World) -> PathBuf {
    world.store.join("index.redb")
}

fn lose(world: &World, loss: Loss, older: &[u8]) {
    let index = index(world);
    match loss {
        Loss::Gone => fs::remove_file(&index).unwrap(),
        Loss::Empty => fs::write(&index, "").unwrap(),
        Loss::Spoiled => {
            let mut bytes = fs::read(&index).unwrap();
            bytes[..4096].fill(0xa5);
            fs::write(&index, bytes).unwrap();
        }
        Loss::Older => fs::write(&index, older).unwrap(),
    }
}

/// The program works on, then it stands and is copied.
fn copied(world: &World, copies: &mut Vec<(u64, PathBuf)>) {
    world.checkpoint().unwrap();
    let at = world.scratch.join(format!("then-{}", copies.len()));
    let number = world.checkpoint_stopped(&copy::command(&world.place.data, &at)).unwrap();
    copies.push((number, at));
}

fn all_are_given_back(world: &World, copies: &[(u64, PathBuf)]) {
    let kept = kept(world, &world.store);
    for (number, at) in copies {
        assert!(kept.contains(number), "checkpoint {number} is not among {kept:?}");
        restored_equals(world, &world.store, *number, at);
    }
}

/// The store is refused, and the command is named that helps.
fn is_refused(world: &mut World) {
    assert!(world.start_replayer().is_err(), "a store without its index was opened");
    world.kill_replayer().unwrap();
    let done = replayer(&["generations", "--group", &world.group], &world.store).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(11), "{said}");
    assert!(said.contains("check --rebuild-index"), "{said}");
}

#[test]
fn a_lost_index_is_made_again_and_everything_goes_on() {
    let mut world = World::new("lost-index", Transport::Unix).unwrap();
    world.start(&BesideMuch(&Sqlite(Mode::Journal)), How::Run).unwrap();
    let sent = |world: &World| world.status_number(&["stream_bytes"]).unwrap();
    let mut moments = Random::printed();
    let mut copies = Vec::new();
    copied(&world, &mut copies);
    assert!(sent(&world) > BesideMuch::BYTES, "the first copy has all that lies there");
    // As it was when it was lost before.
    let mut older = Vec::new();
    for round in 0..rounds(8, 100) {
        let loss = LOSSES[round % LOSSES.len()];
        copied(&world, &mut copies);
        // One more is on its way at the kill, somewhere.
        let (confirmed, before_kill) = (world.status_number(&["confirmed"]).unwrap(), sent(&world));
        let mut on_its_way = world.spawn_agent_command(&["checkpoint"]).unwrap();
        std::thread::sleep(Duration::from_millis(moments.below(400) as u64));
        world.kill_replayer().unwrap();
        let now = fs::read(index(&world)).unwrap();
        lose(&world, loss, &older);
        older = now;
        is_refused(&mut world);
        let (before, folder) = (fs::read(index(&world)).ok(), index(&world));
        let mut rebuild = replayer(&["check", "--rebuild-index"], &world.store);
        let said = String::from_utf8(command_ok(&mut rebuild).unwrap().stdout).unwrap();
        assert!(said.contains("the index was made again"), "{loss:?}: {said}");
        let aside = fs::read(folder.with_extension("redb.replaced")).ok();
        assert_eq!(before.is_some(), said.contains("redb.replaced"), "{said}");
        // An older one is opened to see that it is older, which a database that was not closed notes in its file.
        let same = before.is_none() || before == aside || matches!(loss, Loss::Older);
        assert!(same, "{loss:?}: what stood there is kept");
        world.start_replayer().unwrap();
        let status = world.replayer_status().unwrap();
        let now = status["confirmed"].as_u64().unwrap();
        assert!(now >= confirmed, "{loss:?}: {confirmed} was confirmed, the store has {now}");
        on_its_way.wait().unwrap();
        assert!(world.checkpoint().unwrap() > now, "the agent goes on");
        let again = sent(&world) - before_kill;
        assert!(again < BesideMuch::BYTES, "{loss:?}: {again} bytes were sent again");
        assert!(world.program_runs());
        exercise::stopped(&world, round).unwrap();
        let verified = world.agent_command(&["verify"], SOON).unwrap();
        assert_ne!(verified.status.code(), Some(1), "{}", String::from_utf8_lossy(&verified.stdout));
        all_are_given_back(&world, &copies[copies.len().saturating_sub(3)..]);
    }
    exercise::stopped(&world, 0).unwrap();
    world.finish().unwrap();
    exercise::equal(&world).unwrap();
    world.kill_replayer().unwrap();
    all_are_given_back(&world, &copies);
    is_sound(&world.store);
}

/// While the copy is not written whole everything goes on, and it is said why; when there is room it is.
#[test]
fn a_copy_for_which_there_is_no_room_is_named() {
    let mut world = World::new("lost-index-full", Transport::Unix).unwrap();
    world.start(&AppendWriters, How::Run).unwrap();
    let mut copies = Vec::new();
    copied(&world, &mut copies);
    world.kill_replayer().unwrap();
    let folder = world.store.join("index-copy");
    let whole = |name: &Path| name.extension().is_some_and(|ending| ending == "whole");
    let names = || fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    names().filter(|name| whole(name)).for_each(|name| fs::remove_file(name).unwrap());
    // Whatever is written there finds no room.
    let full: Vec<_> = (0..20_000).map(|n| folder.join(format!("{n:020}.new-whole"))).collect();
    full.iter().for_each(|name| std::os::unix::fs::symlink("/dev/full", name).unwrap());
    world.start_replayer().unwrap();
    let trouble = || {
        let status = world.replayer_status().unwrap();
        status["trouble"].as_str().filter(|why| why.contains("index is not copied")).map(str::to_owned)
    };
    let why = until("the trouble to be named", SOON, trouble).unwrap();
    assert!(why.contains("No space left"), "{why}");
    (0..3).for_each(|_| copied(&world, &mut copies));
    full.iter().for_each(|name| drop(fs::remove_file(name)));
    until("a whole copy", SOON, || names().any(|name| whole(&name)).then_some(())).unwrap();
    until("the end of the trouble", SOON, || trouble().is_none().then_some(())).unwrap();
    world.finish().unwrap();
    world.kill_replayer().unwrap();
    fs::remove_file(index(&world)).unwrap();
    command_ok(&mut replayer(&["check", "--rebuild-index"], &world.store)).unwrap();
    all_are_given_back(&world, &copies);
    is_sound(&world.store);
}
