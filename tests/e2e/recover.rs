//! `recover`: one file comes back as it was, whatever else goes on; and where it cannot, nothing is touched.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use bfs_tests::programs::append::AppendWriters;
use bfs_tests::random::{Random, given_seed};
use bfs_tests::watch::SOON;
use bfs_tests::world::{How, Transport, World, binary, command_ok, rounds};
use bfs_tests::{copy, exercise, oracle};

/// What the program does forbids it, for now: `bfs-agent --help`.
const BUSY: i32 = 73;

fn recover(world: &World, path: &Path, more: &[&str]) -> Output {
    let path = path.display().to_string();
    let words: Vec<&str> =
        ["recover"].into_iter().chain(more.iter().copied()).chain([path.as_str()]).collect();
    world.agent_command(&words, SOON).unwrap()
}

fn succeeds(world: &World, path: &Path, more: &[&str]) -> String {
    let done = recover(world, path, more);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8(done.stdout).unwrap()
}

/// It ends with an error that says this, and the tree is as before.
fn refuses(world: &World, path: &Path, more: &[&str], says: &str) -> i32 {
    let before = world.scratch.join("before");
    copy::exact(&world.place.data, &before).unwrap();
    let done = recover(world, path, more);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && said.contains(says), "{says}: {said}");
    assert_eq!(oracle::compare(&before, &world.place.data).unwrap(), Vec::<String>::new(), "{says}");
    fs::remove_dir_all(&before).unwrap();
    done.status.code().unwrap()
}

/// A program that rests beside some files, all of them in a checkpoint with the tag `good`, and a copy of that.
fn resting(name: &str) -> World {
    let mut world = World::new(name, Transport::Tcp).unwrap();
    let data = &world.place.data;
    fs::create_dir(data.join("sub")).unwrap();
    fs::write(data.join("sub/table"), vec![b'.'; 300_000]).unwrap();
    fs::set_permissions(data.join("sub/table"), fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(data.join("sub/table"), Some(1001), Some(1002)).unwrap();
    rustix::fs::setxattr(
        data.join("sub/table"),
        "user.note",
        b"of the table",
        rustix::fs::XattrFlags::empty(),
    )
    .unwrap();
    let sparse = File::create(data.join("sparse")).unwrap();
    sparse.write_at(b"far", 64 << 20).unwrap();
    fs::write(data.join("empty"), "").unwrap();
    fs::write(data.join("one"), "linked").unwrap();
    fs::hard_link(data.join("one"), data.join("two")).unwrap();
    symlink("empty", data.join("link")).unwrap();
    world.start_replayer().unwrap();
    world.rest().unwrap();
    let good = ["checkpoint", "--wait", "applied", "--tag", "good"];
    assert!(world.agent_command(&good, SOON).unwrap().status.success());
    copy::exact(&world.place.data, &world.scratch.join("good")).unwrap();
    world
}

/// The tree is as at the checkpoint `good`, but for times of directories.
fn is_good(world: &World) {
    let differences = oracle::compare(&world.scratch.join("good"), &world.place.data).unwrap();
    let other: Vec<_> = differences.iter().filter(|line| !line.contains("mtime")).collect();
    assert!(other.is_empty(), "{differences:?}");
    let time = |at: &Path| fs::metadata(at.join("sub/table")).unwrap().mtime_nsec();
    assert_eq!(time(&world.scratch.join("good")), time(&world.place.data));
}

#[test]
fn a_file_comes_back_with_all_that_it_had() {
    let mut world = resting("recover");
    let table = world.place.data.join("sub/table");
    // What was spoiled is in later checkpoints.
    fs::write(&table, "spoiled").unwrap();
    fs::set_permissions(&table, fs::Permissions::from_mode(0o600)).unwrap();
    rustix::fs::removexattr(&table, "user.note").unwrap();
    world.checkpoint().unwrap();
    assert_eq!(fs::read(&table).unwrap(), b"spoiled");
    let said = succeeds(&world, &table, &["--at", "tag:good"]);
    assert!(said.contains("300000 bytes"), "{said}");
    is_good(&world);
    // It is in the next one, and there is nothing beside it.
    world.checkpoint_until("applied").unwrap();
    exercise::equal(&world).unwrap();

    // What is gone: the newest checkpoint has it still.
    for gone in ["sparse", "empty"] {
        fs::remove_file(world.place.data.join(gone)).unwrap();
        succeeds(&world, &world.place.data.join(gone), &[]);
        is_good(&world);
    }
    assert!(fs::metadata(world.place.data.join("sparse")).unwrap().blocks() < 64, "it is sparse still");
    // By a way that leads there.
    let way = world.place.aux.join("way");
    symlink(world.place.data.join("sub"), &way).unwrap();
    fs::write(&table, "again").unwrap();
    succeeds(&world, &way.join("../sub/table"), &["--at", "tag:good"]);
    is_good(&world);
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

#[test]
fn what_cannot_come_back_is_refused_and_nothing_is_touched() {
    let mut world = resting("recover-refused");
    let data = world.place.data.clone();
    let table = data.join("sub/table");
    fs::write(&table, "spoiled").unwrap();
    let reader = File::open(&table).unwrap();
    assert_eq!(refuses(&world, &table, &["--at", "tag:good"], "needs close"), BUSY);
    drop(reader);
    // A shell that has nothing but a mapping of it would do the same: this one runs it.
    fs::copy("/bin/sleep", data.join("run")).unwrap();
    world.checkpoint_until("applied").unwrap();
    let mut runs = Command::new(data.join("run")).arg("60").stdin(Stdio::null()).spawn().unwrap();
    refuses(&world, &data.join("run"), &[], "has mapped");
    runs.kill().unwrap();
    runs.wait().unwrap();

    refuses(&world, &data.join("one"), &[], "has 2 names");
    refuses(&world, &data.join("sub"), &[], "only regular files");
    refuses(&world, &data.join("link"), &[], "only regular files");
    refuses(&world, &data.join("none"), &[], "has no");
    refuses(&world, &data.join("sub/none/file"), &[], "has no");
    refuses(&world, &data, &[], "none of the replicated directories");
    refuses(&world, Path::new("/etc/passwd"), &[], "none of the replicated directories");
    refuses(&world, &table, &["--at", "tag:none"], "no checkpoint that is kept fits");
    refuses(&world, &table, &["--at", "yesterday"], "write a number");
    fs::remove_file(data.join("empty")).unwrap();
    symlink("/etc/passwd", data.join("empty")).unwrap();
    refuses(&world, &data.join("empty"), &[], "no regular file stands");
    fs::remove_dir_all(data.join("sub")).unwrap();
    symlink("/etc", data.join("sub")).unwrap();
    refuses(&world, &table, &["--at", "tag:good"], "none of the replicated directories");
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

#[test]
fn a_backup_that_does_not_answer_changes_nothing() {
    let mut world = resting("recover-silent");
    let table = world.place.data.join("sub/table");
    fs::write(&table, "spoiled").unwrap();
    world.pause_replayer(true).unwrap();
    refuses(&world, &table, &["--at", "tag:good", "--timeout", "1s"], "within the time");
    // The agent answers meanwhile.
    assert!(world.agent_command(&["status"], SOON).unwrap().status.success());
    world.pause_replayer(false).unwrap();
    succeeds(&world, &table, &["--at", "tag:good"]);
    is_good(&world);
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

/// The agent is killed at some moment of it: afterwards the file is the one or the other, and the backup has that.
#[test]
fn a_killed_agent_leaves_no_difference() {
    let mut world = resting("recover-killed");
    let table = world.place.data.join("sub/table");
    let then = fs::read(&table).unwrap();
    let mut moments = Random::new(given_seed().unwrap_or(20_261_127));
    let (mut old, mut new) = (0, 0);
    for round in 0..rounds(12, 200) {
        let spoiled = format!("spoiled {round}");
        fs::write(&table, &spoiled).unwrap();
        world.checkpoint_until("applied").unwrap();
        let path = table.display().to_string();
        let mut asking = world.spawn_agent_command(&["recover", "--at", "tag:good", &path]).unwrap();
        // The moment of the kill is what is tested.
        std::thread::sleep(Duration::from_micros(moments.below(120_000) as u64));
        world.kill_agent().unwrap();
        let _ = asking.wait().unwrap();
        world.resume().unwrap();
        world.checkpoint_until("applied").unwrap();
        let now = fs::read(&table).unwrap();
        assert!(now == then || now == spoiled.as_bytes(), "round {round}: {} bytes", now.len());
        *if now == then { &mut new } else { &mut old } += 1;
        exercise::equal(&world).unwrap_or_else(|e| panic!("round {round}: {e}"));
    }
    println!("{old} as before, {new} brought back");
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

/// Writers go on, checkpoints are taken, one file comes back again and again; the agent dies right behind one.
#[test]
fn beside_writers_all_stays_exact() {
    let mut world = World::new("recover-beside", Transport::Unix).unwrap();
    let file = world.place.data.join("precious");
    fs::write(&file, vec![7; 200_000]).unwrap();
    world.checkpoints("every=100ms");
    world.start(&AppendWriters, How::Run).unwrap();
    let number = world.checkpoint().unwrap().to_string();
    for round in 0..12 {
        fs::write(&file, format!("spoiled {round}")).unwrap();
        succeeds(&world, &file, &["--at", &number]);
        assert_eq!(fs::read(&file).unwrap(), vec![7; 200_000]);
        if round % 4 == 3 {
            world.kill_agent().unwrap();
            world.resume().unwrap();
        }
        let at = world.scratch.join("now");
        let taken = world.checkpoint_stopped(&copy::command(&world.place.data, &at)).unwrap();
        world.wait_applied(taken).unwrap();
        let then = world.scratch.join("then");
        let mut restore = Command::new(binary("bfs-replayer"));
        restore.args(["restore", "--group", &world.group, "--at", &taken.to_string(), "--store"]);
        command_ok(restore.arg(&world.store).arg(&then)).unwrap();
        let below = then.join(world.place.data.strip_prefix("/").unwrap());
        assert_eq!(oracle::compare(&at, &below).unwrap(), Vec::<String>::new(), "round {round}");
        fs::remove_dir_all(&at).unwrap();
        fs::remove_dir_all(&then).unwrap();
    }
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
    let left: Vec<_> = fs::read_dir(&world.place.data)
        .unwrap()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(".bfs"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}
