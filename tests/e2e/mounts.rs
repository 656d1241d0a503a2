//! Checkpoints that are mounted: each shows the primary as it was then, for as long as it is mounted, while
//! replication goes on, over a replayer that is killed, and while the applier is at work.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use bfs_tests::programs::Program;
use bfs_tests::programs::append::AppendWriters;
use bfs_tests::programs::names::RandomNames;
use bfs_tests::programs::sqlite::{Mode, Sqlite};
use bfs_tests::watch::{SOON, until};
use bfs_tests::world::{How, Transport, World, binary, rounds};
use bfs_tests::{copy, oracle};

/// A mounted checkpoint, and the copy of the primary at it.
struct Mount {
    process: Child,
    at: PathBuf,
    copy: PathBuf,
}

fn is_mounted(at: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mounts").unwrap();
    table.lines().any(|line| line.split(' ').nth(1) == at.to_str())
}

fn mount(world: &World, number: u64, copy: PathBuf) -> Mount {
    let at = world.scratch.join(format!("mounted-{number}"));
    fs::create_dir(&at).unwrap();
    let mut process = world.mount_checkpoint(number, &at).unwrap();
    until("the mount", SOON, || {
        assert_eq!(process.try_wait().unwrap(), None, "the mount ended");
        is_mounted(&at).then_some(())
    })
    .unwrap();
    Mount { process, at, copy }
}

impl Mount {
    fn data(&self, world: &World) -> PathBuf {
        self.at.join(world.place.data.strip_prefix("/").unwrap())
    }

    fn is_equal(&self, world: &World) {
        let differences = oracle::compare(&self.copy, &self.data(world)).unwrap();
        assert_eq!(differences, Vec::<String>::new(), "{}", self.at.display());
    }

    /// Ends it as asked, and cleanly.
    fn end(mut self, line: &[&str]) {
        assert!(Command::new(line[0]).args(&line[1..]).status().unwrap().success(), "{line:?}");
        let ended = until("the end of the mount", SOON, || self.process.try_wait().transpose()).unwrap();
        assert!(ended.unwrap().success());
        assert!(!is_mounted(&self.at));
    }
}

/// Several at once; each is compared when it is mounted, while the program works on, and at the end.
fn mounted_while_replication_goes_on(program: &dyn Program, transport: Transport) {
    let mut world = World::new(&format!("mounts-{}", program.name()), transport).unwrap();
    world.start(program, How::Run).unwrap();
    let mut mounts: Vec<Mount> = Vec::new();
    for index in 0..rounds(4, 16) {
        let copy = world.scratch.join(format!("then-{index}"));
        let number = world.checkpoint_stopped(&copy::command(&world.place.data, &copy)).unwrap();
        world.wait_applied(number).unwrap();
        mounts.push(mount(&world, number, copy));
        // Something is applied while they are compared.
        world.checkpoint_until("sealed").unwrap();
        for mount in &mounts {
            mount.is_equal(&world);
        }
        if index == 1 {
            world.kill_replayer().unwrap();
            world.start_replayer().unwrap();
        }
    }
    world.finish().unwrap();
    for mount in &mounts {
        let mut diff = Command::new("diff");
        diff.args(["-r", "--no-dereference"]).arg(&mount.copy).arg(mount.data(&world)).stdin(Stdio::null());
        let said = diff.output().unwrap();
        // Of fifos and sockets diff(1) says that they are such, on both sides.
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        let real: Vec<&str> = text
            .lines()
            .filter(|l| !l.contains(" is a fifo while") && !l.contains(" is a socket while"))
            .collect();
        assert!(real.is_empty(), "{real:?}");
        mount.is_equal(&world);
        // Nothing can be changed in it.
        let error = fs::write(mount.data(&world).join("new"), "").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    }
    let last = mounts.pop().unwrap();
    let pid = last.process.id().to_string();
    last.end(&["kill", "-TERM", &pid]);
    for mount in mounts {
        let at = mount.at.to_str().unwrap().to_owned();
        mount.end(&["umount", &at]);
    }
}

#[test]
fn names_that_change() {
    mounted_while_replication_goes_on(&RandomNames, Transport::Unix);
}

#[test]
fn files_that_grow() {
    mounted_while_replication_goes_on(&AppendWriters, Transport::Tcp);
}

/// Without a replayer the command owns the store; one that was killed leaves a mount that says so.
#[test]
fn without_an_owner_and_after_a_kill() {
    let mut world = World::new("mounts-alone", Transport::Unix).unwrap();
    let data = world.place.data.clone();
    let script = "cd \"$0\"; echo one > a; ln a b; mkdir d; chmod 2750 d; mkfifo d/pipe; mknod d/dev c 1 3; \
                  ln -s ../a d/link; touch -d @-5.25 -h d/link; truncate -s 3G sparse; printf end >> sparse; \
                  chmod 4711 b; touch \"$1\"; while ! test -e \"$2\"; do sleep 0.05; done";
    // Before the agent comes: it copies what is there.
    fs::write(data.join("x"), "with an attribute").unwrap();
    rustix::fs::setxattr(data.join("x"), "user.k", b"value", rustix::fs::XattrFlags::empty()).unwrap();
    world.start_replayer().unwrap();
    let (ready, stop) = (world.place.aux.join("ready"), world.place.stop());
    let words = ["sh", "-c", script, data.to_str().unwrap(), ready.to_str().unwrap(), stop.to_str().unwrap()];
    world.run(&words.map(str::to_owned)).unwrap();
    let copy = world.scratch.join("then");
    let number = world.checkpoint_stopped(&copy::command(&data, &copy)).unwrap();
    world.finish().unwrap();
    world.kill_replayer().unwrap();
    let mut first = mount(&world, number, copy);
    first.is_equal(&world);
    let sparse = fs::metadata(first.data(&world).join("sparse")).unwrap();
    assert_eq!((sparse.len(), sparse.mode() & 0o222), ((3 << 30) + 3, 0o200));
    first.process.kill().unwrap();
    first.process.wait().unwrap();
    let again = Command::new(binary("bfs-replayer"))
        .args(["mount", "--group", &world.group, "--at", &number.to_string(), "--store"])
        .args([&world.store, &first.at])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&again.stderr).into_owned();
    assert!(!again.status.success() && said.contains("process is gone") && said.contains("umount"), "{said}");
    assert!(Command::new("umount").arg(&first.at).status().unwrap().success());
    fs::remove_dir(&first.at).unwrap();
    let second = mount(&world, number, first.copy);
    second.is_equal(&world);
    let at = second.at.to_str().unwrap().to_owned();
    second.end(&["umount", &at]);
}

/// SQLite opens a database where it is mounted, and finds it whole.
#[test]
fn a_database_is_opened_in_place() {
    let program = Sqlite(Mode::Journal);
    let mut world = World::new("mounts-sqlite", Transport::Unix).unwrap();
    world.start(&program, How::Run).unwrap();
    world.checkpoint_until("applied").unwrap();
    world.finish().unwrap();
    let copy = world.scratch.join("then");
    copy::exact(&world.place.data, &copy).unwrap();
    let number = world.replayer_status().unwrap()["applied"].as_u64().unwrap();
    let mounted = mount(&world, number, copy);
    mounted.is_equal(&world);
    let mut databases = 0;
    for entry in fs::read_dir(mounted.data(&world)).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "db") {
            let flags = rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY;
            let database = rusqlite::Connection::open_with_flags(&path, flags).unwrap();
            let verdict: String = database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
            let rows: i64 = database.query_row("SELECT count(*) FROM ops", [], |row| row.get(0)).unwrap();
            assert!(verdict == "ok" && rows > 0, "{verdict}, {rows} rows");
            databases += 1;
        }
    }
    assert!(databases > 0);
    let at = mounted.at.to_str().unwrap().to_owned();
    mounted.end(&["umount", &at]);
}

/// What a byte range of a file has: wrong bytes are none of the answers.
fn lost_or_right(path: &Path, at: u64, right: &[u8]) -> bool {
    let mut there = vec![0; right.len()];
    match fs::File::open(path).and_then(|file| file.read_exact_at(&mut there, at)) {
        Ok(()) => assert!(there == right, "{} at {at}", path.display()),
        Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EIO), "{}: {error}", path.display()),
    }
    there == right
}

/// Bytes of a checkpoint that others changed in the backup are an error where it is mounted, and are named; all else in
/// it is right, also while the tree is repaired.
#[test]
fn what_is_lost_is_an_error_and_never_wrong_bytes() {
    const BLOCK: usize = 65_536;
    let mut world = World::new("mounts-lost", Transport::Unix).unwrap();
    let data = world.place.data.clone();
    let whole = |n: u8| (0..300_000u32).map(|at| (at % 251) as u8 ^ n).collect::<Vec<u8>>();
    let names = ["written", "resting", "good"];
    for (n, name) in (0..).zip(names) {
        fs::write(data.join(name), whole(n)).unwrap();
    }
    let script = "touch \"$1/ready\"; while ! test -e \"$1/go\"; do sleep 0.02; done; \
                  printf more | dd of=\"$0/written\" bs=1 seek=7 conv=notrunc status=none; touch \"$1/done\"; \
                  while ! test -e \"$2\"; do sleep 0.02; done";
    world.start_replayer().unwrap();
    let (aux, stop) = (world.place.aux.clone(), world.place.stop());
    let words = ["sh", "-c", script, data.to_str().unwrap(), aux.to_str().unwrap(), stop.to_str().unwrap()];
    world.run(&words.map(str::to_owned)).unwrap();
    let copy = world.scratch.join("then");
    let first = world.checkpoint_stopped(&copy::command(&data, &copy)).unwrap();
    world.wait_applied(first).unwrap();
    // In the first block of one and the third of the other, under the times that the applier gave them.
    for (name, at) in [("written", 100), ("resting", 150_000)] {
        let file = fs::File::options().read(true).write(true).open(world.backup().join(name)).unwrap();
        let times = file.metadata().unwrap().modified().unwrap();
        file.write_all_at(b"spoiled", at).unwrap();
        file.set_modified(times).unwrap();
    }
    let mounted = mount(&world, first, copy);
    let shown = mounted.data(&world);
    let blocks = |name: &str, n: u8| -> Vec<bool> {
        let (path, whole) = (shown.join(name), whole(n));
        let of = |(block, right): (usize, &[u8])| lost_or_right(&path, (block * BLOCK) as u64, right);
        whole.chunks(BLOCK).enumerate().map(of).collect()
    };
    assert_eq!(blocks("written", 0), [false, true, true, true, true]);
    assert_eq!(blocks("resting", 1), [true, true, false, true, true]);
    assert_eq!(blocks("good", 2), [true; 5]);
    let named = fs::read_to_string(world.logs().join("mount.log")).unwrap();
    assert!(named.contains("bytes 0 to 65536 of object ") && named.contains(" are lost: "), "{named}");
    // The program writes into the spoiled block: the step marks it, and the agent sends all of it.
    fs::write(aux.join("go"), "").unwrap();
    let done = aux.join("done");
    until("the program", SOON, || done.exists().then_some(())).unwrap();
    let repaired = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut rounds = 0u32;
            while !repaired.load(Ordering::SeqCst) || rounds == 0 {
                assert_eq!(blocks("good", 2), [true; 5]);
                assert!(!blocks("written", 0)[0]);
                assert!(blocks("resting", 1)[0]);
                rounds += 1;
            }
        });
        let said = world.agent_command(&["verify", "--repair"], SOON);
        repaired.store(true, Ordering::SeqCst);
        let said = said.unwrap();
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        assert_eq!(said.status.code(), Some(0), "{text}");
        reader.join().unwrap();
    });
    until("the agent to send again what is lost", SOON, || {
        (world.replayer_status().ok()?["state"] == "ready").then_some(())
    })
    .unwrap();
    // What was written over before it was sent again is lost for good; the other is as it was.
    assert_eq!(blocks("written", 0), [false, true, true, true, true]);
    assert_eq!(blocks("resting", 1), [true; 5]);
    let copy = world.scratch.join("now");
    let last = world.checkpoint_stopped(&copy::command(&data, &copy)).unwrap();
    world.wait_applied(last).unwrap();
    let newest = mount(&world, last, copy);
    newest.is_equal(&world);
    for mounted in [mounted, newest] {
        let at = mounted.at.to_str().unwrap().to_owned();
        mounted.end(&["umount", &at]);
    }
    assert!(world.finish().unwrap().success());
}
