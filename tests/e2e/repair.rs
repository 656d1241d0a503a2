//! Backup files that others change, take away or replace are named, and made good again from the primary; and a
//! program that works is compared as far as its files hold still.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Output;

use bfs_tests::exercise;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{Transport, World};

/// A shell script in the directory `$1`, with `$2` for what is not replicated; it ends when it is told so.
fn started(world: &mut World, script: &str) {
    world.start_replayer().unwrap();
    let script = format!(": > \"$2/ready\"; {script}; while [ ! -e \"$2/stop\" ]; do sleep 0.02; done");
    world.run(&world.script(&script)).unwrap();
}

fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}

fn filled(data: &Path) {
    fs::create_dir(data.join("folder")).unwrap();
    for (n, name) in ["bytes", "gone", "other", "mode", "folder/inside", "grown"].iter().enumerate() {
        fs::write(data.join(name), vec![n as u8 + 1; 200_000 + n]).unwrap();
    }
    fs::hard_link(data.join("gone"), data.join("link")).unwrap();
}

/// Everything that somebody can do to a tree.
fn spoil(backup: &Path) {
    let file = fs::File::options().write(true).open(backup.join("bytes")).unwrap();
    let times = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(b"spoiled", 100).unwrap();
    file.set_modified(times).unwrap();
    fs::remove_file(backup.join("gone")).unwrap();
    fs::remove_file(backup.join("other")).unwrap();
    fs::create_dir(backup.join("other")).unwrap();
    fs::set_permissions(backup.join("mode"), fs::Permissions::from_mode(0o640)).unwrap();
    fs::remove_dir_all(backup.join("folder")).unwrap();
    fs::write(backup.join("stranger"), "more").unwrap();
}

#[test]
fn what_others_did_to_the_backup_is_named_and_repaired() {
    let mut world = World::new("repair", Transport::Unix).unwrap();
    filled(&world.place.data);
    started(&mut world, ":");
    let first = world.checkpoint().unwrap();
    exercise::equal(&world).unwrap();
    spoil(&world.backup());
    let verified = world.agent_command(&["verify"], SOON).unwrap();
    let said = text(&verified);
    assert_eq!(verified.status.code(), Some(1), "{said}");
    for name in ["/bytes: content", "/gone: ", "/other: ", "/mode: mode", "/folder: ", "/stranger: "] {
        assert!(said.contains(name), "{name} in {said}");
    }
    let repaired = world.agent_command(&["verify", "--repair"], SOON).unwrap();
    let said = text(&repaired);
    assert_eq!(repaired.status.code(), Some(0), "{said}");
    assert!(said.contains("repaired: ") && !said.contains("different: "), "{said}");
    exercise::equal(&world).unwrap();
    let again = world.agent_command(&["verify"], SOON).unwrap();
    assert_eq!(again.status.code(), Some(0), "{}", text(&again));
    // Nothing was changed on the primary since: the generations have not lost anything.
    assert_eq!(world.replayer_status().unwrap()["state"], "ready");
    let at = world.place.aux.join("restored");
    let store = world.store.display().to_string();
    let restored = std::process::Command::new(bfs_tests::world::binary("bfs-replayer"))
        .args(["restore", "--store", &store, "--group", &world.group, "--at", &first.to_string()])
        .arg(&at)
        .output()
        .unwrap();
    assert!(restored.status.success(), "{}", text(&restored));
    assert!(world.finish().unwrap().success());
}

/// The applier meets it: it goes on, says what is lost, and the next checkpoints bring it.
#[test]
fn the_applier_meets_what_others_did() {
    let mut world = World::new("meets", Transport::Unix).unwrap();
    filled(&world.place.data);
    started(
        &mut world,
        "while [ ! -e \"$2/go\" ]; do sleep 0.02; done
        for f in bytes gone other mode folder/inside; do printf more | dd of=\"$1/$f\" bs=1 seek=7 conv=notrunc status=none; done
        mv \"$1/grown\" \"$1/folder/grown\"; : > \"$2/done\"",
    );
    world.checkpoint().unwrap();
    spoil(&world.backup());
    fs::write(world.place.aux.join("go"), "").unwrap();
    let done = world.place.aux.join("done");
    until("the script", SOON, || done.exists().then_some(())).unwrap();
    world.checkpoint().unwrap();
    until("the agent to send again what is lost", SOON, || {
        world.checkpoint().ok()?;
        (world.replayer_status().ok()?["state"] == "ready").then_some(())
    })
    .unwrap();
    exercise::equal(&world).unwrap();
    assert!(world.finish().unwrap().success());
}

/// Of a file that processes change that are not selected only the blocks that differ are sent; what the backup lost of
/// it comes all the same.
#[test]
fn what_others_change_on_the_primary_is_sent_again_too() {
    let mut world = World::new("both", Transport::Unix).unwrap();
    filled(&world.place.data);
    started(&mut world, ":");
    world.checkpoint().unwrap();
    let (shared, backup) = (world.place.data.join("bytes"), world.backup().join("bytes"));
    let file = fs::File::options().write(true).open(&shared).unwrap();
    let change = |n: u8| file.write_all_at(&[n], 0).unwrap();
    for n in 10..13 {
        change(n);
        world.checkpoint().unwrap();
    }
    let spoiled = fs::File::options().write(true).open(&backup).unwrap();
    let times = spoiled.metadata().unwrap().modified().unwrap();
    spoiled.write_all_at(b"spoiled", 20_000).unwrap();
    spoiled.set_modified(times).unwrap();
    let mut n = 13;
    until("the agent to send again what is lost", SOON, || {
        change(n);
        n = n.wrapping_add(1);
        world.checkpoint().ok()?;
        let ready = world.replayer_status().ok()?["state"] == "ready";
        (ready && fs::read(&backup).ok()?[20_000..20_007] == [1; 7]).then_some(())
    })
    .unwrap();
    exercise::equal(&world).unwrap();
    assert!(world.finish().unwrap().success());
}

/// What holds still is compared, at once or later; what never does is listed.
#[test]
fn a_program_that_works_is_compared_as_far_as_it_holds_still() {
    let mut world = World::new("still", Transport::Unix).unwrap();
    filled(&world.place.data);
    started(&mut world, "while [ ! -e \"$2/stop\" ]; do echo more >> \"$1/busy\"; done");
    world.checkpoint().unwrap();
    let verified = world.agent_command(&["verify"], SOON).unwrap();
    let said = text(&verified);
    // The shell may have had no turn for as long as one of the comparisons took.
    let still = verified.status.code() == Some(0) && said.contains(": equal");
    let not_compared = verified.status.code() == Some(2) && said.contains("/busy: ");
    assert!((still || not_compared) && !said.contains("/bytes") && !said.contains("different: "), "{said}");
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}
