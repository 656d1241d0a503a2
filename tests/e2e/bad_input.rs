//! Bad input: each case has a clear message with a hint, and an exit status of its own that the help
//! documents; and a backup that is lost never disturbs the program.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use bfs_tests::exercise;
use bfs_tests::programs::append::AppendWriters;
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{How, Transport, World, binary};

/// How long a refusal may take.
const PROMPTLY: Duration = Duration::from_secs(45);

/// Runs to the end; what does not end promptly is killed and fails the test.
fn ended(command: &mut Command) -> Output {
    let out = tempfile::NamedTempFile::new().unwrap();
    let err = tempfile::NamedTempFile::new().unwrap();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(out.reopen().unwrap())
        .stderr(err.reopen().unwrap())
        .spawn()
        .unwrap();
    let status = until("a refusal", PROMPTLY, || child.try_wait().transpose());
    let _ = child.kill();
    let _ = child.wait();
    let (stdout, stderr) = (fs::read(out.path()).unwrap(), fs::read(err.path()).unwrap());
    let said = String::from_utf8_lossy(&stderr).into_owned();
    Output { status: status.unwrap_or_else(|e| panic!("{e}; it said {said}")).unwrap(), stdout, stderr }
}

fn agent(world: &World, path: &Path) -> Command {
    let mut command = Command::new(binary("bfs-agent"));
    command.args(["run", "--group", &world.group, "--checkpoint", "manual", "--path"]).arg(path);
    command.args(["--backup", &world.destination(), "--", "/bin/true"]);
    command
}

/// A clear refusal: a status of its own, a first line that names `what`, a hint, no backtrace.
fn refused(case: &str, done: &Output, what: &str) -> i32 {
    let said = String::from_utf8_lossy(&done.stderr);
    let status = done.status.code().unwrap_or_else(|| panic!("{case}: killed by a signal: {said}"));
    assert!(status != 0, "{case}: it succeeded: {said}");
    assert!(status != 101 && !said.contains("panicked"), "{case}: it panicked: {said}");
    assert!(said.contains(what), "{case}: the message does not name {what:?}: {said}");
    assert!(says_what_to_do(&said), "{case}: it does not say what to do: {said}");
    status
}

/// The agent has a line for it; the replayer says it behind a colon.
fn says_what_to_do(said: &str) -> bool {
    let line =
        said.lines().any(|line| line.trim().strip_prefix("try: ").is_some_and(|rest| !rest.is_empty()));
    line || [
        ": stop ",
        ": give ",
        ": install ",
        ": start ",
        ": use ",
        ": choose ",
        "keep a copy",
        "makes one",
    ]
    .iter()
    .any(|advice| said.contains(advice))
}

/// The exit statuses that a help text documents: the numbers below 256 at the beginning of a line.
fn documented(binary_name: &str) -> Vec<i32> {
    let help = Command::new(binary(binary_name)).arg("--help").output().unwrap();
    let help = String::from_utf8_lossy(&help.stdout).into_owned();
    let numbers = help.lines().filter_map(|line| line.split_whitespace().next()?.parse::<i32>().ok());
    numbers.filter(|n| *n < 256).collect()
}

#[test]
fn each_refusal_has_a_status_of_its_own() {
    let mut world = World::new("refusals", Transport::Unix).unwrap();
    let mut statuses: BTreeMap<&str, i32> = BTreeMap::new();

    let done = ended(&mut agent(&world, &world.place.data));
    statuses.insert("replayer unreachable at start", refused("unreachable", &done, world.address()));

    world.start_replayer().unwrap();
    let missing = world.root().join("missing");
    let done = ended(&mut agent(&world, &missing));
    statuses.insert("path does not exist", refused("missing", &done, "missing"));

    let file = world.root().join("file");
    fs::write(&file, "").unwrap();
    let done = ended(&mut agent(&world, &file));
    statuses.insert("path is a file", refused("file", &done, "file"));

    // A replicated directory with the store in it would replicate its own backup.
    let inside = world.place.data.join("inside");
    fs::create_dir(&inside).unwrap();
    let mut command = Command::new(binary("bfs-agent"));
    command.args(["run", "--group", &world.group, "--path"]).arg(&world.place.data);
    command.arg("--backup").arg(format!("dir:{}", inside.display())).args(["--", "/bin/true"]);
    statuses.insert("path overlaps the store", refused("overlap", &ended(&mut command), "inside"));

    // The same with the directory inside of the store.
    let mut command = Command::new(binary("bfs-agent"));
    command.args(["run", "--group", &world.group, "--path"]).arg(&inside);
    command.arg("--backup").arg(format!("dir:{}", world.place.data.display())).args(["--", "/bin/true"]);
    let done = ended(&mut command);
    assert_eq!(refused("overlap", &done, "inside"), statuses["path overlaps the store"]);

    let mut command = Command::new(binary("bfs-replayer"));
    command.args(["serve", "--store"]).arg(&world.store).arg("--listen");
    command.arg(format!("unix:{}", world.root().join("second.sock").display()));
    let store = world.store.display().to_string();
    statuses.insert("store in use", refused("in use", &ended(&mut command), &store));

    // A store that a later release has written.
    let newer = world.root().join("newer");
    fs::create_dir(&newer).unwrap();
    fs::write(newer.join("format"), "bfs store 99\n").unwrap();
    let mut command = Command::new(binary("bfs-replayer"));
    command.args(["serve", "--store"]).arg(&newer).arg("--listen");
    command.arg(format!("unix:{}", world.root().join("newer.sock").display()));
    statuses.insert("store newer", refused("newer", &ended(&mut command), "99"));

    // A folder that is somebody else's.
    let mut command = Command::new(binary("bfs-replayer"));
    command.args(["serve", "--store"]).arg(&world.place.data).arg("--listen");
    command.arg(format!("unix:{}", world.root().join("foreign.sock").display()));
    let foreign = world.place.data.display().to_string();
    statuses.insert("not a store", refused("not a store", &ended(&mut command), &foreign));

    // Another user: the binary is copied to where everybody may run it.
    let copy = world.root().join("bfs-agent");
    fs::copy(binary("bfs-agent"), &copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&copy);
    command.args(["run", "--path"]).arg(&world.place.data).args(["--backup", &world.destination()]);
    command.args(["--", "/bin/true"]);
    statuses.insert("no root", refused("no root", &ended(&mut command), "root"));

    // A kernel without BTF: its file is covered, for this one process.
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", "mount -t tmpfs none /sys/kernel/btf && exec \"$@\"", "sh"]);
    command.arg(binary("bfs-agent")).args(["run", "--group", &world.group, "--path"]);
    command.arg(&world.place.data).args(["--backup", &world.destination(), "--", "/bin/true"]);
    statuses.insert("no BTF", refused("no BTF", &ended(&mut command), "BTF"));

    // A peer of another version.
    let other = world.root().join("other.sock");
    let listener = UnixListener::bind(&other).unwrap();
    let server = std::thread::spawn(move || {
        // Every connection gets the same answer, until the test connects once more to end this.
        while let Ok((mut stream, _)) = listener.accept() {
            let mut theirs = [0; 8];
            let _ = stream.write_all(b"bfs1\x63\0\0\0");
            if stream.read_exact(&mut theirs).is_ok() && &theirs == b"the end!" {
                return;
            }
        }
    });
    let mut command = Command::new(binary("bfs-agent"));
    command.args(["run", "--group", &world.group, "--path"]).arg(&world.place.data);
    command.args(["--backup", &format!("unix:{}", other.display()), "--", "/bin/true"]);
    statuses.insert("protocol version", refused("version", &ended(&mut command), "version"));
    UnixStream::connect(&other).unwrap().write_all(b"the end!").unwrap();
    server.join().unwrap();

    // What is wrong with a path is one kind; the replayer's statuses are documented in its own help.
    let [missing, file, overlap] =
        ["path does not exist", "path is a file", "path overlaps the store"].map(|kind| statuses[kind]);
    assert_eq!([missing, missing], [file, overlap], "paths: {statuses:?}");
    let replayers = ["store in use", "store newer", "not a store"].map(|kind| statuses.remove(kind).unwrap());
    statuses.retain(|kind, _| !["path is a file", "path overlaps the store"].contains(kind));
    let kinds: std::collections::BTreeSet<i32> = statuses.values().copied().collect();
    assert_eq!(kinds.len(), statuses.len(), "two kinds share a status: {statuses:?}");
    let known = documented("bfs-agent");
    for (kind, status) in &statuses {
        assert!(known.contains(status), "{kind}: status {status} is not in --help (there: {known:?})");
    }
    let known = documented("bfs-replayer");
    for status in replayers {
        assert!(known.contains(&status), "replayer: status {status} is not in --help (there: {known:?})");
    }
    assert_eq!(replayers.iter().collect::<std::collections::BTreeSet<_>>().len(), replayers.len());
}

#[test]
fn a_replayer_that_goes_away_does_not_disturb_the_program() {
    let mut world = World::new("unreachable", Transport::Tcp).unwrap();
    world.start(&AppendWriters, How::Run).unwrap();
    world.checkpoint().unwrap();
    world.kill_replayer().unwrap();
    let own = world.place.data.join("own-0");
    let size = fs::metadata(&own).unwrap().len();
    until("the program to go on", SOON, || (fs::metadata(&own).unwrap().len() > size + 6400).then_some(()))
        .unwrap();
    // Bounded: a wait for a confirmation that cannot come ends, and not with success.
    let done = world
        .agent_command(&["checkpoint", "--wait", "confirmed", "--timeout", "2s"], Duration::from_secs(30))
        .unwrap();
    assert!(!done.status.success(), "a checkpoint was confirmed by nobody");
    let status = world.status().unwrap().to_string();
    let away = ["unreachable", "disconnected", "\"connected\":false", "refused", "not connected"];
    assert!(away.iter().any(|word| status.contains(word)), "the status does not say it: {status}");
    world.start_replayer().unwrap();
    world.checkpoint().unwrap();
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

#[test]
fn garbage_on_the_port_disturbs_nobody() {
    let mut world = World::new("garbage", Transport::Tcp).unwrap();
    world.start(&AppendWriters, How::Run).unwrap();
    let mut random = 88_172_645_463_325_252_u64;
    for round in 0..50 {
        let mut stream = std::net::TcpStream::connect(world.address()).unwrap();
        let mut bytes = match round % 3 {
            0 => b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            // The right beginning, then a frame that claims to be huge.
            1 => b"bfs1\x01\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff".to_vec(),
            _ => Vec::new(),
        };
        for _ in 0..512 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            bytes.extend(random.to_le_bytes());
        }
        // It may hang up in the middle.
        let _ = stream.write_all(&bytes);
        if round % 10 == 0 {
            exercise::cut(&world, &AppendWriters, round).unwrap();
        }
    }
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

/// Files below the store that look like segments of the log: the largest regular file outside of
/// the tree that is not the index.
fn newest_segment(store: &Path, group: &str) -> PathBuf {
    let mut left = vec![store.to_owned()];
    let mut segments = Vec::new();
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory).unwrap().flatten() {
            let path = entry.path();
            let meta = entry.metadata().unwrap();
            if meta.is_dir() && !path.starts_with(store.join("tree")) {
                left.push(path);
            } else if meta.is_file() && path.parent().unwrap().to_string_lossy().contains("log") {
                segments.push(path);
            }
        }
    }
    segments.sort();
    segments.pop().unwrap_or_else(|| panic!("no log of {group} in {}", store.display()))
}

fn damaged(name: &str, damage: impl Fn(&fs::File, u64)) -> (World, Output) {
    let mut world = World::new(name, Transport::Unix).unwrap();
    world.start(&AppendWriters, How::Run).unwrap();
    world.checkpoint().unwrap();
    world.kill_replayer().unwrap();
    let segment = newest_segment(&world.store, &world.group);
    let file = fs::File::options().read(true).write(true).open(segment).unwrap();
    let size = file.metadata().unwrap().len();
    damage(&file, size);
    let mut command = Command::new(binary("bfs-replayer"));
    command.args(["status", "--store"]).arg(&world.store);
    let done = ended(&mut command);
    (world, done)
}

#[test]
fn a_torn_tail_of_the_log_is_cut_and_the_agent_sends_again() {
    // Half a record that was never acknowledged: as a power cut in the middle of an append leaves it.
    let (mut world, _) = damaged("torn", |file, size| {
        file.write_all_at(&[0x5a; 37], size).unwrap();
    });
    world.start_replayer().unwrap();
    exercise::cut(&world, &AppendWriters, 0).unwrap();
    assert!(world.finish().unwrap().success());
    exercise::equal(&world).unwrap();
}

#[test]
fn a_corrupted_log_is_refused_or_repaired_and_never_applied() {
    let (mut world, _) = damaged("corrupt", |file, size| {
        let mut byte = [0];
        let at = size * 2 / 3;
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    });
    // Either the replayer says that the log is damaged, with a status, or it had applied that part
    // already and goes on. What is given out is right in both cases.
    match world.start_replayer() {
        Ok(()) => {
            exercise::cut(&world, &AppendWriters, 0).unwrap();
            assert!(world.finish().unwrap().success());
            exercise::equal(&world).unwrap();
        }
        Err(refusal) => {
            let said = refusal.to_string();
            assert!(said.contains("ended with exit status"), "{said}");
            assert!(!said.contains("101"), "it panicked: {said}");
        }
    }
}
