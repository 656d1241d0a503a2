//! Checkpoints that leave their store: as streams into another one, and as archives; and those that are made one. All
//! of it with the real binaries beside a replayer that serves, and compared with copies of the primary.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use bfs_tests::programs::append::AppendWriters;
use bfs_tests::programs::names::RandomNames;
use bfs_tests::random::{Random, given_seed};
use bfs_tests::stores::{below, is_sound, kept, replayer, restored_equals};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{How, Transport, World, command_ok, rounds};
use bfs_tests::{copy, oracle};

/// A stream of a checkpoint, whole or the difference to another one.
fn send(world: &World, from: Option<u64>, to: u64) -> Child {
    let mut command = replayer(&["send", "--group", &world.group, "--to", &to.to_string()], &world.store);
    if let Some(from) = from {
        command.args(["--from", &from.to_string()]);
    }
    command.stdout(Stdio::piped()).spawn().unwrap()
}

/// Through a pipe into another store.
fn send_into(world: &World, from: Option<u64>, to: u64, store: &Path) -> Output {
    let mut sender = send(world, from, to);
    let mut receive = replayer(&["receive"], store);
    let done = receive.stdin(sender.stdout.take().unwrap()).output().unwrap();
    let sent = sender.wait().unwrap();
    assert!(sent.success() || !done.status.success(), "the sender ended with {sent}");
    done
}

fn ok(done: &Output) {
    assert!(done.status.success(), "{}: {}", done.status, String::from_utf8_lossy(&done.stderr));
}

/// Checkpoints of names that change: some are sent, whole and as differences, some are merged, in the one store while it is
/// served and written, in the other while nobody owns it.
#[test]
fn checkpoints_go_into_another_store_and_are_merged() {
    let mut world = World::new("transfer", Transport::Unix).unwrap();
    world.replayer_options(&["--keep-min", "2"]);
    world.start(&RandomNames, How::Run).unwrap();
    let second = world.scratch.join("second");
    let mut copies: Vec<(u64, PathBuf)> = Vec::new();
    for index in 0..rounds(6, 20) {
        let at = world.scratch.join(format!("then-{index}"));
        let number = world.checkpoint_stopped(&copy::command(&world.place.data, &at)).unwrap();
        // One that nobody copied lies between them.
        let between = world.checkpoint_until("applied").unwrap();
        ok(&send_into(&world, copies.last().map(|(number, _)| *number), number, &second));
        restored_equals(&world, &second, number, &at);
        copies.push((number, at));
        if index == 2 {
            // The first of all and what is between go; another that is sent from later stays.
            let merge = [copies[0].0, copies[1].0].map(|n| n.to_string());
            let mut ask = replayer(&["merge", "--group", &world.group, &merge[0], &merge[1]], &world.store);
            command_ok(&mut ask).unwrap();
            let left = kept(&world, &world.store);
            assert!(!left.contains(&copies[0].0) && left.contains(&copies[1].0), "{left:?}");
            let (too_new, why) = (between.to_string(), "--keep-min");
            let mut ask = replayer(&["merge", "--group", &world.group, &merge[1], &too_new], &world.store);
            let refused = ask.output().unwrap();
            assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains(why));
        }
    }
    let (second_of_all, last) = (&copies[1], &copies[copies.len() - 1]);
    let fresh = world.scratch.join("fresh");
    // One whole, then the difference over everything.
    ok(&send_into(&world, None, second_of_all.0, &fresh));
    ok(&send_into(&world, Some(second_of_all.0), last.0, &fresh));
    assert_eq!(kept(&world, &fresh), [second_of_all.0, last.0]);
    let merge = [copies[1].0, copies[3].0].map(|n| n.to_string());
    let words = ["merge", "--group", &world.group, "--keep-min", "1", &merge[0], &merge[1]];
    command_ok(&mut replayer(&words, &second)).unwrap();
    let all: Vec<u64> = copies.iter().map(|(number, _)| *number).collect();
    assert_eq!(kept(&world, &second), [&all[..1], &all[3..]].concat());
    world.finish().unwrap();
    for (number, at) in &copies[1..] {
        restored_equals(&world, &world.store, *number, at);
    }
    world.kill_replayer().unwrap();
    for store in [&second, &fresh, &world.store] {
        for number in kept(&world, store) {
            if let Some((_, at)) = copies.iter().find(|(of, _)| *of == number) {
                restored_equals(&world, store, number, at);
            }
        }
        is_sound(store);
    }
}

/// A receiver that is killed at any moment, a sender that is, and a stream that is cut off: the store has what it had, or the
/// whole checkpoint; and the next try is as good as the first.
#[test]
fn what_is_broken_off_leaves_the_store_as_it_was() {
    let mut world = World::new("transfer-kills", Transport::Unix).unwrap();
    world.start(&AppendWriters, How::Run).unwrap();
    let mut numbers = Vec::new();
    let mut copies = Vec::new();
    for index in 0..2 {
        let at = world.scratch.join(format!("then-{index}"));
        numbers.push(world.checkpoint_stopped(&copy::command(&world.place.data, &at)).unwrap());
        copies.push(at);
        // What goes behind it is a difference of some length.
        let large = world.place.data.join(format!("large-{index}"));
        let mut bytes = vec![0; 8 << 20];
        let mut moments = Random::new(7 + index);
        bytes.chunks_mut(64).for_each(|some| some[0] = moments.below(255) as u8);
        fs::write(&large, &bytes).unwrap();
        world.checkpoint_until("applied").unwrap();
    }
    let last = world.scratch.join("then-last");
    numbers.push(world.checkpoint_stopped(&copy::command(&world.place.data, &last)).unwrap());
    copies.push(last);
    world.wait_applied(numbers[2]).unwrap();
    world.finish().unwrap();
    let stream = |from, to| send(&world, from, to).wait_with_output().unwrap().stdout;
    let (first, difference) = (stream(None, numbers[0]), stream(Some(numbers[0]), numbers[2]));
    let second = world.scratch.join("second");
    let receive = || {
        let mut command = replayer(&["receive"], &second);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    // Cut off, also before anything was there.
    for bytes in [&first[..0], &first[..first.len() / 2], &first[..first.len() - 1]] {
        let mut child = receive();
        let _ = child.stdin.take().unwrap().write_all(bytes);
        assert!(!child.wait().unwrap().success());
    }
    let mut child = receive();
    child.stdin.take().unwrap().write_all(&first).unwrap();
    assert!(child.wait().unwrap().success());
    let mut moments = Random::new(given_seed().unwrap_or(20_261_127));
    let mut done = false;
    for turn in 0..rounds(8, 100) {
        let mut child = receive();
        let mut input = child.stdin.take().unwrap();
        let until_here = if turn % 2 == 0 { moments.below(difference.len()) } else { difference.len() };
        let _ = input.write_all(&difference[..until_here]);
        if until_here == difference.len() {
            drop(input);
            // The moment of the kill is what is tested: in the log, while it is adopted, in the step.
            std::thread::sleep(std::time::Duration::from_millis(moments.below(80) as u64));
        }
        let _ = child.kill();
        child.wait().unwrap();
        let now = kept(&world, &second);
        done |= now.len() > 1;
        assert_eq!(now, if done { vec![numbers[0], numbers[2]] } else { vec![numbers[0]] });
        restored_equals(&world, &second, numbers[0], &copies[0]);
        if done {
            break;
        }
    }
    if !done {
        let mut child = receive();
        child.stdin.take().unwrap().write_all(&difference).unwrap();
        assert!(child.wait().unwrap().success());
    }
    until("the checkpoint", SOON, || (kept(&world, &second) == [numbers[0], numbers[2]]).then_some(()))
        .unwrap();
    restored_equals(&world, &second, numbers[2], &copies[2]);
    is_sound(&second);
    assert_eq!(fs::read_dir(second.join("receive")).unwrap().count(), 0);
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    let (path, name) = (CString::new(path.as_os_str().as_bytes()).unwrap(), CString::new(name).unwrap());
    // SAFETY: both are strings that end with a zero, and the length is that of the value.
    let done =
        unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

fn set_time(path: &Path, seconds: i64, nanoseconds: i64) {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let time = libc::timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    // SAFETY: a string that ends with a zero, and two times.
    let done = unsafe {
        libc::utimensat(libc::AT_FDCWD, path.as_ptr(), [time; 2].as_ptr(), libc::AT_SYMLINK_NOFOLLOW)
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

fn node(path: &Path, kind: libc::mode_t, device: libc::dev_t) {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: a string that ends with a zero.
    assert_eq!(unsafe { libc::mknod(path.as_ptr(), kind | 0o640, device) }, 0);
}

/// A directory with everything that a checkpoint can have, but sockets.
fn everything(data: &Path) {
    fs::create_dir_all(data.join("d/e")).unwrap();
    fs::write(data.join("plain"), "bytes").unwrap();
    fs::write(data.join("empty"), "").unwrap();
    fs::hard_link(data.join("plain"), data.join("d/linked")).unwrap();
    let mut deep = data.join("d");
    for _ in 0..6 {
        deep = deep.join("a directory with a long name, as others have them too");
        fs::create_dir(&deep).unwrap();
    }
    fs::write(deep.join("long"), "deep").unwrap();
    fs::hard_link(deep.join("long"), deep.join("long as well")).unwrap();
    let strange = std::ffi::OsString::from_vec(b"\xff \n =%".to_vec());
    fs::write(data.join(&strange), "strange").unwrap();
    symlink(deep.join("long"), data.join("far")).unwrap();
    symlink(&strange, data.join("near")).unwrap();
    node(&data.join("pipe"), libc::S_IFIFO, 0);
    node(&data.join("null"), libc::S_IFCHR, libc::makedev(1, 3));
    node(&data.join("disk"), libc::S_IFBLK, libc::makedev(259, 300_000));
    // Holes at the beginning, between, at the end, and nothing else; a small file and a large one.
    for (name, size, written) in [
        ("holes", 300_000_u64, vec![8192_u64, 20_000, 200_000]),
        ("huge", 5 << 30, vec![1 << 20, 4 << 30]),
        ("hole", 1 << 20, vec![]),
    ] {
        let file = File::create(data.join(name)).unwrap();
        file.set_len(size).unwrap();
        for at in written {
            file.write_all_at(&[at as u8 | 1; 9000], at).unwrap();
        }
    }
    fs::write(data.join("large"), vec![b'x'; 3_000_001]).unwrap();
    set_xattr(&data.join("plain"), "user.colour", b"\0green\xff\n");
    set_xattr(&data.join("d"), "user.a=b%", b"");
    set_xattr(&data.join("empty"), "trusted.of root", b"x");
    // user::rw- user:7:r-- group::r-- mask::r-- other::---
    let acl: Vec<u8> =
        [2_u32, 0x6_0001, u32::MAX, 0x4_0002, 7, 0x4_0004, u32::MAX, 0x4_0010, u32::MAX, 0x20, u32::MAX]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
    set_xattr(&data.join("large"), "system.posix_acl_access", &acl);
    std::os::unix::fs::chown(data.join("large"), Some(3_000_000), Some(12)).unwrap();
    fs::set_permissions(data.join("empty"), fs::Permissions::from_mode(0o6751)).unwrap();
    fs::set_permissions(data.join("d/e"), fs::Permissions::from_mode(0o1777)).unwrap();
    for (name, seconds, nanoseconds) in [
        ("plain", 1_000_000_000, 123_456_789),
        ("empty", -2, 700_000_000),
        ("far", 5, 1),
        ("pipe", 0, 0),
        ("d", 7, 999_999_999),
    ] {
        set_time(&data.join(name), seconds, nanoseconds);
    }
}

fn blocks(path: &Path) -> u64 {
    fs::symlink_metadata(path).unwrap().blocks()
}

/// What GNU tar makes of an archive is the checkpoint, in everything.
#[test]
fn an_archive_is_the_checkpoint() {
    let mut world = World::new("export", Transport::Unix).unwrap();
    everything(&world.place.data);
    world.start_replayer().unwrap();
    world.attach_to(&["--everyone"]).unwrap();
    let first = world.checkpoint().unwrap();
    world.wait_applied(first).unwrap();
    let copy = world.scratch.join("copy");
    copy::exact(&world.place.data, &copy).unwrap();
    // Behind it everything is another thing.
    let huge = File::options().write(true).open(world.place.data.join("huge")).unwrap();
    huge.write_all_at(b"later", 3 << 30).unwrap();
    drop(huge);
    fs::write(world.place.data.join("plain"), "later").unwrap();
    fs::remove_file(world.place.data.join("large")).unwrap();
    fs::rename(world.place.data.join("d"), world.place.data.join("moved")).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(world.place.data.join("socket")).unwrap();
    let second = world.checkpoint().unwrap();
    world.wait_applied(second).unwrap();
    drop(socket);
    let extracted = |words: &[&str], name: &str| {
        let archive = world.scratch.join(format!("{name}.tar"));
        let mut export = replayer(&["export", "--group", &world.group], &world.store);
        let done = export.args(words).stdout(File::create(&archive).unwrap()).output().unwrap();
        ok(&done);
        let to = world.scratch.join(name);
        fs::create_dir(&to).unwrap();
        let mut tar = Command::new("tar");
        // It has doubts about times before 1970.
        tar.args([
            "-x",
            "--warning=no-timestamp",
            "--xattrs",
            "--xattrs-include=*",
            "--numeric-owner",
            "-p",
            "-f",
        ]);
        let said = command_ok(tar.arg(&archive).arg("-C").arg(&to)).unwrap().stderr;
        assert_eq!(String::from_utf8_lossy(&said), "");
        (to, fs::metadata(&archive).unwrap().len(), String::from_utf8_lossy(&done.stderr).into_owned())
    };
    let (to, bytes, _) = extracted(&["--at", &first.to_string()], "whole");
    assert!(bytes < 5_000_000, "an archive of {bytes} bytes for holes");
    let differences = oracle::compare(&copy, &to.join(below(&world))).unwrap();
    assert_eq!(differences, Vec::<String>::new());
    for name in ["holes", "huge", "hole"] {
        let (was, is) = (blocks(&copy.join(name)), blocks(&to.join(below(&world)).join(name)));
        assert!(is <= was + 16, "{name}: {is} blocks where there were {was}");
    }
    // A part, and a single file.
    let path = world.place.data.join("d");
    let (to, ..) = extracted(&["--at", &first.to_string(), "--path", path.to_str().unwrap()], "part");
    assert_eq!(fs::read_dir(to.join(below(&world))).unwrap().count(), 1);
    // Its hard links end at what is not in the archive.
    assert_eq!(fs::read(to.join(below(&world)).join("d/linked")).unwrap(), b"bytes");
    let (to, _, said) = extracted(&["--at", &second.to_string()], "later");
    assert!(said.contains("cannot have sockets") && said.contains("/socket"), "{said}");
    assert_eq!(fs::read(to.join(below(&world)).join("plain")).unwrap(), b"later");
    assert!(to.join(below(&world)).join("moved/e").is_dir());
    world.stop_agent().unwrap();
    // A checkpoint that was received is as sparse.
    let other = world.scratch.join("other");
    ok(&send_into(&world, None, first, &other));
    restored_equals(&world, &other, first, &copy);
    let tree = other.join("tree").join(&world.group).join(below(&world));
    for name in ["holes", "huge", "hole"] {
        assert!(blocks(&tree.join(name)) <= blocks(&copy.join(name)) + 16, "{name}");
    }
    ok(&send_into(&world, Some(first), second, &other));
    assert!(blocks(&tree.join("huge")) <= blocks(&copy.join("huge")) + 32);
    is_sound(&other);
}
