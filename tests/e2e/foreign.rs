//! What processes do that are not selected: it is in the next checkpoint, or forbids it, or does not count.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;

use bfs_tests::exercise;
use bfs_tests::programs::Program;
use bfs_tests::programs::append::AppendWriters;
use bfs_tests::programs::puppet::Puppet;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{FileSystem, Transport, World, rounds};

/// Works all the time, in files of its own.
const BUSY: &str = "i=0; while [ ! -e \"$2/stop\" ]; do i=$((i + 1)); echo \"line $i\" >> \"$1/own\"
    echo $i > \"$1/own-$((i % 5))\"; mv \"$1/own-$((i % 5))\" \"$1/own-moved\"; [ $i -lt 5 ] || : > \"$2/ready\"; done";
/// Only waits.
const IDLE: &str = ": > \"$2/ready\"; while [ ! -e \"$2/stop\" ]; do sleep 0.02; done";

fn start(world: &mut World, script: &str) {
    world.start_replayer().unwrap();
    world.run(&world.script(script)).unwrap();
    let ready = world.place.aux.join("ready");
    until("the program", SOON, || ready.exists().then_some(())).unwrap();
}

fn end(world: &mut World) {
    fs::write(world.place.stop(), "").unwrap();
    assert!(world.finish().unwrap().success());
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

fn done(result: i32) {
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// Stores into a shared mapping.
fn store(file: &File, at: usize, bytes: &[u8]) {
    let len = file.metadata().unwrap().len() as usize;
    // SAFETY: the mapping has that length, and nothing else refers to it.
    unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let map = libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, file.as_raw_fd(), 0);
        assert_ne!(map, libc::MAP_FAILED);
        assert!(at + bytes.len() <= len);
        map.cast::<u8>().add(at).copy_from(bytes.as_ptr(), bytes.len());
        done(libc::munmap(map, len));
    }
}

/// Something that a stranger does to the files of the group, and beside them; named.
type Act = (&'static str, fn(&Path, &Path));

/// One thing after another.
fn acts() -> Vec<Act> {
    vec![
        ("create", |d, _| fs::write(d.join("new"), "by a stranger").unwrap()),
        ("write again", |d, _| fs::write(d.join("new"), "by a stranger, and longer").unwrap()),
        ("write over", |d, _| {
            let file = File::options().write(true).open(d.join("new")).unwrap();
            file.write_all_at(b"BY", 0).unwrap();
            file.write_all_at(b"A", 3).unwrap();
        }),
        ("truncate by path", |d, _| {
            // SAFETY: a path that ends with a zero.
            done(unsafe { libc::truncate(c_path(&d.join("new")).as_ptr(), 5) });
        }),
        ("chmod", |d, _| {
            fs::set_permissions(d.join("new"), fs::Permissions::from_mode(0o640)).unwrap();
        }),
        ("chown", |d, _| std::os::unix::fs::chown(d.join("new"), Some(12), Some(34)).unwrap()),
        ("times", |d, _| {
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
            File::options().write(true).open(d.join("new")).unwrap().set_modified(time).unwrap();
        }),
        ("xattr", |d, _| {
            // SAFETY: strings that end with a zero, and a value of that length.
            done(unsafe {
                libc::setxattr(
                    c_path(&d.join("new")).as_ptr(),
                    c"trusted.x".as_ptr(),
                    b"y".as_ptr().cast(),
                    1,
                    0,
                )
            });
        }),
        ("symlink", |d, _| symlink("nowhere", d.join("link")).unwrap()),
        ("link", |d, _| fs::hard_link(d.join("new"), d.join("other")).unwrap()),
        ("write by the other name", |d, _| fs::write(d.join("other"), "two names").unwrap()),
        ("unlink one of two names", |d, _| fs::remove_file(d.join("new")).unwrap()),
        ("mkdir", |d, _| fs::create_dir(d.join("dir")).unwrap()),
        ("a file in it", |d, _| fs::write(d.join("dir/inside"), vec![7; 100_000]).unwrap()),
        ("rename", |d, _| fs::rename(d.join("dir/inside"), d.join("dir/renamed")).unwrap()),
        ("rename over", |d, _| {
            fs::write(d.join("over"), "over").unwrap();
            fs::rename(d.join("over"), d.join("dir/renamed")).unwrap();
        }),
        ("move a directory out", |d, o| fs::rename(d.join("dir"), o.join("dir")).unwrap()),
        ("change what is outside", |_, o| {
            fs::write(o.join("dir/while-away"), "away").unwrap();
            fs::write(o.join("dir/renamed"), "changed outside").unwrap();
        }),
        ("move it in again", |d, o| fs::rename(o.join("dir"), d.join("back")).unwrap()),
        ("a link with one name outside", |d, o| {
            fs::hard_link(d.join("back/renamed"), o.join("outside")).unwrap();
            fs::write(o.join("outside"), "by the name outside").unwrap();
        }),
        ("exchange", |d, _| {
            let (a, b) = (c_path(&d.join("back")), c_path(&d.join("link")));
            // SAFETY: paths that end with a zero.
            done(unsafe {
                libc::renameat2(libc::AT_FDCWD, a.as_ptr(), libc::AT_FDCWD, b.as_ptr(), libc::RENAME_EXCHANGE)
            });
        }),
        ("store into a mapping", |d, _| {
            fs::write(d.join("mapped"), vec![b'.'; 20_000]).unwrap();
            let file = File::options().read(true).write(true).open(d.join("mapped")).unwrap();
            store(&file, 10_000, b"stored by a stranger");
            store(&file, 3, b"and again");
        }),
        ("punch a hole", |d, _| {
            let file = File::options().write(true).open(d.join("mapped")).unwrap();
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: an open descriptor.
            done(unsafe { libc::fallocate(file.as_raw_fd(), mode, 4096, 4096) });
        }),
        ("copy", |d, _| assert!(fs::copy(d.join("mapped"), d.join("copy")).unwrap() > 0)),
        ("fifo", |d, _| {
            // SAFETY: a path that ends with a zero.
            done(unsafe { libc::mkfifo(c_path(&d.join("fifo")).as_ptr(), 0o600) });
        }),
        ("unlink", |d, _| {
            for name in ["fifo", "copy", "mapped", "other"] {
                fs::remove_file(d.join(name)).unwrap();
            }
        }),
        ("remove a tree", |d, _| fs::remove_dir_all(d.join("link")).unwrap()),
    ]
}

fn strangers_do_everything(file_system: FileSystem) {
    let mut world = World::new(&format!("foreign-{}", file_system.name()), Transport::Unix).unwrap();
    world.mount(file_system).unwrap();
    start(&mut world, BUSY);
    let outside = world.beside().unwrap();
    for (index, (what, act)) in acts().into_iter().enumerate() {
        act(&world.place.data, &outside);
        exercise::stopped(&world, index).unwrap_or_else(|e| panic!("after {what:?}: {e:#}"));
    }
    let status = world.status().unwrap();
    assert_eq!(status["foreign"]["is_seen"], true, "{status}");
    let own = std::process::id();
    let processes = status["foreign"]["processes"].as_array().unwrap();
    assert!(processes.iter().any(|p| p["pid"] == own && p["changes"].as_u64() > Some(20)), "{status}");
    assert_eq!(status["counters"]["everything_suspect"].as_u64().unwrap(), 2, "only at the start: {status}");
    end(&mut world);
    exercise::equal(&world).unwrap();
}

#[test]
fn what_strangers_do_is_in_the_next_checkpoint_on_ext4() {
    strangers_do_everything(FileSystem::Ext4);
}

#[test]
fn what_strangers_do_is_in_the_next_checkpoint_on_xfs() {
    strangers_do_everything(FileSystem::Xfs);
}

#[test]
fn what_strangers_do_is_in_the_next_checkpoint_on_btrfs() {
    strangers_do_everything(FileSystem::Btrfs);
}

#[test]
fn what_strangers_do_is_in_the_next_checkpoint_on_tmpfs() {
    strangers_do_everything(FileSystem::Tmpfs);
}

/// Two writes within one tick of the clock leave one sign.
#[test]
fn a_stranger_and_the_program_write_to_one_file_at_the_same_time() {
    let mut world = World::new("foreign-same", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    let (command, listener) = Puppet::prepare(&world.place).unwrap();
    fs::write(world.place.data.join("early"), "").unwrap();
    let mut early = File::options().write(true).open(world.place.data.join("early")).unwrap();
    world.run(&command).unwrap();
    let mut puppet = Puppet::new(&listener).unwrap();
    puppet.does("open 1 late").unwrap();
    puppet.does("open 2 early").unwrap();
    world.checkpoint().unwrap();
    let mut late = File::options().write(true).open(world.place.data.join("late")).unwrap();
    for round in 0..rounds(60, 1000) {
        for (slot, file) in [(1, &mut late), (2, &mut early)] {
            let at = round as u64 * 16;
            puppet.does(&format!("seek {slot} {at}")).unwrap();
            puppet.does(&format!("write {slot} ours-{round:03}")).unwrap();
            file.seek(SeekFrom::Start(at + 8)).unwrap();
            file.write_all(b"theirs").unwrap();
            if round % 3 == 0 {
                puppet.does(&format!("seek {slot} {at}")).unwrap();
                puppet.does(&format!("write {slot} OURS")).unwrap();
                file.write_all(b"!").unwrap();
            }
        }
        world.checkpoint().unwrap();
        exercise::equal(&world).unwrap_or_else(|e| panic!("round {round}: {e:#}"));
    }
    puppet.does("end").unwrap_err();
    assert!(world.finish().unwrap().success());
}

/// Makes one step after another, each of which shows in one more place: `one`, then `two`, then the name of the mark,
/// which moves between two directories.
const STEPS: &str = "mkdir \"$1/a\" \"$1/b\"; : > \"$1/a/mark.0\"; i=0; from=a; to=b
    while [ ! -e \"$2/steps-end\" ]; do
        n=$((i + 1)); echo $n >> \"$1/one\"; echo $n >> \"$1/two\"; mv \"$1/$from/mark.$i\" \"$1/$to/mark.$n\"
        i=$n; other=$from; from=$to; to=$other; [ $i -lt 20 ] || : > \"$2/at-work\"; [ $((i % 4)) -ne 0 ] || sleep 0.03
    done";

/// What the steps left: how many lines `one` and `two` have, and the number of the mark.
fn steps(tree: &Path) -> (usize, usize, usize) {
    let lines = |name: &str| fs::read_to_string(tree.join(name)).unwrap().lines().count();
    let names = ["a", "b"].map(|d| fs::read_dir(tree.join(d)).unwrap()).into_iter().flatten();
    let marks: Vec<String> = names.map(|n| n.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(marks.len(), 1, "{marks:?}");
    (lines("one"), lines("two"), marks[0].strip_prefix("mark.").unwrap().parse().unwrap())
}

/// The cut holds for those whose calls nobody follows, over files and directories.
fn strangers_are_cut(world: &World) {
    let mut strangers = world.spawn_shell(STEPS).unwrap();
    let at_work = world.place.aux.join("at-work");
    until("the stranger at work", SOON, || at_work.exists().then_some(())).unwrap();
    let (mut taken, mut last) = (0, 0);
    let tries = rounds(60, 600);
    for _ in 0..tries {
        if let Err(e) = world.checkpoint() {
            // It says who does not let it settle.
            assert!(format!("{e:#}").contains("kept changing"), "{e:#}");
            continue;
        }
        let (one, two, mark) = steps(&world.backup());
        assert!(one >= two && two >= mark && mark + 1 >= one, "{one} {two} {mark}");
        assert!(mark >= last);
        last = mark;
        taken += 1;
    }
    println!("{taken} of {tries} checkpoints were taken while a stranger made {last} steps");
    assert!(taken > tries / 2);
    let status = world.status().unwrap();
    assert_eq!(status["checkpoints_stopped"], 0, "a stop is of no use: {status}");
    // Before the program ends: the last checkpoint has what they did.
    fs::write(world.place.aux.join("steps-end"), "").unwrap();
    assert!(strangers.wait().unwrap().success());
}

#[test]
fn strangers_at_work_are_cut_like_the_program() {
    let mut world = World::new("foreign-cut", Transport::Unix).unwrap();
    start(&mut world, IDLE);
    strangers_are_cut(&world);
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

/// Nobody is selected: what anybody changes is followed, until the agent is told to stop.
#[test]
fn everyone_is_followed_without_a_stop() {
    let mut world = World::new("everyone", Transport::Unix).unwrap();
    world.start_replayer().unwrap();
    fs::write(world.place.data.join("before"), "it was there").unwrap();
    world.attach_to(&["--everyone"]).unwrap();
    let outside = world.beside().unwrap();
    world.checkpoint().unwrap();
    exercise::equal(&world).unwrap();
    for (name, act) in acts() {
        act(&world.place.data, &outside);
        world.checkpoint().unwrap();
        exercise::equal(&world).unwrap_or_else(|e| panic!("{name}: {e:#}"));
    }
    for entry in fs::read_dir(&world.place.data).unwrap().map(Result::unwrap) {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) }.unwrap();
    }
    strangers_are_cut(&world);
    world.checkpoint().unwrap();
    exercise::equal(&world).unwrap();
    let refused = world.checkpoint_stopped(&["true".to_owned()]).unwrap_err();
    assert!(format!("{refused:#}").contains("--everyone"), "{refused:#}");
    // The probes go on without an agent.
    world.kill_agent().unwrap();
    fs::write(world.place.data.join("one"), "while no agent ran").unwrap();
    world.resume().unwrap();
    world.checkpoint().unwrap();
    exercise::equal(&world).unwrap();
    let stopped = world.agent_command(&["stop"], SOON).unwrap();
    assert!(stopped.status.success(), "{stopped:?}");
}

/// Who writes without a pause keeps checkpoints from settling, and is named; no one is stopped for it, and not more
/// is sent than what changed.
#[test]
fn a_stranger_who_never_rests_is_named() {
    let mut world = World::new("foreign-restless", Transport::Unix).unwrap();
    start(&mut world, IDLE);
    let command = AppendWriters.command(&world.place);
    let line = command.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
    let mut strangers = world.spawn_shell(&format!("exec {line}")).unwrap();
    until("strangers at work", SOON, || AppendWriters.half_way(&world.place).then_some(())).unwrap();
    for index in 0..rounds(10, 100) {
        // What is taken is a cut.
        if let Err(e) = exercise::cut(&world, &AppendWriters, index) {
            let said = format!("{e:#}");
            assert!(said.contains("kept changing") && said.contains("(bfs-workload)"), "{said}");
        }
    }
    // The selected program ends with the strangers, and the agent with it.
    let status = world.status().unwrap();
    fs::write(world.place.stop(), "").unwrap();
    assert!(strangers.wait().unwrap().success());
    assert_eq!(status["checkpoints_stopped"], 0, "a stop is of no use: {status}");
    let there: u64 =
        fs::read_dir(&world.place.data).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
    let sent = status["counters"]["stream_bytes"].as_u64().unwrap();
    println!("{sent} bytes were sent of {there}");
    assert!(sent < there * 4 + (64 << 20), "{sent} bytes for {there}");
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

#[test]
fn a_change_by_a_stranger_is_refused_and_named() {
    let mut world = World::new("foreign-refuse", Transport::Unix).unwrap();
    world.agent_options(&["--foreign", "refuse", "--final-wait", "1s"]);
    start(&mut world, BUSY);
    world.checkpoint().unwrap();
    world.checkpoint().unwrap();
    let applied = world.status_number(&["applied"]).unwrap();
    let file = world.place.data.join("theirs");
    let mut child = world.spawn_shell("echo x > \"$1/theirs\"").unwrap();
    assert!(child.wait().unwrap().success());
    let said = world.agent_command(&["checkpoint"], SOON).unwrap();
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains(&format!("process {}", child.id())) && said.contains("(sh)"), "{said}");
    assert!(said.contains("is not selected"), "{said}");
    let status = world.status().unwrap();
    assert!(status["not_confirmed_because"].as_str().unwrap().contains("is not selected"), "{status}");
    assert_eq!(world.status_number(&["applied"]).unwrap(), applied);
    assert!(file.exists() && !world.backup().join("theirs").exists());
    fs::write(world.place.stop(), "").unwrap();
    // The last checkpoint is not confirmed either.
    assert_eq!(world.finish().unwrap().code(), Some(75));
}

#[test]
fn content_that_a_stranger_changes_is_ignored_and_listed() {
    let mut world = World::new("foreign-ignore", Transport::Unix).unwrap();
    world.agent_options(&["--foreign", "ignore"]);
    fs::write(world.place.data.join("file"), "as it was").unwrap();
    fs::write(world.place.data.join("moving"), "moves").unwrap();
    start(&mut world, BUSY);
    world.checkpoint().unwrap();
    let file = File::options().write(true).open(world.place.data.join("file")).unwrap();
    file.write_all_at(b"BY", 0).unwrap();
    fs::set_permissions(world.place.data.join("file"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(world.place.data.join("moving"), world.place.data.join("moved")).unwrap();
    world.checkpoint().unwrap();
    // Names and attributes are followed.
    let there = world.backup().join("file");
    assert_eq!(fs::read(&there).unwrap(), b"as it was");
    assert_eq!(fs::metadata(&there).unwrap().permissions().mode() & 0o7777, 0o600);
    assert!(world.backup().join("moved").exists() && !world.backup().join("moving").exists());
    let status = world.status().unwrap();
    let ignored = status["foreign"]["ignored"].as_array().unwrap();
    assert!(ignored.contains(&world.place.data.join("file").display().to_string().into()), "{status}");
    assert!(status["foreign"]["ignored_count"].as_u64().unwrap() <= 2, "{status}");
    end(&mut world);
}

/// Neither much that strangers do elsewhere on the same file system, nor much that they do here, floods the ring.
#[test]
fn much_that_strangers_do_is_bounded() {
    let mut world = World::new("foreign-flood", Transport::Unix).unwrap();
    world.agent_options(&["--ring-bytes", "1048576"]);
    start(&mut world, BUSY);
    let outside = world.beside().unwrap();
    world.checkpoint().unwrap();
    let records = |world: &World| world.status_number(&["records"]).unwrap();
    let before = records(&world);
    let own = || fs::read_to_string(world.place.data.join("own")).unwrap().lines().count() as u64;
    let lines = own();
    let files = rounds(20_000, 100_000);
    for i in 0..files {
        let path = outside.join(format!("f{}", i % 100));
        fs::write(&path, "x").unwrap();
        fs::remove_file(&path).unwrap();
    }
    // Of each turn of the program there are a few, and none of ours.
    let (made, turns) = (records(&world) - before, own() - lines);
    assert!(made < turns * 40 + 200, "{made} records for {turns} turns");
    for i in 0..files {
        let path = world.place.data.join(format!("f{}", i % 100));
        fs::write(&path, "x").unwrap();
        if i % 2 == 0 {
            fs::remove_file(&path).unwrap();
        }
    }
    exercise::stopped(&world, 0).unwrap();
    let status = world.status().unwrap();
    assert_eq!(status["counters"]["rescan"], 0, "{status}");
    assert_eq!(status["counters"]["everything_suspect"].as_u64().unwrap(), 2, "{status}");
    end(&mut world);
    exercise::equal(&world).unwrap();
}

/// A descriptor that was open before the agent came, and an agent that dies while strangers work.
#[test]
fn a_successor_reads_on_what_strangers_did() {
    let mut world = World::new("foreign-successor", Transport::Unix).unwrap();
    start(&mut world, BUSY);
    world.checkpoint().unwrap();
    for round in 0..rounds(3, 20) {
        let name = format!("before-{round}");
        fs::write(world.place.data.join(&name), "before the agent died").unwrap();
        fs::write(world.place.data.join("own-by-us"), format!("{round}")).unwrap();
        world.kill_agent().unwrap();
        fs::write(world.place.data.join(&name), "while there was none").unwrap();
        fs::create_dir(world.place.data.join(format!("dir-{round}"))).unwrap();
        world.resume().unwrap();
        exercise::stopped(&world, round).unwrap();
    }
    fs::write(world.place.stop(), "").unwrap();
    world.stop_agent().unwrap();
}
