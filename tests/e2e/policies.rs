//! Policies: followers beside the gated tree, each exact for itself, and a table that is changed while everything runs.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use bfs_tests::exercise;
use bfs_tests::faults::{Effect, Fault, Faults};
use bfs_tests::programs::puppet::Puppet;
use bfs_tests::random::Random;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{FileSystem, Transport, World, rounds};

/// A program that does what it is told, and its world, with these policies.
fn told(name: &str, policies: &[String]) -> (World, Puppet) {
    told_in(World::new(name, Transport::Unix).unwrap(), policies)
}

fn told_in(mut world: World, policies: &[String]) -> (World, Puppet) {
    fs::write(world.place.data.join("w"), "first").unwrap();
    fs::write(world.place.data.join("x.c"), "old").unwrap();
    fs::write(world.place.data.join("plain"), "plain").unwrap();
    let data = world.place.data.display().to_string();
    let mut options = Vec::new();
    for policy in policies {
        options.extend(["--policy".to_owned(), policy.replace("DATA", &data)]);
    }
    world.agent_options(&options.iter().map(String::as_str).collect::<Vec<_>>());
    world.start_replayer().unwrap();
    let (command, listener) = Puppet::prepare(&world.place).unwrap();
    world.run(&command).unwrap();
    let puppet = Puppet::new(&listener).unwrap();
    (world, puppet)
}

/// Whether the follower is what its file is, with its attributes.
fn is_right(world: &World, name: &str) -> bool {
    let (file, follower) = (world.place.data.join(name), world.follower(name));
    let (Ok(one), Ok(other)) = (fs::metadata(&file), fs::metadata(&follower)) else { return false };
    let of = |meta: &fs::Metadata| (meta.len(), meta.mode(), meta.uid(), meta.mtime(), meta.mtime_nsec());
    of(&one) == of(&other) && fs::read(&file).ok() == fs::read(&follower).ok()
}

/// Waits until it is.
fn follows(world: &World, name: &str) {
    let right = || is_right(world, name).then_some(());
    until(&format!("the follower of {name}"), SOON, right).unwrap_or_else(|e| {
        let text = |path: &Path| fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        panic!("{e}: {:?}, {:?}", text(&world.place.data.join(name)), text(&world.follower(name)))
    });
}

/// Waits until a follower is gone.
fn goes(world: &World, name: &str) {
    until(&format!("the follower of {name} to go"), SOON, || (!world.follower(name).exists()).then_some(()))
        .unwrap();
}

/// What a follower has now, after some rounds in which the agent could have said that its file changed.
fn still(world: &World, puppet: &mut Puppet, name: &str) -> String {
    for _ in 0..4 {
        puppet.does("write 9 .").unwrap();
        follows(world, "w");
    }
    fs::read_to_string(world.follower(name)).unwrap()
}

/// Size and times of everything: any touch changes the last.
fn snapshot(root: &Path) -> BTreeMap<PathBuf, (u64, i64, i64, i64)> {
    let (mut all, mut left) = (BTreeMap::new(), vec![root.to_owned()]);
    while let Some(path) = left.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        all.insert(path, (meta.len(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec()));
    }
    all
}

fn policy(world: &World, words: &[&str]) -> String {
    let words: Vec<&str> = ["policy"].into_iter().chain(words.iter().copied()).collect();
    let done = world.agent_command(&words, SOON).unwrap();
    assert!(done.status.success(), "{words:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

#[test]
fn each_class_follows_its_file_and_the_tree_shows_nothing() {
    let (mut world, mut puppet) = told("policy", &["DATA/w:backup=write".into(), "*.c:backup=close".into()]);
    world.checkpoint().unwrap();
    // A first copy of what was there.
    follows(&world, "w");
    follows(&world, "x.c");
    assert!(!world.follower("plain").exists());
    let tree = world.store.join("tree");
    let before = snapshot(&tree);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut looks = 0;
            while !done.load(Ordering::SeqCst) {
                assert_eq!(snapshot(&tree), before, "the tree shows something that is pending");
                looks += 1;
            }
            looks
        });
        let body =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| two_classes(&world, &mut puppet)));
        done.store(true, Ordering::SeqCst);
        assert!(watcher.join().expect("the watcher saw the tree change") > 3);
        body.expect("the followers follow");
    });
    // With a checkpoint all of it is in the tree, and the followers stand.
    world.checkpoint().unwrap();
    exercise::equal(&world).unwrap();
    for name in ["w", "x.c", "y.c"] {
        follows(&world, name);
    }
    puppet.does("end").unwrap_err();
    assert!(world.finish().unwrap().success());
}

/// Whether a file is closed is asked for by inode, of which file systems know in different ways.
#[test]
fn each_class_follows_its_file_on_other_file_systems() {
    for file_system in [FileSystem::Xfs, FileSystem::Btrfs, FileSystem::Tmpfs] {
        let mut world = World::new(&format!("policy-{}", file_system.name()), Transport::Unix).unwrap();
        world.mount(file_system).unwrap();
        let policies = ["DATA/w:backup=write".to_owned(), "*.c:backup=close".to_owned()];
        let (mut world, mut puppet) = told_in(world, &policies);
        world.checkpoint().unwrap();
        follows(&world, "w");
        follows(&world, "x.c");
        two_classes(&world, &mut puppet);
        world.checkpoint().unwrap();
        exercise::equal(&world).unwrap();
        puppet.does("end").unwrap_err();
        assert!(world.finish().unwrap().success());
    }
}

fn two_classes(world: &World, puppet: &mut Puppet) {
    let aux = world.place.aux.clone();
    // Each write, in its place, appended, and over again.
    puppet.does("open 9 w").unwrap();
    for text in ["one", "two two", "3"] {
        puppet.does(&format!("write 9 {text}")).unwrap();
        follows(world, "w");
    }
    puppet.does("seek 9 2").unwrap();
    puppet.does(&format!("write 9 {}", "long ".repeat(2000))).unwrap();
    follows(world, "w");
    fs::set_permissions(world.place.data.join("w"), fs::Permissions::from_mode(0o640)).unwrap();
    follows(world, "w");

    // A copy of the descriptor has it open still.
    puppet.does("open 1 x.c").unwrap();
    puppet.does("write 1 new").unwrap();
    puppet.does("dup 1 2").unwrap();
    puppet.does("close 1").unwrap();
    assert_eq!(still(world, puppet, "x.c"), "old");
    puppet.does("write 2 er").unwrap();
    puppet.does("close 2").unwrap();
    follows(world, "x.c");
    assert_eq!(fs::read_to_string(world.follower("x.c")).unwrap(), "newer");
    // So has a child.
    puppet.does("open 1 x.c").unwrap();
    puppet.does(&format!("fork {}", aux.join("child").display())).unwrap();
    puppet.does("write 1 parent").unwrap();
    puppet.does("close 1").unwrap();
    assert_eq!(still(world, puppet, "x.c"), "newer");
    fs::write(aux.join("child"), "").unwrap();
    follows(world, "x.c");
    // And a mapping, though its descriptor is closed.
    puppet.does("open 1 x.c").unwrap();
    puppet.does(&format!("write 1 {}", "m".repeat(5000))).unwrap();
    puppet.does("map 1").unwrap();
    puppet.does("close 1").unwrap();
    puppet.does("store 1 4000 stored").unwrap();
    assert_eq!(still(world, puppet, "x.c"), "parent");
    puppet.does("store 1 10 late").unwrap();
    puppet.does("unmap 1").unwrap();
    follows(world, "x.c");

    // What is renamed into the class comes whole, and not before it is closed.
    puppet.does("open 1 y.tmp").unwrap();
    puppet.does("write 1 from elsewhere").unwrap();
    puppet.does("rename y.tmp y.c").unwrap();
    still(world, puppet, "x.c");
    assert!(!world.follower("y.c").exists());
    puppet.does("close 1").unwrap();
    follows(world, "y.c");
    // Over one that is there.
    puppet.does("open 1 z.tmp").unwrap();
    puppet.does("write 1 over it").unwrap();
    puppet.does("close 1").unwrap();
    puppet.does("rename z.tmp y.c").unwrap();
    follows(world, "y.c");
    // Out of it, and gone.
    puppet.does("open 1 gone.c").unwrap();
    puppet.does("close 1").unwrap();
    follows(world, "gone.c");
    puppet.does("unlink gone.c").unwrap();
    goes(world, "gone.c");
    puppet.does("rename y.c y").unwrap();
    goes(world, "y.c");
    puppet.does("rename y y.c").unwrap();
    follows(world, "y.c");
    puppet.does("close 9").unwrap();
}

#[test]
fn a_policy_is_changed_in_the_middle() {
    let (mut world, mut puppet) =
        told("policyset", &["DATA/w:backup=write".into(), "*.c:backup=close".into()]);
    world.checkpoint().unwrap();
    follows(&world, "w");
    follows(&world, "x.c");
    let w = world.place.data.join("w").display().to_string();
    let plain = world.place.data.join("plain").display().to_string();
    // A new entry takes a first copy, and then each write; at another place.
    policy(&world, &["add", &plain, "--backup", "write", "--place", "other/place"]);
    let other = world.store.join("now").join(&world.group).join("other/place");
    let is = |path: &Path, text: &str| {
        until(text, SOON, || (fs::read_to_string(path).ok()? == text).then_some(())).unwrap();
    };
    is(&other, "plain");
    puppet.does("open 1 plain").unwrap();
    puppet.does("write 1 PLAIN").unwrap();
    is(&other, "PLAIN");
    // Suspended: it stands still, and the others go on.
    policy(&world, &["suspend", &plain]);
    puppet.does("write 1 more").unwrap();
    puppet.does("open 9 w").unwrap();
    still(&world, &mut puppet, "x.c");
    assert_eq!(fs::read_to_string(&other).unwrap(), "PLAIN");
    policy(&world, &["resume", &plain]);
    is(&other, "PLAINmore");
    // Another class: from now on it changes when it is closed.
    policy(&world, &["set", &w, "--backup", "close"]);
    let before = fs::read_to_string(world.follower("w")).unwrap();
    for _ in 0..4 {
        puppet.does("write 9 !").unwrap();
        puppet.does("write 1 .").unwrap();
        is(&other, &fs::read_to_string(world.place.data.join("plain")).unwrap());
    }
    assert_eq!(fs::read_to_string(world.follower("w")).unwrap(), before);
    puppet.does("close 9").unwrap();
    follows(&world, "w");
    // Gone: so is the follower.
    policy(&world, &["delete", "*.c"]);
    goes(&world, "x.c");

    // It is all there after the agent died, and is refused by name where it makes no sense.
    let listed = policy(&world, &["list"]);
    assert!(listed.contains("place=other/place") && !listed.contains("*.c"), "{listed}");
    world.kill_agent().unwrap();
    world.resume().unwrap();
    assert_eq!(policy(&world, &["list"]), listed);
    for (words, says) in [
        (vec!["add", "a/b", "--backup", "write"], "pattern"),
        (vec!["add", "/x", "--backup", "wirte"], "did you mean \"write\""),
        (vec!["add", "/x", "--place", "../out"], "place"),
        (vec!["add", "/x", "--recovery", "automatik"], "did you mean \"automatic\""),
        (vec!["add", "/x", "--retries", "5000"], "retries"),
        (vec!["delete", "/nowhere"], "pattern"),
        (vec!["add", plain.as_str(), "--backup", "close"], "already"),
    ] {
        let words: Vec<&str> = ["policy"].into_iter().chain(words).collect();
        let done = world.agent_command(&words, SOON).unwrap();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(!done.status.success() && said.contains(says), "{words:?}: {said}");
    }
    puppet.does("write 1 again").unwrap();
    is(&other, &fs::read_to_string(world.place.data.join("plain")).unwrap());
    world.checkpoint().unwrap();
    exercise::equal(&world).unwrap();
    puppet.does("end").unwrap_err();
    assert!(world.finish().unwrap().success());
}

#[test]
fn followers_come_right_after_the_replayer_was_killed() {
    let mut random = Random::printed();
    let policies = ["w", "big"].map(|name| format!("DATA/{name}:backup=write"));
    let policies: Vec<String> = policies.into_iter().chain(["*.c:backup=close".to_owned()]).collect();
    let (mut world, mut puppet) = told("policykill", &policies);
    // Large enough to be killed in the middle of a copy.
    fs::write(world.place.data.join("big"), vec![b'b'; 24 << 20]).unwrap();
    fs::write(world.place.data.join("big.c"), vec![b'c'; 24 << 20]).unwrap();
    puppet.does("open 1 w").unwrap();
    puppet.does("open 2 x.c").unwrap();
    for round in 0..rounds(4, 40) {
        let checkpoint = world.spawn_agent_command(&["checkpoint", "--timeout", "1s"]);
        puppet.does(&format!("seek 1 {}", random.below(5000))).unwrap();
        puppet.does(&format!("write 1 round {round}")).unwrap();
        puppet.does(&format!("write 2 round {round}")).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(random.below(150) as u64));
        world.kill_replayer().unwrap();
        checkpoint.unwrap().wait().unwrap();
        puppet.does(&format!("write 1 and {round}")).unwrap();
        if round % 2 == 0 {
            puppet.does("close 2").unwrap();
            puppet.does("open 2 x.c").unwrap();
            puppet.does("seek 2 3").unwrap();
        }
        world.start_replayer().unwrap();
        for name in ["w", "big", "big.c"] {
            follows(&world, name);
        }
    }
    puppet.does("close 2").unwrap();
    follows(&world, "x.c");
    let beside = fs::read_dir(world.store.join("now")).unwrap().count();
    assert_eq!(beside, 1, "nothing is left beside the followers");
    world.checkpoint().unwrap();
    exercise::equal(&world).unwrap();
    puppet.does("end").unwrap_err();
    assert!(world.finish().unwrap().success());
}

/// Before each call that changes a follower or makes it durable.
#[test]
fn a_replayer_that_is_killed_at_a_follower_makes_it_right() {
    let mut world = World::new("policyfault", Transport::Unix).unwrap();
    world.replayer_faults(Faults::new(&world.store.join("now")));
    let policies = ["DATA/w:backup=write".to_owned(), "*.c:backup=close".to_owned()];
    let (mut world, mut puppet) = told_in(world, &policies);
    world.checkpoint().unwrap();
    follows(&world, "w");
    follows(&world, "x.c");
    puppet.does("open 1 w").unwrap();
    let mut kills = 0;
    for at in (1..).step_by(rounds(4, 1)) {
        let fault = Fault { at, lasting: false, effect: Effect::Kills, torn: at % 2 == 0 };
        world.faults().unwrap().set(fault);
        puppet.does(&format!("seek 1 {}", at % 90)).unwrap();
        puppet.does(&format!("write 1 at {at}")).unwrap();
        for (slot, name) in [(2, "x.c"), (3, "new")] {
            puppet.does(&format!("open {slot} {name}")).unwrap();
            puppet.does(&format!("seek {slot} {}", at % 70)).unwrap();
            puppet.does(&format!("write {slot} at {at}")).unwrap();
            puppet.does(&format!("close {slot}")).unwrap();
        }
        puppet.does("rename new y.c").unwrap();
        let names = ["w", "x.c", "y.c"];
        let killed = until("a kill, or the followers", SOON, || {
            let killed = !world.faults().unwrap().failed().is_empty();
            (killed || names.iter().all(|name| is_right(&world, name))).then_some(killed)
        });
        if !killed.unwrap() {
            break;
        }
        kills += 1;
        world.faults().unwrap().lift();
        world.kill_replayer().unwrap();
        world.start_replayer().unwrap();
        names.iter().for_each(|name| follows(&world, name));
        if at % 3 == 0 {
            world.checkpoint().unwrap();
        }
    }
    assert!(kills > 2, "{kills} kills");
    world.faults().unwrap().lift();
    world.checkpoint().unwrap();
    exercise::equal(&world).unwrap();
    puppet.does("end").unwrap_err();
    assert!(world.finish().unwrap().success());
}

/// What goes wrong is told with entry, action and reason, and keeps no checkpoint from being applied.
#[test]
fn a_follower_that_cannot_be_made_is_reported() {
    let mut world = World::new("policyfull", Transport::Unix).unwrap();
    world.replayer_faults(Faults::new(&world.store.join("now")));
    let (mut world, mut puppet) = told_in(world, &["DATA/w:backup=write,retries=1".to_owned()]);
    world.checkpoint().unwrap();
    follows(&world, "w");
    let full = Fault { at: 1, lasting: true, effect: Effect::Fails(libc::ENOSPC), torn: false };
    world.faults().unwrap().set(full);
    puppet.does("open 1 w").unwrap();
    puppet.does("write 1 more").unwrap();
    let trouble =
        until("the report", SOON, || world.replayer_status().ok()?["trouble"].as_str().map(str::to_owned));
    let trouble = trouble.unwrap();
    for part in ["policy \"", "backup of ", "/data/w", "No space left"] {
        assert!(trouble.contains(part), "{trouble}");
    }
    world.checkpoint().unwrap();
    exercise::equal(&world).unwrap();
    // When there is room again it is made, at the latest when somebody asks for that.
    world.faults().unwrap().lift();
    let w = world.place.data.join("w").display().to_string();
    policy(&world, &["suspend", &w]);
    policy(&world, &["resume", &w]);
    follows(&world, "w");
    until("the end of the report", SOON, || world.replayer_status().ok()?["trouble"].is_null().then_some(()))
        .unwrap();
    puppet.does("end").unwrap_err();
    assert!(world.finish().unwrap().success());
}
