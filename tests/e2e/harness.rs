//! The harness itself, without daemons: the oracle sees every kind of difference, copies are exact,
//! each program works, and its check accepts what it left and refuses what it did not.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use bfs_tests::leash::Leash;
use bfs_tests::programs::append::AppendWriters;
use bfs_tests::programs::ladder::Ladder;
use bfs_tests::programs::racing::RacingBuffer;
use bfs_tests::programs::scripts::{Failing, FsScript, GitWork, Postgres};
use bfs_tests::programs::sqlite::{Mode, Sqlite};
use bfs_tests::programs::unpack::Unpack;
use bfs_tests::programs::{Place, Program};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::binary;
use bfs_tests::{copy, oracle};

fn tree(at: &Path) {
    fs::create_dir_all(at.join("dir/empty")).unwrap();
    fs::write(at.join("dir/file"), "content").unwrap();
    fs::hard_link(at.join("dir/file"), at.join("linked")).unwrap();
    symlink("dir/file", at.join("symlink")).unwrap();
    fs::File::create(at.join("holes")).unwrap().set_len(1 << 20).unwrap();
    let made = Command::new("mkfifo").arg(at.join("fifo")).status().unwrap();
    assert!(made.success());
    let made = Command::new("mknod").arg(at.join("device")).args(["c", "1", "3"]).status().unwrap();
    assert!(made.success(), "this test makes a device: run it as root");
    set_xattr(&at.join("dir/file"), "user.color", b"red");
    set_xattr(&at.join("dir"), "user.color", b"blue");
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::setxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
}

/// One change of the backup must give a difference that names the file.
fn seen(what: &str, named: &str, change: impl Fn(&Path)) {
    let directory = tempfile::tempdir().unwrap();
    let (a, b) = (directory.path().join("a"), directory.path().join("b"));
    tree(&a);
    copy::exact(&a, &b).unwrap();
    assert_eq!(oracle::compare(&a, &b).unwrap(), Vec::<String>::new(), "copies are exact");
    change(&b);
    let found = oracle::compare(&a, &b).unwrap();
    assert!(found.iter().any(|line| line.contains(named)), "{what}: {found:?}");
}

/// Keeps the directory's own times, so that only the change itself can be seen.
fn keeping_time(directory: &Path, change: impl FnOnce()) {
    let before = fs::metadata(directory).unwrap();
    change();
    fs::File::open(directory).unwrap().set_modified(before.modified().unwrap()).unwrap();
}

#[test]
fn the_oracle_sees_every_kind_of_difference() {
    let quietly = |at: &Path, change: &dyn Fn(&Path)| {
        let time = fs::metadata(at).unwrap().modified().unwrap();
        change(at);
        fs::File::options().write(true).open(at).unwrap().set_modified(time).unwrap();
    };
    seen("bytes", "bytes differ from offset 3", |b| {
        quietly(&b.join("dir/file"), &|at| fs::write(at, "conTent").unwrap());
    });
    seen("size", "size is", |b| quietly(&b.join("dir/file"), &|at| fs::write(at, "contents").unwrap()));
    seen("a hole", "holes: bytes differ", |b| {
        quietly(&b.join("holes"), &|at| {
            let file = fs::File::options().write(true).open(at).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, b"x", 70_000).unwrap();
        });
    });
    seen("mode", "mode is", |b| {
        fs::set_permissions(b.join("dir/file"), fs::Permissions::from_mode(0o600)).unwrap();
    });
    seen("owner", "owner is", |b| std::os::unix::fs::lchown(b.join("symlink"), Some(7), None).unwrap());
    seen("mtime of a directory", "empty: mtime", |b| fs::write(b.join("dir/empty/x"), "").unwrap());
    seen("mtime of the root", ".: mtime", |b| {
        fs::write(b.join("x"), "").unwrap();
        fs::remove_file(b.join("x")).unwrap();
    });
    seen("xattr", "dir/file: xattrs", |b| set_xattr(&b.join("dir/file"), "user.color", b"rot"));
    seen("xattr of a directory", "dir: xattrs", |b| set_xattr(&b.join("dir"), "user.more", b""));
    seen("missing", "dir/empty: is missing", |b| fs::remove_dir(b.join("dir/empty")).unwrap());
    seen("too much", "new: is on the backup only", |b| fs::write(b.join("new"), "").unwrap());
    seen("type", "is a directory on the primary", |b| {
        fs::remove_dir(b.join("dir/empty")).unwrap();
        fs::write(b.join("dir/empty"), "").unwrap();
    });
    seen("target", "target is", |b| {
        fs::remove_file(b.join("symlink")).unwrap();
        symlink("dir/fil", b.join("symlink")).unwrap();
    });
    seen("device", "device number", |b| {
        fs::remove_file(b.join("device")).unwrap();
        assert!(
            Command::new("mknod").arg(b.join("device")).args(["c", "1", "5"]).status().unwrap().success()
        );
    });
    seen("hard links", "are one file on the primary", |b| {
        keeping_time(b, || {
            fs::remove_file(b.join("linked")).unwrap();
            assert!(
                Command::new("cp")
                    .arg("-a")
                    .arg(b.join("dir/file"))
                    .arg(b.join("linked"))
                    .status()
                    .unwrap()
                    .success()
            );
        });
        assert_eq!(fs::metadata(b.join("linked")).unwrap().nlink(), 1);
    });
}

/// Runs a program without replication and gives what it left to its check, and to `spoil`.
fn alone(program: &dyn Program, spoil: &dyn Fn(&Path)) {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let place = Place { data: directory.path().join("data"), aux: directory.path().join("aux") };
    for path in [&place.data, &place.aux] {
        fs::create_dir(path).unwrap();
    }
    program.prepare(&place).unwrap();
    let line = program.command(&place);
    let leash = Leash::new(directory.path(), None).unwrap();
    let mut child = leash.hold(Command::new(&line[0]).args(&line[1..])).unwrap().spawn().unwrap();
    until("the program half way", SOON, || {
        assert!(child.try_wait().unwrap().is_none(), "the program ended by itself");
        (place.aux.join("ready").exists() && program.half_way(&place)).then_some(())
    })
    .unwrap();
    fs::write(place.stop(), "").unwrap();
    let status = until("the program to end", SOON, || child.try_wait().transpose()).unwrap().unwrap();
    assert!(status.success(), "{status}");
    let at = directory.path().join("copy");
    copy::exact(&place.data, &at).unwrap();
    assert_eq!(oracle::compare(&place.data, &at).unwrap(), Vec::<String>::new());
    assert_eq!(program.check(&at, &place).unwrap(), Vec::<String>::new());
    fs::remove_dir_all(&at).unwrap();
    copy::exact(&place.data, &at).unwrap();
    spoil(&at);
    let wrong = program.check(&at, &place);
    assert!(!wrong.as_ref().is_ok_and(Vec::is_empty), "the check does not see that the tree was spoiled");
}

/// Whether a process works (not only waits to be waited for).
fn works(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z') && !rest.starts_with('X'))
}

#[test]
fn nothing_outlives_its_leash() {
    let directory = tempfile::tempdir().unwrap();
    let leash = Leash::new(directory.path(), None).unwrap();
    // A session of its own, ignored signals, a parent that is gone: as a daemon.
    let at = directory.path().join("pid");
    let script = format!(
        "trap '' TERM HUP; setsid sh -c 'echo $$ > {0}.new; mv {0}.new {0}; sleep 999; :' &",
        at.display()
    );
    let status = leash.hold(Command::new("/bin/sh").args(["-c", &script])).unwrap().status().unwrap();
    assert!(status.success());
    let pid = until("the daemon", SOON, || fs::read_to_string(&at).ok()).unwrap().trim().parse().unwrap();
    assert!(works(pid));
    drop(leash);
    assert!(!works(pid), "a process outlived its leash");
}

#[test]
fn nothing_outlives_a_test_process_that_is_killed() {
    let directory = tempfile::tempdir().unwrap();
    let place = Place { data: directory.path().join("data"), aux: directory.path().join("aux") };
    for path in [&place.data, &place.aux] {
        fs::create_dir(path).unwrap();
    }
    let mut test = Command::new(binary("bfs-workload"));
    let mut test = test.arg("leashed").args([&place.data, &place.aux]).spawn().unwrap();
    let held = until("a process to be held", SOON, || {
        fs::read_to_string(place.aux.join("held")).ok()?.trim().parse().ok()
    });
    test.kill().unwrap();
    test.wait().unwrap();
    let held = held.unwrap();
    until("what it held to be killed", SOON, || (!works(held)).then_some(())).unwrap();
    until("its directory to be removed", SOON, || (!place.data.exists()).then_some(())).unwrap();
}

fn cut_file(at: &Path, keep: impl Fn(u64) -> u64) {
    let file = fs::File::options().write(true).open(at).unwrap();
    file.set_len(keep(file.metadata().unwrap().len())).unwrap();
}

#[test]
fn append_writers() {
    // One writer loses its last operations: the others have seen them.
    alone(&AppendWriters, &|at| cut_file(&at.join("own-1"), |len| len / 64 / 2 * 64));
}

#[test]
fn ladder() {
    // The number of the last write, which is not there.
    alone(&Ladder, &|tree| {
        let file = tree.join("writer-1");
        let mut bytes = fs::read(&file).unwrap();
        bytes[0] = bytes[0].wrapping_add(100);
        fs::write(file, bytes).unwrap();
    });
}

#[test]
fn racing_buffer() {
    alone(&RacingBuffer, &|at| cut_file(&at.join("blocks"), |len| len - 512));
}

#[test]
fn sqlite_with_a_rollback_journal() {
    alone(&Sqlite(Mode::Journal), &|at| cut_file(&at.join("acks-2"), |_| 0));
}

#[test]
fn sqlite_with_a_write_ahead_log() {
    alone(&Sqlite(Mode::Wal), &|at| fs::remove_file(at.join("ops-1.db")).unwrap());
}

#[test]
fn shell_script() {
    alone(&FsScript, &|at| fs::write(at.join("state"), "7\n").unwrap());
}

#[test]
fn git() {
    alone(&GitWork, &|at| {
        fs::write(at.join("work/.git/packed-refs"), "nonsense").unwrap();
        fs::write(at.join("marks"), "committed 1\n").unwrap();
    });
}

#[test]
fn unpacking() {
    alone(&Unpack, &|at| {
        fs::write(at.join("marks"), "unpacked 77\n").unwrap();
    });
}

#[test]
fn postgres() {
    alone(&Postgres, &|at| fs::write(at.join("marks"), "committed 9999999\n").unwrap());
}

#[test]
fn failing_calls() {
    alone(&Failing { small: false }, &|at| cut_file(&at.join("marks"), |len| len - 2));
}
